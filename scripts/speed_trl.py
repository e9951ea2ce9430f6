"""How fast grpo_tokens.py is beside trl's GRPOTrainer on this machine, in alternating runs.

    python -m venv trl && trl/bin/pip install trl==1.16.0
    python scripts/speed_trl.py --trl trl/bin/python

A step, on both sides: 256 responses of 8 tokens to 32 prompts of Sort are sampled, scored by the rule, given
their log-probabilities under policy and reference, and learned from in 4 passes of 2 minibatches by Adam. The
GPT is the same: 2 blocks, 4 heads, width 64, 17 positions; trl's is transformers' GPT2LMHeadModel, which ties
its head to the embedding and has one token more, an end, that it may not write. One thread, float32, eager;
trl has gradient checkpointing, dropout and logging switched off. A side's figure is the median over a run's
steps, the first two left out; absolute ones mean little on a busy machine, their ratio in a pair more.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from zoo.common.cli import script_main
from zoo.common.errors import RunFault, UsageError

ROOT = Path(__file__).resolve().parents[1]
BATCH, GROUP, EPOCHS, MINIBATCHES, DIGITS, WARM = 256, 8, 4, 2, 8, 2  # the zoo's defaults on Sort


@dataclass
class Args:
    trl: str = sys.executable
    """Python interpreter that has trl"""
    steps: int = 12
    """steps of a run, the first two not counted"""
    pairs: int = 3
    """pairs of runs"""


def ours(steps: int, seed: int) -> float:
    """Seconds a step of zoo/grpo_tokens.py."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        command = [sys.executable, str(ROOT / "zoo" / "grpo_tokens.py"), "--env", "Sort", "--device", "cpu"]
        command += ["--batch-size", str(BATCH), "--group-size", str(GROUP), "--num-epochs", str(EPOCHS)]
        command += ["--num-minibatches", str(MINIBATCHES), "--digits", str(DIGITS), "--seed", str(seed)]
        command += ["--total-steps", str(steps * BATCH), "--supervised-steps", "0", "--eval-every", "0"]
        finished([*command, "--no-progress", "--run-dir", str(folder)])
        with open(folder / "progress.csv", newline="") as file:
            times = [float(row["wall_time"]) for row in csv.DictReader(file)]
    return median_step(times)


def theirs(python: str, steps: int, seed: int) -> float:
    """Seconds a step of trl."""
    peer = Path(__file__).with_name("speed_trl_peer.py")
    settings = (steps, seed, BATCH, GROUP, EPOCHS, MINIBATCHES, DIGITS)
    return median_step(json.loads(finished([python, str(peer), *map(str, settings)]).splitlines()[-1]))


def finished(command: list[str]) -> str:
    """What a command printed. Raises RunFault with its last line where it fails."""
    path = os.pathsep.join((str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])))
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    if done.returncode:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        raise RunFault(f"{Path(command[1]).name} failed ({done.returncode}): {last}")
    return done.stdout


def median_step(times: list[float]) -> float:
    """The median difference of the times at which steps ended, the first left out."""
    return statistics.median(b - a for a, b in zip(times[WARM - 1 :], times[WARM:], strict=False))


def compare(args: Args) -> None:
    """Pairs of runs, each side first in turn. Raises UsageError, RunFault."""
    if args.steps <= WARM + 1 or args.pairs < 1:
        raise UsageError(
            f"--steps {args.steps} --pairs {args.pairs}: at least {WARM + 2} steps and one pair are needed"
        )
    try:
        found = subprocess.run([args.trl, "-c", "import trl"], capture_output=True).returncode
    except OSError as error:
        raise UsageError(f"--trl {args.trl}: {error.strerror}") from error
    if found != 0:
        raise UsageError(f"--trl {args.trl}: that Python has no trl; --help says how to install it")
    ratios = []
    for pair in range(1, args.pairs + 1):
        sides = {"zoo": lambda: ours(args.steps, pair), "trl": lambda: theirs(args.trl, args.steps, pair)}  # noqa: B023
        seconds = {name: sides[name]() for name in (list(sides) if pair % 2 else reversed(sides))}
        ratios.append(seconds["zoo"] / seconds["trl"])
        print(
            f"pair {pair}: zoo {1e3 * seconds['zoo']:.0f} | trl {1e3 * seconds['trl']:.0f} ms a step, "
            f"ratio {ratios[-1]:.2f}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.2f} [{min(ratios):.2f} .. {max(ratios):.2f}]")


def main() -> int:
    """Measure, and tell in one line what is wrong; the exit status."""
    return script_main(Args, __doc__, compare)


if __name__ == "__main__":
    sys.exit(main())
