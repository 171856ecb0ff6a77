"""Tell how well frozen image embeddings separate classes: a softmax model beside its factorized one, at several sizes.

python scripts/studies/linear_probe.py --image_folder stamps/ --teacher dinov2-small --student outputs/distilled

One folder per class. Logistic regression on the standardised, normalised CLS embedding; the same five folds for all,
drawn `--repeats` times. The accuracies are means over the draws.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import AutoImageProcessor, PreTrainedModel

from fa_transformers.checks import check_positive
from fa_transformers.commands.flags import mistakes_in_one_line, script_parser
from fa_transformers.conversion.convert import load_factorized
from fa_transformers.conversion.source import CheckpointSource, read_source
from fa_transformers.cores import choose_threads
from fa_transformers.data.collators import ImageCollator
from fa_transformers.data.examples import count_patches
from fa_transformers.distillation.probing import DRAWS, LabelledPieces, embed_pieces, load_labelled_images, probe
from fa_transformers.files import write_json
from fa_transformers.options import UNSET, OptionGroup, option
from fa_transformers.tables import format_table
from fa_transformers.training.setup import choose_mixed_precision


@dataclass(frozen=True)
class ProbeOptions(OptionGroup):
    """Images to probe with, and the models that embed them."""

    image_folder: Path = option(UNSET, "folder of one folder per class; needed", group="probe", common=True)
    classes: tuple[str, ...] | None = option(
        None, "names of the class folders to use; unset = all", group="probe", common=True
    )
    teacher: str = option(UNSET, "stock ViT or DINOv2 checkpoint; needed", group="probe", common=True)
    student: str | None = option(None, "factorized model of the same architecture", group="probe", common=True)
    image_sizes: tuple[int, ...] = option(
        (224,), "sides that images are resized to, in pixels", group="probe", common=True
    )
    batch_size: int = option(8, "images at a time", group="probe", common=True)
    mixed_precision: Literal["no", "bf16", "auto"] = option(
        "no", "autocast type of both models", group="probe", common=True
    )
    repeats: int = option(DRAWS, "times that the folds are drawn", group="probe", common=True)
    seed: int = option(0, "seed of the first draw of the folds; the next ones count on", group="probe", common=True)
    num_threads: int = option(
        0, "CPU threads; 0 = OMP_NUM_THREADS, or else the usable cores", group="probe", common=True
    )
    output_dir: Path = option(Path("outputs/linear_probe"), "folder for results.json", group="probe", common=True)

    def check(self) -> None:
        """Raise ValueError, naming the flag, for what no run can use."""
        for name in ("image_folder", "teacher"):
            if getattr(self, name) is UNSET:
                raise ValueError(f"--{name} is missing.")
        check_positive(self, "batch_size", "repeats")
        if min(self.image_sizes, default=0) < 1:
            raise ValueError("--image_sizes must be one or more sides in pixels.")


def parse(argv: Sequence[str] | None = None) -> ProbeOptions:
    """Return the options, checked."""
    parser = script_parser("python scripts/studies/linear_probe.py", __doc__)
    parser.add_options(ProbeOptions, ("probe",), "probe")
    parsed = parser.parse(argv)
    try:
        parsed[ProbeOptions].check()
    except ValueError as error:
        parsed.fail(str(error))
    return parsed[ProbeOptions]


def read_images(options: ProbeOptions, source: CheckpointSource, teacher: PreTrainedModel) -> dict[int, LabelledPieces]:
    """Read the labelled images, resized to each side."""
    data = {}
    for side in options.image_sizes:
        size = {"height": side, "width": side}
        processor = AutoImageProcessor.from_pretrained(source.model_folder, size=size, do_center_crop=False)
        classes = None if options.classes is None else list(options.classes)
        num_patches = count_patches(side, teacher.config)
        data[side] = load_labelled_images(options.image_folder, processor, num_patches, classes)
    return data


def main(argv: Sequence[str] | None = None) -> dict:
    options = parse(argv)
    torch.set_num_threads(choose_threads(options.num_threads).count)
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=choose_mixed_precision(options.mixed_precision, on_cpu))
    source = read_source(options.teacher)
    softmax_layers = list(range(source.config.num_hidden_layers))
    models = {"teacher": load_factorized(source, "AutoModel", softmax_layers=softmax_layers)}
    if options.student:
        models["student"] = load_factorized(options.student, "AutoModel")
    models = {name: model.eval().to(accelerator.device) for name, model in models.items()}
    rows = []
    for side, labelled in read_images(options, source, models["teacher"]).items():
        with accelerator.autocast():
            embeddings = {
                name: embed_pieces(model, labelled.pieces, ImageCollator(), options.batch_size, "cls")
                for name, model in models.items()
            }
        scores = {name: probe(part, labelled, options.seed, options.repeats) for name, part in embeddings.items()}
        row: dict = {"image size": side} | scores
        if options.student:
            row["cosine"] = F.cosine_similarity(embeddings["teacher"], embeddings["student"]).mean().item()
        rows.append(row)
    result = {
        "rows": rows, "num_images": len(labelled.labels), "classes": labelled.label_names,
        "majority": labelled.majority, "seed": options.seed, "repeats": options.repeats,
    }  # fmt: skip
    write_json(options.output_dir / "results.json", result)
    print(format_table(rows, list(rows[0])))
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
