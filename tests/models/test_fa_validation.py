"""Protects the checks of what callers hand in: a wrong argument raises a ValueError that names it."""

import pytest
import torch


def wrong_inputs() -> dict[str, tuple[dict, str]]:
    """Name of the case -> (arguments that replace good ones, what the message must name)."""

    def zeros(*shape, **options):
        return torch.zeros(*shape, **options)

    return {
        "query of rank 3": ({"query": zeros(2, 4, 6)}, "`query` must be"),
        "key of rank 5": ({"key": zeros(2, 3, 5, 6, 1)}, "`key` must be"),
        "value of rank 3": ({"value": zeros(2, 3, 5)}, "`value` must be"),
        "integer query": ({"query": zeros(2, 3, 4, 6, dtype=torch.int64)}, "`query` must be a floating-point"),
        "integer value": ({"value": zeros(2, 3, 5, 7, dtype=torch.int64)}, "`value` must be a floating-point"),
        "key of another dtype": ({"key": zeros(2, 3, 5, 6, dtype=torch.float16)}, "`key` is torch.float16"),
        "value of another dtype": ({"value": zeros(2, 3, 5, 7, dtype=torch.float64)}, "`value` is torch.float64"),
        "key on another device": ({"key": zeros(2, 3, 5, 6, device="meta")}, "`key` is .* on meta"),
        "value on another device": ({"value": zeros(2, 3, 5, 7, device="meta")}, "`value` is .* on meta"),
        "other batch of key": ({"key": zeros(1, 3, 5, 6)}, "same batch and head"),
        "other head count of value": ({"value": zeros(2, 1, 5, 7)}, "same batch and head"),
        "other key width": ({"key": zeros(2, 3, 5, 4)}, "`key` has width 4"),
        "no features": ({"query": zeros(2, 3, 4, 0), "key": zeros(2, 3, 5, 0)}, "`query` and `key` .* width 0"),
        "other number of values": ({"value": zeros(2, 3, 6, 7)}, "`value` has 6 positions"),
        "integer mask": ({"mask": torch.ones(2, 5, dtype=torch.int64)}, "`mask` must be bool"),
        "additive mask": ({"mask": zeros(2, 5)}, "`mask` must be bool"),
        "mask over queries": ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"`mask` must be .* \(2, 5\)"),
        "mask of rank 4": ({"mask": torch.ones(2, 1, 1, 5, dtype=torch.bool)}, "`mask` must be"),
        "mask that would broadcast": ({"mask": torch.ones(1, 5, dtype=torch.bool)}, "`mask` must be"),
        "mask on another device": ({"mask": torch.ones(2, 5, dtype=torch.bool, device="meta")}, "`mask` is on meta"),
        "unknown normalization": ({"normalization": "relu"}, "`normalization` must be one of .*'relu'"),
        "scale with softmax": ({"scale": 0.5}, "`scale` applies to"),
        "unknown implementation": ({"impl": "cuda"}, "`impl` must be one of .*'cuda'"),
    }


@pytest.mark.parametrize("case", wrong_inputs())
def test_wrong_input_raises_a_value_error_that_names_the_argument(attend, case):
    changes, message = wrong_inputs()[case]
    good = {"query": torch.zeros(2, 3, 4, 6), "key": torch.zeros(2, 3, 5, 6), "value": torch.zeros(2, 3, 5, 7)}
    attend(**good)
    with pytest.raises(ValueError, match=message):
        attend(**{**good, **changes})
