# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Estimates over polytopes of four dimensions and more: exact where they should be, else calibrated; draws."""

import math

import gaussian_oracle as oracle
import numpy as np
import pytest
import torch
from decoders import mlp
from polytope_cases import INF, affine_image, box, equicorrelated, polytopes, rotation

from pyro_cpa.errors import CPAError
from pyro_cpa.integrals import (
    EstimatedPolytopes,
    log_mass,
    log_mass_bound,
    log_mass_replicates,
    moments,
    nearest_point,
    sample,
)
from pyro_cpa.integrals.separation import log_interval_mass, truncated_draw
from pyro_cpa.partition import Polytopes, enumerate_regions


def estimate(cells, loc, tril, seed=0, num_points=1024):
    """Mass and its standard error, both over exp(log-mass)."""
    found = log_mass_replicates(EstimatedPolytopes(cells, num_points, seed), loc, tril)
    K = found.shape[-1]
    total = found.logsumexp(-1) - math.log(K)
    return total, (found - total[..., None]).exp().std(-1) / K**0.5


def orthant(dim, shift):
    """The orthant beyond ``shift`` under a covariance of (1 + 11')/2: a corner at a distance."""
    factor = torch.linalg.cholesky((torch.eye(dim) + torch.ones(dim, dim)) / 2)
    cells = polytopes([box(*[(shift, INF)] * dim)])
    return cells, torch.zeros(1, dim), factor[None]


def lifted(dim, deviation, seed=2):
    """Cells of R^3 as prisms of R^dim, and the Gaussians of R^3 that have the same masses on the cells."""
    flat = enumerate_regions(mlp(3, 6, 1)).cells
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, dim, generator=generator)
    covariance = deviation**2 * (torch.eye(dim) + root @ root.mT / dim)
    loc = torch.randn(dim, generator=generator)
    cells = [
        [
            (torch.nn.functional.pad(n, (0, dim - 3)), c)
            for n, c in zip(cell.normals[0], cell.offsets[0].tolist(), strict=True)
            if c < INF
        ]
        for cell in (flat[torch.tensor([r])] for r in range(len(flat)))
    ]
    R = len(flat)
    inner = flat, loc[:3].expand(R, 3), torch.linalg.cholesky(covariance[:3, :3]).expand(R, 3, 3)
    outer = polytopes(cells), loc.expand(R, dim), torch.linalg.cholesky(covariance).expand(R, dim, dim)
    return inner, outer


def test_interval_mass_and_quantile_in_every_tail():
    ends = [
        (-1.0, 2.0),
        (3.0, INF),
        (-INF, -8.0),
        (30.0, 31.0),
        (-40.0, -39.999),
        (5.0, 5.0 + 1e-9),
        (200.0, INF),
    ]
    low, high = torch.tensor(ends).T
    expected = torch.tensor([float(oracle.interval(a, b, 0.0, 1.0)[0]) for a, b in ends])
    torch.testing.assert_close(log_interval_mass(low, high), expected, rtol=1e-7, atol=1e-7)
    level = torch.linspace(0.001, 0.999, 41)[:, None].expand(-1, len(ends))
    point = truncated_draw(low.expand_as(level), high.expand_as(level), level)
    below = (log_interval_mass(low.expand_as(level), point) - log_interval_mass(low, high)).exp()
    nearer = torch.where(low + high < 0, 1 - below, below)
    torch.testing.assert_close(nearer, level, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dim", [4, 6])
@pytest.mark.parametrize("distance", [-0.3, 2.0, 40.0])
def test_products_of_intervals_have_no_error(dim, distance):
    """Axes along the facets make every coordinate independent of the others."""
    sides = [(distance, distance + 1.0), (distance, INF), (-0.5, 0.2), (-INF, 1.0), (0.0, 1e-4), (-2.0, 2.0)][
        :dim
    ]
    turn = rotation(5, dim)
    cells = polytopes([affine_image(box(*sides), turn, np.zeros(dim))])
    arguments = cells, torch.zeros(1, dim), torch.eye(dim)[None]
    parts = [oracle.interval(low, high, 0.0, 1.0) for low, high in sides]
    expected = float(sum(p[0] for p in parts))
    total, error = estimate(*arguments)
    assert abs(total.item() - expected) < 1e-6 and error.item() < 1e-6
    found = moments(*arguments)
    mean = torch.tensor([float(p[1]) for p in parts])
    deviation = torch.tensor([float(p[2]) for p in parts]).sqrt()
    turned_mean = torch.tensor(turn).mT @ found.mean[0]
    assert ((turned_mean - mean).abs() < 0.03 * deviation).all()


@pytest.mark.parametrize("dim", [4, 8])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 3.0, 30.0])
def test_corners_in_the_tail_are_calibrated(dim, shift):
    """Errors over their standard errors have mean 0 and variance 15/13 (Student's t), and errors are small."""
    truth = equicorrelated(dim, shift)
    if shift == 0.0:
        assert abs(truth + math.log(dim + 1)) < 1e-10
    arguments = orthant(dim, shift)
    seeds = 40
    scores, errors = [], []
    for seed in range(1, seeds + 1):
        total, error = estimate(*arguments, seed=seed)
        scores.append(((total - truth).expm1() / ((total - truth).exp() * error)).item())
        errors.append(error.item())
    assert np.max(errors) < 0.02
    assert abs(np.mean(scores)) < 5 * (15 / 13 / seeds) ** 0.5
    assert 0.35 < np.var(scores) < 2.8


@pytest.mark.parametrize("dim", [4, 6])
@pytest.mark.parametrize("deviation", [1.5, 0.2])
def test_prisms_over_exact_cells(dim, deviation):
    inner, outer = lifted(dim, deviation)
    truth = log_mass(*inner)
    assert truth.min() < -8
    total, error = estimate(*outer)
    # The distance of cells that are as far as their corners is itself only known to a rounding error of these.
    near = truth > -1e4
    assert near.sum() > 35
    assert ((total - truth).abs() < 6 * error + 1e-6)[near].all()
    assert error.median() < 0.005
    # More points, smaller errors.
    few, many = (estimate(*outer, num_points=n)[1].square().mean() for n in (256, 4096))
    assert many < few / 4


def test_moments_against_prisms_over_exact_cells():
    inner, outer = lifted(4, 1.0)
    expected, found = moments(*inner), moments(EstimatedPolytopes(outer[0], 4096), *outer[1:])
    mean = found.mean[:, :3]
    covariance = found.covariance[:, :3, :3]
    deviation = expected.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    heavy = expected.log_mass > -12
    assert ((mean - expected.mean).abs() / deviation)[heavy].max() < 0.05
    scaled = (covariance - expected.covariance) / (deviation[:, :, None] * deviation[:, None])
    assert scaled[heavy].abs().max() < 0.1


@pytest.mark.parametrize("deviation", [3.0, 0.3])
def test_partition_of_space_sums_to_the_whole(deviation):
    cells = enumerate_regions(mlp(5, 6, 1)).cells
    R = len(cells)
    assert isinstance(cells, Polytopes)
    tril = (deviation * torch.linalg.cholesky(torch.eye(5) + 0.3)).expand(R, 5, 5)
    loc = torch.randn(5).expand(R, 5)
    replicates = log_mass_replicates(EstimatedPolytopes(cells), loc, tril)
    total = replicates.exp().sum(0)
    assert abs(total.mean() - 1) < 5 * total.std() / 4
    assert total.std() / 4 < 0.01
    found = moments(cells, loc, tril)
    mass = found.log_mass.exp()
    assert ((mass[:, None] * found.mean).sum(0) - loc[0]).abs().max() < 0.05 * deviation
    assert (log_mass_bound(cells, loc, tril) >= log_mass(cells, loc, tril) - 0.1).all()


def test_same_points_every_time_and_no_global_generator():
    arguments = orthant(4, 0.5)
    state = torch.get_rng_state()
    first, second = (log_mass(*arguments) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, log_mass(EstimatedPolytopes(arguments[0], seed=1), *arguments[1:]))
    assert log_mass(EstimatedPolytopes(arguments[0], 10_000), *arguments[1:]).shape == (1,)
    assert nearest_point(EstimatedPolytopes(arguments[0]), *arguments[1:]).shape == (1, 4)


def test_draws_have_the_moments_of_exact_cells():
    inner, outer = lifted(4, 0.8)
    expected = moments(*inner)
    count = 300
    draws = sample(*outer, (count,))
    assert draws.shape == (count, len(expected.mean), 4)
    depth = torch.einsum("nrl,rfl->nrf", draws, outer[0].normals) - outer[0].offsets
    assert depth.max() < 1e-9
    values, axes = torch.linalg.eigh(expected.covariance)
    centred = (draws[..., :3] - expected.mean)[..., None, :] @ axes
    white = centred[..., 0, :] / values.sqrt()
    assert (white.mean(0).abs() * count**0.5).max() < 5
    products = white[..., :, None] * white[..., None, :]
    error = (products.mean(0) - torch.eye(3)) / (products.std(0) / count**0.5)
    assert error.abs().max() < 6


@pytest.mark.parametrize("shift", [0.0, 2.0, 20.0])
def test_draws_in_corners_follow_the_law(shift):
    """The least coordinate beyond a level has the ratio of two orthants as probability."""
    cells, loc, tril = orthant(4, shift)
    draws = sample(cells, loc, tril, (4000,))[:, 0]
    for level in (shift + 0.02 / (1 + shift), shift + 0.3 / (1 + shift)):
        share = math.exp(equicorrelated(4, level) - equicorrelated(4, shift))
        found = (draws.amin(1) > level).double().mean().item()
        assert abs(found - share) < 5 * (share * (1 - share) / 4000) ** 0.5


def test_hopeless_draws_raise(monkeypatch):
    monkeypatch.setattr("pyro_cpa.integrals.separation_sample._MOST", 16)
    simplex = box(*[(0.0, INF)] * 6) + [(np.ones(6), 0.1)]
    with pytest.raises(CPAError, match="6 dimensions was rejected"):
        sample(polytopes([simplex]), torch.zeros(1, 6), torch.eye(6)[None], (50,))
