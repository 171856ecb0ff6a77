"""What a classification script trains on: examples of each split, their lengths, and how they become a batch."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from ..models import FAViTConfig
from .collators import pack_tokens
from .facts import DataFacts
from .readers.files import (
    DataError,
    encode_dataset,
    fill_splits,
    label_names,
    load_text_files,
    problem_type_of,
    tokenize_documents,
)
from .readers.images import convert_image, load_image_folder
from .readers.streams import DocumentStream, open_files, open_named
from .sets import digit_canvas, license_documents


@dataclass(frozen=True)
class LabelledData:
    """Checked raw data, as `fa_transformers.data` gives it, and what the labels are.

    `dataset` has the splits train and validation, and perhaps test, with the columns "label" and "text" or "image";
    `label_names` is None for regression. With `stream`, the rows to train on come from there, raw, and the split train
    is the validation data once more.
    """

    dataset: datasets.DatasetDict
    problem_type: str
    label_names: list[str] | None
    facts: DataFacts
    is_demo: bool
    stream: datasets.IterableDataset | None = None

    @property
    def num_labels(self) -> int:
        return 1 if self.label_names is None else len(self.label_names)

    @property
    def config_fields(self) -> dict:
        """What a model's config must say about the labels."""
        fields = {"num_labels": self.num_labels, "problem_type": self.problem_type}
        if self.label_names is not None:
            fields["id2label"] = dict(enumerate(self.label_names))
            fields["label2id"] = {name: index for index, name in enumerate(self.label_names)}
        return fields

    @property
    def image_statistics(self) -> dict:
        """Mean and deviation that a new image processor normalises this data by; its own defaults for users' data."""
        if not self.is_demo:
            return {}
        return {"image_mean": [digit_canvas.IMAGE_MEAN] * 3, "image_std": [digit_canvas.IMAGE_STD] * 3}

    @property
    def score_split(self) -> str:
        """The split that the final scores are on."""
        return "test" if "test" in self.dataset else "validation"


def load_data(args: argparse.Namespace) -> LabelledData:
    """Read the data that the flags of `add_data_arguments` name, or build the task's demo data, and check every row.

    Raises:
        DataError: a file, row, column or label can't be used; the message names it and the mend.
    """
    is_text = args.task == "text-classification"
    is_demo = not (args.train_file or args.image_folder or args.dataset_name)
    stream = None
    columns = {"label_column": args.label_column_name, "problem_type": args.problem_type, "seed": args.seed}
    if is_demo and is_text:
        dataset = encode_dataset(license_documents.load_license_documents())
        facts = _demo_facts("ScanCode licence documents", license_documents)
    elif is_demo:
        dataset = digit_canvas.load_digit_canvas(**args.canvas)
        facts = _demo_facts("Digit canvas (generated)", digit_canvas)
    elif args.streaming:
        columns |= {"text_column": args.text_column_name, "label_separator": args.label_separator}
        if args.train_file:
            stream = open_files(str(args.train_file))
            dataset = load_text_files(args.validation_file, args.validation_file, args.test_file, **columns)
            facts = _user_facts(args, args.train_file.name)
        else:
            stream, others = open_named(args.dataset_name, args.dataset_config_name)
            loaded = datasets.DatasetDict({"train": others["validation"]} | others)
            dataset = encode_dataset(loaded, **columns)
            facts = _named_facts(args)
    elif args.train_file:
        columns |= {"text_column": args.text_column_name, "label_separator": args.label_separator}
        dataset = load_text_files(args.train_file, args.validation_file, args.test_file, **columns)
        facts = _user_facts(args, args.train_file.name)
    elif args.image_folder:
        dataset = load_image_folder(args.image_folder, seed=args.seed)
        facts = _user_facts(args, args.image_folder.resolve().name)
    else:
        loaded = load_named(args.dataset_name, args.dataset_config_name)
        if is_text:
            columns |= {"text_column": args.text_column_name, "label_separator": args.label_separator}
            dataset = encode_dataset(loaded, **columns)
        else:
            dataset = encode_images(loaded, args.image_column_name, args.label_column_name, args.seed)
        facts = _named_facts(args)
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_eval_samples}
    kept = {}
    for split, part in dataset.items():
        limit = limits[split] or len(part)
        kept[split] = part if limit >= len(part) else part.shuffle(seed=args.seed).select(range(limit))
    names = label_names(dataset)
    return LabelledData(datasets.DatasetDict(kept), problem_type_of(dataset), names, facts, is_demo, stream)


def load_named(name: str, config_name: str | None) -> datasets.DatasetDict:
    """A data set of the Hub, or the local folder of one."""
    if (Path(name) / "dataset_dict.json").is_file():
        return datasets.load_from_disk(name)
    loaded = datasets.load_dataset(name, config_name)
    if not isinstance(loaded, datasets.DatasetDict):
        raise DataError(f"--dataset_name {name} has no splits; it needs at least 'train'.")
    return loaded


def encode_images(
    dataset: datasets.DatasetDict, image_column: str = "image", label_column: str = "label", seed: int = 0
) -> datasets.DatasetDict:
    """A loaded DatasetDict with the columns "image" and "label" (ClassLabel) only; missing splits are drawn from train.

    Raises:
        DataError: a column is missing, has another type, or a later split has a label that train lacks.
    """
    if "train" not in dataset:
        raise DataError(f"the data set has no split 'train', only {sorted(dataset)}: name one of them 'train'")
    encoded = {}
    names: list[str] | None = None
    for split in [name for name in ("train", "validation", "test") if name in dataset]:
        part = dataset[split]
        for flag, column in (("--image_column_name", image_column), ("--label_column_name", label_column)):
            if column not in part.column_names:
                raise DataError(f"split {split!r} has no column {column!r}, only {part.column_names}: give {flag}")
        part = part.select_columns([image_column, label_column])
        part = part.rename_columns({image_column: "image", label_column: "label"})
        if not isinstance(part.features["image"], datasets.Image):
            raise DataError(f"split {split!r}: column {image_column!r} holds {part.features['image']}, not images")
        if not isinstance(part.features["label"], datasets.ClassLabel):
            values = [str(value) for value in part["label"]]
            names = names or sorted(set(values))
            unknown = sorted(set(values) - set(names))
            if unknown:
                raise DataError(f"split {split!r} has the label {unknown[0]!r}, which train lacks")
            part = part.remove_columns("label").add_column("label", [names.index(value) for value in values])
            part = part.cast_column("label", datasets.ClassLabel(names=names))
        encoded[split] = part
    return fill_splits(datasets.DatasetDict(encoded), 0.1, 0.1, seed)


def _user_facts(args: argparse.Namespace, name: str, hub_id: str | None = None) -> DataFacts:
    return DataFacts(
        name=args.data_name or name, license=args.data_license, attribution=args.data_attribution, hub_id=hub_id
    )


def _named_facts(args: argparse.Namespace) -> DataFacts:
    return _user_facts(args, args.dataset_name, None if Path(args.dataset_name).exists() else args.dataset_name)


def _demo_facts(name: str, module: ModuleType) -> DataFacts:
    return DataFacts(name=name, license=module.LICENSE, attribution=module.ATTRIBUTION)


def label_tensor(labels: Sequence, problem_type: str, num_labels: int) -> Tensor:
    """Labels as the loss takes them: class indices [B], zeros and ones [B, L] in float32, or numbers [B] in float32."""
    if problem_type == "single_label_classification":
        return torch.tensor(labels, dtype=torch.long)
    if problem_type == "regression":
        return torch.tensor(labels, dtype=torch.float32)
    rows = torch.zeros(len(labels), num_labels)
    for row, classes in zip(rows, labels, strict=True):
        row[list(classes)] = 1.0
    return rows


class TokenizedRows(torch.utils.data.Dataset):
    """Rows of token ids; `lengths` in tokens, which the column "length" holds."""

    def __init__(self, rows: datasets.Dataset):
        self.lengths = rows.with_format("numpy")["length"][:]
        self._rows = rows.remove_columns("length")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:
        return self._rows[index]


class TextExamples(TokenizedRows):
    """Tokenized documents of one split; `lengths` in tokens.

    In the first `short_epochs` epochs a document is cut to `short_length` tokens; the closing token stays the last.
    """

    def __init__(self, tokenized: datasets.Dataset, *, short_epochs: int = 0, short_length: int = 0):
        super().__init__(tokenized)
        self._short_epochs, self._short_length, self._epoch = short_epochs, short_length, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __getitem__(self, index: int) -> dict:
        row = super().__getitem__(index)
        if self._epoch >= self._short_epochs or self.lengths[index] <= self._short_length:
            return row
        kept = self._short_length - 1
        return {name: value if name == "label" else value[:kept] + value[-1:] for name, value in row.items()}


class TextCollator:
    """Pads the documents of a batch to its longest one, or with `packing` puts them one after the other."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: LabelledData, packing: bool = False):
        self.tokenizer, self.data, self.packing = tokenizer, data, packing

    def __call__(self, examples: list[dict]) -> dict[str, Tensor]:
        labels = [example["label"] for example in examples]
        tokens = [{name: value for name, value in example.items() if name != "label"} for example in examples]
        batch = pack_tokens(tokens) if self.packing else dict(self.tokenizer.pad(tokens, return_tensors="pt"))
        return batch | {"labels": label_tensor(labels, self.data.problem_type, self.data.num_labels)}


class ImageExamples(torch.utils.data.Dataset):
    """Images of one split, processed when asked for; `lengths` in patches, all alike.

    Crops and mirror images are drawn from (seed, epoch, index), so that they don't depend on the order in which images
    are asked for.
    """

    def __init__(
        self,
        images: datasets.Dataset,
        processor: BaseImageProcessor,
        num_patches: int,
        *,
        random_crop: bool = False,
        random_flip: bool = False,
        seed: int = 0,
    ):
        self.lengths = [num_patches] * len(images)
        self._images, self._processor, self._seed, self._epoch = images, processor, seed, 0
        self._random_crop, self._random_flip = random_crop, random_flip

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict:
        row = self._images[index]
        image = convert_image(row["image"])
        random = np.random.default_rng([self._seed, self._epoch, index])
        if self._random_crop:
            image = crop_randomly(image, random)
        if self._random_flip and random.random() < 0.5:
            image = ImageOps.mirror(image)
        pixel_values = self._processor(images=image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixel_values, "label": row["label"]}


class ImageCollator:
    """Stacks the images of a batch."""

    def __init__(self, data: LabelledData):
        self.data = data

    def __call__(self, examples: list[dict]) -> dict[str, Tensor]:
        labels = label_tensor([row["label"] for row in examples], self.data.problem_type, self.data.num_labels)
        return {"pixel_values": torch.stack([row["pixel_values"] for row in examples]), "labels": labels}


def count_patches(image_size: int, config: FAViTConfig) -> int:
    """Patches of a square image, incomplete ones included."""
    return math.prod(-(-image_size // side) for side in config.patch_shape)


def crop_randomly(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A crop of 60 to 100 % of the area with sides in a ratio from 3:4 to 4:3 times the image's own."""
    area, log_ratio = random.uniform(0.6, 1.0), random.uniform(np.log(3 / 4), np.log(4 / 3))
    width = min(image.width, max(1, round(image.width * (area * np.exp(log_ratio)) ** 0.5)))
    height = min(image.height, max(1, round(image.height * (area / np.exp(log_ratio)) ** 0.5)))
    left, top = random.integers(image.width - width + 1), random.integers(image.height - height + 1)
    return image.crop((left, top, left + width, top + height))


def build_examples(
    data: LabelledData,
    processor: PreTrainedTokenizerBase | BaseImageProcessor,
    num_tokens: int,
    args: argparse.Namespace,
) -> tuple[dict[str, torch.utils.data.Dataset | DocumentStream], TextCollator | ImageCollator]:
    """The examples of each split and the collator for them.

    `num_tokens`: for text the longest document in tokens, for images the number of patches of one.
    """
    examples: dict[str, torch.utils.data.Dataset | DocumentStream]
    if args.task == "text-classification":
        splits = {split: part for split, part in data.dataset.items() if split != "train" or data.stream is None}
        tokenized = tokenize_documents(
            datasets.DatasetDict(splits),
            processor,
            num_tokens,
            strict_length=args.strict_length,
            num_proc=args.preprocessing_num_workers,
            overwrite_cache=args.overwrite_cache,
        )
        short = {"short_epochs": args.short_epochs, "short_length": args.short_length}
        examples = {
            split: TextExamples(part, **(short if split == "train" else {})) for split, part in tokenized.items()
        }
        if data.stream is not None:
            examples["train"] = DocumentStream(
                data.stream,
                processor,
                num_tokens,
                data.problem_type,
                data.label_names,
                source=str(args.train_file or args.dataset_name),
                text_column=args.text_column_name,
                label_column=args.label_column_name,
                label_separator=args.label_separator,
                strict_length=args.strict_length,
            )
        return examples, TextCollator(processor, data, args.packing)
    augment = {"random_crop": args.random_crop, "random_flip": args.random_flip, "seed": args.seed}
    examples = {
        split: ImageExamples(part, processor, num_tokens, **(augment if split == "train" else {}))
        for split, part in data.dataset.items()
    }
    return examples, ImageCollator(data)
