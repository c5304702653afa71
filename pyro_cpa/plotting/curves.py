# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Pictures of fits: evidence against time, the thermodynamic integrand, comparison of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..criticism import Comparison
from ..errors import InvalidData
from ..infer.exact_fit import StepRecord
from ..infer.thermodynamic_curve import TVOCurve
from .canvas import COLORS, LINES, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_comparison", "plot_evidence", "plot_integrand"]

History = Sequence[StepRecord] | tuple[Sequence[float], Sequence[float]]


def plot_evidence(
    histories: Mapping[str, History],
    num_data: int = 1,
    *,
    against: Literal["seconds", "steps"] = "seconds",
    ax: Axes | None = None,
) -> Axes:
    """Draw the evidence of several fits as they ran.

    Args:
        histories: name -> a fit's ``history``, or a pair (seconds or steps, log p(X)) of equally long
            sequences.
        num_data: log p(X) is divided by it.
        against: what runs along the horizontal axis of the ``history`` entries.
        ax: axes to draw on; new ones by default.

    Returns:
        The axes. The vertical axis leaves out the steep start: it begins at the lowest value that any fit
        shows after a tenth of its run.

    Raises:
        InvalidData: no fits, an empty one, or pairs of unequal length.
        CPAError: matplotlib is not installed.

    Example:
        >>> plot_evidence({"a fit": ([0.0, 1.0, 2.0], [-30.0, -12.0, -11.0])}, num_data=10).get_xlabel()
        'training time (s)'
    """
    if against not in ("seconds", "steps"):
        raise InvalidData(f"against is {against!r}: expected 'seconds' or 'steps'")
    curves = {name: _curve(name, history, against) for name, history in histories.items()}
    if not curves:
        raise InvalidData("histories is empty: expected {name: history}")
    ax = new_axes(ax)
    for i, (name, (t, value)) in enumerate(curves.items()):
        ax.plot(
            t, value / num_data, color=COLORS[i % len(COLORS)], ls=LINES[i % len(LINES)], lw=1.8, label=name
        )
    lowest = min(value[len(value) // 10 :].min() for _, value in curves.values()) / num_data
    highest = max(value.max() for _, value in curves.values()) / num_data
    margin = 0.05 * (highest - lowest) or 1.0
    ax.set(
        xlabel="training time (s)" if against == "seconds" else "step",
        ylabel="$\\log p(x)$ per datum (nats)" if num_data > 1 else "$\\log p(X)$ (nats)",
        ylim=(lowest - margin, highest + margin),
    )
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right")
    return ax


def plot_integrand(curve: TVOCurve, *, ax: Axes | None = None) -> Axes:
    r"""Draw the thermodynamic integrand; the area under it is the evidence.

    .. math:: \log p(x) = \int_0^1 \eta(\beta) \, d\beta

    Args:
        curve: of :meth:`pyro_cpa.infer.TVO.integrand`.
        ax: axes to draw on; new ones by default.

    Returns:
        The axes: the curve with two standard errors, over the rectangles of the left sum, a lower bound.

    References:
        Masrani, Le, Wood 2019, The thermodynamic variational objective.
    """
    ax = curve.plot(new_axes(ax))
    ax.set(
        xlabel=r"inverse temperature $\beta$ (0: guide, 1: posterior)",
        ylabel=r"integrand $\eta(\beta)$ (nats)",
    )
    return ax


def plot_comparison(table: Comparison, *, ax: Axes | None = None) -> Axes:
    """Draw each model's distance to the best in held-out evidence, with two standard errors.

    Args:
        table: of :func:`pyro_cpa.criticism.compare`.
        ax: axes to draw on; new ones by default.

    Returns:
        The axes, best model on top; hollow marks are evidences that are estimated, not exact.
    """
    ax = new_axes(ax)
    columns = table.columns()
    rows = np.arange(len(columns["model"]))
    error = np.nan_to_num(2 * columns["difference_error"])
    ax.axvline(0.0, color="0.6", lw=1, zorder=0)
    ax.errorbar(columns["difference"], rows, xerr=error, fmt="none", color=COLORS[0], capsize=3)
    for row, difference, kind in zip(rows, columns["difference"], columns["evidence"], strict=True):
        face = COLORS[0] if kind == "exact" else "white"
        ax.plot(difference, row, "o", color=COLORS[0], markerfacecolor=face, zorder=3)
    ax.set_yticks(
        rows, [f"{name}\n({kind})" for name, kind in zip(columns["model"], columns["evidence"], strict=True)]
    )
    ax.set(xlabel="difference to the best in held-out $\\log p(x)$ per datum (nats)")
    ax.margins(y=0.2)
    ax.invert_yaxis()
    ax.grid(alpha=0.3, axis="x")
    return ax


def _curve(name: str, history: History, against: str) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(history, tuple):
        t, value = (np.asarray(part, dtype=float) for part in history)
    else:
        times = accumulate(record.seconds for record in history)
        t = np.array(list(times)) if against == "seconds" else np.arange(1.0, len(history) + 1)
        value = np.array([record.log_evidence for record in history])
    if t.shape != value.shape or t.ndim != 1 or not len(t):
        raise InvalidData(
            f"the history of '{name}' has {t.shape} times and {value.shape} values: expected a fit's history "
            "that is not empty, or two equally long sequences"
        )
    return t, value
