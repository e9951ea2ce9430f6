"""scripts/export.py: the ONNX file acts as the agent does, on the environment's own observations."""

import sys
from pathlib import Path
from types import SimpleNamespace

import agents
import export
import numpy as np
import onnxruntime
import pytest

import zoo
from zoo.common.errors import UsageError

RESULTS = Path(__file__).parents[1] / "results"


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs export.py's command line: its exit status, stdout and the lines on stderr."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, argv)])
        capsys.readouterr()
        status = export.main()
        told = capsys.readouterr()
        return status, told.out, told.err.splitlines()

    return run


def check_equal(agent, path, scale):
    session = onnxruntime.InferenceSession(path)
    rng = np.random.default_rng(0)
    for count in (1, 300):
        obs = (scale * rng.normal(size=(count, *agent.envs.obs_shape))).astype(agent.envs.dtype)
        (action,) = session.run(["action"], {"obs": obs})
        expected = agent.policy(obs)
        assert action.dtype == expected.dtype and action.shape == expected.shape
        assert len(np.unique(expected)) > min(1, count - 1)  # else nothing is shown
        np.testing.assert_allclose(action, expected, rtol=0, atol=1e-5)
    meta = session.get_modelmeta().custom_metadata_map
    assert meta == {"agent": agent.name, "env": agent.env}
    assert str(Path(zoo.__file__).parent).encode() not in Path(path).read_bytes()


@pytest.mark.parametrize("train", [agents.train_ppo, agents.train_sac], ids=["ppo", "sac"])
def test_a_trained_agent(train, tmp_path, command):
    """PPO's with the statistics of its observations, SAC's with the squashing of its actions."""
    folder = train(tmp_path / "run")
    status, out, errors = command(folder, "--out", tmp_path / "a.onnx")
    assert (status, errors) == (0, []) and str(tmp_path / "a.onnx") in out
    check_equal(zoo.load(folder), tmp_path / "a.onnx", scale=3.0)


def test_an_agent_without_a_critic(tmp_path):
    agent = zoo.load(RESULTS / "grpo" / "CartPole-v1")
    (tmp_path / "a.onnx").write_bytes(export.to_onnx(agent))
    check_equal(agent, tmp_path / "a.onnx", scale=3.0)


def test_an_agent_that_samples_is_refused():
    with pytest.raises(UsageError, match="its action is sampled"):
        export._network(SimpleNamespace(name="dppo", args=None))


@pytest.mark.parametrize(("task", "scale"), [("Bounds", 30.0), ("BoxInteger", 30.0), ("Far", 1e8)])
def test_any_space(task, scale, tmp_path):
    """Actions half-bounded or whole numbers; observations that need float64."""
    agent = zoo.load(agents.untrained(tmp_path / "run", f"probe/{task}-v0", gain=30.0, mean=0.3 * scale))
    (tmp_path / "a.onnx").write_bytes(export.to_onnx(agent))
    check_equal(agent, tmp_path / "a.onnx", scale)


def test_bad_input_is_one_line_and_status_2(tmp_path, command, monkeypatch):
    (tmp_path / "folder.onnx").mkdir()
    for argv, words in (
        ([tmp_path], "holds no agent.pt"),
        ([tmp_path, "--out", tmp_path / "none" / "a.onnx"], f"no such folder as {tmp_path / 'none'}"),
        ([tmp_path, "--out", tmp_path / "a.pt"], "end the name in .onnx"),
        ([tmp_path, "--out", tmp_path / "folder.onnx"], "folder.onnx: is a folder"),
        ([""], "run is empty"),
    ):
        status, _, errors = command(*argv)
        assert status == 2 and len(errors) == 1 and words in errors[0]
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    status, _, errors = command(tmp_path)
    assert status == 2 and len(errors) == 1 and "pip install -e '.[export]'" in errors[0]


def test_a_network_that_is_built_otherwise_is_exported(tmp_path, command, monkeypatch):
    """As an edited file may: the constructor takes one argument more than the zoo's."""
    folder = agents.train_ppo(tmp_path / "run")
    real = zoo.ppo.ActorCritic

    def built(envs, sizes, activation):
        return real(envs, *sizes)

    def make_policy(envs, args, agent):
        net = zoo.ppo.ActorCritic(envs, (args.hidden, args.log_std, args.shared_network), "tanh").eval()
        zoo.ppo.loader(net)(agent["params"])
        policy = zoo.ppo.policy_at(net, agent["obs_stats"])
        return lambda obs: policy(obs).mode().cpu().numpy()

    monkeypatch.setattr(zoo.ppo, "ActorCritic", built)
    monkeypatch.setattr(zoo.ppo, "make_policy", make_policy)
    status, _, lines = command(folder, "--out", tmp_path / "agent.onnx")
    assert (status, lines) == (0, [])
    check_equal(zoo.load(folder), tmp_path / "agent.onnx", 1.0)
