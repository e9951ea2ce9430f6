"""Making environments: N copies of any registered id, on the fastest engine that steps them faithfully.

The contract of a step is in vector_env.py. Engines: Gymnasium's own classes in a loop (here), its MuJoCo
tasks (mujoco_engine.py) and its classic control tasks (classic_engine.py) stepped all at once.
"""

import contextlib
import difflib
import importlib
import os
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np

from zoo.common import classic_engine
from zoo.common.errors import EnvironmentFault, UsageError
from zoo.common.vector_env import Step, VectorEnv, class_name

__all__ = ["GymnasiumVectorEnv", "Step", "VectorEnv", "make_envs", "make_single"]

MOST = float(np.finfo(np.float32).max)  # of a reward: the agents compute in float32
RETURNS = {"reset": ("obs", "info"), "step": ("obs", "reward", "terminated", "truncated", "info")}


class GymnasiumVectorEnv(VectorEnv):
    """Any registered Gymnasium id, stepped in a plain loop.

    Why not SyncVectorEnv: its default autoreset inserts filler rows, its SAME_STEP mode hands out the true
    successors as object arrays, and on cheap tasks its per-step bookkeeping costs more than the tasks do.
    """

    engine = "gymnasium"

    def __init__(self, env_id: str, num_envs: int, single: gym.Env, dtype: Any = None):
        super().__init__(env_id, num_envs, single, dtype)
        self.envs = [single] + [make_single(env_id) for _ in range(num_envs - 1)]

    def _restart(self, index, seeds):
        rows = np.empty((len(index), *self.obs_shape))
        for row, i in enumerate(index):
            try:
                result = self.envs[i].reset(seed=None if seeds is None else int(seeds[i]))
            except Exception as error:
                self._raised("reset", error)
            rows[row] = self._parts("reset", result)[0]
        return rows.reshape(len(index), -1)

    def _advance(self, action):
        if self.discrete:
            actions = action.tolist()
        else:
            actions = action.astype(self.action_dtype).reshape(-1, *self.action_shape)
        rows, reward, terminated, truncated = np.empty((self.num_envs, *self.obs_shape)), [], [], []
        for i, env in enumerate(self.envs):
            try:
                result = env.step(actions[i])
            except Exception as error:
                self._raised("step", error)
            # copied at once, for the environments may share one array
            rows[i], one_reward, one_terminated, one_truncated, _ = self._parts("step", result)
            reward.append(one_reward)
            terminated.append(one_terminated)
            truncated.append(one_truncated)
        rewards = self._numbers("reward", reward, "fiub").astype(np.float64, copy=False)
        if MOST < (most := np.abs(rewards).max()) < np.inf:  # what is not finite is told of all engines
            self._fault("step", f"returned a reward of {most:.6g} in size, which float32 does not hold")
        return (
            rows.reshape(self.num_envs, -1),
            rewards,
            self._numbers("terminated", terminated, "b"),
            self._numbers("truncated", truncated, "b"),
        )

    def _parts(self, method: str, result: Any) -> tuple:
        """What `method` returned, the observation as an array of the space's shape; or EnvironmentFault."""
        names = RETURNS[method]
        if not isinstance(result, tuple) or len(result) != len(names):
            returned = (
                f"{len(result)} values" if isinstance(result, tuple) else f"one {type(result).__name__}"
            )
            self._fault(method, f"returned {returned}; right is {_signature(method)}")
        obs = result[0]
        if type(obs) is np.ndarray and obs.shape == self.obs_shape and obs.dtype.kind in "fiub":
            return result
        try:
            array = np.asarray(obs)
        except ValueError:  # rows of different lengths
            array = np.array(None)
        if array.dtype.kind not in "fiub":
            self._fault(
                method,
                f"returned as observation a {type(obs).__name__}, not numbers of shape {self.obs_shape}",
            )
        if array.shape != self.obs_shape:
            self._fault(
                method,
                f"returned an observation of shape {array.shape}, not {self.obs_shape} as its space says",
            )
        return (array, *result[1:])

    def _numbers(self, name: str, values: list, kinds: str) -> np.ndarray:
        """(N,) from a number, or an array that holds one, of each environment; `kinds` of NumPy are right."""
        try:
            array = np.array(values).reshape(self.num_envs)
        except ValueError:  # arrays of several numbers, or of different shapes
            array = np.array(None)
        if kinds == "b" and array.dtype.kind in "iuf" and np.isin(array, (0, 1)).all():
            array = array.astype(bool)
        if array.dtype.kind not in kinds:
            right = "one bool" if kinds == "b" else "one number"
            self._fault("step", f"returned as {name} {_short(values)}, not {right} each")
        return array

    def _raised(self, method: str, error: Exception) -> NoReturn:
        message = " ".join(str(error).split())  # on one line
        # wrappers of the task unpack what it returns
        foreign = "to unpack" in message or "unexpected keyword" in message
        more = f"; right is {_signature(method)}" if foreign else f" ({_place(error)})"
        raise EnvironmentFault(
            f"{self.env_id} raised {type(error).__name__} in {method}: {message}{more}"
        ) from error

    def _fault(self, method: str, message: str) -> NoReturn:
        raise EnvironmentFault(f"{self.env_id}: {method} {message}")

    def close(self):
        for env in self.envs:
            env.close()


def _place(error: Exception) -> str:
    """File and line that raised it: the innermost of one's own code, where there is some in the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    libraries = ("site-packages", "dist-packages", sysconfig.get_path("stdlib"), str(Path(__file__).parent))
    own = [frame for frame in frames if not any(each in frame.filename for each in libraries)]
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno}"


def _signature(method: str) -> str:
    given = "seed=None, options=None" if method == "reset" else "action"
    return f"{method}({given}) -> ({', '.join(RETURNS[method])})"


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _entry_point(env_id: str) -> str:
    return str(getattr(gym.registry.get(env_id), "entry_point", ""))


@contextlib.contextmanager
def _without_deprecations(env_id: str) -> Iterator[None]:
    """Making a v4 task warns that there is a v5, and MuJoCo of an XML attribute in Gymnasium's own files."""
    mujoco: Any = None
    if "envs.mujoco" in _entry_point(env_id):  # importing it takes 0.2 s
        with contextlib.suppress(ImportError):
            mujoco = importlib.import_module("mujoco")
    handler = mujoco and mujoco.get_mju_user_warning()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", ".*Using the latest versioned environment")  # said by make_single
        if mujoco:
            mujoco.set_mju_user_warning(lambda message: None)
        try:
            yield
        finally:
            if mujoco:
                mujoco.set_mju_user_warning(handler)


def make_single(env_id: str, **options: Any) -> gym.Env:
    """One Gymnasium environment, or a UsageError with the nearest ids where there is none of that name.

    options: of its constructor, such as render_mode.
    """
    try:
        with _without_deprecations(env_id):
            # The passive checker warns on every step of every copy; what it looks at is checked here as well.
            env = gym.make(env_id, disable_env_checker=True, **options)
    except gym.error.DependencyNotInstalled as error:
        message = " ".join(str(error).split())
        if "box2d" in message.lower():  # Gymnasium's own advice would leave our extra unmentioned
            raise UsageError(
                f"--env {env_id} needs Box2D, which is missing: pip install -e '.[box2d]'"
            ) from error
        raise UsageError(f"--env {env_id} needs a package that is missing: {message}") from error
    except gym.error.NamespaceNotFound as error:
        if env_id.startswith("ALE/"):  # importing the part before the colon registers the tasks
            advice = f"pip install ale-py and give --env ale_py:{env_id}"
            raise UsageError(f"--env {env_id} needs the package ale-py: {advice}") from error
        told = " ".join(str(error).split())
        own = f"; a task of your own needs its module: --env MODULE:{env_id}" if ":" not in env_id else ""
        raise UsageError(f"--env {env_id}: {told}{_nearest(env_id)}{own}") from error
    except ModuleNotFoundError as error:  # of one's own task, or of what its module imports
        missing = getattr(error.__cause__ or error, "name", None)
        ones_own = f"{env_id.partition(':')[0]}.".startswith(f"{missing}.")
        where = f"; PYTHONPATH=FOLDER names the folder of {missing}" if ones_own else ""
        raise UsageError(f"--env {env_id}: there is no module named {missing}{where}") from error
    except gym.error.Error as error:
        raise UsageError(f"--env {env_id}: {' '.join(str(error).split())}{_nearest(env_id)}") from error
    except Exception as error:  # the constructor's own
        message = " ".join(str(error).split())
        renderer = os.environ.get("MUJOCO_GL")
        if renderer and "mujoco" not in sys.modules and "envs.mujoco" in _entry_point(env_id):
            told = f"MuJoCo cannot be imported with MUJOCO_GL={renderer}: {message}; try egl, osmesa or none"
            raise UsageError(f"--env {env_id}: {told}") from error
        raise UsageError(f"--env {env_id} cannot be made: {type(error).__name__}: {message}") from error
    spec = env.unwrapped.spec  # of a task made of another (horizon.py) `env.spec` may be the other's
    if spec is not None and spec.id != env_id.rpartition(":")[2]:
        env.close()  # settings go by the id, and another Gymnasium may have a newer one
        raise UsageError(f"--env {env_id} does not say which version; the newest is {spec.id}")
    return env


def _nearest(env_id: str) -> str:
    near = difflib.get_close_matches(env_id, gym.registry.keys(), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(near)}" if near else ""


def make_envs(env_id: str, num_envs: int, engine: str = "auto", threads: int | None = None) -> VectorEnv:
    """`num_envs` copies of any registered Gymnasium id, on the fastest engine that steps it faithfully.

    engine: "auto", "mujoco" and "classic" (all copies stepped at once, see mujoco_engine.py and
    classic_engine.py) or "gymnasium" (a loop over its environments).
    threads: physics threads of the MuJoCo engine; by default one for each usable core.
    Raises UsageError for an unknown id and for spaces no agent of the zoo handles.
    """
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
        raise UsageError(
            f"--env {env_id}: actions are {action_space}; the zoo's agents act in a Box or a Discrete space"
        )
    for what, shape in (("observations", obs_space.shape), ("actions", action_space.shape)):
        if 0 in (shape or ()):
            raise UsageError(f"--env {env_id}: {what} have the shape {shape}, so there is no number in them")
    if engine in ("auto", "classic") and classic_engine.serves(single):
        return classic_engine.ClassicVectorEnv(env_id, num_envs, single)
    if engine in ("auto", "mujoco") and class_name(single.unwrapped).startswith("gymnasium.envs.mujoco."):
        from zoo.common import mujoco_engine  # importing MuJoCo takes 0.2 s, which a run without it is spared

        if mujoco_engine.serves(single):
            return mujoco_engine.MujocoVectorEnv(env_id, num_envs, single, threads=threads)
    if engine not in ("auto", "gymnasium"):
        raise UsageError(f"engine {engine} does not serve {env_id}; use auto or gymnasium")
    return GymnasiumVectorEnv(env_id, num_envs, single)
