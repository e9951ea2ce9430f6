"""Sigmoids, Gumbel noise and the Bradley-Terry model: item 33."""

from types import SimpleNamespace

import pytest
import torch
from exact import F64, close
from torch.func import grad
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from zoo import ppo

Z = torch.linspace(-8, 8, 401, dtype=F64)


def test_33_facts_of_the_sigmoid():
    """S3 Proposition 10.5, (40): s in (0, 1), s(-z) = 1 - s(z), s' = s (1 - s), its inverse is the logit, and
    a softmax of two is the sigmoid of their difference.
    """
    s = Z.sigmoid()
    assert (s > 0).all() and (s < 1).all()
    close(s, Z.exp() / (1 + Z.exp()))
    close((-Z).sigmoid(), 1 - s)
    close(grad(lambda z: z.sigmoid().sum())(Z), s * (1 - s))
    close((s / (1 - s)).log(), Z, atol=1e-9)
    pairs = torch.stack((Z, torch.full_like(Z, 1.3)), 1)
    close(ppo.Categorical(pairs).log_prob(torch.zeros(401, dtype=torch.int64)).exp(), (Z - 1.3).sigmoid())


@pytest.mark.parametrize("rewards", [(0.7, -0.4), (0.0, 0.0), (-2.0, 1.0)])
def test_33_gumbel_noise_makes_bradley_terry(rewards):
    """S3 Theorem 10.6, (41)-(43): P(r1 + e1 > r2 + e2) = sigmoid(r1 - r2) for Gumbel e, by the zoo's
    Gumbel-max sampling on all pairs of 1,500 quantiles (an error below one quantile's width).
    """
    n = 1500
    quantiles = -(-((torch.arange(n, dtype=F64) + 0.5) / n).log()).log()  # the inverse of exp(-exp(-x))
    noise = torch.cartesian_prod(quantiles, quantiles)
    choice = ppo.Categorical(torch.tensor([rewards], dtype=F64)).sample(noise)
    found = (choice == 0).double().mean().item()
    assert found == pytest.approx(torch.tensor(rewards[0] - rewards[1]).sigmoid().item(), abs=1 / n)
    if rewards[0] != rewards[1]:  # normal noise of the same variance makes another model
        normal = torch.distributions.Normal(0.0, torch.pi / 6**0.5).icdf(
            (torch.arange(n, dtype=F64) + 0.5) / n
        )
        other = ppo.Categorical(torch.tensor([rewards], dtype=F64)).sample(
            torch.cartesian_prod(normal, normal)
        )
        assert abs((other == 0).double().mean().item() - found) > 2 / n


def test_33_gumbel_noise_makes_the_softmax():
    """S3 Theorem 10.6 among three: argmax(r + e) is drawn by softmax(r), which is how the zoo acts; on all
    triples of 120 quantiles. Noise of the other sign would make the same pairs, but not these.
    """
    n, logits = 120, torch.tensor([[1.0, 0.0, -1.0]], dtype=F64)
    quantiles = -(-((torch.arange(n, dtype=F64) + 0.5) / n).log()).log()
    noise = torch.cartesian_prod(quantiles, quantiles, quantiles)
    for sign, right in ((1, True), (-1, False)):
        share = torch.stack(
            [(ppo.Categorical(logits).sample(sign * noise) == i).double().mean() for i in range(3)]
        )
        assert ((share - logits[0].softmax(0)).abs().max() < 1 / n) == right


def test_33_the_zoos_noise_is_gumbel():
    """S3 Theorem 10.6: a million draws of the zoo's own noise against F(x) = exp(-exp(-x)) at nine points,
    each within 4.5 standard errors (false alarms: 9 x 7e-6).
    """
    n, generator = 1_000_000, torch.Generator().manual_seed(0)
    drawn = ppo.draw_noise(SimpleNamespace(action_dim=1, discrete=True), n, generator=generator)
    for f in torch.linspace(0.1, 0.9, 9, dtype=F64):
        found = (drawn < -(-f.log()).log()).double().mean().item()
        assert abs(found - f) < 4.5 * (f * (1 - f) / n).sqrt()


def test_33_the_loss_is_a_binary_cross_entropy():
    """S3 (44)-(48): -log sigmoid(dr) = BCE(1, sigmoid(dr)); log 2 at dr = 0, to 0 and to infinity on its
    sides."""
    loss = -logsigmoid(Z)
    close(loss, binary_cross_entropy_with_logits(Z, torch.ones_like(Z), reduction="none"))
    close(loss, -Z.sigmoid().log(), atol=1e-9)
    close(-logsigmoid(torch.zeros(1, dtype=F64)), torch.tensor([2.0], dtype=F64).log())
    assert (loss.diff() < 0).all() and loss[-1] < 1e-3 and loss[0] > 7.9


def test_33_the_reward_models_gradient():
    """S3 (49): grad L = -(1 - sigmoid(dr)) (grad r(chosen) - grad r(rejected)), for a small network."""
    g = torch.Generator().manual_seed(0)
    w1, w2 = torch.randn(6, 4, generator=g, dtype=F64), torch.randn(4, generator=g, dtype=F64)
    chosen, rejected = torch.randn(2, 6, generator=g, dtype=F64)

    def reward(w, x):
        return (x @ w).tanh() @ w2

    found = grad(lambda w: -logsigmoid(reward(w, chosen) - reward(w, rejected)))(w1)
    wrong = 1 - (reward(w1, chosen) - reward(w1, rejected)).sigmoid()
    close(found, -wrong * (grad(reward)(w1, chosen) - grad(reward)(w1, rejected)))
    assert 0.1 < wrong < 0.9
