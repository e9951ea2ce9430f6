"""zoo/ddpo.py: its pure functions by hand, the run, and bad input."""

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import command
import pytest
import torch
from torch.func import grad_and_value

from zoo import ddpo
from zoo.common.device import flatten
from zoo.common.diffusion import cosine_schedule
from zoo.common.errors import RunFault, UsageError
from zoo.common.mixtures import line
from zoo.common.targets import Exact, make_evaluation, make_target
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
        (dict(eta=0.0), "--eta 0: no noise would be left but --min-sigma's; it must be greater than 0"),
        (dict(min_sigma=0.0), "--min-sigma must be greater than 0, not 0"),
        (dict(clip=0.1), "--clip 0.1: of --method is only"),
        (dict(method="is", minibatch_size=300), "--minibatch-size 300 does not divide the 320 steps"),
        (dict(total_steps=10), "--total-steps 10 is less than one batch of 64 chains"),
        (dict(env="lines"), "--env lines: no such task; there are line, ring, digits .nearest: line"),
        (dict(num_chains=3, total_steps=10), "--num-chains 3: a mean over a context's chains needs 4"),
        (dict(steps=1), "--steps must be at least 2, not 1"),
        (dict(env="ring", min_sigma=0.005), "least noise of a step is 0.005, .* would have 1.*e.06 points"),
        (dict(data_coef=-1.0), "--data-coef must be at least 0 and finite, not -1"),
    ],
)
def test_bad_input_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        ddpo.train(small(**changes))


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return make_target("digits")


def test_the_digits(digits):
    """The judge knows threes from others, and the reward is of the wanted digit."""
    from zoo.common.digits import WANTED

    found = {digit: digits.judge(digits.judge_data[digits.judge_label == digit]) for digit in (WANTED, 1, 5)}
    assert found[WANTED]["share"] > 0.95 and found[1]["share"] < 0.05 and found[5]["share"] < 0.05
    assert found[WANTED]["reward"] > -0.5 and found[1]["reward"] < -3


def test_the_digits_are_judged_by_the_half_that_the_reward_has_not_seen(digits):
    """A log-probability, higher on the threes that it was fitted to; the judge has the other half, and says
    how far the nearest picture is. The data are all of them.
    """
    from sklearn.datasets import load_digits

    label = torch.as_tensor(load_digits().target)
    assert torch.equal(digits.judge_data, digits.data[1::2]) and torch.equal(digits.judge_label, label[1::2])
    reward = digits.reward(digits.data)
    assert reward.max() <= 0 and (reward.exp().round() == (label == 3)).float().mean() > 0.98
    fitted, unseen = (reward[i::2][label[i::2] == 3].mean() for i in (0, 1))
    assert fitted > unseen
    assert digits.judge(digits.judge_data)["distance"] == pytest.approx(0, abs=0.01)
    nearest = torch.cdist(digits.data[::2], digits.judge_data).min(-1).values.mean().item()
    assert digits.judge(digits.data[::2])["distance"] == pytest.approx(nearest, rel=1e-3)
    threes = digits.judge(digits.data[::2][label[::2] == 3])["distance"]  # the yardsticks of the docstring
    assert f"pictures is {nearest:.2f}, and of its threes {threes:.2f}" in str(type(digits).judge.__doc__)
    drawn = digits.sample(torch.zeros(1000, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert len(drawn.unique(dim=0)) > 700 and torch.cdist(drawn, digits.data).min(-1).values.max() < 0.01


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("env", ["line", "ring", "digits"])
def test_a_run_on_cuda_and_its_resumption(env, tmp_path):
    if env == "digits":
        pytest.importorskip("sklearn")
    common = dict(env=env, min_sigma=0.2, device="cuda", compile=True, eval_every=64, data_coef=0.1)
    assert math.isfinite(ddpo.train(small(**common, total_steps=128, run_dir=str(tmp_path / "run"))))
    assert math.isfinite(ddpo.train(small(**common, total_steps=256, resume=str(tmp_path / "run"))))


def test_non_finite_rewards_stop_the_run(tmp_path, monkeypatch):
    """The fault names where it came from."""
    target = line()._replace(reward=lambda x: x[..., 0] * float("nan"))
    monkeypatch.setattr(ddpo, "make_target", lambda name: target)
    with pytest.raises(RunFault, match="reward became nan"):
        ddpo.train(small(run_dir=str(tmp_path / "run"), total_steps=128, eval_every=0))


# --- chains of a run ----------------------------------------------------------------------------------------


def advantages_one_by_one(reward, kl, log_ratio, context, place):
    """What chain_advantages makes of T x N steps with beta 0.7, by loops."""
    steps, count = kl.shape
    returns = [
        [
            reward[n]
            - 0.7 * (sum(kl[s, n] for s in range(t)) if place == "return" else 0)
            - 0.7 * (log_ratio[t, n] if place == "log-ratio" else 0)
            for n in range(count)
        ]
        for t in range(steps)
    ]
    found = torch.zeros(steps, count)
    for t in range(steps):
        for n in range(count):
            rest = [returns[t][m] for m in range(count) if m != n and context[m] == context[n]]
            found[t, n] = returns[t][n] - sum(rest) / len(rest)
    return found


@pytest.mark.parametrize("place", ["none", "loss", "return", "log-ratio"])
@pytest.mark.parametrize(("env", "reduce"), [("line", "sum"), ("ring", "sum"), ("ring", "mean")])
def test_collected_chains(env, reduce, place):
    """What a policy beside another reference collects: chains of its own, each step's log-probability, the
    reference's means of the same steps, advantages of the last state's reward, and metrics of these.
    """
    target = make_target(env)
    args = small(env=env, kl=place, reduce=reduce, beta=0.7, num_chains=12, predict="v")
    params, mean, schedule, *_ = model(args, target)
    reference = params + 0.05 * torch.randn(params.shape, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    state = ddpo.State(params, {}, reference, generator)
    sample = lambda params, *rest: ddpo.sample_chain(mean, params, *rest)  # noqa: E731
    batch, metrics = ddpo.collect_chains(sample, mean, target, schedule, state, args)
    again = ddpo.collect_chains(sample, mean, target, schedule, state, args)[0]
    assert (again.x != batch.x).all()
    assert batch.t.tolist() == [[t] * 12 for t in range(1, 6)]
    assert batch.context[0].bincount().tolist() == [12 // target.contexts] * target.contexts
    assert torch.equal(batch.x[:-1], batch.x_next[1:]) and (batch.context == batch.context[0]).all()
    kl, log_ratio = torch.zeros(5, 12), torch.zeros(5, 12)
    for i in range(5):
        mu, ref_mu = (mean(p, batch.x[i], batch.t[i], batch.context[i]) for p in (params, reference))
        policy, ref = (torch.distributions.Normal(m, schedule.sigma[i + 1]) for m in (mu, ref_mu))
        torch.testing.assert_close(batch.ref_mean[i], ref_mu)
        log_prob = policy.log_prob(batch.x_next[i])
        of_steps = log_prob.sum(-1) if reduce == "sum" else log_prob.mean(-1)
        torch.testing.assert_close(batch.log_prob[i], of_steps, rtol=1e-4, atol=1e-4)
        kl[i] = torch.distributions.kl_divergence(policy, ref).sum(-1)
        log_ratio[i] = (log_prob - ref.log_prob(batch.x_next[i])).sum(-1)
        assert ((batch.x_next[i] - mu) / schedule.sigma[i + 1]).std() == pytest.approx(1, abs=0.5)
    reward = target.reward(batch.x_next[0])
    expected = advantages_one_by_one(reward, kl, log_ratio, batch.context[0], place)
    torch.testing.assert_close(batch.advantage, expected, rtol=1e-3, atol=1e-3)
    told = {"reward": reward.mean(), "reward_std": reward.std(), "path_kl": kl.sum(0).mean()}
    for name, value in told.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("clip", "reduce"), [(None, "sum"), (0.24, "sum"), (0.1, "mean")])
def test_the_loss_away_from_the_sampling_policy(clip, reduce):
    """Importance sampled, with the KL beside it, step by step; what is told of it has no KL."""
    args = small(method="is", kl="loss", beta=0.7, clip=clip, reduce=reduce)
    g = torch.Generator().manual_seed(0)
    x, x_next, ref, old, new = torch.randn(5, 6, 3, generator=g)
    old, new = x_next + 0.3 * old, x_next + 0.3 * new
    advantage, sigma = torch.randn(6, generator=g), torch.tensor([9.0, 0.8, 1.2])
    t, context = torch.tensor([1, 2, 1, 2, 1, 2]), torch.zeros(6, dtype=torch.int64)
    log_prob = ddpo.step_log_prob(x_next, old, sigma[t], reduce)
    batch = Denoising(x, x_next, t, context, log_prob, ref, advantage)
    loss, metrics = ddpo.ddpo_loss(new, batch, lambda p, *_: p, sigma, args)
    losses, kls, approx, outside = [], [], [], []
    for i in range(6):
        width = 2 * sigma[t[i]].item() ** 2 * (1 if reduce == "sum" else 3)
        moved = ((x_next[i] - old[i]) ** 2 - (x_next[i] - new[i]) ** 2).sum().item() / width
        ratio, a = math.exp(moved), advantage[i].item()
        bounded = ratio if clip is None else min(max(ratio, 1 - clip), 1 + clip)
        losses.append(-min(a * ratio, a * bounded))
        kls.append(((new[i] - ref[i]) ** 2).sum().item() / width)
        approx.append(ratio - 1 - moved)
        outside.append(clip is not None and abs(ratio - 1) > clip)
    assert metrics["policy_loss"].item() == pytest.approx(sum(losses) / 6, rel=1e-3)
    assert loss.item() == pytest.approx((sum(losses) + 0.7 * sum(kls)) / 6, rel=1e-3)
    assert metrics["approx_kl"].item() == pytest.approx(sum(approx) / 6, rel=1e-2) and sum(approx) > 0
    if clip:
        assert metrics["clipfrac"].item() == pytest.approx(sum(outside) / 6) and 0 < sum(outside) < 6


# --- what a run does ----------------------------------------------------------------------------------------


class Recorded(NamedTuple):
    """A run's arguments, its collections (state and batch), and the arguments and results of its updates,
    pretraining's apart.
    """

    args: Args
    collections: list[tuple]
    pretraining: list[tuple]
    updates: list[tuple]


def recorded(folder, **changes):
    args = small(run_dir=str(folder), eta=0.7, min_sigma=0.1, **changes)
    collections, calls = [], []

    def recording(update, *_):
        def record(*given):
            calls.append((given, update(*given)))
            return calls[-1][1]

        return record

    def keep(*given, collect=ddpo.collect_chains):
        found = collect(*given)
        collections.append((given[4], found[0]))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddpo, "compile_function", recording)
        patch.setattr(ddpo, "collect_chains", keep)
        ddpo.train(args)
    first = [call for call in calls if len(call[0]) == 4]
    return Recorded(args, collections, first, calls[len(first) :])


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A run of five batches, two passes over each in two minibatches, with data beside them."""
    more = dict(method="is", num_epochs=2, clip=0.2, data_coef=0.5, beta=0.2, max_grad_norm=0.3, seed=3)
    folder = tmp_path_factory.mktemp("several") / "run"
    return recorded(folder, total_steps=320, eval_every=128, **more)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A run of four batches with one step each."""
    more = dict(num_epochs=3, anneal=False, kl="none", max_grad_norm=1e6, seed=4)
    return recorded(tmp_path_factory.mktemp("single") / "run", total_steps=256, eval_every=64, **more)


def test_a_run_starts_from_what_pretraining_made(several):
    """Its steps follow each other at a rate that falls to 0; the result is the first policy and reference."""
    assert len(several.pretraining) == 200
    for i, ((params, opt, batch, rate), _) in enumerate(several.pretraining):
        assert rate == pytest.approx(3e-3 * (1 - i / 200)) and opt["t"] == i
        assert i == 0 or params is several.pretraining[i - 1][1][0]
        assert [len(x) for x in batch] == [64] * 4
    steps = torch.stack([batch[2] for (_, _, batch, _), _ in several.pretraining]).flatten()
    assert steps.unique().tolist() == [1, 2, 3, 4, 5]
    assert (steps.bincount(minlength=6) / len(steps))[1:].sub(0.2).abs().max() < 0.02
    x0, context = (torch.cat([batch[i] for (_, _, batch, _), _ in several.pretraining]) for i in (0, 1))
    for which, std in ((0, 1.46**0.5), (1, 0.93**0.5)):  # of the mixture of each context
        assert x0[context == which].std() == pytest.approx(std, rel=0.03)
    losses = torch.stack([found[2] for _, found in several.pretraining])
    assert losses[-40:].mean() < 0.8 * losses[:40].mean()
    state, last = several.collections[0][0], several.pretraining[-1][1][0]
    assert torch.equal(state.params, last) and torch.equal(state.reference, last)


def test_another_seed_is_another_run(several, single):
    """Another network at first, other data, other noise."""
    (first, _, data, _), (other, _, other_data, _) = (run.pretraining[0][0] for run in (several, single))
    assert (first != other).float().mean() > 0.5 and not torch.equal(data[0], other_data[0])
    assert (several.collections[0][1].x[-1] != single.collections[0][1].x[-1]).all()


def test_chains_are_of_the_policy_of_then_beside_one_reference(several, single):
    """Each batch of chains is sampled by what the updates before it made, the reference stays, and updates
    follow each other, Adam's moments too.
    """
    for run, each in ((several, 4), (single, 1)):
        assert len(run.updates) == each * len(run.collections) == each * (run.args.total_steps // 64)
        first = run.collections[0][0]
        for i, (state, _) in enumerate(run.collections):
            assert state.reference is first.reference and state.opt["t"] == each * i
            assert i == 0 or state.params is run.updates[each * i - 1][1][0]
            assert i == 0 or not torch.equal(state.params, state.reference)
            assert run.updates[each * i][0][0] is state.params
        for i, ((params, opt, *_), _) in enumerate(run.updates):
            assert opt["t"] == i and (i == 0 or params is run.updates[i - 1][1][0])


def as_rows(batches):
    """All steps of batches, a list of numbers each."""
    rows = [torch.cat([x.reshape(b.t.numel(), -1).double() for x in b], -1) for b in batches]
    return torch.cat(rows).tolist()


def test_every_step_has_its_turn_once_a_pass(several):
    """As it was collected: with the advantage and the log-probability of then. Passes differ in order."""
    for i, (_, batch) in enumerate(several.collections):
        minibatches = [given[2] for given, _ in several.updates[4 * i : 4 * i + 4]]
        assert all(len(minibatch.t) == 160 for minibatch in minibatches)
        collected, first, second = map(as_rows, ([batch], minibatches[:2], minibatches[2:]))
        assert first != collected and second != collected and first != second
        assert sorted(first) == sorted(second) == sorted(collected)


def test_one_step_takes_the_whole_batch(single):
    for (_, batch), (given, _) in zip(single.collections, single.updates, strict=True):
        assert as_rows([batch]) == as_rows([given[2]]) and given[3] == ()


def test_rates(several, single):
    """They fall to 0 over the batches, or stay."""
    found = [given[4].item() for given, _ in several.updates]
    assert found == pytest.approx([2e-3 * (1 - i // 4 / 5) for i in range(20)])
    assert [given[4].item() for given, _ in single.updates] == pytest.approx([2e-3] * 4)


def test_data_beside_the_chains_is_new_in_every_update(several):
    noises = torch.stack([given[3][3] for given, _ in several.updates])
    assert noises.shape == (20, 64, 1) and len(noises.unique()) == noises.numel()


def test_an_update_is_adams_step_along_the_losss_gradient(several, single):
    """The pretraining loss beside the chains' by its weight, scaled down to --max-grad-norm."""
    for run in (several, single):
        _, mean, schedule, net, unflatten = model(run.args)
        (params, opt, batch, data, _), (_, after, metrics) = run.updates[3]
        rest = (batch, mean, schedule.sigma, run.args)
        grad = torch.func.grad(lambda params, rest: ddpo.ddpo_loss(params, *rest)[0])(params, rest)
        if run is several:
            rest = (net, unflatten, schedule, "eps")
            grad = grad + 0.5 * torch.func.grad(ddpo.pretrain_loss)(params, *data, *rest)
        torch.testing.assert_close(metrics["grad_norm"], grad.norm())
        scale = min(1.0, 0.3 / grad.norm().item()) if run is several else 1.0
        assert (scale < 1) == (run is several)
        torch.testing.assert_close(after["m"] - 0.9 * opt["m"], 0.1 * scale * grad, rtol=1e-3, atol=1e-6)


def test_what_is_told_is_of_the_policy_beside_the_reference(several, single):
    """Metrics are means over a batch's updates, evaluations the exact quantities of the policy made by them
    and the pretraining loss on other data.
    """
    for run, each in ((several, 4), (single, 1)):
        _, mean, schedule, net, unflatten = model(run.args)
        exact = Exact(line(), schedule, run.args.beta, mean)
        reference = run.collections[0][0].reference
        own = ddpo.draw_data(line(), schedule, 20_000, torch.Generator().manual_seed(0))
        told = command.rows(Path(run.args.run_dir))
        assert len(told) == len(run.collections)
        for i, row in enumerate(told):
            some = run.updates[each * i : each * i + each]
            for name in some[0][1][2]:
                expected = torch.stack([found[2][name] for _, found in some]).mean().item()
                assert float(row[name]) == pytest.approx(expected, rel=1e-3, abs=1e-6)
            assert float(row["learning_rate"]) == pytest.approx(some[0][0][4].item(), rel=1e-4)
            assert bool(row["eval_gap"]) == (run is single or i in (1, 3, 4))
            if row["eval_gap"]:
                params = some[-1][1][0]
                for name, value in exact({"params": params, "reference": reference}).items():
                    assert float(row[name]) == pytest.approx(value, rel=1e-3, abs=1e-6)
                left = ddpo.pretrain_loss(params, *own, net, unflatten, schedule, "eps").item()
                assert float(row["eval_pretrain_loss"]) == pytest.approx(left, rel=0.06)
        assert float(told[-1]["eval_path_kl"]) > 1e-3
        state = torch.load(Path(run.args.run_dir) / "agent.pt", weights_only=True)["state"]
        assert torch.equal(state["params"], run.updates[-1][1][0])
        assert torch.equal(state["reference"], reference)


@pytest.mark.parametrize("method", ["score", "is"])
def test_it_comes_near_the_best_objective(method, tmp_path):
    """Nine tenths of the gap between the reference's J and the exact optimum's are closed."""
    more = dict(num_chains=256, minibatch_size=640, learning_rate=1e-2, predict="v")
    args = small(method=method, total_steps=10_240, eval_every=0, run_dir=str(tmp_path / "run"), **more)
    ddpo.train(args)
    _, mean, schedule, *_ = model(args)
    state = torch.load(tmp_path / "run" / "agent.pt", weights_only=True)["state"]
    exact = Exact(line(), schedule, args.beta, mean)
    before, after = (exact(state | {"params": state[name]})["eval_gap"] for name in ("reference", "params"))
    assert before > 0.3 and 0 < after < 0.1 * before


def test_evaluations_on_digits_are_of_the_policys_own_pictures(digits):
    """The judge sees x_0 of the policy's chains; the KL to the reference is at the chains' states."""
    params, mean, schedule, *_ = model(small(env="digits", predict="v", hidden=(16,)), digits)
    reference = params + 0.02 * torch.randn(params.shape, generator=torch.Generator().manual_seed(1))
    seen = []

    def sample(params, *rest):
        seen.append((params, *ddpo.sample_chain(mean, params, *rest)))
        return seen[-1][1:]

    found = make_evaluation(digits, schedule, 1.0, mean, sample)({"params": params, "reference": reference})
    ((sampler, states, means),) = seen
    assert sampler is params
    context = torch.zeros(500, dtype=torch.int64)
    ref = torch.stack([mean(reference, states[t], context + t, context) for t in range(1, 6)])
    kl = ddpo.step_kl(means, ref, schedule.sigma[1:, None]).sum(0).mean().item()
    assert found["eval_path_kl"] == pytest.approx(kl, rel=1e-3) and kl > 0.01
    for name, value in digits.judge(states[0]).items():
        assert found[f"eval_{name}"] == pytest.approx(value)
