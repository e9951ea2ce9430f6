"""What the package says of itself: that it is typed, who made it, and the extras that messages name."""

import re
import tomllib
from pathlib import Path

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
