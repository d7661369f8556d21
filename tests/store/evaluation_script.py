"""Judge, dying at every single call by which the store changes the disk, then go on and check.

    python evaluation_script.py FOLDER

As `crash_script.py` does for sweeps. Prints the number of trials.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from crash_script import die_at

from fasttrace.store.evaluation import Evaluation, Unit, unit_of
from fasttrace.store.judgements import read_judgements
from fasttrace.types import Judgement

QUESTION = {"steps": 4, "edits": {"ink": "abc"}}


def unit(number: int) -> list[Judgement]:
    """A prompt asked in two roles, as one that is both a paraphrase and a neighbour would be."""
    return [
        Judgement(
            edit="ink", role=role, phrase="ink", attribute="style", prompt=f"a dog {number}",
            seed=7, metric="clip_score", before=24.0 + number / 3, after=float("nan"),
            new_before=None, new_after=17.5, expected="{}", shown_before="{}", shown_after="{}",
            picture_before=f"{number:024x}", picture_after=f"{number + 256:024x}",
        )
        for role in ("edited", "neighbour")
    ]  # fmt: skip


UNITS = [unit(number) for number in range(4)]


def judge(out: Path, question: object = None) -> list[Unit]:
    """Everything that is not there yet; what it made."""
    made = []
    asked = QUESTION if question is None else {**QUESTION, "steps": question}
    with Evaluation.open(out, asked) as evaluation:
        for rows in UNITS:
            if unit_of(rows[0]) in evaluation.done:
                continue
            names = [n for n in (rows[0].picture_before, rows[0].picture_after) if n is not None]
            evaluation.add(rows, {n: np.full((3, 8, 8), 0.5, np.float32) for n in names})
            made.append(unit_of(rows[0]))
        evaluation.finish(evaluation.rows)
    return made


def trial(folder: Path, countdown: int) -> bool:
    """True where the child was killed; False where it finished before its n-th call."""
    out = folder / f"out-{countdown}"
    child = os.fork()
    if child == 0:
        die_at(countdown)
        judge(out)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    made = judge(out)
    assert made == [unit_of(rows[0]) for rows in UNITS][len(UNITS) - len(made) :], countdown
    found = read_judgements(out)
    assert [str(row) for row in found] == [str(row) for rows in UNITS for row in rows], countdown
    assert judge(out) == [], countdown
    for rows in UNITS:
        for name in (rows[0].picture_before, rows[0].picture_after):
            assert (out / "pictures" / f"{name}.png").stat().st_size > 0, countdown
    return os.WIFSIGNALED(status)


if __name__ == "__main__":
    trials = 1
    while trial(Path(sys.argv[1]), trials):
        trials += 1
    sys.stdout.write(f"{trials}\n")
