"""scripts/diffusion.py: what it runs, what it keeps, the table, a picture."""

import csv
import importlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from zoo.common.diffusion import cosine_schedule
from zoo.common.targets import make_target

SCRIPTS = Path(__file__).parents[1] / "scripts"
CURVE = "step,wall_time,eval_gap\n32,1,0.5\n64,2,0.25\n"
# an agent's file in the place of the zoo's, whose runs take no time
FAKE = f"""
import json, os, signal, sys, time
from pathlib import Path
folder, seed = (Path(sys.argv[sys.argv.index(flag) + 1]) for flag in ("--run-dir", "--seed"))
folder.mkdir(parents=True)
if "--killed" in sys.argv and seed.name == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if "--waits" in sys.argv:
    try:
        (folder / "started").touch()
        time.sleep(60)
    except KeyboardInterrupt:
        (folder / "checkpoint.pt").touch()
        sys.exit(130)
(folder / "progress.csv").write_text({CURVE!r})
(folder / "args.json").write_text(json.dumps(dict(versions={{}}, machine={{}}, commit=f"made{{seed}}")))
print("final evaluation: gap 0.25", flush=True)
print("to watch it: ...", file=sys.stderr)
"""


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


@pytest.fixture
def fake(script, monkeypatch, tmp_path):
    """The script with one experiment of two seeds of that agent; calls it with further arguments for both."""
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "fake.py").write_text(FAKE)
    monkeypatch.setattr(script, "ROOT", tmp_path)

    def call_with(given, *argv):
        monkeypatch.setattr(script, "EXPERIMENTS", {"fake": script.Experiment("fake", given, 2)})
        folders = ("--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"))
        return call(script, monkeypatch, *folders, "--no-plot", *argv)

    return call_with


def test_a_run_that_is_killed_does_not_end_the_others(fake, tmp_path, capsys):
    assert fake("--killed", "--jobs", "1") == 1
    told = capsys.readouterr()
    log = tmp_path / "runs" / "fake" / "seed_1.log"
    assert told.err == f"error: fake seed 1: exit status -9: it printed nothing (log: {log})\n"
    assert told.out == "fake seed 2: final evaluation: gap 0.25\n"
    assert [path.name for path in (tmp_path / "results" / "fake").glob("seed_*")] == ["seed_2.csv"]


def test_every_seed_keeps_the_commit_that_made_it(fake, script, tmp_path):
    """Of those kept before there were commits by seed it is the one of them all."""
    results = tmp_path / "results" / "fake"
    results.mkdir(parents=True)
    (results / "experiment.json").write_text(json.dumps({"command": "zoo/fake.py ", "commit": "before"}))
    (results / "seed_1.csv").write_text(CURVE)
    for seeds, commits in (
        (2, {"1": "before", "2": "made2"}),
        (3, {"1": "before", "2": "made2", "3": "made3"}),
    ):
        assert fake("", "--seeds", str(seeds)) == 0
        assert json.loads((results / "experiment.json").read_text())["commits"] == commits
    assert [len(curve) for curve in script.load("fake", tmp_path / "results")] == [2, 2, 2]


def test_what_a_run_was_made_by_is_there_before_its_curve(fake, script, monkeypatch, tmp_path):
    """A kill between the two leaves a run that does not count yet, and none that nobody knows."""

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "write", killed)
    assert fake("", "--seeds", "1") == 130
    assert [path.name for path in (tmp_path / "results" / "fake").iterdir()] == ["experiment.json"]


def test_ctrl_c_lets_the_runs_write_their_checkpoints(fake, tmp_path, capsys):
    """To the script's own process, not to those of its runs; the one that waits for its turn never starts."""
    started = tmp_path / "runs" / "fake" / "seed_1" / "started"

    def interrupt():
        while not started.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    was = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        assert fake("--waits", "--jobs", "1") == 130
    finally:
        signal.signal(signal.SIGINT, was)
    assert (started.parent / "checkpoint.pt").exists()
    assert not (tmp_path / "runs" / "fake" / "seed_2").exists()
    assert capsys.readouterr().err == "interrupted; the same command goes on\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--jobs", "0"], "--jobs must be at least 1, not 0"),
        (["--seeds", "0"], "--seeds must be at least 1, not 0"),
        (["--seeds", "-2"], "--seeds must be at least 1, not -2"),
        (["--results", __file__], f"--results {__file__}: is no folder that can be written: "),
        (["--results", "/proc/none"], "--results /proc/none: is no folder that can be written: "),
        (["--runs", __file__], f"--runs {__file__}/fake: is no folder that can be written: "),
    ],
    ids=["jobs", "seeds", "negative", "results", "forbidden", "runs"],
)
def test_bad_input_is_one_line_and_status_2(fake, capsys, argv, words):
    assert fake("", *argv) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"error: {words}") and told.err.count("\n") == 1 and told.out == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is cut short"),
        ("step,eval_gap\n", "is cut short"),
        ("step,eval_gap\n32,0.5\n64", "is cut short"),
        ("step,eval_gap\n32,0.5\n64\n", "is cut short"),
        ("step,eval_gap\n32,0.5\n64,0.2,1\n", "is cut short"),
        ("step,eval_gap\n32,n/a\n", "is no table of numbers: could not convert string to float: 'n/a'"),
    ],
    ids=["empty", "header", "no end", "short row", "long row", "words"],
)
def test_a_damaged_curve_is_told_before_any_run(fake, tmp_path, capsys, text, words):
    kept = tmp_path / "results" / "fake" / "seed_1.csv"
    kept.parent.mkdir(parents=True)
    kept.write_text(text)
    assert fake("") == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"error: --results: {kept} {words}") and told.err.count("\n") == 1
    assert not (tmp_path / "runs").exists() and kept.read_text() == text


def test_a_second_call_does_not_make_the_runs_of_the_first(fake, script, tmp_path, capsys):
    folder = tmp_path / "runs" / "fake"
    folder.mkdir(parents=True)
    with script.lock_folder(folder, "--runs"):
        assert fake("") == 2
    assert f"--runs {folder}: run folder in use by process {os.getpid()}" in capsys.readouterr().err


def test_a_mode_has_what_is_near_it(script):
    """Within half the distance to the next one; what has left the ring is at none."""
    plots, ring = importlib.import_module("diffusion_plots"), make_target("ring")
    points = torch.tensor([[1.5, 0.0], [1.5, 0.57], [1.5, 0.58], [2.9, 0.0], [-1.4, 0.1]])
    chance = torch.tensor([0.4, 0.1, 0.2, 0.25, 0.05])
    assert plots.at_mode(ring, points, chance, 0) == pytest.approx(0.5)
    assert plots.at_mode(ring, points, chance, 4) == pytest.approx(0.05)


def test_the_ring_is_drawn_of_two_seeds_without_a_kl(script, monkeypatch, tmp_path):
    """Five panels; a policy whose samples have all left for the right has nothing at the right mode."""
    from matplotlib import pyplot

    from zoo import ddpo

    plots, ring = importlib.import_module("diffusion_plots"), make_target("ring")
    args, schedule = ddpo.Args(env="ring"), cosine_schedule(3, 1.0, 0.15)

    def agent(folder):
        """Whose samples lie about the right mode, or beyond the picture."""
        place = torch.tensor([9.0 if folder.parts[-2:] == ("ring_none", "seed_1") else 1.5, 0.0])
        acting = {"reference": torch.tensor([1.5, 0.0]), "params": place}
        return plots.Agent(ddpo, args, ring, schedule, lambda place, x, *_: place.expand_as(x), acting)

    figures = []
    monkeypatch.setattr(plots, "load_agent", agent)
    monkeypatch.setattr(pyplot, "close", figures.append)
    for run in ("ring_return/seed_1", "ring_none/seed_1"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "agent.pt").touch()
    curves = {"ring_return": [[]], "ring_none": [[]]}
    digits = "digits.png needs digits_none/seed_1, digits_return/seed_1"
    assert plots.draw(curves, tmp_path, tmp_path) == ["ring.png needs ring_none/seed_3", digits]
    (tmp_path / "ring_none" / "seed_3").mkdir()
    (tmp_path / "ring_none" / "seed_3" / "agent.pt").touch()
    assert plots.draw(curves, tmp_path, tmp_path) == [digits]
    assert (tmp_path / "ring.png").stat().st_size > 10_000
    titles = [panel.get_title().split("\n") for panel in figures[0].axes]
    assert [title for title, _ in titles] == [
        "reference", "tilt", "KL in the return", "no KL, seed 1", "no KL, seed 3"
    ]  # fmt: skip
    modes = [told for _, told in titles]
    assert modes[3] == "right mode 0.00, left 0.00"
    assert modes[0] == modes[2] == modes[4] == "right mode 1.00, left 0.00"
    pyplot.close("all")
