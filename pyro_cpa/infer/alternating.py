# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Alternating gradient phases: the guide with the model fixed, then the model with the guide fixed."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.util import torch_item, zero_grads
from pyro.optim import PyroOptim
from torch import Tensor
from tqdm.auto import tqdm

from pyro_cpa.errors import InvalidData, UnsupportedModel
from pyro_cpa.infer.evidence import log_evidence

__all__ = ["AlternatingTrainer", "Record"]

_EVALUATION_SEED = 20220807  # any fixed number: every evaluation draws the same noise
_EVALUATION_CHUNK = 50  # particles in memory at a time


class Record(NamedTuple):
    """One line of the log, in nats per row of the monitored data.

    Attributes:
        step: gradient steps taken.
        phase: ``"E"``, ``"M"`` or ``"EM"``, the phase that led here; ``""`` before the first step.
        evidence: log p(x).
        bound: minus the loss of the objective.
        gap: evidence - bound.
    """

    step: int
    phase: str
    evidence: float
    bound: float
    gap: float


class AlternatingTrainer:
    r"""Gradient E-phases and M-phases on any ELBO, with a log of evidence, bound and gap.

    .. math:: \log p_\theta(x) = \text{bound}(\theta, \phi) + \text{gap}(\theta, \phi)

    An E-phase moves the guide's parameters alone: the evidence stays and the gap closes. An M-phase moves the
    model's: bound and evidence rise and the gap may open. ``"EM"`` moves both, as SVI does. Parameters that
    model and guide share belong to the model.

    Args:
        model, guide, optim, elbo: as for ``SVI``; all four are used as given.
        phases: pairs (``"E"``, ``"M"`` or ``"EM"``; number of steps), repeated in turn.
        batch_size: rows of a minibatch; None for all rows at every step. Epochs are shuffled by ``seed`` and
            the number of the epoch alone, so that a resumed run sees the same minibatches.
        seed: of the shuffling.
        evidence: called with the arguments of the model, returns log p(x), as a total or one value a row;
            None for :func:`~pyro_cpa.infer.log_evidence`: exact if the guide is, else by 1000 particles.

    Raises:
        InvalidData: for phases or arguments that are not as described.
        UnsupportedModel: for a loss that is no ELBO, or a phase without parameters to move.

    Note:
        A step costs one evaluation of the objective and its gradient in either phase. The log is evaluated
        with a fixed seed of its own, so that it neither adds noise between lines nor changes the run.
        ``state_dict`` holds steps, log and best parameters; save parameters and optimiser beside it:
        ``save_checkpoint(path, model=..., guide=..., optim=optim, trainer=trainer)``.

    References:
        Z. Yang (2022), "Training Latent Variable Models with Auto-encoding Variational Bayes: A Tutorial".

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.zeros(()))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(loc, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     slope = pyro.param("slope", torch.zeros(()))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(slope * x, 0.7))
        >>> def evidence(x):
        ...     return dist.Normal(pyro.param("loc"), 2**0.5).log_prob(x)
        >>> x = 3.0 + 2**0.5 * torch.randn(50)
        >>> trainer = AlternatingTrainer(model, guide, pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO(),
        ...                              phases=[("E", 20), ("M", 20)], evidence=evidence)
        >>> log = trainer.fit(x, num_steps=40, log_every=20, progress=False)
        >>> log[0].evidence == log[1].evidence < log[2].evidence and log[1].gap < log[0].gap
        True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim,
        elbo: ELBO,
        phases: Sequence[tuple[str, int]] = (("E", 1000), ("M", 1000)),
        *,
        batch_size: int | None = None,
        seed: int = 0,
        evidence: Callable[..., Any] | None = None,
    ) -> None:
        if not isinstance(elbo, ELBO):
            raise UnsupportedModel(
                f"elbo is a {type(elbo).__name__}; expected an instance of pyro.infer.ELBO."
            )
        if not isinstance(optim, PyroOptim):
            raise UnsupportedModel(
                f"optim is a {type(optim).__name__}; expected a PyroOptim such as pyro.optim.Adam."
            )
        for phase in phases:
            if len(phase) != 2 or phase[0] not in ("E", "M", "EM") or int(phase[1]) < 1:
                raise InvalidData(f"a phase is {phase!r}; expected ('E', 'M' or 'EM', number of steps).")
        if not phases:
            raise InvalidData("phases is empty; expected for example [('E', 1000), ('M', 1000)].")
        if batch_size is not None and batch_size < 1:
            raise InvalidData(f"batch_size is {batch_size}; expected a positive integer or None.")
        self.model, self.guide, self.optim = model, guide, optim
        self.elbo: Any = elbo  # the base class declares no loss methods
        self.phases = [(str(name), int(steps)) for name, steps in phases]
        self.batch_size, self.seed = batch_size, seed
        self.evidence = self._estimate if evidence is None else evidence
        self.steps = 0
        self.history: list[Record] = []
        self.stopped = False
        self._best: dict[str, Any] | None = None
        self._model_names: set[str] = set()
        self._guide_names: set[str] = set()

    @property
    def phase(self) -> str:
        """The phase of the next step."""
        ends = list(accumulate(length for _, length in self.phases))
        return self.phases[bisect_right(ends, self.steps % ends[-1])][0]

    def step(self, *args: Any) -> float:
        """One gradient step of the current phase on these arguments; returns the loss before it."""
        phase = self.phase
        with poutine.trace(param_only=True) as capture:
            loss = self.elbo.loss_and_grads(self.model, self.guide, *args)
        values = _unconstrained(capture.trace)
        if not values.keys() <= self._model_names | self._guide_names:
            self._find_sides(*args)
        self.optim(self._moving(phase, values))
        zero_grads(values.values())
        self.steps += 1
        return torch_item(loss)

    def fit(
        self,
        *data: Any,
        num_steps: int,
        validation: Sequence[Any] | None = None,
        log_every: int = 100,
        patience: int | None = None,
        on_log: Callable[[Record], Any] | None = None,
        progress: bool = True,
    ) -> list[Record]:
        """Train until ``num_steps`` steps have been taken in all, those of earlier calls included.

        Args:
            data: arguments of the model; tensors with as many rows as the first are cut into minibatches.
            num_steps: total number of steps at which to stop.
            validation: arguments to monitor in place of ``data``; early stopping goes by their evidence.
            log_every: steps between lines of the log; a line is also written before the first step.
            patience: stop after so many lines, written in phases that move the model, without a higher
                evidence, and go back to the parameters of the highest; None never stops early.
            on_log: called with each line, for example to save a checkpoint.
            progress: show a progress bar.

        Returns:
            The whole log, that of earlier calls included.
        """
        if log_every < 1 or (patience is not None and patience < 1):
            raise InvalidData(f"log_every={log_every}, patience={patience}; expected positive integers.")
        monitored = data if validation is None else tuple(validation)
        bar = tqdm(total=num_steps, initial=self.steps, disable=not progress)
        with bar:
            if not self.history:
                self._log("", monitored, patience, on_log, bar)
            while self.steps < num_steps and not self.stopped:
                phase = self.phase
                self.step(*self._minibatch(data))
                bar.update()
                if self.steps % log_every == 0:
                    self._log(phase, monitored, patience, on_log, bar)
        return self.history

    def state_dict(self) -> dict[str, Any]:
        """Steps taken, log, and what early stopping remembers."""
        return {
            "steps": self.steps,
            "history": [tuple(record) for record in self.history],
            "stopped": self.stopped,
            "best": None if self._best is None else dict(self._best),
            "phases": list(self.phases),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if [tuple(phase) for phase in state["phases"]] != self.phases:
            raise InvalidData(f"the saved phases are {state['phases']}, those of this trainer {self.phases}")
        self.steps, self.stopped, self._best = state["steps"], state["stopped"], state["best"]
        self.history = [Record(*record) for record in state["history"]]

    # ---- parameters of either side ---------------------------------------------------------------------

    def _find_sides(self, *args: Any) -> None:
        with torch.random.fork_rng(), torch.no_grad(), poutine.block():
            guide = poutine.trace(self.guide).get_trace(*args)
            model = poutine.trace(poutine.replay(self.model, trace=guide)).get_trace(*args)
        self._model_names, self._guide_names = (
            {name for name, site in trace.nodes.items() if site["type"] == "param"}
            for trace in (model, guide)
        )

    def _moving(self, phase: str, values: Mapping[str, Tensor]) -> list[Tensor]:
        # By identity: a tensor that both sides share under two names belongs to the model, and moves once.
        of_model = {id(values[name]) for name in self._model_names & values.keys()}
        moving = {
            id(value): value
            for value in values.values()
            if phase == "EM" or (id(value) in of_model) == (phase == "M")
        }
        if not moving:
            side = {"E": "guide", "M": "model"}.get(phase, "pair")
            raise UnsupportedModel(
                f"phase {phase!r} has nothing to move: the {side} has no parameters of its own. Leave it out."
            )
        return list(moving.values())

    # ---- data and log ----------------------------------------------------------------------------------

    def _minibatch(self, data: Sequence[Any]) -> Sequence[Any]:
        if self.batch_size is None:
            return data
        rows = _num_rows(data)
        epoch, position = divmod(self.steps, math.ceil(rows / self.batch_size))
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        order = torch.randperm(rows, generator=generator)[position * self.batch_size :][: self.batch_size]
        return [
            part[order.to(part.device)] if isinstance(part, Tensor) and part.shape[:1] == (rows,) else part
            for part in data
        ]

    @torch.no_grad()
    def _log(
        self,
        phase: str,
        data: Sequence[Any],
        patience: int | None,
        on_log: Callable[[Record], Any] | None,
        bar: tqdm,
    ) -> None:
        rows = _num_rows(data)
        with torch.random.fork_rng():
            torch.manual_seed(_EVALUATION_SEED)
            bound = -torch_item(self.elbo.loss(self.model, self.guide, *data)) / rows
            evidence = float(torch.as_tensor(self.evidence(*data)).sum()) / rows
        record = Record(self.steps, phase, evidence, bound, evidence - bound)
        self.history.append(record)
        bar.set_postfix(phase=phase, evidence=f"{evidence:.4g}", gap=f"{record.gap:.4g}")
        if patience is not None and phase != "E":
            self._remember(record, data, patience)
        if on_log is not None:
            on_log(record)

    def _estimate(self, *args: Any) -> Tensor:
        return log_evidence(self.model, self.guide, *args, chunk_size=_EVALUATION_CHUNK).log_prob

    def _remember(self, record: Record, data: Sequence[Any], patience: int) -> None:
        if self._best is None or record.evidence > self._best["evidence"]:
            parameters = {name: value.clone() for name, value in self._parameters(data).items()}
            self._best = {
                "evidence": record.evidence,
                "step": record.step,
                "lines": 0,
                "parameters": parameters,
            }
            return
        self._best["lines"] += 1
        if self._best["lines"] >= patience:
            self.stopped = True
            for name, value in self._parameters(data).items():
                value.copy_(self._best["parameters"][name])

    def _parameters(self, data: Sequence[Any]) -> dict[str, Tensor]:
        """Unconstrained parameters of both sides by name."""
        with torch.random.fork_rng(), poutine.block(), poutine.trace(param_only=True) as capture:
            guide = poutine.trace(self.guide).get_trace(*data)
            poutine.replay(self.model, trace=guide)(*data)
        return _unconstrained(capture.trace)


def _unconstrained(trace: poutine.Trace) -> dict[str, Tensor]:
    sites: Any = trace.nodes
    values = {name: site["value"] for name, site in sites.items()}
    # A module's own parameter (module_local_params) is unconstrained and does not say so.
    return {
        name: getattr(value, "unconstrained", lambda value=value: value)() for name, value in values.items()
    }


def _num_rows(data: Sequence[Any]) -> int:
    if not data or not isinstance(data[0], Tensor) or data[0].dim() == 0:
        raise InvalidData("the first argument is no tensor with rows; expected the data, (N, ...).")
    return len(data[0])
