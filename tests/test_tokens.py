"""Tasks of tokens: rules, prompts, exact values against sampled ones, the labeller, environments."""

import gymnasium as gym
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from zoo.common import tokens
from zoo.common.envs import make_envs
from zoo.common.errors import UsageError
from zoo.common.tokens import Add, Count, Sort, gap, make_task, measure, objective, optimum, rank


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


EVERY = [Count(), Count(end_token=True), Sort(), Sort(3), Add(), Add(1)]


@pytest.mark.parametrize(
    ("task", "prompt", "response", "steps"),
    [
        (Count(), [3, 6], [1, 7, 5, 3], [1, 1, 1, 1]),
        (Count(), [3, 6], [1, 0, 6, 4], [1, 0, 1, 1]),  # goes on from what was written
        (Count(end_token=True), [3, 6], [1, 7, 8, 8], [1, 1, 0, 0]),
        (Count(end_token=True), [0, 1], [8, 1, 2, 3], [0, 0, 0, 0]),
        (Sort(4), [3, 1, 3, 0, 10], [0, 1, 2, 3], [0.25, 0.25, 0, 0.25]),
        (Sort(4), [3, 1, 3, 0, 11], [0, 3, 1, 3], [0.25] * 4),
        (Add(2), [9, 5, 10, 0, 7], [2, 0, 1, 11], [0.25] * 4),
        (Add(2), [1, 0, 10, 0, 7], [7, 1, 11, 11], [1 / 3, 1 / 3, 1 / 3, 0]),
        (Add(2), [1, 0, 10, 0, 7], [7, 11, 1, 11], [1 / 3, 0, 0, 0]),  # ended too soon
        (Add(2), [0, 0, 10, 0, 0], [0, 11, 11, 11], [0.5, 0.5, 0, 0]),
    ],
)  # fmt: skip
def test_rewards_by_hand(task, prompt, response, steps):
    prompt, response = torch.tensor([prompt]), torch.tensor([response])
    assert task.step_reward(prompt, response)[0].tolist() == pytest.approx(steps)
    assert task.reward(prompt, response).item() == pytest.approx(sum(steps))


@pytest.mark.parametrize("task", EVERY, ids=lambda t: f"{t.name}{t.response_length}")
def test_the_answer_is_exact_and_nothing_pays_more(task):
    prompt = task.prompts(200, generator())
    answer = task.answer(prompt)
    assert prompt.shape == (200, task.prompt_length) and answer.shape == (200, task.response_length)
    assert task.exact(prompt, answer).all() and prompt.max() < task.vocab and answer.max() < task.vocab
    best = task.reward(prompt, answer)
    torch.testing.assert_close(best, torch.full_like(best, 4.0 if task.name == "Count" else 1.0))
    other = torch.randint(task.vocab, answer.shape, generator=generator(1))
    assert (task.reward(prompt, other) <= best).all() and not task.exact(prompt, other).all()


@pytest.mark.parametrize("count", [3, 17])
def test_add_adds(count):
    """Against Python's integers; 17 digits are the most."""
    task = make_task("Add", count)
    largest = torch.tensor([[9] * count + [task.PLUS] + [9] * count])
    prompt = torch.cat((task.prompts(300, generator()), largest))
    for row, answer in zip(prompt.tolist(), task.answer(prompt).tolist(), strict=True):
        a, b = (int("".join(map(str, part))) for part in (row[:count], row[count + 1 :]))
        digits = answer[: answer.index(11)]
        assert int("".join(map(str, reversed(digits)))) == a + b and set(answer[len(digits) :]) == {11}


def test_step_rewards_look_only_back():
    for task in EVERY:
        prompt = task.prompts(50, generator())
        one, two = torch.randint(task.vocab, (2, 50, task.response_length), generator=generator(1))
        for t in range(task.response_length):
            mixed = torch.cat((one[:, : t + 1], two[:, t + 1 :]), 1)
            ours, theirs = (
                task.step_reward(prompt, one)[:, : t + 1],
                task.step_reward(prompt, mixed)[:, : t + 1],
            )
            assert torch.equal(ours, theirs)


def test_masks_end_with_the_first_end_token():
    task = Add(2)
    response = torch.tensor([[1, 2, 11, 11], [11, 3, 11, 4], [1, 2, 3, 4]])
    assert task.mask(response).tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert Sort(4).mask(response).all()


@pytest.mark.parametrize("task", [Sort(3), Add(2)], ids=lambda t: t.name)
def test_held_out_prompts_are_never_trained_on(task):
    train = {tuple(p) for p in task.prompts(20_000, generator()).tolist()}
    held_out = {tuple(p) for p in task.prompts(2_000, generator(1), held_out=True).tolist()}
    assert not train & held_out
    share = task.is_held_out(task.draw(20_000, generator(2))).double().mean()
    assert 0.08 < share < 0.17


def test_prompts_are_drawn_by_seed():
    assert torch.equal(Sort().prompts(9, generator(3)), Sort().prompts(9, generator(3)))
    assert not torch.equal(Sort().prompts(9, generator(3)), Sort().prompts(9, generator(4)))
    assert not torch.equal(Count(seed=1).every_prompt, Count(seed=2).every_prompt)


# --- exact values -------------------------------------------------------------------------------------------


def random_policy(task, seed):
    """A table of log-probabilities (N, M) over all responses."""
    shape = (len(task.every_prompt), len(task.every_response()))
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).log_softmax(-1)


@pytest.mark.parametrize("end", [False, True])
def test_every_response_is_listed_once(end):
    task = Count(vocab=3, length=3, num_prompts=2, end_token=end)
    responses = task.every_response()
    assert len(responses) == (27 + 9 + 3 + 1 if end else 27) == len(responses.unique(dim=0))
    assert all(
        torch.equal(x, y) for x, y in zip(task.everything()[1][: len(responses)], responses, strict=True)
    )
    if end:  # what a policy generates, padded, is in the list, and only that
        assert ((responses == task.end) | task.mask(responses)).all()


def test_the_optimum_by_enumeration():
    task, beta = Count(vocab=3, length=3, num_prompts=2), 0.4
    reward = task.reward(*task.everything()).view(2, -1).double()
    ref = random_policy(task, 0)
    best = optimum(reward, ref, beta)
    torch.testing.assert_close(best.log_prob.exp().sum(-1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(objective(best.log_prob, reward, ref, beta), best.value)
    assert gap(best.log_prob, reward, ref, beta).abs() < 1e-12 and gap(ref, reward, ref, beta) == 1
    for seed in range(1, 30):
        assert objective(random_policy(task, seed), reward, ref, beta) < best.value


def test_j_by_enumeration_equals_j_by_sampling():
    """200,000 samples; within four standard errors."""
    task, beta = Count(vocab=3, length=3, num_prompts=2), 0.4
    prompt, response = task.everything()
    policy, ref = random_policy(task, 1), random_policy(task, 2)
    index = policy.exp().multinomial(100_000, replacement=True, generator=generator())
    flat = (index + torch.tensor([[0], [policy.shape[1]]])).flatten()
    samples = task.reward(prompt[flat], response[flat]).double() - beta * (policy - ref).flatten()[flat]
    exact = objective(policy, task.reward(prompt, response).view(2, -1).double(), ref, beta)
    assert abs(samples.mean() - exact) < 4 * samples.std() / len(samples) ** 0.5


# --- the labeller -------------------------------------------------------------------------------------------


def test_pairs_are_labelled_by_bradley_and_terry():
    """P(first) = sigmoid(difference / temperature), errors turned round; within 4 standard errors."""
    reward = torch.tensor([[0.9, 0.4]]).repeat(100_000, 1)
    for temperature, error in ((0.5, 0.0), (0.25, 0.0), (0.5, 0.3)):
        chance = torch.tensor(0.5 / temperature).sigmoid() * (1 - 2 * error) + error
        found = (rank(reward, temperature, error, generator())[:, 0] == 0).double().mean()
        assert abs(found - chance) < 4 * (chance * (1 - chance) / len(reward)) ** 0.5


def test_rankings_are_plackett_and_luces():
    """P(a, b, c) = softmax(a) times softmax of the two left; within 4 standard errors."""
    reward = torch.tensor([[1.0, 0.0, -0.5]])
    order = rank(reward.repeat(100_000, 1), 1.0, 0.0, generator())
    assert torch.equal(order.sort(-1).values[0], torch.arange(3))
    weight = reward[0].exp()
    chance = weight[1] / weight.sum() * weight[0] / (weight[0] + weight[2])
    found = (order == torch.tensor([1, 0, 2])).all(-1).double().mean()
    assert abs(found - chance) < 4 * (chance * (1 - chance) / 100_000) ** 0.5


# --- evaluation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [Sort(3), Add(2)], ids=lambda t: t.name)
def test_evaluations_ask_what_no_training_saw(task):
    """Held-out prompts, and with `other` the same for the other task; half of the answers are right."""
    asked = []

    def write(prompt, generator):
        asked.append(prompt)
        answer = task.answer(prompt)
        answer[::2] = (answer[::2] + 1) % task.vocab
        return answer, torch.zeros(answer.shape)

    def same(prompt, response):
        return torch.zeros(response.shape)

    found = measure(task, write, same, same, 0.1, 500, 0, torch.device("cpu"), other=task.name == "Sort")
    assert len(asked[0]) == 500 and task.is_held_out(asked[0]).all()
    assert found["eval_exact"] == 0.5 and found["eval_kl"] == 0
    if task.name == "Sort":
        assert torch.equal(asked[1], task.other(asked[0])) and found["eval_other"] == 0.5


def test_an_evaluations_kl_is_the_policys_to_the_reference():
    """Of two tables: by 20,000 samples within four standard errors of the sum; and the gap by enumeration."""
    task, beta = Count(vocab=3, length=3, num_prompts=2), 0.4
    policy, ref = random_policy(task, 1), random_policy(task, 2)
    responses = task.every_response()

    def of(table):
        """A table's log-probabilities, each response's spread evenly over its tokens."""

        def log_prob(prompt, response):
            row = (prompt[:, None] == task.every_prompt).all(-1).long().argmax(-1)
            column = (response[:, None] == responses).all(-1).long().argmax(-1)
            return (table[row, column] / 3)[:, None].expand(-1, 3)

        return log_prob

    def write(prompt, generator):
        row = (prompt[:, None] == task.every_prompt).all(-1).long().argmax(-1)
        response = responses[policy[row].exp().multinomial(1, generator=generator).squeeze(-1)]
        return response, of(policy)(prompt, response)

    found = measure(task, write, of(policy), of(ref), beta, 20_000, 0, torch.device("cpu"))
    kl = (policy.exp() * (policy - ref)).sum(-1).mean()
    square = (policy.exp() * (policy - ref) ** 2).sum(-1).mean()
    assert abs(found["eval_kl"] - kl) < 4 * ((square - kl**2) / 20_000) ** 0.5 < kl / 5
    reward = task.reward(*task.everything()).view(2, -1).double()
    assert found["eval_gap"] == pytest.approx(gap(policy, reward, ref, beta).item())
    assert found["eval_reward"] == pytest.approx((policy.exp() * reward).sum(-1).mean().item(), abs=0.05)


def test_an_evaluations_kl_ends_with_the_response():
    """One nat a token: as many as the answers have, and nothing for the padding behind them."""
    task, lengths = Add(2), []

    def write(prompt, generator):
        answer = task.answer(prompt)
        lengths.append(task.mask(answer).sum(-1).double().mean().item())
        return answer, torch.zeros(answer.shape)

    def ref(prompt, response):
        return -torch.ones(response.shape)

    found = measure(task, write, ref, ref, 0.1, 500, 0, torch.device("cpu"))
    assert found["eval_kl"] == pytest.approx(lengths[0]) and lengths[0] < task.response_length


# --- environments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tokens.TASKS)
def test_environments_keep_gymnasiums_contract(name):
    check_env(gym.make(f"tokens/{name}-v0").unwrapped, skip_render_check=True)


@pytest.mark.parametrize("name", tokens.TASKS)
def test_an_episodes_return_is_the_responses_reward(name):
    env = gym.make(f"tokens/{name}-v0").unwrapped
    obs, _ = env.reset(seed=1)
    task, best = env.task, env.task.answer(env.prompt)[0].tolist()
    total, ended, steps = 0.0, False, 0
    while not ended:
        rows = obs.reshape(-1, task.vocab)
        assert (
            rows.sum() == task.prompt_length + steps
            and rows[: task.prompt_length].argmax(-1).tolist() == env.prompt[0].tolist()
        )
        obs, reward, ended, truncated, _ = env.step(best[steps])
        total, steps = total + reward, steps + 1
        assert not truncated
    assert total == pytest.approx(task.reward(env.prompt, torch.tensor([best])).item())
    assert steps == task.mask(torch.tensor([best])).sum()


def test_the_agents_find_the_environments_by_module_and_id():
    envs = make_envs("zoo.common.tokens:tokens/Sort-v0", 2)
    assert envs.discrete and envs.action_dim == 12 and envs.obs_dim == 17 * 12


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(name="Sorted"), "Sorted.*nearest: Sort"),
        (dict(name="CartPole-v1"), "CartPole-v1.*Count, Sort, Add"),
        (dict(name="Sort", digits=0), "empty response"),
        (dict(name="Add", digits=18), r"\[1, 17\], not 18.*Add of 18 needs 10\^19"),
        (dict(name="Count", digits=3), "Count has none"),
    ],
)
def test_tasks_that_cannot_be(arguments, words):
    with pytest.raises(UsageError, match=words):
        make_task(**arguments)
