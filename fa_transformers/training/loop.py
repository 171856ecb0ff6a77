"""The training loop that all runs share: resumable, evaluated, stopped by signals without loss."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from ..data.batching import BatchSource, LengthGroupedBatchSampler, count_update_steps
from ..options import LoopOptions
from ..tables import format_scores
from .checkpointing import StopRequest, TrainingState, load_best, read_settings, resume_run, save_checkpoint
from .flops import training_flops_per_token
from .progress import ProgressMeter, StepProfiler


def plan_steps(loop: LoopOptions, sampler: BatchSource, output_dir: Path) -> int:
    """Optimiser steps of a run: `max_steps`, or where that is negative as many as `num_train_epochs` take.

    A resumed run has as many as its first part was to have, on however many processes.

    Raises:
        ValueError: a stream was given no `max_steps`.
    """
    if loop.max_steps > 0:
        return loop.max_steps
    if not isinstance(sampler, LengthGroupedBatchSampler):
        raise ValueError("--streaming needs --max_steps: nobody knows how many steps an epoch of a stream takes.")
    if loop.resume_from_checkpoint:
        saved = read_settings(loop.resume_from_checkpoint, output_dir)
        if saved.get("examples") == sampler.settings["examples"]:  # else `resume_run` will say what differs
            planned = saved.get("num_processes", sampler.num_processes)
            sampler.keep_plan(planned, sampler.num_processes * loop.gradient_accumulation_steps)
    return count_update_steps(sampler, loop.num_train_epochs, loop.gradient_accumulation_steps)


def run_training(
    loop: LoopOptions,
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
    data_digests: dict[str, str],
    log: Callable[[dict, int], None] | None = None,
    resume_command: str = "",
) -> tuple[nn.Module, TrainingState, dict]:
    """Train for `max_steps` optimiser steps; a stop by signal saves a checkpoint, says how to resume, and exits with
    status 130.

    Args:
        model: has `model(**batch).loss`, the mean over a batch. Each batch is weighted so that a step minimises the
            mean over all its examples, on any number of processes.
        loader, sampler: a prepared loader and its batch sampler, or a stream's loader and its `StreamedBatches`.
        evaluate: scores of the model by name, among them `loss` and `best_metric`.
        best_metric: the score that names the best checkpoint.
        output_dir: folder of the checkpoints.
        data_digests: name of a part of the data -> its digest; a resumed run must have the same ones.
        log: takes values by name, and the step, to the trackers; unset = `accelerator.log`.
        resume_command: what is printed after a stop by signal: the command or call that goes on.

    Returns:
        The prepared model, with the best checkpoint's weights where `load_best_model_at_end` asks for them; the run's
        state; and the figures of `ProgressMeter.figures` and of `--profile`.
    """
    flops_per_token = training_flops_per_token(model)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    settings = sampler.settings | {"gradient_accumulation_steps": loop.gradient_accumulation_steps}
    settings |= {"data": data_digests}
    state = TrainingState(settings, sampler.num_processes)
    if loop.resume_from_checkpoint:
        state = resume_run(accelerator, loop.resume_from_checkpoint, output_dir, settings)
        sampler.keep_plan(state.settings["num_processes"], state.num_processes * loop.gradient_accumulation_steps)
    state.curve.follow(best_metric)
    meter = ProgressMeter(accelerator, max_steps, state, flops_per_token)
    run = _Run(
        loop, model, optimizer, scheduler, sampler, accelerator, state, meter, output_dir, max_steps,
        evaluate, best_metric, log or accelerator.log,
    )  # fmt: skip
    model.train()
    profiler = StepProfiler(loop.profile, output_dir / "profile", accelerator)
    with StopRequest(accelerator, meter.write) as stop, profiler:
        while not run.is_done():
            state.epoch_batches = sampler.count_batches(state.epoch)
            for batch in meter.waited_for(sampler.epoch_batches(loader, state.epoch, state.batch)):
                epoch_ends = run.train_on(batch)
                if not accelerator.sync_gradients:
                    continue
                run.finish_step(profiler)
                gained = run.evaluate_if_due(epoch_ends)
                must_stop = bool(stop) and not run.is_done()
                run.save_if_due(epoch_ends, gained, must_stop)
                if must_stop:
                    meter.close()
                    accelerator.print(f"Stopped at step {state.step} of {max_steps}. Resume:\n{resume_command}")
                    raise SystemExit(130)
                if run.is_done():
                    break
    meter.close()
    figures = meter.figures() | profiler.figures
    if loop.load_best_model_at_end and state.best_step not in (None, state.step):
        load_best(accelerator, output_dir / f"checkpoint-{state.best_step}")
    return model, state, figures


@dataclass
class _Run:
    """One training run: everything that its steps work with; each method is one part of a step."""

    loop: LoopOptions
    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    sampler: BatchSource
    accelerator: Accelerator
    state: TrainingState
    meter: ProgressMeter
    output_dir: Path
    max_steps: int
    evaluate: Callable[[nn.Module], dict]
    best_metric: str
    log: Callable[[dict, int], None]

    def __post_init__(self) -> None:
        # Neighbouring processes that share a sequence hold the same batches.
        self._replica = self.accelerator.process_index * self.sampler.num_processes // self.accelerator.num_processes

    def is_done(self) -> bool:
        return self.state.step >= self.max_steps or self.state.stopped_early

    def train_on(self, batch: dict) -> bool:
        """Add a batch's gradients and, where a step is complete, change the weights; True at the end of an epoch."""
        accelerator, times, state = self.accelerator, self.meter.times, self.state
        position = (state.epoch, state.batch)
        with accelerator.accumulate(self.model):
            with times.timed("forward"):
                loss = self.model(**batch).loss
            self.meter.add_batch(
                loss.item(), self.sampler.count_tokens(*position), self.sampler.count_examples(*position)
            )
            weight = self.sampler.loss_weight(*position, self._replica, self.loop.gradient_accumulation_steps)
            with times.timed("backward"):
                accelerator.backward(loss * weight)
            with times.timed("optimizer"):
                if accelerator.sync_gradients and self.loop.max_grad_norm:
                    accelerator.clip_grad_norm_(self.model.parameters(), self.loop.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        epoch_ends = accelerator.gradient_state.end_of_dataloader
        state.finish_batch(epoch_ends)
        return epoch_ends

    def finish_step(self, profiler: StepProfiler) -> None:
        """Count an optimiser step, move its rates on and log them."""
        if not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.state.step += 1
        self.meter.finish_step()
        with self.meter.paused():
            profiler.finish_step()
        rate = float(self.scheduler.get_last_lr()[0])
        self.state.curve.steps.add(self.state.step, self.state.mean_loss or 0.0, rate)
        if self.state.step % self.loop.logging_steps == 0 or self.state.step == self.max_steps:
            self.log(self.meter.values | {"learning_rate": rate}, self.state.step)

    def evaluate_if_due(self, epoch_ends: bool) -> bool:
        """Score the model where it is time to, and stop early where that is due; True where it is the best so far."""
        state, every = self.state, self.loop.eval_steps
        if not (state.step == self.max_steps or (state.step % every == 0 if every else epoch_ends)):
            return False
        with self.meter.paused():
            scores = self.evaluate(self.model)
        gained = state.record_score(scores, self.best_metric)
        state.stopped_early = 0 < self.loop.early_stopping_patience <= state.evaluations_without_gain
        numbers = {f"eval_{name}": value for name, value in scores.items() if isinstance(value, float)}
        self.log(numbers, state.step)
        self.meter.write(f"step {state.step}: {format_scores(numbers)}")
        return gained

    def save_if_due(self, epoch_ends: bool, gained: bool, must_stop: bool) -> None:
        """Save a checkpoint where it is time to, at the end, before a stop, and of the best weights."""
        every = self.loop.save_steps
        is_due = self.state.step % every == 0 if every else epoch_ends
        if is_due or self.is_done() or must_stop or (gained and self.loop.load_best_model_at_end):
            with self.meter.paused():
                save_checkpoint(self.accelerator, self.output_dir, self.state, self.loop.save_total_limit or None)
