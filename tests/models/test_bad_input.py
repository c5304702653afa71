# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Every model refuses data that it cannot mean, in every method that takes data, and says why."""

import math

import pytest
import torch

from pyro_cpa.errors import InvalidData
from pyro_cpa.models import (
    VAE,
    Bernoulli,
    BidirectionalHelmholtzMachine,
    Categorical,
    ConditionalCPAGenerator,
    ConditionalVAE,
    ContinuousBernoulli,
    CoupledSigmoidNet,
    CPAGenerator,
    FactorAnalysis,
    GaussianMixtureVAE,
    MixtureCPAGenerator,
    Normal,
    SigmoidBeliefNet,
    VariationalRNN,
)

N, D, C = 3, 4, 3
SMALL = {"hidden_dims": (5,), "dropout": 0.0}
BINARY = (0.5, "expected only 0 and 1")
FINITE = (-math.inf, "expected a finite number, or NaN where it is missing")
MODELS = {
    "vae": (lambda: VAE(D, 2, likelihood=Bernoulli(), **SMALL), *BINARY),
    "vae-continuous": (
        lambda: VAE(D, 2, likelihood=ContinuousBernoulli(), **SMALL),
        1.5,
        r"expected a number in \[0, 1\]",
    ),
    "vae-normal": (lambda: VAE(D, 2, likelihood=Normal(), **SMALL), math.inf, "expected a finite number"),
    "vae-categorical": (
        lambda: VAE(D, 2, likelihood=Categorical(3), **SMALL),
        3.0,
        "expected an integer from 0 to 2",
    ),
    "cvae": (lambda: ConditionalVAE(D, C, 2, likelihood=Bernoulli(), **SMALL), *BINARY),
    "gmvae": (lambda: GaussianMixtureVAE(D, C, 2, **SMALL), *BINARY),
    "vrnn": (lambda: VariationalRNN(D, 2, rnn_dim=4, **SMALL), *BINARY),
    "vrnn-smoothing": (lambda: VariationalRNN(D, 2, inference="smoothing", rnn_dim=4, **SMALL), *BINARY),
    "sbn": (lambda: SigmoidBeliefNet(D, (3, 2)), *BINARY),
    "helmholtz": (lambda: BidirectionalHelmholtzMachine(D, (3, 2)), *BINARY),
    "coupled": (lambda: CoupledSigmoidNet(D, (3,), num_classes=C), *BINARY),
    "fa": (lambda: FactorAnalysis(D, 2), *FINITE),
    "cpa": (lambda: CPAGenerator(D, 1, hidden_dims=(3,)), *FINITE),
    "cpa-conditional": (lambda: ConditionalCPAGenerator(D, C, 1, hidden_dims=(3,)), *FINITE),
    "cpa-mixture": (lambda: MixtureCPAGenerator(D, C, 1, hidden_dims=(3,)), *FINITE),
}
EXACT = ("fa", "cpa", "cpa-conditional", "cpa-mixture")  # they have a missing-data path
CONDITIONAL = ("cvae", "cpa-conditional")  # they need labels
SHARED = ("model", "guide", "encode", "reconstruct", "log_evidence")
OWN = {
    "gmvae": ("cluster", "cluster_probs"),
    "vrnn": ("kl_per_step", "extend"),
    "helmholtz": ("log_p", "log_p_tilde", "ess", "chain"),
    "coupled": ("loss", "losses", "logits", "predict"),
    "fa": ("log_prob", "posterior", "impute", "em_step"),
    "cpa": ("log_prob", "posterior", "impute", "fit"),
    "cpa-conditional": ("log_prob", "posterior", "impute", "fit", "joint_log_probs", "classify"),
    "cpa-mixture": ("log_prob", "posterior", "impute", "fit", "joint_log_probs", "cluster", "em_step"),
}
CASES = [(name, method) for name in MODELS for method in (*SHARED, *OWN.get(name, ()))]
LABELLED = [
    *(("cvae", method) for method in SHARED),
    *((name, method) for name in ("gmvae", "coupled") for method in ("model", "guide")),
    ("gmvae", "encode"),
    ("coupled", "loss"),
    ("coupled", "error"),
    *(("cpa-conditional", method) for method in (*SHARED, "log_prob", "posterior", "impute", "fit")),
]


def call(name, method, x, y=None):
    """The method of a new model on data x, and labels where it needs them or they are given."""
    model = MODELS[name][0]()
    if name in CONDITIONAL and y is None and method not in ("joint_log_probs", "classify"):
        y = torch.arange(len(good(name))) % C
    args = (x,) if y is None else (x, y)
    if method in ("log_p", "log_p_tilde", "ess", "extend"):
        args = (*args, 2)
    options = {"log_evidence": {"num_particles": 2}, "fit": {"num_steps": 1}}.get(method, {})
    if (name, method) == ("vae-categorical", "reconstruct"):
        options = {"mode": "sample"}  # categories have no mean
    return getattr(model, method)(*args, **options)


def good(name):
    """Data that the likelihood accepts."""
    if name in EXACT:  # enough of it to fit noise to
        return torch.randn(N * 10, D)
    return torch.ones(N, 2, D) if name.startswith("vrnn") else torch.ones(N, D)


@pytest.mark.parametrize("name, method", CASES)
def test_data(name, method):
    _, value, message = MODELS[name]
    x = good(name)
    call(name, method, x)
    entries = [(value, message)]
    if name in EXACT:
        incomplete = x.clone()
        incomplete[1, 2] = math.nan
        call(name, method, incomplete)
    else:
        entries.append((math.nan, "nan.*no missing-data path"))
    for entry, what in entries:
        bad = x.clone()
        bad[1, ..., 2] = entry
        with pytest.raises(InvalidData, match=what):
            call(name, method, bad)
    for bad in (x[..., :-1], x[0, ..., 0], x.tolist()):
        with pytest.raises(InvalidData, match="expected a tensor of shape"):
            call(name, method, bad)


@pytest.mark.parametrize("name, method", LABELLED)
def test_labels(name, method):
    x = good(name)[:N]
    call(name, method, x, torch.tensor([0, 2, 1]))
    for bad, message in (
        ([0, C, 1], f"a label is {C}; expected integers from 0 to {C - 1}"),
        ([0, -2, 1], "a label is -2"),
        ([0.0, 0.5, 1.0], "a label is 0.5"),
        ([0.0, math.nan, 1.0], "a label is nan"),
        ([0, 1], r"labels have shape \(2,\); expected \(3,\)"),
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], "not one-hot"),
    ):
        with pytest.raises(InvalidData, match=message):
            call(name, method, x, torch.tensor(bad))


@pytest.mark.parametrize("name", ["cvae", "gmvae", "coupled", "cpa-conditional", "cpa-mixture"])
def test_label_to_generate(name):
    model = MODELS[name][0]()
    assert model.generate(2, y=C - 1).shape == (2, D)
    for bad in (C, -1, torch.tensor([0, C])):
        with pytest.raises(InvalidData, match="expected (integers from 0|classes 0)"):
            model.generate(2, y=bad)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_number_to_generate(name, count):
    options = {"y": 0} if name in CONDITIONAL else {}
    with pytest.raises(InvalidData, match="expected a positive integer"):
        MODELS[name][0]().generate(count, **options)


@pytest.mark.parametrize("name", MODELS)
def test_mode_of_generation(name):
    options = {"y": 0} if name in CONDITIONAL else {}
    with pytest.raises(InvalidData, match="mode is 'average'"):
        MODELS[name][0]().generate(1, mode="average", **options)
