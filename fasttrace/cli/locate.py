"""`fasttrace locate-and-edit`: trace, edit what tracing found, trace again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasttrace.cli.edit import given, read_replacements
from fasttrace.cli.options import (
    Attribute,
    Device,
    Dtype,
    Guidance,
    Json,
    Lam,
    MetricName,
    Model,
    NewFolder,
    Pair,
    Pairs,
    Preserve,
    Quiet,
    Seeds,
    Steps,
    Template,
    Tokens,
    check_text,
    full_command,
    parse_seeds,
)
from fasttrace.errors import StoreError, UsageError
from fasttrace.types import Corruption, Probe

if TYPE_CHECKING:
    from fasttrace.edit.phrases import Replacement
    from fasttrace.report.statistics import SiteEffect

NAME = "locate-and-edit"
MOST = 6  # captions traced a phrase
BEFORE, AFTER, EDIT, EVALUATION = "before", "after", "edit", "evaluation"


def command(
    context: typer.Context,
    model: Model,
    out: NewFolder,
    pair: Pair = None,
    pairs: Pairs = None,
    probes: Annotated[
        Path | None, typer.Option(help="Captions to trace and ask with.", metavar="FILE")
    ] = None,
    attribute: Attribute = None,
    component: Annotated[
        list[str] | None,
        typer.Option("--component", help="text_encoder, unet or all.", metavar="NAME"),
    ] = None,
    lam: Lam = None,
    template: Template = None,
    tokens: Tokens = None,
    preserve: Preserve = None,
    seeds: Seeds = "0",
    metric: MetricName = None,
    steps: Steps = None,
    guidance: Guidance = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Find the site that holds a phrase, rewrite it there, and trace again.

    Of the sites that can be edited (a text encoder's self_attn and mlp, cross-attention) the one
    with the largest effect is edited. The page shows its effect before and after, whichever way it
    went, and what else moved. A stopped run goes on with the same command.
    """
    from fasttrace.cli.evaluate import parse_attribute
    from fasttrace.cli.judging import Clock, captions, judge_edits, kinds_of, lines
    from fasttrace.cli.options import parse_components
    from fasttrace.cli.sweep import Request, quiet_libraries, run

    clock = Clock()
    asked = read_replacements(pair, pairs)
    kinds = dict(parse_attribute(text) for text in attribute or [])
    numbers = parse_seeds(seeds)
    components = parse_components(component or ["all"])
    quiet_libraries()
    from fasttrace import Editor, load, load_edit
    from fasttrace.adapters.pipeline import Model as Adapted
    from fasttrace.edit.export import MANIFEST
    from fasttrace.metrics.registry import DEFAULT, Metrics
    from fasttrace.report.edit_manifest import Origin
    from fasttrace.report.edits import write_edits_report
    from fasttrace.report.judged import judge
    from fasttrace.report.result import Result
    from fasttrace.report.retraced import compare
    from fasttrace.store import Shard

    pipe = load(check_text("MODEL", model), dtype=dtype, device=device)
    asking = captions(pipe, probes)
    classifier = Metrics(Adapted(pipe)).classifier()
    traced = probes_of([r.old for r in asked], asking, kinds_of(classifier, kinds))
    request = Request(
        model=model,
        probes=dict.fromkeys(traced, numbers),
        out=out / BEFORE,
        command=str(context.obj),
        components=components,
        corruption=Corruption(),
        sites=_sites(components),
        tokens=["last subject"] if "text_encoder" in components else [],
        windows=None,
        branch="cond",
        metrics=[metric or (DEFAULT if classifier is None else "attribute")],
        sampling={"steps": steps, "guidance": guidance},
        dtype=dtype,
        device=device,
        shard=Shard(),
        pictures=True,
        quiet=quiet,
    )
    run(request)
    before = Result.open(out / BEFORE)
    best = most_causal(before)
    if (out / EDIT / MANIFEST).is_file():
        edit = load_edit(out / EDIT)
        _check_same(edit.manifest, asked, out / EDIT)
        settings = given(lam=lam, tokens=tokens, templates=template, preserve=preserve)
        for name, value in settings.items():
            _check_setting(edit.manifest, name, value, out / EDIT)
    else:
        edit = Editor(pipe).edit(
            asked,
            site=best.site,
            lam=lam,
            tokens=tokens or "last",
            **given(templates=template, preserve=preserve),
        )
        edit.save(out / EDIT, pipe=pipe)
        edit = load_edit(out / EDIT)  # as a second call reads it: so both ask the same question
    if not quiet:
        print(f"Most causal of what can be edited: {best.site} ({_share(best)}). {edit}")
    run(replace(request, out=out / AFTER, edit=out / EDIT))
    after = Result.open(out / AFTER)
    judging = judge_edits(
        pipe,
        {EDIT: edit},
        out / EVALUATION,
        asking,
        numbers,
        attributes=kinds,
        metric=None if metric is None or metric.startswith("attribute") else metric,
        sampling={"steps": steps, "guidance": guidance},
        quiet=quiet,
    )
    used = judging.settings
    shown = {name: used[name] for name in ("seeds", "steps", "guidance")}
    origin = Origin(
        full_command(context, **shown),
        {"model": model, **used, "captions": str(probes or "those that come with fasttrace")},
        {EDIT: str(out / EDIT)},
    )
    page = write_edits_report(
        out / EVALUATION, {EDIT: edit.manifest}, before=before, after=after, origin=origin
    )
    judged = judge(judging.rows)
    sites = compare(before, after, [best.site]).sites
    changes = [change for change in sites if change.before.selector == best.selector]
    if as_json:
        about: dict[str, Any] = {"out": str(out), "report": str(page), "seconds": clock.seconds}
        about |= {"site": best.site, "selector": best.selector}
        about["effects"] = [
            {"group": c.group, "before": c.before.effect, "after": c.after.effect} for c in changes
        ]
        print(json.dumps({**about, "edits": [asdict(one) for one in judged]}))
        return
    for line in lines(judged):
        print(line)
    for c in changes:
        print(f"Effect of the site, {c.group}: {c.before.effect:.2f}, after {c.after.effect:.2f}")
    if not quiet:
        print(f"{clock.seconds:.0f} s. The report: {page}")


def _check_same(manifest: Mapping[str, Any], asked: Sequence[Replacement], folder: Path) -> None:
    said = [(p["old"], tuple(p["new"]), p["strength"]) for p in manifest["pairs"]]
    if said != [(r.old, r.news, r.strength) for r in asked]:
        raise StoreError(f"{folder} holds an edit of other phrases; choose another --out.")


def _check_setting(manifest: Mapping[str, Any], name: str, value: Any, folder: Path) -> None:
    """Where something was asked for, the edit that is there has to have been made with it."""
    if manifest[name] != value:
        raise StoreError(
            f"{folder} holds an edit made with {name} {manifest[name]!r}, not {value!r}; choose "
            "another --out."
        )


def probes_of(
    phrases: Sequence[str], captions: Sequence[Probe], kinds: dict[str, str]
) -> list[Probe]:
    """Captions to trace, each with a phrase as its subject. Raises `UsageError` without any."""
    from fasttrace.edit.questions import Most, build_questions

    most = Most(edited=MOST, paraphrases=0, misspellings=0, neighbours=0, others=0)
    asked = build_questions([(phrase, "") for phrase in phrases], captions, (), kinds, most)
    found = [Probe(q.prompt, q.phrase, q.attribute) for q in asked]
    if not found:
        raise UsageError("No caption takes these phrases; give --probes of their attribute.")
    return found


def most_causal(result: Any) -> SiteEffect:
    """Of the sites that can be edited, that with the largest effect. Raises `UsageError`."""
    from fasttrace.edit.matrices import PARTS

    found = [e for e in result.aie(by="all") if e.kind in PARTS and e.status == "run"]
    above = [e for e in found if e.effect > result.noise_floor]  # also leaves out NaN
    if not above:
        raise UsageError(
            "No site that can be edited brings the phrase back in these captions, so there is "
            "nothing to aim at; give other --probes, or choose a site with `fasttrace edit`."
        )
    return max(above, key=lambda e: e.effect)


def _share(effect: SiteEffect) -> str:
    from fasttrace.report.text import percent

    return f"{percent(effect.normalised)} of the total effect"


def _sites(components: Sequence[str]) -> list[str]:
    text = ["attn", "mlp"] if "text_encoder" in components else []
    return [*text, *(["attn2"] if "unet" in components else [])]
