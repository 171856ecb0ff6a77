"""Protects the benchmark of detectors: passes of every kind, what isn't started for lack of memory, the ratios."""

import json

import pytest
from repository import load_script

from fa_transformers.studies import dense_benchmark
from fa_transformers.studies.dense_benchmark import KINDS, Contest, DenseBenchmarkOptions, build_pass, measure_contest
from fa_transformers.studies.dense_benchmark_report import compute_floors, make_tables, plot_picture, ratio

SECONDS = {"none": [1.0, 2.0, 4.0], "factorized": [1.1, 2.2, 4.4], "softmax": [11.0, 22.0, 44.0]}
BYTES = {"none": 100_000_000, "factorized": 105_000_000, "softmax": 2_100_000_000}


def made_up(**others) -> dict:
    kinds = {kind: {"wall": wall, "cpu": wall, "peak_bytes": BYTES[kind]} for kind, wall in SECONDS.items()}
    return kinds | others


def test_what_softmax_needs_follows_from_the_places_and_is_not_started_without(monkeypatch):
    # (2048 / 8)² places: a matrix of 4 · 65536² bytes is 17.2 GB, and there are two.
    contest = Contest("blocks", "forward", 2048)
    assert contest.bytes_needed("softmax") == 2 * 4 * 65536**2 and contest.bytes_needed("factorized") == 0
    assert Contest("detr", "training", 4096).bytes_needed("eager") == 3 * 8 * 4 * 4096**2
    assert Contest("detr", "training", 4096).bytes_needed("sdpa") == 0
    started = []

    def run_job(job, contest, kinds, *arguments):
        started.append((job.__name__, kinds))
        return 7 if job.__name__ == "memory_here" else {kind: {"wall": [1.0], "cpu": [1.0]} for kind in kinds}

    monkeypatch.setattr(dense_benchmark, "run_job", run_job)
    monkeypatch.setattr(dense_benchmark, "available_bytes", lambda: 30 * 10**9)
    found = measure_contest(contest, repeats=1)
    assert found["softmax"] == {"not_run": "not run: needs 34 GB"}
    assert found["none"] == {"peak_bytes": 7, "wall": [1.0], "cpu": [1.0]}
    assert started[-1] == ("time_here", ["none", "factorized"]) and ("memory_here", "softmax") not in started


TRAINED = pytest.param("blocks", "training", marks=pytest.mark.slow)


@pytest.mark.parametrize(("part", "mode"), [("blocks", "forward"), TRAINED, ("detr", "training")])
def test_every_kind_runs_and_leaves_nothing_for_the_next_pass(part, mode):
    for kind in KINDS[part]:
        run = build_pass(Contest(part, mode, 64), kind)
        run()
        run()


def test_ratios_are_those_of_passes_in_turn_and_stand_beside_what_is_asked():
    assert ratio(made_up(), "factorized", "none") == pytest.approx(1.1)
    assert ratio(made_up(), "softmax", "factorized") == pytest.approx(10.0)
    without = made_up(softmax={"not_run": "not run: needs 34 GB"})
    assert ratio(without, "softmax", "factorized") is None
    found = {Contest("blocks", "forward", 1024): made_up(), Contest("blocks", "forward", 2048): without}
    floors = {(row["what"], row["asked"]): row["ratio"] for row in compute_floors(found)}
    assert list(floors.values()) == pytest.approx([1.1, 1.05, 10.0])
    assert [asked for _, asked in floors] == ["at most 1.15", "at most 1.1", "at least 8"]


def test_tables_say_what_was_not_run():
    found = {Contest("blocks", "forward", 1024): made_up()}
    found |= {Contest("blocks", "forward", 2048): made_up(softmax={"not_run": "not run: needs 34 GB"})}
    layer = {
        "factorized": made_up()["none"],
        "sdpa": made_up()["softmax"],
        "eager": {"not_run": "not run: needs 26 GB"},
    }
    tables = make_tables(found | {Contest("detr", "training", 16384): layer}, "python x")
    assert tables["blocks_time"]["rows"][1][2:] == [2.0, 2.2, "not run: needs 34 GB", pytest.approx(1.1), None]
    assert tables["blocks_memory"]["rows"][0][2:5] == [0.1, 0.105, 2.1]
    assert tables["detr"]["rows"][2] == [16384, "eager", "not run: needs 26 GB", None, "not run: needs 26 GB"]


def test_flags_that_cannot_be_measured_are_named():
    for options, message in (
        ({"parts": ("boxes",)}, "--parts boxes is unknown"),
        ({"sizes": (16,)}, "--sizes 16: an image must have at least 32"),
        ({"tokens": (1000,)}, "--tokens 1000 must be a square number"),
        ({"parts": ("detr",), "picture": "a.png"}, "--picture shows forward passes with blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            DenseBenchmarkOptions(**options).check()


@pytest.mark.slow
def test_a_picture_is_drawn_of_what_was_run(tmp_path):
    found = {Contest("blocks", "forward", 1024): made_up()}
    found |= {Contest("blocks", "forward", 2048): made_up(softmax={"not_run": "not run: needs 34 GB"})}
    plot_picture(found, "1 thread", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0


@pytest.mark.slow
def test_a_whole_run_measures_once_and_a_second_takes_what_it_finds(tmp_path, monkeypatch):
    flags = ["--sizes", "64", "--train_sizes", "--tokens", "64", "--repeats", "1", "--output_dir", str(tmp_path)]
    script = load_script("benchmark_dense")
    script.main([*flags, "--picture", str(tmp_path / "a.png")])
    found = json.loads((tmp_path / "results.json").read_text())
    assert len(found) == 2 and all(figures["peak_bytes"] > 0 for kinds in found.values() for figures in kinds.values())
    monkeypatch.setattr(dense_benchmark, "run_job", lambda *arguments: pytest.fail("measured twice"))
    script.main([*flags, "--results", str(tmp_path / "page.json")])
    assert set(json.loads((tmp_path / "page.json").read_text())["tables"]) == {"blocks_time", "blocks_memory", "detr"}
