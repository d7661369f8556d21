"""`fasttrace demo`: the bundled model traced and edited, a page for each."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import asdict
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasttrace.cli.options import COMPONENTS, Json, Out, Quiet
from fasttrace.types import Corruption, Probe

if TYPE_CHECKING:
    from fasttrace.report.judged import Judged
    from fasttrace.report.result import Result
    from fasttrace.report.statistics import SiteEffect
    from fasttrace.store.probes import ProbeEntry

NAME = "demo"
PROMPTS = 5  # of each attribute, one seed: enough for intervals, minutes on two cores
TOKENS: list[str | int] = ["last subject", "EOS", "padding"]
TOP = 5
# Captions that no probe asks, so that what is judged is another sentence than what was learnt.
_LOOKS = {"flat": "red", "ink": "gray", "glossy": "green", "cartoon": "purple"}
_THINGS = ("a bell", "a bus", "a snake", "an egg", "a tent", "a crab")
_GROUNDS = ("white", "red", "blue", "gray", "green", "pink")
_TEN = {
    "a cat": "a duck",
    "a rocket": "a tent",
    "a house": "a pig",
    "a palm tree": "a cactus",
    "an owl": "a snail",
    "a banana": "an egg",
    "a car": "a bus",
    "a robot": "a ghost",
    "a guitar": "a bell",
    "a key": "a hammer",
}
# What is erased afterwards: each name is an edit with its pairs and the attribute they are of.
EDITS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "one-style": ("style", [("ink", "glossy")]),
    "one-object": ("object", [("a dog", "a cat")]),
    "ten-objects": ("object", list(_TEN.items())),
}
# At the layer that tracing finds. The more surroundings are learnt, and the more other phrases are
# told to stay, the less moves beside the concept.
SETTINGS: dict[str, dict[str, Any]] = {
    "style": {
        "lam": 0.1,
        "templates": [
            form.replace("THING", thing).replace("GROUND", ground)
            for form in ("THING in {} style on a GROUND ground", "a {} drawing of THING on GROUND")
            for thing, ground in zip(_THINGS, _GROUNDS, strict=True)
        ],
    },
    "object": {
        "templates": ["{}", "a picture of {}", "a drawing of {}"]
        + [f"a {look} {word} of {{}}" for look in _LOOKS for word in ("picture", "drawing")]
        + [f"{{}} in {look} style on a {ground} ground" for look, ground in _LOOKS.items()]
        + [f"{{}} on a {ground} ground" for ground in _GROUNDS],
    },
}


def command(
    context: typer.Context,
    out: Out = Path("demo-out"),
    full: Annotated[bool, typer.Option("--full", help="Every prompt, seed and token.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Trace the bundled model, print the most causal sites of each attribute, and erase concepts.

    Without --full it takes a few prompts, one seed and three text tokens, so that it ends within
    minutes on two cores; n is printed.
    """
    from fasttrace.cli.judging import lines
    from fasttrace.cli.sweep import Request, run
    from fasttrace.report.html import write_report
    from fasttrace.report.result import Result
    from fasttrace.store import Shard
    from fasttrace.store.probes import read_probes

    start = time.monotonic()
    with as_file(files("fasttrace.embedded") / "probes.json") as path:
        entries = read_probes(path)
    request = Request(
        model="embedded",
        probes=choose(entries, full),
        out=out,
        command=str(context.obj),
        components=list(COMPONENTS),
        corruption=Corruption(),
        sites=["paper"],
        tokens=["default"] if full else TOKENS,
        windows=None,
        branch="cond",
        metrics=[],
        sampling={"steps": None},
        dtype="float32",
        device="cpu",
        shard=Shard(),
        pictures=True,
        quiet=quiet,
    )
    outcome = run(request)
    edited, judged = erase(out, quiet)
    page = write_report(out)
    result = Result.open(out)
    causal = result.causal(top=TOP)
    seconds = round(time.monotonic() - start, 1)
    if as_json:
        from fasttrace.cli.report import as_dict

        about = {**vars(outcome), "report": str(page), "seconds": seconds}
        about |= {"edits": [asdict(one) for one in judged], "edits_report": str(edited)}
        print(json.dumps({**about, "causal": [as_dict(effect) for effect in causal]}))
        return
    _print(result, causal)
    print("\nErased in closed form (UA: gone; IRA, CRA: what was to stay):")
    for line in lines(judged):
        print(f"  {line}")
    print(f"\n{seconds:.0f} s. The report: {page}\nThe edits: {edited}")


def erase(out: Path, quiet: bool) -> tuple[Path, list[Judged]]:
    """Make the edits, where they aren't there yet, and judge them; their page."""
    from fasttrace import Editor, load, load_edit
    from fasttrace.cli.judging import default_probes, judge_edits
    from fasttrace.edit.export import MANIFEST
    from fasttrace.report.edit_manifest import Origin
    from fasttrace.report.edits import write_edits_report
    from fasttrace.report.html import EDITS as FOLDER
    from fasttrace.report.judged import judge

    pipe = load("embedded")
    editor, edits = Editor(pipe), {}
    for name, (attribute, pairs) in EDITS.items():
        place = out / FOLDER / name
        if not (place / MANIFEST).is_file():
            stay = _others(attribute, [old for old, _ in pairs])
            editor.edit(pairs, preserve=stay, **SETTINGS[attribute]).save(place)
        edits[name] = load_edit(place)
    asked = default_probes("embedded")
    judging = judge_edits(pipe, edits, out / FOLDER, asked, [0], quiet=quiet)
    origin = Origin(
        shlex.join(["fasttrace", "demo", "--out", str(out)]),
        {"model": "embedded", **judging.settings, "captions": "those that come with fasttrace"},
        {name: str(out / FOLDER / name) for name in edits},
    )
    manifests = {name: e.manifest for name, e in edits.items()}
    return write_edits_report(out / FOLDER, manifests, origin=origin), judge(judging.rows)


def _others(attribute: str, edited: list[str]) -> list[str]:
    """Everything of the kind that the bundled model draws, but what is edited."""
    from fasttrace.adapters.pipeline import embedded_folder
    from fasttrace.edit.questions import article, bare
    from fasttrace.embedded.classifier import load_classifier

    names = load_classifier(embedded_folder("classifiers")).classes[attribute]
    gone = {bare(phrase) for phrase in edited}
    left = [name for name in names if name not in gone]
    return left if attribute == "style" else [article(f"a {name}") for name in left]


def choose(entries: list[ProbeEntry], full: bool) -> dict[Probe, list[int]]:
    """All probes with all their seeds, or the first few of each attribute with one seed."""
    taken: dict[str, int] = {}
    found: dict[Probe, list[int]] = {}
    for entry in entries:
        seeds = entry.seeds or [0]
        taken[entry.attribute] = taken.get(entry.attribute, 0) + 1
        if full:
            found[entry.probe()] = seeds
        elif taken[entry.attribute] <= PROMPTS:
            found[entry.probe()] = seeds[:1]
    return found


def _print(result: Result, causal: list[SiteEffect]) -> None:
    from fasttrace.report.names import component_words, in_order
    from fasttrace.report.text import chance, percent, share_interval, why_none

    for group in in_order(row.attribute for row in result.rows):
        for component in result.components:
            own = [e for e in causal if e.group == group and e.component == component]
            if not own:
                rows = result.where(attribute=group, component=component).rows
                why = why_none(rows, result.minimum)
                print(f"\n{group}, {component_words(component)}: no causal site, {why}")
                continue
            print(f"\n{group}, {component_words(component)} (n = {own[0].prompts} prompts)")
            for number, e in enumerate(own, start=1):
                place = e.site if e.selector == "all" else f"{e.site} @ {e.selector}"
                mark = f"  {share_interval(e)}  {chance(e)}" if e.low is not None else ""
                print(f"  {number}. {percent(e.normalised):>6}  {place}{mark}")
