"""The command that explains an answer to a document or image; `scripts/explain.py` starts it."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import check_positive
from ..options import PredictOptions
from ..redaction import redact
from .flags import FlagParser, how_started, mistakes_in_one_line, print_json

METHODS = ("gradient_x_input", "integrated_gradients", "rollout", "rows", "occlusion")


@dataclass(frozen=True)
class ExplainCommand:
    """A parsed command line of an explanation; `passage`, `labels` and `methods` are None where none was typed."""

    model: str
    path: Path
    output_dir: Path
    options: PredictOptions
    passage: Any
    labels: list[str] | None
    methods: list[str] | None
    has_json: bool
    overwrite: bool


def parse(argv: Sequence[str] | None = None) -> ExplainCommand:
    """Parse the flags."""
    program = how_started("explain", "scripts/explain.py", launcher="python")
    parser = FlagParser(
        program,
        "Show which passages of a document, or regions of an image, a trained model's answer rests on, as a page.",
        f"{program} outputs/mine judgment.pdf --output_dir pages",
    )
    parser.add_argument("model", metavar="MODEL", help="folder that fine-tuning wrote, or a repository of the Hub")
    parser.add_argument("path", metavar="FILE", type=Path, help="a .txt, a .pdf (needs the extra pdf), or an image")
    parser.add_argument("--output_dir", metavar="PATH", type=Path, required=True, help="folder for the page")
    parser.add_argument(
        "--passage", metavar="N", type=_passage,
        help="what has a score: sentence, N tokens, or of images squares of N patches a side (default: sentence, or at "
        "most 64 squares along a side)",
    )  # fmt: skip
    parser.add_argument(
        "--label", metavar="NAME", nargs="+", help="labels to explain (default: up to three of the most probable)"
    )
    parser.add_argument(
        "--method", nargs="+", choices=METHODS,
        help="methods, the first of which is shown first (default: occlusion where it takes few passes, one for each "
        "passage, else integrated_gradients; and rollout rows gradient_x_input)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="write all numbers as JSON beside the page, too")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier page")
    parser.add_options(PredictOptions, ("max_length", "strict_length", "chunk_size", "device", "dtype"), "reading")
    parser.add_aliases(labels="--label", methods="--method", square="--passage")
    parsed = parser.parse(argv)
    try:
        check_positive(parsed[PredictOptions], "chunk_size", "max_length")
    except ValueError as error:
        parsed.fail(str(error))
    given = parsed.given
    return ExplainCommand(
        given["model"],
        given["path"],
        given["output_dir"],
        parsed[PredictOptions],
        passage=given.get("passage"),
        labels=given.get("label"),
        methods=given.get("method"),
        has_json=given.get("json", False),
        overwrite=given.get("overwrite", False),
    )


def _passage(word: str) -> Any:
    if word == "sentence":
        return word
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is neither sentence nor a number of tokens or patches")
    return int(word)


def main(argv: Sequence[str] | None = None) -> dict:
    """Explain as the flags say; prints what was found and one line of JSON, and returns its content."""
    run = parse(argv)
    endings = ("html", "png", *(["json"] if run.has_json else []))
    files = {ending: run.output_dir / f"{run.path.name}.{ending}" for ending in endings}
    if run.output_dir.exists() and not run.output_dir.is_dir():
        raise FileExistsError(f"--output_dir {run.output_dir} is a file: name a folder.")
    if not run.overwrite and (there := next((file for file in files.values() if file.exists()), None)):
        raise FileExistsError(f"{there} exists: --overwrite replaces it, --output_dir names another folder.")
    from ..files import write_json
    from ..prediction.explanation_chart import draw_explanation
    from ..prediction.explanation_page import write_explanation
    from ..prediction.page_folder import explain_file
    from ..prediction.predictor import Predictor

    names = ("device", "dtype", "max_length", "strict_length", "chunk_size")
    predictor = Predictor.from_pretrained(run.model, **{name: getattr(run.options, name) for name in names})
    explanation = explain_file(predictor, run.path, passage=run.passage, labels=run.labels, methods=run.methods)
    write_explanation(explanation, files["html"])
    draw_explanation(explanation, files["png"])
    if run.has_json:
        write_json(files["json"], explanation.to_json())
    elif run.overwrite:  # an earlier page's numbers would be taken for this one's
        (run.output_dir / f"{run.path.name}.json").unlink(missing_ok=True)
    summary = summarise(explanation, files)
    print(redact(describe(explanation, files["html"])))
    print_json(summary)
    return summary


def summarise(explanation: Any, files: dict[str, Path]) -> dict:
    """Return the files and the answer, for programs."""
    answer = {"label": explanation.answer.label, "probabilities": explanation.probabilities}
    seconds = {"seconds": round(explanation.seconds, 2), "explaining_seconds": round(explanation.explaining_seconds, 1)}
    return (
        {"files": [str(file) for file in files.values()], **answer, "tokens": explanation.num_tokens}
        | {"truncated": explanation.answer.is_truncated}
        | seconds
    )


def describe(explanation: Any, page: Path) -> str:
    """Return the answer and where to look, for people."""
    from ..tables import one_line

    label, score = next(iter(explanation.probabilities.items()))
    read = f"{explanation.num_tokens:,} tokens or patches read in {explanation.seconds:.2f} s"
    if explanation.answer.is_truncated:
        read = f"the beginning alone, {read}"
    spent = f"explained in {explanation.explaining_seconds:.1f} s"
    return f"{one_line(label)} {score:.3f}: {read}, {spent}; open {page} in a browser"


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
