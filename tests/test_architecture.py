# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Data flows one way, files stay small, and importing changes nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pyro_cpa"
# A module imports only from its own rank (without a cycle) and from ranks before it.
RANKS = (
    "errors",
    "compiled",
    "partition",
    "integrals",
    "distributions",
    "infer",
    "datasets",
    "models",
    "criticism",
    "plotting",
    "demo",
)
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def rank(module):
    parts = module.split(".")
    return len(RANKS) if len(parts) == 1 else RANKS.index(parts[1])


def imports(path):
    """(module, at top level) of everything of the package that a file imports."""
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    top = set()
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        top.add(node)
        pending += ast.iter_child_nodes(node)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "pyro_cpa":
                yield name, node in top


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_one_way(path):
    own = rank(module_name(path))
    for name, _ in imports(path):
        assert rank(name) <= own, f"{module_name(path)} imports {name}, which comes after it in {RANKS}"


def test_no_import_cycles():
    graph = {m: {n for n, top in imports(p) if top and n != m and n in MODULES} for m, p in MODULES.items()}
    done: set[str] = set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in graph[module]:
                visit(other, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_are_small_headed_and_say_what_is_public(path):
    text = path.read_text()
    lines = text.splitlines()
    assert len(lines) <= MAX_LINES, f"{len(lines)} lines: split it"
    assert lines[0] == "# Copyright the pyro_cpa developers"
    assert lines[1] == "# SPDX-License-Identifier: Apache-2.0"
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "no module docstring"
    names = [
        n.target if isinstance(n, ast.AnnAssign) else n.targets[0]
        for n in tree.body
        if hasattr(n, "value") and isinstance(n, ast.Assign | ast.AnnAssign)
    ]
    assert [ast.unparse(n) for n in names].count("__all__") == 1 or path.name == "__main__.py", "no __all__"
    assert all(
        not isinstance(n, ast.Assert) or "is not None" in ast.unparse(n.test) for n in ast.walk(tree)
    ), "an assert: user errors raise a CPAError"


STATE = """
import random, sys, warnings, numpy as np, torch, pyro
pyro.set_rng_seed(3)
pyro.param("kept", torch.ones(1))

def state():
    return (
        torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), pyro.settings.get(),
        pyro.infer.util.is_validation_enabled(),
        torch.distributions.Distribution._validate_args,
        random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(),
        sorted(pyro.get_param_store().keys()), warnings.filters[:],
    )

before = state()
import pkgutil, importlib, pyro_cpa
# The front doors of an optional dependency subclass it, or are programs; no package imports them.
FRONT_DOORS = ("pyro_cpa.criticism.density", "pyro_cpa.demo")
for module in pkgutil.walk_packages(pyro_cpa.__path__, "pyro_cpa."):
    if not module.name.startswith(FRONT_DOORS):
        importlib.import_module(module.name)
after = state()
changed = [i for i, (a, b) in enumerate(zip(before, after)) if a != b]
assert not changed, changed
for optional in ("matplotlib", "sklearn", "pandas", "lightning", "mpmath", "scipy.stats"):
    assert optional not in sys.modules or optional in OPTIONAL_BEFORE, optional + " was imported"
print("unchanged")
"""


def test_importing_changes_no_global_state_and_loads_no_optional_dependency():
    # ArviZ and Pyro may load some of the optional packages themselves: what they load is not ours.
    preamble = "import sys, pyro, torch, numpy, arviz\nOPTIONAL_BEFORE = set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", preamble + STATE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "unchanged"
