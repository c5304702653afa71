# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Every objective on binarised MNIST: a sigmoid belief net and a VAE, by updates and by time.

    python benchmarks/discrete_mnist.py --epochs 100                     # everything: weeks of one core
    python benchmarks/discrete_mnist.py --model sbn --objective TVO --S 10 --epochs 2
    python benchmarks/discrete_mnist.py --smoke                          # small nets, digits, in seconds; writes nothing

"sbn": three layers of 200 binary units, linear maps; "vae": 784-200-200-50 and back, tanh. Pixels are drawn once from the
grey values with a fixed seed: the law of the usual file, but not the same draw. Adam 3e-4 on batches of 24, as in the
replication that the reference values come from; its runs are 4 million updates, 1600 epochs. The TVO's nodes are those
that it used: 0, b, 1 with b = 0.05, 0.2, 0.3 for S = 5, 10, 50 (belief net), five intervals from 0.01, 0.02, 0.03 (VAE);
"TVO-moments" sets five intervals by moments instead, "TVO-uncentred" leaves the mean in the guide's score, as published, and
"TVO-dreg" has the doubly reparameterised gradient.
"ELBO" for the belief net is the TVO with one interval: the score function with the mean of the other particles as baseline.

Three tables. discrete_mnist.csv: log p of the first test rows, S = 5000, "+-" the standard error over rows; KL(q||p) is log
p less the ELBO of the same particles; "to the best" is the mean difference to the best run of the same model, S and number
of updates, row by row, from log p of every row in discrete_mnist_rows.csv. discrete_mnist_curves.csv and the picture
discrete_mnist.png: log p of 100 test rows with S = 100 every half epoch, against updates and against CPU time at the cost of
an update that update_costs.py measured side by side. From it "at equal CPU time" is read: the last value that a run had when
the cheapest of those ended. A run that was killed, or is asked for more epochs, resumes from benchmarks/checkpoints; its
figures after fewer stay in the tables.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter
from pyro.infer import ELBO
from runs import (
    Folders,
    Limits,
    Progress,
    arguments,
    batches,
    folders,
    kept,
    mean_and_error,
    provenance,
    put,
    show,
    train,
)
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_cpa.datasets import Dataset, binarize, load_digits, load_mnist
from pyro_cpa.infer import (
    TVO,
    AnalyticELBO,
    BiHelmholtzELBO,
    ImportanceWeightedELBO,
    Linear,
    LogUniform,
    Moments,
    ReweightedWakeSleepELBO,
    log_evidence,
)
from pyro_cpa.models import VAE, SigmoidBeliefNet
from pyro_cpa.models.likelihoods import Bernoulli

__all__: list[str] = []

BATCH, LR, AT_ONCE = 24, 3e-4, 10_000
PARTICLES = (5, 10, 50)
RUN = ("model", "objective", "S", "seed")
KEYS = (*RUN, "updates")
COSTED = ("model", "objective", "S")
COST, TIME = "CPU ms an update", "CPU s by cost of an update"
NODE = {5: 0.05, 10: 0.2, 50: 0.3}
FIRST = {5: 0.01, 10: 0.02, 50: 0.03}

Make = Callable[..., ELBO]
SBN: dict[str, Make] = {
    "ELBO": lambda S, **many: TVO(S, Linear(1), **many),
    "VIMCO": lambda S, **many: ImportanceWeightedELBO(S, "vimco", **many),
    "RWS": ReweightedWakeSleepELBO,
    "TVO": lambda S, **many: TVO(S, [0.0, NODE.get(S, 0.2), 1.0], **many),
    "TVO-uncentred": lambda S, **many: TVO(S, [0.0, NODE.get(S, 0.2), 1.0], center=False, **many),
    "TVO-moments": lambda S, **many: TVO(S, Moments(5), **many),
    "BiHM": BiHelmholtzELBO,
}
CONTINUOUS: dict[str, Make] = {
    "ELBO": AnalyticELBO,
    "IWAE": lambda S, **many: ImportanceWeightedELBO(S, "reparam", **many),
    "DReG": lambda S, **many: ImportanceWeightedELBO(S, "dreg", **many),
    "RWS": ReweightedWakeSleepELBO,
    "TVO": lambda S, **many: TVO(S, LogUniform(5, beta_1=FIRST.get(S, 0.02)), **many),
    "TVO-moments": lambda S, **many: TVO(S, Moments(5), **many),
    "TVO-dreg": lambda S, **many: TVO(S, LogUniform(5, beta_1=FIRST.get(S, 0.02)), estimator="dreg", **many),
    "BiHM": BiHelmholtzELBO,
}
OBJECTIVES = {"sbn": SBN, "vae": CONTINUOUS}


def build(name: str, x: Tensor, smoke: bool) -> Any:
    width = 20 if smoke else 200
    if name == "sbn":
        return SigmoidBeliefNet(x.shape[1], (width,) * 3, data_mean=x.mean(0))
    options: dict[str, Any] = {"likelihood": Bernoulli(), "activation": nn.Tanh, "dropout": 0.0}
    return VAE(x.shape[1], width // 4, hidden_dims=(width, width), **options)


def images(options: Any) -> Dataset:
    return (load_digits() if options.smoke else load_mnist(options.data)).map(binarize)


def loss_of(model: Any, name: str, objective: str, S: int) -> Callable[[Tensor], Tensor]:
    """The loss of a batch, summed over its rows."""
    make = OBJECTIVES[name][objective]
    return make(S, vectorize_particles=True, max_plate_nesting=1)(model.model, model.guide)


@torch.no_grad()
def evidence(model: Any, x: Tensor, particles: int) -> Tensor:
    """log p of each row, by importance sampling."""
    was_training = model.training
    model.eval()
    state = torch.get_rng_state()  # a look at the test rows does not change the course of training
    torch.manual_seed(0)
    parts = x.split(max(1, AT_ONCE // particles))
    found = [log_evidence(model.model, model.guide, part, num_particles=particles).log_prob for part in parts]
    torch.set_rng_state(state)
    model.train(was_training)
    return torch.cat(found)


@torch.no_grad()
def elbo(model: Any, x: Tensor, particles: int) -> float:
    bound = TVO(particles, Linear(1), vectorize_particles=True, max_plate_nesting=1)
    model.eval()
    torch.manual_seed(0)
    parts = x.split(max(1, AT_ONCE // particles))
    return -sum(bound.loss(model.model, model.guide, part) for part in tqdm(parts, leave=False)) / len(x)


def run(name: str, objective: str, S: int, data: Dataset, options: Any, place: Folders) -> dict[str, Any]:
    pyro.clear_param_store()
    torch.manual_seed(options.seed)
    model = build(name, data.x_train, options.smoke)
    loss = loss_of(model, name, objective, S)
    steps_per_epoch = math.ceil(len(data.x_train) / BATCH)
    every = max(1, steps_per_epoch // 2)
    named = dict(zip(RUN, (name, objective, S, options.seed), strict=True))

    def look(progress: Progress) -> None:
        if progress.steps % every == 0:
            value = evidence(model, data.x_test[:100], 100)
            row = named | {"updates": progress.steps, "log p": f"{value.mean():.3f}"}
            put(place.results / "discrete_mnist_curves.csv", [row], KEYS)

    steps = 2 if options.smoke else max(1, round(options.epochs * steps_per_epoch))
    progress = train(
        model,
        lambda x: loss(x) / len(x),
        lambda done: batches(data.x_train, size=BATCH, seed=options.seed, steps=done),
        LR,
        Limits(steps, options.minutes),
        place.checkpoints / f"mnist_{name}_{objective}_S{S}_seed{options.seed}.pt",
        look,
    )
    x, particles = (data.x_test[:4], 10) if options.smoke else (data.x_test[: options.test_rows], 5000)
    log_p = evidence(model, x, particles)
    key = named | {"updates": progress.steps}
    singles = {"log p of the test rows": " ".join(f"{value:.3f}" for value in log_p.tolist())}
    put(place.results / "discrete_mnist_rows.csv", [key | singles], KEYS)
    return key | {
        "log p": f"{log_p.mean():.3f}",
        "s.e.": f"{log_p.std() / len(x) ** 0.5:.3f}",
        "KL(q||p)": f"{log_p.mean().item() - elbo(model, x, min(particles, 100)):.2f}",
        "test rows": len(x),
        "epochs": f"{progress.steps / steps_per_epoch:.3g}",
        "training wall s": f"{progress.wall:.0f}",
        "training CPU s": f"{progress.cpu:.0f}",
        **provenance(),
        "command": f"python benchmarks/discrete_mnist.py --model {name} --objective {objective} --S {S} "
        f"--epochs {progress.steps / steps_per_epoch:.3g} --seed {options.seed}",
    }


# ---- one run beside another ------------------------------------------------------------------------------


Row = dict[str, str]


def like(row: Row, other: Row) -> bool:
    """Whether two runs may be compared: the same model, particles and number of updates."""
    return all(row[key] == other[key] for key in ("model", "S", "updates"))


def to_the_best(rows: Sequence[Row], singles: dict[tuple[str, ...], Row]) -> list[Row]:
    """Adds to each row its mean difference to the best run of its model, S and updates, over the same test rows."""
    values = {
        key: torch.tensor([float(value) for value in row["log p of the test rows"].split()])
        for key, row in singles.items()
    }
    found = []
    for row in rows:
        mine = values[tuple(row[key] for key in KEYS)]
        beside = [values[tuple(r[key] for key in KEYS)] for r in rows if like(r, row)]
        best = max(beside, key=lambda value: value.mean().item())
        text = ""
        if best is not mine and len(best) == len(mine):
            text = mean_and_error(mine - best)
        found.append(row | {"to the best": text})
    return found


def equal_time(rows: Sequence[Row], points: Sequence[Row]) -> list[Row]:
    """Adds to each row what its run had reached in the time of the cheapest run of its model, S and updates."""
    found = []
    for row in rows:
        limit = min((float(r[TIME]) for r in rows if like(r, row) and r[TIME]), default=0.0)
        mine = [p for p in points if all(p[key] == row[key] for key in RUN) and p[TIME]]
        within = [p for p in mine if float(p[TIME]) <= limit]
        last = max(within, key=lambda p: int(p["updates"])) if within else None
        value = "" if last is None else f"{last['log p']} after {last['updates']} updates"
        found.append(row | {"at equal CPU time": value})
    return found


def draw(points: Sequence[Row], path: Path) -> None:
    """Learning curves by updates and by CPU time where it is known, a row of panels for each model and S."""
    panels = sorted({(p["model"], p["S"]) for p in points}, key=lambda panel: (panel[0], int(panel[1])))
    colours = {name: f"C{index}" for index, name in enumerate(sorted({p["objective"] for p in points}))}
    figure = Figure(figsize=(11, 4 * len(panels)), layout="constrained")
    for axes, (model, S) in zip(figure.subplots(len(panels), 2, squeeze=False), panels, strict=True):
        beside = [p for p in points if (p["model"], p["S"]) == (model, S)]
        curves: dict[tuple[str, str], list[Row]] = {}
        for p in beside:
            curves.setdefault((p["objective"], p["seed"]), []).append(p)
        ends = [float(curve[-1]["log p"]) for curve in curves.values()]
        low = min(ends) - 8.0  # the first steps would flatten the rest
        for axis, across in zip(axes, ("updates", TIME), strict=True):
            shown = [float(p[across]) for p in beside if p[across] and float(p["log p"]) > low]
            if not shown:
                axis.set_axis_off()
                continue
            for (name, _), curve in curves.items():
                known = [p for p in curve if p[across]]
                along = [float(p[across]) for p in known], [float(p["log p"]) for p in known]
                axis.plot(*along, color=colours[name], label=name)
            axis.set_xscale("log", subs=[])  # the runs are of very different lengths
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axis.set_xlim(left=min(shown))
            axis.set_ylim(low, max(ends) + 1.0)
            axis.set(title=f"{model}, S = {S}", xlabel=across, ylabel="log p(x), nats an image")
        axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)


def costed(rows: Sequence[Row], costs: dict[tuple[str, ...], Row]) -> list[Row]:
    """Adds to each row the cost of an update and the time that its updates take at that, "" where nothing is known."""
    found = []
    for row in rows:
        cost = costs.get(tuple(row[key] for key in COSTED), {}).get(COST, "")
        spent = f"{int(row['updates']) * float(cost) / 1e3:.1f}" if cost else ""
        found.append(row | {COST: cost, TIME: spent})
    return found


def tabulate(place: Folders) -> list[Row]:
    """Compares all runs so far, draws their curves, and returns the table."""
    path = place.results / "discrete_mnist.csv"
    costs = kept(place.results / "update_costs.csv", COSTED)
    points = costed(list(kept(place.results / "discrete_mnist_curves.csv", KEYS).values()), costs)
    rows = costed(list(kept(path, KEYS).values()), costs)
    rows = to_the_best(rows, kept(place.results / "discrete_mnist_rows.csv", KEYS))
    if points:
        draw(points, place.results / "discrete_mnist.png")
    return put(path, equal_time(rows, points), KEYS)


def main() -> None:
    parser = arguments(__doc__, "folder or .npz file of MNIST")
    parser.add_argument("--model", choices=OBJECTIVES, action="append", help="may be repeated; default: both")
    parser.add_argument("--objective", choices=sorted(SBN | CONTINUOUS), action="append", help="default: all")
    parser.add_argument("--S", type=int, choices=PARTICLES, action="append", help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=1.0, help="in all, those of a checkpoint included")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="CPU minutes of training of each run, at most"
    )
    parser.add_argument("--test-rows", type=int, default=200)
    options = parser.parse_args()
    if options.smoke:
        options.S = options.S or [5]
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    data = images(options)
    with folders(options.smoke) as place:
        for S, name in itertools.product(options.S or PARTICLES, options.model or OBJECTIVES):
            for objective in OBJECTIVES[name]:
                if options.objective is None or objective in options.objective:
                    row = run(name, objective, S, data, options, place)
                    put(place.results / "discrete_mnist.csv", [row], KEYS)
        show(tabulate(place))


if __name__ == "__main__":
    main()
