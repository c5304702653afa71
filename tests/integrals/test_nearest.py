# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
import torch
from scipy.optimize import minimize

from pyro_cpa.integrals import nearest_point
from pyro_cpa.partition import enumerate_regions
from pyro_cpa.partition.cells import WholeSpace


def test_polygons_against_a_constrained_optimiser():
    torch.manual_seed(0)
    decoder = torch.nn.Sequential(torch.nn.Linear(2, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    cells = enumerate_regions(decoder).cells
    R = len(cells)
    loc = 3 * torch.randn(R, 2)
    tril = torch.tril(torch.randn(R, 2, 2))
    tril.diagonal(dim1=-2, dim2=-1).abs_().add_(0.2)
    found = nearest_point(cells, loc, tril)
    for r in range(R):
        edge = torch.isfinite(cells.offsets[r])
        n, c = cells.normals[r][edge].numpy(), cells.offsets[r][edge].numpy()
        inverse = torch.linalg.inv(tril[r]).numpy()
        mean = loc[r].numpy()
        start = cells[torch.tensor([r])].interior_points()[0].numpy()
        best = minimize(
            lambda z, i=inverse, m=mean: ((i @ (z - m)) ** 2).sum(),
            start,
            method="SLSQP",
            constraints={"type": "ineq", "fun": lambda z, n=n, c=c: c - n @ z},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        ours = found[r].numpy()
        assert (n @ ours <= c + 1e-9).all()
        assert ((inverse @ (ours - mean)) ** 2).sum() <= best.fun + 1e-8 * (1 + best.fun)


def test_line_and_whole_space():
    torch.manual_seed(0)
    decoder = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    cells = enumerate_regions(decoder).cells
    loc = torch.randn(5, len(cells), 1)
    point = nearest_point(cells, loc, torch.ones(len(cells), 1, 1))[..., 0]
    assert ((point >= cells.lower) & (point <= cells.upper)).all()
    inside = (loc[..., 0] >= cells.lower) & (loc[..., 0] <= cells.upper)
    assert (point[inside] == loc[..., 0][inside]).all() and inside.any(1).all()
    loc = torch.randn(5, 1, 3)
    assert nearest_point(WholeSpace(3), loc, torch.eye(3)[None]) is loc
