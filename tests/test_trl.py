"""The losses of tokens against trl's, values and gradients, as scripts/record_trl.py recorded them; and
scripts/speed_trl.py.
"""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

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


@pytest.fixture
def speed_trl(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    return importlib.import_module("speed_trl")


def test_speed_leaves_the_first_steps_out(speed_trl):
    """Steps of 9 and 5 seconds do not count, those of 1, 3 and 2 do."""
    assert speed_trl.median_step([9.0, 14.0, 15.0, 18.0, 20.0]) == 2.0


def test_speed_compares_the_same_steps_in_turns(speed_trl, monkeypatch, capsys):
    """A tiny run of the zoo's side; what stands for trl takes as long as is said here."""
    called = []
    monkeypatch.setattr(speed_trl, "BATCH", 16)
    monkeypatch.setattr(speed_trl, "theirs", lambda *of: called.append(of) or 1e3)
    monkeypatch.setattr(speed_trl.subprocess, "run", faked(speed_trl.subprocess.run))
    monkeypatch.setattr(sys, "argv", ["speed_trl.py", "--steps", "4", "--pairs", "1", "--trl", "some/python"])
    assert speed_trl.main() == 0
    assert (
        called == [("some/python", 4, 1)] and "trl 1000000 ms a step, ratio 0.00" in capsys.readouterr().out
    )


def faked(run):
    """subprocess.run, but for the question whether trl is there."""
    return lambda command, **of: SimpleNamespace(returncode=0) if "-c" in command else run(command, **of)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--trl", "no/python"], "--trl no/python: No such file"),
        (["--steps", "3"], "--steps 3 --pairs 3: at least 4 steps"),
        (["--step", "3"], "Unrecognized options: --step, 3; perhaps you meant --steps"),
    ],
)
def test_speed_refuses_in_one_line(argv, words, speed_trl, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speed_trl.py", *argv])
    assert speed_trl.main() == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {words}") and errors.count("\n") == 1
