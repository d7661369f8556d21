"""`fasttrace screen`: every site ranked by one way back through the sampler."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    check_text,
    parse_components,
    parse_corruption,
    parse_windows,
    parse_words,
)
from fasttrace.cli.profile import DTYPES, UNFINISHED, new_folder
from fasttrace.cli.progress import note, progress
from fasttrace.errors import UsageError

if TYPE_CHECKING:
    from fasttrace.attribution.result import Ranked, Screen
    from fasttrace.tracer import Tracer

NAME = "screen"
MOST_PLACES = 100_000


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
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="site, head, token, channel, neuron, place, text; repeatable.", metavar="LEVEL"
        ),
    ] = None,
    estimator: Annotated[
        str, typer.Option(help="plain, nudged, averaged:3, integrated:4, joint:8; +keys.")
    ] = "plain",
    metric: Annotated[str, typer.Option(help="The score; it has to be differentiable.")] = (
        "latent_recovery"
    ),
    horizon: Annotated[
        int | None, typer.Option(help="So many calls answer to a patch; 1 is its own alone.")
    ] = None,
    window: Annotated[
        list[str] | None,
        typer.Option(help="Denoiser calls 0:5 or shares 0.0:0.25; repeatable.", metavar="A:B"),
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
    lanes: Annotated[
        int | None, typer.Option(help="Runs that gradients are taken of at a time.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="A new folder for it all, or an unfinished one.", metavar="DIR"
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="How many places of each level to list.")] = 20,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Rank every site, head, token or channel by what patching it would do, to first order.

    One backward sweep a prompt and seed instead of a run a site. docs/attribution.md says when to
    trust it; `fasttrace trace` gives exact effects.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} is unknown: expected {', '.join(DTYPES)}.")
    if not 1 <= top <= MOST_PLACES:
        raise UsageError(f"--top {top}: expected 1 to {MOST_PLACES:,} places to list.")
    components = parse_components([component])
    if len(components) != 1:
        raise UsageError("screen takes one component at a time: unet or text_encoder.")
    of_text = components[0] == "text_encoder"
    levels = parse_words(by or ["site"], "--by")
    windows = parse_windows(window or [])
    if of_text and windows is not None:
        raise UsageError("--window goes with the UNet: a text-encoder site acts in every call.")
    if len(parse_words([metric], "--metric")) != 1:
        raise UsageError("A screen has one metric: give one --metric.")
    from fasttrace.attribution.estimators import parse_estimator
    from fasttrace.attribution.kept import clear
    from fasttrace.cli.trace import read

    parse_estimator(estimator)  # refused before a model is loaded
    wanted = read(prompt, subject, occurrence, attribute, negative_prompt, probes, seeds)
    damage = parse_corruption(corruption, noise_scale, sigma, replacement, noise_seed)
    options: dict[str, Any] = {"steps": steps, "guidance": guidance, "window": windows}
    if not of_text:
        options["branch"] = branch
    keep = None if out is None else out / UNFINISHED
    with new_folder(out, "the screen ", UNFINISHED):
        if keep is not None and keep.is_dir() and not quiet:
            note(f"Going on with what is in {keep}: what it holds is not made again.")
        tracer = load_tracer(check_text("MODEL", model), dtype, device)
        pairs = sum(len(own) for own in wanted.values())
        with progress(pairs, quiet, words=("screening", "pairs")) as advance:
            found = tracer.screen(
                list(wanted),
                seeds=wanted,
                by=levels,
                estimator=estimator,
                horizon=horizon,
                lanes=lanes,
                component=components[0],
                sites=parse_words(sites or ["paper"], "--sites"),
                metric=metric.strip(),
                corruption=damage,
                keep=keep,
                on_progress=_advances(advance),
                **{name: value for name, value in options.items() if value is not None},
            )
        if out is not None and keep is not None:
            found.save(out)
            clear(keep)
    if as_json:
        print(json.dumps(_as_data(found, tracer.name, top, out)))
        return
    if found.nothing:
        raise UsageError(found.nothing)
    _print(found, tracer, top)
    if not quiet and out is None:
        print("Every number, for other tools: --out DIR")


def _advances(advance: Any) -> Any:
    """From "so many done" to one step a pair."""
    before = 0

    def told(done: int, _total: int) -> None:
        nonlocal before
        for _ in range(done - before):
            advance()
        before = done

    return told


def _rankings(found: Screen) -> list[tuple[str, str, tuple[int, int], list[Ranked]]]:
    """(axis, part, window, places), largest first. Tokens of keys and of values are apart."""
    levels = list(dict.fromkeys((r.axis, r.part) for r in found.readings))
    per_call = any(value.shape[2] == found.calls for value in found.scores.values())
    windows = list(found.windows) if per_call else [(0, found.calls)]
    return [
        (axis, part, window, found.ranking(axis, window if per_call else None, part))
        for axis, part in levels
        for window in windows
    ]


def _as_data(found: Screen, model: str, top: int, out: Path | None) -> dict[str, Any]:
    return {
        "model": model,
        "metric": found.metric,
        "estimator": found.estimator,
        "horizon": found.horizon,
        "branches": found.branches,
        "calls": found.calls,
        "generations": found.generations,
        "flops": found.flops,
        "pairs": [asdict(pair) for pair in found.pairs],
        "rankings": [
            {
                "axis": axis,
                "part": part,
                "window": window,
                "places": len(places),
                "top": [asdict(ranked) for ranked in places[:top]],
            }
            for axis, part, window, places in ([] if found.nothing else _rankings(found))
        ],
        "nothing": found.nothing,
        "out": None if out is None else str(out),
    }


def _print(found: Screen, tracer: Tracer, top: int) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from fasttrace.profile.table import console_for

    console = console_for()
    used = [pair for pair in found.pairs if not pair.note]
    horizon = "" if found.horizon is None else f", horizon {found.horizon}"
    console.print(
        Text(
            f"{tracer.name}: {len(found.pairs)} (prompt, seed), {found.calls} calls, "
            f"{found.metric}, {found.estimator}{horizon}; {found.generations:.1f} generations each"
        ),
        soft_wrap=True,
    )
    for pair in found.pairs:
        if pair.note:
            console.print(Text(f"left out: '{pair.probe.prompt}', seed {pair.seed}: {pair.note}"))
    prompts = {pair.probe.prompt for pair in found.pairs}
    prompt = next(iter(prompts)) if len(prompts) == 1 else None
    for axis, part, window, places in _rankings(found):
        title = "site" if axis == "all" else f"{part} by {axis}"
        if window != (0, found.calls):
            title += f", calls {window[0]} to {window[1] - 1}"
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
        table.add_column(f"{title} ({min(top, len(places))} of {len(places)})", overflow="fold")
        if axis != "all":
            table.add_column(axis, justify="right")
        for name in ("kind", "effect", "of total"):
            table.add_column(name, justify="left" if name == "kind" else "right", no_wrap=True)
        for ranked in places[:top]:
            share = f"{100 * ranked.share:.1f} %"
            where = [] if axis == "all" else [_coordinate(tracer, ranked, prompt)]
            table.add_row(Text(ranked.site), *where, ranked.kind, f"{ranked.effect:+.4g}", share)
        console.print(table)
    console.print(
        Text(
            f"First-order effects, the mean of {len(used)}: a ranking to verify, no measurement. "
            "Exact ones: fasttrace trace"
        ),
        soft_wrap=True,
    )


def _coordinate(tracer: Tracer, ranked: Ranked, prompt: str | None) -> str:
    """A token with its word, where all pairs have one prompt."""
    if prompt is None or ranked.axis not in ("token", "text"):
        return str(ranked.coordinate)
    from fasttrace.adapters.spans import token_text

    encoders = {encoder.name: encoder for encoder in tracer.model.encoders}
    encoder = encoders.get(ranked.site.partition(".")[0], next(iter(encoders.values())))
    ids = encoder.tokens(prompt).ids
    known = ranked.coordinate < len(ids)
    word = token_text(encoder.tokenizer, ids[ranked.coordinate]) if known else "padding"
    return f"{ranked.coordinate} {word}"


def load_tracer(model: str, dtype: str, device: str, variant: str | None = None) -> Tracer:
    from fasttrace.cli.sweep import quiet_libraries

    quiet_libraries()
    from fasttrace import Tracer, load

    return Tracer(load(model, dtype=dtype, device=device, variant=variant))
