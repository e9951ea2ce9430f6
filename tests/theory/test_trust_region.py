"""The surrogate, its clip and the bound on what a step can cost, on random MDPs: items 23 to 25."""

import exact
import pytest
import torch
from exact import F64, close, error, random_mdps
from torch.func import grad, jacrev

from zoo import ppo, trpo


def data(mdp, pi_old, normalised=False):
    """Every (s, a) of one MDP: states, actions, the old log-probabilities, advantages scaled so that a plain
    mean over them is the sum over s, a of d(s) pi_old(a|s) f, with d the discounted visits (or those
    normalised to a distribution).
    """
    _, states, actions = pi_old.shape
    visits = mdp.visits(pi_old)[0]
    if normalised:
        visits = visits / visits.sum()
    state = torch.arange(states).repeat_interleave(actions)
    action = torch.arange(actions).repeat(states)
    advantage = (mdp.q(pi_old) - mdp.value(pi_old)[..., None])[0].flatten()
    scale = visits[state] * pi_old[0].flatten() * len(state)
    return state, action, advantage, scale


def surrogates(mdp, logits_old, normalised=False):
    """theta -> L of each of the zoo's losses, signs turned to 'higher is better'."""
    state, action, advantage, scale = data(mdp, logits_old.softmax(-1), normalised)
    old = ppo.Categorical(logits_old[0][state])

    def clipped(kind):
        def loss(logits):
            log_ratio = ppo.Categorical(logits[0][state]).log_prob(action) - old.log_prob(action)
            return -ppo.policy_loss(
                log_ratio.exp(), log_ratio, advantage * scale, torch.tensor(0.0), kind, 0.2
            )

        return loss

    def trust_region(logits):
        batch = trpo.PolicyBatch(state, action, trpo.Categorical(old.logits), advantage * scale)
        policy = lambda x, s: (trpo.Categorical(x[0][s]), None)  # noqa: E731
        return trpo.surrogate(policy, trpo.Args(), logits, batch)[0]

    return {"unclipped": clipped("unclipped"), "clip": clipped("clip"), "trpo": trust_region}


def problem(seed):
    mdp, g = random_mdps(1, seed=seed)
    return mdp, torch.randn(1, 4, 3, generator=g, dtype=F64), torch.randn(1, 4, 3, generator=g, dtype=F64)


# --- 23: the surrogate's first order ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unclipped", "clip", "trpo"])
def test_23_value_and_gradient_at_the_old_policy(kind):
    """S3 Theorem 8.3, Proposition 9.5: L(old) = E[A] = 0 and grad L = grad J at the old policy, clipped or
    not."""
    for seed in range(10):
        mdp, old, _ = problem(seed)
        surrogate = surrogates(mdp, old)[kind]
        assert surrogate(old).abs() < 1e-12
        gradient = grad(lambda x, mdp=mdp: mdp.objective(x.softmax(-1))[0])(old)
        close(grad(surrogate)(old), gradient, atol=1e-10)


def test_23_the_printed_surrogate_lacks_a_scale():
    """S3 Theorem 8.3 has a mean over states: then grad L is (1 - gamma) grad J, the right direction, not the
    right length."""
    for seed in range(10):
        mdp, old, _ = problem(seed)
        gradient = grad(lambda x, mdp=mdp: mdp.objective(x.softmax(-1))[0])(old)
        printed = grad(surrogates(mdp, old, normalised=True)["unclipped"])(old)
        close(printed, (1 - mdp.gamma) * gradient, atol=1e-10)
        assert error(printed, gradient) > 0.4


def test_23_beyond_the_first_order_they_part():
    """S3 Remark 8.4: J - J(old) - L is of second order, so halving the step quarters it."""
    for seed in range(10):
        mdp, old, direction = problem(seed)
        surrogate = surrogates(mdp, old)["unclipped"]
        gaps = []
        for step in (0.02, 0.01):
            new = old + step * direction
            gaps.append(
                (mdp.objective(new.softmax(-1)) - mdp.objective(old.softmax(-1)) - surrogate(new))
                .abs()
                .item()
            )
        assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.25) and gaps[1] > 1e-9


def test_23_maximising_the_surrogate_alone_can_ruin_the_policy():
    """S3 8.4, Example 8.5: the surrogate's maximiser is greedy in the old advantages at the old policy's
    states; where those change, its L promises much and J falls, while the clipped surrogate sees no gain in
    going so far.
    """
    left, right, trap = (
        0,
        1,
        2,
    )  # in `left`, action 1 leads to `right`, rarely visited, where action 0 pays and action 1 traps
    transition, reward = torch.zeros(1, 3, 2, 3, dtype=F64), torch.zeros(1, 3, 2, dtype=F64)
    transition[0, left, 0, left] = transition[0, left, 1, right] = 1
    transition[0, right, 0, left] = transition[0, right, 1, trap] = transition[0, trap, :, trap] = 1
    reward[0, left, 0], reward[0, right, 0], reward[0, trap] = 0.1, 3.0, -1.0
    start = torch.tensor([[1.0, 0.0, 0.0]], dtype=F64)
    mdp = exact.MDP(transition, reward, start, torch.tensor([0.9], dtype=F64))
    # the old policy does the right thing in `right`; the new one moves there, and has unlearnt it by a small
    # sample's noise
    old = torch.tensor([[[3.0, -3.0], [3.0, -3.0], [0.0, 0.0]]], dtype=F64)
    new = torch.tensor([[[-3.0, 3.0], [-3.0, 3.0], [0.0, 0.0]]], dtype=F64)
    losses = surrogates(mdp, old)
    assert losses["unclipped"](new) > 10 and losses["clip"](new) < 0.1
    assert mdp.objective(new.softmax(-1)) < mdp.objective(old.softmax(-1)) - 5


# --- 24: the improvement bound ------------------------------------------------------------------------------


def bounds(count, size, seed=0):
    """J(new), the right bound, and the notes' and a half-corrected one (count,), for policies a step of
    `size` apart."""
    mdp, g = random_mdps(count, seed=seed)
    old, change = (torch.randn(count, 4, 3, generator=g, dtype=F64) for _ in range(2))
    new = old + size * change
    kl = (
        trpo.kl(trpo.Categorical(old.flatten(0, 1)), trpo.Categorical(new.flatten(0, 1)))
        .view(count, 4)
        .max(1)[0]
    )
    pi_old, pi_new = old.softmax(-1), new.softmax(-1)
    advantage, visits = mdp.q(pi_old) - mdp.value(pi_old)[..., None], mdp.visits(pi_old)
    gain = torch.einsum("ms,msa,msa->m", visits, pi_new, advantage)
    some = range(0, count, 50)  # what the zoo's surrogate says of them
    for i in some:
        one = exact.MDP(*(x[i : i + 1] for x in mdp))
        close(surrogates(one, old[i : i + 1])["trpo"](new[i : i + 1]), gain[i])
    penalty = 4 * kl * mdp.gamma / (1 - mdp.gamma) ** 2 * advantage.abs().amax((1, 2))
    j_old, mean_gain = mdp.objective(pi_old), gain * (1 - mdp.gamma)
    return mdp.objective(pi_new), j_old + gain - penalty, mean_gain - penalty, j_old + mean_gain - penalty


@pytest.mark.parametrize("size", [0.003, 0.03, 0.3, 3.0])
def test_24_the_bound_holds(size):
    """S3 Theorem 8.11 as it must read, J(new) >= J(old) + sum_s d(s) sum_a pi_new A - 4 gamma max|A| max KL /
    (1 - gamma)^2, with d unnormalised: in every one of 4 x 2,500 random MDPs.
    """
    new, right, _, _ = bounds(2500, size)
    assert (new >= right - 1e-10).all()
    if size < 0.1:
        assert (new - right).abs().median() < 0.5  # and says something


def test_24_the_printed_bound_fails():
    """S3 (23) lacks J(old) and the scale 1 / (1 - gamma): violated in a quarter and more of 2,500 MDPs; with
    J(old) but without the scale still, for small steps that lose.
    """
    new, _, printed, half = bounds(2500, 0.003)
    assert (new < printed).double().mean() > 0.25
    assert (new < half - 1e-10).double().mean() > 0.25


def test_24_the_constraint_is_a_quadratic_near_the_old_policy():
    """S3 (20)(21), 8.6.2: the mean KL is 1/2 step^T F step to second order, with the zoo's Fisher-vector
    product."""
    _, old, direction = problem(0)
    theta, step = old.flatten(), direction.flatten()

    def forward(x, state):
        return trpo.Categorical(x.view(4, 3)[state]), None

    state = torch.arange(4)
    quadratic = step @ trpo.fisher_product(forward, theta, state, step) / 2
    for size in (1e-2, 1e-3):
        true = trpo.kl(forward(theta, state)[0], forward(theta + size * step, state)[0]).mean() / size**2
        assert true.item() == pytest.approx(quadratic.item(), rel=3 * size)


# --- 25: the clip, piece by piece ---------------------------------------------------------------------------

RATIOS = torch.linspace(0.01, 3.0, 500, dtype=F64)


def objective(ratio, advantage, kind="clip"):
    """L of each ratio, and its slope."""

    def one(r):
        return -ppo.policy_loss(
            r[None], r[None].log(), torch.tensor([advantage], dtype=F64), torch.tensor(0.0), kind, 0.2
        )

    return torch.func.vmap(one)(ratio), torch.func.vmap(grad(one))(ratio)


@pytest.mark.parametrize("advantage", [1.7, -0.6])
def test_25_the_clip_piece_by_piece(advantage):
    """S3 Theorem 9.3: min(r, 1 + eps) A for A > 0, max(r, 1 - eps) A for A < 0; beyond the bound no slope,
    elsewhere A; and never above r A.
    """
    found, slope = objective(RATIOS, advantage)
    bounded = RATIOS.clamp(max=1.2) if advantage > 0 else RATIOS.clamp(min=0.8)
    close(found, bounded * advantage)
    flat = RATIOS > 1.2 if advantage > 0 else RATIOS < 0.8
    close(slope, torch.where(flat, 0.0, advantage))
    assert (found <= RATIOS * advantage + 1e-12).all()


def test_25_the_proofs_inequalities_are_reversed():
    """S3 Theorem 9.3's proof, case 2 (A < 0): below 1 - eps it has min = r A, above 1 + eps min = (1 + eps)
    A. The other way round: (1 - eps) A and r A; its conclusion is right.
    """
    (low, high), _ = objective(torch.tensor([0.5, 1.5], dtype=F64), -1.0)
    assert low == pytest.approx(-0.8) and high == pytest.approx(-1.5)
    assert abs(low - 0.5 * -1.0) > 0.2 and abs(high - 1.2 * -1.0) > 0.2


def test_25_the_clip_takes_slopes_away_only():
    """S4 2.4.3: within [1 - eps, 1 + eps] both objectives are the same; the clip bounds the incentive, not
    the ratio."""
    near = torch.linspace(0.81, 1.19, 50, dtype=F64)
    for advantage in (1.0, -1.0):
        close(objective(near, advantage)[0], objective(near, advantage, "unclipped")[0])
        close(objective(near, advantage)[1], objective(near, advantage, "unclipped")[1])
    assert objective(torch.tensor([5.0], dtype=F64), 1.0)[1] == 0  # it stays at 5: nothing pulls it back
    assert jacrev(lambda r: objective(r, -1.0)[0])(torch.tensor([5.0], dtype=F64)).item() == pytest.approx(-1)
