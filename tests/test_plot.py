"""scripts/plot.py: what it reads of the curves, and that it writes a picture or says in one line why not."""

import sys

import numpy as np
import plot
import pytest
from PIL import Image

from zoo.common.errors import UsageError


def write_seed(folder, seed, evaluations):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{step},{value}" for step, value in evaluations]
    (folder / f"seed_{seed}.csv").write_text("\n".join(["step,eval_return", *rows]) + "\n")


def test_curves_are_the_evaluations_on_common_steps(tmp_path):
    write_seed(tmp_path, 1, [(50, ""), (100, 1.0), (150, ""), (200, 3.0), (300, 9.0)])
    write_seed(tmp_path, 2, [(100, 10.0), (210, 21.0)])
    steps, returns = plot.load_curves(tmp_path)
    assert steps.tolist() == [100, 210]
    np.testing.assert_allclose(returns, [[1.0, 3.6], [10.0, 21.0]])


@pytest.mark.parametrize("content", [None, [(100, "")]])
def test_nothing_to_draw_is_refused(tmp_path, content):
    if content:
        write_seed(tmp_path, 1, content)
    with pytest.raises(UsageError, match=r"holds no seed_N.csv|has no evaluations"):
        plot.load_curves(tmp_path)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs plot.py's command line; the exit status and the lines on stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
        return plot.main(), capsys.readouterr().err.splitlines()

    return run


def test_a_picture_of_all_agents_of_a_task(tmp_path, command):
    for agent in ("ppo", "trpo"):
        for seed in (1, 2):
            write_seed(tmp_path / agent / "Task-v0", seed, [(100, seed), (200, 2 * seed)])
        (tmp_path / agent / "Task-v0" / "meta.json").write_text("{}")
    assert command("--env", "Task-v0", "--results", tmp_path) == (0, [])
    assert (tmp_path / "Task-v0.png").read_bytes().startswith(b"\x89PNG")


def test_the_runs_of_a_task(tmp_path, monkeypatch, capsys):
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "progress.csv").write_text("step,loss,eval_return\n100,1,\n200,1,5.0\n300,1,7.0\n")
        (tmp_path / run / "args.json").write_text('{"agent": "ppo", "args": {"env": "Task-v0"}}')
    folders = [tmp_path / "first", tmp_path / "second"]
    assert [plot.label(folder) for folder in folders] == ["first", "second"]
    assert plot.task(folders) == "Task-v0" and plot.task([*folders, tmp_path / "Other-v0"]) == ""
    steps, returns = plot.load_curves(folders[0])
    assert steps.tolist() == [200, 300] and returns.tolist() == [[5.0, 7.0]]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plot.py", "first", "second"])
    assert plot.main() == 0
    assert capsys.readouterr().out == "curves.png: 2 curves\n"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_label_of_results_is_the_agent(tmp_path):
    write_seed(tmp_path / "ppo" / "Task-v0", 1, [(100, 1.0)])
    folder = tmp_path / "ppo" / "Task-v0"
    assert (plot.label(folder), plot.task([folder])) == ("ppo", "Task-v0")


def test_bad_input_gets_one_line_and_status_2(tmp_path, command):
    write_seed(tmp_path / "a", 1, [(100, 1.0)])
    for arguments, reason in (
        ([], "give either folders"),
        (["--env", "None-v0", "--results", tmp_path], "no agent has results"),
        ([tmp_path / "a", "--labels", "one", "two"], "--labels: 2 names for 1 curves"),
        ([tmp_path / "a", "--out", tmp_path / "picture.xyz"], "--out"),
    ):
        status, lines = command(*arguments)
        assert status == 2 and len(lines) == 1 and reason in lines[0]


def test_other_columns_have_panels_of_their_own(tmp_path, command):
    for run, factor in (("first", 1), ("second", 2)):
        (tmp_path / run).mkdir()
        rows = "\n".join(f"{step},{factor * step},{5.0 if step == 200 else ''}" for step in (100, 200, 300))
        (tmp_path / run / "progress.csv").write_text(f"step,loss,eval_return\n{rows}\n")
    folders = [tmp_path / "first", tmp_path / "second"]
    steps, loss = plot.load_curves(folders[1], "loss")
    assert steps.tolist() == [100, 200, 300] and loss.tolist() == [[200, 400, 600]]
    sizes = []
    for columns in (["eval_return"], ["loss", "eval_return"]):
        assert command(*folders, "--columns", *columns, "--out", tmp_path / "picture.png") == (0, [])
        sizes.append(Image.open(tmp_path / "picture.png").size)
    assert sizes[1][1] > 1.2 * sizes[0][1]
    status, lines = command(*folders, "--columns", "los", "--out", tmp_path / "picture.png")
    assert status == 2 and "no values of los (--columns)" in lines[0]
