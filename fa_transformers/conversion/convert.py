"""Stock and FA checkpoints as FA models: tensors, configuration, length, tokenizer, and a report of every tensor.

No recovery training is done here: a stock checkpoint's factorized layers compute something else than it was trained
with. Such a model says so in its configuration, as `recovery="pending"`.
"""

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, logging
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from ..data.tokenizing import check_tokenizer
from ..hub.publish import check_target
from ..lora import set_location
from ..models import ARCHITECTURES, FAViTConfig
from ..models.configuration_fa import FactorizedConfig
from .config_file import CONFIG_FILE
from .folder import write_converted_folder
from .image_processors import fit_image_processor
from .json_file import refusing_sources
from .label_heads import LABEL_FIELDS, LABEL_HEADS, label_difference, replace_labels
from .report import TensorChange, is_as_stored, warn_of_lost_head
from .source import CheckpointSource, load_processor, read_source
from .stock_checkpoints import (
    FRESH_PARTS,
    KNOWN_PARTS,
    StockTensor,
    check_encoder,
    find_auto_class,
    find_family,
    first_match,
    head_difference,
    translate_fields,
    translate_tensors,
)

logger = logging.get_logger(__name__)

POSITIONS = ("tile", "interpolate", "periodic", "none")
# What the weights were trained with and their shapes don't show.
FIXED_FIELDS = (
    "num_attention_heads", "num_hidden_layers", "hidden_act", "layer_norm_eps", "encoder_attention_heads",
    "encoder_layers", "decoder_attention_heads", "decoder_layers", "activation_function",
)  # fmt: skip
# What a factorized layer computes; weights that were trained with another value need recovery again.
OPERATOR_FIELDS = (
    "attention_normalization", "key_feature_size", "key_features", "learned_temperatures", "local_kernel_size",
    "local_window",
)  # fmt: skip


@dataclass(frozen=True)
class Conversion:
    """A converted model, its tokenizer or image processor (None without one), and a report on every tensor.

    `folder` is where it was written, None where it wasn't; `counts` is the number of tensors by action.
    """

    model: PreTrainedModel
    report: list[TensorChange]
    processor: Any = None
    folder: Path | None = None
    counts: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        actions = [change.action for change in self.report]
        counts = {action: actions.count(action) for action in ("kept", "resized", "new", "dropped")}
        object.__setattr__(self, "counts", counts)

    def table(self, every: bool = True) -> str:
        """Return the report as aligned text, one line for each tensor, or only for those that were not kept."""
        rows = [("action", "shape", "in the checkpoint", "in the model", "reason")]
        for change in self.report if every else [change for change in self.report if change.action != "kept"]:
            shape = " x ".join(map(str, change.shape)) or "scalar"
            rows.append((change.action, shape, change.source or "-", change.result or "-", change.reason))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
            for row in rows
        )


def convert_checkpoint(
    model_or_path: str | os.PathLike | PreTrainedModel | CheckpointSource,
    *,
    output_dir: str | os.PathLike | None = None,
    overwrite: bool = False,
    max_length: int | None = None,
    positions: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    square: bool = False,
    auto_class: str | None = None,
    processor: Any = None,
    facts: Mapping[str, Any] | None = None,
    **config_overrides: Any,
) -> Conversion:
    """Make the FA model of a checkpoint, with every tensor accounted for.

    Reads BERT, RoBERTa, XLM-RoBERTa, CamemBERT, Longformer, ELECTRA (of one width), DistilBERT, LSG's variants of them,
    ViT, DeiT, DINOv2 with and without registers, DETR and Conditional DETR, whose encoders alone change,
    sentence-transformers folders of those, and FA models. With all layers in `softmax_layers` the result computes what
    the checkpoint does, except for Longformer's and LSG's own attention.

    Args:
        model_or_path: a transformers model, a folder, a repository of the Hub, or "minilm" or "dinov2-small", which are
            installed packages' weights; or what `read_source` made of one of these.
        output_dir: write the model there as `publish` does, with a card; a sentence-transformers model keeps its
            modules. Needs a tokenizer or image processor.
        overwrite: replace what an earlier conversion or `publish` wrote to `output_dir`.
        max_length: tokens that the model and its tokenizer are to take. None: as many as the checkpoint's, or any
            number with "periodic" positions and "none". The tokenizer of such a model is written without a limit; a
            sentence-transformers model keeps `max_length` as `max_seq_length`.
        positions: how a position table grows. "tile": row i is row i mod the old length. "interpolate": linear between
            rows, the ends staying the ends; for images bicubic, as the model does at run time. "periodic" and "none":
            see `FactorizedConfig.position_embedding_type`. None: "tile" for text, "interpolate" for images.
        image_size: side in pixels of the square that the position table is made for. Images are resized to at most as
            many pixels, in their own shape, by a `FAViTImageProcessor`. A (height, width) is the size of all images.
        square: the image processor resizes images to the square, whatever their shape; without `image_size` it is the
            checkpoint's own, as it is.
        auto_class: which head, by the name of its Auto class. None: the checkpoint's own. A head that computes
            something else than ours, or that the checkpoint lacks, starts fresh.
        processor: tokenizer or image processor, instead of the checkpoint's own.
        facts: fields of `ModelFacts` for the card, such as `license`, `language`, `base_model`.
        config_overrides: configuration fields to set, such as `local_window` or `num_labels`.

    Raises:
        ValueError: the architecture is unknown, or a decoder, or has relative positions; a tensor is unknown, missing
            or of another shape; the head count is not the checkpoint's; the tokenizer has more tokens than the
            vocabulary; a field has a bad value. The message names it.
        FileNotFoundError: the folder has no weights.
        FileExistsError: `output_dir` is not empty and `overwrite` is False.
    """
    if output_dir is not None:
        check_target(output_dir, overwrite)
    source = read_source(model_or_path)
    config_class = find_family(source.config.model_type).config_class
    is_text = ARCHITECTURES[config_class]["AutoModel"].main_input_name == "input_ids"
    if not issubclass(config_class, FactorizedConfig) and (positions is not None or image_size is not None or square):
        raise ValueError(
            "`positions`, `image_size` and `square` are for position tables, which "
            f"{source.config.model_type!r} has none of: images of any size run. Set the size of its image processor "
            "instead."
        )
    mode = _check_length_options(is_text, positions, max_length, image_size, square, config_overrides)
    if positions is not None:
        kind = positions if positions in ("periodic", "none") else "absolute"
        config_overrides = {**config_overrides, "position_embedding_type": kind}
    model, report = _convert(source, auto_class, config_overrides)
    if max_length is not None:
        report = _note_resize(report, model, partial(extend_positions, model, max_length, mode))
    if image_size is not None:
        report = _note_resize(report, model, partial(resize_image_positions, model, image_size))
    if processor is None:
        processor = load_processor(source, model.main_input_name)
        if config_class is FAViTConfig and processor is not None:
            processor = fit_image_processor(processor, model.config, image_size, square=square)
    if isinstance(processor, PreTrainedTokenizerBase):
        _fit_tokenizer(processor, model.config, max_length, source.name)
    folder = None
    if output_dir is not None:
        options = {"max_length": max_length, "positions": positions, "image_size": image_size, "square": square or None}
        options["auto_class"] = auto_class
        shown = {name: value for name, value in {**options, **config_overrides}.items() if value is not None}
        shown.pop("position_embedding_type", None)
        folder = write_converted_folder(
            model, processor, source, output_dir, shown, dict(facts or {}), overwrite=overwrite
        )
    return Conversion(model, report, processor, folder)


def load_factorized(
    model_name_or_path: str | os.PathLike | CheckpointSource,
    auto_class: str,
    *,
    max_length: int | None = None,
    **config_overrides: Any,
) -> PreTrainedModel:
    """Load a checkpoint as an FA model for fine-tuning: `convert_checkpoint` without report and processor, in float32.

    Weights that the checkpoint has are taken over, others (a new head, feature maps, local terms) are fresh. Float32
    whatever the checkpoint's type: in half precision an optimizer's small steps are rounded away.

    Args:
        model_name_or_path: a local folder, a Hub repository or a short name, as in `convert_checkpoint`, or what
            `read_source` made of it.
        auto_class: which head, by the name of its Auto class, such as "AutoModelForSequenceClassification".
        max_length: tokens that the model must take. A shorter table of "absolute" positions is tiled to this length.
        config_overrides: configuration fields to set, such as `local_window` or `num_labels`.

    Raises:
        ValueError: as in `convert_checkpoint`.
    """
    model, _ = _convert(read_source(model_name_or_path), auto_class, config_overrides)
    if max_length is not None and model.main_input_name == "input_ids":
        extend_positions(model, max_length)
    return model.float()


def extend_positions(model: PreTrainedModel, max_length: int, mode: str = "tile") -> None:
    """Grow the table of "absolute" positions to `max_length` rows, in place.

    "tile": row i becomes row i mod the old length. "interpolate": row i becomes what stands at
    i · (old - 1) / (new - 1), linear between two rows, in float32. Tables that are long enough, "periodic" ones (any
    length runs) and absent ones are left as they are.
    """
    embeddings = model.base_model.embeddings
    old = embeddings.position_embeddings
    if model.config.position_embedding_type != "absolute" or old.num_embeddings >= max_length:
        return
    table = old.weight.detach()
    if mode == "tile":
        table = table[torch.arange(max_length, device=table.device) % old.num_embeddings].clone()
    else:
        columns = F.interpolate(table.float().T[None], size=max_length, mode="linear", align_corners=True)
        table = columns[0].T.contiguous().to(table.dtype)
    embeddings.position_embeddings = nn.Embedding.from_pretrained(table, freeze=False)
    model.config.position_table_size = max_length
    set_location(model, "")


def resize_image_positions(model: PreTrainedModel, image_size: int | tuple[int, int]) -> None:
    """Make the position table for another image size, in place, by what the model does at run time for such images.

    Raises:
        ValueError: a side is no multiple of the patch, so that its last row of patches would have no position.
    """
    embeddings, config = model.base_model.embeddings, model.config
    resized = copy.deepcopy(config)
    resized.image_size = list(image_size) if isinstance(image_size, tuple) else image_size
    resized.check_fields()
    sides = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    for side, patch in zip(sides, config.patch_shape, strict=True):
        if side % patch:
            below = side // patch * patch
            raise ValueError(
                f"`image_size` {image_size}: the patches are of {patch} px; take {below} or {below + patch}."
            )
    table = embeddings.position_embeddings
    if table is not None and resized.native_grid != config.native_grid:
        with torch.no_grad():
            patches = embeddings.patch_positions(resized.native_grid, interpolate_pos_encoding=True)
            embeddings.position_embeddings = nn.Parameter(torch.cat([table[:, :1], patches], dim=1))
    if config.image_size != resized.image_size:
        set_location(model, "")
    config.image_size = resized.image_size


def _check_length_options(
    is_text: bool,
    positions: str | None,
    max_length: int | None,
    image_size: int | tuple[int, int] | None,
    square: bool,
    overrides: Mapping[str, Any],
) -> str:
    """Check the options of length and size against each other; return how a table grows, "tile" or "interpolate"."""
    if positions is not None and positions not in POSITIONS:
        raise ValueError(f"`positions` must be one of {POSITIONS} or None, got {positions!r}.")
    if "position_embedding_type" in overrides:
        raise ValueError("Give `positions` instead of `position_embedding_type`: it says how a table grows, too.")
    if is_text and image_size is not None:
        raise ValueError("`image_size` is for images; for text give `max_length`.")
    if is_text and square:
        raise ValueError("`square` is for images.")
    if not is_text and (max_length is not None or positions == "tile"):
        raise ValueError('`max_length` and positions="tile" are for text; for images give `image_size`.')
    if max_length is not None and max_length < 1:
        raise ValueError(f"`max_length` must be at least 1 token, got {max_length}.")
    return "interpolate" if positions == "interpolate" else "tile"


@refusing_sources()
def _convert(
    source: CheckpointSource, auto_class: str | None, overrides: Mapping[str, Any]
) -> tuple[PreTrainedModel, list[TensorChange]]:
    family, stock = find_family(source.config.model_type), source.config.to_dict()
    check_encoder(stock)
    own_auto_class = find_auto_class(source.architecture) if source.architecture else auto_class or "AutoModel"
    heads, auto_class = ARCHITECTURES[family.config_class], auto_class or own_auto_class
    if auto_class is None:
        raise ValueError(f"{source.architecture} has a head that no FA model has; say which with `auto_class`.")
    if auto_class not in heads:
        raise ValueError(
            f"`auto_class` {auto_class!r} does not exist for {family.config_class.model_type!r}; "
            f"choose from {list(heads)}."
        )
    earlier, config = _build_configs(source, stock, overrides)
    difference = head_difference(source.architecture, stock, source.config.model_type)
    if own_auto_class != auto_class:
        difference = f"a head of {source.architecture}, the result is for {auto_class}"
    entries = translate_tensors(source.load_tensors(), stock, source.config.model_type)
    with torch.device("meta"):
        skeleton = heads[auto_class](copy.deepcopy(config))
    kept, report = _place_tensors(source, entries, skeleton, difference, label_difference(earlier, config))
    warn_of_lost_head(source, entries, report)
    with _without_load_report():
        model = heads[auto_class].from_pretrained(None, config=config, state_dict=kept, dtype=source.dtype)
    model.fresh_modules = sorted(
        {change.result.rpartition(".")[0] for change in report if change.action == "new" and change.result}
    )
    set_location(model, source.name if is_as_stored(source, earlier, config, report) else "")
    return model, report


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keeps transformers from listing fresh tensors as if they had been forgotten: ours says why each is fresh."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _build_configs(
    source: CheckpointSource, stock: dict, overrides: Mapping[str, Any]
) -> tuple[PretrainedConfig, PretrainedConfig]:
    """Return the configuration of the checkpoint as one of ours, and that of the result."""
    config_class = find_family(source.config.model_type).config_class
    fields = translate_fields(stock, source.config.model_type)
    try:
        earlier = config_class.from_dict(fields)
    except ValueError as error:
        folder = source.model_folder
        where = f"the configuration of {source.name!r}" if folder is None else str(folder / CONFIG_FILE)
        raise ValueError(f"{where}: {error}") from error
    for name in FIXED_FIELDS:
        if name in overrides and overrides[name] != getattr(earlier, name, overrides[name]):
            raise ValueError(
                f"{source.name!r} was trained with {name}={getattr(earlier, name)!r}, not {overrides[name]!r}; leave "
                "it out."
            )
    fields = replace_labels(fields, earlier, overrides)
    rest = {name: value for name, value in overrides.items() if name not in LABEL_FIELDS}
    config, unused = config_class.from_dict(fields, return_unused_kwargs=True, **rest)
    if unused:
        raise ValueError(f"{config_class.__name__} has no field {sorted(unused)[0]!r}.")
    has_new_operator = not set(config.factorized_layers) <= set(earlier.factorized_layers) or any(
        getattr(config, name) != getattr(earlier, name) for name in OPERATOR_FIELDS
    )
    if source.config.model_type != config.model_type or has_new_operator:
        config.recovery = "pending"
    if not config.factorized_layers:
        config.recovery = None
    return earlier, config


def _place_tensors(
    source: CheckpointSource,
    entries: list[StockTensor],
    skeleton: PreTrainedModel,
    difference: str | None,
    of_labels: str | None,
) -> tuple[dict[str, torch.Tensor], list[TensorChange]]:
    """Return the state dict for a model like `skeleton`, and the report on every tensor.

    `difference` is the reason why no head is carried over, `of_labels` why none with a row for each label is.
    """
    prefix = f"{skeleton.base_model_prefix}."
    wanted = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    is_base = not any(name.startswith(prefix) for name in wanted)
    of_head = {entry.name for entry in entries if entry.is_head and difference is None}
    kept: dict[str, torch.Tensor] = {}
    report = []
    for entry in entries:
        name, found = entry.name.removeprefix(prefix) if is_base else entry.name, tuple(entry.tensor.shape)
        is_known = KNOWN_PARTS.search(entry.name) is not None or ".mixer." in entry.name
        is_doubled = not entry.is_head and entry.name in of_head
        reason = entry.reason if entry.action == "dropped" else ""
        if not reason and is_known:
            if entry.is_head and difference is not None:
                reason = difference
            elif is_doubled:
                reason = "the head has its own"
            elif name not in wanted:
                reason = "the result has no such part"
            elif of_labels is not None and LABEL_HEADS.match(name):
                reason = of_labels
            elif found != wanted[name] and entry.is_head:
                reason = f"the result's has the shape {wanted[name]}"
        if reason:
            report.append(TensorChange(entry.source, None, found, "dropped", reason))
            continue
        if name not in wanted:
            raise ValueError(
                f"{source.name!r} has the tensor {entry.source}, which {_kind(source)} is not known to have."
            )
        if found != wanted[name]:
            raise ValueError(
                f"{source.name!r} has {entry.source} of shape {found}, the configuration asks for {wanted[name]}; "
                "leave out the field that changes it."
            )
        kept[name] = entry.tensor
        report.append(TensorChange(entry.source, name, found, entry.action, entry.reason))
    return kept, report + _account_for_missing(source, kept, skeleton, wanted, prefix if is_base else "")


def _account_for_missing(
    source: CheckpointSource,
    kept: dict[str, torch.Tensor],
    skeleton: PreTrainedModel,
    wanted: dict[str, tuple[int, ...]],
    prefix: str,
) -> list[TensorChange]:
    """The tensors that a checkpoint lacks: tied ones, and those that start fresh; any other is an error."""
    report = []
    bias, decoder_bias = "cls.predictions.bias", "cls.predictions.decoder.bias"
    for name, twin in ((bias, decoder_bias), (decoder_bias, bias)):
        if name in wanted and name not in kept and twin in kept:
            kept[name] = kept[twin]
            report.append(TensorChange(None, name, wanted[name], "kept", f"the same as {twin}"))
    tied = (skeleton._tied_weights_keys or {}) if getattr(skeleton.config, "tie_word_embeddings", False) else {}
    for name, shape in wanted.items():
        if name in kept:
            continue
        reason = first_match(FRESH_PARTS, prefix + name)
        if name in tied and tied[name] in kept:
            report.append(TensorChange(None, name, shape, "kept", f"tied to {tied[name]}"))
        elif reason is None:
            raise ValueError(f"{source.name!r} lacks the tensor that would be {name}; is the checkpoint complete?")
        else:
            report.append(TensorChange(None, name, shape, "new", reason))
    return report


def _kind(source: CheckpointSource) -> str:
    return f"a checkpoint of type {source.config.model_type!r}"


def _note_resize(report: list[TensorChange], model: PreTrainedModel, resize: Callable[[], None]) -> list[TensorChange]:
    """Run `resize` and enter in the report what it did to the position table."""

    def shapes() -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    before = shapes()
    resize()
    after = shapes()
    updated = []
    for change in report:
        if change.result is not None and before[change.result] != after[change.result]:
            reason = "; ".join(filter(None, [change.reason, f"was {' x '.join(map(str, before[change.result]))}"]))
            change = TensorChange(change.source, change.result, after[change.result], "resized", reason)
        updated.append(change)
    return updated


def _fit_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, max_length: int | None, source: str
) -> None:
    """Set how many tokens a tokenizer keeps; ValueError if it has tokens that the vocabulary lacks."""
    check_tokenizer(tokenizer, config, source, packing=True)  # who pads later may name the token then
    if max_length is not None:
        tokenizer.model_max_length = max_length
    elif config.position_embedding_type == "absolute":
        tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    else:
        tokenizer.model_max_length = VERY_LARGE_INTEGER
