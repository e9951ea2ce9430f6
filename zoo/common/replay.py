"""The replay buffer: the last transitions of all environments, in preallocated arrays on the agent's device.

float32; what follows an observation is the next row, so that it stands there once. A million transitions of
HalfCheetah take 100 MB.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoo.common.envs import Step
from zoo.common.errors import UsageError


class Replayed(NamedTuple):
    """Transitions drawn from the buffer, (B, ...) each; next_obs is the true successor."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    terminated: Tensor


RING = ("obs", "action", "reward", "terminated", "ending")  # the ring's columns


class ReplayBuffer:
    """The last `slots` steps of N environments, in a ring of rows.

    The successor of row t is the observation of row t + 1: stored once. Where an episode ended it is not, and
    the true one is kept in a second, growing ring; `ending` (slots + 1, N) holds its running number there, -1
    elsewhere. One row more than slots, because the newest step already has its successor in the row that
    comes next.
    Raises UsageError where there is no memory for it.
    """

    def __init__(self, slots: int, num_envs: int, obs_dim: int, action_dim: int, device: torch.device):
        def zeros(*shape: int, dtype: type = np.float32) -> Tensor:
            # NumPy's take no memory until written to, torch's do
            return torch.from_numpy(np.zeros(shape, dtype)).to(device)

        try:
            self.obs = zeros(slots + 1, num_envs, obs_dim)
            self.action = zeros(slots + 1, num_envs, action_dim)
            self.reward = zeros(slots + 1, num_envs)
            self.terminated = zeros(slots + 1, num_envs, dtype=np.bool_)
            self.ending = zeros(slots + 1, num_envs, dtype=np.int32)
            self.final_obs = zeros(num_envs, obs_dim)
        except (
            MemoryError,
            ValueError,
            RuntimeError,
        ) as error:  # of NumPy, of a size no address has, of CUDA
            raise UsageError(
                f"--buffer-size: {slots * num_envs} transitions do not fit into {device}'s memory"
            ) from error
        self.head = self.size = 0  # the row to be written next; rows filled
        self.endings = [0, 0]  # numbers of the oldest ending that is kept and of the next one

    def add(self, obs: np.ndarray, action: Tensor, step: Step) -> None:
        """Store a step of all environments: what was acted on, the action, and what came of it."""
        row, rows = self.head, len(self.obs)
        if self.size == rows - 1:  # the oldest row's observation makes room for the newest successor
            self.size -= 1
            self.endings[0] += int((self.ending[(row + 1) % rows] >= 0).sum())
        self.obs[row] = torch.as_tensor(obs)
        self.action[row] = action
        self.reward[row] = torch.as_tensor(step.reward)
        self.terminated[row] = torch.as_tensor(step.terminated)
        self.ending[row] = -1
        self.head, self.size = (row + 1) % rows, self.size + 1
        self.obs[self.head] = torch.as_tensor(step.next_obs)
        if step.episodes:
            self._end(torch.as_tensor(step.terminated | step.truncated))

    def cut(self) -> None:
        """Let the newest step end its episodes, because all environments start anew (a run was resumed)."""
        if self.size:
            self._end(self.ending[self.head - 1].cpu() < 0)

    def _end(self, ended: Tensor) -> None:
        """Keep the successors of the newest step apart, those of the environments of a mask (N,)."""
        oldest, first = self.endings
        new = torch.arange(first, first + int(ended.sum()))
        if first + len(new) - oldest > len(self.final_obs):
            kept, old = torch.arange(oldest, first), self.final_obs
            self.final_obs = torch.zeros(2 * len(old), old.shape[1], device=old.device)
            self.final_obs[kept % len(self.final_obs)] = old[kept % len(old)]
        self.final_obs[new % len(self.final_obs)] = self.obs[self.head, ended]
        self.ending[self.head - 1, ended] = new.to(self.ending)
        self.endings[1] += len(new)

    def sample(self, count: int, generator: torch.Generator) -> Replayed:
        """`count` stored transitions, uniformly with replacement."""
        rows, num_envs = self.reward.shape
        drawn = torch.randint(self.size * num_envs, (count,), generator=generator, device=self.obs.device)
        here = (drawn + (self.head - self.size) * num_envs) % (rows * num_envs)
        obs, action, reward, terminated, ending = (getattr(self, name).flatten(0, 1) for name in RING)
        number = ending[here]
        final, successor = self.final_obs[number % len(self.final_obs)], obs[(here + num_envs) % len(obs)]
        next_obs = torch.where((number >= 0).unsqueeze(-1), final, successor)
        return Replayed(obs[here], action[here], reward[here], next_obs, terminated[here])

    def state(self) -> dict:
        """Everything in it, for a checkpoint: the rows written so far, without copying."""
        rows = len(self.obs)
        used = self.size + 1 if self.head == self.size else rows
        arrays = {name: getattr(self, name)[:used] for name in RING}
        numbers = {"rows": rows, "head": self.head, "size": self.size, "endings": list(self.endings)}
        return arrays | {"final_obs": self.final_obs} | numbers

    def restore(self, state: dict) -> None:
        """Take over what `state` gave. Raises UsageError where the buffer has another size."""
        ours, theirs = tuple(self.reward.shape), (state["rows"], state["reward"].shape[1])
        if ours != theirs:
            raise UsageError(
                f"--buffer-size, --num-envs: {ours[0] - 1} steps of {ours[1]} environments do not fit the "
                f"checkpoint's replay buffer of {theirs[0] - 1} steps of {theirs[1]}; resume without these "
                "arguments"
            )
        for name in RING:
            getattr(self, name)[: len(state[name])] = state[name]
        self.final_obs = state["final_obs"].to(self.obs.device)
        self.head, self.size, self.endings = state["head"], state["size"], list(state["endings"])
