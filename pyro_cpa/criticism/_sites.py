# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The sites of a Pyro model as labelled arrays: plates become dimensions, padding goes, names are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from ..errors import InvalidData, UnsupportedModel

if TYPE_CHECKING:
    import xarray

__all__ = ["Layout", "Site", "read_layout"]


@dataclass(frozen=True)
class Site:
    """Where the dimensions of one site's value come from.

    Args:
        name: the site's name.
        kind: ``latent``, ``observed`` or ``deterministic``.
        value: the value seen when the model was read.
        batch_dims: a name for every batch axis; ``None`` for padding of size 1, which is dropped.
        event_dims: a name for every event axis.
    """

    name: str
    kind: str
    value: Tensor
    batch_dims: tuple[str | None, ...]
    event_dims: tuple[str, ...]

    @property
    def label(self) -> str:
        return self.name.replace("/", ".")

    @property
    def padding(self) -> set[int]:
        return {axis for axis, dim in enumerate(self.batch_dims) if dim is None}

    def dims(self, batch_only: bool) -> tuple[str, ...]:
        batch = tuple(dim for dim in self.batch_dims if dim is not None)
        return batch if batch_only else batch + self.event_dims

    @classmethod
    def read(cls, site: Mapping[str, Any], kind: str, event_names: Sequence[str]) -> Site:
        fn = site["fn"]
        value = torch.as_tensor(site["value"])
        value = value.expand(torch.broadcast_shapes(value.shape, fn.batch_shape + (1,) * fn.event_dim))
        num_batch = value.ndim - fn.event_dim
        plates: dict[int, str] = {
            num_batch + frame.dim: frame.name
            for frame in site["cond_indep_stack"]
            if frame.vectorized and num_batch + frame.dim >= 0
        }
        return cls._named(site["name"], kind, value, num_batch, plates, event_names)

    @classmethod
    def of_distribution(
        cls, name: str, fn: Any, plates: Sequence[str] | None, event_names: Sequence[str]
    ) -> Site:
        value = torch.empty(fn.batch_shape + fn.event_shape)
        named = dict(enumerate(plates or ()))
        return cls._named(name, "latent", value, len(fn.batch_shape), named, event_names)

    @classmethod
    def _named(
        cls,
        name: str,
        kind: str,
        value: Tensor,
        num_batch: int,
        plates: Mapping[int, str],
        event_names: Sequence[str],
    ) -> Site:
        label = name.replace("/", ".")
        batch_dims: list[str | None] = []
        for axis in range(num_batch):
            padding = value.shape[axis] == 1 and axis not in plates
            batch_dims.append(None if padding else plates.get(axis, f"{label}_batch_{axis}"))
        num_event = value.ndim - num_batch
        if event_names and len(event_names) != num_event:
            raise InvalidData(
                f"dims names {len(event_names)} event dimensions of site '{name}' ({list(event_names)}), "
                f"but it has {num_event}; its plates name themselves"
            )
        event_dims = tuple(event_names) or tuple(f"{label}_dim_{i}" for i in range(num_event))
        return cls(name, kind, value, tuple(batch_dims), event_dims)


@dataclass
class Layout:
    """The sites of a model and the labels of its dimensions; makes xarray datasets of draws."""

    sites: dict[str, Site]
    coords: dict[str, Sequence[Any]] = field(default_factory=dict)

    def _named(self, kind: str) -> list[str]:
        return [name for name, site in self.sites.items() if site.kind == kind]

    @property
    def latents(self) -> list[str]:
        return self._named("latent")

    @property
    def deterministic(self) -> list[str]:
        return self._named("deterministic")

    @property
    def observed(self) -> list[str]:
        return self._named("observed")

    @property
    def local_latents(self) -> list[str]:
        """Latent sites that share a plate with an observed site: one latent per datum."""
        plates = {dim for name in self.observed for dim in self.sites[name].batch_dims if dim is not None}
        return [name for name in self.latents if plates & set(self.sites[name].batch_dims)]

    def require_latents(self, available: Iterable[str], holder: str) -> None:
        missing = sorted(set(self.latents) - set(available))
        if missing:
            raise UnsupportedModel(
                f"{holder} lacks the model's latent site(s) {missing}: every latent site needs draws "
                "(return all sites from Predictive; draw enumerated sites with infer_discrete)"
            )

    def shaped(self, name: str, draws: Tensor) -> Tensor:
        """(S, ...) draws in the shape of the site, without the padding that ``Predictive`` adds."""
        shape = self.sites[name].value.shape
        if draws[0].numel() != shape.numel():
            raise InvalidData(
                f"draws of site '{name}' have shape {tuple(draws.shape)}, expected (draws, *{tuple(shape)})"
            )
        return draws.reshape(draws.shape[:1] + shape)

    def log_likelihood(self, node: Mapping[str, Any]) -> Tensor:
        """Log-density of an observed site, zero where masked, without subsampling or annealing scales."""
        log_prob = scale_and_mask(node["fn"].log_prob(node["value"]), mask=node["mask"])
        return torch.as_tensor(log_prob)

    def dataset(
        self, draws: Mapping[str, Sequence[Tensor]], leading: tuple[int, ...], batch_only: bool = False
    ) -> xarray.Dataset:
        """One group: every site's draws with its dimensions named, after ``chain`` and ``draw``.

        Args:
            draws: per site, the values draw after draw (a single one if ``leading`` is empty).
            leading: ``(chains, draws)``, or empty for data.
            batch_only: the values have batch dimensions alone, as a log-likelihood has.
        """
        variables = {}
        for name, values in draws.items():
            site = self.sites[name]
            dims = ("chain", "draw")[: len(leading)] + self._clear(site.dims(batch_only))
            shape = site.value.shape[: len(site.batch_dims)] if batch_only else site.value.shape
            array = torch.stack([torch.as_tensor(v).expand(shape) for v in values]).detach().cpu().numpy()
            kept = [n for axis, n in enumerate(shape) if axis not in site.padding]
            variables[site.label] = (dims, array.reshape((*leading, *kept)))
        return self._labelled(variables)

    def statistics(
        self, draws: Mapping[str, Sequence[Tensor]], extra: Mapping[str, np.ndarray], shape: tuple[int, int]
    ) -> xarray.Dataset:
        """The group ``sample_stats``: one number per draw each."""
        arrays = {name: torch.stack(list(values)).cpu().numpy() for name, values in draws.items()}
        both = {**arrays, **extra}
        return self._labelled({name: (("chain", "draw"), a.reshape(shape)) for name, a in both.items()})

    def _clear(self, dims: tuple[str, ...]) -> tuple[str, ...]:
        """xarray forbids a dimension with the name of a variable, and ArviZ owns ``chain`` and ``draw``."""
        taken = {site.label for site in self.sites.values()} | {"chain", "draw"}
        return tuple(f"{dim}_plate" if dim in taken else dim for dim in dims)

    def _labelled(self, variables: Mapping[str, tuple[tuple[str, ...], np.ndarray]]) -> xarray.Dataset:
        import xarray

        sizes = {
            dim: size
            for dims, array in variables.values()
            for dim, size in zip(dims, array.shape, strict=True)
        }
        given = {self._clear((dim,))[0]: labels for dim, labels in self.coords.items()}
        wrong = {d: (len(given[d]), n) for d, n in sizes.items() if d in given and len(given[d]) != n}
        if wrong:
            raise InvalidData(
                f"coords whose number of labels is not the dimension's size (labels, size): {wrong}"
            )
        coords = {dim: given.get(dim, np.arange(size)) for dim, size in sizes.items()}
        return xarray.Dataset(variables, coords={dim: (dim, np.asarray(c)) for dim, c in coords.items()})


def read_layout(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Sequence[Any]],
) -> Layout:
    """Runs the model once and reads its sites, plates and observations."""
    trace = poutine.trace(model).get_trace(*args, **kwargs)
    sites = {}
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or site_is_factor(node):
            continue
        if site_is_subsample(node):
            _refuse_subsampling(node)
            continue
        if (node["infer"] or {}).get("_deterministic"):
            kind = "deterministic"
        else:
            kind = "observed" if node["is_observed"] else "latent"
        sites[name] = Site.read(node, kind, dims.get(name, ()))
    unknown = sorted(set(dims) - set(sites))
    if unknown:
        raise InvalidData(f"dims names unknown site(s) {unknown}; the model has {sorted(sites)}")
    return Layout(sites, dict(coords))


def _refuse_subsampling(node: Mapping[str, Any]) -> None:
    fn = node["fn"]
    if fn.subsample_size is not None and fn.subsample_size != fn.size:
        raise UnsupportedModel(
            f"plate '{node['name']}' is subsampled ({fn.subsample_size} of {fn.size}): each draw would see "
            "other rows. Call to_arviz with a model that sees all rows, or a fixed choice of them"
        )
