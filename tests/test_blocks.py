"""Agent files stand alone: blocks duplicated between them are identical, and none of them imports another."""

import ast
import sys
from pathlib import Path

import pytest

import zoo

ZOO = Path(zoo.__file__).parent
AGENTS = sorted(path for path in ZOO.glob("*.py") if path.name != "__init__.py")
OWN = {"Args", "State", "train", "check", "check_task", "update", "SETTINGS"}  # these differ by design
OWN_OF = {  # what a policy is made of: without a critic, and in SAC without statistics; DPPO's denoises
    "grpo.py": {"policy_at", "make_policy"},
    "sac.py": {"acting", "policy_at", "make_policy"},
    "dppo.py": {"ActorCritic", "policy_at", "make_policy"},
}


def blocks(path):
    """A file's top-level functions, classes and constants: name to source, decorators included."""
    source = path.read_text()
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names, first = [target.id for target in targets if isinstance(target, ast.Name)], node.lineno
        else:
            continue
        text = "\n".join(lines[first - 1 : node.end_lineno])
        found |= {name: text for name in names if name not in OWN | OWN_OF.get(path.name, set())}
    return found


def drifted(paths):
    """Blocks of one name and several sources: {name: [files]}."""
    sources = {}
    for path in paths:
        for name, text in blocks(path).items():
            sources.setdefault(name, {}).setdefault(text, []).append(path.name)
    return {
        name: sorted(f for files in texts.values() for f in files)
        for name, texts in sources.items()
        if len(texts) > 1
    }


def foreign_imports(path):
    """The modules of the zoo, but zoo.common, that a file imports, under any of their names."""
    siblings, found = {agent.stem for agent in AGENTS}, []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(["zoo"] * bool(node.level) + [node.module] * bool(node.module))
            names = [f"zoo.{alias.name}" for alias in node.names] if module == "zoo" else [module]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first in siblings or (first == "zoo" and rest[:1] != ["common"]):
                found.append(name)
    return found


def test_there_are_agents():
    assert ZOO / "ppo.py" in AGENTS


def test_blocks_of_one_name_are_identical():
    assert drifted(AGENTS) == {}


FIRST = """
LIMIT = 3

class Args:
    a = 1

@once
def gae(x):
    # why
    return x + 1

def only_here(): pass
"""


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("", "", []),
        ("x + 1", "x + 2", ["gae"]),
        ("# why", "# because", ["gae"]),
        ("@once\n", "@twice\n", ["gae"]),
        ("LIMIT = 3", "LIMIT = 4", ["LIMIT"]),
        ("a = 1", "a = 2", []),
        ("only_here", "only_there", []),
    ],
)
def test_a_copy_that_drifts_is_caught(tmp_path, old, new, names):
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text(FIRST)
    two.write_text("import os\n" + FIRST.replace(old, new))
    assert drifted([one, two]) == {name: ["one.py", "two.py"] for name in names}


@pytest.mark.parametrize("agent", AGENTS, ids=lambda path: path.stem)
def test_agents_import_nothing_from_each_other(agent):
    assert foreign_imports(agent) == []


@pytest.mark.parametrize(
    "line",
    ["import ppo", "from ppo import gae", "import zoo.ppo", "from zoo.ppo import gae", "from zoo import ppo",
     "from .ppo import gae", "from . import ppo", "def f():\n    from zoo.ppo import gae"],
)  # fmt: skip
def test_an_import_of_an_agent_is_caught(tmp_path, line):
    path = tmp_path / "one.py"
    path.write_text(
        f"import torch\nfrom zoo.common.envs import make_envs\nfrom zoo.common import run\n{line}\n"
    )
    assert len(foreign_imports(path)) == 1


def test_no_agent_hides_a_standard_library_module():
    """`python zoo/ppo.py` puts zoo/ first on sys.path."""
    assert {path.stem for path in ZOO.iterdir()} & sys.stdlib_module_names == set()
