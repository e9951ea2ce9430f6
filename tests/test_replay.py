"""The replay buffer by enumeration of all it may draw."""

import numpy as np
import pytest
import torch

from zoo.common.envs import Step
from zoo.common.errors import UsageError
from zoo.common.replay import ReplayBuffer

CPU = torch.device("cpu")
CUDA = pytest.param(
    torch.device("cuda"), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
)


class Story:
    """N scripted environments that observe (environment, episode, time), with what truly happened."""

    def __init__(self, num_envs, seed):
        self.rng, self.num_envs = np.random.default_rng(seed), num_envs
        self.obs = np.array([[i, 0, 0] for i in range(num_envs)], np.float32)
        self.true = []  # of every transition: (obs, action, reward, next_obs, terminated)

    def tell(self, buffer):
        """One step of all environments, stored."""
        n = self.num_envs
        # endings come in bursts, so that room for them is short again and again
        busy = len(self.true) // n % 24 >= 12
        chances = [0.1, 0.3, 0.3, 0.3] if busy else [0.91, 0.03, 0.03, 0.03]
        kind = self.rng.choice(["", "terminated", "truncated", "both"], size=n, p=chances)
        terminated, truncated = np.isin(kind, ["terminated", "both"]), np.isin(kind, ["truncated", "both"])
        next_obs, action = self.obs + np.float32([0, 0, 1]), self.rng.random((n, 2)).astype(np.float32)
        reward, ended = self.rng.random(n), terminated | truncated
        obs = np.where(ended[:, None], next_obs * np.float32([1, 1, 0]) + np.float32([0, 1, 0]), next_obs)
        buffer.add(
            self.obs,
            torch.as_tensor(action),
            Step(obs, reward, next_obs, terminated, truncated, [(0.0, 1)] * int(ended.sum())),
        )
        rows = zip(self.obs, action, reward.astype(np.float32), next_obs, terminated, strict=True)
        self.true += [tuple(np.atleast_1d(x).tolist() for x in row) for row in rows]
        self.obs = obs

    def start_anew(self):
        self.obs = self.obs * np.float32([1, 1, 0]) + np.float32([0, 100, 0])


def as_tuples(transitions):
    return {tuple(tuple(x) for x in row) for row in transitions}


def drawn(buffer, count):
    columns = (
        x.reshape(count, -1).tolist()
        for x in buffer.sample(count, torch.Generator(buffer.obs.device).manual_seed(0))
    )
    return as_tuples(zip(*columns, strict=True))


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize(("num_envs", "slots"), [(1, 7), (3, 7), (3, 1), (4, 20)])
def test_the_buffer_holds_the_last_transitions_and_no_other(num_envs, slots, device):
    """After every step, wrapped around many times: exactly the last ones, each with its true successor."""
    story, buffer = Story(num_envs, seed=0), ReplayBuffer(slots, num_envs, 3, 2, device)
    for _ in range(5 * slots + 20):
        story.tell(buffer)
        kept = story.true[-slots * num_envs :]
        assert drawn(buffer, 20 * len(kept)) == as_tuples(kept)
    assert len(buffer.final_obs) <= 2 * slots * num_envs  # room for endings is taken as needed


@pytest.mark.parametrize("steps", [0, 1, 5, 7, 8, 13, 15, 16, 40])
def test_a_buffer_saved_and_restored_goes_on_without_joining_episodes(steps):
    story, buffer = Story(3, seed=1), ReplayBuffer(7, 3, 3, 2, CPU)
    for _ in range(steps):
        story.tell(buffer)
    state = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in buffer.state().items()}
    assert len(state["obs"]) == min(steps, 7) + 1  # no more than what was written
    again = ReplayBuffer(7, 3, 3, 2, CPU)
    again.restore(state)
    again.cut()
    story.start_anew()
    for _ in range(20):
        if story.true:
            assert drawn(again, 800) == as_tuples(story.true[-21:])
        story.tell(again)


def test_a_buffer_of_another_size_is_refused():
    state = ReplayBuffer(7, 3, 3, 2, CPU).state()
    for slots, num_envs in ((8, 3), (7, 2)):
        with pytest.raises(
            UsageError, match=f"--buffer-size, --num-envs: {slots} steps of {num_envs} .* 7 steps of 3"
        ):
            ReplayBuffer(slots, num_envs, 3, 2, CPU).restore(state)


def test_sampling_is_uniform():
    story, buffer = Story(2, seed=2), ReplayBuffer(5, 2, 3, 2, CPU)
    for _ in range(13):
        story.tell(buffer)
    seen = buffer.sample(20_000, torch.Generator().manual_seed(0)).reward
    counts = torch.unique(seen, return_counts=True)[1]
    assert len(counts) == 10 and (counts - 2000).abs().max() < 5 * 2000**0.5


def test_a_million_transitions_of_halfcheetah_fit_into_110_mb():
    buffer = ReplayBuffer(250_000, 4, 17, 6, CPU)
    arrays = [x for x in vars(buffer).values() if isinstance(x, torch.Tensor)]
    assert sum(x.nbytes for x in arrays) + 4000 * 17 * 4 <= 110e6  # the endings of 1000 steps each included


def test_draws_are_the_generators_alone():
    story, buffer = Story(2, seed=3), ReplayBuffer(20, 2, 3, 2, CPU)
    for _ in range(20):
        story.tell(buffer)
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # nothing of the process's own generator may matter
        drawn.append(buffer.sample(16, torch.Generator().manual_seed(0)).obs)
    assert torch.equal(*drawn)
