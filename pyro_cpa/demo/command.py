# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The demonstration's command line."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pyro
import torch

from ..errors import CPAError, InvalidData
from ..plotting.canvas import new_figure
from .data import DemoData, digits, table
from .model import DemoModel
from .pictures import save_pictures
from .report import format_table, measure
from .training import FULL, SHORT, run_all

__all__ = ["main"]

MAX_HIDDEN, MIN_HIDDEN = 16, 4
NUMBERS_PER_PARAMETER = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demonstration.

    Args:
        arguments: of the command line; by default those of the process.

    Returns:
        Exit code: 0, or 2 where the user's data or options do not fit, after one line on standard error.
    """
    options = _parser().parse_args(arguments)
    threads = torch.get_num_threads()
    try:
        # The tensors here are small: beside another program, a second thread costs more than it brings.
        torch.set_num_threads(1)
        with pyro.get_param_store().scope():
            _demonstrate(options)
    except CPAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pyro_cpa.demo",
        description="Fit one small decoder to real data by exact EM, by exact maximum likelihood and as a "
        "VAE, and print the exact log p(x) of each.",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE.csv",
        help="fit this table instead of the digits; cells are "
        "numbers, missing ones empty, NA or nan; a header is optional",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo_output"), help="folder of the pictures (%(default)s)"
    )
    parser.add_argument(
        "--latent-dim", type=int, choices=(1, 2), default=2, help="dimension of z (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the start (%(default)s)")
    parser.add_argument(
        "--short", action="store_true", help="a few steps on a few rows, to see that it works"
    )
    return parser


def _demonstrate(options: argparse.Namespace) -> None:
    new_figure()  # a missing matplotlib shows before the fits, not after them
    L = options.latent_dim
    data = digits(options.seed) if options.data is None else table(options.data, options.seed)
    if data.train.shape[1] <= L:
        raise InvalidData(
            f"the table has {data.train.shape[1]} columns that vary and --latent-dim is {L}: expected more "
            "columns than latent dimensions. Use --latent-dim 1 or a wider table"
        )
    if options.short:
        data = data.first(100, 50)
    pyro.set_rng_seed(options.seed)
    hidden_dim = _hidden_dim(data, L)
    _introduce(data, L, hidden_dim)

    def make(name: str) -> DemoModel:
        return DemoModel(name, data.train, L, hidden_dim)

    fits = []
    for fit in run_all(make, data.train, SHORT if options.short else FULL):
        for remark in fit.remarks:
            _say(f"note ({fit.name}): {remark}")
        fits.append(fit)
    rows = [measure(fit, data.train, data.test) for fit in fits]
    print(f"\n{format_table(rows)}\n")
    _say(
        f"Evidence, ELBO and gap are nats per {data.noun}; a higher log p(x) is a better fit. The gap is "
        "log p(x) - ELBO, what the guide loses: the VAE's guide is a Gaussian; the others' is the exact "
        "posterior, which loses nothing."
    )
    best = fits[max(range(len(rows)), key=lambda i: rows[i].test)]
    print(f"\nPictures in {options.out}/")
    for name, shows in save_pictures(options.out, data, fits, best).items():
        print(f"  {name:<15} {shows}")


def _hidden_dim(data: DemoData, latent_dim: int) -> int:
    """Units of the hidden layer: ten numbers of data for each parameter, between 4 and 16."""
    N, D = data.train.shape
    affordable = (N * D // NUMBERS_PER_PARAMETER - D) // (latent_dim + 1 + D)
    return min(MAX_HIDDEN, max(MIN_HIDDEN, affordable))


def _introduce(data: DemoData, latent_dim: int, hidden_dim: int) -> None:
    print("One decoder, fitted in four ways; every log p(x) below is exact.\n")
    for name, text in {
        "data": "; ".join(data.about),
        "split": f"{len(data.train)} {data.noun}s to train on, {len(data.test)} to test on",
        "model": "z ~ N(0, I), x | z ~ N(decoder(z), sigma^2 I); sigma is learned; "
        f"ReLU decoder of widths {latent_dim}-{hidden_dim}-{data.train.shape[1]}",
        "start": "the same random weights for EM, exact ML and VAE; VAE + EM goes on from the trained VAE",
    }.items():
        print(textwrap.fill(f"{name:<6} {text}", 100, subsequent_indent=" " * 7))
    print(flush=True)


def _say(text: str) -> None:
    print(textwrap.fill(text, 100), flush=True)
