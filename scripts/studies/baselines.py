"""Does length help on your documents? Truncation, chunk-and-mean and FA models at equal tokens, beside word counts.

python scripts/studies/baselines.py                                                  # licence documents
python scripts/studies/baselines.py --fa_model outputs/fa-minilm --fa_lengths 512 2048 --seeds 0 1
python scripts/studies/baselines.py --train_file my.csv --group_column author --folds 5

Each cell (contender, seed, fold) is kept when it is done; the same command with --resume goes on. Ends with a Markdown
table, which is also in report.md, and one line of JSON.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm
from transformers import AutoTokenizer

from fa_transformers.conversion.source import locate_encoder
from fa_transformers.data.labelled import load_data
from fa_transformers.files import write_json, write_text
from fa_transformers.studies import contenders as baselines
from fa_transformers.studies import contenders_report as report
from fa_transformers.training import arguments
from fa_transformers.training.checkpointing import CheckpointError
from fa_transformers.training.setup import make_accelerator

# What a run needs besides the flags: the same for every contender.
FIXED = dict(
    task="text-classification", packing=False, group_by_length=True, short_epochs=0, short_length=0,
    gradient_accumulation_steps=1, max_grad_norm=1.0, weight_decay=0.01, eval_steps=0, save_steps=0, save_total_limit=1,
    load_best_model_at_end=True, early_stopping_patience=0, logging_steps=10, report_to="none", strict_length=False,
    dataloader_num_workers=None, resume_from_checkpoint=None, seed=0, ddp_timeout=1800,
    sequence_parallel_size=1, profile=False,
)  # fmt: skip
# Flags of finetune.py without a use here: folds and equal budgets need all rows, and there is no model card.
LEAVE_OUT = (
    "image_folder", "image_column_name", "random_crop", "random_flip", "streaming", "data_license", "data_attribution",
)  # fmt: skip
# An earlier run's cells are of no use where one of these differs.
SETTINGS = (
    "train_file", "validation_file", "test_file", "dataset_name", "dataset_config_name", "text_column_name",
    "label_column_name", "label_separator", "problem_type", "max_train_samples", "max_eval_samples", "group_column",
    "folds", "model_name_or_path", "fa_model", "stock_length", "chunks_per_document", "token_budget", "learning_rate",
    "head_learning_rate", "max_tokens_per_batch", "per_device_train_batch_size", "mixed_precision",
)  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    arguments.add_data_arguments(parser, leave_out=LEAVE_OUT)
    add = parser.add_argument_group("contenders").add_argument
    add("--model_name_or_path", default="minilm", help="stock BERT-class checkpoint of the softmax rows")
    add("--fa_model", help="FA checkpoint of the factorized rows; unset = no such rows")
    add("--fa_lengths", type=int, nargs="+", default=[512, 2048], help="tokens that the factorized rows read")
    add("--stock_length", type=int, default=512, help="tokens that the stock checkpoint reads, and those of a chunk")
    add("--chunks_per_document", type=int, default=4, help="first chunks of a document to train on; all are scored")
    add = parser.add_argument_group("comparison").add_argument
    add("--token_budget", type=int, default=1_200_000, help="tokens that every network is trained on")
    add("--seeds", type=int, nargs="+", default=[0], help="of head, order and dropout")
    add("--folds", type=int, default=0, help="cross-validate over so many folds of all rows; 0 = the given split")
    add("--group_column", help="column whose equal values stay in one fold; the licences have families")
    add("--long_threshold", type=int, default=1024, help="documents of more tokens are scored apart, too")
    add = parser.add_argument_group("training").add_argument
    add("--learning_rate", type=float, default=1e-4, help="peak rate of the encoder")
    add("--head_learning_rate", type=float, help="peak rate of new weights; unset = ten times")
    add("--per_device_train_batch_size", type=int, default=32, help="most documents in a batch")
    add("--per_device_eval_batch_size", type=int, default=16, help="most documents in an evaluation batch")
    add("--max_tokens_per_batch", type=int, default=4096, help="most tokens in a batch, padding included")
    add("--mixed_precision", choices=("no", "fp16", "bf16", "auto"), default="auto", help="autocast type")
    add("--num_threads", type=int, default=0, help="CPU threads; 0 = all cores")
    add("--use_cpu", action="store_true", help="train on the CPU even if there is a GPU")
    add("--output_dir", type=Path, default=Path("outputs/baselines"), help="folder for cells, report and chart")
    add("--resume", action="store_true", help="keep the cells that --output_dir holds, and do the others")
    parser.set_defaults(**FIXED)
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "scripts/studies/baselines.py", *(sys.argv[1:] if argv is None else argv)])
    args.resume_command = args.command if args.resume else f"{args.command} --resume"
    try:
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError, naming the flag, for what no run can use."""
    for name in ("chunks_per_document", "token_budget", "per_device_train_batch_size", "per_device_eval_batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    for name, lengths in (("stock_length", [args.stock_length]), ("fa_lengths", args.fa_lengths)):
        if min(lengths) < 3:
            raise ValueError(f"--{name} must be at least 3 tokens, two of which are special, got {min(lengths)}.")
    if args.folds and args.folds < 3:
        raise ValueError(f"--folds must be 0, or at least 3 (train, validation, test), got {args.folds}.")
    if args.group_column and not args.folds:
        raise ValueError("--group_column says what a fold must not cut: give --folds too.")
    arguments.check_sources(args, is_text=True)
    for name in ("seeds", "fa_lengths"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            raise ValueError(f"--{name} names {getattr(args, name)}: each once.")


def prepare_output_dir(args: argparse.Namespace) -> None:
    """Make the folder, and refuse to mix cells of different settings.

    Raises:
        FileExistsError: the folder holds a run, and --resume wasn't given.
        ValueError: that run had other settings.
    """
    path = args.output_dir / "settings.json"
    settings = json.loads(json.dumps({name: getattr(args, name) for name in SETTINGS}, default=str))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if any(args.output_dir.iterdir()) and not args.resume:
        raise FileExistsError(f"--output_dir {args.output_dir} is not empty: choose another folder, or give --resume.")
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if earlier[name] != value:
                raise ValueError(
                    f"--{name} was {earlier[name]} in the run that {args.output_dir} holds, and is {value} now: give "
                    "the same, or another --output_dir."
                )
    write_json(path, settings)


def run_cells(args: argparse.Namespace, folds: list, accelerator: Accelerator) -> dict:
    """The result of every cell: read where it is done, else computed and kept."""
    contenders = baselines.list_contenders(args, folds[0].problem_type)
    cells = {}
    bar = tqdm(list(baselines.list_cells(contenders, args.seeds, len(folds))), desc="cells", unit="cell")
    for contender, seed, fold in bar:
        name = f"{contender.slug}-seed{seed}-fold{fold}"
        path = args.output_dir / "cells" / f"{name}.json"
        bar.set_postfix_str(name)
        if not path.exists():
            folder = args.output_dir / "unfinished" / name
            own = argparse.Namespace(**vars(args) | {"seed": seed, "output_dir": folder})
            cell = baselines.run_cell(own, contender, folds[fold], accelerator, folder)
            path.parent.mkdir(exist_ok=True)
            write_json(path, cell)
        cells[contender, seed, fold] = json.loads(path.read_text(encoding="utf-8"))
    return cells


def main(args: argparse.Namespace) -> dict:
    accelerator = make_accelerator(args)
    if accelerator.num_processes > 1:
        raise ValueError(
            "baselines.py compares contenders at equal steps and trains in one process: start it with python. Several "
            "seeds or folds can run side by side in folders of their own."
        )
    data = load_data(args)
    prepare_output_dir(args)
    folds = baselines.split_folds(data, baselines.read_groups(args), args.folds) if args.folds else [data]
    baselines.check_stock_length(args)
    tokenizer = AutoTokenizer.from_pretrained(locate_encoder(args.model_name_or_path))
    lengths = [baselines.count_lengths(fold, tokenizer) for fold in folds]
    summary = report.summarise(run_cells(args, folds, accelerator), folds, lengths, args.long_threshold)
    results = {"command": args.command, "data": data.facts.name, "seeds": args.seeds, "folds": args.folds} | summary
    chart = args.output_dir / "baselines.png"
    report.plot(summary, chart)
    text = report.render_report(summary, args.command, data.facts.name, args.token_budget, chart)
    write_text(args.output_dir / "report.md", text)
    write_json(args.output_dir / "results.json", results)
    print(f"\n{report.render_table(summary)}\n")
    print(json.dumps(results, allow_nan=False))
    return results


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError, ImportError, CheckpointError) as error:
        raise SystemExit(f"error: {error}") from error
