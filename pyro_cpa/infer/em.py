# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Expectation-maximisation with an exact E-step and an analytic M-step."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..distributions.statistics import SufficientStatistics
from ..errors import CPAError, InvalidData, UnsupportedModel
from ..partition import Network, Partition
from . import m_step
from .autoguide import AutoCPAPosterior
from .exact_fit import AbstractExactFit, StepRecord
from .parameters import GaussianParameter, Weight, noise_parameter, prior_parameters
from .structure import ExactProblem

__all__ = ["EM"]

# A rejected step is halved so often before its block is left as it is.
HALVINGS = 8
# Rounding of a float64 sum over the data; a fall within it is not a fall.
ROUNDING = 1e-9
Target = Weight | GaussianParameter


@dataclass(frozen=True)
class _EStep:
    """Parameters as they are, with the exact posterior's statistics and evidence under them."""

    problem: ExactProblem
    partition: Partition
    noise_scale: Tensor
    statistics: SufficientStatistics
    log_evidence: float
    objective: float


class EM(AbstractExactFit):
    r"""EM for a piecewise-affine decoder: exact E-step, analytic M-step, exact evidence at every step.

    The E-step takes the exact posterior moments of every datum. The M-step solves, block by block and in closed form,

    .. math::

        \max_\theta \sum_n E_{p(z | x_n)}\big[\log \mathcal N(x_n; g_\theta(z), S_x) + \log \mathcal N(z; m, V)\big]
        - \tfrac{\rho}{2} \lVert W \rVert^2 .

    The last layer, the noise and the prior do not move the walls between regions: their updates are true M-steps.
    Hidden layers, convolutions and whatever else the decoder has move them; each of their updates is accepted only if the
    exact objective does not fall, and is otherwise halved along the segment (generalised EM). Hence the objective never
    falls, without a gradient of it.

    Args:
        model: a Pyro model that :class:`AutoCPAPosterior` accepts.
        guide: its :class:`AutoCPAPosterior`.
        blocks: which of ``"output"``, ``"noise"``, ``"hidden"``, ``"prior"`` to update; by default all but the prior,
            the noise only where it is a parameter.
        ridge: precision rho of a Gaussian prior on the decoder's weights (biases are free).
        accelerate: ``"lbfgs"`` alternates, after ``warm_up`` sweeps of all blocks, the closed-form blocks (output, noise,
            prior) with rounds of L-BFGS on the exact evidence, which take over the hidden layers.
        lbfgs_iterations: iterations of one such round.
        warm_up: sweeps before the first round.
        process_group: a ``torch.distributed`` group (gloo or nccl), each process of which calls every method with
            rows of its own, at least one; None for one process.

    Raises:
        UnsupportedModel: the guide is not exact, a plate is subsampled, or a block has nothing to update.
        InvalidData: the noise variance of a dimension reaches zero.
        RegionBudgetExceeded: an update needs more regions than the guide allows. After any error in a step the parameters
            are those before the step.
        CPAError: in every process, what one of them raised on its rows, or that one cannot be reached.

    Note:
        Memory is O(R (L + 1)(D + L)) plus one chunk of data. A step costs one E-step per accepted block (its statistics
        serve the next block) plus one per halving. Missing data (NaN) are part of the E-step.

        With more than three latents the evidence is an estimate on points that stay the same: the estimate never falls,
        the evidence by no more than its standard error. See the guide's ``num_points``.

        With ``process_group`` the result is that of one process with all rows, up to rounding, from the parameters of
        process 0, and has the same bits in all. Communicated per E-step: one all-reduce of
        R (L + 1)(L + 1 + D) + D + 1 float64 numbers (with a full noise covariance D^2 in the place of D), 8 bytes each,
        whatever the number of data, and a few integers of bookkeeping; per block one broadcast of its parameters; for
        ``accelerate`` see :class:`ExactML`.

    References:
        R. Balestriero, S. Paris, R. Baraniuk (2020), "Analytical Probability Distributions and Exact
        Expectation-Maximization for Deep Generative Networks". The published M-step freezes the regions without a
        check, and its likelihood can fall.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> _ = torch.manual_seed(0)
        >>> decoder = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> def model(x):
        ...     sigma = pyro.param("sigma", torch.tensor(0.5), constraint=dist.constraints.positive)
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(decoder(z), sigma).to_event(1), obs=x)
        >>> x = torch.randn(50, 2)
        >>> em = EM(model, AutoCPAPosterior(model, decoder=decoder))
        >>> losses = [em.step(x) for _ in range(5)]
        >>> losses == sorted(losses, reverse=True)
        True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: AutoCPAPosterior,
        *,
        blocks: Sequence[str] | None = None,
        ridge: float = 0.0,
        accelerate: str | None = None,
        lbfgs_iterations: int = 25,
        warm_up: int = 10,
        process_group: Any = None,
    ) -> None:
        super().__init__(
            model, guide, ridge=ridge, lbfgs_iterations=lbfgs_iterations, process_group=process_group
        )
        known = ("output", "noise", "hidden", "prior")
        if blocks is not None and (unknown := [b for b in blocks if b not in known]):
            raise CPAError(f"blocks holds {unknown}: expected a selection of {known}")
        if accelerate not in (None, "lbfgs"):
            raise CPAError(f"accelerate is {accelerate!r}: expected None or 'lbfgs'")
        self.blocks = None if blocks is None else tuple(blocks)
        self.warm_up = warm_up
        self.accelerate = accelerate
        self._warned: set[str] = set()

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One sweep over the blocks; returns the exact -log p(x) before it, summed over the data."""
        start = time.perf_counter()
        self._agree(*args, **kwargs)
        before = self._e_step(*args, **kwargs)
        with self._undone_on_error(before.problem):
            state, accepted = self._sweep(before, *args, **kwargs)
        gain = state.objective - before.objective
        record = StepRecord(state.log_evidence, state.objective, gain, time.perf_counter() - start, accepted)
        self.history.append(record)
        return -before.log_evidence

    @property
    def _prepares(self) -> bool:
        return self.accelerate is not None and len(self.history) < self.warm_up

    def _sweep(self, state: _EStep, *args: Any, **kwargs: Any) -> tuple[_EStep, dict[str, float]]:
        """All blocks in turn; returns the state after them and the fraction of each one's step that was taken."""
        accepted: dict[str, float] = {}
        climbing = self.accelerate is not None and not self._prepares
        for name, propose, moves_walls in self._plan(state):
            if climbing and moves_walls:
                # L-BFGS takes over the hidden layers; closed-form blocks leave its curvature in place.
                continue
            state, accepted[name] = self._update(state, propose, moves_walls, *args, **kwargs)
        if climbing:
            if any(accepted.values()):
                self._lbfgs.moved()
            self._lbfgs(*args, **kwargs)
            state = self._e_step(*args, **kwargs)
        return state, accepted

    def _e_step(self, *args: Any, **kwargs: Any) -> _EStep:
        problem = self._problem(*args, **kwargs)
        total, *sums = self._processes.sum(lambda: self._expectations(problem).sums)
        joint, log_evidence = self._expectations(problem).joint, total.item()
        with torch.no_grad():
            objective = log_evidence - self._penalty().item()
        statistics = SufficientStatistics(*sums)
        return _EStep(problem, joint.partition, joint.noise.scale, statistics, log_evidence, objective)

    def _plan(self, state: _EStep) -> list[tuple[str, Callable[[_EStep], list[tuple[Target, Tensor]]], bool]]:
        """Name, proposal and whether walls move, of every block that this model has."""
        network = state.partition.network
        last = len(network.linears) - 1
        # Otherwise the last linear layer is followed by something, and is a hidden layer like the others.
        ends_linear = last >= 0 and network.ends_linear
        chosen = self.blocks or ("output", "noise", "hidden")
        plan: list[tuple[str, Callable[[_EStep], list[tuple[Target, Tensor]]], bool]] = []
        if "output" in chosen and ends_linear:
            plan.append(("output", self._propose_output, False))
        if "noise" in chosen:
            parameter = noise_parameter(state.problem, self.model, self.guide.decoder)
            if parameter is not None:
                plan.append(("noise", lambda s: self._propose_noise(s, parameter), False))
            elif self.blocks is not None:
                raise UnsupportedModel(
                    f"the noise of site '{state.problem.observed}' is a constant: make it a pyro.param or PyroParam, "
                    "or leave 'noise' out of blocks"
                )
        if "prior" in chosen:
            plan.append(("prior", self._propose_prior, False))
        if "hidden" in chosen:
            for index in reversed(range(last if ends_linear else last + 1)):
                plan.append((f"hidden[{index}]", lambda s, i=index: self._propose_hidden(s, i), True))  # type: ignore[misc]
            for name, group in reversed(self._others(network)):
                plan.append((f"hidden[{name}]", lambda s, g=group: self._propose_others(s, g), True))  # type: ignore[misc]
        return plan

    def _update(
        self,
        state: _EStep,
        propose: Callable[[_EStep], list[tuple[Target, Tensor]]],
        moves_walls: bool,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[_EStep, float]:
        """Write a proposal; keep it, shortened if need be, only if the exact objective does not fall."""
        proposal = propose(state)
        # Linear algebra need not give the same bits in every process; proposals that differ would part them for good.
        self._processes.broadcast([new for _, new in proposal])
        kept = [target.get() for target, _ in proposal]
        tolerance = ROUNDING * abs(state.objective)
        for halving in range(1 + (HALVINGS if moves_walls else 0)):
            fraction = 0.5**halving
            for (target, new), old in zip(proposal, kept, strict=True):
                target.set(old + fraction * (new.to(old) - old) if halving else new)
            trial = self._e_step(*args, **kwargs)
            if trial.objective >= state.objective - tolerance:
                return trial, fraction
        for (target, _), old in zip(proposal, kept, strict=True):
            target.set(old)
        return state, 0.0

    def _propose_output(self, state: _EStep) -> list[tuple[Target, Tensor]]:
        layer = state.partition.network.linears[-1]
        weight, bias, lacking = m_step.output_layer(
            state.partition, state.statistics, state.noise_scale, self.ridge
        )
        if lacking:
            self._warn(
                "singular",
                f"the normal matrix of the last layer lacks {lacking} of {layer.in_features + 1} dimensions: units that are "
                "never active, or copies of one another, keep their weights in these directions (ridge= makes it regular)",
            )
        if self._rows < layer.in_features + 1:
            self._warn(
                "few",
                f"{self._rows} data for the {layer.in_features + 1} parameters of each output: expect overfitting "
                "(ridge= helps)",
            )
        proposal: list[tuple[Target, Tensor]] = [(Weight(layer.weight), weight)]
        return proposal if bias is None else [*proposal, (Weight(layer.bias), bias)]

    def _propose_noise(self, state: _EStep, parameter: GaussianParameter) -> list[tuple[Target, Tensor]]:
        moment = m_step.noise_covariance(state.partition, state.statistics)
        second = state.statistics.xx if state.statistics.xx.dim() == 1 else state.statistics.xx.diagonal()
        variances = moment if moment.dim() == 1 else moment.diagonal()
        if parameter.unconstrained.numel() == 1:
            # One scale for all dimensions: a constant column alone does not make it vanish.
            variances, second = variances.mean(0, keepdim=True), second.mean(0, keepdim=True)
        # Below this the residual is the rounding of x^2.
        gone = variances <= 1e-14 * second / state.statistics.count
        if bool(gone.any()):
            dims = gone.nonzero().flatten().tolist()
            raise InvalidData(
                f"the noise variance of data dimension {dims} reaches zero: the decoder fits it exactly (constant column, "
                "or too few data). Drop the column, fix the noise (leave 'noise' out of blocks), or use ridge="
            )
        return [(parameter, parameter.encode(moment))]

    def _propose_prior(self, state: _EStep) -> list[tuple[Target, Tensor]]:
        loc, covariance = prior_parameters(state.problem, self.model, self.guide.decoder)
        if loc is None and covariance is None:
            raise UnsupportedModel(
                f"the prior of site '{state.problem.latent}' is a constant: make its mean or scale a pyro.param or "
                "PyroParam, or leave 'prior' out of blocks"
            )
        mean, scatter = m_step.prior_moments(state.statistics)
        proposal: list[tuple[Target, Tensor]] = []
        if loc is None:
            shift = mean - state.problem.prior_loc.detach().to(mean)
            scatter = scatter + torch.outer(shift, shift)
        else:
            proposal.append((loc, loc.encode(mean)))
        if covariance is not None:
            proposal.append((covariance, covariance.encode(scatter)))
        return proposal

    def _propose_hidden(self, state: _EStep, index: int) -> list[tuple[Target, Tensor]]:
        layer = state.partition.network.linears[index]
        weight, bias = m_step.hidden_layer(
            state.partition, state.statistics, state.noise_scale, self.ridge, index
        )
        proposal: list[tuple[Target, Tensor]] = [(Weight(layer.weight), weight)]
        return proposal if bias is None else [*proposal, (Weight(layer.bias), bias)]

    def _others(self, network: Network) -> list[tuple[str, list[Tensor]]]:
        """Modules with parameters of their own that are no linear layers, and those parameters."""
        linears = {id(p) for layer in network.linears for p in layer.parameters()}
        groups = [
            (
                name or type(module).__name__,
                [p for p in module.parameters(recurse=False) if id(p) not in linears],
            )
            for name, module in self.guide.decoder.named_modules()
        ]
        return [(n, trained) for n, group in groups if (trained := [p for p in group if p.requires_grad])]

    def _propose_others(self, state: _EStep, parameters: list[Tensor]) -> list[tuple[Target, Tensor]]:
        kernels = {id(kernel) for kernel in state.partition.network.kernels}
        ridges = [self.ridge if id(p) in kernels else 0.0 for p in parameters]
        new = m_step.other_parameters(
            state.partition, state.statistics, state.noise_scale, parameters, ridges
        )
        return [(Weight(p), value) for p, value in zip(parameters, new, strict=True)]

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, UserWarning, stacklevel=4)
