"""Recipes of fine-tuning at equal time, each on three sets of real text with three seeds.

python scripts/studies/choose_recipe.py
python scripts/studies/choose_recipe.py --sets licences --seeds 0 --seconds 120

Each run is kept when it is done; the same command goes on. Ends with a table and one line of JSON.
"""

import json
import platform
from collections.abc import Sequence
from typing import Any

from fa_transformers.commands.flags import describe_command, mistakes_in_one_line, script_parser
from fa_transformers.cores import count_cores
from fa_transformers.files import write_json
from fa_transformers.studies.page_tables import make_table, update_tables
from fa_transformers.studies.recipe_choice import RecipeOptions, run_recipes, score_tfidf, summarise_recipes
from fa_transformers.tables import counted, format_table

PROGRAM = "python scripts/studies/choose_recipe.py"
ABOUT = "Recipes of fine-tuning at equal time."


def parse(argv: Sequence[str] | None = None) -> tuple[RecipeOptions, str]:
    """Return the comparison that the flags ask for, checked, and the command."""
    parser = script_parser(PROGRAM, __doc__)
    parser.add_options(RecipeOptions, ("recipes",), "recipes")
    parsed = parser.parse(argv)
    try:
        parsed[RecipeOptions].check()
    except ValueError as error:
        parsed.fail(str(error))
    return parsed[RecipeOptions], describe_command(PROGRAM, parsed.flags)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options, command = parse(argv)
    rows = run_recipes(options)
    table = summarise_recipes(rows)
    tfidf = {name: score_tfidf(name) for name in options.sets}
    columns: dict[str, dict[str, Any]] = {"recipe": {"name": "recipe"}}
    columns |= {name: {"name": name, "digits": 3} for name in options.sets}
    columns |= {"mean": {"name": "mean", "digits": 3}, "deviation": {"name": "deviation of a run", "digits": 3}}
    columns |= {"macro_f1": {"name": "macro-F1", "digits": 3}, "seconds": {"name": "seconds", "digits": 0}}
    known = [f"{name} {score:.3f}" for name, score in tfidf.items()]
    seeds = f"seed{'s' * (len(options.seeds) > 1)} {', '.join(map(str, options.seeds))}"
    note = f"Accuracy on the test splits, {seeds}. TF-IDF: {', '.join(known)}."
    result = {"rows": rows, "table": table, "tfidf": tfidf, "command": command}
    write_json(options.output_dir / "recipes.json", result)
    if options.results:
        machine = f"1 thread of {platform.machine()} with {counted(count_cores(), 'CPU core')}, mixed precision auto"
        made = make_table("Recipes of fine-tuning at equal time", command, columns, table, note=note, machine=machine)
        update_tables(options.results, ABOUT, {"recipes": made})
    print(format_table(table, list(columns)))
    print(note)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
