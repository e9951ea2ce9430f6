"""zoo/diffusion_dpo.py: its losses by hand, the pairs, the run, and bad input."""

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import command
import pytest
import torch

from zoo import diffusion_dpo
from zoo.common.device import flatten
from zoo.common.diffusion import cosine_schedule
from zoo.common.errors import UsageError
from zoo.common.mixtures import line
from zoo.common.targets import Exact
from zoo.diffusion_dpo import Args, Denoiser, SamplePairs, Side

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


def test_the_weight_of_35_is_no_part_of_its_gradient():
    """Where the two KLs to the reference differ, so that a weight that is not stopped has a slope."""
    x_next = torch.tensor([[0.3], [-1.1]])

    def loss(theta):
        winner, loser = (
            diffusion_dpo.Side(x, theta * scale, torch.zeros(1, 1), torch.ones(1))
            for x, scale in zip(x_next.split(1), (torch.ones(1, 1), torch.full((1, 1), 2.0)), strict=True)
        )
        return diffusion_dpo.notes35_loss(winner, loser, 0.7)[0]

    theta = 1.5  # the winner's mean; the loser's is twice that
    margin = 0.7 * (theta**2 / 2 - (2 * theta) ** 2 / 2)
    weight = 1 / (1 + math.exp(margin))
    slope = (theta - 0.3) - 2 * (2 * theta + 1.1)  # of |x_w - mu_w|^2 / 2 - |x_l - mu_l|^2 / 2
    assert float(torch.func.grad(loss)(torch.tensor(theta))) == pytest.approx(0.7 * weight * slope)


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
        (dict(eta=0.0), "--eta 0: no noise would be left but --min-sigma's; it must be greater than 0"),
        (dict(eta=-0.5), r"--eta must lie in \[0, 1\], not -0.5"),
        (dict(min_sigma=0.0), "--min-sigma must be greater than 0, not 0"),
        (dict(batch_size=300), "--batch-size 300 must be at most 256"),
        (dict(env="circle"), "--env circle: no such task"),
    ],
)
def test_bad_input_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        diffusion_dpo.train(small(**changes))


def target_means(params, x, t, context):
    """Whatever mu (B, 1) a model may have: params (2,) a slope and a shift, both told by step and context."""
    return params[0] * x + params[1] * (t + 3 * context)[:, None]


@pytest.mark.parametrize("weight", ["vlb", "steps"])
@pytest.mark.parametrize("loss", ["trajectory", "d3po", "standard", "notes35"])
def test_a_batchs_loss_is_that_of_its_steps_one_by_one(loss, weight):
    """Pair by pair and step by step, written out: what x_{t-1} is, whose context, which sigma and weight."""
    args, schedule = small(loss=loss, beta=0.3), cosine_schedule(5)
    g = torch.Generator().manual_seed(0)
    pairs = SamplePairs(*torch.randn(2, 3, 6, 1, generator=g), torch.tensor([1, 0, 1]))
    t = torch.arange(1, 6).expand(3, 5) if loss == "trajectory" else torch.tensor([[1, 4], [2, 2], [5, 3]])
    noise = torch.randn(2, *t.shape, 1, generator=g)
    own, ref = torch.tensor([0.8, 0.02]), torch.tensor([0.7, 0.05])
    weights = torch.ones(6) if weight == "vlb" else torch.arange(6) / 3

    def log_ratio(chain, k, i, eps):
        """L_t, R / beta and the squared distance of a pair's i-th step."""
        step = t[k, i]
        x, x_next = chain[k, step], chain[k, step - 1]
        if loss == "standard":
            x = schedule.signal[step] * chain[k, 0] + schedule.noise[step] * eps[k, i]
            before = (schedule.noise[step - 1] ** 2 - schedule.sigma[step] ** 2).clamp(min=0).sqrt()
            x_next = schedule.signal[step - 1] * chain[k, 0] + before * eps[k, i]
        mu, ref_mu = (p[0] * x + p[1] * (step + 3 * pairs.context[k]) for p in (own, ref))
        width = 2 * schedule.sigma[step] ** 2
        told = (x_next - ref_mu) ** 2 - (x_next - mu) ** 2, (mu - ref_mu) ** 2, (x_next - mu) ** 2
        return [value.item() / width for value in told]

    margins, losses = [], []
    for k in range(3):
        rows = [
            [log_ratio(chain, k, i, eps) for chain, eps in zip(pairs[:2], noise, strict=True)]
            for i in range(t.shape[1])
        ]
        own_margins = [0.3 * (won[0] - lost[0]) for won, lost in rows]
        if loss == "trajectory":
            own_margins = [sum(own_margins)]
        elif loss == "d3po":
            own_margins = [5 * margin for margin in own_margins]
        elif loss == "standard":
            own_margins = [5 * weights[step] * m for step, m in zip(t[k], own_margins, strict=True)]
        else:
            own_margins = [0.3 * (won[1] - lost[1]) for won, lost in rows]
            losses += [
                0.3 * (won[2] - lost[2]) / (1 + math.exp(m))
                for m, (won, lost) in zip(own_margins, rows, strict=True)
            ]
        margins += own_margins
    margins = torch.tensor(margins, dtype=torch.float64)
    expected = torch.tensor(losses).mean() if losses else torch.nn.functional.softplus(-margins).mean()
    found, metrics = diffusion_dpo.pair_loss(own, ref, pairs, t, noise, target_means, schedule, weights, args)
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-3, atol=1e-5)
    assert metrics["loss"] == found
    torch.testing.assert_close(metrics["margin"].double(), margins.mean(), rtol=1e-3, atol=1e-5)
    assert metrics["accuracy"] == pytest.approx((margins > 0).double().mean().item())


# --- what a run does ----------------------------------------------------------------------------------------


class Recorded(NamedTuple):
    """A run's arguments, its pairs, and the arguments and results of its updates, pretraining's apart."""

    args: Args
    pairs: SamplePairs
    pretraining: list[tuple]
    updates: list[tuple]


def recorded(folder, **changes):
    args = small(run_dir=str(folder), eta=0.7, min_sigma=0.1, **changes)
    made, calls = [], []

    def recording(update, *_):
        def record(*given):
            found = update(*given)
            calls.append((given, found))
            return found

        return record

    def keep(*given, make_pairs=diffusion_dpo.make_pairs):
        made.append(make_pairs(*given))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion_dpo, "compile_function", recording)
        patch.setattr(diffusion_dpo, "make_pairs", keep)
        diffusion_dpo.train(args)
    first = [call for call in calls if len(call[0]) == 4]
    return Recorded(args, made[0], first, calls[len(first) :])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("env", ["line", "ring", "digits"])
def test_a_run_on_cuda_and_its_resumption(env, tmp_path):
    if env == "digits":
        pytest.importorskip("sklearn")
    args = small(env=env, min_sigma=0.2, device="cuda", compile=True, run_dir=str(tmp_path / "run"))
    assert math.isfinite(diffusion_dpo.train(args))
    args = dataclasses.replace(args, total_steps=2560, run_dir=None, resume=args.run_dir)
    assert math.isfinite(diffusion_dpo.train(args))


@pytest.fixture(scope="module")
def standard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standard") / "run"
    return recorded(folder, seed=3, total_steps=1600, beta=0.2, learning_rate=3e-3, max_grad_norm=0.05)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """The run with everything else that an update is handed."""
    more = dict(shared_noise=False, weight="constant", anneal=False, seed=4, max_grad_norm=1e6)
    return recorded(tmp_path_factory.mktemp("others") / "run", **more)


def test_a_run_starts_from_what_pretraining_made(standard):
    """Its steps follow each other at a rate that falls to 0; the result is the first policy and reference."""
    steps = standard.args.pretrain_steps
    assert len(standard.pretraining) == steps == 100
    for i, ((params, opt, batch, rate), _) in enumerate(standard.pretraining):
        assert rate == pytest.approx(3e-3 * (1 - i / steps)) and opt["t"] == i and len(batch[0]) == 64
        assert i == 0 or params is standard.pretraining[i - 1][1][0]
    first = standard.updates[0][0]
    assert torch.equal(first[0], standard.pretraining[-1][1][0]) and torch.equal(first[2], first[0])
    x0, context, t = (torch.cat([given[2][i] for given, _ in standard.pretraining]) for i in range(3))
    for which, std in ((0, 1.46**0.5), (1, 0.93**0.5)):  # of the mixture of each context
        assert x0[context == which].std() == pytest.approx(std, rel=0.04)
    assert t.unique().tolist() == [1, 2, 3, 4, 5]
    losses = torch.stack([found[2] for _, found in standard.pretraining])
    assert losses[-20:].mean() < 0.9 * losses[:20].mean()


def test_another_seed_is_another_run(standard, others):
    """Another network at first, other data, other pairs, other noise."""
    (first, _, data, _), (other, _, other_data, _) = (run.pretraining[0][0] for run in (standard, others))
    assert (first != other).float().mean() > 0.5 and not torch.equal(data[0], other_data[0])
    starts = [torch.cat((run.pairs.winner, run.pairs.loser))[:, -1, 0] for run in (standard, others)]
    assert not torch.isin(*starts).any()
    assert (standard.updates[0][0][5][0] != others.updates[0][0][5][0]).all()


def test_updates_follow_each_other_beside_one_reference(standard):
    """Parameters and Adam's moments are the last update's, the reference the pretrained one, and the rate
    falls to 0, over reports of 20 updates too.
    """
    assert len(standard.updates) == 25
    for i, ((params, opt, reference, _, _, _, rate), _) in enumerate(standard.updates):
        assert torch.equal(reference, standard.updates[0][0][0])
        assert opt["t"] == i and rate == pytest.approx(3e-3 * (1 - i / 25))
        assert i == 0 or params is standard.updates[i - 1][1][0]
        assert i == 0 or not torch.equal(params, reference)


def test_batches_are_of_the_runs_pairs(standard):
    """Winners stay winners, beside their own losers and contexts, and all pairs have their turn."""
    seen = set()
    for (_, _, _, batch, *_), _ in standard.updates:
        assert len(batch.context) == 64
        row = torch.cdist(batch.winner[..., 0], standard.pairs.winner[..., 0]).argmin(-1)
        for found, pairs in zip(batch, standard.pairs, strict=True):
            assert torch.equal(found, pairs[row])
        seen |= set(row.tolist())
    assert len(seen) > 0.98 * 256  # 1600 draws: exp(-6.25) are missed


def test_steps_and_noises_of_a_batch(standard, others):
    """All steps alike, two of each pair, noised anew in every update, both samples alike or not."""
    for run in (standard, others):
        t = torch.stack([given[4] for given, _ in run.updates])
        assert t.shape[1:] == (64, 2)
        assert (t.flatten().bincount(minlength=6) / t.numel())[1:].sub(0.2).abs().max() < 0.03
        noise = torch.stack([given[5] for given, _ in run.updates])
        assert noise.shape[1:] == (2, 64, 2, 1) and len(noise.unique()) > 0.99 * noise[:, 0].numel()
        assert torch.equal(noise[:, 0], noise[:, 1]) == (run is standard)
        assert noise.std() == pytest.approx(1, abs=0.05)


def test_whole_chains_have_all_steps(tmp_path):
    run = recorded(tmp_path / "run", loss="trajectory", total_steps=128)
    for given, _ in run.updates:
        assert given[4].tolist() == [[1, 2, 3, 4, 5]] * 64


def test_an_update_is_adams_step_along_the_losss_gradient(standard, others):
    """Scaled down to --max-grad-norm, with the run's schedule and weights; metrics are of before it."""
    for run in (standard, others):
        _, mean, schedule = model(run.args)
        weights = torch.ones(6)
        if run is others:
            weights = 1 / diffusion_dpo.vlb_weights(schedule)
            weights = weights * diffusion_dpo.vlb_weights(schedule)[1:].mean()
        (params, opt, reference, pairs, t, noise, _), (_, after, metrics) = run.updates[3]
        grad, (loss, _) = torch.func.grad_and_value(diffusion_dpo.pair_loss, has_aux=True)(
            params, reference, pairs, t, noise, mean, schedule, weights, run.args
        )
        torch.testing.assert_close(metrics["loss"], loss)
        torch.testing.assert_close(metrics["grad_norm"], grad.norm())
        scale = min(1.0, 0.05 / grad.norm().item()) if run is standard else 1.0
        assert (scale < 1) == (run is standard)
        torch.testing.assert_close(after["m"] - 0.9 * opt["m"], 0.1 * scale * grad, rtol=1e-3, atol=1e-6)


def test_a_constant_rate(others):
    assert all(given[6] == pytest.approx(1e-3) for given, _ in others.updates)


def test_what_is_told_is_of_the_policy_beside_the_reference(standard):
    """The table's metrics are the means over a report's updates, and its evaluations the exact quantities."""
    _, mean, schedule = model(standard.args)
    exact = Exact(line(), schedule, 0.2, mean)
    told = command.rows(Path(standard.args.run_dir))
    assert [int(row["step"]) for row in told] == [1280, 1600]
    reference = standard.updates[0][0][0]
    for row, some in zip(told, (standard.updates[:20], standard.updates[20:]), strict=True):
        for name in ("loss", "margin", "accuracy", "grad_norm"):
            expected = torch.stack([found[2][name] for _, found in some]).mean().item()
            assert float(row[name]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert float(row["learning_rate"]) == pytest.approx(some[-1][0][6].item(), rel=1e-4)
        expected = exact({"params": some[-1][1][0], "reference": reference})
        for name, value in expected.items():
            assert float(row[name]) == pytest.approx(value, rel=1e-3, abs=1e-6)
        assert expected["eval_path_kl"] > 1e-3
    state = torch.load(Path(standard.args.run_dir) / "agent.pt", weights_only=True)["state"]
    assert torch.equal(state["params"], standard.updates[-1][1][0])
    assert torch.equal(state["reference"], reference)


@pytest.mark.parametrize("loss", ["trajectory", "standard"])
def test_it_comes_near_the_tilt(loss, tmp_path):
    """Half of what parts the pretrained model's x_0 from the exact tilt is gone."""
    more = dict(num_pairs=4000, batch_size=128, learning_rate=5e-3, run_dir=str(tmp_path / "run"))
    args = small(loss=loss, pretrain_steps=300, total_steps=7680, eval_every=0, **more)
    diffusion_dpo.train(args)
    _, mean, schedule = model(args)
    state = torch.load(tmp_path / "run" / "agent.pt", weights_only=True)["state"]
    exact = Exact(line(), schedule, args.beta, mean)
    before, after = (exact(state | {"params": state[name]})["eval_w1"] for name in ("reference", "params"))
    assert after < 0.5 * before
