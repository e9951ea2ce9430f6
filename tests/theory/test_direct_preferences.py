"""Direct preference optimisation: items 40 and 41."""

import torch
from exact import F64, close
from sequences import BETA, FIXED
from torch.func import grad

from zoo.common.tokens import optimum
from zoo.dpo import dpo_loss

WORLD, REF = FIXED, FIXED.policy(1)
# all pairs
FIRST, SECOND = (x.flatten() for x in torch.meshgrid(torch.arange(27), torch.arange(27), indexing="ij"))


def expected(table, chance_of_pair, reward, ref):
    """E[dpo_loss] over pairs of responses to one prompt, labelled by Bradley and Terry; table, reward, ref
    (M,).
    """
    chosen = (reward[FIRST] - reward[SECOND]).sigmoid()
    total = 0.0
    for winner, loser, label in ((FIRST, SECOND, chosen), (SECOND, FIRST, 1 - chosen)):
        each = torch.func.vmap(lambda *x: dpo_loss(*(y[None] for y in x), BETA, 0.0)[0])
        total = total + (chance_of_pair * label) @ each(table[winner], table[loser], ref[winner], ref[loser])
    return total


def test_40_its_optimum_is_that_of_the_kl_regularised_reward():
    """S0 (69)-(71); S4 (3.4)-(3.8): over all pairs, from whatever policy with full support, the gradient is 0
    at pi* = ref exp(r / beta) / Z, and the loss is greater elsewhere.
    """
    reward, ref = WORLD.reward().view(2, 27), WORLD.table(REF)
    best = optimum(reward, ref, BETA).log_prob
    for writer in (WORLD.table(REF), WORLD.table(WORLD.policy(5))):
        for i in range(2):
            pairs = (writer[i][FIRST] + writer[i][SECOND]).exp()
            loss = lambda x, i=i, pairs=pairs: expected(x.log_softmax(-1), pairs, reward[i], ref[i])  # noqa: E731
            close(grad(loss)(best[i]), torch.zeros(27, dtype=F64), atol=1e-9)
            assert loss(ref[i]) > loss(best[i]) + 0.01


def test_40_its_gradient():
    """S0 (72)(34): -beta E[sigmoid(R_l - R_w) (grad log pi(y_w) - grad log pi(y_l))], of a policy over
    tokens.
    """
    theta, ref = WORLD.policy(0), WORLD.table(REF)[0]
    w, l = 4, 17  # noqa: E741

    def loss(x):
        table = WORLD.table(x)[0]
        return dpo_loss(table[w][None], table[l][None], ref[w][None], ref[l][None], BETA, 0.0)[0]

    table = WORLD.table(theta)[0]
    implicit = BETA * (table - ref)
    scores = torch.func.jacrev(lambda x: WORLD.table(x)[0])(theta)
    close(grad(loss)(theta), -BETA * (implicit[l] - implicit[w]).sigmoid() * (scores[w] - scores[l]))


def test_40_the_implicit_reward_is_the_reward_but_for_a_constant():
    """S4 (3.7): at pi* it is r - beta log Z(x)."""
    reward, ref = WORLD.reward().view(2, 27), WORLD.table(REF)
    implicit = BETA * (WORLD.table(WORLD.best(REF)) - ref)
    close(reward - implicit, (reward - implicit).mean(-1, keepdim=True).expand(2, 27), atol=1e-9)


def test_41_the_chosen_answers_likelihood_can_fall():
    """Three responses, logits linear in a feature of 1, 2 and 0: pushing the first above the second lowers
    the feature's weight, and the third, which nobody has compared, gains what both lose.
    """
    feature, ref = torch.tensor([1.0, 2.0, 0.0], dtype=F64), torch.full((3,), 1 / 3, dtype=F64).log()
    weight = torch.zeros((), dtype=F64)

    def log_probs(w):
        return (w * feature).log_softmax(-1)

    def loss(w):
        table = log_probs(w)
        return dpo_loss(table[:1], table[1:2], ref[:1], ref[1:2], BETA, 0.0)[0]

    before = loss(weight)
    for _ in range(200):
        weight = weight - grad(loss)(weight)
    after = log_probs(weight)
    assert loss(weight) < 0.5 * before
    assert after[0] < ref[0] - 0.5 and after[1] < after[0] and after[2] > ref[2] + 0.5


def test_41_maximising_the_implicit_reward_does_not_end_at_the_reference():
    """S4 3.4.2: E_pi[R] = beta KL(pi || ref), whose maximisation is said to end at KL = 0; that is its
    minimum, and ascent leads away from it.
    """
    ref = WORLD.table(REF)

    def implicit(theta):
        table = WORLD.table(theta)
        return (table.exp() * BETA * (table - ref)).sum(-1).mean()

    close(implicit(REF), torch.zeros((), dtype=F64))
    close(grad(implicit)(REF), 0 * REF, atol=1e-9)
    theta = REF + 0.01 * WORLD.policy(7)
    start = implicit(theta)
    for _ in range(100):
        theta = theta + 2 * grad(implicit)(theta)
    assert 0 < start < 1e-3 and implicit(theta) > 10 * start


def test_41_it_rests_on_the_reference():
    """S4 3.4.2: what the reference hardly writes, pi* hardly writes: a response of chance e has e exp(r /
    beta) / Z.
    """
    reward = torch.tensor([0.0, 1.0], dtype=F64)
    for rare in (1e-2, 1e-4):
        ref = torch.tensor([1 - rare, rare], dtype=F64).log()[None]
        best = optimum(reward[None], ref, BETA).log_prob[0, 1].exp()
        odds = (1 / torch.tensor(BETA, dtype=F64)).exp() * rare / (1 - rare)
        close(best, odds / (1 + odds))
        assert best < 5 * rare
