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
    column = {"score": "score", "effect": "effect", "normalised": "normalised_effect"}[scale]
    lowest = inf
    for (site, selector), members in by_cell.items():
        if not all(label.causal for label in members):
            continue
        per_prompt = []
        for label in members:
            values = [
                getattr(row, column)
                for row in rows
                if (row.site, row.selector, row.prompt) == (site, selector, label.prompt)
            ]
            values = [value for value in values if value is not None]
            if not values:
                raise UsageError(
                    f"the validation set labels {site} ({selector}) for {label.prompt!r}, but the "
                    "results hold no such row."
                )
            per_prompt.append(sum(values) / len(values))
        lowest = min(lowest, sum(per_prompt) / len(per_prompt))
    if lowest == inf:
        raise UsageError(
            "no site of the validation set is judged causal for all of its prompts, so no "
            "threshold follows from it. Label more sites, or give a threshold."
        )
    return lowest


def causal_set(
    effects: Iterable[SiteEffect],
    *,
    threshold: float | None = None,
    top: int | None = None,
    scale: Scale = "effect",
) -> list[SiteEffect]:
    """Sites of each (group, metric, component) at or above `threshold`, at most `top`, best first.

    Never one at or below the noise floor, nor one that was not run.
    """
    tables: dict[tuple[str, str, str], list[SiteEffect]] = {}
    for effect in effects:
        tables.setdefault((effect.group, effect.metric, effect.component), []).append(effect)
    chosen: list[SiteEffect] = []
    for table in tables.values():
        fit = [e for e in table if e.status == "run" and e.effect > e.noise_floor]
        fit = [e for e in fit if not isnan(e.value(scale))]
        if threshold is not None:
            fit = [e for e in fit if e.value(scale) >= threshold]
        fit.sort(key=lambda e: (-e.value(scale), e.site_index))
        chosen += fit[:top]
    return chosen
