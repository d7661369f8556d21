"""Run by test_sanitizers.py under AddressSanitizer: every compiled CPU op on awkward arguments.

python -S sanitized_ops.py LIBRARY. Where the sanitizer finds something the process dies; a result
that is not the reference's, or a library that is not the one that is meant, is an error.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import fasttrace_kernels
from fasttrace_kernels import guided_step_, patch_rows, patch_rows_, reference
from fasttrace_kernels.testing import assert_same_bits

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# One lane, one element; no lane; empty rows; more than one chunk of work; odd everywhere.
SHAPES = ((1, 1, 1), (0, 2, 5), (3, 2, 0), (2, 1, 40000), (5, 2, 13, 33), (4, 3, 6, 7, 9))


def expect_error(run, *arguments) -> None:
    try:
        run(*arguments)
    except RuntimeError:
        return
    raise AssertionError(f"no error from {run} with {arguments}")


def rows_of(shape, dtype, gaps) -> torch.Tensor:
    """With gaps each row is followed by elements that belong to nobody."""
    size = 1
    for number in shape[1:]:
        size *= number
    memory = torch.randn(shape[0], size + (3 if gaps else 0)).to(dtype)
    return memory[:, :size].unflatten(1, shape[1:]) if size else torch.empty(shape, dtype=dtype)


def masks(shape):
    yield None
    yield torch.rand(shape[0]) > 0.5
    yield torch.rand(shape[:2])
    yield torch.rand(1, shape[1])
    yield torch.rand(shape)
    if len(shape) > 2:
        yield torch.rand(shape[0], 1, *shape[2:]) > 0.5


def check_patch_rows(shape, dtype) -> None:
    lanes, sources, *row = shape
    index = torch.randint(-1, sources, (lanes,))
    strength = torch.tensor([0.0, 1.0, 0.25, -0.5, 2.0]).repeat(lanes)[:lanes]
    for gaps in (False, True):
        out, source = (rows_of((count, *row), dtype, gaps) for count in (lanes, sources))
        for mask in masks(out.shape):
            want = reference.patch_rows(out, source, index, strength, mask)
            for table in (index, index.int()):
                assert_same_bits(patch_rows(out, source, table, strength, mask), want)
                patched = rows_of(out.shape, dtype, gaps).copy_(out)
                patch_rows_(patched, source, table, strength, mask)
                assert_same_bits(patched.contiguous(), want.contiguous())
        if lanes:
            wrong = torch.full((lanes,), sources)
            expect_error(patch_rows, out, source, wrong, torch.ones(lanes))
    if len(row) == 3:  # rows in another order of the dimensions
        out, source = (
            torch.randn(count, *row).to(dtype).to(memory_format=torch.channels_last)
            for count in (lanes, sources)
        )
        want = reference.patch_rows(out, source, index, strength)
        assert_same_bits(patch_rows(out, source, index, strength), want)


def check_guided_step(lanes, row, dtype, kept, latents, guided, noisy) -> None:
    calls, branches = 3, 2 if guided else 1
    given = {
        "prediction": torch.randn(branches * lanes, *row).to(dtype),
        "state": torch.randn(kept, lanes, *row).to(dtype),
        "sample": torch.randn(branches * lanes, *row).to(dtype),
        "counter": torch.tensor([calls - 1, 0]),
        "weights": torch.randn(calls, kept + 1 + noisy),
        "input_scales": torch.rand(calls + 1),
        "guidance": torch.rand(lanes) * 8 if guided else None,
        "noise": torch.randn(calls, 1, *row).to(dtype) if noisy else None,
    }
    want = reference.guided_step(**given, latents=latents)
    guided_step_(**given, latents=latents)
    for name, value in zip(("state", "sample", "counter"), want, strict=True):
        assert_same_bits(given[name], value)
    # The counter now says a call that is not in the tables.
    expect_error(lambda: guided_step_(**given, latents=latents))


def main() -> None:
    status = fasttrace_kernels.extension_status()
    assert status.loaded, status.sentence
    library = str(Path(sys.argv[1]).resolve())
    assert library in Path("/proc/self/maps").read_text(), f"{library} is not what was loaded"
    torch.manual_seed(0)
    torch.set_num_threads(2)
    for dtype in DTYPES:
        for shape in SHAPES:
            check_patch_rows(shape, dtype)
        for lanes, row in ((1, (1,)), (3, (4, 5, 7)), (2, (20011,)), (0, (4,))):
            for kept, latents in ((1, 1), (5, 2), (8, 4)):
                for guided, noisy in ((False, False), (True, False), (True, True)):
                    check_guided_step(lanes, row, dtype, kept, latents, guided, noisy)
    sys.stdout.write("every op ran\n")


if __name__ == "__main__":
    main()
