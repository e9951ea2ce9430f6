"""What all tests share: one torch thread, the probe environments under their ids, scripts/ to import from,
and what watches compilation.
"""

import sys
from pathlib import Path

import probes
import pytest
import torch

from zoo.common.device import _Compiled

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
torch.set_num_threads(1)
probes.register()

# in the names of the tests that take longest
LONG = ("compiled", "cartpole", "pendulum_is", "the_tour", "the_whole_script", "kept_and_not_made_again")


def pytest_collection_modifyitems(items):
    """The longest first: none is left for one worker at the end, when the others are done, and most of what
    compiles does so in one process, which loads the compiler once."""
    items.sort(key=lambda item: not any(part in item.name for part in LONG))


@pytest.fixture
def no_fallback(monkeypatch):
    """Fails a test in which torch.compile fails, where the function would run eagerly and equal itself."""
    monkeypatch.setattr(_Compiled, "warned", False)  # by a test before this one
    yield
    assert not _Compiled.warned


@pytest.fixture
def traced(monkeypatch):
    """torch.compile with its tracing and its guards, but no kernels, which take seconds each; the graphs that
    it made so far."""
    graphs, real = [], torch.compile

    def backend(graph, inputs, **_):
        graphs.append(graph)
        return graph.forward

    def compile_without_kernels(function, **kwargs):
        return real(function, backend=backend, **kwargs)

    monkeypatch.setattr(torch, "compile", compile_without_kernels)
    monkeypatch.setattr(_Compiled, "warned", False)
    return graphs
