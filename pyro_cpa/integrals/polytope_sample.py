# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
r"""Exact draws from a Gaussian truncated to a three-dimensional polytope: a panel, a slice of it, a point of the slice.

The panel is drawn by its mass. Along it the log of the integrand is concave, so that between two nodes of the
quadrature it lies below the lines through the next two nodes on either side. The slice is drawn from the
piecewise exponential law under these lines and accepted with the ratio of the two; the point of the slice is
a draw from a polygon.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyro_cpa.integrals.polytope_frame import Frame
from pyro_cpa.integrals.polytope_panels import Panels, integrate, per_pair
from pyro_cpa.integrals.polytope_slices import slice_log_mass, slice_sample

__all__ = ["draw_points"]

_AT_ONCE = 2**16  # draws worked on at a time
_FLAT = 1e-9  # a law that changes by a smaller factor is uniform to rounding


def draw_points(frame: Frame, count: int) -> Tensor:
    """``count`` draws from each of P cells: (count, P, 3)."""
    panels = integrate(frame, slice_log_mass)
    order = torch.argsort(panels.pair, stable=True)
    panels = Panels(*(field[order] for field in panels))
    hats = _hats(panels)
    P = len(frame.t0)
    total = per_pair(panels.pair, panels.log_mass, P)
    # A cell without interior leaves nothing to draw: its reference point.
    drawn = torch.isfinite(total).nonzero()[:, 0]
    share = torch.where(hats.usable, (panels.log_mass - total[panels.pair]).exp(), 0.0)
    result = frame.origin.expand(count, -1, -1).clone()
    rows = max(1, _AT_ONCE // max(1, len(drawn)))
    for start in range(0, count if len(drawn) else 0, rows):
        part = result[start : start + rows]
        pair = drawn.repeat(len(part))
        tau = _along(frame, panels, hats, _choose(panels.pair, share, pair))
        point = torch.cat([tau[:, None], slice_sample(frame, pair, tau)], dim=1)
        moved = (frame.image[pair] @ point[..., None])[..., 0]
        part[:, drawn] += moved.view(len(part), len(drawn), -1)
    return result


def _choose(pair: Tensor, share: Tensor, wanted: Tensor) -> Tensor:
    """A panel of each wanted pair (D,), in proportion to its share."""
    running = share.cumsum(0)
    size = torch.bincount(pair, minlength=int(wanted.max()) + 1)
    stop = size.cumsum(0)[wanted]
    start = stop - size[wanted]
    before = torch.where(start > 0, running[start - 1], 0.0)
    level = before + (running[stop - 1] - before) * torch.rand_like(before)
    chosen = torch.searchsorted(running, level, right=True)
    return torch.minimum(torch.maximum(chosen, start), stop - 1)


class _Hats(NamedTuple):
    """Exponential laws above the integrand of Q panels, on the S pieces between their ends and nodes."""

    left: Tensor  # (Q, S) left ends of the pieces
    width: Tensor  # (Q, S)
    height: Tensor  # (Q, S) log of the law at the left end
    slope: Tensor  # (Q, S)
    running: Tensor  # (Q, S) cumulative shares
    usable: Tensor  # (Q,) whether enough nodes lie in the cell


def _hats(panels: Panels) -> _Hats:
    x, y = panels.tau(), panels.log_density
    # chord k runs through the nodes k and k + 1
    slope = y.diff(dim=1) / x.diff(dim=1)
    knots = torch.cat(
        [(panels.middle - panels.half)[:, None], x, (panels.middle + panels.half)[:, None]], dim=1
    )
    left, width = knots[:, :-1], knots.diff(dim=1)
    # Piece k, to the left of node k, lies under the chord to its right (k) and the one to its left (k - 2).
    none = torch.nan
    right_slope, right_height = pad(slope, (0, 2), value=none), pad(y[:, :-1], (0, 2), value=none)
    right_height = right_height + right_slope * (left - pad(x[:, :-1], (0, 2), value=none))
    left_slope, left_height = pad(slope, (2, 0), value=none), pad(y[:, :-1], (2, 0), value=none)
    left_height = left_height + left_slope * (left - pad(x[:, :-1], (2, 0), value=none))
    areas = []
    for height, rate in ((right_height, right_slope), (left_height, left_slope)):
        area = height + _log_mean_exp(rate * width) + width.log()
        areas.append(torch.where(torch.isfinite(rate) & ~area.isnan(), area, torch.inf))
    from_left = areas[1] < areas[0]
    area = torch.minimum(*areas)
    # Beyond a node outside of the cell there is nothing to draw.
    outside = torch.isinf(y)
    beyond = pad(outside, (1, 0), value=False) & pad(outside, (0, 1), value=False)
    beyond[:, 0], beyond[:, -1] = outside[:, 0], outside[:, -1]
    area = torch.where(beyond, -torch.inf, area)
    usable = ~(area == torch.inf).any(1) & torch.isfinite(area).any(1)
    share = torch.where(usable[:, None], area, 0.0).softmax(1)
    return _Hats(
        left=left,
        width=width,
        height=torch.where(from_left, left_height, right_height),
        slope=torch.where(from_left, left_slope, right_slope),
        running=share.cumsum(1),
        usable=usable,
    )


def _log_mean_exp(rise: Tensor) -> Tensor:
    """log of the mean of exp(rise x) over x in (0, 1)."""
    size = rise.abs()
    steep = size > _FLAT
    mean = torch.log(-torch.expm1(-size) / torch.where(steep, size, 1.0))
    return torch.where(steep, mean, 0.0) + rise.clamp(min=0.0)


def _along(frame: Frame, panels: Panels, hats: _Hats, chosen: Tensor) -> Tensor:
    """Positions (D,) along the chosen panels."""
    result = torch.empty_like(panels.middle[chosen])
    pending = torch.arange(len(chosen), device=chosen.device)
    while len(pending):
        panel = chosen[pending]
        one, two, three = torch.rand(3, len(pending), dtype=result.dtype, device=result.device)
        running = hats.running[panel]
        piece = torch.searchsorted(running, (one * running[:, -1])[:, None], right=True)
        piece = piece.clamp(max=running.shape[1] - 1)
        left, width, height, slope = (
            field[panel].gather(1, piece)[:, 0] for field in (hats.left, hats.width, hats.height, hats.slope)
        )
        # From the higher end of the exponential law downwards.
        fall = slope.abs() * width
        step = -torch.log1p(two * torch.expm1(-fall)) / torch.where(fall > _FLAT, fall, 1.0)
        step = torch.where(fall > _FLAT, step, two)
        tau = left + width * torch.where(slope > 0, 1 - step, step)
        pair = panels.pair[panel]
        log_density = slice_log_mass(frame, pair, tau)[0] - tau * (frame.t0[pair] + 0.5 * tau)
        accepted = three.log() <= log_density - height - slope * (tau - left)
        result[pending[accepted]] = tau[accepted]
        pending = pending[~accepted]
    return result
