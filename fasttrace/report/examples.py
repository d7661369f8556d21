"""Pictures of single (probe, seed) pairs for the page."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image

from fasttrace.report.charts import Spots
from fasttrace.report.images import Sheet, data_uri, sheet
from fasttrace.report.names import component_words, components_in_order, words
from fasttrace.report.result import Result
from fasttrace.report.statistics import counts
from fasttrace.report.text import why_left_out
from fasttrace.types import Row, pair_pictures

CARD_SIDE, SHEET_SIDE = 200, 96


@dataclass(frozen=True)
class Picture:
    uri: str | None
    caption: str
    score: float
    note: str = ""


@dataclass(frozen=True)
class Example:
    """One (probe, seed): its pictures, and its contact sheets by component."""

    prompt: str
    subject: str
    seed: int
    metric: str
    left_out: str  # why it is in no mean; empty where it is
    pictures: list[Picture]
    sheets: list[tuple[str, str, Sheet]] = field(default_factory=list)  # id, component, sheet


def counted_first(pairs: list[list[Row]], minimum: float) -> list[list[Row]]:
    return sorted(pairs, key=lambda pair: not counts(pair[0], minimum))


def example_of(
    result: Result, pair: list[Row], minimum: float, spots: Spots | None, name: str
) -> Example:
    first = pair[0]
    clean, corrupt = pair_pictures(next((r for r in pair if r.picture), first)) or (None, None)
    pictures = [
        _picture(result.picture(clean), "clean", first.clean_score),
        _picture(result.picture(corrupt), "corrupt", first.corrupt_score),
    ]
    example = Example(
        first.prompt,
        first.subject,
        first.seed,
        first.metric,
        "" if counts(first, minimum) else why_left_out(first),
        pictures,
    )
    for component in components_in_order(row.component for row in pair):
        run = [r for r in pair if r.component == component and r.status == "run"]
        if not run:
            continue
        run.sort(key=lambda r: r.site_index)
        best = max(run, key=lambda r: r.effect)
        where = words(best.site, best.kind)
        where += "" if best.selector == "all" else f" @ {best.selector}"
        image = result.picture(best.picture)
        pictures.append(
            _picture(image, f"best restored, {component_words(component)}", best.score, where)
        )
        if spots is None:
            continue
        found = sheet([result.picture(row.picture) for row in run], SHEET_SIDE)
        if found is not None:
            key = f"sheet-{len(spots)}"
            example.sheets.append((key, component_words(component), found))
            for spot, row in enumerate(run):
                spots[name, component, row.site, row.selector] = (key, spot)
    return example


def _picture(image: Image.Image | None, caption: str, score: float, note: str = "") -> Picture:
    return Picture(None if image is None else data_uri(image, CARD_SIDE), caption, score, note)
