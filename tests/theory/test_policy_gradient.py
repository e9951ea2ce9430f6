"""The policy gradient, its baselines and its table of Psi_t, with expectations by enumeration: items 13 to 18
and 20."""

import itertools

import exact
import pytest
import tiny_mdp
import torch
from exact import (
    F64,
    THETA,
    at_steps,
    at_successors,
    close,
    cosine,
    error,
    mean_gradient,
    spread,
    to_go,
    values,
)
from torch.func import grad, hessian, jacrev

from zoo import reinforce
from zoo.actor_critic import gae, n_step, td

DISCOUNT = 0.7**exact.STEPS
WRONG = torch.tensor([[4.0, -3.0, 0.0]] * 4, dtype=F64)  # a critic that is wrong; the end is worth 0
WRONG[-1] = 0  # and so is the time limit, which is an end of this task


def estimate(i, gamma, value=None, **fields):
    """REINFORCE's own gradient estimate from episode i alone."""
    batch = exact.single(i)
    return_ = reinforce.returns_to_go(batch.reward, batch.alive, torch.zeros(1, dtype=F64), gamma)
    value = torch.zeros(2, dtype=F64) if value is None else value
    args = reinforce.Args(gamma=gamma, **fields)
    return reinforce.policy_gradient(exact.score_sum, batch, return_, value[batch.obs], args)[0]


def expected(gamma, **fields):
    return sum(c * estimate(i, gamma, **fields) for i, c in enumerate(exact.chances()))


# --- 13: the score, causality -------------------------------------------------------------------------------


def test_13_score_identity_of_a_categorical():
    """S3 Lemma 3.2, proof of 3.4: sum_a pi(a) grad log pi(a) = 0, and pi(a) grad log pi(a) = grad pi(a)."""
    logits = torch.tensor([0.3, -1.2, 2.0, 0.0], dtype=F64)
    every = torch.arange(4)

    def log_prob(x):
        return reinforce.Categorical(x.expand(4, -1)).log_prob(every)

    pi, score = log_prob(logits).exp(), jacrev(log_prob)(logits)
    close(pi @ score, torch.zeros(4, dtype=F64))
    close(pi[:, None] * score, jacrev(lambda x: log_prob(x).exp())(logits))
    assert score.norm(dim=1).min() > 0.3


def test_13_score_identity_of_a_gaussian():
    """S3 Lemma 3.2, proof of 3.4: E[grad log pi] = 0 in mean and log-std, by quadrature that is exact for
    polynomials."""
    mean, log_std = torch.tensor([0.4, -1.0], dtype=F64), torch.tensor([-0.5, 0.3], dtype=F64)
    x, w = exact.normal_nodes(2, 10)
    action = reinforce.Gaussian(mean, log_std).sample(x)
    for score in jacrev(lambda m, s: reinforce.Gaussian(m, s).log_prob(action), argnums=(0, 1))(
        mean, log_std
    ):
        close(w @ score, torch.zeros(2, dtype=F64), atol=1e-10)
        assert w @ score.norm(dim=1) > 0.5


def test_13_the_basic_form_is_the_gradient():
    """S3 Theorem 3.3, S4 (2.5): E[(sum_t grad log pi) R(tau)] = grad J."""
    close(expected(0.7, returns="total", baseline="none"), tiny_mdp.exact_gradient(0.7))


def test_13_causality():
    """S3 Lemma 3.4: E[grad log pi(a_t|s_t) r_t'] = 0 for t' < t, and not for t' >= t."""
    chance, score, reward = exact.chances(), exact.scores(), exact.REWARD * exact.ALIVE
    for t in range(3):
        for earlier in range(3):
            mean = torch.einsum("n,np,n->p", chance, score[t], reward[earlier])
            if earlier < t:
                close(mean, torch.zeros(4, dtype=F64))
            else:
                assert mean.norm() > 0.05


def test_13_reward_to_go_is_the_gradient():
    """S3 Theorem 3.5 as its proof has it: E[sum_t gamma^t grad log pi R_t] = grad J; S4 (2.6) is the case
    gamma = 1."""
    close(expected(0.7, returns="to-go", discount_weight=True, baseline="none"), tiny_mdp.exact_gradient(0.7))
    close(expected(1.0, returns="to-go", baseline="none"), tiny_mdp.exact_gradient(1.0))
    # S3 (3)(4): the finite sum of one episode
    close(to_go(0.7)[0, exact.ALIVE.all(0)], (DISCOUNT * exact.REWARD).sum(0)[exact.ALIVE.all(0)])


def test_13_causality_does_not_always_halve_the_variance():
    """S4 2.2.4 says to-go takes away at least half of the variance: not so, and it can even add some."""
    assert spread(to_go(1.0)) > 0.5 * spread((exact.REWARD * exact.ALIVE).sum(0).expand(3, -1))
    # pay 1 in the first step and take it back in the last: the total is always 0 in episodes of full length
    reward = torch.zeros_like(exact.REWARD)
    reward[0], reward[exact.ALIVE.sum(0) - 1, torch.arange(exact.COUNT)] = 1.0, reward[0, 0] - 1.0
    reward[0, exact.ALIVE.sum(0) == 1] = 0.0
    assert spread((reward * exact.ALIVE).sum(0).expand(3, -1)) < 1e-12 < 0.1 < spread(to_go(1.0, reward))


# --- 14: the factor gamma^t ---------------------------------------------------------------------------------


def test_14_without_gamma_t_the_direction_changes():
    """S3 (2) and its remark that gamma^t does not change the direction: it does (cosine below 1), with it the
    form is exact."""
    gradient = tiny_mdp.exact_gradient(0.7)
    close(mean_gradient(DISCOUNT * to_go(0.7)), gradient)
    dropped = mean_gradient(to_go(0.7))
    assert cosine(dropped, gradient) < 0.9995 and error(dropped, gradient) > 0.2
    close(dropped, expected(0.7, returns="to-go", baseline="none"))


def test_14_without_gamma_t_it_is_no_gradient_at_all():
    """S3 (2), Nota & Thomas 2020: the field E[sum_t grad log pi R_t] has an asymmetric Jacobian, so no
    function has it as its gradient; with gamma^t the Jacobian is a Hessian.
    """

    def field(theta, weight):
        return torch.einsum(
            "n,tnp,tn->p", exact.chances(theta), jacrev(exact.log_probs)(theta), weight * exact.ALIVE
        )

    for weight, symmetric in ((DISCOUNT * to_go(0.7), True), (to_go(0.7), False)):
        jacobian = jacrev(field)(THETA, weight)
        asymmetry = ((jacobian - jacobian.T).norm() / jacobian.norm()).item()
        assert asymmetry < 1e-12 if symmetric else asymmetry > 0.01


# --- 15: baselines ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [[0.0, 0.0], [4.0, -3.0], [-100.0, 7.0]])
def test_15_a_baseline_of_the_state_changes_no_expectation(b):
    """S3 Theorem 4.1, Corollary 4.2: E[grad log pi b(s)] = 0, so R - b(s) estimates the same gradient for
    every b."""
    b = torch.tensor(b, dtype=F64)
    close(mean_gradient(b[exact.STATE]), torch.zeros(4, dtype=F64), atol=1e-9)
    found = expected(0.7, value=b, returns="to-go", discount_weight=True, baseline="value")
    close(found, tiny_mdp.exact_gradient(0.7))


def test_15_a_baseline_of_the_action_does():
    """S3 Theorem 4.1's condition is needed: b(s, a) biases."""
    assert (
        mean_gradient(torch.tensor([[4.0, 1.0], [-3.0, 0.0]], dtype=F64)[exact.STATE, exact.ACTION]).norm()
        > 0.5
    )


def test_15_variance_of_the_estimate():
    """S3 Proposition 4.3: Var g = E[g^2] - E[g]^2 with E[g] free of b, so the variances of two baselines
    differ by E[g^2]."""
    one, two = to_go(0.7) - 4.0, to_go(0.7)
    squares = [
        (exact.chances() @ torch.einsum("tnp,tn->np", exact.scores(), w * exact.ALIVE) ** 2).sum().item()
        for w in (one, two)
    ]
    assert spread(one) - spread(two) == pytest.approx(squares[0] - squares[1], rel=1e-10)
    assert abs(squares[0] - squares[1]) > 1


@pytest.mark.parametrize("returns", ["total", "to-go"])
def test_15_the_optimal_constant(returns):
    """S4 2.2.4 (and S3 Theorem 4.4 for a whole episode): b* = E[X.Y] / E[|Y|^2] leaves less variance than any
    other constant.

    The zoo's leave-one-out estimate gets every episode weighted by its probability, and the answer is read at
    one of weight 0.
    """
    gamma = 0.7
    weight = torch.ones(3, 1, dtype=F64) if returns == "total" else DISCOUNT
    return_ = to_go(gamma)[:1].expand(3, -1) if returns == "total" else to_go(gamma)
    chance = torch.cat((exact.chances(), torch.zeros(1, dtype=F64)))
    columns = [*range(exact.COUNT), 0]  # the last one, of weight 0, is the reader
    obs = torch.stack((exact.STATE[:, columns], torch.arange(len(columns)).expand(3, -1)), -1)
    batch = reinforce.Episodes(
        obs, exact.ACTION[:, columns], exact.REWARD[:, columns], exact.ALIVE[:, columns], None, None
    )

    def weighted(obs, action, w):
        return chance[obs[0, 1]].sqrt() * exact.score_sum(obs[:, 0], action, w)

    b = reinforce.optimal_baseline(weighted, batch, return_[:, columns], weight)[-1].item()
    least = spread(weight * (return_ - b))
    others = [
        spread(weight * (return_ - c))
        for c in (0.0, b - 0.1, b + 0.1, (exact.chances() @ return_[0]).item(), 10.0)
    ]
    assert least < min(others)
    # a parabola in b: the least is the vertex of the one through three other points
    y = [spread(weight * (return_ - c)) for c in (-1.0, 0.0, 1.0)]
    assert b == pytest.approx((y[0] - y[2]) / (2 * (y[0] - 2 * y[1] + y[2])), rel=1e-9)
    if returns == "total":
        norms = torch.einsum("tnp,tn->np", exact.scores(), exact.ALIVE.double()).norm(dim=1) ** 2
        p = exact.chances()
        # as the notes print it
        assert b == pytest.approx(((p * norms) @ return_[0] / (p @ norms)).item(), rel=1e-9)


def one_step(b, theta):
    """The variance in one state of grad log pi(a) (Q(a) - b), with its pieces."""
    q = torch.tensor([1.0, 4.0, -2.0], dtype=F64)
    pi = theta.log_softmax(0).exp()
    score = jacrev(lambda x: reinforce.Categorical(x.expand(3, -1)).log_prob(torch.arange(3)))(theta)
    g = score * (q - b)[:, None]
    return (pi @ g**2 - (pi @ g) ** 2).sum().item(), pi, score.norm(dim=1) ** 2, q


def test_15_the_optimal_baseline_of_a_state():
    """S3 Theorem 4.4, Remark 4.5: b*(s) = E[|score|^2 Q] / E[|score|^2] beats all other b; V(s), the notes'
    practical choice, is not it, and can be worse than no baseline at all.
    """
    theta = torch.tensor([-0.7, 1.5, 0.1], dtype=F64)
    _, pi, norms, q = one_step(torch.tensor(0.0), theta)
    best, value = (pi * norms) @ q / (pi @ norms), pi @ q
    assert one_step(best, theta)[0] < min(one_step(best + d, theta)[0] for d in (-0.01, 0.01))
    assert one_step(best, theta)[0] < one_step(torch.tensor(0.0), theta)[0] < 0.2 * one_step(value, theta)[0]
    uniform = torch.zeros(3, dtype=F64)  # where all scores are equally long V is the best
    assert one_step(q.mean(), uniform)[0] < min(one_step(q.mean() + d, uniform)[0] for d in (-0.01, 0.01))


# --- 16: the table of Psi_t ---------------------------------------------------------------------------------


def table_of_psi(gamma):
    """S4 Table 2.2 with the discount of each step in its place, from the zoo's estimators."""
    v, q = values(gamma)
    value, next_value = at_steps(v), at_successors(v)
    discount = gamma**exact.STEPS
    return {
        "total": to_go(gamma)[:1].expand(3, -1),
        "to-go": discount * to_go(gamma),
        "baseline": discount * (to_go(gamma) - value),
        "Q": discount * at_steps(q),
        "advantage": discount * (at_steps(q) - value),
        "td": discount * td(exact.REWARD, value, next_value, exact.TERMINATED, gamma),
        "gae": discount * gae(exact.REWARD, value, next_value, exact.TERMINATED, exact.TRUNCATED, gamma, 0.9),
    }


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_16_every_psi_estimates_the_gradient(gamma):
    """S4 Table 2.2: total, to-go, baseline, Q, advantage and TD residual have one expectation, grad J."""
    for name, psi in table_of_psi(gamma).items():
        assert error(mean_gradient(psi), tiny_mdp.exact_gradient(gamma)) < 1e-9, name


def test_16_their_variances():
    """S4 Table 2.2: each further step averages something out, total > to-go > baseline > TD > advantage; Q >
    advantage."""
    found = {name: spread(psi) for name, psi in table_of_psi(1.0).items()}
    assert found["total"] > found["to-go"] > found["baseline"] > found["td"] > found["advantage"]
    assert found["to-go"] > found["Q"] > found["advantage"]


def test_16_the_advantage_has_not_the_least_variance():
    """S4 2.3.1 says A^pi has the least variance: Q - b(s) with the best b, the vertex of a paraboloid, has
    less."""
    v, q = values(1.0)

    def with_baseline(b):
        return exact.variance(at_steps(q) - at_steps(b.view(3, 2)))

    start = v[:3, :2].flatten()
    best = start - torch.linalg.solve(hessian(with_baseline)(start), grad(with_baseline)(start))
    assert with_baseline(best) < 0.98 * with_baseline(start)
    close(mean_gradient(at_steps(q) - at_steps(best.view(3, 2))), tiny_mdp.exact_gradient(1.0))


# --- 17: Bellman's equations --------------------------------------------------------------------------------


def test_17_bellman_equations():
    """S3 (1)(5)-(10): V and Q as mean returns satisfy Bellman's recursion in each other."""
    gamma, chance, return_ = 0.7, exact.chances(), to_go(0.7)
    v, q = values(gamma)  # the recursion
    for t in range(3):
        for s in (0, 1):
            here = exact.ALIVE[t] & (exact.STATE[t] == s)
            assert (chance * return_[t])[here].sum() / chance[here].sum() == pytest.approx(
                v[t, s].item(), rel=1e-12
            )
            for a in (0, 1):
                there = here & (exact.ACTION[t] == a)
                assert (chance * return_[t])[there].sum() / chance[there].sum() == pytest.approx(
                    q[t, s, a].item(), rel=1e-12
                )
    mdp, g = exact.random_mdps(20)
    pi = torch.randn(20, 4, 3, generator=g, dtype=F64).softmax(-1)
    q, v = mdp.q(pi), mdp.value(pi)
    close((pi * q).sum(-1), v)  # (1), (10)
    next_q = torch.einsum("msat,mtb,mtb->msa", mdp.transition, pi, q)
    close(q, mdp.reward + mdp.gamma[:, None, None] * next_q)  # (7)


def expected_td(mdp, v, pi):
    """E[delta|s, a] (M, S, A), by the zoo's td on every (s, a, s')."""
    delta = torch.stack([
        td(
            reward.unsqueeze(-1).expand(p.shape), value[:, None, None].expand(p.shape), value.expand(p.shape),
            torch.zeros(p.shape, dtype=torch.bool), gamma.item(),
        )
        for reward, p, value, gamma in zip(mdp.reward, mdp.transition, v, mdp.gamma, strict=True)
    ])  # fmt: skip
    return (mdp.transition * delta).sum(-1)


def test_17_the_advantage_and_the_td_error():
    """S3 Remark 2.10, Proposition 5.9: E_a[A] = 0, and E[delta|s, a] = A(s, a) when V is V^pi - only then."""
    mdp, g = exact.random_mdps(20, seed=1)
    pi = torch.randn(20, 4, 3, generator=g, dtype=F64).softmax(-1)
    v = mdp.value(pi)
    advantage = mdp.q(pi) - v[..., None]
    close((pi * advantage).sum(-1), torch.zeros(20, 4, dtype=F64), atol=1e-10)
    close(expected_td(mdp, v, pi), advantage, atol=1e-10)
    assert (
        expected_td(mdp, v + torch.randn(20, 4, generator=g, dtype=F64), pi) - advantage
    ).abs().mean() > 0.1


# --- 18: n-step returns -------------------------------------------------------------------------------------

CHAIN = torch.tensor([[[0.7, 0.3], [0.5, 0.5]], [[0.4, 0.6], [0.1, 0.9]]], dtype=F64)  # two states, no end


def n_step_moments(n, v, gamma=0.7, state=0, action=1):
    """Mean and variance of the zoo's n-step return from (state, action), over all paths of n steps."""
    pi = tiny_mdp.log_policy(THETA).exp()
    paths = [([state], [action], 1.0)]
    for step in range(n):
        paths = [([*s, s2], a, c * CHAIN[s[-1], a[-1], s2].item()) for s, a, c in paths for s2 in (0, 1)]
        if step < n - 1:
            paths = [(s, [*a, a2], c * pi[s[-1], a2].item()) for s, a, c in paths for a2 in (0, 1)]
    states, actions = torch.tensor([s for s, _, _ in paths]).T, torch.tensor([a for _, a, _ in paths]).T
    chance = torch.tensor([c for _, _, c in paths], dtype=F64)
    never = torch.zeros(n, len(paths), dtype=torch.bool)
    rewards = tiny_mdp.REWARD[states[:-1], actions]
    return_ = (n_step(rewards, v[states[:-1]], v[states[1:]], never, never, gamma) + v[states[:-1]])[0]
    mean = chance @ return_
    return mean, chance @ (return_ - mean) ** 2, chance, v[states[-1]]


def chain_value(gamma=0.7):
    pi = tiny_mdp.log_policy(THETA).exp()
    step = torch.einsum("sa,sat->st", pi, CHAIN)
    v = torch.linalg.solve(torch.eye(2, dtype=F64) - gamma * step, (pi * tiny_mdp.REWARD).sum(1))
    return v, tiny_mdp.REWARD + gamma * CHAIN @ v


def test_18_n_step_returns_with_the_true_value():
    """S3 Definition 5.10, Proposition 5.11: with V = V^pi, E[R^(n)|s, a] = Q for every n, and the variance
    rises with n."""
    v, q = chain_value()
    moments = [n_step_moments(n, v) for n in range(1, 7)]
    for mean, *_ in moments:
        close(mean, q[0, 1])
    variances = [variance.item() for _, variance, *_ in moments]
    assert all(a < b for a, b in itertools.pairwise(variances)) and variances[-1] > 5 * variances[0]


def test_18_n_step_bias_of_a_wrong_value():
    """S3 Remark 5.12: with V != V^pi the bias is gamma^n E[V - V^pi at s_n], which n takes away."""
    v, q = chain_value()
    off = torch.tensor([2.0, -1.0], dtype=F64)
    biases = []
    for n in range(1, 7):
        mean, _, chance, _ = n_step_moments(n, v + off)
        at_the_end = chance @ (n_step_moments(n, v + off)[3] - n_step_moments(n, v)[3])
        close(mean - q[0, 1], 0.7**n * at_the_end)
        biases.append(abs((mean - q[0, 1]).item()))
    assert biases[0] > 0.1 and biases[-1] < 0.7**5 * 2


def test_18_monte_carlo_is_unbiased_for_every_value():
    """S3 Remark 5.12 asks V = V^pi of the Monte-Carlo limit: not needed, R_t - V(s_t) is unbiased whatever V
    is; TD is not."""
    terms = (exact.REWARD, at_steps(WRONG), at_successors(WRONG), exact.TERMINATED, exact.TRUNCATED)
    close(mean_gradient(n_step(*terms, 1.0)), tiny_mdp.exact_gradient(1.0))
    assert error(mean_gradient(td(*terms[:4], 1.0)), tiny_mdp.exact_gradient(1.0)) > 0.1


# --- 20: gamma-just estimators ------------------------------------------------------------------------------


def test_20_gamma_just_estimators():
    """S4 2.3.1: returns, Q, A and the TD residual of V^(pi, gamma) all estimate g^gamma = E[sum_t A^(pi,
    gamma) grad log pi], which is a biased estimate of the undiscounted gradient.
    """
    gamma = 0.7
    v, q = values(gamma)
    terms = (exact.REWARD, at_steps(v), at_successors(v), exact.TERMINATED, exact.TRUNCATED)
    g = mean_gradient(at_steps(q) - at_steps(v))
    for psi in (
        to_go(gamma),
        at_steps(q),
        td(*terms[:4], gamma),
        gae(*terms, gamma, 0.0),
        gae(*terms, gamma, 0.6),
    ):
        close(mean_gradient(psi), g)
    assert error(g, tiny_mdp.exact_gradient(1.0)) > 0.03


def test_20_gae_with_a_wrong_value_is_just_only_at_lambda_1():
    """S4 2.3.2: for V != V^(pi, gamma) GAE is gamma-just at lambda = 1 and biased below, more so the smaller
    lambda is."""
    gamma = 0.7
    g = mean_gradient(to_go(gamma))
    terms = (exact.REWARD, at_steps(WRONG), at_successors(WRONG), exact.TERMINATED, exact.TRUNCATED)
    close(mean_gradient(gae(*terms, gamma, 1.0)), g)
    errors = [error(mean_gradient(gae(*terms, gamma, lam)), g) for lam in (0.0, 0.5, 0.9)]
    assert errors[0] > errors[1] > errors[2] > 0.01


def test_20_effective_horizons():
    """S4 2.3.3: gamma = .995 looks 1 / (1 - gamma) = 200 steps ahead, with lambda = .96 1 / (1 - gamma
    lambda) = 22.3 (the notes' 25 is 1 / (1 - lambda)): the weight that GAE gives to a constant TD error, of
    which a share 1/e lies beyond.
    """
    ones, never = torch.ones(8000, 1, dtype=F64), torch.zeros(8000, 1, dtype=torch.bool)
    zeros = torch.zeros_like(ones)
    for lam, horizon in ((1.0, 200.0), (0.96, 22.3214)):
        total = gae(ones, zeros, zeros, never, never, 0.995, lam)[0].item()
        assert total == pytest.approx(horizon, rel=1e-5)
        near = torch.where(torch.arange(8000)[:, None] < round(horizon), 1.0, zeros)
        beyond = 1 - gae(near, zeros, zeros, never, never, 0.995, lam)[0].item() / total
        assert beyond == pytest.approx(2.718281828**-1, abs=0.02)
    assert abs(horizon - 25) > 2.5
