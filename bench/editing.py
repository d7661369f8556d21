"""What `closed_form.py` does once the process is set up: check, time, write down, print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import edit_speed
import exactness
import figures
import uce
from figures import Figure
from run import machine
from workloads import quiet

from fasttrace.testing.clip import clip_size_pipeline

RESULTS = Path(__file__).with_name("closed_form.csv")
PARTS: dict[str, Callable[[Any, int], Iterator[Figure]]] = {
    "released": lambda pipe, _: exactness.released(pipe),
    "one": lambda pipe, runs: edit_speed.one_edit(pipe, runs + 2),
    "many": edit_speed.many_edits,
    "uce": uce.figures,
    "dense": lambda pipe, _: exactness.against_dense(pipe),
}


def main(description: str | None) -> int:
    """The exit status: 1 where something is wrong rather than slow."""
    args = parse(description)
    quiet()
    if args.peak:
        tokens, number = args.peak
        print(edit_speed.peak(clip_size_pipeline(), tokens, int(number)))
        return 0
    if args.table:
        print(figures.table(figures.read(args.out)))
        return 0
    found: list[Figure] = []
    pipe = clip_size_pipeline()
    for part in args.only:
        for figure in PARTS[part](pipe, args.runs):
            print(f"{figure.figure}: {figure.measured:.3g} {figure.unit}", file=sys.stderr)
            found.append(figure)
        if args.out:
            figures.write(args.out, found)
    print(f"{figures.table(found)}\n\n{machine()}")
    return int(any(not figure.kept for figure in found if not figure.is_speed))


def parse(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", choices=list(PARTS), nargs="+", default=list(PARTS), help="all by default")
    add("--runs", type=int, default=3, help="3 by default; a single edit runs two more")
    add("--out", type=Path, help=f"{RESULTS.name} beside this script; with --only nothing")
    add("--table", action="store_true", help="run nothing, print the table of --out")
    # Tokens and concepts, for `edit_speed._peak_in_fresh_process`.
    add("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out is None and (args.table or args.only == list(PARTS)):
        args.out = RESULTS
    return args
