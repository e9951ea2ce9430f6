"""The entropy of the zoo's policies: item 26."""

import exact
import pytest
import torch
from exact import F64, close
from torch.func import grad

from zoo import actor_critic, ppo, reinforce, trpo

MODULES = pytest.mark.parametrize(
    "module", [reinforce, actor_critic, trpo, ppo], ids=lambda module: module.__name__
)


@MODULES
def test_26_bounds_of_a_discrete_entropy(module):
    """S3 Proposition 11.2: 0 <= H <= log n, log n for the uniform distribution alone, 0 for a deterministic
    one alone."""
    logits = 3 * torch.randn(500, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    found, most = module.Categorical(logits).entropy(), torch.tensor(5.0, dtype=F64).log()
    assert (found > 0).all() and (found < most).all()
    pi = logits.softmax(-1)
    close(found, -(pi * pi.log()).sum(-1))
    close(module.Categorical(torch.full((1, 5), 7.0, dtype=F64)).entropy()[0], most)
    for peak in (10.0, 50.0, 700.0):
        sharp = module.Categorical(torch.tensor([[peak, 0.0, 0.0, 0.0, 0.0]], dtype=F64)).entropy()[0]
        assert 0 <= sharp < 5 * (peak + 1) * torch.tensor(-peak, dtype=F64).exp()
    # the uniform distribution is where the gradient vanishes, and nowhere else does it
    slopes = grad(lambda x: module.Categorical(x).entropy().sum())(logits).norm(dim=1)
    assert slopes.min() > 1e-4
    assert grad(lambda x: module.Categorical(x).entropy().sum())(torch.zeros(1, 5, dtype=F64)).norm() < 1e-12


@MODULES
def test_26_a_gaussians_entropy_has_no_lower_bound(module):
    """S3 Proposition 11.2 is for discrete distributions: a density's entropy -E[log p] falls below 0 as the
    policy narrows."""
    x, w = exact.normal_nodes(2, 20)
    for log_std in (-3.0, -0.5, 1.0):
        dist = module.Gaussian(
            torch.tensor([[0.3, -2.0]], dtype=F64), torch.tensor([log_std, log_std - 0.2], dtype=F64)
        )
        close(dist.entropy()[0], -(w @ dist.log_prob(dist.sample(x))))
    assert module.Gaussian(torch.zeros(1, 2, dtype=F64), torch.tensor([-3.0, -3.0], dtype=F64)).entropy() < 0
