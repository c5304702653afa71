# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Resuming is bit for bit, a crash leaves a whole file, and no file can run code."""

from __future__ import annotations

import os
import pickle
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import constraints

from pyro_cpa.errors import CPAError, InvalidData, UnsupportedModel
from pyro_cpa.infer import checkpoint
from pyro_cpa.infer.checkpoint import load_checkpoint, save_checkpoint
from pyro_cpa.infer.schedules import Moments


class Regression(pyro.nn.PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.3), torch.nn.Linear(4, 2))
        self.scale = pyro.nn.PyroParam(torch.ones(2), constraint=constraints.positive)
        self.register_buffer("shift", torch.zeros(2))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z) + self.shift, self.scale).to_event(1), obs=x)


class Guide(pyro.nn.PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 3)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), 0.5).to_event(1))


def optimisers():
    adam = {"lr": 0.01}
    return {
        "adam": lambda: pyro.optim.Adam(adam),
        "clipped": lambda: pyro.optim.ClippedAdam(adam),
        "adamw with clipping": lambda: pyro.optim.AdamW(adam, {"clip_norm": 1.0}),
        "exponential schedule": lambda: pyro.optim.ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": adam, "gamma": 0.9}
        ),
        "multi-step schedule": lambda: pyro.optim.MultiStepLR(
            {"optimizer": torch.optim.SGD, "optim_args": adam, "milestones": [2, 7], "gamma": 0.1}
        ),
    }


def training(make_optim):
    """Everything of a run, and a function that takes ``n`` steps with noise from all generators."""
    pyro.clear_param_store()
    pyro.set_rng_seed(5)
    model, guide, optim = Regression(), Guide(), make_optim()
    svi = SVI(model, guide, optim, Trace_ELBO())
    x = torch.linspace(-1, 1, 20).reshape(10, 2)

    def steps(n):
        losses = []
        for _ in range(n):
            rows = torch.tensor(random.sample(range(10), 5))
            losses.append(svi.step(x[rows] + 0.1 * torch.tensor(np.random.randn(5, 2))))
            if hasattr(optim, "step"):
                optim.step()
        return losses

    return {"model": model, "guide": guide, "optim": optim}, steps


@pytest.mark.parametrize("name", optimisers())
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, name):
    make_optim = optimisers()[name]
    parts, steps = training(make_optim)
    steps(4)
    save_checkpoint(tmp_path / "run.pt", **parts)
    expected = steps(6)
    whole = {k: v.clone() for k, v in parts["model"].state_dict().items()}

    parts, steps = training(make_optim)  # another process would start like this
    steps(1)
    load_checkpoint(tmp_path / "run.pt", **parts)
    assert steps(6) == expected
    for key, value in parts["model"].state_dict().items():
        assert torch.equal(value, whole[key])

    parts, steps = training(make_optim)  # and like this where nothing ran before loading
    load_checkpoint(tmp_path / "run.pt", **parts)
    save_checkpoint(tmp_path / "again.pt", **parts)  # a state that has not been used yet is not lost
    load_checkpoint(tmp_path / "again.pt", **parts)
    assert steps(6) == expected


def test_the_optimiser_state_matters(tmp_path):
    """The comparison above can fail: without the optimiser's moments the run differs."""
    parts, steps = training(optimisers()["adam"])
    steps(4)
    save_checkpoint(tmp_path / "run.pt", **parts)
    expected = steps(6)
    parts, steps = training(optimisers()["adam"])
    load_checkpoint(tmp_path / "run.pt", model=parts["model"], guide=parts["guide"])
    assert steps(6) != expected


def functional_pair():
    def model(x):
        scale = pyro.param("scale", lambda: torch.rand(3) + 0.5, constraint=constraints.positive)
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, scale).to_event(1), obs=x)

    return model, AutoNormal(model)


def test_functions_with_params_autoguides_torch_optimisers_and_schedules(tmp_path):
    x = torch.randn(6, 3)

    def build():
        pyro.clear_param_store()
        model, guide = functional_pair()
        Trace_ELBO().loss(model, guide, x)
        weights = torch.nn.Parameter(torch.zeros(2))
        adam = torch.optim.Adam([weights], 0.1)
        parts = {
            "params": pyro.get_param_store(),
            "guide": guide,
            "optim": pyro.optim.Adam({"lr": 0.05}),
            "adam": adam,
            "rate": torch.optim.lr_scheduler.StepLR(adam, 3),
            "betas": Moments(4),
            "generator": torch.Generator().manual_seed(int(torch.randint(1000, ()))),
        }
        return SVI(model, guide, parts["optim"], Trace_ELBO()), weights, parts

    def run(svi, weights, parts, n):
        out = []
        for _ in range(n):
            out.append(svi.step(x))
            (weights - torch.randn(2, generator=parts["generator"])).square().sum().backward()
            parts["adam"].step()
            parts["rate"].step()
            parts["adam"].zero_grad()
            parts["betas"].update(torch.randn(5, 2))
        return (
            out,
            weights.detach().clone(),
            parts["betas"].betas.clone(),
            parts["adam"].param_groups[0]["lr"],
        )

    svi, weights, parts = build()
    run(svi, weights, parts, 4)
    saved = weights.detach().clone()
    save_checkpoint(tmp_path / "run.pt", **parts)
    expected = run(svi, weights, parts, 5)
    svi, weights, parts = build()
    with torch.no_grad():
        weights.copy_(saved)
    load_checkpoint(tmp_path / "run.pt", **parts)
    losses, value, betas, rate = run(svi, weights, parts, 5)
    assert losses == expected[0] and torch.equal(value, expected[1])
    assert torch.equal(betas, expected[2]) and rate == expected[3]


def test_selected_parts_and_no_random_state(tmp_path):
    parts, steps = training(optimisers()["adam"])
    steps(2)
    save_checkpoint(tmp_path / "run.pt", **parts)
    fresh = Regression()
    state = torch.get_rng_state()
    load_checkpoint(tmp_path / "run.pt", model=fresh, random_state=False)
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in parts["model"].state_dict().items():
        assert torch.equal(value, fresh.state_dict()[key])


# ---- files ---------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    net = torch.nn.Linear(30, 30)
    path = tmp_path / "run.pt"
    save_checkpoint(path, net=net)
    return path, net


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.9, -1])
def test_truncated_file_is_refused_with_its_name(saved, keep):
    path, net = saved
    content = path.read_bytes()
    length = int(len(content) * keep) if isinstance(keep, float) else keep % len(content)
    path.write_bytes(content[:length])
    before = net.weight.detach().clone()
    with pytest.raises(CPAError, match="run.pt cannot be read as a checkpoint: it is truncated"):
        load_checkpoint(path, net=net)
    assert torch.equal(net.weight, before)


def test_damaged_byte_is_refused(saved):
    path, net = saved
    content = bytearray(path.read_bytes())
    where = content.find(net.weight.detach().numpy().tobytes()[:64])
    assert where > 0
    content[where + 5] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(InvalidData, match="run.pt cannot be read"):
        load_checkpoint(path, net=net)


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_file_that_would_run_code_is_refused_and_does_not(tmp_path, write):
    marker = tmp_path / "code-ran"
    write({"format": "pyro_cpa checkpoint", "version": 1, "parts": Malicious(marker)}, tmp_path / "evil.pt")
    with pytest.raises(InvalidData, match="evil.pt cannot be read"):
        load_checkpoint(tmp_path / "evil.pt", net=torch.nn.Linear(1, 1))
    assert not marker.exists()


def test_foreign_files_are_refused_with_their_names(tmp_path):
    net = torch.nn.Linear(2, 1)
    torch.save(net.state_dict(), tmp_path / "state.pt")
    with pytest.raises(InvalidData, match="state.pt is not a pyro_cpa checkpoint"):
        load_checkpoint(tmp_path / "state.pt", net=net)
    torch.save({"format": "pyro_cpa checkpoint", "version": 99}, tmp_path / "future.pt")
    with pytest.raises(InvalidData, match="future.pt has format version 99"):
        load_checkpoint(tmp_path / "future.pt", net=net)
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    with pytest.raises(InvalidData, match="notes.txt cannot be read"):
        load_checkpoint(tmp_path / "notes.txt", net=net)
    with pytest.raises(FileNotFoundError, match="absent.pt"):
        load_checkpoint(tmp_path / "absent.pt", net=net)


def test_failed_write_keeps_the_old_file_and_leaves_no_other(saved, monkeypatch):
    path, net = saved
    old = path.read_bytes()

    def fails(*args, **kwargs):
        raise OSError("disk full")

    for target, name in ((torch, "save"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fails)
            with pytest.raises(OSError, match="disk full"):
                save_checkpoint(path, net=torch.nn.Linear(30, 30))
        assert path.read_bytes() == old and os.listdir(path.parent) == [path.name]


def test_half_written_file_is_never_under_the_final_name(saved, monkeypatch):
    path, _ = saved
    old, seen = path.read_bytes(), []
    replace = os.replace

    def spy(source, target):
        seen.append(path.read_bytes() == old)
        checkpoint._read(source)  # whole before the move
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    save_checkpoint(path, net=torch.nn.Linear(2, 2))
    assert seen == [True] and path.read_bytes() != old


def test_state_that_does_not_fit_changes_nothing(tmp_path):
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)
    save_checkpoint(tmp_path / "run.pt", first=first, second=second)
    other, wrong = torch.nn.Linear(3, 2), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 5))
    before = other.weight.detach().clone()
    state = torch.get_rng_state()
    with pytest.raises(InvalidData, match=r"part 'second' of .*run.pt does not fit"):
        load_checkpoint(tmp_path / "run.pt", first=other, second=wrong)
    assert torch.equal(other.weight, before) and torch.equal(torch.get_rng_state(), state)
    with pytest.raises(InvalidData, match="holds no part 'third'; expected one of first, second"):
        load_checkpoint(tmp_path / "run.pt", third=other)


def test_parameter_stores_that_differ_are_refused(tmp_path):
    store = pyro.get_param_store()
    pyro.param("a", torch.zeros(2))
    save_checkpoint(tmp_path / "run.pt", params=store)
    pyro.param("b", torch.zeros(2))
    with pytest.raises(InvalidData, match="the parameter stores differ in 'b'"):
        load_checkpoint(tmp_path / "run.pt", params=store)
    pyro.clear_param_store()
    pyro.param("a", torch.zeros(3))
    with pytest.raises(InvalidData, match=r"parameter 'a' has shape \(2,\) in the file and \(3,\) here"):
        load_checkpoint(tmp_path / "run.pt", params=store)


def test_parts_without_state_are_refused(tmp_path):
    net = torch.nn.Linear(2, 1)
    with pytest.raises(UnsupportedModel, match="Pass the Linear that owns this method"):
        save_checkpoint(tmp_path / "run.pt", model=net.forward)
    with pytest.raises(UnsupportedModel, match=r"params=pyro.get_param_store\(\)"):
        save_checkpoint(tmp_path / "run.pt", model=lambda x: x)
    with pytest.raises(InvalidData, match="no part was given"):
        save_checkpoint(tmp_path / "run.pt")

    class Odd:
        def __init__(self, state):
            self.state = state

        def state_dict(self):
            return {"value": self.state}

        def load_state_dict(self, state):
            self.state = state["value"]

    for state in (lambda x: x, Odd(0)):
        with pytest.raises(UnsupportedModel, match="the state of one of odd cannot be saved"):
            save_checkpoint(tmp_path / "run.pt", odd=Odd(state))
    assert os.listdir(tmp_path) == []


def test_parameters_without_names_need_a_torch_optimiser(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.sum().backward()
    optim = pyro.optim.Adam({"lr": 0.1})
    optim([weight])
    with pytest.raises(UnsupportedModel, match="use a torch optimiser"):
        save_checkpoint(tmp_path / "run.pt", optim=optim)
