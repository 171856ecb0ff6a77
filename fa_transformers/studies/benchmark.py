"""Time and peak memory of FA models beside stock encoders: one process per point, which may exceed its limits of both.

A point is one model, one mode and one input size. Its process is forked from a server that has imported torch and
transformers but run nothing, so that no point inherits another's memory, caches or threads.
"""

import math
import multiprocessing
import re
import resource
import signal
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel

from .. import models  # noqa: F401 - registers the FA models

MODES = ("forward", "training")
PATCH_PX = 16
LENGTH_STEP = 64
"""Text lengths are multiples of this: Nystromformer divides a document into 64 equal parts."""
WARM_UP_SIZES = {"text": 2 * LENGTH_STEP, "image": 4 * PATCH_PX}
"""Tokens, or pixels a side, of the input that a compiled model is compiled with, before the size that is measured."""

OK, OUT_OF_MEMORY, TIMED_OUT, FAILED, NOT_TRIED = "ok", "out of memory", "timed out", "failed", "not tried"
# PyTorch's CPU allocator and the C++ library have no exception class of their own.
_ALLOCATION_FAILURES = ("can't allocate memory", "bad_alloc", "Cannot allocate memory")


@dataclass(frozen=True)
class Encoder:
    """A row of `ENCODERS`: a model type of transformers and what sets its config apart at a given size.

    Args:
        model_type: key of transformers' AutoConfig.
        kind: "text" or "image".
        fields: config fields that depend on the size of the input, in tokens or pixels.
        attention: transformers' attention implementation; None where the model has only its own.
        is_factorized: whether the model takes `Point.options` and `Point.chunk_size`.
        depth_multiple: layers of different kinds alternate with this period, so that only multiples of it are fair. The
            next larger multiple is run and its time scaled to the depth that was asked for.
        note: what a reader of the figures must know.
    """

    model_type: str
    kind: str = "text"
    fields: Callable[[int], dict] = lambda size: {}
    attention: str | None = None
    is_factorized: bool = False
    depth_multiple: int = 1
    note: str = ""


ENCODERS = {
    "FA-BERT": Encoder("fa_bert", is_factorized=True),
    "BERT": Encoder("bert", attention="sdpa"),
    "Longformer": Encoder(
        "longformer",
        fields=lambda length: {"max_position_embeddings": length + 2},
        note="window of 512, no global tokens. This version of transformers builds an N×N mask for it.",
    ),
    "BigBird": Encoder("big_bird", note="blocks of 64, 3 random ones; up to 704 tokens it switches to full attention."),
    "Nystromformer": Encoder(
        "nystromformer",
        fields=lambda length: {"segment_means_seq_len": length},
        note="64 landmarks, convolution of 65.",
    ),
    "FNet": Encoder("fnet", note="Fourier transforms, no attention."),
    "ModernBERT": Encoder(
        "modernbert",
        attention="sdpa",
        depth_multiple=3,
        note="one global layer in three, windows of 128; a gated feed-forward part of two thirds the width, so as many "
        "weights.",
    ),
    "FA-ViT": Encoder(
        "fa_vit",
        "image",
        fields=lambda px: {"image_size": px},
        is_factorized=True,
        note="compiled twice: its native size needs no interpolation of positions, the size before it did.",
    ),
    "ViT": Encoder("vit", "image", fields=lambda px: {"image_size": px}, attention="sdpa"),
}


@dataclass(frozen=True)
class Point:
    """A model, a size and a mode that one process measures.

    Args:
        model: key of `ENCODERS`.
        mode: "forward" (inference mode) or "training" (forward, mean of the squared last hidden state, backward).
        size: tokens of a text, or pixels a side of a square image.
        dtype: name of a torch dtype.
        repeats: most passes that are timed after the first.
        time_limit_s: the first pass is killed after so many seconds; later ones that would not end by then are not run.
        memory_limit_gib: bound on the process's own memory, on the CPU; 0 = no limit.
        options: config fields of FA models.
        chunk_size: tokens per chunk of an FA model's forward pass; None passes no such argument.
        is_compiled: run under torch.compile(fullgraph=True, dynamic=True), compiled with another size beforehand.
    """

    model: str
    mode: str
    size: int
    layers: int = 2
    hidden_size: int = 768
    heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 30522
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    repeats: int = 5
    time_limit_s: float = 120.0
    memory_limit_gib: float = 0.0
    options: dict = field(default_factory=dict)
    chunk_size: int | None = None
    is_compiled: bool = False

    @property
    def encoder(self) -> Encoder:
        return ENCODERS[self.model]

    @property
    def series(self) -> str:
        """Name of the curve that the point belongs to."""
        return f"{self.model}, compiled" if self.is_compiled else self.model

    @property
    def num_tokens(self) -> int:
        """Tokens of the text, or patches of the image without its CLS token."""
        return self.size if self.encoder.kind == "text" else (self.size // PATCH_PX) ** 2

    @property
    def layers_run(self) -> int:
        return math.ceil(self.layers / self.encoder.depth_multiple) * self.encoder.depth_multiple


def build_config(point: Point):
    """Build the config of the point's model: equal width, depth, vocabulary and activation for all, no dropout."""
    fields = {
        "num_hidden_layers": point.layers_run,
        "hidden_size": point.hidden_size,
        "num_attention_heads": point.heads,
        "intermediate_size": point.intermediate_size,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if point.encoder.kind == "text":
        fields |= {"vocab_size": point.vocab_size, "pad_token_id": 0, "max_position_embeddings": point.size}
    else:
        fields |= {"patch_size": PATCH_PX}
    fields |= point.encoder.fields(point.size)
    if point.encoder.model_type == "modernbert":
        # Gated: three matrices instead of two. Its special tokens are of another vocabulary.
        special = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
        fields |= {"intermediate_size": point.intermediate_size * 2 // 3} | dict.fromkeys(special)
    if point.encoder.is_factorized:
        fields |= point.options
        if fields.get("position_embedding_type") == "periodic" and point.encoder.kind == "text":
            fields["max_position_embeddings"] = min(512, point.size)
    return AutoConfig.for_model(point.encoder.model_type, **fields)


def build_model(point: Point) -> PreTrainedModel:
    """Build the point's model with random weights, in its mode, on its device, in its dtype."""
    attention = {"attn_implementation": point.encoder.attention} if point.encoder.attention else {}
    model = AutoModel.from_config(build_config(point), **attention)
    return model.to(point.device, getattr(torch, point.dtype)).train(point.mode == "training")


def build_inputs(point: Point, size: int) -> dict[str, Any]:
    """Make one text of `size` tokens or one image of `size` pixels a side, without padding."""
    if point.encoder.kind == "text":
        # Not id 0, which Longformer takes for padding.
        inputs: dict[str, Any] = {"input_ids": torch.randint(1, point.vocab_size, (1, size)).to(point.device)}
    else:
        inputs = {"pixel_values": torch.rand(1, 3, size, size).to(point.device, getattr(torch, point.dtype))}
    if point.chunk_size is not None and point.encoder.is_factorized:
        return inputs | {"chunk_size": point.chunk_size}
    return inputs


class MemoryMeter:
    """Reads the peak bytes of the process above those when the meter was made, resident or on CUDA allocated."""

    def __init__(self, device: str):
        self.is_cuda = torch.device(device).type == "cuda"
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            self.bytes_before = torch.cuda.memory_allocated()
        else:
            # "5" sets the recorded peak back to what is resident now.
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            self.bytes_before = self._read("VmRSS")

    def peak_bytes(self) -> int:
        peak = torch.cuda.max_memory_allocated() if self.is_cuda else self._read("VmHWM")
        return peak - self.bytes_before

    @staticmethod
    def _read(name: str) -> int:
        with open("/proc/self/status") as file:
            return int(re.search(rf"{name}:\s+(\d+) kB", file.read())[1]) * 1024  # type: ignore[index]


def measure_point(point: Point) -> dict:
    """Build the point's model and measure it in this process.

    Returns:
        `seconds` of every timed pass, their median scaled to the depth asked for, tokens per second, `peak_bytes` of
        the first pass above `bytes_before` (weights and libraries), `weight_bytes`, and under torch.compile the number
        of `graphs` over both sizes and `compile_seconds`.
    """
    torch.manual_seed(0)
    torch.set_num_threads(point.threads)
    transformers.logging.set_verbosity_error()
    model = build_model(point)
    forward: Callable = model
    result: dict = {"weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters())}

    def run(inputs: dict[str, Any]) -> float:
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        if point.mode == "training":
            forward(**inputs).last_hidden_state.float().square().mean().backward()
        else:
            with torch.inference_mode():
                forward(**inputs)
        if torch.device(point.device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    if point.is_compiled:
        forward = torch.compile(model, fullgraph=True, dynamic=True)
        result["compile_seconds"] = run(build_inputs(point, WARM_UP_SIZES[point.encoder.kind]))
        model.zero_grad(set_to_none=True)
    inputs = build_inputs(point, point.size)
    meter = MemoryMeter(point.device)
    started = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, point.time_limit_s)  # SIGALRM ends the process
    first = run(inputs)
    signal.setitimer(signal.ITIMER_REAL, 0)
    result |= {"peak_bytes": meter.peak_bytes(), "bytes_before": meter.bytes_before, "first_pass_seconds": first}
    seconds: list[float] = []
    while len(seconds) < point.repeats and time.perf_counter() - started + first < point.time_limit_s:
        seconds.append(run(inputs))
    seconds = seconds or [first]
    median = statistics.median(seconds) * point.layers / point.layers_run
    if point.is_compiled:
        from torch._dynamo.utils import counters  # only here, as it takes a second to import

        result["graphs"] = counters["stats"]["unique_graphs"]
    return result | {"seconds": seconds, "median_seconds": median, "tokens_per_second": point.num_tokens / median}


def _measure_in_child(point: Point, sender: Connection) -> None:
    try:
        if torch.device(point.device).type == "cpu":
            # Data, not address space: libraries reserve gigabytes of that which they never touch.
            if point.memory_limit_gib:
                limit = int(point.memory_limit_gib * 2**30)
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            # If the machine runs out of memory all the same, this process goes first.
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write("1000")
        outcome = {"status": OK, **measure_point(point)}
    except (MemoryError, torch.OutOfMemoryError) as error:
        outcome = {"status": OUT_OF_MEMORY, "message": str(error)}
    except Exception as error:
        is_memory = isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATION_FAILURES)
        message = str(error).splitlines()[0] if is_memory else traceback.format_exc()
        outcome = {"status": OUT_OF_MEMORY if is_memory else FAILED, "message": message}
    sender.send(outcome)


def run_point(point: Point) -> dict:
    """Measure the point in a process of its own; returns its `status`, and what `measure_point` gives or a `message`.

    Each process imports the top of the main script once more: what is imported there and not here costs at every point.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_in_child, args=(point, sender), daemon=True)
    process.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        outcome = None  # it died before it could say anything
    process.join()
    if outcome is not None:
        return outcome
    if process.exitcode == -signal.SIGALRM:
        return {"status": TIMED_OUT, "message": f"the first pass took more than {point.time_limit_s:g} s"}
    if process.exitcode == -signal.SIGKILL:
        return {"status": OUT_OF_MEMORY, "message": "the process was killed, as the kernel does where memory runs out"}
    return {"status": FAILED, "message": f"the process ended with exit code {process.exitcode}"}
