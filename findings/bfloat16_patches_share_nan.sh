#!/usr/bin/env bash
# torch: in bfloat16 on CPUs a patch convolution carries a NaN into the patch before it.
#
# Patches of a vision transformer don't overlap (stride = kernel), so one patch's content has no way into another's
# output, and in float32 it has none. In bfloat16 the patch to the left of a NaN is NaN, too, for kernels of 8, 14 and 16
# on three channels. Masking a broken patch afterwards is too late; set it to zero before the convolution.
#
# Seen with Python 3.11, torch 2.13.0 (CPU build). Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch

torch.manual_seed(0)
for size in (8, 14, 16):
    for dtype in (torch.float32, torch.bfloat16):
        convolution = torch.nn.Conv2d(3, 32, size, stride=size, dtype=dtype)
        image = torch.randn(1, 3, size, 4 * size, dtype=dtype)
        image[..., 2 * size : 3 * size] = float("nan")  # the third of four patches
        broken = convolution(image)[0, :, 0].isnan().any(dim=0).tolist()
        print(f"patches of {size}, {dtype}: NaN in patch {[index for index, is_nan in enumerate(broken, 1) if is_nan]}")
        expected = [False, dtype == torch.bfloat16, True, False]
        assert broken == expected, "the behaviour has changed"
PYTHON
