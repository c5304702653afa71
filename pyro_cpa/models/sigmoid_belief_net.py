# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Deep sigmoid belief nets with a mirrored recognition net."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_cpa.errors import InvalidData
from pyro_cpa.models.bernoulli_layers import AbstractBernoulliStack, Shift, check_stack, deterministic_map

__all__ = ["SigmoidBeliefNet"]

# A pixel that is constant in the training set would get an infinite bias.
_MEAN_RANGE = (0.001, 0.999)


class SigmoidBeliefNet(AbstractBernoulliStack):
    r"""Sigmoid belief net with L layers of binary latents and a learned Bernoulli prior on the top one.

    .. math:: p(z_{l-1} \mid z_l) = \mathrm{Bernoulli}(\sigma(f_l(2 z_l - 1))), \qquad
              q(z_l \mid z_{l-1}) = \mathrm{Bernoulli}(\sigma(g_l(2 z_{l-1} - 1))), \qquad z_0 = x

    With the defaults, ``SigmoidBeliefNet(784, data_mean=mean)`` is the net of the thermodynamic variational
    objective's paper: three stochastic layers of 200 units, linear maps of the signed units, the guide's
    input centred and the data layer's bias started at the logit of the training mean.

    Args:
        data_dim: D.
        layer_sizes: (H_1, ..., H_L), the layer next to the data first.
        deterministic: tanh layers between two stochastic layers, in both nets.
        deterministic_size: their width; the mean of the two neighbours if None.
        data_mean: (D,) mean of the training data, used by the two options below; None turns both off.
        centre_input: the guide sees ``x - data_mean`` in place of ``2 x - 1``.
        bias_from_mean: the data layer's bias starts at the logit of ``data_mean`` (means are first brought
            into [0.001, 0.999]: a constant pixel would give an infinite bias).

    Raises:
        InvalidData: for sizes that are not positive or a mean outside [0, 1] or of another shape.

    Note:
        All latents are discrete: use :class:`~pyro_cpa.infer.TVO`,
        :class:`~pyro_cpa.infer.ReweightedWakeSleepELBO` or
        ``ImportanceWeightedELBO(estimator="vimco")`` with vectorised particles and one plate.

    References:
        R. M. Neal (1992), "Connectionist learning of belief networks".
        V. Masrani, T. A. Le, F. Wood (2019), "The Thermodynamic Variational Objective".

    Example:
        >>> x = torch.bernoulli(torch.full((5, 16), 0.3))
        >>> net = SigmoidBeliefNet(16, (8, 4), data_mean=x.mean(0))
        >>> net.generate(3).shape, [z.shape[1] for z in net.encode(x)]
        (torch.Size([3, 16]), [8, 4])
        >>> from pyro.infer import RenyiELBO
        >>> elbo = RenyiELBO(0.5, num_particles=10, max_plate_nesting=1, vectorize_particles=True)
        >>> elbo.loss(net.model, net.guide, x) > 0
        True
    """

    def __init__(
        self,
        data_dim: int,
        layer_sizes: Sequence[int] = (200, 200, 200),
        *,
        deterministic: int = 0,
        deterministic_size: int | None = None,
        data_mean: Tensor | None = None,
        centre_input: bool = True,
        bias_from_mean: bool = True,
    ) -> None:
        sizes = check_stack(data_dim, layer_sizes, deterministic, deterministic_size)
        between = (deterministic, deterministic_size)
        signed = first = Shift(2.0, torch.ones(()))
        if data_mean is not None:
            data_mean = _check_mean(data_mean, data_dim)
            if centre_input:
                first = Shift(1.0, data_mean)
        generation = [
            nn.Sequential(signed, *deterministic_map(above, below, *between))
            for below, above in zip(sizes[:-1], sizes[1:], strict=True)
        ]
        recognition = [
            nn.Sequential(signed if level else first, *deterministic_map(sizes[level], above, *between))
            for level, above in enumerate(sizes[1:])
        ]
        if data_mean is not None and bias_from_mean:
            generation[0][-1].bias = nn.Parameter(torch.logit(data_mean.clamp(*_MEAN_RANGE)))
        super().__init__(sizes, generation, recognition, prior_logits=torch.zeros(sizes[-1]))


def _check_mean(data_mean: Tensor, dim: int) -> Tensor:
    if data_mean.shape != (dim,) or not bool(((data_mean >= 0) & (data_mean <= 1)).all()):
        raise InvalidData(
            f"data_mean has shape {tuple(data_mean.shape)} and values from {data_mean.min():.4g} to "
            f"{data_mean.max():.4g}; expected ({dim},) within [0, 1]. Pass the column means of binary data."
        )
    return data_mean.detach().to(torch.get_default_dtype())
