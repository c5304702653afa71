# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The whole space, and cells no integrals are known for."""

import pytest
import torch

from pyro_cpa.errors import CPAError
from pyro_cpa.integrals import log_mass, log_mass_bound, moments, sample
from pyro_cpa.partition.cells import Cells, WholeSpace


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_whole_space(dim):
    loc = torch.randn(7, 1, dim)
    scale_tril = torch.linalg.cholesky(torch.eye(dim) + torch.ones(dim, dim)).unsqueeze(0)
    result = moments(WholeSpace(dim), loc, scale_tril)
    assert (result.log_mass == 0.0).all() and result.log_mass.shape == (7, 1)
    assert torch.equal(result.mean, loc)
    torch.testing.assert_close(result.covariance, (torch.eye(dim) + 1).expand(7, 1, dim, dim))
    assert (log_mass(WholeSpace(dim), loc, scale_tril) == 0.0).all()
    assert (log_mass_bound(WholeSpace(dim), loc, scale_tril) == 0.0).all()
    draws = sample(WholeSpace(dim), loc, scale_tril, (4000,))
    assert draws.shape == (4000, 7, 1, dim)
    error = (draws.mean(0) - loc) / (2.0 / 4000) ** 0.5
    assert error.abs().max() < 5.0


@pytest.mark.parametrize("function", [log_mass, log_mass_bound, moments, sample])
def test_unknown_cells_are_named(function):
    class Tetrahedra(Cells):
        dim = 3

    with pytest.raises(CPAError, match="Tetrahedra.*expected WholeSpace, Intervals, Polygons or Polytopes"):
        function(Tetrahedra(), torch.zeros(1, 3), torch.eye(3).unsqueeze(0))
