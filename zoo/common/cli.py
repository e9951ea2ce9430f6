"""The command line that all agents share: their common arguments, defaults by task, and how a run's end is told."""

import argparse
import dataclasses
import errno
import math
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import tyro

from zoo.common.errors import RunFault, UsageError
from zoo.common.files import load_checkpoint
from zoo.common.run import Interrupted, Run


@dataclass
class RunArgs:
    """The arguments that every agent takes; its own `Args` inherits them and adds the algorithm's."""

    env: str = "HalfCheetah-v4"
    """id of the Gymnasium environment"""
    seed: int = 1
    """seed of everything random"""
    total_steps: int = 1_000_000
    """environment steps of the whole run, over all environments"""
    num_envs: int = 1
    """environments stepped together"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks are"""
    compile: bool = True
    """compile the update (torch.compile)"""
    threads: int = 1
    """CPU threads of torch; small networks gain nothing from a second one"""
    env_threads: int | None = None
    """CPU threads of the MuJoCo engine; 1 when several runs share the machine; None: one a core"""
    run_dir: str | None = None
    """folder of the run, new or empty; None: runs/ENV__ALGO__SEED__TIME"""
    resume: str | None = None
    """folder of a run to go on with, from its last checkpoint and with its arguments"""
    eval_every: int = 100_000
    """environment steps between evaluations; 0: at the end only"""
    eval_episodes: int = 10
    """episodes of an evaluation"""
    checkpoint_every: float = 60.0
    """seconds between checkpoints"""
    track: bool = False
    """log to Weights & Biases as well"""
    track_project: str = "rl-zoo-classic"
    """its project"""
    progress: bool = True
    """show a progress bar (on a terminal only)"""


Args = TypeVar("Args", bound=RunArgs)

DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG}


def require(condition: bool, message: str) -> None:
    """Raise UsageError(message) unless the condition holds."""
    if not condition:
        raise UsageError(message)


def check_args(
    args: RunArgs,
    at_least_1: Sequence[str] = (),
    fractions: Sequence[str] = (),
    positive: Sequence[str] = (),
    finite: Sequence[str] = (),
) -> None:
    """Refuse common arguments that cannot work, and the agent's own named as at least 1, in [0, 1], positive or finite.

    None passes, and of a tuple every element is meant. Agents call it first and `require` what else they need.
    """
    least = {"seed": 0, "total_steps": 1, "num_envs": 1, "threads": 1, "env_threads": 1, "eval_every": 0, "eval_episodes": 1}
    least |= dict.fromkeys(at_least_1, 1)
    for name, minimum in least.items():
        value = getattr(args, name)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        fits = all(v >= minimum for v in values) and value != ()
        require(fits, f"--{name.replace('_', '-')} must be at least {minimum}, not {value}")
    for name in fractions:
        value = getattr(args, name)
        require(0 <= value <= 1, f"--{name.replace('_', '-')} must lie in [0, 1], not {value:g}")
    for name in positive:
        value = getattr(args, name)
        if value is not None:
            require(0 < value < math.inf, f"--{name.replace('_', '-')} must be greater than 0, not {value:g}")
    for name in finite:
        value = getattr(args, name)
        require(value is None or math.isfinite(value), f"--{name.replace('_', '-')} must be finite, not {value}")
    require(args.seed < 2**31, f"--seed must be less than 2**31, not {args.seed}")
    require(args.checkpoint_every > 0, f"--checkpoint-every must be greater than 0 seconds, not {args.checkpoint_every:g}")
    require(
        not (args.run_dir and args.resume),
        f"--run-dir {args.run_dir} and --resume {args.resume} exclude each other: a resumed run stays in its folder",
    )


def parse(args_class: type[Args], defaults_for: Callable[[str], dict], argv: Sequence[str]) -> Args:
    """The arguments: as given in `argv`, else as saved in the run resumed, else the task's, else the dataclass's.

    Raises UsageError (the checkpoint cannot be resumed) and SystemExit (status 2 from tyro; 0 after --help).
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--env", nargs="?")  # nargs: complaints are left to tyro
    first.add_argument("--resume", nargs="?")
    given = first.parse_known_args(argv)[0]
    names = [field.name for field in dataclasses.fields(args_class)]
    if given.resume and given.resume != "None":
        checkpoint = load_checkpoint(Path(given.resume) / "checkpoint.pt", "--resume", env=given.env)
        known: dict[str, Any] = {name: value for name, value in checkpoint["args"].items() if name in names}
        if foreign := sorted(checkpoint["args"].keys() - set(names)):
            raise UsageError(
                f"--resume {given.resume}: is a run of agent {checkpoint['agent']}, whose arguments this one lacks: "
                + ", ".join(foreign)
            )
        known |= {"run_dir": None, "resume": None}
    else:
        known = defaults_for(given.env or args_class().env)
    # tyro lists fields in the dataclass's order, where the inherited ones come first: the algorithm's belong there
    fields = args_class.__dataclass_fields__
    args_class.__dataclass_fields__ = {name: fields[name] for name in (*args_class.__annotations__, *fields)}
    about = (sys.modules[args_class.__module__].__doc__ or "").split("\n\n")[0]  # of the agent's file
    return tyro.cli(args_class, args=list(argv), default=dataclasses.replace(args_class(), **known), description=about)


def main(args_class: type[Args], train: Callable[[Args], Any], defaults_for: Callable[[str], dict]) -> None:
    """Parse sys.argv, train, and tell in one line how it ended when it ended badly.

    defaults_for: the agent's table, from an environment's id to the fields whose defaults differ there.
    Exit status: 2 for what the user got wrong, 1 for a fault of the run, 130 after Ctrl-C, 143 after SIGTERM.
    """

    def ask_to_stop(signal_number: int, _frame: object) -> None:
        if Run.stop_signal:  # asked before: do not wait for the end of the iteration
            raise Interrupted(signal_number)
        Run.stop_signal = signal_number

    def report_thread_failure(failure: threading.ExceptHookArgs) -> None:
        if not issubclass(failure.exc_type, OSError):  # TensorBoard's thread hands its own to the main thread as well
            threading.__excepthook__(failure)

    Run.stop_signal, Run.latest = 0, None
    threading.excepthook = report_thread_failure
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, ask_to_stop)
    try:
        train(parse(args_class, defaults_for, sys.argv[1:]))
    except UsageError as error:
        _end(2, f"error: {error}")
    except RunFault as error:
        _end(1, f"error: {error}\n{_last_checkpoint()}")
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        _end(1, f"error: {error}\n{_last_checkpoint()}")
    except KeyboardInterrupt as error:
        number = error.signal_number if isinstance(error, Interrupted) else int(signal.SIGINT)
        run = Run.latest
        if run is not None and run.saved_step is not None:
            _end(128 + number, f"interrupted at step {run.saved_step}; resume with: {_resume_command(run)}")
        _end(128 + number, "interrupted before the first checkpoint; start again")


def _resume_command(run: Run) -> str:
    return f"python {shlex.quote(sys.argv[0])} --resume {shlex.quote(str(run.folder))}"


def _last_checkpoint() -> str:
    run = Run.latest
    if run is None or run.saved_step is None:
        return "no checkpoint had been written yet"
    return f"last good checkpoint: step {run.saved_step}; resume with: {_resume_command(run)}"


def _end(status: int, message: str) -> NoReturn:
    if Run.latest is not None:
        Run.latest.close()  # the progress bar first: the message shall stand on a line of its own
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)
