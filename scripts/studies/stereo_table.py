"""Tables of trained stereo networks: runs with and without blocks, growing images, and a real pair beside OpenCV.

python scripts/studies/stereo_table.py --runs outputs/stereo0 outputs/stereo0_none outputs/stereo1 outputs/stereo1_none
python scripts/studies/stereo_table.py --networks outputs/stereo0 outputs/stereo0_none      # 256 to 2,048 px
python scripts/studies/stereo_table.py --networks outputs/stereo0 --widths --aloe_folder photos --max_disparities 112

The folders are those of `fa-transformers finetune_stereo`, with `--attention_blocks` alone for one without blocks. The
last command needs Debian's package opencv-doc, whose pictures are in /usr/share/doc, and takes the rows of OpenCV from
opencv-python-headless where that is installed, else as they were recorded. Writes stereo.json, stereo.png and aloe.png;
tables of the stereo.json that is there already are kept where they aren't measured anew.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fa_transformers.checks import check_positive
from fa_transformers.commands.flags import describe_command, mistakes_in_one_line, script_parser
from fa_transformers.options import OptionGroup, option
from fa_transformers.studies.aloe import draw_aloe, read_aloe, score_aloe
from fa_transformers.studies.page_tables import make_table, update_tables
from fa_transformers.studies.stereo_resolution import draw_chart, measure, read_run
from fa_transformers.tables import counted, format_table

PROGRAM = "python scripts/studies/stereo_table.py"
ABOUT = "Trained stereo networks: with and without blocks, on growing images, and on a real pair."
MEBIBYTES = {"name": "peak memory, MiB", "digits": 0}
SHARE = {"name": "over 3 px", "digits": 3}
RUN_COLUMNS: dict[str, dict[str, Any]] = {
    "network": {"name": "network"}, "seed": {"name": "seed"}, "parameters": {"name": "parameters"},
    "steps": {"name": "steps"}, "minutes": {"name": "minutes of training", "digits": 0},
    "epe": {"name": "end-point error, px", "digits": 2}, "over_1px": {"name": "over 1 px", "digits": 3},
    "over_3px": SHARE, "d1": {"name": "D1", "digits": 3}, "constant_epe": {"name": "a constant guess, px", "digits": 2},
}  # fmt: skip
WIDTH_COLUMNS: dict[str, dict[str, Any]] = {
    "network": {"name": "network"}, "width": {"name": "width, px"}, "height": {"name": "height, px"},
    "cpu_seconds": {"name": "forward pass, CPU seconds", "digits": 2}, "peak_mib": MEBIBYTES,
    "epe": {"name": "end-point error, px", "digits": 2}, "over_3px": SHARE,
}  # fmt: skip
ALOE_COLUMNS: dict[str, dict[str, Any]] = {
    "method": {"name": "method"}, "max_disparity": {"name": "looks for less than, px"},
    "scale": {"name": "images at", "digits": 3}, "answered": {"name": "answers", "digits": 3},
    "epe_answered": {"name": "end-point error there, px", "digits": 2},
    "epe": {"name": "end-point error, holes filled, px", "digits": 2}, "over_3px": SHARE,
    "cpu_seconds": {"name": "CPU seconds", "digits": 1},
}  # fmt: skip


@dataclass(frozen=True)
class StereoTableOptions(OptionGroup):
    """The folders to read and to measure."""

    runs: tuple[Path, ...] = option(
        (), "folders of finished finetune_stereo runs, a row each", group="stereo", common=True
    )
    networks: tuple[Path, ...] = option(
        (), "folders of trained networks to run on growing scenes and on the real pair", group="stereo", common=True
    )
    widths: tuple[int, ...] = option(
        (256, 512, 1024, 2048), "widths of the scenes in pixels, heights are half; none = no scenes", group="stereo",
        common=True,
    )  # fmt: skip
    num_scenes: int = option(4, "scenes of each width", group="stereo", common=True)
    seed: int = option(0, "of the scenes", group="stereo", common=True)
    aloe_folder: Path | None = option(
        None, "folder with aloeL.jpg, aloeR.jpg and aloeGT.png; unset = no real pair", group="stereo", common=True
    )
    max_disparities: tuple[int, ...] = option(
        (), "ranges to look for on the real pair besides the network's own, multiples of 4", group="stereo", common=True
    )
    output_dir: Path = option(Path("outputs/stereo_table"), "folder for the results", group="stereo", common=True)

    def check(self) -> None:
        """Raise ValueError, naming the flag, for what can't be measured."""
        check_positive(self, "num_scenes")
        if any(width < 64 or width % 2 for width in self.widths):
            raise ValueError(f"--widths must be even and at least 64 px each, got {list(self.widths)}.")
        if any(limit < 8 or limit % 4 for limit in self.max_disparities):
            limits = list(self.max_disparities)
            raise ValueError(f"--max_disparities must be multiples of 4 of at least 8, got {limits}.")
        if not self.runs and not self.networks:
            raise ValueError("give --runs, --networks or both: there is nothing to measure.")
        if self.aloe_folder and not self.networks:
            raise ValueError("--aloe_folder needs --networks to run on the pair.")


def parse(argv: Sequence[str] | None = None) -> tuple[StereoTableOptions, str]:
    """Return the options, checked, and the command."""
    parser = script_parser(PROGRAM, __doc__)
    parser.add_options(StereoTableOptions, ("stereo",), "stereo")
    parsed = parser.parse(argv)
    try:
        parsed[StereoTableOptions].check()
    except ValueError as error:
        parsed.fail(str(error))
    return parsed[StereoTableOptions], describe_command(PROGRAM, parsed.flags)


def measure_tables(options: StereoTableOptions, command: str) -> dict[str, dict[str, Any]]:
    """Return the tables that the options ask for, by name, and draw their pictures."""
    tables = {}
    if options.runs:
        rows = [read_run(folder) for folder in options.runs]
        note = f"The errors are those of {rows[0]['scenes']} held-out scenes, occluded pixels too."
        title = "Stereo networks trained on generated scenes"
        tables["runs"] = make_table(title, command, RUN_COLUMNS, rows, note=note)
        print(format_table(rows, list(RUN_COLUMNS)))
    if options.networks and options.widths:
        points = [(folder, width) for folder in options.networks for width in options.widths]
        rows = [measure(*point, options.num_scenes, options.seed) for point in tqdm(points, desc="scenes")]
        scenes = counted(options.num_scenes, "scene")
        title = f"Time, memory and error of a forward pass by the size of the images, {scenes} each"
        tables["resolution"] = make_table(title, command, WIDTH_COLUMNS, rows)
        draw_chart(rows, options.output_dir / "stereo.png")
        print(format_table(rows, list(WIDTH_COLUMNS)))
    if options.aloe_folder:
        sample = read_aloe(options.aloe_folder)
        result = score_aloe(options.networks, sample, options.max_disparities)
        tables["aloe"] = make_table(
            "Errors on a real pair, Aloe, in pixels of the whole image", command, ALOE_COLUMNS, result.rows
        )
        draw_aloe(sample, result.maps, options.output_dir / "aloe.png")
        print(format_table(result.rows, list(ALOE_COLUMNS)))
    return tables


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options, command = parse(argv)
    tables = measure_tables(options, command)
    update_tables(options.output_dir / "stereo.json", ABOUT, tables)
    print(json.dumps({"tables": list(tables), "output_dir": str(options.output_dir)}))
    return tables


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
