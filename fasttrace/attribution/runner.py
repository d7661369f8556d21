"""Exact runs that `find` asks for, made by a tracer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fasttrace.attribution.find import PairName
from fasttrace.attribution.parts import Part, Parts
from fasttrace.plan.plan import Plan
from fasttrace.types import Row

if TYPE_CHECKING:
    from fasttrace.tracer import Tracer

OnStage = Callable[[str, int, int], None]


class Runner:
    """Rows and parts of one plan. on_stage is given ("rows", done, total) of each request."""

    def __init__(self, tracer: Tracer, plan: Plan, on_stage: OnStage | None = None) -> None:
        self.tracer, self.plan, self.on_stage = tracer, plan, on_stage

    def rows(self, plan: Plan, keys: Collection[str]) -> Iterator[Row]:
        wanted = set(keys)
        found = self.tracer.iter_rows(plan, done=lambda key: key not in wanted, pictures=False)
        for number, (row, _) in enumerate(found, start=1):
            if self.on_stage is not None:
                self.on_stage("rows", number, len(wanted))
            yield row

    def parts(
        self, names: Sequence[PairName], groups: Sequence[Sequence[Part]]
    ) -> tuple[np.ndarray, int]:
        tracer, plan = self.tracer, self.plan
        window = plan.rows[0].lane.patches[0].selector.window  # the one that all rows have
        parts = Parts(tracer.model, tracer.fast_engine, plan, window=window)
        found = np.zeros((len(names), len(groups)))
        for i, (number, seed) in enumerate(names):
            probe = plan.probes[number]
            planned = next(r for r in plan.rows if (r.probe, r.seed) == (number, seed))
            with tracer._inside():
                pair = tracer._pair(plan, probe, [planned])
                [found[i]] = parts.effects(probe, pair, groups).values()
            if self.on_stage is not None:
                self.on_stage("rows", (i + 1) * len(groups), found.size)
        return found, parts.runs
