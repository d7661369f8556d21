"""Does erasing work: objects and styles of the bundled model, one by one and ten at once.

python bench/erase.py [--part single finetuned ...] adds rows to bench/erase.csv as they are
measured and prints Markdown. What the file has under the same setting isn't measured again.
UA, IRA and CRA are as `fasttrace.report.judged` says; the bundled classifiers judge.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import erase_table
import torch
from erase_edits import ABLATION, BEST, CLOSED, ESD, as_json, closed, moved, rate_of, tuned
from erase_table import Row
from erase_world import TENS, Concept, calm, concept, misspelt, questions, some, together
from workloads import quiet

import fasttrace
from fasttrace.edit.edit import Edit
from fasttrace.edit.editor import Editor
from fasttrace.edit.evaluate import Evaluator, Subject
from fasttrace.edit.matrices import find_sites
from fasttrace.edit.questions import Question
from fasttrace.report.judged import UNTOUCHED, judge
from fasttrace.types import Judgement

RESULTS = Path(__file__).with_name("erase.csv")
PARTS = ("single", "ten", "removal", "misspelling", "layers", "finetuned")
TUNED = (ESD, ABLATION)


@dataclass(frozen=True)
class Way:
    """setting: JSON, what decides the outcome."""

    method: str
    setting: str
    make: Callable[[], Edit]


class Bench:
    """Measures what the file doesn't have yet."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.pipe = fasttrace.load("embedded")
        self.editor = Editor(self.pipe)
        self.evaluator = Evaluator.of(self.pipe, steps=args.steps)
        self.seeds = " ".join(map(str, args.seeds))

    def run(self, part: str) -> None:
        named = self.args.concept
        concepts = [concept(n) for n in named] if named else some(self.args.concepts)
        if part == "ten":
            for i, of in enumerate(TENS):
                self.measure("ten", Concept("object", f"ten objects ({i + 1})", "their next"),
                             self.closed(of), together(of))  # fmt: skip
            return
        for of in concepts:
            asked = questions(of, removed=part == "removal")
            if part == "misspelling":
                asked = misspelt(of)
            if part == "layers":
                ways = self.places(of)
            elif part == "finetuned":
                ways = self.tuned(of)
            else:
                ways = self.closed([of], part == "removal")
            self.measure("single" if part == "finetuned" else part, of, ways, asked)

    def closed(self, of: Sequence[Concept], removed: bool = False) -> list[Way]:
        return [
            Way(name, as_json(kinds[of[0].kind]),
                partial(closed, self.editor, of, kinds[of[0].kind], removed))
            for name, kinds in CLOSED.items()
            if name in self.args.methods
        ]  # fmt: skip

    def tuned(self, of: Concept) -> list[Way]:
        steps = self.args.tuning_steps
        return [
            Way(name, as_json({"rate": rate_of(name), "steps": steps}),
                partial(tuned, self.pipe, of, name, steps))
            for name in TUNED
            if name in self.args.methods
        ]  # fmt: skip

    def places(self, of: Concept) -> list[Way]:
        """Every layer's self-attention and MLP; each cross-attention, and all of them."""
        found = [
            (site.name, {"attn": "diffquickfix", "mlp": "mlp", "attn2": "locoedit"}[site.kind])
            for site in find_sites(self.editor.model, ["attn", "mlp", "attn2"])
        ]
        ways = []
        for place, method in [*found, ("all cross-attention", "uce")]:
            site = None if method == "uce" else place
            setting = moved(CLOSED[BEST][of.kind], method, site)
            make = partial(closed, self.editor, [of], setting)
            ways.append(Way(f"{place} ({method})", as_json(setting), make))
        return ways

    def measure(
        self, part: str, of: Concept, ways: Sequence[Way], asked: Sequence[Question]
    ) -> None:
        rows = [
            Row(part, w.method, of.kind, of.name, of.target, w.setting, self.seeds,
                self.evaluator.sampling.steps)
            for w in ways
        ]  # fmt: skip
        known = {} if self.args.again else {r.key: r for r in erase_table.read(self.args.out)}
        missing = [
            (row, way)
            for row, way in zip(rows, ways, strict=True)
            if row.key not in known or known[row.key].setting != row.setting
        ]
        if not missing:
            return
        begin = time.perf_counter()
        subjects = []
        for row, way in missing:
            start = time.perf_counter()
            edit = way.make()
            row.seconds = time.perf_counter() - start
            subjects.append(Subject(way.method, edit, tuple(asked)))
        by_edit: dict[str, list[Judgement]] = {}
        for found, _ in self.evaluator.judge(subjects, self.args.seeds):
            for judgement in found:
                by_edit.setdefault(judgement.edit, []).append(judgement)
        for row, _ in missing:
            _fill(row, by_edit[row.method])
        erase_table.write(self.args.out, [row for row, _ in missing])
        shown = "; ".join(f"{r.method}: {erase_table.cell(r)}" for r, _ in missing[:4])
        spent = time.perf_counter() - begin
        say(f"{part}, {of.name} -> {of.target}, {spent:.0f} s: {shown}")


def _fill(row: Row, judgements: Sequence[Judgement]) -> None:
    [judged] = judge(judgements)
    row.fill(judged)
    row.pictures = len(judgements)
    # Of unedited pictures, and of the captions that nothing was to change in.
    before = [replace(j, shown_after=j.shown_before) for j in judgements]
    unedited = judge(before)[0].misspelt
    row.misspelt_before = None if unedited is None else unedited.value
    own = [j for j in judgements if j.role == "edited"][:1]
    kept = [j for j in judgements if j.role in UNTOUCHED]
    if own and kept:
        # One edited row says which attribute is the edit's own; what it shows stays out.
        cross = judge([replace(own[0], expected="{}"), *kept])[0].cra
        row.cra_kept = None if cross is None else cross.value


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", choices=PARTS, nargs="+", default=list(PARTS), help="all by default")
    add("--concepts", type=int, default=24, help="how many of the 24, evenly taken; ten: both tens")
    add("--concept", nargs="+", help="these instead, by name")
    add("--seeds", type=int, nargs="+", default=[0, 1])
    add("--methods", choices=[*CLOSED, *TUNED], nargs="+", default=[*CLOSED, *TUNED])
    add("--steps", type=int, help="of the denoiser; the model's own 12 by default")
    add("--tuning-steps", type=int, default=200, help="of fine-tuning")
    add("--again", action="store_true", help="measure also what the file has")
    add("--out", type=Path, default=RESULTS, help=f"{RESULTS.name} beside this script")
    add("--table", action="store_true", help="run nothing, print the tables of --out")
    return parser.parse_args()


def main() -> int:
    args = parse()
    quiet()
    if not args.table:
        bench = Bench(args)
        for part in args.part:
            bench.run(part)
    print(erase_table.tables(erase_table.read(args.out), [*CLOSED, *TUNED]))
    print(f"\n{torch.get_num_threads()} threads, torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    calm()
    sys.exit(main())
