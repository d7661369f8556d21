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

_MUCH, _LITTLE = 50.0, 10.0  # more percent of pictures without the phrase: gone, or as it was
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
        return f"n = {f.n}, no interval"
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
    """How well it went, in the numbers themselves; of a mean, over how many edits and pictures."""
    said, it, its = "the edited phrases", "them", "their"
    if len(j.phrases) == 1:
        said, it, its = quoted(j.phrases[0]), "it", "its"
    parts = []
    if j.ua is not None:
        was = j.before["ua"]
        notes = [] if was is None else [f"{share(was.value)} before the edit"]
        notes += _of(j.ua, edits)
        note = f" ({'; '.join(notes)})" if notes else ""
        parts.append(
            f"{share(j.ua.value)} of the pictures asked for {said} no longer show {it}{note}"
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
        shares = [
            " ".join([f"{share(f.value)} of {what}", *(f"({n})" for n in _of(f, edits))])
            for f, _, what in kept
        ]
        parts.append(f"{listed(shares)} still show what was asked for ({listed(was_kept)} before)")
    if not parts:
        parts += [
            f"the score of {what} {_moved(j.changes[role], edits)}"
            for role, what in (
                (EDITED, f"pictures asked for {said}"),
                (NEIGHBOUR, f"{its} neighbours"),
                (OTHER, "everything else"),
            )
            if role in j.changes
        ]
        if EDITED in j.target_changes:
            target = f"their score as the new meaning {_moved(j.target_changes[EDITED], edits)}"
            parts.insert(int(EDITED in j.changes), target)
    text = "; ".join(parts) + "."
    if edits > 1:
        phrases = len(j.phrases)
        of = f"{phrases} {'phrase' if phrases == 1 else 'phrases'}"
        return f"On average over {edits} edits of {of}: {text}"
    return text[0].upper() + text[1:]


def _of(f: Figure, edits: int) -> list[str]:
    """Over what a mean over edits is; not every edit is asked everything."""
    if edits < 2:
        return []
    whole = f"{f.prompts} edits" if f.prompts == edits else f"{f.prompts} of {edits} edits"
    return [f"{whole}, {f.pictures} pictures"]


# Which share says of a role that the phrase is gone, and how the page calls the role.
_GONE = {
    EDITED: ("ua", "the edited phrase"),
    PARAPHRASE: ("paraphrased", "paraphrases"),
    MISSPELLING: ("misspelt", "misspellings"),
}


def disagreements(j: Judged) -> list[str]:
    """Where the classifiers and the score say different things of one edit."""
    found = []
    for role, (key, words) in _GONE.items():
        now, before, change = getattr(j, key), j.before[key], j.changes.get(role)
        if now is None or before is None or change is None:
            continue
        more = now.value - before.value
        fell = change.value < 0 if change.high is None else change.high < 0
        score = f"{signed(change.value)}, {interval(change)}"
        shares = (
            f"{share(now.value)} of the pictures no longer show it ({share(before.value)} before)"
        )
        if more >= _MUCH and not fell:
            found.append(
                f"{words}: by the classifiers {shares}, but the score as the prompt says did not "
                f"clearly fall ({score})"
            )
        elif more < _LITTLE and fell:
            found.append(
                f"{words}: the score as the prompt says fell ({score}), but by the classifiers "
                f"{shares}"
            )
    return found


def short(j: Judged) -> str:
    """The numbers alone, where there are many edits."""
    found = [
        f"{key.upper()} {share(f.value)}"
        for key, f in (("ua", j.ua), ("ira", j.ira), ("cra", j.cra))
        if f is not None
    ]
    found = found or [f"{ROLES.get(r, r)} {signed(f.value)}" for r, f in j.changes.items()]
    return f"{j.edit}: {', '.join(found)}"


def _moved(change: Figure, edits: int) -> str:
    note = "".join(f" ({n})" for n in _of(change, edits))
    if change.value == 0:
        return f"did not change{note}"
    return f"{'rose' if change.value > 0 else 'fell'} by {_digits(abs(change.value))}{note}"
