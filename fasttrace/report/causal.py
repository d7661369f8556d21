"""Which sites count as causal: a fixed threshold, the top k, or one fitted on a labelled set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, isnan

from fasttrace.errors import UsageError
from fasttrace.report.statistics import Scale, SiteEffect
from fasttrace.types import Row


@dataclass(frozen=True)
class CausalLabel:
    """A person's word on one restored picture: does it show the concept?"""

    prompt: str
    site: str
    causal: bool
    selector: str = "all"


def fit_threshold(
    rows: Sequence[Row], labels: Sequence[CausalLabel], scale: Scale = "effect"
) -> float:
    """The lowest mean value among sites judged causal for all of their labelled prompts.

    Basu et al., appendix on the threshold. Raises `UsageError` where no site was judged so, or a
    label names a row that was not run.
    """
    by_cell: dict[tuple[str, str], list[CausalLabel]] = {}
    for label in labels:
        by_cell.setdefault((label.site, label.selector), []).append(label)
    lowest = inf
    for members in by_cell.values():
        if not all(label.causal for label in members):
            continue
        labelled = [_rows_of(label, rows) for label in members]
        value = _mean(labelled, "score" if scale == "score" else "effect")
        if scale == "normalised":
            total = _mean(labelled, "total_effect")
            value = value / total if total > 0 else inf
        lowest = min(lowest, value)
    if lowest == inf:
        raise UsageError(
            "no site of the validation set is judged causal for all of its prompts, so no "
            "threshold follows from it. Label more sites, or give a threshold."
        )
    return lowest


def _rows_of(label: CausalLabel, rows: Sequence[Row]) -> list[Row]:
    cell = (label.site, label.selector, label.prompt)
    found = [row for row in rows if (row.site, row.selector, row.prompt) == cell]
    if not found:
        raise UsageError(
            f"the validation set labels {label.site} ({label.selector}) for {label.prompt!r}, but "
            "the results hold no such row."
        )
    return found


def _mean(prompts: list[list[Row]], column: str) -> float:
    """Mean over prompts of the mean over their rows."""
    means = [sum(getattr(row, column) for row in rows) / len(rows) for rows in prompts]
    return float(sum(means) / len(means))


def causal_set(
    effects: Iterable[SiteEffect],
    *,
    threshold: float | None = None,
    top: int | None = None,
    scale: Scale = "effect",
) -> list[SiteEffect]:
    """Sites of each (group, metric, component) at or above `threshold`, at most `top`, best first.

    Best is the largest normalised effect, which is what pictures and tables show; `scale` is that
    of the threshold. Never one at or below the noise floor, nor one that was not run.
    """
    if top is not None and top < 1:
        raise UsageError(f"top = {top} leaves no site: give 1 or more.")
    tables: dict[tuple[str, str, str], list[SiteEffect]] = {}
    for effect in effects:
        tables.setdefault((effect.group, effect.metric, effect.component), []).append(effect)
    chosen: list[SiteEffect] = []
    for table in tables.values():
        fit = [e for e in table if e.status == "run" and e.effect > e.noise_floor]
        fit = [e for e in fit if not isnan(e.value(scale))]
        if threshold is not None:
            fit = [e for e in fit if e.value(scale) >= threshold]
        fit.sort(key=lambda e: (-e.normalised, e.site_index))
        chosen += fit[:top]
    return chosen
