"""Write a trained agent as an ONNX file, for programs without Python or without torch.

    python scripts/export.py runs/MY_RUN
    python scripts/export.py results/ppo/CartPole-v1 --out cartpole.onnx

The file takes `obs`, a batch (N, ...) of the environment's own observations, and gives `action`, the batch of
actions without noise as the environment's step takes them: normalisation, scaling and bounds are in it.
Needs the extra `export`: pip install -e '.[export]'.
"""

import contextlib
import importlib
import importlib.util
import io
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn

import zoo
from zoo.common.agent import Agent
from zoo.common.args import require
from zoo.common.cli import script_main
from zoo.common.errors import RunFault
from zoo.common.files import write_atomically

OPSET = 18  # of 2022: what reads ONNX at all reads that


@dataclass
class Args:
    run: Annotated[str, tyro.conf.Positional]
    """folder of a finished run or of results/, or an agent.pt"""
    out: Path = Path("agent.onnx")
    """file to write"""


class Exported(nn.Module):
    """obs (N, ...) to actions (N, ...), both the environment's: what `Agent.policy` does, in torch alone."""

    def __init__(self, agent: Agent):
        super().__init__()
        self.envs, (self.net, self.policy) = agent.envs, _network(agent)

    def forward(self, obs: Tensor) -> Tensor:
        envs = self.envs
        action = self.policy(obs.reshape(-1, envs.obs_dim)).mode()
        if envs.discrete:
            return action + envs.action_start
        low, high = torch.as_tensor(envs._low), torch.as_tensor(envs._high)
        scaled = action * torch.as_tensor(envs.action_scale) + torch.as_tensor(envs.action_shift)
        scaled = torch.minimum(torch.maximum(scaled, low), high)
        scaled = scaled.round() if envs._whole else scaled
        dtype = torch.from_numpy(np.empty(0, envs.action_dtype)).dtype
        return scaled.to(dtype).reshape(-1, *envs.action_shape)


def _network(agent: Agent) -> tuple[nn.Module, Callable[[Any], Any]]:
    """The agent's network and its function from observations (N, D) to the policy's distribution.

    They are those that its file's `make_policy` gives to `policy_at`, however it builds them.
    """
    module: Any = importlib.import_module(f"zoo.{agent.name}")
    stepwise = hasattr(module, "make_schedule")  # dppo.py
    require(not stepwise, f"{agent!r}: its action is sampled step by step, which is not exported")
    asked = f"{agent!r}: zoo/{agent.name}.py's make_policy has to call policy_at(net, ...), which is exported"
    require(hasattr(module, "policy_at"), asked)
    policy_at = module.policy_at
    made: list[tuple[nn.Module, Callable[[Any], Any]]] = []

    def noted(net: nn.Module, *rest: Any) -> Callable[[Any], Any]:
        made.append((net, policy_at(net, *rest)))
        return made[-1][1]

    module.policy_at = noted
    try:
        module.make_policy(agent.envs, agent.args, agent.state)
    finally:
        module.policy_at = policy_at
    require(bool(made), asked)
    return made[-1]


def to_onnx(agent: Agent) -> bytes:
    """The agent as an ONNX model, inputs `obs` (N, ...), outputs `action` (N, ...)."""
    envs = agent.envs
    obs = torch.from_numpy(np.zeros((2, *envs.obs_shape), envs.dtype))
    batch = torch.export.Dim("N")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Exported(agent).eval(), (obs,), input_names=["obs"], output_names=["action"],
            dynamic_shapes=({0: batch},), opset_version=OPSET, dynamo=True, verbose=False,
        )  # fmt: skip
    model: Any = program.model_proto if program else None
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del part.metadata_props[:]  # among it the paths of this machine's source files
    for name, value in (("agent", agent.name), ("env", agent.env)):
        model.metadata_props.add(key=name, value=value)
    return model.SerializeToString()


def export(args: Args) -> None:
    """Write an agent as ONNX. Raises UsageError, RunFault."""
    require(args.run != "", "run is empty; a folder is meant")  # Path("") is the current one
    for package in ("onnx", "onnxscript"):
        found = importlib.util.find_spec(package) is not None
        require(found, f"export needs {package}, which is missing: pip install -e '.[export]'")
    require(args.out.parent.is_dir(), f"--out {args.out}: no such folder as {args.out.parent}")
    require(args.out.suffix == ".onnx", f"--out {args.out}: end the name in .onnx")
    require(not args.out.is_dir(), f"--out {args.out}: is a folder; a file is meant")
    agent = zoo.load(args.run)
    model = to_onnx(agent)
    try:
        write_atomically(args.out, lambda file: file.write(model))
    except OSError as error:
        raise RunFault(f"--out {args.out}: {error.strerror or error}") from error
    shape = ", ".join(map(str, ("N", *agent.envs.obs_shape)))
    print(f"{args.out}: {agent!r}; obs ({shape}) {agent.envs.dtype} -> action, {len(model):,} bytes")


def main() -> int:
    """Export, or tell in one line what is wrong; the exit status."""
    return script_main(Args, __doc__, export)


if __name__ == "__main__":
    sys.exit(main())
