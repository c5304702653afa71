# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""How strange is a datum, and why: exact scores and their parts. Calibration is in ``conformal``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidData
from ._evidence import as_rows, evidence_of

__all__ = ["feature_surprise", "posterior_region", "surprise", "tail_probability"]


def surprise(fit: Any, x: Any, *, num_samples: int = 1000) -> Tensor:
    r"""How unlikely a datum is, in nats.

    .. math:: s(x) = -\log p(x_{obs})

    Args:
        fit: anything with a log-density: a :class:`~pyro_cpa.distributions.CPAMarginal`, a
            :class:`~pyro_cpa.criticism.CPADensity`, a guide with ``log_evidence``, a scikit-learn density,
            or a pair ``(model, guide)``, whose evidence is estimated.
        x: (N, D); NaN marks missing cells, which are integrated out.
        num_samples: particles, for an estimated evidence only.

    Returns:
        (N,) float64.

    Note:
        Exact for exact fits. Rows that miss different cells have scores of different dimension: compare
        them by :func:`tail_probability`.

    Example:
        >>> import pyro.distributions as dist
        >>> px = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> surprise(px, torch.tensor([[0.0, 0.0], [3.0, 0.0]])).tolist()
        [1.837877..., 6.337877...]
    """
    return -evidence_of(fit, x, num_samples).log_prob


def feature_surprise(fit: Any, x: Any) -> Tensor:
    r"""How unlikely each cell is given the rest of its row: where a datum is strange.

    .. math:: s_d(x) = -\log p(x_d \mid x_{obs \setminus d}) = \log p(x_{obs \setminus d}) - \log p(x_{obs})

    Args:
        fit: as :func:`surprise`, with an exact evidence that takes missing cells.
        x: (N, D); NaN marks missing cells.

    Returns:
        (N, D) float64, NaN where the cell is missing.

    Note:
        Exact; D + 1 evaluations of log p(x).

    Example:
        >>> from pyro_cpa.distributions import CPAMarginal
        >>> _ = torch.manual_seed(0)
        >>> px = CPAMarginal(torch.nn.Linear(1, 3), scale=0.1)
        >>> x = px.mean.clone()[None]
        >>> x[0, 2] += 5.0
        >>> feature_surprise(px, x).argmax().item()
        2
    """
    rows = as_rows(x)
    full = evidence_of(fit, rows, 0).log_prob
    found = torch.full(rows.shape, torch.nan, dtype=torch.float64, device=rows.device)
    for d in range(rows.shape[1]):
        present = ~rows[:, d].isnan()
        if not present.any():
            continue
        without = rows[present].clone()
        without[:, d] = torch.nan
        found[present, d] = evidence_of(fit, without, 0).log_prob - full[present]
    return found


def posterior_region(marginal: Any, x: Any) -> tuple[Tensor, Tensor]:
    r"""The affine piece that explains a datum best, and how surely.

    .. math:: \hat r(x) = \arg\max_r p(r \mid x_{obs})

    Args:
        marginal: a :class:`~pyro_cpa.distributions.CPAMarginal`.
        x: (N, D); NaN marks missing cells.

    Returns:
        Region numbers (N,) and their posterior probabilities (N,).

    Note:
        Exact; one posterior per datum.

    Example:
        >>> from pyro_cpa.distributions import CPAMarginal
        >>> px = CPAMarginal(torch.nn.Linear(1, 3), scale=0.1)
        >>> posterior_region(px, torch.zeros(1, 3))
        (tensor([0]), tensor([1.]))
    """
    probs = marginal.posterior(as_rows(x)).region_probs
    best = probs.max(dim=-1)
    return best.indices, best.values


def tail_probability(
    fit: Any, x: Any, *, num_samples: int = 1000, generator: torch.Generator | None = None
) -> Tensor:
    r"""Share of the model's own data that would be at least as unlikely, given which cells are missing.

    .. math:: t(x) = \frac{1 + \#\{s : \log p(x^{(s)}_{obs}) \le \log p(x_{obs})\}}{S + 1}, \qquad
              x^{(s)} \sim p(x)

    Under the model t is uniform (on its grid) whatever cells are missing, so rows with different gaps can be
    compared; under the truth it is not, which is what
    :class:`~pyro_cpa.criticism.ConformalDetector` repairs (score: minus ``tail_probability``).

    Args:
        fit: as :func:`surprise`, with ``sample((S,))``, or scikit-learn's ``sample(S)``.
        x: (N, D); NaN marks missing cells.
        num_samples: S; the standard error of t is at most 0.5 / sqrt(S).
        generator: not None to leave torch's global random state alone: its draws seed the model's.

    Returns:
        (N,) float64 in [1 / (S + 1), 1].

    Note:
        Monte Carlo in the model's draws, exact log p(x); S evaluations per distinct pattern of missing cells.

    Example:
        >>> import pyro.distributions as dist
        >>> _ = torch.manual_seed(0)
        >>> px = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        >>> bool(abs(tail_probability(px, torch.tensor([[1.96]])) - 0.05) < 0.04)
        True
    """
    rows = as_rows(x)
    log_prob = evidence_of(fit, rows, 0).log_prob
    draws = _draws(fit, num_samples, generator).to(rows)
    found = torch.empty_like(log_prob)
    patterns, members = torch.unique(rows.isnan(), dim=0, return_inverse=True)
    for index, missing in enumerate(patterns):
        reference = evidence_of(fit, draws.masked_fill(missing, torch.nan), 0).log_prob.sort().values
        mine = members == index
        as_unlikely = torch.searchsorted(reference, log_prob[mine], right=True)
        found[mine] = (1.0 + as_unlikely) / (num_samples + 1.0)
    return found


def _draws(fit: Any, num_samples: int, generator: torch.Generator | None) -> Tensor:
    if not hasattr(fit, "sample"):
        raise InvalidData(f"a {type(fit).__name__} cannot be sampled: expected a distribution or a density")
    seed = None if generator is None else int(torch.randint(2**62, (), generator=generator))
    devices: list[int] = []
    with torch.random.fork_rng(devices, enabled=seed is not None), torch.no_grad():
        if seed is not None:
            torch.manual_seed(seed)
        if hasattr(fit, "score_samples"):
            drawn = fit.sample(num_samples)
            return as_rows(drawn[0] if isinstance(drawn, tuple) else drawn)
        return fit.sample(torch.Size((num_samples,)))
