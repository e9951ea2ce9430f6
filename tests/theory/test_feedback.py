"""Reward models, the KL in the reward, PPO over tokens, the pretraining term: items 34 to 39 and 42."""

import itertools
import math

import pytest
import torch
from exact import F64, close, cosine, error
from sequences import BETA, ENDING, FIXED
from torch.func import grad
from torch.nn.functional import logsigmoid

from zoo import rlhf
from zoo.common.kl import k1, k3
from zoo.preferences import ranking_log_prob
from zoo.rlhf import kl_estimate, ranking_loss, supervised_loss, token_rewards

REWARD = torch.tensor([0.3, -1.2, 0.9, 0.0], dtype=F64)  # of four responses to a prompt


def test_34_the_reward_models_loss_and_its_optimum():
    """S3 (45)-(48); S4 (3.1): over all pairs, labelled by Bradley and Terry, the loss has its least value at
    the reward.
    """
    pairs = torch.tensor(list(itertools.permutations(range(4), 2)))
    chance = (REWARD[pairs[:, 0]] - REWARD[pairs[:, 1]]).sigmoid()  # that the first one is chosen

    def loss(score):
        return torch.stack(
            [c * ranking_loss(score[pair][None])[0] for c, pair in zip(chance, pairs, strict=True)]
        ).sum()

    difference = REWARD[pairs[:, 0]] - REWARD[pairs[:, 1]]
    close(loss(REWARD), -(chance * logsigmoid(difference)).sum())
    close(grad(loss)(REWARD), torch.zeros(4, dtype=F64))
    others = REWARD + torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    assert all(loss(other) > loss(REWARD) for other in others)


def test_34_only_differences_are_learned():
    """S3 10.18, S4 3.2.2: a constant for each prompt changes no loss, which is why scores are shifted to mean
    0; and it changes no policy gradient either.
    """
    score = torch.stack((REWARD, REWARD - 5))
    close(ranking_loss(score)[0], ranking_loss(score + torch.tensor([[3.0], [-8.0]]))[0])
    theta, zero = FIXED.policy(0), torch.zeros_like(FIXED.steps)
    scored = [token_rewards(FIXED.reward() + c, zero, FIXED.mask, 0.0) for c in (0.0, 7.0)]
    one, two = (FIXED.rlhf_gradient(theta, reward, zero) for reward in scored)
    close(one, two, atol=1e-9)


def test_35_a_ranking_is_all_its_pairs():
    """S4 3.3.1 (InstructGPT, eq. 1): the mean over K (K - 1) / 2 pairs."""
    pairs = [ranking_loss(REWARD[[i, j]][None])[0] for i in range(4) for j in range(i + 1, 4)]
    close(ranking_loss(REWARD[None])[0], torch.stack(pairs).mean())


def test_35_rankings_have_the_rewards_as_their_optimum_too():
    """Rankings of three by Plackett and Luce: among all pairs of a ranking each is a Bradley-Terry label."""
    reward, total, weight = REWARD[:3], torch.zeros(3, dtype=F64), REWARD[:3].exp()
    for order in itertools.permutations(range(3)):
        left = [weight[list(order[i:])].sum() for i in range(3)]
        chance = torch.stack([weight[one] / rest for one, rest in zip(order, left, strict=True)]).prod()
        total = total + chance * grad(lambda s, order=order: ranking_loss(s[list(order)][None])[0])(reward)
    close(total, torch.zeros(3, dtype=F64))


def test_35_a_ranking_scored_as_a_whole():
    """Plackett and Luce's own loss: of two clips the pairwise one, and its optimum is the reward as well; but
    of three it is another loss than the mean over pairs."""
    close(-ranking_log_prob(REWARD[:2]), ranking_loss(REWARD[None, :2])[0])
    reward, total, weight = REWARD[:3], torch.zeros(3, dtype=F64), REWARD[:3].exp()
    for order in itertools.permutations(range(3)):
        left = [weight[list(order[i:])].sum() for i in range(3)]
        chance = torch.stack([weight[one] / rest for one, rest in zip(order, left, strict=True)]).prod()
        total = total - chance * grad(lambda s, order=order: ranking_log_prob(s[list(order)]))(reward)
    close(total, torch.zeros(3, dtype=F64))
    assert abs(-ranking_log_prob(reward) - 3 * ranking_loss(reward[None])[0]) > 0.05


def test_36_the_tokens_rewards_sum_to_the_responses():
    """S3 (51)-(54); S4 (3.2)(3.3): r(x, y) - beta log(pi(y|x) / ref(y|x)), and its mean is J; responses of
    any length.
    """
    for world in (FIXED, ENDING):
        theta, ref = world.policy(0), world.policy(1)
        total = world.token_rewards(theta, ref, k1).sum(-1)
        close(total, world.reward() - BETA * (world.table(theta) - world.table(ref)).flatten())
        close(world.chance(theta) @ total, world.objective(theta, ref))


def test_37_the_zoos_estimators_are_those_of_the_kl():
    ratio = torch.linspace(-2, 2, 9, dtype=F64)
    for kind, right in (("k1", -ratio), ("k2", ratio**2 / 2), ("k3", k3(ratio))):
        close(kl_estimate(ratio, kind), right)


@pytest.mark.parametrize("world", [FIXED, ENDING], ids=["fixed", "ending"])
def test_37_ppos_gradient_is_that_of_the_objective(world):
    """S3 (54); S4 3.5.1: at the old policy, with lambda = 1 and any critic of (x, y_<t)."""
    theta, ref = world.policy(0), world.policy(1)
    reward = world.token_rewards(theta, ref, k1)
    true = grad(world.objective)(theta, ref)
    guess = torch.randn(world.shape[0], generator=torch.Generator().manual_seed(2), dtype=F64)[world.row]
    for value in (0 * reward, guess):
        close(world.rlhf_gradient(theta, reward, value), true, atol=1e-9)
    assert true.norm() > 0.05


def values(world, theta, reward):
    """The true V(x, y_<t) (B, L): the mean return to go behind a prefix, by tallying all responses."""
    to_go = reward.flip(-1).cumsum(-1).flip(-1)
    chance = world.chance(theta)
    v = torch.zeros_like(reward)
    for t in range(reward.shape[1]):
        mass, total = torch.zeros(2, world.shape[0], dtype=F64)
        mass.index_add_(0, world.row[:, t], chance * world.mask[:, t])
        total.index_add_(0, world.row[:, t], chance * world.mask[:, t] * to_go[:, t])
        v[:, t] = (total / mass.clamp(min=1e-300))[world.row[:, t]]
    return v * world.mask


def test_37_with_the_true_value_every_lambda_is_exact():
    theta, ref = ENDING.policy(0), ENDING.policy(1)
    reward, true = ENDING.token_rewards(theta, ref, k1), grad(ENDING.objective)(theta, ref)
    value = values(ENDING, theta, reward)
    for lam in (0.0, 0.5, 0.95):
        close(ENDING.rlhf_gradient(theta, reward, value, lam), true, atol=1e-9)


def test_37_the_value_belongs_one_position_before_its_token():
    """S3 listing 12: V has T entries there, the rewards T - 1. Read at the token itself it knows the action,
    and the gradient is off by more than a half.
    """
    theta, ref = FIXED.policy(0), FIXED.policy(1)
    reward, true = FIXED.token_rewards(theta, ref, k1), grad(FIXED.objective)(theta, ref)
    value = values(FIXED, theta, reward)
    late = torch.cat((value[:, 1:], torch.zeros_like(value[:, :1])), 1)  # of the prefix with the token
    assert error(FIXED.rlhf_gradient(theta, reward, late), true) > 0.5


def test_37_padding_must_not_be_charged():
    """S3 listing 12 takes attention_mask=None: log-ratios of what stands beyond the end would be part of the
    reward.
    """
    theta, ref = ENDING.policy(0), ENDING.policy(1)
    junk = (
        0.5
        * torch.randn(ENDING.mask.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
        * ~ENDING.mask
    )
    ratio = ENDING.log_probs(ref) - ENDING.log_probs(theta)
    kept = token_rewards(ENDING.reward(), k1(ratio + junk), ENDING.mask, BETA)
    close(kept, token_rewards(ENDING.reward(), k1(ratio), ENDING.mask, BETA))
    charged = ENDING.reward() - BETA * k1(ratio + junk).sum(-1)
    last = token_rewards(charged, 0 * ratio, ENDING.mask, 0.0)
    true = grad(ENDING.objective)(theta, ref)
    assert error(ENDING.rlhf_gradient(theta, last, 0 * ratio), true) > 0.05


def test_37_the_score_belongs_to_the_last_token():
    """S3 listing 12's `sum - 2` is the last token's row where padding stands on the right; left of it, it is
    another's.
    """
    ids = torch.tensor([[7, 8, 1, 2, 0], [7, 8, 1, 2, 3]])  # a prompt of two, padding 0
    for padded, right in ((ids, True), (torch.stack((ids[0].roll(1), ids[1])), False)):
        mask = padded != 0
        row = mask.sum(1) - 2  # of log-probabilities [:, :-1], which predict [:, 1:]
        is_last = padded[:, 1:].gather(1, row[:, None]).squeeze(1) == torch.tensor([2, 3])
        assert bool(is_last.all()) == right


@pytest.mark.parametrize(
    ("kind", "where"),
    [("k1", "reward"), ("k2", "reward"), ("k3", "reward"), ("k1", "loss"), ("k2", "loss"), ("k3", "loss")],
)
def test_37_where_the_kl_may_stand(kind, where):
    """At pi* the gradient of E[r] - beta KL is 0: so is that of k1 in the reward, and of none of the other
    five.
    """
    ref = FIXED.policy(1)
    best, zero = FIXED.best(ref), torch.zeros_like(FIXED.steps)
    close(grad(FIXED.objective)(best, ref), 0 * best, atol=1e-9)
    beta = BETA if where == "reward" else 0.0
    reward = FIXED.token_rewards(best, ref, lambda ratio: kl_estimate(ratio, kind), beta)
    found = FIXED.rlhf_gradient(best, reward, zero, kl_in=where, kl=kind, ref=FIXED.log_probs(ref)).norm()
    scale = FIXED.rlhf_gradient(best, FIXED.token_rewards(best, ref, k1, 0.0), zero).norm()  # without any KL
    assert found < 1e-9 if (kind, where) == ("k1", "reward") else found > 0.03 * scale


def test_38_ptx_is_a_cross_entropy():
    """S4 3.3.2: the term is E_data[log pi], whose gradient is that of KL(data || pi), and which pi = data
    maximises. It is no entropy of the policy, as which the notes read it: there the entropy's gradient is not
    0.
    """
    world = FIXED
    data, theta = world.policy(3), world.policy(0)
    mask, chance = world.mask, world.chance(data)

    def ptx(x):
        log_prob = world.log_probs(x)
        return (
            torch.stack(
                [c * supervised_loss(row, m) for c, row, m in zip(chance, log_prob, mask, strict=True)]
            ).sum()
            * 3
        )

    def forward_kl(x):
        return (world.table(data).exp() * (world.table(data) - world.table(x))).sum(-1).mean()

    def entropy(x):
        return -(world.table(x).exp() * world.table(x)).sum(-1).mean()

    close(grad(ptx)(theta), grad(forward_kl)(theta))
    close(grad(ptx)(data), 0 * data)
    assert grad(entropy)(data).norm() > 0.1 and cosine(grad(ptx)(theta), grad(entropy)(theta)) < 0.9


def tilted(proxy, beta):
    """ref exp(proxy / beta) / Z, ref even."""
    return (proxy / beta).softmax(-1)


def test_39_a_proxy_rewarded_too_far_does_harm():
    """S3 10.18: with an error on the proxy (normal, heavy-tailed: cubed), the true reward of the best policy
    for the proxy rises and falls again as beta goes to 0, while the proxy's only rises.
    """
    g = torch.Generator().manual_seed(0)
    true = torch.randn(200, 1000, generator=g, dtype=F64)
    proxy = true + 0.5 * torch.randn(200, 1000, generator=g, dtype=F64) ** 3
    policies = [tilted(proxy, beta) for beta in (100.0, 3.0, 1.5, 0.5, 0.05)]
    found = torch.stack([(p * true).sum(-1).mean() for p in policies])
    hoped = torch.stack([(p * proxy).sum(-1).mean() for p in policies])
    assert (hoped.diff() > 0).all()
    assert found.argmax() not in (0, 4) and found[-1] < 0.7 * found.max()


def test_39_more_models_make_it_less():
    """S3 10.19: the mean of four models with errors of their own, pushed as far."""
    g = torch.Generator().manual_seed(0)
    true = torch.randn(200, 1000, generator=g, dtype=F64)
    proxies = true + 0.5 * torch.randn(4, 200, 1000, generator=g, dtype=F64) ** 3
    one, four = ((tilted(proxy, 0.05) * true).sum(-1).mean() for proxy in (proxies[0], proxies.mean(0)))
    assert four > one + 0.1


def test_39_a_clipped_proxy_makes_it_less():
    """S3 10.19: rewards clipped to what is usual of the true one, one or two of its standard deviations. A
    bound as low as a tenth of one tells too few responses apart.
    """
    g = torch.Generator().manual_seed(0)
    true = torch.randn(200, 1000, generator=g, dtype=F64)
    proxy = true + 0.5 * torch.randn(200, 1000, generator=g, dtype=F64) ** 3

    def found(bound):
        return float((tilted(proxy.clamp(-bound, bound), 0.05) * true).sum(-1).mean())

    assert found(2.0) > found(math.inf) + 0.5 and found(1.0) > found(0.1) + 0.2


def test_39_answers_about_what_the_policy_does_by_now_make_it_less():
    """S3 10.19: as many noisy looks at the true reward, in ten rounds at what the policy of then writes, or
    at once at what the reference (uniform) does; an estimate is the mean of the proxy and the looks. With a
    beta so small that a policy writes one answer only, a round is about one, and four are worth nothing.
    """
    true = torch.randn(200, 1000, generator=torch.Generator().manual_seed(0), dtype=F64)

    def found(rounds, beta):
        g = torch.Generator().manual_seed(1)
        total = true + 0.5 * torch.randn(200, 1000, generator=g, dtype=F64) ** 3
        looks, policy = torch.ones_like(true), torch.full_like(true, 1 / 1000)
        for _ in range(rounds):
            at = policy.multinomial(100 // rounds, replacement=True, generator=g)
            seen = true.gather(1, at) + torch.randn(at.shape, generator=g, dtype=F64)
            total.scatter_add_(1, at, seen)
            looks.scatter_add_(1, at, torch.ones_like(seen))
            policy = tilted(total / looks, beta)
        return float((policy * true).sum(-1).mean())

    assert found(10, 0.5) > found(1, 0.5) + 0.5 and found(4, 0.05) < found(1, 0.05) + 0.1


def test_42_token_ppo_divided_by_the_length():
    """S4 (3.9): with 1/|o| it is the gradient, over L, if all responses are as long; if not, it is another
    direction. Divided by the batch's tokens, as zoo/rlhf.py does, it is a mean over a batch that is long
    enough.
    """
    for world, length in ((FIXED, 3), (ENDING, None)):
        theta, ref = world.policy(0), world.policy(1)
        reward = world.token_rewards(theta, ref, k1)
        to_go = reward.flip(-1).cumsum(-1).flip(-1) * world.mask
        true = grad(world.objective)(theta, ref)
        found = world.grpo_gradient(theta, to_go, length="response") / 3
        close(world.grpo_gradient(theta, to_go, length="constant"), true, atol=1e-9)
        if length:
            close(found, true / length, atol=1e-9)
        else:
            assert cosine(found, true) < 0.995
    args = rlhf.Args(env="Count", critic=False)
    assert args.kl_in == "reward" and args.kl == "k1"
