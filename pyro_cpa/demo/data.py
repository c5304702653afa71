# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What the demonstration fits: handwritten digits, or the user's table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..datasets import load_digits
from ..errors import InvalidData
from .table_file import read_table

__all__ = ["DemoData", "digits", "table"]

MIN_ROWS = 20
TEST_SHARE = 0.2


@dataclass(frozen=True)
class DemoData:
    """Rows to train and to test on, in the units of the fit.

    Attributes:
        train: (N, D); NaN marks a missing cell.
        test: (M, D).
        names: of the D columns.
        noun: what a row is, for the printed text.
        about: lines on source and units.
        train_labels: (N,) classes, if rows have any; they are used in pictures only.
        image_shape: (height, width) if a row is an image.
    """

    train: Tensor
    test: Tensor
    names: Sequence[str]
    noun: str
    about: Sequence[str]
    train_labels: Tensor | None = None
    image_shape: tuple[int, int] | None = None

    def first(self, num_train: int, num_test: int) -> DemoData:
        """The same with fewer rows."""
        labels = None if self.train_labels is None else self.train_labels[:num_train]
        return replace(self, train=self.train[:num_train], test=self.test[:num_test], train_labels=labels)


def digits(seed: int) -> DemoData:
    """Scikit-learn's 1797 handwritten digits of 8 x 8 pixels, shuffled, split and dequantised by ``seed``."""
    found = load_digits(seed=seed)
    generator = torch.Generator().manual_seed(seed)

    def spread(x: Tensor) -> Tensor:
        """Grey levels 0..16 as continuous data: a pixel that never changes has no density."""
        uniform = torch.rand(x.shape, generator=generator, dtype=torch.float64)
        return (16 * x.double() + uniform) / 17

    return DemoData(
        train=spread(found.x_train),
        test=spread(found.x_test),
        names=[f"pixel {row}, {column}" for row in range(8) for column in range(8)],
        noun="image",
        about=[
            "scikit-learn's handwritten digits, 8 x 8 pixels of 17 grey levels",
            "each level spread uniformly over its 1/17 of [0, 1], from white to black",
        ],
        train_labels=found.y_train,
        image_shape=found.image_shape,
    )


def table(path: str | Path, seed: int) -> DemoData:
    """A user's table, standardised by the mean and deviation of its training rows.

    Raises:
        InvalidData: the file is not a table of numbers, or has fewer than 20 rows or two columns that vary.
    """
    values, names = read_table(path)
    values = values[~values.isnan().all(1)]
    if len(values) < MIN_ROWS:
        raise InvalidData(f"{path} has {len(values)} rows with data: expected at least {MIN_ROWS}")
    train, test = _split(len(values), seed)
    observed = ~values[train].isnan()
    count = observed.sum(0).clamp(min=1)
    mean = values[train].nansum(0) / count
    deviation = ((values[train] - mean).square().nansum(0) / count).sqrt()
    # Below this the spread is the rounding of equal numbers.
    varies = deviation > 1e-12 * mean.abs()
    left_out = [name for name, good in zip(names, varies.tolist(), strict=True) if not good]
    kept = [name for name, good in zip(names, varies.tolist(), strict=True) if good]
    if len(kept) < 2:
        raise InvalidData(f"{path} has {len(kept)} column(s) whose values differ: expected at least 2")
    scaled = ((values - mean) / deviation)[:, varies]
    missing = int(scaled.isnan().sum())
    about = [
        f"{path}, {len(kept)} columns",
        "every column shifted and scaled to mean 0 and standard deviation 1 in the training rows",
    ]
    if missing:
        about.append(f"{missing} of {scaled.numel()} cells are missing; they are integrated out exactly")
    if left_out:
        about.append(f"left out, because all training values are equal or missing: {', '.join(left_out)}")
    return DemoData(train=scaled[train], test=scaled[test], names=kept, noun="row", about=about)


def _split(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    cut = rows - round(TEST_SHARE * rows)
    return order[:cut], order[cut:]
