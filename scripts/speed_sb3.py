"""The other side of speed.py: one training run of Stable-Baselines3, timed. Prints one line of JSON.

Imports nothing of the zoo, so that it also runs in a virtual environment that holds only Stable-Baselines3
(and sb3-contrib for TRPO). Its settings are the library's defaults but for 8 environments: 8 x 256 steps make
PPO's and TRPO's batch the same 2048 transitions as with its one environment, and are faster; SAC keeps its
one. --tuned takes RL Zoo's settings for the task instead, of which only PPO's on CartPole-v1 are here.
TensorBoard is off, as by default, and nothing is normalised: both spare it work that the zoo's on-policy
agents do.
"""

import argparse
import json
import time
from typing import Any

import torch
from stable_baselines3 import A2C, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

NUM_ENVS, BATCH = 8, 2048
# hyperparams/ppo.yml of https://github.com/DLR-RM/rl-baselines3-zoo; learning rate and clip fall linearly
TUNED: dict[tuple[str, str], dict[str, Any]] = {
    ("ppo", "CartPole-v1"): {
        "n_steps": 32, "batch_size": 256, "n_epochs": 20, "gamma": 0.98, "gae_lambda": 0.8, "ent_coef": 0.0,
        "learning_rate": lambda remaining: 1e-3 * remaining, "clip_range": lambda remaining: 0.2 * remaining,
    }
}  # fmt: skip


class Clock(BaseCallback):
    """Notes the time when `warm_step` steps are done."""

    def __init__(self, warm_step: int):
        super().__init__()
        self.warm_step, self.seen = warm_step, (0, 0.0)

    def _on_step(self) -> bool:
        if not self.seen[0] and self.num_timesteps >= self.warm_step:
            self.seen = (self.num_timesteps, time.perf_counter())
        return True


def make_model(agent: str, env_id: str, seed: int, tuned: bool) -> BaseAlgorithm:
    """The peer of one of the zoo's agents. Raises KeyError for a tuned one that is not here."""
    if agent == "sac":  # one gradient step an environment step; with more environments it would take fewer
        return SAC("MlpPolicy", make_vec_env(env_id, n_envs=1, seed=seed), device="cpu", seed=seed)
    envs = make_vec_env(env_id, n_envs=NUM_ENVS, seed=seed)  # a DummyVecEnv of monitored environments
    if agent == "ppo":
        settings = TUNED[agent, env_id] if tuned else {"n_steps": BATCH // NUM_ENVS}
        return PPO("MlpPolicy", envs, **settings, device="cpu", seed=seed)
    if agent == "actor_critic":
        return A2C("MlpPolicy", envs, device="cpu", seed=seed)
    from sb3_contrib import TRPO

    return TRPO("MlpPolicy", envs, n_steps=BATCH // NUM_ENVS, device="cpu", seed=seed)


def main() -> None:
    """Train, evaluating as often as the zoo does: every --eval-every steps and at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agent", choices=["ppo", "actor_critic", "trpo", "sac"], required=True)
    parser.add_argument("--env", required=True)
    parser.add_argument("--seed", type=int, required=True)
    for name in ("--threads", "--steps", "--warm-step", "--eval-every", "--eval-episodes"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--tuned", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = make_model(args.agent, args.env, args.seed, args.tuned)
    eval_envs = make_vec_env(args.env, n_envs=1, seed=args.seed + 1000)
    clock = Clock(args.warm_step)
    evaluation = EvalCallback(
        eval_envs,
        eval_freq=args.eval_every // model.n_envs,
        n_eval_episodes=args.eval_episodes,
        verbose=0,
        warn=False,
    )
    model.learn(args.steps, callback=[clock, evaluation])
    if args.steps % args.eval_every >= BATCH:  # else the last evaluation has just been
        evaluate_policy(model, eval_envs, n_eval_episodes=args.eval_episodes)
    steps, start = clock.seen
    print(json.dumps({"steps": model.num_timesteps - steps, "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
