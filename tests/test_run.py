"""The plumbing around an agent, tried on a scripted one: folders, tables, checkpoints, resuming, faults, exit statuses."""

import csv
import dataclasses
import errno
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from zoo.common.cli import RunArgs, check_args, main, parse
from zoo.common.envs import VectorEnv
from zoo.common.errors import EnvironmentFault, RunFault, UsageError
from zoo.common.files import load_checkpoint, portable, save_checkpoint
from zoo.common.run import COLUMNS, Run, evaluate


class Countdown(VectorEnv):
    """A scripted task: after a reset with a seed slot i plays an episode of i + 1 steps, then ever episodes of one step.

    The observation is the steps left, the reward 1 plus the action plus the seed's last digit in thousandths.
    """

    def __init__(self, num_envs: int, endless: bool = False):
        single = gym.Env()
        single.observation_space = gym.spaces.Box(-1, 1, (1,))
        single.action_space = gym.spaces.Discrete(2)
        super().__init__("Countdown-v0", num_envs, single)
        self.left, self.endless, self.seeds = np.ones(num_envs), endless, []

    def _restart(self, index, seed):
        self.left[index] = 1 if seed is None else index + 1
        self.seeds += [] if seed is None else [seed]
        self.bonus = self.bonus if seed is None else (seed % 10) / 1000
        return self.left[index, None]

    def _advance(self, action):
        self.left -= 1
        ended = (self.left <= 0) & (not self.endless)
        return self.left[:, None].copy(), 1.0 + action + self.bonus, ended, np.zeros(len(ended), bool)


@dataclass
class Args(RunArgs):
    """A scripted agent."""

    env: str = "Countdown-v0"
    total_steps: int = 1000
    eval_every: int = 300
    eval_episodes: int = 4
    progress: bool = False
    clip: float = 0.2
    """clip range"""
    nan_at: int = 0
    """step at which the loss becomes NaN"""
    stop_at: int = 0
    """step at which the process gets a signal, itself"""
    kill: int = int(signal.SIGINT)
    """that signal"""
    fault: str = ""
    """what happens at step 500"""


def policy(obs):
    return np.zeros(len(obs), dtype=np.int64)


def train(args: Args) -> float:
    """A random walk stands for learning: all that it needs to go on is in `state`."""
    check_args(args)
    run = Run(args, "scripted", Countdown(args.num_envs), lambda: Countdown(3))
    rng, weights = torch.Generator().manual_seed(args.seed), torch.zeros(4)
    if (saved := run.restore()) is not None:
        rng.set_state(saved["rng"])
        weights = saved["weights"]
    while run.step < args.total_steps:
        step = run.step + 100
        weights = weights + torch.randn(4, generator=rng)
        if args.stop_at == step:
            os.kill(os.getpid(), args.kill)
        if args.fault and step == 500:
            raise {"environment": EnvironmentFault("it broke"), "bug": ValueError("a bug")}[args.fault]
        loss = torch.tensor(float("nan")) if args.nan_at == step else weights.sum()
        metrics = {"policy_loss": loss, "learning_rate": 1e-3 * step}
        if step > 300:
            metrics["late"] = weights[0]
        episodes = [(float(weights[1]), step // 100)] if step % 200 == 0 else []
        run.report(step, {"weights": weights, "rng": rng.get_state()}, metrics, episodes, policy)
    return run.finish({"weights": weights, "rng": rng.get_state()}, policy, {"weights": weights})


def rows(folder, clocks=False):
    with open(Path(folder) / "progress.csv", newline="") as file:
        return [{k: v for k, v in row.items() if clocks or k not in ("wall_time", "sps")} for row in csv.DictReader(file)]


def command_line(monkeypatch, capsys, *argv, table=None):
    """Run `main` in this process; its exit status and the lines on stderr."""
    monkeypatch.setattr(sys, "argv", ["agent.py", *map(str, argv)])
    old = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        main(Args, train, lambda env: table or {})
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        signal.signal(signal.SIGINT, old[0])
        signal.signal(signal.SIGTERM, old[1])
        Run.stop_signal = 0
    return status, capsys.readouterr().err.splitlines()


# The run's folder


def test_folder_of_a_finished_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    resets, reset = [], Countdown.reset
    monkeypatch.setattr(Countdown, "reset", lambda self, seed: resets.append(seed) or reset(self, seed))
    mean = train(Args(env="my/Task v0", seed=7, eval_every=250))
    assert resets == [resets[0], resets[0] + 3] * 4  # two rounds an evaluation, none of them made twice
    assert capsys.readouterr().out == f"final evaluation: {mean:.2f} ± 0.83 over 4 episodes\n"
    (folder,) = Path("runs").iterdir()
    assert re.fullmatch(r"my_Task_v0__scripted__7__\d+", folder.name)
    table = rows(folder, clocks=True)
    assert list(table[0]) == [*COLUMNS, "policy_loss", "learning_rate", "late"]
    assert [int(row["step"]) for row in table] == list(range(100, 1001, 100))
    assert [row["step"] for row in table if row["eval_return"]] == ["300", "500", "800", "1000"]
    assert float(table[-1]["eval_return"]) == pytest.approx(mean)
    assert table[0]["train_return"] == "" and table[0]["late"] == "" and table[3]["late"] != ""
    assert table[3]["train_length"] == "3"  # the mean of 2 and 4
    assert json.loads((folder / "args.json").read_text())["args"] == dataclasses.asdict(
        Args(env="my/Task v0", seed=7, eval_every=250)
    )
    agent = load_checkpoint(folder / "agent.pt", "--agent", "scripted", "my/Task v0")
    assert set(agent["state"]) == {"weights"}
    assert not list(folder.glob("*.tmp"))


def test_tensorboard_has_cleanrl_keys(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(EnvironmentFault):
        train(Args(run_dir=str(tmp_path / "run"), fault="environment"))
    Run.latest.close()
    train(Args(resume=str(tmp_path / "run")))
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        *("charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/learning_rate"),
        *("losses/policy_loss", "losses/late", "eval/return", "eval/std"),
    }
    assert [event.step for event in events.Scalars("charts/episodic_return")] == [200, 400, 600, 800, 1000]  # 400 once


def test_same_seed_same_table(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(Args(run_dir=str(tmp_path / name), seed=seed))
    assert rows(tmp_path / "a") == rows(tmp_path / "b") != rows(tmp_path / "c")


def test_run_dir_in_use_or_not_empty(tmp_path):
    args = Args(run_dir=str(tmp_path / "run"))
    train(args)
    with pytest.raises(UsageError, match=r"not empty; .* --resume .*run"):
        train(args)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be made"):
        train(Args(run_dir=str(tmp_path / "file")))
    holder = f"import time\nfrom zoo.common.files import lock_folder\nfrom pathlib import Path\n\
lock = lock_folder(Path({str(tmp_path / 'run')!r}), '')\nprint('held', flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=f"in use by process {process.pid}"):
            train(Args(resume=str(tmp_path / "run")))
        process.kill()
    train(Args(resume=str(tmp_path / "run")))  # the lock died with its process


# Checkpoints


def test_checkpoint_round_trip(tmp_path):
    whole = torch.arange(1000.0)
    state = {"a": whole[:3], "b": [1, (2.5, None)], "seed": 2**100, "n": np.float64(0.1), "f": True, 3: "three"}
    content = {"agent": "x", "env": "y", "args": {}, "state": state}
    save_checkpoint(tmp_path / "checkpoint.pt", portable(content))
    loaded = load_checkpoint(tmp_path / "checkpoint.pt", "--resume", "x", "y")["state"]
    assert torch.equal(loaded.pop("a"), whole[:3])
    assert loaded == {"b": [1, (2.5, None)], "seed": 2**100, "n": 0.1, "f": True, 3: "three"}
    assert (tmp_path / "checkpoint.pt").stat().st_size < 3000  # not the 4,000 bytes behind the view
    with pytest.raises(TypeError, match=r"state\['x'\] is a ndarray"):
        portable({"x": np.zeros(2)})
    with pytest.raises(RunFault, match=r"state\['w'\]\[1\] has become non-finite"):
        portable({"w": [torch.zeros(1), torch.tensor([0.0, float("inf")])]})


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "content, reason",
    [
        ("half", "is torn"),
        ("flipped", "is torn"),
        ("empty", "is torn"),
        ("text", "is not a checkpoint of the zoo"),
        ("foreign", "is not a checkpoint of the zoo"),
        ("code", "would execute code"),
        ("pickle", "could execute code"),
        ("format", "has format 99"),
        ("agent", "is of agent sac, not scripted"),
        ("env", "is of --env Other-v0, not Countdown-v0"),
        ("nothing", "holds no checkpoint.pt"),
        ("nowhere", "no such folder"),
    ],
)
def test_refused_checkpoints(tmp_path, monkeypatch, content, reason):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run" / "checkpoint.pt"
    if content != "nowhere":
        path.parent.mkdir()
    good = {"agent": "scripted", "env": "Countdown-v0", "args": {}, "step": 0, "run": {"wall_time": 0.0, "recent": []}}
    good["state"] = {"weights": torch.zeros(4000)}
    if content in ("half", "flipped"):
        save_checkpoint(path, good)
        data = bytearray(path.read_bytes())
        data[8000] ^= 1
        path.write_bytes(data if content == "flipped" else data[:8000])
    elif content in ("format", "agent", "env"):
        save_checkpoint(path, good | {content: {"format": 99, "agent": "sac", "env": "Other-v0"}[content]})
    elif content in ("code", "foreign"):
        torch.save({"x": Code()} if content == "code" else {"weights": torch.zeros(3)}, path)
    elif content in ("empty", "text", "pickle"):
        path.write_bytes({"empty": b"", "text": b"hello", "pickle": pickle.dumps(Code())}[content])
    with pytest.raises(UsageError) as refusal:
        train(Args(resume="run"))
    assert reason in str(refusal.value) and "\n" not in str(refusal.value) and "--resume run" in str(refusal.value)
    assert not Path("executed").exists()


# Killed and resumed


@pytest.mark.parametrize("damage", ["none", "torn line", "torn rewrite"])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, damage):
    train(Args(run_dir=str(tmp_path / "whole")))
    with pytest.raises(EnvironmentFault):  # dies after the row of step 400; the last checkpoint is of step 300
        train(Args(run_dir=str(tmp_path / "cut"), fault="environment"))
    Run.latest.close()
    assert len(rows(tmp_path / "cut")) == 4
    with open(tmp_path / "cut" / "progress.csv", "a") as table:
        table.write("5" if damage == "torn line" else "")  # of 500, not a row of step 5
    if damage == "torn rewrite":
        (tmp_path / "cut" / "checkpoint.pt.tmp").write_bytes(b"half a che")
        Run(Args(resume=str(tmp_path / "cut")), "scripted", Countdown(1), lambda: Countdown(3)).close()
        assert not list((tmp_path / "cut").glob("*.tmp"))
    train(Args(resume=str(tmp_path / "cut")))
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    clock = [float(row["wall_time"]) for row in rows(tmp_path / "cut", clocks=True)]
    assert clock == sorted(clock)
    assert not list((tmp_path / "cut").glob("*.tmp"))


def test_killed_while_running(tmp_path):
    """kill -9 at an arbitrary moment of a process that checkpoints all the time, several times over."""
    argv = [sys.executable, __file__, "--total-steps", "10000000", "--eval-every", "0", "--checkpoint-every", "1e-9"]
    folder = tmp_path / "run"
    for attempt, where in enumerate((["--run-dir", folder], ["--resume", folder])):
        with subprocess.Popen([*argv, *map(str, where)]) as process:
            seen = rows(folder)[-1]["step"] if attempt else 0
            while not (folder / "checkpoint.pt").exists() or rows(folder)[-1:] == [] or rows(folder)[-1]["step"] == seen:
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(0.05 + 0.013 * attempt)
            process.kill()
    step = load_checkpoint(folder / "checkpoint.pt", "")["step"]
    train(Args(resume=str(folder), total_steps=step + 300, eval_every=0))
    assert [int(row["step"]) for row in rows(folder)] == list(range(100, step + 301, 100))


def test_interrupt_then_resume(tmp_path, monkeypatch, capsys):
    train(Args(run_dir=str(tmp_path / "whole")))
    folder = tmp_path / "run"
    for kill, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        where = ("--resume", folder) if folder.exists() else ("--run-dir", folder)
        step = 500 if folder.exists() else 200
        got = command_line(monkeypatch, capsys, *where, "--stop-at", step, "--kill", int(kill))
        message = f"interrupted at step {step}; resume with: python agent.py --resume {folder}"
        assert got == (status, [message])
    assert command_line(monkeypatch, capsys, "--resume", folder) == (0, [])
    assert rows(folder) == rows(tmp_path / "whole")


def test_ctrl_c_in_a_process_of_its_own(tmp_path):
    """A real signal at an arbitrary moment, and a second one that does not wait for the iteration's end."""
    argv = [sys.executable, __file__, "--total-steps", "10000000", "--run-dir", str(tmp_path / "run")]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "run" / "checkpoint.pt").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        error = process.communicate()[1]
    assert process.returncode == 130
    assert re.fullmatch(rf"interrupted at step \d+; resume with: python {__file__} --resume {tmp_path}/run\n", error)
    step = int(error.split()[3].rstrip(";"))
    assert int(rows(tmp_path / "run")[-1]["step"]) == step


def test_second_signal_stops_at_once(tmp_path, monkeypatch, capsys):
    def stuck(args):
        Run(args, "scripted", Countdown(1), lambda: Countdown(1))
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on after the second Ctrl-C")

    monkeypatch.setattr(sys.modules[__name__], "train", stuck)
    got = command_line(monkeypatch, capsys, "--run-dir", tmp_path / "run")
    assert got == (130, ["interrupted before the first checkpoint; start again"])


# Faults


def test_non_finite_metric_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    status, lines = command_line(monkeypatch, capsys, "--run-dir", folder, "--nan-at", 600)
    assert status == 1
    assert lines == [
        "error: policy_loss became nan in the iteration that ended at step 600",
        f"last good checkpoint: step 300; resume with: python agent.py --resume {folder}",
    ]
    assert load_checkpoint(folder / "checkpoint.pt", "")["step"] == 300
    assert rows(folder)[-1]["step"] == "500"
    again = command_line(monkeypatch, capsys, "--resume", folder, "--nan-at", 400)[1]
    assert "step 400" in again[0] and again[1] == lines[1]


def test_non_finite_state_keeps_the_last_good_checkpoint(tmp_path):
    run = Run(Args(run_dir=str(tmp_path / "run")), "scripted", Countdown(1), lambda: Countdown(3))
    run.report(300, {"weights": torch.zeros(1)}, {"policy_loss": 0.0}, [], policy)
    with pytest.raises(RunFault, match=r"state\['weights'\] has become non-finite"):
        run.report(600, {"weights": torch.full((1,), torch.nan)}, {"policy_loss": 0.0}, [], policy)
    Run(Args(resume=str(tmp_path / "run")), "scripted", Countdown(1), lambda: Countdown(3)).close()  # the folder is free
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt", "")["step"] == 300


@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "os.replace"])
def test_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys, where):
    folder, calls = tmp_path / "run", []
    module, name = {"torch": torch, "os": os}[where.split(".")[0]], where.split(".")[1]
    real = getattr(module, name)

    def full(*args, **kwargs):
        calls.append(args)
        if load_step(folder) == 300:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    def load_step(folder):
        return load_checkpoint(folder / "checkpoint.pt", "")["step"] if (folder / "checkpoint.pt").exists() else None

    monkeypatch.setattr(module, name, full)
    status, lines = command_line(monkeypatch, capsys, "--run-dir", folder)
    assert calls and status == 1
    assert lines[0] == f"error: cannot write {folder}: No space left on device"
    assert lines[1].startswith("last good checkpoint: step 300; resume with:") and len(lines) == 2
    assert load_step(folder) == 300
    assert not list(folder.glob("*.tmp"))


def test_disk_full_behind_torchs_own_error(tmp_path):
    """torch's writer may hide the file's OSError behind a RuntimeError; a size limit provokes it (in another process)."""
    code = f"""
import resource, torch
from pathlib import Path
from zoo.common.files import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try: save_checkpoint(Path({str(tmp_path)!r}) / "checkpoint.pt", {{"state": torch.zeros(100000)}})
except OSError as error: print(error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "File too large\n", done.stderr
    assert not list(tmp_path.iterdir())


def test_endings_of_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    got = command_line(monkeypatch, capsys, "--fault", "environment", "--eval-every", 0)
    assert got == (1, ["error: it broke", "no checkpoint had been written yet"])
    assert command_line(monkeypatch, capsys, "--num-envs", 0) == (2, ["error: --num-envs must be at least 1, not 0"])
    assert command_line(monkeypatch, capsys, "--resume", "nope") == (2, ["error: --resume nope: no such folder"])
    with pytest.raises(ValueError, match="a bug"):  # a fault of the program keeps its traceback
        command_line(monkeypatch, capsys, "--fault", "bug")
    Run.latest.close()
    assert command_line(monkeypatch, capsys, "--clop", 1)[0] == 2


# Arguments


@pytest.mark.parametrize(
    "change, message",
    [
        ({"total_steps": 0}, "--total-steps must be at least 1, not 0"),
        ({"num_envs": -2}, "--num-envs must be at least 1, not -2"),
        ({"eval_episodes": 0}, "--eval-episodes must be at least 1, not 0"),
        ({"threads": 0}, "--threads must be at least 1, not 0"),
        ({"env_threads": 0}, "--env-threads must be at least 1, not 0"),
        ({"eval_every": -1}, "--eval-every must be at least 0, not -1"),
        ({"seed": -1}, "--seed must be at least 0, not -1"),
        ({"seed": 2**31}, "--seed must be less than 2**31, not 2147483648"),
        ({"checkpoint_every": 0.0}, "--checkpoint-every must be greater than 0 seconds, not 0"),
        ({"checkpoint_every": float("nan")}, "--checkpoint-every must be greater than 0 seconds, not nan"),
        ({"run_dir": "a", "resume": "b"}, "--run-dir a and --resume b exclude each other: a resumed run stays in its folder"),
    ],
)
def test_check_args(change, message):
    check_args(Args())
    with pytest.raises(UsageError) as error:
        check_args(dataclasses.replace(Args(), **change))
    assert str(error.value) == message


def test_precedence_of_flag_checkpoint_table_default(tmp_path):
    table = {"Countdown-v0": {"clip": 0.5, "seed": 5}, "Other-v0": {"clip": 0.9}}

    def parsed(*argv):
        return parse(Args, lambda env: table.get(env, {}), argv)

    assert (parsed().clip, parsed().seed, parsed().nan_at) == (0.5, 5, 0)
    assert parsed("--env=Other-v0").clip == 0.9
    assert parsed("--env", "Unknown-v0").clip == 0.2
    assert parsed("--clip", "0.2").clip == 0.2  # given, though equal to the dataclass's default
    assert parsed("--no-compile").compile is False
    folder = str(tmp_path / "run")
    train(parsed("--run-dir", folder, "--seed", "6", "--clip", "0.7"))
    resumed = parsed("--resume", folder, "--seed", "8")
    assert (resumed.clip, resumed.seed, resumed.run_dir, resumed.resume) == (0.7, 8, None, folder)
    with pytest.raises(UsageError, match="is of --env Countdown-v0, not Other-v0"):
        parsed("--resume", folder, "--env", "Other-v0")
    with pytest.raises(UsageError, match="of agent scripted, whose arguments this one lacks: clip, fault, kill, nan_at, stop"):
        parse(RunArgs, lambda env: {}, ["--resume", folder])


def test_help_says_what_the_agent_is_and_lists_its_fields_first(capsys):
    with pytest.raises(SystemExit) as end:
        parse(Args, lambda env: {}, ["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert text.index(__doc__.split("\n\n")[0][:40]) < text.index("--clip") < text.index("--seed") < text.index("--resume")


def test_track_without_wandb(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install wandb"):
        train(Args(track=True, run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


# Evaluation


@pytest.mark.parametrize("num_envs, episodes, expected", [(3, 3, [1, 2, 3]), (3, 5, [1, 2, 3, 1, 2]), (4, 2, [1, 2])])
def test_each_slot_plays_one_episode_a_round(num_envs, episodes, expected):
    """The slots that end early start new episodes, which must not count."""
    envs = Countdown(num_envs)
    returns, lengths = evaluate(policy, envs, episodes, seed=1000)
    assert lengths.tolist() == expected
    assert len(envs.seeds) == -(-episodes // num_envs) and set(np.diff(envs.seeds)) <= {num_envs}  # each round has its own
    bonuses = np.repeat(envs.seeds, num_envs) % 10 / 1000
    assert returns == pytest.approx([n * (1 + bonus) for n, bonus in zip(expected, bonuses, strict=False)])


def test_evaluations_share_no_starts():
    """Neither those of different seeds nor those of a training run, whose environments start from seed + i."""
    envs = Countdown(4)
    for seed in range(20):
        evaluate(policy, envs, 4, seed)
    assert min(np.diff(sorted(envs.seeds))) > 1000 and min(envs.seeds) > 10_000 and max(envs.seeds) < 2**31


def test_evaluation_repeats_and_uses_the_policy():
    envs = Countdown(3)
    first = evaluate(policy, envs, 3, seed=7)[0]
    assert np.array_equal(first, evaluate(policy, envs, 3, seed=7)[0])
    ones = evaluate(lambda obs: (obs[:, 0] > 1).astype(np.int64), envs, 3, seed=7)[0]
    assert ones - first == pytest.approx([0, 1, 2])


def test_endless_evaluation_episode(monkeypatch):
    monkeypatch.setattr("zoo.common.run.MAX_EPISODE", 50)
    with pytest.raises(RunFault, match="did not end in 50 steps; add a time limit"):
        evaluate(policy, Countdown(2, endless=True), 2, seed=1)


def test_report_is_cheap_when_nothing_is_due(tmp_path):
    run = Run(Args(run_dir=str(tmp_path / "run"), eval_every=0), "scripted", Countdown(1), lambda: Countdown(1))
    metrics = {f"m{i}": torch.tensor(1.0) for i in range(10)}
    costs = []
    for _ in range(200):
        start = time.perf_counter()
        run.report(run.step + 1, {"weights": metrics["m0"]}, metrics, [(1.0, 2)], policy)
        costs.append(time.perf_counter() - start)
    run.close()
    assert np.median(costs) < 1e-3
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


if __name__ == "__main__":  # an agent's file, for the tests that need a process
    main(Args, train, lambda env: {})
