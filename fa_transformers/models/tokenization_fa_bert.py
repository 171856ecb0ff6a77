"""The tokenizer of FABert models with a table of "absolute" positions: it cuts a text that is longer than the table.

Transformers' pipelines don't ask for truncation, and a tokenizer without this one's code doesn't cut unless it is asked
to, whatever its files say.
"""

from transformers import PreTrainedTokenizerFast, logging

logger = logging.get_logger(__name__)

PLACE_OF_TRUNCATION = 6
"""Place of `truncation` among the arguments of a tokenizer's call, from 0 on."""


class FABertTokenizerFast(PreTrainedTokenizerFast):
    """A fast tokenizer that cuts texts to `model_max_length` tokens where the call doesn't say `truncation`.

    The first text that is cut is told in a warning. With `truncation=False` nothing is cut.
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
