# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Every test starts from the same state: empty parameter store, seed 0, validation on, float64."""

import os
from pathlib import Path

import pyro
import pytest
import torch

SHARED_DATA = Path(os.environ.get("PYRO_CPA_DATA", Path(__file__).parents[2] / "shared" / "data"))


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tests/test_devices.py runs, cuda for one")


# Tens of seconds each; all others take one at the most, or a few.
LONGEST = ("test_tutorials.py", "test_benchmarks.py")


def pytest_collection_modifyitems(items):
    """The longest tests first: processes that share the tests (``-n 2``) then end at the same time."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def device(request):
    """The device asked for by ``--device``; the test skips, saying why, where there is none."""
    name = request.config.getoption("--device")
    try:
        torch.empty(1, device=name)
    except (AssertionError, RuntimeError) as error:
        pytest.skip(f"no device {name!r} here: {str(error).splitlines()[0]}")
    return torch.device(name)


@pytest.fixture(autouse=True)
def fresh_state():
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(True):
        yield
    # Not what it was before: fixtures of wider scope may have run first, and doctests come in between.
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def shared_data():
    """Path of an optional data file; the test skips, saying why, where it is absent."""

    def find(name: str) -> Path:
        path = SHARED_DATA / name
        if not path.exists():
            pytest.skip(f"optional data file {path} is absent (set PYRO_CPA_DATA to its folder)")
        return path

    return find
