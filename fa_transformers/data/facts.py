"""The facts of a data set that go wherever a model goes that learnt from it: name, licence, attribution."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """A data set the model was trained or scored on.

    Args:
        name: what readers call it, with its version.
        license: its licence, as an SPDX identifier where there is one.
        attribution: whom the licence asks to credit, and where the data comes from.
        hub_id: "owner/name" on the Hub, None when the data is not there.
    """

    name: str
    license: str
    attribution: str
    hub_id: str | None = None
