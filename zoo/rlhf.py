"""Reinforcement learning from human feedback (Ouyang et al. 2022, arXiv:2203.02155) on tokens, one file.

Three stages, each a run of its own in a folder of its own:

    supervised   a small GPT learns demonstrations, L = -E[log pi(y_t | x, y_<t)]; it becomes the reference
    reward       a labeller ranks responses of the reference, and a GPT with one output learns the order:
                 L = -E[log sigmoid(r(x, y_w) - r(x, y_l))], the mean over all pairs of a ranking (K-wise)
    ppo          the reference is improved on the reward, and kept near itself:

    r_t   = -beta log(pi(y_t|x, y_<t) / ref(y_t|x, y_<t)), and r(x, y) on top at the last token
    A_t   = GAE of r_t with a critic V(x, y_<t), read where y_t is chosen
    loss  = -E[min(ratio_t A_t, clip(ratio_t) A_t)] + c E[(V - R_t)^2] - ptx E[log pi(demonstration)]

The optimum of E[r] - beta KL(pi || ref) is pi* = ref exp(r / beta) / Z. On Count it is known exactly, and
evaluations say how far off the policy is: gap = (J* - J) / (J* - J(ref)). Where the KL stands decides whether
that optimum is reached: k1 in the reward reaches it, k1 as a loss is noise, k3 as a loss has another optimum
(--kl, --kl-in; zoo/common/kl.py says why).

    python zoo/rlhf.py --env Count --reward rule       the gap falls from 1 to 0.015 .. 0.027 (5 seeds)
    python zoo/rlhf.py --env Sort --reward rule        8 digits, from 5% sorted to 95% (3 seeds)
    python zoo/rlhf.py --env Sort                      paid by a reward model of 10,000 comparisons
    python zoo/rlhf.py --env Sort --stage ppo --earlier DIR --run-dir NEW     on DIR's first two stages

After a kill the same command with its --run-dir goes on with the stages that are left.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from zoo.common.args import PLUMBING, flag
from zoo.common.cli import RunArgs, check_args, main, require
from zoo.common.device import compile_function, flatten, setup
from zoo.common.files import load_checkpoint
from zoo.common.optim import Moments, adam, clip_grad, new_adam
from zoo.common.process import present_process
from zoo.common.run import Run
from zoo.common.seeding import generator_seed
from zoo.common.tokens import Task, make_task, measure, rank


@dataclass
class Args(RunArgs):
    kept: ClassVar = (
        *RunArgs.kept, "stage", "digits", "dim", "layers", "heads", "supervised_steps",
        "supervised_batch_size", "other", "comparisons", "answers", "temperature", "label_error",
        "reward_epochs", "ensemble", "reward",
    )  # fmt: skip
    idle: ClassVar = ("num_envs", "env_threads")

    env: str = "Sort"  # the task: Count, Sort or Add
    digits: int | None = None  # of Sort's and Add's numbers; None: 8 and 3
    total_steps: int = 51_200  # responses of the ppo stage
    eval_every: int = 10_000  # sequences between evaluations; 0: at the end only
    eval_episodes: int = 1000  # responses of an evaluation
    stage: Literal["all", "supervised", "reward", "ppo"] = "all"  # each needs those before it
    earlier: str | None = None  # folder with the earlier stages' runs; None: --run-dir's
    reward: Literal["rule", "model"] = "model"  # what PPO is paid by: the task's rule, or the reward model
    dim: int = 64  # width of the GPTs
    layers: int = 2  # their blocks
    heads: int = 4  # attention heads of a block
    supervised_steps: int = 40  # batches of demonstrations; few, so that something is left to learn
    supervised_batch_size: int = 256  # demonstrations in each
    supervised_learning_rate: float = 3e-3  # Adam's, after a warm-up of 20 steps
    other: float = 0.0  # share of the demonstrations that are another task's: reversing (Sort only)
    reference_scale: float = 1.0  # factor on the first logits: how decided an untrained policy is
    comparisons: int = 10_000  # rankings that the reward model learns from
    answers: int = 2  # responses in a ranking, K
    temperature: float = 0.1  # of the labeller: how large a difference of rewards is surely seen
    label_error: float = 0.0  # share of rankings turned round
    reward_epochs: int = 8  # how often each ranking is drawn, on average
    reward_learning_rate: float = 1e-3  # Adam's
    ensemble: int = 1  # reward models, of other heads and other batches; PPO is paid their mean
    score_clip: float | None = None  # scores (a model's less the reference's) clipped to +- this
    batch_size: int = 256  # sequences in a batch of the later stages
    num_epochs: int = 4  # passes over a batch of responses
    num_minibatches: int = 2  # gradient steps in a pass
    learning_rate: float = 1e-3  # Adam's, of policy and critic
    anneal: bool = True  # let it fall linearly to 0 over the run
    beta: float | None = None  # weight of the KL to the reference; None: 0.01 (rule) or 0.3 (model)
    kl: Literal["k1", "k2", "k3"] = "k1"  # its estimator, a token
    kl_in: Literal["reward", "loss"] = "reward"  # where it stands
    critic: bool = True  # False: the baseline is the batch's mean return to go at each position, of all
    gamma: float = 1.0  # discount
    gae_lambda: float = 0.95  # GAE's lambda
    normalize_advantages: bool = False  # mean 0 and standard deviation 1 over a batch's tokens
    clip: float = 0.2  # eps of the clipped surrogate
    value_coef: float = 0.5  # weight of the value loss
    ptx: float = 0.0  # weight of the cross-entropy of demonstrations (the other task's, with --other)
    max_grad_norm: float = 1.0  # the gradient is scaled down to this norm
    compile: bool = False  # compile the update: a minute at the start, for a fifth to a third of its time

    @property
    def kl_coef(self) -> float:
        """beta, or its default, in units of what is paid."""
        return self.beta if self.beta is not None else 0.01 if self.reward == "rule" else 0.3

    @property
    def rule_kl_coef(self) -> float:
        """The same in units of the rule's reward: a model learns that over the labeller's temperature."""
        return self.kl_coef * (self.temperature if self.reward == "model" else 1.0)


# What differs by task; a flag wins over it.
SETTINGS: dict[str, dict] = {
    "Count": dict(
        supervised_steps=0, eval_every=0, reference_scale=2.0, dim=32, batch_size=512, learning_rate=4e-3,
        beta=0.5, temperature=1.0,
    ),
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


def reward_scores(forward: Forward, params: Tensor, prompt: Tensor, response: Tensor, mask: Tensor) -> Tensor:
    """A reward model's scores (B,): its output at each response's last token (mask (B, L) true up to it)."""
    output = forward(params, torch.cat((prompt, response), 1))[0].squeeze(-1)
    last = prompt.shape[1] + mask.sum(-1, keepdim=True) - 1
    return output.gather(1, last).squeeze(1)


# --- estimators ---------------------------------------------------------------------------------------------


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x over the places where mask is true; of equal shapes."""
    return (x * mask).sum() / mask.sum()


def normalized(x: Tensor, mask: Tensor) -> Tensor:
    """x with mean 0 and standard deviation 1 over the places where mask is true, and 0 elsewhere."""
    centred = (x - masked_mean(x, mask)) * mask
    return centred / (masked_mean(centred**2, mask).sqrt() + 1e-8)


def kl_estimate(log_ratio: Tensor, kind: str) -> Tensor:
    """k1, k2 or k3 of KL(pi || ref), elementwise, log_ratio = log ref - log pi of what pi chose.

    See zoo/common/kl.py for what each is an estimate of.
    """
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio**2 / 2
    return torch.expm1(log_ratio) - log_ratio


def token_rewards(score: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """r_t (B, L): -beta KL a token, and the score (B,) on top at a response's last token; 0 beyond it."""
    steps = torch.arange(mask.shape[1], device=mask.device)
    last = steps == mask.sum(-1, keepdim=True) - 1
    return (score[:, None] * last - beta * kl) * mask


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


def response_advantages(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """GAE over the tokens of responses, (B, L) all: an episode that its last token ends; 0 beyond it."""
    next_mask = torch.cat((mask[:, 1:], torch.zeros_like(mask[:, :1])), 1)
    next_value = torch.cat((value[:, 1:], torch.zeros_like(value[:, :1])), 1)
    ends, cut = mask & ~next_mask, torch.zeros_like(mask)
    return gae(reward.T, value.T, next_value.T, ends.T, cut.T, gamma, lam).T * mask


# --- losses -------------------------------------------------------------------------------------------------


def supervised_loss(log_prob: Tensor, mask: Tensor) -> Tensor:
    """The cross-entropy a token of demonstrations, log_prob and mask (B, L); also the ptx term."""
    return -masked_mean(log_prob, mask)


def ranking_loss(score: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """-log sigmoid(r_w - r_l), the mean over all pairs of rankings (B, K), best first (InstructGPT, eq.
    1).
    """
    better, worse = torch.triu_indices(score.shape[1], score.shape[1], 1, device=score.device)
    difference = score[:, better] - score[:, worse]
    # a tie is a guess: half right
    return -logsigmoid(difference).mean(), {"accuracy": (difference.sign() / 2 + 0.5).mean()}


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """min(r A, clip(r) A), elementwise (PPO, eq. 7)."""
    ratio = log_ratio.exp()
    return torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


class Responses(NamedTuple):
    """A batch: prompts (B, P), and (B, L) each what was written and what the old networks said of it."""

    prompt: Tensor
    response: Tensor
    mask: Tensor
    log_prob: Tensor
    ref_log_prob: Tensor
    advantage: Tensor
    return_: Tensor


def rlhf_loss(
    log_prob: Tensor, value: Tensor, batch: Responses, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's loss over a batch's tokens, log_prob and value (B, L) by the parameters in training."""
    log_ratio = (log_prob - batch.log_prob) * batch.mask
    pg_loss = -masked_mean(clipped_surrogate(log_ratio, batch.advantage, args.clip), batch.mask)
    v_loss = masked_mean((value - batch.return_) ** 2, batch.mask)
    metrics = {"policy_loss": pg_loss, "value_loss": v_loss}
    # to the policy that wrote
    metrics["approx_kl"] = masked_mean(torch.expm1(log_ratio) - log_ratio, batch.mask)
    metrics["clipfrac"] = masked_mean((torch.expm1(log_ratio).abs() > args.clip).float(), batch.mask)
    loss = pg_loss + (args.value_coef * v_loss if args.critic else 0.0)
    if args.kl_in == "loss":
        penalty = masked_mean(kl_estimate((batch.ref_log_prob - log_prob) * batch.mask, args.kl), batch.mask)
        loss = loss + args.kl_coef * penalty
    return loss, metrics


# --- the run ------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """All that the supervised and the reward stage go on from."""

    params: Tensor  # of the stage's network or networks, one vector
    opt: Moments
    generator: torch.Generator  # of prompts, noise, labels and orders


class PPOState(NamedTuple):
    """All that the ppo stage goes on from, what earlier stages gave it included."""

    params: Tensor  # policy's and critic's, one vector
    opt: Moments
    generator: torch.Generator
    ref: Tensor  # the reference's
    members: Tensor  # the reward models' (E, ...), or none (0,)
    shift: Tensor  # what is taken from their scores


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


def supervised_stage(args: Args, task: Task, device: torch.device) -> float:
    """Learn demonstrations; total_steps counts them."""
    params, policy = make_network(task, args, task.vocab, device)
    first = params
    run = Run(
        args, "rlhf", lambda acting: evaluation(task, policy, first, args, args.rule_kl_coef, acting),
        unit="demonstrations",
    )  # fmt: skip
    generator = torch.Generator(device).manual_seed(generator_seed(args.seed, "demonstrations"))
    state = run.restore(State(params, new_adam(params), generator))
    size = args.supervised_batch_size
    while run.step + size <= args.total_steps:
        params, opt, loss = supervised_step(policy, task, args, run.step // size, *state)
        state = State(params, opt, generator)
        run.report(run.step + size, state, {"params": params}, {"supervised_loss": loss}, [])
    return run.finish(state, {"params": state.params})


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


def reward_stage(args: Args, task: Task, device: torch.device) -> float:
    """Learn rankings of the reference's responses; total_steps counts those seen, a model."""
    _, policy = make_network(task, args, task.vocab, device)
    ref = earlier_stage(args, "supervised", device)["params"]
    fresh = [make_network(task, args, 1, device) for _ in range(args.ensemble)]
    model, head = fresh[0][1], args.dim + 1
    # the reference's body
    members = [torch.cat((ref[: -head * task.vocab], new[-head:])) for new, _ in fresh]

    def ranked_scores(member: Tensor, prompt: Tensor, response: Tensor) -> Tensor:
        """Scores (B, K) of a ranking."""
        prompt, response = prompt.repeat_interleave(args.answers, 0), response.flatten(0, 1)
        return reward_scores(model, member, prompt, response, task.mask(response)).view(-1, args.answers)

    def loss(params: Tensor, prompt: Tensor, response: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over the models, each of which learns from rankings (E, B, ...) of its own."""
        each = [ranking_loss(ranked_scores(*one)) for one in zip(params, prompt, response, strict=True)]
        means = {name: torch.stack([metrics[name] for _, metrics in each]).mean() for name in each[0][1]}
        return torch.stack([value for value, _ in each]).sum(), means

    def update(params: Tensor, opt: Moments, prompt: Tensor, response: Tensor, learning_rate: Tensor):
        grad, (_, metrics) = grad_and_value(loss, has_aux=True)(params, prompt, response)
        grad = torch.stack([clip_grad(one, args.max_grad_norm)[0] for one in grad])  # each model's on its own
        return *adam(params, grad, opt, learning_rate), metrics

    def evaluate(acting: dict) -> dict[str, float]:
        """The share of held-out pairs ordered as by the labeller: by the models' mean score, and by the
        rule.
        """
        score = torch.stack([ranked_scores(member, *held_out) for member in acting["members"]]).mean(0)
        prompt, response = held_out[0].repeat_interleave(args.answers, 0), held_out[1].flatten(0, 1)
        rule = task.reward(prompt, response).view_as(score)
        return {
            name: float(ranking_loss(x)[1]["accuracy"])
            for name, x in (("eval_accuracy", score), ("eval_rule", rule))
        }

    generators = [
        torch.Generator(device).manual_seed(generator_seed(args.seed, "rankings", i)) for i in range(3)
    ]
    prompts, responses = draw_rankings(policy, ref, task, args, args.comparisons, generators[0])
    held_out = draw_rankings(policy, ref, task, args, 2000, generators[1], held_out=True)
    run = Run(args, "rlhf", evaluate, unit="rankings")
    params = torch.stack(members)
    state = run.restore(State(params, new_adam(params), generators[2]))
    batch_size = min(args.batch_size, args.comparisons)
    learning_rate = torch.tensor(args.reward_learning_rate, device=device)
    while run.step + batch_size <= args.total_steps:
        drawn = torch.randint(
            args.comparisons, (args.ensemble, batch_size), generator=state.generator, device=device
        )
        params, opt, metrics = update(
            state.params, state.opt, prompts[drawn], responses[drawn], learning_rate
        )
        state = State(params, opt, state.generator)
        run.report(run.step + batch_size, state, {"members": params}, metrics, [])
    return run.finish(state, {"members": state.params})


def ppo_stage(args: Args, task: Task, device: torch.device) -> float:
    """Improve the reference on the reward; total_steps counts responses."""
    ref, policy = make_network(task, args, task.vocab, device)
    fresh, critic = make_network(task, args, 1, device)  # of a reward model's form, too
    members = fresh.repeat(args.ensemble, 1) if args.reward == "model" else fresh[:0]
    if not args.resume:  # else the checkpoint has them
        ref = earlier_stage(args, "supervised", device)["params"]
        if args.reward == "model":
            members = earlier_stage(args, "reward", device)["members"]
    head = args.dim + 1  # parameters, for each output
    params = torch.cat((ref, ref[: -head * task.vocab], 0 * fresh[-head:]))  # the reference's body, V = 0
    beta = args.kl_coef if args.kl_in == "reward" else 0.0

    def write(params: Tensor, prompt: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return generate(policy, params[: len(ref)], prompt, noise, task.end)

    def judge(prompt: Tensor, response: Tensor) -> Tensor:
        """What responses are paid (B,): by the rule, or by the reward models, on average."""
        if args.reward == "rule":
            return task.reward(prompt, response)
        mask = task.mask(response)
        return torch.stack(
            [reward_scores(critic, member, prompt, response, mask) for member in members]
        ).mean(0)

    def loss(params: Tensor, batch: Responses, demonstrations: tuple[Tensor, Tensor]):
        log_prob = log_probs(policy, params[: len(ref)], batch.prompt, batch.response)
        value = at_responses(critic, params[len(ref) :], batch.prompt, batch.response).squeeze(-1)
        total, metrics = rlhf_loss(log_prob, value, batch, args)
        if args.ptx > 0:
            prompt, answer = demonstrations
            metrics["ptx_loss"] = supervised_loss(
                log_probs(policy, params[: len(ref)], prompt, answer), task.mask(answer)
            )
            total = total + args.ptx * metrics["ptx_loss"]
        return total, metrics

    def update(params: Tensor, opt: Moments, batch: Responses, demonstrations, learning_rate: Tensor):
        """A minibatch's step, a pure function: parameters and optimiser in, the new ones and metrics out."""
        grad, (_, metrics) = grad_and_value(loss, has_aux=True)(params, batch, demonstrations)
        grad, grad_norm = clip_grad(grad, args.max_grad_norm)
        return *adam(params, grad, opt, learning_rate), metrics | {"grad_norm": grad_norm}

    update = compile_function(update, device, args.compile)
    generator = torch.Generator(device).manual_seed(generator_seed(args.seed, "noise"))
    draw_noise = partial(gumbel, args.batch_size, task.response_length, task.vocab, generator=generator)
    # only differences of a model's scores mean anything: mean 0 at first
    prompt, shift = task.prompts(args.batch_size, generator), torch.zeros((), device=device)
    if args.reward == "model":
        shift = judge(prompt, write(params, prompt, draw_noise())[0]).mean()
    run = Run(
        args, "rlhf", lambda acting: evaluation(task, policy, ref, args, args.rule_kl_coef, acting),
        unit="responses",
    )  # fmt: skip
    state = run.restore(PPOState(params, new_adam(params), generator, ref, members, shift))
    _, _, _, ref, members, shift = state

    while run.step + args.batch_size <= args.total_steps:
        remaining = 1 - run.step / args.total_steps
        learning_rate = torch.tensor(args.learning_rate * (remaining if args.anneal else 1.0), device=device)
        params, opt = state.params, state.opt
        prompt = task.prompts(args.batch_size, generator)
        response, log_prob = write(params, prompt, draw_noise())
        mask, ref_log_prob = task.mask(response), log_probs(policy, ref, prompt, response)
        score, kl = judge(prompt, response) - shift, kl_estimate(ref_log_prob - log_prob, args.kl)
        if args.score_clip is not None:
            score = score.clamp(-args.score_clip, args.score_clip)
        reward = token_rewards(score, kl, mask, beta)
        if args.critic:
            value = at_responses(critic, params[len(ref) :], prompt, response).squeeze(-1)
            advantage = response_advantages(reward, value, mask, args.gamma, args.gae_lambda)
        else:  # the return to go, less its mean over all: over those not yet ended it is no baseline
            value = torch.zeros_like(reward)
            advantage = response_advantages(reward, value, mask, args.gamma, 1.0)
            advantage = (advantage - advantage.mean(0)) * mask
        batch = Responses(prompt, response, mask, log_prob, ref_log_prob, advantage, advantage + value)
        if args.normalize_advantages:
            batch = batch._replace(advantage=normalized(advantage, mask))
        metrics = []
        for _ in range(args.num_epochs):
            order = torch.randperm(args.batch_size, generator=generator, device=device)
            for index in order.chunk(args.num_minibatches):
                minibatch, known = Responses(*(x[index] for x in batch)), None
                if args.ptx > 0:
                    known = task.demonstrations(len(index), generator, float(args.other > 0))
                params, opt, info = update(params, opt, minibatch, known, learning_rate)
                metrics.append(info)
        state = state._replace(params=params, opt=opt)
        means = {name: torch.stack([info[name] for info in metrics]).mean() for name in metrics[0]}
        means |= {"score": score.mean(), "rule_reward": task.reward(prompt, response).mean()}
        means |= {"kl": ((log_prob - ref_log_prob) * mask).sum(-1).mean(), "learning_rate": learning_rate}
        run.report(run.step + args.batch_size, state, {"params": params[: len(ref)]}, means, [])
    return run.finish(state, {"params": state.params[: len(ref)]})


def earlier_stage(args: Args, stage: str, device: torch.device) -> dict[str, Tensor]:
    """What an earlier stage has made. Raises UsageError if it is not there or of another task or network."""
    folder = Path(args.earlier or ".") / stage
    require(
        (folder / "agent.pt").is_file(),
        f"--stage {args.stage}: the stage {stage} has not been run, {folder} holds no agent.pt; "
        f"--stage {stage} runs it, --earlier names another folder",
    )
    saved = load_checkpoint(folder / "agent.pt", "--earlier", "rlhf", args.env)
    # Count's prompts are its seed's
    names = ["digits", "dim", "layers", "heads", *(["seed"] if args.env == "Count" else [])]
    for name in [*names, "ensemble", "temperature"] if stage == "reward" else names:
        was, wanted = saved["args"][name], getattr(args, name)
        require(was == wanted, f"--{name} {wanted}: the stage in {folder} was run with {was}")
    return {name: value.to(device) for name, value in saved["state"].items()}


STAGES = {"supervised": supervised_stage, "reward": reward_stage, "ppo": ppo_stage}


def check(args: Args) -> None:
    """Refuse arguments that cannot work together."""
    check_args(
        args,
        at_least_1=(
            "dim", "layers", "heads", "supervised_batch_size", "comparisons", "reward_epochs", "ensemble",
            "batch_size", "num_epochs", "num_minibatches",
        ),
        fractions=("other", "label_error", "gamma", "gae_lambda"),
        positive=(
            "supervised_learning_rate", "reference_scale", "temperature", "reward_learning_rate",
            "learning_rate", "clip", "max_grad_norm", "score_clip",
        ),
        at_least_0=("supervised_steps", "value_coef", "ptx"),
    )  # fmt: skip
    require(
        args.num_envs == 1, f"--num-envs {args.num_envs}: tasks of tokens have none; --batch-size is meant"
    )
    require(0 <= args.kl_coef < float("inf"), f"--beta must be at least 0 and finite, not {args.beta}")
    require(args.earlier != "", "--earlier is empty; a folder is meant")
    require(args.dim % args.heads == 0, f"--heads {args.heads} does not divide --dim {args.dim}")
    require(args.answers >= 2, f"--answers must be at least 2, a comparison's, not {args.answers}")
    require(
        args.batch_size % args.num_minibatches == 0,
        f"--num-minibatches {args.num_minibatches} does not divide --batch-size {args.batch_size}",
    )
    require(
        args.stage != "all" or args.earlier is None,
        f"--earlier {args.earlier}: --stage all makes the earlier stages itself; --stage ppo is meant",
    )
    require(
        args.other == 0 or args.env == "Sort",
        f"--other {args.other:g}: only Sort has another task, not {args.env}",
    )
    require(
        args.stage not in ("all", "ppo") or args.total_steps >= args.batch_size,
        f"--total-steps {args.total_steps} is less than one batch of {args.batch_size} (--batch-size)",
    )


def continued(args: Args, finished: bool) -> Args | None:
    """How a stage goes on that an earlier call has left in its folder; None where it was finished.

    finished: go on with such a stage as well, which ends at once. Raises UsageError where it was run with
    other arguments.
    """
    folder = Path(args.run_dir or ".")
    left = next((name for name in ("agent.pt", "checkpoint.pt") if (folder / name).is_file()), None)
    if left is None:
        return args
    was = load_checkpoint(folder / left, "--run-dir", "rlhf", args.env)["args"]
    free = {*PLUMBING, "run_dir", "resume", "eval_every", "eval_episodes", "earlier"}
    for name in (name for name in was if name not in free):
        wanted, told = getattr(args, name), f"{flag(name)} {was[name]}; another --run-dir begins anew"
        require(was[name] == wanted, f"{flag(name)} {wanted}: the stage in {folder} was run with {told}")
    if left == "agent.pt" and not finished:
        return None
    return dataclasses.replace(args, run_dir=None, resume=str(folder))


def train(args: Args) -> float:
    """Run the stages asked for, each in its folder; the first value of the last final evaluation.

    All stages in a --run-dir that has some: those that are finished are left, the others gone on with.
    """
    check(args)
    device = setup(args.device, args.threads)
    task = make_task(args.env, args.digits, args.seed)
    root = args.run_dir or args.earlier or f"runs/{args.env}__rlhf__{args.seed}__{int(time.time())}"
    examples = {"supervised": args.supervised_steps * args.supervised_batch_size, "ppo": args.total_steps}
    examples["reward"] = args.comparisons * args.reward_epochs
    all_stages = [stage for stage in STAGES if stage != "reward" or args.reward == "model"]
    if args.stage == "all":  # the same command, not the --resume of a stage, goes on with those after it
        present_process().again = [] if args.run_dir else ["--run-dir", root]
    for stage in all_stages if args.stage == "all" else [args.stage]:
        torch.manual_seed(generator_seed(args.seed, "network", list(STAGES).index(stage)))
        own: dict[str, Any] = dict(stage=stage, total_steps=examples[stage], earlier=args.earlier or root)
        own |= dict(run_dir=str(Path(root) / stage))
        of_stage: Args | None = args if args.resume else dataclasses.replace(args, **own)
        if args.stage == "all" and of_stage is not None:
            of_stage = continued(of_stage, finished=stage == "ppo")
        if of_stage is not None:
            result = STAGES[stage](of_stage, task, device)
    return result


if __name__ == "__main__":
    main(Args, train, lambda env: SETTINGS.get(env, {}))
