# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Pictures of one datum's posterior density over the latent line or plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from ..distributions import CPAMarginal
from ..errors import InvalidData
from .canvas import COLORS, Bounds, check_latent_dim, frame_latent, new_axes, square

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["highest_density_levels", "plot_posterior"]

STEPS = 241
DRAWS = 4000


def plot_posterior(
    posterior: Distribution | CPAMarginal,
    x: Tensor | None = None,
    *,
    levels: Sequence[float] = (0.5, 0.9),
    bounds: Bounds | tuple[float, float] | None = None,
    filled: bool = True,
    color: str = COLORS[0],
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""Draw a posterior density with its credible regions of highest density.

    .. math:: C_\alpha = \{ z : p(z | x) \ge t_\alpha \}, \qquad \int_{C_\alpha} p(z | x) \, dz = \alpha

    Drawn twice on the same axes, it compares the exact posterior with a guide's Gaussian.

    Args:
        posterior: distribution of one latent vector with event shape (L,), L = 1 or 2: a ``CPAPosterior`` of
            one datum, a guide's Normal, any other with ``log_prob`` and ``sample``; or a ``CPAMarginal``,
            with ``x``.
        x: (D,) datum, where ``posterior`` is a ``CPAMarginal``.
        levels: probabilities of the credible regions, each above 0 and below 1.
        bounds: window, (low, high) or a pair for each coordinate; by default it holds
            99.6 % of 4000 draws.
        filled: shade the density and its regions; False draws outlines only.
        color: of shade and outlines.
        label: name in the axes' legend.
        ax: axes to draw on; new ones by default. Axes that show a wider window keep it.

    Returns:
        The axes.

    Raises:
        InvalidData: not one latent vector of dimension 1 or 2, levels outside (0, 1), or x missing.
        CPAError: matplotlib is not installed.

    Note:
        The density is the distribution's own, on a grid of 241 points a side. The thresholds t are quantiles
        of the density at 4000 draws: the probability of a region is right to about one percent. The random
        state is left as it was.

    References:
        Hyndman 1996, Computing and graphing highest density regions.

    Example:
        >>> normal = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 1.0), 1)
        >>> plot_posterior(normal, label="N(0, I)").get_ylabel()
        'latent $z_2$'
    """
    one = _one_posterior(posterior, x)
    if not levels or not all(0 < level < 1 for level in levels):
        raise InvalidData(f"levels is {tuple(levels)}: expected probabilities above 0 and below 1")
    L = one.event_shape[0]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        draws = one.sample((DRAWS,)).reshape(DRAWS, L)
        thresholds = highest_density_levels(one.log_prob(draws.reshape(DRAWS, *_batch(one), L)), levels)
        box = square(bounds, L) if bounds is not None else _window(draws)
        axes = [torch.linspace(low, high, STEPS, dtype=draws.dtype, device=draws.device) for low, high in box]
        grid = torch.cartesian_prod(*axes).reshape(-1, *_batch(one), L)
        log_density = one.log_prob(grid).reshape(*(STEPS,) * L).double().cpu().numpy()
    fresh = ax is None
    ax = new_axes(ax)
    drawn = box if fresh or not ax.has_data() or bounds is not None else _wider(ax, box)
    points = [axis.cpu().numpy() for axis in axes]
    if L == 1:
        _draw_line(ax, points[0], np.exp(log_density), np.exp(thresholds), levels, filled, color, label)
    else:
        _draw_plane(ax, points, log_density, thresholds, filled, color, label)
    frame_latent(ax, drawn)
    return ax


def highest_density_levels(log_density: Tensor, levels: Sequence[float]) -> np.ndarray:
    """Log-density at the border of each credible region, from the log-density at draws (S,)."""
    quantiles = np.quantile(log_density.double().cpu().numpy(), [1 - level for level in levels])
    return np.asarray(quantiles)


def _one_posterior(posterior: Distribution | CPAMarginal, x: Tensor | None) -> Distribution:
    if isinstance(posterior, CPAMarginal):
        if x is None:
            raise InvalidData("a CPAMarginal has a posterior for each datum: give the datum, x=")
        posterior = posterior.posterior(x.reshape(-1, x.shape[-1]))
    shape = tuple(posterior.batch_shape)
    if posterior.batch_shape.numel() != 1 or len(posterior.event_shape) != 1:
        raise InvalidData(
            f"the posterior has batch shape {shape} and event shape {tuple(posterior.event_shape)}: expected "
            "one latent vector, batch shape () or (1,) and event shape (L,). Give one datum, x[n:n+1]"
        )
    check_latent_dim(posterior.event_shape[0], "the posterior")
    return posterior


def _batch(one: Distribution) -> tuple[int, ...]:
    return tuple(one.batch_shape)


def _window(draws: Tensor) -> Bounds:
    """Bounds that hold nearly all draws, with a margin; the same extent in every coordinate."""
    ends = torch.tensor([0.002, 0.998], dtype=torch.float64, device=draws.device)
    low, high = draws.double().quantile(ends, dim=0)
    half = 0.6 * float((high - low).max())
    return tuple((float(m) - half, float(m) + half) for m in (low + high) / 2)


def _wider(ax: Axes, box: Bounds) -> Bounds:
    """The smallest window, as wide as high, that holds the axes' own and ``box``."""
    limits = (ax.get_xlim(), ax.get_ylim())
    both = [(min(a, low), max(b, high)) for (a, b), (low, high) in zip(limits, box, strict=False)]
    half = max(high - low for low, high in both) / 2
    return tuple(((low + high) / 2 - half, (low + high) / 2 + half) for low, high in both)


def _draw_line(
    ax: Axes,
    z: np.ndarray,
    density: np.ndarray,
    thresholds: np.ndarray,
    levels: Sequence[float],
    filled: bool,
    color: str,
    label: str | None,
) -> None:
    ax.plot(z, density, color=color, lw=1.6, ls="-" if filled else "--", label=label)
    for threshold, level in zip(thresholds, levels, strict=True) if filled else ():
        ax.fill_between(
            z, density, where=density >= threshold, color=color, alpha=0.45 * (1 - level) + 0.12, lw=0
        )
    ax.set_ylabel("density (per unit of $z$)")
    ax.set_ylim(0, max(1.05 * density.max(), ax.get_ylim()[1] if ax.lines[1:] else 0.0))


def _draw_plane(
    ax: Axes,
    points: list[np.ndarray],
    log_density: np.ndarray,
    thresholds: np.ndarray,
    filled: bool,
    color: str,
    label: str | None,
) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.lines import Line2D

    z1, z2, ordered = points[0], points[1], np.sort(thresholds)
    if filled:
        density = np.exp(log_density - log_density.max()).T
        fade = LinearSegmentedColormap.from_list("fade", [(1, 1, 1, 0), color])
        extent = (z1[0], z1[-1], z2[0], z2[-1])
        ax.imshow(
            density, extent=extent, origin="lower", cmap=fade, alpha=0.75, interpolation="bilinear", zorder=1
        )
    styles = ["-"] if filled else ["--"]
    ax.contour(z1, z2, log_density.T, ordered, colors=[color], linewidths=1.3, linestyles=styles, zorder=2)
    # Contours and images have no entry in a legend of their own.
    if label is not None:
        ax.add_line(Line2D([], [], color=color, lw=1.3, ls=styles[0], label=label))
