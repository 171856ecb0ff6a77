"""How well frozen image embeddings tell classes apart: a softmax model beside its factorized one, at several sizes.

python scripts/linear_probe.py --image_folder stamps/ --teacher dinov2/ --student distilled/ --image_sizes 224 448 896

One folder per class. Logistic regression on the standardised, normalised CLS embedding; the same five folds for all.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel

from fa_transformers.checkpointing import write_json
from fa_transformers.convert import load_factorized
from fa_transformers.data.images import convert_image, open_image
from fa_transformers.packaged_checkpoints import resolve_checkpoint
from fa_transformers.results import format_table
from fa_transformers.unlabelled import find_images

FOLDS = 5


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
    add("--seed", type=int, default=0, help="of the folds")
    add("--num_threads", type=int, default=0, help="CPU threads; 0 = torch's default")
    add("--output", type=Path, default=Path("outputs/linear_probe.json"), help="file for the results")
    return parser.parse_args(argv)


def load_classes(folder: Path, classes: list[str] | None) -> tuple[list[Path], np.ndarray, list[str]]:
    """Image paths, the class index of each, and the names of the classes."""
    names = sorted(classes or [path.name for path in folder.iterdir() if path.is_dir()])
    if len(names) < 2:
        raise ValueError(f"--image_folder {folder} has {len(names)} class folders; a probe needs two or more.")
    found = [(path, index) for index, name in enumerate(names) for path in find_images(folder / name)]
    labels = np.array([index for _, index in found])
    smallest = np.bincount(labels).argmin()
    if np.bincount(labels).min() < FOLDS:
        raise ValueError(f"the class {names[smallest]!r} has fewer than {FOLDS} images, one for each fold.")
    return [path for path, _ in found], labels, names


@torch.inference_mode()
def embed(model: PreTrainedModel, processor, paths: list[Path], image_size: int, batch_size: int) -> torch.Tensor:
    """CLS embeddings, [images, C]."""
    size = {"height": image_size, "width": image_size}
    rows = []
    for start in tqdm(range(0, len(paths), batch_size), desc=f"{image_size} px", unit="batch"):
        images = [convert_image(open_image(path)) for path in paths[start : start + batch_size]]
        inputs = processor(images=images, size=size, do_center_crop=False, return_tensors="pt")
        rows.append(model(inputs["pixel_values"].to(model.device)).last_hidden_state[:, 0].float().cpu())
    return torch.cat(rows)


def probe(embeddings: torch.Tensor, labels: np.ndarray, seed: int) -> float:
    """Accuracy over all images, each predicted by the fold that did not see it."""
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    predictions = cross_val_predict(classifier, F.normalize(embeddings, dim=1).numpy(), labels, cv=folds)
    return float((predictions == labels).mean())


def main(args: argparse.Namespace) -> dict:
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    paths, labels, names = load_classes(args.image_folder, args.classes)
    source = resolve_checkpoint(args.teacher)
    processor = AutoImageProcessor.from_pretrained(source)
    num_layers = AutoConfig.from_pretrained(source).num_hidden_layers
    models = {"teacher": load_factorized(source, "AutoModel", softmax_layers=list(range(num_layers)))}
    if args.student:
        models["student"] = load_factorized(args.student, "AutoModel")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {name: model.eval().to(device) for name, model in models.items()}
    rows = []
    for size in args.image_sizes:
        embeddings = {name: embed(model, processor, paths, size, args.batch_size) for name, model in models.items()}
        row: dict = {"image size": size} | {name: probe(part, labels, args.seed) for name, part in embeddings.items()}
        if args.student:
            row["cosine"] = F.cosine_similarity(embeddings["teacher"], embeddings["student"]).mean().item()
        rows.append(row)
    majority = float(np.bincount(labels).max() / len(labels))
    result = {"rows": rows, "num_images": len(paths), "classes": names, "majority": majority, "seed": args.seed}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, result)
    print(format_table(rows, list(rows[0])))
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main(parse_args())
