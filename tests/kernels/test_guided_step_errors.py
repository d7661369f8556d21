"""What is wrong with a call is said in words, the same ones in every form."""

import re

import pytest
import torch

from fasttrace_kernels.specs import GUIDED_STEP

ZEROS = torch.zeros
GOOD = {
    "prediction": ZEROS(6, 4, 5),
    "state": ZEROS(3, 3, 4, 5),
    "sample": ZEROS(6, 4, 5),
    "counter": torch.tensor([0, 0]),
    "weights": ZEROS(2, 5),
    "input_scales": ZEROS(3),
    "guidance": ZEROS(3),
    "noise": ZEROS(2, 3, 4, 5),
    "latents": 2,
}
SHAPES = {
    "prediction must be float16, bfloat16, float32 or float64": {"prediction": ZEROS(6, 4).long()},
    "prediction must be [L, ...] with at least two dimensions, got [6]": {"prediction": ZEROS(6)},
    "state must have prediction's dtype, or be float32 beside a half-precision prediction": {
        "state": ZEROS(3, 3, 4, 5).half()
    },
    "state must be [kept, L, ...] with kept 1 to 8 and the rows of prediction [6, 4, 5], "
    "got [3, 3, 4, 6]": {"state": ZEROS(3, 3, 4, 6)},
    "state must be [kept, L, ...] with kept 1 to 8 and the rows of prediction [6, 4, 5], "
    "got [9, 3, 4, 5]": {"state": ZEROS(9, 3, 4, 5)},
    "state must be [kept, L, ...] with kept 1 to 8 and the rows of prediction [6, 4, 5], "
    "got [3, 4, 5]": {"state": ZEROS(3, 4, 5)},
    "prediction must have 4 rows, 2 for each of the 2 lanes of state (a guidance is given), "
    "got 6": {"state": ZEROS(3, 2, 4, 5)},
    "prediction must have 3 rows, 1 for each of the 3 lanes of state (no guidance is given), "
    "got 6": {"guidance": None},
    "sample must have the shape and dtype of prediction, [6, 4, 5], got [3, 4, 5]": {
        "sample": ZEROS(3, 4, 5)
    },
    "sample must have the shape and dtype of prediction, [6, 4, 5], got [6, 4, 5]": {
        "sample": ZEROS(6, 4, 5).double()
    },
    "counter must be [2] int64 without gaps, the number of the call and a ticket, got [1]": {
        "counter": torch.tensor([0])
    },
    "counter must be [2] int64 without gaps, the number of the call and a ticket, got [2]": {
        "counter": torch.zeros(4).long()[::2]
    },
    "latents must be 1 to 3, of the 3 tensors that state keeps, got 4": {"latents": 4},
    "latents must be 1 to 3, of the 3 tensors that state keeps, got 0": {"latents": 0},
    "weights must be float32 or float64": {"weights": ZEROS(2, 5).half()},
    "weights must be [T, 5] with T >= 1, one a slot: 3 kept, the new prediction and noise; "
    "got [2, 4]": {"weights": ZEROS(2, 4)},
    "weights must be [T, 5] with T >= 1, one a slot: 3 kept, the new prediction and noise; "
    "got [0, 5]": {"weights": ZEROS(0, 5)},
    "weights must be [T, 4] with T >= 1, one a slot: 3 kept, the new prediction; got [2, 5]": {
        "noise": None
    },
    "input_scales must be [3], one more than there are calls, got [2]": {"input_scales": ZEROS(2)},
    "weights, input_scales and guidance must have one dtype": {"guidance": ZEROS(3).double()},
    "guidance must be [3], one entry a lane, or [1], got [2]": {"guidance": ZEROS(2)},
    "guidance must be [3], one entry a lane, or [1], got [3, 1]": {"guidance": ZEROS(3, 1)},
    "noise must be [2, 3 or 1, ...] with the rows of state [3, 3, 4, 5], got [3, 3, 4, 5]": {
        "noise": ZEROS(3, 3, 4, 5)
    },
    "noise must be [2, 3 or 1, ...] with the rows of state [3, 3, 4, 5], got [2, 2, 4, 5]": {
        "noise": ZEROS(2, 2, 4, 5)
    },
    "noise must have the dtype of state": {"noise": ZEROS(2, 3, 4, 5).double()},
}
BUFFER = ZEROS(1000)
MEMORY = {
    "the rows of state and sample must be contiguous": {"sample": ZEROS(6, 5, 4).mT},
    "the rows of state and sample must not overlap in memory": {
        "state": BUFFER.as_strided((3, 3, 4, 5), (20, 20, 5, 1))
    },
    "state and sample must not share memory with each other or another tensor": {
        "prediction": BUFFER[20:140].reshape(6, 4, 5),
        "sample": BUFFER[:120].reshape(6, 4, 5),
    },
}


@pytest.mark.parametrize("message", SHAPES)
def test_shapes(function, message):
    with pytest.raises(RuntimeError, match=re.escape(f"guided_step_: {message}")):
        function(GUIDED_STEP)(**GOOD | SHAPES[message])
    assert GOOD["counter"].tolist() == [0, 0]


@pytest.mark.parametrize("message", SHAPES)
def test_shapes_while_tracing(message):
    """A graph that could never run is refused when it is traced."""
    fake = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in (GOOD | SHAPES[message]).items()
    }
    if message.endswith("a ticket, got [2]"):  # `to` closes gaps
        fake["counter"] = torch.zeros(4, device="meta").long()[::2]
    with pytest.raises(RuntimeError, match=re.escape(f"guided_step_: {message}")):
        GUIDED_STEP.op(**fake)


@pytest.mark.parametrize("form", ["fallback", "triton"], indirect=True)
def test_devices_are_compared(function):
    elsewhere = {"weights": torch.zeros(2, 5, device="meta")}
    with pytest.raises(RuntimeError, match="prediction and every other tensor must be on one dev"):
        function(GUIDED_STEP)(**GOOD | elsewhere)


@pytest.mark.parametrize("message", MEMORY)
def test_memory(function, message):
    BUFFER.zero_()
    arguments = GOOD | {"weights": torch.ones(2, 5), "noise": torch.ones(2, 3, 4, 5)}
    with pytest.raises(RuntimeError, match=re.escape(f"guided_step_: {message}")):
        function(GUIDED_STEP)(**arguments | MEMORY[message])
    assert not BUFFER.any()


def test_all_but_what_is_written_may_share_memory(function):
    """The two branches of one prediction, say; and what touches without overlapping."""
    buffer = torch.ones(1000)
    arguments = GOOD | {
        "prediction": buffer[:60].reshape(3, 4, 5)[:1].expand(6, 4, 5),
        "sample": buffer[60:180].reshape(6, 4, 5),
        "state": buffer[180:360].reshape(3, 3, 4, 5),
        "noise": buffer[:20].reshape(4, 5).expand(2, 3, 4, 5),
        "weights": torch.ones(2, 5),
        "counter": torch.tensor([0, 0]),
    }
    function(GUIDED_STEP)(**arguments)
    assert buffer[180:240].tolist() == [5.0] * 60
    assert buffer[:60].tolist() == [1.0] * 60
    assert buffer[360:].tolist() == [1.0] * 640


@pytest.mark.parametrize("call", [-1, 2, 2**40])
@pytest.mark.parametrize("form", ["compiled", "fallback"], indirect=True)
def test_a_call_that_the_tables_do_not_have(function, call):
    message = (
        f"guided_step_: counter says that call {call} was made, but weights has 2 calls; "
        "expected 0 to 1"
    )
    arguments = GOOD | {
        "counter": torch.tensor([call, 0]),
        "state": torch.ones(3, 3, 4, 5),
        "sample": torch.ones(6, 4, 5),
    }
    with pytest.raises(RuntimeError, match=message):
        function(GUIDED_STEP)(**arguments)
    assert arguments["counter"].tolist() == [call, 0]
    assert arguments["state"].eq(1).all()
    assert arguments["sample"].eq(1).all()
