# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""What the deep models share: checks of labels and sizes, evaluation mode, the way to the evidence."""

import pytest
import torch

from pyro_cpa.errors import InvalidData
from pyro_cpa.models import VAE, ConditionalVAE, GaussianMixtureVAE, VariationalRNN, latent_model
from pyro_cpa.models.latent_model import check_count, check_labels, one_hot_labels

X = torch.zeros(4, 6)
SMALL = {"hidden_dims": (5,), "dropout": 0.2}
MODELS = {
    "vae": lambda: (VAE(6, 2, **SMALL), (X,)),
    "cvae": lambda: (ConditionalVAE(6, 3, 2, **SMALL), (X, torch.tensor([0, 1, 2, 0]))),
    "gmvae": lambda: (GaussianMixtureVAE(6, 3, 2, **SMALL), (X,)),
    "vrnn": lambda: (
        VariationalRNN(3, 2, rnn_dim=4, **SMALL),
        (X.reshape(4, 2, 3), torch.tensor([1, 2, 2, 1])),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_evidence_is_asked_for_in_evaluation_mode(name, monkeypatch):
    model, args = MODELS[name]()
    seen = {}

    def log_evidence(the_model, guide, *given, **options):
        seen.update(options, given=given, training=model.training, grad=torch.is_grad_enabled())
        seen["clusters"] = getattr(model, "clusters", None)
        assert the_model == model.model and guide == model.guide
        return "evidence"

    monkeypatch.setattr(latent_model, "log_evidence", log_evidence)
    assert model.log_evidence(*args, num_particles=7, chunk_size=3) == "evidence"
    assert all(a is b for a, b in zip(seen["given"], args, strict=True))
    assert (seen["num_particles"], seen["chunk_size"]) == (7, 3)
    assert not seen["training"] and not seen["grad"] and model.training
    assert seen["clusters"] in (None, "sample") and getattr(model, "clusters", "enumerate") == "enumerate"


@pytest.mark.parametrize("bad", [0, -2, 1.0, True, "3"])
def test_counts(bad):
    with pytest.raises(InvalidData, match="rows is .*; expected a positive integer"):
        check_count(rows=bad)


def test_labels():
    assert check_labels(2, 3, 4).tolist() == [2, 2, 2]
    assert check_labels([0, 3], 2, 4).tolist() == [0, 3]
    assert check_labels(torch.tensor([1.0, 0.0]), 2, 4).dtype == torch.int64
    assert check_labels([-1, 3], 2, 4, missing=-1).tolist() == [-1, 3]
    assert one_hot_labels([0, 2], 2, 3, torch.zeros(1)).tolist() == [[1, 0, 0], [0, 0, 1]]
    with pytest.raises(InvalidData, match="a label is -1; expected integers from 0 to 3. Recode"):
        check_labels([-1, 3], 2, 4)
