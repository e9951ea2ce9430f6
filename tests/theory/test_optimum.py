"""The optimum of a reward with a KL penalty: item 32."""

import torch
from exact import F64, close
from torch.func import grad

from zoo.common.kl import categorical_kl, in_reward, k1
from zoo.ppo import Categorical

REF = torch.tensor([0.3, -0.8, 1.1, 0.0, -2.0], dtype=F64)
REWARD = torch.tensor([1.0, 4.0, -1.0, 0.5, 6.0], dtype=F64)
EVERY = torch.arange(5)


def log_prob(logits):
    return Categorical(logits.expand(5, -1)).log_prob(EVERY)


def objective(logits, beta):
    """E_pi[r] - beta KL(pi || ref)."""
    return log_prob(logits).exp() @ REWARD - beta * categorical_kl(logits, REF)


def solution(beta):
    """pi* = ref exp(r / beta) / Z, as logits; and log Z."""
    return REF + REWARD / beta, (log_prob(REF) + REWARD / beta).logsumexp(0)


def test_32_the_optimum_and_its_value():
    """S0 (65)-(68): the maximiser is pi* = ref exp(r / beta) / Z, and J* = beta log Z."""
    g = torch.Generator().manual_seed(0)
    for beta in (0.2, 1.0, 5.0):
        best, log_z = solution(beta)
        close(objective(best, beta), beta * log_z)
        close(grad(objective)(best, beta), torch.zeros(5, dtype=F64))
        others = torch.cat(
            (best + 0.1 * torch.randn(200, 5, generator=g), 3 * torch.randn(200, 5, generator=g))
        )
        assert max(objective(other, beta) for other in others) < beta * log_z
    assert objective(best, 1.0) < solution(1.0)[1] - 0.1  # another beta's optimum


def test_32_every_other_policy_loses_its_distance_to_it():
    """S0 (68): E_pi[r] - beta KL(pi || ref) = beta log Z - beta KL(pi || pi*), for every policy pi."""
    g = torch.Generator().manual_seed(1)
    for beta in (0.3, 2.0):
        best, log_z = solution(beta)
        for logits in 2 * torch.randn(50, 5, generator=g, dtype=F64):
            close(objective(logits, beta), beta * log_z - beta * categorical_kl(logits, best))


def test_32_the_reward_is_the_log_ratio():
    """S0 (70): r = beta log pi* / ref + beta log Z."""
    best, log_z = solution(0.7)
    close(0.7 * (log_prob(best) - log_prob(REF)) + 0.7 * log_z, REWARD)


def test_32_policy_gradients_find_it():
    """S0 (7)(65): gradient ascent on r - beta k1, with exact expectations, ends at pi*; on the bare reward it
    does not."""
    beta, reached = 1.0, []
    log_z = solution(beta)[1]
    for penalty in (beta, 0.0):
        logits = torch.zeros(5, dtype=F64)
        for _ in range(1200):
            chance = log_prob(logits).exp()

            def loss(x, chance=chance, penalty=penalty):
                new = log_prob(x)
                return chance @ in_reward(REWARD - penalty * k1(log_prob(REF) - new), new)

            logits = logits + 2 * grad(loss)(logits)
        reached.append(objective(logits, beta))
    close(reached[0], log_z, rtol=1e-6)
    assert reached[1] < log_z - 0.3
