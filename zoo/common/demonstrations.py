"""Data sets of actions to be imitated: a trained agent of the zoo plays them, or Minari has them on disk.

--data runs/MY_RUN       the folder of a run or of results: its agent plays, without noise
--data minari:ID         a data set of Minari (minari.farama.org) that `minari download` has fetched
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from zoo.common.agent import Agent, load_agent
from zoo.common.args import require
from zoo.common.envs import VectorEnv, make_envs
from zoo.common.errors import UsageError
from zoo.common.seeding import env_seeds

MINARI = "minari:"


class Episode(NamedTuple):
    """L steps of an episode, or as many of it as were recorded; actions in the policy's scale, within
    bounds.
    """

    obs: np.ndarray  # (L, D)
    action: np.ndarray  # (L, A)
    reward: np.ndarray  # (L,)
    whole: bool  # it ran to its end


def open_demonstrations(data: str, envs: VectorEnv) -> Callable[[int, int], list[Episode]]:
    """What gives the episodes of `data`, (steps, seed) of them; `envs`: of the task.

    Raises UsageError: no such data set, one of another task, or Minari is missing.
    """
    if data.startswith(MINARI):
        return _minari(data, envs)
    try:
        agent = load_agent(data)
    except UsageError as error:
        raise UsageError(str(error).replace("run ", "--data ", 1)) from error
    require(
        agent.env == envs.env_id,
        f"--data {data}: is of another task, its agent was trained on {agent.env}, and --env is "
        f"{envs.env_id}",
    )
    return lambda steps, seed: _played(agent, steps, seed)


def _played(agent: Agent, steps: int, seed: int, num_envs: int = 10) -> list[Episode]:
    """At least `steps` steps of the agent in `num_envs` environments; the last episodes are cut."""
    with make_envs(agent.env, num_envs, threads=1) as envs:
        obs, rows = envs.reset(env_seeds(seed, "demonstrations", num_envs)), []
        for _ in range(-(-steps // num_envs)):
            action = agent.acts(obs)
            step = envs.step(action)
            rows.append((obs, as_policy(envs, action), step.reward, step.terminated | step.truncated))
            obs = step.obs
    columns = [np.stack(column, 1) for column in zip(*rows, strict=True)]  # (E, T, ...)
    episodes = []
    for seen, action, reward, ended in zip(*columns, strict=True):
        cuts = np.flatnonzero(ended) + 1
        for i, (start, stop) in enumerate(pairwise((0, *cuts, len(ended)))):
            if start < stop:
                piece = slice(start, stop)
                episodes.append(Episode(seen[piece], action[piece], reward[piece], i < len(cuts)))
    return episodes


def _minari(data: str, envs: VectorEnv) -> Callable[[int, int], list[Episode]]:
    name = data.removeprefix(MINARI)
    try:
        import minari
    except ImportError:
        raise UsageError(f"--data {data} needs Minari: pip install -e '.[minari]'") from None
    try:
        found = minari.load_dataset(name)
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise UsageError(
            f"--data {data}: no such data set on this disk; minari download {name} fetches it"
        ) from error
    recorded = getattr(found.spec.env_spec, "id", None)
    require(
        recorded == envs.env_id,
        f"--data {data}: is of another task, it was recorded on {recorded}, and --env is {envs.env_id}",
    )

    def episodes(steps: int, seed: int) -> list[Episode]:
        result, count = [], 0
        for one in found.iterate_episodes():
            length = len(one.actions)
            obs = np.asarray(one.observations)[:length].reshape(length, -1).astype(envs.dtype)
            action = to_policy(envs, np.asarray(one.actions).reshape(length, -1))
            whole = bool(one.terminations[-1] or one.truncations[-1])
            result.append(Episode(obs, action, np.asarray(one.rewards), whole))
            count += length
            if count >= steps:
                break
        return result

    return episodes


def to_policy(envs: VectorEnv, action: np.ndarray) -> np.ndarray:
    """From the environment's scale to the policy's, (..., A): the inverse of `VectorEnv.to_env_action`."""
    # where both bounds are one number any action is that number
    return (action - envs.action_shift) / np.where(envs.action_scale == 0, 1.0, envs.action_scale)


def as_policy(envs: VectorEnv, action: np.ndarray) -> np.ndarray:
    """Actions in the policy's scale as they come to be played: within the bounds."""
    return to_policy(envs, envs.to_env_action(action))


def windows(episodes: list[Episode], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Observations (M, D) and the `length` actions from each on (M, length x A), float32 actions.

    None runs past the end of its episode. Raises UsageError where no episode is that long or a number is not
    finite.
    """
    obs, action = [], []
    for episode in episodes:
        starts = np.arange(len(episode.obs) - length + 1)
        if len(starts):
            obs.append(episode.obs[starts])
            action.append(episode.action[starts[:, None] + np.arange(length)].reshape(len(starts), -1))
    longest = max(len(episode.obs) for episode in episodes)
    require(bool(obs), f"--chunk {length}: the longest episode of the data has {longest} steps")
    seen, done = np.concatenate(obs), np.concatenate(action).astype(np.float32)
    fine = np.isfinite(seen).all() and np.isfinite(done).all()
    require(bool(fine), "--data: holds numbers that are not finite")
    return seen, done


def mean_return(episodes: list[Episode]) -> float | None:
    """Of the episodes that ran to their end; None where none did."""
    returns = [float(episode.reward.sum()) for episode in episodes if episode.whole]
    return sum(returns) / len(returns) if returns else None
