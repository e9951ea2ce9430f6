"""A run's files, written so that a kill at any moment leaves each of them whole: checkpoints, table, lock, args.json."""

import contextlib
import csv
import errno
import fcntl
import io
import json
import os
import pickle
import platform
import re
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from zoo.common.errors import RunFault, UsageError

FORMAT = 1  # of checkpoint.pt and agent.pt; raised when a file of the old layout can no longer be read


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failure to write (disk full, permission) into a RunFault of one line."""
    try:
        yield
    except OSError as error:
        raise RunFault(f"cannot write {error.filename or folder}: {error.strerror or error}") from error


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace `path` by what `write` puts into the file it is given: all of it, or the old file stays. Raises OSError."""
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


def portable(value: Any, where: str = "state") -> Any:
    """The same nested value with tensors on the CPU, fit for `torch.load(weights_only=True)`.

    Raises RunFault, naming the entry, for a tensor that is not finite: a loss can still be finite in the update that ruins
    the parameters, and such a checkpoint must not replace the last good one.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        if not torch.isfinite(value).all():
            raise RunFault(f"{where} has become non-finite")
        # torch.save writes the whole storage behind a view
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    if isinstance(value, dict):
        return {key: portable(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([portable(item, f"{where}[{i}]") for i, item in enumerate(value)])
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors, numbers, strings, dicts, lists, tuples")


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
    Raises UsageError with the reason: missing, torn, foreign, code inside, another format, agent or environment.
    """

    def refuse(reason: str) -> UsageError:
        return UsageError(f"{flag} {path.parent}: {path.name} {reason}")

    if not path.parent.is_dir():
        raise UsageError(f"{flag} {path.parent}: no such folder")
    if not path.is_file():
        raise UsageError(f"{flag} {path.parent}: holds no {path.name}; was the run stopped before its first checkpoint?")
    with open(path, "rb") as file:
        head = file.read(4)
    if head[:1] == b"\x80":
        raise refuse("is a plain pickle, which could execute code when loaded; refused")
    if not b"PK\x03\x04".startswith(head):
        raise refuse("is not a checkpoint of the zoo")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load itself does not compare checksums
    except (zipfile.BadZipFile, EOFError):
        damaged = path.name
    if damaged:
        raise refuse("is torn: part of the file is missing or damaged")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise refuse("would execute code when loaded; refused") from error
    except RuntimeError as error:
        raise refuse("is not a checkpoint of the zoo") from error
    if not isinstance(content, dict) or not {"format", "agent", "env", "args", "state"} <= content.keys():
        raise refuse("is not a checkpoint of the zoo")
    if content["format"] != FORMAT:
        raise refuse(f"has format {content['format']}; this version of the zoo reads format {FORMAT}")
    if agent is not None and content["agent"] != agent:
        raise refuse(f"is of agent {content['agent']}, not {agent}")
    if env is not None and content["env"] != env:
        raise refuse(f"is of --env {content['env']}, not {env}")
    return content


def lock_folder(folder: Path, flag: str) -> IO[str]:
    """Hold `folder` until the returned file is closed or the process dies. Raises UsageError when another run holds it."""
    file = open(folder / ".lock", "a+")  # noqa: SIM115 (open as long as the run lives)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it with the process: never stale
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise UsageError(f"{flag} {folder}: run folder in use by process {holder}") from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


class Table:
    """progress.csv: one complete line a row; a metric that first appears later adds its column at the end."""

    def __init__(self, path: Path, columns: list[str], last_step: int):
        """Open the table, keeping of an old one the complete rows up to environment step `last_step`. Raises OSError."""
        self.path, self.columns = path, columns
        self._file: IO[bytes] | None = None
        text = path.read_text() if path.exists() else ""
        rows = list(csv.DictReader(text.split("\n")[:-1]))  # what follows the last newline is torn
        rows = [row for row in rows if (row.get("step") or "").isdigit() and int(row["step"]) <= last_step]
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

    def rows(self) -> list[dict[str, str]]:
        """All rows as they stand on disk."""
        with open(self.path, newline="") as file:
            return list(csv.DictReader(file))

    def amend_last(self, row: dict[str, float]) -> None:
        """Fill cells of the last row (or write the first one)."""
        rows = self.rows()
        self.replace([*rows[:-1], {**(rows[-1] if rows else {}), **self._cells(row)}])

    def replace(self, rows: list[dict[str, str]]) -> None:
        """Rewrite the whole table atomically."""
        self.close()
        header = dict(zip(self.columns, self.columns, strict=True))
        write_atomically(self.path, lambda file: file.write(self._lines([header, *rows])))

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
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run lives)
        return self._file

    def _cells(self, row):
        return {name: f"{value:.10g}" for name, value in row.items()}

    def _lines(self, rows):
        text = io.StringIO()
        csv.DictWriter(text, self.columns, restval="", lineterminator="\n").writerows(rows)
        return text.getvalue().encode()


def describe(path: Path, args: dict, agent: str, engine: str, step: int) -> None:
    """Write args.json: what is needed to repeat the run and to compare its speed. Raises OSError."""

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    def git(*command: str) -> str:
        folder = str(Path(__file__).parents[1])
        try:
            return subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, timeout=5).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    # "-dirty" only where the zoo's own code differs from the commit: new curves in results/ change nothing
    commit = git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ".") else "") or None
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    packages = {"zoo": "rl-zoo-classic"} | {name: name for name in ("torch", "gymnasium", "mujoco", "numpy")}
    content = {
        "agent": agent,
        "args": args,
        "resumed_at_step": step or None,
        "engine": engine,
        "versions": {"python": platform.python_version()} | {name: version(package) for name, package in packages.items()},
        "commit": commit,
        "machine": {
            "platform": platform.platform(),
            "cpu": cpu[1] if cpu else platform.processor(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if args.get("device") != "cpu" and torch.cuda.is_available() else None,
        },
    }
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=2).encode() + b"\n"))
