"""`fasttrace trace`: make the rows of a sweep, or go on making them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fasttrace.cli.options import (
    CacheSize,
    Clean,
    Components,
    CorruptionKind,
    Json,
    Lanes,
    NoiseScale,
    NoiseSeed,
    Out,
    Quiet,
    Replacement,
    Sigma,
    Sites,
    Variant,
    check_text,
    parse_components,
    parse_corruption,
    parse_engine,
    parse_seeds,
    parse_shard,
    parse_tokens,
    parse_windows,
    parse_words,
)
from fasttrace.errors import UsageError
from fasttrace.types import Probe

NAME = "trace"
DTYPES = ("float32", "float16", "bfloat16")


def command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="'embedded', a pipeline's folder, or a hub id.")],
    out: Out,
    prompt: Annotated[str | None, typer.Option(help="A caption, with --subject.")] = None,
    subject: Annotated[str | None, typer.Option(help="The words of it to destroy.")] = None,
    occurrence: Annotated[int, typer.Option(help="Which appearance of them, from 0.")] = 0,
    attribute: Annotated[str, typer.Option(help="What they are: object, style, ...")] = "",
    probes: Annotated[
        Path | None, typer.Option(help="A file of captions instead.", metavar="FILE")
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="0:4 is 0, 1, 2, 3; also 7 or 0,3,9.", metavar="SEEDS"),
    ] = None,
    component: Components = None,
    sites: Sites = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(help="Text encoder: token groups; repeatable.", metavar="NAME"),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Inference steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    negative_prompt: Annotated[str, typer.Option(help="Used where a probe has none.")] = "",
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    corruption: CorruptionKind = "embedding_noise",
    sigma: Sigma = None,
    noise_scale: NoiseScale = 3.0,
    replacement: Replacement = None,
    noise_seed: NoiseSeed = 0,
    branch: Annotated[str, typer.Option(help="cond, uncond or both.")] = "cond",
    window: Annotated[
        list[str] | None,
        typer.Option(help="Denoiser calls 0:5 or shares 0.0:0.25; repeatable.", metavar="A:B"),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="The score; repeatable.", metavar="NAME"),
    ] = None,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    variant: Variant = None,
    engine: Annotated[
        str, typer.Option(help="fast, or reference: the definition, one run after another.")
    ] = "fast",
    clean: Clean = None,
    lanes: Lanes = None,
    cache: CacheSize = None,
    until: Annotated[
        str | None,
        typer.Option(help="Stop when so many top sites are known: top10%@95.", metavar="GOAL"),
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="With --until: the most runs, clean and corrupt included.")
    ] = None,
    shard: Annotated[str | None, typer.Option(help="The i-th of n processes, i/n.")] = None,
    pictures: Annotated[bool, typer.Option(help="Keep pictures beside the rows.")] = True,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Restore each site's clean activation in a corrupt run and score the picture.

    Stop it at any time: the same command goes on where it stopped. With more prompts, seeds or
    sites it extends the directory. With --until it stops by itself once the top sites are known.
    """
    from fasttrace.cli.sweep import Request, run

    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} is unknown: expected {', '.join(DTYPES)}.")
    request = Request(
        model=check_text("MODEL", model),
        probes=read(prompt, subject, occurrence, attribute, negative_prompt, probes, seeds),
        out=out,
        command=str(context.obj),
        components=parse_components(component or ["unet"]),
        corruption=parse_corruption(corruption, noise_scale, sigma, replacement, noise_seed),
        sites=parse_words(sites or ["paper"], "--sites"),
        tokens=parse_tokens(tokens or []),
        windows=parse_windows(window or []),
        branch=branch,
        metrics=parse_words(metric or [], "--metric"),
        sampling={"steps": steps, "guidance": guidance, "height": height, "width": width},
        dtype=dtype,
        device=device,
        variant=variant,
        shard=parse_shard(shard),
        pictures=pictures,
        quiet=quiet,
        engine=engine,
        options=parse_engine(clean, lanes, cache),
        until=until,
        budget=budget,
    )
    outcome = run(request)
    if as_json:
        print(json.dumps(vars(outcome)))
    elif not quiet:
        print(f"Look at it: fasttrace report {out}")


def read(
    prompt: str | None,
    subject: str | None,
    occurrence: int,
    attribute: str,
    negative_prompt: str,
    probes: Path | None,
    seeds: str | None,
) -> dict[Probe, list[int]]:
    """The probes and the seeds of each, from a file or from one prompt. Raises `UsageError`."""
    numbers = None if seeds is None else parse_seeds(seeds)
    if (prompt is None) == (probes is None):
        raise UsageError("give either --prompt with --subject, or --probes FILE.")
    if probes is not None:
        for name, given in (
            ("--subject", subject is not None),
            ("--attribute", attribute != ""),
            ("--occurrence", occurrence != 0),
        ):
            if given:
                raise UsageError(f"{name} belongs to --prompt; a probes file has its own.")
        from fasttrace.store.probes import read_probes

        entries = read_probes(probes)
        found: dict[Probe, list[int]] = {}
        for entry in entries:
            extra: dict[str, Any] = {"negative_prompt": entry.negative_prompt or negative_prompt}
            probe = Probe(**{**vars(entry.probe()), **extra})
            found[probe] = numbers or entry.seeds or [0]
        return found
    if subject is None:
        raise UsageError("--prompt needs --subject: the words of it to destroy.")
    probe = Probe(
        check_text("--prompt", prompt or ""),
        check_text("--subject", subject),
        check_text("--attribute", attribute),
        occurrence,
        check_text("--negative-prompt", negative_prompt),
    )
    return {probe: numbers or [0]}
