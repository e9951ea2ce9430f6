"""Trust Region Policy Optimisation (Schulman et al. 2015, arXiv:1502.05477), one file.

Collect T steps of N environments with the current policy pi_old, then take the one step that improves the
surrogate most within a trust region, measured in the space of policies and not of parameters:

    maximise     L(theta) = E[ pi(a_t|s_t) / pi_old(a_t|s_t) A_t ] - c outside(pi)
    subject to   E[ KL(pi_old(.|s_t) || pi(.|s_t)) ] <= delta

outside(pi) draws the means of a Gaussian back that have left the action bounds in every state. To first order
L is g^T s and to second order the KL is s^T F s / 2, s = theta - theta_old, F the Fisher matrix: J^T M J, J
the Jacobian of the distribution's parameters, M the Hessian of the KL in them. Hence

    x = F^-1 g                        the natural gradient, by conjugate gradient, to which products F v are
                                      enough: each costs little more than a gradient, and F is never formed
    s = sqrt(2 delta / (x^T F x)) x   the longest step that the quadratic model allows
    s, 0.8 s, 0.64 s, ...             the first whose true KL is at most delta and whose L is better, or none

Advantages are GAE's, as in ppo.py; V is fitted by itself, by Adam on E[(V(s_t) - R_t)^2] with R_t = A_t +
V(s_t). Policy and critic share no parameter but one flat vector: the KL and L do not depend on the critic's
part of it, nor the critic's loss on the policy's, so that neither update moves the other's numbers by a
single bit.

    python zoo/trpo.py --env HalfCheetah-v4
    python zoo/trpo.py --env CartPole-v1 --seed 2
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, jvp, vjp

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
from zoo.common.optim import Moments, adam, new_adam
from zoo.common.run import Run
from zoo.common.seeding import env_seeds, generator_seed


@dataclass
class Args(RunArgs):
    kept: ClassVar = (*RunArgs.kept, "hidden", "log_std")

    num_envs: int = 64  # environments stepped together, N
    num_steps: int = 16  # steps of each environment between updates, T; a batch is N x T transitions
    delta: float = 0.02  # the trust region: the largest mean KL(pi_old || pi) of an update, in nats
    anneal: bool = False  # let delta and the critic's learning rate fall linearly to 0 over the run
    cg_iterations: int = 10  # of conjugate gradient, at most
    cg_tolerance: float = 1e-5  # it stops at a residual of this times the gradient's norm
    # conjugate gradient solves (F + damping I) x = g, which bounds x where the KL is flat
    damping: float = 0.1
    # Fisher-vector products on every k-th row of the batch, where k divides N all of the same environments;
    # gradient and line search use all
    fvp_subsample: int = 4
    backtrack: float = 0.8  # factor between the steps that the line search tries
    max_backtracks: int = 10  # the shortest of them is backtrack ** max_backtracks of the full one
    critic_epochs: int = 5  # the critic's passes over a batch
    minibatch_size: int = 256  # transitions in a gradient step of the critic; must divide N x T
    learning_rate: float = 1e-3  # the critic's, Adam's
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # GAE's lambda: 0 trusts the critic (one-step TD), 1 the rewards (Monte Carlo)
    bound_coef: float = 1.0  # weight of a penalty on means outside the bounds in all states of a batch
    normalize_advantages: bool = True  # mean 0 and standard deviation 1 in each batch
    hidden: tuple[int, ...] = (64, 64)  # widths of the tanh layers
    # initial log standard deviation of a Gaussian policy, in units of half the action range
    log_std: float = -1.0
    normalize_obs: bool = True  # observations by their running mean and standard deviation
    scale_rewards: bool = True  # rewards by the running standard deviation of the discounted return

    @property
    def shared_network(self) -> bool:
        """Never: fitting the critic would carry the policy out of its trust region."""
        return False


# What differs by task; a flag wins over it. Everything else runs on the defaults above.
SETTINGS: dict[str, dict] = {
    # Hopper stands still for good, and is paid for it, once its policy has lost its variance: wider, and
    # slower to narrow
    "Hopper-v4": dict(
        num_envs=32, num_steps=64, delta=0.01, anneal=True, critic_epochs=20, gamma=0.995,
        log_std=0.0,
    ),
    "Swimmer-v4": dict(
        num_envs=4, num_steps=512, critic_epochs=20, gamma=0.9999, gae_lambda=0.98, log_std=0.0,
    ),
    "Walker2d-v4": dict(num_envs=32, num_steps=64, anneal=True, critic_epochs=10, log_std=-0.5),
    "Reacher-v4": dict(gamma=0.95, eval_episodes=100),
    "CartPole-v1": dict(
        total_steps=100_000, num_envs=8, num_steps=128, delta=0.01, fvp_subsample=1, damping=1e-3,
        critic_epochs=10, minibatch_size=128, gae_lambda=0.98, eval_every=20_000,
    ),
    "Acrobot-v1": dict(
        total_steps=100_000, num_envs=16, num_steps=64, delta=0.01, fvp_subsample=1, critic_epochs=10,
        minibatch_size=128, eval_every=20_000, eval_episodes=100,
    ),
    "MountainCar-v0": dict(
        total_steps=100_000, num_envs=8, num_steps=256, fvp_subsample=1, critic_epochs=20, minibatch_size=128,
        eval_every=20_000, eval_episodes=100,
    ),
    "MountainCarContinuous-v0": dict(
        total_steps=50_000, num_envs=8, num_steps=64, fvp_subsample=1, critic_epochs=10, minibatch_size=128,
        gamma=0.999, log_std=0.0, eval_every=10_000, eval_episodes=100,
    ),
    "Pendulum-v1": dict(
        total_steps=100_000, num_envs=8, num_steps=256, fvp_subsample=1, critic_epochs=20,
        minibatch_size=128, gamma=0.95, log_std=0.0, eval_every=20_000, eval_episodes=100,
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


class PolicyBatch(NamedTuple):
    """Transitions, (B, ...) each, and what pi_old said of them."""

    obs: Tensor
    action: Tensor
    old: Gaussian | Categorical
    advantage: Tensor


def kl(old: Gaussian | Categorical, new: Gaussian | Categorical) -> Tensor:
    """KL(old || new) in nats, (B,), in closed form."""
    if isinstance(old, Gaussian) and isinstance(new, Gaussian):
        shrink = (2 * (old.log_std - new.log_std)).exp()
        distance = ((old.mean - new.mean) * (-new.log_std).exp()) ** 2
        return (new.log_std - old.log_std + (shrink + distance - 1) / 2).sum(-1)
    assert isinstance(old, Categorical) and isinstance(new, Categorical)
    log_p, log_q = old.logits.log_softmax(-1), new.logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def outside(dist: Gaussian | Categorical) -> Tensor:
    """How far means lie outside [-1, 1], squared and summed over those dimensions in which all rows do; ().

    There nearly every sample is clipped to a bound in every state, so that no reward tells the policy to come
    back. Where some states are inside, the others may well want their bound, and nothing is added.
    """
    if isinstance(dist, Categorical):
        return dist.logits.new_zeros(())
    beyond = dist.mean.abs() - 1
    return ((beyond > 0).all(0) * beyond**2).sum(-1).mean()


def surrogate(
    forward: Callable, args: Args, params: Tensor, batch: PolicyBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """L less the penalty on means outside, and the KL; forward(params, obs) gives distribution and V."""
    dist = forward(params, batch.obs)[0]
    ratio = (dist.log_prob(batch.action) - batch.old.log_prob(batch.action)).exp()
    return (ratio * batch.advantage).mean() - args.bound_coef * outside(dist), {
        "kl": kl(batch.old, dist).mean(),
        "entropy": dist.entropy().mean(),
    }


def surrogate_gradient(
    forward: Callable, args: Args, params: Tensor, batch: PolicyBatch
) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
    """The gradient of L (P,), and what `surrogate` returns."""
    return grad_and_value(partial(surrogate, forward, args), has_aux=True)(params, batch)


def value_fit_loss(forward: Callable, params: Tensor, obs: Tensor, return_: Tensor) -> Tensor:
    """Mean squared error of V to its target."""
    return ((forward(params, obs)[1] - return_) ** 2).mean()


def fit_critic(
    forward: Callable, args: Args, params: Tensor, opt: Moments, obs: Tensor, return_: Tensor, order: Tensor,
    learning_rate: Tensor,
) -> tuple[Tensor, Moments, Tensor]:  # fmt: skip
    """A step for each minibatch of the rows in this order, (B,) or longer; also the mean loss."""

    def step(carry, minibatch):
        params, opt = carry
        critic_grad, loss = grad_and_value(partial(value_fit_loss, forward))(params, *minibatch)
        return adam(params, critic_grad, opt, learning_rate), loss

    minibatches = tuple(column[order].unflatten(0, (-1, args.minibatch_size)) for column in (obs, return_))
    (params, opt), losses = scan(step, (params, opt), minibatches)
    return params, opt, losses.mean()


# --- the trust-region step ----------------------------------------------------------------------------------


def fisher_product(forward: Callable, params: Tensor, obs: Tensor, vector: Tensor) -> Tensor:
    """F v, (P,): the Hessian at `params` of the mean KL to the policy there, times a vector.

    The KL's gradient vanishes there, so F = J^T M J exactly: J the Jacobian of the distribution's parameters
    by theta, M the KL's Hessian by the distribution's parameters. J v in forward mode, then J^T in reverse:
    half the work of grad under jvp.
    """

    def policy(theta):
        return forward(theta, obs)[0]

    def mean_kl(new):
        return kl(dist, new).mean()

    dist, tangent, *_ = jvp(policy, (params,), (vector,))
    metric = jvp(grad(mean_kl), (dist,), (tangent,))[1]  # M J v
    return vjp(policy, params)[1](metric)[0]


def conjugate_gradient(
    product: Callable, b: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """x with product(x) = b for a positive definite product (Hestenes & Stiefel 1952), and its residual,
    |b - product(x)| / |b|.

    Stops after `iterations`, when the residual is at most `tolerance`, or at a direction that the product
    maps to 0 but for rounding, along which no length is best. b should be near unit size: it is squared.
    """
    x, residual, direction = torch.zeros_like(b), b, b
    square = start = b @ b
    for _ in range(iterations):
        if square <= tolerance**2 * start:
            break
        image = product(direction)
        curvature = direction @ image
        if curvature <= torch.finfo(b.dtype).eps ** 2 * square:
            break
        step = square / curvature
        x, residual = x + step * direction, residual - step * image
        previous, square = square, residual @ residual
        direction = residual + square / previous * direction
    return x, (square / start.clamp(min=1e-30)).sqrt()


def trust_region_step(
    params: Tensor,
    batch: PolicyBatch,
    gradient: Callable,
    product: Callable,
    evaluate: Callable,
    args: Args,
    delta: float,
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """The new parameters, or `params` itself where the line search finds none, and what to log.

    gradient(params, batch) gives g and (L, metrics), product(params, obs, v) gives F v, evaluate(params,
    batch) (L, metrics).
    """
    g, (old_surrogate, old_metrics) = gradient(params, batch)
    unchanged = old_metrics | {"policy_loss": 0.0, "accepted": 0.0, "step_fraction": 0.0}
    # x's direction is all that counts, and squares of the gradient of a policy that is all but certain
    # underflow
    unit = g / g.abs().max().clamp(min=torch.finfo(g.dtype).tiny)
    fisher = partial(product, params, batch.obs[:: args.fvp_subsample].contiguous())
    x, residual = conjugate_gradient(
        lambda v: fisher(v) + args.damping * v, unit, args.cg_iterations, args.cg_tolerance
    )
    log: dict[str, Tensor | float] = {"grad_norm": g.norm(), "cg_residual": residual}
    # The length is that of the KL itself, without damping
    step = (2 * delta / (x @ fisher(x)).clamp(min=torch.finfo(g.dtype).tiny)).sqrt() * x
    if not g @ step > torch.finfo(g.dtype).eps * batch.advantage.abs().mean():
        # it promises less than L's own rounding: nothing is left to be learnt here
        return params, log | unchanged
    for tries in range(args.max_backtracks + 1):
        fraction = args.backtrack**tries
        candidate = params + fraction * step
        new_surrogate, metrics = evaluate(candidate, batch)
        gain = new_surrogate - old_surrogate
        if metrics["kl"] <= delta and gain > 0:  # false for a NaN too
            return candidate, log | metrics | {
                "policy_loss": -gain,
                "accepted": 1.0,
                "step_fraction": fraction,
            }
    return params, log | unchanged


# --- the run ------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """What a run goes on from: everything that training changes, by name."""

    params: Tensor
    opt: Moments
    obs_stats: Stats
    return_stats: Stats
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


def judge(net: ActorCritic, rollout: Rollout, args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages and the critic's targets, (T N,) each, and how much of the targets' variance V explains."""
    value, next_value = values(net, rollout)
    ended = (rollout.terminated, rollout.truncated)
    advantage = gae(rollout.reward, value, next_value, *ended, args.gamma, args.gae_lambda).flatten()
    return_ = advantage + value.flatten()
    explained_variance = 1 - advantage.var() / (return_.var() + 1e-8)
    if args.normalize_advantages:
        # those that differ by rounding alone are equal, and not to be blown up to unit size
        std, rounding = advantage.std(unbiased=False), 1e-6 * return_.abs().max()
        advantage = torch.where(std > rounding, (advantage - advantage.mean()) / (std + 1e-8), 0.0)
    return advantage, return_, explained_variance


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
        at_least_1=(
            "num_steps",
            "cg_iterations",
            "fvp_subsample",
            "critic_epochs",
            "minibatch_size",
            "hidden",
        ),
        fractions=("gamma", "gae_lambda", "cg_tolerance"),
        positive=("delta", "learning_rate"),
        at_least_0=("damping", "bound_coef", "max_backtracks"),
        finite=("log_std",),
    )
    require(0 < args.backtrack < 1, f"--backtrack must lie between 0 and 1, not {args.backtrack:g}")
    batch = args.num_envs * args.num_steps
    require(batch > 1, "--num-envs x --num-steps must be at least 2, for a batch to have a variance")
    require(
        batch % args.minibatch_size == 0,
        f"--minibatch-size {args.minibatch_size} does not divide --num-envs x --num-steps = {batch}",
    )
    require(
        args.fvp_subsample <= batch, f"--fvp-subsample {args.fvp_subsample} is more than the batch of {batch}"
    )


def train(args: Args) -> float:
    """Run TRPO; the mean return of the final evaluation."""
    check(args)
    args = replace(args)  # the caller's stay as they are
    device = setup(args.device, args.threads)
    envs = make_envs(args.env, args.num_envs, threads=args.env_threads)
    torch.manual_seed(generator_seed(args.seed, "network"))
    net = ActorCritic(envs, args.hidden, args.log_std, args.shared_network).to(device)
    params, unflatten = flatten(net)

    def forward(params, obs):
        return functional_call(net, unflatten(params), (obs,))

    product = compile_function(partial(fisher_product, forward), device, args.compile)
    pure = (partial(f, forward, args) for f in (surrogate_gradient, surrogate, fit_critic))
    gradient, evaluate, fit = (compile_function(f, device, args.compile) for f in pure)
    load = loader(net)
    run = Run(args, "trpo", Evaluation(args, make_policy), engine=envs.engine)
    if envs.discrete or not envs.bounded.all():
        args.bound_coef = 0.0  # no bounds that a mean could leave
    generator = torch.Generator(device).manual_seed(generator_seed(args.seed, "noise"))
    obs_stats, return_stats = new_stats(envs.obs_dim, device=device), new_stats(device=device)
    state = run.restore(State(params, new_adam(params), obs_stats, return_stats, generator))
    params, opt, obs_stats, return_stats, generator = state
    load(params)
    # a resumed run begins new episodes
    obs = envs.reset(env_seeds(args.seed, "environments", args.num_envs, run.step))
    sums = torch.zeros(args.num_envs, device=device)

    while run.step < args.total_steps:
        remaining = 1 - run.step / args.total_steps if args.anneal else 1.0
        delta = args.delta * remaining
        learning_rate = torch.tensor(args.learning_rate * remaining, device=device)
        noise = draw_noise(envs, args.num_steps, args.num_envs, generator=generator)
        rollout, obs, episodes = collect(envs, obs, policy_at(net, obs_stats), noise)
        seen, obs_stats, return_stats, sums = as_seen(rollout, obs_stats, return_stats, sums, args)
        rows, action = seen.obs.flatten(0, 1), seen.action.flatten(0, 1)

        advantage, return_, explained_variance = judge(net, seen, args)

        batch = PolicyBatch(rows, action, net.policy(rows), advantage)
        params, log = trust_region_step(params, batch, gradient, product, evaluate, args, delta)
        orders = [torch.randperm(len(rows), generator=generator, device=device)
                  for _ in range(args.critic_epochs)]  # fmt: skip
        params, opt, loss = fit(params, opt, rows, return_, torch.cat(orders), learning_rate)
        load(params)

        log |= {"value_loss": loss, "explained_variance": explained_variance}
        log |= {"learning_rate": learning_rate, "delta": delta}
        state = State(params, opt, obs_stats, return_stats, generator)
        run.report(run.step + len(rows), state, acting(state), log, episodes)
    envs.close()
    return run.finish(state, acting(state))


if __name__ == "__main__":
    main(Args, train, lambda env: SETTINGS.get(env, {}))
