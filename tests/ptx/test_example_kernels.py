"""Small Triton kernels, compiled for sm_80 and executed, against float64."""

import numpy as np
import pytest
import torch

from .examples import NAN, TOLERANCE, attention, draw, in_wide_rows, matmul
from .launch import Options

HALVES = [torch.float16, torch.bfloat16]
BITS = {2: torch.int16, 4: torch.int32}


def launch(compiler, name, grid, arguments, options=Options(), **constants):  # noqa: B008
    kernel = compiler.compile(f"ptx.example_kernels:{name}", arguments, constants, options)
    return kernel, kernel.launch(grid, arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("size", "block"), [(1, 128), (1000, 1024), (1008, 1024), (2048, 1024)])
def test_copy(compiler, dtype, size, block):
    """Any bits, and not one element past the end."""
    bits = BITS[dtype.itemsize]
    low, high = torch.iinfo(bits).min, torch.iinfo(bits).max
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(low, high, (size,), dtype=bits, generator=generator).view(dtype)
    memory = torch.full((size + 32,), NAN, dtype=dtype)
    before = memory.clone()
    arguments = {"out_ptr": memory[16:-16], "in_ptr": source, "size": size}
    grid = (-(-size // block),)
    kernel, seen = launch(compiler, "copy", grid, arguments, BLOCK=block)
    assert torch.equal(memory[16:-16].view(bits), source.view(bits))
    before[16:-16] = memory[16:-16]
    assert torch.equal(memory.view(bits), before.view(bits))
    assert seen.was_read("in_ptr").all()
    assert seen.was_written("out_ptr").all()
    # A whole vector is inside or outside when the size is a multiple of 16.
    assert bool(kernel.count(r"ld\.global\.v4")) == (size % 16 == 0)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_gather_rows(compiler, kind):
    rows = in_wide_rows(draw(5, 257, dtype=torch.float16), 300)
    index = torch.tensor([4, 0, 3, 4], dtype=kind)
    out = torch.empty(4, 257, dtype=torch.float16)
    arguments = {"out_ptr": out, "in_ptr": rows, "index_ptr": index, "row_size": 257}
    arguments["row_stride"] = rows.stride(0)
    kernel, seen = launch(compiler, "gather_rows", (4,), arguments, BLOCK=512)
    assert torch.equal(out, rows[index])
    assert seen.was_read("in_ptr").all(1).tolist() == [True, False, False, True, True]
    assert seen.was_read("in_ptr").any(1).tolist() == [True, False, False, True, True]
    assert kernel.count("cache_hint")
    assert kernel.count(r"st\.global\.cs")


@pytest.mark.parametrize(("size", "warps"), [(1, 1), (300, 4), (512, 8)])
def test_softmax(compiler, size, warps):
    rows = draw(3, size, dtype=torch.bfloat16)
    out = torch.full((3, size), NAN)
    arguments = {"out_ptr": out, "in_ptr": rows, "row_size": size}
    kernel, _ = launch(compiler, "softmax", (3,), arguments, Options(warps), BLOCK=512)
    torch.testing.assert_close(out.double(), rows.double().softmax(-1), rtol=1e-6, atol=0)
    assert kernel.count(r"shfl\.sync\.bfly")
    assert bool(kernel.count(r"bar\.sync")) == (warps > 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_transpose(compiler, dtype):
    tile = draw(29, 50, dtype=dtype)
    out = torch.empty(50, 29, dtype=dtype)
    arguments = {"out_ptr": out, "in_ptr": tile, "rows_size": 29, "columns_size": 50}
    kernel, _ = launch(compiler, "transpose", (1,), arguments, R=32, C=64)
    assert torch.equal(out, tile.T)
    assert kernel.count(r"st\.shared")


MMA = {
    torch.float16: r"mma\.sync\.aligned\.m16n8k16.*\.f16\.f16",
    torch.bfloat16: r"mma\.sync\.aligned\.m16n8k16.*\.bf16\.bf16",
    torch.float32: r"mma\.sync\.aligned\.m16n8k8.*\.tf32\.tf32",
}


@pytest.mark.parametrize(("dtype", "precision"), TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(32, 32, 64), (45, 37, 51)], ids=["even", "odd"])
def test_matmul(compiler, dtype, precision, shape):
    product = matmul(compiler, dtype, precision, shape)
    assert product.error() < TOLERANCE[dtype, precision]
    assert bool(product.kernel.count(MMA[dtype])) == (precision != "ieee")
    if shape[2] % 16 == 0:
        assert product.kernel.count(r"cp\.async\.cg")
        assert bool(product.kernel.count("ldmatrix")) == (precision != "ieee")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("warps", [2, 4])
def test_attention(compiler, dtype, stages, warps):
    launch = attention(compiler, dtype, Options(warps, stages))
    assert launch.error() < TOLERANCE[dtype, "tf32"]
    opcodes = [MMA[dtype], r"ldmatrix.*\.x4\.shared", r"ldmatrix.*\.x4\.trans"]
    for opcode in opcodes + [r"cp\.async\.cg", r"cp\.async\.wait_group"] * (stages > 1):
        assert launch.kernel.count(opcode), opcode


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_attention_of_rows_that_are_not_aligned(compiler, dtype):
    launch = attention(compiler, dtype, width=43)
    assert launch.error() < TOLERANCE[dtype, "tf32"]
    assert not launch.kernel.count(r"cp\.async|ld\.global\.v")


def test_the_order_of_blocks_does_not_matter(compiler):
    launch = attention(compiler, torch.float16)
    forwards = launch.run().clone()
    assert torch.equal(forwards, launch.run(backwards=True))
    assert not forwards.isnan().any()


def test_nothing_is_computed_behind_the_kernels_back(compiler):
    """Blocks that don't run leave their part as it was: NaN."""
    launch = attention(compiler, torch.float16)
    out = launch.run()
    out.fill_(NAN)
    launch.kernel.launch((1, 1), launch.arguments)
    assert np.argwhere(~out.isnan().all(2).numpy()).tolist() == [[0, row] for row in range(32)]
