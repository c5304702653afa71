# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Draws from Gaussians truncated to polytopes of R^3: fit of projections, moments, shapes."""

import numpy as np
import pytest
import scipy.stats
import torch
from polytope_cases import INF, affine_image, box, cone, polytopes, prism, random_polytopes, rotation

from pyro_cpa.integrals import log_mass, moments, sample
from pyro_cpa.partition.walls import NOISE, Walls

EYE = np.eye(3)
FACTOR = np.linalg.cholesky([[1.0, 0.3, 0.1], [0.3, 0.6, -0.2], [0.1, -0.2, 0.4]])

DRAWN = {
    "around the mean": (affine_image(prism(5, 1.0, -1.0, 0.5), rotation(2), (0.1, 0.2, -0.1)), EYE),
    "half-space at 30": ([(np.array([-0.48, 0.6, 0.64]), -30.0)], FACTOR),
    "space but a corner": ([(EYE[0], 6.0)], EYE),
    "slab": (box((2.0, 2.5), (-INF, INF), (-INF, INF)), FACTOR),
    "cone at 10": (affine_image(cone(4, 0.7), EYE, (10.0, 1.0, -1.0)), EYE),
    "edge at 40": (
        affine_image(box((0.0, INF), (0.0, INF), (-INF, 1.0)), rotation(5), (25.0, 30.0, 0.0)),
        EYE,
    ),
    "plate at 20": (
        affine_image(box((0.0, 1e-5), (-1.0, 2.0), (0.0, 1.0)), rotation(4), (20.0, 0.0, 0.0)),
        EYE,
    ),
    "big box": (box((-30.0, 2.0), (1.0, 50.0), (-4.0, 300.0)), FACTOR),
}


@pytest.mark.parametrize("name", DRAWN)
def test_draws_follow_the_law(name):
    """Kolmogorov-Smirnov of projections on two directions, against masses of the cell cut at every draw."""
    half_spaces, factor = DRAWN[name]
    cells, scale = polytopes([half_spaces]), torch.tensor(factor)[None]
    count = 300
    draws = sample(cells, torch.zeros(1, 3), scale, (count,))
    assert draws.shape == (count, 1, 3)
    depth = (draws @ cells.normals[0].mT - cells.offsets[0]).amax(-1)
    assert (depth < 1e-13 * (1 + draws.abs().max())).all()
    total = log_mass(cells, torch.zeros(1, 3), scale)
    every = torch.zeros(count, dtype=torch.long)
    for direction in ([0.6, 0.64, 0.48], [-0.8, 0.36, 0.48]):
        normal = torch.tensor([direction]).expand(count, 3)
        offset = (draws[:, 0] * normal).sum(1)
        walls = Walls(torch.arange(count), normal, offset, *torch.full((2, count), NOISE))
        crossed = walls.cross(cells.generators()[every])
        below, _ = cells[every][crossed].halves(walls[crossed])
        m = int(crossed.sum())
        assert m > 0.99 * count
        share = (log_mass(below, torch.zeros(m, 3), scale.expand(m, 3, 3)) - total).exp()
        assert scipy.stats.kstest(share.numpy(), "uniform").pvalue > 2e-5


def test_draws_have_the_moments():
    """Means and covariances of 4000 draws within 5 standard errors."""
    cases = list(random_polytopes(15, seed=3)) + [
        (cell, np.zeros(3), factor) for cell, factor in DRAWN.values()
    ]
    cells, loc, factor = zip(*cases, strict=True)
    arguments = polytopes(cells), torch.tensor(np.array(loc)), torch.tensor(np.array(factor))
    result = moments(*arguments)
    count = 4000
    values, axes = torch.linalg.eigh(result.covariance)
    draws = sample(*arguments, (count,)) - result.mean
    white = (draws[..., None, :] @ axes)[..., 0, :] / values.sqrt()
    assert (white.mean(0).abs() * count**0.5).max() < 5.0
    products = white.unsqueeze(-1) * white.unsqueeze(-2)
    error = (products.mean(0) - torch.eye(3)) / (products.std(0) / count**0.5)
    assert error.abs().max() < 5.0


def test_sample_shapes():
    cells, loc = polytopes([box((0, 1), (0, 1), (0, 1)), box((0, 1), (2, 3), (0, INF))]), torch.randn(3, 2, 3)
    scale = torch.eye(3).expand(2, 3, 3)
    assert sample(cells, loc, scale).shape == (3, 2, 3)
    assert sample(cells, loc, scale, (4, 5)).shape == (4, 5, 3, 2, 3)
    assert sample(cells, loc, scale, (0,)).shape == (0, 3, 2, 3)
