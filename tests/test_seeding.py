"""One random stream a purpose: no two of a run, and no two runs, have anything in common."""

import numpy as np
import pytest
import torch

from zoo.common.envs import make_envs
from zoo.common.seeding import env_seeds, generator_seed

PURPOSES = ("network", "noise", "environments", "evaluation", "noise\x01")
INDICES = ((), (0,), (1,), (256,), (0, 0), (0, 1), (1, 0))


def test_no_two_streams_are_the_same():
    numbers = [
        generator_seed(seed, purpose, *i) for seed in range(20) for purpose in PURPOSES for i in INDICES
    ]
    assert len(set(numbers)) == len(numbers) == 20 * len(PURPOSES) * len(INDICES)
    assert all(0 <= number < 2**64 for number in numbers) and max(numbers) > 2**63
    seeds = [
        s
        for seed in range(20)
        for purpose in PURPOSES
        for i in INDICES
        for s in env_seeds(seed, purpose, 8, *i)
    ]
    # 5,600 numbers of 31 bits: two would be equal by chance once in 137 times
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds) and max(seeds) > 2**30


def test_streams_are_those_of_numpys_seed_sequence():
    key = (*b"noise", 0, 3)
    assert (
        generator_seed(7, "noise", 3)
        == np.random.SeedSequence(7, spawn_key=key).generate_state(1, np.uint64)[0]
    )
    # more environments: more of the same
    assert env_seeds(7, "evaluation", 5) == env_seeds(7, "evaluation", 64)[:5]


def test_network_and_noise_are_uncorrelated():
    """1,000 normal numbers of each: a correlation of 0.15 would be chance once in 500,000 times."""
    streams = [
        torch.randn(1000, generator=torch.Generator().manual_seed(generator_seed(seed, purpose)))
        for seed in (1, 2)
        for purpose in ("network", "noise", "replay")
    ]
    between = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert between.abs().max() < 0.15


@pytest.mark.parametrize("env_id", ["CartPole-v1", "HalfCheetah-v4"])
def test_runs_share_no_start_and_equal_seeds_share_it(env_id):
    envs, starts = make_envs(env_id, 16, threads=1), []
    for seed, purpose, step in (
        (1, "environments", 0),
        (2, "environments", 0),
        (1, "environments", 64),
        (1, "evaluation", 0),
    ):
        starts.append(envs.reset(env_seeds(seed, purpose, 16, step)))
    assert len(np.unique(np.concatenate(starts), axis=0)) == 64
    np.testing.assert_array_equal(envs.reset(env_seeds(2, "environments", 16, 0)), starts[1])
    groups = envs.reset(np.repeat(env_seeds(1, "environments", 4), 4))
    assert (groups.reshape(4, 4, -1) == groups[::4, None]).all() and len(np.unique(groups, axis=0)) == 4
    for wrong in ([], [1], range(17)):
        with pytest.raises(ValueError, match=f"one seed for each of 16 environments, not {len(wrong)}"):
            envs.reset(wrong)
    envs.close()
