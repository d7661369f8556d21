"""Which row of the cache holds what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from fasttrace.engine.cache import Cache
from fasttrace.engine.sources import (
    ADD,
    CLEAN,
    MEAN,
    TENSOR,
    TEXT,
    is_own_row,
    mean_of,
    run_of,
    tensor_at,
)
from fasttrace.types import Lane, Patch

_BOTH = ("uncond", "cond")
Key = tuple[int | None, str, str]  # pair, source, branch; of what all pairs share None and ""


@dataclass(frozen=True)
class Layout:
    """Row 0 is the first pair's corrupt run, for copies of it. Behind it, at every site kept:

    `sources` of each pair in turn, the (run, branch) that the trunk makes; then `others` of each
    pair, of other prompts' runs. `made`: at some sites alone, what is computed from these or given.
    """

    pairs: int
    sources: tuple[tuple[str, str], ...] = ()
    others: tuple[tuple[str, str], ...] = ()
    made: Mapping[str, tuple[Key, ...]] = field(default_factory=dict)

    @property
    def common(self) -> int:
        """Rows at every site kept."""
        return 1 + self.pairs * (len(self.sources) + len(self.others))

    @property
    def extra(self) -> dict[str, int]:
        """Rows that a site has beyond."""
        return {site: len(keys) for site, keys in self.made.items()}

    @property
    def other_runs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run for run, _ in self.others))

    def row(self, site: str, pair: int, source: str, branch: str) -> int:
        """Of what a patch with this source reads there."""
        key = _key(pair, source, branch)
        if key is not None:
            return self.common + self.made[site].index(key)
        return self.run_row(pair, source, branch)

    def run_row(self, pair: int, run: str, branch: str) -> int:
        if is_own_row(run):
            return 1 + pair * len(self.sources) + self.sources.index((run, branch))
        first = 1 + self.pairs * len(self.sources)
        return first + pair * len(self.others) + self.others.index((run, branch))

    def bytes(self, shapes: Mapping[str, tuple[int, ...]], calls: int, itemsize: int) -> int:
        """Of a cache of these sites."""
        extra = self.extra
        rows = sum(prod(s) * (self.common + extra.get(site, 0)) for site, s in shapes.items())
        return rows * calls * itemsize


def layout_of(lanes: Sequence[Sequence[Lane]], guided: bool) -> Layout:
    """What lanes of these pairs read, without those that read another text."""
    runs: set[tuple[str, str]] = set()
    made: dict[str, dict[Key, None]] = {}
    for pair, own in enumerate(lanes):
        for patch in (p for lane in own for p in lane.patches):
            if patch.source.startswith(TEXT):
                continue
            run = run_of(patch.source)
            for branch in branches_of(patch, guided):
                if run is not None:
                    runs.add((run, branch))
                key = _key(pair, patch.source, branch)
                if key is not None:
                    made.setdefault(patch.site.name, {})[key] = None
    return Layout(
        pairs=len(lanes),
        sources=tuple(sorted(key for key in runs if is_own_row(key[0]))),
        others=tuple(sorted(key for key in runs if not is_own_row(key[0]))),
        made={site: tuple(keys) for site, keys in made.items()},
    )


def branches_of(patch: Patch, guided: bool) -> tuple[str, ...]:
    """The branches a patch writes to; without guidance there is one."""
    if not guided:
        return ("cond",)
    return _BOTH if patch.selector.branch == "both" else (patch.selector.branch,)


def must_be_kept(patch: Patch) -> bool:
    """Whether what is read is in no row of a batch, so that it has to lie in the cache."""
    return not is_own_row(patch.source) and not patch.source.startswith(TEXT)


def added_sites(lanes: Sequence[Sequence[Lane]]) -> tuple[str, ...]:
    """Sites at which something is added, each once."""
    patches = (p for own in lanes for lane in own for p in lane.patches)
    return tuple(dict.fromkeys(p.site.name for p in patches if p.source.startswith(ADD)))


@torch.no_grad()
def fill_made(cache: Cache, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
    """Compute, or copy, the rows that no run leaves behind; all else has been recorded."""
    for site, keys in layout.made.items():
        kept = cache.kept[site]
        for at, (pair, source, branch) in enumerate(keys, start=layout.common):
            if source == MEAN:
                assert pair is not None
                clean = layout.run_row(pair, CLEAN, branch)
                for call in range(cache.calls):
                    kept[call, at] = mean_of(kept[call, clean : clean + 1])[0]
            elif source.startswith((TENSOR, ADD)):
                for call in range(cache.calls):
                    kept[call, at] = tensor_at(tensors, source, call).to(kept)
            else:
                kept[:, at] = 0


def _key(pair: int, source: str, branch: str) -> Key | None:
    """None for what a run leaves behind."""
    if source == MEAN:
        return pair, source, branch
    return None if run_of(source) is not None else (None, source, "")
