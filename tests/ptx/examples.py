"""The example kernels with arguments: what several tests launch, and what should come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .launch import Argument, Compiler, Kernel, Options

NAN = float("nan")
# Relative RMS error of a result against float64, by what the kernel multiplies. The two halves
# round the weights between their two products; tf32 keeps ten bits.
TOLERANCE = {
    (torch.float16, "tf32"): 3e-3,
    (torch.bfloat16, "tf32"): 3e-3,
    (torch.float32, "tf32"): 3e-3,
    (torch.float32, "tf32x3"): 1e-6,
    (torch.float32, "ieee"): 1e-6,
}


@dataclass(frozen=True)
class Launch:
    """A kernel, what it is launched with, and the mathematics of it in float64."""

    kernel: Kernel
    grid: tuple[int, ...]
    arguments: Mapping[str, Argument]
    reference: Callable[[], Tensor]

    def run(self, kernel: Kernel | None = None, **changed: Any) -> Tensor:
        """The result, which was NaN before; of another, edited kernel if there is one."""
        out = self.arguments["out_ptr"]
        assert isinstance(out, Tensor)
        out.fill_(NAN)
        backwards = changed.pop("backwards", False)
        (kernel or self.kernel).launch(
            self.grid, {**self.arguments, **changed}, backwards=backwards
        )
        return out

    def error(self, kernel: Kernel | None = None, **changed: Any) -> float:
        """Relative RMS."""
        got, want = self.run(kernel, **changed).double(), self.reference()
        return float((got - want).norm() / want.norm())


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_wide_rows(tensor: Tensor, width: int) -> Tensor:
    """The same in rows with a gap behind each, which nobody may touch."""
    wide = tensor.new_full((*tensor.shape[:-1], width), NAN)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def matmul(
    compiler: Compiler,
    dtype: torch.dtype,
    precision: str = "tf32",
    shape: tuple[int, int, int] = (32, 32, 64),
    options: Options = Options(num_stages=2),  # noqa: B008  it can't be changed
) -> Launch:
    m, n, k = shape
    a, b = draw(m, k, dtype=dtype), draw(k, n, dtype=dtype, seed=1)
    arguments: dict[str, Argument] = {
        "out_ptr": torch.empty(m, n),
        "a_ptr": a,
        "b_ptr": b,
        "m_size": m,
        "n_size": n,
        "k_size": k,
    }
    constants = {"M": 32, "N": 32, "K": 32, "PRECISION": precision}
    kernel = compiler.compile("ptx.example_kernels:matmul", arguments, constants, options)
    grid = (-(-m // 32), -(-n // 32))
    return Launch(kernel, grid, arguments, lambda: a.double() @ b.double())


def attention(
    compiler: Compiler,
    dtype: torch.dtype,
    options: Options = Options(num_stages=2),  # noqa: B008  it can't be changed
    *,
    width: int = 64,
) -> Launch:
    """Two lanes that read each other's keys; 40 channels in rows of `width`, and no size is even
    with a block. Rows of 64 halves are aligned, so that copies are asynchronous."""
    lanes, queries, keys, channels = 2, 45, 70, 40
    q, k, v = (
        in_wide_rows(draw(lanes, size, channels, dtype=dtype, seed=seed), width)
        for seed, size in enumerate((queries, keys, keys))
    )
    slot = torch.tensor([1, 0], dtype=torch.int32)
    arguments: dict[str, Argument] = {
        "out_ptr": in_wide_rows(torch.empty_like(q), width),
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "slot_ptr": slot,
        "scale": channels**-0.5,
        "queries_size": queries,
        "keys_size": keys,
        "q_stride": width,
        "kv_stride": width,
        "slot_stride": keys * width,
    }
    constants = {"D": channels, "WIDTH": 64, "M": 32, "N": 32}
    kernel = compiler.compile("ptx.example_kernels:attention", arguments, constants, options)

    def reference() -> Tensor:
        score = q.double() @ k.double()[slot].mT * channels**-0.5
        result: Tensor = score.softmax(-1) @ v.double()[slot]
        return result

    return Launch(kernel, (-(-queries // 32), lanes), arguments, reference)
