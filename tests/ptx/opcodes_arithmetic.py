"""Numbers, bits, comparisons and conversions: what each thread does by itself.

PTX ISA, "Integer Arithmetic Instructions" to "Comparison and Selection Instructions", and "cvt".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import values
from .faults import UnknownInstruction
from .machine import Block
from .opcodes import opcode
from .parse import Instruction, Vector
from .values import FLOATS, INTEGERS, PAIRS, Array

_BITS = frozenset({"b16", "b32", "b64"})

_ONE = {"neg": np.negative, "abs": np.abs}
_TWO = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_TWO |= {"min": np.fmin, "max": np.fmax}  # of a NaN and a number, the number
_OR_NAN = {"min": np.minimum, "max": np.maximum}
# Approximations are computed exactly; the GPU's differ by some 2^-22 (PTX ISA, "ex2" and others).
_APPROXIMATE: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "rcp": lambda x: 1 / x,
}


def _numbers(block: Block, i: Instruction) -> list[Array]:
    read = [block.read(operand, i.kind) for operand in i.operands[1:]]
    return [values.flushed(x) for x in read] if "ftz" in i.flags else read


def _result(block: Block, i: Instruction, numbers: Array) -> None:
    block.write(i.operands[0], values.flushed(numbers) if "ftz" in i.flags else numbers, i.kind)


@opcode("add sub mul min max", flags="rn ftz lo NaN", kinds=INTEGERS | FLOATS | PAIRS)
def two_numbers(block: Block, i: Instruction) -> None:
    function = (_OR_NAN if "NaN" in i.flags else _TWO)[i.flags[0]]
    _result(block, i, function(*_numbers(block, i)))


@opcode("neg abs", flags="ftz", kinds=INTEGERS | FLOATS | PAIRS)
def one_number(block: Block, i: Instruction) -> None:
    _result(block, i, _ONE[i.flags[0]](*_numbers(block, i)))


@opcode("ex2 lg2 sqrt rsqrt rcp", flags="rn approx ftz", kinds={"f32"})
def approximate(block: Block, i: Instruction) -> None:
    (number,) = _numbers(block, i)
    _result(block, i, _APPROXIMATE[i.flags[0]](number.astype(np.float64)).astype(np.float32))


@opcode("fma", flags="rn ftz", kinds=FLOATS | PAIRS)
def fma(block: Block, i: Instruction) -> None:
    total = values.fused(*_numbers(block, i))
    _result(block, i, total.astype(np.float32) if i.kind == "f32" else total)


@opcode("mad.lo", kinds=INTEGERS)
def mad(block: Block, i: Instruction) -> None:
    a, b, c = _numbers(block, i)
    block.write(i.operands[0], a * b + c, i.kind)


@opcode("mul.wide mad.wide", kinds={"s16", "u16", "s32", "u32"})
def wide(block: Block, i: Instruction) -> None:
    """The product, and the third operand, are twice as wide."""
    kind = f"{i.kind[0]}{2 * values.width(i.kind)}"
    a, b = (block.read(operand, i.kind) for operand in i.operands[1:3])
    product = a.astype(f"{a.dtype.kind}{2 * a.itemsize}") * b
    if len(i.operands) == 4:
        product = product + block.read(i.operands[3], kind)
    block.write(i.operands[0], product, kind)


@opcode("mul.hi", kinds={"s32", "u32", "s64", "u64"})
def mul_hi(block: Block, i: Instruction) -> None:
    a, b = (x.astype(object) for x in _numbers(block, i))
    high = (a * b) >> values.width(i.kind)
    block.write(i.operands[0], high.astype(block.read(i.operands[1], i.kind).dtype), i.kind)


@opcode("div", flags="rn full approx ftz", kinds=INTEGERS | {"f32", "f64"})
def div(block: Block, i: Instruction) -> None:
    a, b = _numbers(block, i)
    if i.kind in FLOATS:
        _result(block, i, a / b)
        return
    # Towards zero, where numpy goes down. By zero it is undefined, but masked threads may do it.
    down = (a % b != 0) & ((a < 0) != (b < 0))
    block.write(i.operands[0], np.where(b == 0, ~np.zeros_like(a), a // b + down), i.kind)


@opcode("rem", kinds=INTEGERS)
def rem(block: Block, i: Instruction) -> None:
    """With the sign of the dividend."""
    a, b = _numbers(block, i)
    block.write(i.operands[0], np.where(b == 0, a, np.fmod(a, b)), i.kind)


# Bits

_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}


@opcode("and or xor not", kinds=_BITS | {"pred"})
def logic(block: Block, i: Instruction) -> None:
    block.write(i.operands[0], _LOGIC[i.flags[0]](*_numbers(block, i)), i.kind)


@opcode("shl shr", kinds=INTEGERS)
def shift(block: Block, i: Instruction) -> None:
    """Shifts of the width or more leave zeros, or copies of the sign."""
    number, amount = block.read(i.operands[1], i.kind), block.read(i.operands[2], "u32")
    bits = values.width(i.kind)
    steps = np.minimum(amount, bits - 1).astype(number.dtype)
    shifted = number << steps if i.flags[0] == "shl" else number >> steps
    if i.kind[0] != "s":
        shifted = np.where(amount >= bits, 0, shifted)
    block.write(i.operands[0], shifted, i.kind)


@opcode("shf", flags="l r wrap clamp", kinds={"b32"})
def funnel_shift(block: Block, i: Instruction) -> None:
    low, high, amount = _numbers(block, i)
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    amount = amount & 31 if "wrap" in i.flags else np.minimum(amount, 32)
    steps = (32 - amount if "l" in i.flags else amount).astype(np.uint64)
    block.write(i.operands[0], (both >> steps).astype(np.uint32), "b32")


@opcode("bfe", kinds={"u32", "s32"})
def bit_field(block: Block, i: Instruction) -> None:
    """From a position so many bits, extended with the field's highest bit if it is signed."""
    number = block.read(i.operands[1], i.kind).astype(np.int64)
    position, length = (block.read(operand, "u32") & 255 for operand in i.operands[2:])
    field = (number >> np.minimum(position, 63)) & ((np.int64(1) << np.minimum(length, 32)) - 1)
    if i.kind == "s32":
        # A field that goes past the top ends in copies of the sign already.
        highest = np.minimum(length, 32) - 1
        negative = (length > 0) & ((field >> np.maximum(highest, 0)) & 1 == 1)
        field = np.where(negative, field | (np.int64(-1) << np.maximum(highest, 0)), field)
    block.write(i.operands[0], field.astype(np.uint32), i.kind)


@opcode("prmt", kinds={"b32"})
def permute_bytes(block: Block, i: Instruction) -> None:
    """Four of the eight bytes of two registers; bit 3 of a selector copies the byte's sign."""
    low, high, selector = _numbers(block, i)
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(low)
    for n in range(4):
        choice = (selector >> np.uint32(4 * n)) & 15
        byte = (both >> (8 * (choice & 7)).astype(np.uint64)).astype(np.uint32) & 255
        byte = np.where(choice & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint32)
        result |= byte << np.uint32(8 * n)
    block.write(i.operands[0], result, "b32")


@opcode("lop3", kinds={"b32"})
def any_logic(block: Block, i: Instruction) -> None:
    """Any function of three bits; the last operand is its table of eight results."""
    a, b, c, table = _numbers(block, i)
    result = np.zeros_like(a)
    for row in range(8):
        hit = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        result |= np.where(table >> np.uint32(row) & 1, hit, np.uint32(0))
    block.write(i.operands[0], result, "b32")


# Comparison and choice

_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_COMPARISONS = "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan"


def _compare(name: str, a: Array, b: Array) -> Array:
    name = _UNSIGNED_NAMES.get(name, name)
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        return np.asarray(unordered == (name == "nan"))
    # Of a NaN nothing is true, "ne" included, but what ends in a u is.
    return np.asarray(_COMPARE[name[:2]](a, b) & ~unordered | (unordered & (len(name) == 3)))


@opcode("setp", flags=f"{_COMPARISONS} and or xor ftz", kinds=INTEGERS | FLOATS)
def setp(block: Block, i: Instruction) -> None:
    """p = a compared with b, combined with c if there is one; p|q also gives the opposite."""
    a, b = (block.read(operand, i.kind) for operand in i.operands[1:3])
    if "ftz" in i.flags:
        a, b = values.flushed(a), values.flushed(b)
    true = _compare(i.flags[1], a, b)
    results = [true, ~true]
    if len(i.operands) == 4:
        combine = next(_LOGIC[flag] for flag in i.flags if flag in _LOGIC)
        results = [combine(x, block.read(i.operands[3], "pred")) for x in results]
    target = i.operands[0]
    targets = target.items if isinstance(target, Vector) else (target,)
    for each, result in zip(targets, results, strict=False):
        block.write(each, result, "pred")


@opcode("selp", kinds=INTEGERS | {"f32", "f64"})
def selp(block: Block, i: Instruction) -> None:
    target, yes, no, condition = i.operands
    bits = values.width(i.kind)
    chosen = np.where(block.read(condition, "pred"), block.raw(yes, bits), block.raw(no, bits))
    block.write_raw(target, chosen, i.kind)


# Conversion

_TO_WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_INTEGERS = INTEGERS | values.BYTES


@opcode("cvt", flags="rn rna rni rzi rmi rpi ftz", kinds=_INTEGERS | FLOATS | PAIRS | {"tf32"})
def cvt(block: Block, i: Instruction) -> None:
    to, of = i.kinds
    # A pair is made of two numbers, the upper half first.
    numbers = [block.read(operand, of) for operand in reversed(i.operands[1:])]
    if "ftz" in i.flags:
        numbers = [values.flushed(x) for x in numbers]
    if to in PAIRS:
        block.write(i.operands[0], np.stack(numbers), to)
        return
    (number,) = numbers
    if to in _INTEGERS and of in FLOATS:
        whole = next(_TO_WHOLE[flag] for flag in i.flags if flag in _TO_WHOLE)
        number = values.to_integer(whole(number), to)
    elif to in FLOATS and of in _INTEGERS:
        number = number.astype(np.float32 if to == "f32" else np.float64)
    elif to in FLOATS and any(flag in _TO_WHOLE for flag in i.flags):
        number = next(_TO_WHOLE[flag] for flag in i.flags if flag in _TO_WHOLE)(number)
    elif to == "tf32" and "rna" not in i.flags:
        raise UnknownInstruction(f"{i.opcode} is known with .rna only")
    _write_converted(block, i, number, to)


def _write_converted(block: Block, i: Instruction, number: Array, to: str) -> None:
    if "ftz" in i.flags and to == "f32":
        number = values.flushed(number.astype(np.float32))
    block.write(i.operands[0], number, to)
