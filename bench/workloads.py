"""What the ways are measured on: pipelines, and the sweeps asked of them.

bundled: the model of the package, whose time goes into overhead. middle: random weights in Stable
Diffusion 1.x's layout at 32x32 latents, whose time goes into arithmetic. tiny: for warming up.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.utils import logging as transformers_logging

import fasttrace
from fasttrace.adapters.corruption import corrupt_text, resolve
from fasttrace.adapters.pipeline import Model, embedded_folder
from fasttrace.engine.base import CLEAN, CORRUPT, Pair
from fasttrace.engine.text_lanes import TextLanes
from fasttrace.plan.lanes import RUN, text_lanes
from fasttrace.plan.windows import resolve_windows
from fasttrace.store.probes import read_probes
from fasttrace.testing import tiny_pipeline
from fasttrace.testing.tiny import make_scheduler, tiny_tokenizer
from fasttrace.types import Corruption, Lane, Patch, Probe, Sampling, Selector

QUARTERS = [(0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)]  # of the denoiser calls
TOKENS = ["last subject", "EOS", "padding"]
# In words that the tiny tokenizer knows whole.
PROBES = [
    Probe("a photo of a dog in the house", "dog"),
    Probe("a red car in the style of a painting", "car"),
    Probe("a picture of the tiny cat", "cat"),
    Probe("a big house on the photo", "house"),
]


@dataclass(frozen=True)
class Workload:
    """A loaded pipeline with its captions, each with a seed of its own.

    folder: where the pipeline lies, for tools that load it themselves. every: of the sites, only
    each so-manieth is asked (smoke tests).
    """

    name: str
    folder: Path
    model: Model
    probes: tuple[Probe, ...]
    sampling: Sampling
    every: int = 1

    @cached_property
    def corruption(self) -> Corruption:
        return resolve(self.model, self.probes, Corruption())

    @property
    def calls(self) -> int:
        return len(self.model.scheduler(self.sampling.steps).timesteps)


@dataclass(frozen=True)
class Sweep:
    """What is asked: a pair for each caption, whose lanes are the sweep's."""

    name: str
    workload: Workload
    pairs: tuple[Pair, ...]

    @property
    def of_text(self) -> bool:
        return self.name == "text"

    def engine_pairs(self) -> list[Pair]:
        """As an engine is given them; text-encoder tracing first records the clean encodings."""
        if not self.of_text:
            return list(self.pairs)
        work = self.workload
        return [
            replace(
                pair,
                lane_texts=TextLanes(work.model, probe, work.corruption, pair.texts[CLEAN]).texts,
            )
            for probe, pair in zip(work.probes, self.pairs, strict=True)
        ]


def make_sweep(workload: Workload, name: str) -> Sweep:
    """unet: every paper site. text: (layer, attn or mlp, token). window: every site, 4 windows."""
    model, sampling = workload.model, workload.sampling
    pairs = []
    for seed, probe in enumerate(workload.probes):
        clean = model.text(probe.prompt, probe.negative_prompt, model.guided(sampling))
        texts = {CLEAN: clean, CORRUPT: corrupt_text(model, probe, workload.corruption, clean)}
        lanes = LANES[name](workload, probe)
        pairs.append(Pair(texts, CORRUPT, model.start(sampling, seed), sampling, lanes))
    return Sweep(name, workload, tuple(pairs))


def _unet_lanes(workload: Workload, _probe: Probe) -> tuple[Lane, ...]:
    sampling = workload.sampling
    sites = workload.model.sites(sampling.height, sampling.width).sites
    return tuple(Lane((Patch(site),)) for site in sites[:: workload.every])


def _window_lanes(workload: Workload, probe: Probe) -> tuple[Lane, ...]:
    windows = resolve_windows(QUARTERS, workload.calls)
    whole = [lane.patches[0] for lane in _unet_lanes(workload, probe)]
    return tuple(
        Lane((replace(patch, selector=Selector(window=window)),))
        for window in windows
        for patch in whole
    )


def _text_lanes(workload: Workload, probe: Probe) -> tuple[Lane, ...]:
    model = workload.model
    sites = [s for e in model.encoders for s in e.sites() if s.kind in ("attn", "mlp")]
    planned = text_lanes(model, probe, sites[:: workload.every], TOKENS, workload.corruption)
    return tuple(lane for lane, status in planned if status == RUN)


LANES: dict[str, Callable[[Workload, Probe], tuple[Lane, ...]]] = {
    "unet": _unet_lanes,
    "text": _text_lanes,
    "window": _window_lanes,
}


def load(
    name: str, prompts: int | None, steps: int | None, scratch: Path, every: int = 1
) -> Workload:
    """prompts: how many captions. prompts, steps: None is the workload's own number.

    scratch: where pipelines are saved that have no folder yet.
    """
    quiet()
    return replace(LOADERS[name](prompts, steps, scratch), every=every)


def bundled(prompts: int | None, steps: int | None, _scratch: Path) -> Workload:
    model = Model(fasttrace.load("embedded"))
    folder = embedded_folder("model")
    entries = read_probes(folder.parent / "probes.json")[: prompts or 4]
    return _workload("bundled", folder, model, [e.probe() for e in entries], steps)


def middle(prompts: int | None, steps: int | None, scratch: Path) -> Workload:
    folder = scratch / "middle"
    if not folder.is_dir():
        middle_pipeline().save_pretrained(folder)
    model = Model(fasttrace.load(str(folder)))
    return _workload("middle", folder, model, PROBES[: prompts or 2], steps or 6, 7.5)


def tiny(prompts: int | None, steps: int | None, scratch: Path) -> Workload:
    folder = scratch / "tiny"
    return _workload("tiny", folder, Model(tiny_pipeline(folder=folder)), PROBES[:prompts], steps)


LOADERS: dict[str, Callable[[int | None, int | None, Path], Workload]] = {
    "bundled": bundled,
    "middle": middle,
    "tiny": tiny,
}


def middle_pipeline() -> Any:
    """14 M parameters in the UNet: SD 1.x at an eighth of its width, 70 sites, 77 tokens, PNDM."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 77
    cross = "CrossAttnDownBlock2D"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(40, 80, 160, 160),
            norm_num_groups=8,
            layers_per_block=2,
            attention_head_dim=4,
            cross_attention_dim=128,
            down_block_types=(cross, cross, cross, "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        )
        encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=512,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=77,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        vae = AutoencoderKL(  # latent scores decode nothing
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            latent_channels=4,
        )
    # As initialised, a caption hardly moves the picture and there would be nothing to recover.
    with torch.no_grad():
        for name, weight in (*unet.named_parameters(), *encoder.named_parameters()):
            if name.endswith(("attn2.to_v.weight", "attn2.to_q.weight")):
                weight.mul_(4.0)
            elif "token_embedding" in name:
                weight.mul_(20.0)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler("PNDM"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _workload(
    name: str,
    folder: Path,
    model: Model,
    probes: list[Probe],
    steps: int | None,
    guidance: float | None = None,
) -> Workload:
    sampling = Sampling(
        steps=int(steps or model.default("steps")),
        guidance=float(guidance or model.default("guidance")),
        height=int(model.default("height")),
        width=int(model.default("width")),
    )
    return Workload(name, folder, model, tuple(probes), sampling)


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fasttrace-bench-")


def quiet() -> None:
    """No loading bars and no advice in the output."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
