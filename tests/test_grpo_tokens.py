"""GRPO on tokens: advantages and losses by hand, against a plain policy gradient, the command line."""

from types import SimpleNamespace

import pytest
import torch
from command import recorded_updates, rows, run, run_script
from torch.func import grad

from zoo import grpo_tokens
from zoo.common.errors import UsageError
from zoo.common.tokens import Add
from zoo.grpo_tokens import Args, Group, group_advantages, grpo_loss, process_advantages, token_sum


def test_group_advantages_by_hand():
    reward = torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])
    assert group_advantages(reward, std=False).tolist() == [[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]]
    found = group_advantages(reward, std=True)
    # of 2 degrees of freedom
    torch.testing.assert_close(found[0], torch.tensor([-2.0, -1.0, 3.0]) / (7**0.5 + 1e-4))
    assert found[1].tolist() == [0.0, 0.0, 0.0]


def test_equal_rewards_give_no_advantage_beside_their_standard_deviation():
    """Seven, whose sum has to be rounded: over 1e-4 that would be a signal. The last group has one."""
    equal = torch.linspace(-99.7, 101.3, 1000)[:, None].expand(-1, 7)
    rewards = torch.cat((equal, torch.arange(7.0)[None]))
    found = group_advantages(rewards, std=True)
    assert not found[:-1].any() and found[-1].std().item() == pytest.approx(1, abs=1e-3)
    mask = torch.ones(1001, 7, 5, dtype=torch.bool)
    mask[:, 2, 3:] = False
    steps = torch.where(mask, rewards[..., None], 99.0)
    found = process_advantages(steps, mask, std=True)
    assert not found[:-1].any() and found[-1].abs().max() > 1


def test_process_advantages_by_hand():
    """Two responses, of two steps and of one, whose mean is 2; a token is credited with its own step."""
    reward = torch.tensor([[[1.0, 4.0], [1.0, 99.0]]])
    mask = torch.tensor([[[True, True], [True, False]]])
    found = process_advantages(reward, mask, std=False)
    assert found.tolist() == [[[1.0, 2.0], [-1.0, 0.0]]]
    std = 3**0.5 + 1e-4  # deviations -1, 2, -1 over two degrees of freedom
    torch.testing.assert_close(process_advantages(reward, mask, std=True), found / std)


def test_sums_over_tokens_by_hand():
    x = torch.tensor([[1.0, 2.0, 3.0], [6.0, 50.0, 50.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert token_sum(x, mask, "response").item() == pytest.approx((2 + 6) / 2)
    assert token_sum(x, mask, "batch").item() == pytest.approx(12 / 4)
    assert token_sum(x, mask, "constant").item() == pytest.approx(12 / 2 / 3)
    assert token_sum(x[1:], mask[1:], "constant").item() == pytest.approx(6 / 3)  # by L, not the longest one


def batch_of(shift=0.0):
    """Two responses, of three tokens and of two; what stands beyond the end is absurd."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    old = torch.tensor([[-1.0, -0.5, -2.0], [-0.3, -0.7, -50.0]])
    advantage = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, 0.0]])
    return old + shift, Group(None, None, mask, old, old - 0.1, advantage)


def test_at_the_old_policy_the_gradient_is_the_policy_gradient():
    """Of each token's or of the response's ratio: sum_t A grad log pi(y_t), over the longest length."""
    new, batch = batch_of()
    for ratio in ("token", "response"):
        args = Args(ratio=ratio, length="constant")
        found = grad(lambda x, args=args: grpo_loss(x, batch, args)[0])(new)
        torch.testing.assert_close(found, -batch.advantage * batch.mask / 2 / 3)


def test_the_clip_by_hand():
    new, batch = batch_of(torch.tensor([[0.5, -0.5, 0.0], [0.5, -0.5, 0.0]]))
    found, metrics = grpo_loss(new, batch, Args(clip=0.2, length="batch"))
    up, down = torch.tensor([0.5, -0.5]).exp().tolist()
    assert found.item() == pytest.approx(-((1.2 + down + 1.0) - (up + 0.8)) / 5)
    assert metrics["clipfrac"].item() == pytest.approx(4 / 5)


def test_the_clip_of_a_responses_ratio_by_hand():
    """Both have the ratio exp(.3), however their tokens share it; one is clipped, the other is not."""
    new, batch = batch_of(torch.tensor([[0.5, -0.2, 0.0], [0.1, 0.2, 0.0]]))
    found, metrics = grpo_loss(new, batch, Args(clip=0.2, ratio="response", length="constant"))
    assert found.item() == pytest.approx(-(1.2 - torch.tensor(0.3).exp().item()) / 2 / 3, abs=1e-6)
    assert metrics["clipfrac"] == 1


def test_the_kl_as_a_loss_by_hand():
    """ref is .1 below the old policy on every token; k3 of a token, k2 of a whole response."""
    new, batch = batch_of()
    rest = grpo_loss(new, batch, Args(length="response"))[0]
    token = Args(length="response", kl="k3", kl_in="loss", kl_level="token", beta=2.0)
    k3 = torch.expm1(torch.tensor(-0.1)) + 0.1
    assert grpo_loss(new, batch, token)[0].item() == pytest.approx(rest.item() + 2 * k3.item(), rel=1e-5)
    response = Args(kl="k2", kl_in="loss", kl_level="response", beta=2.0, length="constant")
    rest = grpo_loss(new, batch, Args(length="constant"))[0]
    k2 = (0.3**2 + 0.2**2) / 2 / 2
    assert grpo_loss(new, batch, response)[0].item() == pytest.approx(rest.item() + 2 * k2 / 3, rel=1e-5)


def test_the_correction_of_the_kl_weighs_it_by_the_ratio():
    """k2 of each token times its ratio to the old policy; of a whole response times the response's."""
    shift = torch.tensor([[0.5, -0.2, 0.1], [0.1, 0.2, 0.0]])
    new, batch = batch_of(shift)
    for level in ("token", "response"):
        args = Args(kl="k2", kl_in="loss", kl_level=level, kl_correction=True, beta=2.0, length="constant")
        rest = grpo_loss(new, batch, Args(length="constant"))[0]
        if level == "token":
            kl = (shift.exp() * (shift + 0.1) ** 2 / 2 * batch.mask).sum()
        else:  # the responses' ratios are exp(.4) and exp(.3), those to the reference exp(.7) and exp(.5)
            kl = (torch.tensor([0.4, 0.3]).exp() * torch.tensor([0.7, 0.5]) ** 2 / 2).sum()
        found = grpo_loss(new, batch, args)[0]
        assert found.item() == pytest.approx(rest.item() + 2 * kl.item() / 2 / 3, abs=1e-6), level


@pytest.mark.parametrize("length", ["response", "batch", "constant"])
@pytest.mark.parametrize("ratio", ["token", "response"])
def test_padding_changes_nothing_bit_for_bit(length, ratio):
    new, batch = batch_of(0.05)
    junk = torch.where(batch.mask, 0.0, 7.0)
    other = batch._replace(log_prob=batch.log_prob + junk, ref_log_prob=batch.ref_log_prob - junk)
    args = Args(length=length, ratio=ratio, kl="k3", kl_in="loss", kl_level="token")
    loss = lambda x, batch: grpo_loss(x, batch, args)[0]  # noqa: E731
    assert torch.equal(grad(loss)(new, batch), grad(loss)(new + junk, other))


# --- runs ---------------------------------------------------------------------------------------------------

TINY = (
    "--dim", "8", "--heads", "2", "--batch-size", "32", "--eval-episodes", "64", "--no-progress",
    "--digits", "3", "--supervised-steps", "4", "--total-steps", "128", "--no-anneal",
)  # fmt: skip


def policy(folder):
    return torch.load(folder / "agent.pt", weights_only=True)["state"]["params"]


def test_the_same_seed_the_same_run_and_a_resumed_one_too(tmp_path):
    for name in ("one", "two"):
        run(grpo_tokens, *TINY, "--run-dir", str(tmp_path / name))
    run(grpo_tokens, *TINY, "--seed", "2", "--run-dir", str(tmp_path / "other"))
    assert rows(tmp_path / "one") == rows(tmp_path / "two") != rows(tmp_path / "other")
    run(grpo_tokens, *TINY, "--total-steps", "64", "--run-dir", str(tmp_path / "half"))
    with pytest.raises(UsageError, match=r"--supervised-steps 5.*made with 4"):
        run(grpo_tokens, "--resume", str(tmp_path / "half"), "--supervised-steps", "5")
    run(grpo_tokens, "--resume", str(tmp_path / "half"), "--total-steps", "128")
    assert torch.equal(policy(tmp_path / "half"), policy(tmp_path / "one"))


# for responses of different lengths
ADD = (*TINY, "--env", "Add", "--digits", "2", "--beta", "0.5")


@pytest.fixture(scope="module")
def by_default(tmp_path_factory):
    """The parameters that the defaults learn."""
    folder = tmp_path_factory.mktemp("default")
    run(grpo_tokens, *ADD, "--run-dir", str(folder))
    return policy(folder)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--level", "process"),
        ("--std",),
        ("--length", "response"),
        ("--length", "batch"),
        ("--ratio", "response"),
        ("--kl", "k3", "--kl-in", "loss", "--kl-level", "token"),
    ],
)
def test_variants_run(arguments, by_default, tmp_path):
    """... and learn something else than the defaults."""
    run(grpo_tokens, *ADD, *arguments, "--run-dir", str(tmp_path))
    assert not torch.equal(policy(tmp_path), by_default)


@pytest.mark.parametrize("level", ["response", "process"])
@pytest.mark.parametrize("std", ["--std", "--no-std"])
def test_a_response_is_compared_with_the_others_to_its_prompt(level, std, tmp_path, monkeypatch):
    """A batch's log-probabilities and, without KL, advantages, from its prompts and responses alone."""
    calls = recorded_updates(monkeypatch, grpo_tokens)
    once = ("--total-steps", "32", "--num-epochs", "1", "--num-minibatches", "1", "--beta", "0")
    run(grpo_tokens, *ADD, *once, "--level", level, std, "--run-dir", str(tmp_path))
    [(params, _, batch, _)] = calls
    task, mask = Add(2), batch.mask
    settings = SimpleNamespace(dim=8, layers=2, heads=2, reference_scale=1.0)
    _, forward = grpo_tokens.make_network(task, settings, task.vocab, torch.device("cpu"))
    log_prob = grpo_tokens.log_probs(forward, params, batch.prompt, batch.response)
    torch.testing.assert_close(batch.log_prob * mask, log_prob * mask, rtol=1e-4, atol=1e-5)
    reward = task.step_reward(batch.prompt, batch.response)
    for prompt in batch.prompt.unique(dim=0):
        rows = (batch.prompt == prompt).all(-1)
        of = reward[rows][mask[rows]] if level == "process" else reward[rows].sum(-1)
        scale = of.std() + 1e-4 if std == "--std" else 1.0
        if level == "process":
            expected = (((reward[rows] - of.mean()) / scale) * mask[rows]).flip(-1).cumsum(-1).flip(-1)
        else:
            expected = ((of - of.mean()) / scale)[:, None]
        torch.testing.assert_close(batch.advantage[rows], expected * mask[rows], rtol=1e-4, atol=1e-5)
        assert rows.sum() == 8
    assert batch.advantage.abs().max() > 0.1 and not mask.all()


@pytest.mark.parametrize("level", ["response", "process"])
def test_the_kl_in_the_reward_is_that_of_the_response_alone(level, tmp_path, monkeypatch):
    """The second batch's advantages, by which the policy has left the reference: what stands beyond a
    response's end costs nothing. What is logged, and the learning rate, too.
    """
    calls = recorded_updates(monkeypatch, grpo_tokens)
    once = ("--total-steps", "64", "--num-epochs", "1", "--num-minibatches", "1", "--beta", "0.5")
    falling = ("--learning-rate", "3e-2", "--anneal")
    run(grpo_tokens, *ADD, *once, *falling, "--level", level, "--run-dir", str(tmp_path))
    (ref, _, _, first), (params, _, batch, second) = calls
    assert [float(first), float(second)] == pytest.approx([3e-2, 1.5e-2])  # falling to 0
    task, settings = Add(2), SimpleNamespace(dim=8, layers=2, heads=2, reference_scale=1.0)
    _, forward = grpo_tokens.make_network(task, settings, task.vocab, torch.device("cpu"))
    log_ratio = grpo_tokens.log_probs(forward, params, batch.prompt, batch.response)
    log_ratio = log_ratio - grpo_tokens.log_probs(forward, ref, batch.prompt, batch.response)
    ends = [[*row, task.end].index(task.end) + 1 for row in batch.response.tolist()]
    mask = torch.tensor([[t < end for t in range(task.response_length)] for end in ends])
    assert torch.equal(batch.mask, mask) and not mask.all() and log_ratio[mask].abs().mean() > 0.02
    reward = (task.step_reward(batch.prompt, batch.response) - 0.5 * log_ratio) * mask
    for prompt in batch.prompt.unique(dim=0):
        group = (batch.prompt == prompt).all(-1)
        of, inside = reward[group], mask[group]
        if level == "process":
            expected = ((of - of[inside].mean()) * inside).flip(-1).cumsum(-1).flip(-1)
        else:
            expected = (of.sum(-1) - of.sum(-1).mean())[:, None]
        torch.testing.assert_close(batch.advantage[group], expected * inside, rtol=1e-3, atol=1e-3)
        assert group.sum() == 8
    last = rows(tmp_path)[-1]
    assert float(last["kl"]) == pytest.approx(float((log_ratio * mask).sum(-1).mean()), abs=1e-3)
    assert float(last["learning_rate"]) == pytest.approx(1.5e-2)


def test_a_kl_in_the_loss_is_not_charged_again(tmp_path, monkeypatch):
    """The advantages of the second batch, by which the policy has left the reference, are the rule's."""
    calls = recorded_updates(monkeypatch, grpo_tokens)
    once = ("--total-steps", "64", "--num-epochs", "1", "--num-minibatches", "1", "--learning-rate", "3e-2")
    run(grpo_tokens, *ADD, *once, "--kl-in", "loss", "--run-dir", str(tmp_path))
    _, (_, _, batch, _) = calls
    assert (batch.log_prob - batch.ref_log_prob)[batch.mask].abs().mean() > 0.02
    reward = Add(2).reward(batch.prompt, batch.response)
    for prompt in batch.prompt.unique(dim=0):
        group = (batch.prompt == prompt).all(-1)
        expected = (reward[group] - reward[group].mean())[:, None] * batch.mask[group]
        torch.testing.assert_close(batch.advantage[group], expected, rtol=1e-4, atol=1e-5)


def test_it_learns_count(tmp_path):
    """Ten updates bring the policy a fifth of the way to the optimum."""
    count = ("--env", "Count", "--total-steps", "5120", "--learning-rate", "4e-3", "--no-progress")
    assert run(grpo_tokens, *count, "--run-dir", str(tmp_path / "r")) < 0.8


def test_compiled_equals_eager(tmp_path, no_fallback):
    """One update from the same state; float32 in another order."""
    tiny = (*TINY, "--total-steps", "32", "--layers", "1", "--num-epochs", "1", "--num-minibatches", "1")
    for name in ("--compile", "--no-compile"):
        run(grpo_tokens, *tiny, name, "--run-dir", str(tmp_path / name))
    one, two = (policy(tmp_path / name) for name in ("--compile", "--no-compile"))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--group-size", "1"), "--group-size 1.*at least 2"),
        (("--group-size", "5"), "--group-size 5.*--batch-size 32"),
        (("--num-minibatches", "3"), "--num-minibatches 3.*--batch-size 32"),
        (("--level", "process", "--ratio", "response"), "--level process.*--ratio token"),
        (("--beta", "-1"), "--beta.*at least 0"),
        (("--total-steps", "3"), "--total-steps 3.*batch"),
        (("--supervised-batch-size", "0"), "--supervised-batch-size must be at least 1, not 0"),
        (("--num-envs", "4"), "--num-envs 4.*--batch-size"),
    ],
)
def test_bad_input_is_refused(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words):
        run(grpo_tokens, *TINY, *arguments)
    assert not list(tmp_path.iterdir())


def test_bad_input_is_told_in_one_line():
    status, told = run_script("grpo_tokens", "--group-size", "1")
    assert status == 2 and told.count("\n") == 1 and "--group-size" in told
