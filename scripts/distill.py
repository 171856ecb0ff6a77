"""Recover the quality of a converted model: it learns from the softmax model that its weights came from.

accelerate launch scripts/distill.py --recipe quick                  # FA-MiniLM, 15 minutes of two CPU cores
accelerate launch scripts/distill.py --recipe full                   # FA-MiniLM, an hour of two CPU cores
accelerate launch scripts/distill.py --model_name_or_path converted/ --teacher_name_or_path bert/ --train_file my.jsonl
accelerate launch scripts/distill.py --task images --image_folder photos/     # FA-DINOv2-S
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    get_scheduler,
)

from fa_transformers.conversion.convert import convert_checkpoint
from fa_transformers.conversion.packaged import HUB_IDS, HUB_LICENSE, resolve_checkpoint
from fa_transformers.conversion.source import locate_checkpoint, locate_encoder, read_pooling
from fa_transformers.conversion.stock_checkpoints import find_auto_class, find_family
from fa_transformers.data.examples import count_patches
from fa_transformers.distillation import receipt as recovery
from fa_transformers.distillation.objectives import (
    AttentionTransfer,
    EndToEndDistillation,
    embed_batches,
    evaluate_objective,
    fresh_head,
    group_student_parameters,
    load_teacher,
    similarity,
)
from fa_transformers.distillation.pieces import build_image_pieces, build_text_pieces
from fa_transformers.distillation.probing import embed_pieces, load_labelled_images, load_labelled_text, probe
from fa_transformers.models.configuration_fa import FactorizedConfig
from fa_transformers.training import arguments
from fa_transformers.training.checkpointing import (
    CheckpointError,
    choose_resume,
    list_checkpoints,
    prepare_output_dir,
    step_of,
)
from fa_transformers.training.loop import plan_steps, run_training
from fa_transformers.training.processes import report_lost_processes
from fa_transformers.training.report import describe_run
from fa_transformers.training.setup import build_loaders, make_accelerator, start_trackers

# Every default that is a matter of tuning stands here. A later table wins over an earlier one, a flag over all.
COMMON = dict(
    per_device_train_batch_size=64, per_device_eval_batch_size=32, gradient_accumulation_steps=1, num_train_epochs=1.0,
    max_steps=-1, weight_decay=0.01, max_grad_norm=1.0, lr_scheduler_type="linear", warmup_ratio=0.05, warmup_steps=0,
    seed=0, short_epochs=0, short_length=512, eval_steps=0, save_steps=500, save_total_limit=1,
    early_stopping_patience=0, load_best_model_at_end=False, group_by_length=True, num_threads=0,
    report_to="tensorboard", logging_steps=10, output_dir=Path("outputs/distilled"), license="unknown",
    mixed_precision="auto", freeze_layers=0, max_eval_samples=200, transfer_learning_rate=1e-2, learning_rate=5e-5,
    mixer_learning_rate=5e-4, long_length=0, long_steps=0, freeze_embeddings=True,
)  # fmt: skip
TASKS = {
    "text": dict(
        model_name_or_path="minilm", max_length=512, max_tokens_per_batch=2048,
    ),
    "images": dict(
        model_name_or_path="dinov2-small", image_size=224, max_tokens_per_batch=2048,
        # At the rates of text the loss rose from 0.18 to 0.32.
        learning_rate=1e-5, mixer_learning_rate=1e-4,
    ),
}  # fmt: skip
# Flags of finetune.py that distillation has no use for: its text is cut into pieces without labels, each of its stages
# has steps of its own, and a teacher's softmax attention isn't shared by processes.
LEAVE_OUT = (
    "test_file", "streaming", "label_separator", "problem_type", "preprocessing_num_workers", "overwrite_cache",
    "strict_length", "freeze_layers", "gradient_checkpointing", "packing", "sequence_parallel_size", "short_epochs",
    "short_length", "max_steps", "num_train_epochs", "head_learning_rate", "metric_for_best_model", "push_to_hub",
    "hub_token", "hub_private",
)  # fmt: skip
HELPS = {
    "train_file": "txt, csv, tsv, json, jsonl or parquet file with a text column; labels aren't read",
    "validation_file": "the same, to compare student and teacher on; unset = 2 %% of the train rows",
    "image_folder": "folder of images, or of train and validation folders; labels aren't read",
    "label_column_name": "column of --probe_file with the labels",
    "model_name_or_path": "converted checkpoint, or a stock one, which is converted on the way",
    "image_size": "side that images are resized to, in pixels",
    "max_length": "tokens of a piece of text to train on; longer documents are cut into several",
}
# Of students made here from a stock checkpoint, beside maps of twice the head width; a converted one has its own.
FIELDS = {
    "text": dict(position_embedding_type="periodic", local_kernel_size=15, local_window=64),
    "images": dict(local_kernel_size=5),
}
STAGES = ("transfer", "end_to_end", "long")
# The first reads several texts as one, the second draws pictures, which the teacher drew of hidden patches.
ENCODER_ALONE = ("AutoModelForMultipleChoice", "AutoModelForMaskedImageModeling")
RECIPES = {
    "quick": dict(transfer_steps=400, end_to_end_steps=530),
    "full": dict(transfer_steps=1000, end_to_end_steps=2500),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--task", choices=list(TASKS), default="text", help="what the model reads")
    parser.add_argument("--recipe", choices=list(RECIPES), default="quick", help="how long to train")
    parser.add_argument("--use_cpu", action="store_true", help="train on the CPU even if there is a GPU")
    arguments.add_data_arguments(parser, leave_out=LEAVE_OUT, helps=HELPS)
    arguments.add_model_arguments(parser, leave_out=LEAVE_OUT, helps=HELPS)
    arguments.add_training_arguments(parser, leave_out=LEAVE_OUT)
    arguments.add_distillation_arguments(parser)
    flags = sys.argv[1:] if argv is None else argv
    known, _ = parser.parse_known_args([flag for flag in flags if flag not in ("-h", "--help")])
    defaults = COMMON | TASKS[known.task] | RECIPES[known.recipe]
    teacher = known.teacher_name_or_path or known.model_name_or_path or defaults["model_name_or_path"]
    if teacher in HUB_IDS:
        defaults |= {"license": HUB_LICENSE}
    parser.set_defaults(**defaults)
    args = parser.parse_args(flags)
    args.command = arguments.command_line("scripts/distill.py", flags)
    args.resume_command = args.command.replace(" --overwrite_output_dir", "") + " --resume_from_checkpoint last"
    return args


def as_options(fields: dict) -> dict:
    """Config fields as `convert_checkpoint` takes them."""
    kind = fields.get("position_embedding_type")
    rest = {name: value for name, value in fields.items() if name != "position_embedding_type"}
    return rest | ({"positions": kind} if kind in ("periodic", "none") else {})


def double_maps(config: PretrainedConfig) -> dict:
    """Learned maps of twice the head width; ValueError for a type of checkpoint that can't be converted."""
    find_family(config.model_type)
    return {"key_feature_size": 2 * config.hidden_size // config.num_attention_heads}


def build_student(args: argparse.Namespace, source: str):
    """The model to train, the Auto class of its head, and its tokenizer or image processor.

    A stock checkpoint is converted on the way.
    """
    folder = locate_encoder(source)
    config = AutoConfig.from_pretrained(folder)
    overrides = arguments.model_overrides(args)
    if not isinstance(config, FactorizedConfig):
        overrides = FIELDS[args.task] | double_maps(config) | overrides
    elif other := [name for name, value in overrides.items() if getattr(config, name) != value]:
        raise ValueError(
            f"--{other[0]} {overrides[other[0]]}: {source} was converted with {getattr(config, other[0])!r}. "
            "Leave the flag out, or convert the stock checkpoint again."
        )
    auto_class = find_auto_class((config.architectures or ["Model"])[0]) or "AutoModel"
    conversion = convert_checkpoint(source, auto_class=auto_class, **as_options(overrides))
    if fresh_head(conversion) or auto_class in ENCODER_ALONE:
        print(f"{source} has a head that is not distilled: its encoder alone is.")
        auto_class = "AutoModel"
        conversion = convert_checkpoint(source, auto_class=auto_class, **as_options(overrides))
    student = conversion.model.float()  # half precision would round an optimizer's small steps away
    if args.task == "text":
        return student, auto_class, conversion.processor or AutoTokenizer.from_pretrained(folder)
    size = {"height": args.image_size, "width": args.image_size}
    return student, auto_class, AutoImageProcessor.from_pretrained(folder, size=size, do_center_crop=False)


def run_stage(args, name: str, module: torch.nn.Module, pieces: dict, collate, accelerator: Accelerator, **changes):
    """Train one objective to its end, or go on with it; returns what the receipt says of it."""
    folder = args.output_dir / name
    folder.mkdir(exist_ok=True)
    steps_before = sum(getattr(args, f"{earlier}_steps") for earlier in STAGES[: STAGES.index(name)])
    resume = "last" if args.resume_from_checkpoint and list_checkpoints(folder) else None
    args = argparse.Namespace(**vars(args) | changes | {"resume_from_checkpoint": resume})
    loaders, sampler = build_loaders(args, pieces, collate, accelerator)
    accelerator.print(f"{name}: {len(pieces['train'])} pieces, {args.max_steps} steps")

    def evaluate(trained: torch.nn.Module) -> dict:
        return evaluate_objective(trained, loaders["validation"], accelerator)

    def log(values: dict, step: int) -> None:
        accelerator.log({f"{name}/{value}": number for value, number in values.items()}, step=steps_before + step)

    before = evaluate(module.to(accelerator.device))
    groups = group_student_parameters(module, args.learning_rate, args.mixer_learning_rate, args.weight_decay)
    optimizer = torch.optim.AdamW(groups)
    steps = plan_steps(args, sampler, folder)
    num_warmup_steps = args.warmup_steps or int(args.warmup_ratio * steps)
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, num_warmup_steps, steps)
    trained, state, figures = run_training(
        args, module, optimizer, schedule, loaders["train"], sampler, accelerator,
        evaluate=evaluate, best_metric="loss", max_steps=steps, output_dir=folder, log=log,
    )  # fmt: skip
    after = evaluate(trained)  # the best weights, which needn't be the last ones
    accelerator.free_memory()
    rates = {"learning_rate": args.learning_rate, "mixer_learning_rate": args.mixer_learning_rate}
    return {"stage": name, **describe_run(state), **figures, **rates, "before": before, "after": after}


def distill(args, student: PreTrainedModel, teacher: PreTrainedModel, data, accelerator: Accelerator) -> list[dict]:
    """All stages that have steps, in order."""
    stages = []
    pieces = {"train": data.train(args.max_length), "validation": data.validation}
    if args.transfer_steps:
        changes = {"max_steps": args.transfer_steps, "mixer_learning_rate": args.transfer_learning_rate}
        module = AttentionTransfer(student, teacher)
        stages.append(run_stage(args, "transfer", module, pieces, data.collate, accelerator, **changes))
    student.requires_grad_(True)
    if args.freeze_embeddings:
        student.get_input_embeddings().requires_grad_(False)
    if args.end_to_end_steps:
        module = EndToEndDistillation(student, teacher, args.pooling)
        changes = {"max_steps": args.end_to_end_steps}
        stages.append(run_stage(args, "end_to_end", module, pieces, data.collate, accelerator, **changes))
    if args.long_steps:
        pieces = {"train": data.train(args.long_length), "validation": pieces["validation"]}
        module = EndToEndDistillation(student, teacher, args.pooling, teacher_length=args.max_length)
        changes = {
            "max_steps": args.long_steps,
            "max_tokens_per_batch": args.max_tokens_per_batch and max(args.max_tokens_per_batch, args.long_length),
        }
        stages.append(run_stage(args, "long", module, pieces, data.collate, accelerator, **changes))
    return stages


def check_resumed(args: argparse.Namespace) -> None:
    """Raise an error for a run that can't be gone on with as the flags say.

    Raises:
        CheckpointError: "last" was asked for, and no stage has a checkpoint.
        ValueError: a stage has had other steps than it is to have, and later ones have begun from its end.
    """
    found = {name: list_checkpoints(args.output_dir / name) for name in STAGES}
    if args.resume_from_checkpoint == "last" and not any(found.values()):
        raise CheckpointError(f"--resume_from_checkpoint last: no stage in {args.output_dir} has a checkpoint.")
    if args.resume_from_checkpoint is None or args.early_stopping_patience:
        return
    for position, name in enumerate(STAGES):
        planned = getattr(args, f"{name}_steps")
        has_later = any(found[later] for later in STAGES[position + 1 :])
        damaged = (args.output_dir / name).glob("damaged-checkpoint-*")  # set aside, it tells how far the stage went
        done = max(map(step_of, [*found[name], *damaged]), default=planned)
        if has_later and done != planned:
            raise ValueError(
                f"--{name}_steps {planned}: the run in {args.output_dir} went on to its next stage after {done}. Give "
                "the same number, or another --output_dir."
            )


def choose_pooling(args: argparse.Namespace, teacher_source: str) -> str:
    """What the embedding is: as the teacher's sentence-transformers folder says, else --pooling, else the task's usual.

    Raises:
        ValueError: --pooling contradicts the folder, or can't teach long texts.
    """
    stated = read_pooling(locate_checkpoint(teacher_source))
    if stated and args.pooling and stated != args.pooling:
        raise ValueError(
            f"--pooling {args.pooling}: {teacher_source} makes its embeddings by {stated!r}; leave it out."
        )
    pooling = stated or args.pooling or {"text": "mean", "images": "cls"}[args.task]
    if args.long_length and pooling == "cls":
        raise ValueError(
            "--long_length needs mean pooling: the first token of a long text stands in the first window alone, which "
            "is all that the teacher could say of it."
        )
    return pooling


def main(args: argparse.Namespace) -> dict:
    recovery.check_arguments(args)
    teacher_source = resolve_checkpoint(args.teacher_name_or_path or args.model_name_or_path)
    args.pooling = choose_pooling(args, teacher_source)
    accelerator = make_accelerator(args)
    args.resume_from_checkpoint = choose_resume(args.resume_from_checkpoint, args.output_dir)
    check_resumed(args)
    set_seed(args.seed)
    source = resolve_checkpoint(args.model_name_or_path)
    student, auto_class, processor = build_student(args, source)
    teacher = load_teacher(teacher_source, auto_class, student)
    if args.task == "text" and teacher.config.position_embedding_type == "absolute":
        longest = teacher.config.max_position_embeddings
        if args.max_length > longest:
            raise ValueError(
                f"--max_length {args.max_length} is above the teacher's {longest} positions. The student learns longer "
                "documents by --long_steps and --long_length, for which the teacher reads windows."
            )
    if args.long_length and student.config.position_embedding_type == "absolute":
        longest = student.config.max_position_embeddings
        if args.long_length > longest:
            raise ValueError(
                f"--long_length {args.long_length} is above the student's {longest} positions: convert it with more, "
                "or with --position_embedding_type periodic."
            )
    with accelerator.main_process_first():
        labelled = None  # what the downstream scores of the receipt are measured on
        if args.task == "text":
            data = build_text_pieces(args, processor, args.long_length or None)
            labelled = load_labelled_text(args, processor)
        else:
            num_patches = count_patches(args.image_size, student.config)
            data = build_image_pieces(args, processor, num_patches)
            if args.probe_folder:
                labelled = load_labelled_images(args.probe_folder, processor, num_patches)
        if accelerator.is_main_process:
            is_resumed = args.resume_from_checkpoint is not None
            prepare_output_dir(args.output_dir, overwrite=args.overwrite_output_dir, resume=is_resumed)
    accelerator.wait_for_everyone()
    start_trackers(accelerator, args.report_to, "distill", vars(args))
    teacher.to(accelerator.device)
    student.to(accelerator.device)
    loaders = data.heldout_loaders(args, accelerator)
    window = args.max_length if args.task == "text" else None
    expected = {
        kind: embed_batches(teacher, loader, accelerator, args.pooling, window) for kind, loader in loaders.items()
    }

    def compare() -> dict:
        return {
            kind: similarity(embed_batches(student, loader, accelerator, args.pooling), expected[kind])
            for kind, loader in loaders.items()
        }

    def score(model: PreTrainedModel) -> float:
        size, limit = args.per_device_eval_batch_size, args.max_tokens_per_batch or None
        embeddings = embed_pieces(model, labelled.pieces, data.collate, size, args.pooling, limit)
        return probe(embeddings, labelled, args.seed)

    downstream = None
    if labelled:
        downstream = {"teacher": score(teacher), "before": score(student), "majority": labelled.majority}
    before = compare()
    stages = distill(args, student, teacher, data, accelerator)
    if labelled:
        about = {"data": labelled.facts.name, "num_pieces": len(labelled.labels), "classes": labelled.label_names}
        downstream = about | {"after": score(student)} | downstream
    receipt = recovery.build_receipt(args, student, stages, before, compare(), downstream)
    accelerator.end_training()  # and with it the process group: the others may end while the main process publishes
    if accelerator.is_main_process:
        is_named = labelled is None or labelled.facts in data.facts
        facts = data.facts if is_named else [*data.facts, labelled.facts]
        recovery.publish_student(args, student, processor, receipt, facts)
        recovery.print_receipt(receipt)
        print(json.dumps(receipt, ensure_ascii=False))
    return receipt


if __name__ == "__main__":
    parsed = parse_args()
    with report_lost_processes(parsed.ddp_timeout):
        main(parsed)
