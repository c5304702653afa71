# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_pairs import Exact, circle
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, pyro_method
from torch import nn
from torch.distributions import constraints

from pyro_cpa.distributions import CPAMarginal
from pyro_cpa.errors import CPAError, InvalidData, RegionBudgetExceeded, UnsupportedModel
from pyro_cpa.infer import EM, AutoCPAPosterior, ExactML


def fit_of(model, kind=EM, **kwargs):
    return kind(model, AutoCPAPosterior(model, decoder=model.decoder), **kwargs)


# Units that never switch on these small data leave the last layer's normal matrix singular, which is said once.
pytestmark = pytest.mark.filterwarnings("ignore:the normal matrix")

NOISES = {"scalar": 0.7, "diagonal": [0.5, 0.8], "full": [[0.6, 0.0], [0.2, 0.5]]}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("sizes", [(1, 6, 2), (1, 4, 4, 2), (2, 5, 2)])
@pytest.mark.parametrize("holes", [False, True])
def test_never_falls(noise, sizes, holes):
    model = Exact(*sizes, noise=NOISES[noise], seed=3)
    x = circle(60)
    if holes:
        x[torch.rand(x.shape) < 0.3] = torch.nan
    em = fit_of(model)
    losses = [em.step(x) for _ in range(6)] + [em.evaluate_loss(x)]
    assert all(b <= a + 1e-9 * abs(a) for a, b in zip(losses, losses[1:], strict=False))
    assert losses[-1] < losses[0] - 5
    assert [-r.log_evidence for r in em.history] == pytest.approx(losses[1:], rel=1e-12)
    noise = (
        {"scale": model.noise}
        if model.noise.dim() < 2
        else {"covariance_matrix": model.noise @ model.noise.mT}
    )
    expected = -CPAMarginal(model.decoder, **noise).log_prob(x).sum().item()
    assert em.evaluate_loss(x) == pytest.approx(expected, rel=1e-12)


class FactorAnalysis(PyroModule):
    def __init__(self, D, L):
        super().__init__()
        self.decoder = nn.Linear(L, D)
        self.noise = PyroParam(0.5 + torch.rand(D), constraint=constraints.positive)
        self.L = L

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.L), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.noise).to_event(1), obs=x)


@pytest.mark.parametrize("L", [1, 2, 3])
def test_one_step_of_factor_analysis_is_the_closed_form(L):
    torch.manual_seed(1)
    model, x = FactorAnalysis(5, L), torch.randn(80, 5) @ torch.randn(5, 5)
    W, mu, psi = (t.detach().clone() for t in (model.decoder.weight, model.decoder.bias, model.noise**2))
    G = torch.linalg.inv(torch.eye(L) + W.mT @ (W / psi[:, None]))
    m = (x - mu) @ (W / psi[:, None]) @ G
    first = torch.cat([m, torch.ones(80, 1)], 1)
    second = first.mT @ first
    second[:L, :L] += 80 * G
    new = (x.mT @ first) @ torch.linalg.inv(second)
    # Expectation-conditional-maximisation: the noise is updated under the posterior of the new last layer.
    em = fit_of(model, blocks=("output",))
    before = em.step(x)
    torch.testing.assert_close(model.decoder.weight.detach(), new[:, :L], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.decoder.bias.detach(), new[:, L], rtol=1e-12, atol=1e-12)
    exact = dist.MultivariateNormal(mu, torch.diag(psi) + W @ W.mT).log_prob(x).sum()
    assert before == pytest.approx(-exact.item(), rel=1e-12)
    W, mu = (t.detach().clone() for t in (model.decoder.weight, model.decoder.bias))
    G = torch.linalg.inv(torch.eye(L) + W.mT @ (W / psi[:, None]))
    m = (x - mu) @ (W / psi[:, None]) @ G
    residual = (x - mu - m @ W.mT).square().mean(0) + ((W @ G) * W).sum(1)
    fit_of(model, blocks=("noise",)).step(x)
    torch.testing.assert_close(model.noise.detach() ** 2, residual, rtol=1e-12, atol=1e-12)


def test_prior_block_and_parameters_in_the_store():
    decoder = nn.Linear(2, 3)
    x = torch.randn(100, 3) + 2

    def model(x):
        pyro.module("decoder", decoder)
        sigma = pyro.param("sigma", torch.ones(3), constraint=constraints.positive)
        loc = pyro.param("loc", torch.zeros(2))
        tril = pyro.param("tril", torch.eye(2), constraint=constraints.lower_cholesky)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))
            pyro.sample("x", dist.Normal(decoder(z), sigma).to_event(1), obs=x)

    guide = AutoCPAPosterior(model, decoder=decoder)
    em = EM(model, guide, blocks=("prior",))
    mean, spread = guide.posterior(x).mean, guide.posterior(x).covariance_matrix
    expected = (spread + (mean - mean.mean(0))[:, :, None] * (mean - mean.mean(0))[:, None]).mean(0)
    em.step(x)
    torch.testing.assert_close(pyro.param("loc").detach(), mean.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        (pyro.param("tril") @ pyro.param("tril").mT).detach(), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("noise", NOISES)
def test_ridge_is_monotone_in_the_penalised_objective_and_its_optimum(noise):
    model = Exact(1, 5, 2, noise=NOISES[noise], seed=2)
    x = circle(60)
    em = fit_of(model, ridge=3.0)
    em.run(x, num_steps=8, progress=False, tol=0.0)
    assert all(r.gain >= -1e-9 * abs(r.objective) for r in em.history)
    penalty = 1.5 * sum(
        layer.weight.square().sum() for layer in model.decoder if isinstance(layer, nn.Linear)
    )
    assert em.history[-1].objective == pytest.approx(em.history[-1].log_evidence - penalty.item(), rel=1e-10)
    # At the optimum of the last layer the gradient of the penalised expected loss vanishes.
    last = fit_of(model, blocks=("output",), ridge=3.0)
    for _ in range(60):
        last.step(x)
    loss = -em.guide.log_evidence(x).sum() + 1.5 * model.decoder[-1].weight.square().sum()
    gradient = torch.autograd.grad(loss, list(model.decoder[-1].parameters()))
    assert max(g.abs().max() for g in gradient) < 1e-5


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 2.0])
@pytest.mark.parametrize("block", ["hidden", "output"])
def test_block_minimises_the_frozen_surrogate(block, ridge, bias, noise):
    from pyro_cpa.distributions.fisher import expected_statistics
    from pyro_cpa.infer import m_step

    torch.manual_seed(0)
    decoder = nn.Sequential(
        nn.Linear(1, 4, bias),
        nn.LeakyReLU(0.2),
        nn.Linear(4, 3, bias),
        nn.LeakyReLU(0.2),
        nn.Linear(3, 2, bias),
    )
    spread = torch.as_tensor(NOISES[noise])
    px = CPAMarginal(
        decoder, **({"scale": spread} if spread.dim() < 2 else {"covariance_matrix": spread @ spread.mT})
    )
    x = torch.randn(40, 2)
    _, statistics = expected_statistics(px.joint, x)
    scale = px.joint.noise.scale
    if block == "hidden":
        layer = decoder[0]
        new, new_bias = m_step.hidden_layer(px.partition, statistics, scale, ridge, 0, 500, 1e-13)
    else:
        layer = decoder[-1]
        new, new_bias, _ = m_step.output_layer(px.partition, statistics, scale, ridge)
    with torch.no_grad():
        layer.weight.copy_(new)
        if bias:
            layer.bias.copy_(new_bias)
    # Activation patterns stay those of the E-step: affine_maps keeps them frozen.
    slopes, offsets = px.partition.affine_maps()
    loss = -statistics.expected_log_likelihood(slopes, offsets, scale)
    loss = loss + 0.5 * ridge * layer.weight.square().sum()
    for gradient in torch.autograd.grad(loss, list(layer.parameters())):
        assert gradient.abs().max() < 1e-6


def test_direct_ascent_reaches_a_stationary_point():
    model = Exact(1, 2, 2, seed=1)
    x = circle(40)
    fit = fit_of(model, ExactML)
    history = fit.run(x, num_steps=60, tol=1e-7, progress=False)
    assert all(r.gain >= -1e-9 * abs(r.objective) for r in history)
    loss = -fit.guide.log_evidence(x).mean()
    gradient = torch.autograd.grad(loss, [p for p in model.parameters()])
    assert max(g.abs().max() for g in gradient) < 1e-4
    assert fit.evaluate_loss(x) == pytest.approx(loss.item() * 40)
    accelerated = fit_of(Exact(1, 2, 2, seed=1), accelerate="lbfgs")
    records = accelerated.run(x, num_steps=30, tol=1e-7, progress=False)
    assert all(r.gain >= -1e-9 * abs(r.objective) for r in records)
    assert records[-1].log_evidence > history[-1].log_evidence - 0.001 * 40


def test_it_is_an_svi_object():
    model = Exact(1, 4, 2)
    em = fit_of(model)
    assert isinstance(em, SVI) and isinstance(em.step(circle(20)), float)
    assert isinstance(fit_of(model, ExactML), SVI)


def test_run_stops_reports_and_calls_back(capsys):
    model, x, seen = Exact(1, 4, 2), circle(30), []
    em = fit_of(model)
    history = em.run(x, num_steps=40, tol=1e-2, callback=seen.append)
    assert history is em.history and seen == history and len(history) < 40
    assert history[-1].gain < 1e-2 * 30 and all(r.gain >= 1e-2 * 30 for r in history[:-1])
    assert "log p(x)" in capsys.readouterr().err
    assert {"output", "noise", "hidden[0]"} == set(history[0].accepted)


def test_float32_models_climb_too():
    model = Exact(1, 5, 2).float()
    x = circle(60).float()
    em = fit_of(model)
    losses = [em.step(x) for _ in range(8)]
    assert all(b <= a + 1e-6 * abs(a) for a, b in zip(losses, losses[1:], strict=False))
    assert model.decoder[0].weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["circle_small", "wave_small", "circle_large", "wave_large"])
def test_published_starts_never_rise(shared_data, name):
    data = np.load(shared_data("em_starts.npz"))
    start = {k.removeprefix(f"{name}_s0_"): data[k] for k in data.files if k.startswith(f"{name}_s0_")}
    model = published(start)
    x = torch.as_tensor(start["data"])
    em = fit_of(model)
    losses = [em.step(x) / len(x) for _ in range(10)]
    assert losses[0] == pytest.approx(start["em_nll"][0], abs=2e-3)
    assert all(b <= a + 1e-9 for a, b in zip(losses, losses[1:], strict=False))


def published(start):
    layers = range(sum(k.startswith("init_W") for k in start))
    weights, biases = ([start[f"init_{kind}{i}"] for i in layers] for kind in "Wv")
    sizes = [weights[0].shape[1]] + [w.shape[0] for w in weights]
    model = Exact(*sizes, noise=float(np.asarray(start["init_var_x"]).reshape(-1)[0]) ** 0.5)
    for layer, w, v in zip(model.decoder[::2], weights, biases, strict=True):
        layer.weight.data, layer.bias.data = torch.tensor(w), torch.tensor(v)
    return model


def test_dead_ends_say_so():
    x = circle(30)
    constant = torch.cat([x[:, :1], torch.full((30, 1), 0.5)], 1)
    with pytest.raises(InvalidData, match=r"data dimension \[1\] reaches zero"):
        fit_of(Exact(1, 4, 2, noise=torch.ones(2))).run(constant, progress=False, tol=0.0)
    model = Exact(1, 4, 2)
    model.decoder[0].weight.data[1], model.decoder[0].bias.data[1] = 0.0, -1.0
    model.decoder[1] = nn.ReLU()
    with pytest.warns(UserWarning, match="never active"):
        fit_of(model, blocks=("output",)).step(x)
    with pytest.warns(UserWarning, match="overfitting"):
        fit_of(Exact(1, 8, 2), blocks=("output",)).step(x[:5])
    with pytest.raises(UnsupportedModel, match="plate 'data' is subsampled"):
        fit_of(Exact(1, 4, 2, subsample_size=5)).step(x)
    with pytest.raises(CPAError, match="selection of"):
        fit_of(model, blocks=("last",))
    with pytest.raises(CPAError, match="lbfgs"):
        fit_of(model, accelerate="adam")
    with pytest.raises(UnsupportedModel, match="prior of site 'z' is a constant"):
        fit_of(model, blocks=("prior",)).step(x)
    with pytest.raises(UnsupportedModel, match="AutoCPAPosterior"):
        EM(model, AutoNormal(model))


def test_noise_behind_a_transformation_is_refused_with_the_cure():
    model = Exact(1, 4, 2)
    model.likelihood = lambda mean: dist.Normal(mean, model.noise + 0.1).to_event(1)
    with pytest.raises(UnsupportedModel, match="computed from a parameter"):
        fit_of(model).step(circle(20))
    fit_of(model, ExactML).step(circle(20))


def test_a_constant_column_under_shared_noise():
    x = circle(40)
    x[:, 1] = 0.5
    em = fit_of(Exact(1, 4, 2))
    losses = [em.step(x) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("local", [False, True])
def test_bound_methods_and_local_parameters(local):
    class Holder(Exact):
        @pyro_method
        def model(self, x):
            return self.forward(x)

    with pyro.settings.context(module_local_params=local):
        holder = Holder(1, 4, 2)
        guide = AutoCPAPosterior(holder.model, decoder=holder.decoder)
        for fit in (
            EM(holder.model, guide),
            ExactML(holder.model, guide, warm_start=1, iterations_per_step=3),
        ):
            noise = holder.noise.item()
            losses = [fit.step(circle(40)) for _ in range(3)]
            assert losses == sorted(losses, reverse=True)
            assert holder.noise.item() != noise and holder.noise.item() > 0


def test_a_line_search_that_leaves_the_model_turns_back():
    model = Exact(1, 4, 2, noise=0.5)
    x = circle(30)
    fit = fit_of(model, ExactML, warm_start=0, iterations_per_step=5)
    before = fit.step(x)
    plain = fit.guide.log_evidence

    def walled(*args):
        if abs(model.noise.item() - 0.5) > 0.2:
            raise InvalidData("outside")
        return plain(*args)

    fit.guide.log_evidence = walled
    model.noise = torch.tensor(0.5)
    losses = [fit.step(x) for _ in range(4)]
    assert all(b <= a + 1e-9 for a, b in zip(losses, losses[1:], strict=False)) and before > 0
    assert abs(model.noise.item() - 0.5) <= 0.2


def test_a_budget_exceeded_in_a_step_restores_the_parameters():
    model = Exact(1, 8, 2, seed=4)
    x = circle(40)
    em = fit_of(model)
    em.step(x)
    em.guide.max_regions = 2
    model.decoder[0].weight.data.mul_(1.0000001)
    kept = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RegionBudgetExceeded):
        em.step(x)
    assert all(torch.equal(a, b.detach()) for a, b in zip(kept, model.parameters(), strict=True))
