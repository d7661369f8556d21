"""`fasttrace sites`: what of a model can be traced."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from fasttrace.cli.options import Components, Json, Quiet, Sites, parse_components, parse_words

NAME = "sites"


def command(
    model: Annotated[
        str, typer.Argument(help="sd14, sd15, sd21, sdxl, 'embedded', a folder, or a hub id.")
    ],
    component: Components = None,
    sites: Sites = None,
    count: Annotated[bool, typer.Option("--count", help="Print their number alone.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """List a model's sites in execution order; reads configurations, no weights."""
    components = parse_components(component or ["unet"])
    from fasttrace.adapters.catalogue import list_sites

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
        notes = [
            *site.aliases,
            *(() if site.reaches == "denoiser" else (f"reaches {site.reaches}",)),
        ]
        line = f"{site.index:>4}  {site.name:<{width}}  {site.kind:<6}  {shape:<12}"
        print(f"{line}  {', '.join(notes)}".rstrip())
    if not quiet:
        print(f"{len(found)} sites")
