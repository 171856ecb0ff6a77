"""Command-line flags of the training scripts, named as in transformers' TrainingArguments, each with its unit."""

import argparse
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import SchedulerType

MODEL_FIELDS = (
    "attention_normalization",
    "key_feature_size",
    "key_features",
    "learned_temperatures",
    "local_kernel_size",
    "local_window",
    "softmax_layers",
    "position_embedding_type",
    "classifier_pooling",
)
NO_HELPS: Mapping[str, str] = {}


def adder(
    parser: argparse.ArgumentParser, title: str, leave_out: Collection[str], helps: Mapping[str, str]
) -> Callable[..., None]:
    """`add_argument` of a new group, for scripts that share its flags but not all of them.

    Flags named in `leave_out` are unknown to the parser, and their defaults are set; `helps` has other texts by name.
    """
    group = parser.add_argument_group(title)

    def add(flag: str, **options: Any) -> None:
        name = flag.removeprefix("--")
        if name in leave_out:
            parser.set_defaults(
                **{name: options.get("default", False if options.get("action") == "store_true" else None)}
            )
        else:
            group.add_argument(flag, **options | ({"help": helps[name]} if name in helps else {}))

    return add


def add_data_arguments(
    parser: argparse.ArgumentParser, *, leave_out: Collection[str] = (), helps: Mapping[str, str] = NO_HELPS
) -> None:
    """What to learn from: files, a folder of images, or a data set of the Hub; without any, the built-in demo."""
    add = adder(parser, "data (none of these = the built-in demo data)", leave_out, helps)
    add("--train_file", type=Path, help="csv, tsv, json, jsonl or parquet file with a text and a label column")
    add("--validation_file", type=Path, help="same columns; unset = a tenth of the train rows")
    add(
        "--test_file",
        type=Path,
        help="same columns, for the final scores; unset = the rows of --validation_file, or another tenth of train's",
    )
    add(
        "--image_folder",
        type=Path,
        help="folder of one folder per label, or of train, validation, test folders of such",
    )
    add("--dataset_name", help="data set on the Hub, owner/name, or a local data set folder")
    add("--dataset_config_name", help="configuration of --dataset_name")
    add(
        "--streaming",
        action="store_true",
        help="text: read --train_file, a file or a quoted pattern such as 'shards/*.parquet', or --dataset_name while "
        "training, for data larger than memory; labels are those of the validation data; needs --max_steps",
    )
    add("--text_column_name", default="text", help="column with the documents")
    add("--image_column_name", default="image", help="column with the images of --dataset_name")
    add("--label_column_name", default="label", help="column with the labels")
    add("--label_separator", help="character between the labels of one row, for multi-label csv, for example '|'")
    add(
        "--problem_type",
        choices=("single_label_classification", "multi_label_classification", "regression"),
        help="what the labels are; unset = told from the labels and printed",
    )
    add("--data_name", help="name of your data for the model card; unset = the file or folder name")
    add("--data_license", default="unknown", help="licence of your data for the model card")
    add("--data_attribution", default="not stated", help="whom the data's licence asks to credit, for the model card")
    add("--max_train_samples", type=int, help="use only this many training examples; unset = all")
    add("--max_eval_samples", type=int, help="use only this many validation and test examples each; unset = all")
    add("--preprocessing_num_workers", type=int, help="processes that tokenize; unset = the cores, for enough text")
    add("--overwrite_cache", action="store_true", help="tokenize again instead of reading an earlier run's tokens")
    add("--random_crop", action="store_true", help="images: train on random crops of 60 to 100 %% of the area")
    add("--random_flip", action="store_true", help="images: mirror half of the training images left to right")


def add_model_arguments(
    parser: argparse.ArgumentParser, *, leave_out: Collection[str] = (), helps: Mapping[str, str] = NO_HELPS
) -> None:
    """Which model to start from, and the fields of its config that a user may set; unset fields stay as they are."""
    add = adder(parser, "model", leave_out, helps)
    add("--model_name_or_path", help="stock BERT or ViT checkpoint or one of ours; 'none' = from scratch (images)")
    add(
        "--base_model", help="owner/name on the Hub that a local --model_name_or_path was made from, for the model card"
    )
    add("--license", help="licence of the trained weights as the Hub spells it, for the model card")
    add("--language", help="ISO 639-1 code of the text, for the model card; unset = not stated")
    add("--max_length", type=int, help="longest document in tokens, special ones included; longer ones are cut")
    add("--strict_length", action="store_true", help="a document longer than --max_length is an error")
    add(
        "--image_size",
        type=int,
        help="side that images are resized to, in pixels; unset = as the checkpoint's processor says",
    )
    add_field_arguments(add)
    add("--position_embedding_type", choices=("absolute", "periodic", "none"), help="see FABertConfig")
    add("--freeze_layers", type=int, help="keep the embeddings and this many bottom layers as they are; 0 = train all")
    add("--gradient_checkpointing", action="store_true", help="recompute activations backward: less memory, more time")


def add_field_arguments(add: Callable) -> None:
    """The fields of an FA model's config that change no stock weight, by an `add_argument`; unset ones stay."""
    add("--attention_normalization", choices=("softmax", "scaling"), help="see FABertConfig; unset = the checkpoint's")
    add("--key_feature_size", type=int, help="features per head that Q and K are mapped to; unset = the checkpoint's")
    add("--key_features", choices=("copies", "sign_pairs"), help="how the learned maps of Q and K start")
    add(
        "--learned_temperatures",
        action=argparse.BooleanOptionalAction,
        help="learn the temperature of both softmaxes in every head",
    )
    add("--local_kernel_size", type=int, help="width of the convolution over V, in tokens or patches; odd, 0 = off")
    add("--local_window", type=int, help="reach of the softmax window to each side, in tokens or patches; 0 = off")
    add("--softmax_layers", type=int, nargs="*", help="indices of layers that keep softmax attention")
    add("--classifier_pooling", choices=("cls", "mean"), help="what the classifier reads")


def add_training_arguments(parser: argparse.ArgumentParser, *, leave_out: Collection[str] = ()) -> None:
    """Batches, optimiser, evaluation, checkpoints and reporting."""
    add = adder(parser, "training", leave_out, {})
    add("--per_device_train_batch_size", type=int, help="most examples in a batch of one process")
    add("--per_device_eval_batch_size", type=int, help="most examples in an evaluation batch of one process")
    add("--max_tokens_per_batch", type=int, help="most tokens in a batch of a process, padding included; 0 = no limit")
    add("--group_by_length", action=argparse.BooleanOptionalAction, help="batch examples of similar length together")
    add("--packing", action="store_true", help="text: documents one after the other instead of padded, in any order")
    add("--gradient_accumulation_steps", type=int, help="batches per optimiser step")
    add("--num_train_epochs", type=float, help="passes over the training data")
    add("--short_epochs", type=int, help="cut documents to --short_length in this many first epochs; 0 = none")
    add("--short_length", type=int, help="tokens that a document is cut to in the --short_epochs, which go faster")
    add("--max_steps", type=int, help="optimiser steps in all, instead of --num_train_epochs; -1 = by epochs")
    add("--learning_rate", type=float, help="peak rate of the encoder")
    add("--head_learning_rate", type=float, help="peak rate of new weights; unset = ten times, from scratch once")
    add("--weight_decay", type=float, help="AdamW's decay, on everything but biases and norms")
    add("--max_grad_norm", type=float, help="clip the gradient to this norm; 0 = off")
    add("--lr_scheduler_type", choices=[kind.value for kind in SchedulerType], help="schedule after the warm-up")
    add("--warmup_ratio", type=float, help="share of all steps over which the rate rises from 0")
    add("--warmup_steps", type=int, help="the same in steps, instead of --warmup_ratio")
    add(
        "--mixed_precision",
        choices=("no", "fp16", "bf16", "auto"),
        help="autocast type; auto = bf16 where the device is fast at it; unset = accelerate's config, else no",
    )
    add("--num_threads", type=int, help="CPU threads of each process; 0 = all cores, shared by the processes")
    add("--ddp_timeout", type=int, default=1800, help="seconds that processes wait for a silent one before they stop")
    add(
        "--sequence_parallel_size",
        type=int,
        default=1,
        help="processes that share the tokens of each batch; the number of processes is a multiple of it",
    )
    add("--dataloader_num_workers", type=int, help="processes that load data; 0 = none but this; unset = as is best")
    add("--seed", type=int, help="seed of weights, order, dropout and augmentation")
    add = adder(parser, "evaluation and checkpoints", leave_out, {})
    add("--eval_steps", type=int, help="optimiser steps between evaluations; 0 = after each epoch")
    add("--save_steps", type=int, help="optimiser steps between checkpoints; 0 = after each epoch")
    add("--save_total_limit", type=int, help="newest checkpoints kept besides the best; 0 = all")
    add("--load_best_model_at_end", action=argparse.BooleanOptionalAction, help="end with the best weights")
    add("--metric_for_best_model", help="validation score to compare; unset = accuracy, for regression mse")
    add("--early_stopping_patience", type=int, help="evaluations without gain after which to stop; 0 = never")
    add(
        "--resume_from_checkpoint",
        help="checkpoint folder, 'last' for the newest sound one of --output_dir, or 'auto' = last if any",
    )
    add("--output_dir", type=Path, help="folder for the model, checkpoints and reports")
    add("--overwrite_output_dir", action="store_true", help="replace an earlier run's checkpoints and files")
    add("--report_to", help="any tracker of Accelerate by name, or 'none'")
    add("--logging_steps", type=int, help="optimiser steps between entries in the tracker")
    add("--profile", action="store_true", help="write a torch profiler trace of 3 early steps to OUTPUT_DIR/profile")
    add("--push_to_hub", action="store_true", help="upload the finished folder")
    add("--hub_model_id", help="owner/name to upload to; unset = the folder's name under your account")
    add("--hub_token", help="token for the upload; unset = the one you logged in with")
    add("--hub_private", action="store_true", help="create the Hub repository as private")


def add_distillation_arguments(parser: argparse.ArgumentParser) -> None:
    """The stages of a recovery and what they compare."""
    group = parser.add_argument_group("distillation (0 steps leave a stage out)")
    add = group.add_argument
    add("--teacher_name_or_path", help="softmax checkpoint to learn from; unset = --model_name_or_path, if it is stock")
    add("--transfer_steps", type=int, help="steps in which every layer learns its teacher layer's attention output")
    add("--transfer_learning_rate", type=float, help="peak rate of the mixers in these steps")
    add("--end_to_end_steps", type=int, help="steps in which the whole model learns hidden states and embedding")
    add("--mixer_learning_rate", type=float, help="peak rate of feature maps, convolutions and gates in these steps")
    add("--long_steps", type=int, help="steps on documents of up to --long_length, the teacher reading windows of them")
    add("--long_length", type=int, help="longest document of these steps, in tokens; texts up to it are compared, too")
    add("--freeze_embeddings", action=argparse.BooleanOptionalAction, help="keep the table of words as it is")
    add(
        "--pooling",
        choices=("mean", "cls"),
        help="what the embedding is; unset = as the checkpoint says, or mean of text, cls of images",
    )
    add(
        "--probe_file",
        type=Path,
        help="texts with labels, a table as --train_file of finetune.py: logistic regression on the embeddings of "
        "student and teacher goes into the receipt; unset = the licence documents beside the packaged text",
    )
    add("--probe_folder", type=Path, help="images likewise, one folder per class")


def model_overrides(args: argparse.Namespace) -> dict:
    """The config fields that the flags set."""
    return {name: value for name in MODEL_FIELDS if (value := getattr(args, name, None)) is not None}


def command_line(script: str, flags: Sequence[str]) -> str:
    """The command for a card or a message, with the value of --hub_token left out."""
    shown, hide_next = [], False
    for flag in flags:
        if flag.startswith("--hub_token"):
            hide_next = "=" not in flag
        elif hide_next:
            hide_next = False
        else:
            shown.append(flag)
    return shlex.join(["accelerate", "launch", script, *shown])


def check_training_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError, naming the flag, for values of `add_training_arguments` that no run can use."""
    positive = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    counted = ("sequence_parallel_size", "logging_steps", "num_train_epochs", "learning_rate", "ddp_timeout")
    _check_positive(args, *positive, *counted)
    if args.head_learning_rate is not None:
        _check_positive(args, "head_learning_rate")
    counts = ("short_epochs", "eval_steps", "save_steps", "save_total_limit", "early_stopping_patience")
    amounts = ("max_tokens_per_batch", "max_grad_norm", "weight_decay", "num_threads", "warmup_steps", "seed")
    _check_not_negative(args, *counts, *amounts)
    if args.dataloader_num_workers is not None:
        _check_not_negative(args, "dataloader_num_workers")
    if not 0 <= args.warmup_ratio < 1:
        raise ValueError(f"--warmup_ratio must be at least 0 and below 1, got {args.warmup_ratio}.")
    if args.max_steps == 0 or args.max_steps < -1:
        raise ValueError(f"--max_steps must be at least 1, or -1 to train by epochs, got {args.max_steps}.")
    if args.resume_from_checkpoint and args.overwrite_output_dir:
        raise ValueError("--resume_from_checkpoint and --overwrite_output_dir contradict each other; give one.")


def _check_positive(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name} must be above 0, got {getattr(args, name)}.")


def _check_not_negative(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} must not be negative, got {getattr(args, name)}.")


def check_sources(args: argparse.Namespace, *, is_text: bool) -> list[str]:
    """The flags that name data, one at most.

    Raises:
        ValueError: there are two, or one of the other kind of data.
    """
    sources = [name for name in ("train_file", "image_folder", "dataset_name") if getattr(args, name)]
    if len(sources) > 1:
        raise ValueError(f"--{sources[0]} and --{sources[1]} are two sources of data; give one.")
    if (args.validation_file or args.test_file) and not args.train_file:
        raise ValueError("--validation_file and --test_file go with --train_file, which is missing.")
    if args.image_folder and is_text:
        raise ValueError("--image_folder is for images, and --task for text, which --train_file names.")
    if args.train_file and not is_text:
        raise ValueError("--train_file is for text, and --task for images, which --image_folder names.")
    return sources


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError, naming the flag, for values that no run can use or that contradict each other."""
    check_training_arguments(args)
    optional = ("max_length", "image_size", "max_train_samples", "max_eval_samples", "preprocessing_num_workers")
    _check_positive(args, *(name for name in optional if getattr(args, name) is not None))
    _check_not_negative(args, "freeze_layers")
    if args.short_epochs and (args.short_length < 3 or args.task != "text-classification"):
        raise ValueError("--short_epochs is for text and needs a --short_length of at least 3 tokens.")
    if args.packing and (args.max_tokens_per_batch == 0 or args.task != "text-classification"):
        raise ValueError(
            "--packing is for text and needs a --max_tokens_per_batch, the tokens that a batch is filled to."
        )
    if args.sequence_parallel_size > 1 and args.packing:
        raise ValueError("--sequence_parallel_size shares out padded batches: leave out --packing.")
    if args.sequence_parallel_size > 1 and args.streaming:
        raise ValueError("--sequence_parallel_size needs data that is not streamed: leave out --streaming.")
    sources = check_sources(args, is_text=args.task == "text-classification")
    if args.streaming:
        check_streaming(args)
    if args.task == "text-classification" and args.model_name_or_path == "none":
        raise ValueError("--model_name_or_path none is for images; text needs a checkpoint, for its tokenizer too.")
    if sources and args.full_recipe:
        raise ValueError(f"--full_recipe is of the built-in demo data; --{sources[0]} has its own flags.")
    if args.max_length is not None and args.max_length < 3:
        raise ValueError(f"--max_length must be at least 3 tokens, two of which are special, got {args.max_length}.")
    if args.license != args.license.lower() or " " in args.license:
        raise ValueError(f"--license must be as the Hub spells it, such as apache-2.0, got {args.license!r}.")
    if not re.fullmatch(r"[\w.-]+", args.output_dir.resolve().name):
        raise ValueError(
            f"--output_dir {args.output_dir} must end in a name of letters, digits, '.', '-' and '_': the model card "
            "and the Hub name the model by it."
        )


def check_streaming(args: argparse.Namespace) -> None:
    """Raise ValueError, naming the flag, for what a stream can't do."""
    if args.task != "text-classification" or not (args.train_file or args.dataset_name):
        raise ValueError("--streaming is for text from --train_file or --dataset_name.")
    if args.train_file and not args.validation_file:
        raise ValueError("--streaming needs a --validation_file, which is read whole and names the labels.")
    if args.max_steps < 1:
        raise ValueError("--streaming needs --max_steps: nobody knows how many steps an epoch of a stream takes.")
    if not args.save_steps:
        raise ValueError("--streaming needs --save_steps: a stream has no end of an epoch at which to save.")
    for name in ("short_epochs", "max_train_samples"):
        if getattr(args, name):
            raise ValueError(f"--{name} is not for --streaming; leave it out.")
