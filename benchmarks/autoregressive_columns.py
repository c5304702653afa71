# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Binary columns each of which depends on those before it."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from runs import minimise
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

__all__ = ["AutoregressiveColumns", "fitted_columns"]


class AutoregressiveColumns(TorchDistribution):
    r"""Binary vectors by the chain rule, each entry a logistic regression on the entries before it.

    .. math:: p(x) = \prod_d \mathrm{Bernoulli}\Bigl(x_d \Bigm| \sigma\bigl(a_d + \sum_{j<d} W_{jd} x_j\bigr)\Bigr)

    With W = 0 these are independent Bernoulli entries; with constant logits it is the fully visible sigmoid belief net.

    Args:
        logits: (..., D), a.
        weight: (D, D); of W only what lies above the diagonal is used.

    Note:
        A row's density costs one product with W, common to all particles of the row; a draw costs D steps.

    References:
        K. Gregor, I. Danihelka, A. Mnih, C. Blundell, D. Wierstra (2014), "Deep AutoRegressive Networks".
    """

    arg_constraints = {"logits": constraints.real_vector}
    support = constraints.independent(constraints.boolean, 1)

    def __init__(self, logits: Tensor, weight: Tensor, validate_args: bool | None = None) -> None:
        self.logits, self.weight = logits, weight
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> AutoregressiveColumns:
        return AutoregressiveColumns(self.logits.expand(*batch_shape, -1), self.weight, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        logits = self.logits + value @ self.weight.triu(1)
        return -binary_cross_entropy_with_logits(logits, value.expand_as(logits), reduction="none").sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            x = torch.zeros(self.shape(sample_shape)).to(self.logits)
            for column in range(x.shape[-1]):
                odds = self.logits[..., column] + x[..., :column] @ self.weight[:column, column]
                x[..., column] = torch.bernoulli(odds.sigmoid())
            return x


def fitted_columns(x: Tensor, valid: Tensor) -> AutoregressiveColumns:
    """Constant logits and weights by penalised maximum likelihood.

    Args:
        x: (N, D) rows to fit.
        valid: (M, D) rows by which the precision of a Gaussian prior on logits and weights is chosen, among 0.3 to 10.
    """

    def fitted(precision: float) -> AutoregressiveColumns:
        law = AutoregressiveColumns(x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1]))
        values = [law.logits.requires_grad_(), law.weight.requires_grad_()]

        def loss() -> Tensor:
            prior = 0.5 * precision * sum(value.square().sum() for value in values)
            return (prior - law.log_prob(x).sum()) / len(x)

        minimise(values, loss, 300)
        return AutoregressiveColumns(*(value.detach() for value in values))

    choices = [fitted(precision) for precision in (0.3, 1.0, 3.0, 10.0)]
    return max(choices, key=lambda law: law.log_prob(valid).sum().item())
