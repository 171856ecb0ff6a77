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
