"""Does a model use the whole document? Train a small FABert on one that must, and score it from 1k to 64k tokens.

accelerate launch scripts/studies/needle.py    # 3.8 M tokens, minutes on a CPU core

A document says at its beginning and at its end what colour the seal is; the label is whether the two statements agree
(`fa_transformers/data/needle.py`). Half of the document or more lies between them: 4,096 tokens of 8,192. The model has
no positions and no local term, trains on documents of at most 8,192 tokens, and is scored on documents made of the test
split's text, whole and cut to 512 tokens. Writes results.json and accuracy.png, and ends with one line of JSON.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed

from fa_transformers import FABertConfig, FABertForSequenceClassification
from fa_transformers.charts import new_figure, save_figure
from fa_transformers.data.collators import pad_batch
from fa_transformers.data.sets import license_documents, needle
from fa_transformers.files import write_json
from fa_transformers.training.checkpointing import choose_resume, prepare_output_dir
from fa_transformers.training.from_scratch import parse_flags, score_classifier, train_classifier
from fa_transformers.training.processes import report_lost_processes
from fa_transformers.training.report import describe_hardware, describe_run
from fa_transformers.training.setup import build_loaders, make_accelerator, start_trackers

# Very short documents first: of 24 tokens the loss is at 0.01 after 200 steps, of 64 at 0.04 after 320 and with some
# seeds never, of 128 it begins to fall only then. On long ones it rises to 0.9, and is at 0.01 after 150 steps more.
DEFAULTS = dict(
    num_train_epochs=11.0, short_epochs=9, short_length=24, per_device_train_batch_size=32, learning_rate=1.5e-3,
    max_tokens_per_batch=8192, eval_steps=200, save_steps=200, output_dir=Path("outputs/needle"),
)  # fmt: skip
MODEL = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, hidden_dropout_prob=0.0,
    initializer_range=0.1, position_embedding_type="none", classifier_pooling="mean",
)  # fmt: skip
SHORTEST = 64
CUT = 512


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--num_documents", type=int, default=1024, help="documents of an epoch, all of them new in each")
    add("--longest", type=int, default=8192, help="longest document to train on, in tokens")
    add("--lengths", type=int, nargs="+", default=[2**k for k in range(10, 17)], help="tokens of the scored documents")
    add("--num_test", type=int, default=200, help="documents to score at each length")
    args = parse_flags(parser, "scripts/studies/needle.py", DEFAULTS, argv)
    if min(args.lengths) < needle.MIN_LENGTH:
        parser.error(f"--lengths must be at least {needle.MIN_LENGTH} tokens each, got {min(args.lengths)}.")
    if args.longest < SHORTEST:
        parser.error(f"--longest must be at least {SHORTEST} tokens, got {args.longest}.")
    if args.short_epochs and args.short_length < needle.MIN_LENGTH:
        parser.error(f"--short_length must be at least {needle.MIN_LENGTH} tokens, got {args.short_length}.")
    for name in ("num_documents", "num_test"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}.")
    return args


def draw_lengths(count: int, longest: int, seed: int) -> list[int]:
    """Lengths from `SHORTEST` to `longest` tokens, as many in every octave."""
    random = np.random.default_rng([seed, 0])
    return np.exp(random.uniform(np.log(SHORTEST), np.log(longest), count)).astype(int).tolist()


def build_documents(args: argparse.Namespace) -> tuple[dict[str, needle.NeedleDocuments], dict[str, int], np.ndarray]:
    """Documents to train on and to validate with, the vocabulary, and the filler of the test documents."""
    texts = {split: list(part["text"]) for split, part in license_documents.load_license_documents().items()}
    vocabulary = needle.build_vocabulary(texts["train"])
    filler = {split: needle.encode_filler(part, vocabulary) for split, part in texts.items()}
    short = {"short_epochs": args.short_epochs, "short_length": args.short_length}
    lengths = draw_lengths(args.num_documents, args.longest, args.seed)
    examples = {
        "train": needle.NeedleDocuments(filler["train"], vocabulary, lengths, args.seed, fresh=True, **short),
        "validation": needle.NeedleDocuments(
            filler["validation"], vocabulary, lengths[:128], args.seed + 1, fresh=False
        ),
    }
    return examples, vocabulary, filler["test"]


def score_by_length(
    args, model, vocabulary: dict[str, int], filler: np.ndarray, accelerator: Accelerator
) -> list[dict[str, float]]:
    """Accuracy on whole documents of each length, and on the same ones cut to their first `CUT` tokens."""
    rows: list[dict[str, float]] = []
    for length in args.lengths:
        row: dict[str, float] = {"tokens": length}
        for name, cut in (("whole", None), ("cut", CUT)):
            documents = needle.NeedleDocuments(
                filler, vocabulary, [length] * args.num_test, args.seed + 2, fresh=False, cut=cut
            )
            loaders, _ = build_loaders(args, {"train": documents, "test": documents}, pad_batch, accelerator)
            row[name] = score_classifier(model, loaders["test"], accelerator)["accuracy"]
        accelerator.print(f"{length:>7,} tokens: {row['whole']:.3f}, cut to {CUT}: {row['cut']:.3f}", flush=True)
        rows.append(row)
    return rows


def plot_accuracy(rows: list[dict[str, float]], longest: int, path: Path) -> None:
    """Write a PNG of accuracy by length."""
    figure, axes = new_figure(size=(6, 3.5))
    lengths = [row["tokens"] for row in rows]
    axes.plot(lengths, [row["whole"] for row in rows], "o-", label="whole document")
    axes.plot(lengths, [row["cut"] for row in rows], "s--", label=f"cut to {CUT} tokens")
    axes.axvline(longest, color="grey", linewidth=1, label="longest trained on")
    axes.set(xscale="log", ylim=(0.4, 1.02), xlabel="tokens", ylabel="accuracy", title="Do two far statements agree?")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths])
    axes.legend(loc="center right")
    save_figure(figure, path)


def main(args: argparse.Namespace) -> dict:
    accelerator = make_accelerator(args)
    args.resume_from_checkpoint = choose_resume(args.resume_from_checkpoint, args.output_dir)
    set_seed(args.seed)
    with accelerator.main_process_first():
        examples, vocabulary, filler = build_documents(args)
        if accelerator.is_main_process:
            is_resumed = args.resume_from_checkpoint is not None
            prepare_output_dir(args.output_dir, overwrite=args.overwrite_output_dir, resume=is_resumed)
    start_trackers(accelerator, args.report_to, "needle", vars(args))
    config = FABertConfig(vocab_size=2 + len(vocabulary), num_labels=len(needle.LABEL_NAMES), **MODEL)
    model = FABertForSequenceClassification(config)
    model, state, _ = train_classifier(args, model, examples, accelerator, args.output_dir)
    rows = score_by_length(args, model, vocabulary, filler, accelerator)
    results = {
        "task": "needle",
        "trained_up_to": args.longest,
        "accuracy": {row["tokens"]: round(row["whole"], 4) for row in rows},
        f"accuracy_cut_to_{CUT}": {row["tokens"]: round(row["cut"], 4) for row in rows},
        "documents_each": args.num_test,
        "chance": 0.5,
        "parameters": accelerator.unwrap_model(model).num_parameters(),
        **describe_run(state),
        "hardware": describe_hardware(accelerator.device),
        "seed": args.seed,
        "command": args.command,
    }
    accelerator.end_training()
    if accelerator.is_main_process:
        write_json(args.output_dir / "results.json", results)
        plot_accuracy(rows, args.longest, args.output_dir / "accuracy.png")
        print(json.dumps(results))
    return results


if __name__ == "__main__":
    parsed = parse_args()
    with report_lost_processes(parsed.ddp_timeout):
        main(parsed)
