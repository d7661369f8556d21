"""`fasttrace find`: which places matter, without patching all of them."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from fasttrace.cli.options import (
    CorruptionKind,
    Device,
    Dtype,
    Guidance,
    Json,
    Model,
    NoiseScale,
    NoiseSeed,
    Quiet,
    Replacement,
    Sigma,
    Sites,
    Steps,
    Variant,
    check_text,
    parse_components,
    parse_corruption,
    parse_windows,
    parse_words,
)
from fasttrace.cli.profile import DTYPES, UNFINISHED, new_folder
from fasttrace.cli.progress import note, progress
from fasttrace.errors import UsageError
from fasttrace.report.names import WHOLE_STREAM

NAME = "find"
STAGES = {"pairs": ("screening", "pairs"), "rows": ("patching", "rows")}


def command(
    model: Model,
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
    estimator: Annotated[
        str, typer.Option(help="Of the screen: plain, averaged:3, ...")
    ] = "averaged:3",
    metric: Annotated[str, typer.Option(help="The score; it has to be differentiable.")] = (
        "latent_recovery"
    ),
    top: Annotated[
        int | None, typer.Option(help="So many of the highest are checked; a fifth.")
    ] = None,
    audit: Annotated[int, typer.Option(help="So many of the rest, drawn at random.")] = 10,
    threshold: Annotated[
        float | None, typer.Option(help="Effects above it count; the last of the best tenth.")
    ] = None,
    groups: Annotated[int, typer.Option(help="So many winners are patched together.")] = 4,
    always: Annotated[
        list[str] | None,
        typer.Option(
            help="Kinds that are checked whatever their score, or none; resnet and others that "
            "replace the whole stream.",
            metavar="KIND",
        ),
    ] = None,
    inside: Annotated[int, typer.Option(help="So many heads and channels of each winner.")] = 2,
    draw: Annotated[int, typer.Option(help="The seed of the audit's draw.")] = 0,
    window: Annotated[
        list[str] | None,
        typer.Option(help="Denoiser calls 0:5 or shares 0.0:0.25.", metavar="A:B"),
    ] = None,
    component: Annotated[str, typer.Option(help="unet or text_encoder.")] = "unet",
    sites: Sites = None,
    branch: Annotated[str, typer.Option(help="cond, uncond or both.")] = "cond",
    steps: Steps = None,
    guidance: Guidance = None,
    negative_prompt: Annotated[str, typer.Option(help="Used where a probe has none.")] = "",
    corruption: CorruptionKind = "embedding_noise",
    sigma: Sigma = None,
    noise_scale: NoiseScale = 3.0,
    replacement: Replacement = None,
    noise_seed: NoiseSeed = 0,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    variant: Variant = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="A new folder for it all, or an unfinished one.", metavar="DIR"
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Rank every place by a screen, check the best exactly, and bound how many were missed.

    With --out, the same command goes on where it was stopped. docs/attribution.md says how to read
    it. `fasttrace trace` patches every place.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} is unknown: expected {', '.join(DTYPES)}.")
    components = parse_components([component])
    if len(components) != 1:
        raise UsageError("find takes one component at a time: unet or text_encoder.")
    of_text = components[0] == "text_encoder"
    windows = parse_windows(window or [])
    if of_text and windows is not None:
        raise UsageError("--window goes with the UNet: a text-encoder site acts in every call.")
    if windows is not None and len(windows) != 1:
        raise UsageError("find takes one window: give one --window.")
    if len(parse_words([metric], "--metric")) != 1:
        raise UsageError("Places are found by one metric: give one --metric.")
    from fasttrace.attribution.estimators import parse_estimator
    from fasttrace.attribution.find import Asked
    from fasttrace.attribution.kept import clear
    from fasttrace.cli.screen import load_tracer
    from fasttrace.cli.trace import read

    # Refused before a model is loaded.
    parse_estimator(estimator)
    kinds = parse_words(always or list(WHOLE_STREAM), "--always")
    kinds = [] if kinds == ["none"] else kinds
    Asked(top, audit, threshold, tuple(kinds), groups, inside, draw)
    wanted = read(prompt, subject, occurrence, attribute, negative_prompt, probes, seeds)
    damage = parse_corruption(corruption, noise_scale, sigma, replacement, noise_seed)
    options: dict[str, Any] = {"steps": steps, "guidance": guidance, "window": windows}
    if not of_text:
        options["branch"] = branch
    page = None
    keep = None if out is None else out / UNFINISHED
    with new_folder(out, "what is found ", UNFINISHED), ExitStack() as stack:
        if keep is not None and keep.is_dir() and not quiet:
            note(f"Going on with what is in {keep}: what it holds is not made again.")
        tracer = load_tracer(check_text("MODEL", model), dtype, device, variant)
        found = tracer.find(
            list(wanted),
            seeds=wanted,
            estimator=estimator,
            top=top,
            audit=audit,
            threshold=threshold,
            always=kinds,
            groups=groups,
            inside=inside,
            draw=draw,
            component=components[0],
            sites=parse_words(sites or ["paper"], "--sites"),
            metric=metric.strip(),
            corruption=damage,
            keep=keep,
            on_progress=_Stages(stack, quiet),
            **{name: value for name, value in options.items() if value is not None},
        )
        if out is not None and keep is not None:
            page = found.save(out)
            clear(keep)
    if as_json:
        print(json.dumps({"model": tracer.name, **found.record(), "page": page and str(page)}))
        return
    print(found)
    if not quiet:
        print(f"Page: {page}" if page else "A page, and every number for other tools: --out DIR")


class _Stages:
    """A bar for the screen's pairs, then one for each request of exact rows."""

    def __init__(self, stack: ExitStack, quiet: bool) -> None:
        self.stack, self.quiet = stack, quiet
        self.of: tuple[str, int] | None = None
        self.done = 0
        self.advance: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self.of != (stage, total) or done <= self.done:
            self.stack.close()
            self.of = stage, total
            bar = progress(total, self.quiet, words=STAGES[stage])
            self.advance, self.done = self.stack.enter_context(bar), 0
        for _ in range(done - self.done):
            self.advance()
        self.done = done
