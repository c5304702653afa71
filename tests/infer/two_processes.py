# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What each of two processes does in ``test_process_group.py``: the first argument names a job, the second a folder."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyro
import torch
import torch.distributed as distributed
from exact_pairs import Exact, circle

from pyro_cpa.infer import EM, AutoCPAPosterior, ExactML

torch.set_default_dtype(torch.float64)
SPLIT = 23  # rows of process 0, of 60


def holed() -> torch.Tensor:
    """Missing entries in the rows of process 1 alone."""
    x = circle(60)
    x[SPLIT:][torch.rand(60 - SPLIT, 2) < 0.3] = torch.nan
    return x


FULL = [[0.6, 0.0], [0.2, 0.5]]
# Model's arguments, data, split, fit and its arguments, steps.
FITS: dict[str, tuple[Any, ...]] = {
    "em": (((1, 4, 2), {"noise": [0.5, 0.8]}), circle(60), SPLIT, EM, {}, 3),
    "em, full noise, missing values": (((1, 3, 2), {"noise": FULL}), holed(), SPLIT, EM, {"ridge": 0.5}, 3),
    "em, two latents, missing values": (((2, 3, 2), {"noise": [0.5, 0.8], "seed": 0}), holed(), SPLIT, EM, {}, 2),
    "em, one row in process 1": (((1, 3, 2), {"noise": FULL, "seed": 2}), circle(60), 59, EM, {}, 2),
    "em with l-bfgs": (
        ((1, 4, 2), {}), circle(60), SPLIT, EM, {"accelerate": "lbfgs", "warm_up": 2, "lbfgs_iterations": 5}, 4
    ),
    "l-bfgs": (((1, 6, 2), {}), holed(), SPLIT, ExactML, {"warm_start": 0, "iterations_per_step": 5}, 2),
    "l-bfgs, ridge": (((1, 6, 2), {}), circle(60), 59, ExactML, {"warm_start": 0, "iterations_per_step": 4, "ridge": 2}, 2),
    "ml": (((1, 4, 2), {}), holed(), SPLIT, ExactML, {"warm_start": 1, "iterations_per_step": 4}, 3),
}  # fmt: skip


def fit_of(name: str, seed: int = 5, **group: Any) -> tuple[Any, Any]:
    (sizes, options), _, _, kind, arguments, _ = FITS[name]
    pyro.clear_param_store()  # which would hand the next model the noise of the last one
    model = Exact(*sizes, **{"seed": seed} | options)
    if sizes[0] == 1:
        # Walls spread over the prior: elsewhere the M-step is ill-conditioned, and magnifies rounding.
        first = model.decoder[0]
        walls = torch.linspace(-1.0, 1.0, sizes[1])
        first.weight.data = torch.where(first.weight > 0, 1.0, -1.0)
        first.bias.data = -first.weight.data[:, 0] * walls
    return model, kind(model, AutoCPAPosterior(model, decoder=model.decoder), **arguments, **group)


def fitted(name: str, x: torch.Tensor, **group: Any) -> dict[str, Any]:
    model, fit = fit_of(name, **group)
    losses = [fit.step(x) for _ in range(FITS[name][-1])]
    parameters = {key: value.detach().clone() for key, value in model.named_parameters()}
    return {
        "losses": [*losses, fit.evaluate_loss(x)],
        "objectives": [record.objective for record in fit.history],
        "rows": fit._rows,
        **parameters,
    }


def error_of(call: Any) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", ""


def fits(rank: int) -> dict[str, Any]:
    world, found = distributed.group.WORLD, {}
    for name, (_, x, split, *_) in FITS.items():
        mine = (x[:split], x[split:])[rank]
        found[name] = (fitted(name, mine, process_group=world), fitted(name, x) if rank == 0 else None)
    # Process 1 starts elsewhere, and is given the parameters of process 0.
    x = circle(60)
    found["other start"] = fitted("em", (x[:SPLIT], x[SPLIT:])[rank], seed=5 + rank, process_group=world)
    return found


def numbers(rank: int) -> dict[str, Any]:
    """What one all-reduce after the other holds, in one E-step and one evaluation with gradient."""
    sizes: list[int] = []
    plain = distributed.all_reduce

    def counted(tensor: torch.Tensor, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return plain(tensor, **kwargs)

    found: dict[str, Any] = {}
    x = circle(60)[rank::2]
    for name in ("em", "em, full noise, missing values"):
        model, fit = fit_of(name, process_group=distributed.group.WORLD)
        distributed.all_reduce = counted
        fit._e_step(x)
        found[name] = (max(sizes), fit.guide.partition().num_regions)
        sizes.clear()
        parameters = list(model.parameters())
        fit._log_evidence(parameters, lambda fit=fit: fit._read(x))
        found[name] += (max(sizes), sum(p.numel() for p in parameters))
        sizes.clear()
        distributed.all_reduce = plain
    return found


def errors(rank: int) -> dict[str, Any]:
    world, x = distributed.group.WORLD, circle(60)[rank::2]
    found: dict[str, Any] = {}
    for name in ("em", "l-bfgs"):
        model, fit = fit_of(name, process_group=world)
        before = [p.detach().clone() for p in model.parameters()]
        infinite = x.clone()
        infinite[3, 1] = rank * torch.inf if rank else 0.0
        found[f"{name}, infinite"] = error_of(lambda fit=fit, x=infinite: fit.step(x))
        found[f"{name}, unchanged"] = all(
            torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
        )
        found[f"{name}, again"] = error_of(lambda fit=fit: fit.step(x))
        fit.guide.max_regions = 2
        model.decoder[0].weight.data.mul_(1.0000001)  # else the partition that is there will do
        found[f"{name}, regions"] = error_of(lambda fit=fit: fit.step(x))
    model = Exact(1, 6 + rank, 2)
    fit = EM(model, AutoCPAPosterior(model, decoder=model.decoder), process_group=world)
    found["width"] = error_of(lambda: fit.step(x))

    class Broken(Exact):
        def forward(self, x: torch.Tensor) -> None:
            if rank == 1:
                raise OSError("the disk is gone")
            super().forward(x)

    broken = Broken(1, 6, 2)
    fit = EM(broken, AutoCPAPosterior(broken, decoder=broken.decoder), process_group=world)
    found["foreign error"] = error_of(lambda: fit.step(x))
    constant = Exact(1, 4, 2, seed=1)
    constant.likelihood = lambda mean: pyro.distributions.Normal(mean, 0.5 + rank).to_event(1)
    fit = EM(constant, AutoCPAPosterior(constant, decoder=constant.decoder), process_group=world)
    found["constants"] = error_of(lambda: fit.step(x))
    found["no group"] = error_of(lambda: EM(constant, fit.guide, process_group=0))
    return found


def death(rank: int) -> dict[str, Any]:
    x = circle(60)[rank::2]
    _, fit = fit_of("em", process_group=distributed.group.WORLD)

    def callback(_: Any) -> None:
        if rank == 1 and len(fit.history) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    return {"death": error_of(lambda: fit.run(x, num_steps=4, tol=0.0, progress=False, callback=callback))}


def main(job: str, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="the normal matrix")
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = distributed.get_rank()
    try:
        found = {"fits": fits, "errors": errors, "numbers": numbers, "death": death}[job](rank)
        torch.save(found, Path(folder) / f"{job}{rank}.pt")
        if job == "death":
            # A group that lost a member can neither be destroyed nor left to the interpreter's shutdown: gloo's threads
            # still run then, and the C++ runtime now and then aborts the process.
            os._exit(0)
    finally:
        if job != "death":
            distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
