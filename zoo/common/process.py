"""What a process knows of its run: whether it was asked to stop, and how to go on after its end.

Signals reach a process, not an object, and an agent says `Run(args, ...)` and no more: so `main` opens a
Process around the agent's `train`, and the Run made within finds it here. Without one (a notebook, a test)
Ctrl-C interrupts at once, as everywhere in Python.
"""

import contextlib
import os
import shlex
import signal
import sys
import threading
from contextvars import ContextVar
from pathlib import Path

from tqdm import tqdm

from zoo.common.errors import Interrupted

_present: ContextVar["Process | None"] = ContextVar("process", default=None)


def say(line: str) -> None:
    """Write a line to stderr, above a progress bar and in one piece, lest a signal's line stand within it."""
    tqdm.write(f"{line}\n", file=sys.stderr, end="")


class Process:
    """`with Process() as process:` around a training run; its end closes the run, after a fault as well."""

    def __init__(self) -> None:
        self.stop_signal = 0  # a signal received, on which the run's next report acts
        self.closing = contextlib.ExitStack()
        # what the command that is running needs besides to go on with its runs; None: --resume goes on
        self.again: list[str] | None = None
        self.new_run()

    def new_run(self) -> None:
        """Know nothing of a run yet: of several in one process the last is told of."""
        self.doing = "this iteration"  # what is finished before it stops
        self.folder: Path | None = None  # of the run, once it has one
        self.saved_step: int | None = None  # of the checkpoint on disk
        self.trained = False  # agent.pt is written; only the final evaluation is left

    def __enter__(self) -> "Process":
        self.closing.callback(setattr, threading, "excepthook", threading.excepthook)
        threading.excepthook = _report_thread_failure
        hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []  # nohup's
        for number in (signal.SIGINT, signal.SIGTERM, *hangup):
            self.closing.callback(signal.signal, number, signal.signal(number, self._ask_to_stop))
        self.closing.callback(_present.reset, _present.set(self))
        return self

    def __exit__(self, *_: object) -> None:
        # a full disk, already told, fails once more when the logs are flushed
        with contextlib.suppress(OSError):
            self.closing.close()

    def _ask_to_stop(self, number: int, _frame: object) -> None:
        if self.stop_signal:  # asked before: do not wait
            raise Interrupted(number)
        self.stop_signal = number
        line = f"stopping after {self.doing}; Ctrl-C again stops at once\n"
        with contextlib.suppress(OSError):  # os.write, for print may be interrupted within itself
            os.write(2, (("\n" if os.isatty(2) else "") + line).encode())  # below the progress bar

    def resume_command(self) -> str:
        """What to type to go on."""
        if self.again is not None:
            return shlex.join(["python", *sys.argv, *self.again])
        return f"python {shlex.quote(sys.argv[0])} --resume {shlex.quote(str(self.folder))}"

    def after_fault(self) -> str:
        """What is left after a fault, and how to go on from it, in one line."""
        if self.folder is not None and not self.folder.exists():
            return "its checkpoints are gone as well; start again"
        if self.saved_step is None:
            return f"no checkpoint had been written yet{self._advice('')}"
        return f"last good checkpoint: step {self.saved_step}{self._advice('')}"

    def after_interrupt(self) -> str:
        """The same after Ctrl-C."""
        if self.trained:
            return (
                f"interrupted in the final evaluation; {self.folder}/agent.pt is written; "
                f"{'evaluate again' if self.again is None else 'go on'} with: {self.resume_command()}"
            )
        where = "before the first checkpoint" if self.saved_step is None else f"at step {self.saved_step}"
        return f"interrupted {where}{self._advice('; start again')}"

    def _advice(self, without: str) -> str:
        """How to go on; `without`, where there is nothing to go on from."""
        if self.saved_step is None and self.again is None:
            return without
        return f"; resume with: {self.resume_command()}"


def _report_thread_failure(failure: threading.ExceptHookArgs) -> None:
    # TensorBoard's thread hands its own errors to the main thread as well
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def present_process() -> Process:
    """The Process around this code; outside `main` one that knows nothing yet and receives no signals."""
    return _present.get() or Process()
