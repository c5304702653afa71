# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What EM and exact maximum likelihood share: they are SVI objects whose loss is the exact -log p(x)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from tqdm.auto import tqdm

from ..distributions.fisher import expected_statistics
from ..distributions.parameters import check_data
from ..distributions.pieces import PiecewiseJoint
from ..distributions.statistics import SufficientStatistics
from ..errors import InvalidData, RegionBudgetExceeded, UnsupportedModel
from .autoguide import AutoCPAPosterior
from .lbfgs import climb, forget_last_step, optimizer_of
from .parameters import followed, trainable
from .process_group import Processes, led_by_first
from .structure import ExactProblem, identical

__all__ = ["AbstractExactFit", "LBFGSRound", "StepRecord"]


@dataclass(frozen=True)
class StepRecord:
    """One step of a fit.

    Attributes:
        log_evidence: exact log p(X) after the step, summed over the data.
        objective: the same less the ridge penalty; never falls.
        gain: by how much the step raised the objective.
        seconds: wall-clock seconds of the step.
        accepted: for EM, the fraction of each block's full step that was taken (0: rejected).
    """

    log_evidence: float
    objective: float
    gain: float
    seconds: float
    accepted: dict[str, float] = field(default_factory=dict)


class Expectations(NamedTuple):
    """An E-step over the rows of one process.

    Attributes:
        given: data, prior and noise under which it was made, as copies.
        joint: the same with the partition.
        log_evidence: scalar, log p(X).
        statistics: of the exact posterior.
    """

    given: tuple[Tensor, ...]
    joint: PiecewiseJoint
    log_evidence: Tensor
    statistics: SufficientStatistics

    @property
    def sums(self) -> list[Tensor]:
        """What is added up over processes."""
        return [self.log_evidence, self.statistics.zz, self.statistics.xz, self.statistics.xx]


class AbstractExactFit(SVI):
    """Base of fits that climb the exact evidence; goes wherever an ``SVI`` object goes.

    Args:
        model: a Pyro model that :class:`AutoCPAPosterior` accepts.
        guide: its :class:`AutoCPAPosterior`.
        ridge: precision of a zero-mean Gaussian prior on the decoder's weights (biases are free).
        lbfgs_iterations: of one round of L-BFGS.
        process_group: a ``torch.distributed`` group among whose processes the rows of the data are divided.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: AutoCPAPosterior,
        *,
        ridge: float = 0.0,
        lbfgs_iterations: int,
        process_group: Any = None,
    ) -> None:
        if not isinstance(guide, AutoCPAPosterior):
            raise UnsupportedModel(
                f"the guide is a {type(guide).__name__}: {type(self).__name__} needs the exact posterior, "
                "AutoCPAPosterior(model, decoder=...)"
            )
        if ridge < 0:
            raise InvalidData(f"ridge is {ridge}: expected a precision >= 0")
        # SVI insists on an optimiser; exact fits move the parameters themselves.
        super().__init__(model, guide, PyroOptim(torch.optim.SGD, {"lr": 0.0}), loss=Trace_ELBO())
        self.ridge = ridge
        self.history: list[StepRecord] = []
        self._rows = 0
        self._processes = Processes(process_group)
        self._agreed = False
        self._last: Expectations | None = None
        self._lbfgs = LBFGSRound(self, lbfgs_iterations)

    @abstractmethod
    def step(self, *args: Any, **kwargs: Any) -> float:
        """One step; returns the exact -log p(x) before it, summed over the data."""

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Exact -log p(x), summed over the data (of all processes)."""

        def here() -> list[Tensor]:
            return [self._expectations(self._read(*args, **kwargs)).log_evidence]

        return -self._processes.sum(here)[0].item()

    def run(
        self,
        *args: Any,
        num_steps: int = 100,
        tol: float = 1e-6,
        progress: bool = True,
        callback: Callable[[StepRecord], None] | None = None,
        **kwargs: Any,
    ) -> list[StepRecord]:
        """Step until the objective per datum rises by less than ``tol`` nats, at most ``num_steps`` times.

        Sweeps that prepare for L-BFGS do not end a run: where they stand still, it may find a way on.

        Args:
            args, kwargs: of the model.
            num_steps: at most so many steps.
            tol: stopping rule, nats per datum and step.
            progress: show a progress bar.
            callback: called with every step's record.

        Returns:
            ``self.history``, to which this run's steps were appended.
        """
        with tqdm(
            total=num_steps, disable=not progress or self._processes.rank > 0, desc=type(self).__name__
        ) as bar:
            for _ in range(num_steps):
                prepares = self._prepares
                self.step(*args, **kwargs)
                record = self.history[-1]
                rows = max(1, self._rows)
                bar.update()
                bar.set_postfix_str(f"log p(x) = {record.log_evidence / rows:.4f} per datum")
                if callback is not None:
                    callback(record)
                if record.gain < tol * rows and not prepares:
                    break
        return self.history

    @property
    def _prepares(self) -> bool:
        """Whether the next step is one of those before the first round of L-BFGS."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """History and curvature, for :func:`save_checkpoint` beside the model: a run resumes from both."""
        return {"history": [asdict(record) for record in self.history], "lbfgs": self._lbfgs.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, from a fit of the same arguments."""
        self.history[:] = [StepRecord(**record) for record in state["history"]]
        self._lbfgs.load_state_dict(state["lbfgs"])

    @contextmanager
    def _undone_on_error(self, problem: ExactProblem) -> Iterator[None]:
        parameters = trainable(problem, self.guide.decoder)
        kept = [p.detach().clone() for p in parameters]
        try:
            yield
        except BaseException as error:
            with torch.no_grad():
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.copy_(value)
            if isinstance(error, RegionBudgetExceeded):
                message = f"{error} The step was undone: all parameters are those before it."
                raise RegionBudgetExceeded(message) from error
            raise

    def _problem(self, *args: Any, **kwargs: Any) -> ExactProblem:
        read: list[ExactProblem] = []

        def count() -> list[Tensor]:
            read.append(self._read(*args, **kwargs))
            return [torch.tensor(float(read[0].x.shape[:-1].numel()), dtype=torch.float64)]

        self._rows = int(self._processes.sum(count)[0])
        return read[0]

    def _read(self, *args: Any, **kwargs: Any) -> ExactProblem:
        problem = self.guide.problem(*args, **kwargs)
        for name in (problem.latent, problem.observed):
            for frame in problem.trace.nodes[name]["cond_indep_stack"]:
                if frame.full_size is not None and frame.full_size != frame.size:
                    raise UnsupportedModel(
                        f"plate '{frame.name}' is subsampled: {type(self).__name__} climbs the evidence of all data, of "
                        "which it needs every row (memory stays bounded: rows are streamed). Drop subsample_size, or "
                        "use SVI with minibatches"
                    )
        return problem

    def _expectations(self, problem: ExactProblem) -> Expectations:
        """The E-step over this process's rows; that of the last call again, if nothing has changed since."""
        joint, last = self.guide.joint(problem), self._last
        given = problem.x, *joint.prior, joint.noise.scale
        if (
            last is not None
            and last.joint.partition is joint.partition
            and all(map(identical, last.given, given))
        ):
            return last
        with torch.no_grad():
            x = check_data(problem.x, joint.partition.data_dim)
            if len(x) == 0:
                raise InvalidData("the data has no rows: expected at least one (in each process)")
            log_prob, statistics = expected_statistics(joint, x)
        # A copy, lest data that are overwritten change it too.
        given = problem.x.detach().clone(), *given[1:]
        self._last = Expectations(given, joint, log_prob.sum(), statistics)
        return self._last

    def _log_evidence(self, parameters: Sequence[Tensor], read: Callable[[], ExactProblem]) -> Tensor:
        """Exact log p(X) of all processes, differentiable in ``parameters`` by Fisher's identity."""

        def ours() -> Tensor:
            problem = read()
            found = self._expectations(problem)
            expected = found.statistics.expected_log_joint(
                *found.joint.partition.affine_maps(),
                problem.noise_scale,
                problem.prior_loc,
                problem.prior_tril,
            )
            # The expectation has the evidence's gradient, not its value.
            return found.log_evidence + (expected - expected.detach())

        if self._processes.group is None:
            return ours()

        def here() -> list[Tensor]:
            log_prob = ours()
            return [log_prob, *torch.autograd.grad(log_prob, list(parameters), materialize_grads=True)]

        total, *gradients = self._processes.sum(here)
        # Zero, with the derivative of the sum over all processes.
        pairs = zip(parameters, gradients, strict=True)
        return total + sum(((p - p.detach()) * g).sum().double() for p, g in pairs)

    def _agree(self, *args: Any, **kwargs: Any) -> None:
        """Before the first step, give every process the parameters of process 0."""
        if self._processes.group is None or self._agreed:
            return
        trained = trainable(self._problem(*args, **kwargs), self.guide.decoder)
        self._processes.broadcast(trained)
        problem = self._problem(*args, **kwargs)
        fixed = [problem.prior_loc, problem.prior_tril, problem.noise_scale]
        decoder = self.guide.decoder
        self._processes.check_same(
            "prior, noise or decoder", [*fixed, *decoder.parameters(), *decoder.buffers()]
        )
        self._agreed = True

    def _penalty(self) -> Tensor:
        """ridge / 2 times the sum of squared weights of the decoder's linear layers and convolutions, differentiable."""
        if not self.ridge:
            return torch.zeros(())
        network = self.guide.partition().network
        weights = [*(layer.weight for layer in network.linears), *network.kernels]
        squares = [weight.double().square().sum() for weight in weights]
        return 0.5 * self.ridge * torch.stack(squares).sum()


class LBFGSRound:
    """Rounds of L-BFGS on the exact evidence per datum, from wherever the parameters are.

    Args:
        fit: whose evidence, penalty and parameters are meant.
        iterations: of one round.
    """

    def __init__(self, fit: AbstractExactFit, iterations: int) -> None:
        self.fit, self.iterations = fit, iterations
        self._optimizer: torch.optim.LBFGS | None = None
        self._waiting: dict[str, Any] | None = None
        self._moved = False

    def moved(self) -> None:
        """To be told when others than this object have moved the parameters."""
        self._moved = True

    def state_dict(self) -> dict[str, Any] | None:
        return self._waiting if self._optimizer is None else self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        # Parameters are known at the first call only.
        self._optimizer, self._waiting = None, state

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[float, float]:
        """One round; returns the objective (evidence less penalty, summed) before it and after it."""
        fit = self.fit
        problem = fit._problem(*args, **kwargs)
        parameters = trainable(problem, fit.guide.decoder)
        read = followed(problem, fit.model, fit.guide.decoder, lambda: fit._read(*args, **kwargs))

        def objective() -> Tensor:
            return fit._log_evidence(parameters, read) - fit._penalty()

        def ascend(evaluate: Callable[[], Tensor]) -> tuple[float, float]:
            optimizer = self._optimizer_of(parameters)
            if self._moved:
                forget_last_step(optimizer)
            values = climb(optimizer, evaluate, fit._rows)
            self._moved = False
            return values[0], values[-1]

        if fit._processes.group is None:
            return ascend(objective)
        return led_by_first(fit._processes, parameters, objective, ascend)

    def _optimizer_of(self, parameters: list[Tensor]) -> torch.optim.LBFGS:
        if self._optimizer is None:
            self._optimizer = optimizer_of(parameters, self.iterations)
            if self._waiting is not None:
                self._optimizer.load_state_dict(self._waiting)
        return self._optimizer
