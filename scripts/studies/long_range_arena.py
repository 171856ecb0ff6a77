"""Train a FABert from scratch on a generated task of Long Range Arena and score it beside the majority class.

accelerate launch scripts/studies/long_range_arena.py --task listops                 # small: minutes on a CPU core
accelerate launch scripts/studies/long_range_arena.py --task pathfinder32 --model softmax  # with softmax attention
accelerate launch scripts/studies/long_range_arena.py --task listops --setting official  # for a GPU
python scripts/studies/long_range_arena.py --task pathfinder32 --picture examples.png  # only draw examples

Models: "fa" is factorized attention alone, "fa-local" adds a window and a convolution, "softmax" is ordinary attention
in every layer; all have learnt absolute positions. The official setting has the sizes, batches, steps, learning rates
and models of the benchmark's configurations (ListOps: 0.05 · rsqrt(max(step, 1000)) with linear warm-up over 1,000
steps, which is transformers' "inverse_sqrt" with a peak of 0.05 / sqrt(1000)). Ours are the optimiser (AdamW, gradients
clipped to 1), dropout on ListOps, the learnt positions, and on Pathfinder-32 Q, K and V 128 wide instead of 64. The
small setting shows that everything runs and is far too short to rank models. Writes results.json, ends with one line
of JSON.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from accelerate.utils import set_seed
from PIL import Image

from fa_transformers import FABertConfig, FABertForSequenceClassification
from fa_transformers.data.sets import listops, pathfinder
from fa_transformers.files import write_json, written_by_rename
from fa_transformers.training.checkpointing import choose_resume, prepare_output_dir
from fa_transformers.training.from_scratch import ArrayExamples, parse_flags, score_classifier, train_classifier
from fa_transformers.training.processes import report_lost_processes
from fa_transformers.training.report import describe_hardware, describe_run
from fa_transformers.training.setup import make_accelerator, start_trackers

OFFICIAL = {
    "listops": dict(
        max_steps=5000, per_device_train_batch_size=32, learning_rate=0.05 / 1000**0.5, warmup_steps=1000,
        lr_scheduler_type="inverse_sqrt", eval_steps=500, save_steps=500,
    ),
    "pathfinder32": dict(
        num_train_epochs=200.0, per_device_train_batch_size=512, per_device_eval_batch_size=512, learning_rate=1e-3,
        lr_scheduler_type="cosine", warmup_steps=160_000 // 512, weight_decay=0.0,
    ),
}  # fmt: skip
SMALL = {
    "listops": OFFICIAL["listops"] | dict(
        max_steps=400, per_device_train_batch_size=16, learning_rate=2e-3, warmup_steps=80, eval_steps=200,
        save_steps=200,
    ),
    "pathfinder32": dict(
        max_steps=400, per_device_train_batch_size=16, learning_rate=1e-3, eval_steps=200, save_steps=200,
    ),
}  # fmt: skip
SETTINGS = {"small": SMALL, "official": OFFICIAL}
SIZES = {
    "small": {"train": 3000, "validation": 300, "test": 500},
    "listops": listops.OFFICIAL_SIZES,
    "pathfinder32": pathfinder.OFFICIAL_SIZES,
}
WIDTHS = {
    "small": dict(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=128),
    "listops": dict(num_hidden_layers=4, hidden_size=512, num_attention_heads=8, intermediate_size=1024),
    "pathfinder32": dict(
        num_hidden_layers=1, hidden_size=128, num_attention_heads=4, intermediate_size=128, hidden_dropout_prob=0.2,
        classifier_pooling="mean",
    ),
}  # fmt: skip
# Of pictures, a window of 33 tokens reaches a pixel's eight neighbours.
LOCAL = {
    "listops": dict(local_window=16, local_kernel_size=5),
    "pathfinder32": dict(local_window=33, local_kernel_size=5),
}
NUM_TOKENS = {"listops": len(listops.VOCABULARY), "pathfinder32": 1 + 256}
LONGEST = {"listops": 1 + listops.LONGEST, "pathfinder32": 1 + pathfinder.SIZE_PX**2}
NUM_LABELS = {"listops": listops.NUM_CLASSES, "pathfinder32": len(pathfinder.LABEL_NAMES)}
DIFFICULTY = {"small": "easy", "official": "hard"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--task", choices=list(OFFICIAL), default="listops", help="what to learn")
    add("--model", choices=("fa", "fa-local", "softmax"), default="fa", help="how tokens are mixed")
    add("--setting", choices=list(SETTINGS), default="small", help="small: minutes on a CPU; official: for a GPU")
    add("--sizes", type=int, nargs=3, metavar=("TRAIN", "VALIDATION", "TEST"), help="examples; unset = the setting's")
    add("--difficulty", choices=list(pathfinder.DIFFICULTIES), help="dashes of a snake; unset = easy when small, hard")
    add("--num_proc", type=int, default=1, help="processes that draw pictures, 20 ms each; kept for the next run")
    add("--picture", type=Path, help="only write a PNG with examples of pathfinder32 there")
    flags = sys.argv[1:] if argv is None else argv
    known, _ = parser.parse_known_args([flag for flag in flags if flag not in ("-h", "--help")])
    defaults = SETTINGS[known.setting][known.task] | {"output_dir": Path(f"outputs/{known.task}-{known.model}")}
    args = parse_flags(parser, "scripts/studies/long_range_arena.py", defaults, flags, ("short_epochs", "short_length"))
    args.difficulty = args.difficulty or DIFFICULTY[args.setting]
    args.scale = "small" if args.setting == "small" else args.task
    sizes = SIZES[args.scale]
    args.sizes = dict(zip(sizes, args.sizes, strict=True)) if args.sizes else sizes
    return args


def load_splits(args: argparse.Namespace) -> dict[str, tuple]:
    """Token ids, from 1 on, and labels of each split."""
    if args.task == "listops":
        return listops.load_listops(args.sizes, args.seed)
    splits = pathfinder.load_pathfinder(args.sizes, args.seed, difficulty=args.difficulty, num_proc=args.num_proc)
    return {split: (pixels.astype(np.int16) + 1, labels) for split, (pixels, labels) in splits.items()}


def build_model(args: argparse.Namespace) -> FABertForSequenceClassification:
    widths = WIDTHS[args.scale]
    mixing = {
        "fa": {},
        "fa-local": LOCAL[args.task],
        "softmax": {"softmax_layers": list(range(widths["num_hidden_layers"]))},
    }
    config = FABertConfig(
        vocab_size=NUM_TOKENS[args.task] + 1,  # the last is [CLS]
        max_position_embeddings=LONGEST[args.task],
        num_labels=NUM_LABELS[args.task],
        type_vocab_size=1,
        **{"classifier_pooling": "cls"} | widths,
        **mixing[args.model],
    )
    return FABertForSequenceClassification(config)


def draw_examples(path: Path, difficulty: str, seed: int) -> None:
    """Write a PNG of 4 rows of 8 pictures, enlarged: label 0 in the upper two rows, 1 in the lower ones."""
    rows: dict[int, list[np.ndarray]] = {0: [], 1: []}
    number = 0
    while min(len(part) for part in rows.values()) < 16:
        picture = pathfinder.draw_picture(np.random.default_rng([seed, number]), difficulty)
        rows[picture.label].append(np.pad(picture.pixels, 1, constant_values=90))
        number += 1
    tiles = np.stack(rows[0][:16] + rows[1][:16]).reshape(4, 8, 34, 34).swapaxes(1, 2).reshape(4 * 34, 8 * 34)
    with written_by_rename(path) as temporary:
        Image.fromarray(tiles).resize((8 * 34 * 4, 4 * 34 * 4), Image.Resampling.NEAREST).save(temporary, "PNG")


def main(args: argparse.Namespace) -> dict:
    if args.picture:
        draw_examples(args.picture, args.difficulty, args.seed)
        return {}
    accelerator = make_accelerator(args)
    args.resume_from_checkpoint = choose_resume(args.resume_from_checkpoint, args.output_dir)
    set_seed(args.seed)
    with accelerator.main_process_first():
        splits = load_splits(args)
        if accelerator.is_main_process:
            is_resumed = args.resume_from_checkpoint is not None
            prepare_output_dir(args.output_dir, overwrite=args.overwrite_output_dir, resume=is_resumed)
    start_trackers(accelerator, args.report_to, "long_range_arena", vars(args))
    first_token = NUM_TOKENS[args.task]
    examples = {split: ArrayExamples(*part, first_token) for split, part in splits.items()}
    model, state, loaders = train_classifier(args, build_model(args), examples, accelerator, args.output_dir)
    majority = np.bincount(splits["train"][1]).argmax()
    results = {
        "task": args.task,
        "model": args.model,
        "setting": args.setting,
        **({"difficulty": args.difficulty} if args.task == "pathfinder32" else {}),
        "test": score_classifier(model, loaders["test"], accelerator),
        "validation": score_classifier(model, loaders["validation"], accelerator),
        "majority_class": {name: float(np.mean(splits[name][1] == majority)) for name in ("test", "validation")},
        "sizes": args.sizes,
        **WIDTHS[args.scale],
        "parameters": accelerator.unwrap_model(model).num_parameters(),
        "learning_rate": args.learning_rate,
        "batch_size": args.per_device_train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps,
        **describe_run(state),
        "hardware": describe_hardware(accelerator.device),
        "seed": args.seed,
        "command": args.command,
    }
    accelerator.end_training()
    if accelerator.is_main_process:
        write_json(args.output_dir / "results.json", results)
        print(
            f"\n{args.task}, {args.model}, {args.setting} setting, {state.step} steps: "
            f"accuracy {results['test']['accuracy']:.3f}, majority class {results['majority_class']['test']:.3f}\n"
        )
        print(json.dumps(results))
    accelerator.wait_for_everyone()
    return results


if __name__ == "__main__":
    parsed = parse_args()
    with report_lost_processes(parsed.ddp_timeout):
        main(parsed)
