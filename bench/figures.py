"""Figures with their targets: one line of a CSV, one of a Markdown table."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """target: how it is to compare with a number, such as "<= 0.3"; "" where nothing is asked."""

    figure: str
    measured: float
    target: str
    unit: str = ""
    note: str = ""

    @property
    def is_speed(self) -> bool:
        """Or memory: what a busy machine may miss."""
        return self.unit in ("s", "times", "MiB")

    @property
    def kept(self) -> bool:
        if not self.target:
            return True
        sense, limit = self.target.split()
        number = float(limit.replace(",", ""))
        if sense == "=":
            return self.measured == number
        return self.measured <= number if sense == "<=" else self.measured >= number


def write(path: Path, figures: Iterable[Figure]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow([field.name for field in fields(Figure)])
        out.writerows((f.figure, f"{f.measured:.6g}", *astuple(f)[2:]) for f in figures)


def read(path: Path) -> list[Figure]:
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Figure(**line | {"measured": float(line["measured"])}) for line in csv.DictReader(file)
        ]


def table(figures: Sequence[Figure]) -> str:
    """Markdown."""
    lines = ["| figure | measured | target | note |", "| --- | --- | --- | --- |"]
    for f in figures:
        number = f"{f.measured:,.0f}" if f.measured == int(f.measured) else f"{f.measured:.3g}"
        found = f"{number} {f.unit}".strip()
        found = found if f.kept else f"**{found}, missed**"
        lines.append(f"| {f.figure} | {found} | {f.target} | {f.note} |")
    return "\n".join(lines)
