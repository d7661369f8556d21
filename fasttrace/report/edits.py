"""The page of an evaluation: what each edit did to its phrase, and what else moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttrace.errors import StoreError, UsageError
from fasttrace.report.edit_manifest import Made, Origin, made, reads_as, versions
from fasttrace.report.edit_pictures import MANY, Album, PairGroup
from fasttrace.report.edit_words import (
    ROLES,
    disagreements,
    interval,
    sentence,
    share,
    short,
    signed,
    tight,
    title,
)
from fasttrace.report.judged import (
    EDITED,
    MISSPELLING,
    NEIGHBOUR,
    OTHER,
    PARAPHRASE,
    SHARES,
    Figure,
    Judged,
    judge,
    mean,
)
from fasttrace.report.lambda_path import PathChart, path_chart
from fasttrace.report.pages import environment
from fasttrace.report.result import Result
from fasttrace.report.retraced import Retraced, compare
from fasttrace.store.disk import JUDGEMENTS, write_atomic
from fasttrace.store.evaluation import PICTURES
from fasttrace.store.judgements import TABLE, read_judgements
from fasttrace.types import Judgement

REPORT = "report.html"
MOST_REMARKS = 6


@dataclass(frozen=True)
class PathPoint:
    """What an edit with this lambda did."""

    lam: float
    figures: Judged


@dataclass(frozen=True)
class Cell:
    """One number of the table: its value, interval or how few there were, what it was before."""

    value: str
    interval: str
    before: str


@dataclass(frozen=True)
class Column:
    name: str
    about: str
    cells: list[Cell | None]  # one a line


@dataclass(frozen=True)
class RoleLine:
    """One role of one edit, in every number there is."""

    role: str
    prompts: int
    pictures: int
    score: Cell | None
    target: Cell | None
    share: Cell | None


@dataclass(frozen=True)
class Section:
    """One edit."""

    name: str
    title: str
    short: str
    roles: list[RoleLine]
    groups: list[PairGroup]
    made: Made | None


@dataclass(frozen=True)
class View:
    title: str
    sentence: str
    facts: list[tuple[str, str]]
    metric: str
    classified: bool
    lines: list[str]  # of the table; where there are several edits the first is their mean
    shares: list[Column]
    scores: list[Column]
    sections: list[Section]
    remarks: list[str]  # where the judges disagree
    unremarked: int  # more of these
    unjudged: list[str]
    absent: list[str]  # roles that nothing was asked for
    missing: int  # pictures
    trace: Retraced | None
    path: PathChart | None
    versions: list[str]
    models: list[str]
    methods: list[str]
    origin: Origin | None
    table: str = TABLE


def write_edits_report(
    folder: Path,
    edits: Mapping[str, Mapping[str, Any]],
    before: Result | None = None,
    after: Result | None = None,
    path: Sequence[PathPoint] = (),
    origin: Origin | None = None,
) -> Path:
    """Write `report.html` beside the judgements and pictures in `folder`; its path.

    edits: manifests by the names that the judgements use. before, after: traces of the same probes
    on the unedited and the edited model. path: the same edit with several lambdas. origin: what
    gives this page again. Raises `StoreError` where there are no judgements, damaged ones, or
    `folder` can't be written, and `UsageError` where the traces can't be compared.
    """
    rows = read_judgements(folder)
    page = folder / REPORT
    album = Album(folder / PICTURES, len({r.edit for r in rows}) > MANY)
    view = build_view(rows, edits, album, before, after, path, origin)
    album.warn_of_damage()
    write_atomic(page, render(view).encode(), JUDGEMENTS)
    return page


def render(view: View) -> str:
    pages = environment()
    pages.filters |= {"interval": interval, "share": share, "signed": signed, "tight": tight}
    return pages.get_template("edits.html.j2").render(view=view, roles=ROLES)


def build_view(
    rows: Sequence[Judgement],
    edits: Mapping[str, Mapping[str, Any]],
    album: Album,
    before: Result | None = None,
    after: Result | None = None,
    path: Sequence[PathPoint] = (),
    origin: Origin | None = None,
) -> View:
    if not rows:
        raise StoreError(f"{album.folder.parent} holds an evaluation without a single picture.")
    if (before is None) != (after is None):
        raise UsageError("give the traces before and after the edit, or none of them.")
    judged = judge(rows)
    every = [mean(judged), *judged] if len(judged) > 1 else judged
    manifests = [edits[j.edit] for j in judged if j.edit in edits]
    classified = any(getattr(j, name) is not None for j in judged for name in SHARES)
    sites = {site for m in manifests for site in m.get("sites", ())}
    trace = None if before is None or after is None else compare(before, after, sites)
    lams = {m["lam"] for m in manifests if "lam" in m}
    seeds = list(dict.fromkeys(r.seed for r in rows))
    remarks = [
        f"{j.edit}, {words}" if len(judged) > 1 else words
        for j in judged
        for words in disagreements(j)
    ]
    return View(
        title=title(judged, edits),
        sentence=sentence(every[0], len(judged)),
        facts=_facts(rows, judged, manifests),
        metric=rows[0].metric,
        classified=classified,
        lines=[j.edit for j in every],
        shares=_share_columns(every) if classified else [],
        scores=_score_columns(every),
        sections=[
            Section(
                name=j.edit,
                title=reads_as(edits.get(j.edit), j.phrases),
                short=short(j),
                roles=_roles(j),
                groups=album.groups([r for r in rows if r.edit == j.edit]),
                made=made(j.edit, edits[j.edit], seeds, origin) if j.edit in edits else None,
            )
            for j in judged
        ],
        remarks=remarks[:MOST_REMARKS],
        unremarked=max(0, len(remarks) - MOST_REMARKS),
        unjudged=[name for name in edits if all(j.edit != name for j in judged)],
        absent=[words for role, words in ROLES.items() if all(r.role != role for r in rows)],
        missing=album.missing,
        trace=trace,
        path=path_chart([(p.lam, p.figures) for p in path], lams.pop() if len(lams) == 1 else None),
        versions=versions(manifests),
        models=list(dict.fromkeys(str(m["model"]) for m in manifests if "model" in m)),
        methods=list(dict.fromkeys(str(m["method"]) for m in manifests if "method" in m)),
        origin=origin,
    )


def _share_cell(now: Figure | None, before: Figure | None) -> Cell | None:
    if now is None:
        return None
    return Cell(share(now.value), interval(now, "%"), "" if before is None else share(before.value))


def _change_cell(change: Figure | None, both: tuple[Figure, Figure] | None) -> Cell | None:
    if change is None or both is None:
        return None
    return Cell(signed(change.value), interval(change), f"{both[0].value:.3g}")


def _share_columns(every: Sequence[Judged]) -> list[Column]:
    about = {
        "ua": ("UA", "phrase gone"),
        "ira": ("IRA", "neighbours kept"),
        "cra": ("CRA", "others kept"),
        "paraphrased": ("paraphrases", "phrase gone"),
        "misspelt": ("misspellings", "phrase gone"),
    }
    columns = [
        Column(name, words, [_share_cell(getattr(j, key), j.before[key]) for j in every])
        for key, (name, words) in about.items()
    ]
    return [c for c in columns if any(c.cells)]


def _score_columns(every: Sequence[Judged]) -> list[Column]:
    def own(role: str) -> list[Cell | None]:
        return [_change_cell(j.changes.get(role), j.scores.get(role)) for j in every]

    target = [_change_cell(j.target_changes.get(EDITED), j.targets.get(EDITED)) for j in every]
    columns = [
        Column("phrase", "as asked for", own(EDITED)),
        Column("target", "as its new meaning", target),
        Column("neighbours", "same attribute", own(NEIGHBOUR)),
        Column("others", "quality elsewhere", own(OTHER)),
    ]
    if all(j.paraphrased is None for j in every):
        columns.append(Column("paraphrases", "as asked for", own(PARAPHRASE)))
    if all(j.misspelt is None for j in every):
        columns.append(Column("misspellings", "as asked for", own(MISSPELLING)))
    return [c for c in columns if any(c.cells)]


def _roles(j: Judged) -> list[RoleLine]:
    keys = {EDITED: "ua", PARAPHRASE: "paraphrased", MISSPELLING: "misspelt", NEIGHBOUR: "ira"}
    found = []
    for role, words in ROLES.items():
        if role not in j.scores:
            continue
        key = keys.get(role)
        before = j.scores[role][0]
        found.append(
            RoleLine(
                words,
                before.prompts,
                before.pictures,
                _change_cell(j.changes.get(role), j.scores[role]),
                _change_cell(j.target_changes.get(role), j.targets.get(role)),
                None if key is None else _share_cell(getattr(j, key), j.before[key]),
            )
        )
    return found


def _facts(
    rows: Sequence[Judgement], judged: Sequence[Judged], manifests: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    pictures = {n for r in rows for n in (r.picture_before, r.picture_after) if n is not None}
    found = [
        (len(judged) if len(judged) > 1 else 0, "edit", "edits"),
        (len({p for j in judged for p in j.phrases}), "phrase rewritten", "phrases rewritten"),
        (
            len({n for m in manifests for n in m.get("base", ())}),
            "matrix changed",
            "matrices changed",
        ),
        (len({r.prompt for r in rows}), "prompt asked", "prompts asked"),
        (len({r.seed for r in rows}), "seed", "seeds"),
        (len(pictures), "picture", "pictures"),
    ]
    classes = any(r.shown_after != "{}" for r in rows)
    return [
        *((one if number == 1 else many, f"{number:,}") for number, one, many in found if number),
        ("judged by", "classifiers" if classes else "score alone"),
    ]
