"""What this machine can do at best, measured: dense products, copies, starting an operator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch.nn.functional import conv2d

from fasttrace.engine.memory import available_bytes

_ENOUGH = 0.02  # seconds of one product: longer ones are no faster
_SIZES = (256, 512, 1024, 2048, 4096, 8192)
# 3x3 convolutions: rows, channels, side. Some libraries are far quicker at them than at products.
_CONVOLUTIONS = ((4, 256, 16), (4, 256, 32), (4, 256, 64), (16, 512, 64))
_COPIED = 128 << 20  # bytes: more than a cache holds


@dataclass(frozen=True)
class Measured:
    """A rate a second: the median of `runs`, and the extremes. The highest is the ceiling."""

    median: float
    lowest: float
    highest: float
    runs: int


@dataclass(frozen=True)
class Ceilings:
    """gemm: FLOP/s of the quickest dense product by dtype; by: which that was, in words.

    copy: bytes a second, read and written. dispatch: seconds until an operator with next to nothing
    to do returns.
    """

    gemm: Mapping[str, Measured]
    by: Mapping[str, str]
    copy: Measured
    dispatch: float

    def of(self, dtype: str) -> float:
        """FLOP/s that a model of this dtype could reach."""
        return self.gemm[dtype].highest


def measure_ceilings(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> Ceilings:
    """seconds: of each of the three or four measurements, about."""
    gemm, by = {}, {}
    with torch.no_grad():
        for kind in dict.fromkeys((torch.float32, dtype)):
            name = str(kind).removeprefix("torch.")
            gemm[name], by[name] = _gemm(device, kind, seconds)
        return Ceilings(gemm, by, _copy(device, seconds), _dispatch(device))


def _gemm(device: torch.device, dtype: torch.dtype, seconds: float) -> tuple[Measured, str]:
    """The quickest of square products and of convolutions, up to those that take long enough."""
    best: tuple[Measured, str] | None = None
    for kind in (_products(device, dtype), _convolutions(device, dtype)):
        for name, work, amount in kind:
            work()
            took = min(_took(work, device) for _ in range(2))
            found = _rate(work, amount, device, seconds / 6, took)
            if best is None or found.highest > best[0].highest:
                best = found, name
            if took >= _ENOUGH:
                break
    assert best is not None
    return best


Work = tuple[str, Callable[[], object], int]  # its name, once of it, FLOPs


def _products(device: torch.device, dtype: torch.dtype) -> Iterator[Work]:
    for size in _SIZES:
        left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        out = torch.empty_like(left)
        yield f"product of size {size}", partial(torch.mm, left, right, out=out), 2 * size**3


def _convolutions(device: torch.device, dtype: torch.dtype) -> Iterator[Work]:
    for rows, channels, side in _CONVOLUTIONS:
        picture = torch.ones(rows, channels, side, side, dtype=dtype, device=device)
        kernel = torch.ones(channels, channels, 3, 3, dtype=dtype, device=device)
        amount = 2 * rows * 9 * channels**2 * side**2
        name = f"3x3 convolution of {channels} channels"
        yield name, partial(conv2d, picture, kernel, padding=1), amount


def _copy(device: torch.device, seconds: float) -> Measured:
    free = available_bytes(device)
    size = _COPIED if free is None else max(1 << 20, min(_COPIED, free // 8))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def copy() -> None:
        target.copy_(source)

    copy()
    return _rate(copy, 2 * size, device, seconds, _took(copy, device))


def _dispatch(device: torch.device, repeats: int = 2000) -> float:
    """Not waited for: on a GPU it is the time to start a kernel."""
    number = torch.zeros(1, device=device)
    found = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            number.add_(1)
        found.append((time.perf_counter() - start) / repeats)
    return median(found)


def _rate(
    work: Callable[[], object], amount: float, device: torch.device, seconds: float, took: float
) -> Measured:
    runs = int(min(200, max(5, seconds / max(took, 1e-6))))
    rates = [amount / _took(work, device) for _ in range(runs)]
    return Measured(median(rates), min(rates), max(rates), runs)


def _took(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(time.perf_counter() - start, 1e-9)
