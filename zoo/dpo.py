"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) on tasks of tokens, one file.

The best policy for E[r] - beta KL(pi || ref) is pi* = ref exp(r / beta) / Z: a reward is
beta log(pi* / ref) + beta log Z. Where two responses to one prompt are compared log Z cancels, and the
likelihood of a labeller's choices is a function of the policy: no reward model, no sampling.

    implicit reward   R(x, y) = beta log(pi(y|x) / ref(y|x))
    loss              L = -E[log sigmoid(R(x, y_w) - R(x, y_l))], y_w the chosen response, y_l the rejected
    its gradient      -beta E[sigmoid(R_l - R_w) (grad log pi(y_w) - grad log pi(y_l))]: by how wrong R is

Only the difference counts: the chosen response's own likelihood may fall, and does on pairs drawn once.
--online K has the present policy write fresh pairs K times, and goes on with all pairs so far. Variants:
--label-smoothing (a share of the labels is taken for wrong), --length-norm (R a token), --reference-free
(R = beta log pi).

    python zoo/dpo.py --env Count                      20,000 comparisons; evaluations give the exact gap
    python zoo/dpo.py --env Count --online 4           as many, written round by round
    python zoo/dpo.py --env Sort                       from a weak supervised model
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from zoo.common.cli import RunArgs, check_args, main, require
from zoo.common.device import compile_function, flatten, setup
from zoo.common.optim import Moments, adam, clip_grad, new_adam
from zoo.common.run import Run
from zoo.common.seeding import generator_seed
from zoo.common.tokens import Task, make_task, measure, rank


@dataclass
class Args(RunArgs):
    kept: ClassVar = (
        *RunArgs.kept, "digits", "dim", "layers", "heads", "supervised_steps", "supervised_batch_size",
        "other", "comparisons", "online", "temperature", "label_error",
    )  # fmt: skip
    idle: ClassVar = ("num_envs", "env_threads")

    env: str = "Sort"  # the task: Count, Sort or Add
    digits: int | None = None  # of Sort's and Add's numbers; None: 8 and 3
    total_steps: int = 120_000  # comparisons visited: total_steps / comparisons times each, on average
    eval_every: int = 20_000  # comparisons between evaluations; 0: at the end only
    eval_episodes: int = 1000  # responses of an evaluation
    dim: int = 64  # width of the GPT
    layers: int = 2  # its blocks
    heads: int = 4  # attention heads of a block
    supervised_steps: int = 40  # batches of demonstrations that make the reference
    supervised_batch_size: int = 256  # demonstrations in each
    supervised_learning_rate: float = 3e-3  # Adam's, after a warm-up of 20 steps
    other: float = 0.0  # share of the demonstrations that are another task's: reversing (Sort only)
    reference_scale: float = 1.0  # factor on the first logits: how decided an untrained policy is
    comparisons: int = 10_000  # pairs labelled, over all rounds
    online: int = 1  # rounds: before each the present policy adds its share of the pairs
    temperature: float = 0.1  # of the labeller: how large a difference of rewards is surely seen
    label_error: float = 0.0  # share of labels turned round
    batch_size: int = 256  # comparisons in a gradient step
    learning_rate: float = 1e-3  # Adam's
    anneal: bool = True  # let it fall linearly to 0 over the run
    beta: float = 0.5  # weight of the KL; in units of the rewards over --temperature
    label_smoothing: float = 0.0  # share of labels that the loss takes for wrong
    length_norm: bool = False  # implicit rewards a token: a long response does not count more
    reference_free: bool = False  # leave the reference out of the implicit reward
    max_grad_norm: float = 1.0  # the gradient is scaled down to this norm
    compile: bool = False  # compile the update: a minute at the start, for a fifth to a third of its time

    @property
    def kl_coef(self) -> float:
        """beta in units of the rule's reward."""
        return self.beta * self.temperature

    @property
    def answers(self) -> int:
        """Responses to a prompt that are compared."""
        return 2


# What differs by task; a flag wins over it.
SETTINGS: dict[str, dict] = {
    "Count": dict(
        supervised_steps=0, eval_every=0, reference_scale=2.0, dim=32, comparisons=20_000, batch_size=64,
        learning_rate=2e-3, temperature=1.0,
    ),
    "Add": dict(supervised_steps=200),
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


# --- losses -------------------------------------------------------------------------------------------------


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x over the places where mask is true; of equal shapes."""
    return (x * mask).sum() / mask.sum()


def supervised_loss(log_prob: Tensor, mask: Tensor) -> Tensor:
    """The cross-entropy a token of demonstrations, log_prob and mask (B, L); also the ptx term."""
    return -masked_mean(log_prob, mask)


class Pairs(NamedTuple):
    """Comparisons: prompts (B, P), both responses (B, L), and ref's log-probabilities of them (B,)."""

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor


def sequence_log_prob(log_prob: Tensor, mask: Tensor, mean: bool) -> Tensor:
    """log pi(y|x) (B,) from its tokens' (B, L); `mean`: a token."""
    total = (log_prob * mask).sum(-1)
    return total / mask.sum(-1) if mean else total


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss from log pi and log ref of the chosen and the rejected responses, (B,) each (Rafailov et al.
    2023, eq. 7).

    With label_smoothing e: -(1 - e) log sigmoid(h) - e log sigmoid(-h), h the difference of the implicit
    rewards.
    """
    reward, other = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    difference = reward - other
    loss = -(1 - label_smoothing) * logsigmoid(difference) - label_smoothing * logsigmoid(-difference)
    metrics = {"dpo_loss": loss.mean(), "accuracy": (difference.sign() / 2 + 0.5).mean()}
    metrics |= {"gradient_weight": (-difference).sigmoid().mean(), "chosen_reward": reward.mean()}
    metrics |= {
        "rejected_reward": other.mean(),
        "chosen_log_prob": chosen.mean(),
        "rejected_log_prob": rejected.mean(),
    }
    return loss.mean(), metrics


# --- the run ------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """All that a run goes on from."""

    params: Tensor  # the policy's
    ref: Tensor  # the reference's
    writers: Tensor  # (K, P): of each round so far those that wrote its pairs; then the last's again
    opt: Moments
    generator: torch.Generator  # of the order of the pairs


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


def draw_rankings(
    policy: Forward, params: Tensor, task: Task, args, count: int, generator: torch.Generator,
    held_out: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Prompts (count, P) and K responses to each (count, K, L), the best first, as the labeller has it.

    Raises UsageError where all responses to each prompt are the same.
    """
    prompt = task.prompts(count, generator, held_out)
    noise = gumbel(count * args.answers, task.response_length, task.vocab, generator=generator)
    response = generate(policy, params, prompt, noise, task.end)[0]
    repeated = prompt.repeat_interleave(args.answers, 0)
    reward, response = task.reward(repeated, response).view(count, -1), response.view(count, args.answers, -1)
    require(
        bool((response != response[:, :1]).any()),
        "the comparisons are ties only: the policy that writes gives one and the same answer to each prompt",
    )
    order = rank(reward, args.temperature, args.label_error, generator)
    return prompt, response.gather(1, order[..., None].expand_as(response))


def check(args: Args) -> None:
    """Refuse arguments that cannot work together."""
    check_args(
        args,
        at_least_1=(
            "dim", "layers", "heads", "supervised_batch_size", "comparisons", "online", "batch_size",
        ),
        fractions=("other", "label_error"),
        positive=(
            "supervised_learning_rate",
            "reference_scale",
            "temperature",
            "learning_rate",
            "max_grad_norm",
        ),
        at_least_0=("supervised_steps",),
    )  # fmt: skip
    require(
        args.num_envs == 1, f"--num-envs {args.num_envs}: tasks of tokens have none; --batch-size is meant"
    )
    require(
        0 < args.beta < float("inf"),
        f"--beta must be greater than 0, not {args.beta:g}: rewards are beta log(pi/ref)",
    )
    require(
        0 <= args.label_smoothing < 0.5,
        f"--label-smoothing must lie in [0, 0.5), not {args.label_smoothing:g}",
    )
    require(args.dim % args.heads == 0, f"--heads {args.heads} does not divide --dim {args.dim}")
    require(
        args.other == 0 or args.env == "Sort",
        f"--other {args.other:g}: only Sort has another task, not {args.env}",
    )
    share, visits = args.comparisons // args.online, args.total_steps // args.online
    require(
        share >= args.batch_size,
        f"--comparisons {args.comparisons}: less than a batch of {args.batch_size} in each --online round",
    )
    require(
        visits >= args.batch_size,
        f"--total-steps {args.total_steps}: less than a batch of {args.batch_size} in each --online round",
    )


def train(args: Args) -> float:
    """Run DPO; the first value of the final evaluation."""
    check(args)
    device = setup(args.device, args.threads)
    task = make_task(args.env, args.digits, args.seed)
    torch.manual_seed(generator_seed(args.seed, "network", 0))
    params, policy = make_network(task, args, task.vocab, device)
    ref = params = pretrain(policy, params, task, args)

    def sequences(params: Tensor, prompt: Tensor, response: Tensor) -> Tensor:
        """log pi(y|x) (B,)."""
        return sequence_log_prob(
            log_probs(policy, params, prompt, response), task.mask(response), args.length_norm
        )

    def draw_pairs(writer: Tensor, round_: int) -> Pairs:
        """The pairs of a round, written by the policy `writer`, labelled; the same after a resume."""
        generator = torch.Generator(device).manual_seed(generator_seed(args.seed, "comparisons", round_))
        prompt, response = draw_rankings(
            policy, writer, task, args, args.comparisons // args.online, generator
        )
        both = response.unbind(1)
        return Pairs(
            prompt, *both, *(sequences(ref, prompt, one) * (not args.reference_free) for one in both)
        )

    def loss(params: Tensor, batch: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = (sequences(params, batch.prompt, one) for one in (batch.chosen, batch.rejected))
        return dpo_loss(
            chosen, rejected, batch.ref_chosen, batch.ref_rejected, args.beta, args.label_smoothing
        )

    def update(params: Tensor, opt: Moments, batch: Pairs, learning_rate: Tensor):
        """A minibatch's step, a pure function: parameters and optimiser in, the new ones and metrics out."""
        grad, (_, metrics) = grad_and_value(loss, has_aux=True)(params, batch)
        grad, grad_norm = clip_grad(grad, args.max_grad_norm)
        return *adam(params, grad, opt, learning_rate), metrics | {"grad_norm": grad_norm}

    update = compile_function(update, device, args.compile)
    run = Run(
        args, "dpo", lambda acting: evaluation(task, policy, ref, args, args.kl_coef, acting),
        unit="comparisons",
    )  # fmt: skip
    generator = torch.Generator(device).manual_seed(generator_seed(args.seed, "order"))
    writers = ref.new_zeros(args.online, len(ref))
    state = run.restore(State(params, ref, writers, new_adam(params), generator))
    ref = state.ref
    rounds: list[Pairs] = []
    # of a resumed run; those begun stay so where it is now longer
    begun = 1 + int((state.writers[1:] != state.writers[:-1]).any(1).sum()) if run.step else 0

    while run.step + args.batch_size <= args.total_steps:
        params, ref, writers, opt, _ = state
        if begun < args.online and run.step >= begun * (args.total_steps // args.online):
            writers = torch.cat((writers[:begun], params.expand(args.online - begun, -1)))
            begun += 1
        if len(rounds) < begun:
            rounds += [draw_pairs(writers[k], k) for k in range(len(rounds), begun)]
            pairs = Pairs(*(torch.cat(column) for column in zip(*rounds, strict=True)))
        remaining = 1 - run.step / args.total_steps
        learning_rate = torch.tensor(args.learning_rate * (remaining if args.anneal else 1.0), device=device)
        index = torch.randint(len(pairs.prompt), (args.batch_size,), generator=generator, device=device)
        params, opt, metrics = update(params, opt, Pairs(*(x[index] for x in pairs)), learning_rate)
        state = State(params, ref, writers, opt, generator)
        metrics |= {"round": torch.tensor(begun - 1), "learning_rate": learning_rate}
        run.report(run.step + args.batch_size, state, {"params": params}, metrics, [])
    return run.finish(state, {"params": state.params})


if __name__ == "__main__":
    main(Args, train, lambda env: SETTINGS.get(env, {}))
