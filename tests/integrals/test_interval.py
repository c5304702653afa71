# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Intervals: 60-digit oracle, limits, sums over partitions, goodness of fit of the draws."""

import math

import gaussian_oracle as oracle
import mpmath as mp
import numpy as np
import pytest
import scipy.stats
import torch

from pyro_cpa import compiled
from pyro_cpa.integrals import log_mass, log_mass_bound, moments, sample
from pyro_cpa.integrals.normal import truncated_quantile
from pyro_cpa.partition.cells import Intervals

INF = math.inf


@pytest.fixture(autouse=True, params=["compiled", "tensors"])
def kind(request, monkeypatch):
    """Both ways through the integrals."""
    if request.param == "compiled":
        pytest.importorskip("numba")
    monkeypatch.setattr(compiled, "_INSTALLED", request.param == "compiled")


def tensors(*columns):
    return (torch.tensor(column, dtype=torch.float64) for column in columns)


def random_cases(count, seed):
    """(lower, upper, mean, deviation) over 15 decades of width and log-masses down to -1e4."""
    rng = np.random.default_rng(seed)
    for k in range(count):
        deviation = 10 ** rng.uniform(-3, 3)
        mean = rng.normal() * rng.choice([0, 1, 10])
        lower = mean + deviation * 10 ** rng.uniform(-3, 2.14) * rng.choice([-1, 1])
        upper = lower + deviation * 10 ** rng.uniform(-9, 3)
        yield (
            (lower, INF) if k % 7 == 0 else (-INF, upper) if k % 11 == 0 else (lower, upper),
            mean,
            deviation,
        )


def test_moments_against_the_oracle():
    cases = list(random_cases(300, seed=0))
    cases += [
        ((-1.0, 1.0), 0.0, 1.0),
        ((-1e-9, 2e-9), 0.0, 1.0),
        ((-INF, 0.0), 0.0, 1.0),
        ((0.0, 3.0), 0.0, 1.0),
    ]
    cases += [((40.0, 40.0 + 3e-9), 0.0, 1.0), ((-8.0, 40.0), 0.0, 1.0), ((-1.3, 1.2), 0.0, 1.0)]
    lower, upper = tensors(*zip(*(ends for ends, _, _ in cases), strict=True))
    loc, scale = tensors([m for _, m, _ in cases], [s for _, _, s in cases])
    result = moments(Intervals(lower, upper), loc[:, None], scale[:, None, None])
    for k, ((low, high), mean, deviation) in enumerate(cases):
        log_m, center, variance = oracle.interval(low, high, mean, deviation)
        assert abs(result.log_mass[k].item() - log_m) < 1e-10
        own_scale = mp.sqrt(variance)
        rounding = 4e-16 * (abs(center) + abs(mean))
        assert abs(result.mean[k, 0].item() - center) < 1e-9 * own_scale + rounding
        assert abs(result.covariance[k, 0, 0].item() / variance - 1) < 1e-9


def test_astronomically_far_means():
    cells = Intervals(*tensors([-INF, -1.0, 2.0, 5.0], [-1.0, 2.0, 5.0, INF]))
    loc = torch.tensor([[-1e8], [1e8], [-1e150]]).unsqueeze(1).expand(3, 4, 1)
    result = moments(cells, loc, torch.ones(4, 1, 1))
    assert all(torch.isfinite(field).all() for field in result)
    torch.testing.assert_close(result.log_mass[:2], log_mass_bound(cells, loc, torch.ones(4, 1, 1))[:2])
    torch.testing.assert_close(result.mean[0, 1:, 0], cells.lower[1:], atol=1e-7, rtol=0.0)
    torch.testing.assert_close(result.covariance[0, 1:, 0, 0] * 1e16, torch.ones(3), atol=1e-6, rtol=0.0)


def test_zero_width():
    cells = Intervals(*tensors([-2.0, 0.0, 30.0], [-2.0, 0.0, 30.0]))
    result = moments(cells, torch.zeros(3, 1), torch.ones(3, 1, 1))
    assert (result.log_mass == -INF).all()
    assert torch.equal(result.mean[:, 0], cells.lower)
    assert (result.covariance == 0.0).all()
    assert torch.equal(sample(cells, torch.zeros(3, 1), torch.ones(3, 1, 1))[:, 0], cells.lower)


def test_narrow_limit():
    """Density times width, and a uniform law's variance."""
    cells = Intervals(*tensors([3.0], [3.0 + 2.0**-40]))
    result = moments(cells, torch.zeros(1, 1), torch.ones(1, 1, 1))
    expected = -4.5 - 0.5 * math.log(2 * math.pi) - 40 * math.log(2.0)
    assert abs(result.log_mass.item() - expected) < 1e-10
    assert abs(result.covariance.item() * 12 * 2.0**80 - 1) < 1e-9


def test_partition_sums_to_the_whole():
    """Masses sum to 1 to 1e-12, and so do first and second moments to those of the Gaussian."""
    walls = torch.cat([torch.randn(200).sort().values * 3, torch.tensor([20.0, 300.0])])
    cells = Intervals(torch.cat([torch.tensor([-INF]), walls]), torch.cat([walls, torch.tensor([INF])]))
    loc, scale = torch.randn(50, 1, 1).expand(50, 203, 1), torch.tensor(0.7)
    result = moments(cells, loc, scale.expand(203, 1, 1))
    mass, mean = result.log_mass.exp(), result.mean[..., 0]
    assert (mass.sum(-1) - 1).abs().max() < 1e-12
    assert ((mass * mean).sum(-1) - loc[:, 0, 0]).abs().max() < 1e-12
    second = (mass * (result.covariance[..., 0, 0] + mean**2)).sum(-1)
    assert (second - loc[:, 0, 0] ** 2 - scale**2).abs().max() < 1e-11


def test_additivity_in_the_tail():
    whole = Intervals(*tensors([30.0], [31.0]))
    parts = Intervals(*tensors([30.0, 30.01], [30.01, 31.0]))
    one = log_mass(whole, torch.zeros(1, 1), torch.ones(1, 1, 1))
    two = log_mass(parts, torch.zeros(2, 1), torch.ones(2, 1, 1)).logsumexp(-1)
    assert abs(one.item() - two.item()) < 1e-12


def test_bound_is_a_bound_and_zero_inside():
    (ends, mean, deviation) = zip(*random_cases(200, seed=1), strict=True)
    lower, upper = tensors(*zip(*ends, strict=True))
    loc, scale = tensors(mean, deviation)
    arguments = Intervals(lower, upper), loc[:, None], scale[:, None, None]
    bound = log_mass_bound(*arguments)
    assert (bound >= log_mass(*arguments)).all()
    assert ((bound == 0.0) == ((lower <= loc) & (loc <= upper))).all()


def test_shapes_of_scale_tril_and_flat_pairs_agree():
    cells = Intervals(*tensors([-INF, -1.0, 0.5], [-1.0, 0.5, INF]))
    loc, scale = torch.randn(4, 5, 3, 1), torch.rand(3, 1, 1) + 0.1
    shared = moments(cells, loc, scale)
    assert shared.mean.shape == (4, 5, 3, 1) and shared.covariance.shape == (4, 5, 3, 1, 1)
    batched = moments(cells, loc, scale.expand(4, 5, 3, 1, 1))
    index = torch.arange(3).repeat(20)
    flat = moments(cells[index], loc.reshape(-1, 1), scale[index])
    for a, b, c in zip(shared, batched, flat, strict=True):
        assert torch.equal(a, b) and torch.equal(a.reshape(c.shape), c)


INTERVALS = [
    (0.0, INF),
    (-INF, -40.0),
    (5.0, 5.1),
    (-0.5, 1.0),
    (-3.0, 9.0),
    (40.0, 40.0 + 1e-6),
    (0.1, 2.0),
    (140.0, INF),
]


@pytest.mark.parametrize("ends", INTERVALS)
def test_draws_follow_the_law(ends):
    """Kolmogorov-Smirnov against the masses below each draw."""
    cells = Intervals(*tensors(*([end] for end in ends)))
    draws = sample(cells, torch.zeros(1, 1), torch.ones(1, 1, 1), (4000,))
    assert draws.shape == (4000, 1, 1)
    x = draws[:, 0, 0]
    assert (x >= ends[0]).all() and (x <= ends[1]).all()
    # From the end that counts: beyond the mean the mass below x is not seen in the total's digits.
    far = ends[0] == -INF
    part = Intervals(x, torch.full_like(x, ends[1])) if not far else Intervals(torch.full_like(x, ends[0]), x)
    share = (
        log_mass(part, torch.zeros(4000, 1), torch.ones(4000, 1, 1))
        - log_mass(cells, torch.zeros(1, 1), torch.ones(1, 1, 1))
    ).exp()
    assert scipy.stats.kstest(share.numpy(), "uniform").pvalue > 2e-5


def test_quantile_inverts_the_distribution_function():
    near, width = tensors([0.0, 3.0, 40.0, 5.0, -0.5, 0.2, -2.0], [INF, 1e-8, INF, 3.0, 1.2, 0.7, 7.0])
    level = torch.linspace(0.001, 0.999, 50).unsqueeze(-1)
    offset = truncated_quantile(near.expand(50, 7), width.expand(50, 7), level.expand(50, 7))
    start = near.clamp(min=0.0)
    below = Intervals(near.expand(50, 7).reshape(-1), (start + offset).reshape(-1))
    kept = torch.ones(350, dtype=torch.bool)
    share = log_mass(below, torch.zeros(350, 1), torch.ones(350, 1, 1)) - log_mass(
        Intervals(near, near + width), torch.zeros(7, 1), torch.ones(7, 1, 1)
    ).expand(50, 7).reshape(-1)
    error = (share.exp().view(50, 7) - level).abs().amax(0)
    # The narrow interval's own ends are rounded to 1e-16 / 1e-8 of its width; it is exact in the offset.
    assert kept.all() and (error[[0, 2, 3, 4, 5, 6]] < 1e-9).all() and error[1] < 1e-6
