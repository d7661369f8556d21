"""What the profiler costs where it is off: a tracer that has been profiled beside untouched ones.

    .venv/bin/python bench/profiling_off.py [--model embedded] [--turns 40]

Three tracers of one pipeline take turns at the same sweep in one process: two that nobody has
profiled, whose difference is what this machine can't tell apart, and one that has just been. It is
compared with both, turn by turn, so that a slow minute hits all three; the median over turns is
reported with its 95 % interval (by order statistics), and the quickest turns beside each other.
The order turns too.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from statistics import median

import fasttrace
from fasttrace import Tracer
from fasttrace.plan.plan import Plan
from fasttrace.profile.clock import Clock
from fasttrace.profile.collect import ProfiledTracer
from fasttrace.profile.recorder import Recorder
from fasttrace.testing import tiny_pipeline
from fasttrace.testing.tiny import FAMILIES
from fasttrace.types import Probe

LIMIT = 0.01
Clocks = tuple[float, float]  # seconds that passed, seconds of this process


def once(tracer: Tracer, plan: Plan) -> tuple[Clocks, dict[str, float]]:
    """Garbage is collected before: a full collection takes nearly as long, and hits some alone."""
    gc.collect()
    gc.disable()
    try:
        wall, own = time.perf_counter(), time.process_time()
        scores = {row.key: row.score for row, _ in tracer.iter_rows(plan, pictures=False)}
        return (time.perf_counter() - wall, time.process_time() - own), scores
    finally:
        gc.enable()


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median and its 95 % interval."""
    values = sorted(values)
    n = len(values)
    reach = math.ceil(0.98 * math.sqrt(n))
    return median(values), values[max(0, n // 2 - reach)], values[min(n - 1, n // 2 + reach)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded", help="'embedded', or a tiny family")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--steps", type=int, default=1)
    asked = parser.parse_args()
    tiny = asked.model in FAMILIES
    pipe = tiny_pipeline(asked.model) if tiny else fasttrace.load(asked.model)
    tracers = {name: Tracer(pipe) for name in ("untouched", "control", "profiled")}
    plan = tracers["untouched"].plan(
        Probe("a photo of a dog", "dog"), steps=asked.steps, metric="latent_recovery"
    )
    scores = [once(tracer, plan)[1] for tracer in tracers.values()]  # and to compile
    recorder = Recorder(Clock())
    scores.append(once(ProfiledTracer(tracers["profiled"], recorder), plan)[1])
    recorder.settle()
    if not recorder.steps or any(found != scores[0] for found in scores):
        raise RuntimeError("The profiled run has other scores, or none.")
    times: dict[str, list[Clocks]] = {name: [] for name in tracers}
    names = list(tracers)
    for turn in range(asked.turns):
        for name in names[turn % 3 :] + names[: turn % 3]:
            times[name].append(once(tracers[name], plan)[0])
    print(f"{asked.model}, {plan.lanes} lanes, {asked.turns} turns")
    worst = -math.inf
    same = 0.0
    for place, what in enumerate(("wall clock", "time of the process")):
        first, second, touched = ([c[place] for c in times[name]] for name in names)
        print(f"{what}: {1e3 * median(first):.1f} ms")
        plain = [math.sqrt(a * b) for a, b in zip(first, second, strict=True)]
        control = say("untouched by untouched", second, first)
        found = say("profiled by untouched", touched, plain)
        least = min(touched) / min(*first, *second) - 1
        print(f"  quickest turns {100 * least:+.2f} %")
        worst, same = max(worst, min(found, least)), max(same, abs(control))
    print(f"profiling off costs {100 * worst:+.2f} %, limit {100 * LIMIT:.0f} %", end="; ")
    print(f"two untouched tracers differ by {100 * same:.2f} %")
    return int(worst > LIMIT)


def say(what: str, seconds: list[float], others: list[float]) -> float:
    """The median difference, which is printed."""
    middle, low, high = interval([a / b - 1 for a, b in zip(seconds, others, strict=True)])
    print(f"  {what:<22} {100 * middle:+.2f} %  ({100 * low:+.2f} to {100 * high:+.2f} %)")
    return middle


if __name__ == "__main__":
    sys.exit(main())
