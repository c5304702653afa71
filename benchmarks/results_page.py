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
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["page"]

HERE = Path(__file__).parent
Row = dict[str, str]


@dataclass(frozen=True)
class Table:
    """How one table of results is shown.

    Args:
        name: of the file in benchmarks/results, and in the references.
        title, text: what stands above it.
        key: name of a row in the references.
        columns: shown, in this order.
        compared: quantities that have references, and +1 where more is better, -1 where less is.
        derived: further columns.
        pictures: shown below.
        shown: which rows are; the others are in the file.
        missing: the command for a row that has no figure yet.
    """

    name: str
    title: str
    text: str
    columns: tuple[str, ...]
    key: Callable[[Row], str] = lambda row: ""
    compared: dict[str, int] = field(default_factory=dict)
    derived: dict[str, Callable[[Row], str]] = field(default_factory=dict)
    pictures: tuple[str, ...] = ()
    shown: Callable[[Row], bool] = lambda row: True
    missing: str = ""


def elbo_without_constant(row: Row) -> str:
    """The tutorial's GMVAE leaves the uniform prior over its ten classes out of the bound."""
    return f"{float(row['ELBO']) + math.log(10):.2f}" if row["model"] == "gmvae" else ""


SPENT = ("training wall s", "training CPU s")
TABLES = (
    Table(
        "helmholtz",
        "Bidirectional Helmholtz machines on binary data",
        "Nets of the published sizes; -log p and its company in nats a row. `bernoulli` is the published "
        "model of the data layer, `exclusive` makes one categorical of columns that exclude each other; the references "
        "are for the former. The test splits of ADULT and CONNECT4 were rebuilt from the raw sets and a random selection of "
        "them is measured; the order of DNA's rows, on which its split hangs, is not verified against the original.",
        (
            "data set",
            "x",
            "objective",
            "seed",
            "-log p",
            "-log p~*",
            "2 log Z",
            "relative s.e. of Z^2",
            "-log p*",
            "ESS of p %",
            "ESS of p* %",
            "S",
            "test rows",
            "epochs",
            "ended",
            *SPENT,
        ),
        key=lambda row: f"{row['data set']} {row['objective']}",
        compared={"-log p": -1, "-log p*": -1, "2 log Z": 1, "ESS of p* %": 1},
        missing="python benchmarks/helmholtz.py",
    ),
    Table(
        "bounds",
        "Every objective against the truth",
        "A belief net and a piecewise-affine decoder of known evidence, 10 particles, a guide led away from the best of its "
        "family: gap in nats per datum, bias and noise of the model's gradient relative to that of log p(x), and "
        "signal/noise of the guide's gradient in one step. The sweeps over particles, mismatch and nodes are in the "
        "pictures and in `results/bounds.csv`.",
        (
            "model",
            "objective",
            "S",
            "KL(q||p)",
            "gap",
            "s.e.",
            "model bias",
            "model noise",
            "signal/noise",
            "cosine",
            "steps",
            "wall s",
            "CPU s",
        ),
        pictures=("bounds_particles.png", "bounds_mismatch.png", "bounds_nodes.png"),
        missing="python benchmarks/bounds.py",
        shown=lambda row: row["sweep"] == "particles" and row["S"] == "10",
    ),
    Table(
        "bounds_training",
        "What each objective reaches where log p(x) is known",
        "Both nets trained from the same starts with 5 particles: exact log p(x) of the training rows per datum, less "
        "that of the model that drew them.",
        (
            "model",
            "objective",
            "log p(x)",
            "above the true model",
            "s.e. over seeds",
            "KL(q||p)",
            "s.e. of KL",
            "seeds",
            "steps",
            "wall s",
            "CPU s",
        ),
        missing="python benchmarks/bounds.py",
    ),
    Table(
        "toys",
        "EM, exact maximum likelihood and a VAE on circle and wave",
        "Exact -log p(x) of held-out rows per datum, less is better.",
        (
            "curve",
            "net",
            "method",
            "runs",
            "data seeds",
            "weight seeds",
            "test -log p",
            "best",
            "worst",
            "true law",
            "better than VAE",
            "reached target",
            "median wall s to target",
            "median CPU s to target",
            "wall s",
            "CPU s",
        ),
        missing="python benchmarks/toys.py",
    ),
    Table(
        "discrete_mnist",
        "Every objective on binarised MNIST",
        "log p of the test rows with S = 5000 in nats an image. The references are test values after 4 million updates "
        "of the usual binarisation; ours is a draw of its own.",
        (
            "model",
            "objective",
            "S",
            "seed",
            "log p",
            "s.e.",
            "KL(q||p)",
            "test rows",
            "epochs",
            "updates",
            "at equal CPU time",
            *SPENT,
        ),
        key=lambda row: f"{row['model']} {row['objective']} S={row['S']}",
        compared={"log p": 1, "KL(q||p)": -1},
        missing="python benchmarks/discrete_mnist.py --epochs 100",
    ),
    Table(
        "models_mnist",
        "The deep models on MNIST",
        "At the sizes of their papers, in nats an image on the first test rows; densities of grey values for vae and "
        "cvae. The references are the tutorial authors' best test bounds.",
        (
            "model",
            "seed",
            "epochs",
            "ELBO",
            "ELBO + log 10",
            "log p",
            "s.e. over rows",
            "cluster accuracy",
            "classification error",
            "test rows",
            *SPENT,
        ),
        key=lambda row: row["model"],
        compared={"ELBO": 1, "ELBO + log 10": 1, "cluster accuracy": 1},
        derived={"ELBO + log 10": elbo_without_constant},
        missing="python benchmarks/models.py --dataset mnist --all",
    ),
    Table(
        "models_fashion_mnist",
        "Every deep model on Fashion-MNIST",
        "The same nets, and those of binary layers, in nats an image on the first test rows. Where the median effective "
        "sample size is near 1, log p is a lower bound.",
        (
            "model",
            "seed",
            "epochs",
            "trained by",
            "ELBO",
            "log p",
            "s.e. over rows",
            "median ESS",
            "cluster accuracy",
            "classification error",
            "KL of a step, least / mean / most",
            "test rows",
            *SPENT,
        ),
        missing="python benchmarks/models.py --all",
    ),
    Table(
        "criticism_imputation",
        "Missing cells of real data",
        "Gaps at random in training and test rows, columns in standard deviations of the training rows; log p of the "
        "observed cells of test rows, in nats a row. The best is not always ours.",
        (
            "data",
            "missing",
            "method",
            "seeds",
            "RMSE",
            "coverage of 90 %",
            "log p(x_obs)",
            "log p(x_obs) (estimate)",
            "CPU s",
        ),
        missing="python benchmarks/criticism.py --only imputation",
    ),
    Table(
        "criticism_anomaly",
        "Anomalies among real data",
        "One digit held out, a different one for each seed; malignant among benign. Conformal threshold at 10 %.",
        (
            "data",
            "method",
            "seeds",
            "AUC",
            "AP",
            "false alarms at 10 %",
            "bound (95 %)",
            "detected at 10 %",
            "CPU s",
        ),
        missing="python benchmarks/criticism.py --only anomaly",
    ),
    Table(
        "criticism_comparison",
        "Which architecture each criterion ranks first",
        "Data from a known decoder: in how many of the seeds each architecture comes first.",
        (
            "criterion",
            "seeds",
            "L=1 affine first",
            "L=1 H=1 first",
            "L=1 H=3 (true) first",
            "L=1 H=8 first",
            "L=2 affine first",
            "L=2 H=3 first",
        ),
        missing="python benchmarks/criticism.py --only comparison",
    ),
)


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def number(text: str) -> float | None:
    found = re.match(r"-?\d+(\.\d+)?", text)
    return float(found[0]) if found else None


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
                + [f"{r['value']} ({r['source']})" if r else "" for r in found]
            )
        lines += [*markdown(heads + [f"{q}, reference" for q in quantities], body), ""]
    behind = []
    for row in rows:
        for quantity, sign in table.compared.items():
            other, own = theirs.get((table.key(row), quantity)), number(row.get(quantity, ""))
            if other and own is not None and sign * (own - float(other["value"])) < 0:
                epochs = theirs.get((table.key(row), "epochs"))
                name = ", ".join(row[c] for c in table.columns[: 1 if table.name == "models_mnist" else 3])
                behind.append(
                    f"- {name}: {quantity} is {own:g}, {abs(own - float(other['value'])):.2f} behind {other['value']} "
                    f"({other['source']}"
                    + (f", {epochs['value']} epochs" if epochs else "")
                    + f"), after {row['epochs']} epochs and {row['training CPU s']} s of CPU time."
                )
    if behind:
        lines += ["Behind:", "", *(line.replace("*", "\\*") for line in behind), ""]
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
