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

from zoo.common.errors import Interrupted

_present: ContextVar["Process | None"] = ContextVar("process", default=None)


class Process:
    """`with Process() as process:` around a training run; its end closes the run, after a fault as well."""

    def __init__(self) -> None:
        self.stop_signal = 0  # a signal received, on which the run's next report acts
        self.doing = "this iteration"  # what is finished before it stops
        self.folder: Path | None = None  # of the run, once it has one
        self.saved_step: int | None = None  # of the checkpoint on disk
        self.trained = False  # agent.pt is written; only the final evaluation is left
        self.closing = contextlib.ExitStack()

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
        return f"python {shlex.quote(sys.argv[0])} --resume {shlex.quote(str(self.folder))}"

    def after_fault(self) -> str:
        """What is left after a fault, and how to go on from it, in one line."""
        if self.folder is not None and not self.folder.exists():
            return "its checkpoints are gone as well; start again"
        if self.saved_step is None:
            return "no checkpoint had been written yet"
        return f"last good checkpoint: step {self.saved_step}; resume with: {self.resume_command()}"

    def after_interrupt(self) -> str:
        """The same after Ctrl-C."""
        if self.saved_step is None:
            return "interrupted before the first checkpoint; start again"
        if self.trained:
            return (
                f"interrupted in the final evaluation; {self.folder}/agent.pt is written; "
                f"evaluate again with: {self.resume_command()}"
            )
        return f"interrupted at step {self.saved_step}; resume with: {self.resume_command()}"


def _report_thread_failure(failure: threading.ExceptHookArgs) -> None:
    # TensorBoard's thread hands its own errors to the main thread as well
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def present_process() -> Process:
    """The Process around this code; outside `main` one that knows nothing yet and receives no signals."""
    return _present.get() or Process()
