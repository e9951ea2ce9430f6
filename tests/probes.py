"""Environments that isolate one faculty each, follow a script, or misbehave; `register` names them probe/...

The first kind has answers known in advance, which a right agent reaches in seconds:

    probe/ConstantValue-v0     one step, observation 0, reward 1                      V = 1
    probe/ObservedReward-v0    one step, the reward is the observation, -1 or 1       V(o) = o
    probe/Discount-v0          two steps, observations 0 and 1, reward 1 at the end   V(0) = gamma, V(1) = 1
    probe/Act-v0               one step, action 1 pays 1, action 0 pays -1            a = 1
    probe/ActBox-v0            bounds [2, 6], the reward is -(a - 3)^2                a = 3
    probe/ActOnObs-v0          as Act, but the observation's sign says which pays     a = (o > 0)
    probe/ActOnObsBox-v0       bounds [2, 6], the reward is -(a - 4 - o)^2            a = 4 + o
    probe/Endless-v0           reward 1 for ever, cut by a time limit of 5 steps      V = 1 / (1 - gamma)
"""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

UNIT = Box(-1.0, 1.0, (1,), np.float32)
TWO_TO_SIX = Box(2.0, 6.0, (1,), np.float32)
F32 = np.finfo(np.float32).max


class Probe(gym.Env):
    """One observation in [-1, 1], a spare action, episodes of one step unless a subclass says otherwise."""

    observation_space = UNIT
    action_space = Discrete(2)
    obs = 0.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.see(), {}

    def see(self):
        return np.array([self.obs], np.float32)


class ConstantValue(Probe):
    def step(self, action):
        return self.see(), 1.0, True, False, {}


class RandomSign(Probe):
    """The observation is -1 or 1, each with probability 1/2."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = float(self.np_random.choice((-1.0, 1.0)))
        return self.see(), {}


class ObservedReward(RandomSign):
    def step(self, action):
        return self.see(), self.obs, True, False, {}


class Discount(Probe):
    def reset(self, *, seed=None, options=None):
        self.obs = 0.0
        return super().reset(seed=seed)

    def step(self, action):
        last = self.obs == 1.0
        self.obs = 1.0
        return self.see(), float(last), last, False, {}


class Act(Probe):
    def step(self, action):
        return self.see(), 1.0 if action == 1 else -1.0, True, False, {}


class ActBox(Probe):
    action_space = TWO_TO_SIX

    def step(self, action):
        return self.see(), -float((action[0] - 3.0) ** 2), True, False, {}


class ActOnObs(RandomSign):
    def step(self, action):
        return self.see(), 1.0 if action == (self.obs > 0) else -1.0, True, False, {}


class ActOnObsBox(RandomSign):
    action_space = TWO_TO_SIX

    def step(self, action):
        return self.see(), -float((action[0] - 4.0 - self.obs) ** 2), True, False, {}


class Endless(Probe):
    def step(self, action):
        return self.see(), 1.0, False, False, {}


class EndlessBox(Endless):
    action_space = TWO_TO_SIX


# Episodes of the scripted environment: the first observation, then for each step (reward, observation,
# ending). The episode's number is the observation's tens, so that no observation occurs twice. Copies seeded
# evenly start with the first episode, copies seeded oddly with the second.
SCRIPT = [
    (10.0, [(1.0, 11.0, ""), (2.0, 12.0, "terminated")]),
    (20.0, [(3.0, 21.0, "truncated")]),
    (30.0, [(4.0, 31.0, ""), (5.0, 32.0, ""), (6.0, 33.0, "truncated")]),
    (40.0, [(7.0, 41.0, "terminated")]),
    (50.0, [(8.0, 51.0, "both")]),
]


class Scripted(Probe):
    observation_space = Box(-np.inf, np.inf, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode = seed % 2 if seed is not None else self.episode + 1
        self.t, self.obs = 0, SCRIPT[self.episode % len(SCRIPT)][0]
        return self.see(), {}

    def step(self, action):
        reward, self.obs, ending = SCRIPT[self.episode % len(SCRIPT)][1][self.t]
        self.t += 1
        return self.see(), reward, ending in ("terminated", "both"), ending in ("truncated", "both"), {}


class Faulty(Probe):
    """Episodes of 3 steps; what `fault` names goes wrong at the `at`-th step (or reset) of its life."""

    def __init__(self, fault, at=40):
        self.fault, self.at, self.count, self.resets, self.t = fault, at, 0, 0, 0

    def reset(self, *, seed=None, options=None):
        self.t = 0
        self.resets += 1
        obs, info = super().reset(seed=seed)
        return obs * (np.nan if self.fault == "reset" and self.resets == self.at else 1.0), info

    def step(self, action):
        self.count += 1
        self.t += 1
        now = self.count == self.at
        if now and self.fault == "raise":
            raise ZeroDivisionError("the physics\nexploded")
        obs = self.see() * (np.nan if now and self.fault == "obs" else 1.0)
        reward = float("inf") if now and self.fault == "reward" else 1.0
        return obs, reward, self.t == 3, False, {}


class Space(Probe):
    """Any spaces; records its actions."""

    def __init__(self, observation_space=UNIT, action_space=None):
        self.observation_space, self.actions = observation_space, []
        self.action_space = Discrete(2) if action_space is None else action_space

    def see(self):
        return self.observation_space.sample()

    def step(self, action):
        self.actions.append(action)
        return self.see(), 0.0, False, False, {}


class OddReward(Probe):
    """Endless; its rewards and flags come in whatever form `reward` and `flag` have."""

    reward, flag = np.array([2.0]), np.array([False])

    def step(self, action):
        return self.see(), self.reward, self.flag, self.flag, {}


class Misfit(Probe):
    """Endless; `given` holds what its methods return instead of what is right."""

    observation_space = Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self):
        self.given = {}

    def see(self):
        return np.array([0.25, 0.5], np.float32)

    def reset(self, *, seed=None, options=None):
        return self.given.get("reset", (self.see(), {}))

    def step(self, action):
        return self.given.get("step", (self.see(), 1.0, False, False, {}))


class Far(RandomSign):
    """The observation is 1e8 or 1e8 + 1, which are one number in float32."""

    observation_space = Box(-np.inf, np.inf, (1,), np.float64)

    def see(self):
        return np.array([1e8 + (self.obs > 0)])

    def step(self, action):
        return self.see(), 1.0, True, False, {}


class Image(Probe):
    """Observations (2, 3, 4) of bytes: 0, 1, 2, ... in C order, plus the step's number."""

    observation_space = Box(0, 255, (2, 3, 4), np.uint8)

    def see(self):
        return (np.arange(24, dtype=np.uint8) + int(self.obs)).reshape(2, 3, 4)

    def step(self, action):
        self.obs += 1
        return self.see(), 0.0, False, False, {}


SPACES = {
    "DictObs": dict(observation_space=Dict({"a": UNIT, "b": UNIT})),
    "DiscreteObs": dict(observation_space=Discrete(3)),
    "EmptyObs": dict(observation_space=Box(-1.0, 1.0, (0,), np.float32)),
    "EmptyAction": dict(action_space=Box(-1.0, 1.0, (2, 0), np.float32)),
    "MultiDiscreteAction": dict(action_space=MultiDiscrete([2, 3])),
    "DictAction": dict(action_space=Dict({"a": Discrete(2)})),
    # the third is bounded below only, the fourth not at all
    "Bounds": dict(
        action_space=Box(np.array([-4, 0, 1, -np.inf], "f4"), np.array([4, 1, np.inf, np.inf], "f4"))
    ),
    "BoxInteger": dict(action_space=Box(-2, 2, (1,), np.int64)),
    "BoxTenths": dict(action_space=Box(0.5, 0.58, (1,), np.float64)),
    "BoxMatrix": dict(action_space=Box(-2.0, 2.0, (2, 3), np.float32)),
    # no bound, written as a large one: the fourth is bounded, and far from 0
    "BoxHuge": dict(
        action_space=Box(np.array([-1e6, 0, -F32, 1e6], "f4"), np.array([1e6, F32, F32, 1e6 + 2], "f4"))
    ),
    "BoxHugeInteger": dict(action_space=Box(-(2**31), 2**31 - 1, (1,), np.int32)),
    "BoxWide": dict(action_space=Box(-1e5, 1e5, (1,), np.float32)),
    "IntegerObs": dict(observation_space=Box(-(2**31), 2**31 - 1, (1,), np.int32)),
    "DiscreteStart": dict(action_space=Discrete(3, start=5)),
    "ScalarObs": dict(observation_space=Box(-1.0, 1.0, (), np.float32)),
}
SIMPLE = [
    ConstantValue,
    ObservedReward,
    Discount,
    Act,
    ActBox,
    ActOnObs,
    ActOnObsBox,
    Scripted,
    OddReward,
    Misfit,
    Far,
    Image,
]


def register():
    """Register the probes once."""
    if "probe/Endless-v0" in gym.registry:
        return
    for cls in SIMPLE:
        gym.register(f"probe/{cls.__name__}-v0", cls)
    gym.register("probe/Endless-v0", Endless, max_episode_steps=5)
    gym.register("probe/EndlessBox-v0", EndlessBox, max_episode_steps=5)
    for fault in ("obs", "reward", "raise", "reset"):
        gym.register(f"probe/Faulty-{fault}-v0", Faulty, kwargs=dict(fault=fault))
    for name, spaces in SPACES.items():
        gym.register(f"probe/{name}-v0", Space, kwargs=spaces)
