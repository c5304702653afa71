# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""EM, exact maximum likelihood and a VAE on the two toy curves, over data seeds and weight seeds.

    python benchmarks/toys.py --data-seeds 20 --weight-seeds 20 --pairs 20    # every seed of both kinds once
    python benchmarks/toys.py --data-seeds 20 --weight-seeds 20       # all 400 pairs; resumes run by run
    python benchmarks/toys.py                                         # 2 x 2 seeds
    python benchmarks/toys.py --smoke                                 # in seconds; writes nothing

Circle: a uniform angle; wave: (u, cos 1.4 u) with u standard normal; both with Gaussian noise of 0.1: 500 rows to train on
and 500 to test. Decoders 1-8-2 and 1-8-8-2 with leaky rectifiers of slope 0.1, Glorot weights, standard normal biases,
noise 0.55 to begin with: the setting of the paper's public code, drawn anew. Every method starts from the same decoder. The
VAE has an encoder 2-32-32 of its own, fresh noise at each of its steps, the closed-form divergence, and Adam on
minibatches of 100 (in the public code the noise was drawn once and for all).

Whatever trained, the figure is the exact -log p(x) of the test rows, per datum, less is better; "true law" is that of the
law that drew them, by quadrature. "to target": seconds until the test rows are within 0.2 nats of the true law, evaluation
not counted, and the share of runs that got there. "+-" is half of a 95 % t-interval over runs.

Prints a table and keeps it in benchmarks/results/toys.csv, each run in toys_runs.csv.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from exact_or_amortised import NoisyDecoder, better_than_vae, reached, seconds, train
from runs import arguments, folders, kept, mean_and_interval, provenance, put, show
from torch import Tensor, nn
from tqdm.auto import tqdm

__all__: list[str] = []

ROWS, NOISE, MARGIN = 500, 0.1, 0.2
NETS = {"small": (1, 8, 2), "large": (1, 8, 8, 2)}
# Sweeps of EM; sweeps, then rounds of L-BFGS; minibatches: 1000 epochs, the test rows evaluated after every twentieth.
STEPS = {"EM": 75, "ExactML": 20, "VAE": 5000}
EVERY = 100
KEYS = ("curve", "net", "data seed", "weight seed", "method")


def circle(u: Tensor) -> Tensor:
    angle = 2 * torch.pi * torch.distributions.Normal(0.0, 1.0).cdf(u)
    return torch.stack([angle.cos(), angle.sin()], -1)


def wave(u: Tensor) -> Tensor:
    return torch.stack([u, (1.4 * u).cos()], -1)


CURVES: dict[str, Callable[[Tensor], Tensor]] = {"circle": circle, "wave": wave}


def data(curve: str, seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    x = CURVES[curve](torch.randn(2 * ROWS)) + NOISE * torch.randn(2 * ROWS, 2)
    return x[:ROWS], x[ROWS:]


def true_loss(curve: str, x: Tensor) -> float:
    """-log p(x) of the law that draws the data: 4000 equally likely strata of u."""
    u = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(4000) + 0.5) / 4000)
    log_p = dist.Normal(CURVES[curve](u), NOISE).to_event(1).log_prob(x[:, None]).logsumexp(-1) - math.log(
        4000
    )
    return -log_p.mean().item()


def net(sizes: tuple[int, ...], seed: int) -> NoisyDecoder:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        linear = nn.Linear(a, b)
        nn.init.xavier_normal_(linear.weight)
        nn.init.normal_(linear.bias)
        layers += [linear, nn.LeakyReLU(0.1)]
    encoder = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
    return NoisyDecoder(nn.Sequential(*layers[:-1]), 1, 0.55, encoder)


def run(curve: str, size: str, data_seed: int, weight_seed: int, method: str, smoke: bool) -> dict[str, Any]:
    x, x_test = data(curve, data_seed)
    truth = true_loss(curve, x_test)
    steps = 2 if smoke else STEPS[method]
    exact, points = train(method, net(NETS[size], weight_seed), x, x_test, steps=steps, every=EVERY)
    with torch.no_grad():
        train_loss = -exact.log_evidence(x).mean().item()
    end, hit = points[-1], reached(points, truth + MARGIN)
    return dict(zip(KEYS, (curve, size, data_seed, weight_seed, method), strict=True)) | {
        "train": f"{train_loss:.4f}",
        "test": f"{end.loss:.4f}",
        "true law": f"{truth:.4f}",
        "wall s": f"{end.wall:.2f}",
        "CPU s": f"{end.cpu:.2f}",
        "wall s to target": f"{hit.wall:.2f}" if hit else "",
        "CPU s to target": f"{hit.cpu:.2f}" if hit else "",
        **provenance(),
    }


def summary(rows: list[dict[str, str]], command: str) -> list[dict[str, str]]:
    """A row for each curve, net and method."""
    groups: dict[tuple[str, ...], dict[tuple[str, ...], dict[str, str]]] = defaultdict(dict)
    for row in rows:
        groups[row["curve"], row["net"], row["method"]][row["data seed"], row["weight seed"]] = row
    losses = {
        name: {seeds: float(row["test"]) for seeds, row in runs.items()} for name, runs in groups.items()
    }
    found = []
    for (curve, size, method), runs in groups.items():
        own, vae = losses[curve, size, method], losses.get((curve, size, "VAE"), {})
        found.append(
            {
                "curve": curve,
                "net": size,
                "method": method,
                "runs": str(len(runs)),
                "data seeds": str(len({seeds[0] for seeds in runs})),
                "weight seeds": str(len({seeds[1] for seeds in runs})),
                "test -log p": mean_and_interval(list(own.values())),
                "best": f"{min(own.values()):.3f}",
                "worst": f"{max(own.values()):.3f}",
                "true law": f"{sum(float(row['true law']) for row in runs.values()) / len(runs):.3f}",
                "better than VAE": "" if method == "VAE" else better_than_vae(own, vae),
                **seconds(list(runs.values())),
                **provenance(),
                "command": command,
            }
        )
    return found


def diagonals(data_seeds: int, weight_seeds: int) -> list[tuple[int, int]]:
    """All pairs of seeds; each run of ``data_seeds`` in a row has every data seed once."""
    return [(d, (d + k) % weight_seeds) for k in range(weight_seeds) for d in range(data_seeds)]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data-seeds", type=int, default=2)
    parser.add_argument("--weight-seeds", type=int, default=2)
    parser.add_argument("--pairs", type=int, help="so many pairs of seeds, along diagonals; default: all")
    options = parser.parse_args()
    if options.smoke:
        options.data_seeds = options.weight_seeds = 1
    warnings.filterwarnings("ignore", message="the normal matrix")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pairs = diagonals(options.data_seeds, options.weight_seeds)[: options.pairs]
    command = (
        f"python benchmarks/toys.py --data-seeds {options.data_seeds} --weight-seeds {options.weight_seeds}"
    )
    if len(pairs) < options.data_seeds * options.weight_seeds:
        command += f" --pairs {len(pairs)}"
    # Pairs outermost: an interrupted run has every curve and net equally often.
    todo = [
        (curve, size, *pair, method)
        for pair, size, curve, method in itertools.product(pairs, NETS, CURVES, STEPS)
    ]
    keys = [tuple(map(str, key)) for key in todo]
    with folders(options.smoke) as place:
        path = place.results / "toys_runs.csv"

        def tabulate() -> list[dict[str, str]]:
            """Writes the table of all runs so far."""
            done = kept(path, KEYS)
            rows = summary([done[key] for key in keys if key in done], command)
            put(place.results / "toys.csv", rows, ("curve", "net", "method"))
            return rows

        done = kept(path, KEYS)
        missing = [key for key, name in zip(todo, keys, strict=True) if name not in done]
        if missing and not options.smoke:
            for method in STEPS:  # compiles, so that the first runs' seconds are like the others'
                run(*todo[0][:-1], method, smoke=True)
        for key in tqdm(missing, desc="runs"):
            put(path, [run(*key, options.smoke)], KEYS)
            tabulate()
        show(tabulate())


if __name__ == "__main__":
    main()
