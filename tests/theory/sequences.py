"""What the tests of token policies share: every response of a small Count, and a policy with logits for every
prefix, so that expectations are sums over all responses and what an agent's loss makes of one response can be
weighed by its chance.
"""

from types import SimpleNamespace

import torch
from exact import F64
from torch import Tensor
from torch.func import grad, vmap

from zoo.common.tokens import Count, objective, optimum
from zoo.grpo_tokens import Group, grpo_loss
from zoo.rlhf import Responses, response_advantages, rlhf_loss, token_rewards

BETA = 0.7


class World:
    """All N x M responses to all prompts of a task, flat (B = N * M), and the tabular policies over them."""

    def __init__(self, task: Count):
        self.task = task
        self.n, self.m = len(task.every_prompt), len(task.every_response())
        self.prompt, self.response = task.everything()
        self.mask = task.mask(self.response)
        self.steps = task.step_reward(self.prompt, self.response).to(F64)
        prefixes: dict[tuple, int] = {}  # (prompt, tokens so far) to the number of its row of logits
        which = torch.arange(self.n).repeat_interleave(self.m).tolist()
        keys = [
            [(i, *y[:t]) for t in range(len(y))] for i, y in zip(which, self.response.tolist(), strict=True)
        ]
        self.row = torch.tensor([[prefixes.setdefault(key, len(prefixes)) for key in row] for row in keys])
        self.shape = (len(prefixes), task.vocab)

    def policy(self, seed: int, scale: float = 0.7) -> Tensor:
        """Random logits, flat."""
        g = torch.Generator().manual_seed(seed)
        return scale * torch.randn(self.shape, generator=g, dtype=F64).flatten()

    def log_probs(self, theta: Tensor) -> Tensor:
        """log pi(y_t | x, y_<t) (B, L), 0 beyond the end."""
        log_p = theta.view(self.shape).log_softmax(-1)
        return log_p[self.row, self.response] * self.mask

    def table(self, theta: Tensor) -> Tensor:
        """log pi(y|x) (N, M)."""
        return self.log_probs(theta).sum(-1).view(self.n, self.m)

    def chance(self, theta: Tensor) -> Tensor:
        """Of a response to a prompt drawn evenly, (B,)."""
        return self.table(theta).exp().flatten() / self.n

    def reward(self) -> Tensor:
        """(B,)."""
        return self.steps.sum(-1)

    def objective(
        self, theta: Tensor, ref: Tensor, beta: float = BETA, reward: Tensor | None = None
    ) -> Tensor:
        """J."""
        reward = self.reward() if reward is None else reward
        return objective(self.table(theta), reward.view(self.n, self.m), self.table(ref), beta)

    def best(self, ref: Tensor, beta: float = BETA) -> Tensor:
        """The logits of pi*: log-probabilities of a token are differences of the log-mass behind prefixes."""
        return self.logits(optimum(self.reward().view(self.n, self.m), self.table(ref), beta).log_prob)

    def logits(self, table: Tensor) -> Tensor:
        """Those of the policy with these log-probabilities of whole responses (N, M)."""
        mass = torch.zeros(self.shape, dtype=F64)
        for t in range(self.response.shape[1]):
            index = (self.row[:, t], self.response[:, t])
            mass.index_put_(index, table.flatten().exp() * self.mask[:, t], accumulate=True)
        return mass.clamp(min=1e-300).log().flatten()

    def rlhf_gradient(self, theta: Tensor, reward: Tensor, value: Tensor, lam: float = 1.0, **args) -> Tensor:
        """What zoo/rlhf.py ascends, on samples of theta itself, times the length (the loss is a mean over
        tokens).

        reward, value (B, L): the tokens' rewards and what the critic says of them.
        """
        old, chance = self.log_probs(theta), self.chance(theta)
        advantage = response_advantages(reward, value, self.mask, 1.0, lam)
        settings = SimpleNamespace(
            **dict(clip=0.2, critic=False, kl_in="reward", kl="k1", kl_coef=BETA) | args
        )

        def one(new, old, ref, mask, advantage):
            batch = Responses(None, None, *(x[None] for x in (mask, old, ref, advantage, advantage)))
            return rlhf_loss(new[None], advantage[None], batch, settings)[0] * mask.sum()

        ref = args.get("ref", old)
        each = vmap(one)
        return -grad(lambda x: chance @ each(self.log_probs(x), old, ref, self.mask, advantage))(theta)

    def token_rewards(self, theta: Tensor, ref: Tensor, estimate, beta: float = BETA) -> Tensor:
        """zoo/rlhf.py's (B, L), the score of the whole response at its last token."""
        return token_rewards(
            self.reward(), estimate(self.log_probs(ref) - self.log_probs(theta)), self.mask, beta
        )

    def grpo_gradient(self, theta: Tensor, advantage: Tensor, ref: Tensor | None = None, **args) -> Tensor:
        """What zoo/grpo_tokens.py ascends on samples of theta itself, times L; advantage (B, L) the mean over
        the groups that a response can be in.
        """
        old, chance = self.log_probs(theta), self.chance(theta)
        ref = old if ref is None else self.log_probs(ref)
        defaults = dict(
            ratio="token",
            length="constant",
            clip=0.2,
            beta=BETA,
            kl="k1",
            kl_in="reward",
            kl_level="token",
            kl_correction=False,
        )
        settings = SimpleNamespace(**defaults | args)

        def one(new, old, ref, mask, advantage):
            batch = Group(None, None, *(x[None] for x in (mask, old, ref, advantage)))
            return grpo_loss(new[None], batch, settings)[0] * mask.numel()

        each = vmap(one)
        return -grad(lambda x: chance @ each(self.log_probs(x), old, ref, self.mask, advantage))(theta)

    def group_means(self, theta: Tensor, reward: Tensor, advantages) -> Tensor:
        """The mean advantage (B, ...) of a response over all groups of two that it can be in, by
        advantages(N', 2, ...); reward (B, ...).
        """
        chance = self.table(theta).exp()
        rows = reward.view(self.n, self.m, *reward.shape[1:])
        found = []
        for prompt in range(self.n):
            mine = rows[prompt][:, None].expand(self.m, self.m, *reward.shape[1:])
            pairs = torch.stack((mine, mine.transpose(0, 1)), 2).flatten(0, 1)
            each = advantages(pairs)[:, 0].view(self.m, self.m, *reward.shape[1:])
            found.append(torch.einsum("j,ij...->i...", chance[prompt], each))
        return torch.cat(found)


FIXED = World(Count(vocab=3, length=3, num_prompts=2))
ENDING = World(Count(vocab=2, length=3, num_prompts=2, end_token=True))
