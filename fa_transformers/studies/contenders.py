"""Whether length helps on a given set of documents: contenders that read a part or all of each, trained alike.

Every network sees the same number of tokens, with the same optimiser, head and pooling (mean over tokens), and is
chosen by the same validation rows. The stock checkpoint runs as an FA model whose layers all keep softmax attention:
that is the stock encoder exactly, with the head of ours. None drops attention weights: factorized layers have none to
drop, and on a CPU it makes a softmax network's step twice as long (5.7 instead of 2.7 s for 8 x 512 tokens).

Shape letters: B documents, K chunks of all of them, N tokens, C hidden width, L labels.
"""

import argparse
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, get_scheduler
from transformers.modeling_outputs import SequenceClassifierOutput

from ..conversion.convert import load_factorized
from ..conversion.packaged import resolve_checkpoint
from ..conversion.source import locate_encoder
from ..conversion.stock_checkpoints import translate_fields
from ..data.batching import LengthGroupedBatchSampler, grouped_batches
from ..data.collators import label_tensor
from ..data.examples import TokenizedRows, build_examples
from ..data.labelled import LabelledData, load_named
from ..data.readers.tables import DataError, open_table
from ..data.sets.license_documents import load_license_documents
from ..data.tokenizing import tokenize_documents
from ..data.word_counts import tfidf_predictions
from ..metrics import BEST_METRICS, decide, load_metric
from ..models.modeling_fa import classification_loss, mean_over_real
from ..training.checkpointing import list_checkpoints
from ..training.loop import run_training
from ..training.report import describe_run
from ..training.setup import build_loaders, group_parameters

UNLIMITED = 2**31 - 1


@dataclass(frozen=True)
class Contender:
    """A row of the table. `kind`: "words" (TF-IDF), "softmax", "chunks" or "factorized"; `max_length`: tokens of a
    document that it reads, None for all; `checkpoint`: what a network starts from.
    """

    name: str
    kind: str
    max_length: int | None
    checkpoint: str | None = None

    @property
    def slug(self) -> str:
        """For file names."""
        return re.sub(r"\W+", "-", self.name.lower()).strip("-")


def list_contenders(args: argparse.Namespace, problem_type: str) -> list[Contender]:
    """The rows that the flags ask for; the first network is the one that the others are compared with."""
    first, stock = args.stock_length, args.model_name_or_path
    words = [
        Contender(f"TF-IDF + logistic regression, first {first:,}", "words", first),
        Contender("TF-IDF + logistic regression, whole", "words", None),
    ]
    networks = [
        Contender(f"softmax, first {first:,}", "softmax", first, stock),
        Contender("softmax, mean of chunks", "chunks", None, stock),
    ]
    if args.fa_model:
        networks += [
            Contender(f"factorized, first {length:,}", "factorized", length, args.fa_model)
            for length in args.fa_lengths
        ]
    return networks + (words if problem_type == "single_label_classification" else [])


def check_stock_length(args: argparse.Namespace) -> None:
    """Raise ValueError if the stock checkpoint has no positions for `--stock_length` tokens."""
    config = AutoConfig.from_pretrained(locate_encoder(args.model_name_or_path))
    fields = translate_fields(config.to_dict(), config.model_type)
    longest = fields["max_position_embeddings"]
    if fields.get("position_embedding_type", "absolute") == "absolute" and args.stock_length > longest:
        raise ValueError(
            f"--stock_length {args.stock_length} is above the {longest} positions of {args.model_name_or_path}, which "
            "the rows of softmax attention read with the weights as they are."
        )


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()[:16]


def read_groups(args: argparse.Namespace) -> dict[bytes, str]:
    """Digest of a document -> the group that must not be cut by a fold: `--group_column`, or the licences' family.

    Raises:
        DataError: the data have no such column.
    """
    if args.train_file:
        if args.group_column is None:
            return {}
        files = [path for path in (args.train_file, args.validation_file, args.test_file) if path is not None]
        rows = (row for path in files for row in open_table(path, args.text_column_name, args.group_column)[1])
        return {digest(text): str(group) for _, text, group in rows}
    if args.dataset_name:
        if args.group_column is None:
            return {}
        loaded, text_column, column = (
            load_named(args.dataset_name, args.dataset_config_name),
            args.text_column_name,
            args.group_column,
        )
    else:
        loaded, text_column, column = load_license_documents(), "text", "family"
    groups: dict[bytes, str] = {}
    for split, part in loaded.items():
        if column not in part.column_names:
            raise DataError(f"split {split!r} has no column {column!r}, only {part.column_names}: give --group_column")
        for batch in part.select_columns([text_column, column]).iter(batch_size=64):
            groups |= {digest(text): str(group) for text, group in zip(batch[text_column], batch[column], strict=True)}
    return groups


def split_folds(data: LabelledData, groups: dict[bytes, str], num_folds: int) -> list[LabelledData]:
    """All rows of all splits, dealt out `num_folds` times: a fold is the test split once, and validation once.

    A group stays whole, and so do equal texts; a document without a group is one of its own. The folds have similar
    shares of each label, and are the same for every contender and seed.

    Raises:
        ValueError: there are fewer than 3 folds, or fewer groups than folds.
    """
    rows = datasets.concatenate_datasets(list(data.dataset.values()))
    names = []
    for batch in rows.select_columns("text").iter(batch_size=64):
        keys = [digest(text) for text in batch["text"]]
        names += [groups.get(key, key.hex()) for key in keys]
    if not 3 <= num_folds <= len(set(names)):
        raise ValueError(
            f"--folds must be at least 3 (train, validation, test) and at most the {len(set(names))} groups of "
            f"documents, got {num_folds}."
        )
    is_single = data.problem_type == "single_label_classification"
    make = StratifiedGroupKFold if is_single else GroupKFold
    labels = list(rows["label"]) if is_single else None
    folds = [test for _, test in make(num_folds, shuffle=True, random_state=0).split(names, labels, names)]
    parts = []
    for number in range(num_folds):
        validation = (number + 1) % num_folds
        train = [fold for other, fold in enumerate(folds) if other not in (number, validation)]
        chosen = {"train": np.concatenate(train), "validation": folds[validation], "test": folds[number]}
        splits = {split: rows.select(np.sort(indices)) for split, indices in chosen.items()}
        parts.append(replace(data, dataset=datasets.DatasetDict(splits)))
    return parts


def count_lengths(data: LabelledData, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Tokens of each document of the split that is scored, special ones included."""
    part = datasets.DatasetDict({data.score_split: data.dataset[data.score_split]})
    return tokenize_documents(part, tokenizer, UNLIMITED)[data.score_split].with_format("numpy")["length"][:]


def cut_texts(
    dataset: datasets.DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> datasets.DatasetDict:
    """The documents up to the end of the last token that fits into `max_length`, special tokens counted."""

    def cut(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(
            batch["text"], truncation=True, max_length=max_length, return_offsets_mapping=True, verbose=False
        )
        ends = [max(end for _, end in offsets) for offsets in encoded["offset_mapping"]]
        return {"text": [text[:end] for text, end in zip(batch["text"], ends, strict=True)]}

    return dataset.map(cut, batched=True, batch_size=64, desc=f"first {max_length} tokens")


class ChunkExamples(TokenizedRows):
    """Documents of one split as chunks of `chunk_length` tokens, each between the tokenizer's special tokens.

    `max_chunks`: only so many of a document, the first ones; None = all. `lengths` in tokens.
    """

    def __init__(
        self,
        part: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        chunk_length: int,
        max_chunks: int | None = None,
    ):
        def cut(batch: dict[str, list]) -> dict[str, list]:
            encoded = tokenizer(
                batch["text"], truncation=True, max_length=chunk_length, return_overflowing_tokens=True, verbose=False
            )
            chunks: list[list[list[int]]] = [[] for _ in batch["text"]]
            for document, tokens in zip(encoded["overflow_to_sample_mapping"], encoded["input_ids"], strict=True):
                if max_chunks is None or len(chunks[document]) < max_chunks:
                    chunks[document].append(tokens)
            return {"chunks": chunks, "length": [sum(map(len, document)) for document in chunks]}

        kept = part.select_columns(["text", "label"])
        rows = kept.map(cut, batched=True, batch_size=64, remove_columns="text", desc="cutting into chunks")
        super().__init__(rows)


class ChunkCollator:
    """The chunks of all documents of a batch as rows, padded to the longest, and the document of each."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: LabelledData):
        self.tokenizer, self.data = tokenizer, data

    def __call__(self, examples: list[dict]) -> dict[str, Tensor]:
        chunks = [{"input_ids": tokens} for example in examples for tokens in example["chunks"]]
        counts = torch.tensor([len(example["chunks"]) for example in examples])
        labels = label_tensor([row["label"] for row in examples], self.data.problem_type, self.data.num_labels)
        batch = dict(self.tokenizer.pad(chunks, return_tensors="pt"))
        return batch | {"documents": torch.arange(len(counts)).repeat_interleave(counts), "labels": labels}


class ChunkMean(nn.Module):
    """Classify a document by the mean of its chunks' embeddings, each the mean of the chunk's hidden states.

    logits = classifier(1/K Σ_k mean_n encoder(chunk k)_n)
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, documents: Tensor, labels: Tensor, **options: Tensor
    ) -> SequenceClassifierOutput:
        """Chunks int [K, N] and the document of each, int [K], in order; `labels` of B documents; logits [B, L]."""
        encoded = self.model.base_model(input_ids, attention_mask, **options).last_hidden_state
        chunks = mean_over_real(encoded, attention_mask.bool())
        total = chunks.new_zeros(len(labels), chunks.shape[1]).index_add(0, documents, chunks)
        counts = torch.bincount(documents, minlength=len(labels))[:, None].to(total.dtype)
        logits = self.model.classifier(self.model.dropout(total / counts))
        return SequenceClassifierOutput(loss=classification_loss(self.model.config, logits, labels), logits=logits)


def steps_for_tokens(sampler: LengthGroupedBatchSampler, num_tokens: int) -> int:
    """Optimiser steps of one batch each until training has seen `num_tokens` real tokens, the last step whole."""
    steps = seen = epoch = 0
    while True:
        for batch in range(0, len(sampler.batches(epoch)), sampler.num_processes):
            seen, steps = seen + sampler.count_tokens(epoch, batch), steps + 1
            if seen >= num_tokens:
                return steps
        epoch += 1


@torch.no_grad()
def predict(
    model: nn.Module,
    examples: Any,
    collate: Callable,
    data: LabelledData,
    args: argparse.Namespace,
    device: torch.device,
) -> tuple[np.ndarray, float]:
    """The decision for every example, in their order, and the mean loss; every process computes all of them."""
    was_training = model.training
    model.eval()
    order, decided, loss = [], [], 0.0
    for indices, batch in grouped_batches(
        examples, collate, args.per_device_eval_batch_size, args.max_tokens_per_batch or None, device
    ):
        output = model(**batch)
        decided.append(decide(output.logits.float().cpu().numpy(), data.problem_type))
        loss += output.loss.item() * len(indices)
        order += indices
    model.train(was_training)
    predictions = np.concatenate(decided)
    predictions[order] = predictions.copy()
    return predictions, loss / len(order)


def score(
    data: LabelledData, split: str, predictions: np.ndarray, chosen: np.ndarray | None = None
) -> dict[str, float]:
    """The numbers of the metric on the rows of `split`, or on those that `chosen` (bool) marks."""
    references = label_tensor(list(data.dataset[split]["label"]), data.problem_type, data.num_labels).numpy()
    references = references.astype(predictions.dtype)
    if chosen is not None:
        predictions, references = predictions[chosen], references[chosen]
    if not len(references):
        return {}
    names = {} if data.label_names is None else {"label_names": data.label_names}
    scores = load_metric(data.problem_type).compute(predictions=predictions, references=references, **names)
    return {name: value for name, value in scores.items() if isinstance(value, float)}


def run_cell(
    args: argparse.Namespace, contender: Contender, data: LabelledData, accelerator: Accelerator, folder: Path
) -> dict:
    """Train one contender on one fold with `args.seed`: its predictions for the scored split, and what it took."""
    if contender.kind == "words":
        dataset = data.dataset
        if contender.max_length is not None:
            tokenizer = AutoTokenizer.from_pretrained(locate_encoder(args.model_name_or_path))
            dataset = cut_texts(dataset, tokenizer, contender.max_length)
        return {"predictions": tfidf_predictions(dataset, data.score_split).tolist()}
    set_seed(args.seed)
    model, tokenizer, mixers_are_new = build_network(args, contender, data)
    network, examples, collate = build_inputs(args, contender, data, model, tokenizer)
    loaders, sampler = build_loaders(args, {"train": examples["train"]}, collate, accelerator)
    assert isinstance(sampler, LengthGroupedBatchSampler)  # nothing is streamed here
    steps = steps_for_tokens(sampler, args.token_budget)
    groups = group_parameters(
        model, args.learning_rate, args.head_learning_rate or 10 * args.learning_rate, args.weight_decay, mixers_are_new
    )
    optimizer = torch.optim.AdamW(groups)
    schedule = get_scheduler("linear", optimizer, int(0.1 * steps), steps)

    def evaluate(trained: nn.Module) -> dict[str, float]:
        predictions, loss = predict(trained, examples["validation"], collate, data, args, accelerator.device)
        return score(data, "validation", predictions) | {"loss": loss}

    resume = "last" if list_checkpoints(folder) else None
    network, state, _ = run_training(
        argparse.Namespace(**vars(args) | {"resume_from_checkpoint": resume}),
        network,
        optimizer,
        schedule,
        loaders["train"],
        sampler,
        accelerator,
        evaluate=evaluate,
        best_metric=BEST_METRICS[data.problem_type],
        max_steps=steps,
        output_dir=folder,
    )
    predictions, _ = predict(network, examples[data.score_split], collate, data, args, accelerator.device)
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder)
    return {"predictions": predictions.tolist(), **describe_run(state)}


def build_network(
    args: argparse.Namespace, contender: Contender, data: LabelledData
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """The model with a fresh head, its tokenizer, and whether its mixers are fresh too."""
    source = resolve_checkpoint(contender.checkpoint or "")
    folder = locate_encoder(source)
    config = AutoConfig.from_pretrained(folder)
    fields = data.config_fields | {"classifier_pooling": "mean", "attention_probs_dropout_prob": 0.0}
    if contender.kind != "factorized":
        fields["softmax_layers"] = list(range(config.num_hidden_layers))
    max_length = contender.max_length or args.stock_length
    model = load_factorized(source, "AutoModelForSequenceClassification", max_length=max_length, **fields)
    return model, AutoTokenizer.from_pretrained(folder), config.model_type != model.config.model_type


def build_inputs(
    args: argparse.Namespace,
    contender: Contender,
    data: LabelledData,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[nn.Module, dict, Callable]:
    """What is trained, the examples of each split, and their collator."""
    if contender.kind != "chunks":
        return model, *build_examples(data, tokenizer, contender.max_length or args.stock_length, args)
    examples = {
        split: ChunkExamples(part, tokenizer, args.stock_length, args.chunks_per_document if split == "train" else None)
        for split, part in data.dataset.items()
    }
    return ChunkMean(model), examples, ChunkCollator(tokenizer, data)


def list_cells(contenders: Sequence[Contender], seeds: Sequence[int], num_folds: int) -> Iterator[tuple]:
    """(contender, seed, fold) of everything that is to be run; words have nothing random, so one seed is enough."""
    for fold, seed, contender in product(range(num_folds), seeds, contenders):
        if contender.kind != "words" or seed == seeds[0]:
            yield contender, seed, fold
