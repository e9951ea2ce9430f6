"""How fast the zoo is beside Stable-Baselines3 on this machine, in alternating runs.

    python scripts/speed.py                           PPO on HalfCheetah-v4, 3 pairs of training runs
    python scripts/speed.py --agent trpo --env Hopper-v4 --pairs 5
    python scripts/speed.py --agent sac --steps 20480 --threads 2          two threads of torch on both sides
    python scripts/speed.py --env CartPole-v1 --tuned                      the peer with RL Zoo's settings
    python scripts/speed.py --update                  PPO's pass over a batch, compiled against eager
    python scripts/speed.py --engine                  environments alone, against Gymnasium's SyncVectorEnv

Absolute figures mean little on a shared machine: they move with whatever else runs on it. Both sides of a
pair run right after each other, in turns as to which is first; quote the median of the pairs' ratios.

A training run is a fresh process with the agent's defaults, evaluations, logs and checkpoints included. Its
speed is taken from where a tenth of the steps is done until after the last evaluation. What comes before (the
first batch, compilation) is shown apart, as the time until the first update is done; "whole process" counts
everything from its start to its end. Needs the extra `bench`: pip install -e '.[bench]'.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

import zoo
from zoo.common.cli import script_main
from zoo.common.errors import RunFault, UsageError

BATCH = 2048  # PPO's and TRPO's; training runs are whole multiples of it on both sides
EVAL_EVERY, EVAL_EPISODES = 100_000, 10  # the agents' defaults
PEER_PACKAGES = dict.fromkeys(("ppo", "actor_critic", "sac"), "stable_baselines3") | {"trpo": "sb3_contrib"}
OWN_ARGS = {"sac": ["--random-steps", "100"]}  # as the peer: its updates begin after 100 steps


@dataclass
class Args:
    agent: Literal["ppo", "actor_critic", "trpo", "sac"] = "ppo"
    """what to train; the others are Stable-Baselines3's PPO, A2C and SAC, and sb3-contrib's TRPO"""
    env: str = "HalfCheetah-v4"
    """id of the Gymnasium environment"""
    steps: int = 49 * BATCH
    """environment steps of a training run, rounded down to whole batches of 2048"""
    pairs: int = 3
    """pairs of measurements"""
    threads: int = 1
    """CPU threads of torch, on both sides"""
    tuned: bool = False
    """give the peer RL Zoo's settings for the task (PPO on CartPole-v1) in place of its defaults"""
    peer_python: str = ""
    """Python interpreter that has Stable-Baselines3 (default: the one running this)"""
    update: bool = False
    """measure a pass of PPO over a batch, by minibatch, instead"""
    engine: bool = False
    """measure the environments alone instead"""


class Measured(NamedTuple):
    """One training run."""

    sps: float  # environment steps a second after the warm-up, evaluations included
    process: float  # seconds, the whole process
    memory: float  # MiB, peak resident
    first: float | None = None  # seconds until the first update was done, compilation included


def run_child(command: list[str]) -> tuple[str, float, float]:
    """Run to the end: what it printed, seconds, peak memory in MiB. Raises RunFault when it fails."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            # Popen.wait would lose the resource usage of this one child
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        output.seek(0)
        text = output.read().strip()
    if process.returncode:
        last = text.splitlines()[-1] if text else "no output"
        raise RunFault(f"{Path(command[1]).name} failed ({process.returncode}): {last}")
    return text, seconds, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def ours(args: Args, seed: int) -> Measured:
    """Train the zoo's agent. Raises RunFault."""
    from zoo.common.files import load_checkpoint

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        script = Path(zoo.__file__).parent / f"{args.agent}.py"
        command = [sys.executable, str(script), "--env", args.env, "--seed", str(seed)]
        command += ["--total-steps", str(args.steps)]
        command += ["--eval-every", str(EVAL_EVERY), "--eval-episodes", str(EVAL_EPISODES), "--device", "cpu"]
        command += ["--threads", str(args.threads), *OWN_ARGS.get(args.agent, [])]
        _, process, memory = run_child([*command, "--no-progress", "--run-dir", str(folder)])
        with open(folder / "progress.csv", newline="") as file:
            rows = [(int(row["step"]), float(row["wall_time"])) for row in csv.DictReader(file)]
        # The last checkpoint is written before the last evaluation, the table's last row filled in after it.
        written = {name: (folder / name).stat().st_mtime for name in ("checkpoint.pt", "progress.csv")}
        evaluation = written["progress.csv"] - written["checkpoint.pt"]
        end = load_checkpoint(folder / "checkpoint.pt", "run")["run"]["wall_time"] + evaluation
    step, wall_time = next(row for row in rows if row[0] >= args.steps // 10)
    return Measured((rows[-1][0] - step) / (end - wall_time), process, memory, rows[0][1])


def theirs(args: Args, seed: int) -> Measured:
    """Train the peer. Raises RunFault."""
    command = [args.peer_python or sys.executable, str(Path(__file__).with_name("speed_sb3.py"))]
    command += ["--agent", args.agent, "--env", args.env, "--seed", str(seed), "--steps", str(args.steps)]
    command += ["--warm-step", str(args.steps // 10), "--threads", str(args.threads)]
    command += ["--eval-every", str(EVAL_EVERY), "--eval-episodes", str(EVAL_EPISODES)]
    command += ["--tuned"] * args.tuned
    text, process, memory = run_child(command)
    timing = json.loads(text.splitlines()[-1])
    return Measured(timing["steps"] / timing["seconds"], process, memory)


def compare_training(args: Args) -> None:
    """Pairs of training runs, each side first in turn. Raises UsageError, RunFault."""
    from zoo.common.envs import make_single

    if args.steps < 10 * BATCH:
        raise UsageError(
            f"--steps must be at least {10 * BATCH} (the first tenth is warm-up), not {args.steps}"
        )
    args.steps -= args.steps % BATCH
    if args.tuned and (args.agent, args.env) != ("ppo", "CartPole-v1"):
        raise UsageError(f"--tuned knows PPO on CartPole-v1 only, not {args.agent} on {args.env}")
    make_single(args.env).close()
    package = PEER_PACKAGES[args.agent]
    try:
        found = subprocess.run(
            [args.peer_python or sys.executable, "-c", f"import {package}"], capture_output=True
        ).returncode
    except OSError as error:
        raise UsageError(f"--peer-python {args.peer_python}: {error.strerror}") from error
    if found != 0:
        raise UsageError(
            f"{package} is not installed: pip install -e '.[bench]' "
            "(or name a Python that has it: --peer-python)"
        )
    print(f"{args.agent}, {args.env}, {args.steps:,} steps, {os.cpu_count()} cores; zoo | {package}")
    ratios, wholes = [], []
    for pair in range(1, args.pairs + 1):
        sides: list[Callable[[Args, int], Measured]] = [ours, theirs] if pair % 2 else [theirs, ours]
        measured = {side.__name__: side(args, pair) for side in sides}
        a, b = measured["ours"], measured["theirs"]
        ratios.append(a.sps / b.sps)
        wholes.append(b.process / a.process)
        print(
            f"pair {pair}: {a.sps:,.0f} | {b.sps:,.0f} steps/s, ratio {ratios[-1]:.2f}; "
            f"first update after {a.first:.1f} s; whole process {a.process:.1f} | {b.process:.1f} s; "
            f"peak memory {a.memory:.0f} | {b.memory:.0f} MiB",
            flush=True,
        )
    for name, each in {"steps/s": ratios, "whole process": wholes}.items():
        print(f"{name}: median ratio {statistics.median(each):.2f} [{min(each):.2f} .. {max(each):.2f}]")


def alternate(sides: dict[str, Callable[[], float]], rounds: int) -> tuple[dict[str, float], list[float]]:
    """Call the two sides in turns; the median of what each returns, and the second's over the first's for
    each round."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides) if turn % 2 else reversed(sides):
            values[name].append(sides[name]())
    first, second = values.values()
    return {name: statistics.median(each) for name, each in values.items()}, [
        b / a for a, b in zip(first, second, strict=True)
    ]


def compare_updates(args: Args) -> None:
    """An epoch of PPO with its defaults on the task, a minibatch's share of it, compiled and eager, one
    thread."""
    import torch
    from torch.func import functional_call

    from zoo import ppo
    from zoo.common.device import compile_function, compile_seconds, flatten, setup
    from zoo.common.envs import make_envs
    from zoo.common.optim import new_adam

    device = setup("cpu", 1)
    defaults = ppo.Args.for_env(args.env)
    envs = make_envs(args.env, 1, threads=1)
    torch.manual_seed(0)
    net = ppo.ActorCritic(envs, defaults.hidden, defaults.log_std, defaults.shared_network)
    params, unflatten = flatten(net)

    def forward(params, obs):
        return functional_call(net, unflatten(params), (obs,))

    rows = defaults.num_envs * defaults.num_steps
    minibatches = rows // defaults.minibatch_size
    obs = torch.randn(rows, envs.obs_dim)
    dist, value = forward(params, obs)
    action = dist.sample(ppo.draw_noise(envs, rows, generator=torch.Generator().manual_seed(0)))
    columns = (obs, action, dist.log_prob(action), value, torch.randn(rows), value + torch.randn(rows))
    batch = ppo.Batch(*(column.detach() for column in columns))
    learning_rate, kl_coef = torch.tensor(1e-6), torch.tensor(1.0)
    order = torch.randperm(rows)
    envs.close()

    def timed(epoch: Callable, repeats: int = 6) -> Callable[[], float]:
        def run() -> float:
            p, opt = params, new_adam(params)
            start = time.perf_counter()
            for _ in range(repeats):
                p, opt, _ = epoch(p, opt, batch, order, learning_rate, kl_coef)
            return (time.perf_counter() - start) / (repeats * minibatches) * 1e6

        return run

    improve = partial(ppo.improve, forward, defaults)
    sides = {"compiled": timed(compile_function(improve, device)), "eager": timed(improve)}
    for side in sides.values():  # compile and warm up
        side()
    medians, ratios = alternate(sides, rounds=5 * args.pairs)
    figures = ", ".join(f"{name} {microseconds:.0f} us" for name, microseconds in medians.items())
    print(
        f"PPO, {args.env}, 1 thread, a minibatch of {defaults.minibatch_size} in an epoch of {minibatches}: "
        f"{figures} (compilation {compile_seconds():.1f} s)"
    )
    spread = f"[{min(ratios):.2f} .. {max(ratios):.2f}] of {len(ratios)} pairs"
    print(f"median ratio {statistics.median(ratios):.2f} {spread}")


def compare_engines(args: Args) -> None:
    """Environment steps a second under random actions: ours with its default threads, and SyncVectorEnv.
    Raises UsageError, RunFault."""
    import gymnasium as gym

    from zoo.common.envs import VectorEnv, make_envs, make_single

    def stepping(
        envs: VectorEnv | gym.vector.SyncVectorEnv, actions: Sequence[np.ndarray]
    ) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            try:
                for action in actions:
                    envs.step(action)
            except RunFault:  # of ours, which says what a task raised
                raise
            except Exception as error:
                told = " ".join(str(error).split())
                raise RunFault(f"{args.env} raised {type(error).__name__} in step: {told}") from error
            return len(actions) * envs.num_envs / (time.perf_counter() - start)

        return run

    rng = np.random.default_rng(0)
    for num_envs in (8, 64):
        own = make_envs(args.env, num_envs)
        sync = gym.vector.SyncVectorEnv([lambda: make_single(args.env)] * num_envs)
        own.reset(range(own.num_envs))
        sync.reset(seed=0)
        times = 16_384 // num_envs
        if own.discrete:
            scaled = list(rng.integers(own.action_dim, size=(times, num_envs)))
        else:
            scaled = list(rng.uniform(-1, 1, size=(times, num_envs, own.action_dim)).astype(np.float32))
        space = sync.action_space  # the same actions, in its own scale, shape and type
        raw = [np.asarray(own.to_env_action(action), space.dtype).reshape(space.shape) for action in scaled]
        sides = {"SyncVectorEnv": stepping(sync, raw), own.engine: stepping(own, scaled)}
        for side in sides.values():
            side()
        medians, ratios = alternate(sides, rounds=args.pairs)
        figures = ", ".join(f"{name} {sps:,.0f} steps/s" for name, sps in medians.items())
        print(
            f"{args.env}, {num_envs} environments: {figures}; median ratio {statistics.median(ratios):.2f}",
            flush=True,
        )
        own.close()
        sync.close()


def work(args: Args) -> None:
    """Compare what was asked for. Raises UsageError, RunFault."""
    for name in ("pairs", "threads"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.update and args.agent != "ppo":
        raise UsageError(f"--update measures PPO's update, not that of --agent {args.agent}")
    if args.update or args.engine:
        if args.update:
            compare_updates(args)
        if args.engine:
            compare_engines(args)
    else:
        compare_training(args)


def main() -> int:
    """Measure, or tell in one line what is wrong; the exit status."""
    return script_main(Args, __doc__, work)


if __name__ == "__main__":
    sys.exit(main())
