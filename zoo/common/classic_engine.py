"""Gymnasium's classic control tasks, all N copies stepped at once in NumPy: `ClassicVectorEnv`.

A step of one of these tasks is a few dozen floating-point operations, and Gymnasium's loop spends its time
between them. Here a step of N copies is the same operations on rows of N numbers.
Environment steps a second on one core of a busy machine, medians of alternating runs, through
`VectorEnv.step`:

    task and copies                   this engine   the loop    ratio
    CartPole-v1, 8                       107k         24k        4.4
    CartPole-v1, 64                      644k         32k         20
    Pendulum-v1, 8                        90k         18k        5.0
    Pendulum-v1, 64                      462k         28k         17
    MountainCar-v0, 8                    104k         31k        3.4
    MountainCarContinuous-v0, 8           69k         27k        2.5
    Acrobot-v1, 8                         24k          9k        2.5

Source: gymnasium/envs/classic_control/*.py, rewritten for rows; parameters are read from the environment
object, so that those given to gym.make hold. Whole seeded trajectories, resets included, equal Gymnasium's to
the bit (tests/test_classic_engine.py replays both), for which the order and the types of its operations are
kept: where Gymnasium squares a scalar by `x**2`, which is C's pow, not x * x in one of 1,200 numbers,
`squared` does; where its state is float32, so is this one.

What is not served (subclasses, users' wrappers, rendering, changed physics) goes to Gymnasium's own loop.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding

from zoo.common.vector_env import VectorEnv, class_name, is_plain, time_limit_of


def squared(x: np.ndarray) -> np.ndarray:
    """x**2 as Gymnasium's scalars have it, see above."""
    return np.array([number**2 for number in x], x.dtype)


def step_cartpole(env: Any, state: np.ndarray, action: np.ndarray, first: np.ndarray):
    """CartPole: position and velocity of the cart, angle and angular velocity of the pole.

    This and its like change the state in place.
    """
    x, x_dot, theta, theta_dot = state
    force = np.where(action == 1, env.force_mag, -env.force_mag)
    cos, sin = np.cos(theta), np.sin(theta)
    temp = (force + env.polemass_length * np.square(theta_dot) * sin) / env.total_mass
    inertia = env.length * (4.0 / 3.0 - env.masspole * np.square(cos) / env.total_mass)
    theta_acc = (env.gravity * sin - cos * temp) / inertia
    x_acc = temp - env.polemass_length * theta_acc * cos / env.total_mass
    x += env.tau * x_dot
    x_dot += env.tau * x_acc
    theta += env.tau * theta_dot
    theta_dot += env.tau * theta_acc
    terminated = (np.abs(x) > env.x_threshold) | (np.abs(theta) > env.theta_threshold_radians)
    return np.where(terminated, -1.0, 0.0) if env._sutton_barto_reward else np.ones(len(x)), terminated


def step_mountain_car(env: Any, state: np.ndarray, action: np.ndarray, first: np.ndarray):
    """MountainCar: position and velocity."""
    position, velocity = state
    # the C library's, NumPy's may differ in the last bit
    pull = np.array([math.cos(angle) for angle in (3 * position).tolist()])
    velocity += (action - 1) * env.force + pull * -env.gravity
    np.clip(velocity, -env.max_speed, env.max_speed, out=velocity)
    position += velocity
    np.clip(position, env.min_position, env.max_position, out=position)
    velocity[(position == env.min_position) & (velocity < 0)] = 0
    return np.full(len(action), -1.0), (position >= env.goal_position) & (velocity >= env.goal_velocity)


def step_continuous_mountain_car(env: Any, state: np.ndarray, action: np.ndarray, first: np.ndarray):
    """MountainCarContinuous: position and velocity, float64 as it starts, float32 from the first step on."""
    force, cost = action[:, 0], np.square(action[:, 0].astype(np.float64)) * 0.1
    moved, terminated = drive(env, state.astype(np.float32), force)
    if np.count_nonzero(first):
        moved[:, first], terminated[first] = drive(env, state[:, first], force[first])
    state[:] = moved
    return np.where(terminated, 100.0, 0.0) - cost, terminated


def drive(env: Any, state: np.ndarray, force: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The state (2, N) after a step, in its type and its place, and whether the car has arrived (N,)."""
    position, velocity = state
    pull = np.array([0.0025 * math.cos(angle) for angle in (3 * position).tolist()])
    velocity += force * env.power - pull.astype(np.float32)
    np.clip(velocity, -env.max_speed, env.max_speed, out=velocity)
    position += velocity
    np.clip(position, env.min_position, env.max_position, out=position)
    velocity[(position == env.min_position) & (velocity < 0)] = 0
    return state, (position >= env.goal_position) & (velocity >= env.goal_velocity)


def step_pendulum(env: Any, state: np.ndarray, action: np.ndarray, first: np.ndarray):
    """Pendulum: angle and angular velocity; the torque is float32, and so is its cost."""
    theta, speed = state
    torque = np.clip(action[:, 0], -env.max_torque, env.max_torque)
    angle = ((theta + np.pi) % (2 * np.pi)) - np.pi
    cost = squared(angle) + 0.1 * squared(speed) + 0.001 * squared(torque)
    speed += (3 * env.g / (2 * env.l) * np.sin(theta) + 3.0 / (env.m * env.l**2) * torque) * env.dt
    np.clip(speed, -env.max_speed, env.max_speed, out=speed)
    theta += speed * env.dt
    return -cost, np.zeros(len(cost), bool)


def step_acrobot(env: Any, state: np.ndarray, action: np.ndarray, first: np.ndarray):
    """Acrobot: two angles and their velocities, one step of the classical Runge-Kutta method."""
    torque = np.array(env.AVAIL_TORQUE)[action]
    h = env.dt
    k1 = acrobot_derivative(env, state, torque)
    k2 = acrobot_derivative(env, state + h / 2.0 * k1, torque)
    k3 = acrobot_derivative(env, state + h / 2.0 * k2, torque)
    k4 = acrobot_derivative(env, state + h * k3, torque)
    state += h / 6.0 * (k1 + 2 * k2 + 2 * k3 + k4)
    angles = state[:2]
    while (over := angles > np.pi).any():
        angles[over] -= 2 * np.pi
    while (under := angles < -np.pi).any():
        angles[under] += 2 * np.pi
    np.clip(state[2], -env.MAX_VEL_1, env.MAX_VEL_1, out=state[2])
    np.clip(state[3], -env.MAX_VEL_2, env.MAX_VEL_2, out=state[3])
    terminated = -np.cos(state[0]) - np.cos(state[1] + state[0]) > 1.0
    return np.where(terminated, 0.0, -1.0), terminated


def acrobot_derivative(env: Any, state: np.ndarray, torque: np.ndarray) -> np.ndarray:
    """(4, N) time derivatives, as in Sutton and Barto's book."""
    m1, m2, l1, lc1, lc2 = (
        env.LINK_MASS_1,
        env.LINK_MASS_2,
        env.LINK_LENGTH_1,
        env.LINK_COM_POS_1,
        env.LINK_COM_POS_2,
    )
    moment, g, (theta1, theta2, dtheta1, dtheta2) = env.LINK_MOI, 9.8, state
    cos, sin = np.cos(theta2), np.sin(theta2)
    d1 = m1 * lc1**2 + m2 * (l1**2 + lc2**2 + 2 * l1 * lc2 * cos) + moment + moment
    d2 = m2 * (lc2**2 + l1 * lc2 * cos) + moment
    phi2 = m2 * lc2 * g * np.cos(theta1 + theta2 - np.pi / 2.0)
    phi1 = (
        -m2 * l1 * lc2 * squared(dtheta2) * sin
        - 2 * m2 * l1 * lc2 * dtheta2 * dtheta1 * sin
        + (m1 * lc1 + m2 * l1) * g * np.cos(theta1 - np.pi / 2)
        + phi2
    )
    ddtheta2 = (torque + d2 / d1 * phi1 - m2 * l1 * lc2 * squared(dtheta1) * sin - phi2) / (
        m2 * lc2**2 + moment - squared(d2) / d1
    )
    ddtheta1 = -(d2 * ddtheta2 + phi1) / d1
    return np.stack((dtheta1, dtheta2, ddtheta1, ddtheta2))


def start_uniform(low: float, high: float, dtype: type = np.float64) -> Callable:
    """Four variables drawn uniformly (CartPole, Acrobot)."""
    return lambda env, rng: rng.uniform(low, high, size=4).astype(dtype)


def start_car(env: Any, rng: np.random.Generator) -> tuple[float, float]:
    """The mountain cars stand still."""
    return rng.uniform(-0.6, -0.4), 0.0


def start_pendulum(env: Any, rng: np.random.Generator) -> np.ndarray:
    """Any angle, a slow turn."""
    high = np.array([np.pi, 1.0])
    return rng.uniform(-high, high)


def observe_state(state: np.ndarray) -> np.ndarray:
    """The state itself, (N, D)."""
    return state.T.astype(np.float32, order="C")


def observe_pendulum(state: np.ndarray) -> np.ndarray:
    """(N, 3)"""
    return np.stack((np.cos(state[0]), np.sin(state[0]), state[1]), axis=1).astype(np.float32)


def observe_acrobot(state: np.ndarray) -> np.ndarray:
    """(N, 6)"""
    cos, sin = np.cos(state[:2]), np.sin(state[:2])
    return np.stack((cos[0], sin[0], cos[1], sin[1], state[2], state[3]), axis=1).astype(np.float32)


class Task(NamedTuple):
    """What the engine needs of a Gymnasium class beside its parameters. A state is (S, N)."""

    start: Callable  # (env, rng) -> the S variables at a start
    step: Callable  # (env, state, action, first step of an episode?) -> reward (N,), terminated (N,)
    observe: Callable  # state -> (N, D) float32
    size: int  # S
    as_it_is: Mapping[str, Any] = MappingProxyType({})  # values of parameters that it takes for granted
    start_dtype: type = np.float64  # of the state that a reset's observation is computed from


TASKS = {
    "cartpole.CartPoleEnv": Task(
        start_uniform(-0.05, 0.05), step_cartpole, observe_state, 4, {"kinematics_integrator": "euler"}
    ),
    "acrobot.AcrobotEnv": Task(
        start_uniform(-0.1, 0.1, np.float32), step_acrobot, observe_acrobot, 4,
        {"book_or_nips": "book", "torque_noise_max": 0.0}, np.float32,
    ),
    "mountain_car.MountainCarEnv": Task(start_car, step_mountain_car, observe_state, 2),
    "continuous_mountain_car.Continuous_MountainCarEnv": Task(
        start_car, step_continuous_mountain_car, observe_state, 2
    ),
    "pendulum.PendulumEnv": Task(start_pendulum, step_pendulum, observe_pendulum, 2),
}  # fmt: skip
CLASSES = {f"gymnasium.envs.classic_control.{name}": task for name, task in TASKS.items()}


def serves(single: gym.Env) -> bool:
    """Whether the engine steps copies of `single`, from gym.make, exactly as Gymnasium would."""
    env: Any = single.unwrapped
    task = CLASSES.get(class_name(env))
    if task is None or not is_plain(single) or env.render_mode is not None:
        return False
    return all(getattr(env, name) == value for name, value in task.as_it_is.items())


class ClassicVectorEnv(VectorEnv):
    """N copies of a task that `serves` accepts."""

    engine = "classic"

    def __init__(self, env_id: str, num_envs: int, single: Any, dtype: Any = None):
        super().__init__(env_id, num_envs, single, dtype)
        self.env: Any = single.unwrapped
        self.task = CLASSES[class_name(self.env)]
        self.time_limit = time_limit_of(single)
        self.state = np.zeros((self.task.size, num_envs))
        self.generators = [np.random.default_rng() for _ in range(num_envs)]
        self.elapsed = np.zeros(num_envs, dtype=np.int64)

    def _restart(self, index, seeds):
        if seeds is not None:
            self.generators = [seeding.np_random(int(seed))[0] for seed in seeds]
        for i in index:
            self.state[:, i] = self.task.start(self.env, self.generators[i])
        self.elapsed[index] = 0
        return self.task.observe(self.state[:, index].astype(self.task.start_dtype))

    def _advance(self, action):
        if not self.discrete:
            action = action.astype(np.float32)  # as the action space has it
        reward, terminated = self.task.step(self.env, self.state, action, self.elapsed == 0)
        self.elapsed += 1
        return self.task.observe(self.state), reward, terminated, self.elapsed >= self.time_limit

    def close(self):
        self.env.close()
