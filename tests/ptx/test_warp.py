"""What the threads of a warp do together, against the figures of the PTX ISA."""

import numpy as np
import pytest
import torch

from .faults import UnknownInstruction
from .handwritten import compute, run

LANE = np.arange(32, dtype=np.int32)


@pytest.mark.parametrize(
    ("instruction", "want"),
    [
        ("bfly.b32 d, a, 5, 31, -1;", LANE ^ 5),
        ("idx.b32 d, a, 3, 31, -1;", 0 * LANE + 3),
        ("idx.b32 d, a, 3, 0x181f, -1;", LANE // 8 * 8 + 3),  # in segments of 8
        ("up.b32 d, a, 1, 0, -1;", np.maximum(LANE - 1, 0)),
        ("down.b32 d, a, 2, 31, -1;", np.where(LANE < 30, LANE + 2, LANE)),
        ("down.b32 d, a, 1, 0x181f, -1;", np.where(LANE % 8 == 7, LANE, LANE + 1)),
    ],
)
def test_shuffles(instruction, want):
    got = compute(f"shfl.sync.{instruction}", np.int32, a=100 + LANE)
    assert got.tolist() == (100 + want).tolist()


def test_a_shuffle_tells_who_got_something():
    got = compute("shfl.sync.down.b32 %r1|d, a, 2, 31, -1;", np.bool_, a=LANE)
    assert got.tolist() == [True] * 30 + [False] * 2


@pytest.mark.parametrize(
    ("instruction", "first", "want"),
    [
        ("max.s32", -20, 11),
        ("min.s32", -20, -20),
        ("max.u32", -20, -1),  # of unsigned ones the greatest: all bits
        ("min.u32", -20, 0),
        ("add.s32", -20, -144),
        ("add.u32", 2**31 - 32, 496 - 32 * 32),
    ],
)
def test_reductions_of_a_warp(instruction, first, want):
    got = compute(f"redux.sync.{instruction} d, a, -1;", np.int32, a=first + LANE)
    assert got.tolist() == [want] * 32


def test_each_warp_is_reduced_by_itself():
    out = torch.zeros(64, dtype=torch.int32)
    run(
        "mov.b32 %r2, -1; redux.sync.max.s32 %r1, %r0, %r2;"
        "mad.wide.u32 %rd1, %r0, 4, %rd0; st.global.b32 [%rd1], %r1;",
        out,
        num_warps=2,
    )
    assert out.tolist() == [31] * 32 + [63] * 32


@pytest.mark.parametrize("members", ["0xffff", "a"])
def test_a_reduction_of_a_part_of_a_warp_is_refused(members):
    with pytest.raises(UnknownInstruction, match="part of a warp"):
        compute(f"redux.sync.max.s32 d, a, {members};", np.int32, a=LANE)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(count, trans):
    """PTX ISA, figure of "ldmatrix": lane l gets elements 2 (l % 4) and the next of row l / 4."""
    matrices = torch.arange(count * 64, dtype=torch.int16).view(count, 8, 8)
    out = torch.zeros(32, count, 2, dtype=torch.int16)
    registers = ", ".join(f"%r{20 + n}" for n in range(count))
    stores = "".join(f"st.global.b32 [%rd9+{4 * n}], %r{20 + n};" for n in range(count))
    run(
        f"""
        mov.b32 %r8, global_smem;
        mad.lo.s32 %r9, %r0, 16, %r8; mad.wide.u32 %rd8, %r0, 16, %rd1;
        setp.lt.s32 %p1, %r0, {8 * count};
        @%p1 ld.global.v2.b64 {{%rd6, %rd7}}, [%rd8];
        @%p1 st.shared.v2.b64 [%r9], {{%rd6, %rd7}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r9];
        mad.wide.u32 %rd9, %r0, {4 * count}, %rd0;
        {stores}
        """,
        out,
        matrices,
        shared_size=512,
    )
    seen = matrices.mT if trans else matrices
    assert torch.equal(out, seen.reshape(count, 32, 2).transpose(0, 1))


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_mma_m16n8k16(kind, dtype):
    """PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type". Whole numbers, whose
    products are exact: a wrong place can't hide."""
    draw = torch.Generator().manual_seed(0)
    a, b, c = (
        torch.randint(-8, 9, shape, generator=draw).float()
        for shape in ((16, 16), (16, 8), (16, 8))
    )
    lane = torch.arange(32)
    group, two = lane // 4, 2 * (lane % 4)
    pair = torch.stack([two, two + 1], 1)
    rows = group[:, None]
    inputs = {
        "a0": a[rows, pair],
        "a1": a[rows + 8, pair],
        "a2": a[rows, pair + 8],
        "a3": a[rows + 8, pair + 8],
        "b0": b[pair, rows],
        "b1": b[pair + 8, rows],
    }
    inputs = {n: x.to(dtype).view(torch.int32)[:, 0].numpy() for n, x in inputs.items()}
    sums = {"c0": c[group, two], "c1": c[group, two + 1]}
    sums |= {"c2": c[group + 8, two], "c3": c[group + 8, two + 1]}
    inputs |= {n: x.numpy() for n, x in sums.items()}
    want = (a @ b + c).numpy()
    for n, (row, column) in enumerate([(0, 0), (0, 1), (8, 0), (8, 1)]):
        target = ["%r20", "%r21", "%r22", "%r23"]
        target[n] = "d"
        instruction = (
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{ {', '.join(target)} }}, "
            "{ a0, a1, a2, a3 }, { b0, b1 }, { c0, c1, c2, c3 };"
        )
        got = compute(instruction, np.float32, **inputs)
        assert got.tolist() == want[group + row, two + column].tolist()


def test_mma_m16n8k8_of_tf32():
    """PTX ISA, "Matrix Fragments for mma.m16n8k8", .tf32; the lowest 13 bits aren't looked at."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, shape, generator=draw).float() for shape in ((16, 8), (8, 8)))
    lane = torch.arange(32)
    group, member = lane // 4, lane % 4
    inputs = {
        "a0": a[group, member],
        "a1": a[group + 8, member],
        "a2": a[group, member + 4],
        "a3": a[group + 8, member + 4],
        "b0": b[member, group],
        "b1": b[member + 4, group],
    }
    inputs = {n: x.numpy().view(np.int32) | 0x1FFF for n, x in inputs.items()}
    instruction = (
        "mov.b32 %r1, 0; mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{ %r20, d, %r22, %r23 }, { a0, a1, a2, a3 }, { b0, b1 }, { %r1, %r1, %r1, %r1 };"
    )
    got = compute(instruction, np.float32, **inputs)
    assert got.tolist() == (a @ b)[group, 2 * member + 1].tolist()
