"""The classic-control engine against Gymnasium's environments: same seeds, same actions, equal to the bit."""

import gymnasium as gym
import numpy as np
import pytest

from zoo.common.classic_engine import ClassicVectorEnv, serves
from zoo.common.envs import GymnasiumVectorEnv, make_envs

STEPS = 600
CASES: list[tuple[str, int, dict]] = [
    ("CartPole-v1", 7, {}),
    ("CartPole-v0", 3, {"sutton_barto_reward": True}),
    ("Acrobot-v1", 3, {}),
    ("MountainCar-v0", 3, {}),
    ("MountainCar-v0", 3, {"goal_velocity": 0.05}),
    ("MountainCarContinuous-v0", 7, {}),
    ("Pendulum-v1", 7, {}),
    ("Pendulum-v1", 1, {"g": 9.81}),
]


def pair(env_id, n, **parameters):
    """The engine and Gymnasium's loop, on environments made alike."""
    engine = ClassicVectorEnv(env_id, n, gym.make(env_id, **parameters))
    loop = GymnasiumVectorEnv(env_id, n, gym.make(env_id, **parameters))
    loop.envs[1:] = [gym.make(env_id, **parameters) for _ in range(n - 1)]
    return engine, loop


def pump(env_id, obs, rng):
    """Actions that reach the goals and the walls: with the velocity, at random now and then."""
    n, random = len(obs), rng.random(len(obs)) < 0.3
    if env_id.startswith("MountainCar-"):
        return np.where(random, rng.integers(0, 3, n), np.where(obs[:, 1] > 0, 2, 0))
    if env_id.startswith("MountainCarC"):
        return np.where(random, rng.normal(size=n), np.where(obs[:, 1] > 0, 1.3, -1.3)).astype(np.float32)[
            :, None
        ]
    if env_id.startswith("Acrobot"):
        return np.where(random, rng.integers(0, 3, n), np.where(obs[:, 5] > 0, 2, 0))
    if env_id.startswith("Pendulum"):
        return rng.normal(size=(n, 1)).astype(np.float32)
    return rng.integers(0, 2, n)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Gymnasium's, of v0
@pytest.mark.parametrize(("env_id", "n", "parameters"), CASES)
def test_trajectories_equal_gymnasium(env_id, n, parameters):
    engine, loop = pair(env_id, n, max_episode_steps=150, **parameters)
    assert serves(loop.envs[0])
    rng, terminated, truncated = np.random.default_rng(0), 0, 0
    for t in range(STEPS):
        if t in (0, STEPS // 2):  # a new seed in mid-episode restarts everything
            seeds = rng.integers(2**31, size=n).tolist()
            obs, theirs_obs = engine.reset(seeds), loop.reset(seeds)
            np.testing.assert_array_equal(obs, theirs_obs)
        action = pump(env_id, obs, rng)
        ours, theirs = engine.step(action), loop.step(action)
        for field in ("obs", "next_obs", "reward", "terminated", "truncated"):
            one, other = getattr(ours, field), getattr(theirs, field)
            assert one.dtype == other.dtype and one.flags.c_contiguous
            np.testing.assert_array_equal(one, other, f"{field} at step {t}")
        assert ours.episodes == theirs.episodes
        obs = ours.obs
        terminated, truncated = terminated + ours.terminated.sum(), truncated + ours.truncated.sum()
    assert terminated + truncated >= 2 * n  # resets without a seed were among what was compared
    assert terminated or env_id == "Pendulum-v1" or "goal_velocity" in parameters
    engine.close()
    loop.close()


def test_what_is_handed_out_stays_as_it_is():
    """The engine goes on in place; nothing of an earlier step may change with it."""
    for env_id in ("CartPole-v1", "MountainCarContinuous-v0"):
        envs = make_envs(env_id, 2, "classic")
        envs.reset([1, 2])
        action = np.zeros(2, int) if envs.discrete else np.zeros((2, 1), np.float32)
        step = envs.step(action)
        kept = [np.copy(x) for x in step[:5]]
        for _ in range(20):
            envs.step(action)
        for before, after in zip(kept, step, strict=False):
            np.testing.assert_array_equal(before, after)


class Halved(gym.RewardWrapper):
    def reward(self, reward):
        return reward / 2


def test_what_is_changed_by_the_user_is_refused():
    from gymnasium.envs.classic_control import CartPoleEnv

    class Mine(CartPoleEnv):
        pass

    assert serves(gym.make("CartPole-v1")) and serves(CartPoleEnv())
    assert not serves(Mine())
    assert not serves(Halved(gym.make("CartPole-v1")))
    assert not serves(gym.make("CartPole-v1", render_mode="rgb_array"))
    assert not serves(gym.make("HalfCheetah-v5"))
    for env_id, name, value in (
        ("CartPole-v1", "kinematics_integrator", "semi-implicit"),
        ("Acrobot-v1", "book_or_nips", "nips"),
        ("Acrobot-v1", "torque_noise_max", 1.0),
    ):
        env = gym.make(env_id)
        setattr(env.unwrapped, name, value)
        assert not serves(env)
