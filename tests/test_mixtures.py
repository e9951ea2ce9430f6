"""zoo/common/mixtures.py and diffusion.py: exact quantities against sampling, closed forms and each other."""

import math

import pytest
import torch

from zoo.common import mixtures
from zoo.common.diffusion import cosine_schedule
from zoo.common.errors import UsageError
from zoo.common.mixtures import F64, Grid

SIGMA = torch.tensor([1.0, 0.3, 0.5, 0.8], dtype=F64)  # of three steps


def linear(points: torch.Tensor, slopes: list[float], shift: float = 0.0) -> torch.Tensor:
    """mu_t(x) = slope_t x + shift (T, 1, N, d)."""
    return torch.stack([(slope * points + shift)[None] for slope in slopes])


def moments(grid: Grid, chance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = chance @ grid.points
    return mean, chance @ (grid.points - mean) ** 2


@pytest.mark.parametrize("dim", [1, 2])
def test_marginals_of_a_linear_chain(dim):
    """A linear chain stays Gaussian: means and variances in closed form."""
    grid = mixtures.make_grid(dim, 7.0, 0.25)
    slopes, shift = [0.9, 0.7, 0.5], 0.2
    chance = mixtures.marginals(grid, linear(grid.points, slopes, shift), SIGMA)
    mean, variance = 0.0, 1.0
    for t in (3, 2, 1):
        mean, variance = slopes[t - 1] * mean + shift, slopes[t - 1] ** 2 * variance + SIGMA[t].item() ** 2
        found_mean, found_variance = moments(grid, chance[t - 1, 0])
        torch.testing.assert_close(found_mean, torch.full((dim,), mean, dtype=F64), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(
            found_variance, torch.full((dim,), variance, dtype=F64), rtol=1e-6, atol=1e-8
        )


def test_path_kl_of_a_shifted_chain():
    """Means apart by a constant c cost c^2 / 2 sigma^2 a step and dimension."""
    grid = mixtures.make_grid(2, 6.0, 0.3)
    means, ref = linear(grid.points, [0.9, 0.7, 0.5], 0.2), linear(grid.points, [0.9, 0.7, 0.5])
    found = mixtures.path_kl(mixtures.marginals(grid, means, SIGMA), means, ref, SIGMA)
    expected = sum(2 * 0.2**2 / (2 * s**2) for s in SIGMA[1:].tolist())
    torch.testing.assert_close(found, torch.tensor([expected], dtype=F64))


@pytest.mark.parametrize("dim", [1, 2])
def test_the_best_chain_of_a_linear_reward(dim):
    """With r = x_1 and mu_ref = a x, V_t = slope_t x + sum sigma^2 slope^2 / 2 beta, in closed form."""
    grid, beta, slopes = mixtures.make_grid(dim, 9.0, 0.25), 0.7, [0.9, 0.7, 0.5]
    values = mixtures.soft_values(grid, linear(grid.points, slopes), SIGMA, grid.points[:, 0], beta)
    near = grid.points.abs().amax(-1) < 3
    slope, constant = 1.0, 0.0
    for t in (1, 2, 3):
        constant += slope**2 * SIGMA[t].item() ** 2 / (2 * beta)
        slope *= slopes[t - 1]
        torch.testing.assert_close(
            values[t, 0][near], slope * grid.points[near, 0] + constant, rtol=1e-6, atol=1e-7
        )


def test_no_chain_does_better_than_the_best():
    """J of the optimal chain, evaluated as any other, is J*; J of shifted ones is less."""
    grid, beta, slopes = mixtures.make_grid(1, 9.0, 0.25), 0.7, [0.9, 0.7, 0.5]
    ref = linear(grid.points, slopes)
    truth = mixtures.make_truth(grid, ref, SIGMA, grid.points[:, 0], beta)
    best, slope = [], 1.0
    for t in (1, 2, 3):  # the optimal mean is a x + sigma^2 slope / beta
        best.append(ref[t - 1] + slope * SIGMA[t] ** 2 / beta)
        slope *= slopes[t - 1]
    found = mixtures.compare(grid, truth, torch.stack(best), SIGMA, beta)
    assert abs(found["gap"]) < 1e-6
    for change in (-0.05, 0.05):
        other = mixtures.compare(grid, truth, torch.stack(best) + change, SIGMA, beta)
        assert other["gap"] > 1e-3


def perfect_means(target: mixtures.Mixture, points, schedule):
    """The chain whose x_0 prediction is E[x_0 | x_t] of a mixture (T, C, N, d)."""
    rows = []
    for t in range(1, schedule.steps + 1):
        a, s = schedule.signal[t].double(), schedule.noise[t].double()
        before = schedule.noise[t - 1].double()
        for c in range(target.contexts):
            variance = a**2 * target.std**2 + s**2
            centre = target.mean[c].double()
            distance = ((points[:, None] - a * centre) ** 2).sum(-1)
            weight = torch.softmax(target.weight[c].double().log() - distance / (2 * variance), -1)
            component = centre + (a * target.std**2 / variance) * (points[:, None] - a * centre)
            x0 = (weight[..., None] * component).sum(1)
            rest = (before**2 - schedule.sigma[t].double() ** 2).clamp(min=0).sqrt()
            rows.append(schedule.signal[t - 1] * x0 + rest * (points - a * x0) / s)
    return torch.stack(rows).view(schedule.steps, target.contexts, *points.shape)


@pytest.mark.parametrize(("eta", "memoryless"), [(1.0, True), (0.3, False)])
def test_the_best_chain_ends_in_the_tilt_where_sampling_is_memoryless(eta, memoryless):
    """arXiv:2409.08861: with eta = 1 x_T tells nothing of x_0, and the optimum is p_ref exp(r / beta) / Z."""
    target, schedule, beta = mixtures.line(), cosine_schedule(20, eta), 0.5
    grid = mixtures.make_grid(1, target.half_width, 0.05)
    ref = perfect_means(target, grid.points, schedule)
    reward = target.reward(grid.points)
    truth = mixtures.make_truth(grid, ref, schedule.sigma, reward, beta)
    values = mixtures.soft_values(grid, ref, schedule.sigma, reward, beta)
    best = mixtures.best_marginal(grid, ref, schedule.sigma, values, beta)
    torch.testing.assert_close(best.sum(-1), torch.ones(2, dtype=F64))
    kl = (best * (best.clamp(min=1e-300).log() - truth.tilt.clamp(min=1e-300).log())).sum(-1).mean()
    assert (kl < 1e-5) == memoryless and (kl > 1e-2) != memoryless


def test_a_perfect_denoiser_makes_the_data():
    """Its chain's x_0 is the mixture, within what 100 steps leave of the discretisation and the floor of
    sigma.
    """
    target, schedule = mixtures.line(), cosine_schedule(100)
    grid = mixtures.make_grid(1, target.half_width, 0.05)
    chance = mixtures.marginals(grid, perfect_means(target, grid.points, schedule), schedule.sigma)[0]
    for c in range(2):
        density = torch.exp(-0.5 * ((grid.points - target.mean[c, :, 0].double()) / target.std) ** 2)
        density = (density @ target.weight[c].double()) / (target.std * math.sqrt(2 * math.pi))
        assert 0.5 * (chance[c] - density * grid.cell).abs().sum() < 0.05


def test_compare_of_the_reference_with_itself():
    target, schedule = mixtures.line(), cosine_schedule(20)
    grid = mixtures.make_grid(1, target.half_width, 0.05)
    ref = perfect_means(target, grid.points, schedule)
    truth = mixtures.make_truth(grid, ref, schedule.sigma, target.reward(grid.points), 1e6)
    found = mixtures.compare(grid, truth, ref, schedule.sigma, 1e6)
    assert found["path_kl"] == 0 and found["kl_tilt"] < 1e-9 and found["w1"] < 1e-5 and found["tv"] < 1e-5
    shifted = mixtures.compare(
        grid, truth, ref + 0.1 * (torch.arange(20) == 0).view(-1, 1, 1, 1), schedule.sigma, 1e6
    )
    assert shifted["w1"] == pytest.approx(0.1, abs=2e-3)  # the last step shifts every x_0 by 0.1
    assert shifted["path_kl"] == pytest.approx(0.1**2 / (2 * 0.05**2))


def test_a_mean_that_left_the_grid_lies_on_its_edge():
    grid = mixtures.make_grid(1, 6.0, 0.05)
    means = linear(grid.points, [0.0, 0.0, 0.0], 1e4)
    chance = mixtures.marginals(grid, means, SIGMA)
    assert chance[0, 0, -1] > 0.99
    kl = mixtures.path_kl(chance, means, linear(grid.points, [0.0] * 3), SIGMA)
    assert kl > 1e8 and torch.isfinite(kl).all()


@pytest.mark.parametrize("make", [mixtures.line, mixtures.ring])
def test_samples_are_of_the_mixture(make):
    target = make()
    generator = torch.Generator().manual_seed(0)
    for c in range(target.contexts):
        x = target.sample(torch.full((20_000,), c), generator)
        masses = target.masses(x, torch.full((len(x),), 1 / len(x), dtype=F64), c)
        torch.testing.assert_close(masses.float(), target.weight[c], atol=0.01, rtol=0)
        near = x[(x - target.mean[c, 0]).norm(dim=-1) < 2 * target.std] - target.mean[c, 0]
        assert near.std(0).max() == pytest.approx(0.88 * target.std, rel=0.05)  # cut off at two of them


@pytest.mark.parametrize("make", [mixtures.line, mixtures.ring])
def test_samples_are_where_their_contexts_are(make):
    """On the device that stands for any but the CPU; masses as well."""
    target, context = make(), torch.zeros(4, dtype=torch.int64, device="meta")
    x = target.sample(context, None)
    assert x.shape == (4, target.dim) and x.device.type == target.reward(x).device.type == "meta"
    assert target.masses(x, x[:, 0]).device.type == "meta"


def test_the_ring_pays_two_opposite_modes_alike():
    target = mixtures.ring()
    paid = target.reward(target.mean[0])
    torch.testing.assert_close(paid[[0, 4]], torch.ones(2))
    assert paid[[1, 2, 3, 5, 6, 7]].max() < 0.05


def test_the_schedule():
    schedule = cosine_schedule(20)
    torch.testing.assert_close(schedule.signal**2 + schedule.noise**2, torch.ones(21))
    assert schedule.signal[0] == 1 and schedule.signal[20] < 0.05 and (schedule.signal.diff() < 0).all()
    assert schedule.sigma[1:].min() == pytest.approx(0.05)  # the floor, which only the last step needs
    ratio = (schedule.signal[5] / schedule.signal[4]) ** 2
    ddpm = (schedule.noise[4] / schedule.noise[5]) ** 2 * (1 - ratio)
    torch.testing.assert_close(schedule.sigma[5] ** 2, ddpm)
    torch.testing.assert_close(cosine_schedule(20, eta=0.5).sigma[5], schedule.sigma[5] / 2)


def test_a_schedule_whose_last_sigma_is_0_is_refused():
    with pytest.raises(UsageError, match="--min-sigma 0: the last sigma of the schedule would be 0"):
        cosine_schedule(20, min_sigma=0.0)


def test_compare_by_hand():
    """Linear chains of two contexts stay Gaussian, and so does the tilt of a linear reward: every column in
    closed form, a mean over the contexts.
    """
    grid, beta, slopes = mixtures.make_grid(1, 9.0, 0.25), 0.7, [0.9, 0.7, 0.5]
    other = [0.8, 0.9, 0.5]

    def chains(slopes, *shifts):
        return torch.cat([linear(grid.points, slopes, shift) for shift in shifts], 1)

    def gaussian(slopes, shift):
        """Mean and variance of x_0; the chain's KL to the reference of the same context, step by step."""
        mean, variance, kl = 0.0, 1.0, 0.0
        for t in (3, 2, 1):
            own, ref = slopes[t - 1], [0.9, 0.7, 0.5][t - 1]
            apart = (own - ref) ** 2 * (variance + mean**2) + 2 * (own - ref) * shift * mean + shift**2
            kl += apart / (2 * SIGMA[t].item() ** 2)
            mean, variance = own * mean + shift, own**2 * variance + SIGMA[t].item() ** 2
        return mean, variance, kl

    truth = mixtures.make_truth(grid, chains(slopes, 0.0, 0.0), SIGMA, grid.points[:, 0], beta)
    _, width, _ = gaussian(slopes, 0.0)
    best = (SIGMA[1] ** 2 + (0.9 * SIGMA[2]) ** 2 + (0.9 * 0.7 * SIGMA[3]) ** 2).item() / (2 * beta)
    tilt = width / beta  # the mean of the tilt, whose variance is the reference's
    for own in (slopes, other):
        found = mixtures.compare(grid, truth, chains(own, 0.2, 0.5), SIGMA, beta)
        (mean, variance, kl), (mean2, _, kl2) = gaussian(own, 0.2), gaussian(own, 0.5)
        reward, path = (mean + mean2) / 2, (kl + kl2) / 2
        apart = [abs(m - tilt) for m in (mean, mean2)]
        to_tilt = [0.5 * ((variance + x**2) / width - 1 + math.log(width / variance)) for x in apart]
        expected = {
            "objective": reward - beta * path, "best_objective": best, "gap": best - reward + beta * path,
            "reward": reward, "reward_tilt": tilt, "path_kl": path, "kl_tilt": sum(to_tilt) / 2,
        }  # fmt: skip
        if own is slopes:  # then the Gaussians' variances are the same
            expected["w1"] = sum(apart) / 2
            expected["tv"] = sum(math.erf(x / math.sqrt(8 * width)) for x in apart) / 2
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-3), name


def test_the_schedule_is_the_papers():
    """Nichol & Dhariwal 2021, eq. 17: f(t) / f(0) is alpha_bar_t, but for the last beta, which is 0.95."""

    def f(t):
        return math.cos((t / 20 + 0.008) / 1.008 * math.pi / 2) ** 2

    schedule = cosine_schedule(20)
    for t in range(1, 20):
        assert schedule.signal[t].item() ** 2 == pytest.approx(f(t) / f(0), rel=1e-4)
    assert (schedule.signal[20] / schedule.signal[19]).item() ** 2 == pytest.approx(0.05, rel=1e-4)
