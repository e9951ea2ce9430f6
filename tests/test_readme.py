"""Every command of README.md is run, as it stands there but for its length, or covered elsewhere by name."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What is not run here, and where it is covered instead.
ELSEWHERE = {
    r"pip install .*": ".ci/run installs the package and its tests as the README says",
    r"pytest": ".ci/run",
    r"tensorboard --logdir runs": "serves until it is stopped; tests/test_run.py reads what it would show",
    r"python scripts/benchmark\.py --suite .*": "tests/test_scripts.py plans every suite and runs a stub's",
    r"python scripts/benchmark\.py --agent .*": "tests/test_scripts.py runs it with a stub",
    r"python scripts/speed\.py .*": "tests/test_scripts.py",
    r"python scripts/report\.py": "tests/test_report.py",
    r"python scripts/tune\.py .*": "tests/test_tune.py",
}
# What makes it short; a later argument wins.
SHORTER = {
    "zoo": ["--total-steps", "2048", "--no-compile", "--eval-episodes", "1", "--env-threads", "1"],
    "zoo/preferences.py": ["--total-steps", "8192", "--labels", "20", "--num-epochs", "1"],  # after zoo's
    "scripts/evaluate.py": ["--episodes", "1"],
    "scripts/watch.py": ["--seconds", "0.2", "--size", "32"],
    "scripts/plot.py": ["--out", "picture.png"],
}


def commands(text):
    """The commands of the ```sh blocks, without their comments, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    parts = [part for line in lines for part in re.sub(r"\s+#.*", "", line).split(" && ")]
    return [part.strip() for part in parts if part.strip() and not part.startswith("#")]


def test_commands_are_found():
    text = "```sh\na  # why\nb && c 'd e' \\\n  f\n```\n```python\nno\n```\n```sh\n# no\ng\n```\n"
    assert [" ".join(command.split()) for command in commands(text)] == ["a", "b", "c 'd e' f", "g"]


def run(command, folder, monkeypatch):
    """Run one command in this process, which spares it the imports; its exit status."""
    words = shlex.split(command)
    while "=" in words[0]:
        name, value = words.pop(0).split("=", 1)
        if name == "PYTHONPATH":
            monkeypatch.syspath_prepend(str(folder / value))
        else:
            monkeypatch.setenv(name, value)
    assert words.pop(0) == "python", f"{command}: neither run here nor covered elsewhere"
    script = words[0]
    trained = sorted(folder.glob("runs/HalfCheetah-v4__ppo__*"))
    for i, word in enumerate(words):
        missing = word.startswith("results/") and not (folder / word).exists()
        if missing or re.fullmatch(r"(runs/)?([\w-]+__\.\.\.|MY_RUN|RUN)", word):
            words[i] = str(trained[0])
    if script == "scripts/watch.py" and "--video" not in words:
        words += ["--video", "watched.gif"]  # there may be no display
    more = (SHORTER["zoo"] if script.startswith("zoo/") else []) + SHORTER.get(script, [])
    monkeypatch.setattr(sys, "argv", words + more)
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


def test_every_command_runs(tmp_path, monkeypatch, capsys):
    for name in ("zoo", "scripts", "results"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for name, value in (("MUJOCO_GL", "egl"), ("SDL_VIDEODRIVER", "dummy")):
        monkeypatch.setenv(name, value)
    found = commands((ROOT / "README.md").read_text())
    assert len(found) > 10
    failed = []
    for command in found:
        if any(re.fullmatch(pattern, command) for pattern in ELSEWHERE):
            continue
        if "scripts/watch.py" in command and not _draws():
            continue
        with monkeypatch.context() as patch:
            status = run(command, tmp_path, patch)
        told = capsys.readouterr()
        if status:
            failed.append(f"{command}: {told.err}")
    assert failed == []


def _draws():
    """Whether MuJoCo can draw here; tests/test_watch.py says why not."""
    try:
        from mujoco.egl import GLContext

        GLContext(8, 8).free()
    except Exception:
        return False
    return True


@pytest.mark.parametrize("pattern", ELSEWHERE)
def test_what_is_covered_elsewhere_is_in_the_readme(pattern):
    """Else the list of exceptions outlives them."""
    found = commands((ROOT / "README.md").read_text())
    assert any(re.fullmatch(pattern, command) for command in found)
