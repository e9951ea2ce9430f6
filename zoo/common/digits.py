"""The 8 x 8 digits of scikit-learn as a target: a classifier's word is the reward, and another one judges the
samples.

The classifier has seen one half of the pictures, the judge has the other: held out from the classifier, but
not from the diffusion model, which is pretrained on all of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.common.errors import UsageError

WANTED = 3


class Digits(NamedTuple):
    """What a model is pretrained on, what the judge has, and the reward."""

    data: Tensor  # (N, 64) in [-1, 1]: all pictures
    judge_data: Tensor  # (M, 64): the judge's, every second one of them
    judge_label: Tensor  # (M,): the digits that they show
    reward: Callable[[Tensor], Tensor]  # (..., 64) to (...)

    @property
    def contexts(self) -> int:
        return 1

    @property
    def dim(self) -> int:
        return self.data.shape[1]

    def sample(self, context: Tensor, generator: torch.Generator) -> Tensor:
        """Pictures (B, 64) of the data, for contexts (B,), of which there is one only."""
        row = torch.randint(len(self.data), context.shape, generator=generator, device=generator.device)
        return self.data.to(generator.device)[row]

    def judge(self, pictures: Tensor) -> dict[str, float]:
        """What the half held out from the classifier says of pictures (B, 64).

        share: those of the wanted digit by their five nearest neighbours. distance: the mean distance to the
        nearest one, which of the other half's pictures is 2.24, and of its threes 2.39.
        """
        nearest = torch.cdist(pictures, self.judge_data).topk(5, largest=False)
        label = self.judge_label[nearest.indices].mode(-1).values
        share = (label == WANTED).float().mean().item()
        reward = self.reward(pictures).mean().item()
        return {"share": share, "reward": reward, "distance": nearest.values[:, 0].mean().item()}


def load() -> Digits:
    """The reward is a logistic regression's log-probability of the digit WANTED, fitted on half of the data.

    Raises UsageError where scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise UsageError("--env digits needs scikit-learn: pip install -e '.[digits]'") from None
    found = load_digits()
    data = torch.as_tensor(found.data, dtype=torch.float32) / 8 - 1
    label = torch.as_tensor(found.target)
    model = LogisticRegression(C=0.05, max_iter=1000).fit(data[::2].numpy(), label[::2].numpy())
    weight = torch.as_tensor(model.coef_, dtype=torch.float32)
    bias = torch.as_tensor(model.intercept_, dtype=torch.float32)

    def reward(x: Tensor) -> Tensor:
        logits = x @ weight.T.to(x) + bias.to(x)
        return logits.log_softmax(-1)[..., WANTED]

    return Digits(data, data[1::2], label[1::2], reward)
