"""Contenders that read a part or all of each document, trained alike: they tell whether length helps on a data set.

Every network sees the same number of tokens, with the same optimiser, head and pooling (mean over tokens), and is
chosen by the same validation rows. The stock checkpoint runs as an FA model whose layers all keep softmax attention:
that is the stock encoder exactly, with the head of ours. Attention dropout is off for all: factorized layers have no
weights to drop, and it would double a softmax step on a CPU (5.7 s against 2.7 s for 8 x 512 tokens).

Shape letters: B documents, K passages of all of them, N tokens, C hidden width, L labels.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from ..conversion.convert import load_factorized
from ..conversion.source import read_source
from ..conversion.stock_checkpoints import translate_fields
from ..data.batching import LengthGroupedBatchSampler, grouped_batches
from ..data.collators import label_tensor
from ..data.examples import TokenizedRows, build_examples
from ..data.labelled import LabelledData
from ..data.tokenizing import load_tokenizer, tokenize_documents
from ..data.word_counts import tfidf_predictions
from ..evaluation import evaluating
from ..metrics import BEST_METRICS, decide, load_metric
from ..models.modeling_fa import classification_loss, mean_over_real
from ..options import DataOptions, LoopOptions, ModelOptions, OptionGroup, option
from ..training.checkpointing import list_checkpoints
from ..training.data_digests import digest_data
from ..training.loaders import build_loaders
from ..training.loop import run_training
from ..training.optimizer import build_optimizer, group_parameters
from ..training.report import describe_run

UNLIMITED = 2**31 - 1
RECIPE: dict[str, Any] = dict(
    learning_rate=1e-4, per_device_train_batch_size=32, per_device_eval_batch_size=16, max_tokens_per_batch=4096,
    mixed_precision="auto", num_threads=0, group_by_length=True, short_epochs=0, short_length=0,
    gradient_accumulation_steps=1, num_train_epochs=1.0, max_steps=-1, max_grad_norm=1.0, weight_decay=0.01,
    lr_scheduler_type="linear", warmup_ratio=0.1, warmup_steps=0, eval_steps=0, save_steps=0, save_total_limit=1,
    load_best_model_at_end=True, early_stopping_patience=0, logging_steps=10, report_to="none", seed=0,
    max_eval_samples=None,
)  # fmt: skip
"""Values of unset options, for every contender alike; the steps follow from the budget of tokens."""


@dataclass(frozen=True)
class ContenderOptions(OptionGroup):
    """The contenders that are compared, the tokens that each trains on, and the seeds and folds."""

    model_name_or_path: str = option(
        "minilm", "stock BERT-class checkpoint of the softmax rows", group="contenders", common=True
    )
    fa_model: str | None = option(
        None, "FA checkpoint of the factorized rows; unset = no such rows", group="contenders", common=True
    )
    fa_lengths: tuple[int, ...] = option(
        (512, 2048), "tokens that the factorized rows read", group="contenders", common=True
    )
    stock_length: int = option(
        512, "tokens that the stock checkpoint reads, and those of a passage", group="contenders", common=True
    )
    passages_per_document: int = option(
        4, "first passages of a document to train on; all are scored", group="contenders", common=True
    )
    token_budget: int = option(1_200_000, "tokens that every network is trained on", group="comparison", common=True)
    seeds: tuple[int, ...] = option((0,), "seeds of head, order and dropout", group="comparison", common=True)
    folds: int = option(
        0, "cross-validate over so many folds of all rows; 0 = the given split", group="comparison", common=True
    )
    long_threshold: int = option(
        1024, "documents of more tokens are scored apart, too", group="comparison", common=True
    )
    resume: bool = option(
        False, "keep the cells that --output_dir holds, and do the others", group="comparison", common=True
    )


@dataclass(frozen=True)
class ContenderJob:
    """A comparison of contenders as it was asked for, every option resolved; `command` repeats it."""

    contenders: ContenderOptions
    data: DataOptions
    loop: LoopOptions
    command: str

    @property
    def resume_command(self) -> str:
        """The command that goes on with it after a stop."""
        return self.command if self.contenders.resume else f"{self.command} --resume"


@dataclass(frozen=True)
class Contender:
    """A row of the table.

    Args:
        kind: "words" is the baseline of TF-IDF and logistic regression, the others are networks.
        max_length: tokens of a document that it reads; None for all.
        checkpoint: what a network starts from.
    """

    name: str
    kind: Literal["words", "softmax", "passages", "factorized"]
    max_length: int | None
    checkpoint: str | None = None

    @property
    def slug(self) -> str:
        """The name as part of a file's name."""
        return re.sub(r"\W+", "-", self.name.lower()).strip("-")


def list_contenders(options: ContenderOptions, problem_type: str) -> list[Contender]:
    """Return the rows that the options ask for; the first network is the one that the others are compared with."""
    first, stock = options.stock_length, options.model_name_or_path
    words = [
        Contender(f"TF-IDF + logistic regression, first {first:,}", "words", first),
        Contender("TF-IDF + logistic regression, whole", "words", None),
    ]
    networks = [
        Contender(f"softmax, first {first:,}", "softmax", first, stock),
        Contender("softmax, mean over passages", "passages", None, stock),
    ]
    if options.fa_model:
        networks += [
            Contender(f"factorized, first {length:,}", "factorized", length, options.fa_model)
            for length in options.fa_lengths
        ]
    return networks + (words if problem_type == "single_label_classification" else [])


def check_stock_length(options: ContenderOptions) -> None:
    """Raise ValueError if the stock checkpoint has no positions for `--stock_length` tokens."""
    config = read_source(options.model_name_or_path).config
    fields = translate_fields(config.to_dict(), config.model_type)
    longest = fields["max_position_embeddings"]
    if fields.get("position_embedding_type", "absolute") == "absolute" and options.stock_length > longest:
        raise ValueError(
            f"--stock_length {options.stock_length} is above the {longest} positions of {options.model_name_or_path}, "
            "which the rows of softmax attention read with the weights as they are."
        )


def count_lengths(data: LabelledData, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return the tokens of each document of the split that is scored, special ones included."""
    part = datasets.DatasetDict({data.score_split: data.dataset[data.score_split]})
    return tokenize_documents(part, tokenizer, UNLIMITED)[data.score_split].with_format("numpy")["length"][:]


def cut_texts(
    dataset: datasets.DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> datasets.DatasetDict:
    """Cut the documents at the end of the last token that fits into `max_length`, special tokens counted."""

    def cut(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(
            batch["text"], truncation=True, max_length=max_length, return_offsets_mapping=True, verbose=False
        )
        ends = [max(end for _, end in offsets) for offsets in encoded["offset_mapping"]]
        return {"text": [text[:end] for text, end in zip(batch["text"], ends, strict=True)]}

    return dataset.map(cut, batched=True, batch_size=64, desc=f"first {max_length} tokens")


class PassageExamples(TokenizedRows):
    """Documents of one split as passages of `passage_length` tokens, each between the tokenizer's special tokens.

    `max_passages` keeps only so many of a document, the first ones; None keeps all. `lengths` in tokens.
    """

    def __init__(
        self,
        part: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        passage_length: int,
        max_passages: int | None = None,
    ):
        def cut(batch: dict[str, list]) -> dict[str, list]:
            encoded = tokenizer(
                batch["text"], truncation=True, max_length=passage_length, return_overflowing_tokens=True, verbose=False
            )
            passages: list[list[list[int]]] = [[] for _ in batch["text"]]
            for document, tokens in zip(encoded["overflow_to_sample_mapping"], encoded["input_ids"], strict=True):
                if max_passages is None or len(passages[document]) < max_passages:
                    passages[document].append(tokens)
            return {"passages": passages, "length": [sum(map(len, document)) for document in passages]}

        kept = part.select_columns(["text", "label"])
        rows = kept.map(cut, batched=True, batch_size=64, remove_columns="text", desc="cutting into passages")
        super().__init__(rows)


class PassageCollator:
    """Make a batch of documents: their passages as rows, padded to the longest, and the document of each row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: LabelledData):
        self.tokenizer, self.data = tokenizer, data

    def __call__(self, examples: list[dict]) -> dict[str, Tensor]:
        passages = [{"input_ids": tokens} for example in examples for tokens in example["passages"]]
        counts = torch.tensor([len(example["passages"]) for example in examples])
        labels = label_tensor([row["label"] for row in examples], self.data.problem_type, self.data.num_labels)
        batch = dict(self.tokenizer.pad(passages, return_tensors="pt"))
        return batch | {"documents": torch.arange(len(counts)).repeat_interleave(counts), "labels": labels}


class PassageMean(nn.Module):
    """Classify a document by the mean of its passages' embeddings, each the mean of the passage's hidden states.

    logits = classifier(1/K Σ_k mean_n encoder(passage k)_n)
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, documents: Tensor, labels: Tensor, **options: Tensor
    ) -> SequenceClassifierOutput:
        """Passages int [K, N] and the document of each, int [K], in order; `labels` of B documents; logits [B, L]."""
        encoded = self.model.base_model(input_ids, attention_mask, **options).last_hidden_state
        passages = mean_over_real(encoded, attention_mask.bool())
        total = passages.new_zeros(len(labels), passages.shape[1]).index_add(0, documents, passages)
        counts = torch.bincount(documents, minlength=len(labels))[:, None].to(total.dtype)
        logits = self.model.classifier(self.model.dropout(total / counts))
        return SequenceClassifierOutput(loss=classification_loss(self.model.config, logits, labels), logits=logits)


def steps_for_tokens(sampler: LengthGroupedBatchSampler, num_tokens: int) -> int:
    """Count the optimiser steps of one batch each until training has seen `num_tokens` real tokens."""
    steps = seen = epoch = 0
    while True:
        for batch in range(0, len(sampler.batches(epoch)), sampler.num_processes):
            seen, steps = seen + sampler.count_tokens(epoch, batch), steps + 1
            if seen >= num_tokens:
                return steps
        epoch += 1


def predict(
    model: nn.Module,
    examples: Any,
    collate: Callable,
    data: LabelledData,
    loop: LoopOptions,
    device: torch.device,
) -> tuple[np.ndarray, float]:
    """Return the decision for every example, in their order, and the mean loss; every process computes all of them."""
    order, decided, loss = [], [], 0.0
    batches = grouped_batches(
        examples, collate, loop.per_device_eval_batch_size, loop.max_tokens_per_batch or None, device
    )
    with evaluating(model):
        for indices, batch in batches:
            output = model(**batch)
            decided.append(decide(output.logits.float().cpu().numpy(), data.problem_type))
            loss += output.loss.item() * len(indices)
            order += indices
    predictions = np.concatenate(decided)
    predictions[order] = predictions.copy()
    return predictions, loss / len(order)


def score(
    data: LabelledData, split: str, predictions: np.ndarray, chosen: np.ndarray | None = None
) -> dict[str, float]:
    """Return the numbers of the metric on the rows of `split`, or on those that `chosen` (bool) marks."""
    references = label_tensor(list(data.dataset[split]["label"]), data.problem_type, data.num_labels).numpy()
    references = references.astype(predictions.dtype)
    if chosen is not None:
        predictions, references = predictions[chosen], references[chosen]
    if not len(references):
        return {}
    names = {} if data.label_names is None else {"label_names": data.label_names}
    scores = load_metric(data.problem_type).compute(predictions=predictions, references=references, **names)
    return {name: value for name, value in scores.items() if isinstance(value, float)}


def run_cell(job: ContenderJob, contender: Contender, data: LabelledData, accelerator: Accelerator) -> dict:
    """Train one contender on one fold: its predictions for the scored split, and the figures of its training.

    The seed and the folder, which holds checkpoints while it trains, are those of `job.loop`. The cell of a
    network that was stopped goes on from its last checkpoint.
    """
    if contender.kind == "words":
        return {"predictions": _predict_by_words(job.contenders, contender, data).tolist()}
    loop = job.loop
    resume = "last" if list_checkpoints(loop.output_dir) else None
    loop = replace(loop, resume_from_checkpoint=resume)
    set_seed(loop.seed)
    model, tokenizer, mixers_are_new = build_network(job.contenders, contender, data)
    network, examples, collate = build_inputs(job, contender, data, model, tokenizer)
    loaders, sampler = build_loaders(loop, {"train": examples["train"]}, collate, accelerator)
    assert isinstance(sampler, LengthGroupedBatchSampler)  # nothing is streamed here
    steps = steps_for_tokens(sampler, job.contenders.token_budget)
    head_rate = loop.head_learning_rate or 10 * loop.learning_rate
    groups = group_parameters(model, loop.learning_rate, head_rate, loop.weight_decay, mixers_are_new)

    def evaluate(trained: nn.Module) -> dict[str, float]:
        predictions, loss = predict(trained, examples["validation"], collate, data, loop, accelerator.device)
        return score(data, "validation", predictions) | {"loss": loss}

    network, state, _ = run_training(
        loop,
        network,
        *build_optimizer(groups, loop, steps),
        loaders["train"],
        sampler,
        accelerator,
        evaluate=evaluate,
        best_metric=BEST_METRICS[data.problem_type],
        max_steps=steps,
        output_dir=loop.output_dir,
        data_digests=digest_data(data),
        resume_command=job.resume_command,
    )
    predictions, _ = predict(network, examples[data.score_split], collate, data, loop, accelerator.device)
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(loop.output_dir)
    return {"predictions": predictions.tolist(), **describe_run(state)}


def _predict_by_words(options: ContenderOptions, contender: Contender, data: LabelledData) -> np.ndarray:
    """Labels that TF-IDF and logistic regression give the documents of the scored split."""
    dataset = data.dataset
    if contender.max_length is not None:
        tokenizer = AutoTokenizer.from_pretrained(read_source(options.model_name_or_path).model_folder)
        dataset = cut_texts(dataset, tokenizer, contender.max_length)
    return tfidf_predictions(dataset, data.score_split)


def build_network(
    options: ContenderOptions, contender: Contender, data: LabelledData
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """Build the model with a fresh head; returns it, its tokenizer, and whether its mixers are fresh too."""
    source = read_source(contender.checkpoint or "")
    config = source.config
    fields = data.config_fields | {"classifier_pooling": "mean", "attention_probs_dropout_prob": 0.0}
    if contender.kind != "factorized":
        fields["softmax_layers"] = list(range(config.num_hidden_layers))
    max_length = contender.max_length or options.stock_length
    model = load_factorized(source, "AutoModelForSequenceClassification", max_length=max_length, **fields)
    tokenizer = load_tokenizer(source.model_folder, model.config)
    return model, tokenizer, config.model_type != model.config.model_type


def build_inputs(
    job: ContenderJob,
    contender: Contender,
    data: LabelledData,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[nn.Module, dict, Callable]:
    """Build the module to train, a model or `PassageMean` around it, the examples of each split and their collator."""
    options = job.contenders
    if contender.kind != "passages":
        length = contender.max_length or options.stock_length
        task = "text-classification"
        examples, collate = build_examples(data, tokenizer, length, task, job.data, ModelOptions(), job.loop)
        return model, examples, collate
    passages = {
        split: PassageExamples(
            part, tokenizer, options.stock_length, options.passages_per_document if split == "train" else None
        )
        for split, part in data.dataset.items()
    }
    return PassageMean(model), passages, PassageCollator(tokenizer, data)


def list_cells(contenders: Sequence[Contender], seeds: Sequence[int], num_folds: int) -> Iterator[tuple]:
    """Yield (contender, seed, fold) of every cell; word counts have nothing random, so one seed is enough for them."""
    for fold, seed, contender in product(range(num_folds), seeds, contenders):
        if contender.kind != "words" or seed == seeds[0]:
            yield contender, seed, fold
