"""Exact runs that `find` asks for, made by a tracer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING

import numpy as np

from fasttrace.adapters.fingerprint import digest
from fasttrace.attribution.find import PairName
from fasttrace.attribution.kept import Kept
from fasttrace.attribution.parts import Part, Parts
from fasttrace.plan.plan import Plan, PlannedRow
from fasttrace.types import Row

if TYPE_CHECKING:
    from fasttrace.tracer import Tracer

OnStage = Callable[[str, int, int], None]


class Runner:
    """Rows and parts of one plan. on_stage is given ("rows", done, total) of what each request has
    to make. kept: what is in it isn't made again."""

    def __init__(
        self,
        tracer: Tracer,
        plan: Plan,
        on_stage: OnStage | None = None,
        kept: Kept | None = None,
    ) -> None:
        self.tracer, self.plan, self.on_stage, self.kept = tracer, plan, on_stage, kept

    def rows(self, plan: Plan, keys: Collection[str]) -> Iterator[Row]:
        wanted = set(keys)
        kept = {} if self.kept is None else self.kept.rows
        yield from (kept[key] for key in wanted & set(kept))
        missing = wanted - set(kept)
        found = self.tracer.iter_rows(plan, done=lambda key: key not in missing, pictures=False)
        for number, (row, _) in enumerate(found, start=1):
            if self.kept is not None:
                self.kept.add_row(row)
            if self.on_stage is not None:
                self.on_stage("rows", number, len(missing))
            yield row

    def parts(
        self, names: Sequence[PairName], groups: Sequence[Sequence[Part]]
    ) -> tuple[np.ndarray, int]:
        tracer, plan = self.tracer, self.plan
        window = plan.rows[0].lane.patches[0].selector.window  # the one that all rows have
        parts = Parts(tracer.model, tracer.fast_engine, plan, window=window)
        found, runs, done = np.zeros((len(names), len(groups))), 0, 0
        keys = [self._key(name, window, groups) for name in names]
        kept = [None if self.kept is None else self.kept.parts(key) for key in keys]
        for i, (name, key, known) in enumerate(zip(names, keys, kept, strict=True)):
            if known is None:
                before = parts.runs
                with tracer._inside():
                    pair = tracer._pair(plan, plan.probes[name[0]], [self._planned(name)])
                    [effects] = parts.effects(plan.probes[name[0]], pair, groups).values()
                known = effects, parts.runs - before
                done += 1
                if self.kept is not None:
                    self.kept.add_parts(key, *known)
                if self.on_stage is not None:
                    self.on_stage("rows", done * len(groups), kept.count(None) * len(groups))
            found[i], runs = known[0], runs + known[1]
        return found, runs

    def _planned(self, name: PairName) -> PlannedRow:
        """Any row of a pair."""
        return next(row for row in self.plan.rows if (row.probe, row.seed) == name)

    def _key(self, name: PairName, window: object, groups: Sequence[Sequence[Part]]) -> str:
        # A row's key stands for model, prompt, seed, corruption, sampling and metric.
        asked = [[astuple(part) for part in group] for group in groups]
        return digest([self._planned(name).key, window, asked])
