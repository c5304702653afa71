# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Digits and MNIST on a map of two latents: EM, exact maximum likelihood and a VAE by the clock.

    python benchmarks/latent_maps.py                          # digits, 3 seeds, a CPU minute a run; resumes run by run
    python benchmarks/latent_maps.py --data-set mnist --seeds 1           # 10,000 rows, 10 CPU minutes a run
    python benchmarks/latent_maps.py --data-set mnist --rows 60000 --minutes 60 --method VAE --method ExactAdam
    python benchmarks/latent_maps.py --smoke                  # in seconds; writes nothing

The decoder 2-16-D has leaky rectifiers of slope 0.1 and noise of one learned scale. For a seed all methods have the same
rows, the same start (the demonstration's) and the same CPU minutes; an exact fit ends with a step, a little later.

    EM         sweeps over all training rows
    ExactML    ten sweeps of EM, then rounds of 25 L-BFGS iterations with closed-form blocks between, over all rows
    ExactAdam  Adam on the exact log p(x) of minibatches of 100
    VAE        the same minibatches and Adam, an encoder D-128-128 of its own, closed-form divergence, fresh noise

Digits: scikit-learn's 1500 rows to train on and 297 to test, 64 pixels of 17 grey levels, each level spread uniformly over
its 1/17 of [0, 1]; split and spread are drawn anew for each seed. MNIST: the first 10,000 training rows, for the exact fits
go over all rows at each step, and the first 1000 test rows; 784 pixels of 256 grey values, spread in the same way.
Everything runs in float64.

Whatever trained, the figure is the exact log p(x) of the test rows, nats an image, more is better. The target of a seed is
where its VAE ended: "to target" are the seconds of training until a method is there, evaluation not counted; "VAE's CPU s to
its end" are the seconds that the VAE needs for where the method ends, if it gets there for every seed. "+-" is half of a
95 % t-interval over seeds.

Prints a table and keeps it in benchmarks/results/latent_maps.csv, each run in latent_maps_runs.csv, log p(x) along each run
in latent_maps_curves.csv and latent_maps.png.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from exact_or_amortised import (
    METHODS,
    NoisyDecoder,
    Point,
    better_than_vae,
    reached,
    seconds,
    train,
)
from matplotlib.figure import Figure
from runs import arguments, folders, kept, mean_and_interval, provenance, put, show
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_cpa.datasets import dequantize, load_mnist
from pyro_cpa.demo.data import digits
from pyro_cpa.demo.model import start_near
from pyro_cpa.models.networks import mlp

__all__: list[str] = []

LATENTS, HIDDEN, ENCODER = 2, 16, 128
# CPU minutes of a run and training rows, if nothing else is said.
DEFAULTS = {"digits": (1.0, 1500), "mnist": (10.0, 10_000)}
TEST_ROWS = 1000
# Minibatches from one point of a curve to the next.
EVERY = {"VAE": 100, "ExactAdam": 10}
GROUP = ("data set", "rows", "minutes", "method")
KEYS = (*GROUP, "seed")
COLOURS = {"EM": "tab:blue", "ExactML": "tab:orange", "ExactAdam": "tab:green", "VAE": "tab:red"}


def data(name: str, rows: int, seed: int, options: Any) -> tuple[Tensor, Tensor]:
    """Rows to train and to test on, as continuous data in [0, 1]."""
    if name == "digits":
        found = digits(seed).first(rows, TEST_ROWS)
        return found.train, found.test
    if options.smoke:
        generator = torch.Generator().manual_seed(seed)
        whole = torch.randint(256, (rows + 20, 64), generator=generator) / 255.0
    else:
        images = load_mnist(options.data)
        whole = torch.cat([images.x_train[:rows], images.x_test[:TEST_ROWS]])
        rows = min(rows, len(images.x_train))
    whole = dequantize(whole.double(), seed=seed)
    return whole[:rows], whole[rows:]


def net(x: Tensor, seed: int) -> NoisyDecoder:
    """At the demonstration's start, its noise the spread of the data."""
    torch.manual_seed(seed)
    D = x.shape[1]
    decoder = mlp(LATENTS, (HIDDEN,), D, activation=partial(nn.LeakyReLU, 0.1))
    encoder = mlp(D, (ENCODER, ENCODER), 2 * LATENTS)
    start_near(decoder, x)
    spread = (x - x.mean(0)).square().mean().sqrt().item()
    return NoisyDecoder(decoder, LATENTS, spread, encoder)


def run(
    key: tuple[str, int, float, str, int], options: Any, steps: int = 10**9
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row of a run and those of its curve."""
    name, rows, minutes, method, seed = key
    x, x_test = data(name, rows, seed, options)
    model, every = net(x, seed), EVERY.get(method, 1)
    exact, points = train(method, model, x, x_test, steps=steps, every=every, minutes=minutes)
    with torch.no_grad():
        train_log_p = exact.log_evidence(x).mean().item()
    keys = dict(zip(KEYS, key, strict=True))
    end = points[-1]
    row = keys | {
        "test rows": len(x_test),
        "regions": exact.partition().num_regions,
        "log p, train": f"{train_log_p:.3f}",
        "log p, test": f"{-end.loss:.3f}",
        "wall s": f"{end.wall:.2f}",
        "CPU s": f"{end.cpu:.2f}",
        **provenance(),
    }
    curve = [
        keys
        | {"point": i, "log p, test": f"{-p.loss:.3f}", "wall s": f"{p.wall:.3f}", "CPU s": f"{p.cpu:.3f}"}
        for i, p in enumerate(points)
    ]
    return row, curve


# ---- table and picture -----------------------------------------------------------------------------------

Key = tuple[str, ...]


def curves(rows: Sequence[dict[str, str]]) -> dict[Key, list[Point]]:
    """Of every run, by its keys."""
    found: dict[Key, list[Point]] = {}
    for row in rows:
        point = Point(float(row["wall s"]), float(row["CPU s"]), -float(row["log p, test"]))
        found.setdefault(tuple(row[key] for key in KEYS), []).append(point)
    return found


def summary(rows: Sequence[dict[str, str]], points: dict[Key, list[Point]]) -> list[dict[str, str]]:
    """A row for each data set, limits and method."""
    groups: dict[Key, dict[Key, dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in GROUP), {})[row["seed"],] = row
    found = []
    for name, runs in groups.items():
        at_vae = (*name[:3], "VAE")
        losses = {seed: points[name + seed][-1].loss for seed in runs}
        vae = {seed: points[at_vae + seed][-1].loss for seed in groups.get(at_vae, {})}
        timed, back = [], []
        for seed, row in runs.items():
            if seed in vae:
                hit = reached(points[name + seed], vae[seed])
                timed.append(
                    row
                    | {
                        "wall s to target": f"{hit.wall}" if hit else "",
                        "CPU s to target": f"{hit.cpu}" if hit else "",
                    }
                )
                back.append(reached(points[at_vae + seed], losses[seed]))
        values = [-loss for loss in losses.values()]
        data_set, count, minutes, method = name
        found.append(
            dict(zip(GROUP, name, strict=True))
            | {
                "seeds": str(len(runs)),
                "log p, test": mean_and_interval(values),
                "best": f"{max(values):.3f}",
                "worst": f"{min(values):.3f}",
                "log p, train": mean_and_interval([float(row["log p, train"]) for row in runs.values()]),
                "better than VAE": "" if method == "VAE" else better_than_vae(losses, vae),
                **(seconds(timed) if timed else {}),
                "VAE's CPU s to its end": f"{median(b.cpu for b in back if b):.1f}"
                if back and all(back) and method != "VAE"
                else "",
                **provenance(),
                "command": f"python benchmarks/latent_maps.py --data-set {data_set} --rows {count} "
                f"--minutes {minutes} --seeds {1 + max(int(row['seed']) for row in runs.values())}",
            }
        )
    return found


def tabulate(runs: Path, along: Path, path: Path) -> tuple[list[dict[str, str]], dict[Key, list[Point]]]:
    """Writes the table of all runs so far; returns it with their curves."""
    points = curves(list(kept(along, (*KEYS, "point")).values()))
    table = summary(list(kept(runs, KEYS).values()), points)
    put(path, table, GROUP)
    return table, points


def draw(points: dict[Key, list[Point]], path: Path) -> None:
    """Exact log p(x) of the test rows against CPU seconds, a panel for each data set and limits."""
    panels = list(dict.fromkeys(key[:3] for key in points))
    figure = Figure(figsize=(5.2 * len(panels), 4), layout="constrained")
    for ax, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        lines = {key: line for key, line in points.items() if key[:3] == panel}
        for (*_, method, seed), line in lines.items():
            later = [p for p in line if p.cpu > 0]
            label = method if seed == min(key[4] for key in lines if key[3] == method) else None
            ax.plot(
                [p.cpu for p in later], [-p.loss for p in later], color=COLOURS[method], lw=1, label=label
            )
            if method == "VAE":
                ax.axhline(-line[-1].loss, color=COLOURS[method], lw=0.6, ls=":")
        # From the Gaussian that all start as, about, upwards.
        ends = [-line[-1].loss for line in lines.values()]
        starts = [-line[0].loss for line in lines.values()]
        ax.set(
            xscale="log",
            xlabel="CPU time of training, s",
            ylabel="exact log p(x) of test rows, nats an image",
            title=f"{panel[0]}, {panel[1]} training rows",
            ylim=(max(min(starts), max(ends) - 4 * (max(ends) - min(ends)) - 5), None),
        )
        ax.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = arguments(__doc__, "folder or file of MNIST")
    parser.add_argument("--data-set", choices=DEFAULTS, default="digits")
    parser.add_argument("--method", choices=METHODS, action="append", help="may be repeated; default: all")
    parser.add_argument("--rows", type=int, help="training rows; default: all digits, 10,000 of MNIST")
    parser.add_argument("--minutes", type=float, help="CPU minutes of each run; default: 1, for MNIST 10")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="the normal matrix")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    minutes, rows = DEFAULTS[options.data_set]
    minutes = options.minutes or minutes
    rows = min(options.rows or rows, 1500 if options.data_set == "digits" else 60_000)
    names = [options.data_set]
    if options.smoke:
        names, rows, minutes, options.seeds = list(DEFAULTS), 60, 0.05, 1
    todo = list(itertools.product(names, [rows], [minutes], options.method or METHODS, range(options.seeds)))
    todo.sort(key=lambda key: (key[0], key[4]))  # an interrupted run has every method equally often
    with folders(options.smoke) as place:
        paths = [place.results / f"latent_maps{part}.csv" for part in ("_runs", "_curves", "")]
        done = kept(paths[0], KEYS)
        missing = [key for key in todo if tuple(map(str, key)) not in done]
        if missing and not options.smoke:
            for method in METHODS:  # compiles, so that the first runs' seconds are like the others'
                run(("digits", 60, 1.0, method, 0), options, steps=2)
        for key in tqdm(missing, desc="runs"):
            row, curve = run(key, options, steps=2 if options.smoke else 10**9)
            put(paths[1], curve, (*KEYS, "point"))
            put(paths[0], [row], KEYS)
            tabulate(*paths)
        table, points = tabulate(*paths)
        draw(points, place.results / "latent_maps.png")
        show(table)


if __name__ == "__main__":
    main()
