# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The two-replica chain against the enumerated p*: many parallel chains are independent draws."""

from __future__ import annotations

import math

import pytest
import torch
from enumerated_stack import (
    GOODNESS_FLOOR,
    EnumeratedStack,
    chi_square_p_value,
    close,
    state_index,
    tiny_machine,
)

from pyro_cpa.errors import InvalidData

NETS = {"4-3-2": dict(), "5-2-3-2 tanh": dict(sizes=(5, 2, 3, 2), deterministic=1)}
UPDATES = {"units": None, "blocks": 4}


@pytest.fixture(params=NETS.values(), ids=NETS.keys())
def exact(request):
    with torch.no_grad():
        return EnumeratedStack(tiny_machine(**request.param))


def two_replica_table(exact):
    """log pi(x, z, z') as (X, Z, Z), not normalised."""
    return exact.log_root[:, :, None] + exact.log_root[:, None, :]


def test_second_replica_leaves_p_star_as_marginal(exact):
    table = two_replica_table(exact)
    close(table.reshape(-1).logsumexp(0), exact.two_log_z)
    close(table.logsumexp(2) - exact.two_log_z, exact.log_star_joint)


@pytest.mark.parametrize("num_proposals", UPDATES.values(), ids=UPDATES.keys())
def test_one_sweep_leaves_the_target_invariant(exact, num_proposals):
    """Start exactly in the target: after each sweep the (x, z) of all chains must still follow p*."""
    n = 50_000
    x, z, other = draw(two_replica_table(exact), n)
    chain = exact.stack.chain(exact.x[x], num_proposals=num_proposals)
    chain._states = [exact.x[x][None], *(torch.stack([z_l[z], z_l[other]]) for z_l in exact.z)]
    chain.sweep(1)
    assert chi_square_p_value(exact.joint_index(chain.layers), exact.log_star_joint) > GOODNESS_FLOOR
    moved = (chain.layers[0] != exact.x[x]).any(-1).to(torch.get_default_dtype()).mean()
    assert moved > 0.1


@pytest.mark.parametrize("num_proposals", UPDATES.values(), ids=UPDATES.keys())
def test_chains_converge_to_p_star_from_one_state(exact, num_proposals):
    start = torch.zeros(5_000, exact.x.shape[1])
    chain = exact.stack.chain(start, num_proposals=num_proposals).sweep(25)
    assert chi_square_p_value(exact.joint_index(chain.layers), exact.log_star_joint) > GOODNESS_FLOOR


def test_the_test_sees_a_dropped_factor(exact):
    """Without sqrt(q(x)) in the conditional of x the samples are measurably wrong."""
    wrong = torch.log_softmax((exact.log_star_joint - 0.5 * exact.log_p_star[:, None]).reshape(-1), 0)
    index = torch.multinomial(wrong.exp(), 20_000, replacement=True)
    assert chi_square_p_value(index, exact.log_star_joint) < GOODNESS_FLOOR


@pytest.mark.parametrize("num_proposals", UPDATES.values(), ids=UPDATES.keys())
def test_inpainting_draws_from_the_conditional(exact, num_proposals):
    machine, dim = exact.stack, exact.x.shape[1]
    observed = torch.tensor([True, False] * dim)[:dim]
    given = exact.x[-3]
    corrupted = torch.where(observed, given, torch.full_like(given, math.nan))[None]
    x = machine.inpaint(corrupted, observed, num_chains=4_000, num_sweeps=25, num_proposals=num_proposals)
    assert x.shape == (4_000, 1, dim)
    assert (x[..., observed] == given[observed]).all()
    compatible = (exact.x[:, observed] == given[observed]).all(1)
    conditional = torch.log_softmax(exact.log_p_star.masked_fill(~compatible, -math.inf), 0)
    assert chi_square_p_value(state_index(x[:, 0]), conditional) > GOODNESS_FLOOR


def test_masks_may_differ_between_rows(exact):
    dim = exact.x.shape[1]
    x, observed = exact.x[:3], torch.rand(3, dim) < 0.5
    filled = exact.stack.inpaint(x, observed, num_chains=7, num_sweeps=3)
    assert filled.shape == (7, 3, dim)
    assert torch.where(observed, filled == x, torch.ones((), dtype=torch.bool)).all()


def test_chain_continues_where_it_stopped(exact):
    chain = exact.stack.chain(exact.x[:2])
    assert (chain.layers[0] == exact.x[:2]).all()
    assert chain.sweep(2) is chain and [layer.shape for layer in chain.layers] == [
        (2, size) for size in exact.stack.sizes
    ]


def test_errors():
    machine = tiny_machine()
    x = torch.tensor([[0.0, 1.0, math.nan, 1.0]])
    with pytest.raises(InvalidData, match=r"the observed part of x\[0, 2\] is nan"):
        machine.chain(x, torch.ones(4, dtype=torch.bool))
    with pytest.raises(InvalidData, match="observed is torch.float64 of shape"):
        machine.inpaint(x, torch.ones(4))
    with pytest.raises(InvalidData, match=r"observed is torch.bool of shape \(3,\)"):
        machine.chain(x, torch.ones(3, dtype=torch.bool))
    with pytest.raises(InvalidData, match=r"observed is torch.bool of shape \(2, 4\)"):
        machine.inpaint(x, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(InvalidData, match=r"the observed part of x is \(4,\); expected a tensor of shape"):
        machine.inpaint(torch.zeros(4), torch.ones(4, dtype=torch.bool))
    with pytest.raises(InvalidData, match="num_proposals is 1"):
        machine.chain(torch.zeros(1, 4), num_proposals=1)
    with pytest.raises(InvalidData, match="num_sweeps is 0"):
        machine.chain(torch.zeros(1, 4)).sweep(0)


def draw(log_table, n):
    """Indices, one tensor for each dimension, of ``n`` draws from a normalised copy of ``log_table``."""
    flat = torch.multinomial(torch.softmax(log_table.reshape(-1), 0), n, replacement=True)
    return torch.unravel_index(flat, log_table.shape)
