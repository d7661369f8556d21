"""csrc/*.cu as nvcc compiles it: its host code launches, the PTX of its kernels is executed.

op = compile_op("patch_rows", folder); op.launch(args, tensors)
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .csrc_structs import STRUCTS
from .launch import as_array, bound, run_blocks
from .memory import GlobalMemory
from .parse import parse

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"

_ENTRY = re.compile(r"^\.entry (\w+)", re.MULTILINE)
_POINTER = re.compile(r"\s+(?:mov\.b64|add\.s64)\s+(%\w+), ([%\w]+)(?:, (\d+))?;")
_LOAD = re.compile(r"\s+ld\.param\.(u\d+)\s+(%\w+), \[([%\w]+)(?:\+(-?\d+))?\];")

_SIZE = ctypes.POINTER(ctypes.c_uint * 3)
_LISTENER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, _SIZE, _SIZE, ctypes.POINTER(ctypes.c_void_p))


def missing() -> str | None:
    """Why csrc/*.cu can't be compiled here, if it can't."""
    if shutil.which("nvcc") is None:
        return "there is no nvcc on the path to compile csrc/*.cu"
    return None


@dataclass(frozen=True)
class Launch:
    """What the host code asked the driver for."""

    kernel: str
    grid: tuple[int, int, int]
    threads_count: int
    args: bytes

    @property
    def packed(self) -> bool:
        """Whether it is the form that moves 16 bytes at a time."""
        return re.search(r"Li1EEEv", self.kernel) is None


@dataclass(frozen=True)
class CompiledOp:
    name: str
    ptx: str
    library: ctypes.CDLL
    launches: list[Launch] = field(default_factory=list)

    def launch(
        self,
        args: ctypes.Structure,
        tensors: Mapping[str, Tensor | None],
        *,
        backwards: bool = False,
        blocks: int | None = None,
    ) -> GlobalMemory:
        """Tensors by the names of the struct's pointers. `blocks` a lane instead of the host's
        choice: the kernels walk a row with however many there are."""
        arrays = {name: as_array(tensor) for name, tensor in tensors.items() if tensor is not None}
        memory = GlobalMemory(arrays)
        for name in arrays:
            setattr(args, name, memory.address(name))
        for launch in self._launches_of(args):
            if blocks is not None:
                launch = replace(launch, grid=(blocks, *launch.grid[1:]))
            self.launches.append(launch)
            program, operations = bound(self.ptx, launch.kernel)
            (parameter,) = program.parameters
            run_blocks(
                launch.grid,
                backwards=backwards,
                program=program,
                operations=operations,
                memory=memory,
                parameters={parameter: launch.args},
                shared_size=0,
                threads_count=launch.threads_count,
            )
        return memory

    def _launches_of(self, args: ctypes.Structure) -> list[Launch]:
        found = []

        def listener(kernel: bytes, grid: Any, block: Any, pointers: Any) -> None:
            x, y, z = block.contents
            struct = ctypes.string_at(pointers[0], ctypes.sizeof(args))
            found.append(Launch(kernel.decode(), tuple(grid.contents), x * y * z, struct))

        callback = _LISTENER(listener)
        self.library.listen(callback)
        struct = type(args).__name__
        symbol = f"_ZN9fasttrace{_mangled(f'{self.name}_launch')}ERKNS_{_mangled(struct)}EPv"
        function = getattr(self.library, symbol)
        function.restype = ctypes.c_char_p
        failure = function(ctypes.byref(args), None)
        if failure is not None:
            raise RuntimeError(failure.decode())
        return found

    def edited(self, pattern: str, replacement: str) -> CompiledOp:
        """With a fault planted in the PTX of every kernel: what is found, and put in its place."""
        return self._with_ptx(re.sub(pattern, replacement, self.ptx))

    def with_field(self, name: str, value: str) -> CompiledOp:
        """With another fault: an integer of the argument struct isn't loaded, but a constant."""
        offset = getattr(STRUCTS[self.name], name).offset
        starts: dict[str, int] = {}  # of registers that point into the struct
        lines = self.ptx.splitlines()
        for n, line in enumerate(lines):
            if entry := _ENTRY.match(line):
                starts = {f"{entry[1]}_param_0": 0}
            elif (pointer := _POINTER.match(line)) and pointer[2] in starts:
                starts[pointer[1]] = starts[pointer[2]] + int(pointer[3] or 0)
            elif (load := _LOAD.match(line)) and starts[load[3]] + int(load[4] or 0) == offset:
                lines[n] = f"mov.{load[1]} {load[2]}, {value};"
        return self._with_ptx("\n".join(lines) + "\n")

    def _with_ptx(self, ptx: str) -> CompiledOp:
        if ptx.split() == self.ptx.split():
            raise ValueError("the fault changes nothing in the PTX")
        return replace(self, ptx=ptx, launches=[])

    def with_flags(self, *flags: str) -> CompiledOp:
        """The same host code, and kernels compiled in another way."""
        return self._with_ptx(
            _nvcc(*flags, "-ptx", "-arch=sm_80", "-o", "-", CSRC / f"{self.name}.cu")
        )

    def kernels(self) -> list[str]:
        return _ENTRY.findall(self.ptx)

    def text_of(self, kernel: str) -> list[str]:
        """A kernel's instructions."""
        return [instruction.text for instruction in parse(self.ptx, kernel).instructions]


def _mangled(name: str) -> str:
    return f"{len(name)}{name}"


def _nvcc(*arguments: str | Path) -> str:
    command = ["nvcc", "-std=c++20", *map(str, arguments)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        raise RuntimeError(f"nvcc says: {said.stderr}")
    return said.stdout


def compile_op(name: str, folder: Path) -> CompiledOp:
    """For sm_80, with the flags it is shipped with.

    The symbols of the fake runtime are bound inside the library, so that torch's own CUDA runtime,
    where there is one, isn't asked.
    """
    library = folder / f"{name}.so"
    target = ["-gencode=arch=compute_80,code=compute_80", "--keep", f"--keep-dir={folder}"]
    host = ["-shared", "--cudart=none", "-Xcompiler=-fPIC", "-Xlinker=-Bsymbolic"]
    _nvcc(*target, *host, "-o", library, CSRC / f"{name}.cu", HERE / "fake_cudart.cpp")
    return CompiledOp(name, (folder / f"{name}.ptx").read_text(), ctypes.CDLL(str(library)))
