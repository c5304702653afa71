# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Integrals over the whole space, the single cell of an affine decoder: nothing is truncated."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_cpa.integrals.dispatch import Moments, log_mass, log_mass_bound, moments, sample
from pyro_cpa.partition.cells import WholeSpace

__all__ = []


@log_mass.register
@log_mass_bound.register
@torch.no_grad()
def _log_mass(cells: WholeSpace, loc: Tensor, scale_tril: Tensor) -> Tensor:
    return torch.zeros_like(loc[..., 0])


@moments.register
@torch.no_grad()
def _moments(cells: WholeSpace, loc: Tensor, scale_tril: Tensor) -> Moments:
    covariance = (scale_tril @ scale_tril.mT).expand(*loc.shape, loc.shape[-1])
    return Moments(torch.zeros_like(loc[..., 0]), loc, covariance)


@sample.register
@torch.no_grad()
def _sample(cells: WholeSpace, loc: Tensor, scale_tril: Tensor, sample_shape: tuple[int, ...] = ()) -> Tensor:
    noise = torch.randn((*sample_shape, *loc.shape), dtype=loc.dtype, device=loc.device)
    return loc + (scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
