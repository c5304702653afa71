# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Sums over data that are spread over the processes of a ``torch.distributed`` group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..errors import CPAError, InvalidData

__all__ = ["ProcessFailure", "Processes", "led_by_first"]


class ProcessFailure(CPAError):
    """Another process of the group failed or cannot be reached: no sum over all data can be had."""


class Processes:
    """The processes among which the rows are divided; with ``group=None`` this one alone, and nothing is sent.

    Every method is collective: all processes call the same ones in the same order. What a process computes on its own
    rows is handed over as a function, so that an error in it is raised by all of them, rather than leaving the others
    to wait.

    Args:
        group: a ``torch.distributed`` process group (gloo or nccl), or None.
    """

    def __init__(self, group: Any = None) -> None:
        self.group, self.rank, self.size = group, 0, 1
        if group is None:
            return
        import torch.distributed as distributed

        if not distributed.is_available() or not distributed.is_initialized():
            raise CPAError(
                "process_group is given, but torch.distributed is not initialised: call "
                "torch.distributed.init_process_group() in every process (torchrun starts them)"
            )
        if not isinstance(group, distributed.ProcessGroup):
            raise CPAError(
                f"process_group is a {type(group).__name__}: expected torch.distributed.group.WORLD or a group of "
                "torch.distributed.new_group of which this process is a member"
            )
        self._distributed = distributed
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        # gloo reduces in host memory, nccl on the process's own GPU.
        self._device = torch.device("cuda" if "nccl" in distributed.get_backend(group) else "cpu")

    def sum(self, part: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """The sums over processes of the tensors that ``part`` returns in each, the same bits in every process."""
        if self.group is None:
            return list(part())
        tensors = self._together(part, lambda found: sum(t.numel() for t in found), "numbers to add up")
        buffer = _flat(tensors).to(self._device)
        with self._reachable():
            self._distributed.all_reduce(buffer, group=self.group)
        return _unflat(buffer, tensors)

    def all(self, part: Callable[[], bool]) -> bool:
        """Whether ``part`` is true in every process."""
        return self.sum(lambda: [torch.tensor(float(part()))])[0].item() == self.size

    @torch.no_grad()
    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Give ``tensors`` the values that they have in process 0."""
        if self.group is None:
            return
        for tensor, value in zip(tensors, self._of_first(tensors), strict=True):
            tensor.copy_(value)

    @torch.no_grad()
    def check_same(self, what: str, tensors: Sequence[Tensor]) -> None:
        """Refuse tensors that differ between processes."""
        if self.group is None:
            return
        first = self._of_first(tensors)
        if not self.all(lambda: all(torch.equal(a, b) for a, b in zip(tensors, first, strict=True))):
            raise InvalidData(f"{what} differ between the processes: build the same model in each of them")

    def _of_first(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        self._together(lambda: tensors, lambda found: sum(t.numel() for t in found), "parameters")
        buffer = _flat(tensors).to(self._device)
        with self._reachable():
            source = self._distributed.get_global_rank(self.group, 0)
            self._distributed.broadcast(buffer, source, group=self.group)
        return _unflat(buffer, tensors)

    def _together(self, part: Callable[[], Any], size: Callable[[Any], int], what: str) -> Any:
        """What ``part`` returns here, once it is known that it went well, at the same size, everywhere."""
        found, error = None, None
        try:
            found = part()
        except Exception as raised:
            error = raised
        state = torch.tensor([error is not None, 0 if error else size(found)], device=self._device)
        states = [torch.empty_like(state) for _ in range(self.size)]
        with self._reachable():
            self._distributed.all_gather(states, state, group=self.group)
            failed = [rank for rank, other in enumerate(states) if other[0]]
            messages: list[Any] = [None] * self.size
            if failed:
                told = None if error is None else (type(error).__name__, str(error))
                self._distributed.all_gather_object(messages, told, group=self.group)
        if error is not None:
            raise error
        if failed:
            kind, message = messages[failed[0]]
            # A user's mistake is the same kind of error in every process; anything else is a failure of that one.
            known: Any = getattr(errors, kind) if kind in errors.__all__ else ProcessFailure
            raise known(f"process {failed[0]} of {self.size} raised {kind}: {message}")
        sizes = [int(other[1]) for other in states]
        if len(set(sizes)) > 1:
            raise InvalidData(
                f"the processes have {sizes} {what}: build the same model, with data of the same width, in each of them"
            )
        return found

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ProcessFailure(
                f"process {self.rank} of {self.size} cannot reach the others, one of which has ended or hangs: {error}. "
                "Restart all of them from the last checkpoint"
            ) from error


_EVALUATE, _DONE, _FAILED = 0.0, 1.0, 2.0


def led_by_first(
    processes: Processes,
    parameters: Sequence[Tensor],
    objective: Callable[[], Tensor],
    ascend: Callable[[Callable[[], Tensor]], tuple[float, float]],
) -> tuple[float, float]:
    """Run an optimiser in process 0 while the others evaluate where it asks for it.

    An optimiser in every process would part at the first decision that hangs on rounding.

    Args:
        processes: all of them call this function.
        parameters: to be optimised; those of process 0 count.
        objective: collective; the sum over all processes.
        ascend: given a function that evaluates the objective, moves ``parameters`` and returns two numbers.

    Returns:
        The numbers that ``ascend`` returned in process 0.
    """

    def send(word: float, before: float = 0.0, after: float = 0.0) -> Tensor:
        head = torch.tensor([word, before, after], dtype=torch.float64)
        processes.broadcast([head, *parameters])
        return head

    def lead() -> Tensor:
        send(_EVALUATE)
        return objective()

    if processes.rank == 0:
        try:
            before, after = ascend(lead)
        except ProcessFailure:
            raise
        except Exception:
            send(_FAILED)
            raise
        send(_DONE, before, after)
        return before, after
    failure: ValueError | None = None
    while True:
        word, before, after = send(_EVALUATE).tolist()
        if word == _DONE:
            return before, after
        if word == _FAILED:
            raise failure or ProcessFailure(f"process 0 of {processes.size} gave up its round of L-BFGS")
        try:
            objective()
            failure = None
        except ProcessFailure:
            raise
        except ValueError as error:
            # As in process 0, where the line search turns back from it, or fails.
            failure = error


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double() for t in tensors])


def _unflat(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = buffer.split([t.numel() for t in like])
    return [part.reshape(t.shape).to(t) for part, t in zip(parts, like, strict=True)]
