# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Gradients of objectives under DistributedDataParallel: what each of two processes does in ``test_ddp.py``."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.distributed as distributed
from exact_pairs import Exact, circle
from pyro import poutine
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pyro_cpa.infer import (
    TVO,
    AnalyticELBO,
    AutoCPAPosterior,
    BiHelmholtzELBO,
    ImportanceWeightedELBO,
    ReweightedWakeSleepELBO,
)

torch.set_default_dtype(torch.float64)
SIZE, LATENT, K, N = 6, 2, 4, 20
SPLIT = 7  # rows of process 0
FAST = {"vectorize_particles": True}
OBJECTIVES = {
    "iwae": ImportanceWeightedELBO(K, "reparam", **FAST),
    "dreg": ImportanceWeightedELBO(K, "dreg", **FAST),
    "stl": ImportanceWeightedELBO(K, "stl", **FAST),
    "vimco": ImportanceWeightedELBO(K, "vimco", **FAST),
    "tvo": TVO(K, **FAST),
    "bihm": BiHelmholtzELBO(K, **FAST),
    "rws": ReweightedWakeSleepELBO(K, insomnia=1.0, **FAST),
    "analytic": AnalyticELBO(K, **FAST),
}


class _Given:
    """Draws from noise that is handed over, so that rows have the same draws wherever they are."""

    noise: torch.Tensor

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new: Any = super().expand(batch_shape, type(self).__new__(type(self)))  # type: ignore[misc]
        new.noise = self.noise
        return new

    def given(self, sample_shape: Any) -> torch.Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))  # type: ignore[attr-defined]
        return (self.noise if len(shape) == self.noise.dim() else self.noise[0]).expand(shape)


class GivenNormal(_Given, dist.Normal):
    def rsample(self, sample_shape: Any = ()) -> torch.Tensor:
        return self.loc + self.scale * torch.special.ndtri(self.given(sample_shape))


class GivenBernoulli(_Given, dist.Bernoulli):
    def sample(self, sample_shape: Any = ()) -> torch.Tensor:
        return (self.given(sample_shape) < self.probs).to(self.probs)


class Autoencoder(nn.Module):
    def __init__(self, discrete: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.discrete = discrete
        self.encoder = nn.Linear(SIZE, 2 * LATENT)
        self.decoder = nn.Linear(LATENT, SIZE)

    def model(self, x, noise):
        loc = torch.zeros(LATENT)
        prior = dist.Bernoulli(logits=loc) if self.discrete else dist.Normal(loc, 1.0)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior.to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x, noise):
        loc, log_scale = self.encoder(x).chunk(2, -1)
        latent = GivenBernoulli(logits=loc) if self.discrete else GivenNormal(loc, log_scale.exp())
        latent.noise = noise.movedim(1, 0)
        with pyro.plate("data", len(x)):
            pyro.sample("z", latent.to_event(1))


class Loss(nn.Module):
    """The loss of one datum of N: ``share`` is the number of processes over N."""

    def __init__(self, elbo: Any, net: Autoencoder, share: float) -> None:
        super().__init__()
        self.net, self.elbo, self.share = net, elbo, share

    def forward(self, x, noise):
        pair = poutine.scale(self.net.model, self.share), poutine.scale(self.net.guide, self.share)
        return self.elbo.differentiable_loss(*pair, x, noise)


class ExactLoss(nn.Module):
    """Minus the exact evidence of one datum."""

    def __init__(self, share: float) -> None:
        super().__init__()
        pyro.clear_param_store()
        self.model, self.share = Exact(1, 6, 2), share
        self.guide = AutoCPAPosterior(self.model, decoder=self.model.decoder)

    def forward(self, x):
        return -self.share * self.guide.log_evidence(x).sum()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.bernoulli(torch.full((N, SIZE), 0.4)), torch.rand(N, K, LATENT)


def loss_of(name: str, share: float) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    if name == "exact":
        return ExactLoss(share), (circle(N),)
    return Loss(OBJECTIVES[name], Autoencoder(name in ("vimco", "rws")), share), data()


def gradients(rank: int) -> dict[str, Any]:
    found = {}
    for name in [*OBJECTIVES, "exact"]:
        loss, rows = loss_of(name, 2 / N)
        pyro.set_rng_seed(0)
        parallel = DistributedDataParallel(loss)
        parallel(*((row[:SPLIT], row[SPLIT:])[rank] for row in rows)).backward()
        alone, rows = loss_of(name, 1 / N)
        alone(*rows).backward()
        found[name] = [(p.grad, q.grad) for p, q in zip(loss.parameters(), alone.parameters(), strict=True)]
    return found


def trained_by_lightning(rank: int, folder: str) -> dict[str, Any]:
    """Parameters after two steps of SGD, and those of one process with all rows."""
    warnings.simplefilter("ignore")
    import lightning.pytorch as lightning
    from torch.utils.data import DataLoader, TensorDataset

    class Training(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.loss, _ = loss_of("iwae", 2 / N)

        def training_step(self, batch, _):
            return self.loss(*batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    task = Training()
    rows = TensorDataset(*((row[:SPLIT], row[SPLIT:])[rank] for row in data()))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=2,
        use_distributed_sampler=False,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DataLoader(rows, batch_size=N))
    alone, rows = loss_of("iwae", 1 / N)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        alone(*rows).backward()
        optimizer.step()
    pairs = zip(task.loss.parameters(), alone.parameters(), strict=True)
    return {"lightning": [(p.detach(), q.detach()) for p, q in pairs]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, folder = distributed.get_rank(), sys.argv[1]
    found = gradients(rank)
    if importlib.util.find_spec("lightning"):
        found |= trained_by_lightning(rank, folder)
    torch.save(found, Path(folder) / f"ddp{rank}.pt")
    distributed.destroy_process_group()
    # DDP keeps gloo's threads, which now and then abort the process at the interpreter's shutdown.
    os._exit(0)
