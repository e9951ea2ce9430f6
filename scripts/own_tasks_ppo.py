"""Measure PPO's defaults on the tasks of own_tasks.py, beside those of Stable-Baselines3's PPO.

    python scripts/own_tasks_ppo.py                              what is missing in results/own_tasks/ppo.csv
    python scripts/own_tasks_ppo.py --side sb3 --tasks Maze      a part of it
    python scripts/own_tasks_ppo.py --trial "faster=--learning-rate 1e-3"    the zoo's with other arguments
    python scripts/own_tasks_ppo.py --report                     the table

Both train for 100,000 steps and are then evaluated without noise, on the same 50 episodes. The other side has
its defaults but for 8 environments of 256 steps instead of one of 2048, which is faster and makes the same
batch. The side `known` is no agent: a controller made from the task's equations, or the most that its rewards
allow. A row a run; goes on where it was stopped. A trial's name stands for its arguments: other ones need
another name.
"""

import csv
import io
import os
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import benchmark
import numpy as np
import own_tasks
import plot

from zoo import ppo
from zoo.common.args import lookup_in, require
from zoo.common.cli import parse, script_main
from zoo.common.envs import make_envs
from zoo.common.evaluate import evaluate
from zoo.common.files import lock_folder, make_folder, write_atomically, writing

RESULTS = Path(__file__).parents[1] / "results" / "own_tasks" / "ppo.csv"
COLUMNS = ("task", "side", "seed", "eval_return", "eval_std", "seconds", "arguments")
TASKS = list(own_tasks.LENGTHS)
STEPS, EPISODES = 100_000, 50
SIDES = ("zoo", "sb3", "known")


@dataclass
class Args:
    tasks: tuple[str, ...] = tuple(TASKS)
    """tasks of own_tasks.py"""
    side: tuple[str, ...] = SIDES
    """the zoo's PPO, Stable-Baselines3's, what is known"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """seeds of training and evaluation"""
    trial: str | None = None
    """NAME=ARGUMENTS: instead of the sides, the zoo's with other arguments"""
    results: Path = RESULTS
    """the table"""
    report: bool = False
    """print the table, run nothing"""


def run_zoo(env_id: str, seed: int, arguments: str) -> tuple[float, float]:
    """Mean and standard deviation of the final evaluation."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        given = (
            f"--env {env_id} --seed {seed} --total-steps {STEPS} --eval-every 0 --eval-episodes {EPISODES}"
        )
        argv = [*shlex.split(given), "--run-dir", str(folder), "--no-progress", *shlex.split(arguments)]
        ppo.train(parse(ppo.Args, lookup_in(ppo.Args), argv))
        with open(folder / "progress.csv", newline="") as file:
            last = list(csv.DictReader(file))[-1]
        return float(last["eval_return"]), float(last["eval_std"])


def run_sb3(env_id: str, seed: int) -> tuple[float, float]:
    """The same of Stable-Baselines3's PPO."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    model = PPO("MlpPolicy", make_vec_env(env_id, 8, seed=seed), n_steps=256, device="cpu", seed=seed)
    model.learn(STEPS)
    space: Any = model.action_space

    def policy(obs: np.ndarray) -> np.ndarray:
        actions = model.predict(obs.astype(np.float32), deterministic=True)[0]
        if not hasattr(space, "low"):
            return actions
        # `envs` take actions in [-1, 1], the model has learnt the task's own
        return 2 * (actions - space.low) / (space.high - space.low) - 1

    with make_envs(env_id, EPISODES) as envs:
        returns, _ = evaluate(policy, envs, EPISODES, seed)
    return float(returns.mean()), float(returns.std())


@cache
def regulator() -> np.ndarray:
    """The gain (1, 2) of Integrator's linear-quadratic regulator, by the Riccati recursion."""
    a, b = np.array([[1.0, 0.1], [0.0, 1.0]]), np.array([[0.0], [0.1]])
    p = np.eye(2)
    for _ in range(1000):
        gain = np.linalg.solve(0.1 + b.T @ p @ b, b.T @ p @ a)
        p = np.eye(2) + a.T @ p @ (a - b @ gain)
    return gain


def integrator_controller(obs: np.ndarray) -> np.ndarray:
    """The best linear force, were it not bounded."""
    return -obs @ regulator().T


def heating_controller(obs: np.ndarray) -> np.ndarray:
    """The power that brings the room to the temperature wished for in one step, or as near as it can."""
    room, wish, outside = obs.T
    power = np.clip((wish - room - 0.05 * (outside - room)) / 4.0, 0.0, 1.0)
    return 2 * power[:, None] - 1  # in the policy's scale


CONTROLLERS = {"Integrator": integrator_controller, "Heating": heating_controller}


def run_known(env_id: str, seed: int) -> tuple[float, float]:
    """The same of a controller that knows the task; where there is none, all that the rewards allow."""
    task = env_id.removeprefix("own_tasks:").removesuffix("-v0")
    if task not in CONTROLLERS:
        return {"Wind": 500.0, "Maze": 1.0, "Target": 0.01}[task], 0.0
    with make_envs(env_id, EPISODES) as envs:
        returns, _ = evaluate(CONTROLLERS[task], envs, EPISODES, seed)
    return float(returns.mean()), float(returns.std())


OTHERS = {"sb3": run_sb3, "known": run_known}


def read() -> list[dict[str, str]]:
    """The rows so far. Raises UsageError."""
    if not RESULTS.exists():
        return []
    with plot.reading(RESULTS):
        # what follows the last newline is torn
        rows = list(csv.DictReader(RESULTS.read_text().split("\n")[:-1]))
        if any(tuple(row) != COLUMNS for row in rows):
            raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
        for row in rows:
            plot.finite(row["eval_return"])
    return rows


def trial(text: str) -> tuple[str, str]:
    """The name and the arguments of --trial. Raises UsageError."""
    name, equals, arguments = text.partition("=")
    fits = bool(equals and name) and name not in ("zoo", *OTHERS)
    require(fits, f"--trial {text}: give NAME=ARGUMENTS, with a NAME that is none of the sides")
    words = benchmark.run_words(arguments, "--trial")
    ppo.check(parse(ppo.Args, lookup_in(ppo.Args), words))
    for row in read():
        told = f"--trial {name}: {RESULTS} has it with {row['arguments']!r}, not {arguments!r}"
        require(row["side"] != name or row["arguments"] == arguments, f"{told}; give it another name")
    return name, arguments


def measure(task: str, side: str, seed: int, arguments: str) -> None:
    """One run, unless its row is there. Raises UsageError, RunFault."""
    if any((row["task"], row["side"], row["seed"]) == (task, side, str(seed)) for row in read()):
        return
    env_id, start = f"own_tasks:{task}-v0", time.perf_counter()
    if side in OTHERS:
        mean, std = OTHERS[side](env_id, seed)
    else:
        mean, std = run_zoo(env_id, seed, arguments)
    seconds = f"{time.perf_counter() - start:.0f}"
    made = (task, side, seed, f"{mean:.6g}", f"{std:.6g}", seconds, arguments)
    # another process may measure the other side
    with writing(RESULTS.parent), lock_folder(RESULTS.parent, "--results", wait=True):
        text = io.StringIO()
        rows = [COLUMNS, *(row.values() for row in read()), made]
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_atomically(RESULTS, lambda file: file.write(text.getvalue().encode()))
    print(f"{task} {side} {seed}: {mean:.6g} ± {std:.3g}, {seconds} s", flush=True)


def report() -> None:
    """Mean ± standard deviation over the seeds, and the seeds' own, a line a task and side."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in read():
        found.setdefault((row["task"], row["side"]), []).append(float(row["eval_return"]))
    for (task, side), means in sorted(found.items()):
        each = " ".join(f"{mean:.4g}" for mean in means)
        std = np.std(means, ddof=1) if len(means) > 1 else 0.0
        print(f"{task:<11} {side:<16} {np.mean(means):>10.4g} ± {std:<8.3g} {each}")


def work(args: Args) -> None:
    """What is missing, and the table. Raises UsageError, RunFault."""
    globals()["RESULTS"] = args.results
    for flag, given, known in (("--tasks", args.tasks, TASKS), ("--side", args.side, SIDES)):
        for name in given:
            require(name in known, f"{flag} {name}: there is no such; there are {', '.join(known)}")
    if not args.report:
        for seed in args.seeds:
            require(0 <= seed < 2**31, f"--seeds {seed}: a seed lies in [0, 2**31)")
        require(not RESULTS.is_dir(), f"--results {RESULTS}: is a folder; a table is meant")
        make_folder(RESULTS.parent, "--results")
        sides = [(side, "") for side in args.side] if args.trial is None else [trial(args.trial)]
        for seed in args.seeds:
            for task in args.tasks:
                for side, arguments in sides:
                    measure(task, side, seed, arguments)
    report()


def main() -> int:
    """Measure, or tell in one line what is wrong; the exit status."""
    return script_main(Args, __doc__, work, interrupted="interrupted; the same command goes on")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
