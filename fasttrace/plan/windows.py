"""Which denoiser calls a patch is written in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fasttrace.errors import UsageError

Window = tuple[int, int]


def resolve_windows(window: Any, calls: int) -> list[Window]:
    """One half-open call range per asked window, each once, in the order given.

    `window`: None (every call), a pair of call numbers, a pair of fractions of the run (a float
    among the two makes it one), or a list of such pairs. Raises `UsageError` outside the run.
    """
    if window is None:
        return [(0, calls)]
    many = isinstance(window, Sequence) and len(window) > 0 and isinstance(window[0], Sequence)
    asked = window if many else [window]
    return list(dict.fromkeys(resolve_window(w, calls) for w in asked))


def resolve_window(window: Any, calls: int) -> Window:
    """(start, stop) with 0 <= start < stop <= calls."""
    if not isinstance(window, Sequence) or isinstance(window, str) or len(window) != 2:
        raise UsageError(f"A step window is a pair (start, stop); {window!r} was given.")
    low, high = window
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in (low, high)):
        raise UsageError(f"A step window holds two numbers; {window!r} was given.")
    if isinstance(low, float) or isinstance(high, float):
        if not 0 <= low < high <= 1:
            raise UsageError(
                f"The step window {window!r} is read as fractions of the run, which lie in 0 to 1 "
                "and rise; give whole numbers for denoiser calls."
            )
        start, stop = round(low * calls), round(high * calls)
        if start == stop:
            raise UsageError(f"The step window {window!r} holds none of the {calls} calls.")
        return start, stop
    if not 0 <= low < high <= calls:
        raise UsageError(
            f"The step window {window!r} is outside the run: it makes {calls} denoiser calls, "
            f"counted from 0, so 0 <= start < stop <= {calls}."
        )
    return int(low), int(high)
