# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Polygons cut one after the other, compiled, against all at once, in tensors."""

from __future__ import annotations

import pytest
import torch
from decoders import mlp
from torch import nn

from pyro_cpa.errors import RegionBudgetExceeded
from pyro_cpa.partition import enumerate_regions, plane
from pyro_cpa.partition.polygons import Polygons

pytest.importorskip("numba")

DECODERS = {
    "one unit": lambda: mlp(2, 1, 3),
    "two layers": lambda: mlp(2, 16, 16, 3),
    "many walls in one cell": lambda: mlp(2, 70, 3),
    "all walls through the origin": lambda: nn.Sequential(
        nn.Linear(2, 12, bias=False), nn.ReLU(), nn.Linear(12, 9, bias=False), nn.ReLU()
    ),
    "parallel walls": lambda: nn.Sequential(
        nn.Linear(2, 1), nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU()
    ),
    "two knots": lambda: nn.Sequential(nn.Linear(2, 8), nn.Hardtanh(), nn.Linear(8, 5), nn.Hardtanh()),
}


@pytest.mark.parametrize("name", DECODERS)
def test_the_parts_their_order_and_their_tree_are_the_same(name, monkeypatch):
    torch.manual_seed(1)
    decoder = DECODERS[name]().double()
    fast = enumerate_regions(decoder)
    monkeypatch.setattr(plane, "runs_compiled", lambda like: False)
    slow = enumerate_regions(decoder)
    edges = slow.cells.is_edge.sum(1)
    assert torch.equal(fast.cells.is_edge.sum(1), edges)
    for field in ("normals", "offsets", "starts", "ends"):
        a, b = (getattr(cells, field)[:, : edges.max()] for cells in (fast.cells, slow.cells))
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    z = torch.cat([3 * torch.randn(500, 2, dtype=torch.float64), slow.cells.interior_points()])
    assert torch.equal(fast.locate(z), slow.locate(z))


@pytest.mark.parametrize("compiled", [True, False])
def test_cutting_stops_where_the_budget_does(compiled, monkeypatch):
    monkeypatch.setattr(plane, "runs_compiled", lambda like: compiled)
    torch.manual_seed(1)
    decoder = mlp(2, 10, 10, 3)
    count = enumerate_regions(decoder).num_regions
    assert enumerate_regions(decoder, max_regions=count).num_regions == count
    for most in (2, count // 2, count - 1):
        with pytest.raises(RegionBudgetExceeded, match=rf"max_regions={most}: \d+ reached"):
            enumerate_regions(decoder, max_regions=most)


def test_edges_make_cells():
    """A half-plane, the plane itself, and a strip."""
    edges = torch.tensor(
        [[1.0, 0, 2, -torch.inf, torch.inf], [0, 1, 3, -torch.inf, torch.inf], [0, -1, 1, -5, torch.inf]]
    )
    cells = Polygons.of_edges(edges, torch.tensor([0, 1, 1, 3]))
    assert cells.is_edge.tolist() == [[True, False], [False, False], [True, True]]
    assert cells.offsets.tolist() == [[2, torch.inf], [torch.inf, torch.inf], [3, 1]]
    assert cells.starts.tolist() == [[-torch.inf, 0], [0, 0], [-torch.inf, -5]]
    assert cells.normals[2].tolist() == [[0, 1], [0, -1]]
