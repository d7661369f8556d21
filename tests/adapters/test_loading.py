"""However a pipeline was loaded: traced as it stands, or refused in a sentence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import fasttrace
from fasttrace import Tracer
from fasttrace.adapters.catalogue import list_sites
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.scope import scope
from fasttrace.engine.base import CLEAN, CORRUPT, Pair
from fasttrace.engine.fast import FastEngine
from fasttrace.engine.reference import ReferenceEngine
from fasttrace.errors import ModelError
from fasttrace.testing import runs_of, tiny_pipeline
from fasttrace.types import Lane, Patch, Probe, Sampling

PROMPT = "a photo of a dog"
RECOVERY: dict[str, Any] = {"steps": 2, "metric": "latent_recovery"}
KANDINSKY = ("kandinsky21", "kandinsky22")
EVERY = ("sd", "sd21", "sdxl", "sdxl-turbo", *KANDINSKY)
# The pipelines' own warnings, of their own doing.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`callback_steps` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*upcast_vae.* is deprecated"),
]


def picture_of(pipe: Any, steps: int = 2) -> Tensor:
    """[1, 3, 16, 16] in [0, 1], from the pipeline's own call."""
    found: Tensor = pipe(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=3.0,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images
    # 2.1's and 2.2's pipelines leave it in [-1, 1].
    return (found / 2 + 0.5).clamp(0, 1) if "Kandinsky" in type(pipe).__name__ else found


def clean_of(pipe: Any, engine: str = "reference", steps: int = 2) -> Tensor:
    """The same picture, from an engine."""
    with scope(pipe):
        model, sampling = Model(pipe), Sampling(steps, 3.0, 16, 16)
        start = model.start(sampling, 3)
        text = model.text(PROMPT, "", True, start)
        pair = Pair({CLEAN: text, CORRUPT: text}, CORRUPT, start, sampling, ())
        runs = runs_of({"reference": ReferenceEngine, "fast": FastEngine}[engine](model), pair)
        return model.decode(runs[CLEAN]).cpu()


def scores_of(pipe: Any, engine: str, component: str = "unet") -> Tensor:
    tracer = Tracer(pipe, engine=engine)
    more = {"tokens": ["last subject", "EOS"]} if component == "text_encoder" else {}
    plan = tracer.plan(Probe(PROMPT, "dog"), component=component, **RECOVERY, **more)
    return torch.tensor([row.score for row, _ in tracer.iter_rows(plan, pictures=False)])


@pytest.fixture(scope="module")
def plain() -> Callable[[str], Tensor]:
    """Scores of the pipeline as it is, on the reference engine: rows, by component."""
    found = {c: scores_of(tiny_pipeline("sd"), "reference", c) for c in ("unet", "text_encoder")}
    assert len({round(float(s), 4) for s in found["unet"]}) > 5
    return found.__getitem__


class TestDtypes:
    @pytest.mark.parametrize(
        ("family", "dtype"),
        [
            *((family, torch.float16) for family in EVERY),
            ("sdxl", torch.bfloat16),
            ("kandinsky21", torch.bfloat16),
        ],
    )
    def test_half_precision(self, folders, family, dtype):
        """Clean latents of both engines are close to each other and to float32's."""
        pipe = fasttrace.load(str(folders[family]), dtype=dtype)
        assert {p.dtype for p in pipe.unet.parameters()} == {dtype}
        one, other = (clean_of(pipe, engine) for engine in ("reference", "fast"))
        exact = clean_of(fasttrace.load(str(folders[family])))
        step = torch.finfo(dtype).eps
        for found in (one, other):
            assert found.dtype == torch.float32
            assert float((found - exact).abs().mean()) <= 16 * step
        # No half-precision run is exactly the exact one.
        assert not torch.equal(one, exact)

    def test_a_variant(self, folders, tmp_path):
        pipe = fasttrace.load(str(folders["sd"]))
        pipe.save_pretrained(tmp_path / "model", variant="fp16")
        found = fasttrace.load(str(tmp_path / "model"), variant="fp16")
        for (name, one), other in zip(
            found.unet.named_parameters(), pipe.unet.parameters(), strict=True
        ):
            assert torch.equal(one, other), name
        with pytest.raises(ModelError, match="'model' is damaged or incomplete"):
            fasttrace.load(str(tmp_path / "model"), variant="bf16")
        with pytest.raises(ModelError, match="'model' is damaged or incomplete"):
            fasttrace.load(str(tmp_path / "model"))

    def test_a_compiled_half_vae_is_upcast(self, folders):
        pipe = fasttrace.load(str(folders["sdxl"]), dtype="float16")
        latents = torch.ones(1, 4, 16, 16).half()
        with torch.no_grad():
            expected = Model(pipe).decode(latents)
            pipe.vae.decode = torch.compile(pipe.vae.decode, backend="eager")
            assert torch.equal(Model(pipe).decode(latents), expected)

    @pytest.mark.parametrize("family", ["sdxl", "sd"])
    def test_a_half_vae_is_upcast_where_its_pipeline_does(self, folders, family):
        """SDXL's `force_upcast`: pictures are the float32 VAE's, and the VAE stays in halves."""
        pipe = fasttrace.load(str(folders[family]), dtype="float16")
        assert pipe.vae.config.force_upcast
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()
        with scope(pipe):
            found = Model(pipe).decode(latents)
        assert pipe.vae.dtype == torch.float16
        vae = fasttrace.load(str(folders[family]), dtype="float16").vae.float()
        with torch.no_grad():
            exact = vae.decode(latents.float() / vae.config.scaling_factor).sample
        exact = (exact / 2 + 0.5).clamp(0, 1)
        assert torch.equal(found, exact) == (family == "sdxl")
        assert float((found - exact).abs().max()) < 0.05

    def test_an_edited_half_vae_is_read_anew(self, folders):
        pipe = fasttrace.load(str(folders["sdxl"]), dtype="float16")
        model = Model(pipe)
        latents = torch.ones(1, 4, 16, 16).half()
        with torch.no_grad():
            before = model.decode(latents)
            pipe.vae.decoder.conv_out.bias += 0.25
            after = model.decode(latents)
        assert float((after - before).abs().max()) > 0.05


class TestPlaces:
    def test_one_device_by_map(self, folders, plain):
        pipe = DiffusionPipeline.from_pretrained(folders["sd"], device_map="cpu")
        pipe.set_progress_bar_config(disable=True)
        torch.testing.assert_close(scores_of(pipe, "fast"), plain("unet"), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("way", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
    @pytest.mark.parametrize("family", ["sd", "kandinsky22"])
    def test_offloaded(self, family, way):
        pytest.importorskip("accelerate")
        pipe = tiny_pipeline(family)
        getattr(pipe, way)(device="cpu")
        with pytest.raises(ModelError, match="unet is offloaded"):
            Tracer(pipe)
        if "model" in way:  # what the sentence advises
            pipe.remove_all_hooks()
            Tracer(pipe)

    def test_offloaded_in_groups(self):
        pipe = tiny_pipeline("sd")
        here = torch.device("cpu")
        pipe.unet.enable_group_offload(here, here, offload_type="leaf_level")
        with pytest.raises(ModelError, match="unet is offloaded in groups .* at conv_in"):
            Tracer(pipe)

    def test_layerwise_casting(self):
        pipe = tiny_pipeline("sd")
        pipe.unet.enable_layerwise_casting(torch.bfloat16, torch.float32)
        with pytest.raises(ModelError, match="unet stores its weights in another dtype"):
            Tracer(pipe)

    def test_a_prior_elsewhere(self):
        pipe = tiny_pipeline("kandinsky22")
        pipe.prior_prior.to("meta")
        with pytest.raises(ModelError, match="prior_prior has .* weights on the meta device"):
            Tracer(pipe)


class TestSlicing:
    @pytest.mark.parametrize("family", ["sd", "sdxl"])
    def test_vae_slicing_and_tiling(self, family):
        """The decoder's own way of saving memory is kept: pictures are the pipeline's.

        Kandinsky's decoder has neither, as diffusers says.
        """
        pipe = tiny_pipeline(family)
        whole = picture_of(pipe)
        for way in ("enable_slicing", "enable_tiling"):
            getattr(pipe.vae, way)()
            if way == "enable_tiling":
                pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 8, 4
            expected = picture_of(pipe)
            for engine in ("reference", "fast"):
                close = {"rtol": 0, "atol": 1e-4}
                torch.testing.assert_close(clean_of(pipe, engine), expected, **close)
        assert float((expected - whole).abs().max()) > 1e-3  # tiles are blended

    @pytest.mark.parametrize("family", ["sd", "kandinsky22"])
    def test_attention_slicing(self, family):
        """On the reference engine as plain; the fast one says what to do."""
        pipe = tiny_pipeline(family)
        exact = clean_of(pipe)
        pipe.enable_attention_slicing(1)
        torch.testing.assert_close(clean_of(pipe), exact, rtol=0, atol=1e-4)
        with pytest.raises(ModelError, match=r"slicing is on .*disable_attention_slicing\(\)"):
            clean_of(pipe, "fast")
        pipe.disable_attention_slicing()
        torch.testing.assert_close(clean_of(pipe, "fast"), exact, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
class TestCompiled:
    """By `torch.compile`: parts that hooks go into run plainly inside a trace, compiled after."""

    @pytest.mark.parametrize(
        ("part", "component", "engine", "in_place"),
        [
            ("unet", "unet", "reference", True),
            ("unet", "unet", "fast", False),
            ("unet", "unet", "fast", True),
            ("text_encoder", "text_encoder", "reference", False),
            ("text_encoder", "text_encoder", "reference", True),
            ("text_encoder", "text_encoder", "fast", False),
            ("vae", "unet", "fast", False),
        ],
    )
    def test_a_part(self, part, component, engine, in_place, plain):
        pipe = tiny_pipeline("sd")
        calls = []

        def backend(module: Any, _inputs: Any) -> Any:
            def run(*args: Any) -> Any:
                calls.append(part)
                return module(*args)

            return run

        if part == "vae":  # whose `forward` nobody calls
            pipe.vae.decode = torch.compile(pipe.vae.decode, backend=backend)
        elif in_place:
            getattr(pipe, part).compile(backend=backend)
        else:
            setattr(pipe, part, torch.compile(getattr(pipe, part), backend=backend))
        compiled = getattr(pipe, part)
        try:
            picture = picture_of(pipe)
            assert calls
            own, digest = compiled._compiled_call_impl, Tracer(pipe).fingerprint
            scores = scores_of(pipe, engine, component)
            torch.testing.assert_close(scores, plain(component), rtol=0, atol=1e-4)
            assert digest == Tracer(tiny_pipeline("sd")).fingerprint
            # It leaves as it came.
            assert getattr(pipe, part) is compiled
            assert compiled._compiled_call_impl is own
            calls.clear()
            assert torch.equal(picture_of(pipe), picture)
            assert calls
        finally:
            torch._dynamo.reset()

    def test_parts_of_kandinsky(self):
        pipe = tiny_pipeline("kandinsky21")
        expected = scores_of(tiny_pipeline("kandinsky21"), "reference", "text_encoder")
        for part in ("prior_text_encoder", "text_encoder", "unet", "prior_prior"):
            setattr(pipe, part, torch.compile(getattr(pipe, part), backend="eager"))
        try:
            found = scores_of(pipe, "reference", "text_encoder")
        finally:
            torch._dynamo.reset()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


class TestAdapters:
    @pytest.fixture
    def adapted(self) -> Any:
        """LoRA in the UNet and the text encoder, as `load_lora_weights` leaves it."""
        peft = pytest.importorskip("peft")
        pipe = tiny_pipeline("sd")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for part, targets in (
                (pipe.unet, ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj"]),
                (pipe.text_encoder, ["q_proj", "out_proj", "fc2"]),
            ):
                options = {"r": 2, "target_modules": targets, "init_lora_weights": False}
                part.add_adapter(peft.LoraConfig(**options))
        return pipe

    def test_lora_is_traced_as_it_stands(self, adapted, plain):
        assert [s.name for s in Tracer(adapted).sites()] == [
            s.name for s in Tracer(tiny_pipeline("sd")).sites()
        ]
        for engine in ("reference", "fast"):
            close = {"rtol": 0, "atol": 1e-4}
            torch.testing.assert_close(clean_of(adapted, engine), picture_of(adapted), **close)
        for component in ("unet", "text_encoder"):
            scores = scores_of(adapted, "fast", component)
            reference = scores_of(adapted, "reference", component)
            torch.testing.assert_close(scores, reference, rtol=0, atol=1e-4)
            assert not torch.allclose(scores, plain(component), atol=1e-3)

    def test_a_lora_after_tracing_is_seen(self, adapted):
        """And one taken off again."""
        model = Model(adapted)
        engine = FastEngine(model)
        pictures = []
        for on in (True, False, True):
            (adapted.unet.enable_adapters if on else adapted.unet.disable_adapters)()
            with scope(adapted):
                sampling = Sampling(2, 3.0, 16, 16)
                start = model.start(sampling, 3)
                text = model.text(PROMPT, "", True, start)
                lane = Lane((Patch(model.sites(16, 16).sites[0]),))
                pair = Pair({CLEAN: text, CORRUPT: text}, CORRUPT, start, sampling, (lane,))
                found = model.decode(runs_of(engine, pair)[CLEAN])
            torch.testing.assert_close(found, picture_of(adapted), rtol=0, atol=1e-4)
            pictures.append(found)
        assert torch.equal(pictures[0], pictures[2])
        assert float((pictures[0] - pictures[1]).abs().max()) > 1e-2


@pytest.fixture(scope="module", params=KANDINSKY)
def halves(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder whose card names its prior, as on the hub: two folders."""
    root = tmp_path_factory.mktemp(request.param)
    pipe = tiny_pipeline(request.param)
    pipe.prior_pipe.save_pretrained(root / "prior")
    pipe.decoder_pipe.save_pretrained(root / "decoder")
    card = f"---\nprior:\n- {root / 'prior'}\n---\n"
    (root / "decoder" / "README.md").write_text(card, encoding="utf-8")
    return root


class TestKandinskyInTwo:
    def test_a_decoder_brings_its_prior(self, halves):
        family = "kandinsky21" if "kandinsky21" in halves.name else "kandinsky22"
        pipe = fasttrace.load(str(halves / "decoder"))
        assert "Combined" in type(pipe).__name__
        whole = clean_of(tiny_pipeline(family))
        torch.testing.assert_close(clean_of(pipe), whole, rtol=0, atol=1e-4)
        assert Tracer(pipe).name == "decoder"
        half = fasttrace.load(str(halves / "decoder"), dtype="bfloat16")
        assert half.prior_text_encoder.dtype == half.unet.dtype == torch.bfloat16

    def test_without_a_card(self, halves, tmp_path):
        shutil.copytree(halves / "decoder", tmp_path / "alone")
        (tmp_path / "alone" / "README.md").unlink()
        with pytest.raises(ModelError, match="is a Kandinsky decoder without its prior"):
            Tracer(fasttrace.load(str(tmp_path / "alone")))
        with pytest.raises(ModelError, match="is a Kandinsky prior without a decoder"):
            Tracer(fasttrace.load(str(halves / "prior")))

    def test_a_card_without_a_prior(self, halves, tmp_path):
        shutil.copytree(halves / "decoder", tmp_path / "alone")
        (tmp_path / "alone" / "README.md").write_text("---\ntags: []\n---\n", encoding="utf-8")
        with pytest.raises(ModelError, match="'alone' is damaged or incomplete.*prior"):
            fasttrace.load(str(tmp_path / "alone"))

    def test_sites_of_the_decoder_alone(self, halves):
        found = list_sites(str(halves / "decoder"))
        assert {site.kind for site in found} >= {"resnet", "added_kv"}
