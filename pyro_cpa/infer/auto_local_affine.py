# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""A guide for decoders with too many regions to enumerate: the Gaussians of a few good ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyro
import torch
from pyro.distributions import MixtureSameFamily, MultivariateNormal
from torch import Tensor, nn
from torch.distributions import Categorical

from ..distributions.parameters import check_data
from ..errors import InvalidData
from ..partition import Network
from ..partition.local import LocalPieces
from .decoder_guide import AbstractDecoderGuide
from .local_ascent import LocalGaussians, WhitenedProblem, climb_regions
from .structure import ExactProblem, identical

__all__ = ["AutoLocalAffine"]


class AutoLocalAffine(AbstractDecoderGuide):
    r"""Mixture of the Gaussian posteriors of K affine pieces near posterior modes, as a guide without parameters.

    .. math::

        q(z | x) = (1 - \epsilon) \sum_{k} \omega_k\, \mathcal N(z; \mu_k, S_k) + \epsilon\, p(z), \qquad
        \omega_k \propto p(x, \mu_k)\, (2 \pi)^{L / 2} |S_k|^{1/2},

    for any latent dimension L and without enumerating regions. Each of K starts climbs the log-joint: from its region's
    affine piece (A, b) to the summit of the exact Gaussian posterior of that piece, or to the wall on the way and on in
    the region behind it. The first start is the prior's mean, the others are drawn from the prior. Starts that end in
    one region give one component; those left over take the pieces met by draws from the best component. All is batched
    over data and starts.

    The prior in the mixture bounds the importance weights, :math:`p(x, z) / q(z | x) \le \sup_z p(x | z) / \epsilon`,
    so that their variance is finite: a Gaussian of S alone can have lighter tails than the posterior in other regions.
    A decoder without units needs none of this: q is its exact posterior.

    Args:
        model: a Pyro model as for :class:`AutoCPAPosterior`; plates, NaN in the data and masks are honoured.
        decoder: the piecewise-affine module.
        num_regions: K, components (and starts) for each datum.
        defensive: the prior's share epsilon. The ELBO loses about epsilon times the fall of the log-likelihood from
            posterior to prior draws, multi-sample bounds next to nothing; 0 leaves the weights without a bound.
        max_steps: of one ascent.
        create_plates: as for every Pyro AutoGuide.
        memory_budget: bytes for the temporaries of one chunk of data.

    Raises:
        UnsupportedModel: at the first call, naming the site that does not fit.
        InvalidData: an argument out of range, or data that are infinite.

    Note:
        Draws and densities are those of the mixture, exactly; how near it is to the posterior is not known in general
        (``log_evidence(model, guide, x)`` estimates the evidence with a standard error). Draws carry no gradient and q
        has no parameters, so that every objective that takes draws without a path (``Trace_ELBO``,
        ``ImportanceWeightedELBO`` with "score" or "vimco", wake-sleep, TVO, BiHM) is an unbiased estimate of its bound
        at the q of this step, and its gradient in the model's parameters of the bound's derivative with q held fixed:
        coordinate ascent, not the derivative through q. Cost of a step of an ascent: (L + 1) passes of the decoder for
        each datum and start, and O(D L^2 + L^3).

    References:
        Y. Park, C. Kim, G. Kim (2019), "Variational Laplace Autoencoders": one Gaussian at a mode found by such steps.
        A. Owen, Y. Zhou (2000), "Safe and Effective Importance Sampling": defensive mixtures.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_cpa.infer import AutoLocalAffine
        >>> _ = torch.manual_seed(0)
        >>> decoder = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 20))
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(decoder(z), 0.3).to_event(1), obs=x)
        >>> guide = AutoLocalAffine(model, decoder, num_regions=4)
        >>> x = torch.randn(5, 20)
        >>> guide.mode(x).shape, guide.mixture(x).sample((7,)).shape
        (torch.Size([5, 10]), torch.Size([7, 5, 10]))
    """

    def __init__(
        self,
        model: Callable[..., Any],
        decoder: nn.Module,
        num_regions: int = 1,
        *,
        defensive: float = 1e-4,
        max_steps: int = 200,
        create_plates: Callable[..., pyro.plate | Iterable[pyro.plate]] | None = None,
        memory_budget: int = 2**28,
    ) -> None:
        super().__init__(model, decoder, create_plates=create_plates)
        if num_regions < 1 or max_steps < 1:
            raise InvalidData(f"num_regions is {num_regions}, max_steps {max_steps}: expected at least 1")
        if not 0 <= defensive < 1:
            raise InvalidData(f"defensive is {defensive}: expected a share, at least 0 and less than 1")
        self.num_regions, self.defensive, self.max_steps = num_regions, defensive, max_steps
        self.memory_budget = memory_budget
        self._solved: tuple[tuple[Any, ...], MixtureSameFamily, Tensor] | None = None

    _recomputed = ("_solved",)

    def mixture(self, *args: Any, **kwargs: Any) -> MixtureSameFamily:
        """q(z | x) of every datum of the call: batch shape that of the data, event shape (L,)."""
        with torch.no_grad():
            return self._solve(self.problem(*args, **kwargs))[0]

    def mode(self, *args: Any, **kwargs: Any) -> Tensor:
        """(..., L) the highest point of the posterior density that the ascents have found for every datum."""
        with torch.no_grad():
            return self._solve(self.problem(*args, **kwargs))[1]

    def _law(self, problem: ExactProblem) -> MixtureSameFamily:
        return self._solve(problem)[0]

    def _solve(self, problem: ExactProblem) -> tuple[MixtureSameFamily, Tensor]:
        state = [t.detach() for t in (*self.decoder.parameters(), *self.decoder.buffers())]
        given = (problem.x, problem.prior_loc, problem.prior_tril, problem.noise_scale, *state)
        settings = (self.num_regions, self.defensive, self.max_steps)
        key = (*settings, *given)
        if self._solved is None or not _same(self._solved[0], key):
            kept = tuple(g.detach().clone() if isinstance(g, Tensor) else g for g in key)
            self._solved = (kept, *self._found(problem))
        return self._solved[1:]

    def _found(self, problem: ExactProblem) -> tuple[MixtureSameFamily, Tensor]:
        network = Network(self.decoder, self._latent_dim)
        pieces = LocalPieces(network)
        x = check_data(problem.x.detach(), network.data_dim)
        loc, tril, scale = (
            t.detach().double() for t in (problem.prior_loc, problem.prior_tril, problem.noise_scale)
        )
        if not bool(torch.linalg.matrix_norm(tril).isfinite()) or not bool((tril.diagonal() > 0).all()):
            raise InvalidData("the prior's covariance is singular or not finite: expected one of full rank")
        spread = scale if scale.dim() == 1 else scale.diagonal()
        if not bool((spread.isfinite() & (spread > 0)).all()):
            raise InvalidData("the noise must be finite, and its covariance of full rank")
        parts = []
        for rows in self._chunks(pieces, len(x)):
            whitened = WhitenedProblem(pieces, x[rows], loc, tril, scale)
            parts.append(self._components(whitened))
        centre, precision_tril, log_weight, mode = (torch.cat(found) for found in zip(*parts, strict=True))
        covariance_root = torch.linalg.solve_triangular(
            precision_tril.mT, tril.mT.expand_as(precision_tril).mT, upper=True, left=False
        )
        scale_tril = torch.linalg.cholesky(covariance_root @ covariance_root.mT)
        centre = loc + centre @ tril.mT
        logits = log_weight.log_softmax(-1)
        if pieces.num_units and self.defensive:
            N = len(x)
            share = logits.new_full((N, 1), math.log(self.defensive))
            logits = torch.cat([logits + math.log1p(-self.defensive), share], dim=1)
            centre = torch.cat([centre, loc.expand(N, 1, -1)], dim=1)
            scale_tril = torch.cat([scale_tril, tril.expand(N, 1, -1, -1)], dim=1)
        shape, dtype = problem.x.shape[:-1], problem.x.dtype
        logits, centre, scale_tril = (
            t.reshape(shape + t.shape[1:]).to(dtype) for t in (logits, centre, scale_tril)
        )
        law = MixtureSameFamily(Categorical(logits=logits), MultivariateNormal(centre, scale_tril=scale_tril))
        return law, (loc + mode @ tril.mT).reshape(shape + mode.shape[1:]).to(dtype)

    def _chunks(self, pieces: LocalPieces, count: int) -> Iterator[slice]:
        # A few copies of each piece are alive at once.
        size = max(1, self.memory_budget // (4 * 8 * pieces.numbers() * self.num_regions))
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))

    def _components(self, problem: WhitenedProblem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Centres (N, K, L), precisions' factors (N, K, L, L), log-weights (N, K) and best modes (N, L), whitened."""
        N, L = len(problem.x), len(problem.loc)
        K = self.num_regions if problem.pieces.num_units else 1
        start = torch.randn(N, K, L, dtype=torch.float64).to(problem.x.device)
        start[:, 0] = 0
        rows = torch.arange(N, device=start.device).repeat_interleave(K)
        y, pattern = climb_regions(problem, rows, start.flatten(0, 1), self.max_steps)
        found = problem.gaussians(rows, y, pattern)
        heights = problem.log_joint(rows, y)[0].reshape(N, K)
        every = torch.arange(N, device=start.device)
        mode = y.reshape(N, K, L)[every, heights.argmax(1)]
        weight = found.log_weight.reshape(N, K)
        repeated = _repeated(weight, pattern.reshape(N, K, -1))
        if bool(repeated.any()):
            best = weight.masked_fill(repeated, -torch.inf).argmax(1)
            again = repeated.flatten().nonzero()[:, 0]
            source = rows[again] * K + best[rows[again]]
            noise = torch.randn(len(again), L, 1, dtype=torch.float64).to(start.device)
            step = torch.linalg.solve_triangular(found.precision_tril[source].mT, noise, upper=True)[..., 0]
            met = problem.log_joint(rows[again], found.centre[source] + step)[1]
            others = problem.gaussians(rows[again], None, met)
            found = LocalGaussians(
                *(old.index_copy(0, again, new) for old, new in zip(found, others, strict=True))
            )
            weight = found.log_weight.reshape(N, K)
            repeated = _repeated(weight, found.pattern.reshape(N, K, -1))
        weight = weight.masked_fill(repeated, -torch.inf)
        return found.centre.reshape(N, K, L), found.precision_tril.reshape(N, K, L, L), weight, mode


def _repeated(weight: Tensor, pattern: Tensor) -> Tensor:
    """(N, K) whether an earlier or heavier component of the row has the same pattern (N, K, H)."""
    N, K, _ = pattern.shape
    same = torch.stack([(pattern == pattern[:, k : k + 1]).all(-1) for k in range(K)], dim=1)
    order = torch.arange(K, device=weight.device)
    ahead = (weight[:, None, :] > weight[:, :, None]) | (
        (weight[:, None, :] == weight[:, :, None]) & (order < order[:, None])
    )
    return (same & ahead).any(-1)


def _same(kept: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    return len(kept) == len(now) and all(
        identical(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(kept, now, strict=True)
    )
