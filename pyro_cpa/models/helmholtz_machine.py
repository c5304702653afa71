# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Bidirectional Helmholtz machines: the geometric mean of a generation and a recognition net as the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_cpa.errors import InvalidData
from pyro_cpa.models.bernoulli_layers import (
    MAX_ROWS,
    AbstractBernoulliStack,
    check_stack,
    deterministic_map,
)
from pyro_cpa.models.helmholtz_chain import HelmholtzChain, check_partly_observed
from pyro_cpa.models.latent_model import check_count

__all__ = ["BidirectionalHelmholtzMachine", "EffectiveSampleSize", "Estimate"]

_MNIST_LAYERS = (300, 200, 100, 75, 50, 35, 30, 25, 20, 15, 10, 10)


class Estimate(NamedTuple):
    """A Monte-Carlo estimate and its standard error, of the same shape."""

    value: Tensor
    standard_error: Tensor


class EffectiveSampleSize(NamedTuple):
    """Effective fraction of the particles, in (0, 1], under the weights of p and of p*; (N,) each."""

    p: Tensor
    p_star: Tensor


class BidirectionalHelmholtzMachine(AbstractBernoulliStack):
    r"""The geometric mean of two directed nets over binary x and L layers of binary latents.

    .. math:: p^*(x, z) = \frac1Z \sqrt{p(x, z)\, q(x)\, q(z \mid x)}, \qquad q(x) := p^*(x)
    .. math:: p^*(x) = \tilde p^*(x) / Z^2, \qquad
              \tilde p^*(x) = \Bigl(\sum_z \sqrt{p(x, z)\, q(z \mid x)}\Bigr)^2, \qquad
              Z^2 = \sum_x \tilde p^*(x) \le 1

    ``model`` is p, ``guide`` is q(z | x); train them with :class:`~pyro_cpa.infer.BiHelmholtzELBO`, whose
    bound is log p~*(x) <= min(log p(x), log p*(x)). Between log p(x) and log p*(x) there is no fixed order.

    Args:
        data_dim: D.
        layer_sizes: (H_1, ..., H_L), the layer next to the data first; default: the authors' net for MNIST.
        deterministic: tanh layers between two stochastic layers, in both nets.
        deterministic_size: their width; the mean of the two neighbours if None.
        small_weights: start from the authors' weights, the Xavier range divided once more by the number of
            inputs. It trains far more slowly than the plain Xavier range that is the default.

    Raises:
        InvalidData: for sizes that are not positive.

    Note:
        All biases, the prior's included, start at -1 as the authors' do. Probabilities are not clipped.
        Estimators state a standard error; those of logarithms are by the delta method and biased low.

    References:
        J. Bornschein, S. Shabanian, A. Fischer, Y. Bengio (2016), "Bidirectional Helmholtz Machines".

    Example:
        >>> x = torch.bernoulli(torch.full((5, 8), 0.3))
        >>> bihm = BidirectionalHelmholtzMachine(8, (4, 2))
        >>> bool((bihm.log_p_tilde(x, 100).value < 0).all())
        True
        >>> bihm.generate(3).shape, bihm.inpaint(x, x > 0, num_chains=2, num_sweeps=5).shape
        (torch.Size([3, 8]), torch.Size([2, 5, 8]))
    """

    def __init__(
        self,
        data_dim: int,
        layer_sizes: Sequence[int] = _MNIST_LAYERS,
        *,
        deterministic: int = 0,
        deterministic_size: int | None = None,
        small_weights: bool = False,
    ) -> None:
        sizes = check_stack(data_dim, layer_sizes, deterministic, deterministic_size)
        between = (deterministic, deterministic_size)
        pairs = list(zip(sizes[:-1], sizes[1:], strict=True))
        generation = [deterministic_map(above, below, *between) for below, above in pairs]
        recognition = [deterministic_map(below, above, *between) for below, above in pairs]
        for linear in (m for net in (*generation, *recognition) for m in net if isinstance(m, nn.Linear)):
            gain = 1.0 / linear.in_features if small_weights else 1.0
            nn.init.xavier_uniform_(linear.weight, gain)
            nn.init.constant_(linear.bias, -1.0)
        super().__init__(sizes, generation, recognition, prior_logits=torch.full((sizes[-1],), -1.0))

    # ---- evidence --------------------------------------------------------------------------------------

    def log_p(self, x: Tensor, num_particles: int) -> Estimate:
        r"""log p(x) of the generation net, by importance sampling from q.

        .. math:: \log \tfrac1K \sum_k w_k, \qquad w_k = p(x, z_k) / q(z_k \mid x)

        Args:
            x: (N, D) binary.
            num_particles: K.

        Returns:
            (N,) values and standard errors.
        """
        return log_mean_exp(self.log_weights(x, num_particles))

    def log_p_tilde(self, x: Tensor, num_particles: int) -> Estimate:
        r"""log p~*(x), the training bound.

        .. math:: 2 \log \tfrac1K \sum_k \sqrt{w_k}

        Args:
            x: (N, D) binary.
            num_particles: K.

        Returns:
            (N,) values and standard errors.

        Note:
            The square root of p~* is estimated without bias; on every sample set the value is at most that of
            :meth:`log_p` on the same samples.
        """
        return _doubled(log_mean_exp(0.5 * self.log_weights(x, num_particles)))

    def log_p_star(self, x: Tensor, num_particles: int, two_log_z: Estimate | None = None) -> Estimate:
        """log p*(x) = log p~*(x) - 2 log Z.

        Args:
            x: (N, D) binary.
            num_particles: K for log p~*.
            two_log_z: what :meth:`two_log_z` returned; computed with its defaults if None.

        Returns:
            (N,) values and standard errors; the part that stems from 2 log Z is common to all rows.
        """
        tilde = self.log_p_tilde(x, num_particles)
        z2 = self.two_log_z() if two_log_z is None else two_log_z
        error = torch.hypot(tilde.standard_error, z2.standard_error.expand(len(x)))
        return Estimate(tilde.value - z2.value, error)

    @torch.no_grad()
    def two_log_z(self, num_samples: int = 10_000, num_inner: int = 10) -> Estimate:
        r"""2 log Z, the log-partition function of p~*; never positive, zero iff q is the posterior of p.

        .. math:: Z^2 = \mathbb E_{(x,z) \sim p} \Bigl[ \sqrt{q(z \mid x) / p(x, z)} \;
                  \mathbb E_{z' \sim q(\cdot \mid x)} \sqrt{p(x, z') / q(z' \mid x)} \Bigr]

        Args:
            num_samples: draws of p.
            num_inner: draws of q for the inner expectation.

        Returns:
            Scalars. Z^2 is unbiased, so its logarithm is biased low by about half the squared standard error.
        """
        return log_mean_exp(self._pool(num_samples, num_inner)[1])

    def ess(self, x: Tensor, num_particles: int) -> EffectiveSampleSize:
        """Effective sample size over K, (mean w)^2 / mean(w^2), with w for p and its square root for p*.

        Args:
            x: (N, D) binary.
            num_particles: K.

        Note:
            That of p* equals exp(log p~*_K - log p_K) on the same samples; as K grows it tends to the squared
            Bhattacharyya coefficient of q and the posterior of p.
        """
        d = self.log_weights(x, num_particles)
        return EffectiveSampleSize(*(_effective_fraction(log_w) for log_w in (d, 0.5 * d)))

    # ---- samples of p* ---------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_p_star(self, n: int, oversample: int = 100, num_inner: int = 10) -> list[Tensor]:
        """Samples of p*(x, z) by importance resampling from p.

        Args:
            n: number of samples.
            oversample: draws of p for each sample kept.
            num_inner: draws of q for the weight of each draw.

        Returns:
            ``[x, z_1, ..., z_L]``, each (n, H_l).

        Note:
            Exact as ``oversample`` grows, whatever ``num_inner``: the weight is unbiased and enters linearly.
            Samples are drawn with replacement, so they repeat where the weights are uneven.
        """
        check_count(n=n, oversample=oversample)
        layers, log_w = self._pool(n * oversample, num_inner)
        chosen = torch.multinomial(torch.softmax(log_w, 0), n, replacement=True)
        return [layer[chosen] for layer in layers]

    @torch.no_grad()
    def generate(
        self, n: int, mode: str = "sample", *, oversample: int = 100, num_inner: int = 10, num_sweeps: int = 0
    ) -> Tensor:
        """``n`` draws of p*: importance resampling, then ``num_sweeps`` Gibbs sweeps.

        Args:
            n: number of draws.
            mode: ``"sample"`` for binary x, ``"mean"`` for the probabilities p(x = 1 | z_1).
            oversample, num_inner: see :meth:`sample_p_star`.
            num_sweeps: sweeps of :meth:`chain` from there; the authors show 250.

        Returns:
            (n, D). For draws of p itself, take ``sample_generation(n)[0]``.
        """
        layers = self.sample_p_star(n, oversample, num_inner)
        if num_sweeps:
            layers = self.chain(layers[0]).sweep(num_sweeps).layers
        return self.present(layers, mode)

    def chain(
        self, x: Tensor, observed: Tensor | None = None, num_proposals: int | None = None
    ) -> HelmholtzChain:
        """Markov chains, one a row of ``x``, that leave p*(x, z) invariant; see :class:`HelmholtzChain`.

        Args:
            x: (C, D) binary start; unobserved entries may hold anything, NaN included, and start at random.
            observed: (C, D) or (D,) boolean, True where x is clamped; None clamps nothing and starts at x.
            num_proposals: None for single-bit updates, or the number of candidates of a block update.
        """
        return HelmholtzChain(self, x, observed, num_proposals)

    def inpaint(
        self,
        x: Tensor,
        observed: Tensor,
        num_chains: int = 10,
        num_sweeps: int = 250,
        num_proposals: int | None = None,
    ) -> Tensor:
        """Samples of p*(missing | observed).

        Args:
            x: (N, D) binary where observed; anything, NaN included, elsewhere.
            observed: (N, D) or (D,) boolean, True where x is known.
            num_chains: independent chains for each row.
            num_sweeps: sweeps of each chain.
            num_proposals: see :meth:`chain`.

        Returns:
            (num_chains, N, D); observed entries are as given.
        """
        check_count(num_chains=num_chains)
        x, observed = check_partly_observed(x, observed, self.sizes[0], next(self.parameters()))
        rows, mask = x.repeat(num_chains, 1), observed.repeat(num_chains, 1)
        samples = self.chain(rows, mask, num_proposals).sweep(num_sweeps).layers[0]
        return samples.reshape(num_chains, *x.shape)

    def _pool(self, num_samples: int, num_inner: int) -> tuple[list[Tensor], Tensor]:
        """Draws of p and the logarithms, (num_samples,), of their unnormalised weights under p*."""
        check_count(num_samples=num_samples, num_inner=num_inner)
        pool, log_w = [], []
        for start in range(0, num_samples, MAX_ROWS):
            layers = self.sample_generation(min(MAX_ROWS, num_samples - start))
            inner = torch.logsumexp(0.5 * self.log_weights(layers[0], num_inner), 0) - math.log(num_inner)
            log_w.append(inner + 0.5 * (self.log_recognition(layers) - self.log_generation(layers)))
            pool.append(layers)
        return [torch.cat(parts) for parts in zip(*pool, strict=True)], torch.cat(log_w)


def log_mean_exp(log_w: Tensor) -> Estimate:
    """log of the mean of exp(log_w) over the first dimension, with the delta method's standard error."""
    count = log_w.shape[0]
    if count < 2:
        raise InvalidData(f"{count} sample was given; expected at least 2, or no standard error exists.")
    value = torch.logsumexp(log_w, 0) - math.log(count)
    # var(mean w) / (mean w)^2 with the unbiased variance: (mean w^2 / (mean w)^2 - 1) / (count - 1)
    relative_variance = (1 / _effective_fraction(log_w) - 1).clamp(min=0) / (count - 1)  # rounding below 0
    return Estimate(value, relative_variance.sqrt())


def _effective_fraction(log_w: Tensor) -> Tensor:
    """(mean w)^2 / mean(w^2) over the first dimension."""
    log_fraction = 2 * torch.logsumexp(log_w, 0) - torch.logsumexp(2 * log_w, 0) - math.log(log_w.shape[0])
    return log_fraction.exp()


def _doubled(estimate: Estimate) -> Estimate:
    return Estimate(2 * estimate.value, 2 * estimate.standard_error)
