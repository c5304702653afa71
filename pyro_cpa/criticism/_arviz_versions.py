# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Everything that differs between ArviZ 0.2x and ArviZ 1.x, and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

__all__ = ["assemble", "import_arviz", "is_arviz_data", "pointwise_loo"]


def import_arviz() -> ModuleType:
    """ArviZ, without the notice about version 1 that 0.23 shows each time it is first imported."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=r"\s*ArviZ is undergoing")
        import arviz
    return arviz


def _uses_trees(arviz: ModuleType) -> bool:
    return int(arviz.__version__.split(".")[0]) >= 1


def assemble(groups: Mapping[str, Any], attrs: Mapping[str, str]) -> Any:
    """An ``InferenceData`` (ArviZ 0.2x) or a ``DataTree`` (1.x) holding the xarray datasets ``groups``."""
    arviz = import_arviz()
    groups = {name: dataset.assign_attrs(attrs) for name, dataset in groups.items()}
    if not _uses_trees(arviz):
        return arviz.InferenceData(**groups)
    from xarray import DataTree

    return DataTree.from_dict(groups)


def is_arviz_data(value: object) -> bool:
    """True for an ``InferenceData`` or a ``DataTree``, without importing ArviZ for other values."""
    return any(cls.__name__ in ("InferenceData", "DataTree") for cls in type(value).__mro__)


def pointwise_loo(data: Any, var_name: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """PSIS-LOO of every observation: ``(elpd_n, pareto_k_n)``, both (N,), flattened.

    ArviZ's warning about large ``pareto_k`` is dropped here: the numbers themselves are returned.
    """
    arviz = import_arviz()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, message="Estimated shape parameter")
        result = arviz.loo(data, pointwise=True, var_name=var_name)
    elpd = result.elpd_i if _uses_trees(arviz) else result.loo_i
    return np.asarray(elpd, dtype=float).ravel(), np.asarray(result.pareto_k, dtype=float).ravel()
