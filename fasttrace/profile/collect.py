"""The fast engine with a clock in it, and a tracer that uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fasttrace.adapters.pipeline import Model
from fasttrace.engine.base import Finished, Pair
from fasttrace.engine.compiled import Denoiser, Tables
from fasttrace.engine.fast import FastEngine
from fasttrace.engine.first_call import FirstCall
from fasttrace.engine.job import Job, Shared, Trunk
from fasttrace.engine.options import Options
from fasttrace.engine.step import Step
from fasttrace.engine.work import Batch, Stairs
from fasttrace.engine.workshop import Workshop
from fasttrace.plan.plan import Plan, PlannedRow
from fasttrace.profile.instrument import Instruments
from fasttrace.profile.recorder import Recorder
from fasttrace.rows import Pictures
from fasttrace.tracer import Tracer
from fasttrace.types import Probe, Row

MAKING = "making graphs"


class ProfiledWorkshop(Workshop):
    """A workshop whose every step, shared call and table has been instrumented."""

    def __init__(
        self, model: Model, options: Options, recorder: Recorder, like: Workshop | None = None
    ) -> None:
        super().__init__(model, replace(options, runner="eager"))
        self.recorder = recorder
        self.instruments: dict[int, Instruments] = {}
        if like is not None:  # its denoisers are traced
            self._denoisers, self._structure = like._denoisers, like._structure

    def tables(self, denoiser: Denoiser, slots: int, calls: int) -> Tables:
        held = self._tables
        with self.recorder.phase(MAKING):
            found = super().tables(denoiser, slots, calls)
            if found is not held:
                self._of(denoiser).tables(found)
        return found

    def kept(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        def instrumented() -> Any:
            with self.recorder.phase(MAKING):
                made = make()
                if isinstance(made, Step):
                    self._of(made.denoiser).step(made)
                elif isinstance(made, FirstCall):
                    self._of(made.denoiser).first_call(made)
                return made

        return super().kept(key, instrumented)

    def _of(self, denoiser: Denoiser) -> Instruments:
        known = self.instruments.get(id(denoiser))
        if known is None:
            side = denoiser.latent[1:]
            scale = self.model.scale
            sites = self.model.sites(side[0] * scale, side[1] * scale).sites
            kinds = {site.name: site.kind for site in sites}
            known = self.instruments[id(denoiser)] = Instruments(denoiser, kinds, self.recorder)
        return known


class ProfiledJob(Job):
    """A job whose trunk, copies, shared calls and batches are spans."""

    workshop: ProfiledWorkshop

    def _trunk(self) -> tuple[Trunk, Tensor]:
        with self._inside(f"clean and corrupt of {len(self.pairs)}"):
            return super()._trunk()

    def _floor(self) -> Tensor:
        with self._inside("noise floor"):
            return super()._floor()

    def _climb(
        self, stairs: Stairs, trunk: Trunk
    ) -> tuple[dict[tuple[int, int], Tensor], list[Tensor]]:
        lanes = sum(len(own) for _, own in stairs.joining) + len(stairs.whole)
        with self._inside(f"shared call of {lanes} lanes", lanes=lanes):
            return super()._climb(stairs, trunk)

    def _run_batch(self, batch: Batch, shared: Shared) -> Finished:
        pruned = f", without what feeds {batch.pruned}" if batch.pruned else ""
        lanes = len(batch.lanes)
        with self._inside(f"batch of {lanes} lanes{pruned}", lanes=lanes, size=batch.size):
            return super()._run_batch(batch, shared)

    def _inside(self, name: str, **about: Any) -> Any:
        return self.workshop.recorder.inside("batch", name, **about)


class ProfiledEngine(FastEngine):
    """Runs pairs one set after another; `recorder` is settled after each answer."""

    def __init__(
        self, model: Model, recorder: Recorder, like: FastEngine | None = None, **options: Any
    ) -> None:
        super().__init__(model, **options)
        held = like.workshop if like is not None else None
        self.recorder = recorder
        self.workshop: ProfiledWorkshop = ProfiledWorkshop(model, self.options, recorder, held)

    def run(self, pairs: Sequence[Pair]) -> Iterator[Finished]:
        self.workshop.renew()
        start = 0
        while start < len(pairs):
            job = ProfiledJob(self.workshop, pairs[start:])
            for finished in job.run():
                self.recorder.settle()
                runs = tuple((start + pair, run) for pair, run in finished.runs)
                yield replace(finished, runs=runs)
            start += len(job.pairs)


class ProfiledTracer(Tracer):
    """A tracer whose text encoders, decoder, metrics and engine are measured.

    like: one of the same pipeline, whose traced denoisers are used again.
    """

    def __init__(self, like: Tracer, recorder: Recorder) -> None:
        super().__init__(like.model.pipe)
        assert isinstance(like.engine, FastEngine)
        self.recorder = recorder
        self.model.defaults = like.model.defaults
        self.engine = ProfiledEngine(self.model, recorder, like.engine, **vars(like.engine.options))
        self.model.decode = recorder.timed("VAE", self.model.decode)  # type: ignore[method-assign]

    @property
    def fingerprint(self) -> str:
        with self.recorder.phase("fingerprint"):
            return super().fingerprint

    def iter_rows(self, plan: Plan, **options: Any) -> Iterator[tuple[Row, Pictures]]:
        timed = self.recorder.timed
        metrics = tuple(
            replace(metric, function=timed(f"metric {metric.key}", metric.function))
            for metric in plan.metrics
        )
        return super().iter_rows(replace(plan, metrics=metrics), **options)

    def _pair(self, plan: Plan, probe: Probe, planned: list[PlannedRow]) -> Pair:
        timed = self.recorder.timed
        pair: Pair = timed("text encoder", super()._pair)(plan, probe, planned)
        if pair.lane_texts is None:
            return pair
        return replace(pair, lane_texts=timed("text encoder", pair.lane_texts))
