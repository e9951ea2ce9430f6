"""Watch a trained agent, on the screen or as a video.

    python scripts/watch.py runs/MY_RUN
    python scripts/watch.py results/ppo/HalfCheetah-v4 --video cheetah.gif

A .gif needs nothing more, an .mp4 the extra `video`: pip install -e '.[video]'. Without a display MuJoCo's
tasks are drawn by EGL; where that is missing, MUJOCO_GL=osmesa draws them without a graphics card.
"""

import contextlib
import math
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import tyro

import zoo
from zoo.common.agent import Agent
from zoo.common.args import require
from zoo.common.cli import script_main
from zoo.common.envs import make_single
from zoo.common.errors import RunFault, UsageError
from zoo.common.pictures import draw_quickly, draw_unseen, follow, write_gif

FPS = 25  # about that of a video: of a task of more frames a second some are left out


@dataclass
class Args:
    run: Annotated[str, tyro.conf.Positional]
    """folder of a finished run or of results/, or an agent.pt"""
    video: Path | None = None
    """.gif or .mp4 to write, instead of showing it on the screen"""
    seconds: float = 10.0
    """length of the video, at most; 0: all of the episodes"""
    episodes: int = 1
    """episodes to play"""
    seed: int = 0
    """seed of the first episode"""
    size: int = 320
    """width and height of the video in pixels, for MuJoCo's tasks (others have a size of their own)"""


class Player:
    """Plays the episodes; `returns` are those ended so far, `running` the one that has not ended."""

    def __init__(self, agent: Agent, env: gym.Env):
        self.agent, self.env = agent, env
        self.returns: list[float] = []
        self.running = 0.0

    def steps(self, episodes: int, seed: int) -> Iterator[bool]:
        """Play; yields before the first step of an episode and after each one, whether it is the last."""
        for episode in range(episodes):
            obs, _ = self.env.reset(seed=seed + episode)
            self.running, ended = 0.0, False
            yield False
            while not ended:
                obs, reward, terminated, truncated, _ = self.env.step(self.agent.policy(obs))
                self.running, ended = self.running + float(reward), bool(terminated or truncated)
                if ended:
                    self.returns.append(self.running)
                yield ended

    def frames(self, episodes: int, seed: int, every: int) -> Iterator[np.ndarray]:
        """Play; every so manieth picture (H, W, 3), and that of each episode's end."""
        for i, ended in enumerate(self.steps(episodes, seed)):
            if i % every == 0 or ended:
                yield np.asarray(self.env.render())


def write_video(path: Path, frames: Iterator[np.ndarray], fps: float) -> None:
    """Write the pictures as they come: 1,000 of them together would be 300 MB. Raises OSError, ImportError.

    An unfinished file takes no finished one's place.
    """
    unfinished = path.with_name(f".{path.name}")
    try:
        if path.suffix == ".gif":
            write_gif(unfinished, frames, fps)
        else:
            import imageio.v2 as imageio

            # even sizes are all that H.264 asks for
            writer: Any = imageio.get_writer(unfinished, format="FFMPEG", fps=fps, macro_block_size=2)
            with writer:
                for frame in frames:
                    writer.append_data(frame)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check(args: Args) -> None:
    """Refuse what cannot work, before anything is loaded."""
    require(args.run != "", "run is empty; a folder is meant")  # Path("") is the current one
    require(args.episodes >= 1, f"--episodes must be at least 1, not {args.episodes}")
    require(0 <= args.seed < 2**31, f"--seed must lie in [0, 2**31), not {args.seed}")
    lasting = 0 <= args.seconds < math.inf
    require(lasting, f"--seconds must be at least 0 and finite, not {args.seconds:g}; 0: to the end")
    require(16 <= args.size <= 4096, f"--size must lie in [16, 4096], not {args.size}")
    require(args.size % 2 == 0, f"--size must be even, not {args.size}")
    shown = sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if args.video is None:
        command = shlex.join(["python", sys.argv[0], args.run, "--video", "agent.gif"])
        require(bool(shown), f"there is no display here; to write a video instead: {command}")
        return
    require(args.video.suffix in (".mp4", ".gif"), f"--video {args.video}: end the name in .mp4 or .gif")
    require(args.video.parent.is_dir(), f"--video {args.video}: no such folder as {args.video.parent}")
    require(not args.video.is_dir(), f"--video {args.video}: is a folder; a file is meant")
    if args.video.suffix == ".mp4":
        try:
            import imageio_ffmpeg  # noqa: F401
        except ImportError:
            raise UsageError(f"--video {args.video}: an .mp4 needs pip install -e '.[video]'") from None
    draw_unseen()


def play(args: Args) -> str:
    """Play the episodes; what to tell at the end. Raises UsageError, RunFault."""
    check(args)
    agent = zoo.load(args.run)
    import torch  # a second, spared to --help

    torch.set_num_threads(1)  # a second one gains nothing, and beside other programs costs twice the time
    mode = "rgb_array" if args.video else "human"
    with contextlib.closing(make_single(agent.env)) as plain:
        modes = plain.metadata.get("render_modes") or []
        require(mode in modes, f"{agent.env} cannot be drawn: its metadata's render_modes lack {mode!r}")
    env = make_single(agent.env, render_mode=mode)
    follow(env)
    player = Player(agent, env)
    try:
        with contextlib.closing(env), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of GLFW, about what is told here in one line
            if args.video:
                draw_quickly(env, args.size)
                rate = env.metadata.get("render_fps") or 30
                every = max(1, round(rate / FPS))
                frames: Iterator[Any] = player.frames(args.episodes, args.seed, every)
                if args.seconds:
                    most = max(1, round(args.seconds * rate / every))
                    frames = (frame for frame, _ in zip(frames, range(most), strict=False))
                write_video(args.video, frames, rate / every)
            else:
                for _ in player.steps(args.episodes, args.seed):
                    pass
    except RunFault:
        raise
    except OSError as error:
        raise RunFault(f"--video {args.video}: {error.strerror or error}") from error
    except Exception as error:  # no OpenGL, a package missing: whatever the renderer raises
        raise RunFault(_undrawn(agent.env, error)) from error
    if not player.returns:
        cut = f"after --seconds {args.seconds:g}"
        return f"the episode's return is {player.running:.2f} up to here, {cut}; {args.video}"
    count = len(player.returns)
    told = f"mean return {np.mean(player.returns):.2f} over {count} episode{'s' if count > 1 else ''}"
    return f"{told}; {args.video}" if args.video else told


def _undrawn(env_id: str, error: Exception) -> str:
    message = " ".join(str(error).split())[:150]
    told = f"{env_id} cannot be drawn here: {type(error).__name__}: {message}"
    if "mujoco" not in sys.modules:
        return told
    by = os.environ.get("MUJOCO_GL", "unset")
    return f"{told}; MUJOCO_GL is {by}: try egl (Debian: libegl1) or osmesa (libosmesa6)"


def main() -> int:
    """Play, or tell in one line what is wrong; the exit status."""
    return script_main(Args, __doc__, lambda args: print(play(args)))


if __name__ == "__main__":
    sys.exit(main())
