"""Packed batches as training sees them: what collators join, what a token budget counts, and the stock Trainer."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import ALL_OPTIONS, build
from transformers import Trainer, TrainerCallback, TrainingArguments

from fa_transformers import PackingCollator
from fa_transformers.data.batching import LengthGroupedBatchSampler
from fa_transformers.data.collators import TextCollator
from fa_transformers.models import FABertConfig, FABertForSequenceClassification

DOCUMENTS = [
    {"input_ids": [2, 7, 3], "token_type_ids": [0, 0, 1], "attention_mask": [1, 1, 1]},
    {"input_ids": [9], "token_type_ids": [1], "attention_mask": [1]},
    {"input_ids": [5, 6, 8, 3], "token_type_ids": [0, 0, 0, 0], "attention_mask": [1, 1, 1, 1]},
]


def labelled(name: str, *labels) -> list[dict]:
    return [{**document, name: label} for document, label in zip(DOCUMENTS, labels, strict=True)]


@pytest.mark.parametrize("as_tensors", [False, True], ids=["lists", "tensors"])
@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("label", (2, 0, 1), torch.tensor([2, 0, 1])),
        ("labels", (0.5, 1.0, -2.0), torch.tensor([0.5, 1.0, -2.0])),
        ("labels", ([1.0, 0.0], [0.0, 0.0], [1.0, 1.0]), torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])),
        ("labels", ([-100, 4, 5], [6], [7, 8, 9, -100]), torch.tensor([[-100, 4, 5, 6, 7, 8, 9, -100]])),
        ("start_positions", (1, 0, 3), torch.tensor([1, 0, 3])),
    ],
    ids=["integer", "regression", "multi-label", "token", "answer"],
)
def test_documents_are_joined_with_labels_of_every_kind(name, labels, expected, as_tensors):
    examples = labelled(name, *labels)
    if as_tensors:
        examples = [{key: torch.tensor(value) for key, value in example.items()} for example in examples]
    batch = PackingCollator()(examples)
    assert torch.equal(batch.pop("labels" if name == "label" else name), expected)
    assert batch.keys() == {"input_ids", "token_type_ids", "cu_seqlens"}
    assert batch["input_ids"].tolist() == [[2, 7, 3, 9, 5, 6, 8, 3]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1, 1, 0, 0, 0, 0]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 4, 8] and batch["cu_seqlens"].dtype == torch.int32


def test_documents_that_cannot_be_packed_are_errors():
    with pytest.raises(ValueError, match="can't pack the column 'text'"):
        PackingCollator()(labelled("text", "a", "b", "c"))
    with pytest.raises(ValueError, match="labels of tokens, and a document has more or fewer labels than tokens"):
        PackingCollator()(labelled("labels", [1, 2, 3], [1, 2], [1, 2, 3]))
    with pytest.raises(ValueError, match="A document is padded"):
        PackingCollator()([{"input_ids": [2, 0], "attention_mask": [1, 0]}])


@pytest.mark.parametrize(
    ("problem_type", "labels", "expected"),
    [
        ("single_label_classification", (1, 0, 2), [1, 0, 2]),
        ("multi_label_classification", ([0, 2], [], [1]), [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
        ("regression", (0.5, 1.5, -1.0), [0.5, 1.5, -1.0]),
    ],
)
def test_the_collator_of_the_script_packs_with_its_labels(problem_type, labels, expected):
    data = SimpleNamespace(problem_type=problem_type, num_labels=3)
    batch = TextCollator(None, data, packing=True)(labelled("label", *labels))
    assert batch.keys() == {"input_ids", "token_type_ids", "cu_seqlens", "labels"}
    assert batch["labels"].tolist() == expected and batch["cu_seqlens"].tolist() == [0, 3, 4, 8]


@pytest.mark.parametrize("num_processes", [1, 3])
def test_a_packed_batch_is_filled_to_the_sum_of_its_lengths(num_processes):
    lengths = np.random.default_rng(0).integers(1, 900, 203)
    sampler = LengthGroupedBatchSampler(
        lengths, 50, max_tokens=2000, packing=True, group_by_length=False, num_processes=num_processes
    )
    batches = sampler.batches(0)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    totals = [int(lengths[batch].sum()) for batch in batches]
    assert max(totals) <= 2000
    # A batch ends where the next document no longer fits, so two in a row hold more than one budget.
    assert num_processes > 1 or len(batches) <= 2 * lengths.sum() / 2000 + 1
    assert sampler.settings["packing"] and sampler.count_tokens(0, 0) == sum(totals[:num_processes])


class Losses(TrainerCallback):
    """The loss of each step as Trainer logs it."""

    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.values += [logs["loss"]] if "loss" in logs else []


def test_the_stock_trainer_trains_and_evaluates_packed_documents(tmp_path):
    """Its losses are the means over documents, whatever number of them a batch holds."""
    model = build(FABertConfig, FABertForSequenceClassification, **ALL_OPTIONS)
    generator = torch.Generator().manual_seed(0)
    samples = [
        {"input_ids": torch.randint(1, 60, (length,), generator=generator).tolist(), "label": length % 2}
        for length in (11, 1, 30, 70, 2, 9, 40)
    ]

    def loss_of(documents: list[dict]) -> float:
        with torch.no_grad():
            losses = [
                model(input_ids=torch.tensor([document["input_ids"]]), labels=torch.tensor([document["label"]])).loss
                for document in documents
            ]
        return torch.stack(losses).mean().item()

    evaluated = loss_of(samples)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=3,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=0.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        train_sampling_strategy="sequential",
    )
    losses = Losses()
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=PackingCollator(),
        train_dataset=samples,
        eval_dataset=samples,
        callbacks=[losses],
    )
    # Batches of 4 and 3 documents.
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(evaluated, rel=1e-5)
    predictions = trainer.predict(samples)
    assert predictions.predictions.shape == (7, 2) and predictions.label_ids.tolist() == [1, 1, 0, 0, 0, 1, 0]
    assert trainer.train().global_step == 2
    expected = [(loss_of(samples[:3]) + loss_of(samples[3:6])) / 2, loss_of(samples[6:])]
    assert losses.values == pytest.approx(expected, abs=1e-4)


def test_the_largest_packed_batch_is_one_row_of_its_real_tokens():
    sampler = LengthGroupedBatchSampler([3000] + [50] * 20, 32, max_tokens=4096, group_by_length=False, packing=True)
    assert sampler.largest_batch() == (1, 4000)
