# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Many regions: what it costs to find them, and to leave out those that do not matter to a datum.

    python benchmarks/regions.py                       # all four tables: about half an hour
    python benchmarks/regions.py --only enumeration    # regions against time and memory, to a million
    python benchmarks/regions.py --only pruning        # trained decoders: all regions against those that matter
    python benchmarks/regions.py --only convolutional  # a convolutional decoder of images, exact test log p(x)
    python benchmarks/regions.py --only share          # what part of a step of learning enumeration takes
    python benchmarks/regions.py --smoke               # seconds; figures mean nothing

Decoders of digits (scikit-learn) and Fashion-MNIST (if it is there) are trained as variational autoencoders with Gaussian
noise. Writes benchmarks/results/regions_*.csv. Times are CPU seconds, of one thread unless a row says otherwise.
"""

from __future__ import annotations

import argparse
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import torch
from exact import decoder_of
from runs import arguments, folders, provenance, publish
from torch import Tensor, nn

from pyro_cpa.datasets import Dataset, load_digits, load_fashion_mnist, minibatches
from pyro_cpa.distributions import CPAMarginal
from pyro_cpa.distributions.fisher import expected_statistics
from pyro_cpa.distributions.parts import parts
from pyro_cpa.errors import InvalidData
from pyro_cpa.infer import AnalyticELBO
from pyro_cpa.models import VAE, GaussianNoise
from pyro_cpa.partition import Partition, enumerate_regions

ROWS_OF_ALL = 32  # data for which all regions are looked at

Rows = list[dict[str, Any]]


# ---- enumeration -----------------------------------------------------------------------------------------


def enumeration(smoke: bool) -> Rows:
    """Random decoders, each in a process of its own, whose peak memory is reported."""
    rows = []
    for latent_dim, widths, threads in (
        ((2, (16, 16), 2),)
        if smoke
        else (
            (1, (128, 128, 128), 1),
            (2, (64, 64, 64), 1),
            (2, (128, 128, 128), 1),
            (2, (256, 256, 256), 1),
            (2, (480, 480, 480), 1),
            (2, (480, 480, 480), 2),
            (2, 6 * (256,), 1),
            (3, (16, 16), 1),
            (3, (32, 32), 1),
        )
    ):
        sizes = (latent_dim, *widths, 10)
        code = (
            "import resource, time, torch\n"
            "from exact import decoder_of\n"
            "from pyro_cpa.partition import enumerate_regions\n"
            f"torch.set_num_threads({threads})\n"
            f"decoder = decoder_of{sizes}\n"
            "enumerate_regions(decoder_of(2, 4, 4, 2))\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "wall, start = time.perf_counter(), time.process_time()\n"
            "R = enumerate_regions(decoder, max_regions=5_000_000, progress=True).num_regions\n"
            "wall, seconds = time.perf_counter() - wall, time.process_time() - start\n"
            "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "print(R, wall, seconds, before / 2**20, peak / 2**20)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        )
        R, wall, seconds, before, peak = map(float, done.stdout.split())
        rows.append(
            {
                "decoder": "-".join(map(str, sizes)),
                "regions": int(R),
                "threads": threads,
                "wall s": f"{wall:.1f}",
                "CPU s": f"{seconds:.1f}",
                "CPU microseconds per region": f"{1e6 * seconds / R:.0f}",
                "peak GiB": f"{peak:.2f}",
                "of which before": f"{before:.2f}",
            }
        )
        print(rows[-1], flush=True)
    return rows


# ---- trained decoders ------------------------------------------------------------------------------------


def pictures(smoke: bool) -> Iterator[tuple[str, Dataset]]:
    """Data sets, pixels centred and in units of their spread."""
    yield "digits", load_digits()
    if not smoke:
        try:
            yield "Fashion-MNIST", load_fashion_mnist()
        except InvalidData as error:
            print(f"Fashion-MNIST is left out: {error}")


def standardised(data: Dataset) -> tuple[Tensor, Tensor]:
    train, test = (x.flatten(1).double() for x in (data.x_train, data.x_test))
    mean, spread = train.mean(0), train.std()
    return (train - mean) / spread, (test - mean) / spread


def trained(
    x: Tensor, hidden: tuple[int, ...], steps: int, decoder: nn.Module | None = None, latent_dim: int = 2
) -> VAE:
    """A variational autoencoder, its noise learned."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    noise = GaussianNoise(x.shape[1], "scalar", 0.7)
    vae = VAE(x.shape[1], latent_dim, hidden_dims=hidden, likelihood=noise, dropout=0.0)
    if decoder is not None:
        vae.decoder = decoder
    elbo = AnalyticELBO(max_plate_nesting=1)
    optim = torch.optim.Adam(vae.parameters(), 2e-3)
    taken = epoch = 0
    while taken < steps:
        for (batch,) in minibatches(x, batch_size=128, seed=0, epoch=epoch):
            optim.zero_grad()
            (elbo.differentiable_loss(vae.model, vae.guide, batch) / len(batch)).backward()
            optim.step()
            taken += 1
        epoch += 1
    return vae.eval()


def timed(compute: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return compute(), time.process_time() - start


def evidence_with(
    partition: Partition, scale: Tensor, x: Tensor, tolerance: float
) -> tuple[CPAMarginal, Tensor, float]:
    """A new marginal, log p(x) and the seconds that it took, the search tree included."""
    px = CPAMarginal(partition, scale.detach(), tolerance=tolerance)
    with torch.no_grad():
        log_prob, seconds = timed(lambda: px.log_prob(x))
    return px, log_prob, seconds


@cache
def compile_all() -> None:
    """What is compiled on first use is compiled now."""
    exact_steps(decoder_of(2, 32, 32, 3), torch.tensor(0.1), torch.randn(20, 3))


def pruning(smoke: bool) -> Rows:
    """All regions against those that matter, on decoders of growing width trained on images."""
    rows = []
    compile_all()
    for name, data in pictures(smoke):
        train, test = standardised(data)
        train, test = train[: 200 if smoke else 10_000], test[: 40 if smoke else 1000]
        for widths in ((8,),) if smoke else ((32, 32), (64, 64), (64, 64, 64), (96, 96, 96), (160, 160, 160)):
            vae = trained(train, tuple(reversed(widths)), 5 if smoke else 1000)
            scale = vae.likelihood.scale
            partition = enumerate_regions(vae.decoder, max_regions=2_000_000)
            R, few = partition.num_regions, test[:ROWS_OF_ALL]
            _, full, seconds_full = evidence_with(partition, scale, few, 0.0)
            px, pruned, first = evidence_with(partition, scale, test, 1e-12)
            with torch.no_grad():
                _, seconds = timed(lambda px=px, test=test: px.log_prob(test))
            looked_at = sum(part.num_pairs for part in parts(px.joint, test))
            matter = (px.posterior(few).region_probs > 1e-12).sum(1).double().mean()
            share = px.omitted_share(test).max()
            all_ms, ms = 1e3 * seconds_full / len(few), 1e3 * seconds / len(test)
            rows.append(
                {
                    "data": name,
                    "decoder": "-".join(map(str, (2, *widths, test.shape[1]))),
                    "regions": R,
                    "matter to a datum": f"{matter:.0f}",
                    "looked at": f"{looked_at / len(test):.0f}",
                    "ms per datum, all": f"{all_ms:.2f}",
                    "ms per datum": f"{ms:.2f}",
                    "s for the tree": f"{first - seconds:.1f}",
                    "ratio": f"{all_ms / ms:.1f}",
                    "largest bound on the share left out": f"{share:.1e}",
                    "max |difference| in log p": f"{(full - pruned[: len(few)]).abs().max():.1e}",
                    "test log p(x)": f"{pruned.mean():.2f}",
                }
            )
            print(rows[-1], flush=True)
    return rows


def convolutional(smoke: bool) -> Rows:
    """Transposed convolutions from 7 x 7 to 28 x 28 pixels (to 8 x 8 for the digits): exact log p(x) of test images."""
    rows = []
    compile_all()
    for name, data in pictures(smoke):
        train, test = standardised(data)
        train, test = train[: 200 if smoke else 10_000], test[: 40 if smoke else 10_000]
        side, channels = (2, 2) if name == "digits" else (7, 2)
        torch.manual_seed(0)
        decoder = nn.Sequential(
            nn.Linear(2, 24),
            nn.ReLU(),
            nn.Linear(24, channels * side**2),
            nn.ReLU(),
            nn.Unflatten(1, (channels, side, side)),
            nn.ConvTranspose2d(channels, 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(2, 1, 4, stride=2, padding=1),
            nn.Flatten(),
        )
        vae, training = timed(lambda x=train, net=decoder: trained(x, (128,), 5 if smoke else 3000, net))
        partition, seconds = timed(lambda vae=vae: enumerate_regions(vae.decoder, max_regions=2_000_000))
        px, log_prob, evidence_seconds = evidence_with(partition, vae.likelihood.scale, test, 1e-12)
        elbo = AnalyticELBO(max_plate_nesting=1)
        with torch.no_grad():
            bound = -sum(elbo.loss(vae.model, vae.guide, x) for x in test.split(1000)) / len(test)
        rows.append(
            {
                "data": name,
                "units": 24 + channels * side**2 + 2 * (2 * side) ** 2,
                "regions": partition.num_regions,
                "training rows": len(train),
                "training CPU s": f"{training:.0f}",
                "enumeration CPU s": f"{seconds:.1f}",
                "test rows": len(test),
                "exact test log p(x)": f"{log_prob.mean():.3f}",
                "standard error": f"{log_prob.std() / math.sqrt(len(test)):.3f}",
                "ELBO": f"{bound:.3f}",
                "log p(x) CPU s": f"{evidence_seconds:.1f}",
                "peak GiB": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}",
                "largest bound on the share left out": f"{px.omitted_share(test[:1000]).max():.1e}",
            }
        )
        print(rows[-1], flush=True)
    return rows


def share(smoke: bool) -> Rows:
    """What part of a step of learning enumeration takes: of a gradient of log p(x), and of an E-step."""
    rows = []
    compile_all()
    exact_steps(decoder_of(1, 4, 3), torch.tensor(0.5), torch.randn(20, 3))
    for name, data in pictures(smoke):
        train, _ = standardised(data)
        x = train[: 100 if smoke else 1000]
        for latent_dim, widths in (
            ((1, (8,)),)
            if smoke
            else (
                (1, (16, 16)),
                (1, (64, 64)),
                (2, (16, 16)),
                (2, (64, 64)),
                (2, (96, 96, 96)),
                (2, (160, 160, 160)),
            )
        ):
            vae = trained(
                train[:10_000], tuple(reversed(widths)), 5 if smoke else 1000, latent_dim=latent_dim
            )
            regions, seconds, gradient, e_step = exact_steps(vae.decoder, vae.likelihood.scale, x)
            rows.append(
                {
                    "data": name,
                    "decoder": "-".join(map(str, (latent_dim, *widths, x.shape[1]))),
                    "regions": regions,
                    "rows": len(x),
                    "enumeration CPU s": f"{seconds:.3f}",
                    "gradient CPU s": f"{gradient:.3f}",
                    "E-step CPU s": f"{e_step:.3f}",
                    "faster without enumeration, gradient": f"{1 + seconds / gradient:.2f}",
                    "faster without enumeration, E-step": f"{1 + seconds / e_step:.2f}",
                }
            )
            print(rows[-1], flush=True)
    return rows


def exact_steps(decoder: nn.Module, scale: Tensor, x: Tensor) -> tuple[int, float, float, float]:
    """Number of regions, CPU seconds of enumeration, of a gradient and of an E-step after it; of three times, if short."""
    found: list[tuple[float, float, float]] = []
    while not found or (len(found) < 3 and sum(found[-1]) < 5.0):
        partition, enumeration = timed(lambda: enumerate_regions(decoder, max_regions=2_000_000))
        # Each has to factor its maps and to make its search tree anew.
        _, gradient = timed(lambda p=partition: CPAMarginal(p, scale.detach()).log_prob(x).sum().backward())
        px = CPAMarginal(enumerate_regions(decoder, max_regions=2_000_000), scale.detach())
        with torch.no_grad():
            _, e_step = timed(lambda px=px: expected_statistics(px.joint, x))
        found.append((enumeration, gradient, e_step))
    return (partition.num_regions, *map(min, zip(*found, strict=True)))


SECTIONS = {"enumeration": enumeration, "pruning": pruning, "convolutional": convolutional, "share": share}


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__)
    parser.add_argument("--only", choices=SECTIONS, help="one table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    with folders(args.smoke) as places:
        for name, section in SECTIONS.items():
            if args.only in (None, name):
                command = f"python benchmarks/regions.py --only {name}"
                rows = [provenance() | row | {"command": command} for row in section(args.smoke)]
                title = (section.__doc__ or "").splitlines()[0]
                publish(title, rows, places.results / f"regions_{name}.csv")


if __name__ == "__main__":
    main()
