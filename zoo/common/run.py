"""A training run seen from outside the algorithm: its folder, reports, evaluations and checkpoints.

    run = Run(args, "ppo", envs, evaluate_envs)
    if (state := run.restore()) is not None: ...              # --resume
    while run.step < args.total_steps:
        ...
        run.report(step, state, metrics, episodes, policy)    # the end of one iteration
    return run.finish(state, policy, acting)

Nothing here draws from the random generators of training, so that neither a checkpoint nor an evaluation changes a run.
"""

import contextlib
import dataclasses
import importlib.util
import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from tqdm import tqdm

from zoo.common.envs import VectorEnv
from zoo.common.errors import RunFault, UsageError
from zoo.common.files import Table, describe, load_checkpoint, lock_folder, portable, save_checkpoint, writing

if TYPE_CHECKING:
    from zoo.common.cli import RunArgs

Policy = Callable[[np.ndarray], np.ndarray]  # observations (N, D) to actions (N,) or (N, A), without noise

COLUMNS = ["step", "wall_time", "sps", "train_return", "train_length", "eval_return", "eval_std"]
CHARTS = {"learning_rate"}  # CleanRL's dashboards look for it beside the returns, not among the losses
KEPT = ("hidden", "shared_network", "value_network", "optimizer", "buffer_size")  # else a resumed run's state does not fit
MAX_EPISODE = 100_000  # steps after which an evaluation episode counts as endless


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended the run; `signal_number` says which."""

    def __init__(self, signal_number: int):
        super().__init__(f"signal {signal_number}")
        self.signal_number = signal_number


class Run:
    """One training run: `report` after every iteration, `finish` at the end. It holds its folder until closed."""

    latest: ClassVar["Run | None"] = None  # for the command line, which says after a fault how to resume
    stop_signal: ClassVar[int] = 0  # a signal received, on which the next report acts

    def __init__(self, args: "RunArgs", agent: str, envs: VectorEnv, evaluate_envs: Callable[[], VectorEnv]):
        """Open a new folder, or the one that `args.resume` names; `evaluate_envs` is called when an evaluation is due.

        Raises UsageError (folder not empty or in use, checkpoint unusable, wandb missing) or RunFault (cannot write).
        """
        if args.track and importlib.util.find_spec("wandb") is None:
            raise UsageError("--track needs Weights & Biases: pip install wandb")
        self.args, self.agent = args, agent
        self.step = 0  # environment steps done, over all environments
        self.saved_step: int | None = None  # those of the checkpoint on disk
        self._make_eval_envs = evaluate_envs
        self._eval_envs: VectorEnv | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=100)  # (return, length) of the last episodes
        self._state: dict | None = None
        self._open = contextlib.ExitStack()  # what close() has to close
        self.folder = Path(args.resume) if args.resume else new_folder(args, agent)
        self._checkpoint = self.folder / "checkpoint.pt"
        with self._closed_on_error(), writing(self.folder):
            wall_time = self._resume() if args.resume else self._begin()
            describe(self.folder / "args.json", dataclasses.asdict(args), agent, envs.engine, self.step)
            self._table = Table(self.folder / "progress.csv", COLUMNS, last_step=self.step)
            self._open.callback(self._table.close)
            if args.track:
                import wandb

                wandb.init(
                    project=args.track_project, name=self.folder.name, id=self.folder.name, resume="allow",
                    dir=str(self.folder), config=dataclasses.asdict(args), sync_tensorboard=True,
                )  # fmt: skip
                self._open.callback(wandb.finish)
            from torch.utils.tensorboard import SummaryWriter  # half a second, spared to those who import this file only

            purge = self.step + 1 if args.resume else None  # what a killed run logged beyond its checkpoint
            self._writer = SummaryWriter(str(self.folder), purge_step=purge)
            self._open.callback(self._writer.close)
        self._bar = tqdm(
            total=args.total_steps, initial=self.step, unit="step", dynamic_ncols=True, mininterval=0.5,
            disable=None if args.progress else True,  # None: shown on a terminal only, not in log files
        )  # fmt: skip
        self._open.callback(self._bar.close)
        self._saved_at = time.perf_counter()
        self._started = self._saved_at - wall_time
        Run.latest = self

    def _begin(self) -> float:
        self._open.enter_context(lock_folder(self.folder, "--run-dir"))
        return 0.0

    def _resume(self) -> float:
        if self._checkpoint.is_file():  # else load_checkpoint says so, and no lock file is left in a foreign folder
            self._open.enter_context(lock_folder(self.folder, "--resume"))
        saved = load_checkpoint(self._checkpoint, "--resume", self.agent, self.args.env)
        rows = ("num_envs",) if "buffer_size" in saved["args"] else ()  # a replay buffer's rows are as wide
        for name in saved["args"].keys() & {*KEPT, *rows}:
            was, wanted = saved["args"][name], getattr(self.args, name)
            if was != wanted:
                raise UsageError(
                    f"--{name.replace('_', '-')} {wanted}: the run in {self.folder} was made with {was} and keeps it"
                )
        for leftover in self.folder.glob("*.tmp"):  # of a write that a kill cut short
            leftover.unlink()
        self.step = self.saved_step = saved["step"]
        self._recent.extend((return_, length) for return_, length in saved["run"]["recent"])
        self._state = saved["state"]
        return saved["run"]["wall_time"]

    def restore(self) -> dict | None:
        """The `state` of the checkpoint resumed from, tensors on the CPU, handed out once; None in a new run."""
        state, self._state = self._state, None
        return state

    def report(
        self, step: int, state: Mapping, metrics: Mapping[str, float | torch.Tensor],
        episodes: Sequence[tuple[float, int]], policy: Policy,
    ) -> None:  # fmt: skip
        """End an iteration: log it; evaluate and checkpoint when due; act on Ctrl-C.

        step: environment steps done. state: everything needed to go on, nested dicts of finite tensors, numbers and
        strings. metrics: numbers or 0-d tensors. episodes: (return, length) of those ended since the last report.
        Raises RunFault for a non-finite metric or state, before the last checkpoint is touched; Interrupted.
        """
        with self._closed_on_error():
            values = {name: float(value) for name, value in metrics.items()}
            for name, value in values.items():
                if not math.isfinite(value):
                    raise RunFault(f"{name} became {value} in the iteration that ended at step {step:,}")
            crossed = self.args.eval_every > 0 and step // self.args.eval_every > self.step // self.args.eval_every
            evaluating = crossed and step < self.args.total_steps  # at the end `finish` evaluates
            now, self.step = time.perf_counter(), step
            saving = evaluating or now - self._saved_at >= self.args.checkpoint_every or bool(Run.stop_signal)
            content = portable(state) if saving else None  # refuses a non-finite state, before it is evaluated
            self._recent.extend((float(return_), int(length)) for return_, length in episodes)
            wall_time = now - self._started
            row = {"step": step, "wall_time": round(wall_time, 3), "sps": round(step / wall_time, 1)}
            if self._recent:
                row["train_return"], row["train_length"] = np.mean(self._recent, axis=0).tolist()
                self._bar.set_postfix_str(f"return {row['train_return']:.1f}", refresh=False)
            if evaluating:
                row |= self._evaluation(policy)
            with writing(self.folder):
                self._table.append(row | values)
                self._log(row, values, episodes)
                if content is not None:
                    self._save(content)
            self._bar.update(step - self._bar.n)
            if Run.stop_signal and saving:
                raise Interrupted(Run.stop_signal)

    def finish(self, state: Mapping, policy: Policy, acting: Mapping) -> float:
        """Evaluate for the last time, write checkpoint.pt and agent.pt (holding `acting`), close; the mean return.

        Raises RunFault.
        """
        with self._closed_on_error():
            content, agent_content = portable(state), portable(acting, "acting")
            row = self._evaluation(policy)
            with writing(self.folder):
                self._table.amend_last({"step": self.step, **row})
                self._log(row, {}, [])
                self._save(content)
                save_checkpoint(self.folder / "agent.pt", {**self._identity(), "state": agent_content})
        self.close()
        mean, std = row["eval_return"], row["eval_std"]
        print(f"final evaluation: {mean:.2f} ± {std:.2f} over {self.args.eval_episodes} episodes", flush=True)
        return mean

    def close(self) -> None:
        """Release the folder, the bar and the logs; the checkpoint stays as it is. May be called again."""
        with contextlib.suppress(OSError):  # a full disk, already told, fails once more when the logs are flushed
            self._open.close()

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _evaluation(self, policy: Policy) -> dict[str, float]:
        if self._eval_envs is None:
            self._eval_envs = self._make_eval_envs()
            self._open.callback(self._eval_envs.close)
        returns, _ = evaluate(policy, self._eval_envs, self.args.eval_episodes, self.args.seed)
        return {"eval_return": float(returns.mean()), "eval_std": float(returns.std())}

    def _log(self, row: Mapping[str, float], values: Mapping[str, float], episodes: Sequence[tuple[float, int]]) -> None:
        scalars = {f"{'charts' if name in CHARTS else 'losses'}/{name}": value for name, value in values.items()}
        if episodes:
            mean_return, mean_length = np.mean(episodes, axis=0)
            scalars |= {"charts/episodic_return": mean_return, "charts/episodic_length": mean_length}
        keys = {"sps": "charts/SPS", "eval_return": "eval/return", "eval_std": "eval/std"}
        scalars |= {key: row[name] for name, key in keys.items() if name in row}
        # one event for all of them: add_scalar, 60 us each, would cost more than the rest of a report
        from tensorboard.compat.proto.summary_pb2 import Summary

        values_of = [Summary.Value(tag=key, simple_value=value) for key, value in scalars.items()]
        self._writer._get_file_writer().add_summary(Summary(value=values_of), self.step)

    def _identity(self) -> dict:
        return {"agent": self.agent, "env": self.args.env, "args": portable(dataclasses.asdict(self.args), "args")}

    def _save(self, state: dict) -> None:
        self._table.sync()  # the table must never be behind the checkpoint
        bookkeeping = {"wall_time": time.perf_counter() - self._started, "recent": list(self._recent)}
        save_checkpoint(self._checkpoint, {**self._identity(), "step": self.step, "state": state, "run": bookkeeping})
        self.saved_step, self._saved_at = self.step, time.perf_counter()


def evaluate(policy: Policy, envs: VectorEnv, episodes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (episodes,) and lengths (episodes,) of a deterministic policy, in rounds of `envs.num_envs` episodes.

    Each slot plays exactly one episode a round: taking the first `episodes` to end would favour the short ones. Where they
    begin depends on `seed` alone; two seeds, or evaluation and training, hardly share a start.
    Raises RunFault when an episode does not end within MAX_EPISODE steps.
    """
    returns, lengths = np.zeros(0), np.zeros(0, dtype=np.int64)
    first = int(np.random.SeedSequence(seed).generate_state(1)[0]) >> 1  # 31 random bits, for neighbours would overlap
    while len(returns) < episodes:
        obs = envs.reset(first + len(returns))
        slots = min(envs.num_envs, episodes - len(returns))
        total, length, running = np.zeros(slots), np.zeros(slots, dtype=np.int64), np.ones(slots, dtype=bool)
        while running.any():
            step = envs.step(policy(obs))
            obs = step.obs
            total += np.where(running, step.reward[:slots], 0.0)
            length += running
            running &= ~(step.terminated | step.truncated)[:slots]
            if running.any() and length.max() >= MAX_EPISODE:
                raise RunFault(f"{envs.env_id}: an evaluation episode did not end in {MAX_EPISODE:,} steps; add a time limit")
        returns, lengths = np.concatenate([returns, total]), np.concatenate([lengths, length])
    return returns, lengths


def new_folder(args: "RunArgs", agent: str) -> Path:
    """Make --run-dir, or runs/ENV__ALGO__SEED__TIME. Raises UsageError when it cannot be used."""
    env, now = re.sub(r"[^\w.-]+", "_", args.env), int(time.time())
    folder = Path(args.run_dir) if args.run_dir else Path("runs") / f"{env}__{agent}__{args.seed}__{now}"
    try:
        while not args.run_dir and folder.exists():  # the same run started twice in one second
            now += 1
            folder = folder.with_name(f"{env}__{agent}__{args.seed}__{now}")
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            is_run = (folder / "checkpoint.pt").exists()
            advice = f"to go on with the run in it use --resume {folder}" if is_run else "name a new one"
            raise UsageError(f"--run-dir {folder}: not empty; {advice}")
    except OSError as error:
        raise UsageError(f"--run-dir {folder}: cannot be made: {error.strerror}") from error
    return folder
