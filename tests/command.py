"""Agents run from their command lines, in this process, which spares the imports."""

import contextlib
import csv
import io
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest

from zoo.common.cli import parse

ROOT = Path(__file__).parents[1]
CLOCKS = {"wall_time", "sps"}


def run(agent: ModuleType, *arguments: str) -> float:
    """What `python zoo/AGENT.py ARGUMENTS` does, errors raised."""
    return agent.train(parse(agent.Args, lambda env: agent.SETTINGS.get(env, {}), arguments))


def run_script(agent: str, *arguments: str) -> tuple[int | str | None, str]:
    """The exit status of `python zoo/AGENT.py ARGUMENTS`, and what it wrote to stderr."""
    script, stderr = str(ROOT / "zoo" / f"{agent}.py"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stderr):
        patch.setattr(sys, "argv", [script, *arguments])
        try:
            runpy.run_path(script, run_name="__main__")
            status: int | str | None = 0
        except SystemExit as end:
            status = end.code
    return status, stderr.getvalue()


def rows(folder: Path) -> list[dict[str, str]]:
    """A run's table of progress, but for what tells the time."""
    with open(folder / "progress.csv", newline="") as file:
        return [
            {name: cell for name, cell in row.items() if name not in CLOCKS} for row in csv.DictReader(file)
        ]


def recorded_updates(monkeypatch: pytest.MonkeyPatch, agent: ModuleType) -> list[tuple]:
    """The arguments of every update that runs of the agent will make."""
    calls: list[tuple] = []

    def recording(update, *_):
        def record(*arguments):
            calls.append(arguments)
            return update(*arguments)

        return record

    monkeypatch.setattr(agent, "compile_function", recording)
    return calls
