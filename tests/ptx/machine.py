"""One thread block: registers are arrays over its threads, and a guard (`@%p`) becomes a mask.

As long as all threads go the same way, as they do in what Triton emits, they share one counter.
Where they part, those at the lowest place go on first, up to where the others are: code that is
laid out in order then runs once for all whose ways meet. nvcc's PTX parts them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .faults import Divergence, Endless, Fault, Undefined, UnknownInstruction
from .memory import GlobalMemory
from .parse import (
    Address,
    Immediate,
    Instruction,
    Operand,
    Program,
    Register,
    Special,
    Symbol,
    Vector,
)
from .shared_memory import WARP, SharedMemory
from .values import Array, decode, encode, poison, raw_type, width

Position = tuple[int, int, int]
Operation = Callable[["Block", Instruction], None]
SHARED_ARRAY = "global_smem"
_STRUCTS = 16  # parameters that are structs lie this many bits apart, in a space of their own
SINK = Symbol("_")  # PTX ISA, "Destination Operands": a result that is thrown away


@dataclass
class _Copy:
    """One thread block's part of one cp.async."""

    places: Array
    data: Array
    threads: Array


@dataclass
class Block:
    program: Program
    operations: Sequence[Operation]  # one an instruction
    memory: GlobalMemory
    parameters: Mapping[str, int | float | bytes]  # bytes are a struct
    shared_size: int
    threads_count: int
    position: Position = (0, 0, 0)
    grid: Position = (1, 1, 1)
    limit: int = 200_000  # instructions

    shared: SharedMemory = field(init=False)
    mask: Array | None = field(init=False, default=None)  # of the current instruction; None is all
    counter: int | None = field(init=False, default=0)  # of the threads at work; None: choose again
    steps: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.threads_count % WARP:
            raise Fault(f"a block has whole warps here, got {self.threads_count} threads")
        self.shared = SharedMemory(self.shared_size)
        self.threads = np.arange(self.threads_count)
        self._at_work: Array | None = None  # None is all
        self._until = self._end = len(self.program.instructions)
        self._counters = np.zeros(self.threads_count, np.int64)  # of the threads not at work
        self._waiting = np.zeros(self.threads_count, np.bool_)  # at a barrier
        self._barrier: Instruction | None = None
        self._registers: dict[str, Array] = {}
        self._constants: dict[tuple[int, int], Array] = {}
        self._specials = {"%laneid": self.threads % WARP}
        for axis, letter in enumerate("xyz"):
            self._specials |= {
                f"%tid.{letter}": self.threads if axis == 0 else 0 * self.threads,
                f"%ntid.{letter}": np.full_like(self.threads, (self.threads_count, 1, 1)[axis]),
                f"%ctaid.{letter}": np.full_like(self.threads, self.position[axis]),
                f"%nctaid.{letter}": np.full_like(self.threads, self.grid[axis]),
            }
        self.structs: dict[str, tuple[int, bytes]] = {
            name: (n << _STRUCTS, value)
            for n, (name, value) in enumerate(self.parameters.items(), start=1)
            if isinstance(value, bytes)
        }
        self._copies: list[_Copy] = []  # not committed yet
        self._groups: list[list[_Copy]] = []  # oldest first

    def run(self) -> None:
        instructions, operations = self.program.instructions, self.operations
        # Masked-off threads compute with whatever their registers hold.
        with np.errstate(all="ignore"):
            while self._choose():
                while self.counter is not None and self.counter < self._until:
                    instruction, operation = instructions[self.counter], operations[self.counter]
                    self.counter += 1
                    self.steps += 1
                    try:
                        self._step(instruction, operation)
                    except Fault as fault:
                        raise self._placed(fault, instruction) from None

    def _placed(self, fault: Fault, instruction: Instruction | None) -> Fault:
        return type(fault)(f"{fault}; in block {self.position} at {instruction}")

    def _choose(self) -> bool:
        """Whose turn it is: of the threads that don't wait, those at the lowest place, until they
        come to where others are."""
        if self.counter is not None:
            self._counters[... if self._at_work is None else self._at_work] = self.counter
        running = (self._counters < self._end) & ~self._waiting
        if not running.any():
            if self._waiting.any():
                count = f"only {int(self._waiting.sum())} of {self.threads_count} threads"
                raise self._placed(Divergence(f"{count} come to the barrier"), self._barrier)
            return False
        self.counter = int(self._counters[running].min())
        chosen = running & (self._counters == self.counter)
        ahead = self._counters[running & ~chosen]
        self._until = int(ahead.min()) if ahead.size else self._end
        self._at_work = None if chosen.all() else chosen
        return True

    def _step(self, instruction: Instruction, operation: Operation) -> None:
        if self.steps > self.limit:
            raise Endless(f"{self.limit} instructions and no end")
        self.mask = self._at_work
        if instruction.guard is not None:
            mask = self.read(instruction.guard, "pred") != instruction.negated
            if self._at_work is not None:
                mask = mask & self._at_work
            if not mask.any():
                return
            self.mask = None if mask.all() else mask
        operation(self, instruction)

    # Operands

    def read(self, operand: Operand, kind: str) -> Array:
        """Numbers, [threads]; a pair's are [2, threads]."""
        return decode(self.raw(operand, width(kind)), kind)

    def raw(self, operand: Operand, bits: int) -> Array:
        """The operand's lowest bits, as unsigned integers (PTX ISA, "Operand Size Exceeding
        Instruction-Type Size")."""
        match operand:
            case Register(name, have):
                value = self._registers.get(name)
                if value is None:
                    raise Undefined(f"{name} is read, but nothing was written to it")
                if have < bits:
                    raise Fault(f"{name} has {have} bits, but {bits} are read")
                return value if have == bits else value.astype(raw_type(bits))
            case Immediate(number):
                return self._constant(number, bits)
            case Special(name):
                return self._specials[name].astype(raw_type(bits))
            case Symbol(name) if name == SHARED_ARRAY:
                return self._constant(0, bits)
            case Symbol(name) if name in self.structs:
                return self._constant(self.structs[name][0], bits)
            case Vector(items):
                each = bits // len(items)
                total = self._constant(0, bits)
                for n, item in enumerate(items):
                    part = self.raw(item, each).astype(raw_type(bits))
                    total = total | part << raw_type(bits)(n * each)
                return total
        raise UnknownInstruction(f"{operand} can't be read")

    def _constant(self, number: int, bits: int) -> Array:
        key = number, bits
        if key not in self._constants:
            pattern = number & ((1 << bits) - 1)
            self._constants[key] = np.full(self.threads_count, pattern, raw_type(bits))
        return self._constants[key]

    def write(self, target: Operand, numbers: Array, kind: str) -> None:
        """Rounds, extends to the register's width, and leaves what the guard masks off."""
        self.write_raw(target, encode(numbers, kind), kind)

    def write_raw(self, target: Operand, bits: Array, kind: str) -> None:
        if target == SINK:
            return
        if not isinstance(target, Register):
            raise UnknownInstruction(f"{target} can't be written")
        if target.width < width(kind):
            raise Fault(f"{target.name} has {target.width} bits, but {width(kind)} are written")
        if target.width > width(kind):
            wide = decode(bits, kind) if kind[0] == "s" else bits
            bits = wide.astype(raw_type(target.width))
        if self.mask is not None:
            old = self._registers.get(target.name)
            if old is None:
                old = poison(target.width, self.threads_count)
            bits = np.where(self.mask, bits, old)
        self._registers[target.name] = bits

    def addresses(self, operand: Operand) -> tuple[Array, Array]:
        """Of the threads that take part: addresses as signed numbers, and who they are."""
        if not isinstance(operand, Address):
            raise UnknownInstruction(f"{operand} is no address")
        base = operand.base
        bits = base.width if isinstance(base, Register) else 64
        result = self.raw(base, bits).astype(np.int64) + operand.offset
        if self.mask is None:
            return result, self.threads
        return result[self.mask], self.threads[self.mask]

    # Order between threads

    def require_all(self) -> None:
        if self.mask is not None:
            raise Divergence(
                f"only {int(self.mask.sum())} of {self.threads_count} threads get here"
            )

    def jump(self, label: Operand) -> None:
        """Of the threads that take part; the others at work go on to the next instruction."""
        if not isinstance(label, Symbol) or label.name not in self.program.labels:
            raise UnknownInstruction(f"{label} is no label")
        self._go(self.program.labels[label.name])

    def end(self) -> None:
        self._go(self._end)

    def _go(self, place: int) -> None:
        if self.mask is None:
            self.counter = place
            return
        self._leave(place)

    def _leave(self, place: int) -> None:
        self._counters[... if self._at_work is None else self._at_work] = self.counter
        self._counters[... if self.mask is None else self.mask] = place
        self.counter = None

    def barrier(self) -> None:
        """Whoever comes first waits for all the others, and it has to be here that they come."""
        if self.mask is None:
            self.shared.barrier()
            return
        assert self.counter is not None
        place = self.counter
        if (self._counters[self._waiting] != place).any():
            raise Divergence("others wait at another barrier")
        self._leave(place)
        self._waiting |= self.mask
        self._barrier = self.program.instructions[place - 1]
        if self._waiting.all():
            self._waiting[:] = False
            self.shared.barrier()

    def start_copy(self, target: Operand, data: Array) -> None:
        """Data [n, size] of the threads that take part will arrive at an address."""
        addresses, threads = self.addresses(target)
        places = self.shared.expect(addresses, data.shape[1], threads)
        self._copies.append(_Copy(places, data, threads))

    def commit_copies(self) -> None:
        self.require_all()
        self._groups.append(self._copies)
        self._copies = []

    def wait_for_copies(self, may_be_left: int) -> None:
        """Until no more than so many groups, the latest ones, are on their way."""
        self.require_all()
        while len(self._groups) > may_be_left:
            for copy in self._groups.pop(0):
                self.shared.arrive(copy.places, copy.data, copy.threads)
