"""How the attention kernel is launched: frozen values, chosen in one place.

The values come from compiling for sm_80 and sm_90 (`python -m bench.machine_code`): up to a head
of 160 nothing is spilled, and on sm_80 two blocks an SM for heads of 40 and 80.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SHORT_KEYS = 80  # CLIP's 77 tokens, as 64 + 16: all scores of a query at once
MAPS_KEYS = 128  # the most keys whose probabilities can be written
LARGEST_HEAD = 256
SMALLEST_DOT = 16  # the smallest size that a tensor core takes


@dataclass(frozen=True)
class AttentionConfig:
    """One program takes `block_m` queries of a head and, where keys are many, `block_n` at a time.

    `num_stages` counts the key and value tiles under way at once.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


INTERPRETED = AttentionConfig(block_m=32, block_n=32, num_warps=4, num_stages=1)


def split(size: int) -> tuple[int, int]:
    """Powers of two that cover a size: the largest within it and the rest's, or one alone.

    40 -> (32, 16), 80 -> (64, 16), 160 -> (128, 32), 64 -> (64, 0); 48 + 16 would be 64 -> (64, 0).
    """
    if size <= SMALLEST_DOT:
        return SMALLEST_DOT, 0
    whole = 1 << (size.bit_length() - 1)
    if whole == size:
        return whole, 0
    rest = max(SMALLEST_DOT, 1 << (size - whole - 1).bit_length())
    return (2 * whole, 0) if rest == whole else (whole, rest)


def padded(size: int) -> tuple[int, int]:
    """What the split is compared with: one power of two (160 -> 256)."""
    return 1 << max(SMALLEST_DOT - 1, size - 1).bit_length(), 0


def all_keys_at_once(
    sm: int | None, dtype: torch.dtype, head_size: int, keys: int, *, maps: bool
) -> bool:
    """Whether keys are few enough to do without an online softmax. Maps can't do with one.

    On a GPU not in float32, which has no tensor cores, nor for the largest heads: either needs
    more registers than there are.
    """
    if maps:
        return True
    fits = sm is None or (dtype != torch.float32 and sum(split(head_size)) <= 160)
    return fits and keys <= SHORT_KEYS


def split_fails(sm: int, dtype: torch.dtype, ptxas: tuple[int, int]) -> bool:
    """Whether a head in two parts comes out wrong, other than in the loop over aligned keys.

    For sm_90 ptxas 12.8 (Triton 3.3 to 3.6) describes the second part's shared memory by a register
    that nothing has written: wrong results or an illegal access, both seen on an H100. 12.9 and
    13.0 don't.
    """
    return sm == 90 and dtype != torch.float32 and ptxas < (12, 9)


def attention_config(
    sm: int | None, dtype: torch.dtype, head_size: int, *, short: bool, splice: bool = True
) -> AttentionConfig:
    """For an architecture (80, 90, ...; others inherit the next lower one's), or for Triton's
    interpreter (None). `short` is the path that has all keys at once, `splice` says that there is a
    table of sources.
    """
    if sm is None:
        return INTERPRETED
    width = sum(split(head_size))
    if dtype == torch.float32:
        return AttentionConfig(32, 32, 4, 1) if width <= 96 else AttentionConfig(16, 16, 8, 1)
    if short:
        # Without a table 64 queries of 80 are given 128 registers, and spill; the same warps in
        # half as many blocks don't. With one they need more, and two blocks of 8 don't fit.
        wide = width == 128 or (width == 80 and not splice and sm < 90)
        return AttentionConfig(128, 64, 8, 1) if wide else AttentionConfig(64, 64, 4, 1)
    if sm >= 90:
        if width == 80:
            return AttentionConfig(64, 64, 4, 2)
        return AttentionConfig(128, 64 if width <= 160 else 32, 8, 2)
    if width <= 96:
        return AttentionConfig(64, 64, 4, 3 if width < 80 else 2)
    if width == 128:
        return AttentionConfig(128, 64, 8, 2)
    return AttentionConfig(64, 32 if width <= 160 else 16, 4, 2)
