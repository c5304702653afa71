# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Gaps out, values in: imputation of a pandas frame or an array that keeps everything else as it was."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InvalidData

__all__ = ["impute", "impute_draws"]


def impute(data: Any, fit: Any = None, *, method: str = "mean", random_state: Any = None) -> Any:
    r"""Fills the missing cells of a table from the exact law of missing given observed.

    .. math:: \hat x_{mis} = E[x_{mis} \mid x_{obs}] = \sum_r p(r \mid x_{obs}) \, E[x_{mis} \mid r, x_{obs}]

    Args:
        data: pandas frame of numeric columns (missing: NaN, NA, None) or (N, D) array (missing: NaN).
        fit: a fitted :class:`~pyro_cpa.criticism.CPADensity`; by default one is trained on ``data`` itself,
            gaps included.
        method: ``"mean"``, which has the least squared error; ``"median"``; or ``"sample"``, one draw, which
            keeps the spread of the data.
        random_state: of the training and of the draw.

    Returns:
        A table like ``data``: same type, index, columns, order and dtypes; observed cells are untouched.
        Integer columns get whole numbers (rounded).

    Raises:
        InvalidData: columns that are not numeric, hold infinities, or miss every value, by name.

    Note:
        Exact given the fit. One imputed table understates what is unknown: for standard errors use
        :func:`impute_draws`.

    Example:
        >>> from pyro_cpa.criticism import CPADensity
        >>> x = np.random.default_rng(0).normal(size=(40, 2)).cumsum(axis=1)
        >>> x[3, 1] = np.nan
        >>> fit = CPADensity(n_latent=1, hidden=(4,), max_iter=2, random_state=0).fit(x)
        >>> filled = impute(x, fit)
        >>> bool(np.isfinite(filled).all()), bool((filled[:3] == x[:3]).all())
        (True, True)
    """
    fit, table, values = _prepare(data, fit, random_state)
    return _fill(data, values, fit.impute(table, method=method, random_state=random_state))


def impute_draws(data: Any, fit: Any = None, *, num_draws: int = 10, random_state: Any = None) -> list[Any]:
    r"""Multiple imputation: tables whose gaps are independent draws from the exact conditional.

    .. math:: x_{mis}^{(m)} \sim p(x_{mis} \mid x_{obs}), \qquad m = 1..M

    Args:
        data: as :func:`impute`.
        fit: as :func:`impute`.
        num_draws: M.
        random_state: of the training and of the draws.

    Returns:
        M tables like ``data``. Analyse each, then pool: the variance of an estimate is the mean of its M
        variances plus (1 + 1/M) times the variance of its M values.

    Raises:
        InvalidData: as :func:`impute`.

    Note:
        Exact draws given the fit; the fit's own uncertainty is not in them.

    References:
        Rubin 1987, Multiple Imputation for Nonresponse in Surveys.

    Example:
        >>> from pyro_cpa.criticism import CPADensity
        >>> x = np.random.default_rng(0).normal(size=(40, 2)).cumsum(axis=1)
        >>> x[3, 1] = np.nan
        >>> fit = CPADensity(n_latent=1, hidden=(4,), max_iter=2, random_state=0).fit(x)
        >>> len(impute_draws(x, fit, num_draws=3, random_state=0))
        3
    """
    fit, table, values = _prepare(data, fit, random_state)
    return [_fill(data, values, draw) for draw in fit.impute_draws(table, num_draws, random_state)]


def _prepare(data: Any, fit: Any, random_state: Any) -> tuple[Any, Any, np.ndarray]:
    """The fit, the table as the fit takes it, and as float64 with NaN in its gaps."""
    values = _to_float(data)
    names = np.asarray(data.columns) if _is_frame(data) else np.arange(values.shape[1])
    infinite = names[np.isinf(values).any(axis=0)].tolist()
    if infinite:
        raise InvalidData(f"columns {infinite} hold infinite values: expected numbers or missing values")
    empty = names[np.isnan(values).all(axis=0)].tolist()
    if empty:
        raise InvalidData(f"columns {empty} have no value at all: nothing can be said about them, drop them")
    if fit is None:
        from .density import CPADensity

        return CPADensity(random_state=random_state).fit(values), values, values
    known = getattr(fit, "feature_names_in_", None)
    if known is None or not _is_frame(data):
        return fit, values, values
    if list(known) != names.tolist():
        raise InvalidData(
            f"the fit knows columns {list(known)}, the data has {names.tolist()}: expected the same"
        )
    return fit, type(data)(values, columns=data.columns), values


def _is_frame(data: Any) -> bool:
    return hasattr(data, "columns") and hasattr(data, "iloc")


def _to_float(data: Any) -> np.ndarray:
    if not _is_frame(data):
        values = np.asarray(data)
        if values.ndim != 2 or values.dtype.kind not in "fiu":
            raise InvalidData(
                f"expected a frame or an (N, D) array of numbers, got shape {values.shape} of {values.dtype}"
            )
        return values.astype(np.float64)
    other = [name for name, dtype in data.dtypes.items() if getattr(dtype, "kind", "O") not in "fiu"]
    if other:
        raise InvalidData(
            f"columns {other} are not numeric: encode or drop them; gaps are filled from numbers alone"
        )
    return data.to_numpy(dtype=np.float64, na_value=np.nan)


def _fill(data: Any, values: np.ndarray, filled: np.ndarray) -> Any:
    gaps = np.isnan(values)
    if not _is_frame(data):
        return filled.astype(np.asarray(data).dtype)
    result = data.copy()
    for column in np.flatnonzero(gaps.any(axis=0)):
        cells = gaps[:, column]
        dtype = data.dtypes.iloc[column]
        new = filled[cells, column]
        new = np.rint(new) if dtype.kind in "iu" else new
        series = data.iloc[:, column].copy()
        series.iloc[cells] = new.astype(getattr(dtype, "numpy_dtype", dtype))
        result.isetitem(column, series)
    return result
