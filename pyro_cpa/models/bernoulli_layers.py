# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What every stack of Bernoulli layers shares: two directed nets over the same binary layers.

Layers are always listed data first, ``[x, z_1, ..., z_L]`` with ``z_0 = x``. The generation net runs from
the top down, the recognition net from the data up::

    p(x, z) = p(z_L) prod_l p(z_{l-1} | z_l)          q(z | x) = prod_l q(z_l | z_{l-1})

Three models differ only in the maps between layers, in the prior of the top and in what they add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from pyro.nn.module import pyro_method
from torch import Tensor, nn

from pyro_cpa.errors import InvalidData
from pyro_cpa.infer.evidence import Evidence, log_evidence
from pyro_cpa.models.latent_model import check_count

__all__ = [
    "AbstractBernoulliStack",
    "Shift",
    "check_binary",
    "check_stack",
    "deterministic_map",
]

# Rows (particles x data) that pass through the nets at once: bounds the memory, not the result.
MAX_ROWS = 2**14


def check_binary(x: Tensor, dim: int, like: Tensor, name: str = "x") -> Tensor:
    """``x`` as a tensor of the dtype and device of ``like``, after checking that it is (N, dim) and binary.

    Args:
        x: (N, dim) of zeros and ones, of any dtype.
        dim: expected number of columns.
        like: tensor whose dtype and device the result takes.
        name: what to call the tensor in a message.

    Raises:
        InvalidData: for another shape, NaN, or a value other than 0 and 1.
    """
    if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] != dim:
        given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise InvalidData(
            f"{name} is {given}; expected a tensor of shape (N, {dim}): one row per datum. "
            f"Reshape images with x.reshape(len(x), -1)."
        )
    x = x.to(like)
    wrong = (x != 0) & (x != 1)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        value = x[row, column].item()
        cure = (
            "These layers have no missing-data path: fill in or drop the rows with NaN."
            if value != value
            else "Binarise first, e.g. (x > 0.5).float() or torch.bernoulli(x)."
        )
        raise InvalidData(f"{name}[{row}, {column}] is {value:.6g}; expected only 0 and 1. {cure}")
    return x


def check_stack(
    data_dim: int, layer_sizes: Sequence[int], deterministic: int, deterministic_size: int | None
) -> tuple[int, ...]:
    """``(data_dim, *layer_sizes)`` after checking all sizes of a stack."""
    check_count(data_dim=data_dim, **{f"layer_sizes[{i}]": size for i, size in enumerate(layer_sizes)})
    if not layer_sizes:
        raise InvalidData("layer_sizes is empty; expected at least one latent layer.")
    if deterministic < 0:
        raise InvalidData(f"deterministic is {deterministic}; expected the number of tanh layers, 0 or more.")
    if deterministic_size is not None:
        check_count(deterministic_size=deterministic_size)
    return (data_dim, *layer_sizes)


class Shift(nn.Module):
    """The fixed affine input map ``scale * z - shift`` (``2 z - 1`` for signed units).

    Args:
        scale: factor.
        shift: (D,) or scalar tensor.
    """

    shift: Tensor

    def __init__(self, scale: float, shift: Tensor) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("shift", shift)

    def forward(self, z: Tensor) -> Tensor:
        return self.scale * z - self.shift


def deterministic_map(
    inputs: int, outputs: int, deterministic: int = 0, width: int | None = None
) -> nn.Sequential:
    """Linear map from one layer to the logits of the next, with ``deterministic`` tanh layers in between.

    Args:
        inputs, outputs: units below and above.
        deterministic: number of tanh layers.
        width: their size; ``(inputs + outputs) // 2`` if None.
    """
    width = max(1, (inputs + outputs) // 2) if width is None else width
    sizes = [inputs, *[width] * deterministic, outputs]
    modules: list[nn.Module] = []
    for above, below in zip(sizes[:-1], sizes[1:], strict=True):
        modules += [nn.Linear(above, below), nn.Tanh()]
    return nn.Sequential(*modules[:-1])


class AbstractBernoulliStack(PyroModule):
    r"""Generation net p and recognition net q over the same layers of binary units.

    .. math:: p(x, z) = p(z_L) \prod_{l=1}^L p(z_{l-1} \mid z_l), \qquad
              q(z \mid x) = \prod_{l=1}^L q(z_l \mid z_{l-1}), \qquad z_0 = x

    Args:
        sizes: numbers of units ``[D, H_1, ..., H_L]``, data first.
        generation: ``generation[l]`` maps z_{l+1} to the logits of z_l.
        recognition: ``recognition[l]`` maps z_l to the logits of z_{l+1}.
        prior_logits: (H_L,) initial logits of the top layer; None if the subclass has another prior.

    Note:
        One plate, ``"data"``, over the rows of x; sites ``"x"``, ``"z1"``, ..., ``"zL"``. Batch dimensions to
        the left (vectorised particles) broadcast.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        generation: Sequence[nn.Module],
        recognition: Sequence[nn.Module],
        prior_logits: Tensor | None,
    ) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.sites = ("x", *(f"z{level}" for level in range(1, len(sizes))))
        self.generation = nn.ModuleList(generation)
        self.recognition = nn.ModuleList(recognition)
        self.prior_logits = None if prior_logits is None else nn.Parameter(prior_logits)

    # ---- what a subclass may replace -------------------------------------------------------------------

    def layer(self, level: int, logits: Tensor) -> TorchDistribution:
        """Distribution of layer ``level`` (0 is x) given its logits; event_dim 1."""
        return dist.Bernoulli(logits=logits).to_event(1)

    def activation(self, level: int, logits: Tensor) -> Tensor:
        """Mean of :meth:`layer`."""
        return torch.sigmoid(logits)

    def top_logits(self) -> Tensor:
        """(H_L,) logits of the prior of the top layer."""
        return self.prior_logits  # type: ignore[return-value]  # None only where this is replaced

    # ---- Pyro ------------------------------------------------------------------------------------------

    @pyro_method
    def model(self, x: Tensor, observations: Mapping[str, Tensor] | None = None) -> Tensor:
        """p(x, z) with ``x`` (N, D) observed; returns x. ``observations`` is for the guide alone."""
        generation, top = self.generation, len(self.sizes) - 1
        x = self.check(x)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample(self.sites[top], self.layer(top, self.top_logits()))
            for level in range(top - 1, 0, -1):
                z = pyro.sample(self.sites[level], self.layer(level, generation[level](z)))
            return pyro.sample("x", self.layer(0, generation[0](z)), obs=x)

    @pyro_method
    def guide(self, x: Tensor, observations: Mapping[str, Tensor] | None = None) -> None:
        """q(z | x) for ``x`` (N, D), or for simulated ``observations["x"]`` (..., N, D)."""
        recognition = self.recognition
        z = self.check(x) if observations is None else observations["x"]
        with pyro.plate("data", len(x), dim=-1):
            for level, site in enumerate(self.sites[1:], start=1):
                z = pyro.sample(site, self.layer(level, recognition[level - 1](z)))

    # ---- the same two nets without a trace: what estimators and samplers are built from -----------------

    def check(self, x: Tensor) -> Tensor:
        """``x`` in the dtype and device of the parameters, or :class:`InvalidData`."""
        return check_binary(x, self.sizes[0], next(self.parameters()))

    def log_generation(self, layers: Sequence[Tensor]) -> Tensor:
        """log p(x, z) of ``layers`` = [x, z_1, ..., z_L], each (..., H_l) (common batch shape)."""
        value = self.layer(len(layers) - 1, self.top_logits()).log_prob(layers[-1])
        for level, net in enumerate(self.generation):
            value = value + self.layer(level, net(layers[level + 1])).log_prob(layers[level])
        return value

    def log_recognition(self, layers: Sequence[Tensor]) -> Tensor:
        """log q(z | x) of ``layers`` = [x, z_1, ..., z_L], each (..., H_l) (common batch shape)."""
        return sum(
            self.layer(level + 1, net(layers[level])).log_prob(layers[level + 1])
            for level, net in enumerate(self.recognition)
        )  # type: ignore[return-value]

    @torch.no_grad()
    def sample_generation(self, num_samples: int, top: Tensor | None = None) -> list[Tensor]:
        """Ancestral samples of p: ``[x, z_1, ..., z_L]``, each (num_samples, H_l); ``top`` clamps z_L."""
        check_count(num_samples=num_samples)
        last = len(self.sizes) - 1
        layers = [self.layer(last, self.top_logits()).sample((num_samples,)) if top is None else top]
        for level in range(last - 1, -1, -1):
            layers.append(self.layer(level, self.generation[level](layers[-1])).sample())
        return layers[::-1]

    @torch.no_grad()
    def sample_recognition(self, x: Tensor, num_particles: int) -> list[Tensor]:
        """``[x, z_1, ..., z_L]`` with z ~ q(. | x): x as given, (..., D), the rest (K, ..., H_l)."""
        layers = [x, self.layer(1, self.recognition[0](x)).sample((num_particles,))]
        for level, net in enumerate(self.recognition[1:], start=2):
            layers.append(self.layer(level, net(layers[-1])).sample())
        return layers

    @torch.no_grad()
    def log_weights(self, x: Tensor, num_particles: int) -> Tensor:
        r""":math:`\log p(x, z_k) - \log q(z_k \mid x)` with :math:`z_k \sim q(\cdot \mid x)`.

        Args:
            x: (N, D) binary.
            num_particles: K.

        Returns:
            (K, N), without gradient.
        """
        check_count(num_particles=num_particles)
        x = self.check(x)
        at_once = max(1, min(num_particles, MAX_ROWS // max(1, len(x))))
        blocks = []
        for start in range(0, num_particles, at_once):
            layers = self.sample_recognition(x, min(at_once, num_particles - start))
            blocks.append(self.log_generation(layers) - self.log_recognition(layers))
        return torch.cat(blocks)

    # ---- uses ------------------------------------------------------------------------------------------

    def log_evidence(self, x: Tensor, num_particles: int = 1000, chunk_size: int | None = None) -> Evidence:
        """log p(x) by importance sampling from the guide; see :func:`~pyro_cpa.infer.log_evidence`.

        Args:
            x: (N, D) binary.
            num_particles: K.
            chunk_size: particles in memory at a time; by default all.

        Returns:
            ``log_prob``, ``standard_error`` and ``ess``, (N,) each.
        """
        return log_evidence(
            self.model, self.guide, self.check(x), num_particles=num_particles, chunk_size=chunk_size
        )

    @torch.no_grad()
    def encode(self, x: Tensor) -> list[Tensor]:
        """Mean-field activations of ``x`` (N, D): probabilities (N, H_l) of every latent layer, bottom first.

        The first layer holds the exact q(z_1 = 1 | x); above, means are passed up in place of samples.
        """
        values = [self.check(x)]
        for level, net in enumerate(self.recognition, start=1):
            values.append(self.activation(level, net(values[-1])))
        return values[1:]

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """(N, D) probabilities p(x = 1 | z_1) with z_1 drawn from q(. | x)."""
        z = self.layer(1, self.recognition[0](self.check(x))).sample()
        return self.activation(0, self.generation[0](z))

    @torch.no_grad()
    def generate(self, n: int, mode: str = "sample") -> Tensor:
        """``n`` draws of the generation net.

        Args:
            n: number of draws.
            mode: ``"sample"`` for binary x, ``"mean"`` for the probabilities p(x = 1 | z_1).

        Returns:
            (n, D).
        """
        layers = self.sample_generation(n)
        return self.present(layers, mode)

    def present(self, layers: Sequence[Tensor], mode: str) -> Tensor:
        """x of ``layers`` for ``mode="sample"``, p(x = 1 | z_1) for ``mode="mean"``."""
        if mode == "sample":
            return layers[0]
        if mode == "mean":
            return self.activation(0, self.generation[0](layers[1]))
        raise InvalidData(f"mode is {mode!r}; expected 'sample' or 'mean'.")
