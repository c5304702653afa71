# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The regions of a piecewise-affine decoder: their cells, and the affine map on each of them."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import InvalidData
from .arrangement import Arrangement
from .cells import Cells, WholeSpace
from .graph import homogeneous_basis
from .layers import Dense, Layer
from .layerwise import cut_layer_by_layer
from .network import Network

__all__ = ["Partition", "enumerate_regions"]

MAP_BYTES = 2**28
"""Temporaries of maps that are computed at once for several regions, those kept for a derivative included."""


class Partition:
    r"""The regions of a continuous piecewise-affine decoder, made by :func:`enumerate_regions`.

    .. math::

        g(z) = A_r z + b_r \quad \text{for } z \text{ in cell } r, \qquad A_r = W H_r, \; b_r = W h_r + v.

    Attributes:
        network: the decoder as a network of layers, bound to its live parameters.
        cells: the R cells: :class:`WholeSpace` (R = 1), :class:`Intervals` (L = 1),
            :class:`Polygons` (L = 2) or :class:`Polytopes` (L > 2).
        patterns: for every activation layer the segment (R, H) int8 on which each unit is.
        output_weight: (D, H) W: the last ``nn.Linear``, or all that follows the last units if these are fewer
            than the outputs; otherwise the identity.
        output_bias: (D,) v.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> decoder = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)).double()
        >>> part = enumerate_regions(decoder)
        >>> part
        Partition(R^2 -> R^3, 37 regions)
        >>> z = torch.randn(100, 2, dtype=torch.float64)
        >>> r = part.locate(z)
        >>> piece = (part.slopes[r] @ z[..., None])[..., 0] + part.offsets[r]
        >>> torch.allclose(piece, decoder(z), rtol=1e-12)
        True
    """

    def __init__(
        self,
        network: Network,
        layers: tuple[Layer, ...],
        arrangement: Arrangement,
        patterns: tuple[Tensor, ...],
    ) -> None:
        self.network = network
        self.patterns = patterns
        self._layers = layers
        self._arrangement = arrangement
        cells = arrangement.cells
        self.cells: Cells = cells if len(cells) > 1 else WholeSpace(network.latent_dim)
        self._values, self._shared = self._features_of(layers)
        eye = torch.eye(network.data_dim, dtype=torch.float64, device=network.device)
        self.output_weight, self.output_bias = self._shared or (eye, eye.new_zeros(len(eye)))

    @property
    def num_regions(self) -> int:
        """R."""
        return len(self.cells)

    @property
    def latent_dim(self) -> int:
        """L."""
        return self.network.latent_dim

    @property
    def data_dim(self) -> int:
        """D."""
        return self.network.data_dim

    @property
    def dtype(self) -> torch.dtype:
        """The decoder's own dtype; everything here is in float64."""
        return self.network.dtype

    @property
    def device(self) -> torch.device:
        """The decoder's device, on which everything here is."""
        return self.network.device

    def __repr__(self) -> str:
        return f"Partition(R^{self.latent_dim} -> R^{self.data_dim}, {self.num_regions} regions)"

    @cached_property
    def feature_slopes(self) -> Tensor:
        """(R, H, L) slopes H_r of the input of the last linear layer."""
        return self._features[0]

    @cached_property
    def feature_offsets(self) -> Tensor:
        """(R, H) offsets h_r of the input of the last linear layer."""
        return self._features[1]

    @cached_property
    def slopes(self) -> Tensor:
        """(R, D, L) A_r, detached, as the parameters were at enumeration."""
        return _through(self.output_weight, self.feature_slopes) if self._shared else self.feature_slopes

    @cached_property
    def offsets(self) -> Tensor:
        """(R, D) b_r, detached, as the parameters were at enumeration."""
        if not self._shared:
            return self.feature_offsets
        return self.feature_offsets @ self.output_weight.mT + self.output_bias

    def maps_of(self, regions: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Slopes (P, D, L) and offsets (P, D) of some regions, without those of all."""
        slopes, offsets = self.feature_slopes[regions], self.feature_offsets[regions]
        if not self._shared:
            return slopes, offsets
        return _through(self.output_weight, slopes), offsets @ self.output_weight.mT + self.output_bias

    @cached_property
    def _features(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self._maps(self._layers, *self._values)

    def _features_of(self, layers: tuple[Layer, ...]) -> tuple[tuple[int, ...], tuple[Tensor, Tensor] | None]:
        """The values that are the features, and the affine map from them to the output, where they are not it."""
        graph = self.network.graph
        if layers and isinstance(layers[-1], Dense):
            return graph.inputs[-1], (layers[-1].weight, layers[-1].bias)
        # What follows the last units is the same on all regions; it pays where they are fewer than the outputs.
        if sum(graph.widths[value] for value in graph.frontier) < self.data_dim:
            return graph.frontier, graph.tail(layers)
        return (graph.last,), None

    def locate(self, z: Tensor) -> Tensor:
        """Region of every point.

        Args:
            z: (..., L) points.

        Returns:
            (...,) indices: every point lies in exactly one cell, those on a wall too.

        Raises:
            InvalidData: the last dimension of z is not L.
        """
        if z.dim() == 0 or z.shape[-1] != self.latent_dim:
            raise InvalidData(f"z must have shape (..., {self.latent_dim}), but has {tuple(z.shape)}.")
        flat = z.detach().reshape(-1, self.latent_dim).double()
        return self._arrangement.locate(flat).reshape(z.shape[:-1])

    def affine_maps(self, layers: tuple[Layer, ...] | None = None) -> tuple[Tensor, Tensor]:
        """Slopes (R, D, L) and offsets (R, D) as differentiable functions of the decoder's live parameters.

        Each region keeps its activation pattern. Values equal ``slopes`` and ``offsets`` while the
        parameters are as they were at enumeration.

        Args:
            layers: ``network.layers()`` as read at an earlier time; by default they are read now.
        """
        layers = self.network.layers() if layers is None else layers
        values, shared = self._features_of(layers)
        slopes, offsets = self._maps(layers, *values)
        if shared is None:
            return slopes, offsets
        return _through(shared[0], slopes), offsets @ shared[0].mT + shared[1]

    def linear_inputs(self, index: int) -> tuple[Tensor, Tensor]:
        """Slopes (R, H_in, L) and offsets (R, H_in) of the input of linear layer ``index``, at present values."""
        with torch.no_grad():
            position = self.network.linear_steps[index]
            return self._maps(self.network.layers(), self.network.graph.inputs[position][0])

    def downstream(self, index: int) -> Tensor:
        """Derivative (R, D, H_out) of the output in that of linear layer ``index``, at present values."""
        graph, value = self.network.graph, self.network.linear_steps[index] + 1
        with torch.no_grad():
            layers = self.network.layers()
            eye = torch.eye(self.data_dim, dtype=torch.float64, device=self.device)[None]
            parts = []
            for rows in self._chunks(self.data_dim * graph.numbers(graph.last)):
                pulled = graph.pull(layers, [pattern[rows] for pattern in self.patterns], eye, value)
                parts.append(pulled.expand(rows.stop - rows.start, -1, -1))
            return torch.cat(parts)

    def _chunks(self, numbers: int) -> list[slice]:
        """Slices of regions whose temporaries, ``numbers`` for each of them, fit ``MAP_BYTES``."""
        size = max(1, MAP_BYTES // (8 * numbers))
        return [slice(i, min(i + size, self.num_regions)) for i in range(0, self.num_regions, size)]

    def _maps(self, layers: tuple[Layer, ...], *values: int) -> tuple[Tensor, Tensor]:
        graph = self.network.graph
        basis = homogeneous_basis(self.latent_dim, torch.empty(0, dtype=torch.float64, device=self.device))

        def push(*patterns: Tensor) -> Tensor:
            return graph.push(layers, patterns, *basis, *values)

        # Derivatives keep the maps of all values on the way, unless these are computed again chunk by chunk.
        keeps = torch.is_grad_enabled()
        chunks = self._chunks((self.latent_dim + 1) * graph.numbers(*values, kept=keeps))
        if len(chunks) == 1 or not graph.has_units(*values):
            maps = push(*self.patterns).expand(self.num_regions, -1, -1)
        elif keeps:
            parts = [tuple(pattern[rows] for pattern in self.patterns) for rows in chunks]
            maps = torch.cat(
                [checkpoint(push, *p, use_reentrant=False, preserve_rng_state=False) for p in parts]
            )
        else:
            width = sum(graph.widths[value] for value in values)
            maps = basis[0].new_empty(self.num_regions, self.latent_dim + 1, width)
            for rows in chunks:
                maps[rows] = push(*(pattern[rows] for pattern in self.patterns))
        return maps[:, :-1].mT, maps[:, -1]


def _through(weight: Tensor, slopes: Tensor) -> Tensor:
    """Slopes (R, D, L) from those of the features (R, H, L), by one product of matrices rather than one a region."""
    return (slopes.mT @ weight.mT).mT


def enumerate_regions(
    decoder: nn.Module | Network,
    max_regions: int = 200_000,
    latent_dim: int | None = None,
    progress: bool = False,
) -> Partition:
    r"""All regions of a continuous piecewise-affine decoder, and its affine map on each.

    .. math::

        g(z) = A_r z + b_r, \qquad z \in \text{cell } r, \qquad r = 1, \ldots, R.

    Cells are cut layer by layer: on a cell of the layers before, the input of every unit is affine, and
    the cell is cut where a unit changes its slope. Unbounded cells are exact: there is no bounding box.

    Args:
        decoder: module R^L -> R^D; see :class:`Network` for what it may hold. A ``Network`` saves reading
            it again.
        max_regions: more regions than this raise.
        latent_dim: L, where no layer of the decoder tells it.
        progress: show a progress bar over the layers: a million regions take a minute or two.

    Returns:
        The :class:`Partition`, in float64 on the decoder's device, detached from its parameters.

    Raises:
        UnsupportedModule: the decoder is not piecewise affine.
        RegionBudgetExceeded: there are more than ``max_regions`` regions.
        InvalidData: a parameter is NaN or infinite.

    Note:
        Exact up to rounding: walls that reach less deep into a cell than float64 can tell (see
        ``walls.NOISE``) are left out. Cost grows as the number of (cell, unit) pairs tested, R times the
        width of the layers, times the corners of a cell.

    References:
        R. Balestriero, S. Paris, R. Baraniuk (2020), "Analytical Probability Distributions and Exact
        Expectation-Maximization for Deep Generative Networks".

    Example:
        >>> decoder = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> with torch.no_grad():
        ...     _ = decoder[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        ...     _ = decoder[0].bias.copy_(torch.tensor([-1.0, 2.0]))
        >>> part = enumerate_regions(decoder)
        >>> part.num_regions
        3
        >>> part.cells.upper
        tensor([1., 2., inf], dtype=torch.float64)
        >>> part.locate(torch.tensor([[-5.0], [1.5], [9.0]]))
        tensor([0, 1, 2])
    """
    network = decoder if isinstance(decoder, Network) else Network(decoder, latent_dim)
    with torch.no_grad():
        layers = network.snapshot()
        arrangement, patterns = cut_layer_by_layer(network, layers, max_regions, progress)
    return Partition(network, layers, arrangement, patterns)
