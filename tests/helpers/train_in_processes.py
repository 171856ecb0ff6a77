"""Started by test_data_parallel.py under torchrun or in its process: `run_training` on tiny documents."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from tiny_models import build
from torch.utils.data import DataLoader
from transformers import get_scheduler

from fa_transformers import FABertConfig, FABertForSequenceClassification, PackingCollator
from fa_transformers.data.batching import LengthGroupedBatchSampler
from fa_transformers.options import LoopOptions
from fa_transformers.training.loop import run_training

# Lengths that give batches of unequal size, and with two processes and two batches a step a last step that is smaller.
LENGTHS = [19, 10, 6, 15, 18, 8, 9, 4, 20, 20, 15, 13, 13, 14, 16, 13, 17, 11, 9, 5, 17]
STEPS, LEARNING_RATE, MAX_GRAD_NORM = 10, 1e-2, 0.5
CASES = {
    "padded": dict(dtype=torch.float64, accumulation=2),
    "packed": dict(dtype=torch.float64, accumulation=2, packing=True),
    "checkpointed": dict(dtype=torch.float64, accumulation=2, checkpointing=True),
    "every batch a step": dict(dtype=torch.float64, accumulation=1),
    "float32": dict(dtype=torch.float32, accumulation=2, packing=True, checkpointing=True),
}


def documents() -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(1, 60, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": tokens, "label": index % 2} for index, tokens in enumerate(ids)]


def pad(examples: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(example["input_ids"]) for example in examples)
    rows = [example["input_ids"] + [0] * (longest - len(example["input_ids"])) for example in examples]
    ids = torch.tensor(rows)
    labels = torch.tensor([example["label"] for example in examples])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def make_model(dtype: torch.dtype, checkpointing: bool = False) -> FABertForSequenceClassification:
    model = build(FABertConfig, FABertForSequenceClassification, local_window=2, local_kernel_size=3).to(dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def make_sampler(num_processes: int, packing: bool = False) -> LengthGroupedBatchSampler:
    return LengthGroupedBatchSampler(
        LENGTHS, 4, max_tokens=30, packing=packing, group_by_length=not packing, num_processes=num_processes
    )


def make_optimizer(model: torch.nn.Module):
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    return optimizer, get_scheduler("linear", optimizer, 0, 2 * STEPS)


def train(
    dtype: torch.dtype, accumulation: int, packing: bool = False, checkpointing: bool = False, profile: bool = False,
    output_dir: Path = Path("unused"),
) -> tuple[torch.nn.Module, dict]:  # fmt: skip
    """The model after `STEPS` steps of `run_training` on this process's share, and the run's figures."""
    GradientState._reset_state()
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, step_scheduler_with_optimizer=False)
    sampler = make_sampler(accelerator.num_processes, packing)
    loader = DataLoader(documents(), batch_sampler=sampler, collate_fn=PackingCollator() if packing else pad)
    loop = LoopOptions(
        gradient_accumulation_steps=accumulation, max_grad_norm=MAX_GRAD_NORM, resume_from_checkpoint=None,
        logging_steps=100, eval_steps=1000, save_steps=1000, save_total_limit=1, early_stopping_patience=0,
        load_best_model_at_end=False, profile=profile,
    )  # fmt: skip
    model = make_model(dtype, checkpointing)
    trained, _, figures = run_training(
        loop, model, *make_optimizer(model), accelerator.prepare(loader), sampler, accelerator,
        evaluate=lambda _: {"loss": 0.0, "score": 0.0}, best_metric="score", max_steps=STEPS, output_dir=output_dir,
        data_digests={},
    )  # fmt: skip
    return accelerator.unwrap_model(trained), figures


def main(folder: str) -> None:
    torch.set_num_threads(1)
    for name, case in CASES.items():
        model, figures = train(**case, output_dir=Path(folder, name), profile=name == "padded")
        rank = Accelerator(cpu=True).process_index
        torch.save({"weights": model.state_dict(), "figures": figures}, Path(folder, f"{name}-{rank}.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
