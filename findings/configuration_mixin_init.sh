#!/usr/bin/env bash
# transformers: a configuration class without its own __init__ passes that of a mixin by.
#
# Every subclass of PretrainedConfig is made a dataclass, and one whose body has no __init__ gets a generated one, which
# calls no other. A mixin's __init__ that comes first in the order of methods never runs: its defaults are missing (the
# field exists only when it was given), and so are its checks. An __init__ in the class itself, even one line that calls
# super().__init__(**kwargs), brings it back.
#
# Seen with Python 3.11, transformers 5.23.0, torch 2.13.0. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from transformers import BertConfig


class WindowField:
    def __init__(self, *, window=8, **kwargs):
        if window < 0:
            raise ValueError("window must not be negative")
        super().__init__(**kwargs)
        self.window = window


class Plain(WindowField, BertConfig):
    model_type = "plain"


class WithInit(WindowField, BertConfig):
    model_type = "with_init"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


def is_refused(config_class):
    try:
        config_class(window=-1)
    except ValueError:
        return True
    return False


for config_class in (Plain, WithInit):
    default = getattr(config_class(), "window", "no such field")
    print(f"{config_class.__name__}: default {default}, -1 is refused: {is_refused(config_class)}")
assert not hasattr(Plain(), "window") and not is_refused(Plain)
assert WithInit().window == 8 and is_refused(WithInit)
PYTHON
