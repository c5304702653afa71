# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Speed and end points of the exact core, side by side in one run.

    python benchmarks/exact.py            # E-step throughput, peak memory, scipy loop; EM, exact ML on circle and wave
    python benchmarks/exact.py --smoke    # the same in seconds

Prints two tables and writes them to benchmarks/results/exact_*.csv.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from exact_or_amortised import NoisyDecoder
from runs import publish
from scipy.special import log_ndtr
from scipy.stats import multivariate_normal, norm
from torch import nn

from pyro_cpa.distributions import CPAMarginal
from pyro_cpa.distributions.expectation import region_posterior
from pyro_cpa.infer import EM, AutoCPAPosterior, ExactML

RESULTS = Path(__file__).parent / "results"
DATA = Path(os.environ.get("PYRO_CPA_DATA", Path(__file__).parents[2] / "shared" / "data"))


def decoder_of(*sizes: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def scipy_pairs(px: CPAMarginal, x: np.ndarray) -> np.ndarray:
    """log p(x) by scipy calls per datum and region: what a direct transcription of the formulas does."""
    part = px.partition
    A, b = part.slopes.numpy(), part.offsets.numpy()
    scale = px.joint.noise.scale.numpy()
    L = A.shape[-1]
    found = np.full((len(x), len(A)), -np.inf)
    for r in range(len(A)):
        covariance = np.diag(scale**2) + A[r] @ A[r].T
        log_k = multivariate_normal(b[r], covariance).logpdf
        S = np.linalg.inv(np.eye(L) + A[r].T @ (A[r] / scale[:, None] ** 2))
        for n in range(len(x)):
            mu = S @ A[r].T @ ((x[n] - b[r]) / scale**2)
            if L == 1:
                low, high = float(part.cells.lower[r]), float(part.cells.upper[r])
                deviation = S[0, 0] ** 0.5
                left, right = (low - mu[0]) / deviation, (high - mu[0]) / deviation
                mass = (
                    norm.cdf(right) - norm.cdf(left)
                    if left < 0 < right
                    else abs(np.exp(log_ndtr(-abs(left))) - np.exp(log_ndtr(-abs(right))))
                )
            else:
                mass = _edge_mass(part.cells, r, mu, S)
            with np.errstate(divide="ignore"):
                found[n, r] = log_k(x[n]) + np.log(max(mass, 0.0))
    return np.logaddexp.reduce(found, axis=1)


def _edge_mass(cells, r: int, mu: np.ndarray, S: np.ndarray) -> float:
    """Mass of a Gaussian on a polygon as a sum over edges of one-dimensional scipy quadratures."""
    from scipy.integrate import quad

    C = np.linalg.cholesky(S)
    total, inside = 0.0, True
    for e in range(cells.offsets.shape[1]):
        if not cells.offsets[r, e].isfinite():
            continue
        n, c = cells.normals[r, e].numpy(), float(cells.offsets[r, e])
        t = np.array([-n[1], n[0]])
        white = C.T @ n
        size = np.linalg.norm(white)
        h = (c - n @ mu) / size
        inside &= h >= 0
        axis = np.array([-white[1], white[0]]) / size
        along = axis @ np.linalg.solve(C, t)
        start = axis @ np.linalg.solve(C, c * n - mu)
        low, high = float(cells.starts[r, e]) * along + start, float(cells.ends[r, e]) * along + start
        value = quad(
            lambda s, h=h: np.exp(-(h * h + s * s) / 2) * abs(h) / (h * h + s * s),
            max(low, -40),
            min(high, 40),
        )[0]
        total += np.sign(h) * value
    return inside - total / (2 * np.pi)


def throughput(smoke: bool) -> list[dict]:
    rows = []
    seconds = 0.05 if smoke else 3.0
    for label, sizes, N in (
        ("L=1, 1-16-16-10", (1, 16, 16, 10), 4000),
        ("L=2, 2-32-10", (2, 32, 10), 500),
        ("L=2, 2-24-24-64", (2, 24, 24, 64), 300),
        ("L=3, 3-10-10", (3, 10, 10), 20),
    ):
        N = N // 20 if smoke else N
        decoder = decoder_of(*sizes)
        px = CPAMarginal(decoder, 0.3)
        x = px.sample((N,)).detach()
        R = px.partition.num_regions
        parts = [x[rows] for rows in px.joint.chunks(x)]
        for chunk in parts[:1]:
            region_posterior(px.joint, chunk)
        start, passes = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            for chunk in parts:
                region_posterior(px.joint, chunk)
            passes += 1
        ours = passes * N * R / (time.perf_counter() - start)
        speed = {"decoder": label, "regions": R, "data": N, "pairs/s": f"{ours:.3g}"}
        if sizes[0] > 2:  # scipy has no integral over a polytope
            rows.append(speed | dict.fromkeys(list(rows[0])[len(speed) :], ""))
            continue
        some = x[: max(1, (20 if smoke else 2000) // R + 1)]
        start = time.perf_counter()
        loop = scipy_pairs(px, some.numpy())
        theirs = len(some) * R / (time.perf_counter() - start)
        exact = px.log_prob(some).detach().numpy()
        rows.append(
            speed
            | {
                "scipy loop pairs/s": f"{theirs:.3g}",
                "ratio": f"{ours / theirs:.0f}",
                "max |difference| in log p": f"{np.nanmax(np.abs(loop - exact)):.1e}",
            }
        )
    return rows


def peak_memory(smoke: bool) -> list[dict]:
    """Peak resident memory of an E-step in a process of its own, with the memory budget that bounds it."""
    rows = []
    for N in (100,) if smoke else (1_000, 10_000):
        code = (
            "import resource, sys; sys.path.insert(0, 'benchmarks'); import torch\n"
            "from exact import decoder_of, CPAMarginal\n"
            f"px = CPAMarginal(decoder_of(2, 24, 10), 0.3); x = px.sample(({N},)).detach()\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "px.log_prob(x).sum().backward()\n"
            "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "print(px.partition.num_regions, before // 1024, after // 1024)\n"
        )
        root = Path(__file__).parents[1]
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
        )
        R, before, after = map(int, found.stdout.split())
        rows.append(
            {
                "data": N,
                "regions": R,
                "pairs": N * R,
                "MiB before": before,
                "peak MiB, evidence and gradient": after,
            }
        )
    return rows


def published(start: dict[str, np.ndarray]) -> NoisyDecoder:
    """A published starting point: decoder with leaky ReLU 0.1 and isotropic noise."""
    layers: list[nn.Module] = []
    count = sum(k.startswith("init_W") for k in start)
    for i in range(count):
        weight, bias = torch.as_tensor(start[f"init_W{i}"]), torch.as_tensor(start[f"init_v{i}"])
        linear = nn.Linear(weight.shape[1], weight.shape[0]).double()
        linear.weight.data, linear.bias.data = weight.clone(), bias.clone()
        layers += [linear, nn.LeakyReLU(0.1)]
    scale = torch.as_tensor(start["init_var_x"]).double().mean().sqrt()
    return NoisyDecoder(nn.Sequential(*layers[:-1]), 1, scale.item())


STARTS = ("circle_small", "wave_small", "circle_large", "wave_large")


def end_points(smoke: bool) -> list[dict]:
    """Where EM, exact ML and both together end from published starts, on one thread."""
    path = DATA / "em_starts.npz"
    if not path.exists():
        print(f"{path} is absent: set PYRO_CPA_DATA to its folder to compare with published starts")
        return []
    data, rows = np.load(path), []
    for name in STARTS[:1] if smoke else STARTS:
        start = {k.removeprefix(f"{name}_s0_"): data[k] for k in data.files if k.startswith(f"{name}_s0_")}
        x = torch.as_tensor(start["data"])
        gaussian = dist.MultivariateNormal(x.mean(0), x.mT.cov(correction=0)).log_prob(x).mean().item()
        row: dict = {
            "start": name,
            "Gaussian": f"{-gaussian:.4f}",
            "public EM": f"{start['em_nll'][-1]:.4f}",
            "stored direct ML": f"{start['direct_nll']:.4f}",
        }
        for label, make in FITS.items():
            pyro.clear_param_store()
            model = published(start)
            fit, options = make(model)
            begin = time.perf_counter()
            fit.run(x, progress=False, **(options | ({"num_steps": 2} if smoke else {})))
            seconds = time.perf_counter() - begin
            losses = [-record.log_evidence / len(x) for record in fit.history]
            rises = sum(b > a + 1e-9 for a, b in zip(losses, losses[1:], strict=False))
            row |= {label: f"{losses[-1]:.4f}", f"{label} s": f"{seconds:.1f}", f"{label} rises": rises}
        rows.append(row)
    return rows


def _guided(model: NoisyDecoder) -> tuple[NoisyDecoder, AutoCPAPosterior]:
    return model, AutoCPAPosterior(model, decoder=model.decoder)


# Rounds of 50 iterations, until one gains less than 0.01 nats a datum, five of them at most.
ROUNDS = {"num_steps": 15, "tol": 1e-2}
FITS = {
    "EM": lambda model: (EM(*_guided(model)), {"num_steps": 75, "tol": 0.0}),
    "EM+L-BFGS": lambda model: (EM(*_guided(model), accelerate="lbfgs", lbfgs_iterations=50), ROUNDS),
    "ExactML": lambda model: (ExactML(*_guided(model), iterations_per_step=50), ROUNDS),
    "L-BFGS alone": lambda model: (
        ExactML(*_guided(model), iterations_per_step=50, warm_start=0),
        {"num_steps": 14, "tol": 1e-2},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="seconds instead of minutes; figures mean nothing"
    )
    smoke = parser.parse_args().smoke
    warnings.filterwarnings("ignore", message="the normal matrix")
    torch.set_default_dtype(torch.float64)
    suffix = "_smoke" if smoke else ""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    publish(
        "E-step with both moments, data x regions",
        throughput(smoke),
        RESULTS / f"exact_throughput{suffix}.csv",
    )
    publish(
        "Memory is bounded by the budget, not by pairs",
        peak_memory(smoke),
        RESULTS / f"exact_memory{suffix}.csv",
    )
    torch.set_num_threads(1)
    rows = end_points(smoke)
    publish(
        "Mean -log p(x) from published starts, one thread", rows, RESULTS / f"exact_end_points{suffix}.csv"
    )
    print(f"\npeak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB")


if __name__ == "__main__":
    main()
