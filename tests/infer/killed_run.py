# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""A fit that saves a checkpoint after each step, and is killed by ``test_faults.py``: arguments are its name and a file."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from exact_pairs import Exact, circle

from pyro_cpa.infer import EM, AutoCPAPosterior, ExactML, save_checkpoint

FITS: dict[str, Any] = {
    "em": (EM, {}),
    "em with l-bfgs": (EM, {"accelerate": "lbfgs", "warm_up": 2, "lbfgs_iterations": 3}),
    "l-bfgs": (ExactML, {"warm_start": 0, "iterations_per_step": 3}),
    "ml": (ExactML, {"warm_start": 2, "iterations_per_step": 3}),
}


def training(name: str) -> tuple[Any, Any, torch.Tensor]:
    kind, arguments = FITS[name]
    model = Exact(1, 4, 2, seed=5)
    first = model.decoder[0]
    # Walls spread over the prior: elsewhere the M-step is ill-conditioned, and magnifies rounding.
    first.weight.data = torch.where(first.weight > 0, 1.0, -1.0)
    first.bias.data = -first.weight.data[:, 0] * torch.linspace(-1.0, 1.0, 4)
    return model, kind(model, AutoCPAPosterior(model, decoder=model.decoder), **arguments), circle(60)


def main(name: str, path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    model, fit, x = training(name)

    def save(_: Any) -> None:
        save_checkpoint(path, model=model, fit=fit)
        path.with_suffix(".steps").write_text(str(len(fit.history)))
        time.sleep(0.3)

    path.with_suffix(".steps").write_text("0")
    fit.run(x, num_steps=8, tol=0.0, progress=False, callback=save)
    time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
