"""Every random stream of a run, one a purpose, all derived from the run's one seed.

Seeds that are near each other, or equal, must not meet: with `seed` for the networks as for the noise the
first exploration numbers are the first weights, and with `seed + i` for environment i the runs of seeds 1 and
2 share all starts but one. NumPy's SeedSequence mixes the seed with a key, here the purpose's name and any
indices, into bits that are unrelated for any two different keys.

    torch.manual_seed(generator_seed(seed, "network"))
    generator = torch.Generator(device).manual_seed(generator_seed(seed, "noise"))
    obs = envs.reset(env_seeds(seed, "environments", num_envs, step))      # other starts at another step
"""

import numpy as np


def _sequence(seed: int, purpose: str, index: tuple[int, ...]) -> np.random.SeedSequence:
    key = (
        *purpose.encode(),
        0,
        *index,
    )  # the 0 ends the name, so that no name and index read as another name
    return np.random.SeedSequence(seed, spawn_key=key)


def generator_seed(seed: int, purpose: str, *index: int) -> int:
    """64 bits for a torch generator, others for each seed, purpose and index (all of them at least 0)."""
    return int(_sequence(seed, purpose, index).generate_state(1, np.uint64)[0])


def env_seeds(seed: int, purpose: str, count: int, *index: int) -> list[int]:
    """`count` seeds of 31 bits, one an environment, as `VectorEnv.reset` takes them.

    31, because environments may keep them in a signed integer. The first ones do not depend on `count`.
    """
    return (_sequence(seed, purpose, index).generate_state(count) >> 1).tolist()
