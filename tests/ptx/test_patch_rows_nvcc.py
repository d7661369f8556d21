"""csrc/patch_rows.cu as nvcc compiles it for sm_80, launched by its own host code.

Without fused multiply-add it has the reference's bits; as it is shipped it is within the tolerance.
"""

import re

import pytest
import torch

from fasttrace_kernels.specs import PATCH_ROWS
from fasttrace_kernels.testing import assert_same_bits, assert_within

from .csrc_structs import patch_rows_args
from .faults import Misaligned, OutOfBounds
from .launch import bound
from .nvcc import compile_op, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

NAN = float("nan")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    return compile_op("patch_rows", tmp_path_factory.mktemp("patch_rows"))


@pytest.fixture(scope="module")
def unfused(shipped):
    return shipped.with_flags("-fmad=false")


def table(*values):
    return torch.tensor(values)


def launch(op, out, source, index, strength, mask=None, **options):
    """Into out. The masks are made contiguous, as the op's host code does."""
    tensors = {"out": out, "source": source, "index": index, "strength": strength}
    tensors["mask"] = None if mask is None else mask.contiguous()
    return op.launch(patch_rows_args(**tensors), tensors, **options)


def patched(op, out, *rest, **named):
    result = out.clone()
    launch(op, result, *rest, **named)
    return result


def shapes(dtype):
    """Lanes, sources and a row of more than one block: odd, and a multiple of 16 bytes."""
    width = 16 // dtype.itemsize
    return {"odd": (5, 3, 7, 43), "aligned": (4, 3, 11, 28 * width)}


@pytest.mark.parametrize("row", ["odd", "aligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(shipped, unfused, dtype, row):
    example = PATCH_ROWS.example(shapes(dtype)[row], dtype, 0)
    want = PATCH_ROWS.reference(**example)
    for backwards in (False, True):
        assert_same_bits(patched(unfused, **example, backwards=backwards), want)
    assert unfused.launches[-1].packed == (row == "aligned")
    assert unfused.launches[-1].grid[0] > 1
    assert_within(patched(shipped, **example), want, PATCH_ROWS.tolerance[dtype])


def test_fused_multiply_add_is_in_the_shipped_kernel_only(shipped, unfused):
    assert re.search(r"\bfma\.rn\.f32", shipped.ptx)
    assert not re.search(r"\bfma\.", unfused.ptx)


@pytest.mark.parametrize("shape", PATCH_ROWS.shapes.values(), ids=PATCH_ROWS.shapes.keys())
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_every_shape(unfused, shape, index):
    example = PATCH_ROWS.example(shape, torch.float16, 1)
    example["index"] = example["index"].to(index)
    assert_same_bits(patched(unfused, **example), PATCH_ROWS.reference(**example))


@pytest.mark.parametrize("row", ["odd", "aligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_keep_every_bit(shipped, dtype, row):
    """NaNs with payloads and denormals among them."""

    def any_bits(lanes, seed):
        kind = BITS[dtype.itemsize]
        low, high = torch.iinfo(kind).min, torch.iinfo(kind).max
        generator = torch.Generator().manual_seed(seed)
        size = (lanes, *shapes(dtype)[row][2:])
        return torch.randint(low, high, size, dtype=kind, generator=generator).view(dtype)

    out, source = any_bits(6, 0), any_bits(4, 1)
    index, strength = table(-1, 3, 0, 2, -1, 1), table(1.0, 1.0, 0.0, 1.0, 0.0, 1.0)
    want = torch.stack([out[0], source[3], out[2], source[2], out[4], source[1]])
    assert_same_bits(patched(shipped, out, source, index, strength), want)


MASKS = {
    "tokens": lambda draw, shape: draw(shape[:2]) > 0.5,
    "token strengths": lambda draw, shape: draw(shape[:2]),
    "tokens of every lane": lambda draw, shape: draw((1, shape[1])).round(),
    "channels": lambda draw, shape: draw((shape[0], 1, *shape[2:])) > 0.5,
    "everything": lambda draw, shape: draw(shape).round(decimals=1),
}


@pytest.mark.parametrize("row", ["odd", "aligned"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(unfused, mask, dtype, row):
    """Those that are no bool also as float64, where out is."""
    example = PATCH_ROWS.example(shapes(dtype)[row], dtype, 2)
    generator = torch.Generator().manual_seed(3)
    part = MASKS[mask](lambda size: torch.rand(size, generator=generator), example["out"].shape)
    parts = [part] if part.dtype == torch.bool or dtype != torch.float64 else [part, part.double()]
    for each in parts:
        want = PATCH_ROWS.reference(**example, mask=each)
        assert not torch.equal(want, PATCH_ROWS.reference(**example))
        assert_same_bits(patched(unfused, **example, mask=each), want)


def test_strengths_in_float64(unfused):
    example = PATCH_ROWS.example((4, 3, 2, 5), torch.float64, 4)
    example["strength"] = example["strength"].double() / 3
    assert_same_bits(patched(unfused, **example), PATCH_ROWS.reference(**example))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("row", ["odd", "aligned"])
def test_one_block_walks_the_whole_row(unfused, dtype, row):
    """As it must where a row has more than 1024 blocks' worth."""
    example = PATCH_ROWS.example(shapes(dtype)[row], dtype, 5)
    generator = torch.Generator().manual_seed(6)
    mask = torch.rand(example["out"].shape, generator=generator) > 0.5
    for part in (None, mask):
        want = PATCH_ROWS.reference(**example, mask=part)
        assert_same_bits(patched(unfused, **example, mask=part, blocks=1), want)


def in_gaps(tensor, gap):
    wide = tensor.new_full((tensor.shape[0], tensor[0].numel() + gap), NAN)
    wide[:, :-gap] = tensor.flatten(1)
    return wide[:, :-gap].unflatten(1, tensor.shape[1:])


@pytest.mark.parametrize("gap", [9, 16], ids=["odd", "aligned"])
def test_what_is_not_patched_is_not_looked_at(shipped, gap):
    """No byte of a source that no lane takes, nor of a lane that keeps its row, nor between rows,
    which is out of bounds here."""
    out = in_gaps(torch.ones(5, 400), gap)
    source = in_gaps(torch.full((4, 400), NAN), gap)
    source[1] = 3
    index, strength = table(-1, 2, 1, -1, 1), table(1.0, 0.0, 0.5, 0.0, 1.0)
    seen = launch(shipped, out, source, index, strength)
    assert shipped.launches[-1].packed == (gap == 16)
    assert out.unique(dim=1).flatten().tolist() == [1, 1, 2, 1, 3]
    assert seen.was_read("source").any(1).tolist() == [False, True, False, False]
    assert seen.was_read("source").all(1).tolist() == [False, True, False, False]
    assert seen.was_written("out").all(1).tolist() == [False, False, True, False, True]
    assert seen.was_written("out").any(1).tolist() == [False, False, True, False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [3, 16], ids=["odd", "aligned"])
def test_an_index_that_no_host_checked_shows_itself(shipped, dtype, size):
    """As NaN, and without reading what isn't there."""
    out, source = torch.zeros(5, size, dtype=dtype), torch.ones(2, size, dtype=dtype)
    got = patched(shipped, out, source, table(-2, 2, 1, -1, 2**40), torch.ones(5))
    assert got.isnan().all(1).tolist() == [True, True, False, False, True]
    assert got[2].eq(1).all()
    assert got[3].eq(0).all()


def test_nan_behind_the_mask_stays_out(shipped):
    source = torch.tensor([[[NAN, NAN], [1.0, 1.0]]])
    mask = table(0.0, 1.0)[None]
    got = patched(shipped, torch.zeros(1, 2, 2), source, table(0), table(0.5), mask)
    assert got.tolist() == [[[0.0, 0.0], [0.5, 0.5]]]


def test_the_host_code_refuses_and_has_nothing_to_do(shipped):
    before = len(shipped.launches)
    launch(shipped, torch.ones(3, 0), torch.ones(1, 0), table(0, 0, 0), torch.ones(3))
    assert len(shipped.launches) == before
    many = torch.ones(1, 1).expand(65536, 1)
    with pytest.raises(RuntimeError, match="at most 65535 lanes fit one launch"):
        launch(shipped, many, torch.ones(1, 1), table(0), torch.ones(1))


def test_every_kernel_of_the_file_is_understood(shipped, unfused):
    """Also the ways through it that no test here goes."""
    for op in (shipped, unfused):
        assert len(op.kernels()) == 8
        for kernel in op.kernels():
            bound(op.ptx, kernel)


PLANTED = {
    "the table of indices is not looked at": lambda op: op.edited(
        r"ld\.global\.(u64|s32)(\s+%rd\d+), [^;]*;", r"mov.b64 \2, 0;"
    ),
    "lanes lie elsewhere": lambda op: op.with_field("out_lane_stride", "150"),
    "sources lie elsewhere": lambda op: op.with_field("source_row_stride", "150"),
    "there is no last source": lambda op: op.with_field("source_rows", "2"),
    "the row ends later": lambda op: op.with_field("channels", "301"),
    "the row ends earlier": lambda op: op.with_field("channels", "299"),
    "the lerp goes the other way": lambda op: op.edited(
        r"sub\.rn\.f32(\s+%f\d+), (%f\d+), (%f\d+)", r"sub.rn.f32\1, \3, \2"
    ),
    "strength 1 is a lerp too": lambda op: op.edited(
        r"(setp\.eq\.f32\s+%p\d+, %f\d+), 0f3F800000", r"\1, 0f40000000"
    ),
    "strength 0 is patched": lambda op: op.edited(
        r"(setp\.eq\.f32\s+%p\d+, %f\d+), 0f00000000", r"\1, 0f41000000"
    ),
    "every block does the first part": lambda op: op.edited(r"%ctaid\.x", "0"),
    "every lane is the first": lambda op: op.edited(r"%ctaid\.y", "0"),
    "every thread is the first": lambda op: op.edited(r"%tid\.x", "0"),
    "a branch goes the other way": lambda op: op.edited(r"@(%p\d+ bra\s+\$L__BB\d+_52;)", r"@!\1"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_show(unfused, name):
    """A lerp at strength 1 would lose the small source; one at strength 0 would bring a NaN."""
    out, source = torch.full((4, 300), 1e8), torch.arange(900.0).reshape(3, 300) / 7
    source[1] = NAN
    index, strength = table(2, -1, 0, 1), table(1.0, 1.0, 0.25, 0.0)
    want = PATCH_ROWS.reference(out, source, index, strength)
    faulty = PLANTED[name](unfused)
    for op in (unfused, faulty):
        rows = in_gaps(out, 9), in_gaps(source, 9)
        try:
            launch(op, *rows, index, strength)
            assert_same_bits(rows[0].contiguous(), want)
        except (OutOfBounds, AssertionError):
            assert op is faulty
        else:
            assert op is unfused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_packed_access_is_refused_where_rows_are_odd(unfused, dtype):
    """The host code's choice of the kernel matters: the other one reads past the row."""
    out, source = (torch.ones(2, 13, dtype=dtype) for _ in "01")
    patched(unfused, out, source, table(0, 1), torch.ones(2))
    single = unfused.launches[-1].kernel
    assert not unfused.launches[-1].packed
    wide = re.sub(r"Li1EEEv", f"Li{16 // dtype.itemsize}EEEv", single)
    assert wide in unfused.kernels()
    swapped = unfused.edited(rf"\b{single}\b", "elsewhere").edited(rf"\b{wide}\b", single)
    with pytest.raises((Misaligned, OutOfBounds)):
        launch(swapped, in_gaps(out, 9), in_gaps(source, 9), table(0, 1), torch.ones(2))
