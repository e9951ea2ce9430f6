"""Group-relative policy optimisation (Shao et al. 2024, arXiv:2402.03300) on tasks of tokens, one file.

Every prompt gets G responses; the others of the group take the critic's place:

    response   A_i    = (r_i - mean(r)) [/ std(r)]
    process    A_i,t  = sum over steps j from t on of (r_i,j - mean(R)) [/ std(R)], R all steps of the group
    loss       L      = -E[sum_t w_i min(ratio_t A, clip(ratio_t) A)] + beta KL(pi || ref)

What differs between the papers is a flag each:

    --std             divide by the standard deviation (GRPO) or not (GPG, Dr. GRPO): it weighs prompts
    --length          w_i: 1 / |o_i| (response; GRPO, which favours short right and long wrong answers),
                      1 / all tokens (batch), 1 / L (constant; Dr. GRPO)
    --ratio           of each token, or of the whole response (DeepSeek-R1, eq. 1)
    --kl, --kl-in     k3 as a loss (GRPO), or k1 in the reward, which has ref exp(r / beta) / Z as its optimum
    --kl-level        as a loss: of each token, or of the whole response, whose log-ratio is summed first
    --kl-correction   as a loss: times pi / old. k1 and k3 then have the KL's gradient, of whole responses,
                      which they have not without; k2 has it without, while the samples are the policy's own
                      (a batch's first step), and with the correction has not

The defaults are those whose fixed point is the optimum. GRPO as in its paper:
--std --length response --kl k3 --kl-in loss --kl-level token.

    python zoo/grpo_tokens.py --env Count              the gap (zoo/rlhf.py) falls from 1 to 0.01 (5 seeds)
    python zoo/grpo_tokens.py --env Sort               8 digits, from 5% sorted to 95% (3 seeds)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.functional import scaled_dot_product_attention

from zoo.common.cli import RunArgs, check_args, main, require
from zoo.common.device import compile_function, flatten, setup
from zoo.common.optim import Moments, adam, clip_grad, new_adam
from zoo.common.run import Run
from zoo.common.seeding import generator_seed
from zoo.common.tokens import Task, make_task, measure


@dataclass
class Args(RunArgs):
    kept: ClassVar = (
        *RunArgs.kept, "digits", "dim", "layers", "heads", "supervised_steps", "supervised_batch_size",
        "other",
    )  # fmt: skip
    idle: ClassVar = ("num_envs", "env_threads")

    env: str = "Sort"  # the task: Count, Sort or Add
    digits: int | None = None  # of Sort's and Add's numbers; None: 8 and 3
    total_steps: int = 51_200  # responses
    eval_every: int = 10_000  # responses between evaluations; 0: at the end only
    eval_episodes: int = 1000  # responses of an evaluation
    dim: int = 64  # width of the GPT
    layers: int = 2  # its blocks
    heads: int = 4  # attention heads of a block
    supervised_steps: int = 40  # batches of demonstrations that make the reference
    supervised_batch_size: int = 256  # demonstrations in each
    supervised_learning_rate: float = 3e-3  # Adam's, after a warm-up of 20 steps
    other: float = 0.0  # share of the demonstrations that are another task's: reversing (Sort only)
    reference_scale: float = 1.0  # factor on the first logits: how decided an untrained policy is
    batch_size: int = 256  # responses between updates
    group_size: int = 8  # responses to one prompt, G
    num_epochs: int = 4  # passes over a batch
    num_minibatches: int = 2  # gradient steps in a pass
    learning_rate: float = 1e-3  # Adam's
    anneal: bool = True  # let it fall linearly to 0 over the run
    level: Literal["response", "process"] = "response"  # whole responses are rewarded, or each step
    std: bool = False  # divide advantages by the group's standard deviation
    length: Literal["response", "batch", "constant"] = "constant"  # what a sum over tokens is divided by
    ratio: Literal["token", "response"] = "token"  # whose probability ratio is clipped
    clip: float = 0.2  # eps of the clipped surrogate
    beta: float = 0.01  # weight of the KL to the reference
    kl: Literal["k1", "k2", "k3"] = "k1"  # its estimator
    kl_in: Literal["reward", "loss"] = "reward"  # where it stands
    kl_level: Literal["token", "response"] = "response"  # in the loss: whose estimator
    kl_correction: bool = False  # in the loss: weigh it by the ratio, for the samples are the old policy's
    max_grad_norm: float = 1.0  # the gradient is scaled down to this norm
    compile: bool = False  # compile the update: a minute at the start, for a fifth to a third of its time


# What differs by task; a flag wins over it.
SETTINGS: dict[str, dict] = {
    "Count": dict(
        supervised_steps=0, eval_every=0, reference_scale=2.0, dim=32, learning_rate=8e-3, beta=0.5,
        # below the first gradients' norm: Adam would remember how large they were, and take small steps
        max_grad_norm=0.05,
    ),
    "Sort": dict(total_steps=81_920),
    "Add": dict(supervised_steps=200, total_steps=102_400),
}  # fmt: skip


# --- networks and distributions -----------------------------------------------------------------------------


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


Cache = list[tuple[Tensor, Tensor]]  # keys and values (B, H, T, D / H) of every block


class Block(nn.Module):
    """x (B, T, D) plus causal attention, plus a perceptron; with `past`, x is the one position after it."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        attended = scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x), (k, v)


class GPT(nn.Module):
    """Tokens (B, T) to outputs (B, T, O), each of the tokens up to it, and the cache to go on from."""

    def __init__(self, vocab: int, context: int, dim: int, layers: int, heads: int, outputs: int):
        super().__init__()
        self.token, self.position = nn.Embedding(vocab, dim), nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, outputs)

    def forward(self, tokens: Tensor, past: Cache | None = None) -> tuple[Tensor, Cache]:
        start = past[0][0].shape[2] if past else 0
        x = self.token(tokens) + self.position.weight[start : start + tokens.shape[1]]
        present = []
        for i, block in enumerate(self.blocks):
            x, keys = block(x, past[i] if past else None)
            present.append(keys)
        return self.head(self.norm(x)), present


Forward = Callable[..., tuple[Tensor, Cache]]  # (params, tokens, past=None) -> (output, cache)


def make_network(task: Task, args, outputs: int, device: torch.device) -> tuple[Tensor, Forward]:
    """A new GPT's parameters, by torch's global generator, as one vector; and the GPT as a function of it."""
    context = task.prompt_length + task.response_length
    net = GPT(task.vocab, context, args.dim, args.layers, args.heads, outputs).to(device)
    net.head.weight.data *= args.reference_scale
    params, unflatten = flatten(net)

    def forward(params: Tensor, tokens: Tensor, past: Cache | None = None) -> tuple[Tensor, Cache]:
        return functional_call(net, unflatten(params), (tokens, past))

    return params, forward


def gumbel(*shape: int, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise, drawn ahead so that to generate is a pure function."""
    return -torch.empty(*shape, device=generator.device).exponential_(generator=generator).log()


def generate(
    forward: Forward, params: Tensor, prompt: Tensor, noise: Tensor, end: int | None
) -> tuple[Tensor, Tensor]:
    """Responses (B, L) to prompts (B / G, P), G to each, and their tokens' log-probabilities (B, L); noise
    (B, L, V) Gumbel.

    Without noise, 0, the likeliest tokens are written; after `end` nothing but `end`. The policy is asked
    with a cache: it reads each token once, and a prompt once for all of its responses.
    """
    logits, past = forward(params, prompt)
    each = len(noise) // len(prompt)
    logits = logits.repeat_interleave(each, 0)
    past = [(keys.repeat_interleave(each, 0), values.repeat_interleave(each, 0)) for keys, values in past]
    ended = torch.zeros(len(noise), dtype=torch.bool, device=prompt.device)
    response, log_prob = [], []
    for t in range(noise.shape[1]):
        dist = Categorical(logits[:, -1])
        token = dist.sample(noise[:, t])
        if end is not None:
            token = torch.where(ended, end, token)
            ended = ended | (token == end)
        response.append(token)
        log_prob.append(dist.log_prob(token))
        if t + 1 < noise.shape[1]:
            logits, past = forward(params, token[:, None], past)
    return torch.stack(response, 1), torch.stack(log_prob, 1)


def at_responses(forward: Forward, params: Tensor, prompt: Tensor, response: Tensor) -> Tensor:
    """The outputs (B, L, O) where the tokens of responses (B, L) are chosen: one position before each."""
    return forward(params, torch.cat((prompt, response[:, :-1]), 1))[0][:, prompt.shape[1] - 1 :]


def log_probs(forward: Forward, params: Tensor, prompt: Tensor, response: Tensor) -> Tensor:
    """log pi(y_t | x, y_<t) (B, L) of responses (B, L)."""
    return Categorical(at_responses(forward, params, prompt, response)).log_prob(response)


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


# --- losses -------------------------------------------------------------------------------------------------


def supervised_loss(log_prob: Tensor, mask: Tensor) -> Tensor:
    """The cross-entropy a token of demonstrations, log_prob and mask (B, L); also the ptx term."""
    return -masked_mean(log_prob, mask)


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """min(r A, clip(r) A), elementwise (PPO, eq. 7)."""
    ratio = log_ratio.exp()
    return torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


class Group(NamedTuple):
    """A batch: prompts (B, P), and (B, L) each what was written, its log-probabilities and advantages."""

    prompt: Tensor
    response: Tensor
    mask: Tensor
    log_prob: Tensor
    ref_log_prob: Tensor
    advantage: Tensor


def token_sum(x: Tensor, mask: Tensor, length: str) -> Tensor:
    """The mean over responses of sums over tokens (B, L), over its own length, the mean one, or L."""
    if length == "response":
        return ((x * mask).sum(-1) / mask.sum(-1)).mean()
    if length == "batch":
        return masked_mean(x, mask)
    return (x * mask).sum(-1).mean() / mask.shape[1]


def grpo_loss(log_prob: Tensor, batch: Group, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, log_prob (B, L) that of the parameters in training."""
    mask = batch.mask
    log_ratio = (log_prob - batch.log_prob) * mask
    ratio = log_ratio.sum(-1, keepdim=True).expand_as(log_ratio) if args.ratio == "response" else log_ratio
    surrogate = clipped_surrogate(ratio, batch.advantage, args.clip)
    if args.ratio == "response":  # a response has one; spread over its tokens, it is summed as theirs are
        surrogate = surrogate / mask.sum(-1, keepdim=True)
    pg_loss = -token_sum(surrogate, mask, args.length)
    metrics = {"policy_loss": pg_loss}
    metrics["approx_kl"] = masked_mean(torch.expm1(log_ratio) - log_ratio, mask)  # to the policy that wrote
    metrics["clipfrac"] = masked_mean((torch.expm1(ratio).abs() > args.clip).float(), mask)
    if args.kl_in == "reward":
        return pg_loss, metrics
    ref_ratio = (batch.ref_log_prob - log_prob) * mask
    if args.kl_level == "token":
        weight = log_ratio.exp() if args.kl_correction else 1.0
        metrics["kl_loss"] = token_sum(weight * kl_estimate(ref_ratio, args.kl), mask, args.length)
    else:
        weight = log_ratio.sum(-1).exp() if args.kl_correction else 1.0
        estimate = weight * kl_estimate(ref_ratio.sum(-1), args.kl)
        metrics["kl_loss"] = token_sum((estimate / mask.sum(-1))[:, None].expand_as(mask), mask, args.length)
    return pg_loss + args.beta * metrics["kl_loss"], metrics


# --- the run ------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """All that a run goes on from."""

    params: Tensor  # the policy's
    ref: Tensor  # the reference's
    opt: Moments
    generator: torch.Generator  # of prompts, noise and orders


def evaluation(task: Task, policy: Forward, ref: Tensor, args, beta: float, acting: dict) -> dict[str, float]:
    """An evaluation's columns, see zoo/common/tokens.py, of {"params": the policy's}; beta in units of the
    rule's reward.
    """

    def write(prompt: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        noise = gumbel(len(prompt), task.response_length, task.vocab, generator=generator)
        return generate(policy, acting["params"], prompt, noise, task.end)

    return measure(
        task,
        write,
        partial(log_probs, policy, acting["params"]),
        partial(log_probs, policy, ref),
        beta,
        args.eval_episodes,
        generator_seed(args.seed, "evaluation"),
        ref.device,
        other=args.other > 0,
    )


def supervised_step(
    policy: Forward, task: Task, args, step: int, params: Tensor, opt: Moments, generator: torch.Generator
) -> tuple[Tensor, Moments, Tensor]:
    """Step `step` on demonstrations: the new parameters, Adam's state, and the loss before the step."""
    prompt, answer = task.demonstrations(args.supervised_batch_size, generator, args.other)

    def loss(params: Tensor) -> Tensor:
        return supervised_loss(log_probs(policy, params, prompt, answer), task.mask(answer))

    grad, value = grad_and_value(loss)(params)
    learning_rate = torch.tensor(
        args.supervised_learning_rate * min(1.0, (step + 1) / 20), device=params.device
    )
    return *adam(params, clip_grad(grad, 1.0)[0], opt, learning_rate), value


def pretrain(policy: Forward, params: Tensor, task: Task, args) -> Tensor:
    """The reference's parameters: a network's after the supervised steps, for a seed the same in all
    files.
    """
    opt = new_adam(params)
    generator = torch.Generator(params.device).manual_seed(generator_seed(args.seed, "demonstrations"))
    for step in range(args.supervised_steps):
        params, opt, _ = supervised_step(policy, task, args, step, params, opt, generator)
    return params


def check(args: Args) -> None:
    """Refuse arguments that cannot work together."""
    check_args(
        args,
        at_least_1=(
            "dim", "layers", "heads", "supervised_batch_size", "batch_size", "group_size", "num_epochs",
            "num_minibatches",
        ),
        fractions=("other",),
        positive=("supervised_learning_rate", "reference_scale", "learning_rate", "clip", "max_grad_norm"),
        at_least_0=("supervised_steps", "beta"),
    )  # fmt: skip
    require(
        args.num_envs == 1, f"--num-envs {args.num_envs}: tasks of tokens have none; --batch-size is meant"
    )
    require(args.dim % args.heads == 0, f"--heads {args.heads} does not divide --dim {args.dim}")
    require(
        args.other == 0 or args.env == "Sort",
        f"--other {args.other:g}: only Sort has another task, not {args.env}",
    )
    require(
        args.group_size > 1, "--group-size 1: a response that is its own group has advantage 0; at least 2"
    )
    require(
        args.batch_size % args.group_size == 0,
        f"--group-size {args.group_size} does not divide --batch-size {args.batch_size}",
    )
    require(
        args.batch_size % args.num_minibatches == 0,
        f"--num-minibatches {args.num_minibatches} does not divide --batch-size {args.batch_size}",
    )
    require(
        args.level == "response" or args.ratio == "token",
        "--level process needs --ratio token: a response's one ratio cannot tell its steps apart",
    )
    require(
        args.kl_in == "loss" or not args.kl_correction,
        "--kl-correction weighs the KL in the loss; --kl-in loss is meant",
    )
    require(
        args.total_steps >= args.batch_size,
        f"--total-steps {args.total_steps} is less than one batch of {args.batch_size} (--batch-size)",
    )


def train(args: Args) -> float:
    """Run GRPO; the first value of the final evaluation."""
    check(args)
    device = setup(args.device, args.threads)
    task = make_task(args.env, args.digits, args.seed)
    torch.manual_seed(generator_seed(args.seed, "network", 0))
    params, policy = make_network(task, args, task.vocab, device)
    ref = pretrain(policy, params, task, args)
    shape = (args.batch_size // args.group_size, args.group_size, task.response_length)
    in_reward = args.beta if args.kl_in == "reward" else 0.0

    def loss(params: Tensor, batch: Group) -> tuple[Tensor, dict[str, Tensor]]:
        return grpo_loss(log_probs(policy, params, batch.prompt, batch.response), batch, args)

    def update(params: Tensor, opt: Moments, batch: Group, learning_rate: Tensor):
        """A minibatch's step, a pure function: parameters and optimiser in, the new ones and metrics out."""
        grad, (_, metrics) = grad_and_value(loss, has_aux=True)(params, batch)
        grad, grad_norm = clip_grad(grad, args.max_grad_norm)
        return *adam(params, grad, opt, learning_rate), metrics | {"grad_norm": grad_norm}

    update = compile_function(update, device, args.compile)
    run = Run(
        args, "grpo_tokens", lambda acting: evaluation(task, policy, ref, args, args.beta, acting),
        unit="responses",
    )  # fmt: skip
    generator = torch.Generator(device).manual_seed(generator_seed(args.seed, "noise"))
    state = run.restore(State(ref, ref, new_adam(ref), generator))
    ref = state.ref

    while run.step + args.batch_size <= args.total_steps:
        params, ref, opt, _ = state
        remaining = 1 - run.step / args.total_steps
        learning_rate = torch.tensor(args.learning_rate * (remaining if args.anneal else 1.0), device=device)
        prompt = task.prompts(shape[0], generator)
        noise = gumbel(args.batch_size, task.response_length, task.vocab, generator=generator)
        response, log_prob = generate(policy, params, prompt, noise, task.end)
        prompt = prompt.repeat_interleave(args.group_size, 0)
        mask, ref_log_prob = task.mask(response), log_probs(policy, ref, prompt, response)
        penalty = in_reward * kl_estimate(ref_log_prob - log_prob, args.kl) * mask
        step_reward = task.step_reward(prompt, response) - penalty
        if args.level == "process":
            advantage = process_advantages(step_reward.view(shape), mask.view(shape), args.std).view_as(
                log_prob
            )
        else:
            advantage = group_advantages(step_reward.sum(-1).view(shape[:2]), args.std).view(-1, 1) * mask
        batch, metrics = Group(prompt, response, mask, log_prob, ref_log_prob, advantage), []
        for _ in range(args.num_epochs):
            order = torch.randperm(args.batch_size, generator=generator, device=device)
            for index in order.chunk(args.num_minibatches):
                params, opt, info = update(params, opt, Group(*(x[index] for x in batch)), learning_rate)
                metrics.append(info)
        state = State(params, ref, opt, generator)
        means = {name: torch.stack([info[name] for info in metrics]).mean() for name in metrics[0]}
        means |= {"rule_reward": task.reward(prompt, response).mean(), "learning_rate": learning_rate}
        means |= {
            "kl": ((log_prob - ref_log_prob) * mask).sum(-1).mean(),
            "length": mask.sum(-1).float().mean(),
        }
        run.report(run.step + args.batch_size, state, {"params": params}, means, [])
    return run.finish(state, {"params": state.params})


if __name__ == "__main__":
    main(Args, train, lambda env: SETTINGS.get(env, {}))
