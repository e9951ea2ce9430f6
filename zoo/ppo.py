"""Proximal Policy Optimisation (Schulman et al. 2017, arXiv:1707.06347), one file.

Collect T steps of N environments with the current policy pi_old, estimate advantages, then take several epochs of
minibatch steps on a surrogate that is only trusted near pi_old. With r_t = pi(a_t|s_t) / pi_old(a_t|s_t):

    clip         L = E[ min( r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t ) ]
    kl           L = E[ r_t A_t ] - beta E[ KL(pi_old || pi) ]          adaptive-kl: beta follows a target KL (section 4)
    unclipped    L = E[ r_t A_t ]                                       trusts r_t anywhere: watch approx_kl run away

    delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)        s_{t+1} the true successor, also at a time limit
    A_t     = delta_t + gamma lambda (1 - ended_t) A_{t+1}              ended = terminated or truncated
    V's target R_t = A_t + V(s_t), from the raw advantage, never the normalised one
    loss    = -L + c1 E[(V(s_t) - R_t)^2] - c2 E[H(pi(.|s_t))]

Advantages are recomputed with the improving critic before each epoch (Andrychowicz et al. 2021, arXiv:2006.05990).

    python zoo/ppo.py --env HalfCheetah-v4
    python zoo/ppo.py --env CartPole-v1 --seed 2
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.utils._pytree import tree_map

from zoo.common.cli import RunArgs, check_args, main, require
from zoo.common.device import compile_function, flatten, restore_generator, setup
from zoo.common.envs import VectorEnv, make_envs
from zoo.common.normalize import discounted_sums, new_stats, normalize, update_stats
from zoo.common.optim import adam, clip_grad, new_adam
from zoo.common.run import Policy, Run


@dataclass
class Args(RunArgs):
    num_envs: int = 64  # environments stepped together, N
    num_steps: int = 32  # steps of each environment between updates, T; a batch is N x T transitions
    num_epochs: int = 10  # passes over a batch
    minibatch_size: int = 64  # transitions in a gradient step; must divide N x T
    learning_rate: float = 3e-4  # Adam's
    anneal: bool = True  # let the learning rate fall linearly to 0 over the run
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # GAE's lambda: 0 trusts the critic (one-step TD), 1 the rewards (Monte Carlo)
    recompute_advantages: bool = True  # values and advantages anew before each epoch
    normalize_advantages: bool = False  # mean 0 and standard deviation 1 in each minibatch
    surrogate: Literal["clip", "kl", "adaptive-kl", "unclipped"] = "clip"  # what keeps the new policy near the old one
    clip: float = 0.2  # eps of the clipped surrogate
    kl_coef: float = 1.0  # beta of the kl surrogates (where adaptive-kl starts)
    target_kl: float | None = None  # ends an update's epochs when the KL exceeds it; adaptive-kl's target (0.01 if not given)
    value_clip: float | None = None  # keep V within this of its old value in the loss
    value_coef: float = 0.25  # weight of the value loss, c1
    entropy_coef: float = 0.0  # weight of the entropy bonus, c2
    max_grad_norm: float = 0.5  # the gradient is scaled down to this norm
    hidden: tuple[int, ...] = (64, 64)  # widths of the tanh layers
    shared_network: bool = False  # one trunk for policy and value instead of two
    log_std: float = -1.0  # initial log standard deviation of a Gaussian policy, in units of half the action range
    normalize_obs: bool = True  # observations by their running mean and standard deviation
    scale_rewards: bool = True  # rewards by the running standard deviation of the discounted return


# What differs by task; a flag wins over it. Everything else runs on the defaults above.
SETTINGS: dict[str, dict] = {
    "CartPole-v1": dict(
        total_steps=100_000, num_envs=8, num_steps=32, minibatch_size=256, num_epochs=20, learning_rate=1e-3,
        normalize_advantages=True, normalize_obs=False, eval_every=20_000,
    ),
    "Acrobot-v1": dict(
        num_envs=16, num_steps=256, gae_lambda=0.94, normalize_advantages=True, eval_episodes=100,
    ),
    "MountainCar-v0": dict(
        num_envs=16, num_steps=64, gae_lambda=0.98, normalize_advantages=True, eval_episodes=100,
    ),
    "MountainCarContinuous-v0": dict(
        total_steps=20_000, num_envs=8, num_steps=64, learning_rate=1e-3, gamma=0.999, log_std=0.0, eval_every=5_000,
    ),
    "Pendulum-v1": dict(
        total_steps=100_000, num_envs=8, num_steps=128, num_epochs=20, learning_rate=1e-3, gamma=0.98, log_std=-0.5,
        eval_every=20_000, eval_episodes=100,
    ),
}  # fmt: skip


# --- networks and distributions -------------------------------------------------------------------------------------------


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
    """The randomness of actions, drawn ahead so that acting is a pure function: standard normal or Gumbel (*shape, A)."""
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
    """obs (B, D) -> the policy's distribution and V (B,)."""

    def __init__(self, envs: VectorEnv, hidden: tuple[int, ...], log_std: float, shared: bool):
        super().__init__()
        self.policy_trunk = trunk(envs.obs_dim, hidden)
        self.value_trunk = self.policy_trunk if shared else trunk(envs.obs_dim, hidden)
        self.policy_head = layer(hidden[-1], envs.action_dim, 0.01)  # near-uniform or near-zero-mean actions at the start
        self.value_head = layer(hidden[-1], 1, 1.0)
        self.log_std = None if envs.discrete else nn.Parameter(torch.full((envs.action_dim,), log_std))

    def forward(self, obs: Tensor) -> tuple[Gaussian | Categorical, Tensor]:
        output = self.policy_head(self.policy_trunk(obs))
        dist = Categorical(output) if self.log_std is None else Gaussian(output, self.log_std)
        return dist, self.value_head(self.value_trunk(obs)).squeeze(-1)


# --- estimators -----------------------------------------------------------------------------------------------------------


def gae(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, truncated: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalised advantage estimates (T, N) (Schulman et al. 2016, arXiv:1506.02438, eq. 16); all inputs (T, N).

    next_value[t] is V of the true successor of step t. The recursion is cut at every episode's end; the bootstrap
    gamma * next_value only at terminations, because a time limit does not make the future worthless.
    """
    delta = reward + gamma * next_value * ~terminated - value
    decay = gamma * lam * ~(terminated | truncated)
    advantage = torch.empty_like(delta)
    running = torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        advantage[t] = running = delta[t] + decay[t] * running
    return advantage


# --- losses ---------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Transitions with what pi_old and V_old said of them, (B, ...) each.

    pi_old acted; V_old is the critic that the advantages came from, each epoch's first one with --recompute-advantages.
    """

    obs: Tensor
    action: Tensor
    log_prob: Tensor
    value: Tensor
    advantage: Tensor
    return_: Tensor


def policy_loss(ratio: Tensor, log_ratio: Tensor, advantage: Tensor, kl_coef: Tensor, surrogate: str, clip: float) -> Tensor:
    """-L, the negative surrogate of the module's docstring."""
    if surrogate == "clip":
        return -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
    if surrogate == "unclipped":
        return -(ratio * advantage).mean()
    # The samples are pi_old's, so k3 = (r - 1) - log r is unbiased for KL(pi_old || pi), and so is its gradient.
    return -(ratio * advantage).mean() + kl_coef * ((ratio - 1) - log_ratio).mean()


def value_loss(value: Tensor, old_value: Tensor, return_: Tensor, value_clip: float | None) -> Tensor:
    """Mean squared error to the target; with value_clip the worse of V and V clipped to old V +- value_clip."""
    error = (value - return_) ** 2
    if value_clip is not None:
        clipped = old_value + (value - old_value).clamp(-value_clip, value_clip)
        error = torch.max(error, (clipped - return_) ** 2)
    return error.mean()


def ppo_loss(params: Tensor, batch: Batch, kl_coef: Tensor, forward, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
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
    metrics["approx_kl"] = ((ratio - 1) - log_ratio).mean()  # k3, of KL(pi_old || pi)
    metrics["clipfrac"] = ((ratio - 1).abs() > args.clip).float().mean()
    return pg_loss + args.value_coef * v_loss - args.entropy_coef * entropy, metrics


def adapt_kl_coef(kl_coef: Tensor, kl: Tensor, target: float) -> Tensor:
    """Double beta after a KL above 1.5 targets, halve it below 1 / 1.5 (PPO paper, section 4), within what float32 bears."""
    return (kl_coef * (1.0 + (kl > 1.5 * target).float() - 0.5 * (kl < target / 1.5).float())).clamp(1e-6, 1e6)


# --- the run --------------------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """T steps of N environments, (T, N, ...) each; next_obs is the true successor."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    terminated: Tensor
    truncated: Tensor


def collect(envs: VectorEnv, obs: np.ndarray, act, noise: Tensor) -> tuple[Rollout, np.ndarray, list]:
    """Act by `act(obs, noise[t])` for T steps from `obs`; the rollout, the observations to go on from, the episodes ended."""
    rows, episodes = [], []
    for step_noise in noise:
        action = act(torch.as_tensor(obs, device=noise.device), step_noise).cpu().numpy()
        step = envs.step(action)
        rows.append((obs, action, step.reward.astype(np.float32), step.next_obs, step.terminated, step.truncated))
        obs = step.obs
        episodes += step.episodes
    columns = [torch.as_tensor(np.stack(column), device=noise.device) for column in zip(*rows, strict=True)]
    return Rollout(*columns), obs, episodes


def make_policy(envs: VectorEnv, args: Args, acting: dict) -> Policy:
    """The deterministic policy of what an agent.pt holds: observations (B, D) to the modes of their action distributions."""
    device = acting["params"].device
    net = ActorCritic(envs, args.hidden, args.log_std, args.shared_network).to(device)
    params = flatten(net)[1](acting["params"])

    def policy(obs: np.ndarray) -> np.ndarray:
        seen = normalize(torch.as_tensor(obs, device=device), acting["obs_stats"])
        return functional_call(net, params, (seen,))[0].mode().cpu().numpy()

    return policy


def check(args: Args) -> None:
    """Refuse arguments that cannot work together."""
    check_args(
        args,
        at_least_1=("num_steps", "num_epochs", "minibatch_size", "hidden"),
        fractions=("gamma", "gae_lambda"),
        positive=("learning_rate", "clip", "max_grad_norm", "target_kl", "value_clip"),
        finite=("kl_coef", "value_coef", "entropy_coef", "log_std"),
    )
    batch = args.num_envs * args.num_steps
    require(batch > 1, "--num-envs x --num-steps must be at least 2, for a batch to have a variance")
    require(
        batch % args.minibatch_size == 0,
        f"--minibatch-size {args.minibatch_size} does not divide the batch of {batch} (--num-envs x --num-steps)",
    )
    require(
        args.minibatch_size > 1 or not args.normalize_advantages,
        "--minibatch-size must be at least 2 with --normalize-advantages: of one advantage nothing would be left",
    )
    require(args.total_steps >= batch, f"--total-steps {args.total_steps} is less than one batch of {batch} steps")


def train(args: Args) -> float:
    """Run PPO; the mean return of the final evaluation."""
    check(args)
    device = setup(args.device, args.threads)
    envs = make_envs(args.env, args.num_envs, threads=args.env_threads)
    torch.manual_seed(args.seed)
    net = ActorCritic(envs, args.hidden, args.log_std, args.shared_network).to(device)
    params, unflatten = flatten(net)
    generator = torch.Generator(device).manual_seed(args.seed)

    def forward(params, obs):
        return functional_call(net, unflatten(params), (obs,))

    def act(params, obs_stats, obs, noise):
        return forward(params, normalize(obs, obs_stats))[0].sample(noise)

    def log_prob(params, obs, action):
        return forward(params, obs)[0].log_prob(action)

    def critic(params, obs):
        return forward(params, obs)[1]

    def update(params, opt, batch, learning_rate, kl_coef):
        """The minibatch step, a pure function: parameters, optimiser and batch in, the new ones and metrics out."""
        grad, (_, metrics) = grad_and_value(ppo_loss, has_aux=True)(params, batch, kl_coef, forward, args)
        grad, grad_norm = clip_grad(grad, args.max_grad_norm)
        params, opt = adam(params, grad, opt, learning_rate)
        return params, opt, metrics | {"grad_norm": grad_norm}

    def policy(obs):  # at the present parameters, without noise, for evaluations
        return forward(params, normalize(torch.as_tensor(obs, device=device), obs_stats))[0].mode().cpu().numpy()

    def snapshot():
        return {
            "params": params, "obs_stats": obs_stats, "opt": opt, "return_stats": return_stats, "kl_coef": kl_coef,
            "generator": generator.get_state(),
        }  # fmt: skip

    act, log_prob, values, update = (compile_function(f, device, args.compile) for f in (act, log_prob, critic, update))

    run = Run(args, "ppo", envs, lambda: make_envs(args.env, args.eval_episodes, threads=args.env_threads))
    obs_stats, opt, return_stats = new_stats(envs.obs_dim), new_adam(params), new_stats()
    kl_coef = torch.tensor(args.kl_coef)
    state = run.restore() or snapshot()
    restore_generator(generator, state.pop("generator"), args.seed + run.step)
    params, obs_stats, opt, return_stats, kl_coef = tree_map(lambda x: x.to(device), tuple(state.values()))
    obs = envs.reset(args.seed + run.step)  # a resumed run begins new episodes
    carry = torch.zeros(args.num_envs, device=device)
    batch_size = args.num_envs * args.num_steps

    while run.step + batch_size <= args.total_steps:
        remaining = 1 - run.step / args.total_steps
        learning_rate = torch.tensor(args.learning_rate * (remaining if args.anneal else 1.0), device=device)
        noise = draw_noise(envs, args.num_steps, args.num_envs, generator=generator)
        rollout, obs, episodes = collect(envs, obs, partial(act, params, obs_stats), noise)
        reward = rollout.reward
        if args.scale_rewards:
            sums, carry = discounted_sums(reward, rollout.terminated | rollout.truncated, carry, args.gamma)
            return_stats = update_stats(return_stats, sums.flatten())
            reward = reward / (return_stats["var"] + 1e-8).sqrt().float()

        # The successor of row t is row t + 1, but for the last steps of truncated episodes, whose values are computed apart.
        seen = normalize(torch.cat((rollout.obs, rollout.next_obs[-1:])), obs_stats).flatten(0, 1)
        cut = rollout.truncated.flatten().nonzero().squeeze(-1)
        cut_obs = normalize(rollout.next_obs.flatten(0, 1)[cut], obs_stats)
        action = rollout.action.flatten(0, 1)
        old_log_prob = log_prob(params, seen[:batch_size], action)

        metrics = []
        for epoch in range(args.num_epochs):
            if epoch == 0 or args.recompute_advantages:
                value = values(params, seen)
                value, next_value = value[:batch_size], value[args.num_envs :].clone()
                next_value[cut] = critic(params, cut_obs)
                value, next_value = value.view_as(reward), next_value.view_as(reward)
                advantage = gae(reward, value, next_value, rollout.terminated, rollout.truncated, args.gamma, args.gae_lambda)
                return_ = advantage + value
                batch = Batch(seen[:batch_size], action, old_log_prob, *(x.flatten() for x in (value, advantage, return_)))
                if epoch == 0:
                    explained_variance = 1 - advantage.var() / (return_.var() + 1e-8)
            order = torch.randperm(batch_size, generator=generator, device=device)
            for minibatch in zip(*(column[order].split(args.minibatch_size) for column in batch), strict=True):
                params, opt, info = update(params, opt, Batch(*minibatch), learning_rate, kl_coef)
                metrics.append(info)
            kl = torch.stack([info["approx_kl"] for info in metrics[-batch_size // args.minibatch_size :]]).mean()
            if args.target_kl is not None and args.surrogate != "adaptive-kl" and kl > args.target_kl:
                break
        if args.surrogate == "adaptive-kl":
            kl_coef = adapt_kl_coef(kl_coef, kl, args.target_kl or 0.01)
        if args.normalize_obs:
            obs_stats = update_stats(obs_stats, rollout.obs.flatten(0, 1))

        means = {name: torch.stack([info[name] for info in metrics]).mean() for name in metrics[0]}
        means |= {"explained_variance": explained_variance, "kl_coef": kl_coef, "epochs": torch.tensor(epoch + 1)}
        means["learning_rate"] = learning_rate
        run.report(run.step + batch_size, snapshot(), means, episodes, policy)
    return run.finish(snapshot(), policy, {"params": params, "obs_stats": obs_stats})


if __name__ == "__main__":
    main(Args, train, lambda env: SETTINGS.get(env, {}))
