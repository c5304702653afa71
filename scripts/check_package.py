# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What a user installs: build the package, install the wheel alone, run the README's example.

    python scripts/check_package.py            # needs an index to install from; a few minutes
    python scripts/check_package.py --keep dist

Builds the source distribution, and the wheel from it; checks what is in them; installs the wheel into a new
virtual environment away from the checkout; runs every example of the README there and compares its output.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
EXAMPLE = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.S)
# What a reader of the source distribution needs to run the two commands of the README.
IN_SOURCE = ("README.md", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt", "pyproject.toml")


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, without what would let the checkout be imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def new_environment(folder: Path, *install: str | Path) -> Path:
    """The interpreter of a new virtual environment with these packages in it."""
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    for what in install:
        run(python, "-m", "pip", "install", "--quiet", "-c", CONSTRAINTS, what, cwd=folder.parent)
    return python


def checkout(*below: str) -> set[str]:
    """Files of the checkout, those that git would ignore left out."""
    return set(run("git", "ls-files", "-co", "--exclude-standard", *below, cwd=ROOT).splitlines())


def check_contents(source: Path, wheel: Path) -> None:
    """Every file of the package is in both; the source distribution can also be built and tested."""
    with tarfile.open(source) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    package = checkout("pyro_cpa")
    wanted = package | checkout("tests", "benchmarks", "docs", "tutorials", "scripts") | set(IN_SOURCE)
    if missing := sorted(wanted - held):
        raise SystemExit(f"{source.name} lacks {missing}: see [tool.hatch.build.targets.sdist]")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    if missing := sorted(package - held):
        raise SystemExit(f"{wheel.name} lacks {missing}")
    if extra := sorted(name for name in held - package if ".dist-info/" not in name):
        raise SystemExit(f"{wheel.name} holds {extra}, which are no part of the package")
    if "pyro_cpa/py.typed" not in held:
        raise SystemExit(f"{wheel.name} lacks pyro_cpa/py.typed: type checkers would ignore its annotations")


def check_examples(python: Path, folder: Path) -> int:
    """Run every example of the README; its output must be what the README says."""
    where = run(python, "-c", "import pyro_cpa; print(pyro_cpa.__file__)", cwd=folder).strip()
    if ROOT in Path(where).resolve().parents:
        raise SystemExit(f"imported {where}: the checkout, and not the installed wheel")
    examples = EXAMPLE.findall((ROOT / "README.md").read_text())
    for code, expected in examples:
        printed = run(python, "-W", "error", "-c", code, cwd=folder)
        if printed != expected:
            raise SystemExit(f"README.md says\n{expected}\nthe installed wheel prints\n{printed}")
    return len(examples)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--keep", type=Path, help="folder to copy the two distributions to")
    keep = parser.parse_args().keep
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        builder = new_environment(folder / "builder", "build")
        run(builder, "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder)
        (source,) = (folder / "dist").glob("*.tar.gz")
        (wheel,) = (folder / "dist").glob("*.whl")
        check_contents(source, wheel)
        print(
            f"built {source.name} ({source.stat().st_size:,} bytes), {wheel.name} ({wheel.stat().st_size:,} bytes)"
        )
        # torch first and alone: a later range that it satisfies then installs nothing more.
        user = new_environment(folder / "user", "torch", wheel)
        run(user, "-m", "pip", "check", cwd=folder)
        count = check_examples(user, folder)
        print(
            f"installed {wheel.name} in a new environment: {count} example of README.md prints what it says"
        )
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            for built in (source, wheel):
                shutil.copy(built, keep)


if __name__ == "__main__":
    main()
