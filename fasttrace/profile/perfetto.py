"""The profile as a trace file: the JSON that ui.perfetto.dev and chrome://tracing open."""

from __future__ import annotations

import json
from typing import Any

from fasttrace.profile.records import Profile, Span

HOST, DEVICE = 1, 2  # tracks
_MICRO = 1000  # nanoseconds; the format counts microseconds
_WIDEST_FIRST = ("run", "batch", "phase", "step", "site", "op")


def trace_json(found: Profile) -> str:
    """One event a line. Spans of a track lie in one another or apart, as the format asks."""
    start = min((span.start for span in found.spans), default=0)
    events = [_named("process_name", 0, f"fasttrace {found.model}")]
    events.append(_named("thread_name", HOST, "host"))
    if any(span.device for span in found.spans):
        events.append(_named("thread_name", DEVICE, "device"))
    order = {kind: i for i, kind in enumerate(_WIDEST_FIRST)}
    spans = sorted(found.spans, key=lambda s: (s.start, -s.stop, order[s.kind]))
    events += [_event(span, start) for span in spans]
    events += [
        {"ph": "C", "pid": 1, "ts": at / _MICRO, "name": f"bytes {found.memory_is}",
         "args": {"bytes": size}}
        for at, size in found.memory
    ]  # fmt: skip
    about = {
        **found.about, "prompt": found.prompt, "subject": found.subject,
        "spans left out": str(found.left_out),
    }  # fmt: skip
    lines = ",\n".join(json.dumps(event) for event in events)
    head = f'"displayTimeUnit": "ms", "otherData": {json.dumps(about)}'
    return f'{{{head},\n"traceEvents": [\n{lines}\n]}}\n'


def _named(what: str, track: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": 1, "tid": track, "name": what, "args": {"name": name}}


def _event(span: Span, start: int) -> dict[str, Any]:
    return {
        "ph": "X", "pid": 1, "tid": DEVICE if span.device else HOST, "cat": span.kind,
        "name": span.name, "ts": (span.start - start) / _MICRO,
        "dur": (span.stop - span.start) / _MICRO, "args": dict(span.about),
    }  # fmt: skip
