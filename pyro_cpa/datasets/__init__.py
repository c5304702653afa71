# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Data sets at hand without a download: scikit-learn's digits, files the user has, and toy data."""

from pyro_cpa.datasets.dataset import Dataset, binarize, dequantize, minibatches, row_sequences
from pyro_cpa.datasets.files import load_binary, read_idx
from pyro_cpa.datasets.images import load_digits, load_fashion_mnist, load_mnist
from pyro_cpa.datasets.toy import FactorAnalysisToy, factor_analysis_toy

__all__ = [
    "Dataset",
    "FactorAnalysisToy",
    "binarize",
    "dequantize",
    "factor_analysis_toy",
    "load_binary",
    "load_digits",
    "load_fashion_mnist",
    "load_mnist",
    "minibatches",
    "read_idx",
    "row_sequences",
]
