"""Device time of the operator against its memory floor, torch's flash attention and the unfused path; model tokens/s.

python scripts/studies/benchmark_operator.py --output_dir outputs/operator  # a GPU with 80 GB: not yet run
python scripts/studies/benchmark_operator.py --output_dir outputs/operator  # CPU: smaller, without kernels: < 1 minute

The floor of the forward pass is reading Q, K, V and writing the output once: 4 · B · N · H · d · b bytes. That of
forward and backward is 11 such tensors: the backward pass reads Q, K, V and the output's gradient and writes three
gradients. A share of the floor is the time that a plain copy of as many bytes takes on this device, divided by the
measured time.
On a GPU, calls are replayed from a CUDA graph, so launching costs nothing, and timed by events. Writes operator.json,
operator.png and operator.md to the folder and ends with one line of JSON.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fa_transformers import FABertConfig, FABertModel, factorized_attention
from fa_transformers.charts import new_figure, save_figure
from fa_transformers.files import write_json, write_text

HEADS, WIDTH = 12, 64
FORWARD_TENSORS, TRAINING_TENSORS = 4, 11


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the three files")
    lengths = [2**n for n in range(9, 18)] if on_gpu else [512, 1024]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths, help="positions, operator")
    lengths = [2**n for n in range(11, 18)] if on_gpu else [512, 1024]
    parser.add_argument("--model_lengths", type=int, nargs="+", default=lengths, help="tokens, model")
    total = 65_536 if on_gpu else 1024
    parser.add_argument("--total", type=int, default=total, help="positions of all samples of a batch together")
    parser.add_argument("--layers", type=int, default=12 if on_gpu else 1, help="layers of the model, 768 wide")
    parser.add_argument("--seconds", type=float, default=1.0 if on_gpu else 0.1, help="time to spend on each figure")
    return parser.parse_args(arguments)


def median_ms(run, device: torch.device, seconds: float, as_graph: bool = True) -> float:
    """Median milliseconds of `run()`; on a GPU, of its device time in groups of calls."""
    if device.type != "cuda":
        run()
        times = []
        while len(times) < 3 or sum(times) < seconds:
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return statistics.median(times) * 1000
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    if as_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay

    def time_group(calls: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    calls = max(1, min(20, round(20 / time_group(1))))  # about 20 ms a group
    groups = max(3, round(seconds * 1000 / (calls * time_group(calls))))
    return statistics.median(time_group(calls) for _ in range(groups))


def copy_bytes_per_ms(device: torch.device, seconds: float) -> float:
    """Bytes read and written by copying a tensor far larger than any cache, per millisecond."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source), device, seconds)


def attend_unfused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.softmax(dim=-1) @ (key.softmax(dim=-2).transpose(-2, -1) @ value)


def attend_flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value)


def attend_triton(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return factorized_attention(query, key, value, impl="triton")


def or_out_of_memory(measure) -> float | None:
    """The measurement, or None where the device has too little memory for it."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        return None
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure_operator(args: argparse.Namespace, device: torch.device, bandwidth: float) -> list[dict]:
    """One row per implementation and length: milliseconds and share of the floor, without and with backward."""
    on_gpu = device.type == "cuda"
    attends = {"unfused": attend_unfused, "factorized": factorized_attention}
    if on_gpu:
        attends = {"triton": attend_triton, "unfused": attend_unfused, "flash": attend_flash}
    rows = []
    for length in args.lengths:
        batch = max(1, args.total // length)
        tensors = [torch.randn(batch, length, HEADS, WIDTH, device=device, dtype=torch.bfloat16) for _ in range(4)]
        *inputs, gradient = (tensor.transpose(1, 2) for tensor in tensors)
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        copy_ms = tensors[0].numel() * tensors[0].element_size() / bandwidth
        for name, attend in attends.items():

            def forward(attend=attend, inputs=inputs):
                with torch.no_grad():
                    attend(*inputs)

            def train(attend=attend, leaves=leaves, gradient=gradient):
                torch.autograd.grad(attend(*leaves), leaves, gradient)

            row = {"implementation": name, "batch": batch, "length": length}
            for phase, run, count in (("forward", forward, FORWARD_TENSORS), ("training", train, TRAINING_TENSORS)):
                spent = or_out_of_memory(lambda run=run: median_ms(run, device, args.seconds))
                row[f"{phase}_ms"] = spent
                row[f"{phase}_floor_share"] = spent and count * copy_ms / spent
            rows.append(row)
            print(row, flush=True)
    return rows


def measure_model(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Tokens per second of a bfloat16 FABertModel, forward and a training step without the optimizer, by length."""
    config = FABertConfig(num_hidden_layers=args.layers, max_position_embeddings=max(args.model_lengths))
    model = FABertModel(config).to(device, torch.bfloat16)
    rows = []
    for length in args.model_lengths:
        batch = max(1, args.total // length)
        tokens = torch.randint(1, config.vocab_size, (batch, length), device=device)

        def forward(tokens=tokens):
            with torch.inference_mode():
                model.eval()(tokens)

        def train(tokens=tokens):
            model.train()(tokens).last_hidden_state.float().square().mean().backward()
            model.zero_grad(set_to_none=True)

        row = {"batch": batch, "length": length}
        for phase, run in (("forward", forward), ("training", train)):
            spent = or_out_of_memory(lambda run=run: median_ms(run, device, args.seconds, as_graph=False))
            row[f"{phase}_tokens_per_second"] = spent and batch * length / spent * 1000
        rows.append(row)
        print(row, flush=True)
    return rows


def show(value: float | None, form: str) -> str:
    return "out of memory" if value is None else format(value, form)


def write_tables(path: Path, facts: dict, rows: list[dict], model_rows: list[dict]) -> None:
    lines = [
        f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}: {facts['note']}",
        f"Copy bandwidth {facts['copy_gb_per_second']:,.0f} GB/s; {HEADS} heads of width {WIDTH}, bfloat16.\n",
        "| implementation | positions | batch | forward ms | share of floor | forward + backward ms | share of floor |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['implementation']} | {row['length']:,} | {row['batch']} | {show(row['forward_ms'], '.3f')} "
            f"| {show(row['forward_floor_share'], '.0%')} | {show(row['training_ms'], '.3f')} "
            f"| {show(row['training_floor_share'], '.0%')} |"
        )
    lines += ["\n| tokens | batch | forward tokens/s | training tokens/s |", "| --- | --- | --- | --- |"]
    for row in model_rows:
        speeds = (show(row[f"{phase}_tokens_per_second"], ",.0f") for phase in ("forward", "training"))
        lines.append(f"| {row['length']:,} | {row['batch']} | {' | '.join(speeds)} |")
    write_text(path, "\n".join(lines) + "\n")


def plot(path: Path, facts: dict, rows: list[dict], model_rows: list[dict]) -> None:
    figure, axes = new_figure(1, 3, size=(13, 4))
    figure.suptitle(f"{facts['device']}, bfloat16, {facts['total_positions']:,} positions in all")
    for axis, phase, title in ((axes[0], "forward", "forward"), (axes[1], "training", "forward and backward")):
        for name in dict.fromkeys(row["implementation"] for row in rows):
            points = [row for row in rows if row["implementation"] == name]
            times = [row[f"{phase}_ms"] or float("nan") for row in points]
            axis.plot([row["length"] for row in points], times, marker="o", label=name)
        axis.set(title=f"Operator, {title}", ylabel="ms", yscale="log")
    for phase in ("forward", "training"):
        speeds = [row[f"{phase}_tokens_per_second"] or float("nan") for row in model_rows]
        axes[2].plot([row["length"] for row in model_rows], speeds, marker="o", label=phase)
    axes[2].set(title=f"FABert, layers: {facts['layers']}", ylabel="tokens/s", ylim=(0, None))
    for axis, points in zip(axes, (rows, rows, model_rows), strict=True):
        lengths = sorted({row["length"] for row in points})
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{length / 1024:g}k" if length >= 1024 else str(length) for length in lengths])
        axis.set_xlabel("positions")
        axis.legend()
    save_figure(figure, path)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    triton = sys.modules.get("triton")
    bandwidth = copy_bytes_per_ms(device, args.seconds)
    facts = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "note": "kernels measured" if on_gpu else "no GPU here, so neither the Triton kernels nor flash attention ran",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else None,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "copy_gb_per_second": bandwidth / 1e6,
        "total_positions": args.total,
        "layers": args.layers,
    }
    print(facts["device"], facts["note"], sep=": ")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = measure_operator(args, device, bandwidth)
    model_rows = measure_model(args, device)
    write_json(args.output_dir / "operator.json", facts | {"operator": rows, "model": model_rows})
    write_tables(args.output_dir / "operator.md", facts, rows, model_rows)
    plot(args.output_dir / "operator.png", facts, rows, model_rows)
    print((args.output_dir / "operator.md").read_text(encoding="utf-8"))
    print(json.dumps(facts | {"operator": rows, "model": model_rows}))


if __name__ == "__main__":
    main()
