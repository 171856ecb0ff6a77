"""Protects the search for the longest text that trains: by a line through two lengths, then measured."""

import pytest
from repository import load_script

from fa_transformers.studies import peak_memory
from fa_transformers.studies.peak_memory import GRANULE, fit_line, longest_training

FIXED, SLOPE = 300 * 2**20, 100 * 2**10
TRAINING = {"training": True}


@pytest.fixture
def machine(monkeypatch):
    """A machine that takes `FIXED` bytes and `SLOPE` for a token, 5 % more from 8,192 tokens on, and has 4 GiB."""
    tried: list[int] = []

    def measure(name, num_tokens, options, device):
        tried.append(num_tokens)
        size = int((FIXED + SLOPE * num_tokens) * (1.05 if num_tokens >= 8192 else 1.0))
        return size if size < 4 * 2**30 else None

    monkeypatch.setattr(peak_memory, "measure", measure)
    return tried


def test_the_line_goes_through_two_lengths_below_the_budget(machine):
    fixed, slope = fit_line("MiniLM", 2**30, TRAINING, "cpu")
    assert slope == pytest.approx(SLOPE) and fixed == pytest.approx(FIXED)
    assert machine[0] % GRANULE == 0 and 1.5 * machine[0] < machine[1]
    with pytest.raises(ValueError, match="--budgets 0.25 GiB is too little for MiniLM"):
        fit_line("MiniLM", 2**28, TRAINING, "cpu")


def test_the_longest_text_is_measured_and_shortened_until_it_fits(machine):
    for budget in (2**30, 2 * 2**30):
        row = longest_training("MiniLM", budget, TRAINING, "cpu", (FIXED, SLOPE), None)
        assert row["tokens"] == machine[-1] and row["verified_gib"] <= budget / 2**30
        fits = (budget / (1.05 if row["tokens"] >= 8192 else 1.0) - FIXED) / SLOPE
        assert fits - 2 * GRANULE < row["tokens"] <= fits
    row = longest_training("MiniLM", 5 * 2**30, TRAINING, "cpu", (FIXED, SLOPE), None)
    assert 3.7 < row["verified_gib"] < 4  # more than this machine has was not taken for a success


def test_a_length_above_the_verified_ones_is_told_by_the_line(machine):
    row = longest_training("MiniLM", 2 * 2**30, TRAINING, "cpu", (FIXED, SLOPE), 4096)
    assert row["verified_gib"] is None and not machine
    assert row["tokens"] == (2 * 2**30 - FIXED) // SLOPE // GRANULE * GRANULE


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models", "BERT"], "--models BERT is unknown; choose from MiniLM, BERT-base"),
        (["--budgets", "8", "0"], "--budgets must be above 0 GiB each, got 0"),
    ],
)
def test_wrong_flags_are_named_before_anything_is_measured(flags, message, capsys):
    with pytest.raises(SystemExit):
        load_script("measure_memory").parse(flags)
    assert message in capsys.readouterr().err
