# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Tiny model/guide pairs: one table of plate, mask, scale, latent and autoguide variants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from plate_pairs import (
    Pair,
    all_in_two_plates,
    crossed,
    data,
    guide_loc,
    guide_width,
    hierarchical,
    nested,
    noise,
    plain,
    sequential,
    sequential_of_sequential,
    sequential_of_vectorized,
    two_passes,
)
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoNormal
from torch import Tensor


def masked(guide_knows: bool = True) -> Pair:
    x = data(6)
    mask = torch.tensor([True, False, True, True, False, True])

    def model():
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(z, noise()), obs=x)

    def guide():
        with pyro.plate("data", 6):
            slope = guide_loc() * mask if guide_knows else guide_loc()
            pyro.sample("z", dist.Normal(slope * x, guide_width()))

    return Pair(model, guide)


def masked_latents() -> Pair:
    """Ragged sequences: latents and data of missing steps are masked in model and guide."""
    x = data(3, 5)
    mask = torch.arange(3)[:, None] < torch.tensor([3, 2, 1, 3, 2])

    def model():
        with pyro.plate("data", 5, dim=-1):
            z = torch.zeros(5)
            for t in range(3):
                with poutine.mask(mask=mask[t]):
                    z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, 1.0))
                    pyro.sample(f"x_{t}", dist.Normal(z, noise()), obs=x[t])

    def guide():
        with pyro.plate("data", 5, dim=-1):
            for t in range(3):
                with poutine.mask(mask=mask[t]):
                    pyro.sample(f"z_{t}", dist.Normal(guide_loc() * x[t], guide_width()))

    return Pair(model, guide)


def obs_mask() -> Pair:
    x = data(6)
    mask = torch.tensor([True, False, True, True, False, True])

    def model():
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, noise()), obs=x, obs_mask=mask)

    def guide():
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(guide_loc() * x * mask, guide_width()))
            with poutine.mask(mask=~mask):
                pyro.sample("x_unobserved", dist.Normal(z, 1.0))

    return Pair(model, guide)


def scaled(scale: Any, base: Pair | None = None) -> Pair:
    base = plain() if base is None else base
    return Pair(poutine.scale(base.model, scale), poutine.scale(base.guide, scale))


def model_scaled() -> Pair:
    base = plain()
    return Pair(poutine.scale(base.model, 0.4), base.guide)


def annealed(subsample_size: int | None = None, beta: Any = 0.3) -> Pair:
    x = data(6)

    def model():
        with pyro.plate("data", 6, subsample_size=subsample_size) as i:
            with poutine.scale(scale=beta):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, noise()), obs=x[i])

    def guide():
        with pyro.plate("data", 6, subsample_size=subsample_size) as i, poutine.scale(scale=beta):
            pyro.sample("z", dist.Normal(guide_loc() * x[i], guide_width()))

    return Pair(model, guide)


def global_and_local(subsample_size: int | None = None) -> Pair:
    x = data(6)

    def model():
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6, subsample_size=subsample_size) as i:
            z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(z, noise()), obs=x[i])

    def guide():
        g = pyro.sample("g", dist.Normal(guide_loc(), guide_width()))
        with pyro.plate("data", 6, subsample_size=subsample_size) as i:
            pyro.sample("z", dist.Normal(0.5 * (g + x[i]), guide_width()))

    return Pair(model, guide)


def discrete(beta: float = 1.0, mask: Tensor | bool = True) -> Pair:
    x = data(6)

    def model():
        with pyro.plate("data", 6), poutine.mask(mask=mask):
            with poutine.scale(scale=beta):
                z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(2.0 * z, noise()), obs=x)

    def guide():
        with pyro.plate("data", 6), poutine.mask(mask=mask), poutine.scale(scale=beta):
            pyro.sample("z", dist.Bernoulli(logits=guide_loc() + guide_width() * x))

    return Pair(model, guide)


def mixed() -> Pair:
    x = data(6)

    def model():
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            d = pyro.sample("d", dist.Bernoulli(logits=z))
            pyro.sample("x", dist.Normal(z + d, noise()), obs=x)

    def guide():
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(guide_loc() * x, guide_width()))
            pyro.sample("d", dist.Bernoulli(logits=guide_loc() + z))

    return Pair(model, guide)


def dynamic() -> Pair:
    """How many latents there are depends on what is drawn."""

    def model():
        total, t = torch.tensor(0.0), 0
        while pyro.sample(f"go_{t}", dist.Bernoulli(0.5)).item():
            total = total + pyro.sample(f"z_{t}", dist.Normal(1.0, 1.0))
            t += 1
        pyro.sample("x", dist.Normal(total, noise()), obs=torch.tensor(1.5))

    def guide():
        t = 0
        while pyro.sample(f"go_{t}", dist.Bernoulli(0.3 + 0.4 * torch.sigmoid(guide_loc()))).item():
            pyro.sample(f"z_{t}", dist.Normal(guide_loc(), guide_width()))
            t += 1

    return Pair(model, guide)


def extras() -> Pair:
    """A factor, a deterministic site and a point estimate in the plate and outside it."""
    x = data(6)

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * mean)
        pyro.factor("prior", -0.1 * mean**2)
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.factor("pull", -0.2 * z**2)
            pyro.deterministic("square", z**2, event_dim=0)
            pyro.sample("x", dist.Normal(z, noise()), obs=x)

    def guide():
        pyro.sample("mean", dist.Delta(guide_loc()))
        with pyro.plate("data", 6):
            pyro.sample("z", dist.Normal(0.5 * x, guide_width()))

    return Pair(model, guide)


def no_latents() -> Pair:
    x = data(6)

    def model():
        with pyro.plate("data", 6):
            pyro.sample("x", dist.Normal(guide_loc(), noise()), obs=x)

    return Pair(model, lambda: None)


def auto(kind: Callable[..., Any], model: Callable[..., Any] | None = None) -> Pair:
    model = hierarchical().model if model is None else model
    guide = kind(model)
    guide()  # its parameters exist before anything is compared
    return Pair(model, guide)


def positive_latent() -> None:
    x = data(5).exp()
    with pyro.plate("data", 5):
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        pyro.sample("x", dist.Exponential(rate * noise()), obs=x)


VARIANTS: dict[str, Callable[[], Pair]] = {
    "plain": plain,
    "subsampled": lambda: plain(2),
    "hierarchical": hierarchical,
    "nested": nested,
    "nested, outer subsampled": lambda: nested("outer"),
    "nested, both subsampled": lambda: nested("outer inner"),
    "nested, items scaled": lambda: nested(item_scale=torch.tensor([[0.5], [1.0], [2.0], [3.0]])),
    "two plates": all_in_two_plates,
    "two plates subsampled": lambda: all_in_two_plates(True),
    "crossed": crossed,
    "crossed subsampled": lambda: crossed(True),
    "sequential": sequential,
    "sequential ragged": lambda: sequential(True),
    "sequential subsampled": lambda: sequential(subsample_size=2),
    "sequential of vectorised": sequential_of_vectorized,
    "sequential of vectorised subsampled": lambda: sequential_of_vectorized(True),
    "sequential of sequential": sequential_of_sequential,
    "two passes": two_passes,
    "masked": masked,
    "masked, guide blind": lambda: masked(False),
    "masked latents": masked_latents,
    "obs_mask": obs_mask,
    "scale": lambda: scaled(10.0),
    "scale 1/N": lambda: scaled(1 / 6),
    "scale and subsampled": lambda: scaled(0.5, plain(2)),
    "tensor scale": lambda: scaled(torch.linspace(0.5, 3.0, 6, dtype=torch.float64)),
    "scale of the model alone": model_scaled,
    "annealed": annealed,
    "annealed subsampled": lambda: annealed(2),
    "annealed per datum": lambda: annealed(beta=torch.linspace(0.1, 1.0, 6, dtype=torch.float64)),
    "global and local": global_and_local,
    "global and local subsampled": lambda: global_and_local(2),
    "discrete": discrete,
    "discrete annealed": lambda: discrete(0.3),
    "discrete scaled and masked": lambda: scaled(0.5, discrete(1.0, torch.tensor([1, 0, 1, 1, 0, 1]).bool())),
    "mixed": mixed,
    "dynamic": dynamic,
    "factor, deterministic, point": extras,
    "no latents": no_latents,
    "AutoNormal": lambda: auto(AutoNormal),
    "AutoNormal positive": lambda: auto(AutoNormal, positive_latent),
    "AutoDiagonalNormal": lambda: auto(AutoDiagonalNormal),
    "AutoLowRankMultivariateNormal": lambda: auto(AutoLowRankMultivariateNormal),
    "AutoDelta": lambda: auto(AutoDelta),
}
# Where draws without a path decide on the structure, Trace_ELBO sends less of the bound to their scores.
SAME_GRADIENT = [name for name in VARIANTS if name != "dynamic"]
