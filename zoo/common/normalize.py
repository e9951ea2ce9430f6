"""Running normalisation as agent state: one mean and variance for the whole batch, saved with the agent,
frozen at evaluation.

Statistics are plain dicts of float64 tensors, changed only between rollouts: a rollout is collected, and its
policy's probabilities are computed, under one and the same normalisation, so that the first ratio of an
update is exactly 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Stats = dict[str, Tensor]


def new_stats(*shape: int, device: torch.device | None = None) -> Stats:
    """Mean 0, variance 1, nothing counted yet."""
    zeros = torch.zeros(shape, dtype=torch.float64, device=device)
    return {"mean": zeros, "var": torch.ones_like(zeros), "count": torch.zeros_like(zeros.sum())}


def update_stats(stats: Stats, batch: Tensor) -> Stats:
    """Merge a batch (B, *shape) into running statistics (Chan et al. 1979), exact however it is split."""
    batch = batch.to(torch.float64)
    n = float(len(batch))
    mean, var = batch.mean(0), batch.var(0, unbiased=False)
    count = stats["count"] + n
    delta = mean - stats["mean"]
    squares = stats["var"] * stats["count"] + var * n + delta**2 * stats["count"] * n / count
    return {"mean": stats["mean"] + delta * n / count, "var": squares / count, "count": count}


def normalizer(stats: Stats) -> Callable[[Tensor], Tensor]:
    """The function obs -> (obs - mean) / std, clipped to +-10, in float32; obs as they are while nothing has
    been counted.

    The difference is taken in float64: of observations such as 1e8 and 1e8 + 1 float32 would leave nothing to
    subtract.
    """
    mean, std = stats["mean"], (stats["var"] + 1e-8).sqrt()
    high = torch.where(stats["count"] > 0, 10.0, torch.inf).to(mean)
    low = -high
    return lambda obs: ((obs - mean) / std).clamp(low, high).float()


def normalize(obs: Tensor, stats: Stats) -> Tensor:
    """`normalizer(stats)` of observations (..., D)."""
    return normalizer(stats)(obs)


def return_scale(stats: Stats) -> Tensor:
    """The standard deviation of what was counted, (), in float32; 1 where all of it has been equal up to
    rounding.

    Returns that do not differ have no scale of their own, and to divide by next to nothing would only blow up
    the rounding.
    """
    spread = stats["var"] > 1e-12 * stats["mean"] ** 2
    return torch.where(spread, stats["var"], 1.0).sqrt().float()


def discounted_sums(reward: Tensor, ended: Tensor, carry: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Running discounted sums of each environment's past rewards, restarted at every episode's end.

    reward, ended (T, N); carry (N,) is the sum before the first row. Returns the sums (T, N) and the next
    call's carry. Rewards are divided by the standard deviation of these sums, which keeps the targets of the
    critic near unit size; the mean is left in, because subtracting it would change what an early termination
    is worth.
    """
    sums = []
    for reward_t, ended_t in zip(reward.unbind(), ended.unbind(), strict=True):
        sums.append(carry * gamma + reward_t)
        carry = sums[-1] * ~ended_t
    return torch.stack(sums), carry
