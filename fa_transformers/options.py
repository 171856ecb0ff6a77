"""Options of runs, as frozen dataclasses: one field is one flag, and its help text stands here alone.

This file needs nothing but the standard library, so that a command line answers before torch is loaded. A field that
is `UNSET` is a matter of tuning: the task's recipe fills it (`resolve`), and a value that was given wins.
"""

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from .redaction import keep_secret

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
Pooling = Literal["cls", "mean"]
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
]  # fmt: skip


class _Unset:
    """The type of `UNSET`; false, so that `options.seed or 0` reads as with None."""

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "UNSET"

    def __reduce__(self) -> str:
        return "UNSET"


UNSET: Any = _Unset()
"""The value of a field that the recipe of the task fills."""

DATA_SOURCES = ("train_file", "image_folder", "dataset_name")
"""Fields of `DataOptions` that name data; without any of them the built-in demo data is read."""


def option(default: Any, help: str, *, group: str, common: bool = False, is_secret: bool = False) -> Any:
    """Return a dataclass field that is a flag: its default, its help text, and the group that commands opt in to.

    `common` flags are the ones that --help shows; --help-all shows every one. A secret value is in no `repr`.
    """
    return field(default=default, metadata={"help": help, "group": group, "common": common}, repr=not is_secret)


@dataclass(frozen=True)
class OptionGroup:
    """The base of all options: text given for a path becomes a `Path`, and a list becomes a tuple."""

    def __post_init__(self) -> None:
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, str) and Path in (part.type, *get_args(part.type)):
                object.__setattr__(self, part.name, Path(value))
            elif isinstance(value, list):
                object.__setattr__(self, part.name, tuple(value))


@dataclass(frozen=True)
class DataOptions(OptionGroup):
    """The data to learn from: files, a folder of images or a data set of the Hub; none of these means the demo."""

    train_file: Path | None = option(
        None,
        "csv, tsv, json, jsonl, parquet, xlsx or, for distillation, txt file with the columns text and label",
        group="text",
        common=True,
    )
    validation_file: Path | None = option(
        None, "same columns, for scores on the way; unset = a share of the train rows", group="text", common=True
    )
    test_file: Path | None = option(
        None,
        "same columns, for the final scores, or without labels, to predict them; unset = the rows of "
        "--validation_file, or another tenth of train's",
        group="labels",
        common=True,
    )
    image_folder: Path | None = option(
        None,
        "folder of one folder per label, or of train, validation, test folders of such; distillation reads no labels",
        group="images",
        common=True,
    )
    dataset_name: str | None = option(
        None, "data set on the Hub, owner/name, or a local folder: a saved data set, or files of tables or images",
        group="text", common=True,
    )  # fmt: skip
    dataset_config_name: str | None = option(None, "configuration of --dataset_name", group="text")
    streaming: bool = option(
        False,
        "text: read --train_file, a file or a quoted pattern such as 'shards/*.parquet', or --dataset_name while "
        "training, for data larger than memory; labels are those of the validation data; needs --max_steps",
        group="streaming",
    )
    text_column_name: str = option("text", "column with the documents", group="text", common=True)
    image_column_name: str = option("image", "column with the images of --dataset_name", group="images")
    label_column_name: str = option("label", "column with the labels", group="label column", common=True)
    label_separator: str | None = option(
        None, "character between the labels of one row, for multi-label csv, for example '|'", group="labels"
    )
    label_names: tuple[str, ...] | None = option(
        None,
        "names of the classes in their order: of the entries of rows of zeros and ones, or of integers from 0 on",
        group="labels",
    )
    group_column: str | None = option(
        None,
        "column whose equal values (author, patient, source) stay in one split where splits are drawn",
        group="labels",
    )
    delimiter: str | None = option(None, "character between the fields of csv files; unset = found", group="text")
    drop_bad_rows: bool = option(
        False, "leave out rows that can't be used, counted in a warning, instead of refusing the file", group="text"
    )
    problem_type: ProblemType | None = option(
        None, "what the labels are; unset = told from the labels and printed", group="labels"
    )
    max_train_samples: int | None = option(None, "use only this many training examples; unset = all", group="text")
    max_eval_samples: int | None = option(
        UNSET, "use only this many validation and test examples each; unset = all", group="text"
    )
    preprocessing_num_workers: int | None = option(
        None, "processes that tokenize; unset = the cores, for enough text", group="tokenizing"
    )
    overwrite_cache: bool = option(
        False, "tokenize again instead of reading an earlier run's tokens", group="tokenizing"
    )
    random_crop: bool = option(False, "images: train on random crops of 60 to 100 % of the area", group="images")
    random_flip: bool = option(False, "images: mirror half of the training images left to right", group="images")

    @property
    def sources(self) -> list[str]:
        """Names of the fields that name data, one at most in a sound set of options."""
        return [name for name in DATA_SOURCES if getattr(self, name)]

    @property
    def is_demo(self) -> bool:
        """True where nothing is named, so that the built-in demo data is read."""
        return not self.sources


@dataclass(frozen=True)
class ModelOptions(OptionGroup):
    """The model to start from, and the fields of its config that a user may set; unset ones stay the checkpoint's."""

    model_name_or_path: str = option(
        UNSET,
        "stock checkpoint or one of ours, on the Hub or a folder, or 'minilm' or 'dinov2-small'; 'none' = from scratch "
        "(images)",
        group="checkpoint",
        common=True,
    )
    max_length: int = option(
        UNSET,
        "longest text that is read at once, in tokens, special ones included; fine-tuning cuts longer ones, "
        "distillation cuts them into several",
        group="size",
        common=True,
    )
    strict_length: bool = option(False, "a document longer than --max_length is an error", group="strict length")
    image_size: int | None = option(
        UNSET,
        "side in pixels of the square that has as many pixels as an image is resized to, aspect kept; unset = as the "
        "checkpoint's processor says",
        group="size",
        common=True,
    )
    square: bool = option(
        False, "resize images to the square of --image_size, whatever their shape, instead of keeping it", group="size"
    )
    attention_normalization: Literal["softmax", "scaling"] | None = option(
        UNSET, "see FABertConfig; unset = the checkpoint's", group="layer"
    )
    key_feature_size: int | None = option(
        UNSET, "features per head that Q and K are mapped to; unset = the checkpoint's", group="layer"
    )
    key_features: Literal["copies", "sign_pairs"] | None = option(
        UNSET, "how the learned maps of Q and K start", group="layer"
    )
    learned_temperatures: bool | None = option(
        UNSET, "learn the temperature of both softmaxes in every head", group="layer"
    )
    local_kernel_size: int | None = option(
        UNSET, "width of the convolution over V, in tokens or patches; odd, 0 = off", group="layer"
    )
    local_window: int | None = option(
        UNSET,
        "reach of the softmax window to each side, in tokens or patches; 0 = off, unset = 64 for stock text models",
        group="layer",
        common=True,
    )
    softmax_layers: tuple[int, ...] | None = option(
        UNSET, "indices of layers that keep softmax attention", group="layer"
    )
    classifier_pooling: Pooling | None = option(UNSET, "what the classifier reads", group="layer")
    position_embedding_type: Literal["absolute", "periodic", "none"] | None = option(
        UNSET, "see FABertConfig; unset = periodic for stock text models", group="positions"
    )
    freeze_layers: int = option(
        0, "keep the embeddings and this many bottom layers as they are; 0 = train all", group="freezing"
    )
    lora_rank: int = option(
        0,
        "train low-rank updates of this rank of the attention's four projections, and whole only the head and the "
        "mixers' own weights; writes the adapter beside the merged model; 0 = train all weights",
        group="lora",
    )
    lora_alpha: int | None = option(
        None, "the updates are scaled by --lora_alpha / --lora_rank; unset = twice the rank", group="lora"
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations backward: less memory, more time", group="freezing", common=True
    )

    @property
    def config_fields(self) -> dict[str, Any]:
        """The fields of an FA model's config that are set."""
        names = [part.name for part in fields(self) if part.metadata["group"] in ("layer", "positions")]
        given = {name: value for name in names if (value := getattr(self, name)) not in (None, UNSET)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


@dataclass(frozen=True)
class LoopOptions(OptionGroup):
    """Batches, optimiser, evaluation, checkpoints and reporting of a training run."""

    per_device_train_batch_size: int = option(
        UNSET, "most examples in a batch of one process", group="batches", common=True
    )
    per_device_eval_batch_size: int = option(
        UNSET, "most examples in an evaluation batch of one process", group="batches"
    )
    max_tokens_per_batch: int = option(
        UNSET, "most tokens in a batch of a process, padding included; 0 = no limit", group="batches", common=True
    )
    group_by_length: bool = option(UNSET, "batch examples of similar length together", group="batches")
    packing: bool = option(
        False, "text: documents one after the other instead of padded, in any order", group="packing"
    )
    gradient_accumulation_steps: int = option(UNSET, "batches per optimiser step", group="batches")
    num_train_epochs: float = option(UNSET, "passes over the training data", group="epochs", common=True)
    recovery_steps: int = option(
        0, "text: steps in which new layers first learn what a checkpoint's softmax gave; 0 = none", group="recovery"
    )
    short_epochs: int = option(
        UNSET, "first epochs on --short_length tokens; unset = all but one of a stock text model", group="short epochs"
    )
    short_length: int = option(
        UNSET, "tokens that a document is cut to in the --short_epochs, which go faster", group="short epochs"
    )
    max_steps: int = option(
        UNSET,
        "optimiser steps in all, instead of --num_train_epochs; -1 = by epochs",
        group="epochs",
        common=True,
    )
    dry_run: bool = option(
        False,
        "read all data, print splits, lengths, memory, time and files of the run, and end; nothing is trained",
        group="dry run",
    )
    learning_rate: float = option(UNSET, "peak rate of the encoder", group="optimizer", common=True)
    head_learning_rate: float | None = option(
        None, "peak rate of new weights; unset = ten times, from scratch once", group="head rate"
    )
    weight_decay: float = option(UNSET, "AdamW's decay, on everything but biases and norms", group="optimizer")
    max_grad_norm: float = option(UNSET, "clip the gradient to this norm; 0 = off", group="optimizer")
    lr_scheduler_type: Scheduler = option(UNSET, "schedule after the warm-up", group="optimizer")
    warmup_ratio: float = option(UNSET, "share of all steps over which the rate rises from 0", group="optimizer")
    warmup_steps: int = option(UNSET, "steps of the warm-up, instead of --warmup_ratio", group="optimizer")
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] | None = option(
        UNSET,
        "autocast type; auto = bf16 where the device is fast at it; unset = accelerate's config, else no",
        group="device",
    )
    use_cpu: bool = option(False, "train on the CPU even if there is a GPU", group="device", common=True)
    num_threads: int = option(
        UNSET,
        "CPU threads of each process; 0 = OMP_NUM_THREADS, or else the usable cores, shared by the processes",
        group="device",
    )
    ddp_timeout: int = option(1800, "seconds that processes wait for a silent one before they stop", group="device")
    sequence_parallel_size: int = option(
        1,
        "processes that share the tokens of each batch; the number of processes is a multiple of it",
        group="sequence parallel",
    )
    dataloader_num_workers: int | None = option(
        None, "processes that load data; 0 = none but this; unset = as is best", group="device"
    )
    seed: int = option(UNSET, "seed of weights, order, dropout and augmentation", group="device", common=True)
    eval_steps: int = option(UNSET, "optimiser steps between evaluations; 0 = after each epoch", group="checkpoints")
    save_steps: int = option(UNSET, "optimiser steps between checkpoints; 0 = after each epoch", group="checkpoints")
    save_total_limit: int = option(UNSET, "newest checkpoints kept besides the best; 0 = all", group="checkpoints")
    load_best_model_at_end: bool = option(UNSET, "end with the best weights", group="checkpoints")
    metric_for_best_model: str | None = option(
        None, "validation score to compare; unset = accuracy, for regression mse", group="best metric"
    )
    early_stopping_patience: int = option(
        UNSET, "evaluations without gain after which to stop; 0 = never", group="checkpoints"
    )
    resume_from_checkpoint: str | None = option(
        None,
        "checkpoint folder, 'last' for the newest sound one of --output_dir, or 'auto' = last if any",
        group="checkpoints",
        common=True,
    )
    output_dir: Path = option(UNSET, "folder for the model, checkpoints and reports", group="checkpoints", common=True)
    overwrite_output_dir: bool = option(
        False, "replace an earlier run's checkpoints and files", group="checkpoints", common=True
    )
    report_to: str = option(UNSET, "any tracker of Accelerate by name, or 'none'", group="checkpoints")
    logging_steps: int = option(UNSET, "optimiser steps between entries in the tracker", group="checkpoints")
    report_lengths: tuple[int, ...] | None = option(
        None,
        "text: also score when only so many first tokens of each document are read, such as 512 2048 8192",
        group="lengths",
    )
    profile: bool = option(
        False, "write a torch profiler trace of 3 early steps to OUTPUT_DIR/profile", group="checkpoints"
    )


@dataclass(frozen=True)
class DistillationOptions(OptionGroup):
    """The stages of a recovery and what they compare; 0 steps leave a stage out."""

    teacher_name_or_path: str | None = option(
        None,
        "softmax checkpoint to learn from; unset = --model_name_or_path, if it is stock",
        group="distillation",
        common=True,
    )
    transfer_steps: int = option(
        UNSET,
        "steps in which every layer learns its teacher layer's attention output",
        group="distillation",
        common=True,
    )
    transfer_learning_rate: float = option(UNSET, "peak rate of the mixers in these steps", group="distillation")
    end_to_end_steps: int = option(
        UNSET,
        "steps in which the whole model learns hidden states and embedding",
        group="distillation",
        common=True,
    )
    mixer_learning_rate: float = option(
        UNSET, "peak rate of feature maps, convolutions and gates in these steps", group="distillation"
    )
    long_steps: int = option(
        UNSET,
        "steps on documents of up to --long_length, the teacher reading windows of them",
        group="distillation",
    )
    long_length: int = option(
        UNSET,
        "longest document of the --long_steps, in tokens; texts up to it are compared, too",
        group="distillation",
        common=True,
    )
    freeze_embeddings: bool = option(UNSET, "keep the table of words as it is", group="distillation")
    pooling: Pooling | None = option(
        None,
        "what the embedding is; unset = as the checkpoint says, or mean of text, cls of images",
        group="distillation",
    )
    probe_file: Path | None = option(
        None,
        "texts with labels, a table as --train_file of finetune.py: logistic regression on the embeddings of "
        "student and teacher goes into the receipt; unset = the licence documents beside the packaged text",
        group="distillation",
    )
    probe_folder: Path | None = option(None, "labelled images likewise, one folder per class", group="distillation")


@dataclass(frozen=True)
class ConversionOptions(OptionGroup):
    """The way a checkpoint is converted, beside the fields of a layer; unset is as the checkpoint has it."""

    max_length: int | None = option(
        None, "text: longest document in tokens; unset = as long as the checkpoint's", group="conversion", common=True
    )
    positions: Literal["tile", "interpolate", "periodic", "none"] | None = option(
        None,
        "how the position table grows; unset = tile, for images interpolate",
        group="conversion",
        common=True,
    )
    image_size: int | None = option(
        None, "images: side in pixels; unset = the checkpoint's", group="conversion", common=True
    )
    square: bool = option(
        False,
        "images: the processor resizes them to the square, or as the checkpoint's does, instead of keeping their shape",
        group="conversion",
    )
    auto_class: str | None = option(
        None, "head, as AutoModelForMaskedLM; unset = the checkpoint's own", group="conversion", common=True
    )
    overwrite_output_dir: bool = option(
        False, "replace what an earlier conversion wrote there", group="conversion", common=True
    )


@dataclass(frozen=True)
class PredictOptions(OptionGroup):
    """The output of predictions, and how a document or image is read."""

    output: Path = option(
        Path("predictions.csv"), "table to write: .csv, .jsonl or .parquet", group="predict", common=True
    )
    overwrite: bool = option(False, "replace --output, or an unfinished run of it", group="predict", common=True)
    resume: bool = option(
        False, "go on with an unfinished run of --output, with the same model, input and flags", group="predict",
        common=True,
    )  # fmt: skip
    id_column_name: str | None = option(None, "column that is carried over to the output", group="predict")
    max_length: int | None = option(
        None, "tokens that are read of a document; unset = as many as the model can", group="predict", common=True
    )
    strict_length: bool = option(
        False, "a document that is longer is a row with an error, instead of being cut", group="predict"
    )
    max_tokens_per_batch: int = option(
        16384, "most tokens or patches in a batch, padding included; less takes less memory", group="predict",
        common=True,
    )  # fmt: skip
    chunk_size: int = option(
        8192, "tokens or patches that what is longer than a batch is computed by at a time", group="predict"
    )
    device: str | None = option(None, "such as cpu or cuda:1; unset = the GPU, if there is one", group="predict")
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "type of the weights; unset = as they were saved", group="predict"
    )


@dataclass(frozen=True)
class CardOptions(OptionGroup):
    """The facts of the model card that no run can know."""

    license: str = option(
        UNSET, "licence of the trained weights as the Hub spells it, for the model card", group="card", common=True
    )
    language: str | None = option(
        UNSET, "ISO 639-1 code of the text, for the model card; unset = not stated", group="card"
    )
    base_model: str | None = option(
        None,
        "owner/name on the Hub that a local --model_name_or_path was made from, for the model card",
        group="card",
    )
    data_name: str | None = option(
        None, "name of your data for the model card; unset = the file or folder name", group="data card"
    )
    data_license: str = option("unknown", "licence of your data for the model card", group="data card")
    data_attribution: str = option(
        "not stated", "whom the data's licence asks to credit, for the model card", group="data card"
    )
    hub_model_id: str | None = option(
        None, "owner/name to upload to; unset = the folder's name under your account", group="hub name"
    )
    push_to_hub: bool = option(False, "upload the finished folder", group="push", common=True)
    hub_token: str | None = option(
        None, "token for the upload; unset = the one you logged in with", group="push", is_secret=True
    )
    hub_private: bool = option(False, "create the Hub repository as private", group="push")

    def __post_init__(self) -> None:
        """From here on the token is hidden in all that this process writes."""
        super().__post_init__()
        keep_secret(self.hub_token)


Group = TypeVar("Group", bound=OptionGroup)


def resolve(options: Group, recipe: Mapping[str, Any]) -> Group:
    """Return the options with the recipe's values where a field is `UNSET`; names of other dataclasses are passed over.

    A field that neither sets stays `UNSET`.
    """
    filled = {part.name: recipe[part.name] for part in unset_fields(options) if part.name in recipe}
    return replace(options, **filled)


def unset_fields(options: Any) -> list[Field]:
    """The fields of an options object that are `UNSET`."""
    return [part for part in fields(options) if getattr(options, part.name) is UNSET]


def flat(*groups: Any) -> dict[str, Any]:
    """Return the fields of several options objects by name, for trackers and settings files; never the Hub's token."""
    values = {part.name: getattr(options, part.name) for options in groups for part in fields(options)}
    return {name: value for name, value in values.items() if name != "hub_token"}
