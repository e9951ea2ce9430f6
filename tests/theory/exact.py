"""What the tests of the theory share: every episode of the tiny MDP laid out as the zoo's estimators read it,
random MDPs, quadrature for Gaussians. Expectations are sums over everything that can happen, so no tolerance
but rounding is needed.
"""

from typing import NamedTuple

import numpy as np
import tiny_mdp
import torch
from torch import Tensor
from torch.func import grad, jacrev

from zoo import reinforce
from zoo.reinforce import Categorical, Episodes

F64 = torch.float64
THETA = tiny_mdp.THETA
ALL = tiny_mdp.trajectories()
HORIZON, COUNT = tiny_mdp.HORIZON, len(ALL)


def close(found: Tensor, expected: Tensor, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    """Equal but for rounding."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    return ((found - expected).norm() / expected.norm()).item()


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


# --- every episode of the tiny MDP, (HORIZON, COUNT), a column each; 99 is paid where the episode is over ---

STATE, ACTION = torch.zeros(2, HORIZON, COUNT, dtype=torch.int64)
NEXT = torch.full((HORIZON, COUNT), 2)  # 2: the end
REWARD = torch.full((HORIZON, COUNT), 99.0, dtype=F64)
ALIVE = torch.zeros(HORIZON, COUNT, dtype=torch.bool)
for i, episode in enumerate(ALL):
    n = len(episode.states)
    STATE[:n, i], ACTION[:n, i] = torch.tensor(episode.states), torch.tensor(episode.actions)
    NEXT[:n, i] = torch.tensor([*episode.states[1:], episode.last])
    REWARD[:n, i] = tiny_mdp.REWARD[episode.states, episode.actions]
    ALIVE[:n, i] = True
CHANCE_OF_NATURE = torch.tensor([t.chance for t in ALL], dtype=F64)  # what no policy changes
STEPS = torch.arange(HORIZON, dtype=F64)[:, None]
TERMINATED, TRUNCATED = NEXT == 2, torch.zeros(HORIZON, COUNT, dtype=torch.bool)
TRUNCATED[-1] = NEXT[-1] != 2


def policy(theta: Tensor, state: Tensor) -> Categorical:
    """The softmax policy with a logit a state and action, as the zoo's distribution."""
    return Categorical(theta.view(2, 2)[state])


def log_probs(theta: Tensor) -> Tensor:
    """log pi(a_t|s_t) of every step (HORIZON, COUNT), 0 where the episode is over."""
    return policy(theta, STATE).log_prob(ACTION) * ALIVE


def chances(theta: Tensor = THETA) -> Tensor:
    """(COUNT,) how likely the policy makes each episode."""
    return CHANCE_OF_NATURE * log_probs(theta).sum(0).exp()


def scores(theta: Tensor = THETA) -> Tensor:
    """grad log pi(a_t|s_t) of every step (HORIZON, COUNT, 4)."""
    return jacrev(log_probs)(theta)


def mean_gradient(weight: Tensor, theta: Tensor = THETA, sampler: Tensor = THETA) -> Tensor:
    """E[sum_t grad log pi_theta(a_t|s_t) weight_t] (4,) over episodes of the policy `sampler`; weight
    (HORIZON, COUNT)."""
    return torch.einsum("n,tnp,tn->p", chances(sampler), scores(theta), weight * ALIVE)


def variance(weight: Tensor) -> Tensor:
    """That of one episode's estimate sum_t grad log pi weight_t, summed over parameters."""
    estimates = torch.einsum("tnp,tn->np", scores(), weight * ALIVE)
    return (chances() @ estimates**2 - (chances() @ estimates) ** 2).sum()


def spread(weight: Tensor) -> float:
    """The same as a number."""
    return variance(weight).item()


def to_go(gamma: float, reward: Tensor = REWARD) -> Tensor:
    """R_t of every step, by the zoo."""
    return reinforce.returns_to_go(reward, ALIVE, torch.zeros(COUNT, dtype=F64), gamma)


def values(gamma: float, theta: Tensor = THETA) -> tuple[Tensor, Tensor]:
    """V_t(s) (HORIZON + 1, 3) and Q_t(s, a) (HORIZON, 2, 2) of the time-limited task, by Bellman's equation
    backwards."""
    pi, v, q = (
        tiny_mdp.log_policy(theta).exp(),
        torch.zeros(HORIZON + 1, 3, dtype=F64),
        torch.zeros(HORIZON, 2, 2, dtype=F64),
    )
    for t in reversed(range(HORIZON)):
        q[t] = tiny_mdp.REWARD + gamma * tiny_mdp.P @ v[t + 1]
        v[t, :2] = (pi * q[t]).sum(1)
    return v, q


def at_steps(table: Tensor) -> Tensor:
    """A table over (t, s) or (t, s, a), read at every step (HORIZON, COUNT)."""
    t = torch.arange(HORIZON)[:, None]
    return table[t, STATE] if table.dim() == 2 else table[t, STATE, ACTION]


def at_successors(table: Tensor) -> Tensor:
    """V_{t+1}(s_{t+1}) of every step (HORIZON, COUNT), from a table (HORIZON + 1, 3)."""
    return table[torch.arange(1, HORIZON + 1)[:, None], NEXT]


def single(i: int) -> Episodes:
    """Episode i alone, as REINFORCE's batch."""
    n = len(ALL[i].states)
    rows = (x[:n, i : i + 1] for x in (STATE, ACTION, REWARD, ALIVE))
    return Episodes(*rows, NEXT[n - 1, i : i + 1], TRUNCATED[n - 1, i : i + 1])


def score_sum(obs: Tensor, action: Tensor, weight: Tensor) -> Tensor:
    """sum_i weight_i grad log pi(a_i|s_i) (4,), by the zoo's loss."""
    return grad(reinforce.score_loss)(
        THETA, obs, action, weight, lambda theta, obs: (policy(theta, obs), None)
    )


# --- random MDPs --------------------------------------------------------------------------------------------


class MDP(NamedTuple):
    """M random tasks: transition (M, S, A, S), reward (M, S, A), start (M, S), gamma (M,)."""

    transition: Tensor
    reward: Tensor
    start: Tensor
    gamma: Tensor

    def value(self, pi: Tensor) -> Tensor:
        """V of policies pi (M, S, A): Bellman's equation solved; (M, S)."""
        return torch.linalg.solve(self.resolvent(pi), (pi * self.reward).sum(-1))

    def resolvent(self, pi: Tensor) -> Tensor:
        """1 - gamma P_pi (M, S, S)."""
        chain = torch.einsum("msa,msat->mst", pi, self.transition)
        return torch.eye(chain.shape[-1], dtype=F64) - self.gamma[:, None, None] * chain

    def q(self, pi: Tensor) -> Tensor:
        """Q (M, S, A)."""
        future = torch.einsum("msat,mt->msa", self.transition, self.value(pi))
        return self.reward + self.gamma[:, None, None] * future

    def visits(self, pi: Tensor) -> Tensor:
        """d(s) = sum_t gamma^t P(s_t = s) (M, S), which sums to 1 / (1 - gamma)."""
        return torch.linalg.solve(self.resolvent(pi).mT, self.start)

    def objective(self, pi: Tensor) -> Tensor:
        """J (M,)."""
        return (self.start * self.value(pi)).sum(-1)


def random_mdps(count: int, states: int = 4, actions: int = 3, seed: int = 0) -> tuple[MDP, torch.Generator]:
    """Tasks with Dirichlet transitions, normal rewards and gamma in [0.5, 0.95]; and the generator to go on
    with."""
    g = torch.Generator().manual_seed(seed)

    def simplex(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=F64).exponential_(generator=g).pow(2)

    transition, start = simplex(count, states, actions, states), simplex(count, states)
    reward = torch.randn(count, states, actions, generator=g, dtype=F64)
    gamma = 0.5 + 0.45 * torch.rand(count, generator=g, dtype=F64)
    return MDP(
        transition / transition.sum(-1, keepdim=True), reward, start / start.sum(-1, keepdim=True), gamma
    ), g


# --- Gaussians ----------------------------------------------------------------------------------------------


def normal_nodes(dims: int = 1, nodes: int = 60) -> tuple[Tensor, Tensor]:
    """Points (n, dims) and weights (n,) with sum_i w_i f(x_i) = E[f(x)], x standard normal: exact for
    polynomials."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    x, w = torch.as_tensor(x, dtype=F64), torch.as_tensor(w / w.sum(), dtype=F64)
    if dims == 1:
        return x[:, None], w
    return torch.cartesian_prod(*[x] * dims), torch.cartesian_prod(*[w] * dims).prod(-1)
