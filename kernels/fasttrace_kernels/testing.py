"""Comparisons whose failures explain themselves."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Data movement is exact, NaN payloads included."""
    _assert_alike(got, want)
    bits = _BITS[want.element_size()]
    wrong = got.contiguous().view(bits) != want.contiguous().view(bits)
    if wrong.any():
        raise AssertionError(
            f"{_share(wrong)} elements differ in their bits; {_first(wrong, got, want)}"
        )


def assert_within(got: Tensor, want: Tensor, tolerance: float) -> None:
    """|got - want| <= tolerance x max(|want|, rms of want); NaN and infinities as in want."""
    _assert_alike(got, want)
    wide_got, wide_want = got.double(), want.double()
    finite = wide_want.isfinite()
    wrong = ~finite & ~torch.isclose(wide_got, wide_want, equal_nan=True)
    if wrong.any():
        raise AssertionError(f"{_share(wrong)} special values differ; {_first(wrong, got, want)}")
    if not finite.any():
        return
    rms = wide_want[finite].square().mean().sqrt()
    scale = wide_want.abs().clamp(min=rms.item() or 1.0)
    error = torch.where(finite, (wide_got - wide_want) / scale, 0).abs()
    wrong = ~(error <= tolerance)
    if wrong.any():
        relative_rms = error.square().mean().sqrt()
        raise AssertionError(
            f"relative error: max {error.max():.2e}, rms {relative_rms:.2e}, "
            f"allowed {tolerance:.2e}; {_share(wrong)} elements are off; {_first(wrong, got, want)}"
        )


def _assert_alike(got: Tensor, want: Tensor) -> None:
    have, need = (got.shape, got.dtype), (want.shape, want.dtype)
    if have != need:
        raise AssertionError(f"got {have}, expected {need}")


def _share(wrong: Tensor) -> str:
    return f"{int(wrong.sum())} of {wrong.numel()}"


def _first(wrong: Tensor, got: Tensor, want: Tensor) -> str:
    where = tuple(int(i) for i in wrong.nonzero()[0])
    return f"first at {list(where)}: got {got[where].item()}, expected {want[where].item()}"
