"""A state's way into a checkpoint and back."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from zoo.common.errors import RunFault
from zoo.common.files import load_checkpoint, save_checkpoint
from zoo.common.seeding import generator_seed
from zoo.common.state import device_of, portable, restored


class Inner(NamedTuple):
    mean: torch.Tensor
    count: int


class State(NamedTuple):
    params: torch.Tensor
    stats: Inner
    opt: dict
    layers: list
    noise: torch.Generator
    buffer: object
    best: float | None


class Buffer:
    """What a replay buffer looks like from here: its state may have another size than a fresh one's."""

    def __init__(self):
        self.rows = torch.zeros(0)

    def state(self):
        return {"rows": self.rows}

    def restore(self, state):
        self.rows = state["rows"]


def fresh(seed=1, dtype=torch.float64):
    noise = torch.Generator().manual_seed(seed)
    layers = [torch.zeros(2), torch.zeros(1)]
    stats, opt = Inner(torch.zeros(2), 0), {"m": torch.zeros(3), "t": 0}
    return State(torch.zeros(3, dtype=dtype), stats, opt, layers, noise, Buffer(), None)


def trained():
    state = fresh(seed=5)
    torch.rand(3, generator=state.noise)
    state.buffer.rows = torch.arange(4.0)
    return state._replace(
        params=torch.arange(3.0), stats=Inner(torch.ones(2), 7), opt={"t": 2, "m": torch.ones(3)},
        layers=[torch.ones(2), torch.ones(1)],
    )  # fmt: skip


def test_portable():
    whole = torch.arange(1000.0)
    state = {
        "a": whole[:3],
        "b": [1, (2.5, None)],
        "seed": 2**100,
        "n": np.float64(0.1),
        "f": True,
        3: "three",
    }
    plain = portable(state)
    assert torch.equal(plain.pop("a"), whole[:3])
    assert plain == {"b": [1, (2.5, None)], "seed": 2**100, "n": 0.1, "f": True, 3: "three"}
    with pytest.raises(TypeError, match=r"state\['x'\] is a ndarray"):
        portable({"x": np.zeros(2)})
    with pytest.raises(RunFault, match=r"state\['w'\]\[1\] has become non-finite"):
        portable({"w": [torch.zeros(1), torch.tensor([0.0, float("inf")])]})
    with pytest.raises(RunFault, match=r"state\.stats\.mean has become non-finite"):
        portable(fresh()._replace(stats=Inner(torch.tensor([torch.nan]), 0)))


def test_round_trip_through_a_file(tmp_path):
    """In fresh tensors' dtypes, by name and not by place, the generator and the buffer in place."""
    state, new = trained(), fresh()
    content = {
        "agent": "x",
        "env": "y",
        "args": {},
        "state": portable({"kept": state, "view": torch.zeros(10**4)[:1]}),
    }
    save_checkpoint(tmp_path / "checkpoint.pt", content)
    assert (tmp_path / "checkpoint.pt").stat().st_size < 20_000  # not the 40,000 bytes behind the view
    saved = load_checkpoint(tmp_path / "checkpoint.pt", "run", "x", "y")["state"]["kept"]
    back = restored(new, dict(reversed(saved.items())), seed=1, step=10)
    assert type(back) is State and type(back.stats) is Inner and back.stats.count == 7
    assert back.params.dtype == torch.float64 and back.params.tolist() == [0, 1, 2]
    assert back.stats.mean.tolist() == [1, 1] and back.layers[1].tolist() == [1]
    assert list(back.opt) == ["m", "t"] and back.opt["t"] == 2
    assert back.noise is new.noise and back.buffer is new.buffer and back.buffer.rows.tolist() == [0, 1, 2, 3]
    assert torch.equal(torch.rand(5, generator=back.noise), torch.rand(5, generator=state.noise))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("opt"), "state.opt is missing"),
        (lambda s: s["opt"].pop("m"), r"state.opt['m'] is missing"),
        (lambda s: s.update(ema=1), "state.ema is unknown to this version of the agent"),
        (
            lambda s: s.update(params=torch.zeros(4)),
            "state.params is (4,), where this run's has the shape (3,)",
        ),
        (lambda s: s.update(params=3), "state.params is 3, where this run's has the shape (3,)"),
        (lambda s: s.update(stats=3), "state.stats is a int, where this run's has entries: mean, count"),
        (lambda s: s.update(layers=[torch.zeros(2)]), "state.layers is not a list of 2"),
        (lambda s: s["stats"].update(count=None), "state.stats.count is a NoneType, where this run's is 0"),
        (lambda s: s.update(best=1.0), "state.best is a float, where this run's is None"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    saved = portable(trained())
    change(saved)
    with pytest.raises(ValueError) as error:
        restored(fresh(), saved, seed=1, step=10)
    assert message in str(error.value)


def test_a_generator_of_another_device_is_seeded_anew():
    """From the run's seed, its step and its own name; a CUDA generator's state has 16 bytes."""
    new = {"noise": torch.Generator(), "order": torch.Generator()}
    saved = dict.fromkeys(new, torch.zeros(16, dtype=torch.uint8))
    drawn = {name: torch.rand(4, generator=g).tolist() for name, g in restored(new, saved, 1, 10).items()}
    again = torch.Generator().manual_seed(generator_seed(1, "state['noise']", 10))
    assert torch.rand(4, generator=again).tolist() == drawn["noise"] != drawn["order"]
    later = torch.rand(4, generator=restored(new, saved, 1, 20)["noise"]).tolist()
    assert later != drawn["noise"]


def test_device_of_a_state():
    assert device_of(trained()).type == "cpu" == device_of({}).type
    assert device_of({"a": [torch.zeros(1), torch.zeros(1, device="meta")]}).type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_state_moves_between_devices():
    cuda = {"w": torch.ones(2, device="cuda"), "g": torch.Generator("cuda").manual_seed(3)}
    cpu = restored({"w": torch.zeros(2), "g": torch.Generator()}, portable(cuda), seed=1, step=2)
    assert cpu["w"].tolist() == [1, 1] and cpu["w"].device.type == "cpu"
    back = {"w": torch.zeros(2, device="cuda"), "g": torch.Generator("cuda")}
    back = restored(back, portable(cpu), seed=1, step=2)
    assert device_of(back).type == "cuda" and back["w"].device.type == "cuda" and back["w"].tolist() == [1, 1]
