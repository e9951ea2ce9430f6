"""Soft actor-critic as printed (S4 2.5) and as it must be, by enumeration and quadrature, with the agent's
own functions."""

import itertools

import pytest
import torch
from exact import F64, close
from test_soft_policy_iteration import ALPHA, evaluate, problem, soft_value
from torch.distributions import Normal
from torch.func import grad

from zoo import sac
from zoo.ppo import Categorical

# --- 10: with a value network -------------------------------------------------------------------------------


def test_10_alpha_belongs_before_every_log_probability():
    """Without it (2.20) and (2.22) evaluate (2.19) for alpha = 1, or for rewards divided by alpha."""
    mdp, logits, _ = problem(20)
    q, log_pi, entropy = evaluate(mdp, logits), logits.log_softmax(-1), Categorical(logits).entropy()
    printed = (log_pi.exp() * (q - log_pi)).sum(-1)
    close(soft_value(q, logits), (log_pi.exp() * q).sum(-1) + ALPHA * entropy)
    close(printed - soft_value(q, logits), (1 - ALPHA) * entropy)
    assert ((1 - ALPHA) * entropy).max() > 0.4
    # rewards / alpha and no alpha: everything is 1 / alpha of what it was
    scaled = q / ALPHA
    backed_up = mdp.reward / ALPHA + mdp.gamma[:, None, None] * torch.einsum(
        "msat,mt->msa", mdp.transition, (log_pi.exp() * (scaled - log_pi)).sum(-1)
    )
    close(backed_up, scaled)


def test_10_a_termination_ends_the_future():
    """(2.22) bootstraps everywhere: with reward 1 a step and an end at the third, it believes in 1 / (1 -
    gamma)."""
    gamma, terminated = 0.9, torch.tensor([False, False, True])
    ours, printed = torch.zeros(3, dtype=F64), torch.zeros(3, dtype=F64)
    for _ in range(1000):
        ours = sac.soft_target(torch.ones(3, dtype=F64), terminated, ours.roll(-1), gamma)
        printed = sac.soft_target(
            torch.ones(3, dtype=F64), torch.zeros(3, dtype=torch.bool), printed.roll(-1), gamma
        )
    close(ours, torch.tensor([1 + gamma + gamma**2, 1 + gamma, 1.0], dtype=F64))
    close(printed, torch.full((3,), 10.0, dtype=F64))


NODES = torch.linspace(-9, 9, 20_001, dtype=F64)
WEIGHTS = Normal(0.0, 1.0).log_prob(NODES).exp() * (NODES[1] - NODES[0])  # sum to 1 within 1e-15
MEAN_AND_LOG_STD = torch.tensor([0.4, -0.6], dtype=F64)


def critics(action):
    """Two Qs (2, B) of one-dimensional actions (B, 1); the first is the lower one."""
    q = -((action - 0.8) ** 2)
    return torch.stack((q, q + 0.3)).squeeze(-1)


def objective(policy):
    """J_pi of (2.23) without its constant, as an integral over actions: the density is written down, nothing
    is sampled."""
    u = MEAN_AND_LOG_STD[0].item() + NODES  # any grid of u = artanh(a) would do
    density = Normal(policy[0], policy[1].exp()).log_prob(u).exp() / (1 - u.tanh() ** 2)
    action, volume = u.tanh(), (1 - u.tanh() ** 2) * (NODES[1] - NODES[0])
    inside = density > 0
    inner = ALPHA * density[inside].log() - critics(action[:, None]).min(0).values[inside]
    return (density[inside] * inner * volume[inside]).sum()


def reparametrised(policy, detach=False, correct=True):
    """(2.24) by quadrature over the noise, with the agent's sample and loss; `detach`: the action as
    .sample() gives it."""
    dist = sac.SquashedGaussian(policy[0].expand(len(NODES), 1), policy[1].expand(len(NODES), 1))
    action, log_prob = dist.sample(NODES[:, None])
    u = policy[0] + policy[1].exp() * NODES
    if detach:
        action, u = action.detach(), u.detach()
        log_prob = Normal(policy[0], policy[1].exp()).log_prob(u) - torch.log(1 - u.tanh() ** 2)
    if not correct:
        log_prob = Normal(policy[0], policy[1].exp()).log_prob(u)
    alpha = torch.tensor(ALPHA, dtype=F64)
    return sum_of_losses(critics(action), log_prob, alpha)


def sum_of_losses(q, log_prob, alpha):
    """sum_i w_i J_pi(sample i): actor_loss averages, so that it is given each sample times n w_i."""
    scale = len(WEIGHTS) * WEIGHTS
    return sac.actor_loss(q * scale, log_prob * scale, alpha)


def test_10_the_reparametrised_gradient_is_that_of_the_objective():
    close(reparametrised(MEAN_AND_LOG_STD), objective(MEAN_AND_LOG_STD), 1e-6)
    close(grad(reparametrised)(MEAN_AND_LOG_STD), grad(objective)(MEAN_AND_LOG_STD), 1e-6)


def test_10_sample_does_not_reparametrise():
    """Listing 2.1's .sample() cuts the action off from the policy: what is left has nothing to do with Q."""
    truth, printed = (
        grad(f)(MEAN_AND_LOG_STD) for f in (objective, lambda p: reparametrised(p, detach=True))
    )
    assert (truth - printed).norm() > 0.5 * truth.norm()
    close(printed, torch.zeros(2, dtype=F64), 1e-6)  # alpha E[grad log pi], the score's expectation


def test_10_a_squashed_density_needs_the_tanh_correction():
    """Listing 2.1's Gaussian takes u for the action: as a density over (-1, 1) it is none, and its gradient
    is another."""
    u = MEAN_AND_LOG_STD[0] + 2 * NODES
    gaussian = Normal(*MEAN_AND_LOG_STD[0:1], MEAN_AND_LOG_STD[1].exp()).log_prob(u)
    squashed = gaussian - torch.log(1 - u.tanh() ** 2)
    volume = (1 - u.tanh() ** 2) * 2 * (NODES[1] - NODES[0])
    inside = volume > 0
    assert (squashed.exp() * volume)[inside].sum().item() == pytest.approx(1, abs=1e-6)
    assert (gaussian.exp() * volume)[inside].sum() < 0.8
    truth, printed = (
        grad(f)(MEAN_AND_LOG_STD) for f in (objective, lambda p: reparametrised(p, correct=False))
    )
    assert (truth - printed).norm() > 0.3 * truth.norm()


def test_10_the_lesser_of_two_critics_counters_overestimation():
    """Three actions worth 0 and critics wrong by +-1: the best-looking action of one critic looks good, not
    of both."""
    single, double = [], []
    for errors in itertools.product((-1.0, 1.0), repeat=6):
        q = torch.tensor(errors).reshape(2, 3)
        chosen = int(q[0].argmax())
        single.append(q[0, chosen].item())
        double.append(sac.soft_value(q[:, [chosen]], torch.zeros(1), torch.tensor(0.0)).item())
    assert sum(single) / 64 == 0.75  # all three are -1 with probability 1 / 8
    assert abs(sum(double) / 64) < 0.2


# --- 11: temperature ----------------------------------------------------------------------------------------


def test_11_the_temperatures_loss_ends_at_the_target_entropy():
    """With pi = softmax(Q / alpha), the best policy for each alpha."""
    q, target = torch.tensor([1.0, 0.3, -0.5, 0.0], dtype=F64), 0.9
    for start in (-2.0, 1.0):
        log_alpha = torch.tensor(start, dtype=F64)
        for _ in range(200):
            entropy = Categorical(q / log_alpha.exp()).entropy()
            slope = grad(sac.alpha_loss)(log_alpha, -entropy, target)
            assert slope.sign() == (entropy - target).sign()  # too much entropy: alpha falls
            log_alpha = log_alpha - slope
        close(entropy, torch.tensor(target, dtype=F64), 1e-6)
