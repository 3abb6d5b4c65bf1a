"""Pages and tables of results are those of the committed records."""

import json
import re

import pytest

from benchmarks import render
from benchmarks._results import RESULTS, ROOT
from benchmarks.tables import TABLES


def test_regenerating_changes_nothing():
    """`python -m benchmarks.render` mends what this finds."""
    for path in render.documents():
        assert path.read_text() == render.filled(path.read_text(), path), path
    written = dict(render.pages(RESULTS))
    for path, text in written.items():
        assert path.read_text() == text, path
    # What a trace showed is in its page alone.
    assert {path for path in RESULTS.glob("*.md") if not path.name.startswith("profile_")} == written.keys()


@pytest.mark.parametrize("page", [render.README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_no_page_has_a_table_of_results_by_hand(page):
    text = page.read_text()
    committed = {line for name in TABLES for line in TABLES[name](RESULTS).splitlines() if re.search(r"\d\.\d", line)}
    outside = re.sub(r"<!-- results: .*?<!-- end -->", "", text, flags=re.DOTALL).splitlines()
    assert committed.isdisjoint(outside)


def test_every_table_stands_on_a_page():
    shown = {name for path in render.documents() for name in render.BEGIN.findall(path.read_text())}
    assert shown == set(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_a_number_changed_by_hand_is_put_right(name):
    path = ROOT / "docs" / "a" / "page.md"
    right = render.filled(f"above\n<!-- results: {name} -->\n<!-- end -->\nbelow\n", path)
    begin, table, end = re.fullmatch(r"(above\n<!--.*?-->)(.*)(<!-- end -->\nbelow\n)", right, re.DOTALL).groups()
    wrong = begin + re.sub(r"\d", "0", table) + end
    assert render.filled(wrong, path) == right
    for link in re.findall(r"\]\((.*?)\)", table):
        assert (path.parent / link).resolve().is_file()


def test_two_tables_and_what_stands_around_them_stay_in_order():
    text = "a\n<!-- results: verify -->\nx\n<!-- end -->\nb\n<!-- results: quickstart -->\n<!-- end -->\nc"
    around = re.split(r"<!-- results: .*?<!-- end -->", render.filled(text, ROOT / "README.md"), flags=re.DOTALL)
    assert around == ["a\n", "\nb\n", "\nc"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- results: speed -->\n<!-- end -->", "page.md asks for results of 'speed'; there are .*quickstart"),
        ("<!-- results: verify -->\n<!-- results: ntk -->\n<!-- end -->", "page.md: results of 'verify' have no"),
    ],
)
def test_a_marker_that_is_wrong_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        render.filled(text, ROOT / "page.md")


def test_what_the_readme_says_in_words_is_so():
    """Each of the theory's checks passed, and no corruption of a checkpoint went unseen."""
    report = json.loads((RESULTS / "verify" / "verify.json").read_text())
    assert all(row["passed"] for name, rows in report.items() if name.startswith("seed ") for row in rows)
    for text in (RESULTS / "fault_injection.jsonl").read_text().splitlines():
        record = json.loads(text)
        assert {end for _, end in record["damages"]} == {"harmless", "detected, the one before it used"}
        assert record["state_identical"]
        assert record["record_identical"]
        assert record["metrics_identical"]
