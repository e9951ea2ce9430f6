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

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BATCH, GROUP, EPOCHS, MINIBATCHES, DIGITS, WARM = 256, 8, 4, 2, 8, 2  # the zoo's defaults on Sort


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
    command = [python, str(Path(__file__).resolve()), "--peer", "--steps", str(steps), "--seed", str(seed)]
    return float(json.loads(finished(command).splitlines()[-1]))


def finished(command: list[str]) -> str:
    """What a command printed. Ends the program with its last line where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"error: {Path(command[1]).name}: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
    return done.stdout


def median_step(times: list[float]) -> float:
    """The median difference of the times at which steps ended, the first left out."""
    return statistics.median(b - a for a, b in zip(times[WARM - 1 :], times[WARM:], strict=False))


def peer(steps: int, seed: int) -> float:
    """The other side, where trl is installed: its seconds a step."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    words = [*map(str, range(10)), "sort", "reverse", "end"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="end"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    processing = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="end", pad_token="end")
    digits = torch.randint(
        10, (steps * BATCH // GROUP, DIGITS), generator=torch.Generator().manual_seed(seed)
    )
    prompts = [" ".join([*map(str, row), "sort"]) for row in digits.tolist()]
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(words), n_positions=2 * DIGITS + 1, n_embd=64, n_layer=2, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=12, eos_token_id=12,
        )
    )  # fmt: skip

    def reward(prompts, completion_ids, **_) -> list[float]:
        """The share of right digits."""
        answers = [sorted(map(int, prompt.split()[:-1])) for prompt in prompts]
        pairs = zip(answers, completion_ids, strict=True)
        return [sum(a == b for a, b in zip(answer, ids, strict=True)) / DIGITS for answer, ids in pairs]

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step % (EPOCHS * MINIBATCHES) == 0:
                times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder, seed=seed, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
            save_strategy="no", logging_strategy="no", gradient_checkpointing=False, learning_rate=1e-3,
            per_device_train_batch_size=BATCH // MINIBATCHES, steps_per_generation=MINIBATCHES,
            num_iterations=EPOCHS, num_generations=GROUP, max_completion_length=DIGITS, beta=0.05,
            loss_type="dr_grpo", scale_rewards="none", epsilon=0.2, max_grad_norm=1.0, temperature=1.0,
            max_steps=steps * EPOCHS * MINIBATCHES, generation_kwargs={"min_new_tokens": DIGITS},
        )  # fmt: skip
        trainer = GRPOTrainer(
            model, reward, settings, Dataset.from_dict({"prompt": prompts}), processing_class=processing,
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return median_step(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trl", help="Python interpreter that has trl")
    parser.add_argument("--steps", type=int, default=12, help="steps of a run, the first two not counted")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs")
    parser.add_argument("--seed", type=int, default=1, help="that of the first pair")
    parser.add_argument("--peer", action="store_true", help="be the other side, alone")
    args = parser.parse_args()
    if args.steps <= WARM:
        sys.exit(f"error: --steps must be more than {WARM}, not {args.steps}")
    if args.peer:
        print(json.dumps(peer(args.steps, args.seed)))
        return
    if not args.trl or subprocess.run([args.trl, "-c", "import trl"], capture_output=True).returncode:
        sys.exit(f"error: --trl {args.trl}: a Python that has trl is meant, see the top of this file")
    ratios = []
    for pair in range(args.pairs):
        seed, seconds = args.seed + pair, {}
        for side in ("zoo", "trl") if pair % 2 == 0 else ("trl", "zoo"):
            seconds[side] = ours(args.steps, seed) if side == "zoo" else theirs(args.trl, args.steps, seed)
        ratios.append(seconds["zoo"] / seconds["trl"])
        figures = " | ".join(f"{name} {1e3 * value:.0f} ms" for name, value in sorted(seconds.items()))
        print(f"pair {pair + 1}: {figures} a step, zoo / trl {ratios[-1]:.2f}", flush=True)
    print(f"median zoo / trl {statistics.median(ratios):.2f} [{min(ratios):.2f} .. {max(ratios):.2f}]")


if __name__ == "__main__":
    main()
