# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Polygons: 60-digit oracle, closed forms, invariances, partitions of the plane, fit of the draws."""

import math

import gaussian_oracle as oracle
import mpmath as mp
import numpy as np
import pytest
import scipy.stats
import torch
from polygon_cases import arrangement, box, from_vertices, moved, polygons, regular

from pyro_cpa import compiled
from pyro_cpa.integrals import log_mass, log_mass_bound, moments, moments_where, polygon, sample
from pyro_cpa.partition.cells import Polygons


@pytest.fixture(autouse=True, params=["compiled", "tensors"])
def kind(request, monkeypatch):
    """Both ways through the integrals."""
    if request.param == "compiled":
        pytest.importorskip("numba")
    monkeypatch.setattr(compiled, "_INSTALLED", request.param == "compiled")


RIGHT, DOWN, UP, LEFT = (1.0, 0.0), (0.0, -1.0), (0.0, 1.0), (-1.0, 0.0)
EYE = [[1.0, 0.0], [0.0, 1.0]]


def wedge(angle):
    return [(DOWN, 0.0), ((-math.sin(angle), math.cos(angle)), 0.0)]


# Every shape has its corner or wall at the origin; it is turned by the angle, then put at a distance.
SHAPES = {
    "half-plane": ([(RIGHT, 0.0)], 0.7),
    "quadrant": ([(LEFT, 0.0), (DOWN, 0.0)], 0.0),
    "blunt wedge": (wedge(3.1), -1.3),
    "wedge": (wedge(1e-6), 0.4),
    "wedge askew": (wedge(1e-6), 1.8),
    "strip": ([(DOWN, 0.0), (UP, 0.1)], -1.3),
    "thin strip": ([(DOWN, 0.0), (UP, 1e-8)], 0.0),
    "half-strip": ([(DOWN, 0.0), (UP, 0.1), (LEFT, 0.0)], 0.3),
    "square": (box(1.0, 1.0), 0.0),
    "big box": (box(50.0, 300.0), 0.3),
    "tiny box": (box(1e-6, 2e-6), 0.3),
    "needle": (box(1.0, 1e-6), 0.0),
    "needle askew": (box(1e-6, 1.0), 0.3),
    "needle's end": (box(1.0, 1e-6), 1.0),
    "hexagon": (regular(6, 3.0), 0.3),
}


def table(distances):
    """(half-planes, mean, Cholesky factor) of every shape with its corner at each distance from the mean."""
    for distance in distances:
        for k, (shape, angle) in enumerate(SHAPES.values()):
            shift = (distance * math.cos(0.3), distance * math.sin(0.3))
            yield moved(shape, angle, shift), (0.0, 0.0), EYE if k % 5 else [[1.3, 0.0], [-0.7, 0.4]]


def random_polygons(count, seed):
    """Sizes 1e-4 to 15, aspect ratios to 1e-5, distances to 30."""
    rng = np.random.default_rng(seed)
    while count:
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7)))
        if np.diff(angles, append=angles[0] + 2 * np.pi).max() > 3.0:
            continue
        size, aspect = 10 ** rng.uniform(-4, 1.2), 10 ** rng.choice([0.0, rng.uniform(-5, 0)])
        cell = from_vertices([(size * math.cos(a), size * aspect * math.sin(a)) for a in angles])
        scales = 10 ** rng.uniform(-1, 1, 2)
        scale = EYE if count % 3 else [[scales[0], 0.0], [rng.normal() * scales[1], scales[1]]]
        cell = moved(cell, rng.uniform(0, 2 * np.pi), tuple(rng.normal(size=2) * 10 ** rng.uniform(-1, 1.5)))
        yield cell, tuple(rng.normal(size=2)), scale
        count -= 1


def check(cases):
    half_planes, loc, scale = zip(*cases, strict=True)
    result = moments(polygons(half_planes), torch.tensor(loc), torch.tensor(scale))
    for k, case in enumerate(zip(half_planes, loc, scale, strict=True)):
        log_m, center, (xx, xy, yy) = oracle.polygon(*case, size=1e5)
        assert abs(result.log_mass[k].item() - log_m) < 1e-10 * max(1, -log_m / 1e4), case
        deviation = mp.sqrt(xx), mp.sqrt(yy)
        size = abs(center[0]) + abs(center[1]) + abs(loc[k][0]) + abs(loc[k][1])
        for axis in range(2):
            error = abs(result.mean[k, axis].item() - center[axis])
            assert error < 1e-9 * deviation[axis] + 4e-16 * size, case
        covariance = result.covariance[k]
        assert torch.equal(covariance, covariance.mT)
        assert abs(covariance[0, 0].item() - xx) < 1e-9 * xx, case
        assert abs(covariance[0, 1].item() - xy) < 1e-9 * deviation[0] * deviation[1], case
        assert abs(covariance[1, 1].item() - yy) < 1e-9 * yy, case


@pytest.mark.parametrize("distance", [0.0, 1e-3, 0.5, 2.0, 8.0, 40.0, 140.0])
def test_table_of_shapes_against_the_oracle(distance):
    check(table([distance]))


def test_random_polygons_against_the_oracle():
    check(random_polygons(60, seed=0))


@pytest.mark.slow
def test_many_random_polygons_against_the_oracle():
    check(random_polygons(1500, seed=1))


def test_mean_on_a_corner_and_on_a_wall():
    corner = [((0.0, 0.0), box(2.0, 1.0)), ((2.0, 1.0), box(2.0, 1.0)), ((1.0, 0.0), box(2.0, 1.0))]
    check([(cell, loc, [[0.3, 0.0], [0.1, 0.2]]) for loc, cell in corner])


def test_quadrants_in_closed_form():
    """P(both coordinates positive) = 1/4 + arcsin(rho) / (2 pi)."""
    cells = polygons([[(LEFT, 0.0), (DOWN, 0.0)]] * 5)
    rho = torch.tensor([-0.999, -0.3, 0.0, 0.5, 0.9999])
    one, zero = torch.ones(5), torch.zeros(5)
    scale = torch.stack([torch.stack([one, zero], -1), torch.stack([rho, (1 - rho**2).sqrt()], -1)], -2)
    expected = 0.25 + rho.asin() / (2 * math.pi)
    assert (log_mass(cells, torch.zeros(5, 2), scale) - expected.log()).abs().max() < 1e-10


def test_bivariate_normal_of_scipy():
    cells = polygons([[(RIGHT, 0.7), (UP, -0.4)]])
    scale = torch.tensor([[1.2, 0.0], [-0.5, 0.8]])
    covariance = (scale @ scale.T).numpy()
    value = log_mass(cells, torch.tensor([[0.1, 0.2]]), scale.unsqueeze(0)).exp().item()
    law = scipy.stats.multivariate_normal.cdf([0.7, -0.4], [0.1, 0.2], covariance, abseps=1e-12, releps=1e-12)
    assert abs(value - law) < 1e-9


def test_boxes_are_products_of_intervals():
    scale = torch.diag(torch.tensor([0.5, 2.0])).unsqueeze(0)
    for low, high in ((0.0, 1.0), (3.0, 3.1), (-30.0, -29.0)):
        cell = moved(box(high - low, 2.0), 0.0, (low, -1.0))
        value = log_mass(polygons([cell]), torch.zeros(1, 2), scale).item()
        product = oracle.interval(low, cell[2][1], 0.0, 0.5)[0] + oracle.interval(-1.0, 1.0, 0.0, 2.0)[0]
        assert abs(value - product) < 1e-10


def test_whole_plane_and_padding():
    loc, scale = torch.randn(3, 1, 2), torch.tensor([[[2.0, 0.0], [1.0, 0.5]]])
    for edges in (0, 3):
        pad = torch.zeros(1, edges)
        plane = Polygons(torch.zeros(1, edges, 2), pad + math.inf, pad, pad)
        result = moments(plane, loc, scale)
        assert result.log_mass.abs().max() < 1e-12
        torch.testing.assert_close(result.mean, loc, atol=1e-12, rtol=0.0)
        torch.testing.assert_close(
            result.covariance, (scale @ scale.mT).expand(3, 1, 2, 2), atol=1e-11, rtol=0.0
        )
        assert (log_mass_bound(plane, loc, scale) == 0.0).all()
    cell = polygons([box(1.0, 1.0)])
    shuffled = Polygons(
        *(
            torch.cat([field[:, :2], torch.full_like(field[:, :2], fill), field[:, 2:]], 1)
            for field, fill in zip(
                (cell.normals, cell.offsets, cell.starts, cell.ends), (0, math.inf, 0, 0), strict=True
            )
        )
    )
    for a, b in zip(moments(cell, loc, scale), moments(shuffled, loc, scale), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("deviation", [3.0, 0.3, 0.01])
def test_arrangement_of_lines_sums_to_the_whole(deviation):
    """Masses of a partition of the plane sum to 1 to 1e-12, moments to those of the Gaussian."""
    cells = polygons(arrangement(lines=12, seed=3))
    assert len(cells) == 1 + 12 + 12 * 11 // 2
    scale = deviation * torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    loc = torch.randn(20, 1, 2)
    result = moments(cells, loc.expand(20, len(cells), 2), scale.expand(len(cells), 2, 2))
    mass, mean = result.log_mass.exp(), result.mean
    assert (mass.sum(-1) - 1).abs().max() < 1e-12
    assert ((mass.unsqueeze(-1) * mean).sum(1) - loc[:, 0]).abs().max() < 1e-11
    second = result.covariance + mean.unsqueeze(-1) * mean.unsqueeze(-2)
    expected = scale @ scale.T + loc.mT @ loc
    assert ((mass[..., None, None] * second).sum(1) - expected).abs().max() < 1e-10 * (1 + deviation**2)


@pytest.mark.parametrize("distance", [0.0, 3.0, 60.0])
def test_additivity(distance):
    """A cell cut in two keeps its mass, in the tail too."""
    whole = moved(regular(5, 2.0), 0.0, (distance, 0.4))
    line = ((math.cos(1.0), math.sin(1.0)), 0.3 + distance * math.cos(1.0))
    parts = [whole + [line], whole + [((-line[0][0], -line[0][1]), -line[1])]]
    scale = torch.tensor([[1.0, 0.0], [0.3, 0.7]])
    one = log_mass(polygons([whole]), torch.zeros(1, 2), scale.unsqueeze(0)).item()
    two = log_mass(polygons(parts), torch.zeros(2, 2), scale.expand(2, 2, 2)).logsumexp(0).item()
    assert abs(one - two) < 1e-11


def test_rotation_and_reflection_invariance():
    """The same cell seen from the same Gaussian, turned: the same masses, turned moments."""
    cells = [moved(regular(5, 1.5), 0.0, (x, 0.2)) for x in (0.0, 2.0, 20.0)]
    angle = 0.9
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    scale = torch.tensor([[0.8, 0.0], [0.5, 1.1]])
    covariance = turn @ scale @ scale.T @ turn.T
    before = moments(polygons(cells), torch.zeros(3, 2), scale.expand(3, 2, 2))
    turned = polygons([moved(cell, angle) for cell in cells])
    after = moments(turned, torch.zeros(3, 2), torch.linalg.cholesky(covariance).expand(3, 2, 2))
    assert (before.log_mass - after.log_mass).abs().max() < 1e-11
    torch.testing.assert_close(before.mean @ turn.T, after.mean, atol=1e-11, rtol=0.0)
    torch.testing.assert_close(turn @ before.covariance @ turn.T, after.covariance, atol=1e-11, rtol=0.0)


def test_shapes_of_scale_tril_and_flat_pairs_agree():
    cells = polygons([box(1.0, 1.0), wedge(0.4), regular(7, 0.5), [(RIGHT, -3.0)]])
    loc = torch.randn(2, 5, 4, 2)
    scale = torch.linalg.cholesky(torch.eye(2) + torch.rand(4, 1, 1))
    shared = moments(cells, loc, scale)
    assert shared.log_mass.shape == (2, 5, 4) and shared.covariance.shape == (2, 5, 4, 2, 2)
    batched = moments(cells, loc, scale.expand(2, 5, 4, 2, 2))
    index = torch.arange(4).repeat(10)
    flat = moments(cells[index], loc.reshape(-1, 2), scale[index])
    for a, b, c in zip(shared, batched, flat, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(a.reshape(c.shape), c, rtol=1e-13, atol=1e-14)
    assert moments(cells, loc[:0], scale).mean.shape == (0, 5, 4, 2)
    torch.testing.assert_close(log_mass(cells, loc, scale), shared.log_mass)


def test_chunks_do_not_matter(monkeypatch):
    cells = polygons(arrangement(lines=8, seed=1))
    loc, scale = torch.randn(5, len(cells), 2), 0.3 * torch.eye(2).expand(len(cells), 2, 2)
    whole = moments(cells, loc, scale)
    monkeypatch.setattr(polygon, "_CHUNK", 7)
    for a, b in zip(whole, moments(cells, loc, scale), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_only_the_wanted_pairs():
    cells = polygons(arrangement(lines=6, seed=2))
    loc, scale = torch.randn(4, len(cells), 2), 0.5 * torch.eye(2).expand(len(cells), 2, 2)
    kept = torch.rand(4, len(cells)) < 0.5
    for tril in (scale, scale.expand(4, len(cells), 2, 2)):
        every, some = moments(cells, loc, tril), moments_where(cells, loc, tril, kept)
        for a, b in zip(every, some, strict=True):
            torch.testing.assert_close(a[kept], b[kept], rtol=1e-13, atol=1e-14)
        assert (some.log_mass[~kept] == -math.inf).all() and (some.mean[~kept] == 0).all()


def test_threads_do_not_matter(monkeypatch):
    cells = polygons(arrangement(lines=8, seed=1))
    loc, scale = torch.randn(7, len(cells), 2), 0.3 * torch.eye(2).expand(len(cells), 2, 2)
    index = torch.arange(len(cells)).repeat(7)
    threads = torch.get_num_threads()
    for arguments in ((cells, loc, scale), (cells[index], loc.reshape(-1, 2), scale[index])):
        torch.set_num_threads(1)
        one = moments(*arguments)
        try:
            torch.set_num_threads(3)
            monkeypatch.setattr(compiled, "_WORTH_A_THREAD", 1)
            three = moments(*arguments)
        finally:
            torch.set_num_threads(threads)
        for a, b in zip(one, three, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_bound_is_a_bound():
    half_planes, loc, scale = zip(*table([0.5, 8.0, 40.0]), *random_polygons(40, seed=2), strict=True)
    arguments = polygons(half_planes), torch.tensor(loc), torch.tensor(scale)
    gap = log_mass_bound(*arguments) - log_mass(*arguments)
    assert (gap > 0).all()


def test_bound_is_the_distance():
    cells = polygons(
        [moved(box(1.0, 1.0), 0.0, (3.0, 4.0)), moved(box(9.0, 9.0), 0.0, (-1.0, 2.0)), box(1.0, 1.0)]
    )
    loc = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.5, 0.5]])
    torch.testing.assert_close(
        log_mass_bound(cells, loc, torch.eye(2).expand(3, 2, 2)), torch.tensor([-12.5, -2.0, 0.0])
    )


@pytest.mark.parametrize("distance", [1e3, 1e5, 1e8, 1e11])
def test_astronomically_far_means(distance):
    """Finite, close to the bound, and the mean at the nearest point, however far the cell is."""
    half_planes, loc, scale = zip(*table([0.0]), strict=True)
    cells, scale = polygons(half_planes), torch.tensor(scale)
    for direction in torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.6, 0.8], [0.28, -0.96]]):
        far = (distance * direction).expand(len(cells), 2)
        result, bound = moments(cells, far, scale), log_mass_bound(cells, far, scale)
        assert all(torch.isfinite(field).all() for field in result)
        missing = bound - result.log_mass
        # What the finite extent takes off: at most the widths' logs and a few logs of the distance.
        assert (missing > -1e-15 * bound.abs() - 1e-9).all()
        assert (missing < 60 + 8 * math.log(distance) + 1e-15 * bound.abs()).all()


def test_half_plane_in_the_far_limit():
    """r^2 times the variance towards the wall tends to 1; along the wall nothing is truncated."""
    cells = polygons([[(LEFT, -1e6)]])
    result = moments(cells, torch.zeros(1, 2), torch.eye(2).unsqueeze(0))
    assert abs(result.log_mass.item() + 5e11 + math.log(1e6) + 0.5 * math.log(2 * math.pi)) < 1e-3
    assert abs(result.covariance[0, 0, 0].item() * 1e12 - 1) < 1e-6
    assert abs(result.covariance[0, 1, 1].item() - 1) < 1e-9


def test_zero_width_limits():
    """Log-masses fall by log 10 a decade down to nothing, where the mean stays finite."""
    widths = [10.0**-k for k in range(6, 300, 30)]
    scale = torch.tensor([[0.5, 0.0], [0.2, 0.4]])
    for shape in (
        lambda w: box(2.0, w),
        lambda w: [(DOWN, 0.0), (UP, w)],
        lambda w: [(LEFT, 0.0), (RIGHT, w)],
    ):
        cells = polygons([shape(width) for width in widths] + [shape(0.0)])
        result = moments(
            cells, torch.tensor([0.3, 0.5]).expand(len(cells), 2), scale.expand(len(cells), 2, 2)
        )
        steps = result.log_mass[:-1].diff() / math.log(10.0)
        assert (steps[0] + 30).abs() < 1e-5 and (steps[1:] + 30).abs().max() < 1e-11
        assert result.log_mass[-1] == -math.inf
        assert torch.isfinite(result.mean).all() and torch.isfinite(result.covariance).all()
        thin = 0 if (result.covariance[1, 0, 0] < 1e-9) else 1
        assert abs(result.covariance[1, thin, thin].item() * 12 / widths[1] ** 2 - 1) < 1e-9
        assert torch.isfinite(sample(cells, torch.zeros(len(cells), 2), scale.expand(len(cells), 2, 2))).all()


DRAWN = {
    "near square": (box(1.0, 1.0), (0.3, 0.2)),
    "big box": (moved(box(50.0, 300.0), 0.3), (2.0, 7.0)),
    "plane but a corner": ([(RIGHT, 6.0)], (0.0, 0.0)),
    "wedge at 8": (moved(wedge(0.5), 0.2, (8.0, 1.0)), (0.0, 0.0)),
    "quadrant at 140": (moved([(LEFT, 0.0), (DOWN, 0.0)], 0.0, (130.0, 50.0)), (0.0, 0.0)),
    "half-plane at 40": ([(LEFT, -40.0)], (0.0, 0.0)),
    "needle at 40": (moved(box(1.0, 1e-6), 1.0, (40.0, 3.0)), (0.0, 0.0)),
    "tiny box": (moved(box(1e-6, 2e-6), 0.3), (0.3, 0.2)),
    "hexagon": (regular(6, 3.0), (0.4, -0.2)),
}


@pytest.mark.parametrize("name", DRAWN)
def test_draws_follow_the_law(name):
    """Kolmogorov-Smirnov of projections on two directions, against masses of the cell cut at every draw."""
    half_planes, loc = DRAWN[name]
    cells, loc = polygons([half_planes]), torch.tensor([loc])
    scale = torch.tensor([[[1.0, 0.0], [0.4, 0.7]]])
    draws = sample(cells, loc, scale, (500,))
    assert draws.shape == (500, 1, 2)
    for (nx, ny), c in half_planes:
        slack = c - draws @ torch.tensor([nx, ny])
        assert (slack > -1e-13 * (1 + abs(c) + draws.abs().max())).all()
    total = log_mass(cells, loc, scale)
    for angle in (0.4, 2.2):
        normal = math.cos(angle), math.sin(angle)
        offsets = (draws[:, 0] @ torch.tensor(normal)).tolist()
        parts = polygons([[*half_planes, (normal, offset)] for offset in offsets])
        share = log_mass(parts, loc.expand(500, 2), scale.expand(500, 2, 2)) - total
        assert scipy.stats.kstest(share.exp().numpy(), "uniform").pvalue > 2e-5


def test_draws_have_the_moments():
    """Means and covariances of 20000 draws within 5 standard errors, over all shapes and distances."""
    half_planes, loc, scale = zip(*table([0.0, 2.0, 40.0]), strict=True)
    arguments = polygons(half_planes), torch.tensor(loc), torch.tensor(scale)
    result = moments(*arguments)
    count = 20000
    deviation = result.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    draws = (sample(*arguments, (count,)) - result.mean) / deviation
    assert (draws.mean(0).abs() * count**0.5).max() < 5.0
    correlation = result.covariance / (deviation.unsqueeze(-1) * deviation.unsqueeze(-2))
    products = draws.unsqueeze(-1) * draws.unsqueeze(-2)
    error = (products.mean(0) - correlation) / (products.std(0) / count**0.5)
    assert error.abs().max() < 5.0


def test_sample_shapes():
    cells, loc = polygons([box(1.0, 1.0), wedge(1.0)]), torch.randn(3, 2, 2)
    scale = torch.eye(2).expand(2, 2, 2)
    assert sample(cells, loc, scale).shape == (3, 2, 2)
    assert sample(cells, loc, scale, (4, 5)).shape == (4, 5, 3, 2, 2)
    assert sample(cells, loc, scale, (0,)).shape == (0, 3, 2, 2)


@pytest.mark.parametrize("function", [log_mass, log_mass_bound, moments, sample])
def test_default_dtype_does_not_matter(function):
    """Everything inside is float64 whatever torch's default."""
    half_planes, loc, scale = zip(*table([0.5, 40.0]), strict=True)
    arguments = polygons(half_planes), torch.tensor(loc), torch.tensor(scale)
    torch.manual_seed(1)
    expected = function(*arguments)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(1)
    result = function(*arguments)
    for a, b in zip(result, expected, strict=True):
        assert a.dtype == torch.float64 and torch.equal(a, b)
