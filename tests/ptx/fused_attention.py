"""patch_attention as sm_80 gets it: its own launcher, its own configurations, executed in numpy.

Beside it the mathematics in float64, which shares nothing with any form of the op.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fasttrace_kernels.patch_attention import launch, launch_maps

from .examples import draw
from .launch import EmulatedKernel, Kernel
from .memory import GlobalMemory

NAN = float("nan")
KERNEL = "fasttrace_kernels.patch_attention_kernel:patch_attention_kernel"
# Relative RMS error against float64. Halves round the weights before the second product, the
# result, and what a lerp makes of two results; float32 rounds sums of up to 160 products.
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 3e-3, torch.float32: 1e-6}
# The scores are sums in float32 for every dtype, and so are the probabilities.
MAPS_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Example:
    """Heads within wider rows of tokens, [L, N, H, D + gap]: what lies between is NaN, and nobody
    may touch it. A gap of 8 halves keeps rows aligned, so that copies are asynchronous."""

    dtype: torch.dtype = torch.float16
    size: int = 40
    tokens: int = 70
    keys: int = 77
    lanes: int = 3
    heads: int = 2
    slots: int = 2
    gap: int = 8

    tensors: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        lengths = {
            "query": (self.lanes, self.tokens),
            "key": (self.slots, self.keys),
            "value": (self.slots, self.keys),
        }
        drawn = {
            name: self._in_gaps(draw(*length, self.heads, self.size, seed=seed))
            for seed, (name, length) in enumerate(lengths.items())
        }
        object.__setattr__(self, "tensors", drawn)

    def _in_gaps(self, rows: Tensor) -> Tensor:
        wide = torch.full((*rows.shape[:-1], self.size + self.gap), NAN, dtype=self.dtype)
        wide[..., : self.size] = rows.to(self.dtype)
        return wide[..., : self.size].transpose(1, 2)

    def tables(self) -> dict[str, Tensor]:
        """Every head of a lane but some takes another lane's; all kinds of strength."""
        lane, head = torch.meshgrid(
            torch.arange(self.lanes), torch.arange(self.heads), indexing="ij"
        )
        token = torch.arange(self.tokens)
        amounts = torch.tensor([0.0, 1.0, 0.5, 1.0, 0.25, 0.0, 0.75])
        index = (lane + 1 + head % 2) % self.lanes
        return {
            "kv_index": (self.slots - 1 - torch.arange(self.lanes)) % self.slots,
            "index": torch.where((lane + head) % 3 == 0, -1, index),
            "strength": amounts[(token + 3 * torch.arange(self.lanes)[:, None]) % 7],
        }


def exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_index: Tensor | None = None,
    index: Tensor | None = None,
    strength: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The result and its probabilities, of the same inputs in float64."""
    lanes, heads, _, size = query.shape
    slot = torch.arange(lanes) if kv_index is None else kv_index.long()
    q, k, v = query.double(), key.double()[slot], value.double()[slot]
    own_maps = torch.softmax(q @ k.mT * (size**-0.5 if scale is None else scale), -1)
    results = []
    for own in (own_maps @ v, own_maps):
        if index is not None:
            share = torch.ones(lanes, 1) if strength is None else strength
            share = share.double()[:, None, :, None] * (index >= 0)[..., None, None]
            taken = own[index.long().clamp(min=0), torch.arange(heads)]
            own = own + share * (taken - own)
        results.append(own)
    return results[0], results[1]


def error(got: Tensor, want: Tensor) -> float:
    """The largest relative RMS error of any head of any lane: one that is wrong can't hide among
    those that are right."""
    off = (got.double() - want).flatten(2).norm(dim=2) / want.flatten(2).norm(dim=2)
    return float(off.max())  # NaN if anything is NaN


@dataclass
class Attention:
    """`out` and `maps` are the launchers, with an emulator where the GPU would be."""

    kernel: EmulatedKernel

    def out(self, *tensors: Tensor, **given: Any) -> Tensor:
        return launch(*tensors, **given)

    def maps(self, *tensors: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        return launch_maps(*tensors, **given)

    def compiled(self, run: Callable[[], Any]) -> Kernel:
        """What `run` launches."""
        seen: list[Kernel] = []
        edit = self.kernel.edit

        def look(kernel: Kernel) -> Kernel:
            seen.append(kernel)
            return edit(kernel)

        self.kernel.edit = look
        try:
            run()
        finally:
            self.kernel.edit = edit
        (kernel,) = seen
        return kernel

    @property
    def memory(self) -> GlobalMemory:
        """After the latest launch: which elements it read and wrote."""
        return self.kernel.launches[-1]
