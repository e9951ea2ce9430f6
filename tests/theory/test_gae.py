"""Generalised advantage estimation on random rollouts with both kinds of ending: item 19."""

from types import SimpleNamespace

import pytest
import torch
from exact import F64, close, error

from zoo import actor_critic, ppo, reinforce, trpo
from zoo.actor_critic import gae, n_step, td

GAMMA, LAM, T, N = 0.9, 0.7, 12, 40


def rollout(seed=0, ends=0.3):
    """Rewards, values, true successors' values and endings; within an episode the successor's value is the
    next row's."""
    g = torch.Generator().manual_seed(seed)
    reward, value, cut_value = (torch.randn(T, N, generator=g, dtype=F64) for _ in range(3))
    kind = torch.rand(T, N, generator=g, dtype=F64)
    terminated, truncated = kind < ends / 2, (kind >= ends / 2) & (kind < ends)
    next_value = torch.cat((value[1:], torch.randn(1, N, generator=g, dtype=F64)))
    next_value = torch.where(terminated | truncated, cut_value, next_value)
    return reward, value, next_value, terminated, truncated


def until_the_end(t, n, ended):
    """The rows from t on that belong to the same episode and rollout."""
    rows = list(range(t, T))
    stop = next((k for k in rows if ended[k, n]), T - 1)
    return range(t, stop + 1)


def form_a(batch, lam):
    """sum_l (gamma lambda)^l delta_{t+l} up to the episode's or the rollout's end, with the zoo's TD
    errors."""
    delta, ended = td(*batch[:4], GAMMA), batch[3] | batch[4]
    found = torch.zeros_like(delta)
    for t in range(T):
        for n in range(N):
            found[t, n] = sum((GAMMA * lam) ** (k - t) * delta[k, n] for k in until_the_end(t, n, ended))
    return found


def form_b(batch, lam, remainder=True):
    """The lambda-return less V, with the zoo's n-step returns; the longest return takes all the weight
    left."""
    ended, found = batch[3] | batch[4], torch.zeros(T, N, dtype=F64)
    for t in range(T):
        # A^(1), A^(2), ...
        steps = torch.stack([n_step(*(x[t : t + k + 1] for x in batch), GAMMA)[0] for k in range(T - t)])
        for n in range(N):
            length = len(until_the_end(t, n, ended))
            weight = [(1 - lam) * lam**k for k in range(length)]
            if remainder:
                weight[-1] = lam ** (length - 1)
            found[t, n] = sum(w * a for w, a in zip(weight, steps[:, n], strict=False))
            if not remainder:  # the weights of R^(n) do not sum to 1, and V is subtracted whole
                found[t, n] += (sum(weight) - 1) * batch[1][t, n]
    return found


@pytest.mark.parametrize("module", [ppo, trpo, actor_critic], ids=lambda module: module.__name__)
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_19_forms_a_b_c_agree(module, lam):
    """S3 (GAE-A)(GAE-B)(GAE-C), (55), S4 (2.14)(2.15): sum of TD errors = lambda-return less V = the zoo's
    recursion."""
    batch = rollout()
    close(module.gae(*batch, GAMMA, lam), form_a(batch, lam))
    close(module.gae(*batch, GAMMA, lam), form_b(batch, lam))


def test_19_the_infinite_sum_cut_off_is_not_form_b():
    """S3 Definition 6.4 sums to infinity: cut where the data end, (1 - lambda) sum lambda^(n-1) R^(n) loses
    the rest of its weight; the last return has to take it.
    """
    batch = rollout()
    found = gae(*batch, GAMMA, LAM)
    close(form_b(batch, LAM), found)
    assert error(form_b(batch, LAM, remainder=False), found) > 0.3


def test_19_lambda_0_and_1():
    """S3 Remark 6.2, Proposition 6.3, S4 (2.16)(2.17): lambda = 0 is the TD error, lambda = 1 the Monte-Carlo
    return less V."""
    reward, value, next_value, _, _ = batch = rollout()
    close(gae(*batch, GAMMA, 0.0), reward + GAMMA * next_value * ~batch[3] - value)
    close(gae(*batch, GAMMA, 1.0), n_step(*batch, GAMMA))
    terminated = torch.zeros(T, N, dtype=torch.bool)
    terminated[-1] = True  # every column one whole episode
    whole = (reward, value, torch.cat((value[1:], value[:1])), terminated, ~terminated & False)
    close(
        gae(*whole, GAMMA, 1.0),
        reinforce.returns_to_go(reward, terminated | True, torch.zeros(N, dtype=F64), GAMMA) - value,
    )


def test_19_lambda_return_expanded():
    """S3 (56), Proposition 11.1: R^lambda = sum (gamma lambda)^k r_k + (1 - lambda) gamma sum (gamma
    lambda)^m V_{m+1}."""
    reward, value, _, _, _ = rollout()
    never = torch.zeros(T, N, dtype=torch.bool)
    next_value = torch.cat((value[1:], value[:1]))
    found = gae(reward, value, next_value, never, never, GAMMA, LAM) + value
    for t in range(T):
        decay = (GAMMA * LAM) ** torch.arange(T - t, dtype=F64)[:, None]
        expanded = (decay * reward[t:]).sum(0) + (1 - LAM) * GAMMA * (decay * next_value[t:]).sum(0)
        # the sum's tail, which the data stand for by one V
        expanded += LAM * GAMMA * decay[-1] * next_value[-1]
        close(found[t], expanded)


def test_19_telescoped_with_the_right_exponent():
    """S4 2.4.4 prints gamma^(T-t+1) r_{T-1}: the exponent is T-t-1 (and T-t for V(s_T))."""
    reward, value, _, _, _ = rollout()
    never = torch.zeros(T, N, dtype=torch.bool)
    next_value = torch.cat((value[1:], value[:1]))
    found = gae(reward, value, next_value, never, never, GAMMA, 1.0)
    for last in (T - 1, T + 1):
        powers = GAMMA ** torch.arange(T, dtype=F64)
        powers[-1] = GAMMA**last
        printed = -value[0] + (powers[:, None] * reward).sum(0) + GAMMA**T * next_value[-1]
        if last == T - 1:
            close(found[0], printed)
        else:
            assert error(printed, found[0]) > 0.01


def test_19_time_limits_bootstrap_and_terminations_do_not():
    """S3 listing L3 treats every end as worth 0: right for a termination, wrong for a time limit, whose
    successor has V."""
    reward, value, next_value, terminated, truncated = batch = rollout()
    done = terminated | truncated
    listing, running = torch.zeros(T, N, dtype=F64), torch.zeros(N, dtype=F64)
    for t in reversed(range(T)):
        delta = reward[t] + GAMMA * next_value[t] * ~done[t] - value[t]
        listing[t] = running = delta + GAMMA * LAM * ~done[t] * running
    found = gae(*batch, GAMMA, LAM)
    assert error(listing, found) > 0.2
    # right where there is no time limit
    close(gae(reward, value, next_value, done, truncated & False, GAMMA, LAM), listing)
    close(found[truncated], (reward + GAMMA * next_value - value)[truncated])


def test_19_the_value_target_is_the_lambda_return():
    """S3 (30)-(33): A + V_old is the lambda-return; and for the V and policy that made the data its mean is
    Q."""
    batch = rollout()
    close(gae(*batch, GAMMA, LAM) + batch[1], form_b(batch, LAM) + batch[1])


def test_19_the_value_target_needs_the_raw_advantage():
    """S3 Definition 9.13 builds R_target from the normalised advantage: that target is wrong, the zoo's loss
    keeps the raw one whether advantages are normalised or not. Nor does normalising 'only scale' (Remark
    9.8): it subtracts the mean.
    """
    g = torch.Generator().manual_seed(3)
    logits, value = torch.randn(64, 3, generator=g, dtype=F64), torch.randn(64, generator=g, dtype=F64)
    advantage = 5 + 3 * torch.randn(64, generator=g, dtype=F64)
    action = torch.randint(3, (64,), generator=g)
    batch = ppo.Batch(
        None, action, ppo.Categorical(logits).log_prob(action), value, advantage, advantage + value
    )

    def losses(normalize):
        args = SimpleNamespace(normalize_advantages=normalize, surrogate="clip", clip=0.2, value_clip=None)
        args.value_coef, args.entropy_coef, args.bound_coef = 0.5, 0.0, 0.0

        def loss(x):
            return ppo.ppo_loss(x, batch, torch.tensor(1.0), lambda x, _: (ppo.Categorical(x), value), args)

        return torch.func.grad_and_value(loss, has_aux=True)(logits)

    (plain, (_, raw)), (scaled, (_, normalised)) = losses(False), losses(True)
    close(raw["value_loss"], (advantage**2).mean())
    close(normalised["value_loss"], raw["value_loss"])
    printed = (advantage - advantage.mean()) / advantage.std(unbiased=False) + value
    assert ppo.value_loss(value, value, printed, None) < 0.1 * raw["value_loss"]
    assert torch.nn.functional.cosine_similarity(plain.flatten(), scaled.flatten(), dim=0) < 0.9
