"""The page on which a human compares: its protocol, its file of answers, a whole run, a real browser."""

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from io import BytesIO

import numpy as np
import pytest
import torch
from command import ROOT
from PIL import Image, ImageSequence
from test_preferences_agent import small, state_of

from zoo import preferences
from zoo.common.ask import MOST, Human, Recorder, simulator_state
from zoo.common.envs import make_envs
from zoo.common.errors import RunFault, UsageError

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


@pytest.fixture
def human(tmp_path):
    with Human("Pendulum-v1", 0) as human:
        human.begin(tmp_path, 5)
        yield human


def ask(human, count):
    """Questions whose observations are their numbers."""
    asked = torch.arange(float(count)).view(count, 1, 1, 1).expand(count, 2, 3, 3)
    human.ask(asked, asked[..., :1], torch.rand(count, 2, 3, 2, dtype=torch.float64))


def get(human, path):
    with urllib.request.urlopen(human.address + path, timeout=10) as reply:
        return reply.read()


def post(human, content, kind="application/json"):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    request = urllib.request.Request(human.address + "/answer", body, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=10) as reply:
        return json.loads(reply.read())


def test_questions_are_shown_in_their_order_and_answers_kept(human, tmp_path):
    assert json.loads(get(human, "/question"))["number"] is None
    ask(human, 3)
    assert (human.waiting, human.room) == (3, MOST - 3)
    now = json.loads(get(human, "/question"))
    assert now == {"number": 1, "answered": 0, "labels": 5, "task": "Pendulum-v1"}
    assert post(human, {"number": 1, "choice": "right"})["number"] == 2
    post(human, {"number": 2, "choice": "equal"})
    assert post(human, {"number": 3, "choice": "left"}) == {**now, "number": None, "answered": 3}
    answers = human.answers(0)
    assert [first.item() for _, _, first in answers] == [0.0, 0.5, 1.0]
    assert [obs[0, 0, 0].item() for obs, _, _ in answers] == [0.0, 1.0, 2.0]
    assert answers[0][0].shape == (2, 3, 3) and answers[0][1].shape == (2, 3, 1)
    assert len(human.answers(2)) == 1 and human.answers(3) == []
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == [f"{i:06}.npz" for i in range(3)]


def test_a_question_is_answered_once(human):
    ask(human, 1)
    post(human, {"number": 1, "choice": "left"})
    assert post(human, {"number": 1, "choice": "right"})["answered"] == 1  # from a second window
    assert [first.item() for _, _, first in human.answers(0)] == [1.0]


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"no json", "application/json", 400),
        (b"[" * 990, "application/json", 400),
        (b'{"number": Infinity, "choice": "left"}', "application/json", 400),
        ({"number": 1, "choice": "both"}, "application/json", 400),
        ({"choice": "left"}, "application/json", 400),
        ({"number": 1, "choice": "left"}, "text/plain", 404),  # what a form of another site can send
    ],
)
def test_what_is_no_answer_is_refused(human, content, kind, status):
    ask(human, 1)
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(human, content, kind)
    assert caught.value.code == status and human.answered == 0


def sent(human, text, reset=False):
    """What comes back for a request as it stands; nothing where the connection is reset instead."""
    with socket.create_connection(human.server.server_address, timeout=10) as connection:
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(text.encode("latin-1"))
        return b"" if reset else connection.recv(1000)


@pytest.mark.parametrize("length", ["abc", "-5", "9" * 5000, "1.5"])
def test_a_length_that_is_no_number_is_refused(human, length, capfd):
    request = f"POST /answer HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
    assert sent(human, request).startswith(b"HTTP/1.1 400 ")
    assert capfd.readouterr().err == ""


def test_a_video_whose_number_is_none_is_not_found(human, capfd):
    assert sent(human, "GET /video/\xb2/0 HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 404 ")
    assert capfd.readouterr().err == ""


def test_a_browser_that_leaves_is_not_told_of(human, capfd):
    """It resets its connection while it is sent a video."""
    ask(human, 1)
    for _ in range(3):
        sent(human, "GET /video/1/0 HTTP/1.1\r\nHost: x\r\n\r\n" * 20, reset=True)
        time.sleep(0.2)
    assert json.loads(get(human, "/question"))["number"] == 1
    assert capfd.readouterr().err == ""


def test_a_fault_of_the_pages_own_is_told(human, monkeypatch, capfd):
    monkeypatch.setattr(human, "present", lambda: 1 / 0)
    with pytest.raises(OSError):
        get(human, "/question")
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_only_this_machine_is_served(human):
    assert human.server.server_address[0] == "127.0.0.1"
    for path in ("/labels", "/video/1/0", "/video/1/2", "/../args.json"):
        with pytest.raises(urllib.error.HTTPError):
            get(human, path)


def test_clips_are_drawn_from_the_states_of_the_simulator(human):
    """Two states, hanging and upright: two pictures that differ, each at its place in the video."""
    states = torch.tensor([[0.0, 0.0], [np.pi, 0.0], [0.0, 0.0]], dtype=torch.float64)
    human.ask(
        torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 1), torch.stack((states, states.flip(0) * 0))[None]
    )
    frames = [
        [
            np.array(frame.convert("RGB"), int)
            for frame in ImageSequence.Iterator(Image.open(BytesIO(get(human, path))))
        ]
        for path in ("/video/1/0", "/video/1/1")
    ]
    upright, hanging, again = (frames[0] + [frames[0][0]])[:3]
    assert np.abs(upright - hanging).mean() > 1 and len(frames[0]) >= 2
    assert np.abs(upright - again).max() == 0
    assert all(np.array_equal(frame, frames[1][0]) for frame in frames[1])
    height = [np.argwhere(np.abs(f - f[0, 0]).sum(-1) > 60)[:, 0].mean() for f in (upright, hanging)]
    assert height[0] < height[1]  # state 0 is upright


@pytest.mark.parametrize(
    ("env", "engine"), [("Pendulum-v1", "auto"), ("Pendulum-v1", "gymnasium"), ("CartPole-v1", "auto")]
)
def test_the_state_recorded_is_that_before_the_step(env, engine):
    with make_envs(env, 2, engine=engine) as envs:
        recorder = Recorder(envs, True)
        obs, seen = envs.reset([3, 4]), []
        for _ in range(3):
            seen.append(obs)
            obs = recorder.step(np.zeros((2, 1)) if env == "Pendulum-v1" else np.zeros(2, int)).obs
        states = recorder.taken()
        assert states.shape == (3, 2, recorder.size) and len(recorder.states) == 0
        if env == "Pendulum-v1":
            np.testing.assert_allclose(np.cos(states[..., 0]), np.stack(seen)[..., 0], atol=1e-6)
        else:
            np.testing.assert_allclose(states, np.stack(seen), atol=1e-6)


def test_mujocos_state_is_recorded_alike_by_both_engines():
    states = []
    for engine in ("mujoco", "gymnasium"):
        with make_envs("HalfCheetah-v4", 2, engine=engine, threads=1) as envs:
            envs.reset([3, 4])
            states.append(simulator_state(envs))
    np.testing.assert_array_equal(*states)
    assert states[0].shape == (2, 18)


# in a process of its own, for MuJoCo chooses how it draws when it is imported
DRAW = """
import io, sys
import numpy as np
from PIL import Image, ImageSequence
from zoo.common.pictures import draw_unseen
draw_unseen()
try:
    from mujoco.egl import GLContext
    GLContext(8, 8).free()
except Exception as error:
    sys.exit(f"no EGL here: {error}")
from zoo.common.ask import Painter
painter, states = Painter("HalfCheetah-v4"), np.zeros((3, 18))
states[1, 2] = 1.5  # on its feet, on its nose, on its feet
video = Image.open(io.BytesIO(painter.gif(states)))
frames = [np.array(frame.convert("RGB"), int) for frame in ImageSequence.Iterator(video)]
print([int((np.abs(frames[0] - frame).sum(-1) > 60).sum()) for frame in frames + frames[:1]][1:])
"""


def test_mujocos_tasks_are_drawn_without_a_display():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MUJOCO_GL": "egl"}
    done = subprocess.run([sys.executable, "-c", DRAW], env=environment, capture_output=True, text=True)
    if "no EGL here" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    nose, *feet = json.loads(done.stdout)
    assert nose > 500 and max(feet) < 50


def test_nothing_is_recorded_for_nobody():
    with make_envs("Pendulum-v1", 2) as envs:
        recorder = Recorder(envs, False)
        envs.reset([3, 4])
        recorder.step(np.zeros((2, 1)))
        assert recorder.taken().shape == (1, 2, 0) and recorder.size == 0


# --- what is refused ----------------------------------------------------------------------------------------


def test_a_port_in_use():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port {port}.*in use"):
            Human("Pendulum-v1", port)


@pytest.mark.parametrize("env", ["probe/Always-v0"])
def test_a_task_that_cannot_be_drawn(env):
    with pytest.raises(UsageError, match=f"--ask human: {env} cannot be drawn"):
        Human(env, 0)


def test_a_torn_file_of_an_answer(human, tmp_path):
    ask(human, 1)
    post(human, {"number": 1, "choice": "left"})
    (tmp_path / "labels" / "000000.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(RunFault, match=r"000000.npz cannot be read"):
        human.answers(0)


# --- whole runs ---------------------------------------------------------------------------------------------


def answering(address, choices, stop):
    """Answers whatever is asked, until told to stop: the choices in turn; how many there were."""
    count = 0
    while not stop.is_set():
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(f"{address}/question", timeout=5) as reply:
                number = json.loads(reply.read())["number"]
            if number is not None:
                body = json.dumps({"number": number, "choice": choices[count % len(choices)]}).encode()
                request = urllib.request.Request(
                    f"{address}/answer", body, {"Content-Type": "application/json"}
                )
                urllib.request.urlopen(request, timeout=5).close()
                count += 1
        time.sleep(0.005)
    return count


def free_port():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        return taken.getsockname()[1]


def test_a_run_learns_from_a_human(tmp_path):
    port, stop = free_port(), threading.Event()
    args = small(
        tmp_path, "Pendulum-v1", labels=12, ask="human", port=port, total_steps=128 * 10, num_epochs=1
    )
    thread = threading.Thread(
        target=answering, args=(f"http://127.0.0.1:{port}", ["left", "equal", "right"], stop)
    )
    thread.start()
    try:
        preferences.train(args)
    finally:
        stop.set()
        thread.join()
    state = state_of(tmp_path)
    known = state["known"]
    assert 3 <= known["answered"] <= 12
    assert known["first"][: known["answered"]].tolist() == ([1.0, 0.5, 0.0] * 4)[: known["answered"]]
    assert state["model"]["std"].tolist() != [1.0] * 3  # it was fitted


KILLED = ["--env", "Pendulum-v1", "--ask", "human", "--labels", "12", "--no-compile", "--num-epochs", "1"]
KILLED += ["--num-envs", "8", "--num-steps", "32", "--minibatch-size", "64", "--total-steps", "2560"]
KILLED += [
    "--reward-hidden",
    "8",
    "--eval-episodes",
    "1",
    "--eval-every",
    "0",
    "--start",
    "0.5",
    "--ask-every",
    "2",
]


@pytest.mark.parametrize("first", [1, 2])
def test_answers_survive_a_kill(tmp_path, first):
    """The run is killed, by -9, while it waits for the answers that it begins with: in its first iteration,
    or when it has reported one."""
    port, folder = free_port(), tmp_path / "run"
    command = [sys.executable, str(ROOT / "zoo" / "preferences.py"), "--port", str(port), "--no-progress"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SDL_VIDEODRIVER": "dummy"}
    process = subprocess.Popen(
        [*command, *KILLED, "--first", str(first), "--run-dir", str(folder)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    address, number = f"http://127.0.0.1:{port}", None
    try:
        for wanted in range(1, 5):
            deadline = time.monotonic() + 60
            while number != wanted and time.monotonic() < deadline and process.poll() is None:
                with (
                    contextlib.suppress(OSError),
                    urllib.request.urlopen(f"{address}/question", timeout=5) as reply,
                ):
                    number = json.loads(reply.read())["number"]
                time.sleep(0.05)
            assert number == wanted, process.stderr.read() if process.poll() is not None else number
            body = json.dumps({"number": number, "choice": "left"}).encode()
            request = urllib.request.Request(f"{address}/answer", body, {"Content-Type": "application/json"})
            urllib.request.urlopen(request, timeout=5).close()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    kept = {path.name: path.read_bytes() for path in (folder / "labels").glob("*.npz")}
    assert len(kept) == 4
    assert state_of(folder)["known"]["answered"] == 0  # the checkpoint is from before
    stop = threading.Event()
    thread = threading.Thread(target=answering, args=(address, ["right"], stop))
    thread.start()
    try:
        result = subprocess.run(
            [*command, "--resume", str(folder)], env=environment, capture_output=True, text=True, timeout=120
        )
    finally:
        stop.set()
        thread.join()
    assert result.returncode == 0, result.stderr
    assert "(4 of 12 done)" in result.stderr
    known = state_of(folder)["known"]
    assert known["first"][:6].tolist() == [1.0] * 4 + [0.0] * 2
    assert {name: (folder / "labels" / name).read_bytes() for name in kept} == kept


# --- a real browser -----------------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path):
    """Chromium without a display; skipped, with the reason, where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver here (Debian: chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1000,800",
    ):
        options.add_argument(option)
    service = webdriver.ChromeService(driver)
    chrome = webdriver.Chrome(options=options, service=service)
    yield chrome
    chrome.quit()


def until(condition, seconds=20.0):
    """Wait for it; what it gave."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return value


def test_a_browser_shows_the_clips_and_sends_answers_by_buttons_and_keys(human, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def told():
        return browser.find_element(By.ID, "told").text

    browser.get(human.address)
    assert until(lambda: "0 of 5" in told()) and "training" in told()
    assert not browser.find_element(By.ID, "left").is_enabled()
    ask(human, 4)  # the page finds them by itself
    assert until(lambda: browser.find_element(By.ID, "left").is_enabled())
    loaded = "return [...document.images].map(i => i.complete && i.naturalWidth > 50 && i.checkVisibility())"
    assert until(lambda: browser.execute_script(loaded) == [True, True])
    sources = browser.execute_script("return [...document.images].map(i => i.src)")
    assert [source.removeprefix(human.address) for source in sources] == ["/video/1/0", "/video/1/1"]
    assert [b.text for b in browser.find_elements(By.TAG_NAME, "button")] == ["← left", "↓ equal", "right →"]
    browser.find_element(By.ID, "right").click()
    assert until(lambda: "1 of 5" in told())
    body = browser.find_element(By.TAG_NAME, "body")
    for i, key in enumerate((Keys.ARROW_LEFT, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)):
        body.send_keys(key)
        assert until(lambda i=i: f"{i + 2} of 5" in told())
    assert [first.item() for _, _, first in human.answers(0)] == [0.0, 1.0, 0.5, 0.0]
    assert until(lambda: not browser.find_element(By.ID, "left").is_enabled()) is not None
    body.send_keys(Keys.ARROW_LEFT)  # nothing is asked
    ask(human, 1)
    assert until(lambda: browser.find_element(By.ID, "equal").is_enabled())
    browser.find_element(By.ID, "equal").click()
    assert until(lambda: "5 of 5" in told()) and human.answered == 5
