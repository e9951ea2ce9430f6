"""Diffusion policy policy optimisation (DPPO, Ren et al. 2024, arXiv:2409.00588), one file.

A policy that makes an action by denoising is first cloned from a data set, then improved by PPO. The action
a^0 of the state s, or the chunk of H actions that are played one after another, ends a chain of K steps that
begins in noise, and each step is a Gaussian, so that the task becomes an MDP of two levels:

    state (s, a^k, k), action a^{k-1},    pi(a^{k-1} | a^k, s) = N(mu_k(a^k, x_theta(s, a^k, k)), sigma_k^2 I)
    k > 1: no reward, s stays             k = 1: a^0 is played, the reward is the task's, the next s begins

x_theta says what a^0 will be (Salimans & Ho 2022, arXiv:2202.00512), mu_k is DDIM's mean of it, and at k = K
nothing is left of a^0 in a^K (Lin et al. 2023, arXiv:2305.08891), so that --policy gaussian is the same with
K = 1: one step from nothing, a ~ N(x_theta(s), sigma_1^2 I).

    clone        E |x_theta(s, signal_k a + noise_k eps, k) - a|^2        (s, a) of the data, k of 1 .. K
    fine-tune    E min(r_k A_k, clip(r_k, 1 - eps, 1 + eps) A_k)          r_k = pi / pi_old, over steps x K
                 A_k = gamma_d^{k-1} A(s, a^0),  A by GAE from one step of the task, or one chunk, to the next

The critic sees s alone. An early step of the chain has less to do with what the action will be, and gamma_d
weighs it less. sigma_k is kept from falling below --min-std: exploration. Evaluations play the chain without
noise, and of its chunk the first action.

    python zoo/dppo.py --data results/dppo/Pendulum-v1                    a clone of a poor agent, improved
    python zoo/dppo.py --data results/dppo/Pendulum-v1 --policy gaussian  the same of one step
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from zoo.common.args import RunArgs, check_args, require
from zoo.common.cli import main
from zoo.common.demonstrations import Episode, mean_return, open_demonstrations, windows
from zoo.common.device import compile_function, flatten, loader, scan, setup
from zoo.common.diffusion import Schedule, cosine_schedule
from zoo.common.envs import VectorEnv, make_envs
from zoo.common.evaluate import Evaluation, Policy
from zoo.common.horizon import time_limit
from zoo.common.normalize import (
    Stats,
    discounted_sums,
    new_stats,
    normalize,
    normalizer,
    return_scale,
    update_stats,
)
from zoo.common.optim import Moments, adam, clip_grad, new_adam
from zoo.common.run import Run
from zoo.common.seeding import env_seeds, generator_seed

AT_ONCE = 200  # gradient steps of cloning in one compiled call, and between reports


@dataclass
class Args(RunArgs):
    kept: ClassVar = (*RunArgs.kept, "hidden", "policy", "denoising_steps", "chunk", "clone_steps")

    env: str = "Pendulum-v1"  # id of the Gymnasium environment
    total_steps: int = 50_000  # environment steps of the fine-tuning, over all environments
    eval_every: int = 10_000  # environment steps between evaluations; 0: at the end only
    data: str | None = None  # who is cloned: the folder of a run, whose agent plays, or minari:ID
    data_steps: int = 20_000  # steps of the data
    policy: Literal["diffusion", "gaussian"] = "diffusion"  # gaussian: of one denoising step
    denoising_steps: int = 10  # K of a diffusion policy
    chunk: int = 1  # actions of one denoising, played one after another until an episode ends, H
    eta: float = 1.0  # noise of the denoising steps: 1 DDPM's, towards 0 DDIM's
    min_std: float = 0.2  # least standard deviation of a denoising step, in units of half the action range
    clone_steps: int = 4000  # gradient steps of cloning; 0: none, and no data
    clone_batch: int = 256  # actions in each
    clone_rate: float = 1e-3  # its Adam's learning rate, falling linearly to 0
    num_envs: int = 8  # environments stepped together, N
    num_steps: int = 128  # steps of each environment between updates, T
    num_epochs: int = 10  # passes over a batch
    minibatch_size: int = 64  # of actions (chunks), so that a gradient step has K times as many rows
    warmup: int = 1  # updates at first in which the critic learns alone
    learning_rate: float = 1e-3  # Adam's
    anneal: bool = True  # let the learning rate fall linearly to 0 over the run
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # GAE's lambda: 0 trusts the critic (one-step TD), 1 the rewards (Monte Carlo)
    denoising_gamma: float = 0.9  # discount of the denoising steps before the last, gamma_d
    clip: float = 0.2  # eps of the clipped surrogate
    value_coef: float = 0.25  # weight of the value loss, c1
    max_grad_norm: float = 0.5  # the gradient is scaled down to this norm
    hidden: tuple[int, ...] = (64, 64)  # widths of the tanh layers
    normalize_obs: bool = True  # observations by running mean and standard deviation, at first the data's
    scale_rewards: bool = True  # rewards by the running standard deviation of the discounted return

    @property
    def chain(self) -> int:
        """Denoising steps K."""
        return 1 if self.policy == "gaussian" else self.denoising_steps

    @property
    def rows(self) -> int:
        """Denoising steps of an epoch: of the fewest actions (chunks) that a rollout can have, wherever
        episodes end, as many as fill whole minibatches.
        """
        decisions = self.num_envs * -(-self.num_steps // self.chunk)
        return decisions // self.minibatch_size * self.minibatch_size * self.chain


# What differs by task; a flag wins over it. Everything else runs on the defaults above.
SETTINGS: dict[str, dict] = {
    "Pendulum-v1": dict(gamma=0.98, min_std=0.4, num_epochs=20, eval_episodes=100),
    "Hopper-v4": dict(
        total_steps=1_000_000, num_envs=64, num_steps=32, learning_rate=3e-4, eval_every=100_000,
    ),
}  # fmt: skip


# --- networks and chains ------------------------------------------------------------------------------------


def layer(inputs: int, outputs: int, gain: float = 2**0.5) -> nn.Linear:
    """A linear layer with orthogonal weights and zero bias."""
    linear = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


def trunk(inputs: int, hidden: tuple[int, ...]) -> nn.Sequential:
    """Tanh layers from `inputs` to hidden[-1] features."""
    widths = (inputs, *hidden)
    return nn.Sequential(*[m for i, o in zip(widths, hidden, strict=False) for m in (layer(i, o), nn.Tanh())])


class ActorCritic(nn.Module):
    """obs (B, D), x = a^k (B, C), k (B,) of 1 .. K -> x_theta, what a^0 will be (B, C), and V (B,)."""

    time: Tensor
    shown: Tensor

    def __init__(self, obs_dim: int, chunk_dim: int, schedule: Schedule, hidden: tuple[int, ...]):
        super().__init__()
        angle = torch.linspace(0, torch.pi, schedule.steps + 1)[:, None] * 2.0 ** torch.arange(4)
        self.register_buffer("time", torch.cat((angle.sin(), angle.cos()), -1), persistent=False)
        # of a^K, which holds nothing of a^0, nothing is shown
        self.register_buffer("shown", (schedule.signal.cpu() > 0).float()[:, None], persistent=False)
        self.policy_trunk = trunk(obs_dim + chunk_dim + 8, hidden)
        self.value_trunk = trunk(obs_dim, hidden)
        self.policy_head = layer(hidden[-1], chunk_dim, 0.01)
        self.value_head = layer(hidden[-1], 1, 1.0)

    def policy(self, obs: Tensor, x: Tensor, k: Tensor) -> Tensor:
        return self.policy_head(self.policy_trunk(torch.cat((obs, x * self.shown[k], self.time[k]), -1)))

    def value(self, obs: Tensor) -> Tensor:
        return self.value_head(self.value_trunk(obs)).squeeze(-1)

    def forward(self, obs: Tensor, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy(obs, x, k), self.value(obs)


def make_schedule(args: Args, device: torch.device | str = "cpu") -> Schedule:
    """The cosine schedule of K steps, at whose last no signal is left."""
    return cosine_schedule(args.chain, args.eta, args.min_std, max_beta=1.0, device=device)


def denoised(x0: Tensor, x: Tensor, k: Tensor, schedule: Schedule) -> Tensor:
    """mu_k (B, C) of the step from a^k = x to a^{k-1} (DDIM, arXiv:2010.02502, eq. 12), by what a^0 will be;
    k (B,).
    """
    eps = (x - schedule.signal[k, None] * x0) / schedule.noise[k, None]
    rest = (schedule.noise[k - 1, None] ** 2 - schedule.sigma[k, None] ** 2).clamp(min=0).sqrt()
    return schedule.signal[k - 1, None] * x0 + rest * eps


def squared(difference: Tensor, reduce: str) -> Tensor:
    """|difference|^2 over the last dimension, or its mean in place of the sum."""
    return (difference**2).sum(-1) if reduce == "sum" else (difference**2).mean(-1)


def step_log_prob(x_next: Tensor, mean: Tensor, sigma: Tensor, reduce: str = "sum") -> Tensor:
    """log pi(x_{t-1} | x_t) (B,), S0 (19), or with `mean` a d-th of it; x_next, mean (B, d), sigma (B,)."""
    size = mean.shape[-1] if reduce == "sum" else 1
    log_root = sigma.log() + 0.9189385332046727  # of 2 pi sigma^2
    return -squared(x_next - mean, reduce) / (2 * sigma**2) - size * log_root


def denoise(net: ActorCritic, schedule: Schedule, obs: Tensor, noise: Tensor) -> Tensor:
    """The chains a^0 .. a^K (N, K + 1, C) of observations (N, D); noise (K + 1, N, C) ends in a^K."""
    chain = [noise[-1]]
    for k in range(schedule.steps, 0, -1):
        index = torch.full((len(obs),), k, device=obs.device)
        mean = denoised(net.policy(obs, chain[0], index), chain[0], index, schedule)
        chain.insert(0, mean + schedule.sigma[k] * noise[k - 1])
    return torch.stack(chain, 1)


# --- estimators ---------------------------------------------------------------------------------------------


def chunk_gae(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, truncated: Tensor, begins: Tensor,
    gamma: float, lam: float,
) -> Tensor:  # fmt: skip
    """Generalised advantage estimates (T, N) from one decision to the next (arXiv:1506.02438, eq. 16).

    begins: where a chunk begins, and the estimate is one; elsewhere it stands for nothing. A chunk's reward
    is the discounted sum of those of its steps. next_value[t] is V of the true successor of step t. The
    recursion is cut at every episode's end, the bootstrap at terminations only.
    """
    last = torch.cat((begins[1:], torch.ones_like(begins[:1])))  # steps of chunks
    goes_on, bootstrap = ~(terminated | truncated), next_value * ~terminated
    advantage, to_go = [torch.zeros_like(value[0])], torch.zeros_like(value[0])
    for t in range(len(reward) - 1, -1, -1):
        after = bootstrap[t] + lam * advantage[0] * goes_on[t]
        to_go = reward[t] + gamma * torch.where(last[t], after, to_go)
        advantage.insert(0, to_go - value[t])
    return torch.stack(advantage[:-1])


def two_level(advantage: Tensor, steps: int, gamma: float) -> Tensor:
    """A_k = gamma^{k-1} A (B, K) of the denoising steps 1 .. K, from A (B,) of what they made."""
    return advantage[:, None] * gamma ** torch.arange(steps, device=advantage.device)


# --- losses -------------------------------------------------------------------------------------------------


class DenoisingSteps(NamedTuple):
    """Denoising steps of chains, (B, ...) each: a^k = x, a^{k-1} = x_next, and what they were worth."""

    obs: Tensor
    x: Tensor
    x_next: Tensor
    k: Tensor
    log_prob: Tensor
    advantage: Tensor
    return_: Tensor


class Demonstrated(NamedTuple):
    """Chunks of the data to be noised, (B, ...) each: eps the noise, k of 1 .. K how much of it."""

    obs: Tensor
    action: Tensor
    eps: Tensor
    k: Tensor


def clone_loss(params: Tensor, batch: Demonstrated, forward: Callable, schedule: Schedule) -> Tensor:
    """The mean squared error of what the network says of noised actions; forward(params, obs, x, k)."""
    x = schedule.signal[batch.k, None] * batch.action + schedule.noise[batch.k, None] * batch.eps
    return ((forward(params, batch.obs, x, batch.k)[0] - batch.action) ** 2).mean()


def dppo_loss(
    params: Tensor,
    batch: DenoisingSteps,
    policy_coef: Tensor,
    forward: Callable,
    schedule: Schedule,
    args: Args,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a minibatch and what to log of it; policy_coef (): 0 while the critic learns alone."""
    x0, value = forward(params, batch.obs, batch.x, batch.k)
    mean = denoised(x0, batch.x, batch.k, schedule)
    log_ratio = step_log_prob(batch.x_next, mean, schedule.sigma[batch.k]) - batch.log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
    pg_loss = -torch.min(ratio * batch.advantage, clipped * batch.advantage).mean()
    v_loss = ((value - batch.return_) ** 2).mean()
    metrics = {"policy_loss": pg_loss, "value_loss": v_loss}
    metrics["approx_kl"] = ((ratio - 1) - log_ratio).mean()  # of a denoising step
    metrics["clipfrac"] = ((ratio - 1).abs() > args.clip).float().mean()
    return policy_coef * pg_loss + args.value_coef * v_loss, metrics


# --- the updates --------------------------------------------------------------------------------------------


def clone(
    forward: Callable, schedule: Schedule, args: Args, params: Tensor, opt: Moments, batches: Demonstrated,
    learning_rate: Tensor,
) -> tuple[Tensor, Moments, Tensor]:  # fmt: skip
    """A gradient step of cloning for each of the batches (M, B, ...); the mean of their losses."""

    def step(carry, batch):
        params, opt = carry
        grad, loss = grad_and_value(clone_loss)(params, batch, forward, schedule)
        return adam(params, clip_grad(grad, args.max_grad_norm)[0], opt, learning_rate), loss

    (params, opt), losses = scan(step, (params, opt), batches)
    return params, opt, losses.mean()


def fine_tune(
    forward: Callable, schedule: Schedule, args: Args, params: Tensor, opt: Moments, batch: DenoisingSteps,
    order: Tensor, learning_rate: Tensor, policy_coef: Tensor,
) -> tuple[Tensor, Moments, dict[str, Tensor]]:  # fmt: skip
    """A step for each minibatch of the rows in this order, (B,); metrics are their means."""

    def step(carry, minibatch):
        params, opt = carry
        loss = grad_and_value(dppo_loss, has_aux=True)
        grad, (_, metrics) = loss(params, minibatch, policy_coef, forward, schedule, args)
        grad, grad_norm = clip_grad(grad, args.max_grad_norm)
        return adam(params, grad, opt, learning_rate), metrics | {"grad_norm": grad_norm}

    size = args.minibatch_size * args.chain
    minibatches = DenoisingSteps(*(column[order].unflatten(0, (-1, size)) for column in batch))
    (params, opt), metrics = scan(step, (params, opt), minibatches)
    return params, opt, {name: column.mean() for name, column in metrics.items()}


# --- the run ------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """What a run goes on from: everything that training changes, by name."""

    params: Tensor
    opt: Moments
    obs_stats: Stats
    return_stats: Stats
    cloned: int  # gradient steps of cloning that are done
    generator: torch.Generator


class Rollout(NamedTuple):
    """T steps of N environments, (T, N, ...) each; next_obs is the true successor."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    terminated: Tensor
    truncated: Tensor


def policy_at(
    net: ActorCritic, schedule: Schedule, obs_stats: Stats
) -> Callable[[np.ndarray, Tensor], Tensor]:
    """Observations (N, D) and noise (K + 1, N, C) to chains, by the parameters that are in `net`."""
    device, seen = obs_stats["mean"].device, normalizer(obs_stats)

    def policy(obs: np.ndarray, noise: Tensor) -> Tensor:
        return denoise(net, schedule, seen(torch.as_tensor(obs, device=device)), noise)

    return policy


def collect_chunks(
    envs: VectorEnv, obs: np.ndarray, policy: Callable, noise: Tensor, chunk: int
) -> tuple[Rollout, Tensor, np.ndarray, list]:
    """Act for T steps; the rollout, whose `action` is the chain that was played from, where chunks begin (T,
    N), the next observations, episodes ended. noise (T, K + 1, N, C).

    A chunk stops at its episode's end, and the rollout's: what is left of it is never played.
    """
    rows, episodes = [], []
    played, every = np.full(envs.num_envs, chunk), np.arange(envs.num_envs)
    chain = noise.new_zeros(envs.num_envs, *noise.shape[1::2])
    for step_noise in noise:
        begins = torch.as_tensor(played == chunk, device=noise.device)
        if begins.any():
            chain = torch.where(begins[:, None, None], policy(obs, step_noise), chain)
            played[played == chunk] = 0
        action = chain[:, 0].unflatten(-1, (chunk, -1)).cpu().numpy()[every, played]
        step = envs.step(action)
        played = np.where(step.terminated | step.truncated, chunk, played + 1)
        reward = step.reward.astype(np.float32)
        rows.append((obs, reward, step.next_obs, step.terminated, step.truncated, chain, begins))
        obs = step.obs
        episodes += step.episodes
    *columns, chains, begun = zip(*rows, strict=True)
    seen, *others = [torch.as_tensor(np.stack(column), device=noise.device) for column in columns]
    return Rollout(seen, torch.stack(chains), *others), torch.stack(begun), obs, episodes


def as_seen(
    rollout: Rollout, obs_stats: Stats, return_stats: Stats, sums: Tensor, args: Args
) -> tuple[Rollout, Stats, Stats, Tensor]:
    """The rollout as the networks see it, and the statistics with it counted in.

    Observations are normalised as they were when they were acted on; rewards are scaled with their own sums
    counted. sums (N,) are each environment's discounted rewards so far, which the next rollout goes on from.
    """
    obs, next_obs = normalize(rollout.obs, obs_stats), normalize(rollout.next_obs, obs_stats)
    reward = rollout.reward
    if args.scale_rewards:
        ended = rollout.terminated | rollout.truncated
        all_sums, sums = discounted_sums(reward, ended, sums, args.gamma)
        return_stats = update_stats(return_stats, all_sums.flatten())
        reward = reward / return_scale(return_stats)
    if args.normalize_obs:
        obs_stats = update_stats(obs_stats, rollout.obs.flatten(0, 1))
    return rollout._replace(obs=obs, next_obs=next_obs, reward=reward), obs_stats, return_stats, sums


def values(net: ActorCritic, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """V of each row's observation and of its true successor, (T, N) each.

    The successor is the next row's observation, but where a time limit ended the episode. (Where it
    terminated, the value stands for nothing and is not read.)
    """
    value = net.value(torch.cat((rollout.obs, rollout.next_obs[-1:])))
    next_value = value[1:].clone()
    if rollout.truncated.any():
        next_value[rollout.truncated] = net.value(rollout.next_obs[rollout.truncated])
    return value[:-1], next_value


def denoising_rows(
    net: ActorCritic, schedule: Schedule, obs: Tensor, chain: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """obs, x, x_next, k and the log-probability of every step of chains (B, K + 1, C), (B x K, ...) each."""
    count, steps = len(chain), schedule.steps
    x, x_next = chain[:, 1:].flatten(0, 1), chain[:, :-1].flatten(0, 1)
    k = torch.arange(1, steps + 1, device=chain.device).repeat(count)
    rows = obs.repeat_interleave(steps, 0)
    mean = denoised(net.policy(rows, x, k), x, k, schedule)
    return rows, x, x_next, k, step_log_prob(x_next, mean, schedule.sigma[k])


def acting(state: State) -> dict:
    """What acting needs, and nothing else: an agent.pt."""
    return {"params": state.params, "obs_stats": state.obs_stats}


def make_policy(envs: VectorEnv, args: Args, agent: dict) -> Policy:
    """The deterministic policy of what an agent.pt holds: observations (N, D) to the first actions of chunks
    denoised without noise.
    """
    schedule, size = make_schedule(args, agent["params"].device), args.chunk * envs.action_dim
    net = ActorCritic(envs.obs_dim, size, schedule, args.hidden).to(agent["params"].device).eval()
    loader(net)(agent["params"])
    policy = policy_at(net, schedule, agent["obs_stats"])

    def act(obs: np.ndarray) -> np.ndarray:
        chain = policy(obs, agent["params"].new_zeros(args.chain + 1, len(obs), size))
        return chain[:, 0, : envs.action_dim].cpu().numpy()

    return act


def clone_policy(
    state: State, episodes: list[Episode], forward: Callable, schedule: Schedule, run: Run, args: Args
) -> State:
    """The state after cloning what the episodes show, reported as step 0 of the run as it goes.

    At the end the clone is saved and evaluated, and the critic's optimiser begins anew with the policy's.
    """
    seen, shown = windows(episodes, args.chunk)
    device, generator = state.params.device, state.generator
    obs, action = torch.as_tensor(seen, device=device), torch.as_tensor(shown, device=device)
    if args.normalize_obs:
        stats = new_stats(
            obs.shape[1], device=device
        )  # not those of a stopped run, which hold the data already
        state = state._replace(obs_stats=update_stats(stats, obs))
    obs = normalize(obs, state.obs_stats)
    clone_compiled = compile_function(partial(clone, forward, schedule, args), device, args.compile)
    while state.cloned < args.clone_steps:
        count = min(AT_ONCE, args.clone_steps - state.cloned)
        drawn = (count, args.clone_batch)
        rows = torch.randint(len(obs), drawn, generator=generator, device=device)
        k = torch.randint(1, args.chain + 1, drawn, generator=generator, device=device)
        eps = torch.empty(*drawn, action.shape[1], device=device).normal_(generator=generator)
        rate = torch.tensor(args.clone_rate * (1 - state.cloned / args.clone_steps), device=device)
        batches = Demonstrated(obs[rows], action[rows], eps, k)
        params, opt, loss = clone_compiled(state.params, state.opt, batches, rate)
        done, metrics = state.cloned + count, {"clone_loss": loss}
        cloned = done == args.clone_steps
        if cloned:
            opt = new_adam(params)
            returned = mean_return(episodes)
            metrics |= {} if returned is None else {"data_return": torch.tensor(returned)}
        state = state._replace(params=params, opt=opt, cloned=done)
        run.report(0, state, acting(state), metrics, [], milestone=cloned)
    return state


def check(args: Args) -> None:
    """Refuse arguments that cannot work together."""
    check_args(
        args,
        at_least_1=(
            "data_steps", "denoising_steps", "chunk", "clone_batch", "num_steps", "num_epochs",
            "minibatch_size", "hidden",
        ),
        fractions=("eta", "gamma", "gae_lambda", "denoising_gamma"),
        positive=("min_std", "clone_rate", "learning_rate", "clip", "max_grad_norm"),
        at_least_0=("clone_steps", "warmup", "value_coef"),
    )  # fmt: skip
    require(args.data != "", "--data is empty; the folder of a run or minari:ID is meant")
    require(
        args.data is None or args.clone_steps > 0,
        f"--data {args.data}: --clone-steps 0 clones nobody; leave one of the two out",
    )
    require(
        args.data is not None or args.clone_steps == 0,
        "--data: whom to clone is missing: the folder of a run whose agent plays, or minari:ID; "
        "--clone-steps 0 begins from nothing",
    )
    require(
        args.chunk <= args.num_steps,
        f"--chunk {args.chunk} is longer than a rollout of --num-steps {args.num_steps}",
    )
    require(
        args.rows > 0,
        f"--minibatch-size {args.minibatch_size} is more than the actions (chunks) of a rollout, "
        f"{args.num_envs * -(-args.num_steps // args.chunk)}",
    )


def check_task(envs: VectorEnv, args: Args) -> None:
    """Refuse a task that chunks of continuous actions do not fit."""
    require(
        not envs.discrete,
        f"--env {args.env}: its actions are discrete, and a diffusion policy's are numbers; zoo/ppo.py acts "
        "in it",
    )
    limit = time_limit(args.env)
    require(
        args.chunk <= limit, f"--chunk {args.chunk} is longer than an episode of {args.env}, {limit} steps"
    )


def train(args: Args) -> float:
    """Clone, then run DPPO; the mean return of the final evaluation."""
    check(args)
    device = setup(args.device, args.threads)
    envs = make_envs(args.env, args.num_envs, threads=args.env_threads)
    check_task(envs, args)
    episodes: list[Episode] = []
    if args.clone_steps and not args.resume:
        episodes = open_demonstrations(str(args.data), envs)(args.data_steps, args.seed)
        windows(episodes, args.chunk)
    schedule, size = make_schedule(args, device), args.chunk * envs.action_dim
    torch.manual_seed(generator_seed(args.seed, "network"))
    net = ActorCritic(envs.obs_dim, size, schedule, args.hidden).to(device)
    params, unflatten = flatten(net)

    def forward(params, *inputs):
        return functional_call(net, unflatten(params), inputs)

    load = loader(net)
    fine_tune_compiled = compile_function(partial(fine_tune, forward, schedule, args), device, args.compile)
    run = Run(args, "dppo", Evaluation(args, make_policy), engine=envs.engine)
    generator = torch.Generator(device).manual_seed(generator_seed(args.seed, "noise"))
    obs_stats, return_stats = new_stats(envs.obs_dim, device=device), new_stats(device=device)
    state = run.restore(State(params, new_adam(params), obs_stats, return_stats, 0, generator))
    if state.cloned < args.clone_steps:
        episodes = episodes or open_demonstrations(str(args.data), envs)(args.data_steps, args.seed)
        state = clone_policy(state, episodes, forward, schedule, run, args)
    params, opt, obs_stats, return_stats, done, generator = state
    load(params)
    # a resumed run begins new episodes
    obs = envs.reset(env_seeds(args.seed, "environments", args.num_envs, run.step))
    sums = torch.zeros(args.num_envs, device=device)

    while run.step < args.total_steps:
        remaining = 1 - run.step / args.total_steps if args.anneal else 1.0
        learning_rate = torch.tensor(args.learning_rate * remaining, device=device)
        # the zeros of a warm-up stay in Adam's moments: the policy's first steps are up to 3.5 times as large
        warm = run.step >= args.warmup * args.num_envs * args.num_steps
        noise = torch.empty(args.num_steps, args.chain + 1, args.num_envs, size, device=device)
        policy = policy_at(net, schedule, obs_stats)
        rollout, begins, obs, ended = collect_chunks(
            envs, obs, policy, noise.normal_(generator=generator), args.chunk
        )
        seen, obs_stats, return_stats, sums = as_seen(rollout, obs_stats, return_stats, sums, args)
        steps = denoising_rows(net, schedule, seen.obs.flatten(0, 1), seen.action.flatten(0, 1))
        decided = begins.flatten()
        rows = decided.repeat_interleave(args.chain).nonzero().squeeze(-1)

        epochs: list[dict[str, Tensor]] = []
        for epoch in range(args.num_epochs):
            value, next_value = values(net, seen)
            ends = (seen.terminated, seen.truncated)
            advantage = chunk_gae(
                seen.reward, value, next_value, *ends, begins, args.gamma, args.gae_lambda
            ).flatten()
            return_ = advantage + value.flatten()
            if epoch == 0:
                explained_variance = 1 - advantage[decided].var() / (return_[decided].var() + 1e-8)
            each = two_level(advantage, args.chain, args.denoising_gamma).flatten()
            batch = DenoisingSteps(*(*steps, each, return_.repeat_interleave(args.chain)))
            order = rows[torch.randperm(len(rows), generator=generator, device=device)[: args.rows]]
            params, opt, metrics = fine_tune_compiled(
                params, opt, batch, order, learning_rate, torch.tensor(float(warm), device=device)
            )
            load(params)
            epochs.append(metrics)

        log: dict[str, float | Tensor]
        log = {name: torch.stack([metrics[name] for metrics in epochs]).mean() for name in metrics}
        log |= {"explained_variance": explained_variance, "learning_rate": learning_rate}
        state = State(params, opt, obs_stats, return_stats, done, generator)
        run.report(run.step + args.num_envs * args.num_steps, state, acting(state), log, ended)
    envs.close()
    return run.finish(state, acting(state))


if __name__ == "__main__":
    main(Args, train, lambda env: SETTINGS.get(env, {}))
