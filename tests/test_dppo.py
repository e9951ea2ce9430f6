"""zoo/dppo.py: the two-level MDP by hand and beside PPO's own functions, chunks, cloning, runs, bad input."""

import dataclasses
import sys
from functools import partial
from types import SimpleNamespace

import agents
import command
import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import distributions as td
from torch.func import functional_call, grad_and_value

import zoo
from zoo import dppo, ppo
from zoo.common import demonstrations
from zoo.common.demonstrations import Episode
from zoo.common.device import compile_function, flatten
from zoo.common.envs import make_envs
from zoo.common.errors import EnvironmentFault, RunFault, UsageError
from zoo.common.files import load_checkpoint
from zoo.common.optim import new_adam
from zoo.common.vector_env import Step
from zoo.dppo import ActorCritic, Args, DenoisingSteps, chunk_gae, two_level

SMALL = dict(
    hidden=(16, 16), denoising_steps=3, clone_steps=40, clone_batch=16, data_steps=200, num_envs=4,
    num_steps=8, num_epochs=2, minibatch_size=8, total_steps=96, eval_every=32, eval_episodes=2,
    env_threads=1, compile=False, progress=False, device="cpu",
)  # fmt: skip


def small(**changes):
    return Args(**(SMALL | changes))


def model(args, obs_dim=2, action_dim=1, gain=1.0):
    """A fresh network, its head's weights times `gain`, its schedule, parameters and forward function."""
    schedule = dppo.make_schedule(args)
    torch.manual_seed(0)
    net = ActorCritic(obs_dim, args.chunk * action_dim, schedule, args.hidden)
    net.policy_head.weight.data *= gain
    params, unflatten = flatten(net)
    return net, schedule, params, lambda p, *inputs: functional_call(net, unflatten(p), inputs)


def chains(args, count=6, action_dim=1):
    """A fresh network's observations, chains and the noise that made them."""
    net, schedule, params, forward = model(args, action_dim=action_dim, gain=100.0)
    generator = torch.Generator().manual_seed(1)
    obs = torch.randn(count, 2, generator=generator)
    noise = torch.randn(args.chain + 1, count, args.chunk * action_dim, generator=generator)
    return net, schedule, params, forward, obs, noise, dppo.denoise(net, schedule, obs, noise).detach()


# --- the two-level MDP --------------------------------------------------------------------------------------


def test_the_log_probability_of_a_denoising_step():
    """A step is a Gaussian about DDPM's posterior mean (Ho et al. 2020, eq. 7) where no sigma is raised."""
    args = small(denoising_steps=4, min_std=1e-3)
    net, schedule, *_, obs, noise, chain = chains(args, action_dim=3)
    alpha_bar = schedule.signal.double() ** 2
    rows, x, x_next, k, log_prob = (part.detach() for part in dppo.denoising_rows(net, schedule, obs, chain))
    assert (
        len(x) == 6 * 4 and k[:5].tolist() == [1, 2, 3, 4, 1] and torch.equal(rows[:4], obs[:1].expand(4, -1))
    )
    for i in range(len(x)):
        step, chain_of = int(k[i]), chain[i // 4]
        assert torch.equal(x[i], chain_of[step]) and torch.equal(x_next[i], chain_of[step - 1])
        x0 = net.policy(rows[i : i + 1], x[i : i + 1], k[i : i + 1])[0].double()
        now, before = alpha_bar[step], alpha_bar[step - 1]
        mean = before.sqrt() * (1 - now / before) / (1 - now) * x0
        mean = mean + (now / before).sqrt() * (1 - before) / (1 - now) * x[i].double()
        expected = td.Normal(mean, schedule.sigma[step].double()).log_prob(x_next[i].double()).sum()
        # the least sigma is the last step's alone
        tolerance = 2e-3 if step > 1 else 2e-2
        torch.testing.assert_close(log_prob[i].double(), expected, rtol=tolerance, atol=tolerance)
        drawn = schedule.sigma[step] * noise[step - 1, i // 4]
        torch.testing.assert_close(x_next[i].double() - mean, drawn.double(), rtol=1e-3, atol=1e-4)


def test_no_sigma_is_below_the_least_and_nothing_is_left_at_the_end():
    schedule = dppo.make_schedule(small(denoising_steps=10, min_std=0.2))
    assert schedule.sigma.min() == pytest.approx(0.2) and schedule.sigma.max() > 0.5
    assert schedule.signal[10] == 0 and schedule.noise[10] == 1 and schedule.signal[0] == 1


def test_one_step_is_the_gaussian_policy():
    """K = 1: actions, log-probabilities, loss and gradient are those of zoo/ppo.py's Gaussian with std 0.2,
    and what the chain begins with changes nothing.
    """
    args = small(policy="gaussian", minibatch_size=6)
    net, schedule, params, forward, obs, noise, chain = chains(args, action_dim=3)
    assert chain.shape == (6, 2, 3)
    other = dppo.denoise(net, schedule, obs, torch.stack((noise[0], noise[1] + 5)))
    torch.testing.assert_close(other[:, 0], chain[:, 0])

    def gaussian(params, obs):
        x0, value = forward(params, obs, torch.zeros(len(obs), 3), torch.ones(len(obs), dtype=torch.int64))
        return ppo.Gaussian(x0, torch.full((3,), 0.2).log()), value

    policy, value = gaussian(params, obs)
    torch.testing.assert_close(policy.sample(noise[0]), chain[:, 0])
    rows = dppo.denoising_rows(net, schedule, obs, chain)
    torch.testing.assert_close(policy.log_prob(chain[:, 0]), rows[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(policy.mode(), dppo.denoise(net, schedule, obs, 0 * noise)[:, 0])

    advantage, return_, old = torch.randn(6), torch.randn(6), rows[-1].detach() + 0.3 * torch.randn(6)
    ours = DenoisingSteps(*rows[:-1], old, two_level(advantage, 1, 0.9).flatten(), return_)
    theirs = ppo.Batch(obs, chain[:, 0], old, value, advantage, return_)
    one = grad_and_value(dppo.dppo_loss, has_aux=True)(params, ours, torch.ones(()), forward, schedule, args)
    other_args = ppo.Args(clip=args.clip, value_coef=args.value_coef, normalize_advantages=False)
    two = grad_and_value(ppo.ppo_loss, has_aux=True)(params, theirs, torch.ones(()), gaussian, other_args)
    torch.testing.assert_close(one[0], two[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(one[1][0], two[1][0], rtol=1e-4, atol=1e-5)
    assert one[1][1]["clipfrac"] == two[1][1]["clipfrac"] > 0


def test_the_advantage_of_the_two_level_mdp():
    """GAE over the steps of both levels laid in a row, by its recursion. V is that of s at every level, so
    that inside a chain delta = 0; there lambda is the denoising discount and gamma 1.
    """
    steps, gamma, lam, denoising = 3, 0.5, 0.5, 0.25
    reward, value = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2.0, 6.0, 1.0])
    next_value = torch.tensor([6.0, 1.0, 8.0])
    flags = torch.zeros(3, 1, dtype=torch.bool)
    found = chunk_gae(reward[:, None], value[:, None], next_value[:, None], flags, flags, ~flags, gamma, lam)
    # delta = 1 + 3 - 2, 2 + .5 - 6, 4 + 4 - 1, and a factor of 1/4 from one to the next
    assert found.flatten().tolist() == [2 - 3.5 / 4 + 7 / 16, -3.5 + 7 / 4, 7.0]
    expected, running = [], 0.0
    for t in (2, 1, 0):
        for k in range(1, steps + 1):  # backwards in time
            delta = reward[t] + gamma * next_value[t] - value[t] if k == 1 else 0.0
            running = delta + (gamma * lam if k == 1 else denoising) * running
            if k == 1:
                running_at_1 = running
            expected.append((t, k, float(running)))
        running = (
            running_at_1  # of the step of the task: what A(s, a) bootstraps from is not discounted twice
        )
    table = two_level(found.flatten(), steps, denoising)
    for t, k, value_ in expected:
        assert table[t, k - 1] == pytest.approx(value_), (t, k)


# --- chunks -------------------------------------------------------------------------------------------------


class Recorder:
    """Two environments of scripted lengths (3 and then 2 steps, or endless), which record their actions."""

    num_envs, action_dim, discrete = 2, 1, False

    def __init__(self, ends):
        self.ends, self.actions, self.t = ends, [], 0

    def step(self, action):
        self.actions.append(action[:, 0].tolist())
        ended = np.array([self.t in ends for ends in self.ends])
        self.t += 1
        obs = np.full((2, 1), float(self.t), np.float32)
        return Step(obs, np.ones(2), obs, ended, np.zeros(2, bool), [])


def test_a_chunk_stops_at_the_end_of_its_episode():
    """Actions are numbered by the step at which they were decided: 100 t + their place in the chunk."""
    envs, asked = Recorder([(2,), ()]), []

    def policy(obs, noise):
        asked.append(len(asked))
        t = float(obs[0, 0])
        chain = torch.zeros(2, 3, 4)
        chain[:, 0] = 100 * t + torch.arange(4)
        return chain

    noise = torch.zeros(7, 3, 2, 4)
    rollout, begins, obs, _ = dppo.collect_chunks(envs, np.zeros((2, 1), np.float32), policy, noise, 4)
    first, second = zip(*envs.actions, strict=True)
    assert first == (0, 1, 2, 300, 301, 302, 303)  # the fourth action is never played
    assert second == (0, 1, 2, 3, 400, 401, 402)
    assert begins[:, 0].nonzero().flatten().tolist() == [0, 3] and begins[
        :, 1
    ].nonzero().flatten().tolist() == [0, 4]
    assert len(asked) == 3 and rollout.action.shape == (7, 2, 3, 4)
    assert rollout.action[:, 0, 0, 0].tolist() == [0, 0, 0, 300, 300, 300, 300]
    # the next rollout begins with new chunks: what was left of the old ones is dropped
    _, begins, *_ = dppo.collect_chunks(envs, obs, policy, noise[:2], 4)
    assert begins.tolist() == [[True, True], [False, False]] and envs.actions[7] == [700, 700]


def random_rollout(seed, steps=12, envs=3):
    generator = torch.Generator().manual_seed(seed)
    reward, value, next_value = torch.randn(3, steps, envs, generator=generator, dtype=torch.float64)
    terminated, truncated = torch.rand(2, steps, envs, generator=generator) < 0.15
    return reward, value, next_value, terminated, truncated


def test_chunks_of_one_step_have_gae():
    rollout = [x.float() if x.is_floating_point() else x for x in random_rollout(0)]
    everywhere = torch.ones_like(rollout[3])
    torch.testing.assert_close(chunk_gae(*rollout, everywhere, 0.9, 0.8), ppo.gae(*rollout, 0.9, 0.8))


def test_the_advantage_of_chunks_by_their_definition():
    """delta of a chunk is its discounted rewards + gamma^length V' - V; sums of them, lambda from one to the
    next.
    """
    reward, value, next_value, terminated, truncated = random_rollout(1)
    ended = terminated | truncated
    begins, gamma, lam = torch.zeros_like(ended), 0.9, 0.7
    for n in range(3):
        played = 3
        for t in range(12):
            if played == 3:
                begins[t, n], played = True, 0
            played = 3 if ended[t, n] else played + 1
    assert 0.3 < begins.float().mean() < 0.8 and ended.sum() > 3
    found = chunk_gae(reward, value, next_value, terminated, truncated, begins, gamma, lam)
    for n in range(3):
        starts = begins[:, n].nonzero().flatten().tolist()
        running = 0.0
        for start, stop in reversed(list(zip(starts, [*starts[1:], 12], strict=True))):
            length, last = stop - start, stop - 1
            delta = sum(gamma**j * reward[start + j, n] for j in range(length)) - value[start, n]
            delta += gamma**length * next_value[last, n] * ~terminated[last, n]
            running = delta + gamma**length * lam * running * (~ended[last, n])
            assert found[start, n] == pytest.approx(float(running), abs=1e-9)


# --- cloning ------------------------------------------------------------------------------------------------


def recorded(lengths=(5, 3, 2), action_dim=1):
    """Episodes whose observations and actions tell episode and step: 10 e + t."""
    return [
        Episode(
            10.0 * e + np.arange(length, dtype=np.float32)[:, None],
            (10.0 * e + np.arange(length) + 100 * np.arange(action_dim)[:, None]).T,
            np.ones(length),
            e != 2,
        )
        for e, length in enumerate(lengths)
    ]


def test_windows_do_not_run_past_an_episode():
    obs, action = demonstrations.windows(recorded(action_dim=2), 3)
    assert obs.flatten().tolist() == [0, 1, 2, 10]
    assert action[-1].tolist() == [10, 110, 11, 111, 12, 112] and action.dtype == np.float32
    with pytest.raises(UsageError, match="--chunk 6: the longest episode of the data has 5 steps"):
        demonstrations.windows(recorded(), 6)
    broken = recorded()
    broken[1].action[2] = np.inf
    with pytest.raises(UsageError, match="--data: holds numbers that are not finite"):
        demonstrations.windows(broken, 1)
    assert (
        demonstrations.mean_return(recorded()) == 4.0 and demonstrations.mean_return(recorded()[2:]) is None
    )


def test_an_agent_plays_the_data(tmp_path):
    """Its own actions, in the policy's scale and within bounds; episodes are cut where they end."""
    folder = agents.untrained(tmp_path / "run", "probe/ActOnObsBox-v0", gain=40.0)
    with make_envs("probe/ActOnObsBox-v0", 1) as envs:
        episodes = demonstrations.open_demonstrations(str(folder), envs)(45, 3)
    again = demonstrations.open_demonstrations(str(folder), envs)(45, 3)
    assert [len(e.obs) for e in episodes] == [1] * 50 and all(e.whole for e in episodes)
    played = zoo.load(folder).policy(np.stack([e.obs[0] for e in episodes])).flatten()
    np.testing.assert_allclose([e.action[0, 0] for e in episodes], (played - 4) / 2, atol=1e-6)
    rewards = [-((a - 4 - e.obs[0, 0]) ** 2) for a, e in zip(played, episodes, strict=True)]
    np.testing.assert_allclose([e.reward[0] for e in episodes], rewards, atol=1e-5)
    assert all(np.array_equal(a.obs, b.obs) for a, b in zip(episodes, again, strict=True))


@pytest.fixture
def minari(monkeypatch):
    """A stand-in for the package, with one data set on disk."""
    episodes = [
        SimpleNamespace(
            observations=np.arange(4.0)[:, None] + 10 * e, actions=np.array([[2.0], [4.0], [6.0]]),
            rewards=np.ones(3), terminations=np.array([False, False, e == 0]), truncations=np.zeros(3, bool),
        )
        for e in range(3)
    ]  # fmt: skip

    def load_dataset(name):
        if name != "known":
            raise FileNotFoundError(name)
        spec = SimpleNamespace(env_spec=SimpleNamespace(id="probe/ActBox-v0"))
        return SimpleNamespace(spec=spec, iterate_episodes=lambda: iter(episodes))

    monkeypatch.setitem(sys.modules, "minari", SimpleNamespace(load_dataset=load_dataset))


def test_a_data_set_of_minari(minari):
    with make_envs("probe/ActBox-v0", 1) as envs:
        episodes = demonstrations.open_demonstrations("minari:known", envs)(5, 0)
        with pytest.raises(UsageError, match="--data minari:other: no such data set on this disk"):
            demonstrations.open_demonstrations("minari:other", envs)
    assert len(episodes) == 2 and [e.whole for e in episodes] == [True, False]
    assert episodes[1].obs.flatten().tolist() == [10, 11, 12] and episodes[1].action.flatten().tolist() == [
        -1,
        0,
        1,
    ]
    with (
        make_envs("probe/ActOnObsBox-v0", 1) as envs,
        pytest.raises(
            UsageError, match="another task, it was recorded on probe/ActBox-v0, and --env is probe/ActOnO"
        ),
    ):
        demonstrations.open_demonstrations("minari:known", envs)


def test_without_minari(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with (
        make_envs("probe/ActBox-v0", 1) as envs,
        pytest.raises(UsageError, match="needs Minari: pip install"),
    ):
        demonstrations.open_demonstrations("minari:known", envs)


@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_a_diffusion_policy_keeps_two_modes_where_a_gaussian_has_their_mean(policy):
    """The data say -0.5 or 0.5, whatever is seen."""
    args = small(policy=policy, denoising_steps=8, min_std=0.05, hidden=(32, 32))
    net, schedule, params, forward = model(args)
    generator, opt = torch.Generator().manual_seed(0), new_adam(params)
    for i in range(4):
        obs = torch.randn(100, 128, 2, generator=generator)
        action = torch.randint(2, (100, 128, 1), generator=generator) - 0.5
        k = torch.randint(1, args.chain + 1, (100, 128), generator=generator)
        eps = torch.randn(100, 128, 1, generator=generator)
        batches = dppo.Demonstrated(obs, action, eps, k)
        rate = torch.tensor(1e-2 * (1 - i / 4))
        params, opt, _ = dppo.clone(forward, schedule, args, params, opt, batches, rate)
    torch.nn.utils.vector_to_parameters(params, net.parameters())
    noise = torch.randn(args.chain + 1, 1000, 1, generator=generator)
    with torch.no_grad():
        action = dppo.denoise(net, schedule, torch.randn(1000, 2, generator=generator), noise)[:, 0]
    apart = (action.abs() > 0.25).float().mean()
    assert apart > 0.8 if policy == "diffusion" else apart < 0.1
    if policy == "diffusion":
        assert 0.35 < (action > 0).float().mean() < 0.65 and action.abs().mean() == pytest.approx(
            0.5, abs=0.1
        )


def test_compiled_equals_eager():
    """Both updates, whole passes of minibatches."""
    args = small(minibatch_size=3, hidden=(8,))
    net, schedule, params, forward, obs, _, chain = chains(args, count=9, action_dim=2)
    rows = dppo.denoising_rows(net, schedule, obs, chain)
    *rest, old = (row.detach() for row in rows)
    batch = DenoisingSteps(*rest, old + 0.1, torch.randn(27), torch.randn(27))
    order, one = torch.randperm(27), torch.ones(())
    shown = dppo.Demonstrated(
        obs[None].repeat(2, 1, 1), torch.rand(2, 9, 2), torch.randn(2, 9, 2), torch.ones(2, 9).long()
    )
    for function, inputs in (
        (partial(dppo.fine_tune, forward, schedule, args), (batch, order, 1e-2 * one, one)),
        (partial(dppo.clone, forward, schedule, args), (shown, 1e-2 * one)),
    ):
        eager = function(params, new_adam(params), *inputs)
        compiled = compile_function(function, torch.device("cpu"))(params, new_adam(params), *inputs)
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
        assert (eager[0] - params).abs().max() > 1e-3


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return agents.untrained(tmp_path_factory.mktemp("data") / "run", "probe/ActOnObsBox-v0", gain=3.0)


TASK = dict(env="probe/ActOnObsBox-v0")


@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_a_clone_is_improved(policy, source, tmp_path):
    """From a clone that plays near 4 to a = 4 + o, where the reward is 0: the table has both ends."""
    result = dppo.train(small(
        **TASK, policy=policy, data=str(source), run_dir=str(tmp_path / "run"), num_envs=16, num_steps=16,
        clone_steps=400, total_steps=6400, num_epochs=5, minibatch_size=64, learning_rate=3e-3, gamma=0.0,
        eval_every=3200, eval_episodes=50, hidden=(32, 32),
    ))  # fmt: skip
    table = command.rows(tmp_path / "run")
    first = next(row for row in table if row["eval_return"])
    assert first["step"] == "0" and float(first["data_return"]) < -0.5
    assert float(first["eval_return"]) == pytest.approx(float(first["data_return"]), abs=0.35)
    assert result > -0.05
    agent = zoo.load(tmp_path / "run")
    np.testing.assert_allclose(agent.policy(np.array([[-1.0], [1.0]])).flatten(), [3, 5], atol=0.5)


def test_the_critic_learns_alone_at_first(source, tmp_path):
    """The policy's parameters stay the clone's, the critic's do not."""
    common = dict(**TASK, data=str(source), eval_every=0, total_steps=32, checkpoint_every=1e-9)
    args = small(**common, run_dir=str(tmp_path / "run"), warmup=1)
    kept = []
    report = dppo.Run.report

    def keep(run, step, state, *rest, **named):
        kept.append(state)
        return report(run, step, state, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dppo.Run, "report", keep)
        dppo.train(args)
    before, after = kept[-2].params, kept[-1].params
    net = ActorCritic(1, 1, dppo.make_schedule(args), args.hidden)
    same = {name: torch.equal(a, b) for (name, _), a, b in zip(
        net.named_parameters(), *(x.split([p.numel() for p in net.parameters()]) for x in (before, after)),
        strict=True)}  # fmt: skip
    assert all(equal == name.startswith("policy") for name, equal in same.items()), same


class Watched:
    """What train hands on: in `updates` for each update its rollout, what acted in it, its statistics and its
    epochs, in `clones` the calls of cloning."""

    def __init__(self, patch):
        self.updates, self.clones, collect, as_seen = [], [], dppo.collect_chunks, dppo.as_seen
        fine_tune, clone = dppo.fine_tune, dppo.clone

        def collected(envs, obs, policy, noise, chunk):
            tried = (torch.as_tensor(obs), noise[0], policy(obs, noise[0]))
            rollout, begins, *rest = collect(envs, obs, policy, noise, chunk)
            self.updates.append(SimpleNamespace(tried=tried, noise=noise, begins=begins, epochs=[]))
            return rollout, begins, *rest

        def seen(rollout, obs_stats, return_stats, sums, args):
            result = as_seen(rollout, obs_stats, return_stats, sums, args)
            self.updates[-1].__dict__.update(
                rollout=rollout, stats=obs_stats, sums=sums, seen=result[0], next_sums=result[3]
            )
            return result

        def tuned(forward, schedule, args, params, opt, batch, order, rate, coef):
            result = fine_tune(forward, schedule, args, params, opt, batch, order, rate, coef)
            self.updates[-1].epochs.append(
                SimpleNamespace(
                    params=params, opt=opt, batch=batch, order=order, rate=rate.item(), coef=coef.item(),
                    made=result[:2],
                )
            )  # fmt: skip
            return result

        def cloned(forward, schedule, args, params, opt, batches, rate):
            self.clones.append((batches, rate.item()))
            return clone(forward, schedule, args, params, opt, batches, rate)

        for name, function in (
            ("collect_chunks", collected), ("as_seen", seen), ("fine_tune", tuned), ("clone", cloned)
        ):  # fmt: skip
            patch.setattr(dppo, name, function)


@pytest.fixture
def watched(monkeypatch):
    return Watched(monkeypatch)


class Drift(gym.Env):
    """The observation moves by the action and is paid for being near 0; cut after 5 steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = self.np_random.normal(3.0, 2.0, 1).astype(np.float32)
        return self.at, {}

    def step(self, action):
        self.at = self.at + action
        return self.at, -float(np.abs(self.at[0])), False, False, {}


gym.register("probe/Drift-v0", Drift, max_episode_steps=5)


def test_an_update_is_made_of_what_acted_and_of_what_came_of_it(watched, tmp_path):
    """Chunks of 2 in episodes of 5 steps, rollouts of 9: in all epochs the log-probabilities of the policy
    that acted, the two levels' advantages and the critic's targets anew in each, rows of decisions alone, and
    a rate that falls."""
    args = small(
        env="probe/Drift-v0", chunk=2, data=str(agents.untrained(tmp_path / "data", "probe/Drift-v0", 3.0)),
        run_dir=str(tmp_path / "run"), num_steps=9, minibatch_size=6, total_steps=144, warmup=2,
        denoising_gamma=0.5, gamma=0.9, gae_lambda=0.6, num_epochs=3, eval_every=0,
    )  # fmt: skip
    dppo.train(args)
    net, schedule, *_ = model(args, obs_dim=1)
    sums, made, before = torch.zeros(4), None, None
    assert len(watched.updates) == 4
    for i, update in enumerate(watched.updates):
        assert torch.equal(update.sums, sums) and len(update.noise[:, 0, 0, 0].unique()) == 9
        sums = update.next_sums
        if before is not None:
            now = dppo.update_stats(before.stats, before.rollout.obs.flatten(0, 1))
            torch.testing.assert_close(update.stats, now)
        before = update
        if i == 0:
            assert update.begins[:, 0].tolist() == [True, False, True, False, True, True, False, True, False]
        decided = update.begins.flatten().repeat_interleave(3).nonzero().flatten()
        assert len(update.epochs) == 3
        for e, epoch in enumerate(update.epochs):
            torch.nn.utils.vector_to_parameters(epoch.params, net.parameters())
            batch, seen = epoch.batch, update.seen
            if e == 0:  # what acted
                obs, noise, chain = update.tried
                again = dppo.denoise(net, schedule, dppo.normalize(obs, update.stats), noise)
                torch.testing.assert_close(again, chain)
                rows = dppo.denoising_rows(net, schedule, seen.obs.flatten(0, 1), seen.action.flatten(0, 1))
            for ours, theirs in zip(batch, rows, strict=False):
                torch.testing.assert_close(ours, theirs)
            advantage = chunk_gae(
                seen.reward, *dppo.values(net, seen), seen.terminated, seen.truncated, update.begins, 0.9, 0.6
            ).flatten()
            target = advantage + net.value(seen.obs).flatten()
            factors = torch.tensor([1.0, 0.5, 0.25])
            torch.testing.assert_close(batch.advantage.view(-1, 3), advantage[:, None] * factors)
            torch.testing.assert_close(batch.return_.view(-1, 3), target[:, None].expand(-1, 3))
            assert len(epoch.order) == args.rows == len(epoch.order.unique()) == 54
            assert set(epoch.order.tolist()) < set(decided.tolist())
            assert (epoch.order.diff() < 0).any()
            assert epoch.rate == pytest.approx(args.learning_rate * (1 - i / 4))
            assert epoch.coef == float(i >= 2)
            if made is None:
                assert epoch.opt["t"] == 0  # not the clone's
            else:
                assert torch.equal(epoch.params, made[0]) and torch.equal(epoch.opt["m"], made[1]["m"])
            made = epoch.made


def test_a_clone_is_shown_the_data_as_the_policy_will_see_them(watched, tmp_path, monkeypatch):
    """Observations by the data's own statistics, which the fine-tuning goes on from, noise of every step,
    and a rate that falls to 0."""
    monkeypatch.setattr(dppo, "AT_ONCE", 10)
    data = str(agents.untrained(tmp_path / "data", "probe/Drift-v0", 3.0))
    args = small(env="probe/Drift-v0", data=data, run_dir=str(tmp_path / "run"), total_steps=32, eval_every=0)
    dppo.train(args)
    with make_envs(args.env, 1) as envs:
        episodes = demonstrations.open_demonstrations(data, envs)(args.data_steps, args.seed)
    obs, action = map(torch.as_tensor, demonstrations.windows(episodes, 1))
    stats = dppo.update_stats(dppo.new_stats(1), obs)
    torch.testing.assert_close(watched.updates[0].stats, stats)
    shown = {tuple(row) for row in torch.cat((dppo.normalize(obs, stats), action), 1).tolist()}
    batches = [batch for batch, _ in watched.clones]
    drawn = torch.cat([torch.cat((b.obs, b.action), -1).flatten(0, 1) for b in batches])
    assert {tuple(row) for row in drawn.tolist()} <= shown and len(drawn.unique(dim=0)) > 0.8 * len(shown)
    assert torch.cat([b.k for b in batches]).unique().tolist() == [1, 2, 3]
    assert torch.cat([b.eps for b in batches]).std() == pytest.approx(1.0, abs=0.1)
    assert [rate for _, rate in watched.clones] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_the_agent_plays_the_first_action_of_a_chunk_denoised_without_noise():
    args = small(chunk=3, denoising_steps=4)
    net, schedule, params, _ = model(args, obs_dim=1, gain=100.0)
    obs = torch.randn(7, 1, generator=torch.Generator().manual_seed(2))
    stats = dppo.update_stats(dppo.new_stats(1), torch.tensor([[-1.0], [5.0]]))
    with make_envs("probe/ActBox-v0", 1) as envs:
        found = dppo.make_policy(envs, args, {"params": params, "obs_stats": stats})(obs.numpy())
    chain = dppo.denoise(net, schedule, dppo.normalize(obs, stats), torch.zeros(5, 7, 3))
    np.testing.assert_allclose(found, chain[:, 0, :1].detach(), rtol=1e-4, atol=1e-5)
    assert chain[:, 0].std(1).min() > 1e-2  # its actions differ


def test_eta_is_the_noise_of_the_denoising_steps():
    """Of the DDIM paper's eq. 16: none at 0, and half of DDPM's at 1/2, but for the least."""
    none, half, whole = (
        dppo.make_schedule(small(eta=eta, min_std=1e-3)).sigma[2:] for eta in (0.0, 0.5, 1.0)
    )
    assert (none == 1e-3).all() and (whole > 0.1).all()
    torch.testing.assert_close(half, whole / 2)


def test_both_updates_scale_their_gradients_down():
    """Adam's first moment is a tenth of the first gradient's, whose norm is --max-grad-norm."""
    args = small(minibatch_size=9, hidden=(8,), max_grad_norm=1e-3)
    net, schedule, params, forward, obs, _, chain = chains(args, count=9, action_dim=2)
    rows = [row.detach() for row in dppo.denoising_rows(net, schedule, obs, chain)]
    batch = DenoisingSteps(*rows, torch.randn(27), torch.randn(27))
    shown = dppo.Demonstrated(obs[None], torch.rand(1, 9, 2), torch.randn(1, 9, 2), torch.ones(1, 9).long())
    one, fresh = torch.ones(()), new_adam(params)
    _, tuned, _ = dppo.fine_tune(forward, schedule, args, params, fresh, batch, torch.arange(27), one, one)
    _, cloned, _ = dppo.clone(forward, schedule, args, params, fresh, shown, one)
    for opt in (tuned, cloned):
        assert opt["m"].norm().item() == pytest.approx(1e-4, rel=1e-3)


def test_the_same_seed_gives_the_same_run(source, tmp_path):
    """Bit for bit, with chunks of 2; another seed another one."""
    args = small(env="Pendulum-v1", chunk=2, data=str(agents.untrained(tmp_path / "run", "Pendulum-v1")))
    tables = []
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        dppo.train(dataclasses.replace(args, run_dir=str(tmp_path / name), seed=seed))
        tables.append(command.rows(tmp_path / name))
    assert tables[0] == tables[1] and tables[0] != tables[2]


@pytest.mark.parametrize("at", [1, 3])
def test_a_stopped_run_goes_on(at, source, tmp_path, monkeypatch):
    """Stopped in its cloning (after 20 of 40 steps) or in its fine-tuning, it ends as one that was not.

    On a task without memory, its environments seeded anew in every rollout.
    """
    collect, report = dppo.collect_chunks, dppo.Run.report
    calls, stop_at = [], None

    def collect_reseeded(envs, obs, *rest):
        return collect(envs, envs.reset([8 * rollouts[-1] + i for i in range(4)]), *rest)

    def report_and_stop(run, step, *rest, **named):
        report(run, step, *rest, **named)
        rollouts.append(run.step // 32)
        calls.append(step)
        if len(calls) == stop_at:
            raise RunFault("power cut")

    monkeypatch.setattr(dppo, "AT_ONCE", 20)
    monkeypatch.setattr(dppo, "collect_chunks", collect_reseeded)
    monkeypatch.setattr(dppo.Run, "report", report_and_stop)
    common = dict(**TASK, data=str(source), checkpoint_every=1e-9, warmup=0, anneal=False)
    rollouts = [0]
    whole = dppo.train(small(**common, run_dir=str(tmp_path / "whole")))
    assert calls == [0, 0, 32, 64, 96]
    rollouts, stop_at = [0], at
    calls.clear()
    with pytest.raises(RunFault, match="power cut"):
        dppo.train(small(**common, run_dir=str(tmp_path / "halves")))
    stop_at = None
    rollouts = [calls[-1] // 32]
    assert dppo.train(small(**common, resume=str(tmp_path / "halves"))) == whole
    one, two = (command.rows(tmp_path / name) for name in ("whole", "halves"))
    for row in one + two:
        row.pop("train_return"), row.pop("train_length")
    assert one == two


def events(folder):
    """What TensorBoard shows of a run: tags to their steps."""
    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [event.step for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_the_clone_is_evaluated_as_any_policy_is(source, tmp_path, capsys):
    """The table's row of step 0 has its evaluation, TensorBoard its own tag for it, and it is told."""
    dppo.train(small(**TASK, data=str(source), run_dir=str(tmp_path / "run")))
    first = command.rows(tmp_path / "run")[0]
    assert first["step"] == "0" and first["eval_return"] and first["data_return"] and first["clone_loss"]
    assert f"0 steps: evaluation {float(first['eval_return']):.2f}" in capsys.readouterr().err
    tags = events(tmp_path / "run")
    assert tags["eval/return"] == [0, 32, 64, 96] and not {"losses/eval_return", "losses/eval_std"} & set(
        tags
    )


def test_a_fault_in_the_clones_evaluation_leaves_the_clone(source, tmp_path, monkeypatch):
    """A run that goes on without evaluations does not clone again."""
    given = dict(**TASK, data=str(source))

    def broken(*_):
        raise RunFault("the simulator diverged")

    with monkeypatch.context() as patch, pytest.raises(RunFault, match="evaluation at step 0: the simulator"):
        patch.setattr(dppo.Evaluation, "__call__", broken)
        dppo.train(small(**given, run_dir=str(tmp_path / "run")))
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pt", "--resume")
    assert (saved["step"], saved["state"]["cloned"]) == (0, 40)
    monkeypatch.setattr(dppo, "clone_policy", None)
    dppo.train(small(**given | dict(data="gone"), resume=str(tmp_path / "run"), eval_every=0))
    assert [row["step"] for row in command.rows(tmp_path / "run")] == ["0", "32", "64", "96"]


def test_a_run_killed_in_its_cloning_has_each_of_its_rows_once(source, tmp_path, monkeypatch):
    """Its checkpoint is of the second of five reports, and the kill comes after the third."""
    monkeypatch.setattr(dppo, "AT_ONCE", 8)
    given, report, calls = dict(**TASK, data=str(source)), dppo.Run.report, []
    dppo.train(small(**given, run_dir=str(tmp_path / "whole"), total_steps=32))

    def killed(run, *rest, **named):
        calls.append(rest)
        run._saved_at = -1e9 if len(calls) == 2 else 1e18
        report(run, *rest, **named)
        if len(calls) == 3:
            run.close()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dppo.Run, "report", killed)
        dppo.train(small(**given, run_dir=str(tmp_path / "killed"), total_steps=32))
    dppo.train(small(**given, resume=str(tmp_path / "killed"), total_steps=32))
    one, two = (command.rows(tmp_path / name) for name in ("whole", "killed"))
    assert [row["clone_loss"] for row in one[:5]] == [row["clone_loss"] for row in two[:5]]
    assert [row["step"] for row in two] == ["0"] * 5 + ["32"] and two[4]["eval_return"]


def test_a_run_past_its_cloning_needs_no_data(source, tmp_path):
    common = dict(**TASK, eval_every=0)
    dppo.train(small(**common, data=str(source), run_dir=str(tmp_path / "run"), total_steps=32))
    changed = small(**common, data=str(tmp_path / "gone"), resume=str(tmp_path / "run"), total_steps=64)
    dppo.train(changed)
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt", "--resume")["step"] == 64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_run_on_cuda_and_its_resumption(tmp_path):
    data = str(agents.untrained(tmp_path / "data", "Pendulum-v1"))
    common = dict(env="Pendulum-v1", data=data, chunk=2, device="cuda", compile=True)
    assert np.isfinite(dppo.train(small(**common, total_steps=64, run_dir=str(tmp_path / "run"))))
    assert np.isfinite(dppo.train(small(**common, total_steps=128, resume=str(tmp_path / "run"))))


def test_chunks_and_no_clone(tmp_path):
    """Chunks of 3 in episodes of one step, from nothing; the agent acts by the first action."""
    args = small(**TASK, chunk=3, clone_steps=0, run_dir=str(tmp_path / "run"), minibatch_size=12)
    assert args.rows == 4 * 3 * 3  # three decisions at least of each environment, three denoising steps each
    dppo.train(args)
    agent = zoo.load(tmp_path / "run")
    assert agent.policy(np.zeros((5, 1))).shape == (5, 1)
    assert (
        agent.state["params"].numel()
        == flatten(ActorCritic(1, 3, dppo.make_schedule(args), args.hidden))[0].numel()
    )


def test_non_finite_rewards_stop_the_run(tmp_path):
    """The fault names where it came from."""

    class Broken(gym.Env):
        observation_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros(1, np.float32), {}

        def step(self, action):
            return np.zeros(1, np.float32), float("nan"), True, False, {}

    if "probe/NanBox-v0" not in gym.registry:
        gym.register("probe/NanBox-v0", Broken)
    with pytest.raises(EnvironmentFault, match="returned a non-finite reward"):
        dppo.train(small(env="probe/NanBox-v0", clone_steps=0, run_dir=str(tmp_path / "run")))


def test_an_action_that_cannot_vary_is_no_fault_of_the_data():
    """Both its bounds are one number, which any action of the policy's comes to."""
    envs = SimpleNamespace(action_scale=np.array([2.0, 0.0]), action_shift=np.array([1.0, 3.0]))
    assert demonstrations.to_policy(envs, np.array([[2.0, 3.0]])).tolist() == [[0.5, 0.0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(data=None), "--data: whom to clone is missing"),
        (dict(data="nowhere"), "--data nowhere: no such file or folder"),
        (dict(env="Pendulum-v1"), "--data .*: is of another task, its agent was trained on probe/ActOn"),
        (dict(env="probe/Act-v0"), "--env probe/Act-v0: its actions are discrete"),
        (dict(eta=1.5), r"--eta must lie in \[0, 1\], not 1.5"),
        (dict(denoising_steps=0), "--denoising-steps must be at least 1, not 0"),
        (dict(denoising_gamma=-0.1), r"--denoising-gamma must lie in \[0, 1\]"),
        (dict(min_std=0.0), "--min-std must be greater than 0, not 0"),
        (dict(chunk=0), "--chunk must be at least 1, not 0"),
        (dict(chunk=9), "--chunk 9 is longer than a rollout of --num-steps 8"),
        (
            dict(chunk=300, num_steps=400, minibatch_size=8, env="Pendulum-v1"),
            "--chunk 300 is longer than an episode of Pendulum-v1, 200 steps",
        ),
        (
            dict(chunk=60, num_steps=64, minibatch_size=4, env="own_tasks:Target-v0"),
            "--chunk 60 is longer than an episode of own_tasks:Target-v0, 50 steps",
        ),
        (dict(chunk=2), "--chunk 2: the longest episode of the data has 1 steps"),
        (dict(minibatch_size=33), r"--minibatch-size 33 is more than the actions .* of a rollout, 32"),
        (dict(clone_steps=-1), "--clone-steps must be at least 0, not -1"),
        (dict(warmup=-1), "--warmup must be at least 0, not -1"),
        (dict(value_coef=-1.0), "--value-coef must be at least 0 and finite, not -1"),
        (dict(data=""), "--data is empty; the folder of a run or minari:ID is meant"),
        (
            dict(data="nowhere", clone_steps=0),
            "--data nowhere: --clone-steps 0 clones nobody; leave one of the two out",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused(changes, message, source, tmp_path):
    given = dict(**TASK, data=str(source), run_dir=str(tmp_path / "run")) | changes
    with pytest.raises(UsageError, match=message):
        dppo.train(small(**given))
    assert not (tmp_path / "run").exists()
