"""From edits to judged pictures, a table and a page: what `evaluate` and its like share."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttrace.cli.progress import progress
from fasttrace.errors import StoreError, UsageError
from fasttrace.types import Judgement, Probe

if TYPE_CHECKING:
    from fasttrace.edit.edit import Edit
    from fasttrace.metrics.attribute import Classifier
    from fasttrace.report.judged import Figure, Judged

PICTURES = "pictures"


def default_probes(model: str) -> list[Probe]:
    """Captions that come with fasttrace: of the bundled model's world, or of everybody's."""
    from fasttrace.store.probes import read_probes

    name = "probes.json" if model == "embedded" else "probes-real-models.json"
    with as_file(files("fasttrace.embedded") / name) as path:
        return [entry.probe() for entry in read_probes(path)]


def captions(pipe: Any, probes: Path | None) -> list[Probe]:
    """Those of a file, or the pipeline's default ones."""
    from fasttrace.adapters.pipeline import Model
    from fasttrace.store.probes import read_probes

    if probes is None:
        return default_probes(Model(pipe).name)
    return [entry.probe() for entry in read_probes(probes)]


def kinds_of(classifier: Classifier | None, given: Mapping[str, str]) -> dict[str, str]:
    """Phrase -> attribute: every class of the model's classifiers, and what the user says."""
    classes = {} if classifier is None else classifier.classes
    return {name: kind for kind, names in classes.items() for name in names} | dict(given)


def judge_edits(
    pipe: Any,
    edits: Mapping[str, Edit],
    out: Path,
    probes: Sequence[Probe],
    seeds: Sequence[int],
    *,
    attributes: Mapping[str, str] | None = None,
    metric: str | None = None,
    sampling: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> list[Judgement]:
    """Judge edits of `pipe`; writes the table and its pictures into `out`."""
    from fasttrace.edit.evaluate import Evaluator, Subject
    from fasttrace.edit.questions import build_questions
    from fasttrace.store.disk import disk_errors
    from fasttrace.store.judgements import write_judgements
    from fasttrace.store.pictures import save_picture

    evaluator = Evaluator.of(pipe, metric, **dict(sampling or {}))
    known = kinds_of(evaluator.classifier, attributes or {})
    subjects = []
    for name, edit in edits.items():
        pairs = [(p["old"], " and ".join(p["new"])) for p in edit.pairs]
        asked = build_questions(pairs, probes, edit.manifest["templates"], known)
        if not asked:
            raise UsageError(f"No question fits the edit '{name}'; give other --probes.")
        subjects.append(Subject(name, edit, tuple(asked)))
    with disk_errors(out):
        (out / PICTURES).mkdir(parents=True, exist_ok=True)
    rows: list[Judgement] = []
    edited = sum(len({q.prompt for q in s.questions}) for s in subjects)
    total = len(seeds) * (edited + len({q.prompt for s in subjects for q in s.questions}))
    with progress(total, quiet, words=("judging", "pictures")) as advance:
        done = 0

        def made(now: int, _total: int) -> None:
            nonlocal done
            for _ in range(now - done):
                advance()
            done = now

        for found, pictures in evaluator.judge(subjects, seeds, made):
            rows += found
            for name, picture in pictures.items():
                save_picture(out / PICTURES, name, picture)
    # As asked, not as pictures came.
    places: dict[tuple[str, str, str], int] = {
        (s.name, q.role, q.prompt): i
        for i, (s, q) in enumerate((s, q) for s in subjects for q in s.questions)
    }
    rows.sort(key=lambda row: (places[row.edit, row.role, row.prompt], row.seed))
    write_judgements(out, rows)
    return rows


def read_edits(folder: Path) -> dict[str, Edit]:
    """The edit saved in a folder, or all that are saved in folders in it, by folder name."""
    from fasttrace.edit.export import MANIFEST, load_edit

    if (folder / MANIFEST).is_file():
        return {folder.resolve().name: load_edit(folder)}
    inside = sorted(folder.glob(f"*/{MANIFEST}")) if folder.is_dir() else []
    if not inside:
        raise StoreError(f"{folder} holds no edit; `fasttrace edit` makes one.")
    return {path.parent.name: load_edit(path.parent) for path in inside}


def lines(judged: Sequence[Judged]) -> list[str]:
    """A few words of each edit, for a terminal."""
    found = []
    for one in judged:
        shares = [
            f"{name.upper()} {percent(figure)}"
            for name, figure in (("ua", one.ua), ("ira", one.ira), ("cra", one.cra))
            if figure is not None
        ]
        if not shares:
            shares = [
                f"{role} {first.value:.1f} -> {second.value:.1f}"
                for role, (first, second) in one.scores.items()
            ]
        phrases = ", ".join(one.phrases[:3]) + (" ..." if len(one.phrases) > 3 else "")
        found.append(f"{one.edit} ({phrases}): {', '.join(shares)}")
    return found


def percent(figure: Figure) -> str:
    if figure.low is None or figure.high is None:
        return f"{figure.value:.0f} % (n = {figure.pictures}, no interval)"
    return f"{figure.value:.0f} % [{figure.low:.0f}, {figure.high:.0f}]"


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self.start, 1)
