"""A sweep from a request to a results directory: what `trace` and `demo` share."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttrace.cli.adaptive import check_adaptive, make_sweep, settle
from fasttrace.cli.progress import duration, note, progress
from fasttrace.errors import UsageError
from fasttrace.plan.windows import resolve_windows
from fasttrace.store import Call, Manifest, Shard, Store
from fasttrace.types import Corruption, Probe

if TYPE_CHECKING:
    from fasttrace.plan.plan import Plan
    from fasttrace.plan.sources import Source
    from fasttrace.tracer import Tracer


@dataclass(frozen=True)
class Request:
    """Everything a sweep is asked for; the names are those of the options."""

    model: str
    probes: Mapping[Probe, list[int]]  # with the seeds of each
    out: Path
    command: str
    components: list[str]
    corruption: Corruption
    sites: list[str]
    tokens: list[str | int]
    windows: list[Any] | None
    branch: str
    metrics: list[str]
    sampling: dict[str, Any]  # steps, guidance, height, width; None is the model's default
    dtype: str
    device: str
    shard: Shard
    pictures: bool
    quiet: bool
    engine: str = "fast"
    options: Mapping[str, Any] = field(default_factory=dict)  # of the engine
    edit: Path | None = None  # a saved edit that the model is traced with
    sources: Sequence[Source] = ()  # none: the clean run's activations
    base: str = "corrupt"
    variant: str | None = None  # of the weight files
    until: str | None = None  # an adaptive sweep's goal
    budget: int | None = None  # of its runs


@dataclass(frozen=True)
class Outcome:
    """What a sweep did; JSON with `vars`."""

    out: str
    results: str
    rows: int  # in the directory, every shard's
    new: int  # made by this call
    planned: int  # of this call's plan, every shard's
    seconds: float
    until: dict[str, Any] | None = None  # what an adaptive sweep settled


def run(request: Request) -> Outcome:
    """Plan, make what is missing, write the table. Raises as `Tracer` and `Store` do."""
    start = time.monotonic()
    check_adaptive(request)
    before = Manifest.read(request.out)  # a foreign directory is refused before a model is loaded
    quiet_libraries()
    from fasttrace import Tracer, load, load_edit

    pipe = load(request.model, dtype=request.dtype, device=request.device, variant=request.variant)
    if request.edit is not None:
        load_edit(request.edit).apply_(pipe)
    tracer = Tracer(pipe, engine=request.engine, **request.options)
    plans = make_plans(tracer, request, before)
    planned = sum(plan.total for plan in plans)
    sweep = None if request.until is None else make_sweep(plans[0], request)
    call = Call.now(
        request.command,
        shard=str(request.shard),
        planned=planned if sweep is None else 0,  # nobody knows yet how many it takes
        versions=plans[0].manifest["versions"],
    )
    new = 0
    with Store.open(
        request.out,
        fixed=fixed_values(plans, request),
        resolved={"sigma": plans[0].corruption.sigma},
        call=call,
        shard=request.shard,
    ) as store:
        skip = not_mine(plans, request.shard)
        left = sum(
            not (row.key in skip or store.done(row.key)) for plan in plans for row in plan.rows
        )
        expected = _announce(tracer, plans, planned, left, request)
        if sweep is not None:
            new = settle(tracer, sweep, request, store)
        else:
            with progress(left, request.quiet, expected) as advance:
                for plan in plans:
                    rows = tracer.iter_rows(
                        plan,
                        done=lambda key: key in skip or store.done(key),
                        pictures=request.pictures,
                    )
                    for row, pictures in rows:
                        new += store.add(row, pictures)
                        advance()
        results = store.finish()
        total = len(store)
    seconds = time.monotonic() - start
    settled = None if sweep is None else sweep.record
    if not request.quiet:
        note(f"{new} rows in {duration(seconds)}; {total} in {results}")
        if settled is not None:
            note(f"{settled.metric}: {settled.words}")
    found = None if settled is None else settled.model_dump()
    return Outcome(str(request.out), str(results), total, new, planned, round(seconds, 3), found)


def quiet_libraries() -> None:
    """Their loading bars and advice would bury ours; what goes wrong still arrives as an error."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def make_plans(tracer: Tracer, request: Request, before: Manifest | None) -> list[Plan]:
    """One plan a component, all with one sigma: the directory's own where it has one."""
    corruption = request.corruption
    kept = before.resolved.get("sigma") if before is not None else None
    if kept is not None and before is not None and _same_corruption(before, corruption):
        corruption = replace(corruption, sigma=tuple(kept) if isinstance(kept, list) else kept)
    plans: list[Plan] = []
    for component in request.components:
        of_text = component == "text_encoder"
        alone = len(request.components) == 1
        options: dict[str, Any] = dict(request.sampling)
        if request.tokens and (of_text or alone):
            options["tokens"] = request.tokens
        if request.sources:
            options |= {"source": request.sources, "base": request.base}
        if not of_text or alone:
            options |= {"branch": request.branch, "window": request.windows}
        plans.append(
            tracer.plan(
                list(request.probes),
                component=component,
                sites=sites_for(tracer, component, request.components, request.sites),
                seeds=request.probes,
                corruption=corruption,
                metric=request.metrics or None,
                **options,
            )
        )
        corruption = plans[-1].corruption
    return plans


def sites_for(tracer: Tracer, component: str, components: list[str], sites: list[str]) -> list[str]:
    """With several components each takes the words that mean something in it."""
    if len(components) == 1 or sites == ["paper"]:
        return sites
    for word in sites:
        if not any(_means_sites(tracer, part, word) for part in components):
            tracer.sites(component, word)  # refuses it and names what it may have meant
    found = [word for word in sites if _means_sites(tracer, component, word)]
    if not found:
        raise UsageError(
            f"--sites {','.join(sites)} names nothing of {component}: add a site of it, or "
            "leave it out of --component."
        )
    return found


def _means_sites(tracer: Tracer, component: str, word: str) -> bool:
    try:
        tracer.sites(component, word)
    except UsageError:
        return False
    return True


def _same_corruption(before: Manifest, corruption: Corruption) -> bool:
    return all(before.fixed.get(k) == v for k, v in _corruption_values(corruption).items())


def _corruption_values(corruption: Corruption) -> dict[str, Any]:
    """As asked for, so before sigma is worked out."""
    sigma = corruption.sigma
    return {
        "corruption": corruption.kind,
        "noise-scale": corruption.scale if sigma is None else None,
        "sigma": list(sigma) if isinstance(sigma, tuple) else sigma,
        "replacement": corruption.replacement,
        "noise-seed": corruption.seed,
    }


def fixed_values(plans: list[Plan], request: Request) -> dict[str, Any]:
    """What determines scores beside probe, seed and site, by the options' names."""
    about, calls = plans[0].manifest, plans[0].calls
    windows = resolve_windows(request.windows, calls)
    sampling = dict(json.loads(about["sampling"]))
    return {
        "fingerprint": about["fingerprint"],
        "engine": about["engine"],
        "dtype": about["dtype"],
        **sampling,
        **_corruption_values(request.corruption),
        "branch": request.branch,
        **({} if request.base == "corrupt" else {"base": request.base}),
        "window": None if windows == [(0, calls)] else [list(w) for w in windows],
        "metric": [list(m) if isinstance(m, tuple) else m for m in about["metrics"]],
    }


def not_mine(plans: list[Plan], shard: Shard) -> set[str]:
    """Keys of the pairs that other shards own; a pair is one prompt and seed, all components."""
    numbers: dict[tuple[Probe, int], int] = {}
    skip = set()
    for plan in plans:
        for row in plan.rows:
            number = numbers.setdefault((plan.probes[row.probe], row.seed), len(numbers))
            if not shard.owns(number):
                skip.add(row.key)
    return skip


def _announce(
    tracer: Tracer, plans: list[Plan], planned: int, left: int, request: Request
) -> float | None:
    """Say what will run, and what it takes. The seconds it should, where that is known."""
    if request.quiet:
        return None
    parts = ", ".join(f"{plan.component} {plan.total}" for plan in plans)
    mine = "" if request.shard.count == 1 else f", shard {request.shard}"
    there = planned - left
    most = "" if request.until is None else "at most "
    note(
        f"{tracer.name}: {most}{planned} rows ({parts}), {plans[0].calls} denoiser calls a run"
        + mine
        + (f"; {there} need no work here" if there else "")
    )
    if request.engine != "fast" or not left:
        return None
    from fasttrace.cli.plan import in_a_line

    seconds = 0.0
    whole = "the whole " if there or most else ""
    for plan in plans:
        found = tracer.forecast(plan)
        note(in_a_line(whole + plan.component, found))
        seconds += found.seconds or 0.0
    return seconds * left / planned
