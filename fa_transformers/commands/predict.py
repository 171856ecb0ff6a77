"""The command that predicts for a file or folder; `scripts/predict.py` starts it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..checks import check_positive
from ..options import DataOptions, LoopOptions, PredictOptions
from ..redaction import redact
from ..tables import format_table
from .flags import FlagParser, describe_command, how_started, mistakes_in_one_line, print_json, resumable

if TYPE_CHECKING:
    from ..prediction.run import PredictionRun


@dataclass(frozen=True)
class PredictCommand:
    """A parsed command line of predictions; `label_column` is None where none was typed."""

    model: str
    path: Path
    options: PredictOptions
    data: DataOptions
    label_column: str | None
    report_lengths: tuple[int, ...]
    pages: Path | None
    command: str


def parse(argv: Sequence[str] | None = None) -> PredictCommand:
    """Parse the flags."""
    program = how_started("predict", "scripts/predict.py", launcher="python")
    parser = FlagParser(
        program,
        "Predict labels or numbers for texts or images with a trained model, and write a table. Rows that can't be "
        "used stand in it with the reason.",
        f"{program} outputs/mine texts.csv --output predictions.csv",
    )
    parser.add_argument("model", metavar="MODEL", help="folder that fine-tuning wrote, or a repository of the Hub")
    parser.add_argument(
        "path",
        metavar="PATH",
        type=Path,
        help="csv, tsv, json, jsonl, parquet or xlsx with a column of texts, a .txt, an image, or a folder of either",
    )
    parser.add_argument(
        "--explain", metavar="PATH", type=Path,
        help="folder for a page on each answer, what it rests on, and an index; each takes many passes",
    )  # fmt: skip
    parser.add_options(PredictOptions, ("predict",), "predictions")
    columns = ("text_column_name", "label_column_name", "label_separator", "delimiter")
    parser.add_options(DataOptions, columns, "columns of a table")
    parser.add_options(LoopOptions, ("lengths",), "scores, where a table has a column of labels")
    parsed = parser.parse(argv)
    options = parsed[PredictOptions]
    try:
        check_positive(options, "max_tokens_per_batch", "chunk_size", "max_length")
    except ValueError as error:
        parsed.fail(str(error))
    command = describe_command(program, parsed.flags)
    lengths = parsed[LoopOptions].report_lengths or ()
    label_column = parsed.given.get("label_column_name")
    model, path, pages = parsed.given["model"], parsed.given["path"], parsed.given.get("explain")
    return PredictCommand(model, path, options, parsed[DataOptions], label_column, lengths, pages, command)


def main(argv: Sequence[str] | None = None) -> dict:
    """Predict as the flags say; prints the scores, if there are any, and one line of JSON, and returns its content."""
    run = parse(argv)
    from ..prediction.output import PROGRESS_FILE, partial_folder

    progress = partial_folder(run.options.output) / PROGRESS_FILE
    with resumable(resuming(run.command), lambda: [progress], is_resumed=run.options.resume):
        from ..prediction.run import Columns, predict_file

        columns = Columns(run.data.text_column_name, run.label_column, run.data.delimiter, run.data.label_separator)
        done = predict_file(run.model, run.path, run.options, columns, run.report_lengths, run.pages)
    print_summary(done)
    counts = asdict(done.counts)
    summary = {"output": str(done.output), **counts, "seconds": round(done.seconds, 1), "scores": done.scores}
    summary |= {"by_length": done.by_length} if done.by_length else {}
    summary |= {"index": str(done.index)} if done.index is not None else {}
    print_json(summary)
    return summary


def resuming(command: str) -> str:
    """Return the command that goes on with the run of `command`."""
    plain = command.replace(" --overwrite", "")
    return plain if plain.endswith(" --resume") or " --resume " in plain else f"{plain} --resume"


def print_summary(done: "PredictionRun") -> None:
    """Print what was written, what is wrong with it, and the scores."""
    counts = done.counts
    lines = [f"wrote {done.output}; rows: {counts.rows:,}"]
    if done.index is not None:
        lines.append(f"what the answers rest on: open {done.index} in a browser")
    if counts.truncated:
        lines.append(f"documents cut to {done.limit:,} tokens (column truncated): {counts.truncated:,}")
    if counts.errors:
        lines.append(f"rows without an answer (column error): {counts.errors:,}, first {counts.first_error}")
    if counts.unknown_labels:
        lines.append(f"labels that can't be scored: {counts.unknown_labels:,}; first: {counts.first_unknown}")
    if done.scores:
        columns = ["examples", *done.scores]
        lines += ["", format_table([{"examples": f"{counts.labelled:,}"} | done.scores], columns)]
    if done.by_length:
        from ..prediction.lengths import format_lengths

        lines += ["", "when only the first tokens of each document are read:", format_lengths(done.by_length)]
    print(redact("\n".join(lines)))


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
