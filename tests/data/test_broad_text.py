"""Broad unlabelled text is prose only, every piece of it once, and its splits share no file."""

from pathlib import Path

import datasets
import pytest

from fa_transformers.data.sets import broad_text

MIT = "Permission is hereby granted, free of charge, to any person obtaining a copy of this text. " * 9


def prose(what: object) -> str:
    return " ".join([f"A sentence that says what this part does and why it does so, {what}."] * 9)


@pytest.fixture
def roots(tmp_path: Path, monkeypatch) -> dict[str, str]:
    """A folder with two small packages in the place of those that are installed."""
    nested = f'class A:\n    """{prose("in a class")}"""\n\n    def b(self):\n        """{prose("in b")}"""\n'
    files = {f"alpha/part_{number}.py": f'"""{prose(number)}"""\n' for number in range(40)} | {
        "alpha/nested.py": nested,
        "alpha/repeated.py": f'def again():\n    """{prose(0)}"""\n',
        "alpha/string.py": f'x = """{prose("in a string that documents nothing")}"""\n',
        "alpha/broken.py": f'def (:\n    """{prose("in a broken file")}"""\n',
        "alpha/made.py": f'# Automatically generated, do not edit.\n"""{prose("made")}"""\n',
        "alpha/tests/thing.py": f'"""{prose("of a test")}"""\n',
        "alpha/LICENSE.txt": prose("under the name of a licence"),
        "beta/terms.txt": MIT,
        "beta/guide.rst": prose("of a guide"),
        "beta/numbers.txt": "1 2 3 4 5 6 7 8 9 " * 99,
        "beta-1.0.dist-info/notes.txt": prose("of metadata"),
    }
    for name, content in files.items():
        path = tmp_path / "site-packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    found = {str(tmp_path / "site-packages"): ""}
    monkeypatch.setattr(broad_text, "package_roots", lambda: found)
    monkeypatch.setattr(broad_text.metadata, "distributions", lambda: [])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return found


def test_broad_text_is_the_prose_of_packages_without_licences_tests_and_copies(roots):
    rows = list(broad_text.read_documents(roots, []))
    expected = {prose(number) for number in range(40)}
    expected |= {
        f"{prose('in a class')}\n\n{prose('in b')}",
        prose("of a guide"),
    }
    assert sorted(row["text"] for row in rows) == sorted(expected)
    assert {(row["kind"], row["source"]) for row in rows} == {("docstrings", "alpha"), ("documents", "beta")}


def test_broad_text_splits_share_nothing_and_give_all(roots):
    parts = [broad_text.load_broad_text(split=split, heldout_share=0.3) for split in ("train", "heldout")]
    train, heldout = (set(part["text"]) for part in parts)
    assert train and heldout and not train & heldout
    assert train | heldout == {row["text"] for row in broad_text.read_documents(roots, [])}
    assert parts[0].column_names == ["text", "kind", "source"]


def test_broad_text_keeps_only_the_kinds_and_lengths_that_were_asked_for(roots):
    guide = broad_text.load_broad_text(kinds=["documents"], heldout_share=0.0)
    assert guide["source"][:] == ["beta"]
    assert len(broad_text.load_broad_text(min_characters=1000, heldout_share=0.0)) == 1


@pytest.mark.parametrize("wrong", [{"kinds": ["poems"]}, {"split": "test"}, {"heldout_share": 2.0}])
def test_broad_text_names_the_argument_that_is_wrong(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
        broad_text.load_broad_text(**wrong)
