"""zoo.load: the agent that acted in the run, on Gymnasium's own observations; and what it refuses."""

import csv
import importlib
import shutil
import subprocess
import sys

import agents
import gymnasium as gym
import numpy as np
import pytest
import torch
from command import run

import zoo
from zoo.common.errors import UsageError
from zoo.common.seeding import env_seeds


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    return agents.train_ppo(tmp_path_factory.mktemp("cartpole") / "run", seed=3)


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory):
    return agents.train_sac(tmp_path_factory.mktemp("pendulum") / "run")


def final_return(folder):
    with open(folder / "progress.csv", newline="") as file:
        return float(list(csv.DictReader(file))[-1]["eval_return"])


@pytest.mark.parametrize("which", ["cartpole", "pendulum"])
def test_the_agent_plays_in_gymnasium_as_it_was_evaluated(which, request):
    """Scale, bounds and dtype of the actions are the environment's, normalisation of observations within."""
    folder = request.getfixturevalue(which)
    agent = zoo.load(folder)
    env = gym.make(agent.env, disable_env_checker=True)
    obs, _ = env.reset(seed=env_seeds(agent.args.seed, "evaluation", 1, 0)[0])
    total, ended = 0.0, False
    while not ended:
        action = agent.policy(obs)
        assert env.action_space.contains(action)
        obs, reward, terminated, truncated, _ = env.step(action)
        total, ended = total + float(reward), terminated or truncated
    assert total == pytest.approx(final_return(folder), rel=1e-4)


def test_a_batch_is_acted_on_row_by_row(pendulum):
    agent = zoo.load(pendulum)
    obs = np.random.default_rng(0).normal(size=(5, 3))
    actions = agent.policy(obs)
    assert actions.shape == (5, 1) and actions.dtype == np.float32 and np.abs(actions).max() <= 2
    assert len(np.unique(actions)) == 5
    np.testing.assert_allclose(actions, [agent.policy(row) for row in obs], rtol=1e-5)
    assert agent.policy(obs.tolist()).shape == (5, 1) and agent.policy(obs[:0]).shape == (0, 1)


def test_actions_counted_from_elsewhere(tmp_path):
    agent = zoo.load(agents.untrained(tmp_path / "run", "probe/DiscreteStart-v0"))
    actions = agent.policy(np.linspace(-1, 1, 50)[:, None])
    assert set(actions) <= {5, 6, 7} and agent.policy(np.zeros(1)) in (5, 6, 7)


def test_observations_and_actions_of_many_dimensions(tmp_path):
    agent = zoo.load(agents.untrained(tmp_path / "image", "probe/Image-v0"))
    assert agent.policy(np.zeros((2, 3, 4), np.uint8)) in (0, 1)
    assert agent.policy(np.zeros((5, 2, 3, 4), np.uint8)).shape == (5,)
    agent = zoo.load(agents.untrained(tmp_path / "matrix", "probe/BoxMatrix-v0"))
    assert agent.policy(np.zeros(1)).shape == (2, 3) and agent.policy(np.zeros((5, 1))).shape == (5, 2, 3)
    agent = zoo.load(agents.untrained(tmp_path / "scalar", "probe/ScalarObs-v0"))
    assert agent.policy(0.5) in (0, 1) and agent.policy([0.5, 1.0, 0.1]).shape == (3,)


def test_it_tells_what_it_is(cartpole):
    agent = zoo.load(cartpole)
    assert (agent.name, agent.env, agent.args.seed, agent.args.num_envs) == ("ppo", "CartPole-v1", 3, 4)
    assert agent.args.hidden == (64, 64) and isinstance(agent.args, zoo.ppo.Args)
    assert repr(agent) == "<ppo of CartPole-v1, trained for 256 steps>"
    assert zoo.load(str(cartpole / "agent.pt"), env="CartPole-v0").env == "CartPole-v0"


def test_a_folder_of_results_is_enough(cartpole, tmp_path):
    """Of a run only agent.pt is needed."""
    shutil.copy(cartpole / "agent.pt", tmp_path)
    assert zoo.load(tmp_path).policy(np.zeros(4)) in (0, 1)


def test_loading_leaves_the_random_numbers_alone(cartpole):
    torch.manual_seed(1)
    first = torch.rand(3)
    torch.manual_seed(1)
    zoo.load(cartpole).policy(np.zeros(4))
    assert torch.equal(torch.rand(3), first)


def test_importing_an_agent_does_not_load_what_loading_needs():
    code = "import sys, zoo; assert 'torch' not in sys.modules and 'zoo.common' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("shape", [(), (3,), (5,), (4, 1), (2, 2, 4), (4, 3)])
def test_an_observation_of_another_shape_is_refused(cartpole, shape):
    with pytest.raises(UsageError) as caught:
        zoo.load(cartpole).policy(np.zeros(shape))
    expected = f"of CartPole-v1 has the shape (4,), a batch of them (N, 4), not {shape}"
    assert str(caught.value).endswith(expected)


def test_what_is_no_agent_of_this_zoo_is_refused_in_one_line(cartpole, tmp_path):
    content = torch.load(cartpole / "agent.pt", weights_only=True)

    def saved(name, **changes):
        torch.save({**content, **changes}, tmp_path / name)
        return tmp_path / name

    def folder(name, file=None):
        (tmp_path / name).mkdir()
        if file:
            (tmp_path / name / file).touch()
        return tmp_path / name

    wider = {**content["args"], "hidden": (8, 8)}
    cases = [
        (tmp_path / "none", None, "no such file or folder"),
        (folder("empty"), None, "holds no agent.pt"),
        (folder("unfinished", "checkpoint.pt"), None, "--resume"),
        (cartpole.parent, None, f"no trained agent; the newest of those within: {cartpole}"),
        (cartpole / "args.json", None, "is not a checkpoint of the zoo"),
        (saved("old.pt", format=1), None, "has format 1; this version of the zoo reads format"),
        (saved("other.pt", agent="os"), None, "is of agent os, which this version of the zoo does not have"),
        (saved("common.pt", agent="common"), None, "zoo/common.py has no make_policy"),
        (saved("empty.pt", state={}), None, "lacks 'params', which zoo/ppo.py needs to act"),
        (saved("none.pt", state=None), None, "does not fit zoo/ppo.py on CartPole-v1"),
        (saved("dict.pt", state={**content["state"], "params": {}}), None, "does not fit zoo/ppo.py"),
        (saved("sizes.pt", args={**content["args"], "hidden": None}), None, "does not fit zoo/ppo.py"),
        (saved("args.pt", args=None), None, "is not a checkpoint of the zoo"),
        (saved("env.pt", env=None), None, "is not a checkpoint of the zoo"),
        (saved("wider.pt", args=wider), None, "does not fit zoo/ppo.py on CartPole-v1"),
        (cartpole, "Acrobot-v1", "its observations or actions are not those of CartPole-v1"),
        (cartpole, "CartPoole-v1", "--env CartPoole-v1"),
    ]  # fmt: skip
    for path, env, words in cases:
        with pytest.raises(UsageError) as caught:
            zoo.load(path, env)
        assert words in str(caught.value) and "\n" not in str(caught.value)


TINY = {
    "reinforce": "--num-envs 2 --total-steps 800",
    "actor_critic": "--num-envs 2 --num-steps 32 --total-steps 128",
    "trpo": "--num-envs 2 --num-steps 32 --total-steps 128 --minibatch-size 32",
    "ppo": "--num-envs 2 --num-steps 32 --total-steps 128 --minibatch-size 32",
    "sac": "--total-steps 128 --random-steps 64 --batch-size 8 --hidden 8",
    "grpo": "--total-steps 400",
    "preferences": "--num-envs 2 --num-steps 32 --total-steps 512 --minibatch-size 32 --labels 4 --first 1",
    "dppo": "--num-envs 2 --num-steps 32 --total-steps 128 --minibatch-size 32 --clone-steps 0",
}


@pytest.mark.parametrize("name", TINY)
def test_a_finished_run_can_be_resumed(name, tmp_path, capsys):
    """As a stop in the final evaluation advises, and as a queue does that starts a job again."""
    module = importlib.import_module(f"zoo.{name}")
    plumbing = "--env Pendulum-v1 --no-compile --env-threads 1 --eval-episodes 2 --device cpu --no-progress"
    first = run(module, *TINY[name].split(), *plumbing.split(), "--run-dir", str(tmp_path))
    before = (tmp_path / "agent.pt").read_bytes()
    capsys.readouterr()
    assert run(module, "--resume", str(tmp_path)) == pytest.approx(first)
    assert "finished at step" in capsys.readouterr().err and (tmp_path / "agent.pt").read_bytes() == before


@pytest.mark.parametrize(("agent", "train"), [("ppo", agents.train_ppo), ("sac", agents.train_sac)])
def test_an_agent_acts_in_evaluation_mode(agent, train, tmp_path, monkeypatch):
    """What an edit adds, such as dropout, would make it act at random."""
    folder, module, nets = train(tmp_path / "run"), importlib.import_module(f"zoo.{agent}"), []
    real = module.policy_at
    monkeypatch.setattr(module, "policy_at", lambda net, *rest: nets.append(net) or real(net, *rest))
    zoo.load(folder)
    assert [net.training for net in nets] == [False]
