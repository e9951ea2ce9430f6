"""scripts/tokens.py: what it keeps of a run, that it goes on where it was stopped, its tables and figure."""

import csv
import importlib
import sys
import threading
import time
from pathlib import Path

import pytest

from zoo import grpo_tokens, rlhf
from zoo.common.files import lock_folder

SCRIPTS = Path(__file__).parents[1] / "scripts"
TINY = "--dim 8 --heads 2 --batch-size 32 --eval-episodes 64 --total-steps 64"
SORT = f"--env Sort --digits 3 --supervised-steps 2 --comparisons 64 --reward-epochs 1 {TINY}"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("tokens")
    tables = {
        "count": {"grpo": (grpo_tokens, f"--env Count {TINY}"), "ppo": (rlhf, "--reward rule")},
        "over": {
            f"pairs64_beta{beta}_models1": (rlhf, f"{SORT} --beta {beta}") for beta in ("0", "0.3")
        },
        "sort": {"grpo": (grpo_tokens, f"--env Sort --digits 3 --supervised-steps 2 {TINY} --eval-every 32")},
    }  # fmt: skip
    monkeypatch.setattr(script, "TABLES", tables)
    return script


def call(script, monkeypatch, tmp_path, *argv):
    folders = ("--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs"))
    monkeypatch.setattr(sys, "argv", ["tokens.py", *argv, *folders])
    return script.main()


def test_a_run_is_kept_and_not_made_again(script, monkeypatch, tmp_path, capsys):
    """The second of two seeds alone is made by the second call, whose rows are then those of one call."""
    for seeds in (("2",), ("2", "3")):
        assert call(script, monkeypatch, tmp_path, "count", "--methods", "grpo", "--seeds", *seeds) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("count grpo")]
    assert [line.split()[2] for line in told] == ["2", "3"]
    with open(tmp_path / "results" / "count.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["2", "3"] and rows[0]["gap"] != rows[1]["gap"]
    assert rows[0]["command"] == f"python zoo/grpo_tokens.py --env Count {TINY}"
    assert call(script, monkeypatch, tmp_path, "--summary") == 0
    mean = sum(float(row["gap"]) for row in rows) / 2
    assert f"| `grpo_tokens.py --env Count {TINY}` | 2 |" in (out := capsys.readouterr().out)
    assert f"{mean:.3g} ± " in out


def test_runs_share_a_reward_model_and_are_drawn(script, monkeypatch, tmp_path, capsys):
    """Both settings of beta go on from the same two stages, and end as one command would have them."""
    assert call(script, monkeypatch, tmp_path, "over", "--seeds", "1", "--plot") == 0
    (shared,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in shared.glob("[!.]*")} == {"supervised", "reward"}
    assert (tmp_path / "results" / "over_optimisation.png").stat().st_size > 10_000
    with open(tmp_path / "results" / "over.csv", newline="") as file:
        row = list(csv.DictReader(file))[1]
    whole = [*SORT.split(), "--beta", "0.3", "--seed", "1"]
    script.train(rlhf, whole, tmp_path / "whole")
    last = script.last_values(tmp_path / "whole" / "ppo")
    assert {name: row[name] for name in last} == last
    assert row["reward_accuracy"] == script.last_values(tmp_path / "whole" / "reward")["accuracy"]
    curve = script.read(tmp_path / "results" / "over_pairs64_beta0.3_models1__1.csv")
    assert [point["step"] for point in curve] == ["32", "64"] and float(curve[1]["score"]) != 0


def test_curves_of_sort_are_drawn_with_their_mean(script, monkeypatch, tmp_path):
    """A thin line a seed and a thick one between them; of over-optimisation, not measured here, nothing."""
    import matplotlib.pyplot as plt

    assert call(script, monkeypatch, tmp_path, "sort", "--seeds", "1", "2") == 0
    path = tmp_path / "results" / "sort_grpo__2.csv"
    rows = script.read(path)
    script.write(path, [row | {"eval_exact": row["eval_exact"] and "0.5"} for row in rows])
    plt.close("all")
    assert call(script, monkeypatch, tmp_path, "--plot") == 0
    assert [path.name for path in (tmp_path / "results").glob("*.png")] == ["sort.png"]
    first, second, mean = plt.gcf().axes[0].lines
    assert list(second.get_xdata()) == [32, 64] and list(second.get_ydata()) == [50, 50]
    own = [float(row["eval_exact"]) for row in script.read(tmp_path / "results" / "sort_grpo__1.csv")]
    assert list(first.get_ydata()) == [100 * exact for exact in own]
    assert list(mean.get_ydata()) == [(100 * exact + 50) / 2 for exact in own]
    assert mean.get_label().startswith("grpo_tokens.py --digits 3 ")
    assert mean.get_label().endswith("--eval-every 32, 2 seeds")


def test_what_there_is_not_is_refused(script, monkeypatch, tmp_path, capsys):
    assert call(script, monkeypatch, tmp_path, "counts") == 2
    assert call(script, monkeypatch, tmp_path, "count", "--methods", "dpo") == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        "error: counts: there is no such; there are count, over, sort",
        "error: dpo: there is no such; there are grpo, ppo",
    ]
    assert not (tmp_path / "results").exists()
    assert call(script, monkeypatch, tmp_path, "count", "--seeds", "-1") == 2
    capsys.readouterr()
    for argv, words in ((["--sumary"], "perhaps you meant --summary"), (["count", "--seeds", "x"], "['x']")):
        assert call(script, monkeypatch, tmp_path, *argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error and error.count("\n") == 1
    for argv, words in ((["--summary"], "holds no table; TABLE"), (["--plot"], "holds no curves of over or")):
        assert call(script, monkeypatch, tmp_path, *argv) == 2
        assert f"--results {tmp_path}/results: {words}" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
    (tmp_path / "results").touch()
    assert call(script, monkeypatch, tmp_path, "count", "--methods", "grpo") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --results {tmp_path}/results: is no folder that can be written")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "text", "argv", "words"),
    [
        ("count.csv", "method,seed\ngrpo,1\n", ["--summary"], "row 1 lacks command"),
        ("count.csv", "method,seed,command,gap\ngrpo,1,x\n", ["count", "--methods", "grpo"], "row 1 is not"),
        ("count.csv", "method,seed,command\ngrpo,1,x,y\n", ["--summary"], "row 1 is not as long"),
        ("count.csv", "method,seed,command,gap\ngrpo,1,x,y\n", ["--summary"], "is no table of this script"),
        ("count.csv", "\xff", ["--summary"], "is no table of this script"),
        ("sort_grpo__1.csv", "step,eval_exact\n,0.5\n", ["--plot"], "row 1 lacks step"),
        ("over_pairs64_beta0_models1__1.csv", "step,kl\n1,2\n", ["--plot"], "row 1 lacks score, rule_reward"),
    ],
)
def test_a_damaged_table_is_told_and_left_alone(
    script, monkeypatch, tmp_path, capsys, name, text, argv, words
):
    path = tmp_path / "results" / name
    path.parent.mkdir()
    path.write_bytes(text.encode("latin-1"))
    assert call(script, monkeypatch, tmp_path, *argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: {words}") and error.count("\n") == 1
    assert path.read_bytes() == text.encode("latin-1")


def test_curves_of_different_lengths_are_told(script, monkeypatch, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    for seed in (1, 2):
        (tmp_path / "results" / f"sort_grpo__{seed}.csv").write_text("step,eval_exact\n" + "32,0.5\n" * seed)
    assert call(script, monkeypatch, tmp_path, "--plot") == 2
    assert capsys.readouterr().err.endswith("the curves of sort_grpo are not of one length\n")


def test_a_stage_that_another_process_makes_is_waited_for(script, monkeypatch, tmp_path):
    """It is neither deleted under it nor made again."""
    stage = tmp_path / "Sort_steps2_other0__1" / "supervised"
    stage.mkdir(parents=True)
    held, made = lock_folder(stage.parent, "--runs"), []

    def other_process():
        time.sleep(0.3)
        made.append(stage.exists())
        (stage / "agent.pt").touch()
        held.close()

    monkeypatch.setattr(script, "train", lambda *_: pytest.fail("made again"))
    thread = threading.Thread(target=other_process)
    thread.start()
    argv = [*SORT.split(), "--reward", "rule", "--seed", "1"]
    assert script.earlier_stages(argv, tmp_path) == stage.parent
    thread.join()
    assert made == [True] and [path.name for path in stage.iterdir()] == ["agent.pt"]


def test_rows_that_another_process_adds_meanwhile_are_kept(script, monkeypatch, tmp_path):
    """The table is read and written by one at a time."""

    def train(agent, argv, folder):
        folder.mkdir()
        (folder / "progress.csv").write_text("step,eval_gap\n64,0.5\n")
        (folder / "args.json").write_text('{"commit": null}')

    monkeypatch.setattr(script, "train", train)
    path, written = tmp_path / "results" / "count.csv", []
    path.parent.mkdir()
    held = lock_folder(path.parent, "--results")

    def other_process():
        time.sleep(0.3)
        written.append(path.exists())
        script.write(path, [{"method": "ppo", "seed": "1", "command": "x"}])
        held.close()

    thread = threading.Thread(target=other_process)
    thread.start()
    script.measure("count", "grpo", 1, path.parent, tmp_path)
    thread.join()
    assert written == [False] and [row["method"] for row in script.read(path)] == ["ppo", "grpo"]


def test_ctrl_c_is_told_in_one_line(script, monkeypatch, tmp_path, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "train", interrupted)
    assert call(script, monkeypatch, tmp_path, "count", "--methods", "grpo", "--seeds", "1") == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on\n"
