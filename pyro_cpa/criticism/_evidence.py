# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""log p(x) of whatever was fitted: one way to ask, exact where the fit is exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from ..errors import UnsupportedModel
from ..infer.importance_weighted import ImportanceWeightedELBO

__all__ = ["Evidence", "as_rows", "evidence_of"]


class Evidence(NamedTuple):
    """log p(x_n) (N,), its Monte-Carlo standard errors (N,), zero if exact, and ``exact`` or ``estimate``."""

    log_prob: Tensor
    std_error: Tensor
    kind: str


def as_rows(x: Any) -> Tensor:
    """Array, frame or tensor as a float64 tensor (N, D); floating tensors keep their dtype."""
    if isinstance(x, Tensor) and x.is_floating_point():
        return x
    if isinstance(x, Tensor):
        return x.to(torch.float64)
    return torch.as_tensor(np.asarray(x, dtype=np.float64))


def evidence_of(fit: Any, x: Any, num_samples: int) -> Evidence:
    """log p(x_n) under ``fit``.

    Args:
        fit: a distribution over data (``log_prob``), a scikit-learn density (``score_samples``), a guide or
            fit that knows its evidence (``log_evidence``, its own or its ``guide``'s), a model with
            ``marginal()``, or a pair ``(model, guide)`` whose evidence is estimated.
        x: (N, D) data; NaN marks missing cells where the fit allows them.
        num_samples: particles of an estimate.

    Raises:
        UnsupportedModel: none of these.
    """
    if isinstance(fit, tuple):
        model, guide = fit
        return _estimated(model, guide, x, num_samples)
    with torch.no_grad():
        log_prob = torch.as_tensor(_exact(fit)(x)).to(torch.float64)
    return Evidence(log_prob, torch.zeros_like(log_prob), "exact")


def _exact(fit: Any) -> Callable[[Any], Any]:
    if hasattr(fit, "marginal") and not hasattr(fit, "log_evidence"):
        fit = fit.marginal()
    if hasattr(fit, "log_prob"):
        return lambda x: fit.log_prob(as_rows(x))
    if hasattr(fit, "score_samples"):
        if hasattr(fit, "offset_") and hasattr(fit, "decision_function"):
            raise UnsupportedModel(
                f"{type(fit).__name__}.score_samples is an anomaly score, not a log-density: it cannot be "
                "compared by evidence"
            )
        return fit.score_samples
    holder = fit if hasattr(fit, "log_evidence") else getattr(fit, "guide", fit)
    if hasattr(holder, "log_evidence"):
        return lambda x: holder.log_evidence(as_rows(x))
    raise UnsupportedModel(
        f"cannot ask a {type(fit).__name__} for log p(x): expected log_prob, score_samples, log_evidence, "
        "marginal(), or a pair (model, guide)"
    )


def _estimated(model: Callable, guide: Callable, x: Any, num_samples: int) -> Evidence:
    """log mean_k w_k per datum, with the delta method's error sd(w) / (mean(w) sqrt(K))."""
    rows = as_rows(x)
    with torch.no_grad(), poutine.block():
        log_w = ImportanceWeightedELBO(num_samples).log_weights(model, guide, rows).log_w.to(torch.float64)
    if log_w.shape[1:] != rows.shape[:1]:
        raise UnsupportedModel(
            f"the model's plates of shape {tuple(log_w.shape[1:])} do not give one evidence for each of the "
            f"{len(rows)} rows: put every site of model and guide in one plate over the rows"
        )
    log_prob = log_w.logsumexp(dim=0) - math.log(num_samples)
    relative = (log_w - log_prob).exp()
    return Evidence(log_prob, relative.std(dim=0) / math.sqrt(num_samples), "estimate")
