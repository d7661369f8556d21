"""Loads, stores and asynchronous copies. PTX ISA, "Data Movement and Conversion Instructions"."""

from __future__ import annotations

import numpy as np

from . import values
from .faults import Misaligned, OutOfBounds, UnknownInstruction
from .machine import Block
from .opcodes import opcode
from .parse import Address, Immediate, Instruction, Operand, Symbol, Vector
from .values import Array

_KINDS = values.INTEGERS | values.BYTES | {"f32", "f64"}
_WHOLE = {f"{sign}{width}" for sign in "us" for width in (32, 64)}
# Advice to the caches doesn't change what is read or written.
_CACHES = (
    "weak ca cg cs lu cv wb wt nc L1::evict_first L1::evict_last L1::evict_normal L1::no_allocate "
    "L2::evict_first L2::evict_last L2::cache_hint L2::64B L2::128B L2::256B"
)


def _items(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _sizes(i: Instruction, operand: Operand) -> tuple[int, tuple[Operand, ...]]:
    """Bytes of an element, and the registers of a vector."""
    items = _items(operand)
    count = next((int(flag[1]) for flag in i.flags if flag in ("v2", "v4")), 1)
    if len(items) != count:
        raise UnknownInstruction(f"{len(items)} registers for a vector of {count}")
    return values.width(i.kind) // 8, items


@opcode("ld.param", flags="v2 v4", kinds=_KINDS)
def load_parameter(block: Block, i: Instruction) -> None:
    """Of a struct its parts, of anything else the whole."""
    address = i.operands[1]
    if not isinstance(address, Address):
        raise UnknownInstruction(f"{address} is no address")
    if not isinstance(address.base, Symbol) or address.base.name in block.structs:
        _load_part(block, i)
        return
    if address.offset or "v2" in i.flags or "v4" in i.flags:
        raise UnknownInstruction("only whole parameters are known, where one is no struct")
    value = block.parameters[address.base.name]
    bits = values.width(i.kind)
    if isinstance(value, float):
        float_type = np.float32 if bits == 32 else np.float64
        value = int(np.array([value], float_type).view(values.raw_type(bits))[0])
    block.write_raw(i.operands[0], block.raw(Immediate(value), bits), i.kind)


def _load_part(block: Block, i: Instruction) -> None:
    size, registers = _sizes(i, i.operands[0])
    count = size * len(registers)
    places = np.unique(block.addresses(i.operands[1])[0])
    if len(places) > 1:
        raise UnknownInstruction("threads that load different parts of a parameter are not known")
    place = int(places[0])
    if place % count:
        raise Misaligned(f"{count} bytes at {place:#x} of the parameters")
    for start, struct in block.structs.values():
        if start <= place <= start + len(struct) - count:
            break
    else:
        raise OutOfBounds(f"{count} bytes at {place:#x} are no part of a parameter")
    words = np.frombuffer(struct, values.raw_type(8 * size), len(registers), place - start)
    for register, word in zip(registers, words, strict=True):
        block.write_raw(register, block.raw(Immediate(int(word)), 8 * size), i.kind)


@opcode("ld.global ld.shared ld.shared::cta", flags=f"v2 v4 {_CACHES}", kinds=_KINDS)
def load(block: Block, i: Instruction) -> None:
    size, registers = _sizes(i, i.operands[0])
    addresses, threads = block.addresses(i.operands[1])
    memory = block.memory if "global" in i.flags else block.shared
    data = memory.read(addresses, size * len(registers), threads)
    words = data.view(values.raw_type(8 * size))
    for n, register in enumerate(registers):
        block.write_raw(register, _spread(block, words[:, n]), i.kind)


def _spread(block: Block, numbers: Array) -> Array:
    """From the threads that take part to all."""
    if block.mask is None:
        return np.ascontiguousarray(numbers)
    result = np.zeros(block.threads_count, numbers.dtype)
    result[block.mask] = numbers
    return result


@opcode("st.global st.shared st.shared::cta", flags=f"v2 v4 {_CACHES}", kinds=_KINDS)
def store(block: Block, i: Instruction) -> None:
    size, registers = _sizes(i, i.operands[1])
    addresses, threads = block.addresses(i.operands[0])
    words = np.stack([block.raw(register, 8 * size) for register in registers], 1)
    words = words if block.mask is None else words[block.mask]
    memory = block.memory if "global" in i.flags else block.shared
    memory.write(addresses, np.ascontiguousarray(words).view(np.uint8), threads)


@opcode("atom.global", flags="add relaxed acquire release acq_rel cta gpu sys", kinds=_WHOLE)
def atomic(block: Block, i: Instruction) -> None:
    """PTX ISA, "atom": one thread after another, each is given what was there before it.

    No two blocks run at a time here, so orders and scopes have nothing to order.
    """
    addresses, threads = block.addresses(i.operands[1])
    amounts = block.raw(i.operands[2], values.width(i.kind))
    amounts = amounts if block.mask is None else amounts[block.mask]
    before = np.empty_like(amounts)
    for n in range(len(threads)):
        one = slice(n, n + 1)
        data = block.memory.read(addresses[one], amounts.itemsize, threads[one])
        before[one] = data.view(amounts.dtype)[:, 0]
        total = before[one] + amounts[one]
        block.memory.write(addresses[one], total[:, None].view(np.uint8), threads[one])
    block.write_raw(i.operands[0], _spread(block, before), i.kind)


@opcode(
    "cp.async.ca.shared.global cp.async.cg.shared.global",
    flags="L2::cache_hint L2::64B L2::128B L2::256B",
)
def copy_async(block: Block, i: Instruction) -> None:
    """Bytes past the optional fourth operand are zeros, and their source isn't looked at."""
    target, source, size_operand, *rest = i.operands
    if not isinstance(size_operand, Immediate) or "L2::cache_hint" in i.flags:
        raise UnknownInstruction("only a size, and how much of it is read, are known")
    size = size_operand.bits
    addresses, threads = block.addresses(source)
    if (wrong := addresses % size != 0).any():
        first = int(np.argmax(wrong))
        raise Misaligned(f"thread {threads[first]} copies {size} bytes from {addresses[first]:#x}")
    given = block.raw(rest[0], 32) if rest else block.raw(Immediate(size), 32)
    given = given if block.mask is None else given[block.mask]
    data = np.zeros((len(addresses), size), np.uint8)
    for part in np.unique(given):
        if part == 0:
            continue
        if part != size:
            raise UnknownInstruction(f"a copy of {part} bytes of {size} is not known")
        chosen = given == part
        data[chosen] = block.memory.read(addresses[chosen], size, threads[chosen])
    block.start_copy(target, data)


@opcode("cp.async.commit_group")
def commit_group(block: Block, i: Instruction) -> None:
    block.commit_copies()


@opcode("cp.async.wait_group")
def wait_group(block: Block, i: Instruction) -> None:
    (count,) = i.operands
    if not isinstance(count, Immediate):
        raise UnknownInstruction(f"{count} is no number of groups")
    block.wait_for_copies(count.bits)


@opcode("cp.async.wait_all")
def wait_all(block: Block, i: Instruction) -> None:
    block.commit_copies()
    block.wait_for_copies(0)
