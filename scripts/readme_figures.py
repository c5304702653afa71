# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The README's measured figures, taken from what the benchmarks wrote.

    python scripts/readme_figures.py            # put them into README.md
    python scripts/readme_figures.py --check    # fail if README.md shows others

The benchmarks write their tables to benchmarks/results; each row of the README's names the command that did.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["insert", "table"]

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, str]


def read(name: str, **where: str) -> list[Row]:
    """Rows of a table of results whose columns have these values."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(row[key] == value for key, value in where.items())]
    if not rows:
        raise SystemExit(f"{name}.csv has no row with {where}: has the benchmark changed?")
    return rows


def worst(rows: list[Row], column: str) -> str:
    return max((row[column] for row in rows), key=float)


def figures() -> Iterator[tuple[str, str, str]]:
    """(what was measured, figure, script)."""
    cells, evidence = read("accuracy_cells"), read("accuracy_evidence")
    deepest = min((row["log M"].split(" to ")[0] for row in cells), key=float)
    lowest = min((row["log p(x)"].split(" to ")[0] for row in evidence), key=float)
    yield (
        f"largest error of the log-mass of a cell, down to log M = {deepest}",
        worst(cells, "error of log M"),
        "accuracy.py",
    )
    yield (
        f"largest error of log p(x), down to log p = {lowest}",
        worst(evidence, "largest error"),
        "accuracy.py",
    )
    for row in read("exact_throughput"):
        yield (
            f"pairs of datum and region a second, exact E-step, {row['decoder']}, {row['regions']} regions",
            row["pairs/s"] + (f", {row['ratio']} times a scipy loop" if row["ratio"] else ""),
            "exact.py",
        )
    for row in read("exact_memory")[-1:]:
        yield (
            f"memory of log p(x) and its gradient, {row['data']} data, {row['regions']} regions",
            f"{int(row['peak MiB, evidence and gradient']) - int(row['MiB before'])} MiB",
            "exact.py",
        )
    for row in read("distributed", what="E-step"):
        yield (
            f"one exact E-step on 1e9 rows, {row['model']}, {row['regions']} regions, from the time per pair",
            f"{float(row['core-hours for 1e9 rows']):.2g} core-hours; each process sends {row['kB sent']} kB",
            "distributed.py",
        )
    for row in read("local_affine", guide="local, K=1"):
        yield (
            f"`AutoLocalAffine`, 1 region, beside a VAE's own guide, 20 latents, {row['data']}: IWAE bound of 100 draws",
            f"{row['above amortised']} nats above, {row['ms for the law']} ms an image",
            "local_affine.py",
        )
    names = ("IWAE", "DReG", "TVO, K=50", "BiHM", "RWS")
    steps = {name: read("objectives", net="VAE", S="50", objective=name)[0]["CPU ratio"] for name in names}
    yield (
        "time of a VAE's step with 50 particles, over that of `Trace_ELBO` with as many",
        ", ".join(f"{name.split(',')[0]} {ratio}" for name, ratio in steps.items()),
        "objectives.py",
    )


def table() -> str:
    lines = ["| measured | | `python benchmarks/` |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {figure} | `{script}` |" for what, figure, script in figures())])


def insert(page: str) -> str:
    """The page with the table between its markers."""
    page, count = re.subn(
        r"(<!-- measured -->\n).*?(<!-- end measured -->)",
        lambda m: f"{m[1]}{table()}\n{m[2]}",
        page,
        flags=re.S,
    )
    if count != 1:
        raise SystemExit(f"README.md has {count} places for the figures: it needs one pair of markers")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail if README.md is not up to date"
    )
    check = parser.parse_args().check
    page = README.read_text()
    wanted = insert(page)
    if check and wanted != page:
        raise SystemExit(
            "README.md shows other figures than benchmarks/results: run scripts/readme_figures.py"
        )
    README.write_text(wanted)


if __name__ == "__main__":
    main()
