"""The gradient written by hand, against finite differences and against numbers by hand."""

import pytest
import torch

from fasttrace_kernels import patch_rows, patch_rows_

INDEX = torch.tensor([-1, 0, 1, 1, 0])


@pytest.fixture
def example():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator)  # noqa: E731
    return draw(5, 3, 4), draw(2, 3, 4)


@pytest.mark.parametrize("strengths", [(0.3, 0.7, -0.5, 1.5, 0.5), (1.0, 0.0, 1.0, 0.0, 1.0)])
@pytest.mark.parametrize("mask_shape", [None, (5, 3), (1, 3), (5, 1, 4), (5, 3, 4)], ids=str)
def test_finite_differences(example, strengths, mask_shape):
    """At 0 and 1 the op is a copy, whose own slope would be 0; the gradient is the lerp's."""
    out, source = example
    out.requires_grad_()
    strength = torch.tensor(strengths, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(1)
    inputs = [out, strength]
    if mask_shape is not None:
        mask = torch.rand(mask_shape, dtype=torch.float64, generator=generator)
        inputs.append(mask.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda out, strength, mask=None: patch_rows(out, source, INDEX, strength, mask), inputs
    )


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_by_hand(strength):
    out = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    source = torch.tensor([[10.0, 20.0]], requires_grad=True)
    amount = torch.tensor([strength, strength], requires_grad=True)
    weight = torch.tensor([[1.0, -2.0], [3.0, 5.0]])
    (patch_rows(out, source, torch.tensor([0, -1]), amount) * weight).sum().backward()
    # <source - out, weight> = 9 * 1 + 18 * -2 for lane 0, at every strength; lane 1 isn't patched.
    assert amount.grad.tolist() == [-27.0, 0.0]
    assert out.grad.tolist() == [[1 - strength, -2 * (1 - strength)], [3.0, 5.0]]
    assert source.grad is None, "the source is a constant"


def test_token_attribution_is_the_gradient_of_a_mask_of_zeros():
    out, source = torch.zeros(1, 3, 2), torch.arange(6.0).reshape(1, 3, 2)
    mask = torch.zeros(1, 3, requires_grad=True)
    patch_rows(out, source, torch.tensor([0]), torch.ones(1), mask).sum().backward()
    assert mask.grad.tolist() == [[1.0, 5.0, 9.0]]


def test_a_nan_that_takes_no_part_stays_out_of_the_gradient():
    source = torch.tensor([[[float("nan")] * 2, [1.0, 1.0]]])
    strength = torch.ones(2, requires_grad=True)
    mask = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    out = torch.zeros(2, 2, 2, requires_grad=True)
    result = patch_rows(out, source, torch.tensor([0, -1]), strength, mask)
    result.sum().backward()
    assert strength.grad.tolist() == [2.0, 0.0]
    assert out.grad.tolist() == [[[1, 1], [0, 0]], [[1, 1], [1, 1]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    out = torch.ones(1, 4, dtype=dtype, requires_grad=True)
    strength = torch.tensor([0.5], requires_grad=True)
    patch_rows(
        out, torch.full((1, 4), 3.0, dtype=dtype), torch.tensor([0]), strength
    ).sum().backward()
    assert strength.grad.item() == 8.0
    assert strength.grad.dtype == torch.float32
    assert out.grad.tolist() == [[0.5] * 4]
    assert out.grad.dtype == dtype


def test_strength_that_needs_no_gradient():
    out = torch.ones(1, 2, requires_grad=True)
    patch_rows(out, torch.zeros(1, 2), torch.tensor([0]), torch.tensor([0.25])).sum().backward()
    assert out.grad.tolist() == [[0.75, 0.75]]


@pytest.mark.parametrize("which", ["out", "source", "strength"])
def test_in_place_refuses(which):
    tensors = {"out": torch.zeros(1, 2), "source": torch.ones(1, 2), "strength": torch.ones(1)}
    tensors[which].requires_grad_()
    arguments = tensors["out"], tensors["source"], torch.tensor([0]), tensors["strength"]
    with pytest.raises(RuntimeError, match="patch_rows_ has no gradient, but one is required; use"):
        patch_rows_(*arguments)
    with torch.no_grad():
        assert patch_rows_(*arguments).tolist() == [[1.0, 1.0]]


def check(op, *arguments):
    assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("mask", [None, torch.tensor([[True, False, True]])], ids=["", "masked"])
def test_opcheck(example, requires_grad, mask):
    out, source = (tensor.float() for tensor in example)
    strength = torch.tensor([1.0, 0.0, 1.0, 0.3, 0.5], requires_grad=requires_grad)
    out.requires_grad_(requires_grad)
    check(torch.ops.fasttrace.patch_rows.default, out, source, INDEX, strength, mask)
    if not requires_grad:
        check(torch.ops.fasttrace.patch_rows_.default, out, source, INDEX, strength, mask)


def test_one_traced_node_serves_every_table():
    from torch.fx.experimental.proxy_tensor import make_fx

    out, source, strength = torch.zeros(2, 3), torch.ones(1, 3), torch.ones(2)
    index = torch.tensor([0, -1])

    def step(out, index):
        return patch_rows(out, source, index, strength) * 2

    graph = make_fx(step, pre_dispatch=True)(out, index)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets[0] is torch.ops.fasttrace.patch_rows.default
    # The table is data: the graph traced with one table computes another.
    other = torch.tensor([-1, 0])
    assert torch.equal(graph(out, other), step(out, other))
    assert not torch.equal(graph(out, other), step(out, index))
