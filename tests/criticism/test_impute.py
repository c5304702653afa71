# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The imputation front door: nothing but gaps changes, and the gaps hold the exact conditional."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_cpa.criticism import CPADensity, impute, impute_draws
from pyro_cpa.errors import InvalidData


@pytest.fixture(scope="module")
def table():
    random = np.random.default_rng(0)
    z = random.normal(size=60)
    frame = pd.DataFrame(
        {
            "length": 3 + 2 * z + 0.1 * random.normal(size=60),
            "width": (100 - 5 * z + random.normal(size=60)).astype("float32"),
            "count": pd.array(np.rint(50 + 10 * z).astype(int), dtype="Int64"),
            "whole": np.arange(60, dtype="int32"),
        },
        index=[f"row {i}" for i in range(60)],
    )
    frame.iloc[3, 0] = np.nan
    frame.iloc[[5, 7], 1] = np.nan
    frame.iloc[[3, 9], 2] = pd.NA
    return frame


@pytest.fixture(scope="module")
def fit(table):
    torch.set_default_dtype(torch.float64)
    return CPADensity(n_latent=1, hidden=(4,), max_iter=5, random_state=0).fit(as_floats(table))


def as_floats(frame):
    return frame.astype("float64")


def test_index_columns_dtypes_and_observed_cells_stay(table, fit):
    before = table.copy()
    filled = impute(table, fit)
    pd.testing.assert_frame_equal(table, before)
    pd.testing.assert_index_equal(filled.index, table.index)
    pd.testing.assert_series_equal(filled.dtypes, table.dtypes)
    assert not filled.isna().any().any()
    observed = table.notna()
    pd.testing.assert_frame_equal(filled.where(observed), table)


def test_gaps_hold_the_conditional_mean(table, fit):
    conditional = fit.marginal().conditional(torch.as_tensor(as_floats(table).to_numpy()))
    mean = conditional.mean.numpy()
    filled = impute(table, fit)
    assert filled.iloc[3, 0] == mean[3, 0]
    assert filled.iloc[5, 1] == np.float32(mean[5, 1])
    assert filled.iloc[9, 2] == round(mean[9, 2])


def test_the_default_fit_recovers_a_line():
    """x_2 = 2 x_1 + noise of 0.1: every gap within 5 noise scales and the fit's own error."""
    random = np.random.default_rng(1)
    x1 = random.normal(size=80)
    x = np.stack([x1, 2 * x1 + 0.1 * random.normal(size=80)], axis=1)
    holed = x.copy()
    holed[::10, 1] = np.nan
    filled = impute(holed, CPADensity(n_latent=1, hidden=(), random_state=0).fit(holed))
    assert np.abs(filled - x)[::10, 1].max() < 0.7
    np.testing.assert_array_equal(filled[1::10], x[1::10])


def test_frame_without_a_fit_trains_one(table, monkeypatch):
    small = partial(CPADensity, n_latent=1, hidden=(2,), max_iter=1)
    monkeypatch.setattr("pyro_cpa.criticism.density.CPADensity", small)
    filled = impute(table[["length", "width"]], random_state=0)
    assert isinstance(filled, pd.DataFrame)
    assert filled.notna().all().all()


def test_multiple_imputation_scatters_as_the_conditional_does(table, fit):
    """200 draws of one cell: mean and variance within 5 standard errors of the exact ones."""
    conditional = fit.marginal().conditional(torch.as_tensor(as_floats(table).to_numpy()))
    tables = impute_draws(table, fit, num_draws=200, random_state=0)
    draws = np.array([t.iloc[3, 0] for t in tables])
    mean, variance = float(conditional.mean[3, 0]), float(conditional.variance[3, 0])
    assert abs(draws.mean() - mean) < 5 * np.sqrt(variance / 200)
    # The conditional's kurtosis is not 3: twice the Gaussian error is generous.
    assert abs(draws.var() / variance - 1) < 10 * np.sqrt(2 / 200)
    again = impute_draws(table, fit, num_draws=2, random_state=0)
    pd.testing.assert_frame_equal(again[1], impute_draws(table, fit, num_draws=2, random_state=0)[1])
    assert again[0].iloc[3, 0] != again[1].iloc[3, 0]


def test_medians_split_the_mass(table, fit):
    filled = impute(table[["length", "width", "count", "whole"]], fit, method="median")
    draws = fit.marginal().conditional(torch.as_tensor(as_floats(table).to_numpy())).sample((4000,)).numpy()
    share = (draws[:, 3, 0] <= filled.iloc[3, 0]).mean()
    assert abs(share - 0.5) < 5 * np.sqrt(0.25 / 4000)


def test_mistakes_are_named(table, fit):
    with pytest.raises(InvalidData, match=r"columns \['width'\] have no value at all"):
        impute(table.assign(width=np.nan))
    with pytest.raises(InvalidData, match=r"columns \[1\] have no value at all"):
        impute(np.array([[1.0, np.nan], [2.0, np.nan]]))
    with pytest.raises(InvalidData, match=r"columns \['name'\] are not numeric"):
        impute(table.assign(name="a"))
    with pytest.raises(InvalidData, match=r"columns \['length'\] hold infinite"):
        impute(table.assign(length=np.inf))
    with pytest.raises(InvalidData, match="expected the same"):
        impute(table[["width", "length", "count", "whole"]], fit)
    with pytest.raises(InvalidData, match="got shape"):
        impute(np.zeros(3))
    with pytest.raises(InvalidData, match="expected 'mean', 'median' or 'sample'"):
        impute(table, fit, method="mode")
