"""zoo/THEORY.md and the tests of this folder name each other."""

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "zoo" / "THEORY.md").read_text()


def test_the_page_lists_every_test_and_no_other():
    tests = {
        name
        for file in HERE.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    tests -= set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(), re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert not tests - named and not named - tests, (tests - named, named - tests)


def test_the_pages_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#:]+)\)", PAGE)
    assert "common/kl.py" in targets
    missing = [target for target in targets if not (HERE.parents[1] / "zoo" / target).exists()]
    assert not missing


def test_every_item_has_a_verdict():
    rows = re.findall(r"^\| (\d+) \| (.+) \| (.+) \| (.+) \| (.+) \|$", PAGE, re.MULTILINE)
    assert {int(row[0]) for row in rows} == set(range(10, 57))
    assert all(re.match("holds|corrected|fails", row[3]) for row in rows), rows
    for item, *_, tests in rows:
        assert f"test_{item}_" in tests
