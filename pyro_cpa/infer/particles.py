# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Drawing K particles in a loop, a plate or chunks, all with one minibatch and one draw of outer latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_site_shape, get_rng_state, set_rng_state
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from pyro_cpa.errors import UnsupportedModel
from pyro_cpa.infer.draws import DetachDraws, Draws, ParticlePlate, ReuseValues, ThroughDraws
from pyro_cpa.infer.log_weights import LogWeights
from pyro_cpa.infer.sites import is_drawn, sample_sites
from pyro_cpa.infer.trace_weights import trace_log_weights
from pyro_cpa.infer.weight_plates import plate_frames

__all__ = ["plate_nesting", "sample_log_weights"]

Values = dict[str, Any]


def sample_log_weights(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_particles: int = 1,
    plates: tuple[str, ...] | None = None,
    vectorize: bool = False,
    max_plate_nesting: float = math.inf,
    chunk_size: int | None = None,
    draws: Draws = Draws.ATTACHED,
    linear: bool = False,
) -> LogWeights:
    r"""Draw K particles from the guide and weigh them under the model.

    Args:
        model: callable with Pyro sites.
        guide: callable with Pyro sites, or a ``GuideMessenger``.
        args: positional arguments of both.
        kwargs: keyword arguments of both.
        num_particles: K.
        plates: names of the plates with one weight per element; None takes those shared by all sites.
        vectorize: draw particles in a plate; otherwise one after the other.
        max_plate_nesting: plate dims of model and guide; infinite has them found by one more run.
        chunk_size: particles whose graph is held in memory at a time. Each chunk is run again, with the same
            random numbers, when its derivative is taken.
        draws: how derivatives pass through the draws.
        linear: whether the objective is linear in log w (see :func:`trace_log_weights`).

    Returns:
        LogWeights of all K particles; all share one minibatch and one draw of the outer latents.
    """
    for role, fn in (("model", model), ("guide", guide)):
        if not callable(fn):
            raise UnsupportedModel(f"the {role} is {fn!r}: it must be callable, with pyro.sample sites in it")
    kwargs = dict(kwargs or {})
    vectorize = vectorize and num_particles > 1
    if vectorize and max_plate_nesting == math.inf:
        max_plate_nesting = plate_nesting(model, guide, args, kwargs)
    pair = _Pair(model, guide, args, kwargs, plates, max_plate_nesting, draws, linear)
    chunk = min(chunk_size or num_particles, num_particles)
    sizes = [min(chunk, num_particles - start) for start in range(0, num_particles, chunk)]
    recompute = len(sizes) > 1 and torch.is_grad_enabled()
    chunks: list[LogWeights] = []
    shared: Values = {}
    for size in sizes:
        run = partial(pair.draw_all, [size] if vectorize else [None] * size, shared)
        if recompute:
            with set_checkpoint_early_stop(False):
                weights, shared = checkpoint(_SameNumbers(run), use_reentrant=False, preserve_rng_state=False)
        else:
            weights, shared = run()
        chunks.append(weights)
    return LogWeights.cat(chunks)


@dataclass(frozen=True)
class _Pair:
    """A model, a guide and how to run them."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    plates: tuple[str, ...] | None
    nesting: float
    draws: Draws
    linear: bool

    def draw_all(self, sizes: list[int | None], shared: Values) -> tuple[LogWeights, Values]:
        """One run for each size; what the first one shares, the others reuse."""
        runs = []
        for size in sizes:
            weights, shared = self.draw(size, shared)
            runs.append(weights)
        return LogWeights.cat(runs), shared

    def draw(self, size: int | None, shared: Values) -> tuple[LogWeights, Values]:
        """One run: a plate of ``size`` particles, or a single particle (None)."""
        messenger = poutine.unwrap(self.guide)
        if isinstance(messenger, GuideMessenger):
            with self._handlers(size, shared, in_guide=True):
                self.guide(*self.args, **self.kwargs)
            model_trace, guide_trace = messenger.get_traces()
            drawn, leaves = messenger.trace, None
            if self.draws is Draws.LEAVES:
                raise UnsupportedModel(
                    f"{type(messenger).__name__} runs model and guide in one, so the guide cannot be run "
                    "again on copies of its draws: use an estimator without replay, such as 'reparam'"
                )
        else:
            drawn = guide_trace = self._trace(self.guide, size, shared)
            leaves = self._leaves(drawn)
            if leaves is not None:
                # Points and transforms are computed again, from the leaves.
                guide_trace = self._trace(self.guide, size, shared | _values(drawn, is_drawn) | leaves)
            model_trace = self._trace(self.model, size, shared | _values(guide_trace, lambda site: True))
        weights = trace_log_weights(
            model_trace,
            prune_subsample_sites(guide_trace),
            plates=self.plates,
            num_particles=size or 1,
            particle_dim=None if size is None else self._particle_dim,
            max_plate_nesting=self.nesting + (size is not None),
            detached=self.draws is Draws.DETACHED,
            linear=self.linear,
        )
        weights = self._with_views(weights, drawn, leaves)
        if not shared:
            outer = _values(drawn, lambda site: is_drawn(site) and not self._is_inner(site))
            shared = _values(model_trace, lambda site: False) | outer
        return weights, shared

    @property
    def _particle_dim(self) -> int:
        return -int(self.nesting) - 1

    @contextmanager
    def _handlers(self, size: int | None, values: Values, in_guide: bool) -> Iterator[None]:
        with ExitStack() as stack:
            # Not in the model, which would cut point estimates, drawn there from a density, from their guide.
            if in_guide and self.draws is Draws.DETACHED:
                stack.enter_context(DetachDraws())
            stack.enter_context(ReuseValues(values))
            if size is not None:
                stack.enter_context(ParticlePlate(size, self._particle_dim, self.plates or ()))
            yield

    def _trace(self, fn: Callable[..., Any], size: int | None, values: Values) -> Trace:
        with self._handlers(size, values, in_guide=fn is self.guide):
            return poutine.trace(fn).get_trace(*self.args, **self.kwargs)

    def _is_inner(self, site: Any) -> bool:
        return set(self.plates or ()) <= plate_frames(site).keys()

    def _leaves(self, guide_trace: Trace) -> Values | None:
        """Leaf copies of the draws inside the weight, or None where derivatives run through the draws."""
        if self.draws not in (Draws.LEAVES, Draws.AUTO) or not torch.is_grad_enabled():
            return None
        inner = [(name, site) for name, site in sample_sites(guide_trace) if self._is_inner(site)]
        for name, site in inner:
            if not site["fn"].has_rsample:
                if self.draws is Draws.AUTO:
                    return None
                raise UnsupportedModel(
                    f"guide site '{name}' ({type(site['fn']).__name__}) is not reparameterised, so no "
                    "derivative passes through its draws: use estimator='vimco' or 'score'"
                )
        return {
            name: site["value"].detach().requires_grad_()
            for name, site in inner
            if is_drawn(site) and site["value"].requires_grad
        }

    def _with_views(self, weights: LogWeights, drawn: Trace, leaves: Values | None) -> LogWeights:
        assert weights.direct is not None
        if leaves is None:
            wanted = self.draws is Draws.LEAVES  # without autograd: the values alone
            return replace(
                weights, path=weights.log_w if wanted else None, direct=weights.log_w if wanted else None
            )
        path, direct, log_p, log_q = ThroughDraws.apply(
            (weights.log_w, list(leaves.values())),
            weights.direct,
            weights.log_p,
            weights.log_q,
            *(drawn.nodes[name]["value"] for name in leaves),
        )
        return replace(weights, path=path, direct=direct, log_p=log_p, log_q=log_q)


def _values(trace: Trace, wanted: Callable[[Any], bool]) -> Values:
    """The minibatch of ``trace``, and the values of those sites of density that are ``wanted``."""
    subsamples: Any = ((name, site) for name, site in trace.nodes.items() if site_is_subsample(site))
    minibatch = {name: site["value"] for name, site in subsamples if len(site["value"]) < site["fn"].size}
    return minibatch | {name: site["value"] for name, site in sample_sites(trace) if wanted(site)}


def plate_nesting(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> int:
    """The number of plate dims of a model and guide, from one run that leaves the random state as it was."""
    state = _random_state()
    with poutine.block():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    _set_random_state(state)
    traces = [prune_subsample_sites(trace) for trace in (model_trace, guide_trace)]
    sites = [site for trace in traces for site in trace.nodes.values() if site["type"] == "sample"]
    if is_validation_enabled():
        # Before the particle axis exists; later a stray batch axis could pass for it.
        for trace in traces:
            trace.compute_log_prob()
        for site in sites:
            check_site_shape(site, max_plate_nesting=math.inf)  # type: ignore[arg-type]
    dims = [frame.dim for site in sites for frame in site["cond_indep_stack"] if frame.dim is not None]
    return -min(dims, default=0)


def _random_state() -> tuple[Any, Any]:
    return get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_random_state(state: tuple[Any, Any]) -> None:
    set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


class _SameNumbers:
    """Calls ``run``; every call after the first sees the random numbers of the first and leaves no mark."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run
        self.state: tuple[Any, Any] | None = None

    def __call__(self) -> Any:
        if self.state is None:
            self.state = _random_state()
            return self.run()
        after = _random_state()
        _set_random_state(self.state)
        try:
            return self.run()
        finally:
            _set_random_state(after)
