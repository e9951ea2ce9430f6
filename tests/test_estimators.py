"""scripts/estimators.py: its statistics on numbers that are known, its forms against plain loops, a tiny run
of the whole."""

import csv
import math
import sys
from types import SimpleNamespace

import estimators
import pytest
import torch

from zoo import ppo
from zoo.common.files import lock_folder, save_checkpoint

HEADER = ",".join(estimators.COLUMNS)


def episode(length, truncated, seed=0):
    g = torch.Generator().manual_seed(seed)
    obs, reward, value = (
        torch.randn(length, 4, generator=g),
        torch.randn(length, generator=g),
        torch.randn(length, generator=g),
    )
    return estimators.Episode(obs, torch.zeros(length), reward, obs[0], truncated, value, torch.tensor(1.5))


@pytest.mark.parametrize("truncated", [False, True])
def test_n_step_of_every_row(truncated):
    e, gamma = episode(7, truncated), 0.9
    values = [*e.value.tolist(), 1.5 if truncated else 0.0]
    for n in (1, 3, 20):
        found = estimators.every_n_step(e.columns(), n, gamma)
        for t in range(7):
            end = min(t + n, 7)
            plain = (
                sum(gamma ** (k - t) * e.reward[k].item() for k in range(t, end))
                + gamma ** (end - t) * values[end]
            )
            assert found[t].item() == pytest.approx(plain - values[t], abs=1e-5)
    assert torch.allclose(found, estimators.to_go(e, gamma) - e.value, atol=1e-5)


def test_off_policy_forms():
    """The products written out; all forms are one where the policies are."""
    e, gamma = episode(5, True), 0.9
    w = torch.tensor([0.7, 1.2, 0.9, 1.5, 0.6], dtype=torch.float64)
    found = estimators.weighted(e, w, gamma)
    rewards = [*e.reward.tolist(), 1.5]  # the last one is the value beyond the time limit
    for t in range(5):
        past = math.prod(w[: t + 1].tolist())
        causal = sum(
            gamma ** (k - t) * rewards[k] * math.prod(w[t + 1 : k + 1].tolist()) for k in range(t, 6)
        )
        plain = sum(gamma ** (k - t) * rewards[k] for k in range(t, 6))
        v = e.value[t].item()
        assert found["causal products (S4 A.3)"][t].item() == pytest.approx(past * (causal - v), rel=1e-4)
        assert found["w_t twice (S4 2.10)"][t].item() == pytest.approx(
            past * w[t].item() * (causal - v), rel=1e-4
        )
        assert found["past products (S4 2.11)"][t].item() == pytest.approx(past * (plain - v), rel=1e-4)
        assert found["one ratio (S4 2.13)"][t].item() == pytest.approx(w[t].item() * (plain - v), rel=1e-4)
        clipped_away = w[t] > 1.2 if plain > v else w[t] < 0.8
        assert found["one ratio, clipped"][t].item() == pytest.approx(
            0 if clipped_away else w[t].item() * (plain - v), rel=1e-4
        )
    same = estimators.weighted(e, torch.ones(5, dtype=torch.float64), gamma)
    assert all(torch.allclose(psi.float(), same["no ratio"].float(), atol=1e-5) for psi in same.values())


def test_measures_of_known_numbers():
    """Episodes drawn around a known mean: the variance, a bias put in, none found where there is none; within
    5 errors."""
    g, mean = torch.Generator().manual_seed(0), torch.zeros(50)
    mean[0] = 2.0
    true = mean + torch.randn(400, 50, generator=g)
    shifted = true + 0.5 * torch.randn(400, 50, generator=g)
    shifted[:, 1] += 1.0
    found = {
        quantity: (value, error) for quantity, value, error in estimators.measures(shifted, true, mean, 4.0)
    }
    for quantity, right in (("variance", 50 * 1.25 / 4), ("bias", 0.5)):
        value, error = found[quantity]
        assert abs(value - right) < 5 * error and error < 0.1 * right
    assert found["cosine"][0] == pytest.approx(2 / (5 + 50 * 1.25 / estimators.BATCH) ** 0.5, rel=0.1)
    _, bias, _ = estimators.measures(true, true, mean, 4.0)
    assert bias[1:] == (0.0, 0.0)
    assert estimators.squared_norm(true) == pytest.approx(4.0, rel=0.1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("estimators")
    argv = ["--env", "CartPole-v1", "--stages", "1024", "2048", "--budget", "300", "--no-compile"]
    return folder, [*argv, "--runs", str(folder / "runs"), "--results", str(folder / "results")]


def call(monkeypatch, argv):
    monkeypatch.setattr(sys, "argv", ["estimators.py", *map(str, argv)])
    return estimators.main()


def test_the_whole_script(tiny, monkeypatch, capsys):
    folder, argv = tiny
    monkeypatch.setattr(estimators, "DISTANCES", (1e-3, 1e-1))
    assert call(monkeypatch, argv) == 0
    tables = {}
    for name in estimators.FIGURES:
        with open(folder / "results" / f"{name}.csv", newline="") as file:
            tables[name] = list(csv.DictReader(file))
        assert {row["stage"] for row in tables[name]} == {"1024", "2048"}
        assert all(math.isfinite(float(row["value"])) and float(row["error"]) >= 0 for row in tables[name])
        assert (folder / "results" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    for stage in ("1024", "2048"):  # what two tables share, and what must agree exactly
        here = {
            (r["question"], r["estimator"], float(r["x"]), r["quantity"]): r
            for t in tables.values()
            for r in t
            if r["stage"] == stage
        }
        same = [
            ("gae", "GAE", 1.0),
            ("n_step", "n-step", math.inf),
            ("psi", "to-go - V", 2.0),
            ("baselines", "V", 3.0),
        ]
        assert len({round(float(here[*key, "variance"]["value"]), 3) for key in same}) == 1
        same = [("gae", "GAE", 0.0), ("n_step", "n-step", 1.0), ("psi", "TD, agent's V", 4.0)]
        assert len({round(float(here[*key, "variance"]["value"]), 3) for key in same}) == 1
    # a second call neither trains nor measures
    monkeypatch.setattr(ppo, "train", None)
    monkeypatch.setattr(estimators, "Agent", None)
    monkeypatch.setattr(estimators, "FIGURES", {"gae": estimators.FIGURES["gae"]})  # drawing takes its time
    (folder / "results" / "gae.png").unlink()
    assert call(monkeypatch, argv) == 0 and (folder / "results" / "gae.png").exists()
    (folder / "results" / "gae.png").unlink()
    assert (
        call(monkeypatch, ["--plots", "--results", folder / "results"]) == 0
        and (folder / "results" / "gae.png").exists()
    )


def test_scores_are_the_gradients_of_log_pi(tiny):
    folder, _ = tiny
    args = SimpleNamespace(seed=1, compile=False)
    path = estimators.train("CartPole-v1", [1024, 2048], folder / "runs" / "CartPole-v1_1_2048", args)[1]
    agent = estimators.Agent(path)
    assert agent.step == 2048 and agent.env == "CartPole-v1"
    episodes = estimators.play(agent, agent.theta, 100, 100, 3)
    assert len(episodes) >= 20 and all(len(e.reward) == len(e.value) for e in episodes)
    firsts = [
        estimators.play(agent, agent.theta, 1, 1, seed, purpose)[0].obs[0].tolist()
        for seed, purpose in ((3, "sample"), (3, "reference"), (4, "sample"))
    ]
    assert firsts[0] == episodes[0].obs[0].tolist() and len({tuple(first) for first in firsts}) == 3
    e = episodes[0]
    summed = torch.func.grad(lambda x: agent.policy(x, e.obs).log_prob(e.action).sum())(agent.theta)
    assert torch.allclose(agent.scores(agent.theta, e.obs, e.action).sum(0), summed, atol=1e-4)
    assert estimators.ratios(agent, agent.theta, e).sub(1).abs().max() < 1e-6
    moved = estimators.moved(agent, summed, 0.01, e.obs)
    kl = estimators.trpo.kl(
        *(estimators.as_trpo(agent.policy(x, e.obs)) for x in (agent.theta, moved))
    ).mean()
    assert kl.item() == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--budget", 0], ["--budget must be at least 1", "0"]),
        (["--seed", -1], ["--seed", "-1"]),
        (["--env", "CartPoole-v1"], ["--env CartPoole-v1", "CartPole-v1"]),
        (["--stages", 0], ["--stages", "at least 1"]),
        (["--checkpoints", "nope.pt"], ["--checkpoints nope.pt", "no such file"]),
        (["--checkpoints", "nope.pt", "--stages", 5], ["--stages", "--checkpoints"]),
        (["--checkpoints", __file__], ["not a checkpoint"]),
        (["--plots"], ["--results", "psi.csv"]),
        (
            ["--runs", __file__, "--env", "CartPole-v1"],
            [f"--runs {__file__}", "no folder that can be written"],
        ),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) and str(x[0]).startswith("--") else "",
)
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, argv, words):
    assert call(monkeypatch, ["--results", tmp_path, "--runs", tmp_path / "runs", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in words), (
        error
    )
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """The script, whose measurement of a checkpoint is a row of its step; a call of it, and what makes a
    checkpoint."""

    def agent(path):
        content = torch.load(path, weights_only=True)
        envs = SimpleNamespace(close=lambda: None)
        return SimpleNamespace(env=content["env"], step=content["step"], theta=None, envs=envs)

    def row(agent, *_):
        return [("psi", "to-go", 0, "bias", float(agent.step), 0.0)], None

    monkeypatch.setattr(estimators, "Agent", agent)
    monkeypatch.setattr(estimators, "measure_gradients", row)
    monkeypatch.setattr(estimators, "FIGURES", {"psi": estimators.FIGURES["psi"]})
    for name in ("play", "measure_importance", "measure_kl", "draw"):
        monkeypatch.setattr(estimators, name, lambda *_: [])

    def checkpoint(name, step, env="CartPole-v1"):
        content = {"agent": "ppo", "env": env, "args": {}, "state": {}, "step": step}
        save_checkpoint(tmp_path / name, content)
        return tmp_path / name

    return lambda *argv: call(monkeypatch, ["--results", tmp_path / "results", *argv]), checkpoint


def test_a_checkpoint_that_went_on_is_measured_again(quick, tmp_path):
    """And two files of one folder are two measurements."""
    run, checkpoint = quick
    for steps in ((100, 200), (300, 200)):
        files = [
            checkpoint(name, step) for name, step in zip(("checkpoint.pt", "early.pt"), steps, strict=True)
        ]
        assert run("--checkpoints", *files) == 0
        rows = estimators.read_table(tmp_path / "results" / "psi.csv")
        assert [(int(row["stage"]), float(row["value"])) for row in rows] == [(step, step) for step in steps]


def test_tables_of_another_task_are_not_replaced(quick, tmp_path, capsys):
    run, checkpoint = quick
    assert run("--checkpoints", checkpoint("checkpoint.pt", 1)) == 0
    table = tmp_path / "results" / "psi.csv"
    before = table.read_bytes()
    for argv in (("--checkpoints", checkpoint("other.pt", 2, "Acrobot-v1")), ("--env", "Acrobot-v1")):
        assert run(*argv, "--runs", tmp_path / "runs") == 2
        error = capsys.readouterr().err
        assert (
            f"--results {table.parent}: holds the tables of CartPole-v1" in error and error.count("\n") == 1
        )
    assert table.read_bytes() == before and not (tmp_path / "runs").exists()
    assert not list(tmp_path.glob("estimators_other*"))


def test_a_folder_that_cannot_be_written_is_told_before_the_work(quick, monkeypatch, tmp_path, capsys):
    run, checkpoint = quick
    file = checkpoint("checkpoint.pt", 1)
    assert run("--checkpoints", file, "--results", file) == 2
    assert f"--results {file}: is no folder that can be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no measurements"),
        (HEADER + "\n", "holds no measurements"),
        (HEADER[: -len(",error")] + "\nCartPole-v1,1,psi,V,0,bias,1\n", "is no table of this script (KeyE"),
        (HEADER + "\nCartPole-v1,1,psi,V,0,bias,one,0\n", "is no table of this script (ValueError"),
        (HEADER + "\nCartPole-v1,1,psi,V,0,bias,1", "is no table of this script (TypeError"),
    ],
    ids=["nothing", "no rows", "a column", "a number", "cut short"],
)
def test_drawing_reads_the_tables_and_no_more(quick, tmp_path, capsys, text, words):
    """A damaged one is refused in one line, and none is written again."""
    run, checkpoint = quick
    assert run("--checkpoints", checkpoint("checkpoint.pt", 1)) == 0
    table = tmp_path / "results" / "psi.csv"
    whole = table.read_bytes().replace(b"\n", b"\r\n")
    table.write_bytes(whole)
    assert run("--plots") == 0 and table.read_bytes() == whole
    table.write_text(text)
    assert run("--plots") == 2
    error = capsys.readouterr().err
    assert f"error: {table}: {words}" in error and error.count("\n") == 1 and table.read_text() == text


def test_a_second_process_leaves_the_run_of_the_first_alone(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs" / "CartPole-v1_1_1024"
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "progress.csv").touch()
    argv = ["--env", "CartPole-v1", "--stages", 1024, "--runs", tmp_path / "runs", "--results", tmp_path]
    with lock_folder(folder, "--runs"):
        assert call(monkeypatch, argv) == 2
    error = capsys.readouterr().err
    assert f"--runs {folder}: run folder in use by process" in error and error.count("\n") == 1
    assert (folder / "run" / "progress.csv").exists()


def test_a_curve_is_the_median_of_the_stages_and_its_name_stands_where_it_ends():
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    values = {"k1 loss": (0.0, 1.0, 0.4), "k1 reward": (0.41, 0.4, 0.39), "k2 loss": (0.8, 0.8, 0.9)}
    rows = [
        {"estimator": name, "stage": str(stage), "x": x, "value": str(value)}
        for name, found in values.items()
        for stage, value in enumerate(found)
        for x in ("0.1", "1")
    ]
    estimators.estimators_in(axis, "kl_gradient", rows, last=True)
    curves = {line.get_label(): list(line.get_ydata()) for line in axis.get_lines()}
    assert curves == {"k1 loss": [0.4, 0.4], "k1 reward": [0.4, 0.4], "k2 loss": [0.8, 0.8]}
    low = axis.collections[0].get_paths()[0].vertices[:, 1].min()
    assert low == 0.0 and axis.collections[0].get_paths()[0].vertices[:, 1].max() == 1.0
    axis.set_ylim(0, 1)
    estimators.label_ends(axis)
    places = {text.get_text(): text.get_position()[1] for text in axis.texts}
    assert places["k1 loss"] == pytest.approx(0.4) and places["k2 loss"] == pytest.approx(0.8)
    assert places["k1 reward"] - places["k1 loss"] == pytest.approx(0.075)  # not one on the other
