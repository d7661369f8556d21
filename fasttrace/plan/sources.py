"""What a trace writes at its sites: the clean activation, or any other tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from fasttrace.adapters.fingerprint import tensor_digest
from fasttrace.adapters.selection import suggestion
from fasttrace.errors import UsageError
from fasttrace.types import Site

SourceKind = Literal["clean", "corrupt", "zero", "mean", "prompt", "tensor", "add"]
KINDS = get_args(SourceKind)
MOST_BYTES = 1 << 30  # of the tensors of one plan


@dataclass(frozen=True, eq=False)
class Source:
    """What is written at every chosen site.

    clean, corrupt: that run's own activation, at the same site and denoiser call.
    zero: zeros. mean: the clean activation's mean over its positions (text tokens, picture places),
        at every position; a mean over prompts is a "tensor", made of what `fasttrace.record` gives.
    prompt: the activation of a run of `prompt` from the same first latent.
    tensor: `values`, the same in every run.
    add: nothing is replaced: strength * values is added to the lane's own activation, whatever it
        is, such as an SAE feature's decoder direction times an amount.

    values: a tensor for every site, or one by site (a name or an alias). A site [N, C] or
    [C, h, w] takes its own shape, or [C]: one value a channel, at every position. With a first axis
    of the run's denoiser calls in front it is another tensor at each call. strength: from 0 to 1,
    how far from the own activation to the source; of "add" any number. label: in tables.
    """

    kind: SourceKind = "clean"
    prompt: str = ""
    values: Tensor | Mapping[str, Tensor] | None = None
    strength: float = 1.0
    label: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(
                f"Unknown source {self.kind!r}; expected {', '.join(KINDS)}."
                f"{suggestion(str(self.kind), KINDS, n=1)}"
            )
        needs = self.kind in ("tensor", "add")
        if needs != (self.values is not None):
            raise UsageError(
                f"A source {self.kind!r} {'needs' if needs else 'takes no'} values: a tensor, or "
                "tensors by site."
            )
        if (self.kind == "prompt") != bool(self.prompt.strip()):
            raise UsageError("A source 'prompt' has a prompt, and no other source has one.")
        number = isinstance(self.strength, int | float) and not isinstance(self.strength, bool)
        free = self.kind == "add"
        if not number or not math.isfinite(self.strength) or not (free or 0 < self.strength <= 1):
            raise UsageError(
                f"The strength {self.strength!r} of a source {self.kind!r} is not "
                f"{'a finite number' if free else 'above 0 and at most 1'}."
            )

    @property
    def title(self) -> str:
        """How tables name it: "all" for the clean run's activation, as without a source."""
        if self.label:
            return self.label
        amount = "" if self.strength == 1 else f" x {self.strength:g}"
        word = f"prompt '{self.prompt}'" if self.kind == "prompt" else self.kind
        return "all" if (word, amount) == ("clean", "") else word + amount


Asked = Source | str | Sequence[Source | str]


def parse_sources(asked: Asked, base: str) -> list[Source]:
    """Records for what was asked: a kind's word, "prompt:<text>", a `Source`, or several.

    base: the run that lanes are, which is no source.
    """
    if not isinstance(asked, Source | str | Sequence):
        raise UsageError(f"A source is a word or a fasttrace.Source; {asked!r} was given.")
    many = [asked] if isinstance(asked, Source | str) else list(asked)
    if not many:
        raise UsageError("The list of sources is empty.")
    found = []
    for one in many:
        if isinstance(one, str):
            kind, colon, prompt = one.partition(":")
            one = Source(cast(SourceKind, kind), prompt if colon else "")
        if not isinstance(one, Source):
            raise UsageError(f"A source is a word or a fasttrace.Source; {one!r} was given.")
        if one.kind == base:
            raise UsageError(
                f"A {base} activation written into the {base} run changes nothing; choose another "
                f"source, or base={'corrupt' if base == 'clean' else 'clean'!r}."
            )
        found.append(one)
    titles = [source.title for source in found]
    if len(set(titles)) != len(titles):
        raise UsageError(f"Two sources are called the same ({', '.join(titles)}): give labels.")
    return found


@dataclass
class Written:
    """Sources as patches name them. tensors: what those names stand for, as `Pair.tensors`."""

    sources: Sequence[Source]
    calls: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    _names: dict[tuple[int, str], str] = field(default_factory=dict)

    def at(self, site: Site) -> list[tuple[str, float, str]]:
        """(`Patch.source`, strength, title) of each. Raises `UsageError` where one doesn't fit."""
        return [(self._name(i, site), s.strength, s.title) for i, s in enumerate(self.sources)]

    def check(self, sites: Iterable[Site]) -> None:
        """Every tensor by site is of a chosen site. Raises `UsageError`."""
        names = {name for site in sites for name in _names(site)}
        for source in self.sources:
            if isinstance(source.values, Mapping):
                for name in source.values:
                    if name not in names:
                        raise UsageError(
                            f"The source '{source.title}' has a tensor for {name!r}, which is none "
                            f"of the chosen sites.{suggestion(str(name), names)}"
                        )

    def _name(self, number: int, site: Site) -> str:
        source, key = self.sources[number], (number, site.name)
        if source.kind == "prompt":
            return f"prompt:{source.prompt}"
        if source.kind not in ("tensor", "add"):
            return source.kind
        if key not in self._names:
            value = fitted(self._value(source, site), site, self.calls, source.title)
            self._names[key] = name = f"{source.kind}:{tensor_digest(value)[:32]}"
            self.tensors.setdefault(name, value)
            if sum(t.nbytes for t in self.tensors.values()) > MOST_BYTES:
                raise UsageError(f"The sources' tensors take more than {MOST_BYTES >> 30} GiB.")
        return self._names[key]

    def _value(self, source: Source, site: Site) -> Tensor:
        values: Any = source.values
        if isinstance(values, Mapping):
            values = next((values[name] for name in _names(site) if name in values), None)
            if values is None:
                raise UsageError(
                    f"The source '{source.title}' has no tensor for {site.name}: give one, or "
                    "choose the sites it has tensors for."
                )
        if not isinstance(values, Tensor):
            raise UsageError(
                f"The source '{source.title}' holds a {type(values).__name__}, which is no tensor."
            )
        return values


def fitted(value: Tensor, site: Site, calls: int, what: str) -> Tensor:
    """A copy on the CPU as [1 or calls, ...] that broadcasts to the site's shape.

    Raises `UsageError` for another shape, for integers and for what is not finite.
    """
    shape, own = tuple(value.shape), site.shape
    axis = len(own) - 1 if len(own) == 2 else 0  # of the channels
    narrow = tuple(size if i == axis else 1 for i, size in enumerate(own))
    if shape == own:
        wide = (1, *own)
    elif shape == (own[axis],):
        wide = (1, *narrow)
    elif shape == (calls, *own):
        wide = shape
    elif shape == (calls, own[axis]):
        wide = (calls, *narrow)
    else:
        raise UsageError(
            f"The source '{what}' has a tensor of shape {list(shape)} for {site.name}; expected "
            f"{list(own)} or [{own[axis]}], perhaps with a first axis of the run's {calls} calls."
        )
    if not value.is_floating_point():
        raise UsageError(f"The source '{what}' holds {value.dtype}; expected floating point.")
    copy = value.detach().to("cpu", copy=True).reshape(wide).contiguous()
    if not torch.isfinite(copy).all():
        raise UsageError(f"The source '{what}' holds NaN or infinity for {site.name}.")
    return copy


def _names(site: Site) -> tuple[str, ...]:
    return (site.name, site.name.split(".", 1)[1], *site.aliases)
