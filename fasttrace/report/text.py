"""The same numbers in words, for terminals and reprs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from typing import TYPE_CHECKING

from fasttrace.report.settled import caution, uneven
from fasttrace.report.statistics import SiteEffect, counts
from fasttrace.types import Row

if TYPE_CHECKING:
    from fasttrace.report.result import Result


def where(effect: SiteEffect) -> str:
    """Site and selector in one phrase."""
    if effect.selector == "all":
        return effect.site
    return f"{effect.site} @ {effect.selector}"


def percent(value: float | None) -> str:
    return "-" if value is None or isnan(value) else f"{round(100 * value) + 0:d} %"


def share_interval(e: SiteEffect) -> str:
    """The interval of the normalised effect, "[71 %, 120 %]", or how few prompts there were."""
    if e.normalised_low is None or e.normalised_high is None:
        return e.interval_text
    return f"[{percent(e.normalised_low)}, {percent(e.normalised_high)}]"


NOT_WORSE = "corrupting the subject did not clearly worsen the score"


def why_left_out(row: Row) -> str:
    """Why the row's pair is in no mean. A failed corruption looks like a subject never shown."""
    return f"{NOT_WORSE} (clean {row.clean_score:.3g}, corrupt {row.corrupt_score:.3g})"


def why_none(rows: Sequence[Row], minimum: Mapping[str, float]) -> str:
    """Why these rows have no causal site. `minimum` is that of each metric."""
    if any(counts(row, minimum[row.metric]) for row in rows):
        return "none is above the noise floor and the threshold"
    return f"{NOT_WORSE} in any pair, so there is nothing to restore"


def summary(result: Result) -> str:
    """One line: how much there is, and how well it can be told from noise."""
    rows = result.rows
    prompts = len({(r.prompt, r.subject, r.occurrence) for r in rows})
    seeds = len({r.seed for r in rows})
    sites = len({r.site for r in rows})
    return (
        f"{len(rows)} rows ({_many(prompts, 'prompt')}, {_many(seeds, 'seed')}, "
        f"{_many(sites, 'site')}), metric {', '.join(result.metrics)}, "
        f"noise floor {result.noise_floor:.2g}"
    )


def _many(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def top_table(result: Result, causal: Sequence[SiteEffect], minimum: float | None = None) -> str:
    """The causal sites of a result as a table, or why there are none.

    After an adaptive sweep what it settled comes first, and what the table's averages can't say.
    """
    found = _causal_table(result, causal, minimum)
    if result.until is None:
        return found
    words = f"{result.until.metric}: {result.until.words}"
    return "\n".join(filter(None, [words, caution(result.until, result.rows), found]))


def _causal_table(result: Result, causal: Sequence[SiteEffect], minimum: float | None) -> str:
    least = result.minimum if minimum is None else dict.fromkeys(result.metrics, minimum)
    return site_table(causal) if causal else f"no causal site: {why_none(result.rows, least)}"


def site_table(effects: Sequence[SiteEffect]) -> str:
    """A plain table, columns aligned. The interval is that of the share of the total effect. Where
    sites were run for unequal numbers of pairs, those that count stand beside them."""
    header: tuple[str, ...] = ("group", "site", "effect", "of total", "95 %", "chance")
    lines: list[tuple[str, ...]] = [header, *(_line(e) for e in effects)]
    if uneven(effects):
        numbers = ["pairs", *(str(e.pairs) for e in effects)]
        lines = [(*line, number) for line, number in zip(lines, numbers, strict=True)]
        header = lines[0]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
                     for line in lines)  # fmt: skip


def _line(e: SiteEffect) -> tuple[str, ...]:
    return (
        e.group,
        where(e),
        f"{e.effect:.3g}",
        percent(e.normalised),
        share_interval(e),
        chance(e),
    )


def chance(e: SiteEffect) -> str:
    """The Holm-adjusted p in words; nothing is claimed from few units."""
    if e.status != "run":
        return f"not run: {e.status}"
    if not e.testable:
        return f"{e.units} {e.unit}: too few" if e.units else f"n = {e.prompts}: too few"
    return f"p = {e.p_holm:.2g}" + (" *" if e.beyond_chance else "")
