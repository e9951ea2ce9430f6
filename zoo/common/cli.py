"""The command line that all agents share: arguments, defaults by task, and how a run's end is told; and what
of it the scripts share."""

import argparse
import contextlib
import dataclasses
import errno
import io
import os
import re
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import tyro
from tyro.constructors import (
    MISSING_NONPROP,
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from zoo.common.args import PLUMBING, TASK, RunArgs, check_args, require, settings, settings_for
from zoo.common.errors import Interrupted, RunFault, UsageError
from zoo.common.process import Process

__all__ = ["RunArgs", "check_args", "main", "parse", "require"]  # all that an agent's file needs

Args = TypeVar("Args", bound=RunArgs)
ScriptArgs = TypeVar("ScriptArgs")

DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG}


def parse(args_class: type[Args], defaults_for: Callable[[str], dict], argv: Sequence[str]) -> Args:
    """The arguments: those in `argv`, else those of the run resumed, else the task's, else the dataclass's.

    Raises UsageError (for what cannot be read, or resumed) and SystemExit (0, after --help).
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--env", nargs="?")  # nargs: complaints are left to tyro
    first.add_argument("--resume", nargs="?")
    given = first.parse_known_args(argv)[0]
    names = [field.name for field in dataclasses.fields(args_class)]
    if given.resume and given.resume != "None":
        from zoo.common.files import load_checkpoint  # a second, spared to the scripts' --help

        checkpoint = load_checkpoint(Path(given.resume) / "checkpoint.pt", "--resume", env=given.env)
        known: dict[str, Any] = {name: value for name, value in checkpoint["args"].items() if name in names}
        agent, here = checkpoint["agent"], Path(sys.modules[args_class.__module__].__file__ or "").stem
        if foreign := sorted(checkpoint["args"].keys() - set(names)):
            lacks = f"whose arguments this one lacks: {', '.join(foreign)}"
            lacks = lacks if agent == here else f"not of {here}; zoo/{agent}.py goes on with it"
            raise UsageError(f"--resume {given.resume}: is a run of agent {agent}, {lacks}")
        known |= {"run_dir": None, "resume": None}
    else:
        known = settings_for(given.env or args_class().env, defaults_for)
    default = dataclasses.replace(args_class(), **known)
    hidden = args_class.idle if {"-h", "--help"} & set(argv) else ()
    with registry(args_class, hidden), _complaints():
        return tyro.cli(
            args_class, args=list(argv), default=default, description=_about(args_class, given.env),
            config=(tyro.conf.OmitArgPrefixes,),  # the groups' names are titles, no part of a flag
        )  # fmt: skip


@contextlib.contextmanager
def _complaints() -> Iterator[None]:
    """Raises UsageError, in one line, for what tyro would frame, print and exit with."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            yield
    except SystemExit as end:
        if end.code == 2:
            raise UsageError(_unframed(told.getvalue())) from None
        raise
    sys.stderr.write(told.getvalue())


def _unframed(frame: str) -> str:
    """A complaint without tyro's frame, in one line; of the help below it only the flags it proposes."""
    rows = [row.strip("│╭╮╰╯ ") for row in re.sub(r"\x1b\[[\d;]*m", "", frame).splitlines()]
    below_title = "\n".join([row for row in rows if row][1:])
    parts = [part.strip() for part in re.split(r"^[─-]+$", below_title, flags=re.MULTILINE)]
    complaint, *rest = [part for part in parts if part] or [frame.strip()]  # for a frame of another kind
    meant = "\n".join([part for part in rest if part.startswith("Perhaps you meant")])
    flags = re.findall(r"(?:^|, )(--[\w-]+)", meant, re.MULTILINE)
    complaint = complaint.replace("\n", " ")
    return f"{complaint}; perhaps you meant {' or '.join(flags)}" if flags else complaint


def _about(args_class: type[RunArgs], env: str | None) -> str:
    """What --help says above the arguments: of the agent's file, and of its tasks."""
    doc = sys.modules[args_class.__module__].__doc__ or ""
    parts = [doc.split("\n\n")[0]]
    if examples := re.findall(r"^    (python .*)", doc, re.MULTILINE):
        parts.append("\n".join(["Examples:", *(f"    {line}" for line in examples)]))
    if tasks := settings(args_class):
        parts.append(textwrap.fill(f"Tasks with settings of their own: {', '.join(tasks)}.", 80))
    shown = f"The defaults below are those of {env}." if env else "--env X --help shows the defaults of X."
    return "\n\n".join([*parts, shown])


def registry(args_class: type[RunArgs], hidden: Sequence[str] = ()) -> ConstructorRegistry:
    """What tyro has to know: the groups of arguments, that whole numbers may be given as 1e6, and which
    arguments do not exist for --help."""
    rules = ConstructorRegistry()
    fields: dict[str, StructFieldSpec] = {}  # all arguments, as tyro's own rule for dataclasses finds them
    asking: list[bool] = []  # for them, meanwhile

    class Task:
        names = TASK

    class Plumbing:
        names = PLUMBING

    class Algorithm:
        names: tuple[str, ...] = ()  # all others

    @rules.struct_rule
    def grouped(info: StructTypeInfo) -> StructConstructorSpec | None:
        if info.type in (Task, Algorithm, Plumbing):
            return StructConstructorSpec(dict, tuple(fields[name] for name in info.type.names))
        if info.type is not args_class or asking:
            return None
        asking.append(True)
        spec = ConstructorRegistry.get_struct_spec(info)
        asking.clear()
        if not isinstance(spec, StructConstructorSpec):
            return None
        fields.update({field.name: field for field in spec.fields})
        for name in hidden:
            suppressed: Any = Annotated[fields[name].type, tyro.conf.Suppress]
            fields[name] = dataclasses.replace(fields[name], type=suppressed)
        Algorithm.names = tuple(name for name in fields if name not in TASK + PLUMBING)
        groups = tuple(
            StructFieldSpec(each.__name__.lower(), each, MISSING_NONPROP, helptext="")
            for each in (Task, Algorithm, Plumbing)
        )
        return StructConstructorSpec(
            lambda **of: spec.instantiate(**of["task"], **of["algorithm"], **of["plumbing"]), groups
        )

    rules.primitive_rule(_whole)
    return rules


def _whole(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    if info.type is not int:
        return None

    def read(strings: list[str]) -> int:
        with contextlib.suppress(ValueError):
            return int(strings[0])
        with contextlib.suppress(ValueError):
            if (value := float(strings[0])).is_integer():
                return int(value)
        raise ValueError(f"{strings[0]!r} is no whole number")

    return PrimitiveConstructorSpec(
        1, "INT", read, lambda value: isinstance(value, int), lambda value: [str(value)]
    )


def script_args(
    args_class: type[ScriptArgs], about: str | None, argv: Sequence[str] | None = None
) -> ScriptArgs:
    """A script's arguments, by default those of sys.argv; whole numbers may be given as 1e6.

    Raises UsageError (for what cannot be read) and SystemExit (0, after --help).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # tyro takes a value that begins with dashes for a flag unless it is joined to its own
    if hasattr(args_class, "args") and "--args" in words[:-1]:
        at = words.index("--args")
        words[at : at + 2] = [f"--args={words[at + 1]}"]
    rules = ConstructorRegistry()
    rules.primitive_rule(_whole)
    with rules, _complaints():
        return tyro.cli(args_class, args=words, description=about)


def script_main(
    args_class: type[ScriptArgs],
    about: str | None,
    work: Callable[[ScriptArgs], int | None],
    argv: Sequence[str] | None = None,
    interrupted: str = "",
) -> int:
    """All that a script's `main` is: do `work`, and tell in one line how it ended when it ended badly.

    work: takes the arguments; the exit status, where it is not 0, is what it returns.
    argv: words of the command line (default: those of sys.argv).
    interrupted: what is told after Ctrl-C (default: nothing).
    Returns the exit status: 2 for what the user got wrong, 1 for a fault of the run or where stdout cannot be
    written, 130 after Ctrl-C (143, 129: SIGTERM, SIGHUP).
    """
    try:
        with _stopped_by(signal.SIGTERM, signal.SIGHUP):
            status = work(script_args(args_class, about, argv)) or 0
            sys.stdout.flush()  # at Python's own end it would be too late to tell
        return status
    except UsageError as error:
        status, told = 2, f"error: {error}"
    except RunFault as error:
        status, told = 1, f"error: {error}"
    except KeyboardInterrupt as error:
        number = error.signal_number if isinstance(error, Interrupted) else int(signal.SIGINT)
        status, told = 128 + number, interrupted
    except OSError as error:  # a full disk, or a pipe that nobody reads any more
        if error.filename is not None or error.errno not in DISK_FAULTS | {errno.EPIPE}:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries again at its end
        status, told = 1, f"error: the output cannot be written: {error.strerror}"
    if told:
        print(told, file=sys.stderr)
    return status


@contextlib.contextmanager
def _stopped_by(*signals: signal.Signals) -> Iterator[None]:
    """Let signals that would kill the process raise Interrupted: what is half done is cleared away."""

    def stop(number: int, _frame: object) -> NoReturn:
        raise Interrupted(number)

    ours = threading.current_thread() is threading.main_thread()  # no other may set a signal's handler
    killing = [each for each in signals if ours and signal.getsignal(each) == signal.SIG_DFL]
    for each in killing:
        signal.signal(each, stop)
    try:
        yield
    finally:
        for each in killing:
            signal.signal(each, signal.SIG_DFL)


def main(args_class: type[Args], train: Callable[[Args], Any], defaults_for: Callable[[str], dict]) -> None:
    """Parse sys.argv, train, and tell in one line how it ended when it ended badly.

    defaults_for: the agent's table, from an environment's id to the fields whose defaults differ there.
    Exit status: 2 for what the user got wrong, 1 for a fault of the run, 130 after Ctrl-C, 143
    after SIGTERM, 129 after SIGHUP.
    """
    process = Process()
    try:
        with process:  # left before anything is told: the message shall not stand in the progress bar
            train(parse(args_class, defaults_for, sys.argv[1:]))
    except UsageError as error:
        _end(2, f"error: {error}")
    except RunFault as error:
        _end(1, f"error: {error}\n{process.after_fault()}")
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        _end(1, f"error: {error}\n{process.after_fault()}")
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        asked = re.search(r"allocate ([\d.]+ \w+)", str(error))
        less = "smaller networks, smaller batches or fewer environments need less"
        told = f"error: there is no memory{f' for {asked[1]}' if asked else ' for that'}; {less}"
        if process.saved_step is None and not process.again:  # most likely it is the sizes given
            _end(2, told)
        _end(1, f"{told}\n{process.after_fault()}")
    except KeyboardInterrupt as error:
        number = error.signal_number if isinstance(error, Interrupted) else int(signal.SIGINT)
        _end(128 + number, process.after_interrupt())


def _is_out_of_memory(error: Exception) -> bool:
    """NumPy's own, or a RuntimeError of torch's, of which only CUDA's has a class of its own."""
    words = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _end(status: int, message: str) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)
