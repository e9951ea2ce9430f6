"""Preferences: the losses against enumeration and `imitation`'s, clips, questions, teachers, probes, whole
runs, and what is refused.
"""

import itertools
import json
import math
import signal
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from command import rows, run
from gymnasium.spaces import Box, Discrete
from probes import TWO_TO_SIX, Probe
from torch.func import grad_and_value
from torch.nn import functional as F

from zoo import preferences, rlhf
from zoo.common.cli import main
from zoo.common.device import flatten
from zoo.common.envs import make_envs
from zoo.common.errors import RunFault, UsageError
from zoo.common.files import load_checkpoint
from zoo.common.horizon import early_end, fixed_horizon, time_limit
from zoo.common.normalize import new_stats, normalize, update_stats
from zoo.common.optim import new_adam
from zoo.preferences import (
    Args,
    Comparisons,
    Pool,
    RewardEnsemble,
    add_answers,
    clip_starts,
    disagreement,
    draw_clips,
    draw_questions,
    labels_due,
    predicted_reward,
    preference_loss,
    ranking_log_prob,
    reward_loss,
    teach,
)

F64 = torch.float64


class Always(Probe):
    """For ever, cut by a time limit of 8: action 1 pays 1, action 0 pays -1; times `factor`."""

    factor = 1.0
    action_space = Discrete(2)

    def step(self, action):
        return self.see(), self.factor * (1.0 if action == 1 else -1.0), False, False, {}


class AlwaysOnObs(Probe):
    """The same in a box: the observation is a random sign, bounds [2, 6], the reward is -(a - 4 - o)^2."""

    action_space = TWO_TO_SIX

    def see(self):
        self.obs = float(self.np_random.choice((-1.0, 1.0)))
        return super().see()

    def step(self, action):
        reward = -float((action[0] - 4.0 - self.obs) ** 2)
        return self.see(), reward, False, False, {}


class FarOff(AlwaysOnObs):
    """The same, its observations 3 and 7."""

    observation_space = Box(-10.0, 10.0, (1,), np.float32)

    def see(self):
        return 5 + 2 * super().see()


class Ends(Always):
    """Ends in its sixth step, in the 30th episode and later; earlier ones are cut at 8."""

    resets = t = 0

    def reset(self, **given):
        self.resets, self.t = self.resets + 1, 0
        return super().reset(**given)

    def step(self, action):
        self.t += 1
        obs, reward, _, _, info = super().step(action)
        return obs, reward, self.t == 6 and self.resets >= 30, False, info


for cls in (Always, AlwaysOnObs, FarOff, Ends):
    if f"probe/{cls.__name__}-v0" not in gym.registry:
        gym.register(f"probe/{cls.__name__}-v0", cls, max_episode_steps=8)


def small(folder, env, **changes):
    """Arguments of a run that learns a probe in a second or two."""
    sizes = dict(num_envs=8, num_steps=16, minibatch_size=64, total_steps=128 * 12, learning_rate=5e-3)
    labels = dict(labels=30, clip_length=4, pool=4, first=2, ask_every=2)
    model = dict(reward_batch=16, reward_hidden=(16, 16), reward_learning_rate=5e-3, reward_passes=60)
    plumbing = dict(compile=False, eval_every=0, eval_episodes=2, env_threads=1, progress=False)
    given: dict[str, Any] = {**sizes, **labels, **model, **plumbing, "run_dir": str(folder), **changes}
    return Args(env=env, **given)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 4])
def test_a_rankings_probability_is_that_of_choosing_the_best_again_and_again(k):
    score, total = torch.randn(k, dtype=F64, generator=generator(k)), 0.0
    for order in itertools.permutations(range(k)):
        p, left = 1.0, list(range(k))
        for chosen in order:
            p *= math.exp(score[chosen]) / sum(math.exp(score[i]) for i in left)
            left.remove(chosen)
        assert ranking_log_prob(score[list(order)]).exp().item() == pytest.approx(p, rel=1e-12)
        total += p
    assert total == pytest.approx(1.0)


def test_a_ranking_of_two_is_bradley_terrys():
    score = torch.randn(50, 2, dtype=F64, generator=generator())
    torch.testing.assert_close(ranking_log_prob(score), F.logsigmoid(score[:, 0] - score[:, 1]))
    sure = torch.ones(50, dtype=F64)
    loss = preference_loss(score, sure, 0.0).mean()
    torch.testing.assert_close(loss, rlhf.ranking_loss(score)[0])


@pytest.mark.parametrize("error", [0.0, 0.1, 0.5])
def test_the_loss_of_pairs_is_the_cross_entropy_with_a_share_of_chance(error):
    score = 3 * torch.randn(40, 2, dtype=F64, generator=generator())
    first = torch.tensor([1.0, 0.5, 0.0, 1.0], dtype=F64).repeat(10)
    p = (1 - error) * (score[:, 0] - score[:, 1]).sigmoid() + error / 2
    theirs = F.binary_cross_entropy(p, first, reduction="none")
    torch.testing.assert_close(preference_loss(score, first, error), theirs)


def test_the_loss_of_a_ranking_has_a_share_of_chance_of_one_in_k_factorial():
    score = torch.randn(3, dtype=F64, generator=generator())
    probabilities = [
        math.exp(-preference_loss(score[list(order)], torch.tensor(1.0, dtype=F64), 0.3).item())
        for order in itertools.permutations(range(3))
    ]
    exact = ranking_log_prob(score).exp().item()
    assert probabilities[0] == pytest.approx(0.7 * exact + 0.3 / 6)
    assert sum(probabilities) == pytest.approx(1.0)


def test_an_answer_that_is_surely_wrong_pulls_with_a_bounded_force():
    """That is what the share of chance is for: without it the gradient stays 1, with it it vanishes."""
    score = torch.tensor([-30.0, 0.0], dtype=F64)
    pull = {
        e: grad_and_value(preference_loss)(score, torch.tensor(1.0, dtype=F64), e)[0][0].item()
        for e in (0.0, 0.1)
    }
    assert pull[0.0] == pytest.approx(-1.0) and abs(pull[0.1]) < 1e-10


def member(ensemble, m, x):
    """A member's rewards (B,) of x (B, F), with nothing batched."""
    for i, (weight, bias) in enumerate(zip(ensemble.weights, ensemble.biases, strict=True)):
        x = (F.leaky_relu(x) if i else x) @ weight[m] + bias[m]
    return x[:, 0]


def test_the_ensemble_is_its_members_and_its_gradient_theirs():
    torch.manual_seed(0)
    ensemble = RewardEnsemble(5, (7, 6), 3).double()
    params, unflatten = flatten(ensemble)
    x = torch.randn(3, 8, 2, 4, 5, dtype=F64, generator=generator())
    first = torch.tensor([1.0, 0.0, 0.5, 1.0], dtype=F64).repeat(3, 2)

    def forward(params, x):
        return torch.func.functional_call(ensemble, unflatten(params), (x,))

    grad, (loss, metrics) = grad_and_value(reward_loss, has_aux=True)(params, x, first, forward, 0.1)
    own, right = 0.0, []
    for m in range(3):
        returns = member(ensemble, m, x[m].reshape(-1, 5)).view(8, 2, 4).sum(-1)
        p = 0.9 * (returns[:, 0] - returns[:, 1]).sigmoid() + 0.05
        own = own + F.binary_cross_entropy(p, first[m])
        right += [
            (d > 0) == (f > 0.5)
            for d, f in zip(returns[:, 0] - returns[:, 1], first[m], strict=True)
            if f != 0.5
        ]
    theirs = torch.cat([g.flatten() for g in torch.autograd.grad(own, list(ensemble.parameters()))])
    torch.testing.assert_close(loss, own.detach())
    torch.testing.assert_close(grad, theirs)
    assert metrics["reward_loss"].item() == pytest.approx(own.item() / 3)
    assert metrics["reward_accuracy"].item() == pytest.approx(np.mean(right))


# --- clips and questions ------------------------------------------------------------------------------------


def some_pool(ended):
    """A pool whose observations tell where they are from: rollout, step, environment."""
    where = torch.stack(torch.meshgrid(*(torch.arange(n) for n in ended.shape), indexing="ij"), -1)
    reward = where[..., 1].float() + 100 * where[..., 2]
    return Pool(where.float(), where[..., 0], reward, ended, torch.zeros(*ended.shape, 0))


@pytest.mark.parametrize("length", [1, 2, 5])
def test_clips_begin_where_no_episode_ends_within(length):
    ended = torch.rand(3, 12, 4, generator=generator()) < 0.2
    starts = clip_starts(ended, length)
    assert starts.shape == (3, 12 - length + 1, 4)
    for rollout, t, env in itertools.product(range(3), range(12 - length + 1), range(4)):
        assert starts[rollout, t, env] == (not ended[rollout, t : t + length - 1, env].any())


def test_clips_are_steps_of_one_episode_in_their_order():
    ended = torch.rand(3, 12, 4, generator=generator(1)) < 0.2
    pool = some_pool(ended)
    everything = int(clip_starts(ended, 4).sum())
    clips = draw_clips(pool, 10_000, 4, generator())
    assert len(clips.obs) == everything and len({tuple(obs[0].tolist()) for obs in clips.obs}) == everything
    for obs, action, reward in zip(clips.obs.long(), clips.action, clips.reward, strict=True):
        (rollout, start, env), steps = obs[0].tolist(), obs[:, 1]
        assert (obs[:, 0] == rollout).all() and (obs[:, 2] == env).all() and (action == rollout).all()
        assert steps.tolist() == list(range(start, start + 4))
        assert not ended[rollout, start : start + 3, env].any()
        torch.testing.assert_close(reward, steps.float() + 100 * env)
    drawn = Counter(
        tuple(draw_clips(pool, 1, 4, generator(i)).obs[0, 0].tolist()) for i in range(4 * everything)
    )
    assert max(drawn.values()) <= 16 and len(drawn) > 0.9 * everything  # all of them, about equally often


def test_where_no_clip_fits_the_run_says_so():
    with pytest.raises(RunFault, match="no two clips of 3 steps"):
        draw_clips(some_pool(torch.ones(2, 6, 2, dtype=torch.bool)), 4, 3, generator())


def test_disagreement_by_hand():
    """Two members say 3/4 and 1/4 (variance 1/16), both 3/4 (0), 1/2 and 3/4 (1/64)."""
    three = math.log(3.0)
    score = torch.tensor(
        [[[three, 0.0], [three, 0.0], [7.0, 7.0]], [[0.0, three], [2 * three, three], [three, 0.0]]]
    )
    torch.testing.assert_close(disagreement(score), torch.tensor([1 / 16, 0.0, 1 / 64]))
    pairs = [score[..., list(pair)] for pair in ((0, 1),)]
    third = torch.stack((score[..., 0], score[..., 0], score[..., 1]), -1)  # of K = 3 the mean over pairs
    torch.testing.assert_close(disagreement(third), disagreement(pairs[0]) * 2 / 3)


def test_the_questions_are_those_that_members_disagree_about():
    score = torch.zeros(2, 6)
    score[0, 2], score[1, 2] = 3.0, -3.0  # everything with clip 2 in it is open
    args = Args(queries="disagreement", drawn=10)
    asked = draw_questions(score, 6, 5, args, generator())
    assert asked.shape == (5, 2) and (asked == 2).any(1).all() and (asked[:, 0] != asked[:, 1]).all()
    for other in (
        draw_questions(score, 6, 300, replace(args, queries="random"), generator()),
        draw_questions(None, 6, 300, args, generator()),
    ):
        assert 0.2 < (other == 2).any(1).float().mean() < 0.47  # chance: 1/3
        assert (other[:, 0] != other[:, 1]).all()


def test_labels_fall_due_a_share_at_once_and_then_ever_more_slowly():
    args = Args(labels=1000, start=0.2, total_steps=100_000)
    due = [labels_due(args, step) for step in range(0, 100_001, 1000)]
    assert due[0] == 200 and due[-1] == 1000 and due == sorted(due)
    assert due[50] == 200 + int(800 * math.log(3) / math.log(5))
    first, last = due[1] - due[0], due[-1] - due[-2]
    assert first / last == pytest.approx(5, abs=0.8)
    assert labels_due(replace(args, start=1.0), 0) == 1000 and labels_due(replace(args, start=0.0), 0) == 1


def test_answers_are_appended_and_what_is_too_many_is_left_out():
    known = Comparisons(torch.zeros(5, 2, 3, 1), torch.zeros(5, 2, 3), torch.zeros(5), torch.zeros(400, 5), 0)
    obs = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 2, 3, 1) + 1
    once = add_answers(known, obs, obs[..., 0], torch.tensor([1.0, 0.5, 1.0, 0.0]), generator())
    assert once.answered == 4 and known.answered == 0 and not known.obs.any()  # the old ones are as they were
    assert once.first.tolist() == [1.0, 0.5, 1.0, 0.0, 0.0] and once.obs[:, 0, 0, 0].tolist() == [
        1,
        2,
        3,
        4,
        0,
    ]
    twice = add_answers(once, obs, obs[..., 0], torch.ones(4), generator(1))
    assert twice.answered == 5 and twice.first.tolist() == [1.0, 0.5, 1.0, 0.0, 1.0]
    assert torch.equal(twice.weight[:, :4], once.weight[:, :4])
    # Poisson(1), the bootstrap's law for long lists
    weight = twice.weight.flatten()
    assert weight.mean().item() == pytest.approx(1.0, abs=0.08) and weight.var().item() == pytest.approx(
        1.0, abs=0.15
    )


# --- teachers -----------------------------------------------------------------------------------------------

# two comparisons of two clips of three steps: returns 6 and 5, 1 and 1
REWARDS = torch.tensor([[[1.0, 2.0, 3.0], [5.0, 0.0, 0.0]], [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]], dtype=F64)
MEAN = torch.tensor(4.0, dtype=F64)


def taught(reward=REWARDS, mean=MEAN, seed=0, **changes):
    answers = teach(reward, mean, replace(Args(), ranked=reward.shape[1], **changes), generator(seed))
    return answers.order.tolist(), answers.equal.tolist(), answers.skipped.tolist()


def test_the_exact_teacher():
    order, equal, skipped = taught()
    assert order[0] == [0, 1] and taught(REWARDS.flip(1))[0][0] == [1, 0]
    assert equal == [False, True]  # the second two are equal, whatever their order
    assert skipped == [False, False]
    assert taught(REWARDS[:1].repeat(1, 2, 1)[:, [1, 0, 2]] * torch.tensor([1.0, 3.0, 2.0])[:, None])[0] == [
        [1, 2, 0]
    ]


def test_the_myopic_teacher_weighs_what_comes_last():
    """At 1/2: 1/4 + 2/2 + 3 = 4.25 against 5/4, and 1 against 1/4."""
    assert taught(myopia=0.5)[0] == [[0, 1], [0, 1]]
    late = torch.tensor([[[0.0, 0.0, 2.0], [5.0, 0.0, 0.0]]], dtype=F64)
    assert taught(late)[0] == [[1, 0]] and taught(late, myopia=0.5)[0] == [[0, 1]]  # 2 against 5/4
    assert taught(late, myopia=0.7)[0] == [[1, 0]]  # 2 against 2.45


def test_the_teacher_that_calls_near_ones_equal():
    assert taught(equal=0.25)[1] == [True, True]  # they differ by 1, a quarter of 4
    assert taught(equal=0.24)[1] == [False, True]
    assert taught(mean=-MEAN, equal=0.25)[1] == [True, True]


def test_the_skipping_teacher():
    assert taught(skip=0.25)[2] == [False, True]  # the better of two must be above 1
    assert taught(skip=0.24)[2] == [False, False] and taught(skip=1.0)[2] == [False, True]
    # returns below 0: none above -6, a half of |mean| below the mean
    assert taught(-REWARDS, -MEAN, skip=0.5)[2] == [False, False]
    assert taught(-REWARDS - 1, -MEAN, skip=0.5)[2] == [True, False]


def test_the_mistaken_teacher():
    many = REWARDS[:1].expand(4000, -1, -1)
    assert taught(many, mistake=1.0)[0] == [[1, 0]] * 4000
    wrong = sum(order == [1, 0] for order in taught(many, mistake=0.2)[0])
    assert wrong / 4000 == pytest.approx(0.2, abs=5 * math.sqrt(0.16 / 4000))


@pytest.mark.parametrize("k", [2, 3])
def test_the_boltzmann_rational_teacher_answers_by_the_models_law(k):
    reward, n = torch.tensor([0.3, 0.0, 0.8], dtype=F64)[:k].view(1, k, 1), 20_000
    orders = Counter(map(tuple, taught(reward.expand(n, -1, -1), rationality=2.0)[0]))
    for order in itertools.permutations(range(k)):
        p = ranking_log_prob(2.0 * reward[0, list(order), 0]).exp().item()
        assert orders[order] / n == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n))
    assert taught(reward, rationality=1e9)[0] == taught(reward)[0]


# --- predictions --------------------------------------------------------------------------------------------


def test_predicted_rewards_by_hand():
    reward = torch.tensor([[1.0, 3.0], [10.0, 10.0]])
    mean, std = torch.tensor([1.0, 5.0]), torch.tensor([2.0, 5.0])
    # normalised: 0, 1 and 1, 1; half their difference is their standard deviation
    assert predicted_reward(reward, mean, std, 0.0).tolist() == [0.5, 1.0]
    assert predicted_reward(reward, mean, std, 2.0).tolist() == [-0.5, 1.0]


def test_reward_networks_read_the_action_that_is_carried_out():
    envs = make_envs("probe/Bounds-v0", 1)
    obs, action = torch.zeros(2, 1), torch.tensor([[3.0, -3.0, 3.0, -3.0], [0.5, 0.5, 0.5, 0.5]])
    x = preferences.reward_inputs(envs, obs, action, new_stats(1))
    assert x[:, 1:].tolist() == [[1.0, -1.0, 3.0, -3.0], [0.5] * 4]  # the last two have no bounds
    x = preferences.reward_inputs(make_envs("probe/Always-v0", 1), obs, torch.tensor([0, 1]), new_stats(1))
    assert x[:, 1:].tolist() == [[1.0, 0.0], [0.0, 1.0]]


# --- what is learned from answers ---------------------------------------------------------------------------


def test_the_teachers_answers_are_kept_as_they_were_given(monkeypatch):
    """The clips in the teacher's order, "equal" as a half, what was skipped left out; the thresholds are
    shares of the mean return of all clips drawn."""
    pool, given = some_pool(torch.zeros(2, 12, 4, dtype=torch.bool)), []

    def answers(reward, mean, args, generator):
        given.extend((reward, mean))
        order = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [1, 0]])
        skipped = torch.tensor([False, False, True, False, True])
        return preferences.Answers(order, torch.tensor([False, True, False, False, False]), skipped)

    monkeypatch.setattr(preferences, "teach", answers)
    args = Args(labels=9, clip_length=3, queries="random", members=2)
    columns = torch.zeros(9, 2, 3, 3), torch.zeros(9, 2, 3, dtype=torch.int64), torch.zeros(9)
    known = Comparisons(*columns, torch.zeros(2, 9), 0)
    known = preferences.ask(5, 1, pool, known, None, None, args, generator())
    clips = draw_clips(pool, 10, 3, generator())
    assert given[1].item() == pytest.approx(clips.reward.sum(-1).mean().item())
    obs = known.obs[:3]
    kept = obs[..., 1] + 100 * obs[..., 2]  # what they were paid
    expected = torch.stack((given[0][0], given[0][1].flip(0), given[0][3].flip(0)))
    assert torch.equal(kept.double(), expected)
    assert torch.equal(known.action[:3], obs[..., 0].long())
    assert known.answered == 3 and known.first[:3].tolist() == [1.0, 0.5, 1.0]


def test_each_member_learns_from_its_own_sample_for_as_long_as_new_answers_are_worth():
    """Member m's has rows m and m + 3 alone, 4 is in none; rates fall, Adam goes on."""
    args = Args(members=3, reward_batch=8, reward_passes=90, reward_learning_rate=0.5)
    weight = torch.zeros(3, 9)
    weight[[0, 0, 1, 1, 2, 2], [0, 3, 1, 4, 2, 5]] = 1.0
    x, first = torch.randn(9, 2, 4, 5), torch.tensor([1.0, 0.5, 0.0] * 3)
    known = Comparisons(torch.zeros(9, 2, 4, 3), torch.zeros(9, 2, 4, 2), first, weight, 6)
    model, calls = preferences.RewardModel(torch.zeros(1), {"t": 0}, torch.zeros(3), torch.ones(3)), []

    def fit(params, opt, x, first, order, rate):
        calls.append((params.item(), opt["t"], x, first, order, rate.item()))
        return params + 1, {"t": opt["t"] + 1}, {}

    def rewards(model, rows):
        assert model.params == len(calls)
        return torch.arange(3.0)[:, None] * rows[:, 0] + 1

    found, _ = preferences.refit(model, known, 5, x, 0.25, fit, rewards, args, generator())
    assert len(calls) == 3  # 5 x 90 comparisons, of which a call has 25 x 8
    for i, (params, t, given, theirs, order, rate) in enumerate(calls):
        assert (params, t, rate) == (i, i, 0.125) and given is x and torch.equal(theirs, first)
        assert order.shape == (25, 3, 8)
        for m in range(3):
            assert order[:, m].unique().tolist() == [m, m + 3]
            assert 0.35 < (order[:, m] == m).float().mean() < 0.65
        assert not torch.equal(order[:, 0], order[:, 1] - 1)
    assert found.params == 3 and found.opt["t"] == 3
    reward = rewards(found, x[:6].flatten(0, 2))
    torch.testing.assert_close(found.mean, reward.mean(1))
    torch.testing.assert_close(found.std, reward.std(1).clamp(min=1e-6))


def test_a_step_of_the_reward_model_takes_the_share_of_chance_that_was_asked_for():
    torch.manual_seed(0)
    ensemble = RewardEnsemble(5, (7,), 2)
    params, unflatten = flatten(ensemble)
    x, first = torch.randn(6, 2, 4, 5, generator=generator()), torch.tensor([1.0, 0.5, 0.0] * 2)
    order = torch.tensor([[[0, 1, 2], [5, 5, 3]]])

    def forward(params, x):
        return torch.func.functional_call(ensemble, unflatten(params), (x,))

    for share in (0.0, 0.4):
        args = Args(members=2, error_model=share)
        _, opt, _ = preferences.fit(
            forward, args, params, new_adam(params), x, first, order, torch.tensor(0.1)
        )
        grad = grad_and_value(reward_loss, has_aux=True)(params, x[order[0]], first[order[0]], forward, share)
        torch.testing.assert_close(opt["m"], 0.1 * grad[0])


def test_an_update_scales_its_gradient_down():
    """Adam's first moment is a tenth of the first gradient's, whose norm is --max-grad-norm."""
    params, args = torch.tensor([0.5, -0.5]), Args(max_grad_norm=0.01, minibatch_size=4)

    def forward(params, obs):
        return preferences.Categorical(params * obs), obs[:, 0] * params[0]

    action, ones = torch.tensor([0, 1, 1, 0]), [torch.ones(4)] * 4
    batch = preferences.Batch(torch.ones(4, 2), action, *ones)
    _, opt, metrics = preferences.update(
        params, new_adam(params), batch, torch.tensor(0.1), torch.tensor(1.0), forward, args
    )
    assert opt["m"].norm().item() == pytest.approx(1e-3, rel=1e-3) and metrics["grad_norm"] > 0.05


# --- imitation's numbers ------------------------------------------------------------------------------------

IMITATION = json.loads((Path(__file__).parent / "imitation.json").read_text())


@pytest.mark.parametrize("case", IMITATION["losses"], ids=lambda case: f"noise {case['noise']}")
def test_losses_equal_imitations(case):
    rewards = torch.tensor(IMITATION["rewards"], dtype=F64)  # (Q, 2, L)
    first = torch.tensor(IMITATION["preferences"], dtype=F64)

    def loss(rewards):
        return preference_loss(rewards.sum(-1), first, case["noise"]).mean()

    grad, value = grad_and_value(loss)(rewards)
    assert value.item() == pytest.approx(case["loss"], rel=1e-6)
    torch.testing.assert_close(grad, torch.tensor(case["gradient"], dtype=F64), rtol=1e-5, atol=1e-7)


def test_disagreement_equals_imitations():
    rewards = torch.tensor(IMITATION["member_rewards"], dtype=F64)  # (M, Q, 2, L)
    ours = disagreement(rewards.sum(-1))
    torch.testing.assert_close(ours, torch.tensor(IMITATION["disagreement"], dtype=F64), rtol=1e-5, atol=1e-7)


# --- probes and whole runs ----------------------------------------------------------------------------------


def acts(args, *obs):
    """The trained policy's deterministic actions, in the environment's scale."""
    envs = make_envs(args.env, 1)
    acting = load_checkpoint(Path(args.run_dir) / "agent.pt", "--agent", "preferences")["state"]
    policy = preferences.make_policy(envs, args, acting)
    return envs.to_env_action(policy(np.array(obs, np.float32)[:, None])).reshape(-1).tolist()


@pytest.mark.parametrize(
    "changes", [{}, dict(ranked=3), dict(queries="random", mistake=0.1), dict(pessimism=1.0)]
)
def test_probe_acting(tmp_path, changes):
    args = small(tmp_path, "probe/Always-v0", **changes)
    assert preferences.train(args) == 8.0
    assert acts(args, 0.0) == [1]
    table = rows(tmp_path)
    assert table[-1]["labels"] == "29" and float(table[2]["reward_correlation"]) > 0.9


def test_probe_acting_on_the_observation_in_a_box(tmp_path):
    args = small(tmp_path, "probe/AlwaysOnObs-v0", labels=100, total_steps=128 * 25, log_std=-0.5)
    preferences.train(args)
    assert acts(args, -1.0, 1.0) == pytest.approx([3.0, 5.0], abs=0.5)


def state_of(folder):
    return load_checkpoint(Path(folder) / "checkpoint.pt", "--resume")["state"]


def same(one, other):
    """Whether two nested states are equal to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_the_true_reward_is_never_trained_on(tmp_path, monkeypatch):
    """With answers that do not depend on it, a poisoned reward changes no bit of what is learned; an exact
    teacher's answers do not depend on its scale."""
    monkeypatch.setattr(preferences, "teach", lambda reward, mean, args, generator: preferences.Answers(
        torch.rand(reward.shape[:2], generator=generator).argsort(), torch.zeros(len(reward)).bool(),
        torch.zeros(len(reward)).bool(),
    ))  # fmt: skip
    states = []
    for factor in (1.0, -1000.0):
        monkeypatch.setattr(Always, "factor", factor)
        preferences.train(small(tmp_path / str(factor), "probe/Always-v0", total_steps=128 * 8))
        states.append(state_of(tmp_path / str(factor)))
    assert states[0]["pool"]["reward"].abs().max() * 1000 == states[1]["pool"]["reward"].abs().max()
    for state in states:
        del state["pool"]["reward"]
    assert same(*states)
    monkeypatch.undo()
    for factor in (1.0, 64.0):
        monkeypatch.setattr(Always, "factor", factor)
        preferences.train(
            small(tmp_path / f"exact{factor}", "probe/Always-v0", total_steps=128 * 8, scale_rewards=False)
        )
    one, other = (state_of(tmp_path / f"exact{factor}") for factor in (1.0, 64.0))
    assert same(one["params"], other["params"]) and same(one["known"], other["known"])


def test_predictions_have_mean_0_and_deviation_1_over_the_clips_compared(tmp_path):
    args = small(tmp_path, "probe/AlwaysOnObs-v0", total_steps=128 * 6, ask_every=100, labels=60, start=1.0)
    preferences.train(args)
    state = state_of(tmp_path)
    known, model = state["known"], state["model"]
    assert known["answered"] == 60 and known["weight"].sum() > 0
    ensemble = RewardEnsemble(2, (16, 16), 3)
    torch.nn.utils.vector_to_parameters(model["params"], ensemble.parameters())
    assert (model["std"] > 0).all() and model["std"].shape == (3,)
    # of the statistics at that time: two rollouts of 128 had been counted less the latest
    with torch.no_grad():
        obs = known["obs"].flatten(0, 2)
        envs = make_envs("probe/AlwaysOnObs-v0", 1)
        stats = {
            "mean": torch.zeros(1, dtype=F64),
            "var": torch.ones(1, dtype=F64),
            "count": torch.tensor(1.0),
        }
        reward = ensemble(
            preferences.reward_inputs(envs, obs, known["action"].flatten(0, 2), stats).expand(3, -1, -1)
        )
        normal = predicted_reward(reward, model["mean"], model["std"], 0.0)
    assert normal.mean().item() == pytest.approx(0.0, abs=0.15) and 0.8 < normal.std().item() < 1.05


class Watched:
    """What a run hands on, rollout by rollout: in `seen` dicts with its statistics, the pool it went into,
    what was asked and learned, and what PPO was given.
    """

    def __init__(self, patch):
        self.seen, self.rollouts = [], []
        originals = {
            name: getattr(preferences, name)
            for name in ("collect", "into_pool", "ask", "refit", "as_seen", "improve")
        }

        def collect(*given):
            result = originals["collect"](*given)
            self.rollouts.append(result[0])
            self.seen.append({"epochs": []})
            return result

        def kept(name):
            def function(*given):
                result = originals[name](*given)
                self.seen[-1][name] = (given, result)
                return result

            return function

        def improve(forward, args, params, opt, batch, order, rate, kl_coef):
            result = originals["improve"](forward, args, params, opt, batch, order, rate, kl_coef)
            self.seen[-1]["epochs"].append((params, opt, batch, order, rate.item(), result))
            return result

        for name in originals:
            function = {"collect": collect, "improve": improve}.get(name) or kept(name)
            patch.setattr(preferences, name, function)


@pytest.fixture
def watched(monkeypatch):
    return Watched(monkeypatch)


def predictions(model, x, width=16):
    """The members' rewards (M, ...) of what they read, x (..., F)."""
    ensemble = RewardEnsemble(x.shape[-1], (width, width), len(model.mean))
    torch.nn.utils.vector_to_parameters(model.params, ensemble.parameters())
    with torch.no_grad():
        rows = [member(ensemble, m, x.reshape(-1, x.shape[-1])) for m in range(len(model.mean))]
    return torch.stack(rows).view(-1, *x.shape[:-1])


def read(obs, action, stats):
    """What members read in a box: the observation as it is normalised, and the action within its bounds."""
    return torch.cat((normalize(obs, stats), action.clamp(-1, 1)), -1)


@pytest.mark.parametrize("normalized", [True, False])
def test_who_is_asked_what_learns_what_and_is_paid_what(tmp_path, watched, normalized):
    """Rollout by rollout: when and about which clips is asked, what members are shown of all answers, and the
    reward that PPO gets, its observations seen as by everything before."""
    args = small(
        tmp_path, "probe/FarOff-v0", total_steps=128 * 12, pool=5, first=3, ask_every=4, pessimism=0.7,
        num_epochs=1, normalize_obs=normalized, log_std=0.0,
    )  # fmt: skip
    preferences.train(args)
    assert args.bound_coef == 1.0  # the actions have bounds
    stats, model, answered = new_stats(1), None, 0
    for i, (rollout, seen) in enumerate(zip(watched.rollouts, watched.seen, strict=True)):
        assert ("ask" in seen) == (i + 1 in (3, 7, 11))
        if "ask" in seen:
            (due, begin, pool, known, returns, *_), asked = seen["ask"]
            assert due == labels_due(args, 128 * i) and begin == 8 and known.answered == answered
            latest = watched.rollouts[max(0, i - 4) : i + 1]
            for name in ("obs", "action", "reward"):
                column = torch.stack([getattr(r, name) for r in latest])
                assert torch.equal(getattr(pool, name), column)
            assert torch.equal(pool.ended, torch.stack([r.truncated for r in latest])) and pool.ended.any()
            assert (returns is None) == (model is None)
            if model is not None:
                clips = draw_clips(pool, 6, 4, generator())
                expected = predictions(model, read(clips.obs, clips.action, stats)).sum(-1)
                torch.testing.assert_close(returns(clips), expected, rtol=1e-4, atol=1e-4)
            (old, known, new, x, remaining, *_), (fitted, _) = seen["refit"]
            assert new == asked.answered - answered > 0 and remaining == pytest.approx(1 - i / 12)
            assert model is None or old is model
            assert fitted.opt["t"] == old.opt["t"] + 25 * math.ceil(new * 60 / (25 * 16))
            answered, model = asked.answered, fitted
            torch.testing.assert_close(x[:answered], read(known.obs, known.action, stats)[:answered])
            reward = predictions(model, x[:answered]).flatten(1)
            torch.testing.assert_close(model.mean, reward.mean(1), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(model.std, reward.std(1), rtol=1e-3, atol=1e-4)
        if model is not None:
            (paid, given, *_), _ = seen["as_seen"]
            assert given["count"] == stats["count"]
            reward = predictions(model, read(rollout.obs, rollout.action, stats))
            expected = predicted_reward(reward.flatten(1), model.mean, model.std, 0.7)
            torch.testing.assert_close(paid.reward.flatten(), expected, rtol=1e-3, atol=1e-3)
            assert torch.equal(paid.obs, rollout.obs) and torch.equal(paid.action, rollout.action)
        if normalized:
            stats = update_stats(stats, rollout.obs.flatten(0, 1))
    assert answered > 20


@pytest.mark.parametrize("recomputed", [True, False])
def test_epochs_learn_from_what_acted_and_advantages_from_the_latest_values(tmp_path, watched, recomputed):
    args = small(
        tmp_path, "Pendulum-v1", total_steps=128 * 6, num_epochs=3, recompute_advantages=recomputed, gamma=0.9
    )
    preferences.train(args)
    net = preferences.ActorCritic(make_envs("Pendulum-v1", 1), args.hidden, args.log_std, False)
    sums, last, updates = torch.zeros(8), None, [seen for seen in watched.seen if seen["epochs"]]
    assert len(updates) == 5
    for i, seen in enumerate(updates, 1):
        (*_, given_sums, _), (rollout, *_, next_sums) = seen["as_seen"]
        assert torch.equal(given_sums, sums)
        sums = next_sums
        assert len(seen["epochs"]) == (3 if recomputed else 1)
        for e, (params, opt, batch, order, rate, result) in enumerate(seen["epochs"]):
            torch.nn.utils.vector_to_parameters(params, net.parameters())
            value, next_value = preferences.values(net, rollout)
            if e == 0:
                acted = net.policy(batch.obs).log_prob(batch.action).detach()
                old = value.flatten()
            torch.testing.assert_close(batch.log_prob, acted)
            torch.testing.assert_close(batch.value, old)
            flags = (rollout.terminated, rollout.truncated)
            advantage = preferences.gae(rollout.reward, value, next_value, *flags, 0.9, 0.95)
            torch.testing.assert_close(batch.advantage, advantage.flatten(), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(batch.return_, (advantage + value).flatten(), rtol=1e-3, atol=1e-4)
            assert len(order) == (128 if recomputed else 384) and rate == pytest.approx(5e-3 * (1 - i / 6))
            assert last is None or (torch.equal(params, last[0]) and torch.equal(opt["m"], last[1]["m"]))
            last = result


def test_a_resumed_run_has_its_model_its_pool_and_its_statistics(tmp_path, watched):
    args = small(tmp_path / "run", "Pendulum-v1", total_steps=128 * 5, num_epochs=1, pool=3)
    preferences.train(args)
    saved = state_of(args.run_dir)
    watched.seen.clear(), watched.rollouts.clear()
    preferences.train(replace(args, run_dir=None, resume=args.run_dir, total_steps=128 * 6))
    (seen,) = watched.seen
    assert same(seen["into_pool"][0][0]._asdict(), saved["pool"])
    _, stats, return_stats, *_ = seen["as_seen"][0]
    assert same(stats, saved["obs_stats"]) and same(return_stats, saved["return_stats"])
    assert same(seen["refit"][0][0]._asdict(), saved["model"])
    params, opt, *_ = seen["epochs"][0]
    assert torch.equal(params, saved["params"]) and same(opt, saved["opt"])


def test_the_weight_of_the_kl_follows_it_and_a_target_ends_the_epochs(tmp_path):
    args = small(tmp_path / "adaptive", "probe/Always-v0", surrogate="adaptive-kl", total_steps=128 * 8)
    preferences.train(args)
    table, beta = [row for row in rows(tmp_path / "adaptive") if row["kl_coef"]], torch.tensor(1.0)
    for row in table:
        beta = preferences.adapt_kl_coef(beta, torch.tensor(float(row["approx_kl"])), 0.01)
        assert float(row["kl_coef"]) == pytest.approx(beta.item())
        assert row["epochs"] == "10"
    assert len({row["kl_coef"] for row in table}) > 1
    preferences.train(small(tmp_path / "target", "probe/Always-v0", target_kl=1e-7, total_steps=128 * 4))
    assert [float(row["epochs"]) for row in rows(tmp_path / "target") if row["epochs"]] == [1.0] * 3


def test_a_fixed_horizon_is_evaluated_as_it_is_played(tmp_path, monkeypatch):
    class Made(Exception):
        pass

    def evaluation(args, make):
        raise Made(args.env)

    monkeypatch.setattr(preferences, "Evaluation", evaluation)
    with pytest.raises(Made, match=r"\AFixedHorizon/Hopper-v4\Z"):
        preferences.train(small(tmp_path, "Hopper-v4", fixed_horizon=True))


def test_the_same_seed_gives_the_same_table(tmp_path):
    for name in ("a", "b"):
        preferences.train(
            small(tmp_path / name, "Pendulum-v1", total_steps=128 * 8, eval_every=256, num_epochs=2)
        )
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    preferences.train(
        small(tmp_path / "c", "Pendulum-v1", total_steps=128 * 8, seed=2, eval_every=256, num_epochs=2)
    )
    assert rows(tmp_path / "a") != rows(tmp_path / "c")


def test_compiled_equals_eager(tmp_path):
    """At the defaults' learning rates: Adam's first steps have the rate's size, whatever the gradient's, and
    where that is little more than rounding its sign is chance."""
    results, rates = [], dict(learning_rate=3e-4, reward_learning_rate=1e-3)
    for compiled in (True, False):
        changes = dict(total_steps=128 * 4, compile=compiled, num_epochs=1, **rates)
        args = small(tmp_path / str(compiled), "Pendulum-v1", **changes)
        preferences.train(args)
        results.append(state_of(args.run_dir))
    for part in (lambda state: state["params"], lambda state: state["model"]["params"]):
        torch.testing.assert_close(part(results[0]), part(results[1]), rtol=1e-3, atol=2e-4)
    assert same(results[0]["known"]["first"], results[1]["known"]["first"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_a_run_on_cuda_and_its_resumption(tmp_path, env):
    """Discrete actions on a fixed horizon, and continuous ones."""
    changes = dict(
        device="cuda", compile=True, num_epochs=2, eval_every=256, fixed_horizon=env == "CartPole-v1"
    )
    args = small(tmp_path / "run", env, total_steps=128 * 5, **changes)
    assert np.isfinite(preferences.train(args))
    args = replace(args, run_dir=None, resume=args.run_dir, total_steps=128 * 9)
    assert np.isfinite(preferences.train(args))


def test_a_resumed_run_goes_on_with_its_labels(tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    report, every = preferences.Run.report, 1e-9

    def killed(self, step, *rest):
        report(self, step, *rest)
        if step == 128 * 9:
            raise Killed

    args = small(tmp_path / "run", "probe/Always-v0", total_steps=128 * 16, checkpoint_every=every)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(preferences.Run, "report", killed)
        preferences.train(args)
    before = state_of(args.run_dir)
    count = before["known"]["answered"]
    assert 15 < count < 30
    preferences.train(replace(args, run_dir=None, resume=args.run_dir))
    after = state_of(args.run_dir)
    assert after["known"]["answered"] == labels_due(args, 128 * 15)
    for name in ("obs", "action", "first"):
        assert torch.equal(after["known"][name][:count], before["known"][name][:count])
    assert torch.equal(after["known"]["weight"][:, :count], before["known"]["weight"][:, :count])


def test_nothing_is_learned_before_the_first_answers(tmp_path):
    args = small(tmp_path, "probe/Always-v0", total_steps=128 * 3, first=3)
    preferences.train(args)
    table = rows(tmp_path)
    assert [row["policy_loss"] == "" for row in table] == [True, True, False]
    assert [row["labels"] for row in table][:2] == ["0", "0"] and int(table[2]["labels"]) >= 8


def test_a_skipping_teacher_is_asked_until_it_has_answered(tmp_path):
    args = small(tmp_path, "probe/AlwaysOnObs-v0", total_steps=128 * 12, labels=60, skip=1.0, equal=0.3)
    preferences.train(args)
    assert int(rows(tmp_path)[-1]["labels"]) > 30
    known = state_of(tmp_path)["known"]
    assert set(known["first"][: known["answered"]].tolist()) == {0.5, 1.0}


# --- fixed horizons -----------------------------------------------------------------------------------------


def test_a_task_whose_episodes_end_early_is_known():
    assert early_end("Hopper-v4", 1) is not None and early_end("CartPole-v1", 1) is not None
    assert early_end("Pendulum-v1", 1) is None and early_end("HalfCheetah-v4", 1) is None
    assert time_limit("Hopper-v4") == 1000 and time_limit("probe/Act-v0") == np.inf


@pytest.mark.parametrize("env", ["Hopper-v4", "CartPole-v1", "probe/Ends-v0"])
def test_a_fixed_horizon_is_played_to_its_end(env):
    played = fixed_horizon(env)
    assert fixed_horizon(env) == played and fixed_horizon(f"probes:{env}") == played  # again
    limit = int(time_limit(env))
    with make_envs(played, 2, threads=1) as envs:
        obs, total = envs.reset([1, 2]), 0.0
        for t in range(limit):
            step = envs.step(np.zeros((2, envs.action_dim)) if not envs.discrete else np.zeros(2, int))
            assert not step.terminated.any() and step.truncated.all() == (t == limit - 1)
            total = total + step.reward
        assert np.shape(obs) == step.obs.shape
    if env == "CartPole-v1":  # as it is: one for each step until the pole fell
        with make_envs(env, 2) as envs:
            envs.reset([1, 2])
            steps = 0
            while not envs.step(np.zeros(2, int)).terminated[0]:
                steps += 1
        assert total[0] == steps + 1


def test_a_task_of_ones_own_is_played_on_to_its_end():
    """Named with its module, as one's own tasks are."""
    played = fixed_horizon("own_tasks:Maze-v0")
    assert time_limit(played) == time_limit("own_tasks:Maze-v0") < np.inf
    with make_envs(played, 1) as envs:
        assert envs.reset([1]).shape == (1, envs.obs_dim)


def test_a_runner_that_fell_is_simulated_on_and_not_paid_for_health():
    with make_envs(fixed_horizon("Hopper-v4"), 1, threads=1) as envs:
        assert envs.engine == "mujoco"
        envs.reset([0])
        action = np.ones((1, 3))
        steps = [envs.step(action) for _ in range(300)]
        assert steps[-1].reward[0] < 0.9 and not np.array_equal(steps[-1].obs, steps[-2].obs)


def test_fixed_horizon_from_the_command_line(tmp_path):
    common = [
        "--env",
        "CartPole-v1",
        "--fixed-horizon",
        "--no-compile",
        "--total-steps",
        "4096",
        "--labels",
        "20",
    ]
    common += [
        "--num-epochs",
        "1",
        "--eval-episodes",
        "2",
        "--no-progress",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    assert run(preferences, *common) > 0
    assert (
        rows(tmp_path / "run")[-1]["train_length"] == ""
        or float(rows(tmp_path / "run")[-1]["train_length"]) == 500
    )


def test_an_end_that_comes_later_stops_the_run(tmp_path):
    args = small(tmp_path, "probe/Ends-v0", total_steps=128 * 40)
    with pytest.raises(RunFault, match=r"ended early.*--fixed-horizon"):
        preferences.train(args)


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.fixture
def command_line(monkeypatch, capsys):
    """Run the command line in this process: its exit status and the lines on stderr."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["preferences.py", *map(str, argv)])
        capsys.readouterr()
        try:
            main(Args, preferences.train, lambda env: preferences.SETTINGS.get(env, {}))
            status: Any = 0
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().err.splitlines()

    old = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield run
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), old, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--labels", 0], ["--labels", "at least 1", "0"]),
        (["--labels", 2000], ["--labels 2000", "4,000 clips", "3,136"]),
        (["--start", 1, "--first", 1, "--num-envs", 2], ["--labels 700", "--first", "28 comparisons"]),
        (["--clip-length", 129], ["--clip-length 129", "--num-steps 128"]),
        (["--clip-length", 250, "--num-steps", 256, "--labels", 20], ["--clip-length 250", "200"]),
        (["--clip-length", 0], ["--clip-length", "at least 1"]),
        (["--first", 200, "--pool", 200], ["--first 200", "1,024", "98"]),
        (["--first", 33], ["--first 33", "--pool 32"]),
        (["--ranked", 1], ["--ranked", "at least 2", "1"]),
        (["--ranked", 3, "--equal", 0.1], ["--equal 0.1", "--ranked 2", "3"]),
        (["--start", 1.5], ["--start", "[0, 1]", "1.5"]),
        (["--error-model", 1], ["--error-model", "below 1"]),
        (["--mistake", -0.1], ["--mistake", "[0, 1]", "-0.1"]),
        (["--myopia", 1.1], ["--myopia", "[0, 1]", "1.1"]),
        (["--skip", 2], ["--skip", "[0, 1]", "2"]),
        (["--equal", -1], ["--equal", "[0, 1]", "-1"]),
        (["--rationality", 0], ["--rationality", "greater than 0", "0"]),
        (["--pessimism", -1], ["--pessimism", "at least 0", "-1"]),
        (["--value-coef", -1], ["--value-coef", "at least 0", "-1"]),
        (["--entropy-coef", "inf"], ["--entropy-coef", "at least 0 and finite", "inf"]),
        (["--bound-coef", -5], ["--bound-coef", "at least 0", "-5"]),
        (["--kl-coef", -2], ["--kl-coef", "at least 0", "-2"]),
        (["--members", 1], ["--members 1", "--queries disagreement", "--queries random"]),
        (["--reward-hidden", 0], ["--reward-hidden", "at least 1"]),
        (["--members", 0], ["--members", "at least 1"]),
        (["--ask", "human", "--ranked", 3], ["--ask human", "--ranked", "3"]),
        (["--ask", "human", "--port", 70000], ["--port", "65535", "70000"]),
        (["--ask", "human", "--mistake", 0.1], ["--mistake 0.1", "--ask human"]),
        (["--minibatch-size", 100], ["--minibatch-size 100", "1024"]),
        (["--env", "Hopper-v4"], ["--env Hopper-v4", "end early", "--fixed-horizon"]),
        (["--env", "probe/Act-v0", "--fixed-horizon"], ["--fixed-horizon", "probe/Act-v0", "no time limit"]),
        (["--env", "Pendulun-v1"], ["--env Pendulun-v1", "Pendulum-v1"]),
    ],
)  # fmt: skip
def test_arguments_that_cannot_work(tmp_path, command_line, argv, words):
    status, lines = command_line("--env", "Pendulum-v1", "--run-dir", tmp_path / "run", "--no-compile", *argv)
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(word in lines[0] for word in words), lines[0]
    assert not (tmp_path / "run").exists()  # before any work is done


def test_labels_cannot_change_in_a_resumed_run(tmp_path):
    args = small(tmp_path / "run", "probe/Always-v0", total_steps=128 * 3)
    preferences.train(args)
    with pytest.raises(UsageError, match="--labels 31"):
        preferences.train(replace(args, labels=31, run_dir=None, resume=args.run_dir))
