"""Protects a column of numbers: a cell that no number stands in is an error that names it, not a class of its own."""

import pytest

from fa_transformers.data.readers.files import load_text_files
from fa_transformers.data.readers.labels import problem_type_of
from fa_transformers.data.readers.tables import DataError, ReadingOptions


def read(tmp_path, cells: list[str], **options) -> str:
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "".join(f"sea {row},{cell}\n" for row, cell in enumerate(cells)))
    return problem_type_of(load_text_files(path, options=ReadingOptions(cache_dir=tmp_path, **options)))


NUMBERS = [f"{index}.5" for index in range(20)]


@pytest.mark.parametrize("cell", ["inf", "-Infinity", "nan", "1e300"])
def test_a_cell_that_is_no_finite_number_among_numbers_is_named(cell, tmp_path):
    with pytest.raises(DataError, match=rf"row 8 \(line 9\): column 'label': '{cell}' is not a finite float32.*of 21"):
        read(tmp_path, NUMBERS[:7] + [cell] + NUMBERS[7:])
    chosen = {"problem_type": "single_label_classification"}
    assert read(tmp_path, (NUMBERS[:2] + [cell]) * 20, **chosen) == "single_label_classification"


def test_classes_whose_names_look_like_numbers_stay_classes(tmp_path):
    assert read(tmp_path, ["1.5", "2.0b", "inf"] * 10) == "single_label_classification"
    assert read(tmp_path, ["0", "1", "nan"] * 10) == "single_label_classification"
    assert read(tmp_path, NUMBERS) == "regression"


AS_TEXT = {
    "decimal_commas": (["3,5", "4", "2,0"], r"row 1 \(line 2\).*'3,5' and 20 of 30 .*with a decimal point"),
    "thousands": (["1,234.5", "12,500", "3"], r"row 1 .*'1,234\.5' and 20 of 30 .*with a decimal point"),
    "percents": (["12.5%", "3 %", "4.5 %"], r"row 1 .*'12\.5%' and 20 of 30 .*with a decimal point"),
    "all_but_one": (["1.5", "2.0", "n/a"], r"row 3 .*'n/a' and 10 of 30 .*--problem_type regression --drop_bad_rows"),
    "lists": (["[0, 1]", "[1]", "[]"], r"row 1 .*'\[0, 1\]' and 30 of 30 .*lists written as text.*--label_separator"),
}


@pytest.mark.parametrize(("cells", "message"), AS_TEXT.values(), ids=AS_TEXT)
def test_numbers_and_lists_written_as_text_are_an_error_unless_a_flag_takes_them_for_names(cells, message, tmp_path):
    cells = [f'"{cell}"' for cell in cells] * 10
    with pytest.raises(DataError, match=f"{message}.*--problem_type single_label_classification"):
        read(tmp_path, cells)
    chosen = {"problem_type": "single_label_classification"}
    assert read(tmp_path, cells, **chosen) == "single_label_classification"


@pytest.mark.parametrize("cells", [["[a]", "b"], ["1,2", "a"], ["10%", "20%"], ["1.5", "beta"], ["1", "2", "n/a"]])
def test_names_of_which_half_look_so_and_whole_percents_stay_classes(cells, tmp_path):
    assert read(tmp_path, [f'"{cell}"' for cell in cells] * 10) == "single_label_classification"


def test_a_separator_that_divides_no_label_is_told(tmp_path, caplog):
    assert read(tmp_path, ["a;b", "c;d"] * 10, label_separator="|") == "multi_label_classification"
    assert "--label_separator '|' divides no label" in caplog.text
    caplog.clear()
    read(tmp_path, ["a|b", "c"] * 10, label_separator="|")
    assert "divides no label" not in caplog.text
