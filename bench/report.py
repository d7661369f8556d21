"""Rows of results.csv, and the tables made of them."""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path

from ways import FAST, WAYS

IN_FULL, PLANNED, PLAIN = "every window in full", "planned", "plain N+2"


@dataclass
class Row:
    """One line of the file. Seconds of whole sweeps; bytes over the loaded model's.

    sites: sites, or (layer, kind, token) states, of a prompt. ratio_to_fast: in time.
    flops: everything computed. useful_flops: of the runs asked for. bound_flops: the least.
    """

    workload: str
    sweep: str
    way: str
    prompts: int
    sites: int
    steps: int
    seconds_median: float | None = None
    seconds_min: float | None = None
    seconds_max: float | None = None
    runs: int | None = None
    ratio_to_fast: float | None = None
    worst_score_difference: float | None = None
    noise_floor: float | None = None
    flops: int | None = None
    useful_flops: int | None = None
    bound_flops: int | None = None
    peak_bytes: int | None = None


_NUMBERS = {
    field.name: float if "float" in str(field.type) else int
    for field in fields(Row)
    if field.type != "str"
}


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file yet."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(
                **{
                    name: (_NUMBERS[name](text) if text else None) if name in _NUMBERS else text
                    for name, text in line.items()
                }
            )
            for line in csv.DictReader(file)
        ]


def write(path: Path, rows: Iterable[Row], renewed: Collection[tuple[str, str]]) -> None:
    """In place of what the file says of the `renewed` (workload, sweep); others stay."""
    kept = [row for row in read(path) if (row.workload, row.sweep) not in renewed]
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        out.writeheader()
        for row in (*kept, *rows):
            values = asdict(row).items()
            out.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in values})


# ---- tables


def tables(rows: Sequence[Row]) -> str:
    """Markdown."""
    parts = [targets(rows)]
    measured = [row for row in rows if row.way not in (PLANNED, PLAIN)]
    for (workload, sweep), group in groupby(measured, key=lambda r: (r.workload, r.sweep)):
        own = list(group)
        first = own[0]
        title = (
            f"{workload}, {sweep} sweep: {first.sites} sites, {first.steps} steps, prompts: "
            f"{first.prompts}; noise floor {_number(first.noise_floor, '.1e')}"
        )
        parts.append(_table(title, _MEASURED, map(_measured, own)))
    planned = [row for row in rows if row.way in (PLANNED, PLAIN)]
    if planned:
        title = "Planned: floating-point operations of jobs nobody ran"
        parts.append(_table(title, _PLANNED, map(_planned, planned)))
    return "\n\n".join(parts)


_MEASURED = [
    "way",
    "seconds (least, most)",
    "times e's",
    "worst score difference",
    "TFLOP",
    "flops / useful",
    "useful / bound",
    "peak memory",
]
_PLANNED = [
    "model",
    "sweep",
    "prompts",
    "sites",
    "way",
    "PFLOP",
    "flops / useful",
    "useful / bound",
]


def _measured(row: Row) -> list[str]:
    label = WAYS[row.way].label if row.way in WAYS else row.way
    seconds = ""
    if row.seconds_median is not None:
        seconds = f"{row.seconds_median:.3g} ({row.seconds_min:.3g}, {row.seconds_max:.3g})"
    return [
        label,
        seconds,
        _number(row.ratio_to_fast, ".2f"),
        _number(row.worst_score_difference, ".1e"),
        "" if row.flops is None else f"{row.flops / 1e12:.3g}",
        _ratio(row.flops, row.useful_flops),
        _ratio(row.useful_flops, row.bound_flops),
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB",
    ]


def _planned(row: Row) -> list[str]:
    return [
        row.workload,
        row.sweep,
        str(row.prompts),
        str(row.sites),
        row.way,
        f"{(row.flops or 0) / 1e15:.4g}",
        _ratio(row.flops, row.useful_flops),
        _ratio(row.useful_flops, row.bound_flops),
    ]


def _table(title: str, head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"**{title}**\n\n| {' | '.join(head)} |\n|{' --- |' * len(head)}\n{body}"


def _number(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def _ratio(over: int | None, under: int | None, how: str = ".3f") -> str:
    return format(over / under, how) if over is not None and under else ""


# ---- what was aimed at


def targets(rows: Sequence[Row]) -> str:
    """The table of targets (issue 3, section 4), with what was found."""
    by = {(row.workload, row.sweep, row.way): row for row in rows}

    def of(workload: str, sweep: str, way: str, value: Callable[[Row], float | None]) -> object:
        row = by.get((workload, sweep, way))
        return None if row is None else value(row)

    def slower(workload: str, sweep: str, way: str) -> object:
        return of(workload, sweep, way, lambda row: row.ratio_to_fast)

    def larger(workload: str) -> float | None:
        fast, other = (by.get((workload, "unet", way)) for way in (FAST, "batched"))
        if fast is None or other is None or not fast.peak_bytes or not other.peak_bytes:
            return None
        return fast.peak_bytes / other.peak_bytes

    def in_full(workload: str) -> float | None:
        fast, other = (by.get((workload, "window", way)) for way in (FAST, IN_FULL))
        return other.flops / fast.flops if fast and other and fast.flops and other.flops else None

    lines: list[tuple[str, str, float, object]] = [
        (
            "largest score difference to the reference, bundled model",
            "<=",
            1e-4,
            of("bundled", "unet", FAST, lambda row: row.worst_score_difference),
        )
    ]
    limits = {"sd15": 1.03, "sdxl": 1.03, "bundled": 1.05}
    for row in rows:
        if row.way == PLANNED and row.bound_flops and row.useful_flops and row.flops:
            limit = limits.get(row.workload, 1.05) if row.steps > 4 else 1.05
            name = f"{row.workload}, {row.sweep}"
            lines += [
                (f"useful / bound: {name}", "<=", limit, row.useful_flops / row.bound_flops),
                (f"flops / useful: {name}", "<=", 1.10, row.flops / row.useful_flops),
            ]
    least = {
        "bundled": {"authors": 4.5, "sequential": 2.7, "nnsight": 5.0, "batched": 1.3},
        "middle": {"authors": 3.2, "sequential": 1.2},
    }
    for workload, ways in least.items():
        lines += [
            (
                f"{workload}, UNet sweep, {WAYS[way].label[0]}/e",
                ">=",
                times,
                slower(workload, "unet", way),
            )
            for way, times in ways.items()
        ]
    lines.append(("bundled, text sweep, b/e", ">=", 3.0, slower("bundled", "text", "sequential")))
    for workload in least:
        lines += [
            (f"{workload}, window sweep, FLOPs in full / e", ">=", 1.55, in_full(workload)),
            (f"{workload}, UNet sweep, peak memory e/d", "<=", 1.0, larger(workload)),
        ]
    return _table("Targets", ["figure", "target", "found", ""], map(_target, lines))


def _target(line: tuple[str, str, float, object]) -> list[str]:
    name, sense, limit, found = line
    if not isinstance(found, float):
        return [name, f"{sense} {limit:g}", "", "not measured"]
    kept = found <= limit if sense == "<=" else found >= limit
    return [name, f"{sense} {limit:g}", f"{found:.3g}", "" if kept else "missed"]
