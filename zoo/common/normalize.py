"""Running normalisation as agent state: one mean and variance for the whole batch, saved with the agent, frozen at evaluation.

Statistics are plain dicts of float64 tensors, changed only between rollouts: a rollout is collected, and its policy's
probabilities are computed, under one and the same normalisation, so that the first ratio of an update is exactly 1.
"""

import torch
from torch import Tensor

Stats = dict[str, Tensor]


def new_stats(*shape: int) -> Stats:
    """Mean 0, variance 1, nothing counted yet."""
    f64 = torch.float64
    return {"mean": torch.zeros(shape, dtype=f64), "var": torch.ones(shape, dtype=f64), "count": torch.zeros((), dtype=f64)}


def update_stats(stats: Stats, batch: Tensor) -> Stats:
    """Merge a batch (B, *shape) into running statistics: Chan et al. (1979), exact for any split into batches."""
    batch = batch.to(torch.float64)
    n = float(len(batch))
    mean, var = batch.mean(0), batch.var(0, unbiased=False)
    count = stats["count"] + n
    delta = mean - stats["mean"]
    squares = stats["var"] * stats["count"] + var * n + delta**2 * stats["count"] * n / count
    return {"mean": stats["mean"] + delta * n / count, "var": squares / count, "count": count}


def normalize(obs: Tensor, stats: Stats) -> Tensor:
    """(obs - mean) / std in float32, clipped to +-10; obs as they are while nothing has been counted."""
    mean, std = stats["mean"].float(), (stats["var"] + 1e-8).sqrt().float()
    bound = torch.where(stats["count"] > 0, 10.0, torch.inf).to(obs.dtype)
    return ((obs - mean) / std).clamp(-bound, bound)


def discounted_sums(reward: Tensor, ended: Tensor, carry: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Running discounted sums of each environment's past rewards, restarted at every episode's end.

    reward, ended (T, N); carry (N,) is the sum before the first row. Returns the sums (T, N) and the next call's carry.
    Rewards are divided by the standard deviation of these sums, which keeps the targets of the critic near unit size; the mean
    is left in, because subtracting it would change what an early termination is worth.
    """
    sums = torch.empty_like(reward)
    for t in range(len(reward)):
        sums[t] = carry = carry * gamma + reward[t]
        carry = carry * ~ended[t]
    return sums, carry
