"""One loaded pipeline as the engines see it: text in, latents through, pictures out."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from fasttrace.adapters.fingerprint import fingerprint
from fasttrace.adapters.readiness import check_ready
from fasttrace.adapters.text import Text, TextEncoder, encode_cond, encode_uncond, find_encoders
from fasttrace.adapters.unet import UnetSites, discover, site_modules
from fasttrace.errors import ModelError, UsageError
from fasttrace.types import Sampling

_DEFAULTS = ("steps", "guidance", "height", "width")


@dataclass(frozen=True)
class Start:
    """Where every run of a (prompt, seed) begins: the first latent and the later noise.

    `latents` [1, C, h, w] are unscaled Gaussian noise; `states` are the states of the generators
    just after they were drawn, one each on its own device, so that stochastic schedulers draw the
    same noise in every run.
    """

    latents: Tensor
    state: Tensor | None
    device: str = "cpu"

    def generator(self) -> torch.Generator | None:
        """A fresh generator that draws what the pipeline's own would draw next."""
        if self.state is None:
            return None
        generator = torch.Generator(self.device)
        generator.set_state(self.state)
        return generator


@dataclass
class Model:
    """A checked pipeline. Raises `ModelError` where it can't be traced as it stands."""

    pipe: Any
    encoders: list[TextEncoder] = field(init=False)

    def __post_init__(self) -> None:
        check_ready(self.pipe)
        self.encoders = find_encoders(self.pipe)

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
        if name in ("height", "width"):
            size = self.unet.config.sample_size
            side = size if isinstance(size, int) else size[0 if name == "height" else 1]
            return side * self.pipe.vae_scale_factor
        # The pipelines' own signatures hold the rest: 50 steps, guidance 7.5 or 5.0.
        given = {"steps": "num_inference_steps", "guidance": "guidance_scale"}[name]
        return inspect.signature(type(self.pipe).__call__).parameters[given].default

    def sites(self, height: int, width: int) -> UnetSites:
        """UNet sites for pictures of height x width pixels."""
        scale = self.pipe.vae_scale_factor
        tokens = int(self.encoders[0].tokenizer.model_max_length)
        return discover(self.unet, height // scale, width // scale, tokens)

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
        if self.two_texts and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
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
        scale = self.pipe.vae_scale_factor
        shape = (
            1,
            self.unet.config.in_channels,
            sampling.height // scale,
            sampling.width // scale,
        )
        device = generator.device if generator is not None else self.device
        own = torch.Generator(device)
        if generator is None:
            own.manual_seed(seed)
        else:
            own.set_state(generator.get_state())
        if latents is None:
            dtype = self.pipe.text_encoder.dtype
            latents = randn_tensor(shape, generator=own, device=self.device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise UsageError(
                f"latents have shape {tuple(latents.shape)}; expected {shape} for a picture of "
                f"{sampling.height}x{sampling.width}."
            )
        return Start(latents.to(self.device), own.get_state(), str(device))

    def text(self, prompt: str, negative_prompt: str, guided: bool) -> Text:
        """Everything the denoiser reads of a prompt; hooks on the encoders see the prompt alone."""
        cond, pooled = encode_cond(self.pipe, prompt, self.device)
        if not guided:
            return Text(cond, pooled)
        uncond, uncond_pooled = encode_uncond(self.pipe, negative_prompt, self.device)
        return Text(cond, pooled, uncond, uncond_pooled)

    def conditioning(self, text: Text, sampling: Sampling, copies: int = 1) -> dict[str, Any]:
        """The UNet's keyword arguments; rows: all unconditional copies, then all conditional."""
        halves = [h for h in (text.uncond, text.cond) if h is not None]
        inputs: dict[str, Any] = {
            "encoder_hidden_states": torch.cat([h for h in halves for _ in range(copies)]),
            "return_dict": False,
        }
        rows = len(halves) * copies
        if self.two_texts:
            if text.pooled is None:
                raise ModelError("The UNet wants a pooled text vector, but the pipeline gave none.")
            size = (sampling.height, sampling.width)
            times = self.pipe._get_add_time_ids(
                size,
                (0, 0),
                size,
                dtype=text.cond.dtype,
                text_encoder_projection_dim=text.pooled.shape[-1],
            )
            pooled = [h for h in (text.uncond_pooled, text.pooled) if h is not None]
            inputs["added_cond_kwargs"] = {
                "text_embeds": torch.cat([h for h in pooled for _ in range(copies)]),
                "time_ids": times.to(self.device).repeat(rows, 1),
            }
        if getattr(self.unet.config, "time_cond_proj_dim", None) is not None:
            scale = torch.tensor(sampling.guidance - 1).repeat(rows)
            embedding = self.pipe.get_guidance_scale_embedding(
                scale, embedding_dim=self.unet.config.time_cond_proj_dim
            )
            inputs["timestep_cond"] = embedding.to(device=self.device, dtype=text.cond.dtype)
        return inputs

    def guided(self, sampling: Sampling) -> bool:
        """Whether a call has unconditional rows: guidance above 1, unless the UNet embeds it."""
        embeds = getattr(self.unet.config, "time_cond_proj_dim", None) is not None
        return sampling.guidance > 1 and not embeds

    @cached_property
    def _float_vae(self) -> Any:
        """SDXL's VAE overflows in half precision; a copy, since the pipeline's own has to stay."""
        return copy.deepcopy(self.pipe.vae).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to pictures [B, 3, H, W] in [0, 1], float32, never 8 bits."""
        vae = self.pipe.vae
        config = vae.config
        if vae.dtype == torch.float16 and getattr(config, "force_upcast", False) and self.two_texts:
            vae = self._float_vae
            latents = latents.float()
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if self.two_texts and mean is not None and std is not None:
            column = (1, len(mean), 1, 1)
            latents = latents * latents.new_tensor(std).view(column) / config.scaling_factor
            latents = latents + latents.new_tensor(mean).view(column)
        else:
            latents = latents / config.scaling_factor
        pictures: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        pictures = (pictures / 2 + 0.5).clamp(0, 1).float()
        if not torch.isfinite(pictures).all():
            raise ModelError(
                f"The VAE gives NaN for finite latents in {vae.dtype}; load it in float32."
            )
        return pictures


def embedded_folder(part: str) -> Path:
    """Where the bundled model keeps "model", "score" or "classifiers"."""
    return Path(__file__).resolve().parent.parent / "embedded" / part


def generators_of(
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> list[torch.Generator]:
    if generator is None:
        return []
    return [generator] if isinstance(generator, torch.Generator) else list(generator)
