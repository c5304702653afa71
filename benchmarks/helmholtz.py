# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Bidirectional Helmholtz machines on binary data sets, beside wake-sleep and VIMCO on the same nets.

    python benchmarks/helmholtz.py                                      # all: some hours on one core
    python benchmarks/helmholtz.py --data-set dna --objective BiHM --x exclusive --minutes 5
    python benchmarks/helmholtz.py --smoke                              # the same in seconds; writes nothing

Nets of the sizes that the method's paper used. One recipe for all: Adam on batches of 100, a Laplace prior on the
weights (an L1 penalty that weighs less the more rows there are), an exponential average of the weights that is measured on
the validation rows, and a learning rate that falls by 0.3 when this measure no longer improves; --refine gives the last
stage more particles. The weights kept are those of the best measure; test rows are looked at once, after that.

``--x bernoulli`` is the published model, independent Bernoulli entries given the first latent layer. ``--x exclusive``
takes into account that the entries code attributes: neighbouring columns of which at most one is on in every training and
validation row become one categorical output. No test row is used to find them; one that broke the rule would have
probability zero and is counted. ``--x autoregressive`` has Bernoulli entries again, each of which also depends on the
columns before it, linearly in its log-odds; recognition is the same. The rows "none" say what these are worth by themselves,
without a latent: columns, or groups of them, that do not depend on one another; columns given those before them.

-log p, -log p~* and the effective sample sizes are means over test rows with S = 500 particles, "+-" the standard error
over rows. RWS has half a wake and half a sleep phase. 2 log Z has the relative standard error of Z^2. A run that was killed,
or stopped by --minutes, resumes from benchmarks/checkpoints. Prints a table, kept in benchmarks/results/helmholtz.csv.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from column_machines import OUTPUTS, Machine, columns_alone
from exclusive_columns import exclusive_groups
from runs import (
    FUSED,
    Folders,
    Limits,
    Progress,
    Stopwatch,
    arguments,
    batches,
    binary_table,
    folders,
    mean_and_error,
    provenance,
    put,
    show,
)
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_cpa.datasets import Dataset
from pyro_cpa.infer import (
    BiHelmholtzELBO,
    ImportanceWeightedELBO,
    ReweightedWakeSleepELBO,
    load_checkpoint,
    save_checkpoint,
)

__all__: list[str] = []

LAYERS = {
    "adult": (100, 70, 50, 25),
    "connect4": (300, 110, 50, 20),
    "dna": (200, 150, 130, 100, 70, 50, 30, 20, 10),
}
OBJECTIVES = {
    "BiHM": BiHelmholtzELBO,
    "RWS": lambda S, **options: ReweightedWakeSleepELBO(S, insomnia=0.5, **options),
    "VIMCO": lambda S, **options: ImportanceWeightedELBO(S, "vimco", **options),
}
PARTICLES = 500  # of a test row
BATCH = 100
EVERY, LOOKED_AT = 50, 1500  # steps between two looks at the validation rows, and of how many


@dataclass(frozen=True)
class Recipe:
    """How a net is trained; the defaults are those of the table.

    Args:
        lr: of the first stage.
        stages: factors of the learning rate, one a stage.
        patience: a stage ends after as many looks, and as many epochs, without improvement.
        particles: S; the last stage has ``refine`` of them.
        laplace: rate r of a Laplace prior on the weights (not biases): r sum |w| is added to the sum over all
            training rows, of which a batch carries its share.
        average: decay of the average of the weights, per step.
        deterministic: tanh layers between two stochastic ones.
        transposed: whether recognition starts as the transpose of generation.
    """

    lr: float = 6e-3
    stages: tuple[float, ...] = (1.0, 0.3, 0.1)
    patience: int = 8
    particles: int = 10
    refine: int = 10
    laplace: float = 0.14
    average: float = 0.99
    deterministic: int = 0
    transposed: bool = False


# ---- training --------------------------------------------------------------------------------------------


class Search(Progress):
    """Where training stands: the stage, the average of the weights, and the best average so far."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.stage, self.since, self.score = 0, 0, math.inf
        self.average = {name: value.detach().clone() for name, value in model.named_parameters()}
        self.best = {name: value.clone() for name, value in self.average.items()}


@contextmanager
def weights(model: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """The model with other weights."""
    own = {name: value.detach().clone() for name, value in model.named_parameters()}
    model.load_state_dict(values, strict=False)
    yield
    model.load_state_dict(own, strict=False)


def fit(
    model: Machine, data: Dataset, make: Any, recipe: Recipe, limits: Limits, path: Path, seed: int
) -> Search:
    """Train until the last stage ends or up to the limits, and leave the best weights in the model."""
    search, watch = Search(model), Stopwatch()
    optim = torch.optim.Adam(model.parameters(), recipe.lr, fused=FUSED)
    parts = {"model": model, "optim": optim, "search": search}
    if path.exists():
        load_checkpoint(path, **parts)
    source = batches(data.x_train, size=BATCH, seed=seed, steps=search.steps)
    matrices = [value for name, value in model.named_parameters() if name.endswith("weight")]
    last = len(recipe.stages) - 1
    bar = tqdm(desc=path.stem, initial=search.steps, mininterval=5.0)
    every = min(EVERY, limits.steps)
    patience = recipe.patience * max(1, len(data.x_train) / BATCH / every)
    begun, saved = time.process_time(), time.perf_counter()
    end = begun + 60 * limits.minutes
    while search.stage <= last and search.steps < limits.steps and time.process_time() < end:
        particles = recipe.refine if search.stage == last else recipe.particles
        objective = make(particles, vectorize_particles=True, max_plate_nesting=1)(model.model, model.guide)
        for group in optim.param_groups:
            group["lr"] = recipe.lr * recipe.stages[search.stage]
        for _ in range(every):
            (x,) = next(source)
            optim.zero_grad()
            loss = objective(x)
            prior = recipe.laplace / len(data.x_train) * sum(value.abs().sum() for value in matrices)
            (loss / len(x) + prior).backward()
            optim.step()
            for name, value in model.named_parameters():
                search.average[name].lerp_(value.detach(), 1 - recipe.average)
        search.steps += every
        with weights(model, search.average):
            score = -model.log_p(data.x_valid, 20).value.mean().item()
        search.since += 1
        if score < search.score:
            search.score, search.since = score, 0
            search.best = {name: value.clone() for name, value in search.average.items()}
        if search.since >= patience:
            search.stage, search.since = search.stage + 1, 0
            model.load_state_dict(search.best, strict=False)
            search.average = {name: value.clone() for name, value in search.best.items()}
        wall, cpu = watch.read()
        search.wall, search.cpu = search.wall + wall, search.cpu + cpu
        bar.update(every)
        bar.set_postfix(stage=search.stage, valid=f"{score:.3f}", best=f"{search.score:.3f}", refresh=False)
        if time.perf_counter() > saved + 60 or search.stage > last:
            save_checkpoint(path, **parts)
            saved = time.perf_counter()
    bar.close()
    save_checkpoint(path, **parts)
    model.load_state_dict(search.best, strict=False)
    return search


# ---- measurement -----------------------------------------------------------------------------------------


@torch.no_grad()
def measure(model: Machine, data: Dataset, particles: int, samples: int) -> dict[str, str]:
    """All figures of a row from one set of log-weights, -log p of as many training rows, and 2 log Z from draws of p."""
    torch.manual_seed(0)
    x, seen = data.x_test, some(data.x_train, len(data.x_test))
    broken = torch.cat([x, x.new_zeros(len(x), 1)], -1)[:, model.groups].sum(-1).amax(-1) > 1
    log_w = torch.cat([model.log_weights(part, particles) for part in tqdm(x.split(50), leave=False)], 1)
    many = math.log(particles)
    log_p = log_w.logsumexp(0) - many
    tilde = 2 * ((log_w / 2).logsumexp(0) - many)
    relative_variance = (2 * log_w - 2 * log_w.logsumexp(0)).exp().sum(0) - 1 / particles
    two_log_z = model.two_log_z(samples, 10)
    of_seen = torch.cat([model.log_p(part, particles).value for part in tqdm(seen.split(50), leave=False)])

    def ess(scaled: Tensor) -> str:
        share = (2 * scaled.logsumexp(0) - (2 * scaled).logsumexp(0) - many).exp()
        return f"{100 * share.mean():.1f}"

    return {
        "test rows": str(len(x)),
        "S": str(particles),
        "-log p": mean_and_error(-log_p),
        "-log p, training rows": mean_and_error(-of_seen),
        "s.e. of sampling": f"{relative_variance.clamp(min=0).sum().sqrt() / len(x):.4f}",
        "-log p~*": mean_and_error(-tilde),
        "-ELBO": mean_and_error(-log_w.mean(0)),
        "2 log Z": f"{two_log_z.value:.3f}",
        "relative s.e. of Z^2": f"{two_log_z.standard_error:.4f}",
        "-log p*": f"{-tilde.mean() + two_log_z.value:.3f}",
        "ESS of p %": ess(log_w),
        "ESS of p* %": ess(log_w / 2),
        "rows of probability 0": str(int(broken.sum())),
    }


def coins() -> Dataset:
    """Random rows in place of a data set."""
    x = torch.bernoulli(torch.full((150, 12), 0.3))
    return Dataset(x[:100], x[100:120], x_valid=x[120:])


def some(x: Tensor, most: int) -> Tensor:
    """Rows drawn once and for all."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:most]]


def load(name: str, output: str, options: Any) -> tuple[Dataset, Tensor]:
    """The data with the validation rows looked at and the test rows measured, and the groups of columns."""
    data = coins() if options.smoke else binary_table(name, options.data)
    seen = torch.cat([data.x_train, data.x_valid])
    groups = exclusive_groups(seen) if output == "exclusive" else torch.arange(seen.shape[1])[:, None]
    return replace(
        data, x_valid=some(data.x_valid, LOOKED_AT), x_test=some(data.x_test, options.test_rows)
    ), groups


def command(name: str, objective: str, output: str) -> str:
    return f"python benchmarks/helmholtz.py --data-set {name} --objective {objective} --x {output}"


def option(changed: tuple[str, Any]) -> str:
    """A field of the recipe on the command line."""
    key, value = changed
    words = [] if value is True else value if isinstance(value, tuple) else [value]
    return " ".join([f" --{key}", *map(str, words)])


def run(
    name: str, objective: str, output: str, options: Any, recipe: Recipe, place: Folders
) -> dict[str, Any]:
    """One row: train or resume, then measure."""
    pyro.clear_param_store()
    torch.manual_seed(options.seed)
    layers = (8, 4) if options.smoke else LAYERS[name]
    data, groups = load(name, output, options)
    model = Machine(
        layers,
        data.x_train,
        groups,
        output,
        deterministic=recipe.deterministic,
        transposed=recipe.transposed,
    )
    changed = {key: value for key, value in asdict(recipe).items() if value != getattr(Recipe(), key)}
    tag = "".join(f"_{key}-{value}" for key, value in changed.items()).replace(" ", "")
    path = place.checkpoints / f"helmholtz_{name}_{objective}_{output}_seed{options.seed}{tag}.pt"
    limits = Limits(options.steps, options.minutes)
    search = fit(model, data, OBJECTIVES[objective], recipe, limits, path, options.seed)
    ended = search.stage == len(recipe.stages)
    row = {
        "data set": name.upper(),
        "x": output,
        "objective": objective,
        "seed": options.seed,
        "-log p, validation, S=20": f"{search.score:.3f}",
    }
    if not options.validation_only:
        row |= measure(model, data, 10 if options.smoke else PARTICLES, 200 if options.smoke else 20_000)
    return row | {
        "layers": "-".join(map(str, layers)),
        "epochs": f"{search.steps / math.ceil(len(data.x_train) / BATCH):.0f}",
        "ended": "yes" if ended else "no, out of time",
        "training wall s": f"{search.wall:.0f}",
        "training CPU s": f"{search.cpu:.0f}",
        **provenance(),
        "command": f"{command(name, objective, output)} --seed {options.seed}"
        + "".join(map(option, changed.items()))
        + ("" if ended else f" --steps {search.steps}"),
    }


def without_latents(name: str, objective: str, output: str, options: Any) -> dict[str, Any]:
    """The row of the columns alone, at the best of the training rows."""
    data, groups = load(name, output, options)
    law = columns_alone(data.x_train, data.x_valid, groups, output)
    loss, of_seen = -law.log_prob(data.x_test), -law.log_prob(some(data.x_train, len(data.x_test)))
    return {
        "data set": name.upper(),
        "x": output,
        "objective": "none: columns before" if output == "autoregressive" else "none: independent",
        "seed": "",
        "-log p": mean_and_error(loss),
        "-log p, training rows": mean_and_error(of_seen),
        "test rows": str(len(loss)),
        **provenance(),
        "command": command(name, objective, output),
    }


def main() -> None:
    parser = arguments(__doc__, "folder with adult.npz, connect4.npz and dna.npz")
    parser.add_argument("--data-set", choices=LAYERS, action="append", help="may be repeated; default: all")
    parser.add_argument(
        "--objective",
        choices=[*OBJECTIVES, "none"],
        action="append",
        help="default: all; none is the columns alone",
    )
    parser.add_argument("--x", choices=OUTPUTS, action="append", help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="CPU minutes of training of each net in this run"
    )
    parser.add_argument(
        "--steps", type=int, default=10**9, help="in all, those of a checkpoint included, at most"
    )
    parser.add_argument(
        "--test-rows", type=int, default=1200, help="at most, drawn at random once and for all"
    )
    parser.add_argument(
        "--validation-only", action="store_true", help="to compare recipes: no test row, nothing kept"
    )
    for key, value in asdict(Recipe()).items():
        if isinstance(value, bool):
            parser.add_argument(f"--{key}", action="store_true")
        elif isinstance(value, tuple):
            parser.add_argument(f"--{key}", type=float, nargs="+", default=value)
        else:
            parser.add_argument(f"--{key}", type=type(value), default=value)
    options = parser.parse_args()
    options.stages = tuple(options.stages)
    recipe = Recipe(**{key: getattr(options, key) for key in asdict(Recipe())})
    # A tenth of a step's time; what the checks look for cannot occur here.
    pyro.enable_validation(False)
    if options.smoke:
        options.data_set, options.steps = options.data_set or ["dna"], 5
    keys = ("data set", "x", "objective", "seed")
    objectives = options.objective or [*OBJECTIVES, "none"]
    with folders(options.smoke) as place:
        for name, objective, output in itertools.product(
            options.data_set or LAYERS, objectives, options.x or OUTPUTS
        ):
            if objective != "none":
                row = run(name, objective, output, options, recipe, place)
            elif not options.validation_only:  # all figures of the columns alone are of test rows
                row = without_latents(name, objective, output, options)
            else:
                continue
            if not options.validation_only:
                put(place.results / "helmholtz.csv", [row], keys)
            show([row])


if __name__ == "__main__":
    main()
