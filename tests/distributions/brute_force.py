# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Brute force: expectations over a latent on a line, by Gauss-Legendre panels, knowing nothing of regions or affine maps."""

import numpy as np
import torch


def knots(decoder, low=-20.0, high=20.0, grid=20001):
    """Where the slope of a decoder of one latent changes, by bisection on second differences."""
    z = torch.linspace(low, high, grid, dtype=torch.float64)
    with torch.no_grad():
        y = decoder(z[:, None])
    bend = (y[2:] - 2 * y[1:-1] + y[:-2]).abs().amax(-1)
    found = []
    for i in (bend > 1e-9).nonzero().flatten().tolist():
        a, b = z[i].item(), z[i + 2].item()
        with torch.no_grad():
            at = decoder(torch.tensor([[a - 1e-3], [a], [b], [b + 1e-3]], dtype=torch.float64))
        left, right = (at[1] - at[0]) / 1e-3, (at[3] - at[2]) / 1e-3
        d = (left - right).abs().argmax()
        if abs(left[d] - right[d]) > 1e-8:
            # The two tangents meet at the knot.
            found.append(((at[2][d] - right[d] * b - at[1][d] + left[d] * a) / (left[d] - right[d])).item())
    return np.unique(np.round(found, 12))


def log_integral(log_f, breaks, low=-20.0, high=20.0, width=0.02, nodes=12):
    """log of the integral of exp(log_f) over [low, high], and posterior expectations of functions by the same nodes."""
    edges = np.unique(np.concatenate([[low, high], np.asarray(breaks), np.arange(low, high, width)]))
    x, w = np.polynomial.legendre.leggauss(nodes)
    mid, half = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    z = torch.as_tensor((mid[:, None] + half[:, None] * x).reshape(-1))
    log_w = torch.as_tensor(np.log((half[:, None] * w).reshape(-1)))
    log_terms = log_f(z) + log_w
    total = log_terms.logsumexp(-1)
    return total, z, (log_terms - total[..., None]).exp()


def posterior_1d(decoder, x, scale, loc=0.0, prior_scale=1.0, width=0.02):
    """log p(x) (N,), nodes z (M,), posterior weights (N, M) for independent noise ``scale`` (D,); NaN in x is missing."""

    def log_f(z):
        with torch.no_grad():
            mean = decoder(z[:, None])
        terms = torch.distributions.Normal(mean, scale, validate_args=False).log_prob(x[:, None])
        terms = torch.where(x.isnan()[:, None], 0.0, terms).sum(-1)
        return terms + torch.distributions.Normal(loc, prior_scale).log_prob(z)

    return log_integral(log_f, knots(decoder), width=width)
