"""The shipped guided_step kernel, launched by its own launcher, as the PTX that sm_80 gets.

Blocks run one after another here, forwards and backwards: whichever comes last moves the counter,
and none may see it moved.
"""

import re

import pytest
import torch

from fasttrace.engine.schedule import advance, read_schedule
from fasttrace.testing.tiny import make_scheduler
from fasttrace_kernels.guided_step import Launch, launch_
from fasttrace_kernels.specs import GUIDED_STEP
from fasttrace_kernels.testing import assert_same_bits

from .faults import OutOfBounds, UnknownInstruction
from .handwritten import run
from .launch import EmulatedKernel

NAN = float("nan")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NARROW = Launch(block=128, num_warps=1)  # several blocks a lane, on few elements
FOUR_WARPS = Launch(block=128, num_warps=4)  # one element a thread


@pytest.fixture
def emulated(compiler, monkeypatch) -> EmulatedKernel:
    """What `launch_` launches from now on."""
    kernel = EmulatedKernel(compiler, "fasttrace_kernels.guided_step:guided_step_kernel")
    monkeypatch.setitem(launch_.__globals__, "guided_step_kernel", kernel)
    return kernel


def outcome(arguments, launch=NARROW):
    return GUIDED_STEP.outcome(lambda **given: launch_(**given, launch=launch), arguments)


def check(got, want):
    for ours, theirs in zip(got, want, strict=True):
        assert_same_bits(ours, theirs)


def without(example, *names):
    arguments = dict(example)
    lanes = example["state"].shape[1]
    if "guidance" in names:
        arguments |= {name: example[name][lanes:] for name in ("prediction", "sample")}
    if "noise" in names:
        arguments["weights"] = example["weights"][:, :-1].contiguous()
    return arguments | dict.fromkeys(names)


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GUIDED_STEP.shapes.values(), ids=GUIDED_STEP.shapes.keys())
def test_equals_reference(emulated, dtype, shape, backwards):
    """Bit for bit: the launcher switches fused multiply-add off."""
    emulated.backwards = backwards
    example = GUIDED_STEP.example(shape, dtype, 0)
    check(outcome(example), GUIDED_STEP.reference(**example))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_it_is_shipped(emulated, dtype):
    """Its own block size on aligned rows: 16 bytes a load and a store, but for the tables."""
    kernels = []
    emulated.edit = lambda kernel: kernels.append(kernel) or kernel
    example = GUIDED_STEP.example((2, 4, 2, 4, 16, 16), dtype, 1)
    check(outcome(example, Launch()), GUIDED_STEP.reference(**example))
    (kernel,) = kernels
    wide = r"v2\.b64" if dtype == torch.float64 else r"v4\.b32"
    each = 8 * dtype.itemsize // 16
    # Both branches, five kept and the noise; five kept and both branches.
    assert kernel.count(rf"@%p\d+ ld\.global\.{wide}") == 8 * each
    assert kernel.count(rf"@%p\d+ st\.global\.{wide}") == 7 * each
    assert kernel.count(r"@%p\d+ ld\.global") == 8 * each
    assert kernel.count(r"@%p\d+ st\.global") == 7 * each + 2


@pytest.mark.parametrize("missing", [(), ("guidance",), ("noise",), ("guidance", "noise")], ids=str)
@pytest.mark.parametrize("tables", [torch.float32, torch.float64], ids=str)
def test_every_variant(emulated, missing, tables):
    example = GUIDED_STEP.example((2, 2, 3, 150), torch.float32, 2)
    for name in ("weights", "input_scales", "guidance"):
        example[name] = example[name].to(tables) / 3
    arguments = without(example, *missing)
    check(outcome(arguments), GUIDED_STEP.reference(**arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_wide_state_beside_half_predictions(emulated, dtype):
    example = GUIDED_STEP.example((2, 2, 2, 150), dtype, 3)
    example |= {name: example[name].float() / 3 for name in ("state", "noise")}
    check(outcome(example), GUIDED_STEP.reference(**example))


def test_one_guidance_and_one_noise_for_all_lanes(emulated):
    example = GUIDED_STEP.example((1, 2, 3, 150), torch.float32, 4)
    example |= {"guidance": example["guidance"][:1], "noise": example["noise"][:, :1]}
    check(outcome(example), GUIDED_STEP.reference(**example))


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_call_after_call_on_the_same_buffers(emulated, backwards):
    """Three launches with nothing in between, as a replayed graph makes them: the counter is moved
    once a launch and the ticket is back at 0."""
    emulated.backwards = backwards
    example = GUIDED_STEP.example((2, 3, 3, 300), torch.float32, 5)
    example["counter"] = torch.tensor([0, 0])
    want = GUIDED_STEP.outcome(lambda **given: None, example)
    for call in range(3):
        state, sample, counter = GUIDED_STEP.reference(
            **example | dict(zip(GUIDED_STEP.written, want, strict=True))
        )
        want = state, sample, counter
        launch_(**example, launch=NARROW)
        assert example["counter"].tolist() == [call + 1, 0]
    check([example[name] for name in GUIDED_STEP.written], want)


@pytest.mark.parametrize("name", ["DDIM", "DPMSolverMultistep", "EulerAncestralDiscrete"])
def test_a_whole_run_is_advance_bit_for_bit(emulated, name):
    """What the engine did before there was this op, on a real schedule."""
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
    want = state = schedule.first_state(latents)
    given = {"state": state.clone(), "sample": torch.full((4, 300), NAN), "noise": noise}
    given |= {"counter": torch.tensor([0, 0]), "guidance": torch.tensor([7.3]).double()} | tables
    for call, prediction in enumerate(predictions):
        want, scaled = advance(
            prediction, want, torch.tensor([call]), 7.3, noise, slots=schedule.slots, **tables
        )
        launch_(prediction, **given, latents=schedule.slots.latents, launch=NARROW)
        check((given["state"], given["sample"]), (want, torch.cat([scaled, scaled])))
    assert given["counter"].tolist() == [schedule.calls, 0]


def in_gaps(tensor, dims):
    """The same with a gap behind each row and a whole row of gap after each."""
    size = tensor.shape[dims:].numel()
    wide = torch.full((*tensor.shape[: dims - 1], 2 * tensor.shape[dims - 1], size + 9), NAN)
    view = wide.to(tensor.dtype)[..., ::2, :size]
    view.copy_(tensor.reshape(view.shape))
    return view


def gapped(example):
    dims = {"prediction": 1, "sample": 1, "state": 2, "noise": 2}
    return example | {name: in_gaps(example[name], dim) for name, dim in dims.items()}


@pytest.mark.parametrize("size", [1, 31, 127, 128, 129, 300])
def test_it_writes_its_rows_and_nothing_else(emulated, size):
    """What lies between the rows is out of bounds here, for reads as well."""
    example = GUIDED_STEP.example((2, 2, 2, size), torch.float32, 6)
    want = GUIDED_STEP.reference(**example)
    arguments = gapped(example)
    launch_(**arguments, launch=FOUR_WARPS)
    check([arguments[name].contiguous() for name in GUIDED_STEP.written], want)
    (seen,) = emulated.launches
    assert seen.was_written("state_ptr").all()
    assert seen.was_written("sample_ptr").all()
    assert seen.was_read("prediction_ptr").all()
    assert seen.was_read("noise_ptr").any((1, 2)).tolist() == [False, True, False]
    assert seen.was_read("weights_ptr").any(1).tolist() == [False, True, False]
    assert seen.was_read("input_scales_ptr").tolist() == [False, False, True, False]


@pytest.mark.parametrize("call", [-1, 3, 2**40, -(2**62)])
def test_a_call_that_no_host_checked_shows_itself(emulated, call):
    """As NaN, and without reading a table where it isn't."""
    example = GUIDED_STEP.example((2, 2, 2, 150), torch.float32, 7)
    example["counter"] = torch.tensor([call, 0])
    state, sample, counter = outcome(example)
    assert state[0].isnan().all()
    assert sample.isnan().all()
    assert torch.equal(state[1], example["state"][0])
    assert counter.tolist() == [call + 1, 0]


PARAMETER = r"ld\.param\.s32\s+(%rd\d+), \[<{}>\]"
SLOT_STRIDE = r"ld\.param\.b32\s+(%r\d+), \[<state_slot_stride>\]"
# What is found in the PTX, what comes in its place, and which match of several (None is all).
PLANTED = {
    "the first block to end moves the counter": (
        r"setp\.eq\.b64(\s+%p\d+), (%rd\d+), %rd\d+",
        r"setp.eq.b64\1, \2, \2",
        None,
    ),
    "nobody's ticket counts": (r"mov\.b64(\s+%rd\d+), 1;", r"mov.b64\1, 0;", None),
    "the ticket is not put back": (r"mov\.b64(\s+%rd\d+), 0;", r"mov.b64\1, 7;", None),
    "the counter is not looked at": (r"ld\.global\.b64 \{ %rd\d+ \}, [^;]*;", "", None),
    "the branches change places": (
        r"(?s)sub\.rn\.f32(\s+%r\d+), (%r\d+), (%r\d+)(.*?)add\.rn\.f32(\s+%r\d+, %r\d+), \3;",
        r"sub.rn.f32\1, \3, \2\4add.rn.f32\5, \2;",
        None,
    ),
    "the guidance is missing": (r"mul\.rn\.f32(\s+%r\d+), (%r\d+), %r\d+", r"mov.b32\1, \2", 0),
    "the input scale is missing": (
        r"mul\.rn\.f32(\s+%r\d+), (%r\d+), %r\d+",
        r"mov.b32\1, \2",
        -1,
    ),
    "the store's mask is gone": (r"@%p\d+ (st\.global\.b32)", r"\1", None),
    "the load's mask is gone": (r"@%p\d+ (ld\.global\.b32)", r"\1", None),
    "slots lie nearer": (SLOT_STRIDE, r"mov.b32 \1, 150", None),
    "slots are one": (SLOT_STRIDE, r"mov.b32 \1, 0", None),
    "lanes of the state lie nearer": (
        PARAMETER.format("state_lane_stride"),
        r"mov.b64 \1, 150",
        None,
    ),
    "predictions lie nearer": (
        PARAMETER.format("prediction_lane_stride"),
        r"mov.b64 \1, 150",
        None,
    ),
    "samples lie nearer": (PARAMETER.format("sample_lane_stride"), r"mov.b64 \1, 150", None),
    "one noise for all calls": (PARAMETER.format("noise_call_stride"), r"mov.b64 \1, 0", None),
    "one noise for all lanes": (PARAMETER.format("noise_lane_stride"), r"mov.b64 \1, 0", None),
    "every block does the first part": (r"%ctaid\.x", "0", None),
    "every lane is the first": (r"%ctaid\.y", "0", None),
    "one block too few": (r"%nctaid\.y", "1", None),
}


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_show(emulated, name, backwards):
    """In one launch of 3 lanes of 2 blocks; in the numbers, or as an access out of bounds."""
    emulated.backwards = backwards
    example = GUIDED_STEP.example((2, 2, 3, 150), torch.float32, 8)
    want = GUIDED_STEP.reference(**example)
    assert made(gapped(example), want)
    pattern, replacement, which = PLANTED[name]

    def edit(kernel):
        chosen = kernel.count(pattern) - 1 if which == -1 else which
        return kernel.edited(pattern, replacement, which=chosen)

    emulated.edit = edit
    try:
        assert not made(gapped(example), want)
    except OutOfBounds:
        return


def made(arguments, want):
    arguments["counter"] = arguments["counter"].clone()
    launch_(**arguments, launch=FOUR_WARPS)
    got = [arguments[name].contiguous() for name in GUIDED_STEP.written]
    return all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))


def test_what_no_emulator_sees(emulated):
    """Warps of a block take turns here. On a GPU a slow one must have read the counter before the
    block draws its ticket, and the draw must order what the block did before and after it."""
    kernels = []
    emulated.edit = lambda kernel: kernels.append(kernel) or kernel
    outcome(GUIDED_STEP.example((2, 2, 2, 150), torch.float32, 9))
    (ptx,) = (kernel.ptx for kernel in kernels)
    places = r"ld\.global\.b64 \{.*bar\.sync\s+0;.*atom\.global\.gpu\.acq_rel\.add\.u64"
    assert re.search(places, ptx, re.DOTALL)
    assert "fma." not in ptx


def test_an_atomic_addition_by_hand():
    """Threads 0 to 4 of two blocks add 1 to 5, one after another, each given what was there."""
    out, before = torch.tensor([10, 20, 30], dtype=torch.int32), torch.full((32,), -1).int()
    body = """
        setp.lt.s32 %p1, %r0, 5;
        add.s32 %r2, %r0, 1;
        @%p1 atom.global.gpu.acq_rel.add.u32 %r1, [%rd0+4], %r2;
        mad.wide.u32 %rd5, %r0, 4, %rd1;
        @%p1 st.global.b32 [%rd5], %r1;
    """
    run(body, out, before)
    assert out.tolist() == [10, 35, 30]
    assert before.tolist() == [20, 21, 23, 26, 30] + [-1] * 27
    run(body, out, before, grid=(2,))
    assert out.tolist() == [10, 65, 30]
    assert before[:5].tolist() == [50, 51, 53, 56, 60]
    wide = torch.tensor([2**40])
    run("mov.b64 %rd5, -1;\natom.global.add.u64 %rd6, [%rd0], %rd5;", wide)
    assert wide.tolist() == [2**40 - 32]


@pytest.mark.parametrize("opcode", ["atom.global.max.u32", "atom.shared.add.u32"])
def test_an_atomic_operation_that_is_not_known_is_named(opcode):
    with pytest.raises(UnknownInstruction, match=re.escape(opcode)):
        run(f"{opcode} %r1, [%rd0], %r0;", torch.zeros(32, dtype=torch.int32))
