"""`fuse_attention`: the same prediction, with keys read out of the text table by slot."""

import pytest
import torch
from torch import fx, nn

from fasttrace.engine.compiled import compile_denoiser
from fasttrace.engine.flops import count
from fasttrace.engine.graph.capture import Graph, flatten, make_graph, tensors_of
from fasttrace.engine.graph.fuse import ATTENTION, fuse_attention
from fasttrace.engine.graph.patches import Point, insert_patches, make_tables
from fasttrace.engine.graph.stairs import stairs

FUSED = torch.ops.fasttrace.patch_attention.default
GATHER = torch.ops.aten.index_select.default
UNETS = ("tiny sd", "tiny sdxl", "sd15", "sd21", "sdxl")
ROWS, SLOTS = 4, 6


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=UNETS)
def setup(request, unets, make_inputs):
    """A compiled UNet and what its body reads: six texts, of which rows read four, one twice."""
    unet = unets(request.param)
    with torch.no_grad():
        denoiser = compile_denoiser(unet, lambda rows: make_inputs(unet, rows))
        values = tensors_of(unet) | flatten(make_inputs(unet, SLOTS))
        values |= denoiser.text.at(SLOTS)(values)
        values |= denoiser.step.at(SLOTS)(values)
    values["sample"] = values["sample"][:ROWS]
    slots = torch.tensor([5, 0, 3, 5])
    values |= {name: slots for name in denoiser.body.small.reads if name.startswith("slot:")}
    return denoiser, values | {"step_row": slots}


def targets(graph: Graph):
    return [node.target for node in graph.module.graph.nodes]


def gathers_of_text(graph: Graph):
    places = [node for node in graph.module.graph.nodes if node.op == "placeholder"]
    names = dict(zip(places, graph.reads, strict=True))
    return [
        node
        for node in graph.module.graph.nodes
        if node.target is GATHER and names.get(node.args[0], "").startswith("text:")
    ]


def test_every_attention_is_fused_and_no_key_is_gathered(setup):
    denoiser, values = setup
    plain = insert_patches(denoiser.body.at(ROWS), [])
    fused = fuse_attention(plain)
    attentions = targets(plain).count(ATTENTION)
    assert attentions > 4
    assert targets(fused).count(FUSED) == attentions
    assert ATTENTION not in targets(fused)
    assert len(gathers_of_text(plain)) == len(denoiser.keys)
    assert not gathers_of_text(fused)
    assert count(fused) == count(plain)
    want, got = plain(values)["prediction"], fused(values)["prediction"]
    assert torch.allclose(got, want, rtol=0, atol=1e-5 * want.square().mean().sqrt())
    other = fused(values | {name: 0 * t for name, t in values.items() if name[:5] == "slot:"})
    assert not torch.allclose(other["prediction"], want, atol=1e-5)


def test_patches_stay_and_keys_that_carry_one_are_gathered(setup):
    denoiser, values = setup
    sites = [m.name for m in denoiser.marks.values() if m.kind == "output"]
    key = next(iter(denoiser.keys.values()))
    points = [Point(name, source="rows") for name in (*sites, key)]
    tables = make_tables(
        points,
        list(denoiser.marks.values()),
        ROWS,
        sources=0,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    tables["index"][:, 1], tables["strength"][:, 1] = 0, 1.0
    plain = insert_patches(denoiser.body.at(ROWS), points)
    fused = fuse_attention(plain)
    assert len(gathers_of_text(fused)) == 2  # of that layer: its keys, and its values with them
    want, got = (g(values | tables)["prediction"] for g in (plain, fused))
    assert torch.allclose(got, want, rtol=0, atol=1e-5 * want.square().mean().sqrt())
    unpatched = insert_patches(denoiser.body.at(ROWS), [])(values)["prediction"]
    assert not torch.allclose(got[1], unpatched[1], atol=1e-4)
    assert torch.allclose(got[2:], unpatched[2:], rtol=0, atol=1e-5)


def test_the_shared_first_call(setup):
    denoiser, values = setup
    sites = [m.name for m in denoiser.marks.values() if m.kind == "output"][:3]
    plain = stairs(denoiser.body, 2, dict.fromkeys(sites, 1))
    fused = fuse_attention(plain)
    assert FUSED in targets(fused)
    assert ATTENTION not in targets(fused)
    rows = 2 + len(sites)
    slots = torch.tensor([5, 0, 3, 5, 1])
    given = values | {name: slots for name in plain.reads if name.startswith("slot:")}
    given |= {"step_row": slots, "sample": values["sample"][:2]}
    for i, site in enumerate(sites):
        given[f"{site}/index"] = torch.full((rows,), -1)
        given[f"{site}/index"][2 + i] = 0
        given[f"{site}/strength"] = torch.ones(rows)
        given[f"{site}/parents"] = torch.tensor([1])
    want, got = plain(given)["prediction"], fused(given)["prediction"]
    assert torch.allclose(got, want, rtol=0, atol=1e-5 * want.square().mean().sqrt())


class Attends(nn.Module):
    """One attention as torch has it, with whatever a model may ask of it."""

    def __init__(self, head: int = 8, **options: object) -> None:
        super().__init__()
        self.head, self.options = head, options

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor]:
        heads = sample.unflatten(-1, (2, self.head)).transpose(1, 2)
        attend = nn.functional.scaled_dot_product_attention
        options = dict(self.options)
        if "attn_mask" in options:
            options["attn_mask"] = sample.new_zeros(options["attn_mask"])
        return (attend(heads, heads, heads, **options).transpose(1, 2).flatten(2),)


@pytest.mark.parametrize(
    ("head", "options", "fuses"),
    [
        (8, {}, True),
        (256, {"scale": 0.5}, True),
        (257, {}, False),
        (8, {"is_causal": True}, False),
        (8, {"attn_mask": (3, 3)}, False),
    ],
)
def test_only_what_the_kernel_computes(head, options, fuses):
    sample = torch.randn(2, 3, 2 * head, generator=torch.Generator().manual_seed(0))
    module = Attends(head, **options)
    traced = fx.experimental.proxy_tensor.make_fx(module, pre_dispatch=True)(sample)
    graph = make_graph(traced.graph, ("sample",), ("prediction",))
    assert ATTENTION in targets(graph)
    fused = fuse_attention(graph)
    assert (FUSED in targets(fused)) == fuses
    got = fused({"sample": sample})["prediction"]
    assert torch.allclose(got, module(sample)[0], atol=1e-5)
