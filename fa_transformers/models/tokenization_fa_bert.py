"""The tokenizer of FABert models with a table of "absolute" positions: it cuts a text that is longer than the table.

Transformers' pipelines don't ask for truncation, and a tokenizer without this one's code doesn't cut unless it is asked
to, whatever its files say.
"""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast, logging

logger = logging.get_logger(__name__)

STOCK_CLASS = "PreTrainedTokenizerFast"
PLACE_OF_TRUNCATION = 6
"""Place of `truncation` among the arguments of a tokenizer's call, from 0 on."""


class FABertTokenizerFast(PreTrainedTokenizerFast):
    """A fast tokenizer that cuts texts to `model_max_length` tokens where the call doesn't say `truncation`.

    The first text that is cut is told in a warning. With `truncation=False` nothing is cut. A saved folder loads
    without `trust_remote_code`, too: as the library's fast tokenizer, which gives the same tokens and cuts when asked.
    """

    def __call__(self, *args, **kwargs):
        is_said = len(args) > PLACE_OF_TRUNCATION or kwargs.get("truncation") is not None
        if is_said or kwargs.get("max_length") is not None:
            return super().__call__(*args, **kwargs)
        encoded = super().__call__(*args, **kwargs | {"truncation": True})
        if any(one.overflowing for one in encoded.encodings or ()) and not self.deprecation_warnings.get("cut"):
            logger.warning(
                "A text was cut to its first %s tokens, as many as the model has positions. Pass it in parts, or use a "
                'model with position_embedding_type="periodic", which reads any length.',
                f"{self.model_max_length:,}",
            )
            self.deprecation_warnings["cut"] = True
        return encoded

    def _save_pretrained(self, save_directory, file_names, *args, **kwargs):
        """Save as transformers does, but name a class of the library, which loads without this one's code.

        This hook is private, but the only one that `save_pretrained` calls between writing the settings and uploading.
        """
        for file in map(Path, file_names):
            if file.name.endswith("tokenizer_config.json"):
                settings = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": STOCK_CLASS}
                text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
                file.write_text(text, encoding="utf-8")
        return super()._save_pretrained(save_directory, file_names, *args, **kwargs)
