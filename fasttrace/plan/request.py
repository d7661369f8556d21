"""A plan as plain data: JSON in, JSON out, one hash. What a tool in any language sends.

Everything in it is data from outside: unknown keys, wrong types, numbers that are not finite and
sizes beyond `Limits` are refused in a sentence before a model is loaded or memory is taken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from fasttrace.adapters.fingerprint import digest
from fasttrace.adapters.load import is_hub_id
from fasttrace.errors import UsageError
from fasttrace.plan.options import COMPONENTS, MOST_PIXELS
from fasttrace.plan.sources import Source, SourceKind
from fasttrace.plan.tensor_file import read_tensors
from fasttrace.types import Branch, Corruption, CorruptionKind, Probe


class Limits:
    """The largest a plan may be."""

    FILE = 4 << 20  # bytes
    DEPTH = 32  # of brackets
    TEXT = 10_000  # characters of a prompt
    PROBES = 10_000
    SEEDS = 10_000  # of one probe
    PAIRS = 100_000  # (probe, seed)
    WORDS = 10_000  # sites, tokens
    WINDOWS = 1_000
    METRICS = 16
    SOURCES = 64
    STEPS = 1_000
    SIDE = 16_384  # pixels
    LANES = 1_024


Text = Annotated[str, StringConstraints(max_length=Limits.TEXT)]
Word = Annotated[str, StringConstraints(min_length=1, max_length=500)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(ge=-1e9, le=1e9)]


class Data(BaseModel):
    """What all parts of a plan share: no unknown keys, no conversions, finite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ProbeData(Data):
    """A caption, and the words of it to destroy. Its seeds go before the plan's own."""

    prompt: Annotated[str, StringConstraints(min_length=1, max_length=Limits.TEXT)]
    subject: Annotated[str, StringConstraints(min_length=1, max_length=Limits.TEXT)]
    attribute: Text = ""
    occurrence: int = Field(default=0, ge=0, le=Limits.TEXT)
    negative_prompt: Text = ""
    seeds: list[Seed] | None = Field(default=None, min_length=1, max_length=Limits.SEEDS)

    def probe(self) -> Probe:
        return Probe(
            self.prompt, self.subject, self.attribute, self.occurrence, self.negative_prompt
        )


class CorruptionData(Data):
    """As `fasttrace.Corruption`; a list of sigmas is one a text encoder."""

    kind: CorruptionKind = "embedding_noise"
    scale: Number = 3.0
    sigma: Number | Annotated[list[Number], Field(min_length=1, max_length=8)] | None = None
    replacement: Text | None = None
    seed: Seed = 0

    def corruption(self) -> Corruption:
        sigma = tuple(self.sigma) if isinstance(self.sigma, list) else self.sigma
        return Corruption(self.kind, self.scale, sigma, self.replacement, self.seed)


class SourceData(Data):
    """As `fasttrace.Source`, with tensors from a file in the plan's folder.

    file: safetensors, see `tensor_file.py`. tensor: which of the file's goes to every site; without
    it each goes to the site it is named by.
    """

    kind: SourceKind
    prompt: Text = ""
    file: Word | None = None
    tensor: Word | None = None
    strength: Number = 1.0
    label: Text = ""

    def source(self, folder: Path | None) -> Source:
        """folder: the plan's own. Raises `UsageError`."""
        if self.file is None:
            if self.tensor is not None:
                raise UsageError("The plan's source names a tensor, but no file.")
            return Source(self.kind, self.prompt, None, self.strength, self.label)
        if folder is None:
            raise UsageError(
                "The plan's source names a tensor file, which is looked for beside the plan: give "
                "the plan's folder."
            )
        found: Any = read_tensors(folder, self.file)
        if self.tensor is not None:
            if self.tensor not in found:
                names = ", ".join(sorted(found)[:5])
                raise UsageError(f"{self.file!r} has no tensor {self.tensor!r}; it has {names}.")
            found = found[self.tensor]
        name = Path(self.file).stem
        amount = "" if self.strength == 1 else f" x {self.strength:g}"
        label = self.label or f"{self.kind} {self.tensor or name}{amount}"
        return Source(self.kind, self.prompt, found, self.strength, label)


class EngineData(Data):
    """Which engine, and the fast one's options; None leaves one as it is."""

    name: Literal["fast", "reference"] = "fast"
    clean: Literal["auto", "leader", "cache"] | None = None
    lanes: int | None = Field(default=None, ge=4, le=Limits.LANES)
    cache: int | None = Field(default=None, ge=0, le=1 << 50)  # bytes

    def options(self) -> dict[str, Any]:
        given = {"clean": self.clean, "lanes": self.lanes, "cache": self.cache}
        return {name: value for name, value in given.items() if value is not None}


class PlanRequest(Data):
    """Everything a trace is asked for; the names are those of `Tracer.plan`.

    model: "embedded" or a hub id. A folder is never taken from a plan: whoever runs it gives one
    (`fasttrace run --model`). None: the caller brings a pipeline of its own.
    """

    format: Literal["fasttrace plan"] = "fasttrace plan"
    version: Literal[1] = 1
    model: Word | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    probes: list[ProbeData] = Field(min_length=1, max_length=Limits.PROBES)
    seeds: list[Seed] = Field(default=[0], min_length=1, max_length=Limits.SEEDS)
    components: list[Literal["unet", "text_encoder"]] = Field(
        default=["unet"], min_length=1, max_length=len(COMPONENTS)
    )
    sites: list[Word] = Field(default=["paper"], min_length=1, max_length=Limits.WORDS)
    tokens: list[Word | Annotated[int, Field(ge=0, le=Limits.TEXT)]] = Field(
        default=[], max_length=Limits.WORDS
    )
    windows: list[Annotated[list[Number | int], Field(min_length=2, max_length=2)]] | None = Field(
        default=None, min_length=1, max_length=Limits.WINDOWS
    )
    branch: Branch = "cond"
    sources: list[SourceData] = Field(
        default=[SourceData(kind="clean")], min_length=1, max_length=Limits.SOURCES
    )
    base: Literal["corrupt", "clean"] = "corrupt"
    corruption: CorruptionData = CorruptionData()
    metrics: list[Word] = Field(default=[], max_length=Limits.METRICS)
    steps: int | None = Field(default=None, ge=1, le=Limits.STEPS)
    guidance: Annotated[float, Field(ge=0, le=1e6)] | None = None
    height: int | None = Field(default=None, ge=8, le=Limits.SIDE)
    width: int | None = Field(default=None, ge=8, le=Limits.SIDE)
    engine: EngineData = EngineData()

    def model_post_init(self, _context: Any) -> None:
        _check_whole(self)

    def to_json(self) -> str:
        """JSON with every value, defaults too; `parse_plan` reads it back."""
        return self.model_dump_json(indent=1) + "\n"

    def digest(self) -> str:
        """sha256 of all values: equal for plans that ask the same, however they are written."""
        return digest(self.model_dump(mode="json"))

    def probes_and_seeds(self) -> dict[Probe, list[int]]:
        """Each probe's own seeds, or the plan's."""
        return {entry.probe(): list(entry.seeds or self.seeds) for entry in self.probes}

    def sampling(self) -> dict[str, Any]:
        names = ("steps", "guidance", "height", "width")
        return {name: getattr(self, name) for name in names}

    def asked_sources(self, folder: Path | None = None) -> list[Source]:
        """folder: where the plan's tensor files lie. Raises `UsageError`."""
        return [source.source(folder) for source in self.sources]

    def asked_windows(self) -> list[tuple[float, float]] | None:
        """As `Tracer.plan` takes them: whole numbers are calls, a fraction among two makes both."""
        if self.windows is None:
            return None
        return [(low, high) for low, high in self.windows]


def parse_plan(given: str | bytes | Mapping[str, Any]) -> PlanRequest:
    """A plan from JSON text or from data. Raises `UsageError` with what is wrong, and where."""
    data = given if isinstance(given, Mapping) else _json(given)
    try:
        return PlanRequest.model_validate(dict(data))
    except ValidationError as error:
        raise UsageError(f"The plan can't be used: {_first(error)}.") from error
    except RecursionError as error:
        raise UsageError("The plan can't be used: it is nested too deeply.") from error


def read_plan(path: Path | str) -> PlanRequest:
    """A plan from a file of at most `Limits.FILE` bytes. Raises `UsageError`."""
    path = Path(path)
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is not there, or is no ordinary file"
            raise UsageError(f"The plan {path} {what}.")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > Limits.FILE:
                raise UsageError(_too_long(str(path)))
            text = file.read(Limits.FILE + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"The plan {path} can't be read: {error}.") from error
    return parse_plan(text)


def _too_long(what: str) -> str:
    return f"{what} has more than {Limits.FILE >> 20} MiB, which no plan needs."


def _json(text: str | bytes) -> Mapping[str, Any]:
    if len(text) > Limits.FILE:
        raise UsageError(_too_long("The plan"))
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        if max(_depths(text), default=0) > Limits.DEPTH:
            raise UsageError("The plan can't be used: it is nested too deeply.")
        data = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"The plan is not JSON: {_short(error)}.") from error
    if not isinstance(data, dict):
        raise UsageError("A plan is a JSON object, {...}; this is something else.")
    return data


def _depths(text: str) -> Iterator[int]:
    """How many brackets are open after each one; those inside strings count as well."""
    depth = 0
    for letter in text:
        if letter in "[{":
            depth += 1
            yield depth
        elif letter in "]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"The plan has {twice[:80]!a} twice in one object.")
    return found


def _constant(name: str) -> Any:
    raise UsageError(f"The plan holds {name}, which is no finite number.")


def _first(error: ValidationError) -> str:
    """The first complaint, and how many more there are; a misspelt key explains a missing one."""
    many = error.errors(include_url=False, include_input=False)
    many.sort(key=lambda one: one["type"] != "extra_forbidden")
    place = ".".join(_short(part) for part in many[0]["loc"])
    reason = many[0]["msg"].removeprefix("Value error, ").removesuffix(".")
    more = f" (and {len(many) - 1} more)" if len(many) > 1 else ""
    return f"{place}: {reason}{more}" if place else f"{reason}{more}"


def _short(value: Any) -> str:
    text = str(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _check_whole(plan: PlanRequest) -> None:
    """What no field says alone. Raises `UsageError`."""
    for text in _texts(plan):
        if "\0" in text:
            raise UsageError(f"The plan holds {text[:80]!a}, with a NUL character.")
    if plan.model is not None and plan.model != "embedded":
        check_hub_id(plan.model, "model")
    for name in plan.metrics:
        kind, _, detail = name.partition(":")
        if kind == "clip":
            check_hub_id(detail, "CLIP model")
    pairs = sum(len(entry.seeds or plan.seeds) for entry in plan.probes)
    if pairs > Limits.PAIRS:
        raise UsageError(
            f"The plan has {pairs} pairs of a prompt and a seed; at most {Limits.PAIRS} go into "
            "one. Split it."
        )
    if len(plan.probes_and_seeds()) != len(plan.probes):
        raise UsageError("The plan has one probe twice: put their seeds into one.")
    side = plan.height or plan.width or 0
    if (plan.height or side) * (plan.width or side) > MOST_PIXELS:
        raise UsageError(f"The plan's pictures have more than {MOST_PIXELS >> 20} million pixels.")
    if len(set(plan.components)) != len(plan.components):
        raise UsageError("The plan names a component twice.")
    if plan.engine.name == "reference" and plan.engine.options():
        raise UsageError(
            f"The reference engine takes no options ({', '.join(plan.engine.options())})."
        )


def check_hub_id(name: str, what: str) -> None:
    """A hub id that names nothing on this disk. Raises `UsageError`: plans hold no paths."""
    if not is_hub_id(name) or ".." in name:
        raise UsageError(
            f"The plan's {what} is {name[:80]!a}: a plan names 'embedded' or a hub id "
            "('owner/name'). A folder is given by whoever runs it: fasttrace run --model FOLDER."
        )
    if Path(name).exists():
        raise UsageError(
            f"The plan's {what} {name[:80]!a} is a folder here, and a plan names no folders: use "
            "fasttrace run --model, or run it elsewhere."
        )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _texts(getattr(value, name))
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
