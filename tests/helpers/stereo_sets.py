"""Small stereo sets, written byte by byte: files, folders in the layouts of the known sets, pairs; a tiny network."""

import struct
import zlib

import numpy as np
from PIL import Image

from fa_transformers.data.readers.stereo_folders import StereoSample

MIDDLEBURY = """cam0=[3979.911 0 1244.772; 0 3979.911 1019.507; 0 0 1]
cam1=[3979.911 0 1369.115; 0 3979.911 1019.507; 0 0 1]
doffs=124.343
baseline=193.001
width=2964
height=1988
ndisp=270
isint=0
"""


HEIGHT, WIDTH, SHIFT = 12, 40, 5
# Sizes of a network for tests.
SMALL = {
    "max_disparity": 16,
    "feature_channels": 16,
    "dilations": (1, 2),
    "correlation_groups": 4,
    "concat_channels": 2,
    "volume_channels": 8,
    "num_hourglasses": 1,
}


def write_pfm(path, rows, kind="Pf", order="<", header=None):
    """A PFM file: bottom row first, each value once per channel."""
    channels = 3 if kind == "PF" else 1
    values = [value for row in reversed(rows) for value in row for _ in range(channels)]
    scale = "-1.0" if order == "<" else "1.0"
    head = header if header is not None else f"{kind}\n{len(rows[0])} {len(rows)}\n{scale}\n"
    path.write_bytes(head.encode() + struct.pack(f"{order}{len(values)}f", *values))
    return path


def write_png(path, rows, bits=16, colour_type=0):
    """A PNG file without filters."""
    channels = {0: 1, 2: 3}[colour_type]
    form = f">{len(rows[0]) * channels}{'H' if bits == 16 else 'B'}"
    lines = b"".join(b"\0" + struct.pack(form, *(v for value in row for v in [value] * channels)) for row in rows)

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), bits, colour_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def write_pair(left, right, seed: int = 0) -> None:
    """Noise, seen from the right SHIFT pixels further left."""
    scene = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH + SHIFT, 3), dtype=np.uint8)
    for path, picture in ((left, scene[:, :WIDTH]), (right, scene[:, SHIFT:])):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)


def write_disparity(path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pfm":
        write_pfm(path, [[float(SHIFT)] * WIDTH] * HEIGHT)
    else:
        write_png(path, [[SHIFT * 256] * WIDTH] * HEIGHT)


# Layout -> for a scene and frame: left, right, disparities.
LAYOUTS = {
    "scene flow": lambda root, n: (
        root / f"frames_finalpass/TRAIN/A/{n:04d}/left/0006.png",
        root / f"frames_finalpass/TRAIN/A/{n:04d}/right/0006.png",
        root / f"disparity/TRAIN/A/{n:04d}/left/0006.pfm",
    ),
    "scene flow, clean": lambda root, n: (
        root / f"frames_cleanpass/funnyworld/left/{n:04d}.webp",
        root / f"frames_cleanpass/funnyworld/right/{n:04d}.webp",
        root / f"disparity/funnyworld/left/{n:04d}.pfm",
    ),
    "kitti 2015": lambda root, n: (
        root / f"training/image_2/{n:06d}_10.png",
        root / f"training/image_3/{n:06d}_10.png",
        root / f"training/disp_occ_0/{n:06d}_10.png",
    ),
    "kitti 2012": lambda root, n: (
        root / f"colored_0/{n:06d}_10.png",
        root / f"colored_1/{n:06d}_10.png",
        root / f"disp_noc/{n:06d}_10.png",
    ),
    "middlebury": lambda root, n: (root / f"s{n}/im0.png", root / f"s{n}/im1.png", root / f"s{n}/disp0.pfm"),
    "middlebury v3": lambda root, n: (root / f"s{n}/im0.png", root / f"s{n}/im1.png", root / f"s{n}/disp0GT.pfm"),
}


def write_set(layout: str, root, count: int = 2) -> list:
    files = [LAYOUTS[layout](root, number) for number in range(count)]
    for number, (left, right, disparity) in enumerate(files):
        write_pair(left, right, number)
        write_disparity(disparity)
    return files


RANDOM = np.random.default_rng(0)


class Given(list):
    """Samples given in Python."""

    @property
    def sizes(self):
        return [sample.left.shape[:2] for sample in self]


def make_sample(height: int = 20, width: int = 50, shift: int = 7) -> StereoSample:
    scene = RANDOM.integers(0, 256, (height, width + shift, 3), dtype=np.uint8)
    disparity = np.full((height, width), float(shift), np.float32)
    return StereoSample(scene[:, :width], scene[:, shift:], disparity, np.ones((height, width), bool))
