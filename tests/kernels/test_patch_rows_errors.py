"""What is wrong with a call is said in words, the same ones in every form."""

import re

import pytest
import torch

from fasttrace_kernels.patch_rows import launch_
from fasttrace_kernels.specs import PATCH_ROWS

GOOD = {
    "out": torch.zeros(3, 4, 5),
    "source": torch.ones(2, 4, 5),
    "index": torch.tensor([-1, 0, 1]),
    "strength": torch.ones(3),
}
SHAPES = {
    "out must be [L, ...] with at least two dimensions, got [3]": {"out": torch.zeros(3)},
    "out must be float16, bfloat16, float32 or float64": {"out": torch.zeros(3, 4, 5).long()},
    "source must be [S, ...] with S >= 1 and the rows of out [3, 4, 5], got [2, 4, 6]": {
        "source": torch.ones(2, 4, 6)
    },
    "source must be [S, ...] with S >= 1 and the rows of out [3, 4, 5], got [0, 4, 5]": {
        "source": torch.ones(0, 4, 5)
    },
    "source and out must have one dtype": {"source": torch.ones(2, 4, 5).half()},
    "index must be [3], one entry a lane, got [2]": {"index": torch.tensor([0, 1])},
    "index must be int32 or int64": {"index": torch.tensor([0.0, 1.0, 1.0])},
    "strength must be [3], one entry a lane, got [3, 1]": {"strength": torch.ones(3, 1)},
    "strength must be float32 (float64 is for a float64 out)": {"strength": torch.ones(3).half()},
    "mask must broadcast from the left against out [3, 4, 5] and be all full or all 1 past "
    "dimension 1, got [3, 5]": {"mask": torch.ones(3, 5)},
    "a mask that is not bool must be float32 (float64 is for a float64 out)": {
        "mask": torch.ones(3, 4).long()
    },
}
VALUES = {
    "index[2] is 2, but source has 2 rows; expected -1 (not patched) to 1": {
        "index": torch.tensor([0, 1, 2])
    },
    "index[0] is -2, but source has 2 rows; expected -1 (not patched) to 1": {
        "index": torch.tensor([-2, 1, 1], dtype=torch.int32)
    },
}


@pytest.mark.parametrize("message", SHAPES)
def test_shapes(run, message):
    with pytest.raises(RuntimeError, match=re.escape(f"patch_rows: {message}")):
        run(PATCH_ROWS, **GOOD | SHAPES[message])


@pytest.mark.parametrize("in_place", [PATCH_ROWS.fallback, launch_])
def test_devices_are_compared(in_place):
    elsewhere = {"index": torch.zeros(3, device="meta").long()}
    with pytest.raises(RuntimeError, match="out and every other tensor must be on one device"):
        in_place(**GOOD | elsewhere)


@pytest.mark.parametrize("message", SHAPES)
def test_shapes_while_tracing(message):
    """A graph that could never run is refused when it is traced."""
    fake = {name: tensor.to("meta") for name, tensor in (GOOD | SHAPES[message]).items()}
    with pytest.raises(RuntimeError, match=re.escape(f"patch_rows: {message}")):
        PATCH_ROWS.op(**fake)


@pytest.mark.parametrize("message", VALUES)
@pytest.mark.parametrize("form", ["compiled", "fallback"], indirect=True)
def test_values(run, message):
    with pytest.raises(RuntimeError, match=re.escape(f"patch_rows: {message}")):
        run(PATCH_ROWS, **GOOD | VALUES[message])


@pytest.mark.parametrize("form", ["compiled", "fallback"], indirect=True)
def test_a_row_both_read_and_rewritten_is_refused(form):
    batch = torch.arange(12.0).reshape(4, 3)
    before = batch.clone()
    in_place = (
        torch.ops.fasttrace.patch_rows_.default if form == "compiled" else PATCH_ROWS.fallback
    )
    expected = (
        "lane 2 reads row 1 of source, which is lane 1 of out and is patched in the same call"
    )
    with pytest.raises(RuntimeError, match=expected):
        in_place(batch, batch, torch.tensor([-1, 0, 1, -1]), torch.ones(4), None)
    with pytest.raises(RuntimeError, match="lane 0 reads row 1 of source, which is lane 2 of out"):
        in_place(batch, batch[1:], torch.tensor([1, -1, 2, -1]), torch.ones(4), None)
    assert torch.equal(batch, before)


def test_overlapping_rows_are_refused(form):
    in_place = {
        "compiled": torch.ops.fasttrace.patch_rows_.default,
        "fallback": PATCH_ROWS.fallback,
        "triton": launch_,
    }[form]
    overlapping = torch.zeros(1, 4).expand(3, 4)
    with pytest.raises(RuntimeError, match="overlap|more than one element"):
        in_place(overlapping, torch.ones(1, 4), torch.tensor([0, 0, -1]), torch.ones(3), None)
