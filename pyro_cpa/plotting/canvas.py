# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Axes to draw on, and what all pictures of a latent space share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import CPAError, InvalidData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLORS",
    "LINES",
    "Bounds",
    "check_latent_dim",
    "frame_latent",
    "latent_name",
    "new_axes",
    "new_figure",
    "square",
]

Bounds = tuple[tuple[float, float], ...]
"""``(low, high)`` of each latent coordinate."""

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Okabe and Ito's colours, which most colour-blind readers tell apart."""

LINES = ("-", "--", "-.", ":")
"""Line styles that go with the colours, for paper without colour."""


def new_figure(width: float = 6.0, height: float = 4.5) -> Figure:
    """An empty figure of so many inches that no window shows.

    Raises:
        CPAError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise CPAError(
            "pictures need matplotlib, which is not installed: pip install pyro-cpa[plot]"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


def new_axes(ax: Axes | None) -> Axes:
    """``ax``, or the axes of a new figure."""
    return new_figure().add_subplot() if ax is None else ax


def check_latent_dim(latent_dim: int, what: str) -> None:
    """Refuses a latent space that no picture shows whole.

    Raises:
        InvalidData: it has more than two dimensions.
    """
    if latent_dim not in (1, 2):
        raise InvalidData(
            f"{what} has latent dimension {latent_dim}: expected 1 or 2, which a picture can show whole. "
            "plot_latent_map(means, coordinates=(0, 1)) shows two coordinates of the posterior means of any decoder."
        )


def square(bounds: Bounds | tuple[float, float], latent_dim: int) -> Bounds:
    """Bounds of each latent coordinate; one pair stands for all of them.

    Raises:
        InvalidData: not one pair, nor one for each coordinate, or a low end not below the high one.
    """
    pairs = bounds if isinstance(bounds[0], tuple | list) else (bounds,) * latent_dim
    if len(pairs) != latent_dim or any(len(p) != 2 or not p[0] < p[1] for p in pairs):
        raise InvalidData(
            f"bounds is {bounds}: expected (low, high) with low < high, or one such pair for each of the "
            f"{latent_dim} latent coordinates"
        )
    return tuple((float(low), float(high)) for low, high in pairs)


def latent_name(index: int, latent_dim: int) -> str:
    """Axis label of a latent coordinate, in units of the latent space."""
    return "latent $z$" if latent_dim == 1 else f"latent $z_{index + 1}$"


def frame_latent(ax: Axes, bounds: Bounds) -> None:
    """Limits, names and equal units of the latent plane; limits and name of the latent line."""
    ax.set(xlim=bounds[0], xlabel=latent_name(0, len(bounds)))
    if len(bounds) == 2:
        ax.set(ylim=bounds[1], ylabel=latent_name(1, 2), aspect="equal")
