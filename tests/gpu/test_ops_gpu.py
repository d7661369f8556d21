"""The ops on a real device: their numbers, their bits, and their place in a captured graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fasttrace_kernels import guided_step_, patch_attention, patch_rows, patch_rows_, reference
from fasttrace_kernels.attention_configs import AttentionConfig, attention_config
from fasttrace_kernels.patch_attention import launch
from fasttrace_kernels.specs import GUIDED_STEP, PATCH_ROWS, SPECS, Spec
from fasttrace_kernels.testing import assert_same_bits, assert_within

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RMS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}
NAN = float("nan")


def to(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


@contextmanager
def no_sync() -> Iterator[None]:
    """Raises where the host waits for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_equal_to_the_reference(spec: Spec, dtype: torch.dtype, device: torch.device) -> None:
    for shape in spec.shapes.values():
        example = spec.example(shape, dtype, 0)
        want = spec.outcome(spec.reference, example)
        for form in (spec.op, spec.launch):
            got = spec.outcome(form, to(example, device))
            for have, expected in zip(got, want, strict=True):
                assert_within(have.cpu(), expected, spec.tolerance.get(expected.dtype, 0.0))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_host_never_waits(spec: Spec, device: torch.device) -> None:
    shape = list(spec.shapes.values())[-1]
    example = to(spec.example(shape, torch.float16, 0), device)
    spec.outcome(spec.op, example)  # compiles
    with no_sync():
        spec.outcome(spec.op, example)


def attention_example(
    size: int, keys: int, dtype: torch.dtype, device: torch.device, tokens: int = 1000
) -> dict[str, torch.Tensor]:
    """Six lanes, three slots, heads that take from other lanes, token strengths of all kinds."""
    generator = torch.Generator().manual_seed(size + keys)
    lanes, slots, heads = 6, 3, 4

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    index = torch.randint(-1, lanes, (lanes, heads), generator=generator)
    strength = torch.rand(lanes, tokens, generator=generator).mul(1.5).sub(0.25).clamp(0, 1)
    return {
        "query": draw(lanes, heads, tokens, size),
        "key": draw(slots, heads, keys, size),
        "value": draw(slots, heads, keys, size),
        "kv_index": torch.randint(slots, (lanes,), generator=generator).to(device),
        "index": index.to(device),
        "strength": strength.to(device),
    }


def exact(example: dict[str, torch.Tensor]) -> torch.Tensor:
    """In float64 on the device: softmax and lerp written out."""
    wide = {k: v.double() if v.is_floating_point() else v for k, v in example.items()}
    slot = wide["kv_index"]
    scores = wide["query"] @ wide["key"][slot].mT * wide["query"].shape[3] ** -0.5
    own = torch.softmax(scores, -1) @ wide["value"][slot]
    index, heads = wide["index"], torch.arange(own.shape[1], device=own.device)
    taken = own[index.clamp(min=0), heads]
    share = wide["strength"][:, None, :, None] * (index >= 0)[:, :, None, None]
    return own + share * (taken - own)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [33, 40, 64, 80, 128, 160])
@pytest.mark.parametrize("keys", [77, 1000, 1024])
def test_attention_at_real_sizes(
    size: int, keys: int, dtype: torch.dtype, device: torch.device
) -> None:
    example = attention_example(size, keys, dtype, device)
    got = patch_attention(**example).double()
    want = exact(example)
    error = ((got - want).square().mean().sqrt() / want.square().mean().sqrt()).item()
    assert error < RMS[dtype]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_what_is_not_taken_is_not_looked_at(dtype: torch.dtype, device: torch.device) -> None:
    """Unpatched heads keep their bits; a lane of NaN that nobody reads stays alone."""
    for keys in (77, 1000):
        example = attention_example(64, keys, dtype, device)
        example["index"] = torch.where(example["index"] == 2, -1, example["index"])
        example["query"][2] = NAN
        plain = {name: example[name] for name in ("query", "key", "value", "kv_index")}
        own, got = patch_attention(**plain), patch_attention(**example)
        kept = example["index"] == -1
        assert_same_bits(got[kept], own[kept])
        assert torch.isfinite(got[[0, 1, 3, 4, 5]]).all()
        whole = patch_attention(**{**example, "strength": None})
        lanes, heads = torch.nonzero(~kept, as_tuple=True)
        assert_same_bits(whole[lanes, heads], own[example["index"][lanes, heads], heads])


def test_an_index_out_of_range_shows_as_nan(device: torch.device) -> None:
    example = attention_example(40, 77, torch.float16, device)
    example |= {"strength": torch.ones(6, 1, device=device), "index": torch.full((6, 4), -1)}
    example["index"] = example["index"].to(device)
    example["index"][1, 2] = 6
    got = patch_attention(**example)
    assert got[1, 2].isnan().all()
    got[1, 2] = 0
    assert torch.isfinite(got).all()


def test_configurations_agree(device: torch.device) -> None:
    """Another tiling is another order of sums and nothing else."""
    example = attention_example(80, 1000, torch.float16, device)
    want = exact(example)
    for config in (
        attention_config(80, torch.float16, 80, short=False),
        attention_config(90, torch.float16, 80, short=False),
        AttentionConfig(32, 32, 4, 1),
    ):
        got = launch(**example, config=config).double()
        assert (got - want).square().mean().sqrt() < 3e-3 * want.square().mean().sqrt()


def test_a_captured_graph_serves_other_tables(device: torch.device) -> None:
    """Captured once; tables are rewritten and replayed, against eager calls: bit for bit."""
    attention = attention_example(40, 77, torch.float16, device)
    rows = to(PATCH_ROWS.example((8, 3, 77, 40), torch.float16, 0), device)
    step = to(GUIDED_STEP.example((2, 4, 3, 4, 6, 6), torch.float16, 0), device)
    step["weights"] = step["weights"] / 10

    def run() -> torch.Tensor:
        patch_rows_(**rows)
        guided_step_(**step)
        return patch_attention(**attention)

    fixed = {**rows, **{f"step {name}": value for name, value in step.items()}}
    begin = {k: v.clone() for k, v in fixed.items() if isinstance(v, torch.Tensor)}

    def put_back() -> None:
        for name, value in begin.items():
            fixed[name].copy_(value)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    put_back()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        attention["index"].copy_(torch.randint(-1, 6, (6, 4), generator=generator))
        attention["kv_index"].copy_(torch.randint(3, (6,), generator=generator))
        begin["index"] = torch.randint(-1, 3, (8,), generator=generator).to(device)
        put_back()
        graph.replay()
        got = [out.clone(), rows["out"].clone(), step["state"].clone(), step["sample"].clone()]
        put_back()
        want = [run(), rows["out"], step["state"], step["sample"]]
        for have, expected in zip(got, want, strict=True):
            assert_same_bits(have, expected)
    assert step["counter"].tolist()[0] == 2


def test_gradients_of_strengths(device: torch.device) -> None:
    example = to(PATCH_ROWS.example((8, 3, 77, 40), torch.float32, 0), device)
    gradients = []
    for where in ("cuda", "cpu"):
        given = to(example, torch.device(where))
        given["strength"] = given["strength"].clone().requires_grad_()
        given["out"] = given["out"].clone().requires_grad_()
        patch_rows(**given).square().sum().backward()
        gradients.append((given["strength"].grad.cpu(), given["out"].grad.cpu()))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


TWINS = """
import json, sys
sys.modules["triton"] = None  # as if it were not installed
import torch
import fasttrace_kernels as kernels
from fasttrace_kernels import _registry
from fasttrace_kernels.specs import GUIDED_STEP, PATCH_ROWS
from fasttrace_kernels.testing import assert_within
status = _registry.cuda_extension_status()
for spec in (PATCH_ROWS, GUIDED_STEP):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for shape in spec.shapes.values():
            example = spec.example(shape, dtype, 0)
            there = {k: v.cuda() if hasattr(v, "cuda") else v for k, v in example.items()}
            got, want = spec.outcome(spec.op, there), spec.outcome(spec.reference, example)
            for have, expected in zip(got, want, strict=True):
                assert_within(have.cpu(), expected, spec.tolerance.get(expected.dtype, 0.0))
print(json.dumps([status.loaded, status.sentence, sys.modules["triton"] is not None]))
"""


def test_cuda_twins_without_triton() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TWINS],
        env=dict(os.environ), capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    loaded, sentence, triton = json.loads(ran.stdout.splitlines()[-1])
    assert loaded, sentence
    assert not triton


def test_reference_is_what_it_says(device: torch.device) -> None:
    """`exact` above against the reference that every other test uses."""
    example = attention_example(40, 77, torch.float32, device, tokens=9)
    want = reference.patch_attention(**{k: v.cpu() for k, v in example.items()})
    assert_within(exact(example).float().cpu(), want, 1e-5)
