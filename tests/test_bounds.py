"""Gaussian policies whose means have left the action bounds: all samples are clipped to the same action."""

import json

import gymnasium as gym
import probes
import pytest
import torch
from torch.func import grad

from zoo import actor_critic, grpo, ppo, reinforce, trpo
from zoo.common.errors import UsageError

AGENTS = [actor_critic, grpo, ppo, reinforce, trpo]
SMALL = {
    "num_envs": 32,
    "total_steps": 8192,
    "eval_every": 0,
    "compile": False,
    "progress": False,
    "hidden": (8,),
}


@pytest.fixture(autouse=True)
def _tasks():
    probes.register()
    gym.registry.pop("probe/Short-v0", None)
    gym.register("probe/Short-v0", probes.Space, max_episode_steps=2, kwargs=probes.SPACES["Bounds"])


@pytest.mark.parametrize("agent", AGENTS)
def test_only_dimensions_in_which_all_means_are_outside_count(agent):
    mean = torch.tensor([[1.5, 1.5, -3.0, 0.9], [3.0, 0.5, 2.0, 1.0]], requires_grad=True)
    found = agent.outside(agent.Gaussian(mean, torch.zeros(4)))
    assert found.item() == pytest.approx((0.5**2 + 2**2) / 2 + (2**2 + 1**2) / 2)
    found.backward()
    torch.testing.assert_close(mean.grad, torch.tensor([[0.5, 0.0, -2.0, 0.0], [2.0, 0.0, 1.0, 0.0]]))
    assert float(agent.outside(agent.Categorical(torch.full((2, 3), 5.0)))) == 0


def losses(args):
    """Each agent's loss of a batch's means (B, 1), where nothing is to be learnt: all advantages are 0."""
    zero = torch.zeros(4)
    value = torch.zeros(4)

    def forward(mean, obs):
        return ppo.Gaussian(mean, torch.zeros(1)), value

    def actor(mean):
        batch = actor_critic.Transitions(zero, mean.detach(), zero, zero, zero)
        return actor_critic.actor_critic_loss(mean, batch, forward, args)[0]

    def clipped(mean):
        batch = ppo.Batch(zero, mean.detach(), zero, zero, zero, zero)
        return ppo.ppo_loss(mean, batch, torch.tensor(1.0), forward, args)[0]

    def trust_region(mean):
        batch = trpo.PolicyBatch(zero, mean.detach(), trpo.Gaussian(mean.detach(), torch.zeros(1)), zero)
        kind = trpo.Gaussian

        def policy(mean, obs):
            return kind(mean, torch.zeros(1)), value

        return -trpo.surrogate(policy, args, mean, batch)[0]

    return {actor_critic: actor, ppo: clipped, trpo: trust_region}


@pytest.mark.parametrize("agent", [actor_critic, ppo, trpo])
def test_the_loss_draws_the_mean_back(agent):
    loss = losses(agent.Args(bound_coef=0.7))[agent]
    outside = torch.tensor([[1.5], [2.0], [-2.0], [3.0]])
    beyond = torch.tensor([[0.5], [1.0], [-1.0], [2.0]])
    torch.testing.assert_close(grad(loss)(outside), 0.7 * 2 * beyond / 4)
    inside = torch.tensor([[1.5], [2.0], [0.5], [3.0]])
    torch.testing.assert_close(grad(loss)(inside), torch.zeros(4, 1))


@pytest.mark.parametrize("agent", AGENTS)
def test_a_negative_weight_is_refused(agent):
    with pytest.raises(UsageError, match="--bound-coef must be at least 0 and finite, not -1"):
        agent.check(agent.Args(bound_coef=-1.0))


OFTEN = {  # many small updates
    actor_critic: {"num_steps": 2, "learning_rate": 3e-2},
    ppo: {"num_steps": 8, "num_epochs": 2, "learning_rate": 3e-3, "scale_rewards": False},
    grpo: {"learning_rate": 1e-2},
    reinforce: {"baseline": "mean"},
    trpo: {"num_steps": 2, "critic_epochs": 1, "minibatch_size": 64},
}


@pytest.mark.parametrize("coef", [1.0, 0.0])
@pytest.mark.parametrize("agent", AGENTS)
def test_a_policy_that_left_the_bounds_comes_back(agent, coef, tmp_path, monkeypatch):
    network = "PolicyNetwork" if agent is grpo else "ActorCritic"

    class Outside(getattr(agent, network)):
        def __init__(self, *args):
            super().__init__(*args)
            torch.nn.init.constant_(self.policy_head.bias, 1.2)
            if agent is not grpo:  # right from the start: no noise from a critic that learns
                torch.nn.init.constant_(self.value_head.bias, -9.0)

    monkeypatch.setattr(agent, network, Outside)
    given = {"env": "probe/ActBox-v0", "run_dir": str(tmp_path / "run"), "log_std": -3.0, "bound_coef": coef}
    final = agent.train(agent.Args(**SMALL | OFTEN[agent] | given))
    # the action 3 is best, 6 is the bound: four standard deviations away, no sample has ever been inside
    assert final == -9 if coef == 0 else final > -8.5


@pytest.mark.parametrize(
    "env, used", [("probe/Short-v0", 0.0), ("probe/ActBox-v0", 1.0), ("probe/Act-v0", 0.0)]
)
@pytest.mark.parametrize("agent", AGENTS)
def test_without_bounds_there_is_none_to_leave(agent, env, used, tmp_path, monkeypatch):
    args = agent.Args(env=env, run_dir=str(tmp_path / "run"), **SMALL | {"total_steps": 64, "num_envs": 32})
    if "minibatch_size" in vars(args):
        args.minibatch_size = 32
    if "num_steps" in vars(args):
        args.num_steps = 2
    if agent is grpo:
        args.ungrouped = True  # the first task draws its observations as it likes
    weights = set()

    class Penalty(float):
        """What stands in for `outside`, and notes the weight it gets."""

        def __rmul__(self, weight):
            weights.add(weight)
            return torch.zeros(())

    monkeypatch.setattr(agent, "outside", lambda dist: Penalty())
    if agent is reinforce:  # which weighs a gradient, and only where there are bounds
        monkeypatch.setattr(agent, "outside_gradient", lambda *given: Penalty())
    agent.train(args)
    assert (weights or {0.0}) == {used}
    told = json.loads((tmp_path / "run" / "args.json").read_text())
    assert told["args"]["bound_coef"] == args.bound_coef == 1  # as it was asked for
