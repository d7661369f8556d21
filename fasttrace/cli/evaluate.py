"""`fasttrace evaluate`: did an edit work, and what else moved."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fasttrace.cli.options import (
    Attribute,
    Device,
    Dtype,
    Guidance,
    Json,
    MetricName,
    Quiet,
    Seeds,
    Steps,
    check_text,
    full_command,
    parse_seeds,
)
from fasttrace.errors import ModelError, StoreError, UsageError

NAME = "evaluate"
FOLDER = "evaluation"
LAMS = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)


def command(
    context: typer.Context,
    directory: Annotated[
        Path, typer.Argument(help="A saved edit, or a folder of several.", metavar="DIR")
    ],
    model: Annotated[
        str | None, typer.Option(help="What it was made on, where the edit's name doesn't load.")
    ] = None,
    probes: Annotated[
        Path | None, typer.Option(help="Captions to ask with.", metavar="FILE")
    ] = None,
    attribute: Attribute = None,
    seeds: Seeds = "0:2",
    metric: MetricName = None,
    steps: Steps = None,
    guidance: Guidance = None,
    path: Annotated[
        bool, typer.Option("--path", help="Also the same edit at other lambdas, as a chart.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="DIR/evaluation.", metavar="DIR")
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make pictures with and without the edit, score both, write a table and a page.

    Asked are captions with the edited phrase (also misspelt and in other words), its neighbours and
    other attributes. The bundled model's pictures are also judged by its classifiers. Stop it at
    any time: the same command goes on where it stopped.
    """
    from fasttrace.cli.judging import Clock, captions, folders_of, judge_edits, lines, read_edits
    from fasttrace.cli.sweep import quiet_libraries

    clock = Clock()
    if (directory / "before").is_dir() and (directory / "edit").is_dir():
        directory = directory / "edit"  # of locate-and-edit, whose own page is to stay
    edits = read_edits(directory)
    names = {edit.manifest["model"] for edit in edits.values()}
    if model is None and len(names) > 1:
        raise UsageError(f"The edits in {directory} are of several models; name one with --model.")
    base = check_text("--model", model or names.pop())
    kinds = dict(parse_attribute(text) for text in attribute or [])
    numbers = parse_seeds(seeds)
    if path and len(edits) > 1:
        raise UsageError(f"--path is of one edit; {directory} holds {len(edits)}.")
    quiet_libraries()
    from fasttrace import load
    from fasttrace.edit.editor import again
    from fasttrace.report.edit_manifest import Origin
    from fasttrace.report.edits import PathPoint, write_edits_report
    from fasttrace.report.judged import judge

    target = out or directory / FOLDER
    if target.exists() and not target.is_dir():
        raise StoreError(f"{target} is a file; choose another --out.")
    try:
        pipe = load(base, dtype=dtype, device=device)
    except ModelError as error:
        hint = "" if model else " It is what the edit names; say where it lies with --model."
        raise ModelError(f"{error}{hint}") from error
    asked = captions(pipe, probes)
    judging = judge_edits(
        pipe,
        edits,
        target,
        asked,
        numbers,
        attributes=kinds,
        metric=metric,
        sampling={"steps": steps, "guidance": guidance},
        quiet=quiet,
    )
    points = []
    if path:
        [edit] = edits.values()
        along = {
            f"lam {lam:g}": other for lam, other in zip(LAMS, again(pipe, edit, LAMS), strict=True)
        }
        chart = judge_edits(
            pipe,
            along,
            target / "path",
            asked,
            numbers,
            attributes=kinds,
            metric=metric,
            sampling={"steps": steps, "guidance": guidance},
            quiet=quiet,
        )
        points = [PathPoint(lam, found) for lam, found in zip(LAMS, judge(chart.rows), strict=True)]
    manifests = {name: edit.manifest for name, edit in edits.items()}
    used = judging.settings
    shown = {name: used[name] for name in ("seeds", "steps", "guidance", "metric")}
    origin = Origin(
        full_command(context, model=base, **shown),
        {"model": base, **used, "captions": str(probes or "those that come with fasttrace")},
        {name: str(folder) for name, folder in folders_of(directory, edits).items()},
    )
    page = write_edits_report(target, manifests, path=points, origin=origin)
    judged = judge(judging.rows)
    if as_json:
        print(
            json.dumps(
                {
                    "out": str(target),
                    "report": str(page),
                    "pictures": 2 * len(judging.rows),
                    "seconds": clock.seconds,
                    "edits": [asdict(one) for one in judged],
                }
            )
        )
        return
    for line in lines(judged):
        print(line)
    if not quiet:
        print(f"{clock.seconds:.0f} s. The report: {page}")


def parse_attribute(text: str) -> tuple[str, str]:
    """ "van gogh=style". Raises `UsageError`."""
    phrase, equals, name = check_text("--attribute", text).rpartition("=")
    if not equals or not phrase.strip() or not name.strip():
        raise UsageError(
            f"--attribute {text!r} can't be read: expected a phrase and what it is, such as "
            '"van gogh=style".'
        )
    return phrase.strip(), name.strip()
