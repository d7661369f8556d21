"""The PTX for sm_80 that Triton and nvcc emit, executed on a CPU.

The way through: values, parse, memory and shared_memory, machine, the tables in opcodes*; launch
for Triton's kernels, which one process compiles, and nvcc for those of csrc/*.cu.
What it can't see: races between blocks (but `backwards` changes their order), races in global
memory between threads of a block, how long anything takes, and what a GPU leaves open, such as the
order of a sum within `mma`. What a warp does together is refused where threads have parted.
"""

from collections.abc import Iterator

import pytest

from fasttrace_kernels.patch_attention import launch

from .fused_attention import KERNEL, Attention
from .launch import Compiler, EmulatedKernel


@pytest.fixture(scope="session")
def compiler() -> Iterator[Compiler]:
    compiler = Compiler()
    yield compiler
    compiler.close()


@pytest.fixture
def fused(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> Attention:
    """patch_attention's launchers, which take the CPU for an sm_80."""
    kernel = EmulatedKernel(compiler, KERNEL)
    monkeypatch.setitem(launch.__globals__, "patch_attention_kernel", kernel)
    monkeypatch.setitem(launch.__globals__, "architecture", lambda device: 80)
    return Attention(kernel)
