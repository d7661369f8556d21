"""What guided_step_ asks of its arguments, in the words of csrc/guided_step.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_KEPT = 8  # as in csrc/ops.h: a thread holds all of them at once


def require(condition: bool, message: str) -> None:
    # RuntimeError, because that is what reaches Python from the compiled checks.
    if not condition:
        raise RuntimeError(f"guided_step_: {message}")


def check_shapes(
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
    dtype, row = prediction.dtype, list(prediction.shape[1:])
    require(dtype in FLOATS, "prediction must be float16, bfloat16, float32 or float64")
    require(
        prediction.dim() >= 2,
        f"prediction must be [L, ...] with at least two dimensions, got {list(prediction.shape)}",
    )
    halves = dtype in (torch.float16, torch.bfloat16)
    require(
        state.dtype == dtype or (halves and state.dtype == torch.float32),
        "state must have prediction's dtype, or be float32 beside a half-precision prediction",
    )
    require(
        state.dim() == prediction.dim() + 1
        and 1 <= state.shape[0] <= MOST_KEPT
        and list(state.shape[2:]) == row,
        f"state must be [kept, L, ...] with kept 1 to {MOST_KEPT} and the rows of prediction "
        f"{list(prediction.shape)}, got {list(state.shape)}",
    )
    kept, lanes = state.shape[:2]
    branches = 1 if guidance is None else 2
    require(
        prediction.shape[0] == branches * lanes,
        f"prediction must have {branches * lanes} rows, {branches} for each of the {lanes} lanes "
        f"of state ({'no' if guidance is None else 'a'} guidance is given), "
        f"got {prediction.shape[0]}",
    )
    require(
        sample.shape == prediction.shape and sample.dtype == dtype,
        f"sample must have the shape and dtype of prediction, {list(prediction.shape)}, "
        f"got {list(sample.shape)}",
    )
    require(
        list(counter.shape) == [2] and counter.dtype == torch.int64 and counter.is_contiguous(),
        "counter must be [2] int64 without gaps, the number of the call and a ticket, "
        f"got {list(counter.shape)}",
    )
    require(
        1 <= latents <= kept,
        f"latents must be 1 to {kept}, of the {kept} tensors that state keeps, got {latents}",
    )
    _check_tables(state, weights, input_scales, guidance, noise)
    optional = [tensor for tensor in (guidance, noise) if tensor is not None]
    require(
        all(
            other.device == prediction.device
            for other in (state, sample, counter, weights, input_scales, *optional)
        ),
        "prediction and every other tensor must be on one device",
    )


def _check_tables(
    state: Tensor,
    weights: Tensor,
    input_scales: Tensor,
    guidance: Tensor | None,
    noise: Tensor | None,
) -> None:
    kept, lanes = state.shape[:2]
    slots = kept + 1 + (noise is not None)
    require(weights.dtype in (torch.float32, torch.float64), "weights must be float32 or float64")
    require(
        weights.dim() == 2 and weights.shape[0] >= 1 and weights.shape[1] == slots,
        f"weights must be [T, {slots}] with T >= 1, one a slot: {kept} kept, the new prediction"
        f"{'' if noise is None else ' and noise'}; got {list(weights.shape)}",
    )
    calls = weights.shape[0]
    require(
        list(input_scales.shape) == [calls + 1],
        f"input_scales must be [{calls + 1}], one more than there are calls, "
        f"got {list(input_scales.shape)}",
    )
    require(
        input_scales.dtype == weights.dtype
        and (guidance is None or guidance.dtype == weights.dtype),
        "weights, input_scales and guidance must have one dtype",
    )
    require(
        guidance is None or (guidance.dim() == 1 and guidance.shape[0] in (1, lanes)),
        f"guidance must be [{lanes}], one entry a lane, or [1], "
        f"got {[] if guidance is None else list(guidance.shape)}",
    )
    if noise is None:
        return
    require(
        noise.dim() == state.dim()
        and noise.shape[0] == calls
        and noise.shape[1] in (1, lanes)
        and noise.shape[2:] == state.shape[2:],
        f"noise must be [{calls}, {lanes} or 1, ...] with the rows of state {list(state.shape)}, "
        f"got {list(noise.shape)}",
    )
    require(noise.dtype == state.dtype, "noise must have the dtype of state")


def check_memory(state: Tensor, sample: Tensor, *others: Tensor | None) -> None:
    """What is written in place: rows without gaps, and memory that no other argument lies in."""
    require(
        rows_are_contiguous(state, 2) and rows_are_contiguous(sample, 1),
        "the rows of state and sample must be contiguous",
    )
    require(
        _rows_are_apart(state, 2) and _rows_are_apart(sample, 1),
        "the rows of state and sample must not overlap in memory",
    )
    written = [_span(state), _span(sample)]
    read = [_span(other) for other in others if other is not None]
    for which, (low, high) in enumerate(written):
        for start, stop in (*written[which + 1 :], *read):
            require(
                stop <= low or high <= start or start == stop or low == high,
                "state and sample must not share memory with each other or another tensor",
            )


def check_call(counter: Tensor, weights: Tensor) -> int:
    """What only the values tell; for tables on the CPU."""
    call, calls = int(counter[0]), weights.shape[0]
    require(
        0 <= call < calls,
        f"counter says that call {call} was made, but weights has {calls} calls; "
        f"expected 0 to {calls - 1}",
    )
    return call


def rows_are_contiguous(tensor: Tensor, first: int) -> bool:
    expected = 1
    for size, stride in zip(
        tensor.shape[: first - 1 : -1], tensor.stride()[: first - 1 : -1], strict=True
    ):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _rows_are_apart(tensor: Tensor, first: int) -> bool:
    # A row's elements, then the rows of the nearer dimension, and so on outwards.
    span = 1
    for size in tensor.shape[first:]:
        span *= size
    for stride, size in sorted(zip(tensor.stride()[:first], tensor.shape[:first], strict=True)):
        if size > 1 and stride < span:
            return False
        span += (size - 1) * stride
    return True


def _span(tensor: Tensor) -> tuple[int, int]:
    # In bytes: from the first element to past the last.
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()
