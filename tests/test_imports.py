"""No two files of zoo/common import each other, not even for a type or within a function."""

import ast
from pathlib import Path

import pytest

import zoo.common

COMMON = Path(zoo.common.__file__).parent


def imports(path):
    """The files of zoo/common that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(["zoo.common"] * bool(node.level) + [node.module] * bool(node.module))
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "zoo.common" else [module]
        else:
            continue
        found |= {name.split(".")[2] for name in names if name.startswith("zoo.common.")}
    return found


def circles(folder):
    """The files that import each other, over any number of others between them."""
    reached = {path.stem: imports(path) for path in folder.glob("*.py")}
    for _ in reached:
        reached = {
            name: names.union(*(reached.get(each, set()) for each in names))
            for name, names in reached.items()
        }
    return sorted(name for name, names in reached.items() if name in names)


def test_files_do_not_import_each_other():
    assert {"cli", "run", "envs"} <= {path.stem for path in COMMON.glob("*.py")}
    assert circles(COMMON) == []


@pytest.mark.parametrize(
    "line", ["import zoo.common.a", "from zoo.common.a import x", "from zoo.common import a",
             "from . import a", "from .a import x", "def f():\n    import zoo.common.a",
             "if TYPE_CHECKING:\n    from zoo.common.a import x"],
)  # fmt: skip
def test_a_circle_is_caught(tmp_path, line):
    (tmp_path / "a.py").write_text("import zoo.common.c")
    (tmp_path / "b.py").write_text(line)
    (tmp_path / "c.py").write_text("import torch")
    assert circles(tmp_path) == []
    (tmp_path / "c.py").write_text("import zoo.common.b")
    assert circles(tmp_path) == ["a", "b", "c"]
