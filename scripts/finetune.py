"""Fine-tune a factorized encoder on long documents or large images, score it, and write a folder ready to publish.

accelerate launch scripts/finetune.py                                # licence documents: 14 min on 2 CPU cores, 0.61
accelerate launch scripts/finetune.py --full_recipe                  # 4.1 M tokens, whole documents at the end: 0.62
accelerate launch scripts/finetune.py --task image-classification    # digits on 1,024 px canvases: 10 min, 0.94
accelerate launch scripts/finetune.py --train_file my.csv --model_name_or_path bert-base-uncased
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedModel,
    get_scheduler,
)

from fa_transformers import FAViTConfig, FAViTForImageClassification
from fa_transformers.conversion.convert import load_factorized
from fa_transformers.conversion.packaged import resolve_checkpoint
from fa_transformers.conversion.source import locate_encoder
from fa_transformers.data.examples import build_examples, count_patches
from fa_transformers.data.labelled import LabelledData, load_data
from fa_transformers.hub.publish import publish, push_folder
from fa_transformers.memory import estimate_memory, return_freed_memory
from fa_transformers.metrics import BEST_METRICS, decide, load_metric
from fa_transformers.training import arguments
from fa_transformers.training import report as results
from fa_transformers.training.checkpointing import choose_resume, list_checkpoints, prepare_output_dir
from fa_transformers.training.loop import plan_steps, run_training
from fa_transformers.training.processes import report_lost_processes
from fa_transformers.training.setup import (
    build_loaders,
    count_replicas,
    freeze_bottom_layers,
    gather_model,
    group_parameters,
    make_accelerator,
    reports_examples,
    share_sequences,
    start_trackers,
)

# Every default that is a matter of tuning stands here. A later table wins over an earlier one, a flag over all.
COMMON = dict(
    per_device_eval_batch_size=16, gradient_accumulation_steps=1, num_train_epochs=3.0, max_steps=-1, weight_decay=0.01,
    max_grad_norm=1.0, lr_scheduler_type="linear", warmup_ratio=0.1, warmup_steps=0, freeze_layers=0, seed=0,
    short_epochs=0, short_length=512, eval_steps=0, save_steps=0, save_total_limit=2, early_stopping_patience=0,
    load_best_model_at_end=True, group_by_length=True, num_threads=0, report_to="tensorboard",
    logging_steps=10, output_dir=Path("outputs/finetuned"), license="unknown", mixed_precision=None,
)  # fmt: skip
TASKS = {
    "text-classification": dict(
        model_name_or_path="minilm", learning_rate=2e-4, max_length=4096,
        max_tokens_per_batch=4096, per_device_train_batch_size=32,
    ),
    "image-classification": dict(
        learning_rate=1e-3, image_size=1024, max_tokens_per_batch=0, per_device_train_batch_size=8,
        model_name_or_path="none",
    ),
}  # fmt: skip
PRETRAINED_IMAGES = dict(learning_rate=1e-4, image_size=None)  # None: as the checkpoint's processor says
DEMOS = {
    "text-classification": dict(
        max_tokens_per_batch=2048, num_train_epochs=2.2, short_epochs=2, learning_rate=1e-4, local_window=64,
        classifier_pooling="mean", position_embedding_type="periodic", mixed_precision="auto",
        license="apache-2.0", language="en",
    ),
    "image-classification": dict(
        num_train_epochs=5.0, learning_rate=3e-3, classifier_pooling="mean", local_kernel_size=3, license="apache-2.0",
    ),
}  # fmt: skip
FULL_RECIPES = {
    "text-classification": dict(num_train_epochs=5.0, short_epochs=4, max_length=20480),
    "image-classification": dict(num_train_epochs=8.0),
}  # fmt: skip
CANVAS = dict(num_train=800, num_validation=100, num_test=200, size_px=1024)
SMALL_FAVIT = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, patch_size=16,
    initializer_range=0.1,
)  # fmt: skip
LOW_RESOLUTION_PX = 224


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"{__doc__.splitlines()[0]} The defaults shown are those of the flags before --help: alone, the "
        "demo's; after --train_file my.csv, those of your data.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--task", choices=list(TASKS), default="text-classification", help="what to train for")
    parser.add_argument("--full_recipe", action="store_true", help="demo data: all of it, whole, for several epochs")
    parser.add_argument("--use_cpu", action="store_true", help="train on the CPU even if there is a GPU")
    arguments.add_data_arguments(parser)
    arguments.add_model_arguments(parser)
    arguments.add_training_arguments(parser)
    flags = sys.argv[1:] if argv is None else argv
    known, _ = parser.parse_known_args([flag for flag in flags if flag not in ("-h", "--help")])
    is_demo = not (known.train_file or known.image_folder or known.dataset_name)
    defaults = COMMON | TASKS[known.task] | (DEMOS[known.task] if is_demo else {})
    if known.task == "image-classification" and known.model_name_or_path not in (None, "none"):
        defaults |= PRETRAINED_IMAGES | ({"image_size": defaults["image_size"]} if is_demo else {})  # digits need it
    parser.set_defaults(**defaults | (FULL_RECIPES[known.task] if known.full_recipe else {}))
    args = parser.parse_args(flags)
    args.command = arguments.command_line("scripts/finetune.py", flags)
    args.resume_command = args.command.replace(" --overwrite_output_dir", "") + " --resume_from_checkpoint last"
    args.canvas = CANVAS | {"seed": args.seed}
    return args


def native_side(processor: BaseImageProcessor) -> int:
    """The side in pixels of the square images that an image processor makes.

    Raises:
        ValueError: they are not square.
    """
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    sides = {side for name in ("height", "width", "shortest_edge") if (side := getattr(size, name, None))}
    if len(sides) != 1:
        raise ValueError(f"--image_size: the checkpoint's processor says {size}, no square; say which side to use.")
    return sides.pop()


def build_model(args: argparse.Namespace, data: LabelledData):
    """The model, its tokenizer or image processor, and the number of tokens of the longest example."""
    overrides = data.config_fields | arguments.model_overrides(args)
    if args.task == "text-classification":
        source = resolve_checkpoint(args.model_name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(locate_encoder(source))
        model = load_factorized(source, "AutoModelForSequenceClassification", max_length=args.max_length, **overrides)
        tokenizer.model_max_length = args.max_length
        return model, tokenizer, args.max_length
    if args.model_name_or_path == "none":
        from transformers import ViTImageProcessor  # only here, as it warns that torchvision is missing

        size = {"height": args.image_size, "width": args.image_size}
        config = FAViTConfig(**SMALL_FAVIT | {"image_size": args.image_size} | overrides)
        model, processor = FAViTForImageClassification(config), ViTImageProcessor(size=size, **data.image_statistics)
    else:
        source = resolve_checkpoint(args.model_name_or_path)
        model = load_factorized(source, "AutoModelForImageClassification", **overrides)
        # The report and the card ask for it, too.
        args.image_size = args.image_size or native_side(AutoImageProcessor.from_pretrained(source))
        size = {"height": args.image_size, "width": args.image_size}
        processor = AutoImageProcessor.from_pretrained(source, size=size, do_center_crop=False)
    return model, processor, count_patches(args.image_size, model.config)


def build_optimizer(args: argparse.Namespace, model: PreTrainedModel, max_steps: int):
    """AdamW with its parameter groups, and the schedule of its rates."""
    from_scratch = args.model_name_or_path == "none"
    head_learning_rate = args.head_learning_rate or args.learning_rate * (1 if from_scratch else 10)
    source = model.config if from_scratch else AutoConfig.from_pretrained(locate_encoder(args.model_name_or_path))
    is_stock = source.model_type != model.config.model_type
    groups = group_parameters(model, args.learning_rate, head_learning_rate, args.weight_decay, is_stock)
    optimizer = torch.optim.AdamW(groups)
    num_warmup_steps = args.warmup_steps or int(args.warmup_ratio * max_steps)
    return optimizer, get_scheduler(args.lr_scheduler_type, optimizer, num_warmup_steps, max_steps)


@torch.no_grad()
def evaluate(model: PreTrainedModel, loader: DataLoader, accelerator: Accelerator, data: LabelledData) -> dict:
    """Scores and mean loss over all examples of the loader, each counted once, equal on every process."""
    was_training = model.training
    model.eval()
    rows = []
    for batch in loader:
        output = model(**batch)
        predictions = decide(output.logits.float().cpu().numpy(), data.problem_type)
        losses = [output.loss.item()] * len(predictions)
        local = list(zip(predictions, batch["labels"].cpu().numpy(), losses, strict=True))
        # Rows as objects: batches differ in size between processes, which tensors could not be gathered in.
        rows += accelerator.gather_for_metrics(local if reports_examples() else [], use_gather_object=True)
    model.train(was_training)
    predictions, references, losses = (np.stack(column) for column in zip(*rows, strict=True))
    names = {} if data.label_names is None else {"label_names": data.label_names}
    references = references.astype(predictions.dtype)
    scores = load_metric(data.problem_type).compute(predictions=predictions, references=references, **names)
    return scores | {"loss": float(losses.mean()), "num_examples": len(rows)}


def fit(args, data: LabelledData, accelerator: Accelerator, output_dir: Path) -> dict:
    """Build, train and score one model; returns it with its processor, scores and the figures of the run."""
    set_seed(args.seed)
    model, processor, num_tokens = build_model(args, data)
    freeze_bottom_layers(model, args.freeze_layers)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with accelerator.main_process_first():
        examples, collate = build_examples(data, processor, num_tokens, args)
    loaders, sampler = build_loaders(args, examples, collate, accelerator)
    accelerator.print(
        f"{type(model).__name__}: {model.num_parameters():,} parameters, {model.num_parameters(True):,} of them train; "
        f"{accelerator.num_processes} processes on {accelerator.device}, {torch.get_num_threads()} threads each; "
        f"{sampler.extent}"
    )
    num_examples, longest = sampler.largest_batch()
    estimate = estimate_memory(
        model.config,
        -(-longest // args.sequence_parallel_size),
        batch_size=num_examples,
        training=True,
        gradient_checkpointing=args.gradient_checkpointing,
        mixed_precision=accelerator.mixed_precision,
        device_type=accelerator.device.type,
    )
    holes = "; on a CPU the C library may keep a third more" if accelerator.device.type == "cpu" else ""
    accelerator.print(f"estimated peak memory: {estimate} for a batch of {num_examples * longest:,} tokens{holes}")
    steps = plan_steps(args, sampler, output_dir)
    if args.sequence_parallel_size > 1:
        set_seed(args.seed, device_specific=True)  # else every rank would drop the same places of its own tokens
    with share_sequences(args, accelerator):
        model, state, figures = run_training(
            args,
            model,
            *build_optimizer(args, model, steps),
            loaders["train"],
            sampler,
            accelerator,
            evaluate=lambda trained: evaluate(trained, loaders["validation"], accelerator, data),
            best_metric=args.metric_for_best_model or BEST_METRICS[data.problem_type],
            max_steps=steps,
            output_dir=output_dir,
        )
        scores = evaluate(model, loaders[data.score_split], accelerator, data)
    model = gather_model(accelerator, model)
    model.config.recovery = None
    accelerator.free_memory()
    return {"model": model, "processor": processor, "scores": scores, "run": results.describe_run(state) | figures}


def main(args: argparse.Namespace) -> dict:
    arguments.check_arguments(args)
    if args.gradient_checkpointing:  # memory for time, here too: 1.5 s of system time on 8 s of CPU time
        return_freed_memory()
    accelerator = make_accelerator(args)
    count_replicas(args, accelerator)  # which refuses a group of processes that does not come out even
    args.resume_from_checkpoint = choose_resume(args.resume_from_checkpoint, args.output_dir)
    with accelerator.main_process_first():
        data = load_data(args)  # first: a mistyped file must not cost the checkpoints that are overwritten
        if accelerator.is_main_process:
            is_resumed = args.resume_from_checkpoint is not None
            prepare_output_dir(args.output_dir, overwrite=args.overwrite_output_dir, resume=is_resumed)
    start_trackers(accelerator, args.report_to, "finetune", vars(args))
    fitted = fit(args, data, accelerator, args.output_dir)
    rivals, summary = {}, {}
    if data.is_demo and args.task == "image-classification":
        accelerator.print(f"The same architecture, as many steps, on the images at {LOW_RESOLUTION_PX} px:")
        folder = args.output_dir / f"at_{LOW_RESOLUTION_PX}_px"
        resume = "last" if args.resume_from_checkpoint and list_checkpoints(folder) else None
        changes = {"image_size": LOW_RESOLUTION_PX, "resume_from_checkpoint": resume}
        small = fit(argparse.Namespace(**vars(args) | changes), data, accelerator, folder)
        rivals[f"the same at {LOW_RESOLUTION_PX} px"] = small["scores"]
    accelerator.end_training()  # and with it the process group: the others may end while the main process publishes
    if accelerator.is_main_process:
        rivals |= results.score_baselines(data)
        summary = results.summarise(args, data, fitted, rivals)
        facts = results.build_facts(args, data, fitted, rivals)
        publish(fitted["model"], fitted["processor"], facts, args.output_dir, overwrite=True)
        results.write_report(args.output_dir, summary, fitted["scores"], data.label_names)
        results.print_results(summary)
        if args.push_to_hub:
            repo_id = args.hub_model_id or args.output_dir.resolve().name
            push_folder(args.output_dir, repo_id, private=args.hub_private, token=args.hub_token)
    return summary


if __name__ == "__main__":
    parsed = parse_args()
    with report_lost_processes(parsed.ddp_timeout):
        main(parsed)
