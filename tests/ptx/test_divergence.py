"""Threads of a block that go different ways, and what still holds of all of them."""

import pytest
import torch

from .faults import Divergence, Fault, Misaligned, OutOfBounds, Race, UnknownInstruction
from .handwritten import run
from .launch import bound
from .parse import parse

ADDRESS = "mad.wide.u32 %rd9, %r0, 4, %rd0;"  # of this thread's element of out
STORE = "st.global.b32 [%rd9], %r1;"
SHARED = "mov.b32 %r8, global_smem; mad.lo.s32 %r9, %r0, 4, %r8;"  # of its word in shared memory


def ints(*shape):
    return torch.zeros(*shape, dtype=torch.int32)


def results(body, threads=32):
    out = ints(threads)
    run(f"{ADDRESS} {body}", out, num_warps=threads // 32)
    return out.tolist()


def test_either_side_of_a_branch():
    got = results(f"""
        setp.lt.s32 %p1, %r0, 5;
        @%p1 bra $less;
        mov.b32 %r1, 10;
        bra.uni $both;
        $less: mov.b32 %r1, 20;
        $both: add.s32 %r1, %r1, 1; {STORE}
    """)
    assert got == [21] * 5 + [11] * 27


def test_branches_within_branches():
    got = results(f"""
        mov.b32 %r1, 0;
        setp.lt.s32 %p1, %r0, 16;
        @!%p1 bra $end;
        and.b32 %r2, %r0, 1; setp.eq.s32 %p2, %r2, 0;
        @%p2 bra $even;
        setp.gt.s32 %p3, %r0, 8;
        @%p3 add.s32 %r1, %r1, 100;
        @%p3 bra $even;
        add.s32 %r1, %r1, 1;
        bra.uni $end;
        $even: add.s32 %r1, %r1, 10;
        $end: {STORE}
    """)
    odd = lambda n: 110 if n > 8 else 1  # noqa: E731
    assert got == [odd(n) if n % 2 else 10 for n in range(16)] + [0] * 16


def test_a_loop_that_each_thread_leaves_when_it_likes():
    got = results(f"""
        mov.b32 %r1, 0; mov.b32 %r2, 0;
        $again:
        setp.ge.s32 %p1, %r2, %r0;
        @%p1 bra $out;
        add.s32 %r2, %r2, 1; add.s32 %r1, %r1, %r2;
        bra.uni $again;
        $out: {STORE}
    """)
    assert got == [n * (n + 1) // 2 for n in range(32)]


def test_blocks_of_code_that_lie_in_any_order():
    """The way back up is taken by some while others are further down already."""
    got = results(f"""
        setp.lt.s32 %p1, %r0, 7; mov.b32 %r1, 0;
        bra.uni $start;
        $above: add.s32 %r1, %r1, 1; bra.uni $meet;
        $start: @%p1 bra $below;
        bra.uni $above;
        $below: add.s32 %r1, %r1, 2;
        $meet: add.s32 %r1, %r1, 10; {STORE}
    """)
    assert got == [12] * 7 + [11] * 25


def test_threads_that_end_early():
    got = results(f"mov.b32 %r1, 5; setp.gt.s32 %p1, %r0, 3; @%p1 ret; {STORE}")
    assert got == [5] * 4 + [0] * 28
    got = results(
        f"mov.b32 %r1, 5; {STORE} setp.gt.s32 %p1, %r0, 3; @%p1 exit; neg.s32 %r1, %r1; {STORE}"
    )
    assert got == [-5] * 4 + [5] * 28


def test_ways_meet_again_so_that_code_runs_once_for_all():
    """Counted in steps: without that, every turn of the loop would run by itself for each way."""
    out = ints(32)
    body = f"""
        {ADDRESS} and.b32 %r3, %r0, 1; setp.eq.s32 %p1, %r3, 0; mov.b32 %r1, 0; mov.b32 %r2, 0;
        $again:
        @%p1 bra $even;
        add.s32 %r1, %r1, 1;
        $even: add.s32 %r2, %r2, 1;
        setp.lt.s32 %p2, %r2, 100;
        @%p2 bra $again;
        bar.warp.sync -1;
        {STORE}
    """
    run(body, out)
    assert out.tolist() == [0, 100] * 16


def test_a_fault_of_one_side_names_its_threads():
    body = f"{ADDRESS} setp.lt.s32 %p1, %r0, 30; @%p1 bra $end; st.global.b32 [%rd9+8], %r0; $end:"
    with pytest.raises(
        OutOfBounds, match=r"thread 30 writes .* \(2 of 2 threads do so\); in block"
    ):
        run(body, ints(32))


# Barriers

TWO_WAYS = """
    setp.lt.s32 %p1, %r0, 5;
    @%p1 bra $other;
    {one}
    bra.uni $both;
    $other: {other}
    $both: {both}
"""
WRITE = f"{SHARED} st.shared.b32 [%r9], %r0;"
READ = f"xor.b32 %r10, %r9, 128; ld.shared.b32 %r1, [%r10]; {ADDRESS} {STORE}"


def two_ways(one="", other="", both=""):
    out = ints(64)
    run(TWO_WAYS.format(one=one, other=other, both=both), out, num_warps=2)
    return out.tolist()


def test_those_who_come_first_wait():
    """Some go to the barrier at once, which lies above what the others have to do first."""
    body = f"""
        bra.uni $start;
        $meet: bar.sync 0; {READ}
        ret;
        $start: setp.lt.s32 %p1, %r0, 5;
        {SHARED}
        @%p1 st.shared.b32 [%r9], %r0;
        @%p1 bra $meet;
        st.shared.b32 [%r9], %r0;
        bra.uni $meet;
    """
    out = ints(64)
    run(body, out, num_warps=2)
    assert out.tolist() == [n ^ 32 for n in range(64)]
    with pytest.raises(Race, match="thread 0 writes .* which thread 32 read with no barrier since"):
        run(body.replace("ret;", "st.shared.b32 [%r9], %r0; ret;"), out, num_warps=2)


def test_a_barrier_after_a_loop():
    """Of as many turns as a thread's number."""
    turns = f"""
        {WRITE} mov.b32 %r2, 0;
        $again: add.s32 %r2, %r2, 1; setp.lt.s32 %p2, %r2, %r0; @%p2 bra $again;
    """
    assert two_ways(both=f"{turns} bar.sync 0; {READ}") == [n ^ 32 for n in range(64)]
    with pytest.raises(Race, match="with no barrier since"):
        two_ways(both=f"{turns} {READ}")


@pytest.mark.parametrize("ways", [{"one": "bar.sync 0;"}, {"other": "bar.sync 0;"}], ids=str)
def test_a_barrier_that_some_pass_by(ways):
    with pytest.raises(Divergence, match="only (59|5) of 64 threads come to the barrier; in block"):
        two_ways(**ways)


def test_a_barrier_after_some_have_ended():
    with pytest.raises(Divergence, match="only 59 of 64 threads come to the barrier"):
        two_ways(other="ret;", both="bar.sync 0;")


def test_two_barriers_are_not_one():
    with pytest.raises(Divergence, match="others wait at another barrier"):
        two_ways(one="bar.sync 0;", other="bar.sync 0;")


def test_a_barrier_in_a_loop_is_met_once_a_turn():
    loop = f"""
        {SHARED} mov.b32 %r2, 0; mov.b32 %r1, %r0;
        $again:
        setp.lt.s32 %p2, %r0, 40;
        @%p2 bra $low;
        add.s32 %r1, %r1, 1;
        $low: st.shared.b32 [%r9], %r1;
        bar.sync 0;
        xor.b32 %r10, %r9, 128; ld.shared.b32 %r1, [%r10];
        bar.sync 0;
        add.s32 %r2, %r2, 1; setp.lt.s32 %p3, %r2, 2; @%p3 bra $again;
        {ADDRESS} {STORE}
    """
    want = list(range(64))
    for _ in range(2):
        want = [n + (thread >= 40) for thread, n in enumerate(want)]
        want = [want[thread ^ 32] for thread in range(64)]
    assert two_ways(both=loop) == want


def test_what_a_warp_does_together_is_refused_of_a_part():
    with pytest.raises(Divergence, match="only 5 of 64 threads get here"):
        two_ways(other="shfl.sync.idx.b32 %r1, %r0, 0, 31, -1;")


# Structs, and modules of several entries

MODULE = """
.version 8.8
.target sm_80
.address_size 64
.entry first(
    .param .align 8 .b8 first_param_0[16]
)
.maxntid 256, 1, 1
{ ret; }
.entry second(
    .param .align 8 .b8 second_param_0[16]
) {
    .reg .b32 %r<4>;
    ld.param.u32 %r0, [second_param_0+20];
    ret;
}
"""


def test_entries_by_name():
    first, second = parse(MODULE, "first"), parse(MODULE, "second")
    assert (len(first.instructions), first.parameters) == (1, ("first_param_0",))
    assert (len(second.instructions), second.parameters) == (2, ("second_param_0",))
    assert second.instructions[0].line == 14
    for name, count in (("third", 0), (None, 2)):
        with pytest.raises(Fault, match=rf"expected one entry function.* got {count}"):
            parse(MODULE, name)


def struct_of(load, value=bytes(range(16))):
    """What a load makes of a struct, as a block leaves it in %r1, %r2."""
    from .machine import Block
    from .memory import GlobalMemory

    text = MODULE.replace("ld.param.u32 %r0, [second_param_0+20];", load).replace(
        ".reg .b32 %r<4>;", ".reg .b32 %r<4>; .reg .b64 %rd<4>; .reg .b16 %rs<4>;"
    )
    program, operations = bound(text, "second")
    block = Block(program, operations, GlobalMemory({}), {"second_param_0": value}, 0, 32)
    block.run()
    return block


def number(block, name):
    (only,) = set(block._registers[name].tolist())
    return only


def test_parts_of_a_struct():
    block = struct_of("ld.param.v2.u32 {%r1, %r2}, [second_param_0+8];")
    assert (number(block, "%r1"), number(block, "%r2")) == (0x0B0A0908, 0x0F0E0D0C)
    block = struct_of(
        "mov.b64 %rd0, second_param_0; add.s64 %rd1, %rd0, 8; ld.param.u8 %rs0, [%rd1+-3];"
    )
    assert number(block, "%rs0") == 5
    block = struct_of("ld.param.s8 %rs0, [second_param_0+1];", b"\0\xff" * 8)
    assert number(block, "%rs0") == 0xFFFF


@pytest.mark.parametrize(
    ("load", "fault"),
    [
        ("ld.param.u32 %r0, [second_param_0+16];", OutOfBounds),
        ("ld.param.v2.u32 {%r0, %r1}, [second_param_0+4];", Misaligned),
        (
            "mov.u32 %r0, %tid.x; mad.wide.u32 %rd1, %r0, 0, 0; ld.param.u32 %r1, [%rd1];",
            OutOfBounds,
        ),
        (
            """mov.b64 %rd0, second_param_0; mov.u32 %r0, %laneid;
            mad.wide.u32 %rd1, %r0, 4, %rd0; ld.param.u32 %r1, [%rd1];""",
            UnknownInstruction,
        ),
    ],
)
def test_parts_that_a_struct_does_not_have(load, fault):
    with pytest.raises(fault):
        struct_of(load)
