# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Every deep model at the size of its paper, trained on Fashion-MNIST and measured on its test rows.

    python benchmarks/models.py --model vae --epochs 5       # one model; --seed S, --data PATH
    python benchmarks/models.py --all --epochs 0.5           # all of them; a fraction of an epoch is allowed
    python benchmarks/models.py --all --smoke                # enlarged digits, in seconds; writes nothing

A run that was killed, or that is asked for more epochs, resumes from benchmarks/checkpoints. The result is one
row of benchmarks/results/models_fashion_mnist.csv, in nats an image, with the command that makes it, and for
models that generate a given class a picture, benchmarks/results/models_MODEL_seedS.png. On Debian the data come
with the package dataset-fashion-mnist. Nothing here is comparable with published figures for MNIST.

Evidence is estimated on the first test rows by importance sampling from the guide. Two standard errors are
given: that of the mean over rows, and that of the sampling, which means little where the median effective sample
size (ESS) is near 1: the figure is then a lower bound, far below the evidence perhaps.
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import pyro
import torch
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO
from torch import Tensor
from tqdm.auto import tqdm

from pyro_cpa import __version__
from pyro_cpa.datasets import (
    Dataset,
    binarize,
    dequantize,
    load_digits,
    load_fashion_mnist,
    minibatches,
    row_sequences,
)
from pyro_cpa.errors import InvalidData
from pyro_cpa.infer import TVO, AnalyticELBO, BiHelmholtzELBO, LogUniform, load_checkpoint, save_checkpoint
from pyro_cpa.models import (
    VAE,
    BidirectionalHelmholtzMachine,
    ConditionalVAE,
    CoupledSigmoidNet,
    GaussianMixtureVAE,
    SigmoidBeliefNet,
    VariationalRNN,
    cluster_accuracy,
)

HERE = Path(__file__).parent
SAVE_SECONDS = 60.0
ROWS_AT_ONCE = 10_000  # test rows x particles in memory at a time
VECTORISED: dict[str, Any] = {"vectorize_particles": True, "max_plate_nesting": 1}


@dataclass(frozen=True)
class Recipe:
    """How one model is built, trained and measured.

    Args:
        build: the model, given the training rows.
        prepare: intensities in [0, 1] to what the model takes.
        loss: mean loss of a batch (x, y), given the model.
        setting: the objective and optimiser in words.
        bound: the ELBO that is reported; analytic where the latents are Gaussian.
        also: further figures from the model, test rows and test labels.
        labelled: whether model and guide take the label.
        batch_size, lr: of Adam.
        particles, test_rows: of the importance-sampled evidence.
    """

    build: Callable[[Tensor], Any]
    prepare: Callable[[Tensor], Tensor]
    loss: Callable[[Any], Callable[[Tensor, Tensor], Tensor]]
    setting: str
    bound: Callable[[], Any]
    also: Callable[[Any, Tensor, Tensor], dict[str, str]] = lambda model, x, y: {}
    labelled: bool = False
    batch_size: int = 100
    lr: float = 1e-3
    particles: int = 200
    test_rows: int = 500


# ---- what is particular to a model ---------------------------------------------------------------------


def thresholded(x: Tensor) -> Tensor:
    return binarize(x, threshold=0.5)


def by_elbo(make: Callable[[], Any], labelled: bool = False) -> Callable[[Any], Callable]:
    """Mean of an objective over the rows of a batch."""

    def of_model(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
        objective = make()(model.model, model.guide)
        return lambda x, y: objective(*((x, y) if labelled else (x,))) / len(x)

    return of_model


def analytic() -> AnalyticELBO:
    return AnalyticELBO(max_plate_nesting=1)


def sampled() -> Trace_ELBO:
    return Trace_ELBO(max_plate_nesting=1)


def tvo() -> TVO:
    return TVO(num_particles=10, schedule=LogUniform(2, beta_1=0.2), **VECTORISED)


def clusters(model: GaussianMixtureVAE, x: Tensor, y: Tensor) -> dict[str, str]:
    found = model.cluster(x)
    return {"cluster accuracy": f"{cluster_accuracy(found, y)[0]:.4f} ({len(found.unique())} clusters used)"}


def step_divergences(model: VariationalRNN, x: Tensor, y: Tensor) -> dict[str, str]:
    kl = torch.cat([model.kl_per_step(part) for part in x.split(500)]).mean(0)
    return {
        "KL of a step, least / mean / most": " / ".join(f"{v:.3f}" for v in (kl.min(), kl.mean(), kl.max()))
    }


def classification(model: CoupledSigmoidNet, x: Tensor, y: Tensor) -> dict[str, str]:
    return {"classification error": f"{model.error(x, y):.4f}"}


def helmholtz(model: BidirectionalHelmholtzMachine, x: Tensor, y: Tensor) -> dict[str, str]:
    two_log_z = model.two_log_z(10_000, 10)
    tilde = torch.cat([model.log_p_tilde(part, 200).value for part in x[:500].split(50)]).mean()
    return {
        "log p~*": f"{tilde:.2f}",
        "2 log Z": f"{two_log_z.value:.2f} +- {two_log_z.standard_error:.2f}",
    }


def coupled(weights: tuple[float, float, float], setting: str) -> Recipe:
    """The coupled net under a mixture of generation, recognition and discrimination."""

    def loss(net: CoupledSigmoidNet) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, y: sum(
            (weight * term for weight, term in zip(weights, net.losses(x, y), strict=True) if weight),
            start=x.new_zeros(()),
        )

    return Recipe(
        build=lambda x: CoupledSigmoidNet(784, (500, 500), num_classes=10),
        prepare=thresholded,
        loss=loss,
        setting=setting,
        bound=sampled,
        also=classification,
    )


RECIPES = {
    "vae": Recipe(
        build=lambda x: VAE(),
        prepare=dequantize,
        loss=by_elbo(analytic),
        setting="AnalyticELBO, dequantised grey values",
        bound=analytic,
        lr=3e-4,
    ),
    "cvae": Recipe(
        build=lambda x: ConditionalVAE(),
        prepare=dequantize,
        loss=by_elbo(analytic, labelled=True),
        setting="AnalyticELBO, dequantised grey values, log p(x|y)",
        bound=analytic,
        labelled=True,
        lr=3e-4,
    ),
    "gmvae": Recipe(
        build=lambda x: GaussianMixtureVAE(),
        prepare=thresholded,
        loss=by_elbo(analytic),
        setting="AnalyticELBO, y enumerated, pixels above 0.5",
        bound=analytic,
        also=clusters,
    ),
    "vrnn": Recipe(
        build=lambda x: VariationalRNN(),
        prepare=lambda x: row_sequences(thresholded(x)),
        loss=by_elbo(analytic),
        setting="AnalyticELBO, filtering guide, pixels above 0.5, row by row",
        bound=analytic,
        also=step_divergences,
        particles=50,
        test_rows=100,
    ),
    "sbn": Recipe(
        build=lambda x: SigmoidBeliefNet(784, (200, 200, 200), data_mean=x.mean(0)),
        prepare=binarize,
        loss=by_elbo(tvo),
        setting="TVO, 10 particles, nodes 0, 0.2, 1; pixels drawn once",
        bound=sampled,
        batch_size=24,
        lr=3e-4,
    ),
    "coupled": coupled((1.0, 1.0, 0.0), "generation + recognition, labelled; pixels above 0.5"),
    "coupled-mixed": coupled(
        (1.0, 1.0, 10.0), "generation + recognition + 10 discrimination; pixels above 0.5"
    ),
    "coupled-classifier": coupled((0.0, 0.0, 1.0), "discrimination alone; pixels above 0.5"),
    "bihm": Recipe(
        build=lambda x: BidirectionalHelmholtzMachine(784),
        prepare=binarize,
        loss=by_elbo(lambda: BiHelmholtzELBO(num_particles=10, **VECTORISED)),
        setting="BiHelmholtzELBO, 10 particles, 12 layers; pixels drawn once",
        bound=sampled,
        also=helmholtz,
    ),
}


# ---- training --------------------------------------------------------------------------------------------


class Progress:
    """Steps taken and seconds spent, over all runs of a checkpoint."""

    def __init__(self) -> None:
        self.steps, self.wall, self.cpu = 0, 0.0, 0.0

    def state_dict(self) -> dict[str, float]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def batches(x: Tensor, y: Tensor, size: int, seed: int, steps: int) -> Iterator[tuple[Tensor, ...]]:
    """Shuffled minibatches without end, the first ``steps`` left out."""
    epoch, done = divmod(steps, math.ceil(len(x) / size))
    while True:
        for index, batch in enumerate(minibatches(x, y, batch_size=size, seed=seed, epoch=epoch)):
            if index >= done:
                yield batch  # type: ignore[misc]  # neither is None
        epoch, done = epoch + 1, 0


@dataclass(frozen=True)
class Limits:
    """Where training stops: epochs in all, those of a checkpoint included, or minutes of this run."""

    epochs: float
    minutes: float


def train(
    recipe: Recipe, model: Any, x: Tensor, y: Tensor, limits: Limits, seed: int, path: Path
) -> Progress:
    """Train up to the limits, from the checkpoint at ``path`` if there is one."""
    total = max(1, round(limits.epochs * math.ceil(len(x) / recipe.batch_size)))
    optim = torch.optim.Adam(model.parameters(), recipe.lr)
    progress, loss = Progress(), recipe.loss(model)
    parts = {"model": model, "optim": optim, "progress": progress}
    if path.exists():
        load_checkpoint(path, **parts)
    model.train()
    source = batches(x, y, recipe.batch_size, seed, progress.steps)
    saved = time.perf_counter(), time.process_time()
    deadline = saved[0] + 60 * limits.minutes
    smooth = math.nan
    with tqdm(total=total, initial=progress.steps, desc=path.stem, mininterval=2.0) as bar:
        while progress.steps < total and saved[0] < deadline:
            optim.zero_grad()
            value = loss(*next(source))
            value.backward()
            optim.step()
            progress.steps += 1
            smooth = value.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * value.item()
            bar.update()
            bar.set_postfix(loss=f"{smooth:.2f}", refresh=False)
            now = time.perf_counter(), time.process_time()
            if now[0] > min(saved[0] + SAVE_SECONDS, deadline) or progress.steps == total:
                progress.wall += now[0] - saved[0]
                progress.cpu += now[1] - saved[1]
                saved = now
                save_checkpoint(path, **parts)
    return progress


# ---- measurement -----------------------------------------------------------------------------------------


@torch.no_grad()
def measure(recipe: Recipe, model: Any, x: Tensor, y: Tensor, smoke: bool) -> dict[str, str]:
    """ELBO and evidence with standard errors on the first test rows, and what the model has besides."""
    model.eval()
    torch.manual_seed(0)
    rows, particles = (20, 10) if smoke else (recipe.test_rows, recipe.particles)
    bound, elbo, parts = recipe.bound(), 0.0, []
    size = max(1, ROWS_AT_ONCE // particles)
    blocks = list(zip(x[:rows].split(size), y[:rows].split(size), strict=True))
    for block in tqdm(blocks, desc="evidence", leave=False):
        args = block if recipe.labelled else block[:1]
        elbo -= float(bound.loss(model.model, model.guide, *args))
        parts.append(model.log_evidence(*args, num_particles=particles))
    log_prob, error, ess = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("log_prob", "standard_error", "ess")
    )
    return {
        "test rows": str(rows),
        "ELBO": f"{elbo / rows:.2f}",
        "log p": f"{log_prob.mean():.2f}",
        "s.e. over rows": f"{log_prob.std() / rows**0.5:.2f}",
        "s.e. of sampling": f"{error.square().sum().sqrt() / rows:.3f}",
        "particles": str(particles),
        "median ESS": f"{ess.median():.1f}",
        **recipe.also(model, x, y),
    }


def picture(model: Any, path: Path) -> None:
    """Ten draws of each class, a row a class: means of the pixels given all latents."""
    images = torch.cat([model.generate(10, y=label, mode="mean") for label in range(10)])
    grid = images.reshape(10, 10, 28, 28).permute(0, 2, 1, 3).reshape(280, 280)
    figure = Figure(figsize=(5.6, 5.6))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=1)
    ax.set_axis_off()
    figure.savefig(path, dpi=100)


def run(name: str, data: Dataset, limits: Limits, seed: int, folders: dict[str, Path], smoke: bool) -> dict:
    """One row of the table: train or resume, measure, draw."""
    recipe = RECIPES[name]
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    if data.y_train is None or data.y_test is None:
        raise InvalidData("the data have no labels; expected Fashion-MNIST's, with y_train and y_test.")
    num_train, num_test = (200, 50) if smoke else (len(data.x_train), len(data.x_test))
    x, x_test = (recipe.prepare(part) for part in (data.x_train[:num_train], data.x_test[:num_test]))
    y, y_test = data.y_train[:num_train], data.y_test[:num_test]
    steps_per_epoch = math.ceil(len(x) / recipe.batch_size)
    model = recipe.build(x)
    path = folders["checkpoints"] / f"{name}_seed{seed}.pt"
    progress = train(recipe, model, x, y, limits, seed, path)
    found = measure(recipe, model, x_test, y_test, smoke)
    if name in ("cvae", "gmvae") or name.startswith("coupled"):
        picture(model, folders["results"] / f"models_{name}_seed{seed}.png")
    reached = f"{progress.steps / steps_per_epoch:.6g}"
    return {
        "model": name,
        "seed": seed,
        "epochs": reached,
        "rows": len(x),
        "batch": recipe.batch_size,
        "Adam": recipe.lr,
        "trained by": recipe.setting,
        **found,
        "training wall s": f"{progress.wall:.0f}",
        "training CPU s": f"{progress.cpu:.0f}",
        "threads": torch.get_num_threads(),
        "versions": f"pyro_cpa {__version__}, torch {torch.__version__}, pyro {pyro.__version__}, "
        f"Python {platform.python_version()}, matplotlib {matplotlib.__version__}",
        "command": f"python benchmarks/models.py --model {name} --epochs {reached} --seed {seed}",
    }


def enlarged_digits() -> Dataset:
    """scikit-learn's digits at the size of Fashion-MNIST, for a check that needs no download."""

    def enlarge(x: Tensor) -> Tensor:
        tiles = x.unflatten(-1, (8, 8)).repeat_interleave(3, -2).repeat_interleave(3, -1)
        return torch.nn.functional.pad(tiles, (2, 2, 2, 2)).flatten(1)

    digits = load_digits()
    return replace(
        digits, x_train=enlarge(digits.x_train), x_test=enlarge(digits.x_test), image_shape=(28, 28)
    )


def write(row: dict, path: Path) -> None:
    """Puts the row in the table in place of an older one of the same model and seed."""
    rows = []
    if path.exists():
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    key = (row["model"], str(row["seed"]))
    rows = [old for old in rows if (old["model"], old["seed"]) != key] + [row]
    heads = list(dict.fromkeys(head for one in rows for head in one))
    last = ["training wall s", "training CPU s", "threads", "versions", "command"]
    heads = [head for head in heads if head not in last] + last
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, heads, restval="")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda one: (list(RECIPES).index(one["model"]), int(one["seed"]))))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", choices=RECIPES)
    which.add_argument("--all", action="store_true", help="every model in turn")
    parser.add_argument("--epochs", type=float, default=5.0, help="in all, those of a checkpoint included")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of training of each model, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", help="folder or .npz file of Fashion-MNIST; default: where Debian puts it")
    parser.add_argument(
        "--smoke", action="store_true", help="half an epoch of 200 digits; figures mean nothing"
    )
    options = parser.parse_args()
    data = enlarged_digits() if options.smoke else load_fashion_mnist(options.data)
    limits = Limits(options.epochs, options.minutes)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {
            name: Path(scratch) if options.smoke else HERE / name for name in ("checkpoints", "results")
        }
        if options.smoke:
            limits = Limits(epochs=0.5, minutes=1.0)
        for folder in folders.values():
            folder.mkdir(exist_ok=True)
        for name in RECIPES if options.all else [options.model]:
            row = run(name, data, limits, options.seed, folders, options.smoke)
            write(row, folders["results"] / "models_fashion_mnist.csv")
            print("\n" + "\n".join(f"{head:>34}  {value}" for head, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
