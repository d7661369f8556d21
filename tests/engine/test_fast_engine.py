"""The fast engine against the reference, and against itself (fp32, CPU)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fasttrace.adapters.corruption import corrupt_text, resolve
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.scope import scope
from fasttrace.adapters.text import Text
from fasttrace.adapters.unet import UnetSites
from fasttrace.engine.base import CLEAN, CORRUPT, FLOOR, Pair
from fasttrace.engine.compiled import of_model
from fasttrace.engine.fast import FastEngine
from fasttrace.engine.job import Job
from fasttrace.engine.reference import ReferenceEngine
from fasttrace.engine.step import Step
from fasttrace.engine.text_lanes import TextLanes
from fasttrace.engine.work import bound
from fasttrace.errors import ModelError, UsageError
from fasttrace.plan.lanes import RUN, text_lanes
from fasttrace.testing import runs_of_pairs, tiny_pipeline
from fasttrace.testing.tiny import make_scheduler
from fasttrace.types import Corruption, Lane, Patch, Probe, Sampling, Selector, Site

PROBES = (Probe("a photo of a dog in the house", "dog"), Probe("a red car", "car"))
OPTIONS: dict[str, dict[str, Any]] = {
    "cache": {"clean": "cache"},
    "leader": {"clean": "leader"},
    "small batches": {"lanes": 6},
    "leader, smallest batches": {"clean": "leader", "lanes": 4},
    "nothing shared": {"sharing": False, "pruning": False},
    "one pair at a time": {"pairs": 1},
    "little memory": {"cache": 100_000, "lanes": 8},
    "fused attention": {"attention": "fused"},
    "staged": {"staged": True},
    "host, staged": {"staged": True, "home": "host"},
}
CLOSE = 1e-4  # of the latent's rms: invariant 2


def layout_of(model: Model) -> UnetSites:
    size = model.default("height")
    return model.sites(size, size)


def sites_of(model: Model) -> tuple[Site, ...]:
    return layout_of(model).sites


def make_pairs(
    model: Model,
    lanes: Callable[[Probe], list[Lane]] | list[Lane],
    *,
    steps: int = 3,
    guidance: float = 3.0,
    base: str = CORRUPT,
    eta: float = 0.0,
    probes: tuple[Probe, ...] = PROBES,
) -> list[Pair]:
    size = model.default("height")
    sampling = Sampling(steps, guidance, size, size, eta)
    corruption = resolve(model, list(probes), Corruption())
    pairs = []
    for seed, probe in enumerate(probes):
        clean = model.text(probe.prompt, probe.negative_prompt, model.guided(sampling))
        texts = {CLEAN: clean, CORRUPT: corrupt_text(model, probe, corruption, clean)}
        own = lanes(probe) if callable(lanes) else lanes
        pairs.append(Pair(texts, base, model.start(sampling, seed), sampling, tuple(own)))
    return pairs


def mixed_lanes(model: Model) -> list[Lane]:
    """Every site, whole transformers and blocks among them, and lanes of every kind."""
    sites = sites_of(model)
    cross = [s for s in sites if s.kind == "attn2"]
    return [
        *(Lane((Patch(s),)) for s in layout_of(model).every),
        Lane(),
        Lane((Patch(sites[3], Selector(window=(1, 2))),)),
        Lane((Patch(sites[-1], Selector(window=(2, 3))),)),
        Lane((Patch(sites[5], Selector(branch="both")),)),
        Lane((Patch(sites[5], Selector(branch="uncond", window=(1, 3)), strength=0.5),)),
        Lane((Patch(sites[0]), Patch(sites[-2], Selector(window=(0, 1))))),
        Lane((Patch(sites[4], source=CORRUPT),)),
        Lane((Patch(cross[0], source="text:clean"), Patch(cross[-1], source="text:clean"))),
    ]


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def assert_same(found: dict[Any, Tensor], expected: dict[Any, Tensor], names: Any = str) -> None:
    assert {k for k in expected if k[1] != FLOOR} == {k for k in found if k[1] != FLOOR}
    for key, latents in expected.items():
        if key[1] != FLOOR:
            worst = float((found[key] - latents).abs().max())
            assert worst <= CLOSE * rms(latents), (key, names(key), worst)


TRACED: dict[Any, Any] = {}


@pytest.fixture(autouse=True)
def shared_traces(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Engines of one model share its trace, seconds each; not where the model is changed."""
    if request.cls is TestNothingGoesStale or "attention" in request.node.name:
        return

    def traced(model: Model, sampling: Sampling, example: Text) -> Any:
        key = id(model.unet), sampling.height, tuple(example.cond.shape)
        if key not in TRACED:
            TRACED[key] = of_model(model, sampling, example)
        return TRACED[key]

    monkeypatch.setattr("fasttrace.engine.workshop.of_model", traced)


@pytest.fixture(scope="module")
def expected(pipeline: Any) -> tuple[Any, dict[Any, Tensor]]:
    model = Model(pipeline)
    with scope(pipeline):
        pairs = make_pairs(model, mixed_lanes(model))
        return pairs, runs_of_pairs(ReferenceEngine(model), pairs)


def test_every_lane_is_the_reference(pipeline, expected, subtests):
    """Others than the two tiny layouts take the first ways alone, each a few seconds."""
    pairs, latents = expected
    few = Model(pipeline).name not in ("sd", "sdxl")
    for name in list(OPTIONS)[: 2 if few else None]:
        with subtests.test(name), scope(pipeline):
            check_against(latents, FastEngine(Model(pipeline), **OPTIONS[name]), pairs)


def check_against(latents: dict[Any, Tensor], engine: FastEngine, pairs: list[Pair]) -> None:
    """Twice, since the second time nothing is compiled; and what ran is what was predicted."""
    predicted = start = 0
    while start < len(pairs):
        job = Job(engine.workshop, pairs[start:])
        predicted += job.work.flops(job.denoiser)
        start += len(job.pairs)
    found = runs_of_pairs(engine, pairs)
    assert engine.executed == predicted
    again = runs_of_pairs(engine, pairs)
    assert_same(found, latents)
    assert all(torch.equal(found[key], again[key]) for key in found)
    copies = found[0, FLOOR]
    assert len(copies) > 2
    assert float((copies - found[0, CORRUPT]).abs().max()) <= CLOSE * rms(copies)


def test_unguided(tiny):
    model = Model(tiny)
    with scope(tiny):
        pairs = make_pairs(model, mixed_lanes(model), guidance=1.0, steps=4)
        expected = runs_of_pairs(ReferenceEngine(model), pairs)
        assert_same(runs_of_pairs(FastEngine(model), pairs), expected)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(family, dtype, monkeypatch):
    """Two calls, as near to the same weights' float32 run as the reference comes, by half as much.

    Engines round at other places, so they differ from each other by as much as from the truth.
    """

    monkeypatch.undo()  # traces are not shared between dtypes
    pipe = tiny_pipeline(family).to(dtype=dtype)

    def runs(make: Callable[[Model], Any]) -> dict[Any, Tensor]:
        model = Model(pipe)
        with scope(pipe):
            lanes = [Lane((Patch(s),)) for s in sites_of(model)[::2]]
            found = runs_of_pairs(make(model), make_pairs(model, lanes, steps=2))
            return {key: latents for key, latents in found.items() if key[1] != FLOOR}

    slow = runs(ReferenceEngine)
    fast = {mode: runs(lambda m, c=mode: FastEngine(m, clean=c)) for mode in ("cache", "leader")}
    pipe.to(dtype=torch.float32)
    truth = runs(ReferenceEngine)
    for mode, found in fast.items():
        assert found.keys() == slow.keys()
        for key in slow:
            assert found[key].dtype == dtype
            near = rms(slow[key].float() - truth[key])
            assert 0 < rms(found[key].float() - truth[key]) <= 1.5 * near, (mode, key)


def test_pruned_graphs(tiny):
    """Enough pairs for lanes of one site to have a graph of their own."""
    model = Model(tiny)
    probes = tuple(Probe(f"a {word} dog", "dog") for word in ("red", "big", "old", "wet"))
    resnets = [s for s in sites_of(model) if s.kind == "resnet"]
    lanes = [Lane((Patch(s),)) for s in resnets]
    lanes += [Lane((Patch(resnets[-1], Selector(window=(1, 3))),))]
    with scope(tiny):
        pairs = make_pairs(model, lanes, probes=probes, steps=4)
        engine = FastEngine(model, lanes=8)
        pruned = {batch.pruned for batch in Job(engine.workshop, pairs).work.batches}
        assert resnets[-1].name in pruned
        assert resnets[0].name not in pruned
        assert_same(runs_of_pairs(engine, pairs), runs_of_pairs(ReferenceEngine(model), pairs))


def test_swap(tiny):
    model = Model(tiny)
    cross = [s for s in sites_of(model) if s.kind == "attn2"]
    lanes = [
        Lane(tuple(Patch(s, source="text:corrupt") for s in cross[i : i + 2]))
        for i in range(len(cross) - 1)
    ]
    with scope(tiny):
        pairs = make_pairs(model, lanes, base=CLEAN)
        expected = runs_of_pairs(ReferenceEngine(model), pairs)
        assert_same(runs_of_pairs(FastEngine(model), pairs), expected)


def test_texts_of_their_own(tiny):
    model = Model(tiny)
    corruption = resolve(model, list(PROBES), Corruption())
    sites = [s for e in model.encoders for s in e.sites()][:6]

    def lanes(probe: Probe) -> list[Lane]:
        found = text_lanes(model, probe, sites, ["last subject", "EOS", "padding"], corruption)
        return [lane for lane, status in found if status == RUN]

    with scope(tiny):
        pairs = [
            replace(pair, lane_texts=TextLanes(model, probe, corruption, pair.texts[CLEAN]).texts)
            for probe, pair in zip(PROBES, make_pairs(model, lanes), strict=True)
        ]
        expected = runs_of_pairs(ReferenceEngine(model), pairs)
        for options in ({}, {"lanes": 5}, {"sharing": False}):
            check_against(expected, FastEngine(model, **options), pairs)


class TestCopies:
    """Invariants 1, 4 and 5: one graph and batch shape."""

    def test_no_patches_own_patches_and_copies_agree_bit_for_bit(self, pipeline):
        model = Model(pipeline)
        itself = [Patch(s, Selector(branch="both"), source=CORRUPT) for s in sites_of(model)]
        nothing = [Patch(s, Selector(branch="both"), strength=0.0) for s in sites_of(model)]
        lanes = [Lane(), Lane(tuple(itself)), Lane((*nothing,)), Lane()]
        for clean in ("cache", "leader"):
            # A cache was recorded in another batch shape, so it may differ in the last bit.
            asked = [lane for lane in lanes if clean == "leader" or lane.patches != tuple(itself)]
            with scope(pipeline):
                pairs = make_pairs(model, asked)
                engine = FastEngine(model, clean=clean, sharing=False)
                checked = 0
                for finished in engine.run(pairs):
                    rows = list(zip(finished.runs, finished.latents, strict=True))
                    copies = [row for run, row in rows if run == (0, FLOOR)]
                    for (pair, run), row in rows:
                        if pair == 0 and isinstance(run, int):
                            assert all(torch.equal(row, copy) for copy in copies), (clean, run)
                            checked += len(copies)
                assert checked == 2 * len(asked)

    def test_a_lane_depends_neither_on_its_row_nor_on_its_neighbours(self, tiny):
        model = Model(tiny)
        sites = sites_of(model)
        lane = Lane((Patch(sites[2]),))
        around = [Lane((Patch(s),)) for s in sites[3:9]]
        options = {"sharing": False, "pruning": False}
        with scope(tiny):
            engine = FastEngine(model, **options)
            found = []
            for place in (0, 3, 6):
                lanes = [*around[:place], lane, *around[place:]]
                runs = runs_of_pairs(engine, make_pairs(model, lanes))
                found.append((runs[0, place], runs[1, place]))
            others = [Lane((Patch(s, strength=0.5),)) for s in sites[9:15]]
            runs = runs_of_pairs(engine, make_pairs(model, [lane, *others]))
            found.append((runs[0, 0], runs[1, 0]))
        for first, second in found[1:]:
            assert torch.equal(first, found[0][0])
            assert torch.equal(second, found[0][1])

    def test_unconditional_rows_are_untouched(self, pipeline, monkeypatch):
        """Predictions of a batch with conditional patches alone."""
        model = Model(pipeline)
        lane = Lane(tuple(Patch(s) for s in sites_of(model)))
        seen: list[tuple[Step, Tensor]] = []
        run = Step.run

        def keep(step: Step, *args: Any, **more: Any) -> None:
            run(step, *args, **more)
            seen.append((step, step.prediction.clone()))

        monkeypatch.setattr(Step, "run", keep)
        with scope(pipeline):
            pairs = make_pairs(model, [lane, Lane()])
            engine = FastEngine(model, sharing=False)
            (batch,) = Job(engine.workshop, pairs).work.batches
            runs_of_pairs(engine, pairs)
        first = next(prediction for step, prediction in seen if step.shape.sites)
        uncond, cond = first.chunk(2)
        patched, plain = (batch.first + batch.lanes.index((0, i)) for i in (0, 1))
        assert torch.equal(uncond[patched], uncond[plain])
        assert not torch.equal(cond[patched], cond[plain])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'
@pytest.mark.parametrize(
    ("name", "steps", "eta"),
    [
        ("PNDM", 50, 0.0),
        ("DDIM", 10, 0.0),
        ("DDIM", 6, 0.8),
        ("HeunDiscrete", 10, 0.0),
        ("EulerDiscrete", 10, 0.0),
        ("EulerAncestralDiscrete", 10, 0.0),
        ("DPMSolverMultistep", 10, 0.0),
        ("UniPCMultistep", 10, 0.0),
        ("DDPM", 6, 0.0),
        ("DDIM clip_sample", 6, 0.0),
        ("HeunDiscrete clip_sample", 5, 0.0),
        ("UniPCMultistep thresholding", 6, 0.0),
        ("DPMSolverMultistep thresholding", 6, 0.0),
    ],
)
def test_clean_rows_are_plain_diffusers(sd, name, steps, eta):
    """Invariant 2, and patched lanes against the reference with every scheduler.

    Those with an option clip or threshold: no weighted sum, so their own `step` runs.
    """
    with scope(sd):
        name, _, option = name.partition(" ")
        sd.scheduler = make_scheduler(name)
        if option:
            sd.scheduler = type(sd.scheduler).from_config(sd.scheduler.config, **{option: True})
        model = Model(sd)
        sites = sites_of(model)
        lanes = [Lane((Patch(sites[4]),)), Lane((Patch(sites[-3], Selector(window=(2, 4))),))]
        pairs = make_pairs(model, lanes, steps=steps, guidance=7.5, eta=eta)
        found = runs_of_pairs(FastEngine(model), pairs)
        expected = runs_of_pairs(ReferenceEngine(model), pairs)
        for seed, probe in enumerate(PROBES):
            plain = sd(
                probe.prompt,
                num_inference_steps=steps,
                guidance_scale=7.5,
                eta=eta,
                generator=torch.Generator().manual_seed(seed),
                output_type="latent",
            ).images
            assert rms(found[seed, CLEAN] - plain) <= 1e-4 * rms(plain)
    for key in expected:
        if key[1] != FLOOR:
            assert rms(found[key] - expected[key]) <= 1e-4 * rms(expected[key]), key


def test_the_compile_runner(sd, monkeypatch):
    """Through torch's compiler; its code generator, a minute of C++, is left out here."""
    used: list[Any] = []

    def compiled(module: Any, **options: Any) -> Any:
        used.append(module)
        return torch_compile(module, backend="aot_eager", **options)

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compiled)
    model = Model(sd)
    with scope(sd):
        pairs = make_pairs(model, [Lane((Patch(s),)) for s in sites_of(model)[::6]], steps=2)
        found = runs_of_pairs(FastEngine(model, runner="compile"), pairs)
        assert_same(found, runs_of_pairs(ReferenceEngine(model), pairs))
    assert used


class TestFlops:
    def test_useful_work_is_near_the_bound(self, tiny):
        """All paper sites; the tiny models have a third of their work before the first text."""
        model = Model(tiny)
        lanes = [Lane((Patch(s),)) for s in sites_of(model)]
        with scope(tiny):
            job = Job(FastEngine(model).workshop, make_pairs(model, lanes, steps=8))
            plain = Job(
                FastEngine(model, sharing=False, pruning=False).workshop,
                make_pairs(model, lanes, steps=8),
            )
        cost = job.denoiser.cost
        least = bound(cost, job.setting, 2, job.todo)
        useful = job.work.useful(cost, job.todo)
        assert least <= useful < plain.work.useful(cost, plain.todo)
        assert job.work.flops(job.denoiser) >= useful


class TestNothingGoesStale:
    def test_an_edit_in_place(self, sd):
        model = Model(sd)
        lanes = [Lane((Patch(s),)) for s in sites_of(model)[:4]]
        layer = sd.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v
        engine = FastEngine(model)
        with scope(sd, keep_weights=True):
            pairs = make_pairs(model, lanes)
            before = runs_of_pairs(engine, pairs)
            with torch.no_grad():
                layer.weight.mul_(3.0)
            after = runs_of_pairs(engine, pairs)
            assert not torch.equal(after[0, CLEAN], before[0, CLEAN])
            assert_same(after, runs_of_pairs(ReferenceEngine(model), pairs))

    @pytest.mark.parametrize("change", ["attribute", "hook"])
    def test_what_the_trace_bakes_in(self, sd, change):
        """A plain number of a module (FreeU, an adapter's scale); another hook in one's place."""
        model = Model(sd)
        lanes = [Lane((Patch(sites_of(model)[0]),))]
        engine = FastEngine(model)
        block = sd.unet.up_blocks[0].resnets[0]
        found = []
        with scope(sd):
            pairs = make_pairs(model, lanes)
            for factor in (1.5, 3.0):
                if change == "attribute":
                    block.output_scale_factor = factor
                else:
                    handle = block.register_forward_hook(lambda *a, f=factor: a[2] * f)
                found.append(runs_of_pairs(engine, pairs))
                assert_same(found[-1], runs_of_pairs(ReferenceEngine(model), pairs))
                if change == "hook":
                    handle.remove()
                    del handle
        assert not torch.equal(found[0][0, CLEAN], found[1][0, CLEAN])

    @pytest.mark.parametrize("change", ["a module in another's place", "a LoRA", "a LoRA, fused"])
    def test_other_modules(self, change):
        sd = tiny_pipeline("sd")  # its own: adapters leave traces in a model
        model = Model(sd)
        lanes = [Lane((Patch(s),)) for s in sites_of(model)[:4]]
        engine = FastEngine(model)
        with scope(sd, keep_weights=True):
            pairs = make_pairs(model, lanes)
            before = runs_of_pairs(engine, pairs)
            if change.startswith("a LoRA"):
                peft = pytest.importorskip("peft")
                modules = ["to_k", "to_v"]
                sd.unet.add_adapter(
                    peft.LoraConfig(target_modules=modules, init_lora_weights=False)
                )
                if change.endswith("fused"):
                    sd.unet.fuse_lora()
            else:
                block = sd.unet.mid_block.attentions[0].transformer_blocks[0]
                block.attn2.to_v = torch.nn.Sequential(block.attn2.to_v, torch.nn.Tanh())
            after = runs_of_pairs(engine, pairs)
            assert not torch.equal(after[0, CLEAN], before[0, CLEAN])
            assert_same(after, runs_of_pairs(ReferenceEngine(model), pairs))


class TestSeveralRuns:
    def test_one_may_wait_while_another_runs(self, sd):
        """Their tables and recorded activations are apart."""
        model = Model(sd)
        first, second = ([Lane((Patch(s),)) for s in sites_of(model)[i::2]] for i in (0, 1))
        with scope(sd), torch.no_grad():
            engine = FastEngine(model, lanes=6)
            one, other = make_pairs(model, first), make_pairs(model, second, probes=PROBES[::-1])
            expected = runs_of_pairs(FastEngine(model, lanes=6), one)
            waiting = engine.run(one)
            parts = [next(waiting), next(waiting), next(waiting)]
            between = runs_of_pairs(engine, other)
            parts += waiting
            assert_same(between, runs_of_pairs(ReferenceEngine(model), other))
        for finished in parts:
            for key, latents in zip(finished.runs, finished.latents, strict=True):
                if key[1] != FLOOR:
                    assert torch.equal(latents, expected[key][0])

    def test_negative_prompts_of_their_own_and_several_trunks(self, tiny):
        model = Model(tiny)
        words = ("red", "big", "old", "wet", "tiny")
        probes = tuple(
            Probe(f"a {word} dog", "dog", negative_prompt=("", "a cat")[i % 2])
            for i, word in enumerate(words)
        )
        lanes = [Lane((Patch(s),)) for s in sites_of(model)[::3]]
        with scope(tiny):
            pairs = make_pairs(model, lanes, probes=probes)
            engine = FastEngine(model, lanes=6)
            assert len(Job(engine.workshop, pairs).work.trunks) == 2
            assert_same(runs_of_pairs(engine, pairs), runs_of_pairs(ReferenceEngine(model), pairs))

    def test_one_call(self, tiny):
        model = Model(tiny)
        with scope(tiny):
            tiny.scheduler = make_scheduler("DDIM")
            pairs = make_pairs(model, [Lane((Patch(s),)) for s in sites_of(model)], steps=1)
            engine = FastEngine(model, lanes=8)
            assert not Job(engine.workshop, pairs).work.batches
            assert_same(runs_of_pairs(engine, pairs), runs_of_pairs(ReferenceEngine(model), pairs))

    def test_attention_that_folds_its_heads_into_the_rows(self, sd):
        model = Model(sd)
        with scope(sd):
            sd.unet.set_attn_processor(AttnProcessor())
            pairs = make_pairs(model, [Lane((Patch(s),)) for s in sites_of(model)[:5]])
            engine = FastEngine(model)
            assert_same(runs_of_pairs(engine, pairs), runs_of_pairs(ReferenceEngine(model), pairs))
            assert not Job(engine.workshop, pairs).work.stairs


class TestErrors:
    def test_options(self, sd):
        model = Model(sd)
        for options, words in (
            ({"clean": "both"}, "clean is one of auto, leader, cache"),
            ({"home": "disk"}, "home is one of device, host"),
            ({"lanes": 3}, "at least 4 lanes"),
            ({"runner": "gpu"}, "Unknown runner 'gpu'"),
            ({"runner": "cudagraph"}, "needs a model on a CUDA device"),
            ({"staged": False, "home": "host"}, "staged can't be False"),
        ):
            with pytest.raises(UsageError, match=words):
                FastEngine(model, **options)

    def test_a_patch_outside_the_run(self, sd):
        lane = Lane((Patch(sites_of(Model(sd))[0], Selector(window=(90, 91))),))
        with scope(sd):
            pairs = make_pairs(Model(sd), [lane])
            with pytest.raises(ModelError, match="reached no tensor"):
                runs_of_pairs(FastEngine(Model(sd)), pairs)

    def test_what_it_does_not_do_is_refused(self, sd):
        sites = sites_of(Model(sd))
        resnet = next(s for s in sites if s.kind == "resnet")
        nowhere = replace(resnet, name="unet.nowhere")
        cross = next(s for s in sites if s.kind == "attn2")
        for lane, error, words in (
            (Lane((Patch(resnet, source="text:clean"),)), ModelError, "it reads no text"),
            (Lane((Patch(nowhere),)), ModelError, "no place of this denoiser"),
            (Lane((Patch(resnet, Selector(tokens=(0,))),)), UsageError, "tokens of a UNet site"),
            (Lane((Patch(cross, source="text:clean", strength=0.5),)), UsageError, "another text"),
            (Lane((Patch(resnet), Patch(resnet, source=CORRUPT))), UsageError, "one patch a site"),
        ):
            with scope(sd):
                pairs = make_pairs(Model(sd), [lane])
                with pytest.raises(error, match=words):
                    runs_of_pairs(FastEngine(Model(sd)), pairs)

    def test_nan_names_site_and_run(self, sd):
        model = Model(sd)
        site = sites_of(model)[5]
        with scope(sd, keep_weights=True):
            pairs = make_pairs(model, [Lane((Patch(sites_of(model)[-1]),))])
            module = model.unet_modules()[site.name]
            with torch.no_grad():
                next(module.parameters()).fill_(float("nan"))
            with pytest.raises(ModelError, match=f"{site.name} in call 0") as caught:
                runs_of_pairs(FastEngine(model), pairs)
        assert "clean run" in str(caught.value)

    @pytest.mark.parametrize("failing", [0, 1, 2])
    def test_a_failed_allocation_halves_the_batch_and_loses_nothing(self, sd, monkeypatch, failing):
        """failing: how many batches (or shared runs) succeed before memory is short."""
        model = Model(sd)
        lanes = [Lane((Patch(s),)) for s in sites_of(model)]
        done: list[int] = []
        original = Job._trunk if failing == 0 else Job._run_batch

        def short(job: Job, *args: Any) -> Any:
            if job.setting.lanes > 8 and len(done) >= max(0, failing - 1):
                raise torch.OutOfMemoryError("Tried to allocate 20 GiB")
            done.append(job.setting.lanes)
            return original(job, *args)

        monkeypatch.setattr(Job, original.__name__, short)
        with scope(sd):
            pairs = make_pairs(model, lanes)
            engine = FastEngine(model, lanes=24)
            found = runs_of_pairs(engine, pairs)
            monkeypatch.undo()
            assert_same(found, runs_of_pairs(ReferenceEngine(model), pairs))
        assert engine.workshop.lanes == 6

    def test_no_memory_at_all_is_a_sentence(self, sd, monkeypatch):
        model = Model(sd)

        def short(*_: Any) -> Any:
            raise MemoryError

        monkeypatch.setattr(Job, "_trunk", short)
        with scope(sd):
            pairs = make_pairs(model, [Lane((Patch(sites_of(model)[0]),))])
            with pytest.raises(ModelError, match=r"no memory for a batch of [4-7] lanes"):
                runs_of_pairs(FastEngine(model), pairs)


class TestOneStep:
    def test_serves_every_plan(self, tiny):
        """Sites alone, windows, branches and strengths: other numbers in the same tables."""
        model = Model(tiny)
        sites = sites_of(model)[2:9]
        plans = {
            "sites": [Lane((Patch(s),)) for s in sites],
            "windows": [
                Lane((Patch(s, Selector(window=(0, 1 + i % 3))),)) for i, s in enumerate(sites)
            ],
            "branches": [
                Lane((Patch(s, Selector(branch=("both", "uncond", "cond")[i % 3])),))
                for i, s in enumerate(sites)
            ],
            "strengths": [Lane((Patch(s, strength=0.3 * i),)) for i, s in enumerate(sites)],
        }
        first: Any = None
        with scope(tiny):
            engine = FastEngine(model, clean="leader", sharing=False)
            for name, lanes in plans.items():
                pairs = make_pairs(model, lanes)
                found = runs_of_pairs(engine, pairs)
                assert_same(found, runs_of_pairs(ReferenceEngine(model), pairs))
                steps = engine.workshop.steps()
                parts = [part for step in steps for part in step.parts["full"]]
                used = {t.data_ptr() for part in parts for t in part.arguments}
                used |= {id(step) for step in steps}
                first = first or used
                assert used == first, name

    @pytest.mark.parametrize("clean", ["cache", "leader"])
    def test_reads_no_value(self, sd, clean):
        """A whole call on tensors without values: tables, denoiser, guidance, the next latent.

        So nothing in it waits for the device, and a captured CUDA graph could replay it.
        """
        model = Model(sd)
        lanes = [Lane((Patch(s),)) for s in sites_of(model)]
        probes = tuple(Probe(f"a {word} dog", "dog") for word in ("red", "big", "old", "wet"))
        with scope(sd):
            pairs = make_pairs(model, lanes, probes=probes)
            engine = FastEngine(model, clean=clean, lanes=8)
            runs_of_pairs(engine, pairs)
            steps = [step for step in engine.workshop.steps() if isinstance(step, Step)]
        assert any("pruned" in step.parts for step in steps) == (clean == "cache")
        mode = FakeTensorMode()
        for step in steps:
            for name, value in list(vars(step).items()):
                setattr(step, name, faked(mode, value))
            for parts in step.parts.values():
                for part in parts:
                    part.arguments = [mode.from_tensor(tensor) for tensor in part.arguments]
            with mode, torch.no_grad():
                for variant in step.parts:
                    step._call(variant)


def faked(mode: FakeTensorMode, value: Any) -> Any:
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
        return tuple(mode.from_tensor(tensor) for tensor in value)
    return value
