"""Ablation of the parts that restore a converted model: variants of a student learn side by side from one teacher.

The teacher runs once per step, and every variant's mixers learn from it (`AttentionTransfer`). Then the layers are
stacked, and embeddings compared with the teacher's on held-out data.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoImageProcessor, PretrainedConfig, PreTrainedModel

from ..checks import check_loop, check_positive, check_sources
from ..conversion.convert import load_factorized
from ..conversion.source import CheckpointSource, read_source
from ..conversion.teacher import load_teacher
from ..data.batching import LengthGroupedBatchSampler, make_loader
from ..data.examples import count_patches
from ..data.tokenizing import load_tokenizer
from ..distillation.embeddings import embed_batches, similarity
from ..distillation.pieces import UnlabelledData, build_image_pieces, build_text_pieces
from ..distillation.unlabelled import read_images, read_text
from ..hub.timing import describe_hardware, measure_forward
from ..options import CardOptions, DataOptions, LoopOptions, ModelOptions, OptionGroup, option
from ..training.attention_transfer import AttentionTransfer, evaluate_objective
from ..training.optimizer import build_optimizer
from ..training.setup import make_accelerator

# The first variant has nothing but the operator and its temperatures, "pure" the learned maps too.
VARIANTS: dict[str, dict[str, Any]] = {
    "operator, temperatures": dict(learned_temperatures=True),
    "pure: maps D": dict(key_feature_size="D"),
    "pure: maps 2D": dict(key_feature_size="2D"),
    "pure: maps 2D, sign pairs": dict(key_feature_size="2D", key_features="sign_pairs"),
    "pure: maps 4D": dict(key_feature_size="4D"),
    "convolution small": dict(local_kernel_size="small"),
    "convolution large": dict(local_kernel_size="large"),
    "window small": dict(local_window="small"),
    "window large": dict(local_window="large"),
    "maps 2D, convolution": dict(key_feature_size="2D", local_kernel_size="large"),
    "maps 2D, window large": dict(key_feature_size="2D", local_window="large"),
    "maps 2D, convolution, window small": dict(key_feature_size="2D", local_kernel_size="large", local_window="small"),
    "maps 2D, convolution, window large": dict(key_feature_size="2D", local_kernel_size="large", local_window="large"),
    "maps 2D, convolution, window large, temperatures": dict(
        key_feature_size="2D", local_kernel_size="large", local_window="large", learned_temperatures=True
    ),
    "maps 4D, convolution, window large": dict(key_feature_size="4D", local_kernel_size="large", local_window="large"),
    "maps 2D, convolution, window large, softmax in the last layer": dict(
        key_feature_size="2D", local_kernel_size="large", local_window="large", softmax_layers="LAST"
    ),
}
"""Name -> config fields; D is the head width, LAST the index of the last layer, small and large stand in `SIZES`."""

SIZES = {
    "text": {"local_kernel_size": {"small": 5, "large": 15}, "local_window": {"small": 32, "large": 64}},
    "images": {"local_kernel_size": {"small": 3, "large": 5}, "local_window": {"small": 1, "large": 3}},
}
LENGTHS_TIMED = {"text": (512, 8192), "images": (224, 896)}
"""Tokens, or pixels a side, of the inputs that a forward pass is timed on."""

POOLING = {"text": "mean", "images": "cls"}
RECIPE: dict[str, Any] = dict(
    model_name_or_path="minilm", max_length=256, image_size=224, max_eval_samples=64, learning_rate=1e-2,
    max_tokens_per_batch=1024, per_device_eval_batch_size=32, mixed_precision="auto", num_threads=0, seed=0,
    lr_scheduler_type="linear", warmup_ratio=0.05, warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, max_steps=-1,
    gradient_accumulation_steps=1, report_to="none",
)  # fmt: skip
"""Values of unset options."""


@dataclass(frozen=True)
class AblationOptions(OptionGroup):
    """The variants to compare, and how long they learn."""

    task: Literal["text", "images"] = option(
        "text", "kind of input that the model reads", group="ablation", common=True
    )
    variants: tuple[str, ...] = option(
        tuple(VARIANTS), "rows of the table, by name, quoted", group="ablation", common=True
    )
    steps: int = option(300, "optimiser steps of every variant", group="ablation", common=True)


@dataclass(frozen=True)
class AblationJob:
    """An ablation as it was asked for, every option resolved."""

    ablation: AblationOptions
    data: DataOptions
    model: ModelOptions
    loop: LoopOptions
    card: CardOptions

    @property
    def is_text(self) -> bool:
        return self.ablation.task == "text"

    def check(self) -> None:
        """Raise ValueError, naming the flag, for what no run can use."""
        unknown = [name for name in self.ablation.variants if name not in VARIANTS]
        if unknown or not self.ablation.variants:
            wrong = f"{unknown[0]!r} is unknown" if unknown else "names none"
            raise ValueError(f"--variants {wrong}; choose from {', '.join(map(repr, VARIANTS))}.")
        check_positive(self.ablation, "steps")
        check_positive(self.model, "max_length", "image_size")
        check_loop(self.loop)
        if self.loop.mixed_precision == "fp16":
            raise ValueError(
                "--mixed_precision fp16 needs scaled losses, which variants side by side have not; use bf16."
            )
        check_sources(self.data, is_text=self.is_text)


def fields_of(variant: str, task: str, config: PretrainedConfig) -> dict[str, Any]:
    """Return the config fields of a variant, for a model with the sizes of `config`."""
    head_size = config.hidden_size // config.num_attention_heads
    named = {"D": head_size, "2D": 2 * head_size, "4D": 4 * head_size, "LAST": [config.num_hidden_layers - 1]}
    return {
        name: SIZES[task][name][value]
        if name in SIZES[task]
        else named.get(value, value)
        if isinstance(value, str)
        else value
        for name, value in VARIANTS[variant].items()
    }


def read_pieces(job: AblationJob, source: CheckpointSource, config: PretrainedConfig) -> UnlabelledData:
    """Read the texts or images to learn from, as pieces that the teacher reads."""
    seed = job.loop.seed
    if job.is_text:
        tokenizer = load_tokenizer(source.model_folder, config)
        rows = read_text(job.data, job.card, seed)
        limit = job.data.max_eval_samples
        return build_text_pieces(rows, tokenizer, job.model.max_length, max_eval_samples=limit, seed=seed)
    side = job.model.image_size
    assert side is not None  # the recipe has one
    size = {"height": side, "width": side}
    processor = AutoImageProcessor.from_pretrained(source.model_folder, size=size, do_center_crop=False)
    rows = read_images(job.data, job.card, seed)
    return build_image_pieces(rows, processor, count_patches(side, config), job.data, seed)


def train_variants(
    students: Sequence[AttentionTransfer],
    teacher: PreTrainedModel,
    loader: DataLoader,
    accelerator: Accelerator,
    loop: LoopOptions,
    steps: int,
) -> None:
    """Train all variants on the same batches; their losses are added, so that none changes another's gradients."""
    groups = [[p for p in student.parameters() if p.requires_grad] for student in students]
    together = {"params": [p for group in groups for p in group], "lr": loop.learning_rate}
    optimizer, schedule = build_optimizer([together | {"weight_decay": loop.weight_decay}], loop, steps)
    batches = iter(loader)
    for _ in tqdm(range(steps), desc="train", unit="step"):
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches)
        with accelerator.autocast(), contextlib.ExitStack() as stack:
            lists = [stack.enter_context(s.watching(batch.get("attention_mask"))) for s in students]
            with torch.no_grad():
                teacher(**batch)
            loss = torch.stack([torch.stack(errors).nanmean() for errors in lists]).sum()
        loss.backward()
        for group in groups:  # each by itself, as if it were alone
            torch.nn.utils.clip_grad_norm_(group, loop.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def measure_variant(
    student: AttentionTransfer,
    loaders: dict[str, DataLoader],
    expected: dict[str, Tensor],
    pooling: str,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Return what a trained variant's row says: errors of the layers, likeness of the embeddings, new parameters.

    `loaders` have held-out data by kind, the first of which gives the errors; `expected` the teacher's embeddings.
    """
    errors = evaluate_objective(student, next(iter(loaders.values())), accelerator)["layer_errors"]
    row: dict[str, Any] = {f"error {index}": error for index, error in enumerate(errors)}
    for kind, loader in loaders.items():
        figures = similarity(embed_batches(student.student, loader, accelerator, pooling), expected[kind])
        row |= {f"cosine, {kind}": figures["cosine"], f"correlation, {kind}": figures["correlation"]}
    mixed = sum(p.numel() for name, p in student.student.named_parameters() if ".mixer." in name)
    return row | {"new parameters": mixed}


def time_forward(model: PreTrainedModel, task: str) -> dict[str, float]:
    """Return the milliseconds of a forward pass at each of `LENGTHS_TIMED`, by the name of their column."""
    milliseconds = {}
    for length in LENGTHS_TIMED[task]:
        if task == "text":
            inputs = {"input_ids": torch.zeros(1, length, dtype=torch.long, device=model.device)}
        else:
            inputs = {"pixel_values": torch.zeros(1, model.config.num_channels, length, length, device=model.device)}
        milliseconds[f"ms at {length}"] = round(measure_forward(model.eval(), inputs)[0], 1)
    return milliseconds


def run_ablation(job: AblationJob) -> dict[str, Any]:
    """Train all variants and return the model, the settings, the hardware and a row of figures for each variant."""
    task, loop = job.ablation.task, job.loop
    accelerator = make_accelerator(loop)
    set_seed(loop.seed)
    source = read_source(job.model.model_name_or_path)
    plain = load_factorized(source, "AutoModel", position_embedding_type="absolute")
    teacher = load_teacher(source, "AutoModel", plain).to(accelerator.device)
    data = read_pieces(job, source, plain.config)
    pieces = data.train(job.model.max_length)
    sampler = LengthGroupedBatchSampler(pieces.lengths, 1024, max_tokens=loop.max_tokens_per_batch, seed=loop.seed)
    loader = accelerator.prepare(make_loader(pieces, sampler, data.collate, num_workers=0))
    loaders = data.heldout_loaders(loop, accelerator)
    pooling = POOLING[task]
    expected = {kind: embed_batches(teacher, part, accelerator, pooling) for kind, part in loaders.items()}
    students, speed = {}, {}
    for variant in job.ablation.variants:
        set_seed(loop.seed)
        fields = fields_of(variant, task, plain.config)
        if job.is_text:  # so that long texts can be timed
            fields["position_embedding_type"] = "periodic"
        student = load_factorized(source, "AutoModel", **fields).to(accelerator.device)
        students[variant] = AttentionTransfer(student, teacher)
        speed[variant] = time_forward(student, task)
    started = time.perf_counter()
    train_variants(list(students.values()), teacher, loader, accelerator, loop, job.ablation.steps)
    seconds = round(time.perf_counter() - started, 1)
    rows = [
        {"variant": variant} | measure_variant(student, loaders, expected, pooling, accelerator) | speed[variant]
        for variant, student in tqdm(students.items(), desc="measure")
    ]
    return {
        "model": job.model.model_name_or_path, "steps": job.ablation.steps,
        "tokens_per_step": loop.max_tokens_per_batch, "train_seconds": seconds, "seed": loop.seed,
        "hardware": describe_hardware(accelerator.device), "rows": rows,
    }  # fmt: skip
