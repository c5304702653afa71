# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The common part of all objectives of K particles: a new one is one method from log-weights to a bound."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_cpa.errors import InvalidData
from pyro_cpa.infer.draws import Draws
from pyro_cpa.infer.log_weights import LogWeights
from pyro_cpa.infer.particles import plate_nesting, sample_log_weights

__all__ = ["AbstractMultiSampleELBO"]


class AbstractMultiSampleELBO(ELBO):
    r"""Base of objectives that are a function F of the log-weights of K particles.

    .. math:: \text{loss} = -\text{outer} - \sum_n \text{scale}_n\, F(\log w_{1n}, \dots, \log w_{Kn})

    with one set of weights per element n of the plates shared by all sites (see
    :class:`~pyro_cpa.infer.log_weights.LogWeights`). A subclass implements :meth:`objective`, and chooses in
    :attr:`draws` how derivatives pass through the guide's draws.

    Args:
        num_particles: K.
        plates: names of the plates with one weight per element; None takes those shared by all sites. Latents
            outside named plates are drawn once and shared by all particles.
        chunk_size: particles whose graph is held in memory at a time; None for all. Each chunk is run once
            more, with the same random numbers, when its derivative is taken, so ``backward`` must be called
            under the same handlers as the loss (wrap the model rather than the call).
        max_plate_nesting: plate dims of model and guide; found by one more run if infinite and needed.
        vectorize_particles: draw the particles in a plate, which is faster; model and guide must broadcast.
        strict_enumeration_warning: accepted for compatibility; enumerated sites are always refused.
        ignore_jit_warnings: accepted for compatibility.
        jit_options: accepted for compatibility.
        retain_graph: passed to ``backward``.

    Attributes:
        weight_plates: plates with one weight per element in the last step, None before. () means one weight
            for all data, valid but loose: any site outside the plates (a global latent, a ``pyro.factor``) does
            it, and ``plates=`` undoes it.

    Raises:
        InvalidData: for too few particles or a chunk size below one.
        UnsupportedModel: at a step, naming the site and the cure, for a pair without such weights.

    Note:
        A plate asserts independence: if the guide couples the elements of a plate (batch normalisation,
        attention over the minibatch), weights per element are not those of the joint guide.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> class PlainELBO(AbstractMultiSampleELBO):
        ...     def objective(self, weights):
        ...         value = weights.log_w.mean(0)
        ...         return value, value  # for reparameterised guides
        >>> def model(x):
        ...     with pyro.plate("data", 10, subsample_size=2) as i:
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])
        >>> def guide(x):
        ...     with pyro.plate("data", 10, subsample_size=2) as i:
        ...         pyro.sample("z", dist.Normal(0.5 * x[i], pyro.param("s", torch.tensor(0.5**0.5))))
        >>> elbo = PlainELBO(num_particles=4)
        >>> weights = elbo.log_weights(model, guide, torch.randn(10))
        >>> weights.log_w.shape, weights.plates, weights.scale
        (torch.Size([4, 2]), ('data',), tensor([5., 5.]))
    """

    #: How derivatives pass through the guide's draws.
    draws: Draws = Draws.ATTACHED
    min_particles: int = 1

    def __init__(
        self,
        num_particles: int = 1,
        *,
        plates: Iterable[str] | None = None,
        chunk_size: int | None = None,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = False,
        strict_enumeration_warning: bool = True,
        ignore_jit_warnings: bool = False,
        jit_options: Mapping[str, Any] | None = None,
        retain_graph: bool | None = None,
    ) -> None:
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            strict_enumeration_warning=strict_enumeration_warning,
            ignore_jit_warnings=ignore_jit_warnings,
            jit_options=jit_options,
            retain_graph=retain_graph,
        )
        if num_particles < self.min_particles:
            raise InvalidData(
                f"{type(self).__name__} got num_particles={num_particles}: it needs at least "
                f"{self.min_particles}"
            )
        if chunk_size is not None and chunk_size < 1:
            raise InvalidData(
                f"chunk_size={chunk_size}: give a positive number of particles, or None for all"
            )
        if isinstance(plates, str):
            raise InvalidData(f"plates={plates!r} is a string: give a tuple of names, plates=({plates!r},)")
        self.plates = None if plates is None else tuple(plates)
        self.chunk_size = chunk_size
        self.weight_plates: tuple[str, ...] | None = None
        self._given_nesting = max_plate_nesting
        self._found_nesting: tuple[Any, int] | None = None

    @abstractmethod
    def objective(self, weights: LogWeights) -> tuple[Tensor, Tensor]:
        r"""The bound of each element of the plates, and a surrogate with its gradient.

        Neither is scaled or summed here. Both are taken as they are under ``torch.no_grad``.

        Args:
            weights: log-weights (K, \*plates), attached to the graph as :attr:`AbstractMultiSampleELBO.draws` says.

        Returns:
            The value F and the surrogate, each (\*plates). They may be the same tensor.
        """

    @property
    def linear(self) -> bool:
        """Whether the objective is linear in log w, so that subsampling inside the weight does no harm."""
        return False

    def log_weights(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> LogWeights:
        """Draw the particles and weigh them, as a step of the objective does."""
        return self._log_weights(model, guide, args, kwargs)

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Minus the bound, without derivatives."""
        with torch.no_grad():
            loss, _ = self._loss_and_surrogate(model, guide, args, kwargs)
        return self._checked(loss)

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """A scalar whose value is the loss and whose gradient is the estimator."""
        loss, surrogate = self._loss_and_surrogate(model, guide, args, kwargs)
        warn_if_nan(loss.detach(), "loss")
        return loss.detach() + (surrogate - surrogate.detach())

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """Minus the bound; its estimated gradient is added to ``.grad`` of the parameters."""
        loss, surrogate = self._loss_and_surrogate(model, guide, args, kwargs)
        if surrogate.requires_grad:
            surrogate.backward(retain_graph=self.retain_graph)
        return self._checked(loss)

    def _loss_and_surrogate(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Scalars to be minimised: the value and what is differentiated in its place."""
        weights = self._log_weights(model, guide, args, kwargs)
        value, surrogate = self.objective(weights)
        bound = weights.outer + weights.total(value)
        surrogate_bound = weights.outer + weights.total(surrogate)
        if weights.outer_score is not None:
            # An outer draw that cannot be reparameterised answers for the whole bound.
            surrogate_bound = surrogate_bound + bound.detach() * weights.outer_score
        return -bound, -surrogate_bound

    def _log_weights(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> LogWeights:
        weights = sample_log_weights(
            model,
            guide,
            args,
            kwargs,
            num_particles=self.num_particles,
            plates=self.plates,
            vectorize=self.vectorize_particles,
            max_plate_nesting=self._nesting(model, guide, args, kwargs),
            chunk_size=self.chunk_size,
            draws=self.draws,
            linear=self.linear or self.num_particles == 1,
        )
        self.weight_plates = weights.plates
        return weights

    def _nesting(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> float:
        """``max_plate_nesting`` without the particle plate, found once for a model and guide."""
        chunked = self.chunk_size is not None and self.chunk_size < self.num_particles
        vectorized = self.vectorize_particles and self.num_particles > 1
        if not chunked and not (vectorized and self._given_nesting == math.inf):
            return self._given_nesting
        pair = poutine.unwrap(model), poutine.unwrap(guide)
        if self._found_nesting is None or self._found_nesting[0] != pair:
            # Also lets a lazy guide draw its initial parameters before chunks must repeat their numbers.
            self._found_nesting = pair, plate_nesting(model, guide, args, kwargs)
        return self._found_nesting[1] if self._given_nesting == math.inf else self._given_nesting

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("particles are drawn together: see log_weights()")

    @staticmethod
    def _checked(loss: Tensor) -> float:
        return warn_if_nan(loss.detach(), "loss").item()
