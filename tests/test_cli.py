"""zoo/common/cli.py: how a run's end is told, and what scripts take as whole numbers."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.common.args import RunArgs
from zoo.common.cli import main, script_args, script_main
from zoo.common.errors import RunFault, UsageError
from zoo.common.process import present_process, say


@dataclass
class Args(RunArgs):
    pass


def ended(train, monkeypatch, capsys, *words):
    """The exit status of an agent with this `train`, and the lines on stderr."""
    monkeypatch.setattr(sys, "argv", ["agent.py", *words])
    with pytest.raises(SystemExit) as end:
        main(Args, train, lambda env: {})
    return end.value.code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("allocate", "size"),
    [
        (lambda: torch.empty(10**17), " for 400000000000000000 bytes"),
        (lambda: torch.empty(10**10, 10**10), " for that"),
        (lambda: np.empty(10**17), " for 711. PiB"),
    ],
)
def test_sizes_beyond_memory_are_one_line_and_status_2(allocate, size, monkeypatch, capsys):
    status, lines = ended(lambda args: allocate(), monkeypatch, capsys)
    assert status == 2 and lines == [
        f"error: there is no memory{size}; smaller networks, smaller batches or fewer environments need less"
    ]


def test_memory_that_ends_after_a_checkpoint_is_a_fault_of_the_run(tmp_path, monkeypatch, capsys):
    def train(args):
        process = present_process()
        process.folder, process.saved_step = tmp_path, 300
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a ...")

    status, lines = ended(train, monkeypatch, capsys)
    assert status == 1 and len(lines) == 2 and lines[0].startswith("error: there is no memory for 2.00 GiB;")
    assert lines[1] == f"last good checkpoint: step 300; resume with: python agent.py --resume {tmp_path}"


def test_another_error_of_torch_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["agent.py"])
    with pytest.raises(RuntimeError, match="must match"):
        main(Args, lambda args: torch.zeros(2) + torch.zeros(3), lambda env: {})


def test_scripts_take_whole_numbers_as_agents_do():
    @dataclass
    class Counts:
        one: int = 1
        maybe: int | None = None
        some: tuple[int, ...] = ()

    assert script_args(Counts, None, []) == Counts()
    given = ["--one", "1e3", "--maybe", "2e5", "--some", "1", "2e0"]
    assert script_args(Counts, None, given) == Counts(1000, 200_000, (1, 2))
    with pytest.raises(UsageError, match=r"^Error parsing --one: '1.5' is no whole number$"):
        script_args(Counts, None, ["--one", "1.5"])


@pytest.mark.parametrize("columns", ["40", "200"])
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--total-stpes", "9"], "Unrecognized options: --total-stpes, 9; perhaps you meant --total-steps"),
        (["--zzz", "9"], "Unrecognized options: --zzz, 9"),
        (["--no-complie"], "Unrecognized options: --no-complie; perhaps you meant --compile or --no-compile"),
        (["--num-envs"], "Missing value for argument '--num-envs'. Expected 1 values."),
        (["--eval-every", "many"], "Error parsing --eval-every: 'many' is no whole number"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_status_2(words, line, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    assert ended(lambda args: None, monkeypatch, capsys, *words) == (2, [f"error: {line}"])


def test_what_is_said_while_arguments_are_read_is_not_lost(capsys):
    @dataclass
    class Told:
        one: int = 1

        def __post_init__(self):
            print("told", file=sys.stderr)

    script_args(Told, None, [])
    assert set(capsys.readouterr().err.split()) == {"told"}


def test_a_signal_cannot_part_a_line_from_its_end(monkeypatch):
    """Python runs a signal's handler between two writes, and it writes a line of its own."""

    class Written(list):
        write = list.append

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stderr", written := Written())
    say("300 steps: evaluation 1.5")
    assert [piece for piece in written if piece] == ["300 steps: evaluation 1.5\n"]


@dataclass
class Words:
    args: str = ""


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (UsageError("--args is no good"), 2, "error: --args is no good\n"),
        (RunFault("it fell over"), 1, "error: it fell over\n"),
        (KeyboardInterrupt(), 130, "interrupted; go on\n"),
        (OSError(errno.ENOSPC, "Full"), 1, "error: the output cannot be written: Full\n"),
        (
            BrokenPipeError(errno.EPIPE, "Broken pipe"),
            1,
            "error: the output cannot be written: Broken pipe\n",
        ),
    ],
)
def test_how_a_script_ends(error, status, told, capfd):
    def work(args):
        assert args.args == "--clip 0.1"
        raise error

    out = sys.stdout.fileno()  # pytest's, which a fault of the output leads to nowhere
    kept = os.dup(out)
    try:
        assert script_main(Words, None, work, ["--args", "--clip 0.1"], "interrupted; go on") == status
    finally:
        os.dup2(kept, out)
        os.close(kept)
    assert capfd.readouterr().err == told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_script_that_is_stopped_clears_away_what_is_half_done(number, tmp_path, capsys):
    before = signal.signal(number, signal.SIG_DFL)  # nohup lets SIGHUP be ignored

    def work(args):
        with tempfile.TemporaryDirectory(dir=tmp_path):
            os.kill(os.getpid(), number)
            time.sleep(10)

    try:
        assert script_main(Words, None, work, [], "interrupted; go on") == 128 + number
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err == "interrupted; go on\n" and not list(tmp_path.iterdir())


def test_what_a_script_did_not_expect_keeps_its_traceback():
    def work(args):
        Path("no/such/file").read_text()

    with pytest.raises(FileNotFoundError):
        script_main(Words, None, work, [])
    with pytest.raises(OSError, match="Bad"):
        script_main(Words, None, lambda args: os.close(-1), [])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_stdout_that_takes_nothing_is_one_line():
    """Also where all that was printed is still in Python's buffer when the work is done."""
    code = (
        "import sys; from dataclasses import make_dataclass; from zoo.common.cli import script_main;"
        "sys.exit(script_main(make_dataclass('Args', ()), None, lambda args: print('x'), []))"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (
        1, "error: the output cannot be written: No space left on device\n",
    )  # fmt: skip
