# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What every deep latent-variable model of the library shares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor

from pyro_cpa.errors import InvalidData
from pyro_cpa.infer.evidence import Evidence, log_evidence
from pyro_cpa.models.likelihoods import AbstractLikelihood

__all__ = ["UNLABELLED", "AbstractLatentModel", "check_count", "check_labels", "one_hot_labels"]

UNLABELLED = -1  # in place of the label of a row that has none


class AbstractLatentModel(PyroModule):
    """A model/guide pair with latent ``"z"`` and data ``"x"`` in one plate ``"data"`` over the rows of x.

    ``model`` and ``guide`` go to any objective: ``SVI(vae.model, vae.guide, optim, loss)`` or, with a
    torch optimiser over ``vae.parameters()``, ``loss(vae.model, vae.guide)(x)``. Dimensions to the left of
    the plate (particles, enumerated values) broadcast. With ``size=N`` a minibatch stands for N rows: the
    plate then scales every term by N over the number of rows given.

    The other methods run in evaluation mode (no dropout) and without gradients, and leave the mode as it was.

    Args:
        data_dim: D.
        latent_dim: L.
        likelihood: p(x | decoder output).

    Note:
        As for every ``PyroModule``, parameters are known to Pyro's global store by name: for a second model
        in the same process call ``pyro.clear_param_store()`` first or set
        ``pyro.settings.set(module_local_params=True)``.
    """

    origin: Tensor

    def __init__(self, data_dim: int, latent_dim: int, likelihood: AbstractLikelihood) -> None:
        super().__init__()
        check_count(data_dim=data_dim, latent_dim=latent_dim)
        self.data_dim = data_dim
        self.latent_dim = latent_dim
        self.likelihood = likelihood
        # Location of the standard prior; it also tells dtype and device wherever the module is moved.
        self.register_buffer("origin", torch.zeros(latent_dim), persistent=False)

    def standard_normal(self) -> TorchDistribution:
        """N(0, I) of dimension L."""
        return dist.Normal(self.origin, torch.ones_like(self.origin)).to_event(1)

    def data_plate(self, rows: int, size: int | None) -> pyro.plate:
        """The plate over ``rows`` rows that stand for ``size``."""
        if size is None:
            return pyro.plate("data", rows)
        if size < rows:
            raise InvalidData(f"size is {size}, below the {rows} rows of x; give that of the whole data set.")
        return pyro.plate("data", size, subsample=torch.arange(rows, device=self.origin.device))

    def checked(self, x: Tensor, shape: tuple[str, ...] = ("N",), keep: Tensor | None = None) -> Tensor:
        """``x`` in the model's dtype and on its device.

        Args:
            x: (``*shape``, D), of any dtype.
            shape: Names of the leading dimensions, for the message; "..." first allows any number before.
            keep: Boolean over the leading dimensions: x is set to 0 elsewhere, whatever stands there.

        Raises:
            InvalidData: For another shape, NaN, or values outside the likelihood's support.
        """
        given = tuple(x.shape) if isinstance(x, Tensor) else ()
        fits = len(given) >= len(shape) if shape[0] == "..." else len(given) == len(shape) + 1
        if not fits or given[-1] != self.data_dim or 0 in given:
            raise InvalidData(
                f"x is {given or type(x).__name__}; expected a tensor of shape "
                f"({', '.join(shape)}, {self.data_dim}), not empty. "
                "Flatten images with x.reshape(len(x), -1), or give the model another data_dim."
            )
        x = x.to(self.origin)
        if keep is not None:
            x = torch.where(keep[..., None], x, torch.zeros_like(x))
        self.likelihood.check(x)
        return x

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Evaluation mode and no gradients inside, every module's own mode restored outside."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _log_evidence(self, *args: Any, num_particles: int, chunk_size: int | None) -> Evidence:
        with self.evaluation():
            return log_evidence(
                self.model, self.guide, *args, num_particles=num_particles, chunk_size=chunk_size
            )


def check_count(**counts: int) -> None:
    """Refuses sizes that are not positive integers.

    Raises:
        InvalidData: Naming the first such argument.
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidData(f"{name} is {value!r}; expected a positive integer.")


def check_labels(y: Any, rows: int, num_classes: int, *, missing: int | None = None) -> Tensor:
    """(rows,) int64 labels; one number stands for all rows.

    Args:
        y: (rows,) integers, or one.
        rows: N.
        num_classes: C.
        missing: A further value allowed, for rows without a label.

    Raises:
        InvalidData: For another shape, values that are no integers, or labels outside 0, ..., C-1.
    """
    labels = torch.as_tensor(y)
    if labels.dim() > 1 or (labels.dim() == 1 and len(labels) != rows):
        raise InvalidData(
            f"the labels have shape {tuple(labels.shape)}; expected ({rows},), one integer for each row "
            "of x. Give indices, not one-hot vectors."
        )
    good = (labels == labels.long()) & (labels >= 0) & (labels < num_classes)
    if missing is not None:
        good = good | (labels == missing)
    if not bool(good.all()):
        extra = "" if missing is None else f", or {missing} where there is none"
        raise InvalidData(
            f"a label is {labels[~good].flatten()[0].item():.6g}; expected integers from 0 to "
            f"{num_classes - 1}{extra}. Recode the labels or change num_classes."
        )
    return labels.long().expand(rows)


def one_hot_labels(y: Any, rows: int, num_classes: int, like: Tensor) -> Tensor:
    """(rows, num_classes) indicators of checked labels, in dtype and on the device of ``like``."""
    labels = check_labels(y, rows, num_classes).to(like.device)
    return torch.nn.functional.one_hot(labels, num_classes).to(like)
