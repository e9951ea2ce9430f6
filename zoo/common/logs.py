"""What a run tells as it goes: progress.csv, TensorBoard, Weights & Biases, the terminal's bar and lines."""

import contextlib
import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from zoo.common.args import RunArgs
from zoo.common.errors import UsageError
from zoo.common.files import Table, write_atomically

COLUMNS = ["step", "wall_time", "sps", "train_return", "train_length", "eval_return", "eval_std"]
CHARTS = {"learning_rate"}  # CleanRL's dashboards look for it beside the returns, not among the losses


def tracked_id(folder: Path) -> str:
    """What names the run in `folder` at Weights & Biases, where folders of one name are many: drawn once and
    kept in it, so that a resumed run finds its own. Raises OSError.
    """
    path = folder / "wandb" / "id"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, lambda file: file.write(secrets.token_hex(8).encode()))
    return path.read_text()


class Logs:
    """The logs of the run in `folder`, of which `step` is done already; open until closed."""

    def __init__(self, folder: Path, args: RunArgs, step: int, rows: int | None, unit: str):
        """Open them; of those of a resumed run, what was logged beyond `step` is dropped, and of the table
        what was beyond so many rows. Raises OSError; UsageError where Weights & Biases refuses."""
        self._open = contextlib.ExitStack()
        self.table = Table(folder / "progress.csv", COLUMNS, last_step=step, most=rows)
        self._open.callback(self.table.close)
        self._tracked: Any = None  # the run at Weights & Biases
        if args.track:
            import wandb

            # it could read TensorBoard's files, but reads them thrice where it writes into their folder
            try:
                self._tracked = wandb.init(
                    project=args.track_project, name=str(folder).removeprefix("runs/")[-128:],
                    id=tracked_id(folder), resume="allow", dir=str(folder), config=dataclasses.asdict(args),
                )  # fmt: skip
            except wandb.Error as error:
                offline = "WANDB_MODE=offline keeps what is logged in the run's folder"
                raise UsageError(f"--track: {' '.join(str(error).split())} {offline}") from error
            self._open.callback(self._tracked.finish)
        # half a second, spared to those who import this file only
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if args.resume else None)
        self._open.callback(self._writer.close)
        self._bar = tqdm(
            total=args.total_steps, initial=step, unit=f" {unit}", dynamic_ncols=True, mininterval=0.5,
            disable=None if args.progress else True,  # None: shown on a terminal only, not in log files
        )  # fmt: skip
        self._open.callback(self._bar.close)

    def report(
        self, row: Mapping[str, float], values: Mapping[str, float], episodes: Sequence[tuple[float, int]]
    ) -> None:
        """An iteration's row, its metrics among it, and the episodes that ended in it. Raises OSError."""
        self.table.append({**row, **values})
        scalars = {
            f"{'charts' if name in CHARTS else 'losses'}/{name}": value for name, value in values.items()
        }
        if episodes:
            mean_return, mean_length = np.mean(episodes, axis=0)
            scalars |= {"charts/episodic_return": mean_return, "charts/episodic_length": mean_length}
        self._add(int(row["step"]), scalars | {"charts/SPS": row["sps"]})
        if "train_return" in row:
            self._bar.set_postfix_str(f"return {row['train_return']:.1f}", refresh=False)
        self._bar.update(int(row["step"]) - self._bar.n)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Add an evaluation's values to the last row, that of `step`. Raises OSError."""
        self.table.amend_last({"step": step, **values})
        self._add(step, {f"eval/{name.removeprefix('eval_')}": value for name, value in values.items()})

    def close(self) -> None:
        """Close all of them. Raises OSError."""
        self._open.close()

    def _add(self, step: int, scalars: Mapping[str, float]) -> None:
        # one event for all of them: add_scalar, 60 us each, would cost more than the rest of a report
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=key, simple_value=value) for key, value in scalars.items()]
        self._writer._get_file_writer().add_summary(Summary(value=values), step)
        if self._tracked:
            self._tracked.log({**scalars, "global_step": step})
