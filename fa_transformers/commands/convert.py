"""The command that converts a checkpoint; `scripts/convert_checkpoint.py` starts it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..options import UNSET, CardOptions, ConversionOptions, ModelOptions
from ..redaction import without_local_paths
from .flags import FlagParser, describe_command, how_started, mistakes_in_one_line, print_json


@dataclass(frozen=True)
class ConvertCommand:
    """A parsed command line of a conversion."""

    source: str
    output_dir: Path
    conversion: ConversionOptions
    layer: ModelOptions
    card: CardOptions
    command: str
    verbose: bool


def parse(argv: Sequence[str] | None = None) -> ConvertCommand:
    """Parse the flags."""
    program = how_started("convert", "scripts/convert_checkpoint.py", launcher="python")
    parser = FlagParser(
        program,
        "Convert a pretrained text or image encoder to factorized attention, and write a folder ready to load or "
        "distill.",
        f"{program} minilm outputs/converted --positions periodic --max_length 16384 --local_window 64",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="folder or Hub repository of a stock, sentence-transformers or FA checkpoint, or 'minilm', 'dinov2-small'",
    )
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", type=Path, help="folder for the converted model")
    parser.add_options(ConversionOptions, ("conversion",), "conversion")
    parser.add_options(ModelOptions, ("layer",), "layers (unset = off)")
    parser.add_options(CardOptions, ("card",), "model card")
    parser.add_argument(
        "--verbose", action="store_true", help="print what became of every tensor, not only of those that changed"
    )
    parser.add_aliases(folder="OUTPUT_DIR", overwrite="--overwrite_output_dir", position_embedding_type="positions")
    parsed = parser.parse(argv)
    return ConvertCommand(
        parsed.given["source"],
        parsed.given["output_dir"],
        parsed[ConversionOptions],
        parsed[ModelOptions],
        parsed[CardOptions],
        describe_command(program, parsed.flags),
        parsed.given.get("verbose", False),
    )


def main(argv: Sequence[str] | None = None) -> dict:
    """Convert as the flags say; mistakes in them or in the checkpoint end the process in one line."""
    run = parse(argv)
    with mistakes_in_one_line():
        return convert(run)


def convert(run: ConvertCommand) -> dict:
    """Convert, print what became of every tensor, and return the line of JSON that is printed last."""
    from ..conversion.convert import convert_checkpoint
    from ..conversion.folder import describe_cut
    from ..hub.card import FACTS_FILE, ModelFacts

    named = {name: getattr(run.card, name) for name in ("base_model", "license", "language")}
    facts = {name: value for name, value in named.items() if value not in (None, UNSET)}
    conversion = convert_checkpoint(
        run.source,
        output_dir=run.output_dir,
        overwrite=run.conversion.overwrite_output_dir,
        max_length=run.conversion.max_length,
        positions=run.conversion.positions,
        image_size=run.conversion.image_size,
        square=run.conversion.square,
        auto_class=run.conversion.auto_class,
        facts=facts | {"command": without_local_paths(run.command)},
        **run.layer.config_fields,
    )
    print(conversion.table(every=run.verbose))
    if not run.verbose:
        print(f"{conversion.counts['kept']} tensors were kept as they are; --verbose lists them too")
    for line in describe_cut(conversion.model, conversion.processor):
        print(line)
    summary = {
        "source": run.source,
        "output_dir": str(run.output_dir),
        "model_class": type(conversion.model).__name__,
        "parameters": conversion.model.num_parameters(),
        "tensors": conversion.counts,
        "recovery": conversion.model.config.recovery,
        "cosine_to_softmax": ModelFacts.load(run.output_dir / FACTS_FILE).scores[0].value,
    }
    print_json(summary)
    return summary


if __name__ == "__main__":
    main()
