"""Run the diffusion agents' experiments over seeds, keep their curves in results/diffusion/, and draw its
pictures.

    python scripts/diffusion.py                         all that is not there yet, the table and the pictures
    python scripts/diffusion.py --only line_return ring_none --seeds 3      seeds 1 to 3 of two of them
    python scripts/diffusion.py --no-run                the table and the pictures of what is there

Every run is a process of its own on one core; the same command goes on where it was stopped.

    RUNS/NAME/seed_N/            the run's folder, and beside it what it said, seed_N.log
    RESULTS/NAME/seed_N.csv      its evaluations
    RESULTS/table.csv            the last evaluations, mean and standard deviation over seeds
    RESULTS/NAME/experiment.json       command, versions, machine, and the commit of each seed

Needs the extra `plots`, and `digits` for the digits.
"""

import contextlib
import csv
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from benchmark import POLL, last_line, stop_signals
from diffusion_plots import draw

from zoo.common.args import require
from zoo.common.cli import script_main
from zoo.common.errors import RunFault, UsageError
from zoo.common.files import lock_folder, make_folder, write_atomically, writing

ROOT = Path(__file__).resolve().parents[1]


class Experiment(NamedTuple):
    """An agent's command line, and how many seeds of it."""

    agent: str
    args: str = ""
    seeds: int = 5


DATA_COEF = 0.1
CLIPPED = "--method is --num-epochs 4 --minibatch-size 1280 --total-steps 51200"
EXPERIMENTS: dict[str, Experiment] = {
    "line_return": Experiment("ddpo"),
    "line_is_return": Experiment("ddpo", "--method is"),
    "line_loss": Experiment("ddpo", "--kl loss"),
    "line_is_loss": Experiment("ddpo", "--method is --kl loss"),
    "line_log_ratio": Experiment("ddpo", "--kl log-ratio"),
    "line_none": Experiment("ddpo", "--kl none"),
    "line_is_none": Experiment("ddpo", "--method is --kl none --total-steps 51200"),
    **{
        f"line_{place}_{beta}": Experiment("ddpo", f"--kl {place} --beta {beta}", 3)
        for place in ("return", "loss")
        for beta in ("1", "0.25", "0.1")
    },
    **{
        f"clip_{clip}": Experiment("ddpo", f"{CLIPPED} --clip {clip}", 3)
        for clip in ("0.0001", "0.001", "0.01", "0.2")
    },
    "clip_None": Experiment("ddpo", CLIPPED, 3),
    "ring_return": Experiment("ddpo", "--env ring"),
    "ring_none": Experiment("ddpo", "--env ring --kl none"),
    "dpo_trajectory": Experiment("diffusion_dpo", "--loss trajectory"),
    "dpo_standard": Experiment("diffusion_dpo", "--loss standard"),
    "dpo_separate": Experiment("diffusion_dpo", "--loss standard --no-shared-noise", 3),
    "dpo_constant": Experiment("diffusion_dpo", "--loss standard --weight constant", 3),
    "dpo_d3po": Experiment("diffusion_dpo", "--loss d3po --total-steps 81920", 3),
    "dpo_notes35": Experiment("diffusion_dpo", "--loss notes35"),
    "digits_return": Experiment("ddpo", "--env digits", 3),
    "digits_0.8": Experiment("ddpo", "--env digits --beta 0.8", 3),
    "digits_none": Experiment("ddpo", "--env digits --kl none", 3),
    # a KL, an extra pretraining loss, both; neither is line_none
    "data_loss": Experiment("ddpo", f"--kl none --data-coef {DATA_COEF}", 3),
    "data_loss_return": Experiment("ddpo", f"--data-coef {DATA_COEF}", 3),
    **{
        f"{task}_{policy}": Experiment(
            "dppo", f"--env {env} --data results/dppo/{env} --policy {policy}", seeds
        )
        for task, env, seeds in (("pendulum", "Pendulum-v1", 5), ("hopper", "Hopper-v4", 3))
        for policy in ("diffusion", "gaussian")
    },
}


@dataclass
class Args:
    only: tuple[str, ...] = ()
    """names of experiments; none: all"""
    seeds: int | None = None
    """seeds 1 to this; None: as many as the experiment has"""
    jobs: int = 2
    """runs at a time"""
    run: bool = True
    """make the runs that are missing"""
    plot: bool = True
    """draw the pictures"""
    runs: Path = Path("runs/diffusion")
    """where the runs' folders are"""
    results: Path = Path("results/diffusion")
    """where curves, table and pictures go"""


def command(name: str, seed: int, folder: Path) -> list[str]:
    """The command line of one run: a new one, or a stopped one resumed."""
    experiment = EXPERIMENTS[name]
    script = [sys.executable, str(ROOT / "zoo" / f"{experiment.agent}.py"), "--no-progress"]
    if (folder / "checkpoint.pt").exists():
        return [*script, "--resume", str(folder)]
    return [*script, *shlex.split(experiment.args), "--seed", str(seed), "--run-dir", str(folder)]


def start(name: str, seed: int, folder: Path) -> subprocess.Popen:
    """Start one run, its output going to a log beside its folder."""
    path = os.pathsep.join((str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])))
    environment = {**os.environ, "PYTHONPATH": path}  # this checkout's zoo, whatever is installed
    with open(log_of(folder), "w") as log:
        # A session of its own: Ctrl-C on the terminal would reach the run too, and a second signal skips its
        # checkpoint.
        return subprocess.Popen(
            command(name, seed, folder.absolute()), stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True,
        )  # fmt: skip


def log_of(folder: Path) -> Path:
    """What the run in a folder said."""
    return folder.with_name(folder.name + ".log")


def outcome(log: Path) -> str:
    """What a run said of its end."""
    lines = log.read_text(errors="replace").splitlines()
    told = [line for line in lines if line.startswith(("final evaluation", "error: "))]
    return told[-1] if told else last_line(log)


def write(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """These columns of the rows, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def commits_of(results: Path) -> dict[str, str | None]:
    """By which commit each seed of an experiment was made. Raises OSError, ValueError, KeyError."""
    path = results / "experiment.json"
    if not path.exists():
        return {}
    made = json.loads(path.read_text())
    seeds = [kept.stem.removeprefix("seed_") for kept in sorted(results.glob("seed_*.csv"))]
    return made["commits"] if "commits" in made else dict.fromkeys(seeds, made["commit"])


def record(name: str, seed: int, folder: Path, results: Path) -> None:
    """Take a finished run into the results: how it was made, then its evaluations, which make it count.

    Raises RunFault.
    """
    try:
        with open(folder / "progress.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if any(row[c] for c in row if c.startswith("eval_"))]
        columns = [column for column in rows[0] if any(row[column] for row in rows)]
        made = json.loads((folder / "args.json").read_text())
        experiment = {
            "command": f"zoo/{EXPERIMENTS[name].agent}.py {EXPERIMENTS[name].args}",
            "versions": made["versions"],
            "commits": commits_of(results) | {str(seed): made["commit"]},
            "machine": made["machine"],
        }
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        what = f"{folder} is not the folder of a finished run, or {results} not that of its results"
        raise RunFault(f"{what} ({type(error).__name__}: {error})") from error
    text = json.dumps(experiment, indent=2) + "\n"
    with writing(results):
        results.mkdir(parents=True, exist_ok=True)
        write_atomically(results / "experiment.json", lambda file: file.write(text.encode()))
        write(results / f"seed_{seed}.csv", rows, columns)


def run_all(jobs: list[tuple[str, int]], args: Args) -> tuple[bool, int]:
    """Make the runs, so many at a time, and keep their evaluations; whether one failed, and a stop signal or
    0. Raises RunFault."""
    queue, running, failed, told = list(jobs), dict[subprocess.Popen, tuple[str, int]](), False, 0
    with stop_signals() as signals, writing(args.runs):
        try:
            while queue or running:
                if len(signals) > told:
                    # the first lets the runs reach a checkpoint, the second ends them at once, the third
                    # kills
                    told = len(signals)
                    queue.clear()
                    for process in running:
                        process.send_signal(signal.SIGINT if told <= 2 else signal.SIGKILL)
                while queue and len(running) < args.jobs:
                    name, seed = queue.pop(0)
                    running[start(name, seed, args.runs / name / f"seed_{seed}")] = name, seed
                for process in [process for process in running if process.poll() is not None]:
                    name, seed = running.pop(process)
                    folder, status = args.runs / name / f"seed_{seed}", process.returncode
                    log = log_of(folder)
                    try:
                        if status == 0:
                            record(name, seed, folder, args.results / name)
                            print(f"{name} seed {seed}: {outcome(log)}", flush=True)
                        elif not signals:
                            raise RunFault(f"exit status {status}: {outcome(log)} (log: {log})")
                    except RunFault as error:
                        failed = True
                        print(f"error: {name} seed {seed}: {error}", file=sys.stderr, flush=True)
                time.sleep(POLL)
        finally:
            for process in running:  # only after an error of this script's own
                process.send_signal(signal.SIGINT)
    return failed, signals[0] if signals else 0


def load(name: str, results: Path) -> list[list[dict[str, float]]]:
    """An experiment's curves: for each seed its evaluations, in order. Raises UsageError."""
    curves = []
    for path in sorted((results / name).glob("seed_*.csv")):
        try:
            text = path.read_text()
            rows = list(csv.DictReader(text.splitlines()))
            whole = rows and text.endswith("\n") and not any(None in (*row, *row.values()) for row in rows)
            require(bool(whole), f"--results: {path} is cut short; once it is deleted the run is kept again")
            curves.append([{key: float(cell) for key, cell in row.items() if cell} for row in rows])
        except (OSError, ValueError, csv.Error) as error:
            raise UsageError(f"--results: {path} is no table of numbers: {error}") from error
    return curves


def write_table(results: Path) -> None:
    """table.csv: a row for each experiment with results."""
    rows = []
    for name, experiment in EXPERIMENTS.items():
        if curves := load(name, results):
            last = [curve[-1] for curve in curves]
            row: dict[str, str | int] = {"experiment": name, "args": experiment.args, "seeds": len(last)}
            if experiment.agent == "dppo":  # its first row is the clone's
                last = [
                    row | {"clone": curve[0]["eval_return"]} for row, curve in zip(last, curves, strict=True)
                ]
            for column in [name for name in last[0] if all(name in final for final in last)]:
                if column.startswith("eval_") or column in ("step", "wall_time", "clipfrac", "clone"):
                    values = np.array([final[column] for final in last])
                    short = column.removeprefix("eval_")
                    row[short] = f"{values.mean():.4g}"
                    row[f"{short}_std"] = f"{values.std(ddof=1):.2g}" if len(values) > 1 else ""
            rows.append(row)
    write(results / "table.csv", rows, list(dict.fromkeys(column for row in rows for column in row)))


def diffusion(args: Args) -> int:
    """Run, tabulate and draw; the exit status. Raises UsageError, RunFault."""
    if unknown := [name for name in args.only if name not in EXPERIMENTS]:
        raise UsageError(f"--only {unknown[0]}: no such experiment; there are {', '.join(EXPERIMENTS)}")
    require(args.jobs >= 1, f"--jobs must be at least 1, not {args.jobs}")
    require(args.seeds is None or args.seeds >= 1, f"--seeds must be at least 1, not {args.seeds}")
    make_folder(args.results, "--results")
    names, failed, stopped = dict.fromkeys(args.only or EXPERIMENTS), False, 0
    jobs = [(name, seed) for name in names for seed in range(1, (args.seeds or EXPERIMENTS[name].seeds) + 1)]
    jobs = [(name, seed) for name, seed in jobs if not (args.results / name / f"seed_{seed}.csv").exists()]
    for name in EXPERIMENTS:
        load(name, args.results)  # what is damaged is told before any work
    if args.run:
        with contextlib.ExitStack() as stack:
            for folder in dict.fromkeys(args.runs / name for name, _ in jobs):
                make_folder(folder, "--runs")
                stack.enter_context(lock_folder(folder, "--runs"))
            failed, stopped = run_all(jobs, args)
    if stopped:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 128 + stopped
    with writing(args.results):
        write_table(args.results)
        if args.plot:
            curves = {name: found for name in EXPERIMENTS if (found := load(name, args.results))}
            for told in draw(curves, args.runs, args.results):
                print(told)
    return int(failed)


def main() -> int:
    """Do what the arguments say, or tell in one line what is wrong; the exit status: 1 when a run failed."""
    return script_main(Args, __doc__, diffusion, interrupted="interrupted; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
