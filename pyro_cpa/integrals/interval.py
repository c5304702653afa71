# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Integrals over intervals of the line."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_cpa.integrals.dispatch import Moments, log_mass, log_mass_bound, moments, sample
from pyro_cpa.integrals.normal import truncated_moments, truncated_quantile
from pyro_cpa.partition.cells import Intervals

__all__: list[str] = []


class _Whitened(NamedTuple):
    """Intervals in standard deviations from the mean, mirrored so that their middle is not negative."""

    near: Tensor  # end nearest the mean
    width: Tensor
    step: Tensor  # signed standard deviation: what one unit away from the mean is on the line
    anchor: Tensor  # point of the interval nearest the mean, on the line


def _whiten(cells: Intervals, loc: Tensor, scale_tril: Tensor) -> _Whitened:
    mean, deviation = loc[..., 0], scale_tril[..., 0, 0]
    lower = (cells.lower - mean) / deviation
    upper = (cells.upper - mean) / deviation
    mirrored = lower + upper < 0.0
    near = torch.where(mirrored, -upper, lower)
    # The width of the interval itself: the difference of its whitened ends would lose a narrow one's digits.
    width = ((cells.upper - cells.lower) / deviation).expand_as(near)
    end = torch.where(mirrored, cells.upper, cells.lower)
    anchor = torch.where(near > 0.0, end, mean)
    return _Whitened(near, width, torch.where(mirrored, -deviation, deviation), anchor)


@log_mass.register
@torch.no_grad()
def _log_mass(cells: Intervals, loc: Tensor, scale_tril: Tensor) -> Tensor:
    interval = _whiten(cells, loc, scale_tril)
    return truncated_moments(interval.near, interval.width)[0]


@moments.register
@torch.no_grad()
def _moments(cells: Intervals, loc: Tensor, scale_tril: Tensor) -> Moments:
    near, width, step, anchor = _whiten(cells, loc, scale_tril)
    log_masses, offset, variance = truncated_moments(near, width)
    mean = anchor + step * offset
    return Moments(log_masses, mean.unsqueeze(-1), (step * step * variance)[..., None, None])


@log_mass_bound.register
@torch.no_grad()
def _log_mass_bound(cells: Intervals, loc: Tensor, scale_tril: Tensor) -> Tensor:
    distance = _whiten(cells, loc, scale_tril).near.clamp(min=0.0)
    return -0.5 * distance * distance


@sample.register
@torch.no_grad()
def _sample(cells: Intervals, loc: Tensor, scale_tril: Tensor, sample_shape: tuple[int, ...] = ()) -> Tensor:
    near, width, step, anchor = _whiten(cells, loc, scale_tril)
    shape = (*sample_shape, *near.shape)
    level = torch.rand(shape, dtype=near.dtype, device=near.device)
    offset = truncated_quantile(near.expand(shape), width.expand(shape), level)
    draws = anchor + step * offset
    return torch.minimum(torch.maximum(draws, cells.lower), cells.upper).unsqueeze(-1)
