"""What a night leaves for people and programs: HTML, Markdown, JSON lines, JUnit XML."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from dora_core.nightly.judge import judge_night
from dora_core.nightly.page import html_page
from dora_core.nightly.texts import exit_status, jsonl, junit, markdown
from dora_core.nightly.trend import trend_plot

HOSTILE = "</style><script>alert(1)</script> & \"quoted\" | 'x' \x00 雪"
VOID = {"meta"}


class Page(HTMLParser):
    """Checks that elements close in order, and keeps tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def rows(history, planned, measured, measurement):
    """A second night: hostile texts, one red, one yellow, one grey, one broken."""
    entry, lost, late = planned(overrides={"run.seed": 3}), planned(name="lost"), planned(name="late")
    first = measured(
        measurement(outcomes=[1] * 40),
        measurement(2.0, metric="toy/speed:x", stderr=0.01),
        measurement(0.5, metric="toy/calm:x"),
    )
    history.add_run("2026-01-01", "2026-01-01T03:00:00", "toy", "tiny", first)
    judge_night(history, "2026-01-01", [entry], {"toy/tiny": first}, {})
    quiz = measurement(outcomes=[0] * 15 + [1] * 25)
    example = quiz.outcomes[0]
    quiz.outcomes[0] = type(example)(0.0, HOSTILE, HOSTILE, HOSTILE)
    run = measured(
        quiz,
        measurement(3.0, metric="toy/speed:x", stderr=0.01),
        measurement(0.5, metric="toy/calm:x"),
        config={"model": {"path": HOSTILE}},
        commit=HOSTILE,
    )
    history.add_run("2026-01-02", "2026-01-02T03:00:00", "toy", "tiny", run)
    return judge_night(history, "2026-01-02", [entry, late, lost], {"toy/tiny": run}, {"toy/lost": HOSTILE})


def test_the_page_is_well_formed_self_contained_and_escaped(rows):
    text = html_page(rows, "n")
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "a"} & set(page.tags)
    assert not re.search(r"https?://|url\(|@import|src=|href=", text)
    assert "<script>alert(1)" in page.text  # shown, not run
    assert ("name", "viewport") in page.attributes and "prefers-color-scheme: dark" in text
    assert text.startswith("<!DOCTYPE html>") and page.tags.count("style") == 1


def test_the_page_has_the_worst_first_trends_flips_commands_and_the_control(rows):
    text = html_page(rows, "n")
    page = Page(text)
    verdicts = re.findall(r'<article class="(\w+)"', text)
    assert verdicts == ["broken", "red", "yellow", "grey", "green", "green"]
    assert page.tags.count("svg") == 4  # not of the two runs that did not take place
    assert "15 examples flipped: 15 worse, 0 better" in page.text
    assert page.text.count("deepspeed --num_gpus 1 pipelines/toy/train.py --config tiny") == 6
    assert "--run.seed 3" in page.text and "Holm" in page.text
    assert "model.path" in page.text  # what changed since the reference night


def test_the_plot_marks_each_night_with_its_verdict(rows):
    red = next(row for row in rows if row.verdict == "red")
    svg = ElementTree.fromstring(trend_plot(red))
    assert [dot.get("class") for dot in svg.iter("circle")] == ["green", "red"]
    height, width = 96, 320
    for dot in svg.iter("circle"):
        assert 0 < float(dot.get("cx")) < width and 0 < float(dot.get("cy")) < height
    first, last = svg.iter("circle")
    assert float(first.get("cx")) < float(last.get("cx")) and float(first.get("cy")) < float(last.get("cy"))


def test_json_lines_have_provenance_and_junit_counts_add_up(rows):
    records = [json.loads(line) for line in jsonl(rows, "n").splitlines()]
    assert [record["verdict"] for record in records] == [row.verdict for row in rows]
    own = next(record for record in records if record["verdict"] == "red")
    assert own["hardware"] and own["config_hash"] and own["data_hash"] and own["versions"]["torch"]
    assert own["flipped"] == list(range(15))
    root = ElementTree.fromstring(junit(rows, "n"))
    assert root.tag == "testsuites"
    for suite in root:
        cases = suite.findall("testcase")
        assert int(suite.get("tests")) == len(cases)
        for kind, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(suite.get(kind)) == len(suite.findall(f"testcase/{tag}"))
    assert {suite.get("name"): suite.get("errors") for suite in root}["toy/lost"] == "1"


def test_markdown_is_one_table_and_nothing_breaks_out_of_it(rows):
    text = markdown(rows, "n")
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(rows)
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 8 for line in table)
    assert "<script" not in text


def test_the_exit_status_is_that_of_the_worst_row(rows):
    assert exit_status(rows) == 3
    assert exit_status([row for row in rows if row.verdict != "broken"]) == 1
    assert exit_status([row for row in rows if row.verdict not in ("broken", "red")]) == 0
