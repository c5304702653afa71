# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml, Makefile and checks say of each other; ``make package`` builds and installs for real."""

from __future__ import annotations

import re
from pathlib import Path

import pyro_cpa

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: pytest brings its twin
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
CHECKS = (ROOT / ".github" / "workflows" / "checks.yml").read_text()
TARGETS = set(re.findall(r"^([\w-]+):", MAKEFILE, re.M))


def test_one_version():
    assert PROJECT["project"]["version"] == pyro_cpa.__version__
    assert f"## {pyro_cpa.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_types_are_shipped():
    assert (ROOT / "pyro_cpa" / "py.typed").exists()


def test_source_distribution_names_files_that_exist():
    for path in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]:
        assert path.startswith("/") and (ROOT / path[1:]).exists(), path


def test_pythons_are_the_same_everywhere():
    project = PROJECT["project"]
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"]).groups()
    assert named == [f"3.{minor}" for minor in range(int(low), int(high))]
    tests = CHECKS.split("\n  tests:")[1].split("\n\n")[0]
    assert re.findall(r'"(3\.\d+)"', tests) == named


def test_checks_run_targets_that_exist():
    used = re.findall(r"run: make (.*)", CHECKS)
    assert used
    for words in used:
        for word in re.sub(r'\w+=("[^"]*"|\S+)', "", words).split():
            extra = re.fullmatch(r"\.venv/installed-(\w+)", word)
            known = extra and extra[1] in PROJECT["project"]["optional-dependencies"]
            assert word in TARGETS or known, word


def test_targets_are_phony():
    (phony,) = re.findall(r"^\.PHONY: (.*)", MAKEFILE, re.M)
    assert set(phony.split()) == TARGETS


def test_pins_are_of_things_that_are_used():
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.M))
    project = PROJECT["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    required = {re.match(r"[\w-]+", item)[0] for items in lists for item in items}
    assert pinned - required == {"build"}  # scripts/check_package.py installs it
