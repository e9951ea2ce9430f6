"""Tasks played to a fixed horizon: episodes that would end early go on until their time limit.

Where a reward is learned, an episode's end must say nothing: a task that ends when the robot falls, or when
the goal is reached, tells what is good by the length of its episodes alone (Christiano et al. 2017, section
3; Freire et al. 2020, arXiv:2012.01365). Importing this module registers Gymnasium's own such tasks under
FixedHorizon/, for any agent:

    python zoo/ppo.py --env zoo.common.horizon:FixedHorizon/Hopper-v4

MuJoCo's tasks that end when unhealthy are simulated on; anything else stays where it ended, at reward 0.
"""

import contextlib
from typing import Any

import gymnasium as gym
import numpy as np

from zoo.common.args import require
from zoo.common.envs import make_envs, make_single
from zoo.common.seeding import env_seeds

RUNNERS = ("Ant", "Hopper", "Humanoid", "Walker2d")  # have the argument terminate_when_unhealthy
OTHERS = (
    "Acrobot-v1",
    "CartPole-v1",
    "InvertedDoublePendulum-v4",
    "InvertedDoublePendulum-v5",
    "InvertedPendulum-v4",
    "InvertedPendulum-v5",
    "MountainCar-v0",
    "MountainCarContinuous-v0",
)


class StayAtTheEnd(gym.Wrapper):
    """Never terminates: after the inner task's end the observation stays and the reward is 0."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self._last: Any = None  # the observation at the end, once there is one

    def reset(self, **given: Any):
        self._last = None
        return self.env.reset(**given)

    def step(self, action: Any):
        if self._last is not None:
            return self._last, 0.0, False, False, {}
        obs, reward, terminated, truncated, info = self.env.step(action)
        if terminated:
            self._last = obs
        return obs, reward, False, truncated, info


def _register(env_id: str, simulated_on: bool) -> str:
    """Register FixedHorizon/... of the task, once; its id."""
    spec = gym.spec(env_id.rpartition(":")[2])  # the module before the colon has been imported
    new = f"FixedHorizon/{spec.id.replace('/', '-')}"
    if new in gym.registry:
        return new
    if simulated_on:
        kwargs = {**spec.kwargs, "terminate_when_unhealthy": False}
        gym.register(new, spec.entry_point, max_episode_steps=spec.max_episode_steps, kwargs=kwargs)
    else:

        def stays(**given: Any) -> gym.Env:
            return StayAtTheEnd(make_single(env_id, **given))

        gym.register(new, stays, max_episode_steps=spec.max_episode_steps)
    return new


def fixed_horizon(env_id: str) -> str:
    """The id of the task with a fixed horizon. Raises UsageError where there is no time limit to go on to."""
    with contextlib.closing(make_single(env_id)) as single:
        simulated_on = hasattr(single.unwrapped, "_terminate_when_unhealthy")
    limited = time_limit(env_id) < np.inf
    require(limited, f"--fixed-horizon: {env_id} has no time limit (max_episode_steps) to play on to")
    return _register(env_id, simulated_on)


def time_limit(env_id: str) -> float:
    """Steps after which a registered task's episodes are truncated, or infinity. Raises UsageError."""
    with contextlib.closing(make_single(env_id)) as single:
        return (single.spec and single.spec.max_episode_steps) or np.inf


def early_end(env_id: str, seed: int, steps: int = 200) -> int | None:
    """The step in which random actions brought an episode to an early end, of eight tried; None: none did."""
    rng = np.random.default_rng(env_seeds(seed, "random play", 1))
    with make_envs(env_id, 8, threads=1) as envs:
        envs.reset(env_seeds(seed, "random play", 8))
        for step in range(steps):
            shape = (8,) if envs.discrete else (8, envs.action_dim)
            action = rng.integers(envs.action_dim, size=shape) if envs.discrete else rng.uniform(-1, 1, shape)
            if envs.step(action).terminated.any():
                return step + 1
    return None


for _name in OTHERS:
    _register(_name, False)
for _name in RUNNERS:
    for _version in ("v4", "v5"):
        _register(f"{_name}-{_version}", True)
