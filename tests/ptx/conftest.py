"""The PTX for sm_80 that Triton and nvcc emit, executed on a CPU.

The way through: values, parse, memory and shared_memory, machine, the tables in opcodes*; launch
for Triton's kernels, which one process compiles, and nvcc for those of csrc/*.cu.
What it can't see: races between blocks (but `backwards` changes their order), races in global
memory between threads of a block, how long anything takes, and what a GPU leaves open, such as the
order of a sum within `mma`. What a warp does together is refused where threads have parted.
"""

from collections.abc import Callable, Iterator

import pytest
from torch import Tensor

from fasttrace_kernels.patch_attention import launch

from .fused_attention import KERNEL, Attention
from .launch import Compiler, EmulatedKernel


@pytest.fixture(scope="session")
def compiler() -> Iterator[Compiler]:
    compiler = Compiler()
    yield compiler
    compiler.close()


def poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *given: empty(*given).fill_(float("nan"))


@pytest.fixture
def fused(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> Attention:
    """patch_attention's launchers, which take the CPU for an sm_80; results were NaN before."""
    kernel = EmulatedKernel(compiler, KERNEL)
    names = launch.__globals__
    monkeypatch.setitem(names, "patch_attention_kernel", kernel)
    monkeypatch.setitem(names, "architecture", lambda device: 80)
    for name in ("_empty_like", "_empty_maps"):
        monkeypatch.setitem(names, name, poisoned(names[name]))
    return Attention(kernel)
