"""`fasttrace info`: what this machine offers, and which kernels a model's sites would run here."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from fasttrace import __version__
from fasttrace.cli.options import Json, Quiet

NAME = "info"


def command(
    model: Annotated[
        str | None,
        typer.Argument(help="Also say which kernel each of its sites runs; as for `sites`."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; what is here by default.", metavar="NAME")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="fp16, bf16 or fp32; fp32 on cpu, else fp16, by default."),
    ] = None,
    attention: Annotated[str, typer.Option(help="auto, torch or fused.")] = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Say what of this machine and its libraries can be used, and by which of a model's sites."""
    from fasttrace.info import environment

    if model is not None:
        _kernels(model, device, dtype, attention, quiet, as_json)
        return
    facts = environment()
    if as_json:
        about = {"fasttrace": __version__, "facts": [asdict(fact) for fact in facts]}
        print(json.dumps(about))
        return
    print(f"fasttrace {__version__}")
    width = max(len(fact.name) for fact in facts)
    for fact in facts:
        if fact.present or not quiet:
            print(f"{'yes' if fact.present else 'no ':<3}  {fact.name:<{width}}  {fact.sentence}")


def _kernels(
    model: str, device: str | None, dtype: str | None, attention: str, quiet: bool, as_json: bool
) -> None:
    from fasttrace.kernels_used import kernels_of_model

    used = kernels_of_model(model, device, dtype, attention)
    if as_json:
        print(json.dumps(asdict(used)))
        return
    width = max(len(site.site) for site in used.sites)
    for site in used.sites:
        line = f"{site.site:<{width}}  {site.patch}"
        print(f"{line}; {site.attention}" if site.attention else line)
    if not quiet:
        print(f"{len(used.sites)} sites on {used.device} in {used.dtype}; {used.step}")
