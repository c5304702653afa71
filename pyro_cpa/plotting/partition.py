# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Pictures of the cells on which a decoder is affine."""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..errors import InvalidData
from ..partition import Partition
from .canvas import Bounds, check_latent_dim, frame_latent, new_axes, square

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_partition"]

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
    shapes = partition.cells.clip_to_box(*zip(*box, strict=True))
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
