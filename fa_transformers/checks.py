"""Checks of the options of a run: each raises ValueError and names the flag. The standard library is all they need."""

import re
from typing import Any

from .options import UNSET, CardOptions, DataOptions, LoopOptions, ModelOptions

UNKNOWN_LICENSE = "unknown"
"""The value of `license` where nobody said what it is."""
LONGEST_REPOSITORY_NAME = 96
"""In characters, with the owner."""


def check_positive(options: Any, *names: str) -> None:
    """Raise ValueError, naming the flag, where a value is not above 0; None and `UNSET` pass."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value is not UNSET and value <= 0:
            raise ValueError(f"--{name} must be above 0, got {value}.")


def check_not_negative(options: Any, *names: str) -> None:
    """Raise ValueError, naming the flag, where a value is below 0; None and `UNSET` pass."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value is not UNSET and value < 0:
            raise ValueError(f"--{name} must not be negative, got {value}.")


def check_loop(loop: LoopOptions) -> None:
    """Raise ValueError, naming the flag, for values that no training run can use; `loop` is resolved."""
    positive = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    counted = ("sequence_parallel_size", "logging_steps", "num_train_epochs", "learning_rate", "ddp_timeout")
    check_positive(loop, *positive, *counted, "head_learning_rate")
    counts = (
        "short_epochs",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "early_stopping_patience",
        "recovery_steps",
    )
    amounts = ("max_tokens_per_batch", "max_grad_norm", "weight_decay", "num_threads", "warmup_steps", "seed")
    check_not_negative(loop, *counts, *amounts, "dataloader_num_workers")
    if not 0 <= loop.warmup_ratio < 1:
        raise ValueError(f"--warmup_ratio must be at least 0 and below 1, got {loop.warmup_ratio}.")
    if loop.max_steps == 0 or loop.max_steps < -1:
        hint = (
            " To check data, memory and time without training, fine-tuning has --dry_run."
            if loop.max_steps == 0
            else ""
        )
        raise ValueError(f"--max_steps must be at least 1, or -1 to train by epochs, got {loop.max_steps}.{hint}")
    if loop.resume_from_checkpoint and loop.overwrite_output_dir:
        raise ValueError("--resume_from_checkpoint and --overwrite_output_dir contradict each other; give one.")


def check_sources(data: DataOptions, *, is_text: bool) -> None:
    """Raise ValueError, naming the flag, where two sources of data are named, or one of the other kind."""
    sources = data.sources
    if len(sources) > 1:
        raise ValueError(f"--{sources[0]} and --{sources[1]} are two sources of data; give one.")
    if (data.validation_file or data.test_file) and not data.train_file:
        raise ValueError("--validation_file and --test_file go with --train_file, which is missing.")
    if data.image_folder and is_text:
        raise ValueError(
            "--image_folder is for images, and the task is text: give --task image-classification (to distil: --task "
            "images), or name a table of texts with --train_file."
        )
    if data.train_file and not is_text:
        raise ValueError(
            "--train_file is for text, and the task is images: leave --task out for text, or name the images with "
            "--image_folder or --dataset_name."
        )
    for name in ("train_file", "validation_file", "test_file"):
        path = getattr(data, name)
        if path is not None and path.is_dir():
            raise ValueError(
                f"--{name} {path} is a folder: name a file in it, or the folder with --dataset_name (tables, a saved "
                "data set) or --image_folder (images)."
            )
    if data.delimiter not in (None, "tab") and len(data.delimiter or "") != 1:
        raise ValueError(f"--delimiter must be one character or 'tab', such as ';', got {data.delimiter!r}.")
    if data.group_column and (data.streaming or data.image_folder):
        other = "--streaming has splits of its own" if data.streaming else "--image_folder has no columns"
        raise ValueError(f"--group_column keeps groups whole where splits are drawn, and {other}: leave it out.")


def check_run(data: DataOptions, model: ModelOptions, loop: LoopOptions, card: CardOptions, *, is_text: bool) -> None:
    """Raise ValueError, naming the flag, for values that no run can use or that contradict each other."""
    check_loop(loop)
    check_positive(model, "max_length", "image_size")
    check_positive(data, "max_train_samples", "max_eval_samples", "preprocessing_num_workers")
    check_not_negative(model, "freeze_layers", "lora_rank")
    check_positive(model, "lora_alpha")
    if model.lora_alpha and not model.lora_rank:
        raise ValueError("--lora_alpha scales the updates of --lora_rank, which is 0: give a rank, such as 8.")
    if model.lora_rank and model.model_name_or_path == "none":
        raise ValueError("--lora_rank adapts a checkpoint, and --model_name_or_path none is new weights: leave it out.")
    if model.square and is_text:
        raise ValueError("--square is for images; leave it out.")
    if loop.short_epochs and (loop.short_length < 3 or not is_text):
        raise ValueError("--short_epochs is for text and needs a --short_length of at least 3 tokens.")
    if loop.packing and (loop.max_tokens_per_batch == 0 or not is_text):
        raise ValueError(
            "--packing is for text and needs a --max_tokens_per_batch, the tokens that a batch is filled to."
        )
    if loop.sequence_parallel_size > 1 and loop.packing:
        raise ValueError("--sequence_parallel_size shares out padded batches: leave out --packing.")
    if loop.sequence_parallel_size > 1 and data.streaming:
        raise ValueError("--sequence_parallel_size needs data that is not streamed: leave out --streaming.")
    if loop.report_lengths and (not is_text or min(loop.report_lengths) < 3):
        raise ValueError("--report_lengths is for text, and needs lengths of at least 3 tokens, two of them special.")
    check_sources(data, is_text=is_text)
    if data.streaming:
        _check_streaming(data, loop, is_text)
    if is_text and model.model_name_or_path == "none":
        raise ValueError("--model_name_or_path none is for images; text needs a checkpoint, for its tokenizer too.")
    if model.max_length and model.max_length < 3:
        raise ValueError(f"--max_length must be at least 3 tokens, two of which are special, got {model.max_length}.")
    check_card(card, loop)


def check_card(card: CardOptions, loop: LoopOptions) -> None:
    """Raise ValueError, naming the flag, for facts and names that no card or repository can have, before training."""
    if card.license != card.license.lower() or " " in card.license:
        raise ValueError(f"--license must be as the Hub spells it, such as apache-2.0, got {card.license!r}.")
    if not re.fullmatch(r"[\w.-]+", loop.output_dir.resolve().name):
        raise ValueError(
            f"--output_dir {loop.output_dir} must end in a name of letters, digits, '.', '-' and '_': the model card "
            "and the Hub name the model by it."
        )
    if card.hub_model_id is not None and not is_repository_name(card.hub_model_id):
        raise ValueError(
            f"--hub_model_id must be owner/name, of letters, digits, '-', '_' and '.', got {card.hub_model_id!r}."
        )
    if not card.push_to_hub:
        return
    if card.license == UNKNOWN_LICENSE:
        raise ValueError(
            "--push_to_hub publishes the weights, and their licence isn't known: name it with --license, such as "
            "--license apache-2.0."
        )
    name = card.hub_model_id or loop.output_dir.resolve().name
    if not is_repository_name(name):
        raise ValueError(f"--push_to_hub: {name!r} is no name of a repository; give another with --hub_model_id.")


def is_repository_name(name: str) -> bool:
    """Return True for "owner/name" or "name" as the Hub accepts it, which forbids "--", ".." and a dash at an end."""
    has_form = re.fullmatch(r"(\w[\w.-]*/)?\w([\w.-]*\w)?", name, re.ASCII) is not None
    return has_form and len(name) <= LONGEST_REPOSITORY_NAME and "--" not in name and ".." not in name


def _check_streaming(data: DataOptions, loop: LoopOptions, is_text: bool) -> None:
    if not is_text or not (data.train_file or data.dataset_name):
        raise ValueError("--streaming is for text from --train_file or --dataset_name.")
    if data.train_file and not data.validation_file:
        raise ValueError("--streaming needs a --validation_file, which is read whole and names the labels.")
    if loop.max_steps < 1:
        raise ValueError("--streaming needs --max_steps: nobody knows how many steps an epoch of a stream takes.")
    if not loop.save_steps:
        raise ValueError("--streaming needs --save_steps: a stream has no end of an epoch at which to save.")
    if loop.short_epochs:
        raise ValueError("--short_epochs is not for --streaming; leave it out.")
    if data.max_train_samples:
        raise ValueError("--max_train_samples is not for --streaming; leave it out.")
