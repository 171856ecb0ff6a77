#!/usr/bin/env bash
# transformers: from_pretrained(key_mapping=...) fills in the first group of a pattern only.
#
# A regular expression with two groups renames as re.sub would to \1 and a literal "\2": the tensors count as unexpected,
# the layers they belong to start from new weights, and only the load report says so. Write one pattern per value of the
# second group instead.
#
# Seen with Python 3.11, transformers 5.23.0, torch 2.13.0. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import re

from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
BertModel(config).save_pretrained("model")
file = "model/model.safetensors"
renamed = {
    re.sub(r"layer\.(\d+)\.attention\.self\.(query|key|value)\.", r"layer.\1.\2_proj.", name): tensor.clone()
    for name, tensor in load_file(file).items()
}
save_file(renamed, file, {"format": "pt"})

pattern, target = r"layer\.(\d+)\.(query|key|value)_proj\.", r"layer.\1.attention.self.\2."
by_re = {re.sub(pattern, target, name) for name in renamed}
_, report = BertModel.from_pretrained("model", key_mapping={pattern: target}, output_loading_info=True)
missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
print("missing:", missing)
print("unexpected:", unexpected)
assert set(missing) <= by_re, "re.sub would have named them"
assert len(missing) == 6 and all(r"\2" in name for name in unexpected)
PYTHON
