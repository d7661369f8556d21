"""`fasttrace profile`: where a trace's time goes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasttrace.cli.options import (
    CacheSize,
    Clean,
    Device,
    Dtype,
    Guidance,
    Json,
    Lanes,
    Model,
    Quiet,
    Sites,
    Variant,
    check_text,
    parse_components,
    parse_engine,
    parse_words,
)
from fasttrace.cli.progress import note
from fasttrace.errors import UsageError
from fasttrace.types import Probe

if TYPE_CHECKING:
    from fasttrace.plan.plan import Plan
    from fasttrace.profile.records import Profile
    from fasttrace.tracer import Tracer

NAME = "profile"
UNFINISHED = "unfinished"  # folder of a screen or find that was stopped, in --out
DTYPES = ("float32", "float16", "bfloat16")
MOST_SITES = 10_000


def command(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="The caption to trace.")] = None,
    subject: Annotated[
        str | None, typer.Option(help="Words of it to destroy; the last one by default.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="A new folder for a page and a trace.", metavar="DIR"),
    ] = None,
    component: Annotated[str, typer.Option(help="unet or text_encoder.")] = "unet",
    sites: Sites = None,
    steps: Annotated[int, typer.Option(help="Inference steps; all take the same time.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the noise to begin with.")] = 0,
    guidance: Guidance = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="The score; repeatable.", metavar="NAME")
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    variant: Variant = None,
    clean: Clean = None,
    lanes: Lanes = None,
    cache: CacheSize = None,
    top: Annotated[int, typer.Option(help="How many of the slowest sites to list.")] = 12,
    ranges: Annotated[
        bool, typer.Option("--ranges", help="NVTX ranges alone, no clock: for nsys and ncu.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Trace a prompt and say where the time goes: by kind of site, by operator, by site.

    The rows are thrown away. With --out also one HTML page, and a trace that ui.perfetto.dev opens.
    """
    if prompt is None or not prompt.strip():
        raise UsageError('profile needs a caption to trace: --prompt "a photo of a dog".')
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} is unknown: expected {', '.join(DTYPES)}.")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"--device {device!r}: only cpu and cuda have a clock to profile with.")
    if not 0 <= top <= MOST_SITES:
        raise UsageError(f"--top {top}: expected 0 to {MOST_SITES:,} sites to list.")
    if ranges and (out is not None or as_json):
        raise UsageError("--ranges measures nothing, so it takes neither --out nor --json.")
    components = parse_components([component])
    if len(components) != 1:
        raise UsageError("profile traces one component at a time: unet or text_encoder.")
    check_text("--prompt", prompt)
    options = parse_engine(clean, lanes, cache)
    with new_folder(out):
        from fasttrace.profile.measure import last_word

        probe = Probe(prompt, check_text("--subject", subject or last_word(prompt)))
        tracer = _tracer(check_text("MODEL", model), dtype, device, variant, options)
        wanted: dict[str, Any] = {
            "steps": steps,
            "guidance": guidance,
            "height": height,
            "width": width,
        }
        plan = tracer.plan(
            probe,
            component=components[0],
            sites=parse_words(sites or ["paper"], "--sites"),
            seeds=[seed],
            metric=parse_words(metric or [], "--metric") or None,
            **{name: value for name, value in wanted.items() if value is not None},
        )
        if ranges:
            _ranges(tracer, plan, quiet)
            return
        from fasttrace.profile.measure import profile

        found = profile(tracer, plan, None if quiet else note)
        if out is not None:
            _write(found, out)
    if as_json:
        print(json.dumps({**found.as_data(), "out": None if out is None else str(out)}))
        return
    from fasttrace.profile.page import PAGE, TRACE
    from fasttrace.profile.table import console_for, print_profile

    print_profile(found, console_for(), top)
    if quiet:
        return
    if out is None:
        print("A page and a trace file: --out DIR")
    else:
        print(f"Look at it: {out / PAGE}, and {out / TRACE} at ui.perfetto.dev")


@contextmanager
def new_folder(
    path: Path | None, what: str = "the profile ", unfinished: str = ""
) -> Iterator[None]:
    """Make it before the work that fills it, and take it away where that fails.

    what: goes into it, for sentences about a disk. unfinished: a folder in it that an earlier call
    may have left there, to go on with.

    Raises `UsageError` where something is there already, `StoreError` where it can't be made.
    """
    if path is None:
        yield
        return
    from fasttrace.store.disk import Writing, disk_errors, make_folder

    writing = Writing(what, "nothing of it was kept")
    with disk_errors(path, writing):
        there = path.is_symlink() or path.exists()
        if there and not (path.is_dir() and {one.name for one in path.iterdir()} <= {unfinished}):
            raise UsageError(f"--out {path} exists already: give a new folder, or remove this one.")
    make_folder(path, writing)
    with disk_errors(path, writing), TemporaryFile(dir=path):
        pass  # so that a folder that can't be written to is refused before the work
    try:
        yield
    except BaseException:
        if not there:
            with suppress(OSError):
                path.rmdir()
        raise


def _tracer(
    model: str, dtype: str, device: str, variant: str | None, options: dict[str, Any]
) -> Tracer:
    from fasttrace.cli.sweep import quiet_libraries

    quiet_libraries()
    from fasttrace import Tracer, load

    return Tracer(load(model, dtype=dtype, device=device, variant=variant), **options)


def _ranges(tracer: Tracer, plan: Plan, quiet: bool) -> None:
    from fasttrace.profile.clock import find_ranges
    from fasttrace.profile.measure import run_with_ranges

    found = find_ranges()
    if found is None:
        raise UsageError(
            "--ranges needs the nvtx package (pip install nvtx) or a CUDA build of torch; neither "
            "is here."
        )
    run_with_ranges(tracer, plan, found)
    if not quiet:
        print(f"{plan.lanes} lanes ran inside the range 'run', in ranges of batches, calls, sites.")


def _write(found: Profile, out: Path) -> None:
    from fasttrace.profile.page import PAGE, TRACE, render
    from fasttrace.profile.perfetto import trace_json
    from fasttrace.store.disk import Writing, write_atomic

    writing = Writing("the profile ", "what was written before it is safe")
    for name, text in ((PAGE, render(found)), (TRACE, trace_json(found))):
        write_atomic(out / name, text.encode(), writing)
