# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""The models at the sizes of their papers, a few steps on Fashion-MNIST."""

import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam

from pyro_cpa.datasets import binarize, dequantize, load_fashion_mnist, minibatches, row_sequences
from pyro_cpa.errors import InvalidData
from pyro_cpa.infer import AnalyticELBO
from pyro_cpa.models import VAE, ConditionalVAE, GaussianMixtureVAE, VariationalRNN

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fashion():
    try:
        return load_fashion_mnist()
    except InvalidData as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("kind, steps", [("vae", 100), ("cvae", 100), ("gmvae", 60), ("vrnn", 15)])
def test_bound_rises_and_latents_live(kind, steps, fashion):
    torch.set_default_dtype(torch.float32)
    grey, y = dequantize(fashion.x_train[:10_000].float()), fashion.y_train[:10_000]
    model, args = {
        "vae": lambda: (VAE(), (grey,)),
        "cvae": lambda: (ConditionalVAE(), (grey, y)),
        "gmvae": lambda: (GaussianMixtureVAE(), (binarize(grey, threshold=0.5),)),
        "vrnn": lambda: (VariationalRNN(), (row_sequences(binarize(grey, threshold=0.5)),)),
    }[kind]()
    elbo = AnalyticELBO(max_plate_nesting=1)
    svi = SVI(model.model, model.guide, Adam({"lr": 1e-3}), elbo)
    held_out = [item[-200:] for item in args]
    before = svi.evaluate_loss(*held_out)
    for _, batch in zip(range(steps), minibatches(*(item[:-200] for item in args)), strict=False):
        svi.step(*batch)
    assert svi.evaluate_loss(*held_out) / 200 < before / 200 - 50
    assert kind == "vrnn" or elbo.kl / 200 > 0.5  # the recurrent net learns its past before its latents
