# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What an update costs under each objective of discrete_mnist.py, side by side.

    OMP_NUM_THREADS=1 python benchmarks/update_costs.py            # some minutes on an idle machine
    python benchmarks/update_costs.py --smoke                      # small nets, digits, in seconds; writes nothing

Trainings of that table can be days and machines apart, and their own seconds cannot be compared. Here the same nets take
the same updates (batch, loss, gradient, Adam) in turn within one run. "CPU ms an update" and "wall ms" are medians over the
rounds; "to the ELBO's" is the median, over the rounds, of the ratio to the ELBO of the same model and S in the same round.

Prints a table, kept in benchmarks/results/update_costs.csv; discrete_mnist.py reads times of its curves from it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pyro
import torch
from discrete_mnist import BATCH, COST, COSTED, LR, OBJECTIVES, PARTICLES, bound, build
from pyro.params.param_store import StateDict
from runs import FUSED, arguments, batches, folders, provenance, put, show
from torch import Tensor

from pyro_cpa.datasets import binarize, load_digits, load_mnist

__all__: list[str] = []

UPDATES, WARM = 5, 3  # of a round, and before the first
BASE = "ELBO"


def trainer(name: str, objective: str, S: int, x: Tensor, smoke: bool) -> Callable[[], None]:
    """An update of a net of its own, with a parameter store of its own."""
    torch.manual_seed(0)
    state: StateDict = {"params": {}, "constraints": {}}
    model = build(name, x, smoke)
    loss = bound(model, name, objective, S)
    optim = torch.optim.Adam(model.parameters(), LR, fused=FUSED)
    source = batches(x, size=BATCH, seed=0, steps=0)

    def update() -> None:
        with pyro.get_param_store().scope(state=state):
            (batch,) = next(source)
            optim.zero_grad()
            (loss(batch) / len(batch)).backward()
            optim.step()

    return update


def measure(name: str, S: int, x: Tensor, rounds: int, smoke: bool) -> list[dict[str, Any]]:
    """A row for each objective of a model."""
    updates = {objective: trainer(name, objective, S, x, smoke) for objective in OBJECTIVES[name]}
    for update, _ in itertools.product(updates.values(), range(WARM)):
        update()
    cpu: dict[str, list[float]] = {objective: [] for objective in updates}
    wall: dict[str, list[float]] = {objective: [] for objective in updates}
    order = list(updates)
    for i in range(rounds):
        for objective in order[i % len(order) :] + order[: i % len(order)]:  # no fixed neighbours in time
            begun, clock = time.process_time(), time.perf_counter()
            for _ in range(UPDATES):
                updates[objective]()
            cpu[objective].append(1e3 * (time.process_time() - begun) / UPDATES)
            wall[objective].append(1e3 * (time.perf_counter() - clock) / UPDATES)
    return [
        {
            "model": name,
            "objective": objective,
            "S": S,
            COST: f"{median(cpu[objective]):.2f}",
            "wall ms": f"{median(wall[objective]):.2f}",
            "to the ELBO's": f"{median(a / b for a, b in zip(cpu[objective], cpu[BASE], strict=True)):.2f}",
            "rounds": rounds,
            **provenance(),
        }
        for objective in updates
    ]


def main() -> None:
    parser = arguments(__doc__, "folder or .npz file of MNIST")
    parser.add_argument("--rounds", type=int, default=20, help=f"of {UPDATES} updates of each objective")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    data = (load_digits() if options.smoke else load_mnist(options.data)).map(binarize)
    rounds, particles = (1, PARTICLES[:1]) if options.smoke else (options.rounds, PARTICLES)
    with folders(options.smoke) as place:
        for name, S in itertools.product(OBJECTIVES, particles):
            rows = measure(name, S, data.x_train, rounds, options.smoke)
            put(place.results / "update_costs.csv", rows, COSTED)
            show(rows)


if __name__ == "__main__":
    main()
