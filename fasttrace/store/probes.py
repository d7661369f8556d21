"""Reading probe files: captions, the subject destroyed in each, its attribute and its seeds.

{"schema": 1, "probes": [{"prompt": "a photo of a dog", "subject": "dog",
                          "attribute": "object", "seeds": [0, 1]}]}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from fasttrace.errors import UsageError
from fasttrace.store.entries import read_entries
from fasttrace.types import Probe

_EXPECTED = '{"schema": 1, "probes": [{"prompt": "...", "subject": "...", "attribute": "..."}]}'

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class ProbeEntry(BaseModel):
    """One probe as it stands in the file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Text
    subject: Text
    attribute: str = ""
    occurrence: int = Field(default=0, ge=0)
    negative_prompt: str = ""
    seeds: list[Seed] | None = Field(default=None, min_length=1)

    def probe(self) -> Probe:
        return Probe(
            prompt=self.prompt,
            subject=self.subject,
            attribute=self.attribute,
            occurrence=self.occurrence,
            negative_prompt=self.negative_prompt,
        )


class ProbeFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    version: Literal[1] = Field(alias="schema")
    probes: list[ProbeEntry] = Field(min_length=1)


def read_probes(path: Path | str) -> list[ProbeEntry]:
    """The probes of a file. Raises `UsageError` naming the entry and the field that is wrong."""
    entries = read_entries(path, ProbeFile, "probes", _EXPECTED).probes
    seen: dict[Probe, int] = {}
    for number, entry in enumerate(entries, start=1):
        before = seen.setdefault(entry.probe(), number)
        if before != number:
            raise UsageError(
                f"the probes file {path} holds one probe twice: entries {before} and {number} are "
                f"both {entry.subject!r} in {entry.prompt!r}. Put their seeds into one entry."
            )
    return entries
