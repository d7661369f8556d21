"""`fasttrace sites`: what of a model can be traced."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from typing import Annotated

import typer

from fasttrace.cli.options import Json, Quiet, Sites, parse_components, parse_words

NAME = "sites"


def command(
    model: Annotated[
        str,
        typer.Argument(
            help="sd14, sd15, openjourney, sd21, sdxl, sdxl-turbo, kandinsky21, kandinsky22, if; "
            "'embedded', a folder, or a hub id."
        ),
    ],
    component: Annotated[
        list[str] | None,
        typer.Option(help="unet, text_encoder, prior or all; repeatable.", metavar="NAME"),
    ] = None,
    sites: Sites = None,
    count: Annotated[bool, typer.Option("--count", help="Print their number alone.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """List a model's sites in execution order; reads configurations, no weights."""
    components = parse_components(component or ["unet"], ("prior",))
    from fasttrace.adapters.catalogue import list_sites, notes

    wanted = parse_words(sites or ["paper"], "--sites")
    found = [site for part in components for site in list_sites(model, part, wanted)]
    if count:
        print(json.dumps({"sites": len(found)}) if as_json else len(found))
        return
    if as_json:
        print(json.dumps([asdict(site) for site in found]))
        return
    width = max((len(site.name) for site in found), default=0)
    for site in found:
        shape = "x".join(str(n) for n in site.shape)
        about = [
            *site.aliases,
            *(() if site.reaches == "denoiser" else (f"reaches {site.reaches}",)),
        ]
        line = f"{site.index:>4}  {site.name:<{width}}  {site.kind:<6}  {shape:<12}"
        print(f"{line}  {', '.join(about)}".rstrip())
    if not quiet:
        print(f"{len(found)} sites")
        for sentence in notes(model):
            print(textwrap.fill(sentence, 96, break_on_hyphens=False))
