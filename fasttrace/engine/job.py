"""What the fast engine does for some pairs: `work.py` says what runs, this file runs it.

First the clean and corrupt runs, of which is kept what will be read. Lanes begin where they begin
to differ from the corrupt run; lanes of one site over many pairs run in a graph of their own where
that leaves work out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fasttrace.engine.arrange import arrange, branches_of
from fasttrace.engine.base import CLEAN, CORRUPT, FLOOR, Finished, Pair
from fasttrace.engine.cache import Cache
from fasttrace.engine.first_call import FirstCall
from fasttrace.engine.layout import fill_made
from fasttrace.engine.options import SMALLEST
from fasttrace.engine.reference import ReferenceEngine
from fasttrace.engine.schedule import draw_noise, read_schedule
from fasttrace.engine.sources import ADD, check_sources
from fasttrace.engine.step import FULL, PRUNED, Shape, Step
from fasttrace.engine.texts import Texts
from fasttrace.engine.work import FLOOR_LANES, Batch, Stairs, batches_of
from fasttrace.engine.workshop import Workshop
from fasttrace.errors import ModelError, UsageError
from fasttrace.types import Patch

_log = logging.getLogger(__name__)
Run = tuple[int, str | int]
ERRORS = (RuntimeError, MemoryError)


@dataclass(frozen=True)
class Trunk:
    """What the clean and corrupt runs carried into the calls that lanes begin at.

    states: call -> [kept, 2 P, C, h, w], clean and corrupt of each pair in turn. uncond: the
    unconditional predictions made there.
    """

    states: dict[int, Tensor]
    uncond: dict[int, Tensor]


@dataclass
class Shared:
    """What batches begin from. waiting: shared calls still to be made; climbed: lanes past theirs.

    states [kept, 1, C, h, w]: of lanes whose first call is made. copies: call -> states of corrupt
    copies that went through the same first call.
    """

    trunk: Trunk
    waiting: list[Stairs]
    climbed: set[tuple[int, int]] = field(default_factory=set)
    states: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    copies: dict[int, list[Tensor]] = field(default_factory=dict)


class Job:
    """The runs of so many pairs as memory holds."""

    def __init__(self, workshop: Workshop, pairs: Sequence[Pair]) -> None:
        self.workshop, self.options, self.model = workshop, workshop.options, workshop.model
        first = pairs[0]
        model, self.sampling = self.model, first.sampling
        if any(pair.sampling != self.sampling for pair in pairs):
            raise UsageError("Pairs that run together have one sampling; these have several.")
        self.guided = model.guided(self.sampling)
        self.scheduler = model.scheduler(self.sampling.steps)
        options = model.step_options(self.scheduler, self.sampling.eta, first.start.generator())
        self.schedule = read_schedule(self.scheduler, options)
        self.calls = self.schedule.calls
        self.denoiser = workshop.denoiser(first.sampling, first.texts[CLEAN])
        self.of_text = first.lane_texts is not None
        self.tensors, self.on_step = first.tensors, first.on_step
        for pair in () if self.of_text else pairs:
            if pair.tensors is not self.tensors and (pair.tensors or self.tensors):
                raise UsageError("Pairs that run together have one set of tensors.")
            patches = [patch for lane in pair.lanes for patch in lane.patches]
            check_sources(patches, self.tensors, self.calls, tuple(pair.texts))
        self._arrange(pairs)

    def _arrange(self, pairs: Sequence[Pair]) -> None:
        """Decide what runs; for all of `pairs`, or as many first ones as memory holds."""
        self.chunk = chunk = arrange(
            [pair.lanes for pair in pairs],
            self.denoiser,
            replace(self.options, lanes=self.workshop.lanes, cache=self.workshop.cache_bytes),
            calls=self.calls,
            guided=self.guided,
            linear=self.schedule.linear,
            own_texts=self.of_text,
            itemsize=self.model.dtype.itemsize,
            memory=self.workshop.memory,
        )
        self.pairs = list(pairs[: chunk.pairs])
        self.layout = chunk.layout
        self.texts = Texts(self.model, self.sampling, self.pairs, self.layout.other_runs)
        self.work = replace(chunk.work, texts=self.texts.shared)
        self.setting, self.todo = chunk.setting, chunk.todo
        self.shapes = chunk.shapes
        self.cached = tuple(site for site in chunk.shapes if site in chunk.setting.cached)

    def run(self) -> Iterator[Finished]:
        """Everything, in smaller batches where memory doesn't hold them."""
        while True:
            try:
                own = self.chunk.own_slots if self.of_text else 0
                slots = self.texts.shared + own
                self.tables = self.workshop.tables(self.denoiser, slots, self.calls)
                shared, finished = self._begin()
                break
            except ERRORS as error:
                self._halve(error)
                # What failed may have been the cache or the tables.
                self.workshop.cache_bytes //= 2
                self._arrange(self.pairs[: max(1, len(self.pairs) // 2)])
        yield from finished
        left = list(self.work.batches)
        while left or shared.waiting:
            try:
                climbed = self._climb_before(left, shared)
                if climbed is not None:
                    yield from climbed
                    continue
                done = self._run_batch(left[0], shared)
            except ERRORS as error:
                self._halve(error)
                keys = {key for batch in left for key in batch.lanes}
                todo = [lane for lane in self.todo if lane.key in keys]
                shared_first = shared.climbed | {key for s in shared.waiting for key in s.keys}
                left = batches_of(todo, shared_first, self.setting, self.denoiser.cost)
                shared.waiting = [part for s in shared.waiting for part in s.halves(self.setting)]
                continue
            yield done
            for key in left.pop(0).lanes:
                shared.states.pop(key, None)

    def _halve(self, error: Exception) -> None:
        """After a failed allocation. Raises `ModelError` where batches are as small as they get."""
        if not _is_allocation(error):
            raise error
        error.__traceback__ = None  # it holds the failed call's tensors
        lanes = self.setting.lanes // 2
        if lanes < SMALLEST:
            raise ModelError(
                f"There is no memory for a batch of {self.setting.lanes} lanes of "
                f"{self.sampling.height}x{self.sampling.width} pictures; make them smaller."
            ) from error
        _log.warning("no memory for %d lanes in a batch; going on with %d", 2 * lanes, lanes)
        self.workshop.lanes = lanes
        self.setting = replace(self.setting, lanes=lanes)
        self.workshop.forget_steps()

    @torch.no_grad()
    def _begin(self) -> tuple[Shared, list[Finished]]:
        """The clean and corrupt runs and the copies beside them."""
        self.start = [pair.start.latents * self.scheduler.init_noise_sigma for pair in self.pairs]
        starts = zip(self.pairs, self.start, strict=True)
        self.noise = [self._noise(pair, start) for pair, start in starts]
        self.tables.set_schedule(self.schedule.timesteps)
        self.tables.set_texts(0, self.texts.given)
        self.cache = None
        if self.cached:
            key = (self.layout.common, self.cached, self.calls, tuple(self.layout.extra.items()))
            self.cache = self.workshop.cache(key, self._make_cache)
        trunk, final = self._trunk()
        if self.cache is not None:
            self._other_runs()
            fill_made(self.cache, self.layout, self.tensors)
        ends: list[Run] = [(p, run) for p in range(len(self.pairs)) for run in (CLEAN, CORRUPT)]
        copies: list[Run] = [(0, FLOOR)] * FLOOR_LANES
        finished = [Finished(tuple(ends), final), Finished(tuple(copies), self._floor())]
        return Shared(trunk, list(self.work.stairs)), finished

    @torch.no_grad()
    def _climb_before(self, batches: Sequence[Batch], shared: Shared) -> list[Finished] | None:
        """Make a shared call that the next batch begins after; the lanes that have ended with it.

        None where there is none left. Only one call's states are kept at a time.
        """
        start = batches[0].start if batches else self.calls
        stairs = next((s for s in shared.waiting if s.call < start), None)
        if stairs is None:
            return None
        found, copies = self._climb(stairs, shared.trunk)
        # One at a time, so that a failed allocation in the next one loses nothing of this one.
        shared.waiting.remove(stairs)
        shared.climbed |= found.keys()
        first = shared.copies.setdefault(stairs.call + 1, copies if stairs.pair == 0 else [])
        if stairs.call + 1 < self.calls:
            shared.states |= found
            return []
        last = copies if first is copies else []
        runs: list[Run] = [(0, FLOOR)] * len(last) + list(found)
        latents = torch.cat([state[0] for state in (*last, *found.values())])
        return [Finished(tuple(runs), self._checked(latents, runs))]

    # ---- the runs

    def _trunk(self) -> tuple[Trunk, Tensor]:
        """Clean and corrupt together; clean activations are recorded where they will be read."""
        wanted = {batch.start for batch in self.work.batches} | {s.call for s in self.work.stairs}
        states: dict[int, list[Tensor]] = {call: [] for call in wanted}
        uncond: dict[int, list[Tensor]] = {s.call: [] for s in self.work.stairs}
        finals = []
        for pairs in self.work.trunks:
            lanes = 2 * len(pairs)
            leading = pairs[0] == 0
            sources = self.layout.sources
            records = leading + len(pairs) * len(sources) if self.cached else 0
            step = self._step(Shape(lanes, self.guided, recorded=self.cached, records=records))
            cond = [self.texts.slot(p, run) for p in pairs for run in (CLEAN, CORRUPT)]
            self._prepare(step, [p for p in pairs for _ in range(2)], cond)
            if records:
                rows = [step.row("cond", 1)] * leading + [
                    step.row(branch, 2 * i + (run == CORRUPT))
                    for i in range(len(pairs))
                    for run, branch in sources
                ]
                step.record_rows.copy_(torch.tensor(rows))
            state = torch.cat([self._first_state(p) for p in pairs for _ in range(2)], 1)
            at = 0 if leading else 1 + pairs[0] * len(sources)
            for call in self._loop(step, state, 0, pairs[0]):
                if call in states:
                    states[call].append(step.state.clone())
                step.run(call, record=at)
                if call in uncond:
                    uncond[call].append(step.prediction[:lanes].clone())
            runs = [(p, run) for p in pairs for run in (CLEAN, CORRUPT)]
            finals.append(self._checked(step.state[0].clone(), runs))
        trunk = Trunk(
            {call: torch.cat(parts, 1) for call, parts in states.items()},
            {call: torch.cat(parts) for call, parts in uncond.items()},
        )
        return trunk, torch.cat(finals)

    def _other_runs(self) -> None:
        """Runs of other prompts: recorded, and nothing else."""
        layout, most = self.layout, self.setting.lanes
        runs = [(p, run) for p in range(len(self.pairs)) for run in layout.other_runs]
        # A scheduler that is no weighted sum runs one pair at a time: then these are of one pair.
        for first in range(0, len(runs), most):
            part = runs[first : first + most]
            kept = [
                (lane, pair, run, branch)
                for lane, (pair, run) in enumerate(part)
                for own, branch in layout.others
                if own == run
            ]
            shape = Shape(len(part), self.guided, recorded=self.cached, records=len(kept))
            step = self._step(shape)
            self._prepare(step, [p for p, _ in part], [self.texts.slot(p, run) for p, run in part])
            rows = [step.row(branch, lane) for lane, _, _, branch in kept]
            step.record_rows.copy_(torch.tensor(rows))
            _, pair, run, branch = kept[0]
            at = layout.run_row(pair, run, branch)
            state = torch.cat([self._first_state(p) for p, _ in part], 1)
            for call in self._loop(step, state, 0, part[0][0]):
                step.run(call, record=at)
            self._checked(step.state[0], part)

    def _floor(self) -> Tensor:
        """The first pair's corrupt run, twice in a batch of two."""
        step = self._step(Shape(FLOOR_LANES, self.guided))
        self._prepare(step, [0] * FLOOR_LANES, [self.texts.slot(0, CORRUPT)] * FLOOR_LANES)
        state = torch.cat([self._first_state(0)] * FLOOR_LANES, 1)
        for call in self._loop(step, state, 0, 0):
            step.run(call)
        return self._checked(step.state[0].clone(), [(0, CORRUPT)] * FLOOR_LANES)

    def _climb(
        self, stairs: Stairs, trunk: Trunk
    ) -> tuple[dict[tuple[int, int], Tensor], list[Tensor]]:
        """Lanes' states [kept, 1, C, h, w] after a shared call, and those of corrupt copies."""
        pair, joins = stairs.pair, stairs.joins
        key = ("stairs", stairs.first, tuple(joins.items()))
        climb: FirstCall = self.workshop.kept(
            key,
            lambda: FirstCall(
                self.denoiser,
                self.tables,
                stairs.first,
                joins,
                self.model.dtype,
                self.workshop.fused,
            ),
        )
        lanes = [lane for _, own in stairs.joining for lane in own] + list(stairs.whole)
        base = self.pairs[pair].base
        slots = [self.texts.slot(pair, run) for run in (CLEAN, CORRUPT)]
        if stairs.whole:
            slots += self._own_slots([(pair, lane) for lane in stairs.whole])
        slots += [self.texts.slot(pair, base)] * (climb.rows - len(slots))
        state = trunk.states[stairs.call][:, 2 * pair : 2 * pair + 2]
        parent = int(base == CORRUPT)
        rows = [0, 1] + [parent] * (climb.rows - 2)
        patched = {
            row: int(self.pairs[pair].lanes[lane].patches[0].source == CORRUPT)
            for row, lane in zip(climb.lane_rows(stairs), lanes, strict=True)
            if lane not in stairs.whole
        }
        uncond = None
        if self.guided:
            uncond = trunk.uncond[stairs.call][2 * pair : 2 * pair + 2]
        after = climb.run(
            stairs.call,
            state[:, rows],
            slots,
            parent,
            patched,
            None if uncond is None else uncond[rows],
            self.sampling.guidance,
            self.schedule,
            self.noise[pair],
        )
        self.workshop.stepped += climb.flops
        self._tell(stairs.call, len(lanes))
        found = {
            (pair, lane): after[:, row : row + 1].clone()
            for row, lane in zip(climb.lane_rows(stairs), lanes, strict=True)
        }
        # Of another base than the corrupt run there is but its own row.
        places = climb.copy_rows if base == CORRUPT else (1, 1)
        copies = [after[:, row : row + 1] for row in places]
        return found, copies

    @torch.no_grad()
    def _run_batch(self, batch: Batch, shared: Shared) -> Finished:
        """A batch's lanes to their end."""
        trunk, states, copies = shared.trunk, shared.states, shared.copies
        step = self._batch_step(batch)
        filler = batch.size - batch.first - len(batch.lanes)
        pairs = [p for p, _ in batch.leaders] + [0] * batch.copies + [p for p, _ in batch.lanes]
        pairs += [0] * filler
        slots = [self.texts.slot(p, run) for p, run in batch.leaders]
        slots += [self.texts.slot(0, CORRUPT)] * batch.copies
        if self.setting.own_texts:
            slots += self._own_slots(batch.lanes)
        else:
            slots += [self.texts.slot(p, self.pairs[p].base) for p, _ in batch.lanes]
        slots += [self.texts.slot(0, CORRUPT)] * filler
        self._prepare(step, pairs, slots)
        for row, (pair, lane) in enumerate(batch.lanes, start=batch.first):
            for patch in () if self.setting.own_texts else self.pairs[pair].lanes[lane].patches:
                self._write(step, batch, row, pair, patch)
        if batch.pruned is not None and batch.copies:
            for row in (0, batch.size - 1):
                self._write_copy(step, batch, row)
        corrupt = trunk.states[batch.start][:, 1:2]  # the first pair's
        copied = copies.get(batch.start) or [corrupt, corrupt]
        stem = trunk.states[batch.start]
        parts = [stem[:, [2 * p + (run == CORRUPT)]] for p, run in batch.leaders]
        parts += copied[:1] * batch.copies
        for pair, lane in batch.lanes:
            at = 2 * pair + (self.pairs[pair].base == CORRUPT)
            parts.append(states.get((pair, lane), stem[:, at : at + 1]))
        parts += [copied[1]] * filler
        state = torch.cat(parts, 1)
        for call in self._loop(step, state, batch.start, batch.lanes[0][0]):
            inside = batch.pruned is not None and batch.window[0] <= call < batch.window[1]
            step.run(call, PRUNED if inside else FULL)
        taken = slice(batch.first, batch.first + len(batch.lanes))
        final = step.state[0]
        parts = [final[taken]]
        runs: list[Run] = list(batch.lanes)
        if batch.copies:
            lead = len(batch.leaders)
            parts = [final[lead : lead + 1], final[-1:], *parts]
            runs = [(0, FLOOR), (0, FLOOR), *runs]
        return Finished(tuple(runs), self._checked(torch.cat(parts), runs))

    # ---- filling the tables

    def _write(self, step: Step, batch: Batch, row: int, pair: int, patch: Patch) -> None:
        start, stop = patch.selector.window or (0, self.calls)
        for branch in branches_of(patch, self.guided):
            at = step.row(branch, row)
            if patch.source.startswith("text:"):
                run = patch.source.removeprefix("text:")
                other = self.texts.slot(pair, run if branch == "cond" else "uncond")
                step.slots[start:stop, step.slot_names[patch.site.name], at] = other
                continue
            if patch.strength == 0:
                continue
            point, site = self._point(step, patch.site.name), patch.site.name
            if site in self.cached:
                assert self.cache is not None
                k = self.layout.row(site, pair, patch.source, branch)
                found = [self.cache.row(call, k, site) for call in range(start, stop)]
                if patch.source.startswith(ADD):
                    added = step.shape.added.index(site)
                    step.add_index[start:stop, added, at] = torch.tensor(found, device=step.device)
                    step.add_scale[start:stop, added, at] = patch.strength
                    continue
                step.index[start:stop, point, at] = torch.tensor(found, device=step.device)
            else:
                leader = step.row(branch, batch.leaders.index((pair, patch.source)))
                step.index[start:stop, point, at] = leader
            step.strength[start:stop, point, at] = patch.strength

    def _write_copy(self, step: Step, batch: Batch, row: int) -> None:
        """A corrupt copy in a pruned graph reads the corrupt run's activation."""
        assert self.cache is not None
        assert batch.pruned is not None
        point = self._point(step, batch.pruned)
        found = [self.cache.row(call, 0, batch.pruned) for call in range(self.calls)]
        step.index[:, point, step.row("cond", row)] = torch.tensor(found, device=step.device)

    def _point(self, step: Step, site: str) -> int:
        return step.shape.sites.index(site)

    def _own_slots(self, lanes: Sequence[tuple[int, int]]) -> list[int]:
        """Put lanes' own texts into the slots behind the shared ones."""
        given = self.texts.own(lanes)
        self.tables.set_texts(self.texts.shared, given)
        return list(range(self.texts.shared, self.texts.shared + len(lanes)))

    def _prepare(self, step: Step, pairs: Sequence[int], slots: Sequence[int]) -> None:
        """pairs, slots: of each lane."""
        step.set_schedule(self.schedule)
        step.clear()
        step.read_texts([self.texts.slot(p, "uncond") for p in pairs], slots)
        if step.noise is not None:
            for row, pair in enumerate(pairs):
                noise = self.noise[pair]
                assert noise is not None
                step.noise[:, row] = noise[:, 0]

    # ---- making steps

    def _batch_step(self, batch: Batch) -> Step:
        sites = (batch.pruned,) if batch.pruned else tuple(self.shapes)
        cached = tuple(site for site in sites if site in self.cached)
        added = () if batch.pruned else self.chunk.added
        shape = Shape(batch.size, self.guided, sites, cached, added, pruned=batch.pruned)
        return self._step(shape)

    def _step(self, shape: Shape) -> Step:
        slots, guidance = self.schedule.slots, self.sampling.guidance
        cache = self.cache if shape.recorded or shape.cached else None
        key = ("step", shape, slots, guidance, self.schedule.linear, id(cache))

        def make() -> Step:
            return Step(
                self.denoiser,
                self.tables,
                shape,
                slots,
                guidance,
                self.workshop.runner,
                self.workshop.ground,
                self.model.dtype,
                cache,
                self.workshop.fused,
            )

        step: Step = self.workshop.kept(key, make)
        return step

    def _make_cache(self) -> Cache:
        return Cache(
            {site: self.shapes[site] for site in self.cached},
            self.layout.common,
            self.calls,
            self.model.dtype,
            self.model.device,
            self.options.home,
            self.options.staged,
            self.layout.extra,
        )

    # ---- the loop

    def _loop(self, step: Step, state: Tensor, start: int, pair: int) -> Iterator[int]:
        """The calls of a run; where the scheduler is no weighted sum, its own `step` ends each."""
        step.begin(state, start)
        if self.schedule.linear:
            for call in range(start, self.calls):
                yield call
                self.workshop.stepped += step.ran
                self._tell(call, step.shape.lanes)
            return
        scheduler, lanes = self.model.scheduler(self.sampling.steps), step.shape.lanes
        generators = [self.pairs[pair].start.generator() for _ in range(lanes)]
        options = self.model.step_options(scheduler, self.sampling.eta, generators)
        for call, t in enumerate(scheduler.timesteps):
            step.set_input(scheduler.scale_model_input(step.state[0], t))
            step.call.fill_(call)
            yield call
            self.workshop.stepped += step.ran
            # Copies: many schedulers keep what they are given until their next step.
            prediction = self.model.guide(step.prediction.clone(), self.sampling)
            before = step.state[0].clone()
            latents = scheduler.step(prediction, t, before, **options, return_dict=False)[0]
            step.state[0].copy_(latents)
            self._tell(call, lanes)

    def _tell(self, call: int, lanes: int) -> None:
        if self.on_step is not None:
            self.on_step(call, self.schedule.timesteps[call], lanes)

    def _checked(self, latents: Tensor, runs: Sequence[Run]) -> Tensor:
        """The finished latents; `ModelError` names site and call where they are not finite."""
        if not torch.isfinite(latents).all():
            bad = next(i for i, row in enumerate(latents) if not torch.isfinite(row).all())
            self._explain(*runs[bad])
        return latents

    def _explain(self, number: int, run: str | int) -> None:
        """Run it the slow way, which names the site and the call."""
        slow, pair = ReferenceEngine(self.model), self.pairs[number]
        if run == FLOOR:
            run = CORRUPT
        if isinstance(run, str):
            slow.denoise(run, pair.texts[run], pair)
        else:
            for _ in slow.run([replace(pair, lanes=(pair.lanes[run],))]):
                pass
        raise ModelError(
            f"The {run} run gives NaN in the fast engine, but not in the reference engine."
        )

    # ---- small things

    def _first_state(self, pair: int) -> Tensor:
        return self.schedule.first_state(self.start[pair])

    def _noise(self, pair: Pair, start: Tensor) -> Tensor | None:
        if not (self.schedule.linear and self.schedule.slots.noise):
            return None
        generator = pair.start.generator()
        options = self.model.step_options(self.scheduler, self.sampling.eta, generator)
        return draw_noise(self.scheduler, start, options)


def _is_allocation(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
