"""How well do screens agree with exact patches, beyond whole sites and latent recovery?

    .venv/bin/python bench/attribution_rows.py --keep bench-out/attribution [--row heads]

On the bundled model: whole sites by clip_score and attribute, one-call windows, heads, channels,
text-encoder places, memory. Everything made is kept in the folder, so that a run goes on where it
stopped; all of it is three hours on one core. `--make 3/16` makes the third of 16 shares and prints
nothing: 16 processes, then once without it. Writes attribution_rows.csv when all rows are asked.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
from attribution_exact import ATTRIBUTES, Kept, say
from attribution_pieces import Asked, pieces, share
from attribution_tables import EVERY, ROWS, Line

from fasttrace import Tracer, load

OUT = Path(__file__).with_suffix(".csv")


def make(asked: Asked, rows: Sequence[str], number: int, of: int) -> None:
    """One process's share of what these rows need."""
    mine = share(pieces(asked, rows), number, of)
    for i, piece in enumerate(mine, start=1):
        start = time.perf_counter()
        piece.run()
        took = time.perf_counter() - start
        say(f"{i} of {len(mine)}: {piece.name}, {took:.1f} s ({piece.seconds:.0f} foreseen)")


def write(lines: Sequence[Line], file: Path = OUT) -> None:
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, [f.name for f in fields(Line)], lineterminator="\n")
        writer.writeheader()
        for line in lines:
            writer.writerow(asdict(line) | {"value": f"{line.value:.4g}"})


def table(lines: Sequence[Line]) -> str:
    """As Markdown, a table a row: a column an attribute."""
    text = []
    for row in dict.fromkeys(line.row for line in lines):
        own = [line for line in lines if line.row == row]
        columns = [a for a in (*ATTRIBUTES, EVERY) if any(a == line.attribute for line in own)]
        text += ["", f"**{row}**", ""]
        text.append("| metric | estimator (generations) | places | figure | " + " | ".join(columns))
        text[-1] += " |"
        text.append("| --- |" + " --- |" * (3 + len(columns)))
        cells: dict[tuple[str, ...], dict[str, str]] = {}
        for line in own:
            estimator = f"{line.estimator} ({line.generations})" if line.estimator else ""
            key = line.metric, estimator, line.group, line.name
            shown = f"{line.value:.2f}" if abs(line.value) >= 0.01 else f"{line.value:.2g}"
            cells.setdefault(key, {})[line.attribute] = shown
        for key, values in cells.items():
            text.append(f"| {' | '.join([*key, *(values.get(a, '') for a in columns)])} |")
    return "\n".join(text[1:])


def parse_share(text: str) -> tuple[int, int]:
    """ "3/16" """
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share; the third of 16 is 3/16.")
    return int(number), int(of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", type=Path, default=Path("bench-out/attribution"))
    parser.add_argument("--pairs", type=int, default=24, help="of each attribute")
    parser.add_argument("--row", action="append", choices=list(ROWS), help="repeatable")
    parser.add_argument("--make", type=parse_share, metavar="I/N", help="a share of the work")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tracer = Tracer(load("embedded"))
    asked = Asked(tracer, Kept(given.keep, tracer.fingerprint), given.pairs)
    rows = given.row or list(ROWS)
    if given.make:
        make(asked, rows, *given.make)
        return
    lines = [line for row in rows for line in ROWS[row](asked)]
    print(table(lines))
    if given.row is None and given.pairs == 24:
        write(lines)


if __name__ == "__main__":
    main()
