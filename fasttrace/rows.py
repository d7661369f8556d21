"""Rows of one (probe, seed): its runs decoded, scored and written down as they come."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fasttrace.adapters.fingerprint import canonical_json
from fasttrace.adapters.pipeline import Model
from fasttrace.engine.base import CLEAN, CORRUPT, FLOOR
from fasttrace.errors import ModelError
from fasttrace.plan.plan import Plan, PlannedRow
from fasttrace.types import Lane, Metric, MetricContext, Probe, Row, pair_pictures

Pictures = dict[str, Tensor]  # name (no suffix) -> float picture [3, H, W] in [0, 1] on the CPU


@dataclass
class Scorer:
    """Decodes and scores the runs of one (probe, seed)."""

    model: Model
    metrics: Sequence[Metric]
    probe: Probe
    clean: Tensor | None = None  # latents [1, C, h, w]
    corrupt: Tensor | None = None
    pictures: dict[str, Tensor] = field(default_factory=dict)  # run -> [1, 3, H, W]
    scores: dict[str, dict[str, float]] = field(default_factory=dict)  # run -> metric -> score
    floor: dict[str, float] = field(default_factory=dict)

    def add(self, run: str, latents: Tensor) -> None:
        """Take the final latents of a run: "clean", then "corrupt", then any others."""
        pictures = self.model.decode(latents)
        if run == FLOOR:
            for metric in self.metrics:
                copies = self._score(metric, run, latents, pictures)
                spread = max(abs(s - self.scores[CORRUPT][metric.key]) for s in copies)
                self.floor[metric.key] = max(self.floor.get(metric.key, 0.0), spread)
            return
        if run == CLEAN:
            self.clean = latents
        elif run == CORRUPT:
            self.corrupt = latents
            # Recovery compares with the corrupt run, so the clean run is scored once both are here.
            self._score_all(CLEAN, self.clean, self.pictures[CLEAN])
        self.pictures[run] = pictures
        if run != CLEAN:
            self._score_all(run, latents, pictures)

    def has(self, run: str) -> bool:
        return bool(self.floor) if run == FLOOR else run in self.scores

    def picture(self, run: str) -> Tensor:
        """[3, H, W] on the CPU."""
        return self.pictures[run][0].cpu()

    def forget(self, run: str) -> None:
        """Drop the picture of a lane that no row needs any more."""
        if run not in (CLEAN, CORRUPT):
            self.pictures.pop(run, None)

    def _score_all(self, run: str, latents: Any, pictures: Tensor) -> None:
        self.scores[run] = {m.key: self._score(m, run, latents, pictures)[0] for m in self.metrics}

    def _score(self, metric: Metric, run: str, latents: Tensor, pictures: Tensor) -> list[float]:
        context = MetricContext(self.probe, self.pictures.get(CLEAN), self.clean, self.corrupt)
        given = pictures if metric.needs == "picture" else latents
        # A copy, since a metric may work in place and the picture is still to be kept.
        answer = metric.function(given.clone(), context)
        try:
            found = [float(s) for s in torch.as_tensor(answer).detach().flatten().tolist()]
        except (TypeError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"The metric '{metric.key}' gave {type(answer).__name__} {str(answer)[:60]!r}; it "
                "has to give one number a picture."
            ) from error
        if len(found) != len(given):
            raise ModelError(
                f"The metric '{metric.key}' gave {len(found)} scores for {len(given)} pictures; it "
                "has to give one each."
            )
        if not all(math.isfinite(s) for s in found):
            raise ModelError(f"The metric '{metric.key}' gave {found} for the {run} run.")
        return found


@dataclass(frozen=True)
class RowWriter:
    """Makes rows of one (probe, seed) of a plan."""

    plan: Plan
    scorer: Scorer
    keep_pictures: bool

    def row(self, planned: PlannedRow, run: str) -> Row:
        """`run` names the scored run of this row, "corrupt" where none was needed."""
        plan, manifest = self.plan, self.plan.manifest
        probe, scores = plan.probes[planned.probe], self.scorer.scores
        metric = next(m for m in plan.metrics if m.key == planned.metric)
        clean, corrupt = scores[CLEAN][metric.key], scores[CORRUPT][metric.key]
        score = scores[run][metric.key]
        turn = 1 if metric.higher_is_closer else -1
        swap = plan.other_prompt is not None
        total = turn * (clean - corrupt)
        effect = turn * (clean - score if swap else score - corrupt)
        first, last = planned.lane.patches[0], planned.lane.patches[-1]
        start, stop = first.selector.window or (0, plan.calls)
        name = first.site.name if first == last else f"{first.site.name}..{last.site.name}"
        return Row(
            key=planned.key,
            model=manifest["model"],
            fingerprint=manifest["fingerprint"],
            component=first.site.component,
            attribute=probe.attribute,
            prompt=probe.prompt,
            subject=probe.subject,
            occurrence=probe.occurrence,
            negative_prompt=probe.negative_prompt,
            seed=planned.seed,
            site=name,
            site_index=first.site.index,
            kind="swap" if swap else first.site.kind,
            selector=first.selector.label,
            tokens=first.selector.tokens,
            branch=first.selector.branch,
            window_start=start,
            window_stop=stop,
            corruption=manifest["corruption"],
            sampling=manifest["sampling"],
            metric=metric.key,
            score=score,
            clean_score=clean,
            corrupt_score=corrupt,
            total_effect=total,
            effect=effect,
            normalised_effect=effect / total if total != 0 else None,
            noise_floor=self.scorer.floor[metric.key],
            engine=manifest["engine"],
            status=planned.status,
            picture=planned.picture if self.keep_pictures else None,
            versions=canonical_json(manifest["versions"]),
        )


def rows_of_pair(
    writer: RowWriter,
    planned: Sequence[PlannedRow],
    runs: Iterator[tuple[str | int, Tensor]],
    inside: Callable[[], AbstractContextManager[None]],
) -> Iterator[tuple[Row, Pictures]]:
    """The rows of `planned` (one probe and seed, in order), each as soon as its run has ended.

    `runs` yields what an engine does, its lanes numbered by `lanes_of(planned)`. Everything heavy
    happens inside `inside()`, which is left before a row is handed out.
    """
    lanes = {lane: i for i, lane in enumerate(lanes_of(planned))}
    last = {row.lane: i for i, row in enumerate(planned)}
    scorer = writer.scorer
    first = True
    for i, row_to_be in enumerate(planned):
        wanted = str(lanes[row_to_be.lane]) if row_to_be.status == "run" else FLOOR
        if not scorer.has(wanted):
            with inside():
                while not scorer.has(wanted):
                    name, latents = next(runs)
                    scorer.add(str(name), latents)
        run = wanted if row_to_be.status == "run" else CORRUPT
        row = writer.row(row_to_be, run)
        pictures: Pictures = {}
        names = pair_pictures(row)
        if names is not None and row.picture is not None:
            pictures[row.picture] = scorer.picture(run)
            if first:
                pictures |= dict(zip(names, map(scorer.picture, (CLEAN, CORRUPT)), strict=True))
        first = False
        if last[row_to_be.lane] == i:
            scorer.forget(run)
        yield row, pictures


def lanes_of(planned: Sequence[PlannedRow]) -> tuple[Lane, ...]:
    """The lanes that need a run, each once."""
    return tuple(dict.fromkeys(row.lane for row in planned if row.status == "run"))
