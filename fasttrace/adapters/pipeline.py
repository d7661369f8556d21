"""One loaded pipeline as the engines see it: text in, latents through, pictures out."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from fasttrace.adapters.architectures import GUIDANCE, STEPS
from fasttrace.adapters.family import Family
from fasttrace.adapters.fingerprint import fingerprint
from fasttrace.adapters.kandinsky import Kandinsky
from fasttrace.adapters.stable import Stable
from fasttrace.adapters.text import Text, TextEncoder, check_places
from fasttrace.adapters.unet import UnetSites, discover, site_modules
from fasttrace.errors import ModelError, UsageError
from fasttrace.plugins import FAMILIES, brief, plugins, warn
from fasttrace.types import Sampling

_DEFAULTS = ("steps", "guidance", "height", "width")


@dataclass(frozen=True)
class Start:
    """Where every run of a (prompt, seed) begins: the first latent and the later noise.

    `latents` [1, C, h, w] are unscaled Gaussian noise; `state` is the generator's just after they
    were drawn, on its own device, so that stochastic schedulers draw the same noise in every run.
    first: its state before anything was drawn, which is where a prior begins. given: whether the
    latents were not drawn.
    """

    latents: Tensor
    state: Tensor | None
    device: str = "cpu"
    first: Tensor | None = None
    given: bool = False

    def generator(self) -> torch.Generator | None:
        """A fresh generator that draws what the pipeline's own would draw next."""
        if self.state is None:
            return None
        generator = torch.Generator(self.device)
        generator.set_state(self.state)
        return generator

    def first_generator(self) -> torch.Generator:
        """A fresh one that draws what the pipeline draws first of all."""
        generator = torch.Generator(self.device)
        if self.first is not None:
            generator.set_state(self.first)
        return generator


@dataclass
class Model:
    """A checked pipeline. Raises `ModelError` where it can't be traced as it stands."""

    pipe: Any
    family: Family = field(init=False)
    encoders: list[TextEncoder] = field(init=False)

    def __post_init__(self) -> None:
        self.family = family_of(self.pipe)
        self.family.check()
        self.encoders = self.family.encoders()
        for encoder in self.encoders:
            check_places(encoder)

    @property
    def unet(self) -> Any:
        """The UNet itself: hooks don't reach into a compiled wrapper."""
        return getattr(self.pipe.unet, "_orig_mod", self.pipe.unet)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.unet.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.unet.parameters()).dtype
        return dtype

    @property
    def two_texts(self) -> bool:
        """SDXL: pooled text and picture sizes enter beside the text embedding."""
        return getattr(self.unet.config, "addition_embed_type", None) == "text_time"

    @property
    def scale(self) -> int:
        """Pixels that a latent's place has on a side."""
        return self.family.scale

    def latent_shape(self, sampling: Sampling) -> tuple[int, int, int]:
        """[C, h, w]"""
        scale = self.scale
        channels = int(self.unet.config.in_channels)
        return channels, sampling.height // scale, sampling.width // scale

    @property
    def name(self) -> str:
        """ "embedded", a folder's own name, or the hub id it was loaded from."""
        given = str(getattr(self.pipe, "name_or_path", None) or type(self.pipe).__name__)
        path = Path(given)
        if path.is_dir() and path.resolve() == embedded_folder("model"):
            return "embedded"
        return path.name if path.is_dir() else given

    @property
    def folder(self) -> Path | None:
        """The local folder it was loaded from."""
        given = getattr(self.pipe, "name_or_path", None)
        return Path(given) if given and Path(given).is_dir() else None

    @cached_property
    def defaults(self) -> dict[str, int | float]:
        """What the model folder's `fasttrace.json` says of steps, guidance, height and width."""
        file = self.folder / "fasttrace.json" if self.folder else None
        if file is None or not file.is_file():
            return {}
        try:
            found = json.loads(file.read_text(encoding="utf-8"))["defaults"]
            known = {n: v for n, v in found.items() if n in _DEFAULTS}
            if not all(isinstance(value, int | float) for value in known.values()):
                raise TypeError("a default is not a number")
            return known
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(
                f"{file.name} of the model folder is not of the form "
                '{"defaults": {"steps": 20, "guidance": 7.5}}.'
            ) from error

    def fingerprint(self) -> str:
        return fingerprint(self.pipe)

    def default(self, name: str) -> Any:
        """The model's own default for steps, guidance, height or width."""
        if name in self.defaults:
            return self.defaults[name]
        # Its pipeline class is SDXL's, whose defaults blur a model that was distilled for others.
        if "sdxl-turbo" in self.name.lower() and name in ("steps", "guidance"):
            return STEPS["sdxl-turbo"] if name == "steps" else GUIDANCE["sdxl-turbo"]
        if name in ("height", "width"):
            size = self.unet.config.sample_size
            side = size if isinstance(size, int) else size[0 if name == "height" else 1]
            return side * self.scale
        # The pipelines' own signatures hold the rest: 50 steps, guidance 7.5 or 5.0.
        given = {"steps": "num_inference_steps", "guidance": "guidance_scale"}[name]
        return inspect.signature(type(self.pipe).__call__).parameters[given].default

    def sites(self, height: int, width: int) -> UnetSites:
        """UNet sites for pictures of height x width pixels."""
        tokens = self.encoders[-1].window  # of Kandinsky 2.1's the one that the decoder reads
        return discover(self.unet, height // self.scale, width // self.scale, tokens)

    def unet_modules(self) -> dict[str, nn.Module]:
        return site_modules(self.unet)

    def scheduler(self, steps: int) -> Any:
        """A deep copy of the pipeline's scheduler, set to `steps`. `UsageError` if it refuses."""
        scheduler = copy.deepcopy(self.pipe.scheduler)
        try:
            scheduler.set_timesteps(steps, device=self.device)
        except Exception as error:
            raise UsageError(
                f"The scheduler {type(scheduler).__name__} refuses {steps} steps: {error}"
            ) from error
        self.family.ready(scheduler)
        return scheduler

    def step_options(self, scheduler: Any, eta: float, generator: Any) -> dict[str, Any]:
        """`eta` and `generator` where this scheduler's step takes them."""
        accepted = inspect.signature(scheduler.step).parameters
        options = {"eta": eta, "generator": generator}
        return {k: v for k, v in options.items() if k in accepted}

    def start(
        self,
        sampling: Sampling,
        seed: int,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
    ) -> Start:
        """The first latent as the pipeline's own call draws it.

        A given generator is copied, not advanced. Raises `UsageError` for latents of a wrong shape.
        """
        shape = (1, *self.latent_shape(sampling))
        device = generator.device if generator is not None else self.device
        own = torch.Generator(device)
        if generator is None:
            own.manual_seed(seed)
        else:
            own.set_state(generator.get_state())
        first = own.get_state()
        self.family.skip(own, 1)
        given = latents is not None
        if latents is None:
            latents = self._draw(shape, own)
        elif tuple(latents.shape) != shape:
            raise UsageError(
                f"latents have shape {tuple(latents.shape)}; expected {shape} for a picture of "
                f"{sampling.height}x{sampling.width}."
            )
        return Start(latents.to(self.device), own.get_state(), str(device), first, given)

    def start_of(self, start: Start, negative_prompt: str) -> Start:
        """`start` with this negative prompt, for which a prior draws noise as well."""
        own = start.first_generator()
        before = own.get_state()
        self.family.skip(own, 2)
        if not negative_prompt or start.given or torch.equal(own.get_state(), before):
            return start
        latents = self._draw(tuple(start.latents.shape), own)
        return replace(start, latents=latents.to(self.device), state=own.get_state())

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        found: Tensor = randn_tensor(
            shape, generator=generator, device=self.device, dtype=self.family.latent_dtype()
        )
        return found

    def text(
        self, prompt: str, negative_prompt: str, guided: bool, start: Start | None = None
    ) -> Text:
        """Everything the denoiser reads of a prompt; hooks on the encoders see the prompt alone.

        start: where its (prompt, seed) begins, which a prior's image embedding depends on.
        """
        return self.family.text(prompt, negative_prompt, guided, start)

    def encode(self, prompts: Sequence[str], like: Text) -> list[Text]:
        """Of other prompts of the same (prompt, seed) as `like`: their conditional halves anew."""
        return self.family.encode(prompts, like)

    def conditioning(self, text: Text, sampling: Sampling, copies: int = 1) -> dict[str, Any]:
        """The UNet's keyword arguments; rows: all unconditional copies, then all conditional."""
        return self.family.conditioning(text, sampling, copies)

    def guided(self, sampling: Sampling) -> bool:
        """Whether a call has unconditional rows: guidance above 1, unless the UNet embeds it."""
        embeds = getattr(self.unet.config, "time_cond_proj_dim", None) is not None
        return sampling.guidance > 1 and not embeds

    def guide(self, prediction: Tensor, sampling: Sampling) -> Tensor:
        """What the scheduler is given of a prediction: unconditional rows first, if guided."""
        return self.family.guide(prediction, sampling.guidance if self.guided(sampling) else None)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to pictures [B, 3, H, W] in [0, 1], float32, never 8 bits."""
        pictures = (self.family.decode(latents) / 2 + 0.5).clamp(0, 1).float()
        if not torch.isfinite(pictures).all():
            part = getattr(self.pipe, self.family.decoder)
            name = {"vae": "VAE"}.get(self.family.decoder, self.family.decoder)
            raise ModelError(
                f"The {name} gives NaN for finite latents in {part.dtype}; load it in float32."
            )
        return pictures


def family_of(pipe: Any) -> Family:
    """By the pipeline's components; families that other packages register are asked first.

    One that fails to answer, or lacks something of `Family`, is left out with a warning.
    """
    for name, kind in plugins(FAMILIES).items():
        try:
            if not kind.accepts(pipe):
                continue
            found: Family = kind(pipe)
            lacking = [n for n in vars(Family) if n[0] != "_" and not hasattr(found, n)]
        except Exception as error:
            warn(FAMILIES, name, f"fails on this pipeline ({brief(error)})")
            continue
        if not lacking:
            return found
        warn(FAMILIES, name, f"lacks {', '.join(lacking)}")
    parts = getattr(pipe, "components", None) or {}
    return Kandinsky(pipe) if {"movq", "prior_prior", "prior"} & set(parts) else Stable(pipe)


def embedded_folder(part: str) -> Path:
    """Where the bundled model keeps "model", "score" or "classifiers"."""
    return Path(__file__).resolve().parent.parent / "embedded" / part


def generators_of(
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> list[torch.Generator]:
    if generator is None:
        return []
    return [generator] if isinstance(generator, torch.Generator) else list(generator)
