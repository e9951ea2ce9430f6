"""A tabular MDP so small that every trajectory can be written down: policy gradients and variances without
sampling.

States 0 and 1, actions 0 and 1, a softmax policy with one logit a state and action; an episode starts in
either state, terminates by chance and is cut after HORIZON steps. `Env` is the same task for Gymnasium,
observations one-hot.
"""

from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

HORIZON = 3
START = torch.tensor([0.6, 0.4], dtype=torch.float64)
# P[s, a, s'], with s' = 2 the end of the episode
P = torch.tensor(
    [[[0.0, 0.7, 0.3], [0.5, 0.5, 0.0]], [[0.4, 0.0, 0.6], [0.0, 0.8, 0.2]]], dtype=torch.float64
)
REWARD = torch.tensor([[1.0, 3.0], [-2.0, 5.0]], dtype=torch.float64)  # by state and action
THETA = torch.tensor([0.3, -0.4, 0.2, 0.5], dtype=torch.float64)


class Trajectory(NamedTuple):
    states: list[int]  # those acted in
    actions: list[int]
    last: int  # the state after the last action; 2 when the episode terminated there
    chance: float  # the probability of the start and the transitions, which no policy changes


def trajectories() -> list[Trajectory]:
    """Every possible episode."""
    done, open_ = [], [Trajectory([], [], s, START[s].item()) for s in (0, 1)]
    for _ in range(HORIZON):
        grown = [
            Trajectory([*t.states, t.last], [*t.actions, a], s, t.chance * P[t.last, a, s].item())
            for t in open_ for a in (0, 1) for s in (0, 1, 2) if P[t.last, a, s] > 0
        ]  # fmt: skip
        done += [t for t in grown if t.last == 2]
        open_ = [t for t in grown if t.last != 2]
    return done + open_


def log_policy(theta: Tensor) -> Tensor:
    """log pi(a|s), (S, A)."""
    return theta.view(2, 2).log_softmax(-1)


def probabilities(theta: Tensor, episodes: list[Trajectory]) -> Tensor:
    """(M,) how likely the policy makes each episode."""
    log_pi = log_policy(theta)
    return torch.stack([t.chance * log_pi[t.states, t.actions].sum().exp() for t in episodes])


def total(t: Trajectory, gamma: float, tail: Tensor | None = None) -> float:
    """The discounted return; with `tail` (S,) a cut episode gets what tail says its last state is worth."""
    rewards = sum(
        gamma**i * REWARD[s, a].item() for i, (s, a) in enumerate(zip(t.states, t.actions, strict=True))
    )
    return rewards + (
        gamma ** len(t.states) * tail[t.last].item() if tail is not None and t.last != 2 else 0.0
    )


def exact_gradient(gamma: float, tail: Tensor | None = None) -> Tensor:
    """d/d theta of the expected return (4,), by automatic differentiation of the sum over all episodes."""
    theta, episodes = THETA.clone().requires_grad_(), trajectories()
    totals = torch.tensor([total(t, gamma, tail) for t in episodes], dtype=torch.float64)
    return torch.autograd.grad(probabilities(theta, episodes) @ totals, theta)[0]


def score(states: Tensor, actions: Tensor) -> Tensor:
    """grad log pi(a|s) of each row (B, 4), from its formula: 1(a' = a) - pi(a'|s) in the row of s."""
    scores = torch.zeros(len(states), 2, 2, dtype=torch.float64)
    rows = torch.arange(len(states))
    scores[rows, states] = -log_policy(THETA).exp()[states]
    scores[rows, states, actions] += 1.0
    return scores.flatten(1)


def true_value(gamma: float) -> Tensor:
    """V of the two states when no time limit cuts (Bellman's equation solved)."""
    pi = log_policy(THETA).exp()
    step = torch.einsum("sa,sat->st", pi, P[..., :2])
    return torch.linalg.solve(torch.eye(2, dtype=torch.float64) - gamma * step, (pi * REWARD).sum(1))


def true_advantage(gamma: float) -> Tensor:
    """A(s, a) = Q - V, (S, A)."""
    value = true_value(gamma)
    return REWARD + gamma * P[..., :2] @ value - value[:, None]


class Env(gym.Env):
    observation_space = gym.spaces.Box(0.0, 1.0, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def see(self):
        return np.eye(3, 2, dtype=np.float32)[self.state]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(self.np_random.random() > START[0].item())
        return self.see(), {}

    def step(self, action):
        reward = REWARD[self.state, action].item()
        self.state = int(self.np_random.choice(3, p=P[self.state, action].numpy()))
        return self.see(), reward, self.state == 2, False, {}


def register() -> str:
    """The id of `Env` with its time limit."""
    if "tiny/MDP-v0" not in gym.registry:
        gym.register("tiny/MDP-v0", Env, max_episode_steps=HORIZON)
    return "tiny/MDP-v0"
