"""The way forward: all runs of a screen as lanes of one compiled step; their latents are kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttrace.adapters.pipeline import Model
from fasttrace.attribution.layout import Layout
from fasttrace.engine.base import CLEAN, Pair
from fasttrace.engine.reference import ReferenceEngine
from fasttrace.engine.schedule import Schedule, draw_noise, read_schedule
from fasttrace.engine.step import Step
from fasttrace.errors import ModelError, UsageError
from fasttrace.types import Sampling


def schedule_of(model: Model, sampling: Sampling, pair: Pair) -> Schedule:
    """The scheduler as weighted sums. Raises `UsageError` where it isn't one."""
    scheduler = model.scheduler(sampling.steps)
    options = model.step_options(scheduler, sampling.eta, pair.start.generator())
    schedule = read_schedule(scheduler, options)
    if not schedule.linear:
        raise UsageError(
            "A screen goes back through the scheduler as a weighted sum, which this one is not: "
            f"{schedule.why} Choose another scheduler, or trace."
        )
    return schedule


@torch.no_grad()
def run_forward(
    model: Model,
    sampling: Sampling,
    schedule: Schedule,
    layout: Layout,
    step: Step,
    branches: Sequence[str],
) -> Tensor:
    """Latents [T + 1, lanes, C, h, w] before every call and at the end.

    step: of so many lanes, with every patched place as a site that reads rows of its own call.
    Raises `ModelError` for a run that is not finite.
    """
    lanes = layout.lanes
    step.set_schedule(schedule)
    step.clear()
    step.read_texts(
        [layout.texts.slot(lane.pair, "uncond") for lane in lanes],
        [layout.slot(lane.pair, lane.text) for lane in lanes],
    )
    scheduler = model.scheduler(sampling.steps)
    starts = [pair.start.latents * scheduler.init_noise_sigma for pair in layout.pairs]
    if step.noise is not None:
        for p, (pair, start) in enumerate(zip(layout.pairs, starts, strict=True)):
            options = model.step_options(scheduler, sampling.eta, pair.start.generator())
            noise = draw_noise(scheduler, start, options)
            for row, lane in enumerate(lanes):
                if lane.pair == p:
                    step.noise[:, row] = noise[:, 0]
    for row, lane in enumerate(lanes):
        base = lane.base
        leader = next(i for i, o in enumerate(lanes) if (o.pair, o.run) == (lane.pair, CLEAN))
        for number, place in enumerate(() if base is None else base.patched):
            assert base is not None
            point = step.shape.sites.index(place)
            for own in (step.row(branch, row) for branch in branches):
                calls = slice(*(base.window or (0, schedule.calls)))
                step.index[calls, point, own] = own - row + leader
                step.strength[calls, point, own] = base.strength
                if base.channels:
                    mask = step.masks[place][own]
                    mask.zero_()
                    mask[..., list(base.channels[number])] = 1.0
    first = torch.cat([starts[lane.pair] for lane in lanes])
    kept = [first]
    step.begin(schedule.first_state(first))
    for call in range(schedule.calls):
        step.run(call)
        kept.append(step.state[0].clone())
    latents = torch.stack([t.to(step.dtype) for t in kept])
    if not bool(torch.isfinite(latents[-1]).all()):
        _explain(model, layout, latents[-1])
    return latents


def _explain(model: Model, layout: Layout, final: Tensor) -> None:
    """Run it the slow way, which names site and call."""
    bad = next(i for i, row in enumerate(final) if not bool(torch.isfinite(row).all()))
    lane = layout.lanes[bad]
    pair = layout.pairs[lane.pair]
    name = lane.run or "between"
    if lane.run is not None:
        ReferenceEngine(model).denoise(lane.run, pair.texts[lane.run], pair)
    raise ModelError(f"The {name} run of a screen gives NaN in {model.dtype}; try float32.")
