"""Documents and images with a trained classifier each, to tell how faithful explanations are of what it answers.

licences  Documents of the demo's test split, which nobody knows the deciding passage of.
needle    Documents with two planted statements that the answer needs, so that the right passages are known.
digits    Canvases of scrambled digits with some whole ones of a class: the right patches are known.
dinov2    Stamps, photographs and drawings of Tux Paint, by a linear head on features of a converted DINOv2.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from transformers import AutoTokenizer

from ..checks import check_not_negative, check_positive
from ..conversion.convert import load_factorized
from ..data.labelled import load_data
from ..data.readers.images import convert_image, open_image
from ..data.readers.tables import DataError
from ..data.sets import digit_canvas, license_documents, needle
from ..explain.attribution import Method
from ..explain.units import passage_units, patch_units, sentence_units
from ..files import write_json
from ..hub.folder_lock import released
from ..models import FABertForSequenceClassification, FAViTForImageClassification, FAViTImageProcessor
from ..options import CardOptions, DataOptions, LoopOptions, ModelOptions, OptionGroup, option, resolve
from ..training.checkpointing import prepare_output_dir
from ..training.finetune import fit
from ..training.job import FinetuneJob
from ..training.recipes import recipe_of
from ..training.setup import make_accelerator

RUNS, FEWEST_RUNS = 8, 6
"""Units of a licence: runs of whole sentences, about an eighth of the tokens each; documents with fewer runs than the
second number, whose sentences are long, are left out."""
PASSAGES = 32
SQUARE = 6
"""Patches along a side of the squares that are deleted."""
DIGIT_SHARE = 0.6
"""Share of a canvas's cells that hold a digit, whole or scrambled, as on the demo's canvases."""
STAMP_CLASSES = ("animals", "food", "household", "plants", "town", "vehicles")
HEAD_IMAGES = 30
"""Stamps of each class that the linear head is fitted on, at most."""


METHODS: tuple[str, ...] = (*get_args(Method), "random")
"""Ways to score units: those of `attribute`, and numbers at random."""
TASKS = ("licences", "needle", "digits", "dinov2")
SOURCES = {
    "licences": "make demo",
    "needle": "accelerate launch scripts/studies/needle.py",
    "dinov2": "fa-transformers distill --task images --image_folder FOLDER --output_dir outputs/fa-dinov2",
}
"""The commands that make the models."""


@dataclass(frozen=True)
class FaithfulnessOptions(OptionGroup):
    """The tasks, their models, and the methods to judge."""

    tasks: tuple[str, ...] = option(TASKS, "licences, needle, digits, dinov2", group="study", common=True)
    methods: tuple[str, ...] = option(METHODS, "rows of the tables", group="study", common=True)
    licences: Path = option(Path("outputs/demo"), "folder of the demo's model", group="study", common=True)
    needle: Path = option(Path("outputs/needle"), "folder of needle.py's model", group="study", common=True)
    dinov2: Path = option(Path("outputs/fa-dinov2"), "folder of a converted DINOv2", group="study", common=True)
    stamps: Path = option(
        Path("/usr/share/tuxpaint/stamps"), "folder of the stamps, Debian's tuxpaint-stamps-default", group="study",
        common=True,
    )  # fmt: skip
    num_licences: int = option(16, "licence documents", group="study", common=True)
    num_needles: int = option(10, "needle documents of each length", group="study", common=True)
    num_canvases: int = option(8, "canvases of digits", group="study", common=True)
    num_stamps: int = option(8, "stamps", group="study", common=True)
    lengths: tuple[int, ...] = option((8192, 32768), "tokens of needle documents", group="study", common=True)
    max_tokens: int = option(256, "tokens that licences are cut to", group="study", common=True)
    canvas_px: int = option(384, "side of a canvas of digits in pixels", group="study", common=True)
    digit_epochs: float = option(8.0, "passes over 800 canvases to train on", group="study", common=True)
    steps: int = option(8, "points of integrated gradients", group="study", common=True)
    beam_size: int = option(1, "orders that the search for the extreme ones goes on with", group="study", common=True)
    num_random: int = option(5, "orders at random of each document", group="study", common=True)
    seed: int = option(0, "of all that is drawn", group="study", common=True)
    output_dir: Path = option(
        Path("outputs/faithfulness"), "folder for the results; documents that are done there are taken", group="study",
        common=True,
    )  # fmt: skip
    results: Path | None = option(
        None, "JSON file of a results page, into which the tables are put", group="study", common=True
    )

    def check(self) -> None:
        """Raise ValueError, naming the flag, for what can't be judged."""
        for name, known in (("tasks", TASKS), ("methods", METHODS)):
            chosen = getattr(self, name)
            if not chosen or (unknown := [each for each in chosen if each not in known]):
                wrong = f"{unknown[0]} is unknown" if chosen else "names none"
                raise ValueError(f"--{name} {wrong}; choose from {', '.join(known)}.")
        check_positive(
            self, "num_licences", "num_needles", "num_canvases", "num_stamps", "max_tokens", "canvas_px",
            "digit_epochs", "steps", "beam_size", "num_random",
        )  # fmt: skip
        check_not_negative(self, "seed")
        if min(self.lengths, default=0) < PASSAGES * len(needle.STATEMENT):
            raise ValueError(f"--lengths must be at least {PASSAGES * len(needle.STATEMENT)} tokens each.")

    def check_sources(self) -> None:
        """Raise FileNotFoundError where a task's model isn't there, with the command that makes it."""
        for task, command in SOURCES.items():
            folder = getattr(self, task)
            if task in self.tasks and not (folder / "config.json").is_file():
                raise FileNotFoundError(f"--{task} {folder}: there is no model of that name; make it by {command}")


@dataclass(frozen=True, eq=False)
class Case:
    """One document or image to explain.

    Attributes:
        inputs: the arguments of the model's forward pass.
        units: int [1, N], the units that are deleted; None where nothing is.
        points: int [1, N], the units among which the truth is looked for; None where it isn't known.
        truth: the units of `points` that hold it.
    """

    inputs: dict[str, Tensor]
    units: Tensor | None = None
    points: Tensor | None = None
    truth: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class Task:
    """A classifier and what it is to explain.

    Attributes:
        model: in evaluation mode.
        count: how many cases there are.
        case: makes the case of a number below it.
        about: words on the model and the cases, for the note below a table.
        settings: what the cases depend on, beside the study's own options.
    """

    model: nn.Module
    count: int
    case: Callable[[int], Case]
    about: str
    settings: dict[str, Any] = field(default_factory=dict)


def digest(folder: Path) -> str:
    """Return the first 16 digits of the sha256 of a model folder's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]


def licences(options: FaithfulnessOptions) -> Task:
    """Return test documents of the demo by its classifier, in runs of sentences."""
    model = FABertForSequenceClassification.from_pretrained(options.licences).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.licences)
    texts = license_documents.load_license_documents()["test"]["text"]
    order = np.random.default_rng(options.seed).permutation(len(texts)).tolist()
    cases: list[Case] = []
    for number in order:
        if len(cases) == options.num_licences:
            break
        encoded = tokenizer(
            [texts[number]], truncation=True, max_length=options.max_tokens, return_offsets_mapping=True,
            return_tensors="pt",
        )  # fmt: skip
        sentences, _ = sentence_units([texts[number]], encoded.pop("offset_mapping"))
        units = join_sentences(sentences, RUNS)
        if int(units.max()) + 1 >= FEWEST_RUNS:
            cases.append(Case(dict(encoded), units))
    about = f"{len(cases)} licences, cut to {options.max_tokens} tokens, in {FEWEST_RUNS} to {RUNS} runs of sentences"
    settings = {"model": digest(options.licences), "max_tokens": options.max_tokens, "seed": options.seed}
    return Task(model, len(cases), cases.__getitem__, about, settings)


def join_sentences(sentences: Tensor, number: int) -> Tensor:
    """Join sentences to at most `number` runs of about as many tokens each: int [1, N] -> int [1, N], -1 for none.

    A sentence belongs to the run that its middle lies in.
    """
    counts = torch.bincount(sentences[sentences >= 0])
    middles = counts.cumsum(dim=0) - counts / 2
    _, runs = (middles * number / counts.sum()).long().unique(return_inverse=True)
    return torch.where(sentences >= 0, runs[sentences.clamp(min=0)], -1)


def needle_documents(options: FaithfulnessOptions, length: int) -> Task:
    """Return documents of the needle task of one length, in `PASSAGES` passages, two of which hold what is needed."""
    model = FABertForSequenceClassification.from_pretrained(options.needle).eval()
    texts = {split: list(part["text"]) for split, part in license_documents.load_license_documents().items()}
    vocabulary = needle.build_vocabulary(texts["train"])
    filler = needle.encode_filler(texts["test"], vocabulary)
    documents = [
        needle.plant_statements(filler, vocabulary, length, np.random.default_rng([options.seed, length, number]))
        for number in range(options.num_needles)
    ]
    inputs = [{"input_ids": torch.from_numpy(tokens.astype(np.int64))[None]} for tokens, _, _ in documents]
    with torch.inference_mode():
        right = [
            int(model(**one).logits.argmax()) == label for one, (_, label, _) in zip(inputs, documents, strict=True)
        ]

    def case(number: int) -> Case:
        passages = passage_units(inputs[number], -(-length // PASSAGES))
        places = documents[number][2]
        return Case(inputs[number], None, passages, frozenset(int(passages[0, place]) for place in places))

    about = f"{length:,} tokens: {sum(right)} of {len(right)} answered right"
    return Task(model, len(documents), case, about, {"model": digest(options.needle), "seed": options.seed})


def train_digits(options: FaithfulnessOptions, folder: Path) -> None:
    """Train the demo's small classifier of digits on smaller canvases and write it to a folder, with its accuracy."""
    recipe = recipe_of("image-classification", is_demo=True)
    loop = LoopOptions(
        output_dir=folder, num_threads=1, use_cpu=True, report_to="none", eval_steps=10**9, save_steps=10**9,
        load_best_model_at_end=False, num_train_epochs=options.digit_epochs, seed=options.seed,
    )  # fmt: skip
    data, model = DataOptions(), ModelOptions(image_size=options.canvas_px, classifier_pooling="mean")
    data, model, loop = resolve(data, recipe), resolve(model, recipe), resolve(loop, recipe)
    job = FinetuneJob("image-classification", data, model, loop, resolve(CardOptions(), recipe), "", "")
    canvas = dict(
        num_train=800, num_validation=8, num_test=100, size_px=options.canvas_px,
        digits_per_class=digits_of_a_class(options.canvas_px),
    )  # fmt: skip
    labelled = load_data(job.task, data, job.card, options.seed, canvas)
    accelerator = make_accelerator(loop)
    with released(folder):
        prepare_output_dir(folder, overwrite=True, resume=False)
        fitted = fit(job, None, labelled, accelerator, folder)
    fitted.model.save_pretrained(folder)
    fitted.processor.save_pretrained(folder)
    write_json(folder / "accuracy.json", {"accuracy": fitted.scores["accuracy"], "seconds": fitted.state.seconds})


def digits_of_a_class(canvas_px: int) -> int:
    return int(DIGIT_SHARE * (canvas_px // digit_canvas.CELL_PX) ** 2) // digit_canvas.NUM_CLASSES


def digits(options: FaithfulnessOptions) -> Task:
    """Return test canvases by a classifier that is trained here unless an earlier run did: patches with whole digits
    are the truth, squares of patches are deleted."""
    folder = options.output_dir / "digits-model"
    if not (folder / "accuracy.json").is_file():
        train_digits(options, folder)
    accuracy = json.loads((folder / "accuracy.json").read_text(encoding="utf-8"))["accuracy"]
    model = FAViTForImageClassification.from_pretrained(folder).eval()
    processor = FAViTImageProcessor.from_pretrained(folder)
    px = options.canvas_px
    drawn = list(digit_canvas.draw_canvases("test", options.num_canvases, px, digits_of_a_class(px), options.seed))

    def case(number: int) -> Case:
        canvas, _, whole = drawn[number]
        inputs = dict(processor(convert_image(Image.fromarray(canvas)), return_tensors="pt"))
        points, _ = patch_units(model, inputs)
        squares, _ = patch_units(model, inputs, SQUARE)
        return Case(inputs, squares, points, frozenset(whole))

    about = (
        f"{len(drawn)} canvases of {px} px, {len(drawn[0][2])} of {(px // digit_canvas.CELL_PX) ** 2} patches with a "
        f"whole digit; accuracy on 100 canvases {accuracy:.3f}"
    )
    return Task(model, len(drawn), case, about, {"model": digest(folder), "px": px, "seed": options.seed})


def dinov2(options: FaithfulnessOptions) -> Task:
    """Return stamps by a linear head on the CLS features of a converted DINOv2, in squares of patches.

    Raises:
        DataError: a class has no stamp to fit the head on and another one to explain.
    """
    random = np.random.default_rng(options.seed)
    paths = []
    for name in STAMP_CLASSES:
        inside = sorted((options.stamps / name).rglob("*.png"))
        if len(inside) < 2:
            raise DataError(f"{options.stamps / name}: there are no two stamps; install tuxpaint-stamps-default")
        paths.append([inside[number] for number in random.permutation(len(inside))])
    share = -(-options.num_stamps // len(STAMP_CLASSES))
    shown = [(label, path) for label, some in enumerate(paths) for path in some[:share]][: options.num_stamps]
    fitted_on = [(label, path) for label, some in enumerate(paths) for path in some[share : share + HEAD_IMAGES]]
    processor = FAViTImageProcessor.from_pretrained(options.dinov2)

    def prepare(path: Path) -> dict[str, Tensor]:
        return dict(processor(convert_image(open_image(path)), return_tensors="pt"))

    folder = options.output_dir / "dinov2-model"
    if not (folder / "config.json").is_file():
        fit_head(options.dinov2, [(label, prepare(path)) for label, path in fitted_on], folder)
    model = FAViTForImageClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        right = [int(model(**prepare(path)).logits.argmax()) == label for label, path in shown]

    def case(number: int) -> Case:
        inputs = prepare(shown[number][1])
        return Case(inputs, patch_units(model, inputs, SQUARE)[0])

    about = (
        f"{len(shown)} stamps of {len(STAMP_CLASSES)} classes, {sum(right)} answered right by a linear head that was "
        f"fitted to {len(fitted_on)} others"
    )
    return Task(model, len(shown), case, about, {"model": digest(folder), "seed": options.seed})


def fit_head(source: Path, images: list[tuple[int, dict[str, Tensor]]], folder: Path) -> None:
    """Fit logistic regression to CLS features of labelled images and write the model with it as its linear head."""
    fields: dict[str, Any] = {"num_labels": len(STAMP_CLASSES), "classifier_pooling": "cls"}
    model: Any = load_factorized(source, "AutoModelForImageClassification", **fields).eval()
    with torch.inference_mode():
        features = [model.base_model(**inputs).last_hidden_state[0, 0] for _, inputs in images]
    rows = torch.stack(features).double().numpy()
    scaler = StandardScaler().fit(rows)
    fitted = LogisticRegression(max_iter=2000).fit(scaler.transform(rows), [label for label, _ in images])
    weight = fitted.coef_ / scaler.scale_
    with torch.no_grad():
        model.classifier.weight.copy_(torch.from_numpy(weight))
        model.classifier.bias.copy_(torch.from_numpy(fitted.intercept_ - weight @ scaler.mean_))
    model.save_pretrained(folder)
