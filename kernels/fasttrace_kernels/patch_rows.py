"""patch_rows: lanes take rows of other lanes, or of a cache. `reference.patch_rows` is the maths.

A lane with index -1 or strength 0 keeps its row bit for bit and its source is never looked at;
strength 1 copies the source bit for bit; between them (and outside) it is a float32 lerp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _registry, reference
from ._triton import jit, tl, triton

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def patch_rows(
    out: Tensor,
    source: Tensor,
    index: Tensor,
    strength: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """A copy of `out` with rows patched from `source`; differentiable in out, strength and mask.

    out [L, ...] and source [S, ...], S >= 1, have one float dtype and rows of one shape.
    index [L] int32 or int64: the row of `source` a lane reads, -1 for none.
    strength [L] float32 (float64 for a float64 out).
    mask, bool or of strength's dtype, multiplies strength. It broadcasts against `out` from the
    left, and is all full or all 1 past dimension 1: [L, N] picks tokens of [L, N, C] and channels
    of [L, C, H, W], [L, 1, C] channels of [L, N, C], [L, 1, H, W] places of [L, C, H, W].

    `source` is a constant: no gradient flows into it. The gradient to strength is
    <source - out, gradient> at every strength, 0 included.

    Raises RuntimeError if shapes, dtypes or devices don't fit, and on the CPU if an index is
    outside -1 ... S-1. CUDA can't look without a sync: there such a lane becomes NaN (and its
    gradient fails), so whoever fills the table checks it.
    """
    result: Tensor = torch.ops.fasttrace.patch_rows.default(out, source, index, strength, mask)
    return result


def patch_rows_(
    out: Tensor,
    source: Tensor,
    index: Tensor,
    strength: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """`patch_rows` in place, for inference; returns `out`. RuntimeError if a gradient is required.

    `source` may be `out` itself or a part of it, as long as no row that is read is rewritten too
    (a lane that reads itself is fine). The CPU checks that; on CUDA such a row is undefined.
    """
    torch.ops.fasttrace.patch_rows_.default(out, source, index, strength, mask)
    return out


def require(condition: bool, message: str) -> None:
    # RuntimeError, because that is what reaches Python from the compiled checks.
    if not condition:
        raise RuntimeError(f"patch_rows: {message}")


def check_shapes(
    out: Tensor, source: Tensor, index: Tensor, strength: Tensor, mask: Tensor | None
) -> None:
    shape = list(out.shape)
    require(out.dtype in FLOATS, "out must be float16, bfloat16, float32 or float64")
    require(
        out.dim() >= 2, f"out must be [L, ...] with at least two dimensions, got {list(out.shape)}"
    )
    require(
        source.dim() == out.dim() and source.shape[0] > 0 and source.shape[1:] == out.shape[1:],
        f"source must be [S, ...] with S >= 1 and the rows of out {shape}, "
        f"got {list(source.shape)}",
    )
    require(source.dtype == out.dtype, "source and out must have one dtype")
    tables = {"index": index, "strength": strength}
    others = [source, index, strength] if mask is None else [source, index, strength, mask]
    require(
        all(other.device == out.device for other in others),
        "out and every other tensor must be on one device",
    )
    for name, table in tables.items():
        require(
            table.shape == out.shape[:1],
            f"{name} must be [{shape[0]}], one entry a lane, got {list(table.shape)}",
        )
    require(index.dtype in (torch.int32, torch.int64), "index must be int32 or int64")
    numbers = (torch.float32, torch.float64) if out.dtype == torch.float64 else (torch.float32,)
    suffix = " must be float32 (float64 is for a float64 out)"
    require(strength.dtype in numbers, "strength" + suffix)
    if mask is None:
        return
    pairs = list(zip(mask.shape, out.shape, strict=False))
    rest_one = all(have == 1 for have, _ in pairs[2:])
    rest_full = mask.dim() == out.dim() and all(have == full for have, full in pairs[2:])
    require(
        1 <= mask.dim() <= out.dim()
        and all(have in (1, full) for have, full in pairs)
        and (rest_one or rest_full),
        f"mask must broadcast from the left against out {shape} "
        f"and be all full or all 1 past dimension 1, got {list(mask.shape)}",
    )
    require(mask.dtype in (torch.bool, *numbers), "a mask that is not bool" + suffix)


def check_tables(out: Tensor, source: Tensor, index: Tensor, strength: Tensor) -> None:
    """What only the values tell; for tables on the CPU."""
    rows = source.shape[0]
    read = {}
    for lane, (row, amount) in enumerate(zip(index.tolist(), strength.tolist(), strict=True)):
        require(
            -1 <= row < rows,
            f"index[{lane}] is {row}, but source has {rows} rows; "
            f"expected -1 (not patched) to {rows - 1}",
        )
        if row >= 0 and amount != 0:
            read[lane] = _span(source, row)
    if source.untyped_storage().data_ptr() != out.untyped_storage().data_ptr():
        return
    for reader, (start, stop) in read.items():
        for writer in read:
            low, high = _span(out, writer)
            itself = reader == writer and (low, high) == (start, stop)
            require(
                itself or stop <= low or high <= start,
                f"lane {reader} reads row {index[reader]} of source, which is lane {writer} of out "
                "and is patched in the same call",
            )


def _span(tensor: Tensor, row: int) -> tuple[int, int]:
    # In elements of the storage: from the first of a row to past its last.
    start = int(tensor.storage_offset()) + row * tensor.stride(0)
    steps = zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    return start, start + 1 + sum((size - 1) * stride for size, stride in steps)


def fallback_(
    out: Tensor, source: Tensor, index: Tensor, strength: Tensor, mask: Tensor | None = None
) -> None:
    """The CPU op where nothing is compiled: the reference, on the patched lanes alone."""
    check_shapes(out, source, index, strength, mask)
    check_tables(out, source, index, strength)
    lanes = torch.nonzero(index >= 0).flatten()
    if lanes.numel() == 0:
        return
    chosen_mask = mask if mask is None or mask.shape[0] == 1 else mask.index_select(0, lanes)
    tables = index.index_select(0, lanes), strength.index_select(0, lanes)
    rows = reference.patch_rows(out.index_select(0, lanes), source, *tables, chosen_mask)
    out.index_copy_(0, lanes, rows)


@jit
def patch_rows_kernel(
    out_ptr,
    source_ptr,
    index_ptr,
    strength_ptr,
    mask_ptr,
    row_size,
    channels_size,
    source_size,
    out_lane_stride,
    source_row_stride,
    mask_lane_stride,
    mask_token_stride,
    mask_channel_stride,
    HAS_MASK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane_idx = tl.program_id(1).to(tl.int64)
    row_idx = tl.load(index_ptr + lane_idx).to(tl.int64)
    strength = tl.load(strength_ptr + lane_idx).to(WIDE)
    if (row_idx != -1) & (strength != 0):
        element_offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        write_mask = element_offs < row_size
        # Broadcast before comparing: the interpreter mistypes a compared scalar that is broadcast.
        rows = tl.broadcast_to(row_idx, [BLOCK])
        amount = tl.broadcast_to(strength, [BLOCK])
        if HAS_MASK:
            token_idx = element_offs // channels_size
            mask_offs = lane_idx * mask_lane_stride + token_idx * mask_token_stride
            mask_offs += (element_offs - token_idx * channels_size) * mask_channel_stride
            amount *= tl.load(mask_ptr + mask_offs, mask=write_mask, other=0).to(WIDE)
        # The host can't see the index without a sync, so a row out of range shows itself as NaN.
        read_mask = write_mask & (rows >= 0) & (rows < source_size)
        source_offs = rows * source_row_stride + element_offs
        new = tl.load(source_ptr + source_offs, mask=read_mask, other=float("nan"))
        out_offs = lane_idx * out_lane_stride + element_offs
        old = tl.load(out_ptr + out_offs, mask=write_mask)
        start = old.to(WIDE)
        between = (start + amount * (new.to(WIDE) - start)).to(new.dtype)
        result = tl.where(amount == 0, old, tl.where(amount == 1, new, between))
        tl.store(out_ptr + out_offs, result, mask=write_mask)


@dataclass(frozen=True)
class Launch:
    """How the Triton kernel is launched."""

    block: int = 1024  # 128-bit loads of fp16 with 128 threads
    num_warps: int = 4


DEFAULT_LAUNCH = Launch()


def rows_are_dense(tensor: Tensor) -> bool:
    """No gap and no overlap within a row, in whatever order of the dimensions."""
    steps = sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True))
    expected = 1
    for stride, size in steps:
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def launch_(
    out: Tensor,
    source: Tensor,
    index: Tensor,
    strength: Tensor,
    mask: Tensor | None = None,
    launch: Launch = DEFAULT_LAUNCH,
) -> None:
    """The Triton form of `patch_rows_`."""
    check_shapes(out, source, index, strength, mask)
    any_order = mask is None and rows_are_dense(out) and source.stride()[1:] == out.stride()[1:]
    if not any_order and not out[:1].is_contiguous():
        packed = out.contiguous()
        launch_(packed, source, index, strength, mask, launch)
        out.copy_(packed)
        return
    lanes, row_size = out.shape[0], out[:1].numel()
    require(lanes <= 1 or out.stride(0) >= row_size, "the rows of out overlap in memory")
    if row_size * lanes == 0:
        return
    if not any_order and not source[:1].is_contiguous():
        source = source.contiguous()
    tokens = 1 if out.dim() == 2 else out.shape[1]
    part, strides = _mask_strides(mask, out, strength)
    grid = (triton.cdiv(row_size, launch.block), lanes)
    with torch.cuda.device_of(out):
        patch_rows_kernel[grid](
            out_ptr=out,
            source_ptr=source,
            index_ptr=index.contiguous(),
            strength_ptr=strength.contiguous(),
            mask_ptr=part,
            row_size=row_size,
            channels_size=row_size // tokens,
            source_size=source.shape[0],
            out_lane_stride=out.stride(0),
            source_row_stride=source.stride(0),
            mask_lane_stride=strides[0],
            mask_token_stride=strides[1],
            mask_channel_stride=strides[2],
            HAS_MASK=mask is not None,
            WIDE=tl.float64 if out.dtype == torch.float64 else tl.float32,
            BLOCK=launch.block,
            num_warps=launch.num_warps,
        )


def _mask_strides(
    mask: Tensor | None, out: Tensor, strength: Tensor
) -> tuple[Tensor, tuple[int, int, int]]:
    # With out seen as [L, N, C]; a stride of 0 broadcasts. Without a mask the pointer isn't read.
    if mask is None:
        return strength, (0, 0, 0)
    part = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    part = part.contiguous().reshape(part.shape + (1,) * (out.dim() - part.dim()))
    lane, second = (0 if part.shape[d] == 1 else part.stride(d) for d in (0, 1))
    if out.dim() == 2:
        return part, (lane, 0, second)
    return part, (lane, second, int(part[0, 0].numel() > 1))


def _functional(in_place: Any) -> Any:
    def patched(
        out: Tensor, source: Tensor, index: Tensor, strength: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        result = out.clone()
        in_place(result, source, index, strength, mask)
        return result

    return patched


def _fake_(
    out: Tensor, source: Tensor, index: Tensor, strength: Tensor, mask: Tensor | None = None
) -> None:
    check_shapes(out, source, index, strength, mask)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    out, source, index, strength, mask = ctx.saved_tensors
    wide = torch.promote_types(out.dtype, torch.float32)
    a_lane = (-1,) + (1,) * (out.dim() - 1)
    scale, patched = strength.to(wide).reshape(a_lane), (index >= 0).reshape(a_lane)
    part = torch.ones_like(scale) if mask is None else mask.to(wide)
    part = part.reshape(part.shape + (1,) * (out.dim() - part.dim()))
    grad_out = grad_strength = grad_mask = None
    if ctx.needs_input_grad[0]:
        grad_out = (grad.to(wide) * (1 - torch.where(patched, scale * part, 0))).to(out.dtype)
    if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
        new = source.index_select(0, index.clamp(min=0)).to(wide)
        slope = torch.where(patched, (new - out.to(wide)) * grad.to(wide), 0)
        # `where` keeps a NaN out of a sum it has no part in: 0 * NaN is NaN.
        if ctx.needs_input_grad[3]:
            summed = torch.where(part == 0, 0, part * slope).flatten(1).sum(1)
            grad_strength = summed.to(strength.dtype)
        if ctx.needs_input_grad[4]:
            summed = torch.where(scale == 0, 0, scale * slope).sum_to_size(part.shape)
            grad_mask = summed.reshape(mask.shape).to(mask.dtype)
    return grad_out, None, None, grad_strength, grad_mask


_ARGUMENTS = "Tensor source, Tensor index, Tensor strength, Tensor? mask"
_registry.define(
    f"patch_rows(Tensor out, {_ARGUMENTS}) -> Tensor",
    cpu=_functional(fallback_),
    cuda=_functional(launch_),
    fake=_functional(_fake_),
)
_registry.define_gradient("patch_rows", _backward, _setup_context)
_registry.define(
    f"patch_rows_(Tensor(a!) out, {_ARGUMENTS}) -> ()", cpu=fallback_, cuda=launch_, fake=_fake_
)
_registry.refuse_gradient(
    "patch_rows_", "use patch_rows, or call it under torch.no_grad()", mutates=0
)
