"""REINFORCE (Williams 1992): the policy gradient from whole episodes, one file.

Play N episodes with the policy, and make every action likelier in proportion to the return that came with it:

    total    g = 1/N sum_episodes sum_t  grad log pi(a_t|s_t)          (R(tau) - b)
    to-go    g = 1/N sum_episodes sum_t  grad log pi(a_t|s_t) [gamma^t] (R_t   - b)

    R(tau) = sum_t gamma^t r_t          R_t = r_t + gamma R_{t+1}

An action cannot change the rewards before it, so to-go drops noise only. The factor gamma^t belongs to the
gradient of the discounted objective; practice leaves it out, which is no function's gradient (Nota & Thomas
2020); --discount-weight keeps it.

A baseline b that does not know a_t leaves the expectation as it is and lowers the variance:

    none     b = 0
    mean     the mean return of the other episodes of the batch (to-go: of all their steps)
    optimal  the constant of least variance. An episode's estimate is X - b Y with Y = sum_t grad log pi
             (its score) and X = sum_t grad log pi R_t, so b* = E[X.Y] / E[|Y|^2]; for total, X = Y R(tau)
             and b* = E[|Y|^2 R(tau)] / E[|Y|^2]
    value    V(s_t), fitted to the returns of earlier batches (for total: V(s_0))

mean and optimal leave out the episode they are used on: with its own return inside, the estimate would be
biased (by the factor 1 - 1/N for the mean of total returns). Every environment plays exactly one episode a
batch and waits for the longest, because the first to end are the short ones. What an environment does while
it waits is neither used nor counted as steps; the last batch may reach beyond --total-steps.

An episode cut by a time limit misses its tail. With --baseline value the tail is V(true successor); without a
V the return is that of the time-limited task.

A Gaussian's means that have left the action bounds in every state are drawn back besides (--bound-coef).

    python zoo/reinforce.py --env CartPole-v1
    python zoo/reinforce.py --env HalfCheetah-v4 --baseline mean
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value

from zoo.common.args import RunArgs, check_args, require
from zoo.common.cli import main
from zoo.common.device import compile_function, flatten, loader, setup
from zoo.common.envs import VectorEnv, make_envs
from zoo.common.errors import RunFault
from zoo.common.evaluate import MAX_EPISODE, Evaluation, Policy
from zoo.common.normalize import Stats, new_stats, normalize, normalizer, return_scale, update_stats
from zoo.common.optim import Moments, adam, new_adam
from zoo.common.run import Run
from zoo.common.seeding import env_seeds, generator_seed


@dataclass
class Args(RunArgs):
    kept: ClassVar = (*RunArgs.kept, "hidden", "shared_network", "log_std")

    num_envs: int = 4  # environments, and episodes in a batch: each plays one
    returns: Literal["total", "to-go"] = "to-go"  # an action's credit: the whole return, or what followed
    baseline: Literal["none", "mean", "optimal", "value"] = "value"  # what is subtracted from it
    discount_weight: bool = False  # weigh step t by gamma^t, as the exact gradient does
    learning_rate: float = 3e-3  # Adam's, for the policy's one step a batch
    anneal: bool = True  # let the learning rate fall linearly to 0 over the run
    gamma: float = 0.99  # discount
    value_learning_rate: float = 1e-3  # Adam's, for V
    value_epochs: int = 10  # passes over a batch to fit V
    minibatch_size: int = 512  # rows in a step of V's, and in a piece of the policy's gradient
    bound_coef: float = 1.0  # weight of a penalty on means outside the bounds in all states of a batch
    hidden: tuple[int, ...] = (64, 64)  # widths of the tanh layers
    shared_network: bool = False  # one trunk for policy and value instead of two
    log_std: float = -0.5  # a Gaussian policy's initial log standard deviation, in half action ranges
    normalize_obs: bool = True  # observations by their running mean and standard deviation
    scale_returns: bool = True  # returns by their running standard deviation
    report_every: int = 2048  # environment steps between reports (rounded up to whole batches)


# What differs by task; a flag wins over it. Everything else runs on the defaults above.
SETTINGS: dict[str, dict] = {
    "CartPole-v1": dict(total_steps=200_000, num_envs=8, learning_rate=5e-3, eval_every=20_000),
    "HalfCheetah-v4": dict(total_steps=3_000_000),
    "Acrobot-v1": dict(total_steps=500_000, eval_every=50_000, eval_episodes=100),
    "MountainCar-v0": dict(total_steps=200_000, eval_every=20_000, eval_episodes=100),
    "MountainCarContinuous-v0": dict(
        total_steps=200_000, gamma=0.999, log_std=0.5, eval_every=20_000, eval_episodes=100,
    ),
    # many updates, of one episode each
    "Pendulum-v1": dict(num_envs=1, gamma=0.95, eval_episodes=100),
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


def returns_to_go(reward: Tensor, alive: Tensor, tail: Tensor, gamma: float) -> Tensor:
    """R_t = r_t + gamma R_{t+1} (T, N) of one episode a column (S3 eq. 4); reward and alive (T, N).

    alive marks the episode's rows, the rest of a column is filling. tail (N,) stands for what a time limit
    cut off: the value of the state after the last row, 0 where the episode terminated or no value is known.
    """
    return_, running = torch.empty_like(reward), tail
    for t in reversed(range(len(reward))):
        return_[t] = running = torch.where(alive[t], reward[t] + gamma * running, running)
    return return_


def leave_one_out(numerator: Tensor, denominator: Tensor) -> Tensor:
    """For each of N episodes the ratio of the sums over all the others, 0 where those are 0 / 0; all (N,)."""
    others = 1 - torch.eye(len(numerator), dtype=numerator.dtype, device=numerator.device)
    # not the whole sum less its own: one dominant episode would leave nothing but rounding
    return (others @ numerator) / (others @ denominator.to(numerator)).clamp(
        min=torch.finfo(numerator.dtype).tiny
    )


def mean_baseline(return_: Tensor, alive: Tensor) -> Tensor:
    """For each episode the mean of the others' returns (N,); return_ and alive (T, N)."""
    return leave_one_out((return_ * alive).sum(0), alive.sum(0))


def optimal_baseline(score_sum: Callable, episodes: "Episodes", return_: Tensor, discount: Tensor) -> Tensor:
    """For each episode b* as the others estimate it (N,) (S3 Theorem 4.4); discount is (T, 1)."""
    x, y = [], []
    for i, rows in enumerate(episodes.alive.T):
        obs, action, weight = episodes.obs[rows, i], episodes.action[rows, i], discount[rows, 0]
        x.append(score_sum(obs, action, weight * return_[rows, i]))
        y.append(score_sum(obs, action, weight))
    return leave_one_out((torch.stack(x) * torch.stack(y)).sum(1), (torch.stack(y) ** 2).sum(1))


def policy_gradient(
    score_sum: Callable, episodes: "Episodes", return_: Tensor, value: Tensor, args: Args
) -> tuple[Tensor, Tensor]:
    """The estimate g (P,) of the module's docstring, and the advantages R - b (T, N) in it.

    score_sum(obs, action, weight) is sum_i weight_i grad log pi(a_i|s_i) (P,); return_ and value, V(obs), are
    (T, N).
    """
    alive = episodes.alive
    steps = torch.arange(len(alive), device=alive.device, dtype=return_.dtype)[:, None]
    discount = (args.gamma if args.discount_weight else 1.0) ** steps
    # total: all rows share the first one's return
    shared = slice(0, 1) if args.returns == "total" else slice(None)
    return_, value, counted = return_[shared], value[shared], alive[shared]
    if args.baseline == "none":
        baseline = torch.zeros_like(value)
    elif args.baseline == "mean":
        baseline = mean_baseline(return_, counted)
    elif args.baseline == "optimal":
        baseline = optimal_baseline(score_sum, episodes, return_.expand(alive.shape), discount)
    else:
        baseline = value
    advantage = (return_ - baseline).expand(alive.shape)
    weight = discount * advantage / alive.shape[1]
    return score_sum(episodes.obs[alive], episodes.action[alive], weight[alive]), advantage


# --- losses -------------------------------------------------------------------------------------------------


def outside(dist: Gaussian | Categorical) -> Tensor:
    """How far means lie outside [-1, 1], squared and summed over those dimensions in which all rows do; ().

    There nearly every sample is clipped to a bound in every state, so that no reward tells the policy to come
    back. Where some states are inside, the others may well want their bound, and nothing is added.
    """
    if isinstance(dist, Categorical):
        return dist.logits.new_zeros(())
    beyond = dist.mean.abs() - 1
    return ((beyond > 0).all(0) * beyond**2).sum(-1).mean()


def outside_gradient(forward: Callable, params: Tensor, obs: Tensor) -> Tensor:
    """The gradient (P,) of `outside` by the parameters, over a batch's observations."""
    return grad(lambda theta: outside(forward(theta, obs)[0]))(params)


def score_loss(params: Tensor, obs: Tensor, action: Tensor, weight: Tensor, forward: Callable) -> Tensor:
    """sum_i weight_i log pi(a_i|s_i), whose gradient is the score sum."""
    return (weight * forward(params, obs)[0].log_prob(action)).sum()


def scores(forward: Callable, params: Tensor, obs: Tensor, action: Tensor, weight: Tensor) -> Tensor:
    """sum_i weight_i grad log pi(a_i|s_i), (P,)."""
    return grad(score_loss)(params, obs, action, weight, forward)


def fit_loss(params: Tensor, obs: Tensor, return_: Tensor, real: Tensor, forward: Callable) -> Tensor:
    """Mean squared error of V to the returns over the rows that are real, 1 or 0, all (B, ...)."""
    return (real * (forward(params, obs)[1] - return_) ** 2).sum() / real.sum()


def fit_value(
    forward: Callable, params: Tensor, opt: Moments, obs: Tensor, return_: Tensor, real: Tensor,
    learning_rate: Tensor,
) -> tuple[Tensor, Moments, Tensor]:  # fmt: skip
    """A step of V towards the returns, a pure function: the new parameters and optimiser, and the loss."""
    gradient, loss = grad_and_value(fit_loss)(params, obs, return_, real, forward)
    params, opt = adam(params, gradient, opt, learning_rate)
    return params, opt, loss


def pieces(columns: tuple[Tensor, ...], size: int) -> Iterator[tuple[Tensor, ...]]:
    """Rows in pieces of `size`, the last one filled up with zeros: compiled code sees one shape."""
    missing = -len(columns[0]) % size
    padded = [torch.cat((column, column.new_zeros(missing, *column.shape[1:]))) for column in columns]
    return zip(*(column.split(size) for column in padded), strict=True)


def improve_value(
    fit: Callable, params: Tensor, opt: Moments, seen: "Episodes", return_: Tensor, value: Tensor, args: Args,
    generator: torch.Generator,
) -> tuple[Tensor, Moments, dict[str, Tensor]]:  # fmt: skip
    """Fit V to a batch's returns (T, N): the new parameters and optimiser, and metrics.

    value (T, N) is V before, whose errors say how much it foresaw; fit(params, opt, obs, return_, real,
    learning_rate) is one step, as `fit_value` takes it.
    """
    obs, return_, value = seen.obs[seen.alive], return_[seen.alive], value[seen.alive]
    unexplained = (return_ - value).var(correction=0) / (return_.var(correction=0) + 1e-8)
    learning_rate, losses = torch.tensor(args.value_learning_rate, device=obs.device), []
    for _ in range(args.value_epochs):
        order = torch.randperm(len(obs), generator=generator, device=obs.device)
        rows = obs[order], return_[order], torch.ones_like(return_)
        for piece in pieces(rows, args.minibatch_size):
            params, opt, loss = fit(params, opt, *piece, learning_rate)
            losses.append(loss)
    metrics = {"value_loss": torch.stack(losses).mean(), "explained_variance": 1 - unexplained}
    return params, opt, metrics


# --- the run ------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """What a run goes on from: everything that training changes, by name."""

    params: Tensor
    opt: Moments
    value_opt: Moments
    obs_stats: Stats
    return_stats: Stats
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


def policy_at(net: ActorCritic, obs_stats: Stats) -> Callable[[np.ndarray], Gaussian | Categorical]:
    """Observations (N, D) to the distribution of actions, by the parameters that are in `net`.

    Runs as it stands: a compiled call costs more than the few products of a single step.
    """
    device, seen = obs_stats["mean"].device, normalizer(obs_stats)

    def policy(obs: np.ndarray) -> Gaussian | Categorical:
        return net.policy(seen(torch.as_tensor(obs, device=device)))

    return policy


def credit(
    net: ActorCritic, episodes: Episodes, obs_stats: Stats, return_stats: Stats, args: Args
) -> tuple[Episodes, Tensor, Tensor, Tensor, Stats]:
    """Episodes as the networks see them, returns and V (T, N), their unit (), and the statistics with them.

    The unit is the standard deviation of the returns of earlier batches, which V is fitted in: with an
    episode's own return in it, a large one would count for less. The first batch has only its own.
    """
    unit, tail = return_scale(return_stats), torch.zeros_like(episodes.reward[0])
    seen = episodes._replace(obs=normalize(episodes.obs, obs_stats))
    value = unit * net.value(seen.obs)
    if args.baseline == "value":
        tail = unit * net.value(normalize(episodes.last_obs, obs_stats)) * episodes.truncated
    return_ = returns_to_go(episodes.reward, episodes.alive, tail, args.gamma)
    if args.scale_returns:
        first = return_stats["count"] == 0
        return_stats = update_stats(return_stats, return_[episodes.alive])
        unit = torch.where(first, return_scale(return_stats), unit)
    return seen, return_, value, unit, return_stats


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
        at_least_1=("minibatch_size", "value_epochs", "report_every", "hidden"),
        fractions=("gamma",),
        positive=("learning_rate", "value_learning_rate"),
        at_least_0=("bound_coef",),
        finite=("log_std",),
    )
    require(
        args.baseline not in ("mean", "optimal") or args.num_envs > 1,
        f"--num-envs must be at least 2, not {args.num_envs}: "
        f"--baseline {args.baseline} is taken from a batch's other episodes",
    )
    require(
        args.returns == "to-go" or not args.discount_weight,
        "--discount-weight goes with --returns to-go: the total return already discounts each reward",
    )


def train(args: Args) -> float:
    """Run REINFORCE; the mean return of the final evaluation."""
    check(args)
    args = replace(args)  # the caller's stay as they are
    device = setup(args.device, args.threads)
    envs = make_envs(args.env, args.num_envs, threads=args.env_threads)
    torch.manual_seed(generator_seed(args.seed, "network"))
    net = ActorCritic(envs, args.hidden, args.log_std, args.shared_network).to(device)
    params, unflatten = flatten(net)

    def forward(params, obs):
        return functional_call(net, unflatten(params), (obs,))

    compiled = (compile_function(partial(f, forward), device, args.compile) for f in (scores, fit_value))
    (piece_scores, fit), load = compiled, loader(net)

    def score_sum(params, *rows):
        return sum(piece_scores(params, *piece) for piece in pieces(rows, args.minibatch_size))

    run = Run(args, "reinforce", Evaluation(args, make_policy), engine=envs.engine)
    if envs.discrete or not envs.bounded.all():
        args.bound_coef = 0.0  # no bounds that a mean could leave
    generator = torch.Generator(device).manual_seed(generator_seed(args.seed, "noise"))
    obs_stats, return_stats = new_stats(envs.obs_dim, device=device), new_stats(device=device)
    state = run.restore(State(params, new_adam(params), new_adam(params), obs_stats, return_stats, generator))
    params, opt, value_opt, obs_stats, return_stats, generator = state
    load(params)

    while run.step < args.total_steps:
        step, ended, batches = run.step, [], []
        while step < min(run.step + args.report_every, args.total_steps):
            remaining = 1 - step / args.total_steps if args.anneal else 1.0
            learning_rate = torch.tensor(args.learning_rate * remaining, device=device)
            seeds = env_seeds(args.seed, "environments", args.num_envs, step)  # new episodes for every batch
            episodes, returns = collect_episodes(envs, seeds, policy_at(net, obs_stats), generator)
            seen, return_, value, unit, return_stats = credit(net, episodes, obs_stats, return_stats, args)
            gradient, advantage = policy_gradient(
                partial(score_sum, params), seen, return_ / unit, value / unit, args
            )
            if args.bound_coef:
                rows = seen.obs[seen.alive]
                gradient = gradient - args.bound_coef * outside_gradient(forward, params, rows)
            params, opt = adam(params, -gradient, opt, learning_rate)
            log = {"entropy": net.policy(seen.obs[seen.alive]).entropy().mean()}
            log |= {"grad_norm": gradient.norm(), "advantage_std": advantage[seen.alive].std(correction=0)}
            if args.baseline == "value":
                unit = return_scale(return_stats)  # the next batch's
                params, value_opt, metrics = improve_value(
                    fit, params, value_opt, seen, return_ / unit, value / unit, args, generator
                )
                log |= metrics
            if args.normalize_obs:
                obs_stats = update_stats(obs_stats, episodes.obs[seen.alive])
            load(params)
            batches.append(log)
            ended += returns
            step += int(seen.alive.sum())

        means = {name: torch.stack([log[name] for log in batches]).mean() for name in log}
        state = State(params, opt, value_opt, obs_stats, return_stats, generator)
        run.report(step, state, acting(state), means | {"learning_rate": learning_rate}, ended)
    envs.close()
    return run.finish(state, acting(state))


if __name__ == "__main__":
    main(Args, train, lambda env: SETTINGS.get(env, {}))
