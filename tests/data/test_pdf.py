"""Text of PDF files is read page by page, and a file that has none is told from a damaged one."""

import builtins

import pytest

from fa_transformers.data.readers.pdf import read_pdf
from fa_transformers.data.readers.tables import DataError


def write_pdf(path, pages: list[str], trailer: str = "") -> None:
    """Write a PDF with a line of text on each page, by hand, so that no library is trusted to write what it reads."""
    count = len(pages)
    kids = " ".join(f"{3 + 2 * number} 0 R" for number in range(count))
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {count} >>"]
    font = "<< /Font << /F << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >>"
    for number, text in enumerate(pages):
        stream = f"BT /F 12 Tf 20 100 Td ({text}) Tj ET" if text else ""
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Contents {4 + 2 * number} 0 R /Resources {font} >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    content, places = "%PDF-1.4\n", []
    for number, one in enumerate(objects, start=1):
        places.append(len(content))
        content += f"{number} 0 obj\n{one}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    start = len(content)
    size = len(objects) + 1
    content += f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n<< /Size {size} /Root 1 0 R {trailer}>>\n"
    path.write_text(content + f"startxref\n{start}\n%%EOF\n")


def test_pages_follow_each_other_and_begin_where_it_says(tmp_path):
    pytest.importorskip("pypdf", reason="pypdf is missing: pip install 'fa_transformers[pdf]'")
    write_pdf(tmp_path / "a.pdf", ["The first page.", "", "The <b>third</b>."])
    text, starts = read_pdf(tmp_path / "a.pdf")
    assert text == "The first page.\n\nThe <b>third</b>." and starts == [0, 16, 17]


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"most_pages": 2}, "the PDF has more than 2 pages: give a part of it"),
        ({"most_characters": 15}, "the PDF has more than 15 characters: give a part of it"),
    ],
)
def test_a_file_with_more_than_the_bounds_is_refused_and_no_page_is_read_beyond_them(bounds, message, tmp_path):
    pypdf = pytest.importorskip("pypdf", reason="pypdf is missing: pip install 'fa_transformers[pdf]'")
    write_pdf(tmp_path / "a.pdf", ["The first.", "The second.", "The third."])
    assert len(read_pdf(tmp_path / "a.pdf", most_pages=3, most_characters=31)[1]) == 3, "as many may be"
    read = []
    extract = pypdf.PageObject.extract_text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pypdf.PageObject, "extract_text", lambda page: read.append(page) or extract(page))
        with pytest.raises(DataError, match=message):
            read_pdf(tmp_path / "a.pdf", **bounds)
    assert len(read) == (0 if "most_pages" in bounds else 2)


@pytest.mark.parametrize(
    ("pages", "trailer", "message"),
    [
        (["", ""], "", "the PDF has no text, as one of scanned pages"),
        (None, "", "not a readable PDF"),
        (
            ["secret"],
            "/ID [<00> <00>] /Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <{0}> /U <{0}> >> ".format("00" * 32),
            "the PDF needs a password",
        ),
    ],
)
def test_a_file_without_text_is_told_from_a_damaged_one(pages, trailer, message, tmp_path):
    pytest.importorskip("pypdf", reason="pypdf is missing: pip install 'fa_transformers[pdf]'")
    path = tmp_path / "a.pdf"
    if pages is None:
        path.write_bytes(b"%PDF-1.4 nothing more")
    else:
        write_pdf(path, pages, trailer)
    with pytest.raises(DataError, match=message):
        read_pdf(path)


def test_without_the_reader_it_says_how_to_get_it(tmp_path, monkeypatch):
    plain = builtins.__import__

    def refuse(name, *args, **options):
        if name == "pypdf":
            raise ImportError(name)
        return plain(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DataError, match=r"a\.pdf: PDF files are read by pypdf: pip install 'fa_transformers\[pdf\]'"):
        read_pdf(tmp_path / "a.pdf")
