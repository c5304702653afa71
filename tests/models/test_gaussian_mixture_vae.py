# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The mixture VAE against sums over clusters written by hand, in all treatments of y."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.optim import Adam
from torch import nn

from pyro_cpa.errors import InvalidData, UnsupportedModel
from pyro_cpa.infer import AnalyticELBO
from pyro_cpa.models.cluster_accuracy import cluster_accuracy
from pyro_cpa.models.gaussian_mixture_vae import GaussianMixtureVAE
from pyro_cpa.models.likelihoods import Bernoulli, Normal

D, C, L, N = 6, 3, 2, 8


@pytest.fixture
def x():
    return torch.randint(2, (N, D)).double()


def small_gmvae(**options):
    return GaussianMixtureVAE(D, C, L, **{"hidden_dims": (7, 5), **options})


def pieces(gmvae, x, y):
    """Log-likelihood and log-ratio at one draw of z, divergence: each (C, N), for all y one-hot (C, 1, C)."""
    every = y.expand(C, N, C)
    networks = gmvae.networks
    q = networks.encoder(torch.cat([x.expand(C, N, D), every], -1))
    z = q.mean + q.stddev * torch.randn(C, N, L)
    if networks.prior_network is None:
        p = dist.Normal(torch.zeros(C, N, L), 1.0).to_event(1)
    else:
        p = networks.prior_network(every)
    outputs = networks.decoder(torch.cat([every, z], -1) if networks.decoder_sees_label else z)
    log_lik = (x * outputs - nn.functional.softplus(outputs)).sum(-1)
    ratio = (q.stddev / p.stddev) ** 2
    kl = ((ratio + ((q.mean - p.mean) / p.stddev) ** 2 - 1 - ratio.log()) / 2).sum(-1)
    return log_lik, q.log_prob(z) - p.log_prob(z), kl


def by_hand(gmvae, x, analytic=True):
    log_lik, log_ratio, kl = pieces(gmvae, x, torch.eye(C)[:, None])
    q_y = gmvae.classifier(x).softmax(-1)
    entropy = -(q_y * q_y.log()).sum()
    bound = (q_y.T * (log_lik - (kl if analytic else log_ratio))).sum() + entropy
    return bound - N * math.log(C), entropy


@pytest.mark.parametrize("label_in", ["prior", "decoder", "both"])
@pytest.mark.parametrize("objective, analytic", [(AnalyticELBO, True), (TraceEnum_ELBO, False)])
def test_enumerated_bound_and_gradients_equal_those_written_by_hand(label_in, objective, analytic, x):
    gmvae = small_gmvae(label_in=label_in)
    loss_fn = objective(max_plate_nesting=1)
    pyro.set_rng_seed(1)
    loss = loss_fn(gmvae.model, gmvae.guide)(x)
    loss.backward()
    grads = [p.grad.clone() for p in gmvae.parameters()]
    gmvae.zero_grad()
    pyro.set_rng_seed(1)
    bound, entropy = by_hand(gmvae, x, analytic)
    (-bound).backward()
    assert loss.item() == pytest.approx(-bound.item(), rel=1e-12)
    for grad, p in zip(grads, gmvae.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-9, atol=1e-11)
    if analytic:  # the divergence of y is log C minus the entropy
        assert loss_fn.kl_by_site["y"] == pytest.approx(N * math.log(C) - entropy.item(), rel=1e-11)


def test_all_treatments_of_y_agree_in_mean(x):
    """Enumerated or drawn: the same bound. Relaxed at a low temperature: a bound near it."""
    gmvae = small_gmvae()
    exact = AnalyticELBO(num_particles=2000, vectorize_particles=True)
    enumerated = torch.tensor([exact.loss(gmvae.model, gmvae.guide, x) for _ in range(8)])
    gmvae.clusters = "sample"
    sampled = Trace_ELBO(num_particles=2000, vectorize_particles=True)
    drawn = torch.tensor([sampled.loss(gmvae.model, gmvae.guide, x) for _ in range(8)])
    assert (enumerated.mean() - drawn.mean()).abs() < 5 * ((enumerated.var() + drawn.var()) / 8).sqrt()
    gmvae.clusters, gmvae.temperature = "relax", 0.01
    relaxed = torch.tensor([exact.loss(gmvae.model, gmvae.guide, x) for _ in range(8)])
    assert exact.analytic_sites == ("y", "z")
    error, bias = ((enumerated.var() + relaxed.var()) / 8).sqrt(), 2 * gmvae.temperature
    assert (enumerated.mean() - relaxed.mean()).abs() < bias + 5 * error


def test_relaxed_bounds_by_hand(x):
    gmvae = small_gmvae(clusters="relax")
    temperature = torch.tensor(0.5)
    for objective in (AnalyticELBO(), Trace_ELBO()):
        pyro.set_rng_seed(2)
        loss = objective.loss(gmvae.model, gmvae.guide, x)
        pyro.set_rng_seed(2)
        logits = gmvae.classifier(x)
        q_y = dist.RelaxedOneHotCategorical(temperature, logits=logits)
        y = q_y.rsample()
        q = gmvae.networks.encoder(torch.cat([x, y], -1))
        z = q.mean + q.stddev * torch.randn(N, L)
        p = gmvae.networks.prior_network(y)
        log_lik = Bernoulli()(gmvae.networks.decoder(z)).log_prob(x)
        if isinstance(objective, AnalyticELBO):
            kl_y = math.log(C) - dist.Categorical(logits=logits).entropy()
            cost = kl_y + torch.distributions.kl_divergence(q, p)
        else:
            p_y = dist.RelaxedOneHotCategorical(temperature, logits=torch.zeros(C))
            cost = q_y.log_prob(y) - p_y.log_prob(y) + q.log_prob(z) - p.log_prob(z)
        assert loss == pytest.approx((cost - log_lik).sum().item(), rel=1e-10)


@pytest.mark.parametrize("clusters", ["enumerate", "relax"])
def test_all_parameters_move_and_the_bound_rises(clusters, x):
    gmvae = small_gmvae(clusters=clusters)
    svi = SVI(gmvae.model, gmvae.guide, Adam({"lr": 0.02}), AnalyticELBO())
    score = AnalyticELBO(num_particles=50, vectorize_particles=True)
    start = [p.clone() for p in gmvae.parameters()]
    before = score.loss(gmvae.model, gmvae.guide, x)
    for _ in range(60):
        svi.step(x)
    assert score.loss(gmvae.model, gmvae.guide, x) < before
    assert not any(torch.equal(a, b) for a, b in zip(start, gmvae.parameters(), strict=True))


def test_labelled_rows_give_the_bound_on_the_joint(x):
    gmvae = small_gmvae(label_in="decoder")
    labels = torch.tensor([0, -1, 2, 1, -1, -1, 0, 2])
    known = labels >= 0
    elbo = AnalyticELBO(max_plate_nesting=1)
    pyro.set_rng_seed(3)
    loss = elbo(gmvae.model, gmvae.guide)(x, labels)
    loss.backward()
    grads = [p.grad.clone() for p in gmvae.parameters()]
    gmvae.zero_grad()
    pyro.set_rng_seed(3)
    log_lik, _, kl = pieces(gmvae, x, torch.eye(C)[:, None])
    q_y = gmvae.classifier(x).softmax(-1)
    free = (q_y.T * (log_lik - kl)).sum(0) - (q_y * q_y.log()).sum(-1)
    clamped = (log_lik - kl).gather(0, labels.clamp(min=0)[None])[0]
    expected = N * math.log(C) - torch.where(known, clamped, free).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for grad, p in zip(grads, gmvae.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-9, atol=1e-11)


def test_label_weight_adds_the_classifiers_own_term(x):
    labels = torch.tensor([0, -1, 2, 1, -1, -1, 0, 2])
    gmvae = small_gmvae()
    losses = []
    for gmvae.label_weight in (0.0, 2.5):
        pyro.set_rng_seed(3)
        losses.append(AnalyticELBO().loss(gmvae.model, gmvae.guide, x, labels))
    known = labels >= 0
    fit = -nn.functional.cross_entropy(gmvae.classifier(x)[known], labels[known], reduction="sum").item()
    assert losses[1] - losses[0] == pytest.approx(-2.5 * fit, rel=1e-10)


def test_labels_teach_the_classifier():
    labels = torch.arange(90) % C
    x = (torch.eye(C).repeat_interleave(2, 1)[labels] * 0.8 + 0.1).bernoulli()
    given = torch.where(torch.arange(90) < 30, labels, -1)
    gmvae = small_gmvae(label_in="decoder", label_weight=5.0)
    svi = SVI(gmvae.model, gmvae.guide, Adam({"lr": 0.02}), AnalyticELBO())
    for _ in range(80):
        svi.step(x, given)
    assert (gmvae.cluster(x) == labels)[30:].double().mean() > 0.8


def test_clusters_are_found():
    """Well-separated blobs, no labels: the Hungarian accuracy is near 1 from at least one of three starts."""
    truth = torch.arange(120) % C
    x = 4.0 * torch.eye(C)[truth] + 0.3 * torch.randn(120, C)
    accuracies = []
    for seed in range(3):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        gmvae = GaussianMixtureVAE(C, C, 2, hidden_dims=(16,), likelihood=Normal(0.5))
        svi = SVI(gmvae.model, gmvae.guide, Adam({"lr": 0.01}), AnalyticELBO())
        for _ in range(200):
            svi.step(x)
        accuracies.append(cluster_accuracy(gmvae.cluster(x), truth)[0])
        if accuracies[-1] > 0.95:
            break
    assert max(accuracies) > 0.95, accuracies


def test_methods(x):
    gmvae = small_gmvae()
    probs = gmvae.cluster_probs(x)
    torch.testing.assert_close(probs.sum(-1), torch.ones(N))
    assert torch.equal(gmvae.cluster(x), probs.argmax(-1))
    by_cluster = torch.stack([gmvae.encode(x, y) for y in range(C)], 1)
    torch.testing.assert_close(gmvae.encode(x), (probs[..., None] * by_cluster).sum(1))
    assert gmvae.generate(5).shape == gmvae.generate(5, y=1, mode="mean").shape == (5, D)
    assert gmvae.reconstruct(x).shape == (N, D)


def test_minibatch_stands_for_the_whole_set(x):
    gmvae, elbo = small_gmvae(), AnalyticELBO()
    losses = []
    for size in (None, 10 * N):
        pyro.set_rng_seed(1)
        losses.append(elbo.loss(gmvae.model, gmvae.guide, x, size=size))
    assert losses[1] == pytest.approx(10 * losses[0], rel=1e-12)


def test_defaults_are_those_of_the_tutorial():
    gmvae = GaussianMixtureVAE()
    assert gmvae.networks.encoder.hidden[0].weight.shape == (512, 794)
    assert gmvae.networks.decoder[-1].weight.shape == (784, 512) and not gmvae.networks.decoder[-1].bias.any()
    assert gmvae.classifier[-1].weight.shape == (10, 512)
    assert not any(isinstance(module, nn.Dropout) for module in gmvae.modules())


def test_float32(x):
    gmvae = small_gmvae().float()
    for gmvae.clusters in ("enumerate", "relax"):
        assert math.isfinite(AnalyticELBO().loss(gmvae.model, gmvae.guide, x))
    assert gmvae.encode(x).dtype == torch.float32


def test_bad_input(x):
    gmvae = small_gmvae()
    with pytest.raises(InvalidData, match="expected integers from 0 to 2, or -1 where there is none"):
        gmvae.guide(x, torch.full((N,), 3))
    with pytest.raises(InvalidData, match=r"expected \(8,\)"):
        gmvae.guide(x, torch.zeros(3))
    with pytest.raises(InvalidData, match="expected only 0 and 1"):
        gmvae.model(x + 0.5)
    with pytest.raises(InvalidData, match="choose 'enumerate', 'sample' or 'relax'"):
        gmvae.clusters = "sum"
    with pytest.raises(InvalidData, match="temperature is 0"):
        small_gmvae(temperature=0)
    gmvae.clusters = "relax"
    with pytest.raises(UnsupportedModel, match="Set clusters='enumerate'"):
        gmvae.guide(x, torch.zeros(N))
