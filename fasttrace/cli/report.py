"""`fasttrace report`: merge the shards, print the causal sites, write the page."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasttrace.cli.options import Json, Quiet
from fasttrace.errors import UsageError

if TYPE_CHECKING:
    from fasttrace.report.statistics import SiteEffect

NAME = "report"


def command(
    directory: Annotated[Path, typer.Argument(help="A results directory.", metavar="DIR")],
    by: Annotated[str, typer.Option(help="attribute, prompt, subject or all.")] = "attribute",
    metric: Annotated[
        str | None, typer.Option(help="Which score, where there are several.")
    ] = None,
    minimum: Annotated[
        float | None,
        typer.Option("--min-effect", help="Leave out pairs with a smaller total effect."),
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Causal from this effect on.")] = None,
    top: Annotated[int | None, typer.Option(help="At most so many causal sites (5).")] = None,
    validation: Annotated[
        Path | None,
        typer.Option(help="A labelled set to fit the threshold on.", metavar="FILE"),
    ] = None,
    examples: Annotated[int, typer.Option(help="Pairs shown with pictures, a group.")] = 4,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write DIR/results.parquet and DIR/report.html, and say which sites are causal."""
    from fasttrace.report.html import write_report
    from fasttrace.report.result import Result
    from fasttrace.report.text import summary, top_table

    if top is not None and top < 1:
        raise UsageError(f"--top {top} leaves nothing: give 1 or more.")
    if examples < 0:
        raise UsageError(f"--examples {examples} is below 0.")
    for name, value in (("--min-effect", minimum), ("--threshold", threshold)):
        if value is not None and isnan(value):
            raise UsageError(f"{name} is not a number: give one in the metric's unit.")
    labels = None
    if validation is not None:
        from fasttrace.report.labels import read_labels

        labels = read_labels(validation)
    chosen: dict[str, Any] = {"threshold": threshold, "top": top, "validation": labels}
    chosen |= {"by": by, "minimum": minimum}
    page = write_report(directory, metric=metric, examples=examples, **chosen)
    result = Result.open(directory)
    kept = result.where(metric=metric or result.metrics[0])
    causal = kept.causal(**chosen)
    if as_json:
        print(
            json.dumps(
                {
                    "report": str(page),
                    "results": str(directory / "results.parquet"),
                    "rows": len(result),
                    "metric": kept.metrics[0],
                    "noise_floor": kept.noise_floor,
                    "causal": [as_dict(effect) for effect in causal],
                    "until": None if kept.until is None else kept.until.model_dump(),
                }
            )
        )
        return
    if not quiet:
        print(summary(kept))
        print(top_table(kept, causal, minimum))
    print(page)


def as_dict(effect: SiteEffect) -> dict[str, Any]:
    """JSON of an effect; what is not a number becomes null."""
    return {
        name: None if isinstance(value, float) and isnan(value) else value
        for name, value in asdict(effect).items()
    }
