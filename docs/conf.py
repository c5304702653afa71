# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Sphinx: ``make docs``."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

import pyro_cpa

__all__ = ["setup"]

project = "pyro_cpa"
author = copyright = "the pyro_cpa developers"
version = release = pyro_cpa.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "myst_parser",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"pyro_cpa {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = [("Shapes", "notes_style")]
python_use_unqualified_type_names = True
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

# Every reference leads somewhere, but those to other libraries and to aliases of types.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(abc|collections|enum|numpy|os|pathlib|pyro|sklearn|torch)\..*"),
    ("py:class", r"(nn\.)?(Module|Tensor)|Axes|Distribution|ELBO|ExpandedDistribution|PyroOptim"),
    (
        "py:class",
        r"Activation|Bounds|ClusterTreatment|Correction|Estimator|GuideObjective|History|LabelPlacement",
    ),
    ("py:class", r"NoiseKind|PathStatistics|PiecewiseJoint|Rule|pyro_cpa\.partition\.layers\..*"),
]


def resolve_short_name(
    app: Sphinx, env: BuildEnvironment, node: nodes.Element, contnode: nodes.Element
) -> nodes.reference | None:
    """A name, or class and method, that only one documented object ends in leads to this object."""
    ending = "." + str(node.get("reftarget", ""))
    if node.get("refdomain") != "py":
        return None
    objects = env.get_domain("py").data["objects"]
    found = [(name, entry) for name, entry in objects.items() if name.endswith(ending) and not entry.aliased]
    if len(found) != 1:
        return None
    name, entry = found[0]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, name)


def hide_private_bases(app: Sphinx, name: str, obj: type, options: Any, bases: list[Any]) -> None:
    """Show the public ancestors of a class in place of its private ones."""
    while private := [base for base in bases if getattr(base, "__name__", "").startswith("_")]:
        for base in private:
            place = bases.index(base)
            bases[place : place + 1] = base.__bases__


def keep_initials(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Text that starts with a letter and a dot, "K." or "R. Neal", is no numbered list."""
    lines[:] = [re.sub(r"^(\s*|\s+[\w*, ]+: )([A-Z])\.(?= |$)", r"\1\2\\.", line) for line in lines]


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", keep_initials, priority=400)  # before napoleon's
    app.connect("missing-reference", resolve_short_name)
    app.connect("autodoc-process-bases", hide_private_bases)
