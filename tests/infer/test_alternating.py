# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""E- and M-phases on factor analysis, where evidence, bound and gap are known in closed form."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.nn.functional import softplus
from tqdm import tqdm

from pyro_cpa.errors import InvalidData, UnsupportedModel
from pyro_cpa.infer.alternating import AlternatingTrainer, Record
from pyro_cpa.infer.checkpoint import load_checkpoint, save_checkpoint


class FactorModel(pyro.nn.PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.noise = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, softplus(self.noise)).to_event(1), obs=x)

    def log_evidence(self, x):
        covariance = self.weight @ self.weight.T + torch.diag(softplus(self.noise) ** 2)
        return dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x)


class FactorGuide(pyro.nn.PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.randn(2, 3))
        self.factor = nn.Parameter(torch.randn(2, 2))

    def forward(self, x):
        covariance = self.factor.triu().T @ self.factor.triu() + 1e-6 * torch.eye(2)  # keeps Cholesky defined
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(x @ self.slope.T, covariance))


def data(n=200):
    weight = torch.tensor([[-0.5, -1.0], [-1.0, -1.0], [2.0, 0.5]])
    return torch.randn(n, 2) @ weight.T + torch.randn(n, 3) * torch.tensor([0.4, 0.2, 0.3])


def trainer(elbo=None, lr=0.01, **kwargs):
    """A fresh pair, as a new process would build it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    model, guide = FactorModel(), FactorGuide()
    optim = pyro.optim.Adam({"lr": lr})
    elbo = TraceMeanField_ELBO() if elbo is None else elbo
    kwargs.setdefault("evidence", model.log_evidence)
    return AlternatingTrainer(model, guide, optim, elbo, **kwargs)


def test_e_phases_keep_the_evidence_and_close_the_gap_and_m_phases_lift_it():
    run = trainer(phases=[("E", 150), ("M", 50)], lr=0.02)
    log = run.fit(data(), num_steps=400, log_every=50, progress=False)
    assert [record.step for record in log] == list(range(0, 450, 50))
    assert [record.phase for record in log] == ["", "E", "E", "E", "M", "E", "E", "E", "M"]
    evidence = [record.evidence for record in log]
    assert evidence[0] == evidence[1] == evidence[2] == evidence[3]  # the very same parameters
    assert evidence[4] == evidence[5] == evidence[6] == evidence[7]
    assert evidence[4] > evidence[3] + 0.1 and evidence[8] > evidence[7] + 0.05
    gaps = [record.gap for record in log]
    assert gaps[3] < 0.2 * gaps[0] and gaps[7] < gaps[4]
    assert all(record.gap == record.evidence - record.bound for record in log)
    assert log[4].bound > log[3].bound


def test_log_is_the_closed_form_per_row():
    x = data(50)
    run = trainer()
    log = run.fit(x, num_steps=0, progress=False)
    assert math.isclose(log[0].evidence, run.model.log_evidence(x).mean().item(), rel_tol=1e-12)
    # E log p(x, z) - log q(z | x) in closed form for the guide N(Vx, C)
    w, scale = run.model.weight, softplus(run.model.noise)
    cov = run.guide.factor.triu().T @ run.guide.factor.triu() + 1e-6 * torch.eye(2)
    mean = x @ run.guide.slope.T
    likelihood = (
        dist.Normal(mean @ w.T, scale).log_prob(x).sum(-1)
        - 0.5 * ((w @ cov @ w.T).diagonal() / scale**2).sum()
    )
    kl = torch.distributions.kl_divergence(
        dist.MultivariateNormal(mean, cov), dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    )
    # the objective draws one particle a row: standard error from fresh draws
    draws = torch.tensor([-Trace_ELBO().loss(run.model, run.guide, x) / 50 for _ in range(200)])
    assert abs(log[0].bound - (likelihood - kl).mean().item()) < 5 * draws.std()


def test_em_phase_is_svi():
    x = data()
    run = trainer(phases=[("EM", 10)])
    pyro.set_rng_seed(9)
    losses = [run.step(x) for _ in range(10)]
    other = trainer()
    pyro.set_rng_seed(9)
    svi = SVI(other.model, other.guide, other.optim, other.elbo)
    assert losses == [svi.step(x) for _ in range(10)]
    assert torch.equal(run.model.weight, other.model.weight)


def test_each_phase_moves_its_side_alone():
    x = data()
    run = trainer(phases=[("E", 2), ("M", 1)])
    assert [run.phase] == ["E"]
    sides = {}
    for name, side in (("E", run.guide), ("M", run.model)):
        sides[name] = {id(p) for p in side.parameters()}
    everything = [*run.model.parameters(), *run.guide.parameters()]
    for expected in "EEMEEM":
        assert run.phase == expected
        before = [p.detach().clone() for p in everything]
        run.step(x)
        for p, old in zip(everything, before, strict=True):
            assert (not torch.equal(p, old)) == (id(p) in sides[expected])
            assert p.grad is None or (p.grad == 0).all()


def test_shared_parameters_belong_to_the_model():
    from pyro_cpa.models.coupled_sigmoid_net import CoupledSigmoidNet

    net = CoupledSigmoidNet(5, (4,), num_classes=2)
    x, y = torch.bernoulli(torch.full((20, 5), 0.5)), torch.arange(20) % 2
    pair = AlternatingTrainer(
        net.model,
        net.guide,
        pyro.optim.Adam({"lr": 0.1}),
        Trace_ELBO(),
        [("E", 1), ("M", 1)],
        evidence=lambda *a: 0.0,
    )
    named = dict(net.named_parameters())
    guide_only = {"recognition.0.bias"}
    for expected in (guide_only, named.keys() - guide_only):
        before = {name: value.detach().clone() for name, value in named.items()}
        pair.step(x, y)
        moved = {name for name, value in named.items() if not torch.equal(value, before[name])}
        assert moved == expected


def test_any_elbo_and_minibatches():
    x = data(130)
    elbo = RenyiELBO(0.0, num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    run = trainer(elbo, phases=[("EM", 1)], batch_size=32)
    log = run.fit(x, num_steps=300, log_every=150, progress=False)
    assert log[-1].evidence > log[0].evidence + 0.3
    assert all(record.gap > -0.05 for record in log)


def test_minibatches_cover_every_epoch_and_do_not_touch_other_arguments():
    x, y = torch.arange(10.0)[:, None], torch.arange(10)
    run = trainer(batch_size=4)
    epochs = []
    for epoch in range(2):
        rows = []
        for i in range(3):
            run.steps = 3 * epoch + i
            one, two, factor = run._minibatch((x, y, 0.5))
            assert torch.equal(one[:, 0].long(), two) and factor == 0.5
            rows += two.tolist()
        assert sorted(rows) == list(range(10))
        epochs.append(rows)
    assert epochs[0] != epochs[1]


def test_the_log_does_not_change_the_run():
    x = data()
    run = trainer(Trace_ELBO())
    run.fit(x, num_steps=40, log_every=1, progress=False)
    weight = run.guide.slope.detach().clone()
    other = trainer(Trace_ELBO())
    other.fit(x, num_steps=40, log_every=40, progress=False)
    assert torch.equal(other.guide.slope, weight)


def test_evidence_is_estimated_where_none_is_given():
    x, run = data(20), trainer(Trace_ELBO(), phases=[("E", 150)], lr=0.05, evidence=None)
    log = run.fit(x, num_steps=150, log_every=150, progress=False)
    assert abs(log[-1].evidence - run.model.log_evidence(x).mean().item()) < 0.02


def test_lines_of_the_log_share_their_noise():
    x, run = data(20), trainer(Trace_ELBO())
    for seed in (1, 2):
        pyro.set_rng_seed(seed)
        run._log("", (x,), None, None, tqdm(disable=True))
    assert run.history[0] == run.history[1]


def test_early_stopping_goes_back_to_the_best_validation_evidence():
    x, validation = data(12), data(100)
    run = trainer(phases=[("E", 20), ("M", 20)], lr=0.05)
    lines = []
    log = run.fit(
        x,
        num_steps=20_000,
        validation=(validation,),
        log_every=20,
        patience=4,
        on_log=lines.append,
        progress=False,
    )
    assert run.stopped and run.steps < 20_000 and lines == log
    best = max(record.evidence for record in log)
    assert best > log[-1].evidence + 1e-3
    assert math.isclose(run.model.log_evidence(validation).mean().item(), best, rel_tol=1e-12)
    # E-phases leave the evidence as it is and must not count
    moving = [record for record in log if record.phase != "E"]
    assert moving.index(max(moving, key=lambda record: record.evidence)) == len(moving) - 5
    steps = run.steps
    run.fit(x, num_steps=steps + 100, progress=False)
    assert run.steps == steps


@pytest.mark.parametrize("patience", [None, 2])
def test_checkpoint_resumes_bit_for_bit(tmp_path, patience):
    x, validation = data(12), data(80)

    def build():
        run = trainer(Trace_ELBO(), phases=[("E", 7), ("M", 8)], batch_size=5, lr=0.2)
        return run, {"model": run.model, "guide": run.guide, "optim": run.optim, "trainer": run}

    def parameters(run):
        return [p.detach().clone() for p in (*run.model.parameters(), *run.guide.parameters())]

    num_steps = 120 if patience is None else 400
    options = dict(
        num_steps=num_steps, validation=(validation,), log_every=20, patience=patience, progress=False
    )
    run, parts = build()
    expected = list(
        run.fit(x, on_log=lambda r: save_checkpoint(tmp_path / f"{r.step}.pt", **parts), **options)
    )
    stopped, weights = run.stopped, parameters(run)
    assert stopped == (patience is not None)
    for record in (expected[3], expected[-2]):  # the latter after the best parameters were seen
        run, parts = build()
        load_checkpoint(tmp_path / f"{record.step}.pt", **parts)
        assert run.steps == record.step and run.history[-1] == record
        assert run.fit(x, **options) == expected and run.stopped == stopped
        assert all(isinstance(line, Record) for line in run.history)
        assert all(torch.equal(p, q) for p, q in zip(parameters(run), weights, strict=True))
    with pytest.raises(InvalidData, match="the saved phases are"):
        load_checkpoint(tmp_path / f"{record.step}.pt", trainer=trainer(phases=[("E", 1)]))


def test_progress_bar_shows_phase_and_gap(capsys):
    trainer(phases=[("M", 5)]).fit(data(20), num_steps=5, log_every=5)
    shown = capsys.readouterr().err
    assert "5/5" in shown and "phase=M" in shown and "gap=" in shown


def test_errors():
    model, guide, optim = FactorModel(), FactorGuide(), pyro.optim.Adam({"lr": 0.01})
    with pytest.raises(UnsupportedModel, match="elbo is a function"):
        AlternatingTrainer(model, guide, optim, lambda: 0)
    with pytest.raises(UnsupportedModel, match="optim is a SGD"):
        AlternatingTrainer(model, guide, torch.optim.SGD(model.parameters(), 0.1), Trace_ELBO())
    for phases, message in ([("X", 3)], "a phase is"), ([("E", 0)], "a phase is"), ([], "phases is empty"):
        with pytest.raises(InvalidData, match=message):
            AlternatingTrainer(model, guide, optim, Trace_ELBO(), phases)
    with pytest.raises(InvalidData, match="batch_size is 0"):
        trainer(batch_size=0)
    with pytest.raises(InvalidData, match="log_every=0"):
        trainer().fit(data(), num_steps=1, log_every=0)
    with pytest.raises(InvalidData, match="the first argument is no tensor"):
        trainer().fit(num_steps=1)

    def fixed(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(UnsupportedModel, match="'E' has nothing to move: the guide has no parameters"):
        AlternatingTrainer(model, fixed, optim, Trace_ELBO()).step(data())
