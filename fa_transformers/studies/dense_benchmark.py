"""Time and memory of FADense with and without attention blocks, and of DETR's encoder layer, by resolution.

The kinds of a contest take turns in one process, so that whatever else slows the machine down slows all of them. Peak
memory is measured in a process of its own for each. What needs more memory than there is isn't started.
"""

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DetrConfig
from transformers.models.detr.modeling_detr import DetrEncoderLayer

from ..checks import check_positive
from ..files import write_json
from ..memory import return_freed_memory
from ..models import FADenseConfig, FADenseForObjectDetection, FADetrConfig
from ..models.configuration_fa_dense import HEAD_STRIDE
from ..models.fa_layout import Layout
from ..models.modeling_fa_detr import FADetrSelfAttention
from ..options import OptionGroup, option
from .benchmark import MemoryMeter

Part = Literal["blocks", "detr"]
KINDS: dict[str, tuple[str, ...]] = {
    "blocks": ("none", "factorized", "softmax"),
    "detr": ("factorized", "sdpa", "eager"),
}
"""Contestants of each part, by name."""
WIDTH, HEADS = 128, 8
"""Of DETR's encoder layer."""
NUM_OBJECTS = 20
"""Objects of the image of a training step."""
TINY_SIZE = 64
"""Pixels or tokens of a pass that loads the libraries before memory is measured."""
MATRICES = {"forward": 2, "training": 3}
"""Matrices of all pairs of places that softmax attention holds at once: logits and probabilities; gradients too."""
GB = 1e9


@dataclass(frozen=True)
class DenseBenchmarkOptions(OptionGroup):
    """The parts and sizes to measure, and where the figures go."""

    parts: tuple[str, ...] = option(tuple(KINDS), "blocks, detr, or both", group="inputs", common=True)
    sizes: tuple[int, ...] = option(
        (512, 1024, 2048, 4096), "sides in pixels of the images of forward passes", group="inputs", common=True
    )
    train_sizes: tuple[int, ...] = option(
        (512, 1024), "sides in pixels of the images of training steps", group="inputs", common=True
    )
    tokens: tuple[int, ...] = option(
        (4096, 16384),
        "places of the feature map that DETR's layer encodes, square numbers",
        group="inputs",
        common=True,
    )
    repeats: int = option(5, "passes that are timed after the first one", group="inputs", common=True)
    output_dir: Path = option(
        Path("outputs/benchmark_dense"),
        "folder for results.json; contests that an earlier run finished there are taken from it",
        group="files",
        common=True,
    )
    results: Path | None = option(
        None, "JSON file of a results page, into which the tables are put", group="files", common=True
    )
    picture: Path | None = option(
        None, "PNG for a page: time and memory of the forward passes", group="files", common=True
    )

    def check(self) -> None:
        """Raise ValueError, naming the flag, for what can't be measured."""
        if unknown := [part for part in self.parts if part not in KINDS]:
            raise ValueError(f"--parts {unknown[0]} is unknown; choose from {', '.join(KINDS)}.")
        check_positive(self, "repeats")
        for name in ("sizes", "train_sizes"):
            if small := [size for size in getattr(self, name) if size < 32]:
                raise ValueError(f"--{name} {small[0]}: an image must have at least 32 pixels a side.")
        if odd := [count for count in self.tokens if count < 1 or round(count**0.5) ** 2 != count]:
            raise ValueError(f"--tokens {odd[0]} must be a square number: the map has as many rows as columns.")
        if self.picture and not ("blocks" in self.parts and self.sizes):
            raise ValueError("--picture shows forward passes with blocks: add blocks to --parts, and --sizes.")


@dataclass(frozen=True)
class Contest:
    """A pass at one size, of which the kinds of a part are compared."""

    part: str
    mode: str
    size: int

    @property
    def name(self) -> str:
        return f"{self.part}, {self.mode}, {self.size}"

    def bytes_needed(self, kind: str) -> int:
        """Return the bytes of the matrices of all pairs of places; 0 for a kind that has none."""
        if kind == "softmax":
            places, heads = (-(-self.size // HEAD_STRIDE)) ** 2, 1
        elif kind == "eager":
            places, heads = self.size, HEADS
        else:
            return 0
        return MATRICES[self.mode] * heads * places**2 * torch.float32.itemsize


def plan_contests(options: DenseBenchmarkOptions) -> list[Contest]:
    """Return the contests of the options, the small ones first."""
    blocks = [Contest("blocks", "forward", size) for size in sorted(options.sizes)]
    blocks += [Contest("blocks", "training", size) for size in sorted(options.train_sizes)]
    detr = [Contest("detr", "training", count) for count in sorted(options.tokens)]
    return [contest for contest in (*blocks, *detr) if contest.part in options.parts]


def available_bytes() -> int:
    """Return the memory that this machine has left."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


def build_pass(contest: Contest, kind: str) -> Callable[[], None]:
    """Return a pass over one random input, its network built anew with the same seed whatever the kind.

    Of "blocks" it is a forward pass of `FADenseForObjectDetection` or its training step (forward, loss, backward) for
    an image of `size` pixels a side; of "detr" forward and backward of one encoder layer over `size` tokens.
    """
    torch.manual_seed(0)
    if contest.part == "detr":
        return _build_layer(contest.size, kind)
    return _build_detector(contest.mode, contest.size, kind)


def _build_detector(mode: str, size: int, kind: str) -> Callable[[], None]:
    fields: dict[str, Any] = {"attention_places": []} if kind == "none" else {"attention_kind": kind}
    model = FADenseForObjectDetection(FADenseConfig(**fields)).train(mode == "training")
    images = torch.rand(1, 3, size, size)
    boxes = torch.cat([torch.rand(NUM_OBJECTS, 2) * 0.8 + 0.1, torch.full((NUM_OBJECTS, 2), 40 / size)], dim=1)
    labels = [{"class_labels": torch.zeros(NUM_OBJECTS, dtype=torch.long), "boxes": boxes.clamp(max=1.0)}]

    def run() -> None:
        if mode == "training":
            model.zero_grad(set_to_none=True)
            model(images, labels=labels).loss.backward()
        else:
            with torch.inference_mode():
                model(images)

    return run


def _build_layer(size: int, kind: str) -> Callable[[], None]:
    fields: dict[str, Any] = dict(d_model=WIDTH, encoder_attention_heads=HEADS, encoder_layers=1, dropout=0.0)
    fields["encoder_ffn_dim"] = 4 * WIDTH
    config: Any = FADetrConfig(**fields) if kind == "factorized" else DetrConfig(**fields)
    if kind != "factorized":
        config._attn_implementation = kind
    layer = DetrEncoderLayer(config)
    side = round(size**0.5)
    mask = None
    if kind == "factorized":
        layer.self_attn = FADetrSelfAttention(config, 0)
        mask = Layout(None, (side, side))
    states = torch.randn(1, size, WIDTH, requires_grad=True)
    positions = torch.randn(1, size, WIDTH)

    def run() -> None:
        _clear_gradients(layer, states)
        layer(states, mask, spatial_position_embeddings=positions).square().mean().backward()

    return run


def _clear_gradients(layer: nn.Module, states: Tensor) -> None:
    layer.zero_grad(set_to_none=True)
    states.grad = None


def time_here(contest: Contest, kinds: Sequence[str], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Return the wall and CPU seconds of each kind's passes in this process, the kinds in turns, a first pass left out.

    Returns:
        kind -> {"wall": seconds of each repeat, "cpu": those of the process}.
    """
    passes = {kind: build_pass(contest, kind) for kind in kinds}
    seconds: dict[str, dict[str, list[float]]] = {kind: {"wall": [], "cpu": []} for kind in kinds}
    for repeat in range(repeats + 1):
        for kind, run in passes.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if repeat:
                seconds[kind]["wall"].append(time.perf_counter() - wall)
                seconds[kind]["cpu"].append(time.process_time() - cpu)
    return seconds


def memory_here(contest: Contest, kind: str) -> int:
    """Return the bytes of a pass of one kind: this process's highest resident memory above that before."""
    build_pass(replace(contest, size=TINY_SIZE), kind)()  # loads the libraries
    run = build_pass(contest, kind)
    return_freed_memory()
    meter = MemoryMeter("cpu")
    run()
    return meter.peak_bytes()


def run_job(job: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a job returns in a process of its own, forked from one that ran nothing; None if memory ran out."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context, initializer=_prepare_child, max_tasks_per_child=1) as pool:
        try:
            return pool.submit(job, *arguments).result()
        except (BrokenProcessPool, MemoryError):
            return None
        except RuntimeError as error:
            if "can't allocate memory" in str(error):  # PyTorch has no class of its own for it
                return None
            raise


def _prepare_child() -> None:
    torch.set_num_threads(1)
    # If the machine runs out of memory all the same, this process goes first.
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def measure_contest(contest: Contest, repeats: int) -> dict[str, dict[str, Any]]:
    """Return kind -> its "wall" and "cpu" seconds and "peak_bytes", or "not_run" with the reason."""
    found: dict[str, dict[str, Any]] = {}
    for kind in KINDS[contest.part]:
        needed = contest.bytes_needed(kind)
        if needed >= available_bytes():
            found[kind] = {"not_run": f"not run: needs {needed / GB:,.0f} GB"}
        elif (peak := run_job(memory_here, contest, kind)) is None:
            found[kind] = {"not_run": "out of memory"}
        else:
            found[kind] = {"peak_bytes": peak}
    runnable = [kind for kind, figures in found.items() if "not_run" not in figures]
    seconds = run_job(time_here, contest, runnable, repeats)
    if seconds is None:
        raise RuntimeError(f"{contest.name}: {', '.join(runnable)} ran out of memory when they took turns.")
    return {kind: figures | seconds.get(kind, {}) for kind, figures in found.items()}


def measure(options: DenseBenchmarkOptions) -> Iterator[tuple[Contest, dict[str, dict[str, Any]]]]:
    """Yield each contest with its figures, which are kept in `output_dir` and taken from there by a later run."""
    path = options.output_dir / "results.json"
    options.output_dir.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for contest in plan_contests(options):
        name = f"{contest.name}, {options.repeats} repeats"
        if name not in kept:
            kept[name] = measure_contest(contest, options.repeats)
            write_json(path, kept)
        yield contest, kept[name]
