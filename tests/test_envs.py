"""The transition contract: what `VectorEnv.step` yields and `ppo.collect` gathers; spaces, faults."""

import functools
import itertools
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec, load_env_creator

from zoo.common import vector_env
from zoo.common.envs import GymnasiumVectorEnv, make_envs
from zoo.common.errors import EnvironmentFault, RunFault, UsageError
from zoo.common.mujoco_engine import Batch
from zoo.ppo import collect


def act_0(obs, noise):
    return torch.zeros(len(obs), dtype=torch.int64)


def acting_by(act):
    """A policy as `collect` takes it, whose samples are act(obs, noise)."""
    return lambda obs: SimpleNamespace(sample=lambda noise: act(torch.as_tensor(obs), noise))


# Eight steps of the script in probes.py by two copies; the second begins with the second episode. Columns:
# obs, reward, next_obs, terminated, truncated. The script starts anew after its fifth episode.
FIRST = [
    (10, 1, 11, 0, 0), (11, 2, 12, 1, 0), (20, 3, 21, 0, 1), (30, 4, 31, 0, 0),
    (31, 5, 32, 0, 0), (32, 6, 33, 0, 1), (40, 7, 41, 1, 0), (50, 8, 51, 1, 1),
]  # fmt: skip
SECOND = [
    (20, 3, 21, 0, 1), (30, 4, 31, 0, 0), (31, 5, 32, 0, 0), (32, 6, 33, 0, 1),
    (40, 7, 41, 1, 0), (50, 8, 51, 1, 1), (10, 1, 11, 0, 0), (11, 2, 12, 1, 0),
]  # fmt: skip
# (return, length) in the order in which they end; of two that end in one step the first copy's stands first
EPISODES = [(3, 1), (3, 2), (3, 1), (15, 3), (7, 1), (15, 3), (8, 1), (7, 1), (8, 1), (3, 2)]


def table(rollout, copy):
    """The rows of one copy as in FIRST."""
    columns = (
        rollout.obs[..., 0],
        rollout.reward,
        rollout.next_obs[..., 0],
        rollout.terminated,
        rollout.truncated,
    )
    return [tuple(float(column[t, copy]) for column in columns) for t in range(len(rollout.reward))]


def test_a_collected_batch_is_the_script():
    envs = make_envs("probe/Scripted-v0", 2)
    rollout, obs, episodes = collect(
        envs, envs.reset(range(envs.num_envs)), acting_by(act_0), torch.zeros(8, 2, 2)
    )
    assert table(rollout, 0) == FIRST
    assert table(rollout, 1) == SECOND
    assert obs.tolist() == [[10], [20]]  # what to act on next: the first observations of new episodes
    assert episodes == EPISODES
    assert rollout.obs.shape == rollout.next_obs.shape == (8, 2, 1)
    assert rollout.action.shape == rollout.reward.shape == rollout.terminated.shape == (8, 2)
    assert rollout.obs.dtype == rollout.next_obs.dtype == rollout.reward.dtype == torch.float32
    assert rollout.terminated.dtype == rollout.truncated.dtype == torch.bool


def test_a_batch_goes_on_where_the_last_one_stopped():
    """A rollout's boundary ends no episode: returns run on, and the last row's successor is the next row."""
    envs = make_envs("probe/Scripted-v0", 2)
    obs, rows, ended = envs.reset(range(envs.num_envs)), [], []
    for _ in range(4):
        rollout, obs, episodes = collect(envs, obs, acting_by(act_0), torch.zeros(2, 2, 2))
        rows += table(rollout, 0)
        ended += episodes
    assert rows == FIRST
    assert ended == EPISODES


def test_a_reset_starts_everything_afresh():
    envs = make_envs("probe/Scripted-v0", 2)
    # leaves the first copy in mid-episode
    collect(envs, envs.reset(range(envs.num_envs)), acting_by(act_0), torch.zeros(1, 2, 2))
    rollout, _, episodes = collect(
        envs, envs.reset(range(envs.num_envs)), acting_by(act_0), torch.zeros(8, 2, 2)
    )
    assert table(rollout, 0) == FIRST and episodes == EPISODES


def test_the_collected_action_is_what_was_acted_and_what_act_saw_is_the_obs():
    envs, seen = make_envs("probe/Bounds-v0", 2), []

    def act(obs, noise):
        seen.append((obs.clone(), noise))
        return noise * 2

    noise = torch.randn(3, 2, 4)
    rollout, _, _ = collect(envs, envs.reset(range(envs.num_envs)), acting_by(act), noise)
    # unclipped, in the policy's scale: its log-probability is of this
    assert torch.equal(rollout.action, noise * 2)
    assert torch.equal(rollout.obs, torch.stack([obs for obs, _ in seen]))
    assert torch.equal(torch.stack([step_noise for _, step_noise in seen]), noise)


@pytest.mark.parametrize("engine", ["classic", "gymnasium"])
@pytest.mark.parametrize("vectorize", [False, True])
def test_cartpole_equals_gymnasiums(vectorize, engine):
    """Seeds and actions alike: a loop with a manual reset, and SyncVectorEnv where it has no filler rows."""
    n, steps = 3, 300
    actions = np.random.default_rng(0).integers(0, 2, (steps, n))
    envs = make_envs("CartPole-v1", n, engine)
    obs, ended = envs.reset(range(7, 7 + n)), 0
    if vectorize:
        theirs = gym.make_vec(
            "CartPole-v1", n, "sync", vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
        )
        np.testing.assert_array_equal(obs, theirs.reset(seed=7)[0])
    else:
        loop = [gym.make("CartPole-v1") for _ in range(n)]
        np.testing.assert_array_equal(obs, [env.reset(seed=7 + i)[0] for i, env in enumerate(loop)])
    for action in actions:
        step = envs.step(action)
        if vectorize:
            obs, reward, terminated, truncated, info = theirs.step(action)
            next_obs = obs.copy()
            for i in np.flatnonzero(terminated | truncated):
                next_obs[i] = info["final_obs"][i]
        else:
            rows = [env.step(a)[:4] for env, a in zip(loop, action, strict=True)]
            next_obs, reward, terminated, truncated = (np.array(column) for column in zip(*rows, strict=True))
            obs = [
                env.reset()[0] if ends else o
                for env, o, ends in zip(loop, next_obs, terminated | truncated, strict=True)
            ]
        for ours, other in zip(step[:5], (obs, reward, next_obs, terminated, truncated), strict=True):
            np.testing.assert_array_equal(ours, other)
        ended += len(step.episodes)
    assert ended >= n
    envs.close()


def test_a_time_limit_truncates_and_keeps_the_successor():
    envs = make_envs("probe/Endless-v0", 1)
    envs.reset(range(envs.num_envs))
    steps = [envs.step(np.zeros(1, int)) for _ in range(10)]
    assert [bool(step.truncated[0]) for step in steps] == [False, False, False, False, True] * 2
    assert not any(step.terminated[0] for step in steps)
    assert steps[4].episodes == steps[9].episodes == [(5.0, 5)]


# --- spaces and actions -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_box_actions_are_mapped_to_the_bounds():
    """Bounds [-4, 4], [0, 1], [1, inf), (-inf, inf): [-1, 1] spans the first two, the others do without."""
    envs = make_envs("probe/Bounds-v0", 2)
    envs.reset(range(envs.num_envs))
    envs.step(np.array([[0.5, 0.5, 3.0, 300.0], [-1.0, -1.0, 1.5, -300.0]], np.float32))
    envs.step(np.array([[1.7, 1.7, -5.0, 0.0], [-2.0, -2.0, 0.5, 0.0]], np.float32))  # outside: clipped
    first, second = (env.unwrapped.actions for env in envs.envs)
    assert [a.tolist() for a in first] == [[2.0, 0.75, 3.0, 300.0], [4.0, 1.0, 1.0, 0.0]]
    assert [a.tolist() for a in second] == [[-4.0, 0.0, 1.5, -300.0], [-4.0, 0.0, 1.0, 0.0]]
    assert all(a.dtype == np.float32 and envs.envs[0].action_space.contains(a) for a in first + second)
    assert envs.action_dim == 4 and not envs.discrete


@pytest.mark.filterwarnings("error")
def test_huge_bounds_are_none(capsys):
    """+-1e6, [0, the largest float32] and +-that: no bounds, but clipped. [1e6, 1e6 + 2] is scaled."""
    vector_env._warn_once.cache_clear()
    envs = make_envs("probe/BoxHuge-v0", 1)
    warning = capsys.readouterr().err
    assert warning.startswith(
        "warning: probe/BoxHuge-v0: action 0 has bounds -1e+06 and 1e+06, too far apart"
    )
    assert warning.count("\n") == 1 and "clipped" in warning
    envs.reset([0])
    envs.step(np.array([[0.5, 0.5, 0.5, 0.5]], np.float32))
    envs.step(np.array([[-2e6, -1.0, 3e38, 2.0]], np.float32))
    seen = [a.tolist() for a in envs.envs[0].unwrapped.actions]
    assert seen == [[0.5, 0.5, 0.5, 1e6 + 1.5], [-1e6, 0, float(np.float32(3e38)), 1e6 + 2]]
    make_envs("probe/BoxHuge-v0", 1)
    assert capsys.readouterr().err == ""  # said once
    envs = make_envs("probe/BoxHugeInteger-v0", 1)
    assert envs.to_env_action(np.array([[2.7]])) == 3 and "action 0 has bounds" in capsys.readouterr().err
    envs = make_envs("probe/BoxWide-v0", 1)  # the widest that is scaled
    assert envs.to_env_action(np.array([[0.5]])) == 5e4 and capsys.readouterr().err == ""


def test_box_actions_of_integers_are_rounded():
    envs = make_envs("probe/BoxInteger-v0", 1)
    envs.reset(range(envs.num_envs))
    for action in (-1.0, -0.8, -0.7, 0.2, 0.3, 0.9):
        envs.step(np.array([[action]]))
    assert [a.tolist() for a in envs.envs[0].unwrapped.actions] == [[-2], [-2], [-1], [0], [1], [2]]


def test_box_actions_keep_to_bounds_that_rounding_would_overstep():
    envs = make_envs("probe/BoxTenths-v0", 1)
    assert 1.0 * envs.action_scale + envs.action_shift > 0.58
    assert envs.to_env_action(np.array([[1.0]])) == 0.58


def test_box_actions_get_their_shape_back():
    envs = make_envs("probe/BoxMatrix-v0", 1)
    envs.reset(range(envs.num_envs))
    envs.step(np.array([[0.0, 0.1, 0.2, 0.3, 0.4, 0.5]]))
    np.testing.assert_allclose(
        envs.envs[0].unwrapped.actions[0], [[0.0, 0.2, 0.4], [0.6, 0.8, 1.0]], rtol=1e-6
    )
    assert envs.action_dim == 6


def test_discrete_actions_count_from_the_spaces_start():
    envs = make_envs("probe/DiscreteStart-v0", 1)
    envs.reset(range(envs.num_envs))
    for action in (0, 2, 1):
        envs.step(np.array([action]))
    assert envs.envs[0].unwrapped.actions == [5, 7, 6] and envs.action_dim == 3 and envs.discrete


def test_images_are_flattened_in_c_order():
    envs = make_envs("probe/Image-v0", 2)
    assert envs.obs_dim == 24
    obs = envs.reset(range(envs.num_envs))
    np.testing.assert_array_equal(obs, np.tile(np.arange(24), (2, 1)))
    step = envs.step(np.zeros(2, int))
    np.testing.assert_array_equal(step.obs, np.tile(np.arange(24) + 1, (2, 1)))
    assert obs.dtype == step.obs.dtype == step.next_obs.dtype == np.float32


def test_scalar_observations():
    envs = make_envs("probe/ScalarObs-v0", 2)
    assert (
        envs.obs_dim == 1
        and envs.reset(range(envs.num_envs)).shape == (2, 1)
        and envs.step(np.zeros(2, int)).obs.shape == (2, 1)
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("DictObs", ["observations are Dict(", "Box", "FlattenObservation"]),
        ("DiscreteObs", ["observations are Discrete(3)", "Box"]),
        ("MultiDiscreteAction", ["actions are MultiDiscrete([2 3])", "Box or a Discrete"]),
        ("DictAction", ["actions are Dict(", "Box or a Discrete"]),
        ("EmptyObs", ["observations have the shape (0,)", "no number"]),
        ("EmptyAction", ["actions have the shape (2, 0)", "no number"]),
    ],
)
def test_spaces_that_are_refused(name, words):
    with pytest.raises(UsageError) as refusal:
        make_envs(f"probe/{name}-v0", 2)
    message = str(refusal.value)
    assert message.startswith(f"--env probe/{name}-v0: ") and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("env_id", "nearest"),
    [
        ("CartPol-v1", "CartPole-v1"),
        ("HalfChetah-v4", "HalfCheetah-v4"),
        ("probe/Endles-v0", "probe/Endless-v0"),
    ],
)
def test_an_unknown_id_is_told_with_the_nearest(env_id, nearest):
    with pytest.raises(UsageError) as refusal:
        make_envs(env_id, 1)
    message = str(refusal.value)
    assert message.startswith(f"--env {env_id}: ") and "\n" not in message
    assert nearest in message.split("nearest: ")[1].split(", ")


def test_an_id_without_its_version_is_refused_and_the_newest_named(recwarn):
    """Settings and results go by the id, and what is newest depends on the Gymnasium that is installed."""
    with pytest.raises(UsageError, match=r"\A--env CartPole does not say which version.* CartPole-v1\Z"):
        make_envs("CartPole", 1)
    assert not recwarn.list


def test_a_task_of_ones_own_without_its_module_is_told_how_to_name_it():
    with pytest.raises(UsageError, match=r"--env MODULE:nowhere/Tank-v0\Z"):
        make_envs("nowhere/Tank-v0", 1)


@pytest.mark.parametrize("env_id", ["", "qqqqqq", "nosuchmodule:Env-v0", "CartPole-v999", "a b/c"])
def test_other_ids_that_cannot_be_made(env_id):
    with pytest.raises(UsageError, match=r"--env [^\n]*\Z"):
        make_envs(env_id, 1)


def test_a_constructor_that_raises_is_told():
    def broken():
        raise FileNotFoundError("no\nmodel file")

    gym.register("probe/Broken-v0", broken)
    try:
        with pytest.raises((UsageError, RunFault), match=r"probe/Broken-v0[^\n]*model file"):
            make_envs("probe/Broken-v0", 1)
    finally:
        gym.registry.pop("probe/Broken-v0")


def test_no_environments():
    with pytest.raises(UsageError, match="--num-envs must be at least 1, not 0"):
        make_envs("CartPole-v1", 0)


# --- engines ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(Batch is None, reason="needs MuJoCo 4.0 or later")
def test_the_engine_is_chosen_by_the_task():
    engines = {(env_id, engine): make_envs(env_id, 1, engine, threads=1).engine for env_id, engine in (
        ("CartPole-v1", "auto"), ("CartPole-v1", "classic"), ("CartPole-v1", "gymnasium"),
        ("HalfCheetah-v4", "auto"), ("HalfCheetah-v4", "mujoco"), ("HalfCheetah-v4", "gymnasium"),
        ("probe/Act-v0", "auto"),
    )}  # fmt: skip
    assert list(engines.values()) == [
        "classic",
        "classic",
        "gymnasium",
        "mujoco",
        "mujoco",
        "gymnasium",
        "gymnasium",
    ]
    for env_id, engine in (
        ("CartPole-v1", "mujoco"),
        ("HalfCheetah-v4", "classic"),
        ("probe/Act-v0", "classic"),
    ):
        with pytest.raises(UsageError, match=f"engine {engine} does not serve {env_id}"):
            make_envs(env_id, 1, engine)


def richer(step, wraps=False):
    """A step that pays 1000 more."""

    def changed(*given):
        obs, reward, *rest = step(*given)
        return obs, reward + 1000.0, *rest

    return functools.wraps(step)(changed) if wraps else changed


@pytest.mark.parametrize("stock", ["CartPole-v1", "HalfCheetah-v4"])
@pytest.mark.parametrize("way", ["a copy", "a copy of gym.make's", "a class", "a class, wrapped"])
def test_a_stock_task_with_another_step_is_run_with_it(stock, way, monkeypatch):
    kind, env_id = load_env_creator(gym.spec(stock).entry_point), stock

    def make(**given):
        env = gym.make(stock) if "gym.make" in way else kind(**given)
        env.step = richer(env.step)
        return env

    if way.startswith("a copy"):
        monkeypatch.setitem(gym.registry, "Mine-v0", EnvSpec("Mine-v0", make, max_episode_steps=100))
        env_id = "Mine-v0"
    else:
        monkeypatch.setattr(kind, "step", richer(kind.step, wraps="wrapped" in way))
    with make_envs(env_id, 2) as envs:
        envs.reset([1, 2])
        action = np.zeros(2, np.int64) if envs.discrete else np.zeros((2, envs.action_dim), np.float32)
        assert (envs.step(action).reward > 900).all()
        assert envs.engine == "gymnasium"


def test_a_method_exchanged_in_a_parent_or_a_wrapper_is_seen(monkeypatch):
    from gymnasium.envs.mujoco import MujocoEnv
    from gymnasium.wrappers import TimeLimit

    single = gym.make("HalfCheetah-v5")
    for kind, name in ((MujocoEnv, "do_simulation"), (TimeLimit, "step"), (type(single.unwrapped), "step")):
        assert vector_env.is_plain(single)
        with monkeypatch.context() as changed:
            changed.setattr(kind, name, functools.partial(getattr(kind, name)))
            assert not vector_env.is_plain(single)


def test_copies_that_a_function_makes_unlike_each_other_stay_so(monkeypatch):
    from gymnasium.envs.classic_control import CartPoleEnv

    forces = itertools.cycle([10.0, 20.0])

    def make(**given):
        env = CartPoleEnv(**given)
        env.force_mag = next(forces)
        return env

    monkeypatch.setitem(gym.registry, "Mine-v0", EnvSpec("Mine-v0", make, max_episode_steps=100))
    with make_envs("Mine-v0", 2) as envs:
        envs.reset([7, 7])
        weak, strong = envs.step(np.ones(2, np.int64)).next_obs[:, 1]
        assert strong > 1.5 * weak > 0


def test_leaving_or_closing_closes_every_copy(monkeypatch):
    envs, closed = make_envs("probe/Act-v0", 3), []
    assert isinstance(envs, GymnasiumVectorEnv)
    for i, env in enumerate(envs.envs):
        monkeypatch.setattr(env, "close", lambda i=i: closed.append(i))
    envs.close()
    assert closed == [0, 1, 2]
    with pytest.raises(KeyError), envs as entered:
        assert entered is envs and closed == [0, 1, 2]
        raise KeyError
    assert closed == [0, 1, 2] * 2


def test_no_two_of_the_engines_files_import_each_other():
    """Read from the sources, where imports within functions stand too."""
    names = ("envs", "vector_env", "classic_engine", "mujoco_engine", "mujoco_tasks", "seeding", "errors")
    texts = {name: (Path(vector_env.__file__).parent / f"{name}.py").read_text() for name in names}
    left = {
        name: {x for x in names if re.search(rf"from zoo.common(\.{x} import| import {x}\b)", texts[name])}
        for name in names
    }
    assert {"vector_env", "classic_engine", "mujoco_engine"} <= left["envs"]
    # those that import nothing that is left
    while leaves := [name for name in left if not left[name] & left.keys()]:
        for name in leaves:
            del left[name]
    assert not left


@pytest.mark.skipif(Batch is None, reason="needs MuJoCo 4.0 or later")
def test_mujoco_is_imported_for_its_tasks_only():
    code = "import sys, zoo.common.envs as e; e.make_envs({!r}, 1); print('mujoco' in sys.modules)"
    for env_id, imported in (("CartPole-v1", "False"), ("Swimmer-v5", "True")):
        run = [sys.executable, "-c", code.format(env_id)]
        assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == imported


# --- faults of environments ---------------------------------------------------------------------------------


def run_until_fault(name, seed=0):
    envs = make_envs(f"probe/Faulty-{name}-v0", 3)
    envs.envs[0].unwrapped.at = envs.envs[2].unwrapped.at = 10**9  # the second copy is the faulty one
    envs.reset(range(seed, seed + 3))
    with pytest.raises(EnvironmentFault) as fault:
        for _ in range(200):
            envs.step(np.zeros(3, int))
    steps = envs.envs[1].unwrapped.count
    return str(fault.value), steps


@pytest.mark.parametrize(("name", "what"), [("obs", "observation"), ("reward", "reward")])
def test_a_non_finite_value_names_what_and_where(name, what):
    message, steps = run_until_fault(name)
    assert message == f"probe/Faulty-{name}-v0 returned a non-finite {what} in environment 1 of 3"
    assert steps == 40


@pytest.mark.filterwarnings("error")
def test_a_reward_beyond_float32_is_told(monkeypatch):
    """The agents compute in float32: 1e300 is infinite there."""
    envs = make_envs("probe/OddReward-v0", 2)
    envs.reset(range(2))
    monkeypatch.setattr(envs.envs[1].unwrapped, "reward", np.array([-3e38]))
    assert envs.step(np.zeros(2, int)).reward[1] == -3e38
    monkeypatch.setattr(envs.envs[1].unwrapped, "reward", np.array([-1e300]))
    with pytest.raises(EnvironmentFault, match=r"step returned a reward of 1e\+300 in size, which float32"):
        envs.step(np.zeros(2, int))


def test_a_non_finite_observation_at_a_reset_names_the_environment():
    envs = make_envs("probe/Faulty-reset-v0", 3)
    for i, env in enumerate(envs.envs):
        env.unwrapped.at = 2 if i == 1 else 10**9
    envs.reset(range(envs.num_envs))
    envs.step(np.zeros(3, int))
    envs.envs[0].unwrapped.t = 0  # now the second and third end one step before the first
    envs.step(np.zeros(3, int))
    with pytest.raises(EnvironmentFault, match="non-finite observation at reset in environment 1 of 3"):
        envs.step(np.zeros(3, int))


@pytest.mark.parametrize("env", ["Pendulum-v1", "HalfCheetah-v4"])
def test_actions_that_are_no_numbers_are_the_policys_fault(env):
    with make_envs(env, 2, threads=1) as envs:
        envs.reset([1, 2])
        action = np.zeros((2, envs.action_dim))
        action[0] = 1e300  # a number, beyond all bounds
        assert np.isfinite(envs.step(action).obs).all()
        action[1] = np.nan
        with pytest.raises(RunFault, match=f"the policy's actions for {env} became non-finite") as fault:
            envs.step(action)
        assert not isinstance(fault.value, EnvironmentFault)


def test_what_an_environment_raises_is_told_in_one_line():
    message, steps = run_until_fault("raise")
    assert (
        message.startswith("probe/Faulty-raise-v0 raised ZeroDivisionError in step: the physics")
        and steps == 40
    )
    assert "exploded" in message and "\n" not in message
    assert re.search(r" \(\S*probes\.py:\d+\)$", message)  # the innermost line of the task's own code


def test_a_reward_in_an_array_is_a_number_if_it_holds_one(monkeypatch):
    envs = make_envs("probe/OddReward-v0", 2)
    envs.reset(range(envs.num_envs))
    step = envs.step(np.zeros(2, int))
    assert step.reward.tolist() == [2.0, 2.0] and step.terminated.tolist() == [False, False]
    for name, value in (("reward", np.zeros(2)), ("reward", None), ("flag", np.zeros((1, 2), bool))):
        with (
            monkeypatch.context() as patch,
            pytest.raises(EnvironmentFault, match=r"not one (number|bool) each"),
        ):
            patch.setattr(envs.envs[1].unwrapped, name, value)
            envs.step(np.zeros(2, int))


RIGHT_STEP = r"right is step\(action\) -> \(obs, reward, terminated, truncated, info\)"
RIGHT_RESET = r"right is reset\(seed=None, options=None\) -> \(obs, info\)"
SEEN = np.array([0.25, 0.5], np.float32)
MISFITS = [
    ("step", (SEEN, 1.0, False, {}), f"step returned 4 values; {RIGHT_STEP}"),
    ("step", (SEEN, 1.0, False), f"step returned 3 values; {RIGHT_STEP}"),
    ("step", SEEN, f"step returned one ndarray; {RIGHT_STEP}"),
    ("step", None, f"step returned one NoneType; {RIGHT_STEP}"),
    (
        "step",
        (SEEN, 1.0, {}, False, {}),
        r"step returned as terminated \[False, {}, False\], not one bool each",
    ),
    ("step", (SEEN, 1.0, False, 0.5, {}), r"step returned as truncated .*, not one bool each"),
    ("step", (SEEN, "1.0", False, False, {}), r"step returned as reward .*, not one number each"),
    ("step", (SEEN, None, False, False, {}), r"step returned as reward .*, not one number each"),
    (
        "step",
        (SEEN[:1], 1.0, False, False, {}),
        r"step returned an observation of shape \(1,\), not \(2,\) as",
    ),
    (
        "step",
        (SEEN[None], 1.0, False, False, {}),
        r"step returned an observation of shape \(1, 2\), not \(2,\) as",
    ),
    ("step", (0.25, 1.0, False, False, {}), r"step returned an observation of shape \(\), not \(2,\) as"),
    (
        "step",
        ({"a": SEEN}, 1.0, False, False, {}),
        r"step returned as observation a dict, not numbers of shape \(2,\)",
    ),
    ("step", ([[1], [1, 2]], 1.0, False, False, {}), r"step returned as observation a list, not numbers"),
    (
        "step",
        (SEEN.astype(object), 1.0, False, False, {}),
        r"step returned as observation a ndarray, not numbers",
    ),
    ("reset", SEEN, f"reset returned one ndarray; {RIGHT_RESET}"),
    ("reset", (SEEN, {}, {}), f"reset returned 3 values; {RIGHT_RESET}"),
    ("reset", (np.zeros(3), {}), r"reset returned an observation of shape \(3,\), not \(2,\) as"),
    ("reset", (None, {}), r"reset returned as observation a NoneType, not numbers of shape \(2,\)"),
]


@pytest.mark.parametrize(("method", "given", "message"), MISFITS)
def test_what_breaks_gymnasiums_api_is_told_in_one_line(method, given, message):
    """An old step's info would be taken for `truncated`, a small observation broadcast, unnoticed."""
    envs = make_envs("probe/Misfit-v0", 3)
    envs.reset(range(3))
    assert envs.step(np.zeros(3, int)).next_obs.tolist() == [[0.25, 0.5]] * 3
    envs.envs[1].unwrapped.given[method] = given
    with pytest.raises(EnvironmentFault, match=rf"^probe/Misfit-v0: {message}[^\n]*\Z"):
        envs.reset(range(3)) if method == "reset" else envs.step(np.zeros(3, int))


def test_what_a_wrapper_cannot_unpack_is_told_with_what_is_right():
    class Old(gym.Env):
        observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)

        def step(self, action):
            return SEEN, 1.0, False, {}

    class New(Old):
        def reset(self, *, seed=None, options=None):
            return SEEN, {}

    class Older(Old):
        def reset(self):
            return SEEN

    for cls in (New, Older):
        gym.register(f"probe/{cls.__name__}-v0", cls, max_episode_steps=5)
    try:
        envs = make_envs("probe/New-v0", 1)
        envs.reset([0])
        with pytest.raises(EnvironmentFault, match=rf"raised ValueError in step: .* got 4\); {RIGHT_STEP}\Z"):
            envs.step(np.zeros(1, int))
        with pytest.raises(EnvironmentFault, match=rf"raised TypeError in reset: .*; {RIGHT_RESET}\Z"):
            make_envs("probe/Older-v0", 1).reset([0])
    finally:
        for cls in (New, Older):
            gym.registry.pop(f"probe/{cls.__name__}-v0")


def test_lists_of_numbers_are_observations_and_0_and_1_are_flags():
    envs = make_envs("probe/Misfit-v0", 2)
    envs.reset(range(2))
    envs.envs[1].unwrapped.given["step"] = ([1, 2], 3, np.bool_(True), 0, {})
    step = envs.step(np.zeros(2, int))
    assert step.next_obs.tolist() == [[0.25, 0.5], [1, 2]] and step.reward.tolist() == [1, 3]
    assert step.terminated.tolist() == [False, True] and step.truncated.tolist() == [False, False]


def test_copies_that_share_one_array_are_told_apart(monkeypatch):
    envs, shared = make_envs("probe/Misfit-v0", 3), np.zeros(2, np.float32)

    def step(self, action):
        shared[:] = action
        return shared, 1.0, False, False, {}

    monkeypatch.setattr(type(envs.envs[0].unwrapped), "step", step)
    envs.reset(range(3))
    assert envs.step(np.array([0, 1, 0])).next_obs.tolist() == [[0, 0], [1, 1], [0, 0]]


@pytest.mark.filterwarnings("error")
def test_numbers_that_float32_cannot_tell_apart_stay_apart():
    """Normalised first and rounded then, 1e8 and 1e8 + 1 are two observations."""
    envs = make_envs("probe/Far-v0", 16)
    obs = envs.reset(range(16))
    assert obs.dtype == np.float64 and set(obs[:, 0]) == {1e8, 1e8 + 1}
    step = envs.step(np.zeros(16, int))
    np.testing.assert_array_equal(step.next_obs, obs)
    assert step.obs.dtype == step.next_obs.dtype == np.float64
    assert make_envs("probe/IntegerObs-v0", 1).reset([0]).dtype == np.float64
    assert make_envs("CartPole-v1", 1).reset([0]).dtype == np.float32


def test_an_observation_beyond_float32_is_non_finite(monkeypatch):
    """The networks see float32: 1e39 is infinite there."""
    envs = make_envs("probe/Act-v0", 1)
    envs.reset(range(envs.num_envs))
    monkeypatch.setattr(envs.envs[0].unwrapped, "see", lambda: np.array([1e39]))
    with pytest.raises(EnvironmentFault, match="non-finite observation"):
        envs.step(np.zeros(1, int))
