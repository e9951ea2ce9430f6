"""REINFORCE: its estimators against gradients by enumeration (tiny_mdp.py), its batches, probe environments,
whole runs."""

import csv
import re
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_mdp
import torch
from torch.func import grad

from zoo import reinforce
from zoo.common.cli import main
from zoo.common.envs import make_envs
from zoo.common.errors import RunFault
from zoo.common.files import load_checkpoint
from zoo.common.normalize import normalize
from zoo.common.process import Process
from zoo.reinforce import (
    Args,
    Categorical,
    Episodes,
    Gaussian,
    collect_episodes,
    draw_noise,
    fit_loss,
    leave_one_out,
    mean_baseline,
    optimal_baseline,
    pieces,
    policy_gradient,
    returns_to_go,
    score_loss,
)  # fmt: skip

F64 = torch.float64
ALL = tiny_mdp.trajectories()
CHANCES = tiny_mdp.probabilities(tiny_mdp.THETA, ALL)
LENGTHS = torch.tensor([len(t.states) for t in ALL])
VALUE = torch.tensor([4.0, -3.0], dtype=F64)  # a critic that is wrong


def test_the_mdp_is_written_down_completely():
    assert CHANCES.sum().item() == pytest.approx(1, abs=1e-12)
    assert set(LENGTHS.tolist()) == {1, 2, 3} and sum(t.last != 2 for t in ALL) > 5


def laid_out(episodes):
    """Every episode a column, 99 where it is over."""
    height, width = int(LENGTHS.max()), len(episodes)
    obs, action = torch.zeros(2, height, width, dtype=torch.int64)
    reward, alive = torch.full((height, width), 99.0, dtype=F64), torch.zeros(height, width, dtype=torch.bool)
    for column, t in enumerate(episodes):
        n = len(t.states)
        obs[:n, column], action[:n, column] = torch.tensor(t.states), torch.tensor(t.actions)
        reward[:n, column] = tiny_mdp.REWARD[t.states, t.actions]
        alive[:n, column] = True
    last = torch.tensor([t.last for t in episodes])
    return Episodes(obs, action, reward, alive, last, last != 2)


LAID_OUT = laid_out(ALL)


def columns(index):
    """The episodes of that index as the batch that REINFORCE makes of them."""
    index = torch.as_tensor(index)
    height = int(LENGTHS[index].max())
    return Episodes(*(x[:height, index] for x in LAID_OUT[:4]), *(x[index] for x in LAID_OUT[4:]))


SCORES = tiny_mdp.score(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])).view(2, 2, 4)


def score_sum(obs, action, weight):
    return weight @ SCORES[obs, action]


def estimate(index, gamma, tail=None, **fields):
    """The gradient that REINFORCE estimates from these episodes."""
    batch = columns(index)
    end = (torch.zeros(3, dtype=F64) if tail is None else torch.cat((tail, torch.zeros(1, dtype=F64))))[
        batch.last_obs
    ]
    return_ = returns_to_go(batch.reward, batch.alive, end, gamma)
    return policy_gradient(score_sum, batch, return_, VALUE[batch.obs], Args(gamma=gamma, **fields))[0]


FORMS = [dict(returns="total"), dict(returns="to-go", discount_weight=True), dict(returns="to-go")]
BASELINES = ["none", "mean", "optimal", "value"]


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
def test_expectation_equals_the_exact_gradient(form, baseline):
    """Summed over every pair of episodes, weighted by their probabilities: no sampling, so no tolerance but
    rounding."""
    gamma = 1.0 if form == dict(returns="to-go") else 0.7
    if baseline in ("none", "value"):  # episodes do not see each other
        expected = sum(
            chance * estimate([i], gamma, baseline=baseline, **form) for i, chance in enumerate(CHANCES)
        )
    else:
        pairs = [
            (i, j, CHANCES[i] * CHANCES[j] * (1 if i == j else 2))
            for i in range(len(ALL))
            for j in range(i + 1)
        ]
        expected = sum(chance * estimate([i, j], gamma, baseline=baseline, **form) for i, j, chance in pairs)
    torch.testing.assert_close(expected, tiny_mdp.exact_gradient(gamma), rtol=1e-9, atol=1e-12)


def test_dropping_the_discount_weight_changes_the_direction():
    """sum_t grad log pi R_t is not the gradient, nor a multiple of it."""
    expected = sum(c * estimate([i], 0.7, baseline="none") for i, c in enumerate(CHANCES))
    exact = tiny_mdp.exact_gradient(0.7)
    cosine = torch.nn.functional.cosine_similarity(expected, exact, dim=0)
    assert 0.9 < cosine < 0.9995
    # what it is: every step's own Q, unweighted by gamma^t
    direct = torch.zeros(4, dtype=F64)
    for trajectory, chance in zip(ALL, CHANCES, strict=True):
        for t in range(len(trajectory.states)):
            rest = trajectory._replace(states=trajectory.states[t:], actions=trajectory.actions[t:])
            scores = tiny_mdp.score(
                torch.tensor(trajectory.states[t : t + 1]), torch.tensor(trajectory.actions[t : t + 1])
            )
            direct += chance * scores[0] * tiny_mdp.total(rest, 0.7)
    torch.testing.assert_close(expected, direct)


@pytest.mark.parametrize("form", FORMS[:2], ids=["total", "to-go"])
def test_a_truncated_episode_counts_its_tail(form):
    """With V for the tail the estimate is the gradient of the time-limited return plus gamma^T V(s_T)."""
    tail = torch.tensor([7.0, -4.0], dtype=F64)
    expected = sum(c * estimate([i], 0.7, tail, baseline="value", **form) for i, c in enumerate(CHANCES))
    torch.testing.assert_close(expected, tiny_mdp.exact_gradient(0.7, tail))
    assert (expected - tiny_mdp.exact_gradient(0.7)).norm() > 0.2
    # then the time limit is not felt: the gradient of the task without it, in the states seen
    right = tiny_mdp.true_value(0.7)
    assert (tiny_mdp.exact_gradient(0.7, right) - tiny_mdp.exact_gradient(0.7)).norm() > 0.1


def variance(weights):
    """Exact variance, summed over parameters, of one episode's sum_t score_t w_t, with weights (M, T)."""
    estimates = torch.stack([
        torch.as_tensor(w[: len(t.states)]) @ tiny_mdp.score(torch.tensor(t.states), torch.tensor(t.actions))
        for t, w in zip(ALL, weights, strict=True)
    ])  # fmt: skip
    return (CHANCES @ estimates**2 - (CHANCES @ estimates) ** 2).sum().item()


def exact_variances(gamma):
    """By form and baseline, with the constants the theory gives; to-go with gamma^t, so that all share one
    expectation."""
    batch = columns(range(len(ALL)))
    discount = gamma ** torch.arange(tiny_mdp.HORIZON, dtype=F64)
    to_go = returns_to_go(batch.reward, batch.alive, torch.zeros(len(ALL), dtype=F64), gamma)
    found = {}
    for form, return_ in (("total", to_go[:1].expand(3, -1)), ("to-go", to_go)):
        weight = torch.ones(3, dtype=F64) if form == "total" else discount
        x = torch.stack(
            [
                score_sum(batch.obs[a, i], batch.action[a, i], (weight * return_[:, i])[a])
                for i, a in enumerate(batch.alive.T)
            ]
        )
        y = torch.stack(
            [score_sum(batch.obs[a, i], batch.action[a, i], weight[a]) for i, a in enumerate(batch.alive.T)]
        )
        b = {"none": 0.0, "optimal": (CHANCES @ (x * y).sum(1)) / (CHANCES @ (y**2).sum(1))}
        counted = batch.alive if form == "to-go" else batch.alive[:1]
        b["mean"] = (CHANCES * (return_[: len(counted)] * counted).sum(0)).sum() / (
            CHANCES * counted.sum(0)
        ).sum()
        # V_t(s), the time limit's clock included: the mean return from there
        values = torch.zeros(3, 2, dtype=F64)
        for t in range(3):
            for s in (0, 1):
                here = batch.alive[t] & (batch.obs[t] == s)
                values[t, s] = (CHANCES * to_go[t])[here].sum() / CHANCES[here].sum()
        b["value"] = (
            values[torch.arange(3)[:, None], batch.obs] if form == "to-go" else values[0][batch.obs[0]]
        )
        found |= {(form, name): (variance((weight[:, None] * (return_ - c)).T), c) for name, c in b.items()}
        for shift in (-0.5, 0.5):  # b* is the least of all constants
            assert (
                variance((weight[:, None] * (return_ - b["optimal"] - shift)).T) > found[form, "optimal"][0]
            )
    return found


def test_variances_fall_in_the_order_of_the_theory():
    found = {key: v for key, (v, _) in exact_variances(0.9).items()}
    for form in ("total", "to-go"):
        assert found[form, "none"] > found[form, "mean"] > found[form, "optimal"], found
    for baseline in ("none", "mean", "optimal", "value"):
        assert found["total", baseline] > found["to-go", baseline], found
        assert found["to-go", "value"] < 0.5 * found["to-go", "none"]


def test_v_is_the_best_baseline_where_all_scores_are_equally_long():
    """One step, a uniform policy: b*(s) = E[|score|^2 Q] / E[|score|^2] is V(s); not so in general (lecture
    notes S3 4.5)."""
    found = {}
    for theta in (torch.zeros(4, dtype=F64), tiny_mdp.THETA):
        pi = tiny_mdp.log_policy(theta).exp()
        scores = torch.eye(2, dtype=F64) - pi[:, None]  # (s, a, the two logits of s)
        value = (pi * tiny_mdp.REWARD).sum(1)

        def spread(b, pi=pi, scores=scores):
            chance, step = (tiny_mdp.START[:, None] * pi)[..., None], torch.zeros(2, 2, 2, 2, dtype=F64)
            for s in (0, 1):  # a step moves the logits of its own state
                step[s, :, s] = scores[s] * (tiny_mdp.REWARD[s] - b[s])[:, None]
            step = step.flatten(2)
            return ((chance * step**2).sum((0, 1)) - (chance * step).sum((0, 1)) ** 2).sum().item()

        others = [value + torch.tensor([i, j]) for i in (-0.1, 0, 0.1) for j in (-0.1, 0, 0.1) if i or j]
        found[theta.any().item()] = spread(value) < min(map(spread, others))
        if not theta.any():
            assert spread(value) < min(spread(torch.full((2,), b, dtype=F64)) for b in np.arange(-3, 6, 0.1))
    assert found == {False: True, True: False}


@pytest.mark.parametrize("form", FORMS[:2], ids=["total", "to-go"])
def test_the_variances_of_batches_are_those(form):
    """64 episodes a batch: one episode's variance over 64, and a little for the estimated constant."""
    rng, exact = np.random.default_rng(1), exact_variances(0.9)
    batches, found = rng.choice(len(ALL), (300, 64), p=CHANCES.numpy()), {}
    for baseline in ("none", "mean", "optimal"):
        estimates = torch.stack([estimate(batch, 0.9, baseline=baseline, **form) for batch in batches])
        found[baseline] = 64 * estimates.var(0).sum().item()
        assert found[baseline] == pytest.approx(exact[form["returns"], baseline][0], rel=0.25)
    assert found["none"] > found["mean"] > found["optimal"]


@pytest.mark.parametrize("form", FORMS[:2], ids=["total", "to-go"])
def test_the_constants_are_the_theorys(form):
    index = np.random.default_rng(0).choice(len(ALL), 3000, p=CHANCES.numpy())
    batch = columns(index)
    return_ = returns_to_go(batch.reward, batch.alive, torch.zeros(len(index), dtype=F64), 0.9)
    exact = exact_variances(0.9)
    discount = (1.0 if form["returns"] == "total" else 0.9) ** torch.arange(3, dtype=F64)[:, None]
    if form["returns"] == "total":
        mean, return_ = mean_baseline(return_[:1], batch.alive[:1]), return_[:1].expand(3, -1)
    else:
        mean = mean_baseline(return_, batch.alive)
    for name, found in (("mean", mean), ("optimal", optimal_baseline(score_sum, batch, return_, discount))):
        assert found.shape == (3000,) and found.std() < 0.01
        assert found.mean().item() == pytest.approx(exact[form["returns"], name][1].item(), abs=0.25), name


def test_returns_by_hand():
    """gamma 1/2; three episodes, of 3, 1 and 2 steps, whose filling rows hold rubbish; the second was cut
    with V = 6 beyond."""
    reward = torch.tensor([[1.0, 2.0, 3.0], [4.0, 77.0, 5.0], [8.0, 77.0, 77.0]])
    alive = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 0, 0]]).bool()
    return_ = returns_to_go(reward, alive, torch.tensor([0.0, 6.0, 0.0]), 0.5)
    assert return_[alive].tolist() == [5.0, 5.0, 5.5, 8.0, 5.0, 8.0]


def test_baselines_leave_their_own_episode_out():
    assert leave_one_out(
        torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 1.0, 2.0])
    ).tolist() == pytest.approx([8 / 3, 7 / 3, 1.5])
    dominated = leave_one_out(torch.tensor([1.0, 2.0, 1e12]), torch.tensor([1.0, 1.0, 1e11]))
    assert dominated[2] == 1.5  # all less its own would be 0 / 0
    assert leave_one_out(torch.tensor([5.0, 0.0]), torch.tensor([1.0, 0.0])).tolist() == [0.0, 5.0]
    return_, alive = torch.tensor([[1.0, 4.0], [3.0, 77.0]]), torch.tensor([[True, True], [True, False]])
    assert mean_baseline(return_, alive).tolist() == [4.0, 2.0]


@pytest.mark.parametrize("discrete", [True, False])
def test_score_loss_has_the_weighted_score_as_its_gradient(discrete):
    obs, weight = torch.randn(30, 3, dtype=F64), torch.randn(30, dtype=F64)
    action = torch.randint(4, (30,)) if discrete else torch.randn(30, 4, dtype=F64)
    params = torch.randn(16, dtype=F64) * 0.5

    def forward(params, obs):
        weights, log_std = params.split((12, 4))
        mean = obs @ weights.view(3, 4)
        return Categorical(mean) if discrete else Gaussian(mean, log_std), None

    mean = obs @ params[:12].view(3, 4)
    if discrete:
        by_mean, by_log_std = (
            torch.nn.functional.one_hot(action, 4) - mean.softmax(-1),
            torch.zeros(30, 4, dtype=F64),
        )
    else:
        z = (action - mean) / params[12:].exp()
        by_mean, by_log_std = z / params[12:].exp(), z**2 - 1
    formula = torch.cat(((obs.T @ (weight[:, None] * by_mean)).flatten(), weight @ by_log_std))
    torch.testing.assert_close(grad(score_loss)(params, obs, action, weight, forward), formula)


def test_filling_counts_neither_in_the_score_nor_in_the_fit():
    rows = torch.arange(1.0, 8.0), torch.arange(7).view(7, 1)
    cut = list(pieces(rows, 3))
    assert [piece[0].tolist() for piece in cut] == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]
    assert cut[2][1].tolist() == [[6], [0], [0]] and cut[2][1].dtype == torch.int64
    assert len(list(pieces((rows[0][:6],), 3))) == 2

    def forward(params, obs):
        return None, params * obs

    real = torch.tensor([1.0, 1.0, 0.0])
    loss = fit_loss(
        torch.tensor(2.0), torch.tensor([1.0, 2.0, 50.0]), torch.tensor([0.0, 1.0, 9.0]), real, forward
    )
    assert loss.item() == (2.0**2 + 3.0**2) / 2


# --- batches of whole episodes ------------------------------------------------------------------------------


def act_0(obs):
    return SimpleNamespace(sample=lambda noise: torch.zeros(len(obs), dtype=torch.int64))


def test_a_batch_is_one_whole_episode_of_every_environment():
    """The script of probes.py: an even seed begins with the episode 10 11 (ends at 12), an odd one with 20
    (cut at 21)."""
    envs = make_envs("probe/Scripted-v0", 4)
    for _ in range(2):  # a second batch begins anew, not in the middle of what the waiting environments did
        episodes, ended = collect_episodes(envs, [2, 3, 4, 5], act_0, torch.Generator())
        assert episodes.alive.tolist() == [[True] * 4, [True, False] * 2]
        assert episodes.obs[episodes.alive][:, 0].tolist() == [10, 20, 10, 20, 11, 11]
        assert episodes.reward[episodes.alive].tolist() == [1, 3, 1, 3, 2, 2]
        assert episodes.last_obs[:, 0].tolist() == [12, 21, 12, 21]  # the true successors
        assert episodes.truncated.tolist() == [False, True, False, True]
        assert ended == [(3.0, 2), (3.0, 1), (3.0, 2), (3.0, 1)]


def test_an_episode_both_terminated_and_truncated_has_no_tail(monkeypatch):
    import probes

    monkeypatch.setattr(probes, "SCRIPT", [(50.0, [(8.0, 51.0, "both")])])
    episodes, _ = collect_episodes(make_envs("probe/Scripted-v0", 2), [0, 1], act_0, torch.Generator())
    assert episodes.truncated.tolist() == [False, False]


def test_an_endless_episode_is_refused(monkeypatch):
    monkeypatch.setattr(reinforce, "MAX_EPISODE", 100)
    with pytest.raises(RunFault, match="did not end in 100 steps"):
        collect_episodes(make_envs("probe/DiscreteStart-v0", 2), [0, 1], act_0, torch.Generator())


@pytest.mark.parametrize("baseline", ["mean", "value"])
def test_the_mean_over_played_batches_is_the_exact_gradient(baseline):
    """With real environments, whose short episodes end first: within five standard errors in every
    component."""
    envs, generator = make_envs(tiny_mdp.register(), 4), torch.Generator().manual_seed(0)
    log_pi, found = tiny_mdp.log_policy(tiny_mdp.THETA).float(), []
    args = Args(gamma=0.7, baseline=baseline, discount_weight=True)
    for batch in range(800):
        seeds = [10 * batch + i for i in range(4)]
        episodes, _ = collect_episodes(
            envs, seeds, lambda obs: Categorical(torch.as_tensor(obs) @ log_pi), generator
        )
        states = episodes.obs.argmax(-1)
        return_ = returns_to_go(episodes.reward.double(), episodes.alive, torch.zeros(4, dtype=F64), 0.7)
        found.append(
            policy_gradient(score_sum, episodes._replace(obs=states), return_, VALUE[states], args)[0]
        )
    found = torch.stack(found)
    error = (found.mean(0) - tiny_mdp.exact_gradient(0.7)).abs()
    assert (error < 5 * found.std(0) / len(found) ** 0.5).all(), error


# --- what train does with them ------------------------------------------------------------------------------

SMALL = dict(
    num_envs=16, minibatch_size=64, learning_rate=0.02, value_learning_rate=0.02, hidden=(16,), gamma=0.9,
    eval_every=0, total_steps=1500, normalize_obs=False, scale_returns=False, device="cpu", compile=False,
    progress=False, env_threads=1, report_every=1,
)  # fmt: skip


def small(folder, env, **changes):
    return Args(**{**SMALL, "env": env, "run_dir": str(folder), **changes})


def rows(folder):
    """progress.csv without the clocks."""
    with open(Path(folder) / "progress.csv", newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in ("wall_time", "sps")} for row in csv.DictReader(file)
        ]


@pytest.fixture
def spy(monkeypatch):
    """What train acted with, collected, scored, estimated and fitted V to, in the order of the calls."""
    seen = SimpleNamespace(acting=[], episodes=[], gradients=[], fitted=[], forward=None)
    policy_at, collect = reinforce.policy_at, reinforce.collect_episodes
    estimate, fit = reinforce.policy_gradient, reinforce.fit_value

    def acting(net, obs_stats):
        seen.acting.append((torch.cat([p.flatten() for p in net.parameters()]), obs_stats))
        return policy_at(net, obs_stats)

    def collected(*args):
        result = collect(*args)
        seen.episodes.append((seen.acting[-1], *result))
        return result

    def estimated(*args):
        seen.gradients.append((args, estimate(*args)))
        return seen.gradients[-1][1]

    def fitted(forward, params, opt, obs, return_, real, learning_rate):
        seen.fitted.append((obs, return_, real))
        return fit(forward, params, opt, obs, return_, real, learning_rate)

    monkeypatch.setattr(reinforce, "policy_at", acting)
    monkeypatch.setattr(reinforce, "collect_episodes", collected)
    monkeypatch.setattr(reinforce, "policy_gradient", estimated)
    monkeypatch.setattr(reinforce, "fit_value", fitted)
    return seen


@pytest.fixture
def in_turn(monkeypatch):
    """Environments seeded evenly and oddly in turn: the script's first episode, its second, and again."""
    monkeypatch.setattr(reinforce, "env_seeds", lambda seed, purpose, count, *index: list(range(count)))


def pure(args):
    """forward(params, obs) of the network that train makes."""
    net = reinforce.ActorCritic(make_envs(args.env, 1), args.hidden, args.log_std, args.shared_network)
    unflatten = reinforce.flatten(net)[1]
    return lambda params, obs: torch.func.functional_call(net, unflatten(params), (obs,))


@pytest.mark.parametrize("baseline", ["mean", "value"])
@pytest.mark.parametrize("scaled", [False, True])
def test_returns_tails_and_units(tmp_path, spy, in_turn, baseline, scaled):
    """Every batch: the returns are hand-made ones, the cut episode's with V beyond it if and only if V is the
    baseline.

    Their unit is the standard deviation of earlier batches' returns, the first batch's its own, and what is
    reported of V is how much it explained of them.
    """
    args = small(
        tmp_path, "probe/Scripted-v0", num_envs=2, total_steps=12, baseline=baseline, scale_returns=scaled,
        normalize_obs=True, seed=4,
    )  # fmt: skip
    reinforce.train(args)
    assert len(spy.episodes) == 4
    forward, history, old = pure(args), [], 1.0
    for i, ((acting, episodes, _), ((_, seen, return_, value, _), (_, advantage))) in enumerate(
        zip(spy.episodes, spy.gradients, strict=True)
    ):
        params, stats = acting

        def critic(obs, params=params, stats=stats):
            return forward(params, normalize(obs, stats))[1]

        assert stats["count"] == len(history)  # what environments see while they wait is not counted
        torch.testing.assert_close(seen.obs, normalize(episodes.obs, stats))
        cut = int(episodes.truncated.nonzero())
        tail = 0.9 * old * critic(episodes.last_obs)[cut].item() if baseline == "value" else 0.0
        expected = {cut: [3 + tail], 1 - cut: [1 + 0.9 * 2, 2.0]}
        history += [value for column in expected.values() for value in column]
        new = np.std(history) if scaled else 1.0
        unit = old if i else new  # nothing of the batch's own, but in the first
        for column, values in expected.items():
            assert return_[: len(values), column].tolist() == pytest.approx(
                [v / unit for v in values], rel=1e-4
            )
        torch.testing.assert_close(
            value, critic(episodes.obs.flatten(0, 1)).view(2, 2) * old / unit, rtol=1e-4, atol=1e-4
        )
        row, alive = rows(tmp_path)[i], episodes.alive
        if baseline == "value":  # V learns these returns, in the unit that it is read in next, once an epoch
            obs, target, real = spy.fitted[args.value_epochs * i]
            assert real.sum() == 3
            targets = sorted((return_[alive] * unit / new).tolist())
            assert sorted(target[real > 0].tolist()) == pytest.approx(targets, rel=1e-4)
            assert {*obs[real > 0][:, 0].tolist()} == {*seen.obs[alive][:, 0].tolist()}
            explained = 1 - np.var((return_ - value)[alive].numpy()) / np.var(return_[alive].numpy())
            assert float(row["explained_variance"]) == pytest.approx(explained, rel=1e-3, abs=1e-4)
        assert float(row["advantage_std"]) == pytest.approx(np.std(advantage[alive].numpy()), rel=1e-3)
        old = new


def test_the_step_climbs_the_gradient_and_v_is_fitted_after_it(tmp_path, spy):
    """The gradient that policy_gradient returned is that of its score sum, taken at the parameters that
    acted; Adam adds it."""
    args = small(tmp_path, "probe/ActOnObs-v0", total_steps=32, baseline="none")
    reinforce.train(args)
    ((first, _), episodes, _), ((second, _), *_) = spy.episodes
    (_, seen, return_, *_), (gradient, advantage) = spy.gradients[0]
    assert torch.equal(advantage, return_) and episodes.alive.all()
    direct = reinforce.scores(pure(args), first, seen.obs[0], seen.action[0], return_[0] / 16)
    torch.testing.assert_close(gradient, direct)
    moved, _ = reinforce.adam(first, -gradient, reinforce.new_adam(gradient), torch.tensor(0.02))
    torch.testing.assert_close(second, moved)
    assert (moved - first) @ gradient > 0
    spy.episodes.clear()
    reinforce.train(replace(args, run_dir=str(tmp_path / "value"), baseline="value"))
    ((first, _), *_), ((second, _), *_) = spy.episodes
    changed = reinforce.flatten(reinforce.ActorCritic(make_envs(args.env, 1), (16,), -0.5, False))[1](
        second - first
    )
    assert changed["value_head.weight"].norm() > 0 and changed["policy_head.weight"].norm() > 0


def test_batches_begin_differently_and_the_learning_rate_falls(tmp_path, spy):
    """Linearly, once: the rate in the table is the one that Adam was given."""
    steps = []
    for anneal in (True, False):
        spy.episodes.clear()
        args = small(
            tmp_path / str(anneal), "CartPole-v1", num_envs=2, total_steps=150, anneal=anneal, baseline="mean"
        )  # fmt: skip
        reinforce.train(args)
        starts = [0, *(int(row["step"]) for row in rows(args.run_dir))][:-1]
        rates = [float(row["learning_rate"]) for row in rows(args.run_dir)]
        assert rates == pytest.approx(
            [0.02 * (1 - start / 150 if anneal else 1) for start in starts], rel=1e-6
        )
        (before, _), opt = spy.episodes[0][0], None
        for rate, ((after, _), *_), (_, (gradient, _)) in zip(
            rates, spy.episodes[1:], spy.gradients[-len(starts) :], strict=False
        ):
            opt = opt or reinforce.new_adam(before)
            moved, opt = reinforce.adam(before, -gradient, opt, torch.tensor(rate))
            torch.testing.assert_close(after, moved)
            before = after
            steps.append(rate)
    assert len(steps) >= 4
    firsts = [
        tuple(obs) for _, episodes, _ in spy.episodes[: len(starts)] for obs in episodes.obs[0].tolist()
    ]
    assert len(set(firsts)) == len(firsts) >= 4


def test_reports_gather_short_episodes(tmp_path, in_turn, monkeypatch):
    """Batches of three steps, reported every 90: as many lines as that, not one a batch, of all episodes."""
    report, reported = reinforce.Run.report, []

    def count(self, step, state, acting, metrics, episodes):
        reported.append(episodes)
        report(self, step, state, acting, metrics, episodes)

    monkeypatch.setattr(reinforce.Run, "report", count)
    args = small(tmp_path, "probe/Scripted-v0", num_envs=2, total_steps=900, baseline="mean", report_every=90)
    reinforce.train(args)
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(90, 901, 90))
    assert reported == [[(3.0, 2), (3.0, 1)] * 30] * 10
    assert Args().report_every >= 1000  # 50 lines and no more in 50,000 steps


def test_v_moves_no_weight_of_the_policy(tmp_path, spy):
    reinforce.train(small(tmp_path, "probe/ActOnObs-v0", total_steps=64, learning_rate=1e-30))
    names = reinforce.flatten(reinforce.ActorCritic(make_envs("probe/Act-v0", 1), (16,), -0.5, False))[1]
    for name, change in names(spy.episodes[-1][0][0] - spy.episodes[0][0][0]).items():
        assert bool((change.abs() > 1e-20).any()) == name.startswith("value"), name


def test_batches_of_one_report_have_starts_and_rates_of_their_own(tmp_path, spy, monkeypatch):
    """And what the report says of them is their mean."""
    adam, rates = reinforce.adam, []

    def noted(params, gradient, opt, rate):
        rates.append(rate.item())
        return adam(params, gradient, opt, rate)

    monkeypatch.setattr(reinforce, "adam", noted)
    reinforce.train(small(
        tmp_path, "CartPole-v1", num_envs=2, total_steps=150, baseline="mean", report_every=150
    ))  # fmt: skip
    batches = [episodes for _, episodes, _ in spy.episodes]
    starts = [0, *np.cumsum([int(batch.alive.sum()) for batch in batches])][:-1]
    assert rates == pytest.approx([0.02 * (1 - start / 150) for start in starts], rel=1e-5)
    firsts = [tuple(obs) for batch in batches for obs in batch.obs[0].tolist()]
    assert len(set(firsts)) == len(firsts) >= 6
    (row,) = rows(tmp_path)
    norms = [gradient.norm().item() for _, (gradient, _) in spy.gradients]
    assert float(row["grad_norm"]) == pytest.approx(np.mean(norms), rel=1e-4)


def test_observations_are_counted_as_they_are(tmp_path, spy, in_turn):
    """Not as the networks see them, which the second batch's would be."""
    reinforce.train(small(
        tmp_path, "probe/Scripted-v0", num_envs=2, total_steps=9, baseline="mean", normalize_obs=True
    ))  # fmt: skip
    seen = [episodes.obs[episodes.alive].double() for _, episodes, _ in spy.episodes]
    for i, ((_, stats), *_) in enumerate(spy.episodes[1:], start=1):
        torch.testing.assert_close(stats["mean"], torch.cat(seen[:i]).mean(0))
    assert len(seen) == 3


def test_v_is_fitted_in_another_order_in_every_epoch(tmp_path, spy):
    reinforce.train(small(
        tmp_path, "CartPole-v1", num_envs=2, total_steps=2, value_epochs=3, minibatch_size=512
    ))  # fmt: skip
    orders = [obs[real > 0] for obs, _, real in spy.fitted]
    assert len(orders) == 3 and len({tuple(order.flatten().tolist()) for order in orders}) == 3


# --- nothing left to learn ----------------------------------------------------------------------------------


@pytest.mark.parametrize("returns", ["total", "to-go"])
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("env", ["probe/ConstantValue-v0", "probe/Endless-v0"])
def test_returns_that_are_all_equal(tmp_path, env, baseline, returns):
    """Every episode pays the same, so that nothing has a spread: neither returns nor advantages."""
    args = small(
        tmp_path, env, baseline=baseline, returns=returns, total_steps=400, value_epochs=2,
        normalize_obs=True, scale_returns=True,
    )  # fmt: skip
    reinforce.train(args)
    assert len(rows(tmp_path)) >= 5
    for row in rows(tmp_path):
        assert all(np.isfinite(float(value)) for name, value in row.items() if not name.startswith("eval"))
    if baseline in ("mean", "optimal") and env == "probe/ConstantValue-v0":
        assert {float(row["grad_norm"]) for row in rows(tmp_path)} == {0.0}


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("env", ["probe/ActOnObs-v0", "probe/ActOnObsBox-v0"])
def test_a_policy_without_entropy(tmp_path, monkeypatch, env, baseline):
    """Solved for good: one action has all the probability that float32 can tell, and no score is left."""
    actor_critic_net = reinforce.ActorCritic

    def sure(*args):
        net = actor_critic_net(*args)
        with torch.no_grad():
            net.policy_head.bias[0] = 1e4 if net.log_std is None else 0.0
        return net

    monkeypatch.setattr(reinforce, "ActorCritic", sure)
    reinforce.train(
        small(
            tmp_path,
            env,
            baseline=baseline,
            total_steps=64,
            report_every=1,
            log_std=-20.0,
            learning_rate=1e-9,
        )
    )
    assert len(rows(tmp_path)) == 4
    for row in rows(tmp_path):
        assert all(np.isfinite(float(value)) for name, value in row.items() if not name.startswith("eval"))
        assert float(row["entropy"]) < 1e-6


def test_a_critic_that_is_exact(tmp_path):
    """V = 1 from the start, where every return is 1: no advantage, no gradient, nothing to fit, V stays."""
    actor_critic_net = reinforce.ActorCritic
    envs = make_envs("probe/ConstantValue-v0", 4)
    net = actor_critic_net(envs, (16,), -0.5, False)
    with torch.no_grad():
        net.value_head.weight.zero_()
        net.value_head.bias.fill_(1.0)
    params, unflatten = reinforce.flatten(net)

    def forward(params, obs):
        return torch.func.functional_call(net, unflatten(params), (obs,))

    obs, action = torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64)
    gradient = reinforce.scores(forward, params, obs, action, torch.zeros(4))
    assert torch.equal(gradient, torch.zeros_like(params))
    moved, _ = reinforce.adam(params, -gradient, reinforce.new_adam(params), torch.tensor(0.1))
    assert torch.equal(moved, params)
    alive = torch.ones(1, 4, dtype=torch.bool)
    episodes = Episodes(obs[None], action[None], alive.float(), alive, obs, torch.zeros(4, dtype=torch.bool))
    fit, generator = partial(reinforce.fit_value, forward), torch.Generator()
    moved, _, metrics = reinforce.improve_value(
        fit, params, reinforce.new_adam(params), episodes, alive.float(), net.value(episodes.obs), Args(),
        generator,
    )  # fmt: skip
    assert torch.equal(moved, params)
    assert {name: value.item() for name, value in metrics.items()} == {
        "value_loss": 0,
        "explained_variance": 1,
    }


# --- probe environments -------------------------------------------------------------------------------------


def learnt(args):
    """What a run leaves in agent.pt: V of observations, and the deterministic policy's actions in the
    environment's scale."""
    reinforce.train(args)
    acting = load_checkpoint(Path(args.run_dir) / "agent.pt", "--agent", "reinforce")["state"]
    envs = make_envs(args.env, 1)
    net = reinforce.ActorCritic(envs, args.hidden, args.log_std, args.shared_network)
    params, policy = reinforce.flatten(net)[1](acting["params"]), reinforce.make_policy(envs, args, acting)

    def value(*obs):
        seen = normalize(torch.tensor(obs, dtype=torch.float32)[:, None], acting["obs_stats"])
        return torch.func.functional_call(net, params, (seen,))[1].tolist()

    def act(*obs):
        return envs.to_env_action(policy(np.array(obs, np.float32)[:, None])).reshape(-1).tolist()

    return value, act


@pytest.mark.parametrize("shared", [False, True])
def test_probe_values(tmp_path, shared):
    value, _ = learnt(small(tmp_path / "a", "probe/ObservedReward-v0", shared_network=shared))
    assert value(-1, 1) == pytest.approx([-1.0, 1.0], abs=0.05)
    value, _ = learnt(small(tmp_path / "b", "probe/Discount-v0", gamma=0.7, shared_network=shared))
    assert value(0, 1) == pytest.approx([0.7, 1.0], abs=0.05)


def test_probe_time_limit_is_no_end_of_the_world(tmp_path):
    """Reward 1 for ever, cut every 5 steps: V = 1 / (1 - 0.9) through the tail, where without it V is at most
    4.1."""
    value, _ = learnt(small(tmp_path, "probe/Endless-v0", total_steps=80 * 20))
    assert value(0) == pytest.approx([10.0], abs=0.5)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("returns", ["total", "to-go"])
def test_probe_acting_on_the_observation(tmp_path, returns, baseline):
    _, act = learnt(small(tmp_path, "probe/ActOnObs-v0", returns=returns, baseline=baseline, total_steps=480))
    assert act(-1, 1) == [0, 1]


@pytest.mark.parametrize(
    "changes",
    [
        dict(value_epochs=2, total_steps=2400),
        dict(baseline="mean", normalize_obs=True, scale_returns=True, total_steps=3200),
    ],
)
def test_probe_acting_on_the_observation_in_a_box(tmp_path, changes):
    _, act = learnt(small(tmp_path, "probe/ActOnObsBox-v0", **changes))
    assert act(-1, 1) == pytest.approx([3.0, 5.0], abs=0.25)


# --- whole runs ---------------------------------------------------------------------------------------------


def test_compiled_equals_eager(tmp_path, no_fallback):
    """50 updates on one task without chaos: what rounding leaves."""
    changes = dict(num_envs=16, total_steps=16 * 50, value_epochs=2, minibatch_size=16, normalize_obs=True)
    ends = []
    for compiled in (False, True):
        args = small(tmp_path / str(compiled), "probe/ActOnObsBox-v0", compile=compiled, **changes)
        reinforce.train(args)
        ends.append(load_checkpoint(tmp_path / str(compiled) / "agent.pt", "--agent")["state"]["params"])
    assert len(rows(tmp_path / "True")) == 50
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_same_seed_same_table_and_a_resumed_run_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch, env):
    """Every batch begins new episodes from a seed of its own, so that a resumed run equals one that was never
    stopped."""
    changes = dict(
        num_envs=2,
        total_steps=1500 if env == "Pendulum-v1" else 400,
        minibatch_size=256,
        normalize_obs=True,
        scale_returns=True,
        checkpoint_every=1e-9,
        value_epochs=2,
    )
    tables = {}
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        torch.manual_seed(99)  # nothing of the process's own generators may matter
        np.random.seed(len(tables))  # noqa: NPY002
        reinforce.train(small(tmp_path / name, env, seed=seed, **changes))
        tables[name] = rows(tmp_path / name)
    assert tables["one"] == tables["two"] != tables["other"] and len(tables["one"]) >= 4
    collect, calls = reinforce.collect_episodes, []

    def collect_twice(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RunFault("power cut")
        return collect(*args)

    monkeypatch.setattr(reinforce, "collect_episodes", collect_twice)
    args = small(tmp_path / "halves", env, seed=3, **changes)
    with pytest.raises(RunFault, match="power cut"), Process():  # which frees the folder
        reinforce.train(args)
    assert rows(tmp_path / "halves") == [
        row | {"eval_return": "", "eval_std": ""} for row in tables["one"][:2]
    ]
    reinforce.train(replace(args, run_dir=None, resume=args.run_dir))
    assert rows(tmp_path / "halves") == tables["one"]


def test_steps_are_those_of_the_episodes(tmp_path, in_turn):
    # 2 + 1 a batch, what follows is idle
    reinforce.train(small(tmp_path, "probe/Scripted-v0", num_envs=2, total_steps=7))
    assert [row["step"] for row in rows(tmp_path)] == ["3", "6", "9"]
    assert rows(tmp_path)[0]["train_length"] == "1.5" and rows(tmp_path)[0]["train_return"] == "3"


def test_cartpole_is_learnt(tmp_path, monkeypatch, capsys):
    """From the command line; with more episodes a batch and larger steps than the task's own settings have,
    which learn it in fewer updates."""
    run = [
        "reinforce.py", "--env", "CartPole-v1", "--num-envs", "16", "--learning-rate", "1e-2",
        "--total-steps", "40000", "--no-compile", "--run-dir", str(tmp_path),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", run)
    main(Args, reinforce.train, lambda env: reinforce.SETTINGS.get(env, {}))
    mean = float(
        re.fullmatch(r"final evaluation: (\S+) ± \S+ over 10 episodes\n", capsys.readouterr().out)[1]
    )
    assert mean >= 450


@pytest.fixture
def command_line(monkeypatch, capsys):
    """Run the agent's command line in this process: its exit status and the lines on stderr."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["reinforce.py", *map(str, argv)])
        capsys.readouterr()
        try:
            main(Args, reinforce.train, lambda env: reinforce.SETTINGS.get(env, {}))
            status = 0
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
        (["--minibatch-size", 0], ["--minibatch-size", "at least 1", "0"]),
        (["--value-epochs", 0], ["--value-epochs", "at least 1", "0"]),
        (["--gamma", 1.01], ["--gamma", "[0, 1]", "1.01"]),
        (["--baseline", "mean", "--num-envs", 1], ["--num-envs", "at least 2", "1", "--baseline mean"]),
        (["--baseline", "optimal", "--num-envs", 1], ["--num-envs", "at least 2", "1", "--baseline optimal"]),
        (["--returns", "total", "--discount-weight"], ["--discount-weight", "--returns to-go"]),
        (["--env", "probe/MultiDiscreteAction-v0"], ["--env probe/MultiDiscreteAction-v0", "MultiDiscrete"]),
    ],
)
def test_arguments_that_cannot_work(tmp_path, command_line, argv, words):
    status, lines = command_line(
        "--env", "probe/Act-v0", "--no-compile", "--run-dir", tmp_path / "run", *argv
    )
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(word in lines[0] for word in words), lines[0]
    assert not (tmp_path / "run").exists()


def test_a_diverging_run_stops_and_names_what_became_infinite(tmp_path, command_line):
    status, lines = command_line(
        "--env", "probe/ActBox-v0", "--learning-rate", 1e30, "--no-compile", "--run-dir", tmp_path
    )
    assert status == 1 and re.match(r"error: .*(became|non-finite)", lines[1]), lines
    assert not (tmp_path / "agent.pt").exists()


def test_draw_noise_in_blocks_covers_long_episodes(tmp_path):
    """An episode longer than a block of noise: fresh noise in every step."""
    seen = []
    envs = make_envs("Pendulum-v1", 2)

    def act(obs):
        return SimpleNamespace(sample=lambda noise: seen.append(noise) or noise)

    collect_episodes(envs, [0, 1], act, torch.Generator().manual_seed(0))
    assert len(seen) == 200 and len({row.tolist()[0][0] for row in seen}) == 200
    block = draw_noise(envs, 64, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.stack(seen[:64]), block)
