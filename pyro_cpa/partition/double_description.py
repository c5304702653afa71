# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The steps of the double description method, for many polytopes at once: edges, facets, and points on them.

A generator is a vertex or a ray; ``tight`` (R, G, 1 + F) tells on which facets each lies, infinity in front.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["edges", "facets", "front", "onto", "unit"]

_NUMBERS_AT_ONCE = 2**22  # temporaries of the test for edges


def unit(rows: Tensor) -> Tensor:
    """Rows scaled to length 1; zero stays zero."""
    size = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / torch.where(size > 0, size, 1.0)


def onto(points: Tensor, facets: Tensor) -> Tensor:
    """Homogeneous points (E, L + 1) moved by what they are off their facets (E, F, L + 1), zero where padded.

    Between far ends of an edge, on either side of it, a point is found with the rounding errors of the ends.
    """
    normals = facets[..., :-1]
    inverse = torch.linalg.pinv(normals.mT @ normals, hermitian=True, rtol=1e-8) @ normals.mT
    for _ in range(2):
        off = (inverse @ (facets @ points[..., None]))[..., 0]
        points = torch.cat([points[:, :-1] - off, points[:, -1:]], dim=1)
    return torch.where(points[:, -1:] > 0, points, unit(points))


def front(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Order (R, M') of columns that puts the kept ones (R, M) first, and which of them are; M' is the most kept."""
    most = int(kept.sum(1).max()) if len(kept) else 0
    order = kept.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return order, kept.gather(1, order)


def facets(tight: Tensor) -> Tensor:
    """(R, F) which of the inequalities are facets: on the others lie fewer generators than on one of them.

    Of inequalities with the same generators the first stays. Infinity, in front, is never left out, but one on
    which rays alone lie is.
    """
    on = tight.float()
    count = on.sum(1)
    outside = on.mT @ (1.0 - on)  # generators on the one, but not on the other
    order = torch.arange(count.shape[1], device=tight.device)
    larger = (count[:, None] > count[..., None]) | (
        (count[:, None] == count[..., None]) & (order < order[:, None])
    )
    return ((count > 0) & ~((outside == 0) & larger).any(2))[:, 1:]


def edges(
    tight: Tensor, exists: Tensor, rank: Tensor, above: Tensor, below: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Edges from a generator above to one below: (E,) cell, upper and lower generator, by cell.

    Two generators are joined by an edge if no third one lies on all the facets that they share.
    """
    G, F = tight.shape[1:]
    found = []
    for cells in torch.arange(len(tight), device=tight.device).split(max(1, _NUMBERS_AT_ONCE // (G * G + 1))):
        pairs = (above[cells][:, :, None] & below[cells][:, None]).nonzero()
        for part in pairs.split(max(1, _NUMBERS_AT_ONCE // (G * F + 1))):
            cell, up, down = cells[part[:, 0]], part[:, 1], part[:, 2]
            shared = tight[cell, up] & tight[cell, down]
            enough = shared.sum(1) >= rank[cell]
            cell, up, down, shared = cell[enough], up[enough], down[enough], shared[enough]
            missing = (~tight[cell]).float() @ shared.float()[..., None]
            between = ((missing[..., 0] == 0) & exists[cell]).sum(1)
            edge = between == 2
            found.append(torch.stack([cell[edge], up[edge], down[edge]]))
    if not found:
        empty = rank.new_zeros(0)
        return empty, empty, empty
    cell, up, down = torch.cat(found, dim=1)
    return cell, up, down
