"""`fasttrace run`: a plan from a file, driven as `trace` drives its options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fasttrace.cli.options import Json, Quiet, check_text, parse_shard

NAME = "run"


def command(
    context: typer.Context,
    plan: Annotated[Path, typer.Argument(help="A plan: a JSON file.", metavar="PLAN")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The results directory.", metavar="DIR")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Instead of the plan's: a folder, a hub id, 'embedded'.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    shard: Annotated[str | None, typer.Option(help="The i-th of n processes, i/n.")] = None,
    pictures: Annotated[bool, typer.Option(help="Keep pictures beside the rows.")] = True,
    check: Annotated[bool, typer.Option("--check", help="Read the plan, run nothing.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run a plan that any program can write, and leave its rows as Parquet.

    Stop it at any time: the same command goes on where it stopped. The plan's text is data: it
    names no folders, and is refused in a sentence where something is wrong with it.
    """
    from fasttrace.cli.sweep import Request, run
    from fasttrace.errors import UsageError
    from fasttrace.plan.request import read_plan

    asked = read_plan(plan)
    if check:
        print(json.dumps({"plan": asked.digest()}) if as_json else f"{asked.digest()}  {plan}")
        return
    if out is None:
        raise UsageError("Where do the rows go? Give --out DIR.")
    chosen = check_text("--model", model) if model is not None else asked.model
    if chosen is None:
        raise UsageError("The plan names no model; give one with --model.")
    outcome = run(
        Request(
            model=chosen,
            probes=asked.probes_and_seeds(),
            out=out,
            command=str(context.obj),
            components=[c for c in ("unet", "text_encoder") if c in asked.components],
            corruption=asked.corruption.corruption(),
            sites=list(asked.sites),
            tokens=list(asked.tokens),
            windows=asked.asked_windows(),
            branch=asked.branch,
            metrics=list(asked.metrics),
            sampling=asked.sampling(),
            dtype=asked.dtype,
            device=device,
            shard=parse_shard(shard),
            pictures=pictures,
            quiet=quiet,
            sources=asked.asked_sources(plan.parent),
            base=asked.base,
            engine=asked.engine.name,
            options=asked.engine.options(),
        )
    )
    if as_json:
        print(json.dumps(vars(outcome) | {"plan": asked.digest()}))
    elif not quiet:
        print(f"Look at it: fasttrace report {out}")
