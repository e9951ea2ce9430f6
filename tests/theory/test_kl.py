"""The KL divergence: its estimators as values, as losses, in the reward, off-policy; its exact gradients:
items 27 to 31."""

import itertools
from types import SimpleNamespace

import exact
import pytest
import torch
from exact import F64, close, error
from torch.func import grad, jacrev

from zoo import ppo, trpo
from zoo.common.kl import (
    ESTIMATORS,
    categorical_kl,
    categorical_kl_gradient,
    gaussian_kl,
    gaussian_kl_gradient,
    in_reward,
    k1,
    k2,
    k3,
    off_policy,
)

PI = torch.tensor([0.4, -0.9, 1.3, 0.2], dtype=F64)  # logits of the policy in training
REF = torch.tensor([0.0, 0.6, 0.5, -0.7], dtype=F64)
OLD = torch.tensor([0.9, 0.3, 0.4, -0.2], dtype=F64)  # that of the samples, where they are not PI's
EVERY = torch.arange(4)


def log_prob(logits):
    """log pi of every action, by the zoo."""
    return ppo.Categorical(logits.expand(4, -1)).log_prob(EVERY)


def loss_gradient(loss, sampler=PI, at=PI):
    """The expected gradient of a loss of log pi(x), the samples x ~ sampler held fixed."""
    chance = log_prob(sampler).exp()
    return grad(lambda x: chance @ loss(log_prob(x)))(at)


REVERSE = grad(categorical_kl)(PI, REF)  # of KL(pi || ref)
FORWARD = grad(lambda x: categorical_kl(REF, x))(PI)  # of KL(ref || pi)


def test_the_two_directions_differ():
    """What the tests below tell apart."""
    p, q = (torch.distributions.Categorical(logits=x) for x in (PI, REF))
    close(categorical_kl(PI, REF), torch.distributions.kl_divergence(p, q))
    close(categorical_kl(REF, PI), torch.distributions.kl_divergence(q, p))
    assert error(REVERSE, FORWARD) > 0.2 and min(REVERSE.norm(), FORWARD.norm()) > 0.1


# --- 27: values ---------------------------------------------------------------------------------------------


def test_27_values_of_a_categorical():
    """S4 2.1.2, (2.2): k1 and k3 have mean KL(q || p), k2 has not; k2 and k3 are never negative, k1 is."""
    q, log_ratio = log_prob(PI).exp(), log_prob(REF) - log_prob(PI)
    true = categorical_kl(PI, REF)
    close(q @ k1(log_ratio), true)
    close(q @ k3(log_ratio), true)
    assert abs(q @ k2(log_ratio) / true - 1) > 0.05
    assert (k3(log_ratio) >= 0).all() and (k2(log_ratio) >= 0).all() and (k1(log_ratio) < 0).any()


def test_27_the_other_direction():
    """S4 (2.3): r log r and r log r - (r - 1), on samples of q, have mean KL(p || q); the second is never
    negative."""
    q, log_ratio = log_prob(PI).exp(), log_prob(REF) - log_prob(PI)
    plain, shifted = off_policy(k1(-log_ratio), log_ratio), off_policy(k3(-log_ratio), log_ratio)
    close(plain, log_ratio.exp() * log_ratio)
    close(shifted, log_ratio.exp() * log_ratio - (log_ratio.exp() - 1))
    for estimate in (plain, shifted):
        close(q @ estimate, categorical_kl(REF, PI))
    assert (shifted >= 0).all() and (plain < 0).any()


@pytest.mark.parametrize(
    ("shift", "ratios", "k2_bias"),
    [(0.1, (20, 1.42, 1.42), 0.0025), (1.0, (2, 1.73, 1.70), 0.25)],
    ids=["0.1", "1"],
)
def test_27_schulmans_experiment(shift, ratios, k2_bias):
    """S4 2.1.3, Figure 2.1 (Schulman: q = N(0, 1), p = N(0.1, 1) and N(1, 1), where the notes show one case,
    the wrong way round): std / KL of k1, k2, k3, and the bias of k2, by quadrature.
    """
    x, w = exact.normal_nodes(1, 100)
    one = torch.zeros(1, dtype=F64)
    q, p = (
        ppo.Gaussian(torch.zeros(1, 1, dtype=F64), one),
        ppo.Gaussian(torch.full((1, 1), shift, dtype=F64), one),
    )
    log_ratio, true = p.log_prob(x) - q.log_prob(x), shift**2 / 2
    assert gaussian_kl(q.mean, one, p.mean, one).item() == pytest.approx(true)
    for estimator, ratio, bias in zip((k1, k2, k3), ratios, (0, k2_bias, 0), strict=True):
        k = estimator(log_ratio)
        mean = w @ k
        assert mean / true - 1 == pytest.approx(bias, abs=1e-9)
        assert (w @ (k - mean) ** 2).sqrt() / true == pytest.approx(ratio, rel=0.005)


def test_27_the_agents_own_k3():
    """zoo/ppo.py writes k3 out in its penalty and in approx_kl: the same function, with PPO's direction
    KL(old || new)."""
    log_ratio = torch.linspace(-2, 2, 41, dtype=F64)
    zeros, one = torch.zeros_like(log_ratio), torch.tensor(1.0, dtype=F64)
    for kind in ("kl", "adaptive-kl"):
        close(ppo.policy_loss(log_ratio.exp(), log_ratio, zeros, one, kind, 0.2), k3(log_ratio).mean())
    old = ppo.Categorical(OLD.expand(4, -1))
    batch = ppo.Batch(EVERY, EVERY, old.log_prob(EVERY), *torch.zeros(3, 4, dtype=F64))
    found = ppo.approx_kl(SimpleNamespace(policy=lambda _: ppo.Categorical(PI.expand(4, -1))), batch)
    close(found, k3(log_prob(PI) - log_prob(OLD)).mean())
    close(log_prob(OLD).exp() @ k3(log_prob(PI) - log_prob(OLD)), categorical_kl(OLD, PI))


def test_27_ppos_penalty_is_unbiased_in_value_and_gradient():
    """S4 2.1.4, 2.4.2: on samples of the old policy k3 has the value and the gradient of KL(old || new); so
    has k1."""
    for k in (k1, k3):
        close(
            loss_gradient(lambda new, k=k: k(new - log_prob(OLD)), sampler=OLD),
            grad(lambda x: categorical_kl(OLD, x))(PI),
        )


# --- 28: as a loss ------------------------------------------------------------------------------------------


def as_loss(k, ref=REF):
    return loss_gradient(lambda new: k(log_prob(ref) - new))


def test_28_k1_as_a_loss_is_noise():
    """S0 (10)(11) says k1 as a loss lowers every probability and collapses the model: its expected gradient
    is 0."""
    close(as_loss(k1), torch.zeros(4, dtype=F64))
    assert torch.einsum("i,ij->ij", log_prob(PI).exp(), jacrev(log_prob)(PI)).norm() > 0.1  # noise there is
    x, w = exact.normal_nodes(1, 40)
    action = x * 0.7 + 0.3

    def loss(mean, log_std):
        return w @ k1(
            ppo.Gaussian(action * 0, mean * 0 + 0.2).log_prob(action)
            - ppo.Gaussian(mean, log_std).log_prob(action)
        )

    point = torch.tensor([0.3], dtype=F64), torch.tensor([0.7], dtype=F64).log()
    for gradient in grad(loss, argnums=(0, 1))(*point):
        close(gradient, torch.zeros(1, dtype=F64))


def test_28_k2_as_a_loss_is_the_reverse_kl():
    """S0 (14), 3.2, (48): the gradient of k2 as a loss is that of KL(pi || ref)."""
    close(as_loss(k2), REVERSE)


def test_28_k3_as_a_loss_is_the_forward_kl():
    """S0 (12)-(15) calls k3 a first-order approximation of k2: its gradient is exactly that of the other
    direction."""
    close(as_loss(k3), FORWARD)
    assert error(as_loss(k3), REVERSE) > 0.2
    # S0 3.2's remark holds: near the reference the two agree to first order, and part as the distance grows
    errors = []
    for distance in (0.01, 0.1, 1.0):
        near = PI + distance * (REF - PI)
        errors.append(error(as_loss(k3, near), as_loss(k2, near)))
    assert errors[0] < 0.01 < errors[2] and errors[0] < 0.2 * errors[1] < 0.2 * errors[2]


def test_28_k2_and_k3_as_losses_of_a_gaussian():
    """S0 (14)(15) in the continuous case: k2 gives the reverse KL's gradient, k3 the forward one's, by
    quadrature."""
    x, w = exact.normal_nodes(1, 120)
    ref_mean, ref_log_std = torch.tensor([0.1], dtype=F64), torch.tensor([0.9], dtype=F64).log()
    point = torch.tensor([0.4], dtype=F64), torch.tensor([0.8], dtype=F64).log()
    action = point[0] + point[1].exp() * x

    def loss(mean, log_std, k):
        return w @ k(
            ppo.Gaussian(ref_mean, ref_log_std).log_prob(action)
            - ppo.Gaussian(mean, log_std).log_prob(action)
        )

    found2, found3 = (grad(loss, argnums=(0, 1))(*point, k) for k in (k2, k3))
    for found, true in zip(found2, gaussian_kl_gradient(*point, ref_mean, ref_log_std), strict=True):
        close(found, true)
    forward = grad(lambda m, s: gaussian_kl(ref_mean, ref_log_std, m, s), argnums=(0, 1))(*point)
    for found, true in zip(found3, forward, strict=True):
        close(found, true, rtol=1e-6)
    assert error(torch.cat(found2), torch.cat(found3)) > 0.05


def test_28_the_equality_of_losses_is_one_of_gradients():
    """S0 (48) writes E[log pi SG(log pi / ref)] = E[(log pi / ref)^2 / 2]: the values differ; the gradients
    agree while the sampling distribution is held fixed, and not when it moves along.
    """
    chance, log_ratio = log_prob(PI).exp(), log_prob(REF) - log_prob(PI)
    left = chance @ in_reward(k1(log_ratio), log_prob(PI))
    assert abs(left - chance @ k2(log_ratio)) > 0.1
    close(loss_gradient(lambda new: in_reward(k1(log_prob(REF) - new), new)), as_loss(k2))
    moving = grad(lambda x: log_prob(x).exp() @ k2(log_prob(REF) - log_prob(x)))(PI)
    assert error(moving, REVERSE) > 0.1


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "attached"])
def test_28_off_policy_with_a_weight(detach):
    """arXiv:2510.01555 on samples of an old policy, w = pi / old. w differentiated: k1 and k3 have the
    gradient of KL(pi || ref), k2 that of its own mean. w detached: k2 has it, k1 has 0, k3 the forward KL's,
    far off.
    """

    def gradient(k):
        return loss_gradient(
            lambda new: off_policy(k(log_prob(REF) - new), new - log_prob(OLD), detach), sampler=OLD
        )

    own = grad(lambda x: log_prob(x).exp() @ k2(log_prob(REF) - log_prob(x)))(PI)
    expected = (torch.zeros(4, dtype=F64), REVERSE, FORWARD) if detach else (REVERSE, own, REVERSE)
    for k, right in zip(ESTIMATORS.values(), expected, strict=True):
        close(gradient(k), right)
    wrong = k3 if detach else k2
    assert error(gradient(wrong), REVERSE) > 0.1
    close(
        log_prob(OLD).exp()
        @ off_policy(k3(log_prob(REF) - log_prob(PI)), log_prob(PI) - log_prob(OLD), detach),
        categorical_kl(PI, REF),
    )


def test_28_off_policy_without_a_weight():
    """S4 A.3.2 takes the mean of k3 over samples of the old policy for KL(pi || ref): biased, in value and in
    gradient; and k1 there is pushed away from the old policy, whatever the reference is.
    """
    old = log_prob(OLD).exp()
    assert abs(old @ k3(log_prob(REF) - log_prob(PI)) / categorical_kl(PI, REF) - 1) > 0.1
    for k in (k2, k3):
        found = loss_gradient(lambda new, k=k: k(log_prob(REF) - new), sampler=OLD)
        assert min(error(found, REVERSE), error(found, FORWARD)) > 0.1
    found = loss_gradient(lambda new: k1(log_prob(REF) - new), sampler=OLD)
    close(found, -grad(lambda x: categorical_kl(OLD, x))(PI))


# --- 29: inside the reward ----------------------------------------------------------------------------------


def penalty(k, pi=PI, ref=REF):
    """The gradient that a penalty k in the reward subtracts, for one decision."""
    return loss_gradient(lambda new: in_reward(k(log_prob(ref) - new), new), sampler=pi, at=pi)


def test_29_k1_in_the_reward():
    """S0 (5)-(8): with k1 in the reward the policy gradient is that of r - beta KL(pi || ref)."""
    close(penalty(k1), REVERSE)
    reward, beta = torch.tensor([1.0, -2.0, 0.3, 0.8], dtype=F64), 0.7
    objective = grad(lambda x: log_prob(x).exp() @ reward - beta * categorical_kl(x, REF))(PI)
    close(loss_gradient(lambda new: in_reward(reward - beta * k1(log_prob(REF) - new), new)), objective)


def test_29_k2_and_k3_in_the_reward():
    """S0 (9) says positive penalties lower every action's probability: a constant in the reward has no
    gradient, and some probabilities rise. k3 gives grad KL(pi || ref) - grad KL(ref || pi).
    """
    close(penalty(lambda log_ratio: torch.ones_like(log_ratio)), torch.zeros(4, dtype=F64))
    close(penalty(k3), REVERSE - FORWARD)
    for k in (k2, k3):
        # d pi for a small step against the penalty
        change = jacrev(lambda x: log_prob(x).exp())(PI) @ -penalty(k)
        assert (change > 0.01 * change.abs().max()).any() and (change < 0).any()
        assert error(penalty(k), REVERSE) > 0.3


def test_29_k2_and_k3_in_the_reward_vanish_near_the_reference():
    """S0 2.5, 3.1, rightly told: k2 and k3 do not serve there because their gradient is of second order, and
    so dies out against the true one as the policy nears the reference.
    """
    for k in (k2, k3):
        shares = []
        for distance in (0.1, 0.01, 0.001):
            near = REF + distance * (PI - REF)
            shares.append((penalty(k, near).norm() / grad(categorical_kl)(near, REF).norm()).item())
        assert shares[0] < 0.1 and shares[2] < 0.001
        # in proportion to the distance
        assert shares[0] > 5 * shares[1] and shares[1] / shares[2] == pytest.approx(10, rel=0.03)


# two decisions, three tokens each; the second policy depends on the first token
SHAPE = (1 + 3, 3)


def sequence_log_probs(theta):
    """log pi of each token of each of the nine sequences (2, 9)."""
    logits = theta.view(SHAPE)
    first, second = torch.tensor(list(itertools.product(range(3), repeat=2))).T
    return torch.stack((
        ppo.Categorical(logits[:1].expand(9, -1)).log_prob(first),
        ppo.Categorical(logits[1 + first]).log_prob(second),
    ))  # fmt: skip


def test_29_over_a_sequence():
    """S0 3.2, (48) takes k2 as a loss for k1 in the reward, token by token: over a sequence both then miss
    how a token changes the KL of those after it. k1 with return-to-go, and k2 of the whole sequence's
    log-ratio, are exact.
    """
    g = torch.Generator().manual_seed(4)
    theta, ref = torch.randn(2, 12, generator=g, dtype=F64)
    old, reference = sequence_log_probs(theta), sequence_log_probs(ref)
    chance = old.sum(0).exp()
    # KL of the sequences, by definition
    true = grad(lambda x: sequence_log_probs(x).sum(0).exp() @ k1(reference - sequence_log_probs(x)).sum(0))(
        theta
    )

    def gradient(loss):
        return grad(lambda x: chance @ loss(sequence_log_probs(x)))(theta)

    immediate = gradient(lambda new: in_reward(k1(reference - new), new).sum(0))
    to_go = gradient(lambda new: in_reward(k1(reference - new).flip(0).cumsum(0).flip(0), new).sum(0))
    by_token = gradient(lambda new: k2(reference - new).sum(0))
    by_sequence = gradient(lambda new: k2((reference - new).sum(0)))
    close(to_go, true)
    close(by_sequence, true)
    close(by_token, immediate)
    assert error(immediate, true) > 0.4


# --- 30, 31: exact gradients --------------------------------------------------------------------------------


def test_30_the_gradient_of_a_discrete_kl():
    """S0 (36)-(47): grad KL = E_pi[grad log pi log pi / ref]; the other term of the product rule sums to 0
    (44)."""
    score, chance = jacrev(log_prob)(PI), log_prob(PI).exp()
    log_ratio = log_prob(PI) - log_prob(REF)
    close(REVERSE, torch.einsum("i,i,ij->j", chance, log_ratio, score))
    close(chance @ score, torch.zeros(4, dtype=F64))
    close(categorical_kl_gradient(PI, REF), REVERSE)
    p, q = (torch.distributions.Categorical(logits=x) for x in (PI, REF))
    close(categorical_kl(PI, REF), torch.distributions.kl_divergence(p, q))
    close(trpo.kl(trpo.Categorical(PI[None]), trpo.Categorical(REF[None])), categorical_kl(PI, REF)[None])
    a, b = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(1), dtype=F64)
    close(categorical_kl_gradient(a, b), grad(lambda x: categorical_kl(x, b).sum())(a))


def test_31_the_kl_of_gaussians():
    """S0 (49)-(59): the closed form against E_p[log p - log q] by quadrature, with the zoo's densities; and
    its parts."""
    x, w = exact.normal_nodes(2, 12)
    mean, ref_mean = torch.tensor([0.4, -1.0], dtype=F64), torch.tensor([-0.2, 0.5], dtype=F64)
    for log_std, ref_log_std in (
        ([-0.5, -0.5], [0.3, 0.3]),
        ([-0.5, 0.2], [0.3, -0.4]),
        ([0.1, 0.1], [0.1, 0.1]),
    ):
        p = ppo.Gaussian(mean[None], torch.tensor(log_std, dtype=F64))
        q = ppo.Gaussian(ref_mean[None], torch.tensor(ref_log_std, dtype=F64))
        action = p.sample(x)
        found = gaussian_kl(p.mean, p.log_std, q.mean, q.log_std)[0]
        close(found, w @ (p.log_prob(action) - q.log_prob(action)))
        close(found, trpo.kl(trpo.Gaussian(*p), trpo.Gaussian(*q))[0])
        if log_std[0] == log_std[1]:  # isotropic, as the notes have it
            s1, s2, k, apart = p.log_std[0].exp(), q.log_std[0].exp(), 2, ((mean - ref_mean) ** 2).sum()
            close(found, k * ((s2 / s1).log() + s1**2 / (2 * s2**2) - 0.5) + apart / (2 * s2**2))  # (58)
            close(w @ ((action - mean) ** 2).sum(1), k * s1**2)  # (53)
            close(w @ ((action - ref_mean) ** 2).sum(1), k * s1**2 + apart)  # (55)
            if log_std == ref_log_std:
                close(found, apart / (2 * s1**2))  # (59)


def test_31_its_gradient():
    """S0 (60)-(64): d KL / d mean = (mean - ref_mean) / ref_std^2; and in the log-std, which the notes hold
    fixed."""
    g = torch.Generator().manual_seed(2)
    point = tuple(torch.randn(4, 50, 3, generator=g, dtype=F64))
    by_mean, by_log_std = grad(lambda *x: gaussian_kl(*x).sum(), argnums=(0, 1))(*point)
    found = gaussian_kl_gradient(*point)
    close(found[0], by_mean)
    close(found[1], by_log_std)
    close(found[0], (point[0] - point[2]) / point[3].exp() ** 2)
