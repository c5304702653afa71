# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
r"""The Gaussian integrals of this package, one implementation per kind of cell.

Every function takes R cells, means ``loc`` of shape (..., R, L) and Cholesky factors ``scale_tril`` of shape
(R, L, L), shared by the leading batch, or (..., R, L, L). A new kind of cell registers its functions
here (``log_mass.register`` and so on) in a file of its own; ``moments_where`` only if it has a faster way.
"""

from __future__ import annotations

from functools import singledispatch
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_cpa.errors import UnsupportedModel
from pyro_cpa.partition.cells import Cells

__all__ = [
    "Moments",
    "log_mass",
    "log_mass_bound",
    "log_mass_replicates",
    "moments",
    "moments_where",
    "sample",
]


class Moments(NamedTuple):
    """Log-mass (..., R), mean (..., R, L) and covariance (..., R, L, L) of Gaussians truncated to cells."""

    log_mass: Tensor
    mean: Tensor
    covariance: Tensor


def _unsupported(cells: Cells) -> UnsupportedModel:
    return UnsupportedModel(
        f"no Gaussian integrals are known for cells of type {type(cells).__name__}; "
        "expected WholeSpace, Intervals, Polygons or Polytopes: register implementations for this type with "
        "pyro_cpa.integrals.dispatch"
    )


@singledispatch
@torch.no_grad()
def log_mass(cells: Cells, loc: Tensor, scale_tril: Tensor) -> Tensor:
    r"""Log of the mass that Gaussians put on cells.

    .. math:: \log M_r = \log \int_{\text{cell}_r} N(z;\, \mu_r,\, C_r C_r^\top)\, dz

    Args:
        cells: R cells of R^L.
        loc: (..., R, L) means :math:`\mu`, float64.
        scale_tril: (R, L, L) or (..., R, L, L) lower Cholesky factors :math:`C`, positive diagonal.

    Returns:
        (..., R) log-masses; ``-inf`` only for a cell without interior.

    Raises:
        UnsupportedModel: if no integrals are known for this kind of cell.

    Note:
        Absolute error 1e-10 from log-mass 0 down to -1e4, and as the rounding of ``loc`` and of the cells
        allows beyond; polytopes of more than three dimensions: an estimate. No gradient: differentiate by Fisher's
        identity. Temporaries stay below 256 MB.

    Example:
        >>> import torch
        >>> from pyro_cpa.partition.cells import Intervals
        >>> cells = Intervals(*torch.tensor([[-torch.inf, 0.0], [0.0, torch.inf]]).double().T)
        >>> log_mass(cells, torch.zeros(2, 1).double(), torch.ones(2, 1, 1).double()).exp()
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    raise _unsupported(cells)


@singledispatch
def log_mass_replicates(cells: Cells, loc: Tensor, scale_tril: Tensor) -> Tensor:
    r"""Independent estimates of :func:`log_mass`, whose scatter is its standard error.

    .. math:: M_r = \frac1K \sum_{k=1}^K M_{rk}

    Args:
        cells: R cells of R^L.
        loc: (..., R, L) means, float64.
        scale_tril: (R, L, L) or (..., R, L, L) lower Cholesky factors, positive diagonal.

    Returns:
        (..., R, K) logs of estimates without bias; K = 1 where the log-mass is exact. The k-th of all pairs share
        their points: an error of a sum over pairs is the scatter of its K replicates.

    Example:
        >>> import torch
        >>> from pyro_cpa.partition.cells import Intervals
        >>> cells = Intervals(torch.tensor([0.0]).double(), torch.tensor([torch.inf]).double())
        >>> log_mass_replicates(cells, torch.zeros(1, 1).double(), torch.ones(1, 1, 1).double()).exp()
        tensor([[0.5000]], dtype=torch.float64)
    """
    return log_mass(cells, loc, scale_tril)[..., None]


@singledispatch
@torch.no_grad()
def moments(cells: Cells, loc: Tensor, scale_tril: Tensor) -> Moments:
    r"""Log-mass, mean and covariance of Gaussians truncated to cells.

    .. math:: m_r = E[z \mid z \in \text{cell}_r], \qquad
              V_r = E[(z - m_r)(z - m_r)^\top \mid z \in \text{cell}_r]

    Args:
        cells: R cells of R^L.
        loc: (..., R, L) means, float64.
        scale_tril: (R, L, L) or (..., R, L, L) lower Cholesky factors, positive diagonal.

    Returns:
        :class:`Moments`, finite in every tail; a cell without interior gives its point nearest the mean.

    Raises:
        UnsupportedModel: if no integrals are known for this kind of cell.

    Note:
        Means are right to 1e-9 of the truncated law's own standard deviation (as far as the rounding of the
        result allows), covariances to a relative 1e-9; for polytopes to 1e-11 of the largest variance.

    Example:
        >>> import torch
        >>> from pyro_cpa.partition.cells import Intervals
        >>> cells = Intervals(torch.tensor([40.0]).double(), torch.tensor([torch.inf]).double())
        >>> moments(cells, torch.zeros(1, 1).double(), torch.ones(1, 1, 1).double()).mean
        tensor([[40.0250]], dtype=torch.float64)
    """
    raise _unsupported(cells)


@singledispatch
@torch.no_grad()
def moments_where(cells: Cells, loc: Tensor, scale_tril: Tensor, kept: Tensor) -> Moments:
    r"""The :func:`moments` of some pairs of Gaussian and cell only.

    Args:
        cells: R cells of R^L.
        loc: (N, R, L) means, float64.
        scale_tril: (R, L, L) or (N, R, L, L) lower Cholesky factors, positive diagonal.
        kept: (N, R) True where the integrals are wanted.

    Returns:
        :class:`Moments`; elsewhere the log-mass is ``-inf``, mean and covariance are zero.

    Example:
        >>> import torch
        >>> from pyro_cpa.partition.cells import Intervals
        >>> cells = Intervals(*torch.tensor([[-torch.inf, 0.0], [0.0, torch.inf]]).double().T)
        >>> loc, kept = torch.zeros(1, 2, 1).double(), torch.tensor([[True, False]])
        >>> moments_where(cells, loc, torch.ones(2, 1, 1).double(), kept).log_mass.exp()
        tensor([[0.5000, 0.0000]], dtype=torch.float64)
    """
    rows, regions = kept.nonzero(as_tuple=True)
    tril = scale_tril[regions] if scale_tril.dim() == 3 else scale_tril[rows, regions]
    pairs = moments(cells[regions], loc[rows, regions], tril)
    log_masses = torch.full_like(loc[..., 0], -torch.inf)
    mean, covariance = torch.zeros_like(loc), loc.new_zeros(loc.shape + loc.shape[-1:])
    log_masses[rows, regions], mean[rows, regions], covariance[rows, regions] = pairs
    return Moments(log_masses, mean, covariance)


@singledispatch
@torch.no_grad()
def log_mass_bound(cells: Cells, loc: Tensor, scale_tril: Tensor) -> Tensor:
    r"""Cheap upper bound on :func:`log_mass`, from the distance of the mean to the cell.

    .. math:: \log M_r \le -\tfrac12 \min_{z \in \text{cell}_r} (z - \mu_r)^\top S_r^{-1} (z - \mu_r)

    Args:
        cells: R cells of R^L.
        loc: (..., R, L) means, float64.
        scale_tril: (R, L, L) or (..., R, L, L) lower Cholesky factors, positive diagonal.

    Returns:
        (..., R) bounds; zero where the cell holds the mean.

    Raises:
        UnsupportedModel: if no integrals are known for this kind of cell.

    Note:
        A half-space at that distance has more mass than the cell, and less than this.

    Example:
        >>> import torch
        >>> from pyro_cpa.partition.cells import Intervals
        >>> cells = Intervals(torch.tensor([3.0]).double(), torch.tensor([4.0]).double())
        >>> log_mass_bound(cells, torch.zeros(1, 1).double(), torch.ones(1, 1, 1).double())
        tensor([-4.5000], dtype=torch.float64)
    """
    raise _unsupported(cells)


@singledispatch
@torch.no_grad()
def sample(cells: Cells, loc: Tensor, scale_tril: Tensor, sample_shape: tuple[int, ...] = ()) -> Tensor:
    r"""Exact draws from Gaussians truncated to cells, in every tail.

    .. math:: z \sim N(\mu_r, C_r C_r^\top) \quad \text{given} \quad z \in \text{cell}_r

    Args:
        cells: R cells of R^L.
        loc: (..., R, L) means, float64.
        scale_tril: (R, L, L) or (..., R, L, L) lower Cholesky factors, positive diagonal.
        sample_shape: shape of the draws per pair of mean and cell.

    Returns:
        sample_shape + (..., R, L) draws, from torch's global generator.

    Raises:
        UnsupportedModel: if no integrals are known for this kind of cell.

    Note:
        Exact up to the rounding of a float64: inverse distribution functions and rejection, never a grid.

    Example:
        >>> import torch
        >>> from pyro_cpa.partition.cells import Intervals
        >>> cells = Intervals(torch.tensor([3.0]).double(), torch.tensor([4.0]).double())
        >>> draws = sample(cells, torch.zeros(1, 1).double(), torch.ones(1, 1, 1).double(), (5,))
        >>> bool(((draws >= 3) & (draws <= 4)).all())
        True
    """
    raise _unsupported(cells)
