# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The local guide beside the exact posterior where regions can be enumerated, and against itself where they cannot."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_pairs import Exact, circle
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from test_exact_guide_everywhere import OBJECTIVES
from torch import nn

from pyro_cpa.errors import CPAError, InvalidData, UnsupportedModel
from pyro_cpa.infer import AutoCPAPosterior, AutoLocalAffine, ImportanceWeightedELBO, log_evidence

NOISES = {"scalar": 0.4, "diagonal": [0.3, 0.6], "full": [[0.5, 0.0], [0.2, 0.3]]}


def pair(*sizes, num_regions=16, noise=0.5, seed=1, gain=1.0, **options):
    model = Exact(*sizes, noise=noise, seed=seed)
    for parameter in model.decoder.parameters():
        parameter.data *= gain
    exact = AutoCPAPosterior(model, decoder=model.decoder)
    return model, exact, AutoLocalAffine(model, model.decoder, num_regions, **options)


def holed(n=30):
    x = circle(n)
    x[torch.rand(x.shape) < 0.3] = torch.nan
    return x


def log_weights(exact, guide, x, S):
    """log p(x, z) - log q(z | x) of S draws, less the exact evidence."""
    q = guide.mixture(x)
    z = q.sample((S,))
    return exact.posterior(x).log_prob(z) - q.log_prob(z)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("latent_dim", [1, 3, 12])
@pytest.mark.parametrize("num_regions", [1, 5])
def test_one_region_is_exact(noise, latent_dim, num_regions):
    model = Exact(latent_dim, 2, noise=NOISES[noise])
    guide = AutoLocalAffine(model, model.decoder, num_regions)
    expected = AutoCPAPosterior(model, decoder=model.decoder).log_evidence(holed()).sum().item()
    for _ in range(3):
        assert abs(Trace_ELBO().loss(model, guide, holed()) + expected) < 1e-10 * abs(expected)


@pytest.mark.parametrize("sizes", [(1, 6, 2), (1, 6, 6, 2), (2, 5, 2), (2, 6, 4, 2)])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("noise", NOISES)
def test_the_mode_is_the_exact_one(sizes, holes, noise):
    _, exact, guide = pair(*sizes, num_regions=256, noise=NOISES[noise])
    x = holed() if holes else circle(30)
    posterior = exact.posterior(x)
    found, best = posterior.log_prob(guide.mode(x)), posterior.log_prob(posterior.mode)
    assert bool((found <= best + 1e-9).all())
    # Starts are random, and a summit with a narrow basin may have had none.
    assert (found < best - 1e-9).sum() <= 2


@pytest.mark.parametrize("sizes", [(1, 8, 8, 3), (2, 8, 8, 3), (8, 30, 30, 20), (20, 40, 30)])
def test_every_ascent_ends_on_a_summit(sizes):
    """No step in any direction leads up, on walls too: 2000 of them for each point."""
    model = Exact(*sizes, noise=0.3, activation=nn.ReLU)
    x = model.decoder(torch.randn(20, sizes[0])).detach() + 0.3 * torch.randn(20, sizes[-1])
    mode = AutoLocalAffine(model, model.decoder, max_steps=1000).mode(x)

    def log_joint(z):
        return -0.5 * (x - model.decoder(z)).square().sum(-1) / 0.09 - 0.5 * z.square().sum(-1)

    for size in (1e-3, 1e-5):
        step = torch.randn(2000, *mode.shape)
        higher = log_joint(mode + size * step / step.norm(dim=-1, keepdim=True)) > log_joint(mode) + 1e-9
        assert not bool(higher.any())


@pytest.mark.parametrize(
    ("sizes", "elbo_gap", "iwae_gap"), [((1, 6, 2), 0.06, 0.005), ((2, 5, 2), 0.6, 0.03)]
)
def test_gaps_are_small_and_in_order(sizes, elbo_gap, iwae_gap):
    _, exact, guide = pair(*sizes, gain=0.4)
    log_w = log_weights(exact, guide, circle(10), 20_000)
    elbo, error = log_w.mean(0), log_w.std(0) / 20_000**0.5
    iwae = (log_w.reshape(2_000, 10, -1).logsumexp(1) - math.log(10)).mean(0)
    assert bool((elbo < 5 * error).all()) and bool((iwae < 5 * error).all()) and bool((elbo < iwae).all())
    assert -elbo.mean() < elbo_gap and -iwae.mean() < iwae_gap


@pytest.mark.parametrize("sizes", [(1, 6, 2), (2, 5, 2)])
@pytest.mark.parametrize("num_regions", [1, 8])
def test_importance_weights_average_to_the_evidence(sizes, num_regions):
    model, exact, guide = pair(*sizes, num_regions=num_regions, defensive=0.05)
    x = holed(10)
    found = log_evidence(model, guide, x, num_particles=20_000)
    ratio = (found.log_prob - exact.log_evidence(x)).exp() - 1
    assert not found.exact and bool((ratio.abs() <= 5 * found.standard_error).all())


def test_the_prior_in_the_mixture_bounds_the_weights():
    model, exact, guide = pair(1, 6, 2, num_regions=2, noise=0.1, defensive=0.01)
    x = circle(20)
    z = 10 * torch.randn(5_000, 20, 1)
    log_w = exact.posterior(x).log_prob(z) + exact.log_evidence(x) - guide.mixture(x).log_prob(z)
    highest = dist.Normal(torch.zeros(2), 0.1).log_prob(torch.zeros(2)).sum()
    bound = highest - math.log(0.01)
    assert bool((log_w <= bound + 1e-9).all())
    # Without it they have no bound, and are higher than that somewhere.
    bare = AutoLocalAffine(model, model.decoder, 2, defensive=0.0).mixture(x)
    z = torch.linspace(-8, 8, 4_000)[:, None, None].expand(-1, 20, 1)
    log_w = exact.posterior(x).log_prob(z) + exact.log_evidence(x) - bare.log_prob(z)
    assert bool((log_w > bound).any())


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("subsample_size", [None, 4])
def test_every_objective_takes_it(name, vectorize, subsample_size):
    model = Exact(3, 8, 2, subsample_size=subsample_size)
    guide = AutoLocalAffine(model, model.decoder, 3)
    objective = OBJECTIVES[name](vectorize_particles=vectorize)
    loss = objective.loss_and_grads(model, guide, holed(9))
    assert math.isfinite(loss)
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())


def test_the_gradient_of_the_elbo_is_that_at_fixed_q():
    """Against quadrature: the derivative of E_q[log p(x, z)] - E_q[log q] with q held."""
    model, _, guide = pair(1, 5, 2, num_regions=4)
    x, copies = circle(6), 10
    q = guide.mixture(x)
    z = torch.linspace(-9, 9, 18_001)[:, None, None].expand(-1, 6, 1)
    weight = q.log_prob(z).exp() * 1e-3
    log_p = model.likelihood(model.decoder(z)).log_prob(x)
    targets = torch.autograd.grad(-(weight * log_p).sum(), list(model.parameters()))
    target = copies * torch.cat([g.flatten() for g in targets])
    x = x.repeat(copies, 1)  # that many draws of each row in one
    for elbo in (Trace_ELBO(20, vectorize_particles=True), ImportanceWeightedELBO(1, "score")):
        draws = []
        for _ in range(30 if isinstance(elbo, Trace_ELBO) else 60):
            model.zero_grad()
            elbo.loss_and_grads(model, guide, x)
            draws.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        draws = torch.stack(draws)
        error = draws.std(0) / len(draws) ** 0.5
        assert bool(((draws.mean(0) - target).abs() <= 5 * error + 1e-6).all())


def test_the_gradient_of_many_particles_is_that_of_the_evidence():
    model, exact, guide = pair(2, 5, 2, gain=0.4)
    x = circle(8)
    targets = torch.autograd.grad(-exact.log_evidence(x).sum(), list(model.parameters()))
    target = torch.cat([g.flatten() for g in targets])
    draws = []
    for _ in range(20):
        model.zero_grad()
        ImportanceWeightedELBO(2_000, "vimco", vectorize_particles=True).loss_and_grads(model, guide, x)
        draws.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    draws = torch.stack(draws)
    error = draws.std(0) / 20**0.5
    # Self-normalised weights are biased by O(1 / K).
    assert bool(((draws.mean(0) - target).abs() <= 5 * error + 2e-3 * target.abs().max()).all())


def test_training_raises_the_evidence():
    model, exact, guide = pair(2, 6, 2, num_regions=4)
    x = circle(40)
    before = exact.log_evidence(x).sum().item()
    svi = SVI(
        model,
        guide,
        pyro.optim.Adam({"lr": 0.05}),
        ImportanceWeightedELBO(8, "vimco", vectorize_particles=True),
    )
    for _ in range(40):
        svi.step(x)
    assert exact.log_evidence(x).sum().item() > before + 20


def test_a_missing_column_is_a_model_without_it():
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5))
    shorter = copy.deepcopy(decoder)
    shorter[2] = nn.Linear(12, 4)
    shorter[2].weight.data, shorter[2].bias.data = decoder[2].weight.data[:4], decoder[2].bias.data[:4]

    def model_of(net):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).to_event(1))
                pyro.sample("x", dist.NanMaskedNormal(net(z), 0.4).to_event(1), obs=x)

        return model

    x = torch.randn(7, 5)
    x[:, 4] = torch.nan
    whole = AutoLocalAffine(model_of(decoder), decoder).mixture(x)
    part = AutoLocalAffine(model_of(shorter), shorter).mixture(x[:, :4])
    for a, b in zip(parameters(whole), parameters(part), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    x[3] = torch.nan  # nothing is known of this row: the posterior is the prior
    nothing = AutoLocalAffine(model_of(decoder), decoder, defensive=0).mixture(x)
    torch.testing.assert_close(nothing.mean[3], torch.zeros(6))
    torch.testing.assert_close(nothing.component_distribution.covariance_matrix[3, 0], torch.eye(6))


def parameters(q):
    return q.mixture_distribution.logits, q.component_distribution.mean, q.component_distribution.scale_tril


def test_chunks_and_dtypes_change_nothing_but_rounding():
    model = Exact(5, 12, 3, noise=0.4)
    x = torch.randn(11, 3)
    whole = AutoLocalAffine(model, model.decoder)
    small = AutoLocalAffine(model, model.decoder, memory_budget=20_000)
    for a, b in zip(parameters(whole.mixture(x)), parameters(small.mixture(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    single = Exact(5, 12, 3, noise=0.4).float()
    guide = AutoLocalAffine(single, single.decoder, 4)
    assert guide.mixture(x.float()).sample().dtype == torch.float32
    assert math.isfinite(Trace_ELBO().loss(single, guide, x.float()))


def test_components_are_distinct_and_kept_until_something_changes():
    model, _, guide = pair(2, 8, 2, num_regions=12)
    x = circle(10)
    q = guide.mixture(x)
    assert guide.mixture(x) is q
    used = q.mixture_distribution.probs[:, :-1] > 0
    assert bool(used.any(-1).all()) and bool((~used).any())
    for row in range(10):
        covariances = q.component_distribution.scale_tril[row, :-1][used[row]]
        assert len(covariances.flatten(1).unique(dim=0)) == len(covariances)
    with torch.no_grad():
        model.decoder[0].bias += 0.1
    assert guide.mixture(x) is not q
    assert guide.mixture(x + 1e-9) is not guide.mixture(x)
    twin = copy.deepcopy(guide)
    torch.testing.assert_close(twin.mode(x).shape, guide.mode(x).shape)


def test_bad_input_is_refused():
    model, _, _ = pair(1, 4, 2)
    for arguments in ({"num_regions": 0}, {"max_steps": 0}, {"defensive": 1.0}, {"defensive": -0.1}):
        with pytest.raises(InvalidData, match="expected"):
            AutoLocalAffine(model, model.decoder, **arguments)
    x = circle(10)
    x[2, 1] = torch.inf
    with pytest.raises(InvalidData, match="row 2, column 1"):
        AutoLocalAffine(model, model.decoder).mixture(x)
    with pyro.validation_enabled(False), pytest.raises(InvalidData, match="noise must be finite"):
        model.likelihood = lambda mean: dist.NanMaskedNormal(mean, torch.tensor([0.5, 0.0])).to_event(1)
        AutoLocalAffine(model, model.decoder).mixture(circle(10))
    smooth = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 2))
    model = Exact(1, 4, 2)
    model.decoder = smooth
    with pytest.raises(CPAError, match="Tanh"):
        AutoLocalAffine(model, smooth).mixture(circle(10))
    with pytest.raises(UnsupportedModel, match="not decoder"):
        AutoLocalAffine(model, Exact(1, 4, 2).decoder).mixture(circle(10))


def test_mean_field_elbo_samples_its_divergence():
    model, exact, guide = pair(1, 5, 2)
    x = circle(10)
    pyro.set_rng_seed(0)
    loss = Trace_ELBO(50, vectorize_particles=True).loss(model, guide, x)
    assert loss > -exact.log_evidence(x).sum() - 5
    with pytest.raises(NotImplementedError):  # as for any guide without reparameterised draws
        TraceMeanField_ELBO().loss(model, guide, x)
