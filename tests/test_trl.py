"""The losses of tokens against trl's, values and gradients, as scripts/record_trl.py recorded them."""

import json
from pathlib import Path

import pytest
import torch
from torch.func import grad_and_value

from zoo.dpo import dpo_loss, sequence_log_prob
from zoo.grpo_tokens import Args, Group, grpo_loss
from zoo.rlhf import ranking_loss

TRL = json.loads((Path(__file__).parent / "trl.json").read_text())
INPUTS = {
    name: torch.tensor(value, dtype=torch.bool if name == "mask" else torch.float64)
    for name, value in TRL["inputs"].items()
}
LENGTH = {"grpo": "response", "bnpo": "batch", "dapo": "batch", "dr_grpo": "constant"}


def compare(loss, argument, name):
    gradient, value = grad_and_value(loss)(argument)
    assert value.item() == pytest.approx(TRL[name]["loss"], rel=1e-7)
    torch.testing.assert_close(
        gradient, torch.tensor(TRL[name]["gradient"], dtype=torch.float64), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("loss_type", LENGTH)
def test_grpo(loss_type, corrected):
    mask, advantage = INPUTS["mask"], INPUTS["advantage"][:, None] * INPUTS["mask"]
    batch = Group(None, None, mask, INPUTS["old"], INPUTS["ref"], advantage)
    args = Args(
        beta=0.04,
        clip=0.2,
        length=LENGTH[loss_type],
        kl="k3",
        kl_in="loss",
        kl_level="token",
        kl_correction=corrected,
    )
    compare(lambda x: grpo_loss(x, batch, args)[0], INPUTS["log_prob"], loss_type + "_corrected" * corrected)


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm"])
def test_dpo(loss_type):
    def loss(log_prob):
        sums = (
            sequence_log_prob(x, INPUTS["mask"], loss_type == "sigmoid_norm")
            for x in (log_prob, INPUTS["ref"])
        )
        (chosen, rejected), (ref_chosen, ref_rejected) = (x.chunk(2) for x in sums)
        return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.1, 0.0)[0]

    compare(loss, INPUTS["log_prob"], f"dpo_{loss_type}")


def test_reward_model():
    compare(lambda score: ranking_loss(torch.stack(score.chunk(2), 1))[0], INPUTS["score"], "reward")
