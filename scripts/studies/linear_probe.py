"""How well frozen image embeddings tell classes apart: a softmax model beside its factorized one, at several sizes.

python scripts/studies/linear_probe.py --image_folder stamps/ --teacher dinov2-small --student outputs/distilled

One folder per class. Logistic regression on the standardised, normalised CLS embedding; the same five folds for all,
drawn `--repeats` times. The accuracies are means over the draws.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import AutoConfig, AutoImageProcessor

from fa_transformers.conversion.convert import load_factorized
from fa_transformers.conversion.packaged import resolve_checkpoint
from fa_transformers.data.collators import ImageCollator
from fa_transformers.data.examples import count_patches
from fa_transformers.distillation.probing import DRAWS, embed_pieces, load_labelled_images, probe
from fa_transformers.files import write_json
from fa_transformers.tables import format_table
from fa_transformers.training.setup import choose_mixed_precision


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--image_folder", type=Path, required=True, help="folder of one folder per class")
    add("--classes", nargs="*", help="names of the class folders to use; unset = all")
    add("--teacher", required=True, help="stock ViT or DINOv2 checkpoint")
    add("--student", help="factorized model of the same architecture")
    add("--image_sizes", type=int, nargs="+", default=[224], help="sides that images are resized to, in pixels")
    add("--batch_size", type=int, default=8, help="images at a time")
    add("--mixed_precision", choices=("no", "bf16", "auto"), default="no", help="autocast type of both models")
    add("--repeats", type=int, default=DRAWS, help="times that the folds are drawn")
    add("--seed", type=int, default=0, help="of the first draw of the folds; the next ones count on")
    add("--num_threads", type=int, default=0, help="CPU threads; 0 = torch's default")
    add("--output", type=Path, default=Path("outputs/linear_probe.json"), help="file for the results")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}.")
    return args


def main(args: argparse.Namespace) -> dict:
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=choose_mixed_precision(args.mixed_precision, on_cpu))
    source = resolve_checkpoint(args.teacher)
    num_layers = AutoConfig.from_pretrained(source).num_hidden_layers
    models = {"teacher": load_factorized(source, "AutoModel", softmax_layers=list(range(num_layers)))}
    if args.student:
        models["student"] = load_factorized(args.student, "AutoModel")
    models = {name: model.eval().to(accelerator.device) for name, model in models.items()}
    data = {}
    for side in args.image_sizes:
        size = {"height": side, "width": side}
        processor = AutoImageProcessor.from_pretrained(source, size=size, do_center_crop=False)
        num_patches = count_patches(side, models["teacher"].config)
        data[side] = load_labelled_images(args.image_folder, processor, num_patches, args.classes)
    rows = []
    for side, labelled in data.items():
        with accelerator.autocast():
            embeddings = {
                name: embed_pieces(model, labelled.pieces, ImageCollator(), args.batch_size, "cls")
                for name, model in models.items()
            }
        scores = {name: probe(part, labelled, args.seed, args.repeats) for name, part in embeddings.items()}
        row: dict = {"image size": side} | scores
        if args.student:
            row["cosine"] = F.cosine_similarity(embeddings["teacher"], embeddings["student"]).mean().item()
        rows.append(row)
    result = {
        "rows": rows, "num_images": len(labelled.labels), "classes": labelled.label_names,
        "majority": labelled.majority, "seed": args.seed, "repeats": args.repeats,
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, result)
    print(format_table(rows, list(rows[0])))
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
