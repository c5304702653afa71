# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""A two-layer sigmoid belief net small enough to enumerate: the oracle for discrete hierarchical pairs."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

X, H1, H2 = 4, 3, 2


# Arguments of the net besides x: nothing, a mask of observed entries, ten times more data than the minibatch.
VARIANTS: dict[str, dict] = {
    "plain": {},
    "masked": {"mask": torch.tensor([True, True, False, True])},
    "subsampled": {"size": 30},
}


def bits(n: int) -> Tensor:
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)))


def three_x() -> Tensor:
    return bits(4)[[1, 6, 15]]


def log_bernoulli(logits: Tensor, value: Tensor) -> Tensor:
    return (value * logits - nn.functional.softplus(logits)).sum(-1)


class BinaryNet(nn.Module):
    """p: h2 -> h1 -> x, q: x -> h1 -> h2, all layers Bernoulli; weights drawn from the current seed.

    With ``posterior=True`` the upper layers hang on nothing below, so that the guide is the exact posterior.
    """

    def __init__(self, posterior: bool = False) -> None:
        super().__init__()
        size = {"prior": (H2,), "up1": (H1, H2), "b1": (H1,), "up0": (X, H1), "b0": (X,)}
        self.p = nn.ParameterDict({k: nn.Parameter(torch.randn(s)) for k, s in size.items()})
        size = {"v1": (H1, X), "c1": (H1,), "v2": (H2, H1), "c2": (H2,)}
        self.q = nn.ParameterDict({k: nn.Parameter(torch.randn(s)) for k, s in size.items()})
        if posterior:
            with torch.no_grad():
                for weight in (self.p["up1"], self.p["up0"], self.q["v1"], self.q["v2"]):
                    weight.zero_()
                self.q["c1"].copy_(self.p["b1"])
                self.q["c2"].copy_(self.p["prior"])

    # As a Pyro pair.

    def model(self, x: Tensor, size: int | None = None, mask: Tensor | None = None) -> None:
        pyro.module("net.p", self.p)
        p = self.p
        with pyro.plate("data", size or len(x), subsample_size=None if size is None else len(x)):
            h2 = pyro.sample("h2", dist.Bernoulli(logits=p["prior"]).to_event(1))
            h1 = pyro.sample("h1", dist.Bernoulli(logits=h2 @ p["up1"].T + p["b1"]).to_event(1))
            observed = dist.Bernoulli(logits=h1 @ p["up0"].T + p["b0"])
            if mask is not None:
                observed = observed.mask(mask)
            pyro.sample("x", observed.to_event(1), obs=x)

    def guide(self, x: Tensor, size: int | None = None, mask: Tensor | None = None) -> None:
        pyro.module("net.q", self.q)
        q = self.q
        seen = x if mask is None else x * mask
        with pyro.plate("data", size or len(x), subsample_size=None if size is None else len(x)):
            h1 = pyro.sample("h1", dist.Bernoulli(logits=seen @ q["v1"].T + q["c1"]).to_event(1))
            pyro.sample("h2", dist.Bernoulli(logits=h1 @ q["v2"].T + q["c2"]).to_event(1))

    # Enumerated: (32, N) over all hidden states.

    def log_joint(self, x: Tensor, mask: Tensor | float = 1.0) -> Tensor:
        h, p = bits(H1 + H2)[:, None], self.p
        h1, h2 = h[..., :H1], h[..., H1:]
        logits = h1 @ p["up0"].T + p["b0"]
        likelihood = ((x * logits - nn.functional.softplus(logits)) * mask).sum(-1)
        return log_bernoulli(p["prior"], h2) + log_bernoulli(h2 @ p["up1"].T + p["b1"], h1) + likelihood

    def log_guide(self, x: Tensor, mask: Tensor | float = 1.0) -> Tensor:
        h, q = bits(H1 + H2)[:, None], self.q
        h1, h2 = h[..., :H1], h[..., H1:]
        return log_bernoulli((x * mask) @ q["v1"].T + q["c1"], h1) + log_bernoulli(
            h1 @ q["v2"].T + q["c2"], h2
        )
