"""Time and memory of FA-BERT and FA-ViT beside stock encoders, by length: JSON, charts and a Markdown report.

python scripts/studies/benchmark.py --quick                    # within 5 minutes
python scripts/studies/benchmark.py                            # 512 to 65,536 tokens, 224 to 4,096 px; hours on 2 cores
python scripts/studies/benchmark.py --models FA-BERT --compile  # what torch.compile gains, and how often it compiles
python scripts/studies/benchmark.py --models FA-BERT --lengths 1048576 --mode forward --chunk_size 8192

One process per point. What runs out of memory or time becomes a cell of the table, and larger inputs of that model are
not tried. Ends with one line of JSON: the speed that is asked of FA-BERT, and what it reached.
"""

import argparse
import inspect
import json
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import fa_transformers
from fa_transformers.files import count_cores, write_text
from fa_transformers.models.configuration_fa import FactorizedConfig
from fa_transformers.studies import benchmark_report as report
from fa_transformers.studies.benchmark import (
    ENCODERS,
    FAILED,
    LENGTH_STEP,
    MODES,
    NOT_TRIED,
    OK,
    PATCH_PX,
    Point,
    build_config,
    run_point,
)

DEFAULTS = dict(
    lengths=[512, 1024, 2048, 4096, 8192, 16384, 32768, 65536], image_sizes=[224, 512, 1024, 2048, 4096],
    repeats=5, time_limit_s=120.0, budget_s=0.0,
)  # fmt: skip
QUICK = dict(lengths=[512, 2048, 8192], image_sizes=[224, 1024], repeats=2, time_limit_s=12.0, budget_s=285.0)
DTYPES = ("float32", "bfloat16", "float16")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer and shorter inputs, fewer repeats: ends within 5 minutes")
    add("--models", nargs="+", default=list(ENCODERS), help="rows of fa_transformers.benchmarking.ENCODERS")
    add("--lengths", type=int, nargs="*", help=f"text lengths in tokens, multiples of {LENGTH_STEP}")
    add("--image_sizes", type=int, nargs="*", help=f"image sides in pixels, multiples of {PATCH_PX}")
    add("--mode", choices=(*MODES, "both"), default="both", help="forward pass, training step, or both")
    add("--layers", type=int, default=2, help="encoder layers")
    add("--hidden_size", type=int, default=768, help="width of the hidden states")
    add("--heads", type=int, default=12, help="attention heads")
    add("--intermediate_size", type=int, help="width of the feed-forward part; unset = 4 times --hidden_size")
    add("--vocab_size", type=int, default=30522, help="rows of the embedding table of text models")
    add("--dtype", choices=DTYPES, default="float32", help="of weights and activations")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--options", nargs="*", default=[], metavar="FIELD=VALUE", help="of FA models, such as local_window=32")
    add("--chunk_size", type=int, help="tokens per chunk of FA models' forward pass; unset = in one piece")
    add("--compile", action="store_true", help="measure the FA models under torch.compile too")
    add("--repeats", type=int, help="passes that are timed after the first one")
    add("--time_limit_s", type=float, help="seconds per point, after the model is built")
    add("--memory_limit_gib", type=float, default=round(0.8 * machine_gib(), 1), help="per process, on the CPU")
    add("--budget_s", type=float, help="seconds after which no more points are started; 0 = no limit")
    add("--output_dir", type=Path, default=Path("outputs/benchmark"), help="folder for results, charts and report")
    add("--overwrite_output_dir", action="store_true", help="replace the files of an earlier run")
    args = parser.parse_args(argv)
    for name, value in (DEFAULTS | QUICK if args.quick else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.intermediate_size = args.intermediate_size or 4 * args.hidden_size
    args.command = shlex.join(["python", "scripts/studies/benchmark.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        args.options = dict(parse_option(option) for option in args.options)
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def machine_gib() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def parse_option(option: str) -> tuple[str, object]:
    """`local_window=32` as a name and a value, which is JSON or else a string."""
    name, separator, text = option.partition("=")
    known = [key for key, value in inspect.signature(FactorizedConfig).parameters.items() if value.kind.name[0] == "K"]
    if not separator or name not in known:
        raise ValueError(f"--options {option}: expected FIELD=VALUE with a field of {', '.join(known)}.")
    try:
        return name, json.loads(text)
    except json.JSONDecodeError:
        return name, text


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError, naming the flag, for what no run can use."""
    unknown = [name for name in args.models if name not in ENCODERS]
    if unknown:
        raise ValueError(f"--models {unknown[0]} is unknown; choose from {', '.join(ENCODERS)}.")
    for flag, sizes, step in (
        ("lengths", args.lengths, LENGTH_STEP),
        ("image_sizes", args.image_sizes, PATCH_PX),
    ):
        wrong = [size for size in sizes if size < step or size % step]
        if wrong:
            raise ValueError(f"--{flag} {wrong[0]} must be a multiple of {step}, and at least {step}.")
    for name in ("layers", "hidden_size", "heads", "intermediate_size", "repeats", "time_limit_s", "chunk_size"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} must be above 0, got {value}.")
    if args.vocab_size < 2:
        raise ValueError(f"--vocab_size must be at least 2, got {args.vocab_size}.")
    if args.memory_limit_gib < 0 or args.budget_s < 0:
        raise ValueError("--memory_limit_gib and --budget_s must not be negative; 0 is no limit.")
    if args.chunk_size is not None and args.mode != "forward":
        raise ValueError("--chunk_size is for inference; add --mode forward.")
    device = args.device.split(":")[0]
    if device not in ("cpu", "cuda") or (device == "cpu" and not Path("/proc/self/clear_refs").exists()):
        raise ValueError(f"--device {args.device}: peak memory can be measured on CUDA, and on the CPU under Linux.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no GPU.")
    if not plan_points(args):
        raise ValueError("nothing to measure: give a text model with --lengths, or an image model with --image_sizes.")
    for point in plan_points(args):
        build_config(point)
    if args.output_dir.exists() and any(args.output_dir.iterdir()) and not args.overwrite_output_dir:
        raise ValueError(f"--output_dir {args.output_dir} is not empty; choose another or add --overwrite_output_dir.")


def plan_points(args: argparse.Namespace) -> list[Point]:
    """All points, the sizes of a kind in ascending order and the models of a size in turn: rivals share conditions."""
    modes = MODES if args.mode == "both" else (args.mode,)
    copied = ("layers", "hidden_size", "heads", "intermediate_size", "vocab_size", "dtype", "device", "repeats")
    limits = ("time_limit_s", "memory_limit_gib", "options", "chunk_size")
    settings = {name: getattr(args, name) for name in (*copied, *limits)} | {"threads": count_cores()}
    points = []
    for kind, sizes in (("text", args.lengths), ("image", args.image_sizes)):
        names = [name for name in args.models if ENCODERS[name].kind == kind]
        for mode in modes:
            for size in sorted(set(sizes)):
                for name in names:
                    eager = [False, True] if args.compile and ENCODERS[name].is_factorized else [False]
                    points += [Point(name, mode, size, is_compiled=compiled, **settings) for compiled in eager]
    return points


def describe_setting(args: argparse.Namespace) -> str:
    threads = count_cores()
    device = (
        torch.cuda.get_device_name(args.device)
        if args.device.startswith("cuda")
        else f"{threads} CPU {'thread' if threads == 1 else 'threads'}"
    )
    extras = [f"{name}={json.dumps(value)}" for name, value in args.options.items()]
    extras += [f"chunk_size={args.chunk_size}"] if args.chunk_size else []
    return (
        f"{args.layers} layers, width {args.hidden_size}, {args.heads} heads, {args.dtype}, {device}"
        + (f"; FA models with {', '.join(extras)}" if extras else "")
        + "."
    )


def measure(args: argparse.Namespace, results: dict, path: Path) -> None:
    """Fill `results["points"]` and write them after each, so that a run that is cut short keeps what it has."""
    started, ended = time.perf_counter(), set()
    with tqdm(plan_points(args), unit="point") as progress:
        for point in progress:
            progress.set_description(f"{point.series}, {point.mode}, {point.size:,}")
            curve = (point.series, point.mode)
            elapsed = time.perf_counter() - started
            if curve in ended or (args.budget_s and elapsed > args.budget_s - args.time_limit_s):
                outcome = {"status": NOT_TRIED}
            else:
                outcome = run_point(point)
            if outcome["status"] != OK:
                ended.add(curve)
            results["points"].append(
                asdict(point)
                | {
                    "series": point.series,
                    "num_tokens": point.num_tokens,
                    "layers_run": point.layers_run,
                    "depth_scale": point.layers / point.layers_run,
                    "hidden_state_bytes": point.hidden_size * getattr(torch, point.dtype).itemsize,
                }
                | outcome
            )
            write_text(path, json.dumps(results, indent=2))
    results["wall_seconds"] = round(time.perf_counter() - started, 1)
    write_text(path, json.dumps(results, indent=2))


def main(args: argparse.Namespace) -> int:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    setting = describe_setting(args)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, fa_transformers "
    results = {
        "command": args.command,
        "setting": setting,
        "device": args.device,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {machine_gib():.0f} GiB",
        "threads": count_cores(),
        "versions": versions + fa_transformers.__version__,
        "settings": {name: value for name, value in vars(args).items() if name not in ("output_dir", "command")},
        "points": [],
    }
    print(setting)
    measure(args, results, args.output_dir / "results.json")
    measured = {ENCODERS[point["model"]].kind for point in results["points"] if point["status"] == OK}
    charts = [args.output_dir / f"{kind}.png" for kind in report.KINDS if kind in measured]
    for chart in charts:
        report.plot(results, chart.stem, chart)
    markdown = report.render_report(results, charts)
    write_text(args.output_dir / "report.md", markdown)
    print(markdown)
    failed = [f"{p['series']}, {p['mode']}, {p['size']}" for p in results["points"] if p["status"] == FAILED]
    modes = [mode for mode in MODES if args.mode in (mode, "both")]
    floors = {mode: report.compute_floors(results["points"], mode) for mode in modes}
    line = {"floors": floors, "failed": failed, "setting": setting, "wall_seconds": results["wall_seconds"]}
    print(json.dumps(line | {"output_dir": str(args.output_dir)}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
