"""Graphs for any number of rows, rows that join on the way, graphs without superfluous work."""

import pytest
import torch

from fasttrace.engine.compiled import compile_denoiser
from fasttrace.engine.flops import count
from fasttrace.engine.graph.anyrows import AnyRows, between
from fasttrace.engine.graph.capture import capture, flatten, tensors_of
from fasttrace.engine.graph.patches import Point, insert_patches, make_tables
from fasttrace.engine.graph.prune import prune
from fasttrace.engine.graph.stairs import stairs
from fasttrace.errors import ModelError

UNETS = ("tiny sd", "tiny sdxl", "sd15", "sd21", "sdxl")
ROWS = 7


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=UNETS)
def setup(request, unets, make_inputs):
    """A UNet, its compiled form, and everything its body reads at `ROWS` rows."""
    unet = unets(request.param)
    with torch.no_grad():
        denoiser = compile_denoiser(unet, lambda rows: make_inputs(unet, rows))
        values = tensors_of(unet) | flatten(make_inputs(unet, ROWS))
        values |= denoiser.text.at(ROWS)(values)
        values |= denoiser.step.at(ROWS)(values)
    rows = torch.arange(ROWS)
    values |= {name: rows for name in denoiser.body.small.reads if name.startswith("slot:")}
    return unet, denoiser, values | {"step_row": rows}


def test_any_rows_equal_a_trace_at_so_many(unets, make_inputs):
    for name in ("tiny sd", "sd21", "sdxl"):
        unet = unets(name)
        family = AnyRows.of(lambda rows, u=unet: capture(u, make_inputs(u, rows)))
        for rows in (1, ROWS):
            inputs = make_inputs(unet, rows)
            values = tensors_of(unet) | flatten(inputs)
            traced = capture(unet, inputs)
            graph = family.at(rows)
            assert torch.equal(graph(values)["prediction"], unet(**inputs)[0])
            ours, theirs = graph.module.graph.nodes, traced.module.graph.nodes
            for own, other in zip(ours, theirs, strict=True):
                shapes = [getattr(n.meta.get("val"), "shape", None) for n in (own, other)]
                assert shapes[0] == shapes[1], own


def test_numbers_of_both_captures():
    assert between(3, 5, 10) == 10
    assert between(24, 40, 10) == 80
    assert between(64, 64, 10) == 64
    assert between(True, True, 10) is True
    with pytest.raises(ModelError, match="don't grow"):
        between(3, 4, 10)


def test_other_ops_for_other_rows_are_an_error(unets, make_inputs):
    class Odd(torch.nn.Module):
        def forward(self, sample):
            return (sample * 2 if sample.shape[0] == 3 else sample + 1,)

    with pytest.raises(ModelError, match="other ops for another number of rows"):
        AnyRows.of(lambda rows: capture(Odd(), {"sample": torch.zeros(rows, 4)}))


def test_joining_rows_are_patched_rows(setup):
    """Two lanes at one site, one at a later one, and a copy; against whole rows with patches."""
    _, denoiser, values = setup
    names = [m.name for m in denoiser.marks.values() if m.kind == "output"]
    early, late = names[2], names[-3]
    graph = stairs(denoiser.body, 3, {early: 2, late: 2})
    # rows 0 (source) and 1 (parent), 2 is its own; 3, 4 join early (4 unpatched), 5, 6 late
    parents = torch.tensor([0, 1, 2, 1, 1, 1, 1])
    given = dict(values)
    for name in values:
        if name.startswith("slot:") or name == "step_row":
            given[name] = parents
    given["sample"] = values["sample"][:3]
    index = {early: [-1, -1, -1, 0, -1, -1, -1], late: [-1, -1, -1, -1, -1, 0, -1]}
    for site, rows in index.items():
        given[f"{site}/index"] = torch.tensor(rows)
        given[f"{site}/strength"] = torch.ones(ROWS)
        given[f"{site}/parents"] = torch.tensor([1, 1])
    found = graph(given)["prediction"]

    points = [Point(site, source="rows") for site in (early, late)]
    marks = list(denoiser.marks.values())
    tables = make_tables(
        points, marks, ROWS, sources=0, dtype=torch.float32, device=torch.device("cpu")
    )
    for site, rows in index.items():
        tables[f"{site}/index"].copy_(torch.tensor(rows))
        tables[f"{site}/strength"].fill_(1.0)
    whole = insert_patches(denoiser.body.at(ROWS), points)
    plain = {n: v for n, v in values.items() if n not in given} | given
    expected = whole({**plain, **tables, "sample": values["sample"][parents]})["prediction"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[4], found[1], rtol=0, atol=1e-5)  # a copy
    assert not torch.allclose(found[3], found[1], atol=1e-3)

    cost = denoiser.cost
    assert count(graph) == 3 * cost.whole + 2 * cost.after[early] + 2 * cost.after[late]


def test_a_pruned_graph_is_the_patched_one(setup):
    _, denoiser, values = setup
    sites = [m.name for m in denoiser.marks.values() if m.kind == "output"]
    for site in sites[:: len(sites) // 8]:
        shape = denoiser.marks[site].shape
        source = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
        index = torch.tensor([4, 0, 0, 3, 1, 2, 4])
        body = denoiser.body.at(ROWS)
        pruned = prune(body, site)
        found = pruned({**values, f"{site}/source": source, f"{site}/index": index})
        patched = insert_patches(body, [Point(site)])
        tables = {
            f"{site}/source": source,
            f"{site}/index": index,
            f"{site}/strength": torch.ones(ROWS),
        }
        assert torch.equal(found["prediction"], patched({**values, **tables})["prediction"])
        cost = denoiser.cost
        assert count(pruned) == ROWS * (cost.whole - cost.dead[site])


def test_costs_add_up(setup):
    _, denoiser, _ = setup
    cost = denoiser.cost
    assert count(denoiser.body.at(ROWS)) == ROWS * cost.whole
    assert 0 < cost.apart < cost.whole
    for name in cost.after:
        assert 0 <= cost.dead[name] < cost.whole
        assert 0 <= cost.after[name] < cost.whole
        assert cost.dead[name] + cost.after[name] <= cost.whole
