"""TRPO: the Fisher matrix, conjugate gradient and the line search against their definitions; then the agent
as a whole."""

import csv
import dataclasses
import itertools
from functools import partial
from types import SimpleNamespace

import numpy as np
import probes
import pytest
import torch
from command import run_script
from torch import nn
from torch.func import functional_call, hessian, jacrev

from zoo import trpo
from zoo.common.device import compile_function, flatten
from zoo.common.envs import make_envs
from zoo.common.errors import UsageError
from zoo.common.files import load_checkpoint
from zoo.common.normalize import normalize
from zoo.common.seeding import env_seeds

F64 = torch.float64


# --- a small policy in double precision ---------------------------------------------------------------------


def problem(discrete, obs=7, seed=0, advantage_of=None):
    """A network, parameters away from its start, and a batch sampled from its own policy."""
    torch.manual_seed(seed)
    spaces = SimpleNamespace(obs_dim=3, action_dim=2 + discrete, discrete=discrete)
    net = trpo.ActorCritic(spaces, (5, 4), -0.5, False).double()
    params, unflatten = flatten(net)
    params = params + 0.3 * torch.randn_like(params)

    def forward(params, obs):
        return functional_call(net, unflatten(params), (obs,))

    states = torch.randn(obs, 3, dtype=F64)
    old = forward(params, states)[0]
    noise = torch.randn(obs, spaces.action_dim, dtype=F64)
    action = old.sample(noise if not discrete else -torch.empty_like(noise).exponential_().log())
    advantage = torch.randn(obs, dtype=F64)
    return params, forward, trpo.PolicyBatch(states, action, old, advantage), unflatten


def functions(forward):
    """What `trust_region_step` is given."""
    return dict(
        gradient=partial(trpo.surrogate_gradient, forward, trpo.Args()),
        product=partial(trpo.fisher_product, forward),
        evaluate=partial(trpo.surrogate, forward, trpo.Args()),
    )


def dense_fisher(params, forward, states):
    """Mean over states of E[score score^T], the expectation over actions taken exactly."""
    dist = forward(params, states)[0]
    if isinstance(dist, trpo.Categorical):
        weighted = [
            (torch.full((len(states),), k), dist.logits.softmax(-1)[:, k])
            for k in range(dist.logits.shape[-1])
        ]
    else:
        # Gauss-Hermite with three nodes a dimension integrates polynomials up to degree 5; the scores'
        # products have 4
        nodes, weights = np.polynomial.hermite_e.hermegauss(3)
        weighted = []
        for pick in itertools.product(range(3), repeat=dist.mean.shape[-1]):
            z = torch.tensor(nodes[list(pick)])
            weight = float(np.prod(weights[list(pick)] / weights.sum()))
            weighted.append(
                (dist.mean + dist.log_std.exp() * z, torch.full((len(states),), weight, dtype=F64))
            )
    total = torch.zeros(len(params), len(params), dtype=F64)
    for action, weight in weighted:
        score = jacrev(lambda p, a=action: forward(p, states)[0].log_prob(a))(params)  # (B, P)
        total += (score * weight[:, None]).T @ score / len(states)
    return total


@pytest.mark.parametrize("discrete", [False, True])
def test_fisher_product_is_the_dense_matrix_times_the_vector(discrete):
    params, forward, batch, _ = problem(discrete)
    fisher = dense_fisher(params, forward, batch.obs)
    mean_kl = hessian(lambda p: trpo.kl(batch.old, forward(p, batch.obs)[0]).mean())(params)
    assert fisher.abs().max() > 0.1
    for seed in range(3):
        vector = torch.randn(len(params), dtype=F64, generator=torch.Generator().manual_seed(seed))
        product = trpo.fisher_product(forward, params, batch.obs, vector)
        torch.testing.assert_close(product, fisher @ vector, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(product, mean_kl @ vector, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("discrete", [False, True])
def test_kl_is_that_of_the_distributions(discrete):
    params, forward, batch, _ = problem(discrete)
    old, new = batch.old, forward(params + 0.5 * torch.randn_like(params), batch.obs)[0]
    if discrete:
        expected = torch.distributions.kl_divergence(
            *(torch.distributions.Categorical(logits=d.logits) for d in (old, new))
        )
    else:
        normals = (torch.distributions.Normal(d.mean, d.log_std.exp()) for d in (old, new))
        expected = torch.distributions.kl_divergence(*normals).sum(-1)
    torch.testing.assert_close(trpo.kl(old, new), expected, rtol=1e-10, atol=1e-12)
    assert expected.mean() > 0.01
    assert trpo.kl(old, old).abs().max() < 1e-12


# --- conjugate gradient -------------------------------------------------------------------------------------


def positive_definite(size, seed=0):
    q, _ = torch.linalg.qr(torch.randn(size, size, dtype=F64, generator=torch.Generator().manual_seed(seed)))
    return q @ torch.diag(torch.logspace(-2, 1, size, dtype=F64)) @ q.T


def test_conjugate_gradient_equals_a_direct_solve():
    matrix, b = positive_definite(20), torch.randn(20, dtype=F64, generator=torch.Generator().manual_seed(1))
    x, residual = trpo.conjugate_gradient(lambda v: matrix @ v, b, 100, 1e-12)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-8, atol=1e-8)
    assert residual <= 1e-12


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-6])
def test_conjugate_gradient_stops_at_its_tolerance(tolerance):
    matrix, b, calls = positive_definite(30), torch.ones(30, dtype=F64), []

    def product(v):
        calls.append(1)
        return matrix @ v

    x, residual = trpo.conjugate_gradient(product, b, 1000, tolerance)
    true = (b - matrix @ x).norm() / b.norm()
    assert true <= tolerance
    assert float(residual) == pytest.approx(float(true), rel=1e-3)
    enough = len(calls)
    x, residual = trpo.conjugate_gradient(product, b, enough - 1, tolerance)  # not a product more than needed
    assert len(calls) == 2 * enough - 1
    assert residual > tolerance


def test_conjugate_gradient_of_zero_is_zero():
    x, residual = trpo.conjugate_gradient(lambda v: v, torch.zeros(3), 10, 1e-5)
    assert x.tolist() == [0, 0, 0] and residual == 0


# --- the step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("subsample", [1, 3])
def test_step_is_the_natural_gradient_at_the_length_of_the_quadratic_model(discrete, subsample, scale):
    """Also of advantages so small, or so large, that the gradient's square is not a number of its type."""
    params, forward, batch, _ = problem(discrete, obs=40)
    batch = batch._replace(advantage=scale * batch.advantage)
    args = trpo.Args(delta=1e-3, damping=0.05, cg_iterations=200, cg_tolerance=1e-10, fvp_subsample=subsample)
    new, metrics = trpo.trust_region_step(params, batch, args=args, delta=args.delta, **functions(forward))
    step = (new - params) / metrics["step_fraction"]
    fisher = dense_fisher(params, forward, batch.obs[::subsample])
    assert float(step @ fisher @ step / 2) == pytest.approx(args.delta, rel=1e-8)
    score = jacrev(lambda p: forward(p, batch.obs)[0].log_prob(batch.action))(params)
    g = (score * batch.advantage[:, None]).mean(0)
    x = torch.linalg.solve(fisher + 0.05 * torch.eye(len(params), dtype=F64), g / scale)
    torch.testing.assert_close(step / step.norm(), x / x.norm(), rtol=1e-6, atol=1e-8)
    assert float(metrics["grad_norm"]) == pytest.approx(float(g.norm()))


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("delta", [1e-4, 0.01, 0.3])
def test_an_accepted_step_improves_within_the_trust_region(discrete, delta):
    fractions = set()
    for seed in range(6):
        params, forward, batch, _ = problem(discrete, obs=30, seed=seed)
        args = trpo.Args(delta=delta, damping=0.01, fvp_subsample=1)
        new, metrics = trpo.trust_region_step(
            params, batch, args=args, delta=args.delta, **functions(forward)
        )
        assert metrics["accepted"] == 1
        dist = forward(new, batch.obs)[0]
        mean_kl = trpo.kl(batch.old, dist).mean()
        ratio = (dist.log_prob(batch.action) - batch.old.log_prob(batch.action)).exp()
        gain = (ratio * batch.advantage).mean() - batch.advantage.mean()
        assert 0 < mean_kl <= delta and gain > 0
        assert float(metrics["kl"]) == pytest.approx(float(mean_kl))
        assert -float(metrics["policy_loss"]) == pytest.approx(float(gain))
        fractions.add(metrics["step_fraction"])
    if delta == 0.3:
        assert min(fractions) < 1  # the constraint was at work


@pytest.mark.parametrize("reason", ["kl", "surrogate", "nan", "no gradient"])
def test_a_rejected_search_leaves_the_policy_as_it_was(reason):
    params, forward, batch, _ = problem(False, obs=30)
    given, tried = functions(forward), []

    def evaluate(candidate, batch):
        tried.append(candidate)
        gain, metrics = given["evaluate"](candidate, batch)
        if reason == "kl":
            return gain, metrics | {"kl": torch.tensor(0.0100001)}
        if reason == "surrogate":
            # no worse, but no better
            return given["evaluate"](params, batch)[0], metrics | {"kl": torch.tensor(0.0)}
        return (gain * torch.nan, metrics) if reason == "nan" else (gain, metrics)

    if reason == "no gradient":
        batch = batch._replace(advantage=torch.zeros_like(batch.advantage))
    before = params.clone()
    args = trpo.Args(delta=0.01, max_backtracks=4, backtrack=0.5, fvp_subsample=1)
    new, metrics = trpo.trust_region_step(
        params, batch, args=args, delta=args.delta, **(given | {"evaluate": evaluate})
    )
    assert torch.equal(new, before) and torch.equal(params, before)
    assert metrics["accepted"] == metrics["step_fraction"] == 0
    assert all(np.isfinite(float(value)) for value in metrics.values())
    if reason == "no gradient":
        assert tried == []  # there is nothing to search along
    else:
        lengths = [float((candidate - params).norm()) for candidate in tried]
        assert lengths == pytest.approx([lengths[0] * 0.5**k for k in range(5)])


@pytest.mark.parametrize("damping", [0.1, 1e-3, 0.0])
@pytest.mark.parametrize(
    "logits", [(30.0, -30.0), (42.0, -42.0), (60.0, -32.0), (48.0, -48.0), (60.0, -60.0), (100.0, -100.0)]
)
def test_a_task_solved_for_good_is_left_alone(logits, damping):
    """In float32, by a policy whose gradient, or only its square, is less than the least number."""
    torch.manual_seed(0)
    net = nn.ParameterDict({"bias": torch.tensor(logits), "weight": torch.zeros(2, 3)})
    params, unflatten = flatten(net)

    def forward(params, obs):
        named = unflatten(params)
        return trpo.Categorical(obs @ named["weight"].T + named["bias"]), obs[:, 0]

    states, advantage = torch.randn(64, 3), torch.randn(64)
    batch = trpo.PolicyBatch(states, torch.zeros(64).long(), forward(params, states)[0], advantage)
    args = trpo.Args(fvp_subsample=1, damping=damping)
    given, before = functions(forward), params.clone()
    g = given["gradient"](params, batch)[0].abs().max().item()
    gap = logits[0] - logits[1]
    assert (g == 0) == (gap > 104) and g < np.exp(-gap) and g**2 < 1e-45
    new, metrics = trpo.trust_region_step(params, batch, args=args, delta=0.02, **given)
    assert torch.equal(new, before) and metrics["accepted"] == metrics["step_fraction"] == 0
    assert all(np.isfinite(float(value)) for value in metrics.values()), metrics


def test_first_step_of_a_linear_gaussian_policy_is_the_closed_form():
    """mean = W s: F is E[s s^T] (x) 1 / sigma^2 for W and 2 I for log sigma."""
    torch.manual_seed(3)
    net = nn.ParameterDict({"log_std": torch.tensor([-0.3, 0.2]), "weight": torch.randn(2, 3)}).double()
    params, unflatten = flatten(net)

    def forward(params, obs):
        named = unflatten(params)
        return trpo.Gaussian(obs @ named["weight"].T, named["log_std"]), obs[:, 0]

    states, advantage = torch.randn(50, 3, dtype=F64), torch.randn(50, dtype=F64)
    old = forward(params, states)[0]
    z = torch.randn(50, 2, dtype=F64)
    batch = trpo.PolicyBatch(states, old.sample(z), old, advantage)
    sigma = old.log_std.exp()
    g_weight = (advantage[:, None, None] * (z / sigma)[:, :, None] * states[:, None, :]).mean(0)
    g_log_std = (advantage[:, None] * (z**2 - 1)).mean(0)
    x_weight = sigma[:, None] ** 2 * g_weight @ torch.linalg.inv(states.T @ states / 50)
    x_log_std = g_log_std / 2
    squared = (g_weight * x_weight).sum() + (g_log_std * x_log_std).sum()  # g^T F^-1 g
    length = (2 * 0.01 / squared).sqrt()

    args = trpo.Args(delta=0.01, damping=0.0, cg_iterations=100, cg_tolerance=1e-12, fvp_subsample=1)
    new, metrics = trpo.trust_region_step(params, batch, args=args, delta=args.delta, **functions(forward))
    assert metrics["accepted"] == 1
    step = {name: value / metrics["step_fraction"] for name, value in unflatten(new - params).items()}
    torch.testing.assert_close(step["weight"], length * x_weight, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(step["log_std"], length * x_log_std, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("discrete", [False, True])
def test_neither_update_moves_the_other_ones_parameters(discrete):
    params, forward, batch, unflatten = problem(discrete, obs=30)
    new, metrics = trpo.trust_region_step(
        params, batch, args=trpo.Args(fvp_subsample=1), delta=0.02, **functions(forward)
    )
    opt = trpo.new_adam(params)
    fitted = new
    for _ in range(3):
        g = torch.func.grad(partial(trpo.value_fit_loss, forward))(fitted, batch.obs, batch.advantage)
        fitted, opt = trpo.adam(fitted, g, opt, torch.tensor(1e-3))
    assert metrics["accepted"] == 1
    for name, old in unflatten(params).items():
        moved = not torch.equal(old, unflatten(new)[name])
        assert moved == ("value" not in name), name
        assert torch.equal(unflatten(new)[name], unflatten(fitted)[name]) == ("value" not in name), name


# --- the agent ----------------------------------------------------------------------------------------------

QUICK = dict(total_steps=512, num_envs=4, num_steps=32, minibatch_size=64, hidden=(16,), eval_every=0,
             eval_episodes=2, compile=False, progress=False)  # fmt: skip
PROBE = dict(total_steps=5120, learning_rate=5e-3, delta=0.05)
CARTPOLE = dict(total_steps=40_960, num_envs=16, num_steps=64, minibatch_size=256, gae_lambda=0.98,
                damping=1e-3, delta=0.02, eval_episodes=10, hidden=(64, 64))  # fmt: skip


def run(folder, env, resume=None, **changes):
    """Train; the mean return of the final evaluation."""
    where = dict(resume=str(resume)) if resume else dict(run_dir=str(folder))
    return trpo.train(dataclasses.replace(trpo.Args(), env=env, **(QUICK | changes | where)))


def table(folder):
    """progress.csv without its clocks."""
    with open(folder / "progress.csv", newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in ("wall_time", "sps")} for row in csv.DictReader(file)
        ]


def watch(monkeypatch, name):
    """The calls of one of the agent's functions, as they are made: [(arguments, result)]."""
    calls, function = [], getattr(trpo, name)

    def watched(*args):
        calls.append((args, function(*args)))
        return calls[-1][1]

    monkeypatch.setattr(trpo, name, watched)
    return calls


def played(script, episode, steps):
    """The rows (obs, reward, next_obs, terminated, truncated) of a script from an episode on."""
    rows = []
    while len(rows) < steps:
        obs, episode_rows = script[episode % len(script)]
        for reward, next_obs, ending in episode_rows:
            rows.append(
                (obs, reward, next_obs, ending in ("terminated", "both"), ending in ("truncated", "both"))
            )
            obs = next_obs
        episode += 1
    return rows[:steps]


@pytest.mark.parametrize("scaled", [False, True])
def test_batches_hold_the_transitions_as_they_were(tmp_path, monkeypatch, scaled):
    """A script by two copies: observations normalised as when they were acted on, rewards scaled by the
    discounted sums of all rollouts so far, however large they are, advantages centred.

    The first copy's rollout ends in mid-episode, just after a reward of 300, which the next one's sums hold.
    """
    script = [*probes.SCRIPT * 20, (60.0, [(300.0, 61.0, ""), (1.0, 62.0, "terminated")])]
    monkeypatch.setattr(probes, "SCRIPT", script)
    monkeypatch.setattr(trpo, "env_seeds", lambda seed, purpose, count, step: [0, 1])
    names = ("policy_at", "collect", "gae", "trust_region_step", "fit_critic")
    policies, collects, gaes, steps, fits = (watch(monkeypatch, name) for name in names)
    steps_each = 161
    run(tmp_path, "probe/Scripted-v0", num_envs=2, num_steps=steps_each, minibatch_size=161, total_steps=644,
        gamma=0.9, gae_lambda=0.8, scale_rewards=scaled, normalize_advantages=scaled)  # fmt: skip
    scripts = [played(script, copy, 2 * steps_each) for copy in (0, 1)]
    sums, history, largest = [0.0, 0.0], [], 0.0
    unflatten = flatten(trpo.ActorCritic(make_envs("probe/Scripted-v0", 1), (16,), -0.5, False))[1]
    assert len(gaes) == len(steps) == len(fits) == 2
    for i, row in enumerate(table(tmp_path)):
        net, stats = policies[i][0]
        noise, (rollout, *_) = collects[i][0][3], collects[i][1]
        (reward, value, _, *ended, gamma, lam), advantage = gaes[i]
        (params, batch, *_), _ = steps[i]
        assert (stats["count"], gamma, lam) == (2 * steps_each * i, 0.9, 0.8)
        mine = [copy[steps_each * i :][:steps_each] for copy in scripts]
        obs, rewards, _, terminated, truncated = (torch.tensor(column).T for column in zip(
            *(zip(*rows, strict=True) for rows in mine), strict=True))  # fmt: skip
        assert torch.equal(batch.obs, normalize(obs.flatten()[:, None], stats))
        assert torch.equal(ended[0], terminated) and torch.equal(ended[1], truncated)
        for t in range(steps_each):
            for copy in (0, 1):
                sums[copy] += float(rewards[t, copy])
                history.append(sums[copy])
                sums[copy] *= 0.9 * (not terminated[t, copy] and not truncated[t, copy])
        deviation = np.std(history) if scaled else 1.0
        torch.testing.assert_close(reward, rewards / deviation, rtol=1e-5, atol=1e-5, check_dtype=False)
        largest = max(largest, reward.max().item())
        old, old_value = functional_call(net, unflatten(params), (batch.obs,))
        torch.testing.assert_close(batch.old.logits, old.logits)
        torch.testing.assert_close(value.flatten(), old_value)
        assert torch.equal(batch.action, (old.logits + noise.flatten(0, 1)).argmax(-1))
        assert torch.equal(batch.action, rollout.action.flatten())
        expected, target = advantage.flatten().double(), (advantage + value).flatten()
        if scaled:
            expected = (expected - expected.mean()) / expected.std(unbiased=False)
        torch.testing.assert_close(batch.advantage, expected.float(), rtol=1e-4, atol=1e-5)
        assert torch.equal(fits[i][0][5], target) and torch.equal(fits[i][0][4], batch.obs)
        explained = 1 - (advantage.var() / target.var()).item()
        assert float(row["explained_variance"]) == pytest.approx(explained, abs=1e-5)
    assert largest > 10


def test_equal_advantages_move_nothing(tmp_path):
    """Their mean is not exact in a batch of 99: what rounding leaves is no reason for a step."""
    run(tmp_path, "probe/ConstantValue-v0", num_envs=3, num_steps=33, minibatch_size=33, total_steps=990,
        learning_rate=1e-2)  # fmt: skip
    rows = table(tmp_path)
    assert len(rows) == 10 and float(rows[-1]["value_loss"]) < 0.01
    assert {row["accepted"] for row in rows} == {"0"}


@pytest.mark.parametrize("bias", [30.0, 46.0, 60.0, 100.0])
def test_a_run_whose_task_is_solved_goes_on(tmp_path, monkeypatch, bias):
    class Certain(trpo.ActorCritic):
        def __init__(self, *args):
            super().__init__(*args)
            self.policy_head.bias.data += torch.tensor([-bias, bias])

    monkeypatch.setattr(trpo, "ActorCritic", Certain)
    assert run(tmp_path, "probe/Discount-v0", damping=1e-3) == 1
    rows = table(tmp_path)
    assert [row["accepted"] for row in rows] == ["0"] * 4
    assert float(rows[-1]["value_loss"]) < float(rows[0]["value_loss"])  # the critic learns on


def learnt(folder, env, **changes):
    """Train on a probe; its return, the policy and V as functions of raw observations, rewards being left
    unscaled."""
    changes = dict(num_envs=32, num_steps=8, scale_rewards=False, normalize_obs=False) | PROBE | changes
    mean = run(folder, env, **changes)
    args = dataclasses.replace(trpo.Args(), env=env, **(QUICK | changes))
    envs = make_envs(env, 1)
    acting = load_checkpoint(folder / "agent.pt", "agent")["state"]
    net = trpo.ActorCritic(envs, args.hidden, args.log_std, False)
    critic = flatten(net)[1](acting["params"])

    def value(obs):
        return functional_call(net, critic, (torch.tensor([[float(obs)]]),))[1].item()

    return mean, trpo.make_policy(envs, args, acting), value


def test_probe_constant_value(tmp_path):
    _, _, value = learnt(tmp_path, "probe/ConstantValue-v0")
    assert value(0) == pytest.approx(1, abs=0.05)


def test_probe_observed_reward(tmp_path):
    _, _, value = learnt(tmp_path, "probe/ObservedReward-v0")
    assert (value(-1), value(1)) == pytest.approx((-1, 1), abs=0.1)


def test_probe_discount(tmp_path):
    _, _, value = learnt(tmp_path, "probe/Discount-v0", gamma=0.5)
    assert (value(0), value(1)) == pytest.approx((0.5, 1), abs=0.1)


def test_probe_time_limit_bootstraps(tmp_path):
    _, _, value = learnt(tmp_path, "probe/Endless-v0", gamma=0.8, gae_lambda=0.9)
    assert value(0) == pytest.approx(5, abs=0.25)


def test_values_of_successors_are_those_of_the_true_ones(tmp_path, monkeypatch):
    """Also where a time limit cut the episode and the next row belongs to another one."""
    envs, checked = make_envs("probe/Scripted-v0", 1), []
    net = trpo.ActorCritic(envs, (16,), -0.5, False)
    unflatten = flatten(net)[1]
    collects, normalizes, gaes = (watch(monkeypatch, name) for name in ("collect", "normalize", "gae"))
    step = trpo.trust_region_step

    def check(params, *args):
        rollout, (_, value, next_value, *_) = collects[-1][1][0], gaes[-1][0]
        stats, truncated = normalizes[-1][0][1], rollout.truncated & ~rollout.terminated
        for obs, given in ((rollout.obs, value), (rollout.next_obs, next_value)):
            expected = functional_call(
                net, unflatten(params), ((obs - stats["mean"].float()) / stats["var"].sqrt().float(),)
            )[1]
            which = ~rollout.terminated if given is next_value else torch.ones_like(truncated)
            torch.testing.assert_close(given[which], expected.view_as(given)[which], rtol=1e-4, atol=1e-4)
        wrong = (expected.view_as(given)[:-1] - value[1:])[truncated[:-1]]
        checked.append(float(wrong.abs().max()))
        return step(params, *args)

    monkeypatch.setattr(trpo, "trust_region_step", check)
    run(tmp_path, "probe/Scripted-v0")
    assert len(checked) == 4 and checked[-1] > 0.01  # the next row would have been wrong


@pytest.mark.parametrize(
    ("env", "best", "loss"), [("Act", 1, 0), ("ActOnObs", 1, 0), ("ActBox", 0, 0.05), ("ActOnObsBox", 0, 0.1)]
)
def test_probe_acts(tmp_path, env, best, loss):
    mean, _, _ = learnt(tmp_path, f"probe/{env}-v0", total_steps=7680)
    assert best - loss <= mean <= best


def test_annealed_trust_region_and_learning_rate(tmp_path):
    """Both fall linearly, by the share of the steps done when an update begins; the KL stays within the
    present delta."""
    run(
        tmp_path,
        "probe/ActOnObs-v0",
        num_envs=8,
        num_steps=32,
        minibatch_size=64,
        total_steps=1024,
        anneal=True,
    )
    rows = table(tmp_path)
    for column, start in (("delta", 0.02), ("learning_rate", 1e-3)):
        np.testing.assert_allclose(
            [float(row[column]) for row in rows], start * np.array([1, 0.75, 0.5, 0.25]), rtol=1e-5
        )
    assert all(float(row["kl"]) <= float(row["delta"]) for row in rows)


def test_learns_cartpole(tmp_path):
    assert run(tmp_path, "CartPole-v1", **CARTPOLE) >= 475


@pytest.mark.parametrize("discrete", [False, True])
def test_compiled_equals_eager_over_several_updates(discrete, no_fallback):
    """In double precision, on given batches, few iterations: conjugate gradient, and environments, amplify
    rounding. Compiled for Gaussians only: the critic's fit, in which no action has a part, and the surrogate
    by itself, which its gradient computes as well."""
    ends = []
    for enabled in (False, True):
        params, forward, _, unflatten = problem(discrete, obs=30)
        start, opt = params, trpo.new_adam(params)
        cpu = torch.device("cpu")
        given = functions(forward) | {"fit": partial(trpo.fit_critic, forward, trpo.Args(minibatch_size=10))}
        for name in ("gradient", "product") if discrete else given:
            given[name] = compile_function(given[name], cpu, enabled)
        fit = given.pop("fit")
        accepted = []
        for seed in range(4):
            batch = problem(discrete, obs=30, seed=seed)[2]
            batch = batch._replace(old=forward(params, batch.obs)[0])
            params, metrics = trpo.trust_region_step(
                params, batch, args=trpo.Args(fvp_subsample=1), delta=0.02, **given
            )
            accepted.append(metrics["accepted"])
            rate, order = torch.tensor(1e-2), torch.randperm(30)
            params, opt, _ = fit(params, opt, batch.obs, batch.advantage, order, rate)
        assert accepted == [1, 1, 1, 1]
        assert all(
            not torch.equal(a, b)
            for a, b in zip(unflatten(start).values(), unflatten(params).values(), strict=True)
        )
        ends.append(params)
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-9)


def test_compiled_run_equals_eager_run(tmp_path, traced, no_fallback):
    """Compiled here means traced, without the kernels, which the test before this one is about: each of the
    four functions once, whatever the number of updates."""
    for name, compiled in (("eager", False), ("compiled", True)):
        run(tmp_path / name, "CartPole-v1", compile=compiled, total_steps=256)
    eager, compiled = (
        load_checkpoint(tmp_path / name / "checkpoint.pt", "it")["state"] for name in ("eager", "compiled")
    )
    torch.testing.assert_close(eager["params"], compiled["params"], rtol=1e-3, atol=1e-4)
    assert len(traced) == 4


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_same_seed_same_table(tmp_path, env):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, env, seed=seed)
    a, b, c = (table(tmp_path / name) for name in "abc")
    assert len(a) == 4 and a == b != c
    assert {"kl", "policy_loss", "accepted", "step_fraction", "cg_residual", "entropy", "value_loss",
            "explained_variance", "grad_norm"} <= a[0].keys()  # fmt: skip


def test_resumed_run_goes_on_from_the_checkpoint(tmp_path, monkeypatch):
    acted_with, policy_at, collects = [], trpo.policy_at, watch(monkeypatch, "collect")

    def noted_policy_at(net, obs_stats):
        acted_with.append((flatten(net)[0], obs_stats))
        return policy_at(net, obs_stats)

    run(tmp_path, "CartPole-v1")
    first = load_checkpoint(tmp_path / "checkpoint.pt", "checkpoint")
    table_before = table(tmp_path)
    monkeypatch.setattr(trpo, "policy_at", noted_policy_at)
    run(tmp_path, "CartPole-v1", resume=tmp_path, total_steps=512 + 128)
    last = load_checkpoint(tmp_path / "checkpoint.pt", "checkpoint")
    assert (first["step"], last["step"]) == (512, 640)
    assert last["state"]["opt"]["t"] == first["state"]["opt"]["t"] + 5 * 2  # epochs and minibatches
    assert last["state"]["obs_stats"]["count"] == 640
    assert not torch.equal(last["state"]["generator"], first["state"]["generator"])
    rows = table(tmp_path)
    assert rows[:4] == table_before and [row["step"] for row in rows] == ["128", "256", "384", "512", "640"]
    (params, obs_stats), _ = acted_with  # by the run, and by its evaluation
    assert torch.equal(params, first["state"]["params"])
    assert torch.equal(obs_stats["mean"], first["state"]["obs_stats"]["mean"])
    # from other starts than the run's own
    starts, others = collects[0][0][1], collects[4][0][1]
    assert not set(starts.flatten().tolist()) & set(others.flatten().tolist())
    assert np.array_equal(others, make_envs("CartPole-v1", 4).reset(env_seeds(1, "environments", 4, 512)))


def test_a_finished_run_can_be_resumed(tmp_path):
    mean = run(tmp_path, "CartPole-v1")
    before = table(tmp_path)
    assert run(tmp_path, "CartPole-v1", resume=tmp_path) == mean
    assert table(tmp_path) == before


def test_bad_input_is_told_in_one_line(tmp_path):
    """All in one process: the import of torch is what takes the time."""
    cases = {
        "--delta": "-0.01", "--damping": "-1", "--backtrack": "1.0", "--max-backtracks": "-1",
        "--cg-iterations": "0", "--cg-tolerance": "-1", "--fvp-subsample": "0", "--critic-epochs": "0",
        "--minibatch-size": "100", "--gamma": "1.5", "--gae-lambda": "-0.1", "--num-steps": "0",
        "--total-steps": "0",
    }  # fmt: skip
    for flag, value in cases.items():
        name = flag[2:].replace("-", "_")
        with pytest.raises(UsageError, match=f"^{flag} .*{value.rstrip('0').rstrip('.')}"):
            trpo.check(
                dataclasses.replace(trpo.Args(), **{name: float(value) if "." in value else int(value)})
            )
    with pytest.raises(UsageError, match=r"^--delta"):
        trpo.check(trpo.Args(delta=float("nan")))
    with pytest.raises(UsageError, match=r"^--fvp-subsample 2000 is more than the batch of 1024"):
        trpo.check(trpo.Args(fvp_subsample=2000))
    with pytest.raises(UsageError, match=r"^--num-envs x --num-steps must be at least 2"):
        trpo.check(trpo.Args(num_envs=1, num_steps=1, minibatch_size=1, fvp_subsample=1))
    with pytest.raises(UsageError, match=r"^--log-std must be finite, not nan"):
        trpo.check(trpo.Args(log_std=float("nan")))
    trpo.check(trpo.Args())
    told = run_script("trpo", "--env", "CartPole-v1", "--delta", "-1", "--run-dir", str(tmp_path / "run"))
    assert told == (2, "error: --delta must be greater than 0, not -1\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("env", trpo.SETTINGS)
def test_settings_are_valid(env):
    trpo.check(dataclasses.replace(trpo.Args(), env=env, **trpo.SETTINGS[env]))


def test_the_critics_steps_are_of_the_annealed_rate_and_of_shuffled_rows(tmp_path, monkeypatch):
    """In every epoch another order of all rows; and the losses' mean is what is told."""
    fits = watch(monkeypatch, "fit_critic")
    run(tmp_path, "probe/ActOnObs-v0", total_steps=256, anneal=True, critic_epochs=3)
    for i, ((_, args, *_, order, rate), (*_, loss)) in enumerate(fits):
        assert rate.item() == pytest.approx(args.learning_rate * (1 - i / 2))
        epochs = order.view(3, 128)
        assert (epochs.sort(1)[0] == torch.arange(128)).all()
        assert len({tuple(epoch) for epoch in [list(range(128)), *epochs.tolist()]}) == 4
        assert float(table(tmp_path)[i]["value_loss"]) == pytest.approx(loss.item(), rel=1e-4)
    net = trpo.ActorCritic(make_envs("probe/ActOnObs-v0", 1), (16,), -0.5, False)
    unflatten, losses = flatten(net)[1], []
    forward, _, params, opt, obs, return_, order, rate = fits[-1][0]
    for rows in order.split(64):  # of the last update, step by step
        value = functional_call(net, unflatten(params), (obs[rows],))[1]
        losses.append(((value - return_[rows]) ** 2).mean().item())
        g = torch.func.grad(partial(trpo.value_fit_loss, forward))(params, obs[rows], return_[rows])
        params, opt = trpo.adam(params, g, opt, rate)
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_a_stopped_run_resumed_equals_one_that_was_not(tmp_path):
    """On a task that is ever the same nothing but the checkpoint's content matters."""
    run(tmp_path / "whole", "probe/ActBox-v0")
    run(tmp_path / "halves", "probe/ActBox-v0", total_steps=256)
    run(tmp_path, "probe/ActBox-v0", resume=tmp_path / "halves")
    whole, halves = (
        [{name: cell for name, cell in row.items() if not name.startswith("eval")} for row in table(folder)]
        for folder in (tmp_path / "whole", tmp_path / "halves")
    )
    assert whole == halves and len(whole) == 4


def test_the_table_tells_of_the_episodes_that_ended(tmp_path):
    run(tmp_path, "probe/Endless-v0", total_steps=256)
    assert [(row["train_return"], row["train_length"]) for row in table(tmp_path)] == [("5", "5")] * 2
