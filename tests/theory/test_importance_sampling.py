"""Importance sampling and the off-policy gradients, with expectations by enumeration: items 21 and 22."""

from types import SimpleNamespace

import exact
import pytest
import tiny_mdp
import torch
from exact import F64, close, cosine, error
from torch.func import grad, jacrev

from zoo import actor_critic, ppo
from zoo.actor_critic import Categorical

OLD = exact.THETA  # acted
NEW = torch.tensor([-0.6, 0.4, 1.0, -0.2], dtype=F64)  # is to be improved


def target_gradient(theta=NEW):
    """grad J at another policy (4,), by differentiating the sum over all episodes (gamma = 1, as S4 has
    it)."""
    totals = torch.tensor([tiny_mdp.total(t, 1.0) for t in exact.ALL], dtype=F64)
    return grad(lambda x: tiny_mdp.probabilities(x, exact.ALL) @ totals)(theta)


# --- 21 -----------------------------------------------------------------------------------------------------


def test_21_importance_sampling_is_unbiased_with_that_variance():
    """S3 Theorem 7.1, (12), Proposition 7.8: E_q[(p/q) f] = E_p[f], Var = E_q[(p/q)^2 f^2] - E_p[f]^2, which
    grows with p/q."""
    f, every = torch.tensor([1.0, -2.0, 5.0, 0.5], dtype=F64), torch.arange(4)
    q = Categorical(torch.tensor([[2.0, 0.0, -1.0, 0.5]], dtype=F64).expand(4, -1)).log_prob(every)
    variances = []
    for distance in (0.0, 1.0, 2.0):
        logits = torch.tensor([[2.0, 0.0, -1.0, 0.5]], dtype=F64) + distance * torch.tensor(
            [-1.0, 0.0, 1.0, 0.0]
        )
        p = Categorical(logits.expand(4, -1)).log_prob(every)
        weighted = (p - q).exp() * f
        mean = q.exp() @ weighted
        close(mean, p.exp() @ f)
        variance = q.exp() @ (weighted - mean) ** 2
        close(variance, q.exp() @ ((p - q).exp() ** 2 * f**2) - (p.exp() @ f) ** 2)
        variances.append(variance.item())
    assert variances[2] > 3 * variances[0]


def test_21_support_is_needed():
    """S3 Theorem 7.1's condition: where q cannot go, the weight cannot make up for it."""
    f = torch.tensor([1.0, -2.0, 5.0], dtype=F64)
    p, q = torch.tensor([0.2, 0.3, 0.5], dtype=F64), torch.tensor([0.4, 0.6, 0.0], dtype=F64)
    reached = q > 0
    assert abs((q * p / q * f)[reached].sum() - p @ f) > 1


def test_21_weights_of_long_trajectories():
    """S3 Example 7.9: ratios in [.9, 1.1] multiply to [2.7e-5, 1.4e4] over 100 steps; E[w] stays 1 while
    E[w^2] grows exponentially, which is the share of samples that counts, by the zoo's effective sample size.
    """
    assert 2.6e-5 < 0.9**100 < 2.7e-5 and 1.37e4 < 1.1**100 < 1.38e4
    assert 1e8 < (1.1 / 0.9) ** 100 < 1e9
    w = torch.tensor([0.9, 1.1], dtype=F64)  # of two equally likely actions
    for steps in (1, 2, 8):
        products = torch.cartesian_prod(*[w] * steps).reshape(-1, steps).prod(1)
        close(products.mean(), torch.ones((), dtype=F64))
        close((products**2).mean(), ((w**2).mean() ** steps))
        close(actor_critic.effective_sample_size(products), 1 / (w**2).mean() ** steps)
    assert (w**2).mean() ** 100 > 2.5


def test_21_gradient_of_the_ratio():
    """S3 Remark 7.7: grad (ratio A) = ratio grad log pi A = grad pi / pi_old A, for the zoo's unclipped
    loss."""
    g = torch.Generator().manual_seed(0)
    logits, advantage = torch.randn(32, 3, generator=g, dtype=F64), torch.randn(32, generator=g, dtype=F64)
    action, old = torch.randint(3, (32,), generator=g), torch.randn(32, 3, generator=g, dtype=F64)
    old_log_prob = Categorical(old).log_prob(action)

    def loss(x):
        log_ratio = Categorical(x).log_prob(action) - old_log_prob
        return ppo.policy_loss(log_ratio.exp(), log_ratio, advantage, torch.tensor(0.0), "unclipped", 0.2)

    log_prob = Categorical(logits).log_prob(action)
    ratio = (log_prob - old_log_prob).exp()
    score = jacrev(lambda x: Categorical(x).log_prob(action))(logits)
    close(-grad(loss)(logits), torch.einsum("b,bij->ij", ratio * advantage, score) / 32)
    pi = jacrev(lambda x: Categorical(x).log_prob(action).exp())(logits)
    close(-grad(loss)(logits), torch.einsum("b,bij->ij", advantage / old_log_prob.exp(), pi) / 32)


# --- 22 -----------------------------------------------------------------------------------------------------


def weights():
    """w_t = pi_new / pi_old of every step (HORIZON, COUNT), 1 where the episode is over, by the zoo's
    log-probabilities."""
    return (exact.log_probs(NEW) - exact.log_probs(OLD)).exp()


def off_policy(inner_from, inner=True, outer=True):
    """E_old[sum_t1 score_t1 (prod_{t <= t1} w) sum_{t3 >= t1} r_t3 prod_{t1 + inner_from <= t <= t3} w]
    (4,)."""
    w, reward = weights(), exact.REWARD * exact.ALIVE
    psi = torch.zeros_like(reward)
    for t1 in range(exact.HORIZON):
        for t3 in range(t1, exact.HORIZON):
            product = w[t1 + inner_from : t3 + 1].prod(0) if inner else 1.0
            psi[t1] += reward[t3] * product
        psi[t1] *= w[: t1 + 1].prod(0) if outer else w[t1]
    return exact.mean_gradient(psi, NEW, OLD)


def test_22_the_whole_product_is_exact():
    """S4 (2.7)-(2.9): sum_t score_t R(tau) prod_t w_t under the old policy is grad J of the new one."""
    total = (exact.REWARD * exact.ALIVE).sum(0)
    close(
        exact.mean_gradient((weights().prod(0) * total).expand(exact.HORIZON, -1), NEW, OLD),
        target_gradient(),
    )
    assert error(exact.mean_gradient(total.expand(exact.HORIZON, -1), NEW, OLD), target_gradient()) > 0.3


def test_22_causality_of_rewards_and_weights():
    """S4 (A.3), the right form of (2.10): the inner product of weights starts after t1, and then it is
    exact."""
    close(off_policy(inner_from=1), target_gradient())


def test_22_the_printed_product_counts_a_weight_twice():
    """S4 (2.10) and the head of A.1.2 start the inner product at t1, so that w_t1 is counted twice:
    biased."""
    # of the gradient's length
    assert error(off_policy(inner_from=0), target_gradient()) == pytest.approx(0.997, abs=0.001)


def test_22_weights_after_the_action_cannot_be_dropped():
    """S4 (2.11), (A.5) = (A.6): without the weights of the rewards' own path the estimate is biased, the two
    sides differ."""
    assert error(off_policy(1, inner=False), target_gradient()) == pytest.approx(0.253, abs=0.001)


def test_22_one_step_weights_are_biased():
    """S4 (2.13) with sampled returns, called the first-order form: biased further, and not in length
    alone."""
    found = off_policy(1, inner=False, outer=False)
    assert (
        error(found, target_gradient()) == pytest.approx(0.523, abs=0.001)
        and cosine(found, target_gradient()) < 0.999
    )


def visited_loss(theta, advantage):
    """The zoo's importance-weighted loss on everything that the old policy can do, each step by its
    probability."""
    rows = exact.ALIVE.T.flatten()  # an episode after the other
    chance = exact.chances(OLD)[:, None].expand(-1, exact.HORIZON).flatten()[rows]
    state, action, psi = (x.T.flatten()[rows] for x in (exact.STATE, exact.ACTION, advantage))
    zeros = torch.zeros(len(chance), dtype=F64)
    log_prob = exact.policy(OLD, state).log_prob(action)
    batch = actor_critic.Transitions(state, action, log_prob, chance * len(chance) * psi, zeros)
    args = SimpleNamespace(value_coef=0.0, entropy_coef=0.0, bound_coef=0.0)

    def forward(x, obs):
        return actor_critic.Categorical(exact.policy(x, obs).logits), zeros

    return actor_critic.actor_critic_loss(theta, batch, forward, args)[0]


def test_22_the_old_policys_states_and_advantages_bias():
    """S3 Theorem 7.3 and (16), S0 (74)(75), called unbiased there: the zoo's loss with w_t alone, exact at
    the old policy, is biased away from it, even with the exact advantage of either policy; the error falls
    with the distance.
    """
    for advantage_of in (OLD, "new"):
        errors = []
        for step in (0.0, 0.1, 1.0):
            new = OLD + step * (NEW - OLD)
            v, q = exact.values(1.0, new if isinstance(advantage_of, str) else OLD)
            advantage = exact.at_steps(q) - exact.at_steps(v)
            found = -grad(visited_loss)(new, advantage)
            ratio = (exact.log_probs(new) - exact.log_probs(OLD)).exp()
            close(found, exact.mean_gradient(ratio * advantage, new, OLD))  # it is (16), to the letter
            errors.append(error(found, target_gradient(new)))
        assert errors[0] < 1e-9 and 0.001 < errors[1] < 0.3 * errors[2] and errors[2] > 0.1, errors
