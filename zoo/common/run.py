"""A training run seen from outside the algorithm: its folder, reports, evaluations and checkpoints.

    run = Run(args, "ppo", Evaluation(args, make_policy), engine=envs.engine)
    state = run.restore(State(...))                         # the fresh one; after --resume the checkpoint's
    while run.step < args.total_steps:
        ...
        run.report(step, state, acting, metrics, episodes)  # the end of one iteration
    return run.finish(state, acting)

Nothing here draws from the random generators of training, so that neither a checkpoint nor an evaluation
changes a run. What training has made is saved before an evaluation is tried, which may fail.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from zoo.common.args import RunArgs, flag
from zoo.common.errors import Interrupted, RunFault, UsageError
from zoo.common.files import load_checkpoint, save_checkpoint, writing
from zoo.common.folder import describe, described, new_folder, old_folder
from zoo.common.logs import COLUMNS, Logs
from zoo.common.process import present_process, say
from zoo.common.state import device_of, portable, restored

State = TypeVar("State")

SCRIPTS = Path(__file__).parents[2] / "scripts"


class Run:
    """One training run: `report` after each iteration, `finish` at the end. Holds its folder until closed."""

    def __init__(
        self, args: RunArgs, agent: str, evaluate: Callable[[Any], dict[str, float]],
        engine: str | None = None, unit: str = "steps",
    ):  # fmt: skip
        """Open a new folder, or the one that `args.resume` names.

        evaluate: from what acting needs to an evaluation's columns; called when one is due. engine: that of
        the environments, for args.json. unit: what `step` counts.
        Raises UsageError (folder or checkpoint unusable, an argument changed that is kept, wandb missing, the
        name of another file's agent) or RunFault.
        """
        _check_name(agent, evaluate)
        if args.track and importlib.util.find_spec("wandb") is None:
            raise UsageError("--track needs Weights & Biases: pip install wandb")
        # a copy: checkpoints hold the arguments as they were asked for, whatever `train` makes of its own
        self.args, self.agent, self.unit = dataclasses.replace(args), agent, unit
        self.step = 0  # done so far: environment steps over all environments, or what `unit` says
        self._evaluate = evaluate
        self._recent: deque[tuple[float, int]] = deque(maxlen=100)  # (return, length) of the last episodes
        self._saved: Any = None  # the state to be restored
        self._resumed_at = 0  # the step of the checkpoint that it goes on from
        self._made_by: dict | None = None  # the arguments of the part before, until a step is made by these
        self._rows: int | None = None  # of its table
        self._owed: dict | None = None  # for the evaluation that was due when the checkpoint was written
        self._open = contextlib.ExitStack()  # what close() has to close
        self._process = present_process()
        self._process.new_run()
        self._process.closing.callback(self._open.close)
        wall_time = 0.0
        with self._closed_on_error():
            if args.resume:
                self.folder = Path(args.resume)
                wall_time = self._resume()
            else:
                self.folder, lock = new_folder(args, agent)
                self._open.enter_context(lock)
            self._process.folder = self.folder
            self._engine = engine
            with writing(self.folder):
                if not args.resume:
                    describe(self.folder / "args.json", dataclasses.asdict(args), agent, engine)
                self._logs = Logs(self.folder, args, self.step, self._rows, unit)
            self._open.callback(self._logs.close)
        self._saved_at = time.perf_counter()
        self._started = self._saved_at - wall_time
        resumed = f", resumed at step {self.step:,}" if args.resume else ""
        say(f"run folder: {self.folder}{resumed}")

    def _resume(self) -> float:
        """Take over the checkpoint, all but its state; the seconds that the run took so far."""
        checkpoint = self.folder / "checkpoint.pt"
        if checkpoint.is_file():  # else load_checkpoint says so, and no lock file is left in a foreign folder
            self._open.enter_context(old_folder(self.folder))
        saved = load_checkpoint(checkpoint, "--resume", self.agent, self.args.env)
        for name in self.args.kept:
            was, wanted = saved["args"].get(name), getattr(self.args, name)
            if name in saved["args"] and was != wanted:
                reason = f"the run in {self.folder} was made with {was} and keeps it"
                raise UsageError(f"{flag(name)} {wanted}: {reason}")
        self.step = self._resumed_at = self._process.saved_step = saved["step"]
        described(self.folder / "args.json")  # refuses a damaged one now, not after the first iteration
        self._made_by = saved["args"]
        self._recent.extend((return_, length) for return_, length in saved["run"]["recent"])
        self._saved, self._owed = saved["state"], saved["run"]["owed"]
        self._rows = saved["run"].get("rows")  # older checkpoints do not say
        return saved["run"]["wall_time"]

    def restore(self, state: State) -> State:
        """The fresh `state`; in a resumed run the checkpoint's in its form, see `restored` of state.py.

        Raises UsageError where the two do not fit.
        """
        if self._saved is None:
            return state
        with self._closed_on_error():
            try:
                state = restored(state, self._saved, self.args.seed, self.step)
            except ValueError as error:
                advice = "was the run made by other code?"
                raise UsageError(f"--resume {self.folder}: {error}; {advice}") from error
            self._saved, device = None, device_of(state)
            self._owed = tree_map_only(torch.Tensor, lambda x: x.to(device), self._owed)
        return state

    def save(self, state: Any) -> None:
        """Write a new run's first checkpoint before its first report. Raises RunFault."""
        with self._closed_on_error():
            content = portable(state)
            with writing(self.folder):
                self._save(content)

    def report(
        self, step: int, state: Any, acting: Any, metrics: Mapping[str, float | torch.Tensor],
        episodes: Sequence[tuple[float, int]], milestone: bool = False,
    ) -> None:  # fmt: skip
        """End an iteration: log it; checkpoint and evaluate when due; act on Ctrl-C.

        step: done so far, counted in `unit`. state: everything needed to go on, see state.py. acting: what
        `evaluate` and agent.pt need, nested dicts of tensors, numbers and strings. metrics: numbers or 0-d
        tensors. episodes: (return, length) of those ended since the last report. milestone: a checkpoint is
        due, and an evaluation unless there are none. The first report of a resumed run makes the evaluation
        that was owed: by then the agent has all of what it was restored to.
        Raises RunFault for a non-finite metric or state, before the last checkpoint is touched; UsageError
        for a metric that is no number or has the name of a column of the run's own; Interrupted.
        """
        with self._closed_on_error():
            values = {name: _number(name, value) for name, value in metrics.items()}
            for name, value in values.items():
                if not math.isfinite(value):
                    raise RunFault(f"{name} became {value} in the iteration that ended at step {step:,}")
            owed, self._owed = self._owed, None
            if owed and self.args.eval_every and not self._logs.table.last_has_more_than(owed["columns"]):
                self._evaluated(owed["acting"])
            every, stopping = self.args.eval_every, self._process.stop_signal
            due = every > 0 and (milestone or step // every > self.step // every)
            evaluating = due and step < self.args.total_steps  # at the end `finish` evaluates
            now, self.step = time.perf_counter(), step
            late = now - self._saved_at >= self.args.checkpoint_every
            saving = evaluating or milestone or late or bool(stopping)
            content = portable(state) if saving else None  # refuses a non-finite state
            self._recent.extend((float(return_), int(length)) for return_, length in episodes)
            wall_time = now - self._started
            row = {"step": step, "wall_time": round(wall_time, 3), "sps": round(step / wall_time, 1)}
            if self._recent:
                row["train_return"], row["train_length"] = np.mean(self._recent, axis=0).tolist()
            with writing(self.folder):
                if self._made_by is not None:  # the first step that a resumed run has made
                    self._made_by, path = None, self.folder / "args.json"
                    given = dataclasses.asdict(self.args)
                    describe(path, given, self.agent, self._engine, self._resumed_at)
                self._logs.report(row, values, episodes)
                if content is not None:
                    owed = {"acting": portable(acting, "acting"), "columns": [*row, *values]}
                    self._save(content, owed if evaluating else None)
            if evaluating and not stopping:  # else the resumed run does
                self._evaluated(acting)
                stopping = self._process.stop_signal  # received meanwhile
            if stopping:
                raise Interrupted(stopping)

    def finish(self, state: Any, acting: Any) -> float:
        """Write checkpoint.pt and agent.pt (holding `acting`), evaluate a last time, close; the mean return.

        Where nothing has a return, the first of the evaluation's values. Raises RunFault, Interrupted.
        """
        with self._closed_on_error():
            content, agent_content = portable(state), portable(acting, "acting")
            finished_before = self._made_by is not None and (self.folder / "agent.pt").is_file()
            if finished_before:  # by a run whose arguments stay with what they have made
                say(f"finished at step {self.step:,}; more --total-steps go on")
            else:
                with writing(self.folder):
                    self._save(content)
                    save_checkpoint(self.folder / "agent.pt", {**self._identity(), "state": agent_content})
            self._process.trained, self._process.doing = True, "the final evaluation"
            values = self._evaluated(acting, final=True)
        self.close()
        plays = "eval_return" in values
        over = f" over {self.args.eval_episodes} episodes" if plays else ""
        print(f"final evaluation: {told(values)}{over}", flush=True)
        for script in ("watch", "evaluate"):
            path = SCRIPTS / f"{script}.py"
            known = importlib.util.find_spec(f"zoo.{self.agent}")  # else zoo.load does not find its policy
            if plays and known and path.is_file():  # it is not where the package alone is installed
                command = shlex.join(["python", os.path.relpath(path), str(self.folder)])
                say(f"to {script} it: {command}")
        return next(iter(values.values()))

    def close(self) -> None:
        """Release the folder, the bar and the logs; the checkpoint stays as it is. May be called again."""
        # a full disk, already told, fails once more when the logs are flushed
        with contextlib.suppress(OSError):
            self._open.close()

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _evaluated(self, acting: Any, final: bool = False) -> dict[str, float]:
        """Evaluate; the values, which are logged in the last row and told."""
        try:
            # a network that is made to be filled draws its first weights
            with torch.random.fork_rng(devices=[]):
                values = self._evaluate(acting)
        except RunFault as error:
            which = "final evaluation" if final else f"evaluation at step {self.step:,}"
            trained = f"the agent is trained: {self.folder}/agent.pt"
            advice = trained if final else "--eval-every 0 goes on without evaluations"
            raise RunFault(f"{which}: {error}; {advice}") from error
        if final and self._made_by is not None:  # by no step of this call
            last, own = self._logs.table.last(), self._made_by["eval_episodes"] == self.args.eval_episodes
            if not own or any(last.get(name) for name in values):
                return values  # told only: the table keeps one, of as many episodes as args.json says
        with writing(self.folder):
            self._logs.evaluation(self.step, values)
        if not final:
            say(f"{self.step:,} {self.unit}: evaluation {told(values)}")
        return values

    def _identity(self) -> dict:
        args = self._made_by or portable(dataclasses.asdict(self.args), "args")
        return {"agent": self.agent, "env": self.args.env, "args": args}

    def _save(self, state: Any, owed: dict | None = None) -> None:
        self._logs.table.sync()  # the table must never be behind the checkpoint
        wall_time = time.perf_counter() - self._started
        bookkeeping = {"wall_time": wall_time, "recent": list(self._recent), "owed": owed}
        bookkeeping["rows"] = self._logs.table.count
        content = {**self._identity(), "step": self.step, "state": state, "run": bookkeeping}
        save_checkpoint(self.folder / "checkpoint.pt", content)
        self._process.saved_step, self._saved_at = self.step, time.perf_counter()


def _number(name: str, value: Any) -> float:
    """A metric's value, under a name that its column can have. Raises UsageError."""
    if name in COLUMNS:
        raise UsageError(
            f"metric {name!r}: progress.csv has a column of that name already; call it otherwise"
        )
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:  # which one depends on torch's version
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
        raise UsageError(f"metric {name!r} is a {type(value).__name__}{shape}, no single number") from error


def _check_name(agent: str, evaluate: Any) -> None:
    """Refuse to name a run after an agent's file whose policy is another: `zoo.load` goes by the name."""
    code = getattr(getattr(evaluate, "make_policy", None), "__code__", None)
    spec = importlib.util.find_spec(f"zoo.{agent}")
    if code is None or spec is None or spec.origin is None:
        return
    file, known = Path(code.co_filename), Path(spec.origin)
    if file.is_file() and known.is_file() and file.read_bytes() != known.read_bytes():
        own = file.stem if file.stem != agent else f"my_{agent}"
        raise UsageError(
            f'{file}: Run(args, "{agent}", ...) names the run after zoo/{known.name}, whose code would play '
            f'and resume it; give it a name of its own: Run(args, "{own}", ...)'
        )


def told(values: Mapping[str, float]) -> str:
    """An evaluation's values as they are printed."""
    if "eval_return" in values:
        return f"{values['eval_return']:.2f} ± {values['eval_std']:.2f}"
    return ", ".join(f"{name.removeprefix('eval_')} {value:.4g}" for name, value in values.items())
