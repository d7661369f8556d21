"""An evaluation made up by hand, and its page."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fasttrace.report.edits import PathPoint, write_edits_report
from fasttrace.report.judged import judge
from fasttrace.store.judgements import write_judgements
from fasttrace.store.pictures import save_picture
from fasttrace.types import Judgement

HOSTILE = '<script>alert("x")</script> & \'"><img src=https://evil.example/x onerror=alert(1)>'
SITE = "text_encoder.layers.0.self_attn"


def manifest(old: str = "ink", new: str | Sequence[str] = "flat", **values: Any) -> dict[str, Any]:
    news = [new] if isinstance(new, str) else list(new)
    pair = {"old": old, "new": news, "strength": 1.0, "shares": [1 / len(news)] * len(news)}
    return {
        "schema": 1, "model": "embedded", "method": "diffquickfix", "source": "Basu et al.",
        "sites": [SITE], "lam": 0.01, "tokens": "last_to_end", "templates": ["{}", "a photo of {}"],
        "pairs": [pair],
        "bias": "exact", "preserve": [], "preserve_weight": 1.0, "dtype": "float32", "after": [],
        "base": {f"{SITE}.out_proj": "ab" * 32},
        "versions": {"torch": "2.13.0", "fasttrace": "0.1.0"},
    } | values  # fmt: skip


def row(role: str, number: int, seed: int = 0, *, edit: str = "ink-to-flat", after: str = "",
        classes: bool = True, fall: float = 0.0, prompt: str = "") -> Judgement:  # fmt: skip
    """A style's picture that shows what it should before, and `after` (or the same) afterwards."""
    changed = role in ("edited", "paraphrase", "misspelling")
    wanted = "ink" if changed else "cartoon"
    attribute = "object" if role == "other" else "style"
    prompt = prompt or f"{role} dog {number} in {wanted} style"
    names = [hashlib.sha256(f"{edit * i}{prompt}{seed}".encode()).hexdigest()[:24] for i in (0, 1)]
    shown = [
        json.dumps({attribute: s} if classes else {}) for s in (wanted, wanted, after or wanted)
    ]
    return Judgement(
        edit=edit, role=role, phrase="ink" if changed else "cartoon",
        attribute=attribute, prompt=prompt, seed=seed,
        metric="clip_score", before=24.0, after=24.0 - fall, new_before=18.0 if changed else None,
        new_after=21.0 if changed else None, expected=shown[0], shown_before=shown[1],
        shown_after=shown[2], picture_before=names[0], picture_after=names[1],
    )  # fmt: skip


def evaluation(edit: str = "ink-to-flat", classes: bool = True) -> list[Judgement]:
    """UA 75 % of 6 prompts, IRA 80 % of 5, CRA 100 % of 3."""
    kept = {"edit": edit, "classes": classes}
    rows = [
        row("edited", i, s, after="flat" if i < 3 or s else "", fall=4.0, **kept)
        for i in range(6)
        for s in (0, 1)
    ]
    rows += [row("paraphrase", i, after="flat", **kept) for i in range(3)]
    rows += [row("misspelling", i, after="" if i else "flat", **kept) for i in range(4)]
    rows += [row("neighbour", i, after="flat" if i == 3 else "", fall=i, **kept) for i in range(5)]
    rows += [row("other", i, fall=0.5 * i, **kept) for i in range(3)]
    return rows


def fill(folder: Path, rows: Sequence[Judgement], size: int = 8) -> Path:
    write_judgements(folder, rows)
    (folder / "pictures").mkdir(exist_ok=True)
    for r in rows:
        for name in (r.picture_before, r.picture_after):
            assert name is not None
            colour = [int(name[i : i + 2], 16) / 255 for i in (0, 2, 4)]
            picture = np.broadcast_to(np.array(colour)[:, None, None], (3, size, size))
            save_picture(folder / "pictures", name, picture)
    return folder


def page_of(folder: Path, edits: dict[str, Any] | None = None, **values: Any) -> str:
    path = write_edits_report(folder, {"ink-to-flat": manifest()} if edits is None else edits,
                              **values)  # fmt: skip
    assert path == folder / "report.html"
    return path.read_text()


def text_of(page: str) -> str:
    page = re.sub(r"<(style|script)>.*?</\1>", " ", page, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page).replace("\u00a0", " "))


def path_of(classes: bool = True) -> list[PathPoint]:
    points = []
    for lam, gone in ((10.0, 0), (1e-4, 6), (0.01, 3)):
        rows = [
            row("edited", i, after="flat" if i < gone else "", classes=classes, fall=gone)
            for i in range(6)
        ]
        points.append(PathPoint(lam, judge(rows)[0]))
    return points
