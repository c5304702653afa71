# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Distance to the manifold against brute force over the latent space and against linear algebra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import nn

from pyro_cpa.criticism import manifold_distance
from pyro_cpa.distributions import CPAMarginal

D = 3


def decoder(L):
    return nn.Sequential(nn.Linear(L, 6), nn.ReLU(), nn.Linear(6, D))


def data():
    x = 2 * torch.randn(12, D)
    x[torch.rand(12, D) < 0.2] = math.nan
    x[0] = math.nan
    return x


@pytest.mark.parametrize("L", [1, 2])
@pytest.mark.parametrize("full", [False, True])
def test_nothing_is_nearer(L, full):
    """Local search from every point of a grid, in the latent space itself, finds no nearer point."""
    net, x = decoder(L), data()
    root = torch.randn(D, D)
    covariance = root @ root.T + 0.1 * torch.eye(D) if full else torch.diag(torch.tensor([0.1, 0.5, 2.0]))
    px = (
        CPAMarginal(net, covariance_matrix=covariance)
        if full
        else CPAMarginal(net, covariance.diagonal().sqrt())
    )
    distance, latent = manifold_distance(px, x)
    grid = torch.cartesian_prod(*[torch.linspace(-8, 8, 400 if L == 1 else 60)] * L).reshape(-1, L)
    for n, row in enumerate(x):
        seen = ~row.isnan()
        if not seen.any():
            assert distance[n] == 0
            continue
        precision = torch.linalg.inv(covariance[seen][:, seen])

        def objective(z, row=row, seen=seen, precision=precision):
            with torch.no_grad():
                residual = (row - net(torch.as_tensor(z)))[..., seen]
                return ((residual @ precision) * residual).sum(-1).sqrt()

        assert objective(latent[n]).item() == pytest.approx(distance[n].item(), abs=1e-9)
        start = grid[objective(grid).argmin()].numpy()
        found = optimize.minimize(lambda z: objective(z).item(), start, method="Nelder-Mead", tol=1e-10)
        assert distance[n] <= found.fun + 1e-9
        if abs(found.x).max() < 8:
            assert found.fun <= distance[n] + 0.05


@pytest.mark.parametrize("L", [1, 2, 3])
def test_affine_decoder_is_least_squares(L):
    net, x = nn.Linear(L, 5), torch.randn(6, 5)
    distance, latent = manifold_distance(CPAMarginal(net, 0.5), x)
    solution = torch.linalg.lstsq(net.weight.detach(), (x - net.bias.detach()).T)
    torch.testing.assert_close(latent, solution.solution.T, rtol=1e-9, atol=1e-9)
    expected = (x - net(solution.solution.T)).norm(dim=-1).detach() / 0.5
    torch.testing.assert_close(distance, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("L", [1, 2, 3, 4])
def test_points_of_the_manifold_have_distance_zero(L):
    net = decoder(L)
    x = net(torch.randn(50 if L < 3 else 10, L)).detach()
    assert manifold_distance(CPAMarginal(net, 0.1), x).distance.max() < 1e-6


def test_flat_pieces():
    """A decoder that ignores z over half the space, and a constant one."""
    net = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, D))
    x = torch.randn(8, D)
    distance, latent = manifold_distance(CPAMarginal(net, 1.0), x)
    torch.testing.assert_close(distance, (x - net(latent)).norm(dim=-1).detach(), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        net[2].weight.zero_()
    distance, _ = manifold_distance(CPAMarginal(net, 1.0), x)
    torch.testing.assert_close(distance, (x - net[2].bias).norm(dim=-1).detach(), rtol=1e-9, atol=1e-9)


def nearest_by_programs(px, x):
    """The least of all regions' quadratic programs, each solved by SLSQP from a point of the cell."""
    part, cells = px.partition, px.partition.cells
    normals, offsets, starts = cells.normals.numpy(), cells.offsets.numpy(), cells.interior_points().numpy()
    found = []
    for row in x.numpy():
        seen = ~np.isnan(row)
        least = np.inf
        for r in range(part.num_regions):
            A, b = part.slopes[r].numpy()[seen], part.offsets[r].numpy()[seen]
            real = np.isfinite(offsets[r])
            C, d = normals[r][real], offsets[r][real]

            def square(z, A=A, shift=b - row[seen]):
                return (A @ z + shift) @ (A @ z + shift)

            def slope(z, A=A, shift=b - row[seen]):
                return 2 * A.T @ (A @ z + shift)

            def room(z, C=C, d=d):
                return d - C @ z

            solved = optimize.minimize(
                square,
                starts[r],
                jac=slope,
                constraints={"type": "ineq", "fun": room, "jac": lambda z, C=C: -C},
                method="SLSQP",
                options={"ftol": 1e-14, "maxiter": 200},
            )
            if (C @ solved.x <= d + 1e-9).all():
                least = min(least, solved.fun)
        found.append(math.sqrt(max(least, 0.0)))
    return torch.tensor(found)


@pytest.mark.parametrize(("L", "units"), [(3, 5), (4, 5)])
@pytest.mark.parametrize("flat", [False, True])
def test_polytopes_against_quadratic_programs(L, units, flat):
    """Also with decoders of fewer outputs than latents, of which every piece is flat in some direction."""
    outputs = 2 if flat else 6
    net = nn.Sequential(nn.Linear(L, units), nn.ReLU(), nn.Linear(units, outputs))
    x = 3 * torch.randn(4, outputs)
    x[1, 0] = math.nan
    px = CPAMarginal(net, 1.0)
    distance, latent = manifold_distance(px, x)
    torch.testing.assert_close(distance, nearest_by_programs(px, x), rtol=1e-6, atol=1e-6)
    residual = torch.where(x.isnan(), 0.0, x - net(latent).detach())
    torch.testing.assert_close(distance, residual.norm(dim=-1), rtol=1e-9, atol=1e-9)


def test_flat_polytopes():
    """Three latents of which a decoder sees two on one side of a wall, and one on the other."""
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, D))
    x = torch.randn(8, D)
    x[0] = math.nan
    px = CPAMarginal(net, 1.0)
    distance, latent = manifold_distance(px, x)
    residual = torch.where(x.isnan(), 0.0, x - net(latent).detach())
    torch.testing.assert_close(distance, residual.norm(dim=-1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(distance, nearest_by_programs(px, x), rtol=1e-6, atol=1e-6)
