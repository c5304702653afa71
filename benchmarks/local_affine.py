# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""``AutoLocalAffine`` beside the amortised guide of a VAE with 20 latent dimensions, at equal decoders.

    python benchmarks/local_affine.py                  # scikit-learn's digits, and Fashion-MNIST where it is found; minutes
    python benchmarks/local_affine.py --smoke          # seconds; figures mean nothing

A VAE with ReLU decoder and Gaussian noise of learned scale is trained with its own guide. Then both guides draw for the
same test images: the ELBO, and importance-weighted bounds of 10 and 100 draws, in nats an image, with the standard error of
the mean over images; "above amortised" is the paired difference of the bounds of 100 draws, with its standard error.
"ms" are CPU milliseconds an image on one thread: to find the law (encoder, or ascents), and to draw 100 times from it and
weigh the draws. "best mode" is the height of the highest point found, log p(x, z) in nats, above that of the first column.

Prints one table and writes it to benchmarks/results/local_affine.csv.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from runs import publish
from torch import Tensor

from pyro_cpa.datasets import load_digits, load_fashion_mnist, minibatches
from pyro_cpa.errors import InvalidData
from pyro_cpa.infer import AutoLocalAffine
from pyro_cpa.models import VAE, Normal

RESULTS = Path(__file__).parent / "results"
LATENT, DRAWS = 20, 100


def trained(x: Tensor, hidden: tuple[int, ...], epochs: int) -> VAE:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    vae = VAE(x.shape[-1], LATENT, hidden_dims=hidden, likelihood=Normal(scale=0.3), dropout=0.0)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    for epoch in range(epochs):
        for (rows,) in minibatches(x, epoch=epoch):
            svi.step(rows)
    return vae.eval()


def log_joint(vae: VAE, x: Tensor, z: Tensor) -> Tensor:
    return vae.standard_normal().log_prob(z) + vae.likelihood(vae.decoder(z)).log_prob(x)


def guides(vae: VAE) -> Iterator[tuple[str, Callable[[Tensor], tuple[Any, Tensor]]]]:
    """Name, and what returns q(z | x) with the best point that it knows of."""

    def amortised(x: Tensor) -> tuple[Any, Tensor]:
        law = vae.encoder(x)
        return law, law.mean

    yield "amortised", amortised
    for K in (1, 4, 16):

        def local(x: Tensor, K: int = K) -> tuple[Any, Tensor]:
            guide = AutoLocalAffine(vae.model, vae.decoder, K)
            return guide.mixture(x), guide.mode(x)

        yield f"local, K={K}", local


def log_weights(vae: VAE, law: Any, x: Tensor, rounds: int) -> Tensor:
    """(rounds, DRAWS, N) log p(x, z) - log q(z | x)."""
    found = []
    for _ in range(rounds):
        z = law.sample((DRAWS,))
        found.append(log_joint(vae, x, z) - law.log_prob(z))
    return torch.stack(found)


@torch.no_grad()
def compare(data: str, vae: VAE, x: Tensor, rounds: int) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    first: tuple[Tensor, Tensor] | None = None
    for name, law_of in guides(vae):
        pyro.set_rng_seed(1)
        begin = time.process_time()
        law, best = law_of(x)
        solved = time.process_time()
        log_weights(vae, law, x, 1)
        drawn = time.process_time()
        log_w = log_weights(vae, law, x, rounds)
        bounds = {
            S: (log_w.reshape(-1, S, len(x)).logsumexp(1) - math.log(S)).mean(0) for S in (1, 10, DRAWS)
        }
        height = log_joint(vae, x, best)
        first = first or (bounds[DRAWS], height)
        shift = bounds[DRAWS] - first[0]
        print(f"{data}, {name}: done", flush=True)
        rows.append(
            {
                "data": data,
                "guide": name,
                "ELBO": with_error(bounds[1]),
                "IWAE 10": with_error(bounds[10]),
                "IWAE 100": with_error(bounds[DRAWS]),
                "above amortised": with_error(shift),
                "best mode": f"{(height - first[1]).mean():.2f}",
                "ms for the law": f"{1e3 * (solved - begin) / len(x):.2f}",
                "ms for 100 draws": f"{1e3 * (drawn - solved) / len(x):.2f}",
            }
        )
    return rows


def with_error(values: Tensor) -> str:
    return f"{values.mean():.2f} ± {values.std() / len(values) ** 0.5:.2f}"


def experiments(smoke: bool) -> Iterator[tuple[str, Tensor, Tensor, tuple[int, ...], int]]:
    digits = load_digits()
    count = 300 if smoke else len(digits.x_train)
    yield (
        "digits",
        digits.x_train[:count],
        digits.x_test[: 5 if smoke else 60],
        (100, 100),
        2 if smoke else 100,
    )
    if smoke:
        return
    try:
        images = load_fashion_mnist()
    except InvalidData as error:
        print(f"Fashion-MNIST is left out: {error}")
        return
    yield "Fashion-MNIST", images.x_train[:10_000], images.x_test[:20], (100, 100), 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="seconds instead of minutes; figures mean nothing"
    )
    smoke = parser.parse_args().smoke
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    rows: list[dict[str, str]] = []
    for data, x_train, x_test, hidden, epochs in experiments(smoke):
        vae = trained(x_train.double(), hidden, epochs)
        rows += compare(data, vae, x_test.double(), 1 if smoke else 5)
    path = RESULTS / f"local_affine{'_smoke' if smoke else ''}.csv"
    publish("Guides for one decoder, nats per datum", rows, path)


if __name__ == "__main__":
    main()
