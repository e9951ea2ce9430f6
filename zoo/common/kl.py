"""Estimators of the KL divergence between two policies, and of its gradient; what each is an unbiased
estimate of.

Samples x come from q (the policy that acted), p is the other policy, and log_ratio = log p(x) - log q(x), so
r = p(x) / q(x):

    k1 = -log r        k2 = (log r)^2 / 2        k3 = (r - 1) - log r

(Schulman 2020, joschu.net/blog/kl-approx.html).

As a **value**, x ~ q:

    k1    unbiased for KL(q || p); of either sign, and so with the largest variance where p is near q
    k2    biased: E_q[k2] is another divergence, equal to KL(q || p) to second order in the distance
    k3    unbiased for KL(q || p), never negative; heavy-tailed where p has mass that q lacks

As a **gradient** it matters where the estimate is put. Let pi = q be the policy being trained, ref = p the
fixed one, and let the samples be held fixed, as automatic differentiation does (arXiv:2506.09477,
arXiv:2510.01555):

    where                              k1                   k2                   k3
    loss, x ~ pi                       0: noise alone       grad KL(pi || ref)   grad KL(ref || pi)
    reward, x ~ pi  (`in_reward`)      grad KL(pi || ref)   neither, O(KL)       the first less the second *
    loss, x ~ old, unweighted          -grad KL(old || pi)  neither              neither
    loss, x ~ old, w differentiated    grad KL(pi || ref)   grad E_pi[k2]        grad KL(pi || ref)
    loss, x ~ old, w detached          0                    grad KL(pi || ref)   grad KL(ref || pi)

* grad KL(pi || ref) - grad KL(ref || pi).

Here w = pi(x) / old(x) (`off_policy`). k2 as a loss and k1 in the reward agree for one decision. Over a
sequence, they are the gradient of the sequence's KL only if the log-ratio of k2 is summed over the sequence
before it is squared, and if an action is charged with the k1 of all the decisions that follow it, as with any
reward.

No agent imports this module, because an agent's file is complete in itself; tests hold the agents' own copies
to it. S0 and S4 are the lecture notes of zoo/THEORY.md.
"""

import torch
from torch import Tensor


def k1(log_ratio: Tensor) -> Tensor:
    """-log r, elementwise (S4 2.1.2): unbiased for KL(q || p) where log_ratio = log p(x) - log q(x) and x ~
    q.

    As a loss its expected gradient is 0; inside the reward it gives that of KL(q || p).
    """
    return -log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """(log r)^2 / 2, elementwise (S4 2.1.2): biased for KL(q || p), of second order in the distance.

    As a loss on samples of the policy being trained its expected gradient is that of KL(q || p) (S0 eq. 48).
    """
    return log_ratio**2 / 2


def k3(log_ratio: Tensor) -> Tensor:
    """(r - 1) - log r, elementwise (S4 eq. 2.2): unbiased for KL(q || p), and at least 0.

    As a loss on samples of the policy being trained its expected gradient is that of the other direction,
    KL(p || q) (S0 eq. 12, 13). Where the samples are the fixed policy's and p is trained, as in PPO's penalty
    KL(old || new), its gradient is unbiased for the same KL as its value.
    """
    return torch.expm1(log_ratio) - log_ratio


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def off_policy(estimate: Tensor, log_weight: Tensor, detach: bool = False) -> Tensor:
    """w times an estimate, for samples of a third policy, w = exp(log_weight) = pi(x) / old(x); elementwise.

    Its value has the expectation that the estimate has under pi. Its gradient: see the table of the module.
    With estimate = k3(-log_ratio) and log_weight = log_ratio it is r log r - (r - 1), which estimates the
    other direction, KL(p || q), from samples of q (S4 eq. 2.3).
    """
    weight = log_weight.exp()
    return (weight.detach() if detach else weight) * estimate


def in_reward(estimate: Tensor, log_prob: Tensor) -> Tensor:
    """The loss whose gradient is that of an estimate subtracted from the reward: detached estimate times log
    pi; elementwise.

    For one decision. In an episode `estimate` is the sum of the estimates from this decision on.
    """
    return estimate.detach() * log_prob


def categorical_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) in nats, (...), of categorical distributions, logits (..., K) of any scale (S0 eq. 37)."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def categorical_kl_gradient(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """d KL(p || q) / d p_logits (..., K): p_i (log p_i / q_i - KL), an expectation under p (S0 eq. 47)."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return log_p.exp() * (log_p - log_q - categorical_kl(p_logits, q_logits).unsqueeze(-1))


def gaussian_kl(p_mean: Tensor, p_log_std: Tensor, q_mean: Tensor, q_log_std: Tensor) -> Tensor:
    """KL(p || q) in nats, (...), of diagonal Gaussians, all (..., A) (S0 eq. 58, there of one variance)."""
    shrink = (2 * (p_log_std - q_log_std)).exp()
    distance = ((p_mean - q_mean) * (-q_log_std).exp()) ** 2
    return (q_log_std - p_log_std + (shrink + distance - 1) / 2).sum(-1)


def gaussian_kl_gradient(
    p_mean: Tensor, p_log_std: Tensor, q_mean: Tensor, q_log_std: Tensor
) -> tuple[Tensor, Tensor]:
    """d KL(p || q) / d p_mean, (p_mean - q_mean) / q_std^2 (S0 eq. 64), and / d p_log_std, p_std^2 / q_std^2
    - 1; (..., A)."""
    return (p_mean - q_mean) * (-2 * q_log_std).exp(), torch.expm1(2 * (p_log_std - q_log_std))
