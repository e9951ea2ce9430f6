"""The settings of a task: the same from Python and the shell, shared by its versions, shown by --help."""

import dataclasses
import re
import sys

import gymnasium as gym
import pytest

from zoo import (
    actor_critic,
    ddpo,
    diffusion_dpo,
    dpo,
    grpo,
    grpo_tokens,
    ppo,
    preferences,
    reinforce,
    rlhf,
    sac,
    trpo,
)  # fmt: skip
from zoo.common.args import as_words, flag, settings, settings_for
from zoo.common.cli import parse
from zoo.common.envs import make_single
from zoo.common.errors import UsageError

AGENTS = [actor_critic, grpo, ppo, preferences, reinforce, sac, trpo]


def from_command_line(agent, *argv):
    return parse(agent.Args, lambda env: agent.SETTINGS.get(env, {}), [str(part) for part in argv])


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v0", "HalfCheetah-v4", "My/Task"])
def test_python_has_the_command_lines_settings(agent, env):
    args = agent.Args.for_env(env, seed=2)
    assert isinstance(args, agent.Args) and args == from_command_line(agent, "--env", env, "--seed", 2)
    assert (args.env, args.seed) == (env, 2)


def test_what_is_given_wins_over_the_tasks_settings():
    args = ppo.Args.for_env("CartPole-v1", total_steps=7)
    assert args.total_steps == 7 and args.num_envs == ppo.SETTINGS["CartPole-v1"]["num_envs"]
    assert args.gamma == ppo.Args().gamma
    with pytest.raises(TypeError, match="learning_rat"):
        ppo.Args.for_env("CartPole-v1", learning_rat=1.0)


def test_a_class_of_ones_own_needs_no_table():
    @dataclasses.dataclass
    class Args(ppo.Args):
        more: int = 1

    assert settings(Args) == {} and settings(ppo.Args) is ppo.SETTINGS
    assert Args.for_env("CartPole-v1").total_steps == ppo.Args().total_steps


TABLE = {
    "Hopper-v4": {"a": 4},
    "Hopper-v2": {"a": 2},
    "Hop-v5": {"a": 0},
    "Other-v12": {"a": 12},
    "Plain": {"a": 1},
}


@pytest.mark.parametrize(
    ("env", "taken"),
    [
        ("Hopper-v5", "Hopper-v4"),
        ("Hopper-v3", "Hopper-v2"),  # the older of two as near
        ("Hopper-v0", "Hopper-v2"),
        ("Other-v3", "Other-v12"),
        ("Hopper-v4", "Hopper-v4"),
        ("Plain", "Plain"),
        ("FixedHorizon/Hopper-v4", "Hopper-v4"),  # the same task, played on to its time limit
        ("zoo.common.horizon:FixedHorizon/Plain", "Plain"),
        ("FixedHorizon/Hopper", None),
        ("Hopper", None),
        ("Hoppe-v5", None),
        ("my:Hopper-v4", None),  # a task of that name in a module of one's own is another
    ],
)
def test_versions_share_their_settings(env, taken, capsys):
    assert settings_for(env, lambda task: TABLE.get(task, {})) == TABLE.get(taken, {})
    told = capsys.readouterr()
    expected = (
        f"{env} has no settings of its own: those of {taken} are taken\n" if taken not in (env, None) else ""
    )
    assert (told.out, told.err) == ("", expected)


def shown(capsys, agent, *argv):
    with pytest.raises(SystemExit) as end:
        from_command_line(agent, *argv, "--help")
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("agent", AGENTS)
def test_help_shows_examples_and_the_tasks_with_settings(agent, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = shown(capsys, agent)
    name = agent.__name__.split(".")[1]
    assert text.count(f"    python zoo/{name}.py") >= 2
    assert all(task in text for task in agent.SETTINGS)
    assert "--env X --help shows the defaults of X" in text
    assert text.index("--env STR") < min(
        text.index(f"--{other} INT") for other in ("seed", "num-envs", "threads")
    )


@pytest.mark.parametrize("agent", AGENTS)
def test_every_argument_is_explained(agent, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # one column
    text = " ".join(shown(capsys, agent).replace("│", " ").split())
    for field in dataclasses.fields(agent.Args):
        told = re.search(rf" {flag(field.name)}[ ,](.*?)\(default: ", text)
        assert re.search(r"(?<![-{\w,])[A-Z]?[a-z]\w*", told[1]), flag(field.name)


@pytest.mark.parametrize("agent", [ddpo, diffusion_dpo, dpo, grpo_tokens, rlhf])
def test_help_leaves_out_what_does_nothing(agent, capsys):
    text = shown(capsys, agent)
    assert not any(f"{flag(name)} " in text for name in agent.Args.idle) and "--seed " in text
    assert "num_envs" in agent.Args.idle and (f"{flag('eval_episodes')} " in text) == (
        "eval_episodes" not in agent.Args.idle
    )
    assert from_command_line(agent, "--env-threads", 2).env_threads == 2  # a script's argument for all runs


def test_help_shows_a_tasks_own_defaults(capsys):
    flat = " ".join(shown(capsys, ppo, "--env", "CartPole-v1").replace("│", " ").split())
    assert "The defaults below are those of CartPole-v1." in flat
    assert "over all environments (default: 100000)" in flat and "Adam's (default: 0.002)" in flat
    assert "Adam's (default: 0.0003)" in " ".join(shown(capsys, ppo).replace("│", " ").split())


def test_a_missing_module_is_named(tmp_path, monkeypatch):
    (tmp_path / "imports_more.py").write_text("import not_there")
    monkeypatch.syspath_prepend(str(tmp_path))
    for env, told in (
        ("my_module:My-v0", "no module named my_module; PYTHONPATH=FOLDER names the folder of my_module"),
        ("mine.tasks:My-v0", "no module named mine; PYTHONPATH=FOLDER names the folder of mine"),
        ("imports_more:My-v0", "no module named not_there"),
    ):
        with pytest.raises(UsageError) as caught:
            make_single(env)
        assert str(caught.value) == f"--env {env}: there is {told}"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "Box2D", None)
    for module in [name for name in sys.modules if name.startswith("gymnasium.envs.box2d")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(UsageError) as caught:
        make_single("LunarLander-v3")
    assert (
        str(caught.value) == "--env LunarLander-v3 needs Box2D, which is missing: pip install -e '.[box2d]'"
    )
    monkeypatch.setattr(
        gym.envs.registration, "registry", {k: v for k, v in gym.registry.items() if "ALE/" not in k}
    )
    with pytest.raises(UsageError) as caught:
        make_single("ALE/Pong-v5")
    advice = "pip install ale-py and give --env ale_py:ALE/Pong-v5"
    assert str(caught.value) == f"--env ALE/Pong-v5 needs the package ale-py: {advice}"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (True, ["--on-it"]),
        (False, ["--no-on-it"]),
        (0.00123456789, ["--on-it", "0.00123457"]),
        (1, ["--on-it", "1"]),
        ((32, 16), ["--on-it", "32", "16"]),
        ([32, 16], ["--on-it", "32", "16"]),
    ],
)
def test_an_argument_as_the_command_line_has_it(value, words):
    assert as_words("on_it", value) == words
