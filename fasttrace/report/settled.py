"""What an adaptive sweep settled, site by site, and what its averages can't be used for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fasttrace.report.names import words
from fasttrace.report.statistics import SiteEffect
from fasttrace.store.settled import SettledRecord, SettledSite
from fasttrace.types import Row


@dataclass(frozen=True)
class SettledLine:
    """One site of the table, in words."""

    number: str  # its place where it is in the top set
    place: str
    site: str
    state: str
    pairs: int
    effect: float | None
    lead: str


def settled_lines(record: SettledRecord) -> list[SettledLine]:
    """Best first: what is in, what is open, what is out."""
    return [
        SettledLine(
            f"{i}. " if one.state == "in" else "",
            words(one.site, one.kind) + ("" if one.selector == "all" else f" @ {one.selector}"),
            one.site,
            one.state,
            one.pairs,
            one.effect,
            lead_words(one),
        )
        for i, one in enumerate(record.sites, start=1)
    ]


def lead_words(one: SettledSite) -> str:
    """ "+0.12 ± 0.05", or how it came that there is none."""
    if one.lead is None or one.half is None:
        return "too few pairs"
    return f"{one.lead:+.3g} ± {one.half:.2g}" if one.half else f"{one.lead:+.3g} (every pair)"


def uneven(effects: Sequence[SiteEffect]) -> bool:
    """Whether sites of one group and component were run for unequal numbers of pairs."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for e in effects:
        numbers.setdefault((e.group, e.component), set()).add(e.pairs + e.excluded)
    return any(len(found) > 1 for found in numbers.values())


def caution(record: SettledRecord, rows: Iterable[Row]) -> str:
    """What averages of its component's rows can't say; empty where every site has as many."""
    components = {one.component for one in record.sites}
    pairs = Counter(
        (row.component, row.site, row.selector)
        for row in rows
        if row.metric == record.metric and row.component in components
    )
    if not pairs:
        return ""
    fewest, most = min(pairs.values()), max(pairs.values())
    if fewest == most:
        return ""
    return (
        f"Sites were run for {fewest} to {most} pairs, so averages are over different pairs and "
        "can't be compared with one another; nor do intervals and tests know when a site was "
        "stopped. What was settled was compared on the same pairs."
    )
