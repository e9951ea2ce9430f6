"""Proximal Policy Optimisation (Schulman et al. 2017, arXiv:1707.06347), one file.

Collect T steps of N environments with the current policy pi_old, estimate advantages, then take several
epochs of minibatch steps on a surrogate that is only trusted near pi_old. With r_t = pi(a_t|s_t) /
pi_old(a_t|s_t):

    clip         L = E[ min( r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t ) ]
    kl           L = E[ r_t A_t ] - beta E[ KL(pi_old || pi) ]   adaptive-kl: beta follows a target, section 4
    unclipped    L = E[ r_t A_t ]                                trusts r_t anywhere: watch approx_kl

    delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)    s_{t+1} the true successor, even where a
                                                                    time limit ended the episode
    A_t     = delta_t + gamma lambda (1 - ended_t) A_{t+1}          ended = terminated or truncated
    V's target R_t = A_t + V(s_t), from the raw advantage, never the normalised one
    loss    = -L + c1 E[(V(s_t) - R_t)^2] - c2 E[H(pi(.|s_t))] + c3 outside(pi)

outside(pi) draws the means of a Gaussian back that have left the action bounds in every state.

With --recompute-advantages they are estimated anew with the improving critic before each epoch (Andrychowicz
et al. 2021, arXiv:2006.05990), as most tasks of SETTINGS have it.

    python zoo/ppo.py --env HalfCheetah-v4
    python zoo/ppo.py --env CartPole-v1 --seed 2
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from zoo.common.args import RunArgs, check_args, require
from zoo.common.cli import main
from zoo.common.device import compile_function, flatten, loader, scan, setup
from zoo.common.envs import VectorEnv, make_envs
from zoo.common.evaluate import Evaluation, Policy
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


@dataclass
class Args(RunArgs):
    kept: ClassVar = (*RunArgs.kept, "hidden", "shared_network", "log_std", "kl_coef")

    num_envs: int = 8  # environments stepped together, N
    num_steps: int = 256  # steps of each environment between updates, T; a batch is N x T transitions
    num_epochs: int = 10  # passes over a batch
    minibatch_size: int = 64  # transitions in a gradient step; must divide N x T
    learning_rate: float = 3e-4  # Adam's
    anneal: bool = False  # let the learning rate fall linearly to 0 over the run
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # GAE's lambda: 0 trusts the critic (one-step TD), 1 the rewards (Monte Carlo)
    recompute_advantages: bool = False  # values and advantages anew before each epoch
    normalize_advantages: bool = True  # mean 0 and standard deviation 1 in each minibatch
    # what keeps the new policy near the old one
    surrogate: Literal["clip", "kl", "adaptive-kl", "unclipped"] = "clip"
    clip: float = 0.2  # eps of the clipped surrogate
    kl_coef: float = 1.0  # beta of the kl surrogates (where adaptive-kl starts)
    # ends an update's epochs when the KL exceeds it; adaptive-kl's target (0.01 if not given)
    target_kl: float | None = None
    value_clip: float | None = None  # keep V within this of its old value in the loss
    value_coef: float = 0.5  # weight of the value loss, c1
    entropy_coef: float = 0.0  # weight of the entropy bonus, c2
    bound_coef: float = 1.0  # weight of a penalty on means outside the bounds in all states of a minibatch
    max_grad_norm: float = 0.5  # the gradient is scaled down to this norm
    hidden: tuple[int, ...] = (64, 64)  # widths of the tanh layers
    shared_network: bool = False  # one trunk for policy and value instead of two
    # initial log standard deviation of a Gaussian policy, in units of half the action range
    log_std: float = 0.0
    normalize_obs: bool = True  # observations by their running mean and standard deviation
    # environment steps after which that mean and deviation stay as they are, lest what is learned move with
    # them
    normalizer_steps: int | None = 10_000
    scale_rewards: bool = True  # rewards by the running standard deviation of the discounted return


# What differs by task; a flag wins over it. Everything else runs on the defaults above.
# smaller steps towards the end, the newest critic's advantages, and a normalisation that goes on
ANNEALED: dict = dict(anneal=True, recompute_advantages=True, value_coef=0.25, normalizer_steps=None)
# long runs, in which the size of an advantage says something, and little noise is enough
LONG: dict = ANNEALED | dict(num_envs=64, num_steps=32, normalize_advantages=False, log_std=-1.0)
LANDER: dict = dict(
    num_envs=16, num_steps=1024, num_epochs=4, gamma=0.999, gae_lambda=0.98, entropy_coef=0.01,
    eval_episodes=100,
)  # fmt: skip
SETTINGS: dict[str, dict] = {
    **{f"{task}-v4": LONG for task in (
        "HalfCheetah", "Walker2d", "Ant", "Humanoid", "HumanoidStandup", "Pusher", "InvertedPendulum",
    )},
    # with less noise at the start one seed of ten ended where standing still does, and another fell to 1,344
    "Hopper-v4": LONG | dict(log_std=0.0),
    # RL Zoo's discount and rollouts
    "Swimmer-v4": LONG | dict(
        num_envs=4, num_steps=1024, minibatch_size=256, learning_rate=6e-4, gamma=0.9999, gae_lambda=0.98,
        log_std=0.0,
    ),
    "Reacher-v4": LONG | dict(gamma=0.95, eval_episodes=100),
    # with less noise runs lost some starts again that they had mastered
    "InvertedDoublePendulum-v4": LONG | dict(log_std=0.0, entropy_coef=0.01),
    "LunarLander-v3": LANDER,
    "LunarLanderContinuous-v3": LANDER | dict(anneal=True),
    "CartPole-v1": ANNEALED | dict(
        total_steps=100_000, num_envs=32, num_steps=32, minibatch_size=256, learning_rate=2e-3,
        recompute_advantages=False, normalize_obs=False, eval_every=20_000,
    ),
    "Acrobot-v1": ANNEALED | dict(
        num_envs=16, num_steps=256, gae_lambda=0.94, eval_episodes=100,
    ),
    "MountainCar-v0": ANNEALED | dict(
        num_envs=16, num_steps=64, gae_lambda=0.98, eval_episodes=100,
    ),
    "MountainCarContinuous-v0": ANNEALED | dict(
        total_steps=20_000, num_envs=8, num_steps=64, learning_rate=1e-3, gamma=0.999,
        normalize_advantages=False, eval_every=5_000,
    ),
    "Pendulum-v1": ANNEALED | dict(
        total_steps=100_000, num_envs=8, num_steps=128, num_epochs=20, learning_rate=1e-3, gamma=0.98,
        normalize_advantages=False, log_std=-0.5, eval_every=20_000, eval_episodes=100,
    ),
}  # fmt: skip


# --- networks and distributions -----------------------------------------------------------------------------


class Gaussian(NamedTuple):
    """A diagonal Gaussian over actions; mean (B, A), log_std (A,) free of the state."""

    mean: Tensor
    log_std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.log_std.exp() * noise

    def mode(self) -> Tensor:
        return self.mean

    def log_prob(self, action: Tensor) -> Tensor:
        z = (action - self.mean) * (-self.log_std).exp()
        return (-0.5 * z**2 - self.log_std - 0.9189385332046727).sum(-1)  # the constant is log(2 pi) / 2

    def entropy(self) -> Tensor:
        return (self.log_std + 1.4189385332046727).sum(-1).expand(self.mean.shape[0])


class Categorical(NamedTuple):
    """A categorical distribution over K actions; logits (B, K), not necessarily normalised."""

    logits: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return (self.logits + noise).argmax(-1)  # Gumbel-max: noise is standard Gumbel

    def mode(self) -> Tensor:
        return self.logits.argmax(-1)

    def log_prob(self, action: Tensor) -> Tensor:
        return self.logits.log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        log_p = self.logits.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)


def draw_noise(envs: VectorEnv, *shape: int, generator: torch.Generator) -> Tensor:
    """The randomness of actions, drawn ahead of acting: standard normal or Gumbel, (*shape, A)."""
    noise = torch.empty(*shape, envs.action_dim, device=generator.device)
    if envs.discrete:
        return -noise.exponential_(generator=generator).log()
    return noise.normal_(generator=generator)


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
    """obs (..., D) -> the policy's distribution and V (...)."""

    def __init__(self, envs: VectorEnv, hidden: tuple[int, ...], log_std: float, shared: bool):
        super().__init__()
        self.policy_trunk = trunk(envs.obs_dim, hidden)
        self.value_trunk = self.policy_trunk if shared else trunk(envs.obs_dim, hidden)
        # near-uniform or near-zero-mean actions at the start
        self.policy_head = layer(hidden[-1], envs.action_dim, 0.01)
        self.value_head = layer(hidden[-1], 1, 1.0)
        self.log_std = None if envs.discrete else nn.Parameter(torch.full((envs.action_dim,), log_std))

    def policy(self, obs: Tensor) -> Gaussian | Categorical:
        output = self.policy_head(self.policy_trunk(obs))
        return Categorical(output) if self.log_std is None else Gaussian(output, self.log_std)

    def value(self, obs: Tensor) -> Tensor:
        return self.value_head(self.value_trunk(obs)).squeeze(-1)

    def forward(self, obs: Tensor) -> tuple[Gaussian | Categorical, Tensor]:
        return self.policy(obs), self.value(obs)


# --- estimators ---------------------------------------------------------------------------------------------


def gae(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, truncated: Tensor,
    gamma: float, lam: float,
) -> Tensor:  # fmt: skip
    """Generalised advantage estimates (T, N) (Schulman et al. 2016, arXiv:1506.02438, eq. 16) of (T, N).

    next_value[t] is V of the true successor of step t. The recursion is cut at every episode's end; the
    bootstrap gamma * next_value is dropped at terminations only, because a time limit does not make the
    future worthless.
    """
    delta = reward + gamma * next_value * ~terminated - value
    decay = gamma * lam * ~(terminated | truncated)
    advantage, running = [], torch.zeros_like(delta[0])
    for delta_t, decay_t in zip(reversed(delta.unbind()), reversed(decay.unbind()), strict=True):
        running = delta_t + decay_t * running
        advantage.append(running)
    return torch.stack(advantage[::-1])


# --- losses -------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Transitions, (B, ...) each, and what pi_old, which acted, and the critic of that time said of them."""

    obs: Tensor
    action: Tensor
    log_prob: Tensor
    value: Tensor
    advantage: Tensor
    return_: Tensor


def policy_loss(
    ratio: Tensor, log_ratio: Tensor, advantage: Tensor, kl_coef: Tensor, surrogate: str, clip: float
) -> Tensor:
    """-L, the negative surrogate of the module's docstring."""
    if surrogate == "clip":
        return -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
    if surrogate == "unclipped":
        return -(ratio * advantage).mean()
    # The samples are pi_old's, so k3 = (r - 1) - log r is unbiased for KL(pi_old || pi), and so is its
    # gradient.
    return -(ratio * advantage).mean() + kl_coef * ((ratio - 1) - log_ratio).mean()


def value_loss(value: Tensor, old_value: Tensor, return_: Tensor, value_clip: float | None) -> Tensor:
    """Mean squared error to the target; with value_clip the worse of V and V kept near old V."""
    error = (value - return_) ** 2
    if value_clip is not None:
        clipped = old_value + (value - old_value).clamp(-value_clip, value_clip)
        error = torch.max(error, (clipped - return_) ** 2)
    return error.mean()


def outside(dist: Gaussian | Categorical) -> Tensor:
    """How far means lie outside [-1, 1], squared and summed over those dimensions in which all rows do; ().

    There nearly every sample is clipped to a bound in every state, so that no reward tells the policy to come
    back. Where some states are inside, the others may well want their bound, and nothing is added.
    """
    if isinstance(dist, Categorical):
        return dist.logits.new_zeros(())
    beyond = dist.mean.abs() - 1
    return ((beyond > 0).all(0) * beyond**2).sum(-1).mean()


def ppo_loss(
    params: Tensor, batch: Batch, kl_coef: Tensor, forward, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a minibatch and what to log of it; forward(params, obs) gives the distribution and V."""
    dist, value = forward(params, batch.obs)
    advantage = batch.advantage
    if args.normalize_advantages:
        advantage = (advantage - advantage.mean()) / (advantage.std(unbiased=False) + 1e-8)
    log_ratio = dist.log_prob(batch.action) - batch.log_prob
    ratio = log_ratio.exp()
    pg_loss = policy_loss(ratio, log_ratio, advantage, kl_coef, args.surrogate, args.clip)
    v_loss = value_loss(value, batch.value, batch.return_, args.value_clip)
    entropy = dist.entropy().mean()
    metrics = {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": entropy}
    metrics["clipfrac"] = ((ratio - 1).abs() > args.clip).float().mean()
    loss = pg_loss + args.value_coef * v_loss - args.entropy_coef * entropy + args.bound_coef * outside(dist)
    return loss, metrics


def approx_kl(net: ActorCritic, batch: Batch) -> Tensor:
    """KL(pi_old || pi) in nats, (), by the batch's own actions: the mean of k3 = (r - 1) - log r."""
    log_ratio = net.policy(batch.obs).log_prob(batch.action) - batch.log_prob
    return (log_ratio.exp() - 1 - log_ratio).mean()


def adapt_kl_coef(kl_coef: Tensor, kl: Tensor, target: float) -> Tensor:
    """Double beta after a KL above 1.5 targets, halve it below 1 / 1.5 (PPO paper, section 4), in bounds."""
    factor = 1.0 + (kl > 1.5 * target).float() - 0.5 * (kl < target / 1.5).float()
    return (kl_coef * factor).clamp(1e-6, 1e6)


# --- the update ---------------------------------------------------------------------------------------------


def update(
    params: Tensor, opt: Moments, batch: Batch, learning_rate: Tensor, kl_coef: Tensor,
    forward: Callable, args: Args,
) -> tuple[Tensor, Moments, dict[str, Tensor]]:  # fmt: skip
    """A minibatch's step, a pure function: parameters and optimiser in, the new ones and metrics out."""
    grad, (_, metrics) = grad_and_value(ppo_loss, has_aux=True)(params, batch, kl_coef, forward, args)
    grad, grad_norm = clip_grad(grad, args.max_grad_norm)
    params, opt = adam(params, grad, opt, learning_rate)
    return params, opt, metrics | {"grad_norm": grad_norm}


def improve(
    forward: Callable, args: Args, params: Tensor, opt: Moments, batch: Batch, order: Tensor,
    learning_rate: Tensor, kl_coef: Tensor,
) -> tuple[Tensor, Moments, dict[str, Tensor]]:  # fmt: skip
    """A step for each minibatch of the rows in this order, (B,) or longer; metrics are their means."""

    def step(carry, minibatch):
        params, opt = carry
        params, opt, metrics = update(params, opt, minibatch, learning_rate, kl_coef, forward, args)
        return (params, opt), metrics

    minibatches = Batch(*(column[order].unflatten(0, (-1, args.minibatch_size)) for column in batch))
    (params, opt), metrics = scan(step, (params, opt), minibatches)
    return params, opt, {name: column.mean() for name, column in metrics.items()}


# --- the run ------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """What a run goes on from: everything that training changes, by name."""

    params: Tensor
    opt: Moments
    obs_stats: Stats
    return_stats: Stats
    kl_coef: Tensor
    generator: torch.Generator


class Rollout(NamedTuple):
    """T steps of N environments, (T, N, ...) each; next_obs is the true successor."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    terminated: Tensor
    truncated: Tensor


def policy_at(net: ActorCritic, obs_stats: Stats) -> Callable[[np.ndarray], Gaussian | Categorical]:
    """Observations (N, D) to the distribution of actions, by the parameters that are in `net`.

    Runs as it stands: a compiled call costs more than the few products of a single step.
    """
    device, seen = obs_stats["mean"].device, normalizer(obs_stats)

    def policy(obs: np.ndarray) -> Gaussian | Categorical:
        return net.policy(seen(torch.as_tensor(obs, device=device)))

    return policy


def collect(envs: VectorEnv, obs: np.ndarray, policy, noise: Tensor) -> tuple[Rollout, np.ndarray, list]:
    """Act by samples of `policy(obs)` for T steps; the rollout, the next observations, episodes ended."""
    rows, episodes = [], []
    for step_noise in noise:
        action = policy(obs).sample(step_noise).cpu().numpy()
        step = envs.step(action)
        rows.append(
            (obs, action, step.reward.astype(np.float32), step.next_obs, step.terminated, step.truncated)
        )
        obs = step.obs
        episodes += step.episodes
    columns = [torch.as_tensor(np.stack(column), device=noise.device) for column in zip(*rows, strict=True)]
    return Rollout(*columns), obs, episodes


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


def acting(state: State) -> dict:
    """What acting needs, and nothing else: an agent.pt."""
    return {"params": state.params, "obs_stats": state.obs_stats}


def make_policy(envs: VectorEnv, args: Args, agent: dict) -> Policy:
    """The deterministic policy of what an agent.pt holds: observations (N, D) to modes."""
    net = ActorCritic(envs, args.hidden, args.log_std, args.shared_network).to(agent["params"].device).eval()
    loader(net)(agent["params"])
    policy = policy_at(net, agent["obs_stats"])
    return lambda obs: policy(obs).mode().cpu().numpy()


def check(args: Args) -> None:
    """Refuse arguments that cannot work together."""
    check_args(
        args,
        at_least_1=("num_steps", "num_epochs", "minibatch_size", "hidden", "normalizer_steps"),
        fractions=("gamma", "gae_lambda"),
        positive=("learning_rate", "clip", "max_grad_norm", "target_kl", "value_clip"),
        at_least_0=("kl_coef", "value_coef", "entropy_coef", "bound_coef"),
        finite=("log_std",),
    )
    batch = args.num_envs * args.num_steps
    require(batch > 1, "--num-envs x --num-steps must be at least 2, for a batch to have a variance")
    require(
        batch % args.minibatch_size == 0,
        f"--minibatch-size {args.minibatch_size} does not divide --num-envs x --num-steps = {batch}",
    )
    require(
        args.minibatch_size > 1 or not args.normalize_advantages,
        "--minibatch-size must be at least 2 with --normalize-advantages: of one advantage nothing is left",
    )


def train(args: Args) -> float:
    """Run PPO; the mean return of the final evaluation."""
    check(args)
    args = replace(args)  # the caller's stay as they are
    device = setup(args.device, args.threads)
    envs = make_envs(args.env, args.num_envs, threads=args.env_threads)
    torch.manual_seed(generator_seed(args.seed, "network"))
    net = ActorCritic(envs, args.hidden, args.log_std, args.shared_network).to(device)
    params, unflatten = flatten(net)

    def forward(params, obs):
        return functional_call(net, unflatten(params), (obs,))

    load = loader(net)
    improve_compiled = compile_function(partial(improve, forward, args), device, args.compile)
    run = Run(args, "ppo", Evaluation(args, make_policy), engine=envs.engine)
    if envs.discrete or not envs.bounded.all():
        args.bound_coef = 0.0  # no bounds that a mean could leave
    generator = torch.Generator(device).manual_seed(generator_seed(args.seed, "noise"))
    obs_stats, return_stats = new_stats(envs.obs_dim, device=device), new_stats(device=device)
    kl_coef = torch.tensor(args.kl_coef, device=device)
    state = run.restore(State(params, new_adam(params), obs_stats, return_stats, kl_coef, generator))
    params, opt, obs_stats, return_stats, kl_coef, generator = state
    load(params)
    # a resumed run begins new episodes
    obs = envs.reset(env_seeds(args.seed, "environments", args.num_envs, run.step))
    sums = torch.zeros(args.num_envs, device=device)
    # epochs between which nothing has to be looked at are made in one call
    at_once = 1 if args.recompute_advantages or args.target_kl is not None else args.num_epochs

    while run.step < args.total_steps:
        remaining = 1 - run.step / args.total_steps if args.anneal else 1.0
        learning_rate = torch.tensor(args.learning_rate * remaining, device=device)
        noise = draw_noise(envs, args.num_steps, args.num_envs, generator=generator)
        rollout, obs, episodes = collect(envs, obs, policy_at(net, obs_stats), noise)
        seen, counted, return_stats, sums = as_seen(rollout, obs_stats, return_stats, sums, args)
        if args.normalizer_steps is None or run.step < args.normalizer_steps:
            obs_stats = counted
        rows, action = seen.obs.flatten(0, 1), seen.action.flatten(0, 1)
        old_log_prob = net.policy(rows).log_prob(action)

        epochs: list[dict[str, Tensor]] = []
        for epoch in range(0, args.num_epochs, at_once):
            if epoch == 0 or args.recompute_advantages:
                value, next_value = values(net, seen)
                advantage = gae(
                    seen.reward,
                    value,
                    next_value,
                    seen.terminated,
                    seen.truncated,
                    args.gamma,
                    args.gae_lambda,
                )
                return_ = advantage + value
            if epoch == 0:
                old_value, explained_variance = value, 1 - advantage.var() / (return_.var() + 1e-8)
            batch = Batch(rows, action, old_log_prob, *(x.flatten() for x in (old_value, advantage, return_)))
            orders = [torch.randperm(len(rows), generator=generator, device=device) for _ in range(at_once)]
            params, opt, metrics = improve_compiled(
                params, opt, batch, torch.cat(orders), learning_rate, kl_coef
            )
            load(params)
            epochs.append(metrics)
            limit = None if args.surrogate == "adaptive-kl" else args.target_kl
            if limit is not None and approx_kl(net, batch) > limit:
                break
        kl = approx_kl(net, batch)
        if args.surrogate == "adaptive-kl":
            kl_coef = adapt_kl_coef(kl_coef, kl, args.target_kl or 0.01)

        log: dict[str, float | Tensor]
        log = {name: torch.stack([metrics[name] for metrics in epochs]).mean() for name in metrics}
        log |= {"approx_kl": kl, "explained_variance": explained_variance, "kl_coef": kl_coef}
        log |= {"epochs": len(epochs) * at_once, "learning_rate": learning_rate}
        state = State(params, opt, obs_stats, return_stats, kl_coef, generator)
        run.report(run.step + len(rows), state, acting(state), log, episodes)
    envs.close()
    return run.finish(state, acting(state))


if __name__ == "__main__":
    main(Args, train, lambda env: SETTINGS.get(env, {}))
