"""Parts that run once a prompt, once a schedule and once a call make up the whole denoiser."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from fasttrace.adapters.architectures import ARCHITECTURES
from fasttrace.engine.graph.capture import capture, flatten, tensors_of
from fasttrace.engine.graph.partition import partition, remove_no_ops, with_tables
from fasttrace.testing import ToyDenoiser

UNETS = ("tiny sd", "tiny sdxl", "sd15", "sd21", "sdxl")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=UNETS)
def whole(request, unets, captured, make_inputs):
    """A UNet, its graph, everything the graph reads, and its prediction."""
    unet, graph = unets(request.param), captured(request.param)
    values = tensors_of(unet) | flatten(make_inputs(unet))
    return unet, graph, values, graph(values)["prediction"]


def test_no_ops_are_exact(whole):
    _, graph, values, prediction = whole
    less, removed = remove_no_ops(graph)
    assert torch.equal(less(values)["prediction"], prediction)
    assert less.size == graph.size - sum(removed.values())
    assert removed["aten.dropout.default"] > 0
    assert removed["aten.div.Tensor"] > 0
    assert less.marks == graph.marks


def test_parts_compose(whole):
    """Same rows in every part, so bit for bit."""
    unet, graph, values, prediction = whole
    parts = partition(graph, tensors_of(unet))
    values = values | parts.text(values)
    values |= parts.step(values)
    assert torch.equal(parts.body(values)["prediction"], prediction)
    assert parts.body.marks == graph.marks


def test_what_each_part_reads(whole):
    unet, graph, values, _ = whole
    parts = partition(graph, tensors_of(unet))
    weights = tensors_of(unet)
    text = {"encoder_hidden_states"} | {n for n in values if n.startswith("added_cond_kwargs")}
    assert set(parts.text.reads) - weights.keys() == text
    fed = {name for name in parts.step.reads if name.startswith("text:")}
    assert set(parts.step.reads) - weights.keys() - fed == {"timestep"}
    assert bool(fed) == parts.step_reads_text == (unet.config.addition_embed_type is not None)
    given = set(parts.text.gives) - fed | set(parts.step.gives)
    assert set(parts.body.reads) - weights.keys() == given | {"sample"}
    assert all(len(value) == 4 for value in parts.text(values).values())


def test_keys_and_values_are_found(whole):
    unet, graph, _, _ = whole
    parts = partition(graph, tensors_of(unet))
    crossing = [m.name for m in graph.marks if m.kind in ("key", "value") and ".attn2." in m.name]
    assert list(parts.keys.values()) == crossing


def test_tables(whole):
    """Rows of the text and step parts hold other texts and calls than the body's rows."""
    unet, graph, values, _ = whole
    parts = partition(graph, tensors_of(unet))
    body = with_tables(parts)
    # body row i is at call `calls[i]` with text `texts[i]`
    texts, calls = torch.tensor([2, 0, 3, 2]), torch.tensor([1, 1, 1, 1])
    timesteps = torch.tensor([7, 501, 30, 999])
    inputs = {n: v for n, v in values.items() if n not in tensors_of(unet) and n != "timestep"}
    plain = values | {n: v[texts] for n, v in inputs.items() if n != "sample"}
    plain["timestep"] = timesteps[calls]
    expected = graph(plain)["prediction"]

    tables = parts.text(values)
    pooled = {n: v[texts] for n, v in tables.items()} if parts.step_reads_text else {}
    steps = parts.step(values | tables | pooled | {"timestep": plain["timestep"]})
    if parts.step_reads_text:
        step_row = torch.arange(4)
    else:
        steps = parts.step(values | {"timestep": timesteps})
        step_row = calls
    slots = {name: texts for name in body.reads if name.startswith("slot:")}
    layers = {mark.rpartition(".")[0] for mark in parts.keys.values()}
    assert 2 * len(layers) == len(parts.keys)
    assert slots.keys() >= {f"slot:{layer}" for layer in layers}
    got = body(values | tables | steps | slots | {"step_row": step_row})["prediction"]
    assert torch.equal(got, expected)
    slots[f"slot:{min(layers)}"] = texts.flip(0)  # one layer reads other texts
    swapped = body(values | tables | steps | slots | {"step_row": step_row})["prediction"]
    assert not torch.equal(swapped, expected)


def test_row_order_is_the_first_use(captured, unets):
    """A gather stands right before its first reader: one layer's text at a time is in memory."""
    body = with_tables(partition(captured("sd15"), tensors_of(unets("sd15"))))
    gathers = [
        n for n in body.module.graph.nodes if n.target is torch.ops.aten.index_select.default
    ]
    assert len(gathers) == 32 + 22
    for node in gathers:
        following = node.next
        while following in gathers:
            following = following.next
        assert following in node.users or following.target is torch.ops.fasttrace.mark.default


@pytest.mark.parametrize(
    ("name", "before", "text", "step", "body"),
    [("sd15", 1462, 32, 105, 1166), ("sd21", 1462, 32, 105, 1166), ("sdxl", 4371, 159, 86, 3596)],
)
def test_counts_of_the_full_size(name, before, text, step, body, make_inputs):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(ARCHITECTURES[name]["unet"])
    graph = capture(unet, make_inputs(unet, rows=2, device="meta"), torch.device("cpu"))
    parts = partition(graph, tensors_of(unet))
    assert graph.size == before
    assert (parts.text.size, parts.step.size, parts.body.size) == (text, step, body)


def test_toy():
    """Its attention reads text alone, so all of it leaves the body but the mark."""
    toy = ToyDenoiser()
    inputs = {
        "sample": torch.ones(2, 1, 1, 1),
        "timestep": torch.zeros(2),
        "encoder_hidden_states": torch.tensor([0.0, 1.0]).reshape(2, 1, 1),
    }
    parts = partition(capture(toy, inputs), tensors_of(toy))
    (given,) = parts.text(inputs).values()
    assert given.flatten().tolist() == [0, 3]
    assert parts.step.size == 0
    assert "encoder_hidden_states" not in parts.body.reads
    values = inputs | parts.text(inputs)
    assert parts.body(values)["prediction"].flatten().tolist() == [6, 12]


def test_unknown_inputs_stay_with_the_latents():
    class More(ToyDenoiser):
        def forward(self, sample, timestep, encoder_hidden_states, extra):
            return super().forward(sample, timestep, encoder_hidden_states * extra)

    inputs = {
        "sample": torch.ones(2, 1, 1, 1),
        "timestep": torch.zeros(2),
        "encoder_hidden_states": torch.ones(2, 1, 1),
        "extra": torch.tensor([2.0, 5.0]).reshape(2, 1, 1),
    }
    parts = partition(capture(More(), inputs), ())
    assert parts.text.size == 0
    assert "extra" in parts.body.reads
    assert parts.body(inputs)["prediction"].flatten().tolist() == [18, 36]
