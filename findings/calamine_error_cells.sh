#!/usr/bin/env bash
# python-calamine: a cell that Excel shows as #N/A or #DIV/0! is read as an empty text.
#
# Failed formulas come out as "", exactly as an empty cell does, so a table of labels or measurements loses them without an
# error and a row that says "something went wrong here" looks like a row without a value. pandas with openpyxl gives the
# error's name or NaN. Where it matters whether a formula failed, read such sheets with another library.
#
# Seen with Python 3.11, python-calamine 0.9.1. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check python-calamine==0.9.1 XlsxWriter==3.2.9
cd "$folder"
export HF_HOME="$folder/cache"
"$folder/venv/bin/python" - <<'PYTHON'
import python_calamine
import xlsxwriter

cells = ["sea", "", "#N/A", "#DIV/0!", "#REF!", "law"]
with xlsxwriter.Workbook("table.xlsx") as book:
    sheet = book.add_worksheet()
    for row, value in enumerate(cells):
        sheet.write(row, 0, "a document")
        if value.startswith("#"):
            sheet.write_formula(row, 1, "=1/0", None, value)  # as Excel stores a formula that failed
        elif value:
            sheet.write_string(row, 1, value)

rows = python_calamine.CalamineWorkbook.from_path("table.xlsx").get_sheet_by_index(0).to_python()
for written, read in zip(cells, rows, strict=True):
    print(f"{written!r:10} is read as {read[1]!r}")
assert [row[1] for row in rows] == ["sea", "", "", "", "", "law"]
PYTHON
