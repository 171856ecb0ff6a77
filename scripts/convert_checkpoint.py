"""Convert a pretrained text or image encoder to factorized attention, and write a folder ready to load or distill.

python scripts/convert_checkpoint.py minilm converted --max_length 16384 --local_window 64   # 10 s of CPU time
python scripts/convert_checkpoint.py roberta-base converted --positions interpolate --max_length 4096
python scripts/convert_checkpoint.py facebook/dinov2-small converted --image_size 1036 --key_feature_size 128

Prints what became of every tensor, then one line of JSON. Nothing is trained: the folder says so, in its card and its
config, and loading it warns. SOURCE is a folder, a repository of the Hub, or "minilm" for the installed package.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from fa_transformers import ModelFacts, convert_checkpoint
from fa_transformers.conversion.convert import POSITIONS
from fa_transformers.hub.card import FACTS_FILE
from fa_transformers.training import arguments


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "source",
        help="folder or Hub repository of a stock, sentence-transformers or FA checkpoint, or 'minilm', 'dinov2-small'",
    )
    add("output_dir", type=Path, help="folder for the converted model")
    add("--overwrite_output_dir", action="store_true", help="replace what an earlier conversion wrote there")
    add("--max_length", type=int, help="text: longest document in tokens; unset = as long as the checkpoint's")
    add("--positions", choices=POSITIONS, help="how the position table grows; unset = tile, for images interpolate")
    add("--image_size", type=int, help="images: side in pixels; unset = the checkpoint's")
    add("--auto_class", help="head, as AutoModelForMaskedLM; unset = the checkpoint's own")
    add("--base_model", help="owner/name on the Hub that a local SOURCE was made from, for the model card")
    add("--license", help="licence of the weights as the Hub spells it, for the model card; unset = unknown")
    add("--language", help="ISO 639-1 code of the text, for the model card; unset = not stated")
    arguments.add_field_arguments(parser.add_argument_group("model (unset = off)").add_argument)
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "scripts/convert_checkpoint.py", *(sys.argv[1:] if argv is None else argv)])
    return args


def main(args: argparse.Namespace) -> dict:
    facts = {name: getattr(args, name) for name in ("base_model", "license", "language") if getattr(args, name)}
    conversion = convert_checkpoint(
        args.source,
        output_dir=args.output_dir,
        overwrite=args.overwrite_output_dir,
        max_length=args.max_length,
        positions=args.positions,
        image_size=args.image_size,
        auto_class=args.auto_class,
        facts=facts | {"command": args.command},
        **arguments.model_overrides(args),
    )
    print(conversion.table())
    model = conversion.model
    summary = {
        "source": args.source,
        "output_dir": str(args.output_dir),
        "model_class": type(model).__name__,
        "parameters": model.num_parameters(),
        "tensors": conversion.counts,
        "recovery": model.config.recovery,
        "cosine_to_softmax": ModelFacts.load(args.output_dir / FACTS_FILE).scores[0].value,
    }
    print(json.dumps(summary))
    return summary


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
