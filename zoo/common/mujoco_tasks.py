"""Observations, rewards and terminations of Gymnasium's MuJoCo tasks, for N environments at once in NumPy.

Source: gymnasium/envs/mujoco/*_v4.py and *_v5.py, rewritten for rows; parameters are read from the
environment object, so that those given to gym.make hold. Results equal Gymnasium's to the bit, but for the
last bit of the rewards of Reacher and InvertedDoublePendulum: NumPy rounds a norm or a square of many rows
otherwise than that of one vector.

In every function `env` is the unwrapped Gymnasium environment, read for its parameters and its model only;
`v5` tells its version; `sim` holds MjData's fields, one row an environment: sim.qpos (N, nq), sim.qvel (N,
nv), sim.xpos (N, nbody, 3) ... After a step MuJoCo leaves derived fields (xpos, site_xpos, cinert, ...) at
the start, or a stage, of the last substep, behind qpos; Gymnasium reads them so, and so do these functions.
The action is float32, and so are the costs computed from it.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np


def normal_velocity(env: Any, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Initial (qpos, qvel): uniform noise on positions, Gaussian on velocities.

    HalfCheetah, Ant, InvertedDoublePendulum.
    """
    scale = getattr(env, "_reset_noise_scale", 0.1)  # v4 of the double pendulum has the number in its code
    qpos = env.init_qpos + rng.uniform(low=-scale, high=scale, size=env.model.nq)
    return qpos, env.init_qvel + scale * rng.standard_normal(env.model.nv)


def uniform_velocity(env: Any, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Initial (qpos, qvel): uniform noise on both (Hopper, Walker2d, Swimmer, InvertedPendulum)."""
    scale = getattr(env, "_reset_noise_scale", 0.01)  # v4 of the pendulum has the number in its code
    qpos = env.init_qpos + rng.uniform(low=-scale, high=scale, size=env.model.nq)
    return qpos, env.init_qvel + rng.uniform(low=-scale, high=scale, size=env.model.nv)


def reacher_start(env: Any, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Initial (qpos, qvel) of Reacher: an arm almost straight, a goal drawn from the disc of radius 0.2."""
    qpos = rng.uniform(low=-0.1, high=0.1, size=env.model.nq) + env.init_qpos
    goal = np.full(2, np.inf)
    while not np.linalg.norm(goal) < 0.2:
        goal = rng.uniform(low=-0.2, high=0.2, size=2)
    qpos[-2:] = goal
    qvel = env.init_qvel + rng.uniform(low=-0.005, high=0.005, size=env.model.nv)
    qvel[-2:] = 0
    return qpos, qvel


def positions(env: Any, sim: SimpleNamespace, skipped: int) -> np.ndarray:
    """Positions in the observation (N, ...): all but the first `skipped`, which parameters may let in."""
    return sim.qpos[:, skipped if getattr(env, "_exclude_current_positions_from_observation", False) else 0 :]


def observer(skipped: int, clip: float | None = None) -> Callable:
    """Observation (N, D) of the simpler tasks: positions and clipped velocities."""

    def observe(env: Any, v5: bool, sim: SimpleNamespace) -> np.ndarray:
        velocities = sim.qvel if clip is None else np.clip(sim.qvel, -clip, clip)
        return np.concatenate((positions(env, sim, skipped), velocities), axis=1)

    return observe


def observe_ant(env: Any, v5: bool, sim: SimpleNamespace) -> np.ndarray:
    """(N, 27) without contact forces, the default of v4; (N, 111) with them, (N, 105) in v5, which drops the
    world's."""
    parts = [positions(env, sim, 2), sim.qvel]
    if env._include_cfrc_ext_in_observation if v5 else env._use_contact_forces:
        parts.append(
            np.clip(sim.cfrc_ext, *env._contact_force_range)[:, int(v5) :].reshape(len(sim.qvel), -1)
        )
    return np.concatenate(parts, axis=1)


def observe_humanoid(env: Any, v5: bool, sim: SimpleNamespace) -> np.ndarray:
    """(N, 348), v4 (N, 376): v5 drops the world's rows and the root's six forces, and lets parts out."""
    world = int(v5)
    parts = {"cinert": sim.cinert[:, world:], "cvel": sim.cvel[:, world:]}
    parts |= {"qfrc_actuator": sim.qfrc_actuator[:, 6 * world :], "cfrc_ext": sim.cfrc_ext[:, world:]}
    kept = [
        part.reshape(len(part), -1)
        for name, part in parts.items()
        if getattr(env, f"_include_{name}_in_observation", True)
    ]
    return np.concatenate((positions(env, sim, 2), sim.qvel, *kept), axis=1)


def observe_reacher(env: Any, v5: bool, sim: SimpleNamespace) -> np.ndarray:
    """(N, 11) or (N, 10): v5 drops the always zero height difference of fingertip and target."""
    theta, offset = sim.qpos[:, :2], reach(env, sim)
    parts = (np.cos(theta), np.sin(theta), sim.qpos[:, 2:], sim.qvel[:, :2], offset[:, :2] if v5 else offset)
    return np.concatenate(parts, axis=1)


def observe_double_pendulum(env: Any, v5: bool, sim: SimpleNamespace) -> np.ndarray:
    """(N, 11) or (N, 9): v5 keeps the constraint force on the cart only."""
    force, angle = np.clip(sim.qfrc_constraint, -10, 10), sim.qpos[:, 1:]
    parts = (
        sim.qpos[:, :1],
        np.sin(angle),
        np.cos(angle),
        np.clip(sim.qvel, -10, 10),
        force[:, :1] if v5 else force,
    )
    return np.concatenate(parts, axis=1)


def reach(env: Any, sim: SimpleNamespace) -> np.ndarray:
    """(N, 3) from Reacher's target to its fingertip."""
    return sim.xpos[:, env.model.body("fingertip").id] - sim.xpos[:, env.model.body("target").id]


def root_x(env: Any, sim: SimpleNamespace) -> np.ndarray:
    """(N,) the planar bodies' forward position."""
    return sim.qpos[:, 0]


def body_x(env: Any, sim: SimpleNamespace) -> np.ndarray:
    """(N,) the ant's forward position, of its body's frame: it lags behind qpos, see above."""
    return sim.xpos[:, env.model.body(getattr(env, "_main_body", "torso")).id, 0]


def mass_center_x(env: Any, sim: SimpleNamespace) -> np.ndarray:
    """(N,) the humanoid's forward position, of its centre of mass."""
    mass = env.model.body_mass
    return np.einsum("b,nb->n", mass, sim.xipos[:, :, 0]) / mass.sum()


def hopper_healthy(env: Any, sim: SimpleNamespace) -> np.ndarray:
    """(N,) bool."""
    state = np.concatenate((sim.qpos[:, 2:], sim.qvel), axis=1)
    low, high = env._healthy_state_range
    return walker_healthy(env, sim) & ((low < state) & (state < high)).all(axis=1)


def walker_healthy(env: Any, sim: SimpleNamespace) -> np.ndarray:
    """(N,) bool."""
    z, angle = sim.qpos[:, 1:3].T
    (low_z, high_z), (low, high) = env._healthy_z_range, env._healthy_angle_range
    return (low_z < z) & (z < high_z) & (low < angle) & (angle < high)


def ant_healthy(env: Any, sim: SimpleNamespace) -> np.ndarray:
    """(N,) bool."""
    finite, (low, high) = (
        np.isfinite(sim.qpos).all(axis=1) & np.isfinite(sim.qvel).all(axis=1),
        env._healthy_z_range,
    )
    return finite & (low <= sim.qpos[:, 2]) & (sim.qpos[:, 2] <= high)


def humanoid_healthy(env: Any, sim: SimpleNamespace) -> np.ndarray:
    """(N,) bool."""
    low, high = env._healthy_z_range
    return (low < sim.qpos[:, 2]) & (sim.qpos[:, 2] < high)


def contact_cost(env: Any, sim: SimpleNamespace) -> np.ndarray | float:
    """(N,) cost of forces from outside: Ant clips the forces, Humanoid-v5 the cost, the others have none."""
    if not getattr(env, "_use_contact_forces", hasattr(env, "_contact_cost_weight")):
        return 0.0
    forces = np.clip(sim.cfrc_ext, *getattr(env, "_contact_force_range", (-np.inf, np.inf)))
    cost = env._contact_cost_weight * np.square(forces).reshape(len(forces), -1).sum(axis=1)
    return np.clip(cost, *getattr(env, "_contact_cost_range", (-np.inf, np.inf)))


def judge_runner(track: Callable, healthy: Callable | None = None, double: bool = False) -> Callable:
    """Reward and termination of the runners: forward velocity, a wage while healthy, minus the costs.

    Where being unhealthy ends the episode, v4 still pays the wage for that last step, and v5 does not. The
    control's cost is computed from the float32 action, but from MuJoCo's float64 copy of it if `double`.
    """

    def judge(env: Any, v5: bool, sim: SimpleNamespace, before: np.ndarray, action: np.ndarray):
        # Ant-v4 has no weight
        gain = getattr(env, "_forward_reward_weight", 1.0) * ((track(env, sim) - before) / env.dt)
        cost = env._ctrl_cost_weight * np.square(sim.ctrl if double else action).sum(axis=1)
        if healthy is None:
            return gain - cost, np.zeros(len(action), bool)
        alive, ends = healthy(env, sim), env._terminate_when_unhealthy
        wage = (alive | (ends and not v5)) * env._healthy_reward
        return gain + wage - (cost + contact_cost(env, sim)), ~alive & ends

    return judge


def judge_reacher(env: Any, v5: bool, sim: SimpleNamespace, before: np.ndarray, action: np.ndarray):
    """Minus the distance to the target (v4: before the step) and the control's cost; never terminates."""
    distance = np.linalg.norm(reach(env, sim) if v5 else before, axis=1)
    weights = (env._reward_dist_weight, env._reward_control_weight) if v5 else (1, 1)
    return -distance * weights[0] - np.square(action).sum(axis=1) * weights[1], np.zeros(len(action), bool)


def judge_pendulum(env: Any, v5: bool, sim: SimpleNamespace, before: None, action: np.ndarray):
    """One a step (v5: 0 on the last) while the pole stays within 0.2 rad."""
    fallen = (
        ~np.isfinite(sim.qpos).all(axis=1)
        | ~np.isfinite(sim.qvel).all(axis=1)
        | (np.abs(sim.qpos[:, 1]) > 0.2)
    )
    return (~fallen).astype(np.float64) if v5 else np.ones(len(action)), fallen


def judge_double_pendulum(env: Any, v5: bool, sim: SimpleNamespace, before: None, action: np.ndarray):
    """A wage (v5: 0 on the last step) minus penalties on the tip's place and the joints' speed."""
    x, y, speed = sim.site_xpos[:, 0, 0], sim.site_xpos[:, 0, 2], sim.qvel
    fallen = y <= 1
    penalty = 0.01 * x**2 + (y - 2) ** 2
    wage = env._healthy_reward * ~fallen if v5 else 10.0
    return wage - penalty - (1e-3 * speed[:, 1] ** 2 + 5e-3 * speed[:, 2] ** 2), fallen


class Task(NamedTuple):
    """What the engine needs of a Gymnasium class beside its model and its parameters."""

    start: Callable  # (env, rng) -> initial (qpos, qvel)
    observe: Callable  # (env, v5, sim) -> (N, D)
    judge: Callable  # (env, v5, sim, before, action) -> reward (N,), terminated (N,)
    track: Callable | None = None  # (env, sim) -> what `judge` wants to know of the state before the step
    derived: tuple[str, ...] = ()  # MjData's fields that the functions read beside qpos and qvel


TASKS = {
    "half_cheetah": Task(normal_velocity, observer(1), judge_runner(root_x), root_x),
    "swimmer": Task(uniform_velocity, observer(2), judge_runner(root_x), root_x),
    "hopper": Task(uniform_velocity, observer(1, clip=10), judge_runner(root_x, hopper_healthy), root_x),
    "walker2d": Task(uniform_velocity, observer(1, clip=10), judge_runner(root_x, walker_healthy), root_x),
    "ant": Task(
        normal_velocity, observe_ant, judge_runner(body_x, ant_healthy), body_x, ("xpos", "cfrc_ext")
    ),
    "humanoid": Task(
        uniform_velocity,
        observe_humanoid,
        judge_runner(mass_center_x, humanoid_healthy, double=True),
        mass_center_x,
        ("xipos", "cinert", "cvel", "qfrc_actuator", "cfrc_ext"),
    ),
    "reacher": Task(reacher_start, observe_reacher, judge_reacher, reach, ("xpos",)),
    "inverted_pendulum": Task(uniform_velocity, observer(0), judge_pendulum),
    "inverted_double_pendulum": Task(
        normal_velocity,
        observe_double_pendulum,
        judge_double_pendulum,
        None,
        ("site_xpos", "qfrc_constraint"),
    ),
}
CLASSES = {  # Gymnasium's own classes, by name so that a version without one of them loses nothing else
    f"gymnasium.envs.mujoco.{name}_v{version}.{name.title().replace('_', '').replace('2D', '2d')}Env": (
        task,
        version == 5,
    )
    for name, task in TASKS.items()
    for version in (4, 5)
}
