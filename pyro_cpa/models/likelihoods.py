# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What a decoder's output means: p(x | decoder(z)), its support and its summaries."""

from __future__ import annotations

from typing import Literal

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_cpa.errors import InvalidData
from pyro_cpa.models.continuous_bernoulli import LogitContinuousBernoulli

__all__ = ["AbstractLikelihood", "Bernoulli", "Categorical", "ContinuousBernoulli", "Mode", "Normal"]

Mode = Literal["sample", "mean", "param"]


class AbstractLikelihood(nn.Module):
    """Distribution of D independent entries of x given the decoder's output.

    Calling it with outputs (..., ``outputs_per_entry`` * D) gives a distribution with event shape (D,).
    """

    outputs_per_entry = 1
    inputs_per_entry = 1

    def forward(self, outputs: Tensor) -> TorchDistribution:
        raise NotImplementedError

    def param(self, outputs: Tensor) -> Tensor:
        """The distribution's own parameter, (..., D) unless said otherwise."""
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """(..., ``inputs_per_entry`` * D): data as an encoder sees them."""
        return x

    def summary(self, outputs: Tensor, mode: Mode) -> Tensor:
        """A draw, the mean or the parameter of the distribution, in the dtype of ``outputs``.

        Raises:
            InvalidData: If ``mode`` is none of these, or "mean" where a mean makes no sense.
        """
        if mode == "sample":
            return self(outputs).sample().to(outputs.dtype)
        if mode == "mean":
            return self(outputs).mean
        if mode == "param":
            return self.param(outputs)
        raise InvalidData(f"mode is {mode!r}; choose 'sample', 'mean' or 'param'.")

    def check(self, x: Tensor) -> None:
        """Refuses data outside the support.

        Raises:
            InvalidData: Naming the first offending entry.
        """
        outside = ~self._inside(x)
        if outside.any():
            index = tuple(outside.nonzero()[0].tolist())
            value = x[index].item()
            cure = self._cure if value == value else "There is no missing-data path: fill in or drop NaN."
            raise InvalidData(f"x{list(index)} is {value:.6g}; expected {self._expected}. {cure}")

    _expected = ""
    _cure = ""

    def _inside(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Normal(AbstractLikelihood):
    r"""Gaussian noise of learned scale around the decoder: :math:`x \sim N(g(z), \mathrm{diag}(\sigma^2))`.

    With a piecewise-affine decoder this is the likelihood for which the library's exact methods exist.

    Args:
        scale: Initial :math:`\sigma`, a number or a (D,) tensor of one scale per entry.
        learn_scale: Whether the scale is a parameter (kept as its logarithm) or fixed.

    Raises:
        InvalidData: If a scale is not positive and finite.

    Example:
        >>> likelihood = Normal(scale=0.5)
        >>> likelihood(torch.zeros(4, 3)).event_shape, likelihood.scale.item()
        (torch.Size([3]), 0.5)
    """

    _expected, _cure = "a finite number", "Drop or repair the row."

    def __init__(self, scale: float | Tensor = 1.0, *, learn_scale: bool = True) -> None:
        super().__init__()
        scale = torch.as_tensor(scale, dtype=torch.get_default_dtype()).detach().clone()
        if scale.dim() > 1 or not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise InvalidData(f"scale is {scale}; expected a positive number or one for each entry of x.")
        self.log_scale = nn.Parameter(scale.log(), requires_grad=learn_scale)

    @property
    def scale(self) -> Tensor:
        """() or (D,) noise scale."""
        return self.log_scale.exp()

    def forward(self, outputs: Tensor) -> TorchDistribution:
        return dist.Normal(outputs, self.scale).to_event(1)

    def param(self, outputs: Tensor) -> Tensor:
        """The location g(z)."""
        return outputs

    def _inside(self, x: Tensor) -> Tensor:
        return torch.isfinite(x)


class Bernoulli(AbstractLikelihood):
    r"""Binary entries, :math:`P(x_d = 1) = \sigma(g_d(z))`; ``param`` and mean are that probability."""

    _expected, _cure = "only 0 and 1", "Binarise first, for example (x > 0.5).float()."

    def forward(self, outputs: Tensor) -> TorchDistribution:
        return dist.Bernoulli(logits=outputs).to_event(1)

    def param(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid()

    def _inside(self, x: Tensor) -> Tensor:
        return (x == 0) | (x == 1)


class ContinuousBernoulli(AbstractLikelihood):
    r"""Entries in [0, 1] with density proportional to :math:`\lambda^x (1 - \lambda)^{1 - x}`.

    ``param`` is :math:`\lambda = \sigma(g(z))`, which is *not* the mean: at 0.1 the mean is 0.330.
    """

    _expected, _cure = "a number in [0, 1]", "Rescale, for example x / 255."

    def forward(self, outputs: Tensor) -> TorchDistribution:
        return LogitContinuousBernoulli(logits=outputs).to_event(1)

    def param(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid()

    def _inside(self, x: Tensor) -> Tensor:
        return (x >= 0) & (x <= 1)


class Categorical(AbstractLikelihood):
    """Entries with C unordered values 0, ..., C-1, the decoder giving C logits for each.

    ``param`` is the (..., D, C) table of probabilities; encoders see the entries one-hot.

    Args:
        num_categories: C.

    Raises:
        InvalidData: If C is below 2, or for ``summary(..., "mean")``: labels have no mean.
    """

    def __init__(self, num_categories: int) -> None:
        super().__init__()
        if num_categories < 2:
            raise InvalidData(f"num_categories is {num_categories}; expected at least 2.")
        self.outputs_per_entry = self.inputs_per_entry = num_categories
        self._expected = f"an integer from 0 to {num_categories - 1}"
        self._cure = "Recode the values or raise num_categories."

    def forward(self, outputs: Tensor) -> TorchDistribution:
        return dist.Categorical(logits=self._table(outputs)).to_event(1)

    def param(self, outputs: Tensor) -> Tensor:
        return self._table(outputs).softmax(-1)

    def features(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(x.long(), self.inputs_per_entry).to(x.dtype).flatten(-2)

    def summary(self, outputs: Tensor, mode: Mode) -> Tensor:
        if mode == "mean":
            raise InvalidData("mode is 'mean', but categories have none; choose 'sample' or 'param'.")
        return super().summary(outputs, mode)

    def _table(self, outputs: Tensor) -> Tensor:
        return outputs.unflatten(-1, (-1, self.outputs_per_entry))

    def _inside(self, x: Tensor) -> Tensor:
        return (x >= 0) & (x < self.outputs_per_entry) & (x == x.round())
