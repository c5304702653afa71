# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Networks of any wiring: random ones, degenerate ones, and what is derived from the wiring."""

from __future__ import annotations

import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pyro_cpa.partition import Network, enumerate_regions

WIDTH = 3
# Each takes two of the values so far and the parameters of its step.
STEPS = {
    "linear": lambda a, b, m: m(a),
    "relu": lambda a, b, m: F.relu(a),
    "abs of sum": lambda a, b, m: (a + b).abs(),
    "leaky difference": lambda a, b, m: F.leaky_relu(a - 0.5 * b, 0.2),
    "maximum": lambda a, b, m: torch.maximum(a, b),
    "minimum": lambda a, b, m: torch.minimum(m(a), b),
    "swap": lambda a, b, m: torch.cat([b[:, 1:], a[:, :1]], 1),
    "shift": lambda a, b, m: a * m.weight[0] - m.bias,
    "bound": lambda a, b, m: torch.maximum(a, m.bias).clamp(max=1.5),
    "pool": lambda a, b, m: F.max_pool1d(torch.stack([a, b], 1).flatten(1), 2),
    "difference to itself": lambda a, b, m: F.relu((a + b) - b - a),
}


class Wired(nn.Module):
    """A network from a list of (step, first value, second value), whose output is the last value, or all of them."""

    def __init__(self, latent_dim, steps, seed, all_values):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.steps, self.all_values = nn.Linear(latent_dim, WIDTH), steps, all_values
        self.linears = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in steps])
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, z):
        values = [self.first(z)]
        for (kind, first, second), module in zip(self.steps, self.linears, strict=True):
            values.append(STEPS[kind](values[first % len(values)], values[second % len(values)], module))
        return torch.cat(values, 1) if self.all_values else values[-1]


@st.composite
def wirings(draw):
    place = st.integers(0, 7)
    steps = draw(st.lists(st.tuples(st.sampled_from(sorted(STEPS)), place, place), min_size=1, max_size=6))
    recipe = (draw(st.integers(1, 2)), steps, draw(st.integers(0, 2**31)), draw(st.booleans()))
    note(f"Wired{recipe}")
    return Wired(*recipe)


@settings(max_examples=60, deadline=None)
@given(decoder=wirings())
def test_any_wiring(decoder):
    part = enumerate_regions(decoder)
    R, L = part.num_regions, part.latent_dim
    inside = part.cells.interior_points()
    assert torch.equal(part.locate(inside), torch.arange(R))
    if part.patterns:
        assert len(torch.unique(torch.cat(part.patterns, 1), dim=0)) == R
    z = torch.cat([inside, *(scale * torch.randn(100, L) for scale in (1e-3, 1.0, 30.0, 1e3))])
    region = part.locate(z)
    with torch.no_grad():
        x = decoder(z)
    slopes, offsets = part.affine_maps()
    for A, b in ((part.slopes, part.offsets), (slopes.detach(), offsets.detach())):
        piece = (A[region] @ z[..., None])[..., 0] + b[region]
        # Some wirings subtract what they have added.
        size = 1 + x.abs().amax(1, keepdim=True) + 1e3 * z.abs().amax(1, keepdim=True)
        assert float(((piece - x).abs() / size).max()) < 1e-12
    # PyTorch's own derivative is that of the piece, wherever no unit sits on its knot.
    deep = inside[:50].clone().requires_grad_()
    for d in range(part.data_dim):
        (row,) = torch.autograd.grad(decoder(deep)[:, d].sum(), deep, allow_unused=True)
        wanted = torch.zeros_like(deep) if row is None else row
        close = (part.slopes[: len(deep), d] - wanted).abs() < 1e-9 * (1 + wanted.abs())
        assert float(close.all(1).double().mean()) > 0.5 or "itself" in str(decoder.steps)


def test_branches_that_cancel_make_no_regions():
    class Cancelling(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 4)

        def forward(self, z):
            h = self.a(z)
            nothing = (h * 0.1 + 7.0) - h / 10 - 7
            again = self.b(h) + F.linear(-h, self.b.weight, -self.b.bias)
            scaled = F.relu(0.1 * z + 0.2 * z - 0.3 * z)
            return torch.cat([F.relu(nothing) + torch.maximum(again, -again), scaled], 1)

    assert enumerate_regions(Cancelling()).num_regions == 1


def test_the_wiring_of_a_residual_block():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 5)

        def forward(self, z):
            h = self.a(z)
            return self.c(h + self.b(torch.relu(h)))

    network = Network(Block())
    assert network.places == (
        "decoder.a: Linear",
        "decoder.forward: relu",
        "decoder.b: Linear",
        "decoder.forward: add",
        "decoder.c: Linear",
    )
    graph = network.graph
    assert graph.inputs == ((0,), (1,), (2,), (1, 3), (4,))
    assert graph.switches == (False, True, False, False, False)
    assert graph.widths == (2, 3, 3, 3, 3, 5)
    assert graph.frontier == (1, 2)
    assert graph.path(4) == ((0, (0,)), (1, ()), (2, (2,)), (3, (1, 3)))
    assert graph.has_units(4) and not graph.has_units(1)
    # In float64 the affine map behind the frontier is that of the modules.
    with torch.no_grad():
        weight, bias = graph.tail(network.layers())
        block = network.decoder
        c, b = block.c, block.b
        assert torch.allclose(weight, torch.cat([c.weight, c.weight @ b.weight], 1))
        assert torch.allclose(bias, c.bias + c.weight @ b.bias)


def test_steps_that_the_output_does_not_need_are_left_out():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 6)

        def forward(self, z):
            first, _, last = self.a(z).chunk(3, 1)
            return torch.relu(first) - last

    network = Network(Part())
    assert [step.call.name for step in network.steps] == ["Linear", "chunk", "chunk", "relu", "sub"]
    assert enumerate_regions(network).num_regions == 4
