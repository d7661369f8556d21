"""`fasttrace plan`: what a trace would run and cost, before anything runs."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasttrace.cli.options import (
    CacheSize,
    Clean,
    Components,
    Json,
    Lanes,
    Sites,
    parse_components,
    parse_engine,
    parse_windows,
    parse_words,
)
from fasttrace.errors import UsageError

if TYPE_CHECKING:
    from fasttrace.engine.options import Options
    from fasttrace.engine.predict import Prediction

NAME = "plan"


def command(
    model: Annotated[
        str | None,
        typer.Argument(help="sd14, sd15, sd21, sdxl (no weights), 'embedded', a folder."),
    ] = None,
    named: Annotated[
        str | None, typer.Option("--model", help="The same as an option.", metavar="MODEL")
    ] = None,
    probes: Annotated[Path | None, typer.Option(help="A file of captions.", metavar="FILE")] = None,
    prompts: Annotated[int, typer.Option(help="Without a file: so many captions.")] = 24,
    seeds: Annotated[int, typer.Option(help="Seeds of each.")] = 1,
    component: Components = None,
    sites: Sites = None,
    steps: Annotated[int | None, typer.Option(help="Inference steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    branch: Annotated[str, typer.Option(help="cond, uncond or both.")] = "cond",
    window: Annotated[
        list[str] | None,
        typer.Option(help="Denoiser calls 0:5 or shares 0.0:0.25; repeatable.", metavar="A:B"),
    ] = None,
    clean: Clean = None,
    lanes: Lanes = None,
    cache: CacheSize = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--device", "--gpu", help="For an estimate on paper: A100, h100, rtx4090, ..."
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Of the card: 24GB, 16GiB. Batches are made to fit.", metavar="SIZE"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say how many runs a trace makes, in which batches, with how much work, memory and time."""
    from fasttrace.adapters.architectures import ARCHITECTURES
    from fasttrace.engine.options import Options
    from fasttrace.plan.request import Limits

    if (model is None) == (named is None):
        raise UsageError("plan needs one model: `fasttrace plan sdxl`, or --model sdxl.")
    model = model or named or ""
    options = Options(**parse_engine(clean, lanes, cache))
    for name, number in (("--prompts", prompts), ("--seeds", seeds)):
        if number < 1:
            raise UsageError(f"{name} {number} leaves nothing to plan: give 1 or more.")
    if prompts * seeds > Limits.PAIRS:
        raise UsageError(
            f"{prompts:,} prompts with {seeds:,} seeds are more than {Limits.PAIRS:,} pairs. Work "
            "and time grow evenly with them, so plan fewer."
        )
    components = parse_components(component or ["unet"])
    words = parse_words(sites or ["paper"], "--sites")
    windows = parse_windows(window or [])
    sampling = {"steps": steps, "guidance": guidance, "branch": branch}
    card = None if memory is None else parse_size("--memory", memory)
    if model in ARCHITECTURES:
        if components != ["unet"] or probes is not None:
            raise UsageError(
                f"'{model}' is a bare architecture: its UNet alone is planned, for a number of "
                "--prompts. Give a folder with weights for text encoders and probes."
            )
        chosen = {"prompts": prompts, "seeds": seeds, "sites": words, "window": windows}
        on_paper(model, gpu, card, {**chosen, **sampling, "options": options}, as_json)
        return
    if gpu is not None or card is not None:
        raise UsageError("--device and --memory go with a bare architecture (sd15, sdxl, ...).")
    found = _of_model(model, components, probes, prompts, seeds, words, windows, sampling, options)
    if as_json:
        total: dict[str, Any] = asdict(next(iter(found.values())))
        if len(found) > 1:
            total = {name: asdict(one) for name, one in found.items()}
        print(json.dumps({"model": model, **total}))
        return
    for name, one in found.items():
        print("\n".join(describe(f"{model}, {name}", one)))


def on_paper(
    model: str, device: str | None, card: int | None, asked: dict[str, Any], as_json: bool
) -> None:
    """Plan a bare architecture and print it. card: bytes of memory there."""
    from fasttrace.engine.predict import ASSUMED, DEVICES
    from fasttrace.forecast import (
        PUBLISHED,
        TAKEN,
        find_device,
        forecast_architecture,
        weight_bytes,
    )

    device = None if device is None else find_device(device)
    parts = weight_bytes(model)
    weights = sum(parts.values())
    room = None if card is None else int(TAKEN * (card - weights))
    if room is not None and room <= 0:
        raise UsageError(
            f"The weights of '{model}' take {_bytes(weights)} in 16 bits: more than --memory."
        )
    found = forecast_architecture(model, device=device, memory=room, **asked)
    if as_json:
        about: dict[str, Any] = {"weight_bytes": weights, "memory": card, "device": device}
        if device is not None:
            about["assumed"] = ASSUMED
        if room is not None:
            about["fits"] = found.peak_bytes <= room
        print(json.dumps({"model": model, **asdict(found), **about}))
        return
    print("\n".join(describe(f"{model}, unet", found, on_paper=device)))
    names = ", ".join(name.replace("_", " ") for name in parts)
    print(f"  weights  {_bytes(weights)} in 16 bits ({names})")
    if card is not None and room is not None:
        fits = "fits" if found.peak_bytes <= room else "does not fit"
        print(
            f"           {fits} in {_bytes(card)}: {_bytes(room)} of it, {100 * TAKEN:.0f} % of "
            "what the weights leave, are for the trace"
        )
    if device is not None:
        print(
            f"  assumed  {100 * ASSUMED:.0f} % of {DEVICES[device]} TFLOP/s, the data sheet's peak "
            "in 16 bits;"
        )
        said = ";\n           ".join(PUBLISHED)
        print(f"           published, of large transformers: {said}.")


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(gb|gib|)", re.IGNORECASE)


def parse_size(option: str, text: str) -> int:
    """Bytes of "24GB", "24" (the same) or "16GiB". Raises `UsageError`."""
    found = _SIZE.fullmatch(text.strip())
    number = 0.0 if found is None else float(found[1])
    if found is None or not 0 < number <= 100_000:
        raise UsageError(f"{option} {text!r} can't be read: expected a size such as 24GB or 16GiB.")
    return int(number * (2**30 if found[2].lower() == "gib" else 1e9))


def _of_model(
    model: str,
    components: list[str],
    probes: Path | None,
    prompts: int,
    seeds: int,
    sites: list[str],
    windows: Any,
    sampling: dict[str, Any],
    options: Options,
) -> dict[str, Prediction]:
    from importlib.resources import as_file, files

    from fasttrace import Tracer, load
    from fasttrace.cli.sweep import quiet_libraries, sites_for
    from fasttrace.store.probes import read_probes

    quiet_libraries()
    tracer = Tracer(load(model))
    if probes is not None:
        entries = read_probes(probes)
    else:
        name = "probes.json" if tracer.name == "embedded" else "probes-real-models.json"
        with as_file(files("fasttrace.embedded") / name) as path:
            entries = [e.model_copy(update={"seeds": None}) for e in read_probes(path)[:prompts]]
    chosen = {entry.probe(): entry.seeds or list(range(seeds)) for entry in entries}
    found = {}
    for component in components:
        extra = {} if component == "text_encoder" else {"window": windows}
        kept = {k: v for k, v in sampling.items() if component == "unet" or k != "branch"}
        words = sites_for(tracer, component, components, sites)
        plan = tracer.plan(
            list(chosen), component=component, sites=words, seeds=chosen, **kept, **extra
        )
        found[component] = tracer.forecast(plan, options)
    return found


def describe(name: str, found: Prediction, *, on_paper: str | None = None) -> list[str]:
    """Lines for people."""
    over = 100 * (found.flops / max(1, found.bound_flops) - 1)
    plain = 100 * (found.plain_flops / max(1, found.bound_flops) - 1)
    batches = (
        f"{found.batches}, of up to {found.largest_batch} lanes; pairs at a time: {found.pairs}; "
        f"pruned: {found.pruned_batches}; shared calls: {found.shared_calls}"
    )
    lines = [
        f"{name}: {found.lanes:,} patched runs of {found.calls} denoiser calls",
        f"  work     {_flops(found.flops)}: {over:.1f} % above the least an exact trace needs",
        f"           ({_flops(found.bound_flops)}); whole patched runs alone, if the clean",
        f"           activations they read were all stored (--cache), are {plain:.1f} % above it",
        f"  batches  {batches}",
        f"  clean    {_clean(found)}",
        f"  memory   about {_bytes(found.peak_bytes)} beside the weights",
    ]
    if found.seconds is not None:
        from fasttrace.cli.progress import duration

        how = "measured on a few calls here"
        if on_paper:
            how = f"an estimate from the data sheet of the {on_paper}, not measured"
        lines.append(f"  time     about {duration(found.seconds)} in the denoiser ({how})")
    return lines


def in_a_line(name: str, found: Prediction) -> str:
    """What `describe` says, short."""
    over = 100 * (found.flops / max(1, found.bound_flops) - 1)
    line = (
        f"{name}: {found.lanes:,} patched runs in {found.batches:,} batches of up to "
        f"{found.largest_batch} lanes; {_flops(found.flops)}, {over:.1f} % above the least an "
        f"exact trace needs; clean activations from {_CLEAN[found.clean]}; about "
        f"{_bytes(found.peak_bytes)} beside the weights"
    )
    if found.seconds is None:
        return line
    from fasttrace.cli.progress import duration

    return f"{line}; about {duration(found.seconds)} in the denoiser"


_CLEAN = {
    "cache": "a cache",
    "leader": "leader lanes",
    "cache and leader": "a cache and leader lanes",
}


def _clean(found: Prediction) -> str:
    if found.clean == "leader":
        return "nothing recorded: what lanes read is a lane of their own batch"
    kept = f"{_bytes(found.cache_bytes)} recorded once"
    if found.clean == "cache":
        return kept
    return f"{kept}, where that saves most; the rest is read from leader lanes, to fit --cache"


def _flops(number: float) -> str:
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.1f} PFLOP"


def _bytes(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
