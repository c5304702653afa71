# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""benchmarks/RESULTS.md: what the scripts measured, beside the figures of others.

    python benchmarks/results_page.py            # writes the page
    python benchmarks/results_page.py --check    # fails if the page shows other figures

Everything on the page is from benchmarks/results and benchmarks/references.csv; nothing is typed into it.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from pathlib import Path

from results_tables import TABLES, Row, Table, number

__all__ = ["page"]

HERE = Path(__file__).parent


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def order(text: str) -> tuple[bool, float, str]:
    """Numbers by size, then words."""
    value = number(text)
    return value is None, value or 0.0, text


def markdown(heads: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return (
            "| "
            + " | ".join(cell.replace("|", "\\|").replace("*", "\\*").replace("~", "\\~") for cell in cells)
            + " |"
        )

    return [line(heads), "|" + " --- |" * len(heads), *map(line, rows)]


def orders(table: Table, rows: list[Row], theirs: dict[tuple[str, str], Row]) -> list[str]:
    """Which of two rows is ahead in the references, and whether it is here."""
    quantity, *group = table.ordered
    sign, lines = table.compared[quantity], []
    known = [
        (row, float(theirs[table.key(row), quantity]["value"]), own)
        for row in rows
        if (table.key(row), quantity) in theirs and (own := number(row[quantity])) is not None
    ]
    for (a, first, ours), (b, second, other) in itertools.permutations(known, 2):
        if all(a[c] == b[c] for c in group) and sign * (first - second) > 0:
            holds = "holds" if sign * (ours - other) > 0 else "does not hold"
            when = f" after {a[table.stage]} {table.stage}" if table.stage else ""
            lines.append(
                f"- {table.key(a)} ahead of {table.key(b)} in {quantity}: {holds}{when} "
                f"(reference {first:g} and {second:g}, here {ours:g} and {other:g})."
            )
    return ["Orders of the references:", "", *lines, ""] if lines else []


def cited(reference: Row) -> str:
    """Its value, source, and epochs of training where they are known."""
    epochs = f", {reference['epochs']} epochs" if reference["epochs"] else ""
    return f"{reference['value']} ({reference['source']}{epochs})"


def behind(table: Table, rows: list[Row], theirs: dict[tuple[str, str], Row]) -> list[str]:
    """A sentence on each figure that is behind its reference, and why."""
    lines = []
    if table.stage:
        by_stage = sorted(rows, key=lambda row: int(row[table.stage]))
        rows = list({(table.key(row), row["seed"]): row for row in by_stage}.values())
    for row in rows:
        for quantity, sign in table.compared.items():
            other, own = theirs.get((table.key(row), quantity)), number(row.get(quantity, ""))
            if other is None or own is None or sign * (own - float(other["value"])) >= 0:
                continue
            gap, error = abs(own - float(other["value"])), number(row[quantity].partition("+- ")[2])
            close = "within two standard errors" if error and gap < 2 * error else ""
            why = [part for part in (close, table.why(row, quantity, float(other["value"]))) if part]
            name = ", ".join(row[c] for c in table.columns[: 1 if table.name == "models_mnist" else 3])
            lines.append(
                f"- {name}: {quantity} is {own:g}, {gap:.2f} behind {cited(other)}, after {row['epochs']} "
                f"epochs and {row['training CPU s']} s of CPU time{': ' if why else ''}{'; '.join(why)}."
            )
    return ["Behind:", "", *(line.replace("*", "\\*") for line in lines), ""] if lines else []


def section(table: Table, references: list[Row]) -> list[str]:
    rows = [
        row | {k: f(row) for k, f in table.derived.items()}
        for row in read(HERE / "results" / f"{table.name}.csv")
    ]
    rows = [row for row in rows if table.shown(row)]
    rows.sort(key=lambda row: [order(row.get(column, "")) for column in table.columns[:4]])
    theirs = {(r["row"], r["quantity"]): r for r in references if r["table"] == table.name}
    lines = [f"## {table.title}", "", table.text, ""]
    if rows:
        quantities = [q for q in table.compared if any((table.key(row), q) in theirs for row in rows)]
        heads = [c for c in table.columns if any(row.get(c) for row in rows)]
        body = []
        for row in rows:
            found = [theirs.get((table.key(row), q)) for q in quantities]
            body.append(
                [row.get(h, "") for h in heads]
                + [cited(reference) if reference else "" for reference in found]
            )
        lines += [*markdown(heads + [f"{q}, reference" for q in quantities], body), ""]
    lines += behind(table, rows, theirs)
    if table.ordered:
        lines += orders(table, rows, theirs)
    absent = sorted({row for row, _ in theirs} - {table.key(row) for row in rows})
    if absent:
        lines += [f"No figure yet, with a reference waiting: {', '.join(absent)}.", ""]
    if not rows:
        lines += [f"Not run yet: `{table.missing}`.", ""]
    for picture in table.pictures:
        if (HERE / "results" / picture).exists():
            lines += [f"![{picture.removesuffix('.png').replace('_', ' ')}](results/{picture})", ""]
    commands = sorted({row["command"] for row in rows if row.get("command")})
    if commands:
        lines += ["```sh", *commands, "```", ""]
        made = sorted(
            {f"{row['versions']}, {row['threads']} thread(s)" for row in rows if row.get("versions")}
        )
        lines += [f"Made with {'; '.join(made)}.", ""]
    return lines


def page() -> str:
    """The text of RESULTS.md."""
    references = read(HERE / "references.csv")
    sources = ", ".join(sorted({row["source"] for row in references}))
    lines = [
        "# Results",
        "",
        "Written by `python benchmarks/results_page.py` from `results` and `references.csv`. Figures of others carry "
        f'their source: {sources}. A recollection is from memory and unverified. "+-" is a standard error over test rows, '
        "or half of a 95 % interval over runs where the script says so.",
        "",
    ]
    for table in TABLES:
        lines += section(table, references)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the page differs")
    check, path = parser.parse_args().check, HERE / "RESULTS.md"
    if not check:
        path.write_text(page())
    elif path.read_text() != page():
        raise SystemExit(
            "benchmarks/RESULTS.md differs from benchmarks/results: run benchmarks/results_page.py"
        )


if __name__ == "__main__":
    main()
