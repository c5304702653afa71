# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Every objective against the truth: its gap, and bias, noise and signal of its gradients.

    python benchmarks/bounds.py            # some minutes, one thread; resumes row by row
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
after equally many steps of Adam, S = 5 and 20, 10 seeds; the guide of the decoder has parameters for each datum.

Prints its tables and keeps them in benchmarks/results/bounds.csv and bounds_training.csv, with one figure a sweep.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyro
import torch
from known_evidence import BeliefNet, Decoder, Pair, Weights
from matplotlib.figure import Figure
from pyro.infer import ELBO, Trace_ELBO
from runs import Stopwatch, arguments, folders, kept, minimise, provenance, put, show
from torch import Tensor
from tqdm.auto import tqdm

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

__all__: list[str] = []

PARTICLES, TRAINED_WITH = (2, 5, 10, 50, 200), (5, 20)
MISMATCH = {"belief net": (0.0, 0.25, 0.5, 0.75, 1.0), "decoder": (0.0, 0.5, 1.0, 2.0, 3.0)}
NODES = (1, 2, 5, 10, 20, 50)
KEYS = ("model", "sweep", "objective", "S", "mismatch")


MODELS: dict[str, type[Pair]] = {"belief net": BeliefNet, "decoder": Decoder}


def fit_guide(pair: Pair, steps: int) -> None:
    """The best guide of its family, by the exact divergence."""
    minimise(list(pair.phi.values()), lambda: pair.divergence().sum(), steps)


# ---- objectives ------------------------------------------------------------------------------------------


def objectives(name: str, S: int) -> dict[str, ELBO]:
    many: dict[str, Any] = {"vectorize_particles": True, "max_plate_nesting": 2}
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
    many: dict[str, Any] = {"vectorize_particles": True, "max_plate_nesting": 2}
    found = {}
    for K in NODES:
        kinds = {"linear": Linear(K)}
        if K > 1:
            kinds |= {f"log, {first:g}": LogUniform(K, beta_1=first) for first in (0.025, 0.2)}
            kinds |= {"moments": Moments(K), "optimal": OptimalLeft(K)}
        found |= {f"{kind} / {K}": TVO(S, schedule, **many) for kind, schedule in kinds.items()}
    return found


# ---- measurement -----------------------------------------------------------------------------------------


def gradient(weights: Weights) -> Tensor:
    """(R, P)."""
    found = [torch.zeros_like(v) if v.grad is None else v.grad for v in weights.values()]
    return torch.cat([value.flatten(1) for value in found], 1)


def exact(pair: Pair) -> tuple[float, float, Tensor, Tensor]:
    """log p and KL per datum, the gradient of log p(x), and the direction in which the divergence falls."""
    one = pair.copies(1)
    evidence = one.evidence()
    evidence.sum().backward()
    model = gradient(one.theta)[0]
    one = pair.copies(1)
    divergence = one.divergence()
    divergence.sum().backward()
    return evidence.mean().item(), divergence.mean().item(), model, -gradient(one.phi)[0]


def measure(pair: Pair, elbo: ELBO, blocks: int, copies: int) -> dict[str, str]:
    """Gradients of ``blocks`` x ``copies`` steps, the copies of a block at once."""
    evidence, divergence, true_model, downhill = exact(pair)
    pyro.set_rng_seed(0)
    elbo.differentiable_loss(pair.copies(copies).model, pair.copies(copies).guide)  # adaptive nodes settle
    values, model, guide = [], [], []
    for _ in range(blocks):
        block = pair.copies(copies)
        loss = elbo.differentiable_loss(block.model, block.guide)
        loss.backward()
        values.append(-loss.item() / block.observed().shape[:2].numel())
        # The objectives leave gradients of their losses, to be minimised.
        model.append(-gradient(block.theta))
        guide.append(-gradient(block.phi))
    bound, thetas, phis = torch.tensor(values), torch.cat(model), torch.cat(guide)
    size = true_model.norm()

    def squared(mean: Tensor, variance: Tensor) -> Tensor:
        """Squared norm without the noise that averaging leaves in it."""
        return (mean.square() - variance / len(thetas)).sum().clamp(min=0.0)

    bias = squared(thetas.mean(0) - true_model, thetas.var(0)).sqrt() / size
    noise = phis.var(0).sum().sqrt()
    signal = squared(phis.mean(0), phis.var(0)).sqrt()
    cosine = torch.nn.functional.cosine_similarity(phis.mean(0), downhill, dim=0)
    return {
        "KL(q||p)": f"{divergence:.3f}",
        "gap": f"{round(evidence - bound.mean().item(), 4) + 0.0:.4f}",
        "s.e.": f"{bound.std().item() / math.sqrt(blocks):.4f}",
        "model bias": f"{bias.item():.3f}",
        "model noise": f"{(thetas.var(0).sum().sqrt() / size).item():.3f}",
        "signal/noise": f"{(signal / noise).item():.3f}",
        "cosine": f"{cosine.item():.2f}",
        "steps": str(len(thetas)),
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
    blocks, rows = 2 if smoke else 10, []
    done = kept(path, KEYS)
    fitted: dict[str, Pair] = {}
    for name, sweep, off, S, label, elbo in tqdm(sweeps(smoke), desc="rows"):
        key = (name, sweep, label, str(S), f"{off:g}")
        if key in done:
            rows.append(done[key])
            continue
        if name not in fitted:
            fitted[name] = MODELS[name].draw(seed=0)
            fit_guide(fitted[name], 5 if smoke else 200)
        copies = 2 if smoke else max(10, min(100, 1000 // S))
        watch = Stopwatch()
        row = dict(zip(KEYS, key, strict=True)) | measure(fitted[name].led_away(off), elbo, blocks, copies)
        wall, cpu = watch.read()
        row |= {"wall s": f"{wall:.1f}", "CPU s": f"{cpu:.1f}"}
        row |= provenance() | {"command": "python benchmarks/bounds.py"}
        put(path, [row], KEYS)
        rows.append(row)
    return rows


def train(kind: type[Pair], truths: list[Pair], starts: list[Pair], elbo: ELBO, steps: int) -> Pair:
    """All seeds at once: a copy is a seed, with data and weights of its own."""
    pair = kind(
        {k: torch.cat([start.theta[k] for start in starts]) for k in starts[0].theta},
        {k: torch.cat([start.phi[k] for start in starts]) for k in starts[0].phi},
        torch.stack([truth.x for truth in truths]),
    )
    torch.manual_seed(0)
    optim = torch.optim.Adam([*pair.theta.values(), *pair.phi.values()], 1e-2)
    for _ in tqdm(range(steps), leave=False):
        optim.zero_grad()
        elbo.differentiable_loss(pair.model, pair.guide).backward()
        optim.step()
    return pair


def training(path: Path, smoke: bool) -> list[dict[str, str]]:
    """Exact log p of the training rows after training with each objective from the same starts."""
    keys = ("model", "objective", "S")
    seeds, steps = (2, 2) if smoke else (10, 1000)
    done, rows = kept(path, keys), []
    for name, kind in MODELS.items():
        truths = [kind.draw(seed, rows=100) for seed in range(seeds)]
        starts = [kind.draw(1000 + seed, rows=100) for seed in range(seeds)]
        truth = torch.cat([pair.evidence().detach().mean(1) for pair in truths])
        for S in TRAINED_WITH[:1] if smoke else TRAINED_WITH:
            for label, elbo in objectives(name, S).items():
                if (name, label, str(S)) in done:
                    rows.append(done[name, label, str(S)])
                    continue
                watch = Stopwatch()
                pair = train(kind, truths, starts, elbo, steps)
                above = pair.evidence().detach().mean(1) - truth
                divergence = pair.divergence().detach().mean(1)
                wall, cpu = watch.read()
                row = {
                    "model": name,
                    "objective": label,
                    "S": str(S),
                    "log p(x)": f"{(above + truth).mean():.3f}",
                    "above the true model": f"{above.mean():.3f}",
                    "s.e. over seeds": f"{above.std() / math.sqrt(seeds):.3f}",
                    "KL(q||p)": f"{divergence.mean():.3f}",
                    "s.e. of KL": f"{divergence.std() / math.sqrt(seeds):.3f}",
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
