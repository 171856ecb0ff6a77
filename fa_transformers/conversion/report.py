"""The report of a conversion: the fate of every tensor, and what follows for the head and for where the model lies."""

import re
from dataclasses import dataclass

from transformers import PretrainedConfig, logging

from .label_heads import list_sizes
from .source import CheckpointSource
from .stock_checkpoints import FRESH_HEAD, StockTensor

logger = logging.get_logger(__name__)

# What differs between a checkpoint's configuration and that of the same model in memory.
UNCOMPARED_FIELDS = ("_name_or_path", "architectures", "auto_map", "dtype", "recovery", "transformers_version")
# Fresh parts that an adapter holds whole, so that those of its base don't matter.
FRESH_WITH_HEADS = re.compile(r"^(classifier|qa_outputs)\.|\.pooler\.dense\.|^pooler\.dense\.")


@dataclass(frozen=True)
class TensorChange:
    """The fate of one tensor in a conversion.

    Args:
        source: its name in the checkpoint; None where it is new.
        result: its name in the model; None where it was dropped.
        shape: in the model, or in the checkpoint where it was dropped.
        action: "kept" (renamed at most), "resized", "new" or "dropped".
        reason: why; "" where it was plainly kept.
    """

    source: str | None
    result: str | None
    shape: tuple[int, ...]
    action: str
    reason: str = ""


def is_as_stored(
    source: CheckpointSource, earlier: PretrainedConfig, config: PretrainedConfig, report: list[TensorChange]
) -> bool:
    """Return True where the Auto class makes the same model of the source's folder, fresh heads and poolers apart.

    Not of a stock checkpoint: its own model, with softmax, has layers of the same names.
    """
    if source.folder is None or source.folder != source.model_folder or source.config.model_type != config.model_type:
        return False
    before, after = (
        {name: value for name, value in one.to_dict().items() if name not in UNCOMPARED_FIELDS}
        for one in (earlier, config)
    )
    return before == after and all(
        change.action in ("kept", "dropped") or FRESH_WITH_HEADS.search(change.result or "") for change in report
    )


def warn_of_lost_head(source: CheckpointSource, entries: list[StockTensor], report: list[TensorChange]) -> None:
    """Warn where a head of the checkpoint was dropped and the result's is drawn anew."""
    of_head = {entry.source for entry in entries if entry.is_head}
    dropped = [change for change in report if change.action == "dropped" and change.source in of_head]
    fresh = [change for change in report if change.action == "new" and change.reason == FRESH_HEAD]
    if dropped and fresh:
        before = list_sizes((change.source or "", change.shape) for change in dropped)
        after = list_sizes((change.result or "", change.shape) for change in fresh)
        kind = "" if source.name == source.architecture else f", a {source.architecture},"
        logger.warning(
            f"The head of {source.name}{kind} is not carried over and starts fresh: {dropped[0].reason}. "
            f"Dropped: {before}. Drawn anew: {after}."
        )
