"""Unlabelled text and images to distil on, cut into pieces that a teacher can read, and how they become a batch."""

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from ..data.batching import LengthGroupedBatchSampler, make_loader
from ..data.collators import ImageCollator, TextCollator
from ..data.examples import ImageExamples, TokenizedRows
from ..data.facts import DataFacts
from ..data.labelled import load_named
from ..data.readers.images import check_images, find_split_folders, image_endings
from ..data.readers.tables import DataError
from ..data.sets import broad_text, license_documents

logger = logging.getLogger(__name__)

SHORTEST_PIECE = 32
"""Tokens below which the rest of a document is left out."""

VALIDATION_SHARE = 0.02
MAX_VALIDATION_PIECES = 64
FEWEST_HELDOUT = 3
"""Pieces of a kind: two have one pair of similarities, which correlates with nothing."""

LICENSE_FACTS = DataFacts(
    name="ScanCode licence documents (held out)",
    license=license_documents.LICENSE,
    attribution=license_documents.ATTRIBUTION,
)
LOADERS = {
    ".jsonl": ("json", {}), ".json": ("json", {}), ".csv": ("csv", {}), ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}), ".txt": ("text", {"sample_by": "document"}),  # else every line were a document
}  # fmt: skip


def load_unlabelled_text(
    args: argparse.Namespace,
) -> tuple[datasets.Dataset, dict[str, datasets.Dataset], list[DataFacts]]:
    """Documents to train on, held-out ones by the name of their kind, all with a column "text", and what they are.

    Of `--train_file` (and `--validation_file`) or `--dataset_name`; without either, prose that comes with installed
    Python packages, and the licence documents as a kind that is never trained on.

    Raises:
        DataError: a file's type is unknown, or the text column is missing.
    """
    if not (args.train_file or args.dataset_name):
        heldout = broad_text.load_broad_text(split="heldout").shuffle(seed=args.seed)
        unseen = license_documents.load_license_documents()["test"].select_columns("text")
        parts = {"same kinds": heldout.select_columns("text"), "licences": unseen}
        facts = [
            DataFacts(name="Prose of installed Python packages", license="various", attribution=broad_text.ATTRIBUTION),
            LICENSE_FACTS,
        ]
        return broad_text.load_broad_text(), parts, facts
    if args.train_file:
        files = {"train": args.train_file, "validation": args.validation_file}
        endings = {path.suffix.lower() for path in files.values() if path}
        if len(endings) != 1 or not endings <= set(LOADERS):
            raise DataError(f"--train_file {args.train_file}: give one of {', '.join(LOADERS)}, the same for all files")
        (kind, options), names = LOADERS[endings.pop()], {name: str(path) for name, path in files.items() if path}
        loaded = datasets.load_dataset(kind, data_files=names, **options)
    else:
        loaded = _load_named_with_train(args)
    if args.text_column_name not in loaded["train"].column_names:
        raise DataError(f"no column {args.text_column_name!r}, only {loaded['train'].column_names}: --text_column_name")
    loaded = _with_validation(loaded, args.seed)
    parts = {name: _only(part, args.text_column_name, "text") for name, part in loaded.items()}
    name = args.data_name or (args.train_file.name if args.train_file else args.dataset_name)
    facts = [DataFacts(name=name, license=args.data_license, attribution=args.data_attribution)]
    return parts["train"], {"same kinds": parts["validation"]}, facts


def _load_named_with_train(args: argparse.Namespace) -> datasets.DatasetDict:
    loaded = load_named(args.dataset_name, args.dataset_config_name)
    if "train" not in loaded:
        raise DataError(f"--dataset_name {args.dataset_name} has no split 'train', only {sorted(loaded)}")
    return loaded


def _with_validation(loaded: datasets.DatasetDict, seed: int) -> dict[str, datasets.Dataset]:
    """The splits "train" and "validation"; the latter a share of the former if there is none."""
    if "validation" in loaded:
        return {name: loaded[name] for name in ("train", "validation")}
    if len(loaded["train"]) < 2:
        raise DataError(f"{len(loaded['train'])} rows are not enough to train and hold out")
    parts = loaded["train"].train_test_split(max(1, int(VALIDATION_SHARE * len(loaded["train"]))), seed=seed)
    return {"train": parts["train"], "validation": parts["test"]}


def _only(rows: datasets.Dataset, column: str, name: str) -> datasets.Dataset:
    """One column, under another name."""
    rows = rows.select_columns(column)
    return rows if column == name else rows.rename_column(column, name)


def cut_into_pieces(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, shortest: int = SHORTEST_PIECE
) -> datasets.Dataset:
    """Pieces of at most `max_length` tokens, each between the tokenizer's special tokens; `shortest` is the fewest."""

    def cut(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        for index, text in zip(indices, batch["text"], strict=True):
            if not isinstance(text, str):
                raise DataError(f"row {index + 1} of the texts has {text!r} instead of text")
        pieces = tokenizer(
            batch["text"], truncation=True, max_length=max_length, return_overflowing_tokens=True, verbose=False
        )["input_ids"]
        rows = [piece for piece in pieces if len(piece) >= shortest]
        return {"input_ids": rows, "length": [len(row) for row in rows]}

    # Small batches: a document can be long.
    return documents.select_columns("text").map(
        cut, with_indices=True, batched=True, batch_size=64, remove_columns="text", desc=f"cutting to {max_length:,}"
    )


class TextPieces(TokenizedRows):
    """The rows of `cut_into_pieces`, `lengths` in tokens; `limit` keeps only so many, drawn by `seed`.

    Raises:
        DataError: there are none.
    """

    def __init__(self, rows: datasets.Dataset, limit: int | None = None, seed: int = 0):
        if not len(rows):
            raise DataError(f"no document has {SHORTEST_PIECE} tokens: there is not enough text to distil on")
        if limit is not None and limit < len(rows):
            rows = rows.shuffle(seed=seed).select(range(limit)).flatten_indices()
        super().__init__(rows)


Pieces = TextPieces | ImageExamples


@dataclass(frozen=True)
class UnlabelledData:
    """What a student is distilled on.

    `train(length)` gives pieces of at most so many tokens (images: all of one size, `length` is ignored); `heldout` has
    pieces that are never trained on, by the name of their kind; `validation` are some of the first kind, for the errors
    of the layers.
    """

    train: Callable[[int], Pieces]
    validation: Pieces
    heldout: dict[str, Pieces]
    collate: Callable[[list[dict]], dict[str, Tensor]]
    facts: list[DataFacts]

    def __post_init__(self) -> None:
        for kind, pieces in self.heldout.items():
            if len(pieces) < FEWEST_HELDOUT:
                raise DataError(
                    f"{len(pieces)} held-out pieces of {kind!r} are too few to compare by, at least {FEWEST_HELDOUT} "
                    "are needed: there is not enough data, or --max_eval_samples is too small"
                )

    def heldout_loaders(self, args: argparse.Namespace, accelerator: Accelerator) -> dict[str, DataLoader]:
        """A prepared loader of each kind of held-out pieces, which gives every piece once."""
        loaders = {}
        for kind, pieces in self.heldout.items():
            sampler = LengthGroupedBatchSampler(
                pieces.lengths,
                args.per_device_eval_batch_size,
                max_tokens=args.max_tokens_per_batch or None,
                shuffle=False,
                num_processes=accelerator.num_processes,
            )
            loaders[kind] = accelerator.prepare(make_loader(pieces, sampler, self.collate, num_workers=0))
        return loaders


def build_text_pieces(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, long_length: int | None = None
) -> UnlabelledData:
    """The text that the flags name, in pieces of `--max_length` tokens.

    With `long_length`, pieces of more tokens than `--max_length`, and at most of so many, are held out as kinds of
    their own.

    Raises:
        DataError: as in `load_unlabelled_text` and `TextPieces`.
    """
    documents, heldout, facts = load_unlabelled_text(args)
    if args.max_train_samples:
        documents = documents.shuffle(seed=args.seed).select(range(min(args.max_train_samples, len(documents))))
    limit = min(args.max_eval_samples, MAX_VALIDATION_PIECES)
    rows = {kind: cut_into_pieces(part, tokenizer, args.max_length) for kind, part in heldout.items()}
    pieces: dict[str, Pieces] = {
        kind: TextPieces(part, args.max_eval_samples, args.seed) for kind, part in rows.items()
    }
    if long_length is not None:
        shortest = args.max_length + 1
        for kind, part in heldout.items():
            long_rows = cut_into_pieces(part, tokenizer, long_length, shortest)
            if len(long_rows) < FEWEST_HELDOUT:
                logger.warning(
                    "%s: %d held-out texts have %d tokens or more, too few to compare", kind, len(long_rows), shortest
                )
            else:
                name = f"{kind}, {shortest:,} to {long_length:,} tokens"
                pieces[name] = TextPieces(long_rows, limit, args.seed)
    return UnlabelledData(
        train=lambda length: TextPieces(cut_into_pieces(documents, tokenizer, length)),
        validation=TextPieces(next(iter(rows.values())), limit, args.seed),
        heldout=pieces,
        collate=TextCollator(tokenizer),
        facts=facts,
    )


def build_image_pieces(args: argparse.Namespace, processor: BaseImageProcessor, num_patches: int) -> UnlabelledData:
    """The images below `--image_folder`, or of `--dataset_name`, to train on and held out.

    Raises:
        DataError: there is no image, or only one, or a broken one; or the column of the data set holds none.
    """
    if args.image_folder is None and args.dataset_name is None:
        raise DataError("--task images needs an --image_folder or a --dataset_name: no images come with the package")
    train, heldout = _named_images(args) if args.image_folder is None else _images_of_folder(args)
    heldout = heldout.shuffle(seed=args.seed)  # files lie class by class, and only the first ones are taken
    if args.max_train_samples:
        train = train.shuffle(seed=args.seed).select(range(min(args.max_train_samples, len(train))))
    augment = {"random_crop": args.random_crop, "random_flip": args.random_flip, "seed": args.seed}
    same_kinds, validation = (
        ImageExamples(heldout.select(range(min(limit, len(heldout)))), processor, num_patches)
        for limit in (args.max_eval_samples, MAX_VALIDATION_PIECES)
    )
    pieces = ImageExamples(train, processor, num_patches, **augment)
    name = args.data_name or args.dataset_name or args.image_folder.resolve().name
    facts = DataFacts(name=name, license=args.data_license, attribution=args.data_attribution)
    return UnlabelledData(lambda length: pieces, validation, {"same kinds": same_kinds}, ImageCollator(), [facts])


def _named_images(args: argparse.Namespace) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Train and held-out rows of `--dataset_name`: its split "validation", or else a share of all."""
    loaded, column = _load_named_with_train(args), args.image_column_name
    features = loaded["train"].features
    if not isinstance(features.get(column), datasets.Image):
        raise DataError(
            f"--dataset_name {args.dataset_name}: the column {column!r} holds no images; its columns are "
            f"{sorted(features)}: give --image_column_name"
        )
    parts = _with_validation(loaded, args.seed).values()
    train, heldout = (_only(part, column, "image").add_column("label", [0] * len(part)) for part in parts)
    return train, heldout


def _images_of_folder(args: argparse.Namespace) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Train and held-out rows of `--image_folder`: of its folders "train" and "validation", where it has them.

    Without "train" it is all images in no folder of a split; without "validation" a share of those is held out. Images
    in "test" are read neither way.
    """
    splits = find_split_folders(args.image_folder)
    chosen = find_images(splits.get("train", args.image_folder))
    if "train" not in splits:
        chosen = [path for path in chosen if not any(path.is_relative_to(split) for split in splits.values())]
    if "validation" in splits:
        heldout = find_images(splits["validation"])
    else:
        shuffled = [chosen[index] for index in np.random.default_rng(args.seed).permutation(len(chosen))]
        count = max(1, int(VALIDATION_SHARE * len(chosen)))
        heldout, chosen = sorted(shuffled[:count]), sorted(shuffled[count:])
    if not chosen:
        raise DataError(
            f"--image_folder {args.image_folder} has {len(heldout)} images outside of 'test': not enough to train and "
            "hold out"
        )
    check_images([*chosen, *heldout])
    return as_image_rows(chosen), as_image_rows(heldout)


def find_images(folder: Path) -> list[Path]:
    """All images below `folder`, sorted; hidden files are none.

    Raises:
        DataError: there is none.
    """
    endings = image_endings()
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in endings and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        raise DataError(f"{folder} holds no file with the ending of an image")
    return found


def as_image_rows(paths: list[Path]) -> datasets.Dataset:
    """Rows as `ImageExamples` takes them, with one label for all."""
    rows = {"image": [str(path) for path in paths], "label": [0] * len(paths)}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
