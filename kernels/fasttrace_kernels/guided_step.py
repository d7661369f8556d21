"""guided_step_: the end of a denoiser call in one pass. `reference.guided_step` is the maths.

Guidance, the weighted sum over the slots (latents, predictions, noise), the shift of what is kept,
the next input's scale and the count of calls: one read and one write of every latent, no value seen
by the host. Tables lie at fixed addresses, so that a captured graph serves every schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import _registry
from ._triton import jit, tl, triton
from .guided_step_checks import check_call, check_memory, check_shapes, rows_are_contiguous


def guided_step_(
    prediction: Tensor,
    state: Tensor,
    sample: Tensor,
    counter: Tensor,
    weights: Tensor,
    input_scales: Tensor,
    guidance: Tensor | None,
    noise: Tensor | None,
    latents: int,
) -> None:
    """Makes the next latent of every lane and the denoiser's next input, in place.

    prediction: [2L, ...] with a guidance, unconditional lanes first; else [L, ...].
    state [kept, L, ...], kept <= 8: the `latents` newest latents, newest first, then earlier
    predictions, newest first. The new latent comes first, the others move on by one and the oldest
    of each kind is dropped; the guided prediction becomes the newest of the predictions.
    sample, of prediction's shape and dtype: the new latent times its input scale, in each branch.
    counter [2] int64: which call has just been made, 0-based, which becomes one more; and a ticket
    of the device kernels, 0 between calls.
    weights [T, S], one a slot: latents, predictions (the guided one first), noise if there is one;
    so S = kept + 1, or kept + 2 with noise. input_scales [T + 1]. guidance [L], or [1] for all
    lanes. These have one dtype, float32 or float64.
    noise [T, L, ...], or [T, 1, ...] for all lanes, in state's dtype.

    prediction is float16, bfloat16, float32 or float64; state has its dtype, or is float32 beside a
    half-precision one. Everything is computed in float32, or float64 for a float64 state, with the
    tables rounded to that, multiply and add one slot after another and never fused, so that a lane
    has the same bits in every form and beside any neighbours. What is written is rounded once;
    sample is made of the latent as it is kept, for a float32 one in the tables' dtype.

    Raises RuntimeError if shapes, dtypes, devices or memory don't fit, if a gradient is required,
    and on the CPU if the call is outside 0 ... T-1. CUDA can't look without a sync: there the new
    latents become NaN.
    """
    torch.ops.fasttrace.guided_step_.default(
        prediction, state, sample, counter, weights, input_scales, guidance, noise, latents
    )


def fallback_(
    prediction: Tensor,
    state: Tensor,
    sample: Tensor,
    counter: Tensor,
    weights: Tensor,
    input_scales: Tensor,
    guidance: Tensor | None,
    noise: Tensor | None,
    latents: int,
) -> None:
    """The CPU op where nothing is compiled: whole tensors at a time."""
    check_shapes(
        prediction, state, sample, counter, weights, input_scales, guidance, noise, latents
    )
    check_memory(state, sample, prediction, counter, weights, input_scales, guidance, noise)
    call, lanes = check_call(counter, weights), state.shape[1]
    wide = torch.promote_types(state.dtype, torch.float32)
    newest = prediction[:lanes].to(wide)
    if guidance is not None:
        amount = guidance.to(wide).reshape(-1, *[1] * (prediction.dim() - 1))
        newest = newest + amount * (prediction[lanes:].to(wide) - newest)
    slots = [*state[:latents], newest, *state[latents:]]
    if noise is not None:
        slots.append(noise[call])
    row = weights[call].to(wide)
    total = row[0] * slots[0].to(wide)
    for weight, tensor in zip(row[1:], slots[1:], strict=True):
        total = total + weight * tensor.to(wide)
    predictions = state.shape[0] + 1 - latents
    kept = [total, *state[: latents - 1], *slots[latents : latents + predictions - 1]]
    state.copy_(torch.stack([tensor.to(state.dtype) for tensor in kept]))
    exact = sample.dtype in (torch.float32, torch.float64)
    wide = torch.promote_types(sample.dtype, weights.dtype if exact else torch.float32)
    scaled = (state[0].to(wide) * input_scales[call + 1].to(wide)).to(sample.dtype)
    sample.copy_(scaled if guidance is None else torch.cat([scaled, scaled]))
    counter[0] += 1


@jit
def guided_step_kernel(
    prediction_ptr,
    state_ptr,
    sample_ptr,
    counter_ptr,
    weights_ptr,
    input_scales_ptr,
    guidance_ptr,
    noise_ptr,
    lanes_size,
    row_size,
    calls_size,
    prediction_lane_stride,
    state_slot_stride,
    state_lane_stride,
    sample_lane_stride,
    guidance_lane_stride,
    noise_call_stride,
    noise_lane_stride,
    LATENTS: tl.constexpr,
    PREDICTIONS: tl.constexpr,
    HAS_GUIDANCE: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    WIDE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane_idx = tl.program_id(1).to(tl.int64)
    element_offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    write_mask = element_offs < row_size
    call_idx = tl.load(counter_ptr)
    # The host can't see the call without a sync, so one out of range shows itself as NaN.
    calls = tl.broadcast_to(call_idx, [BLOCK])
    known = (calls >= 0) & (calls < calls_size)
    table_idx = tl.minimum(tl.maximum(call_idx, 0), calls_size - 1)
    # Everything is read before anything is written, so that all loads are on their way at once.
    prediction_offs = lane_idx * prediction_lane_stride + element_offs
    newest = tl.load(prediction_ptr + prediction_offs, mask=write_mask).to(WIDE)
    if HAS_GUIDANCE:
        cond_offs = (lane_idx + lanes_size) * prediction_lane_stride + element_offs
        cond = tl.load(prediction_ptr + cond_offs, mask=write_mask).to(WIDE)
        amount = tl.load(guidance_ptr + lane_idx * guidance_lane_stride).to(WIDE)
    first_ptr = state_ptr + lane_idx * state_lane_stride + element_offs
    slot_ptr = first_ptr
    old = (tl.load(slot_ptr, mask=write_mask),)
    for _ in tl.static_range(1, LATENTS + PREDICTIONS - 1):
        slot_ptr += state_slot_stride
        old += (tl.load(slot_ptr, mask=write_mask),)  # type: ignore[assignment]
    if HAS_NOISE:
        noise_offs = table_idx * noise_call_stride + lane_idx * noise_lane_stride + element_offs
        noise = tl.load(noise_ptr + noise_offs, mask=write_mask).to(WIDE)
    weight_ptr = weights_ptr + table_idx * (LATENTS + PREDICTIONS + HAS_NOISE)
    weights = (tl.load(weight_ptr).to(WIDE),)
    for slot in tl.static_range(1, LATENTS + PREDICTIONS + HAS_NOISE):
        weights += (tl.load(weight_ptr + slot).to(WIDE),)  # type: ignore[assignment]
    scale = tl.load(input_scales_ptr + table_idx + 1).to(SCALE)

    if HAS_GUIDANCE:
        newest += amount * (cond - newest)
    total = weights[0] * old[0].to(WIDE)
    for slot in tl.static_range(1, LATENTS):
        total += weights[slot] * old[slot].to(WIDE)
    total += weights[LATENTS] * newest
    for slot in tl.static_range(LATENTS, LATENTS + PREDICTIONS - 1):
        total += weights[slot + 1] * old[slot].to(WIDE)
    if HAS_NOISE:
        total += weights[LATENTS + PREDICTIONS] * noise

    latent = tl.where(known, total, float("nan")).to(old[0].dtype)
    tl.store(first_ptr, latent, mask=write_mask)
    slot_ptr = first_ptr
    for slot in tl.static_range(1, LATENTS + PREDICTIONS - 1):
        slot_ptr += state_slot_stride
        kept = newest.to(old[0].dtype) if slot == LATENTS else old[slot - 1]
        tl.store(slot_ptr, kept, mask=write_mask)
    scaled = (latent.to(SCALE) * scale).to(sample_ptr.dtype.element_ty)
    sample_offs = lane_idx * sample_lane_stride + element_offs
    tl.store(sample_ptr + sample_offs, scaled, mask=write_mask)
    if HAS_GUIDANCE:
        cond_offs = (lane_idx + lanes_size) * sample_lane_stride + element_offs
        tl.store(sample_ptr + cond_offs, scaled, mask=write_mask)

    # Who draws the last ticket knows that every block has read the counter, and moves it. The
    # barrier is for the threads of a block, of which one alone draws.
    tl.debug_barrier()
    ticket = tl.atomic_add(counter_ptr + 1, 1, sem="acq_rel", scope="gpu")
    last = ticket == tl.num_programs(0) * tl.num_programs(1) - 1
    tl.store(counter_ptr, call_idx + 1, mask=last)
    tl.store(counter_ptr + 1, 0, mask=last)


@dataclass(frozen=True)
class Launch:
    """How the Triton kernel is launched."""

    block: int = 1024  # 128-bit loads of fp16 with 128 threads
    num_warps: int = 4


DEFAULT_LAUNCH = Launch()


def launch_(
    prediction: Tensor,
    state: Tensor,
    sample: Tensor,
    counter: Tensor,
    weights: Tensor,
    input_scales: Tensor,
    guidance: Tensor | None,
    noise: Tensor | None,
    latents: int,
    launch: Launch = DEFAULT_LAUNCH,
) -> None:
    """The Triton form of `guided_step_`."""
    check_shapes(
        prediction, state, sample, counter, weights, input_scales, guidance, noise, latents
    )
    check_memory(state, sample, prediction, counter, weights, input_scales, guidance, noise)
    kept, lanes = state.shape[:2]
    if state.numel() == 0:
        counter[:1] += 1  # no lanes make a call too
        return
    if not rows_are_contiguous(prediction, 1):
        prediction = prediction.contiguous()
    if noise is not None and not rows_are_contiguous(noise, 2):
        noise = noise.contiguous()
    row_size = prediction[0].numel()
    exact = sample.dtype in (torch.float32, torch.float64)
    scale_type = torch.promote_types(sample.dtype, weights.dtype if exact else torch.float32)
    grid = (triton.cdiv(row_size, launch.block), lanes)
    with torch.cuda.device_of(state):
        guided_step_kernel[grid](
            prediction_ptr=prediction,
            state_ptr=state,
            sample_ptr=sample,
            counter_ptr=counter,
            weights_ptr=weights.contiguous(),
            input_scales_ptr=input_scales.contiguous(),
            # Without one its pointer isn't read.
            guidance_ptr=weights if guidance is None else guidance,
            noise_ptr=state if noise is None else noise,
            lanes_size=lanes,
            row_size=row_size,
            calls_size=weights.shape[0],
            prediction_lane_stride=prediction.stride(0),
            state_slot_stride=state.stride(0),
            state_lane_stride=state.stride(1),
            sample_lane_stride=sample.stride(0),
            guidance_lane_stride=0 if guidance is None else _step(guidance, 0),
            noise_call_stride=0 if noise is None else noise.stride(0),
            noise_lane_stride=0 if noise is None else _step(noise, 1),
            LATENTS=latents,
            PREDICTIONS=kept + 1 - latents,
            HAS_GUIDANCE=guidance is not None,
            HAS_NOISE=noise is not None,
            WIDE=tl.float64 if state.dtype == torch.float64 else tl.float32,
            SCALE=tl.float64 if scale_type == torch.float64 else tl.float32,
            BLOCK=launch.block,
            num_warps=launch.num_warps,
            enable_fp_fusion=False,  # the same bits as on the CPU, at no cost: memory binds
        )


def _step(tensor: Tensor, dim: int) -> int:
    """A stride, 0 where one entry is for all lanes."""
    return 0 if tensor.shape[dim] == 1 else tensor.stride(dim)


_registry.define(
    "guided_step_(Tensor prediction, Tensor(a!) state, Tensor(b!) sample, Tensor(c!) counter, "
    "Tensor weights, Tensor input_scales, Tensor? guidance, Tensor? noise, int latents) -> ()",
    cpu=fallback_,
    cuda=launch_,
    fake=check_shapes,
)
_registry.refuse_gradient("guided_step_", "call it under torch.no_grad()", mutates=(1, 2, 3))
