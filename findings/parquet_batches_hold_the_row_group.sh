#!/usr/bin/env bash
# pyarrow: neither a small batch nor a small page bounds the memory that reading a parquet file of long texts takes.
#
# iter_batches(batch_size=16) bounds the rows that are handed out: by default the column of a whole row group is fetched
# before the first batch, and held twice over. With pre_buffer=False and a buffer_size a page is read at a time, but
# data_page_size (1 MiB) doesn't bound a page: the writer looks at it only every write_batch_size = 1,024 rows, so
# 1,000 rows of 0.2 MB are one page of 191 MiB. Only a file written with a small write_batch_size is read in little.
#
# Seen with Python 3.11, pyarrow 26.0.1. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check pyarrow==26.0.1
cd "$folder"
export HF_HOME="$folder/cache"
"$folder/venv/bin/python" - <<'PYTHON'
import random

import pyarrow
import pyarrow.parquet

random.seed(0)
texts = [random.randbytes(100_000).hex() for _ in range(1000)]
size = sum(map(len, texts)) / 2**20
for name, options in (("usual", {}), ("small", {"write_batch_size": 16})):
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), f"{name}.parquet", compression="none", **options)
del texts


def peak_of(name, **options):
    peak = 0
    for _ in pyarrow.parquet.ParquetFile(f"{name}.parquet", **options).iter_batches(batch_size=16):
        peak = max(peak, pyarrow.total_allocated_bytes() / 2**20)
    return peak


buffered = {"pre_buffer": False, "buffer_size": 2**20}
peaks = [peak_of("usual"), peak_of("usual", **buffered), peak_of("small", **buffered)]
print(f"{size:.0f} MiB of text in one row group, read 16 rows (3 MiB) at a time, hold at most:")
for what, peak in zip(("by default", "with a buffer", "with a buffer, written 16 rows at a time"), peaks):
    print(f"{peak:6.0f} MiB {what}")
assert peaks[0] > 1.5 * size and peaks[1] > 0.9 * size and peaks[2] < 0.2 * size
PYTHON
