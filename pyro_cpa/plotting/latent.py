# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Pictures of where data lie in latent space, and of what the decoder makes of each place in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InvalidData
from ..partition import Network
from .canvas import Bounds, check_latent_dim, frame_latent, latent_name, new_axes, square

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_generated", "plot_latent_map"]

MARKERS = "osD^vPhX<>"
MAX_CLASSES = 20
GOLDEN = 0.6180339887498949


def plot_latent_map(
    means: Tensor,
    labels: Tensor | Sequence[Any] | None = None,
    *,
    label_name: str = "class",
    coordinates: tuple[int, int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Scatter the data over latent space at their posterior means, by colour and mark of their class.

    Args:
        means: (N, L) posterior means, L = 1 (data spread vertically, by class) or 2; more with ``coordinates``.
        labels: (N,) classes, at most 20 different ones, or real numbers, which get a colour bar; None for one
            colour.
        label_name: title of the legend or colour bar.
        coordinates: which two of the L latent coordinates to show, counted from 0; needed where L > 2.
        ax: axes to draw on; new ones by default. Drawn over a partition, the window stays the partition's.

    Returns:
        The axes, with the legend to their right.

    Raises:
        InvalidData: means of another shape, coordinates that they do not have, or not one label for each.
        CPAError: matplotlib is not installed.

    Example:
        >>> plot_latent_map(torch.randn(20, 2), torch.arange(20) % 3).get_legend() is not None
        True
    """
    if means.dim() != 2:
        raise InvalidData(f"means has shape {tuple(means.shape)}: expected (N, L)")
    shown = _coordinates(coordinates, means.shape[1])
    means = means[:, shown]
    N, L = means.shape
    names = np.zeros(N, dtype=int) if labels is None else np.asarray(labels)
    if names.shape != (N,):
        raise InvalidData(f"labels has shape {names.shape}: expected one for each of the {N} data, ({N},)")
    framed = ax is not None and ax.has_data()
    ax = new_axes(ax)
    z = means.detach().double().cpu().numpy()
    limits = (ax.get_xlim(), ax.get_ylim()) if framed else None
    classes = np.unique(names)
    if names.dtype.kind == "f" and len(classes) > MAX_CLASSES:
        points = ax.scatter(z[:, 0], _height(z, np.zeros(N)), c=names, s=12, cmap="viridis", lw=0, zorder=3)
        ax.figure.colorbar(points, ax=ax, label=label_name)
    else:
        _scatter_classes(ax, z, names, classes, None if labels is None else label_name)
    if limits is not None:
        ax.set_xlim(limits[0])
    if L == 1:
        ax.set(xlabel=latent_name(0, 1), yticks=[])
    else:
        frame_latent(ax, limits or tuple(_with_margin(z[:, i]) for i in range(L)))
        ax.set(xlabel=latent_name(shown[0], 2), ylabel=latent_name(shown[1], 2))
    return ax


def _coordinates(given: tuple[int, int] | None, latent_dim: int) -> list[int]:
    """The coordinates to show."""
    if given is None:
        check_latent_dim(latent_dim, "means")
        return list(range(latent_dim))
    if len(given) != 2 or given[0] == given[1] or not all(0 <= i < latent_dim for i in given):
        raise InvalidData(
            f"coordinates is {given}: expected two different numbers from 0 to {latent_dim - 1}, as the means have "
            f"{latent_dim} latent coordinates"
        )
    return list(given)


def plot_generated(
    decoder: nn.Module,
    image_shape: tuple[int, int],
    *,
    bounds: Bounds | tuple[float, float] = (-2.5, 2.5),
    steps: int = 12,
    limits: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Tile the latent plane (or line) with the images that the decoder makes at each tile's centre.

    Args:
        decoder: R^L -> R^D, L = 1 or 2, D = height times width of the image.
        image_shape: (height, width).
        bounds: window, (low, high) or a pair for each coordinate.
        steps: tiles along each coordinate.
        limits: pixel values shown as white and as black; by default those that leave out 1 % at either end.
        ax: axes to draw on; new ones by default.

    Returns:
        The axes, in latent units: the tile at z shows decoder(z).

    Raises:
        InvalidData: D is not height times width, a latent space of more than two dimensions, or wrong bounds.
        CPAError: matplotlib is not installed.

    Example:
        >>> plot_generated(nn.Linear(2, 12), (3, 4)).get_ylabel()
        'latent $z_2$'
    """
    network = Network(decoder)
    L, D = network.latent_dim, network.data_dim
    height, width = image_shape
    check_latent_dim(L, "the decoder")
    if D != height * width:
        raise InvalidData(f"image_shape is {image_shape}, {height * width} pixels: the decoder makes {D}")
    box = square(bounds, L)
    ax = new_axes(ax)
    centres = [low + (high - low) * (np.arange(steps) + 0.5) / steps for low, high in box]
    grid = torch.cartesian_prod(
        *(torch.as_tensor(c, dtype=network.dtype, device=network.device) for c in centres)
    )
    with torch.no_grad():
        images = decoder(grid.reshape(-1, L)).double().cpu().numpy()
    tiles = images.reshape(steps, steps if L == 2 else 1, height, width)
    # A pixel without colour all round keeps neighbours apart.
    tiles = np.pad(tiles, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=np.nan)
    height, width = height + 2, width + 2
    # Rows of the mosaic run down the page, the second latent coordinate up.
    mosaic = tiles[:, ::-1].transpose(1, 2, 0, 3).reshape(-1, steps * width)
    tall = box[1] if L == 2 else (0.0, (box[0][1] - box[0][0]) / steps * height / width)
    white, black = limits or np.nanquantile(mosaic, [0.01, 0.99])
    extent = (*box[0], *tall)
    ax.imshow(mosaic, extent=extent, cmap="gray_r", vmin=white, vmax=black, interpolation="nearest")
    if L == 1:
        ax.set(xlabel=latent_name(0, 1), yticks=[])
    else:
        frame_latent(ax, box)
    return ax


def _scatter_classes(
    ax: Axes, z: np.ndarray, names: np.ndarray, classes: np.ndarray, title: str | None
) -> None:
    import matplotlib

    if len(classes) > MAX_CLASSES:
        raise InvalidData(
            f"labels holds {len(classes)} different classes: expected at most {MAX_CLASSES}. "
            "Give real numbers (dtype float) for a colour bar"
        )
    colors = matplotlib.colormaps["tab10" if len(classes) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    height = _height(z, np.searchsorted(classes, names))
    for i, name in enumerate(classes):
        chosen, mark = names == name, MARKERS[i % len(MARKERS)]
        style = {"color": colors[i], "marker": mark, "edgecolors": "white", "linewidths": 0.3}
        ax.scatter(z[chosen, 0], height[chosen], s=17, zorder=3, label=f"{name}", **style)
    if title is not None:
        ax.legend(title=title, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, handletextpad=0.1)


def _height(z: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Second coordinate; for the latent line the class's row, spread so that points show side by side."""
    return z[:, 1] if z.shape[1] == 2 else row + 0.7 * (GOLDEN * np.arange(len(z)) % 1.0) - 0.35


def _with_margin(values: np.ndarray) -> tuple[float, float]:
    low, high = values.min(), values.max()
    margin = 0.05 * (high - low) or 1.0
    return float(low - margin), float(high + margin)
