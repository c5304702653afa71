# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Three latents in the guide, in EM and exact maximum likelihood, in the generator and the imputation."""

import numpy as np
import pyro
import pytest
import torch
from exact_pairs import Exact
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from pyro_cpa.criticism import CPADensity, impute
from pyro_cpa.distributions import CPAMarginal
from pyro_cpa.infer import EM, AutoCPAPosterior, ExactML
from pyro_cpa.models import CPAGenerator

# Units that never switch on these small data leave the last layer's normal matrix singular, which is said once.
pytestmark = pytest.mark.filterwarnings("ignore:the normal matrix")


def model_and_data(holes=False, rows=12):
    model = Exact(3, 4, 4, noise=0.6, seed=2)
    x = torch.randn(rows, 2) @ torch.randn(2, 4) + 0.3 * torch.randn(rows, 4)
    if holes:
        x[torch.rand(x.shape) < 0.3] = torch.nan
    return model, x


def test_loss_of_the_guide_is_the_evidence_at_every_draw():
    model, x = model_and_data(holes=True)
    guide = AutoCPAPosterior(model, decoder=model.decoder)
    expected = -CPAMarginal(model.decoder, model.noise).log_prob(x).sum().item()
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    assert svi.evaluate_loss(x) == pytest.approx(expected, rel=1e-10)
    assert svi.evaluate_loss(x) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("holes", [False, True])
def test_em_never_falls(holes):
    model, x = model_and_data(holes)
    em = EM(model, AutoCPAPosterior(model, decoder=model.decoder))
    losses = [em.step(x) for _ in range(3)] + [em.evaluate_loss(x)]
    assert all(b <= a + 1e-9 * abs(a) for a, b in zip(losses, losses[1:], strict=False))
    assert losses[-1] < losses[0] - 2
    expected = -CPAMarginal(model.decoder, model.noise).log_prob(x).sum().item()
    assert losses[-1] == pytest.approx(expected, rel=1e-10)


def test_exact_maximum_likelihood_climbs():
    model, x = model_and_data()
    fit = ExactML(model, AutoCPAPosterior(model, decoder=model.decoder), warm_start=0)
    before = fit.evaluate_loss(x)
    fit.step(x)
    assert fit.evaluate_loss(x) < before - 2


def test_generator_is_its_marginal():
    pyro.set_rng_seed(1)
    model = CPAGenerator(4, latent_dim=3, hidden_dims=(4,), noise="diagonal", noise_scale=0.5)
    x = model.generate(6).detach()
    x[0, 1] = torch.nan
    px = CPAMarginal(model.decoder, model.likelihood.scale)
    torch.testing.assert_close(model.log_prob(x), px.log_prob(x))
    torch.testing.assert_close(model.encode(x), px.posterior(x).mean)


def test_tabular_density_and_imputation():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(14, 2)) @ rng.normal(size=(2, 4)) + 0.3 * rng.normal(size=(14, 4))
    holed = x.copy()
    holed[0, 1] = holed[3, :2] = np.nan
    density = CPADensity(n_latent=3, hidden=(3,), solver="em", max_iter=1, random_state=0).fit(holed)
    assert np.isfinite(density.score_samples(holed)).all()
    assert density.transform(holed).shape == (14, 3)
    filled = impute(holed, density)
    mean = density.marginal().conditional(torch.as_tensor(holed)).mean.numpy()
    np.testing.assert_allclose(filled, mean, rtol=1e-8)
    observed = ~np.isnan(holed)
    np.testing.assert_array_equal(np.asarray(filled)[observed], x[observed])
