"""`fasttrace demo`: the bundled model, four attributes, UNet and text encoder, one page."""

from __future__ import annotations

import json
import time
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fasttrace.cli.options import COMPONENTS, Json, Out, Quiet
from fasttrace.types import Corruption, Probe

if TYPE_CHECKING:
    from fasttrace.report.result import Result
    from fasttrace.report.statistics import SiteEffect
    from fasttrace.store.probes import ProbeEntry

NAME = "demo"
PROMPTS = 5  # of each attribute, one seed: enough for intervals, minutes on two cores
TOKENS: list[str | int] = ["last subject", "EOS", "padding"]
TOP = 5


def command(
    context: typer.Context,
    out: Out = Path("demo-out"),
    full: Annotated[bool, typer.Option("--full", help="Every prompt, seed and token.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Trace the bundled model and print the most causal sites of each attribute.

    Without --full it takes a few prompts, one seed and three text tokens, so that it ends within
    minutes on two cores; n is printed.
    """
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
    page = write_report(out)
    result = Result.open(out)
    causal = result.causal(top=TOP)
    seconds = round(time.monotonic() - start, 1)
    if as_json:
        from fasttrace.cli.report import as_dict

        about = {**vars(outcome), "report": str(page), "seconds": seconds}
        print(json.dumps({**about, "causal": [as_dict(effect) for effect in causal]}))
        return
    _print(result, causal)
    print(f"\n{seconds:.0f} s. The report: {page}")


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
