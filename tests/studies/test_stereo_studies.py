"""Protects the stereo tables: the real pair's reading, scale and filled holes, a measured point, and kept tables."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from repository import ROOT, load_script
from stereo_sets import SMALL

from fa_transformers.data.readers.stereo_folders import StereoSample
from fa_transformers.data.readers.tables import DataError
from fa_transformers.models import FAStereoConfig, FAStereoForDepthEstimation, FAStereoImageProcessor
from fa_transformers.studies import aloe, stereo_resolution
from fa_transformers.studies.aloe import fill_holes, find_agreeing, fitting_scale, read_aloe, score_aloe
from fa_transformers.studies.stereo_resolution import measure, measure_here, read_run

HEIGHT, WIDTH, SHIFT = 24, 96, 30


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stereo") / "small"
    torch.manual_seed(0)
    FAStereoForDepthEstimation(FAStereoConfig(**SMALL)).save_pretrained(folder)
    FAStereoImageProcessor(scale_factor=0.5).save_pretrained(folder)
    return folder


@pytest.fixture
def pair(tmp_path):
    """The files of a pair that is shifted by `SHIFT`; the first columns have no true disparity."""
    scene = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH + SHIFT, 3), dtype=np.uint8)
    Image.fromarray(scene[:, :WIDTH]).save(tmp_path / "aloeL.jpg", quality=95)
    Image.fromarray(scene[:, SHIFT:]).save(tmp_path / "aloeR.jpg", quality=95)
    true = np.full((HEIGHT, WIDTH), SHIFT, dtype=np.uint8)
    true[:, :5] = 0
    Image.fromarray(true).save(tmp_path / "aloeGT.png")
    return tmp_path


def test_the_real_pair_is_read_in_pixels_and_a_missing_file_names_the_package(pair):
    sample = read_aloe(pair)
    assert sample.left.shape == sample.right.shape == (HEIGHT, WIDTH, 3)
    assert not sample.valid[:, :5].any() and (sample.disparity[:, 5:] == SHIFT).all() and sample.valid[:, 5:].all()
    (pair / "aloeGT.png").unlink()
    with pytest.raises(DataError, match=r"aloeGT\.png not found; .* opencv-doc"):
        read_aloe(pair)


def test_at_the_fitting_scale_the_largest_disparity_is_the_network_s_last_level(pair):
    sample = read_aloe(pair)
    for max_disparity in (16, 24):
        assert fitting_scale(sample, max_disparity) * SHIFT == pytest.approx(max_disparity - 4)
    assert fitting_scale(sample, 64) == 1.0


def test_holes_take_the_lesser_neighbour_of_their_row_and_known_places_stay():
    known = np.array([[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=bool)
    disparity = np.where(known, [[0, 9, 0, 0, 4, 0], [0] * 6, [1, 2, 3, 4, 5, 6]], -1).astype(np.float32)
    filled = fill_holes(disparity, known)
    assert filled[0].tolist() == [9, 9, 4, 4, 4, 4] and filled[2].tolist() == [1, 2, 3, 4, 5, 6]
    assert filled[1].tolist() in (filled[0].tolist(), filled[2].tolist()), "the nearest row that has some"
    with pytest.raises(ValueError, match="no disparity is known"):
        fill_holes(disparity, np.zeros_like(known))


def test_disparities_agree_where_the_right_view_says_the_same():
    # A wall of disparity 2, and before it in columns 6 to 8 something of disparity 4, which hides the wall's 4 and 5.
    from_left = np.array([[2, 2, 2, 2, 2, 2, 4, 4, 4, 2]], dtype=np.float32)
    from_right = np.array([[2, 2, 4, 4, 4, 2, 2, 2, 2, 2]], dtype=np.float32)
    agreeing = find_agreeing(from_left, from_right, 1.0)
    assert agreeing.tolist() == [[False, False, True, True, False, False, True, True, True, True]]
    assert (
        find_agreeing(from_left, from_right, 2.0)[0, 2:].all() and not find_agreeing(from_left, from_right, 2.0)[0, 0]
    )


def test_the_right_view_is_the_left_one_in_a_mirror(pair, monkeypatch):
    sample, seen = read_aloe(pair), []

    def predict(model, processor, left, right):
        seen.append((left, right))
        return np.full((HEIGHT, WIDTH), SHIFT, np.float32)

    monkeypatch.setattr(aloe, "predict_disparity", predict)
    disparity, agreeing = aloe.predict_both(None, FAStereoImageProcessor(), sample)
    assert (disparity == SHIFT).all() and agreeing[:, SHIFT:].all() and not agreeing[:, :SHIFT].any()
    assert np.array_equal(seen[1][0], sample.right[:, ::-1]) and np.array_equal(seen[1][1], sample.left[:, ::-1])


def test_methods_are_scored_where_they_answer_and_with_their_holes_filled(pair, network, monkeypatch):
    sample = read_aloe(pair)
    answers = np.zeros((HEIGHT, WIDTH), dtype=bool)
    answers[:, 50:] = True
    matched = np.where(answers, SHIFT + 2.0, -1.0).astype(np.float32), answers
    errors = np.where(np.arange(WIDTH) < 50, SHIFT - 5.0, SHIFT) * np.ones((HEIGHT, 1))
    monkeypatch.setattr(aloe, "match_blocks", lambda sample: matched)
    monkeypatch.setattr(aloe, "predict_disparity", lambda *given: errors)
    monkeypatch.setattr(aloe, "predict_both", lambda *given: (errors, answers))
    result = score_aloe([network], sample, max_disparities=(24,))
    alone, checked, *wider, sgbm = result.rows
    assert (alone["answered"], alone["max_disparity"], alone["scale"]) == (1.0, 16, 12 / 30)
    assert alone["epe"] == alone["epe_answered"] == pytest.approx(5 * 45 / 91)
    assert checked["answered"] == sgbm["answered"] == pytest.approx(46 / 91)
    assert checked["epe_answered"] == checked["epe"] == 0.0 and sgbm["epe_answered"] == sgbm["epe"] == 2.0
    assert [(row["max_disparity"], row["scale"]) for row in wider] == [(24, 20 / 30)] * 2
    assert len(result.maps) == 3 and all("(small)" in name for name in list(result.maps)[:2])
    monkeypatch.setattr(aloe, "match_blocks", lambda sample: None)
    assert score_aloe([network], sample).rows[2:] == [aloe.RECORDED]
    with pytest.raises(ValueError, match="max_disparity"):
        score_aloe([network], sample, max_disparities=(18,))


def test_a_point_has_the_error_of_the_network_at_the_scenes_own_size(network, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(stereo_resolution, "return_freed_memory", lambda: None)
    row = measure_here(str(network), 64, 1, 0)
    assert (row["width"], row["height"]) == (64, 32) and row["network"].startswith("blocks on features")
    # At half of the size, which the folder's processor would take, the map would have another shape than the truth.
    assert row["epe"] > 0 and row["cpu_seconds"] > 0


@pytest.mark.slow  # a process of its own: other tests have made this one large
def test_a_points_memory_is_that_of_its_cost_volume_at_least(network):
    row = measure(network, 64, 1, 0)
    assert row["peak_mib"] > 4 * 8 * 4 * 8 * 16 / 2**20, "a cost volume has 4 levels, 8 x 16 places, 8 channels"


def test_the_tables_of_runs_keep_the_others_and_stand_on_a_page(network, tmp_path, capsys):
    results = {
        "task": "stereo-depth-estimation", "seed": 3, "parameters": 10, "steps": 2, "train_seconds": 90.0,
        "model": {"epe": 2.5, "over_1px": 0.5, "over_3px": 0.25, "d1": 0.2}, "num_examples": 4,
        "baselines": {"constant": {"epe": 10.0}}, "command": "fa-transformers finetune_stereo",
    }  # fmt: skip
    with pytest.raises(DataError, match="no all_results.json"):
        read_run(network)
    (network / "all_results.json").write_text(json.dumps(results))
    row = read_run(network)
    assert (row["epe"], row["constant_epe"], row["minutes"], row["seed"]) == (2.5, 10.0, 1.5, 3)
    (tmp_path / "stereo.json").write_text(json.dumps({"tables": {"aloe": "kept", "runs": "old"}}))
    script = load_script("stereo_table")
    script.main(["--runs", str(network), "--output_dir", str(tmp_path)])
    tables = json.loads((tmp_path / "stereo.json").read_text())["tables"]
    assert tables["aloe"] == "kept" and tables["runs"]["rows"][0][:2] == [row["network"], 3]
    page = load_docs_tables().render_table(tmp_path / "stereo.json", "runs")
    assert "| 2.50 | 0.500 | 0.250 |" in page
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tables"] == ["runs"]
    (network / "all_results.json").write_text(json.dumps(results | {"task": "object-detection"}))
    with pytest.raises(DataError, match="results of object-detection"):
        read_run(network)


@pytest.mark.parametrize(
    ("flags", "message"),
    [([], "--runs, --networks"), (["--runs", "a", "--aloe_folder", "b"], "needs --networks"),
     (["--networks", "a", "--widths", "63"], "--widths"),
     (["--networks", "a", "--max_disparities", "18"], "--max_disparities must be multiples of 4")],
)  # fmt: skip
def test_what_can_t_be_measured_is_told_at_once(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        load_script("stereo_table").parse(flags)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_pictures_are_drawn(tmp_path):
    disparity = np.linspace(1, 9, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    aloe.draw_aloe(StereoSample(pixels, pixels, disparity, disparity > 2), {"ours": disparity}, tmp_path / "aloe.png")
    rows = [dict(network="no blocks", width=w, cpu_seconds=1.0, peak_mib=2.0, epe=3.0) for w in (64, 128)]
    stereo_resolution.draw_chart(rows, tmp_path / "chart.png")
    for name in ("aloe", "chart"):
        assert np.asarray(Image.open(tmp_path / f"{name}.png")).std() > 1


def load_docs_tables():
    import importlib.util

    spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
