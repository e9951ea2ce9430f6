"""Agents of tokens run from their command lines: in this process, which spares the imports, or in one of
their own.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from zoo.common.cli import parse

ROOT = Path(__file__).parents[1]
CLOCKS = {"wall_time", "sps"}


def run(agent: ModuleType, *arguments: str) -> float:
    """What `python zoo/AGENT.py ARGUMENTS` does, errors raised."""
    return agent.train(parse(agent.Args, lambda env: agent.SETTINGS.get(env, {}), arguments))


def run_apart(agent: str, *arguments: str) -> subprocess.CompletedProcess:
    """`python zoo/AGENT.py ARGUMENTS`, on one thread, output as text."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "zoo" / f"{agent}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def rows(folder: Path) -> list[dict[str, str]]:
    """A run's table of progress, but for what tells the time."""
    with open(folder / "progress.csv", newline="") as file:
        return [
            {name: cell for name, cell in row.items() if name not in CLOCKS} for row in csv.DictReader(file)
        ]
