# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What users hand in (data, noise, prior), checked and brought to float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvalidData

__all__ = ["TOLERANCE", "Shape", "check_data", "check_gaussian", "noise_factor", "prior_factors"]

TOLERANCE = 1e-12
"""Share of p(x) that may be left out by default, less than the rounding of a sum over the data."""
Shape = torch.Size | list[int] | tuple[int, ...]


def check_data(x: Tensor, data_dim: int) -> Tensor:
    """x (..., D) as (N, D) float64; an error says where it is not data: wrong width, or infinite entries."""
    if not isinstance(x, Tensor):
        raise InvalidData(
            f"the data is a {type(x).__name__}: expected a torch tensor (torch.as_tensor makes one)"
        )
    if x.dim() == 0 or x.shape[-1] != data_dim:
        raise InvalidData(
            f"the data has shape {tuple(x.shape)}, but the decoder's output has {data_dim} dimensions: "
            f"expected (..., {data_dim})"
        )
    flat = x.reshape(-1, data_dim).double()
    infinite = flat.isinf()
    if bool(infinite.any()):
        row, column = infinite.nonzero()[0].tolist()
        raise InvalidData(
            f"the data holds {flat[row, column].item()} in row {row}, column {column}: values must be finite, "
            "or NaN where they are missing"
        )
    return flat


def check_gaussian(loc: Tensor | None, factor: Tensor, name: str) -> None:
    """Refuse a mean that is not finite, and standard deviations or a Cholesky factor (D, D) of no density."""
    deviations = factor.diagonal() if factor.dim() == 2 else factor
    if loc is not None and not bool((loc.abs() < torch.inf).all()):
        raise InvalidData(f"the mean of {name} is {loc.detach().tolist()}: expected finite numbers")
    if not bool((deviations > 0).all() & (factor.abs() < torch.inf).all()):
        raise InvalidData(
            f"the scale of {name} is {factor.detach().tolist()}: standard deviations must be finite and > 0"
        )


def noise_factor(
    scale: Tensor | float | None, covariance_matrix: Tensor | None, D: int, like: Tensor
) -> Tensor:
    """(D,) standard deviations, or the (D, D) lower Cholesky factor of a full covariance."""
    if (scale is None) == (covariance_matrix is None):
        raise InvalidData(
            "give the noise of x given z either as scale= or as covariance_matrix=, exactly one of them"
        )
    if covariance_matrix is not None:
        return _cholesky(covariance_matrix, D, like, "covariance_matrix")
    value = torch.as_tensor(scale, dtype=like.dtype, device=like.device)
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] not in (1, D)):
        raise InvalidData(
            f"scale has shape {tuple(value.shape)}: expected a number or one per dimension, ({D},)"
        )
    check_gaussian(None, value, "the noise")
    return value.expand(D)


def prior_factors(
    loc: Tensor | None, prior_covariance: Tensor | None, L: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Prior mean (L,) and lower Cholesky factor (L, L) of the prior covariance."""
    mean = like.new_zeros(1).expand(L) if loc is None else torch.as_tensor(loc).to(like)
    if mean.shape != (L,) or not bool(mean.isfinite().all()):
        raise InvalidData(
            f"loc has shape {tuple(mean.shape)}: expected {L} finite numbers, the prior mean of z"
        )
    if prior_covariance is None:
        return mean, torch.eye(L, dtype=like.dtype, device=like.device)
    return mean, _cholesky(prior_covariance, L, like, "prior_covariance")


def _cholesky(covariance: Tensor, size: int, like: Tensor, name: str) -> Tensor:
    matrix = torch.as_tensor(covariance).to(like)
    if matrix.shape != (size, size) or not bool(matrix.isfinite().all()):
        raise InvalidData(f"{name} has shape {tuple(matrix.shape)}: expected ({size}, {size}), finite")
    if not torch.allclose(matrix, matrix.mT, rtol=1e-6):
        raise InvalidData(f"{name} is not symmetric: expected a covariance matrix")
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        raise InvalidData(
            f"{name} is not positive definite (its leading minor of order {int(info)} is not positive): "
            "expected a covariance matrix of full rank"
        )
    return factor
