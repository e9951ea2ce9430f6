"""The arguments that every agent takes, and the checks that refuse in one line what cannot work."""

import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

from zoo.common.errors import UsageError

MOST = 2**63  # beyond torch's and NumPy's integers
LARGEST = 3.4e38  # of float32


@dataclass
class RunArgs:
    """The arguments that every agent takes; its own `Args` inherits them and adds the algorithm's."""

    # What a resumed run cannot change, because its state would not fit or would win over the argument. An
    # agent adds its own: kept: ClassVar = (*RunArgs.kept, "hidden", ...)
    kept: ClassVar[tuple[str, ...]] = ("env", "seed")
    # What does nothing in an agent's runs: taken, for a script may give it to all runs, but not explained
    idle: ClassVar[tuple[str, ...]] = ()

    env: str = "HalfCheetah-v4"  # id of the Gymnasium environment
    seed: int = 1  # seed of everything random
    total_steps: int = 1_000_000  # environment steps of the whole run, over all environments
    num_envs: int = 1  # environments stepped together
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the networks are
    compile: bool = True  # compile the update (torch.compile)
    threads: int = 1  # CPU threads of torch; small networks gain nothing from a second one
    # CPU threads of the MuJoCo engine; 1 when several runs share the machine; None: one a core
    env_threads: int | None = None
    # folder of the run, new, empty or left before its first checkpoint; None: runs/ENV__ALGO__SEED__TIME
    run_dir: str | None = None
    # folder of a run to go on with, from its last checkpoint and with its arguments
    resume: str | None = None
    # environment steps between evaluations, each made when an update ends; 0: at the end only
    eval_every: int = 100_000
    eval_episodes: int = 10  # episodes of an evaluation
    checkpoint_every: float = 60.0  # seconds between checkpoints
    track: bool = False  # log to Weights & Biases as well
    track_project: str = "rl-zoo-classic"  # its project
    progress: bool = True  # show a progress bar (on a terminal only)

    def __post_init__(self) -> None:
        """What Python offers for a tuple and for a path as text is taken for that."""
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, list):
                setattr(self, each.name, tuple(value))
            elif isinstance(value, os.PathLike):
                setattr(self, each.name, os.fspath(value))

    @classmethod
    def for_env(cls, env: str, **given: Any) -> Self:
        """The arguments as the command line would have them: those given, else the task's, else the agent's.

        The task's are in the table SETTINGS of the agent's file, see `settings_for`.
        """
        return cls(**{"env": env, **settings_for(env, lookup_in(cls)), **given})


def settings(args_class: type[RunArgs]) -> dict[str, dict]:
    """The table SETTINGS of the file that the class is in: fields whose defaults differ by task."""
    return getattr(sys.modules[args_class.__module__], "SETTINGS", {})


def lookup_in(args_class: type[RunArgs]) -> Callable[[str], dict]:
    """From a task's id to its settings in that table, {} where it has none of its own."""
    table = settings(args_class)
    return lambda task: table.get(task, {})


def settings_for(env: str, lookup: Callable[[str], dict]) -> dict:
    """A task's settings, {} where there are none. Versions of one task share theirs.

    lookup: from a task's id to its settings, {} where it has none of its own. Hopper-v5 then takes those of
    the nearest version that has some, the older of two, and a line on stderr says so; so does
    FixedHorizon/Hopper-v4 (horizon.py) with those of Hopper-v4.
    """
    played_on = env.rpartition("FixedHorizon/")[2]
    if played_on != env and not lookup(env):
        if others := settings_for(played_on, lookup):
            told = f"{env} has no settings of its own: those of {played_on} are taken"
            print(told, file=sys.stderr, flush=True)
        return others
    version = re.fullmatch(r"(.+-v)(\d{1,3})", env)
    if (own := lookup(env)) or version is None:
        return own
    number = int(version[2])
    for other in sorted(range(number + 10), key=lambda other: (abs(other - number), other)):
        task = f"{version[1]}{other}"
        if others := lookup(task):
            print(f"{env} has no settings of its own: those of {task} are taken", file=sys.stderr, flush=True)
            return others
    return {}


# How --help groups the arguments; what is named here by neither is the algorithm's.
TASK = ("env", "seed", "total_steps", "run_dir", "resume", "eval_every", "eval_episodes")
PLUMBING = (
    "device",
    "compile",
    "threads",
    "env_threads",
    "checkpoint_every",
    "track",
    "track_project",
    "progress",
)


def flag(name: str) -> str:
    """A field's name as it is given on the command line."""
    return f"--{name.replace('_', '-')}"


def as_words(name: str, value: Any) -> list[str]:
    """An argument as the command line has it, word by word."""
    if isinstance(value, bool):
        return [flag(name if value else f"no_{name}")]
    if isinstance(value, (tuple, list)):
        return [flag(name), *map(str, value)]
    return [flag(name), f"{value:.6g}" if isinstance(value, float) else str(value)]


def require(condition: bool, message: str) -> None:
    """Raise UsageError(message) unless the condition holds."""
    if not condition:
        raise UsageError(message)


def _is_plain(value: Any) -> bool:
    """Whether a checkpoint and args.json give back what they are given."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def check_args(
    args: RunArgs,
    at_least_1: Sequence[str] = (),
    at_least_0: Sequence[str] = (),
    fractions: Sequence[str] = (),
    positive: Sequence[str] = (),
    finite: Sequence[str] = (),
) -> None:
    """Refuse common arguments that cannot work, and the agent's own that are named here.

    at_least_1, at_least_0, fractions in [0, 1], positive, finite: names of fields. None passes, and of a
    tuple every element is meant. What is one of several words is looked at in any case: tyro does so on the
    command line only. Agents call it first and `require` what else they need.
    """
    for each in fields(args):
        value = getattr(args, each.name)
        kept = "only numbers, words, None and tuples or dicts of them come back when a run is resumed"
        require(_is_plain(value), f"{flag(each.name)} is a {type(value).__name__}; {kept}")
    for name, kind in get_type_hints(type(args)).items():
        literals = [each for each in (kind, *get_args(kind)) if get_origin(each) is Literal]
        words = [word for each in literals for word in get_args(each)]
        value = getattr(args, name, None)
        fits = not words or value in words or (value is None and type(None) in get_args(kind))
        require(fits, f"{flag(name)} must be one of {', '.join(map(str, words))}, not {value}")
    least = {"seed": 0, "eval_every": 0}
    least |= dict.fromkeys(
        ("total_steps", "num_envs", "threads", "env_threads", "eval_episodes", *at_least_1), 1
    )
    for name, minimum in least.items():
        value = getattr(args, name)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        fits = all(v >= minimum for v in values) and value != ()
        require(fits, f"{flag(name)} must be at least {minimum}, not {value}")
        require(all(v < MOST for v in values), f"{flag(name)} must be less than 2**63, not {value}")
    for name in at_least_0:
        value = getattr(args, name)
        least_of_all = "at least 0 and finite" if isinstance(value, float) else "at least 0"
        require(0 <= value < math.inf, f"{flag(name)} must be {least_of_all}, not {value:g}")
    for name in fractions:
        value = getattr(args, name)
        require(0 <= value <= 1, f"{flag(name)} must lie in [0, 1], not {value:g}")
    for name in positive:
        value = getattr(args, name)
        if value is not None:
            require(0 < value < math.inf, f"{flag(name)} must be greater than 0, not {value:g}")
    for name in finite:
        value = getattr(args, name)
        require(value is None or math.isfinite(value), f"{flag(name)} must be finite, not {value}")
        fits = value is None or abs(value) < LARGEST
        require(fits, f"{flag(name)} must be less than {LARGEST:g} in size, not {value}")
    for name in ("threads", "env_threads"):  # a hundred thousand end in a segmentation fault
        value = getattr(args, name)
        require(value is None or value <= 1024, f"{flag(name)} must be at most 1024, not {value}")
    require(args.seed < 2**31, f"--seed must be less than 2**31, not {args.seed}")
    require(
        args.checkpoint_every > 0,
        f"--checkpoint-every must be greater than 0 seconds, not {args.checkpoint_every:g}",
    )
    for name in ("run_dir", "resume"):  # what a script gives whose variable is not set
        require(getattr(args, name) != "", f"{flag(name)} is empty; a folder is meant")
    require(
        not (args.run_dir and args.resume),
        f"--run-dir {args.run_dir} and --resume {args.resume} exclude each other: "
        "a resumed run stays in its folder",
    )
