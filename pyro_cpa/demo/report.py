# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The table that the demonstration prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from .training import Fit

__all__ = ["Row", "format_table", "measure"]

PARTICLES = 200


@dataclass(frozen=True)
class Row:
    """One line of the table; evidence and bound in nats per datum.

    Attributes:
        name: of the fit.
        train: exact log p(x) of the training rows.
        test: exact log p(x) of the test rows.
        elbo: of the test rows, under the fit's own guide.
        seconds: of training.
        regions: of the decoder.
    """

    name: str
    train: float
    test: float
    elbo: float
    seconds: float
    regions: int

    @property
    def gap(self) -> float:
        """Inference gap log p(x) - ELBO = KL(q(z|x) || p(z|x)), test rows."""
        return self.test - self.elbo


def measure(fit: Fit, train: Tensor, test: Tensor) -> Row:
    """Exact evidence of both parts, and the ELBO of the test rows at 200 draws of the guide."""
    elbo = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        return Row(
            name=fit.name,
            train=fit.exact.log_evidence(train).mean().item(),
            test=fit.exact.log_evidence(test).mean().item(),
            elbo=-elbo.loss(fit.model.model, fit.guide, test) / len(test),
            seconds=fit.seconds,
            regions=fit.exact.partition().num_regions,
        )


def format_table(rows: Sequence[Row]) -> str:
    """The rows as aligned text under two lines of headings."""
    headings = (
        ("", "log p(x)", "log p(x)", "ELBO", "gap", ""),
        ("fit", "train", "test", "test", "test", "seconds"),
    )
    lines = [_line(*heading, last) for heading, last in zip(headings, ("", "regions"), strict=True)]
    lines.append("-" * len(lines[-1]))
    for row in rows:
        # Rounding can leave the exact guide's gap at -1e-15.
        gap = f"{row.gap:.3f}".replace("-0.000", "0.000")
        numbers = (f"{v:.3f}" for v in (row.train, row.test, row.elbo))
        lines.append(_line(row.name, *numbers, gap, f"{row.seconds:.1f}", str(row.regions)))
    return "\n".join(lines)


def _line(*cells: str) -> str:
    return f"{cells[0]:<10}" + "".join(f"{cell:>11}" for cell in cells[1:])
