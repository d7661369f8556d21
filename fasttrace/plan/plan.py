"""A plan: every row a trace will produce, before anything heavy has run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fasttrace.types import Corruption, Lane, Metric, Probe, Sampling


@dataclass(frozen=True)
class PlannedRow:
    """One row to come: `lane` of (`probe`, `seed`) scored by `metric`.

    `status` is "run", or why no run is needed: the row is then written with the base run's score.
    """

    key: str  # content hash, the same as the finished `Row.key`
    probe: int  # index into `Plan.probes`
    seed: int
    lane: Lane  # exactly one patch in a trace; several neighbouring sites in a swap
    metric: str  # a `Metric.key`
    status: str = "run"
    picture: str = ""  # the finished row's picture; rows that differ in metric alone share it


@dataclass(frozen=True)
class Plan:
    """All rows of one trace in the order they will come: probe, seed, lane, metric."""

    component: str  # "unet" or "text_encoder"
    probes: tuple[Probe, ...]
    seeds: tuple[int, ...]
    corruption: Corruption  # with sigma resolved
    sampling: Sampling
    metrics: tuple[Metric, ...]
    calls: int  # denoiser calls of one run: PNDM makes 51 of 50 steps
    rows: tuple[PlannedRow, ...]
    manifest: dict[str, Any]  # JSON: everything above, the model, its fingerprint, versions
    starts: Mapping[int, Any] = field(default_factory=dict, repr=False, compare=False)  # by seed
    other_prompt: str | None = None  # set in a swap: whose K/V the chosen layers read
    base: str = "corrupt"  # the run that lanes are, but for their patches
    tensors: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def total(self) -> int:
        """Rows, those that need no run included."""
        return len(self.rows)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(row.key for row in self.rows)

    @property
    def lanes(self) -> int:
        """Patched runs to make: rows that differ in their metric alone share one."""
        return len({(r.probe, r.seed, r.lane) for r in self.rows if r.status == "run"})
