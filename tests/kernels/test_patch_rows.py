"""patch_rows in every form against numbers by hand and against the reference.

Each test can fail: beside every "equals" stands a value that a wrong form would change.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fasttrace_kernels
from fasttrace_kernels import reference
from fasttrace_kernels.patch_rows import Launch, launch_, patch_rows_kernel
from fasttrace_kernels.specs import PATCH_ROWS
from fasttrace_kernels.testing import assert_same_bits, assert_within

NAN = float("nan")
OUT = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [NAN, 8.0]])
SOURCE = torch.tensor([[10.0, 20.0], [NAN, 40.0]])
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def table(*values):
    return torch.tensor(values)


def test_reference_by_hand():
    got = reference.patch_rows(OUT, SOURCE, table(-1, 0, 0, 0), table(1.0, 0.25, 1.0, 1.0))
    # 3 + (10 - 3) / 4, 4 + (20 - 4) / 4; strength 1 replaces the NaN of the last lane.
    assert_same_bits(got, torch.tensor([[1.0, 2.0], [4.75, 8.0], [10.0, 20.0], [10.0, 20.0]]))


def test_reference_mask_by_hand():
    out, source = torch.zeros(1, 3, 2), torch.full((1, 3, 2), 8.0)
    tokens = reference.patch_rows(
        out, source, table(0), table(0.5), torch.tensor([[1.0, 0.0, 0.5]])
    )
    assert tokens.tolist() == [[[4.0, 4.0], [0.0, 0.0], [2.0, 2.0]]]
    channels = reference.patch_rows(
        out, source, table(0), table(1.0), torch.tensor([[[True, False]]])
    )
    assert channels.tolist() == [[[8.0, 0.0]] * 3]


def test_by_hand(run):
    got = run(
        PATCH_ROWS, OUT, source=SOURCE, index=table(-1, 0, 0, 0), strength=table(1.0, 0.25, 1, 1)
    )
    assert_same_bits(got, torch.tensor([[1.0, 2.0], [4.75, 8.0], [10.0, 20.0], [10.0, 20.0]]))


def test_what_is_not_patched_keeps_its_bits_and_its_source_is_not_looked_at(run):
    # Lane 0: no source. Lane 1: strength 0 and a source with a NaN. Lane 3 keeps its own NaN.
    got = run(
        PATCH_ROWS, OUT, source=SOURCE, index=table(-1, 1, -1, -1), strength=table(1.0, 0.0, 1, 1)
    )
    assert_same_bits(got, OUT)


def test_nan_of_the_source_arrives(run):
    got = run(
        PATCH_ROWS, OUT, source=SOURCE, index=table(1, 1, -1, -1), strength=table(1.0, 0.5, 1, 1)
    )
    assert got[0, 0].isnan()
    assert got[1, 0].isnan()
    assert got[:2, 1].tolist() == [40.0, 22.0]


# numpy, in Triton's interpreter, speaks of the NaNs and infinities among the bits.
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_keep_every_bit(run, dtype):
    """Also of NaNs that carry a payload and of denormals, which arithmetic would change."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    generator = torch.Generator().manual_seed(0)
    low, high = torch.iinfo(bits).min, torch.iinfo(bits).max
    out = torch.randint(low, high, (6, 5, 7), dtype=bits, generator=generator).view(dtype)
    source = torch.randint(low, high, (4, 5, 7), dtype=bits, generator=generator).view(dtype)
    index, strength = table(-1, 3, 0, 2, -1, 1), table(1.0, 1.0, 0.0, 1.0, 0.0, 1.0)
    want = torch.stack([out[0], source[3], out[2], source[2], out[4], source[1]])
    assert not torch.equal(want.view(bits), out.view(bits))
    assert_same_bits(run(PATCH_ROWS, out, source=source, index=index, strength=strength), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PATCH_ROWS.shapes.values(), ids=PATCH_ROWS.shapes.keys())
def test_equals_reference(run, form, dtype, shape):
    example = PATCH_ROWS.example(shape, dtype, 0)
    got, want = run(PATCH_ROWS, **example), PATCH_ROWS.reference(**example)
    if form == "compiled":
        assert_same_bits(got, want)  # built without fused multiply-add
    assert_within(got, want, PATCH_ROWS.tolerance[dtype])


MASKS = {
    "tokens": lambda draw, shape: draw(shape[:2]) > 0.5,
    "token strengths": lambda draw, shape: draw(shape[:2]),
    "tokens of every lane": lambda draw, shape: draw((1, shape[1])).round(),
    "channels": lambda draw, shape: draw((shape[0], 1, *shape[2:])) > 0.5,
    "everything": lambda draw, shape: draw(shape).round(decimals=1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 2, 13, 33), (4, 2, 6, 7, 9)], ids=["tokens", "image"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(run, dtype, shape, mask):
    example = PATCH_ROWS.example(shape, dtype, 1)
    generator = torch.Generator().manual_seed(2)
    draw = lambda size: torch.rand(size, generator=generator)  # noqa: E731
    part = MASKS[mask](draw, example["out"].shape)
    got, want = run(PATCH_ROWS, **example, mask=part), PATCH_ROWS.reference(**example, mask=part)
    assert not torch.equal(want, PATCH_ROWS.reference(**example))
    assert_within(got, want, PATCH_ROWS.tolerance[dtype])


def test_mask_of_pooled_text_picks_channels(run):
    out, source = torch.zeros(2, 3), torch.ones(1, 3)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    got = run(
        PATCH_ROWS, out, source=source, index=table(0, 0), strength=table(1.0, 1.0), mask=mask
    )
    assert got.tolist() == [[1, 0, 1], [0, 0, 1]]


def test_nan_behind_the_mask_stays_out(run):
    amounts = {"index": table(0), "strength": table(0.5)}
    source = torch.tensor([[[NAN, NAN], [1.0, 1.0]]])
    tokens = table(0.0, 1.0)[None]
    got = run(PATCH_ROWS, torch.zeros(1, 2, 2), source=source, mask=tokens, **amounts)
    assert got.tolist() == [[[0.0, 0.0], [0.5, 0.5]]]
    channels = tokens[:, None]
    got = run(PATCH_ROWS, torch.zeros(1, 2, 2), source=source.mT, mask=channels, **amounts)
    assert got.tolist() == [[[0.0, 0.5], [0.0, 0.5]]]


LAYOUTS = {
    "transposed rows": lambda x: x.mT.contiguous().mT,
    "channels last": lambda x: x.permute(0, 2, 1).contiguous().permute(0, 2, 1),
    "every second lane": lambda x: torch.stack([x, torch.full_like(x, NAN)], 1).flatten(0, 1)[::2],
    "part of wider rows": lambda x: torch.cat([x, torch.full_like(x, NAN)], -1)[..., : x.shape[-1]],
}


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("of_source", LAYOUTS)
@pytest.mark.parametrize("of_out", LAYOUTS)
def test_not_contiguous(form, of_out, of_source, masked):
    example = PATCH_ROWS.example((5, 3, 4, 6), torch.float32, 3)
    mask = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) if masked else None
    want = PATCH_ROWS.reference(**example, mask=mask)
    out = LAYOUTS[of_out](example.pop("out"))
    source = LAYOUTS[of_source](example.pop("source"))
    index = torch.stack([example["index"], example["index"]], 1)[:, 0]
    functions = {"fallback": PATCH_ROWS.fallback, "triton": launch_}
    functions["compiled"] = fasttrace_kernels.patch_rows_
    functions[form](out, source, index, example["strength"], mask)
    assert not index.is_contiguous()
    assert_within(out.contiguous(), want, PATCH_ROWS.tolerance[torch.float32])


@pytest.mark.parametrize("block", [16, 64])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_triton_writes_its_rows_and_nothing_else(block, data):
    """Any table, odd sizes, several blocks a row, and a poisoned margin before and after."""
    lanes, rows = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    tokens, channels = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 23))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    index = torch.tensor(
        data.draw(st.lists(st.integers(-1, rows - 1), min_size=lanes, max_size=lanes))
    )
    amounts = st.sampled_from([0.0, 1.0, 0.5, -1.0, 0.3])
    strength = torch.tensor(data.draw(st.lists(amounts, min_size=lanes, max_size=lanes)))
    kind = data.draw(st.sampled_from([torch.int32, torch.int64]))
    example = PATCH_ROWS.example((lanes, rows, tokens, channels), dtype, 0)
    want = reference.patch_rows(example["out"], example["source"], index, strength)
    memory = torch.full((lanes + 2, tokens, channels), NAN, dtype=dtype)
    memory[1:-1] = example["out"]
    launch_(memory[1:-1], example["source"], index.to(kind), strength, launch=Launch(block=block))
    assert_within(memory[1:-1], want, PATCH_ROWS.tolerance[dtype])
    assert memory[[0, -1]].isnan().all()


def test_triton_shows_an_index_that_no_host_checked():
    out = torch.zeros(4, 2)
    launch_(out, torch.ones(2, 2), table(-2, 2, 1, -1), torch.ones(4))
    assert out.isnan().all(1).tolist() == [True, True, False, False]


def test_triton_runs_in_the_interpreter_here():
    assert type(patch_rows_kernel).__name__ == "InterpretedFunction"


def test_in_place_returns_out_and_counts_as_a_write():
    out = torch.zeros(2, 3)
    before = out._version
    got = fasttrace_kernels.patch_rows_(out, torch.ones(1, 3), table(0, -1), table(1.0, 1.0))
    assert got is out
    assert out.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert out._version > before


@pytest.mark.parametrize("form", ["compiled", "fallback", "triton"])
def test_lanes_read_lanes_of_the_same_batch(form):
    """The clean run as a leader lane: source is out itself; a lane may also read itself."""
    functions = {"fallback": PATCH_ROWS.fallback, "triton": launch_}
    functions["compiled"] = fasttrace_kernels.patch_rows_
    batch = torch.arange(12.0).reshape(4, 3)
    functions[form](batch, batch, table(-1, 0, 2, 0), table(1.0, 1.0, 0.3, 0.5))
    assert batch.tolist() == [[0, 1, 2], [0, 1, 2], [6, 7, 8], [4.5, 5.5, 6.5]]
    # Lane 0 has a source but strength 0, so it is as good as unpatched and can be read.
    functions[form](batch, batch, table(1, 0, -1, -1), table(0.0, 0.5, 1.0, 1.0))
    assert batch[:2].tolist() == [[0, 1, 2], [0, 1, 2]]


def test_no_lanes():
    nothing = torch.zeros(0, 3)
    got = fasttrace_kernels.patch_rows(
        nothing, torch.ones(1, 3), torch.zeros(0).long(), torch.zeros(0)
    )
    assert got.shape == (0, 3)


def test_a_big_row_is_shared_between_threads():
    example = PATCH_ROWS.example((3, 2, 300, 700), torch.float32, 5)
    example["index"] = table(1, -1, 0)
    assert_same_bits(fasttrace_kernels.patch_rows(**example), reference.patch_rows(**example))


def test_the_comparison_itself_can_fail():
    """A form one unit in the last place off, or that drops a NaN's payload, is caught."""
    one = torch.ones(4)
    with pytest.raises(AssertionError, match="4 of 4 elements differ"):
        assert_same_bits(torch.nextafter(one, one * 2), one)
    with pytest.raises(AssertionError, match="relative error: max 1.00e-03"):
        assert_within(torch.tensor([1.0, 1.001]), torch.tensor([1.0, 1.0]), 1e-4)
    with pytest.raises(AssertionError, match="special values"):
        assert_within(torch.tensor([1.0, 0.0]), torch.tensor([1.0, NAN]), 1.0)
    with pytest.raises(AssertionError, match="relative error"):
        assert_within(torch.tensor([1.0, NAN]), torch.tensor([1.0, 0.0]), 1.0)
