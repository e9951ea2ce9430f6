"""The actor-critic: advantages by hand and by enumeration (tiny_mdp.py), its update against torch's parts,
whole runs."""

import csv
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_mdp
import torch
from torch.func import grad

from zoo import actor_critic
from zoo.actor_critic import (
    Args,
    Categorical,
    Gaussian,
    Transitions,
    actor_critic_loss,
    effective_sample_size,
    gae,
    n_step,
    td,
)  # fmt: skip
from zoo.common.cli import main
from zoo.common.envs import make_envs
from zoo.common.errors import RunFault
from zoo.common.files import load_checkpoint
from zoo.common.normalize import normalize
from zoo.common.optim import new_rmsprop, rmsprop
from zoo.common.process import Process

F64 = torch.float64

# --- advantages by hand -------------------------------------------------------------------------------------

# gamma 1/2. One environment sees a termination (row 1), a truncation (row 2) and the rollout's boundary (row
# 4):
#   delta_0 = 1 + 4/2 - 2 = 1      delta_1 = 2 - 4 = -2 (terminated: V' = 100 is worth nothing)
#   delta_2 = 3 + 8/2 - 6 = 1 (truncated: V' counts)
#   delta_3 = 4 + 2/2 - 10 = -5     delta_4 = 5 + 6/2 - 2 = 6
#   returns of n steps: R_0 = 1 + 2/2, R_1 = 2, R_2 = 3 + 8/2, R_3 = 4 + 5/2 + 6/4, R_4 = 5 + 6/2
# The other, with rewards 1 and V = 8 beyond the boundary, sees none: R_4 = 1 + 8/2, R_3 = 1 + 5/2, ...
REWARD = torch.tensor([[1, 1], [2, 1], [3, 1], [4, 1], [5, 1]], dtype=F64)
VALUE = torch.tensor([[2, 0], [4, 0], [6, 0], [10, 0], [2, 0]], dtype=F64)
NEXT_VALUE = torch.tensor([[4, 0], [100, 0], [8, 0], [2, 0], [6, 8]], dtype=F64)
TERMINATED = torch.tensor([[0, 0], [1, 0], [0, 0], [0, 0], [0, 0]]).bool()
TRUNCATED = torch.tensor([[0, 0], [0, 0], [1, 0], [0, 0], [0, 0]]).bool()
ROWS = (REWARD, VALUE, NEXT_VALUE, TERMINATED, TRUNCATED)
BOTH = (*ROWS[:4], TRUNCATED | TERMINATED)  # a step both terminated and truncated does not bootstrap


@pytest.mark.parametrize("rows", [ROWS, BOTH], ids=["rows", "both"])
def test_advantages_by_hand(rows):
    assert td(*rows[:4], 0.5).T.tolist() == [[1, -2, 1, -5, 6], [1, 1, 1, 1, 5]]
    assert n_step(*rows, 0.5).T.tolist() == [[0, -2, 1, -2, 6], [2.1875, 2.375, 2.75, 3.5, 5]]
    assert gae(*rows, 0.5, 0.5)[:, 0].tolist() == [0.5, -2, 1, -3.5, 6]


def test_gae_has_the_others_as_its_ends():
    torch.testing.assert_close(gae(*ROWS, 0.5, 0.0), td(*ROWS[:4], 0.5))
    torch.testing.assert_close(gae(*ROWS, 0.5, 1.0), n_step(*ROWS, 0.5))


def test_a_rollouts_boundary_bootstraps_as_if_cut_there():
    """Two rollouts of two steps: the second row's return stops at V of its successor."""
    cut = n_step(*(x[2:4] for x in ROWS), 0.5)[:, 0]
    assert cut.tolist() == [1, 4 + 2 / 2 - 10]


# --- advantages by enumeration ------------------------------------------------------------------------------


def rollouts(steps):
    """Every rollout of `steps` steps from a start, new episodes included: chances (M,), columns of states,
    actions, next
    states, terminated, truncated (T, M)."""
    grown, pi = (
        [(tiny_mdp.START[s].item(), s, 0, []) for s in (0, 1)],
        tiny_mdp.log_policy(tiny_mdp.THETA).exp(),
    )
    for _ in range(steps):
        paths = []
        for chance, s, clock, rows in grown:
            for a in (0, 1):
                for s2 in range(3):
                    here = chance * pi[s, a].item() * tiny_mdp.P[s, a, s2].item()
                    terminated, truncated = s2 == 2, clock + 1 == tiny_mdp.HORIZON
                    more = [*rows, (s, a, s2, terminated, truncated)]
                    if terminated or truncated:
                        paths += [(here * tiny_mdp.START[s3].item(), s3, 0, more) for s3 in (0, 1)]
                    elif here:
                        paths.append((here, s2, clock + 1, more))
        grown = [path for path in paths if path[0]]
    table = torch.tensor([rows for *_, rows in grown]).permute(2, 1, 0)
    return torch.tensor([path[0] for path in grown], dtype=F64), *table[:3], *table[3:].bool()


CHANCE, STATE, ACTION, NEXT, ENDED, CUT = rollouts(4)
ESTIMATORS = {
    "td": lambda r, v, v2, term, trunc: td(r, v, v2, term, 0.8),
    "n-step": lambda *rows: n_step(*rows, 0.8),
    "gae": lambda *rows: gae(*rows, 0.8, 0.6),
}


def expected(estimator, value):
    """E[grad log pi(a_t|s_t) A_t | s_t = s] for both states, over all rows (2, 4), and E[A_0 | s_0, a_0] (2,
    2)."""
    padded = torch.cat((value, torch.full((1,), 1e6, dtype=F64)))  # V after a termination must not matter
    advantage = estimator(tiny_mdp.REWARD[STATE, ACTION], value[STATE], padded[NEXT], ENDED, CUT)
    scores = tiny_mdp.score(STATE.flatten(), ACTION.flatten()).view(*STATE.shape, 4)
    by_state, by_pair = [], torch.zeros(2, 2, dtype=F64)
    for s in (0, 1):
        weight = CHANCE * (s == STATE)
        by_state.append((weight[..., None] * scores * advantage[..., None]).sum((0, 1)) / weight.sum())
        for a in (0, 1):
            first = CHANCE * (STATE[0] == s) * (ACTION[0] == a)
            by_pair[s, a] = (first * advantage[0]).sum() / first.sum()
    return torch.stack(by_state), by_pair


def exact_gradients(gamma):
    """sum_a pi(a|s) grad log pi(a|s) A(s, a) for both states (2, 4)."""
    states, actions = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    weight = (tiny_mdp.log_policy(tiny_mdp.THETA).exp() * tiny_mdp.true_advantage(gamma)).flatten()
    return (weight[:, None] * tiny_mdp.score(states, actions)).view(2, 2, 4).sum(1)


def test_the_exact_gradients_make_up_the_policy_gradient():
    """grad J = sum_s d_gamma(s) sum_a grad pi(a|s) A(s, a), against the derivative of Bellman's equation."""
    theta = tiny_mdp.THETA.clone().requires_grad_()
    pi = tiny_mdp.log_policy(theta).exp()
    step = torch.einsum("sa,sat->st", pi, tiny_mdp.P[..., :2])
    resolvent = torch.linalg.inv(torch.eye(2, dtype=F64) - 0.8 * step)
    (exact,) = torch.autograd.grad(tiny_mdp.START @ resolvent @ (pi * tiny_mdp.REWARD).sum(1), theta)
    torch.testing.assert_close((tiny_mdp.START @ resolvent).detach() @ exact_gradients(0.8), exact)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_with_the_true_v_the_expectation_is_exact(name):
    """S3 5.9, 5.11: through terminations, time limits, new episodes and the rollout's boundary."""
    assert CHANCE.sum().item() == pytest.approx(1, abs=1e-12) and (ENDED & CUT).any() and (CUT & ~ENDED).any()
    found, by_pair = expected(ESTIMATORS[name], tiny_mdp.true_value(0.8))
    torch.testing.assert_close(found, exact_gradients(0.8), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(by_pair, tiny_mdp.true_advantage(0.8), rtol=1e-9, atol=1e-9)


def test_with_a_wrong_v_longer_sums_are_less_biased():
    """S3 5.12; and with the true V shorter ones vary less."""
    wrong = tiny_mdp.true_value(0.8) + torch.tensor([1.0, -2.0], dtype=F64)
    bias = {
        name: (expected(f, wrong)[0] - exact_gradients(0.8)).norm().item() for name, f in ESTIMATORS.items()
    }
    assert bias["td"] > bias["gae"] > bias["n-step"] > 0.01, bias
    value = torch.cat((tiny_mdp.true_value(0.8), torch.zeros(1, dtype=F64)))
    spread = {}
    for name, f in ESTIMATORS.items():
        advantage = f(tiny_mdp.REWARD[STATE, ACTION], value[STATE], value[NEXT], ENDED, CUT)
        spread[name] = (CHANCE * advantage[0] ** 2).sum().item()
    assert spread["td"] < spread["gae"] < spread["n-step"], spread


# --- the importance ratio, the loss, the optimiser ----------------------------------------------------------


def test_effective_sample_size_by_hand():
    for weight, share in (([2, 2, 2, 2], 1.0), ([1, 0, 0, 0], 0.25), ([1, 3], 0.8)):
        assert effective_sample_size(torch.tensor(weight, dtype=F64)).item() == pytest.approx(share)


@pytest.mark.parametrize("old_noise", [0.0, 0.4])
@pytest.mark.parametrize("discrete", [True, False])
def test_the_ratios_gradient_equals_the_formula(discrete, old_noise):
    """S3 (17): 1/n sum_i w_i grad log pi(a_i|s_i) A_i, and the plain policy gradient where pi is pi_old (w =
    1)."""
    torch.manual_seed(0)
    obs, advantage = torch.randn(30, 3, dtype=F64), torch.randn(30, dtype=F64)
    action = torch.randint(4, (30,)) if discrete else torch.randn(30, 4, dtype=F64)
    params = torch.randn(16, dtype=F64) * 0.5

    def forward(params, obs):
        mean = obs @ params[:12].view(3, 4)
        return Categorical(mean) if discrete else Gaussian(mean, params[12:]), obs[:, 0]

    mean = obs @ params[:12].view(3, 4)
    if discrete:
        by_mean = torch.nn.functional.one_hot(action, 4) - mean.softmax(-1)
        by_log_std = torch.zeros(30, 4, dtype=F64)
    else:
        z = (action - mean) / params[12:].exp()
        by_mean, by_log_std = z / params[12:].exp(), z**2 - 1
    log_w = torch.randn(30, dtype=F64) * old_noise
    batch = Transitions(obs, action, forward(params, obs)[0].log_prob(action) - log_w, advantage, advantage)
    weight = log_w.exp() * advantage / 30
    formula = torch.cat(((obs.T @ (weight[:, None] * by_mean)).flatten(), weight @ by_log_std))
    args = Args(value_coef=0.0, entropy_coef=0.0)
    gradient, metrics = grad(actor_critic_loss, has_aux=True)(params, batch, forward, args)
    torch.testing.assert_close(-gradient, formula)
    w = log_w.exp()
    assert metrics["effective_sample_size"].item() == pytest.approx((w.sum() ** 2 / (w**2).sum() / 30).item())
    assert metrics["policy_loss"].item() == pytest.approx(-(w * advantage).mean().item())


def test_rmsprop_equals_torchs():
    rng = torch.Generator().manual_seed(0)
    ours = torch.randn(40, generator=rng)
    theirs = ours.clone().requires_grad_()
    optimizer = torch.optim.RMSprop([theirs], lr=1.0, alpha=0.99, eps=1e-5)
    opt, scale = new_rmsprop(ours), torch.logspace(-7, 3, 40)  # small gradients, too, where eps decides
    for i in range(50):
        gradient, learning_rate = scale * torch.randn(40, generator=rng), 0.01 * (1 - i / 60)
        before = ours.clone()
        ours, opt = rmsprop(ours, gradient, opt, torch.tensor(learning_rate))
        assert not torch.equal(before, ours)
        optimizer.param_groups[0]["lr"] = learning_rate
        theirs.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=2e-6)


# --- what train hands to the update, and what the update makes of it ----------------------------------------

SMALL = dict(
    num_envs=16, num_steps=5, learning_rate=0.01, hidden=(16,), gamma=0.9, eval_every=0, total_steps=80 * 100,
    entropy_coef=0.0, normalize_obs=False, scale_rewards=False, device="cpu", compile=False, progress=False,
    env_threads=1, optimizer="adam",
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
    """What train acted with, collected and learnt from, and what it learnt, in the order of the calls."""
    seen = SimpleNamespace(acting=[], rollouts=[], learning=[])
    policy_at, collect, learn = actor_critic.policy_at, actor_critic.collect, actor_critic.learn

    def acting(net, obs_stats):
        seen.acting.append((torch.cat([p.flatten() for p in net.parameters()]), obs_stats))
        return policy_at(net, obs_stats)

    def collected(*args):
        seen.rollouts.append(collect(*args))
        return seen.rollouts[-1]

    def learnt(*args):
        seen.learning.append((args, learn(*args)))
        return seen.learning[-1][1]

    monkeypatch.setattr(actor_critic, "policy_at", acting)
    monkeypatch.setattr(actor_critic, "collect", collected)
    monkeypatch.setattr(actor_critic, "learn", learnt)
    return seen


@pytest.fixture
def in_turn(monkeypatch):
    """Environments seeded evenly and oddly in turn: the script's first episode, its second, and again."""
    monkeypatch.setattr(actor_critic, "env_seeds", lambda seed, purpose, count, *index: list(range(count)))


@pytest.mark.parametrize("scaled", [False, True])
def test_batches_hold_the_transitions_as_they_were(tmp_path, spy, in_turn, scaled):
    """The script of probes.py by two copies, four steps a rollout: true successors, normalised as when they
    were acted on; rewards in units of all discounted sums so far, which go on from rollout to rollout."""
    from test_envs import FIRST, SECOND

    actor_critic.train(small(
        tmp_path, "probe/Scripted-v0", num_envs=2, num_steps=4, total_steps=16, seed=2, normalize_obs=True,
        scale_rewards=scaled,
    ))  # fmt: skip
    assert len(spy.learning) == len(spy.rollouts) == 2
    history, sums = [], [0.0, 0.0]
    for i, ((forward, _, params, _, batch, _), _) in enumerate(spy.learning):
        acted, stats = spy.acting[i]
        assert stats["count"] == 8 * i
        torch.testing.assert_close(acted, params, rtol=0, atol=0)  # so that the first ratio is 1
        for t in range(4):
            for copy, script in enumerate((FIRST, SECOND)):
                obs, reward, next_obs, terminated, truncated = script[4 * i + t]
                for ours, theirs in ((batch.obs, obs), (batch.next_obs, next_obs)):
                    assert ours[t, copy] == normalize(torch.tensor([float(theirs)]), stats)
                assert (batch.terminated[t, copy], batch.truncated[t, copy]) == (terminated, truncated)
                sums[copy] += reward
                history.append(sums[copy])
                sums[copy] *= 0.9 * (1 - max(terminated, truncated))
        deviation = np.std(history) if scaled else 1.0
        expected = [[row[1] / deviation for row in script[4 * i : 4 * i + 4]] for script in (FIRST, SECOND)]
        torch.testing.assert_close(
            batch.reward.T, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-5
        )
        raw, _, _ = spy.rollouts[i]
        assert torch.equal(batch.action, raw.action)
        seen = actor_critic.ActorCritic(make_envs("probe/Scripted-v0", 1), (16,), -0.5, False)
        actor_critic.loader(seen)(acted)
        policy = actor_critic.policy_at(seen, stats)
        log_prob = torch.stack([
            policy(obs.numpy()).log_prob(action) for obs, action in zip(raw.obs, raw.action, strict=True)
        ])  # fmt: skip
        learnt = forward(params, batch.obs.flatten(0, 1))[0].log_prob(batch.action.flatten())
        torch.testing.assert_close(learnt.view(4, 2), log_prob)


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
@pytest.mark.parametrize("advantage", ["td", "n-step", "gae"])
def test_an_update_equals_torchs_own_parts(tmp_path, spy, advantage, optimizer):
    """Advantages row by row in Python, the loss by torch.distributions and backward, torch's clipping and
    optimiser: after one epoch on a batch, after two, and after three, which train takes."""
    args = small(
        tmp_path, "probe/Scripted-v0", num_envs=3, num_steps=6, total_steps=18 * 4, advantage=advantage,
        optimizer=optimizer, off_policy_epochs=3, entropy_coef=0.03, value_coef=0.7, gae_lambda=0.6,
        max_grad_norm=0.1, scale_rewards=True,
    )  # fmt: skip
    actor_critic.train(args)
    assert len(spy.learning) == 4
    theirs = spy.learning[0][0][2].clone().requires_grad_()
    kinds = dict(rmsprop=(torch.optim.RMSprop, dict(alpha=0.99)), adam=(torch.optim.Adam, {}))
    kind, options = kinds[optimizer]
    optim, smallest = kind([theirs], lr=1.0, eps=1e-5, **options), 1.0
    for i, ((forward, _, params, opt, batch, learning_rate), (end, _, _)) in enumerate(list(spy.learning)):
        assert learning_rate.item() == pytest.approx(0.01 * (1 - i / 4))
        torch.testing.assert_close(params, theirs.detach(), rtol=1e-4, atol=1e-5)
        obs, action = batch.obs.flatten(0, 1), batch.action.flatten()
        old = torch.distributions.Categorical(logits=forward(params, obs)[0].logits).log_prob(action)
        for epoch in range(3):
            new, _, metrics = actor_critic.learn(
                forward, replace(args, off_policy_epochs=epoch + 1), params, opt, batch, learning_rate
            )
            dist, value = forward(theirs, obs)
            v = value.detach().view(6, 3)
            v2 = forward(theirs, batch.next_obs.flatten(0, 1))[1].detach().view(6, 3)
            lam = dict(td=0.0, gae=0.6)
            target = torch.zeros(6, 3)
            for n in range(3):
                for t in range(6):
                    total, factor = 0.0, 1.0
                    for k in range(t, 6):  # the sum of (gamma lambda)^l delta, stopped at an episode's end
                        total += factor * (
                            batch.reward[k, n] + 0.9 * v2[k, n] * (not batch.terminated[k, n]) - v[k, n]
                        )
                        factor *= 0.9 * lam.get(advantage, 1.0)
                        if batch.terminated[k, n] or batch.truncated[k, n]:
                            break
                    target[t, n] = total
            reference = torch.distributions.Categorical(logits=dist.logits)
            ratio = (reference.log_prob(action) - old).exp()  # to pi_old in every epoch
            entropy = reference.entropy().mean()
            v_loss = torch.nn.functional.mse_loss(value, (target + v).flatten())
            pg_loss = -(ratio * target.flatten()).mean()
            loss = pg_loss + 0.7 * v_loss - 0.03 * entropy
            optim.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_([theirs], 0.1)
            optim.param_groups[0]["lr"] = learning_rate.item()
            optim.step()
            torch.testing.assert_close(new, theirs.detach(), rtol=1e-4, atol=1e-5)
            explained = 1 - target.var(correction=0) / (target + v).var(correction=0)
            named = dict(
                grad_norm=norm, value_loss=v_loss, policy_loss=pg_loss, entropy=entropy,
                explained_variance=explained,
            )  # fmt: skip
            for name, expected in named.items():
                assert metrics[name].item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-5), name
            share = metrics["effective_sample_size"].item()
            assert share == pytest.approx((ratio.sum() ** 2 / (ratio**2).sum() / 18).item(), rel=1e-4)
            assert share <= 1 + 1e-6 and (epoch or share == pytest.approx(1, abs=1e-5))
            smallest = min(smallest, share)
        assert torch.equal(new, end)
    assert norm > 0.1 and smallest < 0.99999


def test_more_epochs_wear_the_batch_out(tmp_path):
    """With every update on the same batch less of it counts."""
    shares = []
    for epochs in (1, 4, 16):
        args = small(
            tmp_path / str(epochs),
            "CartPole-v1",
            total_steps=80 * 8,
            off_policy_epochs=epochs,
            report_every=80,
        )
        actor_critic.train(args)
        shares.append(np.mean([float(row["effective_sample_size"]) for row in rows(args.run_dir)]))
    assert shares[0] == pytest.approx(1, abs=1e-6) and 1 > shares[1] > shares[2] and shares[2] < 0.99


def test_a_batch_of_one_transition(tmp_path):
    """The textbook's actor-critic learns from every step: a batch without a spread is no fault."""
    args = small(
        tmp_path, "probe/Scripted-v0", num_envs=1, num_steps=1, total_steps=12, report_every=1, advantage="td"
    )
    actor_critic.train(args)
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(1, 13))


def test_reports_gather_updates_and_no_step_is_lost(tmp_path, in_turn):
    changes = dict(num_envs=2, num_steps=4, total_steps=105)
    actor_critic.train(small(tmp_path / "a", "probe/Scripted-v0", report_every=30, **changes))
    table = rows(tmp_path / "a")
    # four updates of 8 a report, and the last batch is taken though only one of its steps was asked for
    assert [int(row["step"]) for row in table] == [32, 64, 96, 112]
    assert float(table[1]["learning_rate"]) == pytest.approx(0.01 * (1 - 56 / 105))
    assert float(table[-1]["learning_rate"]) == pytest.approx(0.01 * (1 - 104 / 105))
    actor_critic.train(small(tmp_path / "b", "probe/Scripted-v0", report_every=1, anneal=False, **changes))
    each = rows(tmp_path / "b")
    assert [int(row["step"]) for row in each] == list(range(8, 113, 8))
    assert [float(row["learning_rate"]) for row in each] == pytest.approx([0.01] * 14)
    for four, one in zip(table[:3], each[3::4], strict=False):  # the same script in both: no episode is lost
        assert (four["train_return"], four["train_length"]) == (one["train_return"], one["train_length"])
    actor_critic.train(small(tmp_path / "c", "probe/Scripted-v0", **changes | dict(total_steps=5)))
    assert [int(row["step"]) for row in rows(tmp_path / "c")] == [8]


def test_a_reports_metrics_are_means_over_its_updates(tmp_path, spy):
    args = small(
        tmp_path, "probe/Scripted-v0", num_envs=2, num_steps=4, total_steps=48, report_every=24, anneal=False
    )
    actor_critic.train(args)
    table = rows(tmp_path)
    for i in (0, 1):
        for name in ("value_loss", "explained_variance", "entropy", "grad_norm"):
            values = [metrics[name].item() for _, (_, _, metrics) in spy.learning[3 * i : 3 * i + 3]]
            assert float(table[i][name]) == pytest.approx(np.mean(values), rel=1e-4), name


# --- nothing left to learn ----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
@pytest.mark.parametrize("advantage", ["td", "n-step", "gae"])
@pytest.mark.parametrize("env", ["probe/ConstantValue-v0", "probe/Endless-v0"])
def test_returns_that_are_all_equal(tmp_path, env, advantage, optimizer):
    """Every episode pays the same, so that neither returns nor advantages have a spread."""
    args = small(
        tmp_path, env, advantage=advantage, optimizer=optimizer, total_steps=80 * 4, report_every=1,
        off_policy_epochs=2, normalize_obs=True, scale_rewards=True,
    )  # fmt: skip
    actor_critic.train(args)
    assert len(rows(tmp_path)) == 4
    for row in rows(tmp_path):
        assert all(np.isfinite(float(value)) for name, value in row.items() if not name.startswith("eval"))


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
@pytest.mark.parametrize("env", ["probe/ActOnObs-v0", "probe/ActOnObsBox-v0"])
def test_a_policy_without_entropy(tmp_path, monkeypatch, env, optimizer):
    """Solved for good: one action has all the probability that float32 can tell, and no score is left."""
    network = actor_critic.ActorCritic

    def sure(*args):
        net = network(*args)
        with torch.no_grad():
            net.policy_head.bias[0] = 1e4 if net.log_std is None else 0.0
        return net

    monkeypatch.setattr(actor_critic, "ActorCritic", sure)
    actor_critic.train(small(
        tmp_path, env, optimizer=optimizer, total_steps=80 * 4, report_every=1, off_policy_epochs=3,
        log_std=-20.0, learning_rate=1e-9, entropy_coef=0.01,
    ))  # fmt: skip
    assert len(rows(tmp_path)) == 4
    for row in rows(tmp_path):
        assert all(np.isfinite(float(value)) for name, value in row.items() if not name.startswith("eval"))
        assert float(row["entropy"]) < 1e-6


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
@pytest.mark.parametrize("advantage", ["td", "n-step", "gae"])
def test_a_critic_that_is_exact(tmp_path, monkeypatch, spy, advantage, optimizer):
    """V = 1 from the start, where every return is 1: no advantage, no gradient, and nothing moves."""
    network = actor_critic.ActorCritic

    def exact(*args):
        net = network(*args)
        with torch.no_grad():
            net.value_head.weight.zero_()
            net.value_head.bias.fill_(1.0)
        return net

    monkeypatch.setattr(actor_critic, "ActorCritic", exact)
    actor_critic.train(small(
        tmp_path, "probe/ConstantValue-v0", advantage=advantage, optimizer=optimizer, total_steps=80 * 3,
        report_every=1, off_policy_epochs=2,
    ))  # fmt: skip
    assert torch.equal(spy.learning[0][0][2], spy.learning[-1][1][0])
    for row in rows(tmp_path):
        assert (float(row["grad_norm"]), float(row["value_loss"])) == (0, 0)
        assert float(row["explained_variance"]) == 1


def test_weights_that_have_all_but_vanished_still_have_a_share():
    """A batch that the policy has left far behind: ratios whose squares float32 does not hold."""
    for weight, share in (([1e-30] * 4, 1.0), ([1e30, 0, 0, 0], 0.25), ([0.0] * 4, 0.0)):
        assert effective_sample_size(torch.tensor(weight)).item() == pytest.approx(share)


# --- probe environments -------------------------------------------------------------------------------------


def learnt(args):
    """What a run leaves in agent.pt: V of observations, and the deterministic policy's actions in the
    environment's scale."""
    actor_critic.train(args)
    acting = load_checkpoint(Path(args.run_dir) / "agent.pt", "--agent", "actor_critic")["state"]
    envs = make_envs(args.env, 1)
    net = actor_critic.ActorCritic(envs, args.hidden, args.log_std, args.shared_network)
    params, policy = (
        actor_critic.flatten(net)[1](acting["params"]),
        actor_critic.make_policy(envs, args, acting),
    )

    def value(*obs):
        seen = normalize(torch.tensor(obs, dtype=torch.float32)[:, None], acting["obs_stats"])
        return torch.func.functional_call(net, params, (seen,))[1].tolist()

    def act(*obs):
        return envs.to_env_action(policy(np.array(obs, np.float32)[:, None])).reshape(-1).tolist()

    return value, act


@pytest.mark.parametrize("advantage", ["td", "n-step", "gae"])
def test_probe_values(tmp_path, advantage):
    value, _ = learnt(small(tmp_path / "a", "probe/ObservedReward-v0", advantage=advantage))
    assert value(-1, 1) == pytest.approx([-1.0, 1.0], abs=0.05)
    value, _ = learnt(small(tmp_path / "b", "probe/Discount-v0", gamma=0.7, advantage=advantage))
    assert value(0, 1) == pytest.approx([0.7, 1.0], abs=0.05)


@pytest.mark.parametrize("advantage", ["td", "n-step", "gae"])
def test_probe_time_limit_is_no_end_of_the_world(tmp_path, advantage):
    """Reward 1 for ever, cut every 5 steps: V = 1 / (1 - 0.9), where a truncation taken for a termination
    makes at most 4.1."""
    value, _ = learnt(
        small(tmp_path, "probe/Endless-v0", advantage=advantage, learning_rate=0.05, total_steps=80 * 120)
    )
    assert value(0) == pytest.approx([10.0], abs=0.7)


@pytest.mark.parametrize(
    "changes",
    [{}, dict(advantage="td"), dict(advantage="n-step"), dict(off_policy_epochs=3), dict(shared_network=True),
     dict(optimizer="rmsprop", learning_rate=0.003),
     dict(normalize_obs=True, scale_rewards=True, entropy_coef=0.01)],
    ids=lambda changes: ",".join(changes) or "defaults",
)  # fmt: skip
def test_probe_acting_on_the_observation(tmp_path, changes):
    _, act = learnt(small(tmp_path, "probe/ActOnObs-v0", total_steps=80 * 50, **changes))
    assert act(-1, 1) == [0, 1]


@pytest.mark.parametrize("changes", [{}, dict(optimizer="rmsprop", learning_rate=0.003)])
def test_probe_acting_on_the_observation_in_a_box(tmp_path, changes):
    _, act = learnt(small(tmp_path, "probe/ActOnObsBox-v0", total_steps=80 * 150, **changes))
    assert act(-1, 1) == pytest.approx([3.0, 5.0], abs=0.3)


# --- whole runs ---------------------------------------------------------------------------------------------


def test_compiled_equals_eager(tmp_path, no_fallback):
    """50 updates on one task without chaos: what rounding leaves."""
    ends = []
    for compiled in (False, True):
        args = small(
            tmp_path / str(compiled), "probe/ActOnObsBox-v0", compile=compiled, total_steps=80 * 50,
            normalize_obs=True, scale_rewards=True, optimizer="rmsprop", learning_rate=0.003,
        )  # fmt: skip
        actor_critic.train(args)
        ends.append(load_checkpoint(tmp_path / str(compiled) / "agent.pt", "--agent")["state"])
    torch.testing.assert_close(ends[0]["params"], ends[1]["params"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ends[0]["obs_stats"], ends[1]["obs_stats"])


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_the_same_seed_gives_the_same_table(tmp_path, env):
    changes = dict(
        total_steps=800,
        eval_every=400,
        eval_episodes=2,
        normalize_obs=True,
        scale_rewards=True,
        report_every=160,
    )
    tables = []
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        torch.manual_seed(99)  # nothing of the process's own generators may matter
        np.random.seed(len(tables))  # noqa: NPY002
        actor_critic.train(small(tmp_path / name, env, seed=seed, **changes))
        tables.append(rows(tmp_path / name))
    assert tables[0] == tables[1] != tables[2] and len(tables[0]) == 5
    assert [bool(row["eval_return"]) for row in tables[0]] == [False, False, True, False, True]


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_a_stopped_run_resumed_equals_one_that_was_not(tmp_path, monkeypatch, optimizer):
    """On a task without memory across steps nothing but the checkpoint's content matters, so the tables are
    equal."""
    changes = dict(
        normalize_obs=True, scale_rewards=True, total_steps=80 * 7, checkpoint_every=1e-9, report_every=80,
        optimizer=optimizer, off_policy_epochs=2,
    )  # fmt: skip
    whole, halves = (
        small(tmp_path / name, "probe/ActOnObsBox-v0", **changes) for name in ("whole", "halves")
    )
    # resets draw observations from an environment's generator, which a resumed run seeds anew: here by the
    # step alone
    collect, calls = actor_critic.collect, []

    def collect_reseeded(envs, obs, policy, noise):
        calls.append(len(calls))
        if stop_at is not None and len(calls) == stop_at:
            raise RunFault("power cut")
        return collect(envs, envs.reset([100 * len(calls) + i for i in range(16)]), policy, noise)

    monkeypatch.setattr(actor_critic, "collect", collect_reseeded)
    stop_at = None
    actor_critic.train(whole)
    calls.clear()
    stop_at = 5
    with pytest.raises(RunFault, match="power cut"), Process():  # which frees the folder
        actor_critic.train(halves)
    assert len(rows(tmp_path / "halves")) == 4
    calls.pop()
    stop_at = None
    actor_critic.train(replace(halves, run_dir=None, resume=halves.run_dir))
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")


@pytest.fixture
def command_line(monkeypatch, capsys):
    """Run the agent's command line in this process: its exit status and the lines on stdout and stderr."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["actor_critic.py", *map(str, argv)])
        capsys.readouterr()
        try:
            main(Args, actor_critic.train, lambda env: actor_critic.SETTINGS.get(env, {}))
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *(text.splitlines() for text in capsys.readouterr())

    old = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield run
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), old, strict=True):
        signal.signal(number, handler)


def test_cartpole_is_learnt(tmp_path, command_line):
    """From the command line; with more environments and larger steps than the task's own settings have, which
    learn it in a tenth of the time."""
    status, out, _ = command_line(
        "--env", "CartPole-v1", "--num-envs", 32, "--learning-rate", 2e-3, "--total-steps", 30_000,
        "--no-compile", "--run-dir", tmp_path,
    )  # fmt: skip
    assert status == 0
    assert float(re.fullmatch(r"final evaluation: (\S+) ± \S+ over 10 episodes", out[-1])[1]) >= 450


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num-steps", -3], ["--num-steps", "at least 1", "-3"]),
        (["--off-policy-epochs", 0], ["--off-policy-epochs", "at least 1", "0"]),
        (["--report-every", 0], ["--report-every", "at least 1", "0"]),
        (["--gamma", 1.01], ["--gamma", "[0, 1]", "1.01"]),
        (["--gae-lambda", -0.1], ["--gae-lambda", "[0, 1]", "-0.1"]),
        (["--env", "probe/MultiDiscreteAction-v0"], ["--env probe/MultiDiscreteAction-v0", "MultiDiscrete"]),
    ],
)
def test_arguments_that_cannot_work(tmp_path, command_line, argv, words):
    status, _, lines = command_line(
        "--env", "probe/Act-v0", "--no-compile", "--run-dir", tmp_path / "run", *argv
    )
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(word in lines[0] for word in words), lines[0]
    assert not (tmp_path / "run").exists()


def test_a_diverging_run_stops_and_names_what_became_infinite(tmp_path, command_line):
    status, _, lines = command_line(
        "--env", "probe/ActBox-v0", "--learning-rate", 1e30, "--no-compile", "--run-dir", tmp_path
    )
    assert status == 1 and re.match(r"error: .*(became|non-finite)", lines[1]), lines
    assert not (tmp_path / "agent.pt").exists()
