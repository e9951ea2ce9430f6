"""Five small tasks of one's own, of different kinds, each a class and a line that registers it.

    Integrator-v0  bring a mass to rest at 0     continuous, dense, ended by failure: leaving [-10, 10]
    Heating-v0     hold a room's temperature     continuous, dense, in kelvin and thousands, ended by time
    Wind-v0        stand upright in gusts        discrete, 1 a step, ended by failure: falling
    Maze-v0        find the way out              discrete, sparse: 1 at the exit, which ends it
    Target-v0      reach a point of the plane    continuous, sparse: 0.01 at the target, which ends it

    PYTHONPATH=scripts python zoo/ppo.py --env own_tasks:Wind-v0 --total-steps 100000

All end after some time as well, by Gymnasium's time limit. scripts/own_tasks_ppo.py measures PPO on them.
"""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete


class Integrator(gym.Env):
    """A mass under a force of at most 1; position and velocity are seen."""

    observation_space = Box(-np.inf, np.inf, (2,))
    action_space = Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 2)
        return self.state.astype(np.float32), {}

    def step(self, action):
        force = float(action[0])
        x, v = self.state
        self.state = np.array([x + 0.1 * v, v + 0.1 * force])
        reward = -(x**2) - v**2 - 0.1 * force**2
        return self.state.astype(np.float32), reward, bool(abs(self.state[0]) > 10), False, {}


class Heating(gym.Env):
    """A room in the cold; seen are its temperature, the wished for, and that outside, in kelvin."""

    observation_space = Box(200.0, 400.0, (3,))
    action_space = Box(0.0, 1.0, (1,))  # share of the heating's power

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        room, wish, outside = self.np_random.uniform((283, 290, 263), (293, 298, 283))
        self.state = np.array([room, wish, outside])
        return self.state.astype(np.float32), {}

    def step(self, action):
        power = float(action[0])
        room, wish, outside = self.state
        self.state[0] = room + 4.0 * power + 0.05 * (outside - room)
        reward = -1000.0 * abs(room - wish) - 500.0 * power
        return self.state.astype(np.float32), reward, False, False, {}


class Wind(gym.Env):
    """A stick on its foot in gusts, to be pushed left or right; angle and its speed are seen.

    It can be drawn, so that scripts/watch.py shows it.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012, Gymnasium has it so
    observation_space = Box(-np.inf, np.inf, (2,))
    action_space = Discrete(3)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-0.1, 0.1, 2)
        return self.state.astype(np.float32), {}

    def step(self, action):
        angle, speed = self.state
        push = 2.0 * (int(action) - 1) + 2.0 * self.np_random.standard_normal()
        self.state = np.array([angle + 0.05 * speed, speed + 0.05 * (4.0 * angle + push)])
        return self.state.astype(np.float32), 1.0, bool(abs(self.state[0]) > 0.5), False, {}

    def render(self):
        """A picture (128, 128, 3) of the stick."""
        picture = np.full((128, 128, 3), 255, np.uint8)
        for along in np.linspace(0, 96, 200):
            row, column = 120 - along * np.cos(self.state[0]), 64 + along * np.sin(self.state[0])
            picture[round(row) - 2 : round(row) + 2, round(column) - 2 : round(column) + 2] = (200, 60, 40)
        return picture


WALLS = """
..#....
..#.##.
.##..#.
....#..
.##.#.#
..#....
#...##.
"""


class Maze(gym.Env):
    """From the corner above on the left to that below on the right; row and column are seen."""

    observation_space = Box(0.0, 6.0, (2,))
    action_space = Discrete(4)
    free = np.array([[cell == "." for cell in row] for row in WALLS.split()])
    moves = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell = np.zeros(2, dtype=int)
        return self.cell.astype(np.float32), {}

    def step(self, action):
        to = np.clip(self.cell + self.moves[int(action)], 0, 6)
        self.cell = to if self.free[tuple(to)] else self.cell
        out = bool(self.cell.min() == 6)
        return self.cell.astype(np.float32), float(out), out, False, {}


class Target(gym.Env):
    """A point that steps up to 0.1 in both directions; it and the target are seen."""

    observation_space = Box(-1.0, 1.0, (4,))
    action_space = Box(-1.0, 1.0, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.target = self.np_random.uniform(-1, 1, (2, 2))
        return self._obs(), {}

    def step(self, action):
        self.place = np.clip(self.place + 0.1 * np.asarray(action), -1, 1)
        there = bool(np.abs(self.place - self.target).max() < 0.1)
        return self._obs(), 0.01 * there, there, False, {}

    def _obs(self):
        return np.concatenate((self.place, self.target)).astype(np.float32)


LENGTHS = dict(Integrator=200, Heating=100, Wind=500, Maze=100, Target=50)
for name, steps in LENGTHS.items():
    gym.register(f"{name}-v0", f"{__name__}:{name}", max_episode_steps=steps)
