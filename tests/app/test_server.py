"""Protects the app as a visitor has it: a real server in a real browser, neither of which asks another host."""

import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from app_server import AppServer
from browser import find_browser
from PIL import Image
from repository import SCRIPTS
from tiny_predictors import write_image_model, write_text_model
from visitor import Visitor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed, which serves the app"),
    pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome is installed, in which the app is opened"),
]
IMPATIENT = """
from fa_transformers.app import uploads
from fa_transformers.commands.app import main

uploads.STORED_SECONDS, uploads.SWEEP_SECONDS = 4, 1
main()
"""
LONG = "The sea and the ship. A court of law is red, and blue. "


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    models = [
        str(write_text_model(folder / "letters", positions="periodic", rows=64)),
        str(write_image_model(folder / "scans")),
    ]
    with AppServer(SCRIPTS / "app.py", models, folder / "run") as server:
        yield server


@pytest.fixture(scope="module")
def visitors(tmp_path_factory):
    with Visitor(tmp_path_factory.mktemp("first")) as first, Visitor(tmp_path_factory.mktemp("second")) as second:
        yield first, second


@pytest.fixture
def visitor(visitors, server):
    """A visitor who has just come; what the page asked for is looked at when the test is over."""
    first, _ = visitors
    first.visit_app(server.address)
    yield first
    asked = first.asked + first.requests
    assert asked and all(address.startswith((server.address, "blob:")) for address in asked)
    assert not server.outside
    first.asked.clear()


def give_document(visitor: Visitor, path: Path) -> None:
    visitor.upload(path)
    visitor.wait_for(f"document.body.innerText.includes({json.dumps(path.stem)})")


def wait_until(happens: Callable[[], Any], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < until
        time.sleep(0.05)


def wait_for_page(visitor: Visitor, seconds: float = 90) -> str:
    """Wait for the page of an explanation inside the app, and return its address."""
    return visitor.wait_for(
        "[...document.querySelectorAll('.fa-result iframe')].find(one => one.offsetParent !== null)?.src", seconds
    )


def test_an_upload_gets_its_answer_and_a_page_with_the_passages_that_it_rests_on(visitor, server, tmp_path):
    path = tmp_path / "letter.txt"
    path.write_text(LONG * 20)
    give_document(visitor, path)
    visitor.press("Explain")
    assert "tokens read in" in visitor.result(".fa-facts")
    address = wait_for_page(visitor)
    assert visitor.ask("document.querySelectorAll('.fa-passages mark').length") == 5
    assert visitor.ask("getComputedStyle(document.querySelector('.fa-passages mark')).borderBottomWidth") == "2px"
    link = visitor.ask("document.querySelector('.fa-passages a').href")
    assert link.startswith(f"{address}#p")
    visitor.visit(link)
    passage = visitor.ask(f"document.querySelector('#{link.partition('#')[2]}').textContent")
    assert passage.strip() in LONG
    assert not visitor.complaints, "the page is complete and breaks no rule of its own"
    assert visitor.ask("(() => { try { return document.cookie } catch (error) { return error.name } })()") == (
        "SecurityError"
    ), "a page has an origin of its own"


def test_a_broken_file_is_a_message_and_the_next_document_works(visitor, tmp_path):
    path = tmp_path / "broken.pdf"
    path.write_bytes(b"%PDF-1.7 and no more")
    give_document(visitor, path)
    visitor.press("Explain")
    assert "broken.pdf" in visitor.result(".fa-error") and str(tmp_path) not in visitor.result(".fa-error")
    visitor.type_text("sea law. red ship.")
    visitor.wait_for("document.body.innerText.includes('Drop File Here')")
    visitor.press("Explain")
    wait_for_page(visitor)
    assert visitor.ask("document.querySelectorAll('.fa-error').length") == 0


def test_a_file_that_is_too_large_is_refused_before_it_is_kept(visitor, server, tmp_path):
    path = tmp_path / "large.txt"
    path.write_bytes(b"sea " * (6 * 2**20))
    kept = len(server.uploads)
    visitor.upload(path)
    visitor.wait_for("document.body.innerText.includes('exceed the maximum allowed size')")
    assert len(server.uploads) == kept


def test_a_document_of_a_hundred_thousand_tokens_is_read_whole(visitor, tmp_path):
    path = tmp_path / "code of law.txt"
    path.write_text(LONG * 7200)
    give_document(visitor, path)
    visitor.press("Explain")
    facts = visitor.result(".fa-facts", 300)
    assert int(facts.partition(" ")[0].replace(",", "")) > 100_000 and "not read" not in facts
    visitor.visit(wait_for_page(visitor, 300))
    assert visitor.ask("document.querySelector('#document').textContent.length") > 300_000


def test_two_visitors_at_once_get_their_own_results_and_see_no_file_of_the_other(visitors, visitor, server, tmp_path):
    _, second = visitors
    second.visit_app(server.address)
    texts = {}
    for number, one in enumerate((visitor, second)):
        texts[one] = f"visitor {number}. " + ("sea " if number else "law ") * (200 + number)
        path = tmp_path / f"of visitor {number}.txt"
        path.write_text(texts[one])
        give_document(one, path)
    visitor.press("Explain")
    second.press("Explain")
    pages = {one: wait_for_page(one) for one in (visitor, second)}
    assert pages[visitor] != pages[second]
    for number, one in enumerate((visitor, second)):
        assert f"of visitor {1 - number}" not in one.ask("document.body.innerText")
        with urllib.request.urlopen(pages[one]) as answer:
            page = answer.read().decode()
        assert f"visitor {number}" in page and f"visitor {1 - number}" not in page
    for path in server.uploads:  # even who knows where a file lies gets none, neither the other's nor their own
        for address in (f"gradio_api/file={path}", f"file={path}"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(server.address + urllib.parse.quote(address))
    modes = {path: path.parents[1].stat().st_mode for path in server.uploads}
    assert all(mode & 0o077 == 0 for mode in modes.values()), modes


def test_an_image_and_two_texts_are_answered(visitor, tmp_path):
    visitor.open_tab("Image")
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "scan.png")
    visitor.upload(tmp_path / "scan.png")
    visitor.wait_for("document.body.innerText.includes('scan')")
    visitor.press("Explain")
    assert "patches read" in visitor.result(".fa-facts")
    wait_for_page(visitor)
    visitor.open_tab("Compare")
    visitor.type_text("sea law", 0)
    visitor.type_text("sea law", 1)
    visitor.press("Compare")
    assert visitor.result(".fa-answer").startswith("1.000")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_app_fits_a_phone(scheme, visitor, server, tmp_path):
    visitor.visit_app(server.address, width=375, scheme=scheme)
    assert visitor.ask("document.querySelectorAll('.dark').length > 0") == (scheme == "dark")
    visitor.type_text(LONG * 5)
    visitor.press("Explain")
    wait_for_page(visitor)
    assert visitor.ask("document.scrollingElement.scrollWidth") <= 375


def test_a_request_that_names_a_file_of_the_server_is_refused(server):
    data = [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]
    body = json.dumps({"data": ["", *data, None, "sentence"], "fn_index": 0, "session_hash": "x"}).encode()
    request = urllib.request.Request(
        f"{server.address}gradio_api/queue/join", body, {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request)


def test_uploads_are_deleted_when_they_are_old_and_when_the_app_is_stopped(tmp_path, visitors):
    model, visitor = str(write_text_model(tmp_path / "letters")), visitors[0]
    path, other, script = tmp_path / "letter.txt", tmp_path / "other.txt", tmp_path / "app.py"
    path.write_text(LONG)
    other.write_text(LONG * 2)
    script.write_text(IMPATIENT)
    with AppServer(script, [model], tmp_path / "run") as server:
        visitor.visit_app(server.address)
        give_document(visitor, path)
        wait_until(lambda: server.uploads)
        wait_until(lambda: not server.uploads)
        visitor.press("Explain")
        assert "letter.txt: uploads are kept for" in visitor.result(".fa-error")
        visitor.press_cross()
        give_document(visitor, other)
        wait_until(lambda: server.uploads)
        assert server.stop() == 0 and not server.uploads, server.output
    assert os.listdir(tmp_path / "run" / "temporary") == []
