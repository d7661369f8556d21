"""What a directory was made with: the values no later call may change, and every call so far."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fasttrace.errors import StoreError
from fasttrace.store.disk import OURS, disk_errors, write_atomic

MANIFEST = "fasttrace.json"


class Call(BaseModel):
    """One invocation that wrote into the directory; the report prints how to repeat it."""

    model_config = ConfigDict(extra="forbid")

    command: str  # as typed, quoted for a shell
    started: str  # ISO 8601, UTC
    shard: str = "0/1"
    planned: int = 0  # rows of this call's whole plan, every shard's included
    versions: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def now(cls, command: str, **values: Any) -> Call:
        """A call that starts at this moment."""
        return cls(command=command, started=datetime.now(UTC).isoformat("T", "seconds"), **values)


class Manifest(BaseModel):
    """The content of `fasttrace.json`.

    fixed: what determines a score and is the same for every row (model fingerprint, sampling,
        corruption, metric, branch, window, engine, dtype); a call with another value is refused.
    resolved: values worked out by the first call and reused by later ones (sigma depends on the
        probes, so adding a prompt would change it).
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal["fasttrace results"] = "fasttrace results"
    version: Literal[1] = 1
    fixed: dict[str, Any]
    resolved: dict[str, Any] = Field(default_factory=dict)
    calls: list[Call] = Field(default_factory=list)

    @classmethod
    def read(cls, out: Path) -> Manifest | None:
        """The directory's manifest; None where `out` is new or empty.

        Raises `StoreError` where it belongs to something else or its manifest is damaged.
        """
        with disk_errors(out):
            if not out.exists():
                return None
            if not out.is_dir():
                raise StoreError(
                    f"{out} is a file, not a directory. Choose another directory with --out."
                )
            path = out / MANIFEST
            if not path.is_file():
                strangers = sorted(p.name for p in out.iterdir() if not p.name.startswith(OURS))
                if strangers:
                    raise StoreError(
                        f"{out} belongs to something else: it holds {_some(strangers)} and no "
                        f"{MANIFEST}. Choose another directory with --out."
                    )
                return None
            text = path.read_bytes()
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the file"
            raise StoreError(
                f"{path} is damaged or from another version of fasttrace ({place}: "
                f"{first['msg']}). The rows under {out / 'rows'} are untouched: restore "
                f"{MANIFEST} from a copy, or choose another directory with --out."
            ) from error

    def write(self, out: Path) -> None:
        write_atomic(out / MANIFEST, (self.model_dump_json(indent=1) + "\n").encode())

    def refuse_other(self, out: Path, fixed: Mapping[str, Any]) -> None:
        """Raise `StoreError` that names each value in which `fixed` differs from this directory."""
        ours = json.loads(json.dumps(dict(fixed)))  # as it would come back from the file
        names = [*self.fixed, *(name for name in ours if name not in self.fixed)]
        changed = [name for name in names if self.fixed.get(name) != ours.get(name)]
        if not changed:
            return
        if "saved_from" in changed:
            one, other = "saved from Python", "written by `fasttrace trace`"
            if "saved_from" not in self.fixed:
                one, other = other, one
            raise StoreError(
                f"{out} holds results {one}, so nothing {other} can be added: choose another "
                "directory (--out)."
            )
        was = ", ".join(f"{name}={_show(self.fixed.get(name))}" for name in changed)
        asked = ", ".join(f"{name}={_show(ours.get(name))}" for name in changed)
        raise StoreError(
            f"{out} was made with {was}; this call asks for {asked}. A directory can be extended "
            "with more prompts, seeds and sites, but keeps its other values: choose another --out."
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _show(value: Any) -> str:
    if value is None:
        return "(none)"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 48 else f"{text[:45]}..."
