"""What `train` of every agent hands on of its seed and of the machine."""

import json

import pytest
import torch

from zoo import (
    actor_critic,
    ddpo,
    diffusion_dpo,
    dpo,
    dppo,
    grpo,
    grpo_tokens,
    ppo,
    preferences,
    reinforce,
    rlhf,
    sac,
    trpo,
)  # fmt: skip

AGENTS = [actor_critic, ppo, reinforce, sac, trpo]
TINY = {
    actor_critic: dict(num_steps=2, report_every=1),
    ppo: dict(num_steps=2, minibatch_size=2, num_epochs=1),
    reinforce: dict(report_every=1),
    sac: dict(random_steps=2, batch_size=2, report_every=1),
    trpo: dict(num_steps=2, minibatch_size=2, critic_epochs=1, fvp_subsample=1),
    dppo: dict(num_steps=2, minibatch_size=2, num_epochs=1, denoising_steps=2, clone_steps=0),
    grpo: dict(group_size=2, minibatch_size=2, num_epochs=1),
    preferences: dict(
        num_steps=2,
        minibatch_size=2,
        num_epochs=1,
        labels=2,
        clip_length=1,
        pool=2,
        first=1,
        ask_every=1,
        reward_hidden=(4,),
        reward_passes=1,
        reward_batch=2,
        members=2,
    ),
}
COMMON = dict(num_envs=2, hidden=(4,), total_steps=4, eval_episodes=1, device="cpu", progress=False)


@pytest.mark.parametrize("agent", AGENTS)
def test_every_stream_of_an_agents_run_is_its_seeds_and_its_own(agent, tmp_path, monkeypatch):
    """Else runs of ten seeds would share their networks, their noise or their starts."""
    asked = []
    for name in ("generator_seed", "env_seeds"):
        function = getattr(agent, name)

        def noted(*given, function=function):
            asked.append(given)
            return function(*given)

        monkeypatch.setattr(agent, name, noted)
    args = agent.Args(
        env="probe/ActBox-v0", seed=7, run_dir=str(tmp_path), compile=False, **COMMON | TINY[agent]
    )
    agent.train(args)
    starts = [(7, "environments", 2, step) for step in (0, 2)]
    expected = [(7, "network"), (7, "noise"), *(starts if agent is reinforce else starts[:1])]
    assert asked == expected
    asked.clear()
    agent.train(agent.Args(**vars(args) | dict(run_dir=None, resume=str(tmp_path), total_steps=6)))
    assert asked == [(7, "network"), (7, "noise"), (7, "environments", 2, 4)]


TOKENS = dict(
    dim=8, heads=2, layers=1, digits=3, batch_size=32, supervised_batch_size=32, supervised_steps=2,
    total_steps=64, eval_episodes=32,
)  # fmt: skip
CHAINS = dict(hidden=(4,), steps=2, pretrain_steps=2, pretrain_batch=8, total_steps=64)
TINY_TOO = {
    ddpo: CHAINS | dict(num_chains=32, minibatch_size=32),
    diffusion_dpo: CHAINS | dict(num_pairs=32, batch_size=32, draws=1),
    dpo: TOKENS | dict(comparisons=32),
    grpo_tokens: TOKENS,
    rlhf: TOKENS | dict(comparisons=32, reward_epochs=1),
}


@pytest.mark.parametrize("agent", [*TINY, *TINY_TOO])
def test_every_stream_of_a_run_is_of_its_seed(agent, tmp_path, monkeypatch):
    asked = []
    for name in ("generator_seed", "env_seeds"):
        if function := getattr(agent, name, None):
            monkeypatch.setattr(
                agent, name, lambda *given, function=function: asked.append(given) or function(*given)
            )
    env = dict(env="probe/EndlessBox-v0") | COMMON | TINY[agent] if agent in TINY else TINY_TOO[agent]
    agent.train(agent.Args(**dict(seed=7, run_dir=str(tmp_path), compile=False, progress=False) | env))
    assert {seed for seed, *_ in asked} == {7} and len(asked) > 1


@pytest.mark.parametrize("agent", TINY)
def test_what_a_run_is_told_of_the_machine_reaches_what_it_is_for(agent, tmp_path, monkeypatch):
    set_up, made, closed, compiled, make_envs = [], [], [], set(), agent.make_envs

    def make(*given, **named):
        envs = make_envs(*given, **named)
        made.append(named)
        monkeypatch.setattr(envs, "close", lambda: closed.append(envs))
        return envs

    def compile_function(function, device, enabled):
        compiled.add(enabled)
        return function

    monkeypatch.setattr(agent, "setup", lambda *given: set_up.append(given) or torch.device("cpu"))
    monkeypatch.setattr(agent, "make_envs", make)
    monkeypatch.setattr(agent, "compile_function", compile_function)
    folder = tmp_path / "run"
    given = COMMON | TINY[agent] | dict(env="probe/EndlessBox-v0", threads=2, env_threads=3)
    agent.train(agent.Args(run_dir=str(folder), **given))
    assert set_up == [("cpu", 2)] and made == [dict(threads=3)] and len(closed) == 1 and compiled == {True}
    assert json.loads((folder / "args.json").read_text())["engine"] == "gymnasium"
