"""What a compiled kernel says about itself: its resources, its instructions, its occupancy."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KIB = 1024
WARP = 32
# What a streaming multiprocessor hands out, and in what portions (CUDA's occupancy calculator).
REGISTERS = 65536
REGISTER_UNIT = 256  # a warp
PARTITIONS = 4
SHARED_UNIT = 128
SHARED_RESERVED = KIB  # a block


@dataclass(frozen=True)
class Chip:
    """The limits of one compute capability."""

    capability: int
    block_shared: int  # bytes that one block may ask for
    shared: int  # bytes of a multiprocessor
    warps: int  # of a multiprocessor
    blocks: int

    @property
    def name(self) -> str:
        return f"sm_{self.capability}"


CHIPS = {
    80: Chip(80, 163 * KIB, 164 * KIB, 64, 32),
    86: Chip(86, 99 * KIB, 100 * KIB, 48, 16),
    89: Chip(89, 99 * KIB, 100 * KIB, 48, 24),
    90: Chip(90, 227 * KIB, 228 * KIB, 64, 32),
    100: Chip(100, 227 * KIB, 228 * KIB, 64, 32),
}
LDS_SIZE = 64 * KIB  # of a workgroup on gfx942


def up_to(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def blocks_an_sm(chip: Chip, *, registers: int, shared: int, warps: int) -> int:
    """How many blocks a multiprocessor holds at once; `registers` a thread, `shared` bytes."""
    if shared > chip.block_shared:
        return 0
    a_warp = up_to(registers * WARP, REGISTER_UNIT)
    by_registers = REGISTERS // PARTITIONS // a_warp * PARTITIONS // up_to(warps, PARTITIONS)
    by_shared = chip.shared // up_to(shared + SHARED_RESERVED, SHARED_UNIT)
    return min(by_registers, by_shared, chip.warps // warps, chip.blocks)


@dataclass(frozen=True)
class Figures:
    """One kernel's machine code. Counts are of instructions in it, not of those executed."""

    registers: int  # a thread
    spilled: int  # bytes of local memory a thread
    local_accesses: int  # loads and stores of local memory
    shared: int  # bytes a block
    warps: int  # a block
    blocks: int  # a multiprocessor
    tensor_unit: str  # "HMMA", "HGMMA" or both; "" where there is none
    tensor_instructions: int
    tensor_macs: int  # multiply-adds of those, one warp's or a quarter of a warp group's
    loads: int  # of global memory, straight to shared memory among them
    wide_loads: int  # of 128 bits
    unwritten: int  # uniform registers that are read and that no instruction writes

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> Figures:
        return Figures(**stored)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Usage:
    """What `cuobjdump -res-usage` says of one function."""

    registers: int
    local: int  # bytes: the stack frame, where registers are spilled to, and local arrays
    shared: int  # bytes known at compile time


_FUNCTION = re.compile(r"^\s*Function (\S+):\s*$")
_RESOURCE = re.compile(r"\b(REG|STACK|SHARED|LOCAL):(\d+)")


def read_usage(text: str) -> dict[str, Usage]:
    """By the function's name, mangled."""
    found, name = {}, ""
    for line in text.splitlines():
        if function := _FUNCTION.match(line):
            name = function[1]
        elif resources := {kind: int(number) for kind, number in _RESOURCE.findall(line)}:
            found[name] = Usage(
                resources["REG"], resources["STACK"] + resources["LOCAL"], resources["SHARED"]
            )
    if not found:
        raise ValueError(f"cuobjdump named no function: {text[:200]!r}")
    return found


_SASS_FUNCTION = re.compile(r"^\s*Function : (\S+)\s*$")
# /*0070*/  @!P0 LDG.E.128 R4, desc[UR6][R2.64] ;
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)")
_TILES = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}


@dataclass(frozen=True)
class Code:
    """The instructions of one function, as names such as LDG.E.128.

    unwritten: numbers of uniform registers that are read and never written. They hold whatever was
    there: ptxas 12.8 makes descriptors for tensor cores of such ones.
    """

    opcodes: tuple[str, ...]
    unwritten: tuple[int, ...] = ()

    def count(self, *stems: str, having: str = "") -> int:
        return sum(
            name.split(".")[0] in stems and (not having or having in name.split(".")[1:])
            for name in self.opcodes
        )

    @property
    def tensor_unit(self) -> str:
        stems = {name.split(".")[0] for name in self.opcodes} & {"HMMA", "HGMMA"}
        return "+".join(sorted(stems))

    @property
    def tensor_macs(self) -> int:
        return sum(_macs(name) for name in self.opcodes)


def _macs(opcode: str) -> int:
    stem, *rest = opcode.split(".")
    if stem == "HMMA":
        return _TILES[rest[0]]
    if stem == "HGMMA":  # of a group of four warps
        rows, columns, depth = map(int, rest[0].split("x"))
        return rows * columns * depth // 4
    return 0


def read_sass(text: str) -> dict[str, Code]:
    """Of `cuobjdump -sass`: the opcodes by the function's name, mangled."""
    found: dict[str, list[str]] = {}
    lines: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if function := _SASS_FUNCTION.match(line):
            name = function[1]
            found[name], lines[name] = [], []
        elif name and (instruction := _INSTRUCTION.match(line)):
            found[name].append(instruction[1])
            lines[name].append(line[instruction.end(1) :].partition(";")[0])
    if not any(found.values()):
        raise ValueError(f"no instruction was read from {text[:200]!r}")
    return {
        name: Code(tuple(opcodes), unwritten_uniforms(opcodes, lines[name]))
        for name, opcodes in found.items()
    }


_UNIFORM = re.compile(r"\bUR(\d+)\b")
_DESCRIPTOR = re.compile(r"\bgdesc\[UR(\d+)\]")  # of shared memory: four registers


def unwritten_uniforms(opcodes: Sequence[str], operands: Sequence[str]) -> tuple[int, ...]:
    """Of instructions in any order, so one that is written later or elsewhere counts as written."""
    written: set[int] = set()
    read: set[int] = set()
    for opcode, given in zip(opcodes, operands, strict=True):
        parts = [part.strip() for part in given.split(",")]
        # Results come first, predicates among them.
        results = [part for part in parts[:3] if re.fullmatch(r"UP\w+|UR\d+", part)]
        result = next((part for part in results if part.startswith("UR")), None)
        if result is not None and (opcode.startswith(("U", "R2UR", "S2UR", "LDCU", "VOTEU"))):
            first = int(result[2:])
            wide = ".64" in opcode or ".WIDE" in opcode
            width = 4 if ".128" in opcode else 2 if wide else 1
            written.update(range(first, first + width))
            parts.remove(result)
        for part in parts:
            for first in map(int, _DESCRIPTOR.findall(part)):
                read.update(range(first, first + 4))
            if "desc[" not in part:
                read.update(map(int, _UNIFORM.findall(part)))
    return tuple(sorted(read - written))


def tool(name: str) -> str:
    """The path of one of the programs that Triton brings along."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise FileNotFoundError(f"Triton {triton.__version__} brings no {name}; expected {path}")
    return str(path)


def dump(cubin: Path) -> dict[str, tuple[Usage, Code]]:
    """Everything cuobjdump tells of a cubin, by the function's name, mangled."""

    def say(option: str) -> str:
        command = [tool("cuobjdump"), option, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage, code = read_usage(say("-res-usage")), read_sass(say("-sass"))
    return {name: (usage[name], code[name]) for name in code}


def figures(chip: Chip, usage: Usage, code: Code, *, shared: int, warps: int) -> Figures:
    """`shared` is what the launch adds to the bytes known at compile time."""
    shared += usage.shared
    return Figures(
        registers=usage.registers,
        spilled=usage.local,
        local_accesses=code.count("LDL", "STL"),
        shared=shared,
        warps=warps,
        blocks=blocks_an_sm(chip, registers=usage.registers, shared=shared, warps=warps),
        tensor_unit=code.tensor_unit,
        tensor_instructions=code.count("HMMA", "HGMMA"),
        tensor_macs=code.tensor_macs,
        loads=code.count("LDG", "LDGSTS"),
        wide_loads=code.count("LDG", "LDGSTS", having="128"),
        unwritten=len(code.unwritten),
    )
