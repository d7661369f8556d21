"""What the 32 threads of a warp do together: shuffles, ldmatrix and the tensor cores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .faults import UnknownInstruction
from .machine import Block
from .opcodes import opcode
from .parse import Immediate, Instruction, Operand, Vector
from .shared_memory import WARP
from .values import Array

_LANE = np.arange(WARP)
_GROUP, _MEMBER = _LANE // 4, _LANE % 4  # groupID and threadID_in_group of the ISA's figures


def _items(operand: Operand) -> tuple[Operand, ...]:
    if not isinstance(operand, Vector):
        raise UnknownInstruction(f"{operand} is no vector")
    return operand.items


def _by_warp(block: Block, operand: Operand, kind: str) -> Array:
    """[warps, 32]; of a pair [warps, 32, 2]."""
    numbers = block.read(operand, kind)
    shape = (block.threads_count // WARP, WARP)
    return (
        np.moveaxis(numbers, 0, -1).reshape(*shape, 2)
        if numbers.ndim == 2
        else numbers.reshape(shape)
    )


@opcode("shfl.sync", flags="bfly idx up down", kinds={"b32"})
def shuffle(block: Block, i: Instruction) -> None:
    """PTX ISA, "shfl.sync": a lane whose source lies outside its segment keeps its own value."""
    block.require_all()
    target, source, step, bounds, members = i.operands
    if members not in (Immediate(-1), Immediate(0xFFFFFFFF)):
        raise UnknownInstruction("a shuffle of a part of a warp is not known")
    numbers = _by_warp(block, source, "b32")
    by = _by_warp(block, step, "b32").astype(np.int64) & 31
    limits = _by_warp(block, bounds, "b32").astype(np.int64)
    clamp, segment = limits & 31, limits >> 8 & 31
    highest = (_LANE & segment) | (clamp & ~segment)
    lowest = _LANE & segment
    mode = i.flags[2]
    if mode == "up":
        lane = _LANE - by
        inside = lane >= highest
    else:
        lane = {"bfly": _LANE ^ by, "down": _LANE + by, "idx": lowest | (by & ~segment)}[mode]
        inside = lane <= highest
    result = np.take_along_axis(numbers, np.where(inside, lane, _LANE), 1)
    first, *rest = target.items if isinstance(target, Vector) else (target,)
    block.write_raw(first, result.reshape(-1), "b32")
    for predicate in rest:
        block.write(predicate, inside.reshape(-1), "pred")


_REDUCTIONS: dict[str, Callable[..., Array]] = {
    "add": np.add.reduce,
    "min": np.minimum.reduce,
    "max": np.maximum.reduce,
}


@opcode("redux.sync.add redux.sync.min redux.sync.max", kinds={"s32", "u32"})
def reduce_warp(block: Block, i: Instruction) -> None:
    """PTX ISA, "redux.sync": every lane gets the sum, least or greatest of its warp's 32."""
    block.require_all()
    target, source, members = i.operands
    if (block.raw(members, 32) != 0xFFFFFFFF).any():
        raise UnknownInstruction("a reduction of a part of a warp is not known")
    numbers = _by_warp(block, source, i.kind)
    result = _REDUCTIONS[i.flags[2]](numbers, axis=1, keepdims=True, dtype=numbers.dtype)
    block.write(target, np.broadcast_to(result, numbers.shape).reshape(-1), i.kind)


@opcode("ldmatrix.sync.aligned.m8n8", flags="x1 x2 x4 trans shared shared::cta", kinds={"b16"})
def load_matrices(block: Block, i: Instruction) -> None:
    """PTX ISA, "ldmatrix": lanes 8m to 8m+7 point at the rows of matrix m; each lane then gets two
    neighbours of every matrix, of a row or, transposed, of a column."""
    block.require_all()
    registers = _items(i.operands[0])
    addresses, threads = block.addresses(i.operands[1])
    lanes = threads % WARP < 8 * len(registers)
    rows = block.shared.read(addresses[lanes], 16, threads[lanes]).view(np.uint16)
    matrices = rows.reshape(-1, len(registers), 8, 8)
    if "trans" in i.flags:
        matrices = matrices.swapaxes(2, 3)
    low, high = (matrices[:, :, _GROUP, 2 * _MEMBER + n].astype(np.uint32) for n in (0, 1))
    pairs = low | high << np.uint32(16)
    for n, register in enumerate(registers):
        block.write_raw(register, pairs[:, n].reshape(-1), "b32")


def _rows_16(count: int, step: int) -> list[tuple[Array, Array]]:
    """Places in a 16-row fragment: registers alternate between the halves of the rows."""
    return [(_GROUP + 8 * (n % 2), step * _MEMBER + 4 * step * (n // 2)) for n in range(count)]


def _accumulate(block: Block, i: Instruction, a: Array, b: Array) -> None:
    """d = a b + c for [warps, 16, k] and [warps, k, 8] (figures of "Matrix Fragments for mma").

    Summed in float64 and rounded once: the order and rounding of the hardware are unspecified.
    """
    places = [(_GROUP + 8 * (n // 2), 2 * _MEMBER + n % 2) for n in range(4)]
    total = a.astype(np.float64) @ b
    for place, target, addend in zip(
        places, _items(i.operands[0]), _items(i.operands[3]), strict=True
    ):
        d = total[:, *place] + _by_warp(block, addend, "f32")
        block.write(target, d.reshape(-1), "f32")


@opcode(
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    kinds={"f16", "bf16", "f32"},
)
def mma_16(block: Block, i: Instruction) -> None:
    block.require_all()
    kind = i.kinds[1] + "x2"
    warps = block.threads_count // WARP
    a, b = np.empty((warps, 16, 16), np.float32), np.empty((warps, 16, 8), np.float32)
    for (row, column), register in zip(_rows_16(4, 2), _items(i.operands[1]), strict=True):
        pair = _by_warp(block, register, kind)
        a[:, row, column], a[:, row, column + 1] = pair[..., 0], pair[..., 1]
    for n, register in enumerate(_items(i.operands[2])):
        pair = _by_warp(block, register, kind)
        row = 2 * _MEMBER + 8 * n
        b[:, row, _GROUP], b[:, row + 1, _GROUP] = pair[..., 0], pair[..., 1]
    _accumulate(block, i, a, b)


@opcode("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", kinds={"tf32", "f32"})
def mma_8(block: Block, i: Instruction) -> None:
    block.require_all()
    warps = block.threads_count // WARP
    a, b = np.empty((warps, 16, 8), np.float32), np.empty((warps, 8, 8), np.float32)
    for (row, column), register in zip(_rows_16(4, 1), _items(i.operands[1]), strict=True):
        a[:, row, column] = _by_warp(block, register, "tf32")
    for n, register in enumerate(_items(i.operands[2])):
        b[:, _MEMBER + 4 * n, _GROUP] = _by_warp(block, register, "tf32")
    _accumulate(block, i, a, b)
