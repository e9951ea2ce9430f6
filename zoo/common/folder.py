"""The folder of a run: a new one or one to go on in, locked while in use, and its description args.json."""

import json
import os
import platform
import re
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch

from zoo.common.args import RunArgs
from zoo.common.errors import UsageError
from zoo.common.files import BEFORE_A_CHECKPOINT, lock_folder, write_atomically


def new_folder(args: RunArgs, agent: str) -> tuple[Path, IO[str]]:
    """Make --run-dir, or runs/ENV__ALGO__SEED__TIME; the folder and its lock.

    What a run has left that ended before its first checkpoint is cleared away. Raises UsageError for a folder
    that is in use, holds anything else, or cannot be made.
    """
    env, now = re.sub(r"[^\w.-]+", "_", args.env), int(time.time())
    folder = Path(args.run_dir) if args.run_dir else Path("runs") / f"{env}__{agent}__{args.seed}__{now}"
    try:
        while not args.run_dir and folder.exists():  # the same run started twice in one second
            now += 1
            folder = folder.with_name(f"{env}__{agent}__{args.seed}__{now}")
        folder.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in folder.iterdir()}
        if not found or ".lock" in found:  # else it is no run's, and no lock file is left in it
            lock = lock_folder(folder, "--run-dir")  # says so of a folder in use
            found = {path.name for path in folder.iterdir()}
            if all(BEFORE_A_CHECKPOINT.fullmatch(name) for name in found):
                for name in found - {".lock"}:
                    path = folder / name
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                return folder, lock
            lock.close()
    except OSError as error:
        raise UsageError(f"--run-dir {folder}: cannot be made: {error.strerror}") from error
    go_on = f"to go on with the run in it use --resume {folder}"
    advice = go_on if "checkpoint.pt" in found else "name a new one"
    raise UsageError(f"--run-dir {folder}: not empty; {advice}")


def old_folder(folder: Path) -> IO[str]:
    """The lock of a folder to go on in, after what a kill cut short is cleared away. Raises UsageError."""
    lock = lock_folder(folder, "--resume")
    for name in ("args.json", "progress.csv", "checkpoint.pt", "agent.pt"):
        (folder / f"{name}.tmp").unlink(missing_ok=True)
    return lock


def described(path: Path) -> dict[str, Any]:
    """What args.json says; of one that is not there nothing. Raises UsageError."""
    try:
        before = json.loads(path.read_text()) if path.exists() else {"args": {}}
        return {"args": dict(before["args"]), "earlier": list(before.get("earlier", []))}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"--resume {path.parent}: {path.name} is damaged ({type(error).__name__}: {error})"
        raise UsageError(f"{what}; mend it, or move it away to go on without it") from error


def describe(path: Path, args: dict, agent: str, engine: str | None, step: int = 0) -> None:
    """Write args.json: what is needed to repeat the run and to compare its speed. Raises OSError.

    step: where a resumed run goes on. The arguments of the parts before, where they were others, stay in it,
    each with the step up to which they held.
    """
    earlier: list[dict] = []
    if step and path.exists():
        before, now = described(path), json.loads(json.dumps(args))
        earlier = before["earlier"]
        if any(before["args"].get(name) != now[name] for name in now if name not in ("run_dir", "resume")):
            earlier.append({"until_step": step, "args": before["args"]})

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    def git(*command: str) -> str:
        whole = ["git", "-C", str(Path(__file__).parents[1]), *command]
        try:
            return subprocess.run(whole, capture_output=True, text=True, timeout=5).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    # "-dirty" only where the zoo's own code differs from the commit: new curves in results/ change nothing.
    # No commit of a repository that merely lies around the folder in which the zoo is installed.
    commit = None
    if git("ls-files", "--", ".") and (head := git("rev-parse", "HEAD")):
        commit = head + ("-dirty" if git("status", "--porcelain", "--", ".") else "")
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = re.search(r"model name\s*: (.*)", cpuinfo)
    on_cuda = args.get("device") != "cpu" and torch.cuda.is_available()
    packages = {"zoo": "rl-zoo-classic"} | {name: name for name in ("torch", "gymnasium", "mujoco", "numpy")}
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions |= {name: version(package) for name, package in packages.items()}
    content = {
        "agent": agent,
        "args": args,
        "resumed_at_step": step or None,
        "earlier": earlier,
        "engine": engine,
        "versions": versions,
        "commit": commit,
        "machine": {
            "platform": platform.platform(),
            "cpu": cpu[1] if cpu else platform.processor(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if on_cuda else None,
        },
    }
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=2).encode() + b"\n"))
