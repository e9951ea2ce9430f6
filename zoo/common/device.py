"""Device, threads, compilation: one source for an agent's functions, run eagerly or compiled.

An agent's update is a pure function of tensors: parameters as one flat vector, optimiser state and a batch
in, the new ones out. That makes every mode the same code:

    CPU   torch.compile through Inductor's C++ wrapper
    CUDA  torch.compile with Inductor's CUDA graphs
    eager as it stands, by --no-compile or where there is no compiler

What a compiled function reads besides its arguments (a field of Args, a global, a variable that it closes
over) may change between two calls, as in any Python function: torch.compile's guards notice, and it is
compiled anew. They are checked at every call and would cost a third of a small minibatch's time; therefore
one call makes a whole pass over a batch, whose minibatches are a loop that the compiler keeps (`scan`).
"""

import os
import re
import time
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from zoo.common.errors import UsageError
from zoo.common.process import say

COMPILING = "compiling (some seconds; the first time on a machine up to a minute) ..."


def setup(device: str = "auto", threads: int = 1) -> torch.device:
    """Set the number of torch threads and return the device that "auto", "cpu" or "cuda" names.

    One thread is the default: matrices of 64 x 64 gain nothing from a second one, and two runs side by side,
    two threads each on two cores, slow each other down several times over.
    """
    torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def flatten(module: nn.Module) -> tuple[Tensor, Callable[[Tensor], dict[str, Tensor]]]:
    """A module's parameters as one vector (P,), and the function that turns such a vector back into named
    views of it.

    Optimiser, clipping and line search are then single vector operations, and `functional_call(module,
    unflatten(v), ...)` of torch.func runs the module at any point v. No gradient reaches a parameter that
    does not require one, unless none does, as after `loader`.
    Raises UsageError for buffers of the module's state, such as the running mean of a BatchNorm: they would
    be in no checkpoint and in no agent.pt.
    """
    named = dict(module.named_parameters())
    kept = module.state_dict()
    if lost := [name for name, _ in module.named_buffers() if name in kept]:
        raise UsageError(
            f"{type(module).__name__}: its buffers ({', '.join(lost[:3])}) would be saved nowhere; use "
            "nn.Parameter(..., requires_grad=False) or, if new networks have the same, persistent=False"
        )
    sizes = [parameter.numel() for parameter in named.values()]
    frozen = {name for name, parameter in named.items() if not parameter.requires_grad}
    frozen = set() if len(frozen) == len(named) else frozen
    like = [(name, parameter.shape, name not in frozen) for name, parameter in named.items()]

    def unflatten(vector: Tensor) -> dict[str, Tensor]:
        views = zip(vector.split(sizes), like, strict=True)
        return {
            name: (view if learned else view.detach()).view(shape) for view, (name, shape, learned) in views
        }

    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]), unflatten


def loader(module: nn.Module) -> Callable[[Tensor], None]:
    """The function that puts a vector of parameters (P,), in the order of `flatten`, into the module itself.

    What runs eagerly uses the module so: `functional_call` takes four times as long as the products of a
    small step. Gradients are taken of pure functions of the vector, never of the module.
    """
    module.requires_grad_(False)
    home = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    nn.utils.vector_to_parameters(home, module.parameters())  # views of it, so that one copy fills them all

    def load(vector: Tensor) -> None:
        home.copy_(vector)

    return load


def scan(step: Callable, carry: Any, rows: Any) -> tuple[Any, Any]:
    """`for row in rows: carry, out = step(carry, row)`, compiled as one loop; the last carry, and the outs
    stacked.

    carry, rows and out are tensors, or tuples and dicts of tensors; a row is one entry of each along its
    first dimension. Compiled code asks four things of `step` that plain Python does not: a new carry has the
    shapes and types of the old one, none of its tensors is one that came in, nothing is changed in place, and
    a constant tensor of several entries comes from outside and is not made within.
    """
    leaves, structure = tree_flatten(rows)
    if torch.compiler.is_compiling() and len(leaves[0]) > 1:  # a loop of one turn is none, and trips Inductor
        from torch._higher_order_ops.scan import scan as compiled_scan

        return compiled_scan(step, carry, rows)
    outs = []
    for row in zip(*(leaf.unbind() for leaf in leaves), strict=True):
        carry, out = step(carry, tree_unflatten(row, structure))
        outs.append(out)
    return carry, tree_map(lambda *column: torch.stack(column), *outs)


def compile_function(function: Callable, device: torch.device, enabled: bool = True) -> Callable:
    """The pure `function` of tensors, compiled for `device`; itself if not `enabled`.

    Where compilation fails (no C++ compiler, say), and where what the function reads has changed so often
    that compiling it once more would not pay, one warning line is printed and it runs eagerly from there on.
    """
    return _Compiled(function, device) if enabled else function


class _Compiled:
    """A compiled function that tells when it compiles, and runs eagerly where that fails."""

    # that it compiles, and that it failed, once a run: a run makes all its functions before it calls one
    told = warned = False
    seconds = 0.0  # spent in first calls, all compiled functions of the process together

    def __init__(self, function: Callable, device: torch.device):
        options: dict[str, Any] = {"triton.cudagraphs": True}
        if device.type == "cpu":
            # calls the kernels from C++: 180 us an update against 267 us from Python
            options = {"cpp_wrapper": True}
            # no pool of compile processes beside a small run
            os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        self.eager = function
        self.name = getattr(function, "func", function).__name__  # of a partial, or of the function itself
        self.on_gpu = device.type == "cuda"
        self.options = options
        self.call: Callable = self._first_call
        _Compiled.told = _Compiled.warned = False

    def __call__(self, *args: Any) -> Any:
        try:
            result = self.call(*args)
        except Exception as error:  # whatever the toolchain raises
            result = self.eager(*args)  # raises an error of the function's own again
            if not _Compiled.warned:
                reason = _reason(error)
                told = f"warning: torch.compile failed, running {self.name} eagerly ({reason})"
                say(told)
            _Compiled.warned = True
            self.call = self.eager
        # what a CUDA graph returned is overwritten by its next replay
        return tree_map(torch.clone, result) if self.on_gpu else result

    def _first_call(self, *args: Any) -> Any:
        start = time.perf_counter()
        if not _Compiled.told:
            say(COMPILING)
            _Compiled.told = True
        import torch._inductor.config  # a second, spared to runs that do not compile
        import torch._inductor.exc

        # Inductor keeps no compiled loop in its cache unless told that it may: all of the loop's code is in
        # the cache's key
        torch._inductor.config.unsafe_marked_cacheable_functions["torch.ops.higher_order.scan"] = (
            torch.__version__
        )

        def compiled(options: dict[str, Any]) -> Any:
            self.call = torch.compile(own_code(self.eager), fullgraph=True, dynamic=False, options=options)
            return self.call(*args)

        try:
            return compiled(self.options)
        except torch._inductor.exc.InductorError:  # of torch 2.11, for loops called from C++
            return compiled({})
        finally:
            _Compiled.seconds += time.perf_counter() - start


def _reason(error: Exception) -> str:
    """Why compilation failed, in one line: what torch says first, and the line of one's own code."""
    if type(error).__name__ == "FailOnRecompileLimitHit":
        return (
            "a constant that it reads keeps changing, or a shape; pass what changes as a tensor, shapes fixed"
        )
    head, _, trace = str(error).partition("from user code:")
    # within `scan` all reasons begin with the same two lines
    head = re.sub(
        r"^This higher order operator.*error:|Higher Order Operator: \S+", "", head, flags=re.DOTALL
    )
    frames = re.findall(r'File "(.+?)", line (\d+)', trace)
    own = [f"{file}:{line}" for file, line in frames if "site-packages" not in file and file != __file__]
    return " ".join(head.split())[:120] + (f"; {own[-1]}" if own else "")


def own_code(function: Callable) -> Callable:
    """A copy of a function with a code object of its own; of a partial, such a function that does the same.

    Dynamo counts compilations by code object, and without this two runs in one process would share the
    allowance of one. (A partial it calls from a function of its own, whose code all of them would share.)
    """
    if isinstance(function, partial):
        inner, first, named = own_code(function.func), function.args, function.keywords

        def whole(*rest: Any, **more: Any) -> Any:
            return inner(*first, *rest, **named | more)

        return own_code(whole)
    if isinstance(function, types.MethodType):
        return own_code(partial(function.__func__, function.__self__))
    code, defaults = function.__code__.replace(), function.__defaults__
    copy = types.FunctionType(code, function.__globals__, function.__name__, defaults, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def compile_seconds() -> float:
    """Seconds this process has spent compiling so far (the first call of each compiled function)."""
    return _Compiled.seconds
