# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""How far exact inference scales, section by section.

    python benchmarks/scale.py                     # all sections
    python benchmarks/scale.py --only latents      # an E-step with 1 to 6 latents
    python benchmarks/scale.py --only integrals    # estimates over cells of 4, 6 and 8 dimensions beside brute force
    python benchmarks/scale.py --smoke             # the same in seconds

Prints one table per section and writes it to benchmarks/results/scale_SECTION.csv.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from exact import RESULTS, decoder_of
from runs import publish
from torch import Tensor

import pyro_cpa
from pyro_cpa.distributions import CPAMarginal
from pyro_cpa.distributions.expectation import region_posterior
from pyro_cpa.integrals import EstimatedPolytopes, log_mass_replicates
from pyro_cpa.partition import Partition, enumerate_regions
from pyro_cpa.partition.cells import Polytopes

# The oracle is the tests', and needs a checkout.
sys.path.append(str(Path(pyro_cpa.__file__).parents[1] / "tests" / "integrals"))

from polytope_cases import equicorrelated  # noqa: E402


def estimate(cells: Polytopes, loc: Tensor, tril: Tensor, num_points: int) -> tuple[Tensor, Tensor, float]:
    """Log-masses of the cells, their relative standard errors, and seconds."""
    start = time.perf_counter()
    found = log_mass_replicates(EstimatedPolytopes(cells, num_points), loc, tril)
    seconds = time.perf_counter() - start
    total = found.logsumexp(-1) - math.log(found.shape[-1])
    return total, (found - total[:, None]).exp().std(-1) / found.shape[-1] ** 0.5, seconds


def brute_force(partition: Partition, loc: Tensor, tril: Tensor, draws: int) -> tuple[Tensor, float]:
    """The share of draws from the Gaussian that fall into each cell, and seconds."""
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    count = torch.zeros(partition.num_regions)
    for size in [2**16] * (draws // 2**16) or [draws]:
        z = loc + torch.randn(size, len(loc), generator=generator) @ tril.mT
        count += torch.bincount(partition.locate(z), minlength=partition.num_regions)
    return count / count.sum(), time.perf_counter() - start


def corner(dim: int, shift: float) -> tuple[Polytopes, Tensor, Tensor, float]:
    """Both y > shift for the coordinates of N(0, (1 + 11')/2), and the log of that probability as a line integral."""
    decoder = torch.nn.Sequential(torch.nn.Linear(dim, dim), torch.nn.ReLU(), torch.nn.Linear(dim, dim))
    torch.nn.init.eye_(decoder[0].weight)
    torch.nn.init.constant_(decoder[0].bias, -shift)
    partition = enumerate_regions(decoder.double())
    cells = partition.cells
    beyond = partition.locate(torch.full((1, dim), shift + 1.0))
    tril = torch.linalg.cholesky((torch.eye(dim) + torch.ones(dim, dim)) / 2)
    return cells[beyond], torch.zeros(1, dim), tril[None], equicorrelated(dim, shift)


def integrals(smoke: bool) -> list[dict]:
    """Error and time of the estimates of masses, for all cells of a decoder and for corners in the tail."""
    rows = []
    num_points, draws = (64, 2**12) if smoke else (1024, 2**22)
    for L, width in ((4, 6),) if smoke else ((4, 10), (6, 9), (8, 10)):
        partition = enumerate_regions(decoder_of(L, width, L))
        R = partition.num_regions
        cells = partition.cells
        loc = torch.randn(L, generator=torch.Generator().manual_seed(1))
        for deviation in (1.0, 0.3):
            tril = deviation * torch.linalg.cholesky(torch.eye(L) + 0.3)
            log_m, error, seconds = estimate(cells, loc.expand(R, L), tril.expand(R, L, L), num_points)
            share, brute_seconds = brute_force(partition, loc, tril, draws)
            seen = share * draws > 100
            brute_error = ((1 - share) / (share * draws)).sqrt()
            score = ((log_m.exp() - share) / share)[seen] / (error**2 + brute_error**2)[seen].sqrt()
            rows.append(
                {
                    "L": L,
                    "cells": f"{R} of a decoder, {int(seen.sum())} compared",
                    "log M": f"{log_m[seen].max():.1f} to {log_m[seen].min():.1f}",
                    "median s.e.": f"{error[seen].median():.1e}",
                    "largest s.e.": f"{error[seen].max():.1e}",
                    "rms error / s.e.": f"{score.square().mean().sqrt():.2f}",
                    "ms a cell": f"{1e3 * seconds / R:.2f}",
                    "brute force s.e.": f"{brute_error[seen].median():.1e} to {brute_error[seen].max():.1e}",
                    "brute force s": f"{brute_seconds:.1f}",
                }
            )
        for shift in (0.0, 5.0, 30.0):
            *arguments, truth = corner(L, shift)
            log_m, error, seconds = estimate(*arguments, num_points)
            miss = (log_m - truth).expm1().abs()
            rows.append(
                dict.fromkeys(rows[0], "")
                | {
                    "L": L,
                    "cells": f"corner at {shift:g}",
                    "log M": f"{truth:.1f}",
                    "median s.e.": f"{error.item():.1e}",
                    "largest s.e.": f"{error.item():.1e}",
                    "rms error / s.e.": f"{(miss / error).item():.2f}",
                    "ms a cell": f"{1e3 * seconds:.2f}",
                }
            )
    return rows


def latents(smoke: bool) -> list[dict]:
    """An E-step with both moments by the number of latents, for decoders of equal width."""
    rows = []
    seconds = 0.1 if smoke else 3.0
    for L, N in ((1, 400), (2, 100), (3, 4), (4, 2), (6, 1)):
        px = CPAMarginal(decoder_of(L, 6 if smoke else 10, 10), 0.3)
        x = px.sample((N,)).detach()
        region_posterior(px.joint, x[:1])
        start, passes = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            region_posterior(px.joint, x)
            passes += 1
        spent = time.perf_counter() - start
        error = px.log_prob(x, return_error=True)[1].max().item()
        rows.append(
            {
                "latents": L,
                "regions": px.partition.num_regions,
                "data": N,
                "pairs/s": f"{passes * N * px.partition.num_regions / spent:.3g}",
                "ms a datum": f"{1e3 * spent / (passes * N):.3g}",
                "largest s.e. of log p(x)": f"{error:.1e}" if error else "exact",
            }
        )
    return rows


SECTIONS: dict[str, tuple[str, Callable[[bool], list[dict]]]] = {
    "latents": ("E-step with both moments, by the number of latents", latents),
    "integrals": ("Masses of cells beyond three dimensions: estimates beside brute force", integrals),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=list(SECTIONS), help="run one section")
    parser.add_argument(
        "--smoke", action="store_true", help="seconds instead of minutes; figures mean nothing"
    )
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, (title, section) in SECTIONS.items():
        if options.only in (None, name):
            suffix = "_smoke" if options.smoke else ""
            publish(title, section(options.smoke), RESULTS / f"scale_{name}{suffix}.csv")


if __name__ == "__main__":
    main()
