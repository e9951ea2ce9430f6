"""Draw learning curves: mean over seeds of the deterministic evaluations, or of other columns, shaded by a
standard deviation each way.

    python scripts/plot.py runs/MY_RUN runs/ANOTHER      a curve for each run, to curves.png
    python scripts/plot.py --env HalfCheetah-v4          every agent on the task, to results/TASK.png
    python scripts/plot.py runs/MY_RUN --columns predicted_reward eval_return
    python scripts/plot.py results/reinforce/CartPole-v1 results/no_baseline/reinforce/CartPole-v1 \\
        --labels "learned V" "no baseline" --out results/no_baseline.png

Needs the extra `plots`: pip install -e '.[plots]'.
"""

import contextlib
import csv
import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from zoo.common.args import require
from zoo.common.errors import UsageError


@dataclass
class Args:
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """folders of runs, or of results/ (with seed_N.csv files); a curve each"""
    env: str = ""
    """in place of folders: the task of which to draw every agent in --results"""
    labels: tuple[str, ...] = ()
    """names of the folders' curves (default: the agents' names, the runs' folders)"""
    columns: tuple[str, ...] = ("eval_return",)
    """columns of the tables to draw, a panel each"""
    results: Path = Path("results")
    """where --env looks"""
    out: Path | None = None
    """picture to write: png, svg or pdf (default: TASK.png in --results for --env, else curves.png)"""


def load_curves(folder: Path, column: str = "eval_return") -> tuple[np.ndarray, np.ndarray]:
    """Steps (K,) and a column (seeds, K) of a folder's tables, on the steps that all seeds reached.

    Of a run's folder the seeds are one. Raises UsageError.
    """
    files = sorted(folder.glob("seed_*.csv"), key=lambda path: path.name)
    files = files or sorted(folder.glob("progress.csv"))
    require(bool(files), f"{folder}: holds no seed_N.csv, and no progress.csv of a run")
    seeds = []
    for path in files:
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get(column)]
        missing = "evaluations" if column == "eval_return" else f"values of {column} (--columns)"
        require(bool(rows), f"{path}: has no {missing}")
        seeds.append(np.array([(float(row["step"]), float(row[column])) for row in rows]).T)
    shortest = min(seeds, key=lambda seed: seed[0, -1])
    steps = shortest[0]
    return steps, np.stack([np.interp(steps, *seed) for seed in seeds])


def label(folder: Path) -> str:
    """A run's own name; of results/AGENT/TASK the agent's."""
    folder = folder.resolve()
    return folder.name if (folder / "progress.csv").exists() else folder.parent.name


def task(folders: list[Path]) -> str:
    """The task of all these folders, where it is one."""
    found = set()
    for folder in folders:
        if (folder / "progress.csv").exists():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found.add(json.loads((folder / "args.json").read_text())["args"]["env"])
        else:
            found.add(folder.resolve().name)
    return found.pop() if len(found) == 1 else ""


def draw(
    folders: list[Path], labels: list[str], title: str, out: Path, columns: tuple[str, ...] = ("eval_return",)
) -> None:
    """Write the picture. Raises UsageError where a folder has no curves or `out` cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [[load_curves(folder, column) for folder in folders] for column in columns]
    size = (7, 4.5 if len(columns) == 1 else 3 * len(columns))
    figure, grid = pyplot.subplots(
        len(columns), 1, figsize=size, layout="constrained", sharex=True, squeeze=False
    )
    for axes, column, curves in zip(grid[:, 0], columns, panels, strict=True):
        for label, (steps, values) in zip(labels, curves, strict=True):
            mean, std = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0.0
            count = f"{len(values)} seed{'s' if len(values) > 1 else ''}"
            (line,) = axes.plot(steps, mean, label=f"{label} ({count})")
            axes.fill_between(steps, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)
        told = "return of deterministic evaluations" if column == "eval_return" else column.replace("_", " ")
        axes.set(ylabel=told if len(columns) == 1 else told.replace(" of ", "\nof "))
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        axes.grid(alpha=0.3)
    grid[0, 0].set(title=title)
    grid[-1, 0].set(xlabel="environment steps")
    grid[0, 0].legend()
    try:
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:
        raise UsageError(f"--out {out}: {error}") from error
    finally:
        pyplot.close(figure)


def main() -> int:
    """Draw, or tell in one line what is wrong; the exit status."""
    args = tyro.cli(Args, description=__doc__)
    try:
        require(
            importlib.util.find_spec("matplotlib") is not None,
            "matplotlib is missing: pip install -e '.[plots]'",
        )
        require(bool(args.folders) != bool(args.env), "give either folders of curves or --env")
        folders = list(args.folders) or sorted(
            path.parent for path in args.results.glob(f"*/{args.env}/meta.json")
        )
        require(bool(folders), f"--env {args.env}: no agent has results on it in {args.results}")
        labels = list(args.labels) or [label(folder) for folder in folders]
        require(len(labels) == len(folders), f"--labels: {len(labels)} names for {len(folders)} curves")
        title, default = args.env or task(folders), Path("curves.png")
        out = args.out or (args.results / f"{args.env}.png" if args.env else default)
        draw(folders, labels, title, out, args.columns)
        print(f"{out}: {len(folders)} curve{'s' if len(folders) > 1 else ''}")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
