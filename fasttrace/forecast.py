"""What a trace will take, from a plan or from an architecture's name alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from fasttrace.adapters.architectures import (
    ARCHITECTURES,
    GUIDANCE,
    LEARNED,
    SCHEDULERS,
    STEPS,
    UNTRACED,
)
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.scope import scope
from fasttrace.adapters.selection import select_sites
from fasttrace.adapters.text import Text
from fasttrace.adapters.unet import discover, meta_inputs
from fasttrace.engine.compiled import Denoiser, compile_denoiser, of_model
from fasttrace.engine.options import Options
from fasttrace.engine.predict import ASSUMED, DEVICES, Prediction, calibrate, predict
from fasttrace.engine.schedule import read_schedule
from fasttrace.errors import UsageError
from fasttrace.plan.lanes import RUN, unet_lanes
from fasttrace.plan.options import parse_branch
from fasttrace.plan.plan import Plan
from fasttrace.plan.windows import resolve_windows
from fasttrace.rows import lanes_of
from fasttrace.types import Lane, Sampling


def forecast_plan(
    model: Model,
    plan: Plan,
    options: Options | None = None,
    *,
    measure: bool = True,
    trace: Callable[[Sampling, Text], Denoiser] | None = None,
    memory: int | None = None,
) -> Prediction:
    """Of a plan of a loaded model. measure: time a few calls of its denoiser for `seconds`.

    trace: an engine's way to its compiled denoiser, which it then keeps. memory: bytes there are.
    """
    options = options or Options()
    pairs = dict.fromkeys((row.probe, row.seed) for row in plan.rows)
    sampling, first = plan.sampling, plan.probes[0]
    groups = groupby(plan.rows, key=lambda row: (row.probe, row.seed))
    lanes = [lanes_of(list(rows)) for _, rows in groups]
    guided = model.guided(sampling)
    scheduler = model.scheduler(sampling.steps)
    step_options = model.step_options(scheduler, sampling.eta, None)
    with scope(model.pipe):
        seed = plan.rows[0].seed if plan.rows else plan.seeds[0]
        text = model.text(first.prompt, first.negative_prompt, guided, plan.starts[seed])
        denoiser = trace(sampling, text) if trace else of_model(model, sampling, text)
        found = predict(
            lanes,
            denoiser,
            options,
            calls=plan.calls,
            guided=guided,
            linear=read_schedule(scheduler, step_options).linear,
            own_texts=plan.component == "text_encoder",
            itemsize=model.dtype.itemsize,
            negatives=[
                _unwanted(model, plan.probes[probe].negative_prompt, number)
                for probe, number in pairs
            ],
            memory=memory,
        )
        if not measure:
            return found
        rate = calibrate(denoiser, max(2, found.largest_batch) * (2 if guided else 1))
    return replace(found, seconds=found.flops / rate)


def _unwanted(model: Model, negative_prompt: str, seed: int) -> str:
    """Equal for pairs that have one unconditional text."""
    of_seed = negative_prompt and model.family.seeded
    return f"{seed} {negative_prompt}" if of_seed else negative_prompt


def forecast_architecture(
    name: str,
    *,
    prompts: int = 24,
    seeds: int = 1,
    sites: str | Sequence[str] = "paper",
    window: Any = None,
    branch: str = "cond",
    steps: int | None = None,
    guidance: float | None = None,
    options: Options | None = None,
    device: str | None = None,
    memory: int | None = None,
) -> Prediction:
    """Of a UNet trace of a published architecture in 16 bits, without its weights.

    steps, guidance: None is what the published pipeline takes. Kandinsky's prior, which runs beside
    the UNet, is not counted. device: one of `DEVICES`, whose data sheet then gives a rough
    `seconds`. memory: bytes there are beside the weights; batches are then made as small as it
    takes. Raises `UsageError` for unknown names, and for those that are not traced.
    """
    if device is not None and device not in DEVICES:
        raise UsageError(f"Unknown device {device!r}; expected one of {', '.join(DEVICES)}.")
    steps = STEPS.get(name, 50) if steps is None else steps
    for what, number in (("prompts", prompts), ("seeds", seeds), ("steps", steps)):
        if number < 1:
            raise UsageError(f"{number} {what} were asked for; at least 1 is needed.")
    if name in UNTRACED:
        raise UsageError(f"'{name}' is listed and counted, not traced, so no trace can be planned.")
    guidance = GUIDANCE.get(name, 7.5) if guidance is None else guidance
    guided = guidance > 1
    unet, denoiser = architecture(name)
    calls = steps + (SCHEDULERS[name] == "PNDM")
    side = unet.config.sample_size
    layout = discover(unet, side, side, 77)
    lanes: list[Lane] = [
        lane
        for lane, status in unet_lanes(
            select_sites(layout.every, sites),
            parse_branch(branch, guided),
            resolve_windows(window, calls),
            calls,
            layout,
            pooled=unet.config.addition_embed_type is not None,
        )
        if status == RUN
    ]
    found = predict(
        [lanes] * (prompts * seeds),
        denoiser,
        options or Options(),
        calls=calls,
        guided=guided,
        linear=name not in LEARNED,
        itemsize=2,
        memory=memory,
    )
    if device is None:
        return found
    return replace(found, seconds=found.flops / (ASSUMED * DEVICES[device] * 1e12))


def architecture(name: str) -> tuple[Any, Denoiser]:
    """A published UNet on the meta device, compiled from shapes alone. `UsageError` if unknown."""
    if name not in ARCHITECTURES:
        raise UsageError(f"Unknown architecture {name!r}; known: {', '.join(ARCHITECTURES)}.")
    return compile_configuration(ARCHITECTURES[name]["unet"])


def compile_configuration(
    given: Mapping[str, Any], dtype: torch.dtype = torch.half
) -> tuple[Any, Denoiser]:
    """The UNet of a `unet/config.json` on the meta device, compiled from shapes alone."""
    from diffusers import UNet2DConditionModel

    build: Any = UNet2DConditionModel.from_config
    with torch.device("meta"):
        unet = build(dict(given)).to(dtype).eval()
    config = unet.config
    side = config.sample_size

    def inputs(rows: int) -> dict[str, Any]:
        return meta_inputs(config, rows, side, side, 77, dtype)

    return unet, compile_denoiser(unet, inputs, torch.device("cpu"))
