"""scripts/diffusion.py: what it runs, what it keeps, the table, a picture."""

import csv
import importlib
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("diffusion")


def call(script, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["diffusion.py", *argv])
    return script.main()


def test_a_run_is_kept_and_not_made_again(script, monkeypatch, tmp_path, capsys):
    """A small run of one seed: its evaluations, the table and the pictures that it suffices for."""
    small = "--hidden 16 --steps 4 --min-sigma 0.3 --num-chains 32 --total-steps 64 --eval-every 32"
    small += " --pretrain-steps 20 --pretrain-batch 32 --no-compile"
    monkeypatch.setattr(script, "EXPERIMENTS", {"line_return": script.Experiment("ddpo", small, 1)})
    argv = ("--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--jobs", "1")
    assert call(script, monkeypatch, *argv) == 0
    told = capsys.readouterr().out
    assert "line_return seed 1: final evaluation: objective" in told and "ring.png needs" in told
    curve = script.load("line_return", tmp_path / "results")[0]
    assert [row["step"] for row in curve] == [32, 64]
    with open(tmp_path / "results" / "table.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["experiment"] == "line_return" and float(row["gap"]) == pytest.approx(
        curve[-1]["eval_gap"], rel=1e-3
    )
    assert (tmp_path / "results" / "density.png").stat().st_size > 10_000
    assert (tmp_path / "results" / "line.png").stat().st_size > 10_000
    assert call(script, monkeypatch, *argv, "--no-plot") == 0
    assert capsys.readouterr().out == ""


def test_an_unknown_experiment_is_refused(script, monkeypatch, tmp_path, capsys):
    assert call(script, monkeypatch, "--only", "lines", "--results", str(tmp_path)) == 2
    assert "--only lines: no such experiment; there are line_return" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
