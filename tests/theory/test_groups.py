"""Group-relative policy optimisation: items 43 to 46; expectations over all groups of two responses."""

from functools import partial

import torch
from exact import F64, close, cosine, error
from sequences import BETA, ENDING, FIXED
from torch.func import grad

from zoo.common.tokens import gap
from zoo.grpo_tokens import group_advantages, process_advantages

WORLD, THETA, REF = FIXED, FIXED.policy(0), FIXED.policy(1)


def by_groups(world, theta, reward, std=False):
    """The mean advantage (B, L) of each response: group_advantages of its reward (B,)."""
    return world.group_means(theta, reward, partial(group_advantages, std=std))[:, None] * world.mask


def regularised(world, theta, ref=REF):
    """r - beta log(pi / ref) of whole responses (B,)."""
    return world.reward() - BETA * (world.table(theta) - world.table(ref)).flatten()


def test_43_a_mean_with_the_response_itself_scales_the_gradient():
    """S4 (3.12) without the division: with G = 2 the expected gradient is 1 - 1/G = half the objective's."""
    true = grad(WORLD.objective)(THETA, REF)
    found = WORLD.grpo_gradient(THETA, by_groups(WORLD, THETA, regularised(WORLD, THETA)))
    close(found, true / 2, atol=1e-9)


def test_43_the_responses_ratio_and_the_tokens():
    """S4 (3.10)(3.11): at the old policy the ratio of the whole response and that of each token have one
    gradient.
    """
    advantage = by_groups(WORLD, THETA, regularised(WORLD, THETA))
    one, two = (WORLD.grpo_gradient(THETA, advantage, ratio=ratio) for ratio in ("response", "token"))
    close(one, two, atol=1e-9)


def test_43_with_the_kl_in_the_reward_the_fixed_point_is_the_optimum():
    """At pi* every response has the same regularised reward: all advantages are 0, divided by a deviation or
    not.
    """
    best = WORLD.best(REF)
    for std in (False, True):
        advantage = by_groups(WORLD, best, regularised(WORLD, best), std)
        close(WORLD.grpo_gradient(best, advantage), 0 * best, atol=1e-9)


def forward_optimum(world, ref, beta):
    """The best policy for E[r] - beta KL(ref || pi): beta ref / (c - r), c such that it sums to 1, by
    bisection.
    """
    reward, chance = world.reward().view(world.n, world.m), world.table(ref).exp()
    low, high = reward.max(-1, keepdim=True).values, reward.max(-1, keepdim=True).values + beta
    for _ in range(200):
        middle = (low + high) / 2
        too_much = (beta * chance / (middle - reward)).sum(-1, keepdim=True) > 1
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return world.logits((beta * chance / (high - reward)).log())


def test_43_k3_as_a_loss_has_another_optimum():
    """S4 (3.13)(3.14), A.3.2: k3 of whole responses as a loss leads to the best policy for KL(ref || pi),
    exactly; in the objective with KL(pi || ref) that one stands at a gap of its own.
    """
    other = forward_optimum(WORLD, REF, BETA)
    centred = WORLD.reward().view(2, 27) - (WORLD.table(other).exp() * WORLD.reward().view(2, 27)).sum(
        -1, keepdim=True
    )
    advantage = centred.flatten()[:, None] * WORLD.mask  # of a group that is large
    settings = dict(ref=REF, kl="k3", kl_in="loss", kl_level="response")
    close(WORLD.grpo_gradient(other, advantage, **settings), 0 * other, atol=1e-9)
    tables = (WORLD.table(other), WORLD.reward().view(2, 27), WORLD.table(REF))
    assert gap(*tables, BETA) > 0.1 and grad(WORLD.objective)(other, REF).norm() > 0.05


def test_43_k2_of_whole_responses_as_a_loss_has_the_optimum():
    """The one estimator that may stand in the loss: its gradient is that of KL(pi || ref)."""
    best = WORLD.best(REF)
    mean = (WORLD.table(best).exp() * WORLD.reward().view(2, 27)).sum(-1, keepdim=True)
    advantage = (WORLD.reward().view(2, 27) - mean).flatten()[:, None] * WORLD.mask
    settings = dict(ref=REF, kl_in="loss", kl_level="response")
    close(WORLD.grpo_gradient(best, advantage, kl="k2", **settings), 0 * best, atol=1e-9)
    scale = WORLD.grpo_gradient(best, advantage).norm()
    for kind in ("k1", "k3"):
        assert WORLD.grpo_gradient(best, advantage, kl=kind, **settings).norm() > 0.1 * scale


def test_43_the_standard_deviation_moves_the_optimum_of_a_kl_in_the_loss():
    """S4 (3.12): what is divided is the reward, and not the KL; k2 of whole responses, exact without, no
    longer is.
    """
    best = WORLD.best(REF)
    settings = dict(ref=REF, kl="k2", kl_in="loss", kl_level="response")
    found = []
    for std in (False, True):
        advantage = by_groups(WORLD, best, WORLD.reward(), std)
        # 1 - 1/G of both
        found.append(WORLD.grpo_gradient(best, advantage, **settings | dict(beta=BETA / 2)).norm())
    assert found[0] < 1e-9 and found[1] > 0.02


def test_44_the_kl_a_token_is_not_that_of_the_response():
    """S4 (A.10): at pi* neither k2 nor k3 of each token, as a loss, balances the reward: what a token does to
    the KL of those after it is left out.
    """
    best = WORLD.best(REF)
    mean = (WORLD.table(best).exp() * WORLD.reward().view(2, 27)).sum(-1, keepdim=True)
    advantage = (WORLD.reward().view(2, 27) - mean).flatten()[:, None] * WORLD.mask
    scale = WORLD.grpo_gradient(best, advantage).norm()
    for kind in ("k2", "k3"):
        found = WORLD.grpo_gradient(best, advantage, ref=REF, kl=kind, kl_in="loss", kl_level="token")
        assert found.norm() > 0.05 * scale


def test_44_dividing_by_the_length_favours_short_right_and_long_wrong_answers():
    """S4 (A.10), arXiv:2503.20783: the reward asks for the first token only, so length is neutral; the true
    gradient leaves it alone. With 1/|o| an update shortens right answers and lengthens wrong ones.
    """
    world, theta = ENDING, ENDING.policy(0)
    right = world.steps[:, 0]
    length, chance = world.mask.sum(-1).to(F64), world.chance(theta)
    mean = (chance * right).view(world.n, world.m).sum(-1) * world.n
    advantage = (right - mean.repeat_interleave(world.m))[:, None] * world.mask

    def mean_length(x, which):
        """Of the responses that begin right, or wrong: for each prompt, then the mean."""
        weight = (world.chance(x) * which).view(world.n, world.m)
        return ((weight * length.view(world.n, world.m)).sum(-1) / weight.sum(-1)).mean()

    ended_at_once = world.response[:, 0] == world.task.end  # has no length to change
    wrong = (1 - right) * ~ended_at_once
    for how, moved in (("constant", False), ("response", True)):
        step = world.grpo_gradient(theta, advantage, length=how)
        shorter, longer = (grad(mean_length)(theta, which) @ step for which in (right, wrong))
        if moved:
            assert shorter < -1e-3 and longer > 1e-3
        else:
            close(torch.stack((shorter, longer)), torch.zeros(2, dtype=F64), atol=1e-9)


def test_45_a_token_is_credited_with_its_own_step():
    """S4 A.3.3 prints index(j) > t; DeepSeekMath has >=. With >= the direction is near the gradient's of the
    summed steps (groups of two: the mean of the group's steps contains a response's own), with > far from it.
    """
    true = grad(lambda x: WORLD.chance(x) @ WORLD.reward())(THETA)
    mask = WORLD.mask[:1].expand(2, -1)

    def advantages(pairs, shift=0):
        found = process_advantages(pairs, mask.expand(len(pairs), 2, -1), std=False)
        return torch.cat((found[..., shift:], torch.zeros_like(found[..., :shift])), -1)

    kept, printed = (
        WORLD.grpo_gradient(THETA, WORLD.group_means(THETA, WORLD.steps, partial(advantages, shift=shift)))
        for shift in (0, 1)
    )
    assert cosine(kept, true) > 0.97 and cosine(printed, true) < 0.7


def test_45_in_a_large_group_it_is_exact():
    """The mean of all steps is then a constant, and what it takes off depends on the position alone: a
    baseline.
    """
    true = grad(lambda x: WORLD.chance(x) @ WORLD.reward())(THETA)
    mean = (WORLD.chance(THETA) @ WORLD.steps).mean()
    to_go = (WORLD.steps - mean).flip(-1).cumsum(-1).flip(-1)
    close(WORLD.grpo_gradient(THETA, to_go), true, atol=1e-9)
    # beside what makes the mean of the group that constant
    pairs = torch.stack((WORLD.steps, 2 * mean - WORLD.steps), 1)
    found = process_advantages(pairs, torch.ones_like(pairs, dtype=torch.bool), std=False)[:, 0]
    close(found, to_go)


def test_46_without_the_standard_deviation_the_direction_is_the_objectives():
    """S4 A.3.1: GPG's A = r - mean(r); divided by the deviation, prompts that are nearly always or nearly
    never answered right weigh more, and the direction is another one.
    """
    reward = WORLD.reward()
    true = grad(lambda x: WORLD.chance(x) @ reward)(THETA)
    plain, divided = (
        WORLD.grpo_gradient(THETA, by_groups(WORLD, THETA, reward, std)) for std in (False, True)
    )
    close(plain, true / 2, atol=1e-9)
    assert cosine(divided, true) < 0.99 and error(divided, true / 2) > 0.1
