"""Preferences and denoising chains: items 54 and 55."""

import torch
from exact import F64, close, normal_nodes
from torch.func import grad, vmap
from torch.nn.functional import logsigmoid

from zoo.common.diffusion import Schedule, cosine_schedule
from zoo.diffusion_dpo import (
    Side,
    d3po_loss,
    notes35_loss,
    standard_loss,
    step_kl,
    step_log_prob,
    step_mean,
    trajectory_loss,
    vlb_weights,
)

STEPS, BETA = 4, 0.7
SCHEDULE = Schedule(*(x.double() for x in cosine_schedule(STEPS)))


def denoiser(theta, x, t):
    """A denoiser's eps (B, 1), linear in x: theta (2 T,) slopes and shifts by step; x (B, 1), t (B,)."""
    return theta[t - 1, None] * x + theta[STEPS + t - 1, None]


THETA = torch.tensor([0.2, 0.5, 0.7, 0.9, 0.1, -0.2, 0.3, 0.0], dtype=F64)
REF = torch.tensor([0.3, 0.4, 0.8, 0.9, 0.0, 0.1, -0.1, 0.2], dtype=F64)


def side(theta, x0, t, eps):
    """A noised sample's step from t, as the agent's standard loss sees it; x0, eps (B, 1), t (B,)."""
    x = SCHEDULE.signal[t, None] * x0 + SCHEDULE.noise[t, None] * eps
    means = (step_mean(denoiser(p, x, t), x, t, SCHEDULE, "eps") for p in (theta, REF))
    return Side(step_mean(eps, x, t, SCHEDULE, "eps"), *means, SCHEDULE.sigma[t])


def test_54_the_weighted_error_is_the_log_ratio_of_a_step():
    """S0 (33): -w_t (|eps - eps_theta|^2 - |eps - eps_ref|^2) is log pi / pi_ref at the posterior's mean."""
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, STEPS, 1, generator=g, dtype=F64)
    t = torch.arange(1, STEPS + 1)
    x = SCHEDULE.signal[t, None] * x0 + SCHEDULE.noise[t, None] * eps
    own, ref = (((eps - denoiser(p, x, t)) ** 2).sum(-1) for p in (THETA, REF))
    close(-vlb_weights(SCHEDULE)[t] * (own - ref), side(THETA, x0, t, eps).log_ratio())


def test_54_its_sum_is_the_mean_log_ratio_of_chains_through_x0():
    """E_q[sum_t log pi / pi_ref (x_{t-1} | x_t)] over q(x_1 .. x_T | x_0) is what (33) samples, T times at a
    random t.

    A step's x_{t-1} is averaged around the posterior's mean, which changes no log-ratio of equal sigmas.
    """
    nodes, weight = normal_nodes(2, 8)
    x0 = torch.full((len(nodes), 1), 0.8, dtype=F64)
    chains, sampled = 0.0, 0.0
    for t in range(1, STEPS + 1):
        steps = torch.full((len(nodes),), t)
        seen = side(THETA, x0, steps, nodes[:, :1])
        x_next = seen.x_next + 0.3 * nodes[:, 1:]  # whatever the posterior's spread
        log_ratio = step_log_prob(x_next, seen.mean, seen.sigma) - step_log_prob(
            x_next, seen.ref_mean, seen.sigma
        )
        chains += weight @ log_ratio
        sampled += weight @ seen.log_ratio()
    close(chains, sampled)


def test_54_33_bounds_the_loss_of_that_mean():
    """-log sigmoid is convex: with t and the noise drawn outside of it the loss is larger (Jensen), never
    less.
    """
    nodes, weight = normal_nodes(1, 20)
    outside, inside = 0.0, 0.0
    for t in range(1, STEPS + 1):
        steps = torch.full((len(nodes),), t)
        sides = [side(THETA, torch.full((len(nodes), 1), x0, dtype=F64), steps, nodes) for x0 in (0.8, -0.5)]
        margin = standard_loss(*sides, torch.ones(len(nodes), dtype=F64), BETA, STEPS)[1]
        outside += -weight @ logsigmoid(margin) / STEPS
        inside += weight @ margin / STEPS
    assert outside > -logsigmoid(inside) + 0.01


def test_54_shared_noise_takes_variance_off_the_margin():
    """The same noise on both samples of a pair keeps the margin's mean and lowers its variance, hence
    Jensen's gap.
    """
    nodes, weight = normal_nodes(2, 12)
    moments = []
    for shared in (True, False):
        first, second = 0.0, 0.0
        for t in range(1, STEPS + 1):
            steps = torch.full((len(nodes),), t)
            eps = (nodes[:, :1], nodes[:, :1] if shared else nodes[:, 1:])
            x0 = (torch.full((len(nodes), 1), x, dtype=F64) for x in (0.8, 0.5))
            sides = [side(THETA, x, steps, e) for x, e in zip(x0, eps, strict=True)]
            margin = standard_loss(*sides, torch.ones(len(nodes), dtype=F64), BETA, STEPS)[1]
            first, second = first + weight @ margin / STEPS, second + weight @ margin**2 / STEPS
        moments.append((first, second - first**2))
    close(moments[0][0], moments[1][0])
    assert moments[0][1] < 0.7 * moments[1][1]


def test_54_whole_chains_are_dpo():
    """With every step's log-ratio the loss is DPO's (72) of the chain, whose likelihood is the product of its
    steps'.
    """
    g = torch.Generator().manual_seed(0)
    winner, loser = torch.randn(2, 6, STEPS, generator=g, dtype=F64)
    loss, margin = trajectory_loss(winner, loser, BETA)
    close(margin, BETA * (winner.sum(1) - loser.sum(1)))
    close(loss, -logsigmoid(margin).mean())
    close(
        d3po_loss(winner[:, 0], loser[:, 0], BETA, 1)[0],
        trajectory_loss(winner[:, :1], loser[:, :1], BETA)[0],
    )


# --- 55: one step, a Gaussian of mean mu, the reference's 0; x^w and x^l are drawn from it ------------------

NODES, CHANCE = normal_nodes(2, 30)
FIRST, SECOND = NODES[:, :1], NODES[:, 1:]
PREFERRED = (2 * (FIRST - SECOND)).sigmoid().squeeze(-1)  # Bradley-Terry, of the reward 2 x


def drift(name):
    """The expected gradient of a loss by mu; every pair once as it is and once the other way round."""

    def loss(mu, winner, loser):
        own, ref, sigma = mu.view(1, 1), torch.zeros(1, 1, dtype=F64), torch.ones(1, dtype=F64)
        sides = [Side(x[None], own, ref, sigma) for x in (winner, loser)]
        if name == "notes35":
            return notes35_loss(*sides, 1.0)[0]
        return trajectory_loss(*(side.log_ratio()[:, None] for side in sides), 1.0)[0]

    rows = vmap(grad(loss), in_dims=(None, 0, 0))
    return lambda mu: (
        (CHANCE * PREFERRED) @ rows(mu, FIRST, SECOND) + (CHANCE * (1 - PREFERRED)) @ rows(mu, SECOND, FIRST)
    )


def descend(name, steps=400, rate=0.3):
    mu, step = torch.zeros((), dtype=F64), drift(name)
    for _ in range(steps):
        mu = mu - rate * step(mu)
    return mu


def test_55_the_implicit_reward_ignores_what_was_preferred():
    """S0 (35): R is |mu - mu_ref|^2 whatever x_{t-1} is, so that in one step R_w = R_l and the weight is
    always 1/2.
    """
    g = torch.Generator().manual_seed(0)
    winner, loser = torch.randn(2, 9, 2, generator=g, dtype=F64)
    mean, ref, sigma = (
        torch.full((9, 2), 1.3, dtype=F64),
        torch.zeros(9, 2, dtype=F64),
        torch.ones(9, dtype=F64),
    )
    sides = [Side(x, mean, ref, sigma) for x in (winner, loser)]
    loss, margin = notes35_loss(*sides, BETA)
    close(margin, torch.zeros(9, dtype=F64))
    pull = step_kl(winner, mean, sigma) - step_kl(loser, mean, sigma)
    close(loss, BETA * 0.5 * pull.mean())


def test_55_it_drifts_for_ever_where_dpo_stops():
    """E17: with rewards 2 x and beta 1 the best mean is 2: DPO ends there, (35) moves on at one speed."""
    close(descend("dpo"), torch.tensor(2.0, dtype=F64), rtol=1e-3)
    step = drift("notes35")
    speeds = torch.stack([step(torch.tensor(mu, dtype=F64)) for mu in (0.0, 2.0, 20.0, 200.0)])
    close(speeds, speeds[:1].expand(4))
    assert descend("notes35") > 20


def test_55_without_the_stop_on_both_terms_nothing_is_learned_from_the_loser():
    """S0 (35) must have the stopped weight before both squares: before the winner's alone, the loser's is
    unbounded.
    """
    mean = torch.linspace(-50, 50, 5, dtype=F64)
    sigma, winner, loser = (
        torch.ones((), dtype=F64),
        torch.tensor(1.0, dtype=F64),
        torch.tensor(-1.0, dtype=F64),
    )
    both = 0.5 * (-((winner - mean) ** 2) + (loser - mean) ** 2) / (2 * sigma**2)
    one = (-0.5 * (winner - mean) ** 2 + (loser - mean) ** 2) / (2 * sigma**2)
    assert both.abs().max() <= 50 + 1e-9 and one.max() > 600
