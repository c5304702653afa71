# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Every objective against the truth: its gap, and bias, noise and signal of its gradients.

    python benchmarks/bounds.py            # half an hour, one thread; resumes row by row
    python benchmarks/bounds.py --smoke    # the same in seconds; writes nothing

Two models whose evidence is known: a sigmoid belief net with 4 and 3 binary latents, enumerated, and a
piecewise-affine decoder 2-8-4 with Gaussian noise, integrated exactly; 10 data each, drawn from the model. The guide is
the best of its family in KL(guide || posterior), or led away from it: for the belief net its weights shrink until it
no longer looks at the data, for the decoder its means move by multiples of its standard deviations. Three sweeps change one
thing at a time: the particles S, the mismatch (given as KL(guide || posterior) in nats per datum), and the nodes of the TVO.

- gap: log p(x) less the mean of the objective, in nats per datum.
- model bias, model noise: distance of the mean gradient of the model's parameters from that of log p(x), and its standard
  deviation in one step, both in units of the norm of the gradient of log p(x).
- signal/noise: of the guide's gradient in one step, the norm of its mean over that of its standard deviation.
- cosine: between the guide's mean gradient and the direction in which KL(guide || posterior) falls fastest.

Then every objective trains both nets from the same starts: exact log p(x) of the training data and KL(guide || posterior)
after equally many steps of Adam, S = 5.

Prints its tables and keeps them in benchmarks/results/bounds.csv and bounds_training.csv, with one figure a sweep.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import ELBO, Trace_ELBO
from pyro.nn import PyroModule
from runs import Stopwatch, arguments, folders, provenance, put, show
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_cpa.distributions import CPAMarginal
from pyro_cpa.infer import (
    TVO,
    AnalyticELBO,
    BiHelmholtzELBO,
    ImportanceWeightedELBO,
    Linear,
    LogUniform,
    Moments,
    OptimalLeft,
    ReweightedWakeSleepELBO,
)
from pyro_cpa.models import SigmoidBeliefNet

__all__: list[str] = []

DATA, NOISE = 10, 0.3
PARTICLES = (2, 5, 10, 50, 200)
MISMATCH = {"belief net": (0.0, 0.25, 0.5, 0.75, 1.0), "decoder": (0.0, 0.5, 1.0, 2.0, 3.0)}
NODES = (1, 2, 5, 10, 20, 50)
KEYS = ("model", "sweep", "objective", "S", "mismatch")


# ---- models whose evidence is known ----------------------------------------------------------------------


class BeliefNet:
    """Two layers of 4 and 3 binary latents over 8 binary entries."""

    def __init__(self, seed: int, rows: int = DATA) -> None:
        torch.manual_seed(seed)
        self.net = SigmoidBeliefNet(8, (4, 3))
        for value in self.net.generation.parameters():
            nn.init.normal_(value)
        bits = torch.tensor(list(itertools.product([0.0, 1.0], repeat=7)))
        self.states = bits[:, None, :4], bits[:, None, 4:]
        self.x = self.net.sample_generation(rows)[0]
        self.model, self.guide = self.net.model, self.net.guide
        self.theta = [*self.net.generation.parameters(), self.net.prior_logits]
        self.phi = list(self.net.recognition.parameters())

    def joint(self) -> tuple[Tensor, Tensor]:
        """log p(x, z) and log q(z | x), (128, N)."""
        z1, z2 = (z.expand(-1, len(self.x), -1) for z in self.states)
        layers = [self.x.expand(len(z1), -1, -1), z1, z2]
        return self.net.log_generation(layers), self.net.log_recognition(layers)

    def evidence(self) -> Tensor:
        return self.joint()[0].logsumexp(0)

    def divergence(self) -> Tensor:
        """KL(guide || posterior) of each datum."""
        log_p, log_q = self.joint()
        return (log_q.exp() * (log_q - log_p + log_p.logsumexp(0))).sum(0)

    def lead_away(self, mismatch: float) -> None:
        with torch.no_grad():
            for value in self.phi:
                value.mul_(1 - mismatch)


class Decoder:
    """A piecewise-affine decoder 2-8-4 with Gaussian noise; the guide has a mean and a scale for each datum."""

    def __init__(self, seed: int, rows: int = DATA) -> None:
        torch.manual_seed(seed)
        self.net = PyroModule[nn.Sequential](nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
        for value in self.net.parameters():
            nn.init.normal_(value)
        self.x = CPAMarginal(self.net, NOISE).sample((rows,)).detach()
        self.loc, self.log_scale = (nn.Parameter(torch.zeros(rows, 2) + start) for start in (0.0, -1.0))
        self.theta, self.phi = list(self.net.parameters()), [self.loc, self.log_scale]

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), NOISE).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc, self.log_scale.exp()).to_event(1))

    def evidence(self) -> Tensor:
        return CPAMarginal(self.net, NOISE).log_prob(self.x)

    def divergence(self) -> Tensor:
        """KL(guide || posterior) of each datum: analytic against the prior, 4096 antithetic draws otherwise."""
        half = torch.randn(2048, *self.loc.shape, generator=torch.Generator().manual_seed(0))
        z = self.loc + self.log_scale.exp() * torch.cat([half, -half])
        likelihood = dist.Normal(self.net(z), NOISE).log_prob(self.x).sum(-1).mean(0)
        prior = 0.5 * (self.loc**2 + (2 * self.log_scale).exp() - 1) - self.log_scale
        return self.evidence().detach() - likelihood + prior.sum(-1)

    def lead_away(self, mismatch: float) -> None:
        with torch.no_grad():
            self.loc += mismatch * self.log_scale.exp()


MODELS: dict[str, Callable[..., BeliefNet | Decoder]] = {"belief net": BeliefNet, "decoder": Decoder}


def fit_guide(pair: BeliefNet | Decoder, steps: int) -> None:
    """The best guide of its family, by the exact divergence."""
    optim = torch.optim.LBFGS(pair.phi, max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optim.zero_grad()
        loss = pair.divergence().sum()
        loss.backward()
        return loss

    optim.step(closure)


# ---- objectives ------------------------------------------------------------------------------------------


def objectives(name: str, S: int) -> dict[str, ELBO]:
    many: dict[str, Any] = {"vectorize_particles": True, "max_plate_nesting": 1}
    found: dict[str, ELBO] = {"Trace_ELBO": Trace_ELBO(S, **many)}
    if name == "decoder":
        found["AnalyticELBO"] = AnalyticELBO(S, **many)
    for estimator in ("reparam", "dreg") if name == "decoder" else ("score", "vimco"):
        found[f"IWAE, {estimator}"] = ImportanceWeightedELBO(S, estimator, **many)
    found["wake-sleep"] = ReweightedWakeSleepELBO(S, **many)
    found["TVO"] = TVO(S, **many)
    if name == "decoder":
        found["TVO, dreg"] = TVO(S, estimator="dreg", **many)
    found["BiHM"] = BiHelmholtzELBO(S, **many)
    return found


def schedules(S: int) -> dict[str, TVO]:
    many: dict[str, Any] = {"vectorize_particles": True, "max_plate_nesting": 1}
    found = {}
    for K in NODES:
        kinds = {"linear": Linear(K)}
        if K > 1:
            kinds |= {f"log, {first:g}": LogUniform(K, beta_1=first) for first in (0.025, 0.2)}
            kinds |= {"moments": Moments(K), "optimal": OptimalLeft(K)}
        found |= {f"{kind} / {K}": TVO(S, schedule, **many) for kind, schedule in kinds.items()}
    return found


# ---- measurement -----------------------------------------------------------------------------------------


def gradient(values: list[nn.Parameter]) -> Tensor:
    return torch.cat([(torch.zeros_like(v) if v.grad is None else v.grad).flatten() for v in values]).clone()


def clear(pair: BeliefNet | Decoder) -> None:
    for value in (*pair.theta, *pair.phi):
        value.grad = None


def exact(pair: BeliefNet | Decoder) -> tuple[float, float, Tensor, Tensor]:
    """log p and KL per datum, the gradient of log p(x), and the direction in which the divergence falls."""
    clear(pair)
    evidence = pair.evidence().sum()
    evidence.backward()
    model = gradient(pair.theta)
    clear(pair)
    divergence = pair.divergence().sum()
    divergence.backward()
    return evidence.item() / len(pair.x), divergence.item() / len(pair.x), model, -gradient(pair.phi)


def measure(pair: BeliefNet | Decoder, elbo: ELBO, repeats: int) -> dict[str, str]:
    evidence, divergence, true_model, downhill = exact(pair)
    pyro.set_rng_seed(0)
    values, model, guide = [], [], []
    for _ in range(repeats):
        clear(pair)
        loss = elbo.differentiable_loss(pair.model, pair.guide, pair.x)
        loss.backward()
        values.append(-loss.item() / len(pair.x))
        # The objectives leave gradients of their losses, to be minimised.
        model.append(-gradient(pair.theta))
        guide.append(-gradient(pair.phi))
    bound, thetas, phis = torch.tensor(values), torch.stack(model), torch.stack(guide)
    size = true_model.norm()

    def squared(mean: Tensor, variance: Tensor) -> Tensor:
        """Squared norm without the noise that averaging leaves in it."""
        return (mean.square() - variance / repeats).sum().clamp(min=0.0)

    bias = squared(thetas.mean(0) - true_model, thetas.var(0)).sqrt() / size
    noise = phis.var(0).sum().sqrt()
    signal = squared(phis.mean(0), phis.var(0)).sqrt()
    cosine = torch.nn.functional.cosine_similarity(phis.mean(0), downhill, dim=0)
    return {
        "KL(q||p)": f"{divergence:.3f}",
        "gap": f"{round(evidence - bound.mean().item(), 4) + 0.0:.4f}",
        "s.e.": f"{bound.std().item() / math.sqrt(repeats):.4f}",
        "model bias": f"{bias.item():.3f}",
        "model noise": f"{(thetas.var(0).sum().sqrt() / size).item():.3f}",
        "signal/noise": f"{(signal / noise).item():.3f}",
        "cosine": f"{cosine.item():.2f}",
    }


def sweeps(smoke: bool) -> list[tuple[str, str, float, int, str, ELBO]]:
    """(model, sweep, mismatch, S, objective, ELBO) of each row."""
    found: list[tuple[str, str, float, int, str, ELBO]] = []
    for name in MODELS:
        middle = MISMATCH[name][2]
        for S in PARTICLES[:1] if smoke else PARTICLES:
            found += [
                (name, "particles", middle, S, label, elbo) for label, elbo in objectives(name, S).items()
            ]
        for off in MISMATCH[name][:1] if smoke else MISMATCH[name]:
            found += [
                (name, "mismatch", off, 10, label, elbo) for label, elbo in objectives(name, 10).items()
            ]
        found += [
            (name, "nodes", middle, 10, label, elbo)
            for label, elbo in list(schedules(10).items())[: 2 if smoke else None]
        ]
    return found


def table(path: Path, smoke: bool) -> list[dict[str, str]]:
    repeats, rows = 3 if smoke else 200, []
    done = {}
    if path.exists():
        with open(path, newline="") as file:
            done = {tuple(row[key] for key in KEYS): row for row in csv.DictReader(file)}
    fitted: dict[str, BeliefNet | Decoder] = {}
    for name, sweep, off, S, label, elbo in tqdm(sweeps(smoke), desc="rows"):
        key = (name, sweep, label, str(S), f"{off:g}")
        if key in done:
            rows.append(done[key])
            continue
        pyro.clear_param_store()
        if name not in fitted:
            fitted[name] = MODELS[name](seed=0)
            fit_guide(fitted[name], 5 if smoke else 200)
        pair = fitted[name]
        kept = [value.detach().clone() for value in pair.phi]
        pair.lead_away(off)
        watch = Stopwatch()
        row = dict(zip(KEYS, key, strict=True)) | measure(pair, elbo, repeats)
        wall, cpu = watch.read()
        row |= {"repeats": str(repeats), "wall s": f"{wall:.1f}", "CPU s": f"{cpu:.1f}"}
        row |= provenance() | {"command": "python benchmarks/bounds.py"}
        with torch.no_grad():
            for value, old in zip(pair.phi, kept, strict=True):
                value.copy_(old)
        put(path, [row], KEYS)
        rows.append(row)
    return rows


def training(path: Path, smoke: bool) -> list[dict[str, str]]:
    """Exact log p of the training rows after training with each objective from the same starts."""
    keys, rows = ("model", "objective"), []
    seeds, steps = (2, 2) if smoke else (3, 1000)
    done = {}
    if path.exists():
        with open(path, newline="") as file:
            done = {tuple(row[key] for key in keys): row for row in csv.DictReader(file)}
    for name in MODELS:
        for label in objectives(name, 5):
            if (name, label) in done:
                rows.append(done[name, label])
                continue
            watch, reached = Stopwatch(), []
            for seed in range(seeds):
                pyro.clear_param_store()
                pair, start = MODELS[name](seed=seed, rows=100), MODELS[name](seed=100 + seed, rows=100)
                start.x, truth = pair.x, pair.evidence().mean().item()
                optim = torch.optim.Adam([*start.theta, *start.phi], 1e-2)
                loss = objectives(name, 5)[label].differentiable_loss
                for _ in tqdm(range(steps), desc=f"{name}, {label}", leave=False):
                    optim.zero_grad()
                    loss(start.model, start.guide, start.x).backward()
                    optim.step()
                with torch.no_grad():
                    reached.append((truth, start.evidence().mean().item(), start.divergence().mean().item()))
            found = torch.tensor(reached)
            error = found.std(0) / math.sqrt(seeds)
            wall, cpu = watch.read()
            row = {
                "model": name,
                "objective": label,
                "log p(x)": f"{found[:, 1].mean():.3f}",
                "of the true model": f"{found[:, 0].mean():.3f}",
                "above the true model": f"{(found[:, 1] - found[:, 0]).mean():.3f}",
                "s.e. over seeds": f"{(found[:, 1] - found[:, 0]).std() / math.sqrt(seeds):.3f}",
                "KL(q||p)": f"{found[:, 2].mean():.3f}",
                "s.e. of KL": f"{error[2]:.3f}",
                "seeds": str(seeds),
                "steps": str(steps),
                "wall s": f"{wall:.0f}",
                "CPU s": f"{cpu:.0f}",
            }
            row |= provenance() | {"command": "python benchmarks/bounds.py"}
            put(path, [row], keys)
            rows.append(row)
    return rows


# ---- figures ---------------------------------------------------------------------------------------------

PANELS = {"gap": "symlog", "model bias": "log", "model noise": "log", "signal/noise": "log"}
AXES = {"particles": "S", "mismatch": "KL(q||p)", "nodes": "nodes"}


def draw(rows: list[dict[str, str]], sweep: str, path: Path) -> None:
    """A row of panels a model, a curve an objective."""
    figure = Figure(figsize=(16, 7), layout="constrained")
    axes = figure.subplots(2, len(PANELS))
    for line, name in enumerate(MODELS):
        curves: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            if row["model"] == name and row["sweep"] == sweep:
                label, _, nodes = row["objective"].partition(" / ")
                curves.setdefault(label, []).append(row | {"nodes": nodes})
        for ax, (quantity, scale) in zip(axes[line], PANELS.items(), strict=True):
            for label, points in curves.items():
                at = [float(point[AXES[sweep]]) for point in points]
                ax.plot(at, [float(point[quantity]) or math.nan for point in points], "o-", ms=3, label=label)
            ax.set_xscale("linear" if sweep == "mismatch" else "log")
            ax.set_yscale(scale, **({"linthresh": 0.01} if scale == "symlog" else {}))
            ax.set_title(f"{name}: {quantity}")
            ax.set_xlabel(AXES[sweep])
        axes[line, 0].legend(fontsize=7)
    figure.savefig(path, dpi=80)


def main() -> None:
    smoke = arguments(__doc__).parse_args().smoke
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    with folders(smoke) as place:
        rows = table(place.results / "bounds.csv", smoke)
        show(rows)
        for sweep in AXES:
            draw(rows, sweep, place.results / f"bounds_{sweep}.png")
        print()
        show(training(place.results / "bounds_training.csv", smoke))


if __name__ == "__main__":
    main()
