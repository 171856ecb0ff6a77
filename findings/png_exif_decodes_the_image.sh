#!/usr/bin/env bash
# Pillow: asking a PNG file for its EXIF orientation decodes the whole image.
#
# `Image.open` reads a head, and of a JPEG `getexif()` too. Of a PNG without EXIF in its head, which is every usual one,
# `getexif()` decodes all pixels, as the data could stand at the end of the file: reading the upright sizes of a folder of
# PNGs, which need nothing but the orientation, takes the time of decoding all of them. `Image.Image.getexif(image)`, the
# method of the base class, reads the head alone.
#
# Seen with Python 3.11, Pillow 13.0.0. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check pillow==13.0.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import time

import numpy as np
from PIL import Image

pixels = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), np.uint8)
milliseconds = {}
for name in ("photo.png", "photo.jpg"):
    Image.fromarray(pixels).save(name)
    for way, getexif in {"its own": lambda image: image.getexif(), "the base class's": Image.Image.getexif}.items():
        with Image.open(name) as image:
            started = time.perf_counter()
            getexif(image)
            milliseconds[name, way] = 1000 * (time.perf_counter() - started)
        print(f"{name}, {way} getexif: {milliseconds[name, way]:.1f} ms")
assert milliseconds["photo.png", "its own"] > 10 * milliseconds["photo.png", "the base class's"], "it has changed"
assert milliseconds["photo.png", "its own"] > 10 * milliseconds["photo.jpg", "its own"], "it has changed"
PYTHON
