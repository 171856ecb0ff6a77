"""Protects tables of text from data: one row is one line, whatever a label holds."""

import pytest

from fa_transformers.tables import counted, format_table, one_line


def test_a_label_takes_one_line_of_a_table():
    table = format_table(
        [{"label": "sea\n# x\r\x1b[2J\x9b\u2028y", "f1": 0.5}, {"label": "z" * 10**6, "f1": 1.0}], ["label", "f1"]
    )
    lines = table.splitlines()
    assert len(lines) == 4 and lines[2].split() == ["sea", "#", "x", "[2J", "y", "0.500"]
    assert max(map(len, lines)) < 100 and "…" in lines[3] and table.isprintable() is False
    assert all(line.isprintable() for line in lines)


def test_one_line_keeps_what_fits():
    assert one_line("a b", 3) == "a b" and one_line("abcd", 3) == "ab…" and one_line(" a\t\n b ") == "a b"
    assert one_line("a\u202eb\ud800") == "ab" and one_line("数据 é") == "数据 é"


@pytest.mark.parametrize(
    ("number", "noun", "words"),
    [
        (0, "row", "0 rows"),
        (1, "process", "1 process"),
        (2, "process", "2 processes"),
        (1, "batch", "1 batch"),
        (3, "box", "3 boxes"),
        (2, "epoch", "2 epochs"),
        (1234, "CPU core", "1,234 CPU cores"),
    ],
)
def test_one_of_a_thing_is_said_in_the_singular(number, noun, words):
    assert counted(number, noun) == words
    assert counted(number, noun, "is", "are") == f"{words} {'is' if number == 1 else 'are'}"
