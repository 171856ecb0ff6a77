"""Does length help on your documents? Truncation, mean over passages and FA models at equal tokens, beside word counts.

python scripts/studies/baselines.py                                                  # licence documents
python scripts/studies/baselines.py --fa_model outputs/fa-minilm --fa_lengths 512 2048 --seeds 0 1
python scripts/studies/baselines.py --train_file my.csv --group_column author --folds 5

Each cell (contender, seed, fold) is kept when it is done; the same command with --resume goes on. Ends with a Markdown
table, which is also in report.md, and one line of JSON.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm
from transformers import AutoTokenizer

from fa_transformers.checks import check_loop, check_positive, check_sources
from fa_transformers.commands.flags import describe_command, mistakes_in_one_line, script_parser
from fa_transformers.conversion.source import read_source
from fa_transformers.data.labelled import LabelledData, load_data
from fa_transformers.files import write_json, write_text
from fa_transformers.hub.folder_lock import LOCK_FILE, lock_folder, unlock_folder
from fa_transformers.options import CardOptions, DataOptions, LoopOptions, flat, resolve
from fa_transformers.studies import contenders_report as report
from fa_transformers.studies.contenders import (
    RECIPE,
    ContenderJob,
    ContenderOptions,
    check_stock_length,
    count_lengths,
    list_cells,
    list_contenders,
    run_cell,
)
from fa_transformers.studies.folds import read_groups, split_folds
from fa_transformers.training.data_digests import digest_data
from fa_transformers.training.setup import make_accelerator

PROGRAM = "python scripts/studies/baselines.py"
# Cells of an earlier run are of no use where one of these differs.
SETTINGS = (
    "train_file", "validation_file", "test_file", "dataset_name", "dataset_config_name", "text_column_name",
    "label_column_name", "label_separator", "label_names", "problem_type", "delimiter", "drop_bad_rows",
    "max_train_samples", "max_eval_samples", "group_column", "folds", "model_name_or_path", "fa_model",
    "stock_length", "passages_per_document", "token_budget", "learning_rate", "head_learning_rate",
    "max_tokens_per_batch", "per_device_train_batch_size", "mixed_precision",
)  # fmt: skip


def parse(argv: Sequence[str] | None = None) -> tuple[ContenderJob, CardOptions]:
    """Return the comparison that the flags ask for, checked, and how the data is called."""
    recipe = RECIPE | {"output_dir": Path("outputs/baselines")}
    parser = script_parser(PROGRAM, __doc__, lambda given: recipe)
    parser.add_options(DataOptions, ("text", "labels", "label column", "tokenizing"), "data (none = the licences)")
    parser.add_options(CardOptions, ("data_name",), "name of the data")
    parser.add_options(ContenderOptions, ("contenders", "comparison"), "contenders")
    batches = ("per_device_train_batch_size", "per_device_eval_batch_size", "max_tokens_per_batch")
    machine = ("mixed_precision", "num_threads", "use_cpu", "output_dir")
    parser.add_options(LoopOptions, ("learning_rate", "head_learning_rate", *batches, *machine), "training")
    parsed = parser.parse(argv)
    job = ContenderJob(
        parsed[ContenderOptions],
        resolve(parsed[DataOptions], recipe),
        resolve(parsed[LoopOptions], recipe),
        describe_command(PROGRAM, parsed.flags),
    )
    try:
        check(job)
    except ValueError as error:
        parsed.fail(str(error))
    return job, parsed[CardOptions]


def check(job: ContenderJob) -> None:
    """Raise ValueError, naming the flag, for what no run can use."""
    options = job.contenders
    check_loop(job.loop)
    check_sources(job.data, is_text=True)
    check_positive(options, "passages_per_document", "token_budget")
    for name, lengths in (("stock_length", [options.stock_length]), ("fa_lengths", options.fa_lengths)):
        if min(lengths, default=3) < 3:
            raise ValueError(f"--{name} must be at least 3 tokens, two of which are special, got {min(lengths)}.")
    if options.folds and options.folds < 3:
        raise ValueError(f"--folds must be 0, or at least 3 (train, validation, test), got {options.folds}.")
    for name in ("seeds", "fa_lengths"):
        values = getattr(options, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"--{name} names {list(values)}: one or more, each once.")


def prepare_output_dir(job: ContenderJob, data: LabelledData) -> None:
    """Make the folder, and refuse to mix cells of different settings or data.

    Raises:
        FileExistsError: the folder holds a run, and --resume wasn't given; or another run uses it.
        ValueError: that run had other settings or other data.
    """
    folder = job.loop.output_dir
    options = flat(job.contenders, job.data, job.loop)
    settings = json.loads(json.dumps({name: options[name] for name in SETTINGS}, default=str))
    digests = digest_data(data)
    folder.mkdir(parents=True, exist_ok=True)
    lock_folder(folder, f"--output_dir {folder}")
    if any(entry.name != LOCK_FILE for entry in folder.iterdir()) and not job.contenders.resume:
        unlock_folder(folder)
        raise FileExistsError(f"--output_dir {folder} is not empty: choose another folder, or give --resume.")
    path = folder / "settings.json"
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if earlier[name] != value:
                raise ValueError(
                    f"--{name} was {earlier[name]} in the run that {folder} holds, and is {value} now: give the same, "
                    "or another --output_dir."
                )
        changed = [name for name, digest in digests.items() if earlier.get("data", {}).get(name) != digest]
        if changed:
            raise ValueError(
                f"{folder} holds cells of other data: {', '.join(changed)} changed since. Give the data of the first "
                "run, or another --output_dir."
            )
    write_json(path, settings | {"data": digests})


def run_cells(job: ContenderJob, folds: list[LabelledData], accelerator: Accelerator) -> dict:
    """Return the result of every cell: read where it is done, else computed and kept."""
    loop, seeds = job.loop, job.contenders.seeds
    contenders = list_contenders(job.contenders, folds[0].problem_type)
    cells = {}
    bar = tqdm(list(list_cells(contenders, seeds, len(folds))), desc="cells", unit="cell")
    for contender, seed, fold in bar:
        name = f"{contender.slug}-seed{seed}-fold{fold}"
        path = loop.output_dir / "cells" / f"{name}.json"
        bar.set_postfix_str(name)
        if not path.exists():
            own = replace(loop, seed=seed, output_dir=loop.output_dir / "unfinished" / name)
            write_json(path, run_cell(replace(job, loop=own), contender, folds[fold], accelerator))
        cells[contender, seed, fold] = json.loads(path.read_text(encoding="utf-8"))
    return cells


def main(argv: Sequence[str] | None = None) -> dict:
    job, card = parse(argv)
    options, loop, command = job.contenders, job.loop, job.command
    accelerator = make_accelerator(loop)
    if accelerator.num_processes > 1:
        raise ValueError(
            "baselines.py compares contenders at equal steps and trains in one process: start it with python. Several "
            "seeds or folds can run side by side in folders of their own."
        )
    data = load_data("text-classification", job.data, card, loop.seed)
    prepare_output_dir(job, data)
    folds = [data]
    if options.folds:
        folds = split_folds(data, read_groups(job.data), options.folds)
    check_stock_length(options)
    tokenizer = AutoTokenizer.from_pretrained(read_source(options.model_name_or_path).model_folder)
    lengths = [count_lengths(fold, tokenizer) for fold in folds]
    summary = report.summarise(run_cells(job, folds, accelerator), folds, lengths, options.long_threshold)
    results = {"command": command, "data": data.facts.name, "seeds": list(options.seeds), "folds": options.folds}
    results |= summary
    chart = loop.output_dir / "baselines.png"
    report.plot(summary, chart)
    text = report.render_report(summary, command, data.facts.name, options.token_budget, chart)
    write_text(loop.output_dir / "report.md", text)
    write_json(loop.output_dir / "results.json", results)
    unlock_folder(loop.output_dir)
    print(f"\n{report.render_table(summary)}\n")
    print(json.dumps(results, allow_nan=False))
    return results


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
