"""zoo/README.md: every file, function and changed line that it names is there, and every agent is named."""

import ast
import re
from pathlib import Path

import pytest

import zoo

ZOO = Path(zoo.__file__).parent
TEXT = (ZOO / "README.md").read_text()
STEP = re.compile(r"^### \d+\. .*?\[`(\w+\.py)`\]\(\1\)$", re.MULTILINE)


def steps(text):
    """(the agent's file, the step's text) of each numbered heading."""
    found = list(STEP.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    return [(match[1], text[match.end() : end]) for match, end in zip(found, ends, strict=True)]


def names(path):
    """The functions and classes of a file."""
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)}


def unknown(file, text, folder=ZOO):
    """The names in `backticks` of a step that its file does not define; tasks are told by their capitals."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    named = re.findall(r"`([a-z]\w+|SquashedGaussian)`", prose)
    return sorted(set(named) - names(folder / file) - {"line", "ring", "gap"})


def missing_lines(text, folder=ZOO):
    """Lines of the diffs that are in neither of the two files that they name."""
    lost = []
    for old, new, body in re.findall(r"^```diff\n--- (\S+)\n\+\+\+ (\S+)\n(.*?)^```", text, re.M | re.S):
        for line in body.splitlines():
            source = (folder / {"-": old, "+": new}[line[0]]).read_text().splitlines()
            if line[1:] not in source:
                lost.append(line)
    return lost


def dead_links(text, folder=ZOO):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    return [link for link in links if "://" not in link and not (folder / link).exists()]


def test_every_function_named_is_in_its_file():
    assert [(file, unknown(file, text)) for file, text in steps(TEXT) if unknown(file, text)] == []


def test_every_changed_line_is_in_its_file():
    assert TEXT.count("```diff") == len(re.findall(r"^```diff\n--- \S+\n\+\+\+ \S+\n", TEXT, re.M)) > 5
    assert missing_lines(TEXT) == []


def test_every_link_leads_somewhere():
    assert dead_links(TEXT) == []


def test_the_tour_ends_only_with_the_last_agent():
    agents = {path.name for path in ZOO.glob("*.py")} - {"__init__.py"}
    assert {file for file, _ in steps(TEXT)} == agents


def test_every_step_has_an_equation_and_says_where_it_stands():
    for file, text in steps(TEXT):
        assert re.search(r"^    .*=|^    .*\[", text, re.M), file
        assert re.search(r"\bS[034] \(?[A-Z\d]", text), file


def test_the_style_is_told_in_fifteen_lines_with_code_that_stands_in_ppo():
    told = TEXT.split("## How a file reads\n")[1].split("\n## ")[0]
    prose = re.sub(r"^```.*?^```", "", told, flags=re.M | re.S)
    assert len([line for line in prose.splitlines() if line]) <= 15
    ours = re.findall(r"^```python\n(.*?)^```", told, re.M | re.S)[1]
    source = [line.strip() for line in (ZOO / "ppo.py").read_text().splitlines()]
    assert [line for line in ours.splitlines() if line not in source] == []


@pytest.mark.parametrize(
    ("check", "old", "new"),
    [
        (lambda text, folder: unknown("a.py", text, folder), "`first`", "`frist`"),
        (missing_lines, "+    return 2", "+    return 3"),
        (missing_lines, "-    return 1", "-    return 0"),
        (dead_links, "](a.py)", "](c.py)"),
    ],
)
def test_what_is_not_there_is_caught(tmp_path, check, old, new):
    (tmp_path / "a.py").write_text("def first():\n    return 1\n")
    (tmp_path / "b.py").write_text("def first():\n    return 2\n")
    diff = "```diff\n--- a.py\n+++ b.py\n-    return 1\n+    return 2\n```\n"
    text = f"### 1. X: [`a.py`](a.py)\n\n`first`\n\n{diff}"
    assert check(text, tmp_path) == []
    assert len(check(text.replace(old, new), tmp_path)) == 1
