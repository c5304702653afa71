# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import posterior_1d
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_cpa.distributions import CPAMarginal
from pyro_cpa.errors import CPAError, InvalidData


def net(*sizes, activation=nn.ReLU, seed=0):
    torch.manual_seed(seed)
    layers = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), activation()]
    decoder = nn.Sequential(*layers[:-1])
    for p in decoder.parameters():
        p.data = torch.randn_like(p)
    return decoder


DECODERS = {
    "relu": lambda: net(1, 6, 2),
    "deep": lambda: net(1, 5, 5, 3, activation=lambda: nn.LeakyReLU(0.1)),
    "wide data": lambda: net(1, 3, 7),
    "last activation": lambda: nn.Sequential(net(1, 4, 2, seed=2), nn.LeakyReLU(0.3)),
}


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("scale", [0.5, 0.05])
def test_log_prob_equals_quadrature(name, scale):
    decoder = DECODERS[name]()
    px = CPAMarginal(decoder, scale)
    x = torch.cat([px.sample((5,)), px.sample((5,)) + torch.randn(5, px.event_shape[0])])
    expected = posterior_1d(decoder, x, torch.tensor(scale), width=0.004)[0]
    torch.testing.assert_close(px.log_prob(x), expected, rtol=1e-10, atol=1e-9)


def test_tails_are_exact_where_floors_would_lie():
    decoder = net(1, 8, 2, activation=lambda: nn.LeakyReLU(0.1))
    px = CPAMarginal(decoder, 0.01**0.5)
    x = px.sample((4,)) + torch.tensor([[2.0, 2.0], [-3.0, 1.0], [5.0, -5.0], [0.0, 9.0]])
    expected = posterior_1d(decoder, x, torch.tensor(0.1), width=0.002)[0]
    assert expected.min() < -400
    torch.testing.assert_close(px.log_prob(x), expected, rtol=1e-10, atol=0)


def test_diagonal_noise_missing_entries_and_prior():
    decoder = net(1, 6, 3)
    scale = torch.tensor([0.3, 0.1, 0.8])
    loc, variance = torch.tensor([0.4]), torch.tensor([[2.25]])
    px = CPAMarginal(decoder, scale, loc=loc, prior_covariance=variance)
    x = px.sample((12,))
    x[torch.rand(x.shape) < 0.4] = torch.nan
    x[0] = torch.nan
    expected = posterior_1d(decoder, x, scale, 0.4, 1.5, width=0.004)[0]
    found = px.log_prob(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert abs(found[0]) < 1e-12


def linear(L=2, D=5):
    decoder = nn.Linear(L, D)
    covariance = torch.randn(D, D)
    covariance = covariance @ covariance.mT + 0.1 * torch.eye(D)
    loc, factor = torch.randn(L), torch.randn(L, L)
    prior = factor @ factor.mT + 0.2 * torch.eye(L)
    exact = dist.MultivariateNormal(
        decoder(loc).detach(), covariance + decoder.weight.detach() @ prior @ decoder.weight.detach().mT
    )
    return decoder, covariance, loc, prior, exact


@pytest.mark.parametrize("L", [1, 2, 4])
def test_linear_decoder_is_factor_analysis(L):
    decoder, covariance, loc, prior, exact = linear(L)
    px = CPAMarginal(decoder, covariance_matrix=covariance, loc=loc, prior_covariance=prior)
    x = exact.sample((20,))
    torch.testing.assert_close(px.log_prob(x), exact.log_prob(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(px.mean.detach(), exact.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(px.covariance_matrix.detach(), exact.covariance_matrix, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(px.variance.detach(), exact.variance, rtol=1e-12, atol=1e-12)
    x[torch.rand(x.shape) < 0.5] = torch.nan
    expected = dist.NanMaskedMultivariateNormal(exact.loc, exact.covariance_matrix).log_prob(x)
    torch.testing.assert_close(px.log_prob(x), expected, rtol=1e-11, atol=1e-11)


def rotated(scale):
    """Two independent 1-D decoders behind a rotation of the latent plane, and their marginals."""
    one, two = net(1, 5, 2, seed=3), net(1, 4, 3, seed=4)
    angle = 0.7
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    first, last = nn.Linear(2, 9), nn.Linear(9, 5)
    first.weight.data = torch.block_diag(one[0].weight, two[0].weight) @ turn
    first.bias.data = torch.cat([one[0].bias, two[0].bias]).detach()
    last.weight.data = torch.block_diag(one[2].weight, two[2].weight)
    last.bias.data = torch.cat([one[2].bias, two[2].bias]).detach()
    both = CPAMarginal(nn.Sequential(first, nn.ReLU(), last), scale)
    return both, CPAMarginal(one, scale), CPAMarginal(two, scale), turn


@pytest.mark.parametrize("scale", [0.5, 0.05])
def test_rotated_product_of_two_lines(scale):
    both, one, two, turn = rotated(scale)
    x = both.sample((40,))
    far = torch.randn(20, 5)
    x = torch.cat([x, x[:20] + 100 * scale * far / far.norm(dim=-1, keepdim=True)])
    expected = one.log_prob(x[:, :2]) + two.log_prob(x[:, 2:])
    torch.testing.assert_close(both.log_prob(x), expected, rtol=1e-10, atol=1e-10)
    first, second = one.posterior(x[:, :2]), two.posterior(x[:, 2:])
    mean = torch.cat([first.mean, second.mean], -1) @ turn
    torch.testing.assert_close(both.posterior(x).mean, mean, rtol=1e-8, atol=1e-9)
    spread = torch.diag_embed(torch.cat([first.variance, second.variance], -1))
    torch.testing.assert_close(
        both.posterior(x).covariance_matrix, turn.mT @ spread @ turn, rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize("sizes", [(1, 5, 3), (2, 6, 3), (2, 4, 4, 3)])
@pytest.mark.parametrize("noise", ["scalar", "diagonal", "full"])
@pytest.mark.parametrize("holes", [False, True])
def test_gradients_by_finite_differences(sizes, noise, holes):
    decoder = net(*sizes)
    L, D = sizes[0], sizes[-1]
    raw = {
        "scalar": torch.tensor(0.4),
        "diagonal": torch.rand(D) + 0.3,
        "full": torch.eye(D) + 0.3 * torch.randn(D, D),
    }
    raw, loc, factor = raw[noise].clone(), 0.1 * torch.randn(L), torch.eye(L) + 0.2 * torch.randn(L, L)
    parameters = [*decoder.parameters(), raw, loc, factor]

    def marginal():
        kind = {"covariance_matrix": raw @ raw.mT} if noise == "full" else {"scale": raw}
        return CPAMarginal(decoder, loc=loc, prior_covariance=factor @ factor.mT, **kind)

    x = marginal().sample((6,)).detach()
    if holes:
        x[torch.rand(x.shape) < 0.3] = torch.nan
    x.requires_grad_()
    for p in parameters:
        p.requires_grad_()
    weights = torch.randn(6)
    (marginal().log_prob(x) * weights).sum().backward()
    assert (x.grad[x.isnan()] == 0).all()
    step = 1e-5
    for p in [*parameters, x]:
        # Of all entries at once, along a random direction.
        direction = torch.where(p.isnan(), 0.0, torch.randn_like(p))
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * step * direction
                values.append((marginal().log_prob(x) * weights).sum())
                p -= sign * step * direction
        expected = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close((p.grad * direction).sum(), expected, rtol=1e-6, atol=1e-7)


def test_gradient_is_the_same_when_streamed_in_chunks():
    decoder = net(2, 8, 3)
    x = CPAMarginal(decoder, 0.3).sample((50,)).detach()
    gradients = []
    for budget in (2**28, 2**14):
        decoder.zero_grad()
        px = CPAMarginal(decoder, 0.3, memory_budget=budget)
        assert (len(list(px.joint.chunks(x))) > 1) == (budget < 2**20)
        px.log_prob(x).sum().backward()
        gradients.append([p.grad.clone() for p in decoder.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sizes", [(1, 6, 2), (2, 7, 3)])
def test_moments_and_samples_agree(sizes):
    decoder = net(*sizes)
    px = CPAMarginal(decoder, covariance_matrix=0.1 * torch.eye(sizes[-1]) + 0.05)
    x = px.sample((200_000,)).detach()
    error = x.std(0) / len(x) ** 0.5
    assert ((x.mean(0) - px.mean).abs() < 5 * error).all()
    centred = x - px.mean.detach()
    products = centred[:, :, None] * centred[:, None]
    error = products.std(0) / len(x) ** 0.5
    assert ((products.mean(0) - px.covariance_matrix.detach()).abs() < 5 * error).all()
    torch.testing.assert_close(px.variance, px.covariance_matrix.diagonal(), rtol=1e-12, atol=1e-12)


def test_density_integrates_to_one():
    px = CPAMarginal(net(2, 6, 1), 0.4)
    # The noise smooths the density over 0.4: sums over a grid of a tenth of that are exact to rounding.
    x = torch.linspace(-60, 60, 3001)[:, None]
    assert abs(px.log_prob(x).exp().sum() * 0.04 - 1) < 1e-9


def test_rsample_gradient_matches_the_mean():
    decoder = net(1, 5, 2)
    px = CPAMarginal(decoder, 0.3)
    x = px.rsample((100_000,))
    (gradient,) = torch.autograd.grad(x.mean(0).sum(), decoder[-1].bias)
    torch.testing.assert_close(gradient, torch.ones(2))


def test_float32_in_and_out_with_float64_inside():
    decoder = net(2, 6, 3).float()
    px = CPAMarginal(decoder, torch.tensor(0.1, dtype=torch.float32))
    x = px.sample((4,))
    assert x.dtype == px.log_prob(x).dtype == px.mean.dtype == px.posterior(x).mean.dtype == torch.float32
    double = CPAMarginal(decoder.double(), torch.tensor(0.1, dtype=torch.float32).double())
    torch.testing.assert_close(px.log_prob(x), double.log_prob(x.double()).float(), rtol=1e-6, atol=0)


def test_pyro_contract_in_plates_masks_and_shapes():
    decoder = net(1, 4, 2)
    px = CPAMarginal(decoder, 0.3, validate_args=True)
    x = px.sample((3, 5))
    assert px.log_prob(x).shape == (3, 5) and px.expand([5]).log_prob(x).shape == (3, 5)
    assert px.expand([3, 5]).sample((2,)).shape == (2, 3, 5, 2)
    assert px.mask(torch.tensor([True, False])).log_prob(x[:, :2].contiguous())[:, 1].eq(0).all()
    with pytest.raises((ValueError, RuntimeError), match="[Bb]roadcast"):
        px.expand([4]).log_prob(x)

    def model():
        with pyro.plate("data", 5):
            pyro.sample("x", px, obs=x[0])

    trace = pyro.poutine.trace(model).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), px.log_prob(x[0]).sum())


def test_maximum_likelihood_in_svi_without_a_guide():
    x = CPAMarginal(net(1, 4, 2, seed=5), 0.2).sample((200,)).detach()
    decoder = net(1, 4, 2, seed=6)

    def model(x):
        pyro.module("decoder", decoder)
        sigma = pyro.param("sigma", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", CPAMarginal(decoder, sigma), obs=x)

    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(60)]
    assert losses[-1] < losses[0] - 100


BAD = {
    "both noises": (dict(scale=1.0, covariance_matrix=torch.eye(2)), "exactly one"),
    "no noise": (dict(), "exactly one"),
    "zero noise": (dict(scale=0.0), "> 0"),
    "nan noise": (dict(scale=torch.tensor([1.0, torch.nan])), "finite"),
    "three scales": (dict(scale=torch.ones(3)), r"\(2,\)"),
    "singular covariance": (dict(covariance_matrix=torch.ones(2, 2)), "positive definite"),
    "asymmetric": (dict(covariance_matrix=torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "symmetric"),
    "prior mean": (dict(scale=1.0, loc=torch.zeros(3)), "prior mean"),
    "prior covariance": (dict(scale=1.0, prior_covariance=torch.tensor([[-1.0]])), "positive definite"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_parameters(name):
    arguments, message = BAD[name]
    with pytest.raises(InvalidData, match=message):
        CPAMarginal(net(1, 3, 2), **arguments)


def test_bad_data():
    px = CPAMarginal(net(1, 3, 2), 1.0)
    with pytest.raises(InvalidData, match=r"expected \(\.\.\., 2\)"):
        px.log_prob(torch.zeros(4, 3))
    with pytest.raises(InvalidData, match="row 1, column 0"):
        px.log_prob(torch.tensor([[0.0, 1.0], [torch.inf, 0.0]]))
    assert issubclass(InvalidData, CPAError) and issubclass(CPAError, ValueError)


def test_random_weights_are_read_once():
    class Decoder(PyroModule):
        def __init__(self):
            super().__init__()
            self.body = PyroModule[nn.Sequential](
                PyroModule[nn.Linear](1, 3), PyroModule[nn.ReLU](), PyroModule[nn.Linear](3, 2)
            )
            self.body[2].weight = PyroSample(dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))

        def forward(self, x):
            px = CPAMarginal(self.body, 0.5)
            with pyro.plate("data", len(x)):
                pyro.sample("x", px, obs=x)

    model, x = Decoder(), torch.randn(6, 2)
    weight = torch.randn(2, 3, requires_grad=True)
    conditioned = pyro.condition(model, data={"body.2.weight": weight})
    found = pyro.poutine.trace(conditioned).get_trace(x).log_prob_sum()
    (gradient,) = torch.autograd.grad(found, weight)
    plain = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2))
    plain.load_state_dict({k: v for k, v in model.body.state_dict().items() if k != "2.weight"}, strict=False)
    plain[2].weight.data = weight.detach().clone()
    prior = dist.Normal(0.0, 1.0)
    expected = CPAMarginal(plain, 0.5).log_prob(x).sum() + prior.log_prob(plain[2].weight).sum()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (target,) = torch.autograd.grad(expected, plain[2].weight)
    torch.testing.assert_close(gradient, target, rtol=1e-10, atol=1e-10)
