"""Every mistake a user can make gets a sentence that names what to do, never a traceback."""

import copy
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fasttrace
from fasttrace import Corruption, Probe, Tracer
from fasttrace.adapters.catalogue import list_sites
from fasttrace.adapters.load import load, parse_device
from fasttrace.errors import FasttraceError, ModelError, UsageError
from fasttrace.testing import tiny_pipeline

DOG = Probe("a photo of a dog", "dog")
RECOVERY = {"steps": 2, "metric": "latent_recovery"}
TEXT = {"component": "text_encoder"}


@pytest.fixture(scope="module")
def tracer(sd):
    return Tracer(sd)


PLANS = [
    ({"probes": Probe("a photo of a dog", "cat")}, "'cat' is not in the prompt"),
    ({"probes": Probe("a photo of a dog", "do")}, "only part of 'dog'"),
    ({"probes": Probe("a dog", "dog", occurrence=3)}, "appears 1 time"),
    ({"probes": Probe("a dog", "")}, "subject is empty"),
    ({"probes": Probe("  ", "dog")}, "prompt is empty"),
    ({"probes": []}, "list of probes is empty"),
    ({"probes": ["a dog"]}, "A probe is a Probe"),
    ({"probes": Probe("dog " * 30, "dog")}, "text window holds 22"),
    ({"probes": Probe("a dog", "dog", negative_prompt="cat " * 30)}, "text window holds 22"),
    ({"component": "txt_encoder"}, "Unknown component.*Did you mean 'text_encoder'"),
    ({"sites": "attn3"}, "No site matches 'attn3'.*'attn2'"),
    ({"sites": "all resnt"}, "Unknown kind of site 'resnt'.*'resnet'"),
    ({"sites": "cross-attn-0-dwn"}, "Did you mean 'cross-attn-0-down'"),
    ({"sites": "unet.nowhere.*"}, "No site matches"),
    ({"sites": []}, "site list is empty"),
    ({"branch": "conditional"}, "Unknown branch"),
    ({"branch": "uncnd"}, "Did you mean 'uncond'"),
    ({"branch": "uncond", "guidance": 1.0}, "no unconditional branch"),
    ({"seeds": 0}, "at least one is needed"),
    ({"seeds": -3}, "at least one is needed"),
    ({"seeds": []}, "Seeds are a count or a list"),
    ({"seeds": "3"}, "Seeds are a count or a list"),
    ({"seeds": [1, -1]}, "Seed -1 is not a whole number"),
    ({"seeds": [2**63]}, "is not a whole number from 0"),
    ({"seeds": [1.5]}, "is not a whole number"),
    ({"steps": 0}, "0 steps were asked for; this scheduler takes 1 to 1000"),
    ({"steps": 1001}, "this scheduler takes 1 to 1000"),
    ({"steps": 2.5}, "2.5 steps"),
    ({"steps": True}, "True steps"),
    ({"guidance": float("nan")}, "guidance nan is not a finite number"),
    ({"guidance": -1}, "guidance -1"),
    ({"eta": 2}, "eta 2 is not between 0 and 1"),
    ({"height": 20}, "height 20 is not a positive multiple of 8"),
    ({"width": 0}, "width 0 is not a positive"),
    ({"height": 80_000, "width": 80_000}, "80000x80000 is larger than any model"),
    ({"window": (0, 99)}, "it makes 3 denoiser calls"),
    ({"window": (2, 1)}, "outside the run"),
    ({"window": (0.2, 3.0)}, "read as fractions"),
    ({"corruption": "noise"}, "Unknown corruption 'noise'"),
    ({"corruption": "embeding_noise"}, "Did you mean 'embedding_noise'"),
    ({"corruption": Corruption(sigma=float("inf"))}, "sigma is inf"),
    ({"corruption": Corruption(sigma=float("nan"))}, "sigma is nan"),
    ({"corruption": Corruption(sigma=-1.0)}, "sigma is -1.0"),
    ({"corruption": Corruption(scale=float("nan"))}, "sigma is nan"),
    ({"corruption": Corruption(sigma="3")}, "sigma is '3'"),
    ({"corruption": Corruption(sigma=())}, "0 sigmas were given; expected one number"),
    ({"corruption": Corruption(sigma=(1.0, 2.0))}, "2 sigmas were given"),
    ({"probes": Probe("cafe\u0301 noir", "caf\u00e9")}, "copy it from there"),
    ({"corruption": "replace"}, "needs a replacement"),
    ({"corruption": Corruption(replacement="cat")}, "takes no replacement"),
    ({"corruption": Corruption("replace", replacement="cat " * 30)}, "text window holds 22"),
    ({"metric": "clip_scre"}, "Did you mean 'clip_score'"),
    ({"metric": "attribute:colour"}, "brings no attribute classifiers"),
    ({"latents": torch.zeros(1, 4, 9, 9)}, r"latents have shape \(1, 4, 9, 9\); expected"),
    ({"latents": torch.zeros(2, 4, 8, 8)}, "2 latents were given for 1 seeds"),
    ({"generator": [torch.Generator()] * 2, "seeds": 1}, "2 generators were given for 1 seeds"),
    ({"generator": [torch.Generator()] * 2}, "Two generators have the same seed"),
    ({"tokens": "EOS"}, "use component='text_encoder'"),
    ({**TEXT, "branch": "both"}, "branch stays 'cond'"),
    ({**TEXT, "window": (0, 1)}, "there is no window"),
    ({**TEXT, "corruption": "output_noise"}, "comes after every text-encoder site"),
    ({**TEXT, "sites": "attn1"}, "No site matches 'attn1'.*'attn'"),
    ({**TEXT, "tokens": "last"}, "Unknown tokens 'last'"),
    ({**TEXT, "tokens": 24}, "outside the text window of 24"),
    ({**TEXT, "tokens": "later"}, "pick nothing of"),
    (
        {**TEXT, "corruption": Corruption("replace", replacement="big cat")},
        "another number of tokens than 'dog'",
    ),
]


@pytest.mark.parametrize(("options", "words"), PLANS)
def test_plans(tracer, options, words):
    with pytest.raises(UsageError, match=words) as caught:
        tracer.plan(**{"probes": DOG, **RECOVERY, **options})
    assert str(caught.value).endswith((".", "?")), caught.value


@pytest.mark.parametrize("extra", [{"subject": "cat"}, {"negative_prompt": "ugly"}])
def test_a_probe_has_its_own_words(tracer, extra):
    with pytest.raises(UsageError, match="A probe has its own subject"):
        tracer.trace(DOG, **extra, **RECOVERY)
    with pytest.raises(UsageError, match="A probe has its own subject"):
        tracer.swap(DOG, "a cat", **extra, **RECOVERY)


def test_trace_without_a_subject(tracer):
    with pytest.raises(UsageError, match="Name the subject"):
        tracer.trace("a dog")


@pytest.mark.parametrize(
    ("other", "neighbours", "words"),
    [
        ("a cat", 0, "0 neighbouring layers"),
        ("a cat", 5, "5 neighbouring layers were asked for, of 4"),
        ("cat " * 30, 1, "text window holds 22"),
    ],
)
def test_swaps(tracer, other, neighbours, words):
    with pytest.raises(UsageError, match=words):
        tracer.swap("a dog", other, neighbours=neighbours, **RECOVERY)


def test_unknown_engine(sd):
    with pytest.raises(UsageError, match="Unknown engine 'fst'"):
        Tracer(sd, engine="fst")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lanes": 4.5}, "lanes is a whole number of 0 or more, not 4.5"),
        ({"lanes": "8"}, "lanes is a whole number of 0 or more, not '8'"),
        ({"pairs": True}, "pairs is a whole number"),
        ({"cache": -5}, "cache is a whole number of 0 or more, not -5"),
        ({"foo": 1}, "Unknown option 'foo'; expected clean, home"),
        ({"lane": 8}, "Unknown option 'lane'.*Did you mean 'lanes'"),
    ],
)
def test_options_of_the_engine(sd, options, words):
    with pytest.raises(UsageError, match=words):
        Tracer(sd, **options)


def test_unknown_arguments(tracer):
    words = "Unknown argument 'stepz'.*Did you mean 'steps'"
    with pytest.raises(UsageError, match=words):
        tracer.trace("a dog", "dog", stepz=1)
    with pytest.raises(UsageError, match=words):
        tracer.swap("a dog", "a cat", stepz=1)


class TestLoading:
    @pytest.mark.parametrize("use", [load, list_sites])
    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("embeded", "There is no model 'embeded'.*Did you mean 'embedded'"),
            ("/nowhere/at/all", "There is no model"),
            ("a b", "There is no model 'a b'"),
        ],
    )
    def test_unknown_names(self, use, name, words):
        with pytest.raises(ModelError, match=words):
            use(name)

    def test_an_architecture_has_no_weights(self):
        with pytest.raises(ModelError, match=r"architecture.*stable-diffusion-v1-5"):
            load("sd15")

    def test_single_files_and_strange_folders(self, tmp_path):
        (tmp_path / "model.safetensors").write_bytes(b"x")
        with pytest.raises(ModelError, match="single file"):
            load(str(tmp_path / "model.safetensors"))
        with pytest.raises(ModelError, match=r"no model_index\.json"):
            load(str(tmp_path))
        (tmp_path / "model_index.json").write_text("{")
        with pytest.raises(ModelError, match="is not JSON"):
            load(str(tmp_path))
        (tmp_path / "model_index.json").write_text('{"vae": ["diffusers", "AutoencoderKL"]}')
        with pytest.raises(ModelError, match="no UNet with a text encoder"):
            list_sites(str(tmp_path))

    @pytest.mark.parametrize("damage", ["cut", "gone", "config"])
    def test_damaged_folders(self, folders, tmp_path, damage):
        folder = tmp_path / "model"
        shutil.copytree(folders["sd"], folder)
        weights = next((folder / "unet").glob("*.safetensors"))
        if damage == "cut":
            weights.write_bytes(weights.read_bytes()[:100])
        elif damage == "gone":
            weights.unlink()
        else:
            (folder / "unet" / "config.json").write_text("[")
        with pytest.raises(ModelError, match="'model' is damaged or incomplete"):
            load(str(folder))

    def test_a_broken_notes_file(self, sd, tmp_path):
        folder = tmp_path / "model"
        sd.save_pretrained(folder)
        (folder / "fasttrace.json").write_text("{")
        tracer = Tracer(load(str(folder)))
        with pytest.raises(ModelError, match="is not of the form"):
            tracer.plan(DOG, metric="latent_recovery")
        for text in ('{"steps": 3}', '{"defaults": {"steps": "3"}}', "[" * 100_000):
            (folder / "fasttrace.json").write_text(text)
            with pytest.raises(ModelError, match="is not of the form"):
                Tracer(load(str(folder))).plan(DOG, metric="latent_recovery")

    def test_importing_gives_no_advice(self):
        code = (
            "from transformers.utils import logging\n"
            "import fasttrace\n"
            "before = logging.get_verbosity()\n"
            "fasttrace.load('embedded')\n"
            "assert logging.get_verbosity() == before"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0
        assert "torchvision" not in done.stderr

    def test_an_offline_hub(self):
        code = (
            "from fasttrace.adapters.load import load\n"
            "from fasttrace.adapters.catalogue import list_sites\n"
            "from fasttrace.errors import ModelError\n"
            "for use in (load, list_sites):\n"
            "    try: use('nobody/nothing-here')\n"
            "    except ModelError as error: print(error)\n"
        )
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        lines = done.stdout.splitlines()
        assert len(lines) == 2
        assert all("the hub is offline (HF_HUB_OFFLINE is set)" in line for line in lines)

    def test_a_hub_out_of_reach_is_one_sentence_at_once(self):
        # Nothing listens there, and the libraries would retry for half a minute.
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
        code = "import sys; from fasttrace.cli import main; sys.exit(main(['sites', 'no/model']))"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "neither a folder here nor reachable on the hub" in done.stderr

    @pytest.mark.parametrize("name", ["", "~no-such-user/model", "./no/model", "../model"])
    def test_names_that_are_no_hub_ids(self, name):
        with pytest.raises(ModelError, match="There is no model"):
            load(name)

    @pytest.mark.parametrize("text", ["[]", "null", "[" * 100_000, '{"unet": 5}'])
    @pytest.mark.parametrize("use", [load, list_sites])
    def test_a_strange_table_of_contents(self, use, text, tmp_path):
        (tmp_path / "model_index.json").write_text(text)
        with pytest.raises(ModelError):
            use(str(tmp_path))

    @pytest.mark.parametrize("text", ["[]", "{}", '{"sample_size": "big"}'])
    @pytest.mark.parametrize(
        ("part", "component"), [("unet", "unet"), ("text_encoder", "text_encoder")]
    )
    def test_strange_configurations(self, folders, tmp_path, part, component, text):
        shutil.copytree(folders["sd"], tmp_path / "model")
        (tmp_path / "model" / part / "config.json").write_text(text)
        with pytest.raises(ModelError, match=r"config|UNet"):
            list_sites(str(tmp_path / "model"), component)

    def test_no_tokenizer(self, folders, tmp_path):
        shutil.copytree(folders["sd"], tmp_path / "model")
        shutil.rmtree(tmp_path / "model" / "tokenizer")
        with pytest.raises(ModelError, match=r"tokenizer|'model' is damaged"):
            Tracer(load(str(tmp_path / "model")))

    def test_dtypes_and_devices(self, folders):
        with pytest.raises(UsageError, match="Unknown dtype 'float8'"):
            load(str(folders["sd"]), dtype="float8")
        with pytest.raises(UsageError, match="Unknown device 'gpu'"):
            parse_device("gpu")
        with pytest.raises(ModelError, match="'cuda:99' is not there"):
            parse_device("cuda:99")
        with pytest.raises(ModelError, match="meta device holds no numbers"):
            parse_device("meta")
        if not torch.xpu.is_available():
            with pytest.raises(ModelError, match="'xpu' is not there"):
                parse_device("xpu")

    def test_unknown_component(self):
        with pytest.raises(UsageError, match="Unknown component 'vae'"):
            list_sites("sd15", "vae")


@pytest.fixture
def broken():
    """A pipeline of its own to break."""
    return tiny_pipeline("sd")


class TestReadiness:
    def refused(self, pipe, words):
        with pytest.raises(ModelError, match=words):
            Tracer(pipe)

    def test_not_a_pipeline(self, broken):
        self.refused(broken.unet, "is not a text-to-image pipeline")

    def test_other_denoisers(self):
        parts = {"unet": None, "transformer": object()}
        pipe = SimpleNamespace(components=parts, encode_prompt=None)
        self.refused(pipe, "has no UNet .found: transformer")

    def test_missing_parts(self, broken):
        broken.text_encoder = None
        self.refused(broken, "loaded without text_encoder")

    def test_meta_weights(self, broken):
        broken.unet.to("meta")
        self.refused(broken, "weights on the meta device")

    def test_offloaded(self, broken):
        broken.unet.conv_in._hf_hook = object()
        self.refused(broken, "is offloaded")

    @pytest.mark.parametrize("part", ["unet", "text_encoder"])
    def test_mixed_dtypes(self, broken, part):
        getattr(broken, part).half()
        self.refused(broken, rf"mixes dtypes \(.*{part} in float16.*dtype=torch\.float32")

    def test_the_vae_has_a_dtype_of_its_own(self, broken):
        broken.vae.double()
        Tracer(broken)

    def test_inpainting(self, broken):
        broken.unet.register_to_config(in_channels=9)
        self.refused(broken, "inpainting")

    def test_image_adapter(self, broken):
        broken.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
        self.refused(broken, "image adapter")

    def test_chunked_feed_forward(self, broken):
        broken.unet.mid_block.attentions[0].transformer_blocks[0].set_chunk_feed_forward(1, 0)
        self.refused(broken, "Feed-forward chunking is on")

    def test_not_a_scheduler(self, broken):
        broken.scheduler = copy.copy(broken.scheduler)
        broken.register_modules(scheduler=Tracer)
        self.refused(broken, "has no .*init_noise_sigma")

    def test_a_scheduler_that_refuses(self, broken):
        broken.scheduler.register_to_config(timestep_spacing="nonsense")
        with pytest.raises(UsageError, match="PNDMScheduler refuses 2 steps"):
            Tracer(broken).plan(DOG, **RECOVERY)

    def test_nan_weights(self, broken):
        broken.unet.mid_block.resnets[0].conv1.weight.data.fill_(float("nan"))
        tracer = Tracer(broken)
        words = r"clean run gives NaN at unet\.mid_block\.resnets\.0 in call 0"
        with pytest.raises(ModelError, match=words):
            list(tracer.iter_rows(tracer.plan(DOG, sites="attn2", **RECOVERY)))

    def test_nan_text(self, broken):
        broken.text_encoder.final_layer_norm.weight.data.fill_(float("nan"))
        tracer = Tracer(broken)
        with pytest.raises(ModelError, match="text embedding of the clean run holds NaN"):
            list(tracer.iter_rows(tracer.plan(DOG, sites="attn2", **RECOVERY)))

    def test_nan_subject(self, broken):
        broken.text_encoder.embeddings.token_embedding.weight.data.fill_(float("nan"))
        with pytest.raises(UsageError, match="embeddings are not finite"):
            Tracer(broken).plan(DOG, **RECOVERY)

    def test_noise_too_large_for_float32(self, broken):
        tracer = Tracer(broken)
        plan = tracer.plan(DOG, sites="attn2", corruption=Corruption(sigma=1e38), **RECOVERY)
        with pytest.raises(ModelError, match=r"runs in torch\.float32, so .* the noise"):
            list(tracer.iter_rows(plan))

    def test_nan_pictures(self, broken):
        broken.vae.decoder.conv_out.weight.data.fill_(float("nan"))
        tracer = Tracer(broken)
        with pytest.raises(ModelError, match="VAE gives NaN"):
            list(tracer.iter_rows(tracer.plan(DOG, sites="attn2", **RECOVERY)))


def test_usage_errors_are_value_errors_and_all_are_ours():
    assert issubclass(UsageError, ValueError)
    assert issubclass(UsageError, FasttraceError)
    assert issubclass(ModelError, FasttraceError)
    assert fasttrace.errors.FasttraceError is FasttraceError
