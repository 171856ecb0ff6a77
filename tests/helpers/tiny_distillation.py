"""Small texts and images to distil tiny models on, and the options of a run that takes seconds."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from tiny_models import build

from fa_transformers.distillation.distill import resolve_job
from fa_transformers.distillation.job import DistillationJob
from fa_transformers.options import CardOptions, DataOptions, DistillationOptions, LoopOptions, ModelOptions

WORDS = ["red", "blue", "green", "one", "two", "three", "alpha", "beta", "gamma", "delta"]
OPTIONS = {
    "data": DataOptions,
    "model": ModelOptions,
    "loop": LoopOptions,
    "distillation": DistillationOptions,
    "card": CardOptions,
}


LOCAL = {"local_window": 2, "local_kernel_size": 3, "key_feature_size": 32}


def make_pair(config_class, model_class, num_labels: int = 2, **fields):
    """A student, and the softmax model with the same weights, both in float64."""
    teacher = build(config_class, model_class, num_labels=num_labels, softmax_layers=[0, 1]).double()
    teacher.requires_grad_(False)
    student = build(config_class, model_class, num_labels=num_labels, **fields).double()
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected and all(".mixer." in name for name in missing)
    return student, teacher


def make_texts(num: int, words: int = 80) -> list[str]:
    random = torch.Generator().manual_seed(num)
    return [" ".join(WORDS[i] for i in torch.randint(10, (words,), generator=random).tolist()) for _ in range(num)]


def write_texts(path: Path, num: int, words: int = 80) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(num, words)), encoding="utf-8")
    return path


def paint(folder: Path, level: int, count: int) -> None:
    """Write images of one grey level, give or take ten."""
    folder.mkdir(parents=True)
    for index in range(count):
        PIL.Image.new("L", (16, 16), level + index % 10).save(folder / f"{index:03}.png")


def levels_of(pieces) -> set[int]:
    """The tens of the grey levels of images that `paint` wrote."""
    return {round(float(pieces[index]["pixel_values"].mean() * 255)) // 10 * 10 for index in range(len(pieces))}


def as_sentence_model(folder: Path, **modes: bool | str | list[str]) -> Path:
    """Put the pooling of a sentence-transformers model beside a checkpoint."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    rows = [
        {"idx": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **modes}))
    return folder


def grouped(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of options by name as the five arguments of `distill`; every name must be a field of one of them."""
    known = {name: {part.name for part in fields(options_class)} for name, options_class in OPTIONS.items()}
    assert set(values) <= set().union(*known.values())
    return {
        name: options_class(**{key: value for key, value in values.items() if key in known[name]})
        for name, options_class in OPTIONS.items()
    }


def job_of(task: str = "text", **values: Any) -> DistillationJob:
    """A job with these options, the others as in the quick recipe."""
    return resolve_job(task, "quick", grouped(values))


def run_values(tmp_path: Path, stock: Path, output: str = "out", **changes: Any) -> dict[str, Any]:
    """Values of options for a run of two stages of six steps on written texts."""
    values = dict(
        model_name_or_path=str(stock),
        train_file=write_texts(tmp_path / "texts.jsonl", 60),
        validation_file=write_texts(tmp_path / "heldout.jsonl", 12),
        max_length=64,
        transfer_steps=6,
        end_to_end_steps=6,
        max_tokens_per_batch=256,
        local_window=2,
        local_kernel_size=3,
        key_feature_size=32,
        mixed_precision="no",
        report_to="none",
        use_cpu=True,
        num_threads=1,
        logging_steps=1,
        output_dir=tmp_path / output,
    )
    return values | changes


def run_options(tmp_path: Path, stock: Path, output: str = "out", **changes: Any) -> dict[str, Any]:
    """The arguments of `distill` for `run_values`."""
    return grouped(run_values(tmp_path, stock, output, **changes))


def run_flags(tmp_path: Path, stock: Path, output: str = "out", **changes: Any) -> list[str]:
    """The command line for `run_values`."""
    words = []
    for name, value in run_values(tmp_path, stock, output, **changes).items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words
