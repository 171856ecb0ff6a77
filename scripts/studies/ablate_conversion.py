"""Which parts of a layer restore a converted model: one row per variant, the same steps and batches for each.

python scripts/studies/ablate_conversion.py --output_dir outputs/ablation                      # MiniLM on prose
python scripts/studies/ablate_conversion.py --task images --model_name_or_path dinov2/ --image_folder photos/

All variants learn side by side: the teacher runs once per step, and every variant's mixers learn from it
(`AttentionTransfer`). Then the layers are stacked, and embeddings compared with the teacher's on held-out data.
"""

import argparse
import contextlib
import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, get_scheduler

from fa_transformers.conversion.convert import load_factorized
from fa_transformers.conversion.packaged import resolve_checkpoint
from fa_transformers.data.batching import LengthGroupedBatchSampler, make_loader
from fa_transformers.data.examples import count_patches
from fa_transformers.distillation.objectives import (
    AttentionTransfer,
    embed_batches,
    evaluate_objective,
    load_teacher,
    similarity,
)
from fa_transformers.distillation.pieces import build_image_pieces, build_text_pieces
from fa_transformers.files import write_json, write_text
from fa_transformers.hub.timing import measure_forward
from fa_transformers.tables import format_table
from fa_transformers.training import arguments
from fa_transformers.training.report import describe_hardware
from fa_transformers.training.setup import choose_mixed_precision

# Fields of each variant; D is the head width, LAST the index of the last layer. The first row has nothing but the
# operator and its temperatures, "pure" the learned maps too.
VARIANTS = {
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
SIZES = {
    "text": {"local_kernel_size": {"small": 5, "large": 15}, "local_window": {"small": 32, "large": 64}},
    "images": {"local_kernel_size": {"small": 3, "large": 5}, "local_window": {"small": 1, "large": 3}},
}
# Flags of finetune.py without a use here: no label is read, and there is no model card.
LEAVE_OUT = (
    "test_file", "streaming", "label_column_name", "label_separator", "problem_type", "preprocessing_num_workers",
    "overwrite_cache", "data_license", "data_attribution",
)  # fmt: skip
LENGTHS_TIMED = {"text": (512, 8192), "images": (224, 896)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--task", choices=list(SIZES), default="text", help="what the model reads")
    add("--model_name_or_path", default="minilm", help="stock checkpoint, which is the teacher")
    add("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS), help="rows of the table")
    add("--steps", type=int, default=300, help="optimiser steps of every variant")
    add("--learning_rate", type=float, default=1e-2, help="peak rate, falling linearly to 0")
    add("--max_tokens_per_batch", type=int, default=1024, help="tokens or patches per step")
    add("--max_length", type=int, default=256, help="longest piece of text, in tokens")
    add("--image_size", type=int, default=224, help="side of an image in pixels, a multiple of the patch")
    add("--mixed_precision", choices=("no", "bf16", "auto"), default="auto", help="autocast type")
    add("--num_threads", type=int, default=0, help="CPU threads; 0 = torch's default")
    add("--seed", type=int, default=0, help="of fresh weights and of the order of the data")
    add("--output_dir", type=Path, default=Path("outputs/ablation"), help="folder for ablation.json and ablation.txt")
    arguments.add_data_arguments(parser, leave_out=LEAVE_OUT)
    parser.set_defaults(max_eval_samples=64, per_device_eval_batch_size=32)
    args = parser.parse_args(argv)
    try:
        arguments.check_sources(args, is_text=args.task == "text")
    except ValueError as error:
        parser.error(str(error))
    return args


def fields_of(variant: str, task: str, config) -> dict:
    """The config fields of a variant, for a model of these sizes."""
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


def train(args, students: dict[str, AttentionTransfer], teacher, loader, accelerator: Accelerator) -> None:
    """All variants through the same batches."""
    groups = [[p for p in student.parameters() if p.requires_grad] for student in students.values()]
    optimizer = torch.optim.AdamW([p for group in groups for p in group], lr=args.learning_rate, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, args.steps // 20, args.steps)
    batches = iter(loader)
    for _ in tqdm(range(args.steps), desc="train", unit="step"):
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches)
        with accelerator.autocast(), contextlib.ExitStack() as stack:
            lists = [stack.enter_context(s.watching(batch.get("attention_mask"))) for s in students.values()]
            with torch.no_grad():
                teacher(**batch)
            loss = sum(torch.stack(errors).nanmean() for errors in lists)
        loss.backward()
        for group in groups:  # each by itself, as if it were alone
            torch.nn.utils.clip_grad_norm_(group, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def measure(args, model, teacher, loaders, expected, accelerator) -> dict:
    """What a trained variant's row says."""
    objective = AttentionTransfer(model, teacher)
    pooling = "mean" if args.task == "text" else "cls"
    kind = next(iter(loaders))
    errors = evaluate_objective(objective, loaders[kind], accelerator)["layer_errors"]
    row: dict = {f"error {index}": error for index, error in enumerate(errors)}
    for kind, loader in loaders.items():
        figures = similarity(embed_batches(model, loader, accelerator, pooling), expected[kind])
        row |= {f"cosine, {kind}": figures["cosine"], f"correlation, {kind}": figures["correlation"]}
    mixed = sum(p.numel() for name, p in model.named_parameters() if ".mixer." in name)
    return row | {"new parameters": mixed}


def time_forward(args, model) -> dict[int, float]:
    milliseconds = {}
    for length in LENGTHS_TIMED[args.task]:
        if args.task == "text":
            inputs = {"input_ids": torch.zeros(1, length, dtype=torch.long, device=model.device)}
        else:
            inputs = {"pixel_values": torch.zeros(1, model.config.num_channels, length, length, device=model.device)}
        milliseconds[length] = round(measure_forward(model.eval(), inputs)[0], 1)
    return milliseconds


def main(args: argparse.Namespace) -> dict:
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=choose_mixed_precision(args.mixed_precision, on_cpu))
    set_seed(args.seed)
    source = resolve_checkpoint(args.model_name_or_path)
    plain = load_factorized(source, "AutoModel", position_embedding_type="absolute")
    teacher = load_teacher(source, "AutoModel", plain).to(accelerator.device)
    if args.task == "text":
        data = build_text_pieces(args, AutoTokenizer.from_pretrained(source))
    else:
        size = {"height": args.image_size, "width": args.image_size}
        processor = AutoImageProcessor.from_pretrained(source, size=size, do_center_crop=False)
        data = build_image_pieces(args, processor, count_patches(args.image_size, plain.config))
    pieces = data.train(args.max_length)
    sampler = LengthGroupedBatchSampler(pieces.lengths, 1024, max_tokens=args.max_tokens_per_batch, seed=args.seed)
    loader = accelerator.prepare(make_loader(pieces, sampler, data.collate, num_workers=0))
    loaders = data.heldout_loaders(args, accelerator)
    pooling = "mean" if args.task == "text" else "cls"
    expected = {kind: embed_batches(teacher, part, accelerator, pooling) for kind, part in loaders.items()}
    students, speed = {}, {}
    for variant in args.variants:
        set_seed(args.seed)
        fields = fields_of(variant, args.task, plain.config)
        if args.task == "text":  # so that long texts can be timed
            fields["position_embedding_type"] = "periodic"
        student = load_factorized(source, "AutoModel", **fields).to(accelerator.device)
        students[variant] = AttentionTransfer(student, teacher)
        speed[variant] = time_forward(args, student)
    started = time.perf_counter()
    train(args, students, teacher, loader, accelerator)
    seconds = round(time.perf_counter() - started, 1)
    rows = [
        {"variant": variant}
        | measure(args, student.student, teacher, loaders, expected, accelerator)
        | {f"ms at {size}": milliseconds for size, milliseconds in speed[variant].items()}
        for variant, student in tqdm(students.items(), desc="measure")
    ]
    result = {
        "model": args.model_name_or_path, "steps": args.steps, "tokens_per_step": args.max_tokens_per_batch,
        "train_seconds": seconds, "seed": args.seed, "hardware": describe_hardware(accelerator.device), "rows": rows,
    }  # fmt: skip
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "ablation.json", result)
    table = format_table(rows, list(rows[0]))
    write_text(args.output_dir / "ablation.txt", table + "\n")
    print(table)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
