"""Protects what the app's buttons do: answers come with their ground, mistakes are shown, nothing given is markup."""

import re

import numpy as np
import pytest
from PIL import Image
from tiny_predictors import NUMBER, SEVERAL, make_texts, write_image_model, write_text_model

from fa_transformers import Predictor
from fa_transformers.app.models import MAX_TOKENS, AppError, Models, find_models
from fa_transformers.app.page_store import PageStore
from fa_transformers.app.requests import QUESTION, THOROUGH_TOKENS, TWO_TEXTS, Requests
from fa_transformers.app.uploads import MAX_CHARACTERS, MAX_FILE_BYTES, message_of
from fa_transformers.prediction.similarity import TextEncoder

HOSTILE = "<img src=x onerror=alert(1)>"


def make_requests(folder, **fields) -> Requests:
    text = Predictor.from_pretrained(write_text_model(folder, **fields))
    return Requests(Models(text=text, encoder=TextEncoder.of_predictor(text)), PageStore())


@pytest.fixture(scope="module")
def requests(tmp_path_factory) -> Requests:
    made = make_requests(tmp_path_factory.mktemp("text"))
    made.models = Models(
        made.models.text,
        Predictor.from_pretrained(write_image_model(tmp_path_factory.mktemp("image"))),
        made.models.encoder,
        licences={"short": "sea law. red ship."},
    )
    return made


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "letter.txt"
    path.write_text(". ".join(make_texts(20)))
    return path


def only(results) -> str:
    (result,) = results
    return result


def page_of(requests: Requests, result: str) -> str:
    (token,) = set(re.findall(r"pages/([\w-]{32})", result))
    return requests.pages.find(token).decode()


def test_a_document_gets_its_answer_and_then_passages_that_link_to_their_places_in_its_page(requests, document):
    first, second = requests.document("", str(document), None, "sentence")
    answer = requests.models.text(document.read_text())
    head = first.partition('<p class="fa-note">')[0]
    assert f"{answer.label} <span>{answer.score:.3f}</span>" in head and f"{answer.num_tokens} tokens" in head
    assert second.startswith(head.removesuffix("</div>")), "the answer stays when its ground comes"
    places = re.findall(r'href="(pages/[\w-]{32})#(p\d+)"', second)
    page = page_of(requests, second)
    assert places and all(f'id="{place}"' in page for _, place in places)
    assert "letter.txt" in page and 'sandbox="allow-scripts allow-popups"' in second
    assert re.search(r"highest deleted, it is \d\.\d{3}; with as much deleted at random", second)


def test_a_pasted_text_and_a_packaged_licence_are_read_by_passages_of_tokens(requests):
    pasted = list(requests.document("sea law. red ship.", None, None, "64"))[-1]
    packaged = list(requests.document("", None, "short", "64"))[-1]
    assert pasted.partition("<iframe")[0].count("<li>") <= 1
    answers = [result.partition("</p>")[0] for result in (pasted, packaged)]
    assert answers[0] == answers[1] and "sea law. red ship." in page_of(requests, packaged)


def test_a_long_document_is_explained_for_its_most_probable_label_without_deletions(requests):
    long = "sea law red ship. " * THOROUGH_TOKENS
    result = list(requests.document(long, None, None, "1024"))[-1]
    assert "deleted" not in result and 'href="pages/' in result
    assert "Passages that the model takes most from" in result, "scores that are the same for all answers"


@pytest.mark.parametrize(
    ("problem_type", "pattern"),
    [
        pytest.param(SEVERAL, r"<p class=\"fa-answer\">[\w ,]+ <span>", id="several labels"),
        pytest.param(NUMBER, r"<p class=\"fa-answer\">-?[\d.e-]+</p>", id="a number"),
    ],
)
def test_answers_of_several_labels_and_of_numbers_are_shown(problem_type, pattern, tmp_path):
    results = list(make_requests(tmp_path, problem_type=problem_type).document("sea law. red.", None, None, "sentence"))
    assert re.search(pattern, results[0]) and "<iframe" in results[-1]


def test_nothing_that_is_given_or_named_is_markup(tmp_path):
    made = make_requests(tmp_path / "model", names=["<b>ant</b>", "bee", '"><script>'])
    path = tmp_path / f"{HOSTILE}.txt"
    path.write_text(f"{HOSTILE} sea. law <script>alert(1)</script> red. ship " * 20)
    results = list(made.document("", str(path), None, "sentence"))
    results += list(made.compare(QUESTION, f"{HOSTILE} sea", None, path.read_text(), None, "64"))
    results += list(made.compare(TWO_TEXTS, "sea", None, "", str(path), "64"))
    results += list(made.document("", str(tmp_path / f"{HOSTILE} gone.txt"), None, "sentence"))
    for result in results:
        tags = set(re.findall(r"<(\w+)", result))
        assert tags <= {"div", "p", "span", "table", "tr", "th", "td", "h3", "ol", "li", "a", "q", "mark", "iframe"}
        assert "<b>" not in result


@pytest.mark.parametrize(
    ("given", "told"),
    [
        pytest.param(("", None, None), "give a text or a file or a packaged licence", id="nothing"),
        pytest.param((" \n ", None, None), "give a text or a file or a packaged licence", id="blanks"),
        pytest.param(("sea", None, "short"), "there are a text and a packaged licence: clear all but one", id="two"),
        pytest.param(("sea " * (MAX_CHARACTERS // 4 + 1), None, None), "more than 2,000,000 characters", id="long"),
        pytest.param(("", "gone.txt", None), "this one is gone: give it again", id="gone"),
        pytest.param(("", b"\x93 sea", None), "not valid UTF-8", id="encoding"),
        pytest.param(("", b"", None), "the document is empty", id="empty file"),
        pytest.param(("", b"PK\x03\x04 ", None), "an Excel file or another zip archive", id="zip"),
        pytest.param(("", b"sea" * (MAX_FILE_BYTES // 3 + 1), None), "a file may have 20 MiB", id="large"),
    ],
)
def test_a_mistake_is_shown_in_the_place_of_the_result(given, told, requests, tmp_path):
    text, path, licence = given
    if isinstance(path, bytes):
        (tmp_path / "given.txt").write_bytes(path)
    if path is not None:
        path = str(tmp_path / (path if isinstance(path, str) else "given.txt"))
    result = only(requests.document(text, path, licence, "sentence"))
    assert 'role="alert"' in result and told in result
    assert str(tmp_path) not in result, "a visitor needn't know where the server keeps files"


def test_a_broken_pdf_and_a_file_of_another_type_are_mistakes(requests, tmp_path):
    pytest.importorskip("pypdf", reason="pypdf is not installed, which reads PDF files")
    broken = tmp_path / "broken.pdf"
    broken.write_bytes(b"%PDF-1.7 and no more")
    assert "broken.pdf: not a readable PDF" in only(requests.document("", str(broken), None, "sentence"))
    other = tmp_path / "letter.docx"
    other.write_bytes(b"PK")
    assert "give a text (.txt) or a PDF" in only(requests.document("", str(other), None, "sentence"))


def test_an_unexpected_error_is_logged_and_shown_without_its_words(requests, monkeypatch, caplog):
    monkeypatch.setattr(requests.models.text, "predict", lambda *_, **__: 1 / 0)
    result = only(requests.document("sea", None, None, "sentence"))
    assert "the server failed (ZeroDivisionError); its log says why" in result and "division" not in result
    assert "ZeroDivisionError" in caplog.text
    assert "more memory than the server has" in message_of(RuntimeError("DefaultCPUAllocator: can't allocate memory"))


def test_an_image_gets_its_answer_and_a_page_and_a_broken_one_a_message(requests, tmp_path):
    path = tmp_path / "scan.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8)).save(path)
    first, second = requests.image(str(path), None)
    assert re.search(r"(cat|dog) <span>", first) and "patches read" in first
    assert "scan.png" in page_of(requests, second)
    path.write_bytes(path.read_bytes()[:100])
    assert 'role="alert"' in only(requests.image(str(path), None))
    assert "give an image" in only(requests.image(None, None))


def test_equal_texts_have_the_similarity_one_and_passages_of_a_text_are_ranked(requests):
    same = only(requests.compare(TWO_TEXTS, "sea law", None, "sea law", None, "256"))
    assert ">1.000 <span>cosine similarity</span>" in same
    text = " ".join(["red " * 64, "sea ship " * 32, "law " * 64])
    ranked = only(requests.compare(QUESTION, "sea ship " * 32, None, text, None, "64"))
    first, *others = ranked.split("<li>")[1:]
    assert "sea ship" in first and "<span>1.000" in first and len(others) == 2 and "sea" not in "".join(others)
    assert "give a second text or a second file" in only(requests.compare(TWO_TEXTS, "sea", None, "", None, "64"))


def test_models_are_found_by_what_they_read_and_two_of_a_kind_are_refused(tmp_path, monkeypatch):
    text, image = str(write_text_model(tmp_path / "text")), str(write_image_model(tmp_path / "image"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)  # as in a Space, without MiniLM's package
    found = find_models([image, text])
    assert found.text.inputs.limit == MAX_TOKENS and found.image.inputs.noun == "image"
    assert found.encoder.model is found.text.model.base_model and "the classifier's own" in found.notes["encoder"]
    assert not found.canvases, "its labels are no digits"
    with pytest.raises(AppError, match="there is a model of texts already"):
        find_models([text, text])
