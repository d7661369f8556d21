"""Numbers as PTX has them: raw bits in registers, and one correct rounding after an operation.

What is not modelled: the payload of a NaN that arithmetic makes, and which of two zeros is larger.

A kind is a PTX type without its dot: "s32", "bf16", "f16x2" (PTX ISA, "Fundamental Types").
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

INTEGERS = frozenset(f"{sign}{width}" for sign in "sub" for width in (16, 32, 64))
BYTES = frozenset({"s8", "u8", "b8"})
FLOATS = frozenset({"f16", "bf16", "f32", "f64"})
PAIRS = frozenset({"f16x2", "bf16x2"})
KINDS = INTEGERS | BYTES | FLOATS | PAIRS | {"pred", "tf32"}

_WIDTHS = {"pred": 1, "bf16": 16, "tf32": 32, "f16x2": 32, "bf16x2": 32}
_UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
# A NaN as float16, bfloat16, float32 and float64 alike, so that no use of it goes unnoticed.
POISON = 0x7FFF7FFF7FFF7FFF


def width(kind: str) -> int:
    """Bits of a kind."""
    return _WIDTHS.get(kind) or int(kind[1:])


def raw_type(bits: int) -> type[np.generic]:
    return _UNSIGNED[bits]


def poison(bits: int, size: int) -> Array:
    return np.full(size, POISON & ((1 << bits) - 1), _UNSIGNED[bits])


def decode(raw: Array, kind: str) -> Array:
    """Raw bits to numbers: integers of their width, f64 as float64, other floats as float32.

    A pair becomes [2, n], the lower half first.
    """
    match kind:
        case "f32" | "f64":
            return raw.view(np.float32 if kind == "f32" else np.float64)
        case "f16":
            return raw.view(np.float16).astype(np.float32)
        case "bf16":
            return (raw.astype(np.uint32) << 16).view(np.float32)
        case "tf32":
            # The tensor cores don't look at the 13 lowest bits.
            return (raw & np.uint32(0xFFFFE000)).view(np.float32)
        case "f16x2" | "bf16x2":
            halves = raw.view(np.uint16).reshape(-1, 2).T
            return decode(np.ascontiguousarray(halves), kind[:-2])
    signed: Array = raw.view(f"i{width(kind) // 8}") if kind[0] == "s" else raw
    return signed


def encode(numbers: Array, kind: str) -> Array:
    """Numbers to raw bits: integers wrap, floats are rounded to nearest even, once."""
    match kind:
        case "pred":
            return numbers.astype(np.bool_)
        case "f32":
            return numbers.astype(np.float32, copy=False).view(np.uint32)
        case "f64":
            return numbers.astype(np.float64, copy=False).view(np.uint64)
        case "f16":
            return numbers.astype(np.float16).view(np.uint16)
        case "bf16":
            return _bfloat16(numbers)
        case "tf32":
            # .rna: to nearest, ties away from zero (PTX ISA, "cvt").
            bits = numbers.astype(np.float32).view(np.uint32)
            return np.where(np.isfinite(numbers), (bits + 0x1000) & np.uint32(0xFFFFE000), bits)
        case "f16x2" | "bf16x2":
            low, high = encode(numbers, kind[:-2]).astype(np.uint32)
            both: Array = low | high << np.uint32(16)
            return both
    return numbers.astype(_UNSIGNED[width(kind)], copy=False)


def _bfloat16(numbers: Array) -> Array:
    if numbers.dtype == np.float64:
        numbers = _to_odd(numbers.astype(np.float32), numbers)
    bits = numbers.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), 0x7FFF, rounded).astype(np.uint16)


def _to_odd(rounded: Array, exact: Array) -> Array:
    """What was rounded to nearest, rounded to odd instead: a second rounding then does no harm.

    Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008. `exact` may be any
    number that lies on the same side of `rounded` as the exact one.
    """
    bits = rounded.view(np.uint32 if rounded.dtype == np.float32 else np.uint64)
    nudge = (rounded != exact) & ~np.isnan(exact) & (bits % 2 == 0)
    towards = np.where(exact > rounded, np.inf, -np.inf).astype(rounded.dtype)
    return np.where(nudge, np.nextafter(rounded, towards), rounded)


def fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once: exactly for float64, ready for a last rounding for others."""
    if a.dtype == np.float64:
        return np.array([_fused(*numbers) for numbers in zip(a, b, c, strict=True)])
    # 24 + 24 bits fit in 53. The sum's error is exact too (Knuth's two-sum); it says which way the
    # rounded sum is off.
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    inexact = np.isfinite(error) & (error != 0)
    return _to_odd(total, np.where(inexact, np.copysign(np.inf, error), total))


def _fused(a: float, b: float, c: float) -> float:
    if not np.isfinite([a, b, c]).all():
        return a * b + c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    # Fractions have no -0, and no infinity to overflow to.
    return float(exact) if exact and abs(exact) < Fraction(2) ** 1023 else a * b + c


def flushed(numbers: Array) -> Array:
    """.ftz: subnormal float32 become zero of their sign."""
    small = np.abs(numbers) < np.finfo(np.float32).tiny
    return np.where(small, np.copysign(np.float32(0), numbers), numbers)


def to_integer(numbers: Array, kind: str) -> Array:
    """Whole floats to integers of a kind; what doesn't fit is clamped, a NaN is 0.

    PTX ISA, "cvt".
    """
    limits = np.iinfo(f"{'i' if kind[0] == 's' else 'u'}{width(kind) // 8}")
    wide = np.nan_to_num(numbers.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
    inside = (wide >= limits.min) & (wide < float(limits.max))
    safe = np.where(inside, wide, 0).astype(limits.dtype)
    return np.where(inside, safe, np.where(wide < 0, limits.min, limits.max).astype(limits.dtype))
