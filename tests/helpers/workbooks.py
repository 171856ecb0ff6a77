"""Small Excel files as Excel writes them: shared strings, dates by style, formulas with their last value."""

import datetime
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

HEAD = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>'
MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
# Cell formats 0 to 2: general, and the built-in ones of a date and of a date with time.
STYLES = "".join(f'<xf numFmtId="{number}" applyNumberFormat="1"/>' for number in (0, 14, 22))
DAY_ZERO = datetime.datetime(1899, 12, 30)


class Formula(NamedTuple):
    """Formula and the value that was kept; an error such as "#N/A" where `failed`."""

    text: str
    value: Any
    failed: bool = False


def cell(reference: str, value: Any, strings: list[str]) -> str:
    formula = ""
    if isinstance(value, Formula):
        formula, failed, value = f"<f>{escape(value.text)}</f>", value.failed, value.value
        if failed:
            return f'<c r="{reference}" t="e">{formula}<v>{value}</v></c>'
    if value is None:
        return ""
    if isinstance(value, bool):
        return f'<c r="{reference}" t="b">{formula}<v>{int(value)}</v></c>'
    if isinstance(value, str):
        strings.append(f'<si><t xml:space="preserve">{escape(value)}</t></si>')
        return f'<c r="{reference}" t="s">{formula}<v>{len(strings) - 1}</v></c>'
    if isinstance(value, datetime.date):
        midnight = not isinstance(value, datetime.datetime)
        moment = datetime.datetime(value.year, value.month, value.day) if midnight else value
        days = (moment - DAY_ZERO) / datetime.timedelta(days=1)
        return f'<c r="{reference}" s="{1 if midnight else 2}"><v>{days!r}</v></c>'
    return f'<c r="{reference}">{formula}<v>{value!r}</v></c>'


def write_workbook(path: Path, sheets: dict[str, Sequence[Sequence[Any]]]) -> Path:
    """Write sheets, name -> rows of up to 26 cells; None is an empty cell, an empty row is left out."""
    strings: list[str] = []
    names = [f"sheet{number}" for number in range(1, len(sheets) + 1)]
    with zipfile.ZipFile(path, "w") as archive:
        for name, rows in zip(names, sheets.values(), strict=True):
            lines = [
                f'<row r="{line}">'
                + "".join(cell(f"{chr(65 + at)}{line}", value, strings) for at, value in enumerate(row))
                + "</row>"
                for line, row in enumerate(rows, start=1)
                if row
            ]
            sheet = f'{HEAD}<worksheet xmlns="{MAIN}"><sheetData>{"".join(lines)}</sheetData></worksheet>'
            archive.writestr(f"xl/worksheets/{name}.xml", sheet)
        tags = "".join(
            f'<sheet name="{escape(title)}" sheetId="{at}" r:id="rId{at}"/>' for at, title in enumerate(sheets, start=1)
        )
        book = f'{HEAD}<workbook xmlns="{MAIN}" xmlns:r="{OFFICE}"><sheets>{tags}</sheets></workbook>'
        archive.writestr("xl/workbook.xml", book)
        parts = [("worksheet", f"worksheets/{name}.xml") for name in names]
        parts += [("styles", "styles.xml"), ("sharedStrings", "sharedStrings.xml")]
        archive.writestr("xl/_rels/workbook.xml.rels", relations(parts))
        archive.writestr("_rels/.rels", relations([("officeDocument", "xl/workbook.xml")]))
        archive.writestr("xl/styles.xml", f'{HEAD}<styleSheet xmlns="{MAIN}"><cellXfs>{STYLES}</cellXfs></styleSheet>')
        archive.writestr("xl/sharedStrings.xml", f'{HEAD}<sst xmlns="{MAIN}">{"".join(strings)}</sst>')
        archive.writestr("[Content_Types].xml", content_types(names))
    return path


def relations(parts: list[tuple[str, str]]) -> str:
    """Return the XML that numbers parts of an archive, given their kinds and paths, from rId1."""
    tags = "".join(
        f'<Relationship Id="rId{at}" Type="{OFFICE}/{kind}" Target="{target}"/>'
        for at, (kind, target) in enumerate(parts, start=1)
    )
    return f'{HEAD}<Relationships xmlns="{PACKAGE}/relationships">{tags}</Relationships>'


def content_types(names: list[str]) -> str:
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    parts = {"workbook": f"{kind}.sheet.main+xml", "styles": f"{kind}.styles+xml"}
    parts |= {"sharedStrings": f"{kind}.sharedStrings+xml"}
    parts |= {f"worksheets/{name}": f"{kind}.worksheet+xml" for name in names}
    tags = "".join(f'<Override PartName="/xl/{part}.xml" ContentType="{value}"/>' for part, value in parts.items())
    relation = "application/vnd.openxmlformats-package.relationships+xml"
    tags = f'<Default Extension="rels" ContentType="{relation}"/>{tags}'
    return f'{HEAD}<Types xmlns="{PACKAGE}/content-types">{tags}</Types>'
