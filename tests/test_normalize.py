"""Running statistics, observation normalisation and the discounted sums that scale rewards, against NumPy."""

import numpy as np
import pytest
import torch

from zoo.common.normalize import discounted_sums, new_stats, normalize, return_scale, update_stats


@pytest.mark.parametrize("sizes", [(7,), (1, 1, 1), (5, 1, 300, 2), (64, 64, 64)])
def test_statistics_equal_numpys_over_all_batches(sizes):
    rng = np.random.default_rng(0)
    batches = [rng.normal(1000 * i, 1 + i, (size, 3)).astype(np.float32) for i, size in enumerate(sizes)]
    stats = new_stats(3)
    for batch in batches:
        stats = update_stats(stats, torch.from_numpy(batch))
    everything = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(stats["mean"], everything.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats["var"], everything.var(0), rtol=1e-12, atol=1e-20)  # ddof 0
    assert stats["count"] == len(everything)


def test_statistics_of_scalars_and_far_from_zero():
    values = 1e6 + np.arange(100.0)
    stats = new_stats()
    for batch in np.split(values, 10):
        stats = update_stats(stats, torch.from_numpy(batch))
    assert stats["mean"].item() == pytest.approx(values.mean(), rel=1e-14)
    assert stats["var"].item() == pytest.approx(values.var(), rel=1e-9)


def test_update_returns_new_statistics():
    stats = new_stats(2)
    update_stats(stats, torch.ones(4, 2))
    assert stats["count"] == 0 and torch.equal(stats["mean"], torch.zeros(2, dtype=torch.float64))


def test_normalize():
    data = np.random.default_rng(1).normal((5.0, -300.0), (0.1, 40.0), (50, 2)).astype(np.float32)
    stats = update_stats(new_stats(2), torch.from_numpy(data))
    seen = normalize(torch.from_numpy(data), stats)
    assert seen.dtype == torch.float32
    np.testing.assert_allclose(seen, (data - data.mean(0)) / data.std(0), rtol=1e-3, atol=1e-4)
    rows = normalize(torch.from_numpy(data).view(5, 10, 2), stats)  # whole rollouts as well
    assert torch.equal(rows.flatten(0, 1), seen)


def test_normalized_values_are_clipped_at_ten_deviations():
    stats = update_stats(new_stats(1), torch.tensor([[-1.0], [1.0]]))  # mean 0, standard deviation 1
    seen = normalize(torch.tensor([[9.5], [10.5], [-9.5], [-1e6]]), stats)
    torch.testing.assert_close(seen, torch.tensor([[9.5], [10.0], [-9.5], [-10.0]]))


def test_nothing_is_normalized_before_anything_was_counted():
    obs = torch.tensor([[1e6, -3.0]])
    torch.testing.assert_close(normalize(obs, new_stats(2)), obs)


def test_a_constant_observation_stays_finite():
    stats = update_stats(new_stats(1), torch.full((9, 1), 0.3))
    assert normalize(torch.full((1, 1), 0.3), stats).abs().item() < 1e-2


def test_discounted_sums_by_hand():
    reward, ended = (
        torch.tensor([[1.0], [2.0], [4.0], [8.0]]),
        torch.tensor([[False], [True], [False], [False]]),
    )
    sums, carry = discounted_sums(reward, ended, torch.tensor([10.0]), 0.5)
    # 10/2 + 1 = 6; 6/2 + 2 = 5, the episode ends; 4; 4/2 + 8 = 10
    assert sums.flatten().tolist() == [6.0, 5.0, 4.0, 10.0] and carry.tolist() == [10.0]


def test_discounted_sums_against_a_loop_and_across_calls():
    rng = np.random.default_rng(2)
    reward, ended, gamma = rng.normal(size=(30, 4)), rng.random((30, 4)) < 0.2, 0.9
    ended[9, 0] = True  # the last row of a call
    expected = np.zeros((30, 4))
    for i in range(4):
        start = 0
        for t in range(30):
            expected[t, i] = sum(gamma ** (t - k) * reward[k, i] for k in range(start, t + 1))
            start = t + 1 if ended[t, i] else start
    carry, parts = torch.zeros(4, dtype=torch.float64), []
    for first in (0, 10, 20):
        rows = slice(first, first + 10)
        sums, carry = discounted_sums(
            torch.from_numpy(reward[rows]), torch.from_numpy(ended[rows]), carry, gamma
        )
        parts.append(sums)
    np.testing.assert_allclose(torch.cat(parts), expected, rtol=1e-12, atol=1e-12)


def test_observations_far_from_zero_are_told_apart_in_float64():
    obs = 1e8 + torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    seen = normalize(obs, update_stats(new_stats(1), obs))
    assert seen.dtype == torch.float32
    torch.testing.assert_close(seen, torch.tensor([[-1.0], [1.0]]))


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_return_scale_is_the_standard_deviation(size):
    sums = size * np.random.default_rng(3).normal(2.0, 1.0, 500)
    scale = return_scale(update_stats(new_stats(), torch.from_numpy(sums)))
    assert scale.dtype == torch.float32 and scale.item() == pytest.approx(sums.std(), rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e4])
def test_returns_that_are_all_equal_have_no_scale(value):
    """They are left as they are, even where rounding makes some of them differ in the last place."""
    assert return_scale(new_stats()) == 1.0
    sums = torch.full((64,), value, dtype=torch.float32)
    stats = update_stats(update_stats(new_stats(), sums), sums.double() * (1 + 1e-9))
    assert return_scale(stats) == 1.0
