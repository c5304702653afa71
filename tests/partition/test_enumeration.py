# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Which regions are found: against formulas, exact arithmetic, bisection, grids, and on degenerate decoders."""

from __future__ import annotations

import pytest
import torch
from decoders import DECODERS, build, mlp
from degenerate import MODES, decoders
from geometry import area, cells_holding, far_and_near, round_trip_error
from hypothesis import given, settings
from rational import rational_regions
from torch import nn

from pyro_cpa.errors import InvalidData, RegionBudgetExceeded, UnsupportedModule
from pyro_cpa.partition import Abs, Intervals, Polygons, WholeSpace, enumerate_regions

# Sums and products are exact in these modes, so that coincident walls coincide in exact arithmetic too.
EXACT_MODES = tuple(mode for mode in MODES if mode not in ("rank one",))


def assert_is_partition(decoder, part, latent_dim):
    """Every invariant of a partition: no region twice, no gap, no overlap, and the decoder's own values."""
    R = part.num_regions
    patterns = torch.cat(part.patterns, dim=1) if part.patterns else torch.zeros(R, 1, dtype=torch.int8)
    assert patterns.dtype == torch.int8
    assert len(torch.unique(patterns, dim=0)) == R, "an activation pattern occurs twice"
    inside = part.cells.interior_points()
    assert torch.isfinite(inside).all()
    assert torch.equal(part.locate(inside), torch.arange(R)), "a cell does not hold its interior point"
    z = torch.cat([far_and_near(latent_dim), inside])
    assert round_trip_error(decoder, part, z) < 1e-12
    if latent_dim <= 2:
        region = part.locate(z)
        assert cells_holding(part.cells, z, -1e-9)[torch.arange(len(z)), region].all(), (
            "located in a wrong cell"
        )
        assert (cells_holding(part.cells, z, 1e-9).sum(1) <= 1).all(), "two cells overlap"
        for low, high in ((-3.0, 2.0), (-1e4, 1e4)):
            total = sum(area(corners) for corners in part.cells.clip_to_box(low, high))
            assert total == pytest.approx((high - low) ** latent_dim, rel=1e-10)


@pytest.mark.parametrize("name", DECODERS)
def test_every_case_is_a_partition(name):
    decoder, latent_dim = build(name)
    part = enumerate_regions(decoder)
    assert part.latent_dim == latent_dim
    assert_is_partition(decoder, part, latent_dim)


@settings(max_examples=60, deadline=None)
@given(decoder=decoders(latent_dim=1))
def test_any_decoder_of_the_line(decoder):
    assert_is_partition(decoder, enumerate_regions(decoder), 1)


@settings(max_examples=60, deadline=None)
@given(decoder=decoders(latent_dim=2))
def test_any_decoder_of_the_plane(decoder):
    assert_is_partition(decoder, enumerate_regions(decoder), 2)


@settings(max_examples=30, deadline=None)
@given(decoder=decoders(latent_dim=2, modes=EXACT_MODES, units=("relu", "leaky", "abs", "hardtanh")))
def test_region_count_is_that_of_rational_arithmetic(decoder):
    # The box is beyond every corner that weights of 1e-6 to 1e6 can make here, so that no region is outside it.
    assert enumerate_regions(decoder).num_regions == len(rational_regions(decoder, box=10**30))


@pytest.mark.parametrize("n", [1, 2, 5, 13, 40])
def test_lines_in_general_position(n):
    part = enumerate_regions(mlp(2, n, 1))
    assert part.num_regions == 1 + n + n * (n - 1) // 2
    # Every pair of lines meets once: that many corners, each shared by four regions.
    is_corner = part.cells.is_edge & torch.isfinite(part.cells.starts)
    assert int(is_corner.sum()) == 4 * (n * (n - 1) // 2)


@pytest.mark.parametrize("n", [1, 2, 7, 60])
def test_points_in_general_position(n):
    assert enumerate_regions(mlp(1, n, 1)).num_regions == n + 1


@pytest.mark.parametrize(("name", "regions"), [("linear-1", 1), ("linear-2", 1), ("linear-5", 1)])
def test_affine_decoder_is_one_region(name, regions):
    part = enumerate_regions(build(name)[0])
    assert isinstance(part.cells, WholeSpace)
    assert part.num_regions == regions


def test_lines_through_the_origin():
    n = 6
    assert enumerate_regions(nn.Sequential(nn.Linear(2, n, bias=False), nn.ReLU())).num_regions == 2 * n


def test_duplicates_and_dead_units_add_no_regions():
    # Three distinct walls among the six of the first layer.
    assert enumerate_regions(build("duplicated-2")[0][:2]).num_regions == 7
    first_layer = build("dead-layer-2")[0]
    assert enumerate_regions(first_layer).num_regions == enumerate_regions(first_layer[:2]).num_regions
    cancelling = build("cancelling-2")[0]
    assert enumerate_regions(cancelling).num_regions == enumerate_regions(cancelling[:2]).num_regions


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_concurrent_and_rescaled_walls_up_to_rounding(latent_dim):
    # Unit 2 is a third of unit 0, unit 3 the sum of units 0 and 1: in the plane its wall passes through their corner.
    first = nn.Linear(latent_dim, 4)
    with torch.no_grad():
        first.weight[2], first.bias[2] = first.weight[0] / 3, first.bias[0] / 3
        first.weight[3], first.bias[3] = first.weight[0] + first.weight[1], first.bias[0] + first.bias[1]
    part = enumerate_regions(nn.Sequential(first, nn.ReLU()))
    assert part.num_regions == (4 if latent_dim == 1 else 6)


@pytest.mark.parametrize("name", ["sliver-1", "sliver-2"])
def test_slivers_survive(name):
    decoder, latent_dim = build(name)
    part = enumerate_regions(decoder)
    first = decoder[0]
    normal = first.weight[0] / first.weight[0].norm()
    middle = (-first.bias[0] / first.weight[0].norm() - 0.5e-9) * normal
    along = torch.zeros(1) if latent_dim == 1 else torch.linspace(-3, 3, 20)[:, None] * normal.flip(0)
    z = (middle + along * torch.tensor([1.0, -1.0])[:latent_dim]).detach().reshape(-1, latent_dim)
    units = torch.cat(part.patterns[:1], 1)[part.locate(z)]
    assert (units[:, 0] == 0).all() and (units[:, 1] == 1).all()
    thin = (part.patterns[0][:, 0] == 0) & (part.patterns[0][:, 1] == 1)
    if latent_dim == 1:
        cell = part.cells[thin]
        assert float(cell.upper - cell.lower) == pytest.approx(1e-9, rel=1e-6)
    else:
        pairs = part.cells[thin]
        aligned = (pairs.normals @ normal).abs() > 1 - 1e-12
        offsets = torch.where(aligned, pairs.offsets, 0.0)
        assert offsets.sum(1).detach().numpy() == pytest.approx(1e-9, rel=1e-6)


def test_half_plane_strip_and_whole_plane():
    def parallel(*offsets):
        layer = nn.Linear(2, len(offsets))
        with torch.no_grad():
            layer.weight.copy_(
                torch.tensor([[0.6, 0.8]]) * torch.tensor([[1.0], [-2.0], [1 / 3]])[: len(offsets)]
            )
            layer.bias.copy_(-torch.tensor(offsets) * torch.tensor([1.0, -2.0, 1 / 3])[: len(offsets)])
        return enumerate_regions(nn.Sequential(layer, nn.ReLU(), nn.Linear(len(offsets), 1)))

    half = parallel(0.5)
    assert isinstance(half.cells, Polygons) and half.cells.is_edge.sum(1).tolist() == [1, 1]
    assert torch.isinf(half.cells.starts).all() and torch.isinf(half.cells.ends).all()
    strips = parallel(0.5, -1.0, 3.0)
    assert sorted(strips.cells.is_edge.sum(1).tolist()) == [1, 1, 2, 2]
    assert torch.isinf(strips.cells.starts[strips.cells.is_edge]).all()
    points = torch.tensor([-2.0, 0.0, 1.0, 9.0])[:, None] * torch.tensor([0.6, 0.8]) + 1e8 * torch.tensor(
        [-0.8, 0.6]
    )
    assert len(set(strips.locate(points).tolist())) == 4


def patterns_by_forward(decoder, z):
    """Which side of each knot every unit is on, by running the decoder itself."""
    found = []
    for module in decoder:
        if isinstance(module, nn.ReLU | nn.LeakyReLU | Abs):
            found.append(z > 0)
        elif isinstance(module, nn.Hardtanh):
            found.append((z > module.min_val).int() + (z > module.max_val).int())
        z = module(z)
    return torch.cat(found, dim=-1).to(torch.int8)


@pytest.mark.parametrize("name", ["relu-2", "deep-2", "hardtanh-2", "abs-2"])
def test_patterns_on_a_dense_grid(name):
    decoder, _ = build(name)
    part = enumerate_regions(decoder)
    axis = torch.linspace(-4, 4, 301)
    z = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        truth = patterns_by_forward(decoder, z)
    region = part.locate(z)
    assert torch.equal(torch.cat(part.patterns, 1)[region], truth)
    # Every region that a disc of the grid's size fits into is seen.
    seen = set(region.tolist())
    sizes = [area(corners) for corners in part.cells.clip_to_box(-4.0, 4.0)]
    assert len(seen) > 0.8 * sum(size > 0 for size in sizes)


@pytest.mark.parametrize("name", ["relu-1", "leaky-1", "hardtanh-1"])
def test_knots_of_the_line_against_bisection(name):
    decoder, _ = build(name)
    low = torch.linspace(-50, 50, 40_001)[:, None]
    with torch.no_grad():
        changes = (patterns_by_forward(decoder, low[1:]) != patterns_by_forward(decoder, low[:-1])).any(1)
        low, high = low[:-1][changes], low[1:][changes]
        before = patterns_by_forward(decoder, low)
        for _ in range(60):
            middle = (low + high) / 2
            same = (patterns_by_forward(decoder, middle) == before).all(1, keepdim=True)
            low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    part = enumerate_regions(decoder)
    assert isinstance(part.cells, Intervals)
    knots = part.cells.upper[:-1]
    knots = knots[knots.abs() < 50]
    assert knots.numpy() == pytest.approx(low[:, 0].numpy(), abs=1e-12)


def test_several_activations_in_a_row_and_one_before_any_layer():
    decoder = nn.Sequential(nn.ReLU(), nn.Hardtanh(-1.0, 2.0), nn.Linear(2, 3), Abs(), nn.ReLU6())
    assert_is_partition(decoder, enumerate_regions(decoder), 2)
    alone = nn.Hardtanh()
    part = enumerate_regions(alone, latent_dim=2)
    assert part.num_regions == 9
    assert (part.latent_dim, part.data_dim) == (2, 2)
    assert_is_partition(alone, part, 2)
    with pytest.raises(UnsupportedModule, match="latent_dim="):
        enumerate_regions(alone)


def test_units_that_do_not_bend_make_no_walls():
    assert enumerate_regions(mlp(2, 5, 2, activation=lambda: nn.PReLU(init=1.0))).num_regions == 1


@pytest.mark.parametrize("latent_dim", [1, 2, 3, 5])
def test_budget(latent_dim):
    decoder = mlp(latent_dim, 8, 8, 2)
    R = enumerate_regions(decoder).num_regions
    assert enumerate_regions(decoder, max_regions=R).num_regions == R
    with pytest.raises(RegionBudgetExceeded, match=rf"max_regions={R - 1}: \d+ reached at decoder\.3: ReLU"):
        enumerate_regions(decoder, max_regions=R - 1)
    with pytest.raises(RegionBudgetExceeded, match="reached at decoder.1: ReLU"):
        enumerate_regions(decoder, max_regions=3)


def test_budget_is_checked_before_the_cells_are_made():
    # Two million regions, were they made.
    decoder = mlp(2, 2000, 1)
    with pytest.raises(RegionBudgetExceeded) as caught:
        enumerate_regions(decoder, max_regions=100)
    count = int(str(caught.value).split(": ")[1].split()[0])
    assert 100 < count <= 200


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_walls_beyond_every_float_are_left_out(latent_dim):
    decoder = mlp(latent_dim, 3, 2)
    with torch.no_grad():
        decoder[0].weight[:2] *= 1e-310
        decoder[0].bias[:2] = torch.tensor([1.0, -1.0])
    part = enumerate_regions(decoder)
    assert part.num_regions == 2
    assert_is_partition(decoder, part, latent_dim)


def test_overflow_is_said():
    decoder = mlp(2, 3, 3, 3, 1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1e200)
    with pytest.raises(InvalidData, match=r"decoder\.3: ReLU: its input overflows"):
        enumerate_regions(decoder)


@pytest.mark.slow
def test_a_wide_deep_decoder():
    decoder = mlp(2, 64, 64, 64, 10)
    part = enumerate_regions(decoder)
    assert part.num_regions > 10_000
    inside = part.cells.interior_points()
    assert torch.equal(part.locate(inside), torch.arange(part.num_regions))
    assert round_trip_error(decoder, part, torch.cat([far_and_near(2), inside])) < 1e-12
    assert sum(map(area, part.cells.clip_to_box(-3.0, 3.0))) == pytest.approx(36.0, rel=1e-10)
    assert len(torch.unique(torch.cat(part.patterns, 1), dim=0)) == part.num_regions
