"""scripts/watch.py: what moves stays in the picture, a video's length, what it says without a display."""

import itertools
import os
import subprocess
import sys

import agents
import gymnasium as gym
import numpy as np
import pytest
import watch
from PIL import Image, ImageSequence

# Draws one picture; in a process of its own, for MuJoCo's window library ends the process without a display.
DRAW = "import gymnasium; e = gymnasium.make('Swimmer-v5', render_mode='rgb_array'); e.reset(); e.render()"


@pytest.fixture(scope="session")
def egl():
    """Skips where MuJoCo cannot draw without a display."""
    result = subprocess.run(
        [sys.executable, "-c", DRAW], env={**os.environ, "MUJOCO_GL": "egl"}, capture_output=True, text=True
    )
    if result.returncode:
        pytest.skip(f"no EGL here: {result.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    return agents.train_ppo(tmp_path_factory.mktemp("cartpole") / "run")


@pytest.fixture(scope="module")
def cheetah(tmp_path_factory):
    return agents.train_ppo(tmp_path_factory.mktemp("cheetah") / "run", "HalfCheetah-v4")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs watch.py's command line without a display: its exit status, stdout and the lines on stderr."""

    def run(*argv):
        for name in ("DISPLAY", "WAYLAND_DISPLAY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))  # put back after the test
        monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
        monkeypatch.setattr(sys, "argv", ["watch.py", *map(str, argv)])
        monkeypatch.setattr(sys, "platform", "linux")
        capsys.readouterr()
        status = watch.main()
        told = capsys.readouterr()
        return status, told.out, told.err.splitlines()

    return run


def pictures(path):
    return [np.array(image.convert("RGB"), dtype=int) for image in ImageSequence.Iterator(Image.open(path))]


def milliseconds(path):
    """Of each picture; where a few are equal, one is shown for as long."""
    return [image.info["duration"] for image in ImageSequence.Iterator(Image.open(path))]


def orange(picture):
    """Where the body is: (pixels, 2) row and column of what is neither grey nor blue."""
    return np.argwhere(picture[..., 0] - picture[..., 2] > 40)


class Walks:
    """In place of an agent: sets the body 12 m further at each step, beyond any camera that stands."""

    def __init__(self, env):
        self.env = env

    def policy(self, obs):
        data = self.env.unwrapped.data
        qpos = data.qpos.copy()
        qpos[0] += 12.0
        self.env.unwrapped.set_state(qpos, data.qvel.copy())
        return self.env.action_space.sample()


@pytest.mark.parametrize("task", ["HalfCheetah-v5", "Swimmer-v5", "Ant-v5"])
@pytest.mark.usefixtures("egl")
def test_the_camera_follows(task, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    env = gym.make(task, render_mode="rgb_array")
    env.action_space.seed(0)
    watch.follow(env)
    watch.draw_quickly(env, 96)
    frames = watch.Player(Walks(env), env).frames(1, seed=0, every=1)
    seen = [np.asarray(frame, dtype=int) for frame, _ in zip(frames, range(4), strict=False)]
    env.close()
    for picture in seen:
        body = orange(picture)
        assert len(body) > 40  # pixels
        assert np.abs(body.mean(0) - 48).max() < 25  # about the middle of it
    assert all((a != b).any() for a, b in itertools.pairwise(seen))


@pytest.mark.usefixtures("egl")
def test_a_video_of_a_mujoco_task(cheetah, tmp_path, command):
    video = tmp_path / "a.gif"
    status, out, errors = command(cheetah, "--video", video, "--seconds", 1, "--size", 64)
    assert (status, errors) == (0, [])
    assert "up to here, after --seconds 1;" in out and str(video) in out
    images = pictures(video)
    assert images[0].shape == (64, 64, 3)
    assert sum(milliseconds(video)) == 1000 and min(milliseconds(video)) == 50  # 20 a second
    assert all(len(orange(picture)) > 40 for picture in images)
    assert (images[-1] != images[-5]).any()
    assert list(tmp_path.iterdir()) == [video]


def test_a_video_of_a_classic_task(cartpole, tmp_path, command):
    """Every second step of 50 a second, the first and the last; CartPole pays 1 a step."""
    video = tmp_path / "a.gif"
    status, out, errors = command(cartpole, "--video", video, "--seed", 3)
    assert (status, errors) == (0, [])
    steps = int(float(out.split()[2]))
    assert out == f"mean return {steps:.2f} over 1 episode; {video}\n"
    images = pictures(video)
    assert sum(milliseconds(video)) == 40 * (steps // 2 + 1 + steps % 2)
    assert (images[-1] != images[len(images) // 2]).any() and (images[-1] != images[0]).any()


def test_episodes_and_seconds(cartpole, tmp_path, command):
    def played(*argv):
        status, out, _ = command(cartpole, "--video", tmp_path / "a.gif", *argv)
        assert status == 0
        return sum(milliseconds(tmp_path / "a.gif")), out

    whole, out = played("--episodes", 3, "--seconds", 0)
    assert whole > 3000 and "over 3 episodes" in out
    assert played("--episodes", 3, "--seconds", 0.2)[0] == 200


def test_an_mp4(cartpole, tmp_path, command):
    pytest.importorskip("imageio_ffmpeg", reason="the extra `video` is not installed")
    status, _, errors = command(cartpole, "--video", tmp_path / "a.mp4")
    assert (status, errors) == (0, [])
    assert (tmp_path / "a.mp4").read_bytes()[4:8] == b"ftyp"


def test_an_mp4_without_its_extra(cartpole, tmp_path, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    status, _, errors = command(cartpole, "--video", tmp_path / "a.mp4")
    assert status == 2 and len(errors) == 1 and "pip install -e '.[video]'" in errors[0]


def test_without_a_display_the_video_is_named(cartpole, command):
    status, out, errors = command(cartpole)
    assert (status, out, len(errors)) == (2, "", 1)
    assert f"{cartpole} --video agent.gif" in errors[0]


@pytest.mark.parametrize("renderer", ["glfw", "nonsense"])
def test_without_a_renderer_others_are_named(cheetah, tmp_path, renderer):
    """In a process of its own, because a renderer is chosen once."""
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    result = subprocess.run(
        [sys.executable, watch.__file__, cheetah, "--video", tmp_path / "a.gif"],
        env={**environment, "MUJOCO_GL": renderer}, capture_output=True, text=True,
    )  # fmt: skip
    errors = result.stderr.splitlines()
    assert result.returncode in (1, 2) and len(errors) == 1 and errors[0].startswith("error: ")
    assert renderer in errors[0] and "egl" in errors[0] and "osmesa" in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_a_failed_video_leaves_the_old_one(cartpole, tmp_path, command, monkeypatch):
    (tmp_path / "a.gif").write_bytes(b"old")
    monkeypatch.setattr(watch.Player, "frames", lambda self, *_: iter([np.zeros((4, 4, 3), "u1"), None]))
    status, _, errors = command(cartpole, "--video", tmp_path / "a.gif")
    assert status == 1 and len(errors) == 1 and "CartPole-v1 cannot be drawn here" in errors[0]
    assert (tmp_path / "a.gif").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_bad_input_is_one_line_and_status_2(cartpole, tmp_path, command):
    (tmp_path / "folder.gif").mkdir()
    blind = agents.untrained(tmp_path / "blind", "probe/Endless-v0")
    for argv, words in (
        ([cartpole, "--video", tmp_path / "none" / "a.gif"], f"no such folder as {tmp_path / 'none'}"),
        ([cartpole, "--video", tmp_path / "a.avi"], "end the name in .mp4 or .gif"),
        ([cartpole, "--video", tmp_path / "folder.gif"], "folder.gif: is a folder"),
        ([tmp_path, "--video", tmp_path / "a.gif"], "holds no agent.pt"),
        (["", "--video", tmp_path / "a.gif"], "run is empty"),
        ([blind, "--video", tmp_path / "a.gif"], "its metadata's render_modes lack 'rgb_array'"),
        ([cartpole, "--video", tmp_path / "a.gif", "--episodes", 0], "--episodes must be at least 1"),
        ([cartpole, "--video", tmp_path / "a.gif", "--seconds", -1], "--seconds must be at least 0"),
        ([cartpole, "--video", tmp_path / "a.gif", "--seconds", "inf"], "and finite, not inf"),
        ([cartpole, "--video", tmp_path / "a.gif", "--size", 7], "--size must lie in [16, 4096], not 7"),
    ):  # fmt: skip
        status, _, errors = command(*argv)
        assert status == 2 and len(errors) == 1 and words in errors[0]
