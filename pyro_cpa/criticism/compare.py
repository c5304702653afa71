# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Which model explains held-out data best, by how much, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from ..errors import InvalidData
from ._arviz_versions import is_arviz_data, pointwise_loo
from ._evidence import evidence_of
from .parameter_count import count_parameters
from .stacking import stacking_weights

if TYPE_CHECKING:
    import pandas

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    r"""The table that :func:`compare` returns; arrays are in the order the models were given.

    Attributes:
        names: of the M models.
        kinds: ``exact``, ``estimate`` (importance sampling, biased low) or ``psis-loo``.
        pointwise: (M, N) log p(x_n).
        mc_errors: (M,) Monte-Carlo standard error of the mean, 0 where exact.
        max_pareto_k: (M,) largest Pareto k of PSIS-LOO (above 0.7: do not trust), NaN otherwise.
        num_parameters: (M,) honest counts, NaN where unknown.
        train_log_prob: (M,) summed log-likelihood of the training data, NaN where not given.
        num_train: training data.
        weights: (M,) stacking weights.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    pointwise: np.ndarray
    mc_errors: np.ndarray
    max_pareto_k: np.ndarray
    num_parameters: np.ndarray
    train_log_prob: np.ndarray
    num_train: int
    weights: np.ndarray

    @property
    def log_prob(self) -> np.ndarray:
        """(M,) mean log p(x) per datum, in nats."""
        return self.pointwise.mean(axis=1)

    @property
    def rank(self) -> np.ndarray:
        """(M,) 1 for the best mean."""
        order = np.argsort(-self.log_prob, kind="stable")
        rank = np.empty(len(order), dtype=int)
        rank[order] = np.arange(1, len(order) + 1)
        return rank

    @property
    def best(self) -> str:
        return self.names[int(np.argmax(self.log_prob))]

    @property
    def difference(self) -> np.ndarray:
        """(M,) mean difference per datum to the best model, 0 for the best, negative for the others."""
        return self._paired().mean(axis=1)

    @property
    def difference_error(self) -> np.ndarray:
        r"""(M,) standard error of the paired difference, :math:`\mathrm{sd}_n(d_n) / \sqrt N`."""
        N = self.pointwise.shape[1]
        if N < 2:
            return np.full(len(self.names), math.nan)
        return self._paired().std(axis=1, ddof=1) / math.sqrt(N)

    def _paired(self) -> np.ndarray:
        return self.pointwise - self.pointwise[np.argmax(self.log_prob)]

    @property
    def aic(self) -> np.ndarray:
        r"""(M,) :math:`2k - 2 \log p(X_{train})`."""
        return 2 * self.num_parameters - 2 * self.train_log_prob

    @property
    def bic(self) -> np.ndarray:
        r"""(M,) :math:`k \log N_{train} - 2 \log p(X_{train})`."""
        log_n = math.log(self.num_train) if self.num_train else math.nan
        return self.num_parameters * log_n - 2 * self.train_log_prob

    def columns(self) -> dict[str, np.ndarray]:
        """The table, best model first: name, then one array per column."""
        order = np.argsort(self.rank)
        table = {
            "model": np.asarray(self.names),
            "rank": self.rank,
            "log_prob": self.log_prob,
            "difference": self.difference,
            "difference_error": self.difference_error,
            "weight": self.weights,
            "evidence": np.asarray(self.kinds),
            "mc_error": self.mc_errors,
            "max_pareto_k": self.max_pareto_k,
            "parameters": self.num_parameters,
            "aic": self.aic,
            "bic": self.bic,
        }
        return {name: values[order] for name, values in table.items()}

    def to_frame(self) -> pandas.DataFrame:
        """The table as a pandas frame indexed by model (needs pandas)."""
        import pandas

        return pandas.DataFrame(self.columns()).set_index("model")

    def __str__(self) -> str:
        columns = {
            name: values
            for name, values in self.columns().items()
            if values.dtype.kind != "f" or not np.isnan(values).all()
        }
        cells = [[name, *(_cell(v) for v in values)] for name, values in columns.items()]
        widths = [max(map(len, column)) for column in cells]
        rows = zip(*cells, strict=True)
        return "\n".join(
            "  ".join(
                text.ljust(w) if i == 0 else text.rjust(w)
                for i, (text, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def compare(
    fits: Mapping[str, Any],
    x_test: Any = None,
    *,
    x_train: Any = None,
    num_samples: int = 1000,
    num_parameters: Mapping[str, int] | None = None,
) -> Comparison:
    r"""Compares fitted models by the log-density of held-out data, datum by datum.

    .. math:: \hat\ell_m = \frac1N \sum_n \log p_m(x_n), \qquad
              \hat\ell_m - \hat\ell_b \pm \mathrm{sd}_n\big(\log p_m(x_n) - \log p_b(x_n)\big) / \sqrt N

    Args:
        fits: name -> fit. A fit is a :class:`~pyro_cpa.distributions.CPAMarginal`, a
            :class:`~pyro_cpa.criticism.CPADensity` or another scikit-learn density, an exact guide or a fit
            that holds one (:class:`~pyro_cpa.infer.EM`), a pair ``(model, guide)``, whose evidence is
            estimated by importance sampling (both must broadcast on the left), or ArviZ data with a group
            ``log_likelihood`` (posterior over weights), compared by PSIS-LOO.
        x_test: (N, D) held-out data; left out if every fit is ArviZ data.
        x_train: training data, for AIC and BIC.
        num_samples: particles of an importance-sampled evidence.
        num_parameters: counts that override those found; by default ``fit.num_parameters``, or
            :func:`~pyro_cpa.criticism.count_parameters` of a module.

    Returns:
        A :class:`Comparison`; ``print`` shows the table, ``to_frame()`` is it in pandas.

    Raises:
        InvalidData: no models, ArviZ data mixed with other fits, or log-densities that are NaN.
        UnsupportedModel: a fit that has no log-density.

    Note:
        Exact fits are compared exactly. An estimate is marked, with its Monte-Carlo error, and is biased low:
        where it loses to an exact one by less than that bias, nothing is proved. AIC and BIC are for regular
        models; a decoder's likelihood is singular where units die, so prefer held-out data.

    References:
        Vehtari, Gelman, Gabry 2017, Practical Bayesian model evaluation using leave-one-out
        cross-validation and WAIC.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> x = torch.linspace(-1.0, 1.0, 9)[:, None]
        >>> narrow, wide = (dist.Normal(torch.zeros(1), s).to_event(1) for s in (0.6, 3.0))
        >>> result = compare({"narrow": narrow, "wide": wide}, x)
        >>> result.best, result.rank.tolist()
        ('narrow', [1, 2])
    """
    if not fits:
        raise InvalidData("compare was given no models: expected {name: fit}")
    unknown = sorted(set(num_parameters or {}) - set(fits))
    if unknown:
        raise InvalidData(f"num_parameters names unknown models {unknown}; the models are {list(fits)}")
    from_arviz = [is_arviz_data(fit) for fit in fits.values()]
    if any(from_arviz) != all(from_arviz) or all(from_arviz) != (x_test is None):
        raise InvalidData(
            "ArviZ data are compared by leave-one-out on their own data, other fits on x_test: give either "
            "ArviZ data only and no x_test, or other fits only and x_test"
        )
    pareto_k = np.full(len(fits), math.nan)
    mc_errors = np.zeros(len(fits))
    train = np.full(len(fits), math.nan)
    kinds, pointwise = [], []
    for m, fit in enumerate(fits.values()):
        if is_arviz_data(fit):
            elpd, k = pointwise_loo(fit)
            kinds.append("psis-loo")
            pareto_k[m] = k.max()
        else:
            found = evidence_of(fit, x_test, num_samples)
            elpd = found.log_prob.cpu().numpy()
            kinds.append("exact" if found.exact else "estimate")
            mc_errors[m] = float(found.standard_error.square().sum().sqrt()) / len(elpd)
            if x_train is not None:
                train[m] = float(evidence_of(fit, x_train, num_samples).log_prob.sum())
        pointwise.append(elpd)
    table = _stack(fits, pointwise)
    counts = {name: _count(fit) for name, fit in fits.items()} | dict(num_parameters or {})
    return Comparison(
        names=tuple(fits),
        kinds=tuple(kinds),
        pointwise=table,
        mc_errors=mc_errors,
        max_pareto_k=pareto_k,
        num_parameters=np.array([counts[name] for name in fits], dtype=float),
        train_log_prob=train,
        num_train=0 if x_train is None else len(x_train),
        weights=stacking_weights(table),
    )


def _stack(fits: Mapping[str, Any], pointwise: list[np.ndarray]) -> np.ndarray:
    sizes = {name: values.size for name, values in zip(fits, pointwise, strict=True)}
    if len(set(sizes.values())) != 1:
        raise InvalidData(f"models were evaluated on different numbers of data: {sizes}")
    nan = {n: int(np.isnan(v).sum()) for n, v in zip(fits, pointwise, strict=True) if np.isnan(v).any()}
    if nan:
        raise InvalidData(f"log p(x) is NaN for some data of these models (model: how many): {nan}")
    return np.stack(pointwise)


def _count(fit: Any) -> float:
    if hasattr(fit, "num_parameters"):
        return float(fit.num_parameters)
    model = fit[0] if isinstance(fit, tuple) else getattr(fit, "model", fit)
    return float(count_parameters(model)) if isinstance(model, nn.Module) else math.nan


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "-"
    if abs(value) >= 1e5:
        return f"{value:.0f}"
    return f"{value:.4f}" if value % 1 else f"{value:.0f}"
