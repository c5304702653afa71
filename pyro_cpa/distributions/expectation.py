# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The E-step: evidence, region probabilities and truncated moments of every datum, streamed over the data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import integrals
from .parts import Part, gathered, parts
from .pieces import Pieces, PiecewiseJoint

__all__ = [
    "RegionPosterior",
    "evidence",
    "evidence_and_omitted",
    "evidence_with_error",
    "region_log_probs",
    "region_posteriors",
]

# Pairs of datum and region whose share of p(x) is certainly below exp(-50) = 2e-22 are not integrated:
# even a million of them change p(x) by less than a unit in the last place.
NEGLIGIBLE_NATS = 50.0
# Where masses are estimates, this is far below their errors.
_NEGLIGIBLE_TO_ESTIMATES = 30.0
# Below this many regions the bound costs more than the integrals it saves.
PRUNE_ABOVE = 48


class RegionPosterior(NamedTuple):
    """Exact posterior of a batch of data, region by region.

    Attributes:
        log_prob: (N,) log p(x).
        log_probs: (N, R) log p(r | x), ``-inf`` for regions of negligible share.
        mean: (N, R, L) E[z | x, r].
        covariance: (N, R, L, L) Cov[z | x, r].
    """

    log_prob: Tensor
    log_probs: Tensor
    mean: Tensor
    covariance: Tensor


def _relevant_pairs(joint: PiecewiseJoint, pieces: Pieces) -> Tensor:
    """(N, R) True where the region's share of p(x) is not certainly negligible."""
    cells = joint.cells
    upper = pieces.log_k + integrals.log_mass_bound(cells, pieces.loc, pieces.scale_tril)
    rows = torch.arange(len(upper), device=upper.device)
    best = upper.argmax(-1)
    log_k, loc, scale_tril = pieces.pairs(rows, best)
    lower = log_k + integrals.log_mass(cells[best], loc, scale_tril)
    nats = NEGLIGIBLE_NATS if joint.is_exact else _NEGLIGIBLE_TO_ESTIMATES
    return upper >= lower[:, None] - nats


def region_log_probs(joint: PiecewiseJoint, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """log p(x) (N,) and log p(r | x) (N, R) from the pieces of a batch."""
    cells = joint.cells
    if len(cells) <= PRUNE_ABOVE and joint.is_exact:
        log_joint = pieces.log_k + integrals.log_mass(cells, pieces.loc, pieces.scale_tril)
    else:
        kept = _relevant_pairs(joint, pieces)
        log_joint = (
            pieces.log_k + integrals.moments_where(cells, pieces.loc, pieces.scale_tril, kept).log_mass
        )
    log_prob = log_joint.logsumexp(-1)
    return log_prob, log_joint - log_prob[:, None]


def region_posterior(joint: PiecewiseJoint, x: Tensor) -> RegionPosterior:
    """Evidence, region probabilities and truncated moments of the rows of x (N, D), all at once."""
    pieces = joint.pieces(x)
    cells = joint.cells
    if len(cells) <= PRUNE_ABOVE and joint.is_exact:
        found = integrals.moments(cells, pieces.loc, pieces.scale_tril)
    else:
        kept = _relevant_pairs(joint, pieces)
        found = integrals.moments_where(cells, pieces.loc, pieces.scale_tril, kept)
    log_joint = pieces.log_k + found.log_mass
    log_prob = log_joint.logsumexp(-1)
    return RegionPosterior(log_prob, log_joint - log_prob[:, None], found.mean, found.covariance)


def region_posteriors(joint: PiecewiseJoint, x: Tensor) -> Iterator[tuple[Part, RegionPosterior]]:
    """Parts of the rows of x (N, D) with their exact posterior over the part's regions; each fits the memory budget."""
    for part in parts(joint, x):
        yield part, region_posterior(part.joint, x[part.rows])


def evidence(joint: PiecewiseJoint, x: Tensor) -> Tensor:
    """Exact log p(x) of the rows of x (N, D): (N,)."""
    return evidence_and_omitted(joint, x)[0]


def evidence_and_omitted(joint: PiecewiseJoint, x: Tensor) -> tuple[Tensor, Tensor]:
    """Exact log p(x) of the rows of x (N, D), and a certified bound on the share of p(x) left out of it: (N,) both."""
    found = []
    for part in parts(joint, x):
        log_prob, _ = region_log_probs(part.joint, part.joint.pieces(x[part.rows]))
        found.append((part.rows, torch.stack([log_prob, part.omitted], dim=1)))
    if not found:
        return x.new_zeros(0), x.new_zeros(0)
    log_prob, omitted = gathered(found, len(x)).unbind(1)
    return log_prob, omitted


def evidence_with_error(joint: PiecewiseJoint, x: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x) of the rows of x (N, D), and its standard error: (N,) each; the error is 0 where log p(x) is exact.

    The replicates of all regions share their points, so that the scatter of their sums is that of p(x).
    """
    if joint.is_exact:
        found = evidence(joint, x)
        return found, torch.zeros_like(found)
    values, errors = [x.new_zeros(0)], [x.new_zeros(0)]
    for part in joint.chunks(x):
        pieces = joint.pieces(x[part])
        rows, regions = _relevant_pairs(joint, pieces).nonzero(as_tuple=True)
        log_k, loc, scale_tril = pieces.pairs(rows, regions)
        terms = log_k[:, None] + integrals.log_mass_replicates(joint.cells[regions], loc, scale_tril)
        N, K = len(pieces.log_k), terms.shape[1]
        top = terms.new_full((N,), -torch.inf).scatter_reduce(0, rows, terms.amax(1), "amax")
        sums = terms.new_zeros(N, K).index_add(0, rows, (terms - top[rows, None]).exp())
        mean = sums.mean(1)
        values.append(mean.log() + top)
        errors.append(sums.std(1) / (mean * K**0.5))
    return torch.cat(values), torch.cat(errors)
