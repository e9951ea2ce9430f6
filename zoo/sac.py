"""Soft Actor-Critic (Haarnoja et al. 2018, arXiv:1801.01290 and arXiv:1812.05905), one file.

Maximises sum_t E[ r_t + alpha H(pi(.|s_t)) ] off-policy: every transition goes into a replay buffer D, and
each environment step pays for one gradient step on a batch of it. Twin critics Q_1, Q_2; Q means min(Q_1,
Q_2) wherever one is asked for.

    a, log pi(a|s)   a = tanh(u), u = mean(s) + std(s) eps         reparametrised: eps ~ N(0, 1) from outside
                     log pi(a|s) = log N(u; mean, std) - sum log(1 - tanh(u)^2)
    V(s)             E_{a ~ pi}[ Q(s, a) - alpha log pi(a|s) ]     one sample of a

    critics          J_Q = sum_i E[ 1/2 (Q_i(s_t, a_t) - (r_t + gamma (1 - terminated_t) V(s_{t+1})))^2 ]
    actor            J_pi = E[ alpha log pi(a|s_t) - Q(s_t, a) ]
    temperature      J_alpha = E[ -alpha (log pi(a|s_t) + target entropy) ]     unless --alpha fixes it
    targets          psi' <- tau psi + (1 - tau) psi'       psi' a target's parameters, psi its network's

The second paper's form takes V(s_{t+1}) from the targets of the critics. --value-network is the first
paper's: V is a network of its own, with J_V = E[ 1/2 (V(s_t) - (Q(s_t, a) - alpha log pi(a|s_t)))^2 ], and
V(s_{t+1}) is its target's. An alpha belongs before every log pi; papers that leave it out scale the rewards
by 1/alpha instead.

    python zoo/sac.py --env HalfCheetah-v4 --threads 2
    python zoo/sac.py --env Pendulum-v1
    python zoo/sac.py --env Hopper-v4 --value-network --alpha 0.2
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.functional import softplus

from zoo.common.args import RunArgs, check_args, require
from zoo.common.cli import main
from zoo.common.device import compile_function, flatten, loader, setup
from zoo.common.envs import VectorEnv, make_envs
from zoo.common.evaluate import Evaluation, Policy
from zoo.common.optim import adam, new_adam
from zoo.common.replay import ReplayBuffer, Replayed
from zoo.common.run import Run
from zoo.common.seeding import env_seeds, generator_seed


@dataclass
class Args(RunArgs):
    kept: ClassVar = (*RunArgs.kept, "num_envs", "buffer_size", "hidden", "value_network", "alpha")

    num_envs: int = 4  # environments stepped together, N
    updates_per_step: float = 1.0  # gradient steps for each environment step (all environments counted)
    batch_size: int = 256  # transitions in a gradient step
    buffer_size: int = 1_000_000  # transitions kept, the last ones of all environments together
    random_steps: int = 5_000  # environment steps of uniformly random actions at the start, before any update
    random_hold: int = 1  # steps for which a random action is kept: a longer push gets further
    learning_rate: float = 3e-4  # Adam's, of the actor
    critic_learning_rate: float = 1e-3  # Adam's, of the critics, the value network and the temperature
    gamma: float = 0.99  # discount
    tau: float = 0.005  # how far the targets move towards their networks in a gradient step
    alpha: float | None = None  # fixed temperature; None: tuned to the target entropy, from 1
    target_entropy: float | None = None  # of a tuned temperature; None: minus the number of action dimensions
    value_network: bool = False  # the 2018 form, with a separate V and its target
    hidden: tuple[int, ...] = (256, 256)  # widths of the ReLU layers
    # float32 matrix products in bfloat16 on a CPU with AMX or AVX512-BF16, in TF32 on CUDA
    bf16: bool = False
    # environment steps between evaluations, made with the next report; 0: at the end only
    eval_every: int = 50_000
    report_every: int = 500  # environment steps between reports (rounded up to whole iterations)


# What differs by task; a flag wins over it. Everything else runs on the defaults above.
SETTINGS: dict[str, dict] = {
    "Pendulum-v1": dict(
        total_steps=20_000, num_envs=1, random_steps=500, learning_rate=1e-3, hidden=(64, 64),
        eval_every=5_000, eval_episodes=100,
    ),
    # at RL Zoo's gamma, 0.9999, never reaching the flag is worth 400 in entropy, the flag 100: the optimum is
    # to stay away
    "MountainCarContinuous-v0": dict(
        total_steps=50_000, random_hold=50, gamma=0.995, alpha=0.1, batch_size=512, tau=0.01,
        hidden=(64, 64), eval_every=10_000, eval_episodes=100,
    ),
}  # fmt: skip


# --- networks and distributions -----------------------------------------------------------------------------

LOG_2, HALF_LOG_2PI = 0.6931471805599453, 0.9189385332046727
# The bounds of the original code: std e^2 fills [-1, 1] after tanh, and e^-20 is no noise at all, so that
# neither limits what the temperature asks for. A floor as high as e^-5 would: once clamped there, log_std has
# no gradient to come back by.
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0


class SquashedGaussian(NamedTuple):
    """tanh of a diagonal Gaussian, a distribution over (-1, 1)^A; mean, log_std (B, A), both of the state."""

    mean: Tensor
    log_std: Tensor

    def sample(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (B, A) of standard normal noise (B, A), and their log-probabilities (B,).

        Differentiable, both of them.
        """
        u = self.mean + self.log_std.exp() * noise
        gaussian = -0.5 * noise**2 - self.log_std - HALF_LOG_2PI
        # log(1 - tanh(u)^2) without the cancellation, which is complete in float32 from |u| = 9 on
        squash = 2.0 * (LOG_2 - u - softplus(-2.0 * u))
        return u.tanh(), (gaussian - squash).sum(-1)

    def mode(self) -> Tensor:
        return self.mean.tanh()


def mlp(widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers of these widths with ReLU in between, torch's default initialisation."""
    layers = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """obs (B, D) -> the policy's distribution."""

    def __init__(self, envs: VectorEnv, hidden: tuple[int, ...]):
        super().__init__()
        self.net = mlp((envs.obs_dim, *hidden, 2 * envs.action_dim))

    def forward(self, obs: Tensor) -> SquashedGaussian:
        mean, log_std = self.net(obs).chunk(2, -1)
        return SquashedGaussian(mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX))


class TwinCritic(nn.Module):
    """obs (B, D), action (B, A) -> Q_1 and Q_2 (2, B): two networks in one batched product a layer."""

    def __init__(self, envs: VectorEnv, hidden: tuple[int, ...]):
        super().__init__()
        widths = (envs.obs_dim + envs.action_dim, *hidden, 1)
        # U(-1, 1) / sqrt(inputs), as nn.Linear
        self.weights = nn.ParameterList(
            [(2 * torch.rand(2, i, o) - 1) * i**-0.5 for i, o in pairwise(widths)]
        )
        self.biases = nn.ParameterList([(2 * torch.rand(2, 1, o) - 1) * i**-0.5 for i, o in pairwise(widths)])

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat((obs, action), -1).expand(2, -1, -1)
        for i in range(len(self.weights)):
            # not baddbmm: compiled, sum and ReLU are one pass
            x = torch.bmm(x.relu() if i else x, self.weights[i]) + self.biases[i]
        return x.squeeze(-1)


# --- estimators ---------------------------------------------------------------------------------------------


def soft_value(q: Tensor, log_prob: Tensor, alpha: Tensor) -> Tensor:
    """V (B,) from both critics' Q (2, B) of an action of the policy's and its log-probability (B,)."""
    return q.min(0).values - alpha * log_prob


def soft_target(reward: Tensor, terminated: Tensor, next_value: Tensor, gamma: float) -> Tensor:
    """What both critics learn (B,): a termination ends the future, a time limit does not."""
    return reward + gamma * ~terminated * next_value


def polyak(target: Tensor, params: Tensor, tau: float) -> Tensor:
    """The target's parameters moved by tau towards the network's."""
    return tau * params + (1 - tau) * target


# --- losses -------------------------------------------------------------------------------------------------


def critic_loss(q: Tensor, target: Tensor) -> Tensor:
    """J_Q, the sum of both critics'; q (2, B), target (B,)."""
    return 0.5 * ((q - target) ** 2).mean(-1).sum()


def soft_value_loss(value: Tensor, target: Tensor) -> Tensor:
    """J_V; value (B,), target (B,) the soft value of the critics."""
    return 0.5 * ((value - target) ** 2).mean()


def actor_loss(q: Tensor, log_prob: Tensor, alpha: Tensor) -> Tensor:
    """J_pi; q (2, B) and log_prob (B,) of the policy's own actions."""
    return -soft_value(q, log_prob, alpha).mean()


def alpha_loss(log_alpha: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """J_alpha; falls with alpha while the policy's entropy is above the target."""
    return -(log_alpha.exp() * (log_prob + target_entropy)).mean()


# --- the update ---------------------------------------------------------------------------------------------

# actor, critic, (value,) target and log_alpha, vectors; and NAME_opt of each but the target, Adam's moments.
# Any, because a dict has one type of values: what a name holds is known where the name is written.
Learner = dict[str, Any]


class Networks(NamedTuple):
    """The networks as pure functions of their parameters."""

    policy: Callable[[Tensor, Tensor], SquashedGaussian]  # params, obs
    q: Callable[[Tensor, Tensor, Tensor], Tensor]  # params, obs, action
    v: Callable[[Tensor, Tensor], Tensor]  # params, obs


def descend(learner: Learner, name: str, gradient: Tensor, learning_rate: Any) -> Learner:
    """The learner after a step of Adam on learner[name]; learning_rate is a number or a tensor ()."""
    params, opt = adam(learner[name], gradient, learner[f"{name}_opt"], learning_rate, eps=1e-8)
    return learner | {name: params, f"{name}_opt": opt}


def update(
    nets: Networks, args: Args, target_entropy: float, learner: Learner, batch: Replayed, noise: Tensor
) -> tuple[Learner, dict[str, Tensor]]:
    """A gradient step on everything, a pure function: learner, batch, noise (2, B, A) to learner, metrics."""
    alpha, metrics = learner["log_alpha"].exp(), {}
    if args.value_network:
        action, log_prob = nets.policy(learner["actor"], batch.obs).sample(noise[0])
        wanted = soft_value(nets.q(learner["critic"], batch.obs, action), log_prob, alpha)
        next_value = nets.v(learner["target"], batch.next_obs)
        v_loss = grad_and_value(lambda params: soft_value_loss(nets.v(params, batch.obs), wanted))
        gradient, metrics["vf_loss"] = v_loss(learner["value"])
        learner = descend(learner, "value", gradient, args.critic_learning_rate)
    else:
        action, log_prob = nets.policy(learner["actor"], batch.next_obs).sample(noise[0])
        next_value = soft_value(nets.q(learner["target"], batch.next_obs, action), log_prob, alpha)
    target = soft_target(batch.reward, batch.terminated, next_value, args.gamma)

    def q_loss(params):
        q = nets.q(params, batch.obs, batch.action)
        return critic_loss(q, target), q

    gradient, (metrics["qf_loss"], q) = grad_and_value(q_loss, has_aux=True)(learner["critic"])
    for i, each in enumerate(q, start=1):
        metrics |= {f"qf{i}_values": each.mean(), f"qf{i}_loss": ((each - target) ** 2).mean()}
    learner = descend(learner, "critic", gradient, args.critic_learning_rate)

    def pi_loss(params):
        action, log_prob = nets.policy(params, batch.obs).sample(noise[1])
        return actor_loss(nets.q(learner["critic"], batch.obs, action), log_prob, alpha), log_prob

    gradient, (metrics["actor_loss"], log_prob) = grad_and_value(pi_loss, has_aux=True)(learner["actor"])
    learner = descend(learner, "actor", gradient, args.learning_rate)
    if args.alpha is None:
        gradient, metrics["alpha_loss"] = grad_and_value(alpha_loss)(
            learner["log_alpha"], log_prob, target_entropy
        )
        learner = descend(learner, "log_alpha", gradient, args.critic_learning_rate)
    followed = learner["value" if args.value_network else "critic"]  # the network that has a target
    learner = learner | {"target": polyak(learner["target"], followed, args.tau)}
    return learner, metrics | {"alpha": alpha, "entropy": -log_prob.mean()}


# --- the run ------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """What a run goes on from: everything that training changes, by name."""

    learner: Learner
    buffer: ReplayBuffer
    generator: torch.Generator


def new_networks(actor: Actor, critic: TwinCritic, value: nn.Module, args: Args) -> tuple[Learner, Networks]:
    """The learner at the start of a run, and the modules as pure functions."""
    device = next(actor.parameters()).device
    (actor_params, actor_of), (critic_params, critic_of), (value_params, value_of) = map(
        flatten, (actor, critic, value)
    )
    log_alpha = torch.tensor(math.log(1.0 if args.alpha is None else args.alpha), device=device)
    learner: Learner = {"actor": actor_params, "critic": critic_params, "log_alpha": log_alpha}
    if args.value_network:
        learner["value"] = value_params
    learner |= {f"{name}_opt": new_adam(params) for name, params in learner.items()}
    learner["target"] = (value_params if args.value_network else critic_params).clone()
    return learner, Networks(
        policy=lambda params, obs: functional_call(actor, actor_of(params), (obs,)),
        q=lambda params, obs, action: functional_call(critic, critic_of(params), (obs, action)),
        v=lambda params, obs: functional_call(value, value_of(params), (obs,)).squeeze(-1),
    )


def batches(
    buffer: ReplayBuffer, count: int, size: int, generator: torch.Generator
) -> Iterator[tuple[Replayed, Tensor]]:
    """`count` batches of `size` transitions, gathered at once, each with noise for two actions a state."""
    if count:
        noise = torch.randn(
            count, 2, size, buffer.action.shape[-1], generator=generator, device=generator.device
        )
        columns = (column.split(size) for column in buffer.sample(count * size, generator))
        for *batch, each in zip(*columns, noise, strict=True):
            yield Replayed(*batch), each


def policy_at(net: Actor) -> Callable[[np.ndarray], SquashedGaussian]:
    """Observations (N, D) to the distribution of actions, by the parameters that are in `net`."""
    device = next(net.parameters()).device
    return lambda obs: net(torch.as_tensor(obs, dtype=torch.float32, device=device))


def acting(state: State) -> dict:
    """What acting needs, and nothing else: an agent.pt."""
    return {"params": state.learner["actor"]}


def make_policy(envs: VectorEnv, args: Args, agent: dict) -> Policy:
    """The deterministic policy of what an agent.pt holds: observations (N, D) to their squashed means."""
    net = Actor(envs, args.hidden).to(agent["params"].device).eval()
    loader(net)(agent["params"])
    policy = policy_at(net)
    return lambda obs: policy(obs).mode().cpu().numpy()


def check(args: Args) -> None:
    """Refuse arguments that cannot work together."""
    check_args(
        args,
        at_least_1=("batch_size", "random_hold", "report_every", "hidden"),
        fractions=("gamma", "tau"),
        positive=("updates_per_step", "learning_rate", "critic_learning_rate", "alpha"),
        at_least_0=("random_steps",),
        finite=("target_entropy",),
    )
    require(
        args.buffer_size >= args.num_envs,
        f"--buffer-size {args.buffer_size} is less than one step of the environments"
        f" (--num-envs {args.num_envs})",
    )
    require(
        args.alpha is None or args.target_entropy is None,
        "--target-entropy is what --alpha is tuned to: it does not go with a fixed --alpha",
    )
    require(
        args.random_steps < args.total_steps,
        f"--random-steps {args.random_steps} leaves none of --total-steps {args.total_steps} to learn in",
    )
    first, last = (int(args.updates_per_step * steps) for steps in (args.random_steps, args.total_steps))
    require(
        last > first,
        f"--updates-per-step {args.updates_per_step:g} makes no update in --total-steps {args.total_steps}",
    )


def check_bf16(args: Args, device: torch.device) -> None:
    """Set the precision of float32 matrix products; refuse one that the machine has no instructions for."""
    able = (
        device.type == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    )
    require(able or not args.bf16, "--bf16: this CPU has neither AMX nor AVX512-BF16; use --no-bf16")
    torch.set_float32_matmul_precision("medium" if args.bf16 else "highest")


def check_actions(envs: VectorEnv) -> None:
    """Refuse action spaces other than a bounded Box, which tanh fills."""
    others = "zoo/ppo.py, zoo/trpo.py, zoo/actor_critic.py, zoo/grpo.py or zoo/reinforce.py"
    require(
        not envs.discrete,
        f"--env {envs.env_id}: actions are discrete, and SAC acts in a bounded Box; use {others}",
    )
    bounded = bool(envs.bounded.all())
    require(
        bounded,
        f"--env {envs.env_id}: actions are unbounded, and SAC squashes them into finite bounds; use {others}",
    )


def train(args: Args) -> float:
    """Run SAC; the mean return of the final evaluation."""
    check(args)
    device = setup(args.device, args.threads)
    check_bf16(args, device)
    envs = make_envs(args.env, args.num_envs, threads=args.env_threads)
    check_actions(envs)
    torch.manual_seed(generator_seed(args.seed, "network"))
    actor, critic = Actor(envs, args.hidden).to(device), TwinCritic(envs, args.hidden).to(device)
    value = mlp((envs.obs_dim, *args.hidden, 1)).to(device)
    networks, nets = new_networks(actor, critic, value, args)
    target_entropy = -float(envs.action_dim) if args.target_entropy is None else args.target_entropy
    learn = compile_function(partial(update, nets, args, target_entropy), device, args.compile)
    policy, load = policy_at(actor), loader(actor)

    buffer = ReplayBuffer(
        args.buffer_size // args.num_envs, args.num_envs, envs.obs_dim, envs.action_dim, device
    )
    run = Run(args, "sac", Evaluation(args, make_policy), engine=envs.engine)
    generator = torch.Generator(device).manual_seed(generator_seed(args.seed, "noise"))
    state = run.restore(State(networks, buffer, generator))
    learner, buffer, generator = state
    buffer.cut()  # a resumed run begins new episodes
    load(learner["actor"])
    obs = envs.reset(env_seeds(args.seed, "environments", args.num_envs, run.step))
    held, step = 0, run.step

    while step < args.total_steps:
        episodes: list[tuple[float, int]] = []
        metrics: dict[str, Tensor] = {}
        updates = 0
        while step < min(run.step + args.report_every, args.total_steps):
            if step < args.random_steps:
                if held % args.random_hold == 0:
                    action = (
                        2 * torch.rand(args.num_envs, envs.action_dim, generator=generator, device=device) - 1
                    )
                held += 1
            else:
                noise = torch.randn(args.num_envs, envs.action_dim, generator=generator, device=device)
                action = policy(obs).sample(noise)[0]
            result = envs.step(action.cpu().numpy())
            buffer.add(obs, action, result)
            obs, step = result.obs, step + args.num_envs
            episodes += result.episodes
            if step <= args.random_steps:
                continue
            due = int(args.updates_per_step * step) - int(args.updates_per_step * (step - args.num_envs))
            for batch, noise in batches(buffer, due, args.batch_size, generator):
                learner, info = learn(learner, batch, noise)
                metrics = {name: value + metrics.get(name, 0) for name, value in info.items()}
                updates += 1
            load(learner["actor"])
        state = State(learner, buffer, generator)
        run.report(
            step, state, acting(state), {name: value / updates for name, value in metrics.items()}, episodes
        )
    envs.close()
    return run.finish(state, acting(state))


if __name__ == "__main__":
    main(Args, train, lambda env: SETTINGS.get(env, {}))
