"""The training loop that the scripts share: resumable, evaluated, stopped by signals without loss."""

import argparse
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from ..data.batching import BatchSource, LengthGroupedBatchSampler, count_update_steps
from ..tables import format_scores
from .checkpointing import StopRequest, TrainingState, load_best, read_settings, resume_run, save_checkpoint
from .flops import training_flops_per_token
from .progress import ProgressMeter, StepProfiler


def plan_steps(args: argparse.Namespace, sampler: BatchSource, output_dir: Path) -> int:
    """Optimiser steps of a run: `max_steps`, or where that is negative as many as `num_train_epochs` take.

    A resumed run has as many as its first part was to have, on however many processes.
    """
    if args.max_steps > 0:
        return args.max_steps
    if not isinstance(sampler, LengthGroupedBatchSampler):
        raise ValueError("--streaming needs --max_steps: nobody knows how many steps an epoch of a stream takes.")
    if args.resume_from_checkpoint:
        saved = read_settings(args.resume_from_checkpoint, output_dir)
        if saved.get("examples") == sampler.settings["examples"]:  # else `resume_run` will say what differs
            planned = saved.get("num_processes", sampler.num_processes)
            sampler.keep_plan(planned, sampler.num_processes * args.gradient_accumulation_steps)
    return count_update_steps(sampler, args.num_train_epochs, args.gradient_accumulation_steps)


def run_training(
    args: argparse.Namespace,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    loader: DataLoader,
    sampler: BatchSource,
    accelerator: Accelerator,
    *,
    evaluate: Callable[[nn.Module], dict],
    best_metric: str,
    max_steps: int,
    output_dir: Path,
    log: Callable[[dict, int], None] | None = None,
) -> tuple[nn.Module, TrainingState, dict]:
    """Train for `max_steps` optimiser steps; a stop by signal saves a checkpoint, says how to resume, and exits with
    status 130.

    Args:
        args: the training flags of `arguments.add_training_arguments`, and `resume_command`.
        model: `model(**batch).loss`, the mean over the examples of a batch, is what is minimised, in the mean over all
            examples of a step, however they are spread over processes and batches.
        loader, sampler: a prepared loader and its batch sampler, or a stream's loader and its `StreamedBatches`.
        evaluate: scores of the model by name, among them `loss` and `best_metric`.
        best_metric: the score that names the best checkpoint.
        output_dir: folder of the checkpoints.
        log: takes values by name, and the step, to the trackers; unset = `accelerator.log`.

    Returns:
        The prepared model, with the best checkpoint's weights where `load_best_model_at_end` asks for them, and the
        run's state, and the figures of `ProgressMeter.figures` and of `--profile`.
    """
    log = log or accelerator.log
    flops_per_token = training_flops_per_token(model)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    settings = sampler.settings | {"gradient_accumulation_steps": args.gradient_accumulation_steps}
    state = TrainingState(settings, sampler.num_processes)
    if args.resume_from_checkpoint:
        state = resume_run(accelerator, args.resume_from_checkpoint, output_dir, settings)
        sampler.keep_plan(state.settings["num_processes"], state.num_processes * args.gradient_accumulation_steps)
    # Neighbouring processes that share a sequence hold the same batches.
    replica = accelerator.process_index * sampler.num_processes // accelerator.num_processes
    meter = ProgressMeter(accelerator, max_steps, state, flops_per_token)
    model.train()
    profiler = StepProfiler(args.profile, output_dir / "profile", accelerator)
    with StopRequest(accelerator, meter.write) as stop, profiler:
        while state.step < max_steps and not state.stopped_early:
            for batch in meter.waited_for(sampler.epoch_batches(loader, state.epoch, state.batch)):
                position = (state.epoch, state.batch)
                with accelerator.accumulate(model):
                    with meter.times.timed("forward"):
                        loss = model(**batch).loss
                    meter.add_batch(loss.item(), sampler.count_tokens(*position), sampler.count_examples(*position))
                    weight = sampler.loss_weight(*position, replica, args.gradient_accumulation_steps)
                    with meter.times.timed("backward"):
                        accelerator.backward(loss * weight)
                    with meter.times.timed("optimizer"):
                        if accelerator.sync_gradients and args.max_grad_norm:
                            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                        optimizer.step()
                        optimizer.zero_grad()
                epoch_ends = accelerator.gradient_state.end_of_dataloader
                state.finish_batch(epoch_ends)
                if not accelerator.sync_gradients:
                    continue
                if not accelerator.optimizer_step_was_skipped:
                    scheduler.step()
                state.step += 1
                meter.finish_step()
                with meter.paused():
                    profiler.finish_step()
                done, gained = state.step == max_steps, False
                if state.step % args.logging_steps == 0 or done:
                    log(meter.values | {"learning_rate": scheduler.get_last_lr()[0]}, state.step)
                if done or (state.step % args.eval_steps == 0 if args.eval_steps else epoch_ends):
                    with meter.paused():
                        scores = evaluate(model)
                    gained = state.record_score(scores, best_metric)
                    state.stopped_early = 0 < args.early_stopping_patience <= state.evaluations_without_gain
                    numbers = {f"eval_{name}": value for name, value in scores.items() if isinstance(value, float)}
                    log(numbers, state.step)
                    meter.write(f"step {state.step}: {format_scores(numbers)}")
                done = done or state.stopped_early
                must_stop = bool(stop) and not done
                is_due = state.step % args.save_steps == 0 if args.save_steps else epoch_ends
                if is_due or done or must_stop or (gained and args.load_best_model_at_end):
                    with meter.paused():
                        save_checkpoint(accelerator, output_dir, state, args.save_total_limit or None)
                if must_stop:
                    meter.close()
                    accelerator.print(f"Stopped at step {state.step} of {max_steps}. Resume:\n{args.resume_command}")
                    raise SystemExit(130)
                if done:
                    break
    meter.close()
    figures = meter.figures() | profiler.figures
    if args.load_best_model_at_end and state.best_step not in (None, state.step):
        load_best(accelerator, output_dir / f"checkpoint-{state.best_step}")
    return model, state, figures
