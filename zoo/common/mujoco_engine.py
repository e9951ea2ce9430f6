"""Gymnasium's own MuJoCo tasks, all N copies stepped by one native call: `MujocoVectorEnv`.

Physics is most of a step's time, and MuJoCo is the same library under every engine; what differs is the way
around it. This one keeps all states in one mujoco.batch.Batch (MuJoCo 4.0 or later), whose C++ thread pool
advances them without Python, and computes observations and rewards for all rows at once (mujoco_tasks.py).
Environment steps a second on two cores, medians of alternating runs, through `VectorEnv.step`:

    task and copies           this engine   SyncVectorEnv   ratio   (ratio with one thread)
    HalfCheetah-v4, 64           59.6k          18.3k        3.3     1.8
    HalfCheetah-v4, 8            47.7k          20.0k        2.1     1.45
    Hopper-v4, 64                23.4k           8.7k        2.7     1.7
    Ant-v5, 64                    8.2k           3.7k        2.3     1.3

Outside the physics a step of HalfCheetah-v4 takes 40 us for 8 copies, and hardly more for 64.

The alternatives: EnvPool does 25-43k on the first line and brings about 740 MB of packages; mujoco.rollout is
as fast as Batch, but returns neither the solver's warm start nor derived fields, so that trajectories drift
from Gymnasium's by rounding (1e-13 a step). With Batch whole seeded trajectories, resets included, equal
those of Gymnasium to the bit (but for the last one of Reacher's and the double pendulum's rewards) at any
number of threads; tests/test_mujoco_engine.py replays both.

What is not served (an older MuJoCo, other tasks, subclasses, users' wrappers, rendering) goes to Gymnasium's
own loop.
"""

import os
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding

from zoo.common.errors import EnvironmentFault
from zoo.common.mujoco_tasks import CLASSES
from zoo.common.vector_env import VectorEnv, class_name, is_plain, time_limit_of

try:
    import mujoco
    from mujoco.batch import Batch, SimulationError
except ImportError:  # MuJoCo before 4.0, or none: `serves` then refuses everything
    Batch = None


def serves(single: gym.Env) -> bool:
    """Whether the engine steps copies of `single`, from gym.make, exactly as Gymnasium would."""
    env: Any = single.unwrapped
    known = Batch is not None and class_name(env) in CLASSES
    return known and is_plain(single) and env.render_mode is None


class MujocoVectorEnv(VectorEnv):
    """N copies of a task that `serves` accepts, on a pool of `threads` native threads.

    Default: one for each core this process may use; Batch takes no more than environments. The numbers do not
    depend on it.
    """

    engine = "mujoco"

    def __init__(
        self, env_id: str, num_envs: int, single: Any, dtype: Any = None, threads: int | None = None
    ):
        super().__init__(env_id, num_envs, single, dtype)
        self.env: Any = single.unwrapped
        self.task, self.v5 = CLASSES[class_name(self.env)]
        self.time_limit = time_limit_of(single)
        self.with_forces = getattr(self.env, "_use_contact_forces", "cfrc_ext" in self.task.derived)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # A persistent batch keeps every MjData, from which mj_rnePostConstraint computes cfrc_ext
        self.batch = Batch(self.env.model, num_envs, threads or cores, persistent=self.with_forces)
        # Bound before the first call: a field bound between two calls reads zero until the next one
        fields = ("qpos", "qvel", "ctrl", *(name for name in self.task.derived if name != "cfrc_ext"))
        self.sim = SimpleNamespace(**{name: self.batch.bind(name) for name in fields})
        self.sim.cfrc_ext = np.zeros((num_envs, self.env.model.nbody, 6))
        # where contact forces are computed, one environment after another
        self.data = mujoco.MjData(self.env.model)
        self.generators = [np.random.default_rng() for _ in range(num_envs)]
        self.elapsed = np.zeros(num_envs, dtype=np.int64)

    def _restart(self, index, seeds):
        if seeds is not None:
            self.generators = [seeding.np_random(int(seed))[0] for seed in seeds]
        self._call(self.batch.reset, index, stage=mujoco.mjtStage.mjSTAGE_NONE.value)
        for i in index:
            self.sim.qpos[i], self.sim.qvel[i] = self.task.start(self.env, self.generators[i])
        self._call(self.batch.forward, index)
        self.sim.cfrc_ext[index] = 0  # as Gymnasium, which computes no contact force at a reset
        self.elapsed[index] = 0
        return self.task.observe(self.env, self.v5, self.sim)[index]

    def _advance(self, action):
        # as Gymnasium's action space has it, and GymnasiumVectorEnv passes it
        action = action.astype(np.float32)
        before = None if self.task.track is None else self.task.track(self.env, self.sim).copy()
        self.sim.ctrl[:] = action
        self._call(self.batch.step, nstep=self.env.frame_skip)
        if self.with_forces:
            # no batched call for it; this adds about a tenth to the step's time
            for i in range(self.num_envs):
                self.batch.get_data(i, self.data)
                mujoco.mj_rnePostConstraint(self.env.model, self.data)
                self.sim.cfrc_ext[i] = self.data.cfrc_ext
        self.elapsed += 1
        reward, terminated = self.task.judge(self.env, self.v5, self.sim, before, action)
        return (
            self.task.observe(self.env, self.v5, self.sim),
            reward,
            terminated,
            self.elapsed >= self.time_limit,
        )

    def _call(self, function, *args, **kwargs):
        try:
            function(*args, **kwargs)
        except SimulationError as error:
            raise EnvironmentFault(f"{self.env_id}: {error}") from error

    def close(self):
        self.env.close()
