# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Polytopes of three dimensions and more: formulas, exact arithmetic, volumes, and degenerate decoders."""

from __future__ import annotations

from math import comb

import pytest
import torch
from decoders import build, mlp
from degenerate import MODES, decoders
from geometry import cells_holding, clip_to_cube, far_and_near, round_trip_error, volumes
from hypothesis import given, settings
from rational_polytopes import count_regions
from torch import nn

from pyro_cpa.partition import Polytopes, WholeSpace, enumerate_regions
from pyro_cpa.partition.walls import NOISE, Walls

EXACT_MODES = tuple(mode for mode in MODES if mode not in ("rank one",))


def walls(normals, offsets):
    """One wall for each cell."""
    normals, offsets = torch.tensor(normals), torch.tensor(offsets)
    normals = normals / normals.norm(dim=1, keepdim=True)
    return Walls(torch.arange(len(offsets)), normals, offsets, *torch.full((2, len(offsets)), NOISE))


def polytope(*half_spaces, dim=3):
    """The cell of all z with normal . z <= offset."""
    cells = Polytopes.whole_space(dim, torch.zeros(0))
    for normal, offset in half_spaces:
        cells, _ = cells.halves(walls([normal], [offset]))
    return cells


def faces(cells):
    """Numbers of facets, vertices, rays and lines of each cell."""
    lines = (cells.lines != 0).any(-1)
    return torch.stack([x.sum(1) for x in (cells.is_facet, cells.is_vertex, cells.is_ray, lines)], 1).tolist()


def assert_consistent(cells):
    """Generators lie in their cells, exactly on the facets that they are said to lie on; lines along all facets."""
    offsets = torch.where(cells.is_facet, cells.offsets, 0.0)
    depth = cells.points @ torch.cat([cells.normals, -offsets[..., None]], dim=-1).mT
    depth = depth / (1e-300 + cells.points.abs().sum(-1, keepdim=True))
    assert depth.max() < 1e-10
    assert depth[cells.tight[..., 1:]].abs().max() < 1e-10
    assert torch.equal(cells.tight[..., 0], cells.is_ray)
    assert (cells.lines @ cells.normals.mT).abs().amax() < 1e-12 if cells.lines.numel() else True
    rank = cells.dim - (cells.lines != 0).any(-1).sum(1, keepdim=True)
    assert (cells.tight.sum(2) >= rank)[cells.is_vertex].all()
    assert (cells.tight.sum(2) >= rank)[cells.is_ray].all()


def assert_is_partition(decoder, part, latent_dim):
    """No region twice, no gap, no overlap, and the decoder's own values."""
    R, cells = part.num_regions, part.cells
    assert len(torch.unique(torch.cat(part.patterns, dim=1), dim=0)) == R
    inside = cells.interior_points()
    assert torch.equal(part.locate(inside), torch.arange(R)), "a cell does not hold its interior point"
    z = torch.cat([far_and_near(latent_dim), inside])
    assert round_trip_error(decoder, part, z) < 1e-12
    held = cells_holding(cells, z, -1e-9)[torch.arange(len(z)), part.locate(z)]
    assert held.all(), "located in a wrong cell"
    assert (cells_holding(cells, z, 1e-9).sum(1) <= 1).all(), "two cells overlap"
    if isinstance(cells, WholeSpace):
        return
    assert_consistent(cells)
    if latent_dim == 3:
        for size in (2.0, 1e4):
            total = float(volumes(clip_to_cube(cells, size)).sum())
            assert total == pytest.approx((2 * size) ** 3, rel=1e-9)


def test_whole_half_and_quarter_space():
    whole = Polytopes.whole_space(3, torch.zeros(0))
    assert faces(whole) == [[0, 1, 0, 3]]
    below, above = whole.halves(walls([[1.0, 2.0, -1.0]], [0.5]))
    assert faces(below) == faces(above) == [[1, 1, 1, 2]]
    assert torch.equal(below.normals, -above.normals) and torch.equal(below.offsets, -above.offsets)
    slab, _ = above.halves(walls([[1.0, 2.0, -1.0]], [0.75]))
    assert faces(slab) == [[2, 2, 0, 2]]
    assert slab.offsets.sum().item() == 0.25
    wedge, _ = below.halves(walls([[0.0, 1.0, 3.0]], [-2.0]))
    assert faces(wedge) == [[2, 1, 2, 1]]
    octant, _ = wedge.halves(walls([[2.0, 0.0, 1.0]], [7.0]))
    assert faces(octant) == [[3, 1, 3, 0]]
    for cells in (below, above, slab, wedge, octant):
        assert_consistent(cells)
        assert bool(cells_holding(cells, cells.interior_points(), 1e-3))


@pytest.mark.parametrize("dim", [3, 4, 5, 6])
def test_cubes_and_simplices(dim):
    eye = torch.eye(dim).tolist()
    minus = (-torch.eye(dim)).tolist()
    cube = polytope(*((n, 1.0) for n in eye + minus), dim=dim)
    assert faces(cube) == [[2 * dim, 2**dim, 0, 0]]
    assert sorted(cube.points[0, :, :-1].tolist()) == sorted(
        (2 * torch.cartesian_prod(*[torch.arange(2.0)] * dim) - 1).tolist()
    )
    simplex = polytope(*((n, 0.0) for n in minus), ([1.0] * dim, dim**-0.5), dim=dim)
    assert faces(simplex) == [[dim + 1, dim + 1, 0, 0]]
    corner, cut_off = cube.halves(walls([[1.0] * dim], [(dim - 1.0) / dim**0.5]))
    assert faces(cut_off) == [[dim + 1, dim + 1, 0, 0]]
    assert faces(corner) == [[2 * dim + 1, 2**dim - 1 + dim, 0, 0]]
    for cells in (cube, simplex, corner, cut_off):
        assert_consistent(cells)


def test_vertices_on_many_facets():
    # A pyramid over an octagon: its tip lies on eight facets; walls through the tip and a diagonal.
    angles = torch.arange(8) * torch.pi / 4
    sides = torch.stack([angles.cos(), angles.sin(), torch.ones(8)], 1)
    pyramid = polytope(*((n, 1 / 2**0.5) for n in sides.tolist()), ([0.0, 0.0, -1.0], 0.0))
    assert faces(pyramid) == [[9, 9, 0, 0]]
    tip = pyramid.points[0, pyramid.tight[0].sum(1) == 8]
    assert torch.allclose(tip, torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    below, above = pyramid.halves(walls([[angles[0].sin().item(), 1.0, 0.0]], [0.0]))
    assert faces(below) == faces(above) == [[7, 7, 0, 0]]
    assert float(volumes(below) + volumes(above)) == pytest.approx(float(volumes(pyramid)), rel=1e-13)
    # A wall that grazes the tip crosses nothing, one a hair below cuts off a small pyramid.
    flat = walls([[0.0, 0.0, 1.0]], [1.0])
    assert not flat.cross(pyramid.generators())
    _, top = pyramid.halves(walls([[0.0, 0.0, 1.0]], [1.0 - 1e-6]))
    assert faces(top) == [[9, 9, 0, 0]]
    assert float(volumes(top) / volumes(pyramid)) == pytest.approx(1e-18, rel=1e-6)


def test_plates_keep_their_width():
    for width, distance in ((1e-9, 1.0), (1e-3, 1e6)):
        normal = torch.tensor([0.48, 0.6, 0.64])
        plate = polytope(
            (normal.tolist(), distance),
            ((-normal).tolist(), width - distance),
            ([0.8, -0.6, 0.0], 30.0),
            ([-0.8, 0.6, 0.0], 30.0),
            ([0.0, 0.6, -0.8], 40.0),
            ([0.0, -0.6, 0.8], 40.0),
        )
        assert faces(plate) == [[6, 8, 0, 0]]
        assert plate.offsets[0, :2].sum().item() == pytest.approx(width, abs=1e-15 * distance)


@pytest.mark.parametrize(("dim", "units"), [(3, 3), (3, 12), (4, 8), (5, 7), (6, 4)])
def test_hyperplanes_in_general_position(dim, units):
    part = enumerate_regions(mlp(dim, units, 2))
    assert part.num_regions == sum(comb(units, k) for k in range(dim + 1))
    # Every dim of them meet in one point, which is a vertex of 2^dim cells.
    if units >= dim:
        assert int(part.cells.is_vertex.sum()) == comb(units, dim) * 2**dim
    assert_is_partition(part.network.decoder, part, dim)


@pytest.mark.parametrize("dim", [3, 4])
def test_hyperplanes_through_the_origin(dim):
    units = 6
    part = enumerate_regions(nn.Sequential(nn.Linear(dim, units, bias=False), nn.ReLU()))
    assert part.num_regions == 2 * sum(comb(units - 1, k) for k in range(dim))
    assert (part.cells.is_vertex.sum(1) == 1).all() and (
        part.cells.points[part.cells.is_vertex][:, :-1] == 0
    ).all()


@pytest.mark.parametrize("rank", [1, 2])
def test_weights_of_low_rank_leave_lines(rank):
    decoder = mlp(4, 5, 2)
    with torch.no_grad():
        decoder[0].weight.copy_(torch.randn(5, rank) @ torch.randn(rank, 4))
    part = enumerate_regions(decoder)
    assert part.num_regions == sum(comb(5, k) for k in range(rank + 1))
    assert ((part.cells.lines != 0).any(-1).sum(1) == 4 - rank).all()
    assert_is_partition(decoder, part, 4)


@pytest.mark.parametrize(
    "name", ["relu-3", "deep-3", "no-bias-3", "duplicated-3", "sliver-3", "flat-3", "hardtanh-3"]
)
def test_decoders_of_space(name):
    decoder, latent_dim = build(name)
    assert_is_partition(decoder, enumerate_regions(decoder), latent_dim)


@settings(max_examples=25, deadline=None)
@given(decoder=decoders(latent_dim=3))
def test_any_decoder_of_space(decoder):
    assert_is_partition(decoder, enumerate_regions(decoder), 3)


@settings(max_examples=8, deadline=None)
@given(decoder=decoders(latent_dim=4, most=4))
def test_any_decoder_of_four_dimensions(decoder):
    assert_is_partition(decoder, enumerate_regions(decoder), 4)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(decoder=decoders(latent_dim=3))
def test_many_decoders_of_space(decoder):
    assert_is_partition(decoder, enumerate_regions(decoder), 3)


@settings(max_examples=10, deadline=None)
@given(decoder=decoders(latent_dim=3, modes=EXACT_MODES, units=("relu", "abs"), most=4))
def test_region_count_is_that_of_rational_arithmetic(decoder):
    assert enumerate_regions(decoder).num_regions == count_regions(decoder, 3, box=10**30)


def test_sub_batches_and_concatenation():
    octant = polytope(([-1.0, 0.0, 0.0], 0.0), ([0.0, -1.0, 0.0], 0.0), ([0.0, 0.0, -1.0], 0.0))
    slab = polytope(([1.0, 0.0, 0.0], 1.0), ([-1.0, 0.0, 0.0], 0.0))
    both = Polytopes.cat([octant, slab])
    assert faces(both) == faces(octant) + faces(slab)
    for index, cells in enumerate((octant, slab)):
        one = both[torch.tensor([index])]
        assert torch.equal(one.interior_points(), cells.interior_points())
        assert_consistent(one)
