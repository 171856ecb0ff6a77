"""The receipt of a recovery: what a converted model was trained on, and how near it came to its teacher."""

from typing import Any

import torch
from transformers import PreTrainedModel

from ..hub.timing import describe_hardware
from ..redaction import redact, without_local_paths
from ..tables import counted, format_table
from .job import DistillationJob

RECEIPT_FILE = "recovery.json"
DOWNSTREAM = ("teacher", "before", "after", "majority")
SIMILARITIES = ("cosine", "cosine_p5", "correlation")
STUDENT_FIELDS = (
    "key_feature_size", "key_features", "learned_temperatures", "local_kernel_size", "local_window", "softmax_layers",
    "position_embedding_type",
)  # fmt: skip


def build_receipt(
    job: DistillationJob,
    model: PreTrainedModel,
    pooling: str,
    stages: list[dict[str, Any]],
    similarity: dict[str, dict[str, dict[str, float]]],
    downstream: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the content of `recovery.json` and of the JSON line.

    `similarity` and `downstream` are those of `DistillationResult`.
    """
    receipt = {
        "student": {name: getattr(model.config, name) for name in STUDENT_FIELDS},
        "teacher": without_local_paths(job.teacher),
        "pooling": pooling,
        "parameters": model.num_parameters(),
        "tokens": sum(stage["train_tokens"] for stage in stages),
        "seconds": round(sum(stage["train_seconds"] for stage in stages), 1),
        "stages": stages,
        "similarity": similarity,
        "downstream": downstream,
        "seed": job.loop.seed,
        "hardware": describe_hardware(model.device),
        "torch": torch.__version__,
        "command": without_local_paths(job.command),
        "output_dir": without_local_paths(str(job.loop.output_dir.resolve())),
    }
    return redact(receipt)


def print_receipt(receipt: dict[str, Any]) -> None:
    """Print the receipt as tables: similarity, downstream accuracy, and the errors of every layer by stage."""
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
            f"\n{stage['stage']}: {counted(stage['steps'], 'step')}, {stage['train_tokens']:,} tokens, loss and error "
            "by layer:\n"
        )
        print(format_table(rows, list(rows[0])))
