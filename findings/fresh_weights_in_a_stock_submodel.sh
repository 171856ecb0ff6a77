#!/usr/bin/env bash
# transformers: a new module inside a stock submodel is left uninitialised by from_pretrained.
#
# _init_weights of the outermost class is not asked for what lies inside a nested PreTrainedModel: there the nested class's
# own _init_weights is, which does not know the module. Its constructor ran without memory, so the weights are whatever
# the memory held, while the same module beside the submodel, and both of them in a model made by the constructor, start
# right. Nothing warns beyond "MISSING: newly initialized". Make the submodel a class of your own, too.
#
# Seen with Python 3.11, transformers 5.23.0, torch 2.13.0. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(64, 64))


class ScaledBert(BertForSequenceClassification):
    def __init__(self, config):
        super().__init__(config)
        self.bert.encoder.scale = Scale()
        self.scale = Scale()
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Scale):
            nn.init.ones_(module.factor)


def is_one(module):
    return bool((module.factor == 1).all())


config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
built = ScaledBert(config)
BertForSequenceClassification(config).save_pretrained("model")
loaded = ScaledBert.from_pretrained("model")
for name, model in (("constructor", built), ("from_pretrained", loaded)):
    print(f"{name}: own module right {is_one(model.scale)}, nested module right {is_one(model.bert.encoder.scale)}")
assert is_one(built.scale) and is_one(built.bert.encoder.scale)
assert is_one(loaded.scale) and not is_one(loaded.bert.encoder.scale)
PYTHON
