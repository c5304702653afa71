# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The exact Gaussian version of the conditional VAE."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import torch
from pyro.nn.module import pyro_method
from torch import Tensor, nn

from pyro_cpa.errors import InvalidData
from pyro_cpa.models.gaussian_noise import NoiseKind
from pyro_cpa.models.labelled_generator import AbstractLabelledGenerator
from pyro_cpa.models.likelihoods import Mode
from pyro_cpa.models.networks import Activation, LabelPlacement

__all__ = ["ConditionalCPAGenerator"]


class ConditionalCPAGenerator(AbstractLabelledGenerator):
    r"""Piecewise-affine generator of x given a label y, with exact evidence and posterior.

    .. math:: z \mid y \sim N(m_y, \mathrm{diag}(s_y^2)), \qquad x \mid y, z \sim N(g(z; c_y), S_x), \qquad
        q(z \mid x, y) = p(z \mid x, y), \qquad p(y \mid x) \propto p(y)\, p(x \mid y)

    The label shifts the first layer by a bias c_y, as if it were an input, one-hot, beside z. Given y this is a
    :class:`CPAGenerator`; its generative classifier :meth:`classify` is exact. NaN marks a missing entry of x in
    every method.

    Args:
        data_dim: D.
        num_classes: C; labels are integers 0, ..., C-1.
        latent_dim: L; beyond 3 the evidence is an estimate unless the decoder is affine.
        label_in: "both"; "prior" for p(z|y) p(x|z); "decoder" for p(z) p(x|y,z).
        hidden_dims: Widths of the decoder's hidden layers.
        activation: Makes the piecewise-linear activation module of the hidden layers.
        noise: Form of S_x: "scalar", "diagonal" or "full".
        noise_scale: Its initial standard deviation, a number or (D,).
        label_probs: (C,) p(y); uniform until ``fit`` sets it to the labels' frequencies.
        max_regions: More regions than this raise ``RegionBudgetExceeded``.

    Raises:
        UnsupportedModule: If the activation is not piecewise affine.
        InvalidData: For bad settings; by the methods, for labels out of range and for data of another shape.

    Note:
        Exact up to float64 rounding; ``log_prob(x, y)`` costs one evaluation of
        :class:`~pyro_cpa.distributions.CPAMarginal` per row, the sum over y C of them. Before ``model`` and
        ``guide`` of a second model run in the same process call ``pyro.clear_param_store()``.

    References:
        Sohn, Lee and Yan (2015), Learning structured output representation using deep conditional generative
        models.
        R. Balestriero, S. Paris, R. Baraniuk (2020), "Analytical Probability Distributions and Exact
        Expectation-Maximization for Deep Generative Networks".

    Example:
        >>> _ = torch.manual_seed(0)
        >>> generator = ConditionalCPAGenerator(data_dim=2, num_classes=2, hidden_dims=(4,))
        >>> y = torch.arange(20) % 2
        >>> x = 0.3 * torch.randn(20, 2) + 3 * y[:, None]
        >>> history = generator.fit(x, y, num_steps=20)
        >>> (generator.classify(x) == y).all().item(), generator.generate(4, y=1).shape
        (True, torch.Size([4, 2]))
    """

    def __init__(
        self,
        data_dim: int,
        num_classes: int,
        latent_dim: int = 1,
        *,
        label_in: LabelPlacement = "both",
        hidden_dims: Sequence[int] = (32,),
        activation: Activation = nn.ReLU,
        noise: NoiseKind = "diagonal",
        noise_scale: float | Tensor = 1.0,
        label_probs: Tensor | None = None,
        max_regions: int = 200_000,
    ) -> None:
        super().__init__(
            data_dim,
            num_classes,
            latent_dim,
            label_in,
            hidden_dims,
            activation,
            noise,
            noise_scale,
            label_probs,
            max_regions,
        )

    @pyro_method
    def model(self, x: Tensor, y: Tensor | int, *, size: int | None = None) -> Tensor:
        """p(x, z | y).

        Args:
            x: (N, D) data, NaN where missing.
            y: (N,) labels, or one for all rows.
            size: Number of rows of the whole data set, if x is a minibatch of it.

        Returns:
            The decoder's output, (..., N, D).
        """
        x = self.checked(x)
        labels = self._labels(y, len(x))
        with self.data_plate(len(x), size):
            z = pyro.sample("z", self.prior(labels))
            outputs = self.decoder_output(z, labels)
            pyro.sample("x", self.likelihood(outputs), obs=x)
        return outputs

    @pyro_method
    def guide(self, x: Tensor, y: Tensor | int, *, size: int | None = None) -> Tensor:
        """Exact p(z | x, y); arguments as for ``model``. Returns z, without gradients."""
        posterior = self.posterior(x, y)
        with self.data_plate(len(x), size):
            return pyro.sample("z", posterior)

    def classify(self, x: Tensor) -> Tensor:
        """(N,) most probable labels given x."""
        return self.class_probs(x).argmax(-1)

    def reconstruct(self, x: Tensor, y: Tensor | int, *, mode: Mode = "mean") -> Tensor:
        """(N, D) data decoded from ``encode(x, y)``."""
        return self.decode(self.encode(x, y), y, mode=mode)

    def fit(self, x: Tensor, y: Tensor, *, num_steps: int = 100) -> list[float]:
        """Maximum likelihood of x given y by L-BFGS on the exact evidence, and of y by its frequencies.

        Args:
            x: (N, D) data, NaN where missing.
            y: (N,) labels; every class must occur.
            num_steps: At most so many evaluations of the evidence and its gradient.

        Returns:
            Summed log p(x | y): before, and after each evaluation that improved on it.
        """
        x = self.checked(x)
        labels = self._labels(y, len(x))
        counts = torch.bincount(labels, minlength=self.num_classes)
        if not bool((counts > 0).all()):
            absent = (counts == 0).nonzero().flatten().tolist()
            raise InvalidData(
                f"no row has label {absent}; expected each of the {self.num_classes} classes. Lower num_classes, "
                "or recode the labels."
            )
        self.label_probs = (counts / len(x)).to(x)
        return self._climb(lambda: self.log_prob(x, labels), len(x), num_steps)
