"""What `ops.py` measures: an op at one size, in its own form and in the forms that it replaces.

Sizes are the bundled model's own, at 64 rows; attention, which is timed on CUDA alone, is at those
of Stable Diffusion 1.x and XL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers import DDIMScheduler, PNDMScheduler
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import fasttrace
from fasttrace.adapters.pipeline import Model
from fasttrace.engine.schedule import advance, read_schedule
from fasttrace.types import Site
from fasttrace_kernels import guided_step_, patch_attention, patch_rows_, reference

OURS = "fasttrace"
ROWS, QUICK_ROWS = 64, 4
SOURCES = 8  # rows of the cache that patched rows read from
STEPS = 12
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """forms: by name, `OURS` first; each returns what holds its results.

    reset: puts back what forms write in place; before every run, and not timed. expected: by the
    reference. tolerance: relative to max(|value|, rms). bytes, flops: what an ideal form would move
    and compute. proof: the same at a size that the reference can do, where it can't do this one.
    """

    forms: Mapping[str, Callable[[], Tensors]]
    reset: Callable[[], object]
    expected: Callable[[], Tensors]
    tolerance: float
    bytes: int = 0
    flops: int = 0
    proof: Case | None = None


@dataclass(frozen=True)
class Named:
    """A case by what it is and the names of its forms; tensors are made when it is its turn."""

    op: str
    shape: str
    dtype: torch.dtype
    forms: tuple[str, ...]
    make: Callable[[], Case]


def all_cases(device: torch.device, quick: bool) -> Iterator[Named]:
    """quick: a few rows, one case of each kind."""
    dtypes = (torch.float32,) if device.type == "cpu" else (torch.float16, torch.float32)
    for dtype in dtypes[:1] if quick else dtypes:
        yield from _patch_rows(device, dtype, quick)
        yield from _guided_step(device, dtype, quick)
    if device.type == "cuda":
        yield from _patch_attention(device, quick)


@cache
def bundled() -> Model:
    return Model(fasttrace.load("embedded"))


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(device, dtype)


# ---- patch_rows_

ALL_ROWS = "index_select + lerp + where"
PATCHED_ROWS = "index_select + lerp + index_copy"


def _patch_rows(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Named]:
    size = bundled().default("height")
    sites = bundled().sites(size, size).sites
    resnets = sorted((s for s in sites if s.kind == "resnet"), key=_elements)
    attention = max((s for s in sites if s.kind in ("attn1", "attn2")), key=_elements)
    rows = QUICK_ROWS if quick else ROWS
    chosen = {"largest resnet": resnets[-1], "smallest resnet": resnets[0], "attention": attention}
    for what, site in list(chosen.items())[: 1 if quick else None]:
        # One row: a site in a graph of many. All: the rows that a pruned graph computes.
        for patched, strength in ((1, 1.0), (rows, 1.0), (rows, 0.5)):
            shape = "x".join(str(size) for size in (rows, *site.shape))
            yield Named(
                "patch_rows_",
                f"{what} {shape}, {patched} patched, strength {strength:g}",
                dtype,
                (OURS, ALL_ROWS, PATCHED_ROWS),
                lambda shape=site.shape, patched=patched, strength=strength: patch_rows_case(
                    (rows, *shape), patched, strength, dtype, device
                ),
            )


def _elements(site: Site) -> int:
    return torch.Size(site.shape).numel()


def patch_rows_case(
    shape: tuple[int, ...], patched: int, strength: float, dtype: torch.dtype, device: torch.device
) -> Case:
    """The first `patched` rows of `shape` are written from a cache of `SOURCES` rows."""
    start = _random(*shape, dtype=dtype, device=device)
    source = _random(SOURCES, *shape[1:], dtype=dtype, device=device).flip(0)
    rows = torch.arange(shape[0], device=device)
    index = torch.where(rows < patched, rows % SOURCES, -1)
    strengths = torch.where(rows < patched, strength, 0.0)
    out = start.clone()
    wide = (-1, *[1] * (len(shape) - 1))

    def ours() -> Tensors:
        patch_rows_(out, source, index, strengths)
        return (out,)

    def all_rows() -> Tensors:
        # No size depends on the tables, so this can be captured in a CUDA graph.
        taken = source.index_select(0, index.clamp(min=0))
        share = strengths.to(dtype).reshape(wide)
        return (torch.where((index >= 0).reshape(wide), torch.lerp(out, taken, share), out),)

    def patched_rows() -> Tensors:
        # Touches what is patched alone; on CUDA it waits for the device to count them.
        lanes = (index >= 0).nonzero().flatten()
        taken = source.index_select(0, index.index_select(0, lanes))
        share = strengths.index_select(0, lanes).to(dtype).reshape(wide)
        out.index_copy_(0, lanes, torch.lerp(out.index_select(0, lanes), taken, share))
        return (out,)

    row_bytes = start[0].nbytes
    return Case(
        {OURS: ours, ALL_ROWS: all_rows, PATCHED_ROWS: patched_rows},
        reset=lambda: out.copy_(start),
        expected=lambda: (
            reference.patch_rows(start.cpu(), source.cpu(), index.cpu(), strengths.cpu()),
        ),
        # A lerp rounds three times, at numbers some rms large.
        tolerance=16 * torch.finfo(dtype).eps,
        bytes=row_bytes * patched * (2 if strength == 1 else 3),
    )


# ---- guided_step_

ADVANCE = "advance"  # what the engine called before there was the op


def _guided_step(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Named]:
    config = bundled().pipe.scheduler.config
    side = bundled().pipe.unet.config.sample_size
    channels = bundled().pipe.unet.config.in_channels
    lanes = QUICK_ROWS if quick else ROWS
    for name, kind in (("DDIM", DDIMScheduler), ("PNDM", PNDMScheduler)):
        scheduler = kind.from_config(config, **({"skip_prk_steps": True} if name == "PNDM" else {}))
        scheduler.set_timesteps(STEPS)
        shape = f"{2 * lanes}x{channels}x{side}x{side}, {lanes} lanes guided, {name}"
        yield Named(
            "guided_step_",
            shape,
            dtype,
            (OURS, ADVANCE),
            lambda scheduler=scheduler: guided_step_case(
                (lanes, channels, side, side), scheduler, dtype, device
            ),
        )


def guided_step_case(
    shape: tuple[int, ...], scheduler: Any, dtype: torch.dtype, device: torch.device
) -> Case:
    """shape: of the lanes' latents. A call in the middle, when every slot is in use."""
    schedule = read_schedule(scheduler)
    if not schedule.linear:
        raise RuntimeError(schedule.why)
    slots, call, lanes = schedule.slots, STEPS // 2, shape[0]
    table = torch.float64 if device.type == "cpu" else torch.float32
    weights = schedule.weights.to(device, table)
    scales = schedule.input_scales.to(device, table)
    guidance = torch.full((1,), 7.5, dtype=table, device=device)
    prediction = _random(2 * lanes, *shape[1:], dtype=dtype, device=device)
    start = _random(slots.kept, *shape, dtype=dtype, device=device).flip(-1)
    state, sample = start.clone(), torch.zeros_like(prediction)
    counter = torch.tensor([call, 0], device=device)
    begun = counter.clone()

    def ours() -> Tensors:
        guided_step_(
            prediction,
            state,
            sample,
            counter,
            weights,
            scales,
            guidance,
            None,
            slots.latents,
        )
        return state, sample, counter

    def eager() -> Tensors:
        new, scaled = advance(
            prediction,
            state,
            counter[:1],
            7.5,
            None,
            weights=weights,
            input_scales=scales,
            slots=slots,
        )
        state.copy_(new)
        sample[:lanes].copy_(scaled)
        sample[lanes:].copy_(scaled)
        counter[:1].add_(1)
        return state, sample, counter

    def reset() -> None:
        state.copy_(start)
        counter.copy_(begun)

    def expected() -> Tensors:
        tensors = (prediction, start, sample, begun, weights, scales, guidance)
        return reference.guided_step(*(t.cpu() for t in tensors), None, slots.latents)

    # A sum of so many slots, rounded at each, of weights as large as these and a guidance of 7.5.
    largest = float(weights[call].abs().sum()) * (1 + 2 * 7.5)
    return Case(
        {OURS: ours, ADVANCE: eager},
        reset=reset,
        expected=expected,
        tolerance=2 * torch.finfo(dtype).eps * slots.count * largest,
        bytes=prediction.nbytes + 2 * state.nbytes + sample.nbytes,
    )


# ---- patch_attention

SDPA = "SDPA + index_select + where"
XFORMERS = "xformers + index_select + where"


# lanes, heads, tokens, keys, head size
ATTENTION = {
    "SD 1.x self": (16, 8, 4096, 4096, 40),
    "SD 1.x self, half": (16, 8, 1024, 1024, 80),
    "SD 1.x self, quarter": (16, 8, 256, 256, 160),
    "SD 1.x cross": (16, 8, 4096, 77, 40),
    "SDXL self": (16, 10, 4096, 4096, 64),
    "SDXL cross": (16, 10, 4096, 77, 64),
}


def _patch_attention(device: torch.device, quick: bool) -> Iterator[Named]:
    for what, sizes in list(ATTENTION.items())[: 1 if quick else None]:
        for dtype in (torch.float16, torch.bfloat16)[: 1 if quick else None]:
            for patched in (0, 1):
                shape = "x".join(str(size) for size in sizes)
                yield Named(
                    "patch_attention",
                    f"{what} {shape}, {patched} lane patched",
                    dtype,
                    (OURS, SDPA) if xformers_attention() is None else (OURS, SDPA, XFORMERS),
                    lambda sizes=sizes, dtype=dtype, patched=patched: patch_attention_case(
                        sizes, patched, dtype, device
                    ),
                )


def patch_attention_case(
    sizes: tuple[int, int, int, int, int],
    patched: int,
    dtype: torch.dtype,
    device: torch.device,
    small: bool = False,
) -> Case:
    """The last `patched` lanes take every head of lane 0; lanes share two slots of K and V."""
    lanes, heads, tokens, keys, size = sizes
    query = _random(lanes, heads, tokens, size, dtype=dtype, device=device)
    key = _random(2, heads, keys, size, dtype=dtype, device=device).flip(-1)
    value = _random(2, heads, keys, size, dtype=dtype, device=device).flip(-2)
    slot = torch.arange(lanes, device=device) % 2
    rows = torch.arange(lanes, device=device)
    table = torch.where(rows >= lanes - patched, 0, -1)
    index = table[:, None].expand(lanes, heads).contiguous()

    def spliced(own: Tensor) -> Tensors:
        source = own.index_select(0, table.clamp(min=0))
        return (torch.where((table >= 0)[:, None, None, None], source, own),)

    def sdpa() -> Tensors:
        k, v = key.index_select(0, slot), value.index_select(0, slot)
        return spliced(scaled_dot_product_attention(query, k, v))

    forms: dict[str, Callable[[], Tensors]] = {
        OURS: lambda: (patch_attention(query, key, value, slot, index),),
        SDPA: sdpa,
    }
    if (attention := xformers_attention()) is not None:
        by_token = query.transpose(1, 2).contiguous()
        k_token, v_token = (x.transpose(1, 2).contiguous() for x in (key, value))

        def xformers() -> Tensors:
            k, v = k_token.index_select(0, slot), v_token.index_select(0, slot)
            return spliced(attention(by_token, k, v).transpose(1, 2))

        forms[XFORMERS] = xformers
    proof = None
    if not small:
        few = (2, 2, tokens, keys, size)
        proof = patch_attention_case(few, patched, dtype, device, small=True)
    return Case(
        forms,
        reset=lambda: None,
        expected=lambda: (
            reference.patch_attention(*(t.cpu() for t in (query, key, value, slot, index))),
        ),
        # Probabilities are rounded to the inputs' dtype before they meet the values.
        tolerance=8 * torch.finfo(dtype).eps,
        bytes=2 * query.nbytes + key.nbytes + value.nbytes,
        flops=4 * lanes * heads * tokens * keys * size,
        proof=proof,
    )


@cache
def xformers_attention() -> Callable[..., Tensor] | None:
    """xformers' attention on [B, N, H, D], where it is there and works; it needs its own torch."""
    try:
        from xformers.ops import memory_efficient_attention

        probe = torch.zeros(1, 16, 1, 64, dtype=torch.float16, device="cuda")
        memory_efficient_attention(probe, probe, probe)
    except Exception:  # whatever it may be, it can't be compared with
        return None
    return memory_efficient_attention
