"""Rows of one (probe, seed): its runs decoded, scored and written down as they come."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fasttrace.adapters.fingerprint import canonical_json
from fasttrace.adapters.pipeline import Model
from fasttrace.engine.base import CLEAN, CORRUPT, FLOOR, Finished
from fasttrace.errors import ModelError
from fasttrace.plan.plan import Plan, PlannedRow
from fasttrace.types import Lane, Metric, MetricContext, Probe, Row, Sampling, pair_pictures

PORTION = 1 << 20  # pixels decoded at a time: one picture of 1024 x 1024, many small ones
Pictures = dict[str, Tensor]  # name (no suffix) -> float picture [3, H, W] in [0, 1] on the CPU


@dataclass
class Scorer:
    """Decodes and scores the runs of one (probe, seed).

    `floor` is shared by all that are run together: the copies that make up the noise floor are of
    one of them.
    """

    model: Model
    metrics: Sequence[Metric]
    probe: Probe
    floor: dict[str, float] = field(default_factory=dict)
    clean: Tensor | None = None  # latents [1, C, h, w]
    corrupt: Tensor | None = None
    pictures: dict[str, Tensor] = field(default_factory=dict)  # run -> [1, 3, H, W]
    scores: dict[str, dict[str, float]] = field(default_factory=dict)  # run -> metric -> score

    def add(self, runs: Sequence[str], latents: Tensor, pictures: Tensor | None) -> None:
        """Take final latents and pictures (None where nobody wants them), a row a run.

        The clean and the corrupt run come first; both are scored once both are here, since recovery
        compares with the corrupt run.
        """
        for i, run in enumerate(runs):
            if run != FLOOR and pictures is not None:
                self.pictures[run] = pictures[i : i + 1]
            if run == CLEAN:
                self.clean = latents[i : i + 1]
            elif run == CORRUPT:
                self.corrupt = latents[i : i + 1]
        if self.clean is None or self.corrupt is None:
            return
        if CORRUPT not in self.scores:
            for run, own in ((CLEAN, self.clean), (CORRUPT, self.corrupt)):
                found = self._score([run], own, self.pictures.get(run))
                self.scores[run] = {key: values[0] for key, values in found.items()}
        rows = [i for i, run in enumerate(runs) if run not in (CLEAN, CORRUPT)]
        if not rows:
            return
        names = [runs[i] for i in rows]
        found = self._score(names, latents[rows], None if pictures is None else pictures[rows])
        for i, run in enumerate(names):
            if run != FLOOR:
                self.scores[run] = {key: values[i] for key, values in found.items()}
                continue
            for key, values in found.items():
                spread = abs(values[i] - self.scores[CORRUPT][key])
                self.floor[key] = max(self.floor.get(key, 0.0), spread)

    def picture(self, run: str) -> Tensor:
        """[3, H, W] on the CPU."""
        return self.pictures[run][0].cpu()

    def forget(self, run: str) -> None:
        """Drop the picture of a lane that no row needs any more."""
        if run not in (CLEAN, CORRUPT):
            self.pictures.pop(run, None)

    def _score(
        self, runs: Sequence[str], latents: Tensor, pictures: Tensor | None
    ) -> dict[str, list[float]]:
        """Metric -> a score a run."""
        context = MetricContext(self.probe, self.pictures.get(CLEAN), self.clean, self.corrupt)
        return {m.key: self._ask(m, runs, latents, pictures, context) for m in self.metrics}

    def _ask(
        self,
        metric: Metric,
        runs: Sequence[str],
        latents: Tensor,
        pictures: Tensor | None,
        context: MetricContext,
    ) -> list[float]:
        given = pictures if metric.needs == "picture" else latents
        assert given is not None
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
            bad = next(run for run, s in zip(runs, found, strict=True) if not math.isfinite(s))
            raise ModelError(f"The metric '{metric.key}' gave {found} for the {bad} run.")
        return found


@dataclass
class RowWriter:
    """Makes rows of one (probe, seed) of a plan."""

    plan: Plan
    scorer: Scorer
    keep_pictures: bool
    gave_pair: bool = False  # whether the clean and the corrupt picture went out

    def row(self, planned: PlannedRow, run: str) -> Row:
        """`run` names the scored run of this row, the base run where none was needed."""
        plan, manifest = self.plan, self.plan.manifest
        probe, scores = plan.probes[planned.probe], self.scorer.scores
        metric = next(m for m in plan.metrics if m.key == planned.metric)
        clean, corrupt = scores[CLEAN][metric.key], scores[CORRUPT][metric.key]
        score = scores[run][metric.key]
        turn = 1 if metric.higher_is_closer else -1
        swap, lost = plan.other_prompt is not None, plan.base == CLEAN
        total = turn * (clean - corrupt)
        effect = turn * (clean - score if lost else score - corrupt)
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


@dataclass
class PairRows:
    """The rows of one (probe, seed) that are still to come."""

    writer: RowWriter
    planned: Sequence[PlannedRow]
    started: bool = False

    def __post_init__(self) -> None:
        numbers = {lane: str(i) for i, lane in enumerate(lanes_of(self.planned))}
        self.of_run: dict[str, list[PlannedRow]] = {}
        for row in self.planned:
            if row.status == "run":
                self.of_run.setdefault(numbers[row.lane], []).append(row)

    def after(self, runs: Sequence[str]) -> Iterator[tuple[Row, Pictures]]:
        """Rows that can be written now that `runs` have been scored."""
        scorer = self.writer.scorer
        if not self.started and CORRUPT in scorer.scores and scorer.floor:
            self.started = True
            for row in self.planned:
                if row.status != "run":
                    yield self._row(row, self.writer.plan.base)
        for run in runs:
            for row in self.of_run.get(run, ()):
                yield self._row(row, run)
            scorer.forget(run)

    def _row(self, planned: PlannedRow, run: str) -> tuple[Row, Pictures]:
        row, scorer = self.writer.row(planned, run), self.writer.scorer
        pictures: Pictures = {}
        names = pair_pictures(row)
        if names is not None and row.picture is not None:
            pictures[row.picture] = scorer.picture(run)
            if not self.writer.gave_pair:
                pictures |= dict(zip(names, map(scorer.picture, (CLEAN, CORRUPT)), strict=True))
                self.writer.gave_pair = True
        return row, pictures


def rows_of_pairs(
    model: Model,
    pairs: Sequence[PairRows],
    runs: Iterator[Finished],
    inside: Callable[[], AbstractContextManager[None]],
) -> Iterator[tuple[Row, Pictures]]:
    """Rows of pairs that an engine runs together, each as soon as its run has ended.

    Everything heavy happens inside `inside()`, which is left before a row is handed out.
    """
    seen: set[int] = set()
    while True:
        with inside():
            finished = next(runs, None)
            if finished is None:
                break
            groups: dict[int, list[int]] = {}
            for i, (number, _) in enumerate(finished.runs):
                groups.setdefault(number, []).append(i)
            pictures = _decoded(model, pairs, finished)
            for number, rows in groups.items():
                pairs[number].writer.scorer.add(
                    [str(finished.runs[i][1]) for i in rows],
                    finished.latents[rows],
                    None if pictures is None else pictures[rows],
                )
        # The first floor frees the rows without a run of every pair.
        seen |= groups.keys()
        for number in sorted(seen):
            own = [str(finished.runs[i][1]) for i in groups.get(number, ())]
            yield from pairs[number].after(own)


def _decoded(model: Model, pairs: Sequence[PairRows], finished: Finished) -> Tensor | None:
    """[B, 3, H, W], in portions; None where metrics want latents and no picture is kept."""
    writer = pairs[0].writer
    if not writer.keep_pictures and all(m.needs == "latent" for m in writer.plan.metrics):
        return None
    return decode_in_parts(model, finished.latents, writer.plan.sampling)


def decode_in_parts(model: Model, latents: Tensor, sampling: Sampling) -> Tensor:
    """Pictures [B, 3, H, W] of latents, as many at a time as memory is sure to hold."""
    at_once = max(1, PORTION // (sampling.height * sampling.width))
    return torch.cat([model.decode(part) for part in latents.split(at_once)])


def lanes_of(planned: Sequence[PlannedRow]) -> tuple[Lane, ...]:
    """The lanes that need a run, each once."""
    return tuple(dict.fromkeys(row.lane for row in planned if row.status == "run"))
