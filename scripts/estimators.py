"""Measure the estimators of the policy gradient on real agents: their variance, bias and direction, early,
midway and late.

    python scripts/estimators.py             CartPole-v1 and HalfCheetah-v4, tables and plots in results/
    python scripts/estimators.py --env Hopper-v4 --stages 50000 500000 --results runs/estimators/hopper
    python scripts/estimators.py --checkpoints runs/MY_RUN/checkpoint.pt --results runs/MY_RUN/estimators
    python scripts/estimators.py --plots     draw again from the tables

One run of PPO is trained for each task and its policy kept at each stage. With a policy held fixed, whole
episodes are played: a sample on which every estimator works, and a larger one that gives the reference
gradient. An episode's estimate is g = sum_t grad log pi(a_t|s_t) Psi_t, all of the same gradient E[sum_t
A(s_t, a_t) grad log pi], the one that practice follows (no factor gamma^t); the unbiased ones take Psi from
the return to go. Measured of each, over the sample's episodes:

    variance   tr Cov(g), over the reference's squared norm: at 100 the mean of 100 episodes is half noise
    bias       |E[g] - E[to-go]| over the reference's norm, from paired differences, less what noise adds
    cosine     of the mean over a batch of episodes with the reference

with standard errors by the jackknife over ten groups of episodes. The value of what a time limit cut off is
the critic's in all of them. A killed measurement goes on where it was: what is finished lies in --runs.
"""

import csv
import importlib.util
import io
import itertools
import json
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from zoo import ppo, trpo
from zoo.actor_critic import effective_sample_size, gae, n_step, td
from zoo.common.cli import require, script_main
from zoo.common.device import flatten
from zoo.common.envs import make_envs
from zoo.common.errors import UsageError
from zoo.common.files import (
    load_checkpoint,
    lock_folder,
    make_folder,
    save_checkpoint,
    write_atomically,
    writing,
)
from zoo.common.kl import ESTIMATORS, in_reward
from zoo.common.normalize import normalizer, return_scale
from zoo.common.optim import adam, new_adam
from zoo.common.run import Run
from zoo.common.seeding import env_seeds, generator_seed
from zoo.common.state import portable
from zoo.reinforce import collect_episodes, leave_one_out, returns_to_go

STAGES = {"CartPole-v1": (4_096, 16_384, 49_152), "HalfCheetah-v4": (50_000, 300_000, 1_000_000)}
LAMBDAS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
DISTANCES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # mean KL(old || new), nats
GROUPS = 10  # of the jackknife
BATCH = 8  # episodes in a batch
COLUMNS = ("env", "stage", "question", "estimator", "x", "quantity", "value", "error")


@dataclass
class Args:
    env: tuple[str, ...] = tuple(STAGES)
    """tasks"""
    stages: tuple[int, ...] | None = None
    """environment steps of training at which the policy is measured (default: by task)"""
    checkpoints: tuple[Path, ...] = ()
    """checkpoint.pt of PPO runs to measure, instead of training"""
    budget: int = 50_000
    """environment steps of a policy's sample; the reference takes up to eight times as many"""
    seed: int = 1
    """seed of the training and of the samples"""
    compile: bool = True
    """compile the training's update"""
    runs: Path = Path("runs/estimators")
    """where the training runs and what is finished lie"""
    results: Path = Path(__file__).parents[1] / "results" / "estimators"
    """where tables and plots go; the tables of other tasks are not replaced"""
    plots: bool = False
    """measure nothing, draw the plots from the tables in --results"""


# --- policies at stages of a training run -------------------------------------------------------------------


def train(env_id: str, stages: Sequence[int], folder: Path, args: Args) -> list[Path]:
    """One run of PPO, its state kept at the given steps; the files. Goes on with a run that was cut short.

    Raises UsageError where another process makes it.
    """
    kept = [folder / f"step_{stage}" / "checkpoint.pt" for stage in stages]
    if all(path.is_file() for path in kept):
        return kept

    class KeepingRun(Run):
        def report(self, step, state, *rest):  # type: ignore[override]
            before = self.step
            super().report(step, state, *rest)
            for stage, path in zip(stages, kept, strict=True):
                if before < stage <= step:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    save_checkpoint(path, {**self._identity(), "step": step, "state": portable(state)})

    config = ppo.Args.for_env(
        env_id, seed=args.seed, compile=args.compile, eval_every=0, env_threads=1, checkpoint_every=20.0
    )
    batch = config.num_envs * config.num_steps
    config.total_steps = -(-max(stages) // batch) * batch
    run = folder / "run"
    missing = [stage for stage, path in zip(stages, kept, strict=True) if not path.is_file()]
    make_folder(folder, "--runs")
    with lock_folder(folder, "--runs"):
        if (run / "checkpoint.pt").is_file():
            saved = load_checkpoint(run / "checkpoint.pt", "--runs", "ppo", env_id)
            fits = saved["args"]["total_steps"] == config.total_steps and saved["step"] < min(missing)
            config = replace(config, resume=str(run)) if fits else config
        if config.resume is None:
            shutil.rmtree(run, ignore_errors=True)
            config.run_dir = str(run)
        original, ppo.Run = ppo.Run, KeepingRun  # type: ignore[misc]
        try:
            ppo.train(config)
        finally:
            ppo.Run = original  # type: ignore[misc]
    return kept


class Agent:
    """PPO's policy and critic of a checkpoint; `theta` (P,) are the policy's parameters alone."""

    def __init__(self, path: Path):
        content = load_checkpoint(path, "--checkpoints", "ppo")
        require(
            "return_stats" in content["state"],
            f"--checkpoints {path}: give a run's checkpoint.pt, not its agent.pt",
        )
        fields = {**content["args"], "hidden": tuple(content["args"]["hidden"])}
        self.args = ppo.Args(
            **{name: fields[name] for name in ppo.Args.__dataclass_fields__ if name in fields}
        )
        self.env, self.step = content["env"], content["step"]
        self.envs = make_envs(self.env, 16, threads=1)
        self.net = ppo.ActorCritic(self.envs, self.args.hidden, self.args.log_std, self.args.shared_network)
        self.parameters = flatten(self.net)[1](content["state"]["params"])
        self.obs_stats, stats = content["state"]["obs_stats"], content["state"]["return_stats"]
        self.scale = return_scale(stats) if self.args.scale_rewards else torch.ones(())
        names = [name for name in self.parameters if name.startswith("policy") or name == "log_std"]
        self.shapes = {name: self.parameters[name].shape for name in names}
        self.theta = torch.cat([self.parameters[name].flatten() for name in names])

    def policy(self, theta: Tensor, obs: Tensor) -> Any:
        """The distributions at normalised observations (B, D)."""
        pieces = theta.split([shape.numel() for shape in self.shapes.values()])
        own = {name: x.view(shape) for (name, shape), x in zip(self.shapes.items(), pieces, strict=True)}
        return functional_call(self.net, {**self.parameters, **own}, (obs,))[0]

    def value(self, obs: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """The critic, in units of scaled rewards (B,)."""
        return functional_call(self.net, parameters or self.parameters, (obs,))[1]

    def scores(self, theta: Tensor, obs: Tensor, action: Tensor) -> Tensor:
        """grad log pi(a|s) of each row (B, P)."""

        def log_prob(theta, obs, action):
            return self.policy(theta, obs[None]).log_prob(action[None])[0]

        return vmap(grad(log_prob), (None, 0, 0))(theta, obs, action)


Columns = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Episode(NamedTuple):
    """T steps (T, ...), and whether a time limit, not the task, ended them; value is the critic's."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    last_obs: Tensor
    truncated: bool
    value: Tensor
    last_value: Tensor

    def columns(self, value: Tensor | None = None, last_value: Tensor | None = None) -> Columns:
        """What the zoo's estimators read, (T, 1) each; with another critic's values, where given."""
        value, last = (
            (self.value, self.last_value) if value is None or last_value is None else (value, last_value)
        )
        end = torch.zeros(len(value), 1, dtype=torch.bool)
        end[-1] = True
        next_value = torch.cat((value[1:], last[None]))
        cut = end & self.truncated
        return self.reward[:, None], value[:, None], next_value[:, None], end & ~cut, cut


def play(
    agent: Agent, theta: Tensor, steps: int, most: int, seed: int, purpose: str = "sample"
) -> list[Episode]:
    """Whole episodes of the policy theta: about `steps` environment steps, at most `most` episodes, at least
    2 GROUPS. Other starts and other noise for each purpose."""
    generator = torch.Generator().manual_seed(generator_seed(seed, purpose))
    episodes, played, seen = list[Episode](), 0, normalizer(agent.obs_stats)

    @torch.no_grad()
    def policy(obs: np.ndarray) -> Any:
        return agent.policy(theta, seen(torch.as_tensor(obs)))

    while (played < steps and len(episodes) < most) or len(episodes) < 2 * GROUPS:
        seeds = env_seeds(seed, purpose, agent.envs.num_envs, len(episodes))
        batch, _ = collect_episodes(agent.envs, seeds, policy, generator)
        for i, alive in enumerate(batch.alive.T):
            obs, last = seen(batch.obs[alive, i]), seen(batch.last_obs[i])
            with torch.no_grad():
                value = agent.value(torch.cat((obs, last[None])))
            rows = (obs, batch.action[alive, i], batch.reward[alive, i] / agent.scale, last)
            episodes.append(Episode(*rows, bool(batch.truncated[i]), value[:-1], value[-1]))
            played += len(obs)
    return episodes


def better_critic(agent: Agent, episodes: Sequence[Episode], seed: int) -> dict[str, Tensor]:
    """The critic fitted on to the returns of a large sample, four passes of Adam; all the network's
    parameters."""
    obs = torch.cat([e.obs for e in episodes])
    target = torch.cat([to_go(e, agent.args.gamma) for e in episodes])
    params, unflatten = flatten(agent.net)
    params = torch.cat([x.flatten() for x in agent.parameters.values()])
    generator, opt, rate = torch.Generator().manual_seed(seed), new_adam(params), torch.tensor(1e-3)

    def loss(x, obs, target):
        return ((functional_call(agent.net, unflatten(x), (obs,))[1] - target) ** 2).mean()

    for index in (i for _ in range(4) for i in torch.randperm(len(obs), generator=generator).split(1024)):
        params, opt = adam(params, grad(loss)(params, obs[index], target[index]), opt, rate)
    return unflatten(params)


def to_go(episode: Episode, gamma: float) -> Tensor:
    """R_t (T,), the critic's value standing for what a time limit cut off."""
    alive = torch.ones(len(episode.reward), 1, dtype=torch.bool)
    tail = (episode.last_value * episode.truncated)[None]
    return returns_to_go(episode.reward[:, None], alive, tail, gamma)[:, 0]


# --- statistics ---------------------------------------------------------------------------------------------


def jackknife(statistic: Callable[[Tensor], float], count: int) -> tuple[float, float]:
    """The statistic of all `count` samples, given as their indices, and its standard error over at most
    GROUPS groups."""
    every, groups = torch.arange(count), min(GROUPS, count)
    left_out = np.array([statistic(every[every % groups != group]) for group in range(groups)])
    return statistic(every), math.sqrt((groups - 1) * left_out.var())


def covariance_trace(g: Tensor) -> Tensor:
    """tr Cov (), unbiased, of estimates g (episodes, P)."""
    return g.var(0).sum()


def measures(g: Tensor, paired: Tensor, reference: Tensor, size: float) -> Iterator[tuple[str, float, float]]:
    """(quantity, value, error) of an estimator's episodes g (E, P): see the module's docstring.

    paired (E, P): the unbiased estimates of the same episodes; size: the reference's squared norm, free of
    noise.
    """
    difference = g - paired

    def variance(index):
        return covariance_trace(g[index]).item() / size

    def bias(index):
        d = difference[index]
        square = (d.mean(0) ** 2).sum() - covariance_trace(d) / len(d)
        return math.sqrt(max(square.item(), 0.0) / size)

    yield "variance", *jackknife(variance, len(g))
    yield "bias", *jackknife(bias, len(g))
    yield cosine(g, reference)


def cosine(g: Tensor, reference: Tensor) -> tuple[str, float, float]:
    """That of batches of BATCH episodes with the reference: the mean over batches, and its standard error."""
    batches = torch.stack([x.mean(0) for x in g.split(BATCH) if len(x) == BATCH])
    found = torch.nn.functional.cosine_similarity(batches, reference[None], dim=1)
    return "cosine", found.mean().item(), (found.std() / len(found) ** 0.5).item()


def squared_norm(g: Tensor) -> float:
    """|E[g]|^2 without what noise adds to it; at least a tenth of the plain one, where noise is all there
    is."""
    plain = (g.mean(0) ** 2).sum()
    return max((plain - covariance_trace(g) / len(g)).item(), plain.item() / 10)


# --- the questions ------------------------------------------------------------------------------------------


def of_the_table(
    agent: Agent, episode: Episode, critic: dict[str, Tensor]
) -> dict[tuple[str, str, float], Tensor]:
    """Psi (T,) of each (question, estimator, x): the table of Psi_t, baselines that need no other episode,
    lambda, n."""
    gamma, columns = agent.args.gamma, episode.columns()
    with torch.no_grad():
        values = agent.value(torch.cat((episode.obs, episode.last_obs[None])), critic)
    better = episode.columns(values[:-1], values[-1])
    return_, earned = to_go(episode, gamma), episode.reward.cumsum(0) - episode.reward
    found: dict[tuple[str, str, float], Tensor] = {
        ("psi", "total", 0): return_ + earned,
        ("psi", "to-go", 1): return_,
        ("psi", "to-go - V", 2): return_ - episode.value,
        ("psi", "Q", 3): td(*columns[:4], gamma)[:, 0] + episode.value,
        ("psi", "TD, agent's V", 4): td(*columns[:4], gamma)[:, 0],
        ("psi", "TD, better V", 5): td(*better[:4], gamma)[:, 0],
        ("baselines", "none", 0): return_,
        ("baselines", "V", 3): return_ - episode.value,
        ("baselines", "better V", 4): return_ - values[:-1],
    }
    found |= {("gae", "GAE", lam): gae(*columns, gamma, lam)[:, 0] for lam in LAMBDAS}
    found |= {("n_step", "n-step", n): every_n_step(columns, n, gamma) for n in STEPS}
    return found | {("n_step", "n-step", math.inf): return_ - episode.value}


def every_n_step(columns: Columns, n: int, gamma: float) -> Tensor:
    """The n-step advantage of every row (T,), from the zoo's n_step on all windows of n rows."""
    # beyond the end, where n_step does not look
    padded = [torch.cat((x[:, 0], x.new_zeros(n - 1))) for x in columns]
    reward, value, next_value, terminated, truncated = (x.unfold(0, n, 1).T for x in padded)
    return n_step(reward, value, next_value, terminated, truncated, gamma)[0]


def measure_gradients(
    agent: Agent, sample: list[Episode], large: list[Episode], seed: int
) -> tuple[list[tuple], Tensor]:
    """Rows (question, estimator, x, quantity, value, error) of the table, baselines, lambda and n; the
    reference gradient."""
    gamma, critic = agent.args.gamma, better_critic(agent, large, seed)

    def reference_estimate(episode: Episode) -> Tensor:
        weight = gae(*episode.columns(), gamma, 1.0)[:, 0]
        return grad(lambda x: agent.policy(x, episode.obs).log_prob(episode.action) @ weight)(agent.theta)

    references = torch.stack([reference_estimate(episode) for episode in large])
    reference, size = references.mean(0), squared_norm(references)
    # the reference's own cosine with the truth
    trusted = math.sqrt(min(size / (reference**2).sum().item(), 1.0))
    estimates, x, y = list[Tensor](), list[Tensor](), list[Tensor]()
    for episode in sample:
        scores = agent.scores(agent.theta, episode.obs, episode.action)
        psi = of_the_table(agent, episode, critic)
        estimates.append(torch.stack(list(psi.values())) @ scores)
        x.append(to_go(episode, gamma) @ scores)
        y.append(scores.sum(0))
    by_name = dict(zip(psi, torch.stack(estimates, 1), strict=True))
    returns, lengths = (
        torch.stack([to_go(e, gamma).sum() for e in sample]),
        torch.tensor([float(len(e.reward)) for e in sample]),
    )
    xs, ys = torch.stack(x), torch.stack(y)
    by_name["baselines", "mean", 1] = xs - leave_one_out(returns, lengths)[:, None] * ys
    by_name["baselines", "optimal", 2] = xs - leave_one_out((xs * ys).sum(1), (ys**2).sum(1))[:, None] * ys
    unbiased = by_name["psi", "to-go - V", 2]
    rows = [(*name, *row) for name, g in by_name.items() for row in measures(g, unbiased, reference, size)]
    return [*rows, ("reference", "to-go - V", len(large), "cosine with the truth", trusted, 0.0)], reference


def moved(agent: Agent, direction: Tensor, distance: float, obs: Tensor) -> Tensor:
    """theta moved along a direction until the mean KL(old || new) over the states is `distance`."""
    old = as_trpo(agent.policy(agent.theta, obs))

    def kl(step):
        return trpo.kl(old, as_trpo(agent.policy(agent.theta + step * direction, obs))).mean().item()

    low, high = 0.0, 1e-3 / direction.norm().item()
    while kl(high) < distance and high < 1e6:
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if kl(middle) < distance else (low, middle)
    return agent.theta + high * direction


def as_trpo(dist: Any) -> Any:
    """PPO's distribution as TRPO's, whose file has the exact KL."""
    return getattr(trpo, type(dist).__name__)(*dist)


def weighted(episode: Episode, w: Tensor, gamma: float) -> dict[str, Tensor]:
    """Psi (T,) of the off-policy forms, w (T,) the ratios of each step."""
    past, return_ = w.cumprod(0), to_go(episode, gamma).double()
    corrected, running = torch.empty_like(return_), episode.last_value * episode.truncated
    for t in reversed(range(len(w))):  # the return whose later rewards carry the weights of the steps between
        later = running * (w[t + 1] if t + 1 < len(w) else 1.0)
        corrected[t] = running = episode.reward[t] + gamma * later
    return {
        "whole product (S4 2.9)": past[-1] * (return_ - episode.value),
        "causal products (S4 A.3)": past * (corrected - episode.value),
        "w_t twice (S4 2.10)": past * w * (corrected - episode.value),
        "past products (S4 2.11)": past * (return_ - episode.value),
        "one ratio (S4 2.13)": w * (return_ - episode.value),
        "one ratio, clipped": torch.where(slope_left(w, return_ - episode.value), w, 0.0)
        * (return_ - episode.value),
        "no ratio": return_ - episode.value,
    }


def slope_left(w: Tensor, advantage: Tensor) -> Tensor:
    """Where PPO's clip lets the gradient through, asked of the zoo's loss itself (T,)."""

    def loss(r, a):
        return ppo.policy_loss(r[None], r[None].log(), a[None], torch.zeros(()), "clip", 0.2)

    return vmap(grad(loss))(w, advantage) != 0


@torch.no_grad()
def ratios(agent: Agent, theta: Tensor, episode: Episode) -> Tensor:
    """pi_theta / pi of each step (T,), in double precision."""
    new, old = (agent.policy(x, episode.obs).log_prob(episode.action).double() for x in (theta, agent.theta))
    return (new - old).exp()


def measure_importance(
    agent: Agent, sample: list[Episode], direction: Tensor, budget: int, seed: int
) -> Iterator[tuple]:
    """Rows of the off-policy forms at several distances of the policy to be improved from the one that
    acted."""
    gamma, obs = agent.args.gamma, torch.cat([e.obs for e in sample])[::37]

    def on_policy(theta: Tensor, episode: Episode) -> Tensor:
        weight = gae(*episode.columns(), gamma, 1.0)[:, 0]
        return grad(lambda x: agent.policy(x, episode.obs).log_prob(episode.action) @ weight)(theta)

    for distance in DISTANCES:
        theta = moved(agent, direction, distance, obs)
        own = torch.stack(
            [on_policy(theta, e) for e in play(agent, theta, budget, 2 * BATCH * GROUPS, seed, "moved")]
        )
        reference, size = own.mean(0), squared_norm(own)
        forms, whole, single = dict[str, list[Tensor]](), list[Tensor](), list[Tensor]()
        for episode in sample:
            w = ratios(agent, theta, episode)
            psi = weighted(episode, w, gamma)
            # products of ratios overflow
            bounded = torch.stack(list(psi.values())).clamp(-1e12, 1e12).float()
            estimates = bounded @ agent.scores(theta, episode.obs, episode.action)
            for name, g in zip(psi, estimates, strict=True):
                forms.setdefault(name, []).append(g)
            whole.append(w.log().sum()[None])
            single.append(w.log())
        by_name = {name: torch.stack(g) for name, g in forms.items()} | {"the new policy's own": own}
        for name, g in by_name.items():
            yield "importance", name, distance, *cosine(g, reference)
            yield "importance", name, distance, "variance", *relative_variance(g, size)
        for name, parts in (("weights: whole product", whole), ("weights: one ratio", single)):
            yield "importance", name, distance, "effective sample size", *shares(parts)


def relative_variance(g: Tensor, size: float) -> tuple[float, float]:
    """tr Cov of estimates g (episodes, P) over `size`, the reference's squared norm, and its standard
    error."""
    return jackknife(lambda index: covariance_trace(g[index]).item() / size, len(g))


def shares(log_weights: list[Tensor]) -> tuple[float, float]:
    """The effective sample size of weights, given by episode as logarithms; a common factor does not matter
    to it."""

    def share(index):
        log_w = torch.cat([log_weights[i] for i in index])
        return effective_sample_size((log_w - log_w.max()).exp()).item()

    return jackknife(share, len(log_weights))


def measure_kl(
    agent: Agent, sample: list[Episode], direction: Tensor, budget: int, seed: int
) -> Iterator[tuple]:
    """Rows of k1, k2, k3 on the agent's states: as values, and what their gradients point at, as a loss and
    in the reward."""
    generator, actions, parts = torch.Generator().manual_seed(seed), 128, 8
    every = torch.cat([e.obs for e in sample])
    states = every[torch.randperm(len(every), generator=generator)[: min(512, max(32, budget // 100))]]
    obs = states.repeat_interleave(actions, 0)
    for distance in DISTANCES:
        ref = moved(agent, direction, distance, states)
        other = as_trpo(agent.policy(ref, states))
        noise = ppo.draw_noise(agent.envs, len(obs), generator=generator)
        with torch.no_grad():
            action = agent.policy(agent.theta, obs).sample(noise)
            log_ref = agent.policy(ref, obs).log_prob(action)
            log_ratio = log_ref.double() - agent.policy(agent.theta, obs).log_prob(action)
            true = trpo.kl(as_trpo(agent.policy(agent.theta, states)), other).mean().item()

        def to_ref(x, other=other):
            return trpo.kl(as_trpo(agent.policy(x, states)), other).mean()

        def from_ref(x, other=other):
            return trpo.kl(other, as_trpo(agent.policy(x, states))).mean()

        targets = {"KL(pi || ref)": grad(to_ref)(agent.theta), "KL(ref || pi)": grad(from_ref)(agent.theta)}
        for name, k in ESTIMATORS.items():
            value = k(log_ratio).view(len(states), actions)
            error = (value.var(1).mean() / value.numel()).sqrt().item()
            yield "kl_value", name, distance, "bias", value.mean().item() / true - 1, error / true
            yield "kl_value", name, distance, "std", *spread_within(value, true)
            for where in ("loss", "reward"):

                def loss(x, rows, where=where, k=k, action=action, log_ref=log_ref):
                    log_prob = agent.policy(x, obs[rows]).log_prob(action[rows])
                    estimate = k(log_ref[rows] - log_prob)
                    return (estimate if where == "loss" else in_reward(estimate, log_prob)).mean()

                split = torch.arange(len(obs)).view(len(states), actions).T.reshape(parts, -1)
                found = torch.stack([grad(loss)(agent.theta, rows) for rows in split])
                unit = targets["KL(pi || ref)"].norm()

                def length(index, g=found, unit=unit):
                    return (g[index].mean(0).norm() / unit).item()

                row = ("kl_gradient", f"{name} {where}", distance)
                yield *row, "length", *jackknife(length, parts)
                for target, gradient in targets.items():
                    cosines = torch.nn.functional.cosine_similarity(found, gradient[None], dim=1)
                    spread = (cosines.std() / parts**0.5).item()
                    yield *row, f"cosine with grad {target}", cosines.mean().item(), spread


def spread_within(value: Tensor, unit: float) -> tuple[float, float]:
    """The standard deviation of one action's estimate within its state, over `unit`; value (states,
    actions)."""
    return jackknife(lambda index: value[index].var(1).mean().sqrt().item() / unit, len(value))


# --- tables and plots ---------------------------------------------------------------------------------------


def write_table(path: Path, rows: Sequence[dict]) -> None:
    """A CSV of COLUMNS, atomically. Raises RunFault."""
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(
        [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]
    )
    with writing(path.parent):
        write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of such a table, at least one. Raises UsageError."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            _ = [row[name] for name in COLUMNS], int(row["stage"])
            _ = [float(row[name]) for name in ("x", "value", "error")]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UsageError(f"{path}: is no table of this script ({type(error).__name__}: {error})") from error
    require(bool(rows), f"{path}: holds no measurements")
    return rows


def measure(checkpoint: Path, path: Path, args: Args) -> list[dict[str, str]]:
    """All rows of one policy, from `path` if they have been measured."""
    if not path.is_file():
        agent = Agent(checkpoint)
        sample = play(agent, agent.theta, args.budget, 2 * BATCH * GROUPS, args.seed)
        large = play(agent, agent.theta, 8 * args.budget, 8 * BATCH * GROUPS, args.seed, "reference")
        rows, reference = measure_gradients(agent, sample, large, args.seed)
        half = sample[: max(len(sample) // 2, 2 * GROUPS)]
        rows += measure_importance(agent, half, reference, args.budget // 2, args.seed)
        rows += measure_kl(agent, sample, reference, args.budget, args.seed)
        numbers = [(*row[:2], *(f"{x:.6g}" if isinstance(x, float) else x for x in row[2:])) for row in rows]
        write_table(path, [dict(zip(COLUMNS, (agent.env, agent.step, *row), strict=True)) for row in numbers])
        agent.envs.close()
        print(
            f"{agent.env}, {agent.step:,} steps: {len(sample)} episodes, reference of {len(large)}",
            flush=True,
        )
    return read_table(path)


class Panel(NamedTuple):
    quantity: str
    label: str
    log: bool = True


VARIANCE, BIAS = (
    Panel("variance", "variance of one episode\n/ |gradient|²"),
    Panel("bias", "|bias| / |gradient|", False),
)
COSINE = Panel("cosine", f"cosine of {BATCH} episodes\nwith the reference", False)
# file: (the question, its caption, panels)
FIGURES: dict[str, tuple[str, str, tuple[Panel, ...]]] = {
    "psi": (
        "What may stand for an action's worth, at which variance and which bias?",
        "An episode's estimate is Σ ∇log π(a_t|s_t) Ψ_t; along the axis, Ψ. Total: all rewards of the "
        "episode; to-go: those from t on; V: the critic's; Q: the reward and the discounted V of the next "
        "state; TD: Q - V. Both tasks are deterministic, so that with the true V the TD error is the "
        "advantage itself. Better V: the critic fitted on to the returns of many more episodes.",
        (VARIANCE, BIAS, COSINE),
    ),
    "baselines": (
        "Which baseline lowers the variance most?",
        "Ψ is the return to go less a baseline: nothing, the other episodes' mean return, the best constant, "
        "the agent's V, a V fitted on to many more episodes.",
        (VARIANCE, COSINE),
    ),
    "gae": (
        "Where does λ trade bias for variance?",
        "Generalised advantage estimates with the agent's critic; λ = 0 is the TD error, λ = 1 the return to "
        "go less V.",
        (VARIANCE, BIAS, COSINE),
    ),
    "n_step": (
        "How far should rewards be trusted before the critic is?",
        "n-step advantages with the agent's critic; the last point is the whole return.",
        (VARIANCE, BIAS, COSINE),
    ),
    "importance": (
        "How far may a policy move before its old episodes are of no use?",
        "Gradients of a policy that has moved by a KL, from episodes of the old one, reweighted by ratios of "
        "new to old action probabilities. 'All' multiplies those of the whole episode, 'to each reward' "
        "those before a reward, 'to the action' those up to the action. Reference: the new policy's own "
        "episodes, of which 'own episodes' are a part. What leaves the axis has vanished with its product.",
        (COSINE, VARIANCE, Panel("effective sample size", "effective sample size\n/ samples")),
    ),
    "kl_value": (
        "Is k2's bias worth its small spread, and is k3 the best of both?",
        "One action's estimate of KL(π || ref), over that KL, ref being moved away from π: k1 = "
        "log(π / ref), k2 = half its square, k3 = ref / π - 1 + log(π / ref).",
        (Panel("bias", "bias / KL", False), Panel("std", "standard deviation\n/ KL")),
    ),
    "kl_gradient": (
        "Which KL does a penalty descend, as a loss and inside the reward?",
        "k1 = log(π / ref), k2 = half its square, k3 = ref / π - 1 + log(π / ref), of actions drawn by π. "
        "Loss: the estimate is differentiated; reward: it weighs ∇log π. Gradients over 8,192 samples "
        "(65,536 for their length) against the exact ones of the KL's two directions.",
        (
            Panel("cosine with grad KL(pi || ref)", "cosine with\n∇KL(π || ref)", False),
            Panel("cosine with grad KL(ref || pi)", "cosine with\n∇KL(ref || π)", False),
            Panel("length", "length\n/ |∇KL(π || ref)|"),
        ),
    ),
}
BY_STAGE = ("psi", "baselines", "gae", "n_step")  # their curves are stages of training, else estimators
# what an estimator is called where its curve ends, and its colour
SHORT = {
    "whole product (S4 2.9)": ("all", "C0"),
    "causal products (S4 A.3)": ("to each reward", "C1"),
    "w_t twice (S4 2.10)": ("same, action's twice", "C2"),
    "past products (S4 2.11)": ("to the action", "C3"),
    "one ratio (S4 2.13)": ("the action's alone", "C4"),
    "one ratio, clipped": ("that, clipped", "C5"),
    "no ratio": ("none", "C6"),
    "the new policy's own": ("own episodes", "black"),
    "weights: whole product": ("all", "C0"),
    "weights: one ratio": ("the action's alone", "C4"),
}


def draw(name: str, rows: list[dict[str, str]], path: Path) -> None:
    """One figure: a row of axes for each quantity, a column for each task."""
    from matplotlib.figure import Figure

    question, caption, panels = FIGURES[name]
    envs = list(dict.fromkeys(row["env"] for row in rows))
    figure = Figure(figsize=(1 + 4.4 * len(envs), 1.8 + 2.3 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), len(envs), squeeze=False, sharey="row")
    for (i, panel), (j, env) in itertools.product(enumerate(panels), enumerate(envs)):
        axis, last = axes[i][j], i == len(panels) - 1
        here = [row for row in rows if row["env"] == env and row["quantity"] == panel.quantity]
        if panel.log:
            axis.set_yscale("log")
        elif panel.quantity == "bias" and name in BY_STAGE:
            axis.set_yscale("symlog", linthresh=0.1)
        else:
            axis.axhline(0, color="grey", linewidth=0.6)
        (stages_in if name in BY_STAGE else estimators_in)(axis, name, here, last)
        if j == 0:
            axis.set_ylabel(panel.label)
        if i == 0:
            axis.set_title(env, fontsize=10)
            if name in BY_STAGE:
                axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    for panel, row in zip(panels, axes, strict=True):
        if panel.log or (panel.quantity == "bias" and name in BY_STAGE):
            # products of ratios vanish
            row[0].set_ylim(bottom=max(row[0].get_ylim()[0], 1e-3) if panel.log else 0)
    if name not in BY_STAGE:
        for axis in axes.flat:
            label_ends(axis)
    bars = (
        " Bars: one standard error."
        if name in BY_STAGE
        else " Lines: the median over stages of one training, bands: their range."
    )
    width = figure.get_figwidth()
    figure.suptitle(textwrap.fill(question, int(8 * width)), fontsize=13, fontweight="bold")
    figure.supxlabel(textwrap.fill(caption + bars, int(13 * width)), fontsize=9)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    write_atomically(path, lambda file: file.write(image.getvalue()))


def stages_in(axis: Any, name: str, rows: list[dict[str, str]], last: bool) -> None:
    """Curves of a quantity along the table, the baselines, lambda or n: one for each stage of training."""
    categories = sorted({(float(row["x"]), row["estimator"]) for row in rows})
    categories = categories if name in ("psi", "baselines") else []
    finite = sorted({float(row["x"]) for row in rows if math.isfinite(float(row["x"]))})
    stages = sorted({int(row["stage"]) for row in rows})
    for place, stage in enumerate(stages):
        points = sorted((row for row in rows if int(row["stage"]) == stage), key=lambda row: float(row["x"]))
        shift = (place - (len(stages) - 1) / 2) * 0.12 if categories else 0.0
        x = [position(name, float(row["x"]), finite) + shift for row in points]
        y, errors = ([float(row[key]) for row in points] for key in ("value", "error"))
        look = {"marker": "osD^vP*X<>"[place % 10], "linestyle": "none" if categories else "-"}
        axis.errorbar(
            x, y, yerr=errors, label=f"{stage:,} steps", color=f"C{place}", capsize=2, markersize=4,
            linewidth=1.2, **look,
        )  # fmt: skip
    label_x(axis, name, finite, categories, last)


def estimators_in(axis: Any, name: str, rows: list[dict[str, str]], last: bool) -> None:
    """Curves of a quantity over the KL: for each estimator the median over stages, and their range."""
    finite = sorted({float(row["x"]) for row in rows})
    for place, estimator in enumerate(dict.fromkeys(row["estimator"] for row in rows)):
        values = [[float(r["value"]) for r in rows if r["estimator"] == estimator and float(r["x"]) == x]
                  for x in finite]  # fmt: skip
        low, middle, high = (np.array([pick(v) for v in values]) for pick in (min, np.median, max))
        words, colour = SHORT.get(estimator, (estimator, f"C{place}"))
        axis.plot(finite, middle, color=colour, label=words, marker="o", markersize=3, linewidth=1.4)
        axis.fill_between(finite, low, high, color=colour, alpha=0.1, linewidth=0)
    label_x(axis, name, finite, [], last)


def label_ends(axis: Any) -> None:
    """Write each curve's name where it ends, pushed apart where several end together."""
    ends = []
    for line in axis.get_lines():
        if not line.get_label().startswith("_"):
            x, y = line.get_data()
            end = axis.transData.transform((x[-1], max(y[-1], axis.get_ylim()[0])))
            place = axis.transAxes.inverted().transform(end)[1]
            ends.append([place, line.get_label(), line.get_color()])
    ends.sort(key=lambda end: end[0])
    gap = 0.075  # the height of a line of text in that of the axes
    for low, high in itertools.pairwise(ends):
        high[0] = max(high[0], low[0] + gap)
    ends[-1][0] = min(ends[-1][0], 1.0)
    for high, low in itertools.pairwise(reversed(ends)):
        low[0] = min(low[0], high[0] - gap)
    for place, words, colour in ends:
        axis.text(1.02, place, words, color=colour, fontsize=8, va="center", transform=axis.transAxes)


def position(name: str, x: float, finite: list[float]) -> float:
    """Where a value of x stands on its axis."""
    if name == "gae":
        return float(LAMBDAS.index(x))  # evenly, or 0.9 to 1 would be one blot
    return x if math.isfinite(x) else 4 * finite[-1]


def label_x(
    axis: Any, name: str, finite: list[float], categories: list[tuple[float, str]], last: bool
) -> None:
    if categories:
        axis.set_xticks(
            [x for x, _ in categories],
            [label for _, label in categories],
            rotation=25,
            ha="right",
            fontsize=8,
        )
    elif name == "gae":
        axis.set_xticks(range(len(LAMBDAS)), [f"{x:g}" for x in LAMBDAS])
    else:
        axis.set_xscale("log")
        if name == "n_step":
            axis.set_xticks([*finite, 4 * finite[-1]], [*(f"{x:g}" for x in finite), "∞"])
            axis.minorticks_off()
    axis.tick_params(labelbottom=last)
    if last and not categories:
        axis.set_xlabel({"gae": "λ", "n_step": "n"}.get(name, "KL between the two policies"))


def run(args: Args) -> None:
    """Train, measure, write the tables and plots. Raises UsageError, RunFault."""
    require(args.budget >= 1, f"--budget must be at least 1, not {args.budget}")
    require(0 <= args.seed < 2**31, f"--seed must lie in [0, 2**31), not {args.seed}")
    require(bool(args.env), "--env needs at least one task")
    require(not (args.checkpoints and args.stages), "--stages goes with training, --checkpoints without it")
    require(
        all(stage >= 1 for stage in args.stages or ()) and args.stages != (),
        f"--stages {args.stages}: at least 1 each",
    )
    found = importlib.util.find_spec("matplotlib") is not None
    require(found, "drawing needs matplotlib: pip install -e '.[plots]'")
    torch.set_num_threads(1)
    if args.plots:
        files = {name: args.results / f"{name}.csv" for name in FIGURES}
        for file in files.values():
            require(
                file.is_file(),
                f"--results {args.results}: holds no {file.name}; measure first, without --plots",
            )
        tables = {name: read_table(file) for name, file in files.items()}
    else:
        rows = measure_all(args)
        tables = {name: [row for row in rows if row["question"] == name] for name in FIGURES}
        for name, own in tables.items():
            write_table(args.results / f"{name}.csv", own)
    with writing(args.results):
        for name, own in tables.items():
            draw(name, own, args.results / f"{name}.png")


def measure_all(args: Args) -> list[dict[str, str]]:
    """The rows of all policies asked for; those of finished ones are read again."""
    settings = f"{args.seed}_{args.budget}"
    chosen, envs = list[tuple[Path, Path]](), set(args.env)
    if args.checkpoints:
        envs = set()
        for path in args.checkpoints:
            require(path.is_file(), f"--checkpoints {path}: no such file")
            content = load_checkpoint(path, "--checkpoints", "ppo")
            name = f"estimators_{path.stem}_{content.get('step')}_{settings}.csv"
            chosen.append((path, path.parent / name))
            envs.add(content["env"])
    else:
        for env_id in args.env:
            make_envs(env_id, 1).close()  # an unknown task is told before any work
    there = [path for name in FIGURES if (path := args.results / f"{name}.csv").is_file()]
    others = {row["env"] for path in there for row in read_table(path)} - envs
    held = f"--results {args.results}: holds the tables of {', '.join(sorted(others))}"
    require(not others, f"{held}, which this would replace; name another folder")
    make_folder(args.results, "--results")
    if not args.checkpoints:
        for env_id in args.env:
            stages = args.stages or STAGES.get(env_id, STAGES["HalfCheetah-v4"])
            folder = args.runs / f"{re.sub('[^A-Za-z0-9_.-]+', '_', env_id)}_{args.seed}_{max(stages)}"
            with writing(folder):
                paths = train(env_id, sorted(set(stages)), folder, args)
            chosen += [(path, path.parent / f"rows_{settings}.csv") for path in paths]
    rows = [row for path, table in chosen for row in measure(path, table, args)]
    with writing(args.results):
        trusted = {
            f"{r['env']} at {r['stage']}": float(r["value"]) for r in rows if r["question"] == "reference"
        }
        meta = {
            "budget": args.budget,
            "seed": args.seed,
            "torch": torch.__version__,
            "cosine of the reference": trusted,
        }
        write_atomically(
            args.results / "meta.json", lambda file: file.write(json.dumps(meta, indent=2).encode() + b"\n")
        )
    return rows


def main() -> int:
    """Measure, or tell in one line what is wrong; the exit status."""
    return script_main(Args, __doc__, run, interrupted="interrupted; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
