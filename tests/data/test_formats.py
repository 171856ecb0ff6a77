"""Protects that a table gives the same rows in every format, delimiter, encoding and line end, and never a wrong one.

What a file looks like is found, or the message says it with the flag or command that mends it; no message prints a
document.
"""

import csv
import datetime
import gzip
import io
import itertools
import json
import logging
import random
import re
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from workbooks import Formula, write_workbook

from fa_transformers.data.readers import json_rows, parquet_rows
from fa_transformers.data.readers.formats import FILE_TYPES, Row, open_rows
from fa_transformers.data.readers.parquet_rows import declared_classes
from fa_transformers.data.readers.problems import BadRows
from fa_transformers.data.readers.tables import DataError

COLUMNS = {"text": "text", "label": "label"}
DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
# Values that readers of tables like to change, and texts that look like rows of another table.
TABLE = [
    ("first", "NA"),
    ("1,5; 2,5 | 3\t4", "null"),
    ('said "so"', "007"),
    ("one\n\ntwo,three;four\n", "1.0"),
    ("été 東京 🐋 е\u0301", "2020-01-01"),
    ("text;label", " True "),
    ('{"text": "x"}', "None"),
    ("x" * 5000, "nan"),
]


def read(path: Path, columns: dict[str, str] = COLUMNS, drop: bool = False, **options) -> list[Row]:
    """All rows of a file; bad ones are an error as for a user, or left out with `drop`."""
    bad = BadRows(path.name, drop)
    rows = list(open_rows(path, columns, bad, **options))
    bad.check()
    return rows


def values(rows: list[Row]) -> list[tuple]:
    return [row.values for row in rows]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def csv_text(table: list[tuple], delimiter: str = ",", line_end: str = "\n", header=("text", "label")) -> str:
    lines = io.StringIO()
    csv.writer(lines, delimiter=delimiter, lineterminator=line_end).writerows([header, *table])
    return lines.getvalue()


def write_table(path: Path, table: list[tuple]) -> Path:
    """Write a table in the format that the ending names."""
    objects = [dict(zip(COLUMNS, row, strict=True)) for row in table]
    if path.suffix in (".csv", ".tsv"):
        return write(path, csv_text(table, "\t" if path.suffix == ".tsv" else ","))
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(objects).to_parquet(path)
        return path
    if path.suffix == ".xlsx":
        return write_workbook(path, {"rows": [("text", "label"), *table]})
    return write(
        path, "\n".join(map(json.dumps, objects)) if path.suffix == ".jsonl" else json.dumps(objects, indent=1)
    )


@pytest.mark.parametrize("ending", FILE_TYPES)
def test_one_table_gives_the_same_values_in_every_format(tmp_path, ending):
    rows = read(write_table(tmp_path / f"train{ending}", TABLE))
    assert values(rows) == TABLE
    assert [row.number for row in rows] == list(range(1, len(TABLE) + 1))


def test_the_ending_is_read_in_upper_case_and_columns_come_in_the_order_that_was_asked_for(tmp_path):
    path = write(tmp_path / "TRAIN.CSV", "id,label,text\n1,a,b\n")
    assert values(read(path, {"text": "text", "label": "label", "group": "id"})) == [("b", "a", "1")]


@pytest.mark.parametrize("ending", FILE_TYPES)
def test_an_optional_column_that_is_missing_gives_none(tmp_path, ending):
    path = write_table(tmp_path / f"test{ending}", TABLE)
    columns = {"text": "text", "label": "absent"}
    assert values(read(path, columns, optional={"label"})) == [(text, None) for text, _ in TABLE]
    with pytest.raises(DataError, match="no label column 'absent'.*--label_column_name"):
        read(path, columns)


def random_text(random_source: random.Random) -> str:
    pieces = ["sea", " ", ",", ";", "\t", "|", '"', "\n", "\r\n", "é", "東", "text,label", "1,5", "'", "sep=;", "🐋"]
    return "a" + "".join(random_source.choice(pieces) for _ in range(random_source.randrange(30)))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_every_delimiter_encoding_and_line_end_gives_the_same_rows(tmp_path, encoding):
    random_source = random.Random(encoding)
    quotings = {"\n": csv.QUOTE_MINIMAL, "\r\n": csv.QUOTE_MINIMAL, "\r": csv.QUOTE_ALL}  # else "\n" isn't quoted
    for index, (delimiter, line_end) in enumerate(itertools.product(DELIMITERS.values(), quotings)):
        table = [(random_text(random_source), random_text(random_source)) for _ in range(12)]
        content = io.StringIO()
        writer = csv.writer(content, delimiter=delimiter, lineterminator=line_end, quoting=quotings[line_end])
        writer.writerows([("text", "label"), *table])
        path = tmp_path / f"{index}{random_source.choice(['.csv', '.tsv'])}"
        path.write_bytes(content.getvalue().encode(encoding))
        rows = read(path)
        assert values(rows) == table, (delimiter, line_end)
        lines = content.getvalue().replace("\r\n", "\n").replace("\r", "\n").split("\n")
        for row in rows:
            first = re.split(r"[\n\r]", row.values[0])[0].replace('"', '""')
            assert lines[row.line - 1].lstrip('"').startswith(first.lstrip('"')), row


@pytest.mark.parametrize("name", DELIMITERS)
def test_long_texts_full_of_other_delimiters_dont_fool_the_header(tmp_path, name):
    text = "".join(f"a{other}b\n" for other in DELIMITERS.values()) * 50_000  # above the sample of a megabyte
    table = [(text, "1,5"), (text, "2;5")]
    assert values(read(write(tmp_path / "train.csv", csv_text(table, DELIMITERS[name])))) == table


@pytest.mark.parametrize("given", ["^", "tab", "\\t", "\t", "semicolon"])
def test_a_given_delimiter_is_obeyed(tmp_path, given):
    character = {"tab": "\t", "\\t": "\t", "semicolon": ";"}.get(given, given)
    path = write(tmp_path / "train.csv", csv_text(TABLE, character))
    assert values(read(path, delimiter=given)) == TABLE


def test_excels_line_that_names_the_delimiter_is_obeyed_and_counted(tmp_path):
    path = write(tmp_path / "train.csv", ("sep=;\r\n" + csv_text([("a", "b")], ";")).encode("utf-16"))
    assert read(path) == [Row(1, 3, ("a", "b"))]


def test_the_header_with_the_columns_decides_where_rows_fit_another_delimiter_too(tmp_path):
    path = write(tmp_path / "train.csv", "text;label;name, note\na;b;c, d\n")
    assert values(read(path)) == [("a", "b")]


def test_a_header_that_several_delimiters_divide_is_told_apart_by_the_rows(tmp_path):
    path = write(tmp_path / "train.csv", "Id;Name, first;Text\n1;2;3\n4;5;6\n")
    assert values(read(path, {"text": "Text"})) == [("3",), ("6",)]
    with pytest.raises(DataError, match="'Id', 'Name, first', 'Text'.*Did you mean --text_column_name 'Text'"):
        read(path)


BAD_TABLES = {
    "several_delimiters": (
        "text,note;label\na,b;c\n",
        "by comma the columns are 'text', 'note;label'; by semicolon the columns are 'text,note', 'label'.*--delimiter",
    ),
    "another_delimiter": ("text^label\na^b\n", "no comma, semicolon, tab, pipe.*'text.label'.*--delimiter"),
    "no_header": ("x" * 100_000, "first line has no comma"),
    "misspelt": ("txt,label\na,b\n", "no text column 'text'; the columns are 'txt', 'label'. Did you mean.*'txt'"),
    "column_twice": ("text,text,label\na,b,c\n", "2 columns 'text'"),
    "only_line_breaks": ("\n\n", "no header and no rows"),
    "open_quote": ('text,label\na,b\nc,"d\ne,f\n', "the row that starts in line 3: unexpected end"),
    "quote_within": ('text,label\n"a"b,c\n', "line 2: ',' expected after"),
    "no_bytes": ("", "the file is empty"),
    "gzip": (gzip.compress(b"text,label\n"), "by its content it is compressed by gzip: unpack it with gunzip"),
    "excel": (b"PK\x03\x04 and more", "an Excel file.*ending .xlsx"),
    "binary": (bytes(range(256)), "byte 1 is zero"),
    "latin1": ("text,label\nb,café".encode("latin1"), r"line 2: byte 6 .*byte 17 of the file, 0xe9.*iconv -f LATIN1"),
    "windows": ("text,label\n“a lot of text”,b\n".encode("cp1252"), r"line 2: byte 1 .*iconv -f WINDOWS-1252 "),
    "cyrillic": ("text,label\nмного текста здесь,b\n".encode("cp1251"), "iconv -f GB18030.*such as WINDOWS-1251"),
    "mixed": ("text,label\né,b\n".encode() + b"caf\xe9,b\n", "line 3: byte 4.*The part before it is UTF-8, so"),
    "marked": (b"\xef\xbb\xbftext,label\ncaf\xe9,b\n", "line 2: byte 4.*byte 18 of.*The part before it is UTF-8, so"),
    "utf16_cut": ("text,label\na,b\n".encode("utf-16")[:-1], "byte 31 of the file is not valid UTF-16.*cut off"),
    "many_delimiters": ("text", "--delimiter must be one character or 'tab', got ', '"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_an_unreadable_table_is_one_message_that_says_what_to_do(tmp_path, case):
    content, message = BAD_TABLES[case]
    with pytest.raises(DataError, match=f"(?s){message}") as caught:
        read(write(tmp_path / "train.csv", content), delimiter=", " if case == "many_delimiters" else None)
    assert len(str(caught.value)) < 600
    assert ("iconv" in str(caught.value)) == (case in ("latin1", "windows", "cyrillic"))


def test_a_bad_byte_far_behind_is_found_with_its_line(tmp_path):
    # A character of three bytes over the end of each megabyte, so that the pieces end within characters.
    text = "東" * 400_000
    content = f"text,label\n{text},a\n{text},b\n".encode() + b"caf\xe9,c\n"
    with pytest.raises(DataError, match=rf"line 4: byte 4 of the line \(byte {content.rindex(b'caf') + 4} of the file"):
        read(write(tmp_path / "train.csv", content))
    with pytest.raises(DataError, match=r"line 2: byte 1048577 of the line \(byte 1048588 of the file, 0xff"):
        read(write(tmp_path / "train.csv", b"text,label\n" + b"a" * 2**20 + b"\xff,b\n"))
    with pytest.raises(DataError, match=r"line 2: byte 1048565 of the line \(byte 1048576 of the file, 0xe6"):
        read(write(tmp_path / "train.csv", b"text,label\n" + b"a" * (2**20 - 12) + b"\xe6a,b\n"))


def test_rows_of_another_length_are_all_named_and_can_be_left_out(tmp_path):
    lines = "".join(f'"{n}\n{n}",b\n' if n % 3 else f"{n}\n" for n in range(90))
    path = write(tmp_path / "train.csv", "text,label\n\n" + lines)
    with pytest.raises(
        DataError, match=r"(?s)30 bad rows.*row 4 \(line 8\): the row has 1 fields.*and 10 more"
    ) as caught:
        read(path)
    assert str(caught.value).count("row has 1 fields, the header has 2") == 20
    rows = read(path, drop=True)
    assert [int(row.values[0].split("\n")[0]) + 1 for row in rows] == [row.number for row in rows]
    assert len(rows) == 60


OBJECTS = [{"text": text, "label": label, "id": number} for number, (text, label) in enumerate(TABLE)]
JSON_SHAPES = {
    "list": lambda objects: json.dumps(objects),
    "list_in_lines": lambda objects: "\n[" + ",\n".join(map(json.dumps, objects)) + "\n]\n",
    "lines": lambda objects: "\n\n".join(map(json.dumps, objects)) + "\n",
    "spread": lambda objects: "\n".join(json.dumps(row, indent=2) for row in objects),
    "field": lambda objects: json.dumps({"version": 1, "counts": [1, 2], "info": [{"by": "x"}], "data": objects}),
    "only_field": lambda objects: json.dumps({"rows": objects}, indent=1),
    "columns": lambda objects: json.dumps({name: [row[name] for row in objects] for name in objects[0]}),
    "numbered_columns": lambda objects: json.dumps(
        {name: {n: r[name] for n, r in enumerate(objects)} for name in objects[0]}
    ),
}


@pytest.mark.parametrize("characters", [7, 2**20])
@pytest.mark.parametrize("shape", JSON_SHAPES)
def test_every_shape_of_json_gives_the_same_rows(tmp_path, monkeypatch, shape, characters):
    monkeypatch.setattr(json_rows, "READ_CHARACTERS", characters)  # values are cut anywhere, numbers between digits
    columns = COLUMNS | {"id": "id"}
    for ending, encoding in itertools.product((".json", ".jsonl"), ("utf-8", "utf-16", "utf-16-le")):
        objects = [row | {"id": 10**9 + row["id"]} for row in OBJECTS]
        path = write(tmp_path / f"train{ending}", JSON_SHAPES[shape](objects).encode(encoding))
        assert values(read(path, columns)) == [tuple(row[name] for name in columns) for row in objects]


def test_a_file_of_one_object_is_one_row(tmp_path):
    row = {"text": "a", "label": ["x", "y"]}
    for indent in (None, 2):
        assert values(read(write(tmp_path / "train.jsonl", json.dumps(row, indent=indent)))) == [("a", ["x", "y"])]


def test_values_keep_their_types_and_numbers_their_digits(tmp_path):
    labels = [1, 1.0, True, None, "1", ["a"], 12345678901234567890]
    path = write(tmp_path / "train.json", json.dumps([{"text": "a", "label": label} for label in labels]))
    read_back = [label for _, label in values(read(path))]
    assert read_back == labels and list(map(type, read_back)) == list(map(type, labels))


def test_a_bad_first_line_is_one_bad_row(tmp_path):
    path = write(tmp_path / "train.jsonl", '{"text": "a", "label": \n{"text": "b", "label": "x"}\n')
    assert values(read(path, drop=True)) == [("b", "x")]
    with pytest.raises(DataError, match=r"1 bad row:\n  row 1 \(line 1\): not valid JSON"):
        read(path)


def test_lines_of_objects_are_numbered_in_lists_and_spread_objects(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "READ_CHARACTERS", 7)
    path = write(tmp_path / "train.json", json.dumps([{"text": "a", "label": 1}] * 3, indent=1))
    assert [(row.number, row.line) for row in read(path)] == [(1, 2), (2, 6), (3, 10)]
    path = write(tmp_path / "train.json", "\n".join(3 * [json.dumps({"text": "a", "label": 1}, indent=1)]))
    assert [(row.number, row.line) for row in read(path)] == [(1, 1), (2, 5), (3, 9)]


def test_bad_lines_are_all_named_and_can_be_left_out(tmp_path):
    lines = [
        '{"text": "a", "label": "x"}',
        "",
        '{"text": "b"}',
        '"c"',
        '{"text": "a", "text": "b", "label": "x"}',
        "{bad",
        '{"text": "a", "label": ' + "[" * 100_000,
        '{"text": "a", "label": ' + "9" * (sys.get_int_max_str_digits() + 1) + "}",
        '{"text": "d", "label": null}',
    ]
    path = write(tmp_path / "train.jsonl", "\n".join(lines))
    with pytest.raises(DataError) as caught:
        read(path)
    for expected in (
        "6 bad rows",
        "row 2 (line 3): there is no label column 'label'",
        "row 3 (line 4): expected an object with the columns, got: string",
        "row 4 (line 5): the object has 'text' twice",
        "row 5 (line 6): not valid JSON (Expecting",
        "row 6 (line 7): not valid JSON (it is nested too deeply)",
        "row 7 (line 8): not valid JSON (a number has too many digits)",
    ):
        assert expected in str(caught.value)
    assert [(row.number, *row.values) for row in read(path, drop=True)] == [(1, "a", "x"), (8, "d", None)]


SECRET = "private document " * 200
BAD_JSON = {
    "two_lists": ({"train": OBJECTS, "test": OBJECTS}, "2 lists of rows, 'train', 'test'"),
    "columns_differ": ({"text": [SECRET, "b"], "label": ["x"]}, "'text', 'label' don't have the same rows.*row 2"),
    "keys_differ": ({"text": {"0": SECRET}, "label": {"1": "x"}}, "don't have the same rows.*row 1"),
    "a_column_and_a_value": ({"text": [SECRET], "label": SECRET}, "list of values in column 'label', got: string"),
    "columns_without_label": ({"text": [SECRET], "y": [1]}, "no label column 'label'.*'text', 'y'"),
    "misspelt": ([{"txt": SECRET, "label": "x"}], "'txt', 'label'. Did you mean --text_column_name 'txt'"),
    "one_object_misspelt": ({"txt": SECRET, "label": "x"}, "Did you mean --text_column_name 'txt'"),
    "split": (
        {"columns": ["text", "label"], "index": [0], "data": [[SECRET, "x"]]},
        "one object without a list of rows .*orient='records'",
    ),
    "empty": ({}, "the columns are none"),
    "lists": ([[SECRET, "x"]], r"row 1 \(line 1\): expected an object with the columns, got: list"),
    "scalar": (SECRET, r"line 1, column 1: not valid JSON: Expecting '\[' or '\{'"),
    "names_are_documents": ([{SECRET: "x"}], "no text column"),
    "blank": (b" \n ", "white space only"),
    "csv": (csv_text(TABLE).encode(), r"line 1, column 1: not valid JSON: Expecting '\[' or '\{'"),
    "cut_off": (json.dumps(OBJECTS, indent=1)[:-1].encode(), "line 42, column 1: not valid JSON: Expecting ',' or ']'"),
    "field_broken": (b'{"data": [\n{"text": "a", "label": "x"},\n{"text": "b", "label": }]}', "line 3, column 24"),
    "more_behind": (b'[{"text": "a", "label": "x"}]\n[1]', "line 2, column 1: not valid JSON: Extra data"),
    "field_twice": (b'{"data": [], "data": [{"text": "a", "label": "x"}]}', "one object without a list of rows"),
    "column_twice": (b'{"text": ["a"], "label": ["x"], "label": ["y"]}', "'label', got: name that stands twice"),
    "text_twice": (b'{"text": ["a"], "label": ["x"], "text": ["b"]}', "row 1 .*the object has 'text' twice"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_unreadable_json_is_one_message_without_documents(tmp_path, case):
    content, message = BAD_JSON[case]
    path = write(tmp_path / "train.json", content if isinstance(content, bytes) else json.dumps(content))
    with pytest.raises(DataError, match=f"(?s){message}") as caught:
        read(path)
    assert len(str(caught.value)) < 600


def test_the_field_that_holds_the_rows_is_told(tmp_path, caplog):
    path = write(tmp_path / "train.json", json.dumps({"version": 1, "data": OBJECTS}))
    with caplog.at_level(logging.WARNING, logger=json_rows.__name__):
        read(path)
    assert "the rows are those of the field 'data'; left out are 'version'" in caplog.text


def test_a_key_that_the_first_rows_lack_is_no_misspelt_column(tmp_path):
    path = write(tmp_path / "train.jsonl", '{"text": "a"}\n{"text": "b", "label": "x"}\n')
    assert values(read(path, optional={"label"})) == [("a", None), ("b", "x")]
    assert values(read(path, drop=True)) == [("b", "x")]


def test_a_spreadsheets_cells_have_the_values_that_it_shows(tmp_path):
    labels = [
        (1, 1),
        (1.5, 1.5),
        (-0.0, 0),
        (True, True),
        ("007", "007"),
        ("1.0", "1.0"),
        (None, None),
        (datetime.date(2020, 1, 1), datetime.date(2020, 1, 1)),
        (datetime.datetime(2020, 1, 1, 3, 4, 5), datetime.datetime(2020, 1, 1, 3, 4, 5)),
        (Formula("1+1", 2), 2),
        (Formula("A2", "x"), "x"),
        (Formula("NA()", "#N/A", failed=True), None),
        ("a_x000D_b", "a\rb"),
    ]
    rows = [
        [],
        ["text", None, "label"],
        *(["a", None, label] for label, _ in labels[:3]),
        [],
        *(["a", None, x] for x, _ in labels[3:]),
    ]
    read_back = read(write_workbook(tmp_path / "train.xlsx", {"sheet": rows}))
    assert values(read_back) == [("a", expected) for _, expected in labels]
    assert [type(row.values[1]) for row in read_back] == [type(expected) for _, expected in labels]
    assert [row.line for row in read_back] == [3, 4, 5, *range(7, 17)]
    assert [row.number for row in read_back] == list(range(1, 14))


def test_sheets_beside_the_first_are_told(tmp_path, caplog):
    sheets = {"notes": [["made by"]], "rows": [["text", "label"], ["a", "b"]]}
    with pytest.raises(DataError, match="sheet 'notes': there is no text column.*other sheets are not read: 'rows'"):
        read(write_workbook(tmp_path / "train.xlsx", sheets))
    with caplog.at_level(logging.WARNING):
        read(write_workbook(tmp_path / "train.xlsx", dict(reversed(sheets.items()))))
    assert "other sheets are not read: 'notes'" in caplog.text
    with pytest.raises(DataError, match="sheet 'empty': the sheet is empty$"):
        read(write_workbook(tmp_path / "train.xlsx", {"empty": []}))
    with pytest.raises(DataError, match="not a readable Excel file"):
        read(write(tmp_path / "train.xlsx", b"PK\x03\x04 cut off"))


def test_without_the_library_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "python_calamine", None)
    with pytest.raises(DataError, match=r"pip install 'fa_transformers\[excel\]'"):
        read(write_workbook(tmp_path / "train.xlsx", {"rows": [["text", "label"]]}))


def test_parquets_types_come_as_python_values(tmp_path):
    table = pyarrow.table(
        {
            "text": pyarrow.array(["a", "b"]).dictionary_encode(),
            "label": pyarrow.array([datetime.date(2020, 1, 1), None]),
            "group": pyarrow.array([["x"], []], pyarrow.large_list(pyarrow.large_string())),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    rows = read(tmp_path / "train.parquet", COLUMNS | {"group": "group"})
    assert rows == [Row(1, None, ("a", datetime.date(2020, 1, 1), ["x"])), Row(2, None, ("b", None, []))]


def test_declared_classes_are_named_whatever_their_numbers(tmp_path):
    several = datasets.List(datasets.ClassLabel(names=["p", "q"]))
    features = {
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["zoo", "ant"]),
        "several": several,
    }
    columns = {"text": ["a", "b", "c"], "label": [1, 0, -1], "several": [[1, 0], [], [0]]}
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    rows = read(path, COLUMNS | {"several": "several"})
    assert values(rows) == [("a", "ant", ["q", "p"]), ("b", "zoo", []), ("c", None, ["p"])]
    assert [declared_classes(path, column) for column in (*columns, "absent")] == [
        None,
        ["zoo", "ant"],
        ["p", "q"],
        None,
    ]
    table = pyarrow.parquet.read_table(path)
    table = table.set_column(1, "label", pyarrow.array([0, 2, 1])).replace_schema_metadata(table.schema.metadata)
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(DataError, match="row 2: column 'label' has the number 2, the file declares 2 classes from 0"):
        read(path)


def test_a_damaged_parquet_file_is_named(tmp_path):
    content = write_table(tmp_path / "train.parquet", TABLE).read_bytes()
    for damaged in (content[:-10], content[:40] + b"\xff" * 400 + content[440:], b"PAR1" * 10):
        with pytest.raises(DataError, match="train.parquet: not a readable parquet file"):
            read(write(tmp_path / "train.parquet", damaged))


def test_long_documents_of_parquet_are_read_a_few_at_a_time(tmp_path):
    texts = [chr(97 + number) * 2**20 for number in range(16)]
    table = pyarrow.table({"text": texts, "label": texts})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet", write_batch_size=1, use_dictionary=False)
    with pyarrow.parquet.ParquetFile(tmp_path / "train.parquet") as file:
        assert parquet_rows._batch_size(file.metadata) <= 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train.txt", "'.txt' is not one of '.csv'.*rename"),
        ("train.xls", "save it as .xlsx"),
        ("train.csv.gz", "unpack it first"),
        ("train.ndjson", "rename it to .jsonl"),
        ("train", "the ending '' is not one of"),
        ("trian.csv", "there is no such file; did you mean 'train.csv'"),
        ("other/train.csv", "there is no such file$"),
        ("folder", "is a folder: name a file in it.*--image_folder.*--dataset_name"),
        ("folder.csv", "is a folder"),
    ],
)
def test_a_file_that_isnt_there_or_of_another_type_is_told_with_what_to_do(tmp_path, name, message):
    write(tmp_path / "train.csv", csv_text(TABLE))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.csv").mkdir()
    if "." in name and not (tmp_path / name).exists() and not name.endswith(".csv"):
        write(tmp_path / name, "text")
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("ending", FILE_TYPES)
def test_a_header_without_rows_has_no_rows(tmp_path, ending):
    contents = {".csv": "text,label\n", ".tsv": "text\tlabel", ".json": "[]", ".jsonl": '{"data": []}'}
    path = tmp_path / f"train{ending}"
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string"), "label": []}), path)
    elif ending == ".xlsx":
        write_workbook(path, {"rows": [("text", "label")]})
    else:
        write(path, contents[ending])
    assert read(path) == []
