"""A human who compares: two short videos on a local web page, three buttons, answers that survive a kill.

    human = Human("HalfCheetah-v4", port=8000)     # raises UsageError if the task cannot be drawn
    human.begin(run.folder, labels)
    human.ask(obs, action, picture)                # questions, drawn here, shown in their order
    human.answers(known)                           # those that came after the first `known`

Only this machine can open the page. An answer is on the disk, as one file of RUN/labels, before the page is
told that it was taken; the files are numbered in the order in which the answers came.
"""

import contextlib
import io
import json
import re
import sys
import threading
import time
import zipfile
from collections import deque
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from zoo.common.envs import VectorEnv, make_single
from zoo.common.errors import RunFault, UsageError
from zoo.common.files import write_atomically
from zoo.common.pictures import draw_quickly, draw_unseen, follow, write_gif
from zoo.common.process import present_process, say

SIZE = 240  # pixels of a side
MOST = 8  # questions that wait for an answer: more would show what the agent has long unlearned
CHOICES = {"left": 1.0, "equal": 0.5, "right": 0.0}  # how sure it is that the first clip is the better one


def simulator_state(envs: VectorEnv) -> np.ndarray | None:
    """What a picture can be drawn from later (N, S): positions and velocities, or a classic task's state.

    None where the task does not have it.
    """
    engine: Any = envs
    if hasattr(engine, "sim"):  # mujoco_engine.py
        return np.concatenate((engine.sim.qpos, engine.sim.qvel), axis=1)
    if hasattr(engine, "state"):  # classic_engine.py
        return engine.state.T.copy()
    rows = []
    for env in engine.envs:
        task: Any = env.unwrapped
        if hasattr(task, "set_state") and hasattr(task, "data"):
            rows.append(np.concatenate((task.data.qpos, task.data.qvel)))
        elif isinstance(getattr(task, "state", None), np.ndarray | tuple | list):
            rows.append(np.asarray(task.state, dtype=np.float64))
        else:
            return None
    return np.stack(rows)


class Recorder:
    """Environments that keep what each step can be drawn from; nothing, if it is not `wanted`."""

    def __init__(self, envs: VectorEnv, wanted: bool):
        self.envs, self.wanted = envs, wanted
        self.states: list[np.ndarray] = []
        self.size = 0  # numbers in a state
        if wanted:
            envs.reset(range(envs.num_envs))
            state = simulator_state(envs)
            self.size = 0 if state is None else state.shape[1]

    def step(self, action: np.ndarray):
        """As VectorEnv.step."""
        state = simulator_state(self.envs) if self.wanted else None
        self.states.append(np.zeros((self.envs.num_envs, 0)) if state is None else state)
        return self.envs.step(action)

    def taken(self) -> np.ndarray:
        """The states (T, N, S) before each step since the last call."""
        states, self.states = np.stack(self.states), []
        return states


class Painter:
    """Draws a task in given states of its simulator."""

    def __init__(self, env_id: str):
        """Raises UsageError, also where nothing can be drawn."""
        told = f"--ask human: {env_id} cannot be drawn"
        with contextlib.closing(make_single(env_id)) as plain:
            if "rgb_array" not in (plain.metadata.get("render_modes") or []):
                raise UsageError(f"{told}: its metadata's render_modes lack 'rgb_array'")
        self.env: gym.Env = make_single(env_id, render_mode="rgb_array")
        self.task: Any = self.env.unwrapped
        self.in_mujoco = hasattr(self.task, "set_state") and hasattr(self.task, "data")
        self.env.reset(seed=0)
        state = getattr(self.task, "state", None)
        if not self.in_mujoco and not isinstance(state, np.ndarray | tuple | list):
            raise UsageError(f"{told} from a state: it has neither MuJoCo's set_state nor a `state`")
        follow(self.env)
        draw_quickly(self.env, SIZE)
        try:
            self.env.render()
        except Exception as error:  # no OpenGL, a package missing: whatever the renderer raises
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
            raise UsageError(f"{told} here: {reason}") from error

    def gif(self, states: np.ndarray) -> bytes:
        """A video of states (L, S)."""
        rate = self.env.metadata.get("render_fps") or 30
        every = max(1, round(rate / 25))
        file = io.BytesIO()
        write_gif(file, (self._picture(state) for state in states[::every]), rate / every)
        return file.getvalue()

    def _picture(self, state: np.ndarray) -> np.ndarray:
        if self.in_mujoco:
            positions = self.task.model.nq
            self.task.set_state(state[:positions], state[positions:])
        else:
            self.task.state = state
        return np.asarray(self.env.render())


class Question(NamedTuple):
    """Two clips to be compared: what an answer is to be kept with, and their videos."""

    number: int
    obs: np.ndarray
    action: np.ndarray
    videos: list[bytes]


class Human:
    """A human's questions and answers, and the page; closed at the end as a context manager."""

    def __init__(self, env_id: str, port: int):
        """Open the page on `port` of this machine, 0: any free one. Raises UsageError."""
        draw_unseen()
        self.painter = Painter(env_id)
        self.env_id, self.folder, self.labels = env_id, Path(), 0
        self.answered = 0  # so far, in all of the run
        self._asked = 0
        self._waiting: deque[Question] = deque()
        self._lock = threading.Lock()
        try:
            self.server = _Server(("127.0.0.1", port), _handler(self))
        except OSError as error:
            reason = f"--port {port}: the page cannot be served there: {error.strerror}"
            raise UsageError(f"{reason}; 0 takes any port that is free") from error
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def begin(self, folder: Path, labels: int) -> None:
        """Serve the questions of the run in `folder`, with the answers that it has already."""
        self.folder, self.labels = folder / "labels", labels
        self.folder.mkdir(exist_ok=True)
        for torn in self.folder.glob("*.tmp"):
            torn.unlink()
        self.answered = len(list(self.folder.glob("*.npz")))
        threading.Thread(target=self.server.serve_forever, args=(0.1,), daemon=True).start()
        say(f"compare clips at {self.address} ({self.answered} of {labels} done)")

    @property
    def waiting(self) -> int:
        """Questions without an answer, and answers not yet in a file."""
        return len(self._waiting)

    @property
    def room(self) -> int:
        """Questions that may be added."""
        return MOST - len(self._waiting)

    def ask(self, obs: Tensor, action: Tensor, picture: Tensor) -> None:
        """Queue questions, (Q, 2, L, ...) each."""
        for one in zip(obs, action, picture, strict=True):
            seen, done, states = (x.cpu().numpy() for x in one)
            videos = [self.painter.gif(clip) for clip in states]
            with self._lock:
                self._asked += 1
                self._waiting.append(Question(self._asked, seen, done, videos))

    def answers(self, known: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(obs, action, how sure the first clip is the better one) of all answers after the first `known`."""
        found = []
        for number in range(known, self.answered):
            path = self.folder / f"{number:06}.npz"
            try:
                with np.load(path, allow_pickle=False) as file:
                    arrays = [torch.as_tensor(file[name]) for name in ("obs", "action", "first")]
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                raise RunFault(f"{path} cannot be read: {error}") from error
            found.append((arrays[0], arrays[1], arrays[2].float()))
        return found

    def wait(self, known: int) -> bool:
        """Until there are more than `known` answers; False where the process was asked to stop before."""
        while self.answered <= known:
            if present_process().stop_signal:
                return False
            time.sleep(0.05)
        return True

    def close(self) -> None:
        """Take the page down."""
        if self.folder != Path():
            self.server.shutdown()
        self.server.server_close()
        self.painter.env.close()

    def __enter__(self) -> "Human":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def present(self) -> dict[str, Any]:
        """What the page shows now."""
        with self._lock:
            number = self._waiting[0].number if self._waiting else None
            return {"number": number, "answered": self.answered, "labels": self.labels, "task": self.env_id}

    def video(self, number: int, side: int) -> bytes | None:
        """A clip of a question that waits."""
        with self._lock:
            return next((q.videos[side] for q in self._waiting if q.number == number), None)

    def take(self, number: int, choice: str) -> bool:
        """Keep an answer; False if the question has one already (from another window). Raises OSError."""
        with self._lock:
            question = next((q for q in self._waiting if q.number == number), None)
            if question is None:
                return False
            first = np.float32(CHOICES[choice])
            path = self.folder / f"{self.answered:06}.npz"

            def write(file: IO[bytes]) -> None:
                np.savez_compressed(file, obs=question.obs, action=question.action, first=first)

            write_atomically(path, write)
            self._waiting.remove(question)
            self.answered += 1
            return True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Not a word where a browser was closed or reloaded meanwhile: the terminal is the run's."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def _handler(human: Human) -> type[BaseHTTPRequestHandler]:
    """What answers the browser: GET / /question /video/NUMBER/SIDE, POST /answer."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            parts = self.path.strip("/").split("/")
            if self.path == "/":
                self._send(PAGE.encode(), "text/html; charset=utf-8")
            elif parts == ["question"]:
                self._send(json.dumps(human.present()).encode(), "application/json")
            elif len(parts) == 3 and parts[0] == "video" and parts[1].isdecimal() and parts[2] in ("0", "1"):
                video = human.video(int(parts[1]), int(parts[2]))
                self._send(video or b"", "image/gif", HTTPStatus.OK if video else HTTPStatus.NOT_FOUND)
            else:
                self._send(b"", "text/plain", HTTPStatus.NOT_FOUND)

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length") or "0"
            if not re.fullmatch(r"\d{1,9}", length, re.ASCII):
                self.close_connection = True  # nobody knows where the body ends
                return self._send(b"", "text/plain", HTTPStatus.BAD_REQUEST)
            body = self.rfile.read(min(int(length), 1000))
            # a page of another site can send a form here, but no JSON
            if self.path != "/answer" or self.headers.get("Content-Type") != "application/json":
                return self._send(b"", "text/plain", HTTPStatus.NOT_FOUND)
            try:
                content = json.loads(body)
                number, choice = int(content["number"]), str(content["choice"])
                if choice not in CHOICES:
                    raise ValueError(choice)
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                return self._send(b"", "text/plain", HTTPStatus.BAD_REQUEST)
            try:
                human.take(number, choice)
            except OSError as error:
                told = f"the answer could not be written: {error.strerror}"
                return self._send(told.encode(), "text/plain", HTTPStatus.INTERNAL_SERVER_ERROR)
            self._send(json.dumps(human.present()).encode(), "application/json")

        def _send(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
            self.send_response(status)
            for name, value in {
                "Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store",
            }.items():  # fmt: skip
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """The terminal is the run's."""

    return Handler


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Which is better?</title>
<style>
  body { font: 16px sans-serif; text-align: center; margin: 2em auto; max-width: 44em; color: #222; }
  #clips { display: flex; justify-content: center; gap: 2em; }
  img { width: 20em; height: 20em; object-fit: contain; background: #eee; border-radius: 6px; }
  button { font: inherit; padding: .6em 1.4em; margin: 1em .5em; cursor: pointer; }
  #told { min-height: 1.5em; color: #666; }
</style>
<h1>Which of the two is better?</h1>
<div id="clips"><img id="clip0" alt="left clip"><img id="clip1" alt="right clip"></div>
<div>
  <button id="left">&larr; left</button>
  <button id="equal">&darr; equal</button>
  <button id="right">right &rarr;</button>
</div>
<p id="told"></p>
<script>
let number = null, sending = false;
const by = id => document.getElementById(id);
function show(now) {
  by("told").textContent = `${now.task}: ${now.answered} of ${now.labels} answered` +
    (now.number === null ? "; the agent is training, the next question comes by itself" : "");
  for (const id of ["left", "equal", "right"]) by(id).disabled = now.number === null;
  by("clips").style.visibility = now.number === null ? "hidden" : "visible";
  if (now.number !== number && now.number !== null)
    for (const side of [0, 1]) by("clip" + side).src = `/video/${now.number}/${side}`;
  number = now.number;
}
async function ask(path, options) {
  try {
    const reply = await fetch(path, options);
    if (!reply.ok) throw new Error(await reply.text());
    show(await reply.json());
  } catch (error) {
    by("told").textContent = `no answer from the run: ${error.message}`;
  }
}
async function choose(choice) {
  if (number === null || sending) return;
  sending = true;
  const body = JSON.stringify({number, choice});
  await ask("/answer", {method: "POST", headers: {"Content-Type": "application/json"}, body});
  sending = false;
}
for (const id of ["left", "equal", "right"]) by(id).onclick = () => choose(id);
const keys = {ArrowLeft: "left", ArrowDown: "equal", ArrowRight: "right"};
onkeydown = event => {
  if (!keys[event.key] || event.repeat) return;
  event.preventDefault();
  choose(keys[event.key]);
};
setInterval(() => { if (number === null && !sending) ask("/question"); }, 500);
ask("/question");
</script>
"""
