"""Watch a trained agent, on the screen or as a video.

python scripts/watch.py runs/MY_RUN
python scripts/watch.py results/ppo/HalfCheetah-v4        the agent of the median seed
python scripts/watch.py agent.pt --video agent.gif --episodes 1
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import tyro
from evaluate import load_agent, make_policy

from zoo.common.cli import require
from zoo.common.envs import make_envs
from zoo.common.errors import RunFault, UsageError


@dataclass
class Args:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of a finished run or of results, or an agent.pt"""
    video: Path | None = None
    """.mp4 or .gif to write, instead of showing it on the screen"""
    episodes: int = 1
    """episodes to play"""
    seed: int = 0
    """seed of the first episode"""


def open_video(get_writer: Callable, path: Path, fps: int) -> Any:
    """imageio's writer for the file. Raises RunFault."""
    try:
        return get_writer(
            path, mode="I", **({"fps": fps} if path.suffix == ".mp4" else {"duration": 1000 / fps, "loop": 0})
        )
    except ImportError as error:
        raise RunFault(f"--video {path}: needs pip install 'imageio[ffmpeg]'") from error
    except (OSError, ValueError) as error:
        hint = "; an .mp4 needs pip install 'imageio[ffmpeg]'" if path.suffix == ".mp4" else ""
        raise RunFault(f"--video {path}: {' '.join(str(error).split())[:100]}{hint}") from error


def play(args: Args) -> str:
    """Play the episodes; what to tell at the end. Raises UsageError, RunFault."""
    require(args.episodes >= 1, f"--episodes must be at least 1, not {args.episodes}")
    require(0 <= args.seed < 2**31, f"--seed must lie in [0, 2**31), not {args.seed}")
    if args.video:
        require(args.video.suffix in (".mp4", ".gif"), f"--video {args.video}: end the name in .mp4 or .gif")
        require(args.video.parent.is_dir(), f"--video {args.video}: no such folder as {args.video.parent}")
        try:
            import imageio.v2 as imageio
        except ImportError:
            raise UsageError("--video needs imageio: pip install 'imageio[ffmpeg]'") from None
    content = load_agent(args.run)
    envs = make_envs(content["env"], 1)
    policy = make_policy(content, envs)
    try:
        env = gym.make(
            content["env"], render_mode="rgb_array" if args.video else "human", disable_env_checker=True
        )
        fps = env.metadata.get("render_fps", 30)
        total, video = 0.0, open_video(imageio.get_writer, args.video, fps) if args.video else None
        for episode in range(args.episodes):
            obs, _ = env.reset(seed=args.seed + episode)
            ended = False
            while not ended:
                action = envs.to_env_action(policy(np.asarray(obs, dtype=envs.dtype).reshape(1, -1)))[0]
                if not envs.discrete:
                    action = action.astype(envs.action_dtype).reshape(envs.action_shape)
                obs, reward, terminated, truncated, _ = env.step(action)
                total, ended = total + float(reward), terminated or truncated
                if video:
                    # written as it goes: 1,000 frames of 480 x 480 are 700 MB
                    video.append_data(env.render())
        env.close()
        if video:
            video.close()
    except RunFault:
        raise
    except Exception as error:  # no display, no OpenGL, a package missing: whatever the renderer raises
        raise RunFault(f"{content['env']} cannot be rendered here: {' '.join(str(error).split())}") from error
    return f"mean return {total / args.episodes:.2f} over {args.episodes} episodes" + (
        f"; {args.video}" if args.video else ""
    )


def main() -> int:
    """Play, or tell in one line what is wrong; the exit status."""
    try:
        print(play(tyro.cli(Args, description=__doc__)))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunFault as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
