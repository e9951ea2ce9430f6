"""Preferences for a diffusion model: Diffusion-DPO (Wallace et al. 2023, arXiv:2311.12908) and relatives, one
file.

Pairs of samples x^w, x^l of which one was preferred teach a pretrained model directly, as DPO
(arXiv:2305.18290) does: a loss makes the implicit reward beta log(pi / pi_ref) explain the preferences. How
likely a model makes an x_0 is not known, only how likely it makes a chain, and there the four differ. With
L_t(x) = log(pi / pi_ref)(x_{t-1} | x_t):

    trajectory  -log sigmoid(beta (sum_t L_t(x^w) - sum_t L_t(x^l)))        the chains that made the samples
    d3po        -log sigmoid(beta T (L_t(x^w) - L_t(x^l)))                  each step alone (arXiv:2311.13231,
                                                                     whose beta is beta T here)
    standard    -log sigmoid(-beta T w_t (D_t(x^w) - D_t(x^l)))             S0 (33): samples noised anew
                D_t = |eps - eps_theta|^2 - |eps - eps_ref|^2        -w_t D_t is L_t's mean under q where w_t
                                                                     is the VLB's weight
    notes35     beta SG[sigmoid(R_l - R_w)] (|x^w_{t-1} - mu|^2 - |x^l_{t-1} - mu|^2) / 2 sigma_t^2
                R = beta |mu - mu_ref|^2 / 2 sigma_t^2                      S0 (35), a negative result

The last is S0's correction of (33). Its R does not depend on what was preferred, so that its weight does not
fall when the pairs are explained, and mu drifts for ever. The pairs come from the reference and a
Bradley-Terry model of the task's reward: the best x_0 is the tilt p_ref exp(r / beta) / Z, known exactly on
the tasks `line` and `ring`.

    python zoo/diffusion_dpo.py                         S0 (33), the VLB's weights, noise shared by the pair
    python zoo/diffusion_dpo.py --loss trajectory --total-steps 81920   the log-ratio of whole chains
    python zoo/diffusion_dpo.py --loss notes35                         its path KL leaves all bounds
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.functional import logsigmoid

from zoo.common.args import RunArgs, check_args, require
from zoo.common.cli import main
from zoo.common.device import compile_function, flatten, setup
from zoo.common.diffusion import Schedule, cosine_schedule
from zoo.common.optim import adam, clip_grad, new_adam
from zoo.common.run import Run
from zoo.common.seeding import generator_seed
from zoo.common.targets import Target, make_evaluation, make_target


@dataclass
class Args(RunArgs):
    kept: ClassVar = (
        *RunArgs.kept, "hidden", "steps", "eta", "min_sigma", "predict", "pretrain_steps", "num_pairs",
    )  # fmt: skip
    idle: ClassVar = ("num_envs", "env_threads", "eval_episodes")

    env: str = "line"  # the task: line or ring (exact), digits
    total_steps: int = 256_000  # pairs of the whole run, with repetitions
    eval_every: int = 25_600  # pairs between evaluations; 0: at the end only
    loss: Literal["standard", "trajectory", "d3po", "notes35"] = "standard"  # see above
    beta: float = 0.5  # temperature of the implicit reward
    num_pairs: int = 20_000  # pairs that there are
    batch_size: int = 256  # pairs in a gradient step
    draws: int = 8  # steps t of each pair in it; --loss trajectory has them all
    shared_noise: bool = True  # the same noise on both samples of a pair, with --loss standard
    weight: Literal["vlb", "constant"] = "vlb"  # w_t of --loss standard; constant: their mean
    learning_rate: float = 1e-3  # Adam's
    anneal: bool = True  # let the learning rate fall linearly to 0 over the run
    max_grad_norm: float = 1.0  # the gradient is scaled down to this norm
    # what the network says: the noise, the velocity eps - x_0 (not the v of Salimans & Ho 2022), or the score
    predict: Literal["eps", "v", "score"] = "eps"
    steps: int = 20  # denoising steps, T
    eta: float = 1.0  # noise of the sampling steps: 1 DDPM's, towards 0 DDIM's
    min_sigma: float = 0.05  # least standard deviation of a sampling step
    hidden: tuple[int, ...] = (64, 64, 64)  # widths of the SiLU layers
    pretrain_steps: int = 4000  # gradient steps of pretraining
    pretrain_batch: int = 256  # data points in each
    pretrain_rate: float = 3e-3  # its Adam's learning rate, falling linearly to 0


# What differs by task; a flag wins over it. Everything else runs on the defaults above.
SETTINGS: dict[str, dict] = {"ring": dict(beta=0.2)}


# --- the denoiser -------------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """x_t (B, d), t (B,) of 1 .. T, context (B,) -> what --predict names (B, d)."""

    time: Tensor
    one_hot: Tensor

    def __init__(self, dim: int, contexts: int, steps: int, hidden: tuple[int, ...]):
        super().__init__()
        angle = torch.linspace(0, torch.pi, steps + 1)[:, None] * 2.0 ** torch.arange(4)
        self.register_buffer("time", angle, persistent=False)
        self.register_buffer("one_hot", torch.eye(contexts), persistent=False)
        widths = (dim + 8 + contexts, *hidden)
        layers = [m for i, o in zip(widths, hidden, strict=False) for m in (nn.Linear(i, o), nn.SiLU())]
        self.net = nn.Sequential(*layers, nn.Linear(hidden[-1], dim))

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        angle = self.time[t]
        return self.net(torch.cat((x, angle.sin(), angle.cos(), self.one_hot[context]), -1))


def split(output: Tensor, x: Tensor, signal: Tensor, noise: Tensor, predict: str) -> tuple[Tensor, Tensor]:
    """x_0 and eps (B, d) with x = signal x_0 + noise eps, from a network's output (B, d); signal, noise (B,
    1).
    """
    if predict == "v":  # the rectified flow's velocity, eps - x_0
        x0 = (x - noise * output) / (signal + noise)
        return x0, x0 + output
    eps = output if predict == "eps" else -noise * output
    return (x - noise * eps) / signal, eps


def step_mean(output: Tensor, x: Tensor, t: Tensor, schedule: Schedule, predict: str) -> Tensor:
    """mu (B, d) of the step from t to t - 1 (DDIM, arXiv:2010.02502, eq. 12); x (B, d), t (B,)."""
    x0, eps = split(output, x, schedule.signal[t, None], schedule.noise[t, None], predict)
    rest = (schedule.noise[t - 1, None] ** 2 - schedule.sigma[t, None] ** 2).clamp(min=0).sqrt()
    return schedule.signal[t - 1, None] * x0 + rest * eps


def make_mean(net: nn.Module, unflatten: Callable, schedule: Schedule, predict: str) -> Callable[..., Tensor]:
    """mean(params, x (B, d), t (B,), context (B,)) -> mu (B, d), a pure function."""

    def mean(params: Tensor, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return step_mean(functional_call(net, unflatten(params), (x, t, context)), x, t, schedule, predict)

    return mean


# --- chains -------------------------------------------------------------------------------------------------


def squared(difference: Tensor, reduce: str) -> Tensor:
    """|difference|^2 over the last dimension, or its mean in place of the sum."""
    return (difference**2).sum(-1) if reduce == "sum" else (difference**2).mean(-1)


def step_log_prob(x_next: Tensor, mean: Tensor, sigma: Tensor, reduce: str = "sum") -> Tensor:
    """log pi(x_{t-1} | x_t) (B,), S0 (19), or with `mean` a d-th of it; x_next, mean (B, d), sigma (B,)."""
    size = mean.shape[-1] if reduce == "sum" else 1
    log_root = sigma.log() + 0.9189385332046727  # of 2 pi sigma^2
    return -squared(x_next - mean, reduce) / (2 * sigma**2) - size * log_root


def step_kl(mean: Tensor, ref_mean: Tensor, sigma: Tensor, reduce: str = "sum") -> Tensor:
    """KL(pi || pi_ref) (B,) of a step, S0 (28) and (59); means (B, d), sigma (B,)."""
    return squared(mean - ref_mean, reduce) / (2 * sigma**2)


def sample_chain(
    step: Callable[..., Tensor], params: Tensor, noise: Tensor, context: Tensor, sigma: Tensor
) -> tuple:
    """States x_0 .. x_T (T + 1, B, d), means of steps 1 .. T (T, B, d); noise (T + 1, B, d) ends in x_T."""
    states: list[Tensor] = [noise[-1]]
    means: list[Tensor] = []
    for t in range(len(noise) - 1, 0, -1):
        means.insert(0, step(params, states[0], torch.full_like(context, t), context))
        states.insert(0, means[0] + sigma[t] * noise[t - 1])
    return torch.stack(states), torch.stack(means)


# --- losses -------------------------------------------------------------------------------------------------


def pretrain_loss(
    params: Tensor, x0: Tensor, context: Tensor, t: Tensor, eps: Tensor, net: nn.Module, unflatten: Callable,
    schedule: Schedule, predict: str,
) -> Tensor:  # fmt: skip
    """The mean squared error (Ho et al. 2020, arXiv:2006.11239, eq. 14) of what the network says of noised
    data.

    It is S0 (25) but for the weights of the steps. x0, eps (B, d), context, t (B,).
    """
    signal, noise = schedule.signal[t, None], schedule.noise[t, None]
    x = signal * x0 + noise * eps
    output = functional_call(net, unflatten(params), (x, t, context))
    error = output - (eps - x0) if predict == "v" else (output if predict == "eps" else -noise * output) - eps
    return (error**2).mean()


class SamplePairs(NamedTuple):
    """Chains of preferred and of rejected samples (B, T + 1, d), by t, and their contexts (B,)."""

    winner: Tensor
    loser: Tensor
    context: Tensor


class Side(NamedTuple):
    """Denoising steps of the winners or of the losers, (B, ...) each; x_next is what mu should be near."""

    x_next: Tensor
    mean: Tensor
    ref_mean: Tensor
    sigma: Tensor

    def log_ratio(self) -> Tensor:
        """L_t (B,) = log pi(x_{t-1} | x_t) / pi_ref."""
        mean, ref_mean = (step_log_prob(self.x_next, m, self.sigma) for m in (self.mean, self.ref_mean))
        return mean - ref_mean


def trajectory_loss(winner: Tensor, loser: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The loss of whole chains and the margins (B,); winner and loser: L_t of every step (B, T)."""
    margin = beta * (winner.sum(-1) - loser.sum(-1))
    return -logsigmoid(margin).mean(), margin


def d3po_loss(winner: Tensor, loser: Tensor, beta: float, steps: int) -> tuple[Tensor, Tensor]:
    """The loss of single steps and their margins; winner and loser: L_t, of any one shape."""
    margin = beta * steps * (winner - loser)
    return -logsigmoid(margin).mean(), margin


def standard_loss(
    winner: Side, loser: Side, weight: Tensor, beta: float, steps: int
) -> tuple[Tensor, Tensor]:
    """S0 (33) and the margins (B,); weight (B,) in units of the VLB's.

    x_next is the mean of q(x_{t-1} | x_t, x_0), so that -log_ratio is the VLB's weight times D_t.
    """
    margin = beta * steps * weight * (winner.log_ratio() - loser.log_ratio())
    return -logsigmoid(margin).mean(), margin


def notes35_loss(winner: Side, loser: Side, beta: float) -> tuple[Tensor, Tensor]:
    """S0 (35), the stopped weight before both terms, and the margins R_w - R_l (B,)."""
    own, other = (step_kl(side.mean, side.ref_mean, side.sigma) for side in (winner, loser))
    margin = beta * (own - other)
    nearer, farther = (step_kl(side.x_next, side.mean, side.sigma) for side in (winner, loser))
    return beta * (torch.sigmoid(-margin).detach() * (nearer - farther)).mean(), margin


def pair_loss(
    params: Tensor, reference: Tensor, pairs: SamplePairs, t: Tensor, noise: Tensor, mean: Callable,
    schedule: Schedule, weight: Tensor, args: Args,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The loss of a batch of pairs and what to log of it.

    t (B, K): the steps looked at; noise (2, B, K, d), of samples noised anew; weight (T + 1,), in units of
    the VLB's.
    """
    steps, context = t.flatten(), pairs.context[:, None].expand_as(t).flatten()
    rows = torch.arange(len(t), device=t.device)[:, None]
    sides = []
    for chain, eps in zip((pairs.winner, pairs.loser), noise.flatten(1, 2), strict=True):
        if args.loss == "standard":
            x0 = chain[:, :1].expand(-1, t.shape[1], -1).flatten(0, 1)
            x = schedule.signal[steps, None] * x0 + schedule.noise[steps, None] * eps
            x_next = step_mean(eps, x, steps, schedule, "eps")
        else:
            x, x_next = chain[rows, t].flatten(0, 1), chain[rows, t - 1].flatten(0, 1)
        own, ref = (mean(p, x, steps, context) for p in (params, reference))
        sides.append(Side(x_next, own, ref, schedule.sigma[steps]))
    winner, loser = sides
    if args.loss == "standard":
        loss, margin = standard_loss(winner, loser, weight[steps], args.beta, schedule.steps)
    elif args.loss == "notes35":
        loss, margin = notes35_loss(winner, loser, args.beta)
    else:
        won, lost = winner.log_ratio().view_as(t), loser.log_ratio().view_as(t)
        if args.loss == "trajectory":
            loss, margin = trajectory_loss(won, lost, args.beta)
        else:
            loss, margin = d3po_loss(won, lost, args.beta, schedule.steps)
    return loss, {"loss": loss, "margin": margin.mean(), "accuracy": (margin > 0).float().mean()}


def vlb_weights(schedule: Schedule) -> Tensor:
    """w_t (T + 1,) with |mu~ - mu|^2 / 2 sigma_t^2 = w_t |eps - eps_theta|^2; w_0, of no step, is 1."""
    t = torch.arange(1, len(schedule.sigma), device=schedule.sigma.device)
    one = torch.ones(len(t), 1, device=t.device)
    change = step_mean(one, one, t, schedule, "eps") - step_mean(0 * one, one, t, schedule, "eps")
    return torch.cat((one[0], change.squeeze(-1) ** 2 / (2 * schedule.sigma[t] ** 2)))


# --- updates ------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """Everything a run goes on from."""

    params: Tensor
    opt: dict[str, Tensor]
    reference: Tensor  # the pretrained parameters
    generator: torch.Generator


def draw_data(
    target: Target, schedule: Schedule, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0 (B, d) of the data, their contexts, steps t of 1 .. T (B,), and noise eps (B, d)."""
    device = generator.device
    context = torch.randint(target.contexts, (count,), generator=generator, device=device)
    t = torch.randint(1, schedule.steps + 1, (count,), generator=generator, device=device)
    x0 = target.sample(context, generator)
    return x0, context, t, torch.empty_like(x0).normal_(generator=generator)


def pretrain_denoiser(
    params: Tensor, loss: Callable, target: Target, schedule: Schedule, generator: torch.Generator, args: Args
) -> Tensor:
    """The parameters after pretraining on the target's own points; loss(params, x0, context, t, eps)."""

    def update(params, opt, batch, learning_rate):
        grad, value = grad_and_value(loss)(params, *batch)
        params, opt = adam(params, clip_grad(grad, args.max_grad_norm)[0], opt, learning_rate)
        return params, opt, value

    device, opt = params.device, new_adam(params)
    update = compile_function(update, device, args.compile)
    for i in range(args.pretrain_steps):
        batch = draw_data(target, schedule, args.pretrain_batch, generator)
        rate = torch.tensor(args.pretrain_rate * (1 - i / args.pretrain_steps), device=device)
        params, opt, _ = update(params, opt, batch, rate)
    return params


def make_pairs(
    mean: Callable, params: Tensor, target: Target, schedule: Schedule, count: int, generator: torch.Generator
) -> SamplePairs:
    """Pairs of the model's own chains, the winner drawn from the Bradley-Terry model of the task's reward."""
    context = torch.arange(2 * count, device=params.device) // 2 % target.contexts
    noise = torch.empty(schedule.steps + 1, 2 * count, target.dim, device=params.device)
    states = sample_chain(mean, params, noise.normal_(generator=generator), context, schedule.sigma)[0]
    chains = states.transpose(0, 1).unflatten(0, (count, 2))
    reward = target.reward(chains[:, :, 0])
    chance = (reward[:, 0] - reward[:, 1]).sigmoid()
    first = torch.rand(count, generator=generator, device=params.device) < chance
    winner, loser = (torch.where(side[:, None, None], chains[:, 0], chains[:, 1]) for side in (first, ~first))
    return SamplePairs(winner, loser, context[::2])


def check(args: Args) -> None:
    """Refuse arguments that cannot work together."""
    check_args(
        args,
        at_least_1=("num_pairs", "batch_size", "draws", "hidden", "pretrain_batch", "pretrain_steps"),
        fractions=("eta",),
        positive=("beta", "learning_rate", "max_grad_norm", "min_sigma", "pretrain_rate"),
    )
    require(args.steps >= 2, f"--steps must be at least 2, not {args.steps}")
    require(
        args.eta > 0,
        f"--eta {args.eta:g}: no noise would be left but --min-sigma's; it must be greater than 0",
    )
    least = min(args.num_pairs, args.total_steps)
    require(
        args.batch_size <= least,
        f"--batch-size {args.batch_size} must be at most {least}, the least of --num-pairs and --total-steps",
    )


def train(args: Args) -> float:
    """Run Diffusion-DPO; the first value of the final evaluation."""
    check(args)
    device = setup(args.device, args.threads)
    target = make_target(args.env)
    schedule = cosine_schedule(args.steps, args.eta, args.min_sigma, device=device)
    torch.manual_seed(generator_seed(args.seed, "network"))
    net = Denoiser(target.dim, target.contexts, args.steps, args.hidden).to(device)
    params, unflatten = flatten(net)
    mean = make_mean(net, unflatten, schedule, args.predict)
    weight = torch.ones_like(schedule.sigma)
    if args.weight == "constant":
        vlb = vlb_weights(schedule)
        weight = vlb[1:].mean() / vlb

    def pretraining(params, x0, context, t, eps):
        return pretrain_loss(params, x0, context, t, eps, net, unflatten, schedule, args.predict)

    def sample(params, noise, context, sigma):
        return sample_chain(mean, params, noise, context, sigma)

    def update(params, opt, reference, pairs, t, noise, learning_rate):
        """The gradient step, a pure function: parameters, optimiser and batch in, the new ones and metrics
        out.
        """
        gradient = grad_and_value(pair_loss, has_aux=True)
        grad, (_, metrics) = gradient(params, reference, pairs, t, noise, mean, schedule, weight, args)
        grad, grad_norm = clip_grad(grad, args.max_grad_norm)
        params, opt = adam(params, grad, opt, learning_rate)
        return params, opt, metrics | {"grad_norm": grad_norm}

    update = compile_function(update, device, args.compile)
    run = Run(args, "diffusion_dpo", make_evaluation(target, schedule, args.beta, mean, sample), unit="pairs")
    generator = torch.Generator(device).manual_seed(generator_seed(args.seed, "noise"))
    if not args.resume:
        first = torch.Generator(device).manual_seed(generator_seed(args.seed, "pretraining"))
        params = pretrain_denoiser(params, pretraining, target, schedule, first, args)
    state = run.restore(State(params, new_adam(params), params, generator))
    own = torch.Generator(device).manual_seed(generator_seed(args.seed, "pairs"))
    pairs = make_pairs(mean, state.reference, target, schedule, args.num_pairs, own)
    size = args.batch_size
    every_step = torch.arange(1, args.steps + 1, device=device).expand(size, -1)

    while run.step + size <= args.total_steps:
        params, opt, step = state.params, state.opt, run.step
        metrics: list[dict[str, Tensor]] = []
        # a report of every gradient step would cost
        while len(metrics) < 20 and step + size <= args.total_steps:
            remaining = 1 - step / args.total_steps
            rate = torch.tensor(args.learning_rate * (remaining if args.anneal else 1.0), device=device)
            row = torch.randint(args.num_pairs, (size,), generator=generator, device=device)
            t = every_step
            if args.loss != "trajectory":
                t = torch.randint(1, args.steps + 1, (size, args.draws), generator=generator, device=device)
            noise = torch.empty(2, *t.shape, target.dim, device=device).normal_(generator=generator)
            if args.shared_noise:
                noise = noise[:1].expand(2, -1, -1, -1)
            batch = SamplePairs(*(x[row] for x in pairs))
            params, opt, info = update(params, opt, state.reference, batch, t, noise, rate)
            metrics.append(info)
            step += size
        state = state._replace(params=params, opt=opt)
        means = {name: torch.stack([info[name] for info in metrics]).mean() for name in metrics[0]}
        acting = {"params": params, "reference": state.reference}
        run.report(step, state, acting, means | {"learning_rate": rate}, [])
    return run.finish(state, {"params": state.params, "reference": state.reference})


if __name__ == "__main__":
    main(Args, train, lambda env: SETTINGS.get(env, {}))
