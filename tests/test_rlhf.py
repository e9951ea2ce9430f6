"""RLHF on tokens: the GPT and its cache, masks, estimators and losses by hand, the stages."""

import json
import math
import shlex
import shutil
from types import SimpleNamespace

import pytest
import torch
from command import ROOT, recorded_updates, rows, run, run_script
from torch.func import grad
from torch.nn.functional import logsigmoid

from zoo import dpo, grpo_tokens, rlhf
from zoo.common.errors import RunFault, UsageError
from zoo.common.tokens import Add, Count, Sort
from zoo.rlhf import Args, Responses, at_responses, generate, gumbel, log_probs, reward_scores

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network(task, outputs=None, **settings):
    torch.manual_seed(0)
    args = SimpleNamespace(**dict(dim=16, layers=2, heads=2, reference_scale=3.0) | settings)
    return rlhf.make_network(task, args, outputs or task.vocab, CPU)


def written(task, count=32, seed=0):
    """A network, prompts, and responses it wrote with their log-probabilities."""
    params, policy = network(task)
    prompt = task.prompts(count, generator(seed))
    noise = gumbel(count, task.response_length, task.vocab, generator=generator(seed + 1))
    return params, policy, prompt, *generate(policy, params, prompt, noise, task.end)


# --- the network --------------------------------------------------------------------------------------------


def test_the_cache_changes_nothing():
    """Token by token with a cache, and all at once: the same outputs."""
    params, policy = network(Sort(4))
    tokens = torch.randint(12, (8, 9), generator=generator())
    whole = policy(params, tokens)[0]
    part, past = policy(params, tokens[:, :5])
    found = [part]
    for t in range(5, 9):
        one, past = policy(params, tokens[:, t : t + 1], past)
        found.append(one)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-5, atol=1e-5)


def test_no_output_sees_a_later_token():
    params, policy = network(Sort(4))
    one, two = torch.randint(12, (2, 8, 9), generator=generator())
    mixed = torch.cat((one[:, :5], two[:, 5:]), 1)
    assert torch.equal(policy(params, one)[0][:, :5], policy(params, mixed)[0][:, :5])
    assert not torch.equal(policy(params, one)[0][:, 5:], policy(params, mixed)[0][:, 5:])


@pytest.mark.parametrize("task", [Sort(4), Add(2), Count(end_token=True)], ids=lambda t: t.name)
def test_sampled_log_probabilities_equal_recomputed_ones(task):
    params, policy, prompt, response, log_prob = written(task)
    mask = task.mask(response)
    torch.testing.assert_close(
        log_prob * mask, log_probs(policy, params, prompt, response) * mask, rtol=1e-4, atol=1e-5
    )


def test_responses_follow_the_policys_probabilities():
    """40,000 responses, each of 16 as often as the policy says, within 4.5 standard errors."""
    task = Count(vocab=4, length=2, num_prompts=1)
    params, policy = network(task, reference_scale=1.0)
    prompt = task.prompts(40_000, generator())
    noise = gumbel(40_000, 2, 4, generator=generator(1))
    response, _ = generate(policy, params, prompt, noise, None)
    chance = log_probs(policy, params, *task.everything()).sum(-1).exp()
    found = torch.bincount(response[:, 0] * 4 + response[:, 1], minlength=16) / 40_000
    assert chance.sum().item() == pytest.approx(1, abs=1e-5) and 0.002 < chance.min() < chance.max() / 3
    assert ((found - chance).abs() < 4.5 * (chance * (1 - chance) / 40_000).sqrt()).all()


def test_a_prompt_read_once_is_answered_as_if_it_were_read_for_each_response():
    task = Add(2)
    params, policy = network(task)
    prompt, noise = task.prompts(8, generator()), gumbel(24, 4, 12, generator=generator(1))
    response, log_prob = generate(policy, params, prompt, noise, task.end)
    repeated = prompt.repeat_interleave(3, 0)
    expected, expected_log_prob = generate(policy, params, repeated, noise, task.end)
    assert torch.equal(response, expected)
    torch.testing.assert_close(log_prob, expected_log_prob)
    mask = task.mask(response)
    recomputed = log_probs(policy, params, repeated, response)
    torch.testing.assert_close(log_prob * mask, recomputed * mask, rtol=1e-4, atol=1e-5)


def test_without_noise_the_likeliest_token_is_written():
    task = Add(2)
    params, policy = network(task)
    prompt = task.prompts(16, generator())
    response, _ = generate(policy, params, prompt, torch.zeros(16, 4, 12), task.end)
    likeliest = at_responses(policy, params, prompt, response).argmax(-1)
    mask = task.mask(response)
    assert torch.equal(response[mask], likeliest[mask])


def test_after_the_end_token_only_end_tokens_stand():
    task = Count(end_token=True)
    _, _, _, response, _ = written(task, 200)
    mask = task.mask(response)
    assert (~mask).any() and (response[~mask] == task.end).all()


def test_padding_changes_nothing_bit_for_bit():
    """What stands beyond a response's end reaches no log-probability, score, value, loss or gradient."""
    task = Count(end_token=True)
    params, policy, prompt, response, log_prob = written(task, 64)
    model, critic = network(task, 1)
    mask = task.mask(response)
    other = torch.where(mask, response, torch.randint(8, response.shape, generator=generator(9)))
    assert not torch.equal(other, response)
    assert torch.equal(*(log_probs(policy, params, prompt, r) * mask for r in (response, other)))
    assert torch.equal(*(reward_scores(critic, model, prompt, r, mask) for r in (response, other)))
    assert torch.equal(
        *(at_responses(critic, model, prompt, r).squeeze(-1) * mask for r in (response, other))
    )
    value = at_responses(critic, model, prompt, response).squeeze(-1).detach()
    reward = rlhf.token_rewards(torch.ones(64), 0.3 * log_prob, mask, 0.5)
    junk = torch.where(mask, 0.0, 1e3)  # beyond the end
    advantages = [rlhf.response_advantages(reward, value + j, mask, 1.0, 0.9) for j in (0, junk)]
    assert torch.equal(*advantages)

    def loss(params, response, junk):
        new = log_probs(policy, params, prompt, response)
        batch = Responses(
            prompt, response, mask, log_prob - junk, log_prob - 0.1 + junk, advantages[0], value
        )
        return rlhf.rlhf_loss(
            new + 0.01, value + 0.5 + junk, batch, Args(env="Count", kl_in="loss", kl="k3")
        )[0]

    assert torch.equal(grad(loss)(params, response, 0 * junk), grad(loss)(params, other, junk))


def test_a_score_is_read_at_the_last_token_of_each_response():
    """S3 (50), E14: not at the end of the padded row, and behind the last token, not before it."""
    task = Count(end_token=True)
    _, _, prompt, response, _ = written(task, 64)
    params, model = network(task, 1)
    mask = task.mask(response)
    found = reward_scores(model, params, prompt, response, mask)
    for i, length in enumerate(mask.sum(-1).tolist()):
        alone = model(params, torch.cat((prompt[i : i + 1], response[i : i + 1, :length]), 1))[0][0, -1, 0]
        assert found[i].item() == pytest.approx(alone.item(), abs=1e-5)
    assert len(mask.sum(-1).unique()) > 1


# --- estimators and losses ----------------------------------------------------------------------------------


def test_token_rewards_by_hand():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    kl = torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0]])
    found = rlhf.token_rewards(torch.tensor([10.0, 20.0]), kl, mask, 0.5)
    assert found.tolist() == [[-0.5, -1.0, 8.5], [18.0, 0.0, 0.0]]


def test_advantages_by_hand():
    """gamma .5, lambda .5; the shorter response ends after its first token."""
    mask = torch.tensor([[True, True], [True, False]])
    reward, value = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.5, 4.0], [1.0, 7.0]])
    found = rlhf.response_advantages(reward, value, mask, 0.5, 0.5)
    assert found.tolist() == [[1 + 0.5 * 4 - 0.5 + 0.25 * (2 - 4), -2.0], [2.0, 0.0]]


def test_with_lambda_1_and_no_value_an_advantage_is_the_return_to_go():
    mask = torch.ones(3, 4, dtype=torch.bool)
    reward = torch.randn(3, 4, generator=generator())
    found = rlhf.response_advantages(reward, torch.zeros(3, 4), mask, 1.0, 1.0)
    torch.testing.assert_close(found, reward.flip(-1).cumsum(-1).flip(-1))


def test_ranking_loss_by_hand():
    """A pair: -log sigmoid(difference). Three: the mean over the three pairs."""
    pair = torch.tensor([[1.5, 0.5], [0.0, 2.0]])
    loss, metrics = rlhf.ranking_loss(pair)
    torch.testing.assert_close(loss, -logsigmoid(torch.tensor([1.0, -2.0])).mean())
    assert metrics["accuracy"] == 0.5
    tied = torch.tensor([[1.5, 0.5], [2.0, 2.0]])
    assert rlhf.ranking_loss(tied)[1]["accuracy"] == 0.75  # a tie is half right
    three = torch.tensor([[2.0, 1.0, -1.0]])
    torch.testing.assert_close(rlhf.ranking_loss(three)[0], -logsigmoid(torch.tensor([1.0, 3.0, 2.0])).mean())


def test_rlhf_loss_by_hand():
    """One response of two tokens, one of one: the means are over three tokens."""
    mask = torch.tensor([[True, True], [True, False]])
    old = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]])
    new = old + torch.tensor([[0.5, -0.1], [-0.4, 5.0]])
    advantage = torch.tensor([[1.0, 2.0], [-1.0, 0.0]])
    value, return_ = torch.tensor([[1.0, 0.0], [2.0, 9.0]]), torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    batch = Responses(None, None, mask, old, old - 0.2, advantage, return_)
    args = Args(env="Count", clip=0.2, value_coef=0.5, beta=2.0, kl_in="loss", kl="k2")
    loss, metrics = rlhf.rlhf_loss(new, value, batch, args)
    ratio = torch.tensor([0.5, -0.1, -0.4]).exp()
    policy = -(1.2 * 1 + ratio[1] * 2 - 0.8) / 3  # the first clipped above, the last below
    squared = (1 + 0 + 4) / 3
    kl = sum((d + 0.2) ** 2 / 2 for d in (0.5, -0.1, -0.4)) / 3
    assert metrics["policy_loss"].item() == pytest.approx(policy.item(), rel=1e-5)
    assert metrics["clipfrac"].item() == pytest.approx(2 / 3)
    assert loss.item() == pytest.approx(policy.item() + 0.5 * squared + 2 * kl, rel=1e-5)


def test_the_reward_models_gradient_reaches_the_reward_model_only():
    """Neither does PPO's loss reach the reward model, nor the ranking loss the policy that wrote."""
    task = Count()
    params, policy, prompt, response, _ = written(task, 8)
    model_params, model = network(task, 1)
    mask = task.mask(response)

    def paid(both):
        policy_params, member = both.split((len(params), len(model_params)))
        score = reward_scores(model, member, prompt, response, mask)
        ranking = rlhf.ranking_loss(score.view(-1, 2))[0]
        return ranking + 0 * log_probs(policy, policy_params, prompt, response).sum()

    found = grad(paid)(torch.cat((params, model_params)))
    assert (found[: len(params)] == 0).all() and found[len(params) :].abs().max() > 0

    def ppo(both):
        policy_params, member = both.split((len(params), len(model_params)))
        reward = rlhf.token_rewards(
            reward_scores(model, member, prompt, response, mask).detach(), 0.0 * mask, mask, 0.0
        )
        log_prob = log_probs(policy, policy_params, prompt, response)
        batch = Responses(prompt, response, mask, log_prob.detach(), log_prob.detach(), reward, reward)
        return rlhf.rlhf_loss(log_prob, 0 * reward, batch, Args(env="Count"))[0]

    found = grad(ppo)(torch.cat((params, model_params)))
    assert (found[len(params) :] == 0).all() and found[: len(params)].abs().max() > 0


# --- runs ---------------------------------------------------------------------------------------------------

TINY = (
    "--dim", "8", "--heads", "2", "--batch-size", "32", "--supervised-batch-size", "32",
    "--eval-episodes", "64", "--no-progress",
)  # fmt: skip
SORT = (
    "--env", "Sort", "--digits", "3", "--supervised-steps", "4", "--comparisons", "64",
    "--reward-epochs", "2", "--total-steps", "128", *TINY,
)  # fmt: skip
ADD = (*SORT, "--env", "Add", "--digits", "2")  # responses may end early


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of all three stages, each of 128 sequences; two reward models."""
    folder = tmp_path_factory.mktemp("rlhf") / "run"
    run(rlhf, *SORT, "--ensemble", "2", "--no-anneal", "--run-dir", str(folder))
    return folder


def agent(folder):
    return torch.load(folder / "agent.pt", weights_only=True)["state"]


def recorded(monkeypatch, function):
    """The arguments of every call that rlhf will make of its `function`."""
    calls, real = [], getattr(rlhf, function)

    def record(*arguments):
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(rlhf, function, record)
    return calls


def test_all_stages_leave_their_folders(finished):
    for stage in ("supervised", "reward", "ppo"):
        names = {path.name for path in (finished / stage).iterdir()}
        assert {"agent.pt", "checkpoint.pt", "args.json", "progress.csv"} <= names
        assert int(rows(finished / stage)[-1]["step"]) == 128
        assert json.loads((finished / stage / "args.json").read_text())["args"]["stage"] == stage
    assert rows(finished / "reward")[-1]["eval_accuracy"]
    last = rows(finished / "ppo")[-1]
    assert all(last[name] for name in ("eval_exact", "eval_reward", "eval_kl", "score", "rule_reward", "kl"))
    assert agent(finished / "reward")["members"].shape[0] == 2


def test_the_same_seed_gives_the_same_run_and_another_another(finished, tmp_path):
    def table(name, *arguments):
        run(rlhf, *SORT, "--ensemble", "2", "--no-anneal", "--run-dir", str(tmp_path / name), *arguments)
        return rows(tmp_path / name / "ppo")

    assert table("two") == rows(finished / "ppo") != table("other", "--seed", "2")


def test_the_same_command_goes_on_with_the_stages_that_are_left(finished, tmp_path):
    """One stage finished, one stopped half way, one not begun: together the agents of a run in one go."""
    folder, given = tmp_path / "run", (*SORT, "--ensemble", "2", "--no-anneal")
    run(rlhf, *given, "--stage", "supervised", "--run-dir", str(folder))
    first = (folder / "supervised" / "agent.pt").stat().st_mtime_ns  # reading moves st_atime
    run(rlhf, *given, "--stage", "reward", "--earlier", str(folder))
    (folder / "reward" / "agent.pt").unlink()  # killed before it had one
    run(rlhf, *given, "--run-dir", str(folder))
    assert (folder / "supervised" / "agent.pt").stat().st_mtime_ns == first
    for stage in ("supervised", "reward", "ppo"):
        ours, whole = agent(folder / stage), agent(finished / stage)
        assert all(torch.equal(ours[name], whole[name]) for name in whole)
    table = rows(folder / "ppo")
    run(rlhf, *given, "--run-dir", str(folder))  # all are finished
    assert rows(folder / "ppo") == table
    with pytest.raises(
        UsageError, match=r"--reward-epochs 3: the stage in .*/supervised was run with .* 2; another"
    ):
        run(rlhf, *SORT, "--ensemble", "2", "--no-anneal", "--reward-epochs", "3", "--run-dir", str(folder))


def test_the_ppo_stage_goes_on_without_the_folders_of_the_others(finished, tmp_path):
    """Reference, reward models and the shift of their scores are in its checkpoint."""
    given = (*SORT, "--ensemble", "2", "--no-anneal")
    shutil.copytree(finished, tmp_path / "copy")
    stage = ("--stage", "ppo", "--earlier", str(tmp_path / "copy"), "--run-dir", str(tmp_path / "half"))
    run(rlhf, *given, *stage, "--total-steps", "64")
    shutil.rmtree(tmp_path / "copy")
    run(rlhf, "--resume", str(tmp_path / "half" / "ppo"), "--total-steps", "128")
    assert rows(tmp_path / "half" / "ppo")[-1] == rows(finished / "ppo")[-1]


@pytest.mark.parametrize("agent_file", [dpo, grpo_tokens], ids=["dpo", "grpo_tokens"])
def test_a_resumed_run_is_held_to_the_reference_it_began_with(agent_file, tmp_path):
    """Whatever arguments would make another one now."""
    given = ("--env", "Sort", "--digits", "3", "--supervised-steps", "4", "--total-steps", "128", *TINY)
    run(agent_file, *given, "--run-dir", str(tmp_path / "run"))
    before = rows(tmp_path / "run")[-1]
    run(agent_file, "--resume", str(tmp_path / "run"), "--reference-scale", "5", "--batch-size", "64")
    assert rows(tmp_path / "run")[-1] == before and float(before["eval_kl"]) < 0.5


@pytest.mark.parametrize("agent_file", [rlhf, dpo, grpo_tokens], ids=["rlhf", "dpo", "grpo_tokens"])
def test_an_evaluation_that_was_owed_is_held_to_the_runs_own_reference(agent_file, finished, tmp_path):
    """Killed in an evaluation and resumed, by arguments that would make another reference and without the
    folders of other stages: the table of a run that was not."""
    given = ("--env", "Sort", "--digits", "3", "--supervised-steps", "4", "--total-steps", "128", *TINY)
    given, whole, killed = (*given, "--eval-every", "64"), tmp_path / "whole", tmp_path / "killed"
    if agent_file is rlhf:
        shutil.copytree(finished, tmp_path / "earlier")
        given = (*given, "--reward", "rule", "--stage", "ppo", "--earlier", str(tmp_path / "earlier"))
    run(agent_file, *given, "--run-dir", str(whole))

    def die(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(agent_file.Run, "_evaluated", die)
        run(agent_file, *given, "--run-dir", str(killed))
    if agent_file is rlhf:
        shutil.rmtree(tmp_path / "earlier")
        whole, killed = whole / "ppo", killed / "ppo"
    assert [bool(row["eval_kl"]) for row in rows(whole)] == [False, True, False, True]
    run(agent_file, "--resume", str(killed), "--reference-scale", "5")
    assert rows(killed) == rows(whole)


def test_the_reference_is_the_same_in_all_files(tmp_path):
    """Whatever the batches of what comes after it; those of the demonstrations make another one."""
    given = ("--env", "Sort", "--digits", "3", "--supervised-steps", "4", "--eval-every", "0", *TINY)

    def reference(agent_file, *more):
        folder = tmp_path / agent_file.__name__ / str(len(more))
        if agent_file is rlhf:
            run(rlhf, *given, "--stage", "supervised", *more, "--run-dir", str(folder))
            return agent(folder / "supervised")["params"]
        run(agent_file, *given, "--total-steps", "128", *more, "--run-dir", str(folder))
        return torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["ref"]

    first = reference(rlhf)
    for batch, agent_file in (("16", rlhf), ("64", dpo), ("128", grpo_tokens)):
        assert torch.equal(reference(agent_file, "--batch-size", batch), first)
        other = ("--batch-size", batch, "--supervised-batch-size", "16")
        assert not torch.equal(reference(agent_file, *other), first)


def test_a_stopped_command_names_itself_to_go_on_with_all_stages(finished, tmp_path, monkeypatch):
    """Stopped by a fault in its ppo stage, before the first checkpoint, and by Ctrl-C after it; the command
    that it tells then runs what is left."""
    monkeypatch.chdir(tmp_path)
    report = rlhf.Run.report

    def broken(self, step, *rest):
        if self.unit == "responses":
            raise RunFault("power cut")
        return report(self, step, *rest)

    def stopped(self, step, *rest):
        if self.unit == "responses":
            self._process.stop_signal = 2
        return report(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(rlhf.Run, "report", broken)
        status, told = run_script("rlhf", *SORT, "--reward", "rule")
    (folder,) = (tmp_path / "runs").iterdir()
    script = str(ROOT / "zoo" / "rlhf.py")
    again = shlex.join(["python", script, *SORT, "--reward", "rule", "--run-dir", f"runs/{folder.name}"])
    assert (status, told.splitlines()[-2:]) == (
        1, ["error: power cut", f"no checkpoint had been written yet; resume with: {again}"]
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(rlhf.Run, "report", stopped)
        status, told = run_script("rlhf", *shlex.split(again)[2:])
    assert (status, told.splitlines()[-1]) == (130, f"interrupted at step 32; resume with: {again}")
    assert run_script("rlhf", *shlex.split(again)[2:])[0] == 0
    assert (folder / "ppo" / "agent.pt").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("env", ["Sort", "Count"])
@pytest.mark.parametrize("agent_file", [rlhf, dpo, grpo_tokens], ids=["rlhf", "dpo", "grpo_tokens"])
def test_a_run_on_cuda_and_its_resumption(agent_file, env, tmp_path):
    """All stages, with two reward models, and the last one gone on with."""
    given = ("--env", env, "--supervised-steps", "4", "--eval-every", "64", "--device", "cuda", *TINY)
    if agent_file is not grpo_tokens:
        given = (*given, "--comparisons", "64")
    if agent_file is rlhf:
        given = (*given, "--reward-epochs", "2", "--ensemble", "2", "--reward", "model")
    folder = tmp_path / "run"
    assert math.isfinite(run(agent_file, *given, "--total-steps", "128", "--run-dir", str(folder)))
    folder = folder / "ppo" if agent_file is rlhf else folder
    assert math.isfinite(run(agent_file, "--resume", str(folder), "--total-steps", "256"))


@pytest.mark.parametrize(
    ("stage", "half"),
    [
        ("supervised", ("--supervised-steps", "2")),
        ("reward", ("--reward-epochs", "1")),
        ("ppo", ("--total-steps", "64")),
    ],
)
def test_each_stage_goes_on_from_its_checkpoint(stage, half, finished, tmp_path):
    """Ended after half of it, then resumed: the same agent, bit for bit, as in one go."""
    folder = tmp_path / "half"
    stages = ("--stage", stage, "--earlier", str(finished), "--run-dir", str(folder))
    run(rlhf, *SORT, "--ensemble", "2", "--no-anneal", *stages, *half)
    before = agent(folder / stage)
    run(rlhf, "--resume", str(folder / stage), "--total-steps", "128")
    after, whole = agent(folder / stage), agent(finished / stage)
    assert all(torch.equal(after[name], whole[name]) for name in whole)
    assert not all(torch.equal(after[name], before[name]) for name in whole)


@pytest.fixture(scope="module")
def by_rule(tmp_path_factory):
    """The agent that the defaults learn from the rule's rewards."""
    folder = tmp_path_factory.mktemp("rule")
    run(rlhf, *SORT, "--reward", "rule", "--run-dir", str(folder))
    return agent(folder / "ppo")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--no-critic",),
        ("--ptx", "0.5", "--other", "0.5"),
        ("--normalize-advantages",),
        ("--kl", "k3", "--kl-in", "loss"),
    ],
)
def test_variants_run(arguments, by_rule, tmp_path):
    """... and learn something else than the defaults."""
    run(rlhf, *SORT, "--reward", "rule", *arguments, "--run-dir", str(tmp_path))
    assert not torch.equal(agent(tmp_path / "ppo")["params"], by_rule["params"])


def test_it_learns_count(tmp_path):
    """Twenty batches of the rule's rewards bring the policy a quarter of the way to the optimum."""
    small = ("--layers", "1", "--dim", "16", "--heads", "2", "--batch-size", "128", "--no-progress")
    count = ("--env", "Count", "--reward", "rule", "--total-steps", "2560", "--learning-rate", "1e-2")
    assert run(rlhf, *count, *small, "--run-dir", str(tmp_path / "r")) < 0.75


def test_learning_rates_rise_at_first_and_fall_over_the_ppo_stage(tmp_path, monkeypatch):
    """As Adam is given them: up over 20 supervised steps, and linearly down over 4 batches of 8 steps."""
    calls = recorded(monkeypatch, "adam")
    run(rlhf, *SORT, "--reward", "rule", "--supervised-steps", "22", "--run-dir", str(tmp_path))
    rise = [3e-3 * (step + 1) / 20 for step in range(20)] + [3e-3] * 2
    fall = [1e-3 * (1 - batch / 4) for batch in range(4) for _ in range(8)]
    assert [float(learning_rate) for *_, learning_rate in calls] == pytest.approx(rise + fall)


def test_a_reward_model_scores_better_answers_higher(tmp_path):
    """Of labels nearly without noise: pairs of new responses, as the rule orders them."""
    learn = ("--reward-learning-rate", "1e-2", "--reward-epochs", "8", "--comparisons", "1000")
    small = ("--digits", "2", "--dim", "16", "--layers", "1", "--answers", "4", "--temperature", "1e-3")
    for stage in ("supervised", "reward"):
        run(rlhf, *SORT, *learn, *small, "--stage", stage, "--run-dir", str(tmp_path))
    task = Sort(2)
    _, model = network(task, 1, dim=16, layers=1)
    prompt = task.prompts(2000, generator()).repeat_interleave(2, 0)
    response = torch.randint(10, (4000, 2), generator=generator(1))
    rule = task.reward(prompt, response).view(-1, 2).diff(dim=1)
    [member] = agent(tmp_path / "reward")["members"]
    score = reward_scores(model, member, prompt, response, task.mask(response)).view(-1, 2).diff(dim=1)
    assert score[rule > 0].mean() > 0.1 and score[rule < 0].mean() < -0.1


def test_reward_models_start_from_the_reference_and_are_measured_on_held_out_prompts(
    finished, tmp_path, monkeypatch
):
    drawn, draw = [], rlhf.draw_rankings

    def record(*given, **named):
        drawn.append(draw(*given, **named))
        return drawn[-1]

    monkeypatch.setattr(rlhf, "draw_rankings", record)
    calls = recorded(monkeypatch, "adam")
    stages = ("--stage", "reward", "--earlier", str(finished), "--run-dir", str(tmp_path))
    run(rlhf, *SORT, "--ensemble", "2", *stages)
    task, (learned, measured) = Sort(3), [prompt for prompt, _ in drawn]
    assert task.is_held_out(measured).all() and not task.is_held_out(learned).any()
    head, ref = 8 + 1, agent(finished / "supervised")["params"]
    for member in calls[0][0]:
        assert torch.equal(member[:-head], ref[: -head * task.vocab])


def test_policy_and_critic_start_from_the_reference(finished, tmp_path, monkeypatch):
    """And V is 0 at first."""
    calls = recorded_updates(monkeypatch, rlhf)
    stages = ("--stage", "ppo", "--reward", "rule", "--earlier", str(finished), "--run-dir", str(tmp_path))
    run(rlhf, *SORT, *stages)
    head, ref = 8 + 1, agent(finished / "supervised")["params"]
    start = torch.cat((ref, ref[: -head * Sort(3).vocab], torch.zeros(head)))
    assert torch.equal(calls[0][0], start)


def test_beta_is_in_units_of_what_is_paid():
    """A reward model has learned the rule's rewards over the labeller's temperature."""
    assert Args(beta=0.3, temperature=0.2).rule_kl_coef == pytest.approx(0.06)
    assert Args(beta=0.3, temperature=0.2, reward="rule").rule_kl_coef == 0.3
    assert dpo.Args(beta=0.3, temperature=0.2).kl_coef == pytest.approx(0.06)


def test_a_ptx_of_next_to_nothing_changes_next_to_nothing(finished, tmp_path):
    """In the first step, whose batch is the same."""
    once = ("--total-steps", "32", "--num-epochs", "1", "--num-minibatches", "1", "--reward", "rule")
    after = []
    for ptx in ("0", "1e-7"):
        stages = ("--stage", "ppo", "--earlier", str(finished), "--run-dir", str(tmp_path / ptx))
        run(rlhf, *SORT, *once, "--ptx", ptx, *stages)
        after.append(agent(tmp_path / ptx / "ppo")["params"])
    torch.testing.assert_close(*after, rtol=0, atol=1e-4)


def test_reward_models_that_start_alike_part(finished, tmp_path, monkeypatch):
    """Two models of one and the same head become two, for each learns from batches of its own."""
    make_network = rlhf.make_network

    def alike(*arguments):
        torch.manual_seed(0)
        return make_network(*arguments)

    monkeypatch.setattr(rlhf, "make_network", alike)
    calls = recorded(monkeypatch, "adam")
    stages = ("--stage", "reward", "--earlier", str(finished), "--run-dir", str(tmp_path))
    run(rlhf, *SORT, "--ensemble", "2", *stages)
    assert torch.equal(*calls[0][0])
    assert not torch.equal(*agent(tmp_path / "reward")["members"])


def test_a_response_is_paid_the_reward_models_mean_less_a_constant(finished, tmp_path, monkeypatch):
    """Without KL and with lambda 1 a return is the score; however high the models score, 0 on average."""
    earlier = tmp_path / "earlier"
    shutil.copytree(finished, earlier)
    saved = torch.load(earlier / "reward" / "agent.pt", weights_only=True)
    saved["state"]["members"][:, -1] += 5  # the bias of the head
    torch.save(saved, earlier / "reward" / "agent.pt")
    calls = recorded_updates(monkeypatch, rlhf)
    once = ("--batch-size", "256", "--total-steps", "256", "--num-epochs", "1", "--num-minibatches", "1")
    stages = ("--stage", "ppo", "--earlier", str(earlier), "--run-dir", str(tmp_path / "run"))
    run(rlhf, *SORT, *once, "--ensemble", "2", "--beta", "0", "--gae-lambda", "1", *stages)
    [(_, _, batch, _, _)] = calls
    _, model = network(Sort(3), 1, dim=8)
    scores = [
        reward_scores(model, member, batch.prompt, batch.response, batch.mask)
        for member in saved["state"]["members"]
    ]
    paid = batch.return_[:, 0]
    shift = torch.stack(scores).mean(0) - paid
    torch.testing.assert_close(shift, shift.mean().expand(256), rtol=0, atol=1e-4)
    assert paid.mean().abs() < 1 and not torch.allclose(scores[0], scores[1], atol=1e-2)


def test_a_clipped_score_is_paid_within_its_bounds(finished, tmp_path, monkeypatch):
    """Without KL and with lambda 1 a return is the score."""
    once = ("--batch-size", "256", "--total-steps", "256", "--num-epochs", "1", "--num-minibatches", "1")
    paid = []
    for clip in ((), ("--score-clip", "0.01")):
        stages = ("--stage", "ppo", "--earlier", str(finished), "--run-dir", str(tmp_path / str(len(clip))))
        with monkeypatch.context() as patch:
            calls = recorded_updates(patch, rlhf)
            given = ("--ensemble", "2", "--beta", "0", "--gae-lambda", "1", *clip)
            run(rlhf, *SORT, *once, *given, *stages)
        paid.append(calls[0][2].return_[:, 0])
    torch.testing.assert_close(paid[1], paid[0].clamp(-0.01, 0.01), rtol=0, atol=1e-6)
    assert (paid[0].abs() > 0.01).any()


def until_end(response, end):
    """(B, L) True up to a response's first end token, found one by one."""
    lengths = [[*row, end].index(end) + 1 for row in response.tolist()]
    return torch.tensor([[t < n for t in range(response.shape[1])] for n in lengths])


@pytest.fixture(scope="module")
def on_add(tmp_path_factory):
    """The stages before PPO's on Add, of which a response may end early; and the masks of all responses that
    its reward models scored."""
    folder = tmp_path_factory.mktemp("add") / "run"
    with pytest.MonkeyPatch.context() as patch:
        scored = recorded(patch, "reward_scores")
        for stage in ("supervised", "reward"):
            run(rlhf, *ADD, "--stage", stage, "--run-dir", str(folder))
    return folder, scored


def test_a_reward_model_reads_a_response_where_it_ends(on_add):
    masks = [(mask, until_end(response, Add(2).end)) for _, _, _, response, mask in on_add[1]]
    assert len(masks) > 4 and all(torch.equal(*both) for both in masks)
    assert not all(mask.all() for mask, _ in masks)


@pytest.mark.parametrize(
    "arguments", [(), ("--normalize-advantages",), ("--no-critic",), ("--kl-in", "loss")]
)
def test_a_batch_follows_from_its_prompts_and_responses(arguments, on_add, tmp_path, monkeypatch):
    """Mask, log-probabilities, advantages and returns of the second batch, by which the policy has left the
    reference and the critic 0, token by token; and the step that is taken on it.
    """
    task, (folder, _) = Add(2), on_add
    calls = recorded_updates(monkeypatch, rlhf)
    stages = ("--stage", "ppo", "--reward", "rule", "--earlier", str(folder), "--run-dir", str(tmp_path))
    settings = dict(beta=0.5, gamma=0.97, gae_lambda=0.9, learning_rate=3e-2, clip=0.01)
    flags = [word for name, value in settings.items() for word in (rlhf.flag(name), str(value))]
    once = ("--total-steps", "96", "--num-epochs", "1", "--num-minibatches", "1", "--no-anneal")
    run(rlhf, *ADD, *stages, *flags, *once, *arguments)
    (_, policy), (_, critic) = network(task, dim=8), network(task, 1, dim=8)
    params, opt, batch, _, learning_rate = calls[1]
    ref = agent(folder / "supervised")["params"]
    whole = torch.cat((batch.prompt, batch.response), 1)
    places = slice(task.prompt_length - 1, -1)  # the token before each of a response
    mask = until_end(batch.response, task.end)
    assert torch.equal(batch.mask, mask) and not mask.all()

    def outputs(params):
        """Log-probabilities and values (B, L)."""
        log_p = policy(params[: len(ref)], whole)[0][:, places].log_softmax(-1)
        value = critic(params[len(ref) :], whole)[0][:, places, 0]
        return log_p.gather(-1, batch.response[..., None])[..., 0], value

    log_prob, value = outputs(params)
    ref_log_prob = outputs(torch.cat((ref, params[len(ref) :])))[0]
    for found, expected in ((batch.log_prob, log_prob), (batch.ref_log_prob, ref_log_prob)):
        torch.testing.assert_close(found * mask, expected * mask, rtol=1e-4, atol=1e-4)
    score = task.reward(batch.prompt, batch.response)
    place = "loss" if "--kl-in" in arguments else "reward"
    reward = -0.5 * (log_prob - ref_log_prob) * (place == "reward")  # or it would be charged twice
    advantage, critics = torch.zeros_like(reward), "--no-critic" not in arguments
    for row, length in enumerate(mask.sum(-1).tolist()):
        reward[row, length - 1] += score[row]
        running = 0.0
        for t in reversed(range(length)):
            after = value[row, t + 1] if critics and t + 1 < length else 0.0
            delta = reward[row, t] + 0.97 * after - (value[row, t] if critics else 0.0)
            running = delta + 0.97 * (0.9 if critics else 1.0) * running
            advantage[row, t] = running
    if critics:
        return_ = advantage + value
        assert value[mask].abs().mean() > 0.02 and (log_prob - ref_log_prob)[mask].abs().mean() > 0.02
        torch.testing.assert_close(batch.return_[mask], return_[mask], rtol=1e-3, atol=1e-3)
    else:
        advantage = advantage - advantage.sum(0) / len(mask)
    if "--normalize-advantages" in arguments:
        of = advantage[mask]
        advantage = (advantage - of.mean()) / of.std(correction=0)
    torch.testing.assert_close(batch.advantage, advantage * mask, rtol=1e-3, atol=1e-3)

    def loss(params):
        log_prob, value = outputs(params)
        args = SimpleNamespace(critic=critics, value_coef=0.5, kl_in=place, kl="k1", kl_coef=0.5, clip=0.01)
        return rlhf.rlhf_loss(log_prob, value, batch, args)[0]

    step = rlhf.adam(params, rlhf.clip_grad(grad(loss)(params), 1.0)[0], opt, learning_rate)
    torch.testing.assert_close(step[0], calls[2][0], rtol=0, atol=1e-4)


def test_normalized_by_hand():
    mask = torch.tensor([[True, True], [True, False]])
    found = rlhf.normalized(torch.tensor([[1.0, 5.0], [3.0, 100.0]]), mask)  # mean 3, variance 8/3
    torch.testing.assert_close(found, torch.tensor([[-2.0, 2.0], [0.0, 0.0]]) / math.sqrt(8 / 3))


@pytest.mark.parametrize("other", ["0.5", "0"])
def test_ptx_keeps_what_demonstrations_show(other, tmp_path):
    """With --other, held-out answers of the other task become far likelier than without ptx; else the
    task's own.
    """
    task = Sort(3)
    _, policy = network(task, dim=8)
    prompt = task.prompts(500, generator(), held_out=True)
    prompt = task.other(prompt) if other != "0" else prompt
    loss = {}
    for ptx in ("0", "1"):
        learn = ("--total-steps", "256", "--learning-rate", "2e-2", "--other", other, "--ptx", ptx)
        run(rlhf, *SORT, "--reward", "rule", *learn, "--run-dir", str(tmp_path / ptx))
        params = agent(tmp_path / ptx / "ppo")["params"]
        loss[ptx] = -log_probs(policy, params, prompt, task.answer(prompt)).mean()
    assert loss["1"] < 0.7 * loss["0"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--stage", "ppo", "--reward", "rule", "--run-dir", "none"),
            "--stage ppo.*supervised has not been run",
        ),
        (("--stage", "reward", "--earlier", "nowhere"), "--stage reward.*supervised has not been run"),
        (("--env", "Sorted"), "--env Sorted.*nearest: Sort"),
        (("--digits", "0"), r"--digits.*\[1, 17\].*empty response"),
        (("--beta", "-1"), "--beta.*at least 0"),
        (("--answers", "1"), "--answers.*at least 2"),
        (("--num-minibatches", "3"), "--num-minibatches 3.*--batch-size 32"),
        (("--heads", "3"), "--heads 3.*--dim 8"),
        (("--num-envs", "4"), "--num-envs 4.*--batch-size"),
        (("--env", "Count", "--other", "0.5"), "--other 0.5.*Sort"),
        (("--temperature", "0"), "--temperature.*greater than 0"),
        (("--total-steps", "10"), "--total-steps 10.*batch"),
        (("--supervised-batch-size", "0"), "--supervised-batch-size must be at least 1, not 0"),
        (("--value-coef", "-1"), "--value-coef must be at least 0 and finite, not -1"),
        (("--stage", "ppo", "--earlier", ""), "--earlier is empty; a folder is meant"),
    ],
)
def test_bad_input_is_refused(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words):
        run(rlhf, "--env", "Sort", *TINY, *arguments)
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".pt"]


def test_bad_input_is_told_in_one_line():
    status, told = run_script("rlhf", "--env", "Sort", "--stage", "ppo", "--earlier", "nowhere")
    assert status == 2 and told.count("\n") == 1, told
    assert "the stage supervised has not been run" in told


def test_a_stage_of_another_task_or_network_is_refused(finished, tmp_path):
    stages = ("--stage", "ppo", "--reward", "rule", "--earlier", str(finished), "--run-dir", str(tmp_path))
    with pytest.raises(UsageError, match="is of --env Sort, not Add"):
        run(rlhf, *SORT, *stages, "--env", "Add")
    with pytest.raises(UsageError, match=r"--digits 4.*run with 3"):
        run(rlhf, *SORT, *stages, "--digits", "4")
    # what a reward model was taught is in units of its labeller's temperature
    paid = ("--stage", "ppo", "--ensemble", "2", "--earlier", str(finished), "--run-dir", str(tmp_path))
    with pytest.raises(UsageError, match=r"--temperature 0.5.*reward was run with 0.1"):
        run(rlhf, *SORT, *paid, "--temperature", "0.5")


def test_a_resumed_stage_keeps_what_pays_it(finished):
    with pytest.raises(UsageError, match=r"--reward rule: .* made with model"):
        run(rlhf, "--resume", str(finished / "ppo"), "--reward", "rule")
    with pytest.raises(UsageError, match=r"holds no checkpoint.pt; the newest of those within: .*/ppo"):
        run(rlhf, "--resume", str(finished))


def test_comparisons_of_ties_only_are_refused():
    """A policy that is sure of its answer writes the same response twice."""
    task = Count()
    params, policy = network(task, reference_scale=1e6)
    args = SimpleNamespace(answers=2, temperature=1.0, label_error=0.0)
    with pytest.raises(UsageError, match="ties only"):
        rlhf.draw_rankings(policy, params, task, args, 50, generator())
    params, policy = network(task)
    prompt, response = rlhf.draw_rankings(policy, params, task, args, 50, generator())
    assert prompt.shape == (50, 2) and response.shape == (50, 2, 4)


def test_rankings_put_the_labellers_choice_first():
    """With hardly any noise the order is the rule's."""
    task = Count()
    params, policy = network(task)
    args = SimpleNamespace(answers=3, temperature=1e-4, label_error=0.0)
    prompt, response = rlhf.draw_rankings(policy, params, task, args, 200, generator())
    reward = task.reward(prompt.repeat_interleave(3, 0), response.flatten(0, 1)).view(200, 3)
    assert (reward.diff(dim=1) <= 0).all() and (reward.diff(dim=1) < 0).any()
    args.label_error = 1.0  # and turned round
    prompt, response = rlhf.draw_rankings(policy, params, task, args, 200, generator())
    reward = task.reward(prompt.repeat_interleave(3, 0), response.flatten(0, 1)).view(200, 3)
    assert (reward.diff(dim=1) >= 0).all() and (reward.diff(dim=1) > 0).any()
