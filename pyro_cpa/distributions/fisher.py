# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The exact evidence as a differentiable function, with Fisher's identity as its derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .expectation import RegionPosterior, evidence, region_log_probs, region_posterior, region_posteriors
from .missing import observed_tril
from .parts import gathered, parts
from .pieces import PiecewiseJoint
from .statistics import SufficientStatistics, accumulate, with_one

__all__ = ["differentiable_evidence", "expected_statistics"]


def differentiable_evidence(
    joint: PiecewiseJoint,
    x: Tensor,
    slopes: Tensor,
    offsets: Tensor,
    noise_scale: Tensor,
    prior_loc: Tensor,
    prior_tril: Tensor,
) -> Tensor:
    """Exact log p(x) (N,) of x (N, D), differentiable in every tensor argument.

    The tensors must have the values that ``joint`` holds. The joint density is continuous across the walls between
    regions, so that walls that move with the parameters contribute nothing to the derivative: it is exact.
    First derivatives only.
    """
    if not torch.is_grad_enabled():
        return evidence(joint, x)
    return _Evidence.apply(joint, x, slopes, offsets, noise_scale, prior_loc, prior_tril)


def expected_statistics(
    joint: PiecewiseJoint, x: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, SufficientStatistics]:
    """One E-step over the rows of x (N, D), streamed: log p(x) (N,) and the statistics of the weighted rows."""
    log_prob, total = [], SufficientStatistics.zeros(joint)
    for part, posterior in region_posteriors(joint, x):
        own = None if weights is None else weights[part.rows]
        total.add_(accumulate(part.joint, x[part.rows], posterior, own), part.joint.regions)
        log_prob.append((part.rows, posterior.log_prob))
    if not log_prob:
        raise ValueError("an E-step needs at least one datum")
    return gathered(log_prob, len(x)), total


class _Evidence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joint: PiecewiseJoint, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.joint, ctx.kept = joint, []
        ctx.save_for_backward(x, *parameters)
        if not any(ctx.needs_input_grad[1:]) or not len(x):
            return evidence(joint, x)
        log_prob, left = [], joint.pairs_in_budget(x)
        for part in parts(joint, x):
            own = x[part.rows]
            left -= part.num_pairs
            if left < 0:
                # Backward streams over the data once more rather than keep the moments of all pairs.
                ctx.kept.clear()
                value, _ = region_log_probs(part.joint, part.joint.pieces(own))
            else:
                posterior = region_posterior(part.joint, own)
                ctx.kept.append((part, posterior))
                value = posterior.log_prob
            log_prob.append((part.rows, value))
        return gathered(log_prob, len(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        joint: PiecewiseJoint = ctx.joint
        x, *parameters = ctx.saved_tensors
        total, grad_x = SufficientStatistics.zeros(joint), torch.zeros_like(x)
        for part, posterior in ctx.kept or region_posteriors(joint, x):
            own, weight = x[part.rows], grad[part.rows]
            total.add_(accumulate(part.joint, own, posterior, weight), part.joint.regions)
            if ctx.needs_input_grad[1]:
                grad_x[part.rows] = weight[:, None] * _data_gradient(part.joint, own, posterior)
        grads: list[Tensor | None] = [None] * len(parameters)
        wanted = [i for i in range(len(parameters)) if ctx.needs_input_grad[2 + i]]
        if wanted:
            with torch.enable_grad():
                slopes, offsets, noise, loc, tril = leaves = [p.detach().requires_grad_() for p in parameters]
                expected = []
                if wanted[0] < 3:
                    expected.append(total.expected_log_likelihood(slopes, offsets, noise))
                if wanted[-1] >= 3:
                    expected.append(total.expected_log_prior(loc, tril))
                found = torch.autograd.grad(expected, [leaves[i] for i in wanted])
            for i, g in zip(wanted, found, strict=True):
                grads[i] = g
        return None, (grad_x if ctx.needs_input_grad[1] else None), *grads


def _data_gradient(joint: PiecewiseJoint, x: Tensor, posterior: RegionPosterior) -> Tensor:
    """d log p(x) / dx = -Sx^-1 (x - E[g(z) | x]), zero where x is missing."""
    first = posterior.log_probs.exp()[..., None] * with_one(posterior.mean)
    maps = torch.cat([joint.slopes, joint.offsets[..., None]], dim=-1)
    missing = x.isnan()
    difference = torch.where(missing, 0.0, first.flatten(1) @ maps.movedim(1, -1).flatten(0, 1) - x)
    if joint.noise.is_diagonal:
        return difference / joint.noise.scale**2
    tril = observed_tril(joint.noise.covariance_matrix, missing)
    return torch.cholesky_solve(difference[..., None], tril)[..., 0]
