"""Protects studies/benchmark.py as users run it, and what one point measures: every model, limits that become cells."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from repository import ROOT, SCRIPTS, load_script

from fa_transformers.studies import benchmark_charts, benchmark_run
from fa_transformers.studies import benchmark_report as report
from fa_transformers.studies.benchmark import (
    ENCODERS,
    MODES,
    Point,
    build_config,
    build_inputs,
    build_model,
    measure_point,
    run_point,
)

SCRIPT = SCRIPTS / "studies" / "benchmark.py"
TINY = dict(hidden_size=16, heads=2, intermediate_size=32, vocab_size=50, repeats=1)
SIZES = {"text": (64, 768), "image": (32, 64)}  # BigBird's sparse attention starts above 704 tokens
TINY_FLAGS = ["--hidden_size", "16", "--heads", "2", "--layers", "1", "--vocab_size", "50", "--repeats", "2"]


benchmark = load_script("benchmark")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict, dict]:
    """One run through the command line: its folder, results.json and the JSON line."""
    folder = tmp_path_factory.mktemp("benchmark") / "out"
    flags = ["--models", "FA-BERT", "BERT", "ModernBERT", "FA-ViT", "--lengths", "512", "1024", "--image_sizes", "32"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *TINY_FLAGS, *flags, "--output_dir", folder, "--device", "cpu"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "results.json").read_text()), json.loads(done.stdout.splitlines()[-1])


def test_every_point_of_a_run_has_its_times_and_its_memory(run):
    _, results, line = run
    points = results["points"]
    assert len(points) == (3 * 2 + 1) * len(MODES)
    for point in points:
        assert point["status"] == "ok" and len(point["seconds"]) == 2
        assert point["peak_bytes"] > 0 and point["weight_bytes"] > 0
        assert point["tokens_per_second"] == pytest.approx(point["num_tokens"] / point["median_seconds"])
    modern = next(point for point in points if point["model"] == "ModernBERT")
    assert modern["layers_run"] == 3
    assert modern["median_seconds"] == pytest.approx(sum(modern["seconds"]) / 2 / 3)
    assert line["failed"] == [] and set(line["floors"]) == set(MODES)


def test_run_leaves_tables_and_charts(run):
    folder, _, _ = run
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert text.count("| tokens | FA-BERT | BERT | ModernBERT |") == 3 * len(MODES)
    assert "run with 3 layers" in text
    for kind in ("text", "image"):
        assert f"({kind}.png)" in text
        assert (folder / f"{kind}.png").read_bytes().startswith(b"\x89PNG")


def test_folder_of_another_run_is_not_overwritten(run, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse(["--output_dir", str(run[0])])
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ENCODERS)
def test_every_model_runs_at_two_sizes(name, mode):
    for size in SIZES[ENCODERS[name].kind]:
        point = Point(name, mode, size, **TINY)
        with torch.set_grad_enabled(mode == "training"):
            output = build_model(point)(**build_inputs(point, size)).last_hidden_state
        assert output.shape[1] - point.num_tokens == (1 if ENCODERS[name].kind == "image" else 0)
        assert output.shape[2] == 16 and output.isfinite().all()
        assert output.requires_grad == (mode == "training")


@pytest.mark.parametrize("name", ENCODERS)
def test_models_have_equal_width_depth_and_feed_forward_weights(name):
    """Equal width, depth and heads, and as many weights in the feed-forward part, gated or not."""
    config = build_model(Point(name, "forward", 128, layers=3, **TINY)).config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (16, 3, 2)
    gated = 2 if ENCODERS[name].model_type == "modernbert" else 1
    weights = config.intermediate_size * (3 if gated == 2 else 2)
    assert abs(weights - 2 * 32) < 3


def test_point_that_takes_too_long_becomes_a_cell():
    outcome = run_point(Point("BERT", "forward", 4096, time_limit_s=0.05, **TINY | {"hidden_size": 256}))
    assert outcome["status"] == "timed out"
    assert report.show_status(outcome | {"time_limit_s": 0.05}) == "> 0.05 s"


def test_point_that_needs_too_much_memory_becomes_a_cell():
    # The weights of the embedding table alone are 1 GiB.
    outcome = run_point(Point("BERT", "forward", 64, memory_limit_gib=1.0, **TINY | {"vocab_size": 2**24}))
    assert outcome["status"] == "out of memory", outcome


def test_point_that_fails_says_why():
    outcome = run_point(Point("FNet", "forward", 64, dtype="bfloat16", **TINY))
    assert outcome["status"] == "failed" and "BFloat16" in outcome["message"]


def test_larger_sizes_of_a_model_that_ended_are_not_tried(tmp_path, monkeypatch):
    tried = []

    def run_out_of_memory_at_128(point):
        tried.append((point.model, point.size))
        if point.model == "BERT" and point.size >= 128:
            return {"status": "out of memory"}
        return {"status": "ok", "median_seconds": 1.0, "tokens_per_second": point.size, "peak_bytes": 2**20}

    monkeypatch.setattr(benchmark_run, "run_point", run_out_of_memory_at_128)
    flags = ["--models", "FA-BERT", "BERT", "--lengths", "64", "128", "256", "--mode", "forward"]
    assert benchmark.main([*flags, "--output_dir", str(tmp_path / "out")]) == 0
    assert tried == [("FA-BERT", 64), ("BERT", 64), ("FA-BERT", 128), ("BERT", 128), ("FA-BERT", 256)]
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| 128 | 1.00 s | out of memory |\n| 256 | 1.00 s | not tried |" in text


def test_peak_memory_of_a_point_is_that_of_its_largest_tensors():
    """At width 16 all but the feed-forward activations is small: 2 * 4096 floats per token, before and after GELU."""
    peaks = [
        run_point(Point("FA-BERT", "forward", size, layers=1, **TINY | {"intermediate_size": 4096}))["peak_bytes"]
        for size in (512, 2048)
    ]
    activations = [2 * 4096 * 4 * size for size in (512, 2048)]
    assert all(peak >= least for peak, least in zip(peaks, activations, strict=True))
    # The difference, as threads and libraries take tens of MiB of both.
    assert peaks[1] - peaks[0] == pytest.approx(activations[1] - activations[0], rel=0.1)


def make_point(model: str, size: int, seconds: float, status: str = "ok") -> dict:
    point = Point(model, "forward", size)
    measured = {"median_seconds": seconds, "tokens_per_second": size / seconds, "peak_bytes": 100 + 7 * size}
    common = {"model": model, "series": model, "mode": "forward", "size": size, "status": status}
    return common | {"depth_scale": 1.0, "time_limit_s": 10.0, "hidden_state_bytes": 7} | measured | {"point": point}


def test_floors_follow_from_the_points():
    points = [make_point("FA-BERT", size, size / 512) for size in (512, 1024, 8192)]
    points += [make_point("BERT", 512, 0.5), make_point("BERT", 8192, 1.0, "timed out")]
    points += [make_point("BigBird", 512, 0.1), make_point("BigBird", 1024, 3.0), make_point("BigBird", 8192, 8.0)]
    floors = report.compute_floors(points, "forward")
    assert floors["tokens_per_second_at_8192_to_512"] == {"value": 1.0, "floor": 0.9, "met": True}
    assert floors["times_bert_at_512"] == {"value": 0.5, "floor": 1.0, "met": False}
    assert floors["times_bert_at_8192"] == {"at_least": 0.625, "floor": 2.5, "met": None}
    assert floors["times_bert_at_32768"]["met"] is None
    assert floors["times_bigbird"] == {"by_length": {1024: 1.5, 8192: 0.5}, "floor": 1.0, "met": False}
    assert floors["times_longformer"]["met"] is None
    memory = {"bytes_per_token": 7, "hidden_states_per_token": 1.0, "intercept_mib": 0.0, "largest_departure": 0.0}
    assert floors["peak_memory"] == memory


def test_picture_has_a_line_per_model_and_a_cross_where_one_ended(tmp_path, monkeypatch):
    points = [make_point("FA-BERT", size, size / 512) for size in (512, 1024, 8192)]
    points += [make_point("BERT", 512, 0.5), make_point("BERT", 1024, 2.0), make_point("BERT", 8192, 1.0, "timed out")]
    points += [make_point("FNet", 512, 0.1), make_point("FNet", 1024, 0.2), make_point("FNet", 8192, 1.0, "not tried")]
    figures = []
    save = benchmark_charts.save_figure
    monkeypatch.setattr(
        benchmark_charts,
        "save_figure",
        lambda figure, *args, **more: (figures.append(figure), save(figure, *args, **more)),
    )
    benchmark_charts.plot_picture({"points": points, "setting": "Tiny."}, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width == 1800 and picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    for axes, key in zip(figures[0].axes, ("median_seconds", "peak_bytes"), strict=True):
        lines = [list(zip(*line.get_data(), strict=True)) for line in axes.lines if line.get_marker() == "o"]
        crosses = [list(zip(*line.get_data(), strict=True)) for line in axes.lines if line.get_marker() == "x"]
        names = ("FA-BERT", "BERT", "FNet")
        done = [[p for p in points if p["model"] == name and p["status"] == "ok"] for name in names]
        assert lines == [[(point["size"], point[key]) for point in curve] for curve in done]
        assert crosses == [[lines[1][-1]]]
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert [text.get_text() for text in axes.texts] and {text.get_text() for text in axes.texts} == set(names)
    assert "at the next length: > 10 s." in figures[0].texts[0].get_text()


def test_labels_are_spread_without_changing_their_order():
    moved = benchmark_charts.spread([0.2, 0.21, 0.22, 0.99, 1.0], gap=0.1)
    assert moved == sorted(moved) and moved[-1] <= 1.0
    assert all(right - left >= 0.1 - 1e-9 for left, right in zip(moved, moved[1:], strict=False))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--models FA-BRT", "--models FA-BRT is unknown; choose from FA-BERT, BERT"),
        ("--lengths 0", "--lengths 0 must be a multiple of 64"),
        ("--image_sizes 100", "--image_sizes 100 must be a multiple of 16"),
        ("--layers 0", "--layers must be above 0"),
        ("--heads 5", "must divide by `num_attention_heads` (5)"),
        ("--options local_windw=3", "--options local_windw=3: expected FIELD=VALUE with a field of"),
        ("--options local_kernel_size=4", "`local_kernel_size` must be odd"),
        ("--chunk_size 64", "--chunk_size is for inference; add --mode forward"),
        ("--models BERT --lengths", "nothing to measure"),
        ("--device tpu", "--device tpu"),
        ("--mode training --picture a.png", "--picture shows forward passes of texts"),
    ],
)
def test_mistakes_are_named_before_anything_runs(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.parse([*flags.split(), "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_options_reach_the_factorized_models_only(tmp_path):
    flags = ["--options", "local_window=3", "position_embedding_type=periodic", *TINY_FLAGS]
    options, _ = benchmark.parse([*flags, "--models", "FA-BERT", "BERT", "--output_dir", str(tmp_path / "out")])
    configs = {point.model: build_config(point) for point in benchmark_run.plan_points(options)}
    assert (configs["FA-BERT"].local_window, configs["FA-BERT"].position_embedding_type) == (3, "periodic")
    assert not hasattr(configs["BERT"], "local_window")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_one_compilation_serves_every_length(mode):
    result = run_point(Point("FA-BERT", mode, 512, is_compiled=True, **TINY))
    assert result["status"] == "ok", result
    assert result["graphs"] == 1


def test_measuring_leaves_no_passes_out():
    threads = torch.get_num_threads()
    result = measure_point(Point("FA-BERT", "forward", 64, threads=threads, **TINY | {"repeats": 3}))
    assert len(result["seconds"]) == 3 and min(result["seconds"]) > 0
