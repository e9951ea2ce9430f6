"""Group-relative policy optimisation (Shao et al. 2024, arXiv:2402.03300) on control tasks, one file.

What zoo/grpo_tokens.py does with G responses to one prompt, with G episodes from one reset seed: they begin
alike and meet the same randomness, so that their returns differ by what was done. The others of the group
take the critic's place:

    outcome    A_i,t = R_i - mean(R)         [/ std(R)]      R_i   = sum_t gamma^t r_i,t, all actions share it
    to-go      A_i,t = R_i,t - mean(R_t)     [/ std(R_t)]    R_i,t = r_i,t + gamma R_i,t+1, 0 after the end
    process    A_i,t = sum_{j >= t} (r_i,j - mean(r)) [/ std(r)]     r: the rewards of all steps of the group

    L    = E[ w_i min( ratio_t A_i,t, clip(ratio_t, 1 - eps, 1 + eps) A_i,t ) ]    ratio = pi / pi_old
    loss = -L + beta KL(pi || ref)                              the KL as a loss, or beta KL off the rewards

The mean includes the episode itself, which scales the gradient of outcome and to-go by 1 - 1 / G and leaves
its direction. process compares steps, not episodes: where a policy chooses how long an episode lasts that is
another objective, and where every step pays the same (CartPole-v1) it leaves nothing to learn from.

    --std          divide by the standard deviation (GRPO) or not (GPG, Chu et al. 2025, arXiv:2504.02546)
    --length       w_i: 1 for every step (batch), or the mean length over the episode's own (episode): GRPO's
                   1 / |o|, which favours short good and long bad episodes (arXiv:2503.20783)
    --kl, --kl-in  k1, k2, k3; as a loss or in the rewards, where k1 has ref exp(R / beta) / Z, of whole
                   episodes, as its optimum if the task is deterministic and gamma 1
    --reference    a finished run's policy, from which to start and near which to stay; none: the first policy
    --ungrouped    a seed for each environment: episodes that have nothing in common, for the comparison

Episodes are whole, as in zoo/reinforce.py; one cut by a time limit misses its tail, for there is no V.

    python zoo/grpo.py --env CartPole-v1
    python zoo/grpo.py --env Pendulum-v1
    python zoo/grpo.py --env Pendulum-v1 --ungrouped
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from zoo.common.args import RunArgs, check_args, require
from zoo.common.cli import main
from zoo.common.device import compile_function, flatten, loader, setup
from zoo.common.envs import VectorEnv, make_envs
from zoo.common.errors import RunFault, UsageError
from zoo.common.evaluate import MAX_EPISODE, Evaluation, Policy
from zoo.common.files import load_checkpoint
from zoo.common.normalize import Stats, new_stats, normalize, normalizer, update_stats
from zoo.common.optim import Moments, adam, clip_grad, new_adam
from zoo.common.run import Run
from zoo.common.seeding import env_seeds, generator_seed


@dataclass
class Args(RunArgs):
    kept: ClassVar = (*RunArgs.kept, "hidden", "log_std", "reference")

    num_envs: int = 32  # environments, and episodes in a batch: each plays one
    group_size: int = 8  # environments that are reset with one seed, G; must divide --num-envs
    ungrouped: bool = False  # reset each environment with a seed of its own: groups of unrelated episodes
    advantage: Literal["outcome", "to-go", "process"] = "outcome"  # what is compared within a group
    std: bool = False  # divide advantages by the group's standard deviation
    length: Literal["episode", "batch"] = "batch"  # what a sum over steps is divided by
    gamma: float = 1.0  # discount
    num_epochs: int = 10  # passes over a batch
    minibatch_size: int = 1024  # most steps in a gradient step
    learning_rate: float = 1e-3  # Adam's
    anneal: bool = True  # let the learning rate fall linearly to 0 over the run
    clip: float = 0.2  # eps of the clipped surrogate
    beta: float = 0.0  # weight of the KL to the reference; 0: none
    kl: Literal["k1", "k2", "k3"] = "k1"  # its estimator
    kl_in: Literal["reward", "loss"] = "reward"  # where it stands
    kl_correction: bool = False  # in the loss: weigh it by the ratio, for the samples are the old policy's
    reference: str | None = None  # folder of a finished run: its policy is the start and the reference
    bound_coef: float = 1.0  # weight of a penalty on means outside the bounds in all states of a batch
    max_grad_norm: float = 0.5  # the gradient is scaled down to this norm
    hidden: tuple[int, ...] = (64, 64)  # widths of the tanh layers
    log_std: float = -0.5  # a Gaussian policy's initial log standard deviation, in half action ranges
    normalize_obs: bool = True  # observations by their running mean and standard deviation


# What differs by task; a flag wins over it. Everything else runs on the defaults above.
SETTINGS: dict[str, dict] = {
    "CartPole-v1": dict(total_steps=200_000, eval_every=20_000),
    "Pendulum-v1": dict(
        total_steps=500_000, group_size=16, learning_rate=2e-3, log_std=0.0, normalize_obs=False,
        eval_every=50_000, eval_episodes=100,
    ),
    "Acrobot-v1": dict(eval_episodes=100),
    # long episodes: few in a batch, so that there are many updates; a step is paid what follows it
    "HalfCheetah-v4": dict(advantage="to-go", gamma=0.99, num_envs=8),
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


class PolicyNetwork(nn.Module):
    """obs (..., D) -> the policy's distribution."""

    def __init__(self, envs: VectorEnv, hidden: tuple[int, ...], log_std: float):
        super().__init__()
        self.policy_trunk = trunk(envs.obs_dim, hidden)
        # near-uniform or near-zero-mean actions at the start
        self.policy_head = layer(hidden[-1], envs.action_dim, 0.01)
        self.log_std = None if envs.discrete else nn.Parameter(torch.full((envs.action_dim,), log_std))

    def forward(self, obs: Tensor) -> Gaussian | Categorical:
        output = self.policy_head(self.policy_trunk(obs))
        return Categorical(output) if self.log_std is None else Gaussian(output, self.log_std)


# --- estimators ---------------------------------------------------------------------------------------------


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x over the places where mask is true; of equal shapes."""
    return (x * mask).sum() / mask.sum()


def kl_estimate(log_ratio: Tensor, kind: str) -> Tensor:
    """k1, k2 or k3 of KL(pi || ref), elementwise, log_ratio = log ref - log pi of what pi chose.

    See zoo/common/kl.py for what each is an estimate of.
    """
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio**2 / 2
    return torch.expm1(log_ratio) - log_ratio


def returns_to_go(reward: Tensor, alive: Tensor, tail: Tensor, gamma: float) -> Tensor:
    """R_t = r_t + gamma R_{t+1} (T, N) of one episode a column (S3 eq. 4); reward and alive (T, N).

    alive marks the episode's rows, the rest of a column is filling. tail (N,) stands for what a time limit
    cut off: the value of the state after the last row, 0 where the episode terminated or no value is known.
    """
    return_, running = torch.empty_like(reward), tail
    for t in reversed(range(len(reward))):
        return_[t] = running = torch.where(alive[t], reward[t] + gamma * running, running)
    return return_


def group_advantages(reward: Tensor, std: bool) -> Tensor:
    """(N, G) rewards of G responses to each of N prompts, less their mean, and divided by their standard
    deviation.

    The deviation is trl's: of G - 1 degrees of freedom, plus 1e-4. The mean includes the response itself,
    which scales the expected gradient by 1 - 1 / G.
    """
    centred = reward - reward.mean(1, keepdim=True)
    if std:  # equal rewards give 0, not the rounding of their mean over 1e-4
        centred = centred.masked_fill(reward.amax(1, keepdim=True) == reward.amin(1, keepdim=True), 0.0)
    return centred / (reward.std(1, keepdim=True) + 1e-4) if std else centred


def process_advantages(step_reward: Tensor, mask: Tensor, std: bool) -> Tensor:
    """(N, G, L) sums of the rewards of a token's step and those after it, less the mean reward of all steps
    of the group.

    index(j) >= t, as Shao et al. have it: a token is credited with its own step. Standard deviation over all
    G x K steps.
    """
    count = mask.sum((1, 2), keepdim=True)
    centred = (step_reward - (step_reward * mask).sum((1, 2), keepdim=True) / count) * mask
    if std:
        equal = ((step_reward == step_reward[:, :1, :1]) | ~mask).flatten(1).all(1)
        centred = centred.masked_fill(equal[:, None, None], 0.0)  # as for whole responses
        centred = centred / (((centred**2).sum((1, 2), keepdim=True) / (count - 1)).sqrt() + 1e-4)
    return centred.flip(-1).cumsum(-1).flip(-1) * mask


def advantages(reward: Tensor, alive: Tensor, args: Args) -> Tensor:
    """A (T, N) of the module's docstring, 0 where not alive; reward and alive (T, N).

    An episode a column, those of a group side by side. A prompt is a reset seed here, a response an episode,
    a token a step. To-go counts an episode that has ended as 0, which it earns from there on: a mean over
    those that go on would depend on how many do.
    """
    if args.advantage == "process":
        rewards, mask = (x.T.unflatten(0, (-1, args.group_size)) for x in (reward, alive))
        return process_advantages(rewards, mask, args.std).flatten(0, 1).T
    return_ = returns_to_go(reward, alive, torch.zeros_like(reward[0]), args.gamma)
    compared = return_[:1] if args.advantage == "outcome" else return_
    return group_advantages(compared.reshape(-1, args.group_size), args.std).view_as(compared) * alive


def step_weights(alive: Tensor, length: str) -> Tensor:
    """w (T, N) of each step in the loss, their mean 1 over the steps that are alive (T, N)."""
    if length == "batch":
        return alive.float()
    lengths = alive.sum(0)
    return alive * (lengths.float().mean() / lengths)


# --- losses -------------------------------------------------------------------------------------------------


class Steps(NamedTuple):
    """Steps of episodes, (B, ...) each, what pi_old, which acted, and the reference said of them; weight 0 is
    filling."""

    obs: Tensor
    action: Tensor
    log_prob: Tensor
    ref_log_prob: Tensor
    advantage: Tensor
    weight: Tensor


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """min(r A, clip(r) A), elementwise (PPO, eq. 7)."""
    ratio = log_ratio.exp()
    return torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def outside(dist: Gaussian | Categorical) -> Tensor:
    """How far means lie outside [-1, 1], squared and summed over those dimensions in which all rows do; ().

    There nearly every sample is clipped to a bound in every state, so that no reward tells the policy to come
    back. Where some states are inside, the others may well want their bound, and nothing is added.
    """
    if isinstance(dist, Categorical):
        return dist.logits.new_zeros(())
    beyond = dist.mean.abs() - 1
    return ((beyond > 0).all(0) * beyond**2).sum(-1).mean()


def group_loss(
    params: Tensor, steps: Steps, forward: Callable, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a minibatch and what to log of it; forward(params, obs) gives the distribution."""
    dist, real = forward(params, steps.obs), steps.weight > 0
    log_prob = dist.log_prob(steps.action)
    log_ratio = log_prob - steps.log_prob
    surrogate = clipped_surrogate(log_ratio, steps.advantage, args.clip)
    pg_loss = -masked_mean(steps.weight * surrogate, real)
    metrics = {"policy_loss": pg_loss, "entropy": masked_mean(dist.entropy(), real)}
    metrics["approx_kl"] = masked_mean(torch.expm1(log_ratio) - log_ratio, real)  # to the policy that acted
    metrics["clipfrac"] = masked_mean((torch.expm1(log_ratio).abs() > args.clip).float(), real)
    loss = pg_loss + args.bound_coef * outside(dist)
    if args.kl_in == "reward" or args.beta == 0:
        return loss, metrics
    estimate = kl_estimate(steps.ref_log_prob - log_prob, args.kl)
    if args.kl_correction:
        estimate = log_ratio.exp() * estimate
    metrics["kl_loss"] = masked_mean(steps.weight * estimate, real)
    return loss + args.beta * metrics["kl_loss"], metrics


# --- the update ---------------------------------------------------------------------------------------------


def update(
    params: Tensor, opt: Moments, steps: Steps, learning_rate: Tensor, forward: Callable, args: Args
) -> tuple[Tensor, Moments, dict[str, Tensor]]:
    """A minibatch's step, a pure function: parameters and optimiser in, the new ones and metrics out."""
    grad, (_, metrics) = grad_and_value(group_loss, has_aux=True)(params, steps, forward, args)
    grad, grad_norm = clip_grad(grad, args.max_grad_norm)
    params, opt = adam(params, grad, opt, learning_rate)
    return params, opt, metrics | {"grad_norm": grad_norm}


def minibatches(steps: Steps, order: Tensor, size: int) -> Iterator[Steps]:
    """The steps in this order (B,), in equal parts of at most `size`, each filled up to it: episodes are of
    all lengths, but compiled code sees one shape."""
    for index in order.tensor_split(-(-len(order) // size)):
        missing = size - len(index)
        part = Steps(*(column[torch.cat((index, index[:1].expand(missing)))] for column in steps))
        yield part._replace(weight=part.weight * (torch.arange(size, device=order.device) < len(index)))


# --- the run ------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """What a run goes on from: everything that training changes, by name."""

    params: Tensor
    opt: Moments
    obs_stats: Stats
    ref: Tensor  # the reference's parameters
    ref_stats: Stats  # and how it sees observations
    generator: torch.Generator


class Episodes(NamedTuple):
    """N whole episodes, a column each, (T, N, ...), T the longest one's length; filling where not alive."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    alive: Tensor
    last_obs: Tensor  # (N, D) the true successor of an episode's last step
    truncated: Tensor  # (N,) the episode ended by a time limit


def collect_episodes(
    envs: VectorEnv, seeds: list[int], policy, generator: torch.Generator
) -> tuple[Episodes, list]:
    """Play an episode in every environment by samples of `policy(obs)`; also returns and lengths."""
    device, rows = generator.device, list[tuple]()
    obs, alive, totals = envs.reset(seeds), np.ones(envs.num_envs, dtype=bool), np.zeros(envs.num_envs)
    last_obs, truncated = obs.copy(), np.zeros(envs.num_envs, dtype=bool)
    while alive.any():
        if len(rows) % 64 == 0:
            noise = draw_noise(envs, 64, envs.num_envs, generator=generator)
        if len(rows) == MAX_EPISODE:
            raise RunFault(
                f"{envs.env_id}: an episode did not end in {MAX_EPISODE:,} steps; add a time limit"
            )
        action = policy(obs).sample(noise[len(rows) % 64]).cpu().numpy()
        step = envs.step(action)
        rows.append((obs, action, step.reward.astype(np.float32), alive))
        totals += step.reward * alive
        ended = alive & (step.terminated | step.truncated)
        last_obs[ended], truncated[ended] = step.next_obs[ended], ~step.terminated[ended]
        obs, alive = step.obs, alive & ~ended
    columns = [torch.as_tensor(np.stack(column), device=device) for column in zip(*rows, strict=True)]
    ends = [torch.as_tensor(last_obs, device=device), torch.as_tensor(truncated, device=device)]
    return Episodes(*(columns + ends)), list(zip(totals.tolist(), columns[3].sum(0).tolist(), strict=True))


def policy_at(net: PolicyNetwork, obs_stats: Stats) -> Callable[[np.ndarray], Gaussian | Categorical]:
    """Observations (N, D) to the distribution of actions, by the parameters that are in `net`.

    Runs as it stands: a compiled call costs more than the few products of a single step.
    """
    device, seen = obs_stats["mean"].device, normalizer(obs_stats)

    def policy(obs: np.ndarray) -> Gaussian | Categorical:
        return net(seen(torch.as_tensor(obs, device=device)))

    return policy


def batch_of(
    episodes: Episodes, state: State, forward: Callable, args: Args
) -> tuple[Steps, dict[str, Tensor]]:
    """The steps of whole episodes as the loss reads them, and what to log of them."""
    alive = episodes.alive
    obs, action = episodes.obs[alive], episodes.action[alive]
    seen = normalize(obs, state.obs_stats)
    log_prob = ref_log_prob = forward(state.params, seen).log_prob(action)
    reward, metrics = episodes.reward, {}
    if args.beta:
        ref_log_prob = forward(state.ref, normalize(obs, state.ref_stats)).log_prob(action)
        metrics["kl"] = (log_prob - ref_log_prob).sum() / alive.shape[1]  # of an episode
        if args.kl_in == "reward":
            penalty = args.beta * kl_estimate(ref_log_prob - log_prob, args.kl)
            reward = reward.masked_scatter(alive, reward[alive] - penalty)
    advantage = advantages(reward, alive, args)[alive]
    metrics["advantage_std"] = advantage.std(correction=0)
    weight = step_weights(alive, args.length)[alive]
    return Steps(seen, action, log_prob, ref_log_prob, advantage, weight), metrics


def acting(state: State) -> dict:
    """What acting needs, and nothing else: an agent.pt."""
    return {"params": state.params, "obs_stats": state.obs_stats}


def make_policy(envs: VectorEnv, args: Args, agent: dict) -> Policy:
    """The deterministic policy of what an agent.pt holds: observations (N, D) to modes."""
    net = PolicyNetwork(envs, args.hidden, args.log_std).to(agent["params"].device).eval()
    loader(net)(agent["params"])
    policy = policy_at(net, agent["obs_stats"])
    return lambda obs: policy(obs).mode().cpu().numpy()


def check(args: Args) -> None:
    """Refuse arguments that cannot work together."""
    check_args(
        args,
        at_least_1=("group_size", "num_epochs", "minibatch_size", "hidden"),
        fractions=("gamma",),
        positive=("learning_rate", "clip", "max_grad_norm"),
        at_least_0=("bound_coef", "beta"),
        finite=("log_std",),
    )
    require(args.reference != "", "--reference is empty; a folder is meant")
    require(
        args.kl_in == "loss" or not args.kl_correction,
        "--kl-correction weighs the KL in the loss; --kl-in loss is meant",
    )
    require(
        args.group_size > 1, "--group-size 1: an episode that is its own group has advantage 0; at least 2"
    )
    require(
        args.num_envs % args.group_size == 0,
        f"--group-size {args.group_size} does not divide --num-envs {args.num_envs}",
    )
    require(
        args.advantage != "process" or args.gamma == 1,
        f"--gamma {args.gamma:g}: --advantage process sums rewards as they are; it goes with --gamma 1",
    )


def check_groups(envs: VectorEnv, seed: int) -> None:
    """Refuse a task in which the same reset seed does not give the same start. Raises UsageError."""
    seeds = env_seeds(seed, "environments", 1) * envs.num_envs
    first, again = envs.reset(seeds), envs.reset(seeds)
    require(
        bool((first == first[0]).all() and (again == first).all()),
        f"--env {envs.env_id}: its reset ignores the seed, so that a group's episodes begin differently and "
        "mean nothing to each other; have reset call super().reset(seed=seed) and draw from self.np_random, "
        "or give --ungrouped",
    )


def start_from(
    folder: str, params: Tensor, obs_stats: Stats, env: str, hidden: tuple[int, ...]
) -> tuple[Tensor, Stats]:
    """A finished run's parameters and statistics, on the device of these. Raises UsageError."""
    content = load_checkpoint(Path(folder) / "agent.pt", "--reference", "grpo", env)
    saved, own = content["state"], content["args"].get("hidden")
    if saved["params"].shape != params.shape or tuple(own or hidden) != hidden:
        raise UsageError(
            f"--reference {folder}: its policy has {len(saved['params']):,} parameters and this one "
            f"{len(params):,}; give the --hidden that it was trained with, {' '.join(map(str, own or ()))}"
        )
    return saved["params"].to(params.device), {
        name: x.to(params.device) for name, x in saved["obs_stats"].items()
    }


def train(args: Args) -> float:
    """Run GRPO; the mean return of the final evaluation."""
    check(args)
    args = replace(args)  # the caller's stay as they are
    device = setup(args.device, args.threads)
    envs = make_envs(args.env, args.num_envs, threads=args.env_threads)
    if not args.ungrouped:
        check_groups(envs, args.seed)
    torch.manual_seed(generator_seed(args.seed, "network"))
    net = PolicyNetwork(envs, args.hidden, args.log_std).to(device)
    params, unflatten = flatten(net)

    def forward(params, obs):
        return functional_call(net, unflatten(params), (obs,))

    load = loader(net)
    obs_stats = new_stats(envs.obs_dim, device=device)
    if args.reference and not args.resume:
        params, obs_stats = start_from(args.reference, params, obs_stats, args.env, args.hidden)
    compiled = compile_function(partial(update, forward=forward, args=args), device, args.compile)
    run = Run(args, "grpo", Evaluation(args, make_policy), engine=envs.engine)
    if envs.discrete or not envs.bounded.all():
        args.bound_coef = 0.0  # no bounds that a mean could leave
    generator = torch.Generator(device).manual_seed(generator_seed(args.seed, "noise"))
    state = run.restore(State(params, new_adam(params), obs_stats, params, obs_stats, generator))
    together = 1 if args.ungrouped else args.group_size

    while run.step < args.total_steps:
        params, opt, obs_stats, ref, ref_stats, generator = state
        load(params)
        remaining = 1 - run.step / args.total_steps if args.anneal else 1.0
        learning_rate = torch.tensor(args.learning_rate * remaining, device=device)
        # new episodes for every batch
        seeds = np.repeat(env_seeds(args.seed, "environments", args.num_envs // together, run.step), together)
        episodes, ended = collect_episodes(envs, seeds.tolist(), policy_at(net, obs_stats), generator)
        steps, log = batch_of(episodes, state, forward, args)
        parts = []
        for _ in range(args.num_epochs):
            order = torch.randperm(len(steps.obs), generator=generator, device=device)
            for part in minibatches(steps, order, args.minibatch_size):
                params, opt, metrics = compiled(params, opt, part, learning_rate)
                parts.append(metrics)
        if args.normalize_obs:
            obs_stats = update_stats(obs_stats, episodes.obs[episodes.alive])
        log |= {name: torch.stack([metrics[name] for metrics in parts]).mean() for name in parts[0]}
        state = State(params, opt, obs_stats, ref, ref_stats, generator)
        run.report(
            run.step + len(steps.obs), state, acting(state), log | {"learning_rate": learning_rate}, ended
        )
    envs.close()
    return run.finish(state, acting(state))


if __name__ == "__main__":
    main(Args, train, lambda env: SETTINGS.get(env, {}))
