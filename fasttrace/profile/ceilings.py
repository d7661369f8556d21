"""What this machine can do at best, measured: matrix products, copies, starting an operator."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

from fasttrace.engine.memory import available_bytes

_ENOUGH = 0.02  # seconds of one product: longer ones are no faster
_SIZES = (256, 512, 1024, 2048, 4096, 8192)
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
    """gemm: FLOP/s of the quickest square product, by dtype; size: of it.

    copy: bytes a second, read and written. dispatch: seconds until an operator with next to nothing
    to do returns.
    """

    gemm: Mapping[str, Measured]
    size: Mapping[str, int]
    copy: Measured
    dispatch: float

    def of(self, dtype: str) -> float:
        """FLOP/s that a model of this dtype could reach."""
        return self.gemm[dtype].highest


def measure_ceilings(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> Ceilings:
    """seconds: of each of the three or four measurements, about."""
    gemm, size = {}, {}
    with torch.no_grad():
        for kind in dict.fromkeys((torch.float32, dtype)):
            name = str(kind).removeprefix("torch.")
            gemm[name], size[name] = _gemm(device, kind, seconds)
        return Ceilings(gemm, size, _copy(device, seconds), _dispatch(device))


def _gemm(device: torch.device, dtype: torch.dtype, seconds: float) -> tuple[Measured, int]:
    """Of all sizes up to one that takes long enough, that which is multiplied quickest."""
    best: tuple[Measured, int] | None = None
    for size in _SIZES:
        left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        out = torch.empty_like(left)

        def product(a: torch.Tensor = left, b: torch.Tensor = right, c: torch.Tensor = out) -> None:
            torch.mm(a, b, out=c)

        product()
        took = min(_took(product, device) for _ in range(2))
        found = _rate(product, 2 * size**3, device, seconds / 3, took)
        if best is None or found.highest > best[0].highest:
            best = found, size
        if took >= _ENOUGH:
            break
    assert best is not None
    return best


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
    work: Callable[[], None], amount: float, device: torch.device, seconds: float, took: float
) -> Measured:
    runs = int(min(200, max(5, seconds / max(took, 1e-6))))
    rates = [amount / _took(work, device) for _ in range(runs)]
    return Measured(median(rates), min(rates), max(rates), runs)


def _took(work: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(time.perf_counter() - start, 1e-9)
