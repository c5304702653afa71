# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
r"""Exact draws from a Gaussian truncated to a polygon: a panel, a slice of it, a point of the slice.

The panel is drawn by its mass. Along a panel the log of the slices' mass is concave, so its tangent at the
panel's mean is an upper bound: the slice is drawn from that exponential law and accepted with the ratio of
the two. The point is drawn by inverting the normal distribution function on the slice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_cpa.integrals.normal import truncated_quantile
from pyro_cpa.integrals.polygon_frame import Frame
from pyro_cpa.integrals.polygon_slices import Panels, by_width, cut, integrate

__all__ = ["draw_points"]


def draw_points(frame: Frame, count: int) -> Tensor:
    """``count`` draws from each of P cells: (2, count, P)."""
    panels = cut(frame)
    mass, tau = integrate(frame, panels)[:2]
    total = mass.new_zeros(frame.t0.shape[0]).index_add_(0, panels.pair, mass)
    order = torch.argsort(panels.pair, stable=True)
    panels = Panels(*(field.index_select(0, order) for field in panels))
    mass, tau = mass[order], tau[order]

    drawn = torch.nonzero(total > 0.0).squeeze(-1)
    tau_drawn, eta_drawn = (mass.new_zeros(count, frame.t0.shape[0]) for _ in range(2))
    if drawn.shape[0] > 0:
        chosen = _choose(panels.pair, mass, total, drawn, count)
        x = _along(frame, panels, (tau / mass - panels.middle) / panels.half, chosen)
        tau_drawn[:, drawn] = (panels.middle[chosen] + panels.half[chosen] * x).view(count, drawn.shape[0])
        eta_drawn[:, drawn] = _across(frame, panels, chosen, x).view(count, drawn.shape[0])
    # A cell without interior leaves nothing to draw: its reference point.
    x = frame.zx + frame.jxt * tau_drawn + frame.jxs * eta_drawn
    return torch.stack([x, frame.zy + frame.jyt * tau_drawn + frame.jys * eta_drawn])


def _choose(pair: Tensor, mass: Tensor, total: Tensor, drawn: Tensor, count: int) -> Tensor:
    """Panels in proportion to their mass, ``count`` for each drawn pair, from the cumulative masses."""
    share = mass / total[pair]
    running = share.cumsum(0)
    size = torch.bincount(pair, minlength=total.shape[0])
    stop = size.cumsum(0)
    start = stop - size
    before = torch.cat([running.new_zeros(1), running])[start[drawn]]
    after = running[stop[drawn] - 1]
    level = before + (after - before) * torch.rand(
        count, drawn.shape[0], dtype=mass.dtype, device=mass.device
    )
    chosen = torch.searchsorted(running, level, right=True)
    return torch.minimum(torch.maximum(chosen, start[drawn]), stop[drawn] - 1).view(-1)


def _slice_log_mass(frame: Frame, panels: Panels, x: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the integrand at one position x of each panel, and its slope in x."""
    t0, s0 = frame.t0[panels.pair], frame.s0[panels.pair]
    tau = panels.middle + panels.half * x
    log_density = -tau * (t0 + 0.5 * tau)
    center = panels.center + panels.center_rate * x
    radius = panels.radius + panels.radius_rate * x
    mass = torch.zeros_like(x)
    zero = torch.zeros_like(x)
    for chosen, slices in by_width(frame, panels):
        mass[chosen] = slices(s0[chosen], center[chosen], radius[chosen], zero[chosen])[0]
    low, high = center - radius, center + radius
    change = torch.exp(-high * (s0 + 0.5 * high)) * (panels.center_rate + panels.radius_rate)
    change = change - torch.exp(-low * (s0 + 0.5 * low)) * (panels.center_rate - panels.radius_rate)
    return log_density + torch.log(mass), change / mass - panels.half * (t0 + tau)


def _along(frame: Frame, panels: Panels, mean: Tensor, chosen: Tensor) -> Tensor:
    """Positions x in (-1, 1) along the chosen panels, by rejection from the tangent at the mean."""
    peak, slope = _slice_log_mass(frame, panels, mean)
    result = torch.empty(chosen.shape[0], dtype=mean.dtype, device=mean.device)
    pending = torch.arange(chosen.shape[0], device=mean.device)
    while pending.shape[0] > 0:
        index = chosen[pending]
        rate = slope[index].abs().clamp(min=1e-9)  # flatter laws are uniform to rounding
        first, second = torch.rand(2, pending.shape[0], dtype=mean.dtype, device=mean.device)
        ascending = 1.0 + torch.log1p(first * torch.expm1(-2.0 * rate)) / rate
        x = torch.where(slope[index] < 0.0, -ascending, ascending)
        proposed = Panels(*(field[index] for field in panels))
        height = _slice_log_mass(frame, proposed, x)[0]
        accepted = torch.log(second) <= height - peak[index] - slope[index] * (x - mean[index])
        result[pending[accepted]] = x[accepted]
        pending = pending[~accepted]
    return result


def _across(frame: Frame, panels: Panels, chosen: Tensor, x: Tensor) -> Tensor:
    """Points of the slices at x."""
    s0 = frame.s0[panels.pair[chosen]]
    center = panels.center[chosen] + panels.center_rate[chosen] * x
    radius = (panels.radius[chosen] + panels.radius_rate[chosen] * x).clamp(min=0.0)
    mirror = torch.where(s0 + center < 0.0, -torch.ones_like(x), torch.ones_like(x))
    near = mirror * (s0 + center) - radius
    offset = truncated_quantile(near, 2.0 * radius, torch.rand_like(x))
    anchor = torch.where(near > 0.0, center - mirror * radius, -s0)
    return anchor + mirror * offset
