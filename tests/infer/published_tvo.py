# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The published thermodynamic estimator, written with one autograd term per node and particle: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_cpa.infer.thermodynamic_path import riemann_weights


def published(
    log_p: Tensor, log_q: Tensor, betas: Tensor, m: Tensor, c: float, center: float = 0.0
) -> Tensor:
    """Surrogate of one sum of nodes (...), particles first: one autograd term per node and particle."""
    f = log_p - log_q
    total = center * log_q.mean(0)
    for weight, beta in zip(m, betas, strict=True):
        w = torch.softmax(beta * f, 0).detach()
        deviation = f.detach() - (w * f.detach()).sum(0)
        tempered = beta * log_p + (1 - beta) * log_q
        total = total + weight * ((w * f).sum(0) + c * (w * deviation * tempered).sum(0))
    return total


def guide_sum(objective: str, betas: Tensor) -> tuple[float, Tensor]:
    """Sign and nodes of the guide's objective."""
    return {
        "lower": (1.0, riemann_weights(betas, "left")),
        "upper": (-1.0, riemann_weights(betas, "right")),
        "wake": (-1.0, torch.tensor([0.0, 0.0, 0.0, 1.0])),
    }[objective]
