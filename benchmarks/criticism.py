# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What the exact evidence is worth on real data: imputation, anomaly detection, model comparison.

    python benchmarks/criticism.py                         # 10 seeds, everything (hours on one core)
    python benchmarks/criticism.py --seeds 3 --only anomaly
    python benchmarks/criticism.py --smoke                 # the same in seconds, figures mean nothing

Prints tables and writes them to benchmarks/results/criticism_*.csv. Figures are means over seeds (splits, gaps,
starts), "+-" half of a 95 % t-interval of that mean. Columns are standardised by the training rows. Imputation, the
longest, keeps each of its runs in criticism_imputation_runs.csv, resumes there, and takes more seeds later.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from imputers import IMPUTERS
from pyro.infer import SVI
from runs import Folders, folders, kept, mean_and_interval, publish, put
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import LocalOutlierFactor
from sklearn.svm import OneClassSVM
from torch import nn

from pyro_cpa.criticism import (
    ConformalDetector,
    CPADensity,
    average_precision,
    compare,
    count_parameters,
    roc_auc,
    surprise,
)
from pyro_cpa.distributions import CPAMarginal
from pyro_cpa.infer import ImportanceWeightedELBO

PARTICLES = (2, 10, 100)
Rows = list[dict[str, object]]


def standardised(
    x: np.ndarray, random: np.random.Generator, share: float = 0.7
) -> tuple[np.ndarray, np.ndarray]:
    """Training and test rows of a random split; columns that never vary in training are dropped."""
    order = random.permutation(len(x))
    train, test = x[order[: int(share * len(x))]], x[order[int(share * len(x)) :]]
    varies = train.std(0) > 0
    loc, scale = train[:, varies].mean(0), train[:, varies].std(0)
    return (train[:, varies] - loc) / scale, (test[:, varies] - loc) / scale


def imputation(seeds: int, smoke: bool, place: Folders, chosen: tuple[str, ...] = ()) -> Rows:
    """Resumes: each run is kept as soon as it is done."""
    tables = {"wine": load_wine().data, "breast_cancer": load_breast_cancer().data}
    # Pixels are counts of 0..16: noise of one unit makes a density exist.
    digits = load_digits().data
    tables["digits"] = digits + np.random.default_rng(0).random(digits.shape)
    keys, path = ("data", "missing", "method", "seed"), place.results / "criticism_imputation_runs.csv"
    done = kept(path, keys)
    settings = list(itertools.product(chosen or tables, (0.2, 0.5), range(seeds)))
    for name, share, seed in settings[::5] if smoke else settings:  # a table with few gaps, another with many
        random = np.random.default_rng(seed)
        train, test = standardised(tables[name][:60] if smoke else tables[name], random)
        holes = [np.where(random.random(x.shape) < share, np.nan, x) for x in (train, test)]
        usable = ~np.isnan(holes[0]).all(0)
        gaps, truth = np.isnan(holes[1][:, usable]), test[:, usable]
        for method, complete in IMPUTERS.items():
            key = (name, f"{share:.0%}", method, str(seed))
            if key in done:
                continue
            begin = time.process_time()
            found = complete(holes[0][:, usable], holes[1][:, usable], seed, smoke)
            row: dict[str, object] = dict(zip(keys, key, strict=True))
            row["RMSE"] = float(np.sqrt(np.mean((found.mean[gaps] - truth[gaps]) ** 2)))
            if found.draws is not None:
                low, high = np.quantile(found.draws, (0.05, 0.95), axis=0)
                within = (low[gaps] <= truth[gaps]) & (truth[gaps] <= high[gaps])
                row["coverage of 90 %"] = float(np.mean(within))
            if not np.isnan(found.log_prob):
                row["log p(x_obs)" + (" (estimate)" if found.estimated else "")] = found.log_prob
            row["CPU s"] = time.process_time() - begin
            print(*row.values(), flush=True)
            put(path, [row], keys)
    measures = ("RMSE", "coverage of 90 %", "log p(x_obs)", "log p(x_obs) (estimate)", "CPU s")
    groups: dict[tuple, list[dict[str, float]]] = defaultdict(list)
    for (*group, _), row in kept(path, keys).items():
        groups[tuple(group)].append({name: float(row[name]) for name in measures if row.get(name)})
    ordered = (key for key in itertools.product(tables, ("20%", "50%"), IMPUTERS) if key in groups)
    return summarise({key: groups[key] for key in ordered}, keys[:-1], measures)


def detectors(
    seed: int, smoke: bool
) -> dict[str, Callable[[np.ndarray], Callable[[np.ndarray], np.ndarray]]]:
    """Each fits normal rows and returns a score, higher for stranger rows."""

    def density(**options: object) -> Callable[[np.ndarray], Callable[[np.ndarray], np.ndarray]]:
        quick = {"max_iter": 1} if smoke else {}

        def fit(x: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
            model = CPADensity(random_state=seed, **(options | quick)).fit(x)
            return lambda rows: surprise(model, rows).numpy()

        return fit

    def mixture(x: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        fits = [GaussianMixture(k, reg_covar=1e-2, random_state=seed).fit(x) for k in (1, 2, 3, 5)]
        best = min(fits, key=lambda fit: fit.bic(x))
        return lambda rows: -best.score_samples(rows)

    def other(model: object) -> Callable[[np.ndarray], Callable[[np.ndarray], np.ndarray]]:
        def fit(x: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
            fitted = model.fit(x)
            return lambda rows: -fitted.score_samples(rows)

        return fit

    return {
        "isolation forest": other(IsolationForest(random_state=seed)),
        "local outlier factor": other(LocalOutlierFactor(novelty=True)),
        "one-class SVM": other(OneClassSVM(nu=0.1)),
        "mixture": mixture,
        "PPCA, L=10": other(PCA(10)),
        "FA, L=5": density(n_latent=5, hidden=(), ridge=0.0),
        "CPA, L=1": density(n_latent=1, hidden=(16,)),
        "CPA, L=2": density(n_latent=2, hidden=(8,)),
    }


def anomaly_sets(seed: int, smoke: bool) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, normal rows, anomalies. The digit held out is the seed's."""
    x, y = load_breast_cancer(return_X_y=True)
    yield "breast_cancer", x[y == 1], x[y == 0]
    x, y = load_digits(return_X_y=True)
    x = x + np.random.default_rng(0).random(x.shape)
    yield "digits, one held out", x[y != seed % 10], x[y == seed % 10]


def anomaly(seeds: int, smoke: bool) -> Rows:
    found: dict[tuple, list[dict[str, float]]] = defaultdict(list)
    level = 0.1
    for seed in range(seeds):
        for name, normal, strange in anomaly_sets(seed, smoke):
            random = np.random.default_rng(seed)
            order = random.permutation(len(normal))[: 120 if smoke else None]
            train, calibration, test = np.split(normal[order], [len(order) // 2, 3 * len(order) // 4])
            varies = train.std(0) > 0
            loc, scale = train[:, varies].mean(0), train[:, varies].std(0)
            train, calibration, test, strange = (
                (rows[:, varies] - loc) / scale for rows in (train, calibration, test, strange)
            )
            labels = np.r_[np.zeros(len(test)), np.ones(len(strange))]
            for method, fit in detectors(seed, smoke).items():
                begin = time.process_time()
                score = fit(train)
                values = np.r_[score(test), score(strange)]
                conformal = ConformalDetector(score, calibration)
                row = {"AUC": roc_auc(labels, values), "AP": average_precision(labels, values)}
                row["false alarms at 10 %"] = float(conformal.flags(test, level).mean())
                row["bound (95 %)"] = conformal.false_alarm_bound(level)
                row["detected at 10 %"] = float(conformal.flags(strange, level).mean())
                row["CPU s"] = time.process_time() - begin
                found[name, method].append(row)
                print(name, seed, method, row, flush=True)
    measures = ("AUC", "AP", "false alarms at 10 %", "bound (95 %)", "detected at 10 %", "CPU s")
    return summarise(found, ("data", "method"), measures)


def true_decoder() -> nn.Sequential:
    """L = 1, three units: a curve in five dimensions that turns three times within the prior's bulk."""
    decoder = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 5))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        decoder[0].weight.copy_(torch.tensor([[1.0], [-1.0], [1.0]]))
        decoder[0].bias.copy_(torch.tensor([0.7, 0.0, -0.7]))
        decoder[2].weight.copy_(2.0 * torch.randn(5, 3, generator=generator))
        decoder[2].bias.zero_()
    return decoder.requires_grad_(False)


class Encoder(nn.Module):
    """An amortised diagonal Gaussian guide, trained with the decoder fixed, as a VAE's encoder is."""

    def __init__(self, marginal: CPAMarginal, decoder: nn.Module, scale: torch.Tensor) -> None:
        super().__init__()
        self.latent_dim, self.decoder, self.scale = marginal.partition.latent_dim, decoder, scale
        self.net = nn.Sequential(nn.Linear(len(scale), 32), nn.Tanh(), nn.Linear(32, 2 * self.latent_dim))

    def model(self, x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        pyro.module("encoder", self.net)
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.net(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, 1e-3 + nn.functional.softplus(raw)).to_event(1))

    def train_on(self, x: torch.Tensor, steps: int) -> tuple[Callable, Callable]:
        pyro.clear_param_store()
        loss = ImportanceWeightedELBO(5, vectorize_particles=True, max_plate_nesting=1)
        svi = SVI(self.model, self.guide, pyro.optim.Adam({"lr": 1e-2}), loss)
        for _ in range(steps):
            svi.step(x)
        return self.model, self.guide


def comparison(seeds: int, smoke: bool) -> Rows:
    """Data from a known decoder: which architecture does each criterion rank first?"""
    shapes = {"L=1 affine": (1, ()), "L=1 H=1": (1, (1,)), "L=1 H=3 (true)": (1, (3,)), "L=1 H=8": (1, (8,))}
    shapes |= {"L=2 affine": (2, ()), "L=2 H=3": (2, (3,))}
    truth, scale = true_decoder(), torch.full((5,), 0.5)
    first: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(shapes, 0))
    gaps: dict[tuple, list[dict[str, float]]] = defaultdict(list)
    for seed in range(seeds):
        pyro.set_rng_seed(seed)
        x = CPAMarginal(truth, scale).sample((900,))
        train, test = x[: 60 if smoke else 400].numpy(), x[400:].numpy()
        options = {"ridge": 0.01, "random_state": seed} | (
            {"max_iter": 1} if smoke else {"n_init": 8, "max_iter": 15}
        )
        fits = {name: CPADensity(L, hidden, **options).fit(train) for name, (L, hidden) in shapes.items()}
        exact = compare(fits, test, x_train=train)
        print(exact, flush=True)
        first["exact held-out"][exact.best] += 1
        first["stacking weight"][exact.names[int(exact.weights.argmax())]] += 1
        first["AIC"][exact.names[int(exact.aic.argmin())]] += 1
        first["BIC"][exact.names[int(exact.bic.argmin())]] += 1
        pairs = {}
        for name, fit in fits.items():
            encoder = Encoder(fit.marginal(), fit.decoder_, torch.as_tensor(fit.noise_scale_))
            pairs[name] = encoder.train_on(torch.as_tensor(train), 5 if smoke else 400)
            for K in PARTICLES:
                estimate = compare({name: pairs[name]}, test, num_samples=K).log_prob[0]
                gaps[K, name].append({"estimate - exact": estimate - exact.log_prob[list(fits).index(name)]})
        for K in PARTICLES:
            estimates = {
                n: exact.log_prob[i] + gaps[K, n][-1]["estimate - exact"] for i, n in enumerate(fits)
            }
            first[f"IWAE, K={K}"][max(estimates, key=estimates.get)] += 1
    for (K, name), values in gaps.items():
        print(
            f"K={K:3d} {name:16s} estimate - exact = {np.mean([v['estimate - exact'] for v in values]):+.4f} nats"
        )
    print("parameters that count, truth:", count_parameters(truth.requires_grad_(True)) + 5)
    return [
        {"criterion": c, "seeds": seeds} | {f"{n} first": k for n, k in row.items()}
        for c, row in first.items()
    ]


def summarise(
    found: dict[tuple, list[dict[str, float]]], keys: tuple[str, ...], measures: tuple[str, ...]
) -> Rows:
    rows = []
    for key, values in found.items():
        row: dict[str, object] = dict(zip(keys, key, strict=True)) | {"seeds": len(values)}
        for measure in measures:
            numbers = [v[measure] for v in values if measure in v]
            row[measure] = "" if np.isnan(numbers).all() else mean_and_interval(numbers)
        rows.append(row)
    return rows


TASKS = {
    "imputation": (imputation, "Imputation of real data, gaps at random in training and test rows"),
    "anomaly": (anomaly, "Anomalies among real data, conformal threshold at 10 %"),
    "comparison": (comparison, "How often each architecture is ranked first; data from a known decoder"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="seconds instead of hours; figures mean nothing")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--only", choices=TASKS, help="one of the three tables")
    parser.add_argument("--data", nargs="*", default=(), help="imputation: these tables only")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    with folders(args.smoke) as place:
        for name, (task, title) in TASKS.items():
            if args.only in (None, name):
                options = {"place": place, "chosen": tuple(args.data)} if name == "imputation" else {}
                rows = task(1 if args.smoke else args.seeds, args.smoke, **options)
                publish(title, rows, place.results / f"criticism_{name}.csv")


if __name__ == "__main__":
    main()
