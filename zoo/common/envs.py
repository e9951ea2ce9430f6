"""Vectorised environments under one contract: true successors, two kinds of ending, no filler rows.

A step of N environments yields, for each of them, the reward, the **true** successor `next_obs` (on the last step of an
episode too), `terminated` and `truncated` apart, and `obs`, the observation to act on next: equal to `next_obs`, but the
first of the new episode where one has just ended. No row is ever an autoreset's filler. So with a rollout's arrays

    delta_t = r_t + gamma (1 - terminated_t) V(next_obs_t) - V(obs_t)

is right at every row: time limits bootstrap, terminations do not.
"""

import contextlib
import difflib
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import gymnasium as gym
import numpy as np

from zoo.common.errors import EnvironmentFault, UsageError


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

    Box actions are given in the policy's scale: [-1, 1] spans the bounds of a bounded dimension (values outside are
    clipped), an unbounded dimension takes the value as it is. Discrete actions are counted from 0.
    """

    engine = "none"

    def __init__(self, env_id: str, num_envs: int, single: gym.Env, dtype: type = np.float32):
        self.env_id, self.num_envs, self.dtype = env_id, num_envs, dtype
        self.obs_dim = int(np.prod(single.observation_space.shape or (1,)))
        space = single.action_space
        self.discrete = isinstance(space, gym.spaces.Discrete)
        if isinstance(space, gym.spaces.Discrete):
            self.action_dim, self.action_start = int(space.n), int(space.start)
        elif isinstance(space, gym.spaces.Box):
            self.action_dim, self.action_shape, self.action_dtype = int(np.prod(space.shape)), space.shape, space.dtype
            low, high = space.low.reshape(-1).astype(np.float64), space.high.reshape(-1).astype(np.float64)
            self.bounded = np.isfinite(low) & np.isfinite(high)
            finite_low, finite_high = np.where(self.bounded, low, -1.0), np.where(self.bounded, high, 1.0)
            self.action_scale, self.action_shift = (finite_high - finite_low) / 2, (finite_high + finite_low) / 2
            self._low, self._high = low, high
        self._returns, self._lengths = np.zeros(num_envs), np.zeros(num_envs, dtype=np.int64)

    def reset(self, seeds: Sequence[int]) -> np.ndarray:
        """Start every episode afresh, environment i from seeds[i] (see seeding.py); (N, D) first observations.

        Raises ValueError where there is not one seed for each environment.
        """
        if len(seeds) != self.num_envs:
            raise ValueError(f"reset takes one seed for each of {self.num_envs} environments, not {len(seeds)}")
        self._returns[:], self._lengths[:] = 0, 0
        every = np.arange(self.num_envs)
        return self._checked(self._cast(self._restart(every, seeds)), "observation at reset", every)

    def step(self, action: np.ndarray) -> Step:
        """Advance by one action each: (N,) integers, or (N, A) numbers in the policy's scale."""
        next_obs, reward, terminated, truncated = self._advance(self.to_env_action(action))
        every = np.arange(self.num_envs)
        next_obs = self._checked(self._cast(next_obs), "observation", every)
        self._checked(self._cast(reward), "reward", every)
        self._returns += reward
        self._lengths += 1
        ended, obs, episodes = np.flatnonzero(terminated | truncated), next_obs, []
        if len(ended):
            episodes = [(float(self._returns[i]), int(self._lengths[i])) for i in ended]
            self._returns[ended], self._lengths[ended] = 0, 0
            obs = next_obs.copy()
            obs[ended] = self._checked(self._cast(self._restart(ended, None)), "observation at reset", ended)
        return Step(obs, reward, next_obs, terminated, truncated, episodes)

    def to_env_action(self, action: np.ndarray) -> np.ndarray:
        """From the policy's scale to the environment's."""
        if self.discrete:
            return action + self.action_start
        scaled = np.asarray(action, np.float64) * self.action_scale + self.action_shift
        scaled = np.clip(scaled, self._low, self._high)  # last, because rounding could overstep a bound
        return np.rint(scaled) if np.issubdtype(self.action_dtype, np.integer) else scaled

    def _cast(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # what overflows is told as non-finite
            return values.astype(self.dtype)

    def _checked(self, values: np.ndarray, what: str, index: np.ndarray) -> np.ndarray:
        if not np.isfinite(values).all():
            bad = int(index[np.argwhere(~np.isfinite(values))[0][0]])
            raise EnvironmentFault(f"{self.env_id} returned a non-finite {what} in environment {bad} of {self.num_envs}")
        return values

    def _restart(self, index: np.ndarray, seeds: Sequence[int] | None) -> np.ndarray:
        """Begin new episodes in the environments of `index`, (len(index), D): in all with their seeds, or going on with
        their generators."""
        raise NotImplementedError  # each engine has its own

    def _advance(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One step without any reset: next_obs (N, D), reward (N,), terminated (N,), truncated (N,)."""
        raise NotImplementedError  # each engine has its own

    def close(self) -> None:
        """Free what the engine holds."""


class GymnasiumVectorEnv(VectorEnv):
    """Any registered Gymnasium id, stepped in a plain loop.

    Why not SyncVectorEnv: its default autoreset inserts filler rows, its SAME_STEP mode hands out the true successors as
    object arrays, and on cheap tasks its per-step bookkeeping costs more than the tasks do.
    """

    engine = "gymnasium"

    def __init__(self, env_id: str, num_envs: int, single: gym.Env, dtype: type = np.float32):
        super().__init__(env_id, num_envs, single, dtype)
        self.envs = [single] + [make_single(env_id) for _ in range(num_envs - 1)]

    def _restart(self, index, seeds):
        return np.stack([self._call(i, "reset", seed=None if seeds is None else int(seeds[i]))[0] for i in index])

    def _advance(self, action):
        actions = action.tolist() if self.discrete else action.astype(self.action_dtype).reshape(-1, *self.action_shape)
        rows = [self._call(i, "step", a) for i, a in enumerate(actions)]
        next_obs, reward, terminated, truncated = zip(*rows, strict=True)
        return np.stack(next_obs), *map(self._numbers, (reward, terminated, truncated), (np.float64, bool, bool))

    def _numbers(self, values, dtype):
        """(N,) from a number, or an array that holds one, of each environment."""
        try:
            return np.array(values, dtype).reshape(self.num_envs)
        except (TypeError, ValueError) as error:
            shapes = sorted({np.shape(value) for value in values})
            raise EnvironmentFault(f"{self.env_id} returned rewards or flags of shape {shapes}, not one number each") from error

    def _call(self, i, method, *args, **kwargs):
        try:
            obs, *rest = getattr(self.envs[i], method)(*args, **kwargs)
        except Exception as error:
            message = " ".join(str(error).split())  # on one line
            raise EnvironmentFault(f"{self.env_id} raised {type(error).__name__} in {method}: {message}") from error
        return (np.asarray(obs, np.float64).reshape(-1), *rest[:3])

    def close(self):
        for env in self.envs:
            env.close()


@contextlib.contextmanager
def _without_deprecations() -> Iterator[None]:
    """Making a v4 task warns that there is a v5, and MuJoCo of an XML attribute in Gymnasium's own files, for every copy."""
    try:
        import mujoco
    except ImportError:
        mujoco = None
    handler = mujoco and mujoco.get_mju_user_warning()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        if mujoco:
            mujoco.set_mju_user_warning(lambda message: None)
        try:
            yield
        finally:
            if mujoco:
                mujoco.set_mju_user_warning(handler)


def make_single(env_id: str) -> gym.Env:
    """One Gymnasium environment, or a UsageError with the nearest ids where there is none of that name."""
    try:
        with _without_deprecations():
            # The passive checker warns on every step of every copy; the spaces are checked once, in make_envs.
            return gym.make(env_id, disable_env_checker=True)
    except gym.error.DependencyNotInstalled as error:
        raise UsageError(f"--env {env_id} needs a package that is missing: {error}") from error
    except (gym.error.UnregisteredEnv, gym.error.Error, ModuleNotFoundError) as error:
        near = difflib.get_close_matches(env_id, gym.registry.keys(), n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise UsageError(f"--env {env_id}: {' '.join(str(error).split())}{hint}") from error
    except Exception as error:  # the constructor's own
        raise UsageError(f"--env {env_id} cannot be made: {type(error).__name__}: {' '.join(str(error).split())}") from error


def make_envs(env_id: str, num_envs: int, engine: str = "auto", threads: int | None = None) -> VectorEnv:
    """`num_envs` copies of any registered Gymnasium id, on the fastest engine that steps it faithfully.

    engine: "auto", "mujoco" (MuJoCo's own batched stepping; see mujoco_engine.py) or "gymnasium" (a loop over envs).
    threads: physics threads of the MuJoCo engine; by default one for each usable core.
    Raises UsageError for an unknown id and for spaces no agent of the zoo handles.
    """
    from zoo.common.mujoco_engine import MujocoVectorEnv, serves

    if num_envs < 1:
        raise UsageError(f"--num-envs must be at least 1, not {num_envs}")
    single = make_single(env_id)
    obs_space, action_space = single.observation_space, single.action_space
    if not isinstance(obs_space, gym.spaces.Box):
        raise UsageError(
            f"--env {env_id}: observations are {obs_space}; the zoo's agents read a Box "
            "(gymnasium.wrappers.FlattenObservation makes one of most spaces)"
        )
    if not isinstance(action_space, gym.spaces.Box | gym.spaces.Discrete):
        raise UsageError(f"--env {env_id}: actions are {action_space}; the zoo's agents act in a Box or a Discrete space")
    if engine == "mujoco" and not serves(single):
        raise UsageError(f"engine mujoco does not serve {env_id}; use auto or gymnasium")
    if engine != "gymnasium" and serves(single):
        return MujocoVectorEnv(env_id, num_envs, single, threads=threads)
    return GymnasiumVectorEnv(env_id, num_envs, single)
