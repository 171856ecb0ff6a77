"""The receipt of a recovery: what a converted model was trained on, and how near it came to its teacher."""

import argparse
import json
from typing import Any

import torch
from transformers import PreTrainedModel

from ..conversion.folder import PIPELINE_TAGS, sentence_transformers_files
from ..conversion.packaged import resolve_checkpoint
from ..conversion.source import read_source
from ..data.examples import count_patches
from ..data.facts import DataFacts
from ..hub.card import ModelFacts, ScoreFacts
from ..hub.publish import find_auto_class_of, publish
from ..hub.timing import measure_speed
from ..tables import format_table
from ..training.arguments import check_arguments as check_run_arguments
from ..training.report import describe_base_model, describe_hardware, describe_replacement
from .pieces import SHORTEST_PIECE

RECEIPT_FILE = "recovery.json"
DOWNSTREAM = ("teacher", "before", "after", "majority")
DOWNSTREAM_NAMES = {"teacher": "teacher", "before recovery": "before", "majority class": "majority"}
SIMILARITIES = ("cosine", "cosine_p5", "correlation")
LENGTHS_TIMED = (512, 4096)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError, naming the flag, for values that no distillation can use."""
    like = {"text": "text-classification", "images": "image-classification"}[args.task]
    check_run_arguments(argparse.Namespace(**vars(args) | {"task": like, "full_recipe": False}))
    if args.resume_from_checkpoint not in (None, "last", "auto"):
        raise ValueError("--resume_from_checkpoint must be 'last' or 'auto': every stage has a folder of its own.")
    for name in ("transfer_steps", "end_to_end_steps", "long_steps"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} must not be negative, got {getattr(args, name)}.")
    for name in ("transfer_learning_rate", "mixer_learning_rate"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name} must be above 0, got {getattr(args, name)}.")
    if not args.transfer_steps + args.end_to_end_steps + args.long_steps:
        raise ValueError("--transfer_steps, --end_to_end_steps and --long_steps are all 0: there is nothing to train.")
    if args.task == "text" and args.max_length < SHORTEST_PIECE:
        raise ValueError(f"--max_length must be at least {SHORTEST_PIECE} tokens, got {args.max_length}.")
    unread = {"text": "probe_folder", "images": "probe_file"}[args.task]
    if getattr(args, unread):
        raise ValueError(f"--{unread} is not for --task {args.task}.")
    if args.long_steps and not args.long_length:
        raise ValueError("--long_steps needs a --long_length.")
    if args.long_length and (args.task != "text" or args.long_length <= args.max_length):
        raise ValueError(f"--long_length {args.long_length} is for text, and must be above --max_length.")


def build_receipt(
    args: argparse.Namespace,
    model: PreTrainedModel,
    stages: list[dict],
    before: dict,
    after: dict,
    downstream: dict | None,
) -> dict[str, Any]:
    """What `recovery.json` and the JSON line say.

    `before` and `after`: `distillation.similarity` of student and teacher by kind of held-out data; `downstream`: the
    accuracy that `probing.probe` finds, "before" and "after" and of the "teacher" and the "majority" class.
    """
    fields = ("key_feature_size", "key_features", "learned_temperatures", "local_kernel_size", "local_window")
    config = model.config
    return {
        "student": {name: getattr(config, name) for name in (*fields, "softmax_layers", "position_embedding_type")},
        "teacher": args.teacher_name_or_path or args.model_name_or_path,
        "pooling": args.pooling,
        "parameters": model.num_parameters(),
        "tokens": sum(stage["train_tokens"] for stage in stages),
        "seconds": round(sum(stage["train_seconds"] for stage in stages), 1),
        "stages": stages,
        "similarity": {kind: {"before": before[kind], "after": after[kind]} for kind in after},
        "downstream": downstream,
        "seed": args.seed,
        "hardware": describe_hardware(model.device),
        "torch": torch.__version__,
        "command": args.command,
        "output_dir": str(args.output_dir),
    }


def print_receipt(receipt: dict[str, Any]) -> None:
    rows = [
        {"held-out data": kind, "when": when} | {name: figures[name] for name in SIMILARITIES}
        for kind, both in receipt["similarity"].items()
        for when, figures in both.items()
    ]
    print("\nStudent and teacher, their embeddings compared:\n")
    print(format_table(rows, ["held-out data", "when", *SIMILARITIES]))
    if receipt["downstream"]:
        found = receipt["downstream"]
        print(f"\nAccuracy of logistic regression on the embeddings ({found['data']}, {found['num_pieces']}):\n")
        print(format_table([{name: found[name] for name in DOWNSTREAM}], list(DOWNSTREAM)))
    for stage in receipt["stages"]:
        rows = [
            {"error": when, "mean": stage[when]["loss"]}
            | {str(index): error for index, error in enumerate(stage[when]["layer_errors"])}
            for when in ("before", "after")
        ]
        print(
            f"\n{stage['stage']}: {stage['steps']} steps, {stage['train_tokens']:,} tokens, loss and error by layer:\n"
        )
        print(format_table(rows, list(rows[0])))


def publish_student(
    args: argparse.Namespace, model: PreTrainedModel, processor: Any, receipt: dict[str, Any], data: list[DataFacts]
) -> None:
    """Write the model with its code, card and self-test to `--output_dir`."""
    teacher = args.teacher_name_or_path or args.model_name_or_path  # a converted folder has no weights of its own
    base_model, revision = describe_base_model(argparse.Namespace(**vars(args) | {"model_name_or_path": teacher}))
    minutes = receipt["seconds"] / 60
    stages = ", ".join(f"{stage['steps']:,} steps of {stage['stage'].replace('_', ' ')}" for stage in receipt["stages"])
    is_text = args.task == "text"
    compared = f"images of {args.image_size} x {args.image_size} pixels"
    if is_text:
        is_long = any("," in kind for kind in receipt["similarity"])
        compared = f"texts of up to {args.long_length if is_long else args.max_length:,} tokens"
    vector = {"mean": "the mean of the last hidden states", "cls": "the last hidden state of the first token"}
    kinds = list(dict.fromkeys(kind.partition(",")[0] for kind in receipt["similarity"]))  # long texts follow a comma
    model.config.recovery = "distilled"
    auto_class = find_auto_class_of(model)
    facts = ModelFacts(
        repo_id=args.hub_model_id or args.output_dir.resolve().name,
        summary=f"{base_model} with factorized attention, distilled from the softmax model.",
        pipeline_tag=PIPELINE_TAGS.get(auto_class, "feature-extraction" if is_text else "image-feature-extraction"),
        auto_class=auto_class,
        language=args.language,
        license=args.license,
        base_model=base_model,
        base_model_revision=revision,
        replaced=describe_replacement(model),
        trained_after=f"{stages}; {receipt['tokens']:,} tokens, seed {args.seed}. {describe_errors(receipt['stages'])}",
        data=data,
        command=args.command,
        hardware=f"{receipt['hardware']}; distilled for {minutes:.1f} minutes",
        scores=[
            ScoreFacts(
                dataset=data[min(kinds.index(kind.partition(",")[0]), len(data) - 1)].name,
                split=f"held out, {kind}",
                metric=f"{name} with the teacher",
                value=both["after"][name],
                baselines={"before recovery": both["before"][name]},
            )
            for kind, both in receipt["similarity"].items()
            for name in ("cosine", "correlation")
        ]
        + describe_downstream(receipt["downstream"]),
        speed=time_student(args, model),
        limits=[
            f"It was compared with its teacher on {compared}, by {vector[args.pooling]}.",
            "Its embeddings are near the teacher's, not equal: check thresholds that were tuned on it.",
        ],
    )
    source = read_source(resolve_checkpoint(args.model_name_or_path))
    if args.long_steps:
        processor.model_max_length = args.long_length
    files = sentence_transformers_files(source, args.long_length if args.long_steps else None)
    files[RECEIPT_FILE] = (json.dumps(receipt, indent=2, ensure_ascii=False) + "\n").encode()
    publish(model.eval(), processor, facts, args.output_dir, overwrite=True, extra_files=files)


def describe_errors(stages: list[dict]) -> str:
    """The `distillation.relative_error` of every layer before and after each stage; a dash where it is softmax."""

    def row(figures: dict) -> str:
        return " ".join("-" if error is None else f"{error:.3f}" for error in figures["layer_errors"])

    rows = (f"{stage['stage'].replace('_', ' ')} {row(stage['before'])} → {row(stage['after'])}" for stage in stages)
    return f"Squared error of every layer relative to the variance of what it learns: {'; '.join(rows)}."


def describe_downstream(downstream: dict | None) -> list[ScoreFacts]:
    if downstream is None:
        return []
    others = {name: downstream[key] for name, key in DOWNSTREAM_NAMES.items()}
    return [
        ScoreFacts(
            dataset=downstream["data"],
            split="five folds, drawn ten times, embeddings and logistic regression",
            metric="accuracy",
            value=downstream["after"],
            baselines=others,
        )
    ]


def time_student(args: argparse.Namespace, model: PreTrainedModel) -> list:
    """Time and memory beside softmax attention: of short and long text, or of one image."""
    generator = torch.Generator().manual_seed(0)
    if args.task == "images":
        shape = (1, model.config.num_channels, args.image_size, args.image_size)
        pixel_values = torch.rand(shape, generator=generator).to(model.device, model.dtype)
        return [measure_speed(model, {"pixel_values": pixel_values}, count_patches(args.image_size, model.config))]
    config = model.config
    limit = config.max_position_embeddings if config.position_embedding_type == "absolute" else max(LENGTHS_TIMED)
    speed = []
    for length in sorted({min(length, limit) for length in LENGTHS_TIMED}):
        tokens = torch.randint(config.vocab_size, (1, length), generator=generator).to(model.device)
        speed.append(measure_speed(model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, length))
    return speed
