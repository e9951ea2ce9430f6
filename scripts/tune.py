"""Search an agent's arguments on a task with Optuna.

    python scripts/tune.py --agent ppo --env Pendulum-v1 --args "--total-steps 30000 --no-compile"
    python scripts/tune.py --agent ppo --env Pendulum-v1 --only learning_rate gamma
    python scripts/tune.py --env Pendulum-v1 --space learning_rate=1e-4..1e-2 "num_steps=16|64|256"

What is searched follows from the type and the name of each field of the agent's Args, around its value on
the task:

    learning rates               a tenth to ten times, on a log scale
    gamma, lambdas               what is left to 1: a fifth to ten times, on a log scale
    other positive numbers       a quarter to four times, on a log scale; those of 0: 0, 0.001 or 0.01
    negative numbers             1 less to 1 more
    whole numbers                a quarter, half, double, four times; widths: half and double
    switches, lists of names     each of them
    what is None                 nothing

--space replaces a field's range by LOW..HIGH, on a log scale where HIGH is ten times LOW or more, or by
A|B|C. The first trial is the agent as it is. A trial whose evaluations fall below the median of those before
it is given up. Everything is kept in FOLDER/study.db: the same command goes on after Ctrl-C, and with a
larger --trials searches on. At the end the best trial and the agent as it is are run again on --confirm seeds
that the search has not seen, and FOLDER/importance.png shows what mattered.

Needs the extra `tune`: pip install -e '.[tune]'.
"""

import contextlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import shlex
import sys
import tempfile
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import benchmark
import numpy as np

import zoo
from zoo.common.args import RunArgs, as_words, flag, lookup_in, require
from zoo.common.cli import parse, script_main
from zoo.common.envs import make_single
from zoo.common.errors import RunFault, UsageError
from zoo.common.files import lock_folder, make_folder, writing

FRACTIONS = ("gamma", "lambda")  # in a name: near 1, and what is left to 1 counts
# what an agent's Args give another default, but which changes nothing that is learnt
BOOKKEEPING = {each.name for each in fields(RunArgs)} - {"num_envs"} | {"report_every", "bf16"}
EVALUATIONS = 10  # of a trial, where the agent's arguments do not say


@dataclass
class Args:
    agent: str = "ppo"
    """name of the agent's file"""
    env: str = "Pendulum-v1"
    """id of the Gymnasium environment"""
    trials: int = 40
    """trials of the whole search, those of earlier calls counted"""
    seeds: str = "1"
    """seeds of which a trial is the mean, such as 1-3"""
    only: tuple[str, ...] = ()
    """fields to search (default: all that have a range and are not in --args)"""
    space: tuple[str, ...] = ()
    """ranges of fields in place of the derived ones: NAME=LOW..HIGH or NAME=A|B|C"""
    args: str = ""
    """arguments of every run, in one string"""
    confirm: int = 3
    """seeds on which the best trial and the agent as it is are compared at the end; 0: no comparison"""
    folder: Path | None = None
    """where the search is kept (default: runs/tune/AGENT/TASK)"""
    agents: Path | None = None
    """folder of the agents' files (default: the zoo's)"""


# --- the search space ---------------------------------------------------------------------------------------


class Range(NamedTuple):
    """What a field may be: one of `choices`, or between low and high."""

    name: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    complement: bool = False  # 1 less the value is what is drawn

    def suggest(self, trial: Any) -> Any:
        """The field's value in a trial of Optuna's."""
        if self.choices:
            return unpacked(trial.suggest_categorical(self.name, [packed(c) for c in self.choices]))
        log = self.low > 0 and self.high >= 9.99 * self.low
        if self.whole:
            return trial.suggest_int(self.name, round(self.low), round(self.high), log=log)
        drawn = trial.suggest_float(self.name, self.low, self.high, log=log)
        return 1 - drawn if self.complement else drawn

    def drawn(self, value: Any) -> Any:
        """What Optuna would have drawn for a value; None where it cannot."""
        if self.choices:
            return packed(value) if value in self.choices else None
        value = 1 - value if self.complement else value
        return value if self.low <= value <= self.high else None


def packed(value: Any) -> Any:
    """A choice as Optuna stores it: a tuple as text."""
    return json.dumps(value) if isinstance(value, tuple) else value


def unpacked(value: Any) -> Any:
    """The choice that was stored."""
    return tuple(json.loads(value)) if isinstance(value, str) and value.startswith("[") else value


def derived(name: str, kind: Any, value: Any) -> Range | None:
    """A field's range by its type and name, around its value; None where nothing follows from them."""
    if typing.get_origin(kind) is typing.Literal:
        return Range(name, typing.get_args(kind))
    if value is None or isinstance(value, str):
        return None
    if isinstance(value, bool):
        return Range(name, (True, False))
    if isinstance(value, tuple):
        scaled = [tuple(max(round(v * f), 1) for v in value) for f in (0.5, 1, 2)]
        return Range(name, tuple(dict.fromkeys(scaled)))
    if isinstance(value, int):
        found = [max(round(value * f), 1) for f in (0.25, 0.5, 1, 2, 4)]
        return Range(name, tuple(dict.fromkeys(found))) if value > 0 else None
    if any(word in name for word in FRACTIONS) and 0 < value <= 1:
        left = max(1 - value, 0.002)
        return Range(name, low=left / 5 if value < 1 else 0.0, high=min(10 * left, 0.5), complement=True)
    if value == 0:
        return Range(name, (0.0, 0.001, 0.01))
    if value < 0:
        return Range(name, low=value - 1, high=value + 1)
    factor = 10 if name.endswith("learning_rate") else 4
    return Range(name, low=value / factor, high=value * factor)


def given_range(text: str, kinds: dict[str, Any], default: RunArgs) -> Range:
    """A range as --space gives it. Raises UsageError."""
    name, equals, rest = text.partition("=")
    form = "give NAME=LOW..HIGH or NAME=A|B|C"
    require(bool(equals) and name in kinds, f"--space {text}: {form}; {known(kinds)}")
    value = getattr(default, name)
    whole = isinstance(value, int) and not isinstance(value, bool)
    try:
        if ".." in rest:
            low, high = (float(part) for part in rest.split(".."))
            if math.isfinite(low) and math.isfinite(high) and low < high:
                return Range(name, low=low, high=high, whole=whole)
        elif rest:
            return Range(name, tuple(read(part, value) for part in rest.split("|")))
    except ValueError:
        pass
    raise UsageError(f"--space {text}: {rest!r} is neither LOW..HIGH nor A|B|C of what {flag(name)} takes")


def read(text: str, like: Any) -> Any:
    """A choice of --space, of the type of the field's present value. Raises ValueError."""
    if isinstance(like, bool):
        if text not in ("True", "False"):
            raise ValueError(text)
        return text == "True"
    if isinstance(like, tuple):
        return tuple(int(part) for part in text.split(","))
    if isinstance(like, str):
        return text
    if text == "None":
        return None
    return int(text) if isinstance(like, int) else float(text)


def known(kinds: dict[str, Any]) -> str:
    return f"the fields are {', '.join(kinds)}"


def refuse_impossible(text: str, given: Range, module: ModuleType, default: RunArgs) -> None:
    """Raise UsageError where a field's own bounds hold no end of a range and none of its choices."""
    ends = given.choices or (given.low, given.high)
    refused = []
    for value in (round(end) if given.whole else end for end in ends):
        try:
            if hasattr(module, "check"):
                module.check(replace(default, **{given.name: value}))
        except UsageError as error:
            if str(error).startswith(f"{flag(given.name)} must "):  # else it may go with other values
                refused.append(str(error))
    require(len(refused) < len(ends), f"--space {text}: {'; '.join(refused[:1])}")


def search_space(default: RunArgs, args: Args, module: ModuleType) -> list[Range]:
    """The ranges of this search. Raises UsageError."""
    own = inspect.get_annotations(type(default)).keys()
    hints = typing.get_type_hints(type(default))
    kinds = {each.name: hints[each.name] for each in fields(default) if each.name in own - BOOKKEEPING}
    for name in args.only:
        require(name in kinds, f"--only {name}: no field of this agent; {known(kinds)}")
    given = [given_range(text, kinds, default) for text in args.space]
    for text, each in zip(args.space, given, strict=True):
        refuse_impossible(text, each, module, default)
    settled = {each.name for each in given}
    if not args.only:
        settled |= benchmark.given_fields(benchmark.run_words(args.args))
    wanted = [name for name in args.only or kinds if name not in settled]
    ranges = [derived(name, kinds[name], getattr(default, name)) for name in wanted]
    for name, found in zip(wanted, ranges, strict=True):
        words = f"--only {name}: nothing follows from its value; give --space {name}=..."
        require(found is not None or name not in args.only, words)
    return given + [found for found in ranges if found is not None]


# --- trials -------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """A trial given up by the pruner."""


class Cut(BaseException):
    """Ctrl-C in a trial, as Optuna lets it through: of a KeyboardInterrupt it logs a traceback, and counts
    the trial as failed, so that a search that goes on would leave it out."""


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """What runs say is not the search's."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def score(
    module: ModuleType, args: RunArgs, seeds: Sequence[int], folder: Path,
    watch: Callable[[int, float], bool] = lambda _number, _value: False,
) -> float:  # fmt: skip
    """The mean over seeds of an agent's final evaluations. Raises Stopped, UsageError, RunFault.

    watch(number, value) is told of each evaluation, numbered over all seeds; true ends the trial.
    """
    original: Any = module.Run  # type: ignore[attr-defined]
    count = 0

    class Watched(original):  # type: ignore[misc,valid-type]
        def _evaluated(self, acting: Any, final: bool = False) -> dict[str, float]:
            nonlocal count
            values = super()._evaluated(acting, final)
            count += 1
            if watch(count, next(iter(values.values()))):
                raise Stopped
            return values

    finals = []
    module.Run = Watched  # type: ignore[attr-defined]
    try:
        for seed in seeds:
            with tempfile.TemporaryDirectory(dir=folder) as run, silence():
                finals.append(module.train(replace(args, seed=seed, run_dir=str(Path(run) / "run"))))
    finally:
        module.Run = original  # type: ignore[attr-defined]
    return float(np.mean(finals))


def objective(
    trial: Any, module: ModuleType, default: RunArgs, ranges: list[Range], seeds: list[int], folder: Path
) -> float:
    """A trial's score, its evaluations reported to Optuna's pruner."""
    import optuna

    args = replace(default, **{each.name: each.suggest(trial) for each in ranges})

    def watch(number: int, value: float) -> bool:
        trial.report(value, number)
        return trial.should_prune()

    try:
        if hasattr(module, "check"):
            module.check(args)
        return score(module, args, seeds, folder, watch)
    except UsageError as error:  # arguments that do not go together
        trial.set_user_attr("refused", str(error))
    except RunFault as error:  # a loss that became infinite, say
        trial.set_user_attr("failed", str(error))
    except Stopped:
        pass
    except KeyboardInterrupt as error:
        raise Cut from error
    raise optuna.TrialPruned


def arguments(module: ModuleType, args: Args) -> RunArgs:
    """The agent's arguments as they are. Raises UsageError."""
    more = benchmark.run_words(args.args)
    given = ["--env", args.env, "--no-progress", "--threads", "1", "--env-threads", "1", *more]
    default = parse(module.Args, lookup_in(module.Args), given)
    if hasattr(module, "check"):
        module.check(default)
    if "eval_every" not in benchmark.given_fields(more):
        default = replace(default, eval_every=max(default.total_steps // EVALUATIONS, 1))
    return default


def command(agent: str, env: str, values: dict[str, Any], more: str = "") -> str:
    """What runs the agent so; more: further arguments, as --args has them, over which the values win."""
    words = ["python", f"zoo/{agent}.py", "--env", env, *shlex.split(more)]
    for name, value in values.items():
        words += as_words(name, value)
    return shlex.join(words)


def tune(args: Args) -> None:
    """Search, compare, draw. Raises UsageError, RunFault."""
    for name in ("optuna", "matplotlib", "sklearn"):
        found = importlib.util.find_spec(name) is not None
        require(found, f"{name} is missing: pip install -e '.[tune]'")
    import optuna

    require(args.trials >= 1, f"--trials must be at least 1, not {args.trials}")
    require(args.confirm >= 0, f"--confirm must be at least 0, not {args.confirm}")
    seeds = benchmark.parse_seeds(args.seeds)
    module = benchmark.load_agent((args.agents or Path(zoo.__file__).parent) / f"{args.agent}.py")
    make_single(args.env).close()
    default = arguments(module, args)
    ranges = search_space(default, args, module)
    folder = args.folder or Path("runs/tune") / args.agent / args.env.replace("/", "_").replace(":", "_")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with contextlib.ExitStack() as stack:
        make_folder(folder, "--folder")
        stack.enter_context(lock_folder(folder, "--folder"))
        study = open_study(folder / "study.db")
        setting = {"agent": args.agent, "env": args.env, "seeds": seeds, "args": args.args}
        setting["ranges"] = json.loads(json.dumps(ranges))  # as Optuna gives them back
        before = study.user_attrs.get("setting", setting)
        differing = [name for name in setting if before.get(name, setting[name]) != setting[name]]
        require(
            not differing,
            f"--folder {folder}: holds a search with other {', '.join(differing)}; name another one",
        )
        study.set_user_attr("setting", setting)
        # another seed for every start, or a search that goes on would draw what it has drawn
        study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
        go_on(study, default, ranges, args.trials)
        run = partial(objective, module=module, default=default, ranges=ranges, seeds=seeds, folder=folder)
        while (left := args.trials - ended(study)) > 0:
            try:
                study.optimize(run, n_trials=min(left, 1), callbacks=[tell])
            except Cut as cut:
                raise cut.__cause__ from None  # type: ignore[misc]
        require(
            any(trial.state.name == "COMPLETE" for trial in study.trials),
            f"--space: none of {len(study.trials)} trials was completed; the last: {why(study.trials[-1])}",
        )
        best = optuna.trial.FixedTrial(study.best_params)
        values = {each.name: each.suggest(best) for each in ranges}
        print(f"best: {study.best_value:.6g} in trial {study.best_trial.number}")
        print(command(args.agent, args.env, values, args.args))
        draw(study, folder / "importance.png")
        if args.confirm:
            compare(module, default, values, args.confirm, seeds, folder)


def open_study(path: Path) -> Any:
    """The search kept in a file, or a new one. Raises UsageError."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return optuna.create_study(
            study_name="tune", storage=f"sqlite:///{path}", load_if_exists=True, direction="maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2),
        )  # fmt: skip
    except (SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:
        why = " ".join(str(getattr(error, "orig", None) or error).split())
        raise UsageError(f"--folder {path.parent}: {path.name} is no search of Optuna's ({why})") from error


def ended(study: Any) -> int:
    """Trials that count."""
    return sum(trial.state.is_finished() and trial.state.name != "FAIL" for trial in study.trials)


def go_on(study: Any, default: RunArgs, ranges: list[Range], trials: int) -> None:
    """Prepare a new search, whose first trial is the agent as it is, or one that was cut short."""
    import optuna

    if not study.trials:
        drawn = {each.name: each.drawn(getattr(default, each.name)) for each in ranges}
        study.enqueue_trial({name: value for name, value in drawn.items() if value is not None})
    for trial in study.trials:
        if trial.state == optuna.trial.TrialState.RUNNING:  # killed in it: the same again
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params)
    if done := ended(study):
        print(f"{done} of {trials} trials are done", flush=True)


def why(trial: Any) -> str:
    """Why a trial was not completed."""
    return trial.user_attrs.get("refused") or trial.user_attrs.get("failed") or "given up"


def tell(study: Any, trial: Any) -> None:
    """A line for a trial."""
    result = f"{trial.value:.6g}" if trial.state.name == "COMPLETE" else why(trial)
    print(f"trial {trial.number}: {result}", flush=True)


def compare(
    module: ModuleType, default: RunArgs, values: dict[str, Any], count: int, seen: list[int], folder: Path
) -> None:
    """Run the best trial's arguments and the agent's own on seeds that the search has not seen."""
    fresh = list(itertools.islice((seed for seed in itertools.count(1001) if seed not in seen), count))
    for name, args in (("best", replace(default, **values)), ("as it is", default)):
        finals = np.array([score(module, args, [seed], folder) for seed in fresh])
        spread = f" ± {finals.std(ddof=1):.6g}" if count > 1 else ""
        told = ", ".join(map(str, fresh))
        print(f"{name}: {finals.mean():.6g}{spread} over seeds {told}", flush=True)


def draw(study: Any, out: Path) -> None:
    """Optuna's picture of what mattered."""
    import matplotlib

    matplotlib.use("Agg")
    from optuna.visualization.matplotlib import plot_param_importances

    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    if len({trial.value for trial in complete}) < 2:
        print("note: no picture of what mattered, two different scores are needed for it", file=sys.stderr)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Optuna may yet change how it is called
        figure: Any = plot_param_importances(study).figure
    with writing(out.parent):
        figure.savefig(out, dpi=120, bbox_inches="tight")
    print(f"{out}: what mattered")


def main(argv: Sequence[str] | None = None) -> int:
    """Search, or tell in one line what is wrong; the exit status."""
    return script_main(Args, __doc__, tune, argv, "interrupted; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
