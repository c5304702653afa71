# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""AnalyticELBO against Pyro's own estimators, hand-written sums and closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.util import torch_item
from pyro.nn import PyroModule
from pyro.optim import Adam
from torch.distributions import kl_divergence

from pyro_cpa.errors import InvalidData
from pyro_cpa.infer.analytic import AnalyticELBO

N, C = 6, 3
X = torch.linspace(-1.5, 2.0, N, dtype=torch.float64)
OPTIONS = [
    {},
    {"num_particles": 4},
    {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 1},
]


class Chain:
    """z1 -> z2 -> x with plate, subsampling, mask and scale, all parameters by name."""

    def __init__(self, size=N, mask=None, scale=1.0, anneal=1.0):
        self.size, self.mask, self.scale, self.anneal = size, mask, scale, anneal

    def sites(self, first, second, x=None):
        plate = pyro.plate("data", self.size, subsample=torch.arange(N) if self.size != N else None)
        with plate, poutine.scale(scale=self.scale):
            with poutine.mask(mask=True if self.mask is None else self.mask):
                with poutine.scale(scale=self.anneal):
                    z1 = pyro.sample("z1", first)
                    z2 = pyro.sample("z2", second(z1))
                if x is not None:
                    loc = z2 + pyro.param("bias", torch.tensor(0.3))
                    pyro.sample("x", dist.Normal(loc, 0.7), obs=x)

    def model(self, x):
        weight = pyro.param("weight", torch.tensor(0.8))
        self.sites(dist.Normal(weight, 1.0), lambda z1: dist.Normal(weight * z1, 0.9), x)

    def guide(self, x):
        slope = pyro.param("tilt", torch.tensor(0.5))
        self.sites(dist.Normal(slope * x, 0.6), lambda z1: dist.Normal(z1 + slope, 0.5))


def gradients():
    return {name: p.grad.clone() for name, p in pyro.get_param_store().named_parameters()}


def run(elbo, model, guide, *args, seed=7):
    """Loss and gradients of every parameter, from a clean parameter store."""
    pyro.clear_param_store()
    with poutine.block():  # creates the parameters
        guide(*args)
        model(*args)
    pyro.set_rng_seed(seed)
    loss = elbo.loss_and_grads(model, guide, *args)
    return loss, gradients()


@pytest.mark.parametrize("options", OPTIONS, ids=["one", "looped", "vectorised"])
@pytest.mark.parametrize(
    "chain",
    [
        Chain(),
        Chain(size=50),
        Chain(mask=torch.tensor([1, 0, 1, 1, 0, 1]).bool()),
        Chain(scale=1 / N),
        Chain(anneal=0.3),
        Chain(size=50, scale=0.1, anneal=0.3, mask=torch.tensor([1, 0, 1, 1, 0, 1]).bool()),
    ],
    ids=["plain", "subsample", "mask", "scale", "annealed", "all"],
)
def test_equals_mean_field_elbo_where_nothing_is_enumerated(chain, options):
    loss, grads = run(AnalyticELBO(**options), chain.model, chain.guide, X)
    expected, expected_grads = run(TraceMeanField_ELBO(**options), chain.model, chain.guide, X)
    assert loss == pytest.approx(expected, rel=1e-13)
    assert grads.keys() == expected_grads.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], expected_grads[name], rtol=1e-11, atol=1e-12)


class Mixture(PyroModule):
    """y -> z -> x, the guide runs y then z given y: the shape of a Gaussian-mixture VAE."""

    enumerate = "parallel"

    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.tensor([-1.0, 0.2, 1.3]))
        self.slope = torch.nn.Parameter(torch.tensor([0.4, 0.6, 0.9]))
        self.logits = torch.nn.Parameter(torch.tensor([0.3, -0.2, 0.5]))

    @pyro.nn.pyro_method
    def model(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=torch.zeros(C)))
            z = pyro.sample("z", dist.Normal(self.loc[y], 1.0))
            pyro.sample("x", dist.Normal(torch.sin(2 * z), 0.7), obs=x)

    def q_y(self, x):
        return dist.Categorical(logits=self.logits * x[:, None])

    def q_z(self, x, y):
        return dist.Normal(self.slope[y] * x + 0.1 * y, 0.5)

    @pyro.nn.pyro_method
    def guide(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", self.q_y(x), infer={"enumerate": self.enumerate})
            pyro.sample("z", self.q_z(x, y))

    def by_hand(self, x):
        """(reconstruction, KL of z, KL of y) with one draw of z for each value of y."""
        y = torch.arange(C)[:, None]
        q_y, q_z = self.q_y(x), self.q_z(x, y)
        z = q_z.rsample()
        log_lik = dist.Normal(torch.sin(2 * z), 0.7).log_prob(x)
        kl_z = kl_divergence(q_z, dist.Normal(self.loc[y], 1.0))
        kl_y = math.log(C) - q_y.entropy()
        return (q_y.probs.T * log_lik).sum(), (q_y.probs.T * kl_z).sum(), kl_y.sum()


@pytest.mark.parametrize("options", [{}, {"max_plate_nesting": 1}])
def test_enumeration_with_closed_form_equals_the_sum_by_hand(options):
    pair = Mixture()
    elbo = AnalyticELBO(**options)
    pyro.set_rng_seed(3)
    loss = elbo.differentiable_loss(pair.model, pair.guide, X)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in pair.named_parameters()}
    pair.zero_grad()
    pyro.set_rng_seed(3)
    reconstruction, kl_z, kl_y = pair.by_hand(X)
    (kl_z + kl_y - reconstruction).backward()
    assert loss.item() == pytest.approx((kl_z + kl_y - reconstruction).item(), rel=1e-13)
    for name, p in pair.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-11, atol=1e-12)
    assert elbo.analytic_sites == ("z",)
    assert elbo.reconstruction == pytest.approx(reconstruction.item(), rel=1e-12)
    assert elbo.kl_by_site == pytest.approx({"y": kl_y.item(), "z": kl_z.item()}, rel=1e-12)
    assert elbo.kl == pytest.approx((kl_z + kl_y).item(), rel=1e-12)


def test_sequential_enumeration_agrees_in_the_terms_without_noise():
    pair = Mixture()
    pair.enumerate = "sequential"
    elbo = AnalyticELBO(num_particles=2)
    elbo.loss(pair.model, pair.guide, X)
    _, kl_z, kl_y = pair.by_hand(X)
    assert elbo.kl_by_site == pytest.approx({"y": kl_y.item(), "z": kl_z.item()}, rel=1e-12)


def test_same_mean_as_trace_enum_and_smaller_spread():
    pair, draws = Mixture(), 60
    x = X.repeat(5)  # five draws of each row in one
    losses = {}
    for elbo in (AnalyticELBO(), TraceEnum_ELBO(max_plate_nesting=1)):
        losses[type(elbo)] = torch.tensor([elbo.loss(pair.model, pair.guide, x) for _ in range(draws)])
    ours, theirs = losses[AnalyticELBO], losses[TraceEnum_ELBO]
    error = ((ours.var() + theirs.var()) / draws).sqrt()
    assert (ours.mean() - theirs.mean()).abs() < 5 * error
    assert ours.std() < theirs.std()


def test_vectorised_particles_over_enumeration_average_the_same_bound():
    pair, draws = Mixture(), 30
    x = X.repeat(20)  # twenty draws of each row in one
    one, many = AnalyticELBO(), AnalyticELBO(num_particles=50, vectorize_particles=True)
    a = torch.tensor([one.loss(pair.model, pair.guide, x) for _ in range(draws)])
    b = torch.tensor([many.loss(pair.model, pair.guide, x) for _ in range(draws)])
    assert (a.mean() - b.mean()).abs() < 5 * ((a.var() + b.var()) / draws).sqrt()
    _, kl_z, kl_y = pair.by_hand(x)
    assert many.kl == pytest.approx((kl_z + kl_y).item(), rel=1e-12)


def test_site_without_registered_formula_keeps_its_sample():
    def model(x):
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.StudentT(4.0, 0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", N):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.4)) * x, 0.8))

    elbo = AnalyticELBO()
    loss, grads = run(elbo, model, guide, X)
    expected, expected_grads = run(Trace_ELBO(), model, guide, X)
    assert elbo.analytic_sites == ()
    assert loss == pytest.approx(expected, rel=1e-13)
    assert torch.allclose(grads["a"], expected_grads["a"], rtol=1e-11)


def reversed_pair():
    """The guide draws z2 first and z1 given z2: KL(q(z1|z2) | p(z1)) is right, that of z2 is not."""

    def model(x):
        with pyro.plate("data", N):
            z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
            z2 = pyro.sample("z2", dist.Normal(z1, 0.6))
            pyro.sample("x", dist.Normal(z2, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", N):
            z2 = pyro.sample("z2", dist.Normal(0.7 * x, 0.4))
            pyro.sample("z1", dist.Normal(0.9 * z2, 0.3))

    return model, guide


def test_closed_form_is_not_used_where_its_parameters_depend_on_the_site():
    model, guide = reversed_pair()
    draws = 2000
    ours = AnalyticELBO(num_particles=draws, vectorize_particles=True)
    truth = Trace_ELBO(num_particles=draws, vectorize_particles=True, max_plate_nesting=1)
    a = torch.tensor([ours.loss(model, guide, X) for _ in range(20)])
    b = torch.tensor([truth.loss(model, guide, X) for _ in range(20)])
    error = ((a.var() + b.var()) / 20).sqrt()
    assert (a.mean() - b.mean()).abs() < 5 * error
    assert ours.analytic_sites == ("z1",)
    wrong = TraceMeanField_ELBO(num_particles=draws, vectorize_particles=True, max_plate_nesting=1)
    with pytest.warns(UserWarning, match="mean field"):
        assert abs(wrong.loss(model, guide, X) - b.mean()) > 20 * error


def test_mask_or_scale_of_one_side_alone_keeps_the_sample():
    chain = Chain()
    masked = poutine.mask(chain.model, mask=torch.tensor([1, 0, 1, 1, 0, 1]).bool())
    for model in (masked, poutine.scale(chain.model, scale=2.0)):
        elbo = AnalyticELBO()
        loss, _ = run(elbo, model, chain.guide, X)
        expected, _ = run(Trace_ELBO(), model, chain.guide, X)
        assert elbo.analytic_sites == ()
        assert loss == pytest.approx(expected, rel=1e-13)


def mixture_with_model_side_enumeration(prior_depends_on_y):
    def model(x):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N):
            y = pyro.sample(
                "y", dist.Categorical(logits=torch.tensor([0.1, 0.5])), infer={"enumerate": "parallel"}
            )
            loc = torch.tensor([-1.0, 1.0])[y]
            z = pyro.sample("z", dist.Normal(loc if prior_depends_on_y else torch.zeros(N), 1.0))
            pyro.sample("x", dist.Normal(z + shift + loc, 0.5), obs=x)

    def guide(x):
        pyro.sample("shift", dist.Normal(pyro.param("m", torch.tensor(0.2)), 0.3))
        with pyro.plate("data", N):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.4)) * x, 0.8))

    return model, guide


@pytest.mark.parametrize("tied", [False, True])
def test_variable_summed_out_in_the_model(tied):
    model, guide = mixture_with_model_side_enumeration(tied)
    elbo = AnalyticELBO(max_plate_nesting=1)
    loss, _ = run(elbo, model, guide, X)
    assert elbo.analytic_sites == (("shift",) if tied else ("shift", "z"))
    # By hand from the same draws: the divergences replace the sampled log-ratios.
    pyro.set_rng_seed(7)
    shift = dist.Normal(0.2, 0.3).rsample()
    q_z = dist.Normal(0.4 * X, 0.8)
    z = q_z.rsample()
    y = torch.tensor([[0], [1]])
    loc = torch.tensor([-1.0, 1.0])[y]
    log_py = torch.tensor([0.1, 0.5]).log_softmax(0)[:, None]
    kl = kl_divergence(dist.Normal(0.2, 0.3), dist.Normal(0.0, 1.0))
    terms = log_py + dist.Normal(z + shift + loc, 0.5).log_prob(X)
    if tied:
        bound = (terms + dist.Normal(loc, 1.0).log_prob(z)).logsumexp(0).sum() - q_z.log_prob(z).sum() - kl
    else:
        kl = kl + kl_divergence(q_z, dist.Normal(torch.tensor(0.0), 1.0)).sum()
        bound = terms.logsumexp(0).sum() - kl
    assert loss == pytest.approx(-bound.item(), rel=1e-12)
    assert elbo.kl == pytest.approx(kl.item(), rel=1e-12)


def test_sampled_discrete_site_has_the_right_gradient():
    """No enumeration, no reparameterisation: closed-form KL and score function against the exact gradient."""
    x = X[:2]

    def model(x):
        with pyro.plate("data", 2):
            y = pyro.sample("y", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(2 * y - 1, 0.8), obs=x)

    def guide(x):
        with pyro.plate("data", 2):
            pyro.sample("y", dist.Bernoulli(logits=pyro.param("logits", torch.tensor([0.4, -0.7]))))

    logits = torch.tensor([0.4, -0.7], requires_grad=True)
    q = dist.Bernoulli(logits=logits)
    y = torch.tensor([[0.0], [1.0]])
    log_lik = dist.Normal(2 * y - 1, 0.8).log_prob(x)
    exact = (torch.stack([1 - q.probs, q.probs]) * log_lik).sum() - kl_divergence(
        q, dist.Bernoulli(0.3)
    ).sum()
    (-exact).backward()
    elbo = AnalyticELBO(num_particles=500, vectorize_particles=True)
    grads = torch.stack([run(elbo, model, guide, x, seed=seed)[1]["logits"] for seed in range(40)])
    assert elbo.analytic_sites == ("y",)
    error = grads.std(0) / 40**0.5
    assert ((grads.mean(0) - logits.grad).abs() < 5 * error).all()


def test_contract_of_the_three_losses():
    pair = Mixture()
    elbo = AnalyticELBO(num_particles=3)
    elbo.loss(pair.model, pair.guide, X)  # finds the plate nesting
    values = []
    for method in (elbo.loss, elbo.loss_and_grads, elbo.differentiable_loss):
        pyro.set_rng_seed(1)
        values.append(torch_item(method(pair.model, pair.guide, X)))
        assert elbo.kl - elbo.reconstruction == pytest.approx(values[-1], rel=1e-12)
    assert values == pytest.approx([values[0]] * 3, rel=1e-13)
    assert isinstance(elbo.loss_and_grads(pair.model, pair.guide, X), float)
    with torch.no_grad():
        assert not elbo.differentiable_loss(pair.model, pair.guide, X).requires_grad
    with torch.inference_mode():
        assert math.isfinite(elbo.differentiable_loss(pair.model, pair.guide, X))


def test_svi_and_elbo_module_train():
    pair = Mixture()
    svi = SVI(pair.model, pair.guide, Adam({"lr": 0.05}), AnalyticELBO())
    before = svi.evaluate_loss(X)
    for _ in range(60):
        assert isinstance(svi.step(X), float)
    assert svi.evaluate_loss(X) < before

    pair = Mixture()
    loss = AnalyticELBO()(pair.model, pair.guide)
    optimiser = torch.optim.Adam(pair.parameters(), lr=0.05)
    for _ in range(60):
        optimiser.zero_grad()
        value = loss(X)
        value.backward()
        optimiser.step()
    assert value.item() < before


def test_one_instance_serves_pairs_of_different_nesting():
    pair, chain = Mixture(), Chain()

    def nested_model():
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    elbo = AnalyticELBO(num_particles=2, vectorize_particles=True)
    for model, guide, args in (
        (pair.model, pair.guide, (X,)),
        (nested_model, nested_model, ()),
        (chain.model, chain.guide, (X,)),
    ):
        assert math.isfinite(elbo.loss(model, guide, *args))


def test_trial_run_leaves_the_random_state():
    pair = Mixture()
    pyro.set_rng_seed(5)
    first = AnalyticELBO().loss(pair.model, pair.guide, X)
    pyro.set_rng_seed(5)
    assert first == AnalyticELBO(max_plate_nesting=1).loss(pair.model, pair.guide, X)


@pytest.mark.parametrize("bad", [0, -1, 2.5, None])
def test_bad_number_of_particles(bad):
    with pytest.raises(InvalidData, match="positive integer"):
        AnalyticELBO(num_particles=bad)
