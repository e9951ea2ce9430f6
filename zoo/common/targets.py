"""The tasks of the diffusion agents by name, and how well a chain does on them."""

import difflib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from zoo.common import digits, mixtures
from zoo.common.diffusion import Schedule
from zoo.common.errors import UsageError


class Target(Protocol):
    """Data with a reward: what the agents know of a task."""

    @property
    def contexts(self) -> int: ...

    @property
    def dim(self) -> int: ...

    @property
    def reward(self) -> Callable[[Tensor], Tensor]: ...  # (..., d) to (...)

    def sample(self, context: Tensor, generator: torch.Generator) -> Tensor: ...  # (B,) to (B, d)


TARGETS: dict[str, Callable[[], Any]] = {"line": mixtures.line, "ring": mixtures.ring, "digits": digits.load}

# params, x (B, d), t (B,), context (B,) to mu (B, d)
Mean = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def make_target(name: str) -> Any:
    """The task of that name. Raises UsageError: no such task, or what it needs is not installed."""
    if name not in TARGETS:
        near = difflib.get_close_matches(name, TARGETS, 1, 0.0)[0]
        raise UsageError(f"--env {name}: no such task; there are {', '.join(TARGETS)} (nearest: {near})")
    return TARGETS[name]()


def chain_means(mean: Mean, params: Tensor, points: Tensor, steps: int, contexts: int) -> Tensor:
    """mu_t (T, C, N, d) at the same points (N, d) for every step and context."""
    rows = []
    for t in range(1, steps + 1):
        for context in range(contexts):
            index = torch.full((len(points),), context, device=points.device)
            rows.append(mean(params, points, torch.full_like(index, t), index).cpu())
    return torch.stack(rows).view(steps, contexts, *points.shape)


class Exact:
    """Evaluations on a mixture: the exact quantities of `mixtures.compare`, nothing sampled."""

    def __init__(self, target: mixtures.Mixture, schedule: Schedule, beta: float, mean: Mean):
        self.target, self.beta, self.mean, self.steps = target, beta, mean, schedule.steps
        self.sigma = schedule.sigma.cpu()
        least = self.sigma.min().item()
        across = 2 * target.half_width / least
        if across ** (target.dim + 1) > 3e8:  # 2.4 GB a matrix of chances
            told = f"the grid of the exact evaluation would have {across**target.dim:.1e} points"
            raise UsageError(
                f"--min-sigma, --eta: the least noise of a step is {least:.2g}, with which {told}"
            )
        self.grid = mixtures.make_grid(target.dim, target.half_width, least)
        self.truth: mixtures.Truth | None = None

    def means(self, params: Tensor) -> Tensor:
        """mu_t (T, C, N, d) on the grid."""
        points = self.grid.points.to(params)
        return chain_means(self.mean, params, points, self.steps, self.target.contexts)

    def __call__(self, acting: dict) -> dict[str, float]:
        """The columns of an evaluation; acting: params and reference, flat vectors."""
        if self.truth is None:
            reward = self.target.reward(self.grid.points)
            self.truth = mixtures.make_truth(
                self.grid, self.means(acting["reference"]), self.sigma, reward, self.beta
            )
        found = mixtures.compare(self.grid, self.truth, self.means(acting["params"]), self.sigma, self.beta)
        return {f"eval_{name}": value for name, value in found.items()}


class Sampled:
    """Evaluations on the digits: of the same 500 noises every time."""

    def __init__(self, target: digits.Digits, schedule: Schedule, sample: Callable[..., tuple], mean: Mean):
        self.target, self.sample, self.mean, self.sigma = target, sample, mean, schedule.sigma
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(schedule.steps + 1, 500, target.dim, generator=generator)

    def __call__(self, acting: dict) -> dict[str, float]:
        """The columns of an evaluation; acting: params and reference, flat vectors."""
        params, noise = acting["params"], self.noise.to(acting["params"].device)
        context = torch.zeros(noise.shape[1], dtype=torch.int64, device=noise.device)
        states, means = self.sample(params, noise, context, self.sigma)
        kl = 0.0
        for t in range(1, len(noise)):
            ref_mean = self.mean(acting["reference"], states[t], torch.full_like(context, t), context)
            kl += ((means[t - 1] - ref_mean) ** 2).sum(-1).mean().item() / (2 * self.sigma[t].item() ** 2)
        found = self.target.judge(states[0].cpu()) | {"path_kl": kl}
        return {f"eval_{name}": value for name, value in found.items()}


def make_evaluation(
    target: Any, schedule: Schedule, beta: float, mean: Mean, sample: Callable[..., tuple]
) -> Exact | Sampled:
    """What the Run calls when an evaluation is due."""
    if isinstance(target, mixtures.Mixture):
        return Exact(target, schedule, beta, mean)
    return Sampled(target, schedule, sample, mean)
