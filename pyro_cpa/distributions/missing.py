# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Gaussian noise when entries of x are missing (NaN): the observed block, and what it says of the rest."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MissingGivenObserved", "log_likelihood", "missing_given_observed", "observed_tril"]


class MissingGivenObserved(NamedTuple):
    """Given z and the observed entries, x = known + gain g(z) + noise of covariance ``left``.

    Attributes:
        known: (N, D) the observed entries; for missing ones, what the noise correlation carries over.
        gain: (N, D, D) response to the decoder's output g(z); zero rows for observed entries.
        left: (N, D, D) remaining covariance; zero rows and columns for observed entries.
    """

    known: Tensor
    gain: Tensor
    left: Tensor


def observed_tril(covariance: Tensor, missing: Tensor) -> Tensor:
    """(N, D, D) Cholesky factors of the observed block of ``covariance`` (D, D), one per row of ``missing`` (N, D).

    A missing coordinate gets unit variance and no correlation, so that the factor whitens the observed ones alone.
    """
    observed = (~missing).to(covariance.dtype)
    both = observed[:, :, None] * observed[:, None, :]
    return torch.linalg.cholesky(covariance * both + torch.diag_embed(1 - observed))


def missing_given_observed(covariance: Tensor, x: Tensor) -> MissingGivenObserved:
    """Regression of the missing entries of x (N, D) on the observed ones under noise of ``covariance`` (D, D)."""
    missing = x.isnan()
    absent = torch.diag_embed(missing.to(x.dtype))
    observed = torch.diag_embed((~missing).to(x.dtype))
    cross = observed @ covariance @ absent
    regression = torch.cholesky_solve(cross, observed_tril(covariance, missing)).mT
    known = torch.where(missing, 0.0, x)
    known = known + (regression @ known[..., None])[..., 0]
    return MissingGivenObserved(known, absent - regression, absent @ covariance @ absent - regression @ cross)


def log_likelihood(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """log N(x; mean, Sx) of the observed entries of x (N, D): (N,); scale (D,), or a Cholesky factor (D, D)."""
    missing = x.isnan()
    difference = torch.where(missing, 0.0, x - mean)
    if scale.dim() == 1:
        white = difference / scale
        log_scale = torch.where(missing, 0.0, scale.log()).sum(-1)
    else:
        tril = observed_tril(scale @ scale.mT, missing) if bool(missing.any()) else scale
        white = torch.linalg.solve_triangular(tril, difference[..., None], upper=False)[..., 0]
        log_scale = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = 0.5 * math.log(2 * math.pi) * (~missing).sum(-1)
    return -0.5 * white.square().sum(-1) - log_scale - constant
