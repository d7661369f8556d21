"""Numbers and names as people read them."""

from __future__ import annotations

from fasttrace.profile.sites import OTHER

_NAMES = {
    "resnet": "ResNets",
    "attn1": "self-attention",
    "attn2": "cross-attention",
    "ff": "feed-forward",
    OTHER: "operators of no site",
}


def kind_name(kind: str) -> str:
    return _NAMES.get(kind, kind)


def scaled(number: float | None, unit: str) -> str:
    """Three digits: "12.3 GFLOP", "870 kB"; "" for None."""
    if number is None:
        return ""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5:
            return f"{digits(number)} {prefix}{unit}"
        number /= 1000
    return f"{number:,.0f} P{unit}"


def seconds(number: float) -> str:
    """ "2.10 s", "12.3 ms", "870 µs"."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if abs(number) * factor >= 0.9995:
            return f"{digits(number * factor)} {unit}"
    return f"{digits(number * 1e6)} \N{MICRO SIGN}s"


def digits(number: float) -> str:
    """Three digits, more before the point."""
    size = abs(number)
    places = 0 if size >= 99.95 or size == 0 else 1 if size >= 9.995 else 2
    return f"{number:.{places}f}"


def percent(share: float | None) -> str:
    """ "12.3 %"; "" for None."""
    return "" if share is None else f"{100 * share:.1f} %"


def shown(text: str) -> str:
    """Text that can't move a terminal's cursor or colour it."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
