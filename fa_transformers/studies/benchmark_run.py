"""A benchmark of encoders by input size: its options, the points that follow from them, and measuring these in turn."""

import inspect
import json
import os
import platform
import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tqdm import tqdm

from ..checks import check_positive
from ..cores import choose_threads
from ..files import write_text
from ..models.configuration_fa import FACTORIZED_FIELDS, FactorizedConfig
from ..options import UNSET, OptionGroup, flat, option, resolve
from ..tables import counted
from ..version import __version__
from .benchmark import ENCODERS, LENGTH_STEP, MODES, NOT_TRIED, OK, PATCH_PX, Point, build_config, run_point

FULL: dict[str, Any] = dict(
    lengths=(512, 1024, 2048, 4096, 8192, 16384, 32768, 65536), image_sizes=(224, 512, 1024, 2048, 4096), repeats=5,
    time_limit_s=120.0, budget_s=0.0,
)  # fmt: skip
QUICK: dict[str, Any] = dict(
    lengths=(512, 2048, 8192), image_sizes=(224, 1024), repeats=2, time_limit_s=12.0, budget_s=285.0
)


@dataclass(frozen=True)
class BenchmarkOptions(OptionGroup):
    """The models and sizes to measure; `FULL` or `QUICK` and this machine fill the unset values (`recipe_of`)."""

    quick: bool = option(
        False, "fewer and shorter inputs, fewer repeats: ends within 5 minutes", group="inputs", common=True
    )
    models: tuple[str, ...] = option(tuple(ENCODERS), "encoders to measure, by name", group="inputs", common=True)
    lengths: tuple[int, ...] = option(
        UNSET, f"text lengths in tokens, multiples of {LENGTH_STEP}", group="inputs", common=True
    )
    image_sizes: tuple[int, ...] = option(
        UNSET, f"image sides in pixels, multiples of {PATCH_PX}", group="inputs", common=True
    )
    mode: Literal["forward", "training", "both"] = option(
        "both", "forward pass, training step, or both", group="inputs", common=True
    )
    layers: int = option(2, "encoder layers", group="sizes", common=True)
    hidden_size: int = option(768, "width of the hidden states", group="sizes", common=True)
    heads: int = option(12, "attention heads", group="sizes", common=True)
    intermediate_size: int | None = option(
        None, "width of the feed-forward part; unset = 4 times --hidden_size", group="sizes", common=True
    )
    vocab_size: int = option(30522, "rows of the embedding table of text models", group="sizes", common=True)
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "type of weights and activations", group="sizes", common=True
    )
    options: tuple[str, ...] = option(
        (), "config fields of FA models as FIELD=VALUE, such as local_window=32", group="sizes", common=True
    )
    chunk_size: int | None = option(
        None, "tokens per chunk of FA models' forward pass; unset = in one piece", group="sizes", common=True
    )
    compile: bool = option(False, "measure the FA models under torch.compile too", group="sizes", common=True)
    device: str = option(UNSET, "cpu or cuda", group="limits", common=True)
    repeats: int = option(UNSET, "passes that are timed after the first one", group="limits", common=True)
    time_limit_s: float = option(UNSET, "seconds per point, after the model is built", group="limits", common=True)
    memory_limit_gib: float = option(
        UNSET, "memory of each process on the CPU; 0 = no limit", group="limits", common=True
    )
    budget_s: float = option(
        UNSET, "seconds after which no more points are started; 0 = no limit", group="limits", common=True
    )
    output_dir: Path = option(
        Path("outputs/benchmark"), "folder for results, charts and report", group="files", common=True
    )
    overwrite_output_dir: bool = option(False, "replace the files of an earlier run", group="files", common=True)
    picture: Path | None = option(
        None, "PNG for a page: time and memory of the texts' forward passes, side by side", group="files", common=True
    )

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.mode == "both" else (self.mode,)

    @property
    def config_fields(self) -> dict[str, Any]:
        """The config fields of FA models that `options` names."""
        return dict(_parse_field(field) for field in self.options)


def recipe_of(quick: bool) -> dict[str, Any]:
    """Return the values of unset options: sizes and limits of a full or a quick run, and what this machine has."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return FULL | (QUICK if quick else {}) | {"device": device, "memory_limit_gib": round(0.8 * machine_gib(), 1)}


def complete(options: BenchmarkOptions) -> BenchmarkOptions:
    """Return the options with every unset value filled and every value checked.

    Raises:
        ValueError: no run can use a value; the message names its flag.
    """
    options = resolve(options, recipe_of(options.quick))
    options = replace(options, intermediate_size=options.intermediate_size or 4 * options.hidden_size)
    _check(options)
    return options


def machine_gib() -> float:
    """Return this machine's memory in GiB."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def _parse_field(field: str) -> tuple[str, object]:
    """`local_window=32` as a name and a value, which is JSON or else a string."""
    name, separator, text = field.partition("=")
    own = [key for key, value in inspect.signature(FactorizedConfig).parameters.items() if value.kind.name[0] == "K"]
    known = [*FACTORIZED_FIELDS, *own]
    if not separator or name not in known:
        raise ValueError(f"--options {field}: expected FIELD=VALUE with a field of {', '.join(known)}.")
    try:
        return name, json.loads(text)
    except json.JSONDecodeError:
        return name, text


def _check(options: BenchmarkOptions) -> None:
    """Raise ValueError, naming the flag, for what no run can use."""
    unknown = [name for name in options.models if name not in ENCODERS]
    if unknown:
        raise ValueError(f"--models {unknown[0]} is unknown; choose from {', '.join(ENCODERS)}.")
    for flag, sizes, step in (
        ("lengths", options.lengths, LENGTH_STEP),
        ("image_sizes", options.image_sizes, PATCH_PX),
    ):
        wrong = [size for size in sizes if size < step or size % step]
        if wrong:
            raise ValueError(f"--{flag} {wrong[0]} must be a multiple of {step}, and at least {step}.")
    widths = ("layers", "hidden_size", "heads", "intermediate_size")
    check_positive(options, *widths, "chunk_size", "repeats", "time_limit_s")
    if options.vocab_size < 2:
        raise ValueError(f"--vocab_size must be at least 2, got {options.vocab_size}.")
    if options.memory_limit_gib < 0 or options.budget_s < 0:
        raise ValueError("--memory_limit_gib and --budget_s must not be negative; 0 is no limit.")
    if options.chunk_size is not None and options.mode != "forward":
        raise ValueError("--chunk_size is for inference; add --mode forward.")
    device = options.device.split(":")[0]
    if device not in ("cpu", "cuda") or (device == "cpu" and not Path("/proc/self/clear_refs").exists()):
        raise ValueError(f"--device {options.device}: peak memory can be measured on CUDA, and on the CPU under Linux.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no GPU.")
    points = plan_points(options)
    if not points:
        raise ValueError("nothing to measure: give a text model with --lengths, or an image model with --image_sizes.")
    for point in points:
        build_config(point)
    if options.picture and not any(point.encoder.kind == "text" and point.mode == "forward" for point in points):
        raise ValueError(
            "--picture shows forward passes of texts: give a text model, --lengths, and no --mode training."
        )
    folder = options.output_dir
    if folder.exists() and any(folder.iterdir()) and not options.overwrite_output_dir:
        raise ValueError(f"--output_dir {folder} is not empty; choose another or add --overwrite_output_dir.")


def plan_points(options: BenchmarkOptions) -> list[Point]:
    """Return all points: the sizes of a kind ascend, and the models take turns at each, under the same conditions."""
    copied = ("layers", "hidden_size", "heads", "intermediate_size", "vocab_size", "dtype", "device", "repeats")
    limits = ("time_limit_s", "memory_limit_gib", "chunk_size")
    settings = {name: getattr(options, name) for name in (*copied, *limits)}
    settings |= {"options": options.config_fields, "threads": choose_threads().count}
    points = []
    for kind, sizes in (("text", options.lengths), ("image", options.image_sizes)):
        names = [name for name in options.models if ENCODERS[name].kind == kind]
        for mode in options.modes:
            for size in sorted(set(sizes)):
                for name in names:
                    eager = [False, True] if options.compile and ENCODERS[name].is_factorized else [False]
                    points += [Point(name, mode, size, is_compiled=compiled, **settings) for compiled in eager]
    return points


def describe_setting(options: BenchmarkOptions) -> str:
    """Return one sentence with the models' sizes, their type and what they ran on."""
    threads = choose_threads().count
    device = (
        torch.cuda.get_device_name(options.device)
        if options.device.startswith("cuda")
        else f"{threads} CPU {'thread' if threads == 1 else 'threads'}"
    )
    extras = [f"{name}={json.dumps(value)}" for name, value in options.config_fields.items()]
    extras += [f"chunk_size={options.chunk_size}"] if options.chunk_size else []
    return (
        f"{counted(options.layers, 'layer')}, width {options.hidden_size}, {counted(options.heads, 'head')}, "
        f"{options.dtype}, {device}" + (f"; FA models with {', '.join(extras)}" if extras else "") + "."
    )


def measure_points(options: BenchmarkOptions, command: str) -> dict[str, Any]:
    """Measure all points and return the results, which are also written to results.json after each point.

    Once a curve has ended by running out of memory or time, its larger sizes aren't tried.

    Returns:
        `command`, `setting`, `device`, `machine`, `threads`, `versions`, `date`, `settings` (the options),
        `wall_seconds`, and `points`: each with the fields of `Point`, what follows from them, and what `run_point`
        returned.
    """
    settings = flat(options) | {"options": options.config_fields}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, fa_transformers {__version__}"
    results: dict[str, Any] = {
        "command": command,
        "setting": describe_setting(options),
        "device": options.device,
        "machine": f"{platform.machine()}, {counted(os.cpu_count() or 1, 'CPU core')}, {machine_gib():.0f} GiB",
        "threads": choose_threads().count,
        "versions": versions,
        "date": date.today().isoformat(),
        "settings": {name: value for name, value in settings.items() if name not in ("output_dir", "picture")},
        "points": [],
    }
    path = options.output_dir / "results.json"
    started, ended = time.perf_counter(), set()
    with tqdm(plan_points(options), unit="point") as progress:
        for point in progress:
            progress.set_description(f"{point.series}, {point.mode}, {point.size:,}")
            curve = (point.series, point.mode)
            elapsed = time.perf_counter() - started
            if curve in ended or (options.budget_s and elapsed > options.budget_s - options.time_limit_s):
                outcome = {"status": NOT_TRIED}
            else:
                outcome = run_point(point)
            if outcome["status"] != OK:
                ended.add(curve)
            results["points"].append(_describe_point(point) | outcome)
            write_text(path, json.dumps(results, indent=2))
    results["wall_seconds"] = round(time.perf_counter() - started, 1)
    write_text(path, json.dumps(results, indent=2))
    return results


def _describe_point(point: Point) -> dict[str, Any]:
    """The point's fields and what follows from them."""
    return asdict(point) | {
        "series": point.series,
        "num_tokens": point.num_tokens,
        "layers_run": point.layers_run,
        "depth_scale": point.layers / point.layers_run,
        "hidden_state_bytes": point.hidden_size * getattr(torch, point.dtype).itemsize,
    }
