"""Evaluate a trained agent: its deterministic policy on fresh episodes.

    python scripts/evaluate.py runs/MY_RUN
    python scripts/evaluate.py results/ppo/CartPole-v1 --episodes 20 --seed 7
    python scripts/evaluate.py runs/MY_RUN --env HalfCheetah-v5    another task of the same spaces

Loading agent.pt executes no code; only agents of the zoo itself are played.
"""

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

import zoo
from zoo.common.args import require
from zoo.common.cli import script_main
from zoo.common.envs import make_envs
from zoo.common.evaluate import evaluate


@dataclass
class Args:
    run: Annotated[str, tyro.conf.Positional]
    """folder of a finished run or of results/, or an agent.pt"""
    episodes: int = 100
    """episodes to play"""
    seed: int = 0
    """seed of the episodes"""
    env: str | None = None
    """task to play (default: the one the agent was trained on)"""


def play(args: Args) -> None:
    """Print what an agent's episodes come to. Raises UsageError, RunFault."""
    require(args.run != "", "run is empty; a folder is meant")  # Path("") is the current one
    require(args.episodes >= 1, f"--episodes must be at least 1, not {args.episodes}")
    require(0 <= args.seed < 2**31, f"--seed must lie in [0, 2**31), not {args.seed}")
    agent = zoo.load(args.run, args.env)
    import torch  # a second, spared to --help

    torch.set_num_threads(1)  # a second one gains nothing, and beside other programs costs twice the time
    envs = make_envs(agent.env, min(args.episodes, 10))
    returns, lengths = evaluate(agent.acts, envs, args.episodes, args.seed)
    print(f"evaluation: {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episodes")
    line = f"min {returns.min():.2f}, max {returns.max():.2f}, mean length {lengths.mean():.1f} steps"
    print(line, flush=True)


def main() -> int:
    """Evaluate, or tell in one line what is wrong; the exit status."""
    return script_main(Args, __doc__, play)


if __name__ == "__main__":
    sys.exit(main())
