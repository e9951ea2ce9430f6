"""Tasks of tokens: a prompt, a response written token by token, and a rule that scores it.

    Count   y_t is right where it is y_{t-1} + b mod 8, y_0 = a; prompts are pairs (a, b). All responses can
            be enumerated, so that the best policy, its value, every KL and every gradient are known exactly
    Sort    digits, then the command to sort them; the response is the digits in rising order. A second
            command, to reverse them, is there for what a policy knew before and may forget
    Add     two numbers, a sign between; the response is their sum and an end token, units first, as one adds
            by hand

A response pays a reward for each right token, so that each rule is its own checker of steps; the reward of
step t depends on the prompt and the tokens up to t only. Tensors: prompts (B, P), responses (B, L), integers;
a task with an end token pads a response with it. Everything runs on the device of its inputs. The same tasks
are Gymnasium environments, so that

    python zoo/ppo.py --env zoo.common.tokens:tokens/Sort-v0

runs on them: the prompt and what is written so far, one-hot, is the observation, a token the action.
"""

import difflib
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from zoo.common.errors import UsageError


class Task:
    """Prompts, and the rule that scores responses to them."""

    name: str
    vocab: int  # tokens 0 .. vocab - 1
    prompt_length: int  # P
    response_length: int  # L, with the end token where there is one
    end: int | None = None  # the token that ends a response; None: all responses have length L

    def prompts(self, count: int, generator: torch.Generator, held_out: bool = False) -> Tensor:
        """Prompts (count, P) on the generator's device; those held out and the others have none in common."""
        prompts = self.draw(count, generator)
        while len(wrong := (self.is_held_out(prompts) != held_out).nonzero().squeeze(-1)):
            prompts[wrong] = self.draw(len(wrong), generator)
        return prompts

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Prompts (count, P) of both kinds."""
        raise NotImplementedError  # each task has its own

    def is_held_out(self, prompts: Tensor) -> Tensor:
        """(B,) whether a prompt belongs to the eighth that no training sees, by a hash of its tokens."""
        powers = torch.tensor([pow(31, i, 2**20) for i in range(prompts.shape[-1])], device=prompts.device)
        return ((prompts + 1) * powers).sum(-1) * 2_654_435_761 % 2**32 < 2**29

    def mask(self, response: Tensor) -> Tensor:
        """(B, L) whether a token belongs to the response: all up to the first end token, which does."""
        if self.end is None:
            return torch.ones_like(response, dtype=torch.bool)
        ends = response == self.end
        return ends.cumsum(-1) - ends.long() == 0

    def answer(self, prompt: Tensor) -> Tensor:
        """The best response (B, L)."""
        raise NotImplementedError  # each task has its own

    def step_reward(self, prompt: Tensor, response: Tensor) -> Tensor:
        """What each token earns (B, L), 0 beyond the response's end; summed, the share of right tokens."""
        answer = self.answer(prompt)
        length = self.mask(answer).sum(-1, keepdim=True)
        return (response == answer) * self.mask(answer) * self.mask(response) / length

    def reward(self, prompt: Tensor, response: Tensor) -> Tensor:
        """The score (B,) of a whole response."""
        return self.step_reward(prompt, response).sum(-1)

    def exact(self, prompt: Tensor, response: Tensor) -> Tensor:
        """(B,) whether the response is right in every token."""
        answer = self.answer(prompt)
        return ((response == answer) | ~self.mask(answer)).all(-1)

    def other(self, prompt: Tensor) -> Tensor:
        """The same question (B, P) for another task; where there is none, as it stands."""
        return prompt

    def demonstrations(
        self, count: int, generator: torch.Generator, share_of_other: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Prompts (count, P), that share of them the other task's, and their answers (count, L)."""
        prompt = self.prompts(count, generator)
        chosen = torch.rand(count, 1, generator=generator, device=generator.device) < share_of_other
        prompt = torch.where(chosen, self.other(prompt), prompt)
        return prompt, self.answer(prompt)


class Count(Task):
    """Continue a, a + b, a + 2b, ... mod `vocab`; a token that is its predecessor plus b earns 1.

    seed: picks the `num_prompts` pairs (a, b). end_token: adds a token that ends a response early.
    All prompts serve training and evaluation.
    """

    name = "Count"

    def __init__(
        self, vocab: int = 8, length: int = 4, num_prompts: int = 8, seed: int = 0, end_token: bool = False
    ):
        self.base, self.vocab, self.prompt_length, self.response_length = vocab, vocab + end_token, 2, length
        self.end = vocab if end_token else None
        # with b = 0 a policy need only repeat
        pairs = torch.cartesian_prod(torch.arange(vocab), torch.arange(1, vocab))
        self.every_prompt = pairs[
            torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:num_prompts]
        ]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(self.every_prompt), (count,), generator=generator, device=generator.device)
        return self.every_prompt.to(generator.device)[index]

    def prompts(self, count: int, generator: torch.Generator, held_out: bool = False) -> Tensor:
        return self.draw(count, generator)

    def answer(self, prompt: Tensor) -> Tensor:
        steps = torch.arange(1, self.response_length + 1, device=prompt.device)
        return (prompt[:, :1] + prompt[:, 1:] * steps) % self.base

    def step_reward(self, prompt: Tensor, response: Tensor) -> Tensor:
        before = torch.cat((prompt[:, :1], response[:, :-1]), 1)
        return ((response == (before + prompt[:, 1:]) % self.base) & self.mask(response)).to(
            torch.get_default_dtype()
        )

    def every_response(self) -> Tensor:
        """All responses (M, L); beyond an end token there is nothing but end tokens."""
        grid = torch.tensor(list(itertools.product(range(self.vocab), repeat=self.response_length)))
        if self.end is not None:
            grid = grid[((grid == self.end) | self.mask(grid)).all(-1)]
        return grid

    def everything(self) -> tuple[Tensor, Tensor]:
        """Every prompt with every response: (N * M, P) and (N * M, L); a table over them is `.view(N, M)`."""
        responses, n = self.every_response(), len(self.every_prompt)
        return self.every_prompt.repeat_interleave(len(responses), 0), responses.repeat(n, 1)


class Sort(Task):
    """Digits and a command; the response is the digits in rising order or, by the other command, reversed."""

    name = "Sort"
    SORT, REVERSE = 10, 11  # the commands

    def __init__(self, digits: int = 8):
        self.vocab, self.prompt_length, self.response_length = 12, digits + 1, digits

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        digits = torch.randint(
            10, (count, self.response_length), generator=generator, device=generator.device
        )
        return torch.cat((digits, torch.full_like(digits[:, :1], self.SORT)), 1)

    def other(self, prompt: Tensor) -> Tensor:
        """The same digits with the command to reverse them."""
        return torch.cat((prompt[:, :-1], torch.full_like(prompt[:, :1], self.REVERSE)), 1)

    def answer(self, prompt: Tensor) -> Tensor:
        digits = prompt[:, :-1]
        return torch.where(prompt[:, -1:] == self.REVERSE, digits.flip(-1), digits.sort(-1).values)


class Add(Task):
    """Two numbers of as many digits; the response is their sum's digits, units first, and the end token."""

    name = "Add"
    PLUS, end = 10, 11

    def __init__(self, digits: int = 3):
        self.digits, self.vocab, self.prompt_length, self.response_length = (
            digits,
            12,
            2 * digits + 1,
            digits + 2,
        )

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        numbers = torch.randint(10, (count, self.prompt_length), generator=generator, device=generator.device)
        numbers[:, self.digits] = self.PLUS
        return numbers

    def answer(self, prompt: Tensor) -> Tensor:
        powers = 10 ** torch.arange(self.digits + 2, device=prompt.device)
        number = powers[: self.digits].flip(-1)  # prompts are written as usual, units last
        total = ((prompt[:, : self.digits] + prompt[:, self.digits + 1 :]) * number).sum(-1, keepdim=True)
        return torch.where((total < powers) & (powers > 1), self.end, total // powers % 10)


TASKS = {task.name: task for task in (Count, Sort, Add)}


def make_task(name: str, digits: int | None = None, seed: int = 0) -> Task:
    """The task of that name. digits: of Sort's and Add's numbers, None their own default; seed: of Count's
    prompts.

    Raises UsageError for another name and for sizes that cannot be.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.3)
        hint = f"; nearest: {near[0]}" if near else ""
        raise UsageError(f"--env {name}: a task of tokens is meant, one of {', '.join(TASKS)}{hint}")
    if name == "Count":
        if digits is not None:
            raise UsageError(f"--digits {digits}: Count has none; its responses are 4 tokens")
        return Count(seed=seed)
    if digits is not None and not 1 <= digits <= 17:
        raise UsageError(
            f"--digits must lie in [1, 17], not {digits}: an empty response scores nothing, and Add "
            "of 18 needs 10^19, which int64 does not hold"
        )
    return TASKS[name]() if digits is None else TASKS[name](digits)  # type: ignore[call-arg]


# --- exact values, on tables over all prompts (N) and responses (M) -----------------------------------------


class Optimum(NamedTuple):
    """The best policy for E[r] - beta KL(pi || ref): its log-probabilities (N, M) and the value J* ()."""

    log_prob: Tensor
    value: Tensor


def optimum(reward: Tensor, ref_log_prob: Tensor, beta: float) -> Optimum:
    """pi* = ref exp(r / beta) / Z and J* = beta log Z, the mean over prompts; tables (N, M)."""
    tilted = ref_log_prob + reward / beta
    log_z = tilted.logsumexp(-1, keepdim=True)
    return Optimum(tilted - log_z, beta * log_z.mean())


def objective(log_prob: Tensor, reward: Tensor, ref_log_prob: Tensor, beta: float) -> Tensor:
    """J = E_pi[r] - beta KL(pi || ref) (), the mean over prompts; tables (N, M), log_prob differentiable."""
    return (log_prob.exp() * (reward - beta * (log_prob - ref_log_prob))).sum(-1).mean()


def gap(log_prob: Tensor, reward: Tensor, ref_log_prob: Tensor, beta: float) -> Tensor:
    """(J* - J) / (J* - J(ref)) (): 1 at the reference, 0 at the best policy."""
    best = optimum(reward, ref_log_prob, beta).value
    at_ref = objective(ref_log_prob, reward, ref_log_prob, beta)
    return (best - objective(log_prob, reward, ref_log_prob, beta)) / (best - at_ref)


# --- people -------------------------------------------------------------------------------------------------


def rank(reward: Tensor, temperature: float, error: float, generator: torch.Generator) -> Tensor:
    """How a labeller orders K responses to a prompt: indices (B, K), the best first, from their rewards (B,
    K).

    By r / temperature plus Gumbel noise: pairs by Bradley and Terry's model, K by Plackett and Luce's. With
    probability `error` the order is turned round, an error that no difference of rewards makes rarer.
    """
    noise = -torch.empty_like(reward).exponential_(generator=generator).log()
    order = (reward / temperature + noise).argsort(-1, descending=True)
    wrong = torch.rand(len(reward), 1, generator=generator, device=reward.device) < error
    return torch.where(wrong, order.flip(-1), order)


# --- evaluation ---------------------------------------------------------------------------------------------

# prompts (B, P) to responses, log-probabilities
Write = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]
LogProb = Callable[[Tensor, Tensor], Tensor]  # prompts (B, P), responses (B, L) to their tokens' (B, L)


def measure(
    task: Task, write: Write, log_prob: LogProb, ref_log_prob: LogProb, beta: float, count: int, seed: int,
    device: torch.device, other: bool = False,
) -> dict[str, float]:  # fmt: skip
    """An evaluation's columns, of `count` responses to held-out prompts, sampled as in training: exact
    answers, reward by the rule, KL to the reference; with `other` how much of the other task is answered
    exactly. On Count, if beta is positive, the gap first.
    """
    generator, values = torch.Generator(device).manual_seed(seed), {}
    if isinstance(task, Count) and beta > 0:
        chunks = list(zip(*(x.to(device).split(8192) for x in task.everything()), strict=True))

        def table(f: LogProb) -> Tensor:
            return torch.cat([f(*chunk) for chunk in chunks]).view(len(task.every_prompt), -1)

        def total(f: LogProb) -> LogProb:
            return lambda prompt, response: (f(prompt, response) * task.mask(response)).sum(-1)

        new, reward, old = (table(f).double() for f in (total(log_prob), task.reward, total(ref_log_prob)))
        values["eval_gap"] = float(gap(new, reward, old, beta))
    prompt = task.prompts(count, generator, held_out=True)
    response, new = write(prompt, generator)
    log_ratio = (new - ref_log_prob(prompt, response)) * task.mask(response)
    values["eval_exact"] = float(task.exact(prompt, response).double().mean())
    values["eval_reward"] = float(task.reward(prompt, response).double().mean())
    values["eval_kl"] = float(log_ratio.sum(-1).double().mean())
    if other:
        prompt = task.other(prompt)
        values["eval_other"] = float(task.exact(prompt, write(prompt, generator)[0]).double().mean())
    return values


# --- the same as environments -------------------------------------------------------------------------------


class TokenEnv(gym.Env):
    """A task as an environment: one-hot rows of prompt and response so far; the action is a token."""

    def __init__(self, task: str, held_out: bool = False, **settings: Any):
        self.task, self.held_out = TASKS[task](**settings), held_out
        self.size = (self.task.prompt_length + self.task.response_length) * self.task.vocab
        self.observation_space = gym.spaces.Box(0.0, 1.0, (self.size,), np.float32)
        self.action_space = gym.spaces.Discrete(self.task.vocab)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        generator = torch.Generator().manual_seed(int(self.np_random.integers(2**62)))
        self.prompt = self.task.prompts(1, generator, self.held_out)
        self.response: list[int] = []
        return self.see(), {}

    def step(self, action):
        self.response.append(int(action))
        t, length = len(self.response) - 1, self.task.response_length
        written = torch.tensor([self.response + [0] * (length - t - 1)])
        reward = float(self.task.step_reward(self.prompt, written)[0, t])
        return self.see(), reward, t + 1 == length or int(action) == self.task.end, False, {}

    def see(self) -> np.ndarray:
        tokens = torch.cat((self.prompt[0], torch.tensor(self.response, dtype=torch.int64)))
        seen = np.zeros(self.size, np.float32)
        seen[: len(tokens) * self.task.vocab] = one_hot(tokens, self.task.vocab).flatten().numpy()
        return seen


for _name in TASKS:
    if f"tokens/{_name}-v0" not in gym.registry:
        gym.register(f"tokens/{_name}-v0", "zoo.common.tokens:TokenEnv", kwargs={"task": _name})
