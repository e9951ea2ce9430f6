"""PPO: its formulas against independent ones, its batches, probe environments, whole runs, and what it
refuses."""

import csv
import fcntl
import inspect
import math
import re
import signal
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributions as td
from torch.func import grad_and_value

from zoo import ppo
from zoo.common.cli import main
from zoo.common.envs import make_envs
from zoo.common.errors import EnvironmentFault, RunFault
from zoo.common.files import load_checkpoint
from zoo.common.normalize import normalize
from zoo.common.optim import new_adam
from zoo.common.process import Process
from zoo.common.seeding import env_seeds
from zoo.ppo import (
    Args,
    Batch,
    Categorical,
    Gaussian,
    adapt_kl_coef,
    draw_noise,
    gae,
    policy_loss,
    ppo_loss,
    value_loss,
)

# --- generalised advantage estimation -----------------------------------------------------------------------

# gamma 1/2. One environment sees a termination (row 1), a truncation (row 2) and the rollout's boundary (row
# 4):
#   delta_0 = 1 + 4/2 - 2 = 1      delta_1 = 2 - 4 = -2 (terminated: V' = 100 is worth nothing)
#   delta_2 = 3 + 8/2 - 6 = 1 (truncated: V' counts)
#   delta_3 = 4 + 2/2 - 10 = -5    delta_4 = 5 + 6/2 - 2 = 6
# The other, with rewards 1 and a critic of zeros, sees none: its deltas are 1.
GAE_ROWS = dict(
    reward=[[1, 1], [2, 1], [3, 1], [4, 1], [5, 1]],
    value=[[2, 0], [4, 0], [6, 0], [10, 0], [2, 0]],
    next_value=[[4, 0], [100, 0], [8, 0], [2, 0], [6, 0]],
    terminated=[[0, 0], [1, 0], [0, 0], [0, 0], [0, 0]],
    truncated=[[0, 0], [0, 0], [1, 0], [0, 0], [0, 0]],
)


def gae_inputs(**changes):
    rows = {name: torch.tensor(values, dtype=torch.float64) for name, values in (GAE_ROWS | changes).items()}
    return {name: rows[name].bool() if name in ("terminated", "truncated") else rows[name] for name in rows}


@pytest.mark.parametrize(
    ("lam", "first", "second"),
    [
        (0.0, [1, -2, 1, -5, 6], [1, 1, 1, 1, 1]),
        # factor gamma lambda = 1/4: A_3 = -5 + 6/4, A_2 = 1 and A_1 = -2 (both cut), A_0 = 1 - 2/4
        (0.5, [0.5, -2, 1, -3.5, 6], [1.33203125, 1.328125, 1.3125, 1.25, 1]),
        # factor 1/2: A_3 = -5 + 6/2 = (4 + 5/2 + 6/4) - 10, the discounted rewards and the last value less V
        (1.0, [0, -2, 1, -2, 6], [1.9375, 1.875, 1.75, 1.5, 1]),
    ],
)
def test_gae_by_hand(lam, first, second):
    advantage = gae(**gae_inputs(), gamma=0.5, lam=lam)
    assert advantage[:, 0].tolist() == first
    assert advantage[:, 1].tolist() == second


def test_gae_of_a_step_both_terminated_and_truncated_does_not_bootstrap():
    both = gae(**gae_inputs(truncated=[[0, 0], [1, 0], [1, 0], [0, 0], [0, 0]]), gamma=0.5, lam=0.5)
    assert both[:, 0].tolist() == [0.5, -2, 1, -3.5, 6]


# --- distributions ------------------------------------------------------------------------------------------


def test_categorical_equals_torchs():
    logits = torch.randn(20, 5, dtype=torch.float64) * 3
    action = torch.randint(5, (20,))
    ours, theirs = Categorical(logits), td.Categorical(logits=logits)
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    assert torch.equal(ours.mode(), theirs.probs.argmax(-1))


def test_gaussian_equals_torchs():
    mean, log_std = (
        torch.randn(20, 3, dtype=torch.float64),
        torch.tensor([-1.0, 0.0, 0.7], dtype=torch.float64),
    )
    action = torch.randn(20, 3, dtype=torch.float64)
    ours, theirs = Gaussian(mean, log_std), td.Normal(mean, log_std.exp())
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action).sum(-1))
    torch.testing.assert_close(ours.entropy(), theirs.entropy().sum(-1))
    assert torch.equal(ours.mode(), mean)


def actions_of(discrete: bool, action_dim: int) -> Any:
    """What draw_noise asks of environments."""
    return SimpleNamespace(discrete=discrete, action_dim=action_dim)


def test_categorical_samples_have_its_frequencies():
    p, n = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01]), 100_000
    envs, generator = actions_of(discrete=True, action_dim=5), torch.Generator().manual_seed(0)
    noise = draw_noise(envs, n, generator=generator)
    frequency = Categorical(p.log() + 7).sample(noise).bincount(minlength=5) / n
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all(), frequency


def test_gaussian_samples_have_its_moments():
    n, mean, log_std = 100_000, torch.tensor([1.0, -2.0]), torch.tensor([0.5, -1.0])
    envs, generator = actions_of(discrete=False, action_dim=2), torch.Generator().manual_seed(0)
    sample = Gaussian(mean, log_std).sample(draw_noise(envs, n, generator=generator))
    std = log_std.exp()
    assert ((sample.mean(0) - mean).abs() < 5 * std / n**0.5).all()
    assert ((sample.var(0) - std**2).abs() < 5 * std**2 * (2 / n) ** 0.5).all()
    assert abs(np.corrcoef(sample.T)[0, 1]) < 5 / n**0.5


def test_noise_comes_from_the_generator_alone():
    envs = actions_of(discrete=True, action_dim=2)
    first, again = (draw_noise(envs, 4, 3, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert first.shape == (4, 3, 2) and torch.equal(first, again)


# --- losses -------------------------------------------------------------------------------------------------


def test_clipped_surrogate_is_piecewise_linear():
    """min(r A, clip(r) A) is min(r, 1 + eps) A where A > 0 and max(r, 1 - eps) A where A < 0; its slope says
    what is learnt."""
    for advantage, bound in ((2.0, torch.minimum), (-3.0, torch.maximum)):
        limit = torch.tensor(1.2 if advantage > 0 else 0.8, dtype=torch.float64)
        for r in (0.1, 0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0, 10.0):
            ratio = torch.tensor([r], dtype=torch.float64, requires_grad=True)
            loss = policy_loss(ratio, ratio.log(), torch.tensor([advantage]), torch.tensor(1.0), "clip", 0.2)
            assert loss.item() == pytest.approx(-(bound(ratio.detach(), limit) * advantage).item(), rel=1e-12)
            (slope,) = torch.autograd.grad(loss, ratio)
            beyond = r > 1.2 if advantage > 0 else r < 0.8  # outside, on the side that would improve L
            assert slope.item() == (0.0 if beyond else -advantage), (advantage, r)


@pytest.mark.parametrize("surrogate", ["kl", "adaptive-kl"])
def test_kl_penaltys_gradient_is_that_of_the_exact_kl(surrogate):
    """Enumerated: eight samples that hold each action in just its probability under pi_old make the mean an
    expectation."""
    action, old = (
        torch.tensor([0, 0, 0, 0, 1, 1, 2, 3]),
        torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8], dtype=torch.float64),
    )
    logits = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    log_ratio = Categorical(logits.expand(8, 4)).log_prob(action) - old.log()[action]
    loss = policy_loss(log_ratio.exp(), log_ratio, torch.zeros(8), torch.tensor(0.7), surrogate, 0.2)
    exact = 0.7 * td.kl_divergence(td.Categorical(probs=old), td.Categorical(logits=logits))
    torch.testing.assert_close(loss, exact)
    ours, theirs = (torch.autograd.grad(x, logits)[0] for x in (loss, exact))
    torch.testing.assert_close(ours, theirs)
    reverse = 0.7 * td.kl_divergence(td.Categorical(logits=logits), td.Categorical(probs=old))
    assert (torch.autograd.grad(reverse, logits)[0] - ours).abs().max() > 0.05  # not KL(pi || pi_old)


def test_value_loss_by_hand():
    value, old, return_ = (
        torch.tensor([1.0, 3.0, -1.0]),
        torch.tensor([0.0, 2.9, 1.0]),
        torch.tensor([2.0, 3.0, 0.0]),
    )
    assert value_loss(value, old, return_, None).item() == pytest.approx((1 + 0 + 1) / 3)
    # clipped to old +- 0.5: 0.5, 3, 0.5, with errors 2.25, 0, 0.25; the worse: 2.25, 0, 1
    assert value_loss(value, old, return_, 0.5).item() == pytest.approx((2.25 + 0 + 1) / 3)


B, D, A = 40, 3, 4  # batch, observation, actions


def linear_forward(discrete):
    """A policy and a critic linear in the observation, as a function of one flat vector."""

    def forward(params, obs):
        weights, log_std, value_weights = params.split((D * A, A, D))
        mean = obs @ weights.view(D, A)
        return Categorical(mean) if discrete else Gaussian(mean, log_std), obs @ value_weights

    return forward


def reference_loss(params, batch, beta, args, discrete):
    """The loss as NumPy, row by row, has it."""
    weights, log_std, value_weights = np.split(params, (D * A, D * A + A))
    terms, kls, clipped, v_errors, entropies = [], [], [], [], []
    obs, action, old_log_prob, old_value, advantage, return_ = (np.asarray(column) for column in batch)
    if args.normalize_advantages:
        advantage = (advantage - np.mean(advantage)) / (np.std(advantage) + 1e-8)  # NumPy's std has ddof 0
    for i in range(B):
        mean = obs[i] @ weights.reshape(D, A)
        if discrete:
            dist = td.Categorical(logits=torch.from_numpy(mean))
            log_prob = dist.log_prob(torch.tensor(action[i])).item()
            entropies.append(dist.entropy().item())
        else:
            log_prob = sum(
                -((a - m) ** 2) / (2 * math.exp(2 * s)) - s - math.log(2 * math.pi) / 2
                for a, m, s in zip(action[i], mean, log_std, strict=True)
            )
            entropies.append(sum(s + (1 + math.log(2 * math.pi)) / 2 for s in log_std))
        r = math.exp(log_prob - old_log_prob[i])
        kls.append(r - 1 - math.log(r))
        clipped.append(not 1 - args.clip <= r <= 1 + args.clip)
        if args.surrogate == "clip":
            limited = min(r, 1 + args.clip) if advantage[i] > 0 else max(r, 1 - args.clip)
            terms.append(limited * advantage[i])
        else:
            terms.append(r * advantage[i] - (beta * kls[-1] if "kl" in args.surrogate else 0))
        value = obs[i] @ value_weights
        error = (value - return_[i]) ** 2
        if args.value_clip is not None:
            near = min(max(value, old_value[i] - args.value_clip), old_value[i] + args.value_clip)
            error = max(error, (near - return_[i]) ** 2)
        v_errors.append(error)
    loss = -np.mean(terms) + args.value_coef * np.mean(v_errors) - args.entropy_coef * np.mean(entropies)
    metrics = dict(policy_loss=-np.mean(terms), value_loss=np.mean(v_errors), entropy=np.mean(entropies))
    return loss, metrics | dict(approx_kl=np.mean(kls), clipfrac=np.mean(clipped))


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("normalize_advantages", [True, False])
@pytest.mark.parametrize("value_clip", [None, 0.3])
@pytest.mark.parametrize("surrogate", ["clip", "kl", "adaptive-kl", "unclipped"])
def test_loss_and_gradient_equal_the_formula(surrogate, value_clip, normalize_advantages, discrete):
    args = Args(
        surrogate=surrogate, value_clip=value_clip, normalize_advantages=normalize_advantages, clip=0.15,
        value_coef=0.6, entropy_coef=0.05,
    )  # fmt: skip
    rng = np.random.default_rng(3)
    params = rng.normal(size=D * A + A + D) * 0.5
    obs = rng.normal(size=(B, D))
    action = rng.integers(0, A, B) if discrete else rng.normal(size=(B, A))
    batch = Batch(*map(torch.from_numpy, (
        obs, action, np.zeros(B), obs @ params[-D:] + rng.normal(size=B) * 0.4,
        rng.normal(0.5, 2.0, B), rng.normal(size=B),
    )))  # fmt: skip
    forward = linear_forward(discrete)
    now = forward(torch.from_numpy(params), batch.obs)[0].log_prob(batch.action)
    # ratios on both sides of the range
    batch = batch._replace(log_prob=now + torch.from_numpy(rng.normal(size=B) * 0.3))
    beta = torch.tensor(1.7, dtype=torch.float64)
    gradient, (loss, metrics) = grad_and_value(ppo_loss, has_aux=True)(
        torch.from_numpy(params), batch, beta, forward, args
    )
    expected, expected_metrics = reference_loss(params, batch, 1.7, args, discrete)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    net: Any = SimpleNamespace(policy=lambda obs: forward(torch.from_numpy(params), obs)[0])
    metrics |= {"approx_kl": ppo.approx_kl(net, batch)}  # which is not the loss's to measure
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        expected_metrics, rel=1e-6
    )
    assert 0.2 < metrics["clipfrac"] < 0.9
    h = 1e-6
    for i, ours in enumerate(gradient.tolist()):
        step = h * np.eye(len(params))[i]
        up, down = (reference_loss(params + sign * step, batch, 1.7, args, discrete)[0] for sign in (1, -1))
        assert ours == pytest.approx((up - down) / (2 * h), abs=1e-7), i


def test_adapting_the_kl_coefficient():
    """The PPO paper's section 4: halve below d / 1.5, double above 1.5 d."""
    for kl, factor in (
        (0.0, 0.5),
        (0.0066, 0.5),
        (0.0067, 1.0),
        (0.01, 1.0),
        (0.0149, 1.0),
        (0.0151, 2.0),
        (1.0, 2.0),
    ):
        assert adapt_kl_coef(torch.tensor(3.0), torch.tensor(kl), 0.01).item() == pytest.approx(3 * factor), (
            kl
        )
    low, high = torch.tensor(1.0), torch.tensor(1.0)
    for _ in range(200):  # a target that is never left, or never reached
        low, high = adapt_kl_coef(low, torch.tensor(0.0), 0.01), adapt_kl_coef(high, torch.tensor(1.0), 0.01)
    assert low == pytest.approx(1e-6) and high == 1e6


# --- what train hands to the update -------------------------------------------------------------------------

EVEN_ODD = 10  # a seed under which the first environment's seed is even and the second's odd

SMALL: dict[str, Any] = dict(
    num_envs=8, num_steps=16, minibatch_size=128, num_epochs=10, learning_rate=1e-2, hidden=(16,),
    gamma=0.9, eval_every=0, total_steps=128 * 12, normalize_obs=False, scale_rewards=False, device="cpu",
    compile=False, progress=False, env_threads=1, log_std=-1.0, normalize_advantages=False,
)  # fmt: skip


def small(folder, env, **changes):
    return Args(**{**SMALL, "env": env, "run_dir": str(folder), **changes})


def rows(folder):
    """progress.csv without the clocks."""
    with open(Path(folder) / "progress.csv", newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in ("wall_time", "sps")} for row in csv.DictReader(file)
        ]


@pytest.fixture
def spy(monkeypatch):
    """The calls of PPO's functions in order: spy["update"] is a list of calls, each with the arguments by
    their names and with `result`."""
    calls: dict[str, list[SimpleNamespace]] = {}

    def watch(name):
        function, calls[name] = getattr(ppo, name), []
        signature = inspect.signature(function)

        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            calls[name].append(SimpleNamespace(**signature.bind(*args, **kwargs).arguments, result=result))
            return result

        monkeypatch.setattr(ppo, name, call)

    for name in ("draw_noise", "policy_at", "collect", "as_seen", "gae", "update", "adapt_kl_coef"):
        watch(name)
    return calls


def critic(call, params, obs):
    """V by the network of an update's call, at any parameters."""
    return call.forward(params, obs)[1]


def log_prob(call, params, obs, action):
    """The same of log pi."""
    return call.forward(params, obs)[0].log_prob(action)


@pytest.mark.parametrize("normalize_advantages", [True, False])
def test_targets_bootstrap_from_the_true_successor_and_from_the_raw_advantage(
    tmp_path, spy, normalize_advantages
):
    """On the script of probes.py, lambda 0: R = r + gamma (1 - terminated) V(next_obs) for every row, of two
    iterations."""
    from test_envs import FIRST, SECOND

    # seeds that are even and odd start the two copies with the first and the second episode
    assert [seed % 2 for seed in env_seeds(EVEN_ODD, "environments", 2, 0)] == [0, 1]
    ppo.train(small(
        tmp_path, "probe/Scripted-v0", num_envs=2, num_steps=8, minibatch_size=16, total_steps=32,
        num_epochs=1, seed=EVEN_ODD, gae_lambda=0.0, normalize_advantages=normalize_advantages,
        normalize_obs=True,
    ))  # fmt: skip
    transitions = {row[0]: row for row in FIRST + SECOND}
    assert len(spy["update"]) == 2 and len(transitions) == 8
    for iteration, call in enumerate(spy["update"]):
        params, batch = call.params, call.batch
        stats = spy["policy_at"][iteration].obs_stats  # of the observations when these were acted on
        assert stats["count"] == 16 * iteration
        if iteration:
            assert stats["mean"].item() == pytest.approx(
                np.mean([row[0] for row in FIRST + SECOND]), rel=1e-12
            )

        def value(obs, call=call, params=params, stats=stats):
            return critic(call, params, normalize(torch.tensor([[float(obs)]]), stats))

        seen = {obs: normalize(torch.tensor([float(obs)]), stats) for obs in transitions}
        found = [next(obs for obs in transitions if torch.equal(seen[obs], row)) for row in batch.obs]
        assert set(found) == set(transitions)
        for i, obs in enumerate(found):
            _, reward, next_obs, terminated, _ = transitions[obs]
            target = reward + 0.9 * (1 - terminated) * value(next_obs)
            torch.testing.assert_close(batch.return_[i : i + 1], target, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(batch.value[i : i + 1], value(obs), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(batch.advantage[i : i + 1], target - value(obs), rtol=1e-5, atol=1e-5)
        if iteration:
            # the wrong successors, the first observations after the two truncations, have other values
            assert abs(value(21) - value(30)) > 0.01 and abs(value(33) - value(40)) > 0.01
    assert batch.advantage.mean().abs() > 0.1 and abs(batch.advantage.std(unbiased=False) - 1) > 0.1  # raw


def joined(calls):
    """The minibatches of some updates as one batch."""
    return Batch(*map(torch.cat, zip(*(call.batch for call in calls), strict=True)))


@pytest.mark.parametrize("recompute", [True, False])
def test_epochs_visit_every_transition_and_recompute_advantages_when_asked(tmp_path, spy, recompute):
    ppo.train(small(
        tmp_path, "CartPole-v1", minibatch_size=32, num_epochs=3, total_steps=256,
        recompute_advantages=recompute,
    ))  # fmt: skip
    updates = spy["update"]
    assert len(updates) == 2 * 3 * 4
    for iteration in (updates[:12], updates[12:]):
        epochs = [iteration[0:4], iteration[4:8], iteration[8:12]]
        columns = [joined(epoch) for epoch in epochs]
        orders = [column.obs[:, 0].argsort() for column in columns]
        for epoch, column, order in zip(epochs, columns, orders, strict=True):
            assert torch.equal(column.obs[order], columns[0].obs[orders[0]])
            for name in ("log_prob", "value"):  # pi_old's and the rollout's critic's, in every epoch
                now, first = getattr(column, name)[order], getattr(columns[0], name)[orders[0]]
                assert torch.equal(now, first), name
            params = epoch[0].params if recompute else epochs[0][0].params
            value = critic(epoch[0], params, column.obs)  # of the advantages
            torch.testing.assert_close(column.return_, column.advantage + value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            columns[0].value, critic(iteration[0], iteration[0].params, columns[0].obs), rtol=1e-5, atol=1e-5
        )
        same = torch.equal(columns[2].advantage[orders[2]], columns[0].advantage[orders[0]])
        assert same != recompute
        assert not torch.equal(columns[0].obs, columns[1].obs)  # shuffled anew
        call, batch = iteration[0], iteration[0].batch
        # the first ratio is 1
        torch.testing.assert_close(log_prob(call, call.params, batch.obs, batch.action), batch.log_prob)
    for row, estimate in zip(rows(tmp_path), spy["gae"][:: 3 if recompute else 1], strict=True):
        advantage, return_ = estimate.result.numpy(), (estimate.result + estimate.value).numpy()
        unexplained = np.var(advantage) / np.var(return_)
        assert float(row["explained_variance"]) == pytest.approx(1 - unexplained, rel=1e-3)
        assert abs(unexplained - 1) > 1e-3  # else its inverse would be the same
    for before, after in pairwise(updates):  # every update goes on from the last one
        assert torch.equal(before.result[0], after.params) and before.result[1] is after.opt


def test_learning_rate_falls_linearly_or_stays(tmp_path):
    for anneal in (True, False):
        args = small(tmp_path / str(anneal), "probe/Act-v0", total_steps=640, num_epochs=1, anneal=anneal)
        ppo.train(args)
        rates = [float(row["learning_rate"]) for row in rows(args.run_dir)]
        assert rates == pytest.approx([1e-2 * (1 - i / 5 if anneal else 1) for i in range(5)], rel=1e-6)


def test_rewards_are_scaled_by_the_deviation_of_discounted_sums(tmp_path, spy):
    """With episodes of one step the discounted sums are the rewards."""
    ppo.train(
        small(tmp_path, "probe/ActBox-v0", scale_rewards=True, total_steps=256, num_epochs=1, gae_lambda=1.0)
    )
    first = spy["update"][0].batch
    raw = -((2 * first.action[:, 0].clamp(-1, 1) + 1) ** 2)  # the action 4 + 2a, less 3, squared
    torch.testing.assert_close(first.return_, raw / raw.std(unbiased=False), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("steps", "counted"), [(None, [0, 128, 256, 384, 512]), (200, [0, 128, 256, 256, 256])]
)
def test_observations_are_counted_as_long_as_asked(tmp_path, spy, steps, counted):
    """What acts sees rollouts of 128 steps counted that began before `steps`, and the agent keeps them."""
    given = dict(normalize_obs=True, normalizer_steps=steps, num_epochs=1, total_steps=640)
    ppo.train(small(tmp_path, "probe/ObservedReward-v0", **given))
    assert [int(call.obs_stats["count"]) for call in spy["policy_at"][:5]] == counted
    saved = torch.load(tmp_path / "agent.pt", weights_only=True)["state"]["obs_stats"]
    assert int(saved["count"]) == (640 if steps is None else 256)


def test_batches_hold_the_transitions_as_they_were(tmp_path, spy, monkeypatch):
    """Three rollouts, against a plain account of them: what of each transition reaches the estimator and the
    updates. Episodes of 5 steps cross the boundaries between rollouts of 32, and one reward of 256 is large:
    scaled it stands 14 deviations out."""
    collected, rng = [], np.random.default_rng(1)
    collect = ppo.collect

    def collect_rewarded(*args):
        rollout, obs, episodes = collect(*args)
        reward = rng.normal(0.0, 0.01, (32, 8)).astype(np.float32)
        reward[-1, 3] = 1000.0  # in the midst of an episode, so that the sum is carried over
        collected.append(rollout._replace(reward=torch.from_numpy(reward)))
        return collected[-1], obs, episodes

    monkeypatch.setattr(ppo, "collect", collect_rewarded)
    ppo.train(small(
        tmp_path, "probe/Endless-v0", num_steps=32, num_epochs=1, minibatch_size=64, total_steps=3 * 256,
        gamma=0.5, scale_rewards=True, normalize_obs=True, learning_rate=1e-3,
    ))  # fmt: skip
    sums, running = [], np.zeros(8)
    for i, (rollout, estimate) in enumerate(zip(collected, spy["gae"], strict=True)):
        for reward, truncated in zip(rollout.reward.double().numpy(), rollout.truncated.numpy(), strict=True):
            running = 0.5 * running + reward
            sums.append(running)
            running = running * ~truncated
        assert running[3] == pytest.approx(1000, rel=1e-3)
        expected = rollout.reward / np.std(sums)
        assert expected.max() > 10
        torch.testing.assert_close(estimate.reward.double(), expected.double(), rtol=1e-5, atol=1e-9)
        assert torch.equal(estimate.truncated, rollout.truncated) and rollout.truncated.sum() >= 48
        assert torch.equal(estimate.terminated, rollout.terminated)
        return_ = estimate.result + estimate.value
        batch = joined(spy["update"][4 * i : 4 * i + 4])
        before = spy["policy_at"][i].obs_stats
        held = {tuple(row) for row in torch.stack((batch.advantage, batch.return_, batch.value), 1).tolist()}
        assert held == {
            tuple(row)
            for row in torch.stack((estimate.result, return_, estimate.value), -1).flatten(0, 1).tolist()
        }
        seen = normalize(rollout.obs, before).flatten(0, 1)
        assert torch.equal(batch.obs.sort(0)[0], seen.sort(0)[0])
        assert torch.equal(batch.action.sort()[0], rollout.action.flatten().sort()[0])


def kl_of(call, params, batch):
    """KL(pi_old || pi) by the batch's own actions, from the parameters, with torch's distributions."""
    dist = call.forward(params, batch.obs)[0]
    if isinstance(dist, Categorical):
        now = td.Categorical(logits=dist.logits.double()).log_prob(batch.action)
    else:
        now = td.Normal(dist.mean.double(), dist.log_std.double().exp()).log_prob(batch.action).sum(-1)
    r = (now - batch.log_prob.double()).exp()
    return (r - 1 - r.log()).mean().item()


@pytest.mark.parametrize("minibatch_size", [128, 32])
@pytest.mark.parametrize("env", ["probe/ActOnObs-v0", "probe/ActOnObsBox-v0"])
def test_the_kl_is_that_of_the_whole_batch_after_the_update(tmp_path, spy, env, minibatch_size):
    ppo.train(small(
        tmp_path, env, surrogate="adaptive-kl", num_epochs=1, minibatch_size=minibatch_size, total_steps=512,
        learning_rate=0.02, target_kl=0.01,
    ))  # fmt: skip
    updates, n, kl_coef = spy["update"], 128 // minibatch_size, 1.0
    for i, row in enumerate(rows(tmp_path)):
        epoch = updates[n * i : n * i + n]
        kl = kl_of(epoch[-1], epoch[-1].result[0], joined(epoch))
        assert kl > 1e-4  # that before the only step would be 0
        assert float(row["approx_kl"]) == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert all(call.kl_coef == kl_coef for call in epoch)
        kl_coef *= 2.0 if kl > 0.015 else 0.5 if kl < 0.01 / 1.5 else 1.0
        assert float(row["kl_coef"]) == kl_coef


def test_target_kl_reads_the_whole_batch_after_each_epoch(tmp_path, spy):
    ppo.train(small(
        tmp_path, "probe/ActOnObsBox-v0", minibatch_size=8, total_steps=1024, learning_rate=0.002,
        target_kl=0.02,
    ))  # fmt: skip
    updates = iter(spy["update"])
    counts = [int(row["epochs"]) for row in rows(tmp_path)]
    for count in counts:
        epochs = [[next(updates) for _ in range(16)] for _ in range(count)]
        kls = [kl_of(epoch[-1], epoch[-1].result[0], joined(epoch)) for epoch in epochs]
        assert all(kl <= 0.02 for kl in kls[:-1]), kls
        assert kls[-1] > 0.02 or count == 10, kls
    assert next(updates, None) is None and min(counts) < 10


@pytest.mark.parametrize("recompute", [True, False])
def test_value_clip_holds_v_near_the_rollouts_in_all_epochs(tmp_path, recompute):
    """One update towards a target that is 1 away: of V, the momentum may carry it a little beyond."""
    moved = {}
    for value_clip in (0.02, None):
        folder = tmp_path / str(value_clip)
        args = small(
            folder, "probe/ConstantValue-v0", value_clip=value_clip, recompute_advantages=recompute,
            minibatch_size=16, num_epochs=20, learning_rate=1e-3, total_steps=128, value_coef=1.0,
        )  # fmt: skip
        torch.manual_seed(ppo.generator_seed(args.seed, "network"))
        with make_envs(args.env, 1) as envs:
            before = ppo.ActorCritic(envs, args.hidden, args.log_std, args.shared_network)
        value, _ = learnt(args)
        moved[value_clip] = abs(value(0)[0] - before.value(torch.zeros(1, 1)).item())
    assert moved[None] > 0.5 and moved[0.02] < 0.06, moved


def test_a_coefficient_set_in_mid_run_counts_compiled_and_eagerly(tmp_path, monkeypatch, traced, no_fallback):
    """What is written is what runs: `args` may be edited within the loop. Compiled here means traced, with
    all of its guards, without the kernels, which take long and have no part in this."""
    collect, args, calls = ppo.collect, Args(), 0

    def collect_and_edit(*arguments):
        nonlocal calls
        calls += 1
        if calls % 4 == 3 and edited:  # the third of four iterations
            args.entropy_coef = 5.0
        return collect(*arguments)

    monkeypatch.setattr(ppo, "collect", collect_and_edit)
    monkeypatch.setattr(ppo, "replace", lambda args: args)  # `args` here is the loop's own
    entropies = {}
    for edited, compiled in ((False, False), (True, False), (True, True)):
        args = small(
            tmp_path / f"{edited}{compiled}", "probe/ActBox-v0", compile=compiled, total_steps=512,
            num_epochs=5, learning_rate=1e-2, hidden=(4,),
        )  # fmt: skip
        ppo.train(args)
        entropies[edited, compiled] = [float(row["entropy"]) for row in rows(args.run_dir)]
    plain, eager, compiled_ = entropies.values()
    assert eager[:2] == plain[:2] and eager[3] - plain[3] > 0.03
    assert compiled_ == pytest.approx(eager, abs=2e-3)
    assert len(traced) == 2  # once more, and not eagerly


def test_noise_is_no_copy_of_what_the_networks_began_with(tmp_path, spy, monkeypatch):
    """One seed, but a stream for each purpose: else the first exploration numbers are the first weights."""
    first = []
    init = ppo.ActorCritic.__init__

    def init_and_look(self, *args):
        with torch.random.fork_rng(devices=[]):
            first.append((torch.randn(1024).numpy(), torch.get_rng_state()))
        init(self, *args)

    monkeypatch.setattr(ppo.ActorCritic, "__init__", init_and_look)
    noise = []
    for seed in (1, 2):
        ppo.train(small(
            tmp_path / str(seed), "probe/ActBox-v0", seed=seed, num_steps=128, num_epochs=1, total_steps=1024
        ))  # fmt: skip
        noise.append(spy["draw_noise"][-1].result.flatten().numpy())
    streams = [first[0][0], *noise, first[2][0]]  # each run's first network is the trained one
    correlation = np.abs(np.corrcoef(streams) - np.eye(4))
    assert correlation.max() < 5 / 1024**0.5, correlation


def test_a_resumed_run_begins_other_episodes(tmp_path, spy):
    """Starts that were seen at step 0 are not seen again."""
    args = small(tmp_path, "CartPole-v1", total_steps=128, num_epochs=1)
    ppo.train(args)
    for total_steps in (256, 384):
        ppo.train(replace(args, run_dir=None, resume=str(tmp_path), total_steps=total_steps))
    starts = np.concatenate([call.obs for call in spy["collect"]])
    assert len(spy["collect"]) == 3 and len(np.unique(starts, axis=0)) == len(starts) == 24


def test_observations_that_differ_in_float64_only_are_told_apart(tmp_path, spy):
    """1e8 and 1e8 + 1 are one number in float32; normalised they are -1 and 1."""
    ppo.train(small(tmp_path, "probe/Far-v0", normalize_obs=True, num_epochs=1, total_steps=256))
    obs = spy["update"][1].batch.obs.flatten()
    assert len(obs.unique()) == 2 and obs.max() - obs.min() == pytest.approx(2.0, abs=0.1)
    assert obs.dtype == torch.float32
    acting = spy["policy_at"][1].result(np.array([[1e8], [1e8 + 1]]))  # by the same statistics
    assert (acting.logits[0] - acting.logits[1]).abs().max() > 1e-4


def test_updates_equal_torchs_clipping_and_adam(tmp_path, spy):
    """With the rate that has fallen by then, and what is told of them is their mean."""
    args = small(
        tmp_path, "probe/ActBox-v0", total_steps=256, num_epochs=1, minibatch_size=32, anneal=True,
        max_grad_norm=0.1,
    )  # fmt: skip
    ppo.train(args)
    updates = spy["update"]
    theirs = updates[0].params.clone().requires_grad_()
    optimizer, norms = torch.optim.Adam([theirs], lr=1.0, eps=1e-5), []
    for i, call in enumerate(updates):
        loss, _ = ppo_loss(theirs, call.batch, call.kl_coef, call.forward, args)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_([theirs], 0.1).item())
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - i // 4 / 2)
        optimizer.step()
        torch.testing.assert_close(call.result[0], theirs.detach(), rtol=1e-4, atol=1e-5)
    assert min(norms) > 0.1 and len(norms) == 8
    told = [float(row["grad_norm"]) for row in rows(tmp_path)]
    assert told == pytest.approx([np.mean(norms[:4]), np.mean(norms[4:])], rel=1e-3)


def test_the_table_tells_of_the_episodes_that_ended(tmp_path):
    ppo.train(small(tmp_path, "probe/Endless-v0", total_steps=256, num_epochs=1))
    assert [(row["train_return"], row["train_length"]) for row in rows(tmp_path)] == [("5", "5")] * 2


# --- degenerate inputs --------------------------------------------------------------------------------------


def test_a_task_on_which_all_rewards_are_equal_and_the_critic_becomes_exact(tmp_path):
    """Every deviation that something is divided by is 0."""
    value, _ = learnt(small(
        tmp_path, "probe/ConstantValue-v0", scale_rewards=True, normalize_obs=True, normalize_advantages=True,
        surrogate="adaptive-kl", value_clip=0.5, total_steps=128 * 12,
    ))  # fmt: skip
    assert value(0) == pytest.approx([1.0], abs=0.05)  # divided by no deviation
    table = rows(tmp_path)
    assert len(table) == 12
    assert all(math.isfinite(float(x)) for row in table for x in row.values() if x)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("normalize_advantages", [True, False])
@pytest.mark.parametrize("surrogate", ["clip", "kl", "unclipped"])
def test_updates_of_degenerate_batches_are_finite_and_small(surrogate, normalize_advantages, scale):
    """Advantages all equal, an exact critic and, with logits of +-1e4, a policy that has no entropy."""
    args = Args(surrogate=surrogate, normalize_advantages=normalize_advantages, entropy_coef=0.01)
    rng = torch.Generator().manual_seed(0)
    obs = torch.randn(B, D, generator=rng).sign()
    params = torch.cat((scale * torch.randn(D * A, generator=rng), torch.zeros(A), torch.ones(D)))
    forward = linear_forward(discrete=True)
    dist, value = forward(params, obs)
    old_log_prob = dist.log_prob(dist.mode())
    batch = Batch(obs, dist.mode(), old_log_prob, value, torch.full((B,), 0.7), value)
    new, _, metrics = ppo.update(
        params, new_adam(params), batch, torch.tensor(1e-3), torch.tensor(1.0), forward, args
    )
    assert torch.isfinite(new).all() and all(torch.isfinite(x) for x in metrics.values()), metrics
    assert (new - params).abs().max() < 1.1e-3
    assert metrics["value_loss"] == 0 and torch.equal(new[-D:], params[-D:])  # nothing to learn for V
    net: Any = SimpleNamespace(policy=lambda obs: forward(new, obs)[0])
    assert 0 <= ppo.approx_kl(net, batch) < 1e-2
    if scale == 1e4:
        assert metrics["entropy"] == 0
        if normalize_advantages:  # advantages all equal are none, once centred
            assert torch.equal(new, params) and metrics["grad_norm"] == 0


# --- probe environments -------------------------------------------------------------------------------------


def learnt(args):
    """What a run leaves in agent.pt: V of observations, and the deterministic policy's actions in the
    environment's scale."""
    ppo.train(args)
    acting = load_checkpoint(Path(args.run_dir) / "agent.pt", "--agent")["state"]
    envs = make_envs(args.env, 1)
    net = ppo.ActorCritic(envs, args.hidden, args.log_std, args.shared_network)
    params = ppo.flatten(net)[1](acting["params"])
    policy = ppo.make_policy(envs, args, acting)

    def value(*obs):
        seen = normalize(torch.tensor(obs, dtype=torch.float32)[:, None], acting["obs_stats"])
        return torch.func.functional_call(net, params, (seen,))[1].tolist()

    def act(*obs):
        return envs.to_env_action(policy(np.array(obs, np.float32)[:, None])).reshape(-1).tolist()

    return value, act


def test_probe_value_of_a_constant(tmp_path):
    value, _ = learnt(small(tmp_path, "probe/ConstantValue-v0"))
    assert value(0) == pytest.approx([1.0], abs=0.02)


@pytest.mark.parametrize("shared", [False, True])
def test_probe_reading_the_observation(tmp_path, shared):
    value, _ = learnt(small(tmp_path, "probe/ObservedReward-v0", shared_network=shared))
    assert value(-1, 1) == pytest.approx([-1.0, 1.0], abs=0.02)


def test_probe_discounting(tmp_path):
    value, _ = learnt(small(tmp_path, "probe/Discount-v0", gamma=0.7))
    assert value(0, 1) == pytest.approx([0.7, 1.0], abs=0.02)


def test_probe_time_limit_is_no_end_of_the_world(tmp_path):
    """Reward 1 for ever, cut every 5 steps: V = 1 / (1 - 0.9), where a truncation taken for a termination
    makes at most 4.1."""
    value, _ = learnt(small(tmp_path, "probe/Endless-v0", total_steps=128 * 30))
    assert value(0) == pytest.approx([10.0], abs=0.3)


def test_probe_acting(tmp_path):
    _, act = learnt(small(tmp_path, "probe/Act-v0"))
    assert act(0) == [1]


def test_probe_acting_in_a_box(tmp_path):
    _, act = learnt(small(tmp_path, "probe/ActBox-v0"))
    assert act(0) == pytest.approx([3.0], abs=0.1)


@pytest.mark.parametrize(
    "changes",
    [{}, dict(surrogate="kl"), dict(surrogate="adaptive-kl"), dict(surrogate="unclipped"),
     dict(normalize_advantages=True), dict(shared_network=True, entropy_coef=0.01), dict(target_kl=0.02),
     dict(normalize_obs=True, scale_rewards=True)],
    ids=lambda changes: ",".join(changes) or "defaults",
)  # fmt: skip
def test_probe_acting_on_the_observation(tmp_path, changes):
    _, act = learnt(small(tmp_path, "probe/ActOnObs-v0", **changes))
    assert act(-1, 1) == [0, 1]


@pytest.mark.parametrize(
    "changes", [{}, dict(shared_network=True, surrogate="adaptive-kl"), dict(value_clip=0.5)]
)
def test_probe_acting_on_the_observation_in_a_box(tmp_path, changes):
    _, act = learnt(small(tmp_path, "probe/ActOnObsBox-v0", **changes))
    assert act(-1, 1) == pytest.approx([3.0, 5.0], abs=0.2)


# --- whole runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["probe/ActOnObs-v0", "probe/ActOnObsBox-v0"])
def test_target_kl_ends_the_epochs(tmp_path, env):
    for target_kl in (None, 1e6, 0.001):
        args = small(
            tmp_path / str(target_kl), env, learning_rate=0.05, target_kl=target_kl, total_steps=128 * 6
        )
        ppo.train(args)
        epochs = [int(row["epochs"]) for row in rows(args.run_dir)]
        assert max(epochs) < 10 and min(epochs) < 5 if target_kl == 0.001 else epochs == [10] * 6


def test_adaptive_kl_moves_its_coefficient_and_runs_all_epochs(tmp_path):
    args = small(
        tmp_path,
        "probe/ActOnObsBox-v0",
        surrogate="adaptive-kl",
        learning_rate=0.05,
        target_kl=1e-4,
        total_steps=640,
    )
    ppo.train(args)
    assert [float(row["kl_coef"]) for row in rows(tmp_path)] == [
        2,
        4,
        8,
        16,
        32,
    ]  # the KL stays far above the target
    assert {row["epochs"] for row in rows(tmp_path)} == {"10"}


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_the_same_seed_gives_the_same_table(tmp_path, env):
    changes = dict(
        total_steps=640, eval_every=256, eval_episodes=2, normalize_obs=True, scale_rewards=True, num_epochs=2
    )
    tables: list[list[dict]] = []
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        torch.manual_seed(len(tables))  # nothing of the process's own generators may matter
        np.random.seed(len(tables))  # noqa: NPY002
        ppo.train(small(tmp_path / name, env, seed=seed, **changes))
        tables.append(rows(tmp_path / name))
    assert tables[0] == tables[1]
    assert tables[0] != tables[2] and len(tables[0]) == 5
    assert [bool(row["eval_return"]) for row in tables[0]] == [False, True, False, True, True]


def test_a_stopped_run_resumed_equals_one_that_was_not(tmp_path, monkeypatch):
    """On a task without memory across steps nothing but the checkpoint's content matters, so the tables are
    equal."""
    changes = dict(
        surrogate="adaptive-kl",
        normalize_obs=True,
        scale_rewards=True,
        num_epochs=3,
        total_steps=128 * 7,
        checkpoint_every=1e-9,
    )
    whole, halves = (
        small(tmp_path / name, "probe/ActOnObsBox-v0", **changes) for name in ("whole", "halves")
    )
    # a resumed run seeds its environments anew: here every iteration does, by its number
    collect, calls = ppo.collect, list[int]()

    def collect_reseeded(envs, obs, policy, noise):
        calls.append(len(calls))
        if stop_at is not None and len(calls) == stop_at:
            raise RunFault("power cut")
        return collect(envs, envs.reset([8 * len(calls) + i for i in range(8)]), policy, noise)

    monkeypatch.setattr(ppo, "collect", collect_reseeded)
    stop_at: int | None = None
    ppo.train(whole)
    calls.clear()
    stop_at = 5
    with Process(), pytest.raises(RunFault, match="power cut"):  # which closes the run, as in main
        ppo.train(halves)
    assert load_checkpoint(tmp_path / "halves" / "checkpoint.pt", "--resume")["step"] == 128 * 4
    assert len(rows(tmp_path / "halves")) == 4
    calls.pop()
    stop_at = None
    ppo.train(replace(halves, run_dir=None, resume=halves.run_dir))
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")
    assert len({row["kl_coef"] for row in rows(tmp_path / "whole")}) > 1
    ends = [
        load_checkpoint(tmp_path / name / "checkpoint.pt", "--resume")["state"]
        for name in ("whole", "halves")
    ]
    assert ends[0].keys() == ends[1].keys()
    for name in ("params", "generator"):
        assert torch.equal(ends[0][name], ends[1][name])


def test_a_finished_run_can_be_resumed_and_says_so_or_ends_at_once(tmp_path, command_line):
    """There is nothing left to do (total steps are no multiple of the batch here, whose last one was taken):
    no traceback, and the files stay whole."""
    ppo.train(small(tmp_path, "probe/Act-v0", total_steps=300, num_epochs=1, anneal=True))
    table = rows(tmp_path)
    assert [row["step"] for row in table] == ["128", "256", "384"]
    assert float(table[-1]["learning_rate"]) == pytest.approx(1e-2 * (1 - 256 / 300), rel=1e-5)
    assert command_line("--resume", tmp_path) == (0, [])
    assert rows(tmp_path) == table
    assert load_checkpoint(tmp_path / "checkpoint.pt", "--resume")["step"] == 384


@pytest.mark.filterwarnings("error")
def test_a_batch_of_two_transitions_and_minibatches_of_one(tmp_path, command_line):
    """The smallest there is: a batch of one has no variance and is refused."""
    status, lines = command_line(
        "--env", "probe/Act-v0", "--num-envs", 1, "--num-steps", 2, "--minibatch-size", 1, "--total-steps", 5,
        "--no-compile", "--run-dir", tmp_path, "--no-normalize-advantages",
    )  # fmt: skip
    assert (status, lines) == (0, [])
    assert [row["step"] for row in rows(tmp_path)] == ["2", "4", "6"]


def test_cartpole_is_learnt(tmp_path, monkeypatch, capsys):
    """From the command line, with half the epochs of the task's own settings and a third of their steps."""
    run = [
        "ppo.py", "--env", "CartPole-v1", "--num-epochs", "5", "--total-steps", "32768",
        "--no-compile", "--run-dir", str(tmp_path),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", run)
    main(Args, ppo.train, lambda env: ppo.SETTINGS.get(env, {}))
    out = capsys.readouterr().out
    told = re.fullmatch(r"final evaluation: (\S+) ± \S+ over 10 episodes\n", out)
    assert told, out
    mean = float(told[1])
    assert mean >= 475
    assert float(rows(tmp_path)[-1]["eval_return"]) == pytest.approx(mean, abs=0.01)


# --- bad input and faults -----------------------------------------------------------------------------------


@pytest.fixture
def command_line(monkeypatch, capsys):
    """Run PPO's command line in this process: its exit status and the lines on stderr, without those that
    tell of the run's folder."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["ppo.py", *map(str, argv)])
        capsys.readouterr()
        try:
            main(Args, ppo.train, lambda env: ppo.SETTINGS.get(env, {}))
            status: Any = 0
        except SystemExit as end:
            status = end.code
        told = ("run folder: ", "to watch it: ", "to evaluate it: ", "finished at step ")
        return status, [line for line in capsys.readouterr().err.splitlines() if not line.startswith(told)]

    old = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield run
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), old, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--minibatch-size", 100], ["--minibatch-size 100", "2048"]),
        (["--minibatch-size", 4096], ["--minibatch-size 4096", "2048"]),
        (["--minibatch-size", 0], ["--minibatch-size", "at least 1", "0"]),
        (
            ["--minibatch-size", 1, "--normalize-advantages"],
            ["--minibatch-size", "at least 2", "--normalize-advantages"],
        ),
        (["--num-envs", 0], ["--num-envs", "at least 1", "0"]),
        (["--num-steps", -3], ["--num-steps", "at least 1", "-3"]),
        (["--num-epochs", 0], ["--num-epochs", "at least 1", "0"]),
        (["--total-steps", -1], ["--total-steps", "at least 1", "-1"]),
        (
            ["--num-envs", 1, "--num-steps", 1, "--minibatch-size", 1],
            ["--num-envs", "--num-steps", "at least 2"],
        ),
        (["--gamma", 1.01], ["--gamma", "[0, 1]", "1.01"]),
        (["--gae-lambda", -0.1], ["--gae-lambda", "[0, 1]", "-0.1"]),
        (["--hidden", 0], ["--hidden"]),
        (["--hidden"], ["--hidden"]),
        (["--clip", -0.2], ["--clip", "-0.2"]),
        (["--learning-rate", -0.001], ["--learning-rate", "-0.001"]),
        (["--learning-rate", "nan"], ["--learning-rate", "nan"]),
        (["--entropy-coef", "nan"], ["--entropy-coef", "finite", "nan"]),
        (["--value-coef", "inf"], ["--value-coef", "finite", "inf"]),
        (["--kl-coef", "nan"], ["--kl-coef", "finite", "nan"]),
        (["--log-std", "-inf"], ["--log-std", "finite", "-inf"]),
        (["--max-grad-norm", 0], ["--max-grad-norm", "0"]),
        (["--target-kl", -1], ["--target-kl", "-1"]),
        (["--value-clip", -1], ["--value-clip", "-1"]),
        (["--env", "HalfCheeta-v4"], ["--env HalfCheeta-v4", "HalfCheetah-v4"]),
        (["--env", "probe/MultiDiscreteAction-v0"], ["--env probe/MultiDiscreteAction-v0", "MultiDiscrete"]),
        (["--env", "probe/DictObs-v0"], ["--env probe/DictObs-v0", "Dict"]),
    ],
)
def test_arguments_that_cannot_work(tmp_path, command_line, argv, words):
    common = [
        "--env",
        "probe/Act-v0",
        "--total-steps",
        2048,
        "--num-epochs",
        1,
        "--no-compile",
        "--run-dir",
        tmp_path / "run",
    ]
    status, lines = command_line(*common, *argv)
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(word in lines[0] for word in words), lines[0]
    assert not (tmp_path / "run").exists()  # before any work is done


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_that_is_absent(tmp_path, command_line):
    status, lines = command_line("--env", "probe/Act-v0", "--device", "cuda", "--run-dir", tmp_path / "run")
    assert status == 2 and len(lines) == 1 and "--device cuda" in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.fixture
def finished(tmp_path):
    """The folder of a finished run."""
    ppo.train(small(tmp_path / "finished", "probe/Act-v0", total_steps=256, num_epochs=1))
    return tmp_path / "finished"


def test_a_folder_in_use_or_not_empty(finished, command_line):
    status, lines = command_line("--env", "probe/Act-v0", "--run-dir", finished)
    assert status == 2 and len(lines) == 1 and f"--run-dir {finished}: not empty" in lines[0]
    with open(finished / ".lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, lines = command_line("--resume", finished, "--total-steps", 512)
    assert status == 2 and len(lines) == 1 and f"--resume {finished}: run folder in use" in lines[0]


@pytest.mark.parametrize("name", ["torn", "garbage", "missing", "other environment"])
def test_a_checkpoint_that_cannot_be_resumed(finished, command_line, name):
    path, argv = finished / "checkpoint.pt", []
    if name == "torn":
        path.write_bytes(path.read_bytes()[:-100])
    elif name == "garbage":
        path.write_text("hello")
    elif name == "missing":
        path.unlink()
    else:
        argv = ["--env", "probe/ActOnObs-v0"]
    before = sorted(finished.iterdir()), (finished / "progress.csv").read_text()
    status, lines = command_line("--resume", finished, *argv)
    assert status == 2 and len(lines) == 1 and f"--resume {finished}" in lines[0], lines
    assert "checkpoint.pt" in lines[0] or "probe/Act-v0" in lines[0]
    assert before == (sorted(finished.iterdir()), (finished / "progress.csv").read_text())


@pytest.mark.parametrize(
    ("argv", "flag"), [(["--hidden", 32], "--hidden (32,)"), (["--shared-network"], "--shared-network True")]
)
def test_a_resumed_run_keeps_its_networks(finished, command_line, argv, flag):
    before = {path: path.read_bytes() for path in sorted(finished.iterdir())}
    status, lines = command_line("--resume", finished, "--total-steps", 512, *argv)
    assert status == 2 and len(lines) == 1 and lines[0].startswith(f"error: {flag}: the run in {finished}"), (
        lines
    )
    assert before == {path: path.read_bytes() for path in sorted(finished.iterdir())}


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("obs", "returned a non-finite observation"),
        ("reward", "returned a non-finite reward"),
        ("raise", "raised ZeroDiv"),
    ],
)
def test_a_faulty_environment_ends_the_run_and_leaves_the_checkpoint(tmp_path, command_line, fault, what):
    """The fault is each copy's 40th step: two iterations of 16 are done."""
    env = f"probe/Faulty-{fault}-v0"
    status, lines = command_line(
        "--env", env, "--num-envs", 2, "--num-steps", 16, "--minibatch-size", 32, "--total-steps", 1000,
        "--no-compile", "--checkpoint-every", 1e-9, "--eval-every", 0, "--run-dir", tmp_path / "run",
    )  # fmt: skip
    assert status == 1 and lines[0].startswith(f"error: {env} {what}"), lines
    assert lines[1:] == [
        f"last good checkpoint: step 64; resume with: python ppo.py --resume {tmp_path / 'run'}"
    ]
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint.pt", "--resume", "ppo", env)
    assert checkpoint["step"] == 64 and torch.isfinite(checkpoint["state"]["params"]).all()
    assert [row["step"] for row in rows(tmp_path / "run")] == ["32", "64"]


def test_a_diverging_run_stops_and_names_the_loss(tmp_path, command_line):
    status, lines = command_line(
        "--env", "probe/ActBox-v0", "--num-envs", 2, "--num-steps", 16, "--minibatch-size", 32,
        "--learning-rate", 1e30, "--total-steps", 3200, "--no-compile", "--run-dir", tmp_path,
        "--surrogate", "unclipped",
    )  # fmt: skip
    assert status == 1 and re.match(
        r"error: \w+ became (nan|inf|-inf) in the iteration that ended at step", lines[0]
    )
    assert not (tmp_path / "agent.pt").exists()


def test_environment_faults_are_run_faults():
    assert issubclass(EnvironmentFault, RunFault)
