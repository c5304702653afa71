# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Least squares of every pair of datum and region, compiled by numba. Imported only if numba is installed."""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["solve"]


# Sums may be reordered: rounding enters log k squared.
@njit(nogil=True, cache=True, fastmath={"contract", "reassoc"})
def solve(slopes, offsets, directions, inverse, data, square, latent):
    """The latents (N, R, L) nearest the data, and their squared distances, prior included, (N, R).

    Args:
        slopes, directions: (R, L, D) maps, and their orthonormal columns.
        offsets: (R, D).
        inverse: (R, L, L) inverse factors.
        data: (N, D) whitened data.
        square, latent: where the results go.
    """
    R, L, D = slopes.shape
    distance, projection = np.empty(D), np.empty(L)
    for n in range(data.shape[0]):
        for r in range(R):
            for d in range(D):
                distance[d] = data[n, d] - offsets[r, d]
            for i in range(L):
                total = 0.0
                for d in range(D):
                    total += directions[r, i, d] * distance[d]
                projection[i] = total
            whole = 0.0
            for i in range(L):
                u = 0.0
                for j in range(L):
                    u += inverse[r, i, j] * projection[j]
                latent[n, r, i] = u
                whole += u * u
                for d in range(D):
                    distance[d] -= slopes[r, i, d] * u
            for d in range(D):
                whole += distance[d] * distance[d]
            square[n, r] = whole
