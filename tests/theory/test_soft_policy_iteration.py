"""Soft policy iteration on random tabular tasks, with a temperature alpha: item 12."""

import pytest
import torch
from exact import F64, close, random_mdps
from torch.func import grad

from zoo import sac
from zoo.common.kl import categorical_kl
from zoo.ppo import Categorical

ALPHA = 0.5


def soft_value(q, logits):
    """V(s) = E_pi[Q - alpha log pi] (M, S) (S4 A.8): the agent's own soft value of every action, averaged by
    the policy."""
    log_pi = Categorical(logits.unsqueeze(-2).expand(*logits.shape, -1)).log_prob(
        torch.arange(3).expand(logits.shape)
    )
    # of the twin Qs it takes the lower
    of_actions = sac.soft_value(torch.stack((q, q + 1)), log_pi, torch.tensor(ALPHA))
    return (log_pi.exp() * of_actions).sum(-1)


def backup(mdp, q, logits):
    """T_pi Q = r + gamma E[V(s')] (M, S, A) (S4 A.7), by the agent's own target."""
    future = torch.einsum("msat,mt->msa", mdp.transition, soft_value(q, logits))
    return sac.soft_target(mdp.reward, torch.tensor(False), future, mdp.gamma[:, None, None])


def evaluate(mdp, logits):
    """The soft Q of a policy: an ordinary evaluation, the entropy to come being part of the reward (S4
    A.2.1)."""
    entropy = ALPHA * Categorical(logits).entropy()
    with_entropy = mdp._replace(
        reward=mdp.reward + mdp.gamma[:, None, None] * (mdp.transition @ entropy[:, None, :, None])[..., 0]
    )
    return with_entropy.q(logits.softmax(-1))


def problem(count=200, seed=0):
    mdp, g = random_mdps(count, seed=seed)
    return mdp, 2 * torch.randn(count, 4, 3, generator=g, dtype=F64), g


def test_12_soft_policy_evaluation_converges():
    """S4 (A.7)(A.8), Lemma 1: T_pi contracts by gamma, and from any Q its iterates reach the soft Q of pi."""
    mdp, logits, g = problem()
    q, other = torch.randn(2, *mdp.reward.shape, generator=g, dtype=F64)
    true = evaluate(mdp, logits)
    close(backup(mdp, true, logits), true)
    apart = (backup(mdp, q, logits) - backup(mdp, other, logits)).abs().amax((1, 2))
    assert (apart <= mdp.gamma * (q - other).abs().amax((1, 2)) + 1e-12).all()
    for _ in range(600):
        q = backup(mdp, q, logits)
    close(q, true, rtol=1e-8)


def test_12_the_projection_is_the_softmax_of_q():
    """S4 (A.9): argmin KL(pi || exp(Q / alpha) / Z) is that softmax, at which V is alpha logsumexp(Q /
    alpha)."""
    mdp, logits, g = problem(20)
    q = evaluate(mdp, logits)
    best = q / ALPHA
    close(soft_value(q, best), ALPHA * (q / ALPHA).logsumexp(-1))
    for _ in range(20):
        other = best + 0.3 * torch.randn(best.shape, generator=g, dtype=F64)
        assert (categorical_kl(other, q / ALPHA) > 0).all()
        # what is lost is alpha times the KL
        close(soft_value(q, best) - soft_value(q, other), ALPHA * categorical_kl(other, q / ALPHA))


def test_12_the_actors_loss_ends_there():
    """S4 (A.9), (2.24): the agent's actor loss, averaged over actions by the policy, has no slope at that
    softmax."""
    mdp, logits, _ = problem(5)
    q = evaluate(mdp, logits)

    def loss(x):  # the samples' own dependence on the policy is in the average
        return -soft_value(q, x).mean()

    assert grad(loss)(q / ALPHA).norm() < 1e-12 < 1e-3 < grad(loss)(logits).norm()
    log_pi = logits.log_softmax(-1)
    one = sac.actor_loss(torch.stack((q, q + 1)), log_pi, torch.tensor(ALPHA))
    close(one, (ALPHA * log_pi - q).mean())


def test_12_soft_policy_improvement():
    """S4 Lemma 2: Q_new >= Q_old at every state and action, in 200 random tasks."""
    mdp, logits, _ = problem()
    old = evaluate(mdp, logits)
    new = evaluate(mdp, old / ALPHA)
    assert (new >= old - 1e-10).all() and (new - old).max() > 1


def test_12_one_backup_is_not_the_new_q():
    """S4 A.2.2 ends its proof with r + gamma E[V] = Q_new for one backup of Q_old: false. Iterated it is
    right, Q_old <= T_new Q_old <= T_new^2 Q_old <= ... -> Q_new.
    """
    mdp, logits, _ = problem()
    old = evaluate(mdp, logits)
    new, q = evaluate(mdp, old / ALPHA), old
    once = backup(mdp, old, old / ALPHA)
    assert ((new - once).abs().amax((1, 2)) > 0.05 * (new - old).abs().amax((1, 2))).all()
    for _ in range(600):
        previous, q = q, backup(mdp, q, old / ALPHA)
        assert (q >= previous - 1e-10).all() and (q <= new + 1e-10).all()
    close(q, new, rtol=1e-8)


@pytest.mark.parametrize("seed", [0, 1])
def test_12_soft_policy_iteration_reaches_the_optimum(seed):
    """S4 Theorem 1: repeated, it ends at Q* = r + gamma E[alpha logsumexp(Q* / alpha)], which no policy
    surpasses."""
    mdp, logits, g = problem(100, seed)
    for _ in range(60):
        q = evaluate(mdp, logits)
        logits = q / ALPHA
    future = ALPHA * (q / ALPHA).logsumexp(-1)
    close(
        q,
        mdp.reward + mdp.gamma[:, None, None] * torch.einsum("msat,mt->msa", mdp.transition, future),
        rtol=1e-8,
    )
    for _ in range(20):
        assert (evaluate(mdp, 3 * torch.randn(q.shape, generator=g, dtype=F64)) <= q + 1e-9).all()
    greedy = evaluate(mdp, 1e3 * q)  # the ordinary optimum is another policy
    assert (q - greedy).max() > 0.05
