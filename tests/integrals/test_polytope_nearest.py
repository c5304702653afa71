# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The nearest point of half-spaces: conditions of optimality, degenerate cases, and the mode of polytopes."""

import pytest
import torch
from decoders import mlp

from pyro_cpa.integrals import nearest_point
from pyro_cpa.integrals.polytope_nearest import nearest_in_half_spaces
from pyro_cpa.partition import enumerate_regions


def assert_optimal(normals, distances, point, active):
    """Feasible, and minus a non-negative combination of the active normals, which hold with equality."""
    excess = (normals @ point[..., None])[..., 0] - distances
    size = point.norm(dim=1) + torch.where(torch.isfinite(distances), distances, 0.0).abs().amax(1)
    assert (excess.amax(1) <= 1e-12 * size + 1e-300).all()
    for p in range(len(point)):
        held = active[p][active[p] >= 0]
        assert (excess[p, held].abs() <= 1e-11 * size[p]).all()
        matrix = normals[p, held].mT
        if len(held) == 0:
            assert (point[p] == 0).all()
            continue
        share = torch.linalg.lstsq(matrix, -point[p]).solution
        assert (matrix @ share + point[p]).norm() < 1e-9 * size[p]
        assert (share > -1e-9 * size[p]).all()


@pytest.mark.parametrize("dim", [2, 3, 4, 6])
@pytest.mark.parametrize("distance", [0.5, 10.0, 1e6])
def test_optimality_on_the_cells_of_decoders(dim, distance):
    cells = enumerate_regions(mlp(dim, 8 if dim < 5 else 6, 2)).cells
    R, F = cells.offsets.shape
    normals = cells.normals
    distances = cells.offsets - distance * (normals @ torch.randn(dim))
    point, active = nearest_in_half_spaces(normals, distances)
    assert point.shape == active.shape == (R, dim)
    assert ((point == 0).all(1)).sum() == 1
    assert_optimal(normals, distances, point, active)


def test_degenerate_half_spaces():
    unit = torch.eye(3)
    wedge = torch.nn.functional.normalize(
        torch.tensor([[-1.0, 1e-5, 0.0], [-1.0, -1e-5, 0.0], [0.0, 0.0, 1.0]]), dim=1
    )
    cases = [
        (-unit, torch.tensor([-1.0, -1.0, -1.0]), torch.ones(3)),
        # The same half-space twice, then one that contains it.
        (-unit[[0, 0, 0]], torch.tensor([-2.0, -2.0, -1.0]), torch.tensor([2.0, 0.0, 0.0])),
        # Two sides of a slab, beyond the mean; a fine wedge.
        (
            torch.stack([-unit[0], unit[0], unit[1]]),
            torch.tensor([-2.0, 2.0, 5.0]),
            torch.tensor([2.0, 0.0, 0.0]),
        ),
        (wedge, torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([(1.0 + 1e-10) ** 0.5, 0.0, -3.0])),
        (unit, torch.tensor([1.0, 2.0, torch.inf]), torch.zeros(3)),
    ]
    normals, distances, expected = (torch.stack(x) for x in zip(*cases, strict=True))
    point, _ = nearest_in_half_spaces(normals, distances)
    torch.testing.assert_close(point, expected, rtol=1e-12, atol=1e-10)
    none = nearest_in_half_spaces(torch.zeros(2, 0, 3), torch.zeros(2, 0))[0]
    assert torch.equal(none, torch.zeros(2, 3))


@pytest.mark.parametrize("dim", [3, 4])
def test_mode_of_truncated_gaussians(dim):
    """No other point of the cell, towards its corners, has a higher density."""
    cells = enumerate_regions(mlp(dim, 6, 2)).cells
    R = len(cells)
    loc = 2 * torch.randn(2, R, dim)
    tril = torch.tril(torch.randn(R, dim, dim))
    tril.diagonal(dim1=-2, dim2=-1).abs_().add_(0.3)
    mode = nearest_point(cells, loc, tril)
    assert mode.shape == loc.shape
    depth = torch.einsum("nrl,rfl->nrf", mode, cells.normals) - cells.offsets
    assert depth.amax() < 1e-11 * (1 + mode.abs().max())
    precision = torch.linalg.inv(tril @ tril.mT)
    fall = (precision @ (mode - loc)[..., None])[..., 0]
    generators = cells.points
    towards = generators[..., :-1] - generators[..., -1:] * mode[..., None, :]
    # The mode may be a corner: the way there is a rounding error then.
    size = (towards.norm(dim=-1) + mode.norm(dim=-1)[..., None]) * (1 + fall.norm(dim=-1))[..., None]
    assert ((towards * fall[..., None, :]).sum(-1) > -1e-12 * size).all()
