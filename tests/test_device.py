"""Eager, compiled and captured functions give the same numbers; no compiler, no CUDA; parameters as one
vector."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from zoo import ppo
from zoo.common import device
from zoo.common.device import compile_function, flatten, restore_generator, setup
from zoo.common.errors import UsageError
from zoo.common.optim import new_adam

CPU = torch.device("cpu")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def ppos_update(monkeypatch, tmp_path, env, where="cpu", **changes):
    """The update that train builds, uncompiled, and the arguments of its first call."""
    functions, calls = {}, []

    def record(function, where, enabled):
        functions[function.__name__] = function

        def call(*args):
            if function.__name__ == "update":
                calls.append(args)
            return function(*args)

        return call

    monkeypatch.setattr(ppo, "compile_function", record)
    ppo.train(ppo.Args(
        env=env, num_envs=8, num_steps=8, minibatch_size=64, total_steps=64, num_epochs=1, device=where, progress=False,
        run_dir=str(tmp_path), eval_episodes=1, **changes,
    ))  # fmt: skip
    monkeypatch.undo()
    return functions["update"], calls[0]


def many_updates(update, first, steps):
    """Parameters, optimiser state and metrics after `steps` updates on batches that change."""
    params, opt, batch, learning_rate, beta = first
    rng = torch.Generator().manual_seed(0)
    history = []
    for i in range(steps):
        advantage, return_ = (torch.randn(len(batch.obs), generator=rng).to(params.device) for _ in range(2))
        obs = batch.obs + torch.randn(batch.obs.shape, generator=rng).to(params.device)
        new = batch._replace(obs=obs, advantage=advantage, return_=return_)
        params, opt, metrics = update(params, opt, new, learning_rate * (1 - i / steps), beta)
        history.append(torch.stack(list(metrics.values())))
    return params, opt, torch.stack(history)


def test_compiled_updates_equal_eager_ones(tmp_path, monkeypatch, capsys):
    update, first = ppos_update(
        monkeypatch, tmp_path, "Pendulum-v1", surrogate="clip", value_clip=0.2, entropy_coef=0.01
    )
    start = first[0].clone()
    compiled = compile_function(update, CPU)
    ours, theirs = (many_updates(function, first, 200) for function in (compiled, update))
    assert capsys.readouterr().err == ""  # no fallback
    assert torch.equal(first[0], start)  # the update is pure
    assert (theirs[0] - start).abs().max() > 0.01
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(ours[1]["m"], theirs[1]["m"], rtol=1e-2, atol=1e-3)
    assert ours[1]["t"] == theirs[1]["t"] == 200
    torch.testing.assert_close(ours[2][0], theirs[2][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-2, atol=1e-3)


def test_one_code_with_other_constants_is_compiled_anew():
    """Two runs in one process: train's inner functions share their code, but not the constants that they
    close over."""

    def scaling(factor):
        def scale(x):
            return x * factor

        return compile_function(scale, CPU)

    x = torch.ones(3)
    assert [scaling(factor)(x).tolist() for factor in (2.0, 5.0)] == [[2.0] * 3, [5.0] * 3]


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
    monkeypatch.setattr(device._Compiled, "warned", False, raising=False)  # by a test before this one

    def double(x):
        return 2 * x

    function = compile_function(double, CPU)
    assert [function(torch.tensor(float(i))).item() for i in range(3)] == [0.0, 2.0, 4.0]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(
        "warning: torch.compile failed, running double eagerly (no compiler found"
    )


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
    command = [
        sys.executable, ppo.__file__, "--env", "CartPole-v1", "--total-steps", "512", "--num-epochs", "1", "--device", "cpu",
        "--run-dir", str(tmp_path / "run"), "--eval-episodes", "1",
    ]  # fmt: skip
    path = os.pathsep.join(
        [str(Path(ppo.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    run = subprocess.run(
        command, capture_output=True, text=True, env=environment | {"PYTHONPATH": path}, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("final evaluation: ")
    lines = run.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: torch.compile failed"), run.stderr


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


def test_a_generator_goes_on_or_begins_anew_where_the_state_is_another_devices():
    source, restored = torch.Generator().manual_seed(5), torch.Generator()
    source.seed()
    state = source.get_state()
    restore_generator(restored, state, seed=7)
    assert torch.equal(torch.randn(9, generator=restored), torch.randn(9, generator=source))

    restore_generator(restored, torch.zeros(16, dtype=torch.uint8), seed=7)  # the size of a CUDA generator's
    assert torch.equal(
        torch.randn(9, generator=restored), torch.randn(9, generator=torch.Generator().manual_seed(7))
    )


@cuda
def test_captured_updates_equal_eager_ones(tmp_path, monkeypatch, capsys):
    update, first = ppos_update(
        monkeypatch, tmp_path, "Pendulum-v1", where="cuda", value_clip=0.2, entropy_coef=0.01
    )
    captured = compile_function(update, torch.device("cuda"))
    ours, theirs = (many_updates(function, first, 200) for function in (captured, update))
    assert capsys.readouterr().err == ""
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
