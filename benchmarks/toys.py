# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""EM, exact maximum likelihood and a VAE on the two toy curves, over data seeds and weight seeds.

    python benchmarks/toys.py --data-seeds 20 --weight-seeds 20       # a day on one core; resumes run by run
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
from statistics import median
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from runs import Stopwatch, arguments, folders, kept, provenance, put, show
from scipy import stats
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_cpa.datasets import minibatches
from pyro_cpa.infer import EM, AnalyticELBO, AutoCPAPosterior, ExactML

__all__: list[str] = []

ROWS, NOISE, MARGIN = 500, 0.1, 0.2
NETS = {"small": (1, 8, 2), "large": (1, 8, 8, 2)}
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


class Curve(PyroModule):
    """The decoder with its noise, as a Pyro model, and the VAE's guide."""

    def __init__(self, sizes: tuple[int, ...], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            linear = nn.Linear(a, b)
            nn.init.xavier_normal_(linear.weight)
            nn.init.normal_(linear.bias)
            layers += [linear, nn.LeakyReLU(0.1)]
        self.decoder = nn.Sequential(*layers[:-1])
        self.noise = PyroParam(torch.tensor(0.55), constraint=dist.constraints.positive)
        self.encoder = nn.Sequential(
            nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
        )

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


Report = Callable[[], None]


def by_em(net: Curve, exact: AutoCPAPosterior, x: Tensor, steps: int, report: Report) -> None:
    EM(net, exact).run(x, num_steps=steps, tol=0.0, progress=False, callback=lambda record: report())


def by_ml(net: Curve, exact: AutoCPAPosterior, x: Tensor, steps: int, report: Report) -> None:
    ExactML(net, exact).run(x, num_steps=steps, tol=0.0, progress=False, callback=lambda record: report())


def by_vae(net: Curve, exact: AutoCPAPosterior, x: Tensor, steps: int, report: Report) -> None:
    loss = AnalyticELBO(max_plate_nesting=1)(net, net.guide)
    optim = torch.optim.Adam(net.parameters(), 5e-3)
    for epoch in range(steps):
        for (batch,) in minibatches(x, batch_size=100, epoch=epoch):
            optim.zero_grad()
            (loss(batch) / len(batch)).backward()
            optim.step()
        if epoch % 20 == 19 or epoch == steps - 1:
            report()


# What it is called, how it runs, and for how many steps or epochs at most.
METHODS: dict[str, tuple[Callable[..., None], int]] = {
    "EM": (by_em, 75),
    "ExactML": (by_ml, 20),
    "VAE": (by_vae, 1000),
}


def run(curve: str, net: str, data_seed: int, weight_seed: int, method: str, smoke: bool) -> dict[str, Any]:
    x, x_test = data(curve, data_seed)
    pyro.clear_param_store()
    model = Curve(NETS[net], weight_seed)
    exact = AutoCPAPosterior(model, decoder=model.decoder)
    target = true_loss(curve, x_test) + MARGIN
    wall, cpu, watch = 0.0, 0.0, Stopwatch()
    reached: tuple[float, float] | None = None
    loss = math.inf

    def report() -> None:
        nonlocal wall, cpu, reached, loss
        spent = watch.read()
        wall, cpu = wall + spent[0], cpu + spent[1]
        with torch.no_grad():
            loss = -exact.log_evidence(x_test).mean().item()
        if reached is None and loss <= target:
            reached = wall, cpu
        watch.read()

    fit, steps = METHODS[method]
    fit(model, exact, x, 2 if smoke else steps, report)
    with torch.no_grad():
        train = -exact.log_evidence(x).mean().item()
    return dict(zip(KEYS, (curve, net, data_seed, weight_seed, method), strict=True)) | {
        "train": f"{train:.4f}",
        "test": f"{loss:.4f}",
        "true law": f"{target - MARGIN:.4f}",
        "wall s": f"{wall:.2f}",
        "CPU s": f"{cpu:.2f}",
        "wall s to target": "" if reached is None else f"{reached[0]:.2f}",
        "CPU s to target": "" if reached is None else f"{reached[1]:.2f}",
        **provenance(),
    }


def summary(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """A row for each curve, net and method."""
    groups: dict[tuple[str, ...], dict[tuple[str, ...], dict[str, str]]] = defaultdict(dict)
    for row in rows:
        groups[row["curve"], row["net"], row["method"]][row["data seed"], row["weight seed"]] = row
    found = []
    for (curve, net, method), runs in groups.items():
        losses = [float(row["test"]) for row in runs.values()]
        other = groups.get((curve, net, "VAE"), {})
        pairs = [
            (float(row["test"]), float(other[seeds]["test"])) for seeds, row in runs.items() if seeds in other
        ]
        spread = stats.sem(losses) * stats.t.ppf(0.975, len(losses) - 1) if len(losses) > 1 else math.nan
        hits = [row for row in runs.values() if row["wall s to target"]]
        found.append(
            {
                "curve": curve,
                "net": net,
                "method": method,
                "runs": str(len(runs)),
                "data seeds": str(len({seeds[0] for seeds in runs})),
                "weight seeds": str(len({seeds[1] for seeds in runs})),
                "test -log p": f"{sum(losses) / len(losses):.3f}"
                + (f" +- {spread:.3f}" if len(losses) > 1 else ""),
                "best": f"{min(losses):.3f}",
                "worst": f"{max(losses):.3f}",
                "true law": f"{sum(float(row['true law']) for row in runs.values()) / len(runs):.3f}",
                "better than VAE": ""
                if method == "VAE"
                else f"{sum(a < b for a, b in pairs)} of {len(pairs)}",
                "reached target": f"{len(hits)} of {len(runs)}",
                "median wall s to target": f"{median(float(r['wall s to target']) for r in hits):.1f}"
                if hits
                else "",
                "median CPU s to target": f"{median(float(r['CPU s to target']) for r in hits):.1f}"
                if hits
                else "",
                "wall s": f"{sum(float(row['wall s']) for row in runs.values()) / len(runs):.1f}",
                "CPU s": f"{sum(float(row['CPU s']) for row in runs.values()) / len(runs):.1f}",
                **provenance(),
                "command": "python benchmarks/toys.py",
            }
        )
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data-seeds", type=int, default=2)
    parser.add_argument("--weight-seeds", type=int, default=2)
    options = parser.parse_args()
    if options.smoke:
        options.data_seeds = options.weight_seeds = 1
    warnings.filterwarnings("ignore", message="the normal matrix")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    # Seeds outermost: an interrupted run has every curve and net equally often.
    seeds = sorted(itertools.product(range(options.data_seeds), range(options.weight_seeds)), key=max)
    todo = [
        (curve, net, *pair, method)
        for pair, net, curve, method in itertools.product(seeds, NETS, CURVES, METHODS)
    ]
    with folders(options.smoke) as place:
        path = place.results / "toys_runs.csv"
        done = kept(path, KEYS)
        for key in tqdm(todo, desc="runs"):
            if tuple(map(str, key)) not in done:
                put(path, [run(*key, options.smoke)], KEYS)
        rows = summary(list(kept(path, KEYS).values()))
        put(place.results / "toys.csv", rows, ("curve", "net", "method"))
        show(rows)


if __name__ == "__main__":
    main()
