# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Largest errors of the exact quantities, against the tests' independent oracles.

    python benchmarks/accuracy.py            # a few minutes, one thread
    python benchmarks/accuracy.py --smoke    # the same in seconds, of fewer cells

Cells: half-planes, wedges, strips, boxes and hexagons (sizes 1e-8 to 300), turned and sheared, at growing distance
from the Gaussian's mean; the oracle integrates slices in 60 digits. "mean" is in standard deviations of the truncated
Gaussian, beyond the rounding of the mean itself; "covariance" is relative.

Evidence: log p(x) of ReLU decoders, from data they generate to data a hundred noise deviations away. With one
latent the oracle is Gauss-Legendre quadrature over the latent, which knows no regions; with two it is the sum over two
decoders of one latent, of which the one tested is the rotated product.

Prints two tables and writes them to benchmarks/results/accuracy_cells.csv and accuracy_evidence.csv.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import mpmath as mp
import torch
from runs import publish

import pyro_cpa

# The oracles are the tests', and need a checkout.
TESTS = Path(pyro_cpa.__file__).parents[1] / "tests"
sys.path += [str(TESTS / "integrals"), str(TESTS / "distributions")]

import gaussian_oracle as oracle  # noqa: E402
from brute_force import posterior_1d  # noqa: E402
from polygon_cases import polygons  # noqa: E402
from test_marginal import net, rotated  # noqa: E402
from test_polygon import table  # noqa: E402

from pyro_cpa.distributions import CPAMarginal  # noqa: E402
from pyro_cpa.integrals import moments  # noqa: E402

__all__: list[str] = []

RESULTS = Path(__file__).parent / "results"
DISTANCES = (0.0, 0.5, 2.0, 8.0, 40.0, 140.0)


def of_cells(smoke: bool) -> list[dict[str, Any]]:
    rows = []
    for distance in DISTANCES[::5] if smoke else DISTANCES:
        half_planes, loc, scale = zip(*list(table([distance]))[: 3 if smoke else None], strict=True)
        found = moments(polygons(half_planes), torch.tensor(loc), torch.tensor(scale))
        depth, worst = [], [mp.mpf(0)] * 3
        for k, case in enumerate(zip(half_planes, loc, scale, strict=True)):
            log_mass, center, (xx, xy, yy) = oracle.polygon(*case, size=1e5)
            x, y = mp.sqrt(xx), mp.sqrt(yy)
            rounding = 4e-16 * (abs(center[0]) + abs(center[1]) + abs(loc[k][0]) + abs(loc[k][1]))
            mean, covariance = found.mean[k].tolist(), found.covariance[k].tolist()
            errors = (
                abs(found.log_mass[k].item() - log_mass),
                max(
                    max(abs(mean[0] - center[0]) - rounding, 0) / x,
                    max(abs(mean[1] - center[1]) - rounding, 0) / y,
                ),
                max(
                    abs(covariance[0][0] / xx - 1),
                    abs(covariance[1][1] / yy - 1),
                    abs(covariance[0][1] - xy) / (x * y),
                ),
            )
            worst = [max(pair) for pair in zip(worst, errors, strict=True)]
            depth.append(float(log_mass))
        rows.append(
            {
                "distance": f"{distance:g}",
                "cells": len(depth),
                "log M": f"{min(depth):.4g} to {max(depth):.4g}",
                **{
                    f"error of {name}": f"{float(error):.0e}"
                    for name, error in zip(("log M", "mean", "covariance"), worst, strict=True)
                },
            }
        )
    return rows


def of_evidence(smoke: bool) -> list[dict[str, Any]]:
    rows = []
    for scale in (0.1,) if smoke else (0.1, 0.02):
        torch.manual_seed(0)
        decoder = net(1, 6, 2)
        line = CPAMarginal(decoder, scale)
        both, one, two, _ = rotated(scale)
        for label, px in (("L=1, quadrature", line), ("L=2, two lines", both)):
            near = px.sample((5 if smoke else 40,)).detach()
            away = torch.randn(near.shape)
            for steps in (0.0, 100.0) if smoke else (0.0, 10.0, 100.0):
                x = near + steps * scale * away / away.norm(dim=-1, keepdim=True)
                if px is line:
                    # Gauss-Legendre of panels short against the noise.
                    expected = posterior_1d(decoder, x, torch.tensor(scale), width=0.02 if smoke else 0.002)[
                        0
                    ]
                else:
                    expected = one.log_prob(x[:, :2]) + two.log_prob(x[:, 2:])
                value = px.log_prob(x).detach()
                error = (value - expected.detach()).abs()
                rows.append(
                    {
                        "oracle": label,
                        "noise": scale,
                        "noise deviations away": f"{steps:g}",
                        "data": len(x),
                        "log p(x)": f"{value.min():.4g} to {value.max():.4g}",
                        "largest error": f"{error.max():.0e}",
                        "relative": f"{(error / expected.abs()).max():.0e}",
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="seconds; fewer cells")
    smoke = parser.parse_args().smoke
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for name, section in (("cells", of_cells), ("evidence", of_evidence)):
        publish(
            f"Errors of {name}", section(smoke), RESULTS / f"accuracy_{name}{'_smoke' if smoke else ''}.csv"
        )


if __name__ == "__main__":
    main()
