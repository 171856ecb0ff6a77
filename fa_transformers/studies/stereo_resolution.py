"""Error, time and memory of trained stereo networks on ever larger scenes, one fresh process per point; and their runs.

`python -m fa_transformers.studies.stereo_resolution POINT` measures one point, [folder, width, scenes, seed] as JSON,
and prints its row.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..charts import HIGHLIGHT, MUTED, chart_style, clear_frame, new_figure, save_figure, scale_by_size
from ..data.readers.tables import DataError
from ..data.sets.stereo_scenes import draw_scene
from ..memory import return_freed_memory
from ..metrics.stereo import score_disparity, total_scores
from ..models import FAStereoConfig, FAStereoForDepthEstimation, FAStereoImageProcessor
from .aloe import NO_BLOCKS, describe_network
from .benchmark import MemoryMeter

SMALL_PX = 64
"""Width of the scene on which a process loads its libraries, before anything is measured."""
RESULTS_FILE = "all_results.json"


@torch.inference_mode()
def measure_here(folder: str, width: int, num_scenes: int, seed: int) -> dict[str, Any]:
    """Run a network on test scenes of `width` × `width` / 2 pixels, in this process and on one thread.

    Disparities are up to the network's `max_disparity` at every width.

    Returns:
        `cpu_seconds`, the median of a forward pass; `peak_mib` by which the process grew at most in the first one, from
        when network and images were there; `epe` and `over_3px` over all pixels of all scenes, occluded ones too.
    """
    return_freed_memory()
    torch.set_num_threads(1)
    model = FAStereoForDepthEstimation.from_pretrained(folder).eval()
    processor = FAStereoImageProcessor.from_pretrained(folder)
    processor.scale_factor = 1.0
    size = (width // 2, width, model.config.max_disparity)
    seconds, scores, peak = [], [], 0
    for index in range(-1, num_scenes):
        sides = (SMALL_PX // 2, SMALL_PX, 16) if index < 0 else size
        scene = draw_scene("test", max(index, 0), seed, *sides)
        inputs = processor((scene.left, scene.right), return_tensors="pt")
        meter = MemoryMeter("cpu")
        started = time.process_time()
        found = model(**inputs).predicted_depth[0].numpy()
        if index < 0:
            continue
        seconds.append(time.process_time() - started)
        peak = peak or meter.peak_bytes()
        assert scene.disparity is not None and scene.valid is not None
        scores.append(score_disparity(found, scene.disparity, scene.valid))
    total = total_scores(scores).compute()
    return {
        "network": describe_network(Path(folder), model.config),
        "width": width,
        "height": width // 2,
        "cpu_seconds": median(seconds),
        "peak_mib": peak / 2**20,
        "epe": total["epe"],
        "over_3px": total["over_3px"],
    }


def measure(folder: Path, width: int, num_scenes: int, seed: int) -> dict[str, Any]:
    """Return the row of `measure_here` from a fresh process; RuntimeError with its last words where that failed."""
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: there is no config.json of a trained network")
    point = json.dumps([str(folder), width, num_scenes, seed])
    command = [sys.executable, "-m", __name__, point]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{folder} at {width} px, exit status {ran.returncode}: {ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def read_run(folder: Path) -> dict[str, Any]:
    """Return the row of a finished run of `finetune_stereo`: its blocks, seed, scores and the constant guess's.

    Raises:
        DataError: the folder has no results of such a run.
    """
    path = folder / RESULTS_FILE
    if not path.is_file() or not (folder / "config.json").is_file():
        raise DataError(f"{folder}: there is no {RESULTS_FILE} and config.json of a finished finetune_stereo run")
    results = json.loads(path.read_text(encoding="utf-8"))
    if results.get("task") != "stereo-depth-estimation":
        raise DataError(f"{path}: these are results of {results.get('task')}, not of finetune_stereo")
    scores = results["model"]
    return {
        "network": describe_network(folder, FAStereoConfig.from_pretrained(folder)),
        "seed": results["seed"],
        "parameters": results["parameters"],
        "steps": results["steps"],
        "minutes": results["train_seconds"] / 60,
        **{name: scores[name] for name in ("epe", "over_1px", "over_3px", "d1")},
        "constant_epe": results["baselines"]["constant"]["epe"],
        "scenes": results["num_examples"],
    }


def draw_chart(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a chart of `measure_here`'s rows to `path`: time, memory and error by width, a line per network."""
    panels = {
        "cpu_seconds": ("forward pass, CPU seconds on one thread", "log"),
        "peak_mib": ("peak memory of a forward pass, MiB", "log"),
        "epe": ("end-point error, px", "linear"),
    }
    networks = list(dict.fromkeys(row["network"] for row in rows))
    widths = sorted({row["width"] for row in rows})
    colours = [MUTED["ViT"] if name.startswith(NO_BLOCKS) else HIGHLIGHT for name in networks]
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    with chart_style():
        figure, axes = new_figure(1, len(panels), size=(11, 3.6))
        for place, (key, (title, scale)) in zip(axes, panels.items(), strict=True):
            for name, colour in zip(networks, colours, strict=True):
                own = sorted((row["width"], row[key]) for row in rows if row["network"] == name)
                place.plot(*zip(*own, strict=True), marker="o", color=colour, label=name)
            place.set_yscale(scale)
            if scale == "linear":
                place.set_ylim(bottom=0)
            else:
                place.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                place.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
                place.yaxis.set_minor_formatter(NullFormatter())
            scale_by_size(place, widths)
            clear_frame(place)
            place.set_title(title, loc="left", fontsize=9)
            place.set_xlabel("width of the images, px (height: half)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, path)


if __name__ == "__main__":
    print(json.dumps(measure_here(*json.loads(sys.argv[1]))))
