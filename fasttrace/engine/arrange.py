"""Decides how many pairs run together, and whether their clean activations are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from fasttrace.engine.compiled import Denoiser
from fasttrace.engine.graph.anyrows import AnyRows
from fasttrace.engine.layout import Layout, added_sites, branches_of, layout_of, must_be_kept
from fasttrace.engine.memory import device_of, resident_bytes
from fasttrace.engine.options import SMALLEST, Options
from fasttrace.engine.work import Setting, Todo, Work, plan_work, todo_of
from fasttrace.errors import ModelError, UsageError
from fasttrace.types import Lane, Patch

__all__ = ["Chunk", "arrange", "branches_of", "memory_of"]

WORTH = 0.1  # of a row's work that a site has to make superfluous to be kept before others


@dataclass(frozen=True)
class Chunk:
    """The first pairs of a trace, run together.

    layout: of the cache, where there is one. shapes: of the sites that lanes read, in execution
    order. added: those at which something is added. cache_bytes: of the activations kept, 0 with
    leaders.
    """

    pairs: int
    setting: Setting
    todo: list[Todo]
    work: Work
    layout: Layout
    shapes: dict[str, tuple[int, ...]]
    added: tuple[str, ...]
    cache_bytes: int

    @property
    def own_slots(self) -> int:
        """The most texts of lanes' own that are there at a time."""
        rows = [len(batch.lanes) for batch in self.work.batches]
        return max([*rows, *(len(stairs.whole) for stairs in self.work.stairs)], default=0)


def arrange(
    lanes: Sequence[Sequence[Lane]],
    denoiser: Denoiser,
    options: Options,
    *,
    calls: int,
    guided: bool,
    linear: bool,
    own_texts: bool,
    itemsize: int,
    negatives: Sequence[str] | None = None,
    memory: int | None = None,
) -> Chunk:
    """lanes: of each pair. linear: whether the schedule is a weighted sum. itemsize: bytes.

    negatives: each pair's negative prompt, to count texts; None is one for all. memory: bytes that
    there are; batches are halved until they fit, down to `SMALLEST` lanes.

    Raises `ModelError` for a patch whose window lies outside the run.
    """
    patches = [] if own_texts else [p for own in lanes for lane in own for p in lane.patches]
    _check(patches, calls, denoiser)
    _check_lanes([] if own_texts else [lane for own in lanes for lane in own])
    read = [p for p in patches if not p.source.startswith("text:")]
    layouts: dict[int, Layout] = {}
    asked = {p.site.name: p.site.shape for p in read}
    shapes = {name: asked[name] for name in denoiser.marks if name in asked}
    forced = {p.site.name for p in read if must_be_kept(p)}
    least = {name: shape for name, shape in shapes.items() if name in forced}
    added = () if own_texts else added_sites(lanes)

    # Each pair's own scheduler remembers its own past, so such pairs run alone.
    most = min(len(lanes), options.pairs if linear else 1)

    def layout(pairs: int) -> Layout:
        if pairs not in layouts:
            layouts[pairs] = layout_of([] if own_texts else lanes[:pairs], guided)
        return layouts[pairs]

    def chunk(pairs: int, kept: Mapping[str, tuple[int, ...]]) -> Chunk:
        setting = Setting(
            calls=calls,
            guided=guided,
            lanes=options.lanes,
            cached=frozenset(kept),
            shared=linear and options.sharing and denoiser.shareable,
            pruning=linear and options.pruning,
            own_texts=own_texts,
        )
        todo = todo_of(lanes[:pairs], setting)
        others = len(layout(pairs).other_runs)
        texts = (2 + others) * pairs + guided * len(set((negatives or [""])[:pairs]))
        work = plan_work(todo, pairs, setting, denoiser.cost, list(shapes), texts, others)
        taken = layout(pairs).bytes(kept, calls, itemsize)
        return Chunk(pairs, setting, todo, work, layout(pairs), shapes, added, taken)

    def fitting(kept: Mapping[str, tuple[int, ...]]) -> int:
        """How many pairs' activations fit the cache."""
        sizes = (layout(n).bytes(kept, calls, itemsize) for n in range(most, 0, -1))
        return most - next((i for i, size in enumerate(sizes) if size <= options.cache), most)

    cost = denoiser.cost
    worthwhile = {
        s: shape for s, shape in shapes.items() if s in forced or cost.dead[s] > WORTH * cost.whole
    }
    few = max(1, fitting(least)) if least else most
    while True:
        choices = [chunk(few, least)] if options.clean != "cache" or not shapes else []
        if shapes and options.clean != "leader":
            for kept in (shapes, worthwhile) if options.clean == "auto" else (shapes,):
                pairs = fitting(kept) if options.clean == "auto" else max(1, fitting(kept))
                if kept and pairs:
                    choices.append(chunk(pairs, kept))
        best = min(choices, key=lambda c: c.work.flops(denoiser) / c.pairs)
        fewer = replace(options, lanes=max(SMALLEST, options.lanes // 2))
        if memory is None or fewer == options or memory_of(best, denoiser, itemsize) <= memory:
            return best
        options = fewer


def memory_of(chunk: Chunk, denoiser: Denoiser, itemsize: int) -> int:
    """Bytes a chunk takes at its peak: activations of its largest graph, tables, cache."""
    setting, work = chunk.setting, chunk.work
    rows = [2 * len(trunk) * setting.branches for trunk in work.trunks]
    rows += [batch.size * setting.branches for batch in work.batches]
    rows += [s.first + sum(s.joins.values()) for s in work.stairs]
    slots = work.texts + (chunk.own_slots if setting.own_texts else 0)
    text = sum(prod(shape) for shape in _row_shapes(denoiser.text)) * slots
    step_rows = setting.calls * (slots if denoiser.step_reads_text else 1)
    step = sum(prod(shape) for shape in _row_shapes(denoiser.step)) * step_rows
    kept = (text + step) * itemsize + chunk.cache_bytes
    return resident_bytes(denoiser.active_bytes(max(rows)), kept, device_of(denoiser.body.small))


def _row_shapes(part: AnyRows) -> list[tuple[int, ...]]:
    output = next(n for n in part.small.module.graph.nodes if n.op == "output")
    return [tuple(node.meta["val"].shape[1:]) for node in output.args[0]]


def _check(patches: Sequence[Patch], calls: int, denoiser: Denoiser) -> None:
    """Every patch reaches a tensor, and asks what the reference engine would do as well."""
    text_fed = {mark.rpartition(".")[0] for mark in denoiser.keys.values()}
    for patch in patches:
        site, of_text = patch.site.name, patch.source.startswith("text:")
        start, stop = patch.selector.window or (0, calls)
        if site not in denoiser.marks or (of_text and site not in text_fed):
            what = "reads no text" if site in denoiser.marks else "is no place of this denoiser"
            raise ModelError(f"The patch at {site} reached no tensor: it {what}.")
        if not 0 <= start < stop <= calls:
            raise ModelError(
                f"The patch at {site} reached no tensor in calls ({start}, {stop}): a run has "
                f"{calls} calls."
            )
        if patch.selector.tokens is not None or (of_text and patch.strength != 1):
            what = "tokens of a UNet site" if patch.selector.tokens else "part of another text"
            raise UsageError(f"The fast engine doesn't patch {what}; use the reference engine.")


def _check_lanes(lanes: Sequence[Lane]) -> None:
    for lane in lanes:
        places = [patch.site.name for patch in lane.patches]
        if len(set(places)) != len(places):
            raise UsageError(
                "The fast engine takes one patch a site in a lane; use the reference engine."
            )
