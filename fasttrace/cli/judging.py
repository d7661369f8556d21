"""From edits to judged pictures, a table and a page: what `evaluate` and its like share."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttrace.cli.progress import note, progress
from fasttrace.errors import StoreError, UsageError
from fasttrace.types import Judgement, Probe

if TYPE_CHECKING:
    from fasttrace.edit.edit import Edit
    from fasttrace.metrics.attribute import Classifier
    from fasttrace.report.judged import Judged
    from fasttrace.store.evaluation import Evaluation

HASHES = ("format", "weights", "scheduler", "classifiers", "prompts")  # of an evaluation's question


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


@dataclass(frozen=True)
class Judging:
    """What was judged: the table's rows, and how, by the names of the options."""

    rows: list[Judgement]
    settings: dict[str, str]


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
) -> Judging:
    """Judge edits of `pipe`; writes the table and its pictures into `out`.

    Goes on where the same question was stopped; another one begins anew, and says so.
    """
    from fasttrace.edit.evaluate import SAMPLING, Evaluator, Subject
    from fasttrace.edit.questions import build_questions
    from fasttrace.store.evaluation import Evaluation

    evaluator = Evaluator.of(pipe, metric, **dict(sampling or {}))
    known = kinds_of(evaluator.classifier, attributes or {})
    subjects = []
    for name, edit in edits.items():
        pairs = [(p["old"], " and ".join(p["new"])) for p in edit.pairs]
        asked = build_questions(pairs, probes, edit.manifest["templates"], known)
        if not asked:
            raise UsageError(f"No question fits the edit '{name}'; give other --probes.")
        subjects.append(Subject(name, edit, tuple(asked)))
    with Evaluation.open(out, evaluator.question(subjects, seeds)) as evaluation:
        left, whole = (evaluator.left(subjects, seeds, d) for d in (evaluation.done, ()))
        if not quiet:
            _announce(out, evaluation, left, whole)
        with progress(left, quiet, words=("judging", "pictures")) as advance:
            done = 0

            def made(now: int, _total: int) -> None:
                nonlocal done
                for _ in range(now - done):
                    advance()
                done = now

            for found, pictures in evaluator.judge(subjects, seeds, made, evaluation.done):
                evaluation.add(found, pictures)
        # As asked, not as pictures came.
        places: dict[tuple[str, str, str], int] = {
            (s.name, q.role, q.prompt): i
            for i, (s, q) in enumerate((s, q) for s in subjects for q in s.questions)
        }
        rows = sorted(
            evaluation.rows, key=lambda row: (places[row.edit, row.role, row.prompt], row.seed)
        )
        evaluation.finish(rows)
    settings = {"seeds": ",".join(map(str, seeds))}
    settings |= {name: f"{getattr(evaluator.sampling, name):g}" for name in SAMPLING}
    dtype = str(evaluator.model.dtype).removeprefix("torch.")
    settings |= {"metric": evaluator.metric.key, "dtype": dtype}
    return Judging(rows, settings)


def _announce(out: Path, evaluation: Evaluation, left: int, whole: int) -> None:
    """What is there already, or why it isn't taken."""
    changed = evaluation.begun_anew
    if changed:
        words = ", ".join(_in_words(name, *values) for name, values in changed.items())
        note(f"{out} holds an evaluation of another question ({words}): judging anew.")
    elif evaluation.done:
        # Of a batch that was not judged whole every picture is made again.
        there = len(evaluation.done)
        note(f"{out}: going on, {there} judged already; {left} of {whole} pictures left to make.")


def _in_words(name: str, before: Any, now: Any) -> str:
    """ "steps 20, now 4"; hashes say nothing to a reader."""
    if isinstance(before, dict) and isinstance(now, dict):
        same = before.keys() == now.keys()
        return f"other {name}" if same else f"{name} {', '.join(before)}, now {', '.join(now)}"
    if name in HASHES or before is None or now is None:
        return f"other {name}"
    return f"{name} {_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        value = ", ".join(str(v) for v in value if v != "")
    return str(value) if len(str(value)) <= 60 else f"{str(value)[:57]}..."


def read_edits(folder: Path) -> dict[str, Edit]:
    """The edit saved in a folder, or all that are saved in folders in it, by folder name."""
    from fasttrace.edit.export import MANIFEST, load_edit

    if (folder / MANIFEST).is_file():
        return {folder.resolve().name: load_edit(folder)}
    inside = sorted(folder.glob(f"*/{MANIFEST}")) if folder.is_dir() else []
    if not inside:
        raise StoreError(f"{folder} holds no edit; `fasttrace edit` makes one.")
    return {path.parent.name: load_edit(path.parent) for path in inside}


def folders_of(folder: Path, edits: Iterable[str]) -> dict[str, Path]:
    """Where each of the edits that `read_edits` found lies."""
    from fasttrace.edit.export import MANIFEST

    alone = (folder / MANIFEST).is_file()
    return {name: folder if alone else folder / name for name in edits}


def lines(judged: Sequence[Judged]) -> list[str]:
    """A few words of each edit, for a terminal."""
    from fasttrace.report.edit_words import interval, share

    found = []
    for one in judged:
        shares = [
            f"{name.upper()} {share(figure.value)} {bracketed(interval(figure, '%'))}"
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


def bracketed(text: str) -> str:
    """An interval as it is, "n = 3 prompts, no interval" in brackets."""
    return text if text.startswith("[") else f"({text})"


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self.start, 1)
