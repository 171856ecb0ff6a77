"""The certificate of a published model: what was checked on its own weights, in `certificate.json` and on its card.

`model_checks.py` runs the checks: here while publishing, and in the process of `self_check` when a folder is checked.
"""

import copy
import dataclasses
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..files import write_json
from ..tables import format_table, one_line
from .facts import FactError, check_facts, facts_from_dict
from .model_checks import (
    EXACT_BASIS,
    FAILED,
    MOST_OFF,
    NOT_APPLICABLE,
    PASSED,
    UNFIT,
    check_model,
    check_saved,
    digest_weights,
)

CERTIFICATE_FILE = "certificate.json"
OUTCOMES = (PASSED, FAILED, UNFIT, NOT_APPLICABLE)
MOST_ROWS = 64
SLACK = 4
"""Factor by which a difference may be another one on another machine, whose kernels round elsewhere."""
NEGLIGIBLE = 1 / 256
"""Share of the tolerance up to which any two differences agree."""


@dataclass(frozen=True, kw_only=True)
class CheckFacts:
    """One check on a model's own weights.

    Args:
        check: what was checked, "padding", "bfloat16 beside float64", ...
        inputs: what on, with lengths or sizes; None where nothing ran.
        outcome: "passed", "failed", "unfit" (of a precision that the model isn't stored in: its outputs are too far
            off) or "not applicable".
        difference: the largest one, as a share of the largest output; None where there is no figure, or it isn't
            finite.
        tolerance: what `difference` may be.
        basis: where the tolerance comes from.
        note: why it failed or isn't applicable.
        same, decisions: how many decisions of a classifier were those of float64, of how many.
    """

    check: str
    inputs: str | None
    outcome: str
    difference: float | None = None
    tolerance: float | None = None
    basis: str | None = None
    note: str | None = None
    same: int | None = None
    decisions: int | None = None

    def __post_init__(self) -> None:
        """Raises FactError, naming the fact, unless all are of their types and possible."""
        check_facts(self)
        if self.outcome not in OUTCOMES:
            raise FactError(f"fact 'outcome' must be one of {OUTCOMES}, got {self.outcome!r:.80}")
        for name in ("difference", "tolerance", "same", "decisions"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise FactError(f"fact '{name}' must not be negative, got {value!r:.80}")
        if self.tolerance is not None and self.tolerance > MOST_OFF:
            raise FactError(f"fact 'tolerance' must be at most {MOST_OFF}, got {self.tolerance!r:.80}")
        if (self.same is None) != (self.decisions is None) or (self.same or 0) > (self.decisions or 0):
            raise FactError(
                f"fact 'same' must be a part of 'decisions', got {self.same!r:.80} of {self.decisions!r:.80}"
            )
        has_figures = self.difference is not None and self.tolerance is not None
        if self.outcome == PASSED and has_figures and not self.difference <= self.tolerance:  # type: ignore[operator]
            raise FactError(f"fact 'outcome' is {PASSED!r}, but 'difference' is above 'tolerance'")

    @property
    def title(self) -> str:
        """The check and its inputs, in one line."""
        return one_line(self.check + (f" on {self.inputs}" if self.inputs else ""), 160)

    @property
    def result(self) -> str:
        """The outcome, why, and the decisions that stayed, for a table; a failure is in capitals."""
        text = self.outcome.upper() if self.outcome == FAILED else self.outcome
        text += f": {one_line(self.note)}" if self.note else ""
        return text + (f", same decision in {self.same:,} of {self.decisions:,}" if self.decisions else "")


@dataclass(frozen=True)
class Certificate:
    """The checks on a model's own weights; `rows` has one entry for each."""

    rows: list[CheckFacts]

    @property
    def failures(self) -> list[str]:
        """The checks that failed, each in one line with its reason."""
        return [f"{row.title}: {_explain(row)}" for row in self.rows if row.outcome == FAILED]

    def table(self) -> str:
        """Return the rows as an aligned text table."""
        columns = ("check", "on", "largest difference", "allowed", "result")
        lines = []
        for row in self.rows:
            cells = (row.check, row.inputs, format_share(row.difference), format_share(row.tolerance), row.result)
            lines.append(dict(zip(columns, cells, strict=True)))
        return format_table(lines, columns)

    def disagreements(self, other: "Certificate") -> list[str]:
        """Return what `other`, found on the same weights, says otherwise; machines may differ by a factor of `SLACK`.

        Which checks there are, what on, and what is allowed must be equal.
        """
        stated = {(row.check, row.inputs): row for row in self.rows}
        found = {(row.check, row.inputs): row for row in other.rows}
        lines = [f"{row.title}: not among its checks" for key, row in stated.items() if key not in found]
        lines += [f"{row.title}: missing" for key, row in found.items() if key not in stated]
        for key in stated.keys() & found.keys():
            if not _agree(stated[key], found[key]):
                lines.append(f"{stated[key].title}: says {_explain(stated[key])}, found {_explain(found[key])}")
        return lines or ([] if len(stated) == len(self.rows) else ["a check stands there twice"])

    @classmethod
    def from_list(cls, rows: Any) -> "Certificate":
        """Make a certificate from what `to_list` gives.

        Raises:
            FactError: it is something else.
        """
        if not isinstance(rows, list) or not 0 < len(rows) <= MOST_ROWS:
            raise FactError(f"a certificate must be a list of 1 to {MOST_ROWS} checks, got {rows!r:.80}")
        return cls([facts_from_dict(CheckFacts, row, f"[{index}].") for index, row in enumerate(rows)])

    def to_list(self) -> list[dict[str, Any]]:
        """Return the rows as JSON can hold them, for `from_list`."""
        return [dataclasses.asdict(row) for row in self.rows]

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Certificate":
        """Read a certificate's file.

        Raises:
            FactError: the file is not JSON or no certificate; the message names the file.
            OSError: the file cannot be read.
        """
        try:
            return cls.from_list(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise FactError(f"{os.fspath(path)} is no certificate: {error}") from error

    def save(self, path: str | os.PathLike) -> None:
        """Write a file that `load` reads back; it appears by rename."""
        write_json(path, self.to_list())


def measure(
    model: PreTrainedModel, processor: Any, auto_class: str, folder: str | os.PathLike | None = None
) -> Certificate:
    """Run every check on a model.

    Args:
        model, processor: an FA model, and its tokenizer or image processor. They stay as they are.
        auto_class: the Auto class that loads the model.
        folder: what `model.save_pretrained` wrote; None saves it to a temporary folder.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            model.save_pretrained(scratch)
        saved = check_saved(_read_back(model, Path(folder or scratch)), digest_weights(model))
    return Certificate.from_list([saved, *check_model(model, processor, auto_class)])


def format_share(share: float | None) -> str:
    """Return a share of the largest output for a table: two digits, "0", or "-" for None."""
    return "-" if share is None else f"{share:.2g}"


def _read_back(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A copy of the model that has nothing but the weights of a folder."""
    loaded = copy.deepcopy(model).to("cpu")
    with torch.no_grad():
        for tensor in loaded.state_dict().values():
            tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
    for path in sorted(folder.glob("*.safetensors")):
        loaded.load_state_dict(load_file(path), strict=False)
    return loaded


def _agree(stated: CheckFacts, found: CheckFacts) -> bool:
    """True where both say the same, within what differs between machines."""
    if (stated.outcome == FAILED) != (found.outcome == FAILED) or stated.tolerance != found.tolerance:
        return False
    if stated.decisions != found.decisions or (stated.difference is None) != (found.difference is None):
        return False
    if abs((stated.same or 0) - (found.same or 0)) > 1 + (stated.decisions or 0) // 8:
        return False
    if stated.difference is None or found.difference is None or found.tolerance is None:
        return stated.outcome == found.outcome
    low, high = sorted((stated.difference, found.difference))
    if stated.outcome != found.outcome and high <= found.tolerance:
        return False
    return found.basis == EXACT_BASIS or high <= SLACK * low or high <= NEGLIGIBLE * found.tolerance


def _explain(row: CheckFacts) -> str:
    parts = [row.outcome]
    if row.difference is not None:
        parts.append(f"{format_share(row.difference)} off, {format_share(row.tolerance)} allowed")
    if row.decisions is not None:
        parts.append(f"same decision in {row.same} of {row.decisions}")
    return ", ".join([*parts, *([one_line(row.note, 160)] if row.note else [])])
