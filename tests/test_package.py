"""What the package says of itself: that it is typed, who made it, and the extras that messages name."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from zoo.common import folder

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_package_is_typed():
    assert (ROOT / "zoo" / "py.typed").read_bytes() == b""
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["zoo"]
    assert "Typing :: Typed" in PROJECT["project"]["classifiers"]


def test_every_package_is_installed():
    """A folder of zoo/ that pyproject.toml forgets would be missing from a wheel."""
    folders = {path.parent for path in (ROOT / "zoo").rglob("*.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_extras_that_are_named_exist():
    named = set()
    for path in [ROOT / "README.md", *ROOT.glob("scripts/*"), *ROOT.glob("zoo/**/*.py")]:
        if path.is_file():
            named |= set(re.findall(r"pip install -e '\.\[(\w+)\]'", path.read_text()))
    assert {"export", "video", "box2d", "plots"} <= named
    assert named <= PROJECT["project"]["optional-dependencies"].keys()


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    version, author = PROJECT["project"]["version"], PROJECT["project"]["authors"][0]["name"]
    assert f"\nversion: {version}\n" in citation and f'- name: "{author}"\n' in citation
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("tracked", [True, False])
def test_a_run_names_the_commit_of_the_zoo_and_of_no_repository_around_it(tmp_path, monkeypatch, tracked):
    """Installed into PROJECT/.venv it lies within the user's repository, whose commit says nothing of it."""
    installed = tmp_path / ".venv" / "site-packages" / "zoo" / "common" / "folder.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    (tmp_path / ".gitignore").write_text("" if tracked else ".venv/\n")
    named = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*named, "commit", "-q", "-m", "project"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(folder, "__file__", str(installed))
    folder.describe(tmp_path / "args.json", {}, "ppo", None)
    assert bool(json.loads((tmp_path / "args.json").read_text())["commit"]) == tracked
