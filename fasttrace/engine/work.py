"""Which runs a trace is made of: host-side planning on numbers alone, with its FLOPs.

The engine executes what stands here, call by call, so a plan's FLOPs are known before it runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fasttrace.engine.compiled import PORTION, Denoiser, portions
from fasttrace.engine.graph.prune import Cost
from fasttrace.engine.sources import is_own_row, prompts_of, replaces
from fasttrace.types import Lane, Patch


@dataclass(frozen=True)
class Setting:
    """What decides how lanes are run together.

    lanes: the most in a batch. cached: sites whose recorded activations are read, not a leader's.
    shared: the call a lane opens at is shared up to its site (stairs), which needs a next latent
    that is a weighted sum. pruning: graphs without what a replaced site makes superfluous.
    """

    calls: int
    guided: bool
    lanes: int
    cached: frozenset[str]
    shared: bool = True
    pruning: bool = True
    own_texts: bool = False  # text-encoder tracing

    @property
    def branches(self) -> int:
        return 2 if self.guided else 1


@dataclass(frozen=True)
class Todo:
    """A lane to run. pair, lane: its place in the job. opening: the first call it differs at."""

    pair: int
    lane: int
    opening: int
    patches: tuple[Patch, ...]

    @property
    def key(self) -> tuple[int, int]:
        return self.pair, self.lane

    @property
    def site(self) -> str | None:
        """The one site it is patched at: wholly, in the conditional rows alone."""
        if len(self.patches) != 1:
            return None
        patch = self.patches[0]
        chosen = patch.selector
        whole = chosen.tokens is None and patch.strength == 1 and chosen.branch == "cond"
        return patch.site.name if whole and replaces(patch.source) else None

    @property
    def joins(self) -> str | None:
        """That site, if what it takes there is in a row of the shared call."""
        return self.site if self.site and is_own_row(self.patches[0].source) else None

    def led_by(self, cached: Collection[str]) -> tuple[str, ...]:
        """Runs that have to be lanes beside it, since what it reads of them isn't kept."""
        read = [p for p in self.patches if is_own_row(p.source)]
        return tuple(dict.fromkeys(p.source for p in read if p.site.name not in cached))


@dataclass(frozen=True)
class Stairs:
    """One shared call of lanes of one pair; `joins` in execution order, then lanes from the start.

    Rows: clean, corrupt, `whole` (their text differs, so they share nothing), then each of
    `joining`; with its first and its last site joins a copy of the corrupt run, behind its lanes.
    """

    pair: int
    call: int
    whole: tuple[int, ...]  # lanes
    joining: tuple[tuple[str, tuple[int, ...]], ...]  # site, lanes

    @property
    def first(self) -> int:
        """Rows from the start; without joining lanes the corrupt copy is one of them."""
        return 2 + len(self.whole) + (not self.joining)

    @property
    def joins(self) -> dict[str, int]:
        found = {site: len(lanes) for site, lanes in self.joining}
        for site, _ in self.joining[:1] + self.joining[-1:]:
            found[site] += 1  # a corrupt copy
        return found

    @property
    def keys(self) -> list[tuple[int, int]]:
        """(pair, lane) of all its lanes."""
        lanes = (*self.whole, *(lane for _, own in self.joining for lane in own))
        return [(self.pair, lane) for lane in lanes]

    def halves(self, setting: Setting) -> list[Stairs]:
        """The same in parts that fit smaller batches."""
        joining = [(site, lane) for site, own in self.joining for lane in own]
        return stairs_of(self.pair, self.call, self.whole, joining, setting)

    def flops(self, cost: Cost) -> int:
        return self.first * cost.whole + sum(n * cost.after[site] for site, n in self.joins.items())


@dataclass(frozen=True)
class Batch:
    """Lanes run together from `start` on. Rows: leaders, a corrupt copy, lanes, padding, a copy.

    leaders: (pair, source). lanes: (pair, lane). copies: whether its first and last row (after the
    leaders) are corrupt copies, of the job's first pair. pruned: the site that all lanes share.
    window: the calls in which the pruned graph runs.
    """

    lanes: tuple[tuple[int, int], ...]
    start: int
    size: int
    copies: bool
    leaders: tuple[tuple[int, str], ...] = ()
    pruned: str | None = None
    window: tuple[int, int] = (0, 0)

    @property
    def first(self) -> int:
        """The row of the first lane."""
        return len(self.leaders) + self.copies

    def flops(self, cost: Cost, setting: Setting) -> int:
        left = setting.calls - self.start
        less = 0
        if self.pruned is not None:
            inside = max(0, self.window[1] - max(self.start, self.window[0]))
            less = inside * cost.dead[self.pruned]
        return self.size * (left * setting.branches * cost.whole - less)


@dataclass(frozen=True)
class Work:
    """Everything the lanes of some pairs need.

    trunks: pairs whose clean and corrupt runs are made together. others: runs of other prompts that
    each pair's lanes read.
    """

    setting: Setting
    pairs: int
    trunks: tuple[tuple[int, ...], ...]
    stairs: tuple[Stairs, ...]
    batches: tuple[Batch, ...]
    texts: int = 0  # that pairs share
    others: int = 0

    def flops(self, denoiser: Denoiser) -> int:
        """Everything that is computed."""
        setting, cost = self.setting, denoiser.cost
        row = setting.branches * setting.calls * cost.whole
        total = ((2 + self.others) * self.pairs + FLOOR_LANES) * row
        total += sum(stairs.flops(cost) for stairs in self.stairs)
        total += sum(batch.flops(cost, setting) for batch in self.batches)
        return total + self._tables(denoiser)

    def _tables(self, denoiser: Denoiser) -> int:
        """Of the parts that run once a text and once a call."""
        fills = [self.texts]
        if self.setting.own_texts:
            fills += [len(stairs.whole) for stairs in self.stairs]
            fills += [len(batch.lanes) for batch in self.batches]
        calls = self.setting.calls
        steps = [n * calls for n in fills] if denoiser.step_reads_text else [calls]
        total = sum(portions(n) for n in fills) * denoiser.text_cost
        return PORTION * (total + sum(portions(n) for n in steps) * denoiser.step_cost)

    def useful(self, cost: Cost, todo: Iterable[Todo]) -> int:
        """What the lanes asked for cost as they are run here, without leaders, padding, copies."""
        setting = self.setting
        row = setting.branches * cost.whole
        total = (2 + self.others) * self.pairs * setting.calls * row
        stairs = {(s.pair, lane): cost.whole for s in self.stairs for lane in s.whole}
        for s in self.stairs:
            for site, lanes in s.joining:
                stairs |= {(s.pair, lane): cost.after[site] for lane in lanes}
        pruned = {key: b for b in self.batches if b.pruned for key in b.lanes}
        for lane in todo:
            key = lane.key
            start = lane.opening + (key in stairs)
            total += stairs.get(key, 0) + (setting.calls - start) * row
            if (batch := pruned.get(key)) is not None and batch.pruned is not None:
                inside = max(0, batch.window[1] - max(start, batch.window[0]))
                total -= inside * cost.dead[batch.pruned]
        return total


# The corrupt run at batch 2: two lanes, once a job.
FLOOR_LANES = 2


def bound(cost: Cost, setting: Setting, pairs: int, todo: Iterable[Todo]) -> int:
    """The least FLOPs of an exact trace: every shared call, everything dead left out.

    At the call where a lane opens its latent is the corrupt run's, so its unconditional row and
    what precedes its site are there already; later, what only fed its site is not needed while the
    window lasts. Clean and corrupt run share their first call up to the text.
    """
    row = setting.branches * cost.whole
    uncond = cost.whole if setting.guided else 0
    first = uncond + (cost.whole - cost.apart) + 2 * cost.apart
    total = pairs * (2 * (setting.calls - 1) * row + first)
    todo = list(todo)
    # Of another prompt's run neither the shared beginning is needed nor what its last call ends in.
    prompts = {(x.pair, run) for x in todo for run in prompts_of([Lane(x.patches)])}
    total += len(prompts) * max(0, setting.calls - 2) * row
    for lane in todo:
        site = lane.site
        if lane.opening >= setting.calls:
            continue
        if site is None:
            total += _first_call(lane, cost) + (setting.calls - lane.opening - 1) * row
            continue
        stop = (lane.patches[0].selector.window or (0, setting.calls))[1]
        inside = max(0, stop - lane.opening - 1)
        total += cost.after[site] + (setting.calls - lane.opening - 1) * row
        total -= inside * cost.dead[site]
    return total


def _first_call(lane: Todo, cost: Cost) -> int:
    """What of the call it opens at differs from its base run, if it isn't replaced at one site."""
    places = [p.site.name for p in lane.patches]
    of_text = any(p.source.startswith("text:") for p in lane.patches)
    if not places or of_text or any(p.selector.branch != "cond" for p in lane.patches):
        return cost.apart
    return min(cost.apart, max(cost.after[place] for place in places))


def todo_of(lanes: Sequence[Sequence[Lane]], setting: Setting) -> list[Todo]:
    """lanes: of each pair. Each lane with the call it opens at."""
    found = []
    for pair, own in enumerate(lanes):
        for i, lane in enumerate(own):
            opens = [p.selector.window[0] if p.selector.window else 0 for p in lane.patches]
            opening = 0 if setting.own_texts else min(opens, default=0)
            patches = () if setting.own_texts else lane.patches
            found.append(Todo(pair, i, opening if setting.shared else 0, patches))
    return found


def plan_work(
    todo: Sequence[Todo],
    pairs: int,
    setting: Setting,
    cost: Cost,
    order: Sequence[str],
    texts: int = 0,
    others: int = 0,
) -> Work:
    """order: sites in execution order."""
    most = max(1, setting.lanes // 2)
    trunks = [tuple(range(i, min(i + most, pairs))) for i in range(0, pairs, most)]
    stairs = _stairs(todo, setting, order) if setting.shared else []
    climbed = {(s.pair, lane) for s in stairs for lane in s.whole} | {
        (s.pair, lane) for s in stairs for _, lanes in s.joining for lane in lanes
    }
    batches = batches_of(todo, climbed, setting, cost)
    return Work(setting, pairs, tuple(trunks), tuple(stairs), tuple(batches), texts, others)


def batches_of(
    todo: Sequence[Todo], climbed: Collection[tuple[int, int]], setting: Setting, cost: Cost
) -> list[Batch]:
    """climbed: (pair, lane) of those whose first call has been made."""
    by_start: dict[int, list[Todo]] = {}
    for lane in todo:
        start = lane.opening + (lane.key in climbed)
        if start < setting.calls:
            by_start.setdefault(start, []).append(lane)
    builder = _Batches(setting, cost)
    for start, lanes in sorted(by_start.items()):
        builder.add(start, lanes)
    return builder.found


def _stairs(todo: Sequence[Todo], setting: Setting, order: Sequence[str]) -> list[Stairs]:
    groups: dict[tuple[int, int], list[Todo]] = {}
    for lane in todo:
        # A lane that reads another text, or unconditional activations, differs from the start.
        if lane.joins is not None or setting.own_texts:
            groups.setdefault((lane.pair, lane.opening), []).append(lane)
    place = {site: i for i, site in enumerate(order)}
    found = []
    for (pair, call), lanes in groups.items():
        whole = [lane.lane for lane in lanes if lane.joins is None]
        joining = sorted((lane for lane in lanes if lane.joins), key=lambda x: place[str(x.site)])
        sites = [(str(lane.site), lane.lane) for lane in joining]
        found += stairs_of(pair, call, whole, sites, setting)
    return found


def stairs_of(
    pair: int,
    call: int,
    whole: Sequence[int],
    joining: Sequence[tuple[str, int]],
    setting: Setting,
) -> list[Stairs]:
    """One shared call in parts of as many rows as a full batch has. joining: (site, lane)."""
    most = max(1, setting.branches * setting.lanes - 4)  # beside clean, corrupt and two copies
    found = [Stairs(pair, call, tuple(part), ()) for part in _parts(whole, most)]
    for part in _parts(joining, most):
        by_site: dict[str, list[int]] = {}
        for site, lane in part:
            by_site.setdefault(site, []).append(lane)
        sites = tuple((site, tuple(own)) for site, own in by_site.items())
        found.append(Stairs(pair, call, (), sites))
    return found


def _parts(items: Sequence[Any], most: int) -> list[Sequence[Any]]:
    return [items[start : start + most] for start in range(0, len(items), most)]


@dataclass
class _Batches:
    setting: Setting
    cost: Cost
    found: list[Batch] = field(default_factory=list)
    seen: set[object] = field(default_factory=set)

    def add(self, start: int, lanes: list[Todo]) -> None:
        """Batches for lanes that all begin at call `start`."""
        left: list[Todo] = []
        for key, group in self._groups(lanes).items():
            site, window = key
            for i in range(0, len(group), self.setting.lanes - 2):
                part = group[i : i + self.setting.lanes - 2]
                if site is not None and self._pays(site, len(part), start, window):
                    self._pruned(site, window, start, part)
                else:
                    left += part
        self._full(start, sorted(left, key=lambda lane: lane.key))

    def _groups(self, lanes: list[Todo]) -> dict[tuple[str | None, tuple[int, int]], list[Todo]]:
        groups: dict[tuple[str | None, tuple[int, int]], list[Todo]] = {}
        for lane in lanes:
            site = lane.site if lane.site in self.setting.cached and self.setting.pruning else None
            window = (0, 0)
            if site is not None:
                window = lane.patches[0].selector.window or (0, self.setting.calls)
            groups.setdefault((site, window), []).append(lane)
        return groups

    def _pays(self, site: str, lanes: int, start: int, window: tuple[int, int]) -> bool:
        """Half a bucket at least, and less work than among other lanes, copies included."""
        if 2 * lanes < self.setting.lanes:
            return False
        alone = Batch(((0, 0),) * lanes, start, lanes + 2, True, pruned=site, window=window)
        among = Batch(((0, 0),) * lanes, start, lanes, False)
        return alone.flops(self.cost, self.setting) < among.flops(self.cost, self.setting)

    def _pruned(self, site: str, window: tuple[int, int], start: int, lanes: list[Todo]) -> None:
        keys = tuple(lane.key for lane in lanes)
        size = len(lanes) + 2
        self.found.append(Batch(keys, start, size, True, pruned=site, window=window))

    def _full(self, start: int, lanes: list[Todo]) -> None:
        while lanes:
            # A shape that was there before needs no copies again, and their rows are free.
            for copies in (False, True):
                leaders, taken = self._fill(lanes, self.setting.lanes - 2 * copies)
                size = _bucket(len(leaders) + len(taken) + 2 * copies, self.setting.lanes)
                if copies or (start, size) in self.seen:
                    break
            self.seen.add((start, size))
            lanes = lanes[len(taken) :]
            keys = tuple(lane.key for lane in taken)
            self.found.append(Batch(keys, start, size, copies, tuple(leaders)))

    def _fill(self, lanes: Sequence[Todo], room: int) -> tuple[list[tuple[int, str]], list[Todo]]:
        """As many lanes, with the leaders they need, as there is room for; at least one."""
        leaders: list[tuple[int, str]] = []
        taken: list[Todo] = []
        for lane in lanes:
            needed = [(lane.pair, source) for source in lane.led_by(self.setting.cached)]
            new = [key for key in needed if key not in leaders]
            if taken and len(leaders) + len(new) + len(taken) + 1 > room:
                break
            leaders += new
            taken.append(lane)
        return leaders, taken


def _bucket(wanted: int, most: int) -> int:
    """Lanes of a batch that holds `wanted`: few different sizes, little padding."""
    return max(wanted, min(most, -(-wanted // 4) * 4))
