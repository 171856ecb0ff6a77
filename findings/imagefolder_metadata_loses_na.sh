#!/usr/bin/env bash
# datasets: a class called "NA" in the metadata.csv of an image folder is read as no label at all.
#
# load_dataset("imagefolder") reads metadata.csv by pandas' rules for missing values, so the labels NA, null and None (North
# America, Namibia, a person called Null) come out as None, without a word, beside labels that are kept. There is no option
# to pass: the builder calls the csv reader itself. The same labels in metadata.jsonl are kept.
#
# Seen with Python 3.11, datasets 5.2.0, pandas 3. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check datasets==5.2.0 Pillow==13.0.0
cd "$folder"
export HF_HOME="$folder/cache"
"$folder/venv/bin/python" - <<'PYTHON'
import csv
import json
from pathlib import Path

import datasets
from PIL import Image

datasets.disable_progress_bars()
labels = ["NA", "null", "None", "EU"]
found = {}
for ending in ("csv", "jsonl"):
    folder = Path(f"pictures-{ending}")
    folder.mkdir()
    names = [f"{number}.png" for number in range(len(labels))]
    for number, name in enumerate(names):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(folder / name)
    with open(folder / f"metadata.{ending}", "w", newline="") as file:
        if ending == "csv":
            csv.writer(file).writerows([("file_name", "label"), *zip(names, labels)])
        else:
            file.writelines(json.dumps({"file_name": name, "label": label}) + "\n" for name, label in zip(names, labels))
    loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    found[ending] = loaded["label"][:]
    print(f"metadata.{ending}: {found[ending]}")
assert found["csv"] == [None, None, None, "EU"]
assert found["jsonl"] == labels
PYTHON
