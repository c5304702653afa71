# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""A run that is killed, runs out of regions, or meets bad data loses no more than the step it was in."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_pairs import Exact, circle
from killed_run import FITS, training
from pyro.infer import SVI, Trace_ELBO
from warm_python import WarmPython

from pyro_cpa.errors import InvalidData, RegionBudgetExceeded
from pyro_cpa.infer import EM, AutoCPAPosterior, ExactML, ImportanceWeightedELBO, load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:the normal matrix")
SCRIPT = Path(__file__).with_name("killed_run.py")


@pytest.mark.parametrize("name", FITS)
def test_a_killed_run_resumes_to_the_result_of_the_whole(tmp_path, name):
    path = tmp_path / "run.pt"
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    run = WarmPython(str(SCRIPT), name, str(path), env=environment)
    try:
        # The script saves after each step, and is slow: it is killed within its fourth step or a later one.
        waited = time.monotonic()
        while not path.exists() or (path.with_suffix(".steps").read_text() < "3"):
            assert run.poll() is None and time.monotonic() - waited < 120
            time.sleep(0.02)
    finally:
        run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL

    whole, fit, x = training(name)
    fit.run(x, num_steps=8, tol=0.0, progress=False)
    pyro.clear_param_store()
    model, resumed, x = training(name)
    load_checkpoint(path, model=model, fit=resumed)
    done = len(resumed.history)
    assert 3 <= done < 8 and resumed.history[:done] != fit.history
    resumed.run(x, num_steps=8 - done, tol=0.0, progress=False)
    assert [r.objective for r in resumed.history] == pytest.approx(
        [r.objective for r in fit.history], rel=1e-10
    )
    assert [r.accepted for r in resumed.history] == [r.accepted for r in fit.history]
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def snapshot(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_unchanged(model, kept):
    assert all(torch.equal(a, b.detach()) for a, b in zip(kept, model.parameters(), strict=True))


def fit_of(model, kind=EM, **arguments):
    return kind(model, AutoCPAPosterior(model, decoder=model.decoder), **arguments)


def limited(model, budget):
    """Let the guide take the present decoder, and no other one with more than ``budget`` regions."""
    guide = AutoCPAPosterior(model, decoder=model.decoder)
    guide.partition()
    guide.max_regions = budget
    return guide


def test_regions_beyond_the_budget_undo_the_step_of_em():
    model = Exact(1, 8, 2, seed=4)
    x = circle(40)
    em = EM(model, limited(model, 2))
    loss = em.evaluate_loss(x)
    kept = snapshot(model)
    # The last layer's update alone moves no wall, but asks for the new partition.
    with pytest.raises(RegionBudgetExceeded, match="The step was undone: all parameters are those before it"):
        em.step(x)
    assert_unchanged(model, kept)
    assert em.history == []
    em.guide.max_regions = 100
    assert em.step(x) == loss


def test_regions_beyond_the_budget_turn_l_bfgs_back():
    model = Exact(1, 8, 2, seed=4)
    x = circle(40)
    fit = ExactML(model, limited(model, 2), warm_start=0, iterations_per_step=5)
    kept = snapshot(model)
    with pytest.warns(UserWarning, match="turned back .* max_regions=2.*best ones within the budget"):
        before = fit.step(x)
    assert_unchanged(model, kept)
    assert fit.history[-1].gain == 0 and fit.history[-1].log_evidence == pytest.approx(-before)
    # From a start beyond the budget there is nothing to turn back to.
    model.decoder[0].weight.data.mul_(1.0000001)
    kept = snapshot(model)
    with pytest.raises(RegionBudgetExceeded, match="Raise max_regions"):
        fit.step(x)
    assert_unchanged(model, kept)


@pytest.mark.parametrize("loss", [Trace_ELBO(), ImportanceWeightedELBO(2)])
def test_regions_beyond_the_budget_stop_svi_before_the_update(loss):
    model = Exact(1, 8, 2, seed=4)
    x = circle(40)
    guide = AutoCPAPosterior(model, decoder=model.decoder)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss)
    svi.step(x)
    guide.max_regions = 2
    kept, moments = snapshot(model), svi.optim.get_state()
    moments = {name: state["state"][0]["exp_avg"].clone() for name, state in moments.items()}
    with pytest.raises(RegionBudgetExceeded, match="max_regions=2.*Raise max_regions"):
        svi.step(x)
    assert_unchanged(model, kept)
    for name, state in svi.optim.get_state().items():
        assert torch.equal(state["state"][0]["exp_avg"], moments[name])
    guide.max_regions = 100
    svi.step(x)


def test_any_error_amid_a_step_undoes_it():
    model = Exact(1, 4, 2)
    em, x = fit_of(model), circle(30)
    em.step(x)
    kept, plain, calls = snapshot(model), em.guide.problem, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:  # after the first block was accepted
            raise KeyboardInterrupt
        return plain(*args)

    em.guide.problem = interrupted
    with pytest.raises(KeyboardInterrupt):
        em.step(x)
    assert_unchanged(model, kept)


RUNS = {
    "em": lambda model: fit_of(model).step,
    "em with l-bfgs": lambda model: fit_of(model, accelerate="lbfgs", warm_up=0).step,
    "l-bfgs": lambda model: fit_of(model, ExactML, warm_start=0).step,
    "ml": lambda model: fit_of(model, ExactML).step,
    "svi": lambda model: (
        SVI(
            model, AutoCPAPosterior(model, decoder=model.decoder), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()
        ).step
    ),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize(
    "fault", ["inf", "-inf", "zero noise", "singular noise", "singular prior", "weights"]
)
def test_bad_numbers_are_refused_before_any_update(run, fault, validate):
    model, x = Exact(1, 4, 2), circle(30)
    singular = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    if "inf" in fault:
        x[4, 1] = float(fault)
    elif fault == "zero noise":
        model.likelihood = lambda mean: dist.NanMaskedNormal(mean, torch.tensor([0.5, 0.0])).to_event(1)
    elif fault == "singular noise":
        model.likelihood = lambda mean: dist.NanMaskedMultivariateNormal(mean, scale_tril=singular)
    elif fault == "singular prior":
        model = SingularPrior(2, 4, 2)
    else:
        model.decoder[0].weight.data[1] = torch.nan
    kept = [p.nan_to_num() for p in snapshot(model)]
    step = RUNS[run](model)
    with pyro.validation_enabled(validate), pytest.raises(ValueError) as raised:
        step(x)
    if not validate:
        assert isinstance(raised.value, InvalidData), raised.value
    assert all(torch.equal(a, b.detach().nan_to_num()) for a, b in zip(kept, model.parameters(), strict=True))


class SingularPrior(Exact):
    def forward(self, x):
        tril = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril))
            pyro.sample("x", self.likelihood(self.decoder(z)), obs=x)


def test_missing_is_not_bad():
    x = circle(30)
    x[4, 1] = torch.nan
    for make in RUNS.values():
        pyro.clear_param_store()
        assert make(Exact(1, 4, 2))(x) > 0
