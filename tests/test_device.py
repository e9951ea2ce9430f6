"""Eager, compiled and captured functions give the same numbers; no compiler, no CUDA; parameters as one
vector."""

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._inductor.exc import InductorError
from torch.func import functional_call

from zoo import ppo, reinforce, trpo
from zoo.common import device
from zoo.common.device import compile_function, flatten, scan, setup
from zoo.common.errors import UsageError
from zoo.common.optim import new_adam

CPU = torch.device("cpu")
TOLD = f"{device.COMPILING}\n"  # and nothing else: no warning of a fallback
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def ppos_pass(monkeypatch, tmp_path, env, where="cpu", **changes):
    """The pass over a batch that train compiles, uncompiled, and the arguments of its first call."""
    functions, calls = [], []

    def record(function, where, enabled):
        functions.append(function)

        def call(*args):
            calls.append(args)
            return function(*args)

        return call

    monkeypatch.setattr(ppo, "compile_function", record)
    ppo.train(ppo.Args(
        env=env, num_envs=8, num_steps=8, minibatch_size=16, total_steps=64, num_epochs=1, device=where,
        progress=False, run_dir=str(tmp_path), eval_episodes=1, **changes,
    ))  # fmt: skip
    monkeypatch.undo()
    (improve,) = functions  # one compiled function is all there is
    return improve, calls[0]


def many_updates(improve, first, passes):
    """Parameters, optimiser state and metrics after `passes` passes, 4 updates each, over batches that
    change."""
    params, opt, batch, order, learning_rate, beta = first
    rng = torch.Generator().manual_seed(0)
    history = []
    for i in range(passes):
        advantage, return_ = (torch.randn(len(batch.obs), generator=rng).to(params.device) for _ in range(2))
        obs = batch.obs + torch.randn(batch.obs.shape, generator=rng).to(params.device)
        order = torch.randperm(len(batch.obs), generator=rng).to(params.device)
        new = batch._replace(obs=obs, advantage=advantage, return_=return_)
        params, opt, metrics = improve(params, opt, new, order, learning_rate * (1 - i / passes), beta)
        history.append(torch.stack(list(metrics.values())))
    return params, opt, torch.stack(history)


def test_compiled_updates_equal_eager_ones(tmp_path, monkeypatch, capsys):
    improve, first = ppos_pass(
        monkeypatch, tmp_path, "Pendulum-v1", surrogate="clip", value_clip=0.2, entropy_coef=0.01
    )
    start = first[0].clone()
    compiled = compile_function(improve, CPU)
    capsys.readouterr()
    ours, theirs = (many_updates(function, first, 50) for function in (compiled, improve))
    assert capsys.readouterr().err == TOLD
    assert torch.equal(first[0], start)  # the update is pure
    assert (theirs[0] - start).abs().max() > 0.01
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(ours[1]["m"], theirs[1]["m"], rtol=1e-2, atol=1e-3)
    assert ours[1]["t"] == theirs[1]["t"] == 200
    torch.testing.assert_close(ours[2][0], theirs[2][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-2, atol=1e-3)
    params, opt, batch, order, *more = first  # a pass of one minibatch is no loop
    short = [function(params, opt, batch, order[:16], *more)[0] for function in (compiled, improve)]
    torch.testing.assert_close(*short, rtol=1e-4, atol=1e-6)
    assert not torch.equal(short[0], params) and capsys.readouterr().err == ""


# --- what compiled code reads may change --------------------------------------------------------------------


def test_a_constant_argument_that_changes_is_seen(capsys):
    """Compiled for real: every call gives what the same Python would."""

    def times(x, c):
        return x * c

    compiled, x = compile_function(times, CPU), torch.ones(3)
    assert [compiled(x, c).tolist() for c in (1.0, 5.0, 1.0)] == [[c] * 3 for c in (1.0, 5.0, 1.0)]
    assert capsys.readouterr().err == TOLD


@dataclass
class Settings:
    coef: float


FACTOR = 1.0


def test_whatever_else_it_reads_may_change(traced, monkeypatch, capsys):
    settings, cell = Settings(1.0), 1.0

    def of_field(x, settings):
        return x * settings.coef

    def of_closed_over_field(x):
        return x * settings.coef

    def of_cell(x):
        return x * cell

    def of_global(x):
        return x * FACTOR

    x, calls = torch.ones(2), dict[str, tuple]()
    for function, *extra in ((of_field, settings), (of_closed_over_field,), (of_cell,), (of_global,)):
        calls[function.__name__] = (compile_function(function, CPU), *extra)
    for value in (1.0, 5.0, -2.0):
        settings.coef = cell = value
        monkeypatch.setattr(sys.modules[__name__], "FACTOR", value)
        found = {name: function(x, *extra).tolist() for name, (function, *extra) in calls.items()}
        assert found == dict.fromkeys(calls, [value] * 2)
    assert len(traced) == 4 * 3  # it was compiled each time, not run eagerly
    assert capsys.readouterr().err == TOLD  # once for functions of one run


def test_what_keeps_changing_is_run_eagerly_after_one_warning(traced, capsys):
    def times(x, c):
        return x * c

    compiled, x = compile_function(times, CPU), torch.ones(2)
    with torch._dynamo.config.patch(recompile_limit=3):
        results = [compiled(x, float(c)).tolist() for c in range(8)]
    assert results == [[float(c)] * 2 for c in range(8)]
    assert len(traced) == 3
    told, *lines = capsys.readouterr().err.splitlines()
    assert told == device.COMPILING
    assert len(lines) == 1 and lines[0].startswith(
        "warning: torch.compile failed, running times eagerly (a constant that it reads keeps changing"
    )


def test_the_warning_names_what_cannot_be_compiled_and_the_line(traced, capsys):
    def double_large_ones(total, x):
        def step(carry, row):
            if carry.sum() > 4:
                carry = carry * 2
            return carry + row, carry.sum()

        return scan(step, total, x)

    ours = compile_function(double_large_ones, CPU)(torch.ones(3), torch.ones(4, 3))
    assert ours[1].tolist() == double_large_ones(torch.ones(3), torch.ones(4, 3))[1].tolist()
    _, line = capsys.readouterr().err.splitlines()
    assert "eagerly (Data-dependent branching" in line
    first = double_large_ones.__code__.co_firstlineno
    assert line.endswith(f"; {__file__}:{first + 2})")


@pytest.mark.parametrize("compiling", [True, False])
def test_a_run_says_once_that_it_compiles(tmp_path, traced, capsys, compiling):
    """TRPO has four functions to compile; a second run in the process says so again."""
    for folder in ("one", "two"):
        trpo.train(
            trpo.Args(
                env="CartPole-v1", num_envs=2, num_steps=8, minibatch_size=16, total_steps=16, device="cpu",
                eval_episodes=1, compile=compiling, run_dir=str(tmp_path / folder),
            )
        )  # fmt: skip
        assert capsys.readouterr().err.splitlines().count(device.COMPILING) == compiling
        assert bool(traced) == compiling


# --- scan ---------------------------------------------------------------------------------------------------


def affine(factor):
    """A pass that scans a recurrence over rows of a tuple and a dict."""

    def step(carry, row):
        x, more = row
        total = carry["total"] * factor + x * more["w"]
        return {"total": total, "count": carry["count"] + 1}, (total.sum(), {"first": total[0] - factor})

    def whole(total, x, w):
        carry = {"total": total, "count": torch.zeros(())}
        return scan(step, carry, (x, {"w": w}))

    return whole


def flat(result):
    carry, (sums, more) = result
    return carry["total"], carry["count"], sums, more["first"]


@pytest.mark.parametrize("n", [1, 4])
def test_scan_by_hand(n):
    rng = torch.Generator().manual_seed(n)
    total, x, w = (torch.randn(*shape, generator=rng) for shape in ((3,), (n, 3), (n, 3)))
    ours, sums, firsts = flat(affine(0.5)(total, x, w)), [], []
    for i in range(n):
        total = total * 0.5 + x[i] * w[i]
        sums.append(total.sum())
        firsts.append(total[0] - 0.5)
    expected = (total, torch.tensor(float(n)), torch.stack(sums), torch.stack(firsts))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_compiled_scan_equals_the_eager_one_and_is_cached_by_its_code(tmp_path, monkeypatch, capsys):
    """Of two loops that differ in their step alone, compiled into one new cache, each keeps its own result,
    while the first, compiled once more, is found in the cache."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    rng = torch.Generator().manual_seed(0)
    hits = []
    for factor in (0.5, 2.0, 0.5):
        torch._dynamo.reset()  # as in a new process: nothing but the folder is left
        before = counters["inductor"]["fxgraph_cache_hit"]
        args = [torch.randn(*shape, generator=rng) for shape in ((3,), (4, 3), (4, 3))]
        ours, theirs = flat(compile_function(affine(factor), CPU)(*args)), flat(affine(factor)(*args))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)
        hits.append(counters["inductor"]["fxgraph_cache_hit"] - before)
    assert hits == [0, 0, 1]
    assert capsys.readouterr().err == 3 * TOLD  # as three runs would


# --- one code, many functions -------------------------------------------------------------------------------


def closing(factor):
    def scale(x):
        return x * factor

    return scale


def times(factor, x):
    return x * factor


@pytest.mark.parametrize(
    "scaling", [closing, lambda factor: partial(times, factor)], ids=["closure", "partial"]
)
def test_one_code_with_other_constants_is_compiled_anew(scaling, traced, no_fallback):
    """Runs in one process: their functions share their code, but not the constants that they close over or
    are given first. There is no limit to their number, such as torch has for one function."""
    x, runs = torch.ones(3), torch._dynamo.config.recompile_limit + 2
    for factor in map(float, range(runs)):
        assert compile_function(scaling(factor), CPU)(x).tolist() == [factor] * 3
    assert len(traced) == runs


def test_not_enabled_is_the_function_itself():
    def function(x):
        return x

    assert compile_function(function, CPU, enabled=False) is function


def test_without_a_compiler_one_warning_and_the_same_result(monkeypatch, capsys):
    def broken(function, **kwargs):
        def call(*args):
            raise RuntimeError("no compiler\nfound")

        return call

    monkeypatch.setattr(torch, "compile", broken)

    def double(x):
        return 2 * x

    for _ in range(2):  # runs in one process: each is told of its own
        function = compile_function(double, CPU)
        assert [function(torch.tensor(float(i))).item() for i in range(3)] == [0.0, 2.0, 4.0]
        told, *lines = capsys.readouterr().err.splitlines()
        assert told == device.COMPILING
        assert len(lines) == 1 and lines[0].startswith(
            "warning: torch.compile failed, running double eagerly (no compiler found"
        )


def test_where_kernels_cannot_be_called_from_cpp_they_are_from_python(monkeypatch, capsys):
    tried = []

    def compiler(function, options, **_):
        tried.append(options)

        def call(*args):
            if options.get("cpp_wrapper"):
                raise InductorError(AssertionError(), None)
            return function(*args)

        return call

    monkeypatch.setattr(torch, "compile", compiler)
    function = compile_function(lambda x: 2 * x, CPU)
    assert [function(torch.tensor(float(i))).item() for i in range(3)] == [0.0, 2.0, 4.0]
    assert tried == [{"cpp_wrapper": True}, {}]
    assert capsys.readouterr().err == TOLD


def test_a_function_of_any_kind_is_compiled(capsys):
    class Scaled:
        by = 3.0

        def method(self, x, *, plus=1.0):
            return self.by * x + plus

    def function(x, more=1.0, *, plus=2.0):
        return x + more + plus

    given = torch.tensor(5.0)
    for one, right in ((Scaled().method, 16.0), (function, 8.0), (partial(Scaled().method, plus=0.0), 15.0)):
        assert float(compile_function(one, CPU)(given)) == right
    assert set(capsys.readouterr().err.splitlines()) == {device.COMPILING}


def test_an_error_of_the_functions_own_is_raised(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)

    def wrong(x):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        compile_function(wrong, CPU)(torch.ones(1))


def test_a_run_without_a_compiler(tmp_path):
    """For real: CXX names no compiler, and nothing is cached; one warning for the run, which then ends as it
    should."""
    environment = os.environ | {
        "CXX": "/nonexistent",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    agent = reinforce.__file__  # without a V a single small function is compiled
    command = [
        sys.executable, agent, "--env", "CartPole-v1", "--baseline", "mean", "--total-steps", "100",
        "--device", "cpu", "--run-dir", str(tmp_path / "run"), "--eval-episodes", "1",
    ]  # fmt: skip
    path = os.pathsep.join([str(Path(agent).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        command, capture_output=True, text=True, env=environment | {"PYTHONPATH": path}, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("final evaluation: ")
    told = ("run folder: ", "to watch it: ", "to evaluate it: ", "finished at step ")
    lines = [line for line in run.stderr.splitlines() if not line.startswith(told)]
    assert lines[0] == device.COMPILING, run.stderr
    assert len(lines) == 2 and lines[1].startswith("warning: torch.compile failed"), run.stderr


def test_flatten_and_back():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.scale = nn.Linear(3, 5), nn.Parameter(torch.tensor(2.0))
            self.again = self.first  # shared: counted once

        def forward(self, x):
            return self.again(x) * self.scale

    net = Net()
    vector, unflatten = flatten(net)
    assert vector.shape == (3 * 5 + 5 + 1,) and not vector.requires_grad
    views = unflatten(vector)
    named = dict(net.named_parameters())
    assert views.keys() == named.keys()
    assert all(torch.equal(views[name], parameter) for name, parameter in named.items())
    x = torch.randn(4, 3)
    torch.testing.assert_close(functional_call(net, views, (x,)), net(x))
    torch.testing.assert_close(
        functional_call(net, unflatten(torch.zeros_like(vector)), (x,)), torch.zeros(4, 5)
    )
    vector += 1  # a copy of the module's parameters, of which the views are views
    assert views["scale"] == 3.0 and net.scale == 2.0


def test_no_gradient_reaches_a_frozen_parameter():
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    net[0].requires_grad_(False)
    vector, unflatten = flatten(net)
    x = torch.ones(4, 2)

    def loss(v):
        return functional_call(net, unflatten(v), (x,)).sum()

    gradient = torch.func.grad(loss)(vector)
    assert gradient[:9].tolist() == [0.0] * 9 and gradient[9:].all()  # 2 x 3 weights and 3 biases
    assert torch.func.jvp(loss, (vector,), (torch.eye(13)[0],))[1] == 0
    device.loader(net)(vector)  # which lets the module itself ask for no gradient at all
    assert torch.func.grad(lambda v: functional_call(net, flatten(net)[1](v), (x,)).sum())(vector)[:9].all()


def test_buffers_that_no_checkpoint_would_hold_are_refused():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with pytest.raises(
        UsageError, match=r"^Sequential: its buffers \(1.running_mean, .* would be saved nowhere"
    ):
        flatten(net)
    net = nn.Linear(2, 3)
    net.register_buffer("constant", torch.ones(2), persistent=False)
    assert len(flatten(net)[0]) == 9


def test_setup():
    threads = torch.get_num_threads()
    try:
        assert setup("cpu", 2) == CPU and torch.get_num_threads() == 2
        assert (
            setup("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
            and torch.get_num_threads() == 1
        )
    finally:
        torch.set_num_threads(threads)


def test_cuda_asked_for_and_absent(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"--device cuda: .*cpu or auto"):
        setup("cuda")


@cuda
def test_captured_updates_equal_eager_ones(tmp_path, monkeypatch, capsys):
    improve, first = ppos_pass(
        monkeypatch, tmp_path, "Pendulum-v1", where="cuda", value_clip=0.2, entropy_coef=0.01
    )
    captured = compile_function(improve, torch.device("cuda"))
    capsys.readouterr()
    ours, theirs = (many_updates(function, first, 50) for function in (captured, improve))
    assert capsys.readouterr().err == TOLD
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-2, atol=1e-3)


@cuda
def test_captured_results_survive_the_next_call_and_shapes_may_change():
    function = compile_function(
        lambda x, state: (2 * x, {"sum": state["sum"] + x.sum()}), torch.device("cuda")
    )
    state, results = {"sum": torch.zeros((), device="cuda")}, []
    for n in (3, 3, 5, 3):
        doubled, state = function(torch.full((n,), float(n), device="cuda"), state)
        results.append(doubled)
    assert [r.tolist() for r in results] == [[6.0] * 3, [6.0] * 3, [10.0] * 5, [6.0] * 3]
    assert state["sum"].item() == 9 + 9 + 25 + 9


@cuda
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_a_run_on_cuda_and_its_resumption(tmp_path, env):
    args = dict(
        env=env,
        num_envs=8,
        num_steps=16,
        minibatch_size=64,
        num_epochs=2,
        device="cuda",
        progress=False,
        eval_episodes=2,
    )
    assert np.isfinite(ppo.train(ppo.Args(**args, total_steps=512, run_dir=str(tmp_path))))
    assert np.isfinite(ppo.train(ppo.Args(**args, total_steps=1024, resume=str(tmp_path))))


def test_a_new_optimisers_state_is_where_the_parameters_are():
    assert {tensor.device.type for tensor in new_adam(torch.zeros(2, device="meta")).values()} == {"meta"}
