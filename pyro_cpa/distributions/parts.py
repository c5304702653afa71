# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Data and regions cut into parts that fit the memory budget and leave out regions which provably do not matter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import integrals
from .pieces import PiecewiseJoint, Whitened
from .pruning import RegionTree

__all__ = ["Part", "gathered", "parts"]

# Below so many regions, or so many data of a partition that was not yet grouped, all pairs cost less than the groups.
MANY_REGIONS = 1024
_MANY_DATA = 16
_BLOCK = 1000  # what one more block of data costs, in pairs of datum and group of regions
_SEARCH = 128  # data searched for at a time
_LATENT_DIMS = 3  # beyond, masses are estimates, and no bounds


class Part(NamedTuple):
    """Some rows of the data with all the regions that matter to them.

    Attributes:
        rows: their indices, or a slice.
        joint: the joint law restricted to the regions.
        omitted: (n,) certified bounds on the share of p(x) that other regions have.
    """

    rows: Tensor | slice
    joint: PiecewiseJoint
    omitted: Tensor

    @property
    def num_pairs(self) -> int:
        """Pairs of datum and region."""
        return len(self.omitted) * len(self.joint.cells)


def parts(joint: PiecewiseJoint, x: Tensor) -> Iterator[Part]:
    """Parts of the rows of x (N, D): every row is in one of them.

    Nothing is left out of incomplete rows, whose images differ from datum to datum, and of few regions.
    """
    if not _pays(joint, x):
        for rows in joint.chunks(x):
            yield Part(rows, joint, x.new_zeros(rows.stop - rows.start))
        return
    complete = ~x.isnan().any(-1)
    rest = (~complete).nonzero()[:, 0]
    for rows in joint.chunks(x[rest]):
        yield Part(rest[rows], joint, x.new_zeros(rows.stop - rows.start))
    yield from _pruned(joint, x, complete.nonzero()[:, 0])


def gathered(found: Iterable[tuple[Tensor | slice, Tensor]], count: int) -> Tensor:
    """(N, ...) values of all rows from those of parts (n, ...)."""
    result: Tensor | None = None
    for rows, values in found:
        if result is None:
            result = values.new_empty(count, *values.shape[1:])
        result[rows] = values
    if result is None:
        raise ValueError("no data")
    return result


def _pays(joint: PiecewiseJoint, x: Tensor) -> bool:
    if joint.tolerance == 0 or len(joint.cells) < MANY_REGIONS or joint.partition.latent_dim > _LATENT_DIMS:
        return False
    count = int((~x.isnan().any(-1)).sum())
    return count > 0 and (joint.tree is not None or count >= _MANY_DATA)


def _pruned(joint: PiecewiseJoint, x: Tensor, rows: Tensor) -> Iterator[Part]:
    if joint.tree is None:
        joint.tree = _tree(joint)
    tree = joint.tree
    leaves = torch.cat(
        [tree.best_leaves(joint.whiten(x[some]).data @ tree.rotation)[:, :2] for some in rows.split(1024)]
    )
    # Neighbours share most of their candidates.
    for near in leaves[:, 0].argsort().split(_SEARCH):
        some = rows[near]
        white = joint.whiten(x[some])
        log_bound = _lower_bound(joint, white, tree.leaves[leaves[near]].flatten(1))
        found = tree.search(white.data @ tree.rotation, log_bound, joint.tolerance)
        for block in _blocks(found.kept):
            regions = tree.leaves[found.kept[block].any(0)].flatten()
            part = joint.only(regions[regions >= 0])
            for chunk in part.chunks(x[some[block]]):
                yield Part(some[block][chunk], part, found.omitted[block][chunk])


def _blocks(kept: Tensor) -> list[slice]:
    """Consecutive rows of kept leaves (N, G) that share enough of them to be worked on together."""
    blocks, pending = [], [slice(0, len(kept))]
    while pending:
        block = pending.pop()
        middle = (block.start + block.stop) // 2
        halves = [slice(block.start, middle), slice(middle, block.stop)]
        whole, *parts = (_cost(kept[rows]) for rows in (block, *halves))
        if middle > block.start and sum(parts) < whole:
            pending += reversed(halves)
        else:
            blocks.append(block)
    return blocks


def _cost(kept: Tensor) -> int:
    """Cost of a block, in pairs of datum and leaf."""
    return _BLOCK + len(kept) * int(kept.any(0).sum())


def _tree(joint: PiecewiseJoint) -> RegionTree:
    (loc, tril), (*_, maps) = joint.prior, joint.whitened_maps()
    R, L = len(joint.cells), len(loc)
    found = integrals.moments(joint.cells, loc.expand(R, -1), tril.expand(R, -1, -1))
    # The slopes are the directions, combined by the inverse of ``inverse``; and latents are loc + tril u.
    eye = torch.eye(L, dtype=loc.dtype, device=loc.device)
    factor = torch.linalg.solve_triangular(tril @ maps.inverse, eye.expand(R, L, L), upper=False)

    def images(regions: Tensor) -> tuple[Tensor, Tensor]:
        columns = factor[regions].mT @ maps.directions[regions]
        return columns, maps.offsets[regions] - torch.einsum("l,rld->rd", loc, columns)

    return RegionTree(joint.cells, images, found.log_mass, found.mean)


def _lower_bound(joint: PiecewiseJoint, white: Whitened, regions: Tensor) -> Tensor:
    """(N,) what some regions (N, K), -1 for none, add to p(x): its log, relative to the noise's density at its mean."""
    there, index = regions >= 0, regions.clamp(min=0)
    log_k, loc, tril = joint.pieces_of(white, index)
    L = loc.shape[-1]
    log_mass = integrals.log_mass(joint.cells[index.flatten()], loc.reshape(-1, L), tril.reshape(-1, L, L))
    log_joint = log_k + torch.where(there, log_mass.view(there.shape), -torch.inf)
    return log_joint.logsumexp(1) + white.log_det + 0.5 * white.residual
