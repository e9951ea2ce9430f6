"""Device, threads, compilation: one source for an agent's functions, run eagerly, compiled, or as CUDA graphs.

An agent's update is a pure function of tensors: parameters as one flat vector, optimiser state and a batch in, the new ones
out. That makes every mode the same code:

    CPU   torch.compile through Inductor's C++ wrapper
    CUDA  torch.compile, and the compiled call captured once in a CUDA graph and replayed
    eager as it stands, by --no-compile or where there is no compiler
"""

import os
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from zoo.common.errors import UsageError


def setup(device: str = "auto", threads: int = 1) -> torch.device:
    """Set the number of torch threads and return the device that "auto", "cpu" or "cuda" names.

    One thread is the default: matrices of 64 x 64 gain nothing from a second one, and two runs side by side, two threads each
    on two cores, slow each other down several times over.
    """
    torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def flatten(module: nn.Module) -> tuple[Tensor, Callable[[Tensor], dict[str, Tensor]]]:
    """A module's parameters as one vector (P,), and the function that turns such a vector back into named views of it.

    Optimiser, clipping and line search are then single vector operations, and `functional_call(module, unflatten(v), ...)` of
    torch.func runs the module at any point v.
    """
    named = [(name, parameter.shape, parameter.numel()) for name, parameter in module.named_parameters()]
    names, shapes, sizes = zip(*named, strict=True)

    def unflatten(vector: Tensor) -> dict[str, Tensor]:
        views = vector.split(sizes)
        return {name: view.view(shape) for name, view, shape in zip(names, views, shapes, strict=True)}

    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]), unflatten


def restore_generator(generator: torch.Generator, state: Tensor, seed: int) -> None:
    """Go on with a checkpoint's random numbers, or, where the run was on another kind of device, with new ones from `seed`.

    A CPU's generator and a GPU's have states of different sizes, and neither takes the other's.
    """
    if state.numel() == generator.get_state().numel():
        generator.set_state(state)
    else:
        generator.manual_seed(seed)


def compile_function(function: Callable, device: torch.device, enabled: bool = True) -> Callable:
    """The pure `function` of tensors, compiled for `device`; itself if not `enabled`.

    Where compilation fails (no C++ compiler, say) one warning line is printed and the function runs eagerly.
    """
    return _Compiled(function, device) if enabled else function


class _Compiled:
    """A compiled function that times its first call and falls back to eager if that fails to compile."""

    warned = False  # once a process
    seconds = 0.0  # spent in first calls, all compiled functions of the process together

    def __init__(self, function: Callable, device: torch.device):
        # The agents' functions close over constants only, so what can change between two calls is the shape of a tensor:
        # checking nothing else saves a third of the time of a small update (guards 110 us of 290 us measured).
        options: dict[str, Any] = {"guard_filter_fn": lambda guards: [g.guard_type == "TENSOR_MATCH" for g in guards]}
        if device.type == "cpu":
            options["cpp_wrapper"] = True  # calls the kernels from C++: 180 us an update against 267 us from Python
            os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compile processes beside a small run
        # Dynamo keeps compiled code by code object, which all closures of one inner function share; the constants they close
        # over are not guarded, so each gets a code object of its own
        function = types.FunctionType(
            function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        self.eager = function
        self.call: Callable = torch.compile(function, fullgraph=True, dynamic=False, options=options)
        if device.type == "cuda":
            self.call = _CudaGraph(self.call)
        self.ready = False

    def __call__(self, *args: Any) -> Any:
        if self.ready:
            return self.call(*args)
        start = time.perf_counter()
        try:
            result = self.call(*args)
        except Exception as error:  # whatever the toolchain raises; an error of the function's own is raised again by eager
            result = self.eager(*args)
            reason = " ".join(str(error).split())[:120]
            if not _Compiled.warned:
                print(f"warning: torch.compile failed, running {self.eager.__name__} eagerly ({reason})", file=sys.stderr)
            _Compiled.warned = True
            self.call = self.eager
        self.ready = True
        _Compiled.seconds += time.perf_counter() - start
        return result


def compile_seconds() -> float:
    """Seconds this process has spent compiling so far (the first call of each compiled function)."""
    return _Compiled.seconds


class _CudaGraph:
    """Captures a pure function once for each set of argument shapes; a call copies its arguments in, replays, copies out.

    The function may neither change its arguments nor draw random numbers: noise comes in as an argument.
    """

    def __init__(self, function: Callable):
        self.function = function
        self.captured: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Any]] = {}

    def __call__(self, *args: Any) -> Any:
        leaves, structure = tree_flatten(args)
        key = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if key not in self.captured:
            self.captured[key] = self._capture(leaves, structure)
        graph, inputs, outputs = self.captured[key]
        for static, leaf in zip(inputs, leaves, strict=True):
            static.copy_(leaf, non_blocking=True)
        graph.replay()
        return tree_map(torch.clone, outputs)  # the next replay overwrites the captured outputs

    def _capture(self, leaves: list[Tensor], structure: Any) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any]:
        inputs = [leaf.detach().to("cuda", copy=True) for leaf in leaves]
        args = tree_unflatten(inputs, structure)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and lets cuBLAS allocate its workspace, both outside the capture
                self.function(*args)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.function(*args)
        return graph, inputs, outputs
