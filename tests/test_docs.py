# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The documentation has every public name on its page, leads to files that exist, and builds without a warning."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGES = sorted(
    path.stem
    for path in (ROOT / "pyro_cpa").iterdir()
    if (path / "__init__.py").exists() or path.name == "errors.py"
)
PAGES = sorted(path for pattern in ("*.md", "*.rst") for path in DOCS.glob(f"**/{pattern}"))
BUILDERS = [name for name in ("sphinx", "furo", "myst_parser") if find_spec(name) is None]


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "demo"])
def test_every_public_name_is_on_the_page_of_its_package(package):
    page = (DOCS / "api" / f"{package}.rst").read_text()
    shown = re.findall(r"^\.\. auto(?:class|function|exception|module):: ([\w.]+)$", page, re.M)
    assert len(shown) == len(set(shown))
    # The full names are those of bases and results, which have no public short name.
    own = [name for name in shown if "." not in name]
    own += [name.rpartition(".")[2] for name in shown if re.fullmatch(rf"pyro_cpa\.{package}\.\w+", name)]
    public = importlib.import_module(f"pyro_cpa.{package}").__all__
    assert sorted(own) == sorted(public), f"docs/api/{package}.rst"


def test_tables_and_commands_come_from_files_that_exist():
    for page in PAGES:
        text = re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.S)
        for path in re.findall(r"^:file: (\S+)$", text, re.M):
            assert (page.parent / path).exists(), f"{page.name}: {path}"
        for path in re.findall(r"\b(?:benchmarks|tests|scripts|tutorials)/[\w/]+(?:\.\w+)?", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


@pytest.mark.skipif(
    bool(BUILDERS), reason=f"not installed: {', '.join(BUILDERS)} (pip install .[docs], make docs)"
)
def test_it_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
