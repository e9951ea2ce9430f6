"""scripts/: the benchmark's bookkeeping on a stub agent that trains nothing, evaluate.py and watch.py on a
tiny real one."""

import csv
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import benchmark
import evaluate
import export
import gymnasium as gym
import imageio.v3 as imageio
import own_tasks_ppo
import plot
import pytest
import report
import speed
import torch
import watch

import zoo.common.device
from zoo import actor_critic, grpo, ppo, reinforce, sac, trpo
from zoo.common.args import RunArgs
from zoo.common.cli import script_args
from zoo.common.errors import RunFault, UsageError
from zoo.common.files import load_checkpoint, save_checkpoint

SCRIPTS = Path(benchmark.__file__).parent

# What a run leaves behind, without torch. Its evaluation is 10 x seed^2 + rate, checkpoints come every 300
# steps, its agent.pt was made before.
STUB = """
import argparse, dataclasses, fcntl, json, os, shutil, signal, sys, time
from dataclasses import dataclass
from pathlib import Path

from zoo.common.args import RunArgs

@dataclass
class Args(RunArgs):
    env: str = "CartPole-v1"
    total_steps: int = 900
    eval_episodes: int = 3
    rate: float = 0.5
    hidden: tuple[int, ...] = (4, 4)

SETTINGS = {"Acrobot-v1": dict(total_steps=600)}

def check(args):
    if args.rate < 0:
        from zoo.common.errors import UsageError
        raise UsageError("--rate is negative")

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for field in dataclasses.fields(Args):
        kind = {"rate": float, "env": str, "run_dir": str, "resume": str}.get(field.name, int)
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, dest=field.name)
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    given = {k: v for k, v in vars(parser.parse_args()).items() if v is not None}
    args = Args(**{**SETTINGS.get(given.get("env"), {}), **given})
    folder = Path(args.run_dir or args.resume)
    with open(Path(__file__).with_name("calls.txt"), "a") as calls:
        calls.write(f"{args.env} {args.seed} {'resume' if args.resume else 'fresh'}\\n")
    if args.run_dir:
        folder.mkdir(parents=True, exist_ok=True)
        assert not any(folder.iterdir()), "folder not empty"
    lock = open(folder / ".lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    checkpoint, table = folder / "checkpoint.pt", folder / "progress.csv"
    start = int(checkpoint.read_text()) if args.resume else 0
    if start == 0:
        table.write_text("step,wall_time,sps,train_return,train_length,eval_return,eval_std,loss\\n")
    made = dict(agent="stub", args=dataclasses.asdict(args), resumed_at_step=start or None, engine="none",
                versions={"python": "3"}, commit=os.environ.get("STUB_COMMIT", "abc"), machine={"cores": 2})
    (folder / "args.json").write_text(json.dumps(made))

    stopping = []

    def interrupted(*_):
        if stopping:  # as in the zoo, a second signal ends the run without a checkpoint
            print("interrupted twice", flush=True)
            os._exit(130)
        stopping.append(True)
        time.sleep(0.3)
        checkpoint.write_text("300")
        print("interrupted at step 300")
        sys.exit(130)

    signal.signal(signal.SIGINT, interrupted)
    for step in range(start + 1, args.total_steps + 1):
        evaluation = f"{step},2" if step % 450 == 0 else ","
        if step == args.total_steps:
            evaluation = f"{10 * args.seed**2 + args.rate},1.25"
        with open(table, "a") as file:
            file.write(f"{step},{step / 300:.10g},{300 + args.seed},12.3456789,9,{evaluation},0.123456789\\n")
        if step % 300 == 0:
            checkpoint.write_text(str(step))
            if os.environ.get("STUB_FAIL") == str(args.seed):
                print("something\\nerror: the loss became nan\\n")
                sys.exit(1)
            while os.environ.get("STUB_HANG"):
                time.sleep(0.02)
    shutil.copy(Path(__file__).with_name(f"agent_{args.seed}.pt"), folder / "agent.pt")
"""


@pytest.fixture
def bench(tmp_path):
    """Calls benchmark.main on the stub; .calls() are the runs really started."""
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "stub.py").write_text(STUB)
    for seed in range(1, 6):
        args = dataclasses.asdict(RunArgs(env="CartPole-v1", seed=seed, total_steps=900, eval_episodes=3))
        args |= dict(rate=0.5, hidden=(4, 4), env_threads=1, progress=False, run_dir=str(tmp_path))
        content = {"agent": "stub", "env": "CartPole-v1", "args": args, "state": {"seed": seed}}
        save_checkpoint(tmp_path / "agents" / f"agent_{seed}.pt", content)
    benchmark.load_agent.cache_clear()

    class Bench:
        results, runs = (
            tmp_path / "results" / "stub" / "CartPole-v1",
            tmp_path / "runs" / "stub" / "CartPole-v1",
        )

        def argv(self, *more, seeds="1-3"):
            folders = {"--agents": "agents", "--results": "results", "--runs": "runs"}
            where = [part for flag, name in folders.items() for part in (flag, str(tmp_path / name))]
            return ["--agent", "stub", "--env", "CartPole-v1", "--seeds", seeds, *where, *more]

        def __call__(self, *more, seeds="1-3"):
            return benchmark.main(self.argv(*more, seeds=seeds))

        def calls(self):
            log = tmp_path / "agents" / "calls.txt"
            return sorted(log.read_text().splitlines()) if log.exists() else []

        def meta(self):
            return json.loads((self.results / "meta.json").read_text())

        def curve(self, seed):
            with open(self.results / f"seed_{seed}.csv", newline="") as file:
                return list(csv.DictReader(file))

    return Bench()


is_in_history = benchmark.is_in_history


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(benchmark, "POLL", 0.01)
    known = {"abc", "def"}  # the stub's commits
    monkeypatch.setattr(benchmark, "is_in_history", lambda commit, repository: commit in known)


def test_results_hold_statistics_curves_and_provenance(bench, capsys):
    assert bench("--args", "--rate 0.25") == 0
    means = [10.25, 40.25, 90.25]
    meta = bench.meta()
    assert meta["mean"] == pytest.approx(sum(means) / 3)
    assert meta["std"] == pytest.approx((sum((m - sum(means) / 3) ** 2 for m in means) / 2) ** 0.5)
    assert [(s, e["mean"], e["std"], e["episodes"]) for s, e in meta["seeds"].items()] == [
        ("1", 10.25, 1.25, 3), ("2", 40.25, 1.25, 3), ("3", 90.25, 1.25, 3),
    ]  # fmt: skip
    assert meta["args"]["rate"] == 0.25 and meta["args"]["threads"] == 1 and meta["commit"] == "abc"
    assert not {"run_dir", "resume", "seed"} & meta["args"].keys()
    command = "python agents/stub.py --env CartPole-v1 --seed 2 --threads 1 --env-threads 1 --rate 0.25"
    assert meta["seeds"]["2"]["command"] == command
    assert str(bench.results.parents[2]) not in (bench.results / "meta.json").read_text()
    rows = bench.curve(2)
    assert len(rows) == 200 and rows[-1]["step"] == "900" and rows[-1]["eval_return"] == "40.25"
    assert [row["step"] for row in rows if row["eval_return"]] == ["450", "900"]
    assert rows[5]["train_return"] == "12.3457" and rows[5]["loss"] == "0.123457"
    out = capsys.readouterr().out
    # the median of 301, 302, 303 steps/s
    assert "46.9 ± 40.4 [10.2 .. 90.2]" in out and out.rstrip().endswith(" 302")
    assert "stub CartPole-v1 seed 3: 90.25 ± 1.25 over 3 episodes" in out


def test_finished_runs_are_skipped_and_new_seeds_join(bench, capsys):
    assert bench(seeds="1,2") == 0
    assert bench() == 0
    assert bench.calls() == ["CartPole-v1 1 fresh", "CartPole-v1 2 fresh", "CartPole-v1 3 fresh"]
    assert list(bench.meta()["seeds"]) == ["1", "2", "3"]
    capsys.readouterr()
    (
        bench.results / "seed_2.csv"
    ).unlink()  # without its curve a seed is not recorded, but its run is still there
    assert bench() == 0
    assert "3 of 3 runs are finished" in capsys.readouterr().out and bench.curve(2)
    shutil.rmtree(bench.runs)
    (bench.results / "seed_2.csv").unlink()
    assert bench() == 0
    assert bench.calls() == sorted([f"CartPole-v1 {s} fresh" for s in (1, 2, 3, 2)])


def test_bookkeeping_arguments_do_not_make_a_run_different(bench):
    assert bench(seeds="1") == 0
    assert bench("--args", "--threads 7", seeds="1-2") == 0
    assert bench.calls() == ["CartPole-v1 1 fresh", "CartPole-v1 2 fresh"]
    meta = bench.meta()  # shown for each seed, not hidden
    assert "args" not in meta and [meta["seeds"][s]["args"]["threads"] for s in "12"] == [1, 7]
    assert meta["commit"] == "abc" and "commit" not in meta["seeds"]["1"]


def test_killed_runs_resume_finished_ones_are_collected_stale_ones_start_afresh(bench, monkeypatch):
    assert bench(seeds="1-4") == 0
    whole = [bench.curve(seed) for seed in range(1, 5)]
    shutil.rmtree(bench.results)
    (bench.results.parents[2] / "agents" / "calls.txt").unlink()
    # Seed 1 had finished; 2 was killed after a checkpoint, 3 before its first; of 4 there is an empty folder.
    for seed in (2, 3, 4):
        folder = bench.runs / f"seed_{seed}"
        (folder / "agent.pt").unlink()
        rows = (folder / "progress.csv").read_text().splitlines(keepends=True)
        (folder / "progress.csv").write_text("".join(rows[:601]))
        (folder / "checkpoint.pt").write_text("600")
    (bench.runs / "seed_3" / "checkpoint.pt").unlink()
    shutil.rmtree(bench.runs / "seed_4")
    (bench.runs / "seed_4").mkdir()
    assert bench(seeds="1-4") == 0
    assert bench.calls() == ["CartPole-v1 2 resume", "CartPole-v1 3 fresh", "CartPole-v1 4 fresh"]
    assert [bench.curve(seed) for seed in range(1, 5)] == whole
    assert [bench.meta()["seeds"][s]["resumed_at_step"] for s in "1234"] == [None, 600, None, None]


def test_a_longer_run_that_was_killed_at_an_evaluation_is_not_taken_for_a_finished_one(bench, tmp_path):
    """Its agent.pt is the shorter run's, whose last row has an evaluation, too."""
    assert bench(seeds="1") == 0
    made = bench.runs / "seed_1" / "args.json"
    made.write_text(made.read_text().replace('"total_steps": 900', '"total_steps": 1350'))
    longer = ("--total-steps", "1350", "--results", str(tmp_path / "longer"))
    job = benchmark.plan(script_args(benchmark.Args, None, bench.argv(*longer, seeds="1")))[0]
    assert not benchmark.is_finished(job)
    with pytest.raises(RunFault, match=r"not the folder of a finished run .*stopped at step 900 of 1350"):
        benchmark.record(job, 1)
    assert bench(*longer, seeds="1") == 0
    assert bench.calls() == ["CartPole-v1 1 fresh", "CartPole-v1 1 resume"]
    meta = json.loads((tmp_path / "longer" / "stub" / "CartPole-v1" / "meta.json").read_text())
    assert meta["seeds"]["1"]["steps"] == 1350


def test_benchmarks_of_one_result_folder_lose_no_seed(bench, monkeypatch):
    assert bench(seeds="1,2") == 0
    shutil.rmtree(bench.results)
    jobs = benchmark.plan(script_args(benchmark.Args, None, bench.argv(seeds="1,2")))
    other = threading.Thread(target=benchmark.record, args=(jobs[1], 1))
    write = benchmark.write_meta

    def interleaved(*given):
        if not other.ident:  # what this one has read is old, if the other may write now
            other.start()
            other.join(timeout=0.5)
        write(*given)

    monkeypatch.setattr(benchmark, "write_meta", interleaved)
    benchmark.record(jobs[0], 1)
    other.join()
    assert list(bench.meta()["seeds"]) == ["1", "2"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_lets_runs_checkpoint_and_says_how_to_go_on(bench, number):
    command = [sys.executable, str(SCRIPTS / "benchmark.py"), *bench.argv("--jobs", "2")]
    environment = {**os.environ, "STUB_HANG": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
    )
    started = [bench.runs / f"seed_{seed}" / "checkpoint.pt" for seed in (1, 2)]
    deadline = time.monotonic() + 30
    while not all(path.exists() for path in started) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)  # as a terminal does for Ctrl-C: to the whole foreground group
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert "to go on: python scripts/benchmark.py --agent stub" in stderr and "FAILED" not in stderr
    # it had the time to end by itself
    assert (bench.runs / "seed_1.log").read_text() == "interrupted at step 300\n"
    assert bench() == 0
    assert bench.calls() == [
        f"CartPole-v1 {what}" for what in ("1 fresh", "1 resume", "2 fresh", "2 resume", "3 fresh")
    ]


def test_a_failed_run_is_reported_and_the_others_go_on(bench, monkeypatch, capsys):
    monkeypatch.setenv("STUB_FAIL", "2")
    assert bench("--jobs", "1") == 1
    captured = capsys.readouterr()
    # at once, and at the end
    assert captured.err.count("stub CartPole-v1 seed 2: exit status 1: error: the loss became nan") == 2
    assert list(bench.meta()["seeds"]) == ["1", "3"] and not (bench.results / "seed_2.csv").exists()
    monkeypatch.delenv("STUB_FAIL")
    assert bench() == 0 and list(bench.meta()["seeds"]) == ["1", "2", "3"]


def test_a_run_left_over_by_a_killed_benchmark_is_not_touched(bench, capsys):
    folder = bench.runs / "seed_1"
    folder.mkdir(parents=True)
    holder = benchmark.lock_folder(folder, "")
    (folder / "precious").touch()
    assert bench(seeds="1-2") == 1
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err and (folder / "precious").exists()
    holder.close()
    assert bench(seeds="1-2") == 0


def test_other_arguments_are_refused_unless_forced(bench, capsys):
    assert bench() == 0
    before = bench.meta()
    shutil.rmtree(bench.runs)
    assert bench("--args", "--rate 2", seeds="2,4") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "rate 0.5 there, 2.0 here" in error and "--force" in error
    assert bench.meta() == before
    assert bench("--args", "--rate 2", "--force", seeds="2,4") == 0
    assert [(s, e["mean"]) for s, e in bench.meta()["seeds"].items()] == [("2", 42.0), ("4", 162.0)]
    names = sorted(path.name for path in bench.results.iterdir())
    assert names == ["agent.pt", "meta.json", "seed_2.csv", "seed_4.csv"]
    assert bench("--total-steps", "800", "--results", str(bench.results.parents[1] / "new"), seeds="2") == 2
    # the run's own folder stands in the way, too
    assert "total_steps 900 there, 800 here" in capsys.readouterr().err


def test_results_older_than_an_argument_count_as_made_with_its_default(bench, capsys):
    assert bench(seeds="1") == 0
    calls, meta = bench.calls(), bench.meta()
    del meta["args"]["rate"]
    (bench.results / "meta.json").write_text(json.dumps(meta))
    assert bench(seeds="1") == 0 and bench.calls() == calls
    assert bench("--args", "--rate 2", seeds="1") == 2
    assert "rate 0.5 there, 2.0 here" in capsys.readouterr().err


def test_commits_that_differ_are_shown_for_each_seed(bench, monkeypatch, capsys):
    assert bench(seeds="1") == 0
    monkeypatch.setenv("STUB_COMMIT", "def")
    assert bench(seeds="2") == 0
    meta = bench.meta()
    assert "commit" not in meta and [meta["seeds"][s]["commit"] for s in "12"] == ["abc", "def"]
    assert "2*" in capsys.readouterr().out


def test_the_median_seeds_agent_is_kept(bench, capsys):
    """Evaluations grow with the seed, so seeds alone say which is the median."""

    def kept():
        path = bench.results / "agent.pt"
        return load_checkpoint(path, "")["state"]["seed"] if path.exists() else None

    for seeds, median in (("5", 5), ("2,5", 2), ("2,3,5", 3), ("1-3,5", 2)):
        assert bench(seeds=seeds) == 0
        assert kept() == bench.meta()["agent_seed"] == median
    args = load_checkpoint(bench.results / "agent.pt", "")["args"]
    assert args["run_dir"] is None and args["seed"] == 2  # no path of this machine
    assert str(bench.results.parents[2]).encode() not in (bench.results / "agent.pt").read_bytes()
    (bench.results / "agent.pt").unlink()  # results recorded before agents were kept
    assert bench(seeds="1") == 0 and kept() == bench.meta()["agent_seed"] == 2
    shutil.rmtree(bench.runs)
    assert bench(seeds="1") == 0 and kept() == bench.meta()["agent_seed"] == 2  # it stays
    assert "note:" not in capsys.readouterr().err
    assert bench(seeds="1-5") == 0 and bench.calls()[-2:] == ["CartPole-v1 4 fresh", "CartPole-v1 5 fresh"]
    assert kept() is bench.meta()["agent_seed"] is None  # 3 is not at hand, and 2 no longer the median
    assert "no agent.pt: the run of its median seed, 3, is not in" in capsys.readouterr().err


def test_another_runs_agent_is_not_taken_for_the_median_seeds(bench, monkeypatch):
    assert bench(seeds="1-3") == 0
    (bench.results / "agent.pt").unlink()
    progress = bench.runs / "seed_2" / "progress.csv"
    progress.write_text(progress.read_text().replace(",40.5,", ",40.25,"))  # made again since, by other code
    assert bench(seeds="1-3") == 0
    assert bench.meta()["agent_seed"] is None and not (bench.results / "agent.pt").exists()


def test_a_cores_next_run_starts_before_anything_else_is_done(tmp_path, monkeypatch):
    """Else it would wait for results to be written and for the next look at the processes."""
    happened = []

    class Process:
        returncode = 0

        def __init__(self, job):
            self.looks = job.seed  # at which it has ended: the first at its first, and so on

        def poll(self):
            self.looks -= 1
            return None if self.looks > 0 else 0

    def start(job):
        happened.append(f"start {job.seed}")
        return Process(job)

    def record(job, side_by_side):
        happened.append(f"record {job.seed}")
        return dict(mean=1.0, std=1.0, episodes=1, steps=1, sps=1.0)

    monkeypatch.setattr(benchmark, "start", start)
    monkeypatch.setattr(benchmark, "record", record)
    monkeypatch.setattr(benchmark.time, "sleep", lambda seconds: happened.append("wait"))
    made_of = ("stub", "CartPole-v1"), (tmp_path, [], {"total_steps": 1}, {}, tmp_path / "run", tmp_path)
    jobs = [benchmark.Job(*made_of[0], seed, *made_of[1]) for seed in (1, 3, 2, 4)]
    assert benchmark.run_all(jobs, 2) == ([], 0)
    first, second, third = happened[:3], happened[3:6], happened[6:9]
    assert first == ["start 1", "start 3", "wait"]
    assert second == ["start 2", "record 1", "wait"]
    assert third == ["start 4", "record 3", "record 2"]


def test_results_of_changed_code_or_of_no_commit_of_the_history_are_marked(bench, monkeypatch, capsys):
    results, note = str(bench.results.parents[1]), "† by changed code, or a commit not in the history"
    for seeds, commit, marked in (("1", "abc", "1"), ("2", "abc-dirty", "2*†"), ("3", "fed", "3*†")):
        monkeypatch.setenv("STUB_COMMIT", commit)
        assert bench(seeds=seeds) == 0
        capsys.readouterr()
        assert benchmark.main(["--report", "--results", results]) == 0
        out = capsys.readouterr().out
        assert out.splitlines()[1].split()[3] == marked and (note in out) == ("†" in marked)


def test_what_is_in_the_history(tmp_path):
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]

    def git(*command):
        whole = ["git", "-C", str(tmp_path), *who, *command]
        return subprocess.run(whole, capture_output=True, text=True, check=True).stdout.strip()

    def commit(message):
        git("commit", "--allow-empty", "-m", message, "--no-gpg-sign")
        return git("rev-parse", "HEAD")

    assert is_in_history("0" * 40, tmp_path / "nowhere")  # nothing there to ask
    git("init", "-q", "-b", "main")
    first, second = commit("first"), commit("second")
    git("checkout", "-q", "-b", "other", first)
    aside = commit("aside")
    git("checkout", "-q", "main")
    found = {each: is_in_history(each, tmp_path) for each in (first, second, aside)}
    assert found == {first: True, second: True, aside: False}
    for bad in (first + "-dirty", "0" * 40, None, ""):
        assert not is_in_history(bad, tmp_path)
    assert not is_in_history(first + "-dirty", tmp_path / "nowhere")


def test_report_prints_the_table_and_runs_nothing(bench, capsys):
    assert bench(seeds="1") == 0
    assert benchmark.main([*bench.argv(seeds="1")[2:], "--agent", "stub", "--env", "Acrobot-v1"]) == 0
    calls, results = bench.calls(), str(bench.results.parents[1])
    capsys.readouterr()
    assert benchmark.main(["--report", "--results", results]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:5] for line in lines[1:]] == [
        ["stub", "Acrobot-v1", "600", "1", "10.5"],  # the agent's own settings decide the steps
        ["stub", "CartPole-v1", "900", "1", "10.5"],
    ]
    assert "10.5 ± - [10.5 .. 10.5]" in lines[1]
    assert benchmark.main(["--report", "--results", results, "--env", "Acrobot-v1"]) == 0
    assert "CartPole" not in capsys.readouterr().out and bench.calls() == calls
    (bench.results / "meta.json").write_text('{"seeds": {"1": {"mean": 3}}}')
    assert benchmark.main(["--report", "--results", results]) == 2
    assert "no meta.json of this script" in capsys.readouterr().err


def test_thinning_keeps_evaluations_the_first_and_the_last():
    rows = [{"step": str(i), "eval_return": "1" if i % 37 == 5 else ""} for i in range(1000)]
    thinned = benchmark.thin(rows)
    steps = [int(row["step"]) for row in thinned]
    assert len(steps) == 200 and steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == 999
    assert {i for i in range(1000) if i % 37 == 5} <= set(steps)
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 8  # evenly spread
    assert benchmark.thin(rows[:150]) == rows[:150]
    evaluated = [{"step": str(i), "eval_return": "1"} for i in range(300)]
    assert benchmark.thin(evaluated) == evaluated
    assert benchmark.thin([*evaluated, rows[0]])[-1] == rows[0]
    assert benchmark.rounded("step", "12345678") == "12345678"
    assert [benchmark.rounded("loss", cell) for cell in ("12345678", "")] == ["1.23457e+07", ""]


@pytest.mark.parametrize("agent", ["dpo", "rlhf", "grpo_tokens", "ddpo", "diffusion_dpo"])
def test_what_acts_in_no_environment_is_refused(agent, capsys):
    assert benchmark.main(["--agent", agent, "--env", "CartPole-v1"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: --agent {agent}: acts in no environment") and told.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seeds", "3-1"], "--seeds 3-1"),
        (["--seeds", "one"], "--seeds one"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--suite", "nope"], "leave --agent and --env out"),
        (["--env", "CartPoole-v1"], "CartPole-v1"),
        (["--agent", "stubb"], "there are stub"),
        (["--args", "--rate -1"], "--rate is negative"),
        (["--args", "--seed 9"], "given by this script"),
        (["--args", "--seed=1"], "given by this script"),  # the first seed's
        (["--args", "--run_dir x"], "given by this script"),
        (["--args", "'"], "No closing quotation"),
        (["--args", "--device cuda"], "torch sees no CUDA device"),
        (["--seeds", "1,3000000000"], "a seed must be less than 2**31"),
        (["--ray", ""], "--ray is empty"),
        (["--results", __file__], f"--results {__file__}/stub/CartPole-v1: is no folder"),
        (["--runs", __file__], f"--runs {__file__}/stub/CartPole-v1: is no folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(bench, capsys, monkeypatch, more, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench(*more) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1 and not bench.calls()


@pytest.mark.parametrize(
    ("agent", "env"), [("ppo", "probe/MultiDiscreteAction-v0"), ("sac", "CartPole-v1")], ids=["ppo", "sac"]
)
def test_spaces_that_an_agent_does_not_act_in_are_refused_before_any_run(agent, env):
    with pytest.raises(UsageError, match=r"actions are (MultiDiscrete|discrete)"):
        benchmark.plan(benchmark.Args(agent=(agent,), env=(env,)))


def test_what_is_given_twice_is_run_once(bench):
    assert bench("--env", "CartPole-v1", "CartPole-v1", "--agent", "stub", "stub", seeds="1") == 0
    assert bench.calls() == ["CartPole-v1 1 fresh"]
    assert benchmark.entries(benchmark.Args(suite=("sac", "sac"))) == benchmark.SUITES["sac"]


def test_whole_numbers_are_taken_as_the_agents_take_them(bench):
    assert bench("--total-steps", "6e2", "--jobs", "1e0", seeds="1") == 0
    assert bench.meta()["seeds"]["1"]["steps"] == 600


def test_a_suite_is_run_with_the_seeds_given():
    assert {tuple(entry.seeds) for entry in benchmark.entries(benchmark.Args(suite=("ppo",), seeds="7"))} == {
        (7,)
    }


@pytest.mark.parametrize("suite", benchmark.SUITES)
def test_suites_are_accepted_by_their_agents(suite):
    if suite == "box2d":
        pytest.importorskip("Box2D", reason="pip install -e '.[box2d]'")
    jobs = benchmark.plan(benchmark.Args(suite=(suite,)))
    declared = sum(len(entry.seeds) for entry in benchmark.SUITES[suite])
    assert len(jobs) == len({str(job) for job in jobs}) == declared


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a tiny PPO run."""
    folder = tmp_path_factory.mktemp("tiny") / "seed_3"
    ppo.train(
        ppo.Args(
            env="CartPole-v1", seed=3, num_envs=4, num_steps=32, num_epochs=1, total_steps=256,
            compile=False, env_threads=1, eval_episodes=4, progress=False, run_dir=str(folder),
        )
    )  # fmt: skip
    return folder


def call(module, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
    return module.main()


@pytest.mark.parametrize(
    ("module", "where", "argv"),
    [
        (benchmark, "plan", ["--agent", "ppo", "--env", "CartPole-v1"]),
        (evaluate, "zoo.load", ["x"]),
        (export, "zoo.load", ["x"]),
        (plot, "label", ["x"]),
        (report, "needs", []),
        (own_tasks_ppo, "measure", ["--results", "x.csv"]),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_ctrl_c_is_no_traceback_but_status_130(tmp_path, monkeypatch, capsys, module, where, argv):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"{module.__name__}.{where}", interrupted)
    try:
        status = call(module, monkeypatch, *argv)
    except KeyboardInterrupt:  # which would end the tests
        status = None
    assert status == 130
    assert capsys.readouterr().err.count("\n") <= 1


@pytest.mark.parametrize(
    ("agent", "changes"),
    [
        (ppo, dict(num_steps=32, num_epochs=1, total_steps=256)),
        (trpo, dict(num_steps=32, total_steps=256, minibatch_size=64)),
        (actor_critic, dict(num_steps=4, total_steps=256)),
        (reinforce, dict(total_steps=800)),
        (grpo, dict(total_steps=800, group_size=2)),
        (sac, dict(total_steps=200, random_steps=100, batch_size=8, hidden=(8, 8))),
    ],
    ids=["ppo", "trpo", "actor_critic", "reinforce", "grpo", "sac"],
)
def test_evaluate_repeats_the_final_evaluation_of_the_run(tmp_path, monkeypatch, capsys, agent, changes):
    """So agent.pt, as make_policy reads it, acts like the policy that train evaluated."""
    folder = tmp_path / "run"
    common = dict(seed=3, num_envs=4, compile=False, eval_episodes=4, progress=False, run_dir=str(folder))
    agent.train(agent.Args(env="Pendulum-v1", **common, **changes))
    capsys.readouterr()
    with open(folder / "progress.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    expected = (
        f"evaluation: {float(last['eval_return']):.2f} ± {float(last['eval_std']):.2f} over 4 episodes\n"
    )
    for path in (folder, folder / "agent.pt"):
        assert call(evaluate, monkeypatch, path, "--episodes", 4, "--seed", 3) == 0
        assert capsys.readouterr().out.startswith(expected + "min ")


@pytest.fixture
def kept(tiny, tmp_path):
    """The results of the tiny run."""
    args = json.loads((tiny / "args.json").read_text())["args"]
    results = tmp_path / "results" / "ppo" / "CartPole-v1"
    benchmark.record(
        benchmark.Job("ppo", "CartPole-v1", 3, Path(ppo.__file__), [], args, {}, tiny, results), 1
    )
    return results


def test_results_are_evaluated_and_watched_as_the_run_is(tiny, kept, tmp_path, monkeypatch, capsys):
    pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    said = []
    for folder in (tiny, kept):
        assert call(evaluate, monkeypatch, folder, "--episodes", 4, "--seed", 3) == 0
        assert call(watch, monkeypatch, folder, "--video", tmp_path / "a.gif") == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "evaluation: " in said[0] and "mean return" in said[0]
    (kept / "agent.pt").unlink()
    for script, *more in ((evaluate,), (watch, "--video", tmp_path / "b.gif")):
        assert call(script, monkeypatch, kept, *more) == 2
        error = capsys.readouterr().err
        assert "these results hold no agent.pt" in error and error.count("\n") == 1


def test_evaluate_on_another_task(tiny, monkeypatch, capsys):
    assert call(evaluate, monkeypatch, tiny, "--episodes", 11, "--env", "CartPole-v0") == 0
    assert "over 11 episodes" in capsys.readouterr().out
    assert call(evaluate, monkeypatch, tiny, "--episodes", "1e1") == 0
    assert "over 10 episodes" in capsys.readouterr().out


def test_evaluate_refuses_in_one_line(tiny, tmp_path, monkeypatch, capsys):
    content = torch.load(tiny / "agent.pt", weights_only=True)
    torch.save(content | {"agent": "common"}, tmp_path / "package.pt")
    torch.save(content | {"agent": "os"}, tmp_path / "foreign.pt")
    torch.save({**content, "state": {}}, tmp_path / "empty.pt")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "checkpoint.pt").touch()
    cases = [
        ([tmp_path / "nope"], "no such file or folder"),
        ([""], "run is empty"),
        ([tiny / "args.json"], "is not a checkpoint of the zoo"),
        ([tmp_path / "unfinished"], "not finished"),
        ([tmp_path / "package.pt"], "no make_policy"),
        ([tmp_path / "foreign.pt"], "is of agent os"),
        ([tmp_path / "empty.pt"], "lacks 'params'"),
        ([tiny, "--env", "Acrobot-v1"], "not those of CartPole-v1"),
        ([tiny, "--episodes", 0], "--episodes must be at least 1"),
    ]
    for argv, message in cases:
        assert call(evaluate, monkeypatch, *argv) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and error.startswith("error: ")


def test_watch_writes_a_video(tiny, tmp_path, monkeypatch, capsys):
    pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    video = tmp_path / "a.gif"
    assert call(watch, monkeypatch, tiny, "--video", video) == 0
    told = float(capsys.readouterr().out.split()[2])
    # CartPole: a reward of 1 a step; GIFs merge equal frames
    assert told / 2 < len(imageio.imread(video)) <= told
    assert call(watch, monkeypatch, tiny, "--video", tmp_path / "a.avi") == 2
    assert "end the name in .mp4 or .gif" in capsys.readouterr().err


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_speed_steps_both_engines(env, monkeypatch, capsys):
    assert call(speed, monkeypatch, "--engine", "--pairs", 1, "--env", env) == 0
    out = capsys.readouterr().out
    assert "8 environments: " in out and "64 environments: " in out and "SyncVectorEnv" in out


@pytest.mark.parametrize("whose", ["the task's", "SyncVectorEnv's"])
def test_speed_tells_in_one_line_what_a_task_raises(whose, monkeypatch, capsys):
    env = "probe/Faulty-raise-v0" if whose == "the task's" else "CartPole-v1"
    if env == "CartPole-v1":
        monkeypatch.setattr(gym.vector.SyncVectorEnv, "step", lambda *_: 1 / 0)
    assert call(speed, monkeypatch, "--engine", "--pairs", 1, "--env", env) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {env} raised ZeroDivisionError in step: ") and error.count("\n") == 1


def test_speed_says_how_many_steps_were_given(monkeypatch, capsys):
    assert call(speed, monkeypatch, "--steps", 100) == 2
    assert capsys.readouterr().err.endswith("(the first tenth is warm-up), not 100\n")


def test_speed_measures_whole_epochs_by_minibatch(monkeypatch, capsys):
    made, update = [], ppo.update
    monkeypatch.setattr(ppo, "update", lambda *args: (made.append(1), update(*args))[1])
    monkeypatch.setitem(ppo.SETTINGS, "CartPole-v1", dict(num_envs=4, num_steps=32))
    monkeypatch.setattr(zoo.common.device, "compile_function", lambda function, device: function)
    assert call(speed, monkeypatch, "--update", "--pairs", 1, "--env", "CartPole-v1") == 0
    line, ratio = capsys.readouterr().out.splitlines()
    assert line.startswith("PPO, CartPole-v1, 1 thread, a minibatch of 64 in an epoch of 2: compiled ")
    assert re.search(r": compiled \d+ us, eager \d+ us", line)
    assert re.match(r"median ratio \d+\.\d\d \[.* of 5 pairs$", ratio)
    assert len(made) == 2 * (1 + 5) * 6 * 2  # sides, a warm-up and five rounds, six epochs each of two


def test_speed_names_what_to_install(monkeypatch, capsys):
    no_python = shutil.which("false")  # cannot import anything
    assert call(speed, monkeypatch, "--peer-python", no_python) == 2
    assert "pip install -e '.[bench]'" in capsys.readouterr().err


def test_speed_alternates_and_pairs_its_ratios():
    order, values = [], {"a": iter([1.0, 2.0, 4.0]), "b": iter([3.0, 10.0, 4.0])}
    sides = {name: lambda name=name: (order.append(name), next(values[name]))[1] for name in values}
    medians, ratios = speed.alternate(sides, 3)
    assert "".join(order) == "baabba"
    assert ratios == [3.0, 5.0, 1.0] and medians == {"a": 2.0, "b": statistics.median([3, 10, 4])}


def test_seeds():
    assert benchmark.parse_seeds("3, 1-2,2") == [1, 2, 3]
    with pytest.raises(UsageError):
        benchmark.parse_seeds("")
