"""Tell which method of `attribute` to trust: deletion and known places, on licences, needles, digits and photographs.

python scripts/studies/faithfulness.py --licences outputs/demo --needle outputs/needle --dinov2 outputs/fa-dinov2
python scripts/studies/faithfulness.py --tasks digits --num_canvases 2 --output_dir outputs/try

The models are made by `make demo`, scripts/studies/needle.py and `fa-transformers distill --task images`; that of the
digits is trained here, in minutes. A document that is done is kept in a file, and the same command goes on. Ends with
the tables and one line of JSON.
"""

import json
from collections.abc import Sequence
from typing import Any

from fa_transformers.commands.flags import describe_command, mistakes_in_one_line, script_parser
from fa_transformers.files import write_json
from fa_transformers.studies.explain_benchmark import ABOUT
from fa_transformers.studies.faithfulness_study import run_study, show, tables_of
from fa_transformers.studies.faithfulness_tasks import FaithfulnessOptions
from fa_transformers.studies.page_tables import make_table, update_tables
from fa_transformers.tables import format_table

PROGRAM = "python scripts/studies/faithfulness.py"


def parse(argv: Sequence[str] | None = None) -> tuple[FaithfulnessOptions, str]:
    """Return the study that the flags ask for, checked, and the command."""
    parser = script_parser(PROGRAM, __doc__)
    parser.add_options(FaithfulnessOptions, ("study",), "study")
    parsed = parser.parse(argv)
    try:
        parsed[FaithfulnessOptions].check()
    except ValueError as error:
        parsed.fail(str(error))
    return parsed[FaithfulnessOptions], describe_command(PROGRAM, parsed.flags)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options, command = parse(argv)
    tables = tables_of(run_study(options), options)
    for table in tables.values():
        columns = table["columns"]
        shown = [{name: show(row.get(name), columns[name]) for name in columns} for row in table["rows"]]
        print(f"\n{table['title']}\n{format_table(shown, list(columns))}\n{table['note']}")
    write_json(options.output_dir / "results.json", tables)
    if options.results:
        made = {
            f"faithfulness-{name}": make_table(
                table["title"], command, table["columns"], table["rows"], note=table["note"],
                machine="1 thread of x86_64, float32",
            )
            for name, table in tables.items()
        }  # fmt: skip
        update_tables(options.results, ABOUT, made)
    print(json.dumps(tables))
    return tables


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
