"""Reading files of phrases to rewrite.

{"schema": 1, "pairs": [{"old": "van gogh", "new": "painting"},
                        {"old": "a doctor", "new": ["a woman doctor", "a man doctor"]}]}
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fasttrace.store.entries import read_entries

_EXPECTED = '{"schema": 1, "pairs": [{"old": "van gogh", "new": "painting"}]}'


class PairEntry(BaseModel):
    """One pair as it stands in the file; the fields are those of `fasttrace.Replacement`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    old: str
    new: str | list[str]
    strength: float = 1.0
    weights: list[float] | None = None


class PairFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    version: Literal[1] = Field(alias="schema")
    pairs: list[PairEntry] = Field(min_length=1)


def read_pairs(path: Path | str) -> list[PairEntry]:
    """The pairs of a file. Raises `UsageError` naming the entry and the field that is wrong."""
    return read_entries(path, PairFile, "pairs", _EXPECTED).pairs
