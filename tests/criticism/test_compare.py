# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The comparison table against numbers worked out from its definition."""

from __future__ import annotations

import math
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from sklearn.covariance import EllipticEnvelope
from sklearn.ensemble import IsolationForest
from sklearn.mixture import GaussianMixture

from pyro_cpa.criticism import compare, to_arviz
from pyro_cpa.errors import InvalidData, UnsupportedModel


def normal(loc, scale):
    return dist.Normal(torch.tensor([loc, loc]), scale).to_event(1)


FITS = {"wide": normal(0.0, 3.0), "right": normal(0.0, 1.0), "shifted": normal(1.0, 1.0)}


@pytest.fixture
def x():
    return torch.randn(200, 2)


def test_columns_follow_their_definitions(x):
    train = torch.randn(50, 2)
    result = compare(FITS, x, x_train=train, num_parameters={"wide": 1, "right": 4})
    log_prob = torch.stack([fit.log_prob(x) for fit in FITS.values()]).numpy()
    np.testing.assert_allclose(result.pointwise, log_prob, rtol=1e-15)
    assert result.best == "right"
    assert result.rank[1] == 1 and sorted(result.rank) == [1, 2, 3]
    paired = log_prob - log_prob[1]
    np.testing.assert_allclose(result.difference, paired.mean(1), rtol=1e-12)
    np.testing.assert_allclose(result.difference_error, paired.std(1, ddof=1) / math.sqrt(200), rtol=1e-12)
    np.testing.assert_array_equal(result.num_parameters, [1, 4, math.nan])
    fitted = np.array([float(fit.log_prob(train).sum()) for fit in FITS.values()])
    np.testing.assert_allclose(result.aic, 2 * result.num_parameters - 2 * fitted, rtol=1e-12)
    np.testing.assert_allclose(result.bic, math.log(50) * result.num_parameters - 2 * fitted, rtol=1e-12)
    assert result.kinds == ("exact",) * 3
    assert (result.mc_errors == 0).all()
    assert result.weights[1] == result.weights.max()


def test_table_in_text_and_pandas(x):
    result = compare(FITS, x)
    lines = str(result).splitlines()
    assert lines[1].split()[:2] == ["right", "1"]
    assert "aic" not in lines[0] and "max_pareto_k" not in lines[0]
    frame = result.to_frame()
    assert list(frame.index)[0] == "right"
    assert frame.loc["wide", "difference"] == result.difference[0]


def test_pandas_is_imported_by_to_frame_alone(x, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    result = compare(FITS, x)
    assert "right" in str(result)
    with pytest.raises(ImportError):
        result.to_frame()


def test_the_standard_error_is_that_of_the_mean_difference():
    """Over 400 test sets the differences scatter as much as their error claims (5 s.e. of a variance)."""
    pair = {"right": FITS["right"], "shifted": FITS["shifted"]}
    found = [compare(pair, torch.randn(50, 2)) for _ in range(400)]
    assert all(r.best == "right" for r in found)
    scatter = np.var([r.difference[1] for r in found], ddof=1)
    claimed = np.mean([r.difference_error[1] ** 2 for r in found])
    assert abs(scatter / claimed - 1) < 5 * math.sqrt(2 / 400)


def test_scikit_learn_densities_and_exact_guides_side_by_side(x):
    mixture = GaussianMixture(2, random_state=0).fit(x.numpy())

    class Guide:
        def log_evidence(self, data):
            return FITS["right"].log_prob(data)

    class Fit:
        guide = Guide()

    result = compare({"mixture": mixture, "guide": Guide(), "fit": Fit()}, x.numpy())
    np.testing.assert_allclose(result.pointwise[0], mixture.score_samples(x.numpy()), rtol=1e-12)
    np.testing.assert_allclose(result.pointwise[1], FITS["right"].log_prob(x), rtol=1e-12)
    np.testing.assert_array_equal(result.pointwise[1], result.pointwise[2])


@pytest.mark.parametrize("detector", [IsolationForest(random_state=0), EllipticEnvelope(random_state=0)])
def test_anomaly_scores_are_not_log_densities(x, detector):
    with pytest.raises(UnsupportedModel, match="not a log-density"):
        compare({"detector": detector.fit(x.numpy())}, x)


def posterior_of_the_mean(x, prior_scale):
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, prior_scale))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    precision = len(x) + prior_scale**-2
    draws = dist.Normal(x.sum() / precision, precision**-0.5).sample([1000])
    return to_arviz({"mean": draws}, x, model=model, prior_samples=0)


def test_psis_loo_against_the_closed_form():
    """Conjugate mean: log p(x_n | rest) is normal. 1000 draws: standard errors below 0.017, five of them."""
    x = torch.randn(30) + 2.0
    result = compare({"flat": posterior_of_the_mean(x, 10.0), "tight": posterior_of_the_mean(x, 0.05)})
    for row, prior_scale in zip(result.pointwise, (10.0, 0.05), strict=True):
        precision = len(x) - 1 + prior_scale**-2
        exact = dist.Normal((x.sum() - x) / precision, math.sqrt(1 + 1 / precision)).log_prob(x)
        np.testing.assert_allclose(row, exact, atol=0.085)
    assert result.kinds == ("psis-loo", "psis-loo")
    assert result.best == "flat"
    assert (result.max_pareto_k < 0.7).all()


def test_mistakes_are_named(x):
    with pytest.raises(InvalidData, match="no models"):
        compare({}, x)
    with pytest.raises(InvalidData, match="ArviZ data only and no x_test"):
        compare(FITS)
    with pytest.raises(InvalidData, match="unknown models"):
        compare(FITS, x, num_parameters={"nope": 3})
    with pytest.raises(UnsupportedModel, match="cannot ask a int"):
        compare({"three": 3}, x)
    with pytest.raises(InvalidData, match="is NaN"):
        compare({"right": lambda_density(math.nan)}, x)


def lambda_density(value):
    class Density:
        def log_prob(self, x):
            return torch.full(x.shape[:1], value)

    return Density()


def linear_gaussian(x):
    """z ~ N(0, 1), x | z ~ N(z, 1) per row, with a guide that is off by a little."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1) * 0.6, 0.7))

    covariance = torch.eye(2) + torch.ones(2, 2)
    return model, guide, dist.MultivariateNormal(torch.zeros(2), covariance)


def test_importance_sampled_evidence_is_marked_and_within_its_error(x):
    """5 standard errors, 300 particles; their stated error is the one seen over repetitions."""
    model, guide, exact = linear_gaussian(x)
    result = compare({"pair": (model, guide), "exact": exact}, x, num_samples=300)
    assert result.kinds == ("estimate", "exact")
    gap = result.log_prob[0] - result.log_prob[1]
    assert 0 < result.mc_errors[0] < 0.01
    assert abs(gap) < 5 * result.mc_errors[0]
    repeated = [compare({"pair": (model, guide)}, x[:50], num_samples=50) for _ in range(40)]
    seen = np.var([r.log_prob[0] for r in repeated], ddof=1)
    claimed = np.mean([r.mc_errors[0] ** 2 for r in repeated])
    assert abs(seen / claimed - 1) < 5 * math.sqrt(2 / 40)


def test_a_pair_needs_one_weight_per_row(x):
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None, None], torch.ones(x.shape)).to_event(2), obs=x)

    with pytest.raises(UnsupportedModel, match="one plate over the rows"):
        compare({"pair": (model, lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)))}, x, num_samples=2)


def test_unused_guides_of_pyro_are_refused(x):
    with pytest.raises(UnsupportedModel, match="log_evidence"):
        compare({"guide": AutoNormal(lambda x: None)}, x)
