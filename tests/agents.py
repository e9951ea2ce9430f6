"""Trained agents for tests of what is done with them: tiny runs that learnt next to nothing."""

import dataclasses

from zoo import ppo, sac
from zoo.common.device import flatten
from zoo.common.envs import make_envs
from zoo.common.files import save_checkpoint
from zoo.common.normalize import new_stats
from zoo.common.state import portable

COMMON = dict(compile=False, env_threads=1, progress=False, eval_episodes=1)


def train_ppo(folder, env="CartPole-v1", **given):
    """A run of PPO in `folder`, which it returns."""
    sizes = dict(num_envs=4, num_steps=32, num_epochs=1, total_steps=256, minibatch_size=64)
    ppo.train(ppo.Args(env=env, run_dir=str(folder), **{**COMMON, **sizes, **given}))
    return folder


def train_sac(folder, env="Pendulum-v1"):
    """The same of SAC."""
    sizes = dict(num_envs=4, total_steps=200, random_steps=100, batch_size=8, hidden=(8, 8))
    sac.train(sac.Args(env=env, run_dir=str(folder), **COMMON, **sizes))
    return folder


def untrained(folder, env, gain=1.0, mean=0.0):
    """A folder with the agent.pt of a PPO that has not begun, for tasks in which nothing ends.

    gain: by which its parameters are multiplied, for actions that differ. mean: of the observations.
    """
    args, envs = ppo.Args(env=env), make_envs(env, 1)
    params, _ = flatten(ppo.ActorCritic(envs, args.hidden, args.log_std, args.shared_network))
    stats = new_stats(envs.obs_dim)
    stats |= {"mean": stats["mean"] + mean, "var": stats["var"] * 0.25, "count": stats["count"] + 5}
    state = portable({"params": gain * params.detach(), "obs_stats": stats}, "acting")
    folder.mkdir(parents=True)
    content = {"agent": "ppo", "env": env, "args": portable(dataclasses.asdict(args), "args"), "state": state}
    save_checkpoint(folder / "agent.pt", content)
    return folder
