# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Every joint state of a small stack of binary layers, and all quantities that follow by summing over it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from pyro_cpa.models.helmholtz_machine import BidirectionalHelmholtzMachine

GOODNESS_FLOOR = 2e-5  # p-value below which a goodness-of-fit test fails


def binary_states(dim: int) -> Tensor:
    """(2**dim, dim), counting with the first column as the highest bit."""
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=dim)))


def state_index(states: Tensor) -> Tensor:
    """Row of :func:`binary_states` for each row of ``states`` (..., dim)."""
    powers = 2 ** torch.arange(states.shape[-1] - 1, -1, -1)
    return (states.long() * powers).sum(-1)


class EnumeratedStack:
    """Tables over all x (rows) and all z (columns) of a stack."""

    def __init__(self, stack) -> None:
        self.stack = stack
        self.x = binary_states(stack.sizes[0])
        z = binary_states(sum(stack.sizes[1:]))
        self.z = list(z.split(list(stack.sizes[1:]), dim=-1))
        self.layers = [self.x[:, None], *(z_l[None] for z_l in self.z)]
        self.log_joint = stack.log_generation(self.layers)  # log p(x, z)
        self.log_q = stack.log_recognition(self.layers)  # log q(z | x)
        self.log_p = self.log_joint.logsumexp(1)
        self.log_posterior = self.log_joint - self.log_p[:, None]
        self.elbo = (self.log_q.exp() * (self.log_joint - self.log_q)).sum(1)
        self.log_root = 0.5 * (self.log_joint + self.log_q)  # log sqrt(p(x, z) q(z | x))
        self.log_p_tilde = 2 * self.log_root.logsumexp(1)
        self.two_log_z = self.log_p_tilde.logsumexp(0)
        self.log_p_star = self.log_p_tilde - self.two_log_z
        self.log_star_conditional = self.log_root - 0.5 * self.log_p_tilde[:, None]  # log p*(z | x)
        self.log_star_joint = self.log_star_conditional + self.log_p_star[:, None]
        self.log_bc = (0.5 * (self.log_posterior + self.log_q)).logsumexp(1)

    def joint_index(self, layers: list[Tensor]) -> Tensor:
        """Flat index into the (x, z) tables of sampled layers ``[x, z_1, ..., z_L]``."""
        return state_index(layers[0]) * self.z[0].shape[0] + state_index(torch.cat(layers[1:], -1))


def chi_square_p_value(index: Tensor, log_probs: Tensor) -> float:
    """p-value of Pearson's test of independent draws ``index`` against ``log_probs``, rare states pooled."""
    from scipy.stats import chi2

    expected = log_probs.detach().exp().reshape(-1) * index.numel()
    counts = torch.bincount(index.reshape(-1), minlength=expected.numel()).to(expected)
    common = expected >= 5
    e = torch.cat([expected[common], expected[~common].sum()[None]])
    c = torch.cat([counts[common], counts[~common].sum()[None]])
    e, c = e[e > 0], c[e > 0]
    return float(chi2.sf(((c - e) ** 2 / e).sum().item(), e.numel() - 1))


def tiny_machine(sizes=(4, 3, 2), **kwargs) -> BidirectionalHelmholtzMachine:
    """A machine whose two nets disagree visibly."""
    machine = BidirectionalHelmholtzMachine(sizes[0], sizes[1:], **kwargs)
    for parameter in machine.parameters():
        torch.nn.init.normal_(parameter, std=0.8)
    return machine


def close(actual: Tensor, expected: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)
