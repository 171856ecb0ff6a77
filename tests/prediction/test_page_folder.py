"""Pages of a prediction's rows: one for each answer, an index, and the same after a stop."""

import json
from pathlib import Path

import pytest
from page_checks import ParsedPage
from tiny_predictors import make_texts, write_text_model

from fa_transformers.options import PredictOptions
from fa_transformers.prediction import inputs, page_folder
from fa_transformers.prediction.run import Columns, predict_file


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inputs, "WINDOW_ITEMS", 2)
    write_text_model(tmp_path / "model")
    texts = make_texts(5, 6)
    texts[1] = ""
    Path("in.jsonl").write_text("".join(json.dumps({"text": text, "key": "<b>" + text}) + "\n" for text in texts))


def predict(**options):
    chosen = PredictOptions(output=Path("out.csv"), id_column_name="key", device="cpu", **options)
    return predict_file("model", Path("in.jsonl"), chosen, Columns(), pages=Path("pages"))


def read_pages() -> dict[str, list]:
    """The pages with their tags; the seconds that they took are not to be compared."""
    return {path.name: ParsedPage(path).tags for path in sorted(Path("pages").glob("*.html"))}


def test_each_answer_has_a_page_and_the_index_leads_to_it(table):
    done = predict()
    assert done.index == Path("pages/index.html")
    parsed = ParsedPage(done.index)
    assert [given["href"] for tag, given in parsed.tags if tag == "a"] == [f"{row:06}.html" for row in (1, 3, 4, 5)]
    assert sorted(read_pages()) == [*(f"{row:06}.html" for row in (1, 3, 4, 5)), "index.html"]
    assert any("the document is empty" in text for text in parsed.texts) and "<b>" not in parsed.page
    Path("out.csv").unlink()
    with pytest.raises(FileExistsError, match=r"--explain pages has files: --overwrite"):
        predict()


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
def test_a_folder_of_other_files_is_refused_and_left_as_it_is(table, flags):
    Path("pages").mkdir()
    for name in ("2024-notes.html", "index.html", "000001.html"):
        (Path("pages") / name).write_text("mine")
    with pytest.raises(FileExistsError, match="--explain pages has files that are no pages of an earlier run"):
        predict(**flags)
    assert {path.read_text() for path in Path("pages").iterdir()} == {"mine"}


def test_another_run_deletes_no_file_but_the_pages_of_the_one_before(table):
    predict()
    Path("pages/2024-notes.html").write_text("mine")
    Path("pages/000099.html").write_text("mine")
    predict(overwrite=True)
    assert Path("pages/2024-notes.html").read_text() == Path("pages/000099.html").read_text() == "mine"


def test_a_stopped_run_goes_on_with_its_pages(table, monkeypatch):
    predict()
    whole, index = read_pages(), Path("pages/index.html").read_text()
    explain, count = page_folder.explain_document, []

    def stop(*args, **options):
        count.append(options["name"])
        if len(count) == 3:
            raise KeyboardInterrupt
        return explain(*args, **options)

    monkeypatch.setattr(page_folder, "explain_document", stop)
    with pytest.raises(KeyboardInterrupt):
        predict(overwrite=True)
    assert not Path("pages/index.html").exists(), "the one of the earlier run is gone"
    monkeypatch.setattr(page_folder, "explain_document", explain)
    predict(resume=True)
    assert read_pages() == whole and Path("pages/index.html").read_text() == index
