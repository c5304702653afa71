# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""One decoder trained by exact methods or as a VAE, with the exact -log p(x) of test rows along the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from runs import Stopwatch, batches
from torch import Tensor, nn

from pyro_cpa.infer import EM, AnalyticELBO, AutoCPAPosterior, ExactML

__all__ = [
    "METHODS",
    "Curve",
    "NoisyDecoder",
    "Point",
    "better_than_vae",
    "reached",
    "seconds",
    "train",
]


class NoisyDecoder(PyroModule):
    """Standard normal latents, a decoder and noise of one scale, as a Pyro model; and the VAE's guide.

    Args:
        decoder: (..., L) to (..., D).
        latent_dim: L.
        noise: initial standard deviation.
        encoder: (..., D) to (..., 2 L), location and log scale; for the VAE alone.
    """

    def __init__(
        self, decoder: nn.Module, latent_dim: int, noise: float, encoder: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.decoder, self.encoder, self.latent_dim = decoder, encoder, latent_dim
        self.noise = PyroParam(torch.tensor(noise), constraint=dist.constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


# ---- training, with the exact evidence along the way -----------------------------------------------------


class Point(NamedTuple):
    """Seconds of training, evaluations not counted, and the exact mean -log p(x) of the test rows then."""

    wall: float
    cpu: float
    loss: float


class TimeIsUp(Exception):
    """Ends a training from within."""


class Curve:
    """Called along a training, it takes a :class:`Point`.

    Args:
        exact: of the model in training.
        x: (M, D) test rows.
        minutes: of CPU time in training, after which a call ends it.
    """

    def __init__(self, exact: AutoCPAPosterior, x: Tensor, minutes: float = math.inf) -> None:
        self.exact, self.x, self.minutes = exact, x, minutes
        self.points: list[Point] = []
        self.watch, self.wall, self.cpu = Stopwatch(), 0.0, 0.0

    def __call__(self) -> None:
        wall, cpu = self.watch.read()
        self.wall, self.cpu = self.wall + wall, self.cpu + cpu
        with torch.no_grad():
            loss = -self.exact.log_evidence(self.x).mean().item()
        self.points.append(Point(self.wall, self.cpu, loss))
        if self.cpu >= 60 * self.minutes:
            raise TimeIsUp
        self.watch.read()


LEARNING_RATE, BATCH = 5e-3, 100


@dataclass(frozen=True)
class Training:
    """A net, its exact posterior, its training rows, and what :func:`train` was told."""

    net: NoisyDecoder
    exact: AutoCPAPosterior
    x: Tensor
    steps: int
    every: int
    report: Curve

    def exactly(self, fit: type[EM] | type[ExactML]) -> None:
        fit(self.net, self.exact).run(
            self.x, num_steps=self.steps, tol=0.0, progress=False, callback=lambda record: self.report()
        )

    def by_adam(self, loss: Callable[[Tensor], Tensor]) -> None:
        """``loss`` is the sum over the rows of a minibatch."""
        optim = torch.optim.Adam(self.net.parameters(), LEARNING_RATE)
        stream = batches(self.x, size=BATCH, seed=0, steps=0)
        for step in range(1, self.steps + 1):
            (batch,) = next(stream)
            optim.zero_grad()
            (loss(batch) / len(batch)).backward()
            optim.step()
            if step % self.every == 0 or step == self.steps:
                self.report()


METHODS: dict[str, Callable[[Training], None]] = {
    "EM": lambda t: t.exactly(EM),
    "ExactML": lambda t: t.exactly(ExactML),
    "VAE": lambda t: t.by_adam(AnalyticELBO(max_plate_nesting=1)(t.net, t.net.guide)),
    "ExactAdam": lambda t: t.by_adam(lambda batch: -t.exact.log_evidence(batch).sum()),
}


def train(
    method: str,
    net: NoisyDecoder,
    x: Tensor,
    x_test: Tensor,
    *,
    steps: int,
    every: int,
    minutes: float = math.inf,
) -> tuple[AutoCPAPosterior, list[Point]]:
    """Trains ``net`` in place.

    Args:
        method: one of ``METHODS``; ExactAdam takes the VAE's minibatches, with log p(x) in the bound's place.
        net: where it starts.
        x: (N, D) training rows.
        x_test: (M, D) test rows.
        steps: at most so many: sweeps of EM; sweeps, then rounds of L-BFGS; minibatches.
        every: minibatches from one point of the curve to the next; the exact fits have one after each step.
        minutes: of CPU time in training, at most.

    Returns:
        The exact posterior, and the test rows' curve from the start to the end.
    """
    pyro.clear_param_store()
    exact = AutoCPAPosterior(net, decoder=net.decoder)
    curve = Curve(exact, x_test, minutes)
    with suppress(TimeIsUp):
        curve()
        METHODS[method](Training(net, exact, x, steps, every, curve))
    return exact, curve.points


def reached(points: Sequence[Point], target: float) -> Point | None:
    """The first point within the target, less being better."""
    return next((point for point in points if point.loss <= target), None)


# ---- over runs -------------------------------------------------------------------------------------------


def better_than_vae(losses: dict[tuple[str, ...], float], vae: dict[tuple[str, ...], float]) -> str:
    """In how many of the runs that both have, by their seeds, the loss is less."""
    shared = losses.keys() & vae.keys()
    return f"{sum(losses[seeds] < vae[seeds] for seeds in shared)} of {len(shared)}"


def seconds(rows: Sequence[dict[str, str]]) -> dict[str, str]:
    """The columns on time, from those of the runs."""
    hits = [row for row in rows if row["CPU s to target"]]
    found = {"reached target": f"{len(hits)} of {len(rows)}"}
    for clock in ("wall s", "CPU s"):
        times = [float(row[f"{clock} to target"]) for row in hits]
        found[f"median {clock} to target"] = f"{median(times):.1f}" if times else ""
    return found | {
        clock: f"{sum(float(row[clock]) for row in rows) / len(rows):.1f}" for clock in ("wall s", "CPU s")
    }
