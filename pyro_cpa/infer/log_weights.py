# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Log-weights of a model/guide pair: one per particle and per element of the plates that all sites share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_cpa.errors import UnsupportedModel

__all__ = ["LogWeights"]


@dataclass(frozen=True)
class LogWeights:
    r"""Everything an objective may know about a model/guide pair: ``log w = log p(x, z) - log q(z | x)``.

    The objective is, with :math:`F` a function of the K log-weights of one element n of the plates,

    .. math:: \text{outer} + \sum_n \text{scale}_n \, F(\log w_{1n}, \dots, \log w_{Kn}).

    Sequential plates come first, as one axis; the vectorised ones follow in the order of their dims.

    Args:
        log_p: (K, \*plates) log joint density of the model.
        log_q: (K, \*plates) log density of the guide.
        scale: (\*plates) factor outside the logarithm: subsampling and a ``poutine.scale`` common to all.
        outer: () log p - log q of the sites outside the named plates, drawn once for all particles.
        plates: names of the weight plates.
        score: (K, \*plates) log density of the guide sites that cannot be reparameterised, unscaled and
            unmasked; None if there are none or the draws were detached.
        score_log_q: (K, \*plates) the part of ``log_q`` that these sites make up, or None like ``score``.
        score_sites: their names.
        outer_score: () the same for the outer sites (all of them where the draws were detached), or None.
        path: (K, \*plates) log w, differentiable through the draws alone; None unless replayed on leaves.
        direct: (K, \*plates) log p less the transforms of the guide, differentiable through all but the
            draws: parameters of the model, point estimates and transforms of the guide, outer latents; None
            like ``path``.
    """

    log_p: Tensor
    log_q: Tensor
    scale: Tensor
    outer: Tensor
    plates: tuple[str, ...] = ()
    score: Tensor | None = None
    score_log_q: Tensor | None = None
    score_sites: tuple[str, ...] = ()
    outer_score: Tensor | None = None
    path: Tensor | None = None
    direct: Tensor | None = None

    @property
    def num_particles(self) -> int:
        """K."""
        return self.log_p.shape[0]

    @property
    def log_w(self) -> Tensor:
        r"""(K, \*plates) the log-weights."""
        return self.log_p - self.log_q

    def total(self, per_element: Tensor) -> Tensor:
        r"""() the scaled sum of a (\*plates) quantity."""
        return (self.scale * per_element).sum()

    @staticmethod
    def cat(runs: Sequence[LogWeights]) -> LogWeights:
        """Join runs of the same minibatch along the particle axis.

        Raises:
            UnsupportedModel: if runs differ in their plates or in what must be common to all particles.
        """
        first = runs[0]
        for run in runs[1:]:
            if run.plates != first.plates or run.log_p.shape[1:] != first.log_p.shape[1:]:
                raise UnsupportedModel(
                    f"the structure differs between particles: plates {first.plates} of shape "
                    f"{tuple(first.log_p.shape[1:])} in one, {run.plates} of shape "
                    f"{tuple(run.log_p.shape[1:])} in another. Log-weights need the same elements in every "
                    "particle: name the plates that all sites of all particles share with plates=(...), or "
                    "give plates=() for one weight in all"
                )
            if not torch.allclose(run.outer.detach(), first.outer.detach(), equal_nan=True):
                raise UnsupportedModel(
                    f"a site outside plates={first.plates} depends on latents inside them, so it cannot be "
                    "shared by the particles: leave those plates out of plates=(...)"
                )
        if len({run.path is None for run in runs}) > 1:
            raise UnsupportedModel(
                "some particles' draws are all reparameterised, others' are not: choose an estimator for "
                "both, such as 'vimco' or 'score'"
            )

        def join(tensors: list[Tensor | None]) -> Tensor | None:
            if all(t is None for t in tensors):
                return None
            # A site may exist in some particles only: elsewhere its score is zero.
            return torch.cat(
                [
                    torch.zeros_like(run.log_p) if t is None else t
                    for t, run in zip(tensors, runs, strict=True)
                ]
            )

        return LogWeights(
            log_p=torch.cat([run.log_p for run in runs]),
            log_q=torch.cat([run.log_q for run in runs]),
            scale=first.scale,
            outer=first.outer,
            plates=first.plates,
            score=join([run.score for run in runs]),
            score_log_q=join([run.score_log_q for run in runs]),
            score_sites=tuple(dict.fromkeys(name for run in runs for name in run.score_sites)),
            outer_score=first.outer_score,
            path=join([run.path for run in runs]),
            direct=join([run.direct for run in runs]),
        )
