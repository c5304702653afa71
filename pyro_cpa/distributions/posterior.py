# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The exact posterior p(z | x) of a piecewise-affine decoder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from .. import integrals
from ..errors import InvalidData
from ..partition.cells import Cells
from .expectation import region_log_probs, region_posteriors
from .parameters import Shape, check_data
from .parts import gathered, parts
from .pieces import Pieces, PiecewiseJoint
from .quantiles import mixture_quantiles

__all__ = ["CPAPosterior"]


class _Chunk(NamedTuple):
    rows: Tensor | slice
    joint: PiecewiseJoint
    pieces: Pieces
    log_prob: Tensor
    log_probs: Tensor


class CPAPosterior(TorchDistribution):
    r"""Exact posterior of the latent given data: a mixture of Gaussians truncated to the decoder's cells.

    .. math::

        p(z | x) = \sum_r p(r | x) \, \frac{\mathcal N(z; \mu_r(x), S_r) \, 1[z \in \text{cell } r]}{M_r(x)}
                 = \frac{\mathcal N(x; g(z), S_x) \, \mathcal N(z; m, V)}{p(x)}.

    Made by :meth:`CPAMarginal.posterior`. Draws carry no gradient, and parameters are detached.

    Args:
        joint: partition, prior and noise.
        x: (..., D) data; NaN marks missing entries, which are marginalised out.

    Shapes: batch_shape ``x.shape[:-1]``, event_shape ``(L,)``; expands on the left.

    Note:
        Exact up to float64 rounding; with L > 3 and several regions p(x), p(r | x) and moments are estimates, and draws
        exact but for p(r | x). Every method streams over the data within the joint's memory budget, and costs one
        E-step, O(N R) integrals; the first call of ``log_prob`` or ``sample`` keeps what it found if that fits the budget.

    References:
        R. Balestriero, S. Paris, R. Baraniuk (2020), "Analytical Probability Distributions and Exact
        Expectation-Maximization for Deep Generative Networks".

    Example:
        >>> from pyro_cpa.distributions import CPAMarginal
        >>> _ = torch.manual_seed(0)
        >>> decoder = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> post = CPAMarginal(decoder, scale=0.3).posterior(torch.zeros(3, 2))
        >>> post.sample((10,)).shape
        torch.Size([10, 3, 1])
        >>> torch.allclose(post.region_probs.sum(-1), torch.ones(3))
        True
    """

    arg_constraints: dict[str, Constraint] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, joint: PiecewiseJoint, x: Tensor, *, validate_args: bool | None = None) -> None:
        self.joint = joint
        self._x = check_data(x.detach(), joint.partition.data_dim)
        self._base_shape = x.shape[:-1]
        self._dtype = x.dtype
        self._kept: list[_Chunk] = []
        event = torch.Size([joint.partition.latent_dim])
        super().__init__(self._base_shape, event, validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> CPAPosterior:
        new = self._get_checked_instance(CPAPosterior, _instance)
        batch_shape = torch.Size(batch_shape)
        grown = len(self._base_shape) > len(batch_shape) or any(
            a != b
            for a, b in zip(
                self._base_shape, batch_shape[len(batch_shape) - len(self._base_shape) :], strict=True
            )
        )
        new.joint, new._dtype, new._kept = self.joint, self._dtype, self._kept
        if grown:
            # A data dimension of size 1 is stretched: the rows are repeated.
            x = self._x.reshape(self._base_shape + self._x.shape[-1:])
            new._x = x.expand(batch_shape + x.shape[-1:]).reshape(-1, x.shape[-1])
            new._base_shape, new._kept = batch_shape, []
        else:
            new._x, new._base_shape = self._x, self._base_shape
        super(CPAPosterior, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _chunks(self) -> Iterator[_Chunk]:
        """Chunks that hold every row once; kept for later calls where all of them fit the memory budget."""
        if self._kept:
            yield from self._kept
            return
        kept: list[_Chunk] = []
        left = self.joint.pairs_in_budget(self._x)
        for part in parts(self.joint, self._x):
            pieces = part.joint.pieces(self._x[part.rows])
            chunk = _Chunk(part.rows, part.joint, pieces, *region_log_probs(part.joint, pieces))
            left -= part.num_pairs
            if left < 0:
                kept.clear()
            else:
                kept.append(chunk)
            yield chunk
        self._kept = kept

    def _gathered(self, found: Iterable[tuple[Tensor | slice, Tensor]]) -> Tensor:
        return gathered(found, len(self._x))

    def _shaped(self, values: Tensor) -> Tensor:
        """(N, ...) values of the base rows, in the batch shape and the caller's dtype."""
        tail = values.shape[1:]
        return values.reshape(self._base_shape + tail).expand(self.batch_shape + tail).to(self._dtype)

    @property
    def log_evidence(self) -> Tensor:
        """(...,) exact log p(x)."""
        return self._shaped(self._gathered((c.rows, c.log_prob) for c in self._chunks()))

    @property
    def region_probs(self) -> Tensor:
        """(..., R) exact p(r | x); dense, so O(N R) memory."""
        result = self._x.new_zeros(len(self._x), self.joint.partition.num_regions)
        for chunk in self._chunks():
            probs, regions = chunk.log_probs.exp(), chunk.joint.regions
            if regions is not None:
                probs = result.new_zeros(len(probs), result.shape[1]).index_copy_(1, regions, probs)
            result[chunk.rows] = probs
        return self._shaped(result)

    def log_prob(self, value: Tensor) -> Tensor:
        """Exact log p(z | x), differentiable in z.

        Args:
            value: sample_shape + batch_shape + (L,) latents.
        """
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        log_evidence = self._gathered((c.rows, c.log_prob) for c in self._chunks())
        z = value.double().expand(shape + value.shape[-1:])
        rows = torch.arange(len(self._x), device=z.device).reshape(self._base_shape).expand(shape).reshape(-1)
        found = [
            self.joint.log_joint(self._x[rows[part]], z_part) - log_evidence[rows[part]]
            for part, z_part in self.joint.latent_chunks(z.reshape(-1, z.shape[-1]))
        ]
        return torch.cat(found).reshape(shape).to(self._dtype)

    @torch.no_grad()
    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:  # noqa: B008
        """Exact draws: a region by its probability, then a truncated Gaussian; sample_shape + batch_shape + (L,)."""
        extra = self.batch_shape[: len(self.batch_shape) - len(self._base_shape)]
        shape = torch.Size(sample_shape) + extra
        count, drawn = shape.numel(), []
        for chunk in self._chunks():
            n = len(chunk.log_prob)
            region = torch.multinomial(chunk.log_probs.exp(), count, replacement=True).mT.reshape(-1)
            row = torch.arange(n, device=region.device).repeat(count)
            z = self._draw(chunk.joint.cells, chunk.pieces, row, region)
            drawn.append((chunk.rows, z.reshape(count, n, -1).movedim(0, 1)))
        z = self._gathered(drawn).movedim(0, 1)
        return z.reshape(shape + self._base_shape + z.shape[-1:]).to(self._dtype)

    @staticmethod
    def _draw(cells: Cells, pieces: Pieces, row: Tensor, region: Tensor) -> Tensor:
        """One z (P, L) for each of P pairs of row and region; what a pair needs is computed once for all its draws."""
        R = pieces.log_k.shape[1]
        pair, inverse, count = torch.unique(row * R + region, return_inverse=True, return_counts=True)
        z = pieces.loc.new_empty(len(row), pieces.loc.shape[-1])
        order = inverse.argsort(stable=True)
        start = count.cumsum(0) - count
        # Pairs with nearly as many draws go together: at most half of what is drawn is left over.
        size = count.double().log2().ceil().long()
        for exponent in size.unique().tolist():
            some = (size == exponent).nonzero()[:, 0]
            most = 2**exponent
            _, loc, scale_tril = pieces.pairs(pair[some] // R, pair[some] % R)
            draws = integrals.sample(cells[pair[some] % R], loc, scale_tril, (most,)).movedim(0, 1)
            used = torch.arange(most, device=row.device) < count[some, None]
            where = start[some, None] + torch.arange(most, device=row.device)
            z[order[where[used]]] = draws[used]
        return z

    def _mixture_moments(self) -> tuple[Tensor, Tensor]:
        means, covariances = [], []
        for part, posterior in region_posteriors(self.joint, self._x):
            probs = posterior.log_probs.exp()
            mean = torch.einsum("nr,nrl->nl", probs, posterior.mean)
            centred = posterior.mean - mean[:, None]
            within = torch.einsum("nr,nrlm->nlm", probs, posterior.covariance)
            between = torch.einsum("nr,nrl,nrm->nlm", probs, centred, centred)
            covariances.append((part.rows, within + between))
            means.append((part.rows, mean))
        return self._gathered(means), self._gathered(covariances)

    @property
    def mean(self) -> Tensor:
        """(..., L) exact E[z | x]."""
        return self._shaped(self._mixture_moments()[0])

    @property
    def covariance_matrix(self) -> Tensor:
        """(..., L, L) exact Cov[z | x]."""
        return self._shaped(self._mixture_moments()[1])

    @property
    def variance(self) -> Tensor:
        """(..., L) exact variances of z given x."""
        return self._shaped(self._mixture_moments()[1].diagonal(dim1=-2, dim2=-1))

    def quantiles(self, levels: Sequence[float] | Tensor) -> Tensor:
        """Exact quantiles of every latent coordinate, by solving its exact distribution function.

        Args:
            levels: Q probabilities strictly between 0 and 1.

        Returns:
            (Q, ..., L).
        """
        probabilities = torch.as_tensor(levels, dtype=torch.float64, device=self._x.device)
        if probabilities.dim() != 1 or not bool(((probabilities > 0) & (probabilities < 1)).all()):
            raise InvalidData(
                f"levels is {levels}: expected a list of probabilities strictly between 0 and 1"
            )
        mean, covariance = self._mixture_moments()
        deviation = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        found = []
        for chunk in self._chunks():
            # What is left out has less than a rounding error of the mass.
            rows, regions = (chunk.log_probs > -40).nonzero(as_tuple=True)
            log_k, loc, scale_tril = chunk.pieces.pairs(rows, regions)
            log_weights = log_k - chunk.log_prob[rows]
            solved = [
                mixture_quantiles(
                    probabilities,
                    mean[chunk.rows, axis],
                    deviation[chunk.rows, axis],
                    axis,
                    rows,
                    log_weights,
                    chunk.joint.cells[regions],
                    loc,
                    scale_tril,
                )
                for axis in range(self.event_shape[0])
            ]
            found.append((chunk.rows, torch.stack(solved, dim=-1).movedim(0, 1)))
        joined = self._gathered(found).movedim(0, 1)
        return torch.stack([self._shaped(level) for level in joined])

    @property
    def mode(self) -> Tensor:
        """(..., L) the z of highest posterior density, the best of every cell's constrained optimum."""
        found = []
        # A region of little mass may hold the highest density: all of them are looked at.
        for rows in self.joint.chunks(self._x):
            pieces = self.joint.pieces(self._x[rows])
            loc, tril = pieces.loc, pieces.scale_tril
            nearest = integrals.nearest_point(self.joint.cells, loc, tril)
            white = torch.linalg.solve_triangular(tril, (nearest - loc)[..., None], upper=False)[..., 0]
            peak = pieces.log_k - tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) - 0.5 * white.square().sum(-1)
            best = peak.argmax(-1)
            found.append(nearest[torch.arange(len(best), device=best.device), best])
        return self._shaped(torch.cat(found))

    def entropy(self) -> Tensor:
        r"""(...,) exact :math:`-E[\log p(z | x)]` in nats, from the truncated moments."""
        found = []
        L = self.event_shape[0]
        for part, posterior in region_posteriors(self.joint, self._x):
            pieces = part.joint.pieces(self._x[part.rows])
            tril = pieces.scale_tril
            shift = torch.linalg.solve_triangular(tril, (posterior.mean - pieces.loc)[..., None], upper=False)
            spread = torch.linalg.solve_triangular(tril, posterior.covariance, upper=False)
            spread = torch.linalg.solve_triangular(tril, spread.mT, upper=False)
            square = shift.square().sum((-2, -1)) + spread.diagonal(dim1=-2, dim2=-1).sum(-1)
            log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * L * math.log(2 * math.pi)
            log_density = pieces.log_k - log_det - 0.5 * square
            probs = posterior.log_probs.exp()
            expected = torch.where(probs > 0, probs * log_density, 0.0).sum(-1)
            found.append((part.rows, posterior.log_prob - expected))
        return self._shaped(self._gathered(found))
