"""Protects the pages of explanations: nothing from a document is markup, nothing is fetched, and all of it is there."""

import base64
import hashlib
import html
import json
import re

import numpy as np
import pytest
from browser import Browser, find_browser
from explanations import explain_sentences, hostile_explanation, image_explanation, long_explanation
from hostile_page import HOSTILE
from page_checks import CONTRAST, ParsedPage
from PIL import Image

from fa_transformers.charts import HIGHLIGHT
from fa_transformers.prediction.explanation_chart import draw_explanation
from fa_transformers.prediction.explanation_page import (
    FOR,
    NUM_TOP,
    STEPS,
    Entry,
    parts_of,
    step_of,
    write_explanation,
    write_index,
)
from fa_transformers.tables import harmless_text, one_line

TAGS = {
    "html", "head", "meta", "link", "title", "style", "body", "header", "h1", "p", "dl", "div", "dt", "dd", "main",
    "section", "h2", "figure", "figcaption", "b", "span", "svg", "line", "text", "polyline", "circle", "table", "thead",
    "tbody", "tr", "th", "td", "form", "label", "select", "option", "button", "output", "ol", "li", "a", "small",
    "canvas", "i", "script", "image", "g", "rect", "input", "img",
}  # fmt: skip
needs_browser = pytest.mark.skipif(
    find_browser() is None, reason="no Chromium or Chrome is installed: apt install chromium"
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    write_explanation(hostile_explanation(), folder / "document.html")
    write_explanation(image_explanation(HOSTILE[1], tuple(HOSTILE[:2])), folder / "image.html")
    return folder


@pytest.mark.parametrize("name", ["document", "image"])
def test_no_text_from_data_is_markup(pages, name):
    parsed = ParsedPage(pages / f"{name}.html")
    assert not parsed.open, "every tag is closed"
    assert {tag for tag, _ in parsed.tags} <= TAGS
    attributes = {attribute for _, given in parsed.tags for attribute in given}
    assert not {one for one in attributes if one.startswith("on") or one in ("style", "action", "srcdoc")}
    fetched = [given[key] for _, given in parsed.tags for key in ("src", "href") if key in given]
    assert all(re.match(r"data:|#[pr]\d+$", address) for address in fetched)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", parsed.page)
    assert len(re.findall("</script", parsed.page)) == 2, "the data and the script"
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', parsed.page, re.DOTALL)[1]
    assert "<" not in data and ">" not in data and json.loads(data)["scores"]
    assert any(one_line(HOSTILE[1]) in text for text in parsed.texts)


def test_the_policy_allows_the_own_style_and_script_and_nothing_else(pages):
    page = (pages / "document.html").read_text(encoding="utf-8")
    (policy,) = re.findall(r'Security-Policy" content="(.*?)"', page)
    digests = []
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digests.append(base64.b64encode(hashlib.sha256(content.encode()).digest()).decode())
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digests[0]}'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src 'sha256-{digests[1]}'"
    )


def test_the_whole_text_is_in_the_page_and_parts_end_between_lines(tmp_path):
    explanation = explain_sentences([f"Sentence {number} < {number + 1}." for number in range(1000)], ["a", "b"], "d")
    write_explanation(explanation, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    inside = re.search(r'<div id="document".*?>(.*)<div class="map"', page, re.DOTALL)[1]
    inside = re.sub(r'<small class="page">.*?</small>', "", inside)
    parts = re.findall(r'<div class="part" dir="auto">\n?(.*?)</div>', inside, re.DOTALL)
    text = "".join(html.unescape(re.sub(r"<[^>]*>", "", part)) for part in parts)
    assert text == harmless_text(explanation.text)
    found = list(parts_of(explanation))
    assert 3 < len(found) < 20 and [part.start for part in found] == sorted(part.start for part in found)
    assert all(explanation.text[part.start - 1] == "\n" for part in found[1:])


def test_steps_of_colour_follow_the_share_of_the_largest_score():
    assert step_of(np.array([1.0, -1.0, 0.5, 0.04, -0.06, 0.0])).tolist() == [STEPS, -STEPS, 3, 0, -1, 0]
    assert step_of(np.zeros(3)).tolist() == [0, 0, 0]


def test_pages_and_charts_have_one_colour(pages):
    assert tuple(bytes.fromhex(HIGHLIGHT[1:])) == FOR
    assert f"--accent: {HIGHLIGHT}" in (pages / "image.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("make", [hostile_explanation, image_explanation])
def test_the_picture_is_drawn_whatever_the_names_are(make, tmp_path):
    draw_explanation(make(), tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as image:
        assert image.width == 1320 and np.unique(np.asarray(image.convert("L"))).size > 20


def test_an_index_leads_to_its_pages_and_names_what_has_none(tmp_path):
    entries = [Entry(text, f"{number:06}.html", HOSTILE[0], 0.5, 7) for number, text in enumerate(HOSTILE)]
    write_index(tmp_path, HOSTILE[1], entries, [(HOSTILE[2], HOSTILE[3])])
    parsed = ParsedPage(tmp_path / "index.html")
    links = [given["href"] for tag, given in parsed.tags if tag == "a"]
    assert links == [entry.page for entry in entries]
    assert HOSTILE[3] in parsed.texts and "<script>" not in parsed.page


@pytest.mark.slow
@needs_browser
def test_a_browser_opens_a_document_of_100000_tokens_at_once_and_scrolls_it(tmp_path):
    path = tmp_path / "long.html"
    write_explanation(long_explanation(), path)
    with Browser(tmp_path / "browser") as browser:
        for width in (1280, 390):
            browser.open(path, width)
            took = browser.ask("performance.getEntriesByType('navigation')[0].loadEventEnd")
            assert took < 2000, f"{took:.0f} ms to open"
            assert browser.requests == [] and browser.complaints == []
            assert browser.ask("document.documentElement.scrollWidth") <= width
            frames = browser.ask_later(
                """new Promise(done => { const times = []; let last = performance.now();
                const go = () => { const now = performance.now(); times.push(now - last); last = now;
                  scrollBy(0, 400); if (times.length < 60) requestAnimationFrame(go); else done(times.slice(2)); };
                requestAnimationFrame(go); })"""
            )
            assert sorted(frames)[len(frames) // 2] < 34, "half of the frames within two of a screen's"
            changed = browser.ask(
                """(() => { const start = performance.now(), select = document.getElementById('method');
                select.value = 'rollout'; select.dispatchEvent(new Event('change')); document.body.offsetHeight;
                return performance.now() - start; })()"""
            )
            assert changed < 1000, f"{changed:.0f} ms for another method"


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_pages_in_light_and_dark_wide_and_narrow_and_asks_for_nothing(pages, tmp_path):
    with Browser(tmp_path) as browser:
        for name in ("document", "image"):
            grounds = set()
            for width in (1280, 390):
                for scheme in ("light", "dark"):
                    browser.open(pages / f"{name}.html", width, scheme)
                    assert browser.requests == [] and browser.complaints == []
                    assert browser.ask("document.documentElement.scrollWidth") <= width
                    ratio, element = browser.ask(CONTRAST)
                    assert ratio >= 4.5, element  # WCAG 2.2, AA
                    grounds.add(browser.ask("getComputedStyle(document.body).backgroundColor"))
            assert len(grounds) == 2, "light and dark"


@pytest.mark.slow
@needs_browser
def test_a_reader_goes_by_keys_and_links_and_chooses_label_method_and_layer(pages, tmp_path):
    with Browser(tmp_path) as browser:
        browser.open(pages / "document.html", 1280)
        first = browser.ask("document.querySelector('#top a').hash.slice(1)")
        browser.ask("document.getElementById('document').focus()")
        for key, place in (("n", "1 of 10"), ("n", "2 of 10"), ("p", "1 of 10")):
            browser.press(key)
            assert browser.ask("document.getElementById('place').textContent") == place
        assert browser.ask("document.activeElement.id") == first, "the passage has the focus"
        browser.ask("document.querySelectorAll('#top a')[4].click()")
        assert browser.ask("document.activeElement.id === document.querySelectorAll('#top a')[4].hash.slice(1)")
        top = browser.ask_later(
            "new Promise(done => setTimeout(() => done(document.activeElement.getBoundingClientRect().top), 300))"
        )
        assert -10 < top < 900, "and is in sight"
        choose = (
            "(() => {{ const one = document.getElementById('{0}'); one.value = '{1}'; "
            "one.dispatchEvent(new Event('change')); }})()"
        )
        tops = set()
        for name, value in (
            ("method", "gradient_x_input"),
            ("label", "1"),
            ("method", "rollout"),
            ("method", "rows"),
            ("layer", "0"),
        ):
            browser.ask(choose.format(name, value))
            tops.add(browser.ask("document.getElementById('top').textContent"))
            count = browser.ask("document.querySelectorAll('#document [data-rank]').length")
            assert count == NUM_TOP and browser.ask("document.querySelectorAll('#top a').length") == NUM_TOP
            measured = browser.ask("[...document.querySelectorAll('.curve')].filter(one => !one.hidden).length")
            hidden = browser.ask("document.getElementById('unmeasured').hidden")
            assert (measured, hidden) == ((0, False) if value in ("rows", "0") else (1, True))
        assert len(tops) == 5, "each has scores of its own"
        assert browser.complaints == []
        browser.open(pages / "image.html", 1280)
        browser.ask(choose.format("opacity", "20").replace("'change'", "'input'"))
        assert browser.ask("getComputedStyle(document.querySelector('.overlay')).opacity") == "0.2"
        browser.ask(choose.format("method", "rollout"))
        assert browser.ask("document.querySelectorAll('.overlay:not(.away)').length") == 1
        browser.ask(choose.format("maps", "1"))
        assert browser.ask("[...document.querySelectorAll('.maps')].map(one => one.hidden).join()") == "true,false"


@pytest.mark.slow
@needs_browser
def test_in_black_and_white_print_the_signs_differ_by_their_lines(pages, tmp_path):
    with Browser(tmp_path) as browser:
        browser.open(pages / "document.html", 800)
        browser.call("Emulation.setEmulatedMedia", media="print", features=[])
        ask = "getComputedStyle(document.querySelector('{}')).{}"
        assert browser.ask(ask.format("#document .f3", "textDecorationStyle")) == "solid"
        assert browser.ask(ask.format("#document .a3", "textDecorationStyle")) == "wavy"
        assert browser.ask(ask.format("#document .f3", "backgroundColor")) == "rgba(0, 0, 0, 0)"
        assert browser.ask(ask.format(".controls", "display")) == "none"
        assert browser.ask(ask.format(".part", "contentVisibility")) == "visible"
