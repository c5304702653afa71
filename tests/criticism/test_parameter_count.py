# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The count is the rank of the Fisher information of the exact log p(x)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyro_cpa.criticism import count_parameters
from pyro_cpa.distributions import CPAMarginal


def fisher_rank(decoder, num_data):
    """Rank of the per-datum scores of log p(x) in the decoder's parameters."""
    x = CPAMarginal(decoder, 0.1).sample((num_data,)).detach()
    scores = []
    for row in x:
        log_prob = CPAMarginal(decoder, 0.1).log_prob(row[None]).sum()
        gradient = torch.autograd.grad(log_prob, list(decoder.parameters()))
        scores.append(torch.cat([g.ravel() for g in gradient]))
    values = torch.linalg.svdvals(torch.stack(scores))
    # Symmetric directions come out below 1e-16 of the largest value, true ones above 1e-6 in these cases.
    return int((values > 1e-11 * values[0]).sum())


def with_kinks_near_the_prior(*layers):
    decoder = nn.Sequential(*layers)
    with torch.no_grad():
        decoder[0].bias.mul_(0.5)
        decoder[0].weight.copy_(decoder[0].weight.sign() + 0.2 * decoder[0].weight)
    return decoder


DECODERS = {
    "line": lambda: nn.Linear(1, 4),
    "plane": lambda: nn.Linear(2, 5),
    "space": lambda: nn.Linear(3, 5),
    "one layer": lambda: with_kinks_near_the_prior(nn.Linear(1, 3), nn.LeakyReLU(0.3), nn.Linear(3, 3)),
    "two layers": lambda: with_kinks_near_the_prior(
        nn.Linear(1, 2), nn.LeakyReLU(0.3), nn.Linear(2, 2), nn.LeakyReLU(0.2), nn.Linear(2, 4)
    ),
}


@pytest.mark.parametrize("kind", DECODERS)
def test_count_is_the_rank_of_the_fisher_information(kind):
    decoder = DECODERS[kind]()
    assert fisher_rank(decoder, 60) == count_parameters(decoder)


def test_plane_of_latents_has_one_rotation_less():
    decoder = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
    assert count_parameters(decoder) == (16 + 8 + 24 + 3) - 8 - 1


def test_frozen_parameters_are_free_and_symmetries_need_trainable_layers():
    decoder = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
    decoder[0].requires_grad_(False)
    assert count_parameters(decoder) == 27


def test_decoder_inside_a_module_and_modules_without_a_chain():
    class WithNoise(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2))
            self.scale = nn.Parameter(torch.ones(2))

    assert count_parameters(WithNoise()) == 14 + 2 - 3
    assert count_parameters(nn.Conv1d(1, 2, 3)) == 8
