"""Reading files of phrases to rewrite.

{"schema": 1, "pairs": [{"old": "van gogh", "new": "painting"},
                        {"old": "a doctor", "new": ["a woman doctor", "a man doctor"]}]}
"""

from __future__ import annotations

from codecs import BOM_UTF8
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fasttrace.errors import UsageError


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
    path = Path(path)
    try:
        text = path.read_bytes().removeprefix(BOM_UTF8)
    except OSError as error:
        raise UsageError(f"the pairs file {path} can't be read ({error.strerror}).") from error
    try:
        return PairFile.model_validate_json(text).pairs
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UsageError(
            f"the pairs file {path} is malformed: {place}: {first['msg'].lower()}. Expected is "
            '{"schema": 1, "pairs": [{"old": "van gogh", "new": "painting"}]}.'
        ) from error
