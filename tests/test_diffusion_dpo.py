"""zoo/diffusion_dpo.py: its losses by hand, the pairs, the run, and bad input."""

import dataclasses
import math

import pytest
import torch

from zoo import diffusion_dpo
from zoo.common.device import flatten
from zoo.common.diffusion import cosine_schedule
from zoo.common.errors import UsageError
from zoo.common.mixtures import line
from zoo.diffusion_dpo import Args, Denoiser, Side

SMALL = dict(
    hidden=(32, 32), steps=5, pretrain_steps=100, pretrain_batch=64, num_pairs=256, batch_size=64, draws=2,
    total_steps=1280, eval_every=640, compile=False, progress=False, device="cpu",
)  # fmt: skip


def small(**changes):
    return dataclasses.replace(Args(), **(SMALL | changes))


def model(args):
    """A fresh network's parameters, its mean function and the schedule."""
    schedule = cosine_schedule(args.steps, args.eta, args.min_sigma)
    torch.manual_seed(0)
    net = Denoiser(1, 2, args.steps, args.hidden)
    params, unflatten = flatten(net)
    return params, diffusion_dpo.make_mean(net, unflatten, schedule, args.predict), schedule


def sides():
    """Two steps of winners and losers with sigma 1: log-ratios (0.5, -0.5) and (0, 1.5)."""
    one, zero = torch.ones(2), torch.zeros(2, 1)
    winner = Side(torch.tensor([[1.0], [0.0]]), zero + 1, zero, one)
    loser = Side(torch.tensor([[0.5], [2.0]]), zero + 1, zero, one)
    return winner, loser


def test_the_log_ratios_by_hand():
    winner, loser = sides()
    torch.testing.assert_close(winner.log_ratio(), torch.tensor([0.5, -0.5]))
    torch.testing.assert_close(loser.log_ratio(), torch.tensor([0.0, 1.5]))


def test_the_losses_by_hand():
    winner, loser = sides()

    def softplus(*margins):
        return torch.tensor(sum(math.log1p(math.exp(-m)) for m in margins) / len(margins))

    loss, margin = diffusion_dpo.trajectory_loss(winner.log_ratio()[None], loser.log_ratio()[None], 0.5)
    torch.testing.assert_close(margin, torch.tensor([0.5 * (0.0 - 1.5)]))
    torch.testing.assert_close(loss, softplus(-0.75))
    loss, margin = diffusion_dpo.d3po_loss(winner.log_ratio(), loser.log_ratio(), 0.5, 3)
    torch.testing.assert_close(margin, 1.5 * torch.tensor([0.5, -2.0]))
    torch.testing.assert_close(loss, softplus(0.75, -3.0))
    loss, margin = diffusion_dpo.standard_loss(winner, loser, torch.tensor([1.0, 2.0]), 0.5, 3)
    torch.testing.assert_close(margin, 1.5 * torch.tensor([0.5, -4.0]))
    torch.testing.assert_close(loss, softplus(0.75, -6.0))
    loss, margin = diffusion_dpo.notes35_loss(winner, loser, 0.5)
    torch.testing.assert_close(margin, torch.zeros(2))  # both KLs are 1/2
    torch.testing.assert_close(loss, 0.5 * 0.5 * torch.tensor([0.0 - 0.125, 0.5 - 0.5]).mean())


def test_the_weights_are_the_vlbs():
    schedule = cosine_schedule(6)
    found = diffusion_dpo.vlb_weights(schedule)
    alpha = (schedule.signal[3] / schedule.signal[2]) ** 2
    # Ho et al. 2020, eq. 12: beta^2 / (2 sigma^2 alpha (1 - alpha_bar))
    torch.testing.assert_close(
        found[3], (1 - alpha) ** 2 / (2 * schedule.sigma[3] ** 2 * alpha * schedule.noise[3] ** 2)
    )


def pairs_of(args, count=64):
    params, mean, schedule = model(args)
    generator = torch.Generator().manual_seed(0)
    return diffusion_dpo.make_pairs(mean, params, line(), schedule, count, generator), params, mean, schedule


def test_the_pairs_follow_the_bradley_terry_model():
    args = small(predict="v")
    pairs, *_ = pairs_of(args, 4000)
    reward = line().reward
    won, lost = reward(pairs.winner[:, 0]), reward(pairs.loser[:, 0])
    expected = torch.sigmoid((won - lost).abs()).mean()
    assert (won > lost).float().mean() == pytest.approx(expected.item(), abs=0.02)
    assert pairs.context.tolist()[:4] == [0, 1, 0, 1] and pairs.winner.shape == (4000, 6, 1)


@pytest.mark.parametrize("loss", ["trajectory", "d3po", "standard"])
@pytest.mark.parametrize("weight", ["vlb", "constant"])
def test_at_the_reference_no_pair_is_explained(loss, weight):
    """The margin is 0 and the loss log 2; a step along the gradient explains more of the pairs."""
    args = small(loss=loss, weight=weight, predict="v")
    pairs, params, mean, schedule = pairs_of(args)
    g = torch.Generator().manual_seed(1)
    t = torch.arange(1, 6).expand(64, -1)
    noise = torch.randn(1, 64, 5, 1, generator=g).expand(2, -1, -1, -1)
    weights = torch.ones(6) if weight == "vlb" else 1 / diffusion_dpo.vlb_weights(schedule)
    rest = (params, pairs, t, noise, mean, schedule, weights, args)
    grad, (value, metrics) = torch.func.grad_and_value(diffusion_dpo.pair_loss, has_aux=True)(params, *rest)
    torch.testing.assert_close(value, torch.tensor(math.log(2)))
    assert metrics["margin"] == 0
    after = diffusion_dpo.pair_loss(params - 1e-3 * grad / grad.norm(), *rest)[0]
    assert after < value


@pytest.mark.parametrize("loss", ["trajectory", "d3po", "standard", "notes35"])
def test_runs_and_resumes(loss, tmp_path, capsys):
    """A run of every loss; a resumed one ends where an uninterrupted one does."""
    whole = diffusion_dpo.train(small(loss=loss, run_dir=str(tmp_path / "whole"), total_steps=2560))
    args = small(loss=loss, run_dir=str(tmp_path / "half"), total_steps=2560)
    half = dataclasses.replace(args, total_steps=1280, anneal=False)
    if loss == "standard":  # once is enough
        whole = diffusion_dpo.train(
            dataclasses.replace(args, anneal=False, run_dir=str(tmp_path / "constant"))
        )
        diffusion_dpo.train(half)
        resumed = dataclasses.replace(args, anneal=False, run_dir=None, resume=str(tmp_path / "half"))
        assert diffusion_dpo.train(resumed) == pytest.approx(whole, abs=1e-6)
    assert math.isfinite(whole)
    assert "final evaluation: objective" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(beta=0.0), "--beta must be greater than 0, not 0"),
        (dict(eta=0.0), "--eta 0: steps without noise have no log-probability"),
        (dict(eta=-0.5), r"--eta must lie in \[0, 1\], not -0.5"),
        (dict(min_sigma=0.0), "--min-sigma must be greater than 0, not 0"),
        (dict(batch_size=300), "--batch-size 300 must be at most 256"),
        (dict(env="circle"), "--env circle: no such task"),
    ],
)
def test_bad_input_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        diffusion_dpo.train(small(**changes))
