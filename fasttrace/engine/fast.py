"""The fast engine: many lanes in one compiled step, all of them sharing the clean run.

A run of one (prompt, seed) is a small one with the clean and the corrupt run, which keeps what is
to be shared, and batches of lanes. Lanes whose windows open later begin where the corrupt run had
come to (trunk and branch). Every shape and opening has copies of the corrupt lane in its first and
last row: they are the noise floor.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.text import Text
from fasttrace.engine.base import CLEAN, CORRUPT, FLOOR, Pair
from fasttrace.engine.reference import ReferenceEngine
from fasttrace.engine.schedule import Schedule, draw_noise, read_schedule
from fasttrace.engine.stale import structure_of
from fasttrace.engine.step import Shape, Step
from fasttrace.errors import ModelError, UsageError
from fasttrace.types import Lane, Patch

_log = logging.getLogger(__name__)
_TEXTS = 3  # slots before the lanes' own: unconditional, clean, corrupt
_SLOT = {CLEAN: 1, CORRUPT: 2}
_BOTH = ("uncond", "cond")
CLEAN_MODES = ("auto", "leader", "cache")


@dataclass(frozen=True)
class Batch:
    """Lanes run together: indices into the pair's lanes, from call `opening` on."""

    lanes: tuple[int, ...]
    opening: int
    size: int  # lanes of the compiled step, the leader and the corrupt copies included
    copies: bool  # whether its first and last row are corrupt copies


@dataclass(frozen=True)
class Trunk:
    """What the clean and the corrupt run carried into every call, and their final latents."""

    states: list[Tensor]  # a call: [kept, 2, C, h, w]
    final: Tensor  # [2, C, h, w]


class FastEngine:
    """Batches of lanes through one compiled step.

    clean: where lanes read activations, "leader" (a clean lane in every batch: nothing is stored),
    "cache" (recorded once, `budget` bytes at most) or "auto" (cache where it fits). lanes: the most
    in a batch. runner: see `runners.RUNNERS`; None is a CUDA graph on CUDA, else the graph's code.
    """

    name = "fast"

    def __init__(
        self,
        model: Model,
        *,
        clean: str = "auto",
        runner: str | None = None,
        lanes: int | None = None,
        budget: int = 4 << 30,
    ) -> None:
        if clean not in CLEAN_MODES:
            raise UsageError(f"clean is one of {', '.join(CLEAN_MODES)}, not {clean!r}.")
        if lanes is not None and lanes < 4:
            raise UsageError(
                f"A batch has at least 4 lanes (a leader, two copies of the corrupt run and one "
                f"patched lane); {lanes} were asked for."
            )
        self.model, self.clean, self.budget = model, clean, budget
        self.runner = runner or ("cudagraph" if model.device.type == "cuda" else "eager")
        self.lanes = lanes or 48
        self._steps: dict[Any, Step] = {}
        self._structure: Any = None

    def run(self, pair: Pair) -> Iterator[tuple[str | int, Tensor]]:
        structure = structure_of(self.model.unet)
        if structure != self._structure:
            self._steps.clear()
            self._structure = structure
        job = _Job(self, pair)
        yield from job.run()

    def step(self, shape: Shape, pair: Pair, sites: Sequence[str], schedule: Schedule) -> Step:
        """The compiled step of a shape; built once."""
        key = (shape, tuple(sites), schedule.slots, pair.sampling.guidance, schedule.linear)
        if key not in self._steps:
            example = pair.texts[CLEAN]
            slots = schedule.slots
            self._steps[key] = Step(
                self.model, shape, pair.sampling, example, sites, slots, self.runner
            )
        return self._steps[key]


class _Job:
    """The run of one pair."""

    def __init__(self, engine: FastEngine, pair: Pair) -> None:
        self.engine, self.model, self.pair = engine, engine.model, pair
        model, sampling = self.model, pair.sampling
        self.guided = model.guided(sampling)
        self.scheduler = model.scheduler(sampling.steps)
        generator = pair.start.generator()
        options = model.step_options(self.scheduler, sampling.eta, generator)
        self.schedule = read_schedule(self.scheduler, options)
        self.start = pair.start.latents * self.scheduler.init_noise_sigma
        self.noise = None
        if self.schedule.linear and self.schedule.slots.noise:
            self.noise = draw_noise(self.scheduler, self.start, options)
        self.calls = self.schedule.calls
        patches = [p for lane in pair.lanes for p in lane.patches if not self._of_text(p)]
        self.sources = sorted({(p.source, b) for p in patches for b in self._branches(p)})
        self.sites = list(dict.fromkeys(p.site.name for p in patches))
        self.cached = bool(patches) and self._cache_fits(patches)
        self.leaders = [] if self.cached else sorted({source for source, _ in self.sources})

    def run(self) -> Iterator[tuple[str | int, Tensor]]:
        trunk = self._trunk()
        yield CLEAN, trunk.final[:1]
        first: list[tuple[Batch, Tensor]] = []
        batches = self._batches()
        # The floor stands in every row, so every kind of batch runs once before a row goes out.
        for batch in [b for b in batches if b.copies]:
            first.append((batch, self._lanes(batch, trunk)))
        copies = [trunk.final[1:]]
        for _, latents in first:
            lead = len(self.leaders)
            copies += [latents[lead : lead + 1], latents[-1:]]
        if len(copies) > 1:
            yield CORRUPT, copies[1]
            yield FLOOR, torch.cat([copies[0], *copies[2:]])
        else:  # no lane at all
            yield CORRUPT, copies[0]
            yield FLOOR, self._copies()
        for batch, latents in first:
            yield from self._results(batch, latents)
        for batch in batches:
            if not batch.copies:
                yield from self._results(batch, self._lanes(batch, trunk))

    def _results(self, batch: Batch, latents: Tensor) -> Iterator[tuple[int, Tensor]]:
        lead = len(self.leaders) + batch.copies
        for row, lane in enumerate(batch.lanes, start=lead):
            yield lane, latents[row : row + 1]

    # ---- which lanes run together

    def _batches(self) -> list[Batch]:
        """Lanes by the call they open at, in batches of few different sizes."""
        openings: dict[int, list[int]] = {}
        for i, lane in enumerate(self.pair.lanes):
            opening = self._opening(lane)
            # A scheduler's own memory can't be copied, so there the trunk isn't shared.
            openings.setdefault(opening if self.schedule.linear else 0, []).append(i)
        lead, most = len(self.leaders), self.engine.lanes
        found: list[Batch] = []
        seen: set[tuple[int, int]] = set()
        for opening, lanes in sorted(openings.items()):
            left = list(lanes)
            while left:
                size = _bucket(lead + 2 + len(left), most)
                copies = (size, opening) not in seen
                seen.add((size, opening))
                room = size - lead - 2 * copies
                found.append(Batch(tuple(left[:room]), opening, size, copies))
                left = left[room:]
        return found

    def _opening(self, lane: Lane) -> int:
        """The first call at which the lane differs from the run it is based on."""
        if self.pair.lane_texts is not None:
            return 0
        opens = [p.selector.window[0] if p.selector.window else 0 for p in lane.patches]
        for patch in lane.patches:
            start, stop = patch.selector.window or (0, self.calls)
            if not 0 <= start < min(stop, self.calls):
                raise ModelError(
                    f"The patch at {patch.site.name} reached no tensor in calls ({start}, {stop}): "
                    f"a run has {self.calls} calls."
                )
        return min(opens, default=0)

    # ---- the runs

    def _trunk(self) -> Trunk:
        """Clean and corrupt together; clean activations are recorded where they will be read."""
        step = self._step(2, "none", records=self.cached)
        step.set_texts([self.pair.texts[CLEAN], self.pair.texts[CORRUPT]])
        step.set_schedule(self.schedule, self.noise)
        step.clear()
        step.read_texts([_SLOT[CLEAN], _SLOT[CORRUPT]])
        if self.cached:
            rows = [self._row(b, 0 if run == CLEAN else 1, 2) for run, b in self.sources]
            step.record_rows.copy_(torch.tensor(rows))
            self.buffers = {
                site: tensor.new_empty(len(rows) * self.calls, *tensor.shape[1:])
                for site, tensor in step.record.items()
            }
        states: list[Tensor] = []
        for call in self._loop(step, self._start(2), 0):
            states.append(step.state.clone())
            step.run()
            if self.cached:
                for site, buffer in self.buffers.items():
                    buffer[call :: self.calls].copy_(step.record[site])
        return Trunk(states, self._final(step, CLEAN, CORRUPT))

    def _copies(self) -> Tensor:
        """The corrupt run twice, in a batch of other size than the trunk's."""
        step = self._step(4, "none")
        self._prepare(step, [self.pair.texts[CLEAN], self.pair.texts[CORRUPT]])
        step.read_texts([_SLOT[CORRUPT]] * 4)
        for _ in self._loop(step, self._start(4), 0):
            step.run()
        final = self._final(step, *[CORRUPT] * 4)
        return torch.cat([final[:1], final[-1:]])

    def _lanes(self, batch: Batch, trunk: Trunk) -> Tensor:
        """Final latents of a batch's lanes, with its leaders before and its copies around them."""
        pair = self.pair
        lanes = [pair.lanes[i] for i in batch.lanes]
        step = self._step(batch.size, self._source_kind())
        texts = [pair.texts[CLEAN], pair.texts[CORRUPT]]
        base = _SLOT[pair.base]
        own = [base] * len(lanes)
        if pair.lane_texts is not None:
            texts += pair.lane_texts(lanes)
            own = list(range(_TEXTS, _TEXTS + len(lanes)))
        self._prepare(step, texts)
        head = [_SLOT[run] for run in self.leaders]
        slots = head + [base] * batch.copies + own
        slots += [base] * (batch.size - len(slots))
        step.read_texts(slots)
        if self.cached:
            for site, source in step.sources.items():
                source.copy_(self.buffers[site])
        first = len(self.leaders) + batch.copies
        for row, lane in enumerate(lanes, start=first):
            for patch in lane.patches if pair.lane_texts is None else ():
                self._write(step, batch.size, row, patch)
        origin = [0 if run == CLEAN else 1 for run in self.leaders]
        origin += [0 if pair.base == CLEAN else 1] * (batch.size - len(origin))
        state = trunk.states[batch.opening][:, origin]
        for _ in self._loop(step, state, batch.opening):
            step.run()
        names = [f"lane {i}" for i in batch.lanes]
        rows = [*self.leaders, *[pair.base] * batch.copies, *names]
        return self._final(step, *rows, *[pair.base] * (batch.size - len(rows)))

    def _write(self, step: Step, lanes: int, row: int, patch: Patch) -> None:
        start, stop = patch.selector.window or (0, self.calls)
        for branch in self._branches(patch):
            at = self._row(branch, row, lanes)
            if self._of_text(patch):
                other = _SLOT[patch.source.removeprefix("text:")] if branch == "cond" else 0
                for name, mark in step.parts.keys.items():
                    if mark.rpartition(".")[0] == patch.site.name:
                        step.slots[start:stop, step.slot_names[name], at] = other
                continue
            if patch.strength == 0:
                continue
            point = step.sites.index(patch.site.name)
            if self.cached:
                k = self.sources.index((patch.source, branch))
                calls = torch.arange(start, stop, device=self.model.device)
                step.index[start:stop, point, at] = k * self.calls + calls
            else:
                leader = self.leaders.index(patch.source)
                step.index[start:stop, point, at] = self._row(branch, leader, lanes)
            step.strength[start:stop, point, at] = patch.strength

    def _loop(self, step: Step, state: Tensor, opening: int) -> Iterator[int]:
        """The calls of a run; where the scheduler is no weighted sum, its own `step` ends each."""
        step.begin(state, opening)
        if self.schedule.linear:
            yield from range(opening, self.calls)
            return
        scheduler, lanes = self.model.scheduler(self.pair.sampling.steps), step.shape.lanes
        generators = [self.pair.start.generator() for _ in range(lanes)]
        options = self.model.step_options(scheduler, self.pair.sampling.eta, generators)
        for call, t in enumerate(scheduler.timesteps):
            step.set_input(scheduler.scale_model_input(step.state[0], t))
            step.call.fill_(call)
            yield call
            prediction = step.prediction
            if self.guided:
                uncond, cond = prediction.chunk(2)
                prediction = uncond + self.pair.sampling.guidance * (cond - uncond)
            latents = scheduler.step(prediction, t, step.state[0], **options, return_dict=False)[0]
            step.state[0].copy_(latents)

    def _final(self, step: Step, *runs: str) -> Tensor:
        """The finished latents, checked."""
        final = step.state[0].clone()
        if not torch.isfinite(final).all():
            bad = [i for i, rows in enumerate(final) if not torch.isfinite(rows).all()]
            self._explain(runs[bad[0]])
        return final

    def _explain(self, run: str) -> None:
        """Run it the slow way, which names the site and the call."""
        slow, pair = ReferenceEngine(self.model), self.pair
        if run in pair.texts:
            slow.denoise(run, pair.texts[run], pair)
        else:
            for _ in slow.run(_only(pair, int(run.split()[1]))):
                pass
        raise ModelError(
            f"The {run} run gives NaN in the fast engine, but not in the reference engine."
        )

    # ---- small things

    def _prepare(self, step: Step, texts: Sequence[Text]) -> None:
        step.set_texts(texts)
        step.set_schedule(self.schedule, self.noise)
        step.clear()

    def _start(self, lanes: int) -> Tensor:
        return self.schedule.first_state(self.start.repeat(lanes, 1, 1, 1))

    def _step(self, lanes: int, sources: Any, *, records: bool = False) -> Step:
        sampling, scale = self.pair.sampling, self.model.pipe.vae_scale_factor
        own = lanes if self.pair.lane_texts is not None else 0
        shape = Shape(
            lanes=lanes,
            guided=self.guided,
            calls=self.calls,
            text_slots=_TEXTS + own,
            sources=sources,
            recorded=len(self.sources) if records or sources == "buffer" else 0,
            records=records,
            height=sampling.height // scale,
            width=sampling.width // scale,
        )
        sites = self.sites if records or sources != "none" else ()
        return self.engine.step(shape, self.pair, sites, self.schedule)

    def _source_kind(self) -> str:
        if not self.sites:
            return "none"
        return "buffer" if self.cached else "rows"

    def _branches(self, patch: Patch) -> tuple[str, ...]:
        if not self.guided:
            return ("cond",)
        return _BOTH if patch.selector.branch == "both" else (patch.selector.branch,)

    def _row(self, branch: str, lane: int, lanes: int) -> int:
        """A lane's row in the denoiser's batch: unconditional rows first."""
        return lane + lanes * (self.guided and branch == "cond")

    def _of_text(self, patch: Patch) -> bool:
        return patch.source.startswith("text:") or patch.site.component != "unet"

    def _cache_fits(self, patches: Sequence[Patch]) -> bool:
        if self.engine.clean != "auto":
            return self.engine.clean == "cache"
        shapes = {p.site.name: p.site.shape for p in patches}
        row = sum(prod(shape) for shape in shapes.values()) * self.model.dtype.itemsize
        # Once recorded, once as the source that the step reads.
        return 2 * row * len(self.sources) * self.calls <= self.engine.budget


def _bucket(wanted: int, most: int) -> int:
    """Lanes of a batch that should hold `wanted`: few different sizes, little padding."""
    if wanted >= most:
        return most
    return -(-wanted // 4) * 4


def _only(pair: Pair, lane: int) -> Pair:
    from dataclasses import replace

    return replace(pair, lanes=(pair.lanes[lane],))


__all__ = ["CLEAN_MODES", "FastEngine"]
