# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Objectives inside a LightningModule: training, validation without autograd, the loss divided by N."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_cpa.infer import TVO, BiHelmholtzELBO, ImportanceWeightedELBO, ReweightedWakeSleepELBO

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of lightning's own imports
    lightning = pytest.importorskip("lightning.pytorch")

# Of the trainer, about loaders and checks that a small run has no use for; nothing of ours.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:lightning"),
    pytest.mark.filterwarnings(r"ignore::FutureWarning:lightning"),
]

SIZE, LATENT, N = 6, 2, 48

OBJECTIVES = {
    "iwae": ImportanceWeightedELBO(4, "reparam", vectorize_particles=True),
    "dreg": ImportanceWeightedELBO(4, "dreg"),
    "vimco": ImportanceWeightedELBO(4, "vimco", vectorize_particles=True),
    "tvo": TVO(4, vectorize_particles=True),
    "bihm": BiHelmholtzELBO(4, vectorize_particles=True),
    "rws": ReweightedWakeSleepELBO(4, insomnia=0.5),
}


class Autoencoder(nn.Module):
    def __init__(self, discrete: bool) -> None:
        super().__init__()
        self.discrete = discrete
        self.encoder = nn.Linear(SIZE, 2 * LATENT)
        self.decoder = nn.Linear(LATENT, SIZE)

    def model(self, x):
        loc = torch.zeros(LATENT)
        prior = dist.Bernoulli(logits=loc) if self.discrete else dist.Normal(loc, 1.0)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior.to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        loc, log_scale = self.encoder(x).chunk(2, -1)
        latent = dist.Bernoulli(logits=loc) if self.discrete else dist.Normal(loc, log_scale.exp())
        with pyro.plate("data", len(x)):
            pyro.sample("z", latent.to_event(1))


class Training(lightning.LightningModule):
    """The loss of one datum, by the recipe that scales model and guide."""

    def __init__(self, elbo, net: Autoencoder, batch: int) -> None:
        super().__init__()
        self.net = net
        # The net is held above: the pair is functions of x, not modules with parameters of their own.
        self.loss = elbo(poutine.scale(net.model, 1 / batch), poutine.scale(net.guide, 1 / batch))
        self.seen: list[tuple[bool, bool]] = []
        self.validation: list[float] = []

    def training_step(self, batch, _):
        return self.loss(*batch)

    def validation_step(self, batch, _):
        self.seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        loss = self.loss(*batch)
        assert not loss.requires_grad
        self.validation.append(loss.item())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def images() -> torch.Tensor:
    prototypes = torch.tensor([[0.9, 0.9, 0.9, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.9, 0.9, 0.9]])
    return torch.bernoulli(prototypes.repeat(N // 2, 1))


def trainer(folder, steps: int):
    return lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_trains_and_validates(name, tmp_path):
    x = images()
    net = Autoencoder(discrete=name in ("vimco", "rws"))
    task = Training(OBJECTIVES[name], net, batch=N)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    loader = DataLoader(TensorDataset(x), batch_size=N)
    run = trainer(tmp_path, steps=25)
    run.fit(task, loader, loader)  # validates every epoch under no_grad
    run.validate(task, loader, verbose=False)
    assert task.seen == [(False, False)] * 25 + [(False, True)]
    # In nats a datum: the first is about 4.5, and an estimate's standard deviation less than a tenth.
    assert task.validation[-1] < task.validation[0] - 0.3
    assert all(not torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_scale_divides_loss_and_gradient(name):
    x = images()
    net = Autoencoder(discrete=name in ("vimco", "rws"))
    results = []
    for factor in (1.0, 1 / N):
        pyro.set_rng_seed(3)
        pair = poutine.scale(net.model, factor), poutine.scale(net.guide, factor)
        loss = OBJECTIVES[name](*pair)(x)
        results.append((loss.detach(), torch.autograd.grad(loss, list(net.parameters()))))
    (whole, gradients), (per_datum, scaled) = results
    torch.testing.assert_close(per_datum, whole / N, rtol=1e-12, atol=0)
    for whole_gradient, gradient in zip(gradients, scaled, strict=True):
        torch.testing.assert_close(gradient, whole_gradient / N, rtol=1e-10, atol=1e-14)


def test_one_particle_validates_like_trace_elbo():
    x, net, values = images(), Autoencoder(discrete=False), []
    for elbo in (Trace_ELBO(), ImportanceWeightedELBO(1)):
        pyro.set_rng_seed(3)
        with torch.inference_mode():
            values.append(elbo(net.model, net.guide)(x))
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)
