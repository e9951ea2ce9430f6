"""Group-relative policy optimisation: items 43 to 46; expectations over all groups of two responses, and of
episodes of the tiny MDP.
"""

from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import tiny_mdp
import torch
from exact import ACTION, ALIVE, ALL, F64, REWARD, STATE, chances, close, cosine, error
from sequences import BETA, ENDING, FIXED
from torch.func import grad

from zoo import grpo
from zoo.common.tokens import gap
from zoo.grpo import Steps, group_loss, step_weights
from zoo.grpo_tokens import Group, group_advantages, grpo_loss, process_advantages

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
    """The one estimator that may stand in the loss as it is: its gradient is that of KL(pi || ref)."""
    best = WORLD.best(REF)
    mean = (WORLD.table(best).exp() * WORLD.reward().view(2, 27)).sum(-1, keepdim=True)
    advantage = (WORLD.reward().view(2, 27) - mean).flatten()[:, None] * WORLD.mask
    settings = dict(ref=REF, kl_in="loss", kl_level="response")
    close(WORLD.grpo_gradient(best, advantage, kl="k2", **settings), 0 * best, atol=1e-9)
    scale = WORLD.grpo_gradient(best, advantage).norm()
    for kind in ("k1", "k3"):
        assert WORLD.grpo_gradient(best, advantage, kl=kind, **settings).norm() > 0.1 * scale


@pytest.mark.parametrize(("kl", "right"), [("k1", True), ("k2", False), ("k3", True)])
def test_43_weighed_by_the_ratio_k1_and_k3_have_the_optimum_and_k2_has_not(kl, right):
    """pi / old times the estimator is differentiated in the weights of its expectation, too: E[k1] and E[k3]
    are the KL, E[k2] is not.
    """
    best = WORLD.best(REF)
    mean = (WORLD.table(best).exp() * WORLD.reward().view(2, 27)).sum(-1, keepdim=True)
    advantage = (WORLD.reward().view(2, 27) - mean).flatten()[:, None] * WORLD.mask
    settings = dict(ref=REF, kl_in="loss", kl_level="response", kl=kl, kl_correction=True)
    off = WORLD.grpo_gradient(best, advantage, **settings).norm()
    scale = WORLD.grpo_gradient(best, advantage).norm()
    assert off < 1e-9 if right else off > 0.1 * scale


@pytest.mark.parametrize(
    ("length", "expected"), [("constant", 2.5 / 3), ("batch", 2.5 / 2), ("response", 1.5)]
)
def test_43_the_kl_of_responses_is_divided_as_their_surrogates_are(length, expected):
    """Responses of 1 and 3 tokens with k1 of 2 and 3 nats: by L = 3, by the mean length, by each its own."""
    mask = torch.tensor([[True, False, False], [True, True, True]])
    ratio = torch.tensor([[-2.0, 9.0, 9.0], [-1.0, -3.0, 1.0]], dtype=F64)  # log ref - log pi
    zero = torch.zeros(2, 3, dtype=F64)
    settings = dict(ratio="token", clip=0.2, beta=BETA, kl="k1", kl_in="loss", kl_level="response")
    args = SimpleNamespace(**settings, length=length, kl_correction=False)
    _, metrics = grpo_loss(zero, Group(None, None, mask, zero, ratio, zero), args)
    assert metrics["kl_loss"].item() == pytest.approx(expected)


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


# --- control: groups of episodes from one reset seed (zoo/grpo.py), all seeds and all that can be done ------

# What nature draws, in cells between which no transition of the tiny MDP tells apart: the start and three
# numbers in [0, 1).
EDGES = torch.tensor([0.0, 0.4, 0.5, 0.7, 0.8, 1.0], dtype=F64)
CELLS, PLANS = range(len(EDGES) - 1), list(product((0, 1), repeat=tiny_mdp.HORIZON))  # actions, chosen ahead
SEEDS = list(product((0, 1), *[CELLS] * tiny_mdp.HORIZON))
LOG_2 = torch.tensor(2.0, dtype=F64).log()  # an action after the end is one of two, and changes nothing
OF_SEED = torch.stack([tiny_mdp.START[s] * EDGES.diff()[list(cells)].prod() for s, *cells in SEEDS])


def play(seed, plan):
    """States, rewards and aliveness (3,) each of these actions from that seed; 99 is paid after the end."""
    state, *cells = seed
    states, reward, alive = [], [], []
    for cell, action in zip(cells, plan, strict=True):
        alive.append(state != 2)
        states.append(state if state != 2 else 0)
        reward.append(tiny_mdp.REWARD[state, action].item() if state != 2 else 99.0)
        if state != 2:
            middle = (EDGES[cell] + EDGES[cell + 1]) / 2
            state = int((tiny_mdp.P[state, action].cumsum(0) < middle).sum())
    return states, reward, alive


PLAYED = [[play(seed, plan) for plan in PLANS] for seed in SEEDS]
STATES, REWARDS, LIVING = (
    torch.tensor([[played[k] for played in row] for row in PLAYED], dtype=kind).permute(2, 0, 1)
    for k, kind in enumerate((torch.int64, F64, torch.bool))
)  # (3, seeds, plans)
ACTIONS = torch.tensor(PLANS).T[:, None].expand_as(STATES)


class Grouped:
    """Every group of `size` episodes of every seed, side by side: (3, N) each, N = seeds x plans^size x size.

    `chance` (N / size,) is a group's.
    """

    def __init__(self, size, theta=tiny_mdp.THETA, reward=REWARDS):
        members = torch.tensor(list(product(range(len(PLANS)), repeat=size)))
        self.size, self.theta = size, theta
        self.state, self.action, self.alive, self.reward = (
            x[:, :, members].flatten(1) for x in (STATES, ACTIONS, LIVING, reward)
        )
        log_pi = theta.view(2, 2).log_softmax(-1)[STATES, ACTIONS]
        of_plan = torch.where(LIVING, log_pi, -LOG_2).sum(0).exp()
        self.chance = (OF_SEED[:, None] * of_plan[:, members].prod(-1)).flatten()

    def gradient(self, advantage, length="batch"):
        """What zoo/grpo.py ascends: the mean over groups, and in them over episodes, of sums over steps."""
        old = self.forward(self.theta, self.state).log_prob(self.action)
        weight = self.chance.repeat_interleave(self.size) / self.size * step_weights(self.alive, length)
        columns = (self.state, self.action, old, old, advantage, weight)
        steps = Steps(*(x[self.alive] for x in columns))
        loss = lambda x: group_loss(x, steps, self.forward, grpo.Args())[0]  # noqa: E731
        return -grad(loss)(self.theta) * len(steps.obs)  # the loss is a mean over steps

    def advantages(self, **args):
        return grpo.advantages(self.reward, self.alive, grpo.Args(group_size=self.size, **args))

    @staticmethod
    def forward(theta, state):
        return grpo.Categorical(theta.view(-1, 2)[state])

    def sampled(self, advantage):
        """Each group's own estimate (N / size, 4)."""
        score = tiny_mdp.score(self.state.flatten(), self.action.flatten()).view(*self.state.shape, 4)
        return ((advantage * self.alive)[..., None] * score).sum(0).view(-1, self.size, 4).mean(1)

    def variance(self, advantage):
        """That of one group's estimate, summed over parameters."""
        found = self.sampled(advantage)
        return (self.chance @ found**2 - (self.chance @ found) ** 2).sum().item()


PAIRS = Grouped(2)


def test_43_a_seed_and_what_is_done_make_an_episode():
    """The check of the enumeration: episodes of all seeds have the chances that the tiny MDP gives them."""
    close(PAIRS.chance.sum(), torch.tensor(1.0, dtype=F64))
    returns = torch.where(PAIRS.alive, PAIRS.reward, 0).sum(0)
    every = PAIRS.chance.repeat_interleave(2) / 2
    of_mdp = torch.tensor([tiny_mdp.total(t, 1.0) for t in ALL], dtype=F64)
    for power in (1, 2, 3):
        close(every @ returns**power, chances() @ of_mdp**power)


@pytest.mark.parametrize("advantage", ["outcome", "to-go"])
@pytest.mark.parametrize("size", [2, 3])
def test_43_a_group_of_episodes_from_one_seed_has_the_gradient_times_1_less_1_over_g(size, advantage):
    """S4 (3.12) on control, E over seeds and actions: they share start and noise, and the mean of the group
    is still a baseline; with the episode itself in it, the gradient's length is 1 - 1/G of the true one's.
    To-go keeps the direction because an episode that has ended counts as 0.
    """
    groups = Grouped(size)
    found = groups.gradient(groups.advantages(advantage=advantage))
    close(found, (1 - 1 / size) * tiny_mdp.exact_gradient(1.0))
    if advantage == "outcome":
        discounted = groups.gradient(groups.advantages(advantage=advantage, gamma=0.7))
        close(discounted, (1 - 1 / size) * tiny_mdp.exact_gradient(0.7))


def test_43_a_mean_over_those_still_alive_is_no_baseline():
    """To-go less the mean of the episodes that go on: what is left of an action's credit depends on how many
    there are, and the direction is another one.
    """
    to_go = torch.where(PAIRS.alive, PAIRS.reward, 0).flip(0).cumsum(0).flip(0)
    pairs, alive = (x.view(3, -1, 2) for x in (to_go, PAIRS.alive))
    mean = (pairs * alive).sum(-1, keepdim=True) / alive.sum(-1, keepdim=True).clamp(min=1)
    found = PAIRS.gradient(((pairs - mean) * alive).view(3, -1))
    assert cosine(found, tiny_mdp.exact_gradient(1.0)) < 1 - 1e-4  # where equal directions have 1 - 1e-16


def test_43_what_the_seed_decides_cancels_in_a_group():
    """What a group is for. A bonus for where the episode begins leaves every group's estimate as it was, and
    adds to the variance of unrelated episodes, of the same expectation. Where the seed decides little a group
    gains nothing: without the bonus its variance is not even the smaller one.
    """
    n = len(ALL)
    i, j = (x.flatten() for x in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
    pairs = torch.stack((i, j), 1).flatten()
    bonus = torch.tensor([0.0, 20.0], dtype=F64)
    found = {}
    for which in ("shared", "unrelated"):
        groups = Grouped(2)
        if which == "unrelated":
            groups.chance = chances()[i] * chances()[j]
            groups.state, groups.action, groups.reward, groups.alive = (
                x[:, pairs] for x in (STATE.clamp(max=1), ACTION, REWARD, ALIVE)
            )
        plain = groups.advantages()
        groups.reward = torch.cat((groups.reward[:1] + bonus[groups.state[:1]], groups.reward[1:]))
        paid = groups.advantages()
        close(groups.gradient(plain), tiny_mdp.exact_gradient(1.0) / 2)
        found[which] = plain, paid, groups.variance(plain), groups.variance(paid)
    plain, paid, *variances = found["shared"]
    close(plain, paid)
    assert found["unrelated"][3] > 3 * variances[1] and found["unrelated"][2] < variances[0]


class Answer:
    """Right or wrong with the first action, then any number of steps that change nothing: states 0 (asked),
    1 (was right), 2 (was wrong), in which action 1 stops; at most 5 steps. All pairs of episodes, as Grouped.
    """

    THETA = torch.tensor([0.4, -0.1, 0.3, -0.2, 0.1, 0.0], dtype=F64)

    def __init__(self):
        episodes = [(first, steps) for first in (0, 1) for steps in range(2, 6)]  # steps in all
        cut = {5: [0]}  # the last one may go on or stop
        plans = [
            (first, [first, *[0] * (n - 2), last]) for first, n in episodes for last in (1, *cut.get(n, ()))
        ]
        rows = [([0] + [1 + first] * (len(acts) - 1), acts, [1.0 - first]) for first, acts in plans]
        fill = lambda x: [*x, *[0] * (5 - len(x))]  # noqa: E731
        state, action = (torch.tensor([fill(row[k]) for row in rows]).T for k in (0, 1))
        reward = torch.tensor([fill(row[2]) for row in rows], dtype=F64).T
        self.length = torch.tensor([len(row[1]) for row in rows])
        alive = torch.arange(5)[:, None] < self.length
        self.right = reward[0]
        self.one = (state, action, alive)
        n = len(rows)
        pairs = torch.stack(torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"), -1)
        grouped = Grouped.__new__(Grouped)
        grouped.size, grouped.theta = 2, self.THETA
        grouped.state, grouped.action, grouped.alive, grouped.reward = (
            x[:, pairs.flatten()] for x in (state, action, alive, reward)
        )
        chance = self.chance(self.THETA)
        close(chance.sum(), torch.tensor(1.0, dtype=F64))
        grouped.chance = (chance[:, None] * chance).flatten()
        self.grouped = grouped

    def chance(self, theta):
        state, action, alive = self.one
        log_prob = Grouped.forward(theta, state).log_prob(action)
        return (log_prob * alive).sum(0).exp()

    def mean_length(self, theta, which):
        weight = self.chance(theta) * which
        return (weight * self.length).sum() / weight.sum()


def test_44_one_over_the_length_shortens_good_episodes_and_lengthens_bad_ones():
    """arXiv:2503.20783 on control: the return does not depend on how long an episode lasts, and the gradient
    leaves that alone. Divided by the length, a step makes good episodes shorter and bad ones longer.
    """
    task = Answer()
    advantage = task.grouped.advantages()
    for length, moved in (("batch", False), ("episode", True)):
        step = task.grouped.gradient(advantage, length)
        shorter, longer = (
            grad(task.mean_length)(task.THETA, which) @ step for which in (task.right, 1 - task.right)
        )
        if moved:
            assert shorter < -1e-3 and longer > 1e-3
        else:
            close(torch.stack((shorter, longer)), torch.zeros(2, dtype=F64))
            true = grad(lambda x: task.chance(x) @ task.right)(task.THETA)
            close(step, true / 2)


def test_45_comparing_steps_is_another_objective_where_lengths_differ():
    """The mean reward of a step, taken off each step, is a baseline only among episodes of one length: in a
    large group it is the gradient of E[sum_t (r_t - m)], which is nothing where all steps pay the same.
    """
    true = tiny_mdp.exact_gradient(1.0)
    found = PAIRS.gradient(PAIRS.advantages(advantage="process"))
    assert cosine(found, true) < 0.999 and cosine(PAIRS.gradient(PAIRS.advantages()), true) > 1 - 1e-12
    alive = PAIRS.alive.to(F64)
    mean = 2.0
    to_go = ((PAIRS.reward - mean) * alive).flip(0).cumsum(0).flip(0)
    less = tiny_mdp.exact_gradient(1.0) - mean * grad(lambda x: chances(x) @ ALIVE.to(F64).sum(0))(
        tiny_mdp.THETA
    )
    close(PAIRS.gradient(to_go), less)
    # the same through process_advantages: beside an episode that makes the mean of the group that constant
    beside = torch.stack((PAIRS.reward.T, 2 * mean - PAIRS.reward.T), 1)
    both = PAIRS.alive.T[:, None].expand(-1, 2, -1)
    close(grpo.process_advantages(beside, both, std=False)[:, 0].T, to_go)
    ones = Grouped(2, reward=torch.ones_like(REWARDS))
    assert ones.gradient(ones.advantages()).norm() > 0.01
    close(ones.gradient(ones.advantages(advantage="process")), torch.zeros(4, dtype=F64))


def test_46_on_control_too_the_standard_deviation_turns_the_direction():
    """It weighs seeds: those where little is at stake count as much as the others."""
    true = tiny_mdp.exact_gradient(1.0)
    plain, divided = (PAIRS.gradient(PAIRS.advantages(std=std)) for std in (False, True))
    close(plain, true / 2)
    assert cosine(divided, true) < 0.9995
