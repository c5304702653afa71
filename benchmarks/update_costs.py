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
from collections.abc import Callable
from statistics import median
from typing import Any

import pyro
import torch
from discrete_mnist import BATCH, COST, COSTED, LR, OBJECTIVES, PARTICLES, build, images, loss_of
from runs import FUSED, arguments, batches, folders, in_turn, provenance, put, show, with_own_store
from torch import Tensor

__all__: list[str] = []

UPDATES, WARM = 5, 3  # of a round, and before the first
BASE = "ELBO"


def trainer(name: str, objective: str, S: int, x: Tensor, smoke: bool) -> Callable[[], None]:
    """An update of a net of its own, with a parameter store of its own."""
    torch.manual_seed(0)
    model = build(name, x, smoke)
    loss = loss_of(model, name, objective, S)
    optim = torch.optim.Adam(model.parameters(), LR, fused=FUSED)
    source = batches(x, size=BATCH, seed=0, steps=0)

    def update() -> None:
        (batch,) = next(source)
        optim.zero_grad()
        (loss(batch) / len(batch)).backward()
        optim.step()

    return with_own_store(update)


def measure(name: str, S: int, x: Tensor, rounds: int, smoke: bool) -> list[dict[str, Any]]:
    """A row for each objective of a model."""
    updates = {objective: trainer(name, objective, S, x, smoke) for objective in OBJECTIVES[name]}
    for update, _ in itertools.product(updates.values(), range(WARM)):
        update()
    seconds = in_turn(updates, rounds, UPDATES)
    base = seconds[BASE].cpu
    return [
        {
            "model": name,
            "objective": objective,
            "S": S,
            COST: f"{1e3 * median(spent.cpu) / UPDATES:.2f}",
            "wall ms": f"{1e3 * median(spent.wall) / UPDATES:.2f}",
            "to the ELBO's": f"{median(a / b for a, b in zip(spent.cpu, base, strict=True)):.2f}",
            "rounds": rounds,
            **provenance(),
        }
        for objective, spent in seconds.items()
    ]


def main() -> None:
    parser = arguments(__doc__, "folder or .npz file of MNIST")
    parser.add_argument("--rounds", type=int, default=20, help=f"of {UPDATES} updates of each objective")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    data = images(options)
    rounds, particles = (1, PARTICLES[:1]) if options.smoke else (options.rounds, PARTICLES)
    with folders(options.smoke) as place:
        for name, S in itertools.product(OBJECTIVES, particles):
            rows = measure(name, S, data.x_train, rounds, options.smoke)
            put(place.results / "update_costs.csv", rows, COSTED)
            show(rows)


if __name__ == "__main__":
    main()
