"""Measure the agents of tokens: how far from the exact optimum on Count, what they reach on Sort and Add,
over-optimisation.

    python scripts/tokens.py count sort over                  what is missing in results/tokens/, one run
    after another python scripts/tokens.py count --methods ppo grpo --seeds 1 2
    python scripts/tokens.py --plot                           results/tokens/over_optimisation.png from its
    curves

A run's seed draws everything anew: the task's prompts on Count, the reference, the noise.
results/tokens/TABLE.csv gets a row a run: its final evaluation and the seconds it took; those of `over` also
leave their curves.
"""

import argparse
import csv
import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

from zoo import dpo, grpo_tokens, rlhf
from zoo.common.args import lookup_in
from zoo.common.cli import parse

RESULTS = Path(__file__).parents[1] / "results" / "tokens"

PPO = "--env Sort --reward rule"
REINFORCE = "--no-critic --num-epochs 1 --num-minibatches 1 --learning-rate 3e-3"
OVER = "--env Sort --comparisons {} --beta {} --ensemble {} --total-steps 25600 --eval-every 0"
TABLES: dict[str, dict[str, tuple[ModuleType, str]]] = {
    "count": {  # beta .5 but for ppo_100k
        "ppo": (rlhf, "--env Count --reward rule"),
        "ppo_100k": (rlhf, "--env Count --reward rule --beta 0.3 --total-steps 100000"),
        "reinforce": (rlhf, "--env Count --reward rule " + REINFORCE),
        "grpo": (grpo_tokens, "--env Count"),
        "grpo_paper": (
            grpo_tokens,
            "--env Count --std --length response --kl k3 --kl-in loss --kl-level token",
        ),
        "grpo_process": (grpo_tokens, "--env Count --level process"),
        "dpo_20k": (dpo, "--env Count"),
        "dpo_50k": (dpo, "--env Count --comparisons 50000 --total-steps 300000"),
        "dpo_online": (dpo, "--env Count --online 4"),
    },
    "sort": {
        "ppo": (rlhf, PPO),
        "grpo": (grpo_tokens, "--env Sort"),
        "dpo": (dpo, "--env Sort"),
        "dpo_online": (dpo, "--env Sort --online 5"),
        "reward_model": (rlhf, "--env Sort --stage reward"),
        "ptx": (rlhf, PPO + " --supervised-steps 400 --other 0.9 --ptx 0.3"),
        "no_ptx": (rlhf, PPO + " --supervised-steps 400 --other 0.9"),
        "add_ppo": (rlhf, "--env Add --reward rule"),
        "add_grpo": (grpo_tokens, "--env Add"),
    },
    "over": {
        f"pairs{pairs}_beta{beta}_models{models}": (rlhf, OVER.format(pairs, beta, models))
        for pairs, beta, models in (
            (1000, 0, 1),
            (1000, 0, 4),
            (1000, 0.3, 1),
            (10000, 0, 1),
            (10000, 0.3, 1),
        )
    },
}


def last_values(folder: Path) -> dict[str, str]:
    """The evaluation's columns of a run's last row."""
    with open(folder / "progress.csv", newline="") as file:
        row = list(csv.DictReader(file))[-1]
    return {
        name.removeprefix("eval_"): value for name, value in row.items() if name.startswith("eval_") and value
    }


def add_row(path: Path, row: dict[str, str]) -> None:
    """Append to a table, widening it where needed."""
    rows: list[dict[str, str]] = []
    if path.exists():
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    columns = list(dict.fromkeys(name for each in [*rows, row] for name in each))
    with open(path, "w", newline="") as table:
        writer = csv.DictWriter(table, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, row])


def measure(table: str, method: str, seed: int) -> None:
    """One run, unless its row is there."""
    path = RESULTS / f"{table}.csv"
    if path.exists():
        with open(path, newline="") as file:
            if any((row["method"], row["seed"]) == (method, str(seed)) for row in csv.DictReader(file)):
                return
    agent, flags = TABLES[table][method]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        own = ["--seed", str(seed), "--run-dir", str(folder), "--no-progress"]
        argv = [*shlex.split(flags), *own]
        if "--stage reward" in flags:
            run(agent, [*argv, "--stage", "supervised"])
        start = time.perf_counter()
        run(agent, argv)
        seconds = time.perf_counter() - start
        stage = folder if agent is not rlhf else folder / ("reward" if "--stage reward" in flags else "ppo")
        values = last_values(stage)
        if agent is rlhf and "reward" not in stage.name:
            before = last_values(folder / "supervised")
            values |= {f"before_{name}": before[name] for name in ("exact", "other") if name in before}
        if table == "over":
            values |= {"accuracy": last_values(folder / "reward")["accuracy"]}
            shutil.copy(stage / "progress.csv", RESULTS / f"over_{method}__{seed}.csv")
        add_row(path, {"method": method, "seed": str(seed), "seconds": f"{seconds:.0f}", **values})
    print(table, method, seed, values, f"{seconds:.0f} s", flush=True)


def run(agent: ModuleType, argv: list[str]) -> None:
    """An agent's command line in this process."""
    agent.train(parse(agent.Args, lookup_in(agent.Args), argv))


def plot() -> None:
    """Proxy (dashed) and rule (solid) against the KL, a colour a setting, a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharex=True)
    for number, method in enumerate(TABLES["over"]):
        for i, path in enumerate(sorted(RESULTS.glob(f"over_{method}__*.csv"))):
            with open(path, newline="") as file:
                rows = list(csv.DictReader(file))
            kl = [max(float(row["kl"]), 0.0) ** 0.5 for row in rows]
            style = dict(color=f"C{number}", label=method.replace("_", ", ") if i == 0 else None, linewidth=1)
            left.plot(kl, [float(row["score"]) for row in rows], **style)
            right.plot(kl, [float(row["rule_reward"]) for row in rows], **style)
    left.set(
        xlabel="square root of KL(policy || reference), nats", ylabel="reward model's score, in log-odds"
    )
    right.set(xlabel="square root of KL(policy || reference), nats", ylabel="reward by the rule")
    left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS / "over_optimisation.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="which tables")
    parser.add_argument("--methods", nargs="*", help="only these")
    parser.add_argument("--seeds", nargs="*", type=int, help="5 on Count, else 3")
    parser.add_argument("--plot", action="store_true", help="draw the figure of over-optimisation")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for table in args.tables:
        unknown = set(args.methods or []) - set(TABLES[table])
        if unknown:
            sys.exit(f"error: --methods {' '.join(sorted(unknown))}: {table} has {', '.join(TABLES[table])}")
        for seed in args.seeds or range(1, 6 if table == "count" else 4):
            for method in args.methods or TABLES[table]:
                measure(table, method, seed)
    if args.plot:
        plot()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
