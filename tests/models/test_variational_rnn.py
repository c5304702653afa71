# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The variational recurrent net against a bound written by hand, and what its masks and guides promise."""

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn

from pyro_cpa.errors import InvalidData
from pyro_cpa.infer import AnalyticELBO
from pyro_cpa.models.likelihoods import Bernoulli, Categorical, Normal
from pyro_cpa.models.vae import VAE
from pyro_cpa.models.variational_rnn import VariationalRNN

N, T, D, L, H = 5, 4, 3, 2, 6
LENGTHS = torch.tensor([4, 1, 3, 2, 4])
GUIDES = ["filtering", "smoothing"]


@pytest.fixture
def x():
    return torch.randint(2, (N, T, D)).double()


def small_vrnn(inference="filtering", **options):
    return VariationalRNN(D, L, inference=inference, **{"rnn_dim": H, "hidden_dims": (7,), **options})


def by_hand(vrnn, x, lengths):
    """Reconstruction and divergences, (N, T) each, with torch's own LSTM run over growing prefixes."""
    networks = vrnn.networks
    z, rec, kl = [], [], []
    for t in range(x.shape[1]):
        if t:
            past = torch.cat([x[:, :t], torch.stack(z, 1)], -1)
            h = networks.rnn(past.transpose(0, 1))[0][-1]
        else:
            h = torch.zeros(len(x), H)
        if networks.backward_rnn is None:
            seen = x[:, t]
        else:  # each future alone, from its true end back to t
            seen = torch.zeros(len(x), H)
            for n, length in enumerate(lengths.tolist()):
                if t < length:
                    seen[n] = networks.backward_rnn(x[n : n + 1, t:length].flip(1))[0][0, -1]
        q, p = networks.encoder(torch.cat([h, seen], -1)), networks.prior(h)
        z.append(q.mean + q.stddev * torch.randn(len(x), L))
        outputs = networks.decoder(torch.cat([h, z[-1]], -1))
        rec.append((x[:, t] * outputs - nn.functional.softplus(outputs)).sum(-1))
        ratio = (q.stddev / p.stddev) ** 2
        kl.append(((ratio + ((q.mean - p.mean) / p.stddev) ** 2 - 1 - ratio.log()) / 2).sum(-1))
    return torch.stack(rec, 1), torch.stack(kl, 1)


@pytest.mark.parametrize("inference", GUIDES)
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "varying"])
@pytest.mark.parametrize("objective", [AnalyticELBO, TraceMeanField_ELBO])
def test_bound_and_gradients_equal_those_written_by_hand(inference, lengths, objective, x):
    vrnn = small_vrnn(inference)
    pyro.set_rng_seed(1)
    loss_fn = objective()
    loss = loss_fn(vrnn.model, vrnn.guide)(x, lengths)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in vrnn.named_parameters()}
    vrnn.zero_grad()
    pyro.set_rng_seed(1)
    full = torch.full((N,), T) if lengths is None else lengths
    rec, kl = by_hand(vrnn, x, full)
    keep = torch.arange(T) < full[:, None]
    expected = (kl - rec)[keep].sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for name, p in vrnn.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-9, atol=1e-12)
    if objective is AnalyticELBO:
        per_step = {f"z_{t}": kl[:, t][keep[:, t]].sum().item() for t in range(T)}
        assert loss_fn.kl_by_site == pytest.approx(per_step, rel=1e-11)


@pytest.mark.parametrize("inference", GUIDES)
def test_what_stands_beyond_the_length_does_not_matter(inference, x):
    vrnn = small_vrnn(inference)
    padded = torch.where((torch.arange(T) < LENGTHS[:, None])[..., None], x, math.nan)
    losses = []
    for data in (x, padded):
        pyro.set_rng_seed(1)
        losses.append(AnalyticELBO().loss(vrnn.model, vrnn.guide, data, LENGTHS))
    assert losses[0] == losses[1]
    assert (vrnn.kl_per_step(padded, LENGTHS)[torch.arange(T) >= LENGTHS[:, None]] == 0).all()


@pytest.mark.parametrize("inference", GUIDES)
def test_masked_end_equals_a_shorter_sequence(inference, x):
    vrnn = small_vrnn(inference)
    losses = []
    for data, lengths in ((x, torch.full((N,), 2)), (x[:, :2], None)):
        pyro.set_rng_seed(1)
        losses.append(Trace_ELBO().loss(vrnn.model, vrnn.guide, data, lengths))
    assert losses[0] == pytest.approx(losses[1], rel=1e-13)


def test_only_the_smoothing_guide_sees_the_future(x):
    changed = x.clone()
    changed[:, 2] = 1 - changed[:, 2]
    for inference, sees in zip(GUIDES, (False, True), strict=True):
        vrnn = small_vrnn(inference)
        before, after = vrnn.encode(x), vrnn.encode(changed)
        assert torch.equal(before[:, :2], after[:, :2]) is not sees
        assert not torch.equal(before[:, 2], after[:, 2])


def test_one_step_is_a_vae_with_a_constant_learned_prior(x):
    vrnn = small_vrnn()
    vae = VAE(D, L, hidden_dims=(7,), likelihood=Bernoulli(), dropout=0.0)
    state = vae.state_dict()
    for name, value in vrnn.networks.state_dict().items():
        if name in state:
            state[name] = value[:, H:] if name.endswith(("hidden.0.weight", "decoder.0.weight")) else value
    vae.load_state_dict(state)
    for layer in (vrnn.networks.prior.loc[0], vrnn.networks.prior.raw_scale[0]):
        nn.init.zeros_(layer.weight)
    nn.init.zeros_(vrnn.networks.prior.loc[0].bias)
    nn.init.constant_(vrnn.networks.prior.raw_scale[0].bias, math.log(math.e - 1))
    for objective in (Trace_ELBO(), AnalyticELBO()):
        losses = []
        for pair, data in ((vrnn, x[:, :1]), (vae, x[:, 0])):
            pyro.set_rng_seed(1)
            losses.append(objective.loss(pair.model, pair.guide, data))
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_reconstruction_trains_the_encoder(x):
    """With draws cut from the graph, this gradient would be zero."""
    vrnn, first = small_vrnn(), x[:, :1]
    AnalyticELBO()(vrnn.model, vrnn.guide)(first).backward()
    full = vrnn.networks.encoder.loc[0].weight.grad.clone()
    vrnn.zero_grad()
    _, kl = by_hand(vrnn, first, torch.ones(N).long())  # with one step it does not depend on the draw
    kl.sum().backward()
    assert (full - vrnn.networks.encoder.loc[0].weight.grad).norm() > 1e-3


def test_vectorised_particles_and_minibatches(x):
    vrnn = small_vrnn()
    one, many = AnalyticELBO(), AnalyticELBO(num_particles=100, vectorize_particles=True)
    draws = torch.tensor([one.loss(vrnn.model, vrnn.guide, x, LENGTHS) for _ in range(100)])
    error = draws.std() * (2 / 100) ** 0.5
    assert abs(many.loss(vrnn.model, vrnn.guide, x, LENGTHS) - draws.mean()) < 5 * error
    losses = []
    for size in (None, 10 * N):
        pyro.set_rng_seed(1)
        losses.append(one.loss(vrnn.model, vrnn.guide, x, size=size))
    assert losses[1] == pytest.approx(10 * losses[0], rel=1e-12)


def test_training_keeps_the_latents_alive():
    """Sequences whose rows repeat one of four random patterns: worth two bits of latent information."""
    codes = torch.randint(4, (40,))
    x = torch.randint(2, (4, 8)).double()[codes][:, None].expand(40, 3, 8)
    vrnn = VariationalRNN(8, 2, rnn_dim=16, hidden_dims=(32,))
    svi = SVI(vrnn.model, vrnn.guide, Adam({"lr": 0.01}), AnalyticELBO())
    before = svi.evaluate_loss(x)
    start = [p.clone() for p in vrnn.parameters()]
    for _ in range(120):
        svi.step(x)
    elbo = AnalyticELBO(num_particles=20, vectorize_particles=True)
    assert elbo.loss(vrnn.model, vrnn.guide, x) < 0.5 * before
    assert elbo.kl_by_site["z_0"] > 40 * 0.5 and min(elbo.kl_by_site.values()) >= 0
    assert vrnn.kl_per_step(x).shape == (40, 3) and (vrnn.kl_per_step(x) >= 0).all()
    moved = [not torch.equal(a, b) for a, b in zip(start, vrnn.parameters(), strict=True)]
    assert all(moved)
    # What follows a prefix repeats its pattern; what follows nothing need not.
    continued = vrnn.extend(x[:, :1], 4, mode="param")
    assert continued.shape == (40, 4, 8)
    assert ((continued > 0.5) == (x[:, :1] > 0.5)).double().mean() > 0.9


def test_parameters_of_the_smoothing_guide_move(x):
    vrnn = small_vrnn("smoothing")
    svi = SVI(vrnn.model, vrnn.guide, Adam({"lr": 0.01}), AnalyticELBO())
    start = [p.clone() for p in vrnn.parameters()]
    for _ in range(3):
        svi.step(x, LENGTHS)
    assert not any(torch.equal(a, b) for a, b in zip(start, vrnn.parameters(), strict=True))


@pytest.mark.parametrize("likelihood", [Bernoulli(), Normal(), Categorical(3)])
@pytest.mark.parametrize("inference", GUIDES)
def test_shapes_of_all_methods(likelihood, inference, x):
    vrnn = small_vrnn(inference, likelihood=likelihood)
    for mode in ("sample", "param"):
        tail = (D, 3) if mode == "param" and isinstance(likelihood, Categorical) else (D,)
        assert vrnn.generate(2, 5, mode=mode).shape == (2, 5, *tail)
        assert vrnn.extend(x, 3, mode=mode).shape == (N, 3, *tail)
        assert vrnn.reconstruct(x, LENGTHS, mode=mode).shape == (N, T, *tail)
    assert vrnn.encode(x, LENGTHS).shape == (N, T, L)
    assert math.isfinite(AnalyticELBO().loss(vrnn.model, vrnn.guide, x, LENGTHS))


def test_defaults_are_those_of_the_tutorial():
    networks = VariationalRNN().networks
    assert networks.prior.hidden[0].weight.shape == (500, 256)
    assert networks.decoder[0].weight.shape == (500, 258) and networks.decoder[-1].weight.shape == (28, 500)
    assert (
        networks.encoder.hidden[0].weight.shape == (500, 284) and networks.encoder.loc[0].weight.shape[0] == 2
    )
    assert networks.rnn.num_layers == 2 and networks.rnn.input_size == 30


def test_float32(x):
    vrnn = small_vrnn("smoothing").float()
    assert math.isfinite(AnalyticELBO().loss(vrnn.model, vrnn.guide, x, LENGTHS))
    assert vrnn.generate(2, 3).dtype == torch.float32


@pytest.mark.parametrize(
    "lengths",
    [torch.tensor([0, 1, 2, 3, 4]), torch.tensor([1, 2, 3, 4, 5]), torch.ones(3).long(), torch.ones(5)],
)
def test_bad_lengths(lengths, x):
    with pytest.raises(InvalidData, match="expected 5 integers from 1 to 4"):
        small_vrnn().model(x, lengths)


def test_bad_input(x):
    vrnn = small_vrnn()
    with pytest.raises(InvalidData, match=r"expected a tensor of shape \(N, T, 3\)"):
        vrnn.guide(x[0])
    with pytest.raises(InvalidData, match=r"x\[0, 0, 0\] is .*expected only 0 and 1"):
        vrnn.guide(x + 0.5)
    with pytest.raises(InvalidData, match="nan"):
        vrnn.encode(torch.full((N, T, D), math.nan), torch.ones(N).long())
    with pytest.raises(InvalidData, match="choose 'filtering' or 'smoothing'"):
        small_vrnn("both")
