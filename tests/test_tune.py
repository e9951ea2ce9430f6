"""scripts/tune.py: the ranges that follow from an agent's arguments, and two tiny trials."""

import math
import shlex
from types import SimpleNamespace
from typing import Literal

import pytest
import tune

from zoo import actor_critic, ppo, reinforce, sac, trpo
from zoo.common.args import lookup_in
from zoo.common.cli import parse
from zoo.common.errors import UsageError

TINY = "--total-steps 64 --num-envs 2 --num-steps 8 --minibatch-size 16 --no-compile --eval-episodes 1"


def ranges(agent=ppo, **args):
    return {each.name: each for each in tune.search_space(agent.Args(), tune.Args(**args), agent)}


@pytest.mark.parametrize(
    ("name", "kind", "value", "expected"),
    [
        ("learning_rate", float, 1e-3, dict(low=1e-4, high=1e-2)),
        ("clip", float, 0.2, dict(low=0.05, high=0.8)),
        ("entropy_coef", float, 0.0, dict(choices=(0.0, 0.001, 0.01))),
        ("log_std", float, -1.0, dict(low=-2.0, high=0.0)),
        ("num_steps", int, 32, dict(choices=(8, 16, 32, 64, 128))),
        ("off_policy_epochs", int, 1, dict(choices=(1, 2, 4))),
        ("hidden", tuple[int, ...], (64, 32), dict(choices=((32, 16), (64, 32), (128, 64)))),
        ("anneal", bool, True, dict(choices=(True, False))),
        ("surrogate", Literal["a", "b"], "a", dict(choices=("a", "b"))),
        ("target_kl", float | None, None, None),
        ("folder", str, "x", None),
    ],
)
def test_a_range_follows_from_name_type_and_value(name, kind, value, expected):
    found = tune.derived(name, kind, value)
    assert (found is None) == (expected is None)
    for key, wanted in (expected or {}).items():
        assert getattr(found, key) == (wanted if key == "choices" else pytest.approx(wanted))


def test_of_gamma_what_is_left_to_1_is_searched():
    found = tune.derived("gamma", float, 0.99)
    assert found.complement and (found.low, found.high) == (pytest.approx(0.002), pytest.approx(0.1))
    trial = SimpleNamespace(suggest_float=lambda name, low, high, log: low if log else math.nan)
    assert found.suggest(trial) == pytest.approx(0.998)
    assert found.drawn(0.99) == pytest.approx(0.01) and found.drawn(0.5) is None


@pytest.mark.parametrize("agent", [ppo, trpo, actor_critic, reinforce, sac])
def test_every_agent_has_a_space_that_holds_the_agent_as_it_is(agent):
    found, default = ranges(agent), agent.Args()
    assert "learning_rate" in found and "gamma" in found
    assert not {"env", "seed", "total_steps", "eval_every", "device", "run_dir", "kept"} & found.keys()
    lost = [each.name for each in found.values() if each.drawn(getattr(default, each.name)) is None]
    assert lost == []


def test_ranges_that_are_given_replace_the_derived_ones():
    given = (
        "learning_rate=1e-4..1e-2",
        "num_steps=8..32",
        "hidden=32,32|64",
        "anneal=True",
        "target_kl=0.01|0.02",
    )
    found = ranges(only=("gamma", "clip"), space=given)
    assert found.keys() == {"learning_rate", "num_steps", "hidden", "anneal", "target_kl", "gamma", "clip"}
    assert found["learning_rate"][2:4] == (1e-4, 1e-2) and found["num_steps"].whole
    assert found["hidden"].choices == ((32, 32), (64,)) and found["target_kl"].choices == (0.01, 0.02)


def test_what_the_arguments_say_is_not_searched_unless_it_is_named():
    given = "--learning-rate=1e-3 --num_steps 8 --no-anneal"
    found = ranges(args=given)
    assert "gamma" in found and not {"learning_rate", "num_steps", "anneal"} & found.keys()
    assert ranges(args=given, only=("num_steps",)).keys() == {"num_steps"}
    assert "learning_rate" in ranges(args=given, space=("learning_rate=1e-4..1e-2",))


@pytest.mark.parametrize("given", ["--eval-every 128", "--eval-every=128", "--eval_every 128", ""])
def test_evaluations_come_as_the_arguments_say_else_ten_a_trial(given):
    args = tune.Args(env="CartPole-v1", args=f"--total-steps 5e3 {given}")
    assert tune.arguments(ppo, args).eval_every == (128 if given else 500)


@pytest.mark.parametrize("given", ["--seed 3", "--env=Acrobot-v1", "--run_dir x", "--resume x", "'"])
def test_arguments_that_are_not_the_runs_are_refused(given):
    with pytest.raises(UsageError, match=r"^--args .*(given by this script|No closing quotation)"):
        tune.arguments(ppo, tune.Args(env="CartPole-v1", args=given))


def test_the_confirming_seeds_are_not_those_of_the_search(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(tune, "score", lambda module, args, seeds, folder: float(seen.extend(seeds) or 1))
    tune.compare(ppo, ppo.Args(), {}, 2, [1, 1001, 1003], tmp_path)
    assert seen == [1002, 1004] * 2 and "over seeds 1002, 1004\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (dict(space=("nope=1..2",)), "--space nope=1..2: give NAME=LOW..HIGH"),
        (dict(space=("clip=2..1",)), "--space clip=2..1: '2..1' is neither"),
        (dict(space=("clip=a|b",)), "neither LOW..HIGH nor A|B|C"),
        (dict(space=("anneal=yes",)), "neither LOW..HIGH nor A|B|C"),
        (dict(space=("clip=",)), "neither LOW..HIGH nor A|B|C"),
        (dict(space=("gamma=2..3",)), "--space gamma=2..3: --gamma must lie in [0, 1], not 2"),
        (dict(space=("num_envs=-2|0",)), "--space num_envs=-2|0: --num-envs must be at least 1, not -2"),
        (dict(only=("nope",)), "--only nope: no field of this agent"),
        (dict(only=("target_kl",)), "give --space target_kl=..."),
    ],
)
def test_a_space_that_cannot_be_is_one_line(args, words):
    with pytest.raises(UsageError) as error:
        ranges(**args)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_command_of_the_best_trial():
    values = {
        "learning_rate": 0.00123456789,
        "anneal": False,
        "recompute_advantages": True,
        "hidden": (32, 32),
    }
    assert tune.command("ppo", "CartPole-v1", values) == (
        "python zoo/ppo.py --env CartPole-v1 --learning-rate 0.00123457 --no-anneal "
        "--recompute-advantages --hidden 32 32"
    )


def test_the_command_of_the_best_trial_runs_it_whatever_the_arguments_were():
    words = shlex.split(tune.command("ppo", "CartPole-v1", {"clip": 0.3}, "--clip 0.1 --gamma 0.9"))
    made = parse(ppo.Args, lookup_in(ppo.Args), words[2:])
    assert (made.clip, made.gamma) == (0.3, 0.9)


def test_what_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(tune.importlib.util, "find_spec", lambda name: None)
    assert tune.main([]) == 2
    assert capsys.readouterr().err == "error: optuna is missing: pip install -e '.[tune]'\n"


@pytest.fixture
def search(tmp_path):
    """Runs a tiny search in a folder; more arguments may follow."""
    pytest.importorskip("optuna", reason="pip install -e '.[tune]'")
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")

    def run(*more, args=TINY):
        given = ["--env", "CartPole-v1", "--only", "learning_rate", "gamma", "--folder", str(tmp_path)]
        return tune.main([*given, "--args", args, *more])

    return run


def test_two_trials_are_made_kept_and_gone_on_with(search, tmp_path, capsys, monkeypatch):
    import optuna

    assert search("--trials", "2", "--confirm", "1") == 0
    told = capsys.readouterr().out
    assert "trial 0: " in told and "trial 1: " in told and "best: " in told and "as it is: " in told
    assert "python zoo/ppo.py --env CartPole-v1" in told
    study = optuna.load_study(study_name="tune", storage=f"sqlite:///{tmp_path / 'study.db'}")
    first, second = study.trials
    assert first.params == {
        "learning_rate": pytest.approx(2e-3),
        "gamma": pytest.approx(0.01),
    }  # CartPole's own
    assert second.params != first.params
    assert len(first.intermediate_values) >= 2 and first.value == list(first.intermediate_values.values())[-1]
    assert search("--trials", "2", "--confirm", "0") == 0
    told = capsys.readouterr().out
    assert "2 of 2 trials are done" in told and "trial 2" not in told
    assert search("--trials", "3", "--confirm", "0") == 0
    assert "trial 2: " in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} <= {"study.db", "importance.png", ".lock"}
    assert search("--trials", "3", args=TINY + " --num-epochs 2") == 2
    assert "holds a search with other args" in capsys.readouterr().err
    assert search("--trials", "3", "--space", "gamma=0.9|0.99") == 2
    error = capsys.readouterr().err
    assert "holds a search with other ranges" in error and error.count("\n") == 1


def test_a_trial_that_is_interrupted_is_made_again(search, monkeypatch, capsys):
    """Else a search stopped in its first trial would never try the agent as it is."""
    tried = []

    def score(module, args, *_):
        tried.append(args.learning_rate)
        if len(tried) == 1:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(tune, "score", score)
    assert search("--trials", "2", "--confirm", "0") == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on\n"
    assert search("--trials", "2", "--confirm", "0") == 0
    assert len(tried) == 3 and tried[0] == tried[1] != tried[2]


def test_a_file_that_is_no_study_is_told(search, tmp_path, capsys):
    (tmp_path / "study.db").write_text("something else" * 100)
    assert search() == 2
    error = capsys.readouterr().err
    assert "study.db is no search of Optuna's" in error and error.count("\n") == 1
    assert search("--folder", str(tmp_path / "study.db")) == 2
    error = capsys.readouterr().err
    assert "is no folder that can be written" in error and error.count("\n") == 1


def test_arguments_that_do_not_go_together_are_told(search, capsys):
    assert search("--space", "minibatch_size=5", "--trials", "2") == 2
    captured = capsys.readouterr()
    refused = "--minibatch-size 5 does not divide --num-envs x --num-steps = 16"
    assert captured.out.count(refused) == 2
    assert captured.err.count("\n") == 1 and "none of 2 trials was completed" in captured.err


def test_evaluations_decide_who_is_given_up(tmp_path):
    seen = []
    args = ppo.Args.for_env("CartPole-v1", num_envs=2, num_steps=8, minibatch_size=16, total_steps=64,
                            eval_every=16, eval_episodes=1, compile=False, env_threads=1)  # fmt: skip
    final = tune.score(ppo, args, [1], tmp_path, lambda number, value: seen.append((number, value)))
    assert [number for number, _ in seen] == [1, 2, 3, 4] and seen[-1][1] == final
    with pytest.raises(tune.Stopped):
        tune.score(ppo, args, [1], tmp_path, lambda number, value: number == 2)
    assert list(tmp_path.iterdir()) == []
    assert ppo.Run.__module__ == "zoo.common.run" and ppo.Run.__name__ == "Run"
    mean = tune.score(ppo, args, [1, 2], tmp_path)
    assert mean == (final + tune.score(ppo, args, [2], tmp_path)) / 2
