# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The tables of benchmarks/RESULTS.md: which columns of which results, and what is said of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["TABLES", "Row", "Table", "number"]

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
        why: why a row is behind in a quantity, given the row, the quantity and the reference.
        ordered: the quantity by which rows are ranked, and the columns in which ranked rows agree.
        stage: the column that tells figures of one run at different times apart; the latest answer for the run.
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
    why: Callable[[Row, str, float], str] = lambda row, quantity, reference: ""
    ordered: tuple[str, ...] = ()
    stage: str = ""
    shown: Callable[[Row], bool] = lambda row: True
    missing: str = ""


def number(text: str) -> float | None:
    """The figure that a cell begins with."""
    found = re.match(r"-?\d+(\.\d+)?", text)
    return float(found[0]) if found else None


def published_model(row: Row) -> str:
    """The model is the same wherever it starts."""
    return row["model"].partition("-from-")[0]


def elbo_without_constant(row: Row) -> str:
    """The tutorial's GMVAE leaves the uniform prior over its ten classes out of the bound."""
    elbo = number(row["ELBO, all test rows"])
    return "" if elbo is None or published_model(row) != "gmvae" else f"{elbo + math.log(10):.2f}"


def with_its_error(row: Row) -> str:
    error = row.get("s.e.")
    return f"{row['log p']} +- {error}" if error else row["log p"]


def published_net(row: Row) -> str:
    """RWS has been published with layers of independent units and with autoregressive ones (NADE)."""
    nade = row["objective"] == "RWS" and row["x"] == "autoregressive"
    return f"{row['data set']} {row['objective']}{'-NADE' if nade else ''}"


def fit_or_rows(row: Row, quantity: str, reference: float) -> str:
    """Whether the net lacks fit or training rows."""
    if quantity != "-log p":
        return "the reference is of independent Bernoulli columns" if row["x"] != "bernoulli" else ""
    test, seen = (number(row.get(name, "")) for name in ("-log p", "-log p, training rows"))
    if test is None or seen is None:
        return ""
    if seen > reference:
        return f"training rows are at {seen:g}, behind as well: it is the fit that lacks"
    return f"training rows are at {seen:g}: {test - seen:.2f} are lost from there to the test rows"


REPLICATED = 4_000_000  # updates


def share_of_updates(row: Row, quantity: str, reference: float) -> str:
    return f"{100 * int(row['updates']) / REPLICATED:.2g} % of the updates of the reference"


def labels_unseen(row: Row, quantity: str, reference: float) -> str:
    if quantity != "cluster accuracy":
        return ""
    return "no label enters the bound that is trained, and the start is random"


SPENT = ("training wall s", "training CPU s")
TABLES = (
    Table(
        "helmholtz",
        "Bidirectional Helmholtz machines on binary data",
        "Nets of the published sizes; -log p and its company in nats a row. `bernoulli` is the published "
        "model of the data layer, `exclusive` makes one categorical of columns that exclude each other, in `autoregressive` "
        'a column also depends on those before it, linearly in its log-odds; "none" is the columns without a latent: '
        "what a net has ahead of it is the latents'. The references are for the first, but for RWS with NADE layers beside "
        "the last. The test splits of ADULT and CONNECT4 were rebuilt from the raw sets and a random selection of them is "
        "measured; the order of DNA's rows, on which its split hangs, is not verified against the original.",
        (
            "data set",
            "x",
            "objective",
            "seed",
            "-log p",
            "-log p, training rows",
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
        key=published_net,
        compared={"-log p": -1, "-log p*": -1, "2 log Z": 1, "ESS of p* %": 1},
        why=fit_or_rows,
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
        "Both nets trained from the same starts with S particles: exact log p(x) of the training rows per datum, less "
        "that of the model that drew them.",
        (
            "model",
            "objective",
            "S",
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
        "latent_maps",
        "EM, exact maximum likelihood and a VAE with two latents, on digits and MNIST",
        "The same decoder from the same start, for as many CPU minutes each. Exact log p(x) of test rows in nats an image, "
        'more is better; the target of a seed is where its VAE ended. "VAE\'s CPU s to its end": what the VAE needs '
        "for where the method ended.",
        (
            "data set",
            "rows",
            "minutes",
            "method",
            "seeds",
            "log p, test",
            "best",
            "worst",
            "log p, train",
            "better than VAE",
            "reached target",
            "median wall s to target",
            "median CPU s to target",
            "VAE's CPU s to its end",
            "wall s",
            "CPU s",
        ),
        pictures=("latent_maps.png",),
        missing="python benchmarks/latent_maps.py",
    ),
    Table(
        "discrete_mnist",
        "Every objective on binarised MNIST",
        "log p of the test rows with S = 5000 in nats an image; to the best: mean difference, row by row, to the best run "
        "of the same model, S and updates; at equal CPU time: what the run had when the cheapest of those ended, by the "
        "learning curve, 100 rows with S = 100, and by costs of an update that were measured side by side "
        "(`update_costs.py`): the trainings' own seconds are of days and machines apart. The references are test values "
        "after 4 million updates of the usual binarisation; ours is a draw of its own.",
        (
            "model",
            "objective",
            "S",
            "seed",
            "log p",
            "to the best",
            "KL(q||p)",
            "test rows",
            "epochs",
            "updates",
            "CPU ms an update",
            "at equal CPU time",
            *SPENT,
        ),
        key=lambda row: f"{row['model']} {row['objective']} S={row['S']}",
        compared={"log p": 1, "KL(q||p)": -1},
        derived={"log p": with_its_error},
        why=share_of_updates,
        pictures=("discrete_mnist.png",),
        ordered=("log p", "model", "S", "updates"),
        stage="updates",
        missing="python benchmarks/discrete_mnist.py --epochs 100",
    ),
    Table(
        "models_mnist",
        "The deep models on MNIST",
        "At the sizes of their papers, in nats an image, log p on the first test rows; densities of grey values for vae and "
        "cvae. The references are the tutorial authors' best test bounds. Theirs of grey values pass through a sigmoid in "
        "float32, where the log-density of a black pixel ends at 2.7 nats; from logits, as we train, it reaches 5.2. "
        '"Saturating density" is the bound of our nets by their formula, the one to compare. gmvae-from-vae is gmvae '
        "started from a VAE and the clusters of its codes; its epochs and seconds include the VAE's.",
        (
            "model",
            "seed",
            "epochs",
            "ELBO, all test rows",
            "ELBO, all test rows, saturating density",
            "ELBO + log 10",
            "ELBO",
            "log p",
            "s.e. over rows",
            "cluster accuracy",
            "KL of a step, least / mean / most",
            "classification error",
            "test rows",
            *SPENT,
        ),
        key=published_model,
        compared={
            "ELBO, all test rows": 1,
            "ELBO, all test rows, saturating density": 1,
            "ELBO + log 10": 1,
            "cluster accuracy": 1,
        },
        why=labels_unseen,
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
