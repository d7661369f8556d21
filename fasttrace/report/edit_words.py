"""Figures of an evaluation in words and digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fasttrace.report.edit_manifest import listed, quoted, reads_as
from fasttrace.report.judged import (
    EDITED,
    MISSPELLING,
    NEIGHBOUR,
    OTHER,
    PARAPHRASE,
    Figure,
    Judged,
)
from fasttrace.report.text import percent

ROLES = {
    EDITED: "edited",
    PARAPHRASE: "paraphrases",
    MISSPELLING: "misspellings",
    NEIGHBOUR: "neighbours",
    OTHER: "others",
}


def interval(f: Figure, unit: str = "") -> str:
    """ "[1.2, 2.4]", "[71, 100] %", or how few there were."""
    if f.low is None or f.high is None:
        return f"n = {f.prompts}, no interval"
    if unit == "%":
        return f"[{share(f.low)}, {share(f.high)}]".replace(" %", "") + " %"
    return f"[{_digits(f.low)}, {_digits(f.high)}]"


def tight(text: str) -> str:
    """Breaks into lines before "no interval" alone."""
    return text.replace(" ", "\u00a0").replace(",\u00a0no", ", no")


def share(value: float) -> str:
    """Percent; only what is all or nothing reads so."""
    value = round(value, 6)
    if 0 < value < 0.5 or 99.5 <= value < 100:
        return f"{min(99.9, max(0.1, value)):.1f} %"
    return percent(value / 100)


def signed(value: float) -> str:
    return "0" if value == 0 else _digits(value, "+")


def _digits(value: float, sign: str = "") -> str:
    """Small ones, which are mostly noise, with fewer."""
    return f"{value:{sign}.{2 if abs(value) < 1 else 3}g}"


def title(judged: Sequence[Judged], edits: Mapping[str, Mapping[str, Any]]) -> str:
    if len(judged) > 1:
        phrases = len({phrase for j in judged for phrase in j.phrases})
        return f"{len(judged)} edits, {phrases} {'phrase' if phrases == 1 else 'phrases'} rewritten"
    return reads_as(edits.get(judged[0].edit), judged[0].phrases)


def sentence(j: Judged, edits: int) -> str:
    """How well it went, in the numbers themselves."""
    said, it, its = "the edited phrases", "them", "their"
    if len(j.phrases) == 1:
        said, it, its = quoted(j.phrases[0]), "it", "its"
    parts = []
    if j.ua is not None:
        was = j.before["ua"]
        before = "" if was is None else f" ({share(was.value)} before the edit)"
        parts.append(
            f"{share(j.ua.value)} of the pictures asked for {said} no longer show {it}{before}"
        )
    kept = [
        (f, j.before[key], what)
        for key, f, what in (
            ("ira", j.ira, f"{its} neighbours"),
            ("cra", j.cra, "everything else"),
        )
        if f is not None
    ]
    if kept:
        was_kept = [share(before.value) for _, before, _ in kept if before is not None]
        parts.append(
            listed([f"{share(f.value)} of {what}" for f, _, what in kept])
            + f" still show what was asked for ({listed(was_kept)} before)"
        )
    if not parts:
        parts += [
            f"the score of {what} {_moved(j.changes[role])}"
            for role, what in (
                (EDITED, f"pictures asked for {said}"),
                (NEIGHBOUR, f"{its} neighbours"),
                (OTHER, "everything else"),
            )
            if role in j.changes
        ]
        if EDITED in j.target_changes:
            target = f"their score as the new meaning {_moved(j.target_changes[EDITED])}"
            parts.insert(int(EDITED in j.changes), target)
    text = "; ".join(parts) + "."
    if edits > 1:
        return f"On average over {edits} edits: {text}"
    return text[0].upper() + text[1:]


def short(j: Judged) -> str:
    """The numbers alone, where there are many edits."""
    found = [
        f"{key.upper()} {share(f.value)}"
        for key, f in (("ua", j.ua), ("ira", j.ira), ("cra", j.cra))
        if f is not None
    ]
    found = found or [f"{ROLES.get(r, r)} {signed(f.value)}" for r, f in j.changes.items()]
    return f"{j.edit}: {', '.join(found)}"


def _moved(change: Figure) -> str:
    if change.value == 0:
        return "did not change"
    return f"{'rose' if change.value > 0 else 'fell'} by {_digits(abs(change.value))}"
