"""FLOP formulas against counts by hand, torch's own counter, and the published models."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fasttrace.adapters.architectures import ARCHITECTURES
from fasttrace.engine.flops import count
from fasttrace.engine.graph.capture import capture, tensors_of
from fasttrace.engine.graph.partition import partition


class One(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, sample):
        return (self.function(sample),)


@pytest.mark.parametrize(
    ("function", "shape", "expected"),
    [
        # 3 rows of 5 outputs, each 4 multiply-adds
        (lambda x: F.linear(x, torch.ones_like(x[:1]).expand(5, 4)), (3, 4), 2 * 3 * 5 * 4),
        # 2 pictures, 6 channels out, 5 x 3 places, 4 / 2 channels of 3 x 3
        (
            lambda x: F.conv2d(x, x.new_ones(6, 2, 3, 3), padding=1, groups=2),
            (2, 4, 5, 3),
            2 * (2 * 6 * 5 * 3) * (2 * 9),
        ),
        # 2 x 3 heads, 5 queries and 5 keys of 7 channels: scores, then the weighted sum
        (lambda x: F.scaled_dot_product_attention(x, x, x), (2, 3, 5, 7), 6 * 2 * 2 * 5 * 5 * 7),
        # 5 queries, 2 keys
        (
            lambda x: F.scaled_dot_product_attention(x, x[:, :, :2], x[:, :, :2]),
            (1, 1, 5, 7),
            2 * 2 * 5 * 2 * 7,
        ),
        (lambda x: x @ x.transpose(1, 2), (2, 3, 4), 2 * 2 * 3 * 3 * 4),
        (lambda x: torch.addmm(x[:, :3], x, x.new_ones(5, 3)), (2, 5), 2 * 2 * 3 * 5),
        (lambda x: F.silu(x) + x / 3, (2, 5), 0),
    ],
)
def test_by_hand(function, shape, expected):
    assert count(capture(One(function), {"sample": torch.ones(shape)})) == expected


@pytest.mark.parametrize("name", ["tiny sd", "tiny sdxl", "sd15", "sd21", "sdxl"])
def test_against_torch(name, unets, captured, make_inputs):
    """Its counter has formulas for the products that attention in plain form is made of."""
    unet, graph = unets(name), captured(name)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        unet(**make_inputs(unet))
    assert count(graph) == counter.get_total_flops()


@pytest.mark.parametrize(("name", "tera"), [("sd15", 0.803), ("sdxl", 6.761)])
def test_full_size(name, tera, make_inputs):
    """A row of 512 x 512 and of 1024 x 1024 pixels."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(ARCHITECTURES[name]["unet"])
    rows = 2
    inputs = make_inputs(unet, rows=rows, tokens=77, device="meta")
    graph = capture(unet, inputs, torch.device("cpu"))
    assert count(graph) / rows / 1e12 == pytest.approx(tera, rel=0.01)
    parts = partition(graph, tensors_of(unet))
    assert count(parts.text) + count(parts.step) + count(parts.body) == count(graph)
