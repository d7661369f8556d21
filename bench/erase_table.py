"""Rows of erase.csv, and the tables made of them."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fasttrace.report.judged import Figure, Judged, figure

TARGETS = {
    "single": {"ua": 95, "ira": 90, "cra": 95},
    "ten": {"ua": 90, "ira": 90, "cra_kept": 90},
}
SHOWN = {
    "single": ("ua", "ira", "cra"),
    "removal": ("ua", "ira", "cra"),
    "layers": ("ua", "ira", "cra"),
    "ten": ("ua", "ira", "cra_kept"),
    "misspelling": ("misspelt", "misspelt_before"),
}
TITLES = {
    "single": "One concept at a time: UA / IRA / CRA, percent",
    "ten": "Ten objects in one edit: UA / IRA and CRA of the untouched, percent",
    "removal": 'Removed ("a" instead): UA / IRA / CRA, percent',
    "misspelling": "Five misspellings: share not showing the concept, edited / unedited, percent",
    "layers": "The same edit at other places: UA / IRA / CRA, percent",
}
MEAN = "mean"


@dataclass
class Row:
    """One edit. Shares in percent with intervals over its prompts.

    setting: JSON, what decides the outcome. steps: of the denoiser. ira_before, cra_before,
    misspelt_before: of the unedited model. cra_kept: CRA over the untouched captions alone.
    seconds: to make the edit.
    """

    part: str
    method: str
    kind: str
    concept: str
    target: str
    setting: str
    seeds: str
    steps: int
    ua: float | None = None
    ua_low: float | None = None
    ua_high: float | None = None
    ira: float | None = None
    ira_low: float | None = None
    ira_high: float | None = None
    cra: float | None = None
    cra_low: float | None = None
    cra_high: float | None = None
    cra_kept: float | None = None
    ira_before: float | None = None
    cra_before: float | None = None
    misspelt: float | None = None
    misspelt_low: float | None = None
    misspelt_high: float | None = None
    misspelt_before: float | None = None
    pictures: int | None = None
    seconds: float | None = None

    @property
    def key(self) -> tuple[str | int, ...]:
        """What a later measurement takes the place of."""
        return (self.part, self.method, self.concept, self.seeds, self.steps)

    def fill(self, judged: Judged) -> None:
        for name in ("ua", "ira", "cra", "misspelt"):
            found: Figure | None = getattr(judged, name)
            if found is not None:
                setattr(self, name, found.value)
                setattr(self, f"{name}_low", found.low)
                setattr(self, f"{name}_high", found.high)
        for name in ("ira", "cra"):
            before = judged.before[name]
            setattr(self, f"{name}_before", None if before is None else before.value)


_TYPES: dict[str, Callable[[str], object]] = {
    f.name: float if "float" in str(f.type) else int if "int" in str(f.type) else str
    for f in fields(Row)
}


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file yet."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(**{n: _TYPES[n](text) if text else None for n, text in line.items()})  # type: ignore[arg-type]
            for line in csv.DictReader(file)
        ]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Beside what the file has; in place of rows with the same key."""
    new = list(rows)
    keys = {row.key for row in new}
    kept = [row for row in read(path) if row.key not in keys]
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        out.writeheader()
        for row in (*kept, *new):
            values = asdict(row).items()
            out.writerow({name: f"{v:.4g}" if isinstance(v, float) else v for name, v in values})
    os.replace(part, path)


# ---- tables


def tables(rows: Sequence[Row], methods: Sequence[str] | None = None) -> str:
    """Markdown, a table a part. methods: in this order; those not named come after."""
    parts = []
    for part in SHOWN:
        own = [row for row in rows if row.part == part]
        if own:
            parts.append(_by_place(own) if part == "layers" else _by_concept(part, own, methods))
    return "\n\n".join(parts)


def _by_concept(part: str, rows: Sequence[Row], order: Sequence[str] | None) -> str:
    """A line a concept, a column a method; then the means of each kind and of all."""
    found = list(dict.fromkeys(row.method for row in rows))
    methods = [m for m in order or () if m in found]
    methods += [m for m in found if m not in methods]
    by = {(row.concept, row.method): row for row in rows}
    lines = []
    for concept in dict.fromkeys(row.concept for row in rows):
        cells = [by.get((concept, m)) for m in methods]
        target = next(row.target for row in cells if row is not None)
        lines.append([f"{concept} -> {target}", *("" if c is None else cell(c) for c in cells)])
    kinds = list(dict.fromkeys(row.kind for row in rows))
    for kind in [*kinds, None] if len(kinds) > 1 else [None]:
        chosen = [[r for r in rows if r.method == m and kind in (None, r.kind)] for m in methods]
        name = f"**{MEAN}{f' of {kind}s' if kind else ''}**"
        lines.append([name, *(_means(part, own) for own in chosen)])
    lines.append(
        [
            "seconds an edit (median)",
            *(_seconds([r for r in rows if r.method == m]) for m in methods),
        ]
    )
    return _table(_title(part, rows), ["concept", *methods], lines)


def _by_place(rows: Sequence[Row]) -> str:
    """A line a place, a column a concept."""
    concepts = list(dict.fromkeys(row.concept for row in rows))
    by = {(row.method, row.concept): row for row in rows}
    lines = [
        [place, *(cell(by[place, c]) if (place, c) in by else "" for c in concepts)]
        for place in dict.fromkeys(row.method for row in rows)
    ]
    return _table(_title("layers", rows), ["place", *concepts], lines)


def _title(part: str, rows: Sequence[Row]) -> str:
    targets = "/".join(str(v) for v in TARGETS.get(part, {}).values())
    aims = f"; targets {targets}" if targets else ""
    return f"{TITLES[part]}{aims}; seeds {rows[0].seeds}, {rows[0].steps} steps"


def cell(row: Row) -> str:
    """Its figures in short."""
    return " / ".join(_share(getattr(row, name)) for name in SHOWN[row.part])


def _means(part: str, rows: Sequence[Row]) -> str:
    """With an interval over concepts from five on."""
    cells = []
    for name in SHOWN[part]:
        values = [(r.concept, 0, v) for r in rows if (v := getattr(r, name)) is not None]
        mean = figure(values)
        if mean is None:
            continue
        ends = "" if mean.low is None else f" [{mean.low:.0f}, {mean.high:.0f}]"
        cells.append(f"{mean.value:.1f}{ends}")
    return " / ".join(cells) + (f" (n = {len(rows)})" if rows else "")


def _seconds(rows: Sequence[Row]) -> str:
    values = sorted(row.seconds for row in rows if row.seconds is not None)
    return f"{values[len(values) // 2]:.2g}" if values else ""


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _table(title: str, head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]
    return "\n".join([f"**{title}**", "", *rows])
