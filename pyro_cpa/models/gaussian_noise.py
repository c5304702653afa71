# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Gaussian noise around a decoder, in the form in which the exact methods can learn it."""

from __future__ import annotations

from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_cpa.errors import InvalidData
from pyro_cpa.models.likelihoods import AbstractLikelihood

__all__ = ["GaussianNoise", "NoiseKind"]

NoiseKind = Literal["scalar", "diagonal", "full"]


class GaussianNoise(PyroModule, AbstractLikelihood):
    r"""Likelihood :math:`x \sim N(g(z), S_x)` that leaves out missing entries (NaN).

    Unlike :class:`~pyro_cpa.models.Normal`, its scale is a ``PyroParam``, which EM updates in closed form.

    Args:
        data_dim: D.
        kind: "scalar" for one standard deviation, "diagonal" for one per entry, "full" for a covariance.
        scale: Initial standard deviation: a number, or (D,) unless ``kind`` is "scalar".
        learn: Whether the noise is a parameter or fixed.

    Raises:
        InvalidData: For another kind, or a scale that is not positive and finite.

    Example:
        >>> noise = GaussianNoise(3, "full", 0.5)
        >>> noise.covariance_matrix.diagonal().tolist()
        [0.25, 0.25, 0.25]
    """

    # Without PyroModule's: outside of model and guide, this module's values count and not the parameter store's.
    __call__ = nn.Module.__call__
    _expected, _cure = "a finite number, or NaN where it is missing", "Drop or repair the row."
    scale: Any
    scale_tril: Any

    def __init__(
        self,
        data_dim: int,
        kind: NoiseKind = "diagonal",
        scale: float | Tensor = 1.0,
        *,
        learn: bool = True,
    ) -> None:
        super().__init__()
        start = torch.as_tensor(scale, dtype=torch.get_default_dtype()).detach().clone()
        shapes = [()] if kind == "scalar" else [(), (data_dim,)]
        if kind not in ("scalar", "diagonal", "full"):
            raise InvalidData(f"the noise is {kind!r}; choose 'scalar', 'diagonal' or 'full'.")
        if start.shape not in shapes or not bool((torch.isfinite(start) & (start > 0)).all()):
            raise InvalidData(
                f"the scale of the {kind} noise is {start.tolist()}; expected a positive number"
                + ("." if kind == "scalar" else f", or one for each of the {data_dim} entries of x.")
            )
        self.data_dim = data_dim
        self.kind = kind
        name = "scale_tril" if kind == "full" else "scale"
        constraint: Any = constraints.lower_cholesky if kind == "full" else constraints.positive
        if kind == "diagonal":
            start = start.expand(data_dim).clone()
        elif kind == "full":
            start = torch.diag(start.expand(data_dim))
        if learn:
            setattr(self, name, PyroParam(start, constraint))
        else:
            self.register_buffer(name, start)

    @property
    def covariance_matrix(self) -> Tensor:
        """(D, D) Sx."""
        if self.kind == "full":
            return self.scale_tril @ self.scale_tril.mT
        return torch.diag(self.scale.expand(self.data_dim) ** 2)

    def arguments(self) -> dict[str, Any]:
        """The noise as :class:`~pyro_cpa.distributions.CPAMarginal` takes it."""
        return {"covariance_matrix": self.covariance_matrix} if self.kind == "full" else {"scale": self.scale}

    def forward(self, outputs: Tensor) -> TorchDistribution:
        if self.kind == "full":
            return dist.NanMaskedMultivariateNormal(outputs, scale_tril=self.scale_tril)
        return dist.NanMaskedNormal(outputs, self.scale).to_event(1)

    def param(self, outputs: Tensor) -> Tensor:
        """The location g(z)."""
        return outputs

    def _inside(self, x: Tensor) -> Tensor:
        return ~torch.isinf(x)
