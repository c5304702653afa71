# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Pictures of the cells on which a decoder is affine."""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..errors import InvalidData
from ..partition import Cells, Intervals, Partition, Polygons
from .canvas import Bounds, check_latent_dim, frame_latent, new_axes, square

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["clipped_polygons", "plot_partition"]

# Turning the colour circle by the golden ratio keeps consecutive cells, often neighbours, far apart in hue.
GOLDEN = 0.6180339887498949


def plot_partition(
    partition: Partition,
    *,
    bounds: Bounds | tuple[float, float] = (-4.0, 4.0),
    values: Tensor | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""Draw the cells of a decoder, each in a colour of its own, with the walls between them.

    .. math:: \{ z : \text{decoder}(z) = A_r z + b_r \}, \qquad r = 1, \ldots, R

    Args:
        partition: of latent dimension 1 (coloured stretches of the line) or 2 (polygons).
        bounds: (low, high) of the window, or one such pair for each coordinate; cells are clipped to it.
        values: (R,) a number for each region that sets its colour, with a colour bar, such as its prior mass.
        ax: axes to draw on; new ones by default.

    Returns:
        The axes. Their title tells how many regions the window shows, and of how many.

    Raises:
        InvalidData: a latent space of more than two dimensions, wrong bounds, or not one value a region.
        CPAError: matplotlib is not installed.

    Note:
        Exact up to the screen: cells are clipped, not sampled, so slivers keep their walls.

    Example:
        >>> import torch
        >>> from pyro_cpa.partition import enumerate_regions
        >>> decoder = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 4))
        >>> plot_partition(enumerate_regions(decoder)).get_xlabel()
        'latent $z_1$'
    """
    L, R = partition.latent_dim, partition.num_regions
    check_latent_dim(L, "the partition")
    box = square(bounds, L)
    ax = new_axes(ax)
    shapes = clipped_polygons(partition.cells, box)
    shown = np.array([len(shape) > 0 for shape in shapes])
    if values is None:
        colors = np.array([colorsys.hls_to_rgb((GOLDEN * r) % 1.0, 0.88, 0.5) for r in range(R)])
    else:
        colors = _by_value(ax, values, R)
    if L == 1:
        for r in np.flatnonzero(shown):
            low, high = shapes[r][:, 0]
            ax.axvspan(low, high, facecolor=colors[r], edgecolor="none", zorder=0)
            if high < box[0][1]:
                ax.axvline(high, color="0.45", lw=0.6, zorder=0.5)
        ax.set_yticks([])
    else:
        from matplotlib.collections import PolyCollection

        polygons = [shape for shape in shapes if len(shape)]
        ax.add_collection(
            PolyCollection(polygons, facecolors=colors[shown], edgecolors="0.45", linewidths=0.4, zorder=0)
        )
    frame_latent(ax, box)
    count = int(shown.sum())
    ax.set_title(f"{R} regions" if count == R else f"{count} of {R} regions in view")
    return ax


def clipped_polygons(cells: Cells, box: Bounds) -> list[np.ndarray]:
    """Corners (K, L) of every cell within the box, counter-clockwise; (0, L) where it lies outside.

    Args:
        cells: R cells of the line or of the plane; unbounded ones are cut at the box.
        box: (low, high) of each coordinate.
    """
    if len(box) == 1:
        (low, high) = box[0]
        lowers, uppers = (
            (cells.lower.cpu().numpy(), cells.upper.cpu().numpy())
            if isinstance(cells, Intervals)
            else (np.array([-np.inf]), np.array([np.inf]))
        )
        ends = np.stack([np.maximum(lowers, low), np.minimum(uppers, high)], axis=1)[..., None]
        return [pair if pair[0, 0] < pair[1, 0] else pair[:0] for pair in ends]
    (left, right), (bottom, top) = box
    window = np.array([[left, bottom], [right, bottom], [right, top], [left, top]])
    if not isinstance(cells, Polygons):
        return [window]
    normals, offsets = cells.normals.cpu().numpy(), cells.offsets.cpu().numpy()
    edges, found = cells.is_edge.cpu().numpy(), []
    for normal, offset, real in zip(normals, offsets, edges, strict=True):
        shape = window
        for n, c in zip(normal[real], offset[real], strict=True):
            shape = _clip(shape, n, c)
        found.append(shape)
    return found


def _clip(shape: np.ndarray, normal: np.ndarray, offset: float) -> np.ndarray:
    """The part of a convex polygon (K, 2) on the side ``normal . z <= offset``."""
    if not len(shape):
        return shape
    height = shape @ normal - offset
    kept: list[np.ndarray] = []
    for i, here in enumerate(height):
        if here <= 0:
            kept.append(shape[i])
        j = (i + 1) % len(shape)
        if (here < 0 < height[j]) or (height[j] < 0 < here):
            kept.append(shape[i] + here / (here - height[j]) * (shape[j] - shape[i]))
    # A cell that touches the window in a corner or along a side shows no area.
    return np.array(kept) if len(kept) > 2 else np.empty((0, 2))


def _by_value(ax: Axes, values: Tensor, num_regions: int) -> np.ndarray:
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    if tuple(values.shape) != (num_regions,):
        raise InvalidData(
            f"values has shape {tuple(values.shape)}: expected one for each region, ({num_regions},)"
        )
    numbers = values.detach().cpu().numpy()
    scale = ScalarMappable(
        Normalize(float(numbers.min()), float(numbers.max())), matplotlib.colormaps["viridis"]
    )
    ax.figure.colorbar(scale, ax=ax, label="value of the region")
    return scale.to_rgba(numbers)[:, :3]
