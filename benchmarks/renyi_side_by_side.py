# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Pyro's ``RenyiELBO`` and ``ReweightedWakeSleep`` beside this library, on a model whose evidence is known.

    python benchmarks/renyi_side_by_side.py            # prints the tables, about a minute
    python benchmarks/renyi_side_by_side.py --write    # and puts them into docs/renyi_side_by_side.md
    python benchmarks/renyi_side_by_side.py --smoke    # in seconds; too few repetitions to mean anything

The model is probabilistic PCA with two latents and four observables; the guide has the posterior's mean and
twice its standard deviation, so that the evidence is exact and the bounds are not. Values are means of repeated
evaluations with their standard errors, RenyiELBO's at alpha = 0, the importance-weighted bound.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.testing.rejection_gamma import RejectionStandardGamma
from pyro.infer import SVI, RenyiELBO, ReweightedWakeSleep, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_cpa.infer import TVO, BiHelmholtzELBO, ImportanceWeightedELBO, ReweightedWakeSleepELBO

__all__ = ["PAGE", "TABLES", "insert"]

PAGE = Path(__file__).parents[1] / "docs" / "renyi_side_by_side.md"
REPEATS = 100
N = 100

LOADINGS = torch.tensor([[1.0, 1.0], [1.0, -1.0], [0.5, 0.5], [0.5, -0.5]], dtype=torch.float64)
NOISE = 0.7
PRECISION = 1.0 + LOADINGS.square().sum(0) / NOISE**2  # of the posterior, diagonal as loadings are orthogonal
MARGINAL = LOADINGS @ LOADINGS.T + NOISE**2 * torch.eye(4, dtype=torch.float64)


def data(count: int = N) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(MARGINAL).T


def evidence(x: Tensor) -> float:
    return dist.MultivariateNormal(x.new_zeros(4), MARGINAL).log_prob(x).sum().item()


def prior() -> Any:
    return dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)


def likelihood(z: Tensor, mean: Tensor | float = 0.0) -> Any:
    return dist.Normal(mean + z @ LOADINGS.T, NOISE).to_event(1)


def approximation(x: Tensor, width: float = 2.0) -> Any:
    """The posterior, its standard deviation times ``width``."""
    return dist.Normal(x @ LOADINGS / NOISE**2 / PRECISION, width * PRECISION.rsqrt()).to_event(1)


def plate(x: Tensor, size: int | None = None, batch: int | None = None) -> Any:
    """All of ``x``; or ``x`` as a given minibatch of ``size`` data; or a random minibatch of ``x``."""
    if size is not None:
        return pyro.plate("data", size, subsample=torch.arange(len(x)))
    return pyro.plate("data", len(x), subsample_size=batch)


def model(x: Tensor, size: int | None = None, batch: int | None = None, width: float = 2.0) -> None:
    with plate(x, size, batch) as index:
        z = pyro.sample("z", prior())
        pyro.sample("x", likelihood(z), obs=x[index])


def guide(x: Tensor, size: int | None = None, batch: int | None = None, width: float = 2.0) -> None:
    with plate(x, size, batch) as index:
        pyro.sample("z", approximation(x[index], width))


def value(
    repeats: int, elbo: Any, pair: tuple[Callable, Callable], *args: Any, unit: float = 1.0, **kwargs: Any
) -> str:
    """Mean and standard error of the bound, in multiples of ``unit``."""
    pyro.set_rng_seed(0)
    losses = [elbo.loss(*pair, *args, **kwargs) for _ in range(repeats)]
    bounds = torch.tensor([-float(v[0] if isinstance(v, tuple) else v) / unit for v in losses]).double()
    error = bounds.std().item() / math.sqrt(len(bounds))
    # Without variance, what is left is rounding.
    return f"{bounds.mean().item():.2f}" if error < 1e-9 else f"{bounds.mean().item():.2f} ± {error:.2f}"


def renyi(K: int, nesting: int = 1, vectorize: bool = True) -> RenyiELBO:
    return RenyiELBO(0.0, num_particles=K, max_plate_nesting=nesting, vectorize_particles=vectorize)


def ours(K: int, vectorize: bool = True, **options: Any) -> ImportanceWeightedELBO:
    return ImportanceWeightedELBO(K, "reparam", vectorize_particles=vectorize, **options)


Table = tuple[list[str], list[list[str]]]
HEADS = ["situation", "K", "exact", "RenyiELBO", "this library"]


def agreement(repeats: int) -> Table:
    x = data()
    rows = []
    for K in (1, 10, 1000):
        values = [value(repeats, elbo(K), (model, guide), x) for elbo in (renyi, ours)]
        rows.append([f"N = {N}, one plate", str(K), f"{evidence(x):.2f}", *values])
    return HEADS, rows


def subsampling(repeats: int) -> Table:
    x, rows = data(10), []
    for K in (1, 10, 100, 1000):
        values = [value(repeats, elbo(K), (model, guide), x, size=N) for elbo in (renyi, ours)]
        exact = N / len(x) * evidence(x)
        rows.append([f"{len(x)} of N = {N}", str(K), f"{exact:.2f}", *values])
    return HEADS, rows


def scale(repeats: int) -> Table:
    x, rows = data(), []
    for factor in (10.0, 1.0, 0.01, 1e-6):
        pair = poutine.scale(model, factor), poutine.scale(guide, factor)
        values = [value(repeats, elbo(10), pair, x, unit=factor) for elbo in (renyi, ours)]
        rows.append([f"scale {factor:g}, value over scale", "10", f"{evidence(x):.2f}", *values])
    elbo = value(repeats, Trace_ELBO(max_plate_nesting=1), (model, guide), x)
    rows.append(["for comparison: Trace_ELBO", "1", f"{evidence(x):.2f}", elbo, elbo])
    return HEADS, rows


def shared_mean(x: Tensor) -> tuple[dist.Normal, float]:
    """Posterior of a mean, N(0, 1), common to all data and coordinates, and the evidence."""
    flat, ones = x.flatten(), torch.ones(4, dtype=torch.float64)
    white = torch.linalg.solve(MARGINAL, ones)
    precision = 1.0 + len(x) * ones @ white
    whole = torch.block_diag(*[MARGINAL] * len(x)) + 1.0
    exact = dist.MultivariateNormal(torch.zeros_like(flat), whole).log_prob(flat).item()
    return dist.Normal((x @ white).sum() / precision, precision.rsqrt()), exact


def outside(repeats: int) -> Table:
    x, K = data(), 10
    posterior, exact_mean = shared_mean(x)
    point = torch.tensor(0.1, dtype=torch.float64)
    exact_point = (
        dist.Normal(0.0, 1.0).log_prob(point).item()
        + dist.MultivariateNormal(point.expand(4), MARGINAL).log_prob(x).sum().item()
    )

    def with_mean(guide_of_mean: Any) -> tuple[Callable, Callable]:
        def mean_model(x: Tensor) -> None:
            mean = pyro.sample("mean", dist.Normal(point.new_zeros(()), 1.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", prior())
                pyro.sample("x", likelihood(z, mean.unsqueeze(-1)), obs=x)

        def mean_guide(x: Tensor) -> None:
            mean = pyro.sample("mean", guide_of_mean)
            with pyro.plate("data", len(x)):
                pyro.sample("z", approximation(x - mean.unsqueeze(-1)))

        return mean_model, mean_guide

    def also(statement: Callable[[], Any]) -> tuple[Callable, Callable]:
        def further(x: Tensor) -> None:
            statement()
            model(x)

        return further, guide

    zero = point.new_zeros(())
    cases = [
        ("global latent", with_mean(posterior), exact_mean),
        ("point estimate, Delta", with_mean(dist.Delta(point)), exact_point),
        ("pyro.factor", also(lambda: pyro.factor("prior", zero)), evidence(x)),
        ("pyro.deterministic", also(lambda: pyro.deterministic("noise", zero)), evidence(x)),
    ]
    rows = []
    for name, pair, exact in cases:
        values = [value(repeats, elbo, pair, x) for elbo in (renyi(K), ours(K, plates=("data",)))]
        rows.append([f"{name} outside the plate", str(K), f"{exact:.2f}", *values])
    return HEADS, rows


def autoguides(repeats: int) -> Table:
    x, rows, steps = data(10), [], 4 * repeats
    plain = Trace_ELBO(max_plate_nesting=1)
    pyro.clear_param_store()
    auto = AutoDiagonalNormal(model, init_scale=0.5)
    auto(x)
    values = [
        value(repeats, elbo, (model, auto), x)
        for elbo in (plain, renyi(1, vectorize=False), ours(1, vectorize=False))
    ]
    rows.append(["bound at K = 1, untrained", f"{evidence(x):.2f}", *values])
    reported, scales = [], []
    for elbo in (plain, renyi(5), ours(5)):
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        auto = AutoDiagonalNormal(model, init_scale=0.5)
        svi = SVI(model, auto, PyroOptim(torch.optim.Adam, {"lr": 0.02}), elbo)
        for _ in range(steps):
            svi.step(x)
        reported.append(value(repeats, elbo, (model, auto), x))
        scales.append(f"{torch.as_tensor(auto.scale).mean().item():.2f}")
    rows.append([f"bound after {steps} steps (K = 1, 5, 5)", f"{evidence(x):.2f}", *reported])
    rows.append(["mean scale of the guide", f"{PRECISION.rsqrt().mean().item():.2f}", *scales])
    return ["AutoDiagonalNormal, 10 data", "exact", "Trace_ELBO", "RenyiELBO", "this library"], rows


def loops(repeats: int) -> Table:
    x, rows, K = data(), [], 10
    cases: dict[str, dict] = {
        "looped particles, minibatches of 10, exact guide": {"batch": 10, "width": 1.0},
        "looped particles, minibatches of 10": {"batch": 10},
    }
    for name, options in cases.items():
        values = [
            value(repeats, elbo, (model, guide), x, **options)
            for elbo in (renyi(K, 1, False), ours(K, False))
        ]
        rows.append([name, str(K), f"{evidence(x):.2f}", *values])

    def loop_model(x: Tensor) -> None:
        for i in plate(x):
            z = pyro.sample(f"z{i}", prior())
            pyro.sample(f"x{i}", likelihood(z), obs=x[i])

    def loop_guide(x: Tensor) -> None:
        for i in plate(x):
            pyro.sample(f"z{i}", approximation(x[i]))

    x = data(10)
    values = [value(repeats, elbo, (loop_model, loop_guide), x) for elbo in (renyi(K, 0), ours(K))]
    rows.append(["sequential plate, 10 data", str(K), f"{evidence(x):.2f}", *values])
    return HEADS, rows


SIGNS = torch.tensor([-1.0, 0.3, 1.2], dtype=torch.float64)


def switch_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        on = pyro.sample("on", dist.Bernoulli(x.new_tensor(0.4)))
        pyro.sample("x", dist.Normal(2 * on - 1, 1.0), obs=x)


def switch_guide(x: Tensor) -> None:
    logits = pyro.param("logits", lambda: x.new_zeros(3))
    with pyro.plate("data", len(x)):
        pyro.sample("on", dist.Bernoulli(logits=logits))


def exact_gradient() -> Tensor:
    """Of the expected importance-weighted bound of two particles, by enumeration."""
    logits = SIGNS.new_zeros(3).requires_grad_()
    states = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    log_q = dist.Bernoulli(logits=logits).log_prob(states)
    log_p = dist.Bernoulli(SIGNS.new_tensor(0.4)).log_prob(states)
    log_w = log_p + dist.Normal(2 * states - 1, 1.0).log_prob(SIGNS) - log_q
    bound = torch.logaddexp(log_w[:, None], log_w[None]) - math.log(2)
    ((log_q[:, None] + log_q[None]).exp() * bound).sum().backward()
    assert logits.grad is not None
    return logits.grad


def discrete(repeats: int) -> Table:
    rows = [["exact, by enumeration", *(f"{g:.3f}" for g in exact_gradient().tolist())]]
    for name, elbo in (
        ("RenyiELBO(alpha=0)", renyi(2)),
        ('ImportanceWeightedELBO("vimco")', ImportanceWeightedELBO(2, "vimco", vectorize_particles=True)),
        ('ImportanceWeightedELBO("score")', ImportanceWeightedELBO(2, "score", vectorize_particles=True)),
    ):
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        gradients = []
        for _ in range(10 * repeats):
            elbo.loss_and_grads(switch_model, switch_guide, SIGNS)
            logits: Any = pyro.param("logits")
            logits = logits.unconstrained()
            gradients.append(-logits.grad.clone())
            logits.grad = None
        mean, error = torch.stack(gradients).mean(0), torch.stack(gradients).std(0) / len(gradients) ** 0.5
        cells = [f"{m:.3f} ± {e:.3f}" for m, e in zip(mean.tolist(), error.tolist(), strict=True)]
        rows.append([name, *cells])
    return ["guide gradient, K = 2", "datum 1", "datum 2", "datum 3"], rows


def wake_sleep(repeats: int) -> Table:
    def pyros(K: int) -> ReweightedWakeSleep:
        return ReweightedWakeSleep(num_particles=K, max_plate_nesting=1)

    def library(K: int) -> ReweightedWakeSleepELBO:
        return ReweightedWakeSleepELBO(K, vectorize_particles=True)

    rows = []
    for count, size, name in ((N, None, f"N = {N}, one plate"), (10, N, f"10 of N = {N}")):
        x = data(count)
        exact = (size or count) / count * evidence(x)
        for K in (10, 1000):
            values = [value(repeats, elbo(K), (model, guide), x, size=size) for elbo in (pyros, library)]
            rows.append([name, str(K), f"{exact:.2f}", *values])
    return ["situation", "K", "exact", "ReweightedWakeSleep", "this library"], rows


def interface(repeats: int) -> Table:
    def gamma_model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
            pyro.sample("x", dist.Exponential(rate), obs=x)

    def rejecting_guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            shape = pyro.param("shape", lambda: x.new_tensor(2.0))
            pyro.sample("rate", RejectionStandardGamma(shape.expand(len(x))))

    def outcome(run: Callable[..., Any], *args: Any) -> str:
        pyro.clear_param_store()
        try:
            run(*args)
        except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
            return type(error).__name__
        return "works"

    x, rows = data(10), []
    losses: list[Any] = [
        Trace_ELBO(2, max_plate_nesting=1),
        TraceGraph_ELBO(2, max_plate_nesting=1),
        renyi(2),
        ReweightedWakeSleep(2, max_plate_nesting=1),
        ours(2),
        ReweightedWakeSleepELBO(2),
        TVO(2),
        BiHelmholtzELBO(2),
    ]
    for loss in losses:
        module = outcome(lambda loss: loss(model, guide)(x), loss)
        step = outcome(loss.loss_and_grads, gamma_model, rejecting_guide, x[:, 0].abs())
        whose = "Pyro" if type(loss).__module__.startswith("pyro.") else "this library"
        rows.append([f"{type(loss).__name__} ({whose})", module, step])
    return ["objective", "elbo(model, guide)(x)", "guide that samples by rejection"], rows


TABLES: dict[str, Callable[[int], Table]] = {
    "agreement": agreement,
    "subsampling": subsampling,
    "scale": scale,
    "outside": outside,
    "autoguides": autoguides,
    "loops": loops,
    "discrete": discrete,
    "wake_sleep": wake_sleep,
    "interface": interface,
}


def markdown(table: Table) -> str:
    heads, rows = table
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def insert(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between the markers of the table called ``name``."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
    page, count = re.subn(pattern, lambda m: f"{m[1]}{text}\n{m[2]}", page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page has {count} places for the table '{name}': it needs one pair of markers")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--write", action="store_true", help="put the tables into the page")
    choice.add_argument("--smoke", action="store_true", help="seconds; figures mean nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    page = PAGE.read_text() if given.write else ""
    for name, table in TABLES.items():
        text = markdown(table(2 if given.smoke else REPEATS))
        print(f"\n{name}\n{text}", flush=True)
        page = insert(page, name, text) if given.write else page
    if given.write:
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
