"""scripts/plot.py: what it reads of the curves, and that it writes a picture or says in one line why not."""

import json
import sys

import numpy as np
import plot
import pytest
from PIL import Image

from zoo.common.errors import UsageError


def write_seed(folder, seed, evaluations):
    """A seed's table; a hundred steps take a second of the first seed, two of the second."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{step},{seed * step / 100},{value}" for step, value in evaluations]
    (folder / f"seed_{seed}.csv").write_text("\n".join(["step,wall_time,eval_return", *rows]) + "\n")


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
        ([tmp_path / "a", "--out", tmp_path / "o"], "end the name in .png, .svg or .pdf"),
        ([tmp_path / "a", "--columns"], "--columns: names of columns are missing"),
    ):
        status, lines = command(*arguments)
        assert status == 2 and len(lines) == 1 and reason in lines[0]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("seed_1.csv", None, "cannot be read"),
        ("seed_1.csv", b"\xff\xfe\x00", "is damaged"),
        ("seed_1.csv", b"eval_return\n1\n", "lacks 'step'"),
        ("seed_1.csv", b"step,eval_return\n1,2\nx,3\n", "is damaged"),
        ("seed_1.csv", b"step,eval_return\n1,2\n2,nan\n", "nan stands where a number should"),
        ("seed_1.csv", b"step,eval_return\n1,2\ninf,3\n", "inf stands where a number should"),
        ("seed_1.csv", b"step,eval_return\n1,2\n1,3\n", "do not increase"),
        ("seed_1.csv", b"step,eval_return\n2,2\n1,3\n", "do not increase"),
        ("start.csv", b"seed\n1\n", "lacks 'eval_return'"),
        ("start.csv", b"seed,eval_return\n1\n", "is damaged"),
        ("start.csv", None, "cannot be read"),
        ("meta.json", b"{", "is damaged"),
        ("meta.json", b"[1]", "is damaged"),
        ("meta.json", b'{"seeds": [1]}', "is damaged"),
        ("meta.json", b'{"args": {"total_steps": Infinity}}', "is damaged"),
        ("args.json", b'{"agent": ', "is damaged"),
        ("../published.csv", b"agent,task,steps,value\nppo,a,x,1\n", "is damaged"),
        ("../published.csv", b"agent,task,steps,value\nppo,a,1,1\n", "lacks kind, seeds, source, url"),
        ("../published.csv", None, "cannot be read"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_named(tmp_path, command, name, content, reason):
    write_seed(tmp_path / "a", 1, [(100, 1.0)])
    path = (tmp_path / "a" / name).resolve()
    path.unlink(missing_ok=True)
    path.mkdir() if content is None else path.write_bytes(content)
    picture = tmp_path / "picture.png"
    status, lines = command(tmp_path / "a", "--results", tmp_path, "--out", picture)
    assert status == 2 and len(lines) == 1 and not picture.exists()
    assert lines[0].startswith(f"error: {path}") and reason in lines[0]


def test_over_wall_time_stands_the_mean_of_the_seconds(tmp_path):
    write_seed(tmp_path, 1, [(100, 1.0), (200, 3.0)])
    write_seed(tmp_path, 2, [(100, 10.0), (200, 20.0)])
    seconds, returns = plot.load_curves(tmp_path, "wall-time")
    assert seconds.tolist() == [1.5, 3.0] and returns.tolist() == [[1.0, 3.0], [10.0, 20.0]]


def test_a_curve_begins_at_step_0_where_that_is_known_of_all_seeds(tmp_path):
    for seed in (1, 2):
        write_seed(tmp_path, seed, [(100, 10.0 * seed)])
    (tmp_path / "start.csv").write_text("seed,eval_return\n1,-5\n")
    assert plot.load_curves(tmp_path)[0].tolist() == [100]
    (tmp_path / "start.csv").write_text("seed,eval_return\n1,-5\n2,-6\n")
    steps, returns = plot.load_curves(tmp_path)
    assert steps.tolist() == [0, 100] and returns.tolist() == [[-5, 10], [-6, 20]]


def test_the_interval_is_the_bootstraps_of_the_mean():
    """Of two seeds the means of pairs drawn with replacement are 0, 1, 1 and 2."""
    returns = np.array([[0.0, 5.0], [2.0, 5.0]])
    assert plot.interval(returns).tolist() == [[0.0, 5.0], [2.0, 5.0]]
    assert plot.interval(returns, level=0.4)[:, 0].tolist() == [1.0, 1.0]
    many = np.random.default_rng(0).normal(size=(100, 1))
    low, high = plot.interval(many)[:, 0]
    assert high - low == pytest.approx(2 * 1.96 * many.std() / 10, rel=0.1)


@pytest.fixture
def figures(monkeypatch):
    """What `draw` drew, kept from being written."""
    kept = []
    monkeypatch.setattr(plot, "save", lambda figure, out, data: kept.append(figure))
    return kept


def made(tmp_path, agent, steps, task="Task-v0", **args):
    for seed in (1, 2):
        write_seed(tmp_path / agent / task, seed, [(steps / 2, seed), (steps, 2 * seed)])
    meta = {"args": {"total_steps": steps, **args}}
    (tmp_path / agent / task / "meta.json").write_text(json.dumps(meta))
    return tmp_path / agent / task


def test_each_budget_has_axes_of_its_own_and_an_agent_its_colour(tmp_path, figures):
    folders = [made(tmp_path, *each) for each in (("ppo", 200), ("trpo", 200), ("reinforce", 600))]
    plot.draw(folders, ["ppo", "trpo", "reinforce"], "Task-v0", tmp_path / "x.png")
    short, long = figures[0].axes
    assert short.get_xlim()[1] < 250 < 500 < long.get_xlim()[1]

    def colours(axes):
        return {line.get_color() for line in axes.get_lines() if not line.get_label().startswith("_")}

    assert colours(short) == {plot.COLOURS["ppo"], plot.COLOURS["trpo"]}
    assert colours(long) == {plot.COLOURS["reinforce"]}
    assert len(short.get_lines()) == 2 * (1 + 2)  # each mean, and each single seed
    words = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert (
        "ppo (2 seeds)" in words and "95% bootstrap interval of the mean" in words and "single seeds" in words
    )
    assert not any("published" in word for word in words)
    plot.draw(folders, ["ppo", "trpo", "reinforce"], "Task-v0", tmp_path / "x.png", until=300)
    assert len(figures[1].axes) == 1
    assert max(line.get_xdata().max() for line in figures[1].axes[0].get_lines()) == 300
    plot.draw(folders, ["ppo", "trpo", "reinforce"], "Task-v0", tmp_path / "x.png", x="wall-time")
    assert len(figures[2].axes) == 1 and figures[2].axes[0].get_xlabel() == "seconds"


def test_colours_are_told_apart(tmp_path, figures):
    assert len({*plot.COLOURS.values(), *plot.SPARE}) == len(plot.COLOURS) + len(plot.SPARE)
    assert len({*plot.COLOURS.values(), *plot.FURTHER}) == len(plot.COLOURS) + len(plot.FURTHER)
    folders = [made(tmp_path / name, "ppo", 200) for name in "abcd"]  # four curves of one agent
    plot.draw(folders, list("abcd"), "Task-v0", tmp_path / "x.png")
    means = [line for line in figures[0].axes[0].get_lines() if not line.get_label().startswith("_")]
    assert [line.get_color() for line in means] == [plot.COLOURS["ppo"], *plot.FURTHER]
    assert plot.colour("ppo") == plot.COLOURS["ppo"] and plot.colour("mine") in plot.SPARE


def test_published_values_of_the_budget_are_lines(tmp_path, figures):
    folder = made(tmp_path, "ppo", 200)
    header = "agent,task,steps,value,spread,seeds,source,kind,protocol,url"
    lines = ["ppo,Task-v0,200,7.26,,1,Z,evaluation,p,u", "ppo,Task-v0,200,5,,1,T,evaluation,p,u",
             "ppo,Task-v0,600,70,,1,Z,evaluation,p,u", "ppo,Task-v0,200,90,,1,Q,training,p,u"]  # fmt: skip
    (tmp_path / "published.csv").write_text("\n".join([header, *lines]) + "\n")
    plot.draw([folder], ["ppo"], "Task-v0", tmp_path / "x.png", results=tmp_path)
    axes = figures[0].axes[0]
    assert [line.get_ydata()[0] for line in axes.get_lines() if line.get_linestyle() == ":"] == [7.26]
    assert [text.get_text() for text in axes.texts] == ["7.3 (Z)"]


def test_names_of_published_values_do_not_cover_each_other(tmp_path):
    """Two that are nearly the same, in one of four pairs of axes, which are narrow."""
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(8.5, 4.6), layout="constrained")
    axes = figure.subplots(1, 4, sharey="row")
    for value, text in ((-175, "-175 (Z)"), (-172, "-172 (Z)")):
        axes[1].axhline(value, gid=text)
    axes[0].plot([0, 1], [-1400, -100])
    plot.name_published(axes[1], plot.name_width(4))
    figure.draw_without_rendering()
    one, two = (text.get_window_extent() for text in axes[1].texts)
    assert not one.overlaps(two)


def test_a_picture_tells_what_it_was_drawn_from(tmp_path, command):
    folder = made(tmp_path, "ppo", 200)
    assert command("--env", "Task-v0", "--results", tmp_path) == (0, [])
    before = plot.fingerprint([folder], [None])
    assert plot.drawn_from(tmp_path / "Task-v0.png") == before
    write_seed(folder, 1, [(100, 1.0), (200, 2.5)])
    assert plot.fingerprint([folder], [None]) != before
    assert plot.fingerprint([folder], [{"value": "7"}]) != plot.fingerprint([folder], [None])
    (tmp_path / "no.png").write_bytes(b"no picture")
    assert plot.drawn_from(tmp_path / "no.png") == ""


def test_an_end_before_the_first_evaluation_is_refused(tmp_path, command):
    made(tmp_path, "ppo", 200)
    status, lines = command("--env", "Task-v0", "--results", tmp_path, "--until", 50)
    assert status == 2 and "--until 50" in lines[0] and len(lines) == 1
    status, lines = command("--env", "Task-v0", "--results", tmp_path, "--until", -1)
    assert status == 2 and lines == ["error: --until must be at least 0, not -1"]


def test_other_columns_have_panels_of_their_own(tmp_path, command):
    for run, factor in (("first", 1), ("second", 2)):
        (tmp_path / run).mkdir()
        rows = "\n".join(f"{step},{factor * step},{5.0 if step == 200 else ''}" for step in (100, 200, 300))
        (tmp_path / run / "progress.csv").write_text(f"step,loss,eval_return\n{rows}\n")
    folders = [tmp_path / "first", tmp_path / "second"]
    steps, loss = plot.load_curves(folders[1], column="loss")
    assert steps.tolist() == [100, 200, 300] and loss.tolist() == [[200, 400, 600]]
    sizes = []
    for columns in (["eval_return"], ["loss", "eval_return"]):
        assert command(*folders, "--columns", *columns, "--out", tmp_path / "picture.png") == (0, [])
        sizes.append(Image.open(tmp_path / "picture.png").size)
    assert sizes[1][1] > 1.2 * sizes[0][1]
    status, lines = command(*folders, "--columns", "los", "--out", tmp_path / "picture.png")
    assert status == 2 and "no values of los (--columns)" in lines[0]
