"""What is refused and in which words; what tracing and torch's own checks of an op ask for."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fasttrace_kernels import patch_attention, patch_attention_maps
from fasttrace_kernels.attention_configs import INTERPRETED, attention_config, padded, split
from fasttrace_kernels.patch_attention import fallback, launch

GOOD = {
    "query": torch.zeros(3, 2, 4, 8),
    "key": torch.zeros(2, 2, 5, 8),
    "value": torch.zeros(2, 2, 5, 8),
    "kv_index": torch.tensor([0, 1, 1]),
    "index": torch.tensor([[-1, 0], [2, 1], [-1, -1]]),
    "strength": torch.ones(3, 4),
}
BIG = torch.zeros(1, 1, 1, 257)
SHAPES = {
    "query must be float16, bfloat16 or float32": {"query": torch.zeros(3, 2, 4, 8).double()},
    "query must be [L, H, N, D], got [3, 2, 4]": {"query": torch.zeros(3, 2, 4)},
    "heads must be of 1 to 256, got 257": {"query": BIG, "key": BIG, "value": BIG},
    "key must be [S, 2, n, 8], as query [3, 2, 4, 8] asks, got [2, 1, 5, 8]": {
        "key": torch.zeros(2, 1, 5, 8)
    },
    "value must be [S, 2, n, 8], as query [3, 2, 4, 8] asks, got [2, 2, 5, 9]": {
        "value": torch.zeros(2, 2, 5, 9)
    },
    "value and query must have one dtype": {"value": torch.zeros(2, 2, 5, 8).half()},
    "key and value must be alike, with at least one key, got [2, 2, 5, 8] and [2, 2, 6, 8]": {
        "value": torch.zeros(2, 2, 6, 8)
    },
    "key and value must be alike, with at least one key, got [2, 2, 0, 8] and [2, 2, 0, 8]": {
        "key": torch.zeros(2, 2, 0, 8),
        "value": torch.zeros(2, 2, 0, 8),
    },
    "without kv_index there must be 3 slots, got 2": {"kv_index": None},
    "kv_index needs at least one slot to read": {
        "key": torch.zeros(0, 2, 5, 8),
        "value": torch.zeros(0, 2, 5, 8),
    },
    "kv_index must be [3], got [2]": {"kv_index": torch.zeros(2).long()},
    "kv_index must be int32 or int64": {"kv_index": torch.zeros(3)},
    "index must be [3, 2], got [3]": {"index": torch.zeros(3).long()},
    "index must be int32 or int64": {"index": torch.zeros(3, 2)},
    "strength needs an index": {"index": None},
    "strength must be float32": {"strength": torch.ones(3, 4).half()},
    "strength must be [3, 4] or [3, 1], got [3, 2]": {"strength": torch.ones(3, 2)},
    "scale must be positive and finite, got 0.0": {"scale": 0.0},
    "scale must be positive and finite, got inf": {"scale": float("inf")},
}
VALUES = {
    "kv_index has 2; expected 0 to 1": {"kv_index": torch.tensor([0, 2, 1])},
    "kv_index has -1; expected 0 to 1": {"kv_index": torch.tensor([0, 1, -1])},
    "index has 3; expected -1 to 2": {"index": torch.tensor([[-1, 0], [3, 1], [-1, -1]])},
    "index has -2; expected -1 to 2": {"index": torch.tensor([[-1, 0], [2, 1], [-1, -2]])},
}
FORMS = {"op": patch_attention, "fallback": fallback, "triton": launch}


def refused(function, message, arguments):
    with pytest.raises(RuntimeError, match=re.escape(f"patch_attention: {message}")):
        function(**arguments)


@pytest.mark.parametrize("message", SHAPES)
def test_shapes(message):
    for function in (*FORMS.values(), patch_attention_maps):
        refused(function, message, GOOD | SHAPES[message])


@pytest.mark.parametrize("message", SHAPES)
def test_shapes_while_tracing(message):
    arguments = GOOD | SHAPES[message]
    with FakeTensorMode() as mode:
        fake = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        refused(patch_attention, message, fake)
        refused(patch_attention_maps, message, fake)


@pytest.mark.parametrize("message", VALUES)
def test_values(message):
    for function in (patch_attention, fallback, patch_attention_maps):
        refused(function, message, GOOD | VALUES[message])


def test_devices_are_compared():
    elsewhere = GOOD | {"index": torch.zeros(3, 2, device="meta").long()}
    for function in (fallback, launch):
        refused(function, "query and every other tensor must be on one device", elsewhere)


def test_maps_are_for_few_keys():
    many = torch.zeros(1, 1, 129, 8)
    query = torch.zeros(1, 1, 2, 8)
    refused(
        patch_attention_maps,
        "maps are given for at most 128 keys, got 129",
        {"query": query, "key": many, "value": many},
    )
    few = many[:, :, :128]
    assert patch_attention_maps(query, few, few)[1].shape == (1, 1, 2, 128)


@pytest.mark.parametrize("which", ["query", "key", "value", "strength"])
@pytest.mark.parametrize("op", [patch_attention, patch_attention_maps])
def test_a_gradient_is_refused(op, which):
    asked = GOOD | {which: GOOD[which].clone().requires_grad_()}
    expected = f"{op.__name__} has no gradient, but one is required; use torch's scaled_dot"
    with pytest.raises(RuntimeError, match=expected):
        op(**asked)
    with torch.no_grad():
        result = op(**asked)
    out = result if isinstance(result, torch.Tensor) else result[0]
    assert not out.requires_grad


def arguments(dtype=torch.float32):
    tensors = [
        value.to(dtype) if value.is_floating_point() and name != "strength" else value
        for name, value in GOOD.items()
    ]
    return (*tensors, None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    plain = (torch.randn(3, 2, 4, 8).to(dtype),) * 3
    for name in ("patch_attention", "patch_attention_maps"):
        op = getattr(torch.ops.fasttrace, name).default
        for given in (arguments(dtype), (*plain, None, None, None, 0.5)):
            assert set(torch.library.opcheck(op, given).values()) == {"SUCCESS"}


def test_a_fake_result_lies_as_the_real_one_does():
    real_out, real_maps = patch_attention_maps(*arguments())
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) if x is not None else None for x in arguments()]
        fake_out, fake_maps = patch_attention_maps(*fake)
        alone = patch_attention(*fake)
    for got, want in ((fake_out, real_out), (fake_maps, real_maps), (alone, real_out)):
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)
    assert real_out.transpose(1, 2).is_contiguous()


def test_one_traced_node_serves_every_table():
    from torch.fx.experimental.proxy_tensor import make_fx

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 1, 3, 8, generator=generator) for _ in range(3))

    def step(index, slots):
        return patch_attention(query, key, value, slots, index) * 2

    first = torch.tensor([[-1], [0]]), torch.tensor([0, 1])
    other = torch.tensor([[1], [-1]]), torch.tensor([1, 1])
    graph = make_fx(step, pre_dispatch=True)(*first)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets[0] is torch.ops.fasttrace.patch_attention.default
    assert torch.equal(graph(*other), step(*other))
    assert not torch.equal(graph(*other), step(*first))


SPLITS = {8: (16, 0), 16: (16, 0), 17: (32, 0), 40: (32, 16), 48: (32, 16), 49: (64, 0)}
SPLITS |= {64: (64, 0), 72: (64, 16), 77: (64, 16), 80: (64, 16), 96: (64, 32), 97: (128, 0)}
SPLITS |= {128: (128, 0), 160: (128, 32), 192: (128, 64), 193: (256, 0), 256: (256, 0)}


def test_split():
    assert {size: split(size) for size in SPLITS} == SPLITS
    for size in range(1, 257):
        assert size <= sum(split(size)) <= sum(padded(size))
    assert [padded(size) for size in (8, 40, 64, 160)] == [(16, 0), (64, 0), (64, 0), (256, 0)]


def test_configurations_come_from_one_place():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for size in (40, 64, 80, 128, 160, 256):
            for short in (False, True):
                config = attention_config(80, dtype, size, short=short)
                assert attention_config(89, dtype, size, short=short) == config
                newer = attention_config(90, dtype, size, short=short)
                assert attention_config(100, dtype, size, short=short) == newer
                assert attention_config(None, dtype, size, short=short) is INTERPRETED


def test_a_given_configuration_is_used(monkeypatch):
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda **_: None

    monkeypatch.setitem(launch.__globals__, "patch_attention_kernel", Kernel())
    query = torch.zeros(2, 3, 100, 40)
    launch(query, query, query)
    config = attention_config(80, torch.float32, 40, short=False)
    launch(query, query, query, config=config)
    assert grids == [(4, 3, 2), (-(-100 // config.block_m), 3, 2)]
