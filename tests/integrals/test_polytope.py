# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Polytopes of R^3: brute-force quadrature, products, closed forms, invariances, partitions of space."""

import math

import gaussian_oracle as oracle
import numpy as np
import pytest
import torch
from decoders import mlp
from polytope_cases import (
    INF,
    affine_image,
    box,
    brute_force,
    cone,
    polytopes,
    prism,
    random_polytopes,
    rotation,
)

from pyro_cpa import compiled
from pyro_cpa.integrals import log_mass, log_mass_bound, moments, polytope
from pyro_cpa.partition import Polytopes, enumerate_regions

EYE = np.eye(3)


def batch(cases):
    cells, loc, factor = zip(*cases, strict=True)
    return polytopes(cells), torch.tensor(np.array(loc)), torch.tensor(np.array(factor))


def assert_close(found, expected, where):
    """Log-mass to 1e-10, mean to 1e-9 of the truncated law's deviation, covariance to a relative 1e-9.

    The covariance of a thin cell is as exact as its largest variance allows.
    """
    (log_m, mean, covariance), (mass, center, second) = found, expected
    deviation = np.sqrt(np.diag(second))
    # How thick a cell is, is known no better than its half-spaces are rounded.
    rounding = 1e-15 * (1 + np.abs(center).max()) / math.sqrt(np.linalg.eigvalsh(second)[0])
    assert abs(log_m.item() - mass) < 1e-10 * max(1, -mass / 1e4) + rounding, where
    assert (np.abs(mean.numpy() - center) < (1e-9 + rounding) * deviation + 1e-15 * np.abs(center)).all(), (
        where
    )
    assert torch.equal(covariance, covariance.mT)
    slack = 1e-9 + 4 * rounding
    limit = slack * np.outer(deviation, deviation) + (1e-11 + rounding) * second.trace()
    assert (np.abs(covariance.numpy() - second) < limit).all(), where


def check(cases, nodes=32):
    result = moments(*batch(cases))
    for k, case in enumerate(cases):
        found = [field[k] for field in result]
        try:
            assert_close(found, brute_force(*case, nodes=nodes), case)
        except AssertionError:  # large or far cells take the oracle more nodes
            assert_close(found, brute_force(*case, nodes=72), case)


def test_random_polytopes_against_brute_force():
    check(list(random_polytopes(20, seed=0)))


@pytest.mark.slow
def test_many_random_polytopes_against_brute_force():
    check(list(random_polytopes(300, seed=1)))


@pytest.mark.parametrize("distance", [0.0, 1.0, 10.0, 30.0])
def test_cones_and_prisms_at_a_distance(distance):
    """Tips, edges and faces towards the mean; the infinite cone is cut off where nothing is left."""
    cases = []
    for facets, slope in ((3, 1.0), (5, 0.4), (4, 3.0)):
        end = distance + 60 / (distance + 8)
        shape = affine_image(cone(facets, slope), EYE, (distance, 0.0, 0.0)) + [(EYE[0], end)]
        cases.append((affine_image(shape, rotation(facets), np.zeros(3)), np.zeros(3), EYE))
    turned = affine_image(prism(5, 0.5, 0.0, 1.0), rotation(7), (distance, 0.2, 0.1))
    cases.append(
        (turned, np.zeros(3), np.linalg.cholesky([[1.0, 0.3, 0.0], [0.3, 0.5, -0.2], [0.0, -0.2, 0.4]]))
    )
    check(cases, nodes=40)


def test_infinite_cone_at_ten_deviations():
    """The tail beyond what a cut-off cone has is what it should be: exp(-|y|^2/2) times a polynomial."""
    cases = [
        (affine_image(cone(4, 0.7), EYE, (10.0, 1.0, -1.0)) + cut, np.zeros(3), EYE)
        for cut in ([], [(EYE[0], 16.0)], [(EYE[0], 11.0)])
    ]
    whole, cut, short = log_mass(*batch(cases)).tolist()
    assert abs(whole - cut) < 1e-11
    assert abs(whole - brute_force(*cases[1], nodes=48)[0]) < 1e-10
    assert whole > short


SIDES = {
    "half-space": ((0.0, INF), (-INF, INF), (-INF, INF)),
    "slab": ((0.0, 0.3), (-INF, INF), (-INF, INF)),
    "thin slab": ((0.0, 1e-8), (-INF, INF), (-INF, INF)),
    "quarter-space": ((0.0, INF), (0.5, INF), (-INF, INF)),
    "octant": ((0.0, INF), (-0.5, INF), (0.2, INF)),
    "beam": ((0.0, 0.5), (-1.0, 2.0), (-INF, INF)),
    "half-beam": ((0.0, INF), (-0.2, 0.3), (0.1, 0.4)),
    "cube": ((0.0, 1.0), (-0.5, 0.5), (0.0, 1.0)),
    "big box": ((0.0, 50.0), (-300.0, 20.0), (-20.0, 9.0)),
    "tiny box": ((0.0, 1e-6), (0.0, 2e-6), (1e-6, 2e-6)),
    "plate": ((0.0, 1e-7), (-1.0, 2.0), (0.0, 1.0)),
    "plate seen edge-on": ((0.0, 1.0), (0.0, 1e-7), (-2.0, 1.0)),
    "needle": ((0.0, 1.0), (0.0, 1e-5), (0.0, 2e-5)),
}


@pytest.mark.parametrize("distance", [-0.3, 0.0, 2.0, 8.0, 40.0])
@pytest.mark.parametrize("turned", [False, True])
def test_products_of_intervals(distance, turned):
    """Boxes at a distance along an axis or a diagonal, seen through any rotation and covariance."""
    factor = np.linalg.cholesky([[1.0, 0.3, 0.1], [0.3, 0.6, -0.2], [0.1, -0.2, 0.4]]) if turned else EYE
    turn = rotation(3) if turned else EYE
    center = np.array([0.5, -0.3, 0.2]) * turned
    cases, products = [], []
    for k, sides in enumerate(SIDES.values()):
        direction = (EYE[0], np.array([0.6, 0.64, 0.48]))[k % 2]
        moved = [
            (low + distance * d, high + distance * d) for (low, high), d in zip(sides, direction, strict=True)
        ]
        cases.append((affine_image(box(*moved), factor @ turn, center), center, factor))
        parts = [oracle.interval(low, high, 0.0, 1.0) for low, high in moved]
        mean, variance = np.array([[float(p[1]), float(p[2])] for p in parts]).T
        image = factor @ turn
        covariance = image @ np.diag(variance) @ image.T
        products.append((float(sum(p[0] for p in parts)), center + image @ mean, covariance))
    result = moments(*batch(cases))
    for k, name in enumerate(SIDES):
        mass, mean, covariance = products[k]
        # The widths of plates and needles, and where they are, are themselves rounded.
        thin = min(high - low for low, high in SIDES[name])
        slack = 1e-10 + 4e-15 * (1 + abs(distance)) * (abs(distance) + 1 / thin) * turned
        assert abs(result.log_mass[k].item() - mass) < slack, name
        axes = np.linalg.inv(factor @ turn)
        deviation = np.sqrt(np.diag(axes @ covariance @ axes.T))
        error = axes @ (result.mean[k].numpy() - mean) / deviation
        assert (np.abs(error) < 1e-9 + 2e-15 * (1 + abs(distance)) / deviation).all(), name
        second = axes @ result.covariance[k].numpy() @ axes.T / np.outer(deviation, deviation)
        assert (
            np.abs(second - EYE) < 1e-8 + 1e-14 * (1 + distance**2) / np.outer(deviation, deviation)
        ).all(), name


def test_octants_in_closed_form():
    """P(all positive) = 1/8 + (sum of the arcsines of the correlations) / (4 pi)."""
    rng = np.random.default_rng(0)
    factors = np.stack([np.linalg.cholesky(np.cov(rng.normal(size=(3, 5)))) for _ in range(20)])
    cells = polytopes([box((0.0, INF), (0.0, INF), (0.0, INF))] * 20)
    covariance = factors @ factors.transpose(0, 2, 1)
    deviation = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
    correlation = covariance / (deviation[:, :, None] * deviation[:, None])
    angles = np.arcsin(correlation[:, [0, 0, 1], [1, 2, 2]]).sum(1)
    found = log_mass(cells, torch.zeros(20, 3), torch.tensor(factors))
    assert np.abs(found.numpy() - np.log(0.125 + angles / (4 * math.pi))).max() < 1e-10


@pytest.mark.parametrize("deviation", [3.0, 0.5, 0.05])
def test_partition_of_space_sums_to_the_whole(deviation):
    """Masses sum to 1, moments to those of the Gaussian."""
    cells = enumerate_regions(mlp(3, 6, 1)).cells
    R = len(cells)
    assert R == 42
    scale = deviation * torch.linalg.cholesky(
        torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.8, -0.3], [0.0, -0.3, 0.7]])
    )
    loc = torch.randn(3, 1, 3)
    result = moments(cells, loc.expand(3, R, 3), scale.expand(R, 3, 3))
    mass, mean = result.log_mass.exp(), result.mean
    assert (mass.sum(-1) - 1).abs().max() < 1e-10
    assert ((mass.unsqueeze(-1) * mean).sum(1) - loc[:, 0]).abs().max() < 1e-9 * (1 + deviation)
    second = result.covariance + mean.unsqueeze(-1) * mean.unsqueeze(-2)
    expected = scale @ scale.T + loc.mT @ loc
    assert ((mass[..., None, None] * second).sum(1) - expected).abs().max() < 1e-8 * (1 + deviation**2)


@pytest.mark.parametrize("distance", [0.0, 3.0, 60.0])
def test_additivity(distance):
    """A cell cut in two keeps its mass, in the tail too."""
    whole = affine_image(prism(5, 2.0, -1.0, 2.0), rotation(1), (distance, 0.4, 0.1))
    normal = np.array([0.5, 0.7, -0.4])
    level = normal @ [distance, 0.4, 0.1] + 0.2
    cases = [
        (cell, np.zeros(3), EYE) for cell in (whole, whole + [(normal, level)], whole + [(-normal, -level)])
    ]
    one, *parts = log_mass(*batch(cases))
    assert abs(one - torch.stack(parts).logsumexp(0)) < 1e-10


def test_shapes_of_scale_tril_chunks_and_flat_pairs_agree(monkeypatch):
    cells = Polytopes.cat(
        [
            polytopes([cell])
            for cell in (box((0.0, 1.0), (0.0, INF), (-1.0, 1.0)), cone(5, 0.6), [(EYE[1], 0.3)])
        ]
    )
    loc = torch.randn(2, 2, 3, 3)
    scale = torch.linalg.cholesky(torch.eye(3) + torch.rand(3, 1, 1))
    shared = moments(cells, loc, scale)
    assert shared.log_mass.shape == (2, 2, 3) and shared.covariance.shape == (2, 2, 3, 3, 3)
    batched = moments(cells, loc, scale.expand(2, 2, 3, 3, 3))
    index = torch.arange(3).repeat(4)
    monkeypatch.setattr(polytope, "_CHUNK", 5)
    flat = moments(cells[index], loc.reshape(-1, 3), scale[index])
    for a, b, c in zip(shared, batched, flat, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(a.reshape(c.shape), c, rtol=1e-12, atol=1e-13)
    assert moments(cells, loc[:0], scale).mean.shape == (0, 2, 3, 3)
    torch.testing.assert_close(log_mass(cells, loc, scale), shared.log_mass)
    bound = log_mass_bound(cells, loc, scale)
    assert bound.shape == (2, 2, 3) and (bound >= shared.log_mass).all()
    torch.testing.assert_close(
        log_mass_bound(cells[index], loc.reshape(-1, 3), scale[index]), bound.flatten()
    )


def test_bound_is_a_bound_and_the_distance():
    arguments = batch(list(random_polytopes(40, seed=2)))
    assert (log_mass_bound(*arguments) > log_mass(*arguments)).all()
    cells = polytopes(
        [affine_image(box((0, 1), (0, 1), (0, 1)), EYE, shift) for shift in ((1, 2, 2), (3, 4, -0.5))]
    )
    bound = log_mass_bound(cells, torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3))
    torch.testing.assert_close(bound, torch.tensor([-4.5, -12.5]))


@pytest.mark.parametrize("distance", [1e3, 1e5, 1e8])
def test_astronomically_far_means(distance):
    """Finite, and close to the bound, however far the cell is."""
    cells = polytopes([box(*sides) for sides in SIDES.values()] + [cone(4, 0.5)])
    scale = torch.tensor(np.linalg.cholesky([[1.0, 0.3, 0.1], [0.3, 0.6, -0.2], [0.1, -0.2, 0.4]]))
    for direction in torch.tensor([[1.0, 0.0, 0.0], [-0.6, 0.8, 0.0], [0.28, -0.5, -0.8]]):
        far = (distance * direction).expand(len(cells), 3)
        scales = scale.expand(len(cells), 3, 3)
        result, bound = moments(cells, far, scales), log_mass_bound(cells, far, scales)
        assert all(torch.isfinite(field).all() for field in result)
        missing = bound - result.log_mass
        assert (missing > -1e-14 * bound.abs() - 1e-9).all()
        assert (missing < 60 + 12 * math.log(distance) + 1e-14 * bound.abs()).all()


def test_slices_compiled_and_in_tensors_agree(monkeypatch):
    """The masses of slices come from compiled loops or from tensors; the polytopes' integrals do not tell."""
    pytest.importorskip("numba")
    arguments = batch(list(random_polytopes(20, seed=4)))
    results = []
    for installed in (True, False):
        monkeypatch.setattr(compiled, "_INSTALLED", installed)
        results.append(moments(*arguments))
    fast, slow = results
    torch.testing.assert_close(fast.log_mass, slow.log_mass, rtol=1e-12, atol=1e-9)
    deviation = slow.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((fast.mean - slow.mean).abs() < 1e-8 * deviation + 1e-14 * slow.mean.abs()).all()
    torch.testing.assert_close(fast.covariance, slow.covariance, rtol=1e-6, atol=1e-10)


def test_default_dtype_does_not_matter():
    arguments = batch([(box((0.5, INF), (0.0, 1.0), (-INF, INF)), np.zeros(3), EYE)])
    expected = moments(*arguments)
    torch.set_default_dtype(torch.float32)
    for a, b in zip(moments(*arguments), expected, strict=True):
        assert a.dtype == torch.float64 and torch.equal(a, b)
