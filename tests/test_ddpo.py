"""zoo/ddpo.py: its pure functions by hand, the run, and bad input."""

import dataclasses

import command
import pytest
import torch
from torch.func import grad_and_value

from zoo import ddpo
from zoo.common.device import flatten
from zoo.common.diffusion import cosine_schedule
from zoo.common.errors import RunFault, UsageError
from zoo.common.mixtures import line
from zoo.common.targets import Exact, make_target
from zoo.ddpo import Args, Denoiser, Denoising

SMALL = dict(
    hidden=(32, 32), steps=5, pretrain_steps=200, pretrain_batch=64, num_chains=64, minibatch_size=160,
    compile=False, progress=False, device="cpu",
)  # fmt: skip


def small(**changes):
    return dataclasses.replace(Args(), **(SMALL | changes))


def model(args, target=None):
    """A fresh network's parameters, its mean function and the schedule."""
    target = target or line()
    schedule = cosine_schedule(args.steps, args.eta, args.min_sigma)
    torch.manual_seed(0)
    net = Denoiser(target.dim, target.contexts, args.steps, args.hidden)
    params, unflatten = flatten(net)
    return params, ddpo.make_mean(net, unflatten, schedule, args.predict), schedule, net, unflatten


def test_the_returns_by_hand():
    """Two contexts, two chains each, three steps; the KL of later steps is that of lower rows."""
    reward = torch.tensor([1.0, 5.0, 3.0, 9.0])
    context = torch.tensor([0, 1, 0, 1])
    kl = torch.tensor([[1.0, 0, 3, 0], [2.0, 0, 2, 0], [7.0, 0, 9, 0]])
    log_ratio = torch.tensor([[0.5, 0, 0.1, 0], [0.0, 1, 0, 3], [0.0, 0, 0, 0]])
    none = ddpo.chain_advantages(reward, kl, log_ratio, context, "none", 2.0)
    torch.testing.assert_close(none, torch.tensor([-2.0, -4, 2, 4]).expand(3, 4))  # less the other chain's
    torch.testing.assert_close(ddpo.chain_advantages(reward, kl, log_ratio, context, "loss", 2.0), none)
    found = ddpo.chain_advantages(reward, kl, log_ratio, context, "return", 2.0)
    first, later = [1.0, -1, -5], [3.0, -3, -7]  # of chains 0 and 2: r - 2 (0, kl_1, kl_1 + kl_2)
    torch.testing.assert_close(found[:, 0], torch.tensor(first) - torch.tensor(later))
    torch.testing.assert_close(found[:, 1], torch.full((3,), -4.0))
    found = ddpo.chain_advantages(reward, kl, log_ratio, context, "log-ratio", 2.0)
    torch.testing.assert_close(found[:, 0], torch.tensor([0.0, 1, 1]) - torch.tensor([2.8, 3, 3]))
    torch.testing.assert_close(found[:, 1], torch.tensor([5.0, 3, 5]) - torch.tensor([9.0, 3, 9]))


def batch_of(args, params, mean, schedule, count=64):
    """Chains of `params` with random advantages, against a reference that is not far."""
    noise = torch.randn(args.steps + 1, count, 1, generator=torch.Generator().manual_seed(0))
    context = torch.arange(count) % 2
    states, means = ddpo.sample_chain(mean, params, noise, context, schedule.sigma)
    t = torch.arange(1, args.steps + 1)[:, None].expand(-1, count)
    log_prob = ddpo.step_log_prob(states[:-1], means, schedule.sigma[t], args.reduce)
    advantage = torch.randn(args.steps, count, generator=torch.Generator().manual_seed(1))
    rows = (states[1:], states[:-1], t, context.expand_as(t), log_prob, means + 0.1, advantage)
    return Denoising(*(x.flatten(0, 1) for x in rows)), states, means, noise


def test_a_chain_is_its_means_and_noises():
    args = small()
    params, mean, schedule, *_ = model(args)
    batch, states, means, noise = batch_of(args, params, mean, schedule)
    torch.testing.assert_close(states[-1], noise[-1])
    for t in range(1, args.steps + 1):
        torch.testing.assert_close(states[t - 1], means[t - 1] + schedule.sigma[t] * noise[t - 1])
    torch.testing.assert_close(mean(params, batch.x, batch.t, batch.context).view_as(means), means)


def test_at_the_sampling_policy_all_losses_have_one_gradient():
    params, mean, schedule, *_ = model(small())
    batch = batch_of(small(), params, mean, schedule)[0]
    found = []
    for method, clip in (("score", None), ("is", None), ("is", 0.1)):
        args = small(method=method, clip=clip, kl="none")
        grad, (_, metrics) = grad_and_value(ddpo.ddpo_loss, has_aux=True)(
            params, batch, mean, schedule.sigma, args
        )
        found.append(grad)
        assert metrics["approx_kl"].abs() < 1e-9
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["score", "is"])
def test_the_loss_has_the_kl_where_it_should(method):
    """With means 0.1 from the reference's the KL of a step is 0.005 / sigma^2; beta of it, and only in two of
    the places.
    """
    params, mean, schedule, *_ = model(small())
    batch = batch_of(small(), params, mean, schedule)[0]
    loss = {
        place: ddpo.ddpo_loss(params, batch, mean, schedule.sigma, small(method=method, kl=place, beta=3.0))[
            0
        ]
        for place in ("none", "loss", "return", "log-ratio")
    }
    expected = 3.0 * (0.1**2 / (2 * schedule.sigma[batch.t] ** 2)).mean()
    for place, extra in (("loss", expected), ("return", expected), ("log-ratio", 0.0)):
        torch.testing.assert_close(loss[place] - loss["none"], torch.as_tensor(extra), rtol=1e-4, atol=1e-5)


def test_beyond_the_clip_there_is_no_slope():
    args = small(method="is", clip=0.1, kl="none")
    sigma = torch.ones(2)
    x_next = torch.tensor([[1.0], [1.0], [1.0], [1.0]])
    old, new = torch.zeros(4, 1), torch.tensor([[0.5], [0.5], [-0.5], [-0.5]])  # ratios e^.375 and e^-.625
    t = torch.ones(4, dtype=torch.int64)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    batch = Denoising(x_next, x_next, t, t, ddpo.step_log_prob(x_next, old, sigma[t]), old, advantage)
    grad, (_, metrics) = grad_and_value(ddpo.ddpo_loss, has_aux=True)(
        new, batch, lambda p, *_: p, sigma, args
    )
    assert (grad != 0).squeeze().tolist() == [False, True, True, False]
    assert metrics["clipfrac"] == 1


@pytest.mark.parametrize("predict", ["eps", "v", "score"])
def test_pretraining_learns_the_mixtures(predict):
    """The chain's x_0 comes near the data, whatever the network predicts."""
    args = small(predict=predict, steps=10, pretrain_steps=400, pretrain_rate=5e-3)
    params, mean, schedule, net, unflatten = model(args)
    target = line()

    def loss(params, *batch):
        return ddpo.pretrain_loss(params, *batch, net, unflatten, schedule, predict)

    def distance(params):
        """Total variation between the chain's x_0 and the data."""
        exact = Exact(target, schedule, 1.0, mean)
        exact({"params": params, "reference": params})
        points, cell = exact.grid.points, exact.grid.cell
        densities = [
            torch.exp(-0.5 * ((points - target.mean[c, :, 0].double()) / target.std) ** 2)
            @ target.weight[c].double()
            for c in range(2)
        ]
        density = torch.stack(densities) / (target.std * (2 * torch.pi) ** 0.5)
        return 0.5 * (exact.truth.reference - density * cell).abs().sum(-1).mean()

    before = distance(params)
    params = ddpo.pretrain_denoiser(params, loss, target, schedule, torch.Generator().manual_seed(0), args)
    after = distance(params)
    assert before > 0.5 and after < 0.42


def test_exact_evaluations_agree_with_samples():
    """Reward and path KL on the grid against 20,000 chains (of v: fresh networks of eps leave the grid)."""
    args = small(predict="v")
    params, mean, schedule, *_ = model(args)
    target = line()
    other = params + 0.02 * torch.randn(params.shape, generator=torch.Generator().manual_seed(3))
    found = Exact(target, schedule, 0.5, mean)({"params": other, "reference": params})
    noise = torch.randn(args.steps + 1, 20_000, 1, generator=torch.Generator().manual_seed(4))
    context = torch.arange(20_000) % 2
    states, means = ddpo.sample_chain(mean, other, noise, context, schedule.sigma)
    ref = torch.stack(
        [mean(params, states[t], torch.full_like(context, t), context) for t in range(1, args.steps + 1)]
    )
    kl = ddpo.step_kl(means, ref, schedule.sigma[1:, None]).sum(0).mean().item()
    assert found["eval_path_kl"] == pytest.approx(kl, rel=0.05)
    assert found["eval_reward"] == pytest.approx(target.reward(states[0]).mean().item(), abs=0.03)
    assert found["eval_objective"] == pytest.approx(found["eval_reward"] - 0.5 * found["eval_path_kl"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(beta=0.0), "--beta must be greater than 0, not 0"),
        (dict(eta=1.5), r"--eta must lie in \[0, 1\], not 1.5"),
        (dict(eta=0.0), "--eta 0: steps without noise have no log-probability"),
        (dict(min_sigma=0.0), "--min-sigma must be greater than 0, not 0"),
        (dict(clip=0.1), "--clip 0.1: of --method is only"),
        (dict(method="is", minibatch_size=300), "--minibatch-size 300 does not divide the 320 steps"),
        (dict(total_steps=10), "--total-steps 10 is less than one batch of 64 chains"),
        (dict(env="lines"), "--env lines: no such task; there are line, ring, digits .nearest: line"),
        (dict(num_chains=3, total_steps=10), "--num-chains 3: a mean over a context's chains needs 4"),
        (dict(steps=1), "--steps must be at least 2, not 1"),
        (dict(data_coef=-1.0), "--data-coef must be at least 0 and finite, not -1"),
    ],
)
def test_bad_input_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        ddpo.train(small(**changes))


def test_the_digits():
    """The judge knows threes from others, and the reward is of the wanted digit."""
    pytest.importorskip("sklearn")
    target = make_target("digits")
    from zoo.common.digits import WANTED

    found = {digit: target.judge(target.judge_data[target.judge_label == digit]) for digit in (WANTED, 1, 5)}
    assert found[WANTED]["share"] > 0.95 and found[1]["share"] < 0.05 and found[5]["share"] < 0.05
    assert found[WANTED]["reward"] > -0.5 and found[1]["reward"] < -3


def test_a_pretraining_loss_beside_the_reward_keeps_it_low(tmp_path):
    """With most of the weight on data it falls from what a short pretraining left; without any it rises."""
    losses = {}
    for weight in (0.0, 100.0):
        folder = tmp_path / str(weight)
        ddpo.train(small(data_coef=weight, kl="none", run_dir=str(folder), total_steps=640, eval_every=320))
        told = [row["eval_pretrain_loss"] for row in command.rows(folder)]
        losses[weight] = [float(cell) for cell in told if cell]
    assert losses[100.0][-1] < losses[100.0][0] < losses[0.0][-1]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(method="is", num_epochs=2, clip=1e-3, kl="log-ratio", reduce="mean"),
        dict(env="ring", kl="loss", predict="v", min_sigma=0.2),
    ],
)
def test_runs_and_resumes(changes, tmp_path, capsys):
    """A resumed run ends where an uninterrupted one does."""
    common = dict(anneal=False, eval_every=128, total_steps=256) | changes
    whole = ddpo.train(small(run_dir=str(tmp_path / "whole"), **common))
    ddpo.train(small(run_dir=str(tmp_path / "half"), **common | dict(total_steps=128)))
    resumed = ddpo.train(small(resume=str(tmp_path / "half"), **common))
    assert resumed == pytest.approx(whole, abs=1e-6)
    assert "final evaluation: objective" in capsys.readouterr().out


def test_non_finite_rewards_stop_the_run(tmp_path, monkeypatch):
    """The fault names where it came from."""
    target = line()._replace(reward=lambda x: x[..., 0] * float("nan"))
    monkeypatch.setattr(ddpo, "make_target", lambda name: target)
    with pytest.raises(RunFault, match="reward became nan"):
        ddpo.train(small(run_dir=str(tmp_path / "run"), total_steps=128, eval_every=0))
