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

import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from fa_transformers.charts import (
    HIGHLIGHT,
    HIGHLIGHT_LIGHT,
    MUTED,
    chart_style,
    clear_frame,
    new_figure,
    save_figure,
    scale_by_size,
)
from fa_transformers.checks import check_positive
from fa_transformers.commands.flags import describe_command, mistakes_in_one_line, script_parser
from fa_transformers.files import write_json, write_text
from fa_transformers.options import resolve
from fa_transformers.studies.operator_timing import (
    HEADS,
    WIDTH,
    OperatorOptions,
    copy_bytes_per_ms,
    measure_model,
    measure_operator,
    recipe_of,
)
from fa_transformers.tables import counted

PROGRAM = "python scripts/studies/benchmark_operator.py"
COLOURS = {"triton": HIGHLIGHT, "factorized": HIGHLIGHT, "unfused": MUTED["BERT"], "flash": MUTED["Longformer"]}


def parse(argv: Sequence[str] | None = None) -> tuple[OperatorOptions, str]:
    """Return the options, checked, and the command."""
    recipe = recipe_of(torch.cuda.is_available())
    parser = script_parser(PROGRAM, __doc__, lambda given: recipe)
    parser.add_options(OperatorOptions, ("operator",), "measurement")
    parsed = parser.parse(argv)
    options = resolve(parsed[OperatorOptions], recipe)
    try:
        check_positive(options, "total", "layers")
    except ValueError as error:
        parsed.fail(str(error))
    return options, describe_command(PROGRAM, parsed.flags)


def show(value: float | None, form: str) -> str:
    """Return a figure as it stands in a table."""
    return "out of memory" if value is None else format(value, form)


def write_tables(path: Path, facts: dict, rows: list[dict], model_rows: list[dict]) -> None:
    """Write both tables as Markdown."""
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
    """Write a PNG: time of the operator, without and with backward, and the model's tokens per second, by length."""
    with chart_style():
        figure, axes = new_figure(1, 3, size=(13, 4))
        figure.suptitle(f"{facts['device']}, bfloat16, {facts['total_positions']:,} positions in all")
        for axis, phase, title in ((axes[0], "forward", "forward"), (axes[1], "training", "forward and backward")):
            for name in dict.fromkeys(row["implementation"] for row in rows):
                points = [row for row in rows if row["implementation"] == name]
                times = [row[f"{phase}_ms"] or float("nan") for row in points]
                axis.plot([row["length"] for row in points], times, "o-", color=COLOURS[name], label=name)
            axis.set(title=f"Operator, {title}", ylabel="ms", yscale="log")
        for phase, colour in (("forward", HIGHLIGHT), ("training", HIGHLIGHT_LIGHT)):
            speeds = [row[f"{phase}_tokens_per_second"] or float("nan") for row in model_rows]
            axes[2].plot([row["length"] for row in model_rows], speeds, "o-", color=colour, label=phase)
        axes[2].set(title=f"FABert, layers: {facts['layers']}", ylabel="tokens/s", ylim=(0, None))
        for axis, points in zip(axes, (rows, rows, model_rows), strict=True):
            scale_by_size(axis, sorted({row["length"] for row in points}))
            axis.set_xlabel("positions")
            clear_frame(axis)
            axis.legend()
        save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    options, command = parse(argv)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    triton = sys.modules.get("triton")
    bandwidth = copy_bytes_per_ms(device, options.seconds)
    facts = {
        "command": command,
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {counted(torch.get_num_threads(), 'thread')}",
        "note": "kernels measured" if on_gpu else "no GPU here, so neither the Triton kernels nor flash attention ran",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else None,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "copy_gb_per_second": bandwidth / 1e6,
        "total_positions": options.total,
        "layers": options.layers,
    }
    print(facts["device"], facts["note"], sep=": ")
    rows = measure_operator(options, device, bandwidth)
    model_rows = measure_model(options, device)
    folder = options.output_dir
    write_json(folder / "operator.json", facts | {"operator": rows, "model": model_rows})
    write_tables(folder / "operator.md", facts, rows, model_rows)
    plot(folder / "operator.png", facts, rows, model_rows)
    print((folder / "operator.md").read_text(encoding="utf-8"))
    print(json.dumps(facts | {"operator": rows, "model": model_rows}))


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
