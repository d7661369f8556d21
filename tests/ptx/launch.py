"""From a Triton kernel and its arguments to memory that changed, as a launch on a GPU would do.

compiler = Compiler(); kernel = compiler.compile("module:name", arguments, constants)
kernel.launch((blocks,), arguments)
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

# These three fill the table of opcodes.
from . import opcodes_arithmetic, opcodes_memory, opcodes_warp  # noqa: F401
from .machine import Block, Operation
from .memory import GlobalMemory
from .opcodes import operations_of
from .parse import Program, parse
from .shared_memory import WARP
from .values import Array

HERE = Path(__file__).parent

Argument = torch.Tensor | int | float
_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


class Options(NamedTuple):
    """Triton's own defaults for an NVIDIA GPU."""

    num_warps: int = 4
    num_stages: int = 3
    enable_fp_fusion: bool = True


@dataclass(frozen=True)
class Request:
    """What to compile, in words that travel as JSON."""

    kernel: str  # module:name
    types: dict[str, str]  # of runtime arguments, as Triton writes them
    constants: dict[str, Any]  # a dtype as {"dtype": "fp32"}
    divisible: list[str]  # pointers and integers that are multiples of 16
    options: dict[str, Any]


@dataclass(frozen=True)
class Kernel:
    """Compiled for sm_80."""

    ptx: str
    shared_size: int
    num_warps: int
    parameters: tuple[str, ...]  # runtime arguments, in the order of the PTX's parameters

    def launch(
        self, grid: tuple[int, ...], arguments: Mapping[str, Argument], *, backwards: bool = False
    ) -> GlobalMemory:
        """Runs the blocks one after another; a GPU promises no order, so any has to do."""
        program, operations = bound(self.ptx)
        arrays = {
            name: as_array(value)
            for name, value in arguments.items()
            if isinstance(value, torch.Tensor) and name in self.parameters
        }
        memory = GlobalMemory(arrays)
        passed: list[Any] = [
            memory.address(name) if name in arrays else arguments[name] for name in self.parameters
        ]
        # Triton's own scratch pointers come last; nothing was asked to be behind them.
        passed += [0] * (len(program.parameters) - len(passed))
        parameters = dict(zip(program.parameters, passed, strict=True))
        run_blocks(
            (*grid, 1, 1)[:3],
            backwards=backwards,
            program=program,
            operations=operations,
            memory=memory,
            parameters=parameters,
            shared_size=self.shared_size,
            threads_count=WARP * self.num_warps,
        )
        return memory

    def edited(self, pattern: str, replacement: str, *, which: int | None = None) -> Kernel:
        """With a fault planted in the PTX: one match of a pattern (every match) replaced.

        In both texts `<name>` stands for what the PTX calls that parameter of the kernel.
        """
        pattern, replacement = self._with_parameters(pattern), self._with_parameters(replacement)
        matches = list(re.finditer(pattern, self.ptx))
        text = self.ptx
        for match in reversed(matches if which is None else [matches[which]]):
            text = text[: match.start()] + match.expand(replacement) + text[match.end() :]
        if text == self.ptx:
            raise ValueError(f"putting {replacement} for {pattern} changes nothing in the PTX")
        return replace(self, ptx=text)

    def _with_parameters(self, text: str) -> str:
        def name(found: re.Match[str]) -> str:
            return parse(self.ptx).parameters[self.parameters.index(found[1])]

        return re.sub(r"<(\w+)>", name, text)

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.ptx))


@cache
def bound(ptx: str, entry_name: str | None = None) -> tuple[Program, tuple[Operation, ...]]:
    program = parse(ptx, entry_name)
    return program, operations_of(program)


def run_blocks(grid: tuple[int, ...], *, backwards: bool, **launched: Any) -> None:
    """One block after another; what else a `Block` has is the same for all."""
    x_size, y_size, z_size = grid
    positions = [(x, y, z) for z in range(z_size) for y in range(y_size) for x in range(x_size)]
    for position in reversed(positions) if backwards else positions:
        Block(position=position, grid=(x_size, y_size, z_size), **launched).run()


def as_array(tensor: torch.Tensor) -> Array:
    """The tensor's own memory; numpy has no bfloat16, and an emulator looks at bytes only."""
    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class Compiler:
    """One worker process; what was compiled once is remembered."""

    def __init__(self) -> None:
        environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
        # The folder itself stays off the path: names like `parse` are too common.
        paths = [str(HERE.parent), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        environment["TRITON_DISABLE_LINE_INFO"] = "1"  # the text is read, and edited, without it
        self._kernels: dict[str, Kernel] = {}
        self._worker = subprocess.Popen(
            [sys.executable, "-P", str(HERE / "compile_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def close(self) -> None:
        self._worker.communicate(timeout=60)

    def compile(
        self,
        kernel: str,
        arguments: Mapping[str, Argument],
        constants: Mapping[str, Any] | None = None,
        options: Options = Options(),  # noqa: B008  it can't be changed
    ) -> Kernel:
        """For arguments like these, with what Triton's launcher finds out about them: an integer 1
        becomes a constant; multiples of 16 are marked, so that loads can be wide."""
        types, folded, divisible = {}, {}, []
        for name, value in arguments.items():
            if type(value) is int and value == 1:
                folded[name] = 1
                continue
            types[name] = _type_of(value)
            number = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if type(number) is int and number % 16 == 0:
                divisible.append(name)
        request = Request(
            kernel, types, dict(constants or {}) | folded, divisible, options._asdict()
        )
        return self._compile(json.dumps(asdict(request)), options.num_warps)

    def _compile(self, request: str, num_warps: int) -> Kernel:
        if request not in self._kernels:
            assert self._worker.stdin is not None
            assert self._worker.stdout is not None
            self._worker.stdin.write(request + "\n")
            self._worker.stdin.flush()
            answer = json.loads(self._worker.stdout.readline() or '{"error": "it died"}')
            if "error" in answer:
                raise RuntimeError(f"the worker that compiles says: {answer['error']}")
            self._kernels[request] = Kernel(
                answer["ptx"], answer["shared_size"], num_warps, tuple(answer["parameters"])
            )
        return self._kernels[request]


def _type_of(value: Argument) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@dataclass
class EmulatedKernel:
    """Stands where a launcher has a Triton kernel, so that the launcher's own grid, strides and
    constants are what runs: `kernel[grid](name=value, ...)`, constants in capitals."""

    compiler: Compiler
    name: str  # module:name
    enable_fp_fusion: bool = True
    backwards: bool = False
    edit: Callable[[Kernel], Kernel] = lambda kernel: kernel
    launches: list[GlobalMemory] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(**given: Any) -> None:
            chosen = {name: given.pop(name) for name in Options._fields if name in given}
            options = Options(enable_fp_fusion=self.enable_fp_fusion)._replace(**chosen)
            constants = {name: _as_json(given.pop(name)) for name in list(given) if name.isupper()}
            kernel = self.edit(self.compiler.compile(self.name, given, constants, options))
            self.launches.append(kernel.launch(grid, given, backwards=self.backwards))

        return launch


def _as_json(constant: Any) -> Any:
    # Triton's dtypes call themselves "fp32" and so on.
    plain = isinstance(constant, bool | int | float | str | None)
    return constant if plain else {"dtype": str(constant)}
