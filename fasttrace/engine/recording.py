"""Activations of plain runs, call by call, from the compiled step that traces use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fasttrace.engine.base import CLEAN, CORRUPT, Pair
from fasttrace.engine.cache import Cache
from fasttrace.engine.job import Job
from fasttrace.engine.step import Shape
from fasttrace.engine.workshop import Workshop
from fasttrace.errors import UsageError

See = Callable[[int, Mapping[str, Tensor]], None]


class LastCall(Cache):
    """A cache of one call's rows, which the next call overwrites."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.rows, self.calls, self.home, self.device = rows, 1, "device", device
        self.extra, self.staged, self.slots = {}, True, 1
        self.kept = {
            site: torch.zeros((1, rows, *shape), dtype=dtype, device=device)
            for site, shape in shapes.items()
        }
        self.stage, self._feed = {}, None

    def target(self, site: str, call: int, start: int, stop: int) -> Tensor:
        return self.kept[site][0, start:stop]


class RecordingJob(Job):
    """The clean runs of some pairs, with nothing beside them."""

    def recordable(self) -> dict[str, tuple[int, ...]]:
        """Places by name, with the shape of a row, in execution order."""
        return {mark.name: mark.shape for mark in self.denoiser.body.small.marks}

    @torch.no_grad()
    def record(self, sites: Sequence[str], branches: Sequence[str], see: See) -> Tensor:
        """Final latents [pairs, C, h, w]. Raises `UsageError` for a place that isn't computed here.

        see(call, activations) after every call: of each site [pairs, branches, ...]; the next call
        overwrites them. pairs: those of `self.pairs`.
        """
        known = self.recordable()
        for site in sites:
            if site not in known:
                raise UsageError(f"{site} is computed once a text, or not at all; not at a call.")
        self.tables = self.workshop.tables(self.denoiser, self.texts.shared, self.calls)
        self.start = [pair.start.latents * self.scheduler.init_noise_sigma for pair in self.pairs]
        starts = zip(self.pairs, self.start, strict=True)
        self.noise = [self._noise(pair, start) for pair, start in starts]
        self.tables.set_schedule(self.schedule.timesteps)
        self.tables.set_texts(0, self.texts.given)
        lanes, each = len(self.pairs), len(branches)
        names, model = tuple(sites), self.model
        key = ("last call", names, lanes * each)
        self.cache = self.workshop.cache(
            key,
            lambda: LastCall(
                {site: known[site] for site in names}, lanes * each, model.dtype, model.device
            ),
        )
        step = self._step(Shape(lanes, self.guided, recorded=names, records=lanes * each))
        self._prepare(step, range(lanes), [self.texts.slot(p, CLEAN) for p in range(lanes)])
        rows = [step.row(branch, lane) for lane in range(lanes) for branch in branches]
        step.record_rows.copy_(torch.tensor(rows, dtype=torch.int64))
        state = torch.cat([self._first_state(p) for p in range(lanes)], 1)
        for call in self._loop(step, state, 0, 0):
            step.run(call, record=0)
            kept = self.cache.kept
            see(call, {s: kept[s][0].unflatten(0, (lanes, each)) for s in names})
        return self._checked(step.state[0].clone(), [(p, CLEAN) for p in range(lanes)])


def recording_job(workshop: Workshop, pairs: Sequence[Pair]) -> RecordingJob:
    """A job of as many of the first pairs as run together; a pair's lanes are not run."""
    workshop.renew()
    most = max(1, workshop.lanes // 2)
    alone = [
        Pair({CLEAN: p.texts[CLEAN], CORRUPT: p.texts[CLEAN]}, CLEAN, p.start, p.sampling, ())
        for p in pairs[:most]
    ]
    return RecordingJob(workshop, alone)
