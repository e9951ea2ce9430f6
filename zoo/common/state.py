"""A run's state between an agent and a checkpoint: out in a form that holds no code, and back by name.

A state is made of NamedTuples, dicts, lists and tuples of tensors, numbers, strings, torch.Generators and
objects that have `state()` and `restore(state)`, such as a replay buffer.
"""

from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from zoo.common.errors import RunFault
from zoo.common.seeding import generator_seed


def portable(value: Any, where: str = "state") -> Any:
    """The same nested value with tensors on the CPU, fit for `torch.load(weights_only=True)`.

    NamedTuples become dicts, generators their states. Raises RunFault, naming the entry, for a tensor that is
    not finite: a loss can still be finite in the update that ruins the parameters, and such a checkpoint must
    not replace the last good one.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        if not torch.isfinite(value).all():
            raise RunFault(f"{where} has become non-finite")
        # torch.save writes the whole storage behind a view
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    if isinstance(value, torch.Generator):
        return value.get_state()
    if hasattr(value, "_asdict"):
        return {name: portable(item, f"{where}.{name}") for name, item in value._asdict().items()}
    if isinstance(value, dict):
        return {key: portable(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([portable(item, f"{where}[{i}]") for i, item in enumerate(value)])
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "state") and hasattr(value, "restore"):
        return portable(value.state(), where)
    raise TypeError(
        f"{where} is a {type(value).__name__}; a checkpoint holds tensors, generators, numbers, strings, "
        "dicts, lists and tuples"
    )


def restored(fresh: Any, saved: Any, seed: int, step: int, where: str = "state") -> Any:
    """`saved`, made by `portable`, in the form of `fresh`: its types, devices and dtypes, matched by name.

    Generators and objects with `restore` are set in place. A CPU's generator and a GPU's have states of
    different sizes and neither takes the other's: a run that moved goes on with new numbers, from its seed
    and step.
    Raises ValueError, naming the entry, where the two differ in names, kind or shape.
    """
    if isinstance(fresh, torch.Generator):
        if saved.numel() == fresh.get_state().numel():
            fresh.set_state(saved)
        else:
            fresh.manual_seed(generator_seed(seed, where, step))
        return fresh
    if isinstance(fresh, torch.Tensor):
        if not isinstance(saved, torch.Tensor) or saved.shape != fresh.shape:
            found = tuple(saved.shape) if isinstance(saved, torch.Tensor) else saved
            raise ValueError(f"{where} is {found}, where this run's has the shape {tuple(fresh.shape)}")
        return saved.to(fresh.device, fresh.dtype)
    if hasattr(fresh, "_asdict"):
        return type(fresh)(**_entries(fresh._asdict(), saved, seed, step, where, "{}.{}"))
    if isinstance(fresh, dict):
        return _entries(fresh, saved, seed, step, where, "{}[{!r}]")
    if isinstance(fresh, list | tuple):
        if not isinstance(saved, list | tuple) or len(saved) != len(fresh):
            raise ValueError(f"{where} is not a list of {len(fresh)}, as this run's")
        pairs = enumerate(zip(fresh, saved, strict=True))
        return type(fresh)([restored(one, other, seed, step, f"{where}[{i}]") for i, (one, other) in pairs])
    if hasattr(fresh, "state") and hasattr(fresh, "restore"):
        fresh.restore(saved)
        return fresh
    if (fresh is None) != (saved is None) or isinstance(saved, dict | list | tuple | torch.Tensor):
        raise ValueError(f"{where} is a {type(saved).__name__}, where this run's is {fresh!r}")
    return saved


def device_of(state: Any) -> torch.device:
    """Where a state is: on the accelerator if anything of it is, else on the CPU."""
    devices = [leaf.device for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor | torch.Generator)]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def _entries(fresh: dict, saved: Any, seed: int, step: int, where: str, entry: str) -> dict:
    if not isinstance(saved, dict):
        raise ValueError(
            f"{where} is a {type(saved).__name__}, where this run's has entries: {', '.join(map(str, fresh))}"
        )
    for name in (*fresh, *saved):
        if name not in saved:
            raise ValueError(f"{entry.format(where, name)} is missing")
        if name not in fresh:
            raise ValueError(f"{entry.format(where, name)} is unknown to this version of the agent")
    return {name: restored(fresh[name], saved[name], seed, step, entry.format(where, name)) for name in fresh}
