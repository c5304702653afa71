# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Maps that cells share with their siblings, compiled, against maps that every cell computes for itself, in tensors."""

from __future__ import annotations

import pytest
import torch
from decoders import DECODERS, build, mlp
from degenerate import MODES, decoders
from hypothesis import given, settings
from torch import nn

from pyro_cpa import compiled
from pyro_cpa.partition import enumerate_regions, families, layerwise
from pyro_cpa.partition.families import Chain
from pyro_cpa.partition.graph import homogeneous_basis
from pyro_cpa.partition.lineage import Lineage
from pyro_cpa.partition.network import Network

pytest.importorskip("numba")


def both(decoder):
    """The regions, compiled and in tensors."""
    with pytest.MonkeyPatch.context() as patch:
        fast = enumerate_regions(decoder)
        patch.setattr(compiled, "_INSTALLED", False)
        return fast, enumerate_regions(decoder)


def assert_same(fast, slow):
    assert fast.num_regions == slow.num_regions
    # Cells with a wall that is noise may be numbered differently; those with the same interior point are the same.
    region = slow.locate(fast.cells.interior_points())
    assert torch.equal(region.sort().values, torch.arange(len(region)))


@pytest.mark.parametrize("name", DECODERS)
def test_every_case(name, monkeypatch):
    monkeypatch.setattr(families, "_SLOWER", 0)  # share wherever that can be done
    fast, slow = both(build(name)[0])
    assert_same(fast, slow)
    for a, b in zip(fast.patterns, slow.patterns, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=40, deadline=None)
@given(decoder=decoders(latent_dim=2, modes=tuple(mode for mode in MODES if mode != "rank one")))
def test_any_decoder_of_the_plane(decoder):
    assert_same(*both(decoder))


@pytest.mark.parametrize("unit", [nn.ReLU(), nn.LeakyReLU(0.2), nn.Hardtanh()])
@pytest.mark.parametrize("slower", [0, families._SLOWER])
def test_families_expand_to_the_maps_of_the_network(unit, slower, monkeypatch):
    monkeypatch.setattr(families, "_SLOWER", slower)
    decoder = nn.Sequential(nn.Linear(2, 9), unit, nn.Linear(9, 7), unit, nn.Linear(7, 5), unit).double()
    network = Network(decoder)
    layers, basis = network.snapshot(), homogeneous_basis(2, torch.empty(0, dtype=torch.float64))
    lineages = []
    monkeypatch.setattr(layerwise, "Lineage", lambda: lineages.append(Lineage()) or lineages[-1])
    enumerate_regions(decoder)
    chain = Chain(network.graph, layers, basis[0])
    assert len(chain) == 3
    for depth in (1, 2):
        lineage = Lineage()
        for generation in lineages[0].generations[:depth]:
            lineage.append(generation)
        rows = slice(3, len(generation.parents) - 2)
        found = chain.family(lineage.generations, rows).expand()
        wanted = network.graph.push_magnitude(layers, lineage.patterns(rows), *basis, 2 * depth + 1)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_threads_do_not_matter(monkeypatch):
    torch.manual_seed(0)
    decoder = mlp(2, 20, 20, 3)
    threads = torch.get_num_threads()
    monkeypatch.setattr(compiled, "_WORTH_A_THREAD", 1)
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(enumerate_regions(decoder))
    finally:
        torch.set_num_threads(threads)
    one, three = found
    assert torch.equal(one.cells.offsets, three.cells.offsets)
    for a, b in zip(one.patterns, three.patterns, strict=True):
        assert torch.equal(a, b)
