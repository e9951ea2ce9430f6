"""A zoo of single-file reinforcement-learning agents; see README.md.

agent = zoo.load("runs/MY_RUN")
action = agent.policy(obs)      # obs as Gymnasium's environment gave it, the action as its step takes it
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.common.agent import Agent

__all__ = ["load"]


def load(path: str | os.PathLike[str], env: str | None = None) -> "Agent":
    """The trained agent of a run's folder, of a folder of results/ or of an agent.pt. Executes no code of it.

    env: another task to act in, with the same observations and actions.
    Raises UsageError: no agent there, of another version of the zoo, or one that does not fit the task.
    """
    from zoo.common.agent import load_agent  # a second, spared to those who import an agent's file only

    return load_agent(path, env)
