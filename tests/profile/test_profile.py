"""Profiles of tiny pipelines: same results, whole times, every operator somewhere."""

import ast
import operator
import re
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

from fasttrace import Tracer
from fasttrace.engine.graph.marks import MARK
from fasttrace.engine.step import Step
from fasttrace.errors import UsageError
from fasttrace.profile import ceilings
from fasttrace.profile.clock import Clock
from fasttrace.profile.collect import ProfiledTracer
from fasttrace.profile.measure import HOST, last_word
from fasttrace.profile.recorder import Recorder
from fasttrace.profile.sites import labels_of, owners
from fasttrace.testing import runs_of_pairs
from fasttrace.testing.tiny import make_scheduler
from fasttrace.types import Probe

ROOT = Path(__file__).parents[2]
PROMPT = "a photo of a dog in the house"
LAST = "unet.up_blocks.1.resnets.1"
# Everything a run can be made of: leader lanes, a cache, pruned graphs, another scheduler's steps,
# texts of a lane's own, two encoders, a prior.
RUNS = {
    "leader": ("sd", {"clean": "leader"}, {}, ""),
    "cache, pruned": ("sd", {"clean": "cache", "lanes": 8}, {"seeds": 6, "sites": [LAST]}, ""),
    "staged": ("sd", {"clean": "cache", "staged": True}, {"sites": ["attn1"]}, ""),
    "not linear": ("sd", {}, {"sites": ["attn2"]}, "DDPM"),
    "text encoder": ("sd", {}, {"component": "text_encoder", "tokens": ["last subject"]}, ""),
    "two encoders": ("sdxl", {}, {}, ""),
    "prior": ("kandinsky22", {}, {}, ""),
}


@pytest.fixture(scope="module")
def tracer_of(loaded):
    """Tracers of one pipeline share its traced denoiser, which takes longest to make."""
    first: dict[str, Tracer] = {}

    def make(family, **options):
        found = Tracer(loaded(family), **options)
        like = first.setdefault(family, found).engine.workshop
        found.engine.workshop._denoisers = like._denoisers
        found.engine.workshop._structure = like._structure
        return found

    return make


@pytest.mark.parametrize("name", RUNS)
def test_latents_are_those_without_the_clock(name, loaded, tracer_of, monkeypatch):
    family, options, asked, scheduler = RUNS[name]
    asked = {"seeds": 1, **asked}
    if scheduler:
        monkeypatch.setattr(loaded(family), "scheduler", make_scheduler(scheduler))
    tracer = tracer_of(family, **options)
    plan = tracer.plan(Probe(PROMPT, "dog"), steps=2, metric="latent_recovery", **asked)
    recorder = Recorder(Clock())
    profiled = ProfiledTracer(tracer, recorder)
    pairs = {}
    for one in (tracer, profiled):
        seeds = sorted({row.seed for row in plan.rows})
        with one._inside():
            pairs[one] = [
                one._pair(plan, plan.probes[0], [row for row in plan.rows if row.seed == seed])
                for seed in seeds
            ]
    expected = runs_of_pairs(tracer.engine, pairs[tracer])
    found = runs_of_pairs(profiled.engine, pairs[profiled])
    assert found.keys() == expected.keys()
    assert len(found) > 3
    for key in expected:
        assert torch.equal(found[key], expected[key]), key
    recorder.settle()  # raises where readings and labels don't match
    assert recorder.steps
    assert sum(total.flops for total in recorder.totals.values()) == profiled.engine.executed
    if name == "cache, pruned":
        assert any("pruned" in layout.name for layout in recorder.layouts)


def test_the_plain_engine_is_untouched(traced, profiled):
    """After a profile the engine that was profiled runs its own graphs by its own methods."""
    tracer, _ = traced
    steps = [step for step in tracer.engine.workshop.steps() if isinstance(step, Step)]
    assert steps
    for step in steps:
        assert not {"run", "begin"} & vars(step).keys()
        for part in (part for parts in step.parts.values() for part in parts):
            assert part.run is part.graph.module
            nodes = [node for node in part.run.graph.nodes if node.op == "call_function"]
            others = {n.target for n in nodes if not isinstance(n.target, torch._ops.OpOverload)}
            assert others <= {operator.getitem}


def test_nobody_imports_the_profiler_but_commands():
    taken = []
    for path in (ROOT / "fasttrace").rglob("*.py"):
        inside = path.relative_to(ROOT / "fasttrace")
        if inside.parts[0] in ("profile", "cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            taken += [(path, name) for name in names if name.startswith("fasttrace.profile")]
    assert taken == []


# ---- the numbers


def test_shares_are_of_the_whole(profiled):
    assert sum(line.share for line in profiled.kinds) == pytest.approx(1)
    assert sum(line.seconds for line in profiled.kinds) == pytest.approx(profiled.total)
    assert all(line.share >= 0 for line in profiled.kinds if line.name != HOST)
    assert all(line.seconds > 0 for line in profiled.sites)


def test_kinds_sites_and_operators_agree(profiled):
    """A kind's line is the sum of its sites' lines; operators are what kinds are made of."""
    for kind in ("resnet", "attn1", "attn2", "ff"):
        line = next(line for line in profiled.kinds if line.name == kind)
        own = [site for site in profiled.sites if site.name == kind]
        assert own
        assert sum(site.seconds for site in own) == pytest.approx(line.seconds)
        assert sum(site.flops for site in own) == line.flops
        assert sum(site.bytes for site in own) == line.bytes
    ops = sum(line.seconds for line in profiled.ops)
    known = {"resnet", "attn1", "attn2", "ff", "other", "joining lanes"}
    assert ops == pytest.approx(sum(x.seconds for x in profiled.kinds if x.name in known))


def test_work_is_what_the_plan_foretold(traced, profiled):
    tracer, plan = traced
    work = profiled.work
    foretold = tracer.forecast(plan, measure=False)
    assert work.executed == work.predicted == foretold.flops
    assert work.sharing == foretold.useful_flops / foretold.flops
    assert profiled.costs.same
    assert profiled.lanes == plan.lanes
    assert profiled.lanes_a_second == pytest.approx(plan.lanes / profiled.seconds)


def test_every_site_was_run(traced, profiled):
    tracer, _ = traced
    assert {line.site for line in profiled.sites} == {site.name for site in tracer.sites()}
    assert {line.calls for line in profiled.sites} == {profiled.steps}


def test_memory_and_ceilings(profiled):
    assert len(profiled.memory) == profiled.steps
    assert all(size > 1 << 20 for _, size in profiled.memory)
    assert max(profiled.alive.bytes) > 0
    found = profiled.ceilings
    gemm = found.gemm["float32"]
    assert gemm.lowest <= gemm.median <= gemm.highest == found.of("float32")
    assert re.fullmatch(r"product of size \d+|3x3 convolution of \d+ channels", found.by["float32"])
    assert 1e6 < found.copy.highest < 1e14
    assert 0 < found.dispatch < 1e-3


@pytest.mark.parametrize("quickest", ["product", "convolution"])
def test_the_ceiling_is_the_quickest_dense_work(monkeypatch, quickest):
    """Of both kinds, in growing sizes, none after the first that takes long enough."""
    tried = []

    def works(kind, *_):
        for size in (1, 2, 50, 100):

            def work(took=size / 1000):
                tried.append((kind, took))
                time.sleep(took)

            # Ten times the work in the same time; and a size of which more is done a second.
            more = (10 if kind == quickest else 1) * (3 if size == 2 else 1)
            yield f"{kind} {size}", work, more * size * 10**6

    monkeypatch.setattr(ceilings, "_products", partial(works, "product"))
    monkeypatch.setattr(ceilings, "_convolutions", partial(works, "convolution"))
    best, name = ceilings._gemm(torch.device("cpu"), torch.float32, 0.02)
    assert name == f"{quickest} 2"
    assert 1e10 < best.highest < 3e10
    assert {took for _, took in tried} == {0.001, 0.002, 0.05}


# ---- whose operator is it


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_assignment(family, tracer_of):
    """Each site's operators are those of its module; nothing is left that a site should have."""
    tracer = tracer_of(family)
    plan = tracer.plan(Probe(PROMPT, "dog"), steps=2, metric="latent_recovery")
    with tracer._inside():
        pair = tracer._pair(plan, plan.probes[0], list(plan.rows))
        denoiser = tracer.engine.denoiser(plan.sampling, pair.texts["clean"])
    body = denoiser.body.small
    kinds = {site.name: site.kind for site in tracer.sites()}
    owner = owners(body, kinds)
    ops = [n for n in body.module.graph.nodes if n.op == "call_function" and n.target is not MARK]
    labels = labels_of(body, owner, kinds)
    found = {kind: Counter() for kind in (*kinds.values(), "other")}
    per_site: dict[str, Counter] = {site: Counter() for site in kinds}
    for node in ops:
        label = labels.get(node)
        if label is None:
            continue
        found[label.kind][label.op] += 1
        if label.site:
            per_site[label.site][label.op] += 1
    for site, counts in per_site.items():
        kind = kinds[site]
        if kind == "resnet":
            short = f"{site.removeprefix('unet.')}.conv_shortcut.weight" in denoiser.weights
            assert counts["convolution"] == 2 + short
            assert counts["norm"] == 2
            assert not counts["attention"]
        elif kind in ("attn1", "attn2"):
            # Keys and values of a text are made once a text: the query and the output are left.
            assert counts["attention"] == 1
            assert counts["matrix product"] == (4 if kind == "attn1" else 2)
            assert counts["norm"] == counts["convolution"] == 0
            assert kind == "attn1" or counts["gather, cat"] == 2  # its keys and values
        else:
            assert counts["matrix product"] == 2
            assert not counts["attention"]
    # Of no site: norms before the modules, the way in and out, samplers.
    assert found["other"]["attention"] == 0
    assert found["other"]["convolution"] >= 2


def test_a_parameter_belongs_to_one_site(tracer_of):
    """Every product's weight lies in the module of the site that the product is given to."""
    tracer = tracer_of("sd")
    plan = tracer.plan(Probe(PROMPT, "dog"), steps=2, metric="latent_recovery")
    with tracer._inside():
        pair = tracer._pair(plan, plan.probes[0], list(plan.rows))
        body = tracer.engine.denoiser(plan.sampling, pair.texts["clean"]).body.small
    kinds = {site.name: site.kind for site in tracer.sites()}
    owner = owners(body, kinds)
    places = [n for n in body.module.graph.nodes if n.op == "placeholder"]
    weights = dict(zip(places, body.reads, strict=True))
    seen = 0
    for node in body.module.graph.nodes:
        read = [f"unet.{weights[s]}" for s in node.all_input_nodes if s in weights]
        for site in kinds:
            if any(name.startswith(f"{site}.") for name in read):
                assert owner[node.name] == site
                seen += 1
    assert seen > 3 * len(kinds)


@pytest.mark.parametrize(("prompt", "word"), [("a photo of a dog", "dog"), ("el niño, 2!", "2")])
def test_a_subject_to_time_with(prompt, word):
    assert last_word(prompt) == word


def test_no_word_at_all():
    with pytest.raises(UsageError, match="holds no word"):
        last_word("?!")
