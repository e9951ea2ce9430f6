"""Evaluate a trained agent: its deterministic policy on fresh episodes.

    python scripts/evaluate.py runs/MY_RUN
    python scripts/evaluate.py results/ppo/HalfCheetah-v4          the agent of the median seed
    python scripts/evaluate.py agent.pt --episodes 20 --seed 7
    python scripts/evaluate.py runs/MY_RUN --env HalfCheetah-v5    a task of the same observations and actions

Loading agent.pt executes no code; only agents of the zoo itself are played.
"""

import dataclasses
import importlib
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from zoo.common.args import require
from zoo.common.envs import VectorEnv, make_envs
from zoo.common.errors import RunFault, UsageError
from zoo.common.evaluate import Policy, evaluate
from zoo.common.files import load_checkpoint


@dataclass
class Args:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of a finished run or of results, or an agent.pt"""
    episodes: int = 100
    """episodes to play"""
    seed: int = 0
    """seed of the episodes"""
    env: str | None = None
    """task to play (default: the one the agent was trained on)"""


def load_agent(path: Path) -> dict[str, Any]:
    """What an agent.pt, or that of a run's folder, holds. Raises UsageError."""
    file = path / "agent.pt" if path.is_dir() else path
    require(path.exists(), f"run {path}: no such file or folder")
    require(
        not (path.is_dir() and (path / "checkpoint.pt").exists() and not file.exists()),
        f"{path}: the run is not finished and has no agent.pt yet; go on with it by --resume {path}",
    )
    require(
        not (path.is_dir() and (path / "meta.json").exists() and not file.exists()),
        f"run {path}: these results hold no agent.pt; scripts/benchmark.py keeps that of the median seed",
    )
    content = load_checkpoint(file, "run")
    # The name comes from a file that anyone may have made: import nothing but an agent's file of the zoo.
    name = content["agent"]
    known = (
        isinstance(name, str) and re.fullmatch(r"[a-z]\w*", name) and importlib.util.find_spec(f"zoo.{name}")
    )
    require(bool(known), f"run {path}: is of agent {name}, which this version of the zoo does not have")
    return content


def make_policy(content: dict[str, Any], envs: VectorEnv) -> Policy:
    """The policy of an agent.pt's content for `envs`. Raises UsageError where it does not fit."""
    name, env_id = content["agent"], content["env"]
    agent = importlib.import_module(f"zoo.{name}")
    require(hasattr(agent, "make_policy"), f"zoo/{name}.py has no make_policy: it is no agent")
    fields = {field.name for field in dataclasses.fields(agent.Args)}
    args = agent.Args(**{key: value for key, value in content["args"].items() if key in fields})
    args.hidden = tuple(args.hidden)
    misfit = (
        f"--env {envs.env_id}: its observations or actions are not those of {env_id}, "
        "on which the agent was trained"
    )
    try:
        return agent.make_policy(envs, args, content["state"])
    except KeyError as error:
        raise UsageError(f"agent.pt lacks {error}, which zoo/{name}.py needs to act") from error
    except (RuntimeError, ValueError, IndexError) as error:
        raise UsageError(misfit) from error


def main() -> int:
    """Evaluate, or tell in one line what is wrong; the exit status."""
    args = tyro.cli(Args, description=__doc__)
    try:
        require(args.episodes >= 1, f"--episodes must be at least 1, not {args.episodes}")
        require(0 <= args.seed < 2**31, f"--seed must lie in [0, 2**31), not {args.seed}")
        content = load_agent(args.run)
        envs = make_envs(args.env or content["env"], min(args.episodes, 10))
        returns, lengths = evaluate(make_policy(content, envs), envs, args.episodes, args.seed)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunFault as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"evaluation: {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episodes")
    print(f"min {returns.min():.2f}, max {returns.max():.2f}, mean length {lengths.mean():.1f} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
