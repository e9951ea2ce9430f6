"""The pure optimiser steps against torch.optim's and torch.nn.utils's numbers."""

import pytest
import torch

from zoo.common.optim import adam, clip_grad, new_adam


def test_adam_equals_torchs():
    rng = torch.Generator().manual_seed(0)
    ours = torch.randn(40, generator=rng)
    theirs = ours.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=1.0, eps=1e-5)
    opt, scale = new_adam(ours), torch.logspace(-7, 3, 40)  # small gradients, too, where eps decides
    for i in range(50):
        grad = scale * torch.randn(40, generator=rng)
        learning_rate = 0.01 * (1 - i / 60)  # annealed, as PPO does
        before = ours.clone()
        ours, opt = adam(ours, grad, opt, torch.tensor(learning_rate))
        assert not torch.equal(before, ours)
        optimizer.param_groups[0]["lr"] = learning_rate
        theirs.grad = grad.clone()
        optimizer.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=2e-6)
    assert opt["t"] == 50


def test_adams_eps_is_an_argument():
    grad = torch.tensor([1e-4])
    step = {
        eps: -adam(torch.zeros(1), grad, new_adam(grad), torch.tensor(1.0), eps)[0].item()
        for eps in (1e-5, 1e-4)
    }
    # the first step: m / (1 - 0.9) = g and sqrt(v / (1 - 0.999)) = |g|
    assert step[1e-5] == pytest.approx(1e-4 / (1e-4 + 1e-5), rel=1e-4)
    assert step[1e-4] == pytest.approx(0.5, rel=1e-4)


def test_adam_does_not_change_its_arguments():
    params, grad = torch.ones(3), torch.ones(3)
    opt = new_adam(params)
    adam(params, grad, opt, torch.tensor(0.1))
    assert torch.equal(params, torch.ones(3)) and torch.equal(opt["m"], torch.zeros(3)) and opt["t"] == 0


@pytest.mark.parametrize("size", [1e-3, 0.4, 0.6, 100.0])
def test_clip_grad_equals_torchs(size):
    grad = torch.randn(50, generator=torch.Generator().manual_seed(1))
    grad *= size / grad.norm()
    leaf = torch.zeros(50, requires_grad=True)
    leaf.grad = grad.clone()
    expected_norm = torch.nn.utils.clip_grad_norm_([leaf], 0.5)
    ours, norm = clip_grad(grad, 0.5)
    torch.testing.assert_close(ours, leaf.grad, rtol=1e-6, atol=0)
    torch.testing.assert_close(norm, expected_norm, rtol=1e-6, atol=0)
    assert norm.item() == pytest.approx(size, rel=1e-5)
    assert ours.norm().item() == pytest.approx(min(size, 0.5), rel=1e-5)


def test_clip_grad_of_zero_is_zero():
    assert torch.equal(clip_grad(torch.zeros(4), 0.5)[0], torch.zeros(4))
