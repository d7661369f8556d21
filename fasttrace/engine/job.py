"""What the fast engine does for some pairs: `work.py` says what runs, this file runs it.

First the clean and corrupt runs, of which is kept what will be read. Lanes begin where they begin
to differ from the corrupt run; lanes of one site over many pairs run in a graph of their own where
that leaves work out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fasttrace.adapters.pipeline import Model
from fasttrace.engine.base import CLEAN, CORRUPT, FLOOR, Finished, Pair
from fasttrace.engine.cache import HOMES, Cache, size_of
from fasttrace.engine.compiled import Denoiser, Tables, of_model
from fasttrace.engine.first_call import FirstCall
from fasttrace.engine.reference import ReferenceEngine
from fasttrace.engine.runners import check_runner
from fasttrace.engine.schedule import draw_noise, read_schedule
from fasttrace.engine.stale import structure_of
from fasttrace.engine.step import FULL, PRUNED, Shape, Step
from fasttrace.engine.texts import Texts
from fasttrace.engine.work import (
    FLOOR_LANES,
    Batch,
    Setting,
    Stairs,
    Work,
    batches_of,
    plan_work,
    todo_of,
)
from fasttrace.errors import ModelError, UsageError
from fasttrace.types import Patch

_log = logging.getLogger(__name__)
_BOTH = ("uncond", "cond")
CLEAN_MODES = ("auto", "leader", "cache")
Run = tuple[int, str | int]
ERRORS = (RuntimeError, MemoryError)
SMALLEST = 4  # lanes: a leader, two copies of the corrupt run, one patched lane


@dataclass(frozen=True)
class Options:
    """How lanes are run. None of it changes a score beyond the noise floor.

    clean: where lanes read activations, "leader" (the source is a lane of every batch: nothing is
    stored), "cache" (recorded once) or "auto" (a cache where `budget` bytes hold one pair's).
    home: where the cache lies, "device" or "host" (pinned, fetched ahead). lanes: the most in a
    batch. runner: see `runners.RUNNERS`; None is a CUDA graph on CUDA, else the graph's code.
    pairs: the most whose lanes are run together. pruning, sharing: leave out what a replaced site
    makes superfluous, and what lanes have in common at the call they open at. staged: read the
    cache through staging slots, as captured graphs have to; None is where they are.
    """

    clean: str = "auto"
    home: str = "device"
    runner: str | None = None
    lanes: int = 48
    pairs: int = 24
    budget: int = 1 << 30
    pruning: bool = True
    sharing: bool = True
    staged: bool | None = None

    def __post_init__(self) -> None:
        for name, known in (("clean", CLEAN_MODES), ("home", HOMES)):
            if getattr(self, name) not in known:
                given = getattr(self, name)
                raise UsageError(f"{name} is one of {', '.join(known)}, not {given!r}.")
        if self.lanes < SMALLEST:
            raise UsageError(
                f"A batch has at least {SMALLEST} lanes (a leader, two copies of the corrupt run "
                f"and one patched lane); {self.lanes} were asked for."
            )
        if self.pairs < 1:
            raise UsageError(f"At least one pair is run at a time, not {self.pairs}.")


class Workshop:
    """What outlives a job: compiled denoisers, tables, steps. `executed` counts FLOPs."""

    def __init__(self, model: Model, options: Options) -> None:
        self.model, self.options, self.lanes = model, options, options.lanes
        cuda = model.device.type == "cuda"
        self.runner = options.runner or ("cudagraph" if cuda else "eager")
        check_runner(self.runner, model.device)
        self.executed = 0
        self._structure: Any = None
        self._denoisers: dict[Any, Denoiser] = {}
        self._tables: dict[Any, Tables] = {}
        self._kept: dict[Any, Any] = {}

    def renew(self) -> None:
        """Trace again if the model is built otherwise than when it was traced."""
        structure = structure_of(self.model.unet)
        if structure != self._structure:
            self._denoisers.clear()
            self._tables.clear()
            self._kept.clear()
            self._structure = structure

    def denoiser(self, pair: Pair) -> Denoiser:
        """Traced once for a picture size and a shape of text."""
        sampling, text = pair.sampling, pair.texts[CLEAN]
        key = (sampling.height, sampling.width, tuple(text.cond.shape))
        if key not in self._denoisers:
            self._denoisers[key] = of_model(self.model, sampling, text)
        return self._denoisers[key]

    def tables(self, denoiser: Denoiser, slots: int, calls: int) -> Tables:
        """Steps are bound to the tables they read, so other tables mean other steps."""
        key = (id(denoiser), slots, calls)
        if key not in self._tables:
            self._tables.clear()
            self._kept.clear()
            self._tables[key] = Tables(denoiser, slots, calls, self.model.device)
        return self._tables[key]

    def kept(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """A step, or a cache, by its key; made once."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def forget_steps(self) -> None:
        """Drop compiled steps, which hold buffers of their size."""
        self._kept = {key: kept for key, kept in self._kept.items() if key[0] == "cache"}
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Trunk:
    """What the clean and corrupt runs carried into the calls that lanes begin at.

    states: call -> [kept, 2 P, C, h, w], clean and corrupt of each pair in turn. uncond: the
    unconditional predictions made there. final [2 P, C, h, w].
    """

    states: dict[int, Tensor]
    uncond: dict[int, Tensor]
    final: Tensor


@dataclass(frozen=True)
class Shared:
    """What batches begin from. states [kept, 1, C, h, w]: of lanes whose first call is made.

    copies: call -> states of corrupt copies that went through the same first call.
    """

    trunk: Trunk
    states: dict[tuple[int, int], Tensor]
    copies: dict[int, list[Tensor]]
    finished: list[Finished]


class Job:
    """The runs of so many pairs as memory holds."""

    def __init__(self, workshop: Workshop, pairs: Sequence[Pair]) -> None:
        self.workshop, self.options, self.model = workshop, workshop.options, workshop.model
        first = pairs[0]
        model, self.sampling = self.model, first.sampling
        self.guided = model.guided(self.sampling)
        self.scheduler = model.scheduler(self.sampling.steps)
        options = model.step_options(self.scheduler, self.sampling.eta, first.start.generator())
        self.schedule = read_schedule(self.scheduler, options)
        self.calls = self.schedule.calls
        self.denoiser = workshop.denoiser(first)
        of_text = first.lane_texts is not None
        lanes = [] if of_text else [lane for pair in pairs for lane in pair.lanes]
        patches = [patch for lane in lanes for patch in lane.patches]
        self._check(patches)
        read = [p for p in patches if not p.source.startswith("text:")]
        self.sources = sorted({(p.source, b) for p in read for b in self.branches(p)})
        asked = {p.site.name: p.site.shape for p in read}
        order = [name for name in self.denoiser.marks if name in asked]
        self.shapes = {name: asked[name] for name in order}
        # Each pair's own scheduler remembers its own past, so such pairs run alone.
        most = self.options.pairs if self.schedule.linear else 1
        self.cached = bool(order) and self._cache_fits()
        if self.cached:
            most = min(most, max(1, self.options.budget // max(1, self._bytes(1))))
        self.pairs = list(pairs[:most])
        self.setting = Setting(
            calls=self.calls,
            guided=self.guided,
            lanes=workshop.lanes,
            cached=self.cached,
            shared=self.schedule.linear and self.options.sharing,
            pruning=self.options.pruning and self.schedule.linear,
            own_texts=of_text,
        )
        self.todo = todo_of([pair.lanes for pair in self.pairs], self.setting)
        self.texts = Texts(model, self.sampling, self.pairs)
        self.order = order
        self.replan()

    def replan(self) -> None:
        self.work: Work = plan_work(
            self.todo,
            len(self.pairs),
            self.setting,
            self.denoiser.cost,
            self.order,
            texts=self.texts.shared,
        )
        own = max((len(b.lanes) for b in self.work.batches), default=0)
        own = max([own, *(len(s.whole) for s in self.work.stairs)])
        slots = self.texts.shared + (own if self.setting.own_texts else 0)
        self.tables = self.workshop.tables(self.denoiser, -(-slots // 8) * 8, self.calls)

    def run(self) -> Iterator[Finished]:
        """Everything, in smaller batches where memory doesn't hold them."""
        filled = self.tables.flops
        while True:
            try:
                shared = self._shared()
                break
            except ERRORS as error:
                self._halve(error)
                self.replan()
        yield from shared.finished
        left = list(self.work.batches)
        while left:
            try:
                finished = self._run_batch(left[0], shared)
            except ERRORS as error:
                self._halve(error)
                keys = {key for batch in left for key in batch.lanes}
                todo = [lane for lane in self.todo if lane.key in keys]
                cost = self.denoiser.cost
                left = batches_of(todo, shared.states, self.setting, cost)
                continue
            yield finished
            for key in left.pop(0).lanes:
                shared.states.pop(key, None)
        self.workshop.executed += self.tables.flops - filled

    def _halve(self, error: Exception) -> None:
        """After a failed allocation. Raises `ModelError` where batches are as small as they get."""
        if not _is_allocation(error):
            raise error
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
    def _shared(self) -> Shared:
        """The clean and corrupt runs, the copies beside them, and the calls that lanes share."""
        self.start = [pair.start.latents * self.scheduler.init_noise_sigma for pair in self.pairs]
        starts = zip(self.pairs, self.start, strict=True)
        self.noise = [self._noise(pair, start) for pair, start in starts]
        self.tables.set_schedule(self.schedule.timesteps)
        self.tables.set_texts(0, self.texts.given)
        self.cache = None
        if self.cached:
            rows = self._kept_at(len(self.pairs), 0)
            self.cache = self.workshop.kept(
                ("cache", rows, tuple(self.shapes), self.calls), lambda: self._make_cache(rows)
            )
        trunk = self._trunk()
        ends: list[Run] = [(p, run) for p in range(len(self.pairs)) for run in (CLEAN, CORRUPT)]
        finished = [
            Finished(tuple(ends), trunk.final),
            Finished(((0, FLOOR),) * FLOOR_LANES, self._floor()),
        ]
        states: dict[tuple[int, int], Tensor] = {}
        copies: dict[int, list[Tensor]] = {}
        for stairs in self.work.stairs:
            found, copied = self._climb(stairs, trunk)
            states |= found
            if stairs.pair == 0:
                copies.setdefault(stairs.call + 1, copied)
        over = [t.key for t in self.todo if t.opening + (t.key in states) >= self.calls]
        if over:
            last = copies.get(self.calls, [])
            runs: list[Run] = [(0, FLOOR)] * len(last) + list(over)
            latents = torch.cat([state[0] for state in (*last, *map(states.__getitem__, over))])
            finished.append(Finished(tuple(runs), self._checked(latents, runs)))
        return Shared(trunk, states, copies, finished)

    # ---- the runs

    def _trunk(self) -> Trunk:
        """Clean and corrupt together; clean activations are recorded where they will be read."""
        wanted = {batch.start for batch in self.work.batches} | {s.call for s in self.work.stairs}
        states: dict[int, list[Tensor]] = {call: [] for call in wanted}
        uncond: dict[int, list[Tensor]] = {s.call: [] for s in self.work.stairs}
        finals = []
        for pairs in self.work.trunks:
            lanes = 2 * len(pairs)
            leading = pairs[0] == 0
            records = leading + len(pairs) * len(self.sources) if self.cached else 0
            shape = Shape(
                lanes, self.guided, tuple(self.shapes) if records else (), records=records
            )
            step = self._step(shape)
            cond = [self.texts.slot(p, run) for p in pairs for run in (CLEAN, CORRUPT)]
            self._prepare(step, [p for p in pairs for _ in range(2)], cond)
            if records:
                rows = [step.row("cond", 1)] * leading + [
                    step.row(branch, 2 * i + (run == CORRUPT))
                    for i in range(len(pairs))
                    for run, branch in self.sources
                ]
                step.record_rows.copy_(torch.tensor(rows))
            state = torch.cat([self._first_state(p) for p in pairs for _ in range(2)], 1)
            at = 0 if leading else self._kept_at(pairs[0], 0)
            for call in self._loop(step, state, 0, pairs[0]):
                if call in states:
                    states[call].append(step.state.clone())
                step.run(call, record=at)
                if call in uncond:
                    uncond[call].append(step.prediction[:lanes].clone())
            runs = [(p, run) for p in pairs for run in (CLEAN, CORRUPT)]
            finals.append(self._checked(step.state[0].clone(), runs))
        return Trunk(
            {call: torch.cat(parts, 1) for call, parts in states.items()},
            {call: torch.cat(parts) for call, parts in uncond.items()},
            torch.cat(finals),
        )

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
        first = 2 + len(stairs.whole) + (not stairs.joining)
        key = ("stairs", first, tuple(joins.items()))
        climb: FirstCall = self.workshop.kept(
            key, lambda: FirstCall(self.denoiser, self.tables, first, joins, self.model.dtype)
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
        self.workshop.executed += climb.flops
        found = {
            (pair, lane): after[:, row : row + 1]
            for row, lane in zip(climb.lane_rows(stairs), lanes, strict=True)
        }
        copies = [after[:, 1:2], after[:, climb.copy_row : climb.copy_row + 1]]
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
        copied = copies.get(batch.start, [corrupt, corrupt])
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
        for branch in self.branches(patch):
            at = step.row(branch, row)
            if patch.source.startswith("text:"):
                run = patch.source.removeprefix("text:")
                other = self.texts.slot(pair, run if branch == "cond" else "uncond")
                for name, mark in self.denoiser.keys.items():
                    if mark.rpartition(".")[0] == patch.site.name:
                        step.slots[start:stop, step.slot_names[name], at] = other
                continue
            if patch.strength == 0:
                continue
            point = self._point(step, patch.site.name)
            if self.cache is not None:
                k = self._kept_at(pair, self.sources.index((patch.source, branch)))
                found = [self.cache.row(call, k) for call in range(start, stop)]
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
        found = [self.cache.row(call, 0) for call in range(self.calls)]
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
        source: Any = "none" if not sites else "buffer" if self.cached else "rows"
        return self._step(Shape(batch.size, self.guided, sites, source, pruned=batch.pruned))

    def _step(self, shape: Shape) -> Step:
        slots, guidance = self.schedule.slots, self.sampling.guidance
        cache = self.cache if shape.records or shape.sources == "buffer" else None
        key = ("step", shape, slots, guidance, self.schedule.linear, id(cache))

        def make() -> Step:
            return Step(
                self.denoiser,
                self.tables,
                shape,
                slots,
                guidance,
                self.workshop.runner,
                self.model.dtype,
                cache,
            )

        step: Step = self.workshop.kept(key, make)
        return step

    def _make_cache(self, rows: int) -> Cache:
        return Cache(
            self.shapes,
            rows,
            self.calls,
            self.model.dtype,
            self.model.device,
            self.options.home,
            self.options.staged,
        )

    # ---- the loop

    def _loop(self, step: Step, state: Tensor, start: int, pair: int) -> Iterator[int]:
        """The calls of a run; where the scheduler is no weighted sum, its own `step` ends each."""
        step.begin(state, start)
        if self.schedule.linear:
            for call in range(start, self.calls):
                yield call
                self.workshop.executed += step.ran
            return
        scheduler, lanes = self.model.scheduler(self.sampling.steps), step.shape.lanes
        generators = [self.pairs[pair].start.generator() for _ in range(lanes)]
        options = self.model.step_options(scheduler, self.sampling.eta, generators)
        for call, t in enumerate(scheduler.timesteps):
            step.set_input(scheduler.scale_model_input(step.state[0], t))
            step.call.fill_(call)
            yield call
            self.workshop.executed += step.ran
            prediction = step.prediction
            if self.guided:
                uncond, cond = prediction.chunk(2)
                prediction = uncond + self.sampling.guidance * (cond - uncond)
            latents = scheduler.step(prediction, t, step.state[0], **options, return_dict=False)[0]
            step.state[0].copy_(latents)

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

    def branches(self, patch: Patch) -> tuple[str, ...]:
        if not self.guided:
            return ("cond",)
        return _BOTH if patch.selector.branch == "both" else (patch.selector.branch,)

    def _check(self, patches: Sequence[Patch]) -> None:
        for patch in patches:
            start, stop = patch.selector.window or (0, self.calls)
            if not 0 <= start < min(stop, self.calls):
                raise ModelError(
                    f"The patch at {patch.site.name} reached no tensor in calls ({start}, {stop}): "
                    f"a run has {self.calls} calls."
                )

    def _kept_at(self, pair: int, source: int) -> int:
        """A row of the cache. Row 0 is the first pair's corrupt run, for copies of it."""
        return 1 + pair * len(self.sources) + source

    def _bytes(self, pairs: int) -> int:
        rows = 1 + pairs * len(self.sources)
        return size_of(self.shapes, rows, self.calls, self.model.dtype.itemsize)

    def _cache_fits(self) -> bool:
        if self.options.clean != "auto":
            return self.options.clean == "cache"
        return self._bytes(1) <= self.options.budget


def _is_allocation(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
