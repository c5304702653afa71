# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The same numbers on every device: ``pytest tests/test_devices.py --device cuda``.

On a CPU the tensor code that a GPU runs is compared with the compiled code, where that is installed.
"""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from decoders import mlp
from pyro.infer import SVI
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_cpa import compiled
from pyro_cpa.distributions import CPAMarginal, parts
from pyro_cpa.infer import (
    EM,
    TVO,
    AutoCPAPosterior,
    ExactML,
    ImportanceWeightedELBO,
    ReweightedWakeSleepELBO,
)
from pyro_cpa.models import VAE, Bernoulli, BidirectionalHelmholtzMachine, SigmoidBeliefNet

INSTALLED = compiled._INSTALLED


class Model(PyroModule):
    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder
        self.noise = PyroParam(torch.tensor(0.4), constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.decoder[0].in_features), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.noise).to_event(1), obs=x)


def on(device, compute, decoder, x, monkeypatch, tolerance=1e-9):
    """``compute(decoder, x)`` here, compiled where that is installed, and on the device from tensors alone."""
    results = []
    for place, installed in (("cpu", INSTALLED), (device, False)):
        monkeypatch.setattr(compiled, "_INSTALLED", installed)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        found = compute(copy.deepcopy(decoder).to(place), x.to(place))
        assert all(value.device.type == torch.device(place).type for value in found)
        results.append([value.cpu() for value in found])
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(there, here, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
@pytest.mark.parametrize("missing", [False, True])
def test_exact_inference(device, latent_dim, missing, monkeypatch):
    x = torch.randn(12, 4)
    if missing:
        x[::3, 1] = torch.nan

    def compute(decoder, x):
        leaf = x.clone().requires_grad_()
        scale = torch.full((4,), 0.3, device=x.device, requires_grad=True)
        px = CPAMarginal(decoder, scale)
        log_prob = px.log_prob(leaf)
        posterior = px.posterior(x)
        assert posterior.sample((3,)).device == px.sample((2,)).device == px.partition.device
        return [
            log_prob,
            *torch.autograd.grad(log_prob.sum(), [leaf, scale, *decoder.parameters()]),
            posterior.mean,
            posterior.covariance_matrix,
            posterior.mode,
            px.mean,
            px.covariance_matrix,
            px.conditional(x).mean,
        ]

    on(device, compute, mlp(latent_dim, 6, 4), x, monkeypatch)


def test_search_among_many_regions(device, monkeypatch):
    monkeypatch.setattr(parts, "MANY_REGIONS", 30)

    def compute(decoder, x):
        px = CPAMarginal(decoder, 0.1)
        with torch.no_grad():
            return [px.log_prob(x), px.omitted_share(x) <= 1e-12]

    on(device, compute, mlp(2, 12, 12, 5), torch.randn(40, 5), monkeypatch)


def test_convolutions(device, monkeypatch):
    decoder = nn.Sequential(
        nn.Linear(2, 4),
        nn.ReLU(),
        nn.Unflatten(1, (1, 2, 2)),
        nn.ConvTranspose2d(1, 2, 2),
        nn.ReLU(),
        nn.Flatten(),
    )

    def compute(decoder, x):
        with torch.no_grad():
            return [CPAMarginal(decoder, 0.3).log_prob(x)]

    on(device, compute, decoder, torch.rand(6, 18), monkeypatch)


@pytest.mark.parametrize("kind", [EM, ExactML])
def test_exact_fits(device, kind, monkeypatch):
    def compute(decoder, x):
        model = Model(decoder).to(x.device)
        fit = kind(model, AutoCPAPosterior(model, decoder=model.decoder))
        losses = [fit.step(x) for _ in range(2)]
        return [torch.tensor(losses, device=x.device), *(p.detach() for p in model.parameters())]

    # Steps magnify what rounding makes of their directions.
    on(device, compute, mlp(1, 5, 3), torch.randn(30, 3), monkeypatch, tolerance=1e-5)


@pytest.mark.parametrize("make", [ImportanceWeightedELBO, TVO, ReweightedWakeSleepELBO])
def test_objectives_with_the_exact_guide(device, make):
    """Every weight is p(x): the loss is the evidence, whatever is drawn."""
    model = Model(mlp(2, 5, 3)).to(device)
    x = torch.randn(8, 3, device=device)
    guide = AutoCPAPosterior(model, decoder=model.decoder)
    loss = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), make(num_particles=4)).evaluate_loss(x)
    assert abs(loss + guide.log_evidence(x).sum().item()) < 1e-7 * abs(loss)


@pytest.mark.parametrize(
    "make",
    [
        lambda: VAE(6, 2, hidden_dims=(5,), likelihood=Bernoulli()),
        lambda: SigmoidBeliefNet(6, (4, 3)),
        lambda: BidirectionalHelmholtzMachine(6, (4, 3)),
    ],
)
def test_models_live_where_they_are_put(device, make):
    model = make().to(device)
    x = torch.bernoulli(torch.full((7, 6), 0.4, device=device))
    assert model.generate(3).device.type == device.type
    found = model.log_evidence(x, num_particles=5)
    assert found.log_prob.device.type == device.type
