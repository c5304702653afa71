# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Binary columns that code attributes: at most one of a group is on."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

__all__ = ["ExclusiveColumns", "exclusive_groups", "frequencies"]


class ExclusiveColumns(TorchDistribution):
    """Binary vectors with at most one entry on in each group of columns: a categorical for each group.

    With groups of one column these are independent Bernoulli entries.

    Args:
        logits: (..., D), log-odds of each entry against "none of its group".
        groups: (G, W) columns of each group, filled up with D.
    """

    arg_constraints = {"logits": constraints.real_vector}
    support = constraints.independent(constraints.boolean, 1)

    def __init__(self, logits: Tensor, groups: Tensor, validate_args: bool | None = None) -> None:
        self.logits, self.groups = logits, groups
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ExclusiveColumns:
        return ExclusiveColumns(self.logits.expand(*batch_shape, -1), self.groups, validate_args=False)

    @property
    def outcomes(self) -> Tensor:
        """(..., G, 1 + W) logits, "none" first."""
        none = self.logits.new_zeros(*self.logits.shape[:-1], 1)
        padded = torch.cat([self.logits, none - math.inf], -1)[..., self.groups]
        return torch.cat([none[..., None, :].expand(*padded.shape[:-1], 1), padded], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        chosen = (value * self.logits).sum(-1)
        if self.logits.detach().max() > 80:  # exp would overflow in float32
            return chosen - self.outcomes.logsumexp(-1).sum(-1)
        # The sum over a group as a product of matrices: padded groups cost their padding, forwards and backwards.
        columns = torch.arange(self.event_shape[0])[:, None, None]
        member = (self.groups == columns).any(-1).to(self.logits)
        return chosen - (self.logits.exp() @ member).log1p().sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            chosen = torch.distributions.Categorical(logits=self.outcomes).sample(sample_shape)
            on = torch.nn.functional.one_hot(chosen, self.groups.shape[1] + 1)[..., 1:].flatten(-2)
            x = self.logits.new_zeros(*chosen.shape[:-1], self.event_shape[0] + 1)
            return x.scatter_add_(-1, self.groups.flatten().expand(on.shape), on.to(x))[..., :-1]


def exclusive_groups(x: Tensor) -> Tensor:
    """(G, W) neighbouring columns of which at most one is on in every row of ``x``, filled up with D."""
    together, groups = x.T @ x > 0, [[0]]
    for column in range(1, x.shape[1]):
        if together[column, groups[-1]].any():
            groups.append([column])
        else:
            groups[-1].append(column)
    width = max(map(len, groups))
    return torch.tensor([group + [x.shape[1]] * (width - len(group)) for group in groups])


def frequencies(x: Tensor, groups: Tensor) -> Tensor:
    """(D,) log-odds of each column against "none of its group" in the rows of ``x``, half a count added to each."""
    counts = torch.cat([x.sum(0), x.new_zeros(1)])[groups]
    none = len(x) - counts.sum(-1, keepdim=True)
    odds = ((counts + 0.5) / (none + 0.5)).log()
    return x.new_zeros(x.shape[1] + 1).scatter(0, groups.flatten(), odds.flatten())[:-1]
