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
from fasttrace.engine.workshop import SHARE
from fasttrace.errors import UsageError
from fasttrace.plan.lanes import RUN, unet_lanes
from fasttrace.plan.options import parse_branch
from fasttrace.plan.plan import Plan
from fasttrace.plan.windows import resolve_windows
from fasttrace.rows import lanes_of
from fasttrace.types import Lane, Sampling

# Of a data sheet's peak, as published for large transformers, whose products are larger than a
# UNet's at a few rows: what a guess such as `ASSUMED` can be held against.
PUBLISHED = (
    "52 % in training on A100 (Megatron-LM, arXiv:2104.04473)",
    "38 to 43 % in training on H100 (Llama 3, arXiv:2407.21783)",
    "35 to 75 % in attention alone on H100 (FlashAttention-3, arXiv:2407.08608)",
)
# Of a card's memory beside the weights, what the engine takes (engine/workshop.py).
TAKEN = SHARE["cuda"]


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
    _traced(name)
    steps = STEPS.get(name, 50) if steps is None else steps
    for what, number in (("prompts", prompts), ("seeds", seeds), ("steps", steps)):
        if number < 1:
            raise UsageError(f"{number} {what} were asked for; at least 1 is needed.")
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


def find_device(name: str) -> str:
    """As it stands in `DEVICES`: "h100", "rtx-4090" and "RTX4090" are found. Else `UsageError`."""
    plain = {_plain(known): known for known in DEVICES}
    if _plain(name) not in plain:
        raise UsageError(f"Unknown device {name!r}; expected one of {', '.join(DEVICES)}.")
    return plain[_plain(name)]


def _plain(name: str) -> str:
    return name.casefold().translate({ord(c): None for c in " -_"})


def weight_bytes(name: str) -> dict[str, int]:
    """Of a published pipeline in 16 bits, by component: UNet, text encoders, prior, VAE.

    Of Kandinsky the VAE and the image encoder are left out. Raises `UsageError` for names that are
    unknown or not traced.
    """
    _traced(name)
    from diffusers import PriorTransformer

    found = {}
    for part, config in ARCHITECTURES[name].items():
        if "text_encoder" in part:
            found[part] = _text_parameters(config)
        elif part == "prior":
            build: Any = PriorTransformer.from_config
            with torch.device("meta"):
                found[part] = sum(p.numel() for p in build(dict(config)).parameters())
        else:
            found[part] = sum(p.numel() for p in _on_meta(config, torch.half).parameters())
    if "prior" not in found:
        found["vae"] = _VAE
    return {part: 2 * number for part, number in found.items()}


_VAE = 83_653_863  # parameters of Stable Diffusion's, in every version
_CLIP_VOCABULARY = 49_408


def _text_parameters(config: Mapping[str, Any]) -> int:
    """Of a text encoder: embeddings, and in each layer four projections, an MLP and two norms."""
    width, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    words = config.get("vocab_size", _CLIP_VOCABULARY) + config["max_position_embeddings"]
    layer = 4 * width * (width + 1) + 2 * width * inner + width + inner + 4 * width
    ends = 2 * width + width * int(config.get("projection_dim", 0))
    return words * width + int(config["num_hidden_layers"]) * layer + ends


def _known(name: str) -> None:
    if name not in ARCHITECTURES:
        raise UsageError(f"Unknown architecture {name!r}; known: {', '.join(ARCHITECTURES)}.")


def _traced(name: str) -> None:
    _known(name)
    if name in UNTRACED:
        raise UsageError(f"'{name}' is listed and counted, not traced, so no trace can be planned.")


def architecture(name: str) -> tuple[Any, Denoiser]:
    """A published UNet on the meta device, compiled from shapes alone. `UsageError` if unknown."""
    _known(name)
    return compile_configuration(ARCHITECTURES[name]["unet"])


def compile_configuration(
    given: Mapping[str, Any], dtype: torch.dtype = torch.half
) -> tuple[Any, Denoiser]:
    """The UNet of a `unet/config.json` on the meta device, compiled from shapes alone."""
    unet = _on_meta(given, dtype)
    config = unet.config
    side = config.sample_size

    def inputs(rows: int) -> dict[str, Any]:
        return meta_inputs(config, rows, side, side, 77, dtype)

    return unet, compile_denoiser(unet, inputs, torch.device("cpu"))


def _on_meta(given: Mapping[str, Any], dtype: torch.dtype) -> Any:
    from diffusers import UNet2DConditionModel

    build: Any = UNet2DConditionModel.from_config
    with torch.device("meta"):
        unet = build(dict(given)).eval()
    return torch.nn.Module.to(unet, dtype)  # diffusers' own warns of parts it keeps: here none
