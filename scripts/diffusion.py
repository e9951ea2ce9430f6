"""Run the diffusion agents' experiments over seeds, keep their curves in results/diffusion/, and draw its
pictures.

    python scripts/diffusion.py                         all that is not there yet, the table and the pictures
    python scripts/diffusion.py --only line_return ring_none --seeds 3
    python scripts/diffusion.py --no-run                the table and the pictures of what is there

Every run is a process of its own on one core; the same command goes on where it was stopped.

    RUNS/NAME/seed_N/            the run's folder
    RESULTS/NAME/seed_N.csv      its evaluations
    RESULTS/table.csv            the last evaluations, mean and standard deviation over seeds
    RESULTS/NAME/experiment.json       command, versions, commit, machine

Needs the extra `plots`, and `digits` for the digits.
"""

import csv
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from diffusion_plots import draw

from zoo.common.errors import UsageError

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


def run(name: str, seed: int, args: Args) -> str:
    """Make one run, unless it is there, and keep its evaluations; what there is to tell of it."""
    folder, kept = args.runs / name / f"seed_{seed}", args.results / name / f"seed_{seed}.csv"
    if kept.exists():
        return ""
    path = os.pathsep.join((str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])))
    environment = {**os.environ, "PYTHONPATH": path}  # this checkout's zoo, whatever is installed
    line = command(name, seed, folder.absolute())
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        return f"error: {name} seed {seed}: {done.stderr.strip().splitlines()[-1]}"
    with open(folder / "progress.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if any(row[c] for c in row if c.startswith("eval_"))]
    columns = [column for column in rows[0] if any(row[column] for row in rows)]
    kept.parent.mkdir(parents=True, exist_ok=True)
    with open(kept, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    described = json.loads((folder / "args.json").read_text())
    shared = {key: described[key] for key in ("versions", "commit", "machine")}
    (kept.parent / "experiment.json").write_text(
        json.dumps(
            {"command": f"zoo/{EXPERIMENTS[name].agent}.py {EXPERIMENTS[name].args}", **shared}, indent=2
        )
        + "\n"
    )
    return f"{name} seed {seed}: {done.stdout.strip().splitlines()[-1]}"


def load(name: str, results: Path) -> list[list[dict[str, float]]]:
    """An experiment's curves: for each seed its evaluations, in order."""
    curves = []
    for path in sorted((results / name).glob("seed_*.csv")):
        with open(path, newline="") as file:
            curves.append(
                [{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)]
            )
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
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with open(results / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    """Run, tabulate and draw; the exit status: 1 when a run failed, 2 for bad input."""
    args, failed = tyro.cli(Args, description=__doc__), False
    try:
        if unknown := [name for name in args.only if name not in EXPERIMENTS]:
            raise UsageError(f"--only {unknown[0]}: no such experiment; there are {', '.join(EXPERIMENTS)}")
        names = args.only or tuple(EXPERIMENTS)
        if args.run:
            with ThreadPoolExecutor(args.jobs) as pool:
                jobs = [
                    (name, seed)
                    for name in names
                    for seed in range(1, (args.seeds or EXPERIMENTS[name].seeds) + 1)
                ]
                for told in pool.map(lambda job: run(job[0], job[1], args), jobs):
                    if told:
                        failed |= told.startswith("error")
                        print(told, flush=True)
        args.results.mkdir(parents=True, exist_ok=True)
        write_table(args.results)
        if args.plot:
            curves = {name: found for name in EXPERIMENTS if (found := load(name, args.results))}
            for told in draw(curves, args.runs, args.results):
                print(told)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
