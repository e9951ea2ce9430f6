"""Rebuild the README's table of agents and its pictures from what is in results/.

    python scripts/report.py               statistics, table, pictures
    python scripts/report.py --references  first play what they are set against, where it is missing

Everything is computed from results/ alone, with rliable (Agarwal et al. 2021, arXiv:2108.13264):

    results/AGENT/TASK/            curves and meta.json as scripts/benchmark.py writes them
    results/VARIANT/AGENT/TASK/    the same under other arguments
    results/published.csv          what others published: source, protocol, budget, address
    results/random.csv             what actions drawn uniformly score on each task
    results/AGENT/TASK/start.csv   what each seed's agent is worth before training, the curves' first point

    results/report.csv             every statistic with its 95% stratified bootstrap interval
    results/TASK.png, aggregate.png and the README between its markers

Scores that are aggregated over tasks are normalised: 0 is random, 1 is PPO as published at the budget that
PPO has here. Of an agent whose tasks have different numbers of seeds the first ones of each count there, as
many as all have; a task with fewer than five is left out. Exit status: 0, 2 for bad input.

Needs the extra `report`: pip install -e '.[report]'.
"""

import csv
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import benchmark
import numpy as np
import plot

from zoo.common.args import RunArgs, as_words, require
from zoo.common.cli import script_main
from zoo.common.envs import make_envs
from zoo.common.errors import RunFault
from zoo.common.evaluate import Evaluation, evaluate
from zoo.common.files import write_atomically, writing
from zoo.common.seeding import generator_seed

ROOT = Path(__file__).parents[1]
NOT_RUNS = {"diffusion", "estimators", "tokens"}  # folders of results/ with layouts of their own
BEGIN, END = "<!-- report:begin -->", "<!-- report:end -->"
REPS = 2000  # bootstrap samples of an interval
TAUS = tuple(round(0.05 * i, 2) for i in range(31))  # normalised scores at which a profile is computed
COLUMNS = ("quantity", "agent", "against", "task", "x", "value", "low", "high")
EPISODES = 100  # of random play
FEWEST = 5  # seeds of a task that counts among an agent's aggregated scores
BEGINS_TRAINED = {"dppo"}  # its environment steps begin with a clone, no untrained agent
# zoo/README.md walks from one agent to the next, on this task
TOUR_TASK, TOUR = (
    "HalfCheetah-v4",
    (*itertools.pairwise(("reinforce", "actor_critic", "trpo", "ppo", "sac")), ("ppo", "preferences")),
)
# Further pictures of the README's text: folders of results with their labels, and the columns to draw
BESIDE = {
    "more_labels/answers.png": (
        {
            "ppo/HalfCheetah-v4": "PPO, true reward",
            "preferences/HalfCheetah-v4": "700 answers",
            "more_labels/preferences/HalfCheetah-v4": "1,400 answers",
        },
        ("eval_return",),
    ),
    "few_labels/answers.png": (
        {
            "preferences/Pendulum-v1": "700 answers",
            "few_labels_asked/preferences/Pendulum-v1": "50, asked on the way",
            "few_labels/preferences/Pendulum-v1": "50, all at the start",
        },
        ("eval_return", "predicted_reward"),
    ),
}


@dataclass
class Args:
    results: Path = Path("results")
    """folder of results"""
    readme: Path = Path("README.md")
    """file with the markers between which the report is written"""
    references: bool = False
    """play random actions, and each seed's agent before training, where results/ lacks them"""
    pictures: bool = True
    """draw the pictures as well"""


# --- what is in results/ ------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One agent on one task: a line of the table."""

    agent: str
    task: str  # as its folder is named
    env: str  # as --env takes it
    variant: str  # folder of results/ that it lies in, "" for the agents as they are
    folder: Path
    budget: int
    seeds: dict[int, float]  # final evaluations
    commits: tuple[str, ...]
    traced: bool  # all of them in the history, their code unchanged
    changed: str  # arguments in which a variant differs from the agent as it is
    longer: bool  # a variant that differs in its budget alone
    annealed: bool  # towards the budget's end, so that an earlier point is not that of a smaller budget

    @property
    def scores(self) -> np.ndarray:
        return np.array([self.seeds[seed] for seed in sorted(self.seeds)])

    @property
    def name(self) -> str:
        return f"{self.variant}/{self.agent}" if self.variant else self.agent


def short(commit: str | None) -> str:
    """A commit as the table names it."""
    code, dash, dirty = (commit or "none").partition("-")
    return code[:7] + dash + dirty


def read_row(folder: Path, results: Path) -> Row:
    """A line of the table. Raises UsageError where meta.json is not as benchmark.py writes it."""
    seeds = benchmark.read_seeds(folder)
    require(bool(seeds), f"--results: {folder}/meta.json holds no seeds")
    for seed in seeds:
        path = folder / f"seed_{seed}.csv"
        require(path.is_file(), f"--results: {path} is missing, the curve of a seed in meta.json beside it")
    agent, variant = folder.parent.name, folder.relative_to(results).parts[:-2]
    commits = tuple(dict.fromkeys(entry["commit"] for entry in seeds.values()))
    args, names = next(iter(seeds.values()))["args"], list[str]()
    original = results / agent / folder.name
    if variant:
        if (original / "meta.json").exists():
            before = next(iter(benchmark.read_seeds(original).values()))["args"]
        elif importlib.util.find_spec(f"zoo.{agent}") is None:  # someone's own agent
            before = args
        else:  # the agent as it is was not run on this task
            settings = importlib.import_module(f"zoo.{agent}").Args.for_env(args["env"])
            before = json.loads(json.dumps(asdict(settings)))  # tuples become lists, as in meta.json
        names = sorted((args.keys() & before.keys()) - benchmark.BOOKKEEPING)
        names = [name for name in names if args[name] != before[name]]
    changed = " ".join(word for name in names for word in as_words(name, args[name]))
    traced = all(benchmark.is_in_history(commit, benchmark.REPOSITORY) for commit in commits)
    return Row(
        agent, folder.name, str(args.get("env", folder.name)), "/".join(variant), folder,
        int(args["total_steps"]), {seed: float(entry["mean"]) for seed, entry in seeds.items()},
        tuple(short(commit) for commit in commits), traced, changed, names == ["total_steps"],
        bool(args.get("anneal", False)),
    )  # fmt: skip


def read_rows(results: Path) -> list[Row]:
    """All agents and tasks of results/, the agents as they are first. Raises UsageError."""
    require(results.is_dir(), f"--results {results}: no such folder")
    found = [*results.glob("*/*/meta.json"), *results.glob("*/*/*/meta.json")]
    folders = [path.parent for path in found if path.relative_to(results).parts[0] not in NOT_RUNS]
    rows = []
    for folder in folders:
        with plot.reading(folder / "meta.json"):
            rows.append(read_row(folder, results))
    require(bool(rows), f"--results {results}: holds no AGENT/TASK/meta.json")
    order = list(plot.COLOURS)
    tasks = {
        task: -sum(row.task == task for row in rows) for task in {row.task for row in rows}
    }  # the ones that most agents share first

    def place(row: Row) -> tuple:
        return (
            order.index(row.agent) if row.agent in order else len(order), row.agent, bool(row.variant),
            -row.budget, tasks[row.task], row.task, row.variant,
        )  # fmt: skip

    return sorted(rows, key=place)


def read_random(results: Path) -> dict[str, float]:
    """The mean return of random actions on each task that was played."""
    path = results / "random.csv"
    with plot.reading(path):
        return {row["task"]: plot.finite(row["mean"]) for row in plot.read_table(path)}


# --- references ---------------------------------------------------------------------------------------------


def store(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a CSV, atomically. Raises RunFault."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    with writing(path.parent):
        write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def play_randomly(env: str) -> np.ndarray:
    """Returns (EPISODES,) of actions drawn uniformly from the action space."""
    envs = make_envs(env, 10, threads=1)
    generator = np.random.default_rng(generator_seed(1, "random"))

    def policy(obs: np.ndarray) -> np.ndarray:
        if envs.discrete:
            return generator.integers(envs.action_dim, size=len(obs))
        return generator.uniform(-1, 1, (len(obs), envs.action_dim)).astype(np.float32)

    try:
        return evaluate(policy, envs, EPISODES, seed=1)[0]
    finally:
        envs.close()


class Untrained(Exception):
    """Carries an agent's first state out of its `train`."""

    def __init__(self, state: Any):
        self.state = state


def before_training(agent: str, args: RunArgs) -> float:
    """The evaluation of an agent as `train` first makes it."""
    module: Any = importlib.import_module(f"zoo.{agent}")

    class NoRun:
        step = 0

        def __init__(self, *given: Any, **more: Any):
            pass

        def restore(self, state: Any) -> Any:
            raise Untrained(state)

    original = module.Run
    module.Run = NoRun
    try:
        module.train(args)
    except Untrained as found:
        return Evaluation(args, module.make_policy)(module.acting(found.state))["eval_return"]
    finally:
        module.Run = original
    raise RunFault(f"zoo/{agent}.py: train asks for no state to restore")


def play_references(rows: Sequence[Row], results: Path) -> None:
    """Write what is missing of random.csv and of the start.csv. Raises UsageError, RunFault."""
    path = results / "random.csv"
    known: list[Sequence[object]] = [list(row.values()) for row in plot.read_table(path)]
    # of a variant no score is normalised, and its folder need not be a task's id
    tasks = {row.task for row in rows if not row.variant}
    for task in sorted(tasks - {str(row[0]) for row in known}):
        returns = play_randomly(task)
        known.append((task, f"{returns.mean():.6g}", f"{returns.std(ddof=1):.6g}", len(returns)))
        print(f"random on {task}: {known[-1][1]}", flush=True)
        store(path, ("task", "mean", "std", "episodes"), sorted(known, key=lambda row: str(row[0])))
    for row in rows:
        known_of_all = (
            len(plot.starts(row.folder)) >= len(row.seeds) or plot.load_curves(row.folder)[0][0] == 0
        )
        if (
            known_of_all
            or row.agent in BEGINS_TRAINED
            or importlib.util.find_spec(f"zoo.{row.agent}") is None
        ):
            continue
        entries = benchmark.read_seeds(row.folder)
        args_class = importlib.import_module(f"zoo.{row.agent}").Args
        found = []
        for seed in sorted(row.seeds):
            given = entries[seed]["args"]
            kept = {f.name: given[f.name] for f in fields(args_class) if f.name in given}
            kept = {name: tuple(v) if isinstance(v, list) else v for name, v in kept.items()}
            kept |= {"seed": seed, "compile": False, "device": "cpu"}
            found.append((seed, f"{before_training(row.agent, args_class(**kept)):.6g}"))
        store(row.folder / "start.csv", ("seed", "eval_return"), found)
        values = ", ".join(value for _, value in found)
        print(f"{row.name} on {row.task} before training: {values}", flush=True)


# --- statistics ---------------------------------------------------------------------------------------------


def intervals(scores: dict[str, Any], function: Callable[..., np.ndarray]) -> dict[str, np.ndarray]:
    """rliable's point estimates and 95% stratified bootstrap intervals: (3, K) of each key, the value first.

    scores: arrays (seeds, tasks), or pairs of them for a function of two.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pandas and seaborn, which nothing here uses
        from rliable import library
    np.random.seed(0)  # noqa: NPY002  rliable draws from the global generator
    points, ranges = library.get_interval_estimates(scores, function, reps=REPS)
    return {key: np.vstack([points[key], ranges[key]]) for key in scores}


def iqm(scores: np.ndarray) -> float:
    """The interquartile mean: of the middle half of all scores."""
    from rliable import metrics

    return metrics.aggregate_iqm(scores)


def improvement(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """The probability (1,) that a run of one beats one of the other on the same task, ties half, as rliable's
    `probability_of_improvement`, whose tests of Mann and Whitney would take most of the report's time.

    Scores (seeds, tasks), of as many tasks.
    """
    return np.array([((ours[:, None] > theirs) + 0.5 * (ours[:, None] == theirs)).mean()])


def normalised(rows: Sequence[Row], results: Path) -> dict[str, dict[str, np.ndarray]]:
    """Scores of each agent as it is by task, 0 random and 1 PPO as published; what has no reference, or fewer
    than FEWEST seeds, is left out."""
    published, random = plot.read_published(results / "published.csv"), read_random(results)
    budgets = {row.task: row.budget for row in rows if row.agent == "ppo" and not row.variant}
    found: dict[str, dict[str, np.ndarray]] = {}
    for row in rows:
        best = plot.best_published(published, "ppo", row.task, budgets.get(row.task, row.budget))
        if row.variant or best is None or row.task not in random or len(row.scores) < FEWEST:
            continue
        zero, one = random[row.task], float(best["value"])
        found.setdefault(row.agent, {})[row.task] = (row.scores - zero) / (one - zero)
        theirs = plot.best_published(published, row.agent, row.task, row.budget)
        if theirs is not None:
            value = np.array([(float(theirs["value"]) - zero) / (one - zero)])
            found.setdefault(f"{row.agent} as published", {})[row.task] = value
    return found


def matrix(by_task: dict[str, np.ndarray], tasks: Sequence[str]) -> np.ndarray:
    """Scores (seeds, tasks) of the first seeds of each task, as many as all have."""
    count = min(len(by_task[task]) for task in tasks)
    return np.stack([by_task[task][:count] for task in tasks], 1)


def statistics(rows: Sequence[Row], results: Path) -> list[tuple[str, ...]]:
    """The rows of report.csv."""
    found: list[tuple[str, ...]] = []

    def add(quantity: str, agent: str, value: Iterable[float], against="", task="", x="") -> None:
        found.append((quantity, agent, against, task, str(x), *(f"{v:.5g}" for v in value)))

    def both(scores: np.ndarray) -> np.ndarray:
        return np.array([scores.mean(), iqm(scores)])

    for row in rows:
        mean, middle = intervals({"": row.scores[:, None]}, both)[""].T
        add("mean", row.name, mean, task=row.task)
        add("iqm", row.name, middle, task=row.task)
    scores = normalised(rows, results)
    ours = [name for name in scores if " as published" not in name]
    for name in ours:
        tasks = list(scores[name])
        own = matrix(scores[name], tasks)
        mean, middle = intervals({"": own}, both)[""].T
        add("normalised mean", name, mean, x=str(len(tasks)))
        add("normalised iqm", name, middle, x=str(len(tasks)))
        profile = intervals({"": own}, lambda s: (s[..., None] > np.array(TAUS)).mean((0, 1)))[""]
        for tau, value in zip(TAUS, profile.T, strict=True):
            add("profile", name, value, x=f"{tau:g}")
        theirs = scores.get(f"{name} as published", {})
        if theirs:
            values = np.concatenate(list(theirs.values()))
            shared = list(theirs)
            for quantity, value in (("mean", values.mean()), ("iqm", iqm(values[None]))):
                add(f"published normalised {quantity}", name, (value,) * 3, x=str(len(shared)))
            for tau in TAUS:
                add("published profile", name, ((values > tau).mean(),) * 3, x=f"{tau:g}")
    pairs = [(a, b) for i, a in enumerate(ours) for b in ours[i + 1 :]]
    pairs += [(name, f"{name} as published") for name in ours if f"{name} as published" in scores]
    for one, other in pairs:
        shared = [task for task in scores[one] if task in scores[other]]
        if shared:
            both_of = (matrix(scores[one], shared), matrix(scores[other], shared))
            value = intervals({"": both_of}, improvement)[""][:, 0]
            add("improvement", one, value, against=other, x=str(len(shared)))
    return found


class Statistics:
    """report.csv, to be asked."""

    def __init__(self, rows: Sequence[Sequence[str]]):
        self.rows = [dict(zip(COLUMNS, row, strict=True)) for row in rows]

    def of(self, quantity: str, agent: str = "", task: str = "") -> list[dict[str, str]]:
        wanted = {"quantity": quantity, "agent": agent, "task": task}
        return [row for row in self.rows if all(not v or row[k] == v for k, v in wanted.items())]


def read_statistics(results: Path) -> Statistics:
    """report.csv. Raises UsageError."""
    path = results / "report.csv"
    require(path.is_file(), f"--results {results}: holds no report.csv")
    with plot.reading(path):
        return Statistics([list(row.values()) for row in plot.read_table(path)])


# --- the README ---------------------------------------------------------------------------------------------


def steps(count: int) -> str:
    """1000000 -> 1M, 20000 -> 20k."""
    return f"{count / 1e6:g}M" if count >= 1e6 else f"{count / 1e3:g}k"


def number(value: float) -> str:
    """As many digits as a return is worth."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}".removesuffix(".0")


def estimate(row: dict[str, str], seeds: int, digits: Callable[[float], str] = number) -> str:
    """value [low, high]; of one seed the value alone."""
    value, low, high = (digits(float(row[key])) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]" if seeds > 1 else value


def marked(row: Row) -> str:
    """The row's commits, with the mark of those that cannot be checked out."""
    shown = ", ".join(f"`{commit}`" for commit in row.commits[:2]) + (", ..." if len(row.commits) > 2 else "")
    return shown + ("" if row.traced else " †")


def comparisons(row: Row, published: list[dict[str, str]]) -> list[tuple[str, np.ndarray, dict[str, str]]]:
    """(words before it, our seeds' returns, the published row) of all that a row is set against.

    Published at the row's budget; where nothing is annealed, at smaller ones that were evaluated, too. Of
    variants those are set against it that differ in the budget alone, and at that budget.
    """
    if row.variant and not row.longer:
        return []
    found = [
        ("", row.scores, p) for p in plot.published_evaluations(published, row.agent, row.task, row.budget)
    ]
    if not row.annealed and not row.variant:
        at, returns = plot.load_curves(row.folder)
        for budget, values in zip(at.astype(int).tolist(), returns.T, strict=True):
            if budget < row.budget:
                earlier = plot.published_evaluations(published, row.agent, row.task, budget)
                found += [(f"at {steps(budget)} ", values, p) for p in earlier]
    return found


def table(rows: Sequence[Row], found: Statistics, published: list[dict[str, str]]) -> list[str]:
    """The table of agents, and a line for each published value that is not reached."""
    lines = [
        "| file | task | steps | seeds | mean [95%] | interquartile mean [95%] | published | commit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    short_of, before = [], ""
    for row in rows:
        mean, middle = (found.of(quantity, row.name, row.task)[0] for quantity in ("mean", "iqm"))
        cells = []
        for when, scores, p in comparisons(row, published):
            ours, value = float(scores.mean()), float(p["value"])
            text = f"{number(value)} ({p['source']})"
            if ours < value:
                text = f"**{text}**"
                # the table's own interval, where it is the final evaluation
                high = float(plot.interval(scores[:, None])[1, 0]) if when else float(mean["high"])
                where = f"lies {'inside' if value <= high else 'above'} our interval"
                where = f"which {where}" if len(scores) > 1 else "one run of ours"
                runs = "one run" if p["seeds"] == "1" else f"{p['seeds']} seeds"
                lack = f"{number(ours)} against {number(value)} ({p['source']}, {runs})"
                which = " ".join(filter(None, (row.agent, row.changed)))
                short_of.append(f"**{which} on {row.task}**: {when}{lack}, {where}")
            cells.append(f"{when}{number(ours)}: {text}" if when else text)
        file = f"[`{row.agent}.py`](zoo/{row.agent}.py)"
        name = "" if row.agent == before and not row.variant else file
        name += f" `{row.changed}`" if row.changed else ""
        before = row.agent
        count = len(row.seeds)
        lines.append(
            f"| {name} | {row.env} | {steps(row.budget)} | {count} | {estimate(mean, count)} "
            f"| {estimate(middle, count)} | {', '.join(cells) or '-'} | {marked(row)} |"
        )
    if short_of:
        lines += ["", "Not reached, in bold above:", "", *(f"- {line}" for line in short_of)]
    return lines


def aggregate_table(found: Statistics) -> list[str]:
    """The aggregate scores, ours beside the published ones."""
    lines = [
        "| agent | tasks | normalised interquartile mean [95%] | as published | normalised mean [95%] "
        "| as published | a run beats the published value, ties half [95%] |",
        "|---|---|---|---|---|---|---|",
    ]

    def two(value: float) -> str:
        return f"{value:.2f}"

    for row in found.of("normalised iqm"):
        name = row["agent"]
        cells = [name, row["x"]]
        for quantity in ("iqm", "mean"):
            cells.append(estimate(found.of(f"normalised {quantity}", name)[0], 2, two))
            theirs = found.of(f"published normalised {quantity}", name)
            on = f" (on {theirs[0]['x']})" if theirs and theirs[0]["x"] != row["x"] else ""
            cells.append(two(float(theirs[0]["value"])) + on if theirs else "")
        beats = [r for r in found.of("improvement", name) if r["against"].endswith(" as published")]
        on = f" (on {beats[0]['x']})" if beats and beats[0]["x"] != row["x"] else ""
        cells.append(estimate(beats[0], 2, two) + on if beats else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


SOURCES = {
    "T": ("Tianshou", "ten seeds, the best point of their mean curve"),
    "Z": ("RL Zoo", "one run each"),
    "C": ("sb3-contrib", "three seeds"),
    "S": ("SAC as SimbaV2's authors ran it again", "ten seeds"),
    "SpinningUp": ("Spinning Up", "ten seeds"),
}


def legend(rows: Sequence[Row], published: list[dict[str, str]]) -> str:
    """Who published what the rows are set against, linked."""
    address = {p["source"]: p["url"] for row in rows for *_, p in comparisons(row, published)}
    known = [
        f"{key}, [{who}]({address[key]}), {how}" for key, (who, how) in SOURCES.items() if key in address
    ]
    return "; ".join(known)


class Picture(NamedTuple):
    """Learning curves to be drawn."""

    out: Path
    folders: list[Path]
    labels: list[str]
    caption: str
    until: int | None = None
    columns: tuple[str, ...] = ("eval_return",)
    listed: bool = True  # among the README's curves; the others are shown elsewhere

    def data(self, results: Path) -> str:
        """The fingerprint that it must carry."""
        published = plot.published_for(self.folders, results) if self.until is None else []
        return plot.fingerprint(self.folders, published)


def pictures(rows: Sequence[Row], results: Path) -> list[Picture]:
    """Those of each task that several agents share, of each variant, of the tour's steps, and of BESIDE."""
    found = []
    for task in dict.fromkeys(row.task for row in rows):
        own = [row for row in rows if row.task == task and not row.variant]
        if len(own) > 1:
            caption = f"Learning curves on {task}"
            names = [row.agent for row in own]
            found.append(Picture(results / f"{task}.png", [row.folder for row in own], names, caption))
    for row in (row for row in rows if row.variant):
        original = [other for other in rows if (other.agent, other.task, other.variant) == (*row[:2], "")]
        if original:
            labels = [row.agent, f"{row.agent} {row.changed or row.variant}"]
            out = results / row.variant / f"{row.task}.png"
            both = [original[0].folder, row.folder]
            found.append(Picture(out, both, labels, f"{row.agent} {row.changed} on {row.task}"))
    toured = {row.agent: row for row in rows if row.task == TOUR_TASK and not row.variant}
    for before, after in TOUR:
        if before in toured and after in toured:
            folders = [toured[name].folder for name in (before, after)]
            caption = f"{after} and {before} on {TOUR_TASK}"
            last = max(plot.load_curves(toured[after].folder)[0][-1], toured[after].budget)
            until = round(1.01 * last)  # an evaluation may come a batch later than planned
            out = results / "tour" / f"{after}.png"
            found.append(Picture(out, folders, [before, after], caption, until, listed=False))
    by_name = {f"{row.variant}/{row.agent}/{row.task}".lstrip("/"): row for row in rows}
    for name, (of, columns) in BESIDE.items():
        if set(of) <= set(by_name):
            folders, names = [by_name[key].folder for key in of], list(of.values())
            task = plot.task(folders)
            found.append(Picture(results / name, folders, names, task, columns=columns, listed=False))
    return found


def block(rows: Sequence[Row], found: Statistics, results: Path) -> str:
    """What stands between the README's markers."""
    published = plot.read_published(results / "published.csv")
    shown = [picture for picture in pictures(rows, results) if picture.listed]
    first = next((p for p in shown if p.out.name == f"{TOUR_TASK}.png"), shown[0] if shown else None)
    parts = [
        "Final deterministic evaluations, over all recorded seeds. [95%]: stratified bootstrap intervals.\n",
        *table(rows, found, published),
        "",
        f"Published, at the same budget: {legend(rows, published)}. All but S used the v3 tasks of MuJoCo, "
        "Z the v2 tasks of LunarLander. "
        "[`results/published.csv`](results/published.csv) has every number with its protocol, also those "
        "measured as training returns, which are not set against evaluations here.",
    ]
    if not all(row.traced for row in rows):
        parts += ["", "† made by changed code, or by a commit that is not in the history."]
    if found.of("normalised iqm"):
        parts += [
            "",
            f"Over all tasks with {FEWEST} seeds and more, each agent on its own, with its own budgets and "
            "the first n seeds of each task, n being what all of its tasks have; 0 are random actions, "
            "1 is PPO as published, the highest of several values:",
            "",
            *aggregate_table(found),
            "",
            "![Aggregate scores, performance profiles, probabilities of improvement](results/aggregate.png)",
        ]
    if first is not None:
        parts += ["", f"![{first.caption}](results/{first.out.relative_to(results).as_posix()})"]
    more = [p for p in shown if p is not first]
    if more:
        paths = [p.out.relative_to(results).as_posix() for p in more]
        names = [p.caption.removeprefix("Learning curves on ") for p in more]
        links = [f"[{name}](results/{path})" for name, path in zip(names, paths, strict=True)]
        parts += ["", "More curves: " + ", ".join(links) + "."]
    return "\n".join(parts)


def between(text: str) -> tuple[str, str, str]:
    """A README before, between and after its markers. Raises UsageError."""
    require(
        text.count(BEGIN) == 1 and text.count(END) == 1 and text.index(BEGIN) < text.index(END),
        f"--readme: needs one line {BEGIN} and below it one line {END}",
    )
    head, rest = text.split(BEGIN)
    inside, tail = rest.split(END)
    return head, inside.strip("\n"), tail


# --- the aggregate picture ----------------------------------------------------------------------------------


def data_of(rows: Sequence[dict[str, str]]) -> str:
    """The fingerprint of statistics that a picture is drawn from."""
    return hashlib.sha256(repr([tuple(row.values()) for row in rows]).encode()).hexdigest()[:16]


def aggregate_rows(found: Statistics) -> list[dict[str, str]]:
    """All statistics that the aggregate picture shows."""
    return [row for row in found.rows if row["quantity"] not in ("mean", "iqm")]


def draw_aggregate(found: Statistics, out: Path) -> None:
    """Three axes: interquartile means, profiles, probabilities of improvement; published beside ours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 7.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.25), height_ratios=(1, 1.15))
    means, profiles = (figure.add_subplot(grid[0, column]) for column in (0, 1))
    chances = figure.add_subplot(grid[1, :])
    agents = found.of("normalised iqm")
    for place, row in enumerate(agents):
        name, value = row["agent"], float(row["value"])
        ends = [[value - float(row["low"])], [float(row["high"]) - value]]
        means.errorbar(value, place, xerr=ends, fmt="o", capsize=4, color=plot.colour(name))
        for theirs in found.of("published normalised iqm", name):
            means.plot(float(theirs["value"]), place, "D", mfc="none", color=plot.colour(name))
        curve = found.of("profile", name)
        x = [float(each["x"]) for each in curve]
        y, low, high = ([float(each[key]) for each in curve] for key in ("value", "low", "high"))
        count = f"{row['x']} tasks" if row["x"] != "1" else "1 task"
        profiles.plot(x, y, color=plot.colour(name), label=f"{name} ({count})")
        profiles.fill_between(x, low, high, color=plot.colour(name), alpha=0.15, linewidth=0)
        if published := found.of("published profile", name):
            y = [float(each["value"]) for each in published]
            profiles.plot(x, y, color=plot.colour(name), linestyle=":", linewidth=1, drawstyle="steps-post")
    means.set_yticks(range(len(agents)), [row["agent"] for row in agents])
    means.invert_yaxis()
    means.set_title("interquartile mean\n(◇ as published)", fontsize=10)
    means.set_xlabel("normalised score")
    profiles.set_title("share of runs above a score\n(dotted: published values)", fontsize=10)
    profiles.set_xlabel("normalised score (0 random, 1 PPO as published)")
    profiles.legend(fontsize=8)
    pairs = found.of("improvement")
    for place, row in enumerate(pairs):
        value = float(row["value"])
        ends = [[max(value - float(row["low"]), 0)], [max(float(row["high"]) - value, 0)]]
        chances.errorbar(value, place, xerr=ends, fmt="o", capsize=3, color=plot.colour(row["agent"]))
    words = [
        f"{row['agent']} > {row['against'].removeprefix(row['agent'] + ' ')}  ({row['x']})" for row in pairs
    ]
    chances.set_yticks(range(len(pairs)), words, fontsize=8)
    chances.invert_yaxis()
    chances.axvline(0.5, color="grey", linewidth=0.8)
    chances.set_xlim(-0.02, 1.02)
    title = "probability that a run of the first beats one of the second (on how many shared tasks)"
    chances.set_title(title, fontsize=10)
    for axes in (means, profiles, chances):
        axes.grid(alpha=0.3)
    title = f"Tasks with {FEWEST} seeds and more: points or lines with 95% stratified bootstrap intervals"
    figure.suptitle(title, fontsize=11)
    plot.save(figure, out, data_of(aggregate_rows(found)))


# --- all of it ----------------------------------------------------------------------------------------------


def needs(*modules: str) -> None:
    """Raise UsageError unless these can be imported."""
    for name in modules:
        found = importlib.util.find_spec(name) is not None
        require(found, f"{name} is missing: pip install -e '.[report]'")


def report(args: Args) -> None:
    """Rebuild it. Raises UsageError, RunFault."""
    needs("rliable", "matplotlib")
    require(args.readme.is_file(), f"--readme {args.readme}: no such file")
    with plot.reading(args.readme):
        head, _, tail = between(args.readme.read_text())
    rows = read_rows(args.results)
    if args.references:
        play_references(rows, args.results)
    lines = statistics(rows, args.results)
    store(args.results / "report.csv", COLUMNS, lines)
    found = read_statistics(args.results)
    with writing(args.results):
        if args.pictures:
            for each in pictures(rows, args.results):
                each.out.parent.mkdir(exist_ok=True)
                title = each.caption.removeprefix("Learning curves on ")
                given = (each.folders, each.labels, title, each.out)
                plot.draw(*given, results=args.results, until=each.until, columns=each.columns)
            if aggregate_rows(found):
                draw_aggregate(found, args.results / "aggregate.png")
        whole = f"{head}{BEGIN}\n{block(rows, found, args.results)}\n{END}{tail}"
        write_atomically(args.readme, lambda file: file.write(whole.encode()))
    print(f"{args.readme}: {len(rows)} rows, {len(lines)} statistics in {args.results}/report.csv")


def main() -> int:
    """Rebuild the report, or tell in one line what is wrong; the exit status."""
    return script_main(Args, __doc__, report)


if __name__ == "__main__":
    sys.exit(main())
