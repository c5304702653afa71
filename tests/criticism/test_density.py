# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The scikit-learn front door: its conventions, the data's units, and exactness against closed forms."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from scipy import stats
from sklearn.base import clone
from sklearn.datasets import load_wine
from sklearn.decomposition import FactorAnalysis
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from pyro_cpa.criticism import CPADensity, compare, feature_surprise, surprise
from pyro_cpa.errors import InvalidData

QUICK = {"n_latent": 1, "hidden": (4,), "max_iter": 2, "random_state": 0}


@pytest.fixture(scope="module")
def x():
    return load_wine().data[::3]


@pytest.fixture(scope="module")
def fit(x):
    return CPADensity(**QUICK).fit(x)


@pytest.fixture
def holed(x):
    return np.where(np.random.default_rng(0).random(x.shape) < 0.2, np.nan, x)


@parametrize_with_checks([CPADensity(**QUICK | {"max_iter": 1})])
def test_scikit_learn_conventions(estimator, check):
    check(estimator)


def test_affine_decoder_is_factor_analysis():
    """Same model, same maximum: scikit-learn's factor analysis of the standardised columns."""
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 2)) @ random.normal(size=(2, 6)) * 3 + random.normal(size=(200, 6)) + 5
    z = (x - x.mean(0)) / x.std(0)
    reference = FactorAnalysis(2, tol=1e-7, max_iter=20_000).fit(z).score_samples(z).sum()
    reference -= len(x) * np.log(x.std(0)).sum()
    fit = CPADensity(2, (), ridge=0.0, max_iter=200, tol=1e-9, random_state=0).fit(x)
    assert fit.log_likelihood_ == pytest.approx(reference, abs=1e-3)
    assert fit.score_samples(x).sum() == pytest.approx(fit.log_likelihood_, abs=1e-8)
    covariance = fit.marginal().covariance_matrix.numpy()
    expected = stats.multivariate_normal(fit.marginal().mean.numpy(), covariance).logpdf(x)
    np.testing.assert_allclose(fit.score_samples(x), expected, rtol=1e-9)


def test_results_are_in_the_units_of_the_data(x):
    """Rescaling columns by c_d and shifting them changes log p by -sum log c_d and nothing else."""
    scale, shift = np.geomspace(1e-3, 1e4, x.shape[1]), np.linspace(-50, 50, x.shape[1])
    first, second = CPADensity(**QUICK).fit(x), CPADensity(**QUICK).fit(x * scale + shift)
    moved = x * scale + shift
    expected = first.score_samples(x) - np.log(scale).sum()
    np.testing.assert_allclose(second.score_samples(moved), expected, rtol=1e-6)
    np.testing.assert_allclose(second.noise_scale_, first.noise_scale_ * scale, rtol=1e-6)
    np.testing.assert_allclose(second.transform(moved), first.transform(x), atol=1e-6)
    drawn = first.sample(5, random_state=1) * scale + shift
    np.testing.assert_allclose(second.sample(5, random_state=1), drawn, rtol=1e-6)


def test_methods_are_those_of_the_marginal(fit, x, holed):
    rows, marginal = torch.as_tensor(holed), fit.marginal()
    np.testing.assert_array_equal(fit.score_samples(holed), marginal.log_prob(rows).detach())
    np.testing.assert_array_equal(fit.transform(holed), marginal.posterior(rows).mean)
    np.testing.assert_array_equal(fit.impute(holed), marginal.conditional(rows).mean)
    assert fit.score(x) == pytest.approx(fit.score_samples(x).mean(), rel=1e-12)
    observed = ~np.isnan(holed)
    for method in ("mean", "sample"):
        np.testing.assert_array_equal(fit.impute(holed, method=method)[observed], holed[observed])
    assert fit.impute_draws(holed, 3).shape == (3, *x.shape)


def test_criticism_takes_the_estimator_as_a_fit(fit, x):
    np.testing.assert_allclose(surprise(fit, x), -fit.score_samples(x), rtol=1e-12)
    assert feature_surprise(fit, x[:3]).shape == (3, x.shape[1])
    result = compare({"cpa": fit, "affine": CPADensity(1, (), random_state=0).fit(x)}, x)
    # 4 units x (1 + 1) + 13 x (4 + 1), less 4 scales, plus 13 noises; 13 x 2 + 13 for the affine one.
    np.testing.assert_array_equal(result.num_parameters, [8 + 65 - 4 + 13, 39])


def test_training_with_gaps_beats_training_on_column_means(x):
    """Gaps in 30 % of the cells: the likelihood of the observed cells is what training climbs."""
    holes = np.random.default_rng(1).random(x.shape) < 0.3
    holed = np.where(holes, np.nan, x)
    filled = np.where(holes, np.nanmean(holed, axis=0), x)
    options = QUICK | {"max_iter": 5}
    exact, naive = CPADensity(**options).fit(holed), CPADensity(**options).fit(filled)
    assert exact.score(holed) > naive.score(holed)
    assert exact.log_likelihood_ == pytest.approx(exact.score_samples(holed).sum(), abs=1e-6)


@pytest.mark.parametrize("solver", ["lbfgs", "em"])
def test_likelihood_rises_with_steps_and_starts(x, solver):
    options = QUICK | {"solver": solver, "tol": 0.0, "ridge": 0.0}
    found = [CPADensity(**options | {"max_iter": n}).fit(x).log_likelihood_ for n in (0, 1, 4)]
    assert found[0] < found[1] < found[2]
    several = CPADensity(**options, n_init=3).fit(x).log_likelihood_
    assert several >= CPADensity(**options).fit(x).log_likelihood_


def test_constant_and_duplicate_columns_have_finite_density(x):
    odd = np.c_[x[:, :3], np.full(len(x), 7.0), x[:, 0]]
    fit = CPADensity(**QUICK).fit(odd)
    assert np.isfinite(fit.score_samples(odd)).all()
    assert (fit.noise_scale_ > 0).all()


def test_predict_flags_the_stated_share_and_compares_rows_with_their_like(fit, x, holed):
    fit = CPADensity(**QUICK, contamination=0.1).fit(x)
    assert (fit.predict(x) == -1).sum() == np.floor(0.1 * len(x))
    strange = x[:1] + 20 * x.std(0)
    assert fit.predict(strange)[0] == -1
    strange[0, 5:] = np.nan
    assert fit.predict(strange)[0] == -1
    # Two cells alone carry another density than thirteen: the threshold follows the gaps.
    few = np.where(np.arange(x.shape[1]) < 2, x, np.nan)
    assert (fit.predict(few) == -1).sum() == np.floor(0.1 * len(x))
    never_together = np.where(np.arange(len(x))[:, None] % 2 == np.arange(2), np.nan, x[:, :2])
    with pytest.raises(InvalidData, match=r"no training row holds all of the columns \[0, 1\]"):
        CPADensity(**QUICK).fit(never_together).predict(x[:1, :2])


def test_clone_pickle_grid_search_pipeline_and_output_names(fit, x, holed):
    assert clone(fit).get_params() == fit.get_params()
    again = pickle.loads(pickle.dumps(fit))
    np.testing.assert_array_equal(again.score_samples(holed), fit.score_samples(holed))
    assert pickle.loads(pickle.dumps(CPADensity())).get_params() == CPADensity().get_params()
    search = GridSearchCV(CPADensity(**QUICK), {"hidden": [(), (4,)]}, cv=2).fit(holed)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    frame = pd.DataFrame(x).rename(columns=str)
    latent = (
        make_pipeline(StandardScaler(), CPADensity(**QUICK))
        .set_output(transform="pandas")
        .fit_transform(frame)
    )
    assert list(latent.columns) == ["cpadensity0"]


def test_nothing_global_changes(x):
    pyro.param("mine", torch.ones(1))
    torch.manual_seed(5)
    expected, validation = torch.get_rng_state(), pyro.distributions.is_validation_enabled()
    fit = CPADensity(**QUICK).fit(x)
    first = fit.sample(4)
    np.testing.assert_array_equal(first, fit.sample(4))
    assert torch.equal(torch.get_rng_state(), expected)
    assert set(pyro.get_param_store().keys()) == {"mine"}
    assert pyro.distributions.is_validation_enabled() == validation


def test_mistakes_are_named(x):
    with pytest.raises(NotFittedError):
        CPADensity().score_samples(x)
    with pytest.raises(ValueError, match="'noise' parameter"):
        CPADensity(noise="full").fit(x)
    frame = pd.DataFrame({"a": [1.0, 2.0, 3.0], "b": [np.nan] * 3})
    with pytest.raises(InvalidData, match=r"columns \['b'\] have no value at all"):
        CPADensity(**QUICK).fit(frame)
    with pytest.raises(ValueError, match="infinity"):
        CPADensity(**QUICK).fit(np.full((3, 2), np.inf))
