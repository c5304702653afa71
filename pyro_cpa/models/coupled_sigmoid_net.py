# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""A sigmoid classifier and its generator with one weight matrix a layer, shared by transposition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import OneHotCategorical, TorchDistribution
from pyro.nn.module import pyro_method
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_cpa.errors import InvalidData
from pyro_cpa.models.bernoulli_layers import AbstractBernoulliStack
from pyro_cpa.models.latent_model import UNLABELLED, check_count, check_labels

__all__ = ["CoupledLosses", "CoupledSigmoidNet", "TransposedLinear"]


class CoupledLosses(NamedTuple):
    """The three terms of :meth:`CoupledSigmoidNet.loss`: scalars, means over rows."""

    generation: Tensor
    recognition: Tensor
    discrimination: Tensor


class TransposedLinear(nn.Module):
    """``z -> W' z + a`` with the very parameter W of a linear layer and a bias of its own.

    Args:
        linear: the layer ``x -> W x + b`` whose weight is shared.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = nn.Parameter(torch.zeros(linear.in_features))

    def forward(self, z: Tensor) -> Tensor:
        return F.linear(z, self.weight.t(), self.bias)


class TransposedClasses(TransposedLinear):
    """The reverse of the layer onto the classes, with that layer's bias, which sets the class prior."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.class_bias = linear.bias

    def prior_logits(self) -> Tensor:
        """(C,) logits of the prior under which the forward layer's softmax is the exact posterior."""
        return self.class_bias + F.softplus(self.weight + self.bias).sum(-1)


class CoupledSigmoidNet(AbstractBernoulliStack):
    r"""Recognition and generation by one set of weights, each used in both directions.

    .. math:: q(z_l \mid z_{l-1}) = \mathrm{Bernoulli}(\sigma(W_l z_{l-1} + b_l)), \qquad
              p(z_{l-1} \mid z_l) = \mathrm{Bernoulli}(\sigma(W_l^\top z_l + a_l)), \qquad z_0 = x

    With ``num_classes`` the top layer is a class y in one-hot form,
    :math:`q(y \mid z_L) = \mathrm{softmax}(W z_L + b)`, and its prior is the one that makes the top pair a
    single joint distribution, for which that softmax is the exact posterior:

    .. math:: p(y = c) \propto \exp\Bigl( b_c + \sum_i \log(1 + e^{W_{ci} + a_i}) \Bigr)

    Passing means up in place of samples turns the recognition net into an ordinary sigmoid network; that
    forward pass (``network``, ``encode``, ``predict``) is its mean-field inference.

    Args:
        data_dim: D.
        layer_sizes: (H_1, ..., H_L), the layer next to the data first; may be empty if there are classes.
        num_classes: C; None for a top layer of Bernoulli units with a learned prior of their own.

    Raises:
        InvalidData: for sizes that are not positive, data that are not binary, or labels outside 0..C-1 (and
            -1, which marks an unlabelled row).

    Note:
        This is our reading of the paper's abstract and introduction (transposed weights, forward pass as
        approximate inference, generative learning of the pair); the objective and the prior of y are ours and
        need not be the authors'. Exact: the first layer's activations, saturated layers, and with no hidden
        layer the class probabilities. Deeper activations are approximate. Sites: ``"x"``, ``"z1"``, ..., and
        ``"y"``, or Pyro's ``"y_observed"`` and ``"y_unobserved"`` when a batch mixes labelled and unlabelled
        rows. Model and guide train with any objective for discrete latents; with
        :class:`~pyro_cpa.infer.BiHelmholtzELBO` both directions climb one bound.

    References:
        B. Flach, A. Shekhovtsov, O. Fikar (2017), "Generative learning for deep networks".

    Example:
        >>> net = CoupledSigmoidNet(6, (4,), num_classes=3)
        >>> x = torch.bernoulli(torch.full((5, 6), 0.5))
        >>> bool((net.network()(x) == net.encode(x)[-1]).all())
        True
        >>> net.loss(x, torch.tensor([0, 2, -1, -1, 1]), beta=0.5).backward()
        >>> net.generation[0].weight is net.recognition[0].weight
        True
        >>> net.generate(2, y=1).shape
        torch.Size([2, 6])
    """

    def __init__(self, data_dim: int, layer_sizes: Sequence[int], num_classes: int | None = None) -> None:
        check_count(data_dim=data_dim, **{f"layer_sizes[{i}]": size for i, size in enumerate(layer_sizes)})
        top = () if num_classes is None else (num_classes,)
        if num_classes is not None:
            check_count(num_classes=num_classes)
        sizes = (data_dim, *layer_sizes, *top)
        if len(sizes) == 1:
            raise InvalidData(
                "layer_sizes is empty and num_classes is None; expected at least one latent layer."
            )
        recognition = [nn.Linear(below, above) for below, above in zip(sizes[:-1], sizes[1:], strict=True)]
        generation = [TransposedLinear(linear) for linear in recognition]
        if top:
            generation[-1] = TransposedClasses(recognition[-1])
        super().__init__(sizes, generation, recognition, None if top else torch.zeros(sizes[-1]))
        self.num_classes = num_classes
        if num_classes is not None:
            self.sites = (*self.sites[:-1], "y")

    # ---- the two directed nets -------------------------------------------------------------------------

    def layer(self, level: int, logits: Tensor) -> TorchDistribution:
        """Bernoulli units; at the top a one-hot class, if there are classes."""
        if self.num_classes is not None and level == len(self.sizes) - 1:
            return OneHotCategorical(logits=logits)
        return super().layer(level, logits)

    def activation(self, level: int, logits: Tensor) -> Tensor:
        """Mean of :meth:`layer`: sigmoid, or softmax over the classes."""
        if self.num_classes is not None and level == len(self.sizes) - 1:
            return torch.softmax(logits, -1)
        return super().activation(level, logits)

    def top_logits(self) -> Tensor:
        """(C,) logits of the class prior, determined by the other parameters; (H_L,) learned ones without."""
        if self.num_classes is None:
            return super().top_logits()
        top: Any = self.generation[-1]
        return top.prior_logits()

    @pyro_method
    def model(  # type: ignore[override]  # labels come second
        self, x: Tensor, y: Tensor | None = None, observations: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """p(x, z, y) with ``x`` (N, D) observed, and ``y`` (N,) where it is not -1; returns x."""
        x = self.check(x)
        generation, top = self.generation, len(self.sizes) - 1
        onehot, labelled = self._labels(x, y)
        with pyro.plate("data", len(x), dim=-1):
            prior = self.layer(top, self.top_logits())
            if onehot is None or labelled.all():
                z = pyro.sample(self.sites[top], prior, obs=onehot)
            else:
                z = pyro.sample("y", prior, obs=onehot, obs_mask=labelled)
            for level in range(top - 1, 0, -1):
                z = pyro.sample(self.sites[level], self.layer(level, generation[level](z)))
            return pyro.sample("x", self.layer(0, generation[0](z)), obs=x)

    @pyro_method
    def guide(  # type: ignore[override]  # labels come second
        self, x: Tensor, y: Tensor | None = None, observations: Mapping[str, Tensor] | None = None
    ) -> None:
        """q(z | x), and q(y | z) for unlabelled rows; a sleep phase passes its x in ``observations``."""
        z = self.check(x) if observations is None else observations["x"]
        recognition, top = self.recognition, len(self.sizes) - 1
        onehot, labelled = self._labels(x, y)
        with pyro.plate("data", len(x), dim=-1):
            for level in range(1, top):
                z = pyro.sample(self.sites[level], self.layer(level, recognition[level - 1](z)))
            posterior = self.layer(top, recognition[-1](z))
            if onehot is None:
                pyro.sample(self.sites[top], posterior)
            elif not labelled.all():
                with poutine.mask(mask=~labelled):
                    pyro.sample("y_unobserved", posterior)

    # ---- learning --------------------------------------------------------------------------------------

    def losses(self, x: Tensor, y: Tensor | None = None) -> CoupledLosses:
        r"""The three terms of the objective, each a mean over rows.

        .. math:: L_{gen} = -\log p(x, z, y), \; (z, y) \sim q(\cdot \mid x); \qquad
                  L_{rec} = -\log q(z, y \mid x), \; (x, z, y) \sim p; \qquad
                  L_{disc} = -\log \mathrm{softmax}(\text{forward pass of } x)_y

        Args:
            x: (N, D) binary.
            y: (N,) integer labels, clamped in L_gen; -1 marks an unlabelled row, whose y is drawn from q.

        Returns:
            Scalars. L_disc averages over the labelled rows and is zero if there are none.

        Note:
            Samples carry no gradient: the first two terms are the phases of wake-sleep, whose updates meet in
            the same weights.
        """
        x = self.check(x)
        onehot, labelled = self._labels(x, y)
        seen = [x, *(z[0] for z in self.sample_recognition(x, 1)[1:])]
        if onehot is not None:
            seen[-1] = torch.where(labelled[:, None], onehot, seen[-1])
        dreams = self.sample_generation(len(x))
        discrimination = x.new_zeros(())
        if onehot is not None and bool(labelled.any()):
            discrimination = F.cross_entropy(self.logits(x[labelled]), onehot[labelled])
        return CoupledLosses(
            -self.log_generation(seen).mean(), -self.log_recognition(dreams).mean(), discrimination
        )

    def loss(self, x: Tensor, y: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
        r"""The mixed objective :math:`L_{gen} + \alpha L_{rec} + \beta L_{disc}`, a scalar to minimise.

        Supervised, unsupervised and mixed batches differ only in ``y``; see :meth:`losses`.

        Args:
            x: (N, D) binary.
            y: (N,) integer labels, -1 for an unlabelled row; None if no row has one.
            alpha: weight of the recognition net's fit to dreams.
            beta: weight of the forward pass's cross-entropy.
        """
        terms = self.losses(x, y)
        return terms.generation + alpha * terms.recognition + beta * terms.discrimination

    # ---- uses ------------------------------------------------------------------------------------------

    def network(self) -> nn.Sequential:
        """The forward pass as an ordinary network of these very layers: (N, D) to (N, C) class probabilities.

        Without classes, to the activations (N, H_L) of the top layer.
        """
        modules: list[nn.Module] = []
        for linear in self.recognition:
            modules += [linear, nn.Sigmoid()]
        return nn.Sequential(*modules[:-1], nn.Sigmoid() if self.num_classes is None else nn.Softmax(-1))

    def logits(self, x: Tensor) -> Tensor:
        """(N, C) logits of the forward pass, with gradient; of the top layer, (N, H_L), without classes."""
        z = self.check(x)
        for linear in self.recognition[:-1]:
            z = torch.sigmoid(linear(z))
        return self.recognition[-1](z)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """(N,) most probable class of the forward pass."""
        self._need_classes("predict")
        return self.logits(x).argmax(-1)

    def error(self, x: Tensor, y: Tensor) -> float:
        """Fraction of rows whose :meth:`predict` differs from the label ``y`` (N,)."""
        predicted = self.predict(x)
        _, labelled = self._labels(predicted, y)
        if not labelled.all():
            raise InvalidData(
                f"y holds {UNLABELLED}; expected a label for every row. Leave unlabelled rows out."
            )
        return (predicted != y.to(predicted.device)).double().mean().item()

    def generate(self, n: int, mode: str = "sample", *, y: int | Tensor | None = None) -> Tensor:
        """``n`` draws of the generation net, of given classes if ``y`` is given.

        Args:
            n: number of draws.
            mode: ``"sample"`` for binary x, ``"mean"`` for the probabilities p(x = 1 | layer above).
            y: one class, or (n,) classes; drawn from the prior if None.

        Returns:
            (n, D).
        """
        top = None
        if y is not None:
            self._need_classes("generate(y=...)")
            top, labelled = self._labels(next(self.parameters()).new_empty(n), y)
            if not labelled.all():
                raise InvalidData(f"y holds {UNLABELLED}; expected classes 0..{self.sizes[-1] - 1}.")
        with torch.no_grad():
            return self.present(self.sample_generation(n, top), mode)

    def _need_classes(self, what: str) -> int:
        if self.num_classes is None:
            raise InvalidData(f"{what} needs classes; this net has none. Build it with num_classes=C.")
        return self.num_classes

    def _labels(self, x: Tensor, y: Tensor | int | None) -> tuple[Tensor | None, Any]:
        """(N, C) one-hot labels and (N,) boolean, which rows have one; no labels at all is (None, False)."""
        unlabelled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if y is None:
            return None, unlabelled
        num_classes = self._need_classes("y")
        y = check_labels(y, len(x), num_classes, missing=UNLABELLED).to(next(self.parameters()).device)
        labelled = y != UNLABELLED
        if not labelled.any():
            return None, unlabelled
        onehot = F.one_hot(y.clamp(min=0), num_classes)  # rows of -1 are masked out
        return onehot.to(next(self.parameters()).dtype), labelled
