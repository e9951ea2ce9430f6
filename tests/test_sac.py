"""SAC: its distribution, losses and buffer by hand and by enumeration, its update against torch's parts,
whole runs."""

import csv
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
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from torch.func import functional_call
from torch.nn.functional import linear

from zoo import sac
from zoo.common.classic_engine import step_continuous_mountain_car
from zoo.common.cli import main
from zoo.common.device import flatten
from zoo.common.envs import make_envs
from zoo.common.errors import RunFault
from zoo.common.files import load_checkpoint
from zoo.common.process import Process
from zoo.common.replay import ReplayBuffer
from zoo.sac import (
    Actor,
    Args,
    SquashedGaussian,
    TwinCritic,
    actor_loss,
    alpha_loss,
    critic_loss,
    polyak,
    soft_target,
    soft_value,
    soft_value_loss,
)

F64 = torch.float64
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
SPACES = SimpleNamespace(obs_dim=3, action_dim=2)


class DiscountBox(probes.Discount):
    action_space = probes.TWO_TO_SIX


if "probe/DiscountBox-v0" not in gym.registry:
    gym.register("probe/DiscountBox-v0", DiscountBox)


# --- the squashed Gaussian ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (0.7, -2.0), (3.0, -0.7), (-5.0, 0.0), (0.0, 2.0)])
def test_the_density_integrates_to_1(mean, log_std):
    """Over (-1, 1), also where nearly all of it lies at an end."""
    noise = torch.linspace(-9, 9, 40_001, dtype=F64)[:, None]
    # beyond, an action is no longer told from its bound
    noise = noise[(mean + np.exp(log_std) * noise).abs().squeeze(-1) < 15]
    dist = SquashedGaussian(torch.full_like(noise, mean), torch.full_like(noise, log_std))
    action, log_prob = dist.sample(noise)
    missing = 1 - Normal(0.0, 1.0).cdf(noise[-1]) + Normal(0.0, 1.0).cdf(noise[0])
    assert torch.trapezoid(log_prob.exp(), action.squeeze(-1)).item() == pytest.approx(
        1 - missing.item(), abs=1e-4
    )


def test_the_log_probability_equals_torchs():
    torch.manual_seed(0)
    mean, log_std, noise = torch.randn(3, 50, 4, dtype=F64)
    log_std = 0.3 * log_std  # beyond |u| = 10 torch's atanh(action) has lost what tells u
    theirs = TransformedDistribution(Normal(mean, log_std.exp()), [TanhTransform(cache_size=1)])
    action, log_prob = SquashedGaussian(mean, log_std).sample(noise)
    torch.testing.assert_close(log_prob, theirs.log_prob(action).sum(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(SquashedGaussian(mean, log_std).mode(), mean.tanh())


def test_the_correction_is_exact_where_float32_saturates():
    """At |u| = 30, 1 - tanh(u)^2 is 0 in float32; its logarithm is 2 log 2 - 60."""
    dist = SquashedGaussian(torch.tensor([[-30.0], [30.0]]), torch.zeros(2, 1))
    _, log_prob = dist.sample(torch.zeros(2, 1))
    expected = -0.5 * np.log(2 * np.pi) - 2 * np.log(2) + 60
    torch.testing.assert_close(log_prob, torch.full((2,), expected, dtype=torch.float32))


def test_the_actor_bounds_its_log_std():
    torch.manual_seed(0)
    actor = Actor(SPACES, (4,))
    with torch.no_grad():
        actor.net[-1].bias += torch.tensor([0.0, 0.0, 1e3, -1e3])
    dist = actor(torch.randn(5, 3))
    assert torch.equal(dist.log_std, torch.tensor([[2.0, -20.0]]).expand(5, 2))


# --- estimators and losses ----------------------------------------------------------------------------------


def test_targets_by_hand():
    q, log_prob = torch.tensor([[1.0, 5.0, 2.0], [3.0, -4.0, 2.0]]), torch.tensor([-1.0, 2.0, 0.0])
    value = soft_value(q, log_prob, torch.tensor(0.5))
    assert value.tolist() == [
        1.5,
        -5.0,
        2.0,
    ]  # the lesser of the two Qs, and alpha before the log-probability
    terminated = torch.tensor([False, True, False])
    assert soft_target(torch.tensor([10.0, 20.0, 30.0]), terminated, value, 0.5).tolist() == [
        10.75,
        20.0,
        31.0,
    ]


def test_polyak_by_hand():
    assert polyak(torch.tensor([0.0, 8.0]), torch.tensor([4.0, 4.0]), 0.25).tolist() == [1.0, 7.0]


def test_losses_by_hand():
    q, target = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([0.0, 4.0])
    assert critic_loss(q, target).item() == (1 + 4) / 4 + (9 + 16) / 4
    assert soft_value_loss(q[0], target).item() == (1 + 4) / 4
    assert actor_loss(q, torch.tensor([1.0, 2.0]), torch.tensor(0.5)).item() == (0.5 - 1 + 1.0 - 0) / 2
    log_alpha = torch.tensor(0.0, requires_grad=True)
    alpha_loss(log_alpha, torch.tensor([1.0, 3.0]), -5.0).backward()
    assert log_alpha.grad.item() == 3.0  # entropy -2 above the target -5: alpha falls


def test_gradients_equal_finite_differences():
    """Of each loss by its network's parameters, the actor's through its sample, in double precision."""
    torch.manual_seed(0)
    nets = [net.double() for net in (Actor(SPACES, (5,)), TwinCritic(SPACES, (5,)), sac.mlp((3, 5, 1)))]
    (actor, to_actor), (critic, to_critic), (value, to_value) = map(flatten, nets)
    obs, action, target = torch.randn(7, 3, dtype=F64), torch.rand(7, 2, dtype=F64), torch.randn(7, dtype=F64)
    noise, alpha = torch.randn(7, 2, dtype=F64), torch.tensor(0.3, dtype=F64)

    def of_critic(params):
        return critic_loss(functional_call(nets[1], to_critic(params), (obs, action)), target)

    def of_value(params):
        return soft_value_loss(functional_call(nets[2], to_value(params), (obs,)).squeeze(-1), target)

    def of_actor(params):
        ours, log_prob = functional_call(nets[0], to_actor(params), (obs,)).sample(noise)
        return actor_loss(functional_call(nets[1], to_critic(critic), (obs, ours)), log_prob, alpha)

    for loss, params in ((of_critic, critic), (of_value, value), (of_actor, actor)):
        assert torch.autograd.gradcheck(loss, params.detach().requires_grad_())
    assert torch.autograd.gradcheck(lambda x: alpha_loss(x, target, -2.0), alpha.clone().requires_grad_())


def test_the_twin_critic_is_two_networks():
    torch.manual_seed(0)
    net = TwinCritic(SPACES, (8, 6))
    obs, action = torch.randn(5, 3), torch.randn(5, 2)
    for i, q in enumerate(net(obs, action)):
        x = torch.cat((obs, action), 1)
        for n, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
            x = linear(x.relu() if n else x, weight[i].T, bias[i, 0])
        torch.testing.assert_close(q, x.squeeze(1))
    wide = TwinCritic(SimpleNamespace(obs_dim=90, action_dim=10), (500,))
    assert wide.weights[0].abs().max().item() == pytest.approx(0.1, rel=1e-3)  # as nn.Linear's
    assert nn.Linear(100, 500).weight.abs().max().item() == pytest.approx(0.1, rel=1e-3)


# --- what train hands to the update, and what the update makes of it ----------------------------------------

SMALL = dict(
    num_envs=4, total_steps=400, random_steps=80, batch_size=32, buffer_size=1000, learning_rate=3e-3,
    hidden=(16,), critic_learning_rate=3e-3, gamma=0.9, tau=0.05, eval_every=0, report_every=100,
    device="cpu", compile=False, progress=False, env_threads=1,
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
    """What a run's functions were given and returned.

    updates: [((learner, batch, noise), (learner, metrics))]; target_entropies: one an update; policies: for
    each policy made, in order, [(observations, distribution)]; actions: what the environments were given.
    """
    seen = SimpleNamespace(updates=[], target_entropies=[], policies=[], actions=[])
    update, policy_at, add = sac.update, sac.policy_at, ReplayBuffer.add

    def noted_update(nets, args, target_entropy, *given):
        seen.target_entropies.append(target_entropy)
        seen.updates.append((given, update(nets, args, target_entropy, *given)))
        return seen.updates[-1][1]

    def noted_policy_at(net):
        policy, calls = policy_at(net), []
        seen.policies.append(calls)

        def noted(obs):
            calls.append((obs.copy(), policy(obs)))
            return calls[-1][1]

        return noted

    def noted_add(buffer, obs, action, step):
        seen.actions.append(action.clone())
        add(buffer, obs, action, step)

    monkeypatch.setattr(sac, "update", noted_update)
    monkeypatch.setattr(sac, "policy_at", noted_policy_at)
    monkeypatch.setattr(ReplayBuffer, "add", noted_add)
    return seen


@pytest.mark.parametrize(
    "changes",
    [{}, dict(alpha=0.3), dict(target_entropy=0.5), dict(value_network=True),
     dict(value_network=True, alpha=0.3)],
    ids=lambda changes: ",".join(changes) or "defaults",
)  # fmt: skip
def test_updates_equal_torchs_own_parts(tmp_path, spy, changes):
    """Twelve updates with separate modules, torch's distributions, backward and Adam, in the order of the
    published loop."""
    args = small(
        tmp_path, "Pendulum-v1", total_steps=92, learning_rate=1e-3, critic_learning_rate=3e-3, **changes
    )
    sac.train(args)
    updates = spy.updates
    assert len(updates) == 12
    envs = make_envs("Pendulum-v1", 1)
    start = updates[0][0][0]
    actor, twin, value = Actor(envs, (16,)), TwinCritic(envs, (16,)), sac.mlp((3, 16, 1))

    def load(net, vector):
        net.load_state_dict(flatten(net)[1](vector))
        return net

    def vector(net):
        return flatten(net)[0]

    load(actor, start["actor"])
    load(twin, start["critic"])
    followed = twin
    if args.value_network:
        followed = load(value, start["value"])
    lagging = type(followed)(envs, (16,)) if followed is twin else sac.mlp((3, 16, 1))
    load(lagging, start["target"])
    assert torch.equal(vector(lagging), vector(followed))  # targets start equal
    log_alpha = torch.tensor(np.log(args.alpha or 1.0), dtype=torch.float32, requires_grad=True)
    rates = {actor: 1e-3, twin: 3e-3, value: 3e-3}
    optims = {net: torch.optim.Adam(net.parameters(), lr=rate) for net, rate in rates.items()}
    alpha_optim = torch.optim.Adam([log_alpha], lr=3e-3)
    wanted_entropy = -1.0 if args.target_entropy is None else args.target_entropy

    def acted(obs, noise):
        dist = actor(obs)
        u = dist.mean + dist.log_std.exp() * noise
        torchs = TransformedDistribution(Normal(dist.mean, dist.log_std.exp()), [TanhTransform(cache_size=1)])
        action = torchs.transforms[0](u)
        return action, torchs.log_prob(action).sum(-1)

    def descend(optim, loss):
        optim.zero_grad()
        loss.backward()
        optim.step()

    for (_, batch, noise), (learner, metrics) in updates:
        alpha = log_alpha.exp().detach()
        with torch.no_grad():
            if args.value_network:
                action, log_prob = acted(batch.obs, noise[0])
                soft = torch.min(*twin(batch.obs, action)) - alpha * log_prob
                future = lagging(batch.next_obs)[:, 0]
            else:
                action, log_prob = acted(batch.next_obs, noise[0])
                future = torch.min(*lagging(batch.next_obs, action)) - alpha * log_prob
            target = batch.reward + 0.9 * torch.where(batch.terminated, 0.0, future)
        if args.value_network:
            v_loss = nn.functional.mse_loss(value(batch.obs)[:, 0], soft) / 2
            descend(optims[value], v_loss)
            assert metrics["vf_loss"].item() == pytest.approx(v_loss.item(), rel=1e-3)
        q1, q2 = twin(batch.obs, batch.action)
        q_loss = (nn.functional.mse_loss(q1, target) + nn.functional.mse_loss(q2, target)) / 2
        descend(optims[twin], q_loss)
        action, log_prob = acted(batch.obs, noise[1])
        pi_loss = (alpha * log_prob - torch.min(*twin(batch.obs, action))).mean()
        descend(optims[actor], pi_loss)
        if args.alpha is None:
            descend(alpha_optim, -(log_alpha.exp() * (log_prob.detach() + wanted_entropy)).mean())
        with torch.no_grad():
            for old, new in zip(lagging.parameters(), followed.parameters(), strict=True):
                old.lerp_(new, 0.05)
        found = {"actor": actor, "critic": twin, "target": lagging} | (
            {"value": value} if args.value_network else {}
        )
        for name, net in found.items():
            torch.testing.assert_close(learner[name], vector(net), rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(learner["log_alpha"], log_alpha.detach(), rtol=1e-4, atol=1e-6)
        assert metrics["qf_loss"].item() == pytest.approx(q_loss.item(), rel=1e-3)
        for name, q in (("qf1", q1), ("qf2", q2)):
            assert metrics[f"{name}_values"].item() == pytest.approx(q.mean().item(), rel=1e-3, abs=1e-4)
            assert metrics[f"{name}_loss"].item() == pytest.approx(
                nn.functional.mse_loss(q, target).item(), rel=1e-3
            )
        assert metrics["actor_loss"].item() == pytest.approx(pi_loss.item(), rel=1e-3)
        assert metrics["entropy"].item() == pytest.approx(-log_prob.mean().item(), rel=1e-3, abs=1e-4)
    assert (log_alpha.item() == pytest.approx(np.log(args.alpha or 1.0))) == (args.alpha is not None)


def test_random_actions_come_first_and_are_held(tmp_path, spy):
    sac.train(small(tmp_path, "Pendulum-v1", total_steps=100, random_steps=80, random_hold=5))
    actions = spy.actions
    assert len(actions) == 25 and len(spy.policies[0]) == 5
    assert all(torch.equal(actions[i], actions[i - i % 5]) for i in range(20))
    firsts = torch.stack(actions[:20:5]).flatten()
    assert len(set(firsts.tolist())) == 16 and firsts.min() < -0.5 and firsts.max() > 0.5
    assert firsts.abs().max() <= 1


def test_exploration_has_nothing_in_common_with_the_networks(tmp_path, spy):
    """Both are uniform numbers: of one stream, the first actions would be the actor's first weights."""
    sac.train(small(tmp_path, "Pendulum-v1", total_steps=484, random_steps=400))
    explored = torch.stack(spy.actions[:100]).flatten()
    learner = spy.updates[0][0][0]
    for name in ("actor", "critic"):
        for first in range(len(explored) - 48):  # wherever in the stream the networks' numbers begin
            weights = learner[name][:48]
            together = torch.corrcoef(torch.stack((weights, explored[first : first + 48])))[0, 1]
            assert together.abs() < 0.7, (name, first)


@pytest.mark.parametrize(("rate", "count"), [(1.0, 104), (0.5, 52), (0.3, 31), (2.5, 260)])
def test_updates_are_counted_by_environment_steps(tmp_path, spy, rate, count):
    """The last iteration is whole: 184 steps, not the 183 asked for."""
    sac.train(small(
        tmp_path, "probe/EndlessBox-v0", total_steps=183, random_steps=80, updates_per_step=rate,
        report_every=30,
    ))  # fmt: skip
    table = rows(tmp_path)
    assert len(spy.updates) == count == int(rate * 184) - int(rate * 80)
    assert [int(row["step"]) for row in table] == [32, 64, 96, 128, 160, 184]
    assert not table[1]["qf_loss"] and table[2]["qf_loss"]
    assert all(float(row["train_return"]) == float(row["train_length"]) == 5 for row in table)


class WideBox(probes.Endless):
    action_space = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)


if "probe/WideBox-v0" not in gym.registry:
    gym.register("probe/WideBox-v0", WideBox, max_episode_steps=5)


def test_each_dimension_of_an_action_is_drawn_and_counts_in_the_target_entropy(tmp_path, spy):
    sac.train(small(tmp_path, "probe/WideBox-v0", total_steps=24, random_steps=16, batch_size=2))
    assert set(spy.target_entropies) == {-3.0}
    assert len(torch.stack(spy.actions[:4]).unique()) == 4 * 4 * 3  # random ones, of 4 environments
    for action, (_, dist) in zip(spy.actions[4:], spy.policies[0], strict=True):
        first, second, third = ((action.atanh() - dist.mean) / dist.log_std.exp()).T  # the policy's noise
        assert min((first - second).abs().min(), (second - third).abs().min()) > 1e-4


def test_the_newest_actor_acts_and_in_a_resumed_run_the_checkpoints(tmp_path, spy):
    args = small(tmp_path, "probe/EndlessBox-v0", total_steps=88, random_steps=80, batch_size=8)
    sac.train(args)
    sac.train(replace(args, run_dir=None, resume=args.run_dir, total_steps=96))
    actor = Actor(make_envs(args.env, 1), (16,))
    # of the two steps by the policy of each run the second came after four updates
    acted = [spy.policies[0][1], *spy.policies[2][:2]]
    for (obs, dist), update in zip(acted, (3, 7, 11), strict=True):
        learner = spy.updates[update][1][0]
        actor.load_state_dict(flatten(actor)[1](learner["actor"]))
        torch.testing.assert_close(dist.mean, actor(torch.as_tensor(obs)).mean, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_draws_as_one_that_was_not_stopped(tmp_path):
    """On a task that is ever the same nothing but the checkpoint's content matters."""
    args, ends = small(tmp_path / "whole", "probe/ActBox-v0", total_steps=104, batch_size=8), []
    sac.train(args)
    for where in (dict(total_steps=92), dict(run_dir=None, resume=str(tmp_path / "halves"))):
        sac.train(replace(args, **dict(run_dir=str(tmp_path / "halves")) | where))
    for folder in (tmp_path / "whole", tmp_path / "halves"):
        ends.append(load_checkpoint(folder / "checkpoint.pt", "--resume")["state"])
    for name in ("actor", "critic", "target", "log_alpha"):
        assert torch.equal(ends[0]["learner"][name], ends[1]["learner"][name]), name
    assert torch.equal(ends[0]["buffer"]["action"], ends[1]["buffer"]["action"])


# --- probe environments -------------------------------------------------------------------------------------


def learnt(args):
    """What a run leaves: Q of the policy's own action (observations in, the lesser of both), and its
    actions."""
    sac.train(args)
    folder, envs = Path(args.run_dir), make_envs(args.env, 1)
    learner = load_checkpoint(folder / "checkpoint.pt", "--resume", "sac")["state"]["learner"]
    policy = sac.make_policy(envs, args, load_checkpoint(folder / "agent.pt", "--agent", "sac")["state"])
    net = TwinCritic(envs, args.hidden)

    def q(*obs):
        seen = torch.tensor(obs, dtype=torch.float32)[:, None]
        action = torch.as_tensor(policy(seen.numpy()))
        return functional_call(net, flatten(net)[1](learner["critic"]), (seen, action)).min(0).values.tolist()

    def act(*obs):
        return envs.to_env_action(policy(np.array(obs, np.float32)[:, None])).reshape(-1).tolist()

    return q, act


FAST = dict(learning_rate=0.02, critic_learning_rate=0.02)
FORMS = pytest.mark.parametrize("value_network", [False, True], ids=["twin-targets", "value-network"])


@FORMS
def test_probe_time_limit_is_no_end_of_the_world(tmp_path, value_network):
    """Reward 1 for ever, cut every 5 steps; a uniform policy's entropy is log 2, so V = (1 + alpha log 2) /
    (1 - gamma).

    A forgotten entropy makes Q = 5, a forgotten alpha 7.8, a truncation taken for a termination at most 4.6.
    """
    q, _ = learnt(small(
        tmp_path, "probe/EndlessBox-v0", alpha=0.5,
        value_network=value_network, total_steps=400, tau=0.2, gamma=0.8, **FAST
    ))  # fmt: skip
    assert q(0) == pytest.approx([1 + 0.8 * (1 + 0.5 * np.log(2)) / (1 - 0.8)], abs=0.4)


@FORMS
def test_probe_termination_ends_the_future(tmp_path, value_network):
    """Two steps, reward 1 at the end: Q(1) = 1, Q(0) = gamma (1 + alpha log 2)."""
    q, _ = learnt(small(
        tmp_path, "probe/DiscountBox-v0", alpha=0.2,
        value_network=value_network, total_steps=400, gamma=0.7, tau=0.2, **FAST
    ))  # fmt: skip
    assert q(0, 1) == pytest.approx([0.7 * (1 + 0.2 * np.log(2)), 1.0], abs=0.05)


@pytest.mark.parametrize(
    ("value_network", "alpha"),
    [(False, None), (True, 0.01)],
    ids=["twin-targets-tuned", "value-network-fixed"],
)
def test_probe_acting_on_the_observation_in_a_box(tmp_path, value_network, alpha):
    """Bounds [2, 6], best action 4 + o. Episodes of one step have no future, so that both forms learn the
    same."""
    _, act = learnt(small(
        tmp_path, "probe/ActOnObsBox-v0", alpha=alpha,
        value_network=value_network, total_steps=480, hidden=(32,), **FAST
    ))  # fmt: skip
    assert act(-1, 1) == pytest.approx([3.0, 5.0], abs=0.3)


def test_probe_acting_in_a_box(tmp_path):
    _, act = learnt(small(tmp_path, "probe/ActBox-v0", total_steps=400, **FAST))
    assert act(0) == pytest.approx([3.0], abs=0.3)


def test_the_temperature_meets_its_target(tmp_path):
    sac.train(small(
        tmp_path, "probe/ActOnObsBox-v0", target_entropy=-0.5, total_steps=480, hidden=(32,), **FAST
    ))  # fmt: skip
    assert float(rows(tmp_path)[-1]["entropy"]) == pytest.approx(-0.5, abs=0.25)


# --- settings -----------------------------------------------------------------------------------------------


def soft_optimum_climbs(alpha: float, gamma: float) -> bool:
    """Whether the soft optimum of MountainCarContinuous-v0 drives from the bottom, at rest, to the flag.

    By soft value iteration over 61 positions, 41 velocities and 15 actions, values between them interpolated.
    Never to reach the flag earns alpha log(integral of exp(-0.1 a^2 / alpha)) a step with the best noise.
    """
    env = gym.make("MountainCarContinuous-v0").unwrapped
    low, high, shape = np.array([-1.2, -0.07]), np.array([0.6, 0.07]), (61, 41)
    positions, velocities = (np.linspace(*ends) for ends in zip(low, high, shape, strict=True))
    actions, width = np.linspace(-1, 1, 15), 2 / 15
    grid = np.meshgrid(positions, velocities, actions, indexing="ij")
    position, velocity, action = (axis.ravel() for axis in grid)
    state, begun = np.stack((position, velocity)), np.zeros(len(action), dtype=bool)
    reward, flag = step_continuous_mountain_car(env, state, action[:, None], begun)
    place = (state.T - low) / (high - low) * (np.array(shape) - 1)
    cell = np.minimum(place.astype(int), np.array(shape) - 2)
    (i, j), (u, v) = cell.T, (place - cell).T

    def soft_max(q):
        return alpha * np.logaddexp.reduce(q / alpha + np.log(width), axis=-1)

    never = soft_max(-0.1 * actions**2) / (1 - gamma)
    value = np.full(shape, never)
    for _ in range(400):
        here, above = ((1 - v) * value[k, j] + v * value[k, j + 1] for k in (i, i + 1))
        q = reward + gamma * ~flag * ((1 - u) * here + u * above)
        value = soft_max(q.reshape(*shape, -1))
    return bool(value[np.abs(positions + 0.5).argmin(), shape[1] // 2] > never + 1)


def test_mountain_cars_setting_has_the_flag_for_its_optimum():
    setting = Args.for_env("MountainCarContinuous-v0")
    assert soft_optimum_climbs(setting.alpha, setting.gamma)
    assert not soft_optimum_climbs(setting.alpha, 0.9999)  # RL Zoo's discount, and ours before


# --- whole runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "device"),
    [
        (dict(value_network=True, alpha=0.2), "cpu"),
        pytest.param(dict(value_network=True, alpha=0.2), "cuda", marks=CUDA),
        pytest.param({}, "cuda", marks=CUDA),
    ],
    ids=["value-network-cpu", "value-network-cuda", "twin-targets-cuda"],
)
def test_compiled_equals_eager(tmp_path, no_fallback, form, device):
    """200 updates on one task without chaos: what rounding leaves. (Of twin targets on the CPU: see
    test_pendulum_is_learnt_by_compiled_updates.)"""
    ends = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        sac.train(
            small(
                folder,
                "probe/ActOnObsBox-v0",
                compile=compiled,
                total_steps=280,
                hidden=(8,),
                device=device,
                **form,
            )
        )
        learner = load_checkpoint(folder / "checkpoint.pt", "--resume")["state"]["learner"]
        ends.append({name: x for name, x in learner.items() if not isinstance(x, dict)})
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-3)


@DEVICES
def test_a_buffer_that_wraps_and_a_resumed_run(tmp_path, device):
    args = small(tmp_path, "probe/EndlessBox-v0", buffer_size=64, device=device, compile=device == "cuda")
    assert np.isfinite(sac.train(replace(args, total_steps=200)))
    saved = load_checkpoint(tmp_path / "checkpoint.pt", "--resume")["state"]["buffer"]
    assert saved["size"] == 16 and saved["obs"].shape == (17, 4, 1)
    assert np.isfinite(sac.train(replace(args, run_dir=None, resume=args.run_dir)))
    assert [int(row["step"]) for row in rows(tmp_path)] == [100, 200, 300, 400]


def test_bf16_reaches_torch(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    try:
        for bf16, precision in ((True, "medium"), (False, "highest")):
            sac.train(
                small(tmp_path / precision, "probe/ActBox-v0", bf16=bf16, total_steps=84, eval_episodes=1)
            )
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_same_seed_gives_the_same_table(tmp_path):
    tables = []
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        torch.manual_seed(99)  # nothing of the process's own generators may matter
        np.random.seed(len(tables))  # noqa: NPY002
        sac.train(
            small(tmp_path / name, "Pendulum-v1", seed=seed, total_steps=200, eval_every=100, eval_episodes=2)
        )
        tables.append(rows(tmp_path / name))
    assert tables[0] == tables[1] != tables[2] and len(tables[0]) == 2
    assert all(row["eval_return"] for row in tables[0])


def test_a_stopped_run_resumed_goes_on(tmp_path, monkeypatch, spy):
    """Networks, optimisers, buffer and generator are the checkpoint's; episodes start anew, from other
    starts, and none is joined."""
    whole = small(tmp_path / "run", "Pendulum-v1", checkpoint_every=1e-9, total_steps=400)
    report = sac.Run.report

    def failing(run, step, *rest):
        report(run, step, *rest)
        if step == 200:
            raise RunFault("power cut")

    monkeypatch.setattr(sac.Run, "report", failing)
    add, seen = ReplayBuffer.add, []

    def watched(buffer, obs, action, step):
        finals = buffer.final_obs[:4].clone()
        seen.append((obs.copy(), buffer.size, buffer.endings[1], buffer.obs[buffer.size].clone(), finals))
        add(buffer, obs, action, step)

    monkeypatch.setattr(ReplayBuffer, "add", watched)
    with pytest.raises(RunFault, match="power cut"), Process():  # which closes the run, as in main
        sac.train(whole)
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pt", "--resume", "sac")
    assert saved["step"] == 200 and saved["state"]["buffer"]["size"] == 50
    stopped = len(spy.updates)
    last = spy.updates[-1][1][0]
    sac.train(replace(whole, run_dir=None, resume=whole.run_dir, target_entropy=-3.0))
    resumed = spy.updates[stopped][0][0]
    torch.testing.assert_close(resumed, last, rtol=0, atol=0)
    generator = torch.Generator()
    generator.set_state(saved["state"]["generator"])
    obs, dist = spy.policies[1][0]
    assert torch.equal(spy.actions[50], dist.sample(torch.randn(4, 1, generator=generator))[0])
    starts, (others, size, endings, newest, finals) = seen[0][0], seen[50]
    assert (size, endings) == (50, 4) and torch.equal(newest, finals)
    assert np.array_equal(others, obs)
    assert not set(starts.flatten().tolist()) & set(others.flatten().tolist())
    assert [int(row["step"]) for row in rows(tmp_path / "run")] == [100, 200, 300, 400]
    # what the state does not hold can be given anew
    assert set(spy.target_entropies[:stopped]) == {-1.0} and set(spy.target_entropies[stopped:]) == {-3.0}


@pytest.fixture
def command_line(monkeypatch, capsys):
    """Run the agent's command line in this process: its exit status and the lines on stdout and stderr."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["sac.py", *map(str, argv)])
        capsys.readouterr()
        try:
            main(Args, sac.train, lambda env: sac.SETTINGS.get(env, {}))
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *(text.splitlines() for text in capsys.readouterr())

    old = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield run
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), old, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "argv",
    [("--num-envs", 2), ("--buffer-size", 500), ("--value-network",), ("--hidden", 8), ("--alpha", 0.3)],
)
def test_a_resumed_run_keeps_its_networks_and_buffer(tmp_path, command_line, argv):
    folder = tmp_path / "run"
    sac.train(small(folder, "probe/ActBox-v0", eval_episodes=1, total_steps=100))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    status, _, lines = command_line("--resume", folder, "--total-steps", 200, *argv)
    assert (
        status == 2
        and len(lines) == 1
        and lines[0].startswith(f"error: {argv[0]} ")
        and str(folder) in lines[0]
    ), lines
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_pendulum_is_learnt_by_compiled_updates(tmp_path, command_line, monkeypatch, no_fallback):
    """From the command line, targets four times as fast as the task's own settings have them. The first 200
    updates equal eager ones from the same start, on the same batches: what rounding leaves."""
    made, compile_function = [], sac.compile_function

    def noted(function, *where):
        compiled = compile_function(function, *where)

        def call(*given):
            result = compiled(*given)
            if len(made) < 200:
                made.append((function, given, result))
            return result

        return call

    monkeypatch.setattr(sac, "compile_function", noted)
    status, out, _ = command_line(
        "--env", "Pendulum-v1", "--total-steps", 5000, "--tau", 0.02, "--eval-every", 0,
        "--run-dir", tmp_path,
    )  # fmt: skip
    assert status == 0
    assert float(re.fullmatch(r"final evaluation: (\S+) ± \S+ over 100 episodes", out[-1])[1]) >= -160
    learner = made[0][1][0]
    for update, (_, batch, noise), _ in made:
        learner = update(learner, batch, noise)[0]
    for name, x in made[-1][2][0].items():
        if not isinstance(x, dict):
            torch.testing.assert_close(x, learner[name], rtol=1e-3, atol=1e-3)
    assert len(made) == 200 and not torch.equal(learner["target"], made[0][1][0]["target"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--env", "CartPole-v1"], ["--env CartPole-v1", "discrete", "zoo/ppo.py"]),
        (["--env", "probe/Bounds-v0"], ["--env probe/Bounds-v0", "unbounded", "zoo/ppo.py"]),
        (["--env", "probe/MultiDiscreteAction-v0"], ["--env probe/MultiDiscreteAction-v0", "MultiDiscrete"]),
        (["--batch-size", 0], ["--batch-size", "at least 1", "0"]),
        (["--random-hold", 0], ["--random-hold", "at least 1", "0"]),
        (["--random-steps", -1], ["--random-steps", "at least 0", "-1"]),
        (["--buffer-size", 3, "--num-envs", 4], ["--buffer-size 3", "--num-envs 4"]),
        (["--total-steps", 0], ["--total-steps", "at least 1", "0"]),
        (["--total-steps", 40, "--random-steps", 40], ["--random-steps 40", "--total-steps 40"]),
        (["--target-entropy", "nan"], ["--target-entropy", "finite", "nan"]),
        (["--buffer-size", 10**14], ["--buffer-size", "memory"]),
        (["--buffer-size", 10**21], ["--buffer-size", "memory"]),
        (["--bf16"], ["--bf16", "neither AMX nor AVX512-BF16", "--no-bf16"]),
        (["--alpha", 0.2, "--target-entropy", -1], ["--target-entropy", "fixed --alpha"]),
        (["--alpha", 0], ["--alpha", "greater than 0", "0"]),
        (["--updates-per-step", 0.02], ["--updates-per-step 0.02", "no update", "--total-steps 40"]),
        (["--updates-per-step", 0], ["--updates-per-step", "greater than 0", "0"]),
        (["--tau", 1.5], ["--tau", "[0, 1]", "1.5"]),
        (["--gamma", -0.1], ["--gamma", "[0, 1]", "-0.1"]),
    ],
)
def test_arguments_that_cannot_work(tmp_path, command_line, monkeypatch, argv, words):
    for feature in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{feature}_supported", lambda: False)
    given = argv if "--env" in argv else ["--env", "probe/ActBox-v0", *argv]
    short = ["--total-steps", 40, "--random-steps", 0, "--eval-episodes", 1, "--no-compile"]
    status, _, lines = command_line(*short, "--run-dir", tmp_path / "run", *given)
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(word in lines[0] for word in words), lines[0]
    assert not (tmp_path / "run").exists()


def test_a_diverging_run_stops_and_names_what_became_infinite(tmp_path, command_line):
    status, _, lines = command_line(
        "--env", "probe/ActBox-v0", "--critic-learning-rate", 1e30, "--random-steps", 8, "--hidden", 8,
        "--report-every", 4, "--no-compile", "--run-dir", tmp_path,
    )  # fmt: skip
    assert status == 1 and re.match(r"error: \w+ became (nan|inf|-inf) in the iteration", lines[1]), lines
    assert not (tmp_path / "agent.pt").exists()
