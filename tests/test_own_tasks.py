"""scripts/own_tasks.py: Gymnasium finds no fault in the tasks, and PPO's measurement goes on where it was."""

import gymnasium as gym
import numpy as np
import own_tasks
import own_tasks_ppo
import pytest
from gymnasium.utils.env_checker import check_env

from zoo.common.envs import make_envs
from zoo.common.evaluate import evaluate


@pytest.mark.parametrize("name", own_tasks.LENGTHS)
def test_a_task_is_as_gymnasium_wants_it(name):
    env = gym.make(f"own_tasks:{name}-v0")
    check_env(env.unwrapped, skip_render_check=True)
    env.action_space.seed(0)
    env.reset(seed=0)
    steps, terminated, truncated = 0, False, False
    while not (terminated or truncated):
        _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        steps += 1
    assert truncated == (steps == own_tasks.LENGTHS[name]) and np.isfinite(reward)


def test_the_stick_can_be_watched():
    env = gym.make("own_tasks:Wind-v0", render_mode="rgb_array")
    env.reset(seed=0)
    tips = []
    for angle in (-0.5, 0.0, 0.5):
        env.unwrapped.state = np.array([angle, 0.0])
        row, column = np.argwhere(env.render()[..., 1] == 60)[0]
        tips.append((row, column))
    assert [column for _, column in tips] == pytest.approx([64 - 46, 64, 64 + 46], abs=3)
    assert tips[1][0] < tips[0][0] == tips[2][0]


def play(name, actions):
    """The rewards of these actions from a state of zeros, and whether the last one ended the episode."""
    env = gym.make(f"own_tasks:{name}-v0").unwrapped
    env.reset(seed=0)
    env.state = np.zeros(2)
    steps = [env.step(action) for action in actions]
    return [step[1] for step in steps], steps[-1][2]


def test_what_ends_the_tasks():
    way = [1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1]  # 0 to the right, 1 down
    assert play("Maze", way) == ([0.0] * 11 + [1.0], True)
    assert play("Maze", [0, 0, *way]) == ([0.0] * 14, False)  # it is past the walls, elsewhere
    rewards, ended = play("Integrator", [np.ones(1)] * 60)
    assert ended and rewards[0] == pytest.approx(-0.1)
    assert play("Wind", [0] * 200)[1]


def test_the_measurement_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    calls = []

    def zoo(env_id, seed, arguments):
        calls.append(("zoo", env_id, seed, arguments))
        return 10.0 * seed, 0.5

    def sb3(env_id, seed):
        calls.append(("sb3", env_id, seed))
        return 1.0, 0.0

    monkeypatch.setattr(own_tasks_ppo, "run_zoo", zoo)
    monkeypatch.setitem(own_tasks_ppo.OTHERS, "sb3", sb3)

    def main(*arguments):
        calls.clear()
        path = str(tmp_path / "t" / "ppo.csv")
        monkeypatch.setattr("sys.argv", ["own_tasks_ppo.py", "--results", path, *arguments])
        own_tasks_ppo.main()
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    main("--tasks", "Maze", "--side", "zoo", "--seeds", "1", "3")
    assert calls == [("zoo", "own_tasks:Maze-v0", 1, ""), ("zoo", "own_tasks:Maze-v0", 3, "")]
    told = main("--tasks", "Maze", "--seeds", "1", "3", "--side", "zoo", "sb3")
    assert calls == [("sb3", "own_tasks:Maze-v0", 1), ("sb3", "own_tasks:Maze-v0", 3)]
    assert told[-2:] == [
        ["Maze", "sb3", "1", "±", "0", "1", "1"], ["Maze", "zoo", "20", "±", "14.1", "10", "30"]
    ]  # fmt: skip
    main("--trial", "faster=--clip=0.1", "--tasks", "Wind", "--seeds", "1")
    assert calls == [("zoo", "own_tasks:Wind-v0", 1, "--clip=0.1")]
    assert main("--report") == [*told[-2:], ["Wind", "faster", "10", "±", "0", "10"]] and not calls


@pytest.fixture
def table(tmp_path, monkeypatch, capsys):
    """Runs own_tasks_ppo.py on a table of three rows: the exit status and stderr, no run taking time."""
    monkeypatch.setattr(own_tasks_ppo, "run_zoo", lambda *_: (2.0, 0.0))
    monkeypatch.setitem(own_tasks_ppo.OTHERS, "sb3", lambda *_: (2.0, 0.0))
    path = tmp_path / "ppo.csv"
    rows = ["Maze,zoo,1,1,0,5,", "Maze,zoo,2,1,0,5,", "Maze,mine,1,1,0,5,--clip 0.1"]
    path.write_text("\n".join([",".join(own_tasks_ppo.COLUMNS), *rows]) + "\n")

    def run(*arguments):
        words = ["own_tasks_ppo.py", "--results", str(path), "--tasks", "Maze", "--side", "zoo", *arguments]
        monkeypatch.setattr("sys.argv", words)
        return own_tasks_ppo.main(), capsys.readouterr().err

    return path, run


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--trial", "mine=--clip 0.3"], "has it with '--clip 0.1', not '--clip 0.3'"),
        (["--trial", "sb3=--clip 0.3"], "with a NAME that is none of the sides"),
        (["--trial", "clip 0.3"], "give NAME=ARGUMENTS"),
        (["--trial", "--clip 0.3"], "Missing value for argument '--trial'"),
        (["--sides", "zoo"], "perhaps you meant --side"),
        (["--side", "sb4"], "--side sb4: there is no such; there are zoo, sb3, known"),
        (["--tasks", "Mase"], "--tasks Mase: there is no such"),
        (["--trial", "new=--clip '0.3"], "No closing quotation"),
        (["--trial", "new=--seed 3"], "given by this script"),
        (["--trial", "new=--num-steps 0"], "--num-steps must be at least 1"),
        (["--seeds", "-1"], "--seeds -1: a seed lies in [0, 2**31)"),
        (["--results", "."], "--results .: is a folder"),
        (["--results", f"{__file__}/x.csv"], "is no folder that can be written"),
    ],
)
def test_bad_input_is_one_line_and_status_2(table, arguments, reason):
    path, run = table
    before = path.read_text()
    status, error = run(*arguments)
    assert status == 2 and reason in error and error.count("\n") == 1 and path.read_text() == before


def test_a_torn_last_line_is_measured_again_and_other_damage_told(table):
    path, run = table
    whole = path.read_text()
    path.write_text(whole + "Maze,zoo,3,1")
    assert run("--seeds", "3", "4") == (0, "")
    rows = path.read_text().removeprefix(whole).splitlines()
    assert [row.rpartition(",")[0].rpartition(",")[0] for row in rows] == ["Maze,zoo,3,2,0", "Maze,zoo,4,2,0"]
    for damaged in (whole.replace("side", "Side"), whole + "Maze,zoo\n", whole + "Maze,zoo,5,x,0,5,\n"):
        path.write_text(damaged)
        status, error = run("--seeds", "5")
        assert status == 2 and f"{path}: is damaged" in error and error.count("\n") == 1
        assert path.read_text() == damaged


def test_a_short_run_of_the_zoos_side(monkeypatch):
    monkeypatch.setattr(own_tasks_ppo, "STEPS", 2048)
    monkeypatch.setattr(own_tasks_ppo, "EPISODES", 2)
    mean, std = own_tasks_ppo.run_zoo("own_tasks:Integrator-v0", 1, "--no-compile --num-epochs 1")
    assert mean < 0 <= std


@pytest.mark.parametrize("task", own_tasks_ppo.CONTROLLERS)
@pytest.mark.parametrize("change", [0.8, 1.25])
def test_a_controller_that_knows_the_task_is_worse_when_it_acts_otherwise(task, change):
    env_id, controller = f"own_tasks:{task}-v0", own_tasks_ppo.CONTROLLERS[task]
    known, _ = own_tasks_ppo.run_known(env_id, 1)
    with make_envs(env_id, 50) as envs:
        changed, _ = evaluate(lambda obs: change * controller(obs), envs, 50, 1)
    assert changed.mean() < known
