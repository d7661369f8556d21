"""The same numbers in words, for terminals and reprs."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from typing import TYPE_CHECKING

from fasttrace.report.statistics import SiteEffect

if TYPE_CHECKING:
    from fasttrace.report.result import Result


def where(effect: SiteEffect) -> str:
    """Site and selector in one phrase."""
    if effect.selector == "all":
        return effect.site
    return f"{effect.site} @ {effect.selector}"


def percent(value: float | None) -> str:
    return "-" if value is None or isnan(value) else f"{round(100 * value) + 0:d} %"


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


def top_table(effects: Sequence[SiteEffect]) -> str:
    """A plain table of causal sites, columns aligned."""
    if not effects:
        return "no causal site: none is above the noise floor, the minimum and the threshold"
    header = ("group", "site", "effect", "of total", "95 %", "chance")
    lines = [header, *(_line(e) for e in effects)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
                     for line in lines)  # fmt: skip


def _line(e: SiteEffect) -> tuple[str, ...]:
    return (
        e.group,
        where(e),
        f"{e.effect:.3g}",
        percent(e.normalised),
        e.interval_text,
        chance(e),
    )


def chance(e: SiteEffect) -> str:
    """The Holm-adjusted p in words; nothing is claimed from few units."""
    if not e.testable:
        return f"{e.units} {e.unit}: too few" if e.units else f"n = {e.prompts}: too few"
    return f"p = {e.p_holm:.2g}" + (" *" if e.beyond_chance else "")
