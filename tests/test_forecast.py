"""What is said beforehand is what runs."""

import json
from functools import cache

import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fasttrace import Tracer, forecast
from fasttrace.adapters.architectures import ARCHITECTURES
from fasttrace.adapters.catalogue import list_sites
from fasttrace.adapters.unet import meta_inputs
from fasttrace.cli import main
from fasttrace.engine.options import Options
from fasttrace.errors import UsageError
from fasttrace.forecast import architecture, find_device, forecast_architecture, weight_bytes
from fasttrace.types import Probe


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """An architecture takes seconds to compile, and nothing changes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fasttrace.forecast.architecture", cache(architecture))
        yield


PROBES = [Probe(f"a {word} dog", "dog") for word in ("red", "big", "old")]
EVERYTHING = Options(clean="cache", cache=1 << 50)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("lanes", [8, 48])
def test_flops_are_those_executed(tiny, component, lanes):
    options = {"lanes": lanes, "pairs": 2}
    tracer = Tracer(tiny, **options)
    plan = tracer.plan(
        PROBES, component=component, seeds=2, steps=3, guidance=3.0, metric="latent_recovery"
    )
    found = tracer.forecast(plan, Options(**options), measure=False)
    assert found.lanes == plan.lanes
    assert list(tracer.iter_rows(plan, pictures=False))
    assert tracer.engine.executed == found.flops >= found.useful_flops >= found.bound_flops


def test_time_comes_from_a_calibration(sd):
    tracer = Tracer(sd)
    plan = tracer.plan(PROBES[0], steps=2, metric="latent_recovery")
    assert tracer.forecast(plan, measure=False).seconds is None
    assert tracer.forecast(plan).seconds > 0


@pytest.mark.parametrize(
    ("name", "sites", "calls", "teraflop", "plain"),
    [("sd15", 70, 51, 0.803, 1.053), ("sdxl", 227, 50, 6.761, 1.032)],
)
def test_published_architectures(name, sites, calls, teraflop, plain):
    """The job of the README: 24 prompts, one seed, every paper site; within 3 % of the bound."""
    found = forecast_architecture(name, options=EVERYTHING)
    assert (found.calls, found.lanes, found.clean) == (calls, 24 * sites, "cache")
    assert found.useful_flops <= 1.03 * found.bound_flops
    assert found.flops <= 1.1 * found.useful_flops
    assert found.plain_flops / found.bound_flops == pytest.approx(plain, abs=0.001)
    _, denoiser = forecast.architecture(name)
    assert row_of(denoiser) == pytest.approx(teraflop * 1e12, rel=0.01)


def row_of(denoiser):
    """FLOPs of one row of a call, as if nothing were shared between calls."""
    return denoiser.cost.whole + denoiser.text_cost + denoiser.step_cost


@pytest.mark.parametrize(
    ("name", "sites"), [("sd21", 70), ("sdxl", 227), ("kandinsky21", 52), ("kandinsky22", 52)]
)
def test_flops_of_full_size_graphs_are_torchs_own(name, sites):
    """torch's counter sees every product on meta, where attention is made of them."""
    unet, denoiser = forecast.architecture(name)
    assert (
        sum(m.kind == "output" and m.name in paper(name) for m in denoiser.marks.values()) == sites
    )
    side = unet.config.sample_size
    inputs = meta_inputs(unet.config, 1, side, side, 77, torch.half)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(**inputs)
    assert row_of(denoiser) == pytest.approx(counter.get_total_flops(), rel=0.001)


@cache
def paper(name):
    return {site.name for site in list_sites(name)}


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_weights_are_those_of_the_modules(name):
    """Built on meta: text encoders, and the VAE with its published configuration."""
    found = weight_bytes(name)
    with torch.device("meta"):
        for part, config in ARCHITECTURES[name].items():
            if "text_encoder" in part:
                kind = CLIPTextModelWithProjection if "projection_dim" in config else CLIPTextModel
                module = kind(CLIPTextConfig(**config))
                assert found[part] == 2 * sum(p.numel() for p in module.parameters()), part
        channels = (128, 256, 512, 512)
        kinds = {
            f"{way}_block_types": (f"{way.title()}{word}Block2D",) * 4
            for way, word in (("down", "Encoder"), ("up", "Decoder"))
        }
        vae = AutoencoderKL(
            block_out_channels=channels, layers_per_block=2, latent_channels=4, **kinds
        )
    assert found["vae"] == 2 * sum(p.numel() for p in vae.parameters())
    unet = forecast.architecture(name)[0]
    assert found["unet"] == 2 * sum(p.numel() for p in unet.parameters())


def test_weights_of_kandinsky():
    """Billions of parameters as published: a decoder of 1.2, a prior of 1."""
    found = {part: size / 2e9 for part, size in weight_bytes("kandinsky21").items()}
    assert found["unet"] == pytest.approx(1.22, abs=0.05)
    assert found["prior"] == pytest.approx(1.0, abs=0.05)
    assert found["text_encoder"] == pytest.approx(0.56, abs=0.01)  # XLM-Roberta large
    assert "vae" not in found
    assert weight_bytes("kandinsky22")["prior_text_encoder"] / 2e9 == pytest.approx(0.69, abs=0.01)
    with pytest.raises(UsageError, match="'if' is listed and counted, not traced"):
        weight_bytes("if")


@pytest.mark.parametrize("text", ["h100", "H100", "H-100", " h 100"])
def test_a_device_is_found(text):
    assert find_device(text) == "H100"
    with pytest.raises(UsageError, match="Unknown device 'Z80'; expected one of T4"):
        find_device("Z80")


@pytest.mark.parametrize(
    ("name", "weights", "batches"),
    [
        ("sd15", 2.13, {12: 26, 24: 26, 80: 26}),
        ("sd21", 2.58, {12: 26, 24: 26, 80: 26}),
        ("sdxl", 6.94, {12: 6, 24: 26, 80: 26}),
    ],
)
def test_memory_on_cards(name, weights, batches):
    """24 prompts on cards of 12, 24 and 80 GB, of whose free memory the engine takes 80 %."""
    taken = sum(weight_bytes(name).values())
    assert taken / 1e9 == pytest.approx(weights, abs=0.01)
    work = []
    for card, lanes in batches.items():
        memory = int(0.8 * (card * 1e9 - taken))
        found = forecast_architecture(name, memory=memory)
        assert found.peak_bytes <= memory
        assert found.largest_batch == lanes
        work.append(found.flops)
    assert work == sorted(work, reverse=True)  # a smaller card makes smaller batches of more work
    small = int(0.8 * (8e9 - taken))
    found = forecast_architecture(name, memory=small)
    assert (found.peak_bytes > small) == (name == "sdxl")  # said, not hidden


def test_clean_activations_on_a_large_card():
    """60 GB left: SD 1.5's are kept for as many pairs as the cache holds."""
    found = forecast_architecture("sd15", options=Options(cache=15 << 30), memory=60 << 30)
    assert 8 << 30 < found.cache_bytes <= 15 << 30
    assert found.peak_bytes <= 60 << 30
    assert found.flops < forecast_architecture("sd15", memory=60 << 30).flops


@pytest.mark.parametrize("steps", [1, 4])
def test_few_calls(steps):
    """Nearly all of a run of few calls is shared."""
    found = forecast_architecture("sd15", steps=steps, options=EVERYTHING)
    assert found.useful_flops <= 1.05 * found.bound_flops
    assert found.plain_flops >= 1.1 * found.bound_flops


def test_a_small_cache_stays_small():
    for gib in (1, 20, 60):
        cache = gib * 2**30
        found = forecast_architecture("sd15", options=Options(cache=cache))
        assert found.cache_bytes <= cache
        assert found.peak_bytes < cache + 8 * 2**30


def test_pairs_run_alone_where_a_schedule_is_no_weighted_sum():
    """Kandinsky 2.2's reads a variance from the prediction."""
    runs = [forecast_architecture(f"kandinsky2{n}", prompts=2, steps=2) for n in (1, 2)]
    assert [run.pairs for run in runs] == [2, 1]


def test_a_device_gives_an_estimate():
    fast, slow = (forecast_architecture("sd15", device=name).seconds for name in ("H100", "T4"))
    assert 0 < fast < slow


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "sd9"}, "Unknown architecture 'sd9'"),
        ({"name": "if"}, "'if' is listed and counted, not traced"),
        ({"device": "Z80"}, "Unknown device 'Z80'; expected one of T4"),
        ({"prompts": 0}, "0 prompts were asked for"),
        ({"sites": "nowhere"}, "No site matches 'nowhere'"),
        ({"window": (0, 900)}, "outside the run"),
    ],
)
def test_wrong_calls(options, words):
    with pytest.raises(UsageError, match=words):
        forecast_architecture(**({"name": "sd15"} | options))


# ---- from the command line


def test_plan_of_an_architecture(capsys):
    assert main(["plan", "sd15", "--prompts", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["lanes"], found["calls"]) == (140, 51)
    assert found["bound_flops"] < found["useful_flops"] < found["flops"]
    assert {"peak_bytes", "batches"} <= found.keys()
    assert main(["plan", "sd15", "--prompts", "1000000000"]) == 2
    assert "more than 100,000 pairs" in capsys.readouterr().err
    assert main(["plan", "sd15", "--prompts", "2", "--gpu", "A100"]) == 0
    out = capsys.readouterr().out
    assert "140 patched runs of 51 denoiser calls" in out
    assert "the data sheet of the A100, not measured" in out


def test_a_plan_on_paper(capsys):
    """The device in any spelling, the model as an option, a card's memory, what is assumed."""
    arguments = ["plan", "--device", "h100", "--model", "sd15", "--prompts", "2"]
    assert main([*arguments, "--memory", "12GB", "--steps", "10"]) == 0
    out, errors = capsys.readouterr()
    assert errors == ""
    for words in (
        "140 patched runs of 11 denoiser calls",
        "an estimate from the data sheet of the H100, not measured",
        "2.0 GiB in 16 bits (unet, text encoder, vae)",
        "fits in 11.2 GiB: 7.4 GiB of it, 80 % of what the weights leave",
        "40 % of 989 TFLOP/s, the data sheet's peak in 16 bits",
        "38 to 43 % in training on H100 (Llama 3, arXiv:2407.21783)",
    ):
        assert words in out
    assert main([*arguments, "--memory", "3gb", "--json"]) == 0
    small = json.loads(capsys.readouterr().out)
    assert (small["device"], small["assumed"], small["fits"]) == ("H100", 0.4, True)
    assert small["largest_batch"] < 26  # of what fits a card of 12 GB
    assert small["peak_bytes"] <= 0.8 * (3e9 - small["weight_bytes"])


def test_published_steps_and_guidance(capsys):
    assert main(["plan", "kandinsky21", "--prompts", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["calls"] == 100
