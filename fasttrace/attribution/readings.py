"""What is read off a gradient: of which place, and summed over which of its axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fasttrace.engine.graph.marks import Mark
from fasttrace.errors import UsageError
from fasttrace.plan.options import parse_choice
from fasttrace.types import Site

TEXT = "text"
LEVELS = ("site", "head", "token", "channel", "neuron", "place", TEXT)


@dataclass(frozen=True)
class Reading:
    """Scores of one place: `size` of them along `axis`.

    site, kind, index: as of `Site`. mark: the place in the graph. part: what of the site it is,
    "output", "heads", "key", "value" (of a text token), "hidden" (neurons). axis: "all" (one
    number), "head", "token", "channel", "neuron", "place"; of what the denoiser reads of a text
    "text" (a token) and "pooled".
    """

    site: str
    kind: str
    index: int
    mark: str
    part: str
    axis: str
    size: int
    shape: tuple[int, ...]  # of one row of the mark

    @property
    def key(self) -> str:
        return f"{self.site}|{self.part}|{self.axis}"

    def reduce(self, product: Tensor) -> Tensor:
        """product [R, *shape] -> [R, size]."""
        rows = len(product)
        if self.axis in ("all", "pooled"):
            return product.reshape(rows, -1).sum(1, keepdim=True)
        if self.axis == "head":  # [N, H D], head h in channels h D to (h + 1) D
            return product.reshape(rows, self.shape[0], self.size, -1).sum((1, 3))
        if len(self.shape) == 2:  # [N, C]
            return product.sum(2 if self.axis in ("token", "place", "text") else 1)
        if self.axis == "place":  # [C, h, w]
            return product.sum(1).reshape(rows, -1)
        return product.reshape(rows, self.shape[0], -1).sum(2)


def readings_of(
    marks: Mapping[str, Mark], sites: Sequence[Site], by: str | Sequence[str]
) -> tuple[Reading, ...]:
    """Readings of these sites at the levels asked for, in execution order.

    by: "site" (the whole output), "head", "token" (a text token's key and its value), "channel" (of
    the output), "neuron" (a feed-forward's hidden units), "place" (of the picture); several.
    Raises `UsageError` for an unknown level, and where none of the sites has what is asked for.
    """
    levels = [by] if isinstance(by, str) else list(by)
    for level in levels:
        parse_choice(level, LEVELS, "level")
    found: dict[str, Reading] = {}
    for site in sites:
        for level in levels:
            for part, axis in _PARTS[level]:
                name = site.name if part == "output" else f"{site.name}.{part}"
                mark = marks.get(name)
                if mark is None or (level == "token" and site.kind != "attn2"):
                    continue
                size = _size(mark, axis)
                reading = Reading(
                    site.name, site.kind, site.index, name, part, axis, size, mark.shape
                )
                found[reading.key] = reading
    for level in levels:
        if not any((r.part, r.axis) in _PARTS[level] for r in found.values()):
            raise UsageError(f"None of the {len(sites)} sites has scores by {level}.")
    return tuple(found.values())


_PARTS = {
    "site": (("output", "all"),),
    "head": (("heads", "head"),),
    "token": (("key", "token"), ("value", "token")),
    "channel": (("output", "channel"),),
    "neuron": (("hidden", "neuron"),),
    "place": (("output", "place"),),
}


def _size(mark: Mark, axis: str) -> int:
    if axis == "all":
        return 1
    if axis == "head":
        return mark.heads
    if len(mark.shape) == 2:
        return mark.shape[0] if axis in ("token", "place") else mark.shape[1]
    if axis == "place":
        return mark.shape[1] * mark.shape[2]
    return mark.shape[0]
