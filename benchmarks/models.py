# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Every deep model at the size of its paper, trained on Fashion-MNIST or MNIST and measured on its test rows.

    python benchmarks/models.py --model vae --epochs 5       # one model; --seed S, --data PATH
    python benchmarks/models.py --dataset mnist --model vae --epochs 46     # as the tutorial's authors did
    python benchmarks/models.py --all --epochs 0.5           # all of them; a fraction of an epoch is allowed
    python benchmarks/models.py --all --smoke                # enlarged digits, in seconds; writes nothing

A run that was killed, or that is asked for more epochs, resumes from benchmarks/checkpoints. The result is one
row of benchmarks/results/models_fashion_mnist.csv or models_mnist.csv, in nats an image, with the command that makes it,
and for models that generate a given class a picture, benchmarks/results/models_MODEL_seedS.png or
models_mnist_MODEL_seedS.png. On Debian Fashion-MNIST comes with the package dataset-fashion-mnist; its figures are not
comparable with published ones for MNIST. Three coupled nets share architecture and data: the weights tied and trained in
both directions, untied and trained so, and the classifier alone. gmvae-from-vae is gmvae with a start: eight epochs of a
VAE, a mixture of its codes, eight epochs of all networks but the classifier; they count among --epochs.

"ELBO, all test rows" has the standard error over batches of rows. For vae and cvae "saturating density" is the bound of
the same net as the tutorial's code computes it, with the continuous Bernoulli of a sigmoid in float32: the log-density of a
black pixel ends at 2.7 nats there, where from logits it reaches 5.2.

Evidence is estimated on the first test rows by importance sampling from the guide. Two standard errors are
given: that of the mean over rows, and that of the sampling, which means little where the median effective sample
size (ESS) is near 1: the figure is then a lower bound, far below the evidence perhaps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.distributions import TorchDistribution
from pyro.infer import Trace_ELBO
from runs import (
    Folders,
    Limits,
    Progress,
    Stopwatch,
    arguments,
    batches,
    folders,
    mean_and_error,
    provenance,
    put,
    train,
)
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_cpa.datasets import (
    Dataset,
    binarize,
    dequantize,
    load_digits,
    load_fashion_mnist,
    load_mnist,
    row_sequences,
)
from pyro_cpa.errors import InvalidData
from pyro_cpa.infer import TVO, AnalyticELBO, BiHelmholtzELBO, LogUniform
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
from pyro_cpa.models.likelihoods import AbstractLikelihood, Bernoulli, ContinuousBernoulli

LOADERS = {"fashion_mnist": load_fashion_mnist, "mnist": load_mnist}
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
        published: the likelihood by which the reference computes its bound, if it is another.
        also: further figures from the model, test rows and test labels.
        first: a simpler model to start from, trained by the same objective for ``first_epochs`` of all; then the networks
            that know the clusters are, for ``held_epochs``, with these held.
        labelled: whether model and guide take the label.
        batch_size, lr: of Adam.
        particles, test_rows: of the importance-sampled evidence.
    """

    build: Callable[[Tensor], Any]
    prepare: Callable[[Tensor], Tensor]
    loss: Callable[[Any], Callable[[Tensor, Tensor], Tensor]]
    setting: str
    bound: Callable[[], Any]
    published: AbstractLikelihood | None = None
    also: Callable[[Any, Tensor, Tensor], dict[str, str]] = lambda model, x, y: {}
    labelled: bool = False
    first: Callable[[], Any] | None = None
    first_epochs: float = 0.0
    held_epochs: float = 0.0
    batch_size: int = 100
    lr: float = 1e-3
    particles: int = 200
    test_rows: int = 500


# ---- what is particular to a model ---------------------------------------------------------------------


class SaturatingContinuousBernoulli(ContinuousBernoulli):
    """The density through a sigmoid, which float32 ends at logits of 16."""

    def forward(self, outputs: Tensor) -> TorchDistribution:
        return dist.ContinuousBernoulli(probs=outputs.sigmoid()).to_event(1)


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
    two_log_z = model.two_log_z(min(10_000, 20 * len(x)), 10)
    tilde = torch.cat([model.log_p_tilde(part, 200).value for part in x[:500].split(50)]).mean()
    return {
        "log p~*": f"{tilde:.2f}",
        "2 log Z": f"{two_log_z.value:.2f} +- {two_log_z.standard_error:.2f}",
    }


def untied(net: CoupledSigmoidNet) -> CoupledSigmoidNet:
    """The same net, generation with weights of its own that start as the shared ones."""
    for module in net.generation:
        module.weight = nn.Parameter(module.weight.detach().clone())
        if hasattr(module, "class_bias"):
            module.class_bias = nn.Parameter(module.class_bias.detach().clone())
    return net


def coupled(weights: tuple[float, float, float], setting: str, tied: bool = True) -> Recipe:
    """The coupled net under a mixture of generation, recognition and discrimination."""

    def loss(net: CoupledSigmoidNet) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, y: sum(
            (weight * term for weight, term in zip(weights, net.losses(x, y), strict=True) if weight),
            start=x.new_zeros(()),
        )

    return Recipe(
        build=lambda x: (CoupledSigmoidNet if tied else lambda *a, **k: untied(CoupledSigmoidNet(*a, **k)))(
            784, (500, 500), num_classes=10
        ),
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
        published=SaturatingContinuousBernoulli(),
        lr=3e-4,
    ),
    "cvae": Recipe(
        build=lambda x: ConditionalVAE(),
        prepare=dequantize,
        loss=by_elbo(analytic, labelled=True),
        setting="AnalyticELBO, dequantised grey values, log p(x|y)",
        bound=analytic,
        published=SaturatingContinuousBernoulli(),
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
    "gmvae-from-vae": Recipe(
        build=lambda x: GaussianMixtureVAE(),
        prepare=thresholded,
        loss=by_elbo(analytic),
        setting="AnalyticELBO, y enumerated, from a VAE and the clusters of its codes, pixels above 0.5",
        bound=analytic,
        also=clusters,
        first=lambda: VAE(784, 64, hidden_dims=(512, 512), likelihood=Bernoulli(), dropout=0.0),
        first_epochs=8,
        held_epochs=8,
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
    "coupled-untied": coupled(
        (1.0, 1.0, 0.0),
        "generation + recognition, labelled, two sets of weights; pixels above 0.5",
        tied=False,
    ),
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


# ---- measurement -----------------------------------------------------------------------------------------


def blocks(recipe: Recipe, x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, ...]]:
    """What model and guide take, some rows at a time."""
    return [part if recipe.labelled else part[:1] for part in zip(x.split(size), y.split(size), strict=True)]


def mean_bound(recipe: Recipe, model: Any, x: Tensor, y: Tensor) -> str:
    """Mean ELBO of the rows, one draw each, and its standard error, from the means of a hundred batches."""
    bound, parts = recipe.bound(), blocks(recipe, x, y, max(1, len(x) // 100))
    means = torch.tensor([-bound.loss(model.model, model.guide, *args) / len(args[0]) for args in parts])
    return mean_and_error(means, 2)


@torch.no_grad()
def measure(recipe: Recipe, model: Any, x: Tensor, y: Tensor, smoke: bool) -> dict[str, str]:
    """ELBO and evidence with standard errors on the first test rows, and what the model has besides."""
    model.eval()
    torch.manual_seed(0)
    rows, particles = (20, 10) if smoke else (recipe.test_rows, recipe.particles)
    bound, elbo, parts = recipe.bound(), 0.0, []
    size = max(1, ROWS_AT_ONCE // particles)
    for args in tqdm(blocks(recipe, x[:rows], y[:rows], size), desc="evidence", leave=False):
        elbo -= float(bound.loss(model.model, model.guide, *args))
        parts.append(model.log_evidence(*args, num_particles=particles))
    found = {"ELBO, all test rows": mean_bound(recipe, model, x, y)}
    if recipe.published is not None:
        own, model.likelihood = model.likelihood, recipe.published
        found["ELBO, all test rows, saturating density"] = mean_bound(recipe, model, x, y)
        model.likelihood = own
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
        **found,
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


def run(
    name: str, data: Dataset, limits: tuple[float, float], options: Any, place: Folders
) -> dict[str, Any]:
    """One row of the table: train or resume up to (epochs, minutes), measure, draw."""
    recipe, seed, smoke = RECIPES[name], options.seed, options.smoke
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    if data.y_train is None or data.y_test is None:
        raise InvalidData("the data have no labels; expected y_train and y_test besides the images.")
    num_train, num_test = (200, 50) if smoke else (len(data.x_train), len(data.x_test))
    x, x_test = (recipe.prepare(part) for part in (data.x_train[:num_train], data.x_test[:num_test]))
    y, y_test = data.y_train[:num_train], data.y_test[:num_test]
    steps_per_epoch = math.ceil(len(x) / recipe.batch_size)
    model = recipe.build(x)
    prefix = "" if options.dataset == "fashion_mnist" else f"{options.dataset}_"
    path = place.checkpoints / f"{prefix}{name}_seed{seed}.pt"

    def trained(module: Any, part: nn.Module, epochs: float, stage: str = "") -> Progress:
        """The part by the module's objective, up to so many epochs."""
        return train(
            part,
            recipe.loss(module),
            lambda done: batches(x, y, size=recipe.batch_size, seed=seed, steps=done),
            recipe.lr,
            Limits(max(1, round(epochs * steps_per_epoch)), limits[1]),
            path.with_stem(path.stem + stage),
        )

    stages = []
    if recipe.first is not None:
        first = recipe.first()
        stages.append(trained(first, first, recipe.first_epochs, "_first"))
        watch, start = Stopwatch(), Progress()
        model.start_from(first, x)
        start.wall, start.cpu = watch.read()
        stages += [start, trained(model, model.networks, recipe.held_epochs, "_held")]
    done = sum(stage.steps for stage in stages) / steps_per_epoch
    stages.append(trained(model, model, limits[0] - done))
    found = measure(recipe, model, x_test, y_test, smoke)
    if name.startswith(("cvae", "gmvae", "coupled")):
        picture(model, place.results / f"models_{prefix}{name}_seed{seed}.png")
    reached = f"{sum(stage.steps for stage in stages) / steps_per_epoch:.6g}"
    return {
        "model": name,
        "seed": seed,
        "epochs": reached,
        "rows": len(x),
        "batch": recipe.batch_size,
        "Adam": recipe.lr,
        "trained by": recipe.setting,
        **found,
        "training wall s": f"{sum(stage.wall for stage in stages):.0f}",
        "training CPU s": f"{sum(stage.cpu for stage in stages):.0f}",
        **provenance(),
        "command": f"python benchmarks/models.py --dataset {options.dataset} --model {name} --epochs {reached} "
        f"--seed {seed}",
    }


def enlarged_digits() -> Dataset:
    """scikit-learn's digits at the size of MNIST, for a check that needs no download."""

    def enlarge(x: Tensor) -> Tensor:
        tiles = x.unflatten(-1, (8, 8)).repeat_interleave(3, -2).repeat_interleave(3, -1)
        return torch.nn.functional.pad(tiles, (2, 2, 2, 2)).flatten(1)

    digits = load_digits()
    return replace(
        digits, x_train=enlarge(digits.x_train), x_test=enlarge(digits.x_test), image_shape=(28, 28)
    )


def main() -> None:
    parser = arguments(__doc__, "folder or .npz file of the data set")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", choices=RECIPES)
    which.add_argument("--all", action="store_true", help="every model in turn")
    parser.add_argument("--dataset", choices=LOADERS, default="fashion_mnist")
    parser.add_argument("--epochs", type=float, default=5.0, help="in all, those of a checkpoint included")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="CPU minutes of training of each model, at most"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data = enlarged_digits() if options.smoke else LOADERS[options.dataset](options.data)
    limits = (0.5, 1.0) if options.smoke else (options.epochs, options.minutes)
    with folders(options.smoke) as place:
        for name in RECIPES if options.all else [options.model]:
            row = run(name, data, limits, options, place)
            put(place.results / f"models_{options.dataset}.csv", [row], ("model", "seed"))
            print("\n" + "\n".join(f"{head:>34}  {value}" for head, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
