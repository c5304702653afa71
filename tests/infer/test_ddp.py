# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Under DistributedDataParallel, and in Lightning with two processes, gradients are those of the whole batch.

Each process scales the losses of its rows by (number of processes) / (rows of all), for DDP takes the mean over processes.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from two_processes_ddp import OBJECTIVES
from warm_python import two_ranks

SCRIPT = Path(__file__).with_name("two_processes_ddp.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    assert [process.wait(300) for process in two_ranks(SCRIPT, str(folder))] == [0, 0]
    return [torch.load(folder / f"ddp{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", [*OBJECTIVES, "exact"])
def test_gradient_of_two_processes_is_that_of_the_whole_batch(found, name):
    for process in found:
        for parallel, alone in process[name]:
            assert alone.abs().max() > 1e-4
            torch.testing.assert_close(parallel, alone, rtol=1e-10, atol=1e-14)


def test_lightning_with_two_processes_takes_the_steps_of_one(found):
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed")
    for process in found:
        for parallel, alone in process["lightning"]:
            torch.testing.assert_close(parallel, alone, rtol=1e-10, atol=1e-14)
