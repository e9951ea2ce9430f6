"""A run's files, each of them whole whenever the run is killed: checkpoints, table, lock."""

import contextlib
import csv
import errno
import fcntl
import io
import os
import pickle
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import torch

from zoo.common.errors import RunFault, UsageError

# what a run's folder may hold before it holds a checkpoint
BEFORE_A_CHECKPOINT = re.compile(
    r"\.lock|args\.json|progress\.csv|events\.out\.tfevents\..*|(args\.json|progress\.csv|checkpoint\.pt)\.tmp|wandb"
)
FORMAT = 2  # of checkpoint.pt and agent.pt; raised when a file of the old layout can no longer be read


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failure to write (disk full, permission, folder deleted) into a RunFault of one line."""
    try:
        yield
    except OSError as error:
        if not folder.exists():
            raise RunFault(f"cannot write {folder}: the folder is gone, it was deleted or moved") from error
        raise RunFault(f"cannot write {error.filename or folder}: {error.strerror or error}") from error


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace `path` by what `write` puts into the file it is given, wholly or not at all. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # some file systems cannot do it, and the file is whole either way
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, has to survive a power cut
        finally:
            os.close(folder)


def make_folder(folder: Path, flag: str) -> None:
    """Make the folder that `flag` named, unless it is there. Raises UsageError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"{flag} {folder}: is no folder that can be written: {error.strerror}") from error


def save_checkpoint(path: Path, content: dict) -> None:
    """Write a dict made by `portable`, atomically. Raises OSError; `path` then holds what it held before."""

    def write(file: IO[bytes]) -> None:
        try:
            torch.save({"format": FORMAT, **content}, file)
        except RuntimeError as error:  # torch's writer hides the OSError of a full disk behind its own
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    write_atomically(path, write)


def load_checkpoint(path: Path, flag: str, agent: str | None = None, env: str | None = None) -> dict:
    """Read a checkpoint.pt or agent.pt without executing code; tensors on the CPU.

    `flag` is the argument that named the file; `agent` and `env`, where given, must be the checkpoint's.
    Raises UsageError with the reason: missing, torn, foreign, code inside, another format, agent or task.
    """

    def refuse(reason: str) -> UsageError:
        return UsageError(f"{flag} {path.parent}: {path.name} {reason}")

    try:
        if path.parent.is_file():
            raise UsageError(f"{flag} {path.parent}: is a file; the folder that it lies in is meant")
        if not path.parent.is_dir():
            raise UsageError(f"{flag} {path.parent}: no such folder")
        if not path.is_file():
            if within := sorted(path.parent.glob(f"*/{path.name}"), key=lambda found: found.stat().st_mtime):
                newest = f"the newest of those within: {within[-1].parent}"
                raise UsageError(f"{flag} {path.parent}: holds no {path.name}; {newest}")
            advice = ""
            if all(BEFORE_A_CHECKPOINT.fullmatch(each.name) for each in path.parent.iterdir()):
                anew = f"; --run-dir {path.parent} starts it anew" if flag == "--resume" else ""
                advice = f"; was the run stopped before its first checkpoint?{anew}"
            elif flag == "--resume" and (path.parent / "agent.pt").is_file():
                advice = "; its agent.pt can be evaluated, from a checkpoint alone a run goes on"
            raise UsageError(f"{flag} {path.parent}: holds no {path.name}{advice}")
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}") from error
    if head[:1] == b"\x80":
        raise refuse("is a plain pickle, which could execute code when loaded; refused")
    if not b"PK\x03\x04".startswith(head):
        raise refuse("is not a checkpoint of the zoo")
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load itself does not compare checksums, and reads nothing of what is marked as a folder
            folders = [entry for entry in archive.infolist() if entry.external_attr & 16]
            damaged = archive.testzip() or bool(folders)
    except Exception:  # zipfile has many for a directory with flipped bits
        damaged = True
    if damaged:
        raise refuse("is torn: part of the file is missing or damaged")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise refuse("would execute code when loaded; refused") from error
    except (RuntimeError, ValueError) as error:
        raise refuse("is not a checkpoint of the zoo") from error
    if not isinstance(content, dict) or not {"format", "agent", "env", "args", "state"} <= content.keys():
        raise refuse("is not a checkpoint of the zoo")
    if content["format"] != FORMAT:
        raise refuse(f"has format {content['format']}; this version of the zoo reads format {FORMAT}")
    if not isinstance(content["args"], dict) or not isinstance(content["env"], str):
        raise refuse("is not a checkpoint of the zoo")
    if agent is not None and content["agent"] != agent:
        raise refuse(f"is of agent {content['agent']}, not {agent}")
    if env is not None and content["env"] != env:
        raise refuse(f"is of --env {content['env']}, not {env}")
    if flag == "--resume" and not {"step", "run"} <= content.keys():
        raise refuse("is an agent.pt, from which no run can go on")
    return content


def lock_folder(folder: Path, flag: str, wait: bool = False) -> IO[str]:
    """Hold `folder` until the returned file is closed or the process dies.

    Raises UsageError when another run holds it, or it cannot be written. To `wait` for that run is told.
    """
    try:
        file = open(folder / ".lock", "a+")  # noqa: SIM115  kept open: it is the lock
    except OSError as error:
        raise UsageError(f"{flag} {folder}: cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it with the process: never stale
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        if not wait:
            file.close()
            raise UsageError(f"{flag} {folder}: run folder in use by process {holder}") from None
        print(f"waiting for process {holder}, which is at work in {folder}", file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


class Table:
    """progress.csv: one complete line a row; a metric that first appears later adds its column at the end."""

    def __init__(self, path: Path, columns: list[str], last_step: int, most: int | None = None):
        """Open the table, keeping of an old one the complete rows up to `last_step`, `most` at most.

        What comes after them was not on the disk for certain when a run was cut off, and may be anything.
        Raises OSError; UsageError, before anything is written, where another program has changed the rows.
        """
        self.path, self.columns, self.count = path, columns, 0  # of its rows
        self._file: IO[bytes] | None = None
        try:
            lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # the last one may be torn
            kept = b"\n".join(lines if most is None else lines[: most + 1])  # after the header
            rows = list(csv.DictReader(kept.decode(errors="replace").split("\n"))) if kept else []
            whole = [None not in row and (row.get("step") or "").isdecimal() for row in rows]
            wanted = [good and int(row["step"]) <= last_step for good, row in zip(whole, rows, strict=True)]
            last = len(rows)
            if most is None and True in wanted:
                last -= wanted[::-1].index(True)
            if False in whole[:last]:
                number = whole.index(False) + 1
                raise ValueError(f"row {number} has no step, or more cells than the header")
        except (ValueError, csv.Error) as error:
            what = f"--resume {path.parent}: {path.name} is not as the run has written it ({error})"
            raise UsageError(f"{what}; mend it, or move it away to go on without it") from error
        rows = [row for row, good in zip(rows, wanted, strict=True) if good]  # one step may have many
        if rows:
            self.columns = list(rows[0])
        self.replace(rows)

    def append(self, row: dict[str, float]) -> None:
        """Write one row; cells without a value stay empty. Raises OSError."""
        if new := [name for name in row if name not in self.columns]:
            self.columns = self.columns + new
            self.replace(self.rows())
        line = self._lines([self._cells(row)])
        if self._open().write(line) < len(line):  # unbuffered, a single call: a kill cannot split the line
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self.count += 1

    def rows(self) -> list[dict[str, str]]:
        """All rows as they stand on disk."""
        with open(self.path, newline="") as file:
            return list(csv.DictReader(file))

    def last(self) -> dict[str, str]:
        """The last row, {} of an empty table."""
        return (self.rows() or [{}])[-1]

    def last_has_more_than(self, columns: list[str]) -> bool:
        """Whether a cell of the last row is filled that is in none of `columns`."""
        return any(cell and name not in columns for name, cell in self.last().items())

    def amend_last(self, row: dict[str, float]) -> None:
        """Fill cells of the last row (or write the first one)."""
        rows = self.rows()
        self.columns = self.columns + [name for name in row if name not in self.columns]
        self.replace([*rows[:-1], {**(rows[-1] if rows else {}), **self._cells(row)}])

    def replace(self, rows: list[dict[str, str]]) -> None:
        """Rewrite the whole table atomically."""
        self.close()
        header = dict(zip(self.columns, self.columns, strict=True))
        write_atomically(self.path, lambda file: file.write(self._lines([header, *rows])))
        self.count = len(rows)

    def sync(self) -> None:
        """Bring the rows to the disk: a checkpoint must never be ahead of them."""
        os.fsync(self._open().fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _open(self):
        if self._file is None:
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  until `close`
        return self._file

    def _cells(self, row):
        return {name: f"{value:.10g}" for name, value in row.items()}

    def _lines(self, rows):
        text = io.StringIO()
        csv.DictWriter(text, self.columns, restval="", lineterminator="\n").writerows(rows)
        return text.getvalue().encode()
