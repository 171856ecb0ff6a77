"""No drawn model or batch fails a check of the fuzz, and the fuzz finds what is broken on purpose."""

import json
import shlex
import sys

import fuzz
import pytest
import torch
from sequence_parallel_ranks import run_on_ranks

from fa_transformers.models import fa_chunked, fa_mixer
from fa_transformers.models.fa_mixer import FactorizedMixer
from fa_transformers.models.fa_packed import PackedDocuments


@pytest.fixture(autouse=True)
def one_thread():
    """Sums of so few numbers take longer on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def report(found) -> str:
    return "\n".join(f"{failure}\n    {fuzz.command(case)}" for case, failure in found)


# In parts, so that the first failure is seen early.
@pytest.mark.parametrize("start", range(0, 200, 50))
def test_two_hundred_draws_pass_every_check(start):
    found = fuzz.fuzz(0, range(start, start + 50))
    assert not found, report(found)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(200, 2000, 200))
def test_two_thousand_draws_pass_every_check(start):
    found = fuzz.fuzz(0, range(start, start + 200))
    assert not found, report(found)


def draws_on_ranks(rank, size, group) -> list[str]:
    failures = []
    for index in range(120):
        case = fuzz.draw(1, index)
        failure = fuzz.find_failure(case, group)
        if failure is not None:
            failures.append(f"{failure} of {size} ranks: {json.dumps(case)}")
    return failures


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_draws_split_over_processes_give_what_one_process_gives(size, tmp_path):
    for found in run_on_ranks({"draws": draws_on_ranks}, size, tmp_path)["draws"]:
        assert found == []


# Breaks


def drop_terms_without_reach(monkeypatch):
    cut = fa_chunked._cut

    def zero_is_none(num_tokens, num_prefix, columns, halo, layout):
        return cut(num_tokens, num_prefix, columns, halo or None, layout)

    monkeypatch.setattr(fa_chunked, "_cut", zero_is_none)


def ignore_the_mask_in_the_context(monkeypatch):
    attend = fa_mixer.unchecked_attention
    monkeypatch.setattr(
        fa_mixer,
        "unchecked_attention",
        lambda query, key, value, mask, documents, **options: attend(query, key, value, None, documents, **options),
    )


def ignore_segments_in_the_window(monkeypatch):
    attend = fa_mixer.window_attention
    monkeypatch.setattr(
        fa_mixer,
        "window_attention",
        lambda query, key, value, segments, window: attend(query, key, value, None, window),
    )


def count_positions_through_a_packed_row(monkeypatch):
    init = PackedDocuments.__init__

    def start_at_zero_once(self, cu_seqlens, num_tokens):
        init(self, cu_seqlens, num_tokens)
        self.positions = torch.arange(num_tokens)

    monkeypatch.setattr(PackedDocuments, "__init__", start_at_zero_once)


def shorten_the_halo(monkeypatch):
    reach = FactorizedMixer.reach.fget

    def shorter(self):
        return reach(self) and max(0, reach(self) - 1)

    monkeypatch.setattr(FactorizedMixer, "reach", property(shorter))


def let_nan_into_the_softmax(monkeypatch):
    monkeypatch.setattr(
        fa_mixer.SoftmaxMixer,
        "forward",
        lambda self, query, key, value, layout=fa_mixer.PLAIN: torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=None if layout.mask is None else layout.mask[:, None, None]
        ),
    )


BREAKS = {
    drop_terms_without_reach: {"local_kernel_size"},
    ignore_the_mask_in_the_context: set(),
    ignore_segments_in_the_window: {"local_window"},
    count_positions_through_a_packed_row: {"position_embedding_type"},
    shorten_the_halo: set(),
    let_nan_into_the_softmax: {"softmax_layers"},
}


@pytest.mark.parametrize("break_code", BREAKS, ids=lambda function: function.__name__)
def test_a_break_is_found_and_shrunk_to_what_it_needs(break_code, monkeypatch, capsys):
    break_code(monkeypatch)
    for index in range(60):
        case = fuzz.draw(2, index)
        failure = fuzz.find_failure(case)
        if failure is not None:
            break
    else:
        pytest.fail("60 draws did not find it")
    small = fuzz.shrink(case, failure)
    assert set(small) >= BREAKS[break_code]
    assert set(small) <= set(case) and len(small) <= 6, small
    command = shlex.split(fuzz.command(small))
    monkeypatch.setattr(sys, "argv", command[1:])
    assert fuzz.main() == 1
    assert shlex.join(command) in capsys.readouterr().out
    monkeypatch.undo()
    assert fuzz.find_failure(small) is None


def test_draws_repeat_and_cover_every_option():
    cases = [fuzz.draw(0, index) for index in range(200)]
    assert cases == [fuzz.draw(0, index) for index in range(200)]
    assert {name for case in cases for name in case} == set(fuzz.DEFAULTS)
    assert json.loads(json.dumps(cases)) == cases
    sizes = {case.get("local_kernel_size", 0) for case in cases}
    assert sizes >= {0, 1, 3, 5} and {case["dtype"] for case in cases if "dtype" in case} >= {"float32", "bfloat16"}


def test_a_case_with_an_unknown_option_is_an_error():
    failure = fuzz.find_failure({"local_windows": 3})
    assert failure is not None and "local_windows" in failure.message
