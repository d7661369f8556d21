"""`fasttrace trace --until`: rows until the top sites are known, in the same directory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fasttrace.cli.progress import note, progress
from fasttrace.errors import UsageError
from fasttrace.store import SettledRecord, Store, read_rows

if TYPE_CHECKING:
    from fasttrace.attribution.until import AdaptiveSweep
    from fasttrace.cli.sweep import Request
    from fasttrace.plan.plan import Plan
    from fasttrace.tracer import Tracer


def check_adaptive(request: Request) -> None:
    """Before a model is loaded. Raises `UsageError`."""
    if request.until is None:
        if request.budget is not None:
            raise UsageError(
                "--budget is the most runs of an adaptive sweep: give --until as well, such as "
                "--until top10%@95. (Memory for clean activations is --cache.)"
            )
        return
    from fasttrace.attribution.goal import parse_goal
    from fasttrace.attribution.until import check_budget

    parse_goal(request.until)
    check_budget(request.budget)
    if request.shard.count > 1:
        raise UsageError(
            "--until decides after each look what runs next, so one process makes the sweep: leave "
            "--shard out."
        )
    if len(request.components) > 1:
        raise UsageError(
            "--until compares sites with one another, and those of different components are "
            "patched in different ways: give one --component, and another directory for the other."
        )


def make_sweep(plan: Plan, request: Request) -> AdaptiveSweep:
    """Before anything is written. Raises `UsageError` where the plan is nothing to be settled, or
    the directory says what was settled of another component."""
    from fasttrace.attribution.until import AdaptiveSweep

    assert request.until is not None
    sweep = AdaptiveSweep(plan, request.until, request.budget)
    before = SettledRecord.read(request.out)
    known = [] if before is None else sorted({one.component for one in before.sites})
    if known and known != sorted({place[0] for place in sweep.race.arms}):
        raise UsageError(
            f"{request.out} holds an adaptive sweep of {' and '.join(known)}, and a directory "
            "holds one: choose another --out."
        )
    return sweep


def settle(tracer: Tracer, sweep: AdaptiveSweep, request: Request, store: Store) -> int:
    """Run it to its end, from the rows that are there; how many were new. What is known is on the
    disk after each look."""
    for row in read_rows(request.out):
        sweep.add(row)
    new = 0
    while (part := sweep.wanted()) is not None:
        sweep.record.write(request.out)
        if not request.quiet:
            _say(sweep)
        with progress(part.total, request.quiet) as advance:
            for row, pictures in tracer.iter_rows(part, pictures=request.pictures):
                new += store.add(row, pictures)
                sweep.add(row)
                advance()
    sweep.record.write(request.out)
    return new


def _say(sweep: AdaptiveSweep) -> None:
    found = sweep.settled
    ask = sweep.race.wanted()
    if not found.visited or ask is None:
        return
    inside = sum(s.state == "in" for s in found.standings)
    note(
        f"after {found.visited} pairs: {inside} in, {len(found.open)} open, "
        f"{len(found.standings) - inside - len(found.open)} out; {found.spent} runs. On to pair "
        f"{ask.pairs.stop}"
    )
