"""Vectorised environments under one contract: true successors, two kinds of ending, no filler rows.

A step of N environments yields, for each of them, the reward, the **true** successor `next_obs` (on the last
step of an episode too), `terminated` and `truncated` apart, and `obs`, the observation to act on next: equal
to `next_obs`, but the first of the new episode where one has just ended. No row is ever an autoreset's
filler. So with a rollout's arrays

    delta_t = r_t + gamma (1 - terminated_t) V(next_obs_t) - V(obs_t)

is right at every row: time limits bootstrap, terminations do not.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit

from zoo.common.errors import EnvironmentFault, RunFault
from zoo.common.process import say

# A dimension of actions whose bounds are further apart than twice this has none: 1e6, or the largest float32
# or int32, is how people write "no bound", and spread over it a policy that begins with a deviation near 1
# would never do anything small. Ranges in physical units (rpm, watts, newtons) are narrower.
UNBOUNDED = 1e5


class Step(NamedTuple):
    """What `VectorEnv.step` returns: N rows, one an environment."""

    obs: np.ndarray  # (N, D) the observations to act on next
    reward: np.ndarray  # (N,)
    next_obs: np.ndarray  # (N, D) the true successors
    terminated: np.ndarray  # (N,) bool: the task ended, the future is worth 0
    truncated: np.ndarray  # (N,) bool: a time limit cut the episode, the future is worth V(next_obs)
    episodes: list[tuple[float, int]]  # (return, length) of the episodes that ended here


class VectorEnv:
    """N copies of a task. An engine implements `_restart` and `_advance`; the contract is kept here.

    Box actions are given in the policy's scale: [-1, 1] spans the bounds of a bounded dimension, an unbounded
    dimension takes the value as it is; what lies outside the bounds is clipped. Discrete actions are counted
    from 0. Observations are float32 where that holds all numbers of the task's space, else float64: normalise
    before rounding to float32, in which 1e8 and 1e8 + 1 are one number.
    As a context manager it is closed at the end.
    """

    engine = "none"

    def __init__(self, env_id: str, num_envs: int, single: gym.Env, dtype: Any = None):
        self.env_id, self.num_envs = env_id, num_envs
        space = single.observation_space
        self.obs_shape = space.shape or ()
        self.obs_dim = int(np.prod(self.obs_shape))
        exact = np.can_cast(space.dtype or np.float64, np.float32)
        self.dtype = np.dtype(dtype or (np.float32 if exact else np.float64))
        space = single.action_space
        self.discrete = isinstance(space, gym.spaces.Discrete)
        if isinstance(space, gym.spaces.Discrete):
            self.action_dim, self.action_start = int(space.n), int(space.start)
        elif isinstance(space, gym.spaces.Box):
            self.action_dim, self.action_shape, self.action_dtype = (
                int(np.prod(space.shape)),
                space.shape,
                space.dtype,
            )
            self._low, self._high = (b.reshape(-1).astype(np.float64) for b in (space.low, space.high))
            self._whole = np.issubdtype(space.dtype, np.integer)
            finite = np.isfinite(self._low) & np.isfinite(self._high)
            low, high = np.where(finite, self._low, -1.0), np.where(finite, self._high, 1.0)
            width = high / 2 - low / 2  # halved first, for the difference may overflow
            self.bounded = finite & (width <= UNBOUNDED)
            if (finite & ~self.bounded).any():
                i = int(np.argmax(finite & ~self.bounded))
                _warn_once(
                    f"{env_id}: action {i} has bounds {low[i]:.6g} and {high[i]:.6g}, too far apart to scale "
                    "a policy to: such actions are taken as they are, clipped to the bounds"
                )
            self.action_scale = np.where(self.bounded, width, 1.0)
            self.action_shift = np.where(self.bounded, high / 2 + low / 2, 0.0)
        self._every = np.arange(num_envs)
        self._returns, self._lengths = np.zeros(num_envs), np.zeros(num_envs, dtype=np.int64)

    def reset(self, seeds: Sequence[int]) -> np.ndarray:
        """Start every episode afresh, environment i from seeds[i] (see seeding.py); (N, D) observations.

        Raises ValueError where there is not one seed for each environment.
        """
        if len(seeds) != self.num_envs:
            raise ValueError(
                f"reset takes one seed for each of {self.num_envs} environments, not {len(seeds)}"
            )
        self._returns[:], self._lengths[:] = 0, 0
        return self._observed(self._restart(self._every, seeds), "observation at reset", self._every)

    def step(self, action: np.ndarray) -> Step:
        """Advance by one action each: (N,) integers, or (N, A) numbers in the policy's scale."""
        next_obs, reward, terminated, truncated = self._advance(self.to_env_action(action))
        next_obs = self._observed(next_obs, "observation", self._every)
        self._check_finite(reward, "reward", self._every)
        self._returns += reward
        self._lengths += 1
        obs, ends, episodes = next_obs, terminated | truncated, []
        if np.count_nonzero(ends):  # several times as fast as any()
            ended = np.flatnonzero(ends)
            episodes = [(float(self._returns[i]), int(self._lengths[i])) for i in ended]
            self._returns[ended], self._lengths[ended] = 0, 0
            obs = next_obs.copy()
            obs[ended] = self._observed(self._restart(ended, None), "observation at reset", ended)
        return Step(obs, reward, next_obs, terminated, truncated, episodes)

    def to_env_action(self, action: np.ndarray) -> np.ndarray:
        """From the policy's scale to the environment's."""
        if self.discrete:
            return action + self.action_start
        scaled = action * self.action_scale  # float64
        scaled += self.action_shift
        if not np.isfinite(np.vdot(scaled, scaled)) and not np.isfinite(action).all():
            raise RunFault(f"the policy's actions for {self.env_id} became non-finite: training has diverged")
        np.maximum(scaled, self._low, out=scaled)  # the bounds come last, because rounding could overstep one
        np.minimum(scaled, self._high, out=scaled)
        return np.rint(scaled) if self._whole else scaled

    def _observed(self, values: np.ndarray, what: str, index: np.ndarray) -> np.ndarray:
        """An engine's observations as the contract has them: of its dtype, and finite in it."""
        if values.dtype != self.dtype:
            with np.errstate(over="ignore"):  # what overflows is told as non-finite
                values = values.astype(self.dtype)
        return self._check_finite(values, what, index)

    def _check_finite(self, values: np.ndarray, what: str, index: np.ndarray) -> np.ndarray:
        # A sum of squares is finite only if all of them are; one that overflowed is looked at closely
        if not np.isfinite(np.vdot(values, values)) and not np.isfinite(values).all():
            bad = int(index[np.argwhere(~np.isfinite(values))[0][0]])
            raise EnvironmentFault(
                f"{self.env_id} returned a non-finite {what} in environment {bad} of {self.num_envs}"
            )
        return values

    def _restart(self, index: np.ndarray, seeds: Sequence[int] | None) -> np.ndarray:
        """Begin new episodes in the environments of `index`: all of them from seeds, or as generators go on.

        Returns their first observations (len(index), D).
        """
        raise NotImplementedError  # each engine has its own

    def _advance(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One step without any reset: next_obs (N, D), reward (N,), terminated (N,), truncated (N,)."""
        raise NotImplementedError  # each engine has its own

    def close(self) -> None:
        """Free what the engine holds."""

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.close()


@functools.cache
def _warn_once(message: str) -> None:
    """Evaluations make the same environments again."""
    say(f"warning: {message}")


def class_name(env: Any) -> str:
    """module.Class of an environment."""
    return f"{type(env).__module__}.{type(env).__qualname__}"


def time_limit_of(single: Any) -> float:
    """Steps after which gym.make's own wrappers truncate an episode, infinite without a limit."""
    limit = np.inf
    while single is not single.unwrapped:
        if isinstance(single, TimeLimit):
            limit = min(limit, single._max_episode_steps)
        single = single.env
    return limit


def is_plain(single: Any) -> bool:
    """Whether an environment from gym.make runs its class's code, and only that.

    Not so with a wrapper other than gym.make's own, where its id is registered with a function, which may
    change each copy that it makes, and where a method is no longer the one that stands in its class's file.
    """
    env, types = single.unwrapped, [type(single.unwrapped)]
    entry_point = env.spec.entry_point if env.spec is not None else type(env)
    if isinstance(entry_point, str):
        entry_point = load_env_creator(entry_point)
    while single is not env:
        types.append(type(single))
        single = single.env
    wrapped = set(types[1:]) <= {TimeLimit, OrderEnforcing, PassiveEnvChecker}
    return entry_point is type(env) and wrapped and all(map(_is_as_written, types))


def _is_as_written(kind: type) -> bool:
    """Whether the methods of a class, and of those of Gymnasium it derives from, are those of their files."""
    for base in kind.__mro__:
        file = sys.modules[base.__module__].__dict__.get("__file__")
        for value in vars(base).values() if base.__module__.startswith("gymnasium.") else ():
            if callable(value) and getattr(getattr(value, "__code__", None), "co_filename", "") != file:
                return False
    return True
