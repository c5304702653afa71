# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Gibbs sampling of a bidirectional Helmholtz machine, exact in x through a second replica of the latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from pyro_cpa.errors import InvalidData
from pyro_cpa.models.bernoulli_layers import check_binary
from pyro_cpa.models.latent_model import check_count

if TYPE_CHECKING:
    from pyro_cpa.models.helmholtz_machine import BidirectionalHelmholtzMachine

__all__ = ["HelmholtzChain", "check_partly_observed"]


class HelmholtzChain:
    r"""Markov chains with invariant distribution p*(x, z), or p*(x_mis, z | x_obs) where x is clamped.

    The conditional of x under p* holds the factor sqrt(q(x)) = sqrt(p*(x)), which cannot be computed. The
    chain therefore runs on x and **two** replicas of the latents,

    .. math:: \pi(x, z, z') \propto \sqrt{p(x, z)\, q(z \mid x)} \sqrt{p(x, z')\, q(z' \mid x)},

    whose normaliser is Z^2 and whose marginal in (x, z) is exactly p*(x, z); every factor is known. A sweep
    updates z_1, ..., z_L (both replicas at once), then x.

    Args:
        machine: the two nets.
        x: (C, D) binary start, one chain a row; what ``observed`` leaves free starts at random.
        observed: (C, D) or (D,) boolean, True where x stays clamped; None: nothing is, and x is the start.
        num_proposals: None: every unit is drawn in turn from its exact conditional. An integer K >= 2: a
            whole layer at once, from K - 1 proposals and its current value, in proportion to their weights.

    Raises:
        InvalidData: for x that is not binary where observed, or a mask of another shape or type.

    Note:
        Both updates leave the target exactly invariant; only convergence is asymptotic. Blocks cost little
        but seldom move a wide layer; single units cost one small product each and mix better. All chains and
        both replicas move in parallel. Dropping sqrt(q(x)) instead of adding the replica would not sample p*.

    References:
        J. Bornschein, S. Shabanian, A. Fischer, Y. Bengio (2016), "Bidirectional Helmholtz Machines".
        C. Andrieu, A. Doucet, R. Holenstein (2010), "Particle Markov chain Monte Carlo methods" (the current
        value among the proposals).

    Example:
        >>> from pyro_cpa.models.helmholtz_machine import BidirectionalHelmholtzMachine
        >>> chain = BidirectionalHelmholtzMachine(6, (3,)).chain(torch.zeros(4, 6))
        >>> [layer.shape for layer in chain.sweep(10).layers]
        [torch.Size([4, 6]), torch.Size([4, 3])]
    """

    def __init__(
        self,
        machine: BidirectionalHelmholtzMachine,
        x: Tensor,
        observed: Tensor | None = None,
        num_proposals: int | None = None,
    ) -> None:
        if num_proposals is not None and num_proposals < 2:
            raise InvalidData(
                f"num_proposals is {num_proposals}; expected None, or at least 2 (one is the current value)."
            )
        self.machine = machine
        self.num_proposals = num_proposals
        self.observed: Tensor | None = None
        if observed is not None:
            like = next(machine.parameters())
            x, self.observed = check_partly_observed(x, observed, machine.sizes[0], like)
            x = torch.where(self.observed, x, torch.randint_like(x, 2))
        x = machine.check(x)
        # Leading dimension: one x for both replicas, two of every latent layer.
        self._states = [x[None], *machine.sample_recognition(x, 2)[1:]]

    @property
    def layers(self) -> list[Tensor]:
        """Current ``[x, z_1, ..., z_L]`` of the first replica, each (C, H_l)."""
        return [state[0] for state in self._states]

    @torch.no_grad()
    def sweep(self, num_sweeps: int = 1) -> HelmholtzChain:
        """Run ``num_sweeps`` sweeps and return the chain itself."""
        check_count(num_sweeps=num_sweeps)
        update = self._update_units if self.num_proposals is None else self._update_block
        for _ in range(num_sweeps):
            for level in (*range(1, len(self._states)), 0):
                update(level)
        return self

    # The conditional of a layer v is, up to a constant and in logarithm,
    #     field . v + 1/2 sum_children log Bernoulli(child; net(v)),
    # where field collects the logits that v receives from its neighbours and the children are the layers that
    # p and q draw from v.

    def _field(self, level: int) -> Tensor:
        machine, states = self.machine, self._states
        top = len(states) - 1
        above = machine.top_logits() if level == top else machine.generation[level](states[level + 1])
        if level == 0:
            return 0.5 * above.sum(0, keepdim=True)
        return 0.5 * (above + machine.recognition[level - 1](states[level - 1]))

    def _children(self, level: int) -> list[tuple[nn.Linear, nn.Sequential, Tensor]]:
        """First linear map, the rest of the net, and the value of each child."""
        machine, states = self.machine, self._states
        children: list[tuple[Any, Tensor]] = []
        if level > 0:
            children.append((machine.generation[level - 1], states[level - 1]))
        if level < len(states) - 1:
            children.append((machine.recognition[level], states[level + 1]))
        return [(net[0], net[1:], child) for net, child in children]

    def _update_units(self, level: int) -> None:
        state = self._states[level].clone()
        field = self._field(level).expand_as(state)
        children = self._children(level)
        inputs = [first(state) for first, _, _ in children]  # kept up to date unit by unit
        clamped = self.observed if level == 0 else None
        for unit in range(state.shape[-1]):
            if clamped is not None and bool(clamped[:, unit].all()):
                continue
            old = state[..., unit]
            log_odds = field[..., unit]
            for (first, rest, child), current in zip(children, inputs, strict=True):
                column = first.weight[:, unit]
                off = current - old[..., None] * column
                change = _log_bernoulli(child, rest(off + column)) - _log_bernoulli(child, rest(off))
                log_odds = log_odds + 0.5 * _over_replicas(change, level)
            new = torch.bernoulli(torch.sigmoid(log_odds))
            if clamped is not None:
                new = torch.where(clamped[:, unit], old, new)
            for (first, _, _), current in zip(children, inputs, strict=True):
                current += (new - old)[..., None] * first.weight[:, unit]
            state[..., unit] = new
        self._states[level] = state

    def _update_block(self, level: int) -> None:
        state = self._states[level]
        probs = torch.sigmoid(self._field(level)).expand_as(state)
        fresh = torch.bernoulli(probs.expand(self.num_proposals - 1, *state.shape))  # type: ignore[operator]
        if level == 0 and self.observed is not None:
            fresh = torch.where(self.observed, state, fresh)
        proposals = torch.cat([state[None], fresh])
        log_w = torch.zeros(proposals.shape[:-1]).to(state)
        for first, rest, child in self._children(level):
            log_w += 0.5 * _over_replicas(_log_bernoulli(child, rest(first(proposals))), level)
        chosen = torch.distributions.Categorical(logits=log_w.movedim(0, -1)).sample()
        self._states[level] = proposals.gather(0, chosen[None, ..., None].expand(1, *state.shape))[0]


def check_partly_observed(x: Tensor, observed: Tensor, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` (C, dim) with zeros where it is not observed, and the mask in its shape, moved to ``like``.

    Raises:
        InvalidData: for a mask of another type or shape, or x that is not binary where observed.
    """
    if observed.dtype != torch.bool or observed.shape not in (x.shape, (dim,)):
        raise InvalidData(
            f"observed is {observed.dtype} of shape {tuple(observed.shape)}; expected torch.bool of "
            f"shape {tuple(x.shape)} or ({dim},), True where x is known."
        )
    x, observed = x.to(like), observed.to(like.device)
    if x.dim() == 2 and x.shape[1] == dim:
        observed = observed.expand(x.shape)
        x = torch.where(observed, x, torch.zeros_like(x))
    return check_binary(x, dim, like, "the observed part of x"), observed


def _log_bernoulli(value: Tensor, logits: Tensor) -> Tensor:
    """log of the factorised Bernoulli, summed over units; the arguments broadcast."""
    logits, value = torch.broadcast_tensors(logits, value)
    return -binary_cross_entropy_with_logits(logits, value, reduction="none").sum(-1)


def _over_replicas(term: Tensor, level: int) -> Tensor:
    """(..., 2, C) terms, summed over the replicas where both speak about the one x."""
    return term.sum(-2, keepdim=True) if level == 0 else term
