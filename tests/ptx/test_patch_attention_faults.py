"""Faults planted in the compiled patch_attention. Each has to be reported, or to show in numbers.

The same check, with nothing planted, finds nothing.
"""

import re

import pytest
import torch

from fasttrace_kernels.patch_attention import launch

from .faults import Fault
from .fused_attention import MAPS_TOLERANCE, TOLERANCE, Example, error, exact

RIGHT, NUMBERS = "right numbers", "wrong numbers"
KEYS = {"text": 77, "picture": 130}
BOTH = tuple(KEYS)
BARRIER = r"bar\.sync[^;]*;"


def verdict(run, want, tolerance=TOLERANCE[torch.float16]):
    try:
        off = error(run(), want)
    except Fault as fault:
        return type(fault).__name__
    # Not "off > tolerance", which a NaN would not be.
    return RIGHT if off < tolerance else NUMBERS


class Check:
    """Every kind of patch, on one path."""

    def __init__(self, fused, path, **changed):
        self.fused = fused
        self.example = Example(keys=KEYS[path], **changed)
        self.tables = self.example.tables()
        self.want, self.want_maps = exact(**self.example.tensors, **self.tables)

    def run(self):
        return self.fused.out(**self.example.tensors, **self.tables)

    def kernel(self):
        return self.fused.compiled(self.run)

    def verdict(self, edit=lambda kernel: kernel):
        self.fused.kernel.edit = edit
        return verdict(self.run, self.want)


def parameter(name):
    return rf"ld\.param\.[bs](32|64)\s+(%\w+), \[<{name}>\]"


SAME_OF = r"ld.param.s\1 \2, [<{}>]"
LOAD_64 = r"mov\.u64 (%rd\d+), 0x0;\s+ld\.global\.b64 [^;]*;"
STRENGTH = r"mov\.u32 (%r\d+), %r\d+;\s+@%p\d+ ld\.global\.b32 [^;]*;"

# The paths, the pattern, what comes in its place, which match (None is all), and the verdict.
PLANTED = {
    "the first copies are not waited for": (
        ("picture",),
        r"cp\.async\.wait_group\s+4",
        "cp.async.wait_group 8",
        None,
        "NotArrived",
    ),
    "a single copy is not waited for": (
        ("picture",),
        r"cp\.async\.wait_group\s+4",
        "cp.async.wait_group 5",
        None,
        "NotArrived",
    ),
    "the last copies are not waited for": (
        ("picture",),
        r"cp\.async\.wait_group\s+0",
        "cp.async.wait_group 8",
        None,
        "NotArrived",
    ),
    "both barriers behind the loop are gone": (
        ("picture",),
        r"(wait_group\s+0;\s+)bar\.sync\s+0;([^$]*?)bar\.sync\s+0;",
        r"\1\2",
        None,
        "Race",
    ),
    "the store's mask is gone": (BOTH, r"@%p\d+ (st\.global)", r"\1", None, "OutOfBounds"),
    "the store's mask is gone behind the split": (
        BOTH,
        r"@%p\d+ (st\.global)",
        r"\1",
        -1,
        "OutOfBounds",
    ),
    "the loads' mask is gone": (BOTH, r"@%p\d+ (ld\.global\.v)", r"\1", None, "OutOfBounds"),
    "the copies' mask is gone": (
        ("picture",),
        r"selp\.b32\s+(%r\d+), 16, 0, %p\d+;",
        r"mov.b32 \1, 16;",
        None,
        "OutOfBounds",
    ),
    "keys lie nearer": (BOTH, parameter("key_token_stride"), r"mov.b\1 \2, 5", None, "OutOfBounds"),
    "the next key is the next head's": (
        BOTH,
        parameter("key_token_stride"),
        SAME_OF.format("key_head_stride"),
        None,
        NUMBERS,
    ),
    "the next value is the next head's": (
        BOTH,
        parameter("value_token_stride"),
        SAME_OF.format("value_head_stride"),
        None,
        NUMBERS,
    ),
    "slots of keys are one": (
        BOTH,
        parameter("key_slot_stride"),
        r"mov.b\1 \2, 0",
        None,
        NUMBERS,
    ),
    "lanes of queries are one": (
        BOTH,
        parameter("query_lane_stride"),
        r"mov.b\1 \2, 0",
        None,
        NUMBERS,
    ),
    "the scale is missing": (
        BOTH,
        r"selp\.f32\s+(%r\d+), %r\d+, 0f7FC00000, %p\d+",
        r"mov.b32 \1, 0f3FB8AA3B",
        None,
        NUMBERS,
    ),
    "the table of sources is not looked at": (BOTH, LOAD_64, r"mov.s64 \1, -1;", 0, NUMBERS),
    "the first lane is every source": (BOTH, LOAD_64, r"mov.s64 \1, 0;", 0, NUMBERS),
    "the table of slots is not looked at": (BOTH, LOAD_64, r"mov.s64 \1, 0;", 1, NUMBERS),
    "the source's pass reads its own lane": (
        BOTH,
        r"selp\.b64\s+(%rd\d+), (%rd\d+), (%rd\d+), %p\d+;",
        r"mov.b64 \1, \2;",
        0,
        NUMBERS,
    ),
    "the strength is not looked at": (BOTH, STRENGTH, r"mov.b32 \1, 0f3F800000;", None, NUMBERS),
    "the lerp goes the other way": (
        BOTH,
        r"sub\.f32\s+(%r\d+), (%r\d+), (%r\d+)",
        r"sub.f32 \1, \3, \2",
        None,
        NUMBERS,
    ),
    "keys past the end count": (
        BOTH,
        r"selp\.f32\s+(%r\d+), (%r\d+), 0fFF800000, %p\d+",
        r"mov.b32 \1, \2",
        None,
        NUMBERS,
    ),
    "earlier tiles are not scaled down": (
        ("picture",),
        r"ex2\.approx\.ftz\.f32\s+(%r\d+), %r\d+",
        r"mov.b32 \1, 0f3F800000",
        -1,
        NUMBERS,
    ),
    "the values are not transposed": (BOTH, r"\.x4\.trans\.", ".x4.", None, NUMBERS),
    "registers change places": (
        BOTH,
        r"(mma\S+ \{[^}]*\}), \{ (\S+), (\S+),",
        r"\1, { \3, \2,",
        None,
        NUMBERS,
    ),
    "every head is the first": (BOTH, r"%ctaid\.y", "0", None, NUMBERS),
}
CASES = [(name, path) for name, (paths, *_) in PLANTED.items() for path in paths]


@pytest.mark.parametrize("path", BOTH)
def test_without_a_fault(fused, path):
    assert Check(fused, path).verdict() == RIGHT


@pytest.mark.parametrize(("name", "path"), CASES, ids=[f"{name}-{path}" for name, path in CASES])
def test_planted(fused, name, path):
    _, pattern, replacement, which, want = PLANTED[name]
    check = Check(fused, path)
    found = check.verdict(lambda kernel: kernel.edited(pattern, replacement, which=which))
    assert found == want


def spare(sections, which):
    """Whether a barrier has a neighbour that does its work: nothing but the start of copies lies
    between it and the one before, or nothing at all between it and the next one."""
    access = r"(ld|st)\.shared|ldmatrix|wait_group|\bbra\b|\$L"
    before, after = sections[which], sections[which + 1]
    return not re.search(access, before) or not re.search(rf"{access}|cp\.async", after)


@pytest.mark.parametrize(
    "size", [40, *(pytest.param(size, marks=pytest.mark.kernels_slow) for size in (80, 160))]
)
@pytest.mark.parametrize("path", BOTH)
def test_every_barrier_is_needed(fused, path, size):
    """Alone, or, of those that have a neighbour, together with it."""
    check = Check(fused, path, size=size, tokens=64, lanes=2)
    kernel = check.kernel()
    assert check.verdict() == RIGHT
    sections = re.split(BARRIER, kernel.ptx)
    idle = []
    for which in range(len(sections) - 1):
        found = check.verdict(lambda kernel, which=which: kernel.edited(BARRIER, "", which=which))
        if found == RIGHT:
            assert spare(sections, which), f"barrier {which} can go, and nobody notices"
            idle.append(which)
        else:
            assert found == "Race"
    assert len(sections) > 10
    assert len(idle) <= 3


@pytest.mark.parametrize("size", [40, 64, 80, 128, 160])
@pytest.mark.parametrize("path", BOTH)
def test_what_the_second_pass_reads_is_the_thread_s_own(fused, path, size):
    """The check for races sees shared memory alone. Of global memory a thread reads back what it
    wrote in the first pass, at the same address, so that no race is possible there."""
    ptx = Check(fused, path, size=size, tokens=20, lanes=2).kernel().ptx
    stored = re.findall(r"st\.global\S* \[ (%rd\d+) \+ 0 \]", ptx)
    loaded = re.findall(r"ld\.global\S* \{[^}]*\}, \[ (%rd\d+) \+ 0 \]", ptx)
    assert stored
    assert {*stored} <= {*loaded}
    for address in stored:  # which is computed once
        assert len(re.findall(rf"^\s*\w+(?:\.\w+)+\s+{address},", ptx, re.M)) == 1


MAPS_PLANTED = {
    "the store's mask is gone": (r"@%p\d+ (st\.global)", r"\1", "OutOfBounds"),
    "probabilities are no shares": (
        r"div\.full\.f32\s+(%r\d+), (%r\d+), %r\d+",
        r"mov.b32 \1, \2",
        NUMBERS,
    ),
    "rows lie nearer": (parameter("keys_size"), r"mov.b\1 \2, 76", NUMBERS),
}


@pytest.mark.parametrize("name", [None, *MAPS_PLANTED])
def test_planted_in_maps(fused, name):
    check = Check(fused, "text", tokens=20)
    pattern, replacement, want = MAPS_PLANTED[name] if name else (None, None, RIGHT)
    if name:
        fused.kernel.edit = lambda kernel: kernel.edited(pattern, replacement)
    found = verdict(
        lambda: fused.maps(**check.example.tensors, **check.tables)[1],
        check.want_maps,
        MAPS_TOLERANCE,
    )
    assert found == want


class Launched:
    """A launcher that gets one argument of its launch wrong."""

    def __init__(self, kernel, wrong):
        self.kernel, self.wrong = kernel, wrong

    def __getitem__(self, grid):
        run = self.kernel[grid]
        return lambda **given: run(**given | self.wrong(given))


ARGUMENTS = {
    "nothing": (BOTH, lambda given: {}, RIGHT),
    "keys and values change places": (
        BOTH,
        lambda given: {"key_ptr": given["value_ptr"], "value_ptr": given["key_ptr"]},
        NUMBERS,
    ),
    "the scale is of base e": (BOTH, lambda given: {"scale_log2": 40**-0.5}, NUMBERS),
    "one query too many": (
        BOTH,
        lambda given: {"queries_size": given["queries_size"] + 1},
        "OutOfBounds",
    ),
    "one key too many": (BOTH, lambda given: {"keys_size": given["keys_size"] + 1}, "OutOfBounds"),
    "one key too few": (BOTH, lambda given: {"keys_size": given["keys_size"] - 1}, NUMBERS),
    "no key is said to be missing": (BOTH, lambda given: {"EVEN": True}, "OutOfBounds"),
    "the head's end is left out": (BOTH, lambda given: {"D2": 0}, NUMBERS),
    "the head is said to be wider": (BOTH, lambda given: {"D": 48}, "OutOfBounds"),
    "strides are not in units of 16 bytes": (BOTH, lambda given: {"ALIGN": 1}, "OutOfBounds"),
    "all tokens share one strength": (BOTH, lambda given: {"strength_token_stride": 0}, NUMBERS),
}
LAUNCHES = [(name, path) for name, (paths, *_) in ARGUMENTS.items() for path in paths]


@pytest.mark.parametrize(
    ("name", "path"), LAUNCHES, ids=[f"{name}-{path}" for name, path in LAUNCHES]
)
def test_a_wrong_launch(fused, monkeypatch, name, path):
    _, wrong, want = ARGUMENTS[name]
    names = launch.__globals__
    monkeypatch.setitem(names, "patch_attention_kernel", Launched(fused.kernel, wrong))
    assert Check(fused, path).verdict() == want
