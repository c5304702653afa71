# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
r"""Which regions matter to a datum: a tree of groups of regions, and certified bounds on what they add to p(x).

With the data and the decoder's images in noise-whitened coordinates, a group G of regions whose images lie in the box B
adds no more than

.. math::

    \sum_{r \in G} p(x, r) = \int_G N(x; g(z), S_x)\, dp(z) \le P(G)\, |2\pi S_x|^{-1/2} e^{-d(x, B)^2 / 2},

P(G) being its probability under the prior. Groups are halved by the place of their regions, so that few boxes are looked
at; those left out add less than ``tolerance`` times p(x) together, for which any share of p(x) is a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..compiled import array, in_blocks, runs_compiled
from ..partition.cells import Cells

__all__ = ["Candidates", "RegionTree"]

_LEAF = 8  # regions of the smallest groups
_BEAM = 8  # groups per datum on the way to a lower bound
_START = 64  # groups of the level at which a search begins
_NUMBERS = 2**22  # of one temporary
_REGIONS = 4096  # looked at at once

Images = Callable[[Tensor], tuple[Tensor, Tensor]]


class Candidates(NamedTuple):
    """What a search finds for N data.

    Attributes:
        kept: (N, G) True for the leaves of which a region may matter.
        omitted: (N,) bound on the share of p(x) outside of them.
    """

    kept: Tensor
    omitted: Tensor


class _Boxes(NamedTuple):
    """Boxes around groups, level after level: (2^(depth + 1) - 1, D). Node i has the children 2i + 1 and 2i + 2."""

    low: Tensor
    high: Tensor

    @classmethod
    def of_leaves(cls, low: Tensor, high: Tensor, depth: int) -> _Boxes:
        lows, highs = [low], [high]
        for _ in range(depth):
            lows.insert(0, lows[0].view(-1, 2, low.shape[1]).amin(1))
            highs.insert(0, highs[0].view(-1, 2, low.shape[1]).amax(1))
        return cls(torch.cat(lows), torch.cat(highs))

    def square(self, data: Tensor, node: Tensor) -> Tensor:
        """Squared distances (N, B) of data (N, D) from the boxes of nodes (N, B)."""
        if runs_compiled(data):
            from .pruning_compiled import squares

            found = data.new_empty(node.shape)
            split = [(array(data), 0), (array(node), 0), (found.numpy(), 0)]
            in_blocks(squares, [self.low.numpy(), self.high.numpy()], split, node.numel())
            return found
        x = data[:, None]
        return torch.maximum(self.low[node] - x, x - self.high[node]).clamp(min=0.0).square().sum(-1)


class RegionTree:
    """Groups of R regions, halved from level to level, and boxes around their images.

    Args:
        cells: the R cells.
        maps: of regions (P,), from latents to noise-whitened data: columns (P, L, D) of the slopes, and offsets (P, D).
        log_mass, mean: (R,) and (R, L), the cells' log-probability and mean under the prior.
    """

    def __init__(self, cells: Cells, maps: Images, log_mass: Tensor, mean: Tensor) -> None:
        self.depth = max(0, math.ceil(math.log2(len(mean) / _LEAF)))
        order = _halved(mean, self.depth)
        self.leaves = order.view(2**self.depth, -1)
        """(G, K) regions of each leaf, -1 where there are fewer."""
        self.rotation = _principal_axes(maps, mean, log_mass.exp())
        padded = torch.cat([log_mass, log_mass.new_full((1,), -torch.inf)])
        boxes, cores = self._boxes(cells, maps, mean)
        self.boxes = _Boxes.of_leaves(*boxes, self.depth)
        # Where regions mostly are: these boxes bound nothing, but are finite.
        self._cores = _Boxes.of_leaves(*cores, self.depth)
        log_masses = [padded[self.leaves].logsumexp(1)]
        for _ in range(self.depth):
            log_masses.insert(0, log_masses[0].view(-1, 2).logsumexp(1))
        self._log_mass = torch.cat(log_masses)

    def _boxes(
        self, cells: Cells, maps: Images, mean: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Boxes (G, D) around the images of the leaves' regions, and around those of their means; in rotated coordinates."""
        (G, K), D = self.leaves.shape, len(self.rotation)
        low, high, core_low, core_high = mean.new_empty(4, G, D)
        corners = cells[torch.zeros(1, dtype=torch.long, device=mean.device)].generators().shape[1]
        for part in torch.arange(G, device=mean.device).split(max(1, _NUMBERS // (K * corners * D))):
            region = self.leaves[part].reshape(-1)
            there, region = (region >= 0)[:, None], region.clamp(min=0)
            generators = cells[region].generators().to(mean.device)
            columns, shift = (field @ self.rotation for field in maps(region))
            least, most = _extent(generators, columns, shift)
            centre = shift + torch.einsum("rl,rld->rd", mean[region], columns)
            for ends, values in ((low, least), (core_low, centre)):
                ends[part] = torch.where(there, values, torch.inf).view(-1, K, D).amin(1)
            for ends, values in ((high, most), (core_high, centre)):
                ends[part] = torch.where(there, values, -torch.inf).view(-1, K, D).amax(1)
        return (low, high), (core_low, core_high)

    def best_leaves(self, data: Tensor) -> Tensor:
        """(N, B) the leaves that a beam finds to matter most, best first, for rotated data (N, D)."""
        node = torch.zeros(len(data), 1, dtype=torch.long, device=data.device)
        for _ in range(self.depth):
            node = (2 * node[..., None] + torch.tensor([1, 2], device=data.device)).flatten(1)
            share = self._log_mass[node] - 0.5 * self._cores.square(data, node)
            node = node.gather(1, share.argsort(1, descending=True)[:, :_BEAM])
        return node - (2**self.depth - 1)

    def search(self, data: Tensor, log_bound: Tensor, tolerance: float) -> Candidates:
        """The leaves that may matter.

        Args:
            data: (N, D) data in the rotated coordinates.
            log_bound: (N,) log of a lower bound on p(x), relative to the density of the noise at its mean.
            tolerance: share of p(x) that may be left out.
        """
        N, G = len(data), len(self.leaves)
        # Half of the tolerance is for groups that are too far whatever their probability, the other half is shared.
        far, rare = math.log(0.5 * tolerance), math.log(0.5 * tolerance / G)
        # At which squared distance a group is left out, if p(x) is one.
        limit = -2 * torch.maximum(self._log_mass.new_tensor(far), rare - self._log_mass)
        kept = torch.zeros(N, G, dtype=torch.bool, device=data.device)
        omitted = torch.zeros_like(log_bound)
        if runs_compiled(data):
            from .pruning_compiled import search

            shared = [self.boxes.low.numpy(), self.boxes.high.numpy(), self._log_mass.numpy(), limit.numpy()]
            split = [(part, 0) for part in (array(data), array(log_bound), kept.numpy(), omitted.numpy())]
            in_blocks(search, shared, split, N * _START)
            return Candidates(kept, omitted)
        level = min(self.depth, round(math.log2(_START)))
        row = torch.arange(N, device=data.device).repeat_interleave(2**level)
        node = torch.arange(2**level, device=data.device).repeat(N) + 2**level - 1
        while True:
            survivors = []
            for rows, nodes in zip(row.split(_NUMBERS // 64), node.split(_NUMBERS // 64), strict=True):
                square = self.boxes.square(data[rows], nodes[:, None])[:, 0] + 2 * log_bound[rows]
                out = square >= limit[nodes]
                omitted.index_add_(0, rows[out], (self._log_mass[nodes[out]] - 0.5 * square[out]).exp())
                survivors.append((rows[~out], nodes[~out]))
            row, node = (torch.cat(part) for part in zip(*survivors, strict=True))
            if level == self.depth:
                break
            level += 1
            row = row.repeat_interleave(2)
            node = (2 * node[:, None] + torch.tensor([1, 2], device=data.device)).flatten()
        kept[row, node - (2**self.depth - 1)] = True
        return Candidates(kept, omitted)


def _extent(generators: Tensor, maps: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest coordinates (P, D) of the images of cells (P, C, L + 1) under affine maps (P, L, D), (P, D)."""
    directions, weight = generators[..., :-1], generators[..., -1:]
    is_point = weight > 0
    points = directions / torch.where(is_point, weight, 1.0)
    first = is_point[..., 0].int().argmax(1)
    anchor = points[torch.arange(len(points), device=points.device), first][:, None]
    images = torch.baddbmm(shift[:, None], torch.where(is_point, points, anchor), maps)
    least, most = images.amin(1), images.amax(1)
    is_ray = ~is_point & (directions != 0).any(-1, keepdim=True)
    endless = is_ray.any(1)[:, 0].nonzero()[:, 0]
    if len(endless):
        # Along the image of a ray a region has no end.
        images = torch.where(is_ray, directions, 0.0)[endless] @ maps[endless]
        least[endless] = torch.where((images < 0).any(1), -torch.inf, least[endless])
        most[endless] = torch.where((images > 0).any(1), torch.inf, most[endless])
    return least, most


def _halved(points: Tensor, depth: int) -> Tensor:
    """Indices of points (R, L) in an order in which every halving separates near from far; -1 fills the last group."""
    R, L = points.shape
    size = math.ceil(R / 2**depth) * 2**depth
    order = torch.cat([torch.arange(R), torch.full((size - R,), -1)]).to(points.device)
    # What only fills up counts as being at the far end of every axis.
    places = torch.cat([points, points.new_full((1, L), torch.inf)])
    for level in range(depth):
        order = order.view(2**level, -1)
        place = places[order]
        there = (order >= 0)[..., None]
        spread = torch.where(there, place, -torch.inf).amax(1) - torch.where(there, place, torch.inf).amin(1)
        axis = spread.nan_to_num(nan=0.0, neginf=0.0).argmax(1)
        along = place.gather(2, axis[:, None, None].expand(-1, order.shape[1], 1))[..., 0]
        order = order.gather(1, along.argsort(1))
    return order.reshape(-1)


def _principal_axes(maps: Images, mean: Tensor, weights: Tensor) -> Tensor:
    """(D, D) orthonormal columns, the direction of greatest spread of the regions' images of their weighted means first."""
    weights = weights / weights.sum()
    # Any orthonormal columns will do: spread about the most probable region, less what its place adds, is near enough.
    anchor = maps(weights.argmax()[None])[1][0]
    total, scatter = torch.zeros_like(anchor), anchor.new_zeros(len(anchor), len(anchor))
    for part in torch.arange(len(mean), device=mean.device).split(_REGIONS):
        columns, shift = maps(part)
        centred = shift - anchor + torch.einsum("rl,rld->rd", mean[part], columns)
        weighted = centred * weights[part, None]
        total, scatter = total + weighted.sum(0), scatter + weighted.mT @ centred
    return torch.linalg.eigh(scatter - torch.outer(total, total)).eigenvectors.flip(1)
