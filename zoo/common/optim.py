"""Optimiser steps as pure functions on one flat parameter vector, to be compiled into an agent's update.

torch.optim changes parameters in place, one tensor at a time; inside a compiled pure function the same
formulas on one vector cost a few microseconds. tests/test_optim.py holds them to torch.optim's numbers.
"""

import torch
from torch import Tensor

Moments = dict[str, Tensor]


def new_adam(params: Tensor) -> Moments:
    """Adam's state at the start: moments m and v (P,), step t and the decays' powers 0.9^t, 0.999^t ()."""
    one = torch.ones((), device=params.device)
    return {
        "m": torch.zeros_like(params),
        "v": torch.zeros_like(params),
        "t": 0 * one,
        "decay_m": one,
        "decay_v": one.clone(),
    }


def adam(
    params: Tensor, grad: Tensor, opt: Moments, learning_rate: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Moments]:
    """One step of Adam (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1): the new parameters (P,) and state.

    eps is the 1e-5 of the policy-gradient codes since OpenAI's baselines, not the paper's 1e-8. The powers
    are running products, because compiled code would raise 0.9 and 0.999 to t once for every 8 parameters.
    """
    m = 0.9 * opt["m"] + 0.1 * grad
    v = 0.999 * opt["v"] + 0.001 * grad**2
    decay_m, decay_v = 0.9 * opt["decay_m"], 0.999 * opt["decay_v"]
    step = (m / (1 - decay_m)) / ((v / (1 - decay_v)).sqrt() + eps)
    return params - learning_rate * step, {
        "m": m,
        "v": v,
        "t": opt["t"] + 1,
        "decay_m": decay_m,
        "decay_v": decay_v,
    }


def new_rmsprop(params: Tensor) -> Moments:
    """RMSprop's state at the start: the running mean square v (P,)."""
    return {"v": torch.zeros_like(params)}


def rmsprop(
    params: Tensor, grad: Tensor, opt: Moments, learning_rate: Tensor, alpha: float = 0.99, eps: float = 1e-5
) -> tuple[Tensor, Moments]:
    """One step of RMSprop as torch.optim has it, eps outside the root: the new parameters (P,) and state."""
    v = alpha * opt["v"] + (1 - alpha) * grad**2
    return params - learning_rate * grad / (v.sqrt() + eps), {"v": v}


def clip_grad(grad: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """The gradient (P,) scaled down to a norm of at most max_norm, and its norm before."""
    norm = grad.norm()
    return grad * (max_norm / (norm + 1e-6)).clamp(max=1.0), norm
