"""Faults planted in compiled kernels. Each has to be reported, or to show in the numbers.

Each has the name of the report; `NUMBERS` is for those that only float64 beside them can see.
"""

import pytest
import torch

from .examples import TOLERANCE, Launch, attention, draw
from .faults import Fault, Race, UnknownInstruction
from .launch import Kernel

NUMBERS = "wrong numbers"
RIGHT = "right numbers"
BARRIER = r"bar\.sync[^;]*;"


@pytest.fixture(scope="module")
def launch(compiler) -> Launch:
    """Two stages and four warps: asynchronous copies, ldmatrix, and sums across warps."""
    return attention(compiler, torch.float16)


def verdict(launch: Launch, kernel: Kernel, **changed) -> str:
    try:
        error = launch.error(kernel, **changed)
    except Fault as fault:
        return type(fault).__name__
    # Not "error > tolerance", which a NaN would not be.
    return RIGHT if error < TOLERANCE[torch.float16, "tf32"] else NUMBERS


READ_PARAMETER = r"ld\.param\.b32\s+(%r\d+), \[<{}>\]"
READ_SLOT = r"ld\.global\.b32 \{ %r\d+ \}, \[ %rd\d+ \+ 0 \];"
TIMES_LOG2_E = r"mul\.f32\s+(%r\d+), %r\d+, 0f3FB8AA3B"
OR_MINUS_INFINITY = r"selp\.f32\s+(%r\d+), (%r\d+), 0fFF800000, %p\d+"
COPY_IF = r"selp\.b32\s+(%r\d+), 16, 0, %p\d+;"
WAIT = r"cp\.async\.wait_group\s+0"

# The pattern, what comes in its place, and the verdict.
PLANTED = {
    "a copy is not waited for": (WAIT, "cp.async.wait_group 1", "NotArrived"),
    "no copy is ever waited for": (f"{WAIT};", "", "NotArrived"),
    "the store's mask is gone": (r"@%p\d+ (st\.global)", r"\1", "OutOfBounds"),
    "the load's mask is gone": (r"@%p\d+ (ld\.global)", r"\1", "OutOfBounds"),
    "the copies' mask is gone": (COPY_IF, r"mov.b32 \1, 16;", "OutOfBounds"),
    "rows lie nearer": (READ_PARAMETER.format("kv_stride"), r"mov.b32 \1, 32", "OutOfBounds"),
    "slots are one": (READ_PARAMETER.format("slot_stride"), r"mov.b32 \1, 0", NUMBERS),
    "the slots' table is not looked at": (READ_SLOT, "", NUMBERS),
    "the scale is missing": (TIMES_LOG2_E, r"mov.b32 \1, 0f3FB8AA3B", NUMBERS),
    "base 2 where base e is meant": ("0f3FB8AA3B", "0f3F800000", NUMBERS),
    "keys past the end count": (OR_MINUS_INFINITY, r"mov.b32 \1, \2", NUMBERS),
    "the values are not transposed": (r"\.x4\.trans\.", ".x4.", NUMBERS),
    "registers change places": (r"(mma\S+ \{[^}]*\}), \{ (\S+), (\S+),", r"\1, { \3, \2,", NUMBERS),
    # The threads that hold copies of a row's maximum no longer agree on it.
    "a maximum of the wrong lanes": (r"(bfly\.b32\s+%r\d+, %r\d+), 2,", r"\1, 4,", "Race"),
    "an opcode nobody knows": (r"ex2\.approx\.ftz", "ex3.approx.ftz", "UnknownInstruction"),
}


def test_without_a_fault(launch):
    assert verdict(launch, launch.kernel) == RIGHT


@pytest.mark.parametrize("name", PLANTED)
def test_planted(launch, name):
    pattern, replacement, want = PLANTED[name]
    assert verdict(launch, launch.kernel.edited(pattern, replacement)) == want


def test_every_barrier_is_needed(launch):
    """One only by a loop of no rounds, which ends as soon as it began."""
    count = launch.kernel.count(BARRIER)
    verdicts = {}
    for which in range(count):
        without = launch.kernel.edited(BARRIER, "", which=which)
        verdicts[which] = verdict(launch, without)
        if verdicts[which] == RIGHT:
            verdicts[which] = verdict(launch, without, keys_size=0)
    assert verdicts == dict.fromkeys(range(count), "Race")
    assert count > 4


def test_a_sum_across_warps_without_its_barrier(compiler):
    rows = draw(1, 300)
    arguments = {"out_ptr": torch.empty(1, 300), "in_ptr": rows, "row_size": 300}
    kernel = compiler.compile("ptx.example_kernels:softmax", arguments, {"BLOCK": 512})
    for which in range(kernel.count(BARRIER)):
        with pytest.raises(Race, match="with no barrier since"):
            kernel.edited(BARRIER, "", which=which).launch((1,), arguments)


def test_a_name_that_is_unknown_is_named(launch):
    kernel = launch.kernel.edited(r"ldmatrix", "ldmatrox", which=0)
    with pytest.raises(
        UnknownInstruction, match=r"ldmatrox\.sync\S+ is not known; line \d+: `ldma"
    ):
        launch.run(kernel)
