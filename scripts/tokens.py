"""Measure the agents of tokens: how far from the exact optimum on Count, what they reach on Sort and Add,
over-optimisation of a reward model.

    python scripts/tokens.py count sort add ptx over          what is missing, one run after another
    python scripts/tokens.py count --methods ppo grpo --seeds 1 2
    python scripts/tokens.py --summary                  the tables as they stand in the README
    python scripts/tokens.py --plot                     the figures of what is there

A run's seed draws everything anew: the task's prompts on Count, the reference, the noise. The same command
goes on where it was stopped. Several may run at once.

    RESULTS/TABLE.csv                   a row a run: command, last evaluation, seconds by clock and processor
                                        (of rlhf.py its last stage's)
    RESULTS/TABLE_METHOD__SEED.csv      of all but Count its curve
    RESULTS/over_optimisation.png, sort.png     needs the extra `plots`
    RUNS/                               supervised and reward models that several runs go on from
"""

import csv
import importlib.util
import io
import json
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated

import numpy as np
import tyro

from zoo import dpo, grpo_tokens, rlhf
from zoo.common.args import lookup_in, require
from zoo.common.cli import parse, script_main
from zoo.common.errors import UsageError
from zoo.common.files import lock_folder, make_folder, write_atomically, writing

Row = dict[str, str]

RULE = "--reward rule"
REINFORCE = (
    "--no-critic --batch-size 256 --num-epochs 1 --num-minibatches 1 "
    "--learning-rate 8e-3 --max-grad-norm 0.05"
)
PAPER = "--std --length response --kl k3 --kl-in loss --kl-level token"
TWO_TASKS = "--supervised-steps 200 --other 0.9"  # reversing is learned well, sorting badly
OVER = "--env Sort --comparisons {} --beta {} --ensemble {} --total-steps 15360 --eval-every 0"
TABLES: dict[str, dict[str, tuple[ModuleType, str]]] = {
    "count": {
        "ppo": (rlhf, f"--env Count {RULE}"),
        "ppo_100k": (rlhf, f"--env Count {RULE} --beta 0.3 --total-steps 100000"),
        "grpo": (grpo_tokens, "--env Count"),
        "grpo_paper": (grpo_tokens, f"--env Count {PAPER}"),
        "grpo_process": (grpo_tokens, "--env Count --level process"),
        "reinforce": (rlhf, f"--env Count {RULE} {REINFORCE}"),
        "dpo_20k": (dpo, "--env Count"),
        "dpo_online": (dpo, "--env Count --online 4"),
        "dpo_50k": (dpo, "--env Count --comparisons 50000 --total-steps 300000"),
    },
    "sort": {
        "ppo": (rlhf, f"--env Sort {RULE}"),
        "grpo": (grpo_tokens, "--env Sort"),
        "dpo": (dpo, "--env Sort"),
        "dpo_online": (dpo, "--env Sort --online 5"),
    },
    "ptx": {
        "with": (rlhf, f"--env Sort {RULE} {TWO_TASKS} --ptx 0.3"),
        "without": (rlhf, f"--env Sort {RULE} {TWO_TASKS}"),
    },
    "add": {"ppo": (rlhf, f"--env Add {RULE}"), "grpo": (grpo_tokens, "--env Add")},
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
SEEDS = {"count": 5}  # the others 3
WORDS = ("method", "command", "commit")  # the other columns are numbers
CURVE = ("kl", "score", "rule_reward", "eval_exact", "eval_reward", "eval_kl", "eval_other")


def read(path: Path, *filled: str) -> list[Row]:
    """The rows of a table; of one that is not there none.

    filled: columns that have something in every row. Raises UsageError where they have not, or anything else
    is damaged.
    """
    if not path.exists():
        return []
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        for number, row in enumerate(rows, 1):
            lacking = [name for name in filled if not row.get(name)]
            require(not lacking, f"{path}: row {number} lacks {', '.join(lacking)}")
            require(None not in (*row, *row.values()), f"{path}: row {number} is not as long as the header")
            for name in row.keys() - set(WORDS):
                float(row[name] or 0)
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{path}: is no table of this script: {error}") from error
    return rows


def read_table(results: Path, table: str) -> list[Row]:
    """The rows of one of TABLES. Raises UsageError."""
    return read(results / f"{table}.csv", "method", "seed", "command")


def write(path: Path, rows: list[Row]) -> None:
    """A table of all columns that a row has, whole or not at all."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def last_values(folder: Path) -> Row:
    """The last evaluation of a run."""
    row = read(folder / "progress.csv")[-1]
    return {name[5:]: f"{float(row[name]):.6g}" for name in row if name.startswith("eval_") and row[name]}


def curve(folder: Path) -> list[Row]:
    """What is kept of a run's table."""
    rows = read(folder / "progress.csv")
    columns = [name for name in CURVE if any(row.get(name) for row in rows)]
    short = {name: [row[name] and f"{float(row[name]):.4g}" for row in rows] for name in columns}
    return [{"step": row["step"]} | {n: short[n][i] for n in columns} for i, row in enumerate(rows)]


def train(agent: ModuleType, argv: list[str], folder: Path) -> None:
    """An agent's command line, in this process."""
    argv = [*argv, "--run-dir", str(folder), "--no-progress"]
    agent.train(parse(agent.Args, lookup_in(agent.Args), argv))


def earlier_stages(argv: list[str], runs: Path) -> Path:
    """The folder of the supervised and the reward model that such a run of rlhf.py goes on from, which are
    made if they are not there. They depend on some of the arguments only, so that several runs share them.
    Waits for another process that makes them. Raises UsageError, RunFault.
    """
    args = parse(rlhf.Args, lookup_in(rlhf.Args), argv)
    name = f"{args.env}_steps{args.supervised_steps}_other{args.other:g}"
    if args.reward == "model":
        name += f"_pairs{args.comparisons}_models{args.ensemble}"
    folder = runs / f"{name}__{args.seed}"
    make_folder(folder, "--runs")
    with lock_folder(folder, "--runs", wait=True):
        for stage in ("supervised", "reward")[: 1 + (args.reward == "model")]:
            if not (folder / stage / "agent.pt").exists():
                shutil.rmtree(folder / stage, ignore_errors=True)  # what a kill has left of it
                train(rlhf, [*argv, "--stage", stage], folder)
    return folder


def measure(table: str, method: str, seed: int, results: Path, runs: Path) -> None:
    """One run, unless its row is there."""
    run = method, str(seed)
    if any((row["method"], row["seed"]) == run for row in read_table(results, table)):
        return
    agent, flags = TABLES[table][method]
    name = agent.__name__.rpartition(".")[2]
    argv = [*shlex.split(flags), "--seed", str(seed)]
    values: Row = {}
    if agent is rlhf:
        earlier = earlier_stages(argv, runs)
        argv += ["--stage", "ppo", "--earlier", str(earlier)]
        for stage in ("supervised", "reward"):
            if table != "count" and (earlier / stage).exists():
                known = last_values(earlier / stage)
                known.pop("kl", None)  # to a network that has learned nothing
                values |= {f"{stage}_{key}": value for key, value in known.items()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        clock, processor = time.perf_counter(), time.process_time()
        train(agent, argv, folder)
        clock, processor = time.perf_counter() - clock, time.process_time() - processor
        last = folder / "ppo" if agent is rlhf else folder
        values = last_values(last) | values
        commit = json.loads((last / "args.json").read_text())["commit"] or ""
        if table != "count":
            write(results / f"{table}_{method}__{seed}.csv", curve(last))
    row = {"method": method, "seed": str(seed), "seconds": f"{clock:.0f}", "processor": f"{processor:.0f}"}
    row |= {"command": f"python zoo/{name}.py {flags}", "commit": commit[:7] + commit[40:], **values}
    with lock_folder(results, "--results", wait=True):  # another process may add to it, even the same run
        rows = [each for each in read_table(results, table) if (each["method"], each["seed"]) != run]
        write(results / f"{table}.csv", [*rows, row])
    print(table, method, seed, values, f"{clock:.0f} s", flush=True)


def spread(rows: list[Row], column: str) -> str:
    """Mean and standard deviation of a column over a method's runs; the extremes in brackets."""
    found = [float(row[column]) for row in rows if row.get(column)]
    if not found:
        return ""
    std = f" ± {statistics.stdev(found):.2g}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.3g}{std} [{min(found):.3g} .. {max(found):.3g}]"


def summary(results: Path) -> None:
    """The tables in Markdown, a line a method."""
    for table, methods in TABLES.items():
        if not (rows := read_table(results, table)):
            continue
        columns = [name for name in dict.fromkeys(n for row in rows for n in row) if name not in ("method",)]
        columns = [name for name in columns if name not in ("seed", "command", "commit", "processor")]
        print(f"\n| {table} | seeds |", " | ".join(columns), "|\n|" + "---|" * (len(columns) + 2))
        for method in methods:
            if own := [row for row in rows if row["method"] == method]:
                figures = " | ".join(spread(own, column) for column in columns)
                print(f"| `{own[0]['command'][11:]}` | {len(own)} | {figures} |")


def plot_sort(results: Path) -> None:
    """The share of held-out prompts sorted without a mistake, a colour a method: its seeds and their mean."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for number, (method, (agent, flags)) in enumerate(TABLES["sort"].items()):
        curves = []
        for path in sorted(results.glob(f"sort_{method}__*.csv")):
            rows = [row for row in read(path, "step") if row.get("eval_exact")]
            curves.append([(float(row["step"]), 100 * float(row["eval_exact"])) for row in rows])
            axes.plot(*zip(*curves[-1], strict=True), color=f"C{number}", linewidth=0.7, alpha=0.5)
        if curves:
            whole = len({len(points) for points in curves}) == 1
            require(whole, f"--results {results}: the curves of sort_{method} are not of one length")
            together = zip(*curves, strict=True)
            mean = [tuple(map(statistics.mean, zip(*points, strict=True))) for points in together]
            name, count = agent.__name__.rpartition(".")[2], len(curves)
            command = f"{name}.py {flags.removeprefix('--env Sort').strip()}".strip()
            label = f"{command}, {count} seed{'s' * (count > 1)}"
            axes.plot(*zip(*mean, strict=True), color=f"C{number}", linewidth=2, label=label)
    axes.set(
        title="Sort: 8 digits, prompts held out", ylabel="sorted without a mistake, %", ylim=(0, 100),
        xlabel="responses written (DPO: comparisons visited)",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center right")
    figure.tight_layout()
    figure.savefig(results / "sort.png", dpi=110)


def plot_over_optimisation(results: Path) -> None:
    """The reward model's score and the rule's reward against the KL, a colour a setting, a line a seed: means
    over a tenth of a run's updates."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), sharex=True, layout="constrained")
    for number, method in enumerate(TABLES["over"]):
        pairs, beta, models = (
            part.lstrip("abcdefghijklmnopqrstuvwxyz") for part in method.split("_")
        )  # pairs1000_beta0_models1
        label = f"{int(pairs):,} comparisons, {models} model{'s' * (models != '1')}, β = {beta}"
        for i, path in enumerate(sorted(results.glob(f"over_{method}__*.csv"))):
            rows = read(path, "kl", "score", "rule_reward")
            each = max(len(rows) // 10, 1)

            def smooth(values: list[float], each: int = each) -> np.ndarray:
                return np.convolve(values, np.full(each, 1 / each), "valid")

            kl = smooth([max(float(row["kl"]), 0.0) ** 0.5 for row in rows])
            for axes, column in ((left, "score"), (right, "rule_reward")):
                value = smooth([float(row[column]) for row in rows])
                axes.plot(kl, value, f"C{number}", label=label if i == 0 else None, linewidth=1)
                axes.plot(kl[-1:], value[-1:], f"C{number}o", markersize=4)
    left.set(title="what it is paid: the reward model's score", ylabel="log-odds, about 0 at the start")
    right.set(title="what is meant: the rule's reward", ylabel="share of digits that are right")
    for axes in (left, right):
        axes.set_xlabel("square root of KL(policy || reference), nats")
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(results / "over_optimisation.png", dpi=110)


@dataclass
class Args:
    tables: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """what to measure: count, sort, add, ptx, over"""
    methods: tuple[str, ...] = ()
    """only these of each table"""
    seeds: tuple[int, ...] = ()
    """seeds (default: 1 to 5 on count, else 1 to 3)"""
    summary: bool = False
    """print the tables"""
    plot: bool = False
    """draw the figures of what is there"""
    results: Path = Path("results/tokens")
    """where rows and curves are kept"""
    runs: Path = Path("runs/tokens")
    """where shared stages are kept"""


def main() -> int:
    """Do what the arguments say, or tell in one line what is wrong; the exit status."""
    return script_main(Args, __doc__, work, interrupted="interrupted; the same command goes on")


def check(args: Args) -> None:
    """Refuse what cannot work. Raises UsageError."""
    tables = ", ".join(TABLES)
    require(bool(args.tables) or args.summary or args.plot, f"name a table, --summary or --plot: {tables}")
    methods = [method for table in args.tables for method in TABLES.get(table, ())]
    for given, known in ((args.tables, list(TABLES)), (args.methods, methods)):
        unknown = sorted(set(given) - set(known))
        told = (
            f"{' '.join(unknown)}: there is no such; there are {', '.join(known) or 'none without a table'}"
        )
        require(not unknown, told)
    for seed in args.seeds:
        require(0 <= seed < 2**31, f"--seeds {seed}: a seed lies in [0, 2**31)")


def work(args: Args) -> None:
    """The runs that are missing, the tables and the figures asked for. Raises UsageError, RunFault."""
    check(args)
    found = importlib.util.find_spec("matplotlib") is not None
    require(found or not args.plot, "--plot needs matplotlib, which is missing: pip install -e '.[plots]'")
    if args.tables:
        make_folder(args.results, "--results")
    with writing(args.results):
        for table in args.tables:
            for seed in args.seeds or range(1, SEEDS.get(table, 3) + 1):
                for method in TABLES[table]:
                    if not args.methods or method in args.methods:
                        measure(table, method, seed, args.results, args.runs)
    if args.summary:
        measured = any(read_table(args.results, table) for table in TABLES)
        require(measured, f"--results {args.results}: holds no table; TABLE measures one")
        summary(args.results)
    if args.plot:
        import matplotlib

        matplotlib.use("Agg")
        figures = {"over": plot_over_optimisation, "sort": plot_sort}
        there = [table for table in figures if any(args.results.glob(f"{table}_*__*.csv"))]
        require(bool(there), f"--results {args.results}: holds no curves of {' or '.join(figures)}")
        with writing(args.results):
            for table in there:
                figures[table](args.results)


if __name__ == "__main__":
    sys.exit(main())
