# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The README's code prints what it says there, and its catalogue is the packages' own."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.S)
CATALOGUE = dict(re.findall(r"^\| `pyro_cpa\.(\w+)` \| \|.*\n\|[-|]+\n((?:\|.*\n)+)", README, re.M))
TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))
PACKAGES = sorted(
    path.stem
    for path in (ROOT / "pyro_cpa").iterdir()
    if (path / "__init__.py").exists() or path.name == "errors.py"
)


def public_names():
    for package in PACKAGES:
        for name in importlib.import_module(f"pyro_cpa.{package}").__all__:
            yield package, name


def words(texts):
    return set(re.findall(r"\w+", "\n".join(texts)))


@pytest.mark.parametrize(("code", "printed"), EXAMPLES)
def test_examples_print_what_the_readme_says(code, printed):
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed


def test_every_python_block_is_run():
    assert 1 <= len(EXAMPLES) == README.count("```python")


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "demo"])
def test_the_catalogue_holds_all_public_names_and_no_others(package):
    rows = CATALOGUE.get(package, "").splitlines()
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert len(listed) == len(set(listed))
    public = importlib.import_module(f"pyro_cpa.{package}").__all__
    assert sorted(listed) == sorted(public), f"README.md, table of pyro_cpa.{package}"


def test_every_public_name_occurs_in_a_test():
    lists = {Path(__file__).name, "test_docs.py"}
    tested = words(path.read_text() for path in (ROOT / "tests").rglob("*.py") if path.name not in lists)
    assert not [f"{package}.{name}" for package, name in public_names() if name not in tested]


def test_every_public_name_occurs_in_a_tutorial():
    cells = (cell for path in TUTORIALS for cell in json.loads(path.read_text())["cells"])
    shown = words("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    # The program is run from the command line; modules of integrals hold what `log_mass` dispatches to.
    assert not [
        f"{package}.{name}" for package, name in public_names() if package != "demo" and name not in shown
    ]


def test_figures_are_those_of_the_results():
    script = ROOT / "scripts" / "readme_figures.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_links_lead_to_files_that_exist():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_map_shows_every_package():
    table = README.split("## Where things are")[1].split("\n## ")[0]
    shown = re.findall(r"`pyro_cpa/(\w+)`", table)
    assert sorted(shown) == [name for name in PACKAGES if name != "errors"]


def test_commands_and_files_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^    |`)make ([\w-]+)", README, re.M)) <= targets
    for path in re.findall(r"tests/test_\w+\.py", README):
        assert (ROOT / path).exists(), path


def test_the_first_screen_has_the_problem_the_commands_and_the_example():
    first = "\n".join(README.splitlines()[:40])
    assert "make demo" in first and "make test" in first and "```text" in first
    assert max(map(len, README.split("## What it has")[0].splitlines())) <= 120
