"""Pictures of tasks: a camera that follows, quick drawing without a graphics card, GIFs."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import gymnasium as gym
import numpy as np


def follow(env: gym.Env) -> None:
    """Let the camera of a MuJoCo task keep a body that moves about in the picture, on screen and video.

    Gymnasium's own camera stands still, and what runs is out of the picture after a second.
    """
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is None:
        return
    import mujoco

    model = renderer.model
    joints = model.jnt_type[model.jnt_bodyid == 1]  # of the first body below the world
    free = mujoco.mjtJoint.mjJNT_FREE in joints or np.sum(joints == mujoco.mjtJoint.mjJNT_SLIDE) >= 2
    if free:
        tracking = {"type": int(mujoco.mjtCamera.mjCAMERA_TRACKING), "trackbodyid": 1}
        renderer.default_cam_config = {"elevation": -20.0, **(renderer.default_cam_config or {}), **tracking}
        renderer.camera_id = None  # else each picture would set the camera free again


def draw_quickly(env: gym.Env, size: int) -> None:
    """Set the pictures' size of a MuJoCo task, and leave out what takes most of the time without a GPU."""
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is None:
        return
    renderer.width = renderer.height = size
    model, buffer = renderer.model, renderer.model.vis.global_
    buffer.offwidth, buffer.offheight = max(buffer.offwidth, size), max(buffer.offheight, size)
    model.light_castshadow[:] = 0  # shadows and reflections: six sevenths of it
    model.mat_reflectance[:] = 0


def draw_unseen() -> None:
    """Where there is no display, have MuJoCo and SDL draw without one; before MuJoCo is imported.

    MuJoCo would try to open a window first, and SDL complain that it cannot.
    """
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


def write_gif(file: Path | IO[bytes], frames: Iterable[np.ndarray], fps: float) -> None:
    """Write pictures (H, W, 3) as they come, to be shown over and over. Raises OSError."""
    from PIL import Image

    # the octree is the quickest of the ways to choose 256 colours
    images = (Image.fromarray(frame).quantize(method=Image.Quantize.FASTOCTREE) for frame in frames)
    first = next(images)
    hundredths = max(2, round(100 / fps))
    first.save(file, "gif", save_all=True, append_images=images, duration=10 * hundredths, loop=0)
