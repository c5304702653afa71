# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Regions left out: the certificate holds, and what is kept gives the same answers as all regions do."""

from functools import cache

import pytest
import torch
from decoders import mlp
from torch import nn

from pyro_cpa.distributions import CPAMarginal, parts, posterior, pruning
from pyro_cpa.distributions.fisher import expected_statistics
from pyro_cpa.errors import InvalidData
from pyro_cpa.partition import enumerate_regions


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch):
    monkeypatch.setattr(parts, "MANY_REGIONS", 30)
    monkeypatch.setattr(parts, "_BLOCK", 1)


def spread_decoder(*widths):
    """A decoder whose image is far larger than the noise, so that most regions do not matter to a datum."""
    decoder = mlp(*widths)
    with torch.no_grad():
        for layer in decoder:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(4.0)
    return decoder


CASES = {
    "L=1": ((1, 40, 40, 7), {"scale": 0.1}),
    "L=2": ((2, 16, 16, 30), {"scale": 0.1}),
    "L=2, few outputs": ((2, 20, 20, 3), {"scale": 0.1}),
    "L=2, full covariance": ((2, 12, 12, 6), {"covariance_matrix": 0.02 * torch.eye(6) + 0.01}),
    "L=2, another prior": (
        (2, 14, 14, 9),
        {
            "scale": 0.1,
            "loc": torch.tensor([0.5, -1.0]),
            "prior_covariance": torch.tensor([[2.0, 0.6], [0.6, 0.5]]),
        },
    ),
    "L=3": ((3, 8, 12), {"scale": 0.1}),
}


@cache
def whole(name, rows):
    """All regions, data, and their exact log p(x)."""
    torch.manual_seed(0)
    widths, noise = CASES[name]
    every = CPAMarginal(enumerate_regions(spread_decoder(*widths)), **noise, tolerance=0.0)
    x = every.sample((rows,)).detach()
    x[-3:] *= 10.0  # off the manifold
    with torch.no_grad():
        return every, x, every.log_prob(x)


def pair(name, tolerance=1e-12, rows=20):
    every, x, _ = whole(name, rows)
    return every, CPAMarginal(every.partition, **CASES[name][1], tolerance=tolerance), x.clone()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tolerance", [1e-12, 1e-3, 0.5])
def test_the_certificate_holds(name, tolerance):
    every, some, x = pair(name, tolerance)
    full = whole(name, len(x))[2]
    with torch.no_grad():
        pruned, share = some.log_prob(x), some.omitted_share(x)
    assert (share <= tolerance).all() and (share >= 0).all()
    rounding = 1e-12 * (1 + full.abs())
    assert (pruned <= full + rounding).all()
    assert (full + torch.log1p(-share) <= pruned + rounding).all()
    kept = sum(part.num_pairs for part in parts.parts(some.joint, x))
    assert kept < 0.9 * len(x) * some.partition.num_regions
    assert not every.omitted_share(x).any()


def test_what_is_left_out_shows_at_a_great_tolerance():
    every, some, x = pair("L=2, few outputs", 0.5, rows=40)
    with torch.no_grad():
        assert (every.log_prob(x) - some.log_prob(x)).max() > 1e-6


@pytest.mark.parametrize("name", ["L=1", "L=2", "L=3", "L=2, full covariance"])
def test_posteriors_are_the_same(name):
    every, some, x = pair(name, rows=16)
    x[::7, 1] = torch.nan  # rows of which nothing is left out, among the others
    full, pruned = every.posterior(x), some.posterior(x)
    for field in ("log_evidence", "region_probs", "mean", "covariance_matrix", "mode"):
        torch.testing.assert_close(getattr(pruned, field), getattr(full, field), rtol=1e-9, atol=1e-9)
    # Far out the last bit of a Gaussian's mean counts for many of its deviations.
    torch.testing.assert_close(pruned.entropy(), full.entropy(), rtol=1e-8, atol=1e-8)
    if name != "L=3":
        levels = [p.posterior(x[::3]).quantiles([0.1, 0.7]) for p in (some, every)]
        torch.testing.assert_close(*levels, rtol=1e-8, atol=1e-8)
    z = pruned.sample((500,))
    assert z.shape == (500, 16, some.partition.latent_dim)
    error = (z.mean(0) - full.mean) / (full.variance / 500).sqrt()
    assert error.abs().max() < 5.0
    torch.testing.assert_close(some.conditional(x).mean, every.conditional(x).mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        some.conditional(x).variance, every.conditional(x).variance, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(("budget", "searches"), [(2**28, 1), (2**16, 4)])
def test_a_posterior_keeps_what_it_found_if_that_fits_its_memory(budget, searches, monkeypatch):
    every, _, x = pair("L=2")
    some = CPAMarginal(every.partition, **CASES["L=2"][1], memory_budget=budget)
    begun = []
    monkeypatch.setattr(posterior, "parts", lambda *args: begun.append(args) or parts.parts(*args))
    post = some.posterior(x)
    z = post.sample()
    post.log_prob(z)
    assert torch.equal(post.log_evidence, post.expand(post.batch_shape).log_evidence)
    assert len(begun) == searches
    assert post.joint.pairs_in_budget(x) >= sum(len(c.log_prob) * len(c.joint.cells) for c in post._kept)


@pytest.mark.parametrize("budget", [2**28, 2**16])
def test_gradients_and_statistics_are_the_same(budget):
    every, _, x = pair("L=2")
    grads = []
    for tolerance in (0.0, 1e-12):
        leaf = x.clone().requires_grad_()
        scale = torch.full((30,), 0.3, requires_grad=True)
        marginal = CPAMarginal(every.partition, scale, tolerance=tolerance, memory_budget=budget)
        parameters = [p for layer in every.partition.network.linears for p in (layer.weight, layer.bias)]
        loss = (marginal.log_prob(leaf) * torch.linspace(0.5, 2.0, len(x))).sum()
        grads.append(torch.autograd.grad(loss, [leaf, scale, *parameters]))
        log_prob, statistics = expected_statistics(marginal.joint, x)
        grads[-1] += (log_prob, statistics.zz, statistics.xz, statistics.xx)
    for full, pruned in zip(*grads, strict=True):
        torch.testing.assert_close(pruned, full, rtol=1e-8, atol=1e-8 * full.abs().max().item())


@pytest.mark.parametrize("name", CASES)
def test_boxes_hold_the_images(name):
    """Every point's image lies in the boxes of the groups of its region, however far out the point is."""
    _, some, x = pair(name)
    some.log_prob(x.repeat(2, 1))
    tree = some.joint.tree
    where = torch.empty(some.partition.num_regions, dtype=torch.long)
    for leaf, regions in enumerate(tree.leaves):
        where[regions[regions >= 0]] = leaf
    assert torch.equal(tree.leaves[tree.leaves >= 0].sort().values, torch.arange(some.partition.num_regions))
    scale = torch.tensor([0.3, 1.0, 5.0, 100.0]).repeat_interleave(500)[:, None]
    z = scale * torch.randn(2000, some.partition.latent_dim)
    image = some.joint.whiten(some.joint.decode(z)).data @ tree.rotation
    group = where[some.partition.locate(z)]
    for level in range(tree.depth, -1, -1):
        square = tree.boxes.square(image, 2**level - 1 + group[:, None])[:, 0]
        assert (square <= 1e-20 * (1 + image.square().sum(1))).all()
        group = group // 2


@pytest.mark.parametrize("name", CASES)
def test_compiled_search_keeps_the_same(name, monkeypatch):
    _, some, x = pair(name)
    some.log_prob(x.repeat(2, 1))
    tree, bound = some.joint.tree, -0.5 * torch.rand(len(x)) * 30
    data = some.joint.whiten(x).data @ tree.rotation
    found = []
    for compiled in (pruning.runs_compiled, lambda like: False):
        monkeypatch.setattr(pruning, "runs_compiled", compiled)
        found.append((tree.best_leaves(data), *tree.search(data, bound, 1e-12)))
    (leaves, kept, omitted), (plain_leaves, plain_kept, plain_omitted) = found
    assert torch.equal(leaves, plain_leaves) and torch.equal(kept, plain_kept)
    # A sum of squares that reaches the limit is not completed when compiled.
    assert (plain_omitted <= omitted * (1 + 1e-12)).all() and (omitted <= 1e-12).all()


def test_strips_without_corners():
    """Cells between parallel walls have no vertex, but ends all the same."""
    decoder = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 8))
    with torch.no_grad():
        decoder[0].weight.copy_(torch.tensor([[3.0, 4.0]]).expand(64, 2))
        decoder[0].bias.copy_(torch.linspace(-8, 8, 64))
        decoder[2].weight.mul_(4.0)
    every, some = (CPAMarginal(decoder.double(), 0.3, tolerance=t) for t in (0.0, 1e-12))
    assert every.partition.num_regions == 65
    x = every.sample((60,)).detach()
    with torch.no_grad():
        torch.testing.assert_close(some.log_prob(x), every.log_prob(x), rtol=1e-12, atol=1e-11)
    assert some.joint.tree is not None


@pytest.mark.parametrize("tolerance", [-1e-3, 1.0, float("nan")])
def test_tolerances_that_mean_nothing(tolerance):
    with pytest.raises(InvalidData, match="share of p"):
        CPAMarginal(mlp(1, 3, 2), 0.3, tolerance=tolerance)
