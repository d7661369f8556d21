"""Kandinsky 2.1 and 2.2: a prior and a decoder, on both engines (fp32, CPU).

Stable Diffusion's families run through the tests beside this one.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttrace import Tracer
from fasttrace.adapters.corruption import corrupt_text, resolve
from fasttrace.adapters.hooks import rewriting, watching
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.scope import scope
from fasttrace.engine.base import CLEAN, CORRUPT, FLOOR, Pair
from fasttrace.engine.fast import FastEngine
from fasttrace.engine.job import Job
from fasttrace.engine.reference import Recording, ReferenceEngine
from fasttrace.engine.step import Step
from fasttrace.engine.text_lanes import TextLanes
from fasttrace.errors import ModelError, UsageError
from fasttrace.plan.lanes import CAUSAL, RUN, UNREACHABLE, text_lanes
from fasttrace.testing import runs_of, runs_of_pairs, tiny_pipeline
from fasttrace.testing.tiny import make_scheduler
from fasttrace.types import Corruption, Lane, Patch, Probe, Sampling, Selector, Site

PROMPT = "a photo of a dog in the house"
NEGATIVES = ("", "a cat")
ALL = Selector()
CLOSE = 1e-4  # of the latent's rms
LEARNED = {"variance_type": "learned_range", "clip_sample": False}
# Weighted sums, one with noise, and a variance that is read from the prediction.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIM", {}),
    "DDPM": ("DDPM", {"clip_sample": False}),
    "DDPM, clipped": ("DDPM", {}),
    "DDPM, learned variance": ("DDPM", LEARNED),
}


@pytest.fixture(scope="module", params=["kandinsky21", "kandinsky22"])
def kandinsky(request: pytest.FixtureRequest, loaded: Callable[[str], Any]) -> Any:
    return loaded(request.param)


def make_pair(
    model: Model,
    *lanes: Lane,
    seed: int = 5,
    steps: int = 3,
    guidance: float = 3.0,
    negative: str = "",
    eta: float = 0.0,
    prompt: str = PROMPT,
    subject: str = "dog",
) -> Pair:
    probe = Probe(prompt, subject, negative_prompt=negative)
    sampling = Sampling(steps, guidance, 16, 16, eta)
    start = model.start_of(model.start(sampling, seed), negative)
    clean = model.text(prompt, negative, model.guided(sampling), start)
    corrupt = corrupt_text(model, probe, resolve(model, [probe], Corruption()), clean)
    return Pair({CLEAN: clean, CORRUPT: corrupt}, CORRUPT, start, sampling, lanes)


def sites_of(model: Model) -> tuple[Site, ...]:
    return model.sites(16, 16).sites


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def assert_same(found: dict[Any, Tensor], expected: dict[Any, Tensor]) -> None:
    assert {k for k in expected if k[1] != FLOOR} == {k for k in found if k[1] != FLOOR}
    for key, latents in expected.items():
        if key[1] != FLOOR:
            worst = float((found[key] - latents).abs().max())
            assert worst <= CLOSE * rms(latents), (key, worst)


@pytest.mark.filterwarnings("ignore:`callback_steps` is deprecated")  # 2.2's combined pipeline
class TestPlainPipeline:
    """Invariant 2: the pipeline's own call, its prior included, gives the clean picture."""

    @pytest.mark.parametrize("name", list(SCHEDULERS))
    def test_clean_picture(self, kandinsky, name):
        """Bit for bit but for rounding; the fast engine's latent as near as invariant 2 says."""
        kind, extra = SCHEDULERS[name]
        with scope(kandinsky):
            kandinsky.scheduler = make_scheduler(kind, **extra)
            model = Model(kandinsky)
            pair = make_pair(model, steps=10)
            latents = runs_of(ReferenceEngine(model), pair)[CLEAN]
            found = model.decode(latents)
            plain = self.plainly(kandinsky, steps=10)
            fast = runs_of(FastEngine(model), pair)[CLEAN]
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
        assert float((fast - latents).abs().max()) <= CLOSE * rms(latents)

    @pytest.mark.parametrize("negative", NEGATIVES)
    @pytest.mark.parametrize("guidance", [0.0, 1.0, 4.0])
    def test_guidance_and_negative_prompt(self, kandinsky, guidance, negative):
        with scope(kandinsky):
            model = Model(kandinsky)
            pair = make_pair(model, guidance=guidance, negative=negative)
            found = model.decode(runs_of(ReferenceEngine(model), pair)[CLEAN])
            plain = self.plainly(kandinsky, guidance=guidance, negative=negative)
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)

    def plainly(
        self, pipe: Any, steps: int = 3, guidance: float = 3.0, negative: str = ""
    ) -> Tensor:
        """The decoder of a combined pipeline holds the scheduler as well, and steps it."""
        own = pipe.decoder_pipe.scheduler
        pipe.decoder_pipe.scheduler = copy.deepcopy(pipe.scheduler)
        try:
            picture = pipe(
                PROMPT,
                negative_prompt=negative or None,
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=16,
                width=16,
                generator=torch.Generator().manual_seed(5),
                output_type="pt",
            ).images
        finally:
            pipe.decoder_pipe.scheduler = own
        return (picture / 2 + 0.5).clamp(0, 1)


class TestCopies:
    """Invariant 1."""

    def test_no_patches_and_own_patches_are_the_corrupt_run(self, kandinsky):
        model = Model(kandinsky)
        sites = sites_of(model)
        itself = Lane(tuple(Patch(s, Selector(branch="both"), source=CORRUPT) for s in sites))
        nothing = Lane(tuple(Patch(s, ALL, strength=0.0) for s in sites))
        with scope(kandinsky):
            pair = make_pair(model, Lane(), itself, nothing)
            runs = runs_of(ReferenceEngine(model), pair)
            engine = FastEngine(model, clean="leader", sharing=False)
            fast = runs_of(engine, pair)
        for i in range(3):
            assert torch.equal(runs[i], runs[CORRUPT])
            assert torch.equal(fast[i], fast[FLOOR][-1:])
        assert rms(runs[CLEAN] - runs[CORRUPT]) > 0.05 * rms(runs[CLEAN])

    def test_everything_restored_is_the_clean_run(self, kandinsky):
        model = Model(kandinsky)
        with scope(kandinsky):
            pair = make_pair(model, Lane(tuple(Patch(s, ALL) for s in sites_of(model))))
            for engine in (ReferenceEngine(model), FastEngine(model)):
                runs = runs_of(engine, pair)
                close = 1e-5 * rms(runs[CLEAN])
                torch.testing.assert_close(runs[0], runs[CLEAN], rtol=0, atol=close)


class Constant(nn.Module):
    def __init__(self, values: list[Tensor]) -> None:
        super().__init__()
        self.values = iter(values)

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return next(self.values)


class TestSites:
    """Invariant 3."""

    def test_patching_a_site_is_replacing_its_module_by_a_constant(self, kandinsky):
        model, steps = Model(kandinsky), 3
        sites = sites_of(model)
        assert {s.kind for s in sites} == {"resnet", "added_kv"}
        moved = 0
        with scope(kandinsky):
            lanes = [Lane((Patch(s, ALL),)) for s in sites]
            pair = make_pair(model, *lanes, steps=steps, guidance=1.0)
            engine = ReferenceEngine(model)
            patched = runs_of(engine, pair)
            record: Recording = {}
            slots = {(s.name, "cond", c) for s in sites for c in range(steps)}
            engine.denoise(CLEAN, pair.texts[CLEAN], pair, record=record, slots=slots)
        for i, site in enumerate(sites):
            with scope(kandinsky):
                path, _, leaf = site.name.removeprefix("unet.").rpartition(".")
                values = [record[site.name, "cond", c] for c in range(steps)]
                kandinsky.unet.get_submodule(path)._modules[leaf] = Constant(values)
                expected = engine.denoise(CORRUPT, pair.texts[CORRUPT], pair)
            assert torch.equal(patched[i], expected), site.name
            moved += not torch.equal(patched[i], patched[CORRUPT])
        assert moved == len(sites)

    def test_what_is_alive_at_any_depth_carries_the_clean_prediction(self, kandinsky):
        """Stream and skips restored at one depth, and the embedding fed later, give the clean call.

        A site's output is the whole stream, and the embedding enters at two places: added to the
        time's, and as keys and values.
        """
        model = Model(kandinsky)
        with scope(kandinsky):
            pair = make_pair(model, guidance=1.0)
            latents = torch.randn(pair.start.latents.shape, generator=torch.Generator())
            given = {r: model.conditioning(t, pair.sampling) for r, t in pair.texts.items()}
            order: list[str] = []
            kept: dict[str, Tensor] = {}
            kinds = ("resnets", "attentions", "downsamplers", "upsamplers")
            modules = {
                n: m
                for n, m in model.unet.named_modules()
                if (n.split(".")[-1].isdigit() and n.split(".")[-2] in kinds)
                or n in ("conv_in", "add_embedding", "encoder_hid_proj")
            }

            def keep(name: str, out: Tensor) -> None:
                order.append(name)
                kept[name] = out.clone()

            with watching(modules, keep):
                clean = model.unet(latents, 500, **given[CLEAN])[0]

            def restored(names: set[str]) -> Tensor:
                with rewriting({n: modules[n] for n in names}, lambda name, _: kept[name]):
                    found: Tensor = model.unet(latents, 500, **given[CORRUPT])[0]
                    return found

            fed = {"add_embedding", "encoder_hid_proj"}
            for site in (s.name.removeprefix("unet.") for s in sites_of(model)):
                before = [n for n in order[: order.index(site) + 1] if n not in fed]
                skips = {
                    n
                    for n in before
                    if n.startswith(("conv_in", "down_blocks"))
                    and n.replace("resnets", "attentions") not in set(modules) - {n}
                }
                got = restored({before[-1]} | skips | fed)
                torch.testing.assert_close(got, clean, rtol=0, atol=1e-5 * rms(clean))
            lost = restored({before[-1]} | skips | fed - {"add_embedding"} - {"conv_in"})
            assert torch.equal(lost, clean)  # after the last site nothing of it is read
            first = restored({order[2]} | {"encoder_hid_proj"})
            assert rms(first - clean) > 1e-3 * rms(clean)


class TestBranches:
    """Invariant 4."""

    def test_unconditional_rows_are_untouched(self, kandinsky, monkeypatch):
        model = Model(kandinsky)
        lane = Lane(tuple(Patch(s) for s in sites_of(model)))
        seen: list[tuple[Step, Tensor]] = []
        run = Step.run

        def keep(step: Step, *args: Any, **more: Any) -> None:
            run(step, *args, **more)
            seen.append((step, step.prediction.clone()))

        with scope(kandinsky):
            pair = make_pair(model, lane, Lane())
            noise: list[Tensor] = []
            with watching({"": kandinsky.unet}, lambda _, out: noise.append(out)):
                runs_of(ReferenceEngine(model), pair)
            monkeypatch.setattr(Step, "run", keep)
            engine = FastEngine(model, sharing=False)
            (batch,) = Job(engine.workshop, [pair]).work.batches
            runs_of(engine, pair)
        patched, plain = noise[-2 * 3], noise[-3]  # the first calls of the two lanes
        assert torch.equal(patched[0], plain[0])
        assert not torch.equal(patched[1], plain[1])
        first = next(prediction for step, prediction in seen if step.shape.sites)
        uncond, cond = first.chunk(2)
        one, other = (batch.first + batch.lanes.index((0, i)) for i in (0, 1))
        assert torch.equal(uncond[one], uncond[other])
        assert not torch.equal(cond[one], cond[other])


class TestEngines:
    """Invariants 5 and 6."""

    @pytest.mark.parametrize("name", ["DDPM", "DDPM, learned variance"])
    def test_every_lane_is_the_reference(self, kandinsky, name):
        """With a weighted sum first calls are shared; with a learned variance pairs run alone."""
        kind, extra = SCHEDULERS[name]
        with scope(kandinsky):
            kandinsky.scheduler = make_scheduler(kind, **extra)
            model = Model(kandinsky)
            sites = sites_of(model)
            lanes = [Lane((Patch(s),)) for s in model.sites(16, 16).every]
            lanes += [
                Lane(),
                Lane((Patch(sites[3], Selector(window=(1, 2))),)),
                Lane((Patch(sites[4], Selector(branch="both"), strength=0.5),)),
                Lane((Patch(sites[4], source=CORRUPT), Patch(sites[0]))),
            ]
            pairs = [
                make_pair(model, *lanes, seed=1),
                make_pair(
                    model, *lanes, seed=2, prompt="a red car", subject="car", negative="a cat"
                ),
            ]
            expected = runs_of_pairs(ReferenceEngine(model), pairs)
            for options in ({"clean": "cache"}, {"clean": "leader", "lanes": 6}):
                engine = FastEngine(model, **options)
                job = Job(engine.workshop, pairs)
                assert job.schedule.linear == (name != "DDPM, learned variance")
                assert ("learned variance" in job.schedule.why) != job.schedule.linear
                assert bool(job.work.stairs) == job.schedule.linear
                assert_same(runs_of_pairs(engine, pairs), expected)

    def test_one_engine_with_one_scheduler_after_another(self, kandinsky):
        """Which of the prediction's channels are read is the scheduler's to say."""
        with scope(kandinsky):
            model = Model(kandinsky)
            engine = FastEngine(model)
            lanes = [Lane((Patch(site),)) for site in sites_of(model)[:2]]
            for name in ("DDIM", "DDPM, learned variance", "DDIM"):
                kind, extra = SCHEDULERS[name]
                kandinsky.scheduler = make_scheduler(kind, **extra)
                pair = make_pair(model, *lanes)
                assert_same(
                    runs_of_pairs(engine, [pair]), runs_of_pairs(ReferenceEngine(model), [pair])
                )

    def test_a_lane_depends_neither_on_its_row_nor_on_its_neighbours(self, kandinsky):
        model = Model(kandinsky)
        sites = sites_of(model)
        lane, around = Lane((Patch(sites[2]),)), [Lane((Patch(s),)) for s in sites[3:7]]
        with scope(kandinsky):
            engine = FastEngine(model, sharing=False, pruning=False)
            first = runs_of(engine, make_pair(model, lane, *around))[0]
            last = runs_of(engine, make_pair(model, *around, lane))[4]
        assert torch.equal(first, last)

    def test_text_lanes(self, kandinsky):
        model = Model(kandinsky)
        probe = Probe(PROMPT, "dog")
        corruption = resolve(model, [probe], Corruption())
        sites = [s for e in model.encoders for s in e.sites()]
        planned = text_lanes(model, probe, sites, "default", corruption)
        with scope(kandinsky):
            pair = make_pair(model, *(lane for lane, status in planned if status == RUN))
            own = TextLanes(model, probe, corruption, pair.texts[CLEAN]).texts
            pair = replace(pair, lane_texts=own)
            expected = runs_of_pairs(ReferenceEngine(model), [pair])
            assert_same(runs_of_pairs(FastEngine(model, lanes=16), [pair]), expected)


class TestText:
    def test_encoders(self, kandinsky):
        """2.1's decoder has a multilingual one, of another tokenizer and another layout."""
        model = Model(kandinsky)
        names = [e.name for e in model.encoders]
        assert names == ["prior_text_encoder", "text_encoder"][: len(names)]
        assert [e.causal for e in model.encoders] == [True, False][: len(names)]
        assert [e.window for e in model.encoders] == [24, 77][: len(names)]
        if len(names) == 2:
            both = [e.span("the big vw in blue", "vw") for e in model.encoders]
            assert [(s.start, s.stop) for s in both] == [(3, 5), (3, 6)]  # "▁", "v", "w"

    def test_reach_is_what_the_encoders_do(self, kandinsky):
        """Disturb one site at one token: what the decoder reads moves where we say it does.

        In the prior nothing behind the end token is read; of XLM-Roberta every place is.
        """
        model = Model(kandinsky)

        def shift(_: str, out: Tensor, at: int) -> Tensor:
            new = out.clone()
            new[:, at] += torch.linspace(-1, 1, new.shape[-1])
            return new

        with scope(kandinsky):
            clean = make_pair(model).texts[CLEAN]
            (same,) = model.encode([PROMPT], clean)
            for encoder in model.encoders:
                eos = encoder.tokens(PROMPT).eos
                for site in encoder.sites():
                    for token in (0, 5, eos, eos + 3):
                        change = {site.name: encoder.modules()[site.name]}
                        with rewriting(
                            change, lambda n, out, at=token: shift(n, out, at), first=True
                        ):
                            (moved,) = model.encode([PROMPT], clean)
                        equal = torch.equal(moved.cond, same.cond) and (
                            same.image is None or torch.equal(moved.image, same.image)
                        )
                        assert equal != encoder.reached(site, token, eos), (site.name, token)

    def test_lanes_not_run_are_the_corrupt_text_bit_for_bit(self, kandinsky):
        model, probe = Model(kandinsky), Probe(PROMPT, "dog")
        corruption = resolve(model, [probe], Corruption())
        statuses = set()
        with scope(kandinsky):
            pair = make_pair(model)
            corrupt = pair.texts[CORRUPT]
            lanes = TextLanes(model, probe, corruption, pair.texts[CLEAN])
            sites = [s for e in model.encoders for s in e.sites()]
            for lane, status in text_lanes(model, probe, sites, "default", corruption):
                text = lanes.texts([lane])[0]
                same = torch.equal(text.cond, corrupt.cond) and (
                    text.image is None or torch.equal(text.image, corrupt.image)
                )
                patch = lane.patches[0]
                if status != RUN:
                    assert same, (patch.site.name, patch.selector)
                    # Of a bidirectional encoder earlier tokens matter as well.
                    assert patch.site.component == "prior_text_encoder"
                else:
                    assert not same, (patch.site.name, patch.selector)
                statuses.add(status)
        assert statuses == {RUN, CAUSAL, UNREACHABLE}

    def test_only_the_conditional_half_is_corrupted(self, kandinsky):
        pair = make_pair(Model(kandinsky), negative="a cat")
        clean, corrupt = pair.texts[CLEAN], pair.texts[CORRUPT]
        assert not torch.equal(clean.cond, corrupt.cond)
        assert corrupt.uncond is clean.uncond
        assert corrupt.uncond_image is clean.uncond_image

    def test_the_seed_moves_the_image_embedding(self, kandinsky):
        """The prior draws noise too: one stream a (prompt, seed), the same for all its lanes."""
        model = Model(kandinsky)
        with scope(kandinsky):
            one, other = (make_pair(model, seed=seed).texts[CLEAN] for seed in (1, 2))
            again = model.encode([PROMPT, "a red car", PROMPT], one)
        images = [t.cond if t.image is None else t.image for t in (one, other, *again)]
        assert not torch.equal(images[0], images[1])
        torch.testing.assert_close(images[2], images[0], rtol=0, atol=1e-5)
        assert torch.equal(images[2], images[4])


class TestTracer:
    @pytest.mark.parametrize("component", ["unet", "text_encoder"])
    @pytest.mark.parametrize("family", ["sd21", "sdxl-turbo", "kandinsky21", "kandinsky22"])
    def test_three_lines(self, family, component, loaded, folders):
        """From a folder, with the family's own defaults but for the steps; both engines agree."""
        pipe = loaded(family)
        more = {"tokens": ["last subject", "EOS"]} if component == "text_encoder" else {}
        found = {}
        for engine in ("reference", "fast"):
            result = Tracer(pipe, engine=engine).trace(
                PROMPT,
                "dog",
                component=component,
                steps=2,
                metric=f"clip:{folders['clip']}",
                **more,
            )
            found[engine] = result.rows
        scores = {name: torch.tensor([r.score for r in rows]) for name, rows in found.items()}
        assert len(scores["fast"]) == len(found["reference"]) > 10
        floor = max(r.noise_floor for r in found["fast"])
        close = max(3 * floor, 1e-4 * float(scores["reference"].abs().max()))
        torch.testing.assert_close(scores["fast"], scores["reference"], rtol=0, atol=close)
        assert len({round(r.effect, 6) for r in found["fast"] if r.status == RUN}) > 5
        sampling = json.loads(found["fast"][0].sampling)
        assert sampling["guidance"] == {"sd21": 7.5, "sdxl-turbo": 0.0}.get(family, 4.0)
        assert ("prior" in sampling) == family.startswith("kandinsky")
        if "prior" in sampling:
            assert (sampling["prior"]["steps"], sampling["prior"]["guidance"]) == (25, 4.0)

    @pytest.mark.parametrize(
        ("component", "more"),
        [
            ("unet", {"seeds": 2}),
            ("text_encoder", {"seeds": 2}),
            ("unet", {"seeds": 7, "sites": "unet.mid_block.resnets.0"}),
        ],
    )
    def test_flops_are_those_executed(self, kandinsky, component, more):
        """A negative prompt gives each seed an unconditional text of its own."""
        tracer = Tracer(kandinsky, lanes=8)
        probe = Probe(PROMPT, "dog", negative_prompt="a cat" if component == "unet" else "")
        plan = tracer.plan(probe, component=component, steps=2, metric="latent_recovery", **more)
        found = tracer.forecast(plan, measure=False)
        assert list(tracer.iter_rows(plan, pictures=False))
        assert tracer.engine.executed == found.flops > 0

    def test_turbo_has_one_branch_and_one_step(self, loaded):
        model = Model(loaded("sdxl-turbo"))
        assert (model.default("steps"), model.default("guidance")) == (1, 0.0)
        assert not model.guided(Sampling(1, 0.0, 16, 16))
        assert Model(loaded("sdxl")).default("steps") == 50

    def test_a_negative_prompt_is_part_of_the_row(self, kandinsky):
        tracer = Tracer(kandinsky)
        plans = [
            tracer.plan(
                Probe(PROMPT, "dog", negative_prompt=n),
                steps=2,
                sites="unet.mid_block.*",
                metric="latent_recovery",
            )
            for n in NEGATIVES
        ]
        assert not set(plans[0].keys) & set(plans[1].keys)
        rows = [[r.score for r, _ in tracer.iter_rows(plan)] for plan in plans]
        assert rows[0] != rows[1]


class TestRefusals:
    def test_what_kandinsky_does_not_have(self, kandinsky):
        tracer = Tracer(kandinsky)
        with pytest.raises(UsageError, match="reads an image embedding; use 'embedding_noise'"):
            tracer.plan(Probe(PROMPT, "dog"), corruption="output_noise")
        with pytest.raises(UsageError, match="it has none to swap"):
            tracer.swap(PROMPT, "a photo of a cat")
        with pytest.raises(UsageError, match=r"height 18 is not a positive multiple of 8\."):
            tracer.plan(Probe(PROMPT, "dog"), height=18)

    def test_half_a_kandinsky(self, kandinsky):
        for part, words in (
            (kandinsky.decoder_pipe, "is a Kandinsky decoder without its prior"),
            (kandinsky.prior_pipe, "is a Kandinsky prior without a decoder"),
        ):
            with pytest.raises(ModelError, match=words):
                Model(part)

    def test_a_text_needs_a_seed(self, kandinsky):
        with scope(kandinsky), pytest.raises(ModelError, match="needs a seed"):
            Model(kandinsky).text(PROMPT, "", True)

    def test_nan_names_site_and_run(self, kandinsky):
        model = Model(kandinsky)
        site = sites_of(model)[3]
        with scope(kandinsky, keep_weights=True):
            pair = make_pair(model, Lane((Patch(sites_of(model)[-1]),)))
            with torch.no_grad():
                next(model.unet_modules()[site.name].parameters()).fill_(float("nan"))
            for engine in (ReferenceEngine(model), FastEngine(model)):
                with pytest.raises(ModelError, match=f"{site.name} in call 0"):
                    runs_of(engine, pair)


def test_one_weight_changes_the_fingerprint(kandinsky):
    model = Model(kandinsky)
    before = model.fingerprint()
    for part in ("prior_prior", "prior_text_encoder", "prior_image_encoder", "movq"):
        weight = next(getattr(kandinsky, part).parameters())
        with torch.no_grad():
            kept = weight.view(-1)[0].clone()
            weight.view(-1)[0] += 1
            assert model.fingerprint() != before, part
            weight.view(-1)[0] = kept
    assert model.fingerprint() == before


def test_v_prediction_is_plain_diffusers():
    """Invariant 2 with the velocities that SD 2.1 predicts."""
    pipe = tiny_pipeline("sd21")
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    model = Model(pipe)
    with scope(pipe):
        pair = make_pair(model, steps=10)
        plain = pipe(
            PROMPT,
            num_inference_steps=10,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(5),
            output_type="latent",
        ).images
        for engine in (ReferenceEngine(model), FastEngine(model)):
            assert rms(runs_of(engine, pair)[CLEAN] - plain) <= 1e-4 * rms(plain)
