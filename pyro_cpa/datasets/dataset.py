# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What a data set is, and what is done to its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pyro_cpa.errors import InvalidData

__all__ = [
    "Dataset",
    "binarize",
    "dequantize",
    "minibatches",
    "row_sequences",
    "split_rows",
]


@dataclass(frozen=True)
class Dataset:
    """Rows to train on, rows to test on, and labels and validation rows where there are any.

    Args:
        x_train: (N, D).
        x_test: (M, D).
        y_train: (N,) int64 or None.
        y_test: (M,) int64 or None.
        x_valid: (V, D) or None.
        image_shape: (rows, columns) if a datum is an image.
    """

    x_train: Tensor
    x_test: Tensor
    y_train: Tensor | None = None
    y_test: Tensor | None = None
    x_valid: Tensor | None = None
    image_shape: tuple[int, int] | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Dataset:
        """The data set with ``function`` applied to each block of rows, for example :func:`binarize`."""
        valid = None if self.x_valid is None else function(self.x_valid)
        return replace(self, x_train=function(self.x_train), x_test=function(self.x_test), x_valid=valid)


def binarize(x: Tensor, *, seed: int = 0, epoch: int = 0, threshold: float | None = None) -> Tensor:
    """Zeros and ones for intensities in [0, 1]: one Bernoulli draw of each entry, or a threshold.

    Args:
        x: Intensities, any shape.
        seed: Fixes the draw; torch's own random state is neither used nor changed.
        epoch: Another draw for another epoch. Leave it at 0 for data binarised once and for all.
        threshold: If given, entries above it become 1 and nothing is drawn.

    Raises:
        InvalidData: If an intensity lies outside [0, 1].

    Example:
        >>> x = torch.full((2, 3), 0.5)
        >>> torch.equal(binarize(x, seed=1), binarize(x, seed=1))
        True
    """
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise InvalidData("x has entries outside [0, 1]; expected intensities. Rescale, for example x / 255.")
    if threshold is not None:
        return (x > threshold).to(x.dtype)
    uniform = torch.rand(x.shape, generator=_generator(seed, epoch), dtype=torch.float64)
    return (uniform.to(x.device) < x).to(x.dtype)


def dequantize(x: Tensor, *, seed: int = 0) -> Tensor:
    """(255 x + u) / 256 with u uniform: pixels of 256 grey values spread over [0, 1], as continuous data.

    Args:
        x: Multiples of 1/255 in [0, 1].
        seed: Fixes u; torch's own random state is neither used nor changed.
    """
    uniform = torch.rand(x.shape, generator=_generator(seed, 0), dtype=x.dtype).to(x.device)
    return (255 * x + uniform) / 256


def row_sequences(x: Tensor, image_shape: tuple[int, int] = (28, 28)) -> Tensor:
    """(N, rows, columns) sequences: images (N, D) read row by row, as a recurrent model takes them.

    Raises:
        InvalidData: If D is not rows times columns.
    """
    if x.dim() != 2 or x.shape[1] != image_shape[0] * image_shape[1]:
        raise InvalidData(
            f"x is {tuple(x.shape)}; expected (N, {image_shape[0] * image_shape[1]}) for images of "
            f"{image_shape[0]} x {image_shape[1]} pixels. Give the images' own image_shape."
        )
    return x.reshape(len(x), *image_shape)


def minibatches(
    *tensors: Tensor | None, batch_size: int = 100, seed: int = 0, epoch: int = 0
) -> Iterator[tuple[Tensor | None, ...]]:
    """Yields one epoch of shuffled minibatches, rows of all tensors kept together.

    Args:
        tensors: (N, ...) each; None is passed through.
        batch_size: Rows of a batch; the last may be smaller.
        seed: Fixes the order; torch's own random state is neither used nor changed.
        epoch: Another order for another epoch.
    """
    rows = next(len(tensor) for tensor in tensors if tensor is not None)
    order = torch.randperm(rows, generator=_generator(seed, epoch))
    for index in order.split(batch_size):
        yield tuple(None if tensor is None else tensor[index.to(tensor.device)] for tensor in tensors)


def split_rows(rows: int, num_test: int, seed: int) -> tuple[Tensor, Tensor]:
    if not 0 <= num_test < rows:
        raise InvalidData(f"{num_test} of {rows} rows would be kept for testing; leave some to train on.")
    order = torch.randperm(rows, generator=_generator(seed, 0))
    return order[num_test:], order[:num_test]


def _generator(seed: int, epoch: int) -> torch.Generator:
    """A generator of its own for each pair, unrelated to those of other pairs."""
    state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
