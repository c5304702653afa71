# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""log p(x) of whatever was fitted: one way to ask, exact where the fit is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributions import CPAMarginal
from ..errors import UnsupportedModel
from ..infer.evidence import Evidence, integrated_evidence, log_evidence

__all__ = ["as_rows", "evidence_of"]


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
            ``marginal()``, or a pair ``(model, guide)`` that broadcasts on the left, for
            :func:`~pyro_cpa.infer.log_evidence`.
        x: (N, D) data; NaN marks missing cells where the fit allows them.
        num_samples: particles of an estimate.

    Raises:
        UnsupportedModel: none of these.
    """
    if isinstance(fit, tuple):
        model, guide = fit
        return _of_pair(model, guide, x, num_samples)
    if isinstance(fit, CPAMarginal):
        log_prob, error = fit.log_prob(as_rows(x), return_error=True)
        return integrated_evidence(log_prob.to(torch.float64), error.to(torch.float64), num_samples)
    with torch.no_grad():
        log_prob = torch.as_tensor(_exact(fit)(x)).to(torch.float64)
    return Evidence(log_prob, torch.zeros_like(log_prob), torch.full_like(log_prob, num_samples), True)


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


def _of_pair(model: Callable[..., Any], guide: Callable[..., Any], x: Any, num_samples: int) -> Evidence:
    rows = as_rows(x)
    found = log_evidence(model, guide, rows, num_particles=num_samples)
    if found.log_prob.shape != rows.shape[:1]:
        raise UnsupportedModel(
            f"the model's plates of shape {tuple(found.log_prob.shape)} do not give one evidence for each of "
            f"the {len(rows)} rows: put every site of model and guide in one plate over the rows"
        )
    return found._replace(
        log_prob=found.log_prob.to(torch.float64), standard_error=found.standard_error.to(torch.float64)
    )
