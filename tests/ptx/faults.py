"""What the emulator reports: everything that a program can do wrong has a name."""

from __future__ import annotations


class Fault(Exception):
    """Something the program must not do; the message says what, and where it happened."""


class UnknownInstruction(Fault):
    """An opcode, modifier or type that the emulator doesn't know: it guesses nothing."""


class OutOfBounds(Fault):
    """An access outside every argument's elements, or outside the shared memory asked for."""


class Misaligned(Fault):
    """An address that is no multiple of the access's size."""


class Race(Fault):
    """Shared memory that two threads touch, one of them writing, with no barrier between."""


class NotArrived(Fault):
    """Shared memory that an asynchronous copy may still be writing."""


class Divergence(Fault):
    """A branch, barrier or warp-wide operation that not all threads take part in."""


class Undefined(Fault):
    """A register that is read before anything was written to it."""


class Endless(Fault):
    """More instructions than a kernel of a test has any use for."""
