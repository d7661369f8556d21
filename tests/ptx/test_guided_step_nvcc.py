"""csrc/guided_step.cu as nvcc compiles it for sm_80, launched by its own host code.

It has the reference's bits as it is shipped: its sums are never fused. Blocks run one after
another, forwards and backwards: whichever comes last moves the counter, and none may see it moved.
"""

import re

import pytest
import torch

from fasttrace.engine.schedule import advance, read_schedule
from fasttrace.testing.tiny import make_scheduler
from fasttrace_kernels.specs import GUIDED_STEP
from fasttrace_kernels.testing import assert_same_bits

from .csrc_structs import guided_step_args
from .faults import Divergence, OutOfBounds
from .launch import bound
from .nvcc import compile_op, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

NAN = float("nan")
# Of prediction and sample, and of state and noise.
DTYPES = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16, float32 state": (torch.float16, torch.float32),
    "bfloat16, float32 state": (torch.bfloat16, torch.float32),
}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    return compile_op("guided_step", tmp_path_factory.mktemp("guided_step"))


def launch(op, latents, backwards=False, blocks=None, **tensors):
    args = guided_step_args(**tensors, latents=latents)
    return op.launch(args, tensors, backwards=backwards, blocks=blocks)


def outcome(op, arguments, **options):
    def form(**given):
        launch(op, **given, **options)

    return GUIDED_STEP.outcome(form, arguments)


def check(got, want):
    for ours, theirs in zip(got, want, strict=True):
        assert_same_bits(ours, theirs)


def example_of(dtypes, shape, seed=0):
    dtype, state_dtype = DTYPES[dtypes]
    example = GUIDED_STEP.example(shape, dtype, seed)
    if state_dtype != dtype:
        example |= {name: example[name].to(state_dtype) / 3 for name in ("state", "noise")}
    return example


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("row", [(3, 101), (7, 4, 8, 16)], ids=["odd", "aligned"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_equals_reference(shipped, dtypes, row, backwards):
    example = example_of(dtypes, (2, 3, 3, *row))
    got = outcome(shipped, example, backwards=backwards)
    check(got, GUIDED_STEP.reference(**example))
    assert shipped.launches[-1].packed == (len(row) == 4)
    assert shipped.launches[-1].grid[0] > 1


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", GUIDED_STEP.shapes.values(), ids=GUIDED_STEP.shapes.keys())
def test_every_shape(shipped, shape, dtypes):
    example = example_of(dtypes, shape, 1)
    check(outcome(shipped, example), GUIDED_STEP.reference(**example))


@pytest.mark.parametrize("latents", [1, 2, 3, 4])
@pytest.mark.parametrize("predictions", [1, 2, 3, 4, 5])
def test_any_number_of_slots(shipped, latents, predictions):
    for size in (5, 8):
        example = GUIDED_STEP.example((latents, predictions, 2, size), torch.float32, 2)
        check(outcome(shipped, example), GUIDED_STEP.reference(**example))


@pytest.mark.parametrize("missing", [(), ("guidance",), ("noise",), ("guidance", "noise")], ids=str)
@pytest.mark.parametrize("tables", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_every_variant(shipped, missing, tables, dtypes):
    for size in (150, 152):
        example = example_of(dtypes, (2, 2, 3, size), 3)
        for name in ("weights", "input_scales", "guidance"):
            # No numbers of float32, so that where a table is rounded shows.
            example[name] = example[name].to(tables) / 3
        lanes = example["state"].shape[1]
        if "guidance" in missing:
            example |= {name: example[name][lanes:] for name in ("prediction", "sample")}
        if "noise" in missing:
            example["weights"] = example["weights"][:, :-1].contiguous()
        example |= dict.fromkeys(missing)
        check(outcome(shipped, example), GUIDED_STEP.reference(**example))


def test_one_guidance_and_one_noise_for_all_lanes(shipped):
    example = GUIDED_STEP.example((1, 2, 3, 150), torch.float32, 4)
    example |= {"guidance": example["guidance"][:1], "noise": example["noise"][:, :1]}
    check(outcome(shipped, example), GUIDED_STEP.reference(**example))


@pytest.mark.parametrize("size", [601, 1600], ids=["odd", "aligned"])
def test_one_block_walks_the_whole_row(shipped, size):
    """As it must where a row has more than 1024 blocks' worth."""
    example = GUIDED_STEP.example((2, 2, 2, size), torch.float16, 5)
    check(outcome(shipped, example, blocks=1), GUIDED_STEP.reference(**example))


@pytest.mark.parametrize("name", ["DDIM", "DPMSolverMultistep", "EulerAncestralDiscrete"])
def test_a_whole_run_is_advance_bit_for_bit(shipped, name):
    """On the same buffers with nothing in between, as a replayed graph makes the calls."""
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(6)
    schedule = read_schedule(scheduler)
    tables = {"weights": schedule.weights, "input_scales": schedule.input_scales}
    generator = torch.Generator().manual_seed(6)
    latents = torch.randn(2, 300, generator=generator)
    predictions = torch.randn(schedule.calls, 4, 300, generator=generator)
    noise = None
    if schedule.slots.noise:
        noise = torch.randn(schedule.calls, 1, 300, generator=generator)
    state, sample = schedule.first_state(latents), torch.full((4, 300), NAN)
    counter, want = torch.tensor([0, 0]), schedule.first_state(latents)
    for call, prediction in enumerate(predictions):
        want, scaled = advance(
            prediction, want, torch.tensor([call]), 7.3, noise, slots=schedule.slots, **tables
        )
        launch(
            shipped,
            schedule.slots.latents,
            prediction=prediction,
            state=state,
            sample=sample,
            counter=counter,
            guidance=torch.tensor([7.3], dtype=torch.float64),
            noise=noise,
            **tables,
            backwards=call % 2 == 1,
        )
        assert counter.tolist() == [call + 1, 0]
        check((state, sample), (want, torch.cat([scaled, scaled])))


def in_gaps(tensor, dims, gap):
    """The same with a gap behind each row and a whole row of gap after each."""
    size = tensor.shape[dims:].numel()
    wide = tensor.new_full((*tensor.shape[: dims - 1], 2 * tensor.shape[dims - 1], size + gap), NAN)
    view = wide[..., ::2, :size]
    view.copy_(tensor.reshape(view.shape))
    return view


def gapped(example, gap):
    dims = {"prediction": 1, "sample": 1, "state": 2, "noise": 2}
    return example | {name: in_gaps(example[name], dim, gap) for name, dim in dims.items()}


@pytest.mark.parametrize(
    ("size", "gap"), [(1, 9), (255, 9), (256, 9), (257, 9), (16, 16), (1024, 16), (1032, 16)]
)
def test_it_writes_its_rows_and_nothing_else(shipped, size, gap):
    """What lies between the rows is out of bounds here, for reads as well."""
    example = GUIDED_STEP.example((2, 2, 2, size), torch.float32, 7)
    want = GUIDED_STEP.reference(**example)
    arguments = gapped(example, gap)
    seen = launch(shipped, **arguments)
    assert shipped.launches[-1].packed == (gap == 16)
    check([arguments[name].contiguous() for name in GUIDED_STEP.written], want)
    assert seen.was_written("state").all()
    assert seen.was_written("sample").all()
    assert not seen.was_read("sample").any()
    assert seen.was_read("prediction").all()
    assert seen.was_read("noise").any((1, 2)).tolist() == [False, True, False]
    assert seen.was_read("weights").any(1).tolist() == [False, True, False]
    assert seen.was_read("input_scales").tolist() == [False, False, True, False]


@pytest.mark.parametrize("call", [-1, 3, 2**40, -(2**62)])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_a_call_that_no_host_checked_shows_itself(shipped, call, dtypes):
    """As NaN, and without reading a table where it isn't."""
    example = example_of(dtypes, (2, 2, 2, 30), 8)
    example["counter"] = torch.tensor([call, 0])
    state, sample, counter = outcome(shipped, example)
    assert state[0].isnan().all()
    assert sample.isnan().all()
    assert torch.equal(state[1], example["state"][0])
    assert counter.tolist() == [call + 1, 0]


def test_no_lanes_are_a_call_too(shipped):
    example = GUIDED_STEP.example((1, 2, 0, 4, 5), torch.float32, 0)
    assert outcome(shipped, example)[2].tolist() == [2, 0]
    assert shipped.launches[-1].grid == (1, 1, 1)


def test_the_host_code_refuses_too_many_lanes(shipped):
    args = guided_step_args(**GUIDED_STEP.example((1, 1, 1, 1), torch.float32, 0))
    args.lanes = 65536
    with pytest.raises(RuntimeError, match="at most 65535 lanes fit one launch"):
        shipped.launch(args, {})


def test_every_kernel_of_the_file_is_understood(shipped):
    """Also the ways through it that no test here goes."""
    kernels = shipped.kernels()
    assert len(kernels) == 14
    for kernel in kernels:
        bound(shipped.ptx, kernel)


PLANTED = {
    "the first block to end moves the counter": lambda op: op.edited(
        r"(atom\.global\.add\.u64 [^;]*;\s+add\.s64\s+%rd\d+), (%rd\d+), -1", r"\1, 0, 0"
    ),
    "nobody's ticket counts": lambda op: op.edited(
        r"(atom\.global\.add\.u64 [^;]*), 1;", r"\1, 0;"
    ),
    "every thread draws a ticket": lambda op: op.edited(
        r"(bar\.sync\s+0;\s+setp\.ne\.s32\s+%p\d+), (%r\d+), 0", r"\1, \2, \2"
    ),
    "the ticket is not put back": lambda op: op.edited(
        r"(st\.global\.u64 \s*\[%rd\d+\+8\]), %rd\d+", r"\1, %rd2"
    ),
    "one block too few": lambda op: op.edited(r"%nctaid\.y", "1"),
    "the branches change places": lambda op: op.edited(
        r"sub\.f32(\s+%f\d+), (%f\d+), (%f\d+)", r"sub.f32\1, \3, \2"
    ),
    "the sums are missing": lambda op: op.edited(
        r"add\.rn\.f32(\s+%f\d+, %f\d+), %f\d+", r"add.rn.f32\1, 0f00000000"
    ),
    "slots lie nearer": lambda op: op.with_field("state_slot_stride", "300"),
    "slots are one": lambda op: op.with_field("state_slot_stride", "0"),
    "lanes of the state lie nearer": lambda op: op.with_field("state_lane_stride", "300"),
    "predictions lie nearer": lambda op: op.with_field("prediction_lane_stride", "300"),
    "samples lie nearer": lambda op: op.with_field("sample_lane_stride", "300"),
    "one noise for all calls": lambda op: op.with_field("noise_call_stride", "0"),
    "one noise for all lanes": lambda op: op.with_field("noise_lane_stride", "0"),
    "one guidance for all lanes": lambda op: op.with_field("guidance_lane_stride", "0"),
    "the row ends later": lambda op: op.with_field("row_size", "301"),
    "the row ends earlier": lambda op: op.with_field("row_size", "299"),
    "there is one call": lambda op: op.with_field("calls", "1"),
    "every block does the first part": lambda op: op.edited(r"%ctaid\.x", "0"),
    "every lane is the first": lambda op: op.edited(r"%ctaid\.y", "0"),
}


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_show(shipped, name, backwards):
    """In one launch of 3 lanes of 2 blocks; in the numbers, or as an access out of bounds."""
    example = GUIDED_STEP.example((2, 2, 3, 300), torch.float32, 9)
    want = GUIDED_STEP.reference(**example)
    faulty = PLANTED[name](shipped)
    for op in (shipped, faulty):
        arguments = gapped(example, 9)
        arguments["counter"] = example["counter"].clone()
        try:
            launch(op, **arguments, backwards=backwards)
            check([arguments[n].contiguous() for n in GUIDED_STEP.written], want)
        except (OutOfBounds, AssertionError):
            assert op is faulty
        else:
            assert op is shipped


def test_a_barrier_within_the_branch_is_a_fault(shipped):
    """What `if (threadIdx.x == 0) __syncthreads()` would be."""
    early = shipped.edited(
        r"bar\.sync\s+0;(\s+setp\.ne\.s32[^;]*;\s+@%p\d+ bra[^;]*;)", r"\1 bar.sync 0;"
    )
    example = GUIDED_STEP.example((1, 1, 1, 40), torch.float32, 10)
    with pytest.raises(Divergence, match="only 1 of 256 threads"):
        outcome(early, example)


def test_what_no_emulator_sees(shipped):
    """Warps of a block take turns here. On a GPU a slow one must have read the counter before the
    block draws its ticket, and what the block did has to be seen by whoever moves the counter."""
    places = r"ld\.global\.u64.*bar\.sync\s+0;.*membar\.gl;.*atom\.global\.add\.u64"
    for kernel in shipped.kernels():
        assert re.search(places, "; ".join(shipped.text_of(kernel)))
    assert "fma." not in shipped.ptx
