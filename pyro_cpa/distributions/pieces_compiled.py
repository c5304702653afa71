# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Least squares of pairs of datum and region, compiled by numba. Imported only if numba is installed."""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["solve"]

_DATA = 16  # so many are worked on while the maps of a region are at hand


# Sums may be reordered: rounding enters log k squared.
@njit(nogil=True, cache=True, fastmath={"contract", "reassoc"})
def solve(directions, offsets, inverse, shift, loc, tril, regions, data, datum_shift, log_k, latent):
    """``log_k`` (N, K) and ``latent`` (N, K, L) of some pairs.

    Args:
        directions: (R, L, D) orthonormal columns of the maps.
        offsets: (R, D).
        inverse: (R, L, L) inverse factors.
        shift, datum_shift: (R,) and (N,), what is added to half the squared distances to give log k.
        loc, tril: (L,) and (L, L), the prior: from whitened latents to latents.
        regions: (N, K), or (1, K) the same for all data.
        data: (N, D) whitened data.
        log_k, latent: where the results go.
    """
    _, L, D = directions.shape
    N, K = data.shape[0], regions.shape[1]
    each = regions.shape[0] > 1
    distance, projection = np.empty(D), np.empty(L)
    for start in range(0, N, _DATA):
        for k in range(K):
            for n in range(start, min(start + _DATA, N)):
                r = regions[n if each else 0, k]
                for d in range(D):
                    distance[d] = data[n, d] - offsets[r, d]
                for i in range(L):
                    total = 0.0
                    for d in range(D):
                        total += directions[r, i, d] * distance[d]
                    projection[i] = total
                    latent[n, k, i] = loc[i]
                square = 0.0
                for i in range(L):
                    u = 0.0
                    for j in range(L):
                        u += inverse[r, i, j] * projection[j]
                    square += u * u
                    for j in range(i, L):
                        latent[n, k, j] += tril[j, i] * u
                for i in range(L):
                    for d in range(D):
                        distance[d] -= directions[r, i, d] * projection[i]
                for d in range(D):
                    square += distance[d] * distance[d]
                log_k[n, k] = shift[r] + datum_shift[n] - 0.5 * square
