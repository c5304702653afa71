# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Least squares of every pair of datum and region, compiled by numba. Imported only if numba is installed."""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["solve"]


# Sums may be reordered: rounding enters log k squared.
@njit(nogil=True, cache=True, fastmath={"contract", "reassoc"})
def solve(slopes, offsets, directions, inverse, shift, loc, tril, data, datum_shift, log_k, latent):
    """``log_k`` (N, R) and ``latent`` (N, R, L) of all pairs.

    Args:
        slopes, directions: (R, L, D) maps, and their orthonormal columns.
        offsets: (R, D).
        inverse: (R, L, L) inverse factors.
        shift, datum_shift: (R,) and (N,), what is added to half the squared distances to give log k.
        loc, tril: (L,) and (L, L), the prior: from whitened latents to latents.
        data: (N, D) whitened data.
        log_k, latent: where the results go.
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
                latent[n, r, i] = loc[i]
            square = 0.0
            for i in range(L):
                u = 0.0
                for j in range(L):
                    u += inverse[r, i, j] * projection[j]
                square += u * u
                for j in range(i, L):
                    latent[n, r, j] += tril[j, i] * u
                for d in range(D):
                    distance[d] -= slopes[r, i, d] * u
            for d in range(D):
                square += distance[d] * distance[d]
            log_k[n, r] = shift[r] + datum_shift[n] - 0.5 * square
