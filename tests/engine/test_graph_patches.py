"""Patch tables in a traced graph against hooks on the eager module, in one batch shape."""

import copy
from contextlib import contextmanager

import pytest
import torch

from fasttrace.adapters.hooks import rewriting, write_rows
from fasttrace.adapters.unet import site_modules
from fasttrace.engine.graph.capture import capture, flatten, tensors_of
from fasttrace.engine.graph.marks import Mark
from fasttrace.engine.graph.partition import partition, with_tables
from fasttrace.engine.graph.patches import (
    Point,
    insert_patches,
    insert_records,
    make_tables,
    mask_shape,
)
from fasttrace.errors import UsageError

UNETS = ("tiny sd", "tiny sdxl", "sd15")
ROWS = 4
# Unconditional rows first, as in the engines.
BRANCHES = {"uncond": slice(0, 2), "cond": slice(2, 4), "both": slice(0, 4)}
CPU = {"dtype": torch.float32, "device": torch.device("cpu")}


class Bench:
    """A UNet with a clean and a corrupt call, and its body with a patch op everywhere."""

    def __init__(self, unet, graph, make_inputs, options=None):
        self.unet = unet
        self.inputs = make_inputs(unet)
        self.clean_inputs = make_inputs(unet, seed=1)
        self.parts = partition(graph, tensors_of(unet))
        self.body = with_tables(self.parts)
        self.marks = {mark.name: mark for mark in graph.marks}
        options = options or {}
        self.points = [options.get(name, Point(name)) for name in self.marks]
        self.patched = insert_patches(self.body, self.points)
        self.tables = self.fresh_tables()
        self.corrupt, self.clean = self.eager(self.inputs), self.eager(self.clean_inputs)

    def fresh_tables(self):
        marks = list(self.marks.values())
        return make_tables(self.points, marks, ROWS, sources=ROWS, **CPU)

    def values(self, inputs):
        values = tensors_of(self.unet) | flatten(inputs)
        values |= self.parts.text(values)
        values |= self.parts.step(values)
        rows = torch.arange(ROWS)
        slots = {name: rows for name in self.patched.reads if name.startswith("slot:")}
        return values | slots | {"step_row": rows}

    def run(self, tables=None, graph=None):
        values = self.values(self.inputs) | (self.tables if tables is None else tables)
        return (graph or self.patched)(values)["prediction"]

    def eager(self, inputs):
        return self.unet(**inputs)[0]

    def recorded(self, site, inputs=None):
        """The tensor at a mark of any kind in an eager call, by hooks written for this test."""
        seen = []
        with rewritten(self.unet, site, seen.append):
            self.eager(self.clean_inputs if inputs is None else inputs)
        (tensor,) = seen
        return tensor.clone()

    def hooked(self, site, new):
        with rewritten(self.unet, site, new):
            return self.eager(self.inputs)

    def patch(self, site, rows, source, strength=1.0):
        """Rows take the first rows of a source."""
        self.tables[f"{site}/source"][: len(source)] = source
        self.tables[f"{site}/index"][rows] = torch.arange(len(source))
        self.tables[f"{site}/strength"][rows] = strength


@contextmanager
def rewritten(unet, site, new):
    """The tensor at a mark becomes `new(tensor)` wherever that is not None."""
    modules = site_modules(unet)
    owner, _, tail = site.rpartition(".")

    def after(module):
        return rewriting({site: module}, lambda _, out: new(out))

    if site in modules:
        with after(modules[site]):
            yield
    elif tail in ("key", "value"):
        with after(modules[owner].to_k if tail == "key" else modules[owner].to_v):
            yield
    elif tail == "hidden":
        with after(modules[owner].net[0]):
            yield
    else:

        def before(_, args, kwargs):
            if tail == "heads":
                found = new(args[0])
                return None if found is None else ((found,), kwargs)
            taken = list(kwargs["res_hidden_states_tuple"])
            found = new(taken[int(tail)])
            if found is None:
                return None
            taken[int(tail)] = found
            return args, kwargs | {"res_hidden_states_tuple": tuple(taken)}

        path = owner.removeprefix("unet.").removesuffix(".skips")
        module = modules[owner].to_out[0] if tail == "heads" else unet.get_submodule(path)
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=UNETS)
def bench(request, unets, captured, make_inputs):
    with torch.no_grad():
        return Bench(unets(request.param), captured(request.param), make_inputs)


@pytest.fixture(autouse=True)
def empty_tables(request):
    if "bench" in request.fixturenames:
        bench = request.getfixturevalue("bench")
        bench.tables = bench.fresh_tables()


def test_empty_tables_change_nothing(bench):
    assert torch.equal(bench.run(), bench.corrupt)
    assert torch.equal(bench.run(graph=insert_patches(bench.body, [])), bench.corrupt)


def test_no_patch_reads_its_source(bench):
    for name in bench.marks:
        bench.tables[f"{name}/source"].fill_(float("nan"))
        bench.tables[f"{name}/index"][:2] = 0  # with strength 0
    assert torch.equal(bench.run(), bench.corrupt)


def test_own_activations_change_nothing(bench):
    for name in bench.marks:
        bench.patch(name, slice(0, ROWS), bench.recorded(name, bench.inputs))
    assert torch.equal(bench.run(), bench.corrupt)


def test_every_place_equals_its_hook(bench):
    """Layer selectors, every kind of mark, each branch in turn; one graph, rewritten numbers."""
    moved = 0
    some = list(bench.marks)[:: 1 if len(bench.marks) < 100 else 3]
    for i, name in enumerate(some):
        rows = list(BRANCHES.values())[i % 3]
        source = bench.recorded(name)[rows]
        bench.tables = bench.fresh_tables()
        bench.patch(name, rows, source)
        expected = bench.hooked(name, lambda out, s=source, r=rows: write_rows(out, s, rows=r))
        assert torch.equal(bench.run(), expected), name
        moved += not torch.equal(expected, bench.corrupt)
    # where the latents are one place large, self-attention weighs its only key with 1
    idle = [n for n in some if n.endswith(".key") and bench.marks[n].shape[0] == 1]
    assert moved == len(some) - len(idle)


@pytest.mark.parametrize("branch", BRANCHES)
def test_strengths_and_several_places(bench, branch):
    """A lane with two places, and half strength: what the reference engine's hooks make."""
    rows = BRANCHES[branch]
    names = [m.name for m in bench.marks.values() if m.kind == "output"][1::5][:2]
    modules = site_modules(bench.unet)
    sources = {name: bench.recorded(name)[rows] for name in names}
    for name in names:
        bench.patch(name, rows, sources[name], 0.5)

    def new(name, out):
        return write_rows(out, sources[name], rows=rows, strength=0.5)

    with rewriting({name: modules[name] for name in names}, new):
        expected = bench.eager(bench.inputs)
    got = bench.run()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(got, bench.corrupt, rtol=0, atol=1e-4)


def test_unpatched_rows_keep_their_bits(bench):
    for name in bench.marks:
        bench.patch(name, slice(3, 4), bench.recorded(name)[3:])
    got = bench.run()
    assert torch.equal(got[:3], bench.corrupt[:3])
    assert not torch.equal(got[3], bench.corrupt[3])


def test_the_text_table_is_not_written(bench):
    values = bench.values(bench.inputs)
    before = {n: v.clone() for n, v in values.items()}
    for mark in bench.marks.values():
        if mark.kind in ("key", "value"):
            bench.patch(mark.name, slice(0, ROWS), bench.recorded(mark.name))
    bench.patched(values | bench.tables)
    assert all(torch.equal(values[n], before[n]) for n in values)


MASKS = {"heads": "channels", "hidden": "channels", "key": "tokens", "value": "tokens"}


class TestSelectors:
    """Heads, tokens, channels, places: masks at the same op."""

    @pytest.fixture
    def bench(self, unets, captured, make_inputs):
        options = {}
        for mark in captured("sd15").marks:
            image = "places" if mark.kind == "skip" else "channels"
            kind = MASKS.get(mark.kind, image if len(mark.shape) == 3 else "elements")
            options[mark.name] = Point(mark.name, kind)
        return Bench(unets("sd15"), captured("sd15"), make_inputs, options)

    def test_against_hooks(self, bench):
        rows = BRANCHES["cond"]
        kinds = set()
        for mark in list(bench.marks.values())[::3]:
            bench.tables = bench.fresh_tables()
            source = bench.recorded(mark.name)[rows]
            mask = self.fill(bench.tables[f"{mark.name}/mask"], mark)
            bench.patch(mark.name, rows, source)
            full = mask[rows].reshape(2, *mask.shape[1:], *[1] * (source.dim() - mask.dim()))

            def new(out, source=source, full=full):
                result = out.clone()
                result[rows] = torch.where(full.bool(), source, out[rows])
                return result

            assert torch.equal(bench.run(), bench.hooked(mark.name, new)), mark.name
            kinds.add((mark.kind, len(mark.shape)))
        assert len(kinds) == 7

    def fill(self, mask, mark: Mark):
        mask.zero_()
        if mark.kind == "heads":
            width = mark.shape[-1] // mark.heads
            mask[:, :, width : 2 * width] = 1  # the second head
        else:
            mask.flatten(1)[:, 1::2] = 1
        return mask

    def test_masks_by_shape(self):
        stream, image = Mark("a", "output", (9, 8)), Mark("b", "output", (8, 3, 3))
        assert mask_shape(stream, "tokens", 2) == (2, 9)
        assert mask_shape(stream, "channels", 2) == (2, 1, 8)
        assert mask_shape(stream, "elements", 2) == (2, 9, 8)
        assert mask_shape(image, "channels", 2) == (2, 8)
        assert mask_shape(image, "places", 2) == (2, 1, 3, 3)
        with pytest.raises(UsageError, match="no mask over tokens; expected elements, channels"):
            mask_shape(image, "tokens", 2)


class TestRowsAsSource:
    def test_a_leader_row(self, unets, captured, make_inputs):
        """The last row is the clean run and the third reads it at one site, in lock-step."""
        options = {m.name: Point(m.name, source="rows") for m in captured("tiny sd").marks}
        bench = Bench(unets("tiny sd"), captured("tiny sd"), make_inputs, options)
        leader, lane = 3, 2
        rows = slice(lane, leader)
        for name in bench.marks:
            bench.tables = bench.fresh_tables()
            bench.tables[f"{name}/index"][lane] = leader
            bench.tables[f"{name}/strength"][lane] = 1
            source = bench.recorded(name, bench.inputs)[leader:]
            expected = bench.hooked(name, lambda out, s=source: write_rows(out, s, rows=rows))
            assert torch.equal(bench.run(), expected), name


class TestRecords:
    def test_rows_are_copied_before_the_patch(self, bench):
        names = list(bench.marks)
        recording = insert_patches(insert_records(bench.body, names), bench.points)
        rows = torch.tensor([3, 0])
        wanted = {name: bench.recorded(name, bench.inputs)[rows] for name in names}
        tables = {f"{name}/rows": rows for name in names}
        records = {f"{n}/record": torch.full_like(w, torch.nan) for n, w in wanted.items()}
        assert torch.equal(bench.run(bench.tables | tables | records, recording), bench.corrupt)
        for name in names:
            assert torch.equal(records[f"{name}/record"], wanted[name]), name
        first = names[0]
        bench.patch(first, slice(0, ROWS), bench.recorded(first))
        patched = bench.run(bench.tables | tables | records, recording)
        assert torch.equal(patched, bench.run())
        assert torch.equal(records[f"{first}/record"], wanted[first])


class TestInPlace:
    def ops(self, bench):
        names = [str(n.target) for n in bench.patched.module.graph.nodes]
        in_place = names.count("fasttrace.patch_rows_.default")
        return in_place, names.count("fasttrace.patch_rows.default")

    def test_where_nothing_else_sees_it(self, bench):
        in_place, copies = self.ops(bench)
        assert in_place + copies == len(bench.marks)
        assert copies == 0

    @pytest.mark.parametrize("view", [True, False])
    def test_a_tensor_that_is_read_later_is_copied(self, view):
        """The skip of this denoiser is read before the stream: a write would reach both."""

        class Early(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.up_blocks = torch.nn.ModuleList([Up()])

            def forward(self, sample, timestep):
                h = sample * 2
                skip = h.reshape(2, 3) if view else h
                return (self.up_blocks[0](res_hidden_states_tuple=(skip,)) + h,)

        class Up(torch.nn.Module):
            def forward(self, res_hidden_states_tuple):
                return res_hidden_states_tuple[0] * 10

        values = {"sample": torch.ones(2, 3), "timestep": torch.zeros(2)}
        graph = insert_patches(capture(Early(), values), [Point("unet.up_blocks.0.skips.0")])
        names = [str(n.target) for n in graph.module.graph.nodes]
        assert "fasttrace.patch_rows.default" in names
        tables = {
            "unet.up_blocks.0.skips.0/index": torch.tensor([-1, 0]),
            "unet.up_blocks.0.skips.0/strength": torch.ones(2),
            "unet.up_blocks.0.skips.0/source": torch.zeros(1, 3),
        }
        got = graph(values | tables)["prediction"]
        assert got.tolist() == [[22.0] * 3, [2.0] * 3]


def doubled(inputs):
    return {
        n: t.double() if n in ("sample", "encoder_hidden_states") else t for n, t in inputs.items()
    }


class TestGradients:
    def test_strengths_against_finite_differences(self, unets, make_inputs):
        """In float64, at strength 0 (attribution patching), between 0 and 1, and at 1."""
        unet = copy.deepcopy(unets("tiny sd")).double()
        weights = tensors_of(unet)
        inputs, clean = (doubled(make_inputs(unet, seed=seed)) for seed in (0, 1))
        graph = capture(unet, inputs)
        names = [m.name for m in graph.marks][::4]
        points = [Point(name) for name in names]
        screen = insert_patches(graph, points, differentiable=True)
        assert not any("patch_rows_." in str(n.target) for n in screen.module.graph.nodes)
        record = insert_patches(insert_records(graph, names), [])
        marks = {m.name: m for m in graph.marks}
        rows = torch.arange(ROWS)
        wide = {"dtype": torch.float64, "device": torch.device("cpu")}
        tables = make_tables(points, list(marks.values()), ROWS, sources=ROWS, **wide)
        records = {f"{n}/record": tables[f"{n}/source"] for n in names}
        record(weights | flatten(clean) | records | {f"{n}/rows": rows for n in names})
        values = flatten(inputs)
        for level in (0.0, 0.3, 1.0):
            strengths = {n: torch.full((ROWS,), level, dtype=torch.float64) for n in names}

            def score(given):
                read = {f"{n}/strength": s for n, s in given.items()}
                index = {f"{n}/index": rows for n in names}
                out = screen(weights | values | tables | index | read)["prediction"]
                return out.square().sum()

            with torch.enable_grad():
                for strength in strengths.values():
                    strength.requires_grad_()
                found = torch.autograd.grad(score(strengths), list(strengths.values()))
            for name, gradient in zip(names, found, strict=True):
                step = torch.zeros(ROWS, dtype=torch.float64)
                step[1] = 1e-5
                ends = [score(strengths | {name: strengths[name] + s}) for s in (step, -step)]
                slope = (ends[0] - ends[1]) / 2e-5
                torch.testing.assert_close(gradient[1], slope, rtol=1e-5, atol=1e-7)


class TestErrors:
    def test_unknown_place(self, captured):
        with pytest.raises(UsageError, match=r"no place called unet\.nowhere"):
            insert_patches(captured("tiny sd"), [Point("unet.nowhere")])

    def test_twice(self, captured):
        name = captured("tiny sd").marks[0].name
        with pytest.raises(UsageError, match="patched twice"):
            insert_patches(captured("tiny sd"), [Point(name), Point(name, "channels")])


def test_a_call_reads_no_value(bench):
    """It runs on tensors without values, so a captured CUDA graph could replay it."""
    values = bench.values(bench.inputs) | bench.tables
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = {n: mode.from_tensor(t) for n, t in values.items()}
        assert bench.patched(fakes)["prediction"].shape == bench.corrupt.shape
