"""A denoising chain as an MDP and its KL to a reference: items 47-53 and 56.

The chain is linear: x_3 ~ N(0, 1), mu_t(x) = slope_t x + shift_t. Its moments, objective and gradient have
closed forms, and the agents' estimates are polynomials in the chain's normal noises, so that quadrature gives
their expectations exactly.
"""

import pytest
import torch
from exact import F64, close, cosine, error, normal_nodes
from torch.distributions import Normal
from torch.func import grad, vmap

from zoo.common.diffusion import cosine_schedule
from zoo.ddpo import (
    Args,
    Denoising,
    chain_advantages,
    ddpo_loss,
    sample_chain,
    split,
    step_kl,
    step_log_prob,
    step_mean,
)

STEPS = 3
SIGMA = torch.tensor([1.0, 0.6, 0.8, 0.9], dtype=F64)
THETA = torch.tensor([0.9, 0.4, 1.2, 0.3, -0.5, 0.2], dtype=F64)  # slopes of the steps 1 .. 3, then shifts
REF = torch.tensor([0.7, 0.6, 0.8, 0.0, 0.1, -0.2], dtype=F64)
BETA = 0.6
NOISE, CHANCE = normal_nodes(STEPS + 1, 6)  # (N, 4) noises of x_0 .. x_3, and their weights (N,)
COUNT = len(NOISE)


def linear(theta, x, t, context):
    """mu (B, 1) of the step from t; x (B, 1), t (B,)."""
    return theta[t - 1, None] * x + theta[STEPS + t - 1, None]


def reward(x0):
    """r = x_0 - x_0^2 / 4 (B,), of x0 (B, 1)."""
    return (x0 - x0**2 / 4).squeeze(-1)


def moments(theta):
    """Mean and variance of x_0 .. x_3, lists by t."""
    mean, variance = [torch.zeros((), dtype=F64)], [torch.ones((), dtype=F64)]
    for t in range(STEPS, 0, -1):
        mean.insert(0, theta[t - 1] * mean[0] + theta[STEPS + t - 1])
        variance.insert(0, theta[t - 1] ** 2 * variance[0] + SIGMA[t] ** 2)
    return mean, variance


def expected_reward(theta):
    mean, variance = moments(theta)
    return mean[0] - (mean[0] ** 2 + variance[0]) / 4


def expected_kl(theta, states=None):
    """sum_t E[KL_t(x_t)], S0 (28); the states' distribution is that of the parameters `states`, of theta if
    not given.
    """
    mean, variance = moments(theta if states is None else states)
    slope, shift = (theta - REF)[:STEPS], (theta - REF)[STEPS:]
    steps = [
        ((slope[t - 1] * mean[t] + shift[t - 1]) ** 2 + slope[t - 1] ** 2 * variance[t]) / (2 * SIGMA[t] ** 2)
        for t in range(1, STEPS + 1)
    ]
    return torch.stack(steps).sum()


def objective(theta, beta=BETA):
    """S0 (27), the KL summed over the steps."""
    return expected_reward(theta) - beta * expected_kl(theta)


def chains(theta):
    """The chains of all noises: states (T + 1, N, 1), means (T, N, 1), contexts (N,)."""
    context = torch.zeros(COUNT, dtype=torch.int64)
    states, means = sample_chain(linear, theta, NOISE.T.unsqueeze(-1), context, SIGMA)
    return states, means, context


def batch_of(theta, place, reduce="sum"):
    """Every step of every chain of theta, as the agent lays them out, (T * N, ...) each; their weights."""
    states, means, context = chains(theta)
    t = torch.arange(1, STEPS + 1)[:, None].expand(-1, COUNT)
    ref_means = torch.stack([linear(REF, states[i], t[i - 1], context) for i in range(1, STEPS + 1)])
    std = SIGMA[t]
    log_prob, ref_log_prob = (step_log_prob(states[:-1], m, std) for m in (means, ref_means))
    kl = step_kl(means, ref_means, std)
    advantage = chain_advantages(reward(states[0]), kl, log_prob - ref_log_prob, context, place, BETA)
    advantage = advantage * (COUNT - 1) / COUNT  # what is for samples of equal weight
    batch = Denoising(states[1:], states[:-1], t, context.expand_as(t), log_prob, ref_means, advantage)
    return Denoising(*(x.flatten(0, 1) for x in batch)), CHANCE.repeat(STEPS)


def mean_step(theta, place, method="score", clip=None, sampler=None):
    """The agent's expected ascent direction (6,), a sum over the steps; chains of `sampler`, of theta if not
    given.
    """
    args = Args(method=method, kl=place, beta=BETA, clip=clip)
    batch, weight = batch_of(theta if sampler is None else sampler, place)

    def loss(theta, *row):
        return ddpo_loss(theta, Denoising(*(x[None] for x in row)), linear, SIGMA, args)[0]

    return -weight @ vmap(grad(loss), in_dims=(None, *[0] * len(batch)))(theta, *batch)


# --- 47, 48: a step and pretraining -------------------------------------------------------------------------


def test_47_a_step_and_its_log_probability():
    """S0 (16)-(19): x = mu + sigma eps has the log-density of a Gaussian in d dimensions."""
    g = torch.Generator().manual_seed(0)
    mean, eps = torch.randn(2, 7, 3, generator=g, dtype=F64)
    sigma = 0.1 + torch.rand(7, generator=g, dtype=F64)
    x = mean + sigma[:, None] * eps
    close(step_log_prob(x, mean, sigma), Normal(mean, sigma[:, None]).log_prob(x).sum(-1))


def test_47_its_gradient_is_that_of_the_squared_distance():
    """S0 (20): grad log pi = -grad |x - mu|^2 / 2 sigma^2 = (x - mu) / sigma^2."""
    x, mean = torch.tensor([[0.3, -1.2]], dtype=F64), torch.tensor([[0.1, 0.4]], dtype=F64)
    sigma = torch.tensor([0.7], dtype=F64)
    close(grad(lambda m: step_log_prob(x, m, sigma).sum())(mean), (x - mean) / 0.7**2)


def posterior(x0, x, t, schedule):
    """Mean and standard deviation of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7)."""
    alpha = (schedule.signal[t] / schedule.signal[t - 1]) ** 2
    rest, before = schedule.noise[t] ** 2, schedule.noise[t - 1] ** 2
    mean = (schedule.signal[t - 1] * (1 - alpha) * x0 + alpha.sqrt() * before * x) / rest
    return mean, (before / rest * (1 - alpha)).sqrt()


def double_schedule(steps=8):
    return type(cosine_schedule(2))(*(x.double() for x in cosine_schedule(steps, min_sigma=1e-3)))


def test_48_the_mean_of_a_perfect_denoiser_is_the_posteriors():
    """The agent's mu of the true eps is the mu~ of S0 (25), with eta = 1."""
    schedule, g = double_schedule(), torch.Generator().manual_seed(0)
    for t in range(2, 9):
        x0, eps = torch.randn(2, 5, 3, generator=g, dtype=F64)
        x = schedule.signal[t] * x0 + schedule.noise[t] * eps
        mean, std = posterior(x0, x, t, schedule)
        # float32 schedule
        close(step_mean(eps, x, torch.full((5,), t), schedule, "eps"), mean, rtol=1e-5, atol=1e-6)
        close(schedule.sigma[t], std, rtol=1e-5)


def test_48_the_log_probability_of_data_is_the_pretraining_loss():
    """S0 (25): over x_{t-1} ~ q(. | x_t, x_0), -log pi has the mean |mu~ - mu|^2 / 2 sigma^2 + a constant."""
    nodes, weight = normal_nodes(2, 6)
    sigma = torch.tensor(0.4, dtype=F64)
    target = torch.tensor([0.2, -0.3], dtype=F64)

    def loss(mean):
        return -weight @ step_log_prob(
            target + sigma * nodes, mean.expand(len(nodes), 2), sigma.expand(len(nodes))
        )

    def printed(mean):
        return ((target - mean) ** 2).sum() / (2 * sigma**2)

    one, other = torch.tensor([[0.0, 0.0], [1.5, -0.7]], dtype=F64)
    close(loss(one) - loss(other), printed(one) - printed(other))
    close(grad(loss)(one), grad(printed)(one))


def test_48_it_is_a_weighted_error_of_eps():
    """|mu~ - mu|^2 / 2 sigma^2 = w_t |eps - eps_theta|^2: the usual loss is (25) but for the weights of the
    steps.
    """
    schedule, g = double_schedule(), torch.Generator().manual_seed(0)
    weights = []
    for t in range(2, 9):
        x0, eps, wrong = torch.randn(3, 5, 3, generator=g, dtype=F64)
        x, steps = schedule.signal[t] * x0 + schedule.noise[t] * eps, torch.full((5,), t)
        means = (step_mean(e, x, steps, schedule, "eps") for e in (eps, wrong))
        ratio = step_kl(*means, schedule.sigma[steps]) / ((eps - wrong) ** 2).sum(-1)
        close(ratio, ratio[:1].expand(5))
        weights.append(ratio[0])
    assert max(weights) > 3 * min(weights)


# --- 49, 50: policy gradients -------------------------------------------------------------------------------


def test_49_the_score_function_is_the_gradient():
    """S0 (21)-(24): E[r sum_t grad log pi(x_{t-1} | x_t)] = grad E[r]."""
    close(mean_step(THETA, "none"), grad(expected_reward)(THETA))


def test_49_the_mean_over_steps_is_a_fraction_of_it():
    """S0 (22), t ~ U(0, T): the expectation over t is the gradient divided by the number of steps."""
    batch, weight = batch_of(THETA, "none")
    args = Args(kl="none")
    weighted = batch._replace(advantage=batch.advantage * weight * COUNT)
    found = -grad(lambda theta: ddpo_loss(theta, weighted, linear, SIGMA, args)[0])(THETA)
    close(STEPS * found, grad(expected_reward)(THETA))


def test_50_importance_sampling_starts_at_the_same_gradient():
    """S0 (26): at theta_old, clipped or not."""
    for clip in (None, 0.2):
        close(mean_step(THETA, "none", "is", clip), grad(expected_reward)(THETA))


def test_50_away_from_the_old_policy_one_ratio_a_step_is_biased():
    """S0 (26) has the old policy's x_t and one ratio; the ratios of the steps before are missing."""
    errors = []
    for distance in (0.01, 0.1):
        theta = THETA + distance * torch.tensor([1.0, -1, 1, 1, 1, -1], dtype=F64)
        batch, _ = batch_of(THETA, "none")
        mean = linear(theta, batch.x, batch.t, None)
        log_ratio = (step_log_prob(batch.x_next, mean, SIGMA[batch.t]) - batch.log_prob).view(STEPS, COUNT)
        before = log_ratio.flip(0).cumsum(0).flip(0) - log_ratio  # of the steps T .. t + 1
        found = mean_step(theta, "none", "is", sampler=THETA)
        errors.append(error(found, grad(expected_reward)(theta)))
        assert before.abs().max() > 0
    assert 0.001 < errors[0] < 0.05 and errors[1] > 5 * errors[0]


# --- 51: what the network says, and how squares are reduced -------------------------------------------------


def test_51_eps_v_and_score_are_one_denoiser():
    """S0 4.5: mu is the same whichever the network says: eps, the rectified flow's v = eps - x_0, or the
    score.
    """
    schedule, g = double_schedule(), torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 7, 3, generator=g, dtype=F64)
    t = torch.arange(2, 9)
    signal, noise = schedule.signal[t, None], schedule.noise[t, None]
    x = signal * x0 + noise * eps
    outputs = {"eps": eps, "v": eps - x0, "score": -eps / noise}
    for predict, output in outputs.items():
        for found, expected in zip(split(output, x, signal, noise, predict), (x0, eps), strict=True):
            close(found, expected, rtol=1e-5, atol=1e-6)
        close(
            step_mean(output, x, t, schedule, predict),
            step_mean(eps, x, t, schedule, "eps"),
            rtol=1e-5,
            atol=1e-6,
        )


def many_dimensions(reduce, method, clip=None, dim=8):
    """A loss's gradient by mu (6, dim), where the policy has moved from 0; half of the advantages are
    negative.
    """
    g = torch.Generator().manual_seed(1)
    x, sigma = torch.randn(6, dim, generator=g, dtype=F64), torch.ones(6, dtype=F64)
    old, mean = torch.zeros(6, dim, dtype=F64), 0.15 * torch.randn(6, dim, generator=g, dtype=F64)
    t = torch.ones(6, dtype=torch.int64)
    advantage = torch.tensor([1.0, -1, 2, -2, 0.5, -0.5], dtype=F64)
    batch = Denoising(x, x, t, t, step_log_prob(x, old, sigma, reduce), old, advantage)
    args = Args(method=method, kl="none", reduce=reduce, clip=clip)
    metrics = ddpo_loss(mean, batch, lambda mean, *_: mean, torch.ones(2, dtype=F64), args)[1]
    step = grad(lambda m: ddpo_loss(m, batch, lambda mean, *_: mean, torch.ones(2, dtype=F64), args)[0])(mean)
    return step.flatten(), metrics


def test_51_a_mean_over_dimensions_only_scales_the_score_function():
    """S0 4.5: the mean of squares in place of their sum changes the gradient's length, not its direction."""
    (total, _), (mean, _) = many_dimensions("sum", "score"), many_dimensions("mean", "score")
    close(8 * mean, total)


def test_51_but_it_takes_the_ratios_root_and_so_moves_the_clip():
    """E18: with the mean the ratio becomes its d-th root: where the sum clips, the mean does not, and
    directions part.
    """
    (total, clipped), (mean, unclipped) = (
        many_dimensions("sum", "is", 0.1),
        many_dimensions("mean", "is", 0.1),
    )
    assert clipped["clipfrac"] > 0.6 and unclipped["clipfrac"] < 0.2
    assert cosine(total, mean) < 0.95
    g = torch.Generator().manual_seed(2)
    x, one, other = torch.randn(3, 5, 4, generator=g, dtype=F64)
    sigma = torch.full((5,), 0.8, dtype=F64)
    ratios = [
        (step_log_prob(x, one, sigma, reduce) - step_log_prob(x, other, sigma, reduce)).exp()
        for reduce in ("sum", "mean")
    ]
    close(ratios[1], ratios[0] ** (1 / 4))


# --- 52, 53: the KL -----------------------------------------------------------------------------------------


def test_52_the_kl_of_chains_is_the_sum_over_steps():
    """S0 (27)(28): E[sum_t log pi / pi_ref] = sum_t E[|mu - mu_ref|^2] / 2 sigma_t^2, in closed form too."""
    states, means, context = chains(THETA)
    t = torch.arange(1, STEPS + 1)[:, None].expand(-1, COUNT)
    refs = torch.stack([linear(REF, states[i], t[i - 1], context) for i in range(1, STEPS + 1)])
    log_ratio = step_log_prob(states[:-1], means, SIGMA[t]) - step_log_prob(states[:-1], refs, SIGMA[t])
    close(log_ratio.sum(0) @ CHANCE, expected_kl(THETA))
    close(step_kl(means, refs, SIGMA[t]).sum(0) @ CHANCE, expected_kl(THETA))


def test_52_29_is_not_the_gradient_of_27():
    """E22: (29) differentiates each step's KL as if the x_t it is taken at did not depend on the steps
    before.
    """
    found = mean_step(THETA, "loss")
    close(found, grad(expected_reward)(THETA) - BETA * grad(expected_kl)(THETA, THETA))  # states held fixed
    assert error(found, grad(objective)(THETA)) > 0.09  # where the KL is a small part of it


def test_52_with_the_later_steps_kl_in_the_return_it_is():
    """E22: -beta sum_{s < t} KL_s added to step t's return makes (29) the gradient of (27)."""
    close(mean_step(THETA, "return"), grad(objective)(THETA))


def test_52_they_agree_where_no_step_has_another_after_it():
    """The last step's own parameters (t = 1) and a chain whose later steps equal the reference's."""
    last = torch.tensor([0, STEPS])
    close(mean_step(THETA, "loss")[last], grad(objective)(THETA)[last])
    theta = REF.clone()
    theta[[STEPS - 1, 2 * STEPS - 1]] += 0.4  # the first step that is taken
    close(mean_step(theta, "loss")[[STEPS - 1]], grad(objective)(theta)[[STEPS - 1]])


@pytest.mark.parametrize(("place", "lost"), [("return", (-1e-9, 1e-6)), ("loss", (0.003, 0.1))])
def test_52_where_they_lead(place, lost):
    """Ascent with exact expectations: with the returns it ends at the best J, with (29) short of it."""

    def ascend(step, count=100):
        theta = REF.clone()
        for _ in range(count):
            theta = theta + 0.3 * step(theta)
        return theta

    def biased(theta):  # what the tests above show the agent's --kl loss to be
        return grad(expected_reward)(theta) - BETA * grad(expected_kl)(theta, theta.detach())

    best = objective(ascend(grad(objective)))
    reached = objective(ascend(grad(objective) if place == "return" else biased))
    assert lost[0] <= best - reached <= lost[1], best - reached


def test_53_the_reward_called_wrong_has_the_same_expectation():
    """S0 (30): r - beta log pi / pi_ref as each step's reward has, on average, exactly (29)'s gradient."""
    close(mean_step(THETA, "log-ratio"), mean_step(THETA, "loss"))


def test_53_one_sample_refutes_no_expectation():
    """S0 (32): a sample between mu and mu_ref pushes away from mu_ref, and the mean over samples pulls
    towards it.
    """
    mean, ref, sigma, beta = (torch.tensor(x, dtype=F64) for x in (0.0, 2.0, 1.5, 0.7))
    nodes, weight = normal_nodes(1, 8)

    def pull(x):
        """The KL's part of the ascent direction of (30), by mu."""
        log_ratio = ((x - ref) ** 2 - (x - mean) ** 2) / (2 * sigma**2)
        return -beta * log_ratio * (x - mean) / sigma**2

    assert mean < 0.4 < ref and pull(torch.tensor(0.4, dtype=F64)) < 0
    close(weight @ pull(mean + sigma * nodes).squeeze(-1), -beta * (mean - ref) / sigma**2)  # S0 (64)


def test_53_32_lacks_a_factor_2():
    """S0 (32) as printed has half of the mean of (64), because the square's derivative lost its 2."""
    mean, ref, sigma, beta = (torch.tensor(x, dtype=F64) for x in (0.0, 2.0, 1.5, 0.7))
    nodes, weight = normal_nodes(1, 8)
    x = (mean + sigma * nodes).squeeze(-1)
    printed = beta / (4 * sigma**4) * ((x - ref) ** 2 - (x - mean) ** 2) * (mean - x)
    close(weight @ printed, -beta * (mean - ref) / sigma**2 / 2)


# --- 56: the KL in place of a pretraining loss --------------------------------------------------------------


def test_56_a_kl_and_a_pretraining_loss_have_different_optima():
    """S0 1: both hold the model near the reference, each best in its own direction of the KL, at equal
    reward.
    """
    ref = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=F64)
    paid = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=F64)

    def reached(penalty, target=1.2):
        """The best policy under reward - weight * penalty, with the weight that leaves it the target's
        reward.
        """
        low, high = 1e-3, 1e3
        for _ in range(60):
            weight = (low * high) ** 0.5
            policy = penalty(weight)
            low, high = (weight, high) if policy @ paid > target else (low, weight)
        return policy

    def kl(weight):
        return torch.softmax(ref.log() + paid / weight, 0)

    def pretraining(weight):
        """argmax pi r + weight E_ref[log pi]: pi = weight ref / (nu - r), with nu by bisection."""
        low, high = paid.max(), paid.max() + 2e3
        for _ in range(200):
            nu = (low + high) / 2
            low, high = (nu, high) if (weight * ref / (nu - paid)).sum() > 1 else (low, nu)
        return weight * ref / (nu - paid)

    def divergence(p, q):
        return (p * (p / q).log()).sum()

    one, other = reached(kl), reached(pretraining)
    close(torch.stack((one @ paid, other @ paid)), torch.full((2,), 1.2, dtype=F64), rtol=1e-6)
    assert divergence(one, ref) < divergence(other, ref) - 0.01
    assert divergence(ref, other) < divergence(ref, one) - 0.01
