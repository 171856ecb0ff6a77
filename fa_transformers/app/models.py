"""Models that the app answers with: folders, or small ones that are trained before it starts, which it says."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..conversion.convert import convert_checkpoint
from ..cores import choose_threads
from ..data.sets.digit_canvas import IMAGE_MEAN, IMAGE_STD, generate_canvases, load_digit_canvas
from ..data.sets.license_documents import load_license_documents
from ..hub.self_check import SELF_TEST_FILE
from ..mistakes import Mistake
from ..models import FAViTConfig, FAViTForImageClassification, FAViTImageProcessor
from ..options import DataOptions, LoopOptions, ModelOptions
from ..prediction.inputs import TextInputs
from ..prediction.predictor import Predictor
from ..prediction.similarity import TextEncoder
from ..training.finetune import SMALL_FAVIT, finetune

MAX_TOKENS = 2**17
"""Tokens that are read of a document, if the model can read as many."""
OUTPUTS = Path("outputs")
DEMOS = {"text": "demo", "image": "images"}
"""Folders in `OUTPUTS` that `make demo` and `make images` write."""
SMALL = Path("app")
"""Folder in `OUTPUTS` of the small models."""
CANVAS_PX = 512
SMALL_CANVASES: dict[str, Any] = dict(size_px=CANVAS_PX, digits_per_class=40, scrambled_per_class=15, seed=0)
NUM_LICENCES, NUM_CANVASES = 12, 6


class AppError(Mistake, ValueError):
    """The app can't start as it was asked to; the message says what to change."""


@dataclass(frozen=True)
class Models:
    """Models of the app, None where there is none.

    Args:
        text, image: classifiers or regressors of documents and of images.
        encoder: makes vectors of texts.
        notes: "text", "image" or "encoder" -> a sentence on where it is from.
        licences: packaged documents by their names.
        canvases: packaged images by their names, as the bytes of files.
    """

    text: Predictor | None = None
    image: Predictor | None = None
    encoder: TextEncoder | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    licences: Mapping[str, str] = field(default_factory=dict)
    canvases: Mapping[str, bytes] = field(default_factory=dict)


def find_models(names: Sequence[str] = (), outputs: Path = OUTPUTS, say: Callable[[str], None] = print) -> Models:
    """Return the models of the app.

    Args:
        names: model folders or repositories of the Hub, one of texts, one of images, or one of each; empty: what
            `make demo` and `make images` wrote to `outputs`, and where it isn't there a small model, which is trained.
        outputs: folder of the demo's models, and of the small ones.
        say: takes a line for whoever starts the app.

    Raises:
        AppError: two models are of one kind.
        SourceError, FileNotFoundError: a model can't be loaded.
        ModuleNotFoundError: a small model's data or weights are not installed.
    """
    torch.set_num_threads(choose_threads().count)
    found: dict[str, Predictor] = {}
    notes: dict[str, str] = {}
    for name in names:
        predictor = load(name)
        kind = predictor.inputs.noun
        if kind in found:
            raise AppError(f"{name}: there is a model of {kind}s already; name one of texts, one of images, or both")
        found[kind], notes[kind] = predictor, f"The model is {Path(name).name}."
    for kind in () if names else DEMOS:
        folder, notes[kind] = _demo_or_small(kind, outputs, say)
        found[kind] = load(str(folder))
    torch.set_num_threads(choose_threads().count)  # training sets its own
    text, image = found.get("text"), found.get("image")
    encoder = None
    if text is not None:
        encoder, notes["encoder"] = _find_encoder(text)
    licences = {} if text is None else packaged_licences()
    canvases = packaged_canvases() if image is not None and _reads_digits(image) else {}
    return Models(text, image, encoder, notes, licences, canvases)


def load(name: str) -> Predictor:
    """Return a predictor that reads at most `MAX_TOKENS` of a document."""
    predictor = Predictor.from_pretrained(name)
    if isinstance(predictor.inputs, TextInputs) and predictor.inputs.limit is None:
        predictor.inputs.limit = MAX_TOKENS
    return predictor


def _demo_or_small(kind: str, outputs: Path, say: Callable[[str], None]) -> tuple[Path, str]:
    """Return a model's folder and where it is from; a small one is trained unless an earlier start did."""
    demo, small = outputs / DEMOS[kind], outputs / SMALL / kind
    target = "make demo" if kind == "text" else "make images"
    if (demo / SELF_TEST_FILE).is_file():
        return demo, f"The model is {demo.name}, which `{target}` trained."
    note = f"The model is a small one, trained for this app in about a minute: it shows how things work, `{target}` "
    note += "trains a better one."
    if not (small / SELF_TEST_FILE).is_file():
        say(f"There is no {demo}: a small model of {kind}s is trained first, which takes one to two minutes.")
        train = train_small_text if kind == "text" else train_small_image
        train(small)
    return small, note


def train_small_text(folder: Path) -> None:
    """Convert MiniLM and fine-tune it for a minute on the beginnings of licence documents."""
    finetune(
        data=DataOptions(max_train_samples=600, max_eval_samples=40),
        model=ModelOptions(max_length=1024),
        loop=LoopOptions(
            num_train_epochs=1.0, short_epochs=1, short_length=256, learning_rate=2e-4, max_tokens_per_batch=4096,
            report_to="none", output_dir=folder, overwrite_output_dir=True, save_total_limit=1,
        ),
    )  # fmt: skip


def train_small_image(folder: Path) -> None:
    """Train a model from scratch for a minute to tell which digit is whole on a canvas of digits and pieces of them."""
    canvases = load_digit_canvas(num_train=640, num_validation=40, num_test=100, **SMALL_CANVASES)
    torch.manual_seed(0)
    config = FAViTConfig(
        **SMALL_FAVIT, image_size=CANVAS_PX, classifier_pooling="mean", local_kernel_size=3, num_labels=10
    )
    statistics: dict[str, Any] = {"image_mean": [IMAGE_MEAN] * 3, "image_std": [IMAGE_STD] * 3}
    processor = FAViTImageProcessor(resample=2, image_size=CANVAS_PX, patch_size=config.patch_size, **statistics)
    with tempfile.TemporaryDirectory() as start:
        FAViTForImageClassification(config).save_pretrained(start)
        processor.save_pretrained(start)
        finetune(
            canvases,
            task="image-classification",
            model=ModelOptions(model_name_or_path=start, image_size=CANVAS_PX),
            loop=LoopOptions(
                num_train_epochs=3.0, learning_rate=3e-3, head_learning_rate=3e-3, per_device_train_batch_size=16,
                report_to="none", output_dir=folder, overwrite_output_dir=True, save_total_limit=1,
            ),
        )  # fmt: skip


def _find_encoder(text: Predictor) -> tuple[TextEncoder, str]:
    """Return MiniLM, converted, where its package is installed, else the encoder of the classifier."""
    try:
        made = convert_checkpoint("minilm", positions="periodic", local_window=64)
    except ModuleNotFoundError:
        note = "The encoder is the classifier's own, which was trained to tell its labels apart, not for similarity."
        return TextEncoder.of_predictor(text, MAX_TOKENS if text.inputs.limit == MAX_TOKENS else None), note
    note = "The encoder is all-MiniLM-L6-v2, converted a moment ago and not trained since."
    return TextEncoder(made.model, made.processor, max_length=MAX_TOKENS), note


def packaged_licences(count: int = NUM_LICENCES) -> dict[str, str]:
    """Return documents that no demo was trained on, of all lengths, the longest first; none without their package."""
    try:
        rows = load_license_documents()["test"]
    except ImportError:
        return {}
    texts = rows["text"][:]
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    chosen = [order[place * (len(order) - 1) // (count - 1)] for place in range(count)]
    words = {index: len(texts[index].split()) for index in chosen}
    return {f"{rows[index]['key']}, {words[index]:,} words": texts[index] for index in chosen}


def packaged_canvases(count: int = NUM_CANVASES) -> dict[str, bytes]:
    """Return canvases of digits that no model was trained on, as the bytes of files."""
    rows = generate_canvases("test", count, **SMALL_CANVASES)
    return {f"canvas {number} (whole: {row['label']})": row["image"]["bytes"] for number, row in enumerate(rows, 1)}


def _reads_digits(image: Predictor) -> bool:
    return image.label_names == [str(digit) for digit in range(10)]
