"""What the rows of attribution_rows.py ask: pairs, parts of sites, and pieces of work to share out.

Pieces are independent of one another, but for the channels screened highest, which need screens
first, and are kept in files, so that processes that share a folder share the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from attribution import SIGMA
from attribution_exact import (
    ATTRIBUTES,
    METRIC,
    Kept,
    Named,
    exact_parts,
    exact_text,
    exact_windows,
    planned,
    say,
)
from attribution_screens import LEVELS, Screened, screened_text, screens
from attribution_sites import Pair, chosen, stored

from fasttrace import Tracer
from fasttrace.attribution.parts import Part, part_of
from fasttrace.attribution.readings import Reading, readings_of
from fasttrace.engine.base import CLEAN

OF_ALL = ("plain", "nudged", "averaged:3")
OTHER_METRICS = ("clip_score", "attribute")
FEW = 2  # pairs an attribute whose channels are patched
PROMPTS = 4  # an attribute, whose text encoder is
CHANNELS = 200  # at random, and as many screened highest
AGAIN = 40  # of the random ones, asked twice
LANES = {"head": 28, "channel": 40}  # so that heads and channels fill their batches

# Seconds a pair on one core, and of a call; only to share the work out evenly.
SECONDS = {
    "plain": 1.2, "nudged": 2.1, "averaged:3": 2.9, "windows": 11.5, "lane": 0.2,
}  # fmt: skip
OF_A_CALL = 2.0
SCREENED, EXACT = 8, 4  # pairs in a piece


@dataclass(frozen=True)
class Piece:
    """Something to be made and kept. phase: pieces of earlier ones come first in a process."""

    name: str
    seconds: float
    run: Callable[[], object]
    phase: int = 1


@dataclass
class Asked:
    """The bench's questions. count: pairs an attribute."""

    tracer: Tracer
    kept: Kept
    count: int = 24

    def pairs(self, metric: str = METRIC) -> dict[str, list[Pair]]:
        found = stored(metric)
        return {attribute: chosen(found[attribute], self.count) for attribute in ATTRIBUTES}

    @cached_property
    def named(self) -> dict[str, list[Named]]:
        """Pairs of latent recovery by attribute."""
        return {a: [(p.probe, p.seed) for p in own] for a, own in self.pairs().items()}

    @property
    def few(self) -> list[Named]:
        return [pair for own in self.named.values() for pair in own[:FEW]]

    @cached_property
    def prompts(self) -> dict[str, list[Named]]:
        """One seed of each prompt."""
        found = {}
        for attribute, own in stored(METRIC).items():
            first = [(p.probe, p.seed) for p in own if p.seed == 0]
            found[attribute] = first[: min(PROMPTS, self.count)]
        return {attribute: found[attribute] for attribute in ATTRIBUTES}

    @cached_property
    def readings(self) -> tuple[Reading, ...]:
        """As in a screen by all LEVELS."""
        tracer = self.tracer
        plan = planned(tracer, self.few[:1], SIGMA)
        with tracer._inside():
            text = tracer._pair(plan, plan.probes[0], [plan.rows[0]]).texts[CLEAN]
            marks = tracer.fast_engine.denoiser(plan.sampling, text).marks
        return readings_of(marks, tracer.sites(), LEVELS)

    def parts(self, axis: str) -> list[tuple[str, Part]]:
        """(kind of site, part) in the order of a screen's scores, one site behind the other."""
        own = [r for r in self.readings if r.axis == axis]
        return [(r.kind, part_of(r, i)) for r in own for i in range(r.size)]

    @cached_property
    def random(self) -> list[int]:
        """Channels by number."""
        total = len(self.parts("channel"))
        return sorted(np.random.default_rng(0).choice(total, CHANNELS, replace=False).tolist())

    @cached_property
    def top(self) -> list[int]:
        """Channels that the plain screen ranks highest, without those drawn at random."""
        found = self.screens(METRIC, "plain", self.few, parts=True).values()
        mean = np.mean([one.channels for one in found], axis=0)
        mean[self.random] = -np.inf
        return sorted(np.argsort(-mean, kind="stable")[:CHANNELS].tolist())

    def screens(
        self, metric: str, estimator: str, pairs: Sequence[Named], parts: bool = False
    ) -> dict[Named, Screened]:
        return screens(
            self.tracer,
            self.kept,
            pairs,
            SIGMA,
            metric=metric,
            estimator=estimator,
            parts=parts,
        )

    def windows(self, pairs: Sequence[Named]) -> dict[Named, np.ndarray]:
        return exact_windows(self.tracer, self.kept, pairs, SIGMA)

    def heads(self, pairs: Sequence[Named]) -> dict[Named, np.ndarray]:
        groups = [[part] for _, part in self.parts("head")]
        return exact_parts(self.tracer, self.kept, pairs, SIGMA, groups, LANES["head"])

    def channels(self, numbers: Sequence[int], pairs: Sequence[Named]) -> dict[Named, np.ndarray]:
        every = self.parts("channel")
        groups = [[every[i][1]] for i in numbers]
        return exact_parts(self.tracer, self.kept, pairs, SIGMA, groups, LANES["channel"])

    def once_more(self, pairs: Sequence[Named]) -> dict[Named, np.ndarray]:
        """The first of the random channels in other lanes: the last one first."""
        found = self.channels(self.random[:AGAIN][::-1], pairs)
        return {pair: effects[::-1] for pair, effects in found.items()}

    def text(self, pair: Named) -> dict[str, np.ndarray]:
        return exact_text(self.tracer, self.kept, pair, SIGMA)

    def text_screen(self, estimator: str, pair: Named) -> tuple[dict[str, np.ndarray], float]:
        return screened_text(self.tracer, self.kept, pair, SIGMA, estimator)


def pieces(asked: Asked, rows: Sequence[str]) -> list[Piece]:
    """All that these rows need, once each."""
    found = {}
    for row in rows:
        for piece in _PIECES[row](asked) if row in _PIECES else ():
            found[piece.name] = piece
    return list(found.values())


def share(all_pieces: Sequence[Piece], number: int, of: int) -> list[Piece]:
    """Those of process `number` from 1 to `of`: the longest first to whoever has least to do."""
    loads = [0.0] * of
    mine = []
    for piece in sorted(all_pieces, key=lambda p: (-p.seconds, p.name)):
        least = loads.index(min(loads))
        loads[least] += piece.seconds
        if least == number - 1:
            mine.append(piece)
    say(f"{len(mine)} pieces, about {loads[number - 1]:.0f} s")
    return sorted(mine, key=lambda p: p.phase)


def _screens(
    asked: Asked,
    metric: str,
    estimator: str,
    by_attribute: dict[str, list[Named]],
    parts: bool = False,
    phase: int = 1,
) -> Iterator[Piece]:
    for attribute, pairs in by_attribute.items():
        for start in range(0, len(pairs), SCREENED):
            some = pairs[start : start + SCREENED]
            yield Piece(
                f"screen {metric} {estimator} {parts} {attribute} {start}",
                OF_A_CALL + SECONDS[estimator] * len(some),
                partial(asked.screens, metric, estimator, some, parts),
                phase,
            )


def _sites(asked: Asked) -> Iterator[Piece]:
    for metric in OTHER_METRICS:
        own = {a: [(p.probe, p.seed) for p in pairs] for a, pairs in asked.pairs(metric).items()}
        for estimator in OF_ALL:
            yield from _screens(asked, metric, estimator, own)


def _windows(asked: Asked) -> Iterator[Piece]:
    for estimator in OF_ALL:
        yield from _screens(asked, METRIC, estimator, asked.named)
    for attribute, pairs in asked.named.items():
        for start in range(0, len(pairs), EXACT):
            some = pairs[start : start + EXACT]
            seconds = OF_A_CALL + SECONDS["windows"] * len(some)
            name = f"windows {attribute} {start}"
            yield Piece(name, seconds, partial(asked.windows, some))


def _heads(asked: Asked) -> Iterator[Piece]:
    for estimator in OF_ALL:
        phase = int(estimator != "plain")
        yield from _screens(asked, METRIC, estimator, asked.named, True, phase)
    lanes = len(asked.parts("head")) * (1 + 2 / LANES["head"])
    for attribute, pairs in asked.named.items():
        for start in range(0, len(pairs), EXACT):
            some = pairs[start : start + EXACT]
            seconds = OF_A_CALL + SECONDS["lane"] * lanes * len(some)
            yield Piece(f"heads {attribute} {start}", seconds, partial(asked.heads, some))


def _channels(asked: Asked) -> Iterator[Piece]:
    few = {a: pairs[:FEW] for a, pairs in asked.named.items()}
    # Screened as for heads.
    yield from (piece for piece in _heads(asked) if piece.name.startswith("screen"))
    lane = SECONDS["lane"] * (1 + 2 / LANES["channel"])
    for attribute, pairs in few.items():
        for i, pair in enumerate(pairs):
            one, name = [pair], f"channels {attribute} {i}"
            seconds = OF_A_CALL + lane * CHANNELS
            yield Piece(f"{name} random", seconds, partial(asked.channels, asked.random, one))
            yield Piece(f"{name} top", seconds, partial(_top, asked, one), phase=2)
            seconds = OF_A_CALL + lane * AGAIN
            yield Piece(f"{name} again", seconds, partial(asked.once_more, one))


def _top(asked: Asked, pairs: Sequence[Named]) -> object:
    return asked.channels(asked.top, pairs)


def _text(asked: Asked) -> Iterator[Piece]:
    for attribute, pairs in asked.prompts.items():
        for i, pair in enumerate(pairs):
            name = f"text {attribute} {i}"
            yield Piece(name, 216 * SECONDS["lane"], partial(asked.text, pair))
            for estimator in OF_ALL:
                seconds = OF_A_CALL + SECONDS[estimator]
                run = partial(asked.text_screen, estimator, pair)
                yield Piece(f"{name} {estimator}", seconds, run)


_PIECES: dict[str, Callable[[Asked], Iterator[Piece]]] = {
    "sites": _sites,
    "windows": _windows,
    "heads": _heads,
    "channels": _channels,
    "text": _text,
}
