# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The Gumbel-softmax relaxation of a one-hot variable, with the divergence of what it relaxes."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import OneHotCategorical, kl_divergence, register_kl

__all__ = ["RelaxedCategory"]


class RelaxedCategory(dist.RelaxedOneHotCategorical):
    r"""Point of the simplex near a corner, differentiable in the logits.

    .. math:: y = \mathrm{softmax}\bigl((\mathrm{logits} + \mathrm{Gumbel\ noise}) / \tau\bigr)

    ``log_prob`` is the density of y on the simplex. The registered KL divergence between two of them is that
    of the *categorical* variables they relax, so a sampling objective works with relaxed densities and
    ``AnalyticELBO`` with the categorical divergence: the two estimators in use for such models. Both are
    biased for the discrete model; the bias goes, and the variance of the gradient comes, as the
    temperature goes to 0.

    Args:
        temperature: () tensor.
        logits: (..., C).

    References:
        Jang, Gu and Poole (2017), Categorical reparameterization with Gumbel-softmax.
        Maddison, Mnih and Teh (2017), The concrete distribution.
    """

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        y = super().rsample(sample_shape)
        # At low temperatures rounding takes y off the simplex, and entries to 0, of infinite density.
        return (y / y.sum(-1, keepdim=True)).clamp(min=torch.finfo(y.dtype).tiny)


@register_kl(RelaxedCategory, RelaxedCategory)
def _kl_of_the_categories(p: RelaxedCategory, q: RelaxedCategory) -> Tensor:
    return kl_divergence(OneHotCategorical(logits=p.logits), OneHotCategorical(logits=q.logits))
