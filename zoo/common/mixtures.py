"""Targets of which everything is known, and the exact quantities of a denoising chain on them, on a grid,
without sampling.

A chain x_T ~ N(0, I), x_{t-1} ~ N(mu_t(x_t), sigma_t^2 I) in one or two dimensions is a Markov chain whose
kernels factorise over dimensions, so that its marginals, its KL to a reference chain and the best chain under
a KL penalty are sums over a grid. A Gaussian's sum over points as far apart as its standard deviation is
right to nine digits.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

F64 = torch.float64


class Mixture(NamedTuple):
    """Mixtures of K Gaussians in d dimensions, one for each of C contexts, and a reward of their points."""

    weight: Tensor  # (C, K), rows sum to 1
    mean: Tensor  # (C, K, d)
    std: float  # of every component, in every dimension
    reward: Callable[[Tensor], Tensor]  # (..., d) to (...)
    half_width: float  # of the grid that holds all that a chain on this target can do in earnest

    @property
    def contexts(self) -> int:
        return self.weight.shape[0]

    @property
    def dim(self) -> int:
        return self.mean.shape[-1]

    def sample(self, context: Tensor, generator: torch.Generator) -> Tensor:
        """Points (B, d) of the contexts (B,)."""
        weight, mean = self.weight.to(context.device), self.mean.to(context.device)
        component = torch.multinomial(weight[context], 1, generator=generator).squeeze(-1)
        centre = mean[context, component]
        noise = torch.empty_like(centre).normal_(generator=generator)
        return centre + self.std * noise

    def masses(self, points: Tensor, weights: Tensor, context: int = 0) -> Tensor:
        """The weight (K,) of the points (N, d) nearest to each component of a context; weights (N,)."""
        distance = torch.cdist(points, self.mean[context].to(points))
        nearest = distance.masked_fill(self.weight[context].to(points) == 0, torch.inf).argmin(-1)
        return weights.new_zeros(self.weight.shape[1]).index_add_(0, nearest, weights)


def line() -> Mixture:
    """Two contexts on a line, of three modes and of two (the third has no weight); the reward is x, within
    [-3, 3].
    """
    weight = torch.tensor([[0.5, 0.3, 0.2], [0.7, 0.3, 0.0]])
    mean = torch.tensor([[-1.5, 0.0, 1.5], [-1.0, 1.0, 0.0]]).unsqueeze(-1)
    return Mixture(weight, mean, 0.3, lambda x: x[..., 0].clamp(-3.0, 3.0), 6.0)


def ring() -> Mixture:
    """Eight modes on a circle; the reward is two equal bumps, at two opposite ones."""
    angle = torch.arange(8) * (math.pi / 4)
    mean = 1.5 * torch.stack((angle.cos(), angle.sin()), -1).unsqueeze(0)

    def reward(x: Tensor) -> Tensor:
        distance = torch.minimum((x - mean[0, 0].to(x)).norm(dim=-1), (x - mean[0, 4].to(x)).norm(dim=-1))
        return torch.exp(-0.5 * (distance / 0.4) ** 2)

    return Mixture(torch.full((1, 8), 1 / 8), mean, 0.15, reward, 3.0)


# --- chains on a grid ---------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """Points of a chain's state space: `axis` (g,) is the same in every dimension; points (N, d), N = g^d."""

    axis: Tensor
    points: Tensor

    @property
    def dim(self) -> int:
        return self.points.shape[1]

    @property
    def cell(self) -> float:
        """The volume of a point's cell."""
        return float(self.axis[1] - self.axis[0]) ** self.dim


def make_grid(dim: int, half_width: float, spacing: float) -> Grid:
    """The grid of [-half_width, half_width]^dim; `spacing` at most the chain's least sigma."""
    axis = torch.linspace(-half_width, half_width, 2 * math.ceil(half_width / spacing) + 1, dtype=F64)
    return Grid(axis, torch.cartesian_prod(*[axis] * dim).view(-1, dim))


def _kernels(grid: Grid, mean: Tensor, sigma: Tensor) -> list[Tensor]:
    """The chance (N, g) to go from each point to each place on the axis, one matrix a dimension; mean (N, d).

    Rows are normalised from their logarithms, so that a mean that left the grid comes to lie on its edge.
    """
    return [
        torch.softmax(-0.5 * ((grid.axis - m[:, None]) / sigma) ** 2, -1) for m in mean.to(F64).unbind(-1)
    ]


def _forward(grid: Grid, chance: Tensor, kernels: list[Tensor]) -> Tensor:
    """The distribution (N,) after one step from `chance` (N,)."""
    if grid.dim == 1:
        return chance @ kernels[0]
    return ((chance[:, None] * kernels[0]).T @ kernels[1]).reshape(-1)


def _backward(grid: Grid, value: Tensor, kernels: list[Tensor]) -> Tensor:
    """E[value(x_{t-1}) | x_t] (N,)."""
    if grid.dim == 1:
        return kernels[0] @ value
    size = len(grid.axis)
    return ((kernels[0] @ value.view(size, size)) * kernels[1]).sum(-1)


def start(grid: Grid) -> Tensor:
    """The distribution (N,) of x_T ~ N(0, I)."""
    return torch.softmax(-0.5 * (grid.points**2).sum(-1), 0)


def marginals(grid: Grid, means: Tensor, sigma: Tensor) -> Tensor:
    """The distributions (T + 1, C, N) of x_0 .. x_T; means (T, C, N, d) of the steps 1 .. T at every point,
    sigma (T + 1,).
    """
    chances = [start(grid).expand(means.shape[1], -1)]
    for t in range(len(means), 0, -1):
        rows = [
            _forward(grid, chance, _kernels(grid, mean, sigma[t]))
            for chance, mean in zip(chances[0], means[t - 1], strict=True)
        ]
        chances.insert(0, torch.stack(rows))
    return torch.stack(chances)


def path_kl(chance: Tensor, means: Tensor, ref_means: Tensor, sigma: Tensor) -> Tensor:
    """KL (C,) of a chain to a reference: sum_t E[|mu - mu_ref|^2] / 2 sigma_t^2, S0 (28) summed over t.

    chance: the chain's `marginals`.
    """
    step = ((means - ref_means).to(F64) ** 2).sum(-1) / (2 * sigma[1:, None, None].to(F64) ** 2)
    return (chance[1:] * step).sum((0, 2))


def soft_values(grid: Grid, ref_means: Tensor, sigma: Tensor, reward: Tensor, beta: float) -> Tensor:
    """V_t (T + 1, C, N) of the best chain under E[r] - beta path KL: V_0 = r, V_t = beta log
    E_ref[exp(V_{t-1} / beta)].

    reward (N,) or (C, N). The best objective is E[V_T(x_T)].
    """
    contexts = ref_means.shape[1]
    values = [reward.to(F64).expand(contexts, -1)]
    for t in range(1, len(ref_means) + 1):
        rows = []
        for value, mean in zip(values[-1], ref_means[t - 1], strict=True):
            highest = value.max()
            expected = _backward(grid, ((value - highest) / beta).exp(), _kernels(grid, mean, sigma[t]))
            rows.append(highest + beta * expected.clamp(min=1e-300).log())
        values.append(torch.stack(rows))
    return torch.stack(values)


def best_marginal(grid: Grid, ref_means: Tensor, sigma: Tensor, values: Tensor, beta: float) -> Tensor:
    """The distribution (C, N) of x_0 under the best chain, whose kernels are p_ref exp((V_{t-1} - V_t) /
    beta).
    """
    result = []
    for context in range(ref_means.shape[1]):
        value, chance = values[:, context], start(grid)
        for t in range(len(ref_means), 0, -1):
            moved = _forward(
                grid, chance * (-value[t] / beta).exp(), _kernels(grid, ref_means[t - 1, context], sigma[t])
            )
            chance = moved * (value[t - 1] / beta).exp()
        result.append(chance)
    return torch.stack(result)


class Truth(NamedTuple):
    """What is known of a reference chain and a reward, and does not change while another chain is trained."""

    ref_means: Tensor  # (T, C, N, d)
    reward: Tensor  # (N,)
    reference: Tensor  # (C, N): the distribution of the reference's x_0
    tilt: Tensor  # (C, N): the best distribution of x_0, p_ref exp(r / beta) / Z, S0 (67)
    best: float  # J*, mean over contexts


def make_truth(grid: Grid, ref_means: Tensor, sigma: Tensor, reward: Tensor, beta: float) -> Truth:
    """The exact quantities of a reference chain; reward (N,)."""
    reference = marginals(grid, ref_means, sigma)[0]
    tilt = torch.softmax(reference.clamp(min=1e-300).log() + reward / beta, -1)
    best = soft_values(grid, ref_means, sigma, reward, beta)[-1] @ start(grid)
    return Truth(ref_means, reward.to(F64), reference, tilt, best.mean().item())


def compare(grid: Grid, truth: Truth, means: Tensor, sigma: Tensor, beta: float) -> dict[str, float]:
    """A chain's exact quantities, means over contexts, beside the best ones; means (T, C, N, d).

    objective J = reward - beta path_kl, gap = J* - J, kl_tilt = KL(x_0 to the tilt), tv its total variation,
    and on a line w1, the Wasserstein distance of x_0 to the tilt.
    """
    chance = marginals(grid, means, sigma)
    kl = path_kl(chance, means, truth.ref_means, sigma)
    expected = chance[0] @ truth.reward
    objective = (expected - beta * kl).mean().item()
    tilt = truth.tilt.clamp(min=1e-300)
    to_tilt = torch.special.entr(chance[0]).neg().sum(-1) - (chance[0] * tilt.log()).sum(-1)
    found = {"objective": objective, "best_objective": truth.best, "gap": truth.best - objective}
    found |= {"reward": expected.mean().item(), "reward_tilt": (truth.tilt @ truth.reward).mean().item()}
    found |= {"path_kl": kl.mean().item(), "kl_tilt": to_tilt.mean().item()}
    found["tv"] = 0.5 * (chance[0] - truth.tilt).abs().sum(-1).mean().item()
    if grid.dim == 1:
        found["w1"] = (chance[0] - truth.tilt).cumsum(-1).abs().sum(-1).mean().item() * grid.cell
    return found
