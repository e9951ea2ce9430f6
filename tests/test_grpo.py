"""GRPO on control: advantages, weights and losses by hand, groups, probe environments, whole runs."""

import csv
import itertools
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import probes
import pytest
import torch
from torch.func import functional_call, grad

from zoo import grpo
from zoo.common.cli import main
from zoo.common.envs import make_envs
from zoo.common.errors import RunFault, UsageError
from zoo.common.files import load_checkpoint
from zoo.common.normalize import new_stats, normalize, update_stats
from zoo.common.process import Process
from zoo.grpo import Args, Categorical, Episodes, Steps, advantages, group_loss, minibatches, step_weights

# --- what is credited, by hand ------------------------------------------------------------------------------

# two groups of two; 99 is paid where an episode is over
REWARD = torch.tensor([[1.0, 2.0, 5.0, 0.0], [4.0, 99.0, 1.0, 2.0], [8.0, 99.0, 99.0, 6.0]])
ALIVE = torch.tensor([[True, True, True, True], [True, False, True, True], [True, False, False, True]])


def test_outcome_by_hand():
    """Returns 13, 2 and 6, 8: every step of an episode has its own less the mean of its group."""
    found = advantages(REWARD, ALIVE, Args(group_size=2))
    assert found.tolist() == [[5.5, -5.5, -1.0, 1.0], [5.5, 0.0, -1.0, 1.0], [5.5, 0.0, 0.0, 1.0]]
    # discounted by 1/2: 1 + 2 + 2, 2 and 5 + 1/2, 0 + 1 + 3/2
    halved = advantages(REWARD, ALIVE, Args(group_size=2, gamma=0.5))
    assert halved[0].tolist() == [1.5, -1.5, 1.5, -1.5]
    # of all four as one group, divided by the deviation of 3 degrees of freedom
    centred = torch.tensor([13.0, 2.0, 6.0, 8.0]) - 7.25
    one = advantages(REWARD, ALIVE, Args(group_size=4, std=True))[0]
    torch.testing.assert_close(one, centred / ((centred**2).sum().div(3).sqrt() + 1e-4))


def test_to_go_by_hand():
    """Step for step; an episode that has ended earns 0 from there on, and its group knows."""
    found = advantages(REWARD, ALIVE, Args(group_size=2, advantage="to-go"))
    # to go: 13 12 8, 2, 6 1, 8 8 6
    assert found.tolist() == [[5.5, -5.5, -1.0, 1.0], [6.0, 0.0, -3.5, 3.5], [4.0, 0.0, 0.0, 3.0]]
    halved = advantages(REWARD, ALIVE, Args(group_size=2, advantage="to-go", gamma=0.5))
    assert halved[:, 0].tolist() == [(5 - 2) / 2, 8 / 2, 8 / 2]
    std = advantages(REWARD, ALIVE, Args(group_size=2, advantage="to-go", std=True))
    torch.testing.assert_close(std[0, :2], torch.tensor([5.5, -5.5]) / (5.5 * 2**0.5 + 1e-4))


def test_process_by_hand():
    """The mean of the first group's four steps is 15/4, of the second's five 14/5; an action's own step
    counts."""
    found = advantages(REWARD, ALIVE, Args(group_size=2, advantage="process"))
    first = torch.tensor([13 - 3 * 3.75, 12 - 2 * 3.75, 8 - 3.75])
    torch.testing.assert_close(found[:, 0], first)
    assert found[:, 1].tolist() == [2 - 3.75, 0.0, 0.0]
    torch.testing.assert_close(found[:, 2], torch.tensor([6 - 2 * 2.8, 1 - 2.8, 0.0]))
    deviations = torch.tensor([1.0, 4.0, 8.0, 2.0]) - 3.75
    std = advantages(REWARD, ALIVE, Args(group_size=2, advantage="process", std=True))
    torch.testing.assert_close(std[:, 0], first / ((deviations**2).sum().div(3).sqrt() + 1e-4))


def test_process_has_nothing_to_say_where_every_step_pays_the_same():
    """CartPole-v1, for one: longer episodes are better, but no step is."""
    same = torch.ones_like(REWARD)
    assert not advantages(same, ALIVE, Args(group_size=2, advantage="process")).any()
    assert advantages(same, ALIVE, Args(group_size=2))[0].tolist() == [1.0, -1.0, -0.5, 0.5]


@pytest.mark.parametrize("kind", ["outcome", "to-go", "process"])
def test_equal_returns_give_no_advantage_beside_their_standard_deviation(kind):
    """Sevens, whose sum has to be rounded: over 1e-4 that would be a signal."""
    gamma = 1.0 if kind == "process" else 0.99
    args = Args(group_size=7, advantage=kind, std=True, gamma=gamma)
    reward = torch.linspace(-1, 1, 200).repeat_interleave(7).expand(50, -1)
    assert not advantages(reward, torch.ones_like(reward, dtype=torch.bool), args).any()


def test_step_weights_by_hand():
    assert torch.equal(step_weights(ALIVE, "batch"), ALIVE.float())
    found = step_weights(ALIVE, "episode")  # lengths 3, 1, 2, 3, on average 9/4
    torch.testing.assert_close(found, ALIVE * (2.25 / torch.tensor([3.0, 1.0, 2.0, 3.0])))
    assert found[ALIVE].mean().item() == pytest.approx(1)


# --- losses -------------------------------------------------------------------------------------------------


def tabular(params, obs):
    """Logits (3, 2), read by the observation."""
    return Categorical(params.view(3, 2)[obs])


PARAMS = torch.tensor([0.3, -0.2, 0.1, 0.4, -0.5, 0.2])
OBS, ACTION = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 0, 1, 0])


def steps_of(shift=(0.0, 0.0, 0.0, 0.0), ref=0.0, weight=(1.0, 2.0, 0.5, 1.5)):
    """Four steps whose log-ratios are `shift`; the reference has `ref` more log-probability than pi has."""
    log_prob = tabular(PARAMS, OBS).log_prob(ACTION)
    advantage = torch.tensor([1.0, -1.0, 2.0, -3.0])
    return Steps(OBS, ACTION, log_prob - torch.tensor(shift), log_prob + ref, advantage, torch.tensor(weight))


def loss_of(steps, **args):
    return group_loss(PARAMS, steps, tabular, Args(**args))


def test_at_the_old_policy_the_gradient_is_the_policy_gradient():
    """sum_i w_i A_i grad log pi(a_i|s_i) / n, the loss's own sign taken off."""
    steps = steps_of()
    found = grad(lambda x: group_loss(x, steps, tabular, Args())[0])(PARAMS)
    weight = steps.weight * steps.advantage / 4
    expected = torch.zeros(3, 2)
    for s, a, w in zip(OBS.tolist(), ACTION.tolist(), weight, strict=True):
        expected[s] -= w * (torch.eye(2)[a] - PARAMS.view(3, 2)[s].softmax(-1))
    torch.testing.assert_close(found, expected.flatten())


def test_the_clip_by_hand():
    """Ratios e^.5, e^-.5, e^-.5, e^.5 at eps = .2: min takes 1.2, .8, e^-.5 and e^.5 for these signs."""
    up, down = np.exp(0.5), np.exp(-0.5)
    found, metrics = loss_of(steps_of((0.5, -0.5, -0.5, 0.5)), clip=0.2)
    expected = -(1.0 * 1.2 * 1 + 2.0 * 0.8 * -1 + 0.5 * down * 2 + 1.5 * up * -3) / 4
    assert found.item() == pytest.approx(expected) and metrics["policy_loss"] == found
    assert metrics["clipfrac"] == 1 and loss_of(steps_of((0.5, -0.1, 0.1, 0.0)))[1]["clipfrac"] == 0.25
    assert metrics["approx_kl"].item() == pytest.approx((up - 1 - 0.5 + down - 1 + 0.5) / 2)


@pytest.mark.parametrize(("kl", "estimate"), [("k1", -0.3), ("k2", 0.3**2 / 2), ("k3", np.expm1(0.3) - 0.3)])
def test_the_kl_as_a_loss_by_hand(kl, estimate):
    """beta times the weighted mean of the estimates, at log ref - log pi = .3."""
    rest = loss_of(steps_of())[0].item()
    loss, metrics = loss_of(steps_of(ref=0.3), kl=kl, kl_in="loss", beta=2.0)
    assert metrics["kl_loss"].item() == pytest.approx(estimate * 5 / 4, rel=1e-5)
    assert loss.item() == pytest.approx(rest + 2 * estimate * 5 / 4, rel=1e-5)
    corrected = loss_of(steps_of((0.1,) * 4, 0.3), kl=kl, kl_in="loss", beta=2.0, kl_correction=True)[1]
    assert corrected["kl_loss"].item() == pytest.approx(np.exp(0.1) * estimate * 5 / 4, rel=1e-5)
    assert "kl_loss" not in loss_of(steps_of(ref=0.3), kl=kl, beta=2.0)[1]  # it is in the rewards


@pytest.mark.parametrize(("kl", "slope"), [("k1", 1 - 0.3), ("k2", 0.3**2 / 2 - 0.3), ("k3", -0.3)])
def test_the_correction_of_the_kl_is_differentiated(kl, slope):
    """k + dk / d log pi on every step's score, at the old policy and log ref - log pi = .3."""
    steps = steps_of(ref=0.3)._replace(advantage=torch.zeros(4))
    args = Args(kl=kl, kl_in="loss", beta=2.0, kl_correction=True)
    found = grad(lambda x: group_loss(x, steps, tabular, args)[0])(PARAMS)
    scores = grad(lambda x: (steps.weight * tabular(x, OBS).log_prob(ACTION)).mean())(PARAMS)
    torch.testing.assert_close(found, 2 * slope * scores)


def test_filling_changes_nothing_bit_for_bit():
    kinds = dict(kl="k3", kl_in="loss", beta=0.5)
    some = steps_of((0.1, -0.1, 0.05, 0.0), 0.2, (1.0, 2.0, 0.0, 0.0))
    other = some._replace(advantage=torch.tensor([1.0, -1.0, 7.0, 9.0]), action=torch.tensor([1, 0, 0, 1]))
    loss = lambda x, steps: group_loss(x, steps, tabular, Args(**kinds))[0]  # noqa: E731
    assert torch.equal(grad(loss)(PARAMS, some), grad(loss)(PARAMS, other))
    cut = Steps(*(column[:2] for column in some))
    torch.testing.assert_close(loss(PARAMS, some), loss(PARAMS, cut))  # nor does it count in the mean


@pytest.mark.parametrize(("count", "sizes"), [(7, [4, 3]), (8, [4, 4]), (9, [3, 3, 3]), (2, [2])])
def test_minibatches_hold_every_step_once(count, sizes):
    steps = Steps(*(10.0 * k + torch.arange(1.0, count + 1) for k in range(6)))
    order = torch.randperm(count)
    parts = list(minibatches(steps, order, 4))
    assert all(len(column) == 4 for part in parts for column in part)
    real = [part.weight > 0 for part in parts]
    assert [r.tolist() for r in real] == [[i < size for i in range(4)] for size in sizes]
    for column, found in zip(steps, zip(*parts, strict=True), strict=True):
        kept = torch.cat([values[r] for values, r in zip(found, real, strict=True)])
        assert torch.equal(kept, column[order])


def test_the_kl_in_the_rewards_is_charged_step_for_step():
    """The reference sees observations by its own statistics, and the filling of a batch stays as it is."""
    obs = torch.tensor([[[1.0], [2.0]], [[-1.0], [50.0]]])
    alive = torch.tensor([[True, True], [True, False]])
    action, reward = torch.tensor([[1, 0], [1, 1]]), torch.tensor([[1.0, 2.0], [3.0, 99.0]])
    episodes = Episodes(obs, action, reward, alive, obs[0], torch.zeros(2, dtype=torch.bool))
    now, then = update_stats(new_stats(1), torch.tensor([[0.0], [4.0]])), new_stats(1)
    state = SimpleNamespace(params=torch.tensor(0.5), obs_stats=now, ref=torch.tensor(-1.0), ref_stats=then)

    def forward(params, obs):
        return Categorical(torch.cat((0 * obs, params * obs), -1))

    new = forward(0.5, (obs - 2) / 2).log_prob(action)
    ref = forward(-1.0, obs).log_prob(action)
    for kl, charge in (("k1", new - ref), ("k2", (new - ref) ** 2 / 2)):
        args = Args(group_size=2, advantage="to-go", beta=0.5, kl=kl)
        steps, metrics = grpo.batch_of(episodes, state, forward, args)
        torch.testing.assert_close(steps.log_prob, new[alive])
        torch.testing.assert_close(steps.ref_log_prob, ref[alive])
        charged = reward - 0.5 * charge
        torch.testing.assert_close(steps.advantage, advantages(charged, alive, args)[alive])
        assert metrics["kl"].item() == pytest.approx((new - ref)[alive].sum().item() / 2)
    in_loss, _ = grpo.batch_of(episodes, state, forward, replace(args, kl_in="loss"))
    torch.testing.assert_close(in_loss.advantage, advantages(reward, alive, args)[alive])
    assert torch.equal(in_loss.ref_log_prob, steps.ref_log_prob)
    free, metrics = grpo.batch_of(episodes, state, forward, replace(args, beta=0.0))
    assert torch.equal(free.advantage, in_loss.advantage) and "kl" not in metrics
    lengths, _ = grpo.batch_of(episodes, state, forward, replace(args, length="episode"))
    assert lengths.weight.tolist() == [0.75, 1.5, 0.75]  # 1.5 over the lengths 2 and 1


# --- runs ---------------------------------------------------------------------------------------------------

SMALL = dict(
    num_envs=16, group_size=4, minibatch_size=64, learning_rate=0.02, hidden=(16,), num_epochs=4,
    eval_every=0, total_steps=960, normalize_obs=False, device="cpu", compile=False, progress=False,
    env_threads=1,
)  # fmt: skip


def small(folder, env, **changes):
    return Args(**{**SMALL, "env": env, "run_dir": str(folder), **changes})


def rows(folder):
    """progress.csv without the clocks."""
    with open(Path(folder) / "progress.csv", newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in ("wall_time", "sps")} for row in csv.DictReader(file)
        ]


def trained(folder):
    return load_checkpoint(Path(folder) / "agent.pt", "--agent", "grpo")["state"]


@pytest.fixture
def batches(monkeypatch):
    """The batches that train collected, with their seeds."""
    collect, seen = grpo.collect_episodes, []

    def collected(envs, seeds, policy, generator):
        result = collect(envs, seeds, policy, generator)
        seen.append((seeds, result[0]))
        return result

    monkeypatch.setattr(grpo, "collect_episodes", collected)
    return seen


def test_a_group_begins_from_one_seed_and_batches_from_others(tmp_path, batches):
    grpo.train(small(tmp_path, "CartPole-v1", num_envs=6, group_size=3, total_steps=300, num_epochs=1))
    assert len(batches) >= 2
    starts = []
    for seeds, episodes in batches:
        assert seeds[0] == seeds[1] == seeds[2] != seeds[3] == seeds[4] == seeds[5]
        first = episodes.obs[0]
        assert (first[:3] == first[0]).all() and (first[3:] == first[3]).all()
        assert len({tuple(action) for action in episodes.action.T.tolist()}) > 2  # each acts for itself
        starts += [tuple(first[0].tolist()), tuple(first[3].tolist())]
    assert len(set(starts)) == 2 * len(batches)


def test_ungrouped_every_environment_has_a_seed_of_its_own(tmp_path, batches):
    grpo.train(small(tmp_path, "CartPole-v1", num_envs=6, group_size=3, total_steps=300, ungrouped=True))
    assert all(len(set(seeds)) == 6 for seeds, _ in batches)
    assert len({tuple(obs) for _, episodes in batches for obs in episodes.obs[0].tolist()}) == 6 * len(
        batches
    )


@pytest.mark.parametrize(("ungrouped", "batch"), [(False, 4), (True, 3)])
def test_steps_are_those_of_the_episodes(tmp_path, monkeypatch, ungrouped, batch):
    """The script of probes.py: two steps from an even seed, one from an odd one, and then the waiting."""
    monkeypatch.setattr(grpo, "env_seeds", lambda seed, purpose, count, *index: list(range(2, 2 + count)))
    args = small(tmp_path, "probe/Scripted-v0", num_envs=2, group_size=2, total_steps=5, ungrouped=ungrouped)
    grpo.train(args)
    assert [int(row["step"]) for row in rows(tmp_path)] == [batch, 2 * batch]
    assert float(rows(tmp_path)[0]["train_length"]) == batch / 2


def test_the_learning_rate_falls(tmp_path):
    for anneal in (True, False):
        folder = tmp_path / str(anneal)
        grpo.train(small(folder, "probe/Act-v0", total_steps=64, anneal=anneal))
        rates = [float(row["learning_rate"]) for row in rows(folder)]
        assert rates == pytest.approx([0.02 * (1 - k / 4 if anneal else 1) for k in range(4)])


@pytest.mark.parametrize("advantage", ["outcome", "to-go", "process"])
@pytest.mark.parametrize("std", [False, True])
def test_returns_that_are_all_equal_change_nothing(tmp_path, advantage, std):
    args = small(tmp_path, "probe/ConstantValue-v0", total_steps=64, advantage=advantage, std=std)
    torch.manual_seed(grpo.generator_seed(args.seed, "network"))
    fresh, _ = grpo.flatten(grpo.PolicyNetwork(make_envs(args.env, 1), args.hidden, args.log_std))
    grpo.train(args)
    assert torch.equal(trained(tmp_path)["params"], fresh)
    assert {float(row["grad_norm"]) for row in rows(tmp_path)} == {0.0}


def test_every_epoch_learns_all_steps_by_the_policy_that_acted(tmp_path, monkeypatch):
    """What the minibatches hold, put together: the log-probabilities of the policy at the time, with its
    statistics; one optimiser goes through all batches."""
    collect, update, acted, parts = grpo.collect_episodes, grpo.update, [], []

    def collected(envs, seeds, policy, generator):
        episodes, ended = collect(envs, seeds, policy, generator)
        log_prob = [policy(obs.numpy()).log_prob(a) for obs, a in zip(*episodes[:2], strict=True)]
        acted.append(torch.stack(log_prob)[episodes.alive])
        parts.append([])
        return episodes, ended

    def updated(params, opt, steps, *rest, **given):
        result = update(params, opt, steps, *rest, **given)
        parts[-1].append((params, opt, steps, result))
        return result

    monkeypatch.setattr(grpo, "collect_episodes", collected)
    monkeypatch.setattr(grpo, "update", updated)
    grpo.train(small(tmp_path, "CartPole-v1", num_envs=4, group_size=2, total_steps=250, num_epochs=3,
                     minibatch_size=32, normalize_obs=True))  # fmt: skip
    assert len(acted) >= 2
    last = None
    for log_prob, given in zip(acted, parts, strict=True):
        per_epoch, orders = -(-len(log_prob) // 32), []
        assert len(given) == 3 * per_epoch
        for e in range(3):
            epoch = [part for _, _, part, _ in given[e * per_epoch :][:per_epoch]]
            found = torch.cat([part.log_prob[part.weight > 0] for part in epoch])
            torch.testing.assert_close(found.sort().values, log_prob.sort().values)
            orders.append(found.tolist())
        assert orders[0] != orders[1] != orders[2]
        for params, opt, _, result in given:
            assert last is None or (params is last[0] and opt is last[1])
            last = result
    assert last is not None and last[1]["t"] == sum(len(given) for given in parts)


def test_every_step_has_noise_of_its_own():
    drawn = []

    class Policy:
        def sample(self, noise):
            drawn.append(noise)
            return 0 * noise

    with make_envs("Pendulum-v1", 2) as envs:
        grpo.collect_episodes(envs, [1, 1], lambda obs: Policy(), torch.Generator().manual_seed(0))
    assert torch.stack(drawn).shape == (200, 2, 1) and len(torch.stack(drawn).unique()) == 400


def test_observations_are_taken_as_they_are_unless_normalised(tmp_path):
    grpo.train(small(tmp_path, "CartPole-v1", total_steps=200, normalize_obs=False))
    found, fresh = trained(tmp_path)["obs_stats"], new_stats(4)
    assert found.keys() == fresh.keys() and all(torch.equal(found[name], x) for name, x in fresh.items())


def test_an_update_scales_its_gradient_down():
    """Adam's first moment is a tenth of the first gradient's, whose norm is --max-grad-norm."""
    args, rate = Args(max_grad_norm=0.01), torch.tensor(0.1)
    params, opt, metrics = grpo.update(PARAMS, grpo.new_adam(PARAMS), steps_of(), rate, tabular, args)
    assert opt["m"].norm().item() == pytest.approx(1e-3, rel=1e-3) and metrics["grad_norm"] > 0.1
    assert (params - PARAMS).abs().max() > 0.05


# --- probe environments -------------------------------------------------------------------------------------


def learnt(args):
    """The actions, in the environment's scale, of the deterministic policy that a run leaves."""
    grpo.train(args)
    envs = make_envs(args.env, 1)
    policy = grpo.make_policy(envs, args, trained(args.run_dir))
    return lambda *obs: envs.to_env_action(policy(np.array(obs, np.float32)[:, None])).reshape(-1).tolist()


@pytest.mark.parametrize(
    "changes",
    [{}, dict(std=True), dict(advantage="to-go"), dict(advantage="process"), dict(ungrouped=True),
     dict(length="episode", normalize_obs=True)],
)  # fmt: skip
def test_probe_acting_on_the_observation(tmp_path, changes):
    act = learnt(small(tmp_path, "probe/ActOnObs-v0", **changes))
    assert act(-1, 1) == [0, 1]


@pytest.mark.parametrize("changes", [{}, dict(std=True, normalize_obs=True)])
def test_probe_acting_on_the_observation_in_a_box(tmp_path, changes):
    act = learnt(small(tmp_path, "probe/ActOnObsBox-v0", num_envs=64, total_steps=3200, **changes))
    assert act(-1, 1) == pytest.approx([3.0, 5.0], abs=0.25)


# --- the reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", [dict(kl="k1", kl_in="reward"), dict(kl="k3", kl_in="loss")])
def test_a_strong_kl_keeps_the_policy_near_the_reference(tmp_path, kl):
    """Act pays 1 and -1: with beta = 4 the best odds, from even ones, are e^(2 / 4)."""
    args = small(tmp_path, "probe/Act-v0", num_envs=64, group_size=16, total_steps=3200, beta=4.0, **kl)
    grpo.train(args)
    net = grpo.PolicyNetwork(make_envs(args.env, 1), args.hidden, args.log_std)
    params = grpo.flatten(net)[1](trained(tmp_path)["params"])
    chance = functional_call(net, params, (torch.zeros(1, 1),)).logits.softmax(-1)[0, 1].item()
    # in the rewards exactly that; as k3 in the loss the best policy for the other direction, near by
    assert chance == pytest.approx(torch.tensor(0.5).sigmoid().item(), abs=0.04)
    assert float(rows(tmp_path)[0]["kl"]) == 0 and float(rows(tmp_path)[-1]["kl"]) != 0


def test_a_finished_run_is_the_start_and_the_reference(tmp_path, capsys):
    first = small(tmp_path / "first", "CartPole-v1", total_steps=200, normalize_obs=True)
    grpo.train(first)
    args = replace(first, run_dir=str(tmp_path / "next"), reference=first.run_dir, beta=1.0, num_epochs=1)
    grpo.train(args)
    assert float(rows(args.run_dir)[0]["kl"]) == 0  # they are one policy
    saved = load_checkpoint(tmp_path / "next" / "checkpoint.pt", "--resume", "grpo")["state"]
    before = trained(first.run_dir)
    assert torch.equal(saved["ref"], before["params"]) and not torch.equal(saved["params"], before["params"])
    assert all(torch.equal(saved["ref_stats"][name], x) for name, x in before["obs_stats"].items())
    assert saved["obs_stats"]["count"] > before["obs_stats"]["count"]
    with pytest.raises(UsageError, match=r"--reference .*first: its policy has 114 .* 58; give the --hidden"):
        grpo.train(replace(args, run_dir=None, hidden=(8,)))
    # as many parameters in another shape
    wide = replace(first, run_dir=str(tmp_path / "wide"), hidden=(3, 5, 2))
    grpo.train(wide)
    count = len(trained(wide.run_dir)["params"])
    other = next(
        (a, b, c)
        for a, b, c in itertools.product(range(1, 12), repeat=3)
        if (a, b, c) != wide.hidden and 5 * a + (a + 1) * b + (b + 1) * c + (c + 1) * 2 == count
    )
    with pytest.raises(UsageError, match=r"give the --hidden that it was trained with, 3 5 2"):
        grpo.train(replace(args, run_dir=None, reference=wide.run_dir, hidden=other))
    with pytest.raises(UsageError, match=r"--reference .*nowhere: no such folder"):
        grpo.train(replace(args, run_dir=None, reference=str(tmp_path / "nowhere")))
    with pytest.raises(UsageError, match=r"--reference .*Pendulum"):
        grpo.train(replace(args, run_dir=None, env="Pendulum-v1"))


# --- whole runs ---------------------------------------------------------------------------------------------


def test_compiled_equals_eager(tmp_path):
    """20 updates on a task without chaos: what rounding leaves."""
    for compiled in (False, True):
        grpo.train(small(tmp_path / str(compiled), "probe/ActOnObsBox-v0", total_steps=320, compile=compiled))
    ends = [trained(tmp_path / str(compiled))["params"] for compiled in (False, True)]
    assert len(rows(tmp_path / "True")) == 20
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_same_seed_same_table_and_a_resumed_run_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch, env):
    """Every batch begins new episodes from seeds of its own, so that a resumed run equals one never
    stopped."""
    changes = dict(
        num_envs=4, group_size=2, total_steps=2400 if env == "Pendulum-v1" else 400, normalize_obs=True,
        checkpoint_every=1e-9, num_epochs=2, beta=0.1,
    )  # fmt: skip
    tables = {}
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        torch.manual_seed(99)  # nothing of the process's own generators may matter
        np.random.seed(len(tables))  # noqa: NPY002
        grpo.train(small(tmp_path / name, env, seed=seed, **changes))
        tables[name] = rows(tmp_path / name)
    assert tables["one"] == tables["two"] != tables["other"] and len(tables["one"]) >= 3
    collect, calls = grpo.collect_episodes, []

    def collect_twice(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RunFault("power cut")
        return collect(*args)

    monkeypatch.setattr(grpo, "collect_episodes", collect_twice)
    args = small(tmp_path / "halves", env, seed=3, **changes)
    with pytest.raises(RunFault, match="power cut"), Process():  # which frees the folder
        grpo.train(args)
    assert len(rows(tmp_path / "halves")) == 2
    grpo.train(replace(args, run_dir=None, resume=args.run_dir))
    assert rows(tmp_path / "halves") == tables["one"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_a_run_on_cuda_and_its_resumption(tmp_path, env):
    changes = dict(device="cuda", compile=True, beta=0.1, normalize_obs=True, num_epochs=1, eval_every=1000)
    args = small(tmp_path / "run", env, total_steps=3200, **changes)
    assert np.isfinite(grpo.train(args))
    assert np.isfinite(grpo.train(replace(args, run_dir=None, resume=args.run_dir, total_steps=6400)))


def test_cartpole_is_learnt(tmp_path):
    """The task's own settings, for an eighth of its steps; without learning it falls after 20."""
    args = Args.for_env(
        "CartPole-v1", total_steps=25_000, compile=False, eval_every=0, progress=False, run_dir=str(tmp_path)
    )
    assert grpo.train(args) >= 450


# --- bad input ----------------------------------------------------------------------------------------------


class Unseeded(probes.RandomSign):
    """Draws its start from a generator of its own, whatever the seed; `Once`: seeded at the first reset only;
    `Fixed`: every copy has one start.
    """

    def __init__(self, kind=""):
        self.kind, self.own = kind, np.random.default_rng()
        self.obs = self.own.normal()

    def reset(self, *, seed=None, options=None):
        if self.kind == "Once" and seed is not None:
            self.own, self.kind = np.random.default_rng(seed), ""
        if self.kind != "Fixed":
            self.obs = self.own.normal()
        return self.see(), {}

    def step(self, action):
        return self.see(), 1.0, True, False, {}


for kind in ("", "Once", "Fixed"):
    gym.register(f"probe/Unseeded{kind}-v0", Unseeded, kwargs=dict(kind=kind))


@pytest.mark.parametrize("kind", ["", "Once", "Fixed"])
def test_a_reset_that_ignores_its_seed_is_refused(tmp_path, kind):
    env = f"probe/Unseeded{kind}-v0"
    with pytest.raises(UsageError, match=rf"--env {env}: its reset ignores the seed.*--ungrouped"):
        grpo.train(small(tmp_path / "run", env))
    assert not (tmp_path / "run").exists()
    grpo.train(small(tmp_path / "run", env, ungrouped=True, total_steps=32))
    grpo.train(small(tmp_path / "same", "probe/Act-v0", total_steps=32))  # always the same start is no fault


@pytest.fixture
def command_line(monkeypatch, capsys):
    """Run the agent's command line in this process: its exit status and the lines on stderr."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["grpo.py", *map(str, argv)])
        capsys.readouterr()
        try:
            main(Args, grpo.train, lambda env: grpo.SETTINGS.get(env, {}))
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
        (["--group-size", 1], ["--group-size 1", "at least 2"]),
        (["--group-size", 0], ["--group-size", "at least 1", "0"]),
        (["--group-size", 5], ["--group-size 5", "--num-envs 32"]),
        (["--num-envs", 4], ["--group-size 8", "--num-envs 4"]),
        (["--minibatch-size", 0], ["--minibatch-size", "at least 1", "0"]),
        (["--num-epochs", 0], ["--num-epochs", "at least 1", "0"]),
        (["--gamma", 1.5], ["--gamma", "[0, 1]", "1.5"]),
        (["--gamma", 0.9, "--advantage", "process"], ["--gamma 0.9", "--advantage process", "--gamma 1"]),
        (["--beta", -1], ["--beta", "at least 0", "-1"]),
        (["--beta", "nan"], ["--beta", "at least 0", "nan"]),
        (["--clip", 0], ["--clip", "greater than 0", "0"]),
        (["--reference", "nowhere"], ["--reference nowhere", "no such folder"]),
        (["--reference", ""], ["--reference is empty", "folder"]),
        (["--bound-coef", -5], ["--bound-coef", "at least 0", "-5"]),
        (["--env", "probe/Unseeded-v0"], ["--env probe/Unseeded-v0", "ignores the seed", "--ungrouped"]),
        (["--env", "probe/MultiDiscreteAction-v0"], ["--env probe/MultiDiscreteAction-v0", "MultiDiscrete"]),
    ],
)
def test_arguments_that_cannot_work(tmp_path, monkeypatch, command_line, argv, words):
    monkeypatch.chdir(tmp_path)
    status, lines = command_line("--env", "probe/Act-v0", "--no-compile", "--run-dir", "run", *argv)
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(word in lines[0] for word in words), lines[0]
    assert not list(tmp_path.iterdir())


def test_a_diverging_run_stops_and_names_what_became_infinite(tmp_path, command_line):
    status, lines = command_line(
        "--env", "probe/ActBox-v0", "--learning-rate", 1e30, "--no-compile", "--run-dir", tmp_path
    )
    assert status == 1 and re.match(r"error: .*(became|non-finite)", lines[1]), lines
    assert not (tmp_path / "agent.pt").exists()


def test_observations_are_normalised_by_what_was_acted_on_before(tmp_path, batches):
    """The first batch as it is, the second by the first's statistics, idle environments not counted."""
    grpo.train(small(tmp_path, "CartPole-v1", num_envs=4, group_size=2, total_steps=200, normalize_obs=True))
    stats = new_stats(4)
    for _, episodes in batches:
        stats = update_stats(stats, episodes.obs[episodes.alive])
    saved = trained(tmp_path)["obs_stats"]
    assert saved["count"] == sum(int(episodes.alive.sum()) for _, episodes in batches)
    torch.testing.assert_close(saved, stats)
    assert normalize(torch.ones(1, 4), saved).abs().max() > 1
