"""What an adaptive sweep settled: `until.json` beside the rows, written anew at each look."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fasttrace.errors import StoreError
from fasttrace.store.disk import disk_errors, write_atomic

SETTLED = "until.json"


class SettledSite(BaseModel):
    """One site (and token group). state: in the top set, out of it, or open.

    pairs: (prompt, seed) pairs that count and that it was run for. effect: its mean over those, in
    the metric's unit, so not comparable with a site of other pairs. lead: mean difference to the
    site it has to beat, over the pairs that both were run for, give or take half; None before the
    first look.
    """

    model_config = ConfigDict(extra="forbid")

    component: str
    site: str
    selector: str
    kind: str
    state: Literal["in", "out", "open"]
    pairs: int
    effect: float | None
    lead: float | None
    half: float | None

    @property
    def name(self) -> str:
        return self.site if self.selector == "all" else f"{self.site} @ {self.selector}"


class SettledRecord(BaseModel):
    """The state of an adaptive sweep; `words` says it in a sentence.

    until, budget: as asked for. metric: the score that decided. places: size of the top set. sites:
    best first. spent, exhaustive: runs of this sweep and of one of every site with every pair,
    clean and corrupt ones included. visited: of `pairs`, how many were run for some site; counted:
    those whose total effect is above the noise floor. left_out: sites that only some prompts have,
    which can't be compared and weren't run.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal["fasttrace adaptive sweep"] = "fasttrace adaptive sweep"
    version: Literal[1] = 1
    until: str
    budget: int | None
    metric: str
    words: str
    settled: bool
    why: str
    confidence: float
    places: int
    sites: list[SettledSite]
    spent: int
    exhaustive: int
    pairs: int
    visited: int
    counted: int
    left_out: int = 0

    @property
    def top(self) -> list[SettledSite]:
        """The top set; where `settled` is false a guess, apart from those that are in."""
        return self.sites[: self.places]

    def write(self, out: Path) -> None:
        write_atomic(out / SETTLED, (self.model_dump_json(indent=1) + "\n").encode())

    @classmethod
    def read(cls, out: Path) -> SettledRecord | None:
        """None where there was no adaptive sweep. Raises `StoreError` for a damaged file."""
        path = out / SETTLED
        with disk_errors(path):
            if not path.is_file():
                return None
            text = path.read_bytes()
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise StoreError(
                f"{path} is damaged or from another version of fasttrace: "
                f"{error.errors()[0]['msg']}. Remove it: the same `fasttrace trace --until` writes "
                "it anew from the rows."
            ) from error
