# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The plates that have one importance weight per element, and what each site contributes to an element."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_cpa.errors import UnsupportedModel
from pyro_cpa.infer.sites import Site

__all__ = ["PARTICLE_PLATE", "WeightPlates", "plate_frames", "user_scale"]

PARTICLE_PLATE = "num_particles_vectorized"


def plate_frames(site: Site) -> dict[str, Any]:
    """The plates around a site by name, without the particle plate."""
    return {frame.name: frame for frame in site["cond_indep_stack"] if frame.name != PARTICLE_PLATE}


def _subsampling(frames: Iterable[Any]) -> float:
    return math.prod(1.0 if f.full_size is None else f.full_size / f.size for f in frames)


def user_scale(site: Site) -> Any:
    """What ``poutine.scale`` put on the site, a number or a tensor, apart from its plates' subsampling."""
    return site["scale"] / _subsampling(plate_frames(site).values())


@dataclass(frozen=True)
class WeightPlates:
    """The weight plates W of a run.

    Args:
        loops: sequential plates; their elements share one leading axis.
        axes: vectorised plates, in the order of their dims.
    """

    loops: tuple[str, ...]
    axes: tuple[str, ...]

    @classmethod
    def of(cls, sites: Sequence[Site], plates: Iterable[str] | None) -> WeightPlates:
        """Those named by ``plates``, or else those that all ``sites`` share."""
        stacks = [plate_frames(site) for site in sites]
        known = {name: frame for stack in stacks for name, frame in stack.items()}
        named = set(known).intersection(*stacks) if plates is None else set(plates)
        if not named <= known.keys():
            raise UnsupportedModel(
                f"plates={tuple(sorted(named))}: there is no plate {sorted(named - known.keys())} around any "
                f"site of the model or guide; name some of {sorted(known)}"
            )
        for stack in stacks:
            for name in named & stack.keys():
                if stack[name].vectorized != known[name].vectorized:
                    raise UnsupportedModel(
                        f"plate '{name}' is a loop at one site and vectorised at another, so its elements "
                        "cannot be matched: use one form in the model and the guide"
                    )
        return cls(
            loops=tuple(sorted(name for name in named if not known[name].vectorized)),
            axes=tuple(
                sorted((name for name in named if known[name].vectorized), key=lambda n: known[n].dim)
            ),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all weight plates, loops first."""
        return self.loops + self.axes

    def contain(self, site: Site) -> bool:
        """Whether the site lies inside every weight plate."""
        return set(self.names) <= plate_frames(site).keys()

    def element(self, site: Site) -> tuple[int, ...]:
        """Which element of the loops the site belongs to."""
        frames = plate_frames(site)
        # A plate object that is looped over again goes on counting.
        return tuple((frames[name].counter - 1) % frames[name].size for name in self.loops)

    def dims(self, site: Site) -> tuple[int, ...]:
        """Negative dims of the axes at this site."""
        frames = plate_frames(site)
        return tuple(frames[name].dim for name in self.axes)

    def sizes(self, site: Site) -> tuple[int, ...]:
        """Sizes of the axes."""
        frames = plate_frames(site)
        return tuple(frames[name].size for name in self.axes)

    def subsampling(self, site: Site) -> float:
        """N / B of the weight plates."""
        frames = plate_frames(site)
        return _subsampling(frames[name] for name in self.names)

    def inner_subsampling(self, site: Site) -> float:
        """N / B of the plates inside the weight."""
        return _subsampling(frame for name, frame in plate_frames(site).items() if name not in self.names)

    def check_inner(self, name: str, site: Site) -> None:
        """Refuse a subsampled sum inside the weight: the exponential of it is biased."""
        for plate, frame in plate_frames(site).items():
            if plate not in self.names and frame.full_size not in (None, frame.size):
                raise UnsupportedModel(
                    f"plate '{plate}' is subsampled ({frame.size} of {frame.full_size}) but lies inside the "
                    f"importance weight at site '{name}': the weight would be biased. Subsample only plates "
                    f"shared by all sites, or name it, plates=('{plate}',), which draws the latents outside "
                    "it once for all particles"
                )

    def reduce(self, x: Tensor, name: str, site: Site, particle_dim: int | None) -> Tensor:
        r"""Sum ``x``, laid out like the site's batch, to (K, \*axes)."""
        sizes = self.sizes(site)
        kept = self.dims(site) if particle_dim is None else (particle_dim, *self.dims(site))
        depth = max((-dim for dim in kept), default=0)
        x = x.reshape((1,) * (depth - x.dim()) + x.shape)
        x = x.movedim(kept, tuple(range(len(kept))))
        x = x.flatten(len(kept)).sum(-1) if x.dim() > len(kept) else x
        if particle_dim is None:
            x = x.unsqueeze(0)
        if x.shape[1:] != sizes:
            raise UnsupportedModel(
                f"site '{name}' has log densities of shape {tuple(x.shape[1:])} where the plates {self.axes} "
                f"around it have {sizes}: it must have one per element of these plates"
            )
        return x

    def common_scale(self, sites: Sequence[Site]) -> Any:
        r"""The ``poutine.scale`` that all ``sites`` share, a number or (\*axes); None if they share none."""
        scales = [user_scale(site) for site in sites]
        if not any(isinstance(scale, Tensor) for scale in scales):
            shared = all(math.isclose(scale, scales[0], rel_tol=1e-12) for scale in scales)
            return scales[0] if shared else None
        placed = [self._place_scale(scale, site) for scale, site in zip(scales, sites, strict=True)]
        first = placed[0]
        if first is None or any(p is None or not torch.equal(p, first) for p in placed[1:]):
            return None
        return first

    def _place_scale(self, scale: Any, site: Site) -> Tensor | None:
        scale = torch.as_tensor(scale)
        dims, sizes = self.dims(site), self.sizes(site)
        depth = max((-dim for dim in dims), default=0)
        scale = scale.reshape((1,) * (depth - scale.dim()) + scale.shape)
        scale = scale.movedim(dims, tuple(range(len(dims))))
        if any(size != 1 for size in scale.shape[len(dims) :]):
            return None
        return scale.reshape(scale.shape[: len(dims)]).expand(sizes)
