"""How far a sweep is, on stderr: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

Advance = Callable[[], None]
EVERY = 15.0  # seconds between lines where stderr is no terminal


AT_ONCE = 0.01  # seconds in which nothing can be said of a rate
KNOWN = 0.05  # of all rows: before so many are in, their rate says little


@contextmanager
def progress(
    total: int,
    quiet: bool,
    expected: float | None = None,
    stream: TextIO | None = None,
    words: tuple[str, str] = ("tracing", "rows"),
) -> Iterator[Advance]:
    """Call the yielded function after every row. `total` is what is still to be done.

    expected: seconds that a plan foretells, which time left is read from until rows tell. words:
    what is done, and to what.
    """
    stream = stream or sys.stderr
    if quiet or total == 0:
        yield lambda: None
    elif stream.isatty():
        with _bar(total, stream, expected, words) as advance:
            yield advance
    else:
        yield _lines(total, stream, time.monotonic, expected, words[1])


def time_left(done: int, total: int, elapsed: float, expected: float | None) -> float | None:
    """Seconds. Rows come in bursts behind a pair's clean run, so the first few say nothing."""
    if done >= KNOWN * total:
        return (total - done) * elapsed / max(done, 1)
    return None if expected is None or elapsed >= expected else expected - elapsed


@contextmanager
def _bar(
    total: int, stream: TextIO, expected: float | None, words: tuple[str, str]
) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else rate(speed, words[1]), style="progress.data.speed")

    class Left(ProgressColumn):
        def render(self, task: Task) -> Text:
            left = time_left(int(task.completed), total, task.elapsed or 0.0, expected)
            text = "" if left is None or task.finished else f"{duration(left)} left"
            return Text(text, style="progress.remaining")

    columns = (
        TextColumn(words[0]),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        Left(),
    )
    # The rate is over the last two minutes: rows of a pair come in bursts.
    with Progress(*columns, console=Console(file=stream), speed_estimate_period=120) as live:
        task = live.add_task(words[1], total=total)
        yield lambda: live.advance(task)


def _lines(
    total: int,
    stream: TextIO,
    clock: Callable[[], float],
    expected: float | None = None,
    what: str = "rows",
) -> Advance:
    start = last = clock()
    done = 0

    def advance() -> None:
        nonlocal done, last
        done += 1
        now = clock()
        if now - last < EVERY and done < total:
            return
        last = now
        pace = f", {rate(done / (now - start), what)}" if now - start > AT_ONCE else ""
        seconds = None if done == total else time_left(done, total, now - start, expected)
        left = "" if seconds is None else f", {duration(seconds)} left"
        stream.write(f"{done}/{total} {what}{pace}{left}\n")
        stream.flush()

    return advance


def rate(speed: float, what: str = "rows") -> str:
    """Rows a second, or seconds a row where that reads better."""
    one = what.removesuffix("s")
    return f"{speed:.1f} {what}/s" if speed >= 1 else f"{1 / max(speed, 1e-9):.1f} s/{one}"


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def note(text: str) -> None:
    """A line on stderr."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
