# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Reads a user's table of numbers, and says where it is not one."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InvalidData

__all__ = ["MISSING", "read_table"]

MISSING = ("", "na", "n/a", "nan")
"""Cells, in small letters, that stand for a missing value."""


def read_table(path: str | Path) -> tuple[Tensor, list[str]]:
    """Read a text file of numbers separated by commas, semicolons or tabs.

    The first line is a header if any of its cells is neither a number nor missing. Blank lines are skipped.

    Args:
        path: of the file.

    Returns:
        (N, D) float64 values, NaN where missing, and the D names of the columns (``column 1``, ... without
        header).

    Raises:
        InvalidData: the file cannot be read, has no rows, or a cell is not a finite number; row (line of the
            file) and column are named.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "table.csv")
        ...     _ = path.write_text("height,weight\\n1.7,65\\n1.8,NA\\n")
        ...     values, names = read_table(path)
        >>> names, values.tolist()
        (['height', 'weight'], [[1.7, 65.0], [1.8, nan]])
    """
    lines = _lines(Path(path))
    if not lines:
        raise InvalidData(f"{path} is empty: expected rows of numbers separated by commas")
    row, first = lines[0]
    has_header = any(_is_word(cell) for cell in first)
    names = [cell.strip() or f"column {j + 1}" for j, cell in enumerate(first)]
    if has_header:
        lines = lines[1:]
    else:
        names = [f"column {j + 1}" for j in range(len(first))]
    if not lines:
        raise InvalidData(f"{path} has a header but no rows: expected rows of numbers below it")
    values = [_values(path, row, cells, names) for row, cells in lines]
    return torch.tensor(values, dtype=torch.float64), names


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """Line number and cells of every line that is not blank."""
    try:
        # utf-8-sig also reads the mark that spreadsheets put first.
        with path.open(newline="", encoding="utf-8-sig") as file:
            start = file.read(4096)
            separator = max(",;\t", key=start.partition("\n")[0].count)
            file.seek(0)
            reader = csv.reader(file, delimiter=separator)
            return [(reader.line_num, cells) for cells in reader if any(c.strip() for c in cells)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidData(f"{path} cannot be read as a table: {reason}") from None


def _is_word(cell: str) -> bool:
    if cell.strip().lower() in MISSING:
        return False
    try:
        float(cell)
    except ValueError:
        return True
    return False


def _values(path: str | Path, row: int, cells: list[str], names: list[str]) -> list[float]:
    if len(cells) != len(names):
        raise InvalidData(
            f"{path}, row {row} has {len(cells)} cells: expected {len(names)}, as in the first row"
        )
    return [_number(path, row, name, cell) for name, cell in zip(names, cells, strict=True)]


def _number(path: str | Path, row: int, name: str, cell: str) -> float:
    if cell.strip().lower() in MISSING:
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        value = math.inf
    if math.isinf(value):
        raise InvalidData(
            f"{path}, row {row}, column '{name}': '{cell.strip()}' is not a finite number "
            "(a missing value is an empty cell, NA or nan)"
        )
    return value
