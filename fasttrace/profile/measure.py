"""Profiles a trace: runs it as it is, then with a clock in it, and puts the numbers together."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from fasttrace import __version__
from fasttrace.engine.fast import FastEngine
from fasttrace.errors import UsageError
from fasttrace.plan.plan import Plan
from fasttrace.profile.ceilings import Ceilings, measure_ceilings
from fasttrace.profile.clock import Ranges, find_ranges, make_clock, memory_reader, now
from fasttrace.profile.collect import MAKING, ProfiledTracer
from fasttrace.profile.instrument import CACHE, GUIDED, TABLES
from fasttrace.profile.recorder import PROFILER, Layout, Recorder, Total
from fasttrace.profile.records import Alive, Costs, Line, Profile, Work
from fasttrace.profile.traffic import live_bytes
from fasttrace.tracer import Tracer
from fasttrace.types import Row

HOST = "host, between operators"
_NOT_OPERATORS = (TABLES, GUIDED, CACHE)
_NOT_OF_THE_RUN = (MAKING, PROFILER)

Note = Callable[[str], None]
Scores = dict[str, float]


def last_word(prompt: str) -> str:
    """A subject for a prompt that is only timed: which one it is changes no time."""
    words = re.findall(r"\w+", prompt)
    if not words:
        raise UsageError(f"--prompt {prompt!r} holds no word that could be its subject.")
    return str(words[-1])


def profile(tracer: Tracer, plan: Plan, note: Note | None = None, seconds: float = 0.3) -> Profile:
    """Run `plan` as it is and with the clock; on a GPU also without captured graphs. Each twice,
    the first time to compile and to warm up.

    note: told what is being done. seconds: of each measurement of the machine. The rows themselves
    are thrown away. Raises as `Tracer.iter_rows` does.
    """
    say = note or (lambda words: None)
    assert isinstance(tracer.engine, FastEngine)
    say("measuring the machine")
    ceilings = measure_ceilings(tracer.model.device, tracer.model.dtype, seconds)
    say("running it twice as it is")
    _run(tracer, plan)
    usual, scores = _run(tracer, plan)
    eager = usual
    if tracer.engine.workshop.runner != "eager":
        say("the same without captured graphs")
        options = {**vars(tracer.engine.options), "runner": "eager"}
        other = Tracer(tracer.model.pipe, **options)
        _run(other, plan)
        eager, scores = _run(other, plan)
    say("running it twice with a clock")
    device = tracer.model.device
    recorder = Recorder(make_clock(device), find_ranges(), memory_reader(device))
    profiled = ProfiledTracer(tracer, recorder)
    _run(profiled, plan)
    recorder.reset()
    clocked, found = _clocked(profiled, plan)
    return _put_together(tracer, plan, ceilings, recorder, usual, eager, clocked, found == scores)


def run_with_ranges(tracer: Tracer, plan: Plan, ranges: Ranges) -> None:
    """Run it once to compile, then once in a range "run" that holds those of batches, steps and
    sites: for Nsight, whose clocks are better than ours. Only ranges are put into the graphs."""
    profiled = ProfiledTracer(tracer, Recorder(None, ranges))
    _run(profiled, plan)
    with ranges.inside("run"):
        _run(profiled, plan)


def _run(tracer: Tracer, plan: Plan) -> tuple[float, Scores]:
    start = now()
    scores = _scores(row for row, _ in tracer.iter_rows(plan))
    return (now() - start) / 1e9, scores


def _clocked(tracer: ProfiledTracer, plan: Plan) -> tuple[int, Scores]:
    """Nanoseconds, and the scores."""
    recorder = tracer.recorder
    start = now()
    with recorder.inside("run", "run"):
        scores = _scores(row for row, _ in tracer.iter_rows(plan))
        recorder.settle()
    return now() - start, scores


def _scores(rows: Any) -> Scores:
    found: Scores = {row.key: row.score for row in rows if isinstance(row, Row)}
    return found


def _put_together(
    tracer: Tracer,
    plan: Plan,
    ceilings: Ceilings,
    recorder: Recorder,
    usual: float,
    eager: float,
    clocked: int,
    same: bool,
) -> Profile:
    assert recorder.clock is not None
    engine = tracer.engine
    assert isinstance(engine, FastEngine)
    # What a run that goes on and isn't profiled has not.
    clocked -= sum(recorder.phases.get(name, Total()).nanoseconds for name in _NOT_OF_THE_RUN)
    kinds = _kinds(recorder, clocked)
    device = tracer.model.device
    steps = max(1, recorder.steps)
    probe = plan.probes[0]
    predicted = tracer.forecast(plan, measure=False)
    executed = sum(total.flops for total in recorder.totals.values())
    started = min((span.start for span in recorder.spans), default=0)
    return Profile(
        model=tracer.name,
        prompt=probe.prompt,
        subject=probe.subject,
        about=_about(tracer, plan),
        lanes=plan.lanes,
        pairs=len({(row.probe, row.seed) for row in plan.rows}),
        batches=predicted.batches,
        steps=recorder.steps,
        seconds=usual,
        total=clocked / 1e9,
        kinds=kinds,
        ops=_ops(recorder, clocked),
        sites=_sites(recorder, clocked),
        host=_host(recorder, device.type == "cuda") / steps,
        operators=sum(t.calls for label, t in recorder.totals.items() if label.op) / steps,
        work=Work(
            executed,
            predicted.flops,
            predicted.useful_flops,
            predicted.bound_flops,
            predicted.plain_flops,
        ),
        costs=Costs(
            eager,
            clocked / 1e9,
            recorder.clock.cost(),
            recorder.clock.ticks,
            same,
        ),
        ceilings=ceilings,
        dtype=str(tracer.model.dtype).removeprefix("torch."),
        memory=tuple((at - started, size) for at, size in recorder.samples),
        memory_is="allocated by torch" if device.type == "cuda" else "of the whole process",
        alive=_alive(recorder.layouts),
        spans=tuple(recorder.spans),
        left_out=recorder.left_out,
    )


def _about(tracer: Tracer, plan: Plan) -> Mapping[str, str]:
    model, sampling = tracer.model, plan.sampling
    device = model.device
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    assert isinstance(tracer.engine, FastEngine)
    workshop = tracer.engine.workshop
    return {
        "device": f"{device} ({place}), {torch.get_num_threads()} threads",
        "dtype": str(model.dtype).removeprefix("torch."),
        "picture": f"{sampling.height}x{sampling.width}",
        "steps": f"{sampling.steps} ({plan.calls} denoiser calls a run)",
        "guidance": f"{sampling.guidance:g}",
        "component": plan.component,
        "metric": ", ".join(metric.key for metric in plan.metrics),
        "runner": workshop.runner + ("" if workshop.runner == "eager" else "; timed as eager"),
        "attention": "patch_attention" if workshop.fused else "torch",
        "versions": f"fasttrace {__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
    }


def _kinds(recorder: Recorder, clocked: int) -> tuple[Line, ...]:
    """By site kind and by whatever else there was; together all of the time."""
    found: dict[str, Total] = {}
    for label, total in recorder.totals.items():
        sums = found.setdefault(label.kind, Total())
        sums.add(total.calls, total.nanoseconds, total.flops, total.bytes)
    phases = {k: total for k, total in recorder.phases.items() if k not in _NOT_OF_THE_RUN}
    lines = [
        _line(name, total, clocked, counted=name not in _NOT_OPERATORS)
        for name, total in found.items()
    ]
    lines += [_line(name, total, clocked, counted=False) for name, total in phases.items()]
    rest = clocked - sum(t.nanoseconds for t in (*found.values(), *phases.values()))
    lines.append(_line(HOST, Total(0, rest), clocked, counted=False))
    return _by_time(lines)


def _ops(recorder: Recorder, clocked: int) -> tuple[Line, ...]:
    found: dict[str, Total] = {}
    for label, total in recorder.totals.items():
        if label.op:
            sums = found.setdefault(label.op, Total())
            sums.add(total.calls, total.nanoseconds, total.flops, total.bytes)
    return _by_time([_line(name, total, clocked) for name, total in found.items()])


def _sites(recorder: Recorder, clocked: int) -> tuple[Line, ...]:
    """In the order in which sites were first met. calls: of steps in which the site was run."""
    found: dict[str, Total] = {}
    kinds: dict[str, str] = {}
    for label, total in recorder.totals.items():
        if label.site:
            sums = found.setdefault(label.site, Total())
            sums.add(0, total.nanoseconds, total.flops, total.bytes)
            kinds[label.site] = label.kind
    for layout in recorder.layouts:
        for site in {label.site for label in layout.labels if label.site}:
            found[site].calls += layout.executions
    return tuple(
        replace(_line(kinds[site], total, clocked), site=site) for site, total in found.items()
    )


def _line(name: str, total: Total, clocked: int, *, counted: bool = True) -> Line:
    flops, moved = (total.flops, total.bytes) if counted else (None, None)
    seconds = total.nanoseconds / 1e9
    return Line(name, total.calls, seconds, total.nanoseconds / clocked, flops, moved)


def _by_time(lines: list[Line]) -> tuple[Line, ...]:
    return tuple(sorted(lines, key=lambda line: -line.seconds))


def _host(recorder: Recorder, cuda: bool) -> float:
    """Seconds of all steps in which the host was at work and no operator."""
    if cuda:
        return recorder.issuing / 1e9
    inside = [s for s in recorder.spans if s.kind == "batch"]
    batches = sum(s.stop - s.start for s in inside)
    busy = sum(t.nanoseconds for label, t in recorder.totals.items() if label.op)
    busy += sum(t.nanoseconds for label, t in recorder.totals.items() if label.kind == GUIDED)
    making = sum(
        s.stop - s.start
        for s in recorder.spans
        if s.kind == "phase" and any(b.start <= s.start and s.stop <= b.stop for b in inside)
    )
    return max(0.0, (batches - busy - making) / 1e9)


def _alive(layouts: list[Layout]) -> Alive | None:
    """Of the graph that needs most."""
    best: Alive | None = None
    most = -1
    for layout in layouts:
        names = {label.name: label for label in layout.labels if label.name}
        for graph in layout.graphs:
            sizes = live_bytes(graph)
            if max(sizes, default=0) <= most:
                continue
            most = max(sizes)
            chosen = [
                (names[node.name], size)
                for node, size in zip(graph.module.graph.nodes, sizes, strict=True)
                if node.op == "call_function" and node.name in names
            ]
            best = Alive(
                layout.name,
                tuple(label.site for label, _ in chosen),
                tuple(label.kind for label, _ in chosen),
                tuple(size for _, size in chosen),
            )
    return best
