"""The noise schedule of a denoising chain: numbers only. What a network makes of them stands in the agent
files.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.common.errors import UsageError


class Schedule(NamedTuple):
    """A variance-preserving schedule of T steps, each entry (T + 1,), indexed by t; t = 0 is the data.

    q(x_t | x_0) = N(signal_t x_0, noise_t^2), signal_t^2 + noise_t^2 = 1; a sampling step from t to t - 1
    adds noise of standard deviation sigma_t (sigma_0, of no step, is 1).
    """

    signal: Tensor
    noise: Tensor
    sigma: Tensor

    @property
    def steps(self) -> int:
        return len(self.sigma) - 1


def cosine_schedule(
    steps: int,
    eta: float = 1.0,
    min_sigma: float = 0.05,
    max_beta: float = 0.95,
    device: str | torch.device = "cpu",
) -> Schedule:
    """The cosine schedule (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17), with DDIM's sigma
    (arXiv:2010.02502, eq. 16).

    eta = 1 is DDPM's ancestral sampling, eta = 0 has no noise of its own. sigma never falls below
    `min_sigma`: the formula's last is 0, and a step without noise has no density. Raises UsageError where a
    sigma is 0 in spite of it.
    """
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    alpha_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta)
    alpha_bar = torch.cat((torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)))
    before, after = alpha_bar[:-1], alpha_bar[1:]
    sigma = eta * ((1 - before) / (1 - after) * (1 - after / before)).sqrt()
    sigma = sigma.clamp(min=min_sigma)
    if not (sigma > 0).all():
        raise UsageError(
            f"--min-sigma {min_sigma:g}: the last sigma of the schedule would be 0, and such a step has no "
            "density; it must be greater than 0"
        )
    sigma = torch.cat((torch.ones(1, dtype=torch.float64), sigma))
    return Schedule(*(x.float().to(device) for x in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), sigma)))
