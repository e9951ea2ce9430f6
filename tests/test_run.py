"""The plumbing around an agent, tried on a scripted one: folders, checkpoints, resuming, faults, endings."""

import csv
import dataclasses
import errno
import importlib.util
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch

import zoo.common.evaluate
from zoo import actor_critic, ppo, reinforce
from zoo.common.args import RunArgs, check_args
from zoo.common.cli import main, parse
from zoo.common.envs import VectorEnv
from zoo.common.errors import EnvironmentFault, Interrupted, RunFault, UsageError
from zoo.common.evaluate import Evaluation, evaluate
from zoo.common.files import load_checkpoint, save_checkpoint
from zoo.common.logs import COLUMNS
from zoo.common.process import Process
from zoo.common.run import Run


class Countdown(VectorEnv):
    """A scripted task: after a reset slot i plays an episode of i + 1 steps, then ever episodes of one step.

    The observation is the steps left, the reward 1 plus the action plus the seed's last digit in thousandths.
    """

    def __init__(self, num_envs: int, endless: bool = False):
        single = gym.Env()
        single.observation_space = gym.spaces.Box(-1, 1, (1,))
        single.action_space = gym.spaces.Discrete(2)
        super().__init__("Countdown-v0", num_envs, single)
        self.left, self.endless, self.seeds, self.closed = np.ones(num_envs), endless, [], False

    def _restart(self, index, seeds):
        self.left[index] = 1 if seeds is None else index + 1
        if seeds is not None:
            self.seeds.append(list(seeds))
            self.bonus = np.array(seeds) % 10 / 1000
        return self.left[index, None]

    def _advance(self, action):
        self.left -= 1
        ended = (self.left <= 0) & (not self.endless)
        return self.left[:, None].copy(), 1.0 + action + self.bonus, ended, np.zeros(len(ended), bool)

    def close(self):
        self.closed = True


@dataclass
class Args(RunArgs):
    """A scripted agent."""

    kept: ClassVar = (*RunArgs.kept, "clip")

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
    stop_in_evaluation: int = 0
    """step whose evaluation gets it"""
    kill: int = int(signal.SIGINT)
    """that signal"""
    signals: int = 1
    """how many of them"""
    fault: str = ""
    """what happens at step 500, or in an evaluation"""


class State(NamedTuple):
    weights: torch.Tensor
    rng: torch.Generator


def policy(obs):
    return np.zeros(len(obs), dtype=np.int64)


def train(args: Args) -> float:
    """A random walk stands for learning: all that it needs to go on is in `state`."""
    check_args(args)

    def kill(due):
        for _ in range(args.signals if due else 0):
            os.kill(os.getpid(), args.kill)

    def score(acting):
        if args.fault == "evaluation":
            raise EnvironmentFault("it broke")
        kill(args.stop_in_evaluation == run.step)
        returns, _ = evaluate(policy, Countdown(3), args.eval_episodes, args.seed)
        torch.rand(7)  # as a network does that is made to be filled
        return {"eval_return": float(returns.mean() + acting["weights"][0]), "eval_std": float(returns.std())}

    run = Run(args, "scripted", score, engine="none")
    state = run.restore(State(torch.zeros(4), torch.Generator().manual_seed(args.seed)))
    while run.step < args.total_steps:
        step = run.step + 100
        weights = state.weights + torch.randn(4, generator=state.rng)
        state = state._replace(weights=weights)
        kill(args.stop_at == step)
        if args.fault and step == 500 and args.fault != "evaluation":
            raise {"environment": EnvironmentFault("it broke"), "bug": ValueError("a bug")}[args.fault]
        loss = torch.tensor(float("nan")) if args.nan_at == step else weights.sum()
        metrics = {"policy_loss": loss, "learning_rate": 1e-3 * step}
        if step > 300:
            metrics["late"] = weights[0]
        episodes = [(float(weights[1]), step // 100)] if step % 200 == 0 else []
        run.report(step, state, {"weights": weights}, metrics, episodes)
    return run.finish(state, {"weights": state.weights})


def no_evaluation(acting):
    return {"eval_return": 0.0, "eval_std": 0.0}


def rows(folder, clocks=False):
    clock = () if clocks else ("wall_time", "sps")
    with open(Path(folder) / "progress.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in clock} for row in csv.DictReader(file)]


def command_line(monkeypatch, capture, *argv, table=None):
    """Run `main` in this process; its exit status and the lines on stderr, but for those of every run."""
    monkeypatch.setattr(sys, "argv", ["agent.py", *map(str, argv)])
    try:
        main(Args, train, lambda env: table or {})
        status = 0
    except SystemExit as end:
        status = end.code
    usual = re.compile(r"run folder: |[\d,]+ steps: evaluation |to (watch|evaluate) it: |finished at step ")
    return status, [line for line in capture.readouterr().err.splitlines() if not usual.match(line)]


# The run's folder


def test_folder_of_a_finished_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = Args(env="my/Task v0", seed=7, eval_every=250)
    with monkeypatch.context() as patch:  # as if it were a file of the zoo
        patch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=None))
        mean = train(args)
    (folder,) = Path("runs").iterdir()
    out, err = capsys.readouterr()
    assert re.fullmatch(rf"final evaluation: {mean:.2f} ± \d\.\d\d over 4 episodes\n", out)
    scripts = os.path.relpath(Path(__file__).parents[1] / "scripts")
    first, *evaluations, watch, evaluate = err.splitlines()
    assert first == f"run folder: {folder}"
    assert [line.split(": evaluation ")[0] for line in evaluations] == ["300 steps", "500 steps", "800 steps"]
    assert watch == f"to watch it: python {scripts}/watch.py {folder}"
    assert evaluate == f"to evaluate it: python {scripts}/evaluate.py {folder}"
    assert re.fullmatch(r"my_Task_v0__scripted__7__\d+", folder.name)
    table = rows(folder, clocks=True)
    assert list(table[0]) == [*COLUMNS, "policy_loss", "learning_rate", "late"]
    assert [int(row["step"]) for row in table] == list(range(100, 1001, 100))
    assert [row["step"] for row in table if row["eval_return"]] == ["300", "500", "800", "1000"]
    assert float(table[-1]["eval_return"]) == pytest.approx(mean)
    assert table[0]["train_return"] == "" and table[0]["late"] == "" and table[3]["late"] != ""
    assert table[3]["train_length"] == "3"  # the mean of 2 and 4
    assert json.loads((folder / "args.json").read_text())["args"] == dataclasses.asdict(args)
    agent = load_checkpoint(folder / "agent.pt", "--agent", "scripted", "my/Task v0")
    assert set(agent) == {"format", "agent", "env", "args", "state"} and set(agent["state"]) == {"weights"}
    assert not list(folder.glob("*.tmp"))
    train(args)
    assert "to watch it" not in capsys.readouterr().err  # no script would find its network


def test_columns_of_another_kind_of_agent(tmp_path, capsys):
    """One that counts something else and is not evaluated by playing."""
    args = Args(run_dir=str(tmp_path / "run"), eval_every=10, total_steps=20)
    run = Run(args, "other", lambda acting: {"eval_nll": acting["x"], "eval_accuracy": 0.5}, unit="chains")
    run.report(10, {}, {"x": 1.25}, {}, [])
    run.report(20, {}, {"x": 1.0}, {}, [])
    assert run.finish({}, {"x": 1.0}) == 1.0
    out, err = capsys.readouterr()
    assert out == "final evaluation: nll 1, accuracy 0.5\n"
    assert err.splitlines()[1:] == ["10 chains: evaluation nll 1.25, accuracy 0.5"]
    assert [(row["eval_nll"], row["eval_accuracy"]) for row in rows(tmp_path / "run")] == [
        ("1.25", "0.5"),
        ("1", "0.5"),
    ]


def test_tensorboard_has_cleanrl_keys(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(EnvironmentFault), Process():
        train(Args(run_dir=str(tmp_path / "run"), fault="environment"))
    time.sleep(1.1)  # TensorBoard reads files in the order of their names, which have the second in them
    train(Args(resume=str(tmp_path / "run")))
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        *("charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/learning_rate"),
        *("losses/policy_loss", "losses/late", "eval/return", "eval/std"),
    }
    returns, evaluations = events.Scalars("charts/episodic_return"), events.Scalars("eval/return")
    assert [event.step for event in returns] == [200, 400, 600, 800, 1000]  # 400 once
    assert [event.step for event in evaluations] == [300, 600, 900, 1000]


def test_same_seed_same_table(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(Args(run_dir=str(tmp_path / name), seed=seed))
    assert rows(tmp_path / "a") == rows(tmp_path / "b") != rows(tmp_path / "c")


def test_evaluations_draw_nothing_from_training(tmp_path):
    seen = []
    for every in (0, 100):
        torch.manual_seed(3)
        train(Args(run_dir=str(tmp_path / str(every)), eval_every=every))
        seen.append(torch.rand(1))
    assert seen[0] == seen[1]


def test_run_dir_that_is_not_empty(tmp_path):
    args = Args(run_dir=str(tmp_path / "run"))
    train(args)
    with pytest.raises(UsageError, match=r"not empty; .* --resume .*run"):
        train(args)
    train(Args(resume=str(tmp_path / "run")))  # the refused one has let it go
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "args.json").write_text("mine")
    with pytest.raises(UsageError, match="not empty; name a new one"):
        train(Args(run_dir=str(foreign)))
    assert [path.name for path in foreign.iterdir()] == ["args.json"]  # and no lock file left in it
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be made"):
        train(Args(run_dir=str(tmp_path / "file")))


def test_folder_in_use(tmp_path):
    folder = tmp_path / "run"
    holder = f"import time\nfrom zoo.common.files import lock_folder\nfrom pathlib import Path\n\
lock = lock_folder(Path({str(folder)!r}), '')\nprint('held', flush=True)\ntime.sleep(60)"
    train(Args(run_dir=str(folder)))
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        for where in ({"resume": str(folder)}, {"run_dir": str(folder)}):
            with pytest.raises(UsageError, match=f"in use by process {process.pid}"):
                train(Args(**where))
    finally:
        process.kill()
        process.communicate()
    train(Args(resume=str(folder)))  # the lock died with its process


def test_folder_left_before_its_first_checkpoint(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    status, lines = command_line(
        monkeypatch, capsys, "--run-dir", folder, "--eval-every", 0, "--fault", "environment"
    )
    assert (status, lines) == (1, ["error: it broke", "no checkpoint had been written yet"])
    assert len(rows(folder)) == 4 and len(list(folder.glob("events*"))) == 1
    status, lines = command_line(monkeypatch, capsys, "--resume", folder)
    assert status == 2 and len(lines) == 1 and f"--run-dir {folder} starts it anew" in lines[0]
    assert command_line(monkeypatch, capsys, "--run-dir", folder) == (0, [])
    assert [int(row["step"]) for row in rows(folder)] == list(range(100, 1001, 100))
    assert len(list(folder.glob("events*"))) == 1


@contextmanager
def without_privileges():
    """Permissions mean nothing to root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("flag", ["--run-dir", "--resume"])
def test_read_only_folder(tmp_path, monkeypatch, capsys, flag):
    folder = tmp_path / "run"
    if flag == "--resume":
        train(Args(run_dir=str(folder)))
        (folder / ".lock").chmod(0o444)
    else:
        folder.mkdir()
    for parent in (tmp_path, *tmp_path.parents[:3]):  # pytest's are for this user alone
        parent.chmod(0o755)
    folder.chmod(0o555)
    capsys.readouterr()
    with without_privileges():
        got = command_line(monkeypatch, capsys, flag, folder)
    assert got == (2, [f"error: {flag} {folder}: cannot be written: Permission denied"])
    if flag == "--resume":
        (folder / "checkpoint.pt").chmod(0)
        with without_privileges():
            status, lines = command_line(monkeypatch, capsys, flag, folder)
        assert status == 2 and lines == [
            f"error: --resume {folder}: checkpoint.pt cannot be read: Permission denied"
        ]


def test_folder_deleted_while_running(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    saved = []

    def delete(self, *args, **kwargs):
        real(self, *args, **kwargs)
        saved.append(self.step)
        shutil.rmtree(folder)

    real = Run._save
    monkeypatch.setattr(Run, "_save", delete)
    status, lines = command_line(monkeypatch, capsys, "--run-dir", folder)
    assert status == 1 and saved == [300]
    assert lines == [
        f"error: cannot write {folder}: the folder is gone, it was deleted or moved",
        "its checkpoints are gone as well; start again",
    ]


# Checkpoints


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
        ("args", "is not a checkpoint of the zoo"),
        ("agent.pt", "checkpoint.pt is an agent.pt, from which no run can go on"),
        ("nothing", "holds no checkpoint.pt; was the run stopped before its first checkpoint?"),
        ("results", "holds no checkpoint.pt; its agent.pt can be evaluated"),
        ("within", "holds no checkpoint.pt; the newest of those within: run/seed_2"),
        ("nowhere", "no such folder"),
    ],
)
def test_refused_checkpoints(tmp_path, monkeypatch, content, reason):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run" / "checkpoint.pt"
    if content != "nowhere":
        path.parent.mkdir()
    good = {"agent": "scripted", "env": "Countdown-v0", "args": {}, "step": 0}
    good |= {"run": {"wall_time": 0.0, "recent": [], "owed": None}, "state": {"weights": torch.zeros(4000)}}
    if content in ("half", "flipped"):
        save_checkpoint(path, good)
        data = bytearray(path.read_bytes())
        data[8000] ^= 1
        path.write_bytes(data if content == "flipped" else data[:8000])
    elif content in ("format", "agent", "env", "args"):
        others = {"format": 99, "agent": "sac", "env": "Other-v0", "args": None}
        save_checkpoint(path, good | {content: others[content]})
    elif content == "agent.pt":
        save_checkpoint(path, {name: good[name] for name in ("agent", "env", "args", "state")})
    elif content == "results":
        for name in ("agent.pt", "meta.json"):
            (path.parent / name).touch()
    elif content == "within":
        for name, time in (("seed_1", 1), ("seed_2", 2), ("seed_0", 0)):
            (path.parent / name).mkdir()
            save_checkpoint(path.parent / name / "checkpoint.pt", good)
            os.utime(path.parent / name / "checkpoint.pt", (time, time))
    elif content in ("code", "foreign"):
        torch.save({"x": Code()} if content == "code" else {"weights": torch.zeros(3)}, path)
    elif content in ("empty", "text", "pickle"):
        path.write_bytes({"empty": b"", "text": b"hello", "pickle": pickle.dumps(Code())}[content])
    with pytest.raises(UsageError) as refusal:
        train(Args(resume="run"))
    message = str(refusal.value)
    assert reason in message and "\n" not in message and "--resume run" in message
    assert not Path("executed").exists()


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    """In the file's directory, which has no checksum: a thirteenth of its bits, and the one that makes an
    entry a folder, of which torch would read nothing."""
    path, content = tmp_path / "agent.pt", {"agent": "scripted", "env": "Countdown-v0", "args": {}}
    save_checkpoint(path, content | {"state": {"weights": torch.arange(20.0)}})
    whole, good = path.read_bytes(), str(load_checkpoint(path, "run"))
    folder_bit = 8 * (whole.rindex(b"archive/data/0") - 8) + 4
    for bit in (folder_bit, *range(8 * whole.index(b"PK\x01\x02"), 8 * len(whole), 13)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            found = str(load_checkpoint(path, "run"))
        except UsageError as error:
            assert re.search("agent.pt is (torn|not a checkpoint)", str(error))
        else:
            assert found == good and bit != folder_bit


@pytest.mark.parametrize("knows", [True, False])  # how many rows it had: older checkpoints do not
def test_rows_after_the_checkpoint_may_be_anything_after_a_power_cut(tmp_path, knows):
    folder = tmp_path / "run"
    train(Args(run_dir=str(folder)))
    if not knows:
        content = torch.load(folder / "checkpoint.pt", weights_only=True)
        del content["run"]["rows"]
        torch.save(content, folder / "checkpoint.pt")
    before = (folder / "progress.csv").read_bytes()
    (folder / "progress.csv").write_bytes(before + b"\0\0\xff\0\n9000,1,1\n\0\0")
    train(Args(resume=str(folder)))
    assert (folder / "progress.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("progress.csv", lambda text: "\ufeff" + text, "row 1 has no step"),
        ("progress.csv", lambda text: text.replace(",", ";"), "row 1 has no step"),
        ("progress.csv", lambda text: text.replace("step", "steps"), "row 1 has no step"),
        ("progress.csv", lambda text: text.replace("\n400,", "\n4.0e2,"), "row 4 has no step"),
        (
            "progress.csv",
            lambda text: text.replace("\n400,", "\n400" + "," * 20),
            "row 4 has no step, or more",
        ),
        ("progress.csv", lambda text: "\udcff\udcfe\n" * 9, "row 1 has no step"),
        ("args.json", lambda text: "", "JSONDecodeError"),
        ("args.json", lambda text: text[:99], "JSONDecodeError"),
        ("args.json", lambda text: "null", "TypeError"),
        ("args.json", lambda text: '{"args": null}', "TypeError"),
    ],
    ids=["bom", "semicolons", "renamed", "rounded", "longer", "binary", "empty", "cut", "null", "args"],
)
def test_what_another_program_has_changed_is_told_before_any_work(
    tmp_path, monkeypatch, capsys, name, damage, words
):
    """And everything left as it was: what it was saved by has kept all of it but the form."""
    folder = tmp_path / "run"
    command_line(monkeypatch, capsys, "--run-dir", folder)
    text = (folder / name).read_text()
    (folder / name).write_bytes(damage(text).encode(errors="surrogateescape"))
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    status, lines = command_line(monkeypatch, capsys, "--resume", folder, "--total-steps", 1200)
    assert status == 2 and len(lines) == 1 and words in lines[0]
    assert lines[0].startswith(f"error: --resume {folder}: {name} is ")
    assert lines[0].endswith("; mend it, or move it away to go on without it")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"} == before
    (folder / name).unlink()
    assert command_line(monkeypatch, capsys, "--resume", folder, "--total-steps", 1200) == (0, [])


def test_a_state_of_other_code_is_refused(tmp_path):
    train(Args(run_dir=str(tmp_path / "run")))
    run = Run(Args(resume=str(tmp_path / "run")), "scripted", no_evaluation)
    with pytest.raises(
        UsageError, match=r"--resume .*run: state\.extra is missing; was the run made by other code"
    ):
        run.restore(NamedTuple("Other", [("weights", torch.Tensor), ("extra", float)])(torch.zeros(4), 1.0))
    Run(Args(resume=str(tmp_path / "run")), "scripted", no_evaluation).close()  # the folder is free


# What a resumed run keeps


def test_a_finished_run_resumed_keeps_what_tells_how_it_was_made(tmp_path, monkeypatch, capsys):
    """With other arguments, too: nothing was made by these. One line says why nothing is trained."""
    folder = tmp_path / "run"
    command_line(monkeypatch, capsys, "--run-dir", folder)
    names = ("args.json", "agent.pt", "checkpoint.pt", "progress.csv")
    before = {name: (folder / name).read_bytes() for name in names}
    for given in (("--total-steps", "200"), ("--eval-episodes", "3")):
        monkeypatch.setattr(sys, "argv", ["agent.py", "--resume", str(folder), *given])
        main(Args, train, lambda env: {})
        told = capsys.readouterr()
        assert "finished at step 1,000; more --total-steps go on" in told.err.splitlines()
        assert f"over {3 if given[0] == '--eval-episodes' else 4} episodes" in told.out
    assert {name: (folder / name).read_bytes() for name in names} == before


def test_a_final_evaluation_of_other_arguments_than_the_runs_is_not_recorded(tmp_path, monkeypatch, capsys):
    """Of a run that was killed in its own: args.json tells of how many episodes it is."""
    folder = tmp_path / "run"

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "_evaluated", killed)
        train(Args(run_dir=str(folder), eval_every=0))
    for episodes, recorded in (("3", False), ("4", True)):
        assert command_line(monkeypatch, capsys, "--resume", folder, "--eval-episodes", episodes) == (0, [])
        assert bool(rows(folder)[-1]["eval_return"]) == recorded


def test_a_run_finished_but_for_its_agent_is_given_one_by_its_own_arguments(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    command_line(monkeypatch, capsys, "--run-dir", folder)
    (folder / "agent.pt").unlink()
    assert command_line(monkeypatch, capsys, "--resume", folder, "--total-steps", "200") == (0, [])
    assert load_checkpoint(folder / "agent.pt", "")["args"]["total_steps"] == 1000


def test_a_run_resumed_with_other_arguments_tells_those_of_each_part(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    command_line(monkeypatch, capsys, "--run-dir", folder)
    for steps in ("1200", "1200", "1500"):
        assert command_line(monkeypatch, capsys, "--resume", folder, "--total-steps", steps) == (0, [])
    told = json.loads((folder / "args.json").read_text())
    parts = [(part["until_step"], part["args"]["total_steps"]) for part in told["earlier"]]
    assert parts == [(1000, 1000), (1200, 1200)] and told["args"]["total_steps"] == 1500
    assert told["resumed_at_step"] == 1200


def test_resumed_with_another_argument(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    command_line(monkeypatch, capsys, "--run-dir", folder, "--clip", 0.5)
    for name, value, was in (("--clip", "0.1", "0.5"), ("--seed", "2", "1")):
        got = command_line(monkeypatch, capsys, "--resume", folder, name, value)
        assert got == (2, [f"error: {name} {value}: the run in {folder} was made with {was} and keeps it"])
    assert json.loads((folder / "args.json").read_text())["args"]["clip"] == 0.5
    given = ("--clip", "0.5", "--seed", "1", "--total-steps", "1200", "--eval-every", "100")
    assert command_line(monkeypatch, capsys, "--resume", folder, *given) == (0, [])
    assert [row["step"] for row in rows(folder) if row["eval_return"]][-2:] == ["1100", "1200"]


def test_rows_of_a_step_that_came_after_its_checkpoint_are_logged_once(tmp_path, monkeypatch):
    """An agent may report one step again and again, before its first one of the environments."""

    def rows_of(folder, count, **where):
        run = Run(Args(eval_every=0, **where), "scripted", no_evaluation)
        done = run.restore({"done": 0})["done"]
        for part in range(done + 1, count + 1):
            run._saved_at = -1e9 if part == 2 else 1e18  # a checkpoint is due then
            run.report(0, {"done": part}, {}, {"part": float(part)}, [])
        run.close()
        return [row["part"] for row in rows(folder)]

    folder = tmp_path / "run"
    assert rows_of(folder, 4, run_dir=str(folder)) == ["1", "2", "3", "4"]
    assert rows_of(folder, 5, resume=str(folder)) == ["1", "2", "3", "4", "5"]


# Killed and resumed


@pytest.mark.parametrize("damage", ["none", "torn line", "torn rewrite"])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, damage):
    train(Args(run_dir=str(tmp_path / "whole")))
    # after the row of step 400; the last checkpoint is of 300
    with pytest.raises(EnvironmentFault), Process():
        train(Args(run_dir=str(tmp_path / "cut"), fault="environment"))
    assert len(rows(tmp_path / "cut")) == 4
    with open(tmp_path / "cut" / "progress.csv", "a") as table:
        table.write("5" if damage == "torn line" else "")  # of 500, not a row of step 5
    if damage == "torn rewrite":
        (tmp_path / "cut" / "checkpoint.pt.tmp").write_bytes(b"half a che")
        Run(Args(resume=str(tmp_path / "cut")), "scripted", no_evaluation).close()
        assert not list((tmp_path / "cut").glob("*.tmp"))
    train(Args(resume=str(tmp_path / "cut")))
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    clock = [float(row["wall_time"]) for row in rows(tmp_path / "cut", clocks=True)]
    assert clock == sorted(clock)
    assert not list((tmp_path / "cut").glob("*.tmp"))


@pytest.mark.parametrize("step", [300, 1000])
def test_killed_between_a_checkpoint_and_its_evaluation(tmp_path, capsys, step):
    """The resumed run makes the evaluation that was due, of the agent as it was then."""
    train(Args(run_dir=str(tmp_path / "whole")))
    killed = tmp_path / "killed"
    argv = ("--run-dir", killed, "--stop-in-evaluation", step, "--kill", int(signal.SIGKILL))
    done = subprocess.run([sys.executable, __file__, *map(str, argv)], stderr=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL
    assert load_checkpoint(killed / "checkpoint.pt", "")["step"] == step
    assert (killed / "agent.pt").exists() == (step == 1000)
    assert rows(killed)[-1]["step"] == str(step) and rows(killed)[-1]["eval_return"] == ""
    capsys.readouterr()
    train(Args(resume=str(killed)))
    assert rows(killed) == rows(tmp_path / "whole")
    told = [line.split(":")[0] for line in capsys.readouterr().err.splitlines() if ": evaluation" in line]
    assert told == {300: ["300 steps", "600 steps", "900 steps"], 1000: []}[step]


def test_an_evaluation_that_was_made_is_not_made_again(tmp_path, capsys):
    with pytest.raises(EnvironmentFault), Process():
        train(Args(run_dir=str(tmp_path / "run"), fault="environment"))
    capsys.readouterr()
    train(Args(resume=str(tmp_path / "run")))
    assert "\n300 steps" not in capsys.readouterr().err


def test_killed_while_running(tmp_path):
    """kill -9 at an arbitrary moment of a process that checkpoints all the time, several times over."""
    argv = [
        sys.executable,
        __file__,
        "--total-steps",
        "1e7",
        "--eval-every",
        "0",
        "--checkpoint-every",
        "1e-9",
    ]
    folder = tmp_path / "run"
    for attempt, where in enumerate((["--run-dir", folder], ["--resume", folder])):
        with subprocess.Popen([*argv, *map(str, where)], stderr=subprocess.DEVNULL) as process:
            seen = rows(folder)[-1:] if attempt else []
            while not (folder / "checkpoint.pt").exists() or rows(folder)[-1:] in ([], seen):
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(0.05 + 0.013 * attempt)
            process.kill()
    step = load_checkpoint(folder / "checkpoint.pt", "")["step"]
    train(Args(resume=str(folder), total_steps=step + 300, eval_every=0))
    assert [int(row["step"]) for row in rows(folder)] == list(range(100, step + 301, 100))


@pytest.mark.parametrize("at", ["stop-at", "stop-in-evaluation"])
def test_interrupt_then_resume(tmp_path, monkeypatch, capsys, at, request):
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where the tests run under nohup
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, ignored))
    train(Args(run_dir=str(tmp_path / "whole")))
    folder = tmp_path / "run"
    for kill, status, step in (
        (signal.SIGINT, 130, 300), (signal.SIGTERM, 143, 600), (signal.SIGHUP, 129, 900),
    ):  # fmt: skip
        where = ("--resume", folder) if folder.exists() else ("--run-dir", folder)
        got = command_line(monkeypatch, capsys, *where, f"--{at}", step, "--kill", int(kill))
        message = f"interrupted at step {step}; resume with: python agent.py --resume {folder}"
        assert got == (status, [message])
        assert (rows(folder)[-1]["eval_return"] == "") == (at == "stop-at")  # no time is spent on it then
    assert command_line(monkeypatch, capsys, "--resume", folder) == (0, [])
    assert rows(folder) == rows(tmp_path / "whole")


def test_ctrl_c_in_a_process_of_its_own(tmp_path):
    """A real signal at an arbitrary moment: one line at once, the checkpoint at the iteration's end."""
    argv = [sys.executable, __file__, "--total-steps", "10000000", "--run-dir", str(tmp_path / "run")]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "run" / "checkpoint.pt").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        error = process.communicate()[1]
    assert process.returncode == 130
    stopping, last = [line for line in error.splitlines() if ": evaluation" not in line][-2:]
    assert stopping == "stopping after this iteration; Ctrl-C again stops at once"
    assert re.fullmatch(
        rf"interrupted at step \d+; resume with: python {__file__} --resume {tmp_path}/run", last
    )
    step = int(last.split()[3].rstrip(";"))
    assert int(rows(tmp_path / "run")[-1]["step"]) == step


def test_second_signal_stops_at_once(tmp_path, monkeypatch, capfd):
    def stuck(args):
        Run(args, "scripted", no_evaluation)
        os.kill(os.getpid(), signal.SIGINT)
        assert "stopping after this iteration" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on after the second Ctrl-C")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys.modules[__name__], "train", stuck)
    got = command_line(monkeypatch, capfd, "--run-dir", tmp_path / "run")
    assert got == (130, ["interrupted before the first checkpoint; start again"])
    assert signal.getsignal(signal.SIGINT) == before  # one run leaves nothing behind for the next


@pytest.mark.parametrize("fault", [False, True])
def test_of_several_runs_in_a_process_the_last_is_told_of(tmp_path, monkeypatch, capfd, fault):
    """It has no checkpoint yet, and is not in its final evaluation as the one before was."""
    first = train

    def both(args):
        first(dataclasses.replace(args, run_dir=str(tmp_path / "first")))
        run = Run(args, "scripted", no_evaluation)
        if fault:
            run.report(100, {}, {}, {"policy_loss": float("nan")}, [])
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sys.modules[__name__], "train", both)
    status, lines = command_line(monkeypatch, capfd, "--run-dir", tmp_path / "second")
    if fault:
        told = "error: policy_loss became nan in the iteration that ended at step 100"
        assert (status, lines) == (1, [told, "no checkpoint had been written yet"])
    else:
        told = "stopping after this iteration; Ctrl-C again stops at once"
        assert (status, lines) == (130, [told, "interrupted before the first checkpoint; start again"])


def test_interrupted_in_the_final_evaluation(tmp_path, monkeypatch, capfd):
    folder = tmp_path / "run"
    train(Args(run_dir=str(tmp_path / "whole")))
    stop = ("--stop-in-evaluation", 1000, "--signals")
    got = command_line(monkeypatch, capfd, "--run-dir", folder, *stop, 2)
    assert got[0] == 130 and got[1] == [
        "stopping after the final evaluation; Ctrl-C again stops at once",
        f"interrupted in the final evaluation; {folder}/agent.pt is written; "
        f"evaluate again with: python agent.py --resume {folder}",
    ]
    assert load_checkpoint(folder / "agent.pt", "")["state"]["weights"].shape == (4,)
    assert command_line(monkeypatch, capfd, "--resume", folder, *stop, 1)[0] == 0  # one lets it end
    assert rows(folder) == rows(tmp_path / "whole")


def test_without_a_process_ctrl_c_is_pythons_own(tmp_path):
    was = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt) as interrupt:
            train(Args(run_dir=str(tmp_path / "run"), stop_at=400))
    finally:
        signal.signal(signal.SIGINT, was)
    assert not isinstance(interrupt.value, Interrupted)


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
    run = Run(Args(run_dir=str(tmp_path / "run")), "scripted", no_evaluation)
    run.report(300, {"weights": torch.zeros(1)}, {}, {"policy_loss": 0.0}, [])
    with pytest.raises(RunFault, match=r"state\['weights'\] has become non-finite"):
        run.report(600, {"weights": torch.full((1,), torch.nan)}, {}, {"policy_loss": 0.0}, [])
    Run(Args(resume=str(tmp_path / "run")), "scripted", no_evaluation).close()  # the folder is free
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt", "")["step"] == 300


def test_an_environment_that_raises_in_evaluations_only(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    again = f"resume with: python agent.py --resume {folder}"
    status, lines = command_line(monkeypatch, capsys, "--run-dir", folder, "--fault", "evaluation")
    assert status == 1 and lines == [
        "error: evaluation at step 300: it broke; --eval-every 0 goes on without evaluations",
        f"last good checkpoint: step 300; {again}",
    ]
    go_on = ("--resume", folder, "--eval-every", 0)
    for _ in range(2):  # the second time on a finished run
        status, lines = command_line(monkeypatch, capsys, *go_on, "--fault", "evaluation")
        assert status == 1 and lines == [
            f"error: final evaluation: it broke; the agent is trained: {folder}/agent.pt",
            f"last good checkpoint: step 1000; {again}",
        ]
        assert load_checkpoint(folder / "agent.pt", "")["state"]["weights"].shape == (4,)
    assert command_line(monkeypatch, capsys, *go_on, "--fault", "") == (0, [])
    assert rows(folder)[-1]["eval_return"] != ""


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
        exists = (folder / "checkpoint.pt").exists()
        return load_checkpoint(folder / "checkpoint.pt", "")["step"] if exists else None

    monkeypatch.setattr(module, name, full)
    status, lines = command_line(monkeypatch, capsys, "--run-dir", folder)
    assert calls and status == 1
    assert lines[0] == f"error: cannot write {folder}: No space left on device"
    assert lines[1].startswith("last good checkpoint: step 300; resume with:") and len(lines) == 2
    assert load_step(folder) == 300
    assert not list(folder.glob("*.tmp"))


def test_disk_full_behind_torchs_own_error(tmp_path):
    """torch's writer may hide the file's OSError behind a RuntimeError; a size limit provokes it."""
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
    got = command_line(monkeypatch, capsys, "--num-envs", 0)
    assert got == (2, ["error: --num-envs must be at least 1, not 0"])
    got = command_line(monkeypatch, capsys, "--resume", "nope")
    assert got == (2, ["error: --resume nope: no such folder"])
    with pytest.raises(ValueError, match="a bug"):  # a fault of the program keeps its traceback
        command_line(monkeypatch, capsys, "--fault", "bug", "--run-dir", "bug")
    again = command_line(monkeypatch, capsys, "--resume", "bug", "--fault", "")
    assert again == (0, [])  # the folder is free


# Arguments


@pytest.mark.parametrize(
    "change, message",
    [
        ({"total_steps": 0}, "--total-steps must be at least 1, not 0"),
        ({"num_envs": -2}, "--num-envs must be at least 1, not -2"),
        ({"eval_episodes": 0}, "--eval-episodes must be at least 1, not 0"),
        ({"threads": 100_000}, "--threads must be at most 1024, not 100000"),
        ({"threads": 0}, "--threads must be at least 1, not 0"),
        ({"env_threads": 0}, "--env-threads must be at least 1, not 0"),
        ({"eval_every": -1}, "--eval-every must be at least 0, not -1"),
        ({"seed": -1}, "--seed must be at least 0, not -1"),
        ({"seed": 2**31}, "--seed must be less than 2**31, not 2147483648"),
        ({"checkpoint_every": 0.0}, "--checkpoint-every must be greater than 0 seconds, not 0"),
        ({"checkpoint_every": float("nan")}, "--checkpoint-every must be greater than 0 seconds, not nan"),
        ({"num_envs": 10**20}, f"--num-envs must be less than 2**63, not {10**20}"),
        ({"device": "gpu"}, "--device must be one of auto, cpu, cuda, not gpu"),
        ({"resume": ""}, "--resume is empty; a folder is meant"),
        ({"run_dir": ""}, "--run-dir is empty; a folder is meant"),
        (
            {"run_dir": "a", "resume": "b"},
            "--run-dir a and --resume b exclude each other: a resumed run stays in its folder",
        ),
    ],
)
def test_check_args(change, message):
    check_args(Args())
    with pytest.raises(UsageError) as error:
        check_args(dataclasses.replace(Args(), **change))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (actor_critic.Args(optimizer="Adam"), "--optimizer must be one of adam, rmsprop, not Adam"),
        (ppo.Args(surrogate="clipped"), "--surrogate must be one of clip, kl, adaptive-kl, unclipped, not"),
        (reinforce.Args(baseline="Mean"), "--baseline must be one of none, mean, optimal, value, not Mean"),
        (ppo.Args(log_std=1e39), "--log-std must be less than 3.4e+38 in size, not 1e+39"),
        (ppo.Args(hidden=(64, 10**20)), "--hidden must be less than 2**63, not (64, 1"),
    ],
)
def test_what_only_the_command_line_would_see_is_seen_in_python_too(made, message):
    module = sys.modules[type(made).__module__]
    with pytest.raises(UsageError) as error:
        module.train(made)
    assert str(error.value).startswith(message)


def test_lists_and_paths_are_taken_for_tuples_and_text(tmp_path):
    made = ppo.Args(hidden=[32, 16], run_dir=tmp_path / "run")
    assert made.hidden == (32, 16) and made.run_dir == str(tmp_path / "run")
    assert dataclasses.replace(made, hidden=[8]).hidden == (8,)


def test_going_on_in_a_folder_clears_away_what_a_kill_left_and_nothing_else(tmp_path):
    train(Args(run_dir=str(tmp_path)))
    for name in ("checkpoint.pt.tmp", "progress.csv.tmp", "notes.tmp"):
        (tmp_path / name).touch()
    Run(Args(resume=str(tmp_path)), "scripted", no_evaluation).close()
    assert [path.name for path in tmp_path.glob("*.tmp")] == ["notes.tmp"]


def test_precedence_of_flag_checkpoint_table_default(tmp_path, monkeypatch):
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
    resumed = parsed("--resume", folder, "--eval-every", "8")
    assert (resumed.clip, resumed.seed, resumed.eval_every) == (0.7, 6, 8)
    assert (resumed.run_dir, resumed.resume) == (None, folder)
    with pytest.raises(UsageError, match="is of --env Countdown-v0, not Other-v0"):
        parsed("--resume", folder, "--env", "Other-v0")
    with pytest.raises(UsageError, match=r"of agent scripted, not of args; zoo/scripted\.py goes on with it"):
        parse(RunArgs, lambda env: {}, ["--resume", folder])
    monkeypatch.setattr(sys.modules[RunArgs.__module__], "__file__", "scripted.py")  # of another version
    lacks = "of agent scripted, whose arguments this one lacks: clip, fault, kill, nan_at, signals, stop"
    with pytest.raises(UsageError, match=lacks):
        parse(RunArgs, lambda env: {}, ["--resume", folder])


@pytest.mark.parametrize("text, value", [("1e5", 100_000), ("2.5e3", 2500), ("7", 7), ("1_000", 1000)])
def test_whole_numbers_may_have_exponents(text, value):
    assert parse(Args, lambda env: {}, ["--total-steps", text]).total_steps == value
    assert parse(Args, lambda env: {}, ["--env-threads", text]).env_threads == value


@pytest.mark.parametrize("text", ["1.5", "1e-3", "inf", "nan", "many"])
def test_numbers_that_are_not_whole_are_refused(text):
    with pytest.raises(UsageError) as error:
        parse(Args, lambda env: {}, ["--total-steps", text])
    assert str(error.value) == f"Error parsing --total-steps: {text!r} is no whole number"


def test_a_mistyped_flag_names_the_nearest():
    with pytest.raises(UsageError) as error:
        parse(Args, lambda env: {}, ["--clop", "1"])
    assert str(error.value) == "Unrecognized options: --clop, 1; perhaps you meant --clip"


def test_help_says_what_the_agent_is_and_groups_its_arguments(capsys):
    before = [field.name for field in dataclasses.fields(Args)]
    with pytest.raises(SystemExit) as end:
        parse(Args, lambda env: {}, ["--help"])
    about, _, text = capsys.readouterr().out.partition("task options")
    assert end.value.code == 0 and __doc__.split("\n\n")[0][:40] in about
    expected = ["--env", "--resume", "algorithm options", "--num-envs"]
    expected += ["--clip", "clip range", "plumbing options", "--device"]
    assert [text.index(each) for each in expected] == sorted(text.index(each) for each in expected)
    assert all(f"--{name.replace('_', '-')}" in text for name in before)
    assert [field.name for field in dataclasses.fields(Args)] == before


def test_track_without_wandb(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install wandb"):
        train(Args(track=True, run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_track_without_an_account(tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):  # as without a key and a terminal to ask for it
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    status, lines = command_line(monkeypatch, capsys, "--track", "--run-dir", tmp_path / "run")
    advice = "WANDB_MODE=offline keeps what is logged in the run's folder"
    assert (status, lines) == (2, [f"error: --track: No API key configured. {advice}"])


def test_track_offline(tmp_path, monkeypatch):
    """What TensorBoard gets, Weights & Biases gets once."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    found, init = [], wandb.init

    def watched_init(**given):
        run = init(**given)
        finish = run.finish

        def read_and_finish():  # afterwards it answers no more
            found.extend((run.step, run.project, run.name, run.config["clip"], dict(run.summary)))
            finish()

        monkeypatch.setattr(run, "finish", read_and_finish)
        return run

    monkeypatch.setattr(wandb, "init", watched_init)
    train(Args(track=True, track_project="mine", run_dir=str(tmp_path / "run")))
    *told, summary = found
    assert told == [10 + 4, "mine", str(tmp_path / "run")[-128:], 0.2]  # reports and evaluations
    summary = {name: value for name, value in summary.items() if not name.startswith("_")}
    last = {name: float(value) for name, value in rows(tmp_path / "run")[-1].items()}
    own = {"eval/return": last["eval_return"], "eval/std": last["eval_std"], "losses/late": last["late"]}
    assert {name: summary[name] for name in own} == pytest.approx(own)
    assert summary["global_step"] == 1000 and set(summary) - set(own) == {
        *("global_step", "charts/SPS", "charts/learning_rate", "losses/policy_loss"),
        *("charts/episodic_return", "charts/episodic_length"),
    }
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))  # for `wandb sync`


def test_folders_of_one_name_are_runs_of_their_own_at_wandb(tmp_path, monkeypatch):
    """And a resumed run is the one that it was, wherever its folder is by then."""
    (tmp_path / "wandb.py").write_text(
        "class Error(Exception): ...\nclass Run: log = finish = lambda *_: None"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.chdir(tmp_path)
    import wandb

    asked = []
    monkeypatch.setattr(wandb, "init", lambda **given: asked.append(given) or wandb.Run(), raising=False)
    for folder in ("runs/a/ppo", "runs/b/ppo"):
        train(Args(track=True, run_dir=folder))
    Path("runs/a").rename("runs/c")
    train(Args(track=True, resume="runs/c/ppo", total_steps=1100))
    assert [given["name"] for given in asked] == ["a/ppo", "b/ppo", "c/ppo"]
    first, second, resumed = (given["id"] for given in asked)
    assert first == resumed != second and re.fullmatch(r"\w{16}", first)
    monkeypatch.delitem(sys.modules, "wandb")


# Evaluation


@pytest.mark.parametrize(
    "num_envs, episodes, expected", [(3, 3, [1, 2, 3]), (3, 5, [1, 2, 3, 1, 2]), (4, 2, [1, 2])]
)
def test_each_slot_plays_one_episode_a_round(num_envs, episodes, expected):
    """The slots that end early start new episodes, which must not count."""
    envs = Countdown(num_envs)
    returns, lengths = evaluate(policy, envs, episodes, seed=1000)
    assert lengths.tolist() == expected
    assert len(envs.seeds) == -(-episodes // num_envs)
    starts = np.concatenate(envs.seeds)
    assert len(set(starts.tolist())) == len(starts)  # each round has its own
    assert returns == pytest.approx(
        [n * (1 + seed % 10 / 1000) for n, seed in zip(expected, starts, strict=False)]
    )


def test_evaluations_share_no_starts():
    envs = Countdown(4)
    for seed in range(20):
        evaluate(policy, envs, 4, seed)
    starts = np.concatenate(envs.seeds)
    assert len(set(starts.tolist())) == 80 and starts.max() < 2**31


def test_evaluation_repeats_and_uses_the_policy():
    envs = Countdown(3)
    first = evaluate(policy, envs, 3, seed=7)[0]
    assert np.array_equal(first, evaluate(policy, envs, 3, seed=7)[0])
    ones = evaluate(lambda obs: (obs[:, 0] > 1).astype(np.int64), envs, 3, seed=7)[0]
    assert ones - first == pytest.approx([0, 1, 2])


def test_endless_evaluation_episodes_are_cut_with_one_warning(monkeypatch, capsys):
    monkeypatch.setattr(zoo.common.evaluate, "MAX_EPISODE", 50)
    calls = iter(range(101))  # and no more
    returns, lengths = evaluate(lambda obs: next(calls) * policy(obs), Countdown(2, endless=True), 3, seed=1)
    assert lengths.tolist() == [50, 50, 50] and (returns >= 50).all()
    assert capsys.readouterr().err == (
        "warning: Countdown-v0: 3 of 3 evaluation episodes did not end in 50 steps and were cut there; "
        "a time limit would end them\n"
    )
    evaluate(policy, Countdown(2), 3, seed=1)
    assert capsys.readouterr().err == ""


def test_evaluation_of_a_control_agent(monkeypatch):
    made = []

    def make_envs(env_id, num_envs, threads):
        assert (env_id, num_envs, threads) == ("Countdown-v0", 4, 1)
        made.append(Countdown(num_envs))
        return made[-1]

    def make_policy(envs, args, acting):
        assert envs is made[-1] and args.clip == 0.2
        return lambda obs: np.full(len(obs), acting["action"])

    monkeypatch.setattr(zoo.common.evaluate, "make_envs", make_envs)
    score = Evaluation(Args(env_threads=1), make_policy)
    assert made == []  # not before it is due
    values = score({"action": 0})
    expected, _ = evaluate(policy, Countdown(4), 4, seed=1)
    assert values == {"eval_return": expected.mean(), "eval_std": expected.std()}
    assert score({"action": 1})["eval_return"] - values["eval_return"] == pytest.approx(2.5)
    assert [envs.closed for envs in made] == [True, True]
    with pytest.raises(KeyError):
        score({})
    assert made[-1].closed


def test_a_milestone_is_saved_and_then_evaluated(tmp_path, capsys):
    """Whatever step it is of; saved also where nothing is evaluated."""
    folder, saved = tmp_path / "run", []

    def score(acting):
        saved.append(load_checkpoint(folder / "checkpoint.pt", "")["state"])
        return no_evaluation(acting)

    run = Run(Args(run_dir=str(folder)), "scripted", score)
    run.report(0, {"w": 1.0}, {}, {}, [])
    assert not (folder / "checkpoint.pt").exists()
    run.report(0, {"w": 2.0}, {}, {}, [], milestone=True)
    run.close()
    assert saved == [{"w": 2.0}] and [row["eval_return"] for row in rows(folder)] == ["", "0"]
    assert "0 steps: evaluation 0.00" in capsys.readouterr().err
    run = Run(Args(run_dir=str(tmp_path / "none"), eval_every=0), "scripted", score)
    run.report(0, {"w": 3.0}, {}, {}, [], milestone=True)
    run.close()
    assert load_checkpoint(tmp_path / "none" / "checkpoint.pt", "")["state"] == {"w": 3.0} and len(saved) == 1


def test_report_is_cheap_when_nothing_is_due(tmp_path):
    run = Run(Args(run_dir=str(tmp_path / "run"), eval_every=0), "scripted", no_evaluation)
    metrics = {f"m{i}": torch.tensor(1.0) for i in range(10)}
    costs = []
    for _ in range(200):
        start = time.perf_counter()
        run.report(run.step + 1, {"weights": metrics["m0"]}, {}, metrics, [(1.0, 2)])
        costs.append(time.perf_counter() - start)
    run.close()
    assert np.median(costs) < 1e-3
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_checkpoints_are_made_when_due(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    args = Args(run_dir=str(tmp_path / "run"), eval_every=0, checkpoint_every=3.0)
    run, saved = Run(args, "scripted", no_evaluation), []
    for step in range(1, 10):
        clock[0] += 1.0
        run.report(step, {}, {}, {}, [])
        path = run.folder / "checkpoint.pt"
        saved.append(load_checkpoint(path, "")["step"] if path.exists() else 0)
    run.close()
    assert saved == [0, 0, 3, 3, 3, 6, 6, 6, 9]


@pytest.mark.parametrize(
    ("metric", "reason"),
    [
        ({"step": 0.5}, "metric 'step': progress.csv has a column of that name already"),
        ({"std": torch.ones(2)}, "metric 'std' is a Tensor of shape (2,), no single number"),
    ],
)
def test_a_metric_that_has_no_place_in_the_table_is_refused(tmp_path, metric, reason):
    run = Run(Args(run_dir=str(tmp_path / "run")), "scripted", no_evaluation)
    with pytest.raises(UsageError, match=re.escape(reason)):
        run.report(100, {}, {}, metric, [])
    assert len((tmp_path / "run" / "progress.csv").read_text().splitlines()) == 1


def test_the_name_of_another_files_agent_is_refused(tmp_path, monkeypatch):
    """An edited copy that kept its name would be played by the original's network, without a word."""
    copy = tmp_path / "my_ppo.py"
    copy.write_text(Path(ppo.__file__).read_text().replace("nn.Tanh()", "nn.ReLU()"))
    spec = importlib.util.spec_from_file_location("my_ppo", copy)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "my_ppo", module)
    spec.loader.exec_module(module)
    sizes = dict(num_envs=4, num_steps=16, num_epochs=1, total_steps=64, eval_episodes=1, compile=False)
    args = module.Args(env="CartPole-v1", run_dir=str(tmp_path / "run"), progress=False, **sizes)
    with pytest.raises(UsageError, match=r'my_ppo.py: Run\(args, "ppo", .* own: Run\(args, "my_ppo", ...\)$'):
        module.train(args)
    assert not (tmp_path / "run").exists()


def test_an_argument_that_a_checkpoint_cannot_give_back_is_refused():
    @dataclass
    class Warmup:
        steps: int = 3

    args = Args()
    args.signals = Warmup()
    with pytest.raises(UsageError, match=r"^--signals is a Warmup; only numbers, words"):
        check_args(args)


if __name__ == "__main__":  # an agent's file, for the tests that need a process
    main(Args, train, lambda env: {})


def test_the_training_return_is_of_the_last_hundred_episodes(tmp_path):
    run = Run(Args(run_dir=str(tmp_path / "run"), eval_every=0), "scripted", no_evaluation)
    run.report(100, {}, {}, {}, [(1000.0, 1000)] * 5 + [(float(i), i) for i in range(60)])
    run.report(200, {}, {}, {}, [(float(i), i) for i in range(60, 100)])
    run.close()
    assert [row["train_return"] for row in rows(tmp_path / "run")] == ["104.1538462", "49.5"]


def test_tensorboards_return_is_the_mean_of_an_iterations_episodes(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run(Args(run_dir=str(tmp_path / "run"), eval_every=0), "scripted", no_evaluation)
    run.report(100, {}, {}, {}, [(1.0, 10), (4.0, 20)])
    run.close()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    told = [events.Scalars(f"charts/episodic_{name}")[0].value for name in ("return", "length")]
    assert told == [2.5, 15.0]


def test_speed_is_all_steps_by_all_seconds_also_of_a_resumed_run(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    for where, steps in ((dict(run_dir=str(tmp_path)), (100, 200)), (dict(resume=str(tmp_path)), (300, 400))):
        run = Run(Args(eval_every=0, checkpoint_every=1e-9, **where), "scripted", no_evaluation)
        run.restore({})
        for step in steps:
            clock[0] += 2.0 if step == 100 else 1.0
            run.report(step, {}, {}, {}, [])
        run.close()
        clock[0] += 1000.0
    told = [(row["wall_time"], row["sps"]) for row in rows(tmp_path, clocks=True)]
    assert told == [("2", "50"), ("3", "66.7"), ("4", "75"), ("5", "80")]
