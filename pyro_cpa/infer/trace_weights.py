# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""From a pair of traces to log-weights: what goes inside the logarithm, what outside, what is summed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from pyro_cpa.errors import UnsupportedModel
from pyro_cpa.infer.log_weights import LogWeights
from pyro_cpa.infer.sites import Site, check_pair, has_no_own_density, sample_sites
from pyro_cpa.infer.weight_plates import WeightPlates, user_scale

__all__ = ["trace_log_weights"]


def trace_log_weights(
    model_trace: Trace,
    guide_trace: Trace,
    *,
    plates: Iterable[str] | None = None,
    num_particles: int = 1,
    particle_dim: int | None = None,
    max_plate_nesting: float = math.inf,
    detached: bool = False,
    linear: bool = False,
) -> LogWeights:
    r"""Log-weights of one run of a guide and of the model replayed against it.

    The weight plates W are those named by ``plates``, or else those shared by all sites. The log density of
    every site inside all of W is masked (m), multiplied by a scale r that is not common to the sites, and
    summed over the axes outside W; a common scale and the subsampling of W stay outside the logarithm:

    .. math:: \log w_{kn} = \sum_{\text{sites}} r \, m \, (\log p - \log q), \qquad
              \text{scale}_n = r_{\text{common}, n} \prod_{W} N / B.

    Args:
        model_trace: the model, its latents replayed from ``guide_trace``.
        guide_trace: the guide.
        plates: names of the weight plates; sites outside them are shared by all particles.
        num_particles: K, the size of the particle plate.
        particle_dim: negative dim of the particle plate; None for a single particle without a plate.
        max_plate_nesting: number of plate dims, for Pyro's shape checks.
        detached: whether the draws were cut from the graph when they were made.
        linear: whether the objective is linear in log w, so that a subsampled plate may lie inside.

    Returns:
        LogWeights without ``path``; ``direct`` holds log p less the guide's transforms.

    Raises:
        UnsupportedModel: for a latent without a guide site, an unknown plate, a subsampled plate inside the
            weight, an outer site that depends on the particle, or a partly reparameterised sampler.
    """
    check_pair(model_trace, guide_trace)
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace, max_plate_nesting)
    model_trace.compute_log_prob()
    if detached:
        guide_trace.compute_log_prob()
    else:
        guide_trace.compute_score_parts()
    terms = [_Term(name, site, False, None) for name, site in sample_sites(model_trace)]
    terms += [
        _Term(name, site, True, _score(name, site, detached)) for name, site in sample_sites(guide_trace)
    ]
    weight_plates = WeightPlates.of([term.site for term in terms], plates)
    inner = [term for term in terms if weight_plates.contain(term.site)]
    outer = [term for term in terms if not weight_plates.contain(term.site)]
    outer_terms = [_shared_log_ratio(term, weight_plates, particle_dim) for term in outer]
    if is_validation_enabled():
        for term in terms:
            check_site_shape(term.site, max_plate_nesting)  # type: ignore[arg-type]

    elements: dict[tuple[int, ...], list[_Term]] = {}
    for term in inner:
        elements.setdefault(weight_plates.element(term.site), []).append(term)
    sums = [
        _element_sums(group, weight_plates, num_particles, particle_dim, linear)
        for group in elements.values()
    ]
    joined = _join(sums, num_particles, bool(weight_plates.loops))
    outer_scores = [term.score.sum() for term in outer if term.score is not None]
    score_sites = () if detached else tuple(term.name for term in inner if term.score is not None)
    return LogWeights(
        log_p=joined.log_p,
        log_q=joined.log_q,
        scale=joined.scale,
        outer=joined.log_p.new_zeros(()) + _sum(outer_terms),
        plates=weight_plates.names,
        score=joined.score if score_sites else None,
        score_log_q=joined.score_log_q if score_sites else None,
        score_sites=score_sites,
        outer_score=_sum(outer_scores) if outer_scores else None,
        direct=joined.log_p - joined.transforms,
    )


class _Term(NamedTuple):
    name: str
    site: Site
    in_guide: bool
    score: Tensor | None


class _Sums(NamedTuple):
    log_p: Tensor
    log_q: Tensor
    score: Tensor
    score_log_q: Tensor
    transforms: Tensor
    scale: Tensor


def _sum(tensors: Iterable[Tensor]) -> Any:
    return sum(tensors)


def _score(name: str, site: Site, detached: bool) -> Tensor | None:
    """Log density of a guide site whose draw carries no derivative; None where the draw does."""
    if detached:
        return None if has_no_own_density(site) else site["unscaled_log_prob"]
    _, score, entropy = site["score_parts"]
    if is_identically_zero(score):
        return None
    if not is_identically_zero(entropy):
        raise UnsupportedModel(
            f"guide site '{name}' is sampled by rejection ({type(site['fn']).__name__}), which is "
            "reparameterised only in part; multi-sample objectives have no estimator for it: use a "
            "distribution that is reparameterised, or one that is not at all"
        )
    return score


def _shared_log_ratio(term: _Term, plates: WeightPlates, particle_dim: int | None) -> Tensor:
    """Scaled log density, negative for the guide, of a site that all particles share."""
    log_prob = term.site["log_prob"]
    if particle_dim is not None and log_prob.dim() >= -particle_dim and log_prob.shape[particle_dim] > 1:
        raise UnsupportedModel(
            f"site '{term.name}' lies outside plates={plates.names} but depends on latents inside them, so "
            "it cannot be shared by the particles: leave those plates out of plates=(...)"
        )
    return -log_prob.sum() if term.in_guide else log_prob.sum()


def _element_sums(
    terms: Sequence[_Term], plates: WeightPlates, num_particles: int, particle_dim: int | None, linear: bool
) -> _Sums:
    """Sums of one element of the loops: (K, *axes) each, and the outside scale (*axes)."""
    first = terms[0].site
    zero = first["unscaled_log_prob"].new_zeros((num_particles, *plates.sizes(first)))
    log_p = log_q = score = score_log_q = transforms = zero
    common = plates.common_scale([term.site for term in terms])
    for name, site, in_guide, site_score in terms:
        if not linear:
            plates.check_inner(name, site)
        scale = plates.inner_subsampling(site) * (user_scale(site) if common is None else 1.0)
        log_prob = scale_and_mask(site["unscaled_log_prob"], scale, site["mask"])
        log_prob = plates.reduce(log_prob, name, site, particle_dim)
        if not in_guide:
            log_p = log_p + log_prob
            continue
        log_q = log_q + log_prob
        if site_score is not None:
            score = score + plates.reduce(site_score, name, site, particle_dim)
            score_log_q = score_log_q + log_prob
        if has_no_own_density(site):
            transforms = transforms + log_prob
    outside = plates.subsampling(first) * (1.0 if common is None else common)
    return _Sums(log_p, log_q, score, score_log_q, transforms, zero[0] + outside)


def _join(sums: Sequence[_Sums], num_particles: int, loops: bool) -> _Sums:
    """Put the elements of the loops side by side on one axis, after that of the particles."""
    if not sums:
        zero = torch.zeros(num_particles)
        return _Sums(zero, zero, zero, zero, zero, torch.ones(()))
    if not loops:
        return sums[0]
    *per_particle, scales = (list(column) for column in zip(*sums, strict=True))
    return _Sums(*(torch.stack(column, dim=1) for column in per_particle), torch.stack(scales))  # type: ignore[call-arg]
