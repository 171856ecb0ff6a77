"""The operator by each of its implementations that run on a CPU."""

from functools import partial

import pytest

from fa_transformers import factorized_attention


@pytest.fixture(params=["blocked", "reference"])
def attend(request):
    """`factorized_attention` by one implementation: a test that takes it holds for each."""
    return partial(factorized_attention, impl=request.param)
