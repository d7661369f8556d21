"""The traced graph is the denoiser, bit for bit, with every place marked in order."""

from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from fasttrace.adapters.architectures import ARCHITECTURES
from fasttrace.adapters.catalogue import list_sites
from fasttrace.adapters.unet import KINDS, discover, kind_of
from fasttrace.engine.graph.capture import capture, flatten, tensors_of
from fasttrace.engine.graph.marks import MARK
from fasttrace.errors import ModelError
from fasttrace.testing import ToyDenoiser

UNETS = ("tiny sd", "tiny sdxl", "sd15", "sd21", "sdxl")


def eager(unet, inputs):
    with torch.no_grad():
        return unet(**inputs)[0]


def traced(graph, unet, inputs):
    with torch.no_grad():
        return graph(tensors_of(unet) | flatten(inputs))["prediction"]


@pytest.mark.parametrize("name", UNETS)
def test_bit_for_bit(name, unets, captured, make_inputs):
    unet, graph = unets(name), captured(name)
    for seed in (0, 1):
        inputs = make_inputs(unet, seed=seed)
        assert torch.equal(traced(graph, unet, inputs), eager(unet, inputs))
    one_timestep = inputs | {"timestep": torch.tensor(501)}
    assert torch.equal(traced(graph, unet, inputs), eager(unet, one_timestep))


@pytest.mark.parametrize("rows", [1, 3])
def test_awkward_shapes(unets, make_inputs, rows):
    """Latents that don't divide by the UNet's own factor, and odd numbers of rows."""
    for name in ("tiny sd", "sdxl"):
        inputs = make_inputs(unets(name), rows=rows, size=9)
        graph = capture(unets(name), inputs)
        assert torch.equal(traced(graph, unets(name), inputs), eager(unets(name), inputs))


def test_weights_are_arguments(unets, captured, make_inputs):
    unet, graph = unets("sd15"), captured("sd15")
    inputs = make_inputs(unet)
    before = traced(graph, unet, inputs)
    weight = unet.get_parameter("mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight")
    kept = weight.clone()
    try:
        weight.mul_(3)
        after = traced(graph, unet, inputs)
        assert not torch.equal(after, before)
        assert torch.equal(after, eager(unet, inputs))
    finally:
        weight.copy_(kept)


@pytest.mark.parametrize("name", UNETS)
def test_marks_are_the_sites_in_order(name, unets, captured, make_inputs):
    unet, graph = unets(name), captured(name)
    inputs = make_inputs(unet)
    side = inputs["sample"].shape[-1]
    sites = discover(unet, side, side, inputs["encoder_hidden_states"].shape[1])
    outputs = [(m.name, m.shape) for m in graph.marks if m.kind == "output"]
    own = [found for found in outputs if kind_of(found[0]) in KINDS]
    assert own == [(s.name, s.shape) for s in sites.sites]
    assert [found for found in outputs if found not in own] == [
        (s.name, s.shape) for s in sites.whole
    ]
    assert all(node.users for node in graph.module.graph.nodes if node.target is MARK)


def test_nothing_of_a_trace_stays_in_the_model(unets, make_inputs):
    unet = unets("tiny sd")
    capture(unet, make_inputs(unet))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
    broken = make_inputs(unet) | {"encoder_hidden_states": torch.zeros(4, 3, 5)}
    with pytest.raises(RuntimeError):
        capture(unet, broken)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


def test_ops_that_stay_whole(captured):
    graph = captured("sdxl")
    ops = Counter(str(n.target) for n in graph.module.graph.nodes if n.op == "call_function")
    attentions = sum(m.kind == "heads" for m in graph.marks)
    assert ops["aten.scaled_dot_product_attention.default"] == attentions
    assert ops["aten.linear.default"] > 0
    assert ops["aten.group_norm.default"] > 0
    assert not [op for op in ops if "softmax" in op or "native_" in op or "addmm" in op]


@pytest.mark.parametrize(
    ("name", "count", "whole", "skips"), [("sd15", 70, 16 + 5, 12), ("sdxl", 227, 11 + 4, 9)]
)
def test_full_size(name, count, whole, skips, make_inputs):
    """On meta tensors: no weight is needed to trace the real thing."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(ARCHITECTURES[name]["unet"])
    graph = capture(unet, make_inputs(unet, rows=2, device="meta"), torch.device("cpu"))
    marks = graph.marks
    kinds = Counter(mark.kind for mark in marks)
    assert kinds["output"] == count + whole
    attentions = sum(m.name.endswith(("attn1", "attn2")) for m in marks)
    assert kinds["heads"] == kinds["key"] == kinds["value"] == attentions
    assert kinds["hidden"] == attentions // 2
    assert kinds["skip"] == skips
    listed = [(s.name, s.shape) for s in list_sites(name) if s.kind != "attn2"]
    found = [(m.name, m.shape) for m in marks if m.kind == "output" and kind_of(m.name) in KINDS]
    assert [pair for pair in found if not pair[0].endswith("attn2")] == listed


def test_toy():
    toy = ToyDenoiser()
    inputs = {
        "sample": torch.ones(2, 1, 1, 1),
        "timestep": torch.zeros(2),
        "encoder_hidden_states": torch.tensor([0.0, 1.0]).reshape(2, 1, 1),
    }
    graph = capture(toy, inputs)
    assert [mark.name.rpartition(".")[2] for mark in graph.marks] == ["0", "attn2", "ff"]
    assert traced(graph, toy, inputs).flatten().tolist() == [6, 12]


class TestRefusals:
    def test_a_tensor_no_one_watches(self):
        class Hidden(ToyDenoiser):
            held = torch.ones(1)

            def forward(self, *args, **kwargs):
                return (super().forward(*args, **kwargs)[0] + self.held,)

        with pytest.raises(ModelError, match="neither a parameter nor a buffer"):
            self.capture(Hidden())

    def test_a_site_called_twice(self):
        class Twice(ToyDenoiser):
            def forward(self, sample, *args, **kwargs):
                return super().forward(super().forward(sample, *args, **kwargs)[0], *args, **kwargs)

        with pytest.raises(ModelError, match="more than once"):
            self.capture(Twice())

    def test_a_decision_on_a_value(self):
        class Decides(ToyDenoiser):
            def forward(self, sample, *args, **kwargs):
                return super().forward(sample if sample.sum() > 0 else -sample, *args, **kwargs)

        with pytest.raises(ModelError, match="depends on a tensor's value"):
            self.capture(Decides())

    def capture(self, denoiser: nn.Module) -> None:
        one = torch.ones(2, 1, 1, 1)
        text = torch.ones(2, 1, 1)
        inputs = {"sample": one, "timestep": torch.zeros(2), "encoder_hidden_states": text}
        capture(denoiser, inputs)
