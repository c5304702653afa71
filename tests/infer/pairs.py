# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Tiny model/guide pairs: one table of plate, mask and scale variants, and pairs with exact answers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoNormal
from torch import Tensor
from torch.distributions import constraints


class Pair(NamedTuple):
    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...] = ()


# --- variants of plates, masks and scales: each must reduce to Trace_ELBO at K = 1 ---


def _loc() -> Tensor:
    return pyro.param("loc", torch.tensor(0.3))


def _width() -> Tensor:
    return pyro.param("width", torch.tensor(0.8), constraint=constraints.positive)


def _noise() -> Tensor:
    return pyro.param("noise", torch.tensor(1.1), constraint=constraints.positive)


def _data(*shape: int) -> Tensor:
    return torch.linspace(-1.0, 2.0, math.prod(shape), dtype=torch.float64).reshape(shape)


def plain(subsample_size: int | None = None) -> Pair:
    x = _data(6)

    def model():
        with pyro.plate("data", 6, subsample_size=subsample_size) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, _noise()), obs=x[i])

    def guide():
        with pyro.plate("data", 6, subsample_size=subsample_size) as i:
            pyro.sample("z", dist.Normal(_loc() * x[i], _width()))

    return Pair(model, guide)


def hierarchical() -> Pair:
    x = _data(5)

    def model():
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", dist.Normal(z, 0.7))
            pyro.sample("x", dist.Normal(y.tanh(), _noise()), obs=x)

    def guide():
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(_loc() * x, _width()))
            pyro.sample("y", dist.Normal(_loc() * z + x, _width()))

    return Pair(model, guide)


def nested(subsample: str = "") -> Pair:
    x = _data(4, 6)
    outer = 3 if "outer" in subsample else None
    inner = 2 if "inner" in subsample else None

    def model():
        with pyro.plate("groups", 6, subsample_size=outer, dim=-1) as i:
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            with pyro.plate("items", 4, subsample_size=inner, dim=-2) as j:
                z = pyro.sample("z", dist.Normal(g, 1.0))
                pyro.sample("x", dist.Normal(z, _noise()), obs=x[j][:, i])

    def guide():
        with pyro.plate("groups", 6, subsample_size=outer, dim=-1) as i:
            g = pyro.sample("g", dist.Normal(_loc(), _width()))
            with pyro.plate("items", 4, subsample_size=inner, dim=-2) as j:
                pyro.sample("z", dist.Normal(0.5 * (g + x[j][:, i]), _width()))

    return Pair(model, guide)


def all_in_two_plates(subsample: bool = False) -> Pair:
    """Every site in the crossing of two plates, entered in another order by the guide."""
    x = _data(4, 6)
    sizes = (2, 3) if subsample else (None, None)

    def model():
        rows = pyro.plate("rows", 4, subsample_size=sizes[0], dim=-2)
        columns = pyro.plate("columns", 6, subsample_size=sizes[1], dim=-1)
        with rows as i, columns as j:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, _noise()), obs=x[i][:, j])

    def guide():
        rows = pyro.plate("rows", 4, subsample_size=sizes[0], dim=-2)
        columns = pyro.plate("columns", 6, subsample_size=sizes[1], dim=-1)
        with columns as j, rows as i:
            pyro.sample("z", dist.Normal(_loc() * x[i][:, j], _width()))

    return Pair(model, guide)


def crossed(subsample: bool = False) -> Pair:
    """Latents of rows and of columns, data in their crossing."""
    x = _data(4, 6)
    sizes = (2, 3) if subsample else (None, None)

    def model():
        rows = pyro.plate("rows", 4, subsample_size=sizes[0], dim=-2)
        columns = pyro.plate("columns", 6, subsample_size=sizes[1], dim=-1)
        with rows as i:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with columns as j:
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with rows, columns:
            pyro.sample("x", dist.Normal(a * b, _noise()), obs=x[i][:, j])

    def guide():
        with pyro.plate("rows", 4, subsample_size=sizes[0], dim=-2):
            pyro.sample("a", dist.Normal(_loc(), _width()))
        with pyro.plate("columns", 6, subsample_size=sizes[1], dim=-1):
            pyro.sample("b", dist.Normal(-_loc(), _width()))

    return Pair(model, guide)


def sequential(ragged: bool = False, subsample_size: int | None = None) -> Pair:
    x = [_data(2 + (n % 2 if ragged else 0)) for n in range(4)]

    def model():
        for n in pyro.plate("data", 4, subsample_size=subsample_size):
            z = pyro.sample(f"z_{n}", dist.Normal(0.0, 1.0))
            with pyro.plate(f"pixels_{n}", len(x[n])):
                pyro.sample(f"x_{n}", dist.Normal(z, _noise()), obs=x[n])

    def guide():
        for n in pyro.plate("data", 4, subsample_size=subsample_size):
            pyro.sample(f"z_{n}", dist.Normal(_loc() * x[n].mean(), _width()))

    return Pair(model, guide)


def sequential_of_vectorized(subsample: bool = False) -> Pair:
    """A loop over groups of vectorised items, both plates shared by all sites."""
    x = _data(3, 4)
    sizes = (2, 3) if subsample else (None, None)

    def model():
        items = pyro.plate("items", 4, subsample_size=sizes[1])
        for n in pyro.plate("groups", 3, subsample_size=sizes[0]):
            with items as i:
                z = pyro.sample(f"z_{n}", dist.Normal(0.0, 1.0))
                pyro.sample(f"x_{n}", dist.Normal(z, _noise()), obs=x[n, i])

    def guide():
        items = pyro.plate("items", 4, subsample_size=sizes[1])
        for n in pyro.plate("groups", 3, subsample_size=sizes[0]):
            with items as i:
                pyro.sample(f"z_{n}", dist.Normal(_loc() * x[n, i], _width()))

    return Pair(model, guide)


def sequential_of_sequential() -> Pair:
    """Two loops; the inner plate object goes on counting from one group to the next."""
    x = _data(2, 3)

    def model():
        items = pyro.plate("items", 3)
        for n in pyro.plate("groups", 2):
            for i in items:
                z = pyro.sample(f"z_{n}_{i}", dist.Normal(0.0, 1.0))
                pyro.sample(f"x_{n}_{i}", dist.Normal(z, _noise()), obs=x[n, i])

    def guide():
        items = pyro.plate("items", 3)
        for n in pyro.plate("groups", 2):
            for i in items:
                pyro.sample(f"z_{n}_{i}", dist.Normal(_loc() * x[n, i], _width()))

    return Pair(model, guide)


def two_passes() -> Pair:
    """One plate object looped over twice: latents in the first pass, data in the second."""
    x = _data(3)

    def model():
        plate = pyro.plate("data", 3)
        z = [pyro.sample(f"z_{n}", dist.Normal(0.0, 1.0)) for n in plate]
        for n in plate:
            pyro.sample(f"x_{n}", dist.Normal(z[n], _noise()), obs=x[n])

    def guide():
        for n in pyro.plate("data", 3):
            pyro.sample(f"z_{n}", dist.Normal(_loc() * x[n], _width()))

    return Pair(model, guide)


def masked(guide_knows: bool = True) -> Pair:
    x = _data(6)
    mask = torch.tensor([True, False, True, True, False, True])

    def model():
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(z, _noise()), obs=x)

    def guide():
        with pyro.plate("data", 6):
            slope = _loc() * mask if guide_knows else _loc()
            pyro.sample("z", dist.Normal(slope * x, _width()))

    return Pair(model, guide)


def masked_latents() -> Pair:
    """Ragged sequences: latents and data of missing steps are masked in model and guide."""
    x = _data(3, 5)
    mask = torch.arange(3)[:, None] < torch.tensor([3, 2, 1, 3, 2])

    def model():
        with pyro.plate("data", 5, dim=-1):
            z = torch.zeros(5)
            for t in range(3):
                with poutine.mask(mask=mask[t]):
                    z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, 1.0))
                    pyro.sample(f"x_{t}", dist.Normal(z, _noise()), obs=x[t])

    def guide():
        with pyro.plate("data", 5, dim=-1):
            for t in range(3):
                with poutine.mask(mask=mask[t]):
                    pyro.sample(f"z_{t}", dist.Normal(_loc() * x[t], _width()))

    return Pair(model, guide)


def obs_mask() -> Pair:
    x = _data(6)
    mask = torch.tensor([True, False, True, True, False, True])

    def model():
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, _noise()), obs=x, obs_mask=mask)

    def guide():
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(_loc() * x * mask, _width()))
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
    x = _data(6)

    def model():
        with pyro.plate("data", 6, subsample_size=subsample_size) as i:
            with poutine.scale(scale=beta):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, _noise()), obs=x[i])

    def guide():
        with pyro.plate("data", 6, subsample_size=subsample_size) as i, poutine.scale(scale=beta):
            pyro.sample("z", dist.Normal(_loc() * x[i], _width()))

    return Pair(model, guide)


def global_and_local(subsample_size: int | None = None) -> Pair:
    x = _data(6)

    def model():
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6, subsample_size=subsample_size) as i:
            z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(z, _noise()), obs=x[i])

    def guide():
        g = pyro.sample("g", dist.Normal(_loc(), _width()))
        with pyro.plate("data", 6, subsample_size=subsample_size) as i:
            pyro.sample("z", dist.Normal(0.5 * (g + x[i]), _width()))

    return Pair(model, guide)


def discrete(beta: float = 1.0, mask: Tensor | bool = True) -> Pair:
    x = _data(6)

    def model():
        with pyro.plate("data", 6), poutine.mask(mask=mask):
            with poutine.scale(scale=beta):
                z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(2.0 * z, _noise()), obs=x)

    def guide():
        with pyro.plate("data", 6), poutine.mask(mask=mask), poutine.scale(scale=beta):
            pyro.sample("z", dist.Bernoulli(logits=_loc() + _width() * x))

    return Pair(model, guide)


def mixed() -> Pair:
    x = _data(6)

    def model():
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            d = pyro.sample("d", dist.Bernoulli(logits=z))
            pyro.sample("x", dist.Normal(z + d, _noise()), obs=x)

    def guide():
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(_loc() * x, _width()))
            pyro.sample("d", dist.Bernoulli(logits=_loc() + z))

    return Pair(model, guide)


def dynamic() -> Pair:
    """How many latents there are depends on what is drawn."""

    def model():
        total, t = torch.tensor(0.0), 0
        while pyro.sample(f"go_{t}", dist.Bernoulli(0.5)).item():
            total = total + pyro.sample(f"z_{t}", dist.Normal(1.0, 1.0))
            t += 1
        pyro.sample("x", dist.Normal(total, _noise()), obs=torch.tensor(1.5))

    def guide():
        t = 0
        while pyro.sample(f"go_{t}", dist.Bernoulli(0.3 + 0.4 * torch.sigmoid(_loc()))).item():
            pyro.sample(f"z_{t}", dist.Normal(_loc(), _width()))
            t += 1

    return Pair(model, guide)


def extras() -> Pair:
    """A factor, a deterministic site and a point estimate in the plate and outside it."""
    x = _data(6)

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * mean)
        pyro.factor("prior", -0.1 * mean**2)
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.factor("pull", -0.2 * z**2)
            pyro.deterministic("square", z**2, event_dim=0)
            pyro.sample("x", dist.Normal(z, _noise()), obs=x)

    def guide():
        pyro.sample("mean", dist.Delta(_loc()))
        with pyro.plate("data", 6):
            pyro.sample("z", dist.Normal(0.5 * x, _width()))

    return Pair(model, guide)


def no_latents() -> Pair:
    x = _data(6)

    def model():
        with pyro.plate("data", 6):
            pyro.sample("x", dist.Normal(_loc(), _noise()), obs=x)

    return Pair(model, lambda: None)


def auto(kind: Callable[..., Any], model: Callable[..., Any] | None = None) -> Pair:
    model = hierarchical().model if model is None else model
    guide = kind(model)
    guide()  # its parameters exist before anything is compared
    return Pair(model, guide)


def _positive_latent() -> None:
    x = _data(5).exp()
    with pyro.plate("data", 5):
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        pyro.sample("x", dist.Exponential(rate * _noise()), obs=x)


VARIANTS: dict[str, Callable[[], Pair]] = {
    "plain": plain,
    "subsampled": lambda: plain(2),
    "hierarchical": hierarchical,
    "nested": nested,
    "nested, outer subsampled": lambda: nested("outer"),
    "nested, both subsampled": lambda: nested("outer inner"),
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
    "AutoNormal positive": lambda: auto(AutoNormal, _positive_latent),
    "AutoDiagonalNormal": lambda: auto(AutoDiagonalNormal),
    "AutoLowRankMultivariateNormal": lambda: auto(AutoLowRankMultivariateNormal),
    "AutoDelta": lambda: auto(AutoDelta),
}
# Where draws without a path decide on the structure, Trace_ELBO sends less of the bound to their scores.
SAME_GRADIENT = [name for name in VARIANTS if name != "dynamic"]


# --- pairs with exact answers ---


class LinearGaussianPlate:
    r"""z_n ~ N(0, 1), x_n | z_n ~ N(z_n 1, s^2 I): evidence and posterior in closed form.

    Args:
        data: (N, D).
        noise: s.
    """

    def __init__(self, data: Tensor, noise: float = 0.6) -> None:
        self.data, self.noise = data, noise
        self.precision = 1.0 + data.shape[-1] / noise**2

    def log_evidence(self) -> Tensor:
        """(N,) exact log p(x_n)."""
        D = self.data.shape[-1]
        covariance = self.noise**2 * torch.eye(D) + torch.ones(D, D)
        return dist.MultivariateNormal(torch.zeros(D), covariance).log_prob(self.data)

    def model(self, index: Tensor | None = None) -> None:
        with pyro.plate("data", len(self.data), subsample=index, dim=-1) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            x = self.data[i]
            pyro.sample(
                "x", dist.Normal(z[..., None].expand(*z.shape, x.shape[-1]), self.noise).to_event(1), obs=x
            )

    def guide(self, index: Tensor | None = None, *, off: float = 0.0, widen: float = 1.0) -> None:
        """The posterior, its mean moved by ``off`` and its width multiplied by ``widen``."""
        off_param = pyro.param("off", torch.tensor(off))
        widen_param = pyro.param("widen", torch.tensor(widen))
        with pyro.plate("data", len(self.data), subsample=index, dim=-1) as i:
            mean = self.data[i].sum(-1) / self.noise**2 / self.precision
            pyro.sample("z", dist.Normal(mean + off_param, widen_param / math.sqrt(self.precision)))


class TwoLatents:
    """A normal latent and then a normal or Bernoulli one, observed twice; the same datum ``copies`` times.

    Expected bounds of two particles come from Gauss-Hermite quadrature over the standard normals behind the
    draws and enumeration of the Bernoulli ones, and so do their gradients.

    Args:
        second: "normal" or "bernoulli".
        masked: whether the second observation is masked.
        copies: elements of the plate.
    """

    def __init__(self, second: str = "normal", masked: bool = False, copies: int = 1) -> None:
        self.second, self.masked, self.copies = second, masked, copies
        values = {"slope": 0.8, "bias": 0.4, "loc": 0.2, "log_width": -0.3, "link": 0.5, "shift": -0.4}
        self.parameters = {name: torch.tensor(v, requires_grad=True) for name, v in values.items()}
        self.x = torch.tensor([0.9, -1.4])

    def second_prior(self, z: Tensor) -> Any:
        slope = self.parameters["slope"]
        return dist.Normal(slope * z, 1.0) if self.second == "normal" else dist.Bernoulli(logits=slope * z)

    def second_guide(self, z: Tensor) -> Any:
        loc = self.parameters["link"] * z + self.parameters["shift"]
        return dist.Normal(loc, 0.9) if self.second == "normal" else dist.Bernoulli(logits=loc)

    def first_guide(self) -> Any:
        return dist.Normal(self.parameters["loc"], self.parameters["log_width"].exp())

    def model(self) -> None:
        with pyro.plate("data", self.copies):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", self.second_prior(z))
            mean = z + self.parameters["bias"] * y
            pyro.sample("x0", dist.Normal(mean, 1.0), obs=self.x[0].expand(self.copies))
            with poutine.mask(mask=not self.masked):
                pyro.sample("x1", dist.Normal(mean, 0.7), obs=self.x[1].expand(self.copies))

    def guide(self) -> None:
        with pyro.plate("data", self.copies):
            z = pyro.sample("z", self.first_guide())
            pyro.sample("y", self.second_guide(z))

    def log_joint(self, z: Tensor, y: Tensor) -> Tensor:
        mean = z + self.parameters["bias"] * y
        total = dist.Normal(0.0, 1.0).log_prob(z) + self.second_prior(z).log_prob(y)
        total = total + dist.Normal(mean, 1.0).log_prob(self.x[0])
        return total if self.masked else total + dist.Normal(mean, 0.7).log_prob(self.x[1])

    def states(self, nodes: int, detached: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """log p, log q and log probability of one particle at all S nodes, (S,) each.

        ``detached`` cuts the latents and their probabilities from the graph.
        """
        eps, mass = np.polynomial.hermite_e.hermegauss(nodes)
        eps, log_mass = torch.tensor(eps), torch.tensor(mass / mass.sum()).log()
        z = self.parameters["loc"] + self.parameters["log_width"].exp() * eps
        if self.second == "normal":
            z, y_eps = torch.meshgrid(z, eps, indexing="ij")
            fn = self.second_guide(z)
            y, log_prob = fn.loc + fn.scale * y_eps, log_mass[:, None] + log_mass
        else:
            z, y = torch.meshgrid(z, torch.tensor([0.0, 1.0]), indexing="ij")
            log_prob = log_mass[:, None] + self.second_guide(z).log_prob(y)
        if detached:
            z, y, log_prob = z.detach(), y.detach(), log_prob.detach()
        log_q = self.first_guide().log_prob(z) + self.second_guide(z).log_prob(y)
        return self.log_joint(z, y).flatten(), log_q.flatten(), log_prob.flatten()

    def expected(
        self, bound: Callable[[Tensor, Tensor], Tensor], K: int, nodes: int = 16, detached: bool = False
    ) -> Tensor:
        """E[bound(log p, log q)] for K = 1 or 2 particles, differentiable in the parameters."""
        log_p, log_q, log_prob = self.states(nodes, detached)
        index = torch.tensor(list(itertools.product(range(len(log_p)), repeat=K))).T
        return (log_prob[index].sum(0).exp() * bound(log_p[index], log_q[index])).sum()

    def gradient(self, value: Tensor) -> Tensor:
        """(6,) derivatives by the parameters, zero for those that do not count."""
        grads = torch.autograd.grad(value, list(self.parameters.values()), allow_unused=True)
        return torch.stack([torch.zeros(()) if g is None else g for g in grads])
