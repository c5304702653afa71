# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Rows divided among processes give the fit of one process, and one process's error is everyone's."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from exact_pairs import Exact
from two_processes import FITS
from warm_python import WarmPython, two_ranks

from pyro_cpa.errors import CPAError
from pyro_cpa.infer import EM, AutoCPAPosterior
from pyro_cpa.infer.process_group import Processes

SCRIPT = Path(__file__).with_name("two_processes.py")


def start(job: str, folder: Path) -> list[WarmPython]:
    return two_ranks(SCRIPT, job, str(folder))


def run(job: str, folder: Path) -> list[dict]:
    """What the two processes of a job saved."""
    assert [process.wait(300) for process in start(job, folder)] == [0, 0]
    return [torch.load(folder / f"{job}{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    return run("fits", tmp_path_factory.mktemp("fits"))


@pytest.mark.parametrize("name", FITS)
def test_two_processes_give_the_result_of_one(fits, name):
    (first, alone), (second, _) = fits[0][name], fits[1][name]
    assert first["losses"][-1] < first["losses"][0] - 5 and first["rows"] == 60
    for key, expected in alone.items():
        torch.testing.assert_close(first[key], expected, rtol=1e-10, atol=1e-10)
        # Not nearly: the processes may never part.
        if isinstance(expected, torch.Tensor):
            assert torch.equal(first[key], second[key])
        else:
            assert first[key] == second[key]


def test_all_start_from_the_parameters_of_process_0(fits):
    expected = fits[0]["em"][0]
    for found in (fits[0]["other start"], fits[1]["other start"]):
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-12, atol=0)


def test_what_is_sent_is_what_the_docstrings_say(tmp_path):
    for found in run("numbers", tmp_path):
        for name, (statistics, R, gradient, P) in found.items():
            L, D, full = 1, 2, "full" in name
            assert statistics == R * (L + 1) * (L + 1 + D) + (D**2 if full else D) + 1
            assert gradient == P + 1


def test_an_error_of_one_process_is_raised_by_all_before_any_update(tmp_path):
    first, second = run("errors", tmp_path)
    for fit in ("em", "l-bfgs"):
        assert second[f"{fit}, infinite"][1].startswith("the data holds inf in row 3, column 1")
        assert first[f"{fit}, infinite"] == (
            "InvalidData",
            f"process 1 of 2 raised InvalidData: {second[f'{fit}, infinite'][1]}",
        )
        for found in (first, second):
            assert found[f"{fit}, unchanged"] and found[f"{fit}, again"] == ("none", "")
            assert found[f"{fit}, regions"][0] == "RegionBudgetExceeded"
    assert first["foreign error"] == ("ProcessFailure", "process 1 of 2 raised OSError: the disk is gone")
    assert second["foreign error"] == ("OSError", "the disk is gone")
    for found in (first, second):
        assert "build the same model" in found["width"][1] and "[" in found["width"][1]
        assert found["constants"][1].startswith("prior, noise or decoder differ between the processes")
        assert found["no group"][1].startswith("process_group is a int: expected torch.distributed")


def test_the_death_of_a_process_is_an_error_in_the_other(tmp_path):
    assert [process.wait(120) for process in start("death", tmp_path)] == [0, -signal.SIGKILL]
    kind, message = torch.load(tmp_path / "death0.pt")["death"]
    assert kind == "ProcessFailure" and "Restart all of them from the last checkpoint" in message


def test_without_a_group_nothing_is_sent(monkeypatch):
    for name in ("all_reduce", "all_gather", "broadcast"):
        monkeypatch.setattr(torch.distributed, name, None)
    alone, one = Processes(), torch.ones(2)
    assert alone.size == 1 and alone.sum(lambda: [one])[0] is one and alone.all(lambda: True)
    alone.broadcast([one])
    alone.check_same("", [one])


def test_a_group_without_initialisation_is_refused():
    with pytest.raises(CPAError, match="init_process_group"):
        Processes(object())
    model = Exact(1, 4, 2)
    with pytest.raises(CPAError, match="init_process_group"):
        EM(model, AutoCPAPosterior(model, decoder=model.decoder), process_group=object())
