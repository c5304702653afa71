# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""scikit-learn's 8x8 digits, thresholded: the training set of the short runs."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor


def binary_digits(n: int = 500) -> tuple[Tensor, Tensor]:
    """``n`` images (n, 64) of zeros and ones in the default dtype, and their labels (n,)."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:n] > 7).to(torch.get_default_dtype()), torch.tensor(labels[:n])
