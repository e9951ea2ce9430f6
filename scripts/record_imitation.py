"""Record what `imitation` computes, for tests/test_preferences_agent.py to compare the zoo's losses with; run
where imitation is installed, beside the zoo's own packages (the older ones that it asks for are not needed):

    pip install -e '.[bench]' && pip install --no-deps imitation==1.0.1 && python scripts/record_imitation.py

Its own CrossEntropyRewardLoss, PreferenceModel (without and with a share of chance) and
ActiveSelectionFragmenter are called on rewards drawn here, in place of a network's. Writes
tests/imitation.json with the versions.
"""

import json
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from imitation.algorithms.preference_comparisons import (
    ActiveSelectionFragmenter,
    CrossEntropyRewardLoss,
    PreferenceModel,
    RandomFragmenter,
)
from imitation.data.types import Trajectory
from imitation.rewards.reward_nets import RewardEnsemble, RewardNet
from torch import Tensor, nn

Q, L, M = 6, 4, 3  # comparisons, steps of a clip, members
SPACE = gym.spaces.Box(-1e3, 1e3, (1,), np.float32)


class Table(RewardNet):
    """A reward for each step, by the number that its observation is."""

    def __init__(self, rewards: Tensor):
        super().__init__(SPACE, SPACE, normalize_images=False)
        self.rewards = nn.Parameter(rewards.flatten().clone())

    def forward(self, state, action, next_state, done):
        return self.rewards[state[:, 0].long()]


def pairs() -> list[tuple[Trajectory, Trajectory]]:
    """Comparisons of clips whose observations number all steps in turn."""
    number = np.arange(Q * 2 * L, dtype=np.float32).reshape(Q, 2, L, 1)
    number = np.concatenate((number, number[:, :, -1:]), axis=2)  # the last observation is nobody's reward
    return [tuple(Trajectory(clip, clip[:-1], None, False) for clip in pair) for pair in number]


def main() -> None:
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(Q, 2, L, generator=g)
    members = torch.randn(M, Q, 2, L, generator=g)
    preferences = np.array([1.0, 0.0, 0.5, 1.0, 1.0, 0.0], np.float32)
    names = ("imitation", "stable-baselines3", "torch", "gymnasium")
    content: dict = {"versions": {name: version(name) for name in names}}
    content |= {
        "rewards": rewards.tolist(),
        "preferences": preferences.tolist(),
        "member_rewards": members.tolist(),
    }
    content["losses"] = []
    for noise in (0.0, 0.1):
        model = PreferenceModel(Table(rewards), noise_prob=noise)
        loss = CrossEntropyRewardLoss()(pairs(), preferences, model).loss
        (gradient,) = torch.autograd.grad(loss, [model.model.rewards])
        case = {"noise": noise, "loss": loss.item(), "gradient": gradient.view(Q, 2, L).tolist()}
        content["losses"].append(case)
    ensemble = PreferenceModel(RewardEnsemble(SPACE, SPACE, [Table(member) for member in members]))
    asker = ActiveSelectionFragmenter(ensemble, RandomFragmenter(np.random.default_rng(0)), 10, "probability")
    variance = [asker.variance_estimate(*pair) for pair in members.permute(1, 2, 3, 0)]
    content["disagreement"] = [float(value) for value in variance]
    path = Path(__file__).parents[1] / "tests" / "imitation.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
