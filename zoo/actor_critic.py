"""Advantage actor-critic (Mnih et al. 2016, arXiv:1602.01783; synchronous, "A2C"), one file.

REINFORCE waits for an episode's end; here a critic V stands for the rewards still to come, so that N
environments update every T steps. The policy follows sum_t grad log pi(a_t|s_t) A_t, with an advantage that
trusts the critic more or less:

    td       A_t = delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)
    n-step   A_t = r_t + gamma r_{t+1} + ... + gamma^n V(s_{t+n}) - V(s_t)   to the rollout's or episode's end
    gae      A_t = delta_t + gamma lambda (1 - ended_t) A_{t+1}                ended = terminated or truncated

s_{t+1} is the true successor: a time limit cuts the sums but bootstraps, a termination does not. V's target
is A_t + V(s_t).

    loss     = -E[ w_t A_t ] + c1 E[(V(s_t) - target)^2] - c2 E[H(pi(.|s_t))] + c3 outside(pi)
    w_t      = pi(a_t|s_t) / pi_old(a_t|s_t)

outside(pi) draws the means of a Gaussian back that have left the action bounds in every state.

The gradient of w_t is w_t grad log pi(a_t|s_t): the policy gradient in the first epoch, where w = 1, and with
--off-policy-epochs K > 1 its importance-weighted form for a batch of an older policy. Nothing but hope keeps
w near 1: effective_sample_size, (sum w)^2 / (n sum w^2), says what share of the batch still counts. TRPO and
PPO limit w. The weight corrects the action at s_t only, not how often pi would have come to s_t.

    python zoo/actor_critic.py --env HalfCheetah-v4
    python zoo/actor_critic.py --env CartPole-v1 --advantage td
    python zoo/actor_critic.py --optimizer rmsprop --learning-rate 7e-4 --num-steps 5 --entropy-coef 0.01
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from zoo.common.args import RunArgs, check_args
from zoo.common.cli import main
from zoo.common.device import compile_function, flatten, loader, setup
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
from zoo.common.optim import Moments, adam, clip_grad, new_adam, new_rmsprop, rmsprop
from zoo.common.run import Run
from zoo.common.seeding import env_seeds, generator_seed


@dataclass
class Args(RunArgs):
    kept: ClassVar = (*RunArgs.kept, "hidden", "shared_network", "log_std", "optimizer")

    num_envs: int = 32  # environments stepped together, N
    num_steps: int = 8  # steps of each environment between updates, T; a batch is N x T transitions
    advantage: Literal["td", "n-step", "gae"] = "gae"  # how far rewards are trusted before the critic is
    off_policy_epochs: int = 1  # updates on each batch, weighted by the importance ratio
    optimizer: Literal["adam", "rmsprop"] = "adam"  # RMSprop, A3C's, starts with ten-fold steps
    learning_rate: float = 2e-3  # the optimiser's
    anneal: bool = True  # let the learning rate fall linearly to 0 over the run
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # GAE's lambda: 0 trusts the critic (one-step TD), 1 the rewards (n-step)
    value_coef: float = 0.5  # weight of the value loss, c1
    entropy_coef: float = 0.0  # weight of the entropy bonus, c2
    bound_coef: float = 1.0  # weight of a penalty on means outside the bounds in all states of a batch
    max_grad_norm: float = 0.5  # the gradient is scaled down to this norm
    hidden: tuple[int, ...] = (64, 64)  # widths of the tanh layers
    shared_network: bool = False  # one trunk for policy and value instead of two
    log_std: float = -0.5  # a Gaussian policy's initial log standard deviation, in half action ranges
    normalize_obs: bool = True  # observations by their running mean and standard deviation
    scale_rewards: bool = True  # rewards by the running standard deviation of the discounted return
    report_every: int = 2048  # environment steps between reports: one takes longer than an update


# What differs by task; a flag wins over it. Everything else runs on the defaults above.
SETTINGS: dict[str, dict] = {
    # Hopper is paid for standing still too: a longer horizon and lasting noise make hopping worth finding
    "Hopper-v4": dict(
        num_envs=8, num_steps=64, learning_rate=1e-3, gamma=0.995, gae_lambda=0.98, entropy_coef=0.003,
        log_std=0.0,
    ),
    "Walker2d-v4": dict(num_envs=8, num_steps=64, gae_lambda=0.98),
    "HalfCheetah-v4": dict(num_envs=8, num_steps=64, gae_lambda=0.98, log_std=-1.0),
    "Reacher-v4": dict(gamma=0.95, eval_episodes=100),
    "CartPole-v1": dict(
        total_steps=500_000, num_envs=8, num_steps=5, gae_lambda=1.0, optimizer="rmsprop", learning_rate=7e-4,
        eval_every=50_000,
    ),
    "Acrobot-v1": dict(
        total_steps=500_000, num_envs=16, num_steps=32, eval_every=50_000, eval_episodes=100,
    ),
    "MountainCar-v0": dict(
        num_envs=16, num_steps=16, gae_lambda=0.98, entropy_coef=0.03, eval_episodes=100,
    ),
    "Pendulum-v1": dict(
        num_envs=8, num_steps=8, learning_rate=1.5e-3, gamma=0.98, gae_lambda=0.9, eval_episodes=100,
    ),
    "MountainCarContinuous-v0": dict(
        total_steps=100_000, num_envs=8, num_steps=256, learning_rate=3e-3, gamma=0.999, gae_lambda=0.99,
        log_std=1.0, eval_every=10_000, eval_episodes=100,
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


def td(reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, gamma: float) -> Tensor:
    """One-step TD errors (T, N), each an estimate of the advantage (S3 5.8, 5.9); all inputs (T, N)."""
    return reward + gamma * next_value * ~terminated - value


def n_step(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, truncated: Tensor, gamma: float
) -> Tensor:
    """The n-step return less V (T, N) (S3 5.10): n reaches to the end of the rollout or of the episode; all
    inputs (T, N).

    next_value[t] is V of the true successor of step t, which follows the last reward unless the episode
    terminated there.
    """
    return_, running = torch.empty_like(reward), next_value[-1]
    for t in reversed(range(len(reward))):
        future = torch.where(truncated[t], next_value[t], running) * ~terminated[t]
        return_[t] = running = reward[t] + gamma * future
    return return_ - value


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


def effective_sample_size(weight: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2) of importance weights (n,): from 1 / n, where one outweighs all, to 1.

    0 where all are 0.
    """
    tiny = torch.finfo(weight.dtype).tiny
    weight = weight / weight.amax().clamp(min=tiny)  # squares of very small or large ones do not fit float32
    return weight.sum() ** 2 / (len(weight) * (weight**2).sum()).clamp(min=tiny)


# --- losses -------------------------------------------------------------------------------------------------


class Transitions(NamedTuple):
    """Transitions, (B, ...) each, what the policy that acted said of them, and what they teach."""

    obs: Tensor
    action: Tensor
    log_prob: Tensor
    advantage: Tensor
    return_: Tensor


def outside(dist: Gaussian | Categorical) -> Tensor:
    """How far means lie outside [-1, 1], squared and summed over those dimensions in which all rows do; ().

    There nearly every sample is clipped to a bound in every state, so that no reward tells the policy to come
    back. Where some states are inside, the others may well want their bound, and nothing is added.
    """
    if isinstance(dist, Categorical):
        return dist.logits.new_zeros(())
    beyond = dist.mean.abs() - 1
    return ((beyond > 0).all(0) * beyond**2).sum(-1).mean()


def actor_critic_loss(
    params: Tensor, batch: Transitions, forward: Callable, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """The module's loss and what to log of it; forward(params, obs) gives the distribution and V."""
    dist, value = forward(params, batch.obs)
    ratio = (dist.log_prob(batch.action) - batch.log_prob).exp()
    pg_loss = -(ratio * batch.advantage).mean()
    v_loss = ((value - batch.return_) ** 2).mean()
    entropy = dist.entropy().mean()
    metrics = {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": entropy}
    metrics["effective_sample_size"] = effective_sample_size(ratio)
    loss = pg_loss + args.value_coef * v_loss - args.entropy_coef * entropy + args.bound_coef * outside(dist)
    return loss, metrics


# --- the update ---------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """T steps of N environments, (T, N, ...) each; next_obs is the true successor."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    terminated: Tensor
    truncated: Tensor


def estimate(rollout: Rollout, value: Tensor, next_value: Tensor, args: Args) -> Tensor:
    """The advantages (T, N) that --advantage names."""
    reward, terminated, truncated = rollout.reward, rollout.terminated, rollout.truncated
    if args.advantage == "td":
        return td(reward, value, next_value, terminated, args.gamma)
    if args.advantage == "n-step":
        return n_step(reward, value, next_value, terminated, truncated, args.gamma)
    return gae(reward, value, next_value, terminated, truncated, args.gamma, args.gae_lambda)


def learn(
    forward: Callable, args: Args, params: Tensor, opt: Moments, rollout: Rollout, learning_rate: Tensor
) -> tuple[Tensor, Moments, dict[str, Tensor]]:
    """The updates from a rollout as the networks see it: the new parameters and optimiser, and metrics."""
    optimize = adam if args.optimizer == "adam" else rmsprop
    obs, next_obs, action = (x.flatten(0, 1) for x in (rollout.obs, rollout.next_obs, rollout.action))
    log_prob = forward(params, obs)[0].log_prob(action)
    for _ in range(args.off_policy_epochs):
        value, next_value = (forward(params, x)[1].view_as(rollout.reward) for x in (obs, next_obs))
        advantage = estimate(rollout, value, next_value, args)
        return_ = advantage + value
        batch = Transitions(obs, action, log_prob, advantage.flatten(), return_.flatten())
        grad, (_, metrics) = grad_and_value(actor_critic_loss, has_aux=True)(params, batch, forward, args)
        grad, grad_norm = clip_grad(grad, args.max_grad_norm)
        params, opt = optimize(params, grad, opt, learning_rate)
    unexplained = advantage.var(correction=0) / (return_.var(correction=0) + 1e-8)
    return params, opt, metrics | {"grad_norm": grad_norm, "explained_variance": 1 - unexplained}


# --- the run ------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """What a run goes on from: everything that training changes, by name."""

    params: Tensor
    opt: Moments
    obs_stats: Stats
    return_stats: Stats
    generator: torch.Generator


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
        at_least_1=("num_steps", "off_policy_epochs", "report_every", "hidden"),
        fractions=("gamma", "gae_lambda"),
        positive=("learning_rate", "max_grad_norm"),
        at_least_0=("value_coef", "entropy_coef", "bound_coef"),
        finite=("log_std",),
    )


def train(args: Args) -> float:
    """Run the actor-critic; the mean return of the final evaluation."""
    check(args)
    args = replace(args)  # the caller's stay as they are
    device = setup(args.device, args.threads)
    envs = make_envs(args.env, args.num_envs, threads=args.env_threads)
    torch.manual_seed(generator_seed(args.seed, "network"))
    net = ActorCritic(envs, args.hidden, args.log_std, args.shared_network).to(device)
    params, unflatten = flatten(net)

    def forward(params, obs):
        return functional_call(net, unflatten(params), (obs,))

    def iterate(params, opt, obs_stats, return_stats, sums, rollout, learning_rate):
        seen, obs_stats, return_stats, sums = as_seen(rollout, obs_stats, return_stats, sums, args)
        params, opt, metrics = learn(forward, args, params, opt, seen, learning_rate)
        return params, opt, obs_stats, return_stats, sums, metrics

    load, iterate = loader(net), compile_function(iterate, device, args.compile)
    run = Run(args, "actor_critic", Evaluation(args, make_policy), engine=envs.engine)
    if envs.discrete or not envs.bounded.all():
        args.bound_coef = 0.0  # no bounds that a mean could leave
    generator = torch.Generator(device).manual_seed(generator_seed(args.seed, "noise"))
    opt = new_adam(params) if args.optimizer == "adam" else new_rmsprop(params)
    obs_stats, return_stats = new_stats(envs.obs_dim, device=device), new_stats(device=device)
    state = run.restore(State(params, opt, obs_stats, return_stats, generator))
    params, opt, obs_stats, return_stats, generator = state
    load(params)
    # a resumed run begins new episodes
    obs = envs.reset(env_seeds(args.seed, "environments", args.num_envs, run.step))
    sums = torch.zeros(args.num_envs, device=device)
    batch_size = args.num_envs * args.num_steps

    while run.step < args.total_steps:
        step, episodes, metrics = run.step, [], []
        while step < min(run.step + args.report_every, args.total_steps):
            remaining = 1 - step / args.total_steps if args.anneal else 1.0
            learning_rate = torch.tensor(args.learning_rate * remaining, device=device)
            noise = draw_noise(envs, args.num_steps, args.num_envs, generator=generator)
            rollout, obs, ended = collect(envs, obs, policy_at(net, obs_stats), noise)
            params, opt, obs_stats, return_stats, sums, info = iterate(
                params, opt, obs_stats, return_stats, sums, rollout, learning_rate
            )
            load(params)
            metrics.append(info)
            episodes += ended
            step += batch_size

        means = {name: torch.stack([info[name] for info in metrics]).mean() for name in metrics[0]}
        state = State(params, opt, obs_stats, return_stats, generator)
        run.report(step, state, acting(state), means | {"learning_rate": learning_rate}, episodes)
    envs.close()
    return run.finish(state, acting(state))


if __name__ == "__main__":
    main(Args, train, lambda env: SETTINGS.get(env, {}))
