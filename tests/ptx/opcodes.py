"""The table from opcodes to functions; moves, branches and barriers.

A row names the modifiers and types it implements. Anything else is refused before the program
starts, since a modifier that is passed over gives wrong numbers. Semantics: PTX ISA, the section
"Instruction Set" of each opcode's name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from . import values
from .faults import UnknownInstruction
from .machine import Block, Operation
from .parse import Immediate, Instruction, Program, Vector
from .values import INTEGERS


@dataclass(frozen=True)
class _Row:
    operation: Operation
    flags: frozenset[str]
    kinds: frozenset[str]


# From what an opcode starts with.
_TABLE: dict[str, _Row] = {}


def opcode(
    names: str, *, flags: str = "", kinds: Collection[str] = frozenset()
) -> Callable[[Operation], Operation]:
    """Puts a function into the table under each of the names, which blanks separate."""

    def add(operation: Operation) -> Operation:
        for name in names.split():
            _TABLE[name] = _Row(operation, frozenset(flags.split()), frozenset(kinds))
        return operation

    return add


def operations_of(program: Program) -> tuple[Operation, ...]:
    """One function an instruction."""
    return tuple(_operation(instruction) for instruction in program.instructions)


def _operation(instruction: Instruction) -> Operation:
    parts = instruction.opcode.split(".")
    for count in range(len(parts), 0, -1):
        row = _TABLE.get(".".join(parts[:count]))
        if row is None:
            continue
        odd = [flag for flag in instruction.flags[count:] if flag not in row.flags]
        odd += [kind for kind in instruction.kinds if kind not in row.kinds]
        if not odd:
            return row.operation
        raise UnknownInstruction(
            f"the opcode {instruction.opcode} is not known with .{odd[0]}; {instruction}"
        )
    raise UnknownInstruction(f"the opcode {instruction.opcode} is not known; {instruction}")


_RAW = INTEGERS | {"f32", "f64"}


@opcode("mov", kinds=_RAW | {"pred"})
def mov(block: Block, i: Instruction) -> None:
    target, source = i.operands
    if not isinstance(target, Vector):
        block.write_raw(target, block.raw(source, values.width(i.kind)), i.kind)
        return
    bits = block.raw(source, values.width(i.kind))
    each = values.width(i.kind) // len(target.items)
    for n, item in enumerate(target.items):
        part = (bits >> bits.dtype.type(n * each)).astype(values.raw_type(each))
        block.write_raw(item, part, f"b{each}")


@opcode("cvta.to.global", kinds={"u64"})
def to_global(block: Block, i: Instruction) -> None:
    """All addresses here are global ones."""
    block.write_raw(i.operands[0], block.raw(i.operands[1], 64), "u64")


@opcode("membar.gl")
def fence(block: Block, i: Instruction) -> None:
    """Blocks run one after another here: there is nothing to order."""


@opcode("createpolicy.fractional", flags="L2::evict_first L2::evict_last", kinds={"b64"})
def createpolicy(block: Block, i: Instruction) -> None:
    """Advice to the cache; nobody looks at its bits."""
    block.write_raw(i.operands[0], block.raw(i.operands[1], 64), "b64")


@opcode("bra", flags="uni")
def bra(block: Block, i: Instruction) -> None:
    block.jump(i.operands[0])


@opcode("ret exit")
def ret(block: Block, i: Instruction) -> None:
    block.end()


@opcode("bar.sync barrier.sync", flags="aligned")
def bar_sync(block: Block, i: Instruction) -> None:
    """Of the whole block, whichever of the sixteen barriers it is."""
    if i.operands[1:] not in ((), (Immediate(block.threads_count),)):
        raise UnknownInstruction("a barrier of some of the threads is not known")
    block.barrier()


@opcode("bar.warp.sync")
def bar_warp_sync(block: Block, i: Instruction) -> None:
    block.require_all()
    if i.operands not in ((Immediate(-1),), (Immediate(0xFFFFFFFF),)):
        raise UnknownInstruction("a barrier of a part of a warp is not known")
    block.shared.barrier(of_warp=True)
