"""Protects that all bad rows are named at once, by row and line, or left out and counted; columns by their flags."""

import logging
import re

import pytest

from fa_transformers.data.readers.problems import BadRows, Place, check_column, check_columns
from fa_transformers.data.readers.tables import DataError

LOGGER = "fa_transformers.data.readers.problems"


def bad_rows(count: int, drop: bool = False) -> BadRows:
    bad = BadRows("train.csv", drop)
    for number in range(1, count + 1):
        bad.add(Place(3 * number, 10 * number), "the document is empty", "Give each a text")
    return bad


def test_no_bad_row_is_no_error(caplog):
    for drop in (False, True):
        bad_rows(0, drop).check()
    assert not caplog.records


def test_one_bad_row_is_named_by_row_and_line():
    with pytest.raises(DataError) as caught:
        bad_rows(1).check()
    assert str(caught.value) == (
        "train.csv: 1 bad row:\n  row 3 (line 10): the document is empty\nGive each a text. Mend the row, or leave it "
        "out with --drop_bad_rows"
    )


@pytest.mark.parametrize("count", [2, 19, 20, 21, 5000])
def test_up_to_20_rows_are_named_and_all_are_counted(count):
    bad = bad_rows(count)
    with pytest.raises(DataError, match=rf"^train\.csv: {count} bad rows:") as caught:
        bad.check()
    places = re.findall(r"row (\d+) \(line (\d+)\)", str(caught.value))
    assert places == [(str(3 * number), str(10 * number)) for number in range(1, min(count, 20) + 1)]
    assert (f"and {count - 20} more" in str(caught.value)) == (count > 20)
    assert str(caught.value).count("Give each a text") == 1
    assert bad.count == count and len(bad._shown) == min(count, 20)


def test_dropped_rows_are_counted_in_one_warning_that_shows_the_first(caplog):
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        bad_rows(7, drop=True).check()
    (record,) = caplog.records
    assert record.getMessage().startswith("train.csv: 7 bad rows left out:\n  row 3 (line 10): the document is empty")
    assert "row 15 (line 50)" in record.getMessage() and "row 18" not in record.getMessage()
    assert record.getMessage().endswith("and 2 more")


def test_a_place_without_lines_is_a_row():
    assert str(Place(31)) == "row 31"


@pytest.mark.parametrize(
    ("column", "role", "existing", "message"),
    [
        (
            "txt",
            "text",
            ["text", "label"],
            "no text column 'txt'.* 'text', 'label'.*Did you mean --text_column_name 'text'",
        ),
        ("text", "text", ["id", " Text "], "Did you mean --text_column_name ' Text '"),
        ("label", "label", ["text", "y"], "Name the right one with --label_column_name"),
        ("author", "group", ["text", "Author"], "no group column 'author'.*--group_column 'Author'"),
        ("text", "text", ["text", "label", "text"], "2 columns 'text': rename all but one"),
        ("text", "text", [], "the columns are none"),
    ],
)
def test_a_missing_column_is_named_with_its_flag(column, role, existing, message):
    with pytest.raises(DataError, match=message):
        check_column(column, role, existing, "train.csv")


def test_long_names_of_columns_are_cut():
    with pytest.raises(DataError) as caught:
        check_column("text", "text", ["secret " * 100_000, "label"], "train.csv")
    assert len(str(caught.value)) < 500


def test_an_optional_column_may_be_missing_but_not_stand_twice():
    columns = {"text": "text", "label": "label"}
    check_columns(columns, ["text"], "test.csv", {"label"})
    with pytest.raises(DataError, match="2 columns 'label'"):
        check_columns(columns, ["text", "label", "label"], "test.csv", {"label"})
    with pytest.raises(DataError, match="no label column"):
        check_columns(columns, ["text"], "test.csv")
