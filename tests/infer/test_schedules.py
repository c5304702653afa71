# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Schedules against brute force, closed forms and their own promises (no randomness, exact resumption)."""

from __future__ import annotations

import io
import itertools

import pytest
import torch

from pyro_cpa.errors import CPAError
from pyro_cpa.infer.schedules import CoarseGrained, Fixed, Linear, LogUniform, Moments, OptimalLeft, Schedule

ADAPTIVE = [Moments, CoarseGrained, OptimalLeft]


def log_weights(num_particles: int = 40, plates: tuple[int, ...] = (3,), spread: float = 4.0) -> torch.Tensor:
    return spread * torch.randn(num_particles, *plates)


def eta(f: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Mean over data of the integrand, one temperature at a time."""
    rows = [(torch.softmax(b * f, 0) * f).sum(0).mean() for b in beta]
    return torch.stack(rows)


def left_sum(f: torch.Tensor, betas: torch.Tensor) -> torch.Tensor:
    return (betas.diff() * eta(f, betas)[:-1]).sum()


def test_fixed_partitions():
    assert torch.equal(Linear(4).betas, torch.tensor([0, 0.25, 0.5, 0.75, 1.0]))
    assert torch.allclose(LogUniform(3, 0.01).betas, torch.tensor([0, 0.01, 0.1, 1.0]), atol=1e-15)
    assert torch.equal(LogUniform(1).betas, torch.tensor([0.0, 1.0]))
    assert torch.equal(Fixed([0, 0.3, 1]).betas, torch.tensor([0.0, 0.3, 1.0]))
    assert LogUniform().num_intervals == 5
    assert LogUniform().betas[1].item() == pytest.approx(0.025, rel=1e-14)


@pytest.mark.parametrize(
    "betas", [[0, 1, 1], [0.1, 1], [0, 0.9], [0, 0.5, 0.4, 1], [0], [[0, 1]], [0, float("nan"), 1]]
)
def test_bad_betas(betas):
    with pytest.raises(CPAError, match="no partition"):
        Fixed(betas)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linear(0),
        lambda: Linear(2.5),
        lambda: LogUniform(5, 1.0),
        lambda: LogUniform(5, 0.0),
        lambda: Moments(10, grid=4),
        lambda: Moments(5, ema=1.0),
        lambda: Moments(5, every=0),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(CPAError):
        make()


@pytest.mark.parametrize("num_intervals", [1, 2, 3, 5])
def test_optimal_left_is_the_best_of_all_partitions_of_the_grid(num_intervals):
    f = log_weights()
    schedule = OptimalLeft(num_intervals, grid=9)
    schedule.update(f)
    grid = torch.linspace(0, 1, 10).square()
    best = max(
        left_sum(f, torch.cat([grid[:1], grid[list(inner)], grid[-1:]]))
        for inner in itertools.combinations(range(1, 9), num_intervals - 1)
    )
    assert left_sum(f, schedule.betas) == pytest.approx(best.item(), rel=1e-12)
    assert schedule.num_intervals == num_intervals


def test_optimal_left_beats_every_other_schedule():
    f = log_weights(spread=8.0)
    best = OptimalLeft(5)
    best.update(f)
    others: list[Schedule] = [Linear(5), LogUniform(5), Moments(5), CoarseGrained(5)]
    for other in others:
        other.update(f)
        assert left_sum(f, best.betas) > left_sum(f, other.betas)


def test_moments_take_equal_steps_of_the_integrand():
    # Two equally likely log-weights -1 and 1: eta(beta) = tanh(beta).
    schedule = Moments(4, grid=4000)
    schedule.update(torch.tensor([-1.0, 1.0]))
    expected = torch.atanh(torch.tanh(torch.tensor(1.0)) * torch.linspace(0, 1, 5))
    assert torch.allclose(schedule.betas, expected, atol=1e-7)


def test_coarse_grained_shares_nodes_by_the_root_of_rise_times_run():
    # Nodes, measured in the piecewise linear cumulative cost, are equidistant.
    schedule = CoarseGrained(4, knots=4)
    schedule.update(torch.tensor([-1.0, 1.0]))
    knots = torch.linspace(0, 1, 5).square()
    cost = (torch.tanh(knots).diff() * knots.diff()).sqrt()
    shares = [
        sum(
            cost[j] * (min(b, knots[j + 1]) - max(a, knots[j])).clamp(min=0) / (knots[j + 1] - knots[j])
            for j in range(4)
        )
        for a, b in itertools.pairwise(schedule.betas)
    ]
    assert torch.allclose(torch.stack(shares), cost.sum().expand(4) / 4, atol=1e-12)


def test_coarse_grained_is_asymptotically_optimal():
    f = log_weights(400, (1,), spread=8.0)
    exact = f.logsumexp(0).mean() - torch.tensor(400.0).log()
    gaps = {}
    for name, schedule in {
        "coarse": CoarseGrained(40, 400),
        "best": OptimalLeft(40, 800),
        "even": Linear(40),
    }.items():
        schedule.update(f)
        gaps[name] = exact - left_sum(f, schedule.betas)
    assert gaps["coarse"] < 1.02 * gaps["best"] < 0.9 * gaps["even"]


@pytest.mark.parametrize("kind", ADAPTIVE)
def test_starts_log_uniform_and_updates_every_so_often_without_random_numbers(kind):
    schedule, steps = kind(4, every=3, ema=0.5), [log_weights() for _ in range(7)]
    assert torch.equal(schedule.betas, LogUniform(4).betas)
    state = torch.get_rng_state()
    seen = []
    for f in steps:
        schedule.update(f)
        seen.append(schedule.betas)
    assert torch.equal(state, torch.get_rng_state())
    assert [not torch.equal(a, b) for a, b in itertools.pairwise(seen)] == [
        False,
        False,
        True,
        False,
        False,
        True,
    ]
    grid = schedule._grid
    average = 0.5 * (0.5 * eta(steps[0], grid) + 0.5 * eta(steps[3], grid)) + 0.5 * eta(steps[6], grid)
    assert torch.allclose(schedule.state_dict()["eta"], average, rtol=1e-12)


@pytest.mark.parametrize("kind", ADAPTIVE)
def test_resumes_bit_for_bit_from_a_saved_state(kind):
    original, steps = kind(4, every=2), [log_weights() for _ in range(6)]
    for f in steps[:3]:
        original.update(f)
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    file.seek(0)
    resumed = kind(4, every=2)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for f in steps[3:]:
        original.update(f)
        resumed.update(f)
    assert torch.equal(original.betas, resumed.betas)
    assert torch.equal(original.state_dict()["eta"], resumed.state_dict()["eta"])


def test_refuses_the_state_of_another_schedule():
    with pytest.raises(CPAError, match="restores the shapes"):
        Linear(3).load_state_dict(Linear(4).state_dict())
    with pytest.raises(CPAError, match="restores the shapes"):
        Moments(3).load_state_dict(Linear(3).state_dict())
    with pytest.raises(CPAError, match="restores the shapes"):
        Moments(3).load_state_dict(Moments(3, grid=100).state_dict())
    schedule = Linear(2)
    schedule.load_state_dict(Fixed([0, 0.1, 1]).state_dict() | {})
    assert torch.equal(schedule.betas, Fixed([0, 0.1, 1]).betas)


@pytest.mark.parametrize("kind", ADAPTIVE)
@pytest.mark.parametrize(
    "f",
    [
        torch.tensor([[-2.0], [-2.0]]),  # guide equal to the posterior
        torch.tensor([[-1e6], [0.0], [1e6]]),  # saturates in the first cell
        torch.tensor([[-1e-12], [1e-12]]),
        torch.randn(5, 2, 3).float() * 300,
    ],
)
def test_extreme_weights_leave_a_valid_partition(kind, f):
    schedule = kind(6)
    schedule.update(f)
    assert (schedule.betas.diff() > 0).all() and schedule.betas[0] == 0 and schedule.betas[-1] == 1


@pytest.mark.parametrize("kind", ADAPTIVE)
def test_a_particle_of_zero_density_postpones_the_update(kind):
    schedule, reference, f = kind(4, every=5), kind(4, every=5), log_weights()
    schedule.update(torch.tensor([0.0, -float("inf")]))
    assert torch.equal(schedule.betas, LogUniform(4).betas)
    schedule.update(f)
    reference.update(f)
    assert torch.equal(schedule.betas, reference.betas)
