"""Policy gradients over a denoising chain (DDPO, Black et al. 2023, arXiv:2305.13301), one file.

The KL to the reference model may stand in any of three places, or nowhere (DPOK, Fan et al. 2023,
arXiv:2305.16381).

A diffusion model is first pretrained on data, then taught by a reward r(x_0, c) alone. Its T sampling steps
are an MDP: the state is (x_t, t, c), the action x_{t-1}, and the policy a Gaussian whose mean the network
gives and whose sigma is fixed:

    pi(x_{t-1} | x_t, c) = N(mu_theta(x_t, c, t), sigma_t^2 I)
    log pi = -|x_{t-1} - mu_theta|^2 / 2 sigma_t^2 + const
    J = E[ r(x_0, c) - beta sum_t KL_t(x_t) ],     KL_t = |mu_theta - mu_ref|^2 / 2 sigma_t^2      (S0 27, 28)

    score    grad E[ A_t log pi(x_{t-1} | x_t) ]                              one step on fresh chains (S0 24)
    is       grad E[ r_t A_t ],  r_t = pi / pi_old                            several (S0 26); with --clip eps
             grad E[ min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t) ]

    --kl none       A_t = r - mean
    --kl loss       the same, and beta KL_t added to the loss: S0 (29). It is not J's gradient: what step t
                    does to the KL of the steps after it is left out
    --kl return     the right gradient: as `loss`, and A_t = r - beta sum_{s < t} KL_s - mean
    --kl log-ratio  A_t = r - beta log(pi / pi_ref)(x_{t-1} | x_t) - mean: S0 (30), on average as (29)

The best chain's x_0 follows the tilt p_ref(x_0) exp(r / beta) / Z where x_T tells nothing of x_0, which --eta
1 ensures (Domingo-Enrich et al. 2024, arXiv:2409.08861). On the tasks `line` and `ring` all of it is
computed, not sampled.

    python zoo/ddpo.py                          two mixtures on a line: within 0.04 of the best J in 40 s
    python zoo/ddpo.py --kl loss                the same with (29): ends ten times as far from the tilt
    python zoo/ddpo.py --env ring --kl none     most mass usually ends on one of two equal modes
    python zoo/ddpo.py --env digits             8 x 8 digits, wanted: threes (needs the extra `digits`)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

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
    kept: ClassVar = (*RunArgs.kept, "hidden", "steps", "eta", "min_sigma", "predict", "pretrain_steps")
    idle: ClassVar = ("num_envs", "env_threads", "eval_episodes")

    env: str = "line"  # the task: line or ring (exact), digits
    total_steps: int = 153_600  # chains of the whole run
    eval_every: int = 15_360  # chains between evaluations; 0: at the end only
    method: Literal["score", "is"] = "score"  # one step on fresh chains, or several, importance sampled
    kl: Literal["none", "loss", "return", "log-ratio"] = "return"  # where the KL to the reference stands
    beta: float = 0.5  # weight of the path's KL; with --kl none only the tilt's that samples are compared to
    data_coef: float = 0.0  # weight of the pretraining loss, on data, in every gradient step
    num_chains: int = 512  # chains between updates
    num_epochs: int = 1  # passes over a batch of chains, with --method is
    minibatch_size: int = 5120  # denoising steps in a gradient step of --method is; divides chains x steps
    clip: float | None = None  # eps of the clipped ratio, with --method is; None: unclipped
    reduce: Literal["sum", "mean"] = "sum"  # over dimensions; the mean takes the ratio's d-th root
    learning_rate: float = 2e-3  # Adam's
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
SETTINGS: dict[str, dict] = {
    "ring": dict(beta=0.2, steps=40, total_steps=307_200, eval_every=61_440, learning_rate=4e-3),
    "digits": dict(
        beta=0.2, predict="v", steps=10, min_sigma=0.1, hidden=(256, 256), num_chains=1024,
        learning_rate=5e-4, pretrain_rate=2e-3, pretrain_steps=3000,
    ),
}  # fmt: skip


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


class Denoising(NamedTuple):
    """Denoising steps of chains, and what the sampling policy and the reference said of them; (B, ...)."""

    x: Tensor
    x_next: Tensor
    t: Tensor
    context: Tensor
    log_prob: Tensor
    ref_mean: Tensor
    advantage: Tensor


def chain_advantages(
    reward: Tensor, kl: Tensor, log_ratio: Tensor, context: Tensor, place: str, beta: float
) -> Tensor:
    """A_t (T, B) of the module's docstring; reward, context (B,), kl and log_ratio of the steps 1 .. T (T,
    B).

    The mean taken off is that over the other chains of the same context at the same step, at least one.
    """
    return_ = reward.expand_as(kl)
    if place == "return":
        # of the steps after t, which are those of a lower index
        return_ = return_ - beta * (kl.cumsum(0) - kl)
    if place == "log-ratio":
        return_ = return_ - beta * log_ratio
    members = nn.functional.one_hot(context).to(return_.dtype)
    size = members.sum(0)
    centred = return_ - (return_ @ members / size) @ members.T
    # as if each chain's own return had not been in its baseline
    return centred * (size / (size - 1))[context]


def ddpo_loss(
    params: Tensor, batch: Denoising, mean: Callable, sigma: Tensor, args: Args
) -> tuple[Tensor, dict]:
    """The loss of a batch of denoising steps and what to log of it; a mean over steps, where J has a sum."""
    mu, std = mean(params, batch.x, batch.t, batch.context), sigma[batch.t]
    log_ratio = step_log_prob(batch.x_next, mu, std, args.reduce) - batch.log_prob
    ratio = log_ratio.exp()
    if args.method == "score":
        loss = -(batch.advantage * log_ratio).mean()  # log pi_old is a constant, its gradient 0
    elif args.clip is None:
        loss = -(batch.advantage * ratio).mean()
    else:
        clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
        loss = -torch.min(batch.advantage * ratio, batch.advantage * clipped).mean()
    metrics = {"policy_loss": loss, "approx_kl": ((ratio - 1) - log_ratio).mean()}
    if args.clip is not None:
        metrics["clipfrac"] = ((ratio - 1).abs() > args.clip).float().mean()
    if args.kl in ("loss", "return"):
        loss = loss + args.beta * step_kl(mu, batch.ref_mean, std, args.reduce).mean()
    return loss, metrics


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


def collect_chains(
    sample: Callable, mean: Callable, target: Target, schedule: Schedule, state: State, args: Args
):
    """New chains as Denoising (T, N, ...) and what to log of them; mean(params, x, t, context), sample as
    `sample_chain`.
    """
    device, sigma = state.params.device, schedule.sigma
    context = torch.arange(args.num_chains, device=device) % target.contexts
    noise = torch.empty(schedule.steps + 1, args.num_chains, target.dim, device=device)
    noise.normal_(generator=state.generator)
    states, means = sample(state.params, noise, context, sigma)
    contexts = context.expand(schedule.steps, -1)
    t = torch.arange(1, schedule.steps + 1, device=device)[:, None].expand_as(contexts)
    flat = (x.flatten(0, 1) for x in (states[1:], t, contexts))
    ref_means = mean(state.reference, *flat).view_as(means)
    std = sigma[t]
    reward, kl = target.reward(states[0]), step_kl(means, ref_means, std)
    log_ratio = step_log_prob(states[:-1], means, std) - step_log_prob(states[:-1], ref_means, std)
    advantage = chain_advantages(reward, kl, log_ratio, context, args.kl, args.beta)
    log_prob = step_log_prob(states[:-1], means, std, args.reduce)
    metrics = {"reward": reward.mean(), "reward_std": reward.std(), "path_kl": kl.sum(0).mean()}
    return Denoising(states[1:], states[:-1], t, contexts, log_prob, ref_means, advantage), metrics


def check(args: Args) -> None:
    """Refuse arguments that cannot work together."""
    check_args(
        args,
        at_least_1=(
            "num_chains",
            "num_epochs",
            "minibatch_size",
            "hidden",
            "pretrain_batch",
            "pretrain_steps",
        ),
        fractions=("eta",),
        positive=("beta", "learning_rate", "max_grad_norm", "clip", "min_sigma", "pretrain_rate"),
        at_least_0=("data_coef",),
    )
    require(args.steps >= 2, f"--steps must be at least 2, not {args.steps}")
    require(
        args.eta > 0,
        f"--eta {args.eta:g}: no noise would be left but --min-sigma's; it must be greater than 0",
    )
    require(
        args.method == "is" or args.clip is None,
        f"--clip {args.clip}: of --method is only; score has no ratio",
    )
    rows = args.num_chains * args.steps
    require(
        args.method == "score" or rows % args.minibatch_size == 0,
        f"--minibatch-size {args.minibatch_size} does not divide the {rows} steps of a batch "
        "(--num-chains x --steps)",
    )
    require(
        args.total_steps >= args.num_chains,
        f"--total-steps {args.total_steps} is less than one batch of {args.num_chains} chains",
    )


def train(args: Args) -> float:
    """Run DDPO; the first value of the final evaluation."""
    check(args)
    device = setup(args.device, args.threads)
    target = make_target(args.env)
    require(
        args.num_chains >= 2 * target.contexts,
        f"--num-chains {args.num_chains}: a mean over a context's chains needs {2 * target.contexts} of them",
    )
    schedule = cosine_schedule(args.steps, args.eta, args.min_sigma, device=device)
    torch.manual_seed(generator_seed(args.seed, "network"))
    net = Denoiser(target.dim, target.contexts, args.steps, args.hidden).to(device)
    params, unflatten = flatten(net)
    mean = make_mean(net, unflatten, schedule, args.predict)

    def pretraining(params, x0, context, t, eps):
        return pretrain_loss(params, x0, context, t, eps, net, unflatten, schedule, args.predict)

    def sample(params, noise, context, sigma):
        return sample_chain(mean, params, noise, context, sigma)

    def loss(params, batch, data):
        value, metrics = ddpo_loss(params, batch, mean, schedule.sigma, args)
        return value + (args.data_coef * pretraining(params, *data) if args.data_coef else 0.0), metrics

    def update(params, opt, batch, data, learning_rate):
        """The gradient step, a pure function: parameters, optimiser and batch in, the new ones and metrics
        out.
        """
        grad, (_, metrics) = grad_and_value(loss, has_aux=True)(params, batch, data)
        grad, grad_norm = clip_grad(grad, args.max_grad_norm)
        params, opt = adam(params, grad, opt, learning_rate)
        return params, opt, metrics | {"grad_norm": grad_norm}

    update = compile_function(update, device, args.compile)
    exact = make_evaluation(target, schedule, args.beta, mean, sample)
    own = torch.Generator(device).manual_seed(generator_seed(args.seed, "evaluation"))
    held = draw_data(target, schedule, 4096, own)

    def evaluate(acting):
        return exact(acting) | {"eval_pretrain_loss": pretraining(acting["params"], *held).item()}

    run = Run(args, "ddpo", evaluate, unit="chains")
    generator = torch.Generator(device).manual_seed(generator_seed(args.seed, "noise"))
    if not args.resume:
        first = torch.Generator(device).manual_seed(generator_seed(args.seed, "pretraining"))
        params = pretrain_denoiser(params, pretraining, target, schedule, first, args)
    state = run.restore(State(params, new_adam(params), params, generator))
    rows = args.num_chains * args.steps
    size, epochs = (rows, 1) if args.method == "score" else (args.minibatch_size, args.num_epochs)

    while run.step + args.num_chains <= args.total_steps:
        remaining = 1 - run.step / args.total_steps
        learning_rate = torch.tensor(args.learning_rate * (remaining if args.anneal else 1.0), device=device)
        batch, means = collect_chains(sample, mean, target, schedule, state, args)
        batch = Denoising(*(x.flatten(0, 1) for x in batch))
        params, opt, metrics = state.params, state.opt, []
        for _ in range(epochs):
            order = torch.randperm(rows, generator=generator, device=device) if size < rows else slice(None)
            for minibatch in zip(*(column[order].split(size) for column in batch), strict=True):
                data = draw_data(target, schedule, args.pretrain_batch, generator) if args.data_coef else ()
                params, opt, info = update(params, opt, Denoising(*minibatch), data, learning_rate)
                metrics.append(info)
        state = state._replace(params=params, opt=opt)
        means |= {name: torch.stack([info[name] for info in metrics]).mean() for name in metrics[0]}
        means["learning_rate"] = learning_rate
        acting = {"params": params, "reference": state.reference}
        run.report(run.step + args.num_chains, state, acting, means, [])
    return run.finish(state, {"params": state.params, "reference": state.reference})


if __name__ == "__main__":
    main(Args, train, lambda env: SETTINGS.get(env, {}))
