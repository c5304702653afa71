# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The fits: EM, exact maximum likelihood, the VAE, and EM from where the VAE ends."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor
from tqdm.auto import tqdm

from ..infer import EM, AutoCPAPosterior, ExactML
from ..infer.exact_fit import AbstractExactFit, StepRecord
from .model import DemoModel

__all__ = ["FULL", "SHORT", "Effort", "Fit", "run_all"]


@dataclass(frozen=True)
class Effort:
    """How long each fit runs.

    Attributes:
        sweeps: of EM.
        warm_start: sweeps of EM before exact maximum likelihood.
        rounds: of twenty L-BFGS iterations each, after them.
        epochs: of the VAE.
        checks: times that the VAE's exact evidence is taken along the way.
        polish: sweeps of EM after the VAE.
        tol: EM and exact ML stop when a step gains less, in nats per row.
    """

    sweeps: int
    warm_start: int
    rounds: int
    epochs: int
    checks: int
    polish: int
    tol: float = 1e-3


FULL = Effort(sweeps=25, warm_start=10, rounds=4, epochs=400, checks=10, polish=15)
SHORT = Effort(sweeps=3, warm_start=1, rounds=1, epochs=4, checks=2, polish=2)

History = tuple[list[float], list[float]]

POLISHED = "VAE + EM"
BATCH = 128
LEARNING_RATE = 5e-3


@dataclass(frozen=True)
class Fit:
    """A fitted model with the guide it was fitted by.

    Attributes:
        name: of the method.
        model: as trained.
        exact: its exact posterior.
        guide: what the method used in its place: the same, or the VAE's Gaussian.
        seconds: time in training, checks of the evidence not counted.
        history: seconds, and exact log p(X) of the training rows then; of the VAE + EM, from the VAE's end.
        remarks: warnings of the fit.
    """

    name: str
    model: DemoModel
    exact: AutoCPAPosterior
    guide: Callable[..., Any]
    seconds: float
    history: History
    remarks: Sequence[str]


def run_all(make: Callable[[str], DemoModel], x: Tensor, effort: Effort) -> Iterator[Fit]:
    """Fit x by every method, one after the other, with progress bars.

    Args:
        make: a new model of the given name; all but the last fit start from the parameters of the
            first one made.
        x: (N, D) training data.
        effort: how long.
    """
    start = make("start").state_dict()
    methods: dict[str, Callable[[DemoModel, AutoCPAPosterior], History]] = {
        "EM": lambda model, exact: _run_em(model, exact, x, effort.sweeps, effort.tol),
        "exact ML": lambda model, exact: _run_ml(model, exact, x, effort),
        "VAE": lambda model, exact: _run_vae(model, exact, x, effort),
    }
    for name, method in methods.items():
        fit = _fit(name, make(name), start, method)
        yield fit
    # The last one, the VAE, goes on with the exact posterior in the place of its guide.
    yield _fit(
        POLISHED,
        make(POLISHED),
        fit.model.state_dict(),
        lambda model, exact: _run_em(model, exact, x, effort.polish, effort.tol, POLISHED),
        fit,
    )


def _fit(
    name: str,
    model: DemoModel,
    start: Mapping[str, Any],
    method: Callable[[DemoModel, AutoCPAPosterior], History],
    before: Fit | None = None,
) -> Fit:
    """Fit ``model`` from the parameters ``start``, where the fit ``before`` may have left them."""
    model.load_state_dict(start)
    exact = AutoCPAPosterior(model.model, decoder=model.decoder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        seconds, evidence = method(model, exact)
    if before is not None:
        seconds = [before.seconds + s for s in seconds]
    return Fit(
        name=name,
        model=model,
        exact=exact,
        guide=model.guide if name == "VAE" else exact,
        seconds=seconds[-1],
        history=(seconds, evidence),
        remarks=[str(w.message) for w in caught if w.category is UserWarning],
    )


def _run_em(
    model: DemoModel, exact: AutoCPAPosterior, x: Tensor, sweeps: int, tol: float, name: str = "EM"
) -> History:
    return _run(name, EM(model.model, exact), x, sweeps, tol)


def _run_ml(model: DemoModel, exact: AutoCPAPosterior, x: Tensor, effort: Effort) -> History:
    fit = ExactML(model.model, exact, warm_start=effort.warm_start)
    return _run("exact ML", fit, x, effort.warm_start + effort.rounds, effort.tol)


def _run(name: str, fit: AbstractExactFit, x: Tensor, steps: int, tol: float) -> History:
    before = -fit.evaluate_loss(x)
    with _bar(name, steps) as bar:

        def show(record: StepRecord) -> None:
            bar.update()
            bar.set_postfix_str(_progress(record.log_evidence, x))

        history = fit.run(x, num_steps=steps, tol=tol, progress=False, callback=show)
        bar.total = bar.n  # converged: no step is missing
        bar.refresh()
    seconds = torch.tensor([0.0, *(r.seconds for r in history)]).cumsum(0)
    return seconds.tolist(), [before, *(r.log_evidence for r in history)]


def _run_vae(model: DemoModel, exact: AutoCPAPosterior, x: Tensor, effort: Effort) -> History:
    svi = SVI(model.model, model.guide, Adam({"lr": LEARNING_RATE}), Trace_ELBO())
    seconds, evidence = [0.0], [_log_evidence(exact, x)]
    every = max(1, effort.epochs // effort.checks)
    with _bar("VAE", effort.epochs) as bar:
        for _ in range(0, effort.epochs, every):
            begin = time.perf_counter()
            for _ in range(every):
                for rows in torch.randperm(len(x)).split(BATCH):
                    svi.step(x[rows])
                bar.update()
            seconds.append(seconds[-1] + time.perf_counter() - begin)
            evidence.append(_log_evidence(exact, x))
            bar.set_postfix_str(_progress(evidence[-1], x))
    return seconds, evidence


def _bar(name: str, total: int) -> tqdm:
    return tqdm(
        total=total,
        desc=f"{name:<10}",
        bar_format="{desc} {bar:24} {n_fmt:>3}/{total_fmt:<3} {elapsed}{postfix}",
    )


def _progress(log_evidence: float, x: Tensor) -> str:
    return f"log p(x) = {log_evidence / len(x):.3f}"


def _log_evidence(exact: AutoCPAPosterior, x: Tensor) -> float:
    with torch.no_grad():
        return float(exact.log_evidence(x).sum())
