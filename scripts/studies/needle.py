"""Does a model use the whole document? Train a small FABert on one that must, and score it from 1k to 64k tokens.

accelerate launch scripts/studies/needle.py    # 3.8 M tokens, minutes on a CPU core

A document says at its beginning and at its end what colour the seal is; the label is whether the two statements agree
(`fa_transformers/data/sets/needle.py`). Half of the document or more lies between them: 4,096 tokens of 8,192. The
model has no positions and no local term, trains on documents of at most 8,192 tokens, and is scored on documents made
of the test split's text, whole and cut to 512 tokens. Writes the model, results.json and accuracy.png, and ends with
one line of JSON.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from fa_transformers import FABertConfig, FABertForSequenceClassification
from fa_transformers.charts import (
    HIGHLIGHT,
    MUTED,
    SUBTLE,
    chart_style,
    clear_frame,
    new_figure,
    save_figure,
    scale_by_size,
)
from fa_transformers.checks import check_loop, check_positive
from fa_transformers.commands.flags import describe_command, mistakes_in_one_line, resuming, script_parser
from fa_transformers.data.collators import pad_batch
from fa_transformers.data.sets import license_documents, needle
from fa_transformers.options import LoopOptions, OptionGroup, flat, option, resolve
from fa_transformers.studies import from_scratch
from fa_transformers.training.loaders import build_loaders
from fa_transformers.training.processes import report_lost_processes

PROGRAM = "accelerate launch scripts/studies/needle.py"
# Very short documents first: of 24 tokens the loss is at 0.01 after 200 steps, of 64 at 0.04 after 320 and with some
# seeds never, of 128 it begins to fall only then. On long ones it rises to 0.9, and is at 0.01 after 150 steps more.
RECIPE = from_scratch.RECIPE | dict(
    num_train_epochs=11.0, short_epochs=9, short_length=24, per_device_train_batch_size=32, learning_rate=1.5e-3,
    max_tokens_per_batch=8192, eval_steps=200, save_steps=200, output_dir=Path("outputs/needle"),
)  # fmt: skip
MODEL = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, hidden_dropout_prob=0.0,
    initializer_range=0.1, position_embedding_type="none", classifier_pooling="mean",
)  # fmt: skip
SHORTEST = 64
CUT = 512


@dataclass(frozen=True)
class NeedleOptions(OptionGroup):
    """Documents to train on and to score."""

    num_documents: int = option(1024, "documents of an epoch, all of them new in each", group="needle", common=True)
    longest: int = option(8192, "longest document to train on, in tokens", group="needle", common=True)
    lengths: tuple[int, ...] = option(
        tuple(2**k for k in range(10, 17)), "tokens of the scored documents", group="needle", common=True
    )
    num_test: int = option(200, "documents to score at each length", group="needle", common=True)


def parse(argv: Sequence[str] | None = None) -> tuple[NeedleOptions, LoopOptions, str]:
    """Return the options, checked, and the command."""
    parser = script_parser(PROGRAM, __doc__, lambda given: RECIPE)
    parser.add_options(NeedleOptions, ("needle",), "documents")
    parser.add_options(LoopOptions, (*from_scratch.LOOP_GROUPS, "short epochs"), "training")
    parsed = parser.parse(argv)
    options, loop = parsed[NeedleOptions], resolve(parsed[LoopOptions], RECIPE)
    try:
        check(options, loop)
    except ValueError as error:
        parsed.fail(str(error))
    return options, loop, describe_command(PROGRAM, parsed.flags)


def check(options: NeedleOptions, loop: LoopOptions) -> None:
    """Raise ValueError, naming the flag, for what no run can use."""
    check_loop(loop)
    if min(options.lengths, default=0) < needle.MIN_LENGTH:
        shortest = min(options.lengths, default="none")
        raise ValueError(f"--lengths must be at least {needle.MIN_LENGTH} tokens each, got {shortest}.")
    if options.longest < SHORTEST:
        raise ValueError(f"--longest must be at least {SHORTEST} tokens, got {options.longest}.")
    if loop.short_epochs and loop.short_length < needle.MIN_LENGTH:
        raise ValueError(f"--short_length must be at least {needle.MIN_LENGTH} tokens, got {loop.short_length}.")
    check_positive(options, "num_documents", "num_test")


def draw_lengths(count: int, longest: int, seed: int) -> list[int]:
    """Draw lengths from `SHORTEST` to `longest` tokens, as many in every octave."""
    random = np.random.default_rng([seed, 0])
    return np.exp(random.uniform(np.log(SHORTEST), np.log(longest), count)).astype(int).tolist()


def build_documents(
    options: NeedleOptions, loop: LoopOptions
) -> tuple[dict[str, needle.NeedleDocuments], dict[str, int], np.ndarray]:
    """Make documents to train on and to validate with, the vocabulary, and the filler of the test documents."""
    texts = {split: list(part["text"]) for split, part in license_documents.load_license_documents().items()}
    vocabulary = needle.build_vocabulary(texts["train"])
    filler = {split: needle.encode_filler(part, vocabulary) for split, part in texts.items()}
    short = {"short_epochs": loop.short_epochs, "short_length": loop.short_length}
    lengths = draw_lengths(options.num_documents, options.longest, loop.seed)
    examples = {
        "train": needle.NeedleDocuments(filler["train"], vocabulary, lengths, loop.seed, fresh=True, **short),
        "validation": needle.NeedleDocuments(
            filler["validation"], vocabulary, lengths[:128], loop.seed + 1, fresh=False
        ),
    }
    return examples, vocabulary, filler["test"]


def score_by_length(
    options: NeedleOptions,
    loop: LoopOptions,
    model: torch.nn.Module,
    vocabulary: dict[str, int],
    filler: np.ndarray,
    accelerator: Accelerator,
) -> list[dict[str, float]]:
    """Return the accuracy on whole documents of each length, and on the same documents cut to their first `CUT`."""
    rows: list[dict[str, float]] = []
    for length in options.lengths:
        row: dict[str, float] = {"tokens": length}
        for name, cut in (("whole", None), ("cut", CUT)):
            documents = needle.NeedleDocuments(
                filler, vocabulary, [length] * options.num_test, loop.seed + 2, fresh=False, cut=cut
            )
            loaders, _ = build_loaders(loop, {"train": documents, "test": documents}, pad_batch, accelerator)
            row[name] = from_scratch.score_classifier(model, loaders["test"], accelerator)["accuracy"]
        accelerator.print(f"{length:>7,} tokens: {row['whole']:.3f}, cut to {CUT}: {row['cut']:.3f}", flush=True)
        rows.append(row)
    return rows


def plot_accuracy(rows: list[dict[str, float]], longest: int, path: Path) -> None:
    """Write a PNG of accuracy by length."""
    with chart_style():
        figure, axes = new_figure(size=(6, 3.5))
        lengths = [int(row["tokens"]) for row in rows]
        axes.plot(lengths, [row["whole"] for row in rows], "o-", color=HIGHLIGHT, label="whole document")
        axes.plot(lengths, [row["cut"] for row in rows], "s--", color=MUTED["BERT"], label=f"cut to {CUT} tokens")
        axes.axvline(longest, color=SUBTLE, linewidth=1, label="longest trained on")
        axes.set(ylim=(0.4, 1.02), xlabel="tokens", ylabel="accuracy", title="Do two far statements agree?")
        scale_by_size(axes, lengths)
        clear_frame(axes)
        axes.legend(loc="center right")
        save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> dict:
    options, loop, command = parse(argv)
    with report_lost_processes(loop.ddp_timeout):
        config = flat(options, loop) | {"command": command}
        accelerator, loop, (examples, vocabulary, filler) = from_scratch.start_study(
            loop, "needle", lambda: build_documents(options, loop), config
        )
        config = FABertConfig(vocab_size=2 + len(vocabulary), num_labels=len(needle.LABEL_NAMES), **MODEL)
        model = FABertForSequenceClassification(config)
        model, state, _ = from_scratch.train_classifier(loop, model, examples, accelerator, resuming(command))
        rows = score_by_length(options, loop, model, vocabulary, filler, accelerator)
        results = {
            "task": "needle",
            "trained_up_to": options.longest,
            "accuracy": {row["tokens"]: round(row["whole"], 4) for row in rows},
            f"accuracy_cut_to_{CUT}": {row["tokens"]: round(row["cut"], 4) for row in rows},
            "documents_each": options.num_test,
            "chance": 0.5,
            "parameters": accelerator.unwrap_model(model).num_parameters(),
        }
        if accelerator.is_main_process:
            plot_accuracy(rows, options.longest, loop.output_dir / "accuracy.png")
            accelerator.unwrap_model(model).save_pretrained(loop.output_dir)
        return from_scratch.finish_study(loop, results, state, accelerator, command)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
