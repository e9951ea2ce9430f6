"""Record what trl computes, for tests/test_trl.py to compare the zoo's losses with; run where trl is
installed.

    python -m venv trl && trl/bin/pip install trl==1.16.0 && trl/bin/python scripts/record_trl.py

trl's own methods are called on log-probabilities, scores and masks drawn here, in place of a model's: the
losses of GRPOTrainer (its four divisors, its KL with and without the correction), DPOTrainer and
RewardTrainer, and their gradients. Writes tests/trl.json with the versions.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
import transformers
import trl
from torch import Tensor

B, L = 6, 5  # responses, tokens of the longest


def fake_accelerator() -> SimpleNamespace:
    """Of one process: whatever is gathered or reduced is what it was."""

    def same(x: Tensor, **_: str) -> Tensor:
        return x

    return SimpleNamespace(
        num_processes=1,
        device=torch.device("cpu"),
        gather=same,
        reduce=same,
        gather_for_metrics=same,
        sync_gradients=True,
    )


def base(**settings) -> MagicMock:
    """What stands for a trainer: the attributes that its loss reads; metrics vanish."""
    trainer = MagicMock()
    trainer.accelerator, trainer._metrics = (
        fake_accelerator(),
        {"train": defaultdict(list), "eval": defaultdict(list)},
    )
    trainer.model.training, trainer.aux_loss_enabled = True, False
    for name, value in settings.items():
        setattr(trainer, name, value)
    return trainer


def grpo(
    log_prob: Tensor,
    old: Tensor,
    ref: Tensor,
    mask: Tensor,
    advantage: Tensor,
    loss_type: str,
    corrected: bool,
) -> Tensor:
    """GRPOTrainer's loss of tokens (B, L), beta .04, clip .2."""
    trainer = base(
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token",
        args=SimpleNamespace(use_bias_correction_kl=corrected, delta=None, steps_per_generation=1),
        beta=0.04, epsilon_low=0.2, epsilon_high=0.2, loss_type=loss_type, use_vllm=False,
        max_completion_length=L, current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        use_adaptive_entropy=False,
    )  # fmt: skip
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (log_prob, torch.zeros_like(log_prob), None)
    ids = torch.zeros(B, L, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :2],
        "prompt_mask": ids[:, :2] + 1,
        "completion_ids": ids,
        "completion_mask": mask.long(),
    }
    inputs |= {"advantages": advantage, "old_per_token_logps": old, "ref_per_token_logps": ref}
    inputs |= {"num_items_in_batch": mask.sum()}
    return trl.GRPOTrainer._compute_loss(trainer, None, inputs)


def dpo(log_prob: Tensor, ref: Tensor, mask: Tensor, loss_type: str) -> Tensor:
    """DPOTrainer's loss of pairs, the first half of (B, L) chosen; beta .1."""
    trainer = base(
        ld_alpha=None, precompute_ref_logps=False, f_divergence_type="reverse_kl", beta=0.1,
        loss_types=[loss_type], loss_weights=[1.0], label_smoothing=0.0, use_weighting=False, _tp_size=1,
        _total_train_tokens=0,
    )  # fmt: skip
    trainer.ref_model = lambda **_: SimpleNamespace(log_probs=ref * mask)
    answers = torch.cat((torch.zeros(B, 1), mask), 1)  # one token of prompt
    inputs = {"input_ids": torch.zeros(B, L + 1).long(), "completion_mask": answers.long()}
    inputs["attention_mask"] = torch.ones(B, L + 1)
    zeros = torch.zeros(B, L)
    unused = dict(entropy=zeros, mean_logits=zeros, is_top1=zeros > 0)  # but in metrics

    def model(**_: Tensor) -> SimpleNamespace:
        return SimpleNamespace(log_probs=log_prob * mask, **unused)

    return trl.DPOTrainer._compute_loss(trainer, model, inputs, False)


def reward(score: Tensor) -> Tensor:
    """RewardTrainer's loss of scores (B,), the first half chosen."""
    trainer = base(args=SimpleNamespace(center_rewards_coefficient=None), _total_train_tokens=0, _tp_size=1)
    model = lambda **_: SimpleNamespace(logits=score[:, None])  # noqa: E731
    return trl.RewardTrainer.compute_loss(trainer, model, {"attention_mask": torch.ones(B, L)})


def recorded(loss, argument: Tensor) -> dict:
    """The loss and its gradient, as lists."""
    argument.requires_grad_(True)
    value = loss(argument)
    gradient = torch.autograd.grad(value, argument)[0]
    argument.requires_grad_(False)
    return {"loss": value.item(), "gradient": gradient.tolist()}


def main() -> None:
    torch.set_default_dtype(torch.float64)
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(L) < torch.tensor([5, 2, 3, 5, 1, 4])[:, None]
    log_prob = -torch.empty(B, L).exponential_(generator=g)
    old, ref = (log_prob + 0.3 * torch.randn(B, L, generator=g) for _ in range(2))
    advantage, score = torch.randn(B, generator=g), torch.randn(B, generator=g)
    content: dict = {
        "versions": {
            "trl": trl.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        }
    }
    content["inputs"] = {
        "mask": mask,
        "log_prob": log_prob,
        "old": old,
        "ref": ref,
        "advantage": advantage,
        "score": score,
    }
    content["inputs"] = {name: value.tolist() for name, value in content["inputs"].items()}
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo"):
        for corrected in (False, True):
            name = loss_type + ("_corrected" if corrected else "")
            call = lambda x, t=loss_type, c=corrected: grpo(x, old, ref, mask, advantage, t, c)  # noqa: E731
            content[name] = recorded(call, log_prob)
    for loss_type in ("sigmoid", "sigmoid_norm"):
        content[f"dpo_{loss_type}"] = recorded(lambda x, t=loss_type: dpo(x, ref, mask, t), log_prob)
    content["reward"] = recorded(reward, score)
    path = Path(__file__).parents[1] / "tests" / "trl.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
