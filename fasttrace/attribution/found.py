"""`Found`: what a screen ranked, what of it was checked exactly, and what that says."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fasttrace.attribution.audit import Audit
from fasttrace.attribution.result import Screen, load_screen
from fasttrace.errors import StoreError
from fasttrace.report.names import WHOLE_STREAM, words
from fasttrace.report.screened import write_found_page
from fasttrace.report.uncertainty import rank_correlation
from fasttrace.store.disk import write_atomic
from fasttrace.store.schema import from_parquet, to_parquet
from fasttrace.types import Row

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1
FOUND, ROWS, PLACES = "found.json", "found-rows.parquet", "found.parquet"
Why = Literal["always", "top", "audit", ""]


@dataclass(frozen=True)
class Place:
    """One site (of a text encoder: one token group of it). Effects in the metric's unit, means over
    the pairs that count.

    screened: to first order. exact: by patching; None where it wasn't. low, high: the 95 % interval
    of `exact`, None with few prompts. why: what had it checked; empty where nothing did.
    """

    site: str
    selector: str
    kind: str
    index: int
    screened: float
    exact: float | None = None
    low: float | None = None
    high: float | None = None
    why: Why = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.site, self.selector

    @property
    def name(self) -> str:
        own = words(self.site, self.kind)
        return own if self.selector == "all" else f"{own} @ {self.selector}"


@dataclass(frozen=True)
class Together:
    """Several places patched in one run. alone: each one's exact effect; together: that of all."""

    places: tuple[tuple[str, str], ...]
    names: tuple[str, ...]
    alone: tuple[float, ...]
    together: float

    @property
    def overlap(self) -> float:
        """What they have in common: the sum of their own effects less the joint one."""
        return sum(self.alone) - self.together

    @property
    def gain(self) -> float:
        """What they do beyond the best of them alone."""
        return self.together - max(self.alone)


@dataclass(frozen=True)
class Finer:
    """Parts of a winner, patched exactly: one head or channel, or several in one run. screened: the
    sum of their first-order scores."""

    site: str
    kind: str
    axis: str
    coordinates: tuple[int, ...]
    screened: float
    exact: float

    @property
    def name(self) -> str:
        many = "s" * (len(self.coordinates) > 1)
        numbers = ", ".join(map(str, self.coordinates))
        return f"{words(self.site, self.kind)}, {self.axis}{many} {numbers}"


@dataclass(frozen=True)
class Cost:
    """In generations (runs of one lane). screen: of all pairs. exact: patched runs of the checked
    places with the clean and corrupt ones; together: of group patches; inside: of parts.
    exhaustive: what patching every place would have taken."""

    screen: float
    exact: int
    together: int
    inside: int
    exhaustive: int

    @property
    def total(self) -> float:
        return self.screen + self.exact + self.together + self.inside


@dataclass(frozen=True)
class Found:
    """places: in execution order, those that need no run left out. threshold: in the metric's unit;
    `cut` says whose it is. total_effect: mean over the pairs that count, `counted` of `pairs`.
    rows: of the exact patches, group patches not among them."""

    component: str
    metric: str
    estimator: str
    pairs: int
    counted: int
    total_effect: float
    noise_floor: float
    threshold: float
    cut: str
    places: tuple[Place, ...]
    together: tuple[Together, ...]
    finer: tuple[Finer, ...]
    audit: Audit
    cost: Cost
    manifest: dict[str, Any] = field(repr=False)
    rows: tuple[Row, ...] = field(default=(), repr=False, compare=False)
    screen: Screen | None = field(default=None, repr=False, compare=False)

    @property
    def winners(self) -> list[Place]:
        """Places whose exact effect is at the threshold or above, best first."""
        above = [p for p in self.places if p.exact is not None and p.exact >= self.threshold]
        return sorted(above, key=lambda p: (-_exact(p), p.index))

    @property
    def recall(self) -> float:
        """Estimated: of the places above the threshold, those that were selected to be checked."""
        return _share(self._selected, self._missed)

    @property
    def least_recall(self) -> float:
        """The same at the audit's bound, so with its confidence."""
        return _share(self._selected, self.audit.bound)

    @property
    def correlations(self) -> dict[str, float]:
        """Spearman's rho of screened and exact; NaN with fewer than three places.

        Over all checked places, without those checked whatever their score, over the audited ones
        alone (an unbiased sample of what was ranked low), and by kind.
        """
        checked = [p for p in self.places if p.exact is not None]
        ranked = [p for p in checked if p.why != "always"]
        found = {"all checked": checked, "ranked by the screen": ranked}
        found["audited"] = [p for p in checked if p.why == "audit"]
        for kind in dict.fromkeys(p.kind for p in checked):
            found[kind] = [p for p in checked if p.kind == kind]
        return {
            name: rank_correlation([p.screened for p in own], [_exact(p) for p in own])
            for name, own in found.items()
        }

    @property
    def words(self) -> list[str]:
        """What was done and what it says, a sentence or two each."""
        checked = sum(p.exact is not None for p in self.places)
        whole = sum(p.why == "always" for p in self.places)
        top = sum(p.why == "top" for p in self.places)
        ranked = sum(p.exact is not None and p.why != "always" for p in self.places)
        cost, rho = self.cost, self.correlations["ranked by the screen"]
        lines = [
            (
                f"One way back through each of {self.pairs} (prompt, seed) pairs ranked "
                f"{len(self.places)} places ({self.estimator}, {self.metric}); {self.counted} "
                f"pairs have something to restore. {checked} places were then patched exactly: "
                f"{whole} that a first-order score says little about, the {top} ranked highest of "
                f"the others, and an audit of {self.audit.sample}."
            ),
            (
                f"{self.audit} The threshold is {self.threshold:.3g} ({self.cut}); the whole "
                f"effect is {self.total_effect:.3g}."
            ),
        ]
        if not isnan(rho):
            lines.append(
                f"Over the {ranked} places that the screen ranked and exact patching checked, the "
                f"rank correlation of the two is {rho:+.2f}."
            )
        if not isnan(self.recall):
            lines.append(
                f"Of the places above the threshold about {100 * self.recall:.0f} % were selected, "
                f"at least {100 * self.least_recall:.0f} % at the audit's bound."
            )
        streams = [p.name for p in self.winners if p.kind in WHOLE_STREAM]
        if streams:
            shown = ", ".join(streams[:3]) + (
                f" and {len(streams) - 3} more" if streams[3:] else ""
            )
            lines.append(
                f"Of the best places, {shown} put out the whole stream, with all that earlier "
                "parts put into it: restoring that can bring the clean run back whatever the part "
                "itself holds."
            )
        lines.append(
            f"Cost: {cost.total:.0f} generations ({cost.screen:.0f} for the screen, {cost.exact} "
            f"for exact patches, {cost.together} for group patches, {cost.inside} for parts), "
            f"where patching every place takes {cost.exhaustive}."
        )
        return lines

    @property
    def _selected(self) -> int:
        return sum(p.why in ("always", "top") for p in self.winners)

    @property
    def _missed(self) -> float:
        sample = self.audit.sample
        return self.audit.above / sample * self.audit.population if sample else 0.0

    def __str__(self) -> str:
        lines = [*self.words, "", f"At the threshold or above, exact effects ({self.metric}):"]
        for place in self.winners[:20]:
            low, high = place.low, place.high
            interval = "" if low is None or high is None else f" [{low:.3g}, {high:.3g}]"
            lines.append(
                f"{_exact(place):+10.4g}{interval}  screened {place.screened:+.4g}  {place.name}"
            )
        lines += ["", "Patched together:"] if self.together else []
        lines += [
            f"{one.together:+10.4g}  {' and '.join(one.names)} together: {one.gain:+.3g} "
            f"beyond the best of them, {one.overlap:+.3g} in common"
            for one in self.together
        ]
        lines += ["", "Inside them:"] if self.finer else []
        lines += [f"{p.exact:+10.4g}  screened {p.screened:+.4g}  {p.name}" for p in self.finer]
        return "\n".join(lines)

    # ---- files

    def to_table(self) -> pa.Table:
        """One line a place."""
        import pyarrow as pa

        return pa.Table.from_pylist([asdict(place) for place in self.places])

    def save(self, folder: str | Path) -> Path:
        """`found.json` with `found.parquet` (places), the exact rows and the screen's files, and a
        page; its path. Raises `StoreError` where they can't be written."""
        import pyarrow.parquet as pq

        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(self.to_table(), folder / PLACES)
            write_atomic(folder / ROWS, to_parquet(self.rows))
        except OSError as error:
            raise StoreError(f"What was found can't be written to {folder}: {error}.") from error
        if self.screen is not None:
            self.screen.save(folder)
        text = json.dumps(self.record(), allow_nan=False, indent=1) + "\n"
        write_atomic(folder / FOUND, text.encode())
        return write_found_page(self.record(), folder)

    def record(self) -> dict[str, Any]:
        """As JSON: everything but rows and screen, with what follows from it."""
        names = (
            "component",
            "metric",
            "estimator",
            "pairs",
            "counted",
            "total_effect",
            "noise_floor",
            "threshold",
            "cut",
            "manifest",
        )
        own: dict[str, Any] = {name: getattr(self, name) for name in names}
        for name in ("places", "together", "finer"):
            own[name] = [asdict(one) for one in getattr(self, name)]
        own["names"] = [place.name for place in self.places]
        return own | {
            "version": VERSION,
            "audit": asdict(self.audit),
            "cost": asdict(self.cost),
            "recall": _number(self.recall),
            "least_recall": _number(self.least_recall),
            "correlations": {name: _number(rho) for name, rho in self.correlations.items()},
            "words": self.words,
        }


def load_found(folder: str | Path) -> Found:
    """What `Found.save` wrote. Raises `StoreError` where it is missing or damaged."""
    folder = Path(folder)
    try:
        given = json.loads((folder / FOUND).read_bytes())
        if given["version"] != VERSION:
            raise StoreError(f"{folder / FOUND} is of version {given['version']}, not {VERSION}.")
        for name in ("names", "recall", "least_recall", "correlations", "words", "version"):
            del given[name]
        together = [
            Together(
                tuple((a, b) for a, b in one["places"]),
                tuple(one["names"]),
                tuple(one["alone"]),
                one["together"],
            )
            for one in given.pop("together")
        ]
        return Found(
            places=tuple(Place(**one) for one in given.pop("places")),
            together=tuple(together),
            finer=tuple(
                Finer(**one | {"coordinates": tuple(one["coordinates"])})
                for one in given.pop("finer")
            ),
            audit=Audit(**given.pop("audit")),
            cost=Cost(**given.pop("cost")),
            rows=tuple(from_parquet(folder / ROWS)),
            screen=load_screen(folder),
            **given,
        )
    except StoreError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{folder} holds nothing found that can be read: {error}.") from error


def _exact(place: Place) -> float:
    assert place.exact is not None
    return place.exact


def _share(selected: int, missed: float) -> float:
    return selected / (selected + missed) if selected + missed else float("nan")


def _number(value: float) -> float | None:
    return None if isnan(value) else value
