# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Integrals over one latent dimension from a model's own trace: the oracle of the exact models."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyro.poutine as poutine
import torch
from torch import Tensor


class Quadrature(NamedTuple):
    """Gauss-Legendre nodes (Q, 1) and log-weights (Q, 1), panels ending at the kinks of the integrand."""

    z: Tensor
    log_weight: Tensor


def between_kinks(kinks, low=-14.0, high=14.0, width=0.7, degree=40):
    nodes, weights = (torch.as_tensor(item) for item in np.polynomial.legendre.leggauss(degree))
    kinks = torch.as_tensor(kinks).detach().flatten()
    ends = torch.cat([torch.arange(low, high, width), kinks[(kinks > low) & (kinks < high)]]).sort().values
    half = ends.diff()[:, None] / 2
    z = (ends[:-1, None] + half + half * nodes).reshape(-1, 1)
    return Quadrature(z, (half * weights).log().reshape(-1, 1))


def hidden_kinks(linear):
    """Where the units of a first hidden layer change their slope."""
    return -linear.bias / linear.weight[:, 0]


@torch.no_grad()
def log_joint(model, quadrature, x, *args):
    """(Q, N) log of weight times p(x_n, z) at every node, read from the model's trace."""
    z = quadrature.z[:, None].expand(-1, len(x), -1)
    trace = poutine.trace(poutine.condition(model, data={"z": z})).get_trace(x, *args)
    trace.compute_log_prob()
    return trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"] + quadrature.log_weight


def moments(log_joint, values):
    """E[values | x_n] for values (Q, F): (N, F)."""
    return log_joint.softmax(0).T @ values
