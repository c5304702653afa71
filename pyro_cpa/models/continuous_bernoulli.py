# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The continuous Bernoulli distribution computed from its logits, without saturation."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["LogitContinuousBernoulli"]

# Below this |u| the series of log(sinh(u)/u) and its derivatives are exact to rounding; above, cancellation
# in the closed forms stays below ten units of rounding of 1.
_SERIES_BELOW = 0.1


class LogitContinuousBernoulli(dist.ContinuousBernoulli):
    r"""Continuous Bernoulli on [0, 1] whose density, moments and quantiles are functions of the logit.

    .. math:: \log p(x) = t\,(x - \tfrac12) - g(t/2), \qquad g(u) = \log\frac{\sinh u}{u},
        \qquad \mathrm E\,x = \tfrac12 + \tfrac12\, g'(t/2)

    with logit t. A pixel of mean m near 0 has its best fit at t of about -1/m: black pixels want logits in
    the hundreds, but the base class goes through sigmoid(t) and stops at 16 in float32: log-density 1.77
    instead of 5.21 at x = 0.002, t = -500. Here every finite logit is good in float32 and float64.

    Args:
        logits: any shape; give this argument, not ``probs``.

    Note:
        ``rsample`` inverts the distribution function, so it is differentiable in the logits.

    References:
        Loaiza-Ganem and Cunningham (2019), The continuous Bernoulli: fixing a pervasive error in variational
        autoencoders.

    Example:
        >>> pixel = LogitContinuousBernoulli(logits=torch.tensor(-500.0))
        >>> pixel.mean.item(), pixel.log_prob(torch.tensor(0.0)).item()
        (0.0020..., 6.2146...)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.logits * (value - 0.5) - _log_sinhc(self.logits / 2)

    @property
    def mean(self) -> Tensor:
        return 0.5 + _log_sinhc_slope(self.logits / 2) / 2

    @property
    def variance(self) -> Tensor:
        return _log_sinhc_curvature(self.logits / 2) / 4

    @property
    def stddev(self) -> Tensor:
        return self.variance.sqrt()

    def entropy(self) -> Tensor:
        return _log_sinhc(self.logits / 2) - self.logits * (self.mean - 0.5)

    def cdf(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        down, flat, safe = self._falling_logits()
        near = self._reflect(value.clamp(0, 1))
        mass = torch.where(flat, near, torch.expm1(safe * near) / torch.expm1(safe))
        return self._reflect(mass)

    def icdf(self, value: Tensor) -> Tensor:
        down, flat, safe = self._falling_logits()
        level = self._reflect(value)
        rest = torch.where(self.logits > 0, value, 1 - value)  # 1 - level without its rounding
        step = level * torch.expm1(safe)
        short = step > -0.5
        near = torch.where(
            short,
            torch.log1p(torch.where(short, step, torch.zeros_like(step))),
            torch.logaddexp(rest.log(), level.log() + safe),
        )
        first_order = level + down * level * rest / 2
        return self._reflect(torch.where(flat, first_order, near / safe))

    def _reflect(self, x: Tensor) -> Tensor:
        """``x`` measured from the end where the density is larger: there exponentials cannot overflow."""
        return torch.where(self.logits > 0, 1 - x, x)

    def _falling_logits(self) -> tuple[Tensor, Tensor, Tensor]:
        """-|t|, where it is flat to rounding, and -|t| with those entries made harmless for autograd."""
        down = torch.where(self.logits > 0, -self.logits, self.logits)
        flat = down > -torch.finfo(down.dtype).eps
        return down, flat, torch.where(flat, -torch.ones_like(down), down)


def _split(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(small, near, far)``: a mask, and |u| with the other branch's values made harmless for autograd."""
    u = u.abs()
    small = u < _SERIES_BELOW
    return small, torch.where(small, u, torch.zeros_like(u)), torch.where(small, torch.ones_like(u), u)


def _log_sinhc(u: Tensor) -> Tensor:
    """log(sinh(u) / u), even in u."""
    small, near, far = _split(u)
    s = near.square()
    series = s * (1 / 6 + s * (-1 / 180 + s * (1 / 2835 + s * (-1 / 37800 + s / 467775))))
    closed = far - (2 * far).log() + torch.log1p(-torch.exp(-2 * far))
    return torch.where(small, series, closed)


def _log_sinhc_slope(u: Tensor) -> Tensor:
    """coth(u) - 1/u, odd in u."""
    small, near, far = _split(u)
    s = near.square()
    series = near * (1 / 3 + s * (-1 / 45 + s * (2 / 945 + s * (-1 / 4725 + s * (2 / 93555)))))
    closed = 1 / torch.tanh(far) - 1 / far
    return torch.where(small, series, closed) * torch.sign(u)


def _log_sinhc_curvature(u: Tensor) -> Tensor:
    """1/u^2 - 1/sinh(u)^2, even in u."""
    small, near, far = _split(u)
    s = near.square()
    series = 1 / 3 + s * (-1 / 15 + s * (2 / 189 + s * (-1 / 675 + s * (2 / 10395))))
    half = -torch.expm1(-2 * far) / 2  # exp(-u) sinh(u)
    closed = far.pow(-2) - torch.exp(-2 * far) / half.square()
    return torch.where(small, series, closed)
