"""DPO on tokens: the loss by hand, its gradient's weight, rounds, variants, the command line."""

from types import SimpleNamespace

import pytest
import torch
from command import recorded_updates, rows, run, run_script
from torch.func import grad
from torch.nn.functional import logsigmoid

from zoo import dpo
from zoo.common.errors import UsageError
from zoo.common.tokens import Add, Sort


def tables():
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 6, generator=g).unbind()


def test_loss_by_hand():
    chosen, rejected, ref_chosen, ref_rejected = tables()
    found, metrics = dpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.3, 0.0)
    difference = 0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    torch.testing.assert_close(found, -logsigmoid(difference).mean())
    torch.testing.assert_close(metrics["accuracy"], (difference > 0).float().mean())
    torch.testing.assert_close(metrics["chosen_reward"] - metrics["rejected_reward"], difference.mean())
    smoothed = dpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.3, 0.2)[0]
    torch.testing.assert_close(
        smoothed, (-0.8 * logsigmoid(difference) - 0.2 * logsigmoid(-difference)).mean()
    )


def test_the_gradient_and_its_weight():
    """S0 (34): -beta sigmoid(R_l - R_w) for the chosen log-probability, the opposite for the rejected."""
    chosen, rejected, ref_chosen, ref_rejected = tables()
    loss = lambda c, r: dpo.dpo_loss(c, r, ref_chosen, ref_rejected, 0.3, 0.0)[0]  # noqa: E731
    up, down = grad(loss, argnums=(0, 1))(chosen, rejected)
    weight = (-0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected))).sigmoid()
    torch.testing.assert_close(up, -0.3 * weight / 6)
    torch.testing.assert_close(down, 0.3 * weight / 6)
    metrics = dpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.3, 0.0)[1]
    torch.testing.assert_close(metrics["gradient_weight"], weight.mean())


def test_what_is_constant_over_a_prompts_responses_cancels():
    """As log Z does."""
    chosen, rejected, ref_chosen, ref_rejected = tables()
    shifted = dpo.dpo_loss(chosen, rejected, ref_chosen + 5, ref_rejected + 5, 0.3, 0.0)[0]
    torch.testing.assert_close(shifted, dpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.3, 0.0)[0])


def test_sequence_log_prob_counts_the_response_only():
    log_prob = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -50.0, -60.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert dpo.sequence_log_prob(log_prob, mask, mean=False).tolist() == [-6.0, -4.0]
    assert dpo.sequence_log_prob(log_prob, mask, mean=True).tolist() == [-2.0, -4.0]


# --- runs ---------------------------------------------------------------------------------------------------

TINY = (
    "--dim", "8", "--heads", "2", "--batch-size", "32", "--eval-episodes", "64", "--no-progress",
    "--digits", "3", "--supervised-steps", "4", "--comparisons", "128", "--total-steps", "256", "--no-anneal",
)  # fmt: skip


def policy(folder):
    return torch.load(folder / "agent.pt", weights_only=True)["state"]["params"]


def test_a_run_lowers_its_loss_and_repeats_itself(tmp_path):
    more = ("--total-steps", "2048", "--learning-rate", "1e-2")
    for name in ("one", "two"):
        run(dpo, *TINY, *more, "--run-dir", str(tmp_path / name))
    run(dpo, *TINY, *more, "--seed", "2", "--run-dir", str(tmp_path / "other"))
    one, two, other = (rows(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two != other
    assert float(one[-1]["dpo_loss"]) < 0.9 * float(one[0]["dpo_loss"])
    assert float(one[0]["dpo_loss"]) == pytest.approx(0.6931, abs=1e-3)  # log 2: the policy is the reference
    assert one[-1]["eval_exact"] and one[-1]["eval_kl"] and one[-1]["chosen_log_prob"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of two rounds, of 128 visits each, in one go."""
    folder = tmp_path_factory.mktemp("whole")
    run(dpo, *TINY, "--online", "2", "--run-dir", str(folder))
    return folder


@pytest.mark.parametrize("half", ["64", "128", "192"])
def test_a_resumed_run_ends_where_one_in_one_go_does(half, whole, tmp_path):
    """Stopped within the first round, between the two, within the second."""
    assert len({row["round"] for row in rows(whole)}) == 2
    with pytest.raises(KeyboardInterrupt):
        stopped_at(int(half), *TINY, "--online", "2", "--run-dir", str(tmp_path))
    run(dpo, "--resume", str(tmp_path))
    assert torch.equal(policy(tmp_path), policy(whole))


def test_later_rounds_are_written_by_the_policy_of_then(whole, tmp_path):
    """In the one round of the offline method by the reference."""
    run(dpo, *TINY, "--online", "1", "--run-dir", str(tmp_path))
    for folder in (whole, tmp_path):
        state = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]
        first, last = state["writers"][0], state["writers"][-1]
        assert torch.equal(first, state["ref"])
        assert torch.equal(last, state["ref"]) == (folder == tmp_path)
        assert not torch.equal(last, state["params"])


def test_a_run_that_is_made_longer_keeps_the_rounds_it_has_begun(whole, tmp_path):
    """And the policies that wrote them: no pair is labelled again."""

    def writers(folder):
        return torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["writers"]

    run(dpo, *TINY, "--online", "2", "--run-dir", str(tmp_path))
    before = writers(tmp_path)
    run(dpo, "--resume", str(tmp_path), "--total-steps", "768")
    assert torch.equal(writers(tmp_path), before) and not torch.equal(*before)
    assert [row["round"] for row in rows(tmp_path)] == ["0"] * 4 + ["1"] * 20
    # one that is short of its second round when it is made longer begins it later
    other = tmp_path / "other"
    with pytest.raises(KeyboardInterrupt):
        stopped_at(96, *TINY, "--online", "2", "--run-dir", str(other))
    run(dpo, "--resume", str(other), "--total-steps", "512")
    assert [row["round"] for row in rows(other)] == ["0"] * 8 + ["1"] * 8


def test_a_sequence_ends_with_its_end_token(tmp_path, monkeypatch):
    """On Add the log-probability of a response is the sum up to it."""
    calls = recorded_updates(monkeypatch, dpo)
    run(dpo, *TINY, "--env", "Add", "--digits", "2", "--total-steps", "32", "--run-dir", str(tmp_path))
    [(ref, _, batch, _)] = calls
    task, settings = Add(2), SimpleNamespace(dim=8, layers=2, heads=2, reference_scale=1.0)
    _, policy = dpo.make_network(task, settings, task.vocab, torch.device("cpu"))
    lengths = []
    for response, found in ((batch.chosen, batch.ref_chosen), (batch.rejected, batch.ref_rejected)):
        log_prob = dpo.log_probs(policy, ref, batch.prompt, response)
        ends = [[*row, task.end].index(task.end) + 1 for row in response.tolist()]
        expected = torch.stack([row[:end].sum() for row, end in zip(log_prob, ends, strict=True)])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        lengths += ends
    assert len(set(lengths)) > 2


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    """The arguments of every update of a run of two rounds, of 64 pairs and 8 updates each."""
    with pytest.MonkeyPatch.context() as patch:
        calls = recorded_updates(patch, dpo)
        many = ("--online", "2", "--total-steps", "512", "--learning-rate", "1e-2")
        run(dpo, *TINY, *many, "--run-dir", str(tmp_path_factory.mktemp("updates")))
    return calls


def test_a_later_round_learns_from_the_pairs_of_all_rounds(updates):
    """Half of the pairs of the second round's batches are the first's, and most of the first's were seen."""

    def pairs(some):
        batches = [torch.cat((b.prompt, b.chosen, b.rejected), 1) for _, _, b, _ in some]
        return list(map(tuple, torch.cat(batches).tolist()))

    first, second = pairs(updates[:8]), pairs(updates[8:])
    assert len(first) == len(second) == 256 and 50 < len(set(first)) <= 64
    assert 0.3 < sum(pair in set(first) for pair in second) / 256 < 0.7


def test_rewards_are_held_to_the_reference_in_every_round(updates):
    """That a run starts from, not to the policy that wrote a round's pairs."""
    task = Sort(3)
    torch.manual_seed(0)
    settings = SimpleNamespace(dim=8, layers=2, heads=2, reference_scale=1.0)
    _, policy = dpo.make_network(task, settings, task.vocab, torch.device("cpu"))
    ref, writer = updates[0][0], updates[8][0]
    for _, _, batch, _ in updates:
        for response, found in ((batch.chosen, batch.ref_chosen), (batch.rejected, batch.ref_rejected)):
            log_prob = dpo.log_probs(policy, ref, batch.prompt, response).sum(-1)
            torch.testing.assert_close(found, log_prob, rtol=0, atol=1e-4)
            written = dpo.log_probs(policy, writer, batch.prompt, response).sum(-1)
            assert not torch.allclose(found, written, rtol=0, atol=1e-2)


def test_it_learns_count(tmp_path):
    """10,000 comparisons, each seen about once, bring the policy a sixth of the way to the optimum."""
    small = ("--layers", "1", "--heads", "2", "--comparisons", "10000", "--total-steps", "10000")
    count = ("--env", "Count", "--learning-rate", "8e-3", "--beta", "1", "--no-progress")
    assert run(dpo, *count, *small, "--run-dir", str(tmp_path / "r")) < 0.85


def stopped_at(step, *arguments):
    """A run that is interrupted, and saves, when it reports `step`."""
    report = dpo.Run.report

    def interrupted(self, now, state, *rest):
        if now == step:
            self._saved_at = -1e9  # a checkpoint is due
        report(self, now, state, *rest)
        if now == step:
            self.close()
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo.Run, "report", interrupted)
        run(dpo, *arguments)


# for responses of different lengths
ADD = (*TINY, "--env", "Add", "--digits", "2")


@pytest.fixture(scope="module")
def by_default(tmp_path_factory):
    """The parameters that the defaults learn."""
    folder = tmp_path_factory.mktemp("default")
    run(dpo, *ADD, "--run-dir", str(folder))
    return policy(folder)


def test_the_loss_is_handed_what_was_asked_for(tmp_path, monkeypatch):
    """beta and the smoothing; the reference's log-probabilities a token, or none."""
    calls, loss = [], dpo.dpo_loss

    def record(chosen, rejected, *rest):
        calls.append(rest)
        return loss(chosen, rejected, *rest)

    monkeypatch.setattr(dpo, "dpo_loss", record)
    found = {}
    for name in ("none", "length-norm", "reference-free"):
        more = () if name == "none" else (f"--{name}",)
        smooth = ("--beta", "0.2", "--label-smoothing", "0.3", "--total-steps", "32")
        run(dpo, *TINY, *smooth, *more, "--run-dir", str(tmp_path / name))
        assert calls[-1][2:] == (0.2, 0.3)
        found[name] = calls[-1][0]
    torch.testing.assert_close(found["length-norm"], found["none"] / 3)  # Sort's answers of three digits
    assert (found["reference-free"] == 0).all() and (found["none"] < -1).all()


@pytest.mark.parametrize(
    "arguments", [("--length-norm",), ("--reference-free",), ("--label-smoothing", "0.3"), ("--online", "4")]
)
def test_variants_run(arguments, by_default, tmp_path):
    """... and learn something else than the defaults."""
    run(dpo, *ADD, *arguments, "--run-dir", str(tmp_path))
    assert not torch.equal(policy(tmp_path), by_default)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--beta", "0"), "--beta must be greater than 0, not 0"),
        (("--label-smoothing", "0.5"), "--label-smoothing.*0.5"),
        (("--online", "8"), "--comparisons 128.*--online"),
        (("--total-steps", "20"), "--total-steps 20.*batch of 32"),
        (("--heads", "3"), "--heads 3.*--dim 8"),
        (("--supervised-batch-size", "0"), "--supervised-batch-size must be at least 1, not 0"),
        (("--num-envs", "4"), "--num-envs 4.*--batch-size"),
        (("--env", "Hopper-v4"), "--env Hopper-v4.*Count, Sort, Add"),
    ],
)
def test_bad_input_is_refused(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words):
        run(dpo, *TINY, *arguments)
    assert not list(tmp_path.iterdir())


def test_bad_input_is_told_in_one_line():
    status, told = run_script("dpo", "--beta", "0")
    assert status == 2 and told.count("\n") == 1 and "--beta" in told
