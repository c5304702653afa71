# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Every tutorial runs in its short mode, and is committed as a full run left it."""

from __future__ import annotations

import importlib.util
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from warm_python import WarmPython

FOLDER = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 400_000
MISSING = [name for name in ("nbclient", "ipykernel", "matplotlib", "sklearn") if find_spec(name) is None]

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.fixture
def run(monkeypatch):
    """``tutorials/run.py``, its kernels warm."""
    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)} (pip install .[tutorials])")
    from jupyter_client.provisioning import local_provisioner

    def launch_kernel(command, env, cwd, **_):
        return WarmPython(*command[1:], env=env, cwd=cwd)

    monkeypatch.setattr(local_provisioner, "launch_kernel", launch_kernel)
    spec = importlib.util.spec_from_file_location("tutorials_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@each_notebook
def test_short_mode(run, path, tmp_path):
    run.main(["--smoke", "--to", str(tmp_path), path.name])
    short = code_cells(tmp_path / path.name)
    for stored, ran in zip(code_cells(path), short, strict=True):
        assert bool(stored["outputs"]) == bool(ran["outputs"]), f"stored outputs are stale:\n{ran['source']}"


@each_notebook
def test_stored_outputs_are_those_of_one_full_run(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "make tutorials"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(output["output_type"] != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs), "a warning or a progress bar"
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture"
    assert all("execution" not in cell["metadata"] for cell in cells), "times of execution"


@each_notebook
def test_reads_the_short_mode_first_and_stays_small(path):
    assert path.stat().st_size < MAX_BYTES, "lower the dpi of the figures"
    assert 'SMOKE = "PYRO_CPA_SMOKE" in os.environ' in "".join(code_cells(path)[0]["source"])


def test_numbers_are_those_of_the_index():
    numbers = [path.name[:2] for path in NOTEBOOKS]
    assert numbers == sorted(set(numbers))
    index = (FOLDER / "README.md").read_text()
    for path in NOTEBOOKS:
        assert f"({path.name})" in index, f"tutorials/README.md does not list {path.name}"
