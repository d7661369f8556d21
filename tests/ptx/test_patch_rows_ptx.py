"""The shipped patch_rows kernel, launched by its own launcher, as the PTX that sm_80 gets.

Beside tests/kernels, where Triton's interpreter runs the same source: here it is what was compiled.
"""

import pytest
import torch

from fasttrace_kernels import reference
from fasttrace_kernels.patch_rows import Launch, launch_
from fasttrace_kernels.specs import PATCH_ROWS
from fasttrace_kernels.testing import assert_same_bits, assert_within

from .faults import OutOfBounds
from .launch import EmulatedKernel

NAN = float("nan")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
NARROW = Launch(block=128, num_warps=1)  # several blocks a row, on few elements


@pytest.fixture
def emulated(compiler, monkeypatch) -> EmulatedKernel:
    """What `launch_` launches from now on."""
    kernel = EmulatedKernel(compiler, "fasttrace_kernels.patch_rows:patch_rows_kernel")
    monkeypatch.setitem(launch_.__globals__, "patch_rows_kernel", kernel)
    return kernel


def patched(out, source, index, strength, mask=None, launch=None):
    result = out.clone()
    launch_(result, source, index, strength, mask, *([launch] if launch else []))
    return result


def table(*values):
    return torch.tensor(values)


def any_bits(shape, dtype, seed=0):
    """NaNs with payloads and denormals among them."""
    kind = BITS[dtype.itemsize]
    low, high = torch.iinfo(kind).min, torch.iinfo(kind).max
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, dtype=kind, generator=generator).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PATCH_ROWS.shapes.values(), ids=PATCH_ROWS.shapes.keys())
def test_equals_reference(emulated, dtype, shape):
    """Bit for bit without fused multiply-add, which is all that the compiler may change."""
    example = PATCH_ROWS.example(shape, dtype, 0)
    want = PATCH_ROWS.reference(**example)
    emulated.enable_fp_fusion = False
    assert_same_bits(patched(**example), want)
    emulated.enable_fp_fusion = True
    assert_within(patched(**example), want, PATCH_ROWS.tolerance[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", [(5, 7), (16, 16)], ids=["odd", "aligned"])
def test_copies_keep_every_bit(emulated, dtype, row):
    out, source = any_bits((6, *row), dtype), any_bits((4, *row), dtype, 1)
    index, strength = table(-1, 3, 0, 2, -1, 1), table(1.0, 1.0, 0.0, 1.0, 0.0, 1.0)
    want = torch.stack([out[0], source[3], out[2], source[2], out[4], source[1]])
    for kind in (torch.int32, torch.int64):
        assert_same_bits(patched(out, source, index.to(kind), strength), want)


def test_what_is_not_patched_is_not_looked_at(emulated):
    """No byte of a source that no lane takes, nor of a lane that keeps its row."""
    out, source = torch.ones(5, 13), torch.full((4, 13), NAN)
    source[1] = 3
    index, strength = table(-1, 2, 1, -1, 1), table(1.0, 0.0, 0.5, 0.0, 1.0)
    got = patched(out, source, index, strength)
    assert got.tolist() == [[1.0] * 13] * 2 + [[2.0] * 13, [1.0] * 13, [3.0] * 13]
    (seen,) = emulated.launches
    assert seen.was_read("source_ptr").any(1).tolist() == [False, True, False, False]
    assert seen.was_read("source_ptr").all(1).tolist() == [False, True, False, False]
    assert seen.was_written("out_ptr").all(1).tolist() == [False, False, True, False, True]
    assert seen.was_written("out_ptr").any(1).tolist() == [False, False, True, False, True]


MASKS = {
    "tokens": lambda draw, shape: draw(shape[:2]) > 0.5,
    "token strengths": lambda draw, shape: draw(shape[:2]),
    "tokens of every lane": lambda draw, shape: draw((1, shape[1])).round(),
    "channels": lambda draw, shape: draw((shape[0], 1, *shape[2:])) > 0.5,
    "everything": lambda draw, shape: draw(shape).round(decimals=1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 2, 13, 33), (3, 2, 8, 32)], ids=["odd", "aligned"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(emulated, dtype, shape, mask):
    example = PATCH_ROWS.example(shape, dtype, 1)
    generator = torch.Generator().manual_seed(2)
    part = MASKS[mask](lambda size: torch.rand(size, generator=generator), example["out"].shape)
    emulated.enable_fp_fusion = False
    want = PATCH_ROWS.reference(**example, mask=part)
    assert not torch.equal(want, PATCH_ROWS.reference(**example))
    assert_same_bits(patched(**example, mask=part), want)


def test_nan_behind_the_mask_stays_out(emulated):
    source = torch.tensor([[[NAN, NAN], [1.0, 1.0]]])
    got = patched(torch.zeros(1, 2, 2), source, table(0), table(0.5), table(0.0, 1.0)[None])
    assert got.tolist() == [[[0.0, 0.0], [0.5, 0.5]]]


@pytest.mark.parametrize("size", [1, 31, 127, 128, 129, 300])
def test_it_writes_its_rows_and_nothing_else(emulated, size):
    """Rows within wider memory: what lies before, between and after them is poison."""
    memory = torch.full((5, size + 3), NAN)
    rows, source = memory[1:-1, 1:-2], torch.randn(2, size)
    rows.fill_(2)
    index, strength = table(1, -1, 0), table(1.0, 1.0, 0.25)
    want = reference.patch_rows(rows, source, index, strength)
    emulated.enable_fp_fusion = False
    launch_(rows, source, index, strength, launch=NARROW)
    assert_same_bits(rows.contiguous(), want)
    rows.fill_(NAN)
    assert memory.isnan().all()


def test_lanes_read_lanes_of_the_same_batch_in_any_order(emulated):
    for backwards in (False, True):
        emulated.backwards = backwards
        batch = torch.arange(12.0).reshape(4, 3)
        launch_(batch, batch, table(-1, 0, 2, 0), table(1.0, 1.0, 0.3, 0.5))
        assert batch.tolist() == [[0, 1, 2], [0, 1, 2], [6, 7, 8], [4.5, 5.5, 6.5]]


def test_an_index_that_no_host_checked_shows_itself(emulated):
    """As NaN, and without reading what isn't there."""
    out = torch.zeros(5, 2)
    index = table(-2, 2, 1, -1, 2**40)
    launch_(out, torch.ones(2, 2), index, torch.ones(5))
    assert out.isnan().all(1).tolist() == [True, True, False, False, True]
    assert out[2:4].tolist() == [[1, 1], [0, 0]]


PLANTED = {
    "the table of indices is not looked at": (r"ld\.global\.b64 \{ %rd\d+ \}, [^;]*;", ""),
    "the strength is not looked at": (
        r"mov\.u32 (%r\d+), 0x0;\s+ld\.global\.b32 [^;]*;",
        r"mov.b32 \1, 0f3F800000;",
    ),
    "lanes lie elsewhere": (r"\[<out_lane_stride>\]", "[<row_size>]"),
    "sources lie elsewhere": (r"\[<source_row_stride>\]", "[<row_size>]"),
    "the lerp goes the other way": (
        r"sub\.rn\.f32\s+(%r\d+), (%r\d+), (%r\d+)",
        r"sub.f32 \1, \3, \2",
    ),
    "strength 1 is a lerp too": (r"0f3F800000", "0f40000000"),
    "strength 0 is patched": (
        r"setp\.eq\.f32(\s+%p\d+, %r\d+), 0f00000000",
        r"setp.eq.f32\1, 0f41000000",
    ),
    "every block does the first part": (r"%ctaid\.x", "0"),
    "every lane is the first": (r"%ctaid\.y", "0"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_show(emulated, name):
    """A lerp at strength 1 would lose the small source; one at strength 0 would bring a NaN."""
    out, source = torch.full((4, 150), 1e8), torch.arange(450.0).reshape(3, 150) / 7
    source[1] = NAN
    rows = in_gaps(out), in_gaps(source)
    index, strength = table(2, -1, 0, 1), table(1.0, 1.0, 0.25, 0.0)
    want = reference.patch_rows(out, source, index, strength)
    emulated.enable_fp_fusion = False
    launch_(rows[0], rows[1], index, strength, launch=NARROW)
    assert_same_bits(rows[0].contiguous(), want)
    rows = in_gaps(out), in_gaps(source)
    emulated.edit = lambda kernel: kernel.edited(*PLANTED[name])
    try:
        launch_(rows[0], rows[1], index, strength, launch=NARROW)
    except OutOfBounds:
        return
    with pytest.raises(AssertionError):
        assert_same_bits(rows[0].contiguous(), want)


def in_gaps(tensor):
    wide = torch.full((tensor.shape[0], tensor.shape[1] + 9), NAN)
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


@pytest.mark.parametrize("access", ["ld", "st"])
def test_a_widened_mask_is_reported(emulated, access):
    emulated.edit = lambda kernel: kernel.edited(rf"@%p\d+ ({access}\.global)", r"\1")
    verb = {"ld": "reads", "st": "writes"}[access]
    with pytest.raises(OutOfBounds, match=rf"{verb} 2 bytes at .*_ptr \+"):
        patched(*(torch.ones(2, 13).half() for _ in "01"), table(0, 1), table(1.0, 1.0))
