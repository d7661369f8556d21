"""`Screen`: what every patch would do to first order, and what is asked of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fasttrace.attribution.readings import Reading
from fasttrace.errors import StoreError, UsageError
from fasttrace.plan.windows import Window, resolve_window
from fasttrace.store.disk import write_atomic
from fasttrace.types import Probe

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 2
ARRAYS, TABLE = "screen.safetensors", "screen.parquet"


@dataclass(frozen=True)
class ScreenedPair:
    """One (probe, seed). Scores in the metric's unit; total_effect is turned like all effects, so
    that positive is towards the clean run. note: why it has nothing to restore or its scores say
    nothing, else empty."""

    probe: Probe
    seed: int
    clean_score: float
    corrupt_score: float
    total_effect: float
    note: str = ""


@dataclass(frozen=True)
class Ranked:
    """The mean over pairs of a place's score. share: of the same mean of the total effect."""

    site: str
    kind: str
    index: int
    part: str
    axis: str
    coordinate: int
    effect: float
    share: float


@dataclass(frozen=True)
class Screen:
    """First-order effects of (pair, branch, call, coordinate), by reading.

    scores: reading's key -> [pairs, branches, calls, size] in the metric's unit, turned; calls is 1
    for text-encoder sites, whose patch acts in all. A window's score is the sum over its calls.
    generations: what a pair cost, in denoiser FLOPs of one run without its decoding. windows: those
    asked for. one_window: scores are of patches in the one of `windows`, in its calls together, and
    say nothing of other calls. manifest: as of a plan.
    """

    readings: tuple[Reading, ...]
    pairs: tuple[ScreenedPair, ...]
    scores: dict[str, np.ndarray] = field(repr=False)
    branches: tuple[str, ...]
    calls: int
    windows: tuple[Window, ...]
    estimator: str
    horizon: int | None
    metric: str
    flops: int
    generations: float
    manifest: dict[str, Any] = field(repr=False)
    one_window: bool = False

    def effects(self, reading: Reading | str, window: Any = None, branch: str | None = None) -> Any:
        """[pairs, size] float64 of a reading, or of a site's whole output by its name.

        window: calls, or fractions; None is all calls, or the one that was screened where scores
        are of that alone. branch: None sums over those screened.
        """
        key = self._reading(reading).key
        found = self.scores[key].astype(np.float64)
        if branch is not None:
            if branch not in self.branches:
                raise UsageError(f"The branch {branch!r} was not screened: {self.branches}.")
            found = found[:, [self.branches.index(branch)]]
        if self.one_window:
            window = self._one(window)
        start, stop = (0, self.calls) if window is None else resolve_window(window, self.calls)
        if found.shape[2] != self.calls:
            if (start, stop) != (0, self.calls):
                raise UsageError("A text-encoder site acts in every call and has no windows.")
            start, stop = 0, found.shape[2]
        return found[:, :, start:stop].sum((1, 2))

    def ranking(
        self, axis: str = "all", window: Any = None, part: str | None = None
    ) -> list[Ranked]:
        """Places by their mean over pairs that have something to restore, largest first.

        axis: "all" (whole outputs; "site" is the same), "head", "token", "channel", "neuron",
        "place". part: of those "output", "key", "value" alone. Raises `UsageError` for what was not
        screened, and where no pair has anything to restore.
        """
        axis = "all" if axis == "site" else axis
        used = [i for i, pair in enumerate(self.pairs) if not pair.note]
        axes = list(dict.fromkeys(r.axis for r in self.readings))
        if axis not in axes:
            raise UsageError(f"Nothing was screened by {axis!r}; there is {', '.join(axes)}.")
        if not used:
            raise UsageError(self.nothing)
        total = float(np.mean([self.pairs[i].total_effect for i in used]))
        found = []
        for r in self.readings:
            if r.axis != axis or (part is not None and r.part != part):
                continue
            effects = self.effects(r, window)[used]
            for i, effect in enumerate(effects.mean(0).tolist()):
                ranked = Ranked(
                    r.site, r.kind, r.index, r.part, r.axis, i, effect, effect / total
                )  # fmt: skip
                found.append(ranked)
        if not found:
            raise UsageError(f"Nothing was screened by {axis!r} of {part!r}.")
        return sorted(found, key=lambda r: (-r.effect, r.index, r.coordinate))

    @property
    def nothing(self) -> str:
        """Why no pair can be ranked by; empty where one can."""
        notes = list(dict.fromkeys(pair.note for pair in self.pairs))
        if "" in notes:
            return ""
        return (
            f"None of these pairs has anything to restore: {'; '.join(notes)}. Choose other "
            "prompts, seeds or another metric."
        )

    def completeness(self, axis: str | None = None) -> list[tuple[float, float]]:
        """Of every pair (sum of scores, clean - corrupt), equal for integrals over a full cut.

        Over the text's tokens and pooled vectors where texts were screened, else over the whole
        outputs of all sites screened (a full cut with "joint" over every module that reads text).
        """
        parts = [r for r in self.readings if r.kind == "text"]
        parts = parts or [r for r in self.readings if r.axis == (axis or "all")]
        sums = sum(self.effects(r).sum(1) for r in parts)
        return [(float(s), p.total_effect) for s, p in zip(sums, self.pairs, strict=True)]

    def to_table(self) -> pa.Table:
        """One line a (pair, reading, coordinate, branch, window)."""
        import pyarrow as pa

        return pa.Table.from_pylist(list(self._lines()))

    def save(self, folder: str | Path) -> None:
        """`screen.safetensors` holds everything, `screen.parquet` the table for other tools."""
        import pyarrow.parquet as pq

        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_screen(folder / ARRAYS, self)
            pq.write_table(self.to_table(), folder / TABLE)
        except OSError as error:
            raise StoreError(f"The screen can't be written to {folder}: {error}.") from error

    def __str__(self) -> str:
        asked = f"{self.calls} calls, {self.metric}, {self.estimator}"
        cost = f"{self.generations:.1f} generations a pair"
        lines = [f"{len(self.pairs)} pairs, {asked}: {cost}"]
        if self.nothing:
            return "\n".join([*lines, self.nothing])
        axes = list(dict.fromkeys(r.axis for r in self.readings))
        for ranked in self.ranking("all" if "all" in axes else axes[0])[:20]:
            share = f"{100 * ranked.share:7.1f} %"
            place = ranked.site if ranked.axis == "all" else f"{ranked.site} {ranked.coordinate}"
            lines.append(f"{ranked.effect:+12.5g} {share}  {ranked.kind:<8} {place}")
        return "\n".join(lines)

    def _lines(self) -> Iterator[dict[str, Any]]:
        for reading in self.readings:
            per_call = self.scores[reading.key].shape[2] == self.calls
            windows = self.windows if per_call else ((0, self.calls),)
            for start, stop in windows:
                for branch in self.branches:
                    effects = self.effects(reading, (start, stop), branch)
                    for p, pair in enumerate(self.pairs):
                        for i, effect in enumerate(effects[p].tolist()):
                            yield {
                                "attribute": pair.probe.attribute,
                                "prompt": pair.probe.prompt,
                                "subject": pair.probe.subject,
                                "occurrence": pair.probe.occurrence,
                                "negative_prompt": pair.probe.negative_prompt,
                                "seed": pair.seed,
                                "site": reading.site,
                                "site_index": reading.index,
                                "kind": reading.kind,
                                "part": reading.part,
                                "axis": reading.axis,
                                "coordinate": i,
                                "branch": branch,
                                "window_start": start,
                                "window_stop": stop,
                                "metric": self.metric,
                                "estimator": self.estimator,
                                "effect": effect,
                                "total_effect": pair.total_effect,
                                "note": pair.note,
                            }

    def _one(self, window: Any) -> Window:
        [own] = self.windows
        if window is not None and resolve_window(window, self.calls) != own:
            raise UsageError(
                f"{self.estimator} screened patches in calls {own[0]} to {own[1] - 1} together, "
                "and says nothing of other windows."
            )
        return own

    def _reading(self, asked: Reading | str) -> Reading:
        if isinstance(asked, Reading):
            return asked
        named = [r for r in self.readings if asked in (r.key, r.site)]
        best = [r for r in named if r.axis == "all" or r.key == asked] or named
        if not best:
            raise UsageError(f"{asked!r} was not screened.")
        return best[0]

    def _record(self) -> dict[str, Any]:
        own = {
            f: getattr(self, f)
            for f in ("branches", "calls", "windows", "estimator", "horizon", "metric", "flops")
        }
        return own | {
            "version": VERSION,
            "generations": self.generations,
            "one_window": self.one_window,
            "readings": [asdict(r) for r in self.readings],
            "pairs": [asdict(p) for p in self.pairs],
            "manifest": self.manifest,
        }


def load_screen(folder: str | Path) -> Screen:
    """What `Screen.save` wrote. Raises `StoreError` where it is missing or damaged."""
    return read_screen(Path(folder) / ARRAYS)


def write_screen(file: Path, screen: Screen) -> None:
    from safetensors.numpy import save

    arrays = {key: np.ascontiguousarray(value) for key, value in screen.scores.items()}
    write_atomic(file, save(arrays, {"screen": json.dumps(screen._record())}))


def read_screen(file: Path) -> Screen:
    """Raises `StoreError` where it is missing or damaged."""
    from safetensors import safe_open

    try:
        with safe_open(file, framework="np") as held:
            given = json.loads(held.metadata()["screen"])
            scores = {key: held.get_tensor(key) for key in held.keys()}  # noqa: SIM118
        if given["version"] != VERSION:
            raise StoreError(f"{file} is of version {given['version']}, not {VERSION}.")
        readings = [Reading(**r | {"shape": tuple(r["shape"])}) for r in given["readings"]]
        pairs = [ScreenedPair(**p | {"probe": Probe(**p["probe"])}) for p in given["pairs"]]
        return Screen(
            readings=tuple(readings),
            pairs=tuple(pairs),
            scores={r.key: scores[r.key] for r in readings},
            branches=tuple(given["branches"]),
            calls=given["calls"],
            windows=tuple((a, b) for a, b in given["windows"]),
            **{n: given[n] for n in ("estimator", "horizon", "metric", "flops", "generations")},
            manifest=given["manifest"],
            one_window=given["one_window"],
        )
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(f"{file} is no screen that can be read: {error}.") from error


def joined(parts: Sequence[Screen]) -> Screen:
    """Screens of other pairs as one. Raises `UsageError` where they weren't asked the same."""
    first = parts[0]
    for part in parts:
        for name in ("readings", "calls", "branches", "windows", "metric", "estimator", "horizon"):
            if getattr(part, name) != getattr(first, name):
                raise UsageError(f"These screens can't be joined: their {name} differ.")
    count = sum(len(p.pairs) for p in parts)
    return replace(
        first,
        pairs=tuple(pair for part in parts for pair in part.pairs),
        scores={k: np.concatenate([p.scores[k] for p in parts]) for k in first.scores},
        flops=sum(p.flops for p in parts),
        generations=sum(p.generations * len(p.pairs) for p in parts) / count,
    )
