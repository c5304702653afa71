# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Tiny model/guide pairs for every arrangement of plates: nested, crossed, sequential, subsampled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyro_cpa.infer.log_weights import LogWeights
from pyro_cpa.infer.particles import sample_log_weights


class Pair(NamedTuple):
    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...] = ()


def weights_of(pair: Pair, seed: int = 0, **options) -> LogWeights:
    pyro.set_rng_seed(seed)
    return sample_log_weights(pair.model, pair.guide, pair.args, **options)


# --- variants of plates, masks and scales: each must reduce to Trace_ELBO at K = 1 ---


def guide_loc() -> Tensor:
    return pyro.param("loc", torch.tensor(0.3))


def guide_width() -> Tensor:
    return pyro.param("width", torch.tensor(0.8), constraint=constraints.positive)


def noise() -> Tensor:
    return pyro.param("noise", torch.tensor(1.1), constraint=constraints.positive)


def data(*shape: int) -> Tensor:
    return torch.linspace(-1.0, 2.0, math.prod(shape), dtype=torch.float64).reshape(shape)


def plain(subsample_size: int | None = None) -> Pair:
    x = data(6)

    def model():
        with pyro.plate("data", 6, subsample_size=subsample_size) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, noise()), obs=x[i])

    def guide():
        with pyro.plate("data", 6, subsample_size=subsample_size) as i:
            pyro.sample("z", dist.Normal(guide_loc() * x[i], guide_width()))

    return Pair(model, guide)


def hierarchical() -> Pair:
    x = data(5)

    def model():
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", dist.Normal(z, 0.7))
            pyro.sample("x", dist.Normal(y.tanh(), noise()), obs=x)

    def guide():
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(guide_loc() * x, guide_width()))
            pyro.sample("y", dist.Normal(guide_loc() * z + x, guide_width()))

    return Pair(model, guide)


def nested(subsample: str = "", item_scale: Any = 1.0) -> Pair:
    x = data(4, 6)
    outer = 3 if "outer" in subsample else None
    inner = 2 if "inner" in subsample else None

    def model():
        with pyro.plate("groups", 6, subsample_size=outer, dim=-1) as i:
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            with pyro.plate("items", 4, subsample_size=inner, dim=-2) as j:
                z = pyro.sample("z", dist.Normal(g, 1.0))
                with poutine.scale(scale=item_scale):
                    pyro.sample("x", dist.Normal(z, noise()), obs=x[j][:, i])

    def guide():
        with pyro.plate("groups", 6, subsample_size=outer, dim=-1) as i:
            g = pyro.sample("g", dist.Normal(guide_loc(), guide_width()))
            with pyro.plate("items", 4, subsample_size=inner, dim=-2) as j:
                pyro.sample("z", dist.Normal(0.5 * (g + x[j][:, i]), guide_width()))

    return Pair(model, guide)


def all_in_two_plates(subsample: bool = False) -> Pair:
    """Every site in the crossing of two plates, entered in another order by the guide."""
    x = data(4, 6)
    sizes = (2, 3) if subsample else (None, None)

    def model():
        rows = pyro.plate("rows", 4, subsample_size=sizes[0], dim=-2)
        columns = pyro.plate("columns", 6, subsample_size=sizes[1], dim=-1)
        with rows as i, columns as j:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, noise()), obs=x[i][:, j])

    def guide():
        rows = pyro.plate("rows", 4, subsample_size=sizes[0], dim=-2)
        columns = pyro.plate("columns", 6, subsample_size=sizes[1], dim=-1)
        with columns as j, rows as i:
            pyro.sample("z", dist.Normal(guide_loc() * x[i][:, j], guide_width()))

    return Pair(model, guide)


def crossed(subsample: bool = False) -> Pair:
    """Latents of rows and of columns, data in their crossing."""
    x = data(4, 6)
    sizes = (2, 3) if subsample else (None, None)

    def model():
        rows = pyro.plate("rows", 4, subsample_size=sizes[0], dim=-2)
        columns = pyro.plate("columns", 6, subsample_size=sizes[1], dim=-1)
        with rows as i:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with columns as j:
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with rows, columns:
            pyro.sample("x", dist.Normal(a * b, noise()), obs=x[i][:, j])

    def guide():
        with pyro.plate("rows", 4, subsample_size=sizes[0], dim=-2):
            pyro.sample("a", dist.Normal(guide_loc(), guide_width()))
        with pyro.plate("columns", 6, subsample_size=sizes[1], dim=-1):
            pyro.sample("b", dist.Normal(-guide_loc(), guide_width()))

    return Pair(model, guide)


def sequential(ragged: bool = False, subsample_size: int | None = None) -> Pair:
    x = [data(2 + (n % 2 if ragged else 0)) for n in range(4)]

    def model():
        for n in pyro.plate("data", 4, subsample_size=subsample_size):
            z = pyro.sample(f"z_{n}", dist.Normal(0.0, 1.0))
            with pyro.plate(f"pixels_{n}", len(x[n])):
                pyro.sample(f"x_{n}", dist.Normal(z, noise()), obs=x[n])

    def guide():
        for n in pyro.plate("data", 4, subsample_size=subsample_size):
            pyro.sample(f"z_{n}", dist.Normal(guide_loc() * x[n].mean(), guide_width()))

    return Pair(model, guide)


def sequential_of_vectorized(subsample: bool = False) -> Pair:
    """A loop over groups of vectorised items, both plates shared by all sites."""
    x = data(3, 4)
    sizes = (2, 3) if subsample else (None, None)

    def model():
        items = pyro.plate("items", 4, subsample_size=sizes[1])
        for n in pyro.plate("groups", 3, subsample_size=sizes[0]):
            with items as i:
                z = pyro.sample(f"z_{n}", dist.Normal(0.0, 1.0))
                pyro.sample(f"x_{n}", dist.Normal(z, noise()), obs=x[n, i])

    def guide():
        items = pyro.plate("items", 4, subsample_size=sizes[1])
        for n in pyro.plate("groups", 3, subsample_size=sizes[0]):
            with items as i:
                pyro.sample(f"z_{n}", dist.Normal(guide_loc() * x[n, i], guide_width()))

    return Pair(model, guide)


def sequential_of_sequential() -> Pair:
    """Two loops; the inner plate object goes on counting from one group to the next."""
    x = data(2, 3)

    def model():
        items = pyro.plate("items", 3)
        for n in pyro.plate("groups", 2):
            for i in items:
                z = pyro.sample(f"z_{n}_{i}", dist.Normal(0.0, 1.0))
                pyro.sample(f"x_{n}_{i}", dist.Normal(z, noise()), obs=x[n, i])

    def guide():
        items = pyro.plate("items", 3)
        for n in pyro.plate("groups", 2):
            for i in items:
                pyro.sample(f"z_{n}_{i}", dist.Normal(guide_loc() * x[n, i], guide_width()))

    return Pair(model, guide)


def two_passes() -> Pair:
    """One plate object looped over twice: latents in the first pass, data in the second."""
    x = data(3)

    def model():
        plate = pyro.plate("data", 3)
        z = [pyro.sample(f"z_{n}", dist.Normal(0.0, 1.0)) for n in plate]
        for n in plate:
            pyro.sample(f"x_{n}", dist.Normal(z[n], noise()), obs=x[n])

    def guide():
        for n in pyro.plate("data", 3):
            pyro.sample(f"z_{n}", dist.Normal(guide_loc() * x[n], guide_width()))

    return Pair(model, guide)
