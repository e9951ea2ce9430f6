"""Draw learning curves: the mean over seeds of the deterministic evaluations with its 95% bootstrap interval,
and each seed thin behind it.

    python scripts/plot.py runs/MY_RUN runs/ANOTHER      a curve for each run, to curves.png
    python scripts/plot.py --env HalfCheetah-v4          every agent on the task, to results/TASK.png
    python scripts/plot.py --env CartPole-v1 --x wall-time
    python scripts/plot.py runs/MY_RUN --columns predicted_reward eval_return       a panel each
    python scripts/plot.py results/reinforce/CartPole-v1 results/no_baseline/reinforce/CartPole-v1 \\
        --labels "learned V" "no baseline" --out results/no_baseline.png

An agent has one colour in all pictures. Over environment steps every budget has axes of its own, or the
longest run would squeeze the others. Where --results holds a published.csv, what was published for an agent
at its budget is a dotted line in its colour.

Needs the extra `plots`: pip install -e '.[plots]'.
"""

import contextlib
import csv
import hashlib
import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

from zoo.common.args import require
from zoo.common.cli import script_main
from zoo.common.errors import UsageError

# Told apart by readers who see few colours as well (Okabe and Ito); an agent that is not named takes one of
# SPARE.
COLOURS = {
    "ppo": "#0072B2", "trpo": "#D55E00", "actor_critic": "#009E73", "reinforce": "#CC79A7", "sac": "#E69F00",
    "grpo": "#56B4E9", "preferences": "#000000", "dppo": "#8C564B",
}  # fmt: skip
SPARE = ("#666666", "#6A3D9A", "#B2DF8A", "#17BECF", "#A6761D")
DASHES = ("-", "--", "-.", (0, (1, 1)))  # of further curves of one agent, whose colours are FURTHER
FURTHER = ("#6A3D9A", "#A6761D", "#17BECF")
REPS = 2000  # bootstrap samples of an interval
LEFT = 0.01  # of the axes' width, where what was published is named
PUBLISHED = {"agent", "task", "kind", "source", "seeds", "url"}  # columns of published.csv besides numbers
DATA = "Data"  # the entry of a PNG that tells what it was drawn from


@dataclass
class Args:
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """folders of runs, or of results/ (with seed_N.csv files); a curve each"""
    env: str = ""
    """in place of folders: the task of which to draw every agent in --results"""
    labels: tuple[str, ...] = ()
    """names of the folders' curves (default: the agents' names, the runs' folders)"""
    x: Literal["steps", "wall-time"] = "steps"
    """what runs along the x axis: environment steps, or the seconds that the run took"""
    until: int | None = None
    """environment steps at which all curves are cut off, in one pair of axes for all budgets"""
    columns: tuple[str, ...] = ("eval_return",)
    """columns of the tables to draw, a panel each"""
    results: Path = Path("results")
    """where --env looks, and published.csv is"""
    out: Path | None = None
    """picture to write: png, svg or pdf (default: TASK.png in --results for --env, else curves.png)"""


# --- what is drawn ------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """Evaluations of an agent's seeds on common steps."""

    label: str
    agent: str
    budget: int  # environment steps that its runs were given
    x: np.ndarray  # (K,) steps or seconds
    returns: np.ndarray  # (seeds, K)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Tell what is wrong with a file that is read within, or with what it holds, as a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except KeyError as error:
        raise UsageError(f"{path}: lacks {error}") from error
    except (ValueError, TypeError, AttributeError, IndexError, OverflowError, csv.Error) as error:
        raise UsageError(f"{path}: is damaged: {' '.join(str(error).split())}") from error


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table; [] where there is none. Raises UsageError."""
    if not path.exists():
        return []
    with reading(path), open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_json(path: Path) -> dict[str, Any]:
    """What a meta.json or an args.json says; {} where there is none. Raises UsageError."""
    if not path.exists():
        return {}
    with reading(path):
        return dict(json.loads(path.read_text()))


def finite(cell: str) -> float:
    """A number of a table. Raises ValueError, TypeError."""
    if not math.isfinite(float(cell)):
        raise ValueError(f"{cell} stands where a number should")
    return float(cell)


def files_of(folder: Path) -> list[Path]:
    """The tables of a folder's seeds; of a run's folder it is one. Raises UsageError."""
    files = sorted(folder.glob("seed_*.csv"), key=lambda path: path.name)
    files = files or sorted(folder.glob("progress.csv"))
    require(bool(files), f"{folder}: holds no seed_N.csv, and no progress.csv of a run")
    return files


def starts(folder: Path) -> dict[str, float]:
    """What the seeds' agents are worth before training, by the names of their tables, from start.csv. Raises
    UsageError."""
    path = folder / "start.csv"
    with reading(path):
        return {f"seed_{row['seed']}.csv": finite(row["eval_return"]) for row in read_table(path)}


def load_curves(folder: Path, x: str = "steps", column: str = "eval_return") -> tuple[np.ndarray, np.ndarray]:
    """Steps (K,) and evaluation returns, or another column, (seeds, K) of a folder, on the steps that all
    seeds reached.

    Where start.csv knows all seeds, the first point is at 0. x: "wall-time" gives in place of the steps the
    mean over seeds of the seconds until then. Raises UsageError.
    """
    before, seeds = starts(folder), []
    files = files_of(folder)
    known = column == "eval_return" and all(path.name in before for path in files)
    missing = "evaluations" if column == "eval_return" else f"values of {column} (--columns)"
    for path in files:
        rows = [row for row in read_table(path) if row.get(column)]
        require(bool(rows), f"{path}: has no {missing}")
        with reading(path):
            points = [(finite(row["step"]), finite(row[column]), float(row.get("wall_time") or "nan"))
                      for row in rows]  # fmt: skip
        steps = [step for step, _, _ in points]
        once = steps if column != "eval_return" else set(steps)  # of a loss one step may have many
        require(steps == sorted(once), f"{path}: its steps with {missing} do not increase")
        if known and points[0][0] > 0:
            points.insert(0, (0.0, before[path.name], 0.0))
        seeds.append(np.array(points).T)
    shortest = min(seeds, key=lambda seed: seed[0, -1])
    steps = shortest[0]
    returns = np.stack([np.interp(steps, seed[0], seed[1]) for seed in seeds])
    if x == "steps":
        return steps, returns
    seconds = np.stack([np.interp(steps, seed[0], seed[2]) for seed in seeds]).mean(0)
    require(bool(np.isfinite(seconds).all()), f"--x wall-time: {folder} has no column wall_time")
    return seconds, returns


def budget(folder: Path, default: float) -> int:
    """The environment steps that the runs of a folder were given; `default` where it is not known. Raises
    UsageError."""
    for path in (folder / "meta.json", folder / "args.json"):
        content = read_json(path)
        with reading(path):
            for each in (content, *content.get("seeds", {}).values()):
                if "total_steps" in each.get("args", {}):
                    return int(each["args"]["total_steps"])
    return round(default)


def agent_of(folder: Path) -> str:
    """The agent whose curve a folder holds: of results/AGENT/TASK by its name, of a run by its args.json.
    Raises UsageError."""
    return str(read_json(folder / "args.json").get("agent", folder.resolve().parent.name))


def label(folder: Path) -> str:
    """A run's own name; of results/AGENT/TASK the agent's."""
    folder = folder.resolve()
    return folder.name if (folder / "progress.csv").exists() else folder.parent.name


def task(folders: Sequence[Path]) -> str:
    """The task of all these folders, where it is one. Raises UsageError."""
    found = set()
    for folder in folders:
        if not (folder / "progress.csv").exists():
            found.add(folder.resolve().name)
        elif args := read_json(folder / "args.json"):
            with reading(folder / "args.json"):
                found.add(str(args["args"]["env"]))
    return found.pop() if len(found) == 1 else ""


def read_published(path: Path) -> list[dict[str, str]]:
    """The rows of published.csv; [] where there is none. Raises UsageError."""
    rows = read_table(path)
    with reading(path):
        for row in rows:
            finite(row["value"])
            int(row["steps"])
            require(row.keys() >= PUBLISHED, f"{path}: lacks {', '.join(sorted(PUBLISHED - row.keys()))}")
    return rows


def published_evaluations(
    rows: list[dict[str, str]], agent: str, env: str, steps: int
) -> list[dict[str, str]]:
    """Published evaluations of an agent on a task at this budget, the highest first; no training returns."""
    wanted = (agent, env, "evaluation", steps)
    found = [row for row in rows if (row["agent"], row["task"], row["kind"], int(row["steps"])) == wanted]
    return sorted(found, key=lambda row: -float(row["value"]))


def best_published(rows: list[dict[str, str]], agent: str, env: str, steps: int) -> dict[str, str] | None:
    """The highest of them, None where there is none."""
    return next(iter(published_evaluations(rows, agent, env, steps)), None)


def interval(returns: np.ndarray, reps: int = REPS, level: float = 0.95) -> np.ndarray:
    """The bootstrap interval (2, K) of the mean over seeds of returns (seeds, K): percentiles of the means of
    seeds drawn with replacement."""
    drawn = np.random.default_rng(0).integers(len(returns), size=(reps, len(returns)))
    return np.percentile(returns[drawn].mean(1), [50 * (1 - level), 50 * (1 + level)], axis=0)


def colour(agent: str) -> str:
    """An agent's colour in all pictures."""
    return COLOURS.get(agent) or SPARE[int(hashlib.sha256(agent.encode()).hexdigest(), 16) % len(SPARE)]


def fingerprint(folders: Sequence[Path], published: Sequence[dict[str, str] | None]) -> str:
    """What a picture of these folders is drawn from, in short: another one as soon as the data differ."""
    found = hashlib.sha256()
    for folder in folders:
        for path in [*files_of(folder), folder / "start.csv"]:
            found.update(path.read_bytes() if path.exists() else b"-")
        found.update(str(budget(folder, 0)).encode())
    found.update(json.dumps([row and row["value"] for row in published]).encode())
    return found.hexdigest()[:16]


def drawn_from(picture: Path) -> str:
    """The fingerprint that a picture of this script carries; "" where there is none."""
    _, mark, rest = picture.read_bytes().partition(f"tEXt{DATA}\0".encode())
    return rest[:16].decode() if mark else ""


# --- drawing ------------------------------------------------------------------------------------------------


def save(figure: Any, out: Path, data: str = "") -> None:
    """Write a picture, in a PNG with what it was drawn from. Raises UsageError."""
    try:
        figure.savefig(out, dpi=120, metadata={DATA: data} if out.suffix == ".png" else None)
    except (OSError, ValueError) as error:
        raise UsageError(f"--out {out}: {getattr(error, 'strerror', None) or error}") from error


def published_for(folders: Sequence[Path], results: Path) -> list[dict[str, str] | None]:
    """Of each folder of results what was published for its agent, task and budget, if anything."""
    rows = read_published(results / "published.csv")
    return [best_published(rows, agent_of(f), task([f]), budget(f, 0)) for f in folders]


def draw_curves(
    all_axes: Sequence[Any], of_budget: Sequence[int], curves: Sequence[Curve],
    published: Sequence[dict[str, str] | None],
) -> list[Any]:  # fmt: skip
    """Draw each curve into the axes of its budget, [0] for all; what the legend is made of."""
    handles: list[Any] = []
    for i, (curve, row) in enumerate(itertools.zip_longest(curves, published)):
        axes = all_axes[of_budget.index(curve.budget) if len(of_budget) > 1 else 0]
        nth = [other.agent for other in curves[:i]].count(curve.agent) % len(DASHES)
        look: dict[str, Any] = {"color": (colour(curve.agent), *FURTHER)[nth], "linestyle": DASHES[nth]}
        axes.plot(curve.x, curve.returns.T, linewidth=0.6, alpha=0.35, color=look["color"])
        if len(curve.returns) > 1:
            shade = {"color": look["color"], "alpha": 0.2, "linewidth": 0}
            axes.fill_between(curve.x, *interval(curve.returns), **shade)
        count = f"{len(curve.returns)} seed{'s' if len(curve.returns) > 1 else ''}"
        handles += axes.plot(
            curve.x,
            curve.returns.mean(0),
            linewidth=2,
            marker="o" if len(curve.x) == 1 else None,
            label=f"{curve.label} ({count})",
            **look,
        )
        if row is not None:
            value = float(row["value"])
            text = f"{value:{',.0f' if abs(value) >= 10 else '.2g'}} ({row['source']})"
            axes.axhline(value, color=look["color"], linestyle=":", linewidth=1.4, gid=text)
    for axes in all_axes:
        name_published(axes, name_width(len(all_axes)))
    return handles


def name_width(beside: int) -> float:
    """How wide the name of a published value is at most, of the width of one of so many axes."""
    return 0.1 + 0.08 * beside


def name_published(axes: Any, width: float) -> None:
    """Write the published values at their lines; a name is so wide, of axes of width 1."""
    low, high = axes.get_ylim()
    lines = [line for line in axes.get_lines() if line.get_gid()]
    before, x_of_label = -np.inf, LEFT
    for line in sorted(lines, key=lambda line: line.get_ydata()[0]):
        value = line.get_ydata()[0]
        # at the left, where the curves are still below it; beside the one that it would cover
        x_of_label = x_of_label + width if value - before < 0.05 * (high - low) else LEFT
        place = {"transform": axes.get_yaxis_transform(), "ha": "left", "va": "bottom", "fontsize": 8}
        place["bbox"] = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5}
        axes.text(x_of_label, value, line.get_gid(), color=line.get_color(), **place)
        before = value


def draw(
    folders: Sequence[Path], labels: Sequence[str], title: str, out: Path, x: str = "steps",
    results: Path = Path("results"), until: int | None = None, columns: Sequence[str] = ("eval_return",),
) -> None:  # fmt: skip
    """Write the picture. Raises UsageError where a folder has no curves or `out` cannot be written.

    until: steps (seconds) at which curves are cut off; what was published for whole budgets is then left out.
    columns: of the tables, a row of axes each.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import EngFormatter

    rows: list[list[Curve]] = [[] for _ in columns]
    for column, curves in zip(columns, rows, strict=True):
        for folder, name in zip(folders, labels, strict=True):
            xs, values = load_curves(folder, x, column)
            if until is not None:
                xs, values = xs[xs <= until], values[:, xs <= until]
                require(len(xs) > 0, f"--until {until}: {folder} has no evaluation up to there")
            curves.append(Curve(name, agent_of(folder), budget(folder, xs[-1]), xs, values))
    published = published_for(folders, results) if until is None else []
    apart = x == "steps" and until is None  # axes of its own for each budget
    budgets = sorted({curve.budget for curves in rows for curve in curves}) if apart else [0]
    figure = Figure(figsize=(8.5, 4.6 if len(columns) == 1 else 3.2 * len(columns)), layout="constrained")
    grid = figure.subplots(len(columns), len(budgets), sharex="col", sharey="row", squeeze=False)
    for all_axes, column, curves in zip(grid, columns, rows, strict=True):
        evaluated = column == "eval_return"
        handles = draw_curves(all_axes, budgets, curves, published if evaluated else [])
        told = "return of deterministic evaluations" if evaluated else column.replace("_", " ")
        all_axes[0].set_ylabel(told if len(columns) == 1 else told.replace(" of ", "\nof "))
    grey = "#555555"
    handles.append(Line2D([], [], color=grey, linewidth=0.6, label="single seeds"))
    if any(len(curve.returns) > 1 for curve in rows[0]):
        handles.append(Patch(color=grey, alpha=0.3, linewidth=0, label="95% bootstrap interval of the mean"))
    if any(published) and "eval_return" in columns:
        handles.append(Line2D([], [], color=grey, linestyle=":", label="published, at the same budget"))
    for axes in grid.flat:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=5 if len(budgets) > 1 else 8)
        axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("environment steps" if x == "steps" else "seconds")
    figure.suptitle(title, fontsize=12)
    beside = min(3, max(1, 120 // max(len(handle.get_label()) for handle in handles)))
    figure.legend(handles=handles, loc="outside lower center", ncols=beside, fontsize=9, frameon=False)
    save(figure, out, fingerprint(folders, published))


def work(args: Args) -> None:
    """Draw the curves asked for. Raises UsageError."""
    require(
        importlib.util.find_spec("matplotlib") is not None, "matplotlib is missing: pip install -e '.[plots]'"
    )
    require(bool(args.folders) != bool(args.env), "give either folders of curves or --env")
    folders = list(args.folders) or sorted(
        path.parent for path in args.results.glob(f"*/{args.env}/meta.json")
    )
    require(
        bool(folders),
        f"--env {args.env}: no agent has results on it in {args.results}; name the folders of runs",
    )
    labels = list(args.labels) or [label(folder) for folder in folders]
    require(len(labels) == len(folders), f"--labels: {len(labels)} names for {len(folders)} curves")
    require(bool(args.columns), "--columns: names of columns are missing")
    require(args.until is None or args.until >= 0, f"--until must be at least 0, not {args.until}")
    title, default = args.env or task(folders), Path("curves.png")
    out = args.out or (args.results / f"{args.env}.png" if args.env else default)
    require(out.suffix != "", f"--out {out}: end the name in .png, .svg or .pdf")
    draw(folders, labels, title, out, args.x, args.results, args.until, args.columns)
    print(f"{out}: {len(folders)} curve{'s' if len(folders) > 1 else ''}")


def main() -> int:
    """Draw, or tell in one line what is wrong; the exit status."""
    return script_main(Args, __doc__, work)


if __name__ == "__main__":
    sys.exit(main())
