"""The argument structs of csrc/ops.h, and how a call's tensors become one.

`test_csrc_structs.py` compares their layout with what a C++ compiler makes of the header.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

# The order of csrc/ops.h's enumerations.
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MASKS = (None, torch.bool, torch.float32, torch.float64)


class PatchRowsArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "source", "index", "strength", "mask")),
        *((name, ctypes.c_int64) for name in ("lanes", "tokens", "channels", "source_rows")),
        ("out_lane_stride", ctypes.c_int64),
        ("source_row_stride", ctypes.c_int64),
        ("mask_lane_stride", ctypes.c_int64),
        ("mask_token_stride", ctypes.c_int64),
        ("mask_channel_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int),
        ("mask_kind", ctypes.c_int),
        ("wide_index", ctypes.c_bool),
        ("wide_strength", ctypes.c_bool),
    )


class GuidedStepArgs(ctypes.Structure):
    _fields_ = (
        ("prediction", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
        ("sample", ctypes.c_void_p),
        ("counter", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("input_scales", ctypes.c_void_p),
        ("guidance", ctypes.c_void_p),
        ("noise", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("lanes", "row_size", "calls")),
        ("latents", ctypes.c_int),
        ("predictions", ctypes.c_int),
        ("prediction_lane_stride", ctypes.c_int64),
        ("sample_lane_stride", ctypes.c_int64),
        ("state_slot_stride", ctypes.c_int64),
        ("state_lane_stride", ctypes.c_int64),
        ("guidance_lane_stride", ctypes.c_int64),
        ("noise_call_stride", ctypes.c_int64),
        ("noise_lane_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int),
        ("state_dtype", ctypes.c_int),
        ("wide_tables", ctypes.c_bool),
    )


STRUCTS = {"patch_rows": PatchRowsArgs, "guided_step": GuidedStepArgs}


def _step(tensor: Tensor | None, dim: int) -> int:
    """A stride, 0 where one entry is for all or a dimension is missing."""
    if tensor is None or dim >= tensor.dim() or tensor.shape[dim] == 1:
        return 0
    return tensor.stride(dim)


def patch_rows_args(
    out: Tensor, source: Tensor, index: Tensor, strength: Tensor, mask: Tensor | None
) -> PatchRowsArgs:
    """Everything but the pointers, as csrc/patch_rows.cpp does it; rows are contiguous here."""
    rows = out.dim() == 2
    args = PatchRowsArgs()
    args.lanes, args.tokens = out.shape[0], 1 if rows else out.shape[1]
    args.channels = out.shape[1 if rows else 2 :].numel()
    args.source_rows = source.shape[0]
    args.out_lane_stride, args.source_row_stride = out.stride(0), source.stride(0)
    args.dtype = _DTYPES.index(out.dtype)
    args.mask_kind = 0 if mask is None else _MASKS.index(mask.dtype)
    args.mask_lane_stride = _step(mask, 0)
    if rows:
        args.mask_channel_stride = _step(mask, 1)
    elif mask is not None:
        args.mask_token_stride = _step(mask, 1)
        args.mask_channel_stride = int(mask.shape[2:].numel() > 1)
    args.wide_index, args.wide_strength = (x.itemsize == 8 for x in (index, strength))
    return args


def guided_step_args(
    prediction: Tensor,
    state: Tensor,
    sample: Tensor,
    counter: Tensor,
    weights: Tensor,
    input_scales: Tensor,
    guidance: Tensor | None,
    noise: Tensor | None,
    latents: int,
) -> GuidedStepArgs:
    """Everything but the pointers, as csrc/guided_step.cpp does it."""
    args = GuidedStepArgs()
    args.lanes, args.row_size = state.shape[1], state.shape[2:].numel() if state.shape[1] else 0
    args.calls = weights.shape[0]
    args.latents, args.predictions = latents, state.shape[0] + 1 - latents
    args.prediction_lane_stride, args.sample_lane_stride = prediction.stride(0), sample.stride(0)
    args.state_slot_stride, args.state_lane_stride = state.stride()[:2]
    args.guidance_lane_stride = _step(guidance, 0)
    args.noise_call_stride = 0 if noise is None else noise.stride(0)
    args.noise_lane_stride = _step(noise, 1)
    args.dtype, args.state_dtype = _DTYPES.index(prediction.dtype), _DTYPES.index(state.dtype)
    args.wide_tables = weights.dtype == torch.float64
    return args
