"""Protects the report page: nothing from data is ever markup, nothing is fetched, and it can be read everywhere."""

import base64
import hashlib
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from browser import Browser, find_browser
from echo_answers import answer
from hostile_page import HOSTILE, build_state, build_summary, write_hostile_page
from page_checks import CONTRAST, ParsedPage
from PIL import Image

from fa_transformers.pages.page import render
from fa_transformers.tables import one_line
from fa_transformers.training.report import write_page_of
from fa_transformers.training.report_page import (
    class_sections,
    confusion_sections,
    errors_section,
    length_sections,
    make_page,
    network_page,
)

TAGS = {
    "html", "head", "meta", "link", "title", "style", "body", "header", "h1", "p", "dl", "div", "dt", "dd", "main",
    "section", "h2", "figure", "figcaption", "b", "span", "svg", "line", "text", "polyline", "circle", "table", "thead",
    "tbody", "tr", "th", "td", "pre", "code", "img",
}  # fmt: skip


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    more = {
        "by_length": [{"tokens": 512, HOSTILE[0]: 0.5}],
        "command": f"run --x '{HOSTILE[1]}' --train_file /secret/place/mine.csv",
        "interval_notes": ["the first", HOSTILE[2]],
    }
    return write_hostile_page(tmp_path_factory.mktemp("page"), **more)


def test_no_text_from_data_is_markup(hostile):
    parsed = ParsedPage(hostile)
    assert not parsed.open, "every tag is closed"
    assert {tag for tag, _ in parsed.tags} <= TAGS
    attributes = {name for _, given in parsed.tags for name in given}
    assert not {name for name in attributes if name.startswith("on") or name in ("style", "href", "action")} - {"href"}
    fetched = [given[name] for _, given in parsed.tags for name in ("src", "href") if name in given]
    assert fetched and all(address.startswith("data:") for address in fetched)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", parsed.page)
    texts = {text.strip() for text in parsed.texts}
    for text in HOSTILE:
        assert one_line(text, 40) in texts, "shown as it is"
    assert f"Text classification: {HOSTILE[1]}" in texts
    assert "/secret" not in parsed.page and "mine.csv" in parsed.page and str(hostile.parent) not in parsed.page


def test_the_policy_allows_the_own_style_and_nothing_else(hostile):
    page = hostile.read_text(encoding="utf-8")
    (policy,) = [given["content"] for tag, given in ParsedPage(hostile).tags if "http-equiv" in given]
    (style,) = re.findall(r"<style>(.*?)</style>", page, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    assert page.index("Content-Security-Policy") < page.index("<style>") and "url(" not in style


def test_of_many_classes_the_pairs_that_are_confused_most_are_listed():
    names = [f"class {index}" for index in range(100)]
    matrix = np.diag([5] * 100)
    matrix[3, 7], matrix[9, 1] = 4, 8
    (section,) = confusion_sections({"confusion_matrix": matrix.tolist()}, names)
    assert section.matrix is None
    assert section.table.rows == [["class 9", "class 1", 8], ["class 3", "class 7", 4]]
    (section,) = confusion_sections({"confusion_matrix": np.diag([5] * 100).tolist()}, names)
    assert section.text == ["None of the 100 classes was taken for another one."]
    pairs = [{"true": "a", "predicted": "b", "count": 3}]
    (section,) = confusion_sections({"most_confused": pairs}, names * 20)
    assert section.table.rows == [["a", "b", 3]]
    assert confusion_sections({}, ["one of several labels"]) == []
    (section,) = confusion_sections({"confusion_matrix": [[1] * 30] * 30}, names[:30])
    assert section.matrix.names == names[:30] and section.table is None


def test_one_class_is_said_plainly(tmp_path):
    page = ParsedPage(write_hostile_page(tmp_path / "one", ["only"], num_rows=3))
    assert any("one class, so that no answer can be wrong" in text for text in page.texts)
    assert "Every scored example was answered right." in page.texts


def test_the_worst_of_very_many_classes_have_a_row_each():
    per_class = [{"label": str(index), "f1": index / 1000, "support": index % 2} for index in range(1000)]
    (section,) = class_sections({"per_class": per_class})
    assert [row[0] for row in section.table.rows] == [str(index) for index in range(1, 200, 2)]
    assert "1,000 classes" in section.text[0]


def test_scores_by_length_count_every_example_once():
    lengths = [3, 64, 65, 128, 129, 500, 1000, 1024, 4096, 4096]
    labels = np.array([0, 1] * 5)
    logits = np.eye(2)[[0] * 10]
    scored, _ = answer("single_label_classification", logits, ["a", "b"], labels, lengths, labels=labels.tolist())
    (section, cut) = length_sections(scored, {"by_length": [{"tokens": 512, "accuracy": 0.5}]}, 4096)
    assert [row[:3] for row in section.table.rows] == [
        ["1 to 64", 2, 0.5], ["65 to 128", 2, 0.5], ["129 to 256", 1, 1.0], ["257 to 512", 1, 0.0],
        ["513 to 1,024", 2, 0.5], ["2,049 to 4,096", 2, 0.5],
    ]  # fmt: skip
    assert section.text == ["2 of them reach 4,096 tokens, where documents are cut."]
    assert (cut.table.columns, cut.table.rows) == (["tokens", "accuracy"], [[512, 0.5]])
    assert length_sections(scored, {}, None) == []


def test_numbers_and_images_have_their_worst_errors(tmp_path):
    logits = np.arange(30.0)[:, None]
    true = np.zeros(30, np.float32)
    scored, _ = answer("regression", logits, [], true, labels=true.tolist())
    table = errors_section(scored).table
    assert list(table.columns) == ["row", "true", "predicted", "error"] and len(table.rows) == 25
    assert table.rows[0] == [30, 0.0, 29.0, 29.0]
    paths = []
    for index in range(4):
        (tmp_path / f"{index}").mkdir()
        paths.append(tmp_path / f"{index}" / "<b>.png")
        Image.new("RGB", (300, 200), (60 * index, 0, 0)).save(paths[-1])
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": list(map(str, paths))}, features=features)
    labels = np.array([0, 1, 0, 1])
    scored, _ = answer(
        "single_label_classification", np.eye(2)[[0] * 4], ["a", "b"], labels, rows=rows, labels=labels.tolist()
    )
    table = errors_section(scored).table
    assert [row[-1] for row in table.rows] == ["1/<b>.png", "3/<b>.png"]
    assert all(row[0].uri.startswith("data:image/jpeg;base64,") for row in table.rows)
    paths[3].unlink()
    assert errors_section(scored).table.rows[1][0] is None


def test_a_network_shows_its_pictures_and_scores_without_a_value(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (3000, 1000)).save(tmp_path / "pictures" / "1.png")
    state, scores = build_state(), {"box_ap": 0.25, "box_ap50": 0.5, "num_examples": 3}
    per_class = [{"label": "<i>", "box_ap": None}]
    summary = build_summary(scores, state, task="instance-segmentation", per_class=per_class)
    summary["baselines"] = {"a guess": {"box_ap": 0.0}}
    page = render(network_page(summary, state, "digits", torch.device("cpu"), tmp_path))
    assert 'alt="pictures/1.png"' in page and len(page) < 60_000
    assert "&lt;i&gt;" in page and "<i>" not in page and "0.250" in page
    assert "find = pipeline(&#34;image-segmentation&#34;" in page


def test_a_page_that_cannot_be_built_is_a_warning_and_no_page_of_an_earlier_run_stays(tmp_path, caplog):
    (tmp_path / "report.html").write_text("earlier")
    write_page_of(tmp_path, lambda: make_page("x", {}, "d", "accuracy", []))
    assert "report.html was not drawn: KeyError" in caplog.text and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome is installed: apt install chromium")
def test_a_browser_shows_it_in_light_and_dark_wide_and_narrow_and_asks_for_nothing(hostile, tmp_path):
    with Browser(tmp_path) as browser:
        grounds = set()
        for width in (1280, 390):
            for scheme in ("light", "dark"):
                browser.open(hostile, width, scheme)
                assert browser.requests == [] and browser.complaints == []
                assert browser.ask("document.documentElement.scrollWidth") <= width
                assert browser.ask("document.querySelectorAll('script, iframe, img').length") == 0
                ratio, element = browser.ask(CONTRAST)
                assert ratio >= 4.5, element  # WCAG 2.2, AA
                grounds.add(browser.ask("getComputedStyle(document.body).backgroundColor"))
                assert browser.ask("getComputedStyle(document.querySelector('.box')).overflowX") == "auto"
        assert len(grounds) == 2, "light and dark"
