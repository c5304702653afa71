# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Integrals over intervals of the line."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_cpa.compiled import array, in_blocks, runs_compiled
from pyro_cpa.integrals.dispatch import Moments, log_mass, log_mass_bound, moments, sample
from pyro_cpa.integrals.normal import at_a_time, truncated_moments, truncated_quantile
from pyro_cpa.partition.cells import Intervals

__all__ = []

_CHUNK = 32768  # pairs per thread worked on at a time: what a processor's cache holds


class _Whitened(NamedTuple):
    """Intervals in standard deviations from the mean, mirrored so that their middle is not negative."""

    near: Tensor  # end nearest the mean
    width: Tensor
    step: Tensor  # signed standard deviation: what one unit away from the mean is on the line
    anchor: Tensor  # point of the interval nearest the mean, on the line


def _whiten(lower: Tensor, upper: Tensor, mean: Tensor, deviation: Tensor) -> _Whitened:
    left, right = (lower - mean) / deviation, (upper - mean) / deviation
    mirrored = left + right < 0.0
    near = torch.where(mirrored, -right, left)
    # The width of the interval itself: the difference of its whitened ends would lose a narrow one's digits.
    width = ((upper - lower) / deviation).expand_as(near)
    anchor = torch.where(near > 0.0, torch.where(mirrored, upper, lower), mean)
    return _Whitened(near, width, torch.where(mirrored, -deviation, deviation), anchor)


def _map_pairs(
    cells: Intervals, loc: Tensor, scale_tril: Tensor, outputs: int, compute: Callable[[_Whitened], Tensor]
) -> Tensor:
    """Applies ``compute``, (outputs, n, r) from (n, r) pairs, in chunks: (outputs, ..., R)."""
    regions = loc.shape[-2]
    mean = loc.reshape(-1, regions)
    deviation = scale_tril[..., 0, 0]
    deviation = deviation.expand(mean.shape) if deviation.dim() == 1 else deviation.expand(loc.shape[:-1])
    deviation = deviation.reshape(mean.shape)
    result = mean.new_empty(outputs, *mean.shape)
    chunk = max(1, min(at_a_time(_CHUNK, loc.device), 2**22 // max(outputs, 1)))
    columns = max(1, min(regions, chunk))
    rows = chunk // columns
    for column in range(0, regions, columns):
        part = slice(column, column + columns)
        lower, upper = cells.lower[part], cells.upper[part]
        for row in range(0, mean.shape[0], rows):
            pairs = slice(row, row + rows), part
            result[:, pairs[0], part] = compute(_whiten(lower, upper, mean[pairs], deviation[pairs]))
    return result.reshape(outputs, *loc.shape[:-1])


def _pair_moments(interval: _Whitened) -> Tensor:
    log_masses, offset, variance = truncated_moments(interval.near, interval.width)
    step = interval.step
    return torch.stack([log_masses, interval.anchor + step * offset, step * step * variance])


def _all_moments(cells: Intervals, loc: Tensor, scale_tril: Tensor) -> Tensor:
    """(3, ..., R): log-mass, mean, variance."""
    if not runs_compiled(loc):
        return _map_pairs(cells, loc, scale_tril, 3, _pair_moments)
    from pyro_cpa.integrals.interval_compiled import moments

    regions = loc.shape[-2]
    means, ends = array(loc.reshape(-1, regions)), [array(cells.lower), array(cells.upper)]
    factors = scale_tril if scale_tril.dim() == 3 else scale_tril.expand(*loc.shape, 1)
    deviation = array(factors.reshape(-1, regions))
    found = loc.new_empty(*loc.shape[:-1], 3)
    pairs = [means, found.view(-1, regions, 3).numpy()]
    if len(means) == 1:  # each pair has a cell of its own
        in_blocks(
            moments, [], [*((end, 0) for end in ends), *((part, 1) for part in (deviation, *pairs))], regions
        )
    elif len(deviation) == 1:
        in_blocks(moments, [*ends, deviation], [(part, 0) for part in pairs], means.size)
    else:
        in_blocks(moments, ends, [(part, 0) for part in (deviation, *pairs)], means.size)
    return found.movedim(-1, 0)


@log_mass.register
@torch.no_grad()
def _log_mass(cells: Intervals, loc: Tensor, scale_tril: Tensor) -> Tensor:
    return _all_moments(cells, loc, scale_tril)[0]


@moments.register
@torch.no_grad()
def _moments(cells: Intervals, loc: Tensor, scale_tril: Tensor) -> Moments:
    log_masses, mean, variance = _all_moments(cells, loc, scale_tril)
    return Moments(log_masses, mean.unsqueeze(-1), variance[..., None, None])


@log_mass_bound.register
@torch.no_grad()
def _log_mass_bound(cells: Intervals, loc: Tensor, scale_tril: Tensor) -> Tensor:
    def bound(interval: _Whitened) -> Tensor:
        return -0.5 * interval.near.clamp(min=0.0).square().unsqueeze(0)

    return _map_pairs(cells, loc, scale_tril, 1, bound)[0]


@sample.register
@torch.no_grad()
def _sample(cells: Intervals, loc: Tensor, scale_tril: Tensor, sample_shape: tuple[int, ...] = ()) -> Tensor:
    count = math.prod(sample_shape)

    def draw(interval: _Whitened) -> Tensor:
        near, width, step, anchor = (field.expand(count, *interval.near.shape) for field in interval)
        level = torch.rand(near.shape, dtype=near.dtype, device=near.device)
        return anchor + step * truncated_quantile(near, width, level)

    draws = _map_pairs(cells, loc, scale_tril, count, draw).reshape(*sample_shape, *loc.shape[:-1])
    return torch.minimum(torch.maximum(draws, cells.lower), cells.upper).unsqueeze(-1)
