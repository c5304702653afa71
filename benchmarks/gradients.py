# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""How tight each objective is, and how noisy the gradient with which it trains the guide.

    python benchmarks/gradients.py            # a few minutes, one thread
    python benchmarks/gradients.py --smoke    # the same in seconds; figures mean nothing

Two models whose evidence is known: probabilistic PCA with two latents, and a mixture of two Gaussians with one
binary latent; 20 data each, 10 particles. The guide is the exact posterior, or one that is off: for PCA half or
twice as wide, for the mixture with logits at half or at minus their value.

"gap" is log p(x) less the objective, in nats per datum. "noise" is the standard deviation of the guide's
gradient, as a root mean square over its parameters, after the objective is divided by the number of data; it is what
is left where the guide is exact and every gradient should vanish. "signal/noise" is the norm of the mean gradient
over that of its standard deviation, in one step, whatever the units of an objective.

Prints one table and writes it to benchmarks/results/gradients.csv.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, Trace_ELBO
from runs import publish
from torch import Tensor

from pyro_cpa.infer import TVO, AnalyticELBO, BiHelmholtzELBO, ImportanceWeightedELBO, ReweightedWakeSleepELBO

__all__: list[str] = []

RESULTS = Path(__file__).parent / "results"
PARTICLES, DATA = 10, 20

LOADINGS = torch.tensor([[1.0, 1.0], [1.0, -1.0], [0.5, 0.5], [0.5, -0.5]], dtype=torch.float64)
NOISE = 0.7
PRECISION = 1.0 + LOADINGS.square().sum(0) / NOISE**2  # of the posterior, diagonal as loadings are orthogonal
MARGINAL = LOADINGS @ LOADINGS.T + NOISE**2 * torch.eye(4, dtype=torch.float64)
SHARE = 0.4  # of the component at +1; the other is at -1


def pca_model(x: Tensor, off: float) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ LOADINGS.T, NOISE).to_event(1), obs=x)


def pca_guide(x: Tensor, off: float) -> None:
    loc = pyro.param("loc", lambda: x @ LOADINGS / NOISE**2 / PRECISION)
    log_scale = pyro.param("log_scale", lambda: (off * PRECISION.rsqrt()).log().expand(len(x), 2).clone())
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def mixture_model(x: Tensor, off: float) -> None:
    with pyro.plate("data", len(x)):
        on = pyro.sample("on", dist.Bernoulli(x.new_tensor(SHARE)))
        pyro.sample("x", dist.Normal(2.0 * on - 1.0, 1.0), obs=x)


def mixture_guide(x: Tensor, off: float) -> None:
    logits = pyro.param("logits", lambda: off * (2.0 * x + math.log(SHARE / (1.0 - SHARE))))
    with pyro.plate("data", len(x)):
        pyro.sample("on", dist.Bernoulli(logits=logits))


def pca_data() -> tuple[Tensor, float]:
    law = dist.MultivariateNormal(MARGINAL.new_zeros(4), MARGINAL)
    x = law.sample((DATA,))
    return x, law.log_prob(x).sum().item()


def mixture_data() -> tuple[Tensor, float]:
    weights = torch.tensor([1.0 - SHARE, SHARE], dtype=torch.float64)
    centers = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    law = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(centers, 1.0))
    x = law.sample((DATA,))
    return x, law.log_prob(x).sum().item()


def objectives(discrete: bool) -> dict[str, ELBO]:
    K, many = PARTICLES, {"vectorize_particles": True, "max_plate_nesting": 1}
    found: dict[str, ELBO] = {"Trace_ELBO": Trace_ELBO(K, **many)}
    if not discrete:
        found["AnalyticELBO"] = AnalyticELBO(K, **many)
        for estimator in ("reparam", "stl", "dreg"):
            found[f"IWAE, {estimator}"] = ImportanceWeightedELBO(K, estimator, **many)
    else:
        for estimator in ("score", "vimco"):
            found[f"IWAE, {estimator}"] = ImportanceWeightedELBO(K, estimator, **many)
    found["wake-sleep"] = ReweightedWakeSleepELBO(K, **many)
    found["TVO"] = TVO(K, **many)
    found["BiHM"] = BiHelmholtzELBO(K, **many)
    return found


MODELS: dict[str, tuple[Callable[..., None], Callable[..., None], Callable[[], tuple[Tensor, float]]]] = {
    "PCA": (pca_model, pca_guide, pca_data),
    "mixture": (mixture_model, mixture_guide, mixture_data),
}
GUIDES: dict[str, dict[str, float]] = {
    "PCA": {"exact": 1.0, "half as wide": 0.5, "twice as wide": 2.0},
    "mixture": {"exact": 1.0, "logits halved": 0.5, "logits reversed": -1.0},
}


def measure(name: str, off: float, elbo: ELBO, repeats: int) -> tuple[Tensor, Tensor, float]:
    """Values (repeats,) and guide gradients (repeats, P) per datum, and the exact evidence per datum."""
    model, guide, data = MODELS[name]
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    x, evidence = data()
    values, gradients = [], []
    for _ in range(repeats):
        values.append(-elbo.loss_and_grads(model, guide, x, off) / len(x))
        leaves = [value.unconstrained() for value in pyro.get_param_store().values()]
        gradients.append(torch.cat([leaf.grad.flatten() for leaf in leaves]) / len(x))
        for leaf in leaves:
            leaf.grad = None
    return torch.tensor(values), torch.stack(gradients), evidence / len(x)


def rows(repeats: int) -> list[dict[str, Any]]:
    found = []
    for name in MODELS:
        for guide, off in GUIDES[name].items():
            for objective, elbo in objectives(discrete=name == "mixture").items():
                values, gradients, evidence = measure(name, off, elbo, repeats)
                mean, variance = gradients.mean(0), gradients.var(0)
                # The noise that averaging leaves in the mean is no signal.
                signal = (mean.square() - variance / repeats).sum().clamp(min=0.0).sqrt()
                noise = variance.sum().sqrt()
                exact = guide == "exact"
                found.append(
                    {
                        "model": name,
                        "guide": guide,
                        "objective": objective,
                        "gap": f"{round(evidence - values.mean().item(), 3) + 0.0:.3f}",
                        "s.e.": f"{values.std().item() / math.sqrt(repeats):.3f}",
                        "noise": f"{variance.mean().sqrt().item():.1e}",
                        "signal/noise": "" if exact else f"{(signal / noise).item():.2f}",
                    }
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="seconds; figures mean nothing")
    smoke = parser.parse_args().smoke
    torch.set_num_threads(1)
    path = RESULTS / f"gradients{'_smoke' if smoke else ''}.csv"
    publish("Gaps, and noise and signal of the guide's gradient", rows(2 if smoke else 400), path)


if __name__ == "__main__":
    main()
