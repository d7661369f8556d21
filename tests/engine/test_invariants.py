"""Invariants 1, 2, 3 and 4 on the reference engine (fp32, CPU)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrace.adapters.corruption import corrupt_text, resolve
from fasttrace.adapters.hooks import rewriting, watching
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.scope import scope
from fasttrace.engine.base import CLEAN, CORRUPT, Pair
from fasttrace.engine.reference import Recording, ReferenceEngine
from fasttrace.errors import ModelError
from fasttrace.testing import runs_of
from fasttrace.testing.tiny import make_scheduler
from fasttrace.types import Corruption, Lane, Patch, Probe, Sampling, Selector

ALL = Selector()


def make_pair(
    model: Model,
    probe: Probe,
    *lanes: Lane,
    steps: int = 2,
    guidance: float = 7.5,
    eta: float = 0.0,
) -> Pair:
    size = model.default("height")
    sampling = Sampling(steps, guidance, size, size, eta)
    corruption = resolve(model, [probe], Corruption())
    clean = model.text(probe.prompt, probe.negative_prompt, model.guided(sampling))
    corrupt = corrupt_text(model, probe, corruption, clean)
    texts = {CLEAN: clean, CORRUPT: corrupt}
    return Pair(texts, CORRUPT, model.start(sampling, seed=3), sampling, lanes)


def run(pipeline: Any, probe: Probe, *lanes: Lane, **options: Any) -> dict[Any, Tensor]:
    model = Model(pipeline)
    with scope(pipeline):
        return runs_of(ReferenceEngine(model), make_pair(model, probe, *lanes, **options))


def sites_of(pipeline: Any) -> Any:
    model = Model(pipeline)
    size = model.default("height")
    return model.sites(size, size).sites


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


class TestCopies:
    def test_no_patches_and_own_patches_are_the_corrupt_run(self, pipeline, probe):
        sites = sites_of(pipeline)
        itself = Lane(tuple(Patch(s, Selector(branch="both"), source=CORRUPT) for s in sites))
        runs = run(pipeline, probe, Lane(), itself, steps=3)
        assert torch.equal(runs[0], runs[CORRUPT])
        assert torch.equal(runs[1], runs[CORRUPT])
        assert not torch.equal(runs[CLEAN], runs[CORRUPT])

    def test_strength_zero_never_reads_its_source(self, pipeline, probe):
        """Nothing is recorded for it, so a read would be a missing key."""
        lane = Lane(tuple(Patch(s, ALL, strength=0.0) for s in sites_of(pipeline)))
        runs = run(pipeline, probe, lane)
        assert torch.equal(runs[0], runs[CORRUPT])

    def test_everything_restored_is_the_clean_run(self, pipeline, probe):
        """Text enters through the sites alone, so all of them together bring the clean run back."""
        lane = Lane(tuple(Patch(s, ALL) for s in sites_of(pipeline)))
        runs = run(pipeline, probe, lane, steps=3)
        torch.testing.assert_close(runs[0], runs[CLEAN], rtol=0, atol=1e-5 * rms(runs[CLEAN]))

    def test_cache_size_changes_nothing(self, pipeline, probe):
        """Recording one site at a time gives what recording all at once does."""
        model, sites = Model(pipeline), sites_of(pipeline)
        lanes = [Lane((Patch(s, ALL),)) for s in sites[:6]]
        with scope(pipeline):
            pair = make_pair(model, probe, *lanes)
            once = runs_of(ReferenceEngine(model), pair)
            engine = ReferenceEngine(model, cache=1)
            assert len(engine._portions(pair)) == len(lanes)
            portioned = runs_of(engine, pair)
        assert list(portioned) == list(once)
        assert all(torch.equal(portioned[k], once[k]) for k in once)


class TestPlainPipeline:
    """Invariant 2."""

    @pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'
    @pytest.mark.parametrize(
        ("name", "steps", "calls"),
        [
            ("PNDM", 50, 51),
            ("DDIM", 10, 10),
            ("HeunDiscrete", 10, 19),
            ("EulerDiscrete", 10, 10),
            ("EulerAncestralDiscrete", 10, 10),
            ("DPMSolverMultistep", 10, 10),
            ("UniPCMultistep", 10, 10),
        ],
    )
    def test_clean_run(self, pipeline, probe, record_property, name, steps, calls):
        with scope(pipeline):
            pipeline.scheduler = make_scheduler(name)
            plain, plain_noise = self.plainly(pipeline, probe.prompt, steps)
            noise: list[Tensor] = []
            model = Model(pipeline)
            with watching({"": pipeline.unet}, lambda _, out: noise.append(out)):
                pair = make_pair(model, probe, steps=steps)
                ours = ReferenceEngine(model).denoise(CLEAN, pair.texts[CLEAN], pair)
            twice, _ = self.plainly(pipeline, [probe.prompt] * 2, steps)
        assert len(noise) == len(plain_noise) == calls
        assert rms(noise[0] - plain_noise[0]) <= 1e-5 * rms(plain_noise[0])
        assert rms(ours - plain) <= 1e-4 * rms(plain)
        record_property(
            "batch 1 against batch 2, plain diffusers", rms(twice[:1] - plain) / rms(plain)
        )

    def plainly(self, pipeline, prompt, steps) -> tuple[Tensor, list[Tensor]]:
        noise: list[Tensor] = []
        rows = 1 if isinstance(prompt, str) else len(prompt)
        generators = [torch.Generator().manual_seed(3) for _ in range(rows)]
        with watching({"": pipeline.unet}, lambda _, out: noise.append(out)):
            latents = pipeline(
                prompt,
                num_inference_steps=steps,
                guidance_scale=7.5,
                generator=generators,
                output_type="latent",
            ).images
        return latents, noise

    @pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
    def test_guidance_negative_prompt_eta_and_picture(self, pipeline, guidance):
        probe = Probe("a red car", "car", negative_prompt="a cat")
        options = {"num_inference_steps": 4, "guidance_scale": guidance, "eta": 0.7}
        with scope(pipeline):
            pipeline.scheduler = make_scheduler("DDIM")
            plain = pipeline(
                probe.prompt,
                negative_prompt="a cat",
                generator=torch.Generator().manual_seed(3),
                output_type="pt",
                **options,
            ).images
            model = Model(pipeline)
            pair = make_pair(model, probe, steps=4, guidance=guidance, eta=0.7)
            engine = ReferenceEngine(model)
            picture = model.decode(engine.denoise(CLEAN, pair.texts[CLEAN], pair))
        torch.testing.assert_close(picture, plain.float(), rtol=0, atol=1e-5)


class Constant(torch.nn.Module):
    """Gives what was recorded at each call, whatever it is asked."""

    def __init__(self, values: list[Tensor]) -> None:
        super().__init__()
        self.values = iter(values)

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return next(self.values)


class TestSites:
    """Invariant 3."""

    def test_patching_a_site_is_replacing_its_module_by_a_constant(self, pipeline, probe):
        sites, steps = sites_of(pipeline), 3
        lanes = [Lane((Patch(s, ALL),)) for s in sites]
        model = Model(pipeline)
        with scope(pipeline):
            pair = make_pair(model, probe, *lanes, steps=steps, guidance=1.0)
            patched = runs_of(ReferenceEngine(model), pair)
            calls = len(model.scheduler(steps).timesteps)
            record: Recording = {}
            slots = {(s.name, "cond", c) for s in sites for c in range(calls)}
            engine = ReferenceEngine(model)
            engine.denoise(CLEAN, pair.texts[CLEAN], pair, record=record, slots=slots)
        moved = 0
        for i, site in enumerate(sites):
            with scope(pipeline):
                path, _, leaf = site.name.removeprefix("unet.").rpartition(".")
                parent = pipeline.unet.get_submodule(path)
                values = [record[site.name, "cond", c] for c in range(calls)]
                parent._modules[leaf] = Constant(values)
                expected = engine.denoise(CORRUPT, pair.texts[CORRUPT], pair)
            assert torch.equal(patched[i], expected), site.name
            moved += not torch.equal(patched[i], patched[CORRUPT])
        assert moved == len(sites)

    def test_what_is_alive_at_any_depth_carries_the_clean_prediction(self, pipeline, probe):
        """Stream and skips restored at one depth, and the text fed later, give the clean call."""
        depths = Depths(Model(pipeline), probe)
        with scope(pipeline):
            depths.record()
            for k in range(len(depths.sites)):
                clean, got = depths.clean, depths.predict(depths.alive(k) | depths.fed_after(k))
                torch.testing.assert_close(got, clean, rtol=0, atol=1e-5 * rms(clean))
                if k == len(depths.sites) // 2:
                    lost = depths.alive(k) | depths.fed_after(k)
                    lost.discard("conv_in")  # a skip that lives to the last block
                    assert rms(depths.predict(lost) - clean) > 1e-2 * rms(clean)


class Depths:
    """One denoiser call under clean and corrupt inputs, with module outputs swapped at will."""

    def __init__(self, model: Model, probe: Probe) -> None:
        self.model, self.probe = model, probe
        self.sites = [s.name.removeprefix("unet.") for s in sites_of(model.pipe)]
        self.recorded: dict[str, Tensor] = {}
        self.order: list[str] = []

    def record(self) -> None:
        model = self.model
        pair = make_pair(model, self.probe, guidance=1.0)
        generator = torch.Generator().manual_seed(0)
        shape = pair.start.latents.shape
        self.inputs = {
            run: (torch.randn(shape, generator=generator), model.conditioning(text, pair.sampling))
            for run, text in pair.texts.items()
        }
        named = {n: m for n, m in model.unet.named_modules() if self.is_tensor(n)}
        self.modules = named

        def keep(name: str, out: Tensor) -> None:
            self.order.append(name)
            self.recorded[name] = out.clone()

        with watching(named, keep):
            self.clean = self.call(CLEAN)

    def is_tensor(self, name: str) -> bool:
        """Modules whose outputs make up the streams, the skips and the time embedding."""
        parts = name.split(".")
        tail = parts[-2] if parts[-1].isdigit() else parts[-1]
        kinds = ("resnets", "attentions", "downsamplers", "upsamplers", "proj_in", "conv_in")
        return tail in (*kinds, "attn1", "attn2", "ff", "add_embedding")

    def call(self, run: str) -> Tensor:
        latents, inputs = self.inputs[run]
        return self.model.unet(latents, 500, **inputs)[0]

    def predict(self, restored: set[str]) -> Tensor:
        modules = {n: self.modules[n] for n in restored}
        with rewriting(modules, lambda name, _: self.recorded[name]):
            return self.call(CORRUPT)

    def alive(self, k: int) -> set[str]:
        """Modules whose outputs make up what is alive just after site k has run."""
        site = self.sites[k]
        before = self.order[: self.order.index(site) + 1]
        outer = [n for n in before if n == "conv_in" or n.split(".")[-1].isdigit()]
        inner = [n for n in before if n not in outer]
        block = site.split(".transformer_blocks")[0]
        # inside a transformer its own sum so far is alive, beside its input, the last outer tensor
        alive = {outer[-1]} | {n for n in inner if n.startswith(f"{block}.")}
        # a skip is what leaves each stage of a down block: the attention's output if there is one
        alive |= {
            n
            for n in outer
            if n.startswith(("conv_in", "down_blocks"))
            and ("resnets" not in n or n.replace("resnets", "attentions") not in self.modules)
        }
        return alive | ({"add_embedding"} & set(self.modules))

    def fed_after(self, k: int) -> set[str]:
        after = self.order[self.order.index(self.sites[k]) + 1 :]
        return {n for n in after if n.endswith("attn2")}


class TestBranches:
    """Invariant 4, and its mirror."""

    @pytest.mark.parametrize(("branch", "kept"), [("cond", 0), ("uncond", 1)])
    def test_the_other_branch_is_bitwise_untouched(self, pipeline, probe, branch, kept):
        model = Model(pipeline)
        lane = Lane(tuple(Patch(s, Selector(branch=branch)) for s in sites_of(pipeline)))
        with scope(pipeline):
            pair = make_pair(model, probe, lane)
            # shifted, or an unconditional patch would write what is there already
            clean = pair.texts[CLEAN]
            slots = {(p.site.name, branch, 0) for p in lane.patches}
            record: Recording = {}
            engine = ReferenceEngine(model)
            engine.denoise(CLEAN, clean, pair, record=record, slots=slots)
            record = {k: v + 0.5 for k, v in record.items()}
            plain = self.first_call(engine, pair)
            window = (0, 1)
            patches = [Patch(p.site, Selector(branch=branch, window=window)) for p in lane.patches]
            patched = self.first_call(engine, pair, patches=patches, recordings={CLEAN: record})
        assert torch.equal(patched[kept], plain[kept])
        assert not torch.equal(patched[1 - kept], plain[1 - kept])

    def first_call(self, engine: ReferenceEngine, pair: Pair, **options: Any) -> Tensor:
        noise: list[Tensor] = []
        with watching({"": engine.model.unet}, lambda _, out: noise.append(out)):
            engine.denoise(CORRUPT, pair.texts[CORRUPT], pair, **options)
        return noise[0]


class TestErrors:
    """Invariant 7 and NaN."""

    def test_a_patch_that_reaches_no_tensor_is_an_error(self, sd, probe):
        site = sites_of(sd)[0]
        late = Lane((Patch(site, Selector(window=(90, 91)), source="text:clean"),))
        with pytest.raises(ModelError, match=r"resnets\.0 reached no tensor"):
            run(sd, probe, late)

    def test_nan_names_site_and_call(self, sd, probe):
        site = sites_of(sd)[5].name
        calls = []

        def poison(_: str, out: Tensor) -> Tensor | None:
            calls.append(out)
            return out * float("nan") if len(calls) >= 2 else None

        model = Model(sd)
        poisoned = rewriting({site: model.unet_modules()[site]}, poison)
        with scope(sd), poisoned:
            pair = make_pair(model, probe, steps=4)
            engine = ReferenceEngine(model)
            with pytest.raises(ModelError) as caught:
                engine.denoise(CLEAN, pair.texts[CLEAN], pair)
        assert site in str(caught.value)
        assert "in call 1;" in str(caught.value)
        assert "clean run" in str(caught.value)
