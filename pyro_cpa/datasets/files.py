# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Reading the files that data come in."""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_cpa.datasets.dataset import Dataset, split_rows
from pyro_cpa.errors import InvalidData

__all__ = [
    "load_binary",
    "read_idx",
    "read_npz",
]


def load_binary(path: str | Path, *, test_fraction: float = 0.2, seed: int = 0) -> Dataset:
    """Binary data of the user.

    Args:
        path: An ``.npz`` file with arrays ``train``, ``test`` and perhaps ``valid`` (or ``x_train``, ...), or
            with one array alone; or a text file with one row a line, comma- or space-separated, the first
            line skipped if it is no row of numbers.
        test_fraction: Share of the rows kept for testing where the file has no split of its own.
        seed: Of the shuffle before that split.

    Raises:
        InvalidData: If the file is missing or unreadable, or an entry is neither 0 nor 1.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InvalidData(f"{path} is no file; expected .npz or text with one row of zeros and ones a line.")
    if path.suffix != ".npz":
        arrays = {"x": _read_text(path)}
    else:
        arrays = {key.removeprefix("x_"): value for key, value in read_npz(path).items()}
    blocks = {key: _binary(value, path) for key, value in arrays.items() if not key.startswith("y_")}
    if {"train", "test"} <= blocks.keys():
        return Dataset(blocks["train"], blocks["test"], x_valid=blocks.get("valid"))
    if len(blocks) != 1:
        raise InvalidData(f"{path} holds {sorted(arrays)}; expected train and test, or one array alone.")
    (x,) = blocks.values()
    train, test = split_rows(len(x), round(test_fraction * len(x)), seed)
    return Dataset(x[train], x[test])


def read_idx(path: str | Path) -> Tensor:
    """The array in an idx file, plain or gzipped.

    Raises:
        InvalidData: If the file is missing, truncated, or of another format.
    """
    path = Path(path)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidData(f"{path} cannot be read ({error}); get it anew.") from error
    kinds = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
    dims = content[3] if len(content) >= 4 else 0
    if len(content) < 4 + 4 * dims or content[:2] != b"\0\0" or content[2] not in kinds:
        raise InvalidData(f"{path} does not begin as an idx file does; get it anew.")
    shape = tuple(np.frombuffer(content, ">u4", dims, offset=4).tolist())
    kind = np.dtype(kinds[content[2]])
    body = content[4 + 4 * dims :]
    if len(body) != math.prod(shape) * kind.itemsize:
        raise InvalidData(
            f"{path} holds {len(body)} bytes of data; its header says {shape}. It is truncated: get it anew."
        )
    return torch.tensor(np.frombuffer(body, kind).reshape(shape).astype(kind.newbyteorder("=")))


def read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise InvalidData(f"{path} is no readable .npz file ({error}); write it with numpy.savez.") from error


def _read_text(path: Path) -> np.ndarray:
    try:
        lines = path.read_text().splitlines()
        delimiter = "," if "," in lines[-1] else None
        try:
            np.array(lines[0].split(delimiter), dtype=float)
        except ValueError:  # column names
            lines = lines[1:]
        return np.loadtxt(lines, delimiter=delimiter, ndmin=2)
    except (OSError, ValueError, IndexError) as error:
        raise InvalidData(
            f"{path} is no table of numbers ({error}); expected one row a line, comma- or space-separated."
        ) from error


def _binary(values: np.ndarray, path: Path) -> Tensor:
    wrong = np.argwhere((values != 0) & (values != 1))
    if values.ndim != 2 or len(wrong):
        what = f"shape {values.shape}"
        if values.ndim == 2:
            row, column = wrong[0]
            what = f"{values[row, column]} in row {row}, column {column} (from 0)"
        raise InvalidData(f"{path} holds {what}; expected a matrix of zeros and ones. Recode or binarise it.")
    return torch.tensor(values).to(torch.get_default_dtype())
