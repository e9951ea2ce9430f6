"""Trained agents for tests of what is done with them: tiny runs that learnt next to nothing."""

from zoo import ppo, sac

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
