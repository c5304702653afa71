# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Every script under ``benchmarks`` runs, and the page that one of them writes has a place for each table."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path.name for path in (ROOT / "benchmarks").glob("*.py") if "\nif __name__ ==" in path.read_text()
)
# What a script must be told besides --smoke.
ARGUMENTS = {"models.py": ["--all"]}


@pytest.mark.parametrize("script", SCRIPTS)
def test_smoke(script, tmp_path):
    folder = tmp_path / "benchmarks"  # a copy, so that results do not land in the repository
    folder.mkdir()
    for path in (ROOT / "benchmarks").glob("*.py"):
        shutil.copy(path, folder)
    done = subprocess.run(
        [sys.executable, str(folder / script), *ARGUMENTS.get(script, []), "--smoke"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def side_by_side():
    spec = importlib.util.spec_from_file_location("side_by_side", ROOT / "benchmarks/renyi_side_by_side.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_holds_every_table_and_no_other_figures():
    script = side_by_side()
    page = script.PAGE.read_text()
    tables = re.findall(r"<!-- (\w+) -->\n(.*?)<!-- end (\w+) -->", page, flags=re.DOTALL)
    assert [name for name, _, _ in tables] == [end for _, _, end in tables] == list(script.TABLES)
    assert all(text.startswith("| ") for _, text, _ in tables)
    prose = re.sub(r"<!-- (\w+) -->\n.*?<!-- end \1 -->", "", page, flags=re.DOTALL)
    assert not re.search(r"\d\.\d\d|±", prose)


def test_tables_are_inserted_between_their_markers():
    script = side_by_side()
    page = "a\n<!-- t -->\nold\n<!-- end t -->\nb\n"
    assert script.insert(page, "t", "new") == page.replace("old", "new")
    with pytest.raises(ValueError, match="0 places"):
        script.insert(page, "other", "new")
