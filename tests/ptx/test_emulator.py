"""The machine around the instructions: bounds, barriers, copies and branches."""

import numpy as np
import pytest
import torch

from .faults import Divergence, Endless, Misaligned, NotArrived, OutOfBounds, Race, Undefined
from .handwritten import run

NAN = float("nan")


def ints(*shape):
    return torch.zeros(*shape, dtype=torch.int32)


ADDRESS = "mad.wide.u32 %rd9, %r0, 4, %rd0;"  # of this thread's element of out
SHARED = "mov.b32 %r8, global_smem; mad.lo.s32 %r9, %r0, 4, %r8;"  # of its word in shared memory


def test_blocks_threads_and_grid():
    out = ints(2, 3, 64)
    run(
        """
        mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %nctaid.x;
        mad.lo.s32 %r4, %r2, %r3, %r1;
        mov.u32 %r6, %ntid.x;
        mad.lo.s32 %r5, %r4, %r6, %r0;
        mad.wide.u32 %rd9, %r5, 4, %rd0;
        st.global.b32 [%rd9], %r5;
        """,
        out,
        num_warps=2,
        grid=(3, 2),
    )
    assert out.flatten().tolist() == list(range(6 * 64))


def test_a_loop():
    out = ints(32)
    run(
        f"""
        mov.b32 %r1, 0; mov.b32 %r2, 0;
        $again:
        add.s32 %r1, %r1, %r2; add.s32 %r2, %r2, 1;
        setp.lt.s32 %p1, %r2, 5;
        @%p1 bra $again;
        {ADDRESS}
        st.global.b32 [%rd9], %r1;
        """,
        out,
    )
    assert out.tolist() == [10] * 32


def test_a_loop_without_an_end():
    with pytest.raises(Endless):
        run("$again: bra.uni $again;", ints(1))


@pytest.mark.parametrize("needs_all", ["bar.sync 0", "bar.warp.sync -1", "cp.async.wait_group 0"])
def test_what_all_threads_have_to_do_together(needs_all):
    with pytest.raises(Divergence, match="only 7 of 32 threads"):
        run(f"setp.lt.s32 %p1, %r0, 7; @%p1 {needs_all};", ints(1))


def test_a_register_that_was_never_written():
    with pytest.raises(Undefined, match="%r5 is read, but nothing was written to it"):
        run(f"{ADDRESS} st.global.b32 [%rd9], %r5;", ints(32))


# Bounds of global memory


@pytest.mark.parametrize(("shift", "thread"), [(-4, 0), (4, 31), (2**40, 0)])
def test_outside_an_argument(shift, thread):
    memory = ints(34)
    out = memory[1:-1]
    for access in ("ld.global.b32 %r1, [%rd10];", "st.global.b32 [%rd10], %r0;"):
        with pytest.raises(OutOfBounds, match=rf"thread {thread} (reads|writes) 4 bytes at out"):
            run(f"{ADDRESS} add.s64 %rd10, %rd9, {shift}; {access}", out)
    assert not memory.any()


def test_the_message_names_argument_thread_and_instruction():
    with pytest.raises(OutOfBounds) as raised:
        run(f"{ADDRESS}\nst.global.b32 [%rd9+8], %r0;", ints(30))
    assert str(raised.value).startswith(
        "thread 28 writes 4 bytes at out +120, where out is [30] elements of 4 bytes with strides "
        "(4,) (4 of 32 threads do so); in block (0, 0, 0) at line "
    )
    assert str(raised.value).endswith("`st.global.b32 [%rd9+8], %r0`")


def test_a_gap_between_rows_is_outside():
    rows = torch.zeros(8, 6)[:, :4]
    body = (
        "mad.wide.u32 %rd9, %r0, 24, %rd0; setp.lt.s32 %p1, %r0, 7;"
        "@%p1 ld.global.b64 %rd8, [%rd9+{}];"
    )
    run(body.format(8), rows)
    with pytest.raises(OutOfBounds):
        run(body.format(16), rows)


def test_an_address_of_nothing():
    with pytest.raises(OutOfBounds, match="address 0x10, which belongs to no argument"):
        run("mov.b64 %rd9, 16; ld.global.b32 %r1, [%rd9];", ints(1))


def test_an_argument_without_elements():
    with pytest.raises(OutOfBounds, match=r"thread 0 reads 4 bytes at out \+0"):
        run("ld.global.b32 %r1, [%rd0];", ints(0))


def test_misaligned():
    aligned = "st.global.v2.b32 [%rd0], {%r0, %r0};"
    run(f"setp.eq.s32 %p1, %r0, 0; @%p1 {aligned}", ints(4))
    with pytest.raises(Misaligned, match="thread 0 writes 8 bytes at out"):
        run(aligned.replace("%rd0", "%rd0+4"), ints(4))
    with pytest.raises(Misaligned, match="shared memory at 2"):
        run("mov.b32 %r1, 2; ld.shared.b32 %r2, [%r1];", ints(1))


def test_what_was_touched_is_remembered_of_views_too():
    memory = ints(2, 32)
    seen = run(
        f"{ADDRESS} setp.lt.s32 %p1, %r0, 3; @%p1 ld.global.b32 %r1, [%rd9];"
        "setp.gt.s32 %p2, %r0, 29; @%p2 st.global.b32 [%rd9], %r0;",
        memory[0],
        memory,
    )
    assert np.flatnonzero(seen.was_read("out")).tolist() == [0, 1, 2]
    assert np.flatnonzero(seen.was_read("more")).tolist() == [0, 1, 2]
    assert np.argwhere(seen.was_written("more")).tolist() == [[0, 30], [0, 31]]
    assert memory[0].tolist() == [0] * 30 + [30, 31]


def test_vectors_bytes_and_cache_hints():
    memory = torch.arange(128, dtype=torch.uint8)
    out = torch.zeros(128, dtype=torch.uint8)
    run(
        """
        mad.wide.u32 %rd8, %r0, 4, %rd1; mad.wide.u32 %rd9, %r0, 4, %rd0;
        createpolicy.fractional.L2::evict_first.b64 %rd7, 1.0;
        ld.global.L1::evict_first.L2::cache_hint.v2.b16 {%rs0, %rs1}, [ %rd8 + 0 ], %rd7;
        ld.global.nc.b8 %rs2, [%rd8+1];
        setp.lt.s32 %p1, %r0, 16;
        @!%p1 st.global.cs.v2.b16 [%rd9], {%rs1, %rs0};
        @%p1 st.global.b8 [%rd9], %rs2;
        """,
        out,
        memory,
    )
    four = memory.view(32, 4)
    assert torch.equal(out.view(32, 4)[16:], four[16:][:, [2, 3, 0, 1]])
    assert torch.equal(out.view(32, 4)[:16, 0], four[:16, 1])
    assert not out.view(32, 4)[:16, 1:].any()


# Shared memory and barriers

WRITE = f"{SHARED} st.shared.b32 [%r9], %r0;"
READ_NEXT = "xor.b32 %r10, %r9, {}; ld.shared.b32 %r1, [%r10];"


def test_shared_memory_begins_as_nothing():
    out = torch.zeros(32)
    run(f"{SHARED} {ADDRESS} ld.shared.b32 %r1, [%r9]; st.global.b32 [%rd9], %r1;", out)
    assert out.isnan().all()


def test_outside_shared_memory():
    with pytest.raises(OutOfBounds, match="thread 16 writes 4 bytes of shared memory at 64, of 64"):
        run(WRITE, ints(1), shared_size=64)


def test_a_barrier_orders_a_block_and_another_only_a_warp():
    far, near = READ_NEXT.format(128), READ_NEXT.format(4)
    run(f"{WRITE} bar.sync 0; {far} {near}", ints(1), num_warps=2)
    run(f"{WRITE} bar.warp.sync -1; {near}", ints(1), num_warps=2)
    with pytest.raises(Race, match="thread 0 reads .* at 128, which thread 32 wrote"):
        run(f"{WRITE} bar.warp.sync -1; {far}", ints(1), num_warps=2)
    with pytest.raises(Race, match="thread 0 reads .* at 4, which thread 1 wrote"):
        run(f"{WRITE} {near}", ints(1))
    own = READ_NEXT.format(0)
    run(f"{WRITE} {own}", ints(1))


@pytest.mark.parametrize("reader", ["same", "several"])
def test_written_after_it_was_read(reader):
    address = {"same": READ_NEXT.format(4), "several": "ld.shared.b32 %r1, [%r8];"}[reader]
    run(f"{WRITE} bar.sync 0; {address} bar.sync 0; st.shared.b32 [%r9], %r0;", ints(1))
    with pytest.raises(Race, match=r"writes .* which (thread 1|several threads) read"):
        run(f"{WRITE} bar.sync 0; {address} st.shared.b32 [%r9], %r0;", ints(1))


def test_reads_of_other_warps_are_not_forgotten():
    """Neither a warp's barrier nor a later read by the writer closes another warp's read."""
    read_first = "ld.shared.b32 %r1, [%r8];"
    only = "setp.{}.s32 %p1, %r0, 0; @%p1 "
    with pytest.raises(Race, match="thread 0 writes"):
        run(
            f"{WRITE} bar.sync 0; {only.format('gt')}{read_first} bar.warp.sync -1;"
            f"{only.format('eq')}{read_first} @%p1 st.shared.b32 [%r8], %r0;",
            ints(1),
            num_warps=2,
        )


@pytest.mark.parametrize("reads", ["at once", "one by one"])
def test_a_read_of_two_warps_is_closed_by_neither(reads):
    read = "ld.shared.b32 %r1, [%r8];"
    if reads == "one by one":
        read = f"setp.lt.s32 %p1, %r0, 32; @%p1 {read} @!%p1 {read}"
    write = "setp.eq.s32 %p2, %r0, 32; @%p2 st.shared.b32 [%r8], %r0;"
    run(f"{WRITE} bar.sync 0; {read} bar.sync 0; {write}", ints(1), num_warps=2)
    with pytest.raises(Race, match="thread 32 writes .* which several threads read"):
        run(f"{WRITE} bar.sync 0; {read} bar.warp.sync -1; {write}", ints(1), num_warps=2)


def test_written_twice():
    with pytest.raises(Race, match="something else in the same instruction"):
        run(f"{SHARED} st.shared.b32 [%r8], %r0;", ints(1))
    run(f"{SHARED} mov.b32 %r1, 5; st.shared.b32 [%r8], %r1;", ints(1))
    with pytest.raises(Race, match="thread 0 writes .* which thread 1 wrote"):
        run(f"{WRITE} xor.b32 %r10, %r9, 4; st.shared.b32 [%r10], %r0;", ints(1))


# Asynchronous copies

COPY = f"{SHARED} {ADDRESS} cp.async.ca.shared.global [%r9], [%rd9], 4{{}};"
COMMIT = "cp.async.commit_group;"
TO_OUT = "ld.shared.b32 %r1, [%r9]; st.global.b32 [%rd9], %r1;"


def test_a_copy_arrives_when_it_is_waited_for():
    out = torch.arange(32)[:32].int()
    run(f"{COPY.format('')} {COMMIT} cp.async.wait_group 0; neg.s32 %r0, %r0; {TO_OUT}", out)
    assert out.tolist() == list(range(32))


@pytest.mark.parametrize("wait", ["", f"{COMMIT} cp.async.wait_group 1;", "cp.async.wait_group 0;"])
def test_a_copy_that_was_not_waited_for(wait):
    """The last of these waits for committed groups, of which there are none."""
    with pytest.raises(NotArrived, match="thread 0 reads shared memory at 0"):
        run(f"{COPY.format('')} {wait} {TO_OUT}", ints(32))
    with pytest.raises(NotArrived, match="thread 0 writes"):
        run(f"{COPY.format('')} {wait} st.shared.b32 [%r9], %r0;", ints(32))


def test_a_copy_that_is_misaligned():
    for shifted in ("[%r9+2], [%rd9], 4", "[%r9], [%rd9+2], 4"):
        with pytest.raises(Misaligned, match="thread 0 copies"):
            run(f"{SHARED} {ADDRESS} cp.async.ca.shared.global {shifted};", ints(33))


def test_groups_arrive_in_order():
    copy = COPY.format("")
    second = "add.s32 %r10, %r9, 128; cp.async.ca.shared.global [%r10], [%rd9], 4;"
    both = f"{copy} {COMMIT} {second} {COMMIT} cp.async.wait_group 1;"
    run(f"{both} {TO_OUT}", ints(32))
    with pytest.raises(NotArrived, match="at 128"):
        run(f"{both} ld.shared.b32 %r1, [%r10];", ints(32))
    run(f"{copy} {second} cp.async.wait_all; ld.shared.b32 %r1, [%r10];", ints(32))


def test_waiting_is_no_barrier():
    arrived = f"{COPY.format('')} {COMMIT} cp.async.wait_group 0;"
    run(f"{arrived} bar.sync 0; {READ_NEXT.format(4)}", ints(32))
    with pytest.raises(Race, match="thread 0 reads .* which thread 1 wrote"):
        run(f"{arrived} {READ_NEXT.format(4)}", ints(32))


def test_a_copy_over_what_others_still_read():
    with pytest.raises(Race, match="which thread 1 read"):
        run(f"{WRITE} bar.sync 0; {READ_NEXT.format(4)} {COPY.format('')}", ints(32))


def test_a_copy_of_nothing_is_zeros_and_looks_at_nothing():
    out = torch.arange(1, 17).int()
    body = "setp.lt.s32 %p1, %r0, 16; selp.b32 %r2, 4, 0, %p1;" + COPY.format(", %r2")
    seen = run(
        f"{body} {COMMIT} cp.async.wait_group 0; bar.sync 0; xor.b32 %r10, %r9, 64;"
        "ld.shared.b32 %r1, [%r10]; @%p1 st.global.b32 [%rd9], %r1;",
        out,
    )
    assert out.tolist() == [0] * 16
    assert seen.was_read("out").all()
    with pytest.raises(OutOfBounds, match="thread 16 reads 4 bytes at out"):
        run(f"{COPY.format('')}", ints(16))
