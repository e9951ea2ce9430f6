"""Run agents on tasks over seeds, several at a time, and keep their learning curves in results/.

    python scripts/benchmark.py --agent ppo --env HalfCheetah-v4 Hopper-v4 --seeds 1-10
    python scripts/benchmark.py --agent ppo --env HalfCheetah-v4 --total-steps 2e5 --args "--num-envs 16"
    python scripts/benchmark.py --suite ppo      a list kept in this file
    python scripts/benchmark.py --report         the table of what is in results/, without running anything
    python scripts/benchmark.py --suite ppo --ray auto      the same runs on a Ray cluster

Every run is a process of its own on one core. It may all be killed at any moment: the same command goes on
where it stopped, skipping what is recorded and resuming what has a checkpoint. Ctrl-C lets every run write
its checkpoint first.

    RUNS/AGENT/TASK/seed_N/          the run's folder; RUNS/AGENT/TASK/seed_N.log what it printed
    RESULTS/AGENT/TASK/seed_N.csv    its progress.csv, thinned
    RESULTS/AGENT/TASK/meta.json     final evaluations, arguments, versions, commit, machine, the commands
    RESULTS/AGENT/TASK/agent.pt      the agent of the median seed by final evaluation (of two the lower one)

On a Ray cluster (extra `ray`) every run takes one CPU of some node; Ray sends it to another node when its own
is lost, and there it goes on from its checkpoint. Code, RUNS and RESULTS lie on storage that all nodes see
under the same path.

In meta.json what all seeds share stands once at the top, and what differs (a commit, say) with each seed;
`agent_seed` says whose agent.pt it is, null where that seed's run is not at hand. Seeds run under different
algorithm arguments never share a folder. To run seeds again under the same arguments (because the code
changed), delete their files in RESULTS and in RUNS first. Exit status: 0, 1 when a run failed, 2 for bad
input, 130 (143, 129) after Ctrl-C (SIGTERM, SIGHUP).
"""

import contextlib
import csv
import dataclasses
import fcntl
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

import zoo
from zoo.common.args import RunArgs, lookup_in, require
from zoo.common.cli import parse, script_main
from zoo.common.device import setup
from zoo.common.envs import make_envs, make_single
from zoo.common.errors import RunFault, UsageError
from zoo.common.files import (
    load_checkpoint,
    lock_folder,
    make_folder,
    save_checkpoint,
    write_atomically,
    writing,
)


class Entry(NamedTuple):
    """Seeds of one agent on one task, with what its command line needs beyond the agent's own settings."""

    agent: str
    env: str
    seeds: Sequence[int]
    args: str = ""


TEN, FIVE, THREE = range(1, 11), range(1, 6), range(1, 4)
SUITES: dict[str, list[Entry]] = {
    "ppo": [
        Entry("ppo", "HalfCheetah-v4", TEN),
        Entry("ppo", "Hopper-v4", TEN),
        Entry("ppo", "Walker2d-v4", TEN),
        Entry("ppo", "CartPole-v1", TEN),
        Entry("ppo", "Acrobot-v1", TEN),
        Entry("ppo", "Pendulum-v1", TEN),
        Entry("ppo", "MountainCarContinuous-v0", TEN),
        Entry("ppo", "MountainCar-v0", TEN),
        Entry("ppo", "Ant-v4", THREE),
        Entry("ppo", "Humanoid-v4", THREE),
        Entry("ppo", "Swimmer-v4", THREE),
        Entry("ppo", "Reacher-v4", THREE),
        Entry("ppo", "InvertedPendulum-v4", THREE),
        Entry("ppo", "InvertedDoublePendulum-v4", THREE),
    ],
    "box2d": [  # needs the extra of that name
        Entry("ppo", "LunarLander-v3", THREE),
        Entry("ppo", "LunarLanderContinuous-v3", THREE),
    ],
    "reinforce": [
        Entry("reinforce", "CartPole-v1", TEN),
        Entry("reinforce", "HalfCheetah-v4", TEN, "--total-steps 3000000"),
        Entry("reinforce", "Hopper-v4", TEN),
        Entry("reinforce", "Walker2d-v4", TEN),
        Entry("reinforce", "Acrobot-v1", TEN),
        Entry("reinforce", "Pendulum-v1", TEN),
        Entry("reinforce", "MountainCarContinuous-v0", TEN),
        Entry("reinforce", "MountainCar-v0", TEN),
    ],
    "actor_critic": [
        Entry("actor_critic", "HalfCheetah-v4", TEN),
        Entry("actor_critic", "Hopper-v4", TEN),
        Entry("actor_critic", "Walker2d-v4", TEN),
        Entry("actor_critic", "CartPole-v1", TEN),
        Entry("actor_critic", "Acrobot-v1", TEN),
        Entry("actor_critic", "MountainCarContinuous-v0", TEN),
        Entry("actor_critic", "Pendulum-v1", TEN),
        Entry("actor_critic", "MountainCar-v0", TEN),
        Entry("actor_critic", "Reacher-v4", THREE),
    ],
    "trpo": [
        Entry("trpo", "HalfCheetah-v4", TEN),
        Entry("trpo", "Hopper-v4", TEN),
        Entry("trpo", "Walker2d-v4", TEN),
        Entry("trpo", "CartPole-v1", TEN),
        Entry("trpo", "Acrobot-v1", TEN),
        Entry("trpo", "Pendulum-v1", TEN),
        Entry("trpo", "MountainCar-v0", TEN),
        Entry("trpo", "MountainCarContinuous-v0", TEN),
        Entry("trpo", "Swimmer-v4", THREE),
        Entry("trpo", "Reacher-v4", THREE),
    ],
    "sac": [
        Entry("sac", "Pendulum-v1", FIVE),
        Entry("sac", "MountainCarContinuous-v0", FIVE),
        Entry("sac", "HalfCheetah-v4", FIVE, "--total-steps 300000"),
        Entry("sac", "Hopper-v4", FIVE, "--total-steps 300000"),
        Entry("sac", "Walker2d-v4", FIVE, "--total-steps 300000"),
    ],
    "grpo": [
        Entry("grpo", "CartPole-v1", FIVE),
        Entry("grpo", "Pendulum-v1", FIVE),
        Entry("grpo", "Acrobot-v1", FIVE),
        Entry("grpo", "HalfCheetah-v4", FIVE),
    ],
    "preferences": [
        Entry("preferences", "Pendulum-v1", FIVE),
        Entry("preferences", "HalfCheetah-v4", FIVE),
        Entry("preferences", "Hopper-v4", THREE, "--fixed-horizon"),
    ],
}

# runs share the machine: more threads would only slow each other down
ONE_CORE = ["--threads", "1", "--env-threads", "1"]
REPOSITORY = Path(zoo.__file__).parents[1]
MAX_ROWS = 200  # of a thinned curve
POLL = 0.2  # seconds between looks at the running processes
# Arguments that change where and how fast a run is made, not what it computes.
BOOKKEEPING = {
    "seed", "run_dir", "resume", "device", "compile", "threads", "env_threads", "checkpoint_every", "track",
    "track_project", "progress",
}  # fmt: skip
# at the top of meta.json when all seeds agree
SHARED = ("args", "versions", "commit", "machine", "engine", "jobs")


@dataclass
class Args:
    agent: tuple[str, ...] = ()
    """agents: names of the files in --agents"""
    env: tuple[str, ...] = ()
    """ids of Gymnasium environments"""
    seeds: str | None = None
    """seeds, such as 1-10 or 1,3,7-9 (default: those of --suite, else 1-5)"""
    suite: tuple[str, ...] = ()
    """lists of runs named in this script, in place of --agent and --env"""
    total_steps: int | None = None
    """environment steps of each run (default: the agent's own setting for the task)"""
    args: str = ""
    """further arguments for every run, in one string"""
    jobs: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    """runs at the same time (default: one a usable core)"""
    ray: str | None = None
    """address of a Ray cluster to run on, such as auto or 10.0.0.1:6379, in place of this machine's cores"""
    results: Path = Path("results")
    """where curves and meta.json are kept"""
    runs: Path = Path("runs/benchmark")
    """where the runs' own folders are"""
    agents: Path | None = None
    """folder of the agents' files (default: the zoo's)"""
    force: bool = False
    """discard results and unfinished runs that were made with other arguments"""
    report: bool = False
    """print the table of what is in --results and run nothing"""


# --- what to run --------------------------------------------------------------------------------------------


@dataclass
class Job:
    """One run."""

    agent: str
    env: str
    seed: int
    script: Path
    extra: list[str]  # arguments beyond the environment and the seed
    expected: dict[str, Any]  # all arguments the run will have, as they come back from its args.json
    defaults: dict[str, Any]  # of the agent, for arguments that it did not have yet when a run was recorded
    folder: Path  # of the run
    results: Path  # results/AGENT/TASK

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")

    @property
    def arguments(self) -> list[str]:
        return ["--env", self.env, "--seed", str(self.seed), *self.extra]

    @property
    def total_steps(self) -> int:
        return int(self.expected["total_steps"])

    def __str__(self) -> str:
        return f"{self.agent} {self.env} seed {self.seed}"


def parse_seeds(text: str) -> list[int]:
    """ "1-3,7" -> [1, 2, 3, 7]. Raises UsageError."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        require(match is not None, f"--seeds {text}: give numbers and ranges such as 1-10 or 1,3,7-9")
        assert match is not None
        first, last = int(match[1]), int(match[2] or match[1])
        require(first <= last, f"--seeds {text}: {first}-{last} is empty; the smaller seed comes first")
        require(last < 2**31, f"--seeds {text}: a seed must be less than 2**31")
        seeds += range(first, last + 1)
    return sorted(set(seeds))


def entries(args: Args) -> list[Entry]:
    """The declared or the given list, each thing once. Raises UsageError."""
    seeds = None if args.seeds is None else parse_seeds(args.seeds)
    if args.suite:
        require(
            not (args.agent or args.env),
            "--suite brings its own agents and tasks: leave --agent and --env out",
        )
        for name in args.suite:
            require(name in SUITES, f"--suite {name}: no such suite; there are {', '.join(SUITES)}")
        declared = [entry for name in dict.fromkeys(args.suite) for entry in SUITES[name]]
        return [entry._replace(seeds=seeds or entry.seeds) for entry in declared]
    require(bool(args.agent and args.env), "give --agent and --env, or --suite, or --report")
    pairs = itertools.product(dict.fromkeys(args.agent), dict.fromkeys(args.env))
    return [Entry(agent, env, seeds or FIVE) for agent, env in pairs]


def given_fields(words: Sequence[str]) -> set[str]:
    """The fields of an agent's Args that these words of a command line set."""
    flags = [word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")]
    return {flag.removeprefix("no_") for flag in flags}


def run_words(args: str, flag: str = "--args") -> list[str]:
    """The words of --args. Raises UsageError where they are none, or name the run, which the script does."""
    try:
        words = shlex.split(args)
    except ValueError as error:
        raise UsageError(f"{flag} {args}: {error}") from error
    require(
        not given_fields(words) & {"env", "seed", "run_dir", "resume"},
        f"{flag} {args}: the environment, the seed and the folder of a run are given by this script",
    )
    return words


@cache
def load_agent(script: Path) -> ModuleType:
    """The agent's file as a module, for its Args and SETTINGS. Raises UsageError."""
    there = sorted(path.stem for path in script.parent.glob("*.py") if not path.stem.startswith("_"))
    require(
        script.is_file(),
        f"--agent {script.stem}: no such file in {script.parent.name}/; there are {', '.join(there)}",
    )
    spec = importlib.util.spec_from_file_location(f"benchmarked_{script.stem}", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up there
    spec.loader.exec_module(module)
    require(hasattr(module, "Args"), f"--agent {script.stem}: {script.name} is no agent, it has no Args")
    acts = script.parent != Path(zoo.__file__).parent or hasattr(module, "make_envs")
    others = "scripts/tokens.py and scripts/diffusion.py measure those that do not"
    require(acts, f"--agent {script.stem}: acts in no environment of Gymnasium; {others}")
    return module


def plan(args: Args) -> list[Job]:
    """All runs, their arguments checked as the agents themselves will check them. Raises UsageError."""
    require(args.jobs >= 1, f"--jobs must be at least 1, not {args.jobs}")
    require(args.ray != "", "--ray is empty; the address of a cluster is meant, or auto")
    common, jobs = run_words(args.args), list[Job]()
    for entry in entries(args):
        script = (args.agents or Path(zoo.__file__).parent) / f"{entry.agent}.py"
        module = load_agent(script)
        if args.agents:  # one's own may take other spaces
            make_single(entry.env).close()
        else:
            with make_envs(entry.env, 1, "gymnasium") as envs:
                if hasattr(module, "check_actions"):
                    module.check_actions(envs)
        extra = ONE_CORE + shlex.split(entry.args) + common
        if args.total_steps is not None:
            extra += ["--total-steps", str(args.total_steps)]
        given = ["--env", entry.env, "--seed", str(entry.seeds[0]), "--no-progress", *extra]
        parsed: RunArgs = parse(module.Args, lookup_in(module.Args), given)
        expected = json.loads(json.dumps(dataclasses.asdict(parsed)))  # tuples become lists, as in args.json
        defaults = json.loads(json.dumps(dataclasses.asdict(module.Args())))
        if hasattr(module, "check"):
            module.check(parsed)
        if parsed.device == "cuda" and args.ray is None:  # the nodes of a cluster are other machines
            setup("cuda")
        task = Path(entry.agent) / re.sub(r"[^\w.-]+", "_", entry.env)
        for seed in entry.seeds:
            job_expected = expected | {"seed": seed}
            folder = args.runs / task / f"seed_{seed}"
            made_of = (entry.agent, entry.env, seed, script, extra, job_expected, defaults)
            jobs.append(Job(*made_of, folder, args.results / task))
    return jobs


def differences(found: dict[str, Any], job: Job) -> str:
    """The algorithm's arguments in which a run differs from a job, in words; "" where they agree.

    An argument that the run does not know is a later one: the run was made as its default would make it.
    """
    expected = job.expected
    if found:
        found = job.defaults | found
    names = sorted((found.keys() | expected.keys()) - BOOKKEEPING)
    differing = [name for name in names if found.get(name, "absent") != expected.get(name, "absent")]
    return ", ".join(
        f"{name} {found.get(name, 'absent')} there, {expected.get(name, 'absent')} here" for name in differing
    )


# --- results/AGENT/TASK -------------------------------------------------------------------------------------


def read_seeds(folder: Path) -> dict[int, dict[str, Any]]:
    """meta.json's entries by seed, each whole again (see `write_meta`); {} where there is none. Raises
    UsageError."""
    path = folder / "meta.json"
    if not path.exists():
        return {}
    try:
        meta = json.loads(path.read_text())
        shared = {key: meta[key] for key in SHARED if key in meta}
        seeds = {int(seed): {**shared, **entry} for seed, entry in meta["seeds"].items()}
        for seed, entry in seeds.items():
            if missing := {"mean", "steps", "sps", *SHARED} - entry.keys():
                raise KeyError(f"seed {seed} lacks {', '.join(sorted(missing))}")
            if not math.isfinite(entry["mean"]):
                raise ValueError(f"the mean of seed {seed} is {entry['mean']}")
        return seeds
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--results: {path} is no meta.json of this script ({error})") from error


def write_meta(
    folder: Path, agent: str, env: str, seeds: dict[int, dict[str, Any]], agent_seed: int | None
) -> None:
    """Write meta.json atomically: statistics over seeds, and what all seeds share moved to the top.

    agent_seed: whose agent.pt lies beside it. Raises OSError.
    """
    seeds = {seed: dict(seeds[seed]) for seed in sorted(seeds)}
    means = [entry["mean"] for entry in seeds.values()]
    meta: dict[str, Any] = {
        "agent": agent,
        "env": env,
        "mean": float(np.mean(means)),
        "std": float(np.std(means, ddof=1)) if len(means) > 1 else None,
        "num_seeds": len(means),
        "agent_seed": agent_seed,
    }
    for key in SHARED:
        first = next(iter(seeds.values()))[key]
        if all(entry[key] == first for entry in seeds.values()):
            meta[key] = first
            for entry in seeds.values():
                del entry[key]
    meta["seeds"] = {str(seed): entry for seed, entry in seeds.items()}
    write_atomically(
        folder / "meta.json", lambda file: file.write(json.dumps(meta, indent=2).encode() + b"\n")
    )


def thin(rows: list[dict[str, str]], limit: int = MAX_ROWS) -> list[dict[str, str]]:
    """At most `limit` rows in their order: the first, the last, all with an evaluation, and of the rest an
    even choice.

    Evaluations are never dropped, not even where they alone are more than `limit`.
    """
    kept = {i for i, row in enumerate(rows) if row.get("eval_return") or i in (0, len(rows) - 1)}
    rest = [i for i in range(len(rows)) if i not in kept]
    room = min(max(limit - len(kept), 0), len(rest))
    kept |= {rest[i] for i in np.linspace(0, len(rest) - 1, room).round().astype(int)} if room else set()
    return [rows[i] for i in sorted(kept)]


def rounded(name: str, cell: str) -> str:
    """A cell to 6 significant digits; steps are counts and stay exact."""
    return cell if not cell or name == "step" else f"{float(cell):.6g}"


def run_args(folder: Path) -> dict[str, Any]:
    """The arguments of a run, from its args.json; {} (unlike any run's) where there is none to read."""
    try:
        return json.loads((folder / "args.json").read_text())["args"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def kept_args(made: dict[str, Any]) -> dict[str, Any]:
    """Of a run's arguments those that its results keep."""
    return {name: value for name, value in made.items() if name not in ("run_dir", "resume", "seed")}


def read_run(folder: Path) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """The rows of a finished run's progress.csv, and its args.json. Raises OSError, ValueError, KeyError,
    IndexError, TypeError where it is not finished.

    An agent.pt and an evaluation in the last row are not enough: a finished run that goes on with more steps
    has the one from before, and may be killed at the other. All agents that play in environments make their
    last step at --total-steps or beyond; those whose last batch ends before it have no returns to be kept.
    """
    with open(folder / "progress.csv", newline="") as file:
        rows, made = list(csv.DictReader(file)), json.loads((folder / "args.json").read_text())
    step, wanted = int(rows[-1]["step"]), int(made["args"]["total_steps"])
    if step < wanted or not rows[-1]["eval_return"]:
        raise ValueError(f"it stopped at step {step} of {wanted}, or before its last evaluation")
    return rows, made


def median_seed(seeds: dict[int, dict[str, Any]]) -> int:
    """The seed whose final evaluation is the median; of an even number the lower one of the middle two."""
    return sorted(seeds, key=lambda seed: (seeds[seed]["mean"], seed))[(len(seeds) - 1) // 2]


def keep_agent(folder: Path, runs: Path, seeds: dict[int, dict[str, Any]]) -> int | None:
    """Bring the median seed's agent.pt into the results in `folder`, without its paths; that seed.

    It comes from the seed's run in `runs`, if that is the one recorded; else the one in `folder` stays if it
    is that seed's. Where neither is, the file goes, rather than be another's: None. Raises OSError.
    """
    median, kept = median_seed(seeds), folder / "agent.pt"
    entry, run = seeds[median], runs / f"seed_{median}"
    content = None
    # what the run's folder may be instead: gone, unfinished, another run's
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError, UsageError):
        rows, made = read_run(run)
        found = (float(rows[-1]["eval_return"]), made["commit"], kept_args(made["args"]))
        if found == (entry["mean"], entry["commit"], entry["args"]):
            content = load_checkpoint(run / "agent.pt", "--runs")
    if content is not None:
        content["args"] = {**content["args"], "run_dir": None, "resume": None}
        save_checkpoint(kept, content)
        return median
    with contextlib.suppress(KeyError, UsageError):
        args = json.loads(json.dumps(load_checkpoint(kept, "--results")["args"]))
        if args["seed"] == median and kept_args(args) == entry["args"]:
            return median
    kept.unlink(missing_ok=True)
    return None


@contextlib.contextmanager
def holding(job: Job) -> Iterator[None]:
    """Hold the folder of all results, waiting for another benchmark that does: one with other --runs would
    write meta.json without this one's seed. Raises RunFault; UsageError where the lock cannot be made."""
    with writing(job.results):
        job.results.mkdir(parents=True, exist_ok=True)
        with lock_folder(job.results.parents[1], "--results", wait=True):
            yield


def record(job: Job, side_by_side: int) -> dict[str, Any]:
    """Take a finished run into the results: the curve first, then the median seed's agent, then meta.json,
    which makes it count. The seed's entry.

    Raises RunFault when the run's files are not those of a finished run or the results cannot be written.
    """
    try:
        rows, made = read_run(job.folder)
        last = rows[-1]
        entry: dict[str, Any] = {
            "mean": float(last["eval_return"]),
            "std": float(last["eval_std"]),
            "episodes": made["args"]["eval_episodes"],
            "steps": int(last["step"]),
            "wall_time": float(last["wall_time"]),
            "sps": float(last["sps"]),
            "resumed_at_step": made["resumed_at_step"],
            "command": shlex.join(["python", f"{job.script.parent.name}/{job.script.name}", *job.arguments]),
            "args": kept_args(made["args"]),
            **{key: made[key] for key in ("versions", "commit", "machine", "engine")},
            "jobs": side_by_side,  # speeds were measured with so many runs on the machine
        }
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise RunFault(
            f"{job.folder} is not the folder of a finished run ({type(error).__name__}: {error})"
        ) from error
    text = io.StringIO()
    writer = csv.DictWriter(text, list(last), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: rounded(name, cell) for name, cell in row.items()} for row in thin(rows))
    with holding(job):
        write_atomically(
            job.results / f"seed_{job.seed}.csv", lambda file: file.write(text.getvalue().encode())
        )
        everything = read_seeds(job.results) | {job.seed: entry}
        # only with --force
        dropped = [seed for seed, other in everything.items() if differences(other["args"], job)]
        for seed in dropped:
            del everything[seed]
        kept = keep_agent(job.results, job.folder.parent, everything)
        write_meta(job.results, job.agent, job.env, everything, kept)
        for seed in dropped:
            (job.results / f"seed_{seed}.csv").unlink(missing_ok=True)
    return entry


def keep_agents(jobs: list[Job]) -> None:
    """Bring every task's agent.pt up to date, also of seeds recorded before; tell where there is none. Raises
    RunFault."""
    for job in {job.results: job for job in jobs}.values():
        with holding(job):
            if not (seeds := read_seeds(job.results)):
                continue
            kept = keep_agent(job.results, job.folder.parent, seeds)
            write_meta(job.results, job.agent, job.env, seeds, kept)
        if kept is None:
            lacking = f"{job.results} has no agent.pt: the run of its median seed, {median_seed(seeds)}"
            print(f"note: {lacking}, is not in {job.folder.parent}", file=sys.stderr)


def is_recorded(job: Job) -> bool:
    """Whether the results hold this very run."""
    entry = read_seeds(job.results).get(job.seed)
    return (
        entry is not None
        and (job.results / f"seed_{job.seed}.csv").exists()
        and not differences(entry["args"], job)
    )


def is_finished(job: Job) -> bool:
    """Whether the run's folder holds this very run, made to its end."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError):
        _, made = read_run(job.folder)
        return (job.folder / "agent.pt").exists() and not differences(made["args"], job)
    return False


def refuse_mixing(jobs: list[Job]) -> None:
    """Raise UsageError where results or unfinished runs were made with other arguments than the ones asked
    for."""
    for job in jobs:
        for seed, entry in read_seeds(job.results).items():
            if how := differences(entry["args"], job):
                raise UsageError(
                    f"{job.results} holds seed {seed} made with other arguments ({how}); "
                    "name another --results, or --force to discard what differs and run it again"
                )
        how = differences(run_args(job.folder), job)
        if how and (job.folder / "checkpoint.pt").exists() and not is_recorded(job):
            raise UsageError(
                f"{job.folder} holds a run made with other arguments ({how}); "
                "name another --runs, or --force to discard it"
            )


# --- running ------------------------------------------------------------------------------------------------


def start(job: Job) -> subprocess.Popen:
    """Start or resume the run, its output going to its log. Raises UsageError (folder in use), OSError."""
    job.folder.mkdir(parents=True, exist_ok=True)
    resuming = (job.folder / "checkpoint.pt").exists()
    if any(job.folder.iterdir()):
        require(
            (job.folder / ".lock").exists(), f"--runs: {job.folder} is not empty and not the folder of a run"
        )
        lock_folder(job.folder, "--runs").close()  # held: a run left by a killed benchmark is still going on
        resuming &= not differences(run_args(job.folder), job)
        if not resuming:
            shutil.rmtree(job.folder)
    folder_args = ["--resume", str(job.folder)] if resuming else ["--run-dir", str(job.folder)]
    command = [sys.executable, str(job.script), *job.arguments, "--no-progress"]
    with open(job.log, "ab" if resuming else "wb") as log:
        # A session of its own: Ctrl-C on the terminal would reach the run too, and a second signal skips its
        # checkpoint.
        return subprocess.Popen(
            [*command, *folder_args], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def last_line(log: Path) -> str:
    """What a run said last."""
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def steps_done(folder: Path) -> int:
    """Environment steps a run has logged so far."""
    try:
        with open(folder / "progress.csv", "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 4096, 0))
            lines = file.read().split(b"\n")[:-1]
        return int(lines[-1].split(b",")[0])
    except (OSError, ValueError, IndexError):
        return 0


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The list of stop signals received so far: noted, not raised, so that no run is lost between start and
    bookkeeping."""
    received: list[int] = []
    wanted = [
        each
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(each) != signal.SIG_IGN
    ]
    before = {each: signal.signal(each, lambda number, _frame: received.append(number)) for each in wanted}
    try:
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def run_all(jobs: list[Job], side_by_side: int) -> tuple[list[str], int]:
    """Run the jobs, at most `side_by_side` at a time, recording each when it ends; the failures, and a stop
    signal or 0.

    A run's successor is started before anything else is done, so that its core does not wait.
    """
    queue, running, failures, told = list(jobs), dict[subprocess.Popen, Job](), list[str](), 0
    total, done = sum(job.total_steps for job in jobs), 0
    bar = tqdm(total=total, unit="step", unit_scale=True, dynamic_ncols=True, disable=None, smoothing=0.05)
    bar.update(sum(steps_done(job.folder) for job in jobs))
    # what was done before this start is no measure of the speed
    bar.start_t, bar.initial = time.time(), bar.n
    ended = 0

    def fail(job: Job, reason: str) -> None:
        failures.append(f"{job}: {reason}")
        tqdm.write(f"FAILED {failures[-1]}", file=sys.stderr)

    with stop_signals() as signals, bar:
        try:
            while queue or running:
                if len(signals) > told:
                    # The first lets the runs reach a checkpoint, the second ends them at once, the third
                    # kills.
                    told = len(signals)
                    queue.clear()
                    for process in running:
                        process.send_signal(signal.SIGINT if told <= 2 else signal.SIGKILL)
                    tqdm.write(
                        f"stopping {len(running)} runs; each writes a checkpoint first", file=sys.stderr
                    )
                finished = [process for process in running if process.poll() is not None]
                ending = {process: running.pop(process) for process in finished}
                while queue and len(running) < side_by_side:
                    job = queue.pop(0)
                    try:
                        running[start(job)] = job
                    except (UsageError, OSError) as error:
                        fail(job, str(error))
                for process, job in ending.items():
                    ended += 1
                    if process.returncode == 0:
                        done += job.total_steps
                        try:
                            entry = record(job, side_by_side)
                        except RunFault as error:
                            fail(job, str(error))
                            continue
                        final = f"{entry['mean']:.2f} ± {entry['std']:.2f} over {entry['episodes']} episodes"
                        speed = f"{entry['steps']:,} steps, {entry['sps']:,.0f} steps/s"
                        tqdm.write(f"{job}: {final}, {speed}")
                    elif not signals:
                        done += job.total_steps
                        fail(job, f"exit status {process.returncode}: {last_line(job.log)} (log: {job.log})")
                waiting = sum(steps_done(job.folder) for job in [*running.values(), *queue])
                bar.set_description_str(f"{ended}/{len(jobs)} runs", refresh=False)
                bar.update(done + waiting - bar.n)
                if not finished:
                    time.sleep(POLL)
        finally:
            for process in running:  # only after an error of this script's own
                process.send_signal(signal.SIGINT)
    return failures, signals[0] if signals else 0


# --- running on a Ray cluster -------------------------------------------------------------------------------


def in_use(folder: Path) -> bool:
    """Whether a run that is going on holds the folder."""
    try:
        with open(folder / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def run_here(job: Job) -> str:
    """Make a run on the node that this is called on, to its end; why it failed, or "".

    Where the run was begun on a node that the cluster has lost, but which still lives and works on, it is
    left to it.
    """
    while True:
        while in_use(job.folder):
            time.sleep(POLL)
        if is_finished(job):
            return ""
        try:
            process = start(job)
            try:
                status = process.wait()
            except BaseException:  # cancelled: Ctrl-C where the benchmark was started
                process.send_signal(signal.SIGINT)
                process.wait()
                raise
            reason = f"exit status {status}: {last_line(job.log)} (log: {job.log})" if status else ""
        except (UsageError, OSError) as error:
            reason = str(error)
        if not (reason and in_use(job.folder)):  # else the other one was only slower to take the folder
            return reason


def run_on_ray(jobs: list[Job], address: str) -> tuple[list[str], int]:
    """As `run_all`, by the nodes of a Ray cluster. Raises UsageError."""
    require(importlib.util.find_spec("ray") is not None, "--ray needs Ray: pip install -e '.[ray]'")
    import ray

    paths = [str(Path(__file__).parent), str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    path = os.pathsep.join(os.path.abspath(part) for whole in paths for part in whole.split(os.pathsep))
    try:
        if place := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address):  # Ray itself would try for minutes
            socket.create_connection((place[1], int(place[2])), timeout=10).close()
        ray.init(
            address, runtime_env={"env_vars": {"PYTHONPATH": path}}, log_to_driver=False,
            logging_level=logging.ERROR,
        )  # fmt: skip
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        raise UsageError(f"--ray {address}: {str(error).splitlines()[0]}") from error
    failures, told = list[str](), 0
    with contextlib.ExitStack() as stack:
        stack.callback(ray.shutdown)
        signals = stack.enter_context(stop_signals())
        bar = stack.enter_context(tqdm(total=len(jobs), unit="run", dynamic_ncols=True, disable=None))
        cores = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes())
        # a lost node is no fault of the run's: it is sent to another as often as that happens
        remote = ray.remote(num_cpus=1, max_retries=-1)(run_here)
        running = {remote.remote(absolute(job)): job for job in jobs}
        while running:
            if len(signals) > told:
                told = len(signals)
                tqdm.write(f"stopping {len(running)} runs; each writes a checkpoint first", file=sys.stderr)
                for task in running:
                    ray.cancel(task, force=told > 1)
            finished, _ = ray.wait(list(running), timeout=POLL)
            for task in finished:
                job = running.pop(task)
                bar.update()
                try:
                    if reason := ray.get(task):
                        raise RunFault(reason)
                    entry = record(job, min(cores, len(jobs)))
                    final = f"{entry['mean']:.2f} ± {entry['std']:.2f} over {entry['episodes']} episodes"
                    tqdm.write(f"{job}: {final}, {entry['steps']:,} steps, {entry['sps']:,.0f} steps/s")
                except (RunFault, ray.exceptions.RayError) as error:
                    if not signals:
                        failures.append(f"{job}: {str(error).splitlines()[0]}")
                        tqdm.write(f"FAILED {failures[-1]}", file=sys.stderr)
    return failures, signals[0] if signals else 0


def absolute(job: Job) -> Job:
    """The job with whole paths: a node's working directory is another."""
    found = dataclasses.replace(job, folder=job.folder.absolute(), results=job.results.absolute())
    return dataclasses.replace(found, script=job.script.absolute())


# --- the table ----------------------------------------------------------------------------------------------


@cache
def is_in_history(commit: str | None, repository: Path) -> bool:
    """Whether a run's code was that of a commit, unchanged, that leads to the repository's present one.

    Where there is no repository to ask (an installed package), every commit passes that is one.
    """
    if not commit or commit.endswith("-dirty"):
        return False
    git = ["git", "-C", str(repository)]
    try:
        if subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True).returncode:
            return True
        asked = [*git, "merge-base", "--is-ancestor", commit, "HEAD"]
        return subprocess.run(asked, capture_output=True).returncode == 0
    except OSError:  # no git
        return True


def table(folders: Sequence[Path]) -> str:
    """One line for each results/AGENT/TASK among `folders` that holds results. Raises UsageError."""
    lines = [
        ("agent", "task", "steps", "seeds", "final evaluation: mean ± std over seeds [min .. max]", "steps/s")
    ]
    notes = {
        "*": "the seeds were run by several commits",
        "†": "by changed code, or a commit not in the history",
    }
    shown = ""
    for folder in folders:
        if not (seeds := read_seeds(folder)):
            continue
        means = [entry["mean"] for entry in seeds.values()]
        std = f"{np.std(means, ddof=1):.1f}" if len(means) > 1 else "-"
        commits = {entry["commit"] for entry in seeds.values()}
        lost = not all(is_in_history(commit, REPOSITORY) for commit in commits)
        marks = "*" * (len(commits) > 1) + "†" * lost
        shown += marks
        speed = float(np.median([entry["sps"] for entry in seeds.values()]))
        steps = max(entry["steps"] for entry in seeds.values())
        summary = f"{np.mean(means):.1f} ± {std} [{min(means):.1f} .. {max(means):.1f}]"
        task = json.loads((folder / "meta.json").read_text())
        row = (task["agent"], task["env"], f"{steps:,}", f"{len(seeds)}{marks}", summary, f"{speed:,.0f}")
        lines.append(row)
    if len(lines) == 1:
        return "no results yet"
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = [f"{{:<{w}}}" if i in (0, 1, 4) else f"{{:>{w}}}" for i, w in enumerate(widths)]
    text = "\n".join(
        "  ".join(cell.format(value) for cell, value in zip(aligned, line, strict=True)) for line in lines
    )
    return text + "".join(f"\n{mark} {note}: see meta.json" for mark, note in notes.items() if mark in shown)


def report(args: Args) -> None:
    """Print the table of all results, or of the agents and tasks given. Raises UsageError."""
    require(args.results.is_dir(), f"--results {args.results}: no such folder")
    folders = sorted(path.parent for path in args.results.glob("*/*/meta.json"))
    chosen = []
    for folder in folders:
        if args.agent and folder.parent.name not in args.agent:
            continue
        if args.env and folder.name not in [re.sub(r"[^\w.-]+", "_", env) for env in args.env]:
            continue
        chosen.append(folder)
    print(table(chosen))


def benchmark(args: Args, command: str) -> int:
    """Do what the arguments say; the exit status. Raises UsageError, RunFault."""
    if args.report:
        report(args)
        return 0
    jobs = plan(args)
    with contextlib.ExitStack() as stack:
        # a second benchmark of the same runs has to wait
        for folder in dict.fromkeys(job.folder.parent for job in jobs):
            make_folder(folder, "--runs")
            stack.enter_context(lock_folder(folder, "--runs"))
        for folder in dict.fromkeys(job.results for job in jobs):
            make_folder(folder, "--results")
        if not args.force:
            refuse_mixing(jobs)
        todo = []
        for job in jobs:
            if is_recorded(job):
                continue
            if is_finished(job):
                record(job, args.jobs)  # this script was killed before it came to that
            else:
                todo.append(job)
        if skipped := len(jobs) - len(todo):
            print(f"{skipped} of {len(jobs)} runs are finished and skipped", flush=True)
        failures, stopped = run_on_ray(todo, args.ray) if args.ray else run_all(todo, args.jobs)
        keep_agents(jobs)
    print(table(list(dict.fromkeys(job.results for job in jobs))), flush=True)
    if stopped:
        print(f"interrupted; to go on: {command}", file=sys.stderr)
        return 128 + stopped
    if failures:
        print(f"{len(failures)} of {len(jobs)} runs failed:", *failures, sep="\n  ", file=sys.stderr)
    return 1 if failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and tell in one line what is wrong; the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    command = shlex.join(["python", "scripts/benchmark.py", *given])
    told = f"interrupted; to go on: {command}"  # before the first run is started, or after the last has ended
    return script_main(Args, __doc__, lambda args: benchmark(args, command), given, told)


if __name__ == "__main__":
    sys.exit(main())
