"""A trained agent outside its run, to act in Gymnasium's own environments; `zoo.load` gives it."""

import dataclasses
import importlib
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from zoo.common.args import RunArgs, require
from zoo.common.envs import VectorEnv, make_envs
from zoo.common.errors import UsageError
from zoo.common.evaluate import Policy
from zoo.common.files import load_checkpoint


class Agent:
    """What an agent.pt holds, ready to act.

    name: of the agent's file, such as "ppo". env: id of the task. args: those it was trained with.
    acts: the policy in the zoo's own terms, for a VectorEnv of the task (see vector_env.py). state: its
    tensors.
    """

    def __init__(self, content: dict[str, Any], args: RunArgs, acts: Policy, envs: VectorEnv):
        self.name: str = content["agent"]
        self.env = envs.env_id
        self.state: dict[str, Any] = content["state"]
        self.args, self.acts, self.envs = args, acts, envs

    def policy(self, obs: ArrayLike) -> Any:
        """The action without noise, for one observation; for a batch (N, ...) of them the actions (N, ...).

        Observations and actions are those of the Gymnasium environment: its shapes, scale, action dtype.
        Raises UsageError for another shape.
        """
        envs, shape = self.envs, np.shape(obs)
        one = shape == envs.obs_shape
        if (not one and shape[1:] != envs.obs_shape) or len(shape) > len(envs.obs_shape) + 1:
            raise UsageError(
                f"policy: an observation of {self.env} has the shape {envs.obs_shape}, "
                f"a batch of them {('N', *envs.obs_shape)}".replace("'", "")
                + f", not {shape}"
            )
        rows = np.asarray(obs, dtype=envs.dtype).reshape(-1, envs.obs_dim)
        actions = envs.to_env_action(self.acts(rows))
        if not envs.discrete:
            actions = actions.astype(envs.action_dtype).reshape(-1, *envs.action_shape)
        return actions[0] if one else actions

    def __repr__(self) -> str:
        return f"<{self.name} of {self.env}, trained for {self.args.total_steps:,} steps>"


def load_agent(path: str | os.PathLike[str], env: str | None = None) -> Agent:
    """See `zoo.load`."""
    path = Path(path)
    content = _read(path)
    name, trained_on = content["agent"], content["env"]
    module = importlib.import_module(f"zoo.{name}")
    acting = f"run {path}: is of agent {name}, and zoo/{name}.py has no make_policy"
    require(hasattr(module, "make_policy"), f"{acting}: it does not act in environments")
    fields = {field.name for field in dataclasses.fields(module.Args)}
    known = {key: value for key, value in content["args"].items() if key in fields}
    args = module.Args(**{key: tuple(v) if isinstance(v, list) else v for key, v in known.items()})
    envs = make_envs(env or trained_on, 1, engine="gymnasium")  # asked for its spaces only
    try:
        with torch.random.fork_rng(devices=[]):  # a network that is made to be filled draws its first weights
            acts = module.make_policy(envs, args, content["state"])
        acts(np.zeros((1, envs.obs_dim), envs.dtype))
    except KeyError as error:
        raise UsageError(f"run {path}: agent.pt lacks {error}, which zoo/{name}.py needs to act") from error
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        if envs.env_id == trained_on:
            what = f"zoo/{name}.py on {trained_on} as they are here; made by another version of either?"
            raise UsageError(f"run {path}: agent.pt does not fit {what}") from error
        misfit = "its observations or actions are not those of"
        raise UsageError(
            f"--env {envs.env_id}: {misfit} {trained_on}, on which the agent was trained"
        ) from error
    finally:
        envs.close()
    return Agent(content, args, acts, envs)


def _read(path: Path) -> dict[str, Any]:
    """The content of the agent.pt that `path` leads to. Raises UsageError."""
    require(path.exists(), f"run {path}: no such file or folder")
    file = path / "agent.pt" if path.is_dir() else path
    if not file.exists():
        resume = f"go on with it by --resume {path}"
        unfinished = (path / "checkpoint.pt").exists()
        require(not unfinished, f"run {path}: is not finished and has no agent.pt yet; {resume}")
        kept = "scripts/benchmark.py keeps that of the median seed"
        recorded = (path / "meta.json").exists()
        require(not recorded, f"run {path}: these results hold no agent.pt; {kept}")
        within = sorted(path.glob("*/agent.pt"), key=lambda found: found.stat().st_mtime)
        hint = f"; the newest of those within: {within[-1].parent}" if within else ""
        raise UsageError(f"run {path}: holds no agent.pt, so no trained agent{hint}")
    content = load_checkpoint(file, "run")
    # The name comes from a file that anyone may have made: import nothing but an agent's file of the zoo.
    name = content["agent"]
    known = (
        isinstance(name, str) and re.fullmatch(r"[a-z]\w*", name) and importlib.util.find_spec(f"zoo.{name}")
    )
    require(
        bool(known),
        f"run {path}: is of agent {name}, which this version of the zoo does not have as zoo/{name}.py",
    )
    return content
