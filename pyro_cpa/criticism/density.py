# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""A scikit-learn estimator: exact density, outliers, latent coordinates and imputation of tabular data."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, DensityMixin, TransformerMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from ..distributions import CPAMarginal
from ..errors import InvalidData
from ._training import train
from .parameter_count import count_parameters
from .quantiles import conditional_quantiles

__all__ = ["CPADensity"]


class CPADensity(ClassNamePrefixFeaturesOutMixin, TransformerMixin, DensityMixin, BaseEstimator):
    r"""Density of tabular data by a ReLU decoder with an exact likelihood; missing cells (NaN) are welcome.

    .. math:: z \sim \mathcal N(0, I_L), \qquad x \mid z \sim \mathcal N(g(z), \mathrm{diag}(\sigma^2))

    trained by maximum likelihood on the exact :math:`\log p(x_{obs})`, on columns standardised inside; every
    result is in the units of the data.

    Args:
        n_latent: L; beyond 3 densities are estimates where there are hidden layers.
        hidden: widths of the ReLU layers; ``()`` is factor analysis.
        noise: ``"diagonal"``, one scale per column, or ``"isotropic"``, one for all standardised columns.
        solver: ``"lbfgs"`` on the exact evidence, or ``"em"``, whose closed-form steps alternate with it.
        ridge: precision of a Gaussian prior on the weights, for standardised columns.
        noise_floor: smallest noise scale, as a share of a column's standard deviation. Without it a column
            that the decoder fits exactly has infinite density.
        max_iter: steps of the solver. ``"lbfgs"``: five EM sweeps of the weights, then rounds of 20 gradient
            iterations; ``"em"``: one sweep and 5 gradient iterations each.
        tol: stop once a step gains less, in nats per row.
        n_init: starts, of which the likeliest is kept.
        contamination: share of the training rows that ``predict`` calls outliers.
        random_state: of starts and draws.

    Attributes:
        decoder_: ``torch.nn.Sequential`` from latent space to the data's units.
        noise_scale_: (D,) noise standard deviations in the data's units.
        log_likelihood_: of the training data, summed.
        num_parameters: honest count, see :func:`~pyro_cpa.criticism.count_parameters`.
        n_iter_: steps taken by the best start.
        n_features_in_: number of columns.
        feature_names_in_: their names, if the training table had any.

    Raises:
        InvalidData: a column without a single value, or parameters that make no sense.

    Note:
        Exact: see :class:`~pyro_cpa.distributions.CPAMarginal`. A gradient step costs O(N R) Gaussian
        integrals, R regions (at most of order H^L); one of L = 3 costs hundreds of L = 2.

    References:
        Balestriero, Paris, Baraniuk 2020, Analytical Probability Distributions and Exact
        Expectation-Maximization for Deep Generative Networks.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 3)).cumsum(axis=1)
        >>> x[0, 1] = np.nan
        >>> density = CPADensity(n_latent=1, hidden=(4,), max_iter=3, random_state=0).fit(x)
        >>> density.score_samples(x).shape, density.transform(x).shape
        ((50,), (50, 1))
        >>> bool(np.isfinite(density.impute(x)).all())
        True
    """

    _parameter_constraints = {
        "n_latent": [Interval(Integral, 1, None, closed="left")],
        "hidden": ["array-like"],
        "noise": [StrOptions({"diagonal", "isotropic"})],
        "solver": [StrOptions({"lbfgs", "em"})],
        "ridge": [Interval(Real, 0, None, closed="left")],
        "noise_floor": [Interval(Real, 0, 1, closed="neither")],
        "max_iter": [Interval(Integral, 0, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "n_init": [Interval(Integral, 1, None, closed="left")],
        "contamination": [Interval(Real, 0, 0.5, closed="right")],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        n_latent: int = 2,
        hidden: Sequence[int] = (16,),
        *,
        noise: str = "diagonal",
        solver: str = "lbfgs",
        ridge: float = 1.0,
        noise_floor: float = 0.01,
        max_iter: int = 10,
        tol: float = 1e-3,
        n_init: int = 1,
        contamination: float = 0.05,
        random_state: Any = None,
    ) -> None:
        self.n_latent = n_latent
        self.hidden = hidden
        self.noise = noise
        self.solver = solver
        self.ridge = ridge
        self.noise_floor = noise_floor
        self.max_iter = max_iter
        self.tol = tol
        self.n_init = n_init
        self.contamination = contamination
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> CPADensity:
        """Train on X (N, D); NaN marks missing cells; ``y`` is ignored."""
        self._validate_params()
        rows = self._rows(X, reset=True)
        empty = np.isnan(rows).all(axis=0)
        if empty.any():
            names = getattr(self, "feature_names_in_", np.arange(rows.shape[1]))[empty].tolist()
            raise InvalidData(
                f"columns {names} have no value at all: nothing can be learned of them, drop them"
            )
        loc, spread = np.nanmean(rows, axis=0), np.nanstd(rows, axis=0)
        # A column whose spread is rounding of its mean is constant: it keeps its units.
        spread[spread <= 1e-12 * np.abs(loc)] = 1.0
        standard = torch.as_tensor((rows - loc) / spread)
        random = check_random_state(self.random_state)
        fits = [
            train(
                standard,
                latent_dim=self.n_latent,
                hidden=tuple(self.hidden),
                isotropic=self.noise == "isotropic",
                solver=self.solver,
                ridge=self.ridge,
                noise_floor=self.noise_floor,
                max_iter=self.max_iter,
                tol=self.tol,
                seed=int(random.randint(2**31 - 1)),
            )
            for _ in range(self.n_init)
        ]
        best = max(fits, key=lambda fit: fit.log_likelihood)
        self.decoder_ = _in_units(best.decoder, torch.as_tensor(loc), torch.as_tensor(spread))
        self.noise_scale_ = best.noise_scale.numpy() * spread
        self.log_likelihood_ = best.log_likelihood - float((~np.isnan(rows)).sum(axis=0) @ np.log(spread))
        self.n_iter_ = max(1, best.num_steps)
        self._n_features_out = self.n_latent
        self._fit_X = rows
        self._marginal = self._exact()
        return self

    def marginal(self) -> CPAMarginal:
        """The exact distribution of the data, as a Pyro distribution in their units."""
        check_is_fitted(self)
        return self._marginal

    def _exact(self) -> CPAMarginal:
        return CPAMarginal(self.decoder_, torch.as_tensor(self.noise_scale_))

    @property
    def num_parameters(self) -> int:
        check_is_fitted(self)
        self.decoder_.requires_grad_(True)
        count = count_parameters(self.decoder_)
        self.decoder_.requires_grad_(False)
        return count + (self.n_features_in_ if self.noise == "diagonal" else 1)

    def score_samples(self, X: Any) -> np.ndarray:
        """(N,) exact log p(x) of the observed cells of every row."""
        return self._log_prob(self._rows(X))

    def score(self, X: Any, y: Any = None) -> float:
        """Mean of ``score_samples``: comparable between folds of different size."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1, random_state: Any = None) -> np.ndarray:
        """(n_samples, D) draws; ``random_state`` of the estimator unless given."""
        with self._seeded(random_state), torch.no_grad():
            return self.marginal().sample(torch.Size((n_samples,))).numpy()

    def transform(self, X: Any) -> np.ndarray:
        """(N, L) exact posterior means E[z | x]."""
        return self.marginal().posterior(torch.as_tensor(self._rows(X))).mean.numpy()

    def decision_function(self, X: Any) -> np.ndarray:
        """(N,) log p(x) above the threshold of ``predict``; negative for outliers.

        The threshold is the ``contamination`` quantile of log p over the training rows, reduced to the cells
        that the judged row has: rows with gaps are compared with rows with the same gaps.
        """
        rows = self._rows(X)
        log_prob = self._log_prob(rows)
        patterns, members = np.unique(np.isnan(rows), axis=0, return_inverse=True)
        for index, missing in enumerate(patterns):
            log_prob[members.ravel() == index] -= self._threshold(missing)
        return log_prob

    def predict(self, X: Any) -> np.ndarray:
        """(N,) -1 for outliers, 1 for inliers."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def impute(self, X: Any, *, method: str = "mean", random_state: Any = None) -> np.ndarray:
        """X with its gaps filled: by the conditional ``"mean"`` or ``"median"``, or one ``"sample"``."""
        if method == "sample":
            return self.impute_draws(X, 1, random_state)[0]
        rows = torch.as_tensor(self._rows(X))
        if method == "mean":
            return self.marginal().conditional(rows).mean.numpy()
        if method == "median":
            return conditional_quantiles(self.marginal(), rows, [0.5])[0].numpy()
        raise InvalidData(f"method is {method!r}: expected 'mean', 'median' or 'sample'")

    def impute_draws(self, X: Any, n_draws: int = 10, random_state: Any = None) -> np.ndarray:
        """(n_draws, N, D) completions of X, independent draws from the exact conditional."""
        conditional = self.marginal().conditional(torch.as_tensor(self._rows(X)))
        with self._seeded(random_state):
            return conditional.sample(torch.Size((n_draws,))).numpy()

    def _threshold(self, missing: np.ndarray) -> float:
        comparable = ~np.isnan(self._fit_X[:, ~missing]).any(axis=1)
        if not comparable.any():
            names = getattr(self, "feature_names_in_", np.arange(len(missing)))[~missing].tolist()
            raise InvalidData(f"no training row holds all of the columns {names}: such rows cannot be judged")
        rows = self._fit_X[comparable].copy()
        rows[:, missing] = np.nan
        return float(np.quantile(self._log_prob(rows), self.contamination))

    def _log_prob(self, rows: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.marginal().log_prob(torch.as_tensor(rows)).numpy()

    def _rows(self, X: Any, reset: bool = False) -> np.ndarray:
        if not reset:
            check_is_fitted(self)
        rows = validate_data(
            self,
            X,
            reset=reset,
            dtype=np.float64,
            ensure_all_finite="allow-nan",
            ensure_min_samples=2 if reset else 1,
        )
        # torch takes writable memory only, and frames hand out their own.
        return np.array(rows)

    def _seeded(self, random_state: Any) -> Any:
        random = check_random_state(self.random_state if random_state is None else random_state)
        return _Seeded(int(random.randint(2**31 - 1)))

    def __getstate__(self) -> dict[str, Any]:
        # The regions follow from the decoder: they are found again where it is loaded.
        return {name: value for name, value in super().__getstate__().items() if name != "_marginal"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "decoder_" in state:
            self._marginal = self._exact()

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags


class _Seeded:
    """A block that draws from its own seed and leaves torch's global state as it was."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._fork: Any = None

    def __enter__(self) -> None:
        self._fork = torch.random.fork_rng(devices=[])
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *details: Any) -> None:
        self._fork.__exit__(*details)


def _in_units(decoder: torch.nn.Sequential, loc: Tensor, spread: Tensor) -> torch.nn.Sequential:
    """The decoder of standardised data followed by the data's units, folded into its last layer."""
    weight, bias = decoder[-1].parameters()
    with torch.no_grad():
        weight.mul_(spread[:, None])
        bias.mul_(spread).add_(loc)
    return decoder
