"""scripts/report.py: its statistics by hand, its table on made-up results, the README against results/."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import plot
import pytest
import report

from zoo.common.errors import UsageError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"


def shallow():
    """Whether the history is not at hand, by which commits are judged."""
    asked = ["git", "-C", str(ROOT), "rev-parse", "--is-shallow-repository"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip() != "false"


# --- what is committed --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    return report.read_rows(RESULTS)


@pytest.fixture(scope="module")
def found():
    return report.read_statistics(RESULTS)


STALE = "python scripts/report.py brings it up to date"


def test_the_readme_says_what_is_in_results(rows, found):
    inside = report.between((ROOT / "README.md").read_text())[1]
    if shallow():
        pytest.skip("without the history commits cannot be judged")
    assert inside == report.block(rows, found, RESULTS), STALE


def test_the_statistics_are_those_of_the_results(rows, found):
    """Without rliable: the values, which need none. What the intervals are worth, other tests say."""
    told = {(r["agent"], r["task"]): float(r["value"]) for r in found.of("mean")}
    assert told.keys() == {(row.name, row.task) for row in rows}, STALE
    for row in rows:
        assert told[row.name, row.task] == pytest.approx(row.scores.mean(), rel=1e-4), STALE
        mean, middle = (found.of(q, row.name, row.task)[0] for q in ("mean", "iqm"))
        for each in (mean, middle):
            low, value, high = (float(each[key]) for key in ("low", "value", "high"))
            assert row.scores.min() - 1 <= low <= value <= high <= row.scores.max() + 1


def test_the_pictures_were_drawn_from_the_results(rows, found):
    stale = [p.out.name for p in report.pictures(rows, RESULTS) if plot.drawn_from(p.out) != p.data(RESULTS)]
    assert stale == [], STALE
    aggregate = report.data_of(report.aggregate_rows(found))
    assert plot.drawn_from(RESULTS / "aggregate.png") == aggregate, STALE


def test_published_numbers_have_their_source_and_protocol():
    published = plot.read_published(RESULTS / "published.csv")
    assert len(published) > 100
    for row in published:
        assert np.isfinite(float(row["value"])) and int(row["steps"]) > 0, row
        assert row["kind"] in ("evaluation", "training") and row["protocol"], row
        assert row["url"].startswith("https://"), row
        assert row["kind"] == "training" or row["source"] in report.SOURCES, row
    keys = [(row["agent"], row["task"], row["steps"], row["source"]) for row in published]
    assert len(keys) == len(set(keys))


def test_each_row_has_a_published_value_of_its_budget_beside_it(rows):
    published = plot.read_published(RESULTS / "published.csv")
    lacking = [
        (row.agent, row.task) for row in rows
        if not row.variant and row.agent in ("ppo", "trpo", "actor_critic", "sac")
        and not plot.published_evaluations(published, row.agent, row.task, row.budget)
    ]  # fmt: skip
    assert lacking == []


# --- made-up results ----------------------------------------------------------------------------------------


def make(results, agent, task, scores, commit="abc", total=1000, **args):
    folder = results / agent / task
    folder.mkdir(parents=True)
    entry = {"steps": total, "sps": 1.0, "versions": {}, "machine": {}, "engine": "none", "jobs": 1}
    entry |= {"commit": commit, "args": {"total_steps": total, "threads": 1, **args}}
    seeds = {str(seed): {**entry, "mean": score} for seed, score in enumerate(scores, start=1)}
    (folder / "meta.json").write_text(json.dumps({"agent": agent, "env": task, "seeds": seeds}))
    for seed, score in enumerate(scores, start=1):
        curve = f"step,wall_time,eval_return\n500,1,{score / 2}\n{total},2,{score}\n"
        (folder / f"seed_{seed}.csv").write_text(curve)
    return folder


PUBLISHED = [
    ("ppo", "A-v0", 1000, 10, 10, "T", "evaluation"),
    ("ppo", "A-v0", 1000, 90, 3, "CleanRL", "training"),
    ("ppo", "A-v0", 2000, 80, 10, "T", "evaluation"),
    ("ppo", "B-v0", 1000, 20, 1, "Z", "evaluation"),
    ("trpo", "A-v0", 1000, 6, 10, "T", "evaluation"),
    ("sac", "C-v0", 1000, 5, 10, "T", "evaluation"),
]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Results of three agents, with references, and a README to write to."""
    monkeypatch.setattr(report.benchmark, "is_in_history", lambda commit, _: commit == "abc")
    monkeypatch.setattr(report, "FEWEST", 3)
    results = tmp_path / "results"
    make(results, "ppo", "A-v0", [8, 9, 10, 11])
    make(results, "ppo", "B-v0", [18, 19, 17], commit="abc-dirty")
    make(results, "trpo", "A-v0", [4, 5, 4.5])
    make(results, "sac", "C-v0", [1])
    make(results / "plain", "ppo", "A-v0", [1, 2, 3, 4], clip=0.5)
    meta = results / "ppo" / "A-v0" / "meta.json"
    meta.write_text(meta.read_text().replace('"threads": 1', '"threads": 2, "clip": 0.2'))
    (results / "diffusion" / "line").mkdir(parents=True)
    (results / "diffusion" / "line" / "meta.json").write_text("{}")
    with open(results / "published.csv", "w", newline="") as file:
        columns = ("agent", "task", "steps", "value", "seeds", "source", "kind", "spread", "protocol", "url")
        csv.writer(file).writerows([columns, *((*row, "", "as said", "https://x") for row in PUBLISHED)])
    (results / "random.csv").write_text("task,mean,std,episodes\nA-v0,0,1,100\nB-v0,10,1,100\n")
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nout of date\n{report.END}\nafter\n")
    return results


def call(monkeypatch, results, *more):
    readme = results.parent / "README.md"
    monkeypatch.setattr(sys, "argv", ["report.py", "--results", str(results), "--readme", str(readme), *more])
    return report.main()


def test_rows_and_their_marks(made):
    rows = {row.name + " " + row.task: row for row in report.read_rows(made)}
    assert list(rows) == ["ppo A-v0", "ppo B-v0", "plain/ppo A-v0", "trpo A-v0", "sac C-v0"]
    assert rows["ppo A-v0"].traced and not rows["ppo B-v0"].traced
    assert report.marked(rows["ppo B-v0"]) == "`abc-dirty` †"
    assert rows["plain/ppo A-v0"].changed == "--clip 0.5"  # threads are no part of the algorithm
    assert rows["ppo A-v0"].scores.tolist() == [8, 9, 10, 11] and rows["ppo A-v0"].budget == 1000


def test_a_variant_of_what_was_not_run_is_compared_with_the_task_s_settings(made):
    run = dict(env="CartPole-v1", clip=0.3, num_envs=32, hidden=[64, 64])
    make(made / "long", "ppo", "D-v0", [1], total=9, **run)
    row = next(row for row in report.read_rows(made) if row.variant == "long")
    assert row.changed == "--clip 0.3 --total-steps 9"  # 32 environments are CartPole-v1's own


def test_of_variants_those_that_are_only_longer_are_set_against_published_values(made, monkeypatch):
    folder = make(made / "long", "ppo", "A-v0", [70, 75], total=2000, clip=0.2)
    for path in folder.glob("seed_*.csv"):  # what was published for 1,000 steps is the other row's
        path.write_text(path.read_text().replace("\n500,", "\n1000,"))
    make(made / "long_too", "ppo", "A-v0", [70, 75], total=2000, clip=0.5)
    rows = {row.variant: row for row in report.read_rows(made)}
    assert [rows[name].longer for name in ("", "plain", "long", "long_too")] == [False, False, True, False]
    published = plot.read_published(made / "published.csv")
    at_its_budget = [(p["steps"], p["value"]) for _, _, p in report.comparisons(rows["long"], published)]
    assert at_its_budget == [("2000", "80")] and not report.comparisons(rows["long_too"], published)
    call(monkeypatch, made, "--no-pictures")
    text = (made.parent / "README.md").read_text()
    assert "| [`ppo.py`](zoo/ppo.py) `--total-steps 2000` | A-v0 | 2k | 2 | 72.5 [70, 75]" in text
    assert "- **ppo --total-steps 2000 on A-v0**: 72.5 against 80 (T, 10 seeds)" in text
    assert text.count("**ppo --clip 0.5") == 0


def test_a_task_is_named_as_env_takes_it(made, monkeypatch):
    make(made, "ppo", "mine_Own_D-v0", [1, 2], env="mine:Own/D-v0")
    call(monkeypatch, made, "--no-pictures")
    assert "| mine:Own/D-v0 |" in (made.parent / "README.md").read_text()


def test_the_tours_curves_end_where_the_laters_does(made, monkeypatch):
    """Beyond its budget, where its last batch ends there, or the earlier agent's."""
    folders = {name: make(made, name, report.TOUR_TASK, [1, 2]) for name in ("trpo", "ppo", "sac")}
    for name, last in (("trpo", 1900), ("ppo", 1024), ("sac", 300)):
        for path in folders[name].glob("seed_*.csv"):
            path.write_text(f"step,wall_time,eval_return\n200,1,1\n{last},2,2\n")
    meta = folders["sac"] / "meta.json"
    meta.write_text(meta.read_text().replace('"total_steps": 1000', '"total_steps": 300'))
    drawn = report.pictures(report.read_rows(made), made)
    until = {picture.out.stem: picture.until for picture in drawn if picture.out.parent.name == "tour"}
    assert until == {"ppo": 1034, "sac": 303}


def test_scores_are_normalised_by_random_play_and_published_ppo(made):
    make(made, "trpo", "B-v0", [30, 31])  # of two seeds: left out
    scores = report.normalised(report.read_rows(made), made)
    assert scores["ppo"]["A-v0"].tolist() == [0.8, 0.9, 1.0, 1.1]
    assert scores["ppo"]["B-v0"].tolist() == [0.8, 0.9, 0.7]
    assert {task: each.tolist() for task, each in scores["trpo"].items()} == {"A-v0": [0.4, 0.5, 0.45]}
    assert scores["trpo as published"]["A-v0"].tolist() == [0.6] and "sac" not in scores
    assert report.matrix(scores["ppo"], ["A-v0", "B-v0"]).tolist() == [[0.8, 0.8], [0.9, 0.9], [1.0, 0.7]]


def test_the_report_is_written_and_read_again(made, monkeypatch):
    pytest.importorskip("rliable", reason="pip install -e '.[report]'")
    monkeypatch.setattr(report, "REPS", 200)
    monkeypatch.setattr(report, "TOUR_TASK", "A-v0")
    assert call(monkeypatch, made) == 0
    text = (made.parent / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "out of date" not in text
    rows, found = report.read_rows(made), report.read_statistics(made)
    assert report.between(text)[1] == report.block(rows, found, made)
    line = next(line for line in text.splitlines() if "| A-v0 | 1k | 4 |" in line)
    assert line.startswith("| [`ppo.py`](zoo/ppo.py) | A-v0 | 1k | 4 | 9.5 [") and "**10 (T)**" in line
    assert "**ppo on A-v0**: 9.5 against 10 (T, 10 seeds), which lies inside our interval" in text
    assert "**trpo on A-v0**: 4.5 against 6 (T, 10 seeds), which lies above our interval" in text
    assert "**sac on C-v0**: 1 against 5 (T, 10 seeds), one run of ours" in text  # there is no interval
    assert "`--clip 0.5` | A-v0 | 1k | 4 | 2.5 [" in text
    assert "| sac" not in text.split("Over all tasks with 3 seeds and more")[1]  # no reference for its task
    assert "† made by changed code" in text and "`abc-dirty` †" in text
    shown = report.pictures(rows, made)
    expected = ["A-v0.png", "plain/A-v0.png", "tour/ppo.png"]
    assert [p.out.relative_to(made).as_posix() for p in shown] == expected
    for picture in shown:
        assert plot.drawn_from(picture.out) == picture.data(made) != ""
    (made / "ppo" / "A-v0" / "seed_1.csv").write_text("step,wall_time,eval_return\n500,1,0\n1000,2,7\n")
    assert plot.drawn_from(shown[0].out) != shown[0].data(made)  # the data have changed since


def test_statistics_by_hand(made, monkeypatch):
    pytest.importorskip("rliable", reason="pip install -e '.[report]'")
    monkeypatch.setattr(report, "REPS", 500)
    found = report.Statistics(report.statistics(report.read_rows(made), made))

    def value(quantity, agent, key="value", **more):
        rows = [r for r in found.of(quantity, agent) if all(r[k] == v for k, v in more.items())]
        assert len(rows) == 1
        return float(rows[0][key])

    # the middle half of 0.7 0.8 0.8 0.9 0.9 1.0: scipy's trimmed mean cuts one at each end
    assert value("normalised iqm", "ppo") == pytest.approx(0.85)
    assert value("normalised mean", "ppo") == pytest.approx(0.85)
    assert value("published normalised mean", "trpo") == pytest.approx(0.6)
    assert value("profile", "ppo", x="0.75") == pytest.approx(5 / 6, abs=1e-4)
    assert value("profile", "ppo", x="1") == 0  # 1.0 is not above 1
    assert value("improvement", "ppo", against="trpo") == 1.0
    # of the first three of each task one equals what was published, which counts half
    assert value("improvement", "ppo", against="ppo as published") == pytest.approx(0.5 / 6, abs=1e-4)
    # all 256 bootstrap means of 8, 9, 10, 11, counted out: the exact percentiles are 8.5 and 10.5
    drawn = np.array(np.meshgrid(*[[8, 9, 10, 11]] * 4)).reshape(4, -1).mean(0)
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert value("mean", "ppo", "low", task="A-v0") == pytest.approx(low, abs=0.26)
    assert value("mean", "ppo", "high", task="A-v0") == pytest.approx(high, abs=0.26)


def test_the_probability_of_improvement_is_rliables():
    pytest.importorskip("rliable", reason="pip install -e '.[report]'")
    from rliable import metrics

    generator = np.random.default_rng(1)
    ours, theirs = generator.integers(5, size=(7, 3)), generator.integers(1, 6, size=(4, 3))
    assert report.improvement(ours, theirs)[0] == pytest.approx(
        metrics.probability_of_improvement(ours, theirs)
    )
    assert report.improvement(ours, ours)[0] == pytest.approx(0.5) != report.improvement(ours, theirs)[0]


def test_intervals_are_the_same_each_time_and_narrower_for_more_seeds():
    pytest.importorskip("rliable", reason="pip install -e '.[report]'")
    generator = np.random.default_rng(0)
    few, many = generator.normal(size=(5, 1)), generator.normal(size=(50, 1))

    def mean(scores):
        return np.array([scores.mean()])

    one, again = (report.intervals({"few": few, "many": many}, mean) for _ in range(2))
    assert all((one[key] == again[key]).all() for key in one)
    widths = {key: float(one[key][2, 0] - one[key][1, 0]) for key in one}
    assert widths["many"] < widths["few"]
    assert widths["many"] == pytest.approx(2 * 1.96 * many.std() / 50**0.5, rel=0.1)


def test_references_are_played_where_they_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "EPISODES", 4)
    folder = make(tmp_path, "ppo", "CartPole-v1", [5, 6], env="CartPole-v1", eval_episodes=3, hidden=[8, 8])
    rows = report.read_rows(tmp_path)
    report.play_references(rows, tmp_path)
    before = plot.starts(folder)
    assert sorted(before) == ["seed_1.csv", "seed_2.csv"] and all(8 <= v <= 500 for v in before.values())
    assert 8 <= report.read_random(tmp_path)["CartPole-v1"] <= 60
    steps, returns = plot.load_curves(folder)
    assert steps.tolist() == [0, 500, 1000] and returns[:, 0].tolist() == list(before.values())
    # a second time nothing is played, and it was this seed's agent
    monkeypatch.setattr(report, "play_randomly", None)
    monkeypatch.setattr(report, "before_training", None)
    report.play_references(rows, tmp_path)


def test_an_agent_before_training_is_what_a_run_would_evaluate_first(tmp_path):
    """A run of one update with a learning rate of next to nothing ends where it began."""
    from zoo import ppo

    small = dict(env="CartPole-v1", seed=3, num_envs=2, num_steps=8, minibatch_size=16, num_epochs=1,
                 total_steps=16, eval_episodes=4, compile=False, env_threads=1, progress=False)  # fmt: skip
    args = ppo.Args(**small, learning_rate=1e-12, normalize_obs=False)
    trained = ppo.train(ppo.Args(**{**vars(args), "run_dir": str(tmp_path / "run")}))
    assert report.before_training("ppo", args) == trained
    assert report.before_training("ppo", ppo.Args(**{**vars(args), "seed": 4})) != trained
    assert ppo.Run is report.importlib.import_module("zoo.common.run").Run  # it is put back


def test_numbers():
    assert [report.number(x) for x in (6319.79, 500.0, -161.73, 93.04)] == ["6,320", "500", "-161.7", "93"]
    assert [report.steps(n) for n in (1_000_000, 3_000_000, 20_000, 300_000)] == ["1M", "3M", "20k", "300k"]


def test_bad_input_is_one_line_and_status_2(made, monkeypatch, capsys):
    monkeypatch.setattr(report, "needs", lambda *names: None)
    readme = made.parent / "README.md"
    cases = [
        (made / "nope", readme, "--results"),
        (made, made / "nope.md", "nope.md: no such file"),
        (made / "diffusion", readme, "holds no AGENT/TASK/meta.json"),
        (made, made / "published.csv", report.BEGIN),
    ]
    for results, file, words in cases:
        monkeypatch.setattr(sys, "argv", ["report.py", "--results", str(results), "--readme", str(file)])
        assert report.main() == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and error.startswith("error: ")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("README.md", b"\xff", "README.md: is damaged"),
        ("results/random.csv", b"task\nA-v0\n", "random.csv: lacks 'mean'"),
        ("results/random.csv", b"task,mean\nA-v0,nan\n", "random.csv: is damaged: nan stands"),
        ("results/published.csv", b"agent\nppo\n", "published.csv: lacks"),
        ("results/ppo/A-v0/meta.json", None, "ppo/A-v0/meta.json is no meta.json of this script"),
        ("results/ppo/A-v0/meta.json", ('"mean": 9', '"mean": NaN'), "the mean of seed 2 is nan"),
        ("results/ppo/A-v0/meta.json", ('"total_steps"', '"x"'), "ppo/A-v0/meta.json: lacks 'total_steps'"),
        ("results/ppo/A-v0/seed_2.csv", "gone", "ppo/A-v0/seed_2.csv is missing"),
        ("results/ppo/A-v0/seed_2.csv", b"step,eval_return\n5,x\n", "ppo/A-v0/seed_2.csv: is damaged"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_named(made, monkeypatch, capsys, name, content, words):
    pytest.importorskip("rliable", reason="pip install -e '.[report]'")
    monkeypatch.setattr(report, "REPS", 20)
    path = made.parent / name
    if isinstance(content, tuple):
        path.write_text(path.read_text().replace(*content))
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.unlink()
        if content is None:
            path.mkdir()
    assert call(monkeypatch, made) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("error: ")


def test_what_is_missing_is_named(made, monkeypatch, capsys):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    assert call(monkeypatch, made) == 2
    assert capsys.readouterr().err == "error: rliable is missing: pip install -e '.[report]'\n"


def test_a_report_without_statistics_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"holds no report\.csv"):
        report.read_statistics(tmp_path)
