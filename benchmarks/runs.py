# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What the scripts that train share: data, training that resumes, and rows of a table that say where they are from."""

from __future__ import annotations

import argparse
import csv
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.params.param_store import StateDict
from torch import Tensor
from tqdm.auto import tqdm

from pyro_cpa import __version__
from pyro_cpa.datasets import Dataset, load_binary, minibatches
from pyro_cpa.errors import InvalidData
from pyro_cpa.infer import load_checkpoint, save_checkpoint

__all__ = [
    "FUSED",
    "Folders",
    "Limits",
    "Progress",
    "arguments",
    "batches",
    "binary_table",
    "folders",
    "in_turn",
    "kept",
    "mean_and_error",
    "mean_and_interval",
    "minimise",
    "provenance",
    "publish",
    "put",
    "show",
    "train",
    "with_own_store",
]

HERE = Path(__file__).parent
SAVE_SECONDS = 60.0
FUSED = torch.__version__ >= (2, 4)  # from there Adam's step is a single loop on the CPU too
LAST = ["training wall s", "training CPU s", "wall s", "CPU s", "threads", "versions", "command"]


# ---- command line and folders ----------------------------------------------------------------------------


def arguments(doc: str | None, data: str | None = None) -> argparse.ArgumentParser:
    """A parser with ``--smoke``, and ``--data`` if ``data`` says what is read there."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="seconds; figures mean nothing, nothing is kept")
    if data:
        parser.add_argument("--data", type=Path, help=f"{data}; default: the folder in PYRO_CPA_DATA")
    return parser


@dataclass(frozen=True)
class Folders:
    checkpoints: Path
    results: Path


@contextmanager
def folders(smoke: bool) -> Iterator[Folders]:
    """benchmarks/checkpoints and benchmarks/results; for a smoke run, folders that vanish."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) if smoke else HERE
        found = Folders(root / "checkpoints", root / "results")
        found.checkpoints.mkdir(exist_ok=True)
        found.results.mkdir(exist_ok=True)
        yield found


def binary_table(name: str, path: Path | None) -> Dataset:
    """Training, validation and test rows of ``name``.npz.

    Raises:
        InvalidData: if the file is not there; the message says where it was sought.
    """
    own = os.environ.get("PYRO_CPA_DATA")
    roots = [Path(root).expanduser() for root in ((path,) if path else (own,) if own else ())]
    candidates = [root if root.suffix == ".npz" else root / f"{name}.npz" for root in roots]
    for candidate in candidates:
        if candidate.is_file():
            return load_binary(candidate)
    raise InvalidData(
        f"{name.upper()} was not found; sought: {', '.join(map(str, candidates)) or 'nowhere'}. Expected {name}.npz "
        "with binary arrays train, valid and test. Give its folder as --data, or in the environment variable "
        "PYRO_CPA_DATA."
    )


# ---- training --------------------------------------------------------------------------------------------


class Progress:
    """Steps taken and seconds spent, over all runs of a checkpoint."""

    def __init__(self) -> None:
        self.steps, self.wall, self.cpu = 0, 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Stopwatch:
    """Wall and CPU seconds since it was last read."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        spent = wall - self.wall, cpu - self.cpu
        self.wall, self.cpu = wall, cpu
        return spent


def batches(*tensors: Tensor, size: int, seed: int, steps: int) -> Iterator[tuple[Tensor, ...]]:
    """Shuffled minibatches without end, the first ``steps`` left out."""
    epoch, done = divmod(steps, math.ceil(len(tensors[0]) / size))
    while True:
        for index, batch in enumerate(minibatches(*tensors, batch_size=size, seed=seed, epoch=epoch)):
            if index >= done:
                yield batch  # type: ignore[misc]  # none is None
        epoch, done = epoch + 1, 0


@dataclass(frozen=True)
class Limits:
    """Where training stops: steps in all, those of a checkpoint included, or CPU minutes of this run."""

    steps: int
    minutes: float = math.inf


def train(
    model: Any,
    loss: Callable[..., Tensor],
    source: Callable[[int], Iterator[tuple[Tensor, ...]]],
    lr: float,
    limits: Limits,
    path: Path,
    after: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Adam up to the limits, from the checkpoint at ``path`` if there is one.

    Args:
        model: a module.
        loss: of a batch.
        source: batches, given the steps already taken.
        lr: of Adam.
        limits: where to stop.
        path: of the checkpoint.
        after: called after each step, for a learning curve; not within the seconds that are counted.
    """
    optim, progress = torch.optim.Adam(model.parameters(), lr, fused=FUSED), Progress()
    parts = {"model": model, "optim": optim, "progress": progress}
    if path.exists():
        load_checkpoint(path, **parts)
    model.train()
    stream = source(progress.steps)
    watch, begun, smooth = Stopwatch(), time.process_time(), math.nan
    saved = time.perf_counter()
    with tqdm(total=limits.steps, initial=progress.steps, desc=path.stem, mininterval=2.0) as bar:
        while progress.steps < limits.steps and time.process_time() < begun + 60 * limits.minutes:
            optim.zero_grad()
            value = loss(*next(stream))
            value.backward()
            optim.step()
            progress.steps += 1
            smooth = value.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * value.item()
            bar.update()
            bar.set_postfix(loss=f"{smooth:.2f}", refresh=False)
            wall, cpu = watch.read()
            progress.wall, progress.cpu = progress.wall + wall, progress.cpu + cpu
            after(progress)
            watch.read()
            if time.perf_counter() > saved + SAVE_SECONDS:
                save_checkpoint(path, **parts)
                saved = time.perf_counter()
    save_checkpoint(path, **parts)
    return progress


def minimise(parameters: Sequence[Tensor], loss: Callable[[], Tensor], steps: int) -> None:
    """The parameters at the minimum of a deterministic loss, by L-BFGS with at most so many steps."""
    optim = torch.optim.LBFGS(parameters, max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optim.zero_grad()
        value = loss()
        value.backward()
        return value

    optim.step(closure)


# ---- times ------------------------------------------------------------------------------------------------


@dataclass
class Seconds:
    """What the rounds of one of several took."""

    wall: list[float]
    cpu: list[float]


def with_own_store(step: Callable[[], Any]) -> Callable[[], None]:
    """``step`` with a parameter store of its own: two nets of one class would share Pyro's."""
    state: StateDict = {"params": {}, "constraints": {}}

    def alone() -> None:
        with pyro.get_param_store().scope(state=state):
            step()

    return alone


def in_turn(steps: dict[str, Callable[[], None]], rounds: int, repeats: int = 1) -> dict[str, Seconds]:
    """Seconds that each of ``steps`` takes ``repeats`` times, round after round, side by side in one run."""
    found, order = {name: Seconds([], []) for name in steps}, list(steps)
    for i in range(rounds):
        for name in order[i % len(order) :] + order[: i % len(order)]:  # no fixed neighbours in time
            watch = Stopwatch()
            for _ in range(repeats):
                steps[name]()
            wall, cpu = watch.read()
            found[name].wall.append(wall)
            found[name].cpu.append(cpu)
    return found


# ---- tables ----------------------------------------------------------------------------------------------


def provenance() -> dict[str, str]:
    return {
        "threads": str(torch.get_num_threads()),
        "versions": f"pyro_cpa {__version__}, torch {torch.__version__}, pyro {pyro.__version__}, "
        f"Python {platform.python_version()}",
    }


def kept(path: Path, keys: Sequence[str]) -> dict[tuple[str, ...], dict[str, str]]:
    """The rows of the table at ``path``, if there is one, by the values of ``keys``."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {tuple(row[key] for key in keys): row for row in csv.DictReader(file)}


def put(path: Path, rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, str]]:
    """Puts ``rows`` into the table at ``path`` in place of older ones with the same ``keys``; returns all rows."""
    table = kept(path, keys)
    for row in rows:
        table[tuple(str(row[key]) for key in keys)] = {head: str(value) for head, value in row.items()}
    found = list(table.values())
    _write(path, found)
    return found


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    heads = list(dict.fromkeys(head for row in rows for head in row))
    heads = [head for head in heads if head not in LAST] + [head for head in LAST if head in heads]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, heads, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def mean_and_error(values: Tensor, digits: int = 3) -> str:
    """The mean and its standard error."""
    return f"{values.mean():.{digits}f} +- {values.std() / len(values) ** 0.5:.{digits}f}"


def mean_and_interval(values: Sequence[float]) -> str:
    """The mean, and half of a 95 % t-interval where there is more than one value."""
    from scipy import stats

    mean = f"{sum(values) / len(values):.3f}"
    if len(values) == 1:
        return mean
    return f"{mean} +- {stats.sem(values) * stats.t.ppf(0.975, len(values) - 1):.3f}"


def show(rows: Sequence[dict[str, Any]], leave_out: Sequence[str] = ("versions", "command")) -> None:
    """Prints a table."""
    heads = [head for head in dict.fromkeys(h for row in rows for h in row) if head not in leave_out]
    cells = [heads, *([str(row.get(head, "")) for head in heads] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


def publish(title: str, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Prints a table under its title and writes it to ``path``; nothing where there are no rows."""
    if not rows:
        return
    print(f"\n{title}")
    show(rows)
    path.parent.mkdir(exist_ok=True)
    _write(path, rows)
