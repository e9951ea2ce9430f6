"""Evaluations: whole episodes of a deterministic policy, in environments of their own."""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np

from zoo.common.args import RunArgs
from zoo.common.envs import VectorEnv, make_envs
from zoo.common.process import say
from zoo.common.seeding import env_seeds

Policy = Callable[[np.ndarray], np.ndarray]  # observations (N, D) to actions (N,) or (N, A), without noise

MAX_EPISODE = 100_000  # steps after which an evaluation episode that has not ended is cut


class Evaluation:
    """What a control agent gives its Run: from what acting needs to the columns eval_return and eval_std.

    make_policy(envs, args, acting) is the agent's. The environments live as long as one evaluation: making
    them costs far less than playing in them, and one that has failed is not used again.
    """

    def __init__(self, args: RunArgs, make_policy: Callable[[VectorEnv, Any, dict], Policy]):
        self.args, self.make_policy = args, make_policy

    def __call__(self, acting: dict) -> dict[str, float]:
        """Play `eval_episodes` episodes. Raises RunFault, as the environments do."""
        args = self.args
        with contextlib.closing(make_envs(args.env, args.eval_episodes, threads=args.env_threads)) as envs:
            returns, _ = evaluate(self.make_policy(envs, args, acting), envs, args.eval_episodes, args.seed)
        return {"eval_return": float(returns.mean()), "eval_std": float(returns.std())}


def evaluate(policy: Policy, envs: VectorEnv, episodes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns and lengths (episodes,) of a deterministic policy, in rounds of `envs.num_envs` episodes.

    Each slot plays exactly one episode a round: taking the first `episodes` to end would favour the short
    ones. Where they begin depends on `seed` alone. Episodes that have not ended after MAX_EPISODE steps are
    cut there, with a warning on stderr.
    """
    returns, lengths, cut = np.zeros(0), np.zeros(0, dtype=np.int64), 0
    while len(returns) < episodes:
        obs = envs.reset(env_seeds(seed, "evaluation", envs.num_envs, len(returns)))
        slots = min(envs.num_envs, episodes - len(returns))
        total, length, running = np.zeros(slots), np.zeros(slots, dtype=np.int64), np.ones(slots, dtype=bool)
        while running.any() and length.max() < MAX_EPISODE:
            step = envs.step(policy(obs))
            obs = step.obs
            total += np.where(running, step.reward[:slots], 0.0)
            length += running
            running &= ~(step.terminated | step.truncated)[:slots]
        cut += int(running.sum())
        returns, lengths = np.concatenate([returns, total]), np.concatenate([lengths, length])
    if cut:
        say(
            f"warning: {envs.env_id}: {cut} of {episodes} evaluation episodes did not end in "
            f"{MAX_EPISODE:,} steps and were cut there; a time limit would end them"
        )
    return returns, lengths
