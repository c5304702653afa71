# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Where a mixture model starts: at a trained VAE and the clusters of its codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pyro_cpa.errors import InvalidData
from pyro_cpa.models.networks import GaussianNetwork
from pyro_cpa.models.vae import VAE

if TYPE_CHECKING:
    from pyro_cpa.models.gaussian_mixture_vae import GaussianMixtureVAE

__all__ = ["codes_mixture", "copy_layers", "fit_classifier", "paired_networks", "set_prior"]

Pair = tuple[nn.Linear, nn.Linear]

ROWS_AT_ONCE = 4096
# Of the largest variance that a latent's mean has over the data: those below carry next to nothing.
ACTIVE_SHARE = 0.01


def linear_layers(network: nn.Module) -> Iterator[nn.Linear]:
    return (layer for layer in network.modules() if isinstance(layer, nn.Linear))


def inner_kinds(network: nn.Module) -> list[type[nn.Module]]:
    """The modules that compute something; dropout is only a matter of training."""
    return [type(m) for m in network.modules() if not isinstance(m, nn.Dropout) and not list(m.children())]


def paired_layers(target: nn.Module, source: nn.Module, labels: int = 0) -> list[Pair]:
    """The linear layers of two networks that differ in the ``labels`` inputs that the target takes besides."""
    pairs = list(zip(linear_layers(target), linear_layers(source), strict=False))
    if inner_kinds(target) != inner_kinds(source) or any(
        ours.in_features - theirs.in_features not in (0, labels) or ours.out_features != theirs.out_features
        for ours, theirs in pairs
    ):
        raise InvalidData(
            "the VAE's networks differ from those of the mixture; build both with the same hidden_dims and activation."
        )
    return pairs


def paired_networks(model: GaussianMixtureVAE, vae: VAE) -> tuple[list[Pair], list[Pair]]:
    """The layers of the mixture that begin as layers of the VAE: those that see y after, and before, the rest."""
    for name, theirs, ours in (
        ("data_dim", vae.data_dim, model.data_dim),
        ("latent_dim", vae.latent_dim, model.latent_dim),
        ("likelihood", type(vae.likelihood).__name__, type(model.likelihood).__name__),
    ):
        if theirs != ours:
            raise InvalidData(f"the VAE's {name} is {theirs}, the mixture's {ours}; expected the same.")
    networks, labels = model.networks, model.num_clusters
    encoder = paired_layers(networks.encoder, vae.encoder, labels)
    classifier = paired_layers(model.classifier[:-1], vae.encoder.hidden)
    decoder = paired_layers(networks.decoder, vae.decoder, labels if networks.decoder_sees_label else 0)
    return encoder + classifier, decoder


@torch.no_grad()
def copy_layers(label_last: list[Pair], label_first: list[Pair]) -> None:
    """Each layer computes what its pair does, whatever the label."""
    for pairs, first in ((label_last, False), (label_first, True)):
        for ours, theirs in pairs:
            extra = ours.in_features - theirs.in_features
            ours.weight.zero_()
            ours.weight[:, slice(extra, None) if first else slice(theirs.in_features)] = theirs.weight
            ours.bias.copy_(theirs.bias)


@torch.no_grad()
def codes_mixture(vae: VAE, x: Tensor, num_clusters: int, restarts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Responsibilities (N, C), and each cluster's means and variances (C, L), by a mixture of the codes.

    It is fitted to a draw of each row's q(z|x), whose law p(z) has to follow, and over the active latents; the
    others have the VAE's prior in every cluster.
    """
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise InvalidData(
            "scikit-learn, which finds the clusters of the codes, is missing: pip install scikit-learn."
        ) from error
    x = vae.checked(x)
    with vae.evaluation():
        codes = [vae.encoder(vae.likelihood.features(part)) for part in x.split(ROWS_AT_ONCE)]
    mean, scale = (torch.cat([getattr(q, name) for q in codes]).double().cpu() for name in ("mean", "stddev"))
    varies = mean.var(0)
    active = varies > ACTIVE_SHARE * varies.max()
    if not active.any():
        raise InvalidData("the VAE's codes are the same for all rows; train it first, on rows that differ.")
    drawn = (mean + scale * torch.randn_like(mean))[:, active].numpy()
    seed = int(torch.randint(2**31 - 1, ()))
    mixture = GaussianMixture(num_clusters, n_init=restarts, max_iter=200, random_state=seed).fit(drawn)
    location, variance = mean.new_zeros(num_clusters, len(active)), mean.new_ones(num_clusters, len(active))
    location[:, active] = torch.from_numpy(mixture.means_)
    variance[:, active] = torch.from_numpy(mixture.covariances_.diagonal(axis1=1, axis2=2).copy())
    return torch.from_numpy(mixture.predict_proba(drawn)), location, variance


@torch.no_grad()
def set_prior(network: GaussianNetwork, location: Tensor, variance: Tensor) -> None:
    """p(z | y) with these means and variances, (C, L) each."""
    scale = variance.sqrt()
    inverse_softplus = scale + torch.log(-torch.expm1(-scale))
    for part, value in ((network.loc, location), (network.raw_scale, inverse_softplus)):
        (layer,) = linear_layers(part)
        layer.weight.copy_(value.T)
        layer.bias.zero_()


def fit_classifier(model: GaussianMixtureVAE, x: Tensor, responsibilities: Tensor, steps: int) -> None:
    """q(y | x) by the cross-entropy to responsibilities (N, C): steps of Adam on batches of 100 rows."""
    optim = torch.optim.Adam(model.classifier.parameters(), 1e-3)
    for _ in range(steps):
        rows = torch.randint(len(x), (100,)).to(x.device)
        logits = model.classifier(model.likelihood.features(x[rows]))
        optim.zero_grad()
        (-(responsibilities[rows] * logits.log_softmax(-1)).sum(-1).mean()).backward()
        optim.step()
