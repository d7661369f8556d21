"""What `sweeps.py` does once the process is set up: check, time, write down, print."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path

import measure
import report
import torch
from planned import planned
from report import IN_FULL, Row
from ways import COLD, FAST, WAYS, Fast, Runner
from workloads import LANES, Sweep, Workload, load, make_sweep, scratch_folder

from fasttrace.adapters.scope import scope

RESULTS = Path(__file__).with_name("results.csv")
MEASURED = ("bundled", "middle")
QUICK = 16  # each so-manieth site is asked in a smoke test


def say(words: str) -> None:
    """Progress: not part of what is printed for the README."""
    print(words, file=sys.stderr, flush=True)


class Bench:
    """The measurements of one workload. `failed` counts ways whose scores were wrong."""

    def __init__(self, workload: Workload, args: argparse.Namespace) -> None:
        self.workload, self.args = workload, args
        self.fast = Fast(workload)
        self.failed = 0

    def rows(self, name: str) -> list[Row]:
        """One sweep: check, time, measure memory."""
        sweep = make_sweep(self.workload, name)
        say(f"{self.workload.name}, {name}: the reference engine")
        reference = measure.reference_scores(sweep)
        checked = self._check(sweep, reference)
        if FAST not in checked:
            return []
        runners = {way: run for way, (run, _) in checked.items()}
        rows = {way: self._row(sweep, way, found) for way, (_, found) in checked.items()}
        if name == "window":
            rows[IN_FULL] = self._in_full(sweep)
        else:
            self._time(sweep, runners, rows)
        for row in rows.values():
            row.noise_floor = checked[FAST][1].floor
        for way in runners if self.args.memory else ():
            if way != COLD:
                say(f"  memory: {way}")
                rows[way].peak_bytes = measure.peak_in_fresh_process(sweep, way)
        return list(rows.values())

    def _check(
        self, sweep: Sweep, reference: measure.Scores
    ) -> dict[str, tuple[Runner, measure.Checked]]:
        """Ways that give the reference's scores. Of fasttrace also: it ran what it predicted."""
        found: dict[str, tuple[Runner, measure.Checked]] = {}
        limit = measure.SAME
        # fasttrace first: its noise floor is what the others are held to.
        for way in sorted(self.args.ways, key=lambda way: way != FAST):
            if sweep.name not in WAYS[way].sweeps:
                continue
            say(f"  check: {way}")
            try:
                run = self.fast if way == FAST else WAYS[way].make(self.workload)
            except ImportError as error:
                say(f"  {way} is left out: {error}; the `bench` extra has it")
                continue
            before = self.fast.engine.executed
            answer = measure.check(run, sweep, reference, count=way not in (FAST, COLD))
            if way == FAST:
                executed = self.fast.engine.executed - before
                expected = measure.predicted(self.fast, sweep).flops
                if executed != expected:
                    self._fail(f"executed {executed:,} FLOPs, but {expected:,} were predicted")
                    continue
                limit = max(limit, measure.FLOORS * (answer.floor or 0.0))
            if answer.worst > limit:
                self._fail(f"{way}: a score differs by {answer.worst:.2e}, above {limit:.1e}")
                continue
            found[way] = run, answer
        return {way: found[way] for way in self.args.ways if way in found}

    def _fail(self, words: str) -> None:
        self.failed += 1
        say(f"  WRONG: {words}; no number")

    def _time(self, sweep: Sweep, runners: dict[str, Runner], rows: dict[str, Row]) -> None:
        say(f"  timing: {', '.join(runners)}, in turn, {self.args.runs} times")
        seconds = measure.timed(runners, sweep, self.args.runs)
        for way, row in rows.items():
            for field, value in measure.spread(seconds[way]).items():
                setattr(row, field, value)
        fastest = rows[FAST].seconds_median
        for row in rows.values():
            if row.seconds_median and fastest:
                row.ratio_to_fast = row.seconds_median / fastest

    def _row(self, sweep: Sweep, way: str, found: measure.Checked) -> Row:
        row = self._empty(sweep, way)
        plan = measure.predicted(self.fast, sweep)
        row.worst_score_difference = found.worst
        row.bound_flops = plan.bound_flops
        if way in (FAST, COLD):
            row.flops, row.useful_flops = plan.flops, plan.useful_flops
            return row
        each = measure.row_flops(self.fast, sweep)
        runs = sum(2 + len(pair.lanes) for pair in sweep.pairs)
        row.flops = found.rows * each
        row.useful_flops = runs * self.workload.calls * 2 * each
        return row

    def _in_full(self, sweep: Sweep) -> Row:
        """N+2 runs of all calls, hoisted like ours: what is left is windows alone."""
        row, plan = self._empty(sweep, IN_FULL), measure.predicted(self.fast, sweep)
        row.flops = row.useful_flops = plan.plain_flops
        row.bound_flops = plan.bound_flops
        return row

    def _empty(self, sweep: Sweep, way: str) -> Row:
        lanes = len(sweep.pairs[0].lanes)
        sites = len({lane.patches[0].site.name for lane in sweep.pairs[0].lanes})
        return Row(
            self.workload.name,
            sweep.name,
            way,
            len(sweep.pairs),
            lanes if sweep.of_text else sites,
            self.workload.sampling.steps,
        )


def parse(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workload", choices=MEASURED, nargs="+", default=list(MEASURED), help="all by default")
    add("--sweep", choices=[*LANES, "planned"], nargs="+", default=[*LANES, "planned"])
    add("--ways", choices=list(WAYS), nargs="+", default=list(WAYS), help="all by default")
    add("--prompts", type=int, help="captions; 4 by default, 2 of the middle model")
    add("--steps", type=int, help="the bundled model's own 12 by default, 6 of the middle one")
    add("--runs", type=int, default=3, help="repetitions of each way, 3 by default")
    add("--no-memory", dest="memory", action="store_false", help="no peak memory (saves a run)")
    add("--quick", action="store_true", help="smoke test: 1 prompt, 4 steps, few sites")
    add("--out", type=Path, help=f"{RESULTS.name} beside this script; with --quick nothing")
    add("--table", action="store_true", help="run nothing, print the tables of --out")
    add("--profile", action="store_true", help="where the first way's time goes; writes nothing")
    # Workload, sweep, way, prompts, steps, every: for `measure.peak_in_fresh_process`.
    add("--peak", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.steps, args.runs = 1, args.steps or 4, 1
    elif args.out is None:
        args.out = RESULTS
    if FAST not in args.ways:
        args.ways.append(FAST)  # the others are compared with it
    return args


def main(description: str | None) -> int:
    """The exit status: 1 where a way's scores were wrong."""
    args = parse(description)
    if args.peak:
        print(measure.peak(*args.peak[:3], *map(int, args.peak[3:])))
        return 0
    if args.profile:
        print(profile(args))
        return 0
    rows: list[Row] = []
    failed = 0
    if not args.table:
        rows, failed = run_all(args)
    print(report.tables(report.read(args.out) if args.out else rows))
    if not args.table:
        print(f"\n{machine()}")
    return int(failed > 0)


def run_all(args: argparse.Namespace) -> tuple[list[Row], int]:
    """Everything asked for; each sweep is written down as soon as it is measured."""
    rows: list[Row] = []
    failed = 0

    def keep(found: list[Row], renewed: set[tuple[str, str]]) -> None:
        rows.extend(found)
        if args.out:
            report.write(args.out, found, renewed)

    with scratch_folder() as folder, torch.no_grad():
        for name in args.workload:
            every = QUICK if args.quick else 1
            workload = load(name, args.prompts, args.steps, Path(folder), every)
            with scope(workload.model.pipe):
                bench = Bench(workload, args)
                for sweep in args.sweep:
                    if sweep in LANES:
                        keep(bench.rows(sweep), {(name, sweep)})
                failed += bench.failed
    if "planned" in args.sweep:
        say("planned figures")
        found = list(planned(args.quick))
        keep(found, {(row.workload, row.sweep) for row in found})
    return rows, failed


def profile(args: argparse.Namespace) -> str:
    """Seconds by operator, of the first way, workload and sweep asked for, once warm."""
    way, name = args.ways[0], args.sweep[0]
    with scratch_folder() as folder, torch.no_grad():
        workload = load(args.workload[0], args.prompts, args.steps, Path(folder))
        with scope(workload.model.pipe):
            sweep = make_sweep(workload, name)
            run = Fast(workload) if way == FAST else WAYS[way].make(workload)
            run(sweep)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
                run(sweep)
    table: str = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=16)
    return table


def machine() -> str:
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
