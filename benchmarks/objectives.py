# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Cost of one SVI step under each objective, against ``Trace_ELBO`` with as many particles.

    python benchmarks/objectives.py            # a few minutes, one thread
    python benchmarks/objectives.py --smoke    # the same in seconds; figures mean nothing

A 784-200-200-50 VAE and a sigmoid belief net of three layers of 200 units, batch 100, S = 10 and 50. All
objectives take their steps in turn within one run, each on a net of its own; a ratio is the median, over the
rounds, of a step's time against that of ``Trace_ELBO`` in the same round. "kept MiB" is what autograd saves
for the backward pass; "peak MiB" the growth of the resident set, in a process of its own.

Prints one table and writes it to benchmarks/results/objectives.csv.
"""

from __future__ import annotations

import argparse
import gc
import logging
import multiprocessing
import resource
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, SVI, RenyiELBO, ReweightedWakeSleep, Trace_ELBO
from pyro.optim import PyroOptim
from runs import in_turn, publish, with_own_store
from torch import Tensor, nn

from pyro_cpa.infer import TVO, BiHelmholtzELBO, ImportanceWeightedELBO, LogUniform, ReweightedWakeSleepELBO

__all__ = ["NETS", "OBJECTIVES", "BeliefNet", "VAE"]

RESULTS = Path(__file__).parent / "results"
BATCH, PIXELS = 100, 784
BASE = "Trace_ELBO"


class VAE(nn.Module):
    """Gaussian latents, Bernoulli pixels, two tanh layers each way."""

    def __init__(self, hidden: int = 200, latent: int = 50) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = self._perceptron(PIXELS, hidden, 2 * latent)
        self.decoder = self._perceptron(latent, hidden, PIXELS)

    @staticmethod
    def _perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, outputs),
        )

    def model(self, x: Tensor) -> None:
        pyro.module("net", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("net", self)
        loc, log_scale = self.encoder(x).chunk(2, dim=-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class BeliefNet(nn.Module):
    """Three layers of Bernoulli latents, joined by linear maps in both directions."""

    def __init__(self, hidden: int = 200) -> None:
        super().__init__()
        self.prior = nn.Parameter(torch.zeros(hidden))
        sizes = (PIXELS, hidden, hidden, hidden)
        self.up = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.down = nn.ModuleList(nn.Linear(b, a) for a, b in zip(sizes, sizes[1:], strict=False))

    def model(self, x: Tensor) -> None:
        pyro.module("net", self)
        with pyro.plate("data", len(x)):
            h = pyro.sample("h3", dist.Bernoulli(logits=self.prior).to_event(1))
            for i in (2, 1):
                h = pyro.sample(f"h{i}", dist.Bernoulli(logits=self.down[i](2 * h - 1)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.down[0](2 * h - 1)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("net", self)
        h = x
        with pyro.plate("data", len(x)):
            for i, layer in enumerate(self.up, start=1):
                h = pyro.sample(f"h{i}", dist.Bernoulli(logits=layer(2 * h - 1)).to_event(1))


NETS: dict[str, Callable[[], nn.Module]] = {"VAE": VAE, "belief net": BeliefNet}

# Each with the most that a step may cost, in units of Trace_ELBO's, and the nets it applies to.
OBJECTIVES: dict[str, tuple[Callable[..., ELBO], float | None, tuple[str, ...]]] = {
    BASE: (Trace_ELBO, None, tuple(NETS)),
    "TVO, K=5": (lambda S, **o: TVO(S, LogUniform(5), **o), 1.05, tuple(NETS)),
    "TVO, K=50": (lambda S, **o: TVO(S, LogUniform(50), **o), 1.05, tuple(NETS)),
    "BiHM": (BiHelmholtzELBO, 1.05, tuple(NETS)),
    "IWAE": (lambda S, **o: ImportanceWeightedELBO(S, "reparam", **o), 1.05, ("VAE",)),
    "DReG": (lambda S, **o: ImportanceWeightedELBO(S, "dreg", **o), 1.6, ("VAE",)),
    "VIMCO": (lambda S, **o: ImportanceWeightedELBO(S, "vimco", **o), 1.05, ("belief net",)),
    "RWS": (ReweightedWakeSleepELBO, None, tuple(NETS)),
    "Pyro RenyiELBO": (lambda S, **o: RenyiELBO(alpha=0.0, num_particles=S, **o), None, ("VAE",)),
    "Pyro RWS": (lambda S, **o: ReweightedWakeSleep(num_particles=S, **o), None, tuple(NETS)),
}


class Trainer:
    """One objective on a net and a parameter store of its own."""

    def __init__(self, net: str, objective: str, num_particles: int, x: Tensor) -> None:
        torch.manual_seed(0)
        self.net = NETS[net]()
        self.x = x
        make = OBJECTIVES[objective][0]
        loss = make(num_particles, vectorize_particles=True, max_plate_nesting=1)
        svi = SVI(self.net.model, self.net.guide, PyroOptim(torch.optim.Adam, {"lr": 1e-4}), loss)
        self.step = with_own_store(lambda: svi.step(self.x))

    def kept_mib(self) -> float:
        """Memory that autograd saves for the backward pass, each storage once; data and parameters not."""
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.step()
        given = {tensor.untyped_storage().data_ptr() for tensor in (self.x, *self.net.parameters())}
        return sum(size for at, size in kept.items() if at not in given) / 2**20


def binary_images(count: int) -> Tensor:
    return (torch.rand(count, PIXELS, generator=torch.Generator().manual_seed(1)) < 0.2).float()


def measure(net: str, num_particles: int, rounds: int, memory: bool) -> list[dict[str, str]]:
    """One row for each objective that applies to ``net``."""
    x = binary_images(BATCH)
    trainers = {
        name: Trainer(net, name, num_particles, x) for name, (_, _, nets) in OBJECTIVES.items() if net in nets
    }
    kept = {name: trainer.kept_mib() for name, trainer in trainers.items()}
    for trainer in trainers.values():
        trainer.step()
    gc.collect()
    seconds = in_turn({name: trainer.step for name, trainer in trainers.items()}, rounds)
    base, rows = seconds[BASE], []
    for name, spent in seconds.items():
        target = OBJECTIVES[name][1]
        ratio = median(a / b for a, b in zip(spent.cpu, base.cpu, strict=True))
        wall = median(a / b for a, b in zip(spent.wall, base.wall, strict=True))
        rows.append(
            {
                "net": net,
                "S": str(num_particles),
                "objective": name,
                "CPU ms": f"{1e3 * median(spent.cpu):.1f}",
                "wall ms": f"{1e3 * median(spent.wall):.1f}",
                "CPU ratio": f"{ratio:.2f}",
                "wall ratio": f"{wall:.2f}",
                "target": "" if target is None else f"{target:.2f}",
                "met": "" if target is None else "yes" if ratio <= target else "no",
                "kept MiB": f"{kept[name]:.1f}",
                "peak MiB": str(peak_mib(net, name, num_particles)) if memory else "",
            }
        )
    return rows


def peak_mib(net: str, objective: str, num_particles: int) -> int:
    """Growth of the resident set over three steps, measured in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pyro_cpa.infer"])
    with context.Pool(1) as pool:
        return pool.apply(_growth_mib, (net, objective, num_particles))


def _growth_mib(net: str, objective: str, num_particles: int) -> int:
    def resident() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    _one_quiet_thread()
    trainer = Trainer(net, objective, num_particles, binary_images(2))
    trainer.step()  # kernels and the optimiser's state are no part of the objective
    trainer.x = binary_images(BATCH)
    before = resident()
    for _ in range(3):
        trainer.step()
    return round((resident() - before) / 1024)


def _one_quiet_thread() -> None:
    torch.set_num_threads(1)
    logging.getLogger("pyro_cpa").setLevel(logging.ERROR)  # untrained nets have degenerate weights


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="seconds; figures mean nothing")
    parser.add_argument("--rounds", type=int, default=40, help="steps of each objective")
    given = parser.parse_args()
    _one_quiet_thread()
    print(f"torch {torch.__version__}, pyro {pyro.__version__}, one thread, batch {BATCH}")
    rows: list[dict[str, str]] = []
    for net in NETS:
        for num_particles in (2,) if given.smoke else (10, 50):
            rows += measure(net, num_particles, 2 if given.smoke else given.rounds, memory=not given.smoke)
    if given.smoke:
        peak_mib("VAE", BASE, 2)
    publish("Time and memory of a step", rows, RESULTS / f"objectives{'_smoke' if given.smoke else ''}.csv")


if __name__ == "__main__":
    main()
