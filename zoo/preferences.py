"""Deep reinforcement learning from preferences (Christiano et al. 2017, arXiv:1706.03741), one file.

No reward is given. A teacher (a function of the true reward, or a human in front of a web page) compares
short clips of what the agent does, an ensemble of reward networks r_m(s, a) is fitted to the comparisons, and
PPO is trained on their mean. With R_m(c) the sum of r_m over a clip c:

    P[c_1 > c_2] = exp R(c_1) / (exp R(c_1) + exp R(c_2))                    Bradley-Terry
    P[c_1 > ... > c_K] = prod_i exp R(c_i) / sum_{j >= i} exp R(c_j)         Plackett-Luce; K = 2: the same
    loss = -E[log((1 - e) P + e / K!)]      a share e of the answers is taken for chance; equal: half of each
    r_t  = mean_m (r_m(s_t, a_t) - mean r_m) / std r_m        over the steps of all clips compared so far

A share of the questions is about clips of the untrained policy, the others are asked at a falling rate while
it learns; of ten times as many those are asked whose answers the members disagree most about. The true
return is evaluated and logged, and nothing else is done with it. PPO is that of zoo/ppo.py.

Where an episode can end early the end itself says what is good: such tasks are refused, or played on until
their time limit (--fixed-horizon, see zoo/common/horizon.py). Teachers are those of B-Pref (Lee et al. 2021,
arXiv:2111.03026).

    python zoo/preferences.py --env Pendulum-v1
    python zoo/preferences.py --env HalfCheetah-v4 --labels 1400 --mistake 0.1
    python zoo/preferences.py --env Hopper-v4 --fixed-horizon
    python zoo/preferences.py --env HalfCheetah-v4 --labels 200 --ask human     then open the page it names
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.functional import leaky_relu, one_hot

from zoo.common.args import RunArgs, check_args, require
from zoo.common.ask import Human, Recorder
from zoo.common.cli import main
from zoo.common.device import compile_function, flatten, loader, scan, setup
from zoo.common.envs import VectorEnv, make_envs
from zoo.common.errors import RunFault
from zoo.common.evaluate import Evaluation, Policy
from zoo.common.horizon import early_end, fixed_horizon, time_limit
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
    kept: ClassVar = (
        *RunArgs.kept, "num_envs", "hidden", "shared_network", "log_std", "kl_coef", "num_steps", "labels",
        "clip_length", "ranked", "pool", "members", "reward_hidden", "ask", "fixed_horizon",
    )  # fmt: skip

    # preferences
    labels: int = 700  # most comparisons answered in a run; the last few fall due too late to be asked
    start: float = 0.25  # share of them before the policy learns; 1: all
    clip_length: int = 30  # steps of a clip; at most --num-steps, and no episode's end within
    ranked: int = 2  # clips in a comparison, ranked best first, K
    queries: Literal["disagreement", "random"] = "disagreement"  # which comparisons are asked
    drawn: int = 10  # comparisons drawn for each one that is asked, with disagreement
    pool: int = 32  # latest rollouts, of which clips are taken
    first: int = 4  # rollouts that the untrained policy plays before the first question
    ask_every: int = 10  # rollouts between questions, and between fits
    members: int = 3  # reward networks
    reward_hidden: tuple[int, ...] = (64, 64)  # widths of their leaky ReLU layers
    reward_learning_rate: float = 1e-3  # Adam's, of the reward networks; falls as PPO's does
    reward_batch: int = 32  # comparisons in a gradient step of theirs
    reward_passes: int = 200  # how many times as many comparisons are learned from as were answered since
    error_model: float = 0.1  # share of the answers that the loss takes for chance, e
    pessimism: float = 0.0  # standard deviations between members that are taken off the predicted reward
    fixed_horizon: bool = False  # go on after an early end, until the time limit
    # the teacher
    ask: Literal["teacher", "human"] = "teacher"  # who answers: the true reward, or someone at a web page
    port: int = 8000  # of that page, on this machine only; 0: any that is free
    rationality: float | None = None  # answers by Boltzmann's law with this factor on returns; None: exact
    mistake: float = 0.0  # share of answers that are turned round
    myopia: float = 1.0  # factor on a reward for each step that comes after it in the clip; 1: none
    skip: float = 0.0  # no answer where all returns are below this share of the mean one; 0: always one
    equal: float = 0.0  # "equal" where returns differ by at most this share of the mean one
    # PPO
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
    # what keeps the new policy near the old one
    surrogate: Literal["clip", "kl", "adaptive-kl", "unclipped"] = "clip"
    clip: float = 0.2  # eps of the clipped surrogate
    kl_coef: float = 1.0  # beta of the kl surrogates (where adaptive-kl starts)
    # ends an update's epochs when the KL exceeds it; adaptive-kl's target (0.01 if not given)
    target_kl: float | None = None
    value_clip: float | None = None  # keep V within this of its old value in the loss
    value_coef: float = 0.25  # weight of the value loss, c1
    entropy_coef: float = 0.0  # weight of the entropy bonus, c2
    bound_coef: float = 1.0  # weight of a penalty on means outside the bounds in all states of a minibatch
    max_grad_norm: float = 0.5  # the gradient is scaled down to this norm
    hidden: tuple[int, ...] = (64, 64)  # widths of the tanh layers
    shared_network: bool = False  # one trunk for policy and value instead of two
    # initial log standard deviation of a Gaussian policy, in units of half the action range
    log_std: float = -1.0
    normalize_obs: bool = True  # observations by their running mean and standard deviation
    scale_rewards: bool = True  # rewards by the running standard deviation of the discounted return


# What differs by task: PPO's settings. A flag wins over it. Everything else runs on the defaults above.
SETTINGS: dict[str, dict] = {
    "CartPole-v1": dict(
        total_steps=100_000, num_envs=32, num_steps=32, minibatch_size=256, learning_rate=2e-3,
        recompute_advantages=False, normalize_advantages=True, normalize_obs=False, eval_every=20_000,
    ),
    "Pendulum-v1": dict(
        total_steps=100_000, num_envs=8, num_steps=128, num_epochs=20, learning_rate=1e-3, gamma=0.98,
        log_std=-0.5, eval_every=20_000, eval_episodes=100, ask_every=2, reward_passes=60,
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


class RewardEnsemble(nn.Module):
    """x (M, B, F) -> rewards (M, B): M networks, each layer of all of them one batched product."""

    def __init__(self, inputs: int, hidden: tuple[int, ...], members: int):
        super().__init__()
        pairs = list(pairwise((inputs, *hidden, 1)))
        # U(-1, 1) / sqrt(inputs), as nn.Linear
        self.weights = nn.ParameterList([(2 * torch.rand(members, i, o) - 1) * i**-0.5 for i, o in pairs])
        self.biases = nn.ParameterList([(2 * torch.rand(members, 1, o) - 1) * i**-0.5 for i, o in pairs])

    def forward(self, x: Tensor) -> Tensor:
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.bmm(leaky_relu(x) if i else x, weight) + bias
        return x.squeeze(-1)


def reward_inputs(envs: VectorEnv, obs: Tensor, action: Tensor, obs_stats: Stats) -> Tensor:
    """What reward networks read (..., F): the normalised observation, and the action as it is carried out.

    A bounded action is clipped as the environment will: beyond the bounds there is nothing to prefer.
    """
    if envs.discrete:
        acts = one_hot(action, envs.action_dim).float()
    else:
        limit = torch.as_tensor(np.where(envs.bounded, 1.0, np.inf), dtype=action.dtype, device=action.device)
        acts = action.clamp(-limit, limit)
    return torch.cat((normalize(obs, obs_stats), acts), -1)


# --- clips and questions ------------------------------------------------------------------------------------


class Pool(NamedTuple):
    """The latest P rollouts, which clips are taken from, (P, T, N, ...) each; the last one is the newest."""

    obs: Tensor
    action: Tensor
    reward: Tensor  # the true one: what a simulated teacher goes by, and nobody else
    ended: Tensor
    picture: Tensor  # the simulator's state, to draw it by; of size 0 unless a human is asked


class Clips(NamedTuple):
    """C clips of L steps, (C, L, ...) each."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    picture: Tensor


class Comparisons(NamedTuple):
    """The answers so far: the first `answered` of as many rows as there will be labels."""

    obs: Tensor  # (labels, K, L, D)
    action: Tensor  # (labels, K, L, ...)
    first: Tensor  # (labels,) how sure it is that the clips stand in their order of merit: 1; 0.5: equal
    weight: Tensor  # (M, labels) how often a comparison is in a member's bootstrap sample
    answered: int


def clip_starts(ended: Tensor, length: int) -> Tensor:
    """Where clips may begin, (P, T - L + 1, N) bool of (P, T, N): no episode ends before their last step."""
    ends = torch.cat((torch.zeros_like(ended[:, :1], dtype=torch.int64), ended.long().cumsum(1)), 1)
    return ends[:, length - 1 : -1] == ends[:, : ends.shape[1] - length]


def draw_clips(pool: Pool, count: int, length: int, generator: torch.Generator) -> Clips:
    """Up to `count` different clips of the pool, all equally likely."""
    places = clip_starts(pool.ended, length).nonzero()
    if len(places) < 2:
        raise RunFault(f"no two clips of {length} steps lie within episodes; try a smaller --clip-length")
    chosen = torch.randperm(len(places), generator=generator, device=places.device)[:count]
    rollout, start, env = places[chosen].T
    steps = start[:, None] + torch.arange(length, device=places.device)
    columns = (pool.obs, pool.action, pool.reward, pool.picture)
    return Clips(*(column[rollout[:, None], steps, env[:, None]] for column in columns))


def disagreement(score: Tensor) -> Tensor:
    """How much members disagree (Q,) on comparisons, by the clips' predicted returns (M, Q, K).

    The variance over members of P[c_i > c_j], the mean over the pairs of a comparison.
    """
    better, worse = torch.triu_indices(score.shape[-1], score.shape[-1], 1, device=score.device)
    return (score[..., better] - score[..., worse]).sigmoid().var(0, unbiased=False).mean(-1)


def draw_questions(
    score: Tensor | None, clips: int, count: int, args: Args, generator: torch.Generator
) -> Tensor:
    """Which clips to compare, indices (count, K), different ones within a comparison.

    score (M, C) are the members' returns of C = clips, None before there are any: then chance alone chooses.
    """
    device = generator.device
    several = args.drawn if score is not None and args.queries == "disagreement" else 1
    drawn = torch.rand(count * several, clips, generator=generator, device=device).topk(args.ranked).indices
    if score is None or several == 1:
        return drawn
    return drawn[disagreement(score[:, drawn]).topk(count).indices]


def labels_due(args: Args, step: int) -> int:
    """How many answers there should be after this many steps.

    A share `start` from the first question on; the others at a rate that falls as 1 / (1 + 4 x), x the share
    of the run that is over, to a fifth at its end. All are due when it is over: the last few fall due after
    the last question and are never asked, unless start is 1.
    """
    begin = max(1, round(args.start * args.labels))
    share = math.log1p(4 * min(1.0, step / args.total_steps)) / math.log(5)
    return begin + int((args.labels - begin) * share)


class Answers(NamedTuple):
    """What a teacher says of Q comparisons."""

    order: Tensor  # (Q, K) the clips, best first
    equal: Tensor  # (Q,) bool: no preference
    skipped: Tensor  # (Q,) bool: no answer


def teach(reward: Tensor, mean: Tensor, args: Args, generator: torch.Generator) -> Answers:
    """A simulated teacher's answers by the true rewards (Q, K, L) (B-Pref, section 3).

    mean () is a clip's mean return at present, which the thresholds of skipping and of "equal" are shares of.
    B-Pref's returns are positive; of a negative one a share s is read as |mean| (1 - s) below the mean.
    Ranking by utilities with Gumbel noise is to draw from Plackett-Luce; for K = 2 from Bradley-Terry.
    """
    returns = reward.sum(-1)
    best, worst = returns.max(-1).values, returns.min(-1).values
    skipped = (best <= mean - (1 - args.skip) * mean.abs()) & (args.skip > 0)
    equal = (best - worst <= args.equal * mean.abs()) & (args.ranked == 2)
    ahead = torch.arange(reward.shape[-1] - 1, -1, -1, device=reward.device)
    utility = (reward * args.myopia**ahead).sum(-1)
    if args.rationality is not None:
        gumbel = -torch.empty_like(utility).exponential_(generator=generator).log()
        utility = args.rationality * utility + gumbel
    order = utility.sort(stable=True, dim=-1, descending=True).indices
    wrong = torch.rand(len(order), generator=generator, device=order.device) < args.mistake
    return Answers(torch.where(wrong[:, None], order.flip(-1), order), equal, skipped)


def add_answers(
    known: Comparisons, obs: Tensor, action: Tensor, first: Tensor, generator: torch.Generator
) -> Comparisons:
    """The comparisons with Q more: obs and action (Q, K, L, ...), first (Q,). Beyond `labels` none is kept.

    How often each is in a member's bootstrap sample is drawn here: of a growing list, by Poisson's law.
    """
    rows = slice(known.answered, known.answered + len(first))
    room = len(known.first[rows])
    columns = {name: column.clone() for name, column in known._asdict().items() if name != "answered"}
    new = known._replace(**columns, answered=known.answered + room)
    new.obs[rows], new.action[rows], new.first[rows] = obs[:room], action[:room], first[:room]
    new.weight[:, rows] = torch.poisson(torch.ones_like(new.weight[:, rows]), generator)
    return new


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


def predicted_reward(reward: Tensor, mean: Tensor, std: Tensor, pessimism: float) -> Tensor:
    """What PPO is paid (B,) by the members' rewards (M, B): each normalised by its own mean and std (M,),
    their mean, less `pessimism` times the standard deviation between them.
    """
    normal = (reward - mean[:, None]) / std[:, None]
    return normal.mean(0) - pessimism * normal.std(0, unbiased=False)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, of all elements of two tensors, (); 0 where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    return (a * b).mean() / ((a**2).mean() * (b**2).mean()).sqrt().clamp(min=1e-12)


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


def ranking_log_prob(score: Tensor) -> Tensor:
    """log P[c_1 > ... > c_K] (...) by Plackett and Luce of returns (..., K); of two Bradley-Terry's."""
    chosen = [score[..., i] - score[..., i:].logsumexp(-1) for i in range(score.shape[-1] - 1)]
    return torch.stack(chosen).sum(0)


def preference_loss(score: Tensor, first: Tensor, error: float) -> Tensor:
    """-log of the probability of answers, (...), by returns (..., K), K >= 2, with a share `error` of chance.

    first (...): how sure it is that the clips stand best first, as against worst first; 0.5: they are equal.
    """
    chance = math.log(error / math.factorial(score.shape[-1])) if error > 0 else -math.inf

    def log_prob(score: Tensor) -> Tensor:
        exact = ranking_log_prob(score)
        if error == 0:
            return exact
        return torch.logaddexp(exact + math.log1p(-error), torch.full_like(exact, chance))

    return -(first * log_prob(score) + (1 - first) * log_prob(score.flip(-1)))


def reward_loss(
    params: Tensor, x: Tensor, first: Tensor, forward, error: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The members' losses, summed, of a minibatch each: x (M, B, K, L, F), first (M, B); what to log."""
    score = forward(params, x.flatten(1, 3)).view(x.shape[:4]).sum(-1)
    loss = preference_loss(score, first, error)
    right, sided = (score[..., 0] - score[..., -1]) * (first - 0.5) > 0, first != 0.5
    accuracy = right.float().sum() / sided.float().sum().clamp(min=1)
    metrics = {"reward_loss": loss.mean(), "reward_accuracy": accuracy}
    return loss.mean(1).sum(), metrics


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


class RewardModel(NamedTuple):
    """The ensemble's parameters and Adam's state; the mean and std (M,) of its members' rewards."""

    params: Tensor
    opt: Moments
    mean: Tensor
    std: Tensor


def fit(
    forward: Callable, args: Args, params: Tensor, opt: Moments, x: Tensor, first: Tensor, order: Tensor,
    learning_rate: Tensor,
) -> tuple[Tensor, Moments, dict[str, Tensor]]:  # fmt: skip
    """A step for each minibatch of comparisons in this order (S, M, B); x (labels, K, L, F), first (labels,).

    Each member has minibatches of its own; metrics are means over all.
    """

    def step(carry, chosen):
        params, opt = carry
        grad, (_, metrics) = grad_and_value(reward_loss, has_aux=True)(
            params, x[chosen], first[chosen], forward, args.error_model
        )
        params, opt = adam(params, grad, opt, learning_rate)
        return (params, opt), metrics

    (params, opt), metrics = scan(step, (params, opt), order)
    return params, opt, {name: column.mean() for name, column in metrics.items()}


FIT_STEPS = 25  # gradient steps in one call of `fit`, whose loop has a fixed length


def refit(
    model: RewardModel, known: Comparisons, new: int, x: Tensor, remaining: float, fit: Callable,
    rewards: Callable, args: Args, generator: torch.Generator,
) -> tuple[RewardModel, dict[str, Tensor]]:  # fmt: skip
    """The model after learning from all comparisons, for as long as `new` more of them are worth.

    x (labels, K, L, F) are the comparisons as the networks read them, `remaining` is a factor on the learning
    rate, `fit` is the above, compiled, and rewards(model, x) are the members' (M, B).
    """
    params, opt = model.params, model.opt
    learning_rate = torch.tensor(args.reward_learning_rate * remaining, device=params.device)
    weight = known.weight[:, : known.answered] + 1e-6  # a member's sample may be empty at first
    size, metrics = (FIT_STEPS, args.members, args.reward_batch), {}
    for _ in range(math.ceil(new * args.reward_passes / (FIT_STEPS * args.reward_batch))):
        drawn = torch.multinomial(weight, FIT_STEPS * args.reward_batch, True, generator=generator)
        order = drawn.view(args.members, FIT_STEPS, -1).transpose(0, 1).reshape(size)
        params, opt, metrics = fit(params, opt, x, known.first, order, learning_rate)
    model = model._replace(params=params, opt=opt)
    reward = rewards(model, x[: known.answered].flatten(0, 2))
    return model._replace(mean=reward.mean(1), std=reward.std(1).clamp(min=1e-6)), metrics


# --- the run ------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """What a run goes on from: everything that training changes, by name."""

    params: Tensor
    opt: Moments
    obs_stats: Stats
    return_stats: Stats
    kl_coef: Tensor
    generator: torch.Generator
    model: RewardModel
    known: Comparisons
    pool: Pool
    asking: torch.Generator  # of clips, questions, the teacher, and the reward model's minibatches


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


def nothing_yet(
    args: Args, envs: VectorEnv, reward_params: Tensor, pictured: int
) -> tuple[RewardModel, Comparisons, Pool]:
    """What a run begins with. pictured: numbers in a state of the simulator, 0 where nothing is drawn."""
    zeros = partial(torch.zeros, device=reward_params.device)
    members = zeros(args.members)
    model = RewardModel(reward_params, new_adam(reward_params), members, torch.ones_like(members))
    obs_type = torch.as_tensor(np.zeros(0, envs.dtype)).dtype
    action_type = torch.int64 if envs.discrete else torch.float32
    each = () if envs.discrete else (envs.action_dim,)

    def columns(*rows: int) -> tuple[Tensor, Tensor]:
        return zeros(*rows, envs.obs_dim, dtype=obs_type), zeros(*rows, *each, dtype=action_type)

    compared, weight = columns(args.labels, args.ranked, args.clip_length), zeros(args.members, args.labels)
    known = Comparisons(*compared, zeros(args.labels), weight, 0)
    steps = (args.pool, args.num_steps, args.num_envs)
    ended, picture = zeros(*steps, dtype=torch.bool), zeros(*steps, pictured, dtype=torch.float64)
    return model, known, Pool(*columns(*steps), zeros(*steps), ended, picture)


def into_pool(pool: Pool, rollout: Rollout, picture: np.ndarray) -> Pool:
    """The pool with a rollout in it, in place of the oldest."""
    ended = rollout.terminated | rollout.truncated
    drawn = torch.as_tensor(picture, device=ended.device)
    new = (rollout.obs, rollout.action, rollout.reward, ended, drawn)
    return Pool(*(torch.cat((old[1:], latest[None])) for old, latest in zip(pool, new, strict=True)))


def ask(
    due: int, begin: int, pool: Pool, known: Comparisons, returns: Callable[[Clips], Tensor] | None,
    human: Human | None, args: Args, generator: torch.Generator,
) -> Comparisons:  # fmt: skip
    """Ask about clips of the pool until `due` answers are known; the comparisons with those that came.

    returns(clips) are the members' predictions (M, C), None before there is anything to predict from. A human
    answers later, while training goes on; but until `begin` answers are there nothing can be learned, and
    they are waited for.
    """
    while True:
        wanted = due - known.answered
        if human is not None:
            wanted = min(wanted - human.waiting, human.room)
        if wanted > 0:
            several = args.drawn if returns is not None and args.queries == "disagreement" else 1
            clips = draw_clips(pool, wanted * several * args.ranked, args.clip_length, generator)
            if len(clips.obs) < args.ranked:
                told = f"no {args.ranked} clips of {args.clip_length} steps lie within episodes"
                raise RunFault(f"{told}: choose a smaller --clip-length")
            score = returns(clips) if returns is not None else None
            index = draw_questions(score, len(clips.obs), wanted, args, generator)
            if human is not None:
                human.ask(clips.obs[index], clips.action[index], clips.picture[index])
            else:
                reward = clips.reward.double()
                answers = teach(reward[index], reward.sum(-1).mean(), args, generator)
                index = index.gather(1, answers.order)[~answers.skipped]
                first = torch.where(answers.equal, 0.5, 1.0)[~answers.skipped]
                known = add_answers(known, clips.obs[index], clips.action[index], first, generator)
        if human is None:
            return known
        for obs, action, sure in human.answers(known.answered):
            known = add_answers(known, obs[None], action[None], sure[None], generator)
        if known.answered >= begin or not human.wait(known.answered):
            return known


def check(args: Args) -> None:
    """Refuse arguments that cannot work together."""
    check_args(
        args,
        at_least_1=(
            "num_steps", "num_epochs", "minibatch_size", "hidden", "labels", "clip_length", "drawn", "pool",
            "first", "ask_every", "members", "reward_hidden", "reward_batch", "reward_passes",
        ),
        fractions=("gamma", "gae_lambda", "start", "error_model", "mistake", "myopia", "skip", "equal"),
        positive=(
            "learning_rate", "clip", "max_grad_norm", "target_kl", "value_clip", "reward_learning_rate",
            "rationality",
        ),
        at_least_0=("kl_coef", "value_coef", "entropy_coef", "bound_coef", "pessimism"),
        finite=("log_std",),
    )  # fmt: skip
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
    require(args.ranked >= 2, f"--ranked must be at least 2, a comparison's clips, not {args.ranked}")
    require(
        args.clip_length <= args.num_steps,
        f"--clip-length {args.clip_length} is longer than a rollout: --num-steps {args.num_steps}",
    )
    # side by side in a rollout; in the whole run, and in what is played before the first questions
    clips = args.num_envs * (args.num_steps // args.clip_length)
    rollouts = -(-args.total_steps // batch)
    needed, there = args.labels * args.ranked, rollouts * clips
    require(
        needed <= there,
        f"--labels {args.labels} need {needed:,} clips of {args.clip_length} steps (--clip-length), and in "
        f"{args.total_steps:,} steps (--total-steps) there are {there:,}",
    )
    begin, most = max(1, round(args.start * args.labels)), math.comb(args.first * clips, args.ranked)
    require(
        begin <= most,
        f"--labels {args.labels}: {begin} of them (--start {args.start:g}) are asked about the clips of the "
        f"first {args.first} rollouts (--first), of which no more than {most:,} comparisons can be made",
    )
    require(
        args.first <= args.pool,
        f"--first {args.first} rollouts are played before the first question, but --pool {args.pool} kept",
    )
    require(
        args.first <= rollouts,
        f"--first {args.first} rollouts of {batch:,} steps are played before the first question, and "
        f"--total-steps {args.total_steps} hold {rollouts}",
    )
    require(args.error_model < 1, "--error-model must be below 1: answers that are all chance teach nothing")
    require(
        args.pessimism == 0 or args.members > 1,
        f"--pessimism {args.pessimism:g}: a single one of --members disagrees with nobody",
    )
    require(
        args.queries == "random" or args.members > 1,
        "--members 1: there is nobody to disagree with (--queries disagreement); --queries random is meant",
    )
    require(
        args.ranked == 2 or args.equal == 0,
        f"--equal {args.equal:g} needs --ranked 2, not {args.ranked}: in a ranking no clips are called equal",
    )
    if args.ask == "human":
        require(args.ranked == 2, f"--ask human compares two clips: --ranked must be 2, not {args.ranked}")
        require(0 <= args.port < 2**16, f"--port must lie in [0, 65535], not {args.port}")
        for name, nothing in dict(rationality=None, mistake=0, myopia=1, skip=0, equal=0).items():
            value = getattr(args, name)
            require(value == nothing, f"--{name} {value} is of a simulated teacher, not of --ask human")


def check_task(args: Args, played: str) -> None:
    """Refuse a task on which clips do not fit, or whose episodes end early."""
    limit = time_limit(played)
    require(
        args.clip_length <= limit,
        f"--clip-length {args.clip_length} is longer than an episode of {args.env}: {limit:g} steps",
    )
    ended = early_end(played, args.seed)
    require(
        ended is None,
        f"--env {args.env}: its episodes can end early (one did in step {ended} of random play), and "
        "when they do tells what is good without any preference; --fixed-horizon plays on to the time limit",
    )


def train(args: Args) -> float:
    """Run PPO on the rewards learned; the mean true return of the final evaluation."""
    check(args)
    args = dataclasses.replace(args)  # the caller's stay as they are
    device = setup(args.device, args.threads)
    played = fixed_horizon(args.env) if args.fixed_horizon else args.env
    check_task(args, played)
    with contextlib.ExitStack() as open_:
        human = None
        if args.ask == "human":
            human = open_.enter_context(Human(played, args.port))
            # answers cost more than writing
            args = dataclasses.replace(args, checkpoint_every=min(args.checkpoint_every, 1e-3))
        envs = open_.enter_context(make_envs(played, args.num_envs, threads=args.env_threads))
        return train_on_preferences(args, device, envs, played, human)


def train_on_preferences(
    args: Args, device: torch.device, envs: VectorEnv, played: str, human: Human | None
) -> float:
    """The run itself, on the task `played`."""
    torch.manual_seed(generator_seed(args.seed, "network"))
    net = ActorCritic(envs, args.hidden, args.log_std, args.shared_network).to(device)
    params, unflatten = flatten(net)
    ensemble = RewardEnsemble(envs.obs_dim + envs.action_dim, args.reward_hidden, args.members).to(device)
    reward_params, unflatten_rewards = flatten(ensemble)

    def forward(params, obs):
        return functional_call(net, unflatten(params), (obs,))

    def reward_forward(params, x):
        return functional_call(ensemble, unflatten_rewards(params), (x,))

    def rewards(model: RewardModel, x: Tensor) -> Tensor:
        """The members' rewards (M, B) of x (B, F)."""
        load_rewards(model.params)
        return ensemble(x.expand(args.members, -1, -1))

    load, load_rewards = loader(net), loader(ensemble)
    improve_compiled = compile_function(partial(improve, forward, args), device, args.compile)
    fit_compiled = compile_function(partial(fit, reward_forward, args), device, args.compile)
    evaluation = Evaluation(dataclasses.replace(args, env=played), make_policy)
    run = Run(args, "preferences", evaluation, engine=envs.engine)
    if envs.discrete or not envs.bounded.all():
        args.bound_coef = 0.0  # no bounds that a mean could leave
    generator = torch.Generator(device).manual_seed(generator_seed(args.seed, "noise"))
    asking = torch.Generator(device).manual_seed(generator_seed(args.seed, "preferences"))
    obs_stats, return_stats = new_stats(envs.obs_dim, device=device), new_stats(device=device)
    kl_coef = torch.tensor(args.kl_coef, device=device)
    watched: Any = Recorder(envs, human is not None)  # environments to `collect`
    model, known, pool = nothing_yet(args, envs, reward_params, watched.size)
    state = run.restore(
        State(
            params, new_adam(params), obs_stats, return_stats, kl_coef, generator, model, known, pool, asking
        )
    )
    params, opt, obs_stats, return_stats, kl_coef, generator, model, known, pool, asking = state
    load(params)
    if human is not None:
        if not args.resume:
            run.save(state)  # for the answers that come before the first report
        human.begin(run.folder, args.labels)
    # a resumed run begins new episodes
    obs = envs.reset(env_seeds(args.seed, "environments", args.num_envs, run.step))
    sums = torch.zeros(args.num_envs, device=device)
    # epochs between which nothing has to be looked at are made in one call
    at_once = 1 if args.recompute_advantages or args.target_kl is not None else args.num_epochs
    begin, length = max(1, round(args.start * args.labels)), args.clip_length

    while run.step < args.total_steps:
        remaining = 1 - run.step / args.total_steps if args.anneal else 1.0
        learning_rate = torch.tensor(args.learning_rate * remaining, device=device)
        noise = draw_noise(envs, args.num_steps, args.num_envs, generator=generator)
        rollout, obs, episodes = collect(watched, obs, policy_at(net, obs_stats), noise)
        if rollout.terminated.any():
            told = f"an episode of {args.env} ended early, which says what is good without any preference"
            raise RunFault(f"{told}; --fixed-horizon plays on until the time limit")
        step = run.step + rollout.reward.numel()
        pool = into_pool(pool, rollout, watched.taken())
        rollouts = step // rollout.reward.numel()
        log: dict[str, float | Tensor] = {}
        inputs = partial(reward_inputs, envs, obs_stats=obs_stats)
        if rollouts >= args.first and (
            known.answered < begin or (rollouts - args.first) % args.ask_every == 0
        ):
            fitted = known.answered if known.answered >= begin else 0

            def returns(clips: Clips, inputs=inputs, model=model) -> Tensor:
                x = inputs(clips.obs, clips.action).flatten(0, 1)
                return rewards(model, x).unflatten(1, (-1, length)).sum(-1)

            due = labels_due(args, run.step)
            there = Pool(*(column[-rollouts:] for column in pool))  # it is not full at first
            known = ask(due, begin, there, known, returns if fitted else None, human, args, asking)
            if known.answered >= begin and known.answered > fitted:
                x = inputs(known.obs, known.action)
                new = known.answered - fitted
                model, fitting = refit(model, known, new, x, remaining, fit_compiled, rewards, args, asking)
                log |= fitting
        log["labels"] = known.answered
        if known.answered < begin:  # nobody has said yet what is good
            if args.normalize_obs:
                obs_stats = update_stats(obs_stats, rollout.obs.flatten(0, 1))
            state = state._replace(obs_stats=obs_stats, known=known, pool=pool)
            run.report(step, state, acting(state), log, episodes)
            continue

        reward = rewards(model, inputs(rollout.obs, rollout.action).flatten(0, 1))
        paid = predicted_reward(reward, model.mean, model.std, args.pessimism).view_as(rollout.reward)
        log |= {"predicted_reward": paid.mean(), "reward_correlation": correlation(paid, rollout.reward)}
        rollout = rollout._replace(reward=paid)  # from here on the true reward is gone
        seen, obs_stats, return_stats, sums = as_seen(rollout, obs_stats, return_stats, sums, args)
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

        log |= {name: torch.stack([metrics[name] for metrics in epochs]).mean() for name in metrics}
        log |= {"approx_kl": kl, "explained_variance": explained_variance, "kl_coef": kl_coef}
        log |= {"epochs": len(epochs) * at_once, "learning_rate": learning_rate}
        state = State(params, opt, obs_stats, return_stats, kl_coef, generator, model, known, pool, asking)
        run.report(step, state, acting(state), log, episodes)
    return run.finish(state, acting(state))


if __name__ == "__main__":
    main(Args, train, lambda env: SETTINGS.get(env, {}))
