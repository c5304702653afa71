# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Every source of draws reaches ArviZ with the right numbers under the right labels, in either version."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive
from pyro.infer.autoguide import AutoDelta, AutoNormal
from scipy import stats

from pyro_cpa.criticism import to_arviz
from pyro_cpa.criticism._arviz_versions import import_arviz, is_arviz_data, pointwise_loo
from pyro_cpa.errors import InvalidData, UnsupportedModel

matplotlib.use("agg")

az = import_arviz()
# ArviZ 0.23 sorts its comparison table with a keyword that pandas 3 deprecates.
ARVIZ_ITSELF = "ignore:The inplace keyword in DataFrame.sort_values"
N, D, L = 6, 3, 2
DATA = torch.linspace(-1.0, 2.0, N * D, dtype=torch.float64).reshape(N, D)


def factor_model(x, scale=0.7):
    """A global mean, a local latent per row, a deterministic site, and rows as events."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([L]).to_event(1))
        centre = pyro.deterministic("centre", mean + z.sum(-1, keepdim=True), event_dim=1)
        return pyro.sample("x", dist.Normal(centre, scale).to_event(1), obs=x)


def cell_model(x):
    """Two crossed plates: the observation is a cell, and one site sits on the outer plate alone."""
    rows, columns = x.shape
    with pyro.plate("column", columns, dim=-1):
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    with pyro.plate("row", rows, dim=-2):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("column_again", columns, dim=-1):
            pyro.sample("x", dist.Normal(level + offset, 1.0), obs=x)


def conjugate_model(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def group(data, name):
    return {key: data[name][key] for key in data[name].data_vars}


def assert_complete(data, chains, draws):
    assert is_arviz_data(data)
    for name in ("posterior", "posterior_predictive", "log_likelihood", "sample_stats"):
        for key, array in group(data, name).items():
            assert array.dims[:2] == ("chain", "draw"), (name, key)
            assert array.shape[:2] == (chains, draws), (name, key)
    assert set(group(data, "observed_data")) == set(group(data, "posterior_predictive"))


def test_type_follows_the_installed_version():
    data = to_arviz(AutoDelta(conjugate_model), DATA[:, 0], model=conjugate_model, num_samples=4)
    expected = "DataTree" if int(az.__version__.split(".")[0]) >= 1 else "InferenceData"
    assert type(data).__name__ == expected


def test_guide_groups_dims_and_coords():
    guide = AutoNormal(factor_model)
    data = to_arviz(
        guide,
        DATA,
        model=factor_model,
        num_samples=8,
        prior_samples=5,
        dims={"z": ["latent"], "x": ["feature"]},
        coords={"data": list("abcdef"), "feature": ["f0", "f1", "f2"]},
    )
    assert_complete(data, 1, 8)
    assert data["posterior"]["z"].dims == ("chain", "draw", "data", "latent")
    assert data["posterior"]["mean"].dims == ("chain", "draw", "mean_dim_0")
    assert data["posterior"]["centre"].shape == (1, 8, N, D)
    assert data["posterior_predictive"]["x"].dims == ("chain", "draw", "data", "feature")
    assert data["log_likelihood"]["x"].dims == ("chain", "draw", "data")
    assert data["observed_data"]["x"].dims == ("data", "feature")
    assert data["prior"]["z"].shape == (1, 5, N, L)
    assert data["prior_predictive"]["x"].shape == (1, 5, N, D)
    assert list(data["posterior"]["z"].coords["data"].values) == list("abcdef")
    assert list(data["observed_data"]["x"].coords["feature"].values) == ["f0", "f1", "f2"]
    np.testing.assert_array_equal(data["observed_data"]["x"].values, DATA.numpy())
    assert data["log_likelihood"].attrs["latents"] == "conditioned on"


def test_numbers_of_a_guide_are_those_of_the_draws():
    guide = AutoNormal(factor_model)
    data = to_arviz(guide, DATA, model=factor_model, num_samples=7)
    mean, z = data["posterior"]["mean"].values[0], data["posterior"]["z"].values[0]
    centre = mean[:, None, :] + z.sum(-1, keepdims=True)
    np.testing.assert_allclose(data["posterior"]["centre"].values[0], centre, rtol=1e-12)
    ll = stats.norm.logpdf(DATA.numpy(), centre, 0.7).sum(-1)
    np.testing.assert_allclose(data["log_likelihood"]["x"].values[0], ll, rtol=1e-12)
    lp = ll.sum(-1) + stats.norm.logpdf(mean).sum(-1) + stats.norm.logpdf(z).sum((-1, -2))
    np.testing.assert_allclose(data["sample_stats"]["lp"].values[0], lp, rtol=1e-12)
    loc, scale = (guide.locs, guide.scales)
    log_q = sum(
        stats.norm.logpdf(value, getattr(loc, name).detach(), getattr(scale, name).detach())
        .reshape(7, -1)
        .sum(-1)
        for name, value in (("mean", mean), ("z", z))
    )
    np.testing.assert_allclose(data["sample_stats"]["log_weight"].values[0], lp - log_q, rtol=1e-10)


def test_posterior_predictive_and_prior_predictive_follow_their_laws():
    """x - centre ~ N(0, 0.7^2) given a draw; a priori Var x = 1 + L + 0.49. Five standard errors."""
    data = to_arviz(AutoNormal(factor_model), DATA, model=factor_model, num_samples=100, prior_samples=200)
    noise = data["posterior_predictive"]["x"].values - data["posterior"]["centre"].values
    count = noise.size
    assert abs(noise.mean()) < 5 * 0.7 / math.sqrt(count)
    assert abs(noise.var() - 0.49) < 5 * 0.49 * math.sqrt(2 / count)
    square = (data["prior_predictive"]["x"].values[0] ** 2).mean((-1, -2))
    assert abs(square.mean() - 3.49) < 5 * square.std() / math.sqrt(200)


def test_mcmc_chains_divergences_and_loo_against_the_closed_form():
    """Conjugate normal mean: the leave-one-out density is N(x_n; sum_others / N, 1 + 1 / N)."""
    x = DATA[:, 0]
    # Steps of 1.7 deviations of the posterior: nearly independent draws, and nothing to adapt.
    kernel = NUTS(conjugate_model, step_size=0.65, adapt_step_size=False, adapt_mass_matrix=False)
    mcmc = MCMC(kernel, num_samples=500, warmup_steps=10, disable_progbar=True)
    mcmc.run(x)
    data = to_arviz(mcmc, prior_samples=0)
    assert_complete(data, 1, 500)
    assert mcmc.diagnostics()["mean"]["n_eff"] > 250
    assert "prior" not in data
    assert data["sample_stats"]["diverging"].dtype == bool
    assert data["log_likelihood"].attrs["latents"] == "integrated out"
    elpd, pareto_k = pointwise_loo(data)
    others = x.sum() - x
    exact = dist.Normal(others / N, math.sqrt(1 + 1 / N)).log_prob(x).numpy()
    # With an effective size of 250 the standard error of each term is below 0.04.
    assert np.abs(elpd - exact).max() < 0.2
    assert pareto_k.max() < 0.7


class _FinishedMCMC(MCMC):
    """Two chains of given draws, one divergence, without running a sampler."""

    def __init__(self, model, draws, *args):
        super().__init__(NUTS(model), num_samples=draws["mean"].shape[1], num_chains=1, warmup_steps=0)
        self._samples, self._args, self._kwargs, self.num_chains = draws, args, {}, 2

    def diagnostics(self):
        return {"divergences": {"chain 0": [], "chain 1": [2]}}


def test_chains_stay_apart():
    draws = {"mean": torch.arange(8.0).reshape(2, 4)}
    data = to_arviz(_FinishedMCMC(conjugate_model, draws, DATA[:, 0]), prior_samples=0)
    np.testing.assert_array_equal(data["posterior"]["mean"].values, draws["mean"])
    expected = stats.norm.logpdf(DATA[:, 0].numpy(), draws["mean"].numpy()[..., None])
    np.testing.assert_allclose(data["log_likelihood"]["x"].values, expected, rtol=1e-12)
    assert data["sample_stats"]["diverging"].values.tolist() == [[False] * 4, [False, False, True, False]]


def test_predictive_dictionary_loses_its_padding_and_keeps_its_predictions():
    guide = AutoNormal(factor_model)
    guide(DATA)
    draws = Predictive(poutine.uncondition(factor_model), guide=guide, num_samples=9)(DATA)
    data = to_arviz(draws, DATA, model=factor_model)
    assert_complete(data, 1, 9)
    np.testing.assert_array_equal(data["posterior"]["z"].values[0], draws["z"].detach().reshape(9, N, L))
    np.testing.assert_array_equal(data["posterior_predictive"]["x"].values[0], draws["x"].detach())
    assert data["posterior"]["mean"].shape == (1, 9, D)


def test_crossed_plates_name_axes_and_padding_goes():
    data = to_arviz(AutoNormal(cell_model), DATA, model=cell_model, num_samples=3, prior_samples=2)
    assert data["posterior"]["level"].dims == ("chain", "draw", "row")
    assert data["posterior"]["offset"].dims == ("chain", "draw", "column")
    assert data["log_likelihood"]["x"].dims == ("chain", "draw", "row", "column_again")


@pytest.mark.filterwarnings(ARVIZ_ITSELF)
def test_a_fit_with_an_exact_evidence_gives_it_to_arviz():
    """Factor analysis with fixed loadings stands for every guide that knows log p(x)."""
    loading = torch.tensor([[1.0, 0.3, -0.5]])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
            pyro.sample("x", dist.Normal(z @ loading, 1.0).to_event(1), obs=x)

    covariance = torch.eye(D) + loading.T @ loading

    class Fit:
        def __init__(self):
            self.model, self.guide = model, self

        def log_evidence(self, x):
            return dist.MultivariateNormal(torch.zeros(D), covariance).log_prob(x)

        def __call__(self, x):
            precision = 1 + (loading**2).sum()
            with pyro.plate("data", len(x)):
                mean = x @ loading.T / precision
                return {"z": pyro.sample("z", dist.Normal(mean, precision**-0.5).to_event(1))}

    fit = Fit()
    exact = fit.log_evidence(DATA)
    data = to_arviz(fit, DATA, num_samples=100)
    assert data["log_likelihood"].attrs["latents"] == "integrated out"
    values = data["log_likelihood"]["x"].values[0]
    np.testing.assert_allclose(values, exact.expand(100, N), rtol=1e-12)
    # The guide is the posterior: log p(x, z) - log q(z) is the evidence in every draw.
    np.testing.assert_allclose(data["sample_stats"]["log_weight"].values, exact.sum(), rtol=1e-12)
    elpd, pareto_k = pointwise_loo(data)
    np.testing.assert_allclose(elpd, exact, rtol=1e-11)
    assert pareto_k.max() < 0.5
    table = az.compare({"exact": data, "again": to_arviz(fit, DATA, num_samples=100)})
    assert len(table) == 2


def test_a_distribution_over_latents():
    posterior = dist.Normal(torch.arange(8.0).reshape(4, 2), 1e-3).to_event(1)
    data = to_arviz(posterior, num_samples=11, dims={"z": ["latent"]})
    assert data["posterior"]["z"].dims == ("chain", "draw", "data", "latent")
    assert data["sample_stats"]["lp"].dims == ("chain", "draw", "data")
    z = torch.as_tensor(data["posterior"]["z"].values[0])
    np.testing.assert_allclose(data["sample_stats"]["lp"].values[0], posterior.log_prob(z), rtol=1e-12)


def conjugate_draws(x, count):
    return {"mean": dist.Normal(x.sum() / (N + 1), (N + 1) ** -0.5).sample([count])}


@pytest.mark.filterwarnings(ARVIZ_ITSELF, "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_arviz_functions_accept_the_result():
    """Summary, comparison and plots of either version; what ArviZ itself warns about is its own affair."""
    x = DATA[:, 0]
    data, again = (to_arviz(conjugate_draws(x, 500), x, model=conjugate_model) for _ in range(2))
    assert "mean" in az.summary(data).index
    assert len(az.compare({"first": data, "second": again})) == 2
    loo = az.loo(data, pointwise=True)
    assert 0 < (loo.p if hasattr(loo, "p") else loo.p_loo) < 1.5
    az.plot_trace(data)
    az.plot_forest(data)
    if hasattr(az, "plot_ppc_dist"):
        az.plot_ppc_dist(data, num_samples=20)
    else:
        az.plot_ppc(data, num_pp_samples=20)
    az.plot_khat(loo)
    matplotlib.pyplot.close("all")


def test_masked_rows_count_nothing_and_scales_stay_out():
    mask = torch.tensor([True, False, True, True, False, True])

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=3.0), pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    x = DATA[:, 0]
    data = to_arviz({"mean": torch.zeros(2)}, x, model=model)
    expected = torch.where(mask, dist.Normal(0.0, 1.0).log_prob(x), torch.tensor(0.0))
    np.testing.assert_allclose(data["log_likelihood"]["x"].values[0, 0], expected, rtol=1e-12)


def test_names_that_arviz_forbids():
    def model(x):
        scale = pyro.sample("block/scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("chain", len(x)):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    data = to_arviz(AutoNormal(model), DATA[:, 0], num_samples=3)
    assert set(group(data, "posterior")) == {"block.scale"}
    assert data["log_likelihood"]["x"].dims == ("chain", "draw", "chain_plate")


def test_nothing_leaks_out():
    state = torch.get_default_dtype(), set(pyro.get_param_store().keys())
    x = DATA[:, 0]
    with poutine.trace() as outer:
        to_arviz({"mean": torch.zeros(2)}, x, model=conjugate_model)
    assert not [n for n in outer.trace.nodes if not n.startswith("_")]
    assert (torch.get_default_dtype(), set(pyro.get_param_store().keys())) == state


def test_mistakes_are_named():
    x = DATA[:, 0]

    def subsampled(x):
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[rows])

    with pytest.raises(UnsupportedModel, match="plate 'data' is subsampled"):
        to_arviz(AutoNormal(subsampled), x, model=subsampled)
    with pytest.raises(UnsupportedModel, match="pass model="):
        to_arviz({"mean": torch.zeros(2)}, x)
    with pytest.raises(UnsupportedModel, match="cannot read a int"):
        to_arviz(3, x, model=conjugate_model)
    with pytest.raises(UnsupportedModel, match=r"lacks the model's latent site\(s\) \['mean'\]"):
        to_arviz(lambda x: None, x, model=conjugate_model)
    with pytest.raises(UnsupportedModel, match="dictionary of draws lacks"):
        to_arviz({"x": torch.zeros(3, N)}, x, model=conjugate_model)
    with pytest.raises(InvalidData, match="draws of site 'mean'"):
        to_arviz({"mean": torch.zeros(3, 2)}, x, model=conjugate_model)
    with pytest.raises(InvalidData, match="one common leading dimension"):
        to_arviz({"mean": torch.zeros(3), "x": torch.zeros(2, N)}, x, model=conjugate_model)
    with pytest.raises(InvalidData, match="names 2 event dimensions of site 'mean'"):
        to_arviz({"mean": torch.zeros(3)}, x, model=conjugate_model, dims={"mean": ["a", "b"]})
    with pytest.raises(InvalidData, match="unknown site"):
        to_arviz({"mean": torch.zeros(3)}, x, model=conjugate_model, dims={"nope": ["a"]})
    with pytest.raises(InvalidData, match="number of labels"):
        to_arviz({"mean": torch.zeros(3)}, x, model=conjugate_model, coords={"data": ["a"]})
