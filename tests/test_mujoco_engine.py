"""The MuJoCo engine against Gymnasium's own environments: same seeds, same actions, compared in float64."""

import gymnasium as gym
import numpy as np
import pytest

from zoo.common import mujoco_engine
from zoo.common.envs import GymnasiumVectorEnv, make_envs
from zoo.common.mujoco_engine import Batch, MujocoVectorEnv, serves

pytestmark = [
    pytest.mark.skipif(Batch is None, reason="needs MuJoCo 4.0 or later"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Gymnasium's, of the v4 tasks
]
N, STEPS, SEEDS = 3, 200, [5, 9, 6]
NAMES = [
    "HalfCheetah",
    "Hopper",
    "Walker2d",
    "Swimmer",
    "Ant",
    "Humanoid",
    "Reacher",
    "InvertedPendulum",
    "InvertedDoublePendulum",
]
RANGES = {"healthy_z_range": (0.9, 3.0), "healthy_angle_range": (-0.5, 0.5)}
CASES: list[tuple[str, dict]] = [(f"{name}-v{version}", {}) for name in NAMES for version in (4, 5)] + [
    # every parameter away from its default, so that none is a constant of the engine
    (
        "HalfCheetah-v5",
        {"forward_reward_weight": 2.0, "ctrl_cost_weight": 0.7, "reset_noise_scale": 0.3, "frame_skip": 3},
    ),
    ("Swimmer-v4", {"exclude_current_positions_from_observation": False, "forward_reward_weight": 3.0}),
    ("Hopper-v4", {"terminate_when_unhealthy": False, "healthy_reward": 0.3}),
    ("Hopper-v5", {"terminate_when_unhealthy": False, "healthy_reward": 0.3, **RANGES}),
    ("Hopper-v5", {"healthy_state_range": (-1.0, 1.0)}),
    ("Walker2d-v5", {"exclude_current_positions_from_observation": False, "ctrl_cost_weight": 0.2, **RANGES}),
    ("Ant-v4", {"use_contact_forces": True, "contact_force_range": (-0.5, 0.7), "contact_cost_weight": 0.1}),
    ("Ant-v5", {"include_cfrc_ext_in_observation": False, "main_body": 3, "healthy_z_range": (0.55, 0.9)}),
    (
        "Humanoid-v5",
        {"include_cvel_in_observation": False, "contact_cost_weight": 1e-3, "contact_cost_range": (0.1, 0.5)},
    ),
    ("Reacher-v5", {"reward_dist_weight": 2.0, "reward_control_weight": 3.0}),
    ("InvertedPendulum-v5", {"reset_noise_scale": 0.1}),
    ("InvertedDoublePendulum-v5", {"reset_noise_scale": 0.3, "healthy_reward": 4.0}),
]


def pair(env_id, threads=2, **parameters):
    """The engine and Gymnasium's loop, on environments made alike."""
    engine = MujocoVectorEnv(env_id, N, gym.make(env_id, **parameters), np.float64, threads)
    loop = GymnasiumVectorEnv(env_id, 1, gym.make(env_id, **parameters), np.float64)
    loop.envs += [gym.make(env_id, **parameters) for _ in range(N - 1)]
    loop.num_envs, loop._every, loop._returns, loop._lengths = (
        N,
        np.arange(N),
        np.zeros(N),
        np.zeros(N, np.int64),
    )
    return engine, loop


@pytest.mark.parametrize(("env_id", "parameters"), CASES)
def test_trajectories_equal_gymnasium(env_id, parameters):
    engine, loop = pair(env_id, max_episode_steps=70, **parameters)
    assert serves(loop.envs[0])
    np.testing.assert_array_equal(engine.reset(SEEDS), loop.reset(SEEDS))
    rng, ended = np.random.default_rng(0), 0
    for t in range(STEPS):
        if t == STEPS // 2:  # a new seed in mid-episode restarts everything
            np.testing.assert_array_equal(engine.reset([1, 1, 5]), loop.reset([1, 1, 5]))
        action = rng.uniform(-1.2, 1.2, (N, engine.action_dim))
        ours, theirs = engine.step(action), loop.step(action)
        for field in ("obs", "next_obs", "terminated", "truncated"):
            np.testing.assert_array_equal(
                getattr(ours, field), getattr(theirs, field), f"{field} at step {t}"
            )
        # NumPy rounds Reacher's norm and the pendulum's squares otherwise for many rows than for one
        last_bit = 1e-14 if env_id.startswith(("Reacher", "InvertedDouble")) else 0
        np.testing.assert_allclose(ours.reward, theirs.reward, rtol=0, atol=last_bit)
        assert [length for _, length in ours.episodes] == [length for _, length in theirs.episodes]
        ended += len(ours.episodes)
    assert ended >= N  # resets without a seed were among what was compared


def test_every_v4_and_v5_task_is_served_or_known():
    """A task that Gymnasium has and the engine does not stands here, so that one silently lost is noticed."""
    ids = {
        i
        for i in gym.registry
        if i.endswith(("-v4", "-v5")) and "envs.mujoco" in str(gym.spec(i).entry_point)
    }
    ids.discard("Pusher-v4")  # cannot be made with MuJoCo 3 or later
    assert {i for i in ids if not serves(gym.make(i))} == {
        "HumanoidStandup-v4",
        "HumanoidStandup-v5",
        "Pusher-v5",
    }


@pytest.mark.parametrize("limit", [5, None])
def test_time_limit_keeps_the_true_successor(limit):
    single = gym.make("HalfCheetah-v4", max_episode_steps=limit or -1)
    engine = MujocoVectorEnv("HalfCheetah-v4", N, single, np.float64, 2)
    # its limit is 1000
    free = MujocoVectorEnv("HalfCheetah-v4", N, gym.make("HalfCheetah-v4"), np.float64, 2)
    first, action = engine.reset(SEEDS), np.full((N, engine.action_dim), 0.5)
    np.testing.assert_array_equal(first, free.reset(SEEDS))
    for _ in range(4):
        assert not engine.step(action).truncated.any()
        free.step(action)
    last, beyond = engine.step(action), free.step(action)
    np.testing.assert_array_equal(last.next_obs, beyond.next_obs)
    assert not last.terminated.any()
    if limit is None:
        assert not last.truncated.any() and last.obs is last.next_obs
        return
    assert last.truncated.all() and [length for _, length in last.episodes] == [5] * N
    assert (np.abs(last.obs - last.next_obs).max(axis=1) > 0.1).all()  # the first of the new episode ...
    assert (np.abs(last.obs[:, :8]) <= 0.1).all()  # ... with positions within the reset's noise ...
    assert not np.allclose(last.obs, first)  # ... which is new
    assert not engine.step(action).truncated.any()


def test_the_number_of_threads_does_not_matter():
    for env_id in ("Walker2d-v4", "Ant-v5"):
        one, two = (MujocoVectorEnv(env_id, 5, gym.make(env_id), threads=threads) for threads in (1, 2))
        assert (one.batch.nthread, two.batch.nthread) == (1, 2)
        np.testing.assert_array_equal(one.reset(range(5)), two.reset(range(5)))
        rng = np.random.default_rng(1)
        for _ in range(60):
            action = rng.uniform(-1, 1, (5, one.action_dim)).astype(np.float32)
            for ours, theirs in zip(one.step(action), two.step(action), strict=True):
                np.testing.assert_array_equal(ours, theirs)


def test_no_more_threads_than_environments_by_default():
    assert MujocoVectorEnv("Swimmer-v5", 1, gym.make("Swimmer-v5")).batch.nthread == 1


class Halved(gym.RewardWrapper):
    def reward(self, reward):
        return reward / 2


def test_what_is_changed_by_the_user_is_refused():
    from gymnasium.envs.mujoco.half_cheetah_v4 import HalfCheetahEnv

    class Mine(HalfCheetahEnv):
        def control_cost(self, action):
            return 0.0

    gym.register("Mine-v4", Mine, max_episode_steps=10)
    gym.register("Halved-v4", lambda: Halved(HalfCheetahEnv()), max_episode_steps=10)
    gym.register("Same-v4", HalfCheetahEnv, max_episode_steps=10)
    try:
        assert serves(gym.make("Same-v4"))  # Gymnasium's class under the user's id is Gymnasium's task
        assert not serves(gym.make("Mine-v4"))
        assert not serves(gym.make("Halved-v4"))
        assert not serves(Halved(gym.make("HalfCheetah-v4")))
        assert not serves(gym.make("CartPole-v1"))
        assert not serves(gym.make("HalfCheetah-v4", render_mode="rgb_array"))
    finally:
        for env_id in ("Mine-v4", "Halved-v4", "Same-v4"):
            gym.registry.pop(env_id)


def test_a_users_model_is_the_one_stepped(tmp_path):
    source = gym.make("Hopper-v5").unwrapped.fullpath
    with open(source) as file:
        heavy = file.read().replace('timestep="0.002"', 'timestep="0.004"')
    path = tmp_path / "hopper.xml"
    path.write_text(heavy)
    engine, loop = pair("Hopper-v5", xml_file=str(path))
    assert engine.env.model.opt.timestep == 0.004
    np.testing.assert_array_equal(engine.reset(SEEDS), loop.reset(SEEDS))
    for _ in range(30):
        ours, theirs = engine.step(np.full((N, 3), 0.3)), loop.step(np.full((N, 3), 0.3))
        np.testing.assert_array_equal(ours.next_obs, theirs.next_obs)
        np.testing.assert_array_equal(ours.reward, theirs.reward)


def test_threads_are_those_asked_for_else_one_a_core(monkeypatch):
    with make_envs("Swimmer-v5", 5, threads=2) as envs:
        assert envs.batch.nthread == 2
    monkeypatch.setattr(mujoco_engine.os, "sched_getaffinity", lambda _: range(3), raising=False)
    for threads, expected in ((None, 3), (1, 1), (2, 2)):
        with make_envs("Swimmer-v5", 5, threads=threads) as envs:
            assert envs.batch.nthread == expected
