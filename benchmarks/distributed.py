# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Scaling over processes that each hold rows of their own: exact E-step, exact gradient, and a loss under DDP.

    python benchmarks/distributed.py                                   # two processes on this machine, a minute
    torchrun --nproc-per-node 2 benchmarks/distributed.py              # the same, or more processes and machines
    python benchmarks/distributed.py --smoke                           # seconds; figures mean nothing

One process with N rows, all P processes with N / P rows each (strong scaling, ideal ratio P) and with N rows each (weak
scaling, ideal ratio 1) take turns within one run; a ratio is the median over the rounds of times in the same round.
From the time per pair of datum and region follow the core-hours of one E-step on 10^9 rows: the cost is linear in rows,
and what is sent does not depend on them.

Prints one table and writes it to benchmarks/results/distributed.csv.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.distributed as distributed
import torch.multiprocessing
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from runs import publish
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyro_cpa.infer import EM, AutoCPAPosterior, ImportanceWeightedELBO

RESULTS = Path(__file__).parent / "results"
BILLION = 10**9
Work = Callable[[Tensor], Any]


class Generator(PyroModule):
    """A piecewise-affine decoder with learned noise."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for a, b in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.decoder = nn.Sequential(*layers[:-1])
        self.noise = PyroParam(torch.full((sizes[-1],), 0.3), constraint=dist.constraints.positive)
        self.latent_dim = sizes[0]

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.noise).to_event(1), obs=x)


class Loss(nn.Module):
    """Importance-weighted bound of a VAE, per datum."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(pixels, 64), nn.ReLU(), nn.Linear(64, 16))
        self.decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, pixels))
        self.elbo = ImportanceWeightedELBO(10, vectorize_particles=True)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(8), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.3).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def forward(self, x: Tensor) -> Tensor:
        pair = poutine.scale(self.model, 1 / len(x)), poutine.scale(self.guide, 1 / len(x))
        return self.elbo.differentiable_loss(*pair, x)


def exact_work(sizes: tuple[int, ...], group: Any) -> tuple[Work, Work, int, int]:
    """An E-step, an evaluation with gradient, the number of regions and of numbers that an E-step sends."""
    model = Generator(*sizes)
    fit = EM(model, AutoCPAPosterior(model, decoder=model.decoder), process_group=group)
    parameters = list(model.parameters())

    def e_step(x: Tensor) -> None:
        fit._last = None  # which would serve the same parameters again
        fit._e_step(x)

    def gradient(x: Tensor) -> None:
        fit._last = None
        # With a group the gradient is taken, and summed, on the way.
        log_evidence = fit._log_evidence(parameters, lambda: fit._read(x))
        if group is None:
            torch.autograd.grad(log_evidence, parameters)

    R, (L, D) = fit.guide.partition().num_regions, (sizes[0], sizes[-1])
    return e_step, gradient, R, R * (L + 1) * (L + 1 + D) + D + 1


def ddp_work(pixels: int, parallel: bool) -> Work:
    loss: nn.Module = Loss(pixels)
    step = DistributedDataParallel(loss) if parallel else loss
    return lambda x: step(x).backward()


def seconds(work: Work, x: Tensor, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        work(x)
    return (time.perf_counter() - start) / repeats


def scaling(
    work: Work, alone: Work, x: Tensor, rounds: int, repeats: int
) -> list[tuple[float, float, float]]:
    """Seconds, in turn, of one process with x, of all with a share of x each, and of all with x each."""
    P, rank = distributed.get_world_size(), distributed.get_rank()
    share, found = x[rank::P].clone(), []
    for turn in range(1 + rounds):
        times = []
        for part, rows in ((alone, x), (work, share), (work, x)):
            distributed.barrier()
            mine = seconds(part, rows, repeats) if part is work or rank == 0 else 0.0
            slowest = torch.tensor([mine])
            distributed.all_reduce(slowest, op=distributed.ReduceOp.MAX)
            times.append(slowest.item())
        if turn:  # the first one warms up
            found.append((times[0], times[1], times[2]))
    return found


def run(smoke: bool) -> list[dict[str, str]]:
    P, world = distributed.get_world_size(), distributed.group.WORLD
    rounds, repeats = (2, 1) if smoke else (7, 1)
    rows = []
    for name, sizes, N in (
        ("L=1, 1-16-16-10", (1, 16, 16, 10), 10_000),
        ("L=2, 2-16-10", (2, 16, 10), 1_000),
        ("IWAE of a VAE, 8 latents, 64 pixels, 10 particles", (), 1_000),
    ):
        N = N // 40 if smoke else N
        works: list[tuple[str, Work, Work, int, int]] = []
        torch.manual_seed(1)
        if sizes:
            steps, alone = exact_work(sizes, world), exact_work(sizes, None)
            x = torch.randn(N, sizes[-1])
            P_count = sum(p.numel() for p in Generator(*sizes).parameters())
            works += [("E-step", steps[0], alone[0], steps[2], steps[3])]
            works += [("log p(X) and gradient", steps[1], alone[1], steps[2], P_count + 1)]
        else:
            x = torch.randn(N, 64)
            P_count = sum(p.numel() for p in Loss(64).parameters())
            works += [("loss and gradient, DDP", ddp_work(64, True), ddp_work(64, False), 0, P_count)]
        for kind, work, single, R, numbers in works:
            times = scaling(work, single, x, rounds, repeats)
            per_pair = median(t[0] for t in times) / (N * R) if R else 0.0
            rows.append(
                {
                    "what": kind,
                    "model": name,
                    "rows N": str(N),
                    "regions": str(R or ""),
                    "processes P": str(P),
                    "1 process, N rows, s": f"{median(t[0] for t in times):.4f}",
                    "strong: time of 1 / P processes": f"{median(t[0] / t[1] for t in times):.2f}",
                    "weak: time of 1 / P processes": f"{median(t[0] / t[2] for t in times):.2f}",
                    "kB sent": f"{8 * numbers / 1000:.1f}"
                    if R
                    else f"{x.element_size() * numbers / 1000:.1f}",
                    "ns per pair": f"{1e9 * per_pair:.0f}" if R else "",
                    "core-hours for 1e9 rows": f"{BILLION * R * per_pair / 3600:.2g}" if R else "",
                }
            )
    return rows


def process(rank: int, smoke: bool) -> None:
    """One process of the group; ``rank`` is that of the spawner, torchrun has set its own."""
    os.environ.setdefault("RANK", str(rank))
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    # Two models of one class live side by side, which Pyro's store would take for one.
    pyro.settings.set(module_local_params=True)
    distributed.init_process_group("gloo")
    rows = run(smoke)
    if distributed.get_rank() == 0:
        print(f"torch {torch.__version__}, {os.cpu_count()} cores, one thread for each process")
        path = RESULTS / f"distributed{'_smoke' if smoke else ''}.csv"
        publish("Scaling over processes", rows, path)
    distributed.destroy_process_group()
    # DDP keeps gloo's threads after this; where one still holds a tensor when the interpreter shuts down, the C++ runtime
    # aborts the process.
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="seconds instead of minutes; figures mean nothing"
    )
    smoke = parser.parse_args().smoke
    if "RANK" in os.environ:
        process(int(os.environ["RANK"]), smoke)
        return
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    torch.multiprocessing.spawn(process, (smoke,), nprocs=2)


if __name__ == "__main__":
    main()
