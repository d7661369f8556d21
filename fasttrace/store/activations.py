"""Data sets of activations on disk: safetensors shards beside a manifest, appended and resumed.

DIR/activations.json             what all samples share
DIR/shard-00000.safetensors      some samples; their descriptions are the shard's own metadata

A shard is written whole or not at all, so a kill loses the samples that wait in memory, never one
that is on the disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fasttrace.errors import StoreError
from fasttrace.store.disk import (
    OURS,
    Writing,
    disk_errors,
    lock,
    make_folder,
    read_errors,
    remove_leftovers,
    write_atomic,
)

MANIFEST = "activations.json"
WRITING = Writing("the activations ", "every finished shard is safe")


class ActivationsManifest(BaseModel):
    """The content of `activations.json`. fixed: what may not change within a directory."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["fasttrace activations"] = "fasttrace activations"
    version: Literal[1] = 1
    fixed: dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One run's activations: `about` says which run, `shard` and `number` where they lie."""

    key: str
    about: Mapping[str, Any]
    shard: Path
    number: int

    def __getitem__(self, site: str) -> Tensor:
        """[calls, ...], read now. Raises `StoreError` for a site it doesn't have."""
        name = f"{self.number}/{site}"
        with read_errors(self.shard), safe_open(self.shard, "pt") as file:
            if name not in file.keys():  # noqa: SIM118  it is no dictionary
                raise StoreError(f"{self.shard} holds no {site} of sample {self.number}.")
            found: Tensor = file.get_tensor(name)
        return found


class Activations:
    """The samples of a directory, oldest first; tensors are read when they are asked for."""

    def __init__(self, folder: Path | str) -> None:
        """Raises `StoreError` where there is no such data set, or it is damaged."""
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise StoreError(f"{folder} holds no activations (there is no {MANIFEST}).")
        self.fixed = manifest.fixed
        self.samples = [s for path in _shards(self.folder) for s in _read_shard(path)]

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.fixed["sites"])

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def __getitem__(self, number: int) -> Sample:
        return self.samples[number]

    def mean(self, site: str) -> Tensor:
        """Over all samples, [calls, ...] in float64: one sample in memory at a time."""
        if not self.samples:
            raise StoreError(f"{self.folder} holds no samples yet.")
        total: Tensor | None = None
        for sample in self.samples:
            value = sample[site].double()
            total = value if total is None else total + value
        assert total is not None
        return total / len(self.samples)


@dataclass
class Writer:
    """The writing end of a data set. A context manager; what waits is written when it ends.

    shard_bytes: a shard is written once so much waits; one sample may be larger.
    """

    folder: Path
    shard_bytes: int
    known: set[str]
    number: int
    _locks: ExitStack
    _waiting: dict[str, Tensor] = field(default_factory=dict)
    _about: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path | str, fixed: Mapping[str, Any], shard_bytes: int) -> Writer:
        """Create the directory, or go on with it.

        Raises `StoreError` where it is something else's, damaged, being written, or was made with
        other values.
        """
        folder = Path(folder)
        read_manifest(folder)  # before anything is written into a stranger's directory
        make_folder(folder, WRITING)
        with ExitStack() as stack:
            stack.enter_context(
                lock(
                    folder / f"{OURS}.lock",
                    0.0,
                    f"another process is writing activations into {folder}; wait until it has "
                    "ended, or choose another directory.",
                    WRITING,
                )
            )
            manifest = read_manifest(folder)
            asked = json.loads(json.dumps(dict(fixed)))
            if manifest is None:
                text = ActivationsManifest(fixed=asked).model_dump_json(indent=1) + "\n"
                write_atomic(folder / MANIFEST, text.encode(), WRITING)
            elif manifest.fixed != asked:
                names = [
                    n for n in {**manifest.fixed, **asked} if manifest.fixed.get(n) != asked.get(n)
                ]
                raise StoreError(
                    f"{folder} was made with other values of {', '.join(names)}: a data set keeps "
                    "them. Choose another directory."
                )
            remove_leftovers(folder)
            shards = _shards(folder)
            known = {sample.key for path in shards for sample in _read_shard(path)}
            number = 1 + max((int(path.stem.split("-")[1]) for path in shards), default=-1)
            return cls(folder, shard_bytes, known, number, stack.pop_all())

    def done(self, key: str) -> bool:
        """Whether the sample is there, or waits to be written."""
        return key in self.known

    def add(self, key: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take one sample; what the writer holds is at most `shard_bytes` and this sample."""
        if key in self.known:
            return
        number = len(self._about)
        self._waiting |= {
            f"{number}/{site}": value.detach().to("cpu").contiguous().clone()
            for site, value in tensors.items()
        }
        self._about.append({"key": key, **about})
        self.known.add(key)
        if sum(tensor.nbytes for tensor in self._waiting.values()) >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what waits as a shard. Raises `StoreError`; the samples then wait on."""
        if not self._about:
            return
        data = save(self._waiting, metadata={"samples": json.dumps(self._about)})
        write_atomic(self.folder / f"shard-{self.number:05d}.safetensors", data, WRITING)
        self.number += 1
        self._waiting, self._about = {}, []

    def close(self) -> None:
        """Write what waits and let the directory go; a second call does nothing."""
        try:
            self.flush()
        finally:
            self._locks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_manifest(folder: Path) -> ActivationsManifest | None:
    """None where the directory is new or empty. Raises `StoreError` where it is another's."""
    with disk_errors(folder, WRITING):
        if not folder.exists():
            return None
        if not folder.is_dir():
            raise StoreError(f"{folder} is a file, not a directory.")
        path = folder / MANIFEST
        if not path.is_file():
            strangers = sorted(p.name for p in folder.iterdir() if not p.name.startswith(OURS))
            if strangers:
                raise StoreError(
                    f"{folder} belongs to something else: it holds {strangers[0]}, no {MANIFEST}."
                )
            return None
        text = path.read_bytes()
    try:
        return ActivationsManifest.model_validate_json(text)
    except ValidationError as error:
        raise StoreError(
            f"{path} is damaged or from another version of fasttrace: {error.errors()[0]['msg']}."
        ) from error


def _shards(folder: Path) -> list[Path]:
    return sorted(
        (p for p in folder.glob("shard-*.safetensors") if p.stem.split("-")[1].isdecimal()),
        key=lambda path: int(path.stem.split("-")[1]),
    )


def _read_shard(path: Path) -> list[Sample]:
    """Its samples, from its header alone."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["samples"])
        return [Sample(one["key"], one, path, number) for number, one in enumerate(about)]
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise StoreError(
            f"{path} is damaged ({reason}). Remove it: its samples are recorded again."
        ) from error


def sample_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Of one sample."""
    return sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
